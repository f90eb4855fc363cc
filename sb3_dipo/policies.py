"""Policies: they build actor, critics, their targets and the optimizers."""

from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

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

from sb3_dipo.actors import ACTORS, GenerativeActor
from sb3_dipo.checks import check_choice, check_int
from sb3_dipo.critics import CRITICS, Critic
from sb3_dipo.networks import PLAIN, UsesOps
from sb3_dipo.samplers import SAMPLER_USES

ACCELERATIONS = ("auto", "cudagraphs", "compile", "off")
INFERENCE_DTYPES = ("float32", "bfloat16")

SelfDIPOPolicy = TypeVar("SelfDIPOPolicy", bound="DIPOPolicy")


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
    :param actor: ``"diffusion"`` (the paper's), ``"flow"``, ``"vae"`` or ``"mlp"``, those of its ablation, or a class
    :param critic: ``"ensemble"`` (the paper's), ``"quantile"`` (TQC's), or a class
    :param inference_dtype: ``"bfloat16"`` rounds both sides of the products between hidden layers in the reverse process and
        in the action gradient, where weights take no gradient: faster, and actions differ a little, the next actions of TD
        targets among them. Critics of TD targets and training steps stay in float32, and so does everything with
        ``accelerate="off"``
    :param samplers: how to sample for each use, as :meth:`set_sampler` leaves it; for loading
    :param options: the actor's and the critic's own: see :class:`~sb3_dipo.DiffusionActor`, :class:`~sb3_dipo.FlowActor`,
        :class:`~sb3_dipo.VAEActor`, :class:`~sb3_dipo.MLPActor`, :class:`~sb3_dipo.EnsembleCritic`,
        :class:`~sb3_dipo.QuantileCritic`
    :raises ValueError: for an option of another actor or critic or a value outside its range, naming the option and what it
        may be
    """

    actor: GenerativeActor
    actor_target: GenerativeActor
    critic: Critic
    critic_target: Critic
    _graphs: Any = None  # CUDA graphs to act in, see sb3_dipo.fast

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        actor: str | type[GenerativeActor] = "diffusion",
        critic: str | type[Critic] = "ensemble",
        inference_dtype: str = "float32",
        samplers: dict[str, dict[str, Any]] | None = None,
        **options: Any,
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
        self.kinds: dict[str, Any] = {"actor": actor, "critic": critic}
        self.actor_class = _find_class("actor", actor, GenerativeActor, ACTORS)
        self.critic_class = _find_class("critic", critic, Critic, CRITICS)
        self.inference_dtype = check_choice("inference_dtype", inference_dtype, INFERENCE_DTYPES)
        self.options = options
        for name in options:
            if name not in (*self.actor_class.options, *self.critic_class.options):
                raise self._unknown_option(name)
        self.net_arch = [256, 256, 256] if net_arch is None else net_arch
        for width in (width for arch in get_actor_critic_arch(self.net_arch) for width in arch):
            check_int("net_arch", width, 1)
        self.activation_fn = activation_fn
        self.share_features_extractor = share_features_extractor
        self._build(lr_schedule)
        self.samplers = {use: self.actor.sampler for use in SAMPLER_USES}
        self.set_sampler()
        for use, settings in (samplers or {}).items():
            self.set_sampler(use, **settings)

    def _unknown_option(self, name: str) -> Exception:
        for kind, classes, own in (("actor", ACTORS, self.actor_class), ("critic", CRITICS, self.critic_class)):
            owners = [repr(each) for each, known in classes.items() if name in known.options]
            if owners:
                return ValueError(
                    f"`{name}` is an option of `{kind}={' or '.join(owners)}` and does not apply to "
                    f"`{kind}={self.kinds[kind]!r}`, which has: {', '.join(own.options)}."
                )
        return TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}.")

    def _build(self, lr_schedule: Schedule) -> None:
        shared = self.share_features_extractor
        self.critic = self.make_critic()
        self.critic_target = self.make_critic()
        self.actor = self.make_actor(self.critic.features_extractor if shared else None)
        self.actor_target = self.make_actor(self.critic_target.features_extractor if shared else None)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.actor_target.load_state_dict(self.actor.state_dict())

        lr = lr_schedule(1)
        self.actor.optimizer = self.optimizer_class(self.actor.own_parameters(), lr=lr, **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.critic.optimizer = self.optimizer_class(self.critic.parameters(), lr=lr, **self.optimizer_kwargs)  # type: ignore[call-arg]

        # Target networks are always in evaluation mode
        self.actor_target.set_training_mode(False)
        self.critic_target.set_training_mode(False)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> GenerativeActor:
        """
        Make an actor.

        :param features_extractor: the extractor to share; its own where None
        """
        kwargs = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": get_actor_critic_arch(self.net_arch)[0],
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
            "share_features_extractor": self.share_features_extractor,
            **self._own(self.actor_class),
        }
        return self.actor_class(**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        """
        Make a critic.

        :param features_extractor: the extractor to share; its own where None
        """
        kwargs = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": get_actor_critic_arch(self.net_arch)[1],
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
            **self._own(self.critic_class),
        }
        return self.critic_class(**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def _own(self, owner: Any) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in owner.options}

    def set_accelerate(self, accelerate: str) -> None:
        """
        Say how the policy computes. It is not saved with it, as another machine may do better otherwise.

        :param accelerate: ``"auto"``, ``"cudagraphs"``, ``"compile"`` or ``"off"``, see :class:`~sb3_dipo.DIPO`
        :raises sb3_dipo.fast.KernelError: for ``"compile"`` on a CPU, if the kernels cannot be compiled
        """
        ops = PLAIN
        if check_choice("accelerate", accelerate, ACCELERATIONS) != "off":
            from sb3_dipo.fast import make_ops

            ops = make_ops(self.device, accelerate, self.inference_dtype)
        for module in self.modules():
            if isinstance(module, UsesOps):
                module.ops = ops

    @classmethod
    def load(cls: type[SelfDIPOPolicy], path: str, device: th.device | str = "auto") -> SelfDIPOPolicy:
        """As SB3's; the policy computes as with ``accelerate="auto"``."""
        policy = super().load(path, device)
        with suppress(ImportError):  # where `fast` was left out
            policy.set_accelerate("auto")
        return policy

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
        :param noise_scale: factor of the noise, at least 0; VAE and MLP have this and ``num_candidates`` only, flow all but
            this, ``timestep_spacing`` and ``eta``, with the solvers ``"euler"`` and ``"midpoint"``
        :param num_candidates: actions to sample for each state, of which the one that the critic values most is taken, at
            least 1; for ``"target"`` the target critic chooses. With VAE and MLP it is 1 for ``"evaluation"``
        :raises ValueError: naming the setting and what it may be; nothing is changed then
        """
        check_choice("which", which, ("all", *SAMPLER_USES))
        known = self.actor.sampler_options
        for name in changes:
            if name not in known:
                raise ValueError(
                    f"`{name}` does not apply to the sampler of {type(self.actor).__name__}, which has: {', '.join(known)}."
                )
        fixed = self.actor.evaluation_sampler
        for name, value in fixed.items() if which == "evaluation" else ():
            if changes.get(name, value) != value:
                raise ValueError(f"`{name}` must be {value} for `which='evaluation'`: `deterministic=True` draws no noise.")
        if "eta" in known and changes.get("solver", "ddim") != "ddim":
            changes = {"eta": 0.0, **changes}
        samplers = dict(self.samplers)
        for use in SAMPLER_USES if which == "all" else (which,):
            samplers[use] = replace(samplers[use], **changes | (fixed if use == "evaluation" else {}))
        for actor in (self.actor, self.actor_target):  # all uses, so that both have made what they need
            samplers = {use: actor.check_sampler(sampler) for use, sampler in samplers.items()}
        self.samplers = samplers

    def sampler_settings(self) -> dict[str, dict[str, Any]]:
        """How the policy samples for each use, as ``samplers`` takes it: what is saved."""
        names = self.actor.sampler_options
        return {use: {name: getattr(sampler, name) for name in names} for use, sampler in self.samplers.items()}

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """Actions in [-1, 1], (batch_size, action_dim), for a batch of observations."""
        return self._predict(observation, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self._graphs is None or th.is_grad_enabled():
            return self.act(observation, "evaluation" if deterministic else "behaviour")
        return self._graphs.act(self, observation, "evaluation" if deterministic else "behaviour")

    def act(self, observation: PyTorchObs, which: str = "behaviour") -> th.Tensor:
        """
        Sample an action for each state, or take the best of several by the critic (best of N: Chen et al. 2023, SfBC).

        :param observation: observations, batch_size first
        :param which: what for: ``"behaviour"``, ``"evaluation"``, which repeats exactly, or ``"target"``, for which target
            actor and target critic decide
        :return: actions in [-1, 1], (batch_size, action_dim)
        """
        sampler = self.samplers[which]
        of_target = which == "target"
        actor = self.actor_target if of_target else self.actor
        number = sampler.num_candidates
        if number == 1:
            actions: th.Tensor = actor(observation, which == "evaluation", sampler)
            return actions
        repeated: PyTorchObs
        if isinstance(observation, dict):
            repeated = {key: values.repeat_interleave(number, dim=0) for key, values in observation.items()}
        else:
            repeated = observation.repeat_interleave(number, dim=0)
        features = actor.extract_features(observation).repeat_interleave(number, dim=0)
        sample = actor.deterministic_candidates if which == "evaluation" else actor.sample
        candidates = sample(features, sampler=sampler)
        values = (self.critic_target if of_target else self.critic).objective(repeated)(candidates)
        best = values.view(-1, number).argmax(dim=1)
        first = th.arange(len(best), dtype=th.int64, device=best.device) * number
        return candidates.index_select(0, first + best)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put actor and critic in training or evaluation mode; the targets stay in evaluation mode. SB3 calls this for every
        action, and looking takes less time than setting anew.

        :param mode: True for training
        """
        for network in (self.actor, self.critic):
            if any(module.training != mode for module in network.modules()):
                network.set_training_mode(mode)
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
            inference_dtype=self.inference_dtype,
            samplers=self.sampler_settings(),
            **self.kinds,
            **self.options,
        )
        return data


def _find_class(name: str, value: Any, base: type[Any], known: dict[str, Any]) -> Any:
    if isinstance(value, type):
        if not issubclass(value, base):
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, known))} or a subclass of {base.__name__}, not {value}."
            )
        return value
    return known[check_choice(name, value, known)]


MlpPolicy = DIPOPolicy


class CnnPolicy(DIPOPolicy):
    """
    :class:`DIPOPolicy` for images.

    :param args: as :class:`DIPOPolicy`
    :param features_extractor_class: features extractor to use
    :param kwargs: as :class:`DIPOPolicy`
    """

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": features_extractor_class, **kwargs})


class MultiInputPolicy(DIPOPolicy):
    """
    :class:`DIPOPolicy` for Dict observations.

    :param args: as :class:`DIPOPolicy`
    :param features_extractor_class: features extractor to use
    :param kwargs: as :class:`DIPOPolicy`
    """

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any):
        super().__init__(*args, **{"features_extractor_class": features_extractor_class, **kwargs})
