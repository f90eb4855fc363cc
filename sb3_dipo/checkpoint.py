"""
Checkpoints from which training goes on as if it had never stopped, and which a killed process cannot spoil.

A checkpoint is a directory. Its manifest is renamed into place last, so what has one is whole, and older checkpoints are
removed only after that.
"""

import hashlib
import json
import os
import pathlib
import pickle
import random
import shutil
import warnings
from typing import Any, TypeVar, overload

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    unwrap_vec_normalize,
)
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo.checks import check_int
from sb3_dipo.dipo import DIPO

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "checkpoint_"

# What a running episode has left in wrappers, which an environment's own state does not tell
WRAPPER_STATE: dict[type, tuple[str, ...]] = {
    TimeLimit: ("_elapsed_steps",),
    Monitor: ("rewards", "needs_reset", "current_reset_info", "episode_returns", "episode_lengths", "total_steps"),
    VecNormalize: ("obs_rms", "ret_rms", "returns", "old_obs", "old_reward"),
    VecMonitor: ("episode_returns", "episode_lengths", "episode_count"),
    VecFrameStack: ("stacked_obs",),
}


def save_checkpoint(model: BaseAlgorithm, folder: str | os.PathLike[str], keep: int = 1) -> pathlib.Path:
    """
    Save all that learns: agent, optimizers, counters, replay buffer with improved actions, VecNormalize's statistics, action
    noise, and the states of Python's, NumPy's, torch's, CUDA's and the action space's random generators.

    Call it between rollouts, as :class:`ExactCheckpointCallback` does, or when ``learn()`` has returned. Killing the process
    at any moment leaves the previous checkpoint, or this one, whole.

    An environment that has ``get_env_state()``, returning something picklable, and ``set_env_state(state)`` continues its
    running episode; the counters of ``TimeLimit`` and ``Monitor`` are kept with it, in a ``DummyVecEnv``. Of any other the
    running episode is dropped.

    :param model: the agent, with an environment: a DIPO, or another of SB3's algorithms to compare it with
    :param folder: where the checkpoints of this run lie, each in a directory of its own; made if it is missing
    :param keep: number of whole checkpoints to keep, at least 1; older ones are removed
    :return: the new checkpoint's directory
    :raises OSError: if it cannot be written, for want of space, say; those before it are kept then
    """
    check_int("keep", keep, 1)
    assert model.env is not None, "The model needs an environment: see `set_env()`."
    folder = pathlib.Path(folder)
    path = folder / f"{PREFIX}{max([0, *map(_sequence, _directories(folder))]) + 1:06d}"
    try:
        path.mkdir(parents=True)
        # opened here, as SB3 leaves open what it could not write
        with (path / "model.zip").open("wb") as file:
            model.save(file)
        if isinstance(model, OffPolicyAlgorithm):
            with (path / "replay_buffer.pkl").open("wb") as file:
                model.save_replay_buffer(file)
        vec_normalize = unwrap_vec_normalize(model.env)
        if vec_normalize is not None:
            vec_normalize.save(str(path / "vecnormalize.pkl"))
        (path / "environment.pkl").write_bytes(pickle.dumps(_environment_state(model.env)))
        (path / "random.json").write_text(json.dumps(_random_state(model)))
        manifest = {
            "format": FORMAT,
            "algorithm": type(model).__name__,
            "stable_baselines3": stable_baselines3.__version__,
            "torch": th.__version__,
            "num_timesteps": model.num_timesteps,
            "files": {written.name: _checksum(written) for written in sorted(path.iterdir())},
        }
        unfinished = path / f"{MANIFEST}.unfinished"
        unfinished.write_text(json.dumps(manifest, indent=1))
        for written in (*path.iterdir(), path):
            _to_disk(written)
        unfinished.replace(path / MANIFEST)
        _to_disk(path)
        _to_disk(folder)
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        error.add_note(f"No checkpoint was written to {folder}; there are still: {_names(_whole(folder))}.")
        raise
    for old in [directory for directory in _directories(folder) if directory not in _whole(folder)[-keep:]]:
        (old / MANIFEST).unlink(missing_ok=True)  # first, so that what is left of it is no checkpoint
        shutil.rmtree(old, ignore_errors=True)
    return path


@overload
def load_checkpoint(
    folder: str | os.PathLike[str], env: GymEnv, *, device: th.device | str = "auto", **kwargs: Any
) -> DIPO: ...


