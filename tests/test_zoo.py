"""DIPO in the RL Zoo, in this process: hyper-parameters, tuning, and the zoo's scripts on what it trained."""

import argparse
import importlib
import inspect
import os
import pathlib
import pickle
import re
import runpy
import shutil
import sys
import types
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import optuna
import pytest
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.load_from_hub
import rl_zoo3.train
import torch as th
import yaml
from envs import GoalEnv, TinyEnv, goal_envs
from gymnasium import spaces
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from requests.exceptions import HTTPError
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

import sb3_dipo
import sb3_dipo.zoo.__main__
from sb3_dipo import (
    DIPO,
    RECOMMENDED,
    DIPOHerReplayBuffer,
    DIPONStepReplayBuffer,
    DIPOReplayBuffer,
    FlowActor,
    QuantileCritic,
)
from sb3_dipo.diffusion.solvers import FLOW_SOLVERS
from sb3_dipo.zoo import MODULES, convert_dipo_params, register, sample_dipo_params

# Nothing new where the start-up file has done it; where that is switched off, the tests run all the same
for _name in MODULES:
    register(importlib.import_module(_name))


class SickEnv(TinyEnv):
    """Its rewards are no numbers while ``sick``."""

    sick = False

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *ends_and_info = super().step(action)
        return (observation, float("nan") if self.sick else reward, *ends_and_info)


