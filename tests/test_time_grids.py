"""
Time grids: every step where all are taken, sound ones where they are not, and few steps that end near the data.

For clean actions of known distribution the exact noise prediction can be written down, so that only the solver and its time
grid are left to blame for where the samples end.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch as th
from envs import small_dipo
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_dipo import DIPO, DIPOPolicy
from sb3_dipo.diffusion import SCHEDULES, SOLVERS, make_schedule, sample, time_grid
from sb3_dipo.diffusion.solvers import SPACINGS


@given(st.sampled_from(sorted(SPACINGS)), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 120), st.data())
@settings(deadline=None, derandomize=True)
def test_grids_descend_over_distinct_indices(spacing: str, beta_schedule: str, length: int, data: st.DataObject) -> None:
    num_inference_steps = data.draw(st.integers(1, length))
    horizon = data.draw(st.sampled_from([1e-3, 1.0, 8.0])) if beta_schedule == "ou" else None
    grid = SPACINGS[spacing](make_schedule(beta_schedule, length, horizon), num_inference_steps)
    assert len(grid) == num_inference_steps
    assert 0 <= grid[-1] <= grid[0] < length
    assert all(before > after for before, after in itertools.pairwise(grid))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_every_number_of_steps_is_taken_and_all_of_them_are_all(beta_schedule: str, spacing: str) -> None:
    schedule = make_schedule(beta_schedule, 100)
    grids = {n: SPACINGS[spacing](schedule, n) for n in range(1, 101)}
    assert all(sorted({*grid}, reverse=True) == list(grid) and len(grid) == n for n, grid in grids.items())
    assert grids[100] == tuple(reversed(range(100)))


def test_linspace_is_the_even_grid() -> None:
    schedule = make_schedule("cosine", 100)
    assert all(SPACINGS["linspace"](schedule, n) == time_grid(100, n) for n in range(1, 101))


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_lambda_is_as_even_in_log_snr_as_indices_can_be(beta_schedule: str) -> None:
    schedule = make_schedule(beta_schedule, 1000)
    grid = list(SPACINGS["lambda"](schedule, 8))
    between = schedule.lambda_t.clamp(-3, 3)
    targets = th.linspace(float(between[-1]), float(between[0]), 8, dtype=th.float64)
    nearest = (schedule.lambda_t.unsqueeze(1) - targets).abs().min(dim=0).values
    th.testing.assert_close((schedule.lambda_t[grid] - targets).abs(), nearest, rtol=0, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_inference_steps", [0, -1, 11])
def test_grids_refuse_a_number_of_steps_out_of_range(spacing: str, num_inference_steps: int) -> None:
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be between 1 and .* = 10, not {num_inference_steps}"):
        SPACINGS[spacing](make_schedule("cosine", 10), num_inference_steps)


NORMAL = th.distributions.Normal(0.0, 1.0).icdf((th.arange(400, dtype=th.float64) + 0.5) / 400)
"""Equally likely standard normal values, in order: (400,)."""

# Equally likely actions, in order, like those of Gaussians clipped to the box
ACTIONS = {
    "narrow": 0.3 + 0.05 * NORMAL,
    "broad": (0.3 * NORMAL).clamp(-1, 1),
    "two modes": th.cat([0.05 * NORMAL[::2] - 0.7, 0.05 * NORMAL[::2] + 0.7]),
    "saturated": th.cat([0.1 * NORMAL[::2] - 1.1, 0.1 * NORMAL[::2] + 1.1]).clamp(-1, 1),
}


def distance(beta_schedule: str, spacing: str, num_inference_steps: int, actions: th.Tensor) -> float:
    """Wasserstein distance between actions (400,) and DPM-Solver++'s samples, given their exact noise prediction."""
    schedule = make_schedule(beta_schedule, 100)
    table = SOLVERS["dpmpp_2m"](schedule, SPACINGS[spacing](schedule, num_inference_steps), 0.0)

    def predict_noise(x: th.Tensor, i: int) -> th.Tensor:
        alpha_t, sigma_t = table.steps[i].alpha_t, table.steps[i].sigma_t
        posterior = th.softmax(-0.5 * ((x - alpha_t * actions) / sigma_t) ** 2, dim=1)
        return (x - alpha_t * (posterior @ actions).unsqueeze(1)) / sigma_t

    samples = sample(table, predict_noise, NORMAL.unsqueeze(1), None).squeeze(1)
    return float((samples.sort().values - actions).abs().mean())


