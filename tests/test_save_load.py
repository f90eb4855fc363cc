"""Saving and loading of models, policies and replay data; what predict() promises; samplers."""

import base64
import io
import json
import pathlib
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TinyEnv, differences, everything_learned, goal_envs, small_dipo, tiny_envs
from gymnasium import spaces
from helpers import noise_predictions
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac.policies import SACPolicy

from sb3_dipo import (
    DIPO,
    CnnPolicy,
    DIPONStepReplayBuffer,
    DIPOPolicy,
    DIPOReplayBuffer,
    EnsembleCritic,
    MLPActor,
    MultiInputPolicy,
    Sampler,
)

ACTORS = ["diffusion", "vae", "mlp"]
POLICIES = [
    ("vector", "MlpPolicy", DIPOPolicy),
    ("image", "CnnPolicy", CnnPolicy),
    ("dict", "MultiInputPolicy", MultiInputPolicy),
]


def trained(
    observation: str = "vector", policy: str = "MlpPolicy", policy_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> DIPO:
    """An agent whose actions lie inside the box and depend on the observation."""
    policy_kwargs = policy_kwargs or {}
    if policy_kwargs.get("actor", "diffusion") == "diffusion":
        policy_kwargs = {"beta_schedule": "ou", "horizon": 0.3, **policy_kwargs}
    model = small_dipo(TinyEnv(observation=observation), policy, policy_kwargs, **kwargs)
    model.learn(25)
    return model


def some_observations(model: DIPO, number: int = 6) -> Any:
    space = model.observation_space
    space.seed(0)
    samples = [space.sample() for _ in range(number)]
    return (
        {key: np.stack([s[key] for s in samples]) for key in samples[0]} if isinstance(samples[0], dict) else np.stack(samples)
    )


def modes(model: Any, observations: Any) -> np.ndarray:
    actions, _ = model.predict(observations, deterministic=True)
    return np.asarray(actions)


def rewound(model: DIPO, seed: int = 11) -> DIPO:
    """With a logger and all random numbers from the start."""
    model.set_logger(Logger(None, []))
    np.random.seed(seed)
    th.manual_seed(seed)
    return model


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("observation, policy, policy_class", POLICIES)
def test_save_and_load(
    observation: str, policy: str, policy_class: type[DIPOPolicy], actor: str, tmp_path: pathlib.Path
) -> None:
    model = trained(observation, policy, policy_kwargs={"actor": actor}, buffer_size=40, tau=0.02)
    observations = some_observations(model)
    expected, before = modes(model, observations), everything_learned(model)
    model.save(tmp_path / "model.zip")
    del model
    loaded = DIPO.load(tmp_path / "model.zip", env=TinyEnv(observation=observation), device="cpu")
    assert type(loaded.policy) is policy_class
    after = everything_learned(loaded)
    saved_apart = ("actions", "improved_actions")
    learned = [{name: part for name, part in all_of_it.items() if name not in saved_apart} for all_of_it in (before, after)]
    assert not differences(*learned)
    np.testing.assert_array_equal(modes(loaded, observations), expected)
    assert (loaded.num_timesteps, loaded._n_updates, loaded.tau) == (25, 15, 0.02)
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 45


@pytest.mark.parametrize("actor", ACTORS)
def test_load_without_environment(actor: str, tmp_path: pathlib.Path) -> None:
    model = trained(policy_kwargs={"actor": actor}, buffer_size=1_000_000)
    expected = modes(model, some_observations(model))
    model.save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model")
    assert loaded.env is None
    np.testing.assert_array_equal(modes(loaded, some_observations(loaded)), expected)
    assert loaded.predict(np.zeros(3, dtype=np.float32))[0].shape == (2,)
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 0
    loaded.set_env(TinyEnv())
    loaded.learn(15)


def test_save_to_open_file() -> None:
    model, file = trained(), io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = DIPO.load(file)
    np.testing.assert_array_equal(modes(loaded, some_observations(model)), modes(model, some_observations(model)))


def test_file_holds_no_networks_and_no_replay_data_beside_the_weights(tmp_path: pathlib.Path) -> None:
    model = trained(policy_kwargs={"net_arch": [64, 64]})
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert {"data", "policy.pth", "actor.optimizer.pth", "critic.optimizer.pth"} <= set(archive.namelist())
        data = json.loads(archive.read("data"))
    assert len(json.dumps(data)) < 100_000
    for name, value in data.items():
        if isinstance(value, dict) and ":serialized:" in value:
            content = pickle.loads(base64.b64decode(value[":serialized:"]))
            assert not isinstance(content, (th.nn.Module, th.Tensor)), name
    assert "policy" not in data and "replay_buffer" not in data and "actor" not in data and "critic_target" not in data


@pytest.mark.parametrize("n_envs", [1, 3])
def test_load_onto_another_number_of_environments(n_envs: int, tmp_path: pathlib.Path) -> None:
    trained().save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model", env=tiny_envs(n_envs))
    assert loaded.n_envs == n_envs and loaded.replay_buffer is not None and loaded.replay_buffer.n_envs == n_envs
    loaded.learn(15)


@pytest.mark.parametrize(
    "env, error",
    [
        (lambda: TinyEnv(spaces.Box(-1.0, 1.0, (4,))), "Action spaces do not match"),
        (lambda: TinyEnv(spaces.Box(-1.0, 3.0, (2,))), "Action spaces do not match"),
        (lambda: TinyEnv(observation="image"), "Observation spaces do not match"),
        (lambda: TinyEnv(observation="dict"), "Observation spaces do not match"),
    ],
)
def test_load_onto_wrong_spaces(env: Any, error: str, tmp_path: pathlib.Path) -> None:
    trained().save(tmp_path / "model")
    with pytest.raises(ValueError, match=error):
        DIPO.load(tmp_path / "model", env=env())


def test_load_as_rl_zoo3_does(tmp_path: pathlib.Path) -> None:
    model = trained(learning_rate=lambda progress: 1e-3 * progress)
    model.save(tmp_path / "model")
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), custom_objects=custom_objects, seed=1, buffer_size=1)
    observations = some_observations(model)
    np.testing.assert_array_equal(modes(loaded, observations), modes(model, observations))
    assert loaded.lr_schedule(0.5) == 0.0


