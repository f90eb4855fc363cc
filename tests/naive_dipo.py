"""DIPO (Yang et al., arXiv 2305.13122), written once more, naively, in plain PyTorch.

An oracle: it shares no code with the package it checks, follows the paper line by line and makes no attempt to be fast.
What the paper has not is written from the papers that have it: rectified flow (Liu et al., arXiv 2209.03003), quantile critics
(TQC, Kuznetsov et al., arXiv 2005.04269), layer normalisation (Ba et al., arXiv 1607.06450).
Letters in the shape comments: B batch, S observation, p action, K reverse length, L latent, M quantiles, C candidates.  The
paper's k = 1..K is the 0-based ``timestep`` = k - 1 here; every table of the noise process is indexed by the timestep.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAM_EPS = 1e-5
TIME_DIM = 32


@dataclass(frozen=True)
class Settings:
    """Everything that can be chosen, except the sizes of the networks."""

    actor: str = "diffusion"  # "diffusion" | "flow" | "vae" | "mlp"
    critic: str = "ensemble"  # "ensemble" | "quantile"
    n_critics: int = 2
    n_quantiles: int = 25  # M
    top_quantiles_to_drop_per_net: int = 2
    layer_norm: bool = False  # of the critics
    flow_solver: str = "euler"  # "euler" | "midpoint"
    flow_steps: int = 5
    target_candidates: int = 1  # C, sampled for the TD target; the one that the target critics like best counts
    max_action_shift: float | None = None  # largest distance of an improved action from the one taken, in each dimension
    action_gradient_start: str = "replay"  # "replay" | "policy"
    num_train_timesteps: int = 100  # K
    beta_schedule: str = "cosine"  # "cosine" | "vp" | "linear" | "ou"
    horizon: float | None = None  # T of "ou": constant beta = 1 - exp(-2T/K)
    noise_scale: float = 1.0  # factor of the noise along the reverse process
    gamma: float = 0.99
    tau: float = 0.005
    learning_rate: float = 3e-4  # actor
    qf_learning_rate: float = 3e-4  # critics
    action_lr: float = 0.03
    action_gradient_steps: int = 20
    action_grad_norm_ratio: float = 0.1  # joint L2 norm of the batch's gradient clipped to ratio * p
    persist_improved_actions: bool = True  # False: climb from the action taken every time, write nothing back
    max_grad_norm: float = 2.0
    actor_target_update_interval: int = 1  # target policy moved in updates 0, n, 2n, ...; target critics in every one
    latent_dim: int = 256
    kl_weight: float = 0.1
    noise_std: float = 0.1  # MLP actor


@dataclass
class Memory:
    """Replay data, float32, rows x n_envs x dim; ``terminals`` is 1 for a true end only, 0 at a time limit."""

    observations: Tensor  # (rows, n_envs, S)
    actions: Tensor  # (rows, n_envs, p), the actions taken: the critics learn from these
    rewards: Tensor  # (rows, n_envs)
    next_observations: Tensor  # (rows, n_envs, S)
    terminals: Tensor  # (rows, n_envs)
    improved_actions: Tensor = None  # type: ignore[assignment]  # (rows, n_envs, p), for the policy; a copy of actions

    def __post_init__(self) -> None:
        if self.improved_actions is None:
            self.improved_actions = self.actions.clone()


# ---------------------------------------------------------------------------------------------------------------- networks


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5), over the last dimension, then a weight and a bias for each feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + 1e-5) * self.weight + self.bias


def make_mlp(sizes: Sequence[int], layer_norm: bool = False) -> nn.Sequential:
    """Linear-(LayerNorm)-Mish-...-Linear through the given sizes, nothing after the last one."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([LayerNorm(fan_out)] if layer_norm else []), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def init_weights(module: nn.Module) -> None:
    """Weights normal with std 1 / (2 sqrt(fan_in)), truncated at two std; biases zero."""
    if isinstance(module, nn.Linear):
        std = 1.0 / (2.0 * math.sqrt(module.in_features))
        nn.init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2.0 * std, b=2.0 * std)
        nn.init.zeros_(module.bias)


