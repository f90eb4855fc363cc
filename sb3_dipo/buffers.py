"""
Replay with two action columns: ``actions``, what the environment received, from which the critic learns, and
``improved_actions``, which start as a copy of it, are moved uphill on Q by the action gradient, and are what the actor
learns. ``actions`` is never changed after ``add()``.
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, TensorDict
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

# The arrays that SB3's buffers allocate at construction, one row per step; none is read before it was written
STORAGE = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "dones",
    "timeouts",
    "infos",
    "ep_start",
    "ep_length",
)

NO_EPISODE_YET = (
    "Unable to sample before the end of the first episode. We recommend choosing a value "
    "for learning_starts that is greater than the maximum number of timesteps in the environment."
)


class ImprovedSamples(NamedTuple):
    """
    A minibatch for the action gradient and the actor.

    ``observations``: (batch_size, ...), or a dict of such; ``improved_actions``: in [-1, 1], (batch_size, action_dim);
    ``rows`` and ``envs``: where each came from, (batch_size,), int64 arrays, or tensors where storage is on the device; a
    row of -1 is not to be written back.
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    improved_actions: th.Tensor
    rows: Any
    envs: Any


class ImprovedActionsMixin:
    """
    Adds the column of improved actions to a replay buffer of SB3, and makes it allocate at the first ``add()``: an agent
    that is only loaded to act needs no memory. A subclass of its own finds no arrays in ``__init__``.

    :param buffer_size: as SB3's class: transitions to hold, of all environments together
    :param args: as SB3's class
    :param kwargs: as SB3's class
    """

    # SB3's attributes
    pos: int
    full: bool
    buffer_size: int
    n_envs: int
    optimize_memory_usage: bool
    actions: np.ndarray
    improved_actions: np.ndarray

    def __init__(self, buffer_size: int, *args: Any, **kwargs: Any):
        # SB3 allocates one row, which tells what the others will be
        super().__init__(1, *args, **kwargs)  # type: ignore[call-arg]
        self.buffer_size = max(buffer_size // self.n_envs, 1)
        pending = {name: _describe(vars(self).pop(name), self.buffer_size) for name in STORAGE if name in vars(self)}
        pending["improved_actions"] = (pending["actions"][0], np.dtype(np.float32))
        if self._storage_device().type == "cpu":
            _warn_if_memory_is_low(pending)
        self._pending: dict[str, Any] | None = pending

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Store a transition of each environment, as SB3; its improved actions start as the actions taken."""
        if self._pending is not None:
            self._make_storage()
        row = self.pos
        super().add(*args, **kwargs)  # type: ignore[misc]
        self.improved_actions[row] = self.actions[row]

    def reset_improved(self) -> None:
        """Forget all improvements: improved actions become a copy of the actions taken."""
        if hasattr(self, "actions"):
            self.improved_actions = self.actions.astype(np.float32)

    def sample_improved(self, batch_size: int, env: VecNormalize | None = None) -> ImprovedSamples:
        """
        Draw a minibatch for the action gradient, independent of the critic's.

        :param batch_size: number of rows to draw, with replacement
        :param env: to normalise the observations with
        :return: observations, improved actions, and the rows and environments that they came from
        """
        rows, envs = self._draw_places(batch_size)
        return ImprovedSamples(
            self._observations_at(rows, envs, env), self._to_torch(self.actions[rows, envs]), self._to_torch(self.improved_actions[rows, envs]), rows, envs
        )

    def update_improved(self, rows: np.ndarray, envs: np.ndarray, actions: th.Tensor | np.ndarray) -> None:
        """
        Write improved actions back to where they came from; of a place that was drawn twice the last is kept.

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
        Take the normalisation's statistics as they are now, for the minibatches to come. Here there is nothing to do:
        minibatches are normalised on the host, with those of the moment.

        :param env: as :meth:`sample` is given
        """

    def _storage_device(self) -> th.device:
        """Whose memory holds the arrays."""
        return th.device("cpu")

    def _make_storage(self) -> None:
        assert self._pending is not None
        vars(self).update({name: _allocate(description) for name, description in self._pending.items()})
        self._pending = None

    def _draw_places(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        if self.optimize_memory_usage and self.full:
            # row `pos` holds the next observation of the newest transition: SB3 leaves it out, too
            rows = (np.random.randint(1, self.buffer_size, size=batch_size) + self.pos) % self.buffer_size
        else:
            rows = np.random.randint(0, self.buffer_size if self.full else self.pos, size=batch_size)
        return rows, np.random.randint(0, self.n_envs, size=batch_size)

    def _observations_at(self, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None) -> th.Tensor | TensorDict:
        observations: Any = self.observations  # type: ignore[attr-defined]
        if isinstance(observations, dict):
            return self._to_torch_obs({key: values[rows, envs] for key, values in observations.items()}, env)
        return self._to_torch_obs(observations[rows, envs], env)

    def _to_torch_obs(self, observations: Any, env: VecNormalize | None) -> th.Tensor | TensorDict:
        observations = self._normalize_obs(observations, env)  # type: ignore[attr-defined]
        if isinstance(observations, dict):
            return {key: self._to_torch(values) for key, values in observations.items()}
        return self._to_torch(observations)

    def _to_torch(self, array: np.ndarray) -> th.Tensor:
        return self.to_torch(array)  # type: ignore[attr-defined]


def _describe(value: Any, rows: int) -> Any:
    if isinstance(value, dict):
        return {key: _describe(array, rows) for key, array in value.items()}
    return (rows, *value.shape[1:]), value.dtype


def _nbytes(description: Any) -> int:
    if isinstance(description, dict):
        return sum(map(_nbytes, description.values()))
    shape, dtype = description
    return math.prod(shape) * dtype.itemsize


def _warn_if_memory_is_low(description: Any) -> None:
    """SB3's warning, whose own sees one row."""
    if sb3_buffers.psutil is None:
        return
    needed, available = _nbytes(description), sb3_buffers.psutil.virtual_memory().available
    if needed > available:
        warnings.warn(
            "This system does not have apparently enough memory to store the complete "
            f"replay buffer {needed / 1e9:.2f}GB > {available / 1e9:.2f}GB",
            stacklevel=3,
        )


def _allocate(description: Any) -> Any:
    if isinstance(description, dict):
        return {key: _allocate(inner) for key, inner in description.items()}
    shape, dtype = description
    return np.zeros(shape, dtype)


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

    def sample_improved(self, batch_size: int, env: VecNormalize | None = None) -> ImprovedSamples:
        """
        As :meth:`ImprovedActionsMixin.sample_improved`, with SB3's share of relabelled transitions, whose row is -1.

        :raises RuntimeError: before the end of the first episode, as SB3
        """
        rows, envs = self._draw_places(batch_size)
        relabelled = np.arange(batch_size) < int(self.her_ratio * batch_size)
        observations = {key: values[rows, envs] for key, values in self.observations.items()}
        if relabelled.any():
            observations["desired_goal"][relabelled] = self._sample_goals(rows[relabelled], envs[relabelled])
        start = np.where(relabelled[:, None], self.actions[rows, envs], self.improved_actions[rows, envs])
        return ImprovedSamples(
            self._to_torch_obs(observations, env), self._to_torch(self.actions[rows, envs]), self._to_torch(start), np.where(relabelled, -1, rows), envs
        )

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> DictReplayBufferSamples:  # type: ignore[override]
        """As SB3's."""
        if self._pending is not None:
            raise RuntimeError(NO_EPISODE_YET)
        return super().sample(batch_size, env)

    def _draw_places(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        # only whole episodes can be relabelled
        finished = np.flatnonzero(self.ep_length > 0) if self._pending is None else np.empty(0)
        if len(finished) == 0:
            raise RuntimeError(NO_EPISODE_YET)
        rows, envs = np.unravel_index(np.random.choice(finished, size=batch_size), self.ep_length.shape)
        return rows, envs


IMPROVED: dict[type[ReplayBuffer], type[ReplayBuffer]] = {
    ReplayBuffer: DIPOReplayBuffer,
    DictReplayBuffer: DIPODictReplayBuffer,
    NStepReplayBuffer: DIPONStepReplayBuffer,
    HerReplayBuffer: DIPOHerReplayBuffer,
}
"""SB3's replay buffers and those with improved actions that take their place."""


def resolve_replay_buffer(
    replay_buffer_class: type[ReplayBuffer] | None,
    replay_buffer_kwargs: dict[str, Any],
    observation_space: spaces.Space,
    n_steps: int,
    gamma: float,
) -> tuple[type[ReplayBuffer], dict[str, Any]]:
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


def with_improved_actions(replay_buffer: ReplayBuffer) -> ReplayBuffer:
    """
    A loaded replay buffer as DIPO needs it; one saved by another algorithm gets its improved actions from its actions.

    :param replay_buffer: a buffer of SB3 or of ours
    :return: the same data in a class with improved actions
    :raises ValueError: if its class has no counterpart with improved actions
    """
    if isinstance(replay_buffer, ImprovedActionsMixin):
        return replay_buffer
    if type(replay_buffer) not in IMPROVED:
        raise ValueError(
            f"A {type(replay_buffer).__name__} stores no improved actions and cannot be converted: the file must hold one of "
            f"{', '.join(buffer.__name__ for buffer in IMPROVED)}, or a buffer saved by DIPO."
        )
    improved_class = IMPROVED[type(replay_buffer)]
    converted = improved_class.__new__(improved_class)
    converted.__dict__.update(replay_buffer.__dict__, _pending=None)
    converted.reset_improved()  # type: ignore[attr-defined]
    return converted