def test_load_with_other_settings(tmp_path: pathlib.Path) -> None:
    trained().save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), tau=0.5, action_lr=0.2, learning_rate=0.01, qf_learning_rate=0.02)
    assert (loaded.tau, loaded.action_lr) == (0.5, 0.2)
    loaded.learn(15)
    assert loaded.actor.optimizer.param_groups[0]["lr"] == 0.01
    assert loaded.critic.optimizer.param_groups[0]["lr"] == 0.02
    with pytest.raises(ValueError, match="policy kwargs"):
        DIPO.load(tmp_path / "model", policy_kwargs={"net_arch": [3]})
    with pytest.raises(ValueError, match="`tau`"):
        DIPO.load(tmp_path / "model", tau=2.0)


def test_load_into_her(tmp_path: pathlib.Path) -> None:
    kwargs = {"n_sampled_goal": 2}
    model = small_dipo(goal_envs(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs)
    model.learn(28)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DIPO.load(tmp_path / "model", env=goal_envs())
    assert type(loaded.replay_buffer) is type(model.replay_buffer)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.n_sampled_goal == 2  # type: ignore[union-attr]
    loaded.learn(14, reset_num_timesteps=False)
    with pytest.raises(AssertionError, match="You must pass an environment when using `HerReplayBuffer`"):
        DIPO.load(tmp_path / "model")


SETTINGS: list[dict[str, Any]] = [
    {},
    {"policy_kwargs": {"actor": "vae"}},
    {"policy_kwargs": {"actor": "mlp"}},
    {"n_steps": 3},
    {"actor_target_update_interval": 2, "learning_rate": lambda progress: 1e-2 * progress, "qf_learning_rate": 0.02},
    {"persist_improved_actions": False},
    {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}},
]