ENVS: dict[str, Any] = {"Tiny-v0": TinyEnv, "Goal-v0": GoalEnv, "Sick-v0": SickEnv}
YAML, PAPER = (pathlib.Path(__file__).parent.parent / "hyperparams" / f"{name}.yml" for name in ("dipo", "dipo_paper"))
TINY: dict[str, Any] = {
    "n_timesteps": 60,
    "learning_starts": 20,
    "buffer_size": 1000,
    "batch_size": 8,
    "action_gradient_steps": 2,
    "policy_kwargs": {"net_arch": [8], "num_train_timesteps": 3},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty folder to work in, and the test environments among Gymnasium's."""
    monkeypatch.chdir(tmp_path)
    for name, env in ENVS.items():
        gym.register(name, env, disable_env_checker=True)
    yield tmp_path
    for name in ENVS:
        del gym.registry[name]


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> list[DIPO]:
    """All agents that were built or loaded, in order; the zoo's scripts keep them to themselves."""
    seen: list[DIPO] = []
    set_up = DIPO._setup_model

    def watched(self: DIPO) -> None:
        seen.append(self)
        set_up(self)

    monkeypatch.setattr(DIPO, "_setup_model", watched)
    return seen


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All observations that were given to predict(), in order."""
    seen: list[Any] = []
    predict = DIPO.predict

    def watched(self: DIPO, observation: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(deepcopy(observation))
        return predict(self, observation, *args, **kwargs)

    monkeypatch.setattr(DIPO, "predict", watched)
    return seen


def run(script: str, *arguments: Any) -> None:
    """What ``python -m rl_zoo3.<script> <arguments>`` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        if script in ("train", "enjoy"):
            getattr(sys.modules[f"rl_zoo3.{script}"], script)()
        else:
            runpy.run_module(f"rl_zoo3.{script}", run_name="__main__")


def train(*arguments: Any, env: str = "Tiny-v0", algo: str = "dipo", **hyperparams: Any) -> None:
    """Train for some updates; DIPO with the settings of TINY in place of those in the YAML."""
    hyperparams = {**(TINY if algo == "dipo" else {}), **hyperparams}
    given = ["-params", *(f"{name}:{value!r}" for name, value in hyperparams.items())] if hyperparams else []
    run("train", "--algo", algo, "--env", env, "--seed", 1, "--device", "cpu", "--eval-freq", -1, *arguments, *given)


def enjoy(*arguments: Any, env: str = "Tiny-v0") -> None:
    """Look at the agent that was trained last."""
    run("enjoy", "--algo", "dipo", "--env", env, "-f", "logs", "--no-render", "-n", 20, "--device", "cpu", *arguments)


# ------------------------------------------------------------------------------------------------- registration


def test_registering_again_changes_nothing() -> None:
    before = ExperimentManager.read_hyperparameters, ExperimentManager._preprocess_schedules
    for name in MODULES:
        register(sys.modules[name])
    assert (ExperimentManager.read_hyperparameters, ExperimentManager._preprocess_schedules) == before
    assert rl_zoo3.ALGOS["dipo"] is DIPO
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["dipo"] is sample_dipo_params
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER["dipo"] is convert_dipo_params


def test_modules_that_hold_no_algorithm_are_left_alone() -> None:
    module = types.ModuleType("rl_zoo3.callbacks")
    before = dict(vars(module))
    register(module)
    assert vars(module) == before


@pytest.mark.parametrize("arguments", [[], ["--algo", "dipo"], ["cli"]])
def test_usage_of_the_explicit_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3_dipo.zoo", *arguments])
    with pytest.raises(SystemExit, match=r"usage: .*train.*enjoy.*record_video.*plot_from_file"):
        sb3_dipo.zoo.__main__.main()


def test_explicit_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3_dipo.zoo", "record_video", "--help"])
    monkeypatch.setenv("SB3_DIPO_ZOO", "0")
    monkeypatch.delitem(rl_zoo3.ALGOS, "dipo")
    with pytest.raises(SystemExit) as stop:
        sb3_dipo.zoo.__main__.main()
    assert stop.value.code == 0 and re.search(r"--algo {.*dipo", capsys.readouterr().out)
    # for the scripts that start others
    assert os.environ["SB3_DIPO_ZOO"] == "1" and rl_zoo3.ALGOS["dipo"] is DIPO


def test_explicit_command_knows_all_scripts() -> None:
    package = pathlib.Path(rl_zoo3.__file__).parent
    with_arguments = [
        ".".join(("rl_zoo3", *path.relative_to(package).with_suffix("").parts))
        for path in package.rglob("*.py")
        if "ArgumentParser(" in path.read_text()
    ]
    assert sorted(sb3_dipo.zoo.__main__.SCRIPTS.values()) == sorted(with_arguments)


# ------------------------------------------------------------------------------------------------- hyper-parameters

MUJOCO = [f"{task}-{version}" for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid") for version in ("v4", "v5")]
OTHERS = [
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "LunarLanderContinuous-v3",
    "BipedalWalker-v3",
    "BipedalWalkerHardcore-v3",
    "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
    "Reacher-v5",
    "Pusher-v5",
    "Swimmer-v5",
    "HumanoidStandup-v5",
]


def entries(file: pathlib.Path = YAML) -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())
    return loaded


def given_to_dipo(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry gives to DIPO's constructor; and the policy's arguments in the place of their text."""
    given = {name: value for name, value in entry.items() if name not in ("n_timesteps", "policy")}
    return {**given, "policy_kwargs": eval(entry["policy_kwargs"])}


def experiment(env: str, hyperparams: dict[str, Any] | None = None, algo: str = "dipo", **kwargs: Any) -> ExperimentManager:
    settings: dict[str, Any] = {"eval_freq": -1, "device": "cpu", "n_evaluations": 1, "hyperparams": hyperparams}
    return ExperimentManager(argparse.Namespace(), algo, env, "logs", **{**settings, **kwargs})


def set_up(manager: ExperimentManager) -> DIPO:
    prepared = manager.setup_experiment()
    assert prepared is not None
    model, _ = prepared
    assert isinstance(model, DIPO) and model.env is not None
    model.env.close()
    return model


def test_every_task_has_an_entry() -> None:
    assert {*MUJOCO, *OTHERS, "default"} <= set(entries())


@pytest.mark.filterwarnings("ignore:.*The environment .*-v4 is out of date:DeprecationWarning")  # Gymnasium, on purpose
@pytest.mark.parametrize("env", [*(env for env in entries() if env != "default"), "Tiny-v0"])
def test_entry_builds_an_agent(env: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = entries()["default" if env == "Tiny-v0" else env]
    if "box2d" in str(gym.spec(env).entry_point):
        pytest.importorskip("Box2D")
    manager = experiment(env, {"buffer_size": 100})
    model = set_up(manager)
    assert ("Using 'default' hyperparameters" in capsys.readouterr().out) == (env == "Tiny-v0")
    assert manager.n_timesteps == expected["n_timesteps"] > model.learning_starts
    assert expected["train_freq"] == 1 and vars(model)["train_freq"] == TrainFreq(1, TrainFrequencyUnit.STEP)
    of_the_zoo = {"n_timesteps", "policy", "noise_type", "noise_std"}
    looked_at_apart = {"buffer_size", "learning_rate", "policy_kwargs", "train_freq"}
    for name in set(expected) - of_the_zoo - looked_at_apart:
        assert getattr(model, name) == expected[name], name
    rate = expected["learning_rate"]
    assert model.lr_schedule(0.5) == (float(rate.removeprefix("lin_")) / 2 if isinstance(rate, str) else rate)
    noise = {None: type(None), "normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}
    assert type(model.action_noise) is noise[expected.get("noise_type")]
    policy_kwargs = eval(expected["policy_kwargs"])
    assert model.policy_kwargs == policy_kwargs
    assert isinstance(model.actor, FlowActor) or model.actor.num_train_timesteps == policy_kwargs["num_train_timesteps"]


# Table 3 of the paper: gradient norm, action gradient norm ratio, action gradient steps, target interval
TABLE_3 = {
    "Hopper": (1.0, 0.3, 20, 1),
    "Walker2d": (2.0, 0.08, 20, 1),
    "Ant": (0.8, 0.1, 20, 1),
    "HalfCheetah": (2.0, 0.08, 40, 2),
    "Humanoid": (2.0, 0.1, 20, 1),
}


@pytest.mark.parametrize("env", MUJOCO)
@pytest.mark.parametrize("file", [YAML, PAPER], ids=["recommended", "paper"])
def test_tasks_of_the_paper_have_its_values(file: pathlib.Path, env: str) -> None:
    entry = entries(file)[env]
    max_grad_norm, ratio, steps, interval = TABLE_3[env.split("-")[0]]
    diffusion = "num_train_timesteps=100, beta_schedule='cosine'"
    flow = "actor='flow', critic='quantile', layer_norm=True, "
    flow += "samplers=dict(behaviour=dict(num_candidates=4))"
    action_lr, steps, networks = (0.03, steps, diffusion) if file == PAPER else (0.12, steps // 4, flow)
    assert entry == {
        "n_timesteps": 1e6,
        "policy": "MlpPolicy",
        "learning_rate": 3e-4,
        "buffer_size": 1e6,
        "learning_starts": 10_000,
        "batch_size": 256,
        "tau": 0.005,
        "gamma": 0.99,
        "train_freq": 1,
        "gradient_steps": 1,
        "action_lr": action_lr,
        "action_gradient_steps": steps,
        "action_grad_norm_ratio": ratio,
        "max_grad_norm": max_grad_norm,
        "actor_target_update_interval": interval,
        "policy_kwargs": f"dict(net_arch=[256, 256, 256], {networks})",
    }


def test_the_paper_s_entries_are_its_tasks_and_the_default() -> None:
    assert set(entries(PAPER)) == {*MUJOCO, "default"}


def test_recommended_is_the_default() -> None:
    """Of dipo.yml; and what it does not name has DIPO's own defaults, which are the paper's."""
    ours, paper = (given_to_dipo(entries(file)["default"]) for file in (YAML, PAPER))
    policy_kwargs = {"net_arch": paper["policy_kwargs"]["net_arch"], **RECOMMENDED["policy_kwargs"]}
    assert ours == {**paper, **RECOMMENDED, "policy_kwargs": policy_kwargs}
    defaults = inspect.signature(DIPO).parameters
    for name, value in paper.items():
        if name != "policy_kwargs":
            assert defaults[name].default == value, name

    before = str(RECOMMENDED)
    model, plain = (DIPO("MlpPolicy", TinyEnv(), device="cpu", **given) for given in (RECOMMENDED, {}))
    assert isinstance(model.actor, FlowActor) and isinstance(model.critic, QuantileCritic) and model.critic.layer_norm
    assert (model.action_lr, model.action_gradient_steps) == (0.12, 5)
    assert str(RECOMMENDED) == before, "SB3 has written into it"
    explicit = DIPO("MlpPolicy", TinyEnv(), device="cpu", seed=0, policy_kwargs=paper["policy_kwargs"])
    assert plain.actor.num_train_timesteps == explicit.actor.num_train_timesteps == 100
    assert str(plain.policy) == str(explicit.policy)


def test_what_was_trained_keeps_its_values() -> None:
    """The returns in the comments belong to them."""
    differ = {
        env: {name: value for name, value in entries()[env].items() if entries()["default"].get(name) != value}
        for env in ("Pendulum-v1", "sb3_dipo/MultiGoal-v0")
    }
    k20 = "dict(net_arch=[256, 256, 256], num_train_timesteps=20, beta_schedule='cosine')"
    assert all(each.pop("policy_kwargs") == k20 for each in differ.values())
    assert differ == {
        "Pendulum-v1": dict(n_timesteps=20_000, learning_starts=1_000, action_lr=0.03, action_gradient_steps=10),
        "sb3_dipo/MultiGoal-v0": dict(n_timesteps=11_000, learning_starts=1_000, action_lr=0.03, action_gradient_steps=20),
    }


def test_the_paper_s_hyper_parameters_by_the_name_of_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    manager = experiment("HalfCheetah-v5", {"buffer_size": 100}, config="sb3_dipo.hyperparams.dipo_paper")
    model = set_up(manager)
    assert "Loading hyperparameters from: sb3_dipo.hyperparams.dipo_paper" in capsys.readouterr().out
    assert model.actor.num_train_timesteps == 100 and (model.action_lr, model.action_gradient_steps) == (0.03, 40)


@pytest.mark.parametrize(("file", "env"), [(file, env) for file in (YAML, PAPER) for env in entries(file)])
def test_entry_says_whether_it_was_trained(file: pathlib.Path, env: str) -> None:
    comment = re.search(rf"((?:^#.*\n)+){re.escape(env)}:", file.read_text(), re.MULTILINE)
    assert comment is not None, "a comment must stand right above"
    assert re.search(r"Not trained|[Rr]eturn.*-?\d", comment[1])


@pytest.mark.parametrize("suffix", ["yml", "py"])
def test_a_file_of_ones_own_is_used(suffix: str, folder: pathlib.Path) -> None:
    entry = {"n_timesteps": 77, "policy": "MlpPolicy", "buffer_size": 100, "tau": 0.25}
    text = {"yml": yaml.dump({"default": entry}), "py": f"hyperparams = {{'default': {entry}}}"}[suffix]
    (folder / f"mine.{suffix}").write_text(text)
    manager = experiment("Tiny-v0", config=f"mine.{suffix}")
    model = set_up(manager)
    assert (manager.n_timesteps, model.tau, model.max_grad_norm, model.learning_starts) == (77, 0.25, 2.0, 10_000)


@pytest.mark.parametrize("config", ["missing.yml", "dipo.yml", "hyperparams/dipo.yml", "absolute"])
def test_a_missing_file_is_not_replaced_by_ours(config: str, folder: pathlib.Path) -> None:
    config = str(folder / "hyperparams" / "dipo.yml") if config == "absolute" else config
    with pytest.raises(FileNotFoundError, match=config):
        train("-conf", config)
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("place", ["package", "checkout"])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_file_in_rl_zoo3_has_precedence(
    theirs: bool, place: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the zoo have hyper-parameters for DIPO one day. They lie in its package, or beside it in a checkout."""
    package = folder / "site" / "rl_zoo3"
    hyperparams = (package if place == "package" else package.parent) / "hyperparams"
    for path in (package, hyperparams):
        path.mkdir(parents=True)
    for module in (rl_zoo3, rl_zoo3.exp_manager):
        monkeypatch.setattr(module, "__file__", str(package / pathlib.Path(str(module.__file__)).name))
    if theirs:
        (hyperparams / "dipo.yml").write_text(yaml.dump({"default": {**entries()["default"], "tau": 0.25}}))
    assert set_up(experiment("Tiny-v0", {"buffer_size": 100})).tau == (0.25 if theirs else 0.005)


def test_other_algorithms_read_their_own_file() -> None:
    manager = experiment("Pendulum-v1", algo="sac")
    hyperparams, _ = manager.read_hyperparameters()
    assert pathlib.Path(manager.config) == pathlib.Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml"
    assert "action_lr" not in hyperparams
    with pytest.raises(FileNotFoundError):
        experiment("Tiny-v0", algo="sbx").read_hyperparameters()


# ------------------------------------------------------------------------------------------------- tuning

NO_HER = {"using_her_replay_buffer": False, "her_kwargs": {}}
WITH_HER = {"using_her_replay_buffer": True, "her_kwargs": {"copy_info_dict": True}}
LOWEST: dict[str, Any] = {
    "one_minus_gamma": 1e-4,
    "batch_size_pow": 5,
    "learning_rate": 1e-5,
    "train_freq": 1,
    "tau": 1e-3,
    "net_arch": "small",
    "action_lr": 3e-3,
    "action_gradient_steps": 1,
    "action_grad_norm_ratio": 0.03,
    "persist_improved_actions": True,
    "bound_shift": True,
    "max_action_shift": 0.05,
    "behaviour_candidates": 1,
    "layer_norm": False,
    "n_quantiles": 5,
    "top_quantiles_to_drop_per_net": 0,
    "flow_steps": 1,
    "num_train_timesteps": 5,
    "inference_fraction": 0.2,
    "eta": 0.0,
    "n_sampled_goal": 1,
    "goal_selection_strategy": "final",
}
HIGHEST: dict[str, Any] = {
    "one_minus_gamma": 0.03,
    "batch_size_pow": 9,
    "learning_rate": 2e-3,
    "train_freq": 10,
    "tau": 0.08,
    "net_arch": "large",
    "action_lr": 0.3,
    "action_gradient_steps": 40,
    "action_grad_norm_ratio": 1.0,
    "persist_improved_actions": False,
    "bound_shift": True,
    "max_action_shift": 1.0,
    "behaviour_candidates": 8,
    "layer_norm": True,
    "n_quantiles": 50,
    "top_quantiles_to_drop_per_net": 4,
    "flow_steps": 10,
    "num_train_timesteps": 100,
    "inference_fraction": 1.0,
    "eta": 1.0,
    "n_sampled_goal": 5,
    "goal_selection_strategy": "future",
}
SOLVERS = [(schedule, solver) for schedule in ("cosine", "vp", "linear", "ou") for solver in ("ddpm", "ddim", "dpmpp_2m")]
SOLVERS.append(("ou", "exponential_integrator"))
CHOICES = {"action_gradient_start": "replay", "actor": "diffusion", "critic": "ensemble"}


def build(hyperparams: dict[str, Any], her: bool = False) -> DIPO:
    """As the zoo does it in a trial; it prunes no errors there."""
    settings: dict[str, Any] = {"buffer_size": 100, "device": "cpu", "seed": None, "verbose": 0, "tensorboard_log": None}
    if her:
        return DIPO("MultiInputPolicy", goal_envs(), replay_buffer_class=HerReplayBuffer, **settings, **hyperparams)
    return DIPO("MlpPolicy", TinyEnv(), **settings, **hyperparams)


def check(trial: Any, her: bool) -> dict[str, Any]:
    """Sample, build, and what ``--trial-id`` makes of it must be the same."""
    hyperparams = sample_dipo_params(trial, 2, 1, WITH_HER if her else NO_HER)
    model = build(hyperparams, her)
    params = deepcopy(trial.params)
    converted = convert_dipo_params(trial.params)
    assert trial.params == params
    if her:
        kwargs = hyperparams["replay_buffer_kwargs"]
        assert isinstance(model.replay_buffer, DIPOHerReplayBuffer) and model.replay_buffer.copy_info_dict
        assert model.replay_buffer.n_sampled_goal == kwargs["n_sampled_goal"] == params["n_sampled_goal"]
        assert kwargs["goal_selection_strategy"] == params["goal_selection_strategy"]
        # the trial does not tell what the YAML gave
        converted["replay_buffer_kwargs"] = {**WITH_HER["her_kwargs"], **converted["replay_buffer_kwargs"]}  # type: ignore[dict-item]
    assert converted == hyperparams
    return hyperparams


@pytest.mark.parametrize("her", [False, True])
def test_each_suggestion_can_be_built(her: bool) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sampled: dict[str, set[Any]] = {}
    for _ in range(100):
        trial = study.ask()
        hyperparams = check(trial, her)
        policy_kwargs = hyperparams["policy_kwargs"]
        flat = {**hyperparams, **hyperparams.get("replay_buffer_kwargs", {}), **policy_kwargs}
        for name, value in flat.items():
            sampled.setdefault(name, set()).add(str(value))

        assert hyperparams["gradient_steps"] == hyperparams["train_freq"]
        assert trial.user_attrs["gamma"] == hyperparams["gamma"] < 1
        assert trial.user_attrs["batch_size"] == hyperparams["batch_size"]
        solver = policy_kwargs["solver"]
        # always there, in the place of what may have been given beside the search
        bounded = hyperparams["max_action_shift"] is not None
        assert bounded == (hyperparams["action_gradient_start"] == "replay" and trial.params["bound_shift"])
        assert ("n_quantiles" in policy_kwargs) == (policy_kwargs["critic"] == "quantile")
        assert policy_kwargs["samplers"]["behaviour"]["num_candidates"] == trial.params["behaviour_candidates"]
        if policy_kwargs["actor"] == "flow":
            assert solver in FLOW_SOLVERS and "beta_schedule" not in policy_kwargs
            assert policy_kwargs["num_inference_steps"] == trial.params["flow_steps"]
            continue
        assert ("eta" in policy_kwargs) == (solver == "ddim")
        assert ("num_inference_steps" in policy_kwargs) == (solver != "exponential_integrator")
        assert solver != "exponential_integrator" or policy_kwargs["beta_schedule"] == "ou"
        assert 1 <= policy_kwargs.get("num_inference_steps", 1) <= policy_kwargs["num_train_timesteps"]
    named = (
        "learning_rate batch_size gamma tau train_freq net_arch num_train_timesteps beta_schedule solver eta "
        "num_inference_steps action_lr action_gradient_steps action_grad_norm_ratio persist_improved_actions "
        "action_gradient_start max_action_shift actor samplers critic layer_norm n_quantiles top_quantiles_to_drop_per_net"
    )
    named += " n_sampled_goal goal_selection_strategy" if her else ""
    assert [name for name in named.split() if len(sampled.get(name, ())) < 2] == []
    assert sampled["beta_schedule"] == {schedule for schedule, _ in SOLVERS}
    assert sampled["solver"] == {*(solver for _, solver in SOLVERS), *FLOW_SOLVERS}


@pytest.mark.parametrize("her", [False, True])
@pytest.mark.parametrize("values", [LOWEST, HIGHEST], ids=["lowest", "highest"])
@pytest.mark.parametrize("beta_schedule, solver", SOLVERS)
def test_ends_of_the_ranges_can_be_built(beta_schedule: str, solver: str, values: dict[str, Any], her: bool) -> None:
    solver_name = "ou_solver" if beta_schedule == "ou" else "solver"
    trial = optuna.trial.FixedTrial({**CHOICES, **values, "beta_schedule": beta_schedule, solver_name: solver})
    hyperparams = check(trial, her)
    if solver != "exponential_integrator":
        assert hyperparams["policy_kwargs"]["num_inference_steps"] == {5: 1, 100: 100}[values["num_train_timesteps"]]
    # a value outside its range would be a warning, and so an error
    assert set(trial.distributions) <= {*CHOICES, *values, "beta_schedule", solver_name}


@pytest.mark.parametrize("values", [LOWEST, HIGHEST], ids=["lowest", "highest"])
@pytest.mark.parametrize("action_gradient_start", ["replay", "policy"])
def test_ends_of_the_options_ranges_can_be_built(action_gradient_start: str, values: dict[str, Any]) -> None:
    choices = {"action_gradient_start": action_gradient_start, "actor": "flow", "critic": "quantile"}
    for flow_solver in FLOW_SOLVERS:
        trial = optuna.trial.FixedTrial({**values, **choices, "flow_solver": flow_solver})
        hyperparams = check(trial, False)
        assert hyperparams.get("max_action_shift") == (
            values["max_action_shift"] if action_gradient_start == "replay" else None
        )
        for name in ("n_quantiles", "top_quantiles_to_drop_per_net", "layer_norm"):
            assert hyperparams["policy_kwargs"][name] == values[name]


STUDY = ("-optimize", "--storage", "study.log", "--study-name", "s", "--sampler", "random", "--no-optim-plots")
# Optuna calls the file storage experimental
JOURNAL = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def load_study() -> optuna.Study:
    return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend("study.log")))


