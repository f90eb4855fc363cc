"""
Replay in the training device's own memory. Drawing, gathering, normalising and writing back neither wait for the host nor
depend on a number that it knows, so a CUDA graph can hold them and be replayed while the buffer fills.
"""

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dipo.buffers import IMPROVED, DIPOReplayBuffer, ImprovedActionsMixin, ImprovedSamples, with_improved_actions

COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "improved_actions")
"""What a packed row holds, from left to right."""


class DIPODeviceReplayBuffer(ImprovedActionsMixin, ReplayBuffer):
    """
    A :class:`~sb3_dipo.buffers.DIPOReplayBuffer` whose storage is one float32 tensor on ``device``, (rows, n_envs, width);
    ``observations``, ``actions`` and the other arrays of SB3's buffer are views of its columns. Minibatches are drawn by
    torch's default generator of that device. Allocated at the first ``add()``; pickled as a NumPy array.

    :param buffer_size: transitions to hold, of all environments together
    :param observation_space: a Box of floats, of any shape; they are kept in float32
    :param action_space: a Box of floats
    :param device: where the storage lies and minibatches are returned
    :param n_envs: number of environments
    :param optimize_memory_usage: must be False
    :param handle_timeout_termination: as SB3: whether the end of an episode by a time limit is no terminal state
    :raises ValueError: for another space, or ``optimize_memory_usage``
    """

    observations: th.Tensor  # type: ignore[assignment]
    next_observations: th.Tensor  # type: ignore[assignment]
    actions: th.Tensor  # type: ignore[assignment]
    rewards: th.Tensor  # type: ignore[assignment]
    dones: th.Tensor  # type: ignore[assignment]
    timeouts: th.Tensor  # type: ignore[assignment]
    improved_actions: th.Tensor  # type: ignore[assignment]
    # mean, standard deviation and bound of each column, (3, width)
    _statistics: th.Tensor | None = None

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
    ):
        if optimize_memory_usage:
            raise ValueError(f"`optimize_memory_usage` must be False with {type(self).__name__}.")
        for name, space in (("observation_space", observation_space), ("action_space", action_space)):
            if not _is_float_box(space):
                raise ValueError(f"`{name}` must be a Box of floats with {type(self).__name__}, not {space}.")
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device=device,
            n_envs=n_envs,
            handle_timeout_termination=handle_timeout_termination,
        )
        self._shapes = _column_shapes(observation_space, action_space)
        self._width = sum(map(math.prod, self._shapes.values()))

    @property
    def device(self) -> th.device:
        """Where the storage lies; setting it moves what is stored."""
        return self._device

    @device.setter
    def device(self, device: th.device | str) -> None:
        self._device = th.device(device)
        if "_storage" in vars(self) and (moved := self._storage.to(self._device)) is not self._storage:
            self._take(moved)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store a transition of each environment, with one copy to the device; its improved actions start as the actions taken.

        :param obs: (n_envs, ...)
        :param next_obs: (n_envs, ...)
        :param action: in [-1, 1], (n_envs, ...)
        :param reward: (n_envs,)
        :param done: (n_envs,)
        :param infos: of each environment; ``TimeLimit.truncated`` tells an end by a time limit
        """
        if self._pending is not None:
            self._make_storage()
        timeouts = [self.handle_timeout_termination and info.get("TimeLimit.truncated", False) for info in infos]
        columns = (obs, next_obs, action, reward, done, timeouts, action)
        packed = self._staging(self.n_envs, th.float32)
        parts = [np.reshape(column, (self.n_envs, -1)) for column in columns]
        np.concatenate(parts, axis=1, out=packed.numpy(), casting="unsafe")
        self._storage[self.pos].copy_(packed, non_blocking=True)

        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0
        self._n_rows.fill_(self.size())

    def reset(self) -> None:
        """Forget all transitions, as SB3."""
        super().reset()
        if self._pending is None:
            self._n_rows.fill_(0)

    def reset_improved(self) -> None:
        """Forget all improvements: improved actions become a copy of the actions taken."""
        if self._pending is None:
            self.improved_actions.copy_(self.actions)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        Draw a minibatch for the critics.

        :param batch_size: number of transitions to draw, with replacement
        :param env: to normalise observations and rewards with, by the statistics of the last :meth:`refresh_statistics`
        :return: tensors on the device, of (batch_size, ...) each
        :raises ValueError: if the buffer is empty
        """
        return self._samples_at(*self._draw_places(batch_size), env)

    def sample_improved(self, batch_size: int, env: VecNormalize | None = None) -> ImprovedSamples:
        """
        Draw a minibatch for the action gradient, independent of the critics'.

        :param batch_size: number of transitions to draw, with replacement
        :param env: to normalise observations with, by the statistics of the last :meth:`refresh_statistics`
        :return: tensors on the device, ``rows`` and ``envs`` int64
        :raises ValueError: if the buffer is empty
        """
        rows, envs = self._draw_places(batch_size)
        columns = self._columns_at(rows, envs, env)
        return ImprovedSamples(columns["observations"], columns["improved_actions"], rows, envs)

    def update_improved(
        self, rows: np.ndarray | th.Tensor, envs: np.ndarray | th.Tensor, actions: th.Tensor | np.ndarray
    ) -> None:
        """
        Write improved actions back to where they came from; of a place that was drawn twice the last is kept.

        :param rows: rows of the buffer, (batch_size,); those of -1 are skipped
        :param envs: environments, (batch_size,)
        :param actions: in [-1, 1], (batch_size, action_dim)
        """
        rows, envs = th.as_tensor(rows, device=self.device), th.as_tensor(envs, device=self.device)
        actions = th.as_tensor(actions, dtype=th.float32, device=self.device).detach()
        skipped = rows < 0
        # what is skipped goes to place 0, where it loses to any other
        places = (rows * self.n_envs + envs).masked_fill(skipped, 0)
        order = th.arange(len(rows), device=self.device).masked_fill(skipped, -1)
        # all writers of a place write the last one's action, so it does not matter which of them the device lets win
        self._last_writer.index_fill_(0, places, -1).scatter_reduce_(0, places, order, "amax")
        last = self._last_writer.index_select(0, places)
        improved = self.improved_actions.view(-1, self.action_dim)
        written, kept = actions.index_select(0, last.clamp(min=0)), improved.index_select(0, places)
        improved.index_copy_(0, places, th.where((last >= 0).unsqueeze(1), written, kept))

    def refresh_statistics(self, env: VecNormalize | None) -> None:
        """
        Copy the normalisation's statistics to the device, for the minibatches to come. Call it before updates, outside of a
        captured graph; sampling does it by itself only if it was never done.

        :param env: as :meth:`sample` is given; None does nothing
        """
        if env is None:
            return
        statistics = self._staging(3, th.float64)
        # those that change nothing
        statistics.copy_(th.tensor([[0.0], [1.0], [math.inf]]))
        columns = self._split(statistics)
        if env.norm_obs:
            assert isinstance(env.obs_rms, RunningMeanStd)
            for name in ("observations", "next_observations"):
                columns[name][0] = th.as_tensor(env.obs_rms.mean)
                columns[name][1] = th.as_tensor(np.sqrt(env.obs_rms.var + env.epsilon))
                columns[name][2] = env.clip_obs
        if env.norm_reward:
            columns["rewards"][1] = math.sqrt(env.ret_rms.var + env.epsilon)
            columns["rewards"][2] = env.clip_reward
        if self._statistics is None:
            self._statistics = th.empty_like(statistics, device=self.device)
        self._statistics.copy_(statistics, non_blocking=True)

    # ------------------------------------------------------------------------------------------------- minibatches

    def _draw_places(self, batch_size: int) -> tuple[th.Tensor, th.Tensor]:  # type: ignore[override]
        if self.size() == 0:
            raise ValueError("The replay buffer is empty.")
        fractions = th.rand(batch_size, dtype=th.float64, device=self.device)
        rows = th.minimum((fractions * self._n_rows).long(), self._n_rows - 1)
        return rows, th.randint(self.n_envs, (batch_size,), device=self.device)

    def _get_samples(self, batch_inds: np.ndarray | th.Tensor, env: VecNormalize | None = None) -> ReplayBufferSamples:
        rows = th.as_tensor(batch_inds, device=self.device)
        return self._samples_at(rows, th.randint(self.n_envs, rows.shape, device=self.device), env)

    def _samples_at(self, rows: th.Tensor, envs: th.Tensor, env: VecNormalize | None) -> ReplayBufferSamples:
        columns = self._columns_at(rows, envs, env)
        return ReplayBufferSamples(
            columns["observations"],
            columns["actions"],
            columns["next_observations"],
            (columns["dones"] * (1 - columns["timeouts"])).unsqueeze(1),
            columns["rewards"].unsqueeze(1),
        )

    def _columns_at(self, rows: th.Tensor, envs: th.Tensor, env: VecNormalize | None) -> dict[str, th.Tensor]:
        packed = self._storage.flatten(0, 1).index_select(0, rows * self.n_envs + envs)
        if env is not None:
            if self._statistics is None:
                self.refresh_statistics(env)
            assert self._statistics is not None
            mean, deviation, bound = self._statistics
            # in float64, as SB3 does it
            packed = ((packed - mean) / deviation).clamp(-bound, bound).float()
        return self._split(packed)

    # ------------------------------------------------------------------------------------------------- storage

    def _split(self, packed: th.Tensor) -> dict[str, th.Tensor]:
        """Views of the columns, (..., width) to (..., *shape) of each."""
        parts = packed.split([math.prod(shape) for shape in self._shapes.values()], dim=-1)
        return {
            name: part.view(*packed.shape[:-1], *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _staging(self, rows: int, dtype: th.dtype) -> th.Tensor:
        # torch hands out pinned memory again only after the asynchronous copies from it are done
        return th.empty(rows, self._width, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _storage_device(self) -> th.device:
        return self.device

    def _make_storage(self) -> None:
        self._take(th.zeros(self.buffer_size, self.n_envs, self._width, device=self.device))
        self._pending = None

    def _take(self, storage: th.Tensor) -> None:
        self._storage = storage
        vars(self).update(self._split(storage))
        self._n_rows = th.full((), self.size(), dtype=th.int64, device=self.device)
        self._last_writer = th.empty(self.buffer_size * self.n_envs, dtype=th.int64, device=self.device)
        self._statistics = None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if not isinstance(value, th.Tensor)}
        if self._pending is None:
            state["_storage"] = self._storage[: self.size()].cpu().numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        filled = state.pop("_storage", None)
        vars(self).update(state)
        if self.device.type == "cuda" and (self.device.index or 0) >= th.cuda.device_count():
            self.device = th.device("cpu")
        if filled is not None:
            self._make_storage()
            self._storage[: len(filled)] = th.from_numpy(filled)


def as_storage(replay_buffer: ReplayBuffer, replay_buffer_class: type[ReplayBuffer]) -> ReplayBuffer:
    """
    A replay buffer with its data where a class keeps them: in NumPy arrays on the host, or in a tensor on the device.

    :param replay_buffer: a buffer of SB3 or of ours; SB3's gets its improved actions from its actions
    :param replay_buffer_class: the class whose kind of storage is wanted; of the same kind, another class is kept
    :return: the same transitions in the same places
    :raises ValueError: if it cannot be converted: between host and device, only :class:`DIPOReplayBuffer` and
        :class:`DIPODeviceReplayBuffer` can
    """
    source: Any = with_improved_actions(replay_buffer)
    target_class = IMPROVED.get(replay_buffer_class, replay_buffer_class)
    if isinstance(source, DIPODeviceReplayBuffer) == issubclass(target_class, DIPODeviceReplayBuffer):
        return source
    plain = (DIPOReplayBuffer, DIPODeviceReplayBuffer)
    if not isinstance(source, plain) or not issubclass(target_class, plain):
        raise ValueError(f"A {type(source).__name__} cannot be converted to a {target_class.__name__}.")
    converted: Any = target_class(
        source.buffer_size * source.n_envs,
        source.observation_space,
        source.action_space,
        device=source.device,
        n_envs=source.n_envs,
        optimize_memory_usage=source.optimize_memory_usage,
        handle_timeout_termination=source.handle_timeout_termination,
    )
    converted.pos, converted.full = source.pos, source.full
    if source._pending is None:
        converted._make_storage()
        for name in COLUMNS:
            th.as_tensor(getattr(converted, name)).copy_(th.as_tensor(getattr(source, name)))
    return converted


def fits_on_device(
    observation_space: spaces.Space,
    action_space: spaces.Space,
    buffer_size: int,
    n_envs: int,
    device: th.device | str,
) -> bool:
    """
    Whether a :class:`DIPODeviceReplayBuffer` can hold these spaces and takes at most half of a GPU's free memory.

    :param observation_space: of the agent
    :param action_space: of the agent
    :param buffer_size: transitions to hold, of all environments together
    :param n_envs: number of environments
    :param device: of the agent
    :return: False for what is no GPU
    """
    device = th.device(device)
    if device.type != "cuda" or not (_is_float_box(observation_space) and _is_float_box(action_space)):
        return False
    shapes = _column_shapes(observation_space, action_space)
    # the packed row, and the place's last writer
    per_transition = 4 * sum(map(math.prod, shapes.values())) + 8
    free, _ = th.cuda.mem_get_info(device)
    return max(buffer_size // n_envs, 1) * n_envs * per_transition <= free / 2


def _is_float_box(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


def _column_shapes(observation_space: spaces.Space, action_space: spaces.Space) -> dict[str, tuple[int, ...]]:
    observation, action = observation_space.shape, (get_action_dim(action_space),)
    assert observation is not None
    shapes = (observation, observation, action, (), (), (), action)
    return dict(zip(COLUMNS, shapes, strict=True))
