"""The networks against naive formulas: Mish, timestep embedding, initialisation, what is computed once for a whole loop."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch as th
from fast_and_plain import KernelMish
from gymnasium import spaces
from helpers import MODES
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F

from sb3_dipo import DIPOPolicy, EnsembleCritic
from sb3_dipo.actors import DiffusionActor
from sb3_dipo.diffusion import SOLVERS, make_schedule, sample, time_grid
from sb3_dipo.networks import NoisePredictionNetwork, init_weights, make_mlp, timestep_embedding

# -50 to 50, where exp over- and underflows in float32, where Mish switches to x, and beyond
MISH_INPUTS = th.cat(
    [
        th.linspace(-50, 50, 10_001),
        th.tensor(
            [0.0, -0.0, 1e-40, -1e-40, 1e-3, -1e-3, 19.999, 20.0, 20.001, 44.3, 44.5, 88.7, 88.8, -87.3, -103.9, -104.1]
        ),
        th.tensor([1e3, -1e3, 1e10, -1e10, 1e20, -1e20]),
    ]
)


def draw(seed: int, *shape: int) -> th.Tensor:
    """Standard normal, without touching the global generator."""
    return th.randn(shape, generator=th.Generator().manual_seed(seed))


def randomise(module: nn.Module) -> None:
    """All parameters drawn, biases too: at their initial zeros a forgotten bias would not show."""
    generator = th.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)


# Mish, as it is computed fast


class MishFunctions(NamedTuple):
    """Mish, and its gradient from that at its output and its input."""

    mish: Callable[[th.Tensor], th.Tensor]
    mish_backward: Callable[[th.Tensor, th.Tensor], th.Tensor]


@pytest.fixture(params=["operators", "compile"])
def fast(request: pytest.FixtureRequest) -> MishFunctions:
    ops: Any = pytest.importorskip("sb3_dipo.fast.ops", exc_type=ImportError)
    kernels: Any = ops if request.param == "operators" else KernelMish()
    return MishFunctions(kernels.mish, kernels.mish_backward)


def assert_close_for_mish(result: th.Tensor, expected: th.Tensor, x: th.Tensor) -> None:
    """Equal up to float32 rounding of x, of which a layer's output is a sum: 2^-22 |x|."""
    error = (result.double() - expected.double()).abs()
    assert bool((error <= 2**-21 * x.double().abs() + 1e-44).all())


def test_mish_equals_pytorchs(fast: MishFunctions) -> None:
    result = fast.mish(MISH_INPUTS)
    assert result.dtype == th.float32
    assert bool(result.isfinite().all())
    assert_close_for_mish(result, F.mish(MISH_INPUTS), MISH_INPUTS)
    assert_close_for_mish(result, F.mish(MISH_INPUTS.double()), MISH_INPUTS)


def test_mish_is_its_definition(fast: MishFunctions) -> None:
    """x tanh(log(1 + e^x)), without PyTorch."""
    x = th.linspace(-30, 30, 61)
    expected = [value * math.tanh(math.log1p(math.exp(value))) for value in x.tolist()]
    assert_close_for_mish(fast.mish(x), th.tensor(expected), x)


def test_gradient_of_mish_equals_pytorchs(fast: MishFunctions) -> None:
    """And is multiplied by the incoming gradient, whatever its sign and size."""
    incoming = draw(0, len(MISH_INPUTS))
    reference = MISH_INPUTS.double().requires_grad_()
    (expected,) = th.autograd.grad(F.mish(reference), reference, incoming.double())
    th.testing.assert_close(fast.mish_backward(incoming, MISH_INPUTS).double(), expected, rtol=1e-6, atol=2e-6)