def tuned_settings(model: DIPO) -> dict[str, Any]:
    """What tuning has set."""
    names = "batch_size gamma tau train_freq gradient_steps action_lr action_gradient_steps action_grad_norm_ratio"
    names += " persist_improved_actions max_action_shift action_gradient_start policy_kwargs samplers"
    values = {name: getattr(model, name) for name in names.split()}
    return {**values, "learning_rate": model.lr_schedule(1.0)}


@JOURNAL
def test_a_study_and_its_trials_again(agents: list[DIPO], folder: pathlib.Path) -> None:
    train(*STUDY, "--n-trials", 3, "--eval-episodes", 1, n_timesteps=40, learning_starts=30)
    trials = load_study().trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 3
    assert [trial.params for trial in trials[:2]] != [trial.params for trial in trials[1:]]
    assert all(model._n_updates >= 1 for model in agents)
    tuned = [tuned_settings(model) for model in agents]
    assert list((folder / "logs" / "dipo").glob("report_Tiny-v0_3-trials-40-random-median_*.csv"))

    # The zoo takes trial 0 for none. Values of the command line would have precedence: none of those that were tuned.
    for trial in (1, 2):
        del agents[:]
        run("train", "--algo", "dipo", "--env", "Tiny-v0", *STUDY[1:-1], "--trial-id", trial, "--device", "cpu", "--eval-freq",
            -1, "-n", 40, "-params", "learning_starts:30", "buffer_size:1000")  # fmt: skip
        assert tuned_settings(agents[0]) == tuned[trial]
        saved = yaml.unsafe_load((folder / "logs" / "dipo" / f"Tiny-v0_{trial + 1}" / "Tiny-v0" / "config.yml").read_text())
        assert dict(saved)["policy_kwargs"] == tuned[trial]["policy_kwargs"]
        enjoy()


