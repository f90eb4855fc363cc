"""Whole updates agree with a naive implementation that shares no code with the package (tests/naive_dipo.py)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import MODES, displacement_error, fill, give_noise, make_agent, networks, set_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_dipo import Memory, NaiveDIPO, Settings

from sb3_dipo import DIPO

ROWS = 40


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and settings of an agent, such that every clipping binds for some and not for others."""
    actor = draw(st.sampled_from(["diffusion", "diffusion", "flow", "flow", "vae", "mlp"]))
    n_quantiles = draw(st.integers(1, 6))
    start = draw(st.sampled_from(["replay", "replay", "policy"])) if actor == "flow" else "replay"
    beta_schedule = draw(st.sampled_from(["cosine", "vp", "linear", "ou"]))
    return {
        "obs_dim": draw(st.integers(1, 5)),
        "action_dim": draw(st.integers(1, 4)),
        "hidden": [draw(st.integers(4, 12)) for _ in range(draw(st.integers(1, 3)))],
        "n_envs": draw(st.integers(1, 3)),
        "batch_size": draw(st.integers(2, 24) | st.integers(25, 40)),
        "seed": draw(st.integers(0, 2**31)),
        "persist": draw(st.lists(st.booleans(), min_size=7, max_size=7)),
        "settings": Settings(
            actor=actor,
            num_train_timesteps=draw(st.integers(1, 12)),
            beta_schedule=beta_schedule,
            horizon=draw(st.floats(0.5, 3.0)) if beta_schedule == "ou" else None,
            noise_scale=draw(st.sampled_from([1.0, 0.5])) if actor == "diffusion" else 1.0,
            gamma=draw(st.sampled_from([0.9, 0.99])),
            tau=draw(st.sampled_from([0.005, 0.3])),
            learning_rate=draw(st.sampled_from([3e-4, 1e-2])),
            qf_learning_rate=draw(st.sampled_from([3e-4, 1e-2])),
            action_lr=draw(st.sampled_from([0.03, 0.2])),
            action_gradient_steps=draw(st.integers(1, 5)),
            action_grad_norm_ratio=draw(st.sampled_from([1e-6, 0.1])),
            max_grad_norm=draw(st.sampled_from([0.05, 2.0])),
            actor_target_update_interval=draw(st.integers(1, 3)),
            latent_dim=draw(st.integers(1, 6)),
            kl_weight=draw(st.sampled_from([0.1, 1.0])),
            noise_std=draw(st.sampled_from([0.1, 0.5])),
            critic=draw(st.sampled_from(["ensemble", "quantile"])),
            n_critics=draw(st.integers(1, 3)),
            n_quantiles=n_quantiles,
            top_quantiles_to_drop_per_net=draw(st.integers(0, n_quantiles - 1)),
            layer_norm=draw(st.booleans()),
            flow_solver=draw(st.sampled_from(["euler", "midpoint"])),
            flow_steps=draw(st.integers(1, 5)),
            target_candidates=draw(st.sampled_from([1, 1, 3])) if actor in ("diffusion", "flow") else 1,
            max_action_shift=draw(st.sampled_from([None, 0.05])) if start == "replay" else None,
            action_gradient_start=start,
        ),
    }


def make_pair(problem: dict[str, Any], accelerate: str) -> tuple[DIPO, NaiveDIPO]:
    """The agent and the oracle with the same weights; those of the targets differ from those of the networks."""
    s: Settings = problem["settings"]
    options: dict[str, dict[str, Any]] = {
        "diffusion": {
            "num_train_timesteps": s.num_train_timesteps,
            "beta_schedule": s.beta_schedule,
            "horizon": s.horizon,
            "noise_scale": s.noise_scale,
        },
        "flow": {"solver": s.flow_solver, "num_inference_steps": s.flow_steps},
        "vae": {"latent_dim": s.latent_dim, "kl_weight": s.kl_weight},
        "mlp": {"noise_std": s.noise_std},
    }
    of_critic: dict[str, Any] = {"critic": s.critic, "n_critics": s.n_critics, "layer_norm": s.layer_norm}
    if s.critic == "quantile":
        of_critic.update(n_quantiles=s.n_quantiles, top_quantiles_to_drop_per_net=s.top_quantiles_to_drop_per_net)
    agent = make_agent(
        problem["obs_dim"],
        problem["action_dim"],
        problem["n_envs"],
        accelerate=accelerate,
        policy_kwargs={"actor": s.actor, "net_arch": problem["hidden"], **options[s.actor], **of_critic},
        **{
            name: getattr(s, name)
            for name in (
                "gamma",
                "tau",
                "learning_rate",
                "qf_learning_rate",
                "action_lr",
                "action_gradient_steps",
                "action_grad_norm_ratio",
                "max_grad_norm",
                "actor_target_update_interval",
                "max_action_shift",
                "action_gradient_start",
            )
        },
    )
    agent.policy.set_sampler("target", num_candidates=s.target_candidates)
    precision = th.float64 if s.beta_schedule == "ou" else th.float32
    naive = NaiveDIPO(s, problem["obs_dim"], problem["action_dim"], problem["hidden"], table_dtype=precision)
    generator = th.Generator().manual_seed(problem["seed"])
    for name, parameters in networks(agent).items():
        weights = [0.3 * th.randn(parameter.shape, generator=generator) for parameter in parameters]
        set_weights(parameters, weights)
        naive.set_parameters(name, weights)
    return agent, naive


