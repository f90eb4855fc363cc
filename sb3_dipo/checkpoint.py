"""
Checkpoints from which training goes on as if it had never stopped, and which a killed process cannot spoil.

A checkpoint is a directory. Its manifest is renamed into place last, so a directory with a manifest is complete, and older
checkpoints are removed only after that. ``env_state.py`` takes the states of environments and wrappers, and
``checkpoint_folder.py`` manages the directories.
"""

import json
import os
import pathlib
import pickle
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import IO, Any, TypeVar, overload

import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_dipo import checkpoint_folder as folders
from sb3_dipo import env_state
from sb3_dipo.base import drop_running_episode, skip_next, stopped_in_a_step
from sb3_dipo.buffers import IMPROVED
from sb3_dipo.checks import check_int
from sb3_dipo.dipo import DIPO

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

FORMAT = 2  # 1 is that of version 0.1.0


def save_checkpoint(model: BaseAlgorithm, folder: str | os.PathLike[str], keep: int = 1) -> pathlib.Path:
    """
    Save everything that learning goes on from: agent, optimizers, counters, replay buffer with improved actions, statistics
    of wrappers, action noise, and the states of the random generators of Python, NumPy, torch, CUDA and the action space.

    Call it between rollouts, as :class:`ExactCheckpointCallback` does, or when ``learn()`` has returned. If the process is
    killed at any moment, either the previous checkpoint or this one is complete.

    The running episode continues after loading if the environment has ``get_env_state()``, which returns something
    picklable, and ``set_env_state(state)``; otherwise training goes on from a reset. The wrappers of Gymnasium,
    Stable-Baselines3, sb3-contrib and the RL Zoo are saved with the episode, in a ``DummyVecEnv`` and in a ``SubprocVecEnv``.
    A ``gym.Wrapper`` or ``VecEnvWrapper`` of your own that has a state gives it through the same two methods. If it has
    attributes and not these methods, the running episode is dropped, and :func:`load_checkpoint` warns of it.

    :param model: the agent, with an environment: a DIPO, or another of SB3's algorithms to compare it with
    :param folder: where the checkpoints of this run lie, each in a directory of its own; made if it is missing
    :param keep: number of complete checkpoints to keep, at least 1; older ones are removed
    :return: the new checkpoint's directory
    :raises ValueError: if the agent has no environment
    :raises BlockingIOError: if another run is writing into this folder
    :raises OSError: if it cannot be written, for want of space, say; those before it are kept then
    """
    check_int("keep", keep, 1)
    if model.env is None:
        raise ValueError("`model` must have an environment: see `set_env()`.")
    folder = pathlib.Path(folder)
    path = None
    try:
        with folders.claimed(folder):
            path = folders.new_directory(folder)
            _write(model, path)
            kept = folders.complete(folder)[-keep:]
            for old in [directory for directory in folders.directories(folder) if directory not in kept]:
                (old / folders.MANIFEST).unlink(missing_ok=True)  # first, so that what is left of it is no checkpoint
                shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if path is not None and not (path / folders.MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)
            left = folders.names(folders.complete(folder))
            error.add_note(f"No checkpoint was written to {folder}; there are still: {left}.")
        raise
    return path


