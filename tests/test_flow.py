"""The flow actor: its solvers against closed forms, its loss, and how it samples."""

from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import make_agent

from sb3_dipo import DIPO, FlowActor, Sampler
from sb3_dipo.diffusion.process import flow_matching_loss, sample
from sb3_dipo.diffusion.solvers import FLOW_SOLVERS, FLOW_TIME, euler

MEAN, STD = 0.2, 0.1


def velocity(x: th.Tensor, t: float) -> th.Tensor:
    """E[a - z | x_t = x] for a ~ N(MEAN, STD^2), z ~ N(0, 1) and x_t = (1 - t) z + t a."""
    variance = (1 - t) ** 2 + t**2 * STD**2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def solve(solver: str, steps: int, noise: th.Tensor, clip: bool = False) -> th.Tensor:
    table = FLOW_SOLVERS[solver](steps)
    times = [float(timestep) / FLOW_TIME for timestep in table.timesteps]
    return sample(table, lambda x, step: velocity(x, times[step]), noise, None, clip)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_order_of_the_solvers_on_a_gaussian(solver: str, order: int) -> None:
    """The flow of a Gaussian takes z to MEAN + STD z. On it the midpoint method does better than its order: it is 3 here."""
    noise = th.linspace(-3, 3, 41, dtype=th.float64).unsqueeze(1)
    exact = MEAN + STD * noise
    steps = [20, 40, 80, 160, 320]
    errors = [float((solve(solver, number, noise) - exact).abs().max()) for number in steps]
    observed = np.polyfit(np.log(steps), -np.log(errors), 1)[0]
    assert order - 0.1 < observed < order + 1.1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_euler_is_eulers_method(steps: int) -> None:
    noise = th.randn(50, 3, dtype=th.float64, generator=th.Generator().manual_seed(0))
    x = noise
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
    th.testing.assert_close(solve("euler", steps, noise), x.clamp(-1, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_midpoint_is_the_midpoint_method(steps: int) -> None:
    noise = th.randn(50, 3, dtype=th.float64, generator=th.Generator().manual_seed(0))
    x, dt = noise, 1 / steps
    for i in range(steps):
        middle = x + dt / 2 * velocity(x, i * dt)
        x = x + dt * velocity(middle, (i + 0.5) * dt)
    th.testing.assert_close(solve("midpoint", steps, noise), x.clamp(-1, 1), rtol=0, atol=1e-12)


def test_predicted_clean_actions_are_clipped_on_the_way() -> None:
    noise = th.full((1, 1), 5.0, dtype=th.float64)

    def clean(clip: bool) -> list[float]:
        seen: list[float] = []

        def predict(x: th.Tensor, step: int) -> th.Tensor:
            seen.append(float(x))
            return th.full_like(x, 10.0)  # far beyond the box

        sample(euler(2), predict, noise, None, clip)
        return seen

    assert clean(False) == [5.0, 10.0]  # 5 + 10 / 2
    assert clean(True) == [5.0, 3.0]  # halfway from 5 to 1


def test_loss_is_the_mean_squared_error_of_the_velocity() -> None:
    generator = th.Generator().manual_seed(0)
    actions, noise = th.rand((6, 2), generator=generator), th.randn((6, 2), generator=generator)
    times = th.tensor([0.0, 0.1, 0.5, 0.7, 0.9, 1.0])
    given: list[Any] = []

    def predict(x: th.Tensor, t: th.Tensor) -> th.Tensor:
        given.append((x, t))
        return th.zeros_like(x)

    loss = flow_matching_loss(predict, actions, times, noise)
    assert float(loss) == pytest.approx(float(((actions - noise) ** 2).mean()))
    x, t = given[0]
    th.testing.assert_close(x[0], noise[0])
    th.testing.assert_close(x[-1], actions[-1])
    th.testing.assert_close(x[2], (noise[2] + actions[2]) / 2)
    assert th.equal(t, times)


def test_a_trained_actor_samples_what_it_was_fitted_to() -> None:
    """Two actions at one state: a flow keeps both."""
    agent = make_agent(1, 1, policy_kwargs=dict(actor="flow", num_inference_steps=10, net_arch=[64, 64]))
    actor = agent.actor
    features = th.zeros(256, 1)
    actions = th.where(th.arange(256) % 2 == 0, 0.6, -0.6).unsqueeze(1)
    optimizer = th.optim.Adam(actor.parameters(), 3e-3)
    th.manual_seed(0)
    for _ in range(1_500):
        loss = actor.loss(features, actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with th.no_grad():
        found = actor.sample(th.zeros(1_000, 1)).abs()
        share = float((actor.sample(th.zeros(1_000, 1)) > 0).float().mean())
    assert float((found - 0.6).abs().median()) < 0.1
    assert 0.35 < share < 0.65


@pytest.mark.parametrize("accelerate", ["off", "auto", "compile"])
def test_deterministic_actions_repeat_and_depend_on_the_sampler(accelerate: str, tmp_path: Any) -> None:
    agent = make_agent(3, 2, policy_kwargs=dict(actor="flow", net_arch=[32]), accelerate=accelerate)
    observations = np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3)
    first = agent.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(agent.predict(observations, deterministic=True)[0], first)
    agent.policy.set_sampler(solver="midpoint", num_inference_steps=40)
    fine = agent.predict(observations, deterministic=True)[0]
    agent.policy.set_sampler(solver="euler", num_inference_steps=400)
    np.testing.assert_allclose(agent.predict(observations, deterministic=True)[0], fine, atol=0.02)
    agent.save(tmp_path / "agent")
    loaded = DIPO.load(tmp_path / "agent")
    assert loaded.policy.samplers == agent.policy.samplers
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], agent.predict(observations, deterministic=True)[0]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_inference_steps=0), "`num_inference_steps` must be a whole number of at least 1"),
        (dict(solver="ddpm"), "`solver` must be one of 'euler', 'midpoint'"),
        (dict(num_train_timesteps=5), "`num_train_timesteps` is an option of `actor='diffusion'`"),
        (dict(eta=0.5), "`eta` is an option of `actor='diffusion'`"),
        (dict(noise_scale=0.5), "`noise_scale` is an option of `actor="),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(3, 2, policy_kwargs=dict(actor="flow", **options))


def test_the_sampler_is_a_value() -> None:
    agent = make_agent(3, 2, policy_kwargs=dict(actor="flow"))
    assert isinstance(agent.actor, FlowActor)
    assert agent.policy.samplers["target"] == Sampler(solver="euler", num_inference_steps=5)
    with pytest.raises(ValueError, match="`noise_scale` does not apply to the sampler of FlowActor"):
        agent.policy.set_sampler(noise_scale=0.5)
