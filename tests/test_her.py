"""Hindsight replay in training: for the critics it is SB3's, and only improvements under the real goal are kept."""

import pathlib
from typing import Any

import numpy as np
import pytest
from both import ALGORITHMS, both, error_of, mode, reward_of, silent, small
from envs import GoalEnv, TinyEnv, goal_envs
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo import DIPO

HER: dict[str, Any] = {"policy": "MultiInputPolicy", "replay_buffer_class": HerReplayBuffer}


def bits(n_envs: int = 1, **kwargs: Any) -> Any:
    return make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=True, **kwargs), n_envs=n_envs)


@pytest.mark.parametrize("goal_selection_strategy", ["final", "episode", "future"])
@pytest.mark.parametrize("n_envs", [1, 2])
@both
def test_strategies(algorithm: type[Any], n_envs: int, goal_selection_strategy: str) -> None:
    kwargs = {"n_sampled_goal": 2, "goal_selection_strategy": goal_selection_strategy}
    model = small(algorithm, bits(n_envs), **HER, replay_buffer_kwargs=kwargs, train_freq=4, gradient_steps=n_envs)
    model.learn(60)
    assert model._n_updates > 0 and mode(model).shape == (5, 4)


@pytest.mark.parametrize(
    "observations",
    [{"discrete_obs_space": True}, {"image_obs_space": True}, {"image_obs_space": True, "channel_first": False}],
)
@both
def test_goals_of_other_kinds(algorithm: type[Any], observations: dict[str, Any]) -> None:
    model = small(algorithm, bits(2, **observations), **HER, train_freq=5, gradient_steps=1)
    model.learn(60)
    assert mode(model).shape == (5, 4)


def test_critics_minibatch_is_that_of_sb3() -> None:
    buffers = []
    for algorithm in ALGORITHMS:
        model = small(algorithm, goal_envs(2), **HER, learning_starts=59, gradient_steps=0)
        model.learn(60)
        buffers.append(model.replay_buffer)
    for name in ("actions", "rewards", "dones", "ep_start", "ep_length"):
        np.testing.assert_array_equal(getattr(buffers[0], name), getattr(buffers[1], name))
    for seed in range(3):
        drawn = []
        for buffer in buffers:
            np.random.seed(seed)
            drawn.append(buffer.sample(20))
        ours, theirs = drawn
        for key in theirs.observations:
            np.testing.assert_array_equal(ours.observations[key], theirs.observations[key])
            np.testing.assert_array_equal(ours.next_observations[key], theirs.next_observations[key])
        for name in ("actions", "rewards", "dones"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n_sampled_goal, kept", [(0, 10), (4, 2), (9, 1)])
def test_only_improvements_under_the_real_goal_are_kept(n_sampled_goal: int, kept: int, normalize: bool) -> None:
    env: Any = VecNormalize(goal_envs(2)) if normalize else goal_envs(2)
    model: Any = small(DIPO, env, **HER, replay_buffer_kwargs={"n_sampled_goal": n_sampled_goal}, action_lr=0.01)
    model.learn(60)
    buffer = silent(model).replay_buffer
    actions = buffer.actions.copy()
    counts = set()
    for _ in range(8):
        before = buffer.improved_actions.copy()
        # inside the box, so that every improvement moves
        buffer.improved_actions[:] = 0.5
        model.train(1, 10)
        counts.add(int((buffer.improved_actions != 0.5).any(axis=-1).sum()))
        buffer.improved_actions[:] = before
    assert max(counts) == kept or (kept == 10 and 7 <= max(counts) <= 10)  # a place may be drawn twice
    np.testing.assert_array_equal(buffer.actions, actions)


def test_relabelled_transitions_climb_from_the_action_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small(DIPO, goal_envs(2), **HER, learning_starts=59, gradient_steps=0)
    model.learn(60)
    buffer = silent(model).replay_buffer
    buffer.improved_actions[:] = 0.5
    batch = buffer.sample_improved(50)
    monkeypatch.setattr(buffer, "sample_improved", lambda *_: batch)
    model.train(1, 50)
    real = batch.rows >= 0
    assert real.sum() == 10
    assert (batch.improved_actions[real] == 0.5).all()
    np.testing.assert_array_equal(batch.improved_actions[~real], batch.actions[~real])
    np.testing.assert_array_equal(batch.actions[real], buffer.actions[batch.rows[real], batch.envs[real]])
    taken = buffer.actions[buffer.ep_length > 0]
    for start in batch.improved_actions[~real].numpy():
        assert (taken == start).all(axis=-1).any()


@pytest.mark.parametrize("truncate_last_traj", [False, True])
@both
def test_going_on_with_saved_replay_data(algorithm: type[Any], truncate_last_traj: bool, tmp_path: pathlib.Path) -> None:
    model = small(algorithm, bits(2), **HER)
    model.learn(45)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=bits(2))
    if truncate_last_traj:
        with pytest.warns(UserWarning, match="The last trajectory in the replay buffer will be truncated"):
            loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=True)
    else:
        loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    np.testing.assert_array_equal(loaded.replay_buffer.actions, model.replay_buffer.actions)
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 66  # 46 and 20
    assert reward_of(loaded, bits()) <= 0


def test_errors_are_those_of_sac() -> None:
    def before_the_first_episode(algorithm: type[Any]) -> str:
        model = small(algorithm, GoalEnv(first_episode=3), **HER, learning_starts=1)  # of 5 steps
        return error_of(lambda: model.learn(10))

    def without_goals(algorithm: type[Any]) -> str:
        return error_of(lambda: small(algorithm, TinyEnv(observation="dict"), **HER).learn(20))

    for error in (before_the_first_episode, without_goals):
        ours, theirs = (error(algorithm) for algorithm in ALGORITHMS)
        assert ours == theirs != ""


@both
def test_environments_in_other_processes(algorithm: type[Any]) -> None:
    env = SubprocVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True)] * 2)
    model = small(algorithm, env, **HER).learn(40)
    env.close()
    assert model._n_updates > 0 and model.replay_buffer.infos.shape[1] == 2
