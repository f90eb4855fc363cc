"""The paper's multi-goal task (Section 3.2, Appendix G)."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_dipo.checks import check_choice, check_float, check_int

LIMIT = 7.0
GOALS = np.array([[0.0, 5.0], [0.0, -5.0], [5.0, 0.0], [-5.0, 0.0]])


class MultiGoalEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point on the plane, four goals, and nothing to tell which of them is best.

    The point is at x in [-7, 7]^2, which is what is observed (float32, shape (2,)); an action a in [-1, 1]^2 moves it to
    clip(x + a, -7, 7). The goals are at (0, 5), (0, -5), (5, 0) and (-5, 0). An episode starts at N(0, ``init_std``^2 I), and
    ends when the point comes within ``goal_radius`` of a goal. The reward is that of Appendix G,

        - action_cost ||a||^2 - distance_cost min_g ||x' - g||^2 + goal_reward [a goal is reached],

    with x' where the point has moved to. The task is that of Haarnoja et al. (2017, arXiv 1702.08165), whose action cost is
    30. ``info`` has ``is_success``, and ``goal``, the index of the goal that was reached or -1.

    Gymnasium makes it as ``sb3_dipo/MultiGoal-v0`` where this package has been imported, else as
    ``sb3_dipo:sb3_dipo/MultiGoal-v0``.

    :param action_cost: weight of the action's squared length, at least 0
    :param distance_cost: weight of the squared distance to the nearest goal, at least 0
    :param goal_reward: reward for reaching a goal
    :param goal_radius: distance at which a goal is reached, above 0
    :param init_std: standard deviation of the start in each coordinate, at least 0
    :param time_limit: steps after which an episode is truncated, at least 1; Gymnasium's ``max_episode_steps`` can only
        shorten it
    :param render_mode: None or ``"rgb_array"``: an image of shape (400, 400, 3), with the path so far
    :raises ValueError: if a parameter is out of its range
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (as every environment has it)

    def __init__(
        self,
        action_cost: float = 1.0,
        distance_cost: float = 1.0,
        goal_reward: float = 10.0,
        goal_radius: float = 1.0,
        init_std: float = 0.1,
        time_limit: int = 30,
        render_mode: str | None = None,
    ):
        self.action_cost = check_float("action_cost", action_cost, 0.0)
        self.distance_cost = check_float("distance_cost", distance_cost, 0.0)
        self.goal_reward = check_float("goal_reward", goal_reward, -math.inf)
        self.goal_radius = check_float("goal_radius", goal_radius, open_minimum=True)
        self.init_std = check_float("init_std", init_std, 0.0)
        self.time_limit = check_int("time_limit", time_limit, 1)
        if render_mode is not None:
            check_choice("render_mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.path = [np.zeros(2)]  # of this episode, from its start to where the point is

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Start an episode.

        :param seed: of the starts from here on
        :param options: ``{"position": (x, y)}`` starts there, and not at random
        """
        super().reset(seed=seed)
        start = (options or {}).get("position")
        position = self.np_random.normal(0.0, self.init_std, 2) if start is None else np.asarray(start, dtype=np.float64)
        if position.shape != (2,):
            raise ValueError(f"`options['position']` must be two numbers, not {start!r}.")
        self.path = [np.clip(position, -LIMIT, LIMIT)]
        return self.path[-1].astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Move the point.

        :param action: shape (2,), clipped to [-1, 1]
        """
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        position = np.clip(self.path[-1] + action, -LIMIT, LIMIT)
        self.path.append(position)
        squared = np.square(GOALS - position).sum(axis=1)
        nearest = int(squared.argmin())
        reached = bool(squared[nearest] <= self.goal_radius**2)
        reward = (
            -self.action_cost * np.square(action).sum() - self.distance_cost * squared[nearest] + self.goal_reward * reached
        )
        info = {"is_success": reached, "goal": nearest if reached else -1}
        truncated = not reached and len(self.path) > self.time_limit
        return position.astype(np.float32), float(reward), reached, truncated, info

    def render(self) -> np.ndarray | None:
        """The plane, the goals, and the path of this episode: uint8, shape (400, 400, 3)."""
        if self.render_mode is None:
            return None
        # here, as only who renders needs it
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle

        canvas = FigureCanvasAgg(Figure(figsize=(4, 4), dpi=100))
        axes = canvas.figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[])
        for x, y in GOALS:
            axes.add_patch(Circle((x, y), self.goal_radius, color="tab:green", alpha=0.4))
        axes.plot(*np.transpose(self.path), color="tab:blue", marker=".")
        axes.plot(*self.path[-1], color="tab:red", marker="o")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def get_env_state(self) -> Any:
        """The path of the running episode, and the state of the random generator: see :func:`sb3_dipo.save_checkpoint`."""
        return np.stack(self.path), self.np_random.bit_generator.state

    def set_env_state(self, state: Any) -> None:
        """Go on from what ``get_env_state`` returned."""
        path, self.np_random.bit_generator.state = state
        self.path = list(path)