@overload
def load_checkpoint(
    folder: str | os.PathLike[str],
    env: GymEnv,
    algorithm: type[Algorithm],
    device: th.device | str = "auto",
    **kwargs: Any,
) -> Algorithm: ...


def load_checkpoint(
    folder: str | os.PathLike[str],
    env: GymEnv,
    algorithm: type[BaseAlgorithm] = DIPO,
    device: th.device | str = "auto",
    **kwargs: Any,
) -> BaseAlgorithm:
    """
    Load the newest whole checkpoint; ``learn(max(0, total - model.num_timesteps), reset_num_timesteps=False)`` goes on.

    On the CPU it goes on to the bit as if it had never stopped, if the environment gives and takes its state (see
    :func:`save_checkpoint`); with any other, from the start of an episode. It sets the states of the process's random
    generators. Callbacks keep no state. Like SB3's ``load``, it unpickles: load only what you trust.

    :param folder: where the checkpoints lie, or one of them
    :param env: the environment to go on with, wrapped as before; ``VecNormalize`` may be left out and is put on then
    :param algorithm: the class of the agent
    :param device: where to put the agent
    :param kwargs: others of ``load``, such as ``custom_objects``
    :return: the agent
    :raises ValueError: if there is no whole checkpoint, a file of the newest is damaged, or it is of another algorithm or a
        later format; nothing in the folder is changed
    """
    path, manifest = _find(pathlib.Path(folder))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, and this version of sb3_dipo reads {FORMAT}.")
    if manifest["algorithm"] != algorithm.__name__:
        raise ValueError(f"{path} holds a {manifest['algorithm']}, not a {algorithm.__name__}: see `algorithm`.")
    for name, checksum in manifest["files"].items():
        if not (path / name).is_file() or _checksum(path / name) != checksum:
            others = _names([other for other in _whole(path.parent) if other != path])
            raise ValueError(f"{path / name} is damaged or missing. Other checkpoints, for `folder`: {others}.")

    state = pickle.loads((path / "environment.pkl").read_bytes())
    vec_env = _with_statistics(algorithm._wrap_env(env, verbose=0), path / "vecnormalize.pkl")
    exact = state is not None
    if exact and not _gives_state(vec_env):
        raise ValueError("`env` must have `get_env_state()` and `set_env_state(state)`, as the checkpoint's had.")
    model = algorithm.load(path / "model.zip", env=vec_env, device=device, force_reset=not exact, **kwargs)
    if isinstance(model, OffPolicyAlgorithm):
        model.load_replay_buffer(path / "replay_buffer.pkl", truncate_last_traj=False)
    if exact:
        vec_env.reset()  # wrappers ask for one
        _set_environment_state(vec_env, state)
    else:
        _drop_running_episode(model)
        if model.seed is not None:  # not the same first episode each time
            vec_env.seed(model.seed + model.num_timesteps)
    _set_random_state(model, json.loads((path / "random.json").read_text()))
    return model


class ExactCheckpointCallback(BaseCallback):
    """
    Calls :func:`save_checkpoint` every ``save_freq`` environment steps, between rollouts, and when training ends.

    :param save_freq: environment steps, of all environments together, from one checkpoint to the next, at least 1
    :param folder: where the checkpoints of this run lie
    :param keep: number of checkpoints to keep, at least 1
    :param verbose: 1 says when a checkpoint is written
    """

    def __init__(self, save_freq: int, folder: str | os.PathLike[str], keep: int = 1, verbose: int = 0):
        super().__init__(verbose)
        self.save_freq = check_int("save_freq", save_freq, 1)
        self.folder = pathlib.Path(folder)
        self.keep = check_int("keep", keep, 1)
        self.saved_at = 0

    def _on_training_start(self) -> None:
        self.saved_at = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self.saved_at >= self.save_freq:
            self._save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        path = save_checkpoint(self.model, self.folder, self.keep)
        self.saved_at = self.model.num_timesteps
        if self.verbose:
            print(f"Saved {path} after {self.saved_at} steps")


# ------------------------------------------------------------------------------------------------- directories


def _sequence(directory: pathlib.Path) -> int:
    return int(directory.name.removeprefix(PREFIX))


def _directories(folder: pathlib.Path) -> list[pathlib.Path]:
    """Those of checkpoints, whole or not, in the order in which they were made."""
    found = folder.glob(f"{PREFIX}*") if folder.is_dir() else ()
    return sorted((path for path in found if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()), key=_sequence)


def _whole(folder: pathlib.Path) -> list[pathlib.Path]:
    return [directory for directory in _directories(folder) if (directory / MANIFEST).is_file()]


