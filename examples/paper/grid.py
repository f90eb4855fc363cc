"""Trainings by the RL Zoo, algorithms x tasks x seeds, each in a process of its own, here or on many machines.

What has finished is not trained again, what was cut off goes on from its last checkpoint, and what fails is tried again. All
scripts beside this one train with it: `learning_curves.py`, `ablations.py`, `multi_goal.py` and `state_visits.py`.
"""

import argparse
import difflib
import importlib.resources
import importlib.util
import json
import logging
import os
import platform
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from experiments import NAMES, log_to, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_dipo import DIPO

CLASSES: dict[str, type[BaseAlgorithm]] = dict(dipo=DIPO, sac=SAC, td3=TD3, ppo=PPO, tqc=TQC, crossq=CrossQ)
# The paper's Table 2 for the algorithms that DIPO is compared with, as the zoo's YAML has it. The paper gives no rollout
# length and no number of epochs for PPO: the length is near that of the code that it names, the epochs are SB3's.
TABLE_2: dict[str, dict[str, Any]] = dict(
    sac=dict(
        learning_rate=3e-4,
        learning_starts=10_000,
        batch_size=256,
        ent_coef=0.2,
        policy_kwargs="dict(net_arch=[256, 256], activation_fn=nn.ReLU)",
    ),
    td3=dict(
        learning_rate=3e-4,
        learning_starts=10_000,
        noise_type="normal",
        noise_std=0.1,
        batch_size=256,
        target_policy_noise=0.2,
        target_noise_clip=0.5,
        policy_kwargs="dict(net_arch=[256, 256], activation_fn=nn.ReLU)",
    ),
    ppo=dict(
        learning_rate=7e-4,
        n_steps=256,
        batch_size=256,
        max_grad_norm=0.5,
        ent_coef=0.01,
        vf_coef=0.5,
        policy_kwargs="dict(net_arch=[256, 256], activation_fn=nn.Tanh)",
    ),
)
TRAIN = Path(__file__).with_name("grid_train.py")
PACKAGES = ("sb3_dipo", "torch", "numpy", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "mujoco", "rliable")


@dataclass(frozen=True)
class Variant:
    """
    An algorithm, and what differs from its entry in a YAML file.

    :param algo: a key of ``CLASSES``
    :param settings: take the place of the entry's, ``policy_kwargs`` as a whole
    :param label: in tables and figures
    :param file: of ``sb3_dipo.hyperparams``, for DIPO only
    """

    algo: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    file: str = "dipo.yml"


K20 = dict(num_train_timesteps=20)
FEW = dict(num_train_timesteps=100, num_inference_steps=10, solver="dpmpp_2m", timestep_spacing="lambda")
VARIANTS = {
    **{algo: Variant(algo, label=label) for algo, label in NAMES.items()},
    "dipo_paper": Variant("dipo", label="DIPO, paper's setting", file="dipo_paper.yml"),
    "dipo_k20": Variant("dipo", dict(policy_kwargs=K20), "DIPO, paper's setting with K = 20", "dipo_paper.yml"),
    "dipo_long": Variant("dipo", dict(policy_kwargs=K20), "DIPO, K = 20, long ascent steps"),
    "dipo_few": Variant("dipo", dict(policy_kwargs=FEW, action_gradient_steps=5), "DIPO, few denoising steps"),
}


