"""A MuJoCo task whose state can be taken and given back."""

import pickle
from typing import Any

import gymnasium as gym
import mujoco
from gymnasium.envs.mujoco import MujocoEnv


class MujocoState(gym.Wrapper[Any, Any, Any, Any]):
    """
    Gives Gymnasium's MuJoCo tasks ``get_env_state()`` and ``set_env_state(state)``, so that a running episode continues from
    a checkpoint (:func:`sb3_dipo.save_checkpoint`) to the bit. It may be put inside or outside other wrappers, whose states
    are saved apart from it.

    A state holds all of MuJoCo's data, about 700 kB. Positions and velocities alone are not enough: they leave out what the
    solver starts from, and what some observations read from the step before.

    :param env: a task of ``gymnasium.envs.mujoco``, or one that is made in the same way
    :raises ValueError: if it is another environment
    """

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        if not isinstance(env.unwrapped, MujocoEnv):
            raise ValueError(f"`env` must be one of Gymnasium's MuJoCo environments, not {env.unwrapped}.")
        self.task = env.unwrapped

    def get_env_state(self) -> tuple[bytes, dict[str, Any]]:
        """Return MuJoCo's data, pickled, and the state of the environment's random generator."""
        return pickle.dumps(self.task.data), dict(self.task.np_random.bit_generator.state)

    def set_env_state(self, state: tuple[bytes, dict[str, Any]]) -> None:
        """Go on from what ``get_env_state`` returned."""
        data, self.task.np_random.bit_generator.state = pickle.loads(state[0]), state[1]
        mujoco.mj_copyData(self.task.data, self.task.model, data)
