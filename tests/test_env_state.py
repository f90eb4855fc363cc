"""Wrappers go on from a checkpoint. Where a state is out of reach, one warning says so; statistics are always kept."""

import importlib
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from checkpoint_run import WalkEnv, WalkWithoutState, fingerprint, make_model
from gymnasium import wrappers
from rl_zoo3 import wrappers as zoo
from rl_zoo3.gym_patches import PatchedTimeLimit
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
)

from sb3_dipo import DIPO, ExactCheckpointCallback, load_checkpoint, save_checkpoint
from sb3_dipo.env_state import KNOWN
from sb3_dipo.envs import MujocoState

Make = Callable[[], VecEnv]
multiprocessing.set_forkserver_preload(["sb3_dipo", "rl_zoo3.wrappers"])  # once, and not in each process of an environment


class Drift(gym.Wrapper[Any, Any, Any, Any]):
    """Has a state: what it adds to rewards."""

    def __init__(self, env: Any):
        super().__init__(env)
        self.drift = 0.0

    def step(self, action: Any) -> Any:
        observation, reward, *others = self.env.step(action)
        self.drift += 0.125
        return observation, float(reward) + self.drift, *others


class GivenDrift(Drift):
    def get_env_state(self) -> float:
        return self.drift

    def set_env_state(self, state: float) -> None:
        self.drift = state


class LongerLimit(wrappers.TimeLimit):
    """Every other episode is longer; a state beside that of the class which it extends."""

    def __init__(self, env: Any, steps: int):
        super().__init__(env, steps)
        self.episodes = 0

    def reset(self, **kwargs: Any) -> Any:
        self.episodes += 1
        self._max_episode_steps = 5 + 2 * (self.episodes % 2)
        return super().reset(**kwargs)


class GivenLongerLimit(LongerLimit):
    def get_env_state(self) -> tuple[int, int]:
        return self.episodes, self._max_episode_steps

    def set_env_state(self, state: tuple[int, int]) -> None:
        self.episodes, self._max_episode_steps = state


class Half(gym.RewardWrapper[Any, Any]):
    """Has no attributes and so no state."""

    def reward(self, reward: Any) -> Any:
        return reward / 2


class Quarter(wrappers.TransformReward[Any, Any]):
    """Has only what the class that it extends has."""

    def __init__(self, env: Any):
        super().__init__(env, lambda reward: float(reward) / 4)


class ForTheEnvironment(gym.Wrapper[Any, Any, Any, Any]):
    """Has no state, and gives that of an environment which does not do it."""

    def get_env_state(self) -> Any:
        return WalkEnv.get_env_state(self.unwrapped)  # type: ignore[arg-type]

    def set_env_state(self, state: Any) -> None:
        WalkEnv.set_env_state(self.unwrapped, state)  # type: ignore[arg-type]


class VecDrift(VecEnvWrapper):
    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self.drift = 0.0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.drift += 0.125
        return observations, rewards + self.drift, dones, infos


class GivenVecDrift(VecDrift):
    def get_env_state(self) -> float:
        return self.drift

    def set_env_state(self, state: float) -> None:
        self.drift = state


ONES = -np.ones(2, np.float32), np.ones(2, np.float32)


def limited(env: Any = WalkEnv) -> Any:
    return wrappers.TimeLimit(env(), 7)