@pytest.mark.parametrize("kwargs", SETTINGS, ids=["", "vae", "mlp", "n-step", "schedules", "not persistent", "sgd"])
def test_save_load_and_go_on_equals_never_having_stopped(kwargs: dict[str, Any], tmp_path: pathlib.Path) -> None:
    model = trained(**kwargs)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv())
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert not differences(everything_learned(model), everything_learned(loaded))
    start = everything_learned(model)
    for agent in (model, loaded):
        rewound(agent)
        for _ in range(3):
            agent.train(1, 8)
    assert not differences(everything_learned(model), everything_learned(loaded))
    assert len(differences(start, everything_learned(model))) > 10
    assert loaded._n_updates == model._n_updates == 18


@pytest.mark.parametrize("actor", ACTORS)
def test_get_and_set_parameters(actor: str, tmp_path: pathlib.Path) -> None:
    model = trained(policy_kwargs={"actor": actor})
    original: dict[str, Any] = deepcopy(model.get_parameters())
    assert set(original) == {"policy", "actor.optimizer", "critic.optimizer"}
    observations = some_observations(model)
    before = modes(model, observations)

    random_params: dict[str, Any] = deepcopy(original)
    random_params["policy"] = OrderedDict((key, th.rand_like(value.float())) for key, value in original["policy"].items())
    model.set_parameters(random_params)
    assert not np.allclose(modes(model, observations), before)
    new_params = model.get_parameters()["policy"]
    assert all(th.equal(new_params[key], random_params["policy"][key]) for key in new_params)
    model.set_parameters(original)
    np.testing.assert_array_equal(modes(model, observations), before)

    # not all of them, or others
    empty: dict[str, Any] = {**original, "policy": {}}
    unknown: dict[str, Any] = {**original, "unknown": {}}
    with pytest.raises(ValueError):
        model.set_parameters({"policy": original["policy"]}, exact_match=True)
    with pytest.raises(RuntimeError):
        model.set_parameters(empty, exact_match=True)
    with pytest.raises(ValueError):
        model.set_parameters(unknown, exact_match=False)
    model.set_parameters({"policy": random_params["policy"]}, exact_match=False)
    assert not np.allclose(modes(model, observations), before)

    # from a file
    model.save(tmp_path / "model")
    other = trained(policy_kwargs={"actor": actor}, seed=9)
    other.set_parameters(tmp_path / "model")  # type: ignore[arg-type]
    np.testing.assert_array_equal(modes(other, observations), modes(model, observations))


def test_excluded_and_included(tmp_path: pathlib.Path) -> None:
    model = trained()
    model.save(tmp_path / "model", exclude=["tau"])
    loaded = DIPO.load(tmp_path / "model")
    assert not differences(loaded.policy.state_dict(), model.policy.state_dict())


# ------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("observation, policy, policy_class", POLICIES)
def test_policy_alone(
    observation: str, policy: str, policy_class: type[DIPOPolicy], actor: str, tmp_path: pathlib.Path
) -> None:
    model = trained(observation, policy, policy_kwargs={"actor": actor, "n_critics": 3}, buffer_size=40)
    observations = some_observations(model)
    expected = modes(model, observations)
    model.policy.save(str(tmp_path / "policy.pkl"))
    copies = [
        policy_class.load(str(tmp_path / "policy.pkl")),
        pickle.loads(pickle.dumps(model.policy)),
        deepcopy(model.policy),
    ]
    for copied in copies:
        assert type(copied) is policy_class and copied is not model.policy
        np.testing.assert_array_equal(modes(copied, observations), expected)
        assert copied.samplers == model.policy.samplers
        assert not differences(dict(copied.state_dict()), dict(model.policy.state_dict()))
    # a copy is its own
    copies[2].set_sampler(noise_scale=0.25)
    assert model.policy.samplers["behaviour"].noise_scale == 1
    with th.no_grad():
        for parameter in copies[2].parameters():
            parameter.zero_()
    np.testing.assert_array_equal(modes(model, observations), expected)


