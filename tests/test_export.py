"""The exported policy is `predict(deterministic=True)`, in onnxruntime and in a process that knows torch only."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch as th
from envs import LinearExtractor, TinyEnv, small_dipo
from gymnasium import spaces

from sb3_dipo import DIPO
from sb3_dipo.actors import DiffusionActor

SCRIPT = Path(__file__).parent.parent / "examples" / "export.py"
BOXES = {
    "(2,)": spaces.Box(np.array([-3.0, 0.5], np.float32), np.array([1.0, 2.0], np.float32)),
    "(2, 3)": spaces.Box(np.array([[-3, 0.5, -1], [0, -3, 1]], np.float32), np.array([[1, 2, 1], [1, 2, 4]], np.float32)),
}
# dpmpp_2m without the cosine schedule, whose first step multiplies float32's rounding by sigma / alpha = 103: there two
# batch sizes of predict() itself differ by up to 1.5e-5
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddpm": ("(2,)", {}, {}),
    "dpmpp_2m": ("(2, 3)", {"beta_schedule": "vp"}, {"solver": "dpmpp_2m", "num_inference_steps": 3}),
    "ddim": ("(2,)", {"features_extractor_class": LinearExtractor, "share_features_extractor": True}, {"solver": "ddim"}),
    "flow": ("(2, 3)", {"actor": "flow"}, {}),
    "flow, midpoint": ("(2,)", {"actor": "flow", "critic": "quantile"}, {"solver": "midpoint", "num_inference_steps": 2}),
    "vae": ("(2, 3)", {"actor": "vae"}, {}),
    "mlp": ("(2,)", {"actor": "mlp"}, {}),
}
ELSEWHERE = """
import sys
import numpy as np
import torch
actions = torch.export.load("policy.pt2").module()(torch.from_numpy(np.load("observations.npy")))
assert not {"sb3_dipo", "stable_baselines3", "gymnasium"} & set(sys.modules)
np.save("actions.npy", actions.numpy())
"""

# torch.export's own: it unpickles a class that torch deprecates; torch 2.11 also makes a tensor of the bytes that it read
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]


def fit(model: DIPO) -> None:
    """Give the actor something to say: actions inside the box that depend on the observation."""
    actor = model.policy.actor
    optimizer = th.optim.Adam(actor.own_parameters(), lr=1e-2)
    for _ in range(200):
        observations = th.rand(64, 3) * 2 - 1
        actions = 0.8 * observations.repeat(1, 2)[:, : actor.action_dim]
        optimizer.zero_grad()
        actor.loss(actor.extract_features(observations), actions).backward()
        optimizer.step()


def run_example(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def in_onnxruntime(folder: Path, observations: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(folder / "policy.onnx").run(None, {"observations": observations})[0]


@pytest.mark.parametrize("name", CASES)
def test_export_equals_predict(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box, policy_kwargs, sampler = CASES[name]
    model = small_dipo(TinyEnv(BOXES[box]), policy_kwargs=policy_kwargs)
    fit(model)
    model.policy.set_sampler("evaluation", **sampler)
    model.save(tmp_path / "agent.zip")
    run_example(monkeypatch, str(tmp_path / "agent.zip"), "--folder", str(tmp_path / "new" / "folder"))

    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {"policy.onnx", "policy.pt2"}
    model = DIPO.load(tmp_path / "agent.zip", device="cpu")
    reloaded = th.export.load(folder / "policy.pt2").module()
    model.observation_space.seed(0)
    for batch_size in (1, 7):
        observations = np.stack([model.observation_space.sample() for _ in range(batch_size)])
        expected, _ = model.predict(observations, deterministic=True)
        assert expected.shape == (batch_size, *BOXES[box].shape)
        np.testing.assert_allclose(in_onnxruntime(folder, observations), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(reloaded(th.from_numpy(observations)), expected, rtol=0, atol=1e-5)
    moves = np.ptp(expected, axis=0) / (BOXES[box].high - BOXES[box].low)
    assert (moves > 0.1).all(), "the actions are all alike: nothing was tested"


def test_factors_close_to_one_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the last step of the authors' sampler multiplies by 0.999997, which onnxscript's optimizer takes for 1
    model = small_dipo(policy_kwargs={"num_train_timesteps": 20})
    actor = model.policy.actor
    assert isinstance(actor, DiffusionActor)
    assert 1e-6 < 1 - actor.solver_table(model.policy.samplers["evaluation"]).steps[-1].b < 1e-5
    model.save(tmp_path / "agent.zip")
    run_example(monkeypatch, str(tmp_path / "agent.zip"), "--folder", str(tmp_path))
    observations = np.zeros((1, 3), np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(in_onnxruntime(tmp_path, observations), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_without_a_file_and_in_a_process_that_knows_torch_only(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("here: the largest difference from predict() is ")
    assert {path.name for path in tmp_path.iterdir()} == {"here"}

    observations = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.save(tmp_path / "here" / "observations.npy", observations)
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path / "here", check=True, timeout=300)
    actions = np.load(tmp_path / "here" / "actions.npy")
    assert actions.shape == (7, 1) and np.abs(actions).max() <= 2.0
    np.testing.assert_allclose(in_onnxruntime(tmp_path / "here", observations), actions, rtol=0, atol=1e-5)


def test_a_difference_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_dipo(policy_kwargs={"actor": "mlp"}).save(tmp_path / "agent.zip")
    predict = DIPO.predict

    def other_predict(self: DIPO, *args: Any, **kwargs: Any) -> tuple[np.ndarray, Any]:
        actions, state = predict(self, *args, **kwargs)
        return actions + np.float32(2e-5), state

    monkeypatch.setattr(DIPO, "predict", other_predict)
    with pytest.raises(SystemExit, match="more than 1e-05 of"):
        run_example(monkeypatch, str(tmp_path / "agent.zip"), "--folder", str(tmp_path))


def test_several_candidates_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_dipo(policy_kwargs={"num_candidates": 2}).save(tmp_path / "agent.zip")
    with pytest.raises(SystemExit, match=r"set_sampler\('evaluation', num_candidates=1\), not 2"):
        run_example(monkeypatch, str(tmp_path / "agent.zip"), "--folder", str(tmp_path))