def _write(model: BaseAlgorithm, path: pathlib.Path) -> None:
    """Write everything into an empty directory, and the manifest last."""
    env: Any = model.env
    rollout = _running_rollout(model)
    cut = rollout is not None and "new_obs" in rollout
    if cut:
        warnings.warn(
            "`save_checkpoint` was called in the middle of a rollout: the running episode will be dropped on loading. Call it "
            "between rollouts, in a callback's `_on_rollout_start`, or use `ExactCheckpointCallback`.",
            stacklevel=3,
        )
    # SB3 leaves open what it could not write, so files are opened here
    with (path / "model.zip").open("wb") as file:
        model.save(file)
    if isinstance(model, OffPolicyAlgorithm):
        with (path / "replay_buffer.pkl").open("wb") as file:
            _save_replay_buffer(model, file)
    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is not None:
        vec_normalize.save(str(path / "vecnormalize.pkl"))
    stopped = rollout is None and stopped_in_a_step(model)
    episode = model._last_obs is not None and not cut and not stopped
    state = {**env_state.get_state(env, episode), "episode": episode, "stopped": stopped}
    (path / "environment.pkl").write_bytes(pickle.dumps(state))
    (path / "random.json").write_text(json.dumps(_random_state(model)))
    with (path / "exploration.pt").open("wb") as file:
        th.save(_exploration_state(model, sampled=rollout is not None and not cut), file)
    manifest = {
        "format": FORMAT,
        "algorithm": type(model).__name__,
        "stable_baselines3": stable_baselines3.__version__,
        "torch": th.__version__,
        "num_timesteps": model.num_timesteps,
        "files": {written.name: folders.checksum(written) for written in sorted(path.iterdir())},
    }
    unfinished = path / f"{folders.MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=1))
    for written in (*path.iterdir(), path):
        folders.to_disk(written)
    unfinished.replace(path / folders.MANIFEST)
    folders.to_disk(path)
    folders.to_disk(path.parent)


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
    Load the newest complete checkpoint; ``learn(max(0, total - model.num_timesteps), reset_num_timesteps=False)`` goes on.

    On the CPU it goes on to the bit as if it had never stopped, if the environment and its wrappers give and take their
    states (see :func:`save_checkpoint`). Otherwise it goes on from the start of an episode, with the statistics of all
    wrappers, and a warning names the wrappers whose states were out of reach. The states of the process's random generators
    are set. Callbacks keep no state. Like SB3's ``load``, it unpickles: load only what you trust.

    Checkpoints of version 0.1.0 can be loaded; their running episode is dropped.

    :param folder: where the checkpoints lie, or one of them
    :param env: the environment to go on with, wrapped as before; ``VecNormalize`` may be left out and is put on then
    :param algorithm: the class of the agent
    :param device: where to put the agent
    :param kwargs: others of ``load``, such as ``custom_objects``
    :return: the agent
    :raises ValueError: if there is no complete checkpoint, a file of the newest is damaged, it is of another algorithm or a
        later format, or the environment is not wrapped as before; nothing in the folder is changed
    """
    path, manifest = folders.find(pathlib.Path(folder))
    if manifest.get("format") not in (1, FORMAT):
        raise ValueError(f"{path} has format {manifest.get('format')!r}, and this version of sb3_dipo reads 1 and {FORMAT}.")
    if manifest["algorithm"] != algorithm.__name__:
        raise ValueError(f"{path} holds a {manifest['algorithm']}, not a {algorithm.__name__}: see `algorithm`.")
    for name, checksum in manifest["files"].items():
        if not (path / name).is_file() or folders.checksum(path / name) != checksum:
            others = folders.names([other for other in folders.complete(path.parent) if other != path])
            raise ValueError(f"{path / name} is damaged or missing. Other checkpoints, for `folder`: {others}.")

    state = pickle.loads((path / "environment.pkl").read_bytes())
    if manifest["format"] == 1:
        if state is not None:
            _warn_of_drop(f"{path} was saved by version 0.1.0 of sb3_dipo.")
        state = None
    vec_env = _with_statistics(algorithm._wrap_env(env, verbose=0), path / "vecnormalize.pkl")
    exact = state is not None and state["episode"] and env_state.continues(state)
    if exact and not env_state.gives_state(vec_env):
        raise ValueError("`env` must have `get_env_state()` and `set_env_state(state)`, as the checkpoint's had.")
    model = algorithm.load(path / "model.zip", env=vec_env, device=device, force_reset=not exact, **kwargs)
    if isinstance(model, OffPolicyAlgorithm):
        _load_replay_buffer(model, path / "replay_buffer.pkl")
    if exact:
        vec_env.reset()  # wrappers ask for one
    if state is not None:
        env_state.set_state(vec_env, state, episode=exact)
    if exact:
        _set_exploration_state(model, path / "exploration.pt")
    else:
        lost = env_state.lost_wrappers(state) if state else []
        if state is not None and state.get("stopped"):
            _warn_of_drop("Training had been stopped in a step that the environment took and SB3 did not store.")
        elif lost:
            _warn_of_drop(
                f"The checkpoint does not hold the state of {', '.join(lost)}, which needs methods `get_env_state()` and "
                "`set_env_state(state)` for that."
            )
        drop_running_episode(model)
        if model.seed is not None:  # not the same first episode each time
            vec_env.seed(model.seed + model.num_timesteps)
    _set_random_state(model, json.loads((path / "random.json").read_text()))
    return model


def _warn_of_drop(reason: str) -> None:
    warnings.warn(f"{reason} The running episode is dropped, and training goes on from a reset.", stacklevel=3)


class ExactCheckpointCallback(BaseCallback):
    """
    Calls :func:`save_checkpoint` every ``save_freq`` environment steps, between rollouts, and when training ends.

    Inside another callback, such as ``EveryNTimesteps`` or the ``callback_on_new_best`` of ``EvalCallback``, it saves before
    the rollout that follows the event, or when training ends if none follows; without an event it does not save.

    From its first call until training ends the folder belongs to this run: another run that wants to write into it is
    refused with an error. The lock is the operating system's, so it ends with the process. On Windows, and on file systems
    without locks, nothing is refused, and two runs in one folder remove each other's checkpoints.

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
        self.due = False
        self.heard: BaseCallback | None = None

    def _init_callback(self) -> None:
        self.saved_at = self.model.num_timesteps
        self.due = False

    def _on_training_start(self) -> None:
        folders.claim(self.folder)
        self._listen()

    def _on_step(self) -> bool:
        if not self.due and self.model.num_timesteps - self.saved_at >= self.save_freq:
            self.due = True
            self._on_training_start()  # which `EvalCallback` does not pass on
        return True

    def _on_rollout_start(self) -> None:
        if self.due:
            self._save()

    def _on_training_end(self) -> None:
        try:
            if self.due or self.parent is None:
                self._save()
        finally:
            folders.release(self.folder)

    def _listen(self) -> None:
        """SB3's event callbacks do not pass on starts of rollouts and ends of training: hear of them from the outermost."""
        outermost = self.parent
        while outermost is not None and outermost.parent is not None:
            outermost = outermost.parent
        if outermost is None or outermost is self.heard:
            return
        self.heard = outermost
        for name in ("_on_rollout_start", "_on_training_end"):
            setattr(outermost, name, _one_after_the_other(getattr(outermost, name), getattr(self, name)))

    def _save(self) -> None:
        path = save_checkpoint(self.model, self.folder, self.keep)
        self.saved_at = self.model.num_timesteps
        self.due = False
        if self.verbose:
            print(f"Saved {path} after {self.saved_at} steps")


