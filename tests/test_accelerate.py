"""
What is computed fast on the CPU equals the plain path on the same random numbers, but for the rounding of float32: samples,
values, gradients of every order, whole updates. The compiled kernel has tests of its own in ``test_kernels.py``, CUDA graphs
have theirs in ``test_cuda_graphs.py``, and what a fast path leaves to the modules is in ``test_step_aside.py``.
"""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from fast_and_plain import (
    ACTION_DIM,
    FLOAT32_ROUNDING,
    OBS_DIM,
    Inputs,
    Results,
    assert_same,
    computed,
    filled,
    furthest_apart,
    gradients_of,
    largest_difference,
    train,
)
from helpers import MODES
from stable_baselines3.common.utils import polyak_update

import sb3_dipo.networks
from sb3_dipo import DIPO, DiffusionActor, Sampler, improve_actions
from sb3_dipo.diffusion.solvers import SOLVERS
from sb3_dipo.fast.guard import FusedGuard
from sb3_dipo.fast.kernels import rounding_kernels

FAST = [mode for mode in MODES if mode != "off"]
fast = pytest.mark.parametrize("accelerate", FAST)
ROWS = (1, 2, 15, 16, 17, 24, 25, 33, 256)


def pair(accelerate: str, **kwargs: Any) -> tuple[DIPO, DIPO]:
    """A plain agent, and one with the same weights that computes otherwise."""
    return filled(accelerate="off", **kwargs), filled(accelerate=accelerate, **kwargs)


# ------------------------------------------------------------------------------------------------- equal to the plain path


