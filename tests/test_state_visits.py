"""State visits are those of the same episodes for all, and the area does not depend on how many states there are."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from processes import PAPER, Scripts
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.noise import NormalActionNoise

from sb3_dipo import DIPO

ENV = "Hopper-v5"  # untrained, it falls soon
FILES = {f"{ENV}.csv", f"{ENV}.md", f"{ENV}.png"}


@pytest.fixture(scope="module")
def script() -> Any:
    return importlib.import_module("state_visits")


@pytest.mark.slow
def test_quick_and_once_more(scripts: Scripts, tmp_path: Path) -> None:
    quick = ("--quick", "--envs", ENV, "--algorithms", "dipo_paper", "td3", "--out", "here")
    printed = scripts.run(PAPER / "state_visits.py", *quick, cwd=tmp_path)
    out = tmp_path / "here"
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    assert {path.name for path in out.iterdir()} - {"warnings.log"} == FILES | {ENV}
    assert 10_000 < (out / f"{ENV}.png").stat().st_size < 200 * 1024
    table = pd.read_csv(out / f"{ENV}.csv")
    assert list(table.algorithm) == ["dipo_paper"] * 2 + ["td3"] * 2
    assert list(table.step) == [200, 400] * 2
    assert (table.drawn > 50).all() and (table.drawn <= 200).all() and (table.visited >= table.drawn).all()
    for plane in ("tsne", "pca"):
        assert (table[plane] > 0).all() and (table[f"{plane}_so_far"] >= table[plane]).all()
        assert (table[f"{plane}_so_far"] == table[plane])[::2].all()
    first, last = table.iloc[0], table.iloc[1]
    areas = (first.tsne, last.tsne, last.tsne_so_far, first.pca, last.pca, last.pca_so_far)
    cells = [f"{one.mean_return:,.0f}" for one in (first, last)] + [f"{share:.1%}" for share in areas]
    assert f"| DIPO, paper's setting | {' | '.join(cells)} |" in (out / f"{ENV}.md").read_text()
    assert f"`python examples/paper/state_visits.py {' '.join(quick)}`" in printed

    kept = [*out.rglob("snapshots/*.zip"), *out.rglob("visits-*.npz")]
    assert len(kept) == 8
    times = {path: path.stat().st_mtime_ns for path in kept}
    content = {name: (out / name).read_bytes() for name in FILES}
    scripts.run(PAPER / "state_visits.py", *quick, cwd=tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in kept}  # nothing trained or played again
    assert content == {name: (out / name).read_bytes() for name in FILES}


def test_area_of_known_points(script: Any) -> None:
    at = (np.arange(25) + 0.5) / 25
    full = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
    left, right = full[full[:, 0] < 0.4], full[full[:, 0] > 0.4]
    assert script.area([full], 625) == pytest.approx(1)
    assert script.area([left], 250) == pytest.approx(0.4)
    assert script.area([np.concatenate([left, left])], 500) == pytest.approx(0.4)
    assert script.area([left, right[:250]], 250) == pytest.approx(0.8)
    assert script.area([left, left], 250) == pytest.approx(0.4)
    assert script.area([np.full((50, 2), 1.0), np.zeros((50, 2))], 50) == pytest.approx(2 / 625)  # corners are inside


def test_area_does_not_depend_on_how_many_points_there_are(script: Any) -> None:
    rng = np.random.default_rng(0)
    many = rng.beta(2, 2, (5_000, 2))
    shares = [script.area([many[:number]], 100) for number in (200, 1_000, 5_000)]
    assert max(shares) / min(shares) < 1.05
    assert script.area([many[:1_000]], 1_000) > 3 * shares[1]
    # what it stands for: the mean over draws
    groups = [many[:300], many[300:400]]
    draws = [np.concatenate([rng.choice(group, 60, replace=False) for group in groups]) for _ in range(400)]
    occupied = [len({tuple(cell) for cell in (25 * draw).astype(int)}) / 625 for draw in draws]
    assert script.area(groups, 60) == pytest.approx(np.mean(occupied), rel=0.01)


def play(model: Any) -> tuple[list[np.ndarray], list[float]]:
    """One episode after the other: the states of each, and the returns."""
    states, returns = [], []
    for seed in range(1_000, 1_010):
        env = gym.make(ENV)
        seen, rewards, done = [env.reset(seed=seed)[0]], [], False
        while not done:
            state, reward, terminated, truncated, _ = env.step(model.predict(seen[-1][None], deterministic=False)[0][0])
            done = terminated or truncated
            seen.append(state)
            rewards.append(float(reward))
        states.append(np.array(seen[:-1]))
        returns.append(sum(rewards))
    return states, returns


def test_visits(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All algorithms start from the same states, each episode counts to its end, and TD3 has its noise."""
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes
    small: dict[str, Any] = dict(env=ENV, seed=0, device="cpu")
    noise = NormalActionNoise(np.zeros(3), np.full(3, 0.1))
    agents = dict(
        dipo=DIPO("MlpPolicy", policy_kwargs=dict(net_arch=[8], num_train_timesteps=3), **small),
        sac=SAC("MlpPolicy", policy_kwargs=dict(net_arch=[8]), **small),
        td3=TD3("MlpPolicy", policy_kwargs=dict(net_arch=[8]), action_noise=noise, **small),
        ppo=PPO("MlpPolicy", policy_kwargs=dict(net_arch=[8]), n_steps=64, **small),
    )

    def run(name: str, model: Any) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        return SimpleNamespace(results=tmp_path / name, env=ENV, agent=lambda step: model)

    found = {}
    for name, model in agents.items():
        found[name] = script.visits(run(name, model), 1)
        again, kept = script.visits(run(name, model), 2), script.visits(run(name, None), 1)  # which needs no agent any more
        for one in (again, kept):
            np.testing.assert_array_equal(one[0], found[name][0])
            np.testing.assert_array_equal(one[1], found[name][1])
    starts = [states[:10] for states, _ in found.values()]
    assert all((one == starts[0]).all() for one in starts) and len(np.unique(starts[0], axis=0)) == 10
    assert len({returns.mean() for _, returns in found.values()}) == 4

    td3: Any = agents["td3"]
    episodes, returns = play(td3)
    assert not np.allclose(found["td3"][1], returns, atol=1e-2)
    td3.action_noise = NormalActionNoise(np.zeros(3), np.zeros(3))
    still: Any = SimpleNamespace(predict=lambda states, **_: (np.zeros((len(states), 3)), None))
    for name, model in (("quiet", td3), ("still", still)):
        visited, gained = script.visits(run(name, model), 1)
        episodes, returns = play(model)
        together = [episode[step] for step in range(1_000) for episode in episodes if step < len(episode)]
        np.testing.assert_allclose(visited, together, atol=1e-4)
        np.testing.assert_allclose(gained, returns, rtol=1e-4)

    def draw(states: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
        assert not deterministic
        return np.random.uniform(-1, 1, (len(states), 3)), None

    drawing = run("drawing", SimpleNamespace(predict=draw))
    np.testing.assert_array_equal(script.visits(drawing, 3)[0], script.visits(drawing, 4)[0])


def test_planes(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """t-SNE has the paper's parameters; a coordinate's unit does not count; a constant one does no harm."""
    asked: list[dict[str, Any]] = []

    def tsne(**parameters: Any) -> Any:
        asked.append(parameters)
        return SimpleNamespace(fit_transform=lambda states: states[:, :2])

    monkeypatch.setattr(script, "TSNE", tsne)
    rng = np.random.default_rng(0)
    states = np.concatenate([rng.normal(size=(60, 3)) @ rng.normal(size=(3, 3)), np.ones((60, 1))], axis=1)
    groups, others = ([own[:10], own[10:]] for own in (states, states * [1, 1_000, 1, 1]))
    planes, rescaled = script.embed(groups), script.embed(others)
    assert asked == [dict(perplexity=50, early_exaggeration=12, random_state=33)] * 2
    for name, points in planes.items():
        assert [len(own) for own in points] == [10, 50]
        together = np.concatenate(points)
        np.testing.assert_allclose((together.min(axis=0), together.max(axis=0)), ([0, 0], [1, 1]))
        np.testing.assert_allclose(together, np.concatenate(rescaled[name]), atol=1e-9)
    np.testing.assert_allclose(planes["tsne"][0][:, 0], (states[:10, 0] - states[:, 0].min()) / np.ptp(states[:, 0]))


def test_no_snapshot_is_an_error(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["state_visits.py", "--steps", "5000", "--every", "2500"])
    with pytest.raises(SystemExit):
        script.main()
    assert "there is no snapshot" in capsys.readouterr().err