SINGLE: dict[str, Callable[[], Any]] = {
    "frames": lambda: wrappers.FrameStackObservation(limited(), 3),
    "frames, padded": lambda: wrappers.FrameStackObservation(limited(), 3, padding_type="zero"),
    "observations": lambda: wrappers.NormalizeObservation(limited()),
    "rewards": lambda: wrappers.NormalizeReward(limited()),
    "time": lambda: wrappers.TimeAwareObservation(limited()),
    "delay": lambda: wrappers.DelayObservation(limited(), 2),
    "sticky": lambda: wrappers.StickyAction(limited(), 0.5),
    "sticky for long": lambda: wrappers.StickyAction(limited(), 0.5, (2, 3)),
    "episodes": lambda: wrappers.RecordEpisodeStatistics(limited()),
    "skipped": lambda: wrappers.MaxAndSkipObservation(limited(), 2),
    "skipped by SB3": lambda: MaxAndSkipEnv(limited(), 3),
    "stateless": lambda: wrappers.ClipReward(wrappers.RescaleAction(limited(), *ONES), -2, 0),
    "history": lambda: zoo.HistoryWrapper(limited(), 3),
    "smooth": lambda: zoo.ActionSmoothingWrapper(limited(), 0.5),
    "delayed rewards": lambda: zoo.DelayedRewardWrapper(limited(), 3),
    "contributed": lambda: TimeFeatureWrapper(limited(), 7),
    "own": lambda: GivenDrift(limited()),
    "own without a state": lambda: Quarter(Half(limited())),
    "own in place of the environment": lambda: ForTheEnvironment(limited(WalkWithoutState)),
    "own of a known class": lambda: GivenLongerLimit(WalkEnv(), 9),
    "twice": lambda: wrappers.NormalizeObservation(wrappers.ClipReward(wrappers.NormalizeObservation(limited()), -2, 0)),
}


def single(name: str) -> Make:
    return lambda: DummyVecEnv([lambda: Monitor(SINGLE[name]())] * 2)


def in_processes(*names: str) -> Make:
    makers = [lambda name=name: Monitor(zoo.ActionNoiseWrapper(SINGLE[name](), 0.1)) for name in names]
    return lambda: SubprocVecEnv(makers)  # type: ignore[arg-type]


TOGETHER: dict[str, Make] = {
    "own": lambda: GivenVecDrift(DummyVecEnv([limited] * 2)),
    "monitored": lambda: VecMonitor(DummyVecEnv([limited] * 2)),
    "other processes": in_processes("observations", "observations"),
    "various in other processes": in_processes("sticky", "own"),
    "MuJoCo in other processes": lambda: make_vec_env(
        "Swimmer-v5", 2, seed=1, wrapper_class=MujocoState, env_kwargs={"max_episode_steps": 7}, vec_env_cls=SubprocVecEnv
    ),
    "normalised, from other processes": lambda: VecNormalize(GivenVecDrift(in_processes("rewards")())),
}
EXACT = {**{f"one: {name}": single(name) for name in SINGLE}, **{f"all: {name}": make for name, make in TOGETHER.items()}}


def returns(model: DIPO) -> list[float]:
    return [episode["r"] for episode in model.ep_info_buffer or ()]


@pytest.mark.parametrize("case", EXACT)
def test_wrappers_go_on(case: str, tmp_path: Path) -> None:
    env = EXACT[case]()
    model = make_model(env)
    model.learn(40, callback=ExactCheckpointCallback(20, tmp_path, keep=9))
    env.close()
    env = EXACT[case]()
    resumed = load_checkpoint(sorted(tmp_path.iterdir())[0], env)
    assert resumed.num_timesteps == 20
    resumed.learn(20, reset_num_timesteps=False)
    env.close()
    assert fingerprint(resumed) == fingerprint(model)
    assert [episode["r"] for episode in resumed.ep_info_buffer or ()] == [
        episode["r"] for episode in model.ep_info_buffer or ()
    ]


def normalized(env: Any) -> Any:
    return wrappers.NormalizeReward(wrappers.NormalizeObservation(env))


LOST: dict[str, tuple[str, Make]] = {
    "own": ("Drift", lambda: DummyVecEnv([lambda: normalized(Drift(limited()))] * 2)),
    "own, beneath one with a state": ("Drift", lambda: DummyVecEnv([lambda: GivenDrift(normalized(Drift(limited())))])),
    "own of a known class": ("LongerLimit", lambda: DummyVecEnv([lambda: Monitor(LongerLimit(normalized(WalkEnv()), 9))])),
    "own, in another process": ("Drift", lambda: SubprocVecEnv([lambda: Drift(normalized(limited()))])),
    "own, of all": ("VecDrift", lambda: VecDrift(DummyVecEnv([lambda: normalized(limited())] * 2))),
    "environment, too": ("Drift", lambda: DummyVecEnv([lambda: Drift(normalized(limited(WalkWithoutState)))])),
}


