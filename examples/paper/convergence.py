"""Check the paper's Theorem 4.3: how close does iteration (9), the exponential integrator, come to the policy it is to sample?

    python examples/paper/convergence.py --quick
    python examples/paper/convergence.py --out examples/results/convergence

For a Gaussian policy N(m, diag v) the exact score is affine and iteration (9) maps Gaussians to Gaussians, so that every
number is a closed form, in float64 and of the coefficients that the package samples with. For a mixture of four modes,
samples are drawn with the exact score. Each part keeps its rows in <part>.csv as they come, beneath a line that tells its
settings apart: start the same command again after an interruption, and it goes on. Needs the extra `plots`.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from convergence_figures import show_map, show_mixture, show_orders, show_terms
from convergence_laws import SAMPLERS, Row, measure_gaussian, measure_mixture
from experiments import save_figure, write
from matplotlib.figure import Figure
from tqdm import tqdm

Cell = dict[str, Any]


def orders_cells(quick: bool) -> list[Cell]:
    policies = [([0.5], [0.2]), ([0.5] * 3, [0.1, 0.3, 1.0]), ([0.5] * 6, [0.5] * 6), ([0.5] * 2, [2.0] * 2)]
    return [
        dict(mean=mean, variance=variance, h=0.02 / 2**i, horizons=[1.0, 2.0, 3.0])
        for i in range(7 if quick else 12)
        for mean, variance in policies
    ]


def terms_cells(quick: bool) -> list[Cell]:
    """Around T = 1 and the smallest h, each of horizon, step and score error moved alone."""
    policies = [dict(mean=[0.5] * 2, variance=[1.5, 2.0]), dict(mean=[0.5], variance=[0.2])]
    h = 2e-5 if quick else 1e-6
    steps = [0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 1e-3, 1e-4, *([h] if quick else [1e-5, h, 5e-7])]
    horizons = np.linspace(0.1, 2, 20).round(2).tolist()
    cells: list[Cell] = [dict(policy, h=h, horizons=horizons, moved="horizon") for policy in policies]
    cells += [dict(policy, h=step, horizons=[1.0], moved="step") for step in steps for policy in policies]
    errors = np.logspace(-3, 0.5, 15).round(5).tolist()
    return cells + [
        dict(policy, h=h, horizons=[1.0], score_error=error, moved="score") for error in errors for policy in policies
    ]


def map_cells(quick: bool) -> list[Cell]:
    """h = 0 stands for the limit of short steps. KL and bound (L_s, nu alike) are both p times those of p = 1."""
    horizons = np.linspace(0.1, 2, 20).round(2).tolist()
    variances = np.geomspace(1 / 32, 4, 15 if quick else 29).round(6).tolist()
    return [
        dict(mean=[0.5], variance=[v], h=h, horizons=horizons)
        for h in (1e-4, *([2e-5] if quick else [1e-5, 1e-6]), 0.0)
        for v in variances
    ]


def mixture_cells(quick: bool) -> list[Cell]:
    counts = {"ou": [5, 10, 20, 50, 100] + ([] if quick else [200, 500, 1_000]), "cosine": [5, 10, 20, 50, 100], "exact": [0]}
    seeds = range(1) if quick else range(5)
    return [
        dict(sampler=sampler, num_steps=count, num_samples=2_000 if quick else 20_000, seed=seed)
        for sampler in ["exact", *SAMPLERS]
        for count in counts[sampler.split()[0]]
        for seed in seeds
    ]


def keep(path: Path, cells: list[Cell], measure: Callable[..., list[Row]], bar: "tqdm[Any]") -> pd.DataFrame:
    """The rows of all cells. Each is added to the file as it comes, at once or not at all; what is there is not done again."""
    digest = hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]
    about = dict(cells=len(cells), digest=digest, versions={name: version(name) for name in ("numpy", "torch")})
    head = f"# {json.dumps(about)}\n"
    text = path.read_text() if path.exists() else ""
    lines = text.splitlines()
    text, done = (text, int(lines[-1].split(",")[0]) + 1) if text.startswith(head) and len(lines) > 2 else (head, 0)
    bar.update(done)
    for i in range(done, len(cells)):
        rows = pd.DataFrame([dict(cell=i, **row) for row in measure(**cells[i])])
        text += rows.to_csv(index=False, header=i == 0, float_format="%.6g")
        write(path, text)
        bar.update()
    return pd.read_csv(path, comment="#")


class Part(NamedTuple):
    cells: Callable[[bool], list[Cell]]  # what is measured, from whether it is to be quick
    measure: Callable[..., list[Row]]  # the rows of a cell
    show: Callable[[pd.DataFrame], tuple[Figure, list[str]]]  # the rows' figure and findings


PARTS = {
    "orders": Part(orders_cells, measure_gaussian, show_orders),
    "terms": Part(terms_cells, measure_gaussian, show_terms),
    "map": Part(map_cells, measure_gaussian, show_map),
    "mixture": Part(mixture_cells, measure_mixture, show_mixture),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Takes 4 minutes of one core and 2 GB of memory, --quick 10 seconds. Cut off and started again, it goes on.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples, longer steps")
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"), help="folder for all (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do (all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # the same sums, whatever the machine

    cells = {name: part.cells(args.quick) for name, part in PARTS.items() if name in args.parts}
    blocks = [
        "# Theorem 4.3, checked",
        f"Written by `python examples/paper/convergence.py{' --quick' if args.quick else ''}`.",
    ]
    with tqdm(total=sum(map(len, cells.values())), unit="case") as bar:
        for name in cells:
            bar.set_description(name)
            rows = keep(args.out / f"{name}.csv", cells[name], PARTS[name].measure, bar)
            figure, found = PARTS[name].show(rows)
            save_figure(figure, args.out / f"{name}.png")
            blocks += [f"## {name.capitalize()}", f"![{name}]({name}.png)", *found]
    write(args.out / "convergence.md", "\n\n".join(blocks) + "\n")
    print("\n\n".join(blocks))


if __name__ == "__main__":
    main()
