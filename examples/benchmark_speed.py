"""Time DIPO, a naive DIPO, SAC, TD3, TQC and CrossQ in turn in one process: updates, actions, and steps a second of learn().

    python examples/benchmark_speed.py --threads 1
    python examples/benchmark_speed.py --dims Hopper-v5 --only "DIPO K=100" naive SAC --out runs/speed
    python examples/benchmark_speed.py --dims Hopper-v5 --only "DIPO K=100" --profile
    python examples/benchmark_speed.py --threads 1 --clock cpu                      where other programs run, too

In every round each competitor gets one turn at each measure, in rotating order. The table has medians and quartiles over the
rounds. Ratios are taken round by round, so that whatever slows the machine down for a while slows both sides, and the table
has their medians. The naive DIPO is the tests' oracle, in plain eager PyTorch at the paper's setting. All DIPO have the
paper's networks (three layers of 256, Mish), SAC and TD3 have those of SB3. Updates and actions are timed on random data of
the environments' sizes, learn() in the environments themselves. The results are written to speed.md and speed.json in --out
after every turn.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import get_device, polyak_update
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from sb3_dipo import DIPO, RECOMMENDED, improve_actions

TEN = {"num_train_timesteps": 100, "num_inference_steps": 10, "solver": "dpmpp_2m", "timestep_spacing": "lambda"}
K20 = {"num_train_timesteps": 20}
LONG = {"action_lr": 0.12, "action_gradient_steps": 5}  # ascent steps
SETTINGS: dict[str, dict[str, Any]] = {
    "DIPO K=100": {"policy_kwargs": {"num_train_timesteps": 100}},
    "DIPO K=100 bfloat16": {"policy_kwargs": {"num_train_timesteps": 100, "inference_dtype": "bfloat16"}},
    "DIPO K=20": {"policy_kwargs": K20},
    "DIPO recommended": RECOMMENDED,
    "DIPO long steps": {**LONG, "policy_kwargs": K20},
    "DIPO long steps bfloat16": {**LONG, "policy_kwargs": {**K20, "inference_dtype": "bfloat16"}},
    "DIPO few-step": {**LONG, "policy_kwargs": TEN},
    # one option each, of those with long steps
    "DIPO flow": {**LONG, "policy_kwargs": {"actor": "flow"}},
    "DIPO flow quantile": {**LONG, "policy_kwargs": {"actor": "flow", "critic": "quantile"}},
    "DIPO quantile": {**LONG, "policy_kwargs": {**K20, "critic": "quantile"}},
    "DIPO layer_norm": {**LONG, "policy_kwargs": {**K20, "layer_norm": True}},
    "DIPO best of 4": {**LONG, "policy_kwargs": {**K20, "samplers": {"behaviour": {"num_candidates": 4}}}},
    "DIPO bound": {**LONG, "policy_kwargs": K20, "max_action_shift": 0.5},
    "DIPO from the policy": {**LONG, "policy_kwargs": K20, "action_gradient_start": "policy"},
}
REDUCED_PARTS = ("target sampling", "action gradient")  # of an update: where products are done in `inference_dtype`
NAIVE = "naive DIPO K=100"
BASELINES = (NAIVE, "SAC")  # of the ratios
MODES = ("off", "auto", "cudagraphs", "compile")
WIDTHS, EMBEDDING = (256, 256, 256), 32  # the paper's networks
ROWS = 4_096  # of random replay data
QUICK: dict[str, Any] = {"dims": ["Hopper-v5"], "modes": ["off", "auto"], "rounds": 2, "updates": 2, "actions": 2}
QUICK |= {"learn_steps": 4, "n_envs": 2, "batch_size": 16}
TITLES = {
    "update": "milliseconds of one update",
    "action": "milliseconds of one action as in training, batch {}",
    "deterministic": "milliseconds of one action with deterministic=True, batch {}",
    "learn": "steps a second of learn(), environments: {}",
}
Calls = dict[str, Callable[[], object]]


def available_modes(device: th.device) -> list[str]:
    """What `accelerate` can be on this machine; compiling for the CPU takes a C++ compiler."""
    if device.type == "cuda":
        return ["off", "cudagraphs", "compile"]
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
    return ["off", "auto", "compile"] if compiler else ["off", "auto"]


def makers(modes: list[str]) -> dict[str, Callable[..., OffPolicyAlgorithm] | None]:
    """Each competitor's constructor by its name; the naive one has none, for it is no SB3 algorithm."""
    dipos = {
        f"{name}, {mode}": partial(DIPO, accelerate=mode, **kwargs) for name, kwargs in SETTINGS.items() for mode in modes
    }
    return {**dipos, NAIVE: None, "SAC": SAC, "TD3": TD3, "TQC": TQC, "CrossQ": CrossQ}


