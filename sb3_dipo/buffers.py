"""
Replay with two action columns. ``actions`` holds what the environment received; the critic learns from it, and nothing
changes it after ``add()``. ``improved_actions`` starts as a copy of it; the action gradient moves it uphill on Q, and the
actor learns from it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer


class ImprovedSamples(NamedTuple):
    """
    A minibatch for the action gradient and the actor.

    ``observations`` has shape (batch_size, ...), or is a dict of such tensors. ``actions``, those taken, and
    ``improved_actions`` are float32, in [-1, 1], of shape (batch_size, action_dim). ``rows`` and ``envs``, (batch_size,),
    int64, tell where each came from; they are arrays, or tensors where the storage is on the device. What has the row -1 is
    not written back.
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    improved_actions: th.Tensor
    rows: Any
    envs: Any


class ImprovedActionsMixin(ReplayBuffer):
    """
    Adds the column of improved actions to a replay buffer of SB3, and saves only the rows that are filled.

    :param args: as SB3's class
    :param kwargs: as SB3's class
    """

    improved_actions: np.ndarray
    one_row_per_step: ClassVar[tuple[str, ...]] = (
        *("observations", "next_observations", "actions", "rewards", "dones", "timeouts"),
        "improved_actions",
    )
    """The arrays of which only the filled rows are saved. Whatever else a subclass holds is saved as it is."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.improved_actions = np.zeros(self.actions.shape, dtype=np.float32)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Store a transition of each environment, as SB3 does; its improved actions start as the actions taken."""
        row = self.pos
        super().add(*args, **kwargs)
        self.improved_actions[row] = self.actions[row]

    def reset_improved(self) -> None:
        """Forget all improvements: the improved actions become a copy of the actions taken."""
        filled = slice(self.size())
        self.improved_actions[filled] = self.actions[filled]

    def sample_improved(self, batch_size: int, env: VecNormalize | None = None) -> ImprovedSamples:
        """
        Draw a minibatch for the action gradient, independent of the critic's.

        :param batch_size: number of transitions to draw, with replacement
        :param env: to normalise the observations with
        :return: observations, both kinds of actions, and the rows and environments that they came from
        """
        rows, envs = self._draw_places(batch_size)
        observations = _for_each_array(lambda values: values[rows, envs], self.observations)
        return self._make_samples(observations, rows, envs, env)

    def update_improved(self, rows: np.ndarray, envs: np.ndarray, actions: th.Tensor | np.ndarray) -> None:
        """
        Write improved actions back to where they came from. If a place was drawn twice, the last one is kept.

        :param rows: rows of the buffer, (batch_size,); those of -1 are skipped
        :param envs: environments, (batch_size,)
        :param actions: in [-1, 1], (batch_size, action_dim)
        """
        values = actions.detach().cpu().numpy() if isinstance(actions, th.Tensor) else actions
        rows, envs = np.asarray(rows), np.asarray(envs)
        kept = rows >= 0
        self.improved_actions[rows[kept], envs[kept]] = values[kept]

    def refresh_statistics(self, env: VecNormalize | None) -> None:
        """
        Take over the normalisation's statistics for the minibatches to come. Here, where ``sample`` reads those of the
        moment, there is nothing to do.

        :param env: what ``sample`` is given
        """

    def _draw_places(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        if self.optimize_memory_usage and self.full:
            # row `pos` holds the next observation of the newest transition: SB3 leaves it out, too
            rows = (np.random.randint(1, self.buffer_size, size=batch_size) + self.pos) % self.buffer_size
        else:
            rows = np.random.randint(0, self.size(), size=batch_size)
        return rows, np.random.randint(0, self.n_envs, size=batch_size)

    def _make_samples(
        self, observations: Any, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None
    ) -> ImprovedSamples:
        return ImprovedSamples(
            _for_each_array(self.to_torch, self._normalize_obs(observations, env)),
            self.to_torch(self.actions[rows, envs].astype(np.float32)),
            self.to_torch(self.improved_actions[rows, envs]),
            rows,
            envs,
        )

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        # with `optimize_memory_usage`, row `pos` holds the next observation of the newest transition
        n_rows = min(self.size() + self.optimize_memory_usage, self.buffer_size)
        columns = {name: state[name] for name in self.one_row_per_step if name in state}
        return {**state, **{name: _for_each_array(lambda array: array[:n_rows], columns[name]) for name in columns}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for name, description in (state.pop("_pending", None) or {}).items():
            # Version 0.1.0 saved of an empty buffer only the shape and dtype of each array.
            state[name] = _for_each_array(lambda shape_and_dtype: np.zeros(*shape_and_dtype)[:0], description)
        for name in self.one_row_per_step:
            if name in state:
                state[name] = _for_each_array(lambda array: _with_rows(array, state["buffer_size"]), state[name])
        if hasattr(super(), "__setstate__"):
            super().__setstate__(state)  # type: ignore[misc]
        else:
            vars(self).update(state)


def _for_each_array(function: Callable[[Any], Any], values: Any) -> Any:
    """What the function makes of an array, or of each array of a dict."""
    return {key: function(value) for key, value in values.items()} if isinstance(values, dict) else function(values)


def _with_rows(array: np.ndarray, n_rows: int) -> np.ndarray:
    """The array, with empty rows after its own so that it has ``n_rows``."""
    if len(array) == n_rows:
        return array
    extended = np.zeros((n_rows, *array.shape[1:]), dtype=array.dtype)
    extended[: len(array)] = array
    if array.dtype == object:  # HER's infos, which are empty dicts where no transition is stored
        extended[len(array) :] = [[{} for _ in range(array.shape[1])] for _ in range(n_rows - len(array))]
    return extended


class DIPOReplayBuffer(ImprovedActionsMixin, ReplayBuffer):
    """
    SB3's ``ReplayBuffer`` with improved actions (paper, Algorithm 3: the actions that the action gradient replaces).

    :param args: as ``ReplayBuffer``
    :param kwargs: as ``ReplayBuffer``
    :raises ValueError: for ``optimize_memory_usage`` together with ``handle_timeout_termination``, as SB3
    """


class DIPODictReplayBuffer(ImprovedActionsMixin, DictReplayBuffer):
    """
    SB3's ``DictReplayBuffer`` with improved actions.

    :param args: as ``DictReplayBuffer``
    :param kwargs: as ``DictReplayBuffer``
    :raises AssertionError: for ``optimize_memory_usage``, as SB3
    """


class DIPONStepReplayBuffer(ImprovedActionsMixin, NStepReplayBuffer):
    """
    SB3's ``NStepReplayBuffer`` with improved actions: n-step returns are the critic's; the actor learns single steps.

    :param args: as ``NStepReplayBuffer``
    :param kwargs: as ``NStepReplayBuffer``
    :raises NotImplementedError: for ``optimize_memory_usage``, as SB3
    """


class DIPOHerReplayBuffer(ImprovedActionsMixin, HerReplayBuffer):
    """
    SB3's ``HerReplayBuffer`` with improved actions. An improvement is valid only for the goal that it was computed under:
    real transitions keep theirs; relabelled ones climb from the action taken and keep nothing.

    :param args: as ``HerReplayBuffer``
    :param kwargs: as ``HerReplayBuffer``
    :raises AssertionError: for ``optimize_memory_usage``, as SB3
    """

    one_row_per_step = (*ImprovedActionsMixin.one_row_per_step, "infos", "ep_start", "ep_length")

    def sample_improved(self, batch_size: int, env: VecNormalize | None = None) -> ImprovedSamples:
        """
        As :meth:`ImprovedActionsMixin.sample_improved`, with SB3's share of relabelled transitions, whose row is -1 and
        whose improved actions are the actions taken.

        :raises RuntimeError: before the end of the first episode, as SB3
        """
        rows, envs = self._draw_places(batch_size)
        observations = {key: values[rows, envs] for key, values in self.observations.items()}
        n_relabelled = int(self.her_ratio * batch_size)
        if n_relabelled:
            observations["desired_goal"][:n_relabelled] = self._sample_goals(rows[:n_relabelled], envs[:n_relabelled])
        samples = self._make_samples(observations, rows, envs, env)
        samples.improved_actions[:n_relabelled] = samples.actions[:n_relabelled]
        return samples._replace(rows=np.where(np.arange(batch_size) < n_relabelled, -1, rows))

    def _draw_places(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        # only whole episodes can be relabelled
        finished = np.flatnonzero(self.ep_length > 0)
        if len(finished) == 0:
            super().sample(batch_size)  # which raises SB3's own error
        rows, envs = np.unravel_index(np.random.choice(finished, size=batch_size), self.ep_length.shape)
        return rows, envs


IMPROVED: dict[type[ReplayBuffer], type[ImprovedActionsMixin]] = {
    ReplayBuffer: DIPOReplayBuffer,
    DictReplayBuffer: DIPODictReplayBuffer,
    NStepReplayBuffer: DIPONStepReplayBuffer,
    HerReplayBuffer: DIPOHerReplayBuffer,
}
"""SB3's replay buffers, and those with improved actions that take their place."""


def resolve_replay_buffer(
    replay_buffer_class: type[ReplayBuffer] | None,
    replay_buffer_kwargs: dict[str, Any],
    observation_space: spaces.Space,
    n_steps: int,
    gamma: float,
) -> tuple[type[ImprovedActionsMixin], dict[str, Any]]:
    """
    Which replay buffer DIPO uses, and with which arguments.

    :param replay_buffer_class: what the user asked for: None, a class of SB3, or one with improved actions
    :param replay_buffer_kwargs: what the user gave; it has precedence
    :param observation_space: a Dict space takes the Dict buffer
    :param n_steps: above 1 takes the n-step buffer; it holds for one that the user names, too
    :param gamma: the discount factor, for n-step returns
    :return: a class with improved actions, and its arguments
    :raises ValueError: if the class stores no improved actions
    :raises AssertionError: for n-step returns with Dict observations, as SB3
    """
    if replay_buffer_class is None:
        replay_buffer_class = DictReplayBuffer if isinstance(observation_space, spaces.Dict) else ReplayBuffer
    if n_steps > 1:
        assert not isinstance(observation_space, spaces.Dict), (
            "N-step returns are not supported for Dict observation spaces yet."
        )
        if replay_buffer_class in (ReplayBuffer, DIPOReplayBuffer):
            replay_buffer_class = NStepReplayBuffer
        if not issubclass(replay_buffer_class, NStepReplayBuffer):
            raise ValueError(f"`n_steps` must be 1 with `replay_buffer_class={replay_buffer_class.__name__}`, not {n_steps}.")
    if issubclass(replay_buffer_class, NStepReplayBuffer):
        replay_buffer_kwargs = {"n_steps": n_steps, "gamma": gamma, **replay_buffer_kwargs}
    replay_buffer_class = IMPROVED.get(replay_buffer_class, replay_buffer_class)
    if not issubclass(replay_buffer_class, ImprovedActionsMixin):
        names = ", ".join(buffer.__name__ for buffer in (*IMPROVED, *IMPROVED.values()))
        raise ValueError(
            f"`replay_buffer_class` must store improved actions: it may be None, {names}, or a subclass of the latter four, "
            f"not {replay_buffer_class.__name__}."
        )
    return replay_buffer_class, replay_buffer_kwargs


def with_improved_actions(replay_buffer: ReplayBuffer) -> ImprovedActionsMixin:
    """
    A replay buffer as DIPO needs it. One of SB3 is converted: the result shares its arrays, and its improved actions are a
    copy of its actions. One of ours is returned as it is.

    :param replay_buffer: a buffer of SB3 or of ours
    :return: the same data in a class with improved actions
    :raises ValueError: if its class has no counterpart with improved actions
    """
    if isinstance(replay_buffer, ImprovedActionsMixin):
        return replay_buffer
    if type(replay_buffer) not in IMPROVED:
        raise ValueError(
            f"A {type(replay_buffer).__name__} stores no improved actions and cannot be converted: it must be one of "
            f"{', '.join(buffer.__name__ for buffer in IMPROVED)}, or a buffer of DIPO."
        )
    improved_class = IMPROVED[type(replay_buffer)]
    converted: Any = improved_class.__new__(improved_class)
    vars(converted).update(vars(replay_buffer))
    converted.improved_actions = np.zeros(converted.actions.shape, dtype=np.float32)
    converted.reset_improved()
    return converted
