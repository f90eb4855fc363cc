"""Grids of trainings end complete whatever is killed, with the same results, and their statistics are what they say."""

import importlib
import json
import shutil
import signal
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
import pytest
import torch as th
from processes import PAPER, Scripts, is_running, until

from sb3_dipo import RECOMMENDED

CURVES, ABLATIONS = PAPER / "learning_curves.py", PAPER / "ablations.py"
TASK = "Hopper-v5"  # untrained, it falls soon, and no two policies have the same return
QUICK = ("--quick", "--steps", "600", "--eval-freq", "200")
FILES = {"evaluations", "evaluations.csv", "curves.png", "report.md"}


@pytest.fixture(scope="module")
def grid() -> Any:
    return importlib.import_module("grid")


@pytest.fixture(scope="module")
def reports() -> Any:
    return importlib.import_module("grid_report")


def results(out: Path, name: str, seed: int) -> Path:
    return out / TASK / name / f"seed{seed}" / name / f"{TASK}_1"


def curves(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "evaluations.csv").drop(columns="hours")


def training_process(*folders: Path) -> psutil.Process | None:
    """Of a training that has a checkpoint, and has not finished."""
    for folder in folders:
        if any(folder.glob("exact/*/manifest.json")) and not (folder / "finished.json").exists():
            number = json.loads((folder / "progress.json").read_text())["process"]
            if psutil.pid_exists(number) and is_running(process := psutil.Process(number)):
                return process
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A quick grid that nothing disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    with Scripts() as scripts:
        printed = scripts.run(CURVES, *QUICK, "--out", "whole", cwd=cwd)
    assert {path.name for path in cwd.iterdir()} == {"whole"}
    assert printed.strip() == (cwd / "whole" / "report.md").read_text().strip()
    yield cwd / "whole"


@pytest.mark.slow
def test_quick(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} - {"aggregate.png", "warnings.log"} == FILES | {TASK}
    assert 5_000 < (whole / "curves.png").stat().st_size < 200 * 1024
    table = curves(whole)
    assert list(table.groupby(["algorithm", "seed"]).size()) == [3] * 4
    assert list(table.steps) == [200, 400, 600] * 4
    assert table.mean_return.nunique() == 12  # so that the same results mean something
    report = (whole / "report.md").read_text()
    assert f"| {TASK} | DIPO | 2 |" in report and f"| {TASK} | SAC | 2 |" in report and "0.8333" in report
    assert "Missing" not in report and "`python examples/paper/learning_curves.py --quick" in report
    for name in ("dipo", "sac"):
        assert not (results(whole, name, 0) / "exact").exists()
        zoo = np.load(results(whole, name, 0) / "evaluations.npz")
        rows = table[(table.algorithm == name) & (table.seed == 0)]
        np.testing.assert_allclose(zoo["results"].mean(axis=1), rows.mean_return, rtol=1e-5)
    spec = json.loads((whole / TASK / "dipo" / "seed0" / "spec.json").read_text())
    assert spec["run"]["settings"]["buffer_size"] == 600 and spec["versions"]["rl_zoo3"]


@pytest.mark.slow
def test_the_report_is_made_again_from_raw_evaluations(whole: Path, scripts: Scripts, tmp_path: Path) -> None:
    """On a machine that has nothing else, whatever became of the trainings."""
    shutil.copytree(whole / "evaluations", tmp_path / "kept" / "evaluations")
    command = (*QUICK, "--report", "--out", "gone", "--results", "kept")
    printed = scripts.run(CURVES, *command, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}
    for name in ("evaluations.csv", "curves.png"):
        assert (tmp_path / "kept" / name).read_bytes() == (whole / name).read_bytes()
    changed = [line for line in (whole / "report.md").read_text().splitlines() if line not in printed.splitlines()]
    assert len(changed) == 1 and changed[0].startswith("`python examples/paper/learning_curves.py")


