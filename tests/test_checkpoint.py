"""Training goes on from a checkpoint as if it had never stopped, and no failure costs a checkpoint that was whole."""

import gc
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from checkpoint_run import WalkEnv, WalkWithoutState, fingerprint, make_env, make_model
from envs import goal_envs, small_dipo
from gymnasium.wrappers import TimeLimit
from sb3_contrib import TQC, CrossQ, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo import DIPO, ExactCheckpointCallback, checkpoint_folder, load_checkpoint, save_checkpoint

RUN = Path(__file__).parent / "checkpoint_run.py"
STEPS = 60


def start(folder: Path, steps: int = STEPS) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN), str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed.splitlines()


# ------------------------------------------------------------------------------------------------- to the bit

VARIANTS: dict[str, dict[str, Any]] = {
    "several environments, normalised": {},
    "one environment": {"n_envs": 1, "normalize": False},
    "n-step returns": {"n_steps": 3},
    "memory": {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    "without write-back": {"persist_improved_actions": False},
    "whole episodes": {"n_envs": 1, "train_freq": (1, "episode"), "gradient_steps": -1},
    "vae": {"policy_kwargs": {"actor": "vae", "net_arch": [8], "latent_dim": 2}},
    "flow": {"policy_kwargs": {"actor": "flow", "net_arch": [8], "num_candidates": 2}},
    "quantiles": {"policy_kwargs": {"critic": "quantile", "layer_norm": True, "net_arch": [8], "num_train_timesteps": 3}},
    "climb from the policy": {"action_gradient_start": "policy"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_learn_goes_on_from_every_checkpoint(variant: str, tmp_path: Path) -> None:
    settings = dict(VARIANTS[variant])
    env_settings = {name: settings.pop(name) for name in ("n_envs", "normalize") if name in settings}
    model = make_model(make_env(**env_settings), **settings)
    model.learn(STEPS, callback=ExactCheckpointCallback(12, tmp_path, keep=100))
    expected, total = fingerprint(model), model.num_timesteps
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) >= 4
    seen = []
    for checkpoint in checkpoints:
        model = load_checkpoint(checkpoint, make_env(**env_settings))
        seen.append(model.num_timesteps)
        model.learn(max(0, STEPS - model.num_timesteps), reset_num_timesteps=False)
        assert fingerprint(model) == expected, seen[-1]
    assert seen == sorted(set(seen)) and seen[0] < 20 and seen[-1] == total


def test_updates_go_on_in_a_new_process(tmp_path: Path) -> None:
    model = make_model(make_env(), accelerate="compile")  # "auto" is another path in the tests' own process
    model.learn(30)
    save_checkpoint(model, tmp_path)
    model.train(50, 8)
    code = (
        f"import sys; sys.path.insert(0, {str(RUN.parent)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from checkpoint_run import *\n"
        "from stable_baselines3.common.logger import configure\n"
        f"model = load_checkpoint({str(tmp_path)!r}, make_env())\n"
        "model.set_logger(configure(None, []))\n"
        "for _ in range(50): model.train(1, 8)\n"
        "print(json.dumps(fingerprint(model)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == fingerprint(model)


def test_all_random_generators_go_on(tmp_path: Path) -> None:
    model = make_model(make_env())
    model.learn(20)
    save_checkpoint(model, tmp_path)

    def draw(model: DIPO) -> list[Any]:
        return [random.random(), np.random.rand(), np.random.normal(), th.rand(1).item(), model.action_space.sample().tolist()]

    expected = draw(model)
    assert draw(load_checkpoint(tmp_path, make_env())) == expected
    assert draw(load_checkpoint(tmp_path, make_env())) == expected


def test_environments_in_other_processes_go_on(tmp_path: Path) -> None:
    """Without the wrappers that have a state: those of other processes are out of reach."""

    def make() -> SubprocVecEnv:
        return SubprocVecEnv([WalkEnv, WalkEnv])

    env = make()
    model = make_model(env)
    model.learn(40, callback=ExactCheckpointCallback(20, tmp_path, keep=9))
    env.close()
    env = make()
    resumed = load_checkpoint(sorted(tmp_path.iterdir())[0], env)
    assert resumed.num_timesteps == 20
    resumed.learn(20, reset_num_timesteps=False)
    env.close()
    assert fingerprint(resumed) == fingerprint(model)


def test_stacked_frames_go_on(tmp_path: Path) -> None:
    def make() -> VecNormalize:
        return VecNormalize(VecFrameStack(make_env(normalize=False), 3))

    model = make_model(make())
    model.learn(40, callback=ExactCheckpointCallback(20, tmp_path, keep=9))
    resumed = load_checkpoint(sorted(tmp_path.iterdir())[0], make())
    resumed.learn(20, reset_num_timesteps=False)
    assert fingerprint(resumed) == fingerprint(model)


def test_statistics_of_episodes_go_on(tmp_path: Path) -> None:
    model = make_model(make_env())
    model.learn(40, callback=ExactCheckpointCallback(20, tmp_path, keep=9))
    resumed = load_checkpoint(sorted(tmp_path.iterdir())[0], make_env())
    resumed.learn(20, reset_num_timesteps=False)

    def episodes(model: DIPO) -> list[tuple[float, int]]:
        return [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()]

    assert episodes(resumed) == episodes(model) and len(episodes(model)) > 3


OTHERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "SAC": (SAC, {}),
    "SAC, gSDE": (SAC, {"use_sde": True, "use_sde_at_warmup": True}),
    "SAC, gSDE at intervals": (SAC, {"use_sde": True, "sde_sample_freq": 3, "train_freq": 4}),
    "SAC, memory": (SAC, {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}),
    "SAC, n-step returns": (SAC, {"n_steps": 3}),
    "TD3, noise with a state": (TD3, {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.3))}),
    "TQC, gSDE": (TQC, {"use_sde": True}),
    "CrossQ": (CrossQ, {}),
    "PPO": (PPO, {"n_steps": 8}),
    "PPO, gSDE": (PPO, {"n_steps": 8, "use_sde": True}),
    "PPO, recurrent": (RecurrentPPO, {"n_steps": 8, "policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 4}}),
}


@pytest.mark.filterwarnings("ignore:.*mini-batch size:UserWarning")
@pytest.mark.filterwarnings("ignore:`n_steps=3` is ignored:UserWarning")  # SB3's own load
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_other_algorithms_go_on(name: str, n_envs: int, tmp_path: Path) -> None:
    algorithm, own = OTHERS[name]
    policy = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    settings: dict[str, Any] = {
        "learning_rate": lambda remaining: 1e-2 * remaining,
        "batch_size": 8,
        "policy_kwargs": {"net_arch": [8]},
        "seed": 5,
        "device": "cpu",
    }
    if issubclass(algorithm, OffPolicyAlgorithm):
        settings |= {"learning_starts": 12, "buffer_size": 100, "train_freq": 2}
    model = algorithm(policy, make_env(n_envs=n_envs), **settings | deepcopy(own))
    model.learn(64, callback=ExactCheckpointCallback(16, tmp_path, keep=100))
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == 4
    for checkpoint in checkpoints:
        resumed = load_checkpoint(checkpoint, make_env(n_envs=n_envs), algorithm)
        resumed.learn(64 - resumed.num_timesteps, reset_num_timesteps=False)
        assert fingerprint(resumed) == fingerprint(model), checkpoint
        assert type(getattr(resumed, "replay_buffer", None)) is type(getattr(model, "replay_buffer", None))


def test_dqn(tmp_path: Path) -> None:
    """It has no actor."""
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=8, batch_size=8, buffer_size=100, device="cpu")
    model.learn(20, callback=ExactCheckpointCallback(10, tmp_path))
    resumed = load_checkpoint(tmp_path, gym.make("CartPole-v1"), DQN)
    assert (resumed.num_timesteps, resumed.replay_buffer.pos) == (20, 20)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- other environments


def test_running_episode_is_dropped_without_a_state(tmp_path: Path) -> None:
    env = make_env(WalkWithoutState)
    model = make_model(env)
    model.learn(24)
    save_checkpoint(model, tmp_path)
    resumed = load_checkpoint(tmp_path, make_env(WalkWithoutState))
    # all that does not depend on the environment is as it was
    assert fingerprint(resumed) == {**fingerprint(model), "statistics": fingerprint(resumed)["statistics"]}
    assert resumed._last_obs is None
    resumed.learn(8, reset_num_timesteps=False)
    assert resumed.num_timesteps == 32 and resumed._n_updates > model._n_updates


def test_statistics_of_rewards_and_observations_are_kept(tmp_path: Path) -> None:
    model = make_model(make_env(WalkWithoutState))
    model.learn(24)
    save_checkpoint(model, tmp_path)
    own: Any = model.get_vec_normalize_env()
    for env in (make_env(WalkWithoutState), make_env(WalkWithoutState, normalize=False)):
        statistics: Any = load_checkpoint(tmp_path, env).get_vec_normalize_env()
        np.testing.assert_array_equal(statistics.obs_rms.mean, own.obs_rms.mean)
        assert statistics.ret_rms.var == own.ret_rms.var


def test_each_resume_has_an_episode_of_its_own(tmp_path: Path) -> None:
    model = make_model(make_env(WalkWithoutState))
    starts = []
    for _ in range(3):
        model.learn(16, reset_num_timesteps=False)
        save_checkpoint(model, tmp_path)
        model = load_checkpoint(tmp_path, make_env(WalkWithoutState))
        assert model.env is not None
        model.env.reset()
        starts.append(model.get_vec_normalize_env().get_original_obs().tolist())  # type: ignore[union-attr]
    assert starts[0] != starts[1] != starts[2]


def test_n_step_returns_stop_where_the_episode_was_dropped(tmp_path: Path) -> None:
    model = make_model(make_env(WalkWithoutState, normalize=False), n_steps=3)
    model.learn(24)
    last = model.replay_buffer.pos - 1  # type: ignore[union-attr]
    assert not model.replay_buffer.dones[last].any()  # type: ignore[union-attr]
    save_checkpoint(model, tmp_path)
    buffer: Any = load_checkpoint(tmp_path, make_env(WalkWithoutState, normalize=False)).replay_buffer
    np.testing.assert_array_equal(buffer.timeouts[last], 1)


def test_memory_efficient_buffer_ends_the_dropped_episode(tmp_path: Path) -> None:
    memory = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make_model(make_env(WalkWithoutState, normalize=False), **memory)
    model.learn(24)
    save_checkpoint(model, tmp_path)
    buffer: Any = load_checkpoint(tmp_path, make_env(WalkWithoutState, normalize=False)).replay_buffer
    np.testing.assert_array_equal(buffer.dones[buffer.pos - 1], 1)


@pytest.mark.filterwarnings("error")
def test_hindsight_replay(tmp_path: Path) -> None:
    model = small_dipo(goal_envs(2), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=20)
    model.learn(31)
    save_checkpoint(model, tmp_path)
    resumed = load_checkpoint(tmp_path, goal_envs(2))
    buffer: Any = resumed.replay_buffer
    assert (buffer.ep_length[: buffer.pos] > 0).all()  # no episode is open
    resumed.learn(20, reset_num_timesteps=False)
    assert resumed._n_updates > model._n_updates


# ------------------------------------------------------------------------------------------------- the callback


def test_callback_keeps_the_newest(tmp_path: Path) -> None:
    model = make_model(make_env(n_envs=1))
    model.learn(41, callback=ExactCheckpointCallback(10, tmp_path, keep=2))
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["checkpoint_000004", "checkpoint_000005"]
    steps = [json.loads((path / "manifest.json").read_text())["num_timesteps"] for path in kept]
    assert steps == [40, 42] == [40, model.num_timesteps]


def test_a_second_run_in_the_folder_goes_on_from_its_own(tmp_path: Path) -> None:
    for steps in (40, 20):
        make_model(make_env()).learn(steps, callback=ExactCheckpointCallback(1000, tmp_path))
    assert load_checkpoint(tmp_path, make_env()).num_timesteps == 20


def test_callback_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(make_env()).learn(16, callback=ExactCheckpointCallback(1000, tmp_path, verbose=1))
    assert capsys.readouterr().out == f"Saved {tmp_path / 'checkpoint_000001'} after 16 steps\n"


def evaluation(**kwargs: Any) -> CallbackList:
    """Evaluates after 10, 20, ... steps of one environment, and takes each result for a new best."""
    callback = EvalCallback(DummyVecEnv([lambda: Monitor(TimeLimit(WalkEnv(), 2))]), eval_freq=10, verbose=0, **kwargs)

    def forget(*_: Any) -> bool:
        callback.best_mean_reward = -np.inf
        return True

    return CallbackList([callback, ConvertCallback(forget)])


EVENTS: dict[str, tuple[Callable[[BaseCallback], BaseCallback], list[int]]] = {
    "every": (lambda saves: EveryNTimesteps(20, saves), [20, 40]),
    "every, in a list": (lambda saves: CallbackList([EveryNTimesteps(20, CallbackList([saves]))]), [20, 40]),
    "every, twice": (lambda saves: EveryNTimesteps(10, EveryNTimesteps(20, saves)), [20, 40]),
    "after an evaluation": (lambda saves: evaluation(callback_after_eval=saves), [10, 20, 30, 40, 50]),
    "new best": (lambda saves: evaluation(callback_on_new_best=saves), [10, 20, 30, 40, 50]),
    "new best, in a list": (lambda saves: evaluation(callback_on_new_best=CallbackList([saves])), [10, 20, 30, 40, 50]),
}


@pytest.mark.filterwarnings("ignore:Training and eval env:UserWarning")
@pytest.mark.parametrize("event", EVENTS)
def test_inside_another_callback(event: str, tmp_path: Path) -> None:
    wrap, steps = EVENTS[event]
    model = make_model(make_env(n_envs=1, normalize=False))
    model.learn(50, callback=wrap(ExactCheckpointCallback(1, tmp_path, keep=100)))
    checkpoints = sorted(tmp_path.iterdir())
    assert [json.loads((path / "manifest.json").read_text())["num_timesteps"] for path in checkpoints] == steps
    for checkpoint in checkpoints:
        resumed = load_checkpoint(checkpoint, make_env(n_envs=1, normalize=False))
        # the second run has the same events, as an evaluation draws random numbers, too
        left = 50 - resumed.num_timesteps
        resumed.learn(left, callback=wrap(ExactCheckpointCallback(1, tmp_path / "again")), reset_num_timesteps=False)
        assert fingerprint(resumed) == fingerprint(model), checkpoint
    load_checkpoint(tmp_path, make_env(n_envs=1, normalize=False))


def test_inside_another_callback_in_two_trainings(tmp_path: Path) -> None:
    model = make_model(make_env(n_envs=1))
    callback = EveryNTimesteps(20, ExactCheckpointCallback(1, tmp_path, keep=100))
    model.learn(30, callback=callback)
    model.learn(30, callback=callback, reset_num_timesteps=False)
    steps = [json.loads((path / "manifest.json").read_text())["num_timesteps"] for path in sorted(tmp_path.iterdir())]
    assert steps == [20, 40, 60]


def test_inside_another_callback_of_an_on_policy_algorithm(tmp_path: Path) -> None:
    """The event comes in the middle of a rollout, and the checkpoint before the next."""
    model = PPO("MlpPolicy", make_env(n_envs=1), n_steps=8, batch_size=8, seed=1, device="cpu")
    model.learn(32, callback=EveryNTimesteps(11, ExactCheckpointCallback(1, tmp_path, keep=100)))
    checkpoints = sorted(tmp_path.iterdir())
    assert [json.loads((path / "manifest.json").read_text())["num_timesteps"] for path in checkpoints] == [16, 24]
    resumed = load_checkpoint(checkpoints[0], make_env(n_envs=1), PPO)
    resumed.learn(16, reset_num_timesteps=False)
    assert fingerprint(resumed) == fingerprint(model)


class Saves(BaseCallback):
    """As a user may write it."""

    def __init__(self, folder: Path, where: str):
        super().__init__()
        self.folder = folder
        setattr(self, where, self.save)

    def save(self) -> bool:
        if self.num_timesteps == 20:
            save_checkpoint(self.model, self.folder)
        return True

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("where", ["_on_step", "_on_rollout_end"])
def test_in_the_middle_of_a_rollout(where: str, tmp_path: Path) -> None:
    """The environment is a step ahead of the agent, or updates are missing: the episode cannot go on."""
    model = make_model(make_env())
    with pytest.warns(UserWarning, match="in the middle of a rollout"):
        model.learn(30, callback=Saves(tmp_path, where))
    assert load_checkpoint(tmp_path, make_env())._last_obs is None


class Ends(BaseCallback):
    """Stops training after 21 steps, or is interrupted then."""

    def __init__(self, interrupted: bool):
        super().__init__()
        self.interrupted = interrupted

    def _on_step(self) -> bool:
        if self.num_timesteps == 21 and self.interrupted:
            raise KeyboardInterrupt
        return self.num_timesteps < 21


@pytest.mark.parametrize("algorithm", [DIPO, SAC, PPO])
@pytest.mark.parametrize("interrupted", [False, True])
def test_stopped_in_a_step(interrupted: bool, algorithm: type[Any], tmp_path: Path) -> None:
    """The environment has taken a step that SB3 has not stored: the episode cannot go on."""
    settings = {"n_steps": 8, "batch_size": 8} if algorithm is PPO else {"learning_starts": 8, "batch_size": 8}
    model = algorithm("MlpPolicy", make_env(n_envs=1), seed=1, device="cpu", **settings)
    model.learn(16)
    save_checkpoint(model, tmp_path)
    assert load_checkpoint(tmp_path, make_env(n_envs=1), algorithm)._last_obs is not None
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        model.learn(30, callback=Ends(interrupted), reset_num_timesteps=False)
    save_checkpoint(model, tmp_path)
    with pytest.warns(UserWarning, match="stopped in a step"):
        assert load_checkpoint(tmp_path, make_env(n_envs=1), algorithm)._last_obs is None


def test_between_rollouts_by_a_callback_of_the_user(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", make_env(), use_sde=True, learning_starts=12, batch_size=8, seed=1, device="cpu")
    model.learn(30, callback=Saves(tmp_path, "_on_rollout_start"))
    resumed = load_checkpoint(tmp_path, make_env(), SAC)
    assert resumed.num_timesteps == 20
    resumed.learn(10, reset_num_timesteps=False)
    assert fingerprint(resumed) == fingerprint(model)


# ------------------------------------------------------------------------------------------------- two runs, one folder


class Hold(BaseCallback):
    """Stops a training, running in a thread, until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.released = threading.Event(), threading.Event()

    def _on_step(self) -> bool:
        if self.num_timesteps >= 20:
            self.reached.set()
            assert self.released.wait(200)
        return True


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    first, hold = make_model(make_env()), Hold()
    callback = [ExactCheckpointCallback(10, tmp_path), hold]
    thread = threading.Thread(target=lambda: first.learn(40, callback=callback))
    thread.start()
    try:
        assert hold.reached.wait(200)
        before = contents(tmp_path)
        second = make_model(make_env())
        with pytest.raises(BlockingIOError, match=r"`folder` must belong to one run.*choose another folder"):
            second.learn(20, callback=ExactCheckpointCallback(10, tmp_path))
        with pytest.raises(BlockingIOError, match="`folder` must belong to one run"):
            save_checkpoint(second, tmp_path)
        assert contents(tmp_path) == before != {}
    finally:
        hold.released.set()
        thread.join()
    assert load_checkpoint(tmp_path, make_env()).num_timesteps == 40
    second.learn(20, callback=ExactCheckpointCallback(10, tmp_path))  # as the first has ended


def in_a_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def test_a_run_that_failed_does_not_keep_its_folder(tmp_path: Path) -> None:
    def fail(*_: Any) -> bool:
        raise KeyError("mine")

    def learn() -> None:
        with pytest.raises(KeyError, match="mine"):
            make_model(make_env()).learn(20, callback=[ExactCheckpointCallback(10, tmp_path), ConvertCallback(fail)])

    in_a_thread(learn)
    learn()
    learn()


def test_a_killed_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    process = start(tmp_path, 1_000_000)
    try:
        while not list(tmp_path.glob("*/manifest.json")):
            assert process.poll() is None
        model = make_model(make_env())
        with pytest.raises(BlockingIOError, match="another one is writing its checkpoints"):
            save_checkpoint(model, tmp_path)
    finally:
        process.kill()
        process.communicate()
    save_checkpoint(model, tmp_path)


def test_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may make the same directory at the same moment: it is not overwritten, nor removed after an error."""
    monkeypatch.setattr(checkpoint_folder, "fcntl", None)
    monkeypatch.setattr(checkpoint_folder, "directories", lambda folder: [])  # as it was a moment before
    others = tmp_path / "checkpoint_000001" / "model.zip"
    others.parent.mkdir()
    others.write_text("of another run")
    model = make_model(make_env())
    assert save_checkpoint(model, tmp_path).name == "checkpoint_000002"
    monkeypatch.setattr(model, "save", lambda file: file / 0)
    with pytest.raises(TypeError):
        save_checkpoint(model, tmp_path)
    assert others.read_text() == "of another run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_000001", "checkpoint_000002"]


# ------------------------------------------------------------------------------------------------- files


BIG: dict[str, Callable[[], Any]] = {
    "DIPO": lambda: DIPO("MlpPolicy", make_env(n_envs=1), learning_starts=20, policy_kwargs={"net_arch": [8]}, device="cpu"),
    "SAC": lambda: SAC("MlpPolicy", make_env(n_envs=1), learning_starts=20, policy_kwargs={"net_arch": [8]}, device="cpu"),
    "hindsight": lambda: SAC("MultiInputPolicy", goal_envs(2), replay_buffer_class=HerReplayBuffer, learning_starts=99),
}


@pytest.mark.parametrize("name", BIG)
def test_rows_without_transitions_are_not_written(name: str, tmp_path: Path) -> None:
    """At the default size, for a million transitions, they would be tens or hundreds of megabytes."""
    model = BIG[name]()
    model.learn(21)
    before = model.replay_buffer
    path = save_checkpoint(model, tmp_path)
    assert sum(file.stat().st_size for file in path.iterdir()) < 2_000_000
    resumed: Any = load_checkpoint(path, model.env, type(model))
    assert model.replay_buffer is before and type(resumed.replay_buffer) is type(before)
    assert resumed.replay_buffer.actions.shape == before.actions.shape
    np.testing.assert_array_equal(resumed.replay_buffer.actions[:30], before.actions[:30])


VERSION_0_1 = Path(__file__).parent / "data" / "version_0_1" / "checkpoint"


def test_checkpoint_of_version_0_1() -> None:
    model = load_checkpoint(VERSION_0_1, gym.make("Pendulum-v1"))
    assert model.num_timesteps == 40 and model._last_obs is None
    buffer: Any = model.replay_buffer
    expected = np.load(VERSION_0_1.parent / "expected.npz")
    np.testing.assert_array_equal(buffer.improved_actions[: buffer.pos], expected["improved"][: buffer.pos])
    model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 50


def test_running_episode_of_version_0_1(tmp_path: Path) -> None:
    model = make_model(make_env())
    model.learn(20)
    path = save_checkpoint(model, tmp_path)
    state = {"environments": [], "wrappers": ["VecNormalize"], "wrapper_states": [{}]}
    (path / "environment.pkl").write_bytes(pickle.dumps(state))
    (path / "exploration.pt").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["exploration.pt"]
    manifest["files"]["environment.pkl"] = hashlib.sha256((path / "environment.pkl").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.warns(UserWarning, match=r"version 0\.1\.0.*running episode is dropped"):
        resumed = load_checkpoint(tmp_path, make_env())
    assert resumed._last_obs is None
    assert resumed.get_vec_normalize_env().obs_rms.count == model.get_vec_normalize_env().obs_rms.count  # type: ignore[union-attr]


def test_checks_without_assertions(folder: Path) -> None:
    """``python -O`` removes them."""
    code = (
        f"import sys; sys.path.insert(0, {str(RUN.parent)!r})\n"
        "import pathlib\n"
        "from checkpoint_run import *\n"
        "from sb3_dipo import save_checkpoint\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "for text in ('[]', '{}', '{\"format\": 1}', '{\"algorithm\": \"DIPO\", \"files\": []}'):\n"
        "    (folder / 'checkpoint_000002' / 'manifest.json').write_text(text)\n"
        "    try: load_checkpoint(folder, make_env())\n"
        "    except ValueError as error: print(error)\n"
        "model = make_model(make_env()); model.env = None\n"
        "try: save_checkpoint(model, folder)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    *foreign, missing = done.stdout.splitlines()
    assert len(foreign) == 4 and all("is not the manifest of a checkpoint" in line for line in foreign)
    assert "`model` must have an environment" in missing


# ------------------------------------------------------------------------------------------------- failures


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(make_env())
    model.learn(24, callback=ExactCheckpointCallback(12, folder, keep=9))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder with two checkpoints, to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["model.zip", "replay_buffer.pkl", "vecnormalize.pkl", "environment.pkl", "random.json"])
@pytest.mark.parametrize("harm", ["truncated", "changed", "missing"])
def test_damaged_file(name: str, harm: str, folder: Path) -> None:
    newest = folder / "checkpoint_000002"
    content = (newest / name).read_bytes()
    if harm == "missing":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content[:-1] + (b"" if harm == "truncated" else bytes([content[-1] ^ 1])))
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing.*checkpoint_000001"):
        load_checkpoint(folder, make_env())
    assert contents(folder) == before
    assert load_checkpoint(folder / "checkpoint_000001", make_env()).num_timesteps == 12


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"format": 1}', "\x00"])
def test_foreign_manifest(manifest: str, folder: Path) -> None:
    (folder / "checkpoint_000002" / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="is not the manifest of a checkpoint"):
        load_checkpoint(folder, make_env())


