"""Training leaves the interpreter as it was: torch, NumPy, warnings, logging, signals, threads. As SAC, or better."""

import random
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch as th
from both import ALGORITHMS, CHANNELS_LAST, MIXED, both, policy_for, small, space_envs
from envs import goal_envs, tiny_envs
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

SETTINGS = """
import gc, logging, os, pathlib, random, signal, sys, threading, warnings
import numpy as np
import torch as th

def settings():
    loggers = [logging.getLogger(), *(x for x in logging.root.manager.loggerDict.values() if hasattr(x, "handlers"))]
    return {
        "dtype": th.get_default_dtype(),
        "device": str(th.get_default_device()),
        "gradients": (th.is_grad_enabled(), th.is_inference_mode_enabled(), th.is_anomaly_enabled()),
        "threads": (th.get_num_threads(), th.get_num_interop_threads(), threading.active_count()),
        "autocast": (th.is_autocast_enabled("cpu"), th.is_autocast_cache_enabled()),
        "deterministic": (th.are_deterministic_algorithms_enabled(), th.get_deterministic_debug_mode()),
        "precision": th.get_float32_matmul_precision(),
        "mkldnn": (th.backends.mkldnn.enabled, th.backends.mkldnn.matmul.fp32_precision),
        "cudnn": (th.backends.cudnn.enabled, th.backends.cudnn.benchmark, th.backends.cudnn.deterministic),
        "tf32": (th.backends.cuda.matmul.allow_tf32, th.backends.cudnn.allow_tf32),
        "checks": th.distributions.Distribution._validate_args,
        "sharing": th.multiprocessing.get_sharing_strategy(),
        "printing": (repr(th.tensor([1e-9, 1.0])), repr(np.array([1e-9, 1.0])), np.get_printoptions()),
        "numpy": np.geterr(),
        "warnings": list(warnings.filters),
        "logging": [(x.name, x.level, list(x.handlers), x.propagate, x.disabled) for x in loggers],
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, sys.stdout, sys.stderr, sys.gettrace()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "here": (os.getcwd(), sorted(os.listdir())),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
    }
"""


def run(code: str, tmp_path: Any, *options: str) -> subprocess.CompletedProcess[str]:
    """In a new interpreter that can import what is beside this file."""
    header = f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r})\n"
    command = [sys.executable, *options, "-c", header + SETTINGS + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)


def test_nothing_is_changed_and_nothing_is_said(tmp_path: Any) -> None:
    """
    With seeds and without; under `-W error`. What SB3 does in seeding concerns CUDA alone, where there is one.
    """
    code = """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what others import
            import stable_baselines3, torch._dynamo
            from both import CHANNELS_LAST, DIPO, MIXED, policy_for, small, space_envs
            from envs import goal_envs
            from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
            from stable_baselines3 import SAC
            small(SAC).learn(15)  # what is imported late
        before = settings()
        for seed in (0, None):
            for space in (CHANNELS_LAST, MIXED, MIXED["vector"]):
                model = small(DIPO, space_envs(space, 2), policy_for(space), seed=seed)
                model.learn(16)
                model.predict(model.env.reset(), deterministic=True)
            for actor in ("vae", "mlp"):
                model = DIPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"actor": actor, "net_arch": [8]}, learning_starts=10,
                             buffer_size=100, seed=seed, device="cpu")
                model.learn(16)
            small(DIPO, goal_envs(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, seed=seed).learn(16)
            small(DIPO, n_steps=3, seed=seed).learn(16)
        after = settings()
        for name in before:
            assert before[name] == after[name], (name, before[name], after[name])
    """
    finished = run(code, tmp_path, "-W", "error")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == finished.stderr == ""


