"""Experiments go on where they were killed, to the same files, and measure what they say."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch as th
from helpers import EXAMPLES, finish, start_example
from stable_baselines3 import PPO


@pytest.fixture(scope="module")
def multi_goal() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import multi_goal

        yield multi_goal
        for name in ("multi_goal", "multi_goal_figures", "experiments"):
            del sys.modules[name]


def start(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    return start_example("multi_goal.py", *arguments, cwd=cwd)


@pytest.mark.slow
def test_multi_goal_and_again_after_kill_9(tmp_path: Path) -> None:
    printed = finish(start("--quick", "--out", "whole", cwd=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}
    agents, drawn = {"dipo", "sac", "td3", "ppo"}, {"policies.png", "evenness.png", "evenness.csv", "multi_goal.md"}
    written = {path.name for path in (tmp_path / "whole").iterdir()} - {"warnings.log"}
    assert written == agents | drawn | {f"{agent}.png" for agent in agents}
    for path in (tmp_path / "whole").glob("*.png"):
        assert 5_000 < path.stat().st_size < 200 * 1024, path
    rows = pd.read_csv(tmp_path / "whole" / "evenness.csv")
    assert list(rows.groupby(["agent", "iteration", "start"]).size()) == [1] * 33  # PPO has no Q to climb
    np.testing.assert_allclose(rows[["up", "down", "right", "left", "none"]].sum(axis=1), 1, atol=3e-4)
    np.testing.assert_allclose(rows["rarest"], rows[["up", "down", "right", "left"]].min(axis=1))
    assert all(f"| {name} | origin | 1 |" in printed for name in ("DIPO", "SAC", "TD3", "PPO"))

    # Killed between two of DIPO's snapshots, then with PPO whole and SAC begun.
    few = ("--quick", "--algorithms", "dipo", "ppo", "sac", "--out", "cut")
    for snapshot in ("dipo/seed0/200.zip", "sac/seed0/200.zip"):
        process = start(*few, cwd=tmp_path)
        while not (tmp_path / "cut" / snapshot).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "cut" / "evenness.csv").exists()
    finish(start(*few, cwd=tmp_path))
    for name in ("dipo", "ppo", "sac"):
        for file in (f"{name}/seed0/evenness.csv", f"{name}.png"):
            assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*.zip")}
    files = {path: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.is_file()}
    assert finish(start("--quick", "--out", "whole", cwd=tmp_path)) == printed
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*.zip")}  # nothing trained again
    assert files == {path: path.read_bytes() for path in files}

    process = start("--iterations", "500", "--seeds", "0", "--out", "whole", cwd=tmp_path)
    assert "with other settings" in process.communicate()[1] and process.returncode == 1


def test_a_cut_training_goes_on_from_its_last_checkpoint(multi_goal: ModuleType, tmp_path: Path) -> None:
    from tqdm import tqdm

    class Killed(Exception):
        pass

    class Bar(tqdm):
        """Kills the training at a number of steps."""

        at, moved, first = 10_000, 0, 0

        def update(self, n: float | None = 1) -> bool | None:
            self.moved += int(n or 0)
            self.first = self.first or self.moved
            if self.moved >= self.at:
                raise Killed
            return None

    def weights(training: Any) -> th.Tensor:
        return th.cat([parameter.flatten() for parameter in training.agent(2_200).policy.parameters()])

    tiny = dict(policy_kwargs=dict(net_arch=[8], num_train_timesteps=3), action_gradient_steps=2)
    settings = ("dipo", multi_goal.ENV, 4, (1_050, 2_200), 1_000, tiny)
    whole, cut = (multi_goal.Training(tmp_path / name, *settings) for name in ("whole", "cut"))
    whole.train(Bar(disable=True))
    killed = Bar(disable=True)
    killed.at = 1_500
    with pytest.raises(Killed):
        cut.train(killed)
    assert cut.reached == 1_050 and (cut.folder / "exact").is_dir()
    bar = Bar(disable=True)
    cut.train(bar)
    assert bar.first == 1_000 and bar.moved == 2_200  # it did not start again
    assert not (cut.folder / "exact").exists()
    assert th.equal(weights(whole), weights(cut))


def test_evenness_by_hand(multi_goal: ModuleType) -> None:
    shares, even = multi_goal.evenness(np.array([0, 0, 1, 1, 2, 2, 3, 3, -1, -1]))
    np.testing.assert_allclose(shares, 0.2)
    assert even == pytest.approx(1)
    shares, even = multi_goal.evenness(np.array([2, 2, 1, 1]))
    np.testing.assert_allclose(shares, [0, 0.5, 0.5, 0])
    assert even == pytest.approx(0.5)
    assert multi_goal.evenness(np.array([3, 3]))[1] == 0
    assert multi_goal.evenness(np.array([-1, -1]))[1] == 0


class Compass:
    """Goes to the goal that the number of its row, or its place, tells."""

    def predict(self, observations: np.ndarray, deterministic: bool, **_: Any) -> tuple[np.ndarray, None]:
        rows = np.arange(len(observations)) % 5
        ways = np.array([[0, 1], [0, -1], [1, 0], [-1, 0], [0, 0]], np.float32)
        return ways[rows], None


def test_rollouts_tell_where_each_ended(multi_goal: ModuleType) -> None:
    for begin in ("origin", "spread"):
        goals, returns = multi_goal.rollouts(Compass(), begin)
        assert np.unique(goals, return_counts=True)[1].tolist() == [80] * 5
        if begin == "origin":  # 1, 2, 3, 4: from 16 + 9 + 4 + 1 to the goal, four moves, and the prize
            np.testing.assert_allclose(returns, np.where(goals < 0, -25 * 30, -30 - 4 + 10), rtol=1e-5)
        else:
            assert len(np.unique(returns)) == 400 and (returns[goals < 0] != -750).all()


def test_climbs_end_where_q_is_highest(multi_goal: ModuleType) -> None:
    """Q has a top at each of (0.8, 0), (0, -0.8) and (0.6, 0.6), which is between two goals."""

    def critic(observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        tops = th.tensor([[0.8, 0.0], [0.0, -0.8], [0.6, 0.6]])
        q = -(actions[:, None] - tops).square().sum(-1).min(dim=1, keepdim=True).values
        return q, q + observations.abs().sum(dim=1, keepdim=True) + 2 * (actions[:, :1] + 1)  # above, and higher to the right

    th.manual_seed(0)
    ends = multi_goal.climbs(SimpleNamespace(policy=SimpleNamespace(critic=critic), device="cpu"))
    x, y = (2 * th.rand(400, 2, generator=th.manual_seed(0)) - 1).numpy().T
    distances = np.stack([(x - 0.8) ** 2 + y**2, x**2 + (y + 0.8) ** 2, (x - 0.6) ** 2 + (y - 0.6) ** 2])
    np.testing.assert_array_equal(ends, np.array([2, 1, -1])[distances.argmin(axis=0)])


def test_surface_is_the_smaller_critic_at_the_policys_action(multi_goal: ModuleType) -> None:
    from multi_goal_figures import values

    from sb3_dipo import DIPO

    states = np.array([[1.0, 2.0], [-3.0, 4.0]])
    model = DIPO("MlpPolicy", multi_goal.ENV, policy_kwargs=dict(net_arch=[8], num_train_timesteps=3), seed=0, device="cpu")
    observations = th.tensor(states, dtype=th.float32)
    action = th.as_tensor(model.predict(states.astype(np.float32), deterministic=True)[0])
    both: Any = model.policy.critic(observations, action)
    np.testing.assert_allclose(values(model, states), th.minimum(*both).detach().numpy()[:, 0])
    ppo: Any = PPO("MlpPolicy", multi_goal.ENV, n_steps=8, batch_size=8, seed=0, device="cpu")
    np.testing.assert_allclose(values(ppo, states), ppo.policy.predict_values(observations).detach().numpy()[:, 0])