@fast
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ddpm"},
        {"solver": "ddpm", "num_inference_steps": 7},
        {"solver": "ddim"},
        {"solver": "ddim", "eta": 0.5, "num_inference_steps": 5},
        {"solver": "dpmpp_2m", "num_inference_steps": 6, "timestep_spacing": "lambda"},
        {"solver": "exponential_integrator"},
        {"solver": "ddpm", "num_inference_steps": 1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_samples(accelerate: str, clip_sample: bool, settings: dict[str, Any]) -> None:
    plain, model = pair(accelerate, policy_kwargs={"num_train_timesteps": 12, "clip_sample": clip_sample, **settings})
    steps = settings.get("num_inference_steps", 12)
    for rows in (*ROWS, 1000):
        given = Inputs(rows, steps)
        for noise_scale in (1.0, 0.0, 0.5):
            results = []
            for each in (plain, model):
                sampler = Sampler(**{**settings, "noise_scale": noise_scale})
                with th.no_grad():
                    sampled = each.actor.sample(given.observations, given.initial_noise, given.noise, sampler)
                    results.append((sampled, each.actor.deterministic_action(given.observations, sampler)))
            assert rows < 15 or results[0][0].std() > 0.01
            th.testing.assert_close(results[1], results[0], rtol=0, atol=FLOAT32_ROUNDING)


def test_all_solvers_are_compared() -> None:
    marks: Any = vars(test_samples)["pytestmark"]
    (parameters,) = (mark.args[1] for mark in marks if mark.args[0] == "settings")
    assert {settings["solver"] for settings in parameters} == set(SOLVERS)


@fast
@pytest.mark.parametrize(
    "net_arch", [[], [7], [1], [40, 17], [33, 64, 5], [19, 20, 21, 22], [128, 128]], ids=lambda arch: "-".join(map(str, arch))
)
@pytest.mark.parametrize("n_critics", [1, 2, 5])
def test_any_depth_width_and_number_of_critics(accelerate: str, net_arch: list[int], n_critics: int) -> None:
    """Values, samples, losses, and all gradients."""
    plain, model = pair(accelerate, policy_kwargs={"net_arch": net_arch, "n_critics": n_critics})
    for rows in (1, 16, 24, 25, 61) if n_critics == 2 else (3, 61):
        given = Inputs(rows)
        assert_same(computed(model, given), computed(plain, given))


@fast
def test_any_sizes_of_observations_and_actions(accelerate: str) -> None:
    from helpers import make_agent

    for obs_dim, action_dim, time_embed_dim in ((1, 1, 4), (111, 8, 32), (3, 17, 6)):
        results: list[Results] = []
        for mode in ("off", accelerate):
            policy_kwargs = {"net_arch": [30, 31], "num_train_timesteps": 5, "time_embed_dim": time_embed_dim}
            model = make_agent(obs_dim, action_dim, seed=0, accelerate=mode, policy_kwargs=policy_kwargs)
            found: Results = {}
            for rows in (1, 20, 50):
                generator = th.Generator().manual_seed(rows)
                observations = th.randn((rows, obs_dim), generator=generator)
                actions = th.rand((rows, action_dim), generator=generator) * 2 - 1
                noise = th.randn((5, rows, action_dim), generator=generator)
                with th.no_grad():
                    found[f"sample {rows}"] = model.actor.sample(observations, actions, noise)
                    found[f"value {rows}"] = model.critic.next_value(observations, actions)
                objective = model.critic.objective(observations)
                found[f"improved {rows}"] = improve_actions(objective, actions, action_gradient_steps=5)
            results.append(found)
        assert_same(results[1], results[0])


PARTS: dict[str, dict[str, Any]] = {
    "LayerNorm": {"layer_norm": True},
    "quantiles": {"critic": "quantile"},
    "many quantiles": {"critic": "quantile", "n_critics": 5, "n_quantiles": 7, "layer_norm": True},
    "flow": {"actor": "flow"},
    "flow, midpoint": {"actor": "flow", "solver": "midpoint", "num_inference_steps": 4},
    "candidates": {"num_candidates": 5},
    "candidates of flow": {"actor": "flow", "num_candidates": 3, "critic": "quantile"},
    "vae": {"actor": "vae", "layer_norm": True},
    "no hidden layers": {"net_arch": [], "critic": "quantile"},
}


@fast
@pytest.mark.parametrize("name", PARTS)
def test_other_actors_and_critics(accelerate: str, name: str) -> None:
    """What they act, value, climb, lose and learn."""
    plain, model = pair(accelerate, policy_kwargs=PARTS[name])
    for rows in (1, 8, 16, 30, 100):
        given = Inputs(rows)
        results: list[Results] = []
        for each in (plain, model):
            critic, actor = each.critic, each.actor
            objective = critic.objective(given.observations)
            climber = given.actions.clone().requires_grad_()
            values: Any = critic(given.observations, given.actions)
            found = {
                "values": (th.cat(values, dim=1) if isinstance(values, tuple) else values).detach(),
                "next_value": critic.next_value(given.observations, given.actions),
                "improved": improve_actions(objective, given.actions, action_gradient_steps=3),
                "slope": th.autograd.grad(objective(climber).sum(), climber)[0],
            }
            with th.no_grad():
                found["objective"] = objective(given.actions)
                for deterministic in (True, False):
                    th.manual_seed(0)
                    found[f"acts {deterministic}"] = each.policy(given.observations, deterministic=deterministic)
            targets = found["next_value"] + given.targets
            th.manual_seed(0)
            for part, module, loss in (
                ("critic", critic, critic.loss(given.observations, given.actions, targets)),
                ("actor", actor, actor.loss(given.observations, given.actions)),
            ):
                found |= {f"{part} {key}": value for key, value in gradients_of(loss, module).items()}
            results.append(found)
        assert_same(results[1], results[0])
    for each in (plain, model):
        train(each, 3)
    apart, moved = distance(model, plain)
    assert moved > 1e-6 and apart < 1e-4 * moved


@fast
def test_large_batches(accelerate: str) -> None:
    """So large that not all steps' constants are made in advance."""
    plain, model = pair(accelerate, policy_kwargs={"net_arch": [64, 64], "num_train_timesteps": 10})
    given = Inputs(2000, 10)
    results = [each.actor.sample(given.observations, given.initial_noise, given.noise) for each in (plain, model)]
    with th.no_grad():
        results += [each.actor.sample(given.observations, given.initial_noise, given.noise) for each in (plain, model)]
    for result in results[1:]:
        th.testing.assert_close(result.detach(), results[0].detach(), rtol=0, atol=FLOAT32_ROUNDING)


@fast
def test_the_action_gradient_goes_through_each_rows_smallest_critic(accelerate: str) -> None:
    """Also where one critic is the smallest for all rows, and the others for none, and where two are equal."""
    for shift in (0.0, 100.0, -100.0, None):
        slopes = []
        for model in pair(accelerate, policy_kwargs={"n_critics": 3}):
            networks = [model.critic.get_submodule(f"qf{i}") for i in range(3)]
            if shift is None:
                networks[1].load_state_dict(networks[0].state_dict())
            else:
                networks[0].get_parameter("4.bias").data += shift
            given = Inputs(60)
            improved = improve_actions(model.critic.objective(given.observations), given.actions, action_gradient_steps=1)
            slopes.append(improved)
        assert slopes[0].sub(given.actions).abs().max() > 1e-3
        th.testing.assert_close(slopes[1], slopes[0], rtol=0, atol=FLOAT32_ROUNDING)


@th.no_grad()
def distance(first: DIPO, second: DIPO) -> tuple[float, float]:
    """Squared, between the weights of two agents; and how far the second has come from where it started."""
    start = filled(accelerate="off", policy_kwargs=second.policy_kwargs)
    apart = moved = 0.0
    triples = zip(first.policy.parameters(), second.policy.parameters(), start.policy.parameters(), strict=True)
    for ours, theirs, then in triples:
        apart += float((ours - theirs).square().sum())
        moved += float((theirs - then).square().sum())
    return apart, moved


@fast
@pytest.mark.parametrize("batch_size", [8, 32])
def test_fifty_updates_equal_the_plain_path(accelerate: str, batch_size: int) -> None:
    """Also across a change of the learning rates. A difference of 1e-7 in an update grows over fifty; Adam's first steps move
    weights by the learning rate whatever the gradient's size, so that one of almost 0 may go either way."""
    settings: dict[str, Any] = {
        "learning_rate": lambda progress: 3e-4 * progress,
        "qf_learning_rate": lambda progress: 1e-3 * progress,
        "policy_kwargs": {"net_arch": [128, 128]},
    }
    plain, model = pair(accelerate, **settings)
    for seed, progress in enumerate([1.0, 0.3]):
        for each in (plain, model):
            train(each, 25, batch_size, seed, progress)
    apart, moved = distance(model, plain)
    assert moved > 0.5 and apart < 1e-5 * moved
    for name in ("train/critic_loss", "train/actor_loss", "train/improved_q_gain", "train/action_shift", "train/q_value"):
        assert model.logger.name_to_value[name] == pytest.approx(plain.logger.name_to_value[name], rel=1e-3)
    buffers: list[Any] = [each.replay_buffer for each in (plain, model)]
    assert np.abs(buffers[0].improved_actions - buffers[0].actions).max() > 0.1
    np.testing.assert_allclose(buffers[1].improved_actions, buffers[0].improved_actions, rtol=0, atol=2e-3)


@fast
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_fn": th.nn.ReLU},
        {"actor": "vae"},
        {"actor": "mlp"},
        {"net_arch": []},
        {"net_arch": {"pi": [33], "qf": [65, 3]}},
        {"optimizer_class": th.optim.SGD},
        {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}},
        {"optimizer_class": th.optim.RMSprop},
        {"optimizer_kwargs": {"amsgrad": True, "eps": 1e-5}},
        {"optimizer_kwargs": {"foreach": True, "eps": 1e-5}},
    ],
    ids=str,
)
def test_other_policies(accelerate: str, settings: dict[str, Any]) -> None:
    plain, model = pair(accelerate, policy_kwargs=settings)
    for each in (plain, model):
        train(each, 3)
    assert largest_difference(plain, model) < 1e-3
    apart, moved = distance(model, plain)
    assert moved > 1e-8 and apart < 1e-4 * moved


