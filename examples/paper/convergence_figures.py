"""The figures and findings of convergence.py, from the rows that it has measured."""

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from convergence_laws import MODE_STD, MODES, SAMPLERS, draw
from experiments import markdown_table
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def order(rows: pd.DataFrame, error: str) -> str:
    """q in error = C h^q, by least squares in the logarithms, where h < 2e-3."""
    small = rows[rows.h < 2e-3]
    return f"{np.polyfit(np.log(small.h), np.log(small[error]), 1)[0]:.3f}"


def markdown(table: pd.DataFrame) -> str:
    cells = table.reset_index().map(lambda cell: f"{cell:.3g}".replace("nan", "") if isinstance(cell, float) else str(cell))
    return markdown_table(cells.columns, cells.to_numpy()).rstrip()


def show_orders(rows: pd.DataFrame) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, (policy, drawn) in enumerate(rows[rows.horizon == 2].groupby("policy", sort=False)):
        left.loglog(drawn.h, drawn.std_error, "o-", color=f"C{i}", markersize=3)
        left.loglog(drawn.h, drawn.mean_error, "o--", color=f"C{i}", markersize=3, markerfacecolor="white")
        middle.loglog(drawn.h, drawn.kl_to_limit, "o-", color=f"C{i}", markersize=3, label=policy)
    middle.legend(frameon=False, title="m = 0.5, both panels")
    for i, (horizon, drawn) in enumerate(rows[rows.policy == rows.policy[0]].groupby("horizon")):
        right.loglog(drawn.h, drawn.kl, "o-", color=f"C{i}", markersize=3, label=f"KL, T = {horizon:g}")
    right.loglog(drawn.h, drawn.bound, color="tab:red", linewidth=2.5, label=f"bound, T = {horizon:g}")
    right.legend(frameon=False, loc="upper left")
    left.set(title="Mean (dashed) and standard deviation: order 1", ylabel="distance to the exact reverse process, T = 2")
    middle.set(title="KL to the exact reverse process: order 2", ylabel="KL, T = 2")
    right.set(
        title=f"KL to the policy falls faster than the bound,\ndown to the horizon's floor ({rows.policy[0]})", ylabel="KL"
    )
    for axes in (left, middle, right):
        axes.set_xlabel("step size h")

    errors = dict(mean_error="mean", std_error="std", kl_to_limit="KL")
    groups = rows.groupby(["policy", "horizon"], sort=False)
    orders = {keys: {short: order(drawn, error) for error, short in errors.items()} for keys, drawn in groups}
    return figure, [
        "Observed order in h of iteration (9) from N(0, I), m = 0.5, h < 2e-3: its mean, standard deviation and KL against\n"
        "the exact reverse process from the same N(0, I). The bound has order 1. The KL to the policy itself stops falling\n"
        "where the horizon's error begins.",
        markdown(pd.DataFrame.from_dict(orders, orient="index").rename_axis(["policy", "T"])),
    ]


def findings(rows: pd.DataFrame) -> list[str]:
    """Where the bound holds."""
    covered = pd.Series(np.where(rows.v >= 1, "max v ≥ 1, as the proof needs", "max v < 1"), rows.index, name="policy")
    small = pd.Series(np.where(rows.h <= rows.largest_h, "small enough for the proof", "larger"), rows.index, name="h")
    counted = rows.assign(cases=1, broken=rows.kl > rows.bound, broken_with_min_nu_1=rows.kl > rows.bound_min_nu_1)
    broken = rows[counted.broken]
    worst = broken.loc[(broken.kl - broken.bound).groupby(broken.h).idxmax()].set_index("policy")
    columns = ["horizon", "h", "score_error", "kl", "bound", "horizon_term", "step_term", "score_term"]
    return [
        "Broken: KL > bound. With min(nu, 1): the same theorem, of the smaller log-Sobolev constant.",
        markdown(counted.groupby([covered, small])[["cases", "broken", "broken_with_min_nu_1"]].sum()),
        *(["Broken by most, for each h (0: the limit of short steps):", markdown(worst[columns])] if len(broken) else []),
    ]