@pytest.mark.parametrize(
    "settings",
    [{"beta_schedule": "vp", "solver": "ddim", "num_inference_steps": 3, "eta": 0.5, "horizon": None}, {"horizon": 0.5}],
)
def test_options_of_the_actor_survive(settings: dict[str, Any], tmp_path: pathlib.Path) -> None:
    options = {**settings, "clip_sample": False, "time_embed_dim": 8, "noise_scale": 0.5}
    model = trained(policy_kwargs=options)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pkl"))
    expected = modes(model, some_observations(model))
    for copied in (DIPO.load(tmp_path / "model").policy, DIPOPolicy.load(str(tmp_path / "policy.pkl"))):
        assert copied.options == model.policy.options
        assert copied.samplers == model.policy.samplers
        np.testing.assert_array_equal(modes(copied, some_observations(model)), expected)


# ------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("observation, policy, policy_class", POLICIES)
def test_deterministic_predictions_repeat(observation: str, policy: str, policy_class: type[DIPOPolicy], actor: str) -> None:
    model = trained(observation, policy, policy_kwargs={"actor": actor}, buffer_size=40)
    observations = some_observations(model, 7)
    states = [th.get_rng_state(), np.random.get_state()[1].copy()]  # type: ignore[index]
    expected = modes(model, observations)
    assert th.equal(states[0], th.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]
    assert (np.abs(expected) < 1).any() and np.ptp(expected, axis=0).max() > 2e-4
    np.testing.assert_array_equal(modes(model, observations), expected)

    def at(index: Any) -> Any:
        return {key: value[index] for key, value in observations.items()} if observation == "dict" else observations[index]

    # the same observation in another place, in another batch, alone
    order = np.array([3, 0, 6, 3, 5])
    np.testing.assert_allclose(modes(model, at(order)), expected[order], atol=2e-6)
    for i in range(3):
        np.testing.assert_allclose(modes(model, at(i)), expected[i], atol=2e-6)
    repeated = modes(model, at(np.full(5, 2)))
    np.testing.assert_allclose(repeated, np.tile(repeated[0], (5, 1)), atol=2e-6)


@pytest.mark.parametrize("actor", ACTORS)
def test_other_predictions_are_drawn(actor: str) -> None:
    model = small_dipo(policy_kwargs={"actor": actor})
    observations = np.zeros((5, 3), dtype=np.float32)
    first, second = model.predict(observations)[0], model.predict(observations)[0]
    assert not np.allclose(first, second) and not np.allclose(first[0], first[1])


def test_the_authors_evaluation() -> None:
    """A random start, and no noise on the way."""
    model = small_dipo()
    model.policy.set_sampler(noise_scale=0)
    observations = np.zeros((5, 3), dtype=np.float32)
    features, sampler = th.zeros(5, 3), model.policy.samplers["behaviour"]
    first = model.predict(observations)[0]
    assert not np.allclose(first[0], first[1])
    start = th.randn(5, 2)
    with th.no_grad():
        assert th.equal(*(model.actor.sample(features, start, sampler=sampler) for _ in range(2)))
        same = model.actor.sample(features, start[:1].expand(5, 2), sampler=sampler)
    th.testing.assert_close(same, same[:1].expand(5, 2))


# ------------------------------------------------------------------------------------------------- samplers


def steps_of(policy: DIPOPolicy) -> dict[str, int]:
    """Counts the calls of the noise network in one sample for each use."""
    counts = {}
    observations = th.zeros(4, 3)
    with th.no_grad():
        for use, actor, deterministic in [
            ("behaviour", policy.actor, False),
            ("evaluation", policy.actor, True),
            ("target", policy.actor_target, False),
        ]:
            with noise_predictions(actor.noise_network) as calls:
                actor(observations, deterministic, policy.samplers[use])
            assert set(calls) == {4}
            counts[use] = len(calls)
    return counts


