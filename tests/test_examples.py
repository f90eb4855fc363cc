"""The examples run, for a few updates, and write where they are told to."""

import re
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from PIL import Image
from processes import EXAMPLES, Scripts
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dipo import DIPO, RECOMMENDED


@pytest.mark.slow
def test_train(scripts: Scripts, tmp_path: Path) -> None:
    arguments = ("--timesteps", "105", "--learning-starts", "100", "--save-to", "here")
    printed = scripts.run(EXAMPLES / "train.py", *arguments, cwd=tmp_path)
    for line in (" at random, ", " before training.", " after 105 steps.", str(Path("here", "before_and_after.gif"))):
        assert line in printed
    with Image.open(tmp_path / "here" / "before_and_after.gif") as gif:
        assert gif.size == (410, 200)
        assert 100 < gif.n_frames <= 200  # frames that are alike are one
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    model = DIPO.load(tmp_path / "here" / "dipo.zip", device="cpu")
    assert model._n_updates == 5
    assert all(getattr(model, name) == value for name, value in RECOMMENDED.items())


@pytest.mark.slow
def test_compare(scripts: Scripts, tmp_path: Path) -> None:
    arguments = ("--timesteps", "1005", "--seeds", "0", "--folder", "here")
    printed = scripts.run(EXAMPLES / "compare.py", *arguments, cwd=tmp_path)
    for name in ("DIPO", "SAC", "TD3"):
        assert re.search(rf"^{name}: -\d+\.\d after 1,000 steps$", printed, flags=re.MULTILINE)
        assert (tmp_path / "here" / name.lower() / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()
    assert (tmp_path / "here" / "curves.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"here"}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "agents").glob("dipo/*/*.zip")), ids=lambda path: path.stem)
def test_agents_play_as_the_readme_says(path: Path) -> None:
    assert path.stat().st_size < 2 * 2**20
    model = DIPO.load(path, device="cpu")
    returns, _ = evaluate_policy(model, Monitor(gym.make(path.stem)), n_eval_episodes=1, warn=False)
    promised = re.search(rf"^\| {path.stem} \| [\d,]+ \| ([\d,]+) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert promised and returns == pytest.approx(float(promised[1].replace(",", "")), rel=0.15)


def test_a_packed_agent_is_small_and_acts_as_before(scripts: Scripts, tmp_path: Path) -> None:
    run = tmp_path / "logs" / "dipo" / "HalfCheetah-v5_1"
    (run / "HalfCheetah-v5").mkdir(parents=True)
    for name in ("config.yml", "args.yml"):
        (run / "HalfCheetah-v5" / name).write_text("- of a machine")
    model = DIPO("MlpPolicy", "HalfCheetah-v5", learning_starts=10, seed=0, device="cpu", **RECOMMENDED)
    model.learn(13)
    model.save(run / "best_model.zip")
    printed = scripts.run(EXAMPLES / "paper" / "pack_agent.py", str(run), "--out", "agents", cwd=tmp_path)
    assert re.search(r"HalfCheetah-v5\.zip: 1\.\d MiB", printed)
    packed = tmp_path / "agents" / "dipo" / "HalfCheetah-v5_1"
    assert {path.name for path in packed.rglob("*")} == {"HalfCheetah-v5", "HalfCheetah-v5.zip", "config.yml"}
    small = DIPO.load(packed / "HalfCheetah-v5.zip", device="cpu")
    observations = np.random.default_rng(0).normal(size=(3, 17)).astype(np.float32)
    expected, actions = (each.predict(observations, deterministic=True)[0] for each in (model, small))
    np.testing.assert_array_equal(actions, expected)
    for own, target in zip(small.actor.parameters(), small.actor_target.parameters(), strict=True):
        assert th.equal(own, target) and own.data_ptr() != target.data_ptr()
    shutil.rmtree(run)
    run.mkdir()
    with pytest.raises(AssertionError, match=r"neither best_model\.zip nor <env>\.zip"):
        scripts.run(EXAMPLES / "paper" / "pack_agent.py", str(run), cwd=tmp_path)
