"""DIPO, online reinforcement learning with a diffusion policy, on Stable-Baselines3."""

import gymnasium

from sb3_dipo.action_gradient import improve_actions
from sb3_dipo.actors import DiffusionActor, FlowActor, MLPActor, VAEActor
from sb3_dipo.buffers import DIPODictReplayBuffer, DIPOHerReplayBuffer, DIPONStepReplayBuffer, DIPOReplayBuffer
from sb3_dipo.checkpoint import ExactCheckpointCallback, load_checkpoint, save_checkpoint
from sb3_dipo.critics import EnsembleCritic, QuantileCritic
from sb3_dipo.dipo import DIPO
from sb3_dipo.guard import NonFiniteLossError
from sb3_dipo.policies import CnnPolicy, DIPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_dipo.recommended import RECOMMENDED
from sb3_dipo.samplers import Sampler

__version__ = "0.2.0"

__all__ = [
    "DIPO",
    "RECOMMENDED",
    "CnnPolicy",
    "DIPODictReplayBuffer",
    "DIPOHerReplayBuffer",
    "DIPONStepReplayBuffer",
    "DIPOPolicy",
    "DIPOReplayBuffer",
    "DiffusionActor",
    "EnsembleCritic",
    "ExactCheckpointCallback",
    "FlowActor",
    "MLPActor",
    "MlpPolicy",
    "MultiInputPolicy",
    "NonFiniteLossError",
    "QuantileCritic",
    "Sampler",
    "VAEActor",
    "__version__",
    "improve_actions",
    "load_checkpoint",
    "save_checkpoint",
]

gymnasium.register("sb3_dipo/MultiGoal-v0", "sb3_dipo.envs.multi_goal:MultiGoalEnv")
