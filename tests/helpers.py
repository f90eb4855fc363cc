"""What several tests use: an agent on made-up data, with every random draw given."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_dipo import DIPO, DIPOReplayBuffer
from sb3_dipo.buffers import ImprovedSamples

Make = Callable[..., th.Tensor]

MODES = ("off", "auto", "compile")
"""Values of ``accelerate`` that compute differently on a CPU."""


class RandomEnv(gym.Env[np.ndarray, np.ndarray]):
    """Observations and rewards are standard normal, whatever the action; episodes never end."""

    def __init__(self, obs_dim: int, action_dim: int):
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._observe(), float(self.np_random.normal()), False, False, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=self.observation_space.shape).astype(np.float32)


class GivenRowsBuffer(DIPOReplayBuffer):
    """For one environment: draws the rows that it is given in place of random ones."""

    critic_rows: list[np.ndarray]
    actor_rows: list[np.ndarray]

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        return self._get_samples(self.critic_rows.pop(0), env)

    def sample_improved(self, batch_size: int, env: Any = None) -> ImprovedSamples:
        rows = self.actor_rows.pop(0)
        envs = np.zeros_like(rows)
        arrays = (self.observations, self.actions, self.improved_actions)
        observations, actions, improved_actions = (self.to_torch(array[rows, envs]) for array in arrays)
        return ImprovedSamples(observations, actions, improved_actions, rows, envs)


def make_agent(obs_dim: int, action_dim: int, n_envs: int = 1, **kwargs: Any) -> DIPO:
    """An agent, ready for ``train()`` once its replay buffer is filled."""
    env = make_vec_env(lambda: RandomEnv(obs_dim, action_dim), n_envs=n_envs)
    agent = DIPO("MlpPolicy", env, **{"buffer_size": 64 * n_envs, "device": "cpu", **kwargs})
    agent.set_logger(configure(None, []))
    return agent


def fill(agent: DIPO, observations: Any, actions: Any, rewards: Any, next_observations: Any, terminals: Any) -> None:
    """Add transitions, all arrays (rows, n_envs, ...)."""
    assert agent.replay_buffer is not None
    for obs, action, reward, next_obs, terminal in zip(
        observations, actions, rewards, next_observations, terminals, strict=True
    ):
        agent.replay_buffer.add(obs, next_obs, action, reward, terminal, [{} for _ in range(agent.n_envs)])


def give_noise(
    agent: DIPO,
    of_sample: Sequence[dict[str, th.Tensor]],
    of_loss: Sequence[dict[str, th.Tensor]],
    of_start: Sequence[dict[str, th.Tensor]] = (),
) -> None:
    """
    Give the target policy, the actor's loss, and the policy where the climb begins, their draws: one dict of arguments for
    each update.
    """
    loss = agent.actor.loss
    losses = iter(of_loss)

    def given(sample: Any, arguments: Iterator[dict[str, Any]]) -> Any:
        return lambda features, sampler: sample(features, **{"sampler": sampler, **next(arguments)})

    def given_loss(features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return loss(features, actions, **next(losses))

    agent.actor_target.sample = given(agent.actor_target.sample, iter(of_sample))  # type: ignore[method-assign]
    agent.actor.sample = given(agent.actor.sample, iter(of_start))  # type: ignore[method-assign]
    agent.actor.loss = given_loss  # type: ignore[method-assign, assignment]


def networks(agent: DIPO) -> dict[str, list[th.nn.Parameter]]:
    """The parameters of each network: weight and bias, layer by layer, in the order of the golden files."""
    names = ("actor", "actor_target", "critic", "critic_target")
    return {name: list(getattr(agent, name).parameters()) for name in names}


@th.no_grad()
def set_weights(parameters: Sequence[th.nn.Parameter], weights: Sequence[Any]) -> None:
    """Copy weights, in order."""
    for parameter, weight in zip(parameters, weights, strict=True):
        weight = th.as_tensor(weight)
        assert parameter.shape == weight.shape
        parameter.copy_(weight)


def displacement_error(parameters: Sequence[th.Tensor], start: Sequence[Any], expected: Sequence[Any]) -> float:
    """||(w - w0) - (w_ref - w0)|| / ||w_ref - w0|| of a whole network."""

    def flat(tensors: Sequence[Any]) -> th.Tensor:
        return th.cat([th.as_tensor(tensor).detach().double().flatten() for tensor in tensors])

    return float((flat(parameters) - flat(expected)).norm() / (flat(expected) - flat(start)).norm())


@contextlib.contextmanager
def noise_predictions(network: Any) -> Iterator[list[int]]:
    """Batch sizes of the calls of a NoisePredictionNetwork; its hook makes fast paths step aside, and call the module."""
    calls: list[int] = []
    hook = network.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    try:
        yield calls
    finally:
        hook.remove()


def normal_numbers(seed: int) -> Make:
    generator = th.Generator("cpu").manual_seed(seed)
    return lambda *shape: th.randn(shape, generator=generator, device="cpu")


def make_net(normal: Make, inputs: int, widths: list[int], outputs: int, norm: bool) -> nn.Sequential:
    """An MLP of Mish with drawn weights of about unit gain, biases and, where there are, norms."""
    modules: list[nn.Module] = []
    for before, width in itertools.pairwise([inputs, *widths]):
        modules += [nn.Linear(before, width), *([nn.LayerNorm(width)] if norm else []), nn.Mish()]
    net = nn.Sequential(*modules, nn.Linear(widths[-1], outputs))
    for parameter in net.parameters():
        parameter.data = normal(*parameter.shape) / (parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 2)
    return net