@pytest.mark.parametrize(
    "name, value, message", [("format", 3, "has format 3"), ("algorithm", "SAC", "holds a SAC, not a DIPO")]
)
def test_other_algorithm_or_version(name: str, value: Any, message: str, folder: Path) -> None:
    path = folder / "checkpoint_000002" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, make_env())


def test_before_the_first_step(tmp_path: Path) -> None:
    model = make_model(make_env())
    save_checkpoint(model, tmp_path)
    resumed = load_checkpoint(tmp_path, make_env())
    expected = fingerprint(model.learn(20))
    assert fingerprint(load_checkpoint(tmp_path, make_env()).learn(20)) == expected
    assert resumed.num_timesteps == 0


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_000001").mkdir()  # not whole
    (tmp_path / "checkpoint_last").mkdir()  # not ours
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="`folder` must hold a whole checkpoint"):
            load_checkpoint(folder, make_env())


def test_other_environments(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"get_env_state"):
        load_checkpoint(folder, make_env(WalkWithoutState))
    with pytest.raises(ValueError, match=r"Observation spaces do not match"):
        load_checkpoint(folder, VecNormalize(VecFrameStack(make_env(normalize=False), 2)))
    with pytest.raises(ValueError, match=r"`n_envs` must be the agent's"):
        load_checkpoint(folder, make_env(n_envs=1))
    with pytest.raises(ValueError, match=r"`norm_reward=True`.*not one with `norm_reward=False`"):
        load_checkpoint(folder, VecNormalize(make_env(normalize=False), norm_reward=False))
    with pytest.raises(ValueError, match=r"must be wrapped as the checkpoint's was"):
        load_checkpoint(folder, VecNormalize(DummyVecEnv([lambda: TimeLimit(WalkEnv(), 7)] * 2)))