def load_naive() -> Any:
    """The tests' naive DIPO, the only one there is."""
    path = Path(__file__).resolve().parent.parent / "tests" / "naive_dipo.py"
    spec = importlib.util.spec_from_file_location("naive_dipo", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"The naive DIPO is not at {path}: run this from a checkout, or with --only DIPO SAC TD3")
    module = sys.modules["naive_dipo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_transitions(env: VecEnv) -> tuple[np.ndarray, ...]:
    """Observations, next observations, actions, rewards and ends, float32, (rows, environments, ...)."""
    rng, shape = np.random.default_rng(0), (ROWS // env.num_envs, env.num_envs)
    states = rng.standard_normal((2, *shape, *(env.observation_space.shape or ())), dtype=np.float32)
    actions = rng.uniform(-1, 1, (*shape, *(env.action_space.shape or ()))).astype(np.float32)
    return *states, actions, rng.standard_normal(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)


def naive_calls(env: VecEnv, args: argparse.Namespace) -> Calls:
    """
    What is timed of the naive DIPO. It climbs from the actions taken and writes nothing back: the oracle does that row by
    row, to be exact and not to be fast, and each row would make a GPU wait.
    """
    naive = load_naive()
    settings = naive.Settings(persist_improved_actions=False)
    states, next_states, actions, rewards, ends = (th.as_tensor(a, device=args.device) for a in random_transitions(env))
    agent = naive.NaiveDIPO(settings, states.shape[-1], actions.shape[-1], WIDTHS, device=args.device)
    memory = naive.Memory(states, actions, rewards, next_states, ends)
    host = states[:16, 0].cpu().numpy()

    def act(size: int) -> np.ndarray:
        return agent.act(th.as_tensor(host[:size], device=args.device)).cpu().numpy()

    calls = {f"action {size}": partial(act, size) for size in (1, 16)}
    return {"update": partial(agent.update, memory, {"batch_size": args.batch_size}), **calls}


def make_model(make: Callable[..., OffPolicyAlgorithm], env: VecEnv, args: argparse.Namespace) -> OffPolicyAlgorithm:
    """An agent that learns from its first step on, because its replay buffer is full of random transitions."""
    gradient_steps = 1 if env.num_envs == 1 else -1  # one update per environment step
    options = {"buffer_size": ROWS, "learning_starts": 0, "train_freq": 1, "gradient_steps": gradient_steps}
    model = make("MlpPolicy", env, batch_size=args.batch_size, device=args.device, seed=0, **options)
    model.set_logger(Logger(None, []))
    assert model.replay_buffer is not None
    for state, next_state, action, reward, end in zip(*random_transitions(env), strict=True):
        model.replay_buffer.add(state, next_state, action, reward, end, [{} for _ in range(env.num_envs)])
    return model


def model_calls(model: OffPolicyAlgorithm, env: VecEnv, args: argparse.Namespace) -> Calls:
    """What is timed of an SB3 algorithm; with several environments only learn()."""
    learn: Calls = {f"learn {env.num_envs}": partial(model.learn, args.learn_steps, reset_num_timesteps=False)}
    if env.num_envs > 1:
        return learn
    observations = random_transitions(env)[0][:16, 0]
    actions = {f"action {size}": partial(model.predict, observations[:size]) for size in (1, 16)}
    actions["deterministic 1"] = partial(model.predict, observations[:1], deterministic=True)
    return {"update": partial(model.train, 1, args.batch_size), **actions, **learn}


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(call: Callable[[], object], times: int, device: th.device, clock: str = "wall") -> float:
    """How long one call takes, the mean of several, all work on the device included."""
    if device.type == "cuda":
        th.cuda.synchronize()
    start = CLOCKS[clock]()
    for _ in range(times):
        call()
    if device.type == "cuda":
        th.cuda.synchronize()
    return (CLOCKS[clock]() - start) / times


def make_competitor(
    name: str, env_id: str, n_envs: int, args: argparse.Namespace
) -> tuple[OffPolicyAlgorithm | None, VecEnv, Calls]:
    """A competitor's model (none of the naive one), its environments, and what is timed of it."""
    make, env = makers(args.modes)[name], make_vec_env(env_id, n_envs, seed=0)
    if make is None:
        return None, env, naive_calls(env, args)
    model = make_model(make, env, args)
    return model, env, model_calls(model, env, args)


def turn(call: Callable[[], object], measure: str, args: argparse.Namespace) -> float:
    """One turn of one competitor: milliseconds, or for learn() steps a second."""
    if measure.startswith("learn"):
        return args.learn_steps / seconds(call, 1, args.device, args.clock)
    call()  # whoever was before it has the caches
    return 1e3 * seconds(call, args.updates if measure == "update" else args.actions, args.device, args.clock)


def host_peak() -> float | None:
    """Largest resident set of this process so far, in MiB."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


MULTIPLY_ADDS = """
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, SUMS = 24;
#else
constexpr int LANES = 4, SUMS = 12;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
extern "C" double operations(long times, float *numbers) {
    Vector sums[SUMS], a = Vector{} + numbers[0], b = Vector{} + numbers[1], total{};
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) sums[i] = Vector{} + float(i);
    for (long t = 0; t < times; ++t)
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; ++i) sums[i] = sums[i] * a + b;
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) total += sums[i];
    numbers[2] = total[0];
    return 2.0 * times * SUMS * LANES;
}
"""


def compile_multiply_adds() -> Callable[[], float] | None:
    """
    A function that multiplies and adds in registers, on one thread, for some milliseconds, and returns how many operations
    these were; None without a compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "peak.so")
        command = [*compiler.split(), "-O2", "-march=native", "-x", "c++", "-", "-shared", "-fPIC", "-o", library]
        try:
            subprocess.run(command, input=MULTIPLY_ADDS, text=True, check=True, capture_output=True)
            operations = ctypes.CDLL(library).operations
        except (OSError, subprocess.CalledProcessError):
            return None
    operations.restype, operations.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_void_p]
    numbers = (ctypes.c_float * 3)(0.999, 0.5, 0.0)
    return lambda: float(operations(500_000, numbers))


