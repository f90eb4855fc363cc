"""The script of the four goals goes on where it was killed, to the same files, and measures what it says."""

import importlib
import json
import signal
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch as th
import yaml
from processes import PAPER, Scripts, until
from stable_baselines3 import PPO

from sb3_dipo import RECOMMENDED

SCRIPT = PAPER / "multi_goal.py"


@pytest.fixture(scope="module")
def multi_goal() -> Any:
    return importlib.import_module("multi_goal")


def rows_of(csv: str, agent: str) -> str:
    head, *rows = csv.splitlines(keepends=True)
    return "".join([head, *(row for row in rows if row.startswith(f"{agent},"))])


@pytest.mark.slow
def test_it_goes_on_after_kill_9_and_trains_nothing_again(scripts: Scripts, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quick = ("--quick", "--learning-starts", "950")  # so that there is a checkpoint, after 1,000 steps
    printed = scripts.run(SCRIPT, *quick, "--out", "whole", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}
    agents = ("dipo", "sac", "td3", "ppo")
    drawn = {"policies.png", "evenness.png", "evenness.csv", "multi_goal.md", *(f"{agent}.png" for agent in agents)}
    assert {path.name for path in whole.iterdir()} - {"warnings.log"} == drawn | {"sb3_dipo-MultiGoal-v0"}
    for path in whole.glob("*.png"):
        assert 5_000 < path.stat().st_size < 200 * 1024, path
    rows = pd.read_csv(whole / "evenness.csv")
    assert list(rows.groupby(["agent", "iteration", "start"]).size()) == [1] * 33  # PPO has no Q to climb
    assert sorted(set(rows.iteration)) == [100, 200, 300]
    np.testing.assert_allclose(rows[["up", "down", "right", "left", "none"]].sum(axis=1), 1, atol=3e-4)
    np.testing.assert_allclose(rows["rarest"], rows[["up", "down", "right", "left"]].min(axis=1))
    assert all(f"| {name} | origin | 1 |" in printed for name in ("DIPO", "SAC", "TD3", "PPO"))

    # Killed between two of DIPO's snapshots
    process = scripts.start(SCRIPT, *quick, "--algorithms", "dipo", "--out", "cut", cwd=tmp_path)
    until(lambda: any(cut.rglob("manifest.json")) and any(cut.rglob("snapshots/1050.zip")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not scripts.left())  # the training ends with what started it
    assert not any(cut.rglob("finished.json")) and not (cut / "evenness.csv").exists()
    scripts.run(SCRIPT, *quick, "--algorithms", "dipo", "--out", "cut", cwd=tmp_path)
    assert "Going on after 1000 steps" in next(cut.rglob("log.txt")).read_text()
    assert (cut / "dipo.png").read_bytes() == (whole / "dipo.png").read_bytes()
    assert (cut / "evenness.csv").read_text() == rows_of((whole / "evenness.csv").read_text(), "dipo")

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.zip")}
    files = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    assert len(before) == 4 * (3 + 1)  # snapshots, and the zoo's
    assert scripts.run(SCRIPT, *quick, "--out", "whole", cwd=tmp_path) == printed
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.zip")}
    assert files == {path: path.read_bytes() for path in files}

    process = scripts.start(SCRIPT, "--iterations", "500", "--seeds", "0", "--out", "whole", cwd=tmp_path)
    assert "with other settings" in process.communicate()[1] and process.returncode == 1


def test_agents_have_the_settings_that_the_figures_were_made_with(
    multi_goal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's, but K = 20, after 1,000 random steps; and what a variant is about."""
    claimed: dict[str, Any] = {}

    def claim(runs: list[Any], args: Any) -> Any:
        claimed.update({run.name: run for run in runs})
        raise SystemExit

    monkeypatch.setattr(multi_goal, "train_or_exit", claim)
    names = list(multi_goal.AGENTS)
    monkeypatch.setattr("sys.argv", ["multi_goal.py", "--seeds", "0", "--algorithms", *names, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        multi_goal.main()
    paper = yaml.safe_load((PAPER.parents[1] / "hyperparams" / "dipo_paper.yml").read_text())["default"]
    dipo = claimed["dipo"].settings
    k20 = paper["policy_kwargs"].replace("num_train_timesteps=100", "num_train_timesteps=20")
    assert dipo == {**paper, "policy_kwargs": k20, "learning_starts": 1_000, "n_timesteps": 11_000, "buffer_size": 11_000}
    for name, run in claimed.items():
        starts = 10_000 if name == "dipo-10,000-random" else 1_000
        assert run.snapshots == tuple(range(starts + 1_000, starts + 10_001, 1_000)) and run.steps == starts + 10_000
        assert run.settings.get("learning_starts", starts) == starts and run.eval_freq == 0
    changed = {
        name: {key: value for key, value in run.settings.items() if dipo.get(key) != value}
        for name, run in claimed.items()
        if name.startswith("dipo-")
    }
    assert changed.pop("dipo-10,000-random").keys() == {"learning_starts", "n_timesteps", "buffer_size"}
    assert json.loads(json.dumps(changed)) == {
        "dipo-no-write-back": {"persist_improved_actions": False},
        "dipo-long-steps": {"action_lr": 0.12, "action_gradient_steps": 5},
        "dipo-noise-0.5": {"noise_type": "normal", "noise_std": 0.5},
        "dipo-noise-1": {"noise_type": "normal", "noise_std": 1.0},
        "dipo-flow": {"policy_kwargs": {"actor": "flow"}},
        "dipo-flow-quantile": {"policy_kwargs": {"actor": "flow", "critic": "quantile", "layer_norm": True}},
        "dipo-recommended": RECOMMENDED,
        "dipo-candidates": {
            "policy_kwargs": {"num_train_timesteps": 20, "samplers": {"behaviour": {"num_candidates": 4}}},
        },
    }


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
    from sb3_dipo import DIPO

    states = np.array([[1.0, 2.0], [-3.0, 4.0]])
    model = DIPO("MlpPolicy", multi_goal.ENV, policy_kwargs=dict(net_arch=[8], num_train_timesteps=3), seed=0, device="cpu")
    observations = th.tensor(states, dtype=th.float32)
    action = th.as_tensor(model.predict(states.astype(np.float32), deterministic=True)[0])
    both: Any = model.policy.critic(observations, action)
    np.testing.assert_allclose(multi_goal.values(model, states), th.minimum(*both).detach().numpy()[:, 0], rtol=1e-5)
    ppo: Any = PPO("MlpPolicy", multi_goal.ENV, n_steps=8, batch_size=8, seed=0, device="cpu")
    np.testing.assert_allclose(multi_goal.values(ppo, states), ppo.policy.predict_values(observations).detach().numpy()[:, 0])