def _names(directories: list[pathlib.Path]) -> str:
    return ", ".join(map(str, directories)) or "none"


def _find(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    if not (folder / MANIFEST).is_file():
        whole = _whole(folder)
        if not whole:
            raise ValueError(f"`folder` must hold a whole checkpoint, one of the directories {PREFIX}*: {folder} has none.")
        folder = whole[-1]
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        assert isinstance(manifest, dict) and {"algorithm", "files"} <= set(manifest)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{folder / MANIFEST} is not the manifest of a checkpoint.") from error
    return folder, manifest


def _checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: pathlib.Path) -> None:
    """A rename must not get to the disk before what it makes visible. Windows opens no directories."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------- environments


def _gives_state(env: VecEnv) -> bool:
    return env.has_attr("get_env_state") and env.has_attr("set_env_state")


def _wrappers(env: VecEnv) -> list[Any]:
    """Those with a state of their own, from the outside in; of single environments only where they are in this process."""
    found: list[Any] = []
    vec_env: VecEnv = env
    while isinstance(vec_env, VecEnvWrapper):
        found.append(vec_env)
        vec_env = vec_env.venv
    for single in vec_env.envs if isinstance(vec_env, DummyVecEnv) else ():
        while isinstance(single, gym.Wrapper):
            found.append(single)
            single = single.env
    return [wrapper for wrapper in found if type(wrapper) in WRAPPER_STATE]


def _environment_state(env: VecEnv) -> dict[str, Any] | None:
    if not _gives_state(env):
        return None
    wrappers = _wrappers(env)
    return {
        "environments": env.env_method("get_env_state"),
        "wrappers": [type(wrapper).__name__ for wrapper in wrappers],
        "wrapper_states": [
            {name: vars(wrapper)[name] for name in WRAPPER_STATE[type(wrapper)] if name in vars(wrapper)}
            for wrapper in wrappers
        ],
    }


def _set_environment_state(env: VecEnv, state: dict[str, Any]) -> None:
    wrappers = _wrappers(env)
    names = [type(wrapper).__name__ for wrapper in wrappers]
    if names != state["wrappers"]:
        raise ValueError(f"`env` must be wrapped as the checkpoint's was, in {state['wrappers']}, not in {names}.")
    for index, saved in enumerate(state["environments"]):
        env.env_method("set_env_state", saved, indices=index)
    for wrapper, saved in zip(wrappers, state["wrapper_states"], strict=True):
        vars(wrapper).update(saved)


def _with_statistics(env: VecEnv, path: pathlib.Path) -> VecEnv:
    """Put saved statistics into the environment's VecNormalize, or put one on."""
    own = unwrap_vec_normalize(env)
    if not path.exists():
        if own is not None:
            raise ValueError("`env` must not be wrapped in VecNormalize, as the checkpoint's was not.")
        return env
    if own is None:
        return VecNormalize.load(str(path), env)
    saved = vars(pickle.loads(path.read_bytes()))
    check_for_correct_spaces(own, saved["observation_space"], saved["action_space"])
    vars(own).update({name: value for name, value in saved.items() if name not in ("venv", "num_envs", "render_mode")})
    return env


def _drop_running_episode(model: BaseAlgorithm) -> None:
    """Its last transition is followed by one of another episode."""
    replay_buffer: Any = getattr(model, "replay_buffer", None)
    if replay_buffer is None or replay_buffer.size() == 0:
        return
    last = (replay_buffer.pos - 1) % replay_buffer.buffer_size
    if isinstance(replay_buffer, HerReplayBuffer):
        with warnings.catch_warnings():  # SB3's, that it does what is asked for here
            warnings.simplefilter("ignore")
            replay_buffer.truncate_last_trajectory()
    elif isinstance(replay_buffer, NStepReplayBuffer):
        replay_buffer.timeouts[last] = 1 - replay_buffer.dones[last]
    elif replay_buffer.optimize_memory_usage:
        replay_buffer.dones[last] = True  # as SB3: its next observation will be overwritten


# ------------------------------------------------------------------------------------------------- random generators


def _random_state(model: BaseAlgorithm) -> dict[str, Any]:
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": th.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in th.cuda.get_rng_state_all()] if th.cuda.is_initialized() else [],
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def _set_random_state(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    th.set_rng_state(th.tensor(state["torch"], dtype=th.uint8))
    if model.device.type == "cuda" and len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.tensor(each, dtype=th.uint8) for each in state["cuda"]])
    model.action_space.np_random.bit_generator.state = state["action_space"]
