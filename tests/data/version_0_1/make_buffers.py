"""Made the two buffers that lie beside it with version 0.1.0 (commit 8696dff): one on the device, and an empty one of HER."""

import pathlib
import sys

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dipo import DIPODeviceReplayBuffer, DIPOHerReplayBuffer  # type: ignore[attr-defined, unused-ignore]

out = pathlib.Path(sys.argv[1])
box = spaces.Box(-1.0, 1.0, (2,))
on_device = DIPODeviceReplayBuffer(10, box, box, device="cpu", n_envs=2)
for number in range(3):
    values = np.full((2, 2), number / 4, np.float32)
    on_device.add(values, values + 0.125, -values, np.full(2, number), np.array([False, True]), [{}, {}])
on_device.update_improved(np.array([1]), np.array([0]), np.full((1, 2), 0.5))
save_to_pkl(out / "device_replay_buffer.pkl", on_device)

env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True)] * 2)
empty = DIPOHerReplayBuffer(20, env.observation_space, env.action_space, env, device="cpu", n_envs=2, copy_info_dict=True)
save_to_pkl(out / "empty_her_replay_buffer.pkl", empty)