HER_YAML = """
Goal-v0:
  n_timesteps: 60
  policy: 'MultiInputPolicy'
  learning_starts: 20
  buffer_size: 1000
  batch_size: 8
  action_gradient_steps: 2
  replay_buffer_class: HerReplayBuffer
  replay_buffer_kwargs: "dict(goal_selection_strategy='final', n_sampled_goal=2)"
  policy_kwargs: "dict(net_arch=[8], num_train_timesteps=3)"
"""


@JOURNAL
def test_a_study_with_hindsight_replay(agents: list[DIPO], folder: pathlib.Path) -> None:
    (folder / "her.yml").write_text(HER_YAML)
    command = ("train", "--algo", "dipo", "--env", "Goal-v0", "-conf", "her.yml", "--device", "cpu", "--seed", 3, "-n", 25)
    run(*command, *STUDY, "--n-trials", 2, "--eval-episodes", 1)
    params = load_study().trials[1].params
    assert isinstance(agents[1].replay_buffer, DIPOHerReplayBuffer)
    run(*command, *STUDY[1:-1], "--trial-id", 1, "--eval-freq", -1)
    assert tuned_settings(agents[2]) == tuned_settings(agents[1])
    for model in agents[1:]:
        assert isinstance(model.replay_buffer, DIPOHerReplayBuffer)
        assert model.replay_buffer.n_sampled_goal == params["n_sampled_goal"]
        assert model.replay_buffer.goal_selection_strategy.name.lower() == params["goal_selection_strategy"]