@dataclass(frozen=True, eq=False)
class Run:
    """
    One training.

    :param folder: of this run alone
    :param env: task, as Gymnasium has it
    :param name: of the variant
    :param algo: as the zoo has it
    :param seed: of the agent and the environment
    :param steps: environment steps
    :param eval_freq: environment steps from one evaluation to the next, 0 for none
    :param eval_episodes: episodes of each
    :param settings: an entry of the zoo's YAML
    :param machine: how it is computed, which changes no result but for rounding: ``device``, and settings
    :param snapshots: environment steps after which the agent is kept
    """

    folder: Path
    env: str
    name: str
    algo: str
    seed: int
    steps: int
    eval_freq: int
    eval_episodes: int
    settings: dict[str, Any]
    machine: dict[str, Any]
    snapshots: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.env}, {self.name}, seed {self.seed}"

    @property
    def results(self) -> Path:
        """Where the zoo writes."""
        return self.folder / self.algo / f"{self.env.replace('/', '-')}_1"

    @property
    def finished(self) -> bool:
        return (self.results / "finished.json").exists()

    @property
    def reached(self) -> int:
        """Environment steps."""
        progress = self.read("progress.json") or {"steps": 0}
        return self.steps if self.finished else int(progress["steps"])

    @property
    def went_on_at(self) -> list[int]:
        """Environment steps of the checkpoints from which it went on."""
        log = self.folder / "log.txt"
        found = re.findall(r"Going on after (\d+) steps", log.read_text()) if log.exists() else []
        return sorted(set(map(int, found)))

    def read(self, name: str) -> Any:
        """A file of the results, or None."""
        path = self.results / name
        return json.loads(path.read_text()) if path.exists() else None

    def agent(self, step: int) -> BaseAlgorithm:
        """The agent as it was after so many environment steps, one of ``snapshots``."""
        return CLASSES[self.algo].load(self.results / "snapshots" / f"{step}.zip", device=self.machine["device"])

    def command(self) -> list[str]:
        options = dict(algo=self.algo, env=self.env, seed=self.seed, n_timesteps=self.steps, eval_freq=self.eval_freq or -1)
        if not self.eval_freq:
            options |= dict(save_freq=max(1_000, self.steps // 20))
        options |= dict(eval_episodes=self.eval_episodes, log_folder=self.folder, conf_file=self.folder / "hyperparams.yml")
        options |= dict(device=self.machine["device"], num_threads=1, log_interval=100)
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return [sys.executable, str(TRAIN), *given]

    def claim_folder(self) -> None:
        """Write what is trained here, or see that it is the same as what was begun."""
        names = ["env", "name", "algo", "seed", "steps", "eval_freq", "eval_episodes", "settings"]
        names += ["snapshots"] if self.snapshots else []
        mine = json.loads(json.dumps({name: getattr(self, name) for name in names}))
        file = self.folder / "spec.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (file.exists() and self.reached):  # nothing is lost
            about = dict(command=self.command(), machine=self.machine, versions=versions())
            entry = self.settings | {key: value for key, value in self.machine.items() if key != "device"}
            write(self.folder / "hyperparams.yml", yaml.safe_dump({self.env: entry}))
            write(file, json.dumps({"run": mine, **about}, indent=1))
        begun = json.loads(file.read_text())["run"]
        differ = [
            f"{name}: {begun.get(name)}, not {mine.get(name)}" for name in mine | begun if begun.get(name) != mine.get(name)
        ]
        if differ:
            raise SystemExit(f"{self.folder} holds a training with other settings ({', '.join(differ)}): choose another --out")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def settings(variant: Variant, env: str, steps: int, baselines: str, learning_starts: int | None) -> dict[str, Any]:
    """
    An entry of the zoo's YAML for one task.

    :param variant: DIPO's entry is from this project's YAML; what the variant sets itself has precedence over all
    :param env: task, as Gymnasium has it
    :param steps: environment steps
    :param baselines: "paper" or "zoo": where the entries of the other algorithms are from
    :param learning_starts: random steps, in place of those of the YAML
    """
    if variant.algo == "dipo":
        found = entry(importlib.resources.files("sb3_dipo.hyperparams").joinpath(variant.file).read_text(), env)
    elif baselines == "zoo":
        zoo = Path(importlib.util.find_spec("rl_zoo3").origin or "").parent  # type: ignore[union-attr]
        found = entry((zoo / "hyperparams" / f"{variant.algo}.yml").read_text(), env)
    elif variant.algo in TABLE_2:
        found = {"policy": "MlpPolicy", **TABLE_2[variant.algo]}
    else:
        raise SystemExit(f"--baselines must be zoo for {variant.algo}: the paper has no settings for it")
    off_policy = issubclass(CLASSES[variant.algo], OffPolicyAlgorithm)
    if off_policy and learning_starts is not None:
        found["learning_starts"] = learning_starts
    found = {**found, **variant.settings, "n_timesteps": steps}
    if off_policy:  # a buffer is no larger than what comes into it, as checkpoints hold it
        found["buffer_size"] = min(steps, found.get("buffer_size", 1_000_000))
    return found


def entry(text: str, env: str) -> dict[str, Any]:
    """A task's, or its older version's, or the default: rl_zoo3 2.9.2 has v4 of the MuJoCo tasks, and no v5."""
    known = yaml.safe_load(text)
    name, _, number = env.rpartition("-v")
    older = [f"{name}-v{n}" for n in range(int(number), -1, -1)] if number.isdecimal() else [env]
    return dict(next((known[each] for each in older if each in known), known["default"]))


# ------------------------------------------------------------------------------------------------- training


def train(run: Run, retries: int) -> None:
    """Train to the end, in a process that ends with this one."""
    if not (run.folder / "spec.json").exists():
        raise FileNotFoundError(f"{run.folder} is not on {platform.node()}: --out must be on a disk that all machines share")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(retries + 1):
        with (run.folder / "log.txt").open("a") as log:
            pipes: Any = dict(stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
            with subprocess.Popen(run.command(), cwd=run.folder, env=environment, **pipes) as process:
                code = process.wait()
        if run.finished:
            return
    last = (run.folder / "log.txt").read_text().splitlines()[-1:]
    raise RuntimeError(f"exit status {code} in {retries + 1} attempts; {run.folder / 'log.txt'} ends with: {''.join(last)}")


@contextmanager
def workers(args: argparse.Namespace) -> Iterator[Callable[[Run], "Future[None]"]]:
    """What takes a run and promises its end: a thread for one at a time, Ray for more."""
    if not args.address and args.jobs == 1:
        pool = ThreadPoolExecutor(1)
        yield lambda run: pool.submit(train, run, args.retries)
        pool.shutdown()
        return
    quiet = dict(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    if not args.address:  # Ray would write a token into the home folder
        quiet |= dict(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise SystemExit("--jobs above 1 and --address need Ray: pip install '.[cluster]' -c constraints.txt") from error
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        machine: dict[str, Any] = dict(address=args.address)
        if not args.address:  # nothing but names passes through the store
            machine = dict(num_cpus=args.jobs, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=folder)
        ray.init(**machine, log_to_driver=False, logging_level=logging.ERROR)
        task = ray.remote(num_cpus=1, num_gpus=args.gpus_per_run, max_retries=args.retries)(train)
        try:
            yield lambda run: task.remote(run, args.retries).future()
        finally:
            ray.shutdown()


def train_all(runs: Sequence[Run], args: argparse.Namespace) -> dict[Run, str]:
    """Train what is not finished, with a line for each that is running; what failed, and why."""
    failed: dict[Run, str] = {}
    waiting = [run for run in runs if not run.finished]
    running: dict[Future[None], Run] = {}
    if not waiting:
        return failed
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with workers(args) as start, Progress(*columns, console=Console(stderr=True)) as shown:
        total = shown.add_task("all", total=sum(run.steps for run in runs))
        bars: dict[Run, TaskID] = {}
        before: dict[Run, Any] = {}
        while waiting or running:
            while waiting and (args.jobs is None or len(running) < args.jobs):
                run = waiting.pop(0)
                before[run] = run.read("progress.json")
                running[start(run)] = run
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                run, error = running.pop(future), future.exception()
                if error:
                    failed[run] = str(error).strip().splitlines()[-1]
                shown.console.print(f"{run}: {failed.get(run, 'finished')}", markup=False, highlight=False, soft_wrap=True)
                if run in bars:
                    shown.remove_task(bars.pop(run))
            for run in running.values():
                progress = run.read("progress.json")
                if progress != before[run]:  # on a cluster, others may wait for a machine
                    if run not in bars:
                        bars[run] = shown.add_task(str(run), total=run.steps)
                    shown.update(bars[run], completed=progress["steps"])
            shown.update(total, completed=sum(run.reached for run in runs))
    return failed


# ------------------------------------------------------------------------------------------------- the command


def arguments(description: str, out: str, quick: str, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """A parser with the options that every script has which trains."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", default=list(seeds), help="(%(default)s)")
    parser.add_argument("--learning-starts", type=int, metavar="N", help="random steps before learning (the YAML's)")
    parser.add_argument("--variants", type=Path, help="YAML file of more algorithms, see learning_curves.py")
    parser.add_argument("--jobs", type=positive, help="trainings at a time (1, or what the cluster has room for)")
    parser.add_argument("--address", help="of a Ray cluster, or `auto`; otherwise all trainings are on this machine")
    parser.add_argument("--gpus-per-run", type=float, default=0, help="a fraction that Ray sets aside (%(default)s)")
    parser.add_argument("--retries", type=int, default=2, help="of a training that fails (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of PyTorch (%(default)s)")
    parser.add_argument("--accelerate", default="auto", help="as DIPO takes it (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for everything (%(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments; with --quick, `quick` has the defaults."""
    if parser.parse_args().quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(float(text))
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, envs: Sequence[str]) -> None:
    """Refuse what cannot be meant, and set the number of trainings at a time."""
    for env in envs:
        if env not in gym.registry:
            near = ", ".join(difflib.get_close_matches(env, gym.registry)) or "none is near"
            parser.error(f"--envs: {env} must be a task of Gymnasium's ({near})")
    if args.retries < 0 or args.gpus_per_run < 0 or (args.learning_starts or 0) < 0:
        parser.error("--retries, --gpus-per-run and --learning-starts must be at least 0")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds must be different numbers of at least 0, not {args.seeds}")
    if args.jobs is None and not args.address:
        args.jobs = 1
    if args.device.startswith("cuda") and args.jobs != 1 and not args.gpus_per_run:
        parser.error("--gpus-per-run must be above 0, such as 0.25, where Ray gives the GPU to runs: --device is cuda")


def choose(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    names: Sequence[str],
    known: Mapping[str, Variant] = VARIANTS,
    option: str = "--algorithms",
) -> dict[str, Variant]:
    """The variants of these names, of those that are known or in the file that --variants names; tiny ones with --quick."""
    known = {**known, **(read_variants(args.variants) if args.variants else {})}
    for name in names:
        if name not in known:
            parser.error(f"{option}: {name} must be of {', '.join(known)}")
    return {name: tiny(known[name]) if args.quick else known[name] for name in names}


def read_variants(path: Path) -> dict[str, Variant]:
    """Of a YAML file: ``name: {algo: dipo, action_lr: 0.1, policy_kwargs: {num_train_timesteps: 50}}``, and so on."""
    found = yaml.safe_load(path.read_text())
    if not isinstance(found, dict) or not all(
        isinstance(each, dict) and each.get("algo") in CLASSES for each in found.values()
    ):
        raise SystemExit(f"--variants must be a file with entries `name: {{algo: {'|'.join(CLASSES)}, ...}}`, not {path}")
    return {name: Variant(each.pop("algo"), each, name) for name, each in found.items()}


def tiny(variant: Variant) -> Variant:
    """A variant that is trained in seconds, and learns nothing."""
    own = variant.settings.get("policy_kwargs", {})
    if variant.algo != "dipo":
        return replace(variant, settings=variant.settings | dict(batch_size=32, policy_kwargs=own | dict(net_arch=[16])))
    short = {} if "actor" in own else dict(num_train_timesteps=3)
    given = dict(batch_size=32, action_gradient_steps=2, policy_kwargs=short | own | dict(net_arch=[16]))
    return replace(variant, settings=variant.settings | given)


def make_run(args: argparse.Namespace, env: str, name: str, variant: Variant, seed: int, **what: Any) -> Run:
    """
    A training in a folder of --out.

    :param what: ``steps``, and of ``Run`` what is to differ: ``eval_freq``, ``eval_episodes``, ``snapshots``; ``baselines``
        as ``settings`` takes it ("paper")
    """
    folder = args.out.resolve() / env.replace("/", "-") / name / f"seed{seed}"
    machine = dict(device=args.device) | (dict(accelerate=args.accelerate) if variant.algo == "dipo" else {})
    found = settings(variant, env, what["steps"], what.pop("baselines", "paper"), args.learning_starts)
    given = dict(eval_freq=0, eval_episodes=1) | what
    return Run(folder, env, name, variant.algo, seed, settings=found, machine=machine, **given)


def train_or_exit(runs: Sequence[Run], args: argparse.Namespace) -> dict[Run, str]:
    """Train what is missing, with Ctrl-C to interrupt it; what failed, and why."""
    log_to(args.out)
    for run in runs:
        run.claim_folder()
    try:
        return train_all(runs, args)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from the last checkpoints.", file=sys.stderr)
        os._exit(130)  # what still runs ends with this process


def failures(failed: dict[Run, str]) -> None:
    """Exit with status 1 where a run has failed."""
    if failed:
        raise SystemExit("\n".join(f"failed: {run}: {why}" for run, why in failed.items()))
