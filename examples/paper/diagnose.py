"""Why an agent is where it is: how far its Q is from what it gets, where its actions lie, and how far they still climb.

    python examples/paper/diagnose.py runs/.../dipo/Hopper-v5_1/Hopper-v5.zip runs/.../tqc/Hopper-v5_1/Hopper-v5.zip

Each agent, in the layout of the RL Zoo, plays some episodes as it acts in training, with sampled actions. Printed are, each a
mean over the states that it visits:

    Q, got     what its critic says of the action that it plays, and the discounted return that follows; states near a time
               limit are left out, as Q looks beyond it; empty where that leaves none
    at edge    the share of the actions' components within 0.01 of an end of the action space
    spread     the standard deviation of 64 actions sampled in one state, in half-widths of the action space (50 states)
    shift      how far one ascent of DIPO moves its actions in each dimension, in half-widths
    gain       by how much Q grows by that
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch as th
from experiments import markdown_table
from grid import CLASSES
from scipy.signal import lfilter  # type: ignore[import-untyped]
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dipo import DIPO, improve_actions, plots

STATES, SAMPLES = 50, 64  # for the spread
NEGLIGIBLE = 0.01  # of a return, what is cut off by a time limit
HEAD = ("agent", "episodes", "return", "length", "Q", "got", "at edge", "spread", "shift", "gain")


def play(model: BaseAlgorithm, env: gym.Env[Any, Any], episodes: int) -> list[dict[str, np.ndarray]]:
    """
    Play with sampled actions.

    :return: of each episode ``observations``, ``actions`` in [-1, 1], ``rewards``, and whether it was ``terminated``
    """
    played = []
    for seed in range(episodes):
        observation, over, rows = env.reset(seed=seed)[0], False, []
        while not over:
            action, _ = model.predict(observation)
            before = observation
            observation, reward, terminated, truncated, _ = env.step(action)
            rows.append((before, model.policy.scale_action(action), reward))
            over = terminated or truncated
        observations, actions, rewards = (np.array(column, dtype=np.float32) for column in zip(*rows, strict=True))
        played.append(dict(observations=observations, actions=actions, rewards=rewards, terminated=np.array(terminated)))
    return played


def discounted(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """What follows each step, (number of steps,)."""
    return np.asarray(lfilter([1.0], [1.0, -gamma], rewards[::-1].astype(float))[::-1])


def diagnose(model: BaseAlgorithm, played: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The numbers of the table, from episodes of ``play``."""
    gamma: float = model.gamma  # type: ignore[attr-defined]
    follows, counted = [], []
    for each in played:  # at a step Q looks so far beyond the time limit
        beyond = 0.0 if each["terminated"] else gamma ** np.arange(len(each["rewards"]), 0, -1)
        follows.append(discounted(each["rewards"], gamma))
        counted.append(np.broadcast_to(beyond, follows[-1].shape) <= NEGLIGIBLE)
    observations, actions = (np.concatenate([each[name] for each in played]) for name in ("observations", "actions"))
    q = plots.q_values(model, observations, actions)
    known = np.concatenate(counted)
    some = observations[np.linspace(0, len(observations) - 1, STATES).astype(int)]
    found = dict(
        episodes=len(played),
        length=np.mean([len(each["rewards"]) for each in played]),
        spread=np.mean([plots.sample_actions(model, each, SAMPLES).std(axis=0) for each in some]),
    )
    found |= {"return": np.mean([each["rewards"].sum() for each in played]), "at edge": (np.abs(actions) > 0.99).mean()}
    if known.any():
        found |= dict(Q=q[known].mean(), got=np.concatenate(follows)[known].mean())
    if isinstance(model, DIPO):
        objective = model.critic.objective(model.policy.obs_to_tensor(observations)[0])
        climb = (model.action_lr, model.action_gradient_steps, model.action_grad_norm_ratio, model.max_action_shift)
        improved = improve_actions(objective, th.as_tensor(actions, device=model.device), *climb).cpu().numpy()
        found["shift"] = np.abs(improved - actions).mean()
        found["gain"] = (plots.q_values(model, observations, improved) - q).mean()
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="+", type=Path, help="files of agents, <algo>/<env>_1/<env>.zip")
    parser.add_argument("--episodes", type=int, default=10, help="of each agent (%(default)s)")
    args = parser.parse_args()
    mujoco.set_mju_user_warning(logging.warning)  # otherwise MuJoCo writes a file
    rows = []
    for path in args.agents:
        algo = path.resolve().parents[1].name
        if algo not in CLASSES or not path.is_file():
            parser.error(f"agents must be files like dipo/Hopper-v5_1/Hopper-v5.zip, of {', '.join(CLASSES)}, not {path}")
        if list(path.parent.rglob("vecnormalize.pkl")):
            parser.error(f"{path} has learned from normalized rewards, with which returns cannot be compared")
        model = CLASSES[algo].load(path, device="cpu")
        found = diagnose(model, play(model, gym.make(path.parent.name.rpartition("_")[0]), args.episodes))
        rows.append([path, *(f"{found[name]:.3g}" if name in found else "" for name in HEAD[1:])])
    print(markdown_table(HEAD, rows))


if __name__ == "__main__":
    main()
