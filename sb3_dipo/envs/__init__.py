"""Environments: the paper's multi-goal task, and a wrapper with which MuJoCo tasks continue exactly from a checkpoint."""

from sb3_dipo.envs.mujoco_state import MujocoState
from sb3_dipo.envs.multi_goal import MultiGoalEnv

__all__ = ["MujocoState", "MultiGoalEnv"]
