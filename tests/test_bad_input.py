"""Every argument that cannot be meant is refused at once, with an error that names it and says what it may be."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TinyEnv, small_dipo
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_dipo import DIPO, DiffusionActor, EnsembleCritic, MLPActor, improve_actions
from sb3_dipo.diffusion import make_schedule, time_grid

NAN, INF = math.nan, math.inf

ARGUMENTS: list[tuple[str, Any]] = [
    *[("buffer_size", value) for value in (0, -5, 2.5, NAN, "many", None)],
    *[("learning_starts", value) for value in (-1, 0.5, NAN, INF, "10", None)],
    *[("batch_size", value) for value in (0, -1, 1.5, NAN, True)],
    *[("tau", value) for value in (-0.1, 1.1, NAN, INF, "0.1x", None)],
    *[("gamma", value) for value in (-0.1, 1.01, NAN, -INF, None)],
    *[("train_freq", value) for value in (0, -1, 1.5, NAN, "often", None, (0, "step"), (-2, "episode"), (1, "year"))],
    *[("gradient_steps", value) for value in (-2, 0.5, NAN, None)],
    *[("n_steps", value) for value in (0, -1, 1.5, NAN, None)],
    *[("action_lr", value) for value in (0, -0.03, NAN, INF, None)],
    *[("action_gradient_steps", value) for value in (0, -1, 2.5, NAN, INF, None)],
    *[("action_grad_norm_ratio", value) for value in (0, -1, NAN, None)],
    *[("persist_improved_actions", value) for value in (None, 1, "yes")],
    *[("max_grad_norm", value) for value in (0, -1, NAN, None)],
    *[("actor_target_update_interval", value) for value in (0, -1, 1.5, NAN, None)],
    *[("accelerate", value) for value in ("fast", None, True)],
    *[
        (name, value)
        for name in ("learning_rate", "qf_learning_rate")
        for value in (-1e-4, NAN, INF, -INF, "fast", lambda _: -1.0, lambda _: NAN, lambda _: INF)
    ],
]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *[("actor", {"actor": value}) for value in ("gan", "Diffusion", None, 1, EnsembleCritic)],
    *[("critic", {"critic": value}) for value in ("quantiles", "Ensemble", None, 1, MLPActor)],
    *[("inference_dtype", {"inference_dtype": value}) for value in ("float16", th.bfloat16, None)],
    *[("net_arch", {"net_arch": value}) for value in ([0], [8, -1], [2.5], {"pi": [8], "qf": [None]})],
    *[("n_critics", {"n_critics": value}) for value in (0, -1, 1.5, NAN, None)],
    *[("num_train_timesteps", {"num_train_timesteps": value}) for value in (0, -5, 2.5, NAN, INF, None, "5", True)],
    *[("beta_schedule", {"beta_schedule": value}) for value in ("squaredcos", "Cosine", None, 1)],
    *[("solver", {"solver": value}) for value in ("euler", "DDPM", None)],
    *[("num_inference_steps", {"num_inference_steps": value}) for value in (0, -1, 6, 2.5, NAN)],
    *[("noise_scale", {"noise_scale": value}) for value in (-0.1, NAN, INF, None, "1.0x")],
    *[("clip_sample", {"clip_sample": value}) for value in (None, 1, "yes")],
    *[("time_embed_dim", {"time_embed_dim": value}) for value in (0, 2, -4, 7, 33, 8.5, NAN, None)],
    *[("eta", {"solver": "ddim", "eta": value}) for value in (-0.1, 1.1, NAN, None)],
    *[("eta", {"solver": solver, "eta": 0.5}) for solver in ("ddpm", "dpmpp_2m")],
    ("eta", {"solver": "exponential_integrator", "beta_schedule": "ou", "num_train_timesteps": 50, "eta": 0.5}),
    *[("horizon", {"beta_schedule": schedule, "horizon": 2.0}) for schedule in ("cosine", "vp", "linear")],
    *[("horizon", {"beta_schedule": "ou", "horizon": value}) for value in (0, -1.0, NAN, INF, "long")],
    # so long that a step forgets everything: nothing is left to be denoised
    *[("horizon", {"beta_schedule": "ou", "horizon": value}) for value in (1e4, 1e300)],
    ("exponential_integrator", {"solver": "exponential_integrator"}),
    ("exponential_integrator", {"solver": "exponential_integrator", "num_train_timesteps": 100}),
    ("exponential_integrator", {"solver": "exponential_integrator", "beta_schedule": "ou", "horizon": 8.0}),
    *[("latent_dim", {"actor": "vae", "latent_dim": value}) for value in (0, -1, 1.5, NAN, None)],
    *[("kl_weight", {"actor": "vae", "kl_weight": value}) for value in (-0.1, NAN, INF, None)],
    *[("noise_std", {"actor": "mlp", "noise_std": value}) for value in (-0.1, NAN, INF, None)],
    # options of another actor
    *[(name, {"actor": actor, name: 5}) for actor in ("vae", "mlp") for name in ("num_train_timesteps", "solver", "eta")],
    *[(name, {"actor": actor, name: 0.1}) for actor in ("diffusion", "vae") for name in ("noise_std",)],
    *[(name, {"actor": actor, name: 4}) for actor in ("diffusion", "mlp") for name in ("latent_dim", "kl_weight")],
]


def short(value: Any) -> str:
    return "function" if callable(value) else str(value)


@pytest.mark.parametrize("name, value", ARGUMENTS, ids=[f"{name}={short(value)}" for name, value in ARGUMENTS])
def test_arguments(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"(?<!\w){name}(?!\w)"):
        DIPO("MlpPolicy", TinyEnv(), device="cpu", **{"buffer_size": 10, name: value})


@pytest.mark.parametrize("name, policy_kwargs", OPTIONS, ids=[f"{n} {list(kwargs.values())}" for n, kwargs in OPTIONS])
def test_policy_options(name: str, policy_kwargs: dict[str, Any]) -> None:
    diffusion = {"num_train_timesteps": 5} if policy_kwargs.get("actor", "diffusion") == "diffusion" else {}
    with pytest.raises(ValueError, match=rf"(?<!\w){name}(?!\w)"):
        DIPO("MlpPolicy", TinyEnv(), buffer_size=10, device="cpu", policy_kwargs={**diffusion, **policy_kwargs})


@pytest.mark.parametrize(
    "name, policy_kwargs, may_be",
    [
        ("solver", {"solver": "euler"}, ["'ddpm'", "'ddim'", "'dpmpp_2m'", "'exponential_integrator'", "not 'euler'"]),
        ("beta_schedule", {"beta_schedule": "x"}, ["'cosine'", "'vp'", "'linear'", "'ou'", "not 'x'"]),
        ("actor", {"actor": "gan"}, ["'diffusion'", "'vae'", "'mlp'", "not 'gan'"]),
        ("actor", {"actor": dict}, ["'diffusion'", "'vae'", "'mlp'", "subclass of GenerativeActor", "not <class 'dict'>"]),
        ("critic", {"critic": "x"}, ["'ensemble'", "not 'x'"]),
        ("critic", {"critic": dict}, ["'ensemble'", "subclass of Critic", "not <class 'dict'>"]),
        ("inference_dtype", {"inference_dtype": "float16"}, ["'float32'", "'bfloat16'", "not 'float16'"]),
        ("eta", {"solver": "ddim", "eta": 2}, ["at least 0 and at most 1", "not 2"]),
        ("latent_dim", {"latent_dim": 4}, ["actor='vae'", "actor='diffusion'", "num_train_timesteps"]),
        ("num_inference_steps", {"num_train_timesteps": 5, "num_inference_steps": 6}, ["between 1", "5", "not 6"]),
    ],
)
def test_message_says_what_it_may_be(name: str, policy_kwargs: dict[str, Any], may_be: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^`{name}`") as caught:
        small_dipo(policy_kwargs=policy_kwargs)
    for part in may_be:
        assert part in str(caught.value)


def test_argument_of_nobody() -> None:
    with pytest.raises(TypeError, match="num_timesteps"):
        small_dipo(policy_kwargs={"num_timesteps": 5})
    with pytest.raises(TypeError, match="entropy"):
        small_dipo(entropy=0.1)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(3),
        spaces.MultiBinary(2),
        spaces.MultiDiscrete([2, 2]),
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(np.array([-1.0, -np.inf], dtype=np.float32), np.array([1.0, 1.0], dtype=np.float32)),
    ],
)
def test_action_spaces_are_refused_as_by_sac(action_space: Any) -> None:
    errors = []
    for make in (lambda env: small_dipo(env), lambda env: SAC("MlpPolicy", env, device="cpu", buffer_size=10)):
        with pytest.raises(AssertionError, match="action space") as caught:
            make(TinyEnv(action_space))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_policy_that_does_not_fit_the_observations() -> None:
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        small_dipo(TinyEnv(observation="dict"))
    with pytest.raises(ValueError, match="unknown"):
        small_dipo(policy="SomePolicy")


@pytest.mark.parametrize("total_timesteps", [-1, 10.5, NAN, INF, "10", None])
def test_number_of_steps_to_learn(total_timesteps: Any) -> None:
    model = small_dipo()
    with pytest.raises(ValueError, match="total_timesteps"):
        model.learn(total_timesteps)
    assert model.num_timesteps == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"learning_rate": 0},
        {"learning_rate": 0.0, "qf_learning_rate": 0},
        {"learning_rate": lambda _: 0.0},
        {"learning_starts": 0},
        {"buffer_size": 1e3, "learning_starts": 1e1, "batch_size": 8.0},
        {"buffer_size": np.int64(100), "tau": np.float32(0.5), "gamma": 1},
        {"tau": 0, "gamma": 0},
        {"tau": 1, "gamma": 1.0},
        {"gradient_steps": 0},
        {"action_grad_norm_ratio": INF, "max_grad_norm": INF},
        {"policy_kwargs": {"num_inference_steps": 1}},
        {"policy_kwargs": {"num_train_timesteps": 1}},
        {"policy_kwargs": {"num_train_timesteps": 5.0, "num_inference_steps": 3.0}},
        {"policy_kwargs": {"time_embed_dim": 4}},
        {"policy_kwargs": {"time_embed_dim": 32.0}},
        {"policy_kwargs": {"noise_scale": 0}},
        {"policy_kwargs": {"beta_schedule": "ou", "horizon": 1}},
        {"policy_kwargs": {"beta_schedule": "ou", "horizon": 40.0}},
        {"policy_kwargs": {"solver": "ddim", "eta": 1}},
        {"policy_kwargs": {"solver": "exponential_integrator", "beta_schedule": "ou", "num_train_timesteps": 50}},
        {"policy_kwargs": {"actor": "vae", "kl_weight": 0, "latent_dim": 1}},
        {"policy_kwargs": {"actor": "mlp", "noise_std": 0}},
        {"policy_kwargs": {"n_critics": 1}},
        {"policy_kwargs": {"actor": DiffusionActor, "critic": EnsembleCritic, "num_train_timesteps": 5}},
        *[{"policy_kwargs": {"actor": actor, "inference_dtype": "bfloat16"}} for actor in ("diffusion", "vae", "mlp")],
    ],
    ids=lambda kwargs: " ".join(f"{name}={short(value)}" for name, value in kwargs.items()),
)
def test_what_is_legal(kwargs: dict[str, Any]) -> None:
    model = small_dipo(**kwargs)
    model.learn(15)
    for deterministic in (True, False):
        actions, _ = model.predict(np.zeros((4, 3), dtype=np.float32), deterministic=deterministic)
        assert np.isfinite(actions).all()
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


@pytest.mark.parametrize(
    "name, policy_kwargs",
    [
        *[("horizon", {"beta_schedule": "ou", "num_train_timesteps": 100, "horizon": value}) for value in (1e-15, 100, 500)],
        ("num_train_timesteps", {"beta_schedule": "linear", "num_train_timesteps": 20_000, "num_inference_steps": 5}),
    ],
    ids=str,
)
def test_a_process_that_leaves_nothing_is_refused(name: str, policy_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        small_dipo(policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("horizon", [1e-3, 50])
def test_the_ends_of_the_horizons_range_work(horizon: float) -> None:
    model = small_dipo(policy_kwargs={"beta_schedule": "ou", "num_train_timesteps": 100, "horizon": horizon})
    assert np.isfinite(model.predict(np.zeros((4, 3), dtype=np.float32))[0]).all()


def test_diffusion_by_itself() -> None:
    with pytest.raises(ValueError, match="`beta_schedule`"):
        make_schedule("unknown", 10)
    with pytest.raises(ValueError, match="`num_train_timesteps`"):
        make_schedule("cosine", 0)
    with pytest.raises(ValueError, match="`horizon`"):
        make_schedule("cosine", 10, horizon=1.0)
    for steps in (0, 11):
        with pytest.raises(ValueError, match="`num_inference_steps`"):
            time_grid(10, steps)


def test_nothing_happens_before_the_error() -> None:
    env = TinyEnv()
    for name, value in (("tau", 2.0), ("learning_rate", -1.0)):
        with pytest.raises(ValueError, match=rf"(?<!\w){name}(?!\w)"):
            small_dipo(env, **{name: value})
    assert env.received == []


def test_no_step_of_the_action_gradient() -> None:
    actions = th.zeros(2, 3)
    improved = improve_actions(lambda a: a.sum(dim=1, keepdim=True), actions, action_gradient_steps=0)
    assert th.equal(improved, actions)
