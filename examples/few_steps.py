"""Compare what DIPO learns with few, long steps and with the paper's many, short ones; write curves, a table and a figure.

    python examples/few_steps.py run --env Pendulum-v1 --setting paper --seed 0 --out runs/few_steps
    python examples/few_steps.py run --env Pendulum-v1 --setting long --seed 0 --out runs/few_steps
    python examples/few_steps.py report --out runs/few_steps

`run` trains one agent on one thread. Its curve is kept as it comes, beneath a line with the settings and versions, in
<env>-<setting>-seed<seed>.csv; a run that was cut off starts again, one that has finished is never overwritten. `report`
makes few_steps.md and few_steps.svg of the runs that are there, and says which are not; it needs the extra `plots`.
"""

import argparse
import json
import logging
import platform
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

import mujoco
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_dipo import DIPO

# The paper's, with K = 20. Whatever is not named is DIPO's default, which is the paper's.
PAPER: dict[str, Any] = dict(policy_kwargs=dict(num_train_timesteps=20), action_gradient_steps=20, action_lr=0.03)
# A quarter of the action gradient's steps, four times as long: Adam moves an action by about the learning rate each time.
LONG: dict[str, Any] = {**PAPER, "action_gradient_steps": 5, "action_lr": 0.12}
# The same, and 10 steps of a second-order solver for a policy that is fitted with K = 100.
SAMPLER: dict[str, Any] = dict(num_train_timesteps=100, num_inference_steps=10, solver="dpmpp_2m", timestep_spacing="lambda")
FEW: dict[str, Any] = {**LONG, "policy_kwargs": SAMPLER}
HALF_CHEETAH: dict[str, Any] = dict(action_grad_norm_ratio=0.08, actor_target_update_interval=2)  # in every setting
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "Pendulum-v1": dict(paper=PAPER, long=LONG),
    "HalfCheetah-v5": dict(
        paper={**PAPER, **HALF_CHEETAH, "action_gradient_steps": 40},
        long={**LONG, **HALF_CHEETAH, "action_gradient_steps": 10},
        few={**FEW, **HALF_CHEETAH},
    ),
}
SEEDS = {"Pendulum-v1": 5, "HalfCheetah-v5": 3}  # that the report looks for
STEPS = {"Pendulum-v1": 7_000, "HalfCheetah-v5": 30_000}
LEARNING_STARTS = {"Pendulum-v1": 1_000, "HalfCheetah-v5": 10_000}
AT_RANDOM = {"Pendulum-v1": -1_231.0, "HalfCheetah-v5": -282.0}  # mean return of 1,000 and 100 episodes of random actions

EPISODES = 10
EVALUATION_SEED = 1_000  # the same starts in every evaluation, of every run
LAST = 3  # evaluations whose mean is a run's final return
RESAMPLES = 10_000  # of the bootstrap
COLORS = {"paper": "tab:blue", "long": "tab:green", "few": "tab:orange"}
COLUMNS = ("steps", "mean_return", "std_return", "train_seconds")


def play(model: DIPO, env: VecEnv) -> np.ndarray:
    """Returns of one episode in each environment. Training goes on afterwards as if this had not been."""
    env.seed(EVALUATION_SEED)
    with th.random.fork_rng():
        th.manual_seed(EVALUATION_SEED)
        returns, _ = evaluate_policy(model, env, EPISODES, deterministic=False, return_episode_rewards=True)
    return np.array(returns)


class Evaluate(BaseCallback):
    """Play every so many steps and at the end, and append a line to a file."""

    def __init__(self, path: Path, env: VecEnv, every: int):
        super().__init__()
        self.path, self.env, self.every = path, env, every
        self.latest = 0  # step of the latest evaluation
        self.seconds_playing = 0.0

    def _on_training_start(self) -> None:
        self.started = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self.evaluate()
        return True

    def _on_training_end(self) -> None:
        if self.latest < self.num_timesteps:
            self.evaluate()

    def evaluate(self) -> None:
        paused = time.perf_counter()
        seconds = paused - self.started - self.seconds_playing
        assert isinstance(self.model, DIPO)
        returns = play(self.model, self.env)
        with self.path.open("a") as file:
            file.write(f"{self.num_timesteps},{returns.mean():.2f},{returns.std():.2f},{seconds:.2f}\n")
        self.latest = self.num_timesteps
        self.seconds_playing += time.perf_counter() - paused


