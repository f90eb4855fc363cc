"""Quantile critics and flows in every situation that SB3 knows: they learn, are saved, pickled, and go on exactly."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from both import MIXED, observations_of, policy_for, silent, space_envs
from checkpoint_run import make_env as walk_envs
from envs import GoalEnv, differences, everything_learned, small_dipo
from helpers import displacement_error
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo import DIPO, load_checkpoint, save_checkpoint


class ResumableGoalEnv(GoalEnv):
    """Whose running episode goes on after a checkpoint."""

    def get_env_state(self) -> Any:
        return self.episode, self.steps

    def set_env_state(self, state: Any) -> None:
        self.episode, self.steps = state


OPTIONS: dict[str, dict[str, Any]] = {
    "quantile": {"critic": "quantile", "layer_norm": True},
    "flow": {"actor": "flow", "num_inference_steps": 3},
    "both, several candidates": {"critic": "quantile", "n_quantiles": 5, "actor": "flow", "num_candidates": 3},
}
SITUATIONS: dict[str, dict[str, Any]] = {
    "vector": {},
    "n-step returns": {"n_steps": 3},
    "Dict": {"space": MIXED},
    "images": {"space": MIXED["camera"]},
    "HER": {"her": True, "replay_buffer_class": HerReplayBuffer, "policy": "MultiInputPolicy"},
    "VecNormalize": {"normalize": True},
    "policy's start": {"action_gradient_start": "policy"},
    "bound": {"max_action_shift": 0.1},
}


def make_env(space: Any = None, her: bool = False, normalize: bool = False) -> Any:
    if her:
        return DummyVecEnv([ResumableGoalEnv] * 2)
    return walk_envs(normalize=normalize) if space is None else space_envs(space, n_envs=2)


def make(situation: str, options: str, accelerate: str = "auto", steps: int = 40) -> tuple[DIPO, Any]:
    """An agent that has learned a little, if at all, and a new environment of the same kind."""
    settings = dict(SITUATIONS[situation])
    of_env = {name: settings.pop(name) for name in ("space", "her", "normalize") if name in settings}
    policy_kwargs = dict(OPTIONS[options])
    if "space" in of_env:
        settings["policy"] = policy = policy_for(of_env["space"])
        name = {"MultiInputPolicy": "cnn_output_dim", "CnnPolicy": "features_dim"}[policy]
        policy_kwargs["features_extractor_kwargs"] = {name: 8}
    model = small_dipo(make_env(**of_env), policy_kwargs=policy_kwargs, accelerate=accelerate, batch_size=32, **settings)
    model.learn(steps)
    assert (model._n_updates > 0) == (steps > 0) and all(parameter.isfinite().all() for parameter in model.policy.parameters())
    return model, make_env(**of_env)


def predictions(policy: Any, observations: Any) -> np.ndarray:
    th.manual_seed(0)
    return np.stack([policy.predict(observations, deterministic=each)[0] for each in (True, False)])


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_saved_pickled_and_gone_on(options: str, situation: str, tmp_path: Path) -> None:
    model, env = make(situation, options)
    observations = observations_of(model)
    expected = predictions(model, observations)

    model.save(tmp_path / "agent")
    np.testing.assert_array_equal(predictions(DIPO.load(tmp_path / "agent", env, device="cpu"), observations), expected)
    model.policy.save(str(tmp_path / "policy"))
    alone = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    np.testing.assert_array_equal(predictions(alone, observations), expected)
    again = pickle.loads(pickle.dumps(model.policy))
    np.testing.assert_array_equal(predictions(again, observations), expected)

    save_checkpoint(model, tmp_path)
    silent(model).train(5, 32)
    loaded = load_checkpoint(tmp_path, env)
    silent(loaded).train(5, 32)
    assert differences(everything_learned(model), everything_learned(loaded)) == []


@pytest.mark.parametrize("accelerate", ["auto", "compile"])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fast_paths_learn_what_the_plain_one_learns(options: str, situation: str, accelerate: str) -> None:
    """As far as learning has moved each network, and not as far as its weights are large."""
    start, (plain, _), (fast, _) = (
        make(situation, options, mode, steps=steps) for mode, steps in (("off", 0), ("off", 40), (accelerate, 40))
    )
    for name in ("actor", "actor_target", "critic", "critic_target"):
        before, expected, found = (list(getattr(model, name).parameters()) for model in (start[0], plain, fast))
        assert displacement_error(found, before, expected) < 0.02, name
