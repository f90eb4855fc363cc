"""
Look at a policy: which actions it takes in one state, how they come out of noise, and what the critic thinks of them::

    from sb3_dipo import plots

    figure = plots.plot_policy(model, observation)
    figure.savefig("policy.png")

:func:`plot_policy` draws everything in one figure. The other functions give the parts: :func:`sample_actions`,
:func:`denoising_path`, :func:`q_values` and :func:`find_modes` return arrays and numbers, and :func:`plot_actions`,
:func:`plot_q` and :func:`plot_denoising` draw them.

DIPO may have any actor and any critic. Actions can be sampled from every agent of Stable-Baselines3 with continuous actions,
and Q can be drawn for those that have a critic Q(s, a), such as SAC, TD3 and TQC.

Everywhere in this module an action is a row of numbers in [-1, 1], one for each dimension of the action space, as actor and
critic compute with it; -1 and 1 are the ends of the action space. An observation is what the agent is given: if the
environment normalizes observations, it is the normalized one. Looking at a policy changes nothing: random draws come from a
seed of their own, and PyTorch's generators are left as they were. The figures are not registered with pyplot, so there is
nothing to close; a notebook shows them after ``%matplotlib inline``.

The module needs matplotlib and scikit-learn, which the extra ``plots`` installs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_dipo.actors import GenerativeActor, IterativeActor
from sb3_dipo.checks import check_float, check_int
from sb3_dipo.critics import Critic

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from scipy.stats import entropy  # type: ignore[import-untyped]
    from sklearn.cluster import DBSCAN  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError("sb3_dipo.plots needs matplotlib and scikit-learn: install the extra, 'sb3_dipo[plots]'.") from error

Observation = np.ndarray | dict[str, np.ndarray]

OUTSIDE = "0.7"
"""The color of samples that belong to no mode."""

# ------------------------------------------------------------------------------------------------- samples and numbers


def sample_actions(
    model: BaseAlgorithm, observation: Observation, n_samples: int = 1000, deterministic: bool = False, seed: int = 0
) -> np.ndarray:
    """
    Let the policy act many times in one state, as ``model.predict`` does.

    :param model: an agent with continuous actions
    :param observation: one observation, or one for each action
    :param n_samples: how many actions, at least 1
    :param deterministic: whether to ask for the action that the policy takes without exploring
    :param seed: of the draws
    :return: actions in [-1, 1], (n_samples, action_dim)
    """
    policy = _policy(model)
    batch = _batch(policy, observation, check_int("n_samples", n_samples, 1))
    with _looking(policy, seed):
        actions = policy.scale_action(policy.predict(batch, deterministic=deterministic)[0])
    return np.clip(actions.reshape(n_samples, -1), -1, 1)


def denoising_path(model: BaseAlgorithm, observation: Observation, n_samples: int = 1000, seed: int = 0) -> np.ndarray:
    """
    Follow actions of DIPO's actor from noise to the end: where each of them is before every call of the network, and the
    action that comes out.

    A diffusion or flow actor has one point more than its sampler makes network calls. An actor that makes actions in one go
    (VAE, MLP) has the actions alone. The steps are those of the sampler for acting, which ``policy.set_sampler("behaviour",
    ...)`` changes. If it has ``num_candidates`` above 1, these are candidates, before the critic has chosen.

    :param model: a DIPO agent
    :param observation: one observation, or one for each action
    :param n_samples: how many actions, at least 1
    :param seed: of the draws
    :return: (number of points, n_samples, action_dim); the last point is the actions, in [-1, 1]
    :raises TypeError: if the agent has no generative actor
    """
    policy = _policy(model)
    actor = getattr(policy, "actor", None)
    if not isinstance(actor, GenerativeActor):
        raise TypeError(f"`model` must be a DIPO agent, whose actor can show its steps, not {type(model).__name__}.")
    points: list[th.Tensor] = []
    with _looking(policy, seed):
        batch = _batch(policy, observation, check_int("n_samples", n_samples, 1))
        features = actor.extract_features(policy.obs_to_tensor(batch)[0])
        if isinstance(actor, IterativeActor):
            # What the network is given is where the actions are. Fast paths step aside for a module with a hook.
            hook = actor.network.register_forward_pre_hook(lambda _, given: points.append(given[0].clone()))
            try:
                actions = actor.sample(features, sampler=policy.samplers["behaviour"])
            finally:
                hook.remove()
        else:
            actions = actor.sample(features, sampler=policy.samplers["behaviour"])
    return th.stack([*points, actions]).cpu().numpy()


def q_values(model: BaseAlgorithm, observation: Observation, actions: np.ndarray) -> np.ndarray:
    """
    What the critic thinks of actions. For DIPO this is the critic's ``objective``, which the action gradient climbs. For other
    agents it is the smallest of several Q functions, or the mean of the quantiles.

    :param model: an agent whose policy has a critic Q(s, a)
    :param observation: one observation, or one for each action
    :param actions: in [-1, 1], (n, action_dim)
    :return: (n,)
    :raises TypeError: if the agent has no such critic
    """
    policy, critic = _policy(model), _critic(model)
    with _looking(policy):
        tensor = th.as_tensor(np.asarray(actions), dtype=th.float32, device=policy.device)
        if tensor.dim() != 2 or tensor.shape[1] != _action_dim(policy):
            raise ValueError(f"`actions` must have the shape (n, {_action_dim(policy)}), not {tuple(tensor.shape)}.")
        obs = policy.obs_to_tensor(_batch(policy, observation, len(tensor)))[0]
        values = critic.objective(obs)(tensor) if isinstance(critic, Critic) else critic(obs, tensor)
        if isinstance(values, tuple):
            values = th.cat(values, dim=1).min(dim=1).values
        return values.reshape(len(tensor), -1).mean(dim=1).cpu().numpy()


def evenness(counts: np.ndarray) -> float:
    """
    How evenly something is spread over several ways: the entropy of the shares over its largest value.

    :param counts: how often each way was taken, or its share, (number of ways,)
    :return: 1 if all ways are taken equally often, 0 if only one is taken, or none
    """
    counts = np.asarray(counts)
    return float(entropy(counts, base=len(counts))) if len(counts) > 1 and counts.any() else 0.0


@dataclass(frozen=True)
class Modes:
    """
    The groups that :func:`find_modes` has found, the largest first.

    :param labels: for each action the number of its mode, counted from 0, or -1 outside of all modes, (n,)
    :param centers: the mean action of each mode, (number of modes, action_dim)
    :param shares: the share of the actions that each mode has, (number of modes,)
    """

    labels: np.ndarray
    centers: np.ndarray
    shares: np.ndarray

    @property
    def number(self) -> int:
        """How many modes there are."""
        return len(self.shares)

    @property
    def evenness(self) -> float:
        """1 if all modes are equally large, 0 if there is only one, or none; see :func:`sb3_dipo.plots.evenness`."""
        return evenness(self.shares)

    def __str__(self) -> str:
        if not self.number:
            return "no mode: the actions are spread out"
        shares = ", ".join(f"{share:.0%}" for share in self.shares)
        return f"1 mode ({shares})" if self.number == 1 else f"{self.number} modes ({shares}), evenness {self.evenness:.2f}"


def find_modes(actions: np.ndarray, radius: float = 0.2, min_share: float = 0.1) -> Modes:
    """
    Count the different ways in a sample of actions, by the clustering DBSCAN of scikit-learn.

    The rule: an action is dense if at least ``min_share`` of all actions lie within ``radius`` of it. Dense actions within
    ``radius`` of each other belong to the same mode, and so does everything that a chain of them connects. Another action
    belongs to a mode if it lies within ``radius`` of one of its dense actions; else it is outside of all modes. The distance
    of two actions is the root mean square of their differences over the dimensions, so that the same radius can be used for
    few and for many of them.

    A way that is taken by less than ``min_share`` of the actions is not counted. Actions that are spread out more widely than
    the radius, for example by a policy that has not learned yet, have no mode at all; in one dimension they form one mode,
    because there a neighbourhood is a fifth of the box.

    :param actions: in [-1, 1], (n, action_dim)
    :param radius: of a neighbourhood, above 0; the box of actions is 2 wide
    :param min_share: of all actions that a neighbourhood must have to be dense, above 0, at most 1
    """
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim != 2 or not actions.size:
        raise ValueError(f"`actions` must have the shape (n, action_dim), with at least one action, not {actions.shape}.")
    radius = check_float("radius", radius, open_minimum=True)
    min_share = check_float("min_share", min_share, maximum=1.0, open_minimum=True)
    scaled = actions / np.sqrt(actions.shape[1])
    found = DBSCAN(eps=radius, min_samples=int(np.ceil(min_share * len(actions)))).fit(scaled).labels_
    counts = np.bincount(found[found >= 0])
    order = np.argsort(-counts, kind="stable")
    labels = np.where(found >= 0, np.argsort(order)[found] if len(order) else -1, -1)
    centers = [actions[labels == mode].mean(axis=0) for mode in range(len(order))]
    return Modes(labels, np.array(centers).reshape(-1, actions.shape[1]), counts[order] / len(actions))


# ------------------------------------------------------------------------------------------------- figures


def plot_actions(
    actions: np.ndarray, dims: Sequence[int] | None = None, axes: Axes | None = None, bins: int = 40, **kwargs: Any
) -> Axes:
    """
    Draw how dense actions are over two of their dimensions, or over one. Over two, a cell is as dark as the square root of
    its density is high, so that rare actions are seen beside frequent ones.

    :param actions: in [-1, 1], (n, action_dim), for example of :func:`sample_actions`
    :param dims: one or two dimensions of the action; the first two where None, or the only one
    :param axes: where to draw; the axes of a new figure where None
    :param bins: of the histogram, along each dimension
    :param kwargs: for matplotlib's ``hist2d``, or ``hist`` for one dimension
    :return: the axes; ``axes.figure`` is their figure
    """
    dims = _checked_dims(dims, actions.shape[1])
    axes = axes or _new_axes()
    if len(dims) == 2:
        edges = np.linspace(-1, 1, bins + 1)
        style = {"bins": [edges, edges], "cmap": "Greys", "norm": PowerNorm(0.5), "density": True}
        axes.hist2d(*actions[:, dims].T, **{**style, **kwargs})
    else:
        axes.hist(actions[:, dims[0]], **{"bins": bins, "range": (-1, 1), "density": True, **kwargs})
    return _label(axes, dims, "density")


def plot_q(
    model: BaseAlgorithm,
    observation: Observation,
    dims: Sequence[int] | None = None,
    action: np.ndarray | None = None,
    axes: Axes | None = None,
    points: int = 51,
    **kwargs: Any,
) -> Axes:
    """
    Draw Q(s, a), see :func:`q_values`, over two dimensions of the action, or over one.

    :param model: an agent whose policy has a critic Q(s, a)
    :param observation: one observation
    :param dims: one or two dimensions of the action; the first two where None, or the only one
    :param action: where the other dimensions are held, (action_dim,); the policy's deterministic action where None
    :param axes: where to draw; the axes of a new figure where None
    :param points: along each dimension, at least 2
    :param kwargs: for matplotlib's ``contourf``, or ``plot`` for one dimension
    :return: the axes; ``axes.figure`` is their figure
    """
    action_dim = _action_dim(_policy(model))
    dims = _checked_dims(dims, action_dim)
    if action is None:
        action = sample_actions(model, observation, 1, deterministic=True)[0]
    if np.shape(action) != (action_dim,):
        raise ValueError(f"`action` must have the shape ({action_dim},), not {np.shape(action)}.")
    axes = axes or _new_axes()
    line = np.linspace(-1, 1, check_int("points", points, 2))
    grid = np.meshgrid(*[line] * len(dims))
    actions = np.tile(np.asarray(action, dtype=np.float32), (grid[0].size, 1))
    actions[:, dims] = np.stack([each.ravel() for each in grid], axis=1)
    values = q_values(model, observation, actions).reshape(grid[0].shape)
    if len(dims) == 2:
        drawn = axes.contourf(*grid, values, **{"levels": 20, "cmap": "viridis", **kwargs})
        axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.04)  # as high as square axes
    else:
        axes.plot(line, values, **kwargs)
    return _label(axes, dims, "Q(s, a)")


def plot_denoising(
    path: np.ndarray, dims: Sequence[int] | None = None, axes: Sequence[Axes] | None = None, modes: Modes | None = None
) -> Sequence[Axes]:
    """
    Draw how actions come out of noise, from left to right. Every point has the color of the mode in which it ends, and is
    grey if it ends outside of all modes.

    :param path: of :func:`denoising_path`, (number of points, n, action_dim)
    :param dims: one or two dimensions of the action; the first two where None, or the only one
    :param axes: where to draw: the first gets the noise, the last the actions, those between them points at even distances;
        five of a new figure where None
    :param modes: of the actions; found by :func:`find_modes` where None
    :return: the axes; ``axes[0].figure`` is their figure
    """
    dims = _checked_dims(dims, path.shape[2])
    modes = modes or find_modes(path[-1])
    if axes is None:
        number = min(5, len(path))
        axes = list(Figure(figsize=(2.4 * number, 2.7), layout="constrained").subplots(1, number, squeeze=False)[0])
    steps = np.linspace(0, len(path) - 1, len(axes)).round().astype(int) if len(axes) > 1 else [len(path) - 1]
    limit = max(1.1, float(np.quantile(np.abs(path[..., dims]), 0.995)))
    for each, step in zip(axes, steps, strict=True):
        for mode in range(-1, modes.number):
            own = path[step][modes.labels == mode][:, dims]
            style: dict[str, Any] = dict(color=_color(mode), alpha=0.6)
            if len(dims) == 2:
                each.scatter(own[:, 0], own[:, 1], s=4, linewidths=0, **style)
            else:
                each.hist(own[:, 0], bins=60, range=(-limit, limit), **style)
        if len(dims) == 2:
            each.add_patch(Rectangle((-1, -1), 2, 2, fill=False, linewidth=0.8))
            each.set(aspect="equal", ylim=(-limit, limit))
        end, start = step == len(path) - 1, step == 0
        each.set(xlim=(-limit, limit), xticks=(-1, 1), yticks=(-1, 1) if len(dims) == 2 else ())
        each.set_title("action" if end else "noise" if start else f"step {step} of {len(path) - 1}", fontsize="medium")
    return axes


def plot_policy(
    model: BaseAlgorithm,
    observation: Observation,
    dims: Sequence[int] | None = None,
    n_samples: int = 1000,
    seed: int = 0,
    radius: float = 0.2,
    min_share: float = 0.1,
) -> Figure:
    """
    Draw a policy in one state: above, how its actions come out of noise, if they do so in steps; below, how dense they are and
    beside it Q, with the center of each mode as a dot and the deterministic action as a cross. The title counts the modes.

    :param model: an agent whose policy has a critic Q(s, a)
    :param observation: one observation
    :param dims: one or two dimensions of the action; the first two where None, or the only one
    :param n_samples: how many actions to sample
    :param seed: of the draws
    :param radius: as of :func:`find_modes`
    :param min_share: as of :func:`find_modes`
    """
    policy, _ = _policy(model), _critic(model)
    dims = _checked_dims(dims, _action_dim(policy))
    actions = sample_actions(model, observation, n_samples, seed=seed)
    best = sample_actions(model, observation, 1, deterministic=True)[0]
    modes = find_modes(actions, radius, min_share)
    path = denoising_path(model, observation, n_samples, seed) if isinstance(policy.actor, IterativeActor) else None
    if path is None:
        figure = Figure(figsize=(8, 3.9), layout="constrained")
        below: Any = figure
    else:
        figure = Figure(figsize=(10, 6.6), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.45))
        above, below = halves
        plot_denoising(path, dims, list(above.subplots(1, min(5, len(path)))), find_modes(path[-1], radius, min_share))
    figure.suptitle(str(modes))
    left, right = below.subplots(1, 2)
    plot_actions(actions, dims, left)
    plot_q(model, observation, dims, best, right)
    for axes in (left, right):
        for mode, center in enumerate(modes.centers):
            _mark(axes, dims, center, "o", _color(mode))
        _mark(axes, dims, best, "X", "white")
    return figure


# ------------------------------------------------------------------------------------------------- helpers


def _policy(model: BaseAlgorithm) -> Any:
    box = model.action_space
    if not isinstance(box, spaces.Box) or not box.is_bounded():
        raise TypeError(f"`model` must have a bounded Box of actions, not {box}.")
    return model.policy


def _critic(model: BaseAlgorithm) -> Any:
    critic = getattr(model.policy, "critic", None)
    if critic is None:
        raise TypeError(f"`model` must have a critic Q(s, a), as DIPO, SAC, TD3 and TQC do, not {type(model).__name__}.")
    return critic


def _action_dim(policy: Any) -> int:
    return int(np.prod(policy.action_space.shape))


def _checked_dims(dims: Sequence[int] | None, action_dim: int) -> list[int]:
    if dims is None:
        return list(range(min(2, action_dim)))
    found = [check_int("dims", dim, 0) for dim in dims]
    if len(found) not in (1, 2) or len({*found}) < len(found) or max(found) >= action_dim:
        raise ValueError(f"`dims` must be one or two different dimensions from 0 to {action_dim - 1}, not {dims!r}.")
    return found


def _batch(policy: Any, observation: Observation, number: int) -> Observation:
    """An observation as many times as there are actions; one for each of them is left as it is."""
    if policy.is_vectorized_observation(observation):
        sizes = {len(each) for each in (observation.values() if isinstance(observation, dict) else [observation])}
        if sizes != {number}:
            raise ValueError(f"`observation` must be a single observation, or one for each of the {number} actions.")
        return observation
    if isinstance(observation, dict):
        return {key: np.repeat(np.asarray(each)[None], number, axis=0) for key, each in observation.items()}
    return np.repeat(np.asarray(observation)[None], number, axis=0)


@contextmanager
def _looking(policy: Any, seed: int = 0) -> Iterator[None]:
    """Without gradients, in evaluation mode, with draws of one's own; all is as it was afterwards."""
    on_gpu = policy.device.type == "cuda"
    training = policy.training
    with th.random.fork_rng([policy.device] if on_gpu else []), th.no_grad():
        th.default_generator.manual_seed(seed)
        if on_gpu:
            with th.cuda.device(policy.device):
                th.cuda.manual_seed(seed)
        policy.set_training_mode(False)
        try:
            yield
        finally:
            policy.set_training_mode(training)


def _new_axes() -> Axes:
    axes: Axes = Figure(figsize=(4, 3.6), layout="constrained").subplots()
    return axes


def _label(axes: Axes, dims: list[int], what: str) -> Axes:
    """Name what is drawn and over what, on the box of actions."""
    axes.set(xlim=(-1, 1), xlabel=f"action, dimension {dims[0]}")
    if len(dims) == 2:
        axes.set(ylim=(-1, 1), ylabel=f"action, dimension {dims[1]}", aspect="equal", title=what)
    else:
        axes.set(ylabel=what)
    return axes


def _color(mode: int) -> str:
    return f"C{mode}" if mode >= 0 else OUTSIDE


def _mark(axes: Axes, dims: list[int], action: np.ndarray, marker: str, color: str) -> None:
    if len(dims) == 2:
        axes.plot(*action[dims], marker, color=color, markeredgecolor="white" if marker == "o" else "black", clip_on=False)
    else:
        axes.axvline(action[dims[0]], color="black" if marker == "X" else color, linestyle=":" if marker == "X" else "-")
