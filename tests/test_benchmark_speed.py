"""The speed benchmark runs, in small, and its table and JSON file hold what they promise."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import EXAMPLES, PATIENCE, Scripts, until

from sb3_dipo import RECOMMENDED

SCRIPT = EXAMPLES / "benchmark_speed.py"
NAIVE = "naive DIPO K=100"
MEASURES = {
    **{"update": "ms", "action 1": "ms", "action 16": "ms", "deterministic 1": "ms"},
    **{"learn 1": "steps/s", "learn 2": "steps/s"},
}


def run(*arguments: str, cwd: Path, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "--threads", "1", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def benchmark_speed() -> Any:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_speed", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.slow
def test_all_competitors(tmp_path: Path) -> None:
    done = run("--quick", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"here", "here/speed.json", "here/speed.md"}
    table = (tmp_path / "here" / "speed.md").read_text()
    assert done.stdout == table
    content: dict[str, Any] = json.loads((tmp_path / "here" / "speed.json").read_text(), parse_constant=refuse)
    for key in ("date", "device", "threads", "versions", "peak_rates", "peak_host_mib"):
        assert content[key] and f"- {key.replace('_', ' ')}: " in table
    assert content["threads"] == 1

    left_out = {name for name, notes in content["notes"].items() if any(note.startswith("left out") for note in notes)}
    assert left_out == set()
    assert content["settings"]["DIPO recommended"] == RECOMMENDED
    dipos = {f"{name}, {mode}" for name in content["settings"] for mode in ("off", "auto")}
    rows = {(row["measure"], row["name"]): row for row in content["results"]}
    for measure, unit in MEASURES.items():
        naive = set() if measure.split()[0] in ("learn", "deterministic") else {NAIVE}
        names = {name for at, name in rows if at == measure}
        assert names == {*dipos, *naive, "SAC", "TD3", "TQC", "CrossQ"}
        assert all(table.count(f"\n| {name} | ") == len(MEASURES) - 3 * (name == NAIVE) for name in names)
        for name in names:
            row = rows[measure, name]
            values = np.array(row["values"])
            assert row["unit"] == unit and len(values) == 2 and (values > 0).all()
            assert row["median"] == pytest.approx(np.median(values))
            assert row["quartiles"] == pytest.approx(np.percentile(values, [25, 75]))
            for baseline, ratio in row["times_as_fast_as"].items():
                if (measure, baseline) not in rows:
                    assert ratio is None
                    continue
                other = np.array(rows[measure, baseline]["values"])
                assert ratio == pytest.approx(np.median(values / other if unit == "steps/s" else other / values))
    assert len(rows) == len(content["results"])


@pytest.mark.slow
def test_floor_and_filters(tmp_path: Path) -> None:
    arguments = ("--measures", "update", "--only", "DIPO K=20, off", "--peak-gflops", "100", "--peak-gbs", "50")
    done = run("--quick", *arguments, "--dims", "HalfCheetah-v5", "--batch-size", "256", "--out", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert (row["dims"], row["name"]) == ("HalfCheetah-v5", "DIPO K=20, off")
    assert row["times_as_fast_as"] == {NAIVE: None, "SAC": None}
    hidden = 2 * 256 * 256
    by_hand = {  # multiplications and additions on one row: 17 observations, 6 actions, K = 20, 20 steps of the gradient
        "target sampling": 17 * 256 + 20 * (6 * 256 + hidden + 256 * 6),
        "action gradient": 2 * 17 * 256 + 20 * 3 * (6 * 256 + hidden + 256),  # both critics forward, one back
    }
    floor = row["floor"]
    for part, count in by_hand.items():
        assert floor["gflop_by_part"][part] == pytest.approx(2e-9 * 256 * count)
    assert floor["gflop"] == pytest.approx(sum(floor["gflop_by_part"].values()))
    peaks = json.loads((tmp_path / "speed.json").read_text())["peaks_in_registers"]["HalfCheetah-v5"]
    times = np.array(row["values"]) * np.array(peaks) / floor["gflop"] / 1e3
    assert len(peaks) == 2 and row["times_the_floor"] == pytest.approx(np.median(times)) and times.min() > 1
    assert floor["ms_at_peak"] == pytest.approx({"given": floor["gflop"] / 100 * 1e3})


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_had(scripts: Scripts, tmp_path: Path) -> None:
    arguments = ("--quick", "--measures", "action", "--only", "few-step, off", "TD3", "--rounds", "100000", "--out", ".")
    names = {"DIPO few-step, off", "TD3"}

    def measured() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((tmp_path / "speed.json").read_text(), parse_constant=refuse)["results"]
        return rows

    process = scripts.start(SCRIPT, "--threads", "1", "--device", "cpu", *arguments, cwd=tmp_path)
    until(lambda: (tmp_path / "speed.json").exists() and {row["name"] for row in measured()} == names, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode != 0 and "KeyboardInterrupt" in stderr
    assert {row["name"] for row in measured()} == names
    assert "| TD3 | " in stdout and "| TD3 | " in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    done = run("--quick", "--profile", "--only", "few-step, off", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = ("target sampling", "critic step", "action gradient", "actor step", "targets and write-back", "whole update")
    assert all(f"\n| {part} | " in done.stdout for part in parts)
    assert "operators an update" in done.stdout and done.stdout.rstrip().count("\n| ") >= len(parts) + 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dims", "Hopper-v5", "Hoper-v5"), "--dims Hoper-v5: "),
        (("--dims", "CartPole-v1"), "--dims CartPole-v1: observations and actions must be vectors of real numbers"),
        (("--only", "PPO"), "--only PPO: no such competitor"),
        (("--learn-steps", "20"), "--learn-steps must be a multiple of --n-envs: 20"),
        (("--rounds", "0"), "--rounds must be at least 1, not 0"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    message: str,
    benchmark_speed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_speed.py", *arguments, "--out", str(tmp_path / "here")])
    with pytest.raises(SystemExit) as stop:
        benchmark_speed.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_tests(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    copy = tmp_path / "examples" / SCRIPT.name
    copy.write_text(SCRIPT.read_text())
    done = run("--quick", "--out", "here", cwd=tmp_path, script=copy)
    assert done.returncode == 1 and f"not at {tmp_path / 'tests' / 'naive_dipo.py'}" in done.stderr
    assert not (tmp_path / "here").exists()
