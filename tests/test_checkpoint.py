"""Training goes on from a checkpoint as if it had never stopped, and no failure costs a checkpoint that was whole."""

import gc
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from checkpoint_run import WalkEnv, WalkWithoutState, fingerprint, make_env, make_model
from envs import goal_envs, small_dipo
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo import DIPO, ExactCheckpointCallback, load_checkpoint, save_checkpoint

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
    model = make_model(make_env())
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
    "name, value, message", [("format", 2, "has format 2"), ("algorithm", "SAC", "holds a SAC, not a DIPO")]
)
def test_other_algorithm_or_version(name: str, value: Any, message: str, folder: Path) -> None:
    path = folder / "checkpoint_000002" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, make_env())


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