class Critic(nn.Module):
    """One Q(s, a); with quantiles, M of them."""

    def __init__(
        self, obs_dim: int, action_dim: int, hidden: Sequence[int], n_quantiles: int | None = None, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.layers = make_mlp([obs_dim + action_dim, *hidden, n_quantiles or 1], layer_norm)
        self.scalar = n_quantiles is None

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(B, S), (B, p) -> (B,) or (B, M)"""
        values: Tensor = self.layers(torch.cat([observations, actions], dim=1))
        return values.squeeze(1) if self.scalar else values


def time_embedding(timesteps: Tensor) -> Tensor:
    """Sinusoidal embedding of 0-based timesteps, sines then cosines: (B,) -> (B, 32)"""
    half = TIME_DIM // 2
    i = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000.0) * i / (half - 1))
    angles = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def make_betas(schedule: str, num_steps: int, horizon: float | None = None) -> np.ndarray:
    """beta_1 .. beta_K in float64: (K,)"""
    k = num_steps
    if schedule == "cosine":
        x = np.linspace(0, k + 1, k + 1)
        f = np.cos((x / (k + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.clip(1 - f[1:] / f[:-1], 0, 0.999)
    if schedule == "vp":
        i = np.arange(1, k + 1)
        return 1 - np.exp(-0.1 / k - 0.5 * (10 - 0.1) * (2 * i - 1) / k**2)
    if schedule == "linear":
        return np.linspace(1e-4, 2e-2, k)
    if schedule == "ou":
        if horizon is None:
            raise ValueError("the schedule 'ou' needs a horizon")
        return np.full(k, 1 - np.exp(-2 * horizon / k))
    raise ValueError(f"unknown schedule {schedule!r}")


class DiffusionActor(nn.Module):
    """Noise estimator eps(a_k, s, k), its noise process, and the reverse process that makes an action."""

    betas: Tensor
    alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self,
        settings: Settings,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        time_hidden: int,
        table_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_steps = settings.num_train_timesteps
        self.noise_scale = settings.noise_scale
        self.action_dim = action_dim
        self.time_mlp = make_mlp([TIME_DIM, time_hidden, TIME_DIM])
        self.layers = make_mlp([action_dim + TIME_DIM + obs_dim, *hidden, action_dim])

        betas = torch.as_tensor(make_betas(settings.beta_schedule, self.num_steps, settings.horizon)).to(table_dtype)
        alphas = 1 - betas
        abar = torch.cumprod(alphas, dim=0)
        abar_previous = torch.cat([torch.ones(1, dtype=table_dtype), abar[:-1]])
        tables = {
            "betas": betas,
            "alphas_cumprod": abar,
            "posterior_variance": betas * (1 - abar_previous) / (1 - abar),
            "posterior_mean_coef1": betas * torch.sqrt(abar_previous) / (1 - abar),
            "posterior_mean_coef2": (1 - abar_previous) * torch.sqrt(alphas) / (1 - abar),
            "sqrt_recip_alphas_cumprod": torch.sqrt(1 / abar),
            "sqrt_recipm1_alphas_cumprod": torch.sqrt(1 / abar - 1),
            "sqrt_alphas_cumprod": torch.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": torch.sqrt(1 - abar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())

    def forward(self, noisy_actions: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """The predicted noise: (B, p), (B,), (B, S) -> (B, p)"""
        embedding = self.time_mlp(time_embedding(timesteps))
        return self.layers(torch.cat([noisy_actions, embedding, observations], dim=1))

    def sample(self, observations: Tensor, initial_noise: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The reverse process with the clipped posterior: (B, S), (B, p), (K, B, p) in order of use -> (B, p)"""
        batch, device = len(observations), observations.device
        if initial_noise is None:
            initial_noise = torch.randn(batch, self.action_dim, device=device)
        if noise is None:
            noise = torch.randn(self.num_steps, batch, self.action_dim, device=device)
        a = initial_noise
        for step in range(self.num_steps):
            t = self.num_steps - 1 - step
            eps = self(a, torch.full((batch,), t, device=device), observations)
            a0 = self.sqrt_recip_alphas_cumprod[t] * a - self.sqrt_recipm1_alphas_cumprod[t] * eps
            a0 = a0.clamp(-1.0, 1.0)
            a = self.posterior_mean_coef1[t] * a0 + self.posterior_mean_coef2[t] * a
            if t > 0:
                a = a + self.noise_scale * torch.sqrt(self.posterior_variance[t]) * noise[step]
        return a.clamp(-1.0, 1.0)

    def loss(
        self, observations: Tensor, actions: Tensor, timesteps: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Denoising loss (11), mean over batch and dimensions: (B, S), (B, p), (B,), (B, p) -> ()"""
        if timesteps is None:
            timesteps = torch.randint(self.num_steps, (len(actions),), device=actions.device)
        if noise is None:
            noise = torch.randn_like(actions)
        signal = self.sqrt_alphas_cumprod[timesteps][:, None]
        spread = self.sqrt_one_minus_alphas_cumprod[timesteps][:, None]
        return F.mse_loss(self(signal * actions + spread * noise, timesteps, observations), noise)


class FlowActor(nn.Module):
    """Rectified flow: the velocity v(x_t, s, t) from noise (t = 0) to an action (t = 1); the embedding is of 100 t."""

    def __init__(self, settings: Settings, obs_dim: int, action_dim: int, hidden: Sequence[int], time_hidden: int) -> None:
        super().__init__()
        self.solver, self.num_steps, self.action_dim = settings.flow_solver, settings.flow_steps, action_dim
        self.time_mlp = make_mlp([TIME_DIM, time_hidden, TIME_DIM])
        self.layers = make_mlp([action_dim + TIME_DIM + obs_dim, *hidden, action_dim])

    def forward(self, x: Tensor, times: Tensor, observations: Tensor) -> Tensor:
        """The predicted velocity: (B, p), (B,), (B, S) -> (B, p)"""
        embedding = self.time_mlp(time_embedding(100 * times))
        return self.layers(torch.cat([x, embedding, observations], dim=1))

    def velocity(self, x: Tensor, t: float, observations: Tensor) -> Tensor:
        """The velocity towards the predicted action, x + (1 - t) v, once that is clipped to the box: -> (B, p)"""
        end = x + (1 - t) * self(x, torch.full((len(x),), t), observations)
        return (end.clamp(-1.0, 1.0) - x) / (1 - t)

    def sample(self, observations: Tensor, initial_noise: Tensor | None = None) -> Tensor:
        """Steps of Euler's or the midpoint method: (B, S), (B, p) -> (B, p)"""
        x = torch.randn(len(observations), self.action_dim) if initial_noise is None else initial_noise
        dt = 1 / self.num_steps
        for step in range(self.num_steps):
            t = step / self.num_steps
            if self.solver == "euler":
                x = x + dt * self.velocity(x, t, observations)
            else:
                middle = x + dt / 2 * self.velocity(x, t, observations)
                x = x + dt * self.velocity(middle, t + dt / 2, observations)
        return x.clamp(-1.0, 1.0)

    def loss(self, observations: Tensor, actions: Tensor, times: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """|| v((1 - t) z + t a, s, t) - (a - z) ||^2, mean over batch and dimensions: (B, S), (B, p), (B,), (B, p) -> ()"""
        if times is None:
            times = torch.rand(len(actions))
        if noise is None:
            noise = torch.randn_like(actions)
        x = (1 - times[:, None]) * noise + times[:, None] * actions
        return F.mse_loss(self(x, times, observations), actions - noise)


class VAEActor(nn.Module):
    """Ablation: a conditional variational autoencoder."""

    def __init__(self, settings: Settings, obs_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.latent_dim = settings.latent_dim
        self.kl_weight = settings.kl_weight
        self.encoder = make_mlp([action_dim + obs_dim, *hidden])
        self.mean = nn.Linear(hidden[-1], self.latent_dim)
        self.log_variance = nn.Linear(hidden[-1], self.latent_dim)
        self.decoder = make_mlp([self.latent_dim + obs_dim, *hidden])
        self.final = nn.Linear(hidden[-1], action_dim)

    def decode(self, z: Tensor, observations: Tensor) -> Tensor:
        """(B, L), (B, S) -> (B, p), not clipped"""
        return self.final(F.mish(self.decoder(torch.cat([z, observations], dim=1))))

    def sample(self, observations: Tensor, initial_noise: Tensor | None = None) -> Tensor:
        """(B, S), (B, L) -> (B, p)"""
        if initial_noise is None:
            initial_noise = torch.randn(len(observations), self.latent_dim, device=observations.device)
        return self.decode(initial_noise, observations).clamp(-1.0, 1.0)

    def mode(self, observations: Tensor) -> Tensor:
        """The action of z = 0: (B, S) -> (B, p)"""
        return self.sample(observations, torch.zeros(len(observations), self.latent_dim, device=observations.device))

    def loss(self, observations: Tensor, actions: Tensor, noise: Tensor | None = None) -> Tensor:
        """MSE (mean over batch and dimensions) + kl_weight KL (sum over L, mean over B): (B, S), (B, p), (B, L) -> ()"""
        features = F.mish(self.encoder(torch.cat([actions, observations], dim=1)))
        mean, log_variance = self.mean(features), self.log_variance(features)
        if noise is None:
            noise = torch.randn_like(mean)
        z = mean + torch.exp(0.5 * log_variance) * noise
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        return F.mse_loss(self.decode(z, observations), actions) + self.kl_weight * kl


class MLPActor(nn.Module):
    """Ablation: a deterministic network with Gaussian exploration noise."""

    def __init__(self, settings: Settings, obs_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.noise_std = settings.noise_std
        self.layers = make_mlp([obs_dim, *hidden, action_dim])

    def noisy(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, S), (B, p) -> (B, p), not clipped"""
        out = self.layers(observations)
        if noise is None:
            noise = torch.randn_like(out)
        return out + self.noise_std * noise

    def sample(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, S), (B, p) -> (B, p)"""
        return self.noisy(observations, noise).clamp(-1.0, 1.0)

    def mode(self, observations: Tensor) -> Tensor:
        """(B, S) -> (B, p)"""
        return self.layers(observations).clamp(-1.0, 1.0)

    def loss(self, observations: Tensor, actions: Tensor, noise: Tensor | None = None) -> Tensor:
        """MSE of the noisy output, mean over batch and dimensions: (B, S), (B, p), (B, p) -> ()"""
        return F.mse_loss(self.noisy(observations, noise), actions)


# --------------------------------------------------------------------------------------------------------------- algorithm


Actor = DiffusionActor | FlowActor | VAEActor | MLPActor


def quantile_huber_loss(quantiles: Tensor, targets: Tensor) -> Tensor:
    """TQC's loss of one network, equation (11) there, kappa = 1, averaged over all pairs: (B, M), (B, N) -> ()"""
    total = torch.zeros(())
    count = quantiles.shape[1]
    for m in range(count):
        fraction = (m + 0.5) / count  # tau_m
        difference = targets - quantiles[:, m : m + 1]  # u
        size = difference.abs()
        huber = torch.where(size <= 1, 0.5 * difference**2, size - 0.5)
        total = total + ((fraction - (difference < 0).float()).abs() * huber).mean()
    return total / count


class NaiveDIPO:
    """Algorithm 3: acting, and one whole update."""

    def __init__(
        self,
        settings: Settings,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        time_hidden: int | None = None,  # width of the time MLP; hidden[0] if not given
        device: str | torch.device = "cpu",
        table_dtype: torch.dtype = torch.float32,  # the noise process is worked out in it; the golden files' is float32
    ) -> None:
        self.settings = settings
        self.action_dim = action_dim
        self.device = torch.device(device)
        self.actor: Actor
        if settings.actor == "diffusion":
            time_hidden = hidden[0] if time_hidden is None else time_hidden
            self.actor = DiffusionActor(settings, obs_dim, action_dim, hidden, time_hidden, table_dtype)
        elif settings.actor == "flow":
            self.actor = FlowActor(settings, obs_dim, action_dim, hidden, hidden[0] if time_hidden is None else time_hidden)
        elif settings.actor == "vae":
            self.actor = VAEActor(settings, obs_dim, action_dim, hidden)
        elif settings.actor == "mlp":
            self.actor = MLPActor(settings, obs_dim, action_dim, hidden)
        else:
            raise ValueError(f"unknown actor {settings.actor!r}")
        self.quantiles = settings.critic == "quantile"
        of_critic = (hidden, settings.n_quantiles if self.quantiles else None, settings.layer_norm)
        self.critics = [Critic(obs_dim, action_dim, *of_critic) for _ in range(settings.n_critics)]
        for net in [self.actor, *self.critics]:
            net.apply(init_weights)
            net.to(self.device)
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_targets = [copy.deepcopy(critic) for critic in self.critics]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=settings.learning_rate, eps=ADAM_EPS)
        self.critic_optimizer = torch.optim.Adam(
            self._critic_parameters(self.critics), lr=settings.qf_learning_rate, eps=ADAM_EPS
        )
        self.n_updates = 0

    @staticmethod
    def _critic_parameters(critics: list[Critic]) -> list[nn.Parameter]:
        return [parameter for critic in critics for parameter in critic.parameters()]

    # ---- acting

    @torch.no_grad()
    def act(self, observations: Tensor, initial_noise: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """One call of the behaviour policy: (B, S) -> (B, p); the draws as in ``update``."""
        return self._sample(self.actor, observations, initial_noise, noise)

    @staticmethod
    def _sample(actor: Actor, observations: Tensor, initial_noise: Tensor | None, noise: Tensor | None) -> Tensor:
        if isinstance(actor, DiffusionActor):
            return actor.sample(observations, initial_noise, noise)
        if isinstance(actor, VAEActor | FlowActor):
            return actor.sample(observations, initial_noise)
        return actor.sample(observations, noise)

    # ---- learning

    def update(self, memory: Memory, draws: Mapping[str, Any]) -> dict[str, float]:
        """One whole update.  ``draws`` holds recorded random draws; whatever is missing is drawn here.

        critic_rows, critic_envs, actor_rows, actor_envs: (B,) indices into the memory; where missing, batch_size: int
        diffusion: initial_noise (B, p), noise (K, B, p) in order of use, timesteps (B,) 0-based, loss_noise (B, p)
        flow: initial_noise (B, p), timesteps (B,) = t in [0, 1], loss_noise (B, p)
        with C candidates for the target, initial_noise and noise are of C B rows: the C of the first state come first
        action_gradient_start="policy": start_noise (B, p) = z of the flow's sample
        vae: initial_noise (B, L) = z of the target's sample, loss_noise (B, L) = reparameterisation noise
        mlp: noise (B, p) of the target's sample, loss_noise (B, p), both standard normal
        """
        rows, envs = self._minibatch(memory, draws, "critic")
        critic_loss = self.critic_step(
            memory.observations[rows, envs],
            memory.actions[rows, envs],
            memory.rewards[rows, envs],
            memory.next_observations[rows, envs],
            memory.terminals[rows, envs],
            draws.get("initial_noise"),
            draws.get("noise"),
        )

        rows, envs = self._minibatch(memory, draws, "actor")
        observations, taken = memory.observations[rows, envs], memory.actions[rows, envs]
        if self.settings.action_gradient_start == "policy":
            start = self.act(observations, draws.get("start_noise"))
            actions = self.improve_actions(observations, start, taken)
        elif self.settings.persist_improved_actions:
            actions = self.improve_actions(observations, memory.improved_actions[rows, envs], taken)
            for i in range(len(rows)):  # one after the other: of equal indices the last wins
                memory.improved_actions[rows[i], envs[i]] = actions[i]
        else:
            actions = self.improve_actions(observations, taken, taken)

        actor_loss = self.actor_step(observations, actions, draws)
        self.move_targets()
        self.n_updates += 1
        return {"critic_loss": critic_loss, "actor_loss": actor_loss}

    def _minibatch(self, memory: Memory, draws: Mapping[str, Any], which: str) -> tuple[Tensor, Tensor]:
        """Rows and environments of one minibatch, (B,) each."""
        indices = []
        for name, size in zip(("rows", "envs"), memory.rewards.shape, strict=True):
            index = draws.get(f"{which}_{name}")
            if index is None:
                index = torch.randint(size, (draws["batch_size"],), device=self.device)
            indices.append(index)
        return indices[0], indices[1]

    def critic_step(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_observations: Tensor,
        terminals: Tensor,
        initial_noise: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> float:
        """One gradient step of all critics towards r + gamma (1 - terminal) V', a' of the target policy.

        V' is min_i Q'_i(s', a'), or with quantiles all those of all Q'_i without the largest.
        """
        settings = self.settings
        with torch.no_grad():
            next_actions = self._target_actions(next_observations, initial_noise, noise)
            next_q = [critic(next_observations, next_actions) for critic in self.critic_targets]
            if self.quantiles:
                kept = settings.n_critics * (settings.n_quantiles - settings.top_quantiles_to_drop_per_net)
                next_values = torch.cat(next_q, dim=1).sort(dim=1).values[:, :kept]
                target = rewards[:, None] + settings.gamma * (1 - terminals[:, None]) * next_values
            else:
                target = rewards + settings.gamma * (1 - terminals) * torch.stack(next_q).min(dim=0).values
        values = [critic(observations, actions) for critic in self.critics]
        if self.quantiles:
            loss = torch.stack([quantile_huber_loss(each, target) for each in values]).mean()
        else:
            loss = torch.stack([F.mse_loss(each, target) for each in values]).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._critic_parameters(self.critics), self.settings.max_grad_norm)
        self.critic_optimizer.step()
        return loss.item()

    def _target_actions(self, observations: Tensor, initial_noise: Tensor | None, noise: Tensor | None) -> Tensor:
        """The target policy's action, the best of C by the target critics: (B, S) -> (B, p)"""
        candidates = self.settings.target_candidates
        if candidates == 1:
            return self._sample(self.actor_target, observations, initial_noise, noise)
        repeated = observations.repeat_interleave(candidates, dim=0)
        actions = self._sample(self.actor_target, repeated, initial_noise, noise)
        best = self.objective(self.critic_targets, repeated, actions).view(-1, candidates).argmax(dim=1)
        return actions.view(len(observations), candidates, -1)[torch.arange(len(observations)), best]

    def objective(self, critics: Sequence[Critic], observations: Tensor, actions: Tensor) -> Tensor:
        """min_i Q_i, or with quantiles the mean of all: (B, S), (B, p) -> (B,)"""
        values = torch.stack([critic(observations, actions) for critic in critics])
        return values.mean(dim=(0, 2)) if self.quantiles else values.min(dim=0).values

    def improve_actions(self, observations: Tensor, actions: Tensor, taken: Tensor | None = None) -> Tensor:
        """Action gradient (15): gradient ascent of the batch's sum of the objective by a fresh Adam: -> (B, p)"""
        actions = actions.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([actions], lr=self.settings.action_lr, eps=ADAM_EPS)
        for _ in range(self.settings.action_gradient_steps):
            q = self.objective(self.critics, observations, actions)
            (actions.grad,) = torch.autograd.grad(-q.sum(), actions)
            nn.utils.clip_grad_norm_([actions], self.settings.action_grad_norm_ratio * self.action_dim)
            optimizer.step()
            with torch.no_grad():
                if self.settings.max_action_shift is not None:
                    assert taken is not None
                    shift = actions - taken
                    actions.copy_(taken + shift.clamp(-self.settings.max_action_shift, self.settings.max_action_shift))
                actions.clamp_(-1.0, 1.0)
        return actions.detach()

    def actor_loss(self, observations: Tensor, actions: Tensor, draws: Mapping[str, Any]) -> Tensor:
        """The actor's loss on pairs (s, a): (B, S), (B, p) -> ()"""
        if isinstance(self.actor, DiffusionActor | FlowActor):
            return self.actor.loss(observations, actions, draws.get("timesteps"), draws.get("loss_noise"))
        return self.actor.loss(observations, actions, draws.get("loss_noise"))

    def actor_step(self, observations: Tensor, actions: Tensor, draws: Mapping[str, Any]) -> float:
        """One gradient step of the actor on the improved pairs."""
        loss = self.actor_loss(observations, actions, draws)
        self.actor_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.settings.max_grad_norm)
        self.actor_optimizer.step()
        return loss.item()

    @torch.no_grad()
    def move_targets(self) -> None:
        """Polyak averaging of the critics, and in updates 0, n, 2n, ... of the policy."""
        pairs: list[tuple[nn.Module, nn.Module]] = list(zip(self.critics, self.critic_targets, strict=True))
        if self.n_updates % self.settings.actor_target_update_interval == 0:
            pairs.append((self.actor, self.actor_target))
        for net, target in pairs:
            for w, w_target in zip(net.parameters(), target.parameters(), strict=True):
                w_target.copy_(self.settings.tau * w + (1 - self.settings.tau) * w_target)

    # ---- weights in and out

    def _live_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The order of registration in the modules above is the documented order."""
        return {
            "actor": list(self.actor.parameters()),
            "actor_target": list(self.actor_target.parameters()),
            "critic": self._critic_parameters(self.critics),
            "critic_target": self._critic_parameters(self.critic_targets),
        }

    def flat_parameters(self) -> dict[str, list[Tensor]]:
        """Copies of the weights, each layer's weight (out, in), then its bias (out,), the layers in this order:

        actor, actor_target: diffusion  time MLP 1, 2; main MLP 0 .. L (input: noisy action, embedding, state)
                             flow       as diffusion
                             vae        encoder (input: action, state); mean; log-variance; decoder (input: z, state); final
                             mlp        layers 0 .. L (input: state)
        critic, critic_target: critic 0, layers 0 .. L (input: state, action); the others likewise; with layer_norm, its
                             weight and bias come after those of the layer before it
        """
        return {which: [w.detach().clone() for w in weights] for which, weights in self._live_parameters().items()}

    @torch.no_grad()
    def set_parameters(self, which: str, tensors: Sequence[Tensor]) -> None:
        """Set the weights of ``which``, a key of ``flat_parameters``, in the same order."""
        for w, new in zip(self._live_parameters()[which], tensors, strict=True):
            if w.shape != new.shape:
                raise ValueError(f"{which}: expected the shape {tuple(w.shape)}, got {tuple(new.shape)}")
            w.copy_(new)

    def load_golden(self, npz: Mapping[str, np.ndarray]) -> None:
        """Load the initial weights of a golden file into the nets and their targets."""
        actor, critic = self.golden_names()
        for which, names in (("actor", actor), ("critic", critic)):
            tensors = [torch.as_tensor(npz[name]) for name in names]
            self.set_parameters(which, tensors)
            self.set_parameters(f"{which}_target", tensors)

    def golden_names(self) -> tuple[list[str], list[str]]:
        """Names of the golden files' actor and critic weights, in the order of ``flat_parameters``."""

        def layers(prefix: str, count: int) -> list[str]:
            return [f"{prefix}.{2 * i}" for i in range(count)]

        def linear_count(net: nn.Module) -> int:
            return sum(isinstance(module, nn.Linear) for module in net.modules())

        if isinstance(self.actor, DiffusionActor):
            actor = ["actor.time_mlp.1", "actor.time_mlp.3", *layers("actor.layer", linear_count(self.actor.layers))]
        elif isinstance(self.actor, VAEActor):
            depth = linear_count(self.actor.encoder)
            actor = [*layers("vae.encoder", depth), "vae.fc_mu", "vae.fc_var"]
            actor += [*layers("vae.decoder", depth), "vae.final_layer.0"]
        else:
            actor = [*layers("mlp.mid_layer", linear_count(self.actor.layers) - 1), "mlp.final_layer"]
        depth = linear_count(self.critics[0])
        critic = layers("critic.q1_model", depth) + layers("critic.q2_model", depth)
        return (
            [f"{name}.{part}" for name in actor for part in ("weight", "bias")],
            [f"{name}.{part}" for name in critic for part in ("weight", "bias")],
        )