def best_seconds(call: Callable[[], object], device: th.device, clock: str) -> float:
    """The shortest time of a call, of as many as half a second allows."""
    best, end = seconds(call, 1, device, clock), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        best = min(best, seconds(call, 10, device, clock))
    return best


def measure_peaks(device: th.device, clock: str, gflops: float | None, gbs: float | None) -> dict[str, float]:
    """What the device can do: 1e9 operations a second in products by precision and size, 1e9 bytes a second."""
    peaks = {}
    for size in (256, 8192) if device.type == "cuda" else (256,):
        for dtype in (th.float32, th.bfloat16):
            a, b = th.ones((2, size, size), device=device, dtype=dtype).unbind()
            calls = [partial(th.mm, a, b, out=th.empty_like(a))]
            if device.type == "cpu" and dtype == th.float32 and th.backends.mkldnn.is_available():
                calls.append(partial(F.linear, a.to_mkldnn(), b.to_mkldnn()))  # oneDNN's, where MKL's is slower
            fastest = min(best_seconds(call, device, clock) for call in calls)
            peaks[f"{str(dtype).removeprefix('torch.')} {size}"] = 2e-9 * size**3 / fastest
    a, b = th.ones((2, 2**26 if device.type == "cuda" else 2**24), device=device).unbind()
    copied = 2 * 4e-9 * a.numel() / best_seconds(partial(b.copy_, a), device, clock)
    if gflops:
        peaks = {f"{dtype} given": gflops for dtype in ("float32", "bfloat16")}
    return {name: float(f"{rate:.4g}") for name, rate in {**peaks, "gbs": gbs or copied}.items()}