@pytest.mark.parametrize("accelerate", MODES)
@pytest.mark.parametrize("value", [th.nan, th.inf, -th.inf])
def test_nan_is_not_hidden(accelerate: str, value: float) -> None:
    """It is in the action of its own state, and in no other; a clipped infinity is what the plain path makes of it."""
    plain, model = pair(accelerate)
    for rows in (1, 8, 64):
        given = Inputs(rows)
        given.observations[0, 0] = value
        with th.no_grad():
            actions, expected = (
                each.actor.sample(given.observations, given.initial_noise, given.noise) for each in (model, plain)
            )
            q_values = [each.critic.next_value(given.observations, given.actions) for each in (model, plain)]
        assert actions[0].isnan().any() or value != th.nan
        assert not actions[1:].isnan().any()
        th.testing.assert_close(actions, expected, equal_nan=True, rtol=0, atol=FLOAT32_ROUNDING)
        th.testing.assert_close(q_values[0], q_values[1], equal_nan=True)
        given.observations[0, 0], given.noise[0, 0, 0] = 0.0, value
        with th.no_grad():
            actions, expected = (
                each.actor.sample(given.observations, given.initial_noise, given.noise) for each in (model, plain)
            )
        th.testing.assert_close(actions, expected, equal_nan=True, rtol=0, atol=FLOAT32_ROUNDING)