@pytest.mark.slow
def test_it_goes_on_after_kill_9(whole: Path, scripts: Scripts, tmp_path: Path) -> None:
    few = (*QUICK, "--algorithms", "dipo", "--seeds", "0", "--out", "cut")
    cut = results(tmp_path / "cut", "dipo", 0)
    process = scripts.start(CURVES, *few, cwd=tmp_path)
    until(lambda: training_process(cut), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not scripts.left())  # the training ends with what started it
    assert not (cut / "finished.json").exists()
    rows = json.loads((cut / "evaluations.json").read_text())  # as if killed between an evaluation and its checkpoint
    (cut / "evaluations.json").write_text(json.dumps([*rows, {**rows[-1], "steps": 599}]))

    scripts.run(CURVES, *few, cwd=tmp_path)
    assert "Going on after" in (cut.parent.parent / "log.txt").read_text()
    undisturbed = curves(whole).query("algorithm == 'dipo' and seed == 0")
    pd.testing.assert_frame_equal(curves(tmp_path / "cut"), undisturbed.reset_index(drop=True))
    np.testing.assert_array_equal(
        *(np.load(results(out, "dipo", 0) / "evaluations.npz")["results"] for out in (tmp_path / "cut", whole))
    )


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed(whole: Path, scripts: Scripts, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")
    out = tmp_path / "ray"
    folders = [results(out, "dipo", seed) for seed in (0, 1)]
    process = scripts.start(CURVES, *QUICK, "--algorithms", "dipo", "--jobs", "2", "--out", "ray", cwd=tmp_path)
    training = until(lambda: training_process(*folders), process)
    worker = training.parent()
    assert "ray" in worker.name()
    worker.kill()
    until(lambda: not is_running(training), process)
    training = until(lambda: training_process(*folders), process)
    training.kill()
    printed = process.communicate()
    assert process.returncode == 0, printed
    logs = [(out / TASK / "dipo" / f"seed{seed}" / "log.txt").read_text() for seed in (0, 1)]
    assert sum(log.count("Going on after") for log in logs) >= 2
    pd.testing.assert_frame_equal(curves(out), curves(whole).query("algorithm == 'dipo'").reset_index(drop=True))
    assert {path.name for path in tmp_path.iterdir()} == {"ray"}


@pytest.mark.slow
def test_a_test_that_fails_leaves_nothing_running(tmp_path: Path) -> None:
    """Neither a training, nor what has left the session of its parent and outlives it, as processes of Ray may."""
    (tmp_path / "detach.py").write_text(
        textwrap.dedent(
            """
            import pathlib, subprocess, sys
            code = "import pathlib, time; pathlib.Path('began').touch(); time.sleep(1000)"
            subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
            """
        )
    )
    with pytest.raises(ZeroDivisionError), Scripts() as scripts:
        scripts.start(CURVES, *QUICK, "--algorithms", "dipo", "--seeds", "0", "--out", "here", cwd=tmp_path)
        scripts.start(tmp_path / "detach.py", cwd=tmp_path).wait()
        until(lambda: any(tmp_path.rglob("progress.json")) and (tmp_path / "began").exists())
        running = scripts.left()
        raise ZeroDivisionError
    assert len(running) >= 3 and not any(map(is_running, running)) and not scripts.left()


@pytest.mark.slow
def test_ablations_train_their_base_once(whole: Path, scripts: Scripts, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(whole / TASK / "dipo" / "seed0", here / TASK / "dipo" / "seed0")
    bases = {path: path.stat().st_mtime_ns for path in here.rglob("*.zip")}
    undisturbed = curves(whole).query("algorithm == 'dipo' and seed == 0").reset_index(drop=True)
    for study, others in (("generator", {"dipo_flow", "dipo_vae", "dipo_mlp"}), ("write-back", {"dipo_no_write_back"})):
        scripts.run(ABLATIONS, study, *QUICK, "--seeds", "0", "--out", "here", cwd=tmp_path)
        assert set(curves(here / study).algorithm) == {"dipo", *others}
        assert {path.name for path in (here / study).iterdir()} >= FILES
        # the curves differ, as the parts do
        assert curves(here / study).groupby("algorithm").mean_return.sum().nunique() == len(others) + 1
        base = curves(here / study).query("algorithm == 'dipo'").reset_index(drop=True)
        pd.testing.assert_frame_equal(base, undisturbed)
    assert bases == {path: path.stat().st_mtime_ns for path in bases}
    assert {path.name for path in here.iterdir()} - {"warnings.log"} == {TASK, "generator", "write-back"}
    saved = {path.parts[-3]: json.loads(path.read_text()) for path in here.glob("*/*/seed0/spec.json")}
    actors = {name: spec["run"]["settings"]["policy_kwargs"].get("actor") for name, spec in saved.items()}
    assert actors == dict(dipo=None, dipo_flow="flow", dipo_vae="vae", dipo_mlp="mlp", dipo_no_write_back=None)


@pytest.mark.slow
def test_tqc_and_crossq_with_the_settings_of_the_zoo(scripts: Scripts, tmp_path: Path) -> None:
    algorithms = ("--algorithms", "tqc", "crossq", "--baselines", "zoo", "--seeds", "0")
    scripts.run(CURVES, "--quick", *algorithms, "--out", "here", cwd=tmp_path)
    report = (tmp_path / "here" / "report.md").read_text()
    assert f"| {TASK} | TQC | 1 |" in report and f"| {TASK} | CrossQ | 1 |" in report
    assert len(curves(tmp_path / "here")) == 6


# ------------------------------------------------------------------------------------------------- in this process


def options(out: Path, **others: Any) -> Namespace:
    run: dict[str, Any] = dict(jobs=1, address=None, gpus_per_run=0, retries=1, device="cpu", accelerate="auto")
    return Namespace(**{**run, "learning_starts": None, "out": out, **others})


def make_runs(grid: ModuleType, args: Namespace, *names: str, **what: Any) -> list[Any]:
    """Two seeds of one task, and of each algorithm."""
    given = dict(steps=300, eval_freq=100, eval_episodes=2) | {k: v for k, v in what.items() if k not in ("envs", "seeds")}
    return [
        grid.make_run(args, env, name, grid.VARIANTS[name], seed, **given)
        for seed in what.get("seeds", (0, 1))
        for env in what.get("envs", (TASK,))
        for name in names
    ]


def test_what_fails_is_tried_again_and_reported(
    grid: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In place of the zoo, a script that succeeds at once, the second time, or never."""
    args = options(tmp_path)
    runs = make_runs(grid, args, "sac", seeds=(0, 1, 2))
    script = """
import pathlib, sys
folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
tries = folder / "tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if seed == 2 or seed == 1 and tries.read_text() == "x":
    sys.exit("out of luck")
(folder / "finished.json").write_text("{}")
"""
    monkeypatch.setattr(grid.Run, "command", lambda run: [sys.executable, "-c", script, str(run.results), str(run.seed)])
    for run in runs:
        run.claim_folder()
        run.results.mkdir(parents=True)
    failed = grid.train_all(runs, args)
    assert [(run.results / "tries").read_text() for run in runs] == ["x", "xx", "xx"]
    assert [run.seed for run in failed] == [2]
    assert "exit status 1 in 2 attempts" in failed[runs[2]] and failed[runs[2]].endswith("out of luck")
    assert f"{TASK}, sac, seed 1: finished" in capfd.readouterr().err

    assert [run.seed for run in grid.train_all(runs, args)] == [2]
    assert [(run.results / "tries").read_text() for run in runs] == ["x", "xx", "xxxx"]  # only what has not finished
    with pytest.raises(FileNotFoundError, match="--out must be on a disk that all machines share"):
        grid.train(replace(runs[0], folder=tmp_path / "elsewhere"), 0)


def test_other_settings_need_another_folder(grid: ModuleType, tmp_path: Path) -> None:
    (first, _) = make_runs(grid, options(tmp_path), "dipo")
    make_runs(grid, options(tmp_path), "dipo", steps=200)[0].claim_folder()  # which was not begun
    first.claim_folder()
    first.results.mkdir(parents=True)
    (first.results / "progress.json").write_text('{"steps": 100}')
    first.claim_folder()
    make_runs(grid, options(tmp_path, device="cuda", accelerate="off"), "dipo")[0].claim_folder()  # no other result
    with pytest.raises(SystemExit, match=r"other settings \(eval_freq: 100, not 50\): choose another --out"):
        make_runs(grid, options(tmp_path), "dipo", eval_freq=50)[0].claim_folder()
    with pytest.raises(SystemExit, match=r"other settings \(snapshots: None, not \[300\]\)"):
        make_runs(grid, options(tmp_path), "dipo", snapshots=(300,))[0].claim_folder()


def test_settings(grid: ModuleType) -> None:
    def of(name: str, env: str, baselines: str, learning_starts: int | None = None) -> Any:
        return grid.settings(grid.VARIANTS[name], env, 50_000, baselines, learning_starts)

    dipo = of("dipo", "HalfCheetah-v5", "paper")
    assert (dipo["action_lr"], dipo["action_gradient_steps"]) == (0.12, 10) and "actor='flow'" in dipo["policy_kwargs"]
    assert dipo["n_timesteps"] == dipo["buffer_size"] == 50_000 and dipo["learning_starts"] == 10_000
    assert of("dipo", "Hopper-v5", "zoo")["action_gradient_steps"] == 5
    paper = of("dipo_paper", "HalfCheetah-v5", "paper")
    assert (paper["action_lr"], paper["action_gradient_steps"]) == (0.03, 40) and "=100" in paper["policy_kwargs"]
    assert of("dipo_k20", "HalfCheetah-v5", "zoo") == {**paper, "policy_kwargs": {"num_train_timesteps": 20}}
    few = of("dipo_few", "HalfCheetah-v5", "paper")
    assert {key for key in dipo if dipo[key] != few[key]} == {"policy_kwargs", "action_gradient_steps"}

    td3 = of("td3", "HalfCheetah-v5", "paper")
    assert (td3["noise_type"], td3["noise_std"], td3["learning_starts"]) == ("normal", 0.1, 10_000)
    for name, activation in (("sac", th.nn.ReLU), ("td3", th.nn.ReLU), ("ppo", th.nn.Tanh)):
        made = eval(of(name, TASK, "paper")["policy_kwargs"], {"nn": th.nn})
        assert made == dict(net_arch=[256, 256], activation_fn=activation)
    assert of("td3", "HalfCheetah-v5", "zoo")["policy_kwargs"] == "dict(net_arch=[400, 300])"  # the zoo has it for v4
    ppo = of("ppo", "Hopper-v5", "zoo", 500)
    assert ppo["normalize"] and not {"buffer_size", "learning_starts"} & set(ppo)
    assert of("sac", "HalfCheetah-v5", "paper", 500)["learning_starts"] == 500
    assert of("sac", TASK, "paper")["ent_coef"] == 0.2 and "ent_coef" not in of("sac", TASK, "zoo")  # SB3 tunes it then

    assert of("tqc", "Hopper-v5", "zoo")["top_quantiles_to_drop_per_net"] == 5
    crossq = of("crossq", "HalfCheetah-v5", "zoo")
    assert (crossq["policy_delay"], crossq["buffer_size"], crossq["learning_starts"]) == (3, 50_000, 5_000)
    for name in ("tqc", "crossq"):
        with pytest.raises(SystemExit, match=f"--baselines must be zoo for {name}"):
            of(name, TASK, "paper")
    own = grid.Variant("dipo", dict(learning_starts=7))
    assert grid.settings(own, TASK, 50_000, "paper", 500)["learning_starts"] == 7  # a variant is about what it sets


def test_ablations_change_one_thing(grid: ModuleType) -> None:
    ablations = importlib.import_module("ablations")
    few = grid.VARIANTS["dipo_few"]
    own = few.settings["policy_kwargs"]
    for study in ("length", "generator", "write-back"):
        variants = ablations.vary("few", few, study)
        assert next(iter(variants)) == "few" and variants["few"].settings == few.settings
        assert all(name.startswith("few_") and each.file == few.file for name, each in list(variants.items())[1:])
    lengths = ablations.vary("few", few, "length")
    assert {name: each.settings for name, each in lengths.items()} == {
        name: {**few.settings, "policy_kwargs": {**own, "num_train_timesteps": length}}
        for name, length in (("few", 100), ("few_k50", 50), ("few_k20", 20))
    }
    assert set(ablations.vary("k20", grid.VARIANTS["dipo_k20"], "length")) == {"k20", "k20_k100", "k20_k50"}
    assert set(ablations.vary("paper", grid.VARIANTS["dipo_paper"], "length")) == {"paper", "paper_k50", "paper_k20"}
    generators = ablations.vary("few", few, "generator")
    for actor in ("flow", "vae", "mlp"):
        assert generators[f"few_{actor}"].settings == {**few.settings, "policy_kwargs": {"actor": actor}}
    diffusion = ablations.vary("dipo", grid.VARIANTS["dipo"], "generator")["dipo_diffusion"].settings["policy_kwargs"]
    same = {name: RECOMMENDED["policy_kwargs"][name] for name in ("critic", "layer_norm", "samplers")}
    assert diffusion == {"actor": "diffusion", "num_train_timesteps": 20, **same}
    critic = {"critic": "quantile", "n_quantiles": 5, "net_arch": [8]}
    flow = grid.Variant("dipo", {"policy_kwargs": {**critic, "actor": "flow", "solver": "midpoint"}})
    others = ablations.vary("mine", flow, "generator")
    assert list(others) == ["mine", "mine_diffusion", "mine_vae", "mine_mlp"] and others["mine"].settings == flow.settings
    assert others["mine_vae"].settings["policy_kwargs"] == {**critic, "actor": "vae"}
    samplers = {"behaviour": {"solver": "midpoint", "num_candidates": 2}, "target": {"num_inference_steps": 3}}
    flow = grid.Variant("dipo", {"policy_kwargs": {"actor": "flow", "samplers": samplers}})
    candidates = {"actor": "vae", "samplers": {"behaviour": {"num_candidates": 2}}}
    assert ablations.vary("mine", flow, "generator")["mine_vae"].settings["policy_kwargs"] == candidates
    (_, none) = ablations.vary("few", few, "write-back").values()
    assert none.settings == {**few.settings, "persist_improved_actions": False}
    assert none.label.startswith("none")
    back = ablations.vary("none", none, "write-back")["none_write_back"]
    assert back.settings["persist_improved_actions"] and back.label.startswith("write-back")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--envs HalfCheeta-v5", "--envs: HalfCheeta-v5 must be a task of Gymnasium's (HalfCheetah-v5"),
        (
            "--algorithms dipo sacc",
            "--algorithms: sacc must be of dipo, sac, td3, ppo, tqc, crossq, dipo_paper, dipo_k20, dipo_long, dipo_few",
        ),
        ("--steps 0", "--steps: must be at least 1, not 0"),
        ("--steps 500", "--eval-freq must be at most --steps, 500, not 10000"),
        ("--seeds 1 1", "--seeds must be different numbers of at least 0, not [1, 1]"),
        ("--retries -1", "--retries, --gpus-per-run and --learning-starts must be at least 0"),
        ("--jobs 0", "--jobs: must be at least 1, not 0"),
        ("--jobs 2 --device cuda", "--gpus-per-run must be above 0, such as 0.25"),
        ("--algorithms dipo tqc", "--baselines must be zoo for tqc: the paper has no settings for it"),
        ("--baselines mine", "--baselines: invalid choice: 'mine' (choose from"),
        (
            "--variants {out}/bad.yml",
            "--variants must be a file with entries `name: {algo: dipo|sac|td3|ppo|tqc|crossq, ...}`",
        ),
        ("--jobs 2 --steps 1e4", "need Ray: pip install '.[cluster]'"),
        ("--report", "holds no evaluations of these runs"),
    ],
)
def test_errors_name_the_argument(
    arguments: str,
    message: str,
    grid: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    learning_curves = importlib.import_module("learning_curves")
    (tmp_path / "bad.yml").write_text("mine: {algo: a2c}\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    given = arguments.format(out=tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["learning_curves.py", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as error:
        learning_curves.main()
    assert message in capsys.readouterr().err + str(error.value)


# ------------------------------------------------------------------------------------------------- statistics


def synthetic(grid: ModuleType, out: Path) -> list[Any]:
    """Two tasks, two seeds of two algorithms, whose last three evaluations have a mean that is easily seen."""
    runs = make_runs(grid, options(out), "dipo", "sac", envs=("Hopper-v5", "Reacher-v5"), steps=400)
    finals = {("Hopper-v5", "dipo"): (90, 110), ("Hopper-v5", "sac"): (60, 60)}
    finals |= {("Reacher-v5", "dipo"): (-30, -30), ("Reacher-v5", "sac"): (-10, -20)}
    for run in runs:
        run.claim_folder()
        run.results.mkdir(parents=True)
        final, rows = finals[run.env, run.name][run.seed], []
        for steps, more in ((100, -50), (200, -6), (300, 6), (400, 0)):
            returns = [final + more - 1.0, final + more + 1.0]
            rows.append(dict(steps=steps, seconds=36 * steps / 100 * (run.seed + 1), returns=returns, lengths=[1, 1]))
        (run.results / "evaluations.json").write_text(json.dumps(rows))
        (run.results / "finished.json").write_text(json.dumps(dict(steps=400, updates_per_step=0.75, device="CPU")))
        if (run.env, run.name, run.seed) == ("Hopper-v5", "sac", 1):
            (run.folder / "log.txt").write_text(
                "Going on after 100 steps\nGoing on after 100 steps\nGoing on after 2000 steps\n"
            )
        random = out / "evaluations" / f"{run.env}-random.json"
        random.parent.mkdir(exist_ok=True)
        random.write_text(json.dumps({"mean_return": {"H": 20, "R": -45}[run.env[0]]}))
    return runs


def test_statistics_by_hand(grid: ModuleType, reports: ModuleType, tmp_path: Path) -> None:
    curves = reports.collect(reports.records(synthetic(grid, tmp_path), tmp_path))
    assert len(curves) == 32 and (curves.std_return == 1).all()
    summary = reports.summarise(curves, 400).set_index(["env", "algorithm", "seed"])
    row = summary.loc["Hopper-v5", "dipo", 1]
    assert row.final == pytest.approx(110)
    assert row.area == pytest.approx((60 / 2 + 104 + 116 + 110 / 2) / 3)
    assert row.hours == pytest.approx(4 * 0.02)
    assert reports.summarise(curves, 200).final.iloc[0] == pytest.approx(90 - 28)  # those until then
    assert reports.summarise(curves[curves.steps < 400], 400).empty  # one has not come that far

    scores = reports.normalise(summary.reset_index(), {"Hopper-v5": 20, "Reacher-v5": -45})
    np.testing.assert_allclose(scores["dipo"], [[70 / 80, 0.5], [90 / 80, 0.5]])  # best: 100 - 20, and -15 + 45
    np.testing.assert_allclose(scores["sac"], [[0.5, 35 / 30], [0.5, 25 / 30]])
    only_hopper = reports.normalise(summary.reset_index(), {"Hopper-v5": 20, "Reacher-v5": -5})
    assert only_hopper["dipo"].shape == (2, 1)
    assert reports.improvements(only_hopper)["sac"][0] == 1  # the first is always better there

    mean, low, high = reports.interquartile_means(scores)["dipo"]
    assert mean == pytest.approx((0.5 + 70 / 80) / 2)  # of 0.5, 0.5, 0.875, 1.125
    assert low == pytest.approx(0.6875) and high == pytest.approx((0.5 + 90 / 80) / 2)  # both runs the worse, or the better
    better, low, high = reports.improvements(scores)["sac"]
    assert (better, low, high) == (0.5, 0.5, 0.5)  # always on Hopper, never on Reacher

    ours, theirs = pd.Series([1.0, 2.0, 3.0]), pd.Series([2.0, 5.0])
    error = np.sqrt(1 / 3 + 4.5 / 2)
    freedom = error**4 / ((1 / 3) ** 2 / 2 + (4.5 / 2) ** 2 / 1)
    quantile = pytest.importorskip("scipy.stats").t.ppf(0.975, freedom)
    assert reports.welch(ours, theirs) == pytest.approx((-1.5 - quantile * error, -1.5 + quantile * error))
    assert all(np.isnan(reports.welch(ours, theirs[:1])))
    assert all(np.isnan(reports.welch(pd.Series([1.0, 1.0]), pd.Series([1.0, 1.0]))))


def test_report_of_what_is_there(
    grid: ModuleType, reports: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "RESAMPLES", 100)
    runs = synthetic(grid, tmp_path)
    labels = dict(dipo="DIPO", sac="SAC")
    text = reports.report(runs, labels, tmp_path, "Test", 400)
    assert "| Hopper-v5 | DIPO | 2 | 100.0 ± 14.1 | 90.0, 110.0 | 106.0 | 91.7 | 0.75 | 0.06 | CPU |" in text
    assert text.count("Cut off") == 1 and "checkpoints: Hopper-v5, sac, seed 1, at 100, 2,000." in text
    assert "| Reacher-v5 | SAC | -15.0 | [-78.5, +48.5] |" in text and "2 of 2 tasks" in text
    assert {"evaluations.csv", "curves.png", "aggregate.png", "report.md"} <= {path.name for path in tmp_path.iterdir()}
    same = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert reports.report(runs, labels, tmp_path, "Test", 400) == text
    assert same == {path: path.read_bytes() for path in tmp_path.glob("*.*")}

    # of what was not copied, and is gone, it knows nothing
    for run in runs:
        shutil.rmtree(run.folder)
    (tmp_path / "evaluations" / f"{runs[0].env}-dipo-seed0.json").unlink()
    text = reports.report(runs, labels, tmp_path, "Test", 400)
    assert f"- Missing: {runs[0]}, which has 0 of 400 steps." in text and "| Hopper-v5 | DIPO | 1 |" in text
    assert "| Reacher-v5 | DIPO | 2 |" in text


def test_only_a_dipo_has_the_color_of_dipo() -> None:
    shared = importlib.import_module("experiments")
    blue = shared.COLORS["dipo"]
    dozen = [f"variant {number}" for number in range(12)]
    cases: list[Any] = [(["dipo_k20", "sac"], "dipo_k20"), (["dipo_k20", "dipo", "tqc"], "dipo"), (["mine", "sac"], None)]
    for names, which in (*cases, (dozen, None)):
        colors = shared.palette(names)
        assert [name for name, color in colors.items() if color == blue] == [which] * (which is not None)
        assert len(set(colors.values())) == len(names)


def test_random_return_is_that_of_random_actions(reports: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    value = reports.random_return(TASK, tmp_path)
    assert 10 < value < 35  # it falls after some twenty steps, with a reward of about 1 each
    (tmp_path / "evaluations" / f"{TASK}-random.json").write_text(json.dumps({"mean_return": 1.5}))
    assert reports.random_return(TASK, tmp_path) == 1.5  # measured once
