"""The networks against naive formulas: Mish, timestep embedding, initialisation, what is computed once for a whole loop."""

import math

import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F

from sb3_dipo.arithmetic import Mish, mish
from sb3_dipo.networks import CriticEnsemble, NoisePredictionNetwork, init_weights, make_mlp, timestep_embedding

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


# Mish


def assert_close_for_mish(result: th.Tensor, expected: th.Tensor, x: th.Tensor) -> None:
    """Equal up to float32 rounding of x, of which a layer's output is a sum: 2^-22 |x|."""
    error = (result.double() - expected.double()).abs()
    assert bool((error <= 2**-21 * x.double().abs() + 1e-44).all())


def test_mish_equals_pytorchs() -> None:
    result = mish(MISH_INPUTS)
    assert result.dtype == th.float32
    assert bool(result.isfinite().all())
    assert_close_for_mish(result, F.mish(MISH_INPUTS), MISH_INPUTS)
    assert_close_for_mish(result, F.mish(MISH_INPUTS.double()), MISH_INPUTS)


def test_mish_is_its_definition() -> None:
    """x tanh(log(1 + e^x)), without PyTorch."""
    x = th.linspace(-30, 30, 61)
    expected = [value * math.tanh(math.log1p(math.exp(value))) for value in x.tolist()]
    assert_close_for_mish(mish(x), th.tensor(expected), x)


def test_gradient_of_mish_equals_pytorchs() -> None:
    """And is multiplied by the incoming gradient, whatever its sign and size."""
    incoming = draw(0, len(MISH_INPUTS))
    x, reference = MISH_INPUTS.clone().requires_grad_(), MISH_INPUTS.double().requires_grad_()
    (gradient,) = th.autograd.grad(mish(x), x, incoming)
    (expected,) = th.autograd.grad(F.mish(reference), reference, incoming.double())
    th.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=2e-6)


def test_gradient_of_mish_is_its_slope() -> None:
    """Against central differences of the definition, in float64."""
    x = th.linspace(-12, 25, 149, requires_grad=True)
    (gradient,) = th.autograd.grad(mish(x).sum(), x)
    step = 1e-5
    for value, slope in zip(x.tolist(), gradient.tolist(), strict=True):
        above, below = (z * math.tanh(math.log1p(math.exp(z))) for z in (value + step, value - step))
        assert slope == pytest.approx((above - below) / (2 * step), abs=2e-6)


def test_mish_is_the_same_with_and_without_gradient_and_leaves_its_arguments_alone() -> None:
    x, incoming = 30 * draw(0, 7, 5), draw(1, 5, 7)
    copies = x.clone(), incoming.clone()
    view = x.t().requires_grad_()  # not contiguous
    with_gradient = mish(view)
    with_gradient.backward(incoming)
    with th.no_grad():
        assert th.equal(mish(view), with_gradient)
    assert th.equal(Mish()(x), with_gradient.t())
    assert th.equal(x, copies[0])
    assert th.equal(incoming, copies[1])


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
def test_mish_of_other_types_is_pytorchs(dtype: th.dtype) -> None:
    x = th.linspace(-30, 30, 61, dtype=dtype)
    assert th.equal(mish(x), F.mish(x))
    assert mish(x).dtype == dtype


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
    nn.Sequential(layer, convolution, Mish()).apply(init_weights)
    assert float(layer.weight.detach().std()) == pytest.approx(0.8796 / 20, rel=0.03)
    assert all(th.equal(parameter, before[name]) for name, parameter in convolution.named_parameters())


def test_all_layers_of_the_networks_are_initialised() -> None:
    th.manual_seed(0)
    network = NoisePredictionNetwork(3, 11, [200, 200], Mish, 32)
    critic = make_critic(3, 11, [200, 200], Mish)
    assert len(linear_layers(network)) == 2 + 3
    q_networks = nn.ModuleList(critic.q_networks)
    assert len(linear_layers(q_networks)) == 2 * 3
    for layer in [*linear_layers(network), *linear_layers(q_networks)]:
        assert_initialised(layer, spread=layer.weight.numel() >= 6_000)


def test_make_mlp_has_the_given_layers() -> None:
    def shapes(net_arch: list[int], output_dim: int) -> list[tuple[int, ...]]:
        return [tuple(layer.weight.shape) for layer in linear_layers(make_mlp(5, output_dim, net_arch, Mish))]

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