def test_set_sampler_for_each_use(tmp_path: pathlib.Path) -> None:
    model = trained(policy_kwargs={"num_train_timesteps": 10})
    policy = model.policy
    assert steps_of(policy) == {"behaviour": 10, "target": 10, "evaluation": 10}
    policy.set_sampler(num_inference_steps=8)
    assert steps_of(policy) == {"behaviour": 8, "target": 8, "evaluation": 8}
    for which, steps, solver in [("behaviour", 5, "ddim"), ("target", 3, "dpmpp_2m"), ("evaluation", 2, "ddpm")]:
        policy.set_sampler(which=which, num_inference_steps=steps, solver=solver)
    policy.set_sampler(which="behaviour", eta=0.5)
    policy.set_sampler(which="target", noise_scale=0.25)
    expected = {"behaviour": 5, "target": 3, "evaluation": 2}
    assert steps_of(policy) == expected
    settings = {
        "behaviour": Sampler(solver="ddim", num_inference_steps=5, eta=0.5),
        "target": Sampler(solver="dpmpp_2m", num_inference_steps=3, noise_scale=0.25),
        "evaluation": Sampler(solver="ddpm", num_inference_steps=2, noise_scale=0.0),
    }
    assert policy.samplers == settings

    # where the algorithm samples
    rewound(model)
    with (
        noise_predictions(model.actor_target.noise_network) as of_target,
        noise_predictions(model.actor.noise_network) as of_actor,
    ):
        model.train(2, 8)
    assert (len(of_target), len(of_actor)) == (6, 2)  # the target samples, the actor's loss predicts once
    with noise_predictions(model.actor.noise_network) as of_actor:
        model.predict(np.zeros((1, 3), dtype=np.float32))
        assert len(of_actor) == 5
        model.predict(np.zeros((1, 3), dtype=np.float32), deterministic=True)
        assert len(of_actor) == 7

    # after loading, copying, and in the next generation of both
    model.save(tmp_path / "model")
    policy.save(str(tmp_path / "policy.pkl"))
    observations = some_observations(model)
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv())
    loaded.save(tmp_path / "again")
    for copied in (
        loaded.policy,
        DIPO.load(tmp_path / "again").policy,
        DIPOPolicy.load(str(tmp_path / "policy.pkl")),
        deepcopy(policy),
        pickle.loads(pickle.dumps(policy)),
    ):
        assert copied.samplers == settings and steps_of(copied) == expected
        np.testing.assert_array_equal(modes(copied, observations), modes(policy, observations))
        copied.set_sampler(num_inference_steps=4)
        assert set(steps_of(copied).values()) == {4}
    assert steps_of(policy) == expected
    loaded.policy.set_sampler("behaviour", num_inference_steps=1)
    loaded.save(tmp_path / "third")
    assert steps_of(DIPO.load(tmp_path / "third").policy) == {"behaviour": 1, "target": 4, "evaluation": 4}


def test_set_sampler_changes_what_is_sampled() -> None:
    model = trained(policy_kwargs={"num_train_timesteps": 10})
    observations = some_observations(model)
    before = modes(model, observations)
    model.policy.set_sampler("behaviour", num_inference_steps=3)
    np.testing.assert_array_equal(modes(model, observations), before)
    model.policy.set_sampler("evaluation", num_inference_steps=3)
    assert not np.allclose(modes(model, observations), before)
    model.policy.set_sampler("evaluation", num_inference_steps=10)
    np.testing.assert_array_equal(modes(model, observations), before)


