"""Files that version 0.1.0 saved (see data/version_0_1/make.py) load, act as they did, and training goes on from them."""

import io
import pathlib
import shutil
import zipfile
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import differences, everything_learned
from helpers import MODES

from sb3_dipo import DIPO, DIPOPolicy, Sampler, load_checkpoint, save_checkpoint

OLD_FILES = pathlib.Path(__file__).parent / "data" / "version_0_1"
SAMPLERS = {
    "behaviour": Sampler(noise_scale=0.5),
    "target": Sampler(),
    "evaluation": Sampler(noise_scale=0.0, solver="ddim", num_inference_steps=2),
}
DRAWN = [2, -2, -1.10149, 2, 1.09137, -1.40828, 2, 1.81266, 1.65163, 2]
"""What version 0.1.0 drew for every other observation, after `th.manual_seed(0)`: the deterministic actions are all alike."""


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Observations and the deterministic actions for them; improved actions and actions taken of the replay data."""
    with np.load(OLD_FILES / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def saved_parts() -> dict[str, Any]:
    """What the agent's file holds: the state of the policy and of both optimizers."""
    with zipfile.ZipFile(OLD_FILES / "agent.zip") as archive:
        names = ("policy", "actor.optimizer", "critic.optimizer")
        return {name: th.load(io.BytesIO(archive.read(f"{name}.pth")), weights_only=True) for name in names}


def assert_as_saved(model: Any, expected: dict[str, np.ndarray]) -> None:
    """What acts: its deterministic actions and samplers, of an agent or a policy."""
    actions, _ = model.predict(expected["obs"], deterministic=True)
    np.testing.assert_allclose(actions, expected["actions"], rtol=0, atol=1e-6)
    th.manual_seed(0)
    drawn, _ = model.predict(expected["obs"][::2], deterministic=False)
    np.testing.assert_allclose(drawn.flatten(), DRAWN, rtol=0, atol=1e-4)
    policy = model if isinstance(model, DIPOPolicy) else model.policy
    assert policy.samplers == SAMPLERS


def assert_same_replay_data(model: DIPO, expected: dict[str, np.ndarray]) -> None:
    buffer: Any = model.replay_buffer
    assert (buffer.size(), buffer.pos, buffer.full, buffer.buffer_size) == (40, 40, False, 60)
    np.testing.assert_array_equal(buffer.actions[:40], expected["taken"][:40])
    np.testing.assert_array_equal(buffer.improved_actions[:40], expected["improved"][:40])
    assert (expected["improved"] != expected["taken"]).any()


def assert_learning_goes_on(model: DIPO) -> None:
    before = everything_learned(model)
    model.learn(20, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (60, 40)
    after = everything_learned(model)
    assert all(bool(th.isfinite(part).all()) for part in after.values())
    changed = differences(before, after)
    for part in ("actor.", "actor_target.", "critic.", "critic_target.", "actor optimizer", "critic optimizer", "improved"):
        assert any(name.startswith(part) for name in changed), part


@pytest.mark.parametrize("accelerate", MODES)
def test_agent_and_replay_buffer(
    accelerate: str, expected: dict[str, np.ndarray], saved_parts: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    model = DIPO.load(OLD_FILES / "agent.zip", env=gym.make("Pendulum-v1"), device="cpu", accelerate=accelerate)
    assert (model.num_timesteps, model._n_updates, model.batch_size, model.action_gradient_steps) == (40, 20, 8, 2)
    assert_as_saved(model, expected)
    loaded: Any = model.get_parameters()
    assert not differences(loaded["policy"], saved_parts["policy"])
    for name in ("actor.optimizer", "critic.optimizer"):
        for index, state in saved_parts[name]["state"].items():
            for key, value in state.items():
                assert th.equal(loaded[name]["state"][index][key], value), (name, index, key)
    model.load_replay_buffer(OLD_FILES / "replay_buffer.pkl")
    assert_same_replay_data(model, expected)
    # and in the next generation
    model.save(tmp_path / "agent")
    assert_as_saved(DIPO.load(tmp_path / "agent", device="cpu"), expected)
    assert_learning_goes_on(model)


def test_agent_without_environment(expected: dict[str, np.ndarray]) -> None:
    model = DIPO.load(OLD_FILES / "agent.zip", device="cpu")
    assert_as_saved(model, expected)
    model.set_env(gym.make("Pendulum-v1"))
    model.load_replay_buffer(OLD_FILES / "replay_buffer.pkl")
    assert_learning_goes_on(model)


def test_policy(expected: dict[str, np.ndarray], saved_parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    policy = DIPOPolicy.load(str(OLD_FILES / "policy.pth"), device="cpu")
    assert_as_saved(policy, expected)
    assert not differences(dict(policy.state_dict()), saved_parts["policy"])
    policy.save(str(tmp_path / "policy.pth"))
    assert_as_saved(DIPOPolicy.load(str(tmp_path / "policy.pth"), device="cpu"), expected)


def test_parameters_into_an_agent_of_today(expected: dict[str, np.ndarray]) -> None:
    policy_kwargs = {"net_arch": [8, 8], "num_train_timesteps": 4}
    model = DIPO("MlpPolicy", "Pendulum-v1", seed=1, device="cpu", buffer_size=60, policy_kwargs=policy_kwargs)
    model.set_parameters(str(OLD_FILES / "agent.zip"), device="cpu")
    for use, sampler in SAMPLERS.items():
        model.policy.set_sampler(use, **vars(sampler))
    assert_as_saved(model, expected)


def test_checkpoint(expected: dict[str, np.ndarray], saved_parts: dict[str, Any], tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(OLD_FILES / "checkpoint", folder)  # the next one is to take its place
    model = load_checkpoint(folder, gym.make("Pendulum-v1"), device="cpu")
    assert (model.num_timesteps, model._n_updates) == (40, 20)
    assert_as_saved(model, expected)
    assert_same_replay_data(model, expected)
    assert not differences(dict(model.policy.state_dict()), saved_parts["policy"])
    assert_learning_goes_on(model)
    learned = everything_learned(model)
    save_checkpoint(model, folder)
    again = load_checkpoint(folder, gym.make("Pendulum-v1"), device="cpu")
    assert not differences(learned, everything_learned(again))
