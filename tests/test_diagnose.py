"""What `diagnose.py` says of agents of which everything is known."""

import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from processes import PAPER, Scripts
from stable_baselines3 import SAC

from sb3_dipo import DIPO


class Ones(gym.Env[np.ndarray, np.ndarray]):
    """A reward of 1 in each step."""

    def __init__(self, length: int, ends: bool):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,))
        self.length, self.ends, self.now = length, ends, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.now = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.now += 1
        over = self.now == self.length
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, over and self.ends, over and not self.ends, {}


@pytest.fixture(scope="module")
def script() -> Any:
    return importlib.import_module("diagnose")


def test_discounted(script: Any) -> None:
    np.testing.assert_allclose(script.discounted(np.array([1.0, 0.0, 4.0]), 0.5), [2, 2, 4])


@pytest.mark.parametrize("ends, expected", [(True, (1 + 1.9 + 2.71) / 3), (False, 10.0)])
def test_q_beside_what_follows(script: Any, ends: bool, expected: float) -> None:
    """Where a time limit ends the episode, Q looks beyond it, and the last states say nothing."""
    env = Ones(3 if ends else 200, ends)
    small = dict(net_arch=[8], num_train_timesteps=3)
    model = DIPO(
        "MlpPolicy", env, gamma=0.9, seed=0, device="cpu", policy_kwargs=small, action_lr=0.5, action_gradient_steps=1
    )
    networks: Any = model.critic.q_networks
    with th.no_grad():
        for network in networks:
            network[-1].weight.zero_()
            network[-1].bias.fill_(7.0)
    found = script.diagnose(model, script.play(model, env, 2))
    assert found["Q"] == pytest.approx(7) and found["got"] == pytest.approx(expected, rel=0 if ends else 0.01)
    assert (found["episodes"], found["length"], found["return"]) == (2, env.length, env.length)
    assert found["shift"] == found["gain"] == 0  # nothing to climb
    assert 0 < found["spread"] < 2 and 0 <= found["at edge"] <= 1

    with th.no_grad():  # Q grows with the first component of the action alone, which all reach 1 then
        for network in networks:
            network[0].weight.zero_()
            network[0].weight[0, 3] = 5.0
            network[0].bias[0] = 10.0
            network[-1].weight[0, 0] = 1.0
    model.action_lr = 3.0
    played = script.play(model, env, 2)
    climbed = script.diagnose(model, played)
    first = np.concatenate([each["actions"] for each in played])[:, 0]
    assert climbed["shift"] == pytest.approx((1 - first).mean() / 2, abs=1e-5)
    assert climbed["gain"] == pytest.approx(5 * (1 - first).mean(), rel=1e-4)
    model.max_action_shift = 0.1
    assert script.diagnose(model, played)["shift"] == pytest.approx(np.minimum(1 - first, 0.1).mean() / 2, abs=1e-5)
    model.gamma = 1.0  # Q would look beyond every time limit
    assert ("got" in script.diagnose(model, played)) == ends


@pytest.mark.slow
def test_agents_of_the_zoo(scripts: Scripts, tmp_path: Path) -> None:
    for cls, name in ((DIPO, "dipo"), (SAC, "sac")):
        folder = tmp_path / name / "Hopper-v5_1"
        folder.mkdir(parents=True)
        cls("MlpPolicy", "Hopper-v5", seed=0, device="cpu", policy_kwargs=dict(net_arch=[8])).save(folder / "Hopper-v5.zip")
    files = [f"{name}/Hopper-v5_1/Hopper-v5.zip" for name in ("dipo", "sac")]
    printed = scripts.run(PAPER / "diagnose.py", *files, "--episodes", "2", cwd=tmp_path)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| dipo") or line.startswith("| sac")]
    assert len(rows) == 2 and all(len(row) == 10 for row in rows)
    assert all(float(cell) == float(cell) for row in rows for cell in row[1:8])
    assert {path.name for path in tmp_path.iterdir()} == {"dipo", "sac"}

    for bad, message in (("gone/Hopper-v5_1/Hopper-v5.zip", "agents must be files like dipo/"), (files[0], "normalized")):
        (tmp_path / "dipo" / "Hopper-v5_1" / "vecnormalize.pkl").touch()
        with pytest.raises(AssertionError, match=message):
            scripts.run(PAPER / "diagnose.py", bad, cwd=tmp_path)