def macs(*sizes: int) -> int:
    """Multiplications and additions of an MLP on one row."""
    return sum(fan_in * fan_out for fan_in, fan_out in pairwise(sizes))


def floor(env: VecEnv, setting: dict[str, Any], batch_size: int, peaks: dict[str, float]) -> dict[str, Any]:
    """
    What no implementation of an update can leave out, 1e9 operations of matrix products and 1e6 bytes, and the time that
    this takes at each of the peak rates, in ms.

    Whatever does not change in a loop is worked out once: the state's part of the first layers; the few rows of the timestep
    embedding's are left out. Bytes: weights, both of Adam's moments and the targets read and written once, the two
    minibatches once, all in float32; what is in between is taken to stay on the chip.
    """
    (obs_dim,), (action_dim,) = env.observation_space.shape or (), env.action_space.shape or ()
    kwargs, ascents = setting["policy_kwargs"], setting.get("action_gradient_steps", 20)
    is_flow, is_quantile = kwargs.get("actor") == "flow", kwargs.get("critic") == "quantile"
    steps = kwargs.get("num_inference_steps") or (5 if is_flow else kwargs["num_train_timesteps"])
    samplings = 2 if setting.get("action_gradient_start") == "policy" else 1
    on_state, time_mlp = obs_dim * WIDTHS[0], macs(EMBEDDING, WIDTHS[0], EMBEDDING)
    outputs = 25 if is_quantile else 1  # of a critic, whose mean is climbed
    critic, actor = macs(obs_dim + action_dim, *WIDTHS, outputs), macs(action_dim + EMBEDDING + obs_dim, *WIDTHS, action_dim)
    no_gradient = (obs_dim + action_dim) * WIDTHS[0]  # of inputs that are data
    per_row = {
        "target sampling": samplings * (on_state + steps * macs(action_dim, *WIDTHS, action_dim)),
        "critic step": 2 * (critic + 3 * critic - no_gradient),  # target; forward, gradients of weights and of inputs
        # back only through the smaller of two Q, but through both of which the mean counts
        "action gradient": 2 * on_state + ascents * (4 if is_quantile else 3) * macs(action_dim, *WIDTHS, 1),
        "actor step": 3 * (actor + time_mlp) - no_gradient - EMBEDDING * WIDTHS[0],
    }
    work = {part: 2e-9 * batch_size * count for part, count in per_row.items()}
    biases = 3 * sum(WIDTHS) + 2 + action_dim + WIDTHS[0] + EMBEDDING
    numbers = 8 * (actor + time_mlp + 2 * critic + biases) + batch_size * (3 * obs_dim + 3 * action_dim + 2)
    reduced, times = kwargs.get("inference_dtype", "float32"), {}
    for shape in {name.split()[1]: None for name in peaks if " " in name}:
        rates = {part: peaks[f"{reduced if part in REDUCED_PARTS else 'float32'} {shape}"] for part in work}
        times[shape] = 1e3 * max(sum(work[part] / rates[part] for part in work), 4e-9 * numbers / peaks["gbs"])
    return {"gflop": sum(work.values()), "gflop_by_part": work, "megabytes": 4e-6 * numbers, "ms_at_peak": times}