@pytest.mark.parametrize("actor", ["vae", "mlp"])
def test_set_sampler_of_the_ablations(actor: str, tmp_path: pathlib.Path) -> None:
    model = trained(policy_kwargs={"actor": actor})
    model.policy.set_sampler("behaviour", noise_scale=0)
    observations = np.zeros((5, 3), dtype=np.float32)
    np.testing.assert_array_equal(model.predict(observations)[0], modes(model, observations))
    features = th.zeros(5, 3)
    with th.no_grad():
        drawn = [model.actor_target.sample(features, sampler=model.policy.samplers["target"]) for _ in range(2)]
    assert not th.equal(*drawn)
    model.save(tmp_path / "model")
    assert DIPO.load(tmp_path / "model").policy.samplers == model.policy.samplers
    assert [model.policy.samplers[use].noise_scale for use in ("behaviour", "target", "evaluation")] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"which": "acting"}, "which"),
        ({"solver": "euler"}, "solver"),
        ({"solver": "exponential_integrator"}, "exponential_integrator"),  # not on the cosine schedule
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 6}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": 3, "eta": 0.5}, "eta"),  # ddpm
        ({"solver": "ddim", "eta": 1.5}, "eta"),
        ({"solver": "ddim", "eta": -0.5}, "eta"),
        ({"solver": "ddim", "eta": float("nan")}, "eta"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"noise_scale": float("nan")}, "noise_scale"),
        ({"noise_scale": float("inf")}, "noise_scale"),
        ({"which": "evaluation", "noise_scale": 1.0}, "noise_scale"),
        ({"clip_sample": False}, "clip_sample"),
        ({"num_inference_steps": 3, "temperature": 1.0}, "temperature"),
        ({"solver": "dpmpp_2m", "num_inference_steps": 99}, "num_inference_steps"),
    ],
)
def test_wrong_settings_of_a_sampler_change_nothing(changes: dict[str, Any], name: str) -> None:
    model = small_dipo()
    model.policy.set_sampler("target", solver="ddim", num_inference_steps=2)
    before = dict(model.policy.samplers)
    with pytest.raises(ValueError, match=name):
        model.policy.set_sampler(**changes)
    assert model.policy.samplers == before
    assert steps_of(model.policy) == {"behaviour": 5, "target": 2, "evaluation": 5}
    model.learn(15)


def test_wrong_settings_of_another_actor() -> None:
    model = small_dipo(policy_kwargs={"actor": "vae"})
    with pytest.raises(ValueError, match=r"`solver` does not apply.*VAEActor.*noise_scale"):
        model.policy.set_sampler(solver="ddim")


# ------------------------------------------------------------------------------------------------- n-step returns


def n_step_settings(model: DIPO) -> tuple[int, float]:
    assert isinstance(model.replay_buffer, DIPONStepReplayBuffer)
    return model.replay_buffer.n_steps, model.replay_buffer.gamma


def test_loading_with_other_n_step_returns(tmp_path: pathlib.Path) -> None:
    small_dipo(n_steps=3, gamma=0.9).save(tmp_path / "model")
    model = DIPO.load(tmp_path / "model", env=TinyEnv(), n_steps=5, gamma=0.5)
    assert n_step_settings(model) == (5, 0.5)
    assert n_step_settings(DIPO.load(tmp_path / "model", env=TinyEnv())) == (3, 0.9)
    assert type(DIPO.load(tmp_path / "model", env=TinyEnv(), n_steps=1).replay_buffer) is DIPOReplayBuffer
    small_dipo(gamma=0.9).save(tmp_path / "single")
    assert n_step_settings(DIPO.load(tmp_path / "single", env=TinyEnv(), n_steps=4)) == (4, 0.9)


def test_replay_buffer_with_other_n_step_returns_is_refused(tmp_path: pathlib.Path) -> None:
    small_dipo(n_steps=3).save_replay_buffer(tmp_path / "three")
    small_dipo().save_replay_buffer(tmp_path / "one")
    model = small_dipo(n_steps=3)
    own = model.replay_buffer
    with pytest.raises(ValueError, match="`n_steps`"):
        model.load_replay_buffer(tmp_path / "one")
    assert model.replay_buffer is own
    with pytest.raises(ValueError, match="`n_steps`"):
        small_dipo().load_replay_buffer(tmp_path / "three")
    with pytest.raises(ValueError, match="`gamma`"):
        small_dipo(n_steps=3, gamma=0.5).load_replay_buffer(tmp_path / "three")
    model.load_replay_buffer(tmp_path / "three")
    assert model.replay_buffer is not own


# ------------------------------------------------------------------------------------------------- parts of a model


@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_an_actor_is_saved_and_loaded_alone(actor: str, tmp_path: pathlib.Path) -> None:
    model = small_dipo(policy_kwargs={"actor": actor}, accelerate="off")  # as an actor alone computes
    model.actor.save(str(tmp_path / "actor.pth"))
    loaded = type(model.actor).load(str(tmp_path / "actor.pth"), device="cpu")
    observations = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for deterministic in (True, False):
        th.manual_seed(0)
        expected, _ = model.predict(observations, deterministic=deterministic)
        th.manual_seed(0)
        assert np.array_equal(loaded.predict(observations, deterministic=deterministic)[0], expected)


