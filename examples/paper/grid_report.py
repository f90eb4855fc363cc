"""Comparisons: curves, statistics and tables of the trainings of `grid.py`, for `learning_curves.py` and `ablations.py`.

A report is made of records, a file for each training with its setting, versions and raw evaluations. They are copied from the
trainings into evaluations/ beside the report whenever they are there, and the report can be made again from them alone.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from experiments import command, markdown_table, palette, save_figure, write
from grid import Run, Variant, arguments, check, failures, make_run, positive, train_or_exit
from matplotlib.figure import Figure
from rliable import library, metrics  # type: ignore[import-untyped]
from scipy.stats import ttest_ind  # type: ignore[import-untyped]

LAST = 3  # evaluations whose mean is a run's final return
RANDOM_EPISODES = 20
RESAMPLES = 2_000  # of the bootstrap
QUICK = dict(envs=["Hopper-v5"], seeds=[0, 1], steps=300, eval_freq=100, eval_episodes=2, learning_starts=100)
Record = dict[str, Any]  # what a report needs of a training
Scores = dict[str, np.ndarray]  # of each algorithm, runs by tasks


def records(runs: Iterable[Run], out: Path) -> dict[Run, Record]:
    """Those of the trainings that have been evaluated, here or where their records were copied from."""
    found = {}
    for run in runs:
        file = out / "evaluations" / f"{run.env.replace('/', '-')}-{run.name}-seed{run.seed}.json"
        if rows := run.read("evaluations.json"):
            spec = json.loads((run.folder / "spec.json").read_text())
            about = dict(run=spec["run"], machine=spec["machine"], versions=spec["versions"])
            about |= dict(reached=run.reached, finished=run.read("finished.json"), went_on_at=run.went_on_at)
            lines = ",\n".join(json.dumps(row) for row in rows)
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, f'{json.dumps(about, indent=1)[:-2]},\n "evaluations": [\n{lines}\n]}}\n')
        if file.exists():
            found[run] = json.loads(file.read_text())
    return found


def collect(kept: dict[Run, Record]) -> pd.DataFrame:
    """One row per evaluation. Hours are those of training: evaluations and checkpoints do not count."""
    rows = [
        (run.env, run.name, run.seed, row["steps"], np.mean(row["returns"]), np.std(row["returns"]), row["seconds"] / 3600)
        for run, record in kept.items()
        for row in record["evaluations"]
    ]
    return pd.DataFrame(rows, columns=["env", "algorithm", "seed", "steps", "mean_return", "std_return", "hours"])


def summarise(curves: pd.DataFrame, at: int) -> pd.DataFrame:
    """One row per run that was evaluated until a number of steps: final and best return, mean along the curve, hours."""
    rows = []
    for key, curve in curves[curves.steps <= at].groupby(["env", "algorithm", "seed"], sort=False):
        steps, returns = curve.steps.to_numpy(), curve.mean_return.to_numpy()
        every = np.diff(steps, prepend=0).max()
        if steps[-1] + every > at:
            area = np.trapezoid(returns, steps) / np.ptp(steps) if len(steps) > 1 else returns[0]
            rows.append((*key, returns[-LAST:].mean(), returns.max(), area, curve.hours.iloc[-1]))
    return pd.DataFrame(rows, columns=["env", "algorithm", "seed", "final", "best", "area", "hours"])


def normalise(summary: pd.DataFrame, random: dict[str, float]) -> Scores:
    """0 is the return of random actions, 1 the best algorithm's mean; without tasks where none is better."""
    scores = summary.pivot_table(index=["algorithm", "seed"], columns="env", values="final", sort=False)
    best = scores.groupby("algorithm").mean().max()
    base = pd.Series(random).reindex(scores.columns)
    scores = ((scores - base) / (best - base)).loc[:, best > base]
    complete = {name: rows.dropna().to_numpy() for name, rows in scores.groupby("algorithm", sort=False)}
    return {name: rows for name, rows in complete.items() if rows.size}


