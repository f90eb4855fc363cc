"""DIPO: online reinforcement learning with a diffusion policy (Yang et al. 2023, https://arxiv.org/abs/2305.13122)."""

import copy
import io
import math
import pathlib
import warnings
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import FloatSchedule, get_parameters_by_name
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch.nn import functional as F

from sb3_dipo.accelerate import CudaGraphs, keep_freed_memory, move_towards, prepare_optimizer, set_learning_rate
from sb3_dipo.action_gradient import improve_actions
from sb3_dipo.actors import GenerativeActor, SamplerSettings
from sb3_dipo.arithmetic import ACCELERATIONS
from sb3_dipo.buffers import DIPOReplayBuffer, ImprovedActionsMixin, ImprovedSamples, resolve_replay_buffer
from sb3_dipo.checks import check_choice, check_float, check_int
from sb3_dipo.device_buffer import DIPODeviceReplayBuffer, as_storage, fits_on_device
from sb3_dipo.guard import NonFiniteLossError, remember, step_if
from sb3_dipo.kernels import KernelError, load_kernels
from sb3_dipo.networks import CriticEnsemble
from sb3_dipo.policies import CnnPolicy, DIPOPolicy, MlpPolicy, MultiInputPolicy

REPORTED = ("critic_loss", "actor_loss", "q_value", "improved_q_gain", "action_shift", "critic_grad_norm", "actor_grad_norm")
"""What an update tells of itself; the first five are logged."""

SelfDIPO = TypeVar("SelfDIPO", bound="DIPO")


