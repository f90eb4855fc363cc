"""What DIPO does a little differently from SB3's ``OffPolicyAlgorithm``, around the updates themselves."""

import io
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo.actors import GenerativeActor
from sb3_dipo.buffers import resolve_replay_buffer, with_improved_actions
from sb3_dipo.checks import check_bool, check_choice, check_float, check_int
from sb3_dipo.critics import Critic
from sb3_dipo.guard import Guard
from sb3_dipo.policies import ACCELERATIONS, DIPOPolicy

SelfDIPO = TypeVar("SelfDIPO", bound="DIPOBase")

ARGUMENTS: dict[str, Callable[[str, Any], Any]] = {
    "buffer_size": partial(check_int, minimum=1),
    "learning_starts": partial(check_int, minimum=0),
    "batch_size": partial(check_int, minimum=1),
    "n_steps": partial(check_int, minimum=1),
    "gradient_steps": partial(check_int, minimum=-1),
    "tau": partial(check_float, maximum=1.0),
    "gamma": partial(check_float, maximum=1.0),
    "action_lr": partial(check_float, open_minimum=True),
    "action_gradient_steps": partial(check_int, minimum=1),
    "action_grad_norm_ratio": partial(check_float, open_minimum=True, finite=False),
    "max_grad_norm": partial(check_float, open_minimum=True, finite=False),
    "actor_target_update_interval": partial(check_int, minimum=1),
    "accelerate": partial(check_choice, choices=ACCELERATIONS),
    "persist_improved_actions": check_bool,
    "action_gradient_start": partial(check_choice, choices=("replay", "policy")),
}
"""Each argument that is checked, and its check, which returns the value or raises a ValueError that names the argument."""


def skip_next(owner: Any, method: str) -> None:
    """Let the next call of a method do nothing."""
    setattr(owner, method, lambda *args, **kwargs: delattr(owner, method))


def stopped_in_a_step(model: BaseAlgorithm) -> bool:
    """
    Whether the environment is a step ahead of the agent: where a callback stops training, or the user interrupts it, SB3 does
    not store the step that was taken. It tells its progress after it has stored one.
    """
    total: Any = model._total_timesteps
    return bool(total) and model._current_progress_remaining != 1.0 - float(model.num_timesteps) / float(total)


def drop_running_episode(model: BaseAlgorithm) -> None:
    """Its last transition is followed by one of another episode."""
    replay_buffer: Any = getattr(model, "replay_buffer", None)
    if replay_buffer is None or replay_buffer.size() == 0:
        return
    last = (replay_buffer.pos - 1) % replay_buffer.buffer_size
    if isinstance(replay_buffer, HerReplayBuffer):
        with warnings.catch_warnings():  # SB3's, that it does what is asked for here
            warnings.simplefilter("ignore")
            replay_buffer.truncate_last_trajectory()
    elif isinstance(replay_buffer, NStepReplayBuffer):
        replay_buffer.timeouts[last] = 1 - replay_buffer.dones[last]
    elif replay_buffer.optimize_memory_usage:
        replay_buffer.dones[last] = True  # as SB3: its next observation will be overwritten


