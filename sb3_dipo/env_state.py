"""
What environments and their wrappers keep from one step to the next, and how a checkpoint takes it and gives it back.

An environment, a ``gym.Wrapper`` or a ``VecEnvWrapper`` gives its state through a pair of methods: ``get_env_state()`` returns
something picklable, and ``set_env_state(state)`` goes on from it, after a reset or before. The pair of an environment covers
its random generator. The pair of a wrapper covers the wrapper alone; a wrapper that has no attributes of its own has nothing
to give but the state of the environment beneath it, and so its pair covers that (``MujocoState`` is one).

``KNOWN`` lists the wrappers of Gymnasium, Stable-Baselines3, its contributions and the RL Zoo, which need no such pair. A
wrapper of any other class has no state if it has no attributes. If it has some, they may be a state: it is *lost*.

This file stands alone because it also runs in the processes of a ``SubprocVecEnv``.
"""

import functools
import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

WRAPPERS = (gym.Wrapper, VecEnvWrapper)
PAIR = ("get_env_state", "set_env_state")
METHOD = "_sb3_dipo_apply"

# Attributes in which classes keep a state: first the statistics, which outlive an episode, then those of a running episode.
# A class is named by its package and its own name, so that packages which are not installed can be listed.
KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gymnasium.AtariPreprocessing": ((), ("obs_buffer", "lives", "game_over")),
    "gymnasium.Autoreset": ((), ("autoreset",)),
    "gymnasium.DelayObservation": ((), ("observation_queue",)),
    "gymnasium.FrameStackObservation": ((), ("obs_queue", "padding_value")),
    "gymnasium.MaxAndSkipObservation": ((), ("_obs_buffer",)),
    "gymnasium.NormalizeObservation": (("obs_rms",), ()),
    "gymnasium.NormalizeReward": (("return_rms",), ("discounted_reward",)),
    "gymnasium.RecordEpisodeStatistics": (
        ("episode_count", "time_queue", "return_queue", "length_queue"),
        ("episode_returns", "episode_lengths"),
    ),
    "gymnasium.RecordVideo": (("step_id", "episode_id"), ()),
    "gymnasium.StickyAction": ((), ("last_action", "is_sticky_actions", "num_repeats", "repeats_taken")),
    "gymnasium.TimeAwareObservation": ((), ("timesteps",)),
    "gymnasium.TimeLimit": ((), ("_elapsed_steps",)),
    "rl_zoo3.ActionSmoothingWrapper": ((), ("smoothed_action",)),
    "rl_zoo3.DelayedRewardWrapper": ((), ("current_step", "accumulated_reward")),
    "rl_zoo3.HistoryWrapper": ((), ("obs_history", "action_history")),
    "rl_zoo3.HistoryWrapperObsDict": ((), ("obs_history", "action_history")),
    "rl_zoo3.TruncatedOnSuccessWrapper": ((), ("current_successes",)),
    "sb3_contrib.TimeFeatureWrapper": ((), ("_current_step",)),
    "stable_baselines3.EpisodicLifeEnv": ((), ("lives", "was_real_done")),
    "stable_baselines3.MaxAndSkipEnv": ((), ("_obs_buffer",)),
    "stable_baselines3.Monitor": (
        ("episode_returns", "episode_lengths", "total_steps"),
        ("rewards", "needs_reset", "current_reset_info"),
    ),
    "stable_baselines3.StickyActionEnv": ((), ("_sticky_action",)),
    "stable_baselines3.VecFrameStack": ((), ("stacked_obs",)),
    "stable_baselines3.VecMonitor": (("episode_count",), ("episode_returns", "episode_lengths")),
    "stable_baselines3.VecNormalize": (("obs_rms", "ret_rms"), ("returns", "old_obs", "old_reward")),
    "stable_baselines3.VecVideoRecorder": (("step_id",), ()),
}
# Those without one, and the classes that they are built on.
STATELESS = {
    "gymnasium": """
        Wrapper RecordConstructorArgs EzPickle OrderEnforcing PassiveEnvChecker RepeatAction
        ClipAction DiscretizeAction RescaleAction TransformAction ClipReward TransformReward
        AddRenderObservation DiscretizeObservation DtypeObservation FilterObservation FlattenObservation
        GrayscaleObservation RescaleObservation ReshapeObservation ResizeObservation TransformObservation
        AddWhiteNoise HumanRendering ObstructView RenderCollection ArrayConversion JaxToNumpy JaxToTorch NumpyToTorch""",
    "rl_zoo3": "ActionNoiseWrapper FrameSkip MaskVelocityWrapper YAMLCompatResizeObservation",
    "sb3_contrib": "ActionMasker",
    "stable_baselines3": """
        AtariWrapper ClipRewardEnv FireResetEnv NoopResetEnv WarpFrame
        VecEnv VecEnvWrapper DummyVecEnv SubprocVecEnv VecCheckNan VecExtractDictObs VecTransposeImage""",
}
KNOWN |= {f"{package}.{name}": ((), ()) for package, names in STATELESS.items() for name in names.split()}


