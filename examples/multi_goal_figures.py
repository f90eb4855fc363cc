"""The figures of multi_goal.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from experiments import COLORS, NAMES, save_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import set_random_seed

from sb3_dipo.envs.multi_goal import GOALS, LIMIT

ENDS = dict(up="#4477aa", down="#66ccee", right="#228833", left="#ccbb44", none="#dddddd")


def label(agent: str) -> str:
    """ "DIPO, no write-back" for "dipo-no-write-back"."""
    algorithm, _, variant = agent.partition("-")
    return f"{NAMES[algorithm]}, {variant.replace('-', ' ', 1)}" if variant else NAMES[algorithm]


def actions(model: BaseAlgorithm, states: np.ndarray, deterministic: bool) -> np.ndarray:
    """Of shape (n, 2), at states of shape (n, 2)."""
    set_random_seed(0)
    return model.predict(states.astype(np.float32), deterministic=deterministic)[0]


def values(model: BaseAlgorithm, states: np.ndarray) -> np.ndarray:
    """min_i Q_i(s, a), a the policy's deterministic action, or V(s); states of shape (n, 2), values of shape (n,)."""
    observations = th.as_tensor(states, dtype=th.float32, device=model.device)
    with th.no_grad():
        if isinstance(model, PPO):
            return model.policy.predict_values(observations).cpu().numpy()[:, 0]
        critic: Any = model.policy.critic
        q_values = critic(observations, th.as_tensor(actions(model, states, True), device=model.device))
        return th.cat(q_values, dim=1).min(dim=1).values.cpu().numpy()


def grid(limit: float, points: int) -> np.ndarray:
    """States on a square, shape (points * points, 2)."""
    line = np.linspace(-limit, limit, points)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def draw_arrows(axes: Axes, model: BaseAlgorithm, samples: int = 10) -> None:
    """Actions that the policy samples at the 49 states {-3, ..., 3}^2."""
    states = np.repeat(grid(3, 7), samples, axis=0)
    sampled = actions(model, states, False)
    axes.quiver(*states.T, *sampled.T, color="tab:red", alpha=0.4, angles="xy", scale_units="xy", scale=1.25, width=0.005)
    axes.plot(*GOALS.T, "*", color="tab:blue", markersize=10, clip_on=False)
    axes.set(xlim=(-5.4, 5.4), ylim=(-5.4, 5.4), xticks=(-3, 0, 3), yticks=(-3, 0, 3), aspect="equal")


def draw_surface(axes: Any, model: BaseAlgorithm, points: int = 100) -> None:
    states = grid(LIMIT, points)
    surface = [each.reshape(points, points) for each in (*states.T, values(model, states))]
    axes.plot_surface(*surface, rcount=50, ccount=50, cmap="viridis", linewidth=0)
    axes.view_init(40, -60)
    axes.set(xticks=(-5, 0, 5), yticks=(-5, 0, 5))
    axes.tick_params(labelsize="x-small", pad=-2)
    axes.set_title("V(s)" if isinstance(model, PPO) else "Q(s, a)", fontsize="small", y=0.95)


def draw_policies(agents: dict[str, BaseAlgorithm], path: Path, title: str) -> None:
    """For each agent, by its title, the arrows and beneath them the surface."""
    columns = min(5, len(agents))
    rows = -(-len(agents) // columns)
    figure = Figure(figsize=(max(2.7 * columns, 6), 5.4 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    for index, (name, model) in enumerate(agents.items()):
        place = 2 * columns * (index // columns) + index % columns + 1
        draw_arrows(figure.add_subplot(2 * rows, columns, place, title=name), model)
        draw_surface(figure.add_subplot(2 * rows, columns, place + columns, projection="3d"), model)
    save_figure(figure, path, dpi=80)


def draw_evenness(rows: pd.DataFrame, path: Path) -> None:
    """Where rollouts ended, a bar for each seed, and the evenness over the iterations."""
    names = list(dict.fromkeys(rows["agent"]))
    final = rows[rows["iteration"] == rows["iteration"].max()].reset_index(drop=True)
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1.3, 1))
    places = final.index + final["agent"].map(names.index)  # a gap between agents
    bottom = np.zeros(len(final))
    for end, color in ENDS.items():
        bars.bar(places, final[end], bottom=bottom, width=0.9, color=color, label=end)
        bottom += final[end]
    bars.set_xticks(places.groupby(final["agent"], sort=False).mean(), [label(name).replace(", ", ",\n") for name in names])
    bars.set(ylabel="share of the rollouts, a bar for each seed", ylim=(0, 1))
    bars.set_title(f"Which goal a policy reaches from the origin,\nafter {final['iteration'].max():,} iterations")
    bars.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, handlelength=1)
    for name in names:
        mean = rows[rows["agent"] == name].groupby("iteration")["evenness"].mean()
        style = "--" if "-" in name else "-"
        curves.plot(mean.index, mean, style, color=COLORS[name.partition("-")[0]], label=label(name), linewidth=2)
    curves.set(xlabel="iterations", ylabel="entropy / log 4, mean over seeds", ylim=(-0.03, 1.03))
    curves.set_title("Evenness: 1 for all four alike,\n0 for one only")
    curves.legend(frameon=False)
    save_figure(figure, path)
