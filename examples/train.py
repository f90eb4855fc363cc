"""Train DIPO on a MuJoCo task and see what it has learned.

    python examples/train.py
    python examples/train.py --env Hopper-v5 --timesteps 100000 --seed 1 --save-to runs/hopper

The agent has the recommended setting. Everything that is written goes into one folder, by default runs/<env>. Ctrl-C ends the
training early and keeps the agent.
"""

import argparse
import logging
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dipo import DIPO, RECOMMENDED

# Chosen to show something within a quarter of an hour on a CPU. With the paper's 1,000,000 steps, the first 10,000 of them at
# random, DIPO goes further and takes far longer.
TIMESTEPS = 15_000
LEARNING_STARTS = 1_000  # random steps before the first update
EVAL_EPISODES = 5


def random_return(env: gym.Env, episodes: int) -> float:
    """Mean return of actions drawn at random, whatever the observation."""
    total = 0.0
    for _ in range(episodes):
        env.reset()
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            done = terminated or truncated
    return total / episodes


def mean_return(model: DIPO, env: gym.Env, episodes: int) -> float:
    """Mean return of the agent when it explores no more."""
    returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, deterministic=True, return_episode_rewards=True)
    return float(np.mean(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--env", default="HalfCheetah-v5", help="a Gymnasium task with continuous actions (%(default)s)")
    parser.add_argument("--timesteps", type=int, default=TIMESTEPS, help="environment steps to train for (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same run (%(default)s)")
    parser.add_argument("--save-to", type=Path, help="folder for all that is written (runs/<env>)")
    args = parser.parse_args()
    folder: Path = args.save_to or Path("runs") / args.env
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=folder / "warnings.log")
    mujoco.set_mju_user_warning(logging.warning)  # otherwise MuJoCo writes a file of its own, wherever it is started from

    # Two environments: one to learn in, whose episodes are logged to monitor.csv, and one to be judged in.
    env = Monitor(gym.make(args.env), filename=str(folder / "monitor.csv"))
    eval_env = Monitor(gym.make(args.env))
    eval_env.reset(seed=args.seed + 1)
    eval_env.action_space.seed(args.seed + 1)

    model = DIPO("MlpPolicy", env, learning_starts=LEARNING_STARTS, seed=args.seed, verbose=1, **RECOMMENDED)

    print(f"Playing {EVAL_EPISODES} episodes of {args.env}, at random and untrained ...")
    at_random = random_return(eval_env, EVAL_EPISODES)
    before = mean_return(model, eval_env, EVAL_EPISODES)

    try:
        model.learn(args.timesteps, log_interval=5, progress_bar=True)
    except KeyboardInterrupt:
        print(f"\nInterrupted after {model.num_timesteps:,} steps: what was learned until then is kept.")
    path = folder / "dipo.zip"
    model.save(path)

    after = mean_return(model, eval_env, EVAL_EPISODES)
    print(f"\nMean return over {EVAL_EPISODES} episodes of {args.env}")
    print(f"  random actions      {at_random:10.1f}")
    print(f"  before training     {before:10.1f}")
    print(f"  after {model.num_timesteps:>7,} steps {after:10.1f}")
    print("\nThe agent is saved. To use it:")
    print("    from sb3_dipo import DIPO")
    print(f'    model = DIPO.load("{path}")')
    print("    action, _ = model.predict(observation, deterministic=True)")


if __name__ == "__main__":
    main()