@dataclass
class Run:
    """A curve, whole or cut off, as its file has it."""

    env: str
    setting: str
    seed: int
    about: dict[str, Any]  # settings and versions
    curve: np.ndarray  # the columns by name, one row per evaluation

    @classmethod
    def read(cls, path: Path) -> "Run | None":
        """The run, or None where the file is no curve or holds no evaluation."""
        name = re.fullmatch(r"(.+)-(paper|long|few)-seed(\d+)", path.stem)
        lines = path.read_text().splitlines() if name and path.exists() else []
        if not name or len(lines) < 3:
            return None
        curve = np.atleast_1d(np.genfromtxt(lines[2:], delimiter=",", names=COLUMNS))
        return cls(name[1], name[2], int(name[3]), json.loads(lines[0].removeprefix("# ")), curve)

    @property
    def reached(self) -> int:
        return int(self.curve["steps"][-1])

    def final_return(self, steps: int) -> float:
        """The mean of the last evaluations until so many steps."""
        return float(self.curve["mean_return"][self.curve["steps"] <= steps][-LAST:].mean())

    def milliseconds(self) -> float:
        """Of one step of training, without the random ones at the start."""
        learning = self.curve[self.curve["steps"] >= self.about["learning_starts"]]
        if len(learning) < 2:
            return np.nan
        return float(1_000 * np.ptp(learning["train_seconds"]) / np.ptp(learning["steps"]))


def train(args: argparse.Namespace) -> None:
    """Train one agent, and keep its curve."""
    path = args.out / f"{args.env}-{args.setting}-seed{args.seed}.csv"
    before = Run.read(path)
    if before and before.reached >= before.about["steps"]:
        raise SystemExit(f"{path} holds a finished run of {before.reached:,} steps: move it away to run again")
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(handlers=[logging.FileHandler(args.out / "warnings.log", delay=True)])
    mujoco.set_mju_user_warning(logging.warning)  # otherwise MuJoCo writes a file of its own, wherever it is started from
    th.set_num_threads(1)

    steps, starts = args.steps or STEPS[args.env], args.learning_starts
    starts = LEARNING_STARTS[args.env] if starts is None else starts
    settings = SETTINGS[args.env][args.setting]
    packages = ("torch", "numpy", "stable-baselines3", "gymnasium", "mujoco")
    about = dict(
        settings=settings,
        steps=steps,
        learning_starts=starts,
        eval_freq=args.eval_freq,
        device=args.device,
        accelerate=args.accelerate,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
    )
    machine: dict[str, Any] = dict(device=args.device, accelerate=args.accelerate)
    model = DIPO("MlpPolicy", args.env, learning_starts=starts, seed=args.seed, **machine, **settings)
    path.write_text(f"# {json.dumps(about)}\n{','.join(COLUMNS)}\n")
    model.learn(steps, Evaluate(path, make_vec_env(args.env, n_envs=EPISODES), args.eval_freq), log_interval=1_000)
    print(path.read_text().splitlines()[-1])


def iqm(scores: np.ndarray) -> float:
    from rliable.metrics import aggregate_iqm  # type: ignore[import-untyped]

    return float(aggregate_iqm(scores))


def interval(*scores: np.ndarray) -> np.ndarray:
    """Bounds (95 %) of the runs' interquartile mean, or of that of the first less that of the second."""
    from rliable.library import get_interval_estimates  # type: ignore[import-untyped]

    def statistic(*samples: np.ndarray) -> np.ndarray:
        return np.array([iqm(samples[0]) - sum(map(iqm, samples[1:]))])

    if min(map(len, scores)) < 2:
        return np.full(2, np.nan)
    columns = [score[:, None] for score in scores]  # runs by tasks
    np.random.seed(0)  # rliable draws from the global generator, whatever it is given
    _, bounds = get_interval_estimates({"": columns if len(columns) > 1 else columns[0]}, statistic, reps=RESAMPLES)
    return np.asarray(bounds[""]).ravel()