def counts(env: VecEnv) -> list[float]:
    return [statistics.count for name in ("obs_rms", "return_rms") for statistics in env.get_attr(name)]


@pytest.mark.parametrize("case", LOST)
def test_one_warning_says_what_is_lost(case: str, tmp_path: Path) -> None:
    name, make = LOST[case]
    env = make()
    model = make_model(env)
    model.learn(20)
    save_checkpoint(model, tmp_path)
    before = counts(env)
    env.close()
    env = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = load_checkpoint(tmp_path, env)
    (warning,) = caught
    assert f"state of {name}," in str(warning.message) and "get_env_state" in str(warning.message)
    assert warning.filename == __file__
    assert resumed._last_obs is None
    assert counts(env) == before and min(before) > 9
    resumed.learn(10, reset_num_timesteps=False)
    env.close()
    assert resumed._n_updates > model._n_updates


def test_statistics_are_kept_where_the_environment_has_no_state(tmp_path: Path) -> None:
    for vec_env_class in (DummyVecEnv, SubprocVecEnv):
        env = vec_env_class([lambda: Monitor(GivenDrift(normalized(limited(WalkWithoutState))))] * 2)
        model = make_model(env)
        model.learn(20)
        save_checkpoint(model, tmp_path)
        before, drift = counts(env), env.get_attr("drift")
        env.close()
        env = vec_env_class([lambda: Monitor(GivenDrift(normalized(limited(WalkWithoutState))))] * 2)
        resumed = load_checkpoint(tmp_path, env)
        assert resumed._last_obs is None
        assert counts(env) == before and env.get_attr("drift") == drift
        resumed.learn(10, reset_num_timesteps=False)  # Monitor lets it reset
        env.close()


def test_a_wrapper_with_attributes_does_not_stand_for_its_environment(tmp_path: Path) -> None:
    """It gives its own state, and the one beneath is missing: going on as if it were there would be silently wrong."""
    model = make_model(DummyVecEnv([lambda: GivenDrift(WalkWithoutState())]))
    model.learn(20)
    save_checkpoint(model, tmp_path)
    assert load_checkpoint(tmp_path, DummyVecEnv([lambda: GivenDrift(WalkWithoutState())]))._last_obs is None


class Batched(VecEnv):
    """An environment that is vectorised by itself."""

    def __init__(self) -> None:
        self.inner = DummyVecEnv([limited] * 2)
        super().__init__(2, WalkEnv.observation_space, WalkEnv.action_space)

    def reset(self) -> Any:
        return self.inner.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.inner.step_async(actions)

    def step_wait(self) -> Any:
        return self.inner.step_wait()

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        return self.inner.get_attr(attr_name, indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> Any:
        return self.inner.env_method(method_name, *method_args, indices=indices, **method_kwargs)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False, False]

    def seed(self, seed: int | None = None) -> Any:
        return self.inner.seed(seed)


class GivenBatched(Batched):
    def get_env_state(self) -> Any:
        return [(env.get_wrapper_attr("get_env_state")(), env.get_wrapper_attr("_elapsed_steps")) for env in self.inner.envs]

    def set_env_state(self, state: Any) -> None:
        for env, (state_of_walk, steps) in zip(self.inner.envs, state, strict=True):
            env.get_wrapper_attr("set_env_state")(state_of_walk)
            env.set_wrapper_attr("_elapsed_steps", steps)