def test_gradient_of_mish_is_its_slope(fast: MishFunctions) -> None:
    """Against central differences of the definition, in float64."""
    x = th.linspace(-12, 25, 149)
    gradient = fast.mish_backward(th.ones_like(x), x)
    step = 1e-5
    for value, slope in zip(x.tolist(), gradient.tolist(), strict=True):
        above, below = (z * math.tanh(math.log1p(math.exp(z))) for z in (value + step, value - step))
        assert slope == pytest.approx((above - below) / (2 * step), abs=2e-6)


def test_mish_takes_views_and_leaves_its_arguments_alone(fast: MishFunctions) -> None:
    x, incoming = 30 * draw(0, 7, 5), draw(1, 5, 7)
    copies = x.clone(), incoming.clone()
    th.testing.assert_close(fast.mish(x.t()), fast.mish(x).t(), rtol=1e-6, atol=0)
    transposed = fast.mish_backward(incoming.t(), x)
    th.testing.assert_close(fast.mish_backward(incoming, x.t()), transposed.t(), rtol=1e-6, atol=1e-7)
    assert th.equal(x, copies[0])
    assert th.equal(incoming, copies[1])


# Initialisation


def assert_initialised(layer: nn.Linear, spread: bool = True) -> None:
    """
    Weights ~ N(0, std^2) truncated at 2 std with std = 1 / (2 sqrt(fan_in)), biases zero. Truncated so, the standard
    deviation is 0.8796 std, and 0.7152 of the weights lie within one std: PyTorch's own uniform weights, which also end at
    2 std, have 1.1547 and 0.5.
    """
    std = 1 / (2 * math.sqrt(layer.in_features))
    weights = layer.weight.detach() / std
    assert float(weights.abs().max()) <= 2 + 1e-5
    assert not bool(layer.bias.any())
    if spread:
        assert float(weights.abs().max()) > 1.9
        assert float(weights.mean()) == pytest.approx(0, abs=0.05)
        assert float(weights.std()) == pytest.approx(0.8796, rel=0.03)
        assert float((weights.abs() < 1).float().mean()) == pytest.approx(0.7152, abs=0.02)


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("in_features", [16, 100, 1000])
def test_weights_are_truncated_normal_and_biases_zero(in_features: int) -> None:
    th.manual_seed(0)
    layer = nn.Linear(in_features, 1000)
    layer.apply(init_weights)
    assert_initialised(layer)


def test_init_weights_takes_layers_without_bias_and_leaves_others_alone() -> None:
    th.manual_seed(0)
    layer, convolution = nn.Linear(100, 200, bias=False), nn.Conv2d(1, 2, 3)
    before = {name: parameter.clone() for name, parameter in convolution.named_parameters()}
    nn.Sequential(layer, convolution, nn.Mish()).apply(init_weights)
    assert float(layer.weight.detach().std()) == pytest.approx(0.8796 / 20, rel=0.03)
    assert all(th.equal(parameter, before[name]) for name, parameter in convolution.named_parameters())


def test_all_layers_of_the_networks_are_initialised() -> None:
    th.manual_seed(0)
    network = NoisePredictionNetwork(3, 11, [200, 200], nn.Mish, 32)
    critic = make_critic(3, 11, [200, 200], nn.Mish)
    assert len(linear_layers(network)) == 2 + 3
    q_networks = nn.ModuleList(critic.q_networks)
    assert len(linear_layers(q_networks)) == 2 * 3
    for layer in [*linear_layers(network), *linear_layers(q_networks)]:
        assert_initialised(layer, spread=layer.weight.numel() >= 6_000)


def test_make_mlp_has_the_given_layers() -> None:
    def shapes(net_arch: list[int], output_dim: int) -> list[tuple[int, ...]]:
        return [tuple(layer.weight.shape) for layer in linear_layers(make_mlp(5, output_dim, net_arch, nn.Mish))]

    assert shapes([8, 7], 3) == [(8, 5), (7, 8), (3, 7)]
    assert shapes([], 3) == [(3, 5)]
    assert shapes([8], -1) == [(8, 5)]
    assert [type(module) for module in make_mlp(5, 3, [8], nn.Tanh)] == [nn.Linear, nn.Tanh, nn.Linear]


