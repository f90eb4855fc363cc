"""The comparison of few and many steps: runs keep their curves, and the report's numbers are right."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from sb3_dipo import DIPO

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "few_steps.py"


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("few_steps", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "few_steps", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def write_curve(folder: Path, env: str, setting: str, seed: int, returns: list[float], asked: int, ms: float) -> None:
    """A curve with an evaluation every 1,000 steps, the first 1,000 of them random and taking no time."""
    about = dict(steps=asked, learning_starts=1_000, eval_freq=1_000, device="cpu", versions={})
    settings = dict(policy_kwargs=dict(num_train_timesteps=20), action_gradient_steps=20, action_lr=0.03)
    rows = [f"{1_000 * (i + 1)},{value},1.0,{ms * i}" for i, value in enumerate(returns)]
    header = [f"# {json.dumps({**about, 'settings': settings})}", "steps,mean_return,std_return,train_seconds"]
    (folder / f"{env}-{setting}-seed{seed}.csv").write_text("\n".join([*header, *rows]) + "\n")


@pytest.mark.slow
def test_runs_and_report(tmp_path: Path) -> None:
    sizes = ("--steps", "305", "--learning-starts", "300", "--eval-freq", "200")
    for setting in ("paper", "long"):
        done = call("run", "--setting", setting, *sizes, "--out", "here", cwd=tmp_path)
        assert done.returncode == 0, (done.returncode, done.stderr)
        about, _, *rows = (tmp_path / "here" / f"Pendulum-v1-{setting}-seed0.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["200", "305"]
        assert json.loads(about[2:])["settings"]["action_gradient_steps"] == {"paper": 20, "long": 5}[setting]

    kept = (tmp_path / "here" / "Pendulum-v1-long-seed0.csv").read_bytes()
    again = call("run", "--setting", "long", "--steps", "400", "--out", "here", cwd=tmp_path)
    assert again.returncode == 1 and "holds a finished run of 305 steps" in again.stderr
    assert (tmp_path / "here" / "Pendulum-v1-long-seed0.csv").read_bytes() == kept

    done = call("report", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "Pendulum-v1, long, after 305 steps, n = 1 and 1: no claim" in done.stdout
    assert "No runs of HalfCheetah-v5" in done.stdout and "Missing: Pendulum-v1, long, seed 4 (no curve)" in done.stdout
    assert names(tmp_path) == {"here"}
    curves = {f"Pendulum-v1-{setting}-seed0.csv" for setting in ("paper", "long")}
    assert names(tmp_path / "here") == curves | {"few_steps.md", "few_steps.svg"}


@pytest.mark.slow
def test_report_by_hand(tmp_path: Path) -> None:
    env = "Pendulum-v1"
    for seed in range(5):
        # Final returns, of the last three: -200, -190, ..., -160. The middle three count: IQM -180, and -210 for long.
        write_curve(tmp_path, env, "paper", seed, [-900, -210 + 10 * seed, -200 + 10 * seed, -190 + 10 * seed], 4_000, 40)
        write_curve(tmp_path, env, "long", seed, [-900, -230 + 10 * seed, -230 + 10 * seed, -230 + 10 * seed], 4_000, 10)
    for seed in (0, 1):
        write_curve(tmp_path, "HalfCheetah-v5", "paper", seed, [0.0, 100.0, 200.0], 3_000, 50)
    write_curve(tmp_path, "HalfCheetah-v5", "few", 1, [0.0, 100.0], 3_000, 50)  # cut off
    done = call("report", "--out", ".", cwd=tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr)
    table = (tmp_path / "few_steps.md").read_text()
    assert re.search(r"paper: .* \| 5 \| -200\.0, -190\.0, -180\.0, -170\.0, -160\.0 \| -180\.0 \[[^]]*\] \| 40\.0 \|", table)
    assert re.search(r"long: .* \| 5 \| -230\.0, -220\.0, -210\.0, -200\.0, -190\.0 \| -210\.0 \[[^]]*\] \| 10\.0 \|", table)
    found = re.search(r"\| Pendulum-v1 \| long \| 4,000 \| -30\.0 \[(\S+), (\S+)\] \| \[(\S+), (\S+)\] \| 4\.00 \|", table)
    assert found
    low, high, welch_low, welch_high = map(float, found.groups())

    # Bootstrap by hand: sort five draws, and average the middle three.
    rng = np.random.default_rng(1)
    long, paper = (np.sort(rng.choice(start + 10 * np.arange(5), (100_000, 5)))[:, 1:4].mean(axis=1) for start in (-230, -200))
    np.testing.assert_allclose((low, high), np.percentile(long - paper, [2.5, 97.5]), atol=1.5)
    # Equal variances of 250: standard error 10, 8 degrees of freedom.
    np.testing.assert_allclose((welch_low, welch_high), (-30 - 23.06, -30 + 23.06), atol=0.06)
    assert f"a loss was detected, of {-high:.1f} to {-low:.1f} = {-low / 1_051:.1%} of the paper" in table  # -180 + 1,231

    assert "HalfCheetah-v5, few, after 3,000 steps, n = 0 and 2: no claim" in table
    missing = re.findall(r"Missing: (.*)\.", table)
    assert missing == [
        "HalfCheetah-v5, paper, seed 2 (no curve)",
        *(f"HalfCheetah-v5, long, seed {seed} (no curve)" for seed in range(3)),
        "HalfCheetah-v5, few, seed 0 (no curve)",
        "HalfCheetah-v5, few, seed 1 (only 2,000 of 3,000 steps)",
        "HalfCheetah-v5, few, seed 2 (no curve)",
    ]
    picture = (tmp_path / "few_steps.svg").read_bytes()
    assert len(picture) > 10_000
    earlier = call("report", "--out", ".", "--steps", "2000", cwd=tmp_path)
    assert "HalfCheetah-v5, few, after 2,000 steps, n = 1 and 2" in earlier.stdout
    assert call("report", "--out", ".", cwd=tmp_path).returncode == 0
    assert (tmp_path / "few_steps.md").read_text() == table and (tmp_path / "few_steps.svg").read_bytes() == picture


def test_claims(script: ModuleType) -> None:
    def claim(low: float, high: float) -> str:
        return str(script.claim(np.array([low, high]), np.array([low - 5, high + 5]), 200.0))

    assert claim(-10, 4).startswith(
        "no loss larger than 10.0 = 5.0% of the paper setting's gain over random was detected (95 %"
    )
    assert claim(-10, 4).endswith("Welch's t allows 15.0)")
    assert claim(2, 4).startswith("no loss was detected (95 %") and claim(2, 4).endswith("allows 3.0)")
    assert claim(-10, -4).startswith("a loss was detected, of 4.0 to 10.0 = 5.0%")
    assert claim(np.nan, np.nan).startswith("no claim")


def test_settings(script: ModuleType) -> None:
    """The paper's setting is that of the hyper-parameter file, but for K; the others change steps alone; DIPO takes all."""
    entries = yaml.safe_load((ROOT / "hyperparams" / "dipo.yml").read_text())
    for env, settings in script.SETTINGS.items():
        exempt = {"policy_kwargs"} | ({"action_gradient_steps"} if env == "Pendulum-v1" else set())
        for setting, arguments in settings.items():
            model = DIPO("MlpPolicy", "Pendulum-v1", **arguments)
            steps = exempt | ({"action_gradient_steps", "action_lr"} if setting != "paper" else set())
            for key in {"action_lr", "action_gradient_steps", "action_grad_norm_ratio", "max_grad_norm"} - steps:
                assert getattr(model, key) == entries[env][key], (env, setting, key)
            assert model.actor_target_update_interval == entries[env]["actor_target_update_interval"]
            assert script.LEARNING_STARTS[env] == entries[env]["learning_starts"]