def test_statistics_that_the_checkpoint_has_not(tmp_path: Path) -> None:
    model = make_model(make_env(normalize=False))
    model.learn(16)
    save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="must not be wrapped in VecNormalize"):
        load_checkpoint(tmp_path, make_env())


@pytest.mark.parametrize("limit", [100, 2_000, 6_000, 10_000])
def test_full_disk(limit: int, folder: Path) -> None:
    """A limit on the size of files stands for it: writing fails in the same way, at different places."""
    model = load_checkpoint(folder, make_env())
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises((OSError, RuntimeError)) as error:
            save_checkpoint(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert any("No checkpoint was written" in note and "checkpoint_000002" in note for note in error.value.__notes__)
    del error
    gc.collect()  # a file that was left open would be a warning now
    assert contents(folder) == before and len(list(folder.iterdir())) == 2
    assert save_checkpoint(model, folder).name == "checkpoint_000003"


def test_folder_that_cannot_be_written(tmp_path: Path, folder: Path) -> None:
    model = load_checkpoint(folder, make_env())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        save_checkpoint(model, tmp_path / "file" / "run")
    if os.geteuid() != 0:  # who may write everywhere
        folder.chmod(0o555)
        with pytest.raises(PermissionError):
            save_checkpoint(model, folder)
        folder.chmod(0o755)
    assert len(list(folder.iterdir())) == 2


def test_interrupted_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(folder, make_env())

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "save_replay_buffer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, folder)
    assert load_checkpoint(folder, make_env()).num_timesteps == 24
    assert len(list(folder.iterdir())) == 2


def test_leftovers_are_removed(folder: Path) -> None:
    model = load_checkpoint(folder, make_env())
    unfinished = folder / "checkpoint_000003"
    unfinished.mkdir()
    (unfinished / "model.zip").write_text("begun")
    others = folder / "notes.txt"
    others.write_text("of the user")
    assert save_checkpoint(model, folder).name == "checkpoint_000004"
    assert {path.name for path in folder.iterdir()} == {"checkpoint_000004", "notes.txt"}


@pytest.mark.parametrize("argument", [{"keep": 0}, {"save_freq": 0}, {"save_freq": 2.5}, {"keep": "all"}])
def test_bad_arguments(argument: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}`"):
        ExactCheckpointCallback(**{"save_freq": 10, "folder": tmp_path, **argument})


def test_checksums_come_before_any_code_is_run(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("was run",))

    (folder / "checkpoint_000002" / "environment.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder, make_env())


# ------------------------------------------------------------------------------------------------- kill -9


def kill_and_resume(folder: Path, kills: int, generator: np.random.Generator, steps: int) -> list[int]:
    """Kill a run at random moments of its training, then let it finish; returns where each went on."""
    starts = []
    for _ in range(kills):
        process = start(folder, steps)
        assert process.stdout is not None
        line = process.stdout.readline()  # it is about to train
        assert line.startswith("from "), line + process.stdout.read()
        starts.append(int(line.split()[1]))
        time.sleep(generator.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return starts


@pytest.mark.slow
def test_killed_is_not_lost(tmp_path: Path) -> None:
    kills = int(os.environ.get("KILLS", "5"))
    steps = 200 * kills  # more than there is time for before the last kill
    seed = int(os.environ.get("KILL_SEED", "0"))
    undisturbed = finish(start(tmp_path / "undisturbed", steps))
    starts = kill_and_resume(tmp_path / "killed", kills, np.random.default_rng(seed), steps)
    last = finish(start(tmp_path / "killed", steps))
    print("went on from", starts, last[0])
    assert starts == sorted(starts) and starts[-1] < steps
    assert int(last[0].split()[1]) > 0, "no checkpoint was written before the last kill"
    assert last[-1] == undisturbed[-1]