def test_environments_that_are_vectorised_by_themselves(tmp_path: Path) -> None:
    model = make_model(Batched())
    model.learn(20)
    save_checkpoint(model, tmp_path / "lost")
    with pytest.warns(UserWarning, match="state of Batched,"):
        load_checkpoint(tmp_path / "lost", Batched())

    model = make_model(GivenBatched())
    model.learn(40, callback=ExactCheckpointCallback(20, tmp_path / "given", keep=9))
    resumed = load_checkpoint(sorted((tmp_path / "given").iterdir())[0], GivenBatched())
    resumed.learn(20, reset_num_timesteps=False)
    assert fingerprint(resumed) == fingerprint(model)


def test_the_time_limit_of_gymnasium_and_that_of_the_zoo(tmp_path: Path) -> None:
    """The zoo puts its own into the place of Gymnasium's, for the whole process."""
    assert wrappers.TimeLimit is PatchedTimeLimit
    for number, time_limit in enumerate((PatchedTimeLimit, *PatchedTimeLimit.__bases__)):
        folder = tmp_path / str(number)
        model = make_model(DummyVecEnv([lambda cls=time_limit: cls(WalkEnv(), 7)]))  # type: ignore[misc]
        model.learn(40, callback=ExactCheckpointCallback(20, folder, keep=9))
        resumed = load_checkpoint(
            sorted(folder.iterdir())[0],
            DummyVecEnv([lambda cls=time_limit: cls(WalkEnv(), 7)]),  # type: ignore[misc]
        )
        resumed.learn(20, reset_num_timesteps=False)
        assert fingerprint(resumed) == fingerprint(model)


def test_other_wrappers_than_before(tmp_path: Path) -> None:
    model = make_model(single("rewards")())
    model.learn(20)
    save_checkpoint(model, tmp_path)
    others: list[Make] = [single("delayed rewards"), single("own"), lambda: GivenVecDrift(single("rewards")())]
    for make in others:
        with pytest.raises(ValueError, match="must be wrapped as the checkpoint's was"):
            load_checkpoint(tmp_path, make())


def test_from_one_process_to_several(tmp_path: Path) -> None:
    model = make_model(DummyVecEnv([lambda: Monitor(normalized(limited()))] * 2))
    model.learn(40, callback=ExactCheckpointCallback(20, tmp_path, keep=9))
    env = SubprocVecEnv([lambda: Monitor(normalized(limited()))] * 2)
    resumed = load_checkpoint(sorted(tmp_path.iterdir())[0], env)
    resumed.learn(20, reset_num_timesteps=False)
    env.close()
    assert fingerprint(resumed) == fingerprint(model)


def test_saving_leaves_no_traces(tmp_path: Path) -> None:
    env = single("observations")()
    model = make_model(env)
    model.learn(20)
    before = set(vars(env.envs[0]))  # type: ignore[attr-defined]
    save_checkpoint(model, tmp_path)
    assert set(vars(env.envs[0])) == before  # type: ignore[attr-defined]


LIBRARIES = {
    "gymnasium": ["gymnasium.wrappers"],
    "rl_zoo3": ["rl_zoo3.wrappers"],
    "sb3_contrib": ["sb3_contrib.common.wrappers"],
    "stable_baselines3": [f"stable_baselines3.common.{name}" for name in ("atari_wrappers", "monitor", "vec_env")],
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_wrapper_of_a_library_is_known(library: str) -> None:
    for name in LIBRARIES[library]:
        module = importlib.import_module(name)
        if module is wrappers:  # some of them need packages that are not installed
            found = [name for name in wrappers.__all__ if name != "vector"]
        else:
            classes = [value for value in vars(module).values() if isinstance(value, type)]
            found = [
                cls.__name__
                for cls in classes
                if issubclass(cls, gym.Wrapper | VecEnvWrapper) and cls.__module__.startswith(library)
            ]
        assert found and {f"{library}.{name}" for name in found} <= set(KNOWN)


def test_an_agent_without_environment(tmp_path: Path) -> None:
    model = make_model(single("own")())
    model.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="`model` must have an environment"):
        save_checkpoint(DIPO.load(tmp_path / "agent"), tmp_path / "run")