def _one_after_the_other(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


# ------------------------------------------------------------------------------------------------- agents


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
    for name in ("training", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys"):
        if getattr(own, name) != saved[name]:
            raise ValueError(
                f"`env` must have a VecNormalize with `{name}={saved[name]}`, as the checkpoint's had, or none, not one with "
                f"`{name}={getattr(own, name)}`."
            )
    vars(own).update({name: value for name, value in saved.items() if name not in ("venv", "num_envs", "render_mode")})
    return env


def _save_replay_buffer(model: OffPolicyAlgorithm, file: IO[bytes]) -> None:
    """SB3's buffers save all rows, DIPO's only those that are filled, and so SB3's are saved in the classes of DIPO's."""
    own: Any = model.replay_buffer
    if type(own) in IMPROVED:
        model.replay_buffer = _with_class(own, IMPROVED[type(own)])
    try:
        model.save_replay_buffer(file)  # type: ignore[arg-type]
    finally:
        model.replay_buffer = own


def _load_replay_buffer(model: OffPolicyAlgorithm, path: pathlib.Path) -> None:
    model.load_replay_buffer(path, truncate_last_traj=False)
    saved_as = {improved_class: own_class for own_class, improved_class in IMPROVED.items()}
    loaded: Any = model.replay_buffer
    if not isinstance(model, DIPO) and type(loaded) in saved_as:
        model.replay_buffer = _with_class(loaded, saved_as[type(loaded)])


def _with_class(replay_buffer: Any, cls: type[Any]) -> Any:
    copied = object.__new__(cls)
    vars(copied).update(vars(replay_buffer))
    return copied


def _running_rollout(model: BaseAlgorithm) -> dict[str, Any] | None:
    """The local variables of the agent's ``collect_rollouts``, if that has called what calls this."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "collect_rollouts" and frame.f_locals.get("self") is model:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _exploration_state(model: BaseAlgorithm, sampled: bool) -> dict[str, Any]:
    """
    What acts in the next rollout and is in neither ``model.zip`` nor the environment: the last observations and the like,
    which SB3's ``load`` may set anew, and the matrices of gSDE, which a rollout samples before its callbacks are called.
    """
    matrices = {}
    if model.use_sde and (sampled or "reset_noise" in vars(_explorer(model))):
        names = ("exploration_mat", "exploration_matrices")
        matrices = {name: getattr(_explorer(model).action_dist, name).detach() for name in names}
    last = {name: value for name, value in vars(model).items() if name.startswith("_last_")}
    return {"matrices": matrices, "last": last}


def _set_exploration_state(model: BaseAlgorithm, path: pathlib.Path) -> None:
    state = th.load(path, map_location=model.device, weights_only=False)
    vars(model).update(state["last"])
    if state["matrices"]:
        vars(_explorer(model).action_dist).update(state["matrices"])
        skip_next(_explorer(model), "reset_noise")  # as it was called before the checkpoint
    # SB3's learn() resets the noise, even in the middle of an episode; DIPO's does not
    if getattr(model, "action_noise", None) is not None and not isinstance(model, DIPO):
        skip_next(model.action_noise, "reset")


def _explorer(model: Any) -> Any:
    """What samples the matrices of gSDE."""
    return model.actor if isinstance(model, OffPolicyAlgorithm) else model.policy


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
