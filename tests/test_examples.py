"""The examples run, for a few updates, and write where they are told to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_dipo import DIPO

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    printed = run("train.py", "--env", "Pendulum-v1", "--timesteps", "1005", "--save-to", "here", cwd=tmp_path)
    for line in ("random actions", "before training", "after   1,005 steps"):
        assert line in printed
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    assert DIPO.load(tmp_path / "here" / "dipo.zip", device="cpu")._n_updates == 5


@pytest.mark.slow
def test_pendulum(tmp_path: Path) -> None:
    arguments = ("--seeds", "3", "--timesteps", "1005", "--threads", "1", "--folder", "here")
    printed = run("pendulum.py", *arguments, cwd=tmp_path)
    assert "| seed 3 |" in printed and "after 1005 steps" in printed
    curve = (tmp_path / "here" / "seed_3.csv").read_text()
    assert curve.startswith("steps,mean_return") and "\n1000,-" in curve
    again = run("pendulum.py", *arguments, cwd=tmp_path)  # a finished seed is not run again: no progress bar, the same table
    assert again.startswith("| after") and printed.endswith(again)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"seed_3.csv", "table.md", "curves.png"}


@pytest.mark.slow
def test_compare(tmp_path: Path) -> None:
    assert len((ROOT / "examples" / "compare.py").read_text().splitlines()) <= 60
    printed = run("compare.py", "--timesteps", "1005", "--seeds", "0", "--folder", "here", cwd=tmp_path)
    for name in ("DIPO", "SAC", "TD3"):
        assert re.search(rf"^{name}: -\d+\.\d after 1,000 steps$", printed, flags=re.MULTILINE)
        assert (tmp_path / "here" / name.lower() / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()
    assert (tmp_path / "here" / "curves.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