class DIPO(OffPolicyAlgorithm):
    """
    DIffusion POlicy (DIPO): off-policy reinforcement learning whose actor is the reverse of a noising process.

    Such a policy can be fitted to data but has no density for a policy gradient, so DIPO improves the data: replayed actions
    are moved uphill on Q (the action gradient, equation 15), the actor is fitted to the improved actions, and the critics
    learn from the actions that were really taken.

    Paper: https://arxiv.org/abs/2305.13122, Algorithm 3; defaults are its Tables 2 and 3. Where this class differs from the
    paper or from the authors' released code, the README says so.

    :param policy: the policy to use (``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a class)
    :param env: the environment to learn from (if registered in Gymnasium, can be str); its actions are a bounded Box
    :param learning_rate: step size of Adam for the actor, at least 0; may be a function of the remaining progress, from 1
        to 0. Table 2: 3e-4
    :param buffer_size: transitions that the replay buffer holds. Table 2: 1e6
    :param learning_starts: environment steps of uniformly random actions before learning; one update per step follows.
        The authors' code: 10,000
    :param batch_size: minibatch of the critics, and as many again for the actor. Table 2: 256
    :param tau: Polyak coefficient of the targets, between 0 and 1. Table 2: 0.005
    :param gamma: discount factor, between 0 and 1. Table 2: 0.99
    :param train_freq: update every ``train_freq`` steps, or a tuple like ``(5, "step")`` or ``(2, "episode")``. Algorithm 3: 1
    :param gradient_steps: updates after each rollout; -1 does as many as environment steps were taken. Algorithm 3: 1
    :param action_noise: noise added to the policy's own when exploring (none in the paper)
    :param replay_buffer_class: ``DIPOReplayBuffer`` or its dict, n-step and HER forms; SB3's classes stand for ours; chosen
        by itself where None
    :param replay_buffer_kwargs: arguments of the replay buffer
    :param optimize_memory_usage: store each observation once; needs
        ``replay_buffer_kwargs=dict(handle_timeout_termination=False)``, and a time limit then counts as an end
    :param n_steps: steps of the critics' n-step returns. The paper: 1
    :param action_lr: eta, Adam's step size for the actions in units of the box's half-width, above 0. Table 3: 0.03
    :param action_gradient_steps: steps of the action gradient on each minibatch, at least 1. Table 3: 20 (HalfCheetah 40)
    :param action_grad_norm_ratio: the joint L2 norm of a batch's action gradient is clipped to this times the number of
        action dimensions, above 0. Table 3: 0.08 to 0.3
    :param persist_improved_actions: whether improved actions stay in the replay data, as in Algorithm 3. With False they
        climb from the action taken every time: what the released code does, whose write-back has no effect
    :param max_grad_norm: the gradients of actor and of critics are clipped to this L2 norm, above 0. Table 3: 0.8 to 2
    :param actor_target_update_interval: the actor's target moves in the updates 0, n, 2n, ...; at least 1. Table 3: 1
        (HalfCheetah 2)
    :param qf_learning_rate: step size of Adam for the critics, or a schedule; that of the actor where None
    :param accelerate: a request, resolved on the device at hand: ``"auto"``, on a GPU CUDA graphs and on the CPU the fastest
        operators of PyTorch; ``"cudagraphs"``; ``"compile"``, kernels that a compiler makes first; ``"off"``, the plain path
    :param stats_window_size: number of episodes over which rollout statistics are averaged
    :param tensorboard_log: folder for TensorBoard; no logging where None
    :param policy_kwargs: arguments of the policy, see :class:`~sb3_dipo.policies.DIPOPolicy`: ``actor``, ``net_arch``, and
        the actor's own, such as ``num_train_timesteps`` (K)
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: seed of all pseudo-random generators
    :param device: device to run on (cpu, cuda, ...); "auto" takes a GPU where there is one
    :param _init_setup_model: whether to build the networks at the creation of the instance
    :raises ValueError: for a value outside its range, naming the argument and what it may be
    :raises AssertionError: for an action space that is not a bounded Box, as SB3
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DIPOPolicy
    actor: GenerativeActor
    actor_target: GenerativeActor
    critic: CriticEnsemble
    critic_target: CriticEnsemble

    def __init__(
        self,
        policy: str | type[DIPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 10_000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        action_lr: float = 0.03,
        action_gradient_steps: int = 20,
        action_grad_norm_ratio: float = 0.1,
        persist_improved_actions: bool = True,
        max_grad_norm: float = 2.0,
        actor_target_update_interval: int = 1,
        qf_learning_rate: float | Schedule | None = None,
        accelerate: str = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.action_lr = action_lr
        self.action_gradient_steps = action_gradient_steps
        self.action_grad_norm_ratio = action_grad_norm_ratio
        self.persist_improved_actions = persist_improved_actions
        self.max_grad_norm = max_grad_norm
        self.actor_target_update_interval = actor_target_update_interval
        self.qf_learning_rate = qf_learning_rate
        self.accelerate = accelerate
        # How the policy samples, as policy.set_sampler leaves it: saved with the model
        self.samplers: dict[str, SamplerSettings] | None = None

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------------------------------------- Algorithm 3

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Do updates of critics, replayed actions, actor and targets (Algorithm 3).

        :param gradient_steps: number of updates
        :param batch_size: minibatch of the critics, and as many again for the actor
        :raises NonFiniteLossError: if a loss is not finite; weights, targets and stored actions are then those before the
            update that met it
        """
        assert isinstance(self.replay_buffer, ImprovedActionsMixin)
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        self.replay_buffer.refresh_statistics(self._vec_normalize_env)
        self._healthy.fill_(True)

        reports = []
        for _ in range(gradient_steps):
            move_actor_target = (self._n_updates + len(reports)) % self.actor_target_update_interval == 0
            reports.append(self._run_update(batch_size, move_actor_target))
            if self.device.type == "cpu" and not self._healthy:  # elsewhere, reading the flag would wait for the device
                break
        if reports:
            self._finish_updates(th.stack(reports))

    def _update(
        self, replay_data: ReplayBufferSamples, batch: ImprovedSamples, move_actor_target: bool
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        One update, given its two minibatches. It waits for no device, so that it can be captured in a CUDA graph. After a
        loss that is not finite, it and those after it change nothing.

        :return: the numbers of :data:`REPORTED`, and the improved actions, (batch_size, action_dim)
        """
        undo_unless = remember([*self.critic.state_dict().values(), *self.actor.buffers()], self.critic.optimizer)

        # Critic: temporal difference on the actions taken, the target's from the target policy
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        with th.no_grad():
            next_features = self.actor_target.extract_features(replay_data.next_observations)
            next_actions = self.actor_target.sample(next_features)
            next_q_values = self.critic_target.min_q(replay_data.next_observations, next_actions)
            target_q_values = replay_data.rewards + (1 - replay_data.dones) * discounts * next_q_values

        current_q_values = self.critic(replay_data.observations, replay_data.actions)
        critic_loss = th.stack([F.mse_loss(q_values, target_q_values) for q_values in current_q_values]).sum()
        critic_grad_norm = self._step(self.critic.optimizer, critic_loss)

        # Action gradient (15): an independent minibatch of replayed actions climbs min_i Q_i
        q_fn = self.critic.bind(batch.observations)
        improved_actions = improve_actions(
            q_fn,
            batch.improved_actions,
            action_lr=self.action_lr,
            action_gradient_steps=self.action_gradient_steps,
            action_grad_norm_ratio=self.action_grad_norm_ratio,
        )
        with th.no_grad():
            improved_q_gain = (q_fn(improved_actions) - q_fn(batch.improved_actions)).mean()
            action_shift = (improved_actions - batch.improved_actions).norm(dim=1).mean()

        # Actor: the denoising loss (11) on the improved actions
        features = self.actor.extract_features(batch.observations)
        actor_loss = self.actor.loss(features, improved_actions)
        actor_grad_norm = self._step(self.actor.optimizer, actor_loss)

        # an actor's loss that is not finite takes the critics' step back, too
        undo_unless(self._healthy)

        # Targets
        if move_actor_target:
            move_towards(self.actor_target.own_parameters(), self.actor.own_parameters(), self.tau, self._healthy)
            move_towards(self._actor_target_statistics, self._actor_statistics, 1.0, self._healthy)
        move_towards(self.critic_target.parameters(), self.critic.parameters(), self.tau, self._healthy)
        move_towards(self._critic_target_statistics, self._critic_statistics, 1.0, self._healthy)

        q_value = th.cat(current_q_values, dim=1).mean()
        report = (critic_loss, actor_loss, q_value, improved_q_gain, action_shift, critic_grad_norm, actor_grad_norm)
        return th.stack(report).detach(), th.where(self._healthy, improved_actions, batch.improved_actions)

    def _step(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> th.Tensor:
        """One step down the loss's clipped gradient, whose norm is returned, if that and all before it were finite."""
        optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grad_norm = th.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self._healthy.logical_and_(th.isfinite(loss.detach() + grad_norm))
        step_if(self._healthy, optimizer)
        return grad_norm

    # ------------------------------------------------------------------------------------------------- around an update

    def _run_update(self, batch_size: int, move_actor_target: bool) -> th.Tensor:
        """Draw the minibatches, update, and write the improved actions back; on a GPU in CUDA graphs."""
        buffer: Any = self.replay_buffer

        def draw() -> tuple[ReplayBufferSamples, ImprovedSamples]:
            replay_data = buffer.sample(batch_size, env=self._vec_normalize_env)
            return replay_data, buffer.sample_improved(batch_size, self._vec_normalize_env)

        def write_back(batch: ImprovedSamples, improved_actions: th.Tensor) -> None:
            # the improved actions take their places in the replay data; `actions` are never touched
            if self.persist_improved_actions:
                buffer.update_improved(batch.rows, batch.envs, improved_actions)

        def update(replay_data: ReplayBufferSamples, batch: ImprovedSamples) -> tuple[th.Tensor, th.Tensor]:
            return self._update(replay_data, batch, move_actor_target)

        def whole() -> th.Tensor:
            replay_data, batch = draw()
            report, improved_actions = update(replay_data, batch)
            write_back(batch, improved_actions)
            return report

        if self._graphs is None:
            return whole()
        key = self._graph_key(batch_size, move_actor_target)
        if isinstance(buffer, DIPODeviceReplayBuffer):
            return self._graphs(whole, key)
        replay_data, batch = draw()
        rows, envs = batch.rows, batch.envs  # stay on the host
        report, improved_actions = self._graphs(update, key, replay_data, batch._replace(rows=None, envs=None))
        write_back(batch._replace(rows=rows, envs=envs), improved_actions)
        return report

    def _graph_key(self, batch_size: int, move_actor_target: bool) -> tuple[Any, ...]:
        """All that an update depends on and that may change between two, as a value or by moving in memory."""
        names = ("gamma", "tau", "action_lr", "action_gradient_steps", "action_grad_norm_ratio", "max_grad_norm")
        settings = (*(getattr(self, name) for name in names), self.persist_improved_actions, repr(self.samplers))
        storage = getattr(self.replay_buffer, "improved_actions", None)
        places = (id(self.replay_buffer), storage.data_ptr() if isinstance(storage, th.Tensor) else None)
        return "update", batch_size, move_actor_target, settings, places, self._vec_normalize_env is None

    def _finish_updates(self, reports: th.Tensor) -> None:
        """Count and log updates, given their numbers, (number of updates, len(REPORTED)); raise if one is not finite."""
        columns = dict(zip(REPORTED, reports.t().tolist(), strict=True))
        for i in range(len(reports)):
            for name, norm in (("critic_loss", "critic_grad_norm"), ("actor_loss", "actor_grad_norm")):
                loss, grad_norm = columns[name][i], columns[norm][i]
                if not math.isfinite(loss + grad_norm):
                    self._n_updates += i
                    self.critic.optimizer.zero_grad()
                    self.actor.optimizer.zero_grad()
                    raise NonFiniteLossError(
                        f"`{name}` or its gradient is not finite in update {self._n_updates + 1} (loss {loss}, gradient norm "
                        f"{grad_norm}). Weights, targets and stored actions are as before this update. Look for observations "
                        "or rewards that are not finite, or lower the learning rates."
                    )
        self._n_updates += len(reports)
        for name in REPORTED[:5]:
            self.logger.record(f"train/{name}", sum(columns[name]) / len(reports))
        self.logger.record("train/n_updates", self._n_updates)

    # ------------------------------------------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer()
        # The buffer is settled; SB3 would warn that `n_steps` is ignored with a class of one's own, and add to the arguments.
        # The arguments that the user gave are kept, so that a saved model can be loaded with other `n_steps` or `gamma`.
        given_class, given_kwargs = self.replay_buffer_class, self.replay_buffer_kwargs
        self.replay_buffer_class, self.replay_buffer_kwargs = None, {}
        super()._setup_model()
        on_device = given_class is None and isinstance(self.replay_buffer, DIPODeviceReplayBuffer)
        # what depends on this device is resolved again where the model is loaded
        self.replay_buffer_class = None if on_device else type(self.replay_buffer)
        self.replay_buffer_kwargs = given_kwargs

        if self.samplers is not None:  # a saved model's
            for use, settings in self.samplers.items():
                self.policy.set_sampler(use, **settings)
        self._create_aliases()
        self._find_statistics()
        self._set_up_acceleration()
        set_learning_rate(self.critic.optimizer, self.qf_lr_schedule(1))

    def _set_up_acceleration(self) -> None:
        """`accelerate` is a request, resolved on this device; a saved model's is resolved again where it is loaded."""
        capture = self.device.type == "cuda" and self.accelerate != "off"
        self._graphs = CudaGraphs(self.device) if capture else None
        accelerate = self.accelerate
        if accelerate == "compile" and self.device.type == "cpu":
            try:
                load_kernels()
            except KernelError as error:
                warnings.warn(f"`accelerate='compile'` runs as \"auto\" here: {error}.", stacklevel=4)
                accelerate = "auto"
        if accelerate != "off" and self.device.type == "cpu":
            keep_freed_memory()
        self.policy.set_accelerate(accelerate, self._graphs)
        self._healthy = th.tensor(True, device=self.device)  # whether all losses of this train() were finite
        self._prepare_optimizers()

    def _prepare_optimizers(self) -> None:
        for optimizer in (self.actor.optimizer, self.critic.optimizer):
            prepare_optimizer(optimizer, capturable=self._graphs is not None, fuse=self.accelerate != "off")

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As SB3's; what was captured in CUDA graphs is captured again, since optimizers get new state."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._prepare_optimizers()
        if self._graphs is not None:
            self._graphs.clear()

    def _find_statistics(self) -> None:
        # Running statistics of batch normalisation, which no Polyak update of parameters reaches
        self._actor_statistics = get_parameters_by_name(self.actor, ["running_"])
        self._actor_target_statistics = get_parameters_by_name(self.actor_target, ["running_"])
        self._critic_statistics = get_parameters_by_name(self.critic, ["running_"])
        self._critic_target_statistics = get_parameters_by_name(self.critic_target, ["running_"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "policy" in state:  # pickle has made copies of the statistics that are no longer the networks' own
            self._find_statistics()

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.samplers = self.policy.samplers

    def _make_replay_buffer(self) -> ReplayBuffer:
        replay_buffer_class, kwargs = resolve_replay_buffer(
            self.replay_buffer_class, self.replay_buffer_kwargs, self.observation_space, self.n_steps, self.gamma
        )
        if issubclass(replay_buffer_class, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment when using `HerReplayBuffer`"
            kwargs = {**kwargs, "env": self.env}
        sizes = (self.observation_space, self.action_space, self.buffer_size, self.n_envs)
        if (
            self.replay_buffer_class is None
            and replay_buffer_class is DIPOReplayBuffer
            and not (self.optimize_memory_usage or self.accelerate == "off")
            and fits_on_device(*sizes, self.device)
        ):
            replay_buffer_class = DIPODeviceReplayBuffer  # drawing and write-back then join the update's CUDA graph
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
        self.buffer_size = check_int("buffer_size", self.buffer_size, 1)
        self.learning_starts = check_int("learning_starts", self.learning_starts, 0)
        self.batch_size = check_int("batch_size", self.batch_size, 1)
        self.n_steps = check_int("n_steps", self.n_steps, 1)
        self.gradient_steps = check_int("gradient_steps", self.gradient_steps, -1)
        if isinstance(self.train_freq, list):
            self.train_freq = tuple(self.train_freq)
        if isinstance(self.train_freq, tuple):
            check_int("train_freq", self.train_freq[0], 1)
        else:
            self.train_freq = check_int("train_freq", self.train_freq, 1)
        self.tau = check_float("tau", self.tau, maximum=1.0)
        self.gamma = check_float("gamma", self.gamma, maximum=1.0)
        self.action_lr = check_float("action_lr", self.action_lr, open_minimum=True)
        self.action_gradient_steps = check_int("action_gradient_steps", self.action_gradient_steps, 1)
        self.action_grad_norm_ratio = check_float(
            "action_grad_norm_ratio", self.action_grad_norm_ratio, open_minimum=True, finite=False
        )
        self.max_grad_norm = check_float("max_grad_norm", self.max_grad_norm, open_minimum=True, finite=False)
        self.actor_target_update_interval = check_int("actor_target_update_interval", self.actor_target_update_interval, 1)
        if not isinstance(self.persist_improved_actions, bool):
            raise ValueError(f"`persist_improved_actions` must be True or False, not {self.persist_improved_actions!r}.")
        check_choice("accelerate", self.accelerate, ACCELERATIONS)

    # ------------------------------------------------------------------------------------------------- learning rates

    def _setup_lr_schedule(self) -> None:
        for name, value in (("learning_rate", self.learning_rate), ("qf_learning_rate", self.qf_learning_rate)):
            if value is not None and not callable(value):
                check_float(name, value)
        super()._setup_lr_schedule()
        self.qf_lr_schedule = self.lr_schedule if self.qf_learning_rate is None else FloatSchedule(self.qf_learning_rate)
        self._current_learning_rates(progress_remaining=1.0)

    def _current_learning_rates(self, progress_remaining: float) -> tuple[float, float]:
        learning_rate = check_float("learning_rate", self.lr_schedule(progress_remaining))
        return learning_rate, check_float("qf_learning_rate", self.qf_lr_schedule(progress_remaining))

    def _update_learning_rates(self) -> None:
        # the last rollout may end after the last step
        learning_rate, qf_learning_rate = self._current_learning_rates(max(0.0, self._current_progress_remaining))
        set_learning_rate(self.actor.optimizer, learning_rate)
        set_learning_rate(self.critic.optimizer, qf_learning_rate)
        self.logger.record("train/learning_rate", learning_rate)

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
        # SB3 resets the action noise, even in the middle of an episode that goes on
        episode_goes_on = not reset_num_timesteps and self._last_obs is not None
        action_noise = copy.deepcopy(self.action_noise) if episode_goes_on else None
        prepared = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if type(action_noise) is type(self.action_noise):
            self.action_noise = action_noise
        return prepared

    def _warn_if_nothing_is_learned(self, total_timesteps: int, reset_num_timesteps: bool) -> None:
        start = 0 if reset_num_timesteps else self.num_timesteps
        assert isinstance(self.train_freq, TrainFreq) and self.env is not None
        # learn() ends with the rollout in which the total is reached
        rollout = self.n_envs * self.train_freq.frequency
        if self.train_freq.unit == TrainFrequencyUnit.EPISODE:
            spec = self.env.get_attr("spec", 0)[0]
            rollout *= getattr(spec, "max_episode_steps", None) or self.learning_starts + 1
        end = start + math.ceil(total_timesteps / rollout) * rollout
        if end <= self.learning_starts:
            warnings.warn(
                f"Nothing will be learned: learn() ends after {end} steps, and the first {self.learning_starts} are random. "
                f"Set `learning_starts` below {end} or `total_timesteps` above {self.learning_starts - start}.",
                stacklevel=3,
            )

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
            keeps_its_kind = current is None or self.replay_buffer.optimize_memory_usage
            self.replay_buffer = as_storage(self.replay_buffer, type(self.replay_buffer if keeps_its_kind else current))  # type: ignore[arg-type]
            self._check_replay_buffer(self.replay_buffer, current)
        except BaseException:
            self.replay_buffer = current
            raise
        if not self.persist_improved_actions:
            self.replay_buffer.reset_improved()  # type: ignore[attr-defined]

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
        statistics = [f"_{name}_statistics" for name in ("actor", "actor_target", "critic", "critic_target")]
        own = ["actor", "actor_target", "critic", "critic_target", *statistics, "_graphs", "_healthy"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