def get_state(env: VecEnv, episode: bool) -> dict[str, Any]:
    """
    Take the states of an environment, of its wrappers, and of the random generators that they draw from.

    :param env: the environment, with all its wrappers
    :param episode: whether there is a running episode to go on with; otherwise the environment itself is not asked
    :return: something picklable for :func:`set_state`
    """
    each = _for_each(env, _take, [(episode,)] * env.num_envs)
    return {"together": _take(env, episode), "each": each}


def set_state(env: VecEnv, state: dict[str, Any], episode: bool) -> None:
    """
    Give back what :func:`get_state` returned.

    :param env: an environment that is wrapped in the same way
    :param state: what ``get_state`` returned
    :param episode: True to go on with the running episode; the environment must have been reset before. False to give back
        the statistics of wrappers and the states that wrappers gave themselves; a reset must follow
    :raises ValueError: if the environment is wrapped in another way
    """
    own, saved = _names(env, _for_each(env, _carrying)), _names_of(state)
    if own != saved:
        raise ValueError(f"`env` must be wrapped as the checkpoint's was, in {saved}, not in {own}.")
    _for_each(env, _give, [(taken, episode) for taken in state["each"]])
    _give(env, state["together"], episode)


def lost_wrappers(state: dict[str, Any]) -> list[str]:
    """The classes of wrappers whose states were out of reach of :func:`get_state`, each once."""
    return list(dict.fromkeys(name for taken in (state["together"], *state["each"]) for name in taken["lost"]))


def continues(state: dict[str, Any]) -> bool:
    """Whether the running episode goes on after :func:`set_state`."""
    return not lost_wrappers(state) and all(taken["covered"] for taken in (state["together"], *state["each"]))


def gives_state(env: VecEnv) -> bool:
    """Whether each single environment gives and takes its state, by itself or by a wrapper."""
    return _covered(env) and all(_for_each(env, _covered))


# ------------------------------------------------------------------------------------------------- one chain of wrappers


def _layers(env: Any) -> list[Any]:
    """A chain of wrappers, from the outermost to what is wrapped in them."""
    found = [env]
    while isinstance(found[-1], WRAPPERS):
        found.append(found[-1].env if isinstance(found[-1], gym.Wrapper) else found[-1].venv)
    return found


def _take(env: Any, episode: bool) -> dict[str, Any]:
    base = env.unwrapped
    taken: dict[str, Any] = {"lost": _lost(env), "covered": _covered(env), "layers": [], "generators": None}
    if isinstance(base, gym.Env):
        generator = getattr(getattr(base, "_np_random", None), "bit_generator", None)
        taken["generators"] = (random.getstate(), np.random.get_state(), generator and generator.state)
    for layer, name in zip(_layers(env), _carrying(env), strict=True):
        if name:
            parts = [{key: vars(layer)[key] for key in keys if key in vars(layer)} for keys in _state_names(layer)]
            asked = _has_pair(layer) and (episode or _has_own_state(layer))
            taken["layers"].append((name, *parts, layer.get_env_state() if asked else None))
    return taken


def _give(env: Any, taken: dict[str, Any], episode: bool) -> None:
    layers = [layer for layer, name in zip(_layers(env), _carrying(env), strict=True) if name]
    if episode and taken["generators"]:
        python, legacy, generator = taken["generators"]
        random.setstate(python)
        np.random.set_state(legacy)
        if generator:
            env.unwrapped.np_random.bit_generator.state = generator
    # from the inside out, as a wrapper may look at what it wraps
    for layer, (_, statistics, running, given) in reversed(list(zip(layers, taken["layers"], strict=True))):
        vars(layer).update({**statistics, **running} if episode else statistics)
        if _has_pair(layer) and (episode or _has_own_state(layer)):
            layer.set_env_state(given)


def _carrying(env: Any) -> list[str]:
    """For each layer its name if it has a state that can be saved or is lost, else an empty string."""
    names = []
    for layer in _layers(env):
        carries = _has_pair(layer) or any(_state_names(layer)) or _has_own_state(layer)
        names.append((type(layer).__name__ if isinstance(layer, WRAPPERS) else "environment") if carries else "")
    return names