# Noise-prediction network


@pytest.mark.parametrize("dim", [4, 6, 32])
def test_timestep_embedding_is_sines_then_cosines(dim: int) -> None:
    """Frequencies exp(-log(10000) i / (dim/2 - 1)), k counted from 0."""
    timesteps = [0, 1, 2, 50, 99, 99]
    half = dim // 2
    angles = [[k * math.exp(-math.log(10000) * i / (half - 1)) for i in range(half)] for k in timesteps]
    expected = [[math.sin(angle) for angle in row] + [math.cos(angle) for angle in row] for row in angles]
    embedding = timestep_embedding(th.tensor(timesteps), dim)
    assert embedding.dtype == th.float32
    th.testing.assert_close(embedding, th.tensor(expected), rtol=0, atol=2e-5)


def test_noise_prediction_network_is_an_mlp_on_action_embedding_and_features() -> None:
    """Written out, weights by name: [noisy action, Linear-activation-Linear of the embedding, features], one hidden layer."""
    network = NoisePredictionNetwork(2, 3, [6], nn.Tanh, 4)
    randomise(network)
    noisy_actions, timesteps, features = draw(1, 5, 2), th.tensor([0, 9, 3, 3, 1]), draw(2, 5, 3)
    weights = dict(network.named_parameters())
    time = timestep_embedding(timesteps, 4) @ weights["time_mlp.0.weight"].t() + weights["time_mlp.0.bias"]
    time = time.tanh() @ weights["time_mlp.2.weight"].t() + weights["time_mlp.2.bias"]
    hidden = th.cat([noisy_actions, time, features], dim=1) @ weights["layers.0.weight"].t() + weights["layers.0.bias"]
    expected = hidden.tanh() @ weights["layers.2.weight"].t() + weights["layers.2.bias"]
    assert len(weights) == 8
    assert weights["time_mlp.0.weight"].shape == (6, 4)
    th.testing.assert_close(network(noisy_actions, timesteps, features), expected)


ARCHITECTURES = [[], [8], [8, 5], [16, 16, 16]]


def make_policy(
    accelerate: str, action_dim: int, features_dim: int, net_arch: list[int], activation_fn: type[nn.Module], **options: Any
) -> DIPOPolicy:
    """On observations of 4 numbers."""
    policy = DIPOPolicy(
        spaces.Box(-1, 1, (4,)),
        spaces.Box(-1, 1, (action_dim,)),
        lambda _: 1e-3,
        net_arch,
        activation_fn,
        features_extractor_class=LearnedExtractor,
        features_extractor_kwargs={"features_dim": features_dim},
        **options,
    )
    randomise(policy)
    policy.set_accelerate(accelerate)
    return policy