class Results:
    """All that was measured, on disk after every turn."""

    def __init__(self, folder: Path, head: dict[str, Any]):
        self.folder, self.head = folder, head
        self.values: dict[tuple[str, str, str], list[float]] = {}  # by dims, measure, name; one value per round
        self.floors: dict[tuple[str, str], dict[str, Any] | None] = {}  # by dims, name
        self.peaks: dict[str, list[float]] = {}  # by dims; 1e9 multiply-adds a second in registers, twice; one a round
        self.cuda_peaks: dict[tuple[str, str], float | None] = {}
        self.notes: dict[str, list[str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, name: str, text: str) -> None:
        """Remember what there is to say about a competitor, once."""
        if text not in self.notes.setdefault(name, []):
            self.notes[name].append(text)

    def ratio(self, dims: str, measure: str, name: str, baseline: str) -> float | None:
        """How many times as fast as the baseline, the median of the rounds' ratios."""
        own, other = self.values[dims, measure, name], self.values.get((dims, measure, baseline), [])
        ratios = [a / b if measure.startswith("learn") else b / a for a, b in zip(own, other, strict=False)]
        return float(np.median(ratios)) if ratios else None

    def times_the_floor(self, dims: str, name: str) -> float | None:
        """How often an update's time in float32 is that of its products at the peak in registers, the rounds' median."""
        least, peaks = self.floors[dims, name], self.peaks.get(dims, [])
        values = self.values[dims, "update", name]
        if least is None or "bfloat16" in name or not peaks:
            return None
        return float(np.median([1e-3 * ms * peak / least["gflop"] for ms, peak in zip(values, peaks, strict=False)]))

    def rows(self) -> list[dict[str, Any]]:
        """One for each competitor, environment and measure, as in the JSON file."""
        rows = []
        for (dims, measure, name), values in self.values.items():
            if values:
                row: dict[str, Any] = {"dims": dims, "measure": measure, "name": name}
                row["unit"] = "steps/s" if measure.startswith("learn") else "ms"
                first, row["median"], third = np.percentile(values, [25, 50, 75]).tolist()
                row |= {"quartiles": [first, third], "values": values}
                row["times_as_fast_as"] = {baseline: self.ratio(dims, measure, name, baseline) for baseline in BASELINES}
                if measure == "update":
                    row["times_the_floor"] = self.times_the_floor(dims, name)
                    row |= {"floor": self.floors[dims, name], "peak_cuda_mib": self.cuda_peaks[dims, name]}
                rows.append(row)
        return rows

    def save(self) -> None:
        """Replace both files at once, so that neither is ever half written."""
        self.head["peak_host_mib"] = host_peak()
        content = {**self.head, "notes": self.notes, "peaks_in_registers": self.peaks, "results": self.rows()}
        for name, text in (("speed.json", json.dumps(content, indent=1, allow_nan=False)), ("speed.md", self.table())):
            part = self.folder / f".{name}"
            part.write_text(text + "\n")
            part.replace(self.folder / name)

    def table(self) -> str:
        """All of it in Markdown."""

        def show(value: float | None, digits: int = 3) -> str:
            return "" if value is None else f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"

        head = [(key.replace("_", " "), json.dumps(value).strip('"')) for key, value in self.head.items()]
        notes = [(name, note) for name, notes in self.notes.items() for note in notes]
        lines = ["# Speed", "", *(f"- {name}: {text}" for name, text in head + notes), ""]
        lines += ["Speed over another's: how many times as fast, the median of the rounds' ratios."]
        for dims, peaks in self.peaks.items():
            lines += [f"Floor: matrix products at {show(float(np.median(peaks)))} GFLOP/s, in registers ({dims}, the median)."]
        heading = None
        for row in self.rows():
            update = row["measure"] == "update"
            if heading != (heading := (row["dims"], row["measure"])):
                kind, _, size = row["measure"].partition(" ")
                columns = ["", "median", "quartiles", "speed / naive's", "speed / SAC's"]
                columns += update * ["GFLOP", "times the floor", "MB", "floor, ms (products of)", "peak CUDA MiB"]
                lines += ["", f"## {row['dims']}: {TITLES[kind].format(size)}", "", f"| {' | '.join(columns)} |"]
                lines += ["|---" + "|---:" * (len(columns) - 1) + "|"]
            cells = [row["name"], show(row["median"], 4), " to ".join(show(value, 4) for value in row["quartiles"])]
            cells += [show(row["times_as_fast_as"][baseline]) for baseline in BASELINES]
            if update:
                least = row["floor"] or {"gflop": None, "megabytes": None, "ms_at_peak": {}}
                times = ", ".join(f"{show(ms)} ({shape})" for shape, ms in least["ms_at_peak"].items())
                cells += [
                    show(least["gflop"]),
                    show(row["times_the_floor"]),
                    show(least["megabytes"]),
                    times,
                    show(row["peak_cuda_mib"]),
                ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def prepare(name: str, env_id: str, n_envs: int, args: argparse.Namespace, results: Results) -> Calls:
    """A competitor's calls, warmed up (captured, compiled); none where it cannot be made. Its warnings become notes."""
    on_cuda = args.device.type == "cuda"
    before = th.cuda.memory_allocated() if on_cuda else 0
    if on_cuda:
        th.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _, env, calls = make_competitor(name, env_id, n_envs, args)
        except (TypeError, ValueError) as error:  # an option that this version does not have
            results.note(name, f"left out: {error}")
            return {}
        calls = {measure: call for measure, call in calls.items() if measure.split()[0] in args.measures}
        for call in 2 * [*calls.values()]:
            call()
    for warning in caught:
        results.note(name, f"warned: {warning.message}")
    if "update" in calls:
        results.cuda_peaks[env_id, name] = (th.cuda.max_memory_allocated() - before) / 2**20 if on_cuda else None
        setting = SETTINGS.get(name.rpartition(", ")[0])
        rates = results.head["peak_rates"]
        results.floors[env_id, name] = floor(env, setting, args.batch_size, rates) if setting else None
    return calls


def benchmark(names: list[str], args: argparse.Namespace, results: Results) -> None:
    """Rounds of turns, for each environment, with one and with several copies of it."""
    multiply_adds = compile_multiply_adds() if args.device.type == "cpu" else None
    for env_id in args.dims:
        for n_envs in sorted({1, args.n_envs} if "learn" in args.measures else {1}):
            competitors: dict[str, Calls] = {}
            for name in names if n_envs == 1 else [name for name in names if name != NAIVE]:
                print(f"{env_id}, environments: {n_envs}: making {name}", file=sys.stderr)
                competitors[name] = prepare(name, env_id, n_envs, args, results)
            measures = list(dict.fromkeys(measure for calls in competitors.values() for measure in calls))
            turns = [(measure, [name for name, calls in competitors.items() if measure in calls]) for measure in measures]
            results.values |= {(env_id, measure, name): [] for measure, entered in turns for name in entered}
            # as fast as it is in the same minute, for one thread
            measured = multiply_adds if "update" in measures and th.get_num_threads() == 1 else None
            for number in range(args.rounds):
                if measured is not None:
                    times = [(measured(), seconds(measured, 1, args.device, args.clock)) for _ in range(5)]
                    peaks = [1e-9 * operations / each for operations, each in times]
                    results.peaks.setdefault(env_id, []).append(float(np.median(peaks)))
                print(f"{env_id}, environments: {n_envs}: round {number + 1} of {args.rounds}", file=sys.stderr)
                for measure, entered in turns:
                    first = number % len(entered)
                    for name in entered[first:] + entered[:first]:
                        value = turn(competitors[name][measure], measure, args)
                        results.values[env_id, measure, name].append(value)
                        results.save()


def pieces(model: DIPO, batch_size: int) -> Calls:
    """The parts of an update by its public pieces, each on the same minibatch."""
    assert model.replay_buffer is not None
    buffer: Any = model.replay_buffer
    data, batch = buffer.sample(batch_size), buffer.sample_improved(batch_size, None)
    actor, actor_target = model.actor, model.actor_target
    critic: Any = model.critic
    critic_target: Any = model.critic_target

    def step(loss: th.Tensor, network: Any) -> None:
        network.optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(network.parameters(), model.max_grad_norm)
        network.optimizer.step()

    def target_sampling() -> th.Tensor:
        with th.no_grad():
            return actor_target.sample(actor_target.extract_features(data.next_observations))

    def critic_step() -> None:
        target = data.rewards + model.gamma * critic_target.next_value(data.next_observations, data.actions)
        step(critic.loss(data.observations, data.actions, target), critic)

    def action_gradient() -> th.Tensor:
        ratio = model.action_grad_norm_ratio
        q_fn = critic.objective(batch.observations)
        return improve_actions(q_fn, batch.improved_actions, model.action_lr, model.action_gradient_steps, ratio)

    def targets_and_write_back() -> None:
        polyak_update(actor.parameters(), actor_target.parameters(), model.tau)
        polyak_update(critic.parameters(), critic_target.parameters(), model.tau)
        buffer.update_improved(batch.rows, batch.envs, batch.improved_actions)

    return {
        "replay sampling": lambda: (buffer.sample(batch_size), buffer.sample_improved(batch_size, None)),
        "target sampling": target_sampling,
        "critic step": critic_step,
        "action gradient": action_gradient,
        "actor step": lambda: step(actor.loss(actor.extract_features(batch.observations), batch.improved_actions), actor),
        "targets and write-back": targets_and_write_back,
    }


def is_operator(event: Any) -> bool:
    """Whether an event of the profiler is an operator like `aten::mul`."""
    on_cpu = event is not None and event.device_type == th.autograd.DeviceType.CPU
    return on_cpu and "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def show_operators(update: Callable[[], object], device: th.device) -> None:
    """How many operators and kernels an update runs, and which ten take longest."""
    on_cuda = device.type == "cuda"
    activities = [th.profiler.ProfilerActivity.CPU, *on_cuda * [th.profiler.ProfilerActivity.CUDA]]
    with th.profiler.profile(activities=activities) as profiler:
        seconds(update, 1, device)
    averages, events = profiler.key_averages(), profiler.events() or []
    operators = sum(is_operator(event) and not is_operator(event.cpu_parent) for event in events)
    kernels = sum(event.count for event in averages if event.device_type == th.autograd.DeviceType.CUDA)
    print(
        f"\n{operators:,} operators an update, not counting those inside others"
        + on_cuda * f"; {kernels:,} kernels and copies"
    )
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    print(f"\n| operator | calls | {key}, ms |\n|---|---:|---:|")
    for event in sorted(averages, key=lambda event: -getattr(event, key))[:10]:
        print(f"| {event.key.replace('|', '/')[:80]} | {event.count:,} | {1e-3 * getattr(event, key):.3f} |")


def profile(names: list[str], args: argparse.Namespace) -> None:
    """Print where an update's time goes: its parts called one by one in turn, each for itself, and its operators."""
    for env_id in args.dims:
        for name in names:
            print(f"\n## {env_id}: {name}\n")
            try:
                model, _, calls = make_competitor(name, env_id, 1, args)
            except (TypeError, ValueError) as error:
                print(f"Left out: {error}")
                continue
            parts = pieces(model, args.batch_size) if isinstance(model, DIPO) else {}
            parts["whole update"] = calls["update"]
            times: dict[str, list[float]] = {part: [] for part in parts}
            for _ in range(args.rounds):
                for part, call in parts.items():
                    times[part].append(turn(call, "update", args))
            medians = {part: float(np.median(values)) for part, values in times.items()}
            print("| part, called by itself | ms | of the whole |\n|---|---:|---:|")
            for part, ms in medians.items():
                print(f"| {part} | {ms:.3f} | {ms / medians['whole update']:.0%} |")
            show_operators(calls["update"], args.device)


def device_name(device: th.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return th.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def check_dims(parser: argparse.ArgumentParser, env_ids: list[str]) -> None:
    """End with a message that names the environment, unless all can be made and have sizes to speak of."""
    for env_id in env_ids:
        try:
            env = gym.make(env_id)
        except (gym.error.Error, ImportError) as error:
            parser.error(f"--dims {env_id}: {error}")
        flat = [isinstance(space, spaces.Box) and len(space.shape) == 1 for space in (env.observation_space, env.action_space)]
        if not all(flat):
            parser.error(f"--dims {env_id}: observations and actions must be vectors of real numbers")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--dims", nargs="+", default=["HalfCheetah-v5", "Humanoid-v5"], help="environments (%(default)s)")
    add("--only", nargs="+", help="competitors with one of these in their names (all)")
    add("--measures", nargs="+", choices=TITLES, default=list(TITLES), help="what is timed (%(default)s)")
    add("--modes", nargs="+", choices=MODES, help="DIPO's `accelerate` (all that this machine has)")
    add("--rounds", type=int, default=7, help="turns of each competitor (%(default)s)")
    add("--updates", type=int, default=4, help="updates in a turn, even, as TD3's differ by turns (%(default)s)")
    add("--actions", type=int, default=10, help="actions in a turn (%(default)s)")
    add("--learn-steps", type=int, help="environment steps of learn() in a turn (32 on the CPU, 640 on a GPU)")
    add("--n-envs", type=int, default=16, help="environments of the second timing of learn() (%(default)s)")
    add("--batch-size", type=int, default=256, help="(%(default)s)")
    add("--threads", type=int, help="threads of PyTorch (its default)")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="of all times: the wall's, or this process's on the processor (%(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    add("--peak-gflops", type=float, help="1e9 operations a second, for the floor (measured: products of 256 x 256 matrices)")
    add("--peak-gbs", type=float, help="1e9 bytes a second, for the floor (measured: a large copy)")
    add("--profile", action="store_true", help="only print where an update's time goes; nothing is written")
    add("--quick", action="store_true", help="a tiny run that shows that everything works; its numbers mean nothing")
    add("--out", type=Path, default=Path("runs/speed"), help="folder of speed.md and speed.json (%(default)s)")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.threads:
        th.set_num_threads(args.threads)
    args.device = get_device(args.device)
    args.modes = args.modes or available_modes(args.device)
    args.learn_steps = args.learn_steps or (640 if args.device.type == "cuda" else 32)
    for name in ("rounds", "updates", "actions", "learn_steps", "n_envs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.learn_steps % args.n_envs:
        parser.error(f"--learn-steps must be a multiple of --n-envs: {args.learn_steps} is not one of {args.n_envs}")
    args.names = [name for name in makers(args.modes) if not args.only or any(part in name for part in args.only)]
    if not args.names:
        parser.error(f"--only {' '.join(args.only)}: no such competitor among: {'; '.join(makers(args.modes))}")
    check_dims(parser, args.dims)
    return args


def main() -> None:
    args = parse_arguments()
    mujoco.set_mju_user_warning(lambda _: None)  # otherwise MuJoCo writes a file wherever it is started from
    if NAIVE in args.names:
        load_naive()
    if args.profile:
        profile(args.names, args)
        return
    head = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(args.device),
        "threads": th.get_num_threads(),
        "versions": f"torch {th.__version__}, SB3 {stable_baselines3.__version__}, Python {platform.python_version()}",
        "system": f"{platform.system()}, {platform.machine()}",
        "clock": args.clock,
        "batch_size": args.batch_size,
        "turns": f"{args.rounds} rounds of {args.updates} updates, {args.actions} actions, {args.learn_steps} learn() steps",
        "settings": SETTINGS,
        "peak_rates": measure_peaks(args.device, args.clock, args.peak_gflops, args.peak_gbs),
        "peak_host_mib": None,
    }
    results = Results(args.out, head)
    try:
        benchmark(args.names, args, results)
    finally:  # what there is, also if it was interrupted
        print(results.table())


if __name__ == "__main__":
    main()