def claim(bounds: np.ndarray, welch: np.ndarray, gain: float) -> str:
    """What the bounds of setting - paper allow to say, where the paper's setting is better than random actions by `gain`."""
    low, high = bounds
    if np.isnan(low):
        return "no claim, as that takes two runs of each"
    share = f" = {-low / gain:.1%} of the paper setting's gain over random" if gain > 0 else ""
    said = f"no loss larger than {-low:,.1f}{share} was detected" if low < 0 else "no loss was detected"
    if high < 0:
        said = f"a loss was detected, of {-high:,.1f} to {-low:,.1f}{share}"
    return f"{said} (95 % bootstrap; Welch's t allows {max(-welch[0], 0):,.1f})"


def describe(settings: dict[str, Any]) -> str:
    others = dict(settings["policy_kwargs"])
    total = others.pop("num_train_timesteps")
    sampler = " ".join([f"{others.pop('num_inference_steps', total)} of K = {total}", *map(str, others.values())])
    return f"{sampler}, {settings['action_gradient_steps']} steps of {settings['action_lr']}"


def remarks(env: str, runs: list[Run], at: int) -> list[str]:
    """What is missing, and what differs but should not."""
    lines = []
    for setting in SETTINGS[env]:
        reached = {run.seed: run.reached for run in runs if run.setting == setting}
        for seed in sorted({*range(SEEDS[env]), *(run.seed for run in runs)}):
            if reached.get(seed, 0) < at:
                where = f"only {reached[seed]:,} of {at:,} steps" if seed in reached else "no curve"
                lines.append(f"- Missing: {env}, {setting}, seed {seed} ({where}).")
    for key in ("settings", "learning_starts", "eval_freq", "device", "accelerate", "versions"):
        if any(
            a.about.get(key) != b.about.get(key) and (key != "settings" or a.setting == b.setting) for a in runs for b in runs
        ):
            lines.append(f"- Beware: runs of {env} differ in their {key}.")
    return lines