class DIPOBase(OffPolicyAlgorithm):
    """Set-up, learning rates, ``learn()``, saving and loading of :class:`~sb3_dipo.DIPO`, whose arguments it has."""

    policy: DIPOPolicy
    actor: GenerativeActor
    actor_target: GenerativeActor
    critic: Critic
    critic_target: Critic
    action_gradient_steps: int
    persist_improved_actions: bool
    max_action_shift: float | None
    action_gradient_start: str
    qf_learning_rate: Any
    _qf_lr_schedule: Schedule | None
    accelerate: str
    samplers: dict[str, Any] | None

    # ------------------------------------------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        self._check_arguments()
        # A class that was not given is chosen again where the model is loaded, perhaps on another device, and arguments are
        # kept as they were given. SB3 would warn that `n_steps` is ignored with a class of one's own, and add to them.
        given_class, given_kwargs = self.replay_buffer_class, self.replay_buffer_kwargs
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer()
        self.replay_buffer_class, self.replay_buffer_kwargs = None, {}
        super()._setup_model()
        self.replay_buffer_class = None if given_class is None else type(self.replay_buffer)
        self.replay_buffer_kwargs = given_kwargs

        saved, built = self.samplers or {}, self.policy.sampler_settings()
        before = saved.get("built", built)
        for use, settings in saved.get("uses", saved).items():  # up to version 0.2.0 the file held the uses alone
            # else the caller of load() has changed how the policy samples, or it cannot sample like this any more
            same = {name: value for name, value in settings.items() if before[use].get(name) == built[use].get(name)}
            with suppress(ValueError):
                self.policy.set_sampler(use, **same)
        self.samplers = {"built": built, "uses": {}}
        self.actor, self.actor_target = self.policy.actor, self.policy.actor_target
        self.critic, self.critic_target = self.policy.critic, self.policy.critic_target
        self._set_up_acceleration()
        self._update_learning_rates(1.0)

    def _set_up_acceleration(self) -> None:
        """`accelerate` is a request, resolved on this device; a saved model's is resolved again where it is loaded."""
        self._guard, self._graphs = Guard(), None
        accelerate = self.accelerate
        if accelerate != "off":
            from sb3_dipo import fast

            try:
                self._guard, self._graphs = fast.set_up(self.policy, accelerate)
            except fast.KernelError as error:
                warnings.warn(f'`accelerate={accelerate!r}` runs as "auto" here: {error}.', stacklevel=4)
                accelerate = "auto"
                self._guard, self._graphs = fast.set_up(self.policy, accelerate)
        self.policy.set_accelerate(accelerate)
        self.policy._graphs = self._graphs
        self._prepare_optimizers()

    def _prepare_optimizers(self) -> None:
        """Give optimizers the options that they were made with, as a file may come from another device, and its guard's."""
        for optimizer in (self.actor.optimizer, self.critic.optimizer):
            for group in optimizer.param_groups:
                group.update({name: optimizer.defaults[name] for name in ("fused", "capturable") if name in group})
                group["lr"] = float(group["lr"])
            self._guard.prepare(optimizer)

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As SB3's."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._prepare_optimizers()
        if self._graphs is not None:
            self._graphs.clear()

    def _make_replay_buffer(self) -> ReplayBuffer:
        replay_buffer_class, kwargs = resolve_replay_buffer(
            self.replay_buffer_class, self.replay_buffer_kwargs, self.observation_space, self.n_steps, self.gamma
        )
        if issubclass(replay_buffer_class, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment when using `HerReplayBuffer`"
            kwargs = {**kwargs, "env": self.env}
        if self.accelerate != "off" and self.replay_buffer_class is None:
            from sb3_dipo.fast import choose_storage

            replay_buffer_class = choose_storage(replay_buffer_class, self)
        return replay_buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **kwargs,
        )

    def _check_arguments(self) -> None:
        if not issubclass(self.policy_class, DIPOPolicy):  # of a file, too
            raise ValueError(
                f"`policy` must be {', '.join(map(repr, self.policy_aliases))} or a subclass of DIPOPolicy, not "
                f"{self.policy_class.__name__}. A model can be loaded only by the algorithm that saved it."
            )
        for name, check in ARGUMENTS.items():
            setattr(self, name, check(name, getattr(self, name)))
        if isinstance(self.train_freq, list):
            self.train_freq = tuple(self.train_freq)
        if isinstance(self.train_freq, tuple):
            self.train_freq = (check_int("train_freq", self.train_freq[0], 1), *self.train_freq[1:])
        else:
            self.train_freq = check_int("train_freq", self.train_freq, 1)
        if self.max_action_shift is not None:
            self.max_action_shift = check_float("max_action_shift", self.max_action_shift, open_minimum=True)
            if self.action_gradient_start == "policy":
                raise ValueError("`max_action_shift` must be None with `action_gradient_start='policy'`.")

    # ------------------------------------------------------------------------------------------------- learning rates

    @property
    def qf_lr_schedule(self) -> Schedule:
        """The critics' learning rate as a function of the remaining progress: the actor's, as it is now, unless it is set."""
        return self._qf_lr_schedule or self.lr_schedule

    @qf_lr_schedule.setter
    def qf_lr_schedule(self, schedule: Schedule | None) -> None:
        self._qf_lr_schedule = schedule

    def _setup_lr_schedule(self) -> None:
        for name, value in (("learning_rate", self.learning_rate), ("qf_learning_rate", self.qf_learning_rate)):
            if value is not None and not callable(value):
                check_float(name, value)
        super()._setup_lr_schedule()
        self.qf_lr_schedule = None if self.qf_learning_rate is None else FloatSchedule(self.qf_learning_rate)
        self._learning_rates(1.0)

    def _learning_rates(self, progress_remaining: float) -> tuple[float, float]:
        learning_rate = check_float("learning_rate", self.lr_schedule(progress_remaining))
        return learning_rate, check_float("qf_learning_rate", self.qf_lr_schedule(progress_remaining))

    def _update_learning_rates(self, progress_remaining: float | None = None) -> None:
        if progress_remaining is None:
            # the last rollout may end after the last step
            progress_remaining = max(0.0, self._current_progress_remaining)
            self.logger.record("train/learning_rate", self.lr_schedule(progress_remaining))
        for optimizer, rate in zip(
            (self.actor.optimizer, self.critic.optimizer), self._learning_rates(progress_remaining), strict=True
        ):
            self._guard.set_learning_rate(optimizer, rate)

    # ------------------------------------------------------------------------------------------------- as in SB3

    def learn(
        self: SelfDIPO,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DIPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDIPO:
        """
        Train the agent; see SB3's ``learn``.

        :param total_timesteps: environment steps to train for, such as ``1e6``
        :param callback: called at every step
        :param log_interval: episodes between two logs
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: whether to start counting at 0; False continues
        :param progress_bar: show a progress bar
        :return: the agent
        :raises NonFiniteLossError: if a loss is not finite, see :meth:`train`
        :raises ValueError: if ``total_timesteps`` is no whole number, or a learning-rate schedule gives none that is legal
        """
        total_timesteps = check_int("total_timesteps", total_timesteps, 0)
        self._warn_if_nothing_is_learned(total_timesteps, reset_num_timesteps)
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if not reset_num_timesteps and stopped_in_a_step(self):
            drop_running_episode(self)
            self._last_obs = None  # SB3 resets the environment then
        # SB3 resets the action noise, even in the middle of an episode that goes on
        episode_goes_on = not reset_num_timesteps and self._last_obs is not None
        new = self.n_envs > 1 and not isinstance(self.action_noise, VectorizedActionNoise)  # SB3 will make one of it
        if episode_goes_on and self.action_noise is not None and not new:
            skip_next(self.action_noise, "reset")
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _warn_if_nothing_is_learned(self, total_timesteps: int, reset_num_timesteps: bool) -> None:
        assert isinstance(self.train_freq, TrainFreq)
        if total_timesteps == 0 or self.train_freq.unit == TrainFrequencyUnit.EPISODE:  # whose length nobody knows
            return
        start = 0 if reset_num_timesteps else self.num_timesteps
        # learn() ends with the rollout in which the total is reached
        rollout = self.n_envs * self.train_freq.frequency
        end = start + math.ceil(total_timesteps / rollout) * rollout
        if end <= self.learning_starts:
            warnings.warn(
                f"Nothing will be learned: learn() ends after {end} steps, and the first {self.learning_starts} are random. "
                f"Set `learning_starts` below {end} or `total_timesteps` above {self.learning_starts - start}.",
                stacklevel=3,
            )

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As SB3's."""
        as_built = self.samplers or {}
        self.samplers = {**as_built, "uses": self.policy.sampler_settings()}
        try:
            super().save(path, exclude, include)
        finally:
            self.samplers = as_built

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer, improved actions included. From one saved by SAC or TD3 the actions are taken for them, and so
        they are with ``persist_improved_actions=False``.

        :param path: path to the pickled replay buffer
        :param truncate_last_traj: with HER: whether the last trajectory is taken to be finished
        :raises ValueError: if the buffer stores no improved actions and cannot be converted, or does not fit the agent's
            spaces, number of environments or n-step returns; the agent's own buffer then stays
        """
        current = self.replay_buffer
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            assert self.replay_buffer is not None
            loaded = with_improved_actions(self.replay_buffer)
            if self._graphs is not None and current is not None:
                from sb3_dipo.fast import as_storage

                loaded = as_storage(loaded, type(current))
            self._check_replay_buffer(loaded, current)
        except BaseException:
            self.replay_buffer = current
            raise
        self.replay_buffer = loaded

    def _check_replay_buffer(self, replay_buffer: ReplayBuffer, current: ReplayBuffer | None) -> None:
        for name in ("observation_space", "action_space", "n_envs"):
            loaded, own = getattr(replay_buffer, name), getattr(self, name)
            if loaded != own:
                raise ValueError(f"The replay buffer's `{name}` must be the agent's, {own}, not {loaded}.")
        for name, single_step in (("n_steps", 1), ("gamma", None)):
            loaded, own = getattr(replay_buffer, name, single_step), getattr(current, name, single_step)
            if loaded != own:
                raise ValueError(
                    f"The replay buffer's `{name}`, for n-step returns, must be the agent's, {own}, not {loaded}."
                )

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "actor_target", "critic", "critic_target", "_graphs", "_guard"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
