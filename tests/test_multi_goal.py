"""The multi-goal environment is the paper's, and MuJoCo tasks continue exactly from their state."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_dipo import DIPO, ExactCheckpointCallback, load_checkpoint
from sb3_dipo.envs import MujocoState, MultiGoalEnv

ID = "sb3_dipo/MultiGoal-v0"


def test_both_checkers_accept_it() -> None:
    check_env(MultiGoalEnv(render_mode="rgb_array"), skip_render_check=False)
    check_gymnasium_env(gym.make(ID, render_mode="rgb_array").unwrapped)


def test_importing_the_package_registers_it_and_loads_no_environment() -> None:
    program = f"import sys, gymnasium, sb3_dipo; assert 'sb3_dipo.envs' not in sys.modules; print(gymnasium.make('{ID}'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "MultiGoalEnv" in done.stdout, done.stderr


def test_reward_is_that_of_appendix_g() -> None:
    env = MultiGoalEnv()
    env.reset(options={"position": (1.0, 2.0)})
    observation, reward, terminated, truncated, info = env.step(np.array([0.5, -0.25], np.float32))
    np.testing.assert_array_equal(observation, np.array([1.5, 1.75], np.float32))
    nearest = min((1.5 - x) ** 2 + (1.75 - y) ** 2 for x, y in [(0, 5), (0, -5), (5, 0), (-5, 0)])
    assert reward == pytest.approx(-(0.5**2 + 0.25**2) - nearest)
    assert (terminated, truncated, info) == (False, False, {"is_success": False, "goal": -1})

    env.reset(options={"position": (0.0, -3.5)})
    _, reward, terminated, truncated, info = env.step(np.array([0.0, -1.0], np.float32))
    assert reward == pytest.approx(-1 - 0.25 + 10)
    assert (terminated, truncated, info) == (True, False, {"is_success": True, "goal": 1})


@pytest.mark.parametrize("goal, place", list(enumerate([(0, 5), (0, -5), (5, 0), (-5, 0)])))
def test_each_goal_is_reached_at_its_radius(goal: int, place: tuple[int, int]) -> None:
    env = MultiGoalEnv()
    for away, reached in ((1.01, False), (0.99, True)):
        env.reset(options={"position": np.array(place) * (1 - away / 5)})
        _, _, terminated, _, info = env.step(np.zeros(2, np.float32))
        assert terminated == info["is_success"] == reached
        assert info["goal"] == (goal if reached else -1)


def test_parameters() -> None:
    env = gym.make(ID, action_cost=30, distance_cost=0.5, goal_reward=-3, goal_radius=2, init_std=0, time_limit=2)
    assert (env.reset(seed=1)[0] == 0).all()
    reward, _, truncated = env.step(np.array([1, 0], np.float32))[1:4]
    assert reward == pytest.approx(-30 - 0.5 * 16) and not truncated
    reward, terminated, truncated = env.step(np.array([1, 0], np.float32))[1:4]
    assert reward == pytest.approx(-30 - 0.5 * 9) and truncated and not terminated
    env.reset(options={"position": (2.0, 0.0)})
    reward, terminated, truncated = env.step(np.array([1, 0], np.float32))[1:4]
    assert reward == pytest.approx(-30 - 0.5 * 4 - 3) and terminated and not truncated


def test_a_goal_that_is_reached_in_the_last_step_is_no_timeout() -> None:
    env = MultiGoalEnv(time_limit=1)
    env.reset(options={"position": (3.5, 0.0)})
    assert env.step(np.array([1, 0], np.float32))[2:4] == (True, False)


def test_an_episode_is_cut_after_thirty_steps_and_starts_near_the_origin() -> None:
    env = MultiGoalEnv()
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(2_000)])
    np.testing.assert_allclose(starts.std(axis=0), 0.1, atol=0.006)
    np.testing.assert_allclose(starts.mean(axis=0), 0, atol=0.01)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


def test_it_stays_on_the_plane() -> None:
    env = MultiGoalEnv()
    env.reset(options={"position": (6.5, -6.5)})
    for _ in range(3):
        observation = env.step(np.array([9.0, -9.0], np.float32))[0]
    np.testing.assert_array_equal(observation, [7, -7])
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize(
    "bad",
    [
        dict(action_cost=-1),
        dict(distance_cost=np.nan),
        dict(goal_reward=np.inf),
        dict(goal_radius=0),
        dict(init_std=-0.1),
        dict(time_limit=0),
        dict(render_mode="human"),
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_a_parameter_out_of_its_range_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
        MultiGoalEnv(**bad)


def test_a_start_that_is_no_place_is_named() -> None:
    with pytest.raises(ValueError, match="position"):
        MultiGoalEnv().reset(options={"position": (1.0, 2.0, 3.0)})


def test_the_picture_shows_the_path() -> None:
    env = MultiGoalEnv(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    for _ in range(3):
        env.step(np.array([1, 1], np.float32))
    after = env.render()
    assert before is not None and after is not None
    assert before.shape == after.shape == (400, 400, 3) and before.dtype == np.uint8
    changed = (before != after).any(axis=2)
    assert changed[:200, 200:].sum() > 100 and changed[210:].sum() == 0  # to the upper right, and nowhere below
    assert MultiGoalEnv().render() is None


def test_processes_that_have_not_imported_the_package_find_it() -> None:
    # Gymnasium imports what is before the colon
    env = make_vec_env(f"sb3_dipo:{ID}", 2, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="spawn"))
    observations: Any = env.reset()
    assert observations.shape == (2, 2)
    env.close()


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Humanoid-v5"])
def test_a_mujoco_task_goes_on_from_its_state(task: str) -> None:
    env, other = MujocoState(gym.make(task)), MujocoState(gym.make(task))
    env.reset(seed=3)
    other.reset(seed=4)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.4, 0.4, (30, *(env.action_space.shape or ()))).astype(np.float32)
    for action in actions[:12]:
        env.step(action)
    other.set_env_state(env.get_env_state())
    for action in actions[12:]:
        expected, found = env.step(action), other.step(action)
        np.testing.assert_array_equal(expected[0], found[0])
        assert expected[1:4] == found[1:4]
    np.testing.assert_array_equal(env.reset()[0], other.reset()[0])


def test_mujoco_state_wants_a_mujoco_task() -> None:
    with pytest.raises(ValueError, match="MuJoCo"):
        MujocoState(MultiGoalEnv())


@pytest.mark.parametrize("algorithm", [DIPO, SAC, TD3, PPO, TQC, CrossQ])
@pytest.mark.parametrize("task", [ID, "Hopper-v5"])
def test_every_algorithm_goes_on_from_a_checkpoint(algorithm: type[BaseAlgorithm], task: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(seed=2, device="cpu", policy_kwargs=dict(net_arch=[8]))
    if algorithm is PPO:
        settings |= dict(n_steps=32, batch_size=16, n_epochs=2)
    else:
        settings |= dict(learning_starts=40, batch_size=8, buffer_size=200)
    if algorithm is DIPO:
        settings |= dict(action_gradient_steps=2, policy_kwargs=dict(net_arch=[8], num_train_timesteps=3))

    def make_env() -> Any:
        return make_vec_env(task, 1, seed=2, wrapper_class=None if task == ID else MujocoState)

    def weights(model: BaseAlgorithm) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in model.policy.parameters()])

    whole = algorithm("MlpPolicy", make_env(), **settings).learn(128)
    first = algorithm("MlpPolicy", make_env(), **settings)
    first.learn(64, ExactCheckpointCallback(1_000, tmp_path))
    np.random.seed(77)  # what the process has drawn since does not matter
    second = load_checkpoint(tmp_path, make_env(), algorithm, device="cpu")
    assert type(second) is algorithm
    second.learn(64, reset_num_timesteps=False)
    assert np.abs(weights(whole) - weights(first)).max() > 0
    np.testing.assert_array_equal(weights(whole), weights(second))
