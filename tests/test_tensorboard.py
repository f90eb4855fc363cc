"""Loggers: TensorBoard, CSV, JSON and text; which values, at which steps, in which folders. As SAC but for its own values."""

import csv
import json
import logging
import pathlib
from typing import Any

import numpy as np
import pytest
from both import ALGORITHMS, both, small
from envs import GoalEnv, TinyEnv, tiny_envs
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, Image, configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_dipo import DIPO

OWN = {
    # SAC leaves the number of updates out of TensorBoard
    "DIPO": {"train/n_updates", "train/q_value", "train/improved_q_gain", "train/action_shift"},
    "SAC": {"train/ent_coef", "train/ent_coef_loss"},
}


def rows_of(folder: pathlib.Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_values_are_those_of_sac(tmp_path: pathlib.Path) -> None:
    """Names, their steps, and all that does not depend on the algorithm."""
    found: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        model = small(algorithm, tensorboard_log=str(tmp_path), learning_rate=lambda progress: 1e-3 * progress)
        model.learn(60, log_interval=2)
        model.learn(20, log_interval=2, reset_num_timesteps=False)
        name = algorithm.__name__
        found[name] = scalars(tmp_path / f"{name}_1")
        assert set(found[name]) >= OWN[name]
        for own in OWN[name]:
            del found[name][own]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DIPO_1", "SAC_1"]
    ours, theirs = found["DIPO"], found["SAC"]
    assert set(ours) == set(theirs)
    for tag in ours:
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs[tag]], tag
    for tag in ("train/learning_rate", "rollout/ep_len_mean"):
        assert ours[tag] == theirs[tag]
    assert ours["rollout/ep_rew_mean"][0] == theirs["rollout/ep_rew_mean"][0]  # of random actions