def random_return(env_id: str, out: Path) -> float:
    """Of random actions; measured once."""
    file = out / "evaluations" / f"{env_id.replace('/', '-')}-random.json"
    if not file.exists():
        env, returns = gym.make(env_id), []
        env.action_space.seed(0)
        for episode in range(RANDOM_EPISODES):
            env.reset(seed=episode)
            total, over = 0.0, False
            while not over:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, over = total + float(reward), terminated or truncated
            returns.append(total)
        write(file, json.dumps({"mean_return": float(np.mean(returns)), "episodes": RANDOM_EPISODES}))
    return float(json.loads(file.read_text())["mean_return"])


def iqm(*scores: np.ndarray) -> np.ndarray:
    return np.array([metrics.aggregate_iqm(scores[0])])


def improvement(*scores: np.ndarray) -> np.ndarray:
    return np.array([metrics.probability_of_improvement(*scores)])


def profile(scores: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """rliable's own, many times as fast."""
    return np.asarray((scores[..., None] > taus).mean(axis=(0, 1)))


def interquartile_means(scores: Scores) -> dict[str, np.ndarray]:
    """Of each algorithm: the mean, and bounds (95 %), of a stratified bootstrap."""
    np.random.seed(0)  # rliable draws from the global generator, whatever it is given
    means, bounds = library.get_interval_estimates(scores, iqm, reps=RESAMPLES)
    return {name: np.array([means[name][0], *bounds[name][:, 0]]) for name in scores}


def improvements(scores: Scores) -> dict[str, np.ndarray]:
    """The probability that a run of the first algorithm is better than one of each other, and bounds."""
    np.random.seed(0)
    first, *others = scores
    pairs = {name: (scores[first], scores[name]) for name in others}
    means, bounds = library.get_interval_estimates(pairs, improvement, reps=RESAMPLES)
    return {name: np.array([means[name][0], *bounds[name][:, 0]]) for name in pairs}


def welch(ours: pd.Series, theirs: pd.Series) -> tuple[float, float]:
    """Bounds (95 %) of the difference of means."""
    if min(len(ours), len(theirs)) < 2 or ours.var() == theirs.var() == 0:
        return np.nan, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an algorithm whose runs are all alike
        low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------- figures


def draw_curves(curves: pd.DataFrame, labels: dict[str, str], random: dict[str, float]) -> Figure:
    """Mean and standard deviation over seeds, where all of them have been evaluated."""
    figure = Figure(figsize=(4.6 * len(random), 7), layout="constrained")
    figure.suptitle("Mean and standard deviation over seeds")
    unit, per_hour = ("minutes", 60) if curves.hours.max() < 1 else ("hours", 1)
    colors = palette(labels)
    for column, env in zip(figure.subplots(2, len(random), squeeze=False).T, random, strict=True):
        for name, label in labels.items():
            rows = curves[(curves.env == env) & (curves.algorithm == name)]
            if rows.empty:
                continue
            by_step = rows.groupby("steps")
            means = by_step[["mean_return", "hours"]].mean()[by_step.size() == rows.seed.nunique()]
            spread = by_step.mean_return.std().reindex(means.index).fillna(0)
            for axes, x in zip(column, (means.index, means.hours * per_hour), strict=True):
                axes.plot(x, means.mean_return, color=colors[name], label=f"{label} (n = {rows.seed.nunique()})")
                band = (means.mean_return - spread, means.mean_return + spread)
                axes.fill_between(x, *band, color=colors[name], alpha=0.2, linewidth=0)
        for axes, xlabel in zip(column, ("environment steps", f"{unit} of training"), strict=True):
            axes.axhline(random[env], color="grey", linestyle=":", label="random actions")
            axes.set(xlabel=xlabel, ylabel="return", title=env)
            axes.locator_params(axis="x", nbins=5)
        column[0].xaxis.set_major_formatter("{x:,.0f}")
        column[0].legend(frameon=False, fontsize="small")
    return figure


def draw_aggregate(scores: Scores, means: dict[str, np.ndarray], labels: dict[str, str], tasks: int) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    runs = f"{len(next(iter(scores.values())))} seeds of {tasks} task{'s' if tasks > 1 else ''}"
    figure.suptitle(f"Final returns, {runs}: 0 is random actions, 1 the best algorithm's mean (bands: 95 % bootstrap)")
    colors, (left, middle, right) = palette(labels), figure.subplots(1, 3)
    for axes, numbers in ((left, means), (right, improvements(scores))):
        for name, (value, low, high) in numbers.items():
            axes.barh(labels[name], high - low, left=low, color=colors[name], alpha=0.6)
            axes.plot(value, labels[name], "k|", markersize=14)
        axes.invert_yaxis()
    taus = np.linspace(min(0, *(each.min() for each in scores.values())), 1.5, 61)
    np.random.seed(0)
    shares, bounds = library.create_performance_profile(scores, taus, custom_profile_func=profile, reps=RESAMPLES)
    for name in scores:
        middle.plot(taus, shares[name], color=colors[name], label=labels[name])
        middle.fill_between(taus, *bounds[name], color=colors[name], alpha=0.2, linewidth=0)
    middle.legend(frameon=False, fontsize="small")
    left.set(title="interquartile mean", xlabel="normalised score", xlim=(min(0, left.get_xlim()[0]), None))
    middle.set(title="performance profile", xlabel="normalised score", ylabel="share of runs above")
    right.set(title=f"{labels[next(iter(scores))]}\nis better than ...", xlabel="probability", xlim=(-0.05, 1.05))
    right.axvline(0.5, color="grey", linestyle=":")
    return figure


# ------------------------------------------------------------------------------------------------- the report


def table(summary: pd.DataFrame, kept: dict[Run, Record], labels: dict[str, str], envs: Iterable[str]) -> str:
    ends = {(run.env, run.name): record["finished"] for run, record in kept.items() if record["finished"]}
    head = ("task", "algorithm", "n", "final return ± std", "by seed", "best", "area", "updates a step", "hours", "device")
    lines = []
    for env in envs:
        for name, label in labels.items():
            rows, end = summary[(summary.env == env) & (summary.algorithm == name)], ends.get((env, name), {})
            if len(rows):
                finals = (
                    f"{rows.final.mean():,.1f} ± {rows.final.std():,.1f}" if len(rows) > 1 else f"{rows.final.mean():,.1f}"
                )
                by_seed = ", ".join(f"{each:,.1f}" for each in rows.final)
                numbers = (finals, by_seed, f"{rows.best.mean():,.1f}", f"{rows.area.mean():,.1f}")
                how = (end.get("updates_per_step", "?"), f"{rows.hours.mean():.2f}", end.get("device", "?"))
                lines.append((env, label, len(rows), *numbers, *how))
    return markdown_table(head, lines)


def differences(summary: pd.DataFrame, labels: dict[str, str], envs: Iterable[str]) -> str:
    first, *others = labels
    lines = []
    for env in envs:
        finals = {name: rows.final for name, rows in summary[summary.env == env].groupby("algorithm")}
        for name in others:
            if first in finals and name in finals:
                low, high = welch(finals[first], finals[name])
                bounds = "-" if np.isnan(low) else f"[{low:+,.1f}, {high:+,.1f}]"
                lines.append((env, labels[name], f"{finals[first].mean() - finals[name].mean():+,.1f}", bounds))
    return markdown_table(("task", f"{labels[first]} less", "difference of means", "Welch's t, 95 %"), lines) if lines else ""


def remarks(summary: pd.DataFrame, runs: Sequence[Run], kept: dict[Run, Record]) -> list[str]:
    """What is missing, and what differs but should not."""
    there = set(summary[["env", "algorithm", "seed"]].itertuples(index=False, name=None))
    lines = []
    for run in runs:
        if (run.env, run.name, run.seed) not in there:
            reached = kept[run]["reached"] if run in kept else run.reached
            lines.append(f"- Missing: {run}, which has {reached:,} of {run.steps:,} steps.")
    for run, record in kept.items():
        if steps := ", ".join(f"{step:,}" for step in record.get("went_on_at", [])):
            lines.append(f"- Cut off, and went on from exact checkpoints: {run}, at {steps}.")
    if len({json.dumps(record["versions"], sort_keys=True) for record in kept.values()}) > 1:
        lines.append("- Beware: the versions of the packages differ between runs (evaluations/).")
    return lines


def report(runs: Sequence[Run], labels: dict[str, str], out: Path, title: str, at: int) -> str:
    """Write evaluations/, evaluations.csv, curves.png, aggregate.png and report.md, which is returned."""
    kept = records(runs, out)
    if not kept:
        raise SystemExit(f"{out} holds no evaluations of these runs")
    curves = collect(kept)
    write(out / "evaluations.csv", curves.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    random = {env: random_return(env, out) for env in dict.fromkeys(run.env for run in runs)}
    save_figure(draw_curves(curves, labels, random), out / "curves.png")
    summary = summarise(curves, at)
    scores = normalise(summary, random)
    scores = {name: scores[name] for name in labels if name in scores}
    tasks = next(iter(scores.values())).shape[1] if scores else 0
    means = interquartile_means(scores)
    if len(scores) > 1:
        save_figure(draw_aggregate(scores, means, labels, tasks), out / "aggregate.png")
    lines = [(labels[name], len(scores[name]), *np.round(each, 3)) for name, each in means.items()]
    head = ("algorithm", "n", "interquartile mean", "from", "to (95 % bootstrap)")
    notes = f"""\
After {at:,} environment steps. A run's final return is the mean of its last {LAST} evaluations, of the same
{runs[0].eval_episodes} episodes each; its best is the highest evaluation, and its area the mean along the curve. Random
actions reach {", ".join(f"{value:,.1f} ({env})" for env, value in random.items())}. Normalised scores: 0 is the return of
random actions, 1 the best algorithm's mean; {tasks} of {len(random)} tasks count, those of finished runs better than random.
Hours are those of training, on machines that other runs may share. With few seeds a bootstrap is too narrow: on one task, its
95 % leave out the truth one time in two for two seeds, and one time in four for three. Trust Welch's t then, which assumes
that runs are normally distributed.
"""
    versions = next(iter(kept.values()))["versions"]
    about = f"`{command()}`\n\n{', '.join(f'{name} {number}' for name, number in versions.items())}\n"
    tables = (
        table(summary, kept, labels, random),
        differences(summary, labels, random),
        markdown_table(head, lines) if lines else "",
    )
    blocks = (f"# {title}\n", *tables, notes, "".join(f"{line}\n" for line in remarks(summary, runs, kept)), about)
    text = "\n".join(block for block in blocks if block)
    write(out / "report.md", text)
    return text


# ------------------------------------------------------------------------------------------------- the command


def comparison_arguments(description: str, out: str, quick: str) -> argparse.ArgumentParser:
    """The options of `grid.arguments`, and those of every comparison."""
    parser = arguments(description, out, quick)
    parser.add_argument("--envs", nargs="+", metavar="ENV", default=["HalfCheetah-v5", "Hopper-v5"], help="(%(default)s)")
    parser.add_argument("--steps", type=positive, default=1_000_000, help="environment steps of a training (%(default)s)")
    parser.add_argument("--eval-freq", type=positive, default=10_000, help="steps between evaluations (%(default)s)")
    parser.add_argument("--eval-episodes", type=positive, default=10, help="of each evaluation (%(default)s)")
    parser.add_argument("--at", type=positive, help="compare after so many steps, where runs have not finished (--steps)")
    parser.add_argument("--report", action="store_true", help="train nothing, and report on what is there")
    parser.add_argument("--results", type=Path, help="folder for the report and the raw evaluations (--out)")
    return parser


def compare(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    variants: dict[str, Variant],
    title: str,
    baselines: str,
    out: Path,
) -> None:
    """Train what is missing, and report on what is there, into --results or else `out`; exit status 1 where a run failed."""
    check(parser, args, args.envs)
    if args.eval_freq > args.steps:
        parser.error(f"--eval-freq must be at most --steps, {args.steps}, not {args.eval_freq}")
    what = dict(steps=args.steps, eval_freq=args.eval_freq, eval_episodes=args.eval_episodes, baselines=baselines)
    runs = [  # seed by seed, so that what is cut off holds something of all
        make_run(args, env, name, variant, seed, **what)
        for seed, env, (name, variant) in itertools.product(args.seeds, args.envs, variants.items())
    ]
    failed = {} if args.report else train_or_exit(runs, args)
    labels = {name: variant.label or name for name, variant in variants.items()}
    print(report(runs, labels, args.results or out, title, args.at or args.steps))
    failures(failed)
