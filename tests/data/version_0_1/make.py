"""Made what lies beside it with version 0.1.0 (commit 8696dff): an agent, its policy, replay buffer and checkpoint."""

import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import torch as th

from sb3_dipo import DIPO, save_checkpoint

out = pathlib.Path(sys.argv[1])
th.set_num_threads(1)
m: Any = DIPO(
    "MlpPolicy",
    "Pendulum-v1",
    seed=0,
    device="cpu",
    learning_starts=20,
    batch_size=8,
    buffer_size=60,
    action_gradient_steps=2,
    policy_kwargs=dict(net_arch=[8, 8], num_train_timesteps=4),
)
m.policy.set_sampler("behaviour", noise_scale=0.5)
m.policy.set_sampler("evaluation", solver="ddim", num_inference_steps=2)
m.learn(40)
m.save(out / "agent.zip")
m.save_replay_buffer(out / "replay_buffer.pkl")
m.policy.save(str(out / "policy.pth"))
shutil.rmtree(out / "checkpoint", ignore_errors=True)
save_checkpoint(m, out / "checkpoint")
obs = np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3)
act, _ = m.predict(obs, deterministic=True)
np.savez(out / "expected.npz", obs=obs, actions=act, improved=m.replay_buffer.improved_actions, taken=m.replay_buffer.actions)