@pytest.mark.parametrize("num_inference_steps", [5, 10])
@pytest.mark.parametrize("beta_schedule", ["cosine", "vp", "linear"])
def test_few_steps_of_lambda_end_nearer_to_the_data(beta_schedule: str, num_inference_steps: int) -> None:
    """On the average over the actions; and twice as many steps end nearer still, as they need not on the even grid."""
    even, few, more = (
        sum(distance(beta_schedule, spacing, n, actions) for actions in ACTIONS.values())
        for spacing, n in [
            ("linspace", num_inference_steps),
            ("lambda", num_inference_steps),
            ("lambda", 2 * num_inference_steps),
        ]
    )
    assert few < 0.6 * even
    assert more < few


# The option


def timesteps_of(policy: DIPOPolicy, which: str = "behaviour") -> list[int]:
    """The timesteps that the actor asks its network for, in order."""
    asked: list[int] = []
    actor: Any = policy.actor
    hook = actor.noise_network.register_forward_pre_hook(lambda network, inputs: asked.extend(inputs[1].tolist()))
    try:
        actor.sample(th.zeros(1, actor.features_dim), sampler=policy.samplers[which])
    finally:
        hook.remove()
    return asked


FEW = {"num_train_timesteps": 20, "num_inference_steps": 5}
GRIDS = {spacing: list(SPACINGS[spacing](make_schedule("cosine", 20), 5)) for spacing in SPACINGS}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_the_policy_samples_on_the_grid_it_is_given(solver: str, spacing: str) -> None:
    model = small_dipo(policy_kwargs={**FEW, "solver": solver, "timestep_spacing": spacing})
    assert timesteps_of(model.policy) == GRIDS[spacing]
    for all_steps in (None, 20):
        model.policy.set_sampler(num_inference_steps=all_steps)
        assert timesteps_of(model.policy) == list(reversed(range(20)))


def test_set_sampler_changes_the_grid_for_one_use() -> None:
    policy = small_dipo(policy_kwargs=FEW).policy
    policy.set_sampler("evaluation", timestep_spacing="lambda")
    assert [timesteps_of(policy, which) for which in ("behaviour", "evaluation", "target")] == [
        GRIDS["linspace"],
        GRIDS["lambda"],
        GRIDS["linspace"],
    ]


@pytest.mark.parametrize("value", ["even", "Lambda", None, 3, ["lambda"]])
def test_other_spacings_are_refused_by_name(value: Any) -> None:
    match = r"`timestep_spacing` must be one of 'linspace', 'lambda', not "
    with pytest.raises(ValueError, match=match):
        small_dipo(policy_kwargs={"timestep_spacing": value})
    policy = small_dipo().policy
    with pytest.raises(ValueError, match=match):
        policy.set_sampler(timestep_spacing=value)
    assert policy.samplers["behaviour"].timestep_spacing == "linspace"  # unchanged


def test_saving_keeps_the_grid(tmp_path: Path) -> None:
    model = small_dipo(policy_kwargs=FEW)
    model.policy.set_sampler("behaviour", timestep_spacing="lambda")
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pkl"))
    for policy in (DIPO.load(tmp_path / "model").policy, DIPOPolicy.load(str(tmp_path / "policy.pkl"))):
        assert policy.samplers == model.policy.samplers
        assert timesteps_of(policy) == GRIDS["lambda"]
        assert timesteps_of(policy, "evaluation") == GRIDS["linspace"]


def test_settings_saved_before_there_were_grids_still_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo(policy_kwargs=FEW)
    saved = model.policy.sampler_settings()
    for settings_of_use in saved.values():
        del settings_of_use["timestep_spacing"]
    monkeypatch.setattr(model.policy, "sampler_settings", lambda: saved)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pkl"))
    for policy in (DIPO.load(tmp_path / "model").policy, DIPOPolicy.load(str(tmp_path / "policy.pkl"))):
        assert timesteps_of(policy) == GRIDS["linspace"]
        assert {sampler.timestep_spacing for sampler in policy.samplers.values()} == {"linspace"}