def report(args: argparse.Namespace) -> None:
    """Write a table and a figure of the runs that are there."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from scipy.stats import ttest_ind  # type: ignore[import-untyped]

    found = [run for path in sorted(args.out.glob("*.csv")) if (run := Run.read(path))]
    envs = [env for env in SETTINGS if any(run.env == env for run in found)]
    if not envs:
        raise SystemExit(f"{args.out} holds no curve")
    table = [
        f"| env | setting | n | mean of the last {LAST} evaluations, by seed | IQM [95 %] | ms a training step |",
        "|---|---|---|---|---|---|",
    ]
    differences = [
        "| env | setting | after steps | IQM less the paper's [95 %] | Welch's t on means [95 %] | paper's time / its |",
        "|---|---|---|---|---|---|",
    ]
    claims, notes = [], [f"- No runs of {env}." for env in SETTINGS if env not in envs]
    figure = Figure(figsize=(5.8 * len(envs), 5), layout="constrained")
    figure.suptitle("Does DIPO learn less with few, long steps?\nThin: a seed. Bold: interquartile mean.", fontsize="large")
    for env, axes in zip(envs, figure.subplots(1, len(envs), squeeze=False)[0], strict=True):
        runs = [run for run in found if run.env == env]
        at = min(args.steps or np.inf, max(run.about["steps"] for run in runs))
        scores, times = {}, {}
        for setting, color in COLORS.items():
            drawn = [run for run in runs if run.setting == setting]
            whole = [run for run in drawn if run.reached >= at]
            scores[setting] = np.array([run.final_return(at) for run in whole])
            times[setting] = float(np.median([run.milliseconds() for run in whole] or np.nan))
            for run in drawn:
                axes.plot(run.curve["steps"], run.curve["mean_return"], color=color, linewidth=0.7, alpha=0.6)
            if whole:
                curves = [dict(zip(run.curve["steps"], run.curve["mean_return"], strict=True)) for run in whole]
                steps = sorted(set.intersection(*map(set, curves)))
                bold = [iqm(np.array([curve[step] for curve in curves])) for step in steps]
                label = f"{setting}: {describe(whole[0].about['settings'])}"
                axes.plot(steps, bold, color=color, linewidth=2.5, label=f"{label} (n = {len(whole)})")
                low, high = interval(scores[setting])
                cells = ", ".join(f"{score:,.1f}" for score in scores[setting])
                cells += f" | {iqm(scores[setting]):,.1f} [{low:,.1f}, {high:,.1f}] | {times[setting]:.1f}"
                table.append(f"| {env} | {label} | {len(whole)} | {cells} |")
        paper, said = scores["paper"], {}
        for setting in [other for other in SETTINGS[env] if other != "paper"]:
            own = scores[setting]
            bounds, welch = interval(own, paper), np.full(2, np.nan)
            if not np.isnan(bounds[0]):
                welch = np.array(ttest_ind(own, paper, equal_var=False).confidence_interval())
                cells = f"{iqm(own) - iqm(paper):+,.1f} [{bounds[0]:+,.1f}, {bounds[1]:+,.1f}]"
                cells += f" | [{welch[0]:+,.1f}, {welch[1]:+,.1f}] | {times['paper'] / times[setting]:.2f}"
                differences.append(f"| {env} | {setting} | {at:,} | {cells} |")
            said[setting] = claim(bounds, welch, iqm(paper) - AT_RANDOM[env] if len(paper) else 0.0)
            claims.append(f"- {env}, {setting}, after {at:,} steps, n = {len(own)} and {len(paper)}: {said[setting]}.")
        notes += remarks(env, runs, at)
        axes.axhline(AT_RANDOM[env], color="grey", linestyle=":", label="random actions")
        axes.set(xlabel="environment steps", ylabel=f"mean return of {EPISODES} episodes")
        axes.set_title(
            "\n".join([env, *(fill(f"{setting}: {line.partition(' (')[0]}", 68) for setting, line in said.items())]),
            fontsize="small",
        )
        axes.legend(frameon=False, fontsize="small")
    explanation = [
        f"Each evaluation plays the same {EPISODES} starts with deterministic=False. Settings: steps of the sampler, then of",
        f"the action gradient. IQM: rliable's interquartile mean over seeds (the mean where n < 4), {RESAMPLES:,} resamples,",
        "each setting on its own. With so few runs a bootstrap interval is too narrow: for two samples of three from one",
        "normal distribution its 95 % leave out the truth 19 times in 100 (6 for five), Welch's t 3 (4): read both. Times are",
        "medians over runs, wall time after the random steps without evaluation, on one thread: comparable if all runs had",
        "the same share of a machine.",
    ]
    blocks = [["# Few, long steps against the paper's with K = 20"], claims, table, differences, explanation, notes]
    (args.out / "few_steps.md").write_text("\n\n".join("\n".join(block) for block in blocks if block) + "\n")
    with rc_context({"svg.hashsalt": "few_steps"}):  # the same runs give the same file
        figure.savefig(args.out / "few_steps.svg", metadata={"Date": None})
    print((args.out / "few_steps.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="train one agent and keep its curve")
    run.set_defaults(command=train)
    run.add_argument("--env", choices=SETTINGS, default="Pendulum-v1", help="(%(default)s)")
    run.add_argument(
        "--setting",
        choices=COLORS,
        required=True,
        help="the paper's with K = 20, that with few and long ascent steps, or with few denoising steps, too",
    )
    run.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    run.add_argument("--steps", type=int, help=f"environment steps {STEPS}")
    run.add_argument("--learning-starts", type=int, help=f"random steps before the first update {LEARNING_STARTS}")
    run.add_argument("--eval-freq", type=int, default=1_000, help="steps between evaluations (%(default)s)")
    run.add_argument("--device", default="cpu", help="(%(default)s)")
    run.add_argument("--accelerate", default="auto", help="as DIPO takes it (%(default)s)")
    summary = commands.add_parser("report", help="make a table and a figure of the runs that are there")
    summary.set_defaults(command=report)
    summary.add_argument("--steps", type=int, help="compare after so many steps (the most that a run was asked for)")
    for command in (run, summary):
        command.add_argument("--out", type=Path, default=Path("runs/few_steps"), help="folder for all (%(default)s)")
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