def show_terms(rows: pd.DataFrame) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(13, 8), layout="constrained")
    smallest = rows.h[rows.moved == "score"].iloc[0]
    figure.suptitle(
        "The KL (black) ought to stay below the bound (red): for v ≥ 1 it does, below that not always.\n"
        f"One of horizon, step size and score error moved, the others at T = 1, h = {smallest:g} and 0"
    )
    columns = {
        "horizon": ("horizon", "horizon T"),
        "step": ("h", "step size h"),
        "score": ("score_error", "error of the score"),
    }
    for line, (policy, of_policy) in zip(figure.subplots(2, 3), rows.groupby("policy", sort=False), strict=True):
        for axes, (moved, (column, label)) in zip(line, columns.items(), strict=True):
            drawn = of_policy[of_policy.moved == moved].sort_values(column)
            broken = drawn[drawn.kl > drawn.bound]
            axes.plot(drawn[column], drawn.bound, color="tab:red", linewidth=2.5, label="bound")
            for term, style in zip(columns, (":", "--", "-."), strict=True):
                axes.plot(drawn[column], drawn[f"{term}_term"], style, color="tab:orange", label=f"its {term} term")
            axes.plot(drawn[column], drawn.kl, "o-", color="black", markersize=3, label="KL to the policy")
            axes.plot(broken[column], broken.kl, "x", color="tab:red", markersize=9, label="KL above the bound")
            if moved == "step":
                axes.axvline(drawn.largest_h.iloc[0], color="grey", label="largest h of the proof")
                axes.legend(frameon=False, fontsize="small")
            outcome = f"broken at {len(broken)} of {len(drawn)}" if len(broken) else "the bound holds"
            axes.set(
                title=f"{policy}: {outcome}", xlabel=label, yscale="log", xscale="linear" if moved == "horizon" else "log"
            )
            axes.set_ylabel("nats" if moved == "horizon" else "")
            axes.set_ylim(max(drawn.kl.min() / 30, 1e-9), max(drawn.bound[np.isfinite(drawn.bound)].max(), 1) * 5)
    return figure, findings(rows)


def show_map(rows: pd.DataFrame) -> tuple[Figure, list[str]]:
    steps = sorted(rows.h.unique(), reverse=True)
    figure = Figure(figsize=(3.2 * len(steps) + 1, 4.4), layout="constrained")
    figure.suptitle("Red: the bound fails, for variances below 1 and short steps. Blue: it holds")
    panels: list[Axes] = list(figure.subplots(1, len(steps), sharey=True))
    for axes, h in zip(panels, steps, strict=True):
        table = (
            rows[rows.h == h].assign(ratio=np.log10(rows.kl / rows.bound)).pivot(index="horizon", columns="v", values="ratio")
        )
        place = (table.columns, table.index, table)
        mesh = axes.pcolormesh(*place, cmap=colormaps["RdBu_r"].resampled(32), vmin=-4, vmax=4, shading="nearest")
        axes.contour(*place, levels=[0], colors="black")
        axes.axvline(1, color="black", linewidth=1, linestyle="--")
        axes.set(title=f"h = {h:g}" if h else "h → 0", xlabel="variance v (proof: v ≥ 1)", xscale="log")
        axes.set_xticks([0.05, 0.2, 1, 4], ["0.05", "0.2", "1", "4"])
        axes.minorticks_off()
    panels[0].set_ylabel("horizon T")
    figure.colorbar(mesh, ax=panels, label="log10(KL / bound), cut off at ±4")
    return figure, [
        *findings(rows),
        "As h -> 0 and for long T the KL falls as e^{-4T} (m not 0) and the bound as e^{-(9/4) T / v}: whatever the factors,\n"
        "it fails for every v < 9/16. A Gaussian that fits into [-1, 1] has v < 1, so that only min(nu, 1) is safe for it.",
    ]


def show_mixture(rows: pd.DataFrame) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(13, 7), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=[1, 1.4]))
    above.suptitle(
        "100 steps of the OU process, exact score: the exponential integrator leaves its last step's noise in the sample"
    )
    for axes, sampler in zip(above.subplots(1, 5), ["exact", *SAMPLERS[:4]], strict=True):
        axes.scatter(*draw(sampler, 100, 500, seed=0).T, s=2, color="black")
        axes.set(
            title=sampler.removeprefix("ou "), xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xticks=[], yticks=[]
        )
    titles = {"ou": "OU process, uniform steps, T = 4, unclipped", "cosine": "The package's default: cosine, K = 100, clipped"}
    for axes, (name, title) in zip(below.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, sampler in enumerate(SAMPLERS[:4]):
            drawn = rows[rows.sampler == sampler.replace("ou", name)].groupby("num_steps").distance
            if len(drawn):
                axes.errorbar(drawn.mean().index, drawn.mean(), drawn.std(), fmt="o-", color=f"C{i}", label=sampler[3:])
        axes.axhline(rows.distance[rows.sampler == "exact"].mean(), color="grey", linestyle=":", label="two exact samples")
        axes.set(title=title, xlabel="number of steps", xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize="small")
    below.axes[0].set_ylabel("sliced Wasserstein distance")

    table = rows.pivot_table(index="sampler", columns="num_steps", values=["distance", "spread"], sort=False)
    table.columns = table.columns.set_levels(table.columns.levels[1].astype(str), level=1)
    return figure, [
        f"{len(MODES)} modes at distance 0.7 from the origin, of std {MODE_STD}, with their exact score. Sliced Wasserstein\n"
        f"distance to exact samples by number of steps, mean of {rows.seed.nunique()} seeds; exact: two exact sets.",
        markdown(table["distance"]),
        f"Spread of the samples about their nearest mode ({MODE_STD} is right). The exponential integrator's last step adds\n"
        "noise of std sqrt(e^{2h} - 1), whatever the policy's; what leaves [-1, 1] by it is clipped by the package's loop:",
        markdown(table["spread"]),
    ]
