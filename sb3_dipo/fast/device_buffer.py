"""
Replay in the training device's own memory. To draw, gather, normalise and write back, the device neither waits for the host
nor uses a number that only the host knows. A CUDA graph can therefore hold these steps, and be replayed while the buffer
fills.
"""

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dipo.buffers import IMPROVED, DIPOReplayBuffer, ImprovedActionsMixin, ImprovedSamples, with_improved_actions

COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "improved_actions")
"""What a packed row holds, from left to right."""


class DIPODeviceReplayBuffer(ImprovedActionsMixin, ReplayBuffer):
    """
    A :class:`~sb3_dipo.buffers.DIPOReplayBuffer` whose storage is one float32 tensor on ``device``, (rows, n_envs, width);
    ``observations``, ``actions`` and the other arrays of SB3's buffer are views of its columns. Torch's default generator of
    that device draws the minibatches. The storage is pickled as a NumPy array of the filled rows.

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
    # Of each column, (4, width): its mean as the sum of two float32 numbers, its standard deviation, and its bound.
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
        # SB3 allocates one row on the host, whose place the storage on the device takes
        super().__init__(
            1,
            observation_space,
            action_space,
            device=device,
            n_envs=n_envs,
            handle_timeout_termination=handle_timeout_termination,
        )
        self.buffer_size = max(buffer_size // n_envs, 1)
        self._shapes = _column_shapes(observation_space, action_space)
        self._width = sum(map(math.prod, self._shapes.values()))
        self._take(self._empty_storage())

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
        timeouts = [self.handle_timeout_termination and info.get("TimeLimit.truncated", False) for info in infos]
        columns = (obs, next_obs, action, reward, done, timeouts, action)
        packed = self._staging(self.n_envs)
        parts = [np.reshape(column, (self.n_envs, -1)) for column in columns]
        np.concatenate(parts, axis=1, out=packed.numpy(), casting="unsafe")
        self._storage[self.pos].copy_(packed, non_blocking=True)

        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0
        self._n_rows.fill_(self.size())

    def reset(self) -> None:
        """Forget all transitions, as SB3 does."""
        super().reset()
        self._n_rows.fill_(0)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        Draw a minibatch for the critics, as SB3 does.

        :param batch_size: number of transitions to draw, with replacement
        :param env: to normalise observations and rewards with, by the statistics of the last :meth:`refresh_statistics`
        :return: tensors on the device, of (batch_size, ...) each
        :raises ValueError: if the buffer is empty
        """
        return self._samples_at(*self._draw_places(batch_size), env)

    def sample_improved(self, batch_size: int, env: VecNormalize | None = None) -> ImprovedSamples:
        """
        As :meth:`ImprovedActionsMixin.sample_improved`, but ``rows`` and ``envs`` are tensors on the device, and ``env``
        normalises by the statistics of the last :meth:`refresh_statistics`.

        :raises ValueError: if the buffer is empty
        """
        rows, envs = self._draw_places(batch_size)
        columns = self._columns_at(rows, envs, env)
        return ImprovedSamples(columns["observations"], columns["actions"], columns["improved_actions"], rows, envs)

    def update_improved(
        self, rows: np.ndarray | th.Tensor, envs: np.ndarray | th.Tensor, actions: th.Tensor | np.ndarray
    ) -> None:
        """As :meth:`ImprovedActionsMixin.update_improved`; ``rows`` and ``envs`` may be tensors."""
        rows, envs = (th.as_tensor(places, dtype=th.int64, device=self.device) for places in (rows, envs))
        actions = th.as_tensor(actions, dtype=th.float32, device=self.device).detach()
        skipped = rows < 0
        # what is skipped goes to place 0, where any other writer has precedence
        places = (rows * self.n_envs + envs).masked_fill(skipped, 0)
        order = th.arange(len(rows), dtype=th.int64, device=self.device).masked_fill(skipped, -1)
        # all writers of a place write the last one's action, so it does not matter which of them the device takes
        self._last_writer.index_fill_(0, places, -1).scatter_reduce_(0, places, order, "amax")
        last = self._last_writer.index_select(0, places)
        improved = self.improved_actions.view(-1, self.action_dim)
        written, kept = actions.index_select(0, last.clamp(min=0)), improved.index_select(0, places)
        improved.index_copy_(0, places, th.where((last >= 0).unsqueeze(1), written, kept))

    def refresh_statistics(self, env: VecNormalize | None) -> None:
        """
        Copy the normalisation's statistics to the device, for the minibatches to come. Call it before updates, outside of a
        captured graph; sampling calls it by itself only if it was never called.

        :param env: what :meth:`sample` is given; None does nothing
        """
        if env is None:
            return
        statistics = self._staging(4)
        columns = {name: part.numpy() for name, part in self._split(statistics).items()}
        for column in columns.values():
            column[:2], column[2], column[3] = 0.0, 1.0, math.inf  # these change nothing
        for column in (columns["observations"], columns["next_observations"]) if env.norm_obs else ():
            obs_rms: Any = env.obs_rms
            column[0] = obs_rms.mean
            column[1] = obs_rms.mean - column[0]
            column[2] = np.sqrt(obs_rms.var + env.epsilon)
            column[3] = env.clip_obs
        if env.norm_reward:
            columns["rewards"][2] = math.sqrt(env.ret_rms.var + env.epsilon)
            columns["rewards"][3] = env.clip_reward
        if self._statistics is None:
            self._statistics = th.empty_like(statistics, device=self.device)
        self._statistics.copy_(statistics, non_blocking=True)

    # ------------------------------------------------------------------------------------------------- minibatches

    def _draw_places(self, batch_size: int) -> tuple[th.Tensor, th.Tensor]:  # type: ignore[override]
        if self.size() == 0:
            raise ValueError("The replay buffer is empty.")
        # Two draws of 31 bits make one of 62. Its remainder is uniform: no row's probability differs from 1 / rows by more
        # than 2 ** -62. A product with a fraction would need float64, which not all devices have.
        high, low = th.randint(2**31, (2, batch_size), dtype=th.int64, device=self.device)
        rows = (high * 2**31 + low) % self._n_rows
        return rows, th.randint(self.n_envs, (batch_size,), dtype=th.int64, device=self.device)

    def _get_samples(self, batch_inds: np.ndarray | th.Tensor, env: VecNormalize | None = None) -> ReplayBufferSamples:
        _, envs = self._draw_places(len(batch_inds))
        return self._samples_at(th.as_tensor(batch_inds, dtype=th.int64, device=self.device), envs, env)

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
            # SB3 computes this in float64. With the mean as a sum of two float32 numbers, the result differs from SB3's by
            # the rounding of float32 only (a relative 3e-7), however large the mean is.
            mean, rest_of_mean, deviation, bound = self._statistics
            packed = ((packed - mean - rest_of_mean) / deviation).clamp(-bound, bound)
        return self._split(packed)

    # ------------------------------------------------------------------------------------------------- storage

    def _split(self, packed: th.Tensor) -> dict[str, th.Tensor]:
        """Views of the columns, (..., width) to (..., *shape) of each."""
        parts = packed.split([math.prod(shape) for shape in self._shapes.values()], dim=-1)
        return {
            name: part.view(*packed.shape[:-1], *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _staging(self, rows: int) -> th.Tensor:
        # torch hands out pinned memory again only after the asynchronous copies from it are done
        return th.empty(rows, self._width, dtype=th.float32, device="cpu", pin_memory=self.device.type == "cuda")

    def _empty_storage(self) -> th.Tensor:
        return th.zeros(self.buffer_size, self.n_envs, self._width, dtype=th.float32, device=self.device)

    def _take(self, storage: th.Tensor) -> None:
        self._storage = storage
        vars(self).update(self._split(storage))
        self._n_rows = th.full((), self.size(), dtype=th.int64, device=self.device)
        self._last_writer = th.empty(self.buffer_size * self.n_envs, dtype=th.int64, device=self.device)
        self._statistics = None

    def __getstate__(self) -> dict[str, Any]:
        derived = {*COLUMNS, "_n_rows", "_last_writer", "_statistics"}
        state = {name: value for name, value in vars(self).items() if name not in derived}
        return {**state, "_storage": self._storage[: self.size()].cpu().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.1.0 saved a `_pending`, and no storage if the buffer was empty.
        vars(self).update({name: value for name, value in state.items() if name not in ("_storage", "_pending")})
        if self.device.type == "cuda" and (self.device.index or 0) >= th.cuda.device_count():
            self.device = th.device("cpu")
        storage = self._empty_storage()
        if "_storage" in state:
            storage[: self.size()] = th.from_numpy(state["_storage"])
        self._take(storage)


def as_storage(replay_buffer: ReplayBuffer, replay_buffer_class: type[ReplayBuffer]) -> ImprovedActionsMixin:
    """
    A replay buffer whose data lie where the given class keeps them: in NumPy arrays on the host, or in a tensor on the device.

    :param replay_buffer: a buffer of SB3 or of ours; SB3's gets its improved actions from its actions
    :param replay_buffer_class: the class whose kind of storage is wanted; a buffer of the same kind is returned as it is
    :return: the same transitions in the same places
    :raises ValueError: if it cannot be converted: between host and device, only :class:`DIPOReplayBuffer` and
        :class:`DIPODeviceReplayBuffer` can
    """
    source: Any = with_improved_actions(replay_buffer)
    target_class = IMPROVED.get(replay_buffer_class, replay_buffer_class)
    to_device = issubclass(target_class, DIPODeviceReplayBuffer)
    if isinstance(source, DIPODeviceReplayBuffer) == to_device:
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
    filled = slice(source.size())
    for name in COLUMNS:
        values = getattr(source, name)[filled]
        getattr(converted, name)[filled] = th.from_numpy(values.astype(np.float32)) if to_device else values.cpu().numpy()
    if to_device:
        converted._n_rows.fill_(converted.size())
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
