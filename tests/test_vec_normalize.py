"""VecNormalize: raw data are stored, and both minibatches see observations and rewards as they are normalised now."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from both import MIXED, both, mode, policy_for, reward_of, silent, small, space_envs
from envs import TinyEnv, goal_envs
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage, sync_envs_normalization
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_dipo import DIPO


class RewardEnv(TinyEnv):
    """Observations around 50, rewards around -1000."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.observation_space = spaces.Box(40.0, 60.0, (3,))

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        return observation, 500 * reward - 1000, *rest


def normalized(n_envs: int = 2, **kwargs: Any) -> Any:
    return VecNormalize(DummyVecEnv([RewardEnv] * n_envs), gamma=0.9, **kwargs)


def minibatches(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What one update draws: the critics' minibatch under "sample", the actor's under "sample_improved"."""
    drawn: dict[str, Any] = {}

    def watch(name: str) -> None:
        draw = getattr(model.replay_buffer, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            drawn[name] = draw(*args, **kwargs)
            return drawn[name]

        monkeypatch.setattr(model.replay_buffer, name, watched)

    for name in ("sample", "sample_improved"):
        if hasattr(model.replay_buffer, name):
            watch(name)
    silent(model).train(1, 64)
    return drawn


def rows_of(actions: th.Tensor, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where minibatch actions were stored: they are all different."""
    places = [np.argwhere((stored == action).all(axis=-1)) for action in actions.numpy()]
    assert all(len(place) == 1 for place in places)
    rows, envs = np.concatenate(places).T
    return rows, envs


@pytest.mark.parametrize("settings", [{}, {"norm_reward": False}, {"norm_obs": False}, {"clip_obs": 0.5, "clip_reward": 0.1}])
@pytest.mark.parametrize("n_steps", [1, 3])
@both
def test_both_minibatches_are_normalized(
    algorithm: type[Any], n_steps: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = normalized(**settings)
    # random actions alone, which tell the transitions apart
    model = small(algorithm, env, n_steps=n_steps, gamma=0.9, learning_starts=39)
    model.learn(40)
    buffer = model.replay_buffer
    # as they came
    assert (buffer.observations[:20] >= 40).all() and (buffer.rewards[:20] <= -1000).all()
    drawn = minibatches(model, monkeypatch)

    batch = drawn["sample"]
    rows, envs = rows_of(batch.actions, buffer.actions[:20])
    np.testing.assert_array_equal(batch.observations.numpy(), env.normalize_obs(buffer.observations[rows, envs]))
    if n_steps == 1:
        next_observations = buffer.next_observations[rows, envs]
        np.testing.assert_array_equal(batch.next_observations.numpy(), env.normalize_obs(next_observations))
        np.testing.assert_array_equal(batch.rewards[:, 0].numpy(), env.normalize_reward(buffer.rewards[rows, envs]))
    else:
        total, discounts = n_step_rewards(buffer, env, rows, envs)
        np.testing.assert_allclose(batch.rewards[:, 0].numpy(), total, rtol=1e-5)
        np.testing.assert_allclose(batch.discounts[:, 0].numpy(), discounts, rtol=1e-6)

    if algorithm is DIPO:
        improved = drawn["sample_improved"]
        raw = buffer.observations[improved.rows, improved.envs]
        np.testing.assert_array_equal(improved.observations.numpy(), env.normalize_obs(raw))
        assert np.allclose(improved.observations.numpy(), raw) == (settings.get("norm_obs") is False)


def n_step_rewards(buffer: Any, env: VecNormalize, rows: np.ndarray, envs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Discounted sums of three rewards, each normalised, and the discount of what follows; step by step."""
    totals, discounts = [], []
    for row, column in zip(rows, envs, strict=True):
        total, steps = 0.0, 0
        while steps < 3 and row + steps < buffer.pos:
            total += 0.9**steps * float(env.normalize_reward(buffer.rewards[row + steps, column]))
            steps += 1
            if buffer.dones[row + steps - 1, column]:
                break
        totals.append(total)
        discounts.append(0.9**steps)
    return np.array(totals), np.array(discounts)


@both
def test_statistics_that_move_on_move_the_minibatches(algorithm: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = normalized()
    model = small(algorithm, env)
    model.learn(40)
    env.obs_rms.mean = env.obs_rms.mean + 100
    for batch in minibatches(model, monkeypatch).values():
        assert (batch.observations < -1).all()


@both
def test_acting_sees_normalized_observations(algorithm: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = normalized()
    model = small(algorithm, env)
    given: list[np.ndarray] = []
    predict = model.policy.predict

    def watched(observations: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        given.append(observations)
        return predict(observations, *args, **kwargs)

    monkeypatch.setattr(model.policy, "predict", watched)
    model.learn(40)
    assert len(given) == 15 and np.abs(given).max() < 5


@pytest.mark.parametrize("space", [MIXED, MIXED["camera"]], ids=["dict", "image"])
@both
def test_images_are_left_alone(algorithm: type[Any], space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["vector"] if isinstance(space, spaces.Dict) else None
    env = VecNormalize(VecTransposeImage(space_envs(space, 2)), norm_obs=keys is not None, norm_obs_keys=keys)
    model = small(algorithm, env, policy_for(space))
    model.learn(24)
    for batch in minibatches(model, monkeypatch).values():
        image = batch.observations["camera"] if keys else batch.observations
        assert image.dtype == th.uint8 and image.max() > 200


@both
def test_goals_are_normalized(algorithm: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(goal_envs(2), clip_obs=2.0)
    model = small(algorithm, env, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    model.learn(40)
    for batch in minibatches(model, monkeypatch).values():
        assert all(float(part.abs().max()) <= 2 for part in batch.observations.values())
    # the second environment's episodes have numbers from 1000 on
    assert model.replay_buffer.observations["achieved_goal"].max() >= 1000


@both
def test_save_load_and_evaluate(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    env = normalized()
    model = small(algorithm, env)
    model.learn(40)
    assert model.get_vec_normalize_env() is env
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics.pkl"))
    loaded_env = VecNormalize.load(str(tmp_path / "statistics.pkl"), DummyVecEnv([RewardEnv]))
    loaded_env.training = loaded_env.norm_reward = False
    loaded = algorithm.load(tmp_path / "model", env=loaded_env)
    assert loaded.get_vec_normalize_env() is loaded_env
    raw = np.full((4, 3), 50.0, dtype=np.float32) + np.arange(4)[:, None]
    np.testing.assert_array_equal(mode(loaded, loaded_env.normalize_obs(raw)), mode(model, env.normalize_obs(raw)))
    mean = loaded_env.obs_rms.mean.copy()
    assert reward_of(loaded, loaded_env) <= -5000  # raw
    np.testing.assert_array_equal(loaded_env.obs_rms.mean, mean)
    loaded_env.training = True
    loaded.learn(20, reset_num_timesteps=False)
    assert not np.array_equal(loaded_env.obs_rms.mean, mean)


@both
def test_callbacks_keep_the_statistics(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    env, evaluation = normalized(), normalized(1, training=False, norm_reward=False)
    model = small(algorithm, env)
    checkpoint = CheckpointCallback(10, str(tmp_path), save_vecnormalize=True)
    model.learn(40, callback=[EvalCallback(evaluation, eval_freq=20, n_eval_episodes=1, warn=False, verbose=0), checkpoint])
    np.testing.assert_array_equal(evaluation.obs_rms.mean, env.obs_rms.mean)  # synchronised at the last step
    saved: Any = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_40_steps.pkl"), DummyVecEnv([RewardEnv]))
    np.testing.assert_array_equal(saved.obs_rms.var, env.obs_rms.var)


def test_the_action_gradient_and_the_loss_use_what_the_critic_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks are given the normalised observations of the actor's minibatch, not the raw ones."""
    env = normalized()
    model: DIPO = small(DIPO, env)
    model.learn(40)
    given: dict[str, Any] = {}

    def watch(network: Any, name: str) -> None:
        call = getattr(network, name)

        def watched(observations: Any, *args: Any) -> Any:
            given[name] = observations
            return call(observations, *args)

        monkeypatch.setattr(network, name, watched)

    watch(model.critic, "objective")
    watch(model.actor, "extract_features")
    drawn = minibatches(model, monkeypatch)
    assert set(given) == {"objective", "extract_features"}
    for observations in given.values():
        assert th.equal(observations, drawn["sample_improved"].observations)


@both
def test_statistics_can_be_shared_with_another_environment(algorithm: type[Any]) -> None:
    env, other = normalized(), normalized(training=False)
    model = small(algorithm, env)
    model.learn(30)
    sync_envs_normalization(env, other)
    model.set_env(other)
    mean = other.obs_rms.mean.copy()
    model.learn(20, reset_num_timesteps=False)
    np.testing.assert_array_equal(other.obs_rms.mean, mean)
    assert model._vec_normalize_env is other


def test_memory_efficient_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next observations, which are those of the next row, are normalised once, too."""
    memory = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = silent(small(DIPO, normalized(), **memory)).learn(40)
    drawn = minibatches(model, monkeypatch)
    model.train(1, 8)
    for observations in (
        drawn["sample"].observations,
        drawn["sample"].next_observations,
        drawn["sample_improved"].observations,
    ):
        assert observations.abs().max() < 10  # raw ones are between 40 and 60
    assert model.replay_buffer.observations[: model.replay_buffer.pos].min() >= 40