@pytest.mark.parametrize("formats", [["csv"], ["json"], ["log"], ["stdout"], ["tensorboard"], ["csv", "json", "tensorboard"]])
@both
def test_formats(algorithm: type[Any], formats: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(algorithm)
    logger = configure(str(tmp_path), formats)
    model.set_logger(logger)
    model.learn(40)
    assert model.logger is logger
    logger.close()
    printed = capsys.readouterr().out
    if "csv" in formats:
        rows = rows_of(tmp_path)
        assert [int(row["time/total_timesteps"]) for row in rows] == [20, 40]
        assert np.isfinite(float(rows[-1]["train/critic_loss"]))
    if "json" in formats:
        lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
        assert [line["train/n_updates"] for line in lines] == [9, 29]
        assert isinstance(lines[-1]["train/actor_loss"], float)
    if "log" in formats:
        assert "critic_loss" in (tmp_path / "log.txt").read_text()
    if "tensorboard" in formats:
        assert [step for step, _ in scalars(tmp_path)["train/actor_loss"]] == [20, 40]
    assert ("critic_loss" in printed) == (formats == ["stdout"])


@pytest.mark.parametrize("log_interval", [1, 3, 1000])
@both
def test_interval_of_logs(algorithm: type[Any], log_interval: int, tmp_path: pathlib.Path) -> None:
    model = small(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(45, log_interval=log_interval)
    model.logger.close()
    steps = [int(row["time/total_timesteps"]) for row in rows_of(tmp_path)]
    assert steps == list(range(5 * log_interval, 46, 5 * log_interval))


@both
def test_folders(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, tensorboard_log=str(tmp_path))
    model.learn(12, tb_log_name="mine")
    model.learn(12, tb_log_name="mine", reset_num_timesteps=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine_1"]
    model.learn(12, tb_log_name="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine_1", "mine_2"]
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=TinyEnv())
    assert loaded.tensorboard_log == str(tmp_path)
    loaded.learn(12, tb_log_name="mine", reset_num_timesteps=False)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_printed_lines_are_those_of_sac(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for algorithm in ALGORITHMS:
        model = small(algorithm, TinyEnv(), verbose=verbose)
        model.learn(22)
        names = [line.split("|")[1].strip() if "|" in line else line for line in capsys.readouterr().out.splitlines()]
        own = {name.split("/")[1] for name in OWN[algorithm.__name__]} - {"n_updates"}
        printed.append([name for name in names if name not in own and set(name) != {"-"}])
    assert printed[0] == printed[1]
    assert ("critic_loss" in printed[0]) == (verbose > 0)


@both
def test_a_users_own_values(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    class Record(BaseCallback):
        def _on_training_start(self) -> None:
            hyperparameters = HParam({"gamma": self.model.gamma}, {"train/critic_loss": 0.0})  # type: ignore[attr-defined]
            self.logger.record("hparams", hyperparameters, exclude=("stdout", "log", "json", "csv"))

        def _on_step(self) -> bool:
            self.logger.record("mine/value", 0.5)
            self.logger.record_mean("mine/mean", self.n_calls)
            image = Image(np.zeros((4, 4, 3), dtype=np.uint8), "HWC")
            self.logger.record("mine/image", image, exclude=("stdout", "log", "json", "csv"))
            return True

    model = small(algorithm, tensorboard_log=str(tmp_path))
    model.learn(25, callback=Record())
    found = scalars(next(tmp_path.iterdir()))
    assert found["mine/value"][-1][1] == 0.5 and found["mine/mean"][-1] == (20, 10.5)
    assert "train/critic_loss" in found


@both
def test_monitors(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, Monitor(TinyEnv(), str(tmp_path / "one")))
    model.learn(20)
    assert load_results(str(tmp_path))["l"].tolist() == [5, 5, 5, 5]
    assert model.ep_info_buffer[-1]["l"] == 5
    model.get_env().close()
    (tmp_path / "several").mkdir()
    env = VecMonitor(tiny_envs(2), str(tmp_path / "several" / "log"))
    model = small(algorithm, env, stats_window_size=3)
    model.learn(40)
    assert len(model.ep_info_buffer) == 3
    env.close()
    assert len(load_results(str(tmp_path / "several"))) == 8


class SuccessEnv(GoalEnv):
    """Each second episode is a success."""

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, truncated, {"is_success": self.episode % 2 == 1}


@both
def test_rate_of_success(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, SuccessEnv(), "MultiInputPolicy")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(28, log_interval=8)  # episodes have 2, 3, 4, 5, 2, 3, 4, 5 steps
    model.logger.close()
    assert float(rows_of(tmp_path)[-1]["rollout/success_rate"]) == 0.5


@both
def test_logging_of_the_user_stays(algorithm: type[Any], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Python's own: no handler, level or logger is changed, and none of our messages goes there."""

    def settings() -> Any:
        root = logging.getLogger()
        loggers = [root, *(item for item in root.manager.loggerDict.values() if isinstance(item, logging.Logger))]
        return [
            (one.name, one.level, list(one.handlers), one.propagate, one.disabled) for one in loggers
        ], root.manager.disable

    small(SAC, tensorboard_log=str(tmp_path)).learn(20)  # imports what is imported late
    caplog.set_level(logging.DEBUG)
    before = settings()
    model = small(algorithm, tensorboard_log=str(tmp_path))
    model.learn(20)
    model.save(tmp_path / "model")
    algorithm.load(tmp_path / "model")
    assert settings() == before
    assert not [record for record in caplog.records if "sb3" in record.name]


def test_values_of_one_log_are_averages_of_the_last_updates_alone(tmp_path: pathlib.Path) -> None:
    """As in SAC: those of the last train(), not of all since the last log."""
    model: DIPO = small(DIPO, train_freq=5, gradient_steps=3)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    losses: list[list[float]] = []
    train = model.train

    def watched(gradient_steps: int, batch_size: int) -> None:
        train(gradient_steps, batch_size)
        losses.append([model.logger.name_to_value["train/critic_loss"]])

    model.train = watched  # type: ignore[method-assign, assignment]
    model.learn(41, log_interval=1)
    model.logger.close()
    logged = [float(row["train/critic_loss"]) for row in rows_of(tmp_path) if row["train/critic_loss"]]
    np.testing.assert_allclose(logged, [loss for (loss,) in losses[: len(logged)]], rtol=1e-6)
