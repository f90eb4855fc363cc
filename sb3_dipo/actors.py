"""
Actors: what can be fitted to improved actions.

All share one contract, :class:`GenerativeActor`: ``extract_features(obs)``, ``sample(features)``,
``deterministic_action(features)`` and ``loss(features, actions)``. :class:`DiffusionActor` is the paper's; :class:`FlowActor`
needs fewer steps; :class:`VAEActor` and :class:`MLPActor` are those of the paper's ablation (Figures 9 and 20).
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_dipo.checks import check_bool, check_choice, check_float, check_int
from sb3_dipo.diffusion.process import denoising_loss, flow_matching_loss
from sb3_dipo.diffusion.schedules import MAX_HORIZON, MIN_HORIZON, SCHEDULES, make_schedule
from sb3_dipo.diffusion.solvers import FLOW_SOLVERS, FLOW_TIME, SOLVERS, SPACINGS, SolverTable
from sb3_dipo.networks import NoisePredictionNetwork, UsesOps, init_weights, make_mlp
from sb3_dipo.samplers import Sampler

MAX_TABLES = 8  # of an actor, for the samplers that were set last: more than a policy has


class GenerativeActor(UsesOps, BasePolicy, ABC):
    """
    A distribution over actions given a state, from which to sample and which can be fitted to given actions. A class of your
    own can be given as ``policy_kwargs=dict(actor=MyActor)``.

    :param observation_space: observation space
    :param action_space: action space, a Box
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation after each of them
    :param features_extractor: network that makes features of observations
    :param features_dim: number of features
    :param normalize_images: whether to divide images by 255
    :param share_features_extractor: whether the extractor is the critic's: the actor's loss then leaves it alone
    :param num_candidates: actions of which the policy takes the one that the critic values most, at least 1; the paper's 1
    :param noise_scale: factor of the noise in samples, at least 0; the paper's 1
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer
    options: ClassVar[tuple[str, ...]] = ("num_candidates", "noise_scale")
    """The actor's own arguments: what ``policy_kwargs`` may set."""
    sampler_options: ClassVar[tuple[str, ...]] = ("num_candidates", "noise_scale")
    """Those of them that are fields of a :class:`~sb3_dipo.Sampler`, which can be changed at any time."""
    evaluation_sampler: ClassVar[dict[str, Any]] = {"num_candidates": 1, "noise_scale": 0}
    """Fields of a sampler that ``deterministic=True`` does not leave open."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        normalize_images: bool = True,
        share_features_extractor: bool = False,
        num_candidates: int = 1,
        noise_scale: float = 1.0,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.features_dim = features_dim
        self.share_features_extractor = share_features_extractor
        self.action_dim = get_action_dim(action_space)
        self.sampler = Sampler(check_int("num_candidates", num_candidates, 1), check_float("noise_scale", noise_scale))

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None) -> th.Tensor:
        """
        Features of observations, to be computed once for all steps of a reverse process.

        :param obs: observations, batch_size first
        :param features_extractor: the actor's own where None
        :return: (batch_size, features_dim); without gradient if the extractor is shared with the critic
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return super().extract_features(obs, features_extractor or self.features_extractor)

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that the actor's loss trains: all but those of a shared features extractor."""
        shared = set(self.features_extractor.parameters()) if self.share_features_extractor else set()
        return [parameter for parameter in self.parameters() if parameter not in shared]

    @abstractmethod
    def sample(
        self,
        features: th.Tensor,
        initial_noise: th.Tensor | None = None,
        noise: th.Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> th.Tensor:
        """
        Draw one action for each state. An actor takes those of the draws that it needs.

        :param features: of the states, (batch_size, features_dim)
        :param initial_noise: the latent to start from, standard normal; drawn where None
        :param noise: the noise added on the way, standard normal; drawn where None
        :param sampler: how to sample; the actor's own where None
        :return: actions in [-1, 1], (batch_size, action_dim)
        """

    @abstractmethod
    def deterministic_action(self, features: th.Tensor, sampler: Sampler | None = None) -> th.Tensor:
        """
        The action of ``deterministic=True``: draws nothing, so that it repeats exactly.

        :param features: of the states, (batch_size, features_dim)
        :param sampler: how to sample, though without noise; the actor's own where None
        :return: actions in [-1, 1], (batch_size, action_dim)
        """

    def deterministic_candidates(self, features: th.Tensor, sampler: Sampler) -> th.Tensor:
        """
        Several actions for each state that repeat exactly, for ``deterministic=True`` with ``num_candidates`` above 1. Only
        actors whose :attr:`evaluation_sampler` leaves that number open have them.

        :param features: of the states, each ``num_candidates`` times in a row, (batch_size * num_candidates, features_dim)
        :param sampler: how to sample, though without noise
        :return: actions in [-1, 1], (batch_size * num_candidates, action_dim)
        """
        raise NotImplementedError

    @abstractmethod
    def loss(
        self,
        features: th.Tensor,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        How badly the actor fits the given actions.

        :param features: of the states, (batch_size, features_dim)
        :param actions: improved actions in [-1, 1], (batch_size, action_dim)
        :param timesteps: diffusion only: k counted from 0, int64, (batch_size,); drawn where None
        :param noise: standard normal; drawn where None
        :return: the loss, a scalar
        """

    def check_sampler(self, sampler: Sampler) -> Sampler:
        """
        Check a sampler before it is used.

        :param sampler: how to sample
        :return: the same, with numbers of the right type
        :raises ValueError: naming the field and what it may be
        """
        num_candidates = check_int("num_candidates", sampler.num_candidates, 1)
        return replace(sampler, num_candidates=num_candidates, noise_scale=check_float("noise_scale", sampler.noise_scale))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        names = ("net_arch", "activation_fn", "features_extractor", "features_dim", "share_features_extractor")
        data.update({name: getattr(self, name) for name in names})
        data.update({name: getattr(self.sampler if name in self.sampler_options else self, name) for name in self.options})
        return data

    def forward(self, obs: PyTorchObs, deterministic: bool = False, sampler: Sampler | None = None) -> th.Tensor:
        """
        Actions in [-1, 1], (batch_size, action_dim), for observations.

        :param obs: observations, batch_size first
        :param deterministic: whether to draw nothing
        :param sampler: how to sample: one of the policy's, which ``set_sampler`` changes; the actor's own where None
        """
        features = self.extract_features(obs)
        return self.deterministic_action(features, sampler) if deterministic else self.sample(features, sampler=sampler)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


class IterativeActor(GenerativeActor):
    """
    What :class:`DiffusionActor` and :class:`FlowActor` share: actions are made of noise in the steps of a solver's table.

    :param args: as :class:`GenerativeActor`
    :param clip_sample: clip the predicted clean action to the box at every step, as the authors do; the result always is
    :param time_embed_dim: size of the timestep embedding, even, at least 4; the paper's 32
    :param kwargs: as :class:`GenerativeActor`
    """

    evaluation_sampler: ClassVar[dict[str, Any]] = {"noise_scale": 0}

    latent: th.Tensor
    """Where ``deterministic=True`` starts, (1, action_dim): the center of the noise, 0. Version 0.1.0 drew another."""

    network: NoisePredictionNetwork

    def __init__(self, *args: Any, clip_sample: bool = True, time_embed_dim: int = 32, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clip_sample = check_bool("clip_sample", clip_sample)
        self.time_embed_dim = check_int("time_embed_dim", time_embed_dim, 4)
        if self.time_embed_dim % 2:
            raise ValueError(f"`time_embed_dim` must be even, not {time_embed_dim}.")
        self._tables: dict[Sampler, SolverTable] = {}

    def _make_network(self) -> NoisePredictionNetwork:
        sizes = (self.action_dim, self.features_dim, self.net_arch, self.activation_fn, self.time_embed_dim)
        network = NoisePredictionNetwork(*sizes)
        # drawn as version 0.1.0 did, so that a seed gives the same training, and not used
        self.register_buffer("latent", 0 * th.randn(1, self.action_dim))
        return network

    @abstractmethod
    def _make_table(self, sampler: Sampler) -> SolverTable:
        """The coefficients of a sampler's steps."""

    def solver_table(self, sampler: Sampler) -> SolverTable:
        """
        The coefficients of a sampler's steps.

        :param sampler: how to sample
        :raises ValueError: if its solver cannot take these steps
        """
        key = replace(sampler, num_candidates=1, noise_scale=1.0)  # which do not matter here
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self._make_table(key)
            if len(self._tables) > MAX_TABLES:
                del self._tables[next(iter(self._tables))]
        return table

    def sample(
        self,
        features: th.Tensor,
        initial_noise: th.Tensor | None = None,
        noise: th.Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> th.Tensor:
        """
        Play a ~ pi(.|s): start from noise and denoise it step by step.

        :param features: of the states, (batch_size, features_dim)
        :param initial_noise: a_K, (batch_size, action_dim); standard normal where None
        :param noise: z in order of use, (number of steps, batch_size, action_dim); standard normal where None. The authors'
            sampler multiplies the last of them by 0; solvers that are not stochastic use none
        :param sampler: how to sample; the actor's own where None. With ``noise_scale`` 0 it is the authors' evaluation
        :return: actions in [-1, 1], (batch_size, action_dim)
        """
        sampler = sampler or self.sampler
        table = self.solver_table(sampler)
        shape = (features.shape[0], self.action_dim)
        if initial_noise is None:
            initial_noise = th.randn(shape, dtype=features.dtype, device=features.device)
        if sampler.noise_scale == 0 or not table.stochastic:
            noise = None
        elif noise is None:
            noise = th.randn((len(table.steps), *shape), dtype=features.dtype, device=features.device)
        if noise is not None and sampler.noise_scale != 1:
            noise = sampler.noise_scale * noise
        return self.ops.reverse_process(self.network, table, features, initial_noise, noise, self.clip_sample)

    def deterministic_action(self, features: th.Tensor, sampler: Sampler | None = None) -> th.Tensor:
        """
        The steps from ``latent``, the center of the noise, without noise on the way.

        :param features: of the states, (batch_size, features_dim)
        :param sampler: how to sample, though without noise; the actor's own where None
        :return: actions in [-1, 1], (batch_size, action_dim)
        """
        latents = self.latent.expand(features.shape[0], -1)
        return self.sample(features, initial_noise=latents, sampler=replace(sampler or self.sampler, noise_scale=0))

    def deterministic_candidates(self, features: th.Tensor, sampler: Sampler) -> th.Tensor:
        """From ``latent``, and from draws that are the same for every agent; see the contract."""
        shape = (sampler.num_candidates - 1, self.action_dim)
        others = th.randn(shape, generator=th.Generator(device="cpu").manual_seed(0), dtype=th.float32, device="cpu")
        latents = th.cat([self.latent, others.to(self.latent)]).repeat(features.shape[0] // sampler.num_candidates, 1)
        return self.sample(features, initial_noise=latents, sampler=replace(sampler, noise_scale=0))


class DiffusionActor(IterativeActor):
    """
    The paper's policy: the reverse of a noising process, fitted by denoising (Algorithms 1 and 4).

    :param args: as :class:`GenerativeActor`
    :param num_train_timesteps: K, length of the process, at least 1; the paper's 100
    :param beta_schedule: ``"cosine"`` (the paper's), ``"vp"``, ``"linear"`` or ``"ou"``, see
        :mod:`sb3_dipo.diffusion.schedules`
    :param horizon: T, noise time of the ``"ou"`` process, 1e-3 to 50; None is 4; must be None for the others
    :param solver: ``"ddpm"`` (the authors' sampler), ``"ddim"``, ``"dpmpp_2m"`` or ``"exponential_integrator"`` (the paper's
        Algorithm 1), see :mod:`sb3_dipo.diffusion.solvers`
    :param num_inference_steps: steps really taken when sampling, between 1 and K; None is all K
    :param timestep_spacing: which of the K steps those are, if fewer: ``"linspace"``, evenly spread, or ``"lambda"``, evenly
        in log signal-to-noise, without the steps that have hardly any signal: for few steps of ``"dpmpp_2m"`` or ``"ddim"``
    :param eta: for ``"ddim"``: between 0, deterministic, and 1, which is ``"ddpm"``; must be 0 for the others
    :param kwargs: as :class:`IterativeActor`
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    options = (
        "num_train_timesteps",
        "beta_schedule",
        "horizon",
        "solver",
        "num_inference_steps",
        "timestep_spacing",
        "eta",
        "num_candidates",
        "noise_scale",
        "clip_sample",
        "time_embed_dim",
    )
    sampler_options = ("solver", "num_inference_steps", "timestep_spacing", "eta", "num_candidates", "noise_scale")

    def __init__(
        self,
        *args: Any,
        num_train_timesteps: int = 100,
        beta_schedule: str = "cosine",
        horizon: float | None = None,
        solver: str = "ddpm",
        num_inference_steps: int | None = None,
        timestep_spacing: str = "linspace",
        eta: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.num_train_timesteps = check_int("num_train_timesteps", num_train_timesteps, 1)
        self.beta_schedule = check_choice("beta_schedule", beta_schedule, SCHEDULES)
        self.horizon = None if horizon is None else check_float("horizon", horizon, MIN_HORIZON, MAX_HORIZON)
        self.schedule = make_schedule(self.beta_schedule, self.num_train_timesteps, self.horizon)
        own = dict(solver=solver, num_inference_steps=num_inference_steps, timestep_spacing=timestep_spacing, eta=eta)
        self.sampler = self.check_sampler(replace(self.sampler, **own))  # type: ignore[arg-type]
        self.noise_network = self._make_network()

    @property
    def network(self) -> NoisePredictionNetwork:  # type: ignore[override]
        """eps(a_k, s, k)."""
        return self.noise_network

    def check_sampler(self, sampler: Sampler) -> Sampler:
        sampler = super().check_sampler(sampler)
        check_choice("solver", sampler.solver, SOLVERS)
        check_choice("timestep_spacing", sampler.timestep_spacing, SPACINGS)
        if sampler.num_inference_steps is not None:
            sampler = replace(sampler, num_inference_steps=check_int("num_inference_steps", sampler.num_inference_steps, 1))
        sampler = replace(sampler, eta=check_float("eta", sampler.eta, maximum=1.0))
        if sampler.eta != 0 and sampler.solver != "ddim":
            raise ValueError(f"`eta` belongs to `solver='ddim'` and must be 0 with {sampler.solver!r}, not {sampler.eta}.")
        self.solver_table(sampler)  # the solver checks, too
        return sampler

    def _make_table(self, sampler: Sampler) -> SolverTable:
        grid = SPACINGS[sampler.timestep_spacing](self.schedule, sampler.num_inference_steps or len(self.schedule))
        return SOLVERS[sampler.solver](self.schedule, grid, sampler.eta)

    def loss(
        self,
        features: th.Tensor,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        The denoising loss l_d, equation (11), averaged over batch and action dimensions.

        :param features: of the states, (batch_size, features_dim)
        :param actions: improved actions in [-1, 1], (batch_size, action_dim)
        :param timesteps: k counted from 0, int64, (batch_size,); uniform where None
        :param noise: z, (batch_size, action_dim); standard normal where None
        :return: the loss, a scalar
        """
        if timesteps is None:
            timesteps = th.randint(len(self.schedule), (actions.shape[0],), dtype=th.int64, device=actions.device)
        if noise is None:
            noise = th.randn_like(actions)

        def predict_noise(noisy_actions: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
            return self.noise_network(noisy_actions, timesteps, features)

        return denoising_loss(self.schedule, predict_noise, actions, timesteps, noise)


class FlowActor(IterativeActor):
    """
    Rectified flow (Liu et al. 2023, arXiv 2209.03003): a network predicts the velocity from noise z to the action a along
    x_t = (1 - t) z + t a, and a few steps of a solver follow it from t = 0 to 1. Nothing is random but the start.

    :param args: as :class:`GenerativeActor`
    :param solver: ``"euler"``, or ``"midpoint"``, which evaluates the network twice in each step
    :param num_inference_steps: steps of the solver, at least 1
    :param kwargs: as :class:`IterativeActor`; ``noise_scale`` has nothing to scale and is no option
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    options = ("solver", "num_inference_steps", "num_candidates", "clip_sample", "time_embed_dim")
    sampler_options = ("solver", "num_inference_steps", "num_candidates")

    def __init__(self, *args: Any, solver: str = "euler", num_inference_steps: int = 5, **kwargs: Any):
        super().__init__(*args, **kwargs)
        own = replace(self.sampler, solver=solver, num_inference_steps=num_inference_steps)
        self.sampler = self.check_sampler(own)
        self.velocity_network = self._make_network()

    @property
    def network(self) -> NoisePredictionNetwork:  # type: ignore[override]
        """v(x_t, s, 100 t)."""
        return self.velocity_network

    def check_sampler(self, sampler: Sampler) -> Sampler:
        sampler = super().check_sampler(sampler)
        check_choice("solver", sampler.solver, FLOW_SOLVERS)
        steps = check_int("num_inference_steps", sampler.num_inference_steps, 1)
        return replace(sampler, num_inference_steps=steps)

    def _make_table(self, sampler: Sampler) -> SolverTable:
        assert sampler.num_inference_steps is not None
        return FLOW_SOLVERS[sampler.solver](sampler.num_inference_steps)

    def loss(
        self,
        features: th.Tensor,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        || v(x_t, s, t) - (a - z) ||^2, averaged over batch and action dimensions.

        :param features: of the states, (batch_size, features_dim)
        :param actions: improved actions in [-1, 1], (batch_size, action_dim)
        :param timesteps: t in [0, 1], (batch_size,); uniform where None
        :param noise: z, (batch_size, action_dim); standard normal where None
        :return: the loss, a scalar
        """
        if timesteps is None:
            timesteps = th.rand(actions.shape[0], dtype=actions.dtype, device=actions.device)
        if noise is None:
            noise = th.randn_like(actions)

        def predict_velocity(x: th.Tensor, times: th.Tensor) -> th.Tensor:
            return self.velocity_network(x, FLOW_TIME * times, features)

        return flow_matching_loss(predict_velocity, actions, timesteps, noise)


class VAEActor(GenerativeActor):
    """
    The ablation's conditional variational autoencoder (paper, Figures 9 and 20; authors' code).

    :param args: as :class:`GenerativeActor`
    :param latent_dim: size of the latent z, at least 1; the authors' 256
    :param kl_weight: weight of the KL term in the loss, at least 0; the authors' 0.1
    :param kwargs: as :class:`GenerativeActor`
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    options = ("latent_dim", "kl_weight", "num_candidates", "noise_scale")

    def __init__(self, *args: Any, latent_dim: int = 256, kl_weight: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.latent_dim = check_int("latent_dim", latent_dim, 1)
        self.kl_weight = check_float("kl_weight", kl_weight)
        arch, act = self.net_arch, self.activation_fn
        encoded_dim = arch[-1] if arch else self.action_dim + self.features_dim
        self.encoder = make_mlp(self.action_dim + self.features_dim, -1, arch, act)
        self.mean = nn.Linear(encoded_dim, self.latent_dim).apply(init_weights)
        self.log_variance = nn.Linear(encoded_dim, self.latent_dim).apply(init_weights)
        self.decoder = make_mlp(self.latent_dim + self.features_dim, self.action_dim, arch, act)

    def sample(
        self,
        features: th.Tensor,
        initial_noise: th.Tensor | None = None,
        noise: th.Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> th.Tensor:
        """
        Decode z ~ N(0, noise_scale^2 I).

        :param features: of the states, (batch_size, features_dim)
        :param initial_noise: z, (batch_size, latent_dim); standard normal where None
        :param noise: the same: there is but one draw, and it may come by either name
        :param sampler: its ``noise_scale`` is the factor of z; the actor's own where None
        :return: actions in [-1, 1], (batch_size, action_dim)
        """
        if initial_noise is None:
            initial_noise = noise
        if initial_noise is None:
            shape = (features.shape[0], self.latent_dim)
            initial_noise = th.randn(shape, dtype=features.dtype, device=features.device)
        z = (sampler or self.sampler).noise_scale * initial_noise
        return self.decoder(th.cat([z, features], dim=1)).clamp(-1, 1)

    def deterministic_action(self, features: th.Tensor, sampler: Sampler | None = None) -> th.Tensor:
        """Decode z = 0: features (batch_size, features_dim) to actions in [-1, 1], (batch_size, action_dim)."""
        zeros = th.zeros((features.shape[0], self.latent_dim), dtype=features.dtype, device=features.device)
        return self.decoder(th.cat([zeros, features], dim=1)).clamp(-1, 1)

    def loss(
        self,
        features: th.Tensor,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Mean squared error of the reconstruction + ``kl_weight`` KL(q(z|a, s) || N(0, I)), the error averaged over batch and
        dimensions, the divergence summed over the latent ones and averaged over the batch.

        :param features: of the states, (batch_size, features_dim)
        :param actions: improved actions in [-1, 1], (batch_size, action_dim)
        :param timesteps: not used
        :param noise: of the reparametrisation, (batch_size, latent_dim); standard normal where None
        :return: the loss, a scalar
        """
        encoded = self.encoder(th.cat([actions, features], dim=1))
        mean, log_variance = self.mean(encoded), self.log_variance(encoded)
        if noise is None:
            noise = th.randn_like(mean)
        z = mean + (0.5 * log_variance).exp() * noise
        reconstruction = self.decoder(th.cat([z, features], dim=1))
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        return F.mse_loss(reconstruction, actions) + self.kl_weight * divergence


class MLPActor(GenerativeActor):
    """
    The ablation's regression with additive noise (paper, Figures 9 and 20; authors' code).

    :param args: as :class:`GenerativeActor`
    :param noise_std: standard deviation of the noise, at least 0, in units of the box's half-width; the authors' 0.1
    :param kwargs: as :class:`GenerativeActor`
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    options = ("noise_std", "num_candidates", "noise_scale")

    def __init__(self, *args: Any, noise_std: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.noise_std = check_float("noise_std", noise_std)
        self.layers = make_mlp(self.features_dim, self.action_dim, self.net_arch, self.activation_fn)

    def sample(
        self,
        features: th.Tensor,
        initial_noise: th.Tensor | None = None,
        noise: th.Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> th.Tensor:
        """
        The regression's action + N(0, (noise_scale noise_std)^2 I).

        :param features: of the states, (batch_size, features_dim)
        :param initial_noise: the same as ``noise``: there is but one draw, and it may come by either name
        :param noise: (batch_size, action_dim); standard normal where None
        :param sampler: its ``noise_scale`` is the factor of ``noise_std``; the actor's own where None
        :return: actions in [-1, 1], (batch_size, action_dim)
        """
        actions = self.layers(features)
        if noise is None:
            noise = initial_noise
        if noise is None:
            noise = th.randn_like(actions)
        return (actions + (sampler or self.sampler).noise_scale * self.noise_std * noise).clamp(-1, 1)

    def deterministic_action(self, features: th.Tensor, sampler: Sampler | None = None) -> th.Tensor:
        """The regression's action: features (batch_size, features_dim) to actions in [-1, 1], (batch_size, action_dim)."""
        return self.layers(features).clamp(-1, 1)

    def loss(
        self,
        features: th.Tensor,
        actions: th.Tensor,
        timesteps: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Mean squared error of the noisy action, averaged over batch and dimensions; it is not clipped.

        :param features: of the states, (batch_size, features_dim)
        :param actions: improved actions in [-1, 1], (batch_size, action_dim)
        :param timesteps: not used
        :param noise: (batch_size, action_dim), standard normal; drawn where None
        :return: the loss, a scalar
        """
        prediction = self.layers(features)
        if noise is None:
            noise = th.randn_like(prediction)
        return F.mse_loss(prediction + self.noise_std * noise, actions)


ACTORS: dict[str, type[GenerativeActor]] = {"diffusion": DiffusionActor, "flow": FlowActor, "vae": VAEActor, "mlp": MLPActor}
