"""Policies: they build actor, critics, their targets and the optimizers."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_dipo.accelerate import CudaGraphs
from sb3_dipo.actors import ACTORS, GenerativeActor, SamplerSettings
from sb3_dipo.arithmetic import Mish
from sb3_dipo.checks import check_choice, check_int
from sb3_dipo.networks import CriticEnsemble


class DIPOPolicy(BasePolicy):
    """
    Policy class for DIPO: a generative actor, an ensemble of critics, and a target of each (paper, Algorithm 3 and
    Appendix H.2.2).

    :param observation_space: observation space
    :param action_space: action space, a bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress, from 1 to 0
    :param net_arch: hidden layers of actor and critics, or ``dict(pi=[...], qf=[...])``; the authors' three of 256
    :param activation_fn: activation after each hidden layer; the paper's Mish
    :param features_extractor_class: features extractor to use
    :param features_extractor_kwargs: its arguments
    :param share_features_extractor: one extractor for actor and critics, trained by the critics' loss only
    :param normalize_images: whether to divide images by 255
    :param optimizer_class: optimizer of actor and critics; the authors' Adam
    :param optimizer_kwargs: its arguments but for the learning rate; the authors' ``dict(eps=1e-5)`` with Adam
    :param n_critics: number of critics, at least 1, whose minimum is used; the paper's 2
    :param actor: ``"diffusion"`` (the paper's), or ``"vae"`` or ``"mlp"``, those of its ablation
    :param samplers: how to sample for each use, as :meth:`set_sampler` leaves it; for loading
    :param actor_options: the actor's own: see :class:`~sb3_dipo.actors.DiffusionActor`,
        :class:`~sb3_dipo.actors.VAEActor`, :class:`~sb3_dipo.actors.MLPActor`
    :raises ValueError: for an option of another actor or a value outside its range, naming the option and what it may be
    """

    actor: GenerativeActor
    actor_target: GenerativeActor
    critic: CriticEnsemble
    critic_target: CriticEnsemble
    _graphs: CudaGraphs | None = None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        actor: str = "diffusion",
        samplers: dict[str, SamplerSettings] | None = None,
        **actor_options: Any,
    ):
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if optimizer_class == th.optim.Adam else {}
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        self.actor_name = check_choice("actor", actor, ACTORS)
        self.actor_options = actor_options
        self._check_actor_options()
        self.net_arch = [256, 256, 256] if net_arch is None else net_arch
        for width in (width for arch in get_actor_critic_arch(self.net_arch) for width in arch):
            check_int("net_arch", width, 1)
        self.activation_fn = activation_fn
        self.share_features_extractor = share_features_extractor
        self.n_critics = check_int("n_critics", n_critics, 1)
        self.samplers: dict[str, SamplerSettings] = {use: dict(settings) for use, settings in (samplers or {}).items()}
        self._build(lr_schedule)

    def _check_actor_options(self) -> None:
        own = ACTORS[self.actor_name].options
        for name in self.actor_options:
            if name in own:
                continue
            owners = [repr(other) for other, actor_class in ACTORS.items() if name in actor_class.options]
            if not owners:
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}.")
            raise ValueError(
                f"`{name}` is an option of `actor={' or '.join(owners)}` and does not apply to `actor={self.actor_name!r}`, "
                f"which has: {', '.join(own)}."
            )

    def _build(self, lr_schedule: Schedule) -> None:
        shared = self.share_features_extractor
        self.critic = self.make_critic()
        self.critic_target = self.make_critic()
        self.actor = self.make_actor("behaviour", self.critic.features_extractor if shared else None)
        self.actor_target = self.make_actor("target", self.critic_target.features_extractor if shared else None)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.actor_target.load_state_dict(self.actor.state_dict())

        lr = lr_schedule(1)
        self.actor.optimizer = self.optimizer_class(self.actor.own_parameters(), lr=lr, **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.critic.optimizer = self.optimizer_class(self.critic.parameters(), lr=lr, **self.optimizer_kwargs)  # type: ignore[call-arg]

        # Target networks are always in evaluation mode
        self.actor_target.set_training_mode(False)
        self.critic_target.set_training_mode(False)

    def make_actor(self, which: str, features_extractor: BaseFeaturesExtractor | None = None) -> GenerativeActor:
        """
        Make an actor.

        :param which: what it samples for by default, see :meth:`set_sampler`
        :param features_extractor: the extractor to share; its own where None
        """
        kwargs = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": get_actor_critic_arch(self.net_arch)[0],
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
            "share_features_extractor": self.share_features_extractor,
            "samplers": self.samplers,
            "which": which,
            **self.actor_options,
        }
        return ACTORS[self.actor_name](**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> CriticEnsemble:
        """
        Make an ensemble of critics.

        :param features_extractor: the extractor to share; its own where None
        """
        kwargs = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": get_actor_critic_arch(self.net_arch)[1],
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
            "n_critics": self.n_critics,
            "inference_dtype": self.actor_options.get("inference_dtype", "float32"),
        }
        return CriticEnsemble(**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def set_accelerate(self, accelerate: str, graphs: CudaGraphs | None = None) -> None:
        """
        Say how the policy computes. It is not saved with it: another machine may do better otherwise.

        :param accelerate: ``"auto"``, ``"cudagraphs"``, ``"compile"`` or ``"off"``, see
            :func:`sb3_dipo.arithmetic.choose_arithmetic`
        :param graphs: to capture acting in, one for each batch size; eager where None
        """
        self._graphs = graphs
        for module in self.modules():
            if hasattr(module, "accelerate"):
                module.accelerate = accelerate  # type: ignore[assignment]

    def set_sampler(self, which: str = "all", **changes: Any) -> None:
        """
        Change how the policy samples, at any time; it is saved with the policy. What is not named stays as it is.

        With ``set_sampler("behaviour", noise_scale=0)`` and ``predict(deterministic=False)`` the policy is evaluated as the
        authors do: from a random start, without noise on the way. Set it back to 1 before training goes on.

        :param which: ``"behaviour"``, for acting; ``"target"``, for TD targets; ``"evaluation"``, for ``deterministic=True``,
            which never draws noise; or ``"all"``
        :param solver: ``"ddpm"``, ``"ddim"``, ``"dpmpp_2m"`` or ``"exponential_integrator"``
        :param num_inference_steps: steps to take, between 1 and ``num_train_timesteps``; None is all
        :param timestep_spacing: which steps, if fewer than all: ``"linspace"`` or ``"lambda"``, evenly in log signal-to-noise
        :param eta: for ``"ddim"``: between 0, deterministic, and 1, which is ``"ddpm"``
        :param noise_scale: factor of the noise, at least 0; the only setting that VAE and MLP have
        :raises ValueError: naming the setting and what it may be; nothing is changed then
        """
        self.actor.set_sampler(which, **changes)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """Actions in [-1, 1], (batch_size, action_dim), for a batch of observations."""
        return self._predict(observation, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self._graphs is None or th.is_grad_enabled():
            return self.actor(observation, deterministic)
        place = next(self.actor.parameters()).data_ptr()  # `to()` may move them
        key = ("act", deterministic, repr(self.samplers), self.actor.training, place)
        return self._graphs(lambda obs: self.actor(obs, deterministic), key, observation)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put actor and critic in training or evaluation mode; the targets stay in evaluation mode.

        :param mode: True for training
        """
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.training = mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # not needed to load a policy alone
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            share_features_extractor=self.share_features_extractor,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            n_critics=self.n_critics,
            actor=self.actor_name,
            samplers=self.samplers,
            **self.actor_options,
        )
        return data


MlpPolicy = DIPOPolicy


class CnnPolicy(DIPOPolicy):
    """
    :class:`DIPOPolicy` for images.

    :param observation_space: observation space
    :param action_space: action space, a bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress, from 1 to 0
    :param net_arch: as :class:`DIPOPolicy`
    :param activation_fn: as :class:`DIPOPolicy`
    :param features_extractor_class: features extractor to use
    :param kwargs: the others of :class:`DIPOPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, features_extractor_class, **kwargs
        )


class MultiInputPolicy(DIPOPolicy):
    """
    :class:`DIPOPolicy` for Dict observations.

    :param observation_space: observation space
    :param action_space: action space, a bounded Box
    :param lr_schedule: learning rate as a function of the remaining progress, from 1 to 0
    :param net_arch: as :class:`DIPOPolicy`
    :param activation_fn: as :class:`DIPOPolicy`
    :param features_extractor_class: features extractor to use
    :param kwargs: the others of :class:`DIPOPolicy`
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch, activation_fn, features_extractor_class, **kwargs
        )