@given(
    action_dim=st.integers(1, 5),
    features_dim=st.integers(1, 7),
    net_arch=st.sampled_from(ARCHITECTURES),
    time_embed_dim=st.sampled_from([4, 6, 32]),
    batch_size=st.integers(1, 6),
    timesteps=st.lists(st.integers(0, 99), min_size=1, max_size=5),
    activation_fn=st.sampled_from([Mish, nn.ReLU]),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_bound_noise_prediction_equals_forward(
    action_dim: int,
    features_dim: int,
    net_arch: list[int],
    time_embed_dim: int,
    batch_size: int,
    timesteps: list[int],
    activation_fn: type[nn.Module],
) -> None:
    """Values and gradients, at every step of the grid; the steps may be taken in any order, any number of times."""
    network = NoisePredictionNetwork(action_dim, features_dim, net_arch, activation_fn, time_embed_dim)
    randomise(network)
    features, incoming = draw(1, batch_size, features_dim), draw(2, batch_size, action_dim)
    predict_noise = network.bind(features, th.tensor(timesteps))
    for step in [*reversed(range(len(timesteps))), 0]:
        x = draw(3 + step, batch_size, action_dim).requires_grad_()
        result, expected = predict_noise(x, step), network(x, th.full((batch_size,), timesteps[step]), features)
        assert result.shape == (batch_size, action_dim)
        th.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        gradient, expected_gradient = (th.autograd.grad(output, x, incoming)[0] for output in (result, expected))
        th.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


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
    share_features_extractor: bool = False,
) -> CriticEnsemble:
    """On observations of 4 numbers."""
    observation_space = spaces.Box(-1, 1, (4,))
    return CriticEnsemble(
        observation_space,
        spaces.Box(-1, 1, (action_dim,)),
        net_arch,
        LearnedExtractor(observation_space, features_dim),
        features_dim,
        activation_fn,
        n_critics=n_critics,
        share_features_extractor=share_features_extractor,
    )


@given(
    action_dim=st.integers(1, 5),
    features_dim=st.integers(1, 7),
    net_arch=st.sampled_from(ARCHITECTURES),
    batch_size=st.integers(1, 6),
    n_critics=st.integers(1, 3),
    activation_fn=st.sampled_from([Mish, nn.ReLU]),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_bound_critics_equal_min_q(
    action_dim: int, features_dim: int, net_arch: list[int], batch_size: int, n_critics: int, activation_fn: type[nn.Module]
) -> None:
    """Values and the actions' gradient, at several actions for the same states."""
    critic = make_critic(action_dim, features_dim, net_arch, activation_fn, n_critics)
    randomise(critic)
    observations = draw(1, batch_size, 4)
    q_fn = critic.bind(observations)
    for seed in (2, 3):
        actions = draw(seed, batch_size, action_dim).requires_grad_()
        result, expected = q_fn(actions), critic.min_q(observations, actions)
        assert result.shape == (batch_size, 1)
        th.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        gradient, expected_gradient = (th.autograd.grad(output.sum(), actions)[0] for output in (result, expected))
        th.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_min_q_is_the_smallest_of_the_critics_row_by_row() -> None:
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
    th.testing.assert_close(critic.min_q(observations, actions), smallest)
    th.testing.assert_close(critic.bind(observations)(actions), smallest)


def test_bound_critics_give_gradient_to_the_actions_but_not_to_what_is_computed_once() -> None:
    critic = make_critic(2, 3, [6], Mish)
    randomise(critic)
    observations, actions = draw(1, 5, 4), draw(2, 5, 2).requires_grad_()
    q_fn = critic.bind(observations)
    (gradient,) = th.autograd.grad(q_fn(actions).sum(), actions)
    assert bool(gradient.any())
    assert all(parameter.grad is None for parameter in critic.parameters())
    q_fn(actions).sum().backward()
    assert all(parameter.grad is None for parameter in critic.features_extractor.parameters())
    assert all(
        parameter.grad is None for name in ("qf0", "qf1") for parameter in critic.get_submodule(f"{name}.0").parameters()
    )


def test_critics_loss_trains_the_features_extractor_even_if_it_is_shared() -> None:
    critic = make_critic(2, 3, [6], Mish, share_features_extractor=True)
    loss = th.stack([q_value.square().mean() for q_value in critic(draw(1, 5, 4), draw(2, 5, 2))]).sum()
    loss.backward()
    for parameter in critic.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
