"""The action gradient against PyTorch's Adam and against closed forms."""

import copy
import math
from collections.abc import Callable

import pytest
import torch as th
from envs import small_dipo

from sb3_dipo import EnsembleCritic, improve_actions

QFunction = Callable[[th.Tensor], th.Tensor]


def naive_improve(q_fn: QFunction, actions: th.Tensor, lr: float, steps: int, ratio: float) -> th.Tensor:
    """As in the authors' code: Adam on the actions, clip_grad_norm_, clamp."""
    actions = actions.clone().requires_grad_()
    optimizer = th.optim.Adam([actions], lr=lr, eps=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        (-q_fn(actions)).sum().backward()
        th.nn.utils.clip_grad_norm_([actions], ratio * actions.shape[1])
        optimizer.step()
        with th.no_grad():
            actions.clamp_(-1, 1)
    return actions.detach()


def quadratic(optimum: th.Tensor, curvature: float = 1.0) -> QFunction:
    return lambda actions: -0.5 * curvature * ((actions - optimum) ** 2).sum(dim=1, keepdim=True)


def random_actions(batch_size: int = 16, action_dim: int = 3, seed: int = 0) -> th.Tensor:
    return th.rand((batch_size, action_dim), generator=th.Generator().manual_seed(seed)) * 2 - 1


def smallest_q(critic: EnsembleCritic, observations: th.Tensor) -> QFunction:
    """min_i Q_i(s, .) by autograd alone."""
    return lambda actions: th.cat(critic(observations, actions), dim=1).min(dim=1, keepdim=True)[0]


@pytest.fixture(params=["off", "auto", "compile"])
def critic(request: pytest.FixtureRequest) -> EnsembleCritic:
    # two dimensions of action, three of observation
    critic = small_dipo(seed=3, accelerate=request.param).critic
    assert isinstance(critic, EnsembleCritic)
    return critic


@pytest.fixture
def observations() -> th.Tensor:
    return random_actions(16, 3, seed=1)


@pytest.mark.parametrize("ratio", [0.01, 0.3, math.inf])
@pytest.mark.parametrize("lr, steps", [(0.03, 1), (0.03, 20), (0.2, 7)])
def test_equals_torch_adam_on_a_quadratic(lr: float, steps: int, ratio: float) -> None:
    optimum = 1.5 * random_actions(seed=2)
    expected = naive_improve(quadratic(optimum, 3.0), random_actions(), lr, steps, ratio)
    th.testing.assert_close(
        improve_actions(quadratic(optimum, 3.0), random_actions(), lr, steps, ratio), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("ratio", [1e-4, 0.1, math.inf])
def test_equals_torch_adam_on_a_critic(critic: EnsembleCritic, observations: th.Tensor, ratio: float) -> None:
    reference, actions = copy.deepcopy(critic), random_actions(16, 2)
    expected = naive_improve(smallest_q(reference, observations), actions, 0.03, 20, ratio)
    improved = improve_actions(critic.objective(observations), actions, 0.03, 20, ratio)
    th.testing.assert_close(improved, expected, rtol=0, atol=5e-6)
    assert (improved - actions).abs().max() > 0.1


def test_climbs_the_minimum_of_the_critics(critic: EnsembleCritic, observations: th.Tensor) -> None:
    actions = random_actions(16, 2)
    improved = improve_actions(critic.objective(observations), actions, action_gradient_steps=5)
    with th.no_grad():
        before, after = critic.next_value(observations, actions), critic.next_value(observations, improved)
        th.testing.assert_close(smallest_q(critic, observations)(actions), before, rtol=1e-5, atol=1e-6)
        th.testing.assert_close(critic.objective(observations)(actions), before, rtol=1e-5, atol=1e-6)
    assert (after > before).all()


def test_first_step_is_the_learning_rate_in_the_direction_of_the_sign() -> None:
    actions = 0.9 * random_actions()
    optimum = random_actions(seed=5)
    gradient = 2.0 * (optimum - actions)
    moved = improve_actions(quadratic(optimum, 2.0), actions, 0.03, 1, math.inf) - actions
    th.testing.assert_close(moved, 0.03 * gradient.sign(), rtol=0, atol=3e-4)
    th.testing.assert_close(moved, 0.03 * gradient / (gradient.abs() + 1e-5), rtol=0, atol=1e-7)


def test_converges_to_the_optimum_within_the_box() -> None:
    optimum = 2.5 * random_actions(seed=6)
    assert (optimum.abs() > 1).any() and (optimum.abs() < 1).any()
    improved = improve_actions(quadratic(optimum), random_actions(), 0.02, 800, 0.3)
    th.testing.assert_close(improved, optimum.clamp(-1, 1), rtol=0, atol=0.01)


def test_norm_is_clipped_over_the_whole_batch() -> None:
    # Adam divides by the gradient, so the clip shows where gradients are as small as its eps
    actions, optimum, ratio, eps = th.zeros(4, 3), random_actions(4, seed=7), 1e-5, 1e-5
    optimum[0] *= 10
    gradient = optimum

    def first_step(norm: th.Tensor) -> th.Tensor:
        clipped = gradient * (ratio * 3 / norm)
        return 0.03 * clipped / (clipped.abs() + eps)

    improved = improve_actions(quadratic(optimum), actions, 0.03, 1, ratio)
    th.testing.assert_close(improved, first_step(gradient.norm()), rtol=1e-4, atol=1e-7)
    assert (improved - first_step(gradient.norm(dim=1, keepdim=True))).abs().max() > 1e-3  # not row by row
    unclipped = improve_actions(quadratic(optimum), actions, 0.03, 1, math.inf)
    th.testing.assert_close(unclipped, 0.03 * gradient / (gradient.abs() + eps), rtol=0, atol=1e-7)
    # a clip that does not bind changes nothing
    loose = 1.01 * float(gradient.norm()) / 3
    assert th.equal(
        improve_actions(quadratic(optimum), actions, 0.03, 5, loose),
        improve_actions(quadratic(optimum), actions, 0.03, 5, math.inf),
    )


def test_gradients_of_the_critic_are_left_alone(critic: EnsembleCritic, observations: th.Tensor) -> None:
    actions = random_actions(16, 2)
    improve_actions(smallest_q(critic, observations), actions)
    improve_actions(critic.objective(observations), actions)
    assert all(parameter.grad is None for parameter in critic.parameters())

    for parameter in critic.parameters():
        parameter.grad = th.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in critic.parameters() if parameter.grad is not None]
    improve_actions(smallest_q(critic, observations), actions)
    improve_actions(critic.objective(observations), actions)
    after = [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]
    assert all(th.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.requires_grad for parameter in critic.parameters())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_are_left_alone(requires_grad: bool) -> None:
    actions = random_actions().requires_grad_(requires_grad)
    before = actions.detach().clone()
    improved = improve_actions(quadratic(th.ones(3)), actions)
    assert th.equal(actions.detach(), before) and actions.requires_grad == requires_grad and actions.grad is None
    assert not th.equal(improved, before)
    assert not improved.requires_grad and improved.grad_fn is None


def test_stays_in_the_box() -> None:
    improved = improve_actions(quadratic(th.tensor([5.0, -5.0, 5.0])), random_actions(64), 0.7, 5, math.inf)
    assert improved.min() == -1 and improved.max() == 1


def test_works_where_gradients_are_off() -> None:
    expected = improve_actions(quadratic(th.ones(3)), random_actions())
    with th.no_grad():
        assert th.equal(improve_actions(quadratic(th.ones(3)), random_actions()), expected)
        assert not th.is_grad_enabled()


def test_every_call_starts_afresh() -> None:
    first = improve_actions(quadratic(th.ones(3)), random_actions(), 0.03, 3)
    assert th.equal(improve_actions(quadratic(th.ones(3)), random_actions(), 0.03, 3), first)