def draw_noise(problem: dict[str, Any], generator: th.Generator) -> dict[str, dict[str, th.Tensor]]:
    """The draws of one update: of the target policy's sampling, of the loss, and of the start of the climb."""
    s: Settings = problem["settings"]
    batch, p = problem["batch_size"], problem["action_dim"]
    candidates = batch * s.target_candidates

    def normal(*shape: int) -> th.Tensor:
        return th.randn(shape, generator=generator)

    if s.actor == "vae":
        return {"sample": {"initial_noise": normal(batch, s.latent_dim)}, "loss": {"noise": normal(batch, s.latent_dim)}}
    if s.actor == "mlp":
        return {"sample": {"noise": normal(batch, p)}, "loss": {"noise": normal(batch, p)}}
    if s.actor == "flow":
        of_loss = {"timesteps": th.rand(batch, generator=generator), "noise": normal(batch, p)}
        of_sample = {"initial_noise": normal(candidates, p)}
        return {"sample": of_sample, "loss": of_loss, "start": {"initial_noise": normal(batch, p)}}
    timesteps = th.randint(s.num_train_timesteps, (batch,), generator=generator)
    of_sample = {"initial_noise": normal(candidates, p), "noise": normal(s.num_train_timesteps, candidates, p)}
    return {"sample": of_sample, "loss": {"timesteps": timesteps, "noise": normal(batch, p)}}


def draw_places(batch: int, n_envs: int, generator: np.random.RandomState) -> tuple[th.Tensor, th.Tensor]:
    """The rows and environments that a buffer of ROWS rows draws next, NumPy's state being that of the generator."""
    rows = generator.randint(0, ROWS, size=batch)
    return th.from_numpy(rows), th.from_numpy(generator.randint(0, n_envs, size=batch))


@pytest.mark.parametrize("accelerate", MODES)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_whole_updates_agree_with_the_oracle(accelerate: str, problem: dict[str, Any]) -> None:
    agent, naive = make_pair(problem, accelerate)
    batch, n_envs = problem["batch_size"], problem["n_envs"]
    generator = th.Generator().manual_seed(problem["seed"] + 1)

    shapes = {"observations": (problem["obs_dim"],), "actions": (problem["action_dim"],), "rewards": ()}
    data = {name: th.randn((ROWS, n_envs, *shape), generator=generator) for name, shape in shapes.items()}
    data["actions"] = data["actions"].clamp(-1, 1)
    data["next_observations"] = th.randn(data["observations"].shape, generator=generator)
    data["terminals"] = (th.rand((ROWS, n_envs), generator=generator) < 0.3).float()
    memory = Memory(**data)
    arrays = {name: array.numpy() for name, array in data.items()}
    fill(agent, **arrays)

    updates = 2 * problem["settings"].actor_target_update_interval + 1
    noises = [draw_noise(problem, generator) for _ in range(updates)]
    give_noise(agent, *([noise.get(use, {}) for noise in noises] for use in ("sample", "loss", "start")))
    seed = problem["seed"] % 2**32
    np.random.seed(seed)
    places = np.random.RandomState(seed)
    start = naive.flat_parameters()
    persist = problem["persist"][:updates]
    for noise, agent.persist_improved_actions in zip(noises, persist, strict=True):
        naive.settings = replace(naive.settings, persist_improved_actions=agent.persist_improved_actions)
        agent.train(gradient_steps=1, batch_size=batch)
        critic_rows, critic_envs = draw_places(batch, n_envs, places)
        actor_rows, actor_envs = draw_places(batch, n_envs, places)
        draws = {**noise["sample"], "timesteps": noise["loss"].get("timesteps"), "loss_noise": noise["loss"]["noise"]}
        draws["start_noise"] = noise.get("start", {}).get("initial_noise")
        draws.update(critic_rows=critic_rows, critic_envs=critic_envs, actor_rows=actor_rows, actor_envs=actor_envs)
        losses = naive.update(memory, draws)

        logged = agent.logger.name_to_value
        assert logged["train/critic_loss"] == pytest.approx(losses["critic_loss"], rel=1e-4, abs=1e-5)
        assert logged["train/actor_loss"] == pytest.approx(losses["actor_loss"], rel=1e-4, abs=1e-5)

    assert agent.replay_buffer is not None
    improved = agent.replay_buffer.improved_actions[:ROWS]  # type: ignore[attr-defined]
    # Adam divides by the size of the gradient: where that is small, rounding moves an action by more, but few and not far
    errors = np.abs(improved - memory.improved_actions.numpy())
    assert np.quantile(errors, 0.95) < 2e-4 and errors.max() < 2e-3
    np.testing.assert_array_equal(agent.replay_buffer.actions[:ROWS], arrays["actions"])
    written = any(persist) and problem["settings"].action_gradient_start == "replay"
    assert written or not (improved != arrays["actions"]).any()
    for name, weights in naive.flat_parameters().items():
        assert displacement_error(networks(agent)[name], start[name], weights) < 1e-3, name


@pytest.mark.parametrize("accelerate", MODES)
@pytest.mark.parametrize("batch_size", [5, 30])
@pytest.mark.parametrize("actor", ["diffusion", "flow", "vae", "mlp"])
def test_acting_agrees_with_the_oracle(actor: str, batch_size: int, accelerate: str) -> None:
    """With NumPy's and PyTorch's states alike, ``predict`` plays what the oracle plays."""
    problem: dict[str, Any] = {
        "obs_dim": 4,
        "action_dim": 2,
        "hidden": [8, 8],
        "n_envs": 1,
        "batch_size": batch_size,
        "seed": 3,
        "settings": Settings(actor=actor, num_train_timesteps=7, latent_dim=3),
    }
    agent, naive = make_pair(problem, accelerate)
    observations = th.randn((batch_size, 4))
    th.manual_seed(0)
    actions, _ = agent.predict(observations.numpy())
    th.manual_seed(0)
    np.testing.assert_allclose(actions, naive.act(observations).numpy(), rtol=0, atol=1e-5)