@JOURNAL
def test_a_trial_without_numbers_is_pruned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(trial: optuna.Trial, *args: Any) -> dict[str, Any]:
        monkeypatch.setattr(SickEnv, "sick", trial.number == 1)
        return sample_dipo_params(trial, *args)

    monkeypatch.setitem(rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER, "dipo", sample)
    train(*STUDY, "--n-trials", 3, "--eval-episodes", 1, env="Sick-v0", n_timesteps=40, learning_starts=25)
    states = [trial.state.name for trial in load_study().trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert "`critic_loss` or its gradient is not finite" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- train, enjoy, continue


def test_train_and_enjoy(
    agents: list[DIPO], inputs: list[Any], folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("-tb", "tensorboard", buffer_size=1_000_000, persist_improved_actions=False)
    out = folder / "logs" / "dipo" / "Tiny-v0_1"
    assert {path.name for path in out.iterdir()} == {"0.monitor.csv", "Tiny-v0", "Tiny-v0.zip"}
    assert agents[0]._n_updates == 40 and list((folder / "tensorboard" / "Tiny-v0").glob("DIPO_1/events*"))
    config = dict(yaml.unsafe_load((out / "Tiny-v0" / "config.yml").read_text()))
    assert config == {**entries()["default"], **TINY, "buffer_size": 1_000_000, "persist_improved_actions": False}

    capsys.readouterr()
    del inputs[:]
    enjoy()
    printed = capsys.readouterr().out
    assert "Loading logs/dipo/Tiny-v0_1/Tiny-v0.zip" in printed and "4 Episodes" in printed and "Mean reward: -" in printed
    loaded = agents[1]
    # deterministic, and as it was trained
    states = [np.asarray(observations) for observations in inputs]
    assert len(states) == 20
    for state in states[:5]:
        actions = [model.predict(state, deterministic=True)[0] for model in agents]
        assert np.array_equal(actions[0], actions[1])
    # the zoo shrinks the buffers of the algorithms that it knows; ours has its full size, and takes no memory
    assert loaded.buffer_size == 1_000_000 and isinstance(loaded.replay_buffer, DIPOReplayBuffer)
    buffers: list[Any] = [model.replay_buffer for model in (loaded, agents[0])]
    assert buffers[0].size() == 0 < buffers[1].size()
    assert loaded.persist_improved_actions is False


def test_enjoy_with_options(inputs: list[Any]) -> None:
    train()
    enjoy("--stochastic", "--progress", "--norm-reward", "--seed", 3)
    with pytest.raises(AssertionError, match="logs/dipo/Tiny-v0_2 folder was not found"):
        enjoy("--exp-id", 2)


def test_continue_training(
    agents: list[DIPO], monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    received: list[Any] = []
    load = DIPO.load_replay_buffer

    def watched(self: DIPO, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        received.append(deepcopy(self.replay_buffer))

    monkeypatch.setattr(DIPO, "load_replay_buffer", watched)
    train("--save-replay-buffer", learning_rate=0.001)
    zip_file = folder / "logs" / "dipo" / "Tiny-v0_1" / "Tiny-v0.zip"
    first = agents[0].replay_buffer
    assert isinstance(first, DIPOReplayBuffer) and (zip_file.parent / "replay_buffer.pkl").exists()
    improved = first.improved_actions.copy()
    assert not np.array_equal(improved, first.actions)

    changes: dict[str, Any] = {"learning_rate": 0.002, "tau": 0.5, "learning_starts": 0, "policy_kwargs": {"actor": "vae"}}
    train("-i", zip_file, "--save-replay-buffer", **changes)
    second = agents[1]
    assert "Loading replay buffer" in capsys.readouterr().out and len(received) == 1
    assert received[0].pos == 60 and np.array_equal(received[0].improved_actions, improved)
    assert second.replay_buffer is not None and second.replay_buffer.pos == 120
    assert second._n_updates == 40 + 60
    assert second.actor.optimizer.param_groups[0]["lr"] == second.critic.optimizer.param_groups[0]["lr"] == 0.002
    # the settings are those of the YAML, but for the policy's
    assert second.tau == 0.5 and second.policy_kwargs["num_train_timesteps"] == 3 and "actor" not in second.policy_kwargs
    assert zip_file.parent.with_name("Tiny-v0_2").is_dir()
    enjoy()


def test_continue_training_without_the_replay_buffer(agents: list[DIPO], folder: pathlib.Path) -> None:
    train()
    train("-i", folder / "logs" / "dipo" / "Tiny-v0_1" / "Tiny-v0.zip")
    assert agents[1].replay_buffer is not None and agents[1].replay_buffer.pos == 60
    assert agents[1]._n_updates == 40 + 40


def test_continue_with_the_replay_buffer_of_another_algorithm(agents: list[DIPO], folder: pathlib.Path) -> None:
    """A buffer of SAC holds no improved actions."""
    train()
    own = folder / "logs" / "dipo" / "Tiny-v0_1"
    train("--save-replay-buffer", algo="sac", n_timesteps=30, learning_starts=25, buffer_size=1000,
          policy_kwargs={"net_arch": [8]})  # fmt: skip
    shutil.copy(folder / "logs" / "sac" / "Tiny-v0_1" / "replay_buffer.pkl", own)
    train("-i", own / "Tiny-v0.zip")
    assert isinstance(agents[1].replay_buffer, DIPOReplayBuffer) and agents[1].replay_buffer.pos == 30 + 60


def test_checkpoints(agents: list[DIPO], folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--save-freq", 25, "--eval-freq", 20, "--eval-episodes", 2)
    out = folder / "logs" / "dipo" / "Tiny-v0_1"
    assert {path.name for path in out.glob("*.zip")} == {
        "Tiny-v0.zip", "best_model.zip", "rl_model_25_steps.zip", "rl_model_50_steps.zip",
    }  # fmt: skip
    assert np.load(out / "evaluations.npz")["results"].shape == (3, 2)
    assert rl_zoo3.get_trained_models("logs") == {"dipo-Tiny-v0": ("dipo", "Tiny-v0")}
    for argument, steps, file in (
        (["--load-last-checkpoint"], (50,), "rl_model_50_steps"),
        (["--load-checkpoint", 25], (25,), "rl_model_25_steps"),
        (["--load-best"], (20, 40, 60), "best_model"),
    ):
        capsys.readouterr()
        enjoy(*argument)
        assert f"Loading logs/dipo/Tiny-v0_1/{file}.zip" in capsys.readouterr().out
        assert agents[-1].num_timesteps in steps


@pytest.mark.slow
def test_environments_in_processes(agents: list[DIPO], folder: pathlib.Path) -> None:
    train("--vec-env", "subproc", env="Pendulum-v1", n_envs=2, gradient_steps=-1)
    assert agents[0].n_envs == 2 and isinstance(agents[0].env.unwrapped, SubprocVecEnv)  # type: ignore[union-attr]
    assert agents[0].num_timesteps == 60 and agents[0]._n_updates >= 38
    assert len(list((folder / "logs" / "dipo" / "Pendulum-v1_1").glob("*.monitor.csv"))) == 2
    enjoy("--n-envs", 2, env="Pendulum-v1")
    assert agents[1].num_timesteps == 60


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train("--progress")
    assert re.search(r"60/60", "".join(capsys.readouterr()))


def test_tracking(agents: list[DIPO], monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
    """Weights & Biases reads the files of TensorBoard; it stands in for itself here."""
    started: dict[str, Any] = {}
    run_config: dict[str, Any] = {}

    def init(**kwargs: Any) -> Any:
        started.update(kwargs)
        return types.SimpleNamespace(config=types.SimpleNamespace(setdefaults=run_config.update))

    wandb = types.ModuleType("wandb")
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train("--track", "--wandb-project-name", "here")
    assert started["project"] == "here" and started["name"].startswith("Tiny-v0__dipo__1__") and started["sync_tensorboard"]
    assert run_config["saved_hyperparams"]["action_gradient_steps"] == 2
    assert list((folder / "runs" / started["name"] / "Tiny-v0").glob("DIPO_1/events*"))


# ------------------------------------------------------------------------------------------------- what a YAML may say


def normalization(model: DIPO) -> VecNormalize:
    wrapper = model.get_vec_normalize_env()
    assert wrapper is not None
    return wrapper


@pytest.mark.parametrize(
    "normalize, norm_reward",
    [(True, True), ("dict(norm_obs=True, norm_reward=False)", False), ({"norm_reward": False}, False)],
)
def test_normalize(normalize: Any, norm_reward: bool, agents: list[DIPO], inputs: list[Any], folder: pathlib.Path) -> None:
    train("--eval-freq", 20, "--eval-episodes", 1, "--save-replay-buffer", normalize=normalize, gamma=0.9)
    wrapper = normalization(agents[0])
    assert wrapper is agents[0]._vec_normalize_env
    assert wrapper.norm_obs and wrapper.norm_reward == norm_reward and wrapper.gamma == 0.9
    out = folder / "logs" / "dipo" / "Tiny-v0_1"
    assert (out / "Tiny-v0" / "vecnormalize.pkl").exists()
    # observations are stored as they are, in [-1, 1], and normalised when they are sampled and acted on
    replay_buffer = agents[0].replay_buffer
    assert isinstance(replay_buffer, DIPOReplayBuffer) and np.abs(replay_buffer.observations).max() <= 1
    for batch in (replay_buffer.sample(50, wrapper), replay_buffer.sample_improved(50, wrapper)):
        assert isinstance(batch.observations, th.Tensor) and batch.observations.abs().max() > 1.2
    del inputs[:]
    enjoy()
    assert len(inputs) == 20 and max(np.abs(observation).max() for observation in inputs) > 1.2
    train("-i", out / "Tiny-v0.zip", normalize=normalize)
    statistics = [normalization(model).obs_rms for model in (agents[0], agents[-1])]
    assert isinstance(statistics[0], RunningMeanStd) and isinstance(statistics[1], RunningMeanStd)
    assert 60 < statistics[0].count < statistics[1].count


def test_env_wrapper_and_frame_stack(agents: list[DIPO], inputs: list[Any]) -> None:
    rescale = {"gymnasium.wrappers.RescaleAction": {"min_action": -2, "max_action": 2}}
    train(env_wrapper=[{"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 2}}, rescale], frame_stack=3)
    # (observation of 3 + action of 2) x 2, x 3
    assert agents[0].observation_space.shape == (30,)
    assert isinstance(agents[0].action_space, spaces.Box) and agents[0].action_space.high.tolist() == [2, 2]
    del inputs[:]
    enjoy()
    assert agents[1].observation_space.shape == (30,) and {observation.shape for observation in inputs} == {(1, 30)}


@pytest.mark.parametrize(
    "noise_type, noise", [("normal", NormalActionNoise), ("ornstein-uhlenbeck", OrnsteinUhlenbeckActionNoise)]
)
def test_action_noise(noise_type: str, noise: type[Any], agents: list[DIPO], folder: pathlib.Path) -> None:
    train(noise_type=noise_type, noise_std=0.25)
    assert isinstance(agents[0].action_noise, noise) and np.array_equal(agents[0].action_noise._sigma, [0.25, 0.25])
    enjoy()
    train("-i", folder / "logs" / "dipo" / "Tiny-v0_1" / "Tiny-v0.zip", noise_type=noise_type, noise_std=0.5)
    assert np.array_equal(agents[-1].action_noise._sigma, [0.5, 0.5])  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated:UserWarning")  # SB3, in -i
def test_hindsight_replay(agents: list[DIPO], folder: pathlib.Path) -> None:
    (folder / "her.yml").write_text(HER_YAML)
    command = ("train", "--algo", "dipo", "--env", "Goal-v0", "-conf", "her.yml", "--device", "cpu", "--eval-freq", -1)
    run(*command, "--save-replay-buffer")
    first = agents[0].replay_buffer
    assert isinstance(first, DIPOHerReplayBuffer) and first.n_sampled_goal == 2 and first.pos == 60
    assert first.goal_selection_strategy.name == "FINAL"
    assert not np.array_equal(first.improved_actions, first.actions)

    enjoy(env="Goal-v0")
    loaded = agents[1].replay_buffer
    assert isinstance(loaded, DIPOHerReplayBuffer) and loaded.size() == 0

    run(*command, "-i", "logs/dipo/Goal-v0_1/Goal-v0.zip")
    again = agents[2].replay_buffer
    assert isinstance(again, DIPOHerReplayBuffer) and again.pos == 120 and agents[2]._n_updates > agents[0]._n_updates


def test_n_steps(agents: list[DIPO], folder: pathlib.Path) -> None:
    train("--save-replay-buffer", n_steps=3, gamma=0.9)
    enjoy()
    train("-i", folder / "logs" / "dipo" / "Tiny-v0_1" / "Tiny-v0.zip", n_steps=3, gamma=0.9)
    for model in agents:
        assert isinstance(model.replay_buffer, DIPONStepReplayBuffer) and model.n_steps == 3
        assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.9)
    buffers: list[Any] = [model.replay_buffer for model in agents]
    assert [buffer.size() == 0 for buffer in buffers] == [False, True, False]


def test_replay_buffer_class_and_policy_class(agents: list[DIPO]) -> None:
    """The zoo evaluates the one and imports the other."""
    train(replay_buffer_class="__import__('sb3_dipo').DIPONStepReplayBuffer", n_steps=2, policy="sb3_dipo.DIPOPolicy")
    enjoy()
    for model in agents:
        assert type(model.replay_buffer) is DIPONStepReplayBuffer and type(model.policy) is sb3_dipo.DIPOPolicy


@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated:UserWarning")  # SB3, in -i
def test_optimize_memory_usage(agents: list[DIPO]) -> None:
    kwargs = {"handle_timeout_termination": False}
    train("--save-replay-buffer", optimize_memory_usage=True, replay_buffer_kwargs=kwargs, buffer_size=30)
    enjoy()
    train("-i", "logs/dipo/Tiny-v0_1/Tiny-v0.zip", optimize_memory_usage=True, replay_buffer_kwargs=kwargs, buffer_size=30)
    for model in agents:
        assert isinstance(model.replay_buffer, DIPOReplayBuffer) and model.replay_buffer.optimize_memory_usage
        assert not hasattr(model.replay_buffer, "next_observations")


@pytest.mark.parametrize(
    "actor, critic", [("lin_1e-3", "lin_4e-3"), (0.001, "lin_4e-3"), ("lin_1e-3", 0.004), ("lin_1e-3", None)]
)
def test_learning_rates(actor: Any, critic: Any, agents: list[DIPO], folder: pathlib.Path) -> None:
    rates = {"learning_rate": actor, "qf_learning_rate": critic}
    train(**rates)

    def expected(progress: float) -> tuple[float, float]:
        of_actor = 0.001 * (progress if actor == "lin_1e-3" else 1.0)
        of_critic = of_actor if critic is None else 0.004 * (progress if critic == "lin_4e-3" else 1.0)
        return of_actor, of_critic

    def check_rates(model: DIPO) -> None:
        for progress in (1.0, 0.5, 0.0):
            assert (model.lr_schedule(progress), model.qf_lr_schedule(progress)) == pytest.approx(expected(progress))
        # as the last update found it: progress is counted before the step
        last = (model.actor.optimizer.param_groups[0]["lr"], model.critic.optimizer.param_groups[0]["lr"])
        assert last == pytest.approx(expected(0.0), abs=1e-9)

    check_rates(agents[0])
    enjoy()
    train("-i", folder / "logs" / "dipo" / "Tiny-v0_1" / "Tiny-v0.zip", **rates)
    check_rates(agents[-1])


# The zoo leaves the environment open when the agent cannot be built
@pytest.mark.filterwarnings("ignore:unclosed file .*monitor.csv:ResourceWarning")
@pytest.mark.parametrize("rate, error", [("lin", "unpack"), ("lin_x", "float"), (-0.1, "`qf_learning_rate`")])
def test_wrong_learning_rate_of_the_critics(rate: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        train(qf_learning_rate=rate)


def test_learning_after_each_episode(agents: list[DIPO], folder: pathlib.Path) -> None:
    (folder / "mine.yml").write_text(yaml.dump({"default": {**TINY, "policy": "MlpPolicy", "train_freq": [1, "episode"]}}))
    run("train", "--algo", "dipo", "--env", "Tiny-v0", "-conf", "mine.yml", "--device", "cpu", "--eval-freq", -1)
    assert vars(agents[0])["train_freq"] == TrainFreq(1, TrainFrequencyUnit.EPISODE) and agents[0]._n_updates == 8
    enjoy()


# ------------------------------------------------------------------------------------------------- video, plots, hub


def test_record_video(agents: list[DIPO], folder: pathlib.Path) -> None:
    pytest.importorskip("moviepy")
    train(env="Pendulum-v1", buffer_size=1_000_000)
    run("record_video", "--algo", "dipo", "--env", "Pendulum-v1", "-f", "logs", "-n", 10)
    (video,) = (folder / "logs" / "dipo" / "Pendulum-v1_1" / "videos").glob("*.mp4")
    assert video.name == "final-model-dipo-Pendulum-v1-step-0-to-step-10.mp4" and video.stat().st_size > 1000
    replay_buffer: Any = agents[1].replay_buffer
    assert replay_buffer.size() == 0


@pytest.fixture
def plt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Without a display; the zoo's plots need ``rl_zoo3[plots]``."""
    for module in ("pytablewriter", "seaborn", "scipy"):
        pytest.importorskip(module)
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    with matplotlib.rc_context():
        yield pyplot
        pyplot.close("all")


def test_plots_beside_sac_and_td3(plt: Any, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots = importlib.import_module("rl_zoo3.plots")
    small = {"learning_starts": 20, "buffer_size": 1000, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    for algo in ("dipo", "sac", "td3"):
        of_algo: dict[str, Any] = TINY if algo == "dipo" else small
        for _ in range(2):
            train("--eval-freq", 15, "--eval-episodes", 2, algo=algo, **{**of_algo, "n_timesteps": 45})
    folders = ("-a", "dipo", "sac", "td3", "-e", "Tiny", "-f", "logs")
    capsys.readouterr()

    def plot(script: str, *arguments: Any) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            getattr(plots, script)()
        return capsys.readouterr().out

    printed = plot("all_plots", *folders, "--no-display", "-o", "results", "-l", "here", "-print")
    assert re.search(r"\|Environments\| *DIPO *\| *SAC *\| *TD3 *\|", printed) and "Tiny-DIPO-here: 2" in printed
    (axes,) = plt.gcf().axes
    assert [line.get_label() for line in axes.lines] == ["DIPO-here", "SAC-here", "TD3-here"]
    results = pickle.loads((folder / "results.pkl").read_bytes())["Tiny"]
    assert set(results) == {"DIPO-here", "SAC-here", "TD3-here"}
    runs = [np.load(path)["results"] for path in sorted((folder / "logs" / "dipo").glob("*/evaluations.npz"))]
    assert runs[0].shape == (3, 2)
    np.testing.assert_allclose(results["DIPO-here"]["mean"], np.mean(runs, axis=(0, 2)))

    plt.close("all")
    printed = plot("plot_from_file", "-i", "results", "-o", "plot.svg", "--boxplot")
    assert "DIPO" in printed and (folder / "plot.svg").read_text().startswith("<?xml")

    plt.close("all")
    plot("plot_train", "-a", "dipo", "-e", "Tiny", "-f", "logs", "-w", 2)
    (axes,) = plt.gcf().axes
    assert {line.get_label() for line in axes.lines} == {"Tiny-v0_1", "Tiny-v0_2"}
    # 9 episodes, averaged over 2
    assert [len(line.get_xdata()) for line in axes.lines] == [8, 8]


class Hub:
    """The hub of Hugging Face as a folder."""

    folder = pathlib.Path()

    def create_repo(self, **kwargs: Any) -> str:
        (self.folder / kwargs["repo_id"]).mkdir(parents=True)
        return f"https://example.org/{kwargs['repo_id']}"

    def snapshot_download(self, repo_id: str, local_dir: pathlib.Path) -> None:
        shutil.copytree(self.folder / repo_id, local_dir)

    def upload_folder(self, repo_id: str, folder_path: pathlib.Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    @classmethod
    def load(cls, repo_id: str, filename: str) -> str:
        path = cls.folder / repo_id / filename
        if not path.exists():
            raise HTTPError("404")
        return str(path)


@pytest.mark.parametrize("normalize", [False, True])
def test_hub(
    normalize: bool,
    agents: list[DIPO],
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Hub, "folder", folder / "hub_server")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(rl_zoo3.load_from_hub, "load_from_hub", Hub.load)
    # rl_zoo3 2.9.2 asks for a name that its dependency has made private: its script starts for no algorithm
    hub_functions = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub_functions, "generate_metadata"):
        monkeypatch.setattr(hub_functions, "generate_metadata", hub_functions._generate_metadata, raising=False)

    train("--eval-freq", 20, "--eval-episodes", 1, normalize=normalize)
    run("push_to_hub", "--algo", "dipo", "--env", "Tiny-v0", "-f", "logs", "-orga", "sb3", "--no-render")
    pushed = folder / "hub_server" / "sb3" / "dipo-Tiny-v0"
    assert "# **DIPO** Agent playing **Tiny-v0**" in (pushed / "README.md").read_text()
    assert (pushed / "vec_normalize.pkl").exists() == normalize

    # enjoy looks for pretrained agents on the hub when it is not told where to look
    capsys.readouterr()
    run("enjoy", "--algo", "dipo", "--env", "Tiny-v0", "--no-render", "-n", 10, "--device", "cpu")
    printed = capsys.readouterr().out
    assert "Downloading from https://huggingface.co/sb3/dipo-Tiny-v0" in printed and "2 Episodes" in printed
    assert (folder / "rl-trained-agents" / "dipo" / "Tiny-v0_1" / "Tiny-v0.zip").exists()
    state = np.zeros((1, 3), dtype=np.float32)
    assert np.array_equal(agents[0].predict(state, deterministic=True)[0], agents[-1].predict(state, deterministic=True)[0])