@pytest.mark.parametrize("accelerate", MODES)
@given(
    action_dim=st.integers(1, 5),
    features_dim=st.integers(1, 7),
    net_arch=st.sampled_from(ARCHITECTURES),
    time_embed_dim=st.sampled_from([4, 6, 32]),
    batch_size=st.integers(1, 6) | st.integers(15, 40),
    num_inference_steps=st.integers(1, 9),
    solver=st.sampled_from(["ddpm", "ddim", "dpmpp_2m"]),
    activation_fn=st.sampled_from([nn.Mish, nn.ReLU]),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_samples_come_from_the_network_as_it_is_trained(
    accelerate: str,
    action_dim: int,
    features_dim: int,
    net_arch: list[int],
    time_embed_dim: int,
    batch_size: int,
    num_inference_steps: int,
    solver: str,
    activation_fn: type[nn.Module],
) -> None:
    """However the reverse process is computed, it is the loop on eps(a_k, s, k), with gradients and without."""
    options = {"num_train_timesteps": 9, "beta_schedule": "linear", "time_embed_dim": time_embed_dim, "solver": solver}
    options["num_inference_steps"] = num_inference_steps
    policy = make_policy(accelerate, action_dim, features_dim, net_arch, activation_fn, **options)
    actor = policy.actor
    assert isinstance(actor, DiffusionActor)
    features, initial_noise = draw(1, batch_size, features_dim), 0.5 * draw(2, batch_size, action_dim)
    noise = draw(3, num_inference_steps, batch_size, action_dim)
    grid = time_grid(9, num_inference_steps)
    table = SOLVERS[solver](make_schedule("linear", 9), grid, 0.0)

    def predict_noise(x: th.Tensor, step: int) -> th.Tensor:
        return actor.noise_network(x, th.full((batch_size,), grid[step]), features)

    for drawn in (noise, None) if table.stochastic else (None,):
        with th.no_grad():
            expected = sample(table, predict_noise, initial_noise, drawn)
        scale = {} if drawn is not None or not table.stochastic else {"sampler": replace(actor.sampler, noise_scale=0.0)}
        for gradients in (False, True):
            with th.set_grad_enabled(gradients):
                result = actor.sample(features, initial_noise, drawn, **scale)
            assert result.shape == (batch_size, action_dim)
            assert result.requires_grad == gradients
            th.testing.assert_close(result.detach(), expected, rtol=0, atol=2e-5)


# Critics


class LearnedExtractor(BaseFeaturesExtractor):
    """Features with parameters, so that it shows where their gradient goes."""

    def __init__(self, observation_space: spaces.Box, features_dim: int):
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(observation_space.shape[0], features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations).tanh()


def make_critic(
    action_dim: int,
    features_dim: int,
    net_arch: list[int],
    activation_fn: type[nn.Module],
    n_critics: int = 2,
) -> EnsembleCritic:
    """On observations of 4 numbers."""
    observation_space = spaces.Box(-1, 1, (4,))
    return EnsembleCritic(
        observation_space,
        spaces.Box(-1, 1, (action_dim,)),
        net_arch,
        activation_fn,
        LearnedExtractor(observation_space, features_dim),
        features_dim,
        n_critics=n_critics,
    )


@pytest.mark.parametrize("accelerate", MODES)
@given(
    action_dim=st.integers(1, 5),
    features_dim=st.integers(1, 7),
    net_arch=st.sampled_from(ARCHITECTURES),
    batch_size=st.integers(1, 6) | st.integers(15, 40),
    n_critics=st.integers(1, 3),
    activation_fn=st.sampled_from([nn.Mish, nn.ReLU]),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_objective_and_next_value_are_the_smallest_of_the_critics(
    accelerate: str,
    action_dim: int,
    features_dim: int,
    net_arch: list[int],
    batch_size: int,
    n_critics: int,
    activation_fn: type[nn.Module],
) -> None:
    """Values and the actions' gradient, at several actions for the same states."""
    options = {"n_critics": n_critics, "num_train_timesteps": 2}
    critic = make_policy(accelerate, action_dim, features_dim, net_arch, activation_fn, **options).critic
    observations = draw(1, batch_size, 4)
    objective: Any = critic.objective(observations)
    for seed in (2, 3):
        actions = draw(seed, batch_size, action_dim).requires_grad_()
        expected = th.cat(critic(observations, actions), dim=1).min(dim=1, keepdim=True)[0]
        result, next_value = objective(actions), critic.next_value(observations, actions)
        assert result.shape == next_value.shape == (batch_size, 1)
        assert result.requires_grad and not next_value.requires_grad
        for value in (result, next_value, objective(actions.detach())):
            th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        gradient, expected_gradient = (th.autograd.grad(output.sum(), actions)[0] for output in (result, expected))
        th.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
        if hasattr(objective, "gradient"):  # what the action gradient takes where it is there
            own = objective.gradient(actions.detach())
            assert not own.requires_grad
            th.testing.assert_close(own, expected_gradient, rtol=1e-4, atol=1e-5)


def test_next_value_is_the_smallest_of_the_critics_row_by_row() -> None:
    """Each written out, weights by SB3's names."""
    critic = make_critic(2, 3, [6], nn.Tanh, n_critics=3)
    randomise(critic)
    observations, actions = draw(1, 40, 4), draw(2, 40, 2)
    weights = critic.state_dict()
    features = (
        observations @ weights["features_extractor.linear.weight"].t() + weights["features_extractor.linear.bias"]
    ).tanh()
    q_values = []
    for name in ("qf0", "qf1", "qf2"):
        hidden = th.cat([features, actions], dim=1) @ weights[f"{name}.0.weight"].t() + weights[f"{name}.0.bias"]
        q_values.append(hidden.tanh() @ weights[f"{name}.2.weight"].t() + weights[f"{name}.2.bias"])
    smallest, which = th.cat(q_values, dim=1).min(dim=1, keepdim=True)
    assert set(which.flatten().tolist()) == {0, 1, 2}
    th.testing.assert_close(critic.next_value(observations, actions), smallest)
    th.testing.assert_close(critic.objective(observations)(actions), smallest)


@pytest.mark.parametrize("accelerate", MODES)
@pytest.mark.parametrize("batch_size", [5, 40])
def test_objectives_features_take_no_gradient(batch_size: int, accelerate: str) -> None:
    """They are computed once, so that a second backward pass must not meet them; all other gradients are right."""
    critic = make_policy(accelerate, 2, 3, [6], nn.Mish, num_train_timesteps=2).critic
    observations, actions = draw(1, batch_size, 4), draw(2, batch_size, 2).requires_grad_()
    objective = critic.objective(observations)
    for _ in range(2):
        (gradient,) = th.autograd.grad(objective(actions).sum(), actions)
        assert bool(gradient.any())
    assert all(parameter.grad is None for parameter in critic.parameters())
    objective(actions).sum().backward()
    given = {name: parameter.grad for name, parameter in critic.named_parameters()}
    critic.zero_grad(set_to_none=True)
    with th.no_grad():
        features = critic.extract_features(observations, critic.features_extractor)
    q_values = [critic.get_submodule(f"qf{i}")(th.cat([features, actions], dim=1)) for i in range(2)]
    th.cat(q_values, dim=1).min(dim=1)[0].sum().backward()
    for name, parameter in critic.named_parameters():
        th.testing.assert_close(given[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert (given[name] is None) == name.startswith("features_extractor")


@pytest.mark.parametrize("n_critics", [1, 3])
def test_critics_loss_is_the_sum_of_each_ones_mean_squared_error(n_critics: int) -> None:
    critic = make_critic(2, 3, [6], nn.Mish, n_critics)
    randomise(critic)
    observations, actions, targets = draw(1, 5, 4), draw(2, 5, 2), draw(3, 5, 1)
    q_values = [q_value.detach() for q_value in critic(observations, actions)]
    assert len(q_values) == n_critics and all(each.shape == (5, 1) for each in q_values)
    expected = sum((float(q) - float(y)) ** 2 for each in q_values for q, y in zip(each, targets, strict=True)) / 5
    assert critic.loss(observations, actions, targets).item() == pytest.approx(expected, rel=1e-5)
    assert float(critic.q_value) == pytest.approx(float(th.cat(q_values).mean()), rel=1e-5)
    assert not critic.q_value.requires_grad


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_critics_loss_trains_the_features_extractor_even_if_it_is_shared(share_features_extractor: bool) -> None:
    options = {"share_features_extractor": share_features_extractor, "num_train_timesteps": 2}
    policy = make_policy("off", 2, 3, [6], nn.Mish, **options)
    assert (policy.actor.features_extractor is policy.critic.features_extractor) == share_features_extractor
    policy.critic.loss(draw(1, 5, 4), draw(2, 5, 2), draw(3, 5, 1)).backward()
    for parameter in policy.critic.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