@fast
def test_numbers_far_from_zero(accelerate: str) -> None:
    """Where exponentials overflow and sigmoids round to 1."""
    plain, model = pair(accelerate)
    for rows in (8, 40):
        given = Inputs(rows)
        for scale in (1e-30, 1e2, 1e4, 1e30):
            results = []
            for each in (plain, model):
                observations = scale * given.observations
                with th.no_grad():
                    found = {
                        "q_values": th.cat(each.critic(observations, given.actions), dim=1) / max(scale, 1.0),
                        "sample": each.actor.sample(observations, given.initial_noise, given.noise),
                    }
                if scale < 1e10:  # whose square is a float32
                    loss = each.critic.loss(observations, given.actions, given.targets)
                    found |= {name: value / max(scale**2, 1.0) for name, value in gradients_of(loss, each.critic).items()}
                results.append(found)
            for name, expected in results[0].items():
                th.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


# ------------------------------------------------------------------------------------------------- optimizers and targets


def test_polyak_averages_are_sb3s() -> None:
    generator = th.Generator().manual_seed(0)
    tensors = [th.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    for tau in (0.005, 1.0, 0.3, 0.0):
        ours, theirs = ([th.ones_like(tensor) / 3 for tensor in tensors] for _ in range(2))
        FusedGuard().polyak_update(tensors, ours, tau)
        polyak_update(tensors, theirs, tau)
        th.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    FusedGuard().polyak_update([], [], 0.5)


@fast
def test_options_that_the_user_chose_for_the_optimizer_stay(accelerate: str) -> None:
    chosen: list[dict[str, Any]] = [{"foreach": True}, {"fused": False}, {"differentiable": False}, {"foreach": False}]
    for options in chosen:
        model = filled(accelerate=accelerate, policy_kwargs={"net_arch": [8], "optimizer_kwargs": {**options, "eps": 1e-5}})
        train(model, 2)
        group = model.actor.optimizer.param_groups[0]
        for name, value in options.items():
            assert group[name] == value


@pytest.mark.parametrize(("options", "steps"), [({}, 2), ({"fused": True}, 6), ({"fused": False}, 6), ({"foreach": True}, 6)])
def test_the_kernel_steps_but_for_the_first_time_or_where_the_user_chose(
    options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled(accelerate="compile", policy_kwargs={"net_arch": [8], "optimizer_kwargs": {**options, "eps": 1e-5}})
    taken: list[Any] = []
    step = th.optim.Adam.step
    monkeypatch.setattr(th.optim.Adam, "step", lambda *given: taken.append(step(*given)))
    versions = [parameter._version for parameter in model.critic.parameters()]
    train(model, 3)
    assert len(taken) == steps
    assert all(after._version > before for before, after in zip(versions, model.critic.parameters(), strict=True))


@pytest.mark.parametrize("accelerate", MODES)
def test_optimizer_state_of_a_gpu_is_of_use_on_the_cpu_and_back(accelerate: str) -> None:
    """What a saved file of the other device holds: learning rates in tensors, and flags."""
    source = filled(accelerate="auto", persist_improved_actions=False)
    train(source, 2)
    parameters = copy.deepcopy(source.get_parameters())
    for group in parameters["actor.optimizer"]["param_groups"]:
        group.update(capturable=True, fused=True, lr=th.tensor(1e-3))
    for state in parameters["actor.optimizer"]["state"].values():
        state["step"] = th.tensor(float(state["step"]))
    model = filled(accelerate=accelerate, persist_improved_actions=False)
    model.set_parameters(parameters)
    group = model.actor.optimizer.param_groups[0]
    assert group["capturable"] is False and group["fused"] is None and isinstance(group["lr"], float)
    for each in (source, model):
        train(each, 2, seed=3)
    th.testing.assert_close(model.policy.state_dict(), source.policy.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accelerate", MODES)
def test_steps_of_ones_own_after_learning(accelerate: str) -> None:
    """Autograd and objectives see them, as they see those of any optimizer."""
    model = filled(accelerate=accelerate)
    train(model, 2)
    given = Inputs(32)
    objective = model.critic.objective(given.observations)
    loss = model.critic.loss(given.observations, given.actions, given.targets)
    model.critic.optimizer.zero_grad()
    loss.backward(retain_graph=True)
    model.critic.optimizer.step()
    with th.no_grad():
        th.testing.assert_close(objective(given.actions), model.critic.objective(given.observations)(given.actions))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("accelerate", MODES)
@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_bfloat16_is_for_acting_and_the_action_gradient_alone(accelerate: str, actor: str, tmp_path: Path) -> None:
    """Critics and training steps stay in float32, with any actor."""
    settings = {"actor": actor, "net_arch": [256, 256]}
    rounded = filled(accelerate=accelerate, policy_kwargs={**settings, "inference_dtype": "bfloat16"})
    exact = filled(accelerate="off", policy_kwargs=settings)
    for rows in (8, 200):
        given = Inputs(rows)
        noise = {"noise": given.initial_noise} if actor == "mlp" else {}
        results = []
        for model in (rounded, exact):
            critic = model.critic
            th.manual_seed(0)
            found = {
                "next_value": critic.next_value(given.observations, given.actions),
                "q_values": th.cat(critic(given.observations, given.actions), dim=1).detach(),
                **gradients_of(critic.loss(given.observations, given.actions, given.targets), critic),
                **gradients_of(model.actor.loss(given.observations, given.actions, **noise), model.actor),
            }
            results.append(found)
        assert_same(results[0], results[1])
    objectives = [model.critic.objective(given.observations) for model in (rounded, exact)]
    improved = [improve_actions(objective, given.actions, action_gradient_steps=3) for objective in objectives]
    moved = [float((each - given.actions).abs().mean()) for each in improved]
    assert moved[0] == pytest.approx(moved[1], rel=0.05)
    rounds = accelerate == "auto" or (accelerate == "compile" and rounding_kernels() is not None)
    assert (float((improved[0] - improved[1]).abs().mean()) > 1e-6) == rounds
    train(rounded, 2, 64)
    rounded.save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy.inference_dtype == "bfloat16"
    observations = given.observations.numpy()
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], rounded.predict(observations, deterministic=True)[0]
    )


@fast
def test_bfloat16_is_not_for_the_objectives_value(accelerate: str) -> None:
    """Of which the gain is logged, a small difference of large numbers; nor for its gradient by autograd."""
    for rows in (8, 200):
        results = []
        for options in ({"inference_dtype": "bfloat16"}, {}):
            model = filled(accelerate=accelerate, policy_kwargs={"net_arch": [256, 256], **options})
            given = Inputs(rows)
            objective = model.critic.objective(given.observations)
            climber = given.actions.clone().requires_grad_()
            (slope,) = th.autograd.grad(objective(climber).sum(), climber)
            with th.no_grad():
                results.append({"slope": slope, "value": objective(given.actions)})
        assert_same(results[0], results[1])


@fast
def test_bfloat16_in_the_reverse_process(accelerate: str) -> None:
    """Actions differ, and only a little; few rows are not worth it."""
    settings = {"net_arch": [256, 256], "num_train_timesteps": 20}
    rounded = filled(accelerate=accelerate, policy_kwargs={**settings, "inference_dtype": "bfloat16"})
    exact = filled(accelerate="off", policy_kwargs=settings)
    observations = np.random.default_rng(0).normal(size=(256, OBS_DIM)).astype(np.float32)
    moved = np.abs(rounded.predict(observations, deterministic=True)[0] - exact.predict(observations, deterministic=True)[0])
    assert moved.mean() < 0.01
    assert (moved.mean() > 1e-6) == (accelerate == "auto" or rounding_kernels() is not None)
    few = [model.predict(observations[:8], deterministic=True)[0] for model in (rounded, exact)]
    np.testing.assert_allclose(few[0], few[1], rtol=0, atol=FLOAT32_ROUNDING)


def test_bfloat16_gradients_through_the_policy_are_those_of_its_value() -> None:
    """With gradients on, modules are called."""
    rounded = filled(policy_kwargs={"inference_dtype": "bfloat16"})
    exact = filled(accelerate="off")
    slopes = []
    for model in (rounded, exact):
        observations = Inputs(40).observations.requires_grad_()
        model.policy(observations, deterministic=True).sum().backward()
        slopes.append(observations.grad)
    th.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("accelerate", MODES)
def test_an_agent_can_be_pickled_and_copied(accelerate: str) -> None:
    model = filled(accelerate=accelerate, policy_kwargs={"num_train_timesteps": 20})
    model.policy.set_sampler("behaviour", num_inference_steps=5)
    observations = np.random.default_rng(0).normal(size=(30, OBS_DIM)).astype(np.float32)
    for rows in (30, 4):
        model.predict(observations[:rows])
    stream = io.BytesIO()
    th.save(model.policy, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
        th.load(stream, weights_only=False),
        copy.deepcopy(model).policy,
    ]
    given = Inputs(40)
    for policy in copies:
        assert isinstance(policy.actor, DiffusionActor)
        for rows in (30, 4):
            results = []
            for each in (policy, model.policy):
                th.manual_seed(0)
                results.append([each.predict(observations[:rows], deterministic=flag)[0] for flag in (True, False)])
            np.testing.assert_array_equal(results[0], results[1])
        value = policy.critic.next_value(given.observations, given.actions)
        assert th.equal(value, model.critic.next_value(given.observations, given.actions))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        train(each, 2)
    assert largest_difference(model, copied) == 0


@fast
def test_a_policy_loaded_alone_computes_fast_and_right(accelerate: str, tmp_path: Path) -> None:
    from sb3_dipo import DIPOPolicy

    model = filled(accelerate=accelerate)
    model.policy.save(str(tmp_path / "policy.pkl"))
    loaded = DIPOPolicy.load(str(tmp_path / "policy.pkl"), device="cpu")
    loaded.set_accelerate(accelerate)
    observations = np.random.default_rng(0).normal(size=(30, OBS_DIM)).astype(np.float32)
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


def test_the_mode_can_be_changed_at_any_time() -> None:
    model, plain = filled(accelerate="off"), filled(accelerate="off")
    given = Inputs(40)
    expected = computed(plain, given)
    for accelerate in ("auto", "off", "compile", "auto", "cudagraphs", "off"):
        model.policy.set_accelerate(accelerate)
        found = computed(model, given)
        assert_same(found, expected)
        assert (furthest_apart(found, expected) == 0) == (accelerate == "off") or accelerate == "cudagraphs"
    with pytest.raises(ValueError, match="accelerate"):
        model.policy.set_accelerate("fast")
    assert ACTION_DIM == 2 and sb3_dipo.networks.PLAIN is model.actor.ops


def test_fast_paths_are_taken_where_they_should_be() -> None:
    """Else all of the above would compare the plain path with itself. They call no module."""
    calls: dict[str, list[str]] = {}
    for accelerate in MODES:
        model = filled(accelerate=accelerate)
        given = Inputs(40)
        with th.profiler.profile(activities=[th.profiler.ProfilerActivity.CPU]) as profile:
            with th.no_grad():
                model.actor.sample(given.observations, given.initial_noise, given.noise)
            improve_actions(model.critic.objective(given.observations), given.actions, action_gradient_steps=2)
            model.critic.loss(given.observations, given.actions, given.targets).backward()
        calls[accelerate] = [event.name for event in profile.events()]
    assert calls["off"].count("aten::mish") > 20
    assert max(calls["auto"].count("aten::mish"), calls["compile"].count("aten::mish")) <= 2  # of the timesteps' embedding
    assert "aten::sigmoid" in calls["auto"] and calls["compile"].count("aten::sigmoid") == 0