@pytest.mark.parametrize("seed", [None, 0])
@both
def test_gradients_stay_switched_on_or_off(algorithm: type[Any], seed: int | None) -> None:
    """Where the user has switched them off, to act, they are off still."""
    model = small(algorithm, seed=seed)
    model.learn(15)
    with th.no_grad():
        model.predict(np.zeros(3))
        assert not th.is_grad_enabled()
    with th.inference_mode():
        model.predict(np.zeros(3), deterministic=True)
        assert th.is_inference_mode_enabled()
    assert th.is_grad_enabled()
    model.learn(12, reset_num_timesteps=False)


def test_global_generators_are_left_where_an_agent_has_no_seed() -> None:
    """Building an agent without a seed does not set one: two of them differ, and Python's own generator is not touched."""
    for algorithm in ALGORITHMS:
        before = random.getstate()
        first, second = (small(algorithm, seed=None) for _ in range(2))
        assert random.getstate() == before
        weights = [next(iter(model.actor.parameters())) for model in (first, second)]
        assert not th.equal(*weights)


# ------------------------------------------------------------------------------------------------- the same data as SAC


def goals(algorithm: type[Any], **kwargs: Any) -> Any:
    return small(algorithm, goal_envs(2), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, **kwargs)


def once(algorithm: type[Any], **kwargs: Any) -> Any:
    without = {"handle_timeout_termination": False}
    return small(algorithm, tiny_envs(2), optimize_memory_usage=True, replay_buffer_kwargs=without, **kwargs)


COLLECTED: dict[str, Any] = {
    "vector": lambda algorithm, **kwargs: small(algorithm, tiny_envs(3), **kwargs),
    "ends": lambda algorithm, **kwargs: small(algorithm, tiny_envs(2, truncate=False), **kwargs),
    "image": lambda algorithm, **kwargs: small(algorithm, space_envs(CHANNELS_LAST, 2), "CnnPolicy", **kwargs),
    "dict": lambda algorithm, **kwargs: small(algorithm, space_envs(MIXED, 2), policy_for(MIXED), **kwargs),
    "classes": lambda algorithm, **kwargs: small(algorithm, space_envs(spaces.MultiDiscrete([3, 2]), 2), **kwargs),
    "matrix": lambda algorithm, **kwargs: small(algorithm, tiny_envs(2, action_space=spaces.Box(-3.0, 1.0, (2, 3))), **kwargs),
    "normalized": lambda algorithm, **kwargs: small(algorithm, VecNormalize(tiny_envs(2)), **kwargs),
    "n-step": lambda algorithm, **kwargs: small(algorithm, tiny_envs(2), n_steps=3, **kwargs),
    "goals": goals,
    "once": once,
}


@pytest.mark.parametrize("name", COLLECTED)
def test_first_steps_and_the_critics_minibatches_are_those_of_sac(name: str) -> None:
    """With the same seed: every array that is stored before learning begins, and what is drawn of it."""
    buffers = []
    for algorithm in ALGORITHMS:
        # wraps around in its 40 rows
        model = COLLECTED[name](algorithm, learning_starts=149, gradient_steps=0, buffer_size=80)
        model.learn(150)
        buffers.append(model.replay_buffer)
        buffers[-1].normalizer = model._vec_normalize_env
    ours, theirs = buffers
    assert ours.full
    compared = 0
    for attribute, value in vars(theirs).items():
        for key, array in value.items() if isinstance(value, dict) else [(None, value)]:
            # of hindsight replay's infos, which are read only where asked to be kept, SB3 makes one dict for each row
            if isinstance(array, np.ndarray) and attribute != "infos":
                own = vars(ours)[attribute]
                np.testing.assert_array_equal(own if key is None else own[key], array)
                compared += 1
    assert compared >= 5
    for seed in range(3):
        drawn = []
        for buffer in buffers:
            np.random.seed(seed)
            drawn.append(buffer.sample(16, env=buffer.normalizer)._asdict())
        for part, wanted in drawn[1].items():
            for key, tensor in wanted.items() if isinstance(wanted, dict) else [(None, wanted)]:
                if tensor is not None:
                    own = drawn[0][part] if key is None else drawn[0][part][key]
                    assert own.dtype == tensor.dtype and th.equal(own, tensor), part
