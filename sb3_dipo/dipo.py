"""DIPO: online reinforcement learning with a diffusion policy (Yang et al. 2023, https://arxiv.org/abs/2305.13122)."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule

from sb3_dipo.action_gradient import improve_actions
from sb3_dipo.base import DIPOBase
from sb3_dipo.buffers import ImprovedSamples, with_improved_actions
from sb3_dipo.policies import CnnPolicy, DIPOPolicy, MlpPolicy, MultiInputPolicy

MEASURE_INTERVAL = 10  # updates
MEASURED = ("improved_q_gain", "action_shift")  # which take another pass through the critics


class DIPO(DIPOBase):
    """
    DIffusion POlicy (DIPO): off-policy reinforcement learning whose actor is the reverse of a noising process.

    Such a policy can be fitted to data but has no density for a policy gradient, so DIPO improves the data: replayed actions
    are moved uphill on Q (the action gradient, equation 15), the actor is fitted to the improved actions, and the critics
    learn from the actions that were really taken.

    Paper: https://arxiv.org/abs/2305.13122, Algorithm 3; defaults are its Tables 2 and 3. Where this class differs from the
    paper or from the authors' released code, ``docs/paper.md`` says so.

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
    :param accelerate: a request, resolved on the device at hand: ``"auto"``, on a GPU CUDA graphs, and on the CPU a kernel
        that a C++ compiler makes first, or, where there is none, the fastest operators of PyTorch; ``"compile"``, the same,
        with a warning where there is no kernel; ``"cudagraphs"``, as ``"auto"``; ``"off"``, the plain path
    :param stats_window_size: number of episodes over which rollout statistics are averaged
    :param tensorboard_log: folder for TensorBoard; no logging where None
    :param policy_kwargs: arguments of the policy, see :class:`~sb3_dipo.policies.DIPOPolicy`: ``actor``, ``net_arch``, and
        the actor's own, such as ``num_train_timesteps`` (K)
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: seed of all pseudo-random generators
    :param device: device to run on (cpu, cuda, ...); "auto" takes a GPU where there is one
    :param max_action_shift: how far the action gradient may take an action from the one taken in each dimension, in units of
        the box's half-width, above 0; None, the paper's, is no bound. Needs ``action_gradient_start="replay"``
    :param action_gradient_start: where the action gradient begins: ``"replay"``, at the actions in the replay data, as in the
        paper, or ``"policy"``, at fresh samples of the policy at the replayed states; nothing is then written back
    :param _init_setup_model: whether to build the networks at the creation of the instance
    :raises ValueError: for a value outside its range, naming the argument and what it may be
    :raises AssertionError: for an action space that is not a bounded Box, as SB3
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

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
        max_action_shift: float | None = None,
        action_gradient_start: str = "replay",
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
        self.max_action_shift = max_action_shift
        self.action_gradient_start = action_gradient_start
        # what a file keeps of `policy.set_sampler`: how the policy sampled as it was built, and when it was saved
        self.samplers: dict[str, Any] | None = None

        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------------------------------------- Algorithm 3

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Do updates of critic, replayed actions, actor and targets (Algorithm 3).

        :param gradient_steps: number of updates
        :param batch_size: minibatch of the critic, and as many again for the actor
        :raises NonFiniteLossError: if a loss or its gradient is not finite: that step and all after it are not taken
        """
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        assert self.replay_buffer is not None
        self.replay_buffer = replay_buffer = with_improved_actions(self.replay_buffer)
        replay_buffer.refresh_statistics(self._vec_normalize_env)
        self._guard.begin()

        reports = []
        for _ in range(gradient_steps):
            move_actor_target = self._n_updates % self.actor_target_update_interval == 0
            reports.append(self._run_update(replay_buffer, batch_size, move_actor_target))
            self._n_updates += 1
        self._guard.end()

        self.logger.record("train/n_updates", self._n_updates)
        for name in dict.fromkeys(name for report in reports for name in report):
            values = [report[name] for report in reports if name in report]
            self.logger.record(f"train/{name}", th.stack(values).mean().item())

    def _update(
        self, replay_buffer: Any, batch_size: int, move_actor_target: bool, measure: bool = True
    ) -> dict[str, th.Tensor]:
        """
        One update. It reads no value on the host, so that it can be captured in a CUDA graph.

        :param measure: whether to report how far the actions have climbed
        :return: what is logged of it, scalars
        """
        # Draw: two independent minibatches
        replay_data = replay_buffer.sample(batch_size, env=self._vec_normalize_env)
        batch = replay_buffer.sample_improved(batch_size, self._vec_normalize_env)

        # Critic: temporal difference on the actions taken
        critic_loss = self._critic_loss(replay_data)
        self._guard.step("critic_loss", self.critic.optimizer, critic_loss, self.max_grad_norm)

        # Action gradient: replayed actions climb Q, equation (15)
        objective = self.critic.objective(batch.observations)
        start = self._start(batch)
        improved_actions = self._improve(objective, start, batch.actions)

        # Actor: fitted to the improved actions, equation (11)
        actor_loss = self._actor_loss(batch.observations, improved_actions)
        self._guard.step("actor_loss", self.actor.optimizer, actor_loss, self.max_grad_norm)

        # Targets
        self._update_target(self.critic, self.critic_target, self.critic.parameters(), self.critic_target.parameters())
        if move_actor_target:
            own = self.actor.own_parameters(), self.actor_target.own_parameters()
            self._update_target(self.actor, self.actor_target, *own)

        # Write back: improved actions take their places in the replay data; the actions taken are never touched
        if self.persist_improved_actions and self.action_gradient_start == "replay":
            replay_buffer.update_improved(batch.rows, batch.envs, improved_actions)

        report = dict(critic_loss=critic_loss, actor_loss=actor_loss, q_value=self.critic.q_value)
        if measure:
            with th.no_grad():
                report["improved_q_gain"] = (objective(improved_actions) - objective(start)).mean()
                report["action_shift"] = (improved_actions - start).norm(dim=1).mean()
        return {name: each.detach() for name, each in report.items()}

    def _critic_loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """The critic's loss on a minibatch of actions taken; the next actions are the target policy's."""
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        with th.no_grad():
            next_actions = self.policy.act(replay_data.next_observations, "target")
            next_values = self.critic_target.next_value(replay_data.next_observations, next_actions)
            targets = replay_data.rewards + (1 - replay_data.dones) * discounts * next_values
        return self.critic.loss(replay_data.observations, replay_data.actions, targets)

    def _start(self, batch: ImprovedSamples) -> th.Tensor:
        """Where the climb begins, (batch_size, action_dim)."""
        if self.action_gradient_start == "policy":
            with th.no_grad():
                return self.policy.act(batch.observations, "behaviour")
        return batch.improved_actions if self.persist_improved_actions else batch.actions

    def _improve(self, objective: Callable[[th.Tensor], th.Tensor], start: th.Tensor, actions_taken: th.Tensor) -> th.Tensor:
        """Improved actions, (batch_size, action_dim), from where the climb of the objective begins and the actions taken."""
        return improve_actions(
            objective,
            start,
            max_action_shift=self.max_action_shift,
            actions_taken=actions_taken,
            action_lr=self.action_lr,
            action_gradient_steps=self.action_gradient_steps,
            action_grad_norm_ratio=self.action_grad_norm_ratio,
        )

    def _actor_loss(self, observations: PyTorchObs, improved_actions: th.Tensor) -> th.Tensor:
        """The actor's loss on improved actions."""
        return self.actor.loss(self.actor.extract_features(observations), improved_actions)

    def _update_target(
        self, network: th.nn.Module, target: th.nn.Module, params: Iterable[th.Tensor], target_params: Iterable[th.Tensor]
    ) -> None:
        """Polyak's average of parameters, and a copy of the running statistics of batch normalisation."""
        self._guard.polyak_update(params, target_params, self.tau)
        self._guard.polyak_update(_running_statistics(network), _running_statistics(target), 1.0)

    def _run_update(self, replay_buffer: Any, batch_size: int, move_actor_target: bool) -> dict[str, th.Tensor]:
        measure = self._n_updates % MEASURE_INTERVAL == 0
        if self._graphs is None:
            return self._update(replay_buffer, batch_size, move_actor_target, measure)
        report: dict[str, th.Tensor] = self._graphs.update(self, replay_buffer, batch_size, move_actor_target)
        return {name: value for name, value in report.items() if measure or name not in MEASURED}


def _running_statistics(module: th.nn.Module) -> list[th.Tensor]:
    return [value for name, value in module.named_buffers() if "running_" in name]
