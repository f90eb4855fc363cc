"""N-step returns: the critics' minibatch against a sum written out, the actor's of single steps."""

import pathlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from both import both, mode, silent, small
from envs import TinyEnv, tiny_envs
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dipo import DIPO, DIPONStepReplayBuffer


class CountingEnv(TinyEnv):
    """The observation and the reward are the number of the step since the beginning of time."""

    def __init__(self, first: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        self.now = first

    def _observe(self) -> np.ndarray:
        return np.full(3, self.now / 1000, dtype=np.float32)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self.now += 1
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, _, terminated, truncated, info = super().step(action)
        self.now += 1
        return self._observe(), float(self.now), terminated, truncated, info


def counting(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda first=300 * i: CountingEnv(first, **kwargs) for i in range(n_envs)])  # type: ignore[misc]


@pytest.mark.parametrize("truncate", [True, False], ids=["truncated", "terminated"])
@pytest.mark.parametrize("buffer_size", [200, 27], ids=["", "wrapped"])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("n_steps", [2, 3, 8])
@both
def test_returns(algorithm: type[Any], n_steps: int, n_envs: int, buffer_size: int, truncate: bool) -> None:
    """
    Episodes have 5 steps, so that step t of an episode has min(n, 5 - t) rewards, or fewer at the newest transition:
    those of the step numbers that follow.
    """
    env = counting(n_envs, truncate=truncate)
    model = small(algorithm, env, n_steps=n_steps, gamma=0.5, buffer_size=buffer_size * n_envs)
    model.learn(43 * n_envs)
    batch = model.replay_buffer.sample(200)
    newest = [one.now for one in env.envs]  # type: ignore[attr-defined]
    seen = set()
    for observation, following, reward, done, discount in zip(
        batch.observations[:, 0].numpy(),
        batch.next_observations[:, 0].numpy(),
        batch.rewards[:, 0].numpy(),
        batch.dones[:, 0].numpy(),
        batch.discounts[:, 0].numpy(),
        strict=True,
    ):
        number = round(1000 * observation)
        column = number // 300
        # an episode takes 6 numbers: that of the reset and those of its 5 steps
        step = (number - 300 * column - 1) % 6
        steps = min(n_steps, 5 - step, newest[column] - number)
        expected = sum(0.5**i * (number + 1 + i) for i in range(steps))
        assert reward == pytest.approx(expected, rel=1e-5)
        assert discount == pytest.approx(0.5**steps)
        assert round(1000 * following) == number + steps
        assert done == (not truncate and step + steps == 5)
        seen.add(steps)
    assert seen == set(range(1, min(n_steps, 5) + 1))


@both
def test_learning_saving_and_going_on(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, tiny_envs(2), n_steps=3)
    model.learn(30)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    # SAC warns here that `n_steps` is ignored, though its saved arguments of the buffer have it; DIPO is silent
    with nullcontext() if algorithm is DIPO else pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
        loaded = algorithm.load(tmp_path / "model", env=tiny_envs(2))
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert (loaded.n_steps, loaded.replay_buffer.n_steps) == (3, 3)
    np.testing.assert_array_equal(mode(loaded), mode(model))
    loaded.learn(20, reset_num_timesteps=False)


def test_improvements_are_of_single_steps() -> None:
    """The actor's minibatch holds the observation and the action of one step, wherever in the episode."""
    model: DIPO = small(DIPO, counting(2), n_steps=3)
    model.learn(40)
    buffer = silent(model).replay_buffer
    assert isinstance(buffer, DIPONStepReplayBuffer)
    batch = buffer.sample_improved(100)
    np.testing.assert_array_equal(batch.observations, buffer.observations[batch.rows, batch.envs])
    np.testing.assert_array_equal(batch.actions, buffer.actions[batch.rows, batch.envs])
    np.testing.assert_array_equal(batch.improved_actions, buffer.improved_actions[batch.rows, batch.envs])
    taken, before = buffer.actions.copy(), buffer.improved_actions.copy()
    model.train(3, 8)
    assert (buffer.improved_actions != before).any()
    np.testing.assert_array_equal(buffer.actions, taken)
