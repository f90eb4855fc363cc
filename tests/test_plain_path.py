"""
``accelerate="off"`` is the plain path: no line of ``sb3_dipo.fast`` runs, and what DIPO does, it does without it. Each of
these tests runs in a process of its own, because a module that was imported once stays.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

USE = """
import sys
import tempfile

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_dipo
from sb3_dipo import DIPO, ExactCheckpointCallback, load_checkpoint

folder = sys.argv[1]
ran = set()


def trace(frame, event, argument):
    ran.add(frame.f_code.co_filename)


def use(**kwargs):
    options = dict(net_arch=[8], **kwargs.pop("options", {"num_train_timesteps": 3}))
    settings = dict(device="cpu", learning_starts=10, batch_size=40, policy_kwargs=options, seed=0, **kwargs)
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = DIPO("MlpPolicy", env, accelerate="off", **settings)
    checkpoints = tempfile.mkdtemp(dir=folder)
    model.learn(30, callback=ExactCheckpointCallback(15, checkpoints))
    assert model._n_updates == 20
    observations = np.zeros((40, 3), np.float32)
    for deterministic in (True, False):
        expected = model.predict(observations, deterministic=deterministic)[0]
        model.predict(observations[:1], deterministic=deterministic)
    model.policy.set_sampler("behaviour", noise_scale=0.5)
    model.policy(th.zeros(2, 3).requires_grad_()).sum().backward()
    model.save(folder + "/model")
    model.save_replay_buffer(folder + "/buffer")
    loaded = DIPO.load(folder + "/model", env=env, device="cpu")
    loaded.load_replay_buffer(folder + "/buffer")
    loaded.learn(5, reset_num_timesteps=False)
    loaded.set_parameters(model.get_parameters())
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    load_checkpoint(checkpoints, env).learn(5, reset_num_timesteps=False)
"""


def run(code: str, *arguments: str) -> str:
    """What a script prints that is run in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_line_of_fast_runs(tmp_path: Path) -> None:
    """Learning, acting, saving, loading, resuming: measured by what was imported, and by what Python has called."""
    out = run(
        f"""{USE}
sys.setprofile(trace)
use()
use(n_steps=3)
use(options=dict(actor="vae", latent_dim=4))
use(options=dict(actor="mlp", n_critics=3))
sys.setprofile(None)
files = {{file.replace("\\\\", "/") for file in ran}}
print(sorted(name for name in sys.modules if name.startswith("sb3_dipo.fast")))
print(sorted(file for file in files if "sb3_dipo/fast/" in file))
core = ("dipo.py", "policies.py", "actors.py", "critics.py", "networks.py")
print(sum(any(file.endswith("sb3_dipo/" + name) for file in files) for name in core))
""",
        str(tmp_path),
    )
    assert out.splitlines() == ["[]", "[]", "5"]


def test_fast_is_what_it_would_have_seen(tmp_path: Path) -> None:
    """The same measurement with another mode."""
    out = run(
        f"""{USE.replace('"off"', '"auto"')}
sys.setprofile(trace)
use()
sys.setprofile(None)
print("sb3_dipo.fast.ops" in sys.modules, any(file.endswith("fast/ops.py") for file in ran))
""",
        str(tmp_path),
    )
    assert out == "True True\n"


def test_without_fast(tmp_path: Path) -> None:
    """As if the folder had been deleted; asking for another mode says so."""
    out = run(
        f"""
import without_fast
without_fast.leave_out_fast()
{USE.replace('accelerate="off", ', "")}
use()
model = DIPO.load(folder + "/model", device="cpu")
policy = sb3_dipo.DIPOPolicy
model.policy.save(folder + "/policy.pkl")
loaded = policy.load(folder + "/policy.pkl")
observations = np.zeros((40, 3), np.float32)
expected = model.predict(observations, deterministic=True)[0]
np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)
try:
    DIPO("MlpPolicy", "Pendulum-v1", accelerate="auto", device="cpu")
except ImportError as error:
    print(error)
""",
        str(tmp_path),
    )
    assert "fast" in out


SELECTIONS = [
    pytest.param(["test_golden.py", "test_oracle.py"], id="right numbers"),
    pytest.param(["test_run.py"], id="training", marks=pytest.mark.slow),
    pytest.param(["test_save_load.py"], id="saving and loading", marks=pytest.mark.slow),
    pytest.param(["test_networks.py", "test_action_gradient.py", "test_buffers.py"], id="parts", marks=pytest.mark.slow),
    pytest.param(
        ["test_her.py", "test_n_step.py", "test_dict_env.py", "test_vec_normalize.py"], id="rest", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("files", SELECTIONS)
def test_behaviour_without_fast(files: list[str]) -> None:
    """The tests of behaviour pass where nothing of ``sb3_dipo.fast`` can be imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-p", "without_fast", "-p", "no:cacheprovider", "-q", "--no-header", "-x"]
    command.append("--hypothesis-seed=0")  # the same examples every time
    paths = [str(TESTS / file) for file in files]
    done = subprocess.run([*command, *paths], env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary and int(summary.split(" passed")[0].split()[-1]) >= 20
