"""All of SB3's callbacks, and in which order DIPO calls them: as SAC does."""

import pathlib
from typing import Any

import numpy as np
import pytest
from both import ALGORITHMS, SpaceEnv, both, mode, parameters_of, same, small
from envs import TinyEnv, differences, everything_learned, tiny_envs
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dipo import DIPO


class Diary(BaseCallback):
    """Notes each call, with the counters and the names that it can see."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def _note(self, name: str) -> None:
        seen = sorted(key for key in self.locals if key not in ("self", "__class__", "tb_log_name"))
        self.calls.append((name, self.n_calls, self.num_timesteps, self.model._n_updates, seen))

    def _on_training_start(self) -> None:
        self._note("training starts")

    def _on_rollout_start(self) -> None:
        self._note("rollout starts")

    def _on_step(self) -> bool:
        self._note("step")
        return True

    def _on_rollout_end(self) -> None:
        self._note("rollout ends")

    def _on_training_end(self) -> None:
        self._note("training ends")


@pytest.mark.parametrize(
    "n_envs, kwargs",
    [
        (1, {}),
        (3, {"train_freq": 2}),
        (1, {"train_freq": (1, "episode"), "gradient_steps": -1}),
        (2, {"train_freq": 4, "gradient_steps": -1}),
        (1, {"gradient_steps": 0}),
    ],
    ids=["", "environments", "episodes", "as many updates as steps", "no updates"],
)
def test_order_of_calls(n_envs: int, kwargs: dict[str, Any]) -> None:
    diaries = []
    for algorithm in ALGORITHMS:
        model = small(algorithm, tiny_envs(n_envs), **kwargs)
        model.learn(30, callback=(diary := Diary()))
        model.learn(12, callback=diary, reset_num_timesteps=False)
        diaries.append(diary.calls)
    assert diaries[0] == diaries[1]
    assert {call[0] for call in diaries[0]} == {
        *("training starts", "rollout starts", "step", "rollout ends", "training ends")
    }


def evaluation(tmp_path: pathlib.Path, **kwargs: Any) -> EvalCallback:
    settings: dict[str, Any] = {"eval_freq": 10, "n_eval_episodes": 2, "verbose": 0, "log_path": str(tmp_path)}
    return EvalCallback(Monitor(TinyEnv()), **{**settings, "best_model_save_path": str(tmp_path), **kwargs})


@both
def test_evaluation(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = evaluation(tmp_path, callback_after_eval=(after := Diary()), callback_on_new_best=(best := Diary()))
    model.learn(40, callback=callback)
    assert [call[2] for call in after.calls if call[0] == "step"] == [10, 20, 30, 40]
    assert best.n_calls >= 1
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [10, 20, 30, 40]
    assert results["results"].shape == results["ep_lengths"].shape == (4, 2)
    assert callback.best_mean_reward == results["results"].mean(axis=1).max()
    model.logger.close()
    assert "eval/mean_reward" in (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    # the best one's actions
    loaded = algorithm.load(tmp_path / "best_model")
    assert loaded.num_timesteps == results["timesteps"][results["results"].mean(axis=1).argmax()]


@pytest.mark.parametrize("deterministic", [True, False])
@both
def test_evaluation_does_not_disturb_learning(algorithm: type[Any], deterministic: bool, tmp_path: pathlib.Path) -> None:
    """A deterministic one draws no random numbers."""
    learned = []
    for callback in (None, evaluation(tmp_path, deterministic=deterministic)):
        model = small(algorithm)
        model.learn(40, callback=callback)
        learned.append(parameters_of(model))
    assert same(*learned) == deterministic


@both
def test_stop_at_a_reward(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1e6, verbose=0)
    model = small(algorithm)
    model.learn(60, callback=evaluation(tmp_path, callback_on_new_best=stop))
    assert model.num_timesteps == 10


@both
def test_stop_without_improvement(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    # with learning rates of 0 and the same evaluation every time
    model = small(algorithm, learning_rate=0.0)
    environment = Monitor(SpaceEnv(spaces.Box(0.0, 1e-12, (3,))))
    callback = EvalCallback(environment, eval_freq=10, n_eval_episodes=1, callback_after_eval=stop, verbose=0)
    model.learn(200, callback=callback)
    assert model.num_timesteps < 60


@pytest.mark.parametrize("n_envs", [1, 2])
@both
def test_stop_after_episodes(algorithm: type[Any], n_envs: int) -> None:
    model = small(algorithm, tiny_envs(n_envs))
    model.learn(200, callback=StopTrainingOnMaxEpisodes(max_episodes=4))
    assert model.num_timesteps == 20 * n_envs and model._n_updates > 0


@both
def test_every_n_timesteps(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = EveryNTimesteps(15, CheckpointCallback(1, str(tmp_path), name_prefix="every"))
    model.learn(50, callback=[callback, LogEveryNTimesteps(10)], log_interval=1000)
    assert sorted(path.name for path in tmp_path.glob("*.zip")) == [f"every_{steps}_steps.zip" for steps in (15, 30, 45)]
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = header.split(",").index("time/total_timesteps")
    assert [int(row.split(",")[column]) for row in rows] == [10, 20, 30, 40, 50]
    assert "train/actor_loss" in header.split(",")
    model.logger.close()


@both
def test_progress_bar(algorithm: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    small(algorithm).learn(20, callback=ProgressBarCallback())
    small(algorithm, tiny_envs(3)).learn(20, progress_bar=True)
    assert "21/20" in capsys.readouterr().out


@both
def test_functions_and_lists(algorithm: type[Any]) -> None:
    seen: list[int] = []

    def stop(variables: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(variables["self"].num_timesteps)
        return variables["self"].num_timesteps < 14

    model = small(algorithm)
    model.learn(50, callback=stop)
    assert seen == list(range(1, 15)) and model.num_timesteps == 14
    diaries = [Diary(), Diary()]
    model.learn(12, callback=CallbackList([diaries[0], CallbackList([diaries[1]])]))
    assert diaries[0].calls == diaries[1].calls != []


@pytest.mark.parametrize("n_envs", [1, 2])
@both
def test_checkpoints(algorithm: type[Any], n_envs: int, tmp_path: pathlib.Path) -> None:
    env: Any = VecNormalize(tiny_envs(n_envs))
    model = small(algorithm, env)
    callback = CheckpointCallback(
        10, str(tmp_path), name_prefix="kept", save_replay_buffer=True, save_vecnormalize=True, verbose=0
    )
    saved: dict[int, Any] = {}

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % 10 == 0:
                saved[self.num_timesteps] = parameters_of(self.model), env.obs_rms.mean.copy()
            return True

    model.learn(30 * n_envs, callback=[callback, Keep()])
    names = {f"kept{part}_{10 * k * n_envs}_steps" for k in (1, 2, 3) for part in ("", "_replay_buffer", "_vecnormalize")}
    assert {path.stem for path in tmp_path.iterdir()} == names
    for steps, (parameters, mean) in saved.items():
        loaded_env: Any = VecNormalize.load(str(tmp_path / f"kept_vecnormalize_{steps}_steps.pkl"), tiny_envs(n_envs))
        loaded = algorithm.load(tmp_path / f"kept_{steps}_steps", env=loaded_env)
        loaded.load_replay_buffer(tmp_path / f"kept_replay_buffer_{steps}_steps")
        assert same(parameters_of(loaded), parameters)
        np.testing.assert_array_equal(loaded_env.obs_rms.mean, mean)
        assert loaded.num_timesteps == steps
        assert loaded.replay_buffer.pos == steps // n_envs - 1  # this step's transition comes after the callback
        loaded.learn(10, reset_num_timesteps=False)


@both
def test_watching_does_not_disturb_learning(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    """Checkpoints, logs and progress bars leave the random numbers alone."""
    learned = []
    for callback in (
        None,
        [CheckpointCallback(7, str(tmp_path), save_replay_buffer=True), LogEveryNTimesteps(5), ProgressBarCallback()],
    ):
        model = small(algorithm)
        model.learn(30, callback=callback)
        learned.append(parameters_of(model))
    assert same(*learned)


def test_what_a_callback_changes_counts_from_then_on() -> None:
    """Arguments of the algorithm and of the sampler are read when they are needed."""

    class Change(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 20:
                assert isinstance(self.model, DIPO)
                self.model.persist_improved_actions = False
                self.model.policy.set_sampler(num_inference_steps=1, noise_scale=0)
                before.update(everything_learned(self.model))
            return True

    before: dict[str, Any] = {}
    model = small(DIPO, batch_size=64)
    model.learn(30, callback=Change())
    buffer = model.replay_buffer
    changed = differences(before, everything_learned(model))
    assert any(name.startswith("actor.") for name in changed)
    np.testing.assert_array_equal(buffer.improved_actions[:19], before["improved_actions"][:19])
    np.testing.assert_array_equal(buffer.improved_actions[19:], buffer.actions[19:])


@both
def test_an_error_of_a_callback_ends_learning(algorithm: type[Any]) -> None:
    class Break(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 15:
                raise KeyError("mine")
            return True

    model = small(algorithm, DummyVecEnv([TinyEnv]))
    with pytest.raises(KeyError, match="mine"):
        model.learn(40, callback=Break())
    model.learn(10, reset_num_timesteps=False)  # and it can go on
    assert model.num_timesteps == 25 and np.isfinite(mode(model)).all()
