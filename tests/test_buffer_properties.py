"""
For any sequence of adds, samples, write-backs and copies: ``actions`` equals what was added, and ``improved_actions`` what
was last written there.
"""

import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import GoalEnv
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dipo import DIPODictReplayBuffer, DIPOHerReplayBuffer, DIPONStepReplayBuffer, DIPOReplayBuffer

BOX = spaces.Box(-1e6, 1e6, (2,))
ACTION_SPACE = spaces.Box(-1.0, 1.0, (2, 1))
MAX_ENVS = 3

VALUES = st.floats(-1, 1, width=32)
ADD = st.tuples(st.just("add"), st.lists(VALUES, min_size=2 * MAX_ENVS, max_size=2 * MAX_ENVS), st.booleans())
OPERATIONS = st.lists(
    st.one_of(
        # often, so that buffers wrap around
        *[ADD, ADD, ADD, ADD],
        st.tuples(st.just("sample"), st.integers(1, 12), st.booleans()),
        # write to places that were drawn
        st.tuples(st.just("improve"), st.lists(VALUES, min_size=1, max_size=8), st.booleans()),
        # or to any that are filled, twice the same too, or to none (-1)
        st.tuples(
            st.just("write"),
            st.lists(st.tuples(st.integers(-1, 40), st.integers(0, MAX_ENVS - 1), VALUES), min_size=1, max_size=8),
            st.booleans(),
        ),
        st.tuples(st.just("copy"), st.just(None), st.booleans()),
        st.tuples(st.just("reset"), st.just(None), st.just(False)),
    ),
    min_size=10,
    max_size=40,
)


class Model:
    """
    What a buffer has to hold, kept in dicts: (row, environment) to what was added and what was last written there. The
    observation of a transition is its number and its environment, which tells what a minibatch was drawn from.
    """

    def __init__(self, kind: str, rows: int, n_envs: int, optimize: bool):
        self.kind, self.rows, self.n_envs, self.optimize = kind, rows, n_envs, optimize
        self.added = 0
        self.actions: dict[tuple[int, int], np.ndarray] = {}
        self.improved: dict[tuple[int, int], np.ndarray] = {}
        self.numbers: dict[int, int] = {}
        self.env = DummyVecEnv([GoalEnv] * n_envs)
        kwargs: dict[str, Any] = {"device": "cpu", "n_envs": n_envs}
        if optimize:
            kwargs |= {"optimize_memory_usage": True, "handle_timeout_termination": False}
        size = rows * n_envs
        self.buffer: Any = {
            "plain": lambda: DIPOReplayBuffer(size, BOX, ACTION_SPACE, **kwargs),
            "dict": lambda: DIPODictReplayBuffer(size, spaces.Dict({"observation": BOX}), ACTION_SPACE, **kwargs),
            "n-step": lambda: DIPONStepReplayBuffer(size, BOX, ACTION_SPACE, n_steps=3, gamma=0.9, **kwargs),
            "her": lambda: DIPOHerReplayBuffer(size, self.env.observation_space, ACTION_SPACE, self.env, **kwargs),
        }[kind]()

    def observation(self, number: int) -> Any:
        plain = np.array([[number, env] for env in range(self.n_envs)], dtype=np.float32)
        if self.kind == "dict":
            return {"observation": plain}
        if self.kind == "her":
            goal = np.full_like(plain, -1)
            return {"observation": plain, "achieved_goal": plain.copy(), "desired_goal": goal}
        return plain

    def add(self, values: list[float], done: bool) -> None:
        row = self.added % self.rows
        actions = np.array(values, dtype=np.float32).reshape(MAX_ENVS, 2, 1)[: self.n_envs]
        dones = np.full(self.n_envs, done)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": done} for _ in range(self.n_envs)]
        self.buffer.add(
            self.observation(self.added), self.observation(self.added + 1), actions, np.zeros(self.n_envs), dones, infos
        )
        for env in range(self.n_envs):
            self.actions[row, env] = self.improved[row, env] = actions[env].flatten()
        self.numbers[row] = self.added
        self.added += 1

    def sample(self, size: int) -> Any:
        """Draw both minibatches; check that they hold what is in their places."""
        batch = self.buffer.sample_improved(size)
        numbers, envs = self.places(batch.observations)
        np.testing.assert_array_equal(envs, batch.envs)
        relabelled = batch.rows == -1
        assert relabelled.sum() == (int(0.8 * size) if self.kind == "her" else 0)
        for i in range(size):
            row = numbers[i] % self.rows
            assert self.numbers[row] == numbers[i], "not what is there now"
            assert batch.rows[i] == (-1 if relabelled[i] else row)
            stored = self.actions if relabelled[i] else self.improved
            np.testing.assert_array_equal(batch.improved_actions[i], stored[row, envs[i]])
            np.testing.assert_array_equal(batch.actions[i], self.actions[row, envs[i]])
        of_critic = self.buffer.sample(size)
        for number, env, action in zip(*self.places(of_critic.observations), of_critic.actions, strict=True):
            np.testing.assert_array_equal(action, self.actions[number % self.rows, env])
        return batch

    def places(self, observations: Any) -> np.ndarray:
        plain = observations if isinstance(observations, th.Tensor) else observations["observation"]
        return plain.numpy().astype(int).T

    def write(self, rows: list[int], envs: list[int], values: list[float], as_tensor: bool) -> None:
        actions = np.array([[value, -value] for value in values], dtype=np.float32)
        self.buffer.update_improved(np.array(rows), np.array(envs), th.from_numpy(actions) if as_tensor else actions)
        for row, env, action in zip(rows, envs, actions, strict=True):
            if row >= 0:
                self.improved[row, env] = action

    def can_sample(self) -> bool:
        if self.kind == "her":
            return self.added > 0 and bool((self.buffer.ep_length > 0).any())
        # of a full memory-efficient buffer of one row nothing is left
        return self.added > 0 and not (self.optimize and self.rows == 1)

    def check(self) -> None:
        assert self.buffer.size() == min(self.added, self.rows)
        for (row, env), action in self.actions.items():
            np.testing.assert_array_equal(self.buffer.actions[row, env], action)
            np.testing.assert_array_equal(self.buffer.improved_actions[row, env], self.improved[row, env])


@pytest.mark.parametrize("kind", ["plain", "optimized", "dict", "n-step", "her"])
@given(operations=OPERATIONS, rows=st.integers(1, 6), n_envs=st.integers(1, MAX_ENVS))
@settings(max_examples=200, deadline=None)
def test_any_sequence(kind: str, operations: list[Any], rows: int, n_envs: int) -> None:
    model = Model("plain" if kind == "optimized" else kind, rows, n_envs, optimize=kind == "optimized")
    for operation, content, flag in operations:
        if operation == "add":
            model.add(content, flag)
        elif operation == "copy":
            model.buffer = pickle.loads(pickle.dumps(model.buffer)) if flag else deepcopy(model.buffer)
            model.buffer.env = model.env  # HER drops it
        elif operation == "sample" and model.can_sample():
            model.sample(content)
        elif operation == "improve" and model.can_sample():
            batch = model.sample(len(content))
            model.write(list(batch.rows), list(batch.envs), content, flag)
        elif operation == "write" and model.added:
            filled = model.buffer.size()
            places = [(row if row < 0 else row % filled, env % n_envs, value) for row, env, value in content]
            model.write([place[0] for place in places], [place[1] for place in places], [place[2] for place in places], flag)
        elif operation == "reset":
            model.buffer.reset_improved()
            model.improved = dict(model.actions)
        model.check()