def _names(env: VecEnv, each: list[list[str]]) -> list[list[str]]:
    return [[name for name in names if name] for names in (_carrying(env), *each)]


def _names_of(state: dict[str, Any]) -> list[list[str]]:
    return [[name for name, *_ in taken["layers"]] for taken in (state["together"], *state["each"])]


def _lost(env: Any) -> list[str]:
    """Wrappers, and classes of vectorised environments, with attributes of their own and no way to give them."""
    return [
        type(layer).__name__
        for layer in _layers(env)
        if isinstance(layer, gym.Wrapper | VecEnv) and not _has_pair(layer) and _own_attributes(layer)
    ]


def _covered(env: Any) -> bool:
    """Whether what is wrapped gives its state, or has wrappers that do it in its place."""
    *wrappers, base = _layers(env)
    if isinstance(base, DummyVecEnv | SubprocVecEnv) or _has_pair(base):
        return True
    return any(_has_pair(wrapper) and not _has_own_state(wrapper) for wrapper in wrappers)


def _has_own_state(layer: Any) -> bool:
    """Whether it is a wrapper with attributes of its own, which may be a state."""
    return isinstance(layer, WRAPPERS) and bool(_own_attributes(layer))


def _has_pair(layer: Any) -> bool:
    # hasattr() alone would find the methods of the environment beneath a VecEnvWrapper
    own = all(name in vars(layer) or hasattr(type(layer), name) for name in PAIR)
    return own and all(callable(getattr(layer, name, None)) for name in PAIR)


def _known_classes(layer: Any) -> list[type]:
    return [cls for cls in type(layer).__mro__ if _key(cls) in KNOWN]


def _key(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _state_names(layer: Any) -> tuple[list[str], list[str]]:
    """The attributes in which the known classes of a wrapper keep statistics, and the state of a running episode."""
    known = [KNOWN[_key(cls)] for cls in _known_classes(layer)]
    return [name for statistics, _ in known for name in statistics], [name for _, running in known for name in running]


def _own_attributes(layer: Any) -> set[str]:
    """Attributes that no known class sets, and that are not the environments beneath."""
    beneath = _layers(layer)
    set_by_known = {
        name
        for cls in _known_classes(layer)
        for function in vars(cls).values()
        if isinstance(function, types.FunctionType)
        for name in function.__code__.co_names
    }
    own = {name for name, value in vars(layer).items() if not any(value is inner for inner in beneath)}
    return {name for name in own - set_by_known if name != METHOD and not name.startswith("__")}


# ------------------------------------------------------------------------------------------------- single environments


def _for_each(env: VecEnv, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
    """Call ``function(single_env, *arguments)`` for each single environment, in the process where that lives."""
    base: VecEnv = env.unwrapped
    arguments = arguments or [()] * base.num_envs
    if isinstance(base, DummyVecEnv):
        return [function(single, *given) for single, given in zip(base.envs, arguments, strict=True)]
    if not isinstance(base, SubprocVecEnv):
        return []
    reachable: Any = _Reachable
    results = []
    for index, (wrapped, given) in enumerate(zip(base.env_is_wrapped(reachable), arguments, strict=True)):
        if wrapped:
            results += base.env_method(METHOD, function, *given, indices=index)
        else:
            results.append(function(_bare(base, index), *given))
    return results


class _Reach(type):
    """
    Brings a function to the environments in the processes of a ``SubprocVecEnv``, which can only call their methods.

    ``VecEnv.env_is_wrapped(cls)`` asks there, from the outside in, whether a wrapper is an instance of ``cls``. This one says
    yes to the first, after it has given it a method that calls any function with it.
    """

    def __instancecheck__(cls, env: Any) -> bool:
        vars(env)[METHOD] = functools.partial(_apply, env)
        return True


class _Reachable(metaclass=_Reach):
    pass


def _apply(env: gym.Env[Any, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    return function(env, *arguments)


class _Remote(gym.Env[Any, Any]):
    """Stands for an environment without wrappers in another process."""

    def __init__(self, vec_env: VecEnv, index: int):
        self.vec_env = vec_env
        self.index = index

    def get_env_state(self) -> Any:
        return self.vec_env.env_method("get_env_state", indices=self.index)[0]

    def set_env_state(self, state: Any) -> None:
        self.vec_env.env_method("set_env_state", state, indices=self.index)


def _bare(vec_env: VecEnv, index: int) -> gym.Env[Any, Any]:
    return _Remote(vec_env, index) if all(map(vec_env.has_attr, PAIR)) else gym.Env()