class ShiftedActor(MLPActor):
    """Actions that lie to one side, by an option of its own."""

    options = (*MLPActor.options, "shift")  # type: ignore[assignment, unused-ignore]

    def __init__(self, *args: Any, shift: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shift = shift

    def deterministic_action(self, features: th.Tensor, sampler: Sampler | None = None) -> th.Tensor:
        return (super().deterministic_action(features, sampler) + self.shift).clamp(-1, 1)


class HuberCritic(EnsembleCritic):
    """Another loss, by an option of its own."""

    options = (*EnsembleCritic.options, "beta")  # type: ignore[assignment, unused-ignore]

    def __init__(self, *args: Any, beta: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def loss(self, obs: Any, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        super().loss(obs, actions, targets)
        return sum((th.nn.functional.smooth_l1_loss(q, targets, beta=self.beta) for q in self(obs, actions)), th.zeros(()))


def test_actor_and_critic_of_ones_own(tmp_path: pathlib.Path) -> None:
    options = {"actor": ShiftedActor, "critic": HuberCritic, "shift": 2.0, "beta": 0.5, "noise_std": 0.2, "n_critics": 3}
    model = small_dipo(policy_kwargs=options)
    model.learn(20)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pkl"))
    for policy in (model.policy, DIPO.load(tmp_path / "model").policy, DIPOPolicy.load(str(tmp_path / "policy.pkl"))):
        assert isinstance(policy.actor, ShiftedActor) and isinstance(policy.critic, HuberCritic)
        assert (policy.actor.shift, policy.actor.noise_std, policy.critic.beta, policy.critic.n_critics) == (2.0, 0.2, 0.5, 3)
        assert isinstance(policy.actor_target, ShiftedActor) and isinstance(policy.critic_target, HuberCritic)
        assert (modes(policy, some_observations(model)) > 0.9).all()
    with pytest.raises(TypeError, match="'shift'"):
        small_dipo(policy_kwargs={"actor": "mlp", "shift": 1.0})


def test_samplers_of_some_uses_are_enough() -> None:
    model = small_dipo(policy_kwargs={"samplers": {"evaluation": {"solver": "ddim", "num_inference_steps": 2}}})
    assert model.policy.samplers["evaluation"] == Sampler(solver="ddim", num_inference_steps=2, noise_scale=0.0)
    assert model.policy.samplers["behaviour"] == model.policy.samplers["target"] == Sampler()


def test_a_shorter_process_on_load_takes_all_its_steps(tmp_path: pathlib.Path) -> None:
    """None, all steps, stays None when it is saved."""
    model = small_dipo()
    model.save(tmp_path / "model")
    shorter = {**model.policy_kwargs, "num_train_timesteps": 3}
    loaded = DIPO.load(tmp_path / "model", custom_objects={"policy_kwargs": shorter})
    assert loaded.predict(np.zeros(3, dtype=np.float32))[0].shape == (2,)


def test_other_options_of_sampling_on_load(tmp_path: pathlib.Path) -> None:
    """They count, and what was set with `set_sampler` before does where none are given."""
    model = small_dipo(policy_kwargs={"net_arch": [8], "num_train_timesteps": 4, "num_inference_steps": 4})
    model.policy.set_sampler("behaviour", num_candidates=2)
    model.save(tmp_path / "model")
    assert DIPO.load(tmp_path / "model").policy.samplers == model.policy.samplers
    given = {
        **model.policy_kwargs,
        "num_train_timesteps": 3,
        "num_inference_steps": 2,
        "noise_scale": 0.5,
        "num_candidates": 3,
    }
    loaded = DIPO.load(tmp_path / "model", custom_objects={"policy_kwargs": given})
    assert loaded.policy.samplers["behaviour"] == Sampler(num_inference_steps=2, noise_scale=0.5, num_candidates=3)
    given = {"net_arch": [8], "num_train_timesteps": 4, "num_inference_steps": 2}
    loaded = DIPO.load(tmp_path / "model", custom_objects={"policy_kwargs": given})
    assert loaded.policy.samplers["behaviour"] == Sampler(num_inference_steps=2, num_candidates=2)
    loaded._setup_model()
    assert loaded.policy.samplers["behaviour"] == Sampler(num_inference_steps=2)


def test_a_process_on_load_that_is_too_short_for_what_was_set(tmp_path: pathlib.Path) -> None:
    model = small_dipo(policy_kwargs={"net_arch": [8], "num_train_timesteps": 6})
    model.policy.set_sampler("behaviour", num_inference_steps=4)
    model.save(tmp_path / "model")
    given = {"net_arch": [8], "num_train_timesteps": 3}
    assert DIPO.load(tmp_path / "model", custom_objects={"policy_kwargs": given}).policy.samplers["behaviour"] == Sampler()


class Scaled(FlattenExtractor):
    """With an argument that == does not compare."""

    def __init__(self, observation_space: Any, scale: Any):
        super().__init__(observation_space)
        self.scale = scale


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"features_extractor_class": Scaled, "features_extractor_kwargs": {"scale": np.ones(3)}},
        {"features_extractor_class": Scaled, "features_extractor_kwargs": {"scale": th.ones(3)}},
        {"activation_fn": lambda: th.nn.LeakyReLU(0.1)},
        {"optimizer_kwargs": {"betas": (0.5, 0.9)}},
    ],
    ids=["array", "tensor", "lambda", "tuple"],
)
def test_what_cannot_be_compared_in_policy_kwargs(policy_kwargs: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """An agent with it is loaded, and samples as it did, also where the same arguments are given again."""
    model = small_dipo(policy_kwargs={"net_arch": [8], "num_train_timesteps": 4, **policy_kwargs})
    model.policy.set_sampler("behaviour", num_candidates=2)
    model.save(tmp_path / "model")
    for custom_objects in (None, {"policy_kwargs": model.policy_kwargs}):
        assert DIPO.load(tmp_path / "model", custom_objects=custom_objects).policy.samplers == model.policy.samplers


def test_a_class_that_has_moved_is_given_on_load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SB3 says of `custom_objects`: nothing else in the file holds the class."""
    old = types.ModuleType("old_name")
    old.Moved = type("Moved", (FlattenExtractor,), {"__module__": "old_name"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "old_name", old)
    model = small_dipo(policy_kwargs={"net_arch": [8], "features_extractor_class": old.Moved})
    model.policy.set_sampler("behaviour", num_candidates=2)
    model.save(tmp_path / "model")
    monkeypatch.delitem(sys.modules, "old_name")
    given = {"policy_kwargs": {"net_arch": [8], "features_extractor_class": FlattenExtractor}}
    assert DIPO.load(tmp_path / "model", custom_objects=given).policy.samplers == model.policy.samplers


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_policy_can_be_traced() -> None:
    """As SB3's documentation on exporting models does it."""

    class Deterministic(th.nn.Module):
        def __init__(self, policy: DIPOPolicy):
            super().__init__()
            self.policy = policy

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.policy(observations, deterministic=True)

    model = small_dipo()
    traced = th.jit.trace(Deterministic(model.policy).eval(), th.zeros(1, 3))
    observations = th.ones(1, 3)
    th.testing.assert_close(traced(observations), model.policy(observations, deterministic=True))


def test_a_file_of_another_algorithm_is_an_error(tmp_path: pathlib.Path) -> None:
    SAC("MlpPolicy", TinyEnv(), buffer_size=10, policy_kwargs={"net_arch": [8]}, device="cpu").save(tmp_path / "sac")
    with pytest.raises(ValueError, match=r"subclass of DIPOPolicy, not SACPolicy.*loaded only by the algorithm that saved it"):
        DIPO.load(tmp_path / "sac")
    with pytest.raises(ValueError, match="subclass of DIPOPolicy, not SACPolicy"):
        DIPO(SACPolicy, TinyEnv())  # type: ignore[arg-type]
