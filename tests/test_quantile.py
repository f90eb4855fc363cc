"""Quantile critics: closed forms, and what they share with TQC's."""

from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import fill, make_agent
from sb3_contrib.common.utils import quantile_huber_loss

from sb3_dipo import QuantileCritic, improve_actions

MODES = ("off", "auto", "compile")


def agent_with(accelerate: str = "off", n_envs: int = 1, **options: Any) -> Any:
    kwargs = dict(critic="quantile", net_arch=[32, 32], num_train_timesteps=3, **options)
    return make_agent(3, 2, n_envs, accelerate=accelerate, policy_kwargs=kwargs)


def batch(rows: int = 40, seed: int = 0) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    return th.randn((rows, 3), generator=generator), 2 * th.rand((rows, 2), generator=generator) - 1


def test_defaults_and_shapes_are_tqcs() -> None:
    critic = agent_with().critic
    assert isinstance(critic, QuantileCritic)
    observations, actions = batch()
    assert critic(observations, actions).shape == (40, 2, 25)
    assert critic.next_value(observations, actions).shape == (40, 46)
    assert critic.objective(observations)(actions).shape == (40, 1)


@pytest.mark.parametrize("dropped", [0, 1, 4])
def test_targets_are_the_sorted_mixture_without_the_largest(dropped: int) -> None:
    critic = agent_with(n_critics=3, n_quantiles=5, top_quantiles_to_drop_per_net=dropped).critic
    observations, actions = batch()
    with th.no_grad():
        everything = np.sort(critic(observations, actions).numpy().reshape(40, 15), axis=1)
    values = critic.next_value(observations, actions)
    assert not values.requires_grad
    np.testing.assert_array_equal(values.numpy(), everything[:, : 15 - 3 * dropped])


def test_loss_is_sb3_contribs() -> None:
    critic = agent_with().critic
    observations, actions = batch()
    targets = th.randn((40, 46), generator=th.Generator().manual_seed(1))
    expected = quantile_huber_loss(critic(observations, actions), targets.unsqueeze(1), sum_over_quantiles=False)
    assert critic.loss(observations, actions, targets).item() == expected.item()
    assert float(critic.q_value) == pytest.approx(critic(observations, actions).mean().item())


def test_regression_finds_the_quantiles_of_a_known_distribution() -> None:
    """Of targets that are uniform on [0, 10], p (9.5 - q) = (1 - p) (q - 0.5) is where the Huber loss is smallest."""
    critic = agent_with(n_critics=1, n_quantiles=5).critic
    observations, actions = th.zeros(512, 3), th.zeros(512, 2)
    optimizer = th.optim.Adam(critic.parameters(), 1e-2)
    generator = th.Generator().manual_seed(0)
    for step in range(600):
        if step == 450:
            optimizer.param_groups[0]["lr"] = 1e-3
        loss = critic.loss(observations, actions, 10 * th.rand((512, 1), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with th.no_grad():
        found = critic(observations[:1], actions[:1]).flatten()
    th.testing.assert_close(found, th.tensor([1.4, 3.2, 5.0, 6.8, 8.6]), rtol=0, atol=0.2)


@pytest.mark.parametrize("accelerate", MODES)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_objective_is_the_mean_of_all_quantiles(accelerate: str, layer_norm: bool) -> None:
    critic = agent_with(accelerate, layer_norm=layer_norm).critic
    observations, actions = batch()
    climbed = actions.clone().requires_grad_()
    expected = critic(observations, climbed).mean(dim=(1, 2)).unsqueeze(1)
    (gradient,) = th.autograd.grad(expected.sum(), climbed)
    objective = critic.objective(observations)
    with th.no_grad():
        th.testing.assert_close(objective(actions), expected, rtol=1e-5, atol=1e-6)
    (found,) = th.autograd.grad(objective(climbed).sum(), climbed)
    th.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)
    plain = improve_actions(lambda a: critic(observations, a).mean(dim=(1, 2)).unsqueeze(1), actions, 0.1, 5)
    th.testing.assert_close(improve_actions(objective, actions, 0.1, 5), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("accelerate", MODES)
def test_layer_norm_stands_before_each_activation(accelerate: str) -> None:
    for kind in ("ensemble", "quantile"):
        options = dict(critic=kind, layer_norm=True, net_arch=[32, 32], num_train_timesteps=3)
        agent: Any = make_agent(3, 2, accelerate=accelerate, policy_kwargs=options)
        kinds = [type(module) for module in agent.critic.q_networks[0]]
        assert kinds == [*[th.nn.Linear, th.nn.LayerNorm, th.nn.Mish] * 2, th.nn.Linear]
        assert not any(isinstance(module, th.nn.LayerNorm) for module in agent.actor.modules())
        observations, actions = batch()
        gradients = []
        for plain in (False, True):
            agent.policy.set_accelerate("off" if plain else accelerate)
            agent.critic.zero_grad()
            values = agent.critic(observations, actions)
            th.as_tensor(values if kind == "quantile" else th.cat(values, dim=1)).square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in agent.critic.parameters()])
        for fast, expected in zip(*gradients, strict=True):
            assert expected.abs().max() > 0
            th.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accelerate", ["auto", "compile"])
def test_fifty_updates_equal_the_plain_path(accelerate: str) -> None:
    agents = []
    for mode in ("off", accelerate):
        th.manual_seed(0)
        kwargs = dict(critic="quantile", layer_norm=True, actor="flow", net_arch=[256, 256], num_candidates=2)
        agent = make_agent(5, 2, accelerate=mode, policy_kwargs=kwargs, action_gradient_steps=3)
        generator = np.random.default_rng(0)
        fill(
            agent,
            observations=generator.normal(size=(64, 1, 5)).astype(np.float32),
            actions=generator.uniform(-1, 1, size=(64, 1, 2)).astype(np.float32),
            rewards=generator.normal(size=(64, 1)).astype(np.float32),
            next_observations=generator.normal(size=(64, 1, 5)).astype(np.float32),
            terminals=np.zeros((64, 1), np.float32),
        )
        start = [parameter.detach().clone() for parameter in agent.policy.parameters()]
        th.manual_seed(1)
        np.random.seed(1)
        agent.train(50, 32)
        agents.append(agent)
    plain, fast = ([parameter.detach() for parameter in agent.policy.parameters()] for agent in agents)
    moved = sum(float((now - then).square().sum()) for now, then in zip(plain, start, strict=True))
    apart = sum(float((now - other).square().sum()) for now, other in zip(plain, fast, strict=True))
    assert moved > 0.1 and apart < 1e-4 * moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(critic="quantile", n_quantiles=0), "`n_quantiles` must be a whole number of at least 1"),
        (dict(critic="quantile", n_critics=0), "`n_critics` must be a whole number of at least 1"),
        (dict(critic="quantile", top_quantiles_to_drop_per_net=25), "`top_quantiles_to_drop_per_net` must be less than"),
        (dict(critic="quantile", layer_norm=1), "`layer_norm` must be True or False"),
        (dict(n_quantiles=5), "`n_quantiles` is an option of `critic='quantile'`"),
        (dict(critic="other"), "`critic` must be one of 'ensemble', 'quantile'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(3, 2, policy_kwargs=options)
