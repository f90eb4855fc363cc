"""Agents run and learn: environments, spaces, schedules, callbacks, logs, seeds, and losses that are not finite."""

import math
import pathlib
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import (
    BatchNormExtractor,
    LinearExtractor,
    TinyEnv,
    differences,
    everything_learned,
    goal_envs,
    small_dipo,
    tiny_envs,
)
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_dipo import DIPO, CnnPolicy, DIPOPolicy, MlpPolicy, MultiInputPolicy, NonFiniteLossError, Sampler

METRICS = ("critic_loss", "actor_loss", "q_value", "improved_q_gain", "action_shift", "n_updates", "learning_rate")


@pytest.fixture(autouse=True)
def gradient_mode() -> Iterator[None]:
    """Nothing leaves gradients switched off."""
    assert th.is_grad_enabled()
    yield
    assert th.is_grad_enabled()


def logged(model: DIPO, name: str) -> float:
    return float(model.logger.name_to_value[f"train/{name}"])


# ------------------------------------------------------------------------------------------------- spaces and settings


@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_pendulum(actor: str) -> None:
    model = small_dipo("Pendulum-v1", policy_kwargs={"actor": actor})
    before = everything_learned(model)
    model.learn(60)
    assert model.num_timesteps == 60 and model._n_updates == 50
    after = everything_learned(model)
    changed = differences(before, after)
    for part in ("actor.", "actor_target.", "critic.", "critic_target."):
        assert any(name.startswith(part) for name in changed)
    assert all(th.isfinite(value).all() for value in after.values())
    assert model.env is not None
    observations = model.env.reset()
    for deterministic in (True, False):
        actions, _ = model.predict(observations, deterministic=deterministic)  # type: ignore[arg-type]
        assert actions.shape == (1, 1) and np.abs(actions).max() <= 2


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    "observation, policy", [("vector", "MlpPolicy"), ("image", "CnnPolicy"), ("dict", "MultiInputPolicy")]
)
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_policies_and_environments(observation: str, policy: str, n_envs: int, share_features_extractor: bool) -> None:
    env = tiny_envs(n_envs, observation=observation)
    model = small_dipo(env, policy, {"share_features_extractor": share_features_extractor}, buffer_size=60)
    model.learn(30)
    assert model._n_updates == (20 if n_envs == 1 else 7)
    assert model.env is not None
    observations: Any = model.env.reset()
    assert model.predict(observations)[0].shape == (n_envs, 2)
    one = {key: value[0] for key, value in observations.items()} if observation == "dict" else observations[0]
    assert model.predict(one)[0].shape == (2,)


def test_policy_aliases() -> None:
    assert DIPO.policy_aliases == {"MlpPolicy": MlpPolicy, "CnnPolicy": CnnPolicy, "MultiInputPolicy": MultiInputPolicy}
    assert MlpPolicy is DIPOPolicy
    assert type(small_dipo(policy=MlpPolicy).policy) is MlpPolicy


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1.0, 1.0, (2, 3)),
        spaces.Box(np.array([-2.0, 0.0, 5.0], dtype=np.float32), np.array([1.0, 0.5, 9.0], dtype=np.float32)),
        spaces.Box(-3.0, 1.0, (2,), dtype=np.float64),
        spaces.Box(np.full((2, 2), -1, dtype=np.float32), np.array([[1, 2], [3, 4]], dtype=np.float32)),
    ],
    ids=["matrix", "asymmetric", "float64", "asymmetric matrix"],
)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_spaces(action_space: spaces.Box, n_envs: int) -> None:
    env = tiny_envs(n_envs, action_space=action_space)  # refuses actions outside the box
    model = small_dipo(env)
    model.learn(40)
    assert model.replay_buffer is not None
    stored = model.replay_buffer.actions[: model.replay_buffer.pos]
    assert np.abs(stored).max() <= 1 and stored.min() < -0.5 and stored.max() > 0.5
    received = np.stack([tiny.received for tiny in env.envs], axis=1)  # type: ignore[attr-defined]
    low, high = action_space.low, action_space.high
    unscaled = low + (stored.reshape(received.shape) + 1) / 2 * (high - low)
    np.testing.assert_allclose(received, unscaled, atol=1e-5)
    for deterministic in (True, False):
        actions, _ = model.predict(np.zeros((4, 3), dtype=np.float32), deterministic=deterministic)
        assert actions.shape == (4, *action_space.shape)
        assert (actions >= low).all() and (actions <= high).all()


def test_train_freq_in_episodes() -> None:
    model = small_dipo(TinyEnv(episode_length=7), train_freq=(2, "episode"), gradient_steps=-1, learning_starts=14)
    model.learn(29)
    assert model.num_timesteps == 42
    assert model._n_updates == 28  # as many as steps, after the first rollout


@pytest.mark.parametrize(
    "n_envs, train_freq, gradient_steps, expected",
    [(1, 4, 1, 10), (1, 4, -1, 40), (3, 2, -1, 36), (1, (4, "step"), 3, 30), (1, 4, 0, 0)],
)
def test_number_of_updates(n_envs: int, train_freq: Any, gradient_steps: int, expected: int) -> None:
    model = small_dipo(tiny_envs(n_envs), train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=8)
    model.learn(48 if n_envs == 1 else 42)
    assert model._n_updates == expected


def test_zero_updates_do_nothing() -> None:
    model = small_dipo()
    model.learn(20)
    before = everything_learned(model)
    model.train(0, 8)
    assert not differences(before, everything_learned(model)) and model._n_updates == 10


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(noise_class: type[Any], n_envs: int) -> None:
    noise = noise_class(np.zeros(2), np.full(2, 0.3))
    model = small_dipo(tiny_envs(n_envs), action_noise=noise)
    model.learn(30)
    assert model.replay_buffer is not None and np.abs(model.replay_buffer.actions).max() <= 1
    # a large mean shows that it is added
    model = small_dipo(tiny_envs(n_envs), action_noise=noise_class(np.full(2, 50.0), np.zeros(2)))
    if noise_class is NormalActionNoise:
        model.learn(30)
        assert model.replay_buffer is not None and (model.replay_buffer.actions[: model.replay_buffer.pos] == 1).all()


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_users_noise_stays_and_goes_on(n_envs: int) -> None:
    class Locked(OrnsteinUhlenbeckActionNoise):
        def __init__(self) -> None:
            super().__init__(np.zeros(2), np.full(2, 0.3))
            self.lock = threading.Lock()  # cannot be copied

    noise: Any = Locked() if n_envs == 1 else VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), n_envs)
    resets: list[bool] = []
    model = small_dipo(tiny_envs(n_envs), action_noise=noise, learning_starts=0)
    model.learn(3)
    noise.reset = lambda *args: resets.append(True)
    model.learn(n_envs, reset_num_timesteps=False)  # no episode ends in it
    assert model.action_noise is noise and not resets


@pytest.mark.parametrize("accelerate", ["off", "auto", "compile"])
@pytest.mark.parametrize("off", [th.no_grad, th.inference_mode])
def test_learning_without_gradients_is_an_error(off: Any, accelerate: str) -> None:
    """As of SAC: nothing would be learned."""
    model = small_dipo(accelerate=accelerate)
    with off(), pytest.raises(RuntimeError, match="does not require grad"):
        model.learn(30)


@pytest.mark.parametrize("accelerate", ["off", "auto", "compile"])
def test_a_loss_without_gradient_is_an_error(accelerate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo(accelerate=accelerate)
    loss = model.actor.loss
    monkeypatch.setattr(model.actor, "loss", lambda *given: loss(*given).detach())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.learn(30)


@pytest.mark.parametrize("accelerate", ["off", "auto", "compile"])
def test_a_frozen_actor_lets_the_critics_learn(accelerate: str) -> None:
    model = small_dipo(accelerate=accelerate)
    model.actor.requires_grad_(False)
    before = everything_learned(model)
    model.learn(15)
    changed = differences(before, everything_learned(model))
    assert any(name.startswith("critic.") for name in changed) and not any(name.startswith("actor.") for name in changed)


def test_learns_from_a_float_number_of_steps() -> None:
    model = small_dipo()
    model.learn(1e2)
    assert model.num_timesteps == 100 and isinstance(model._total_timesteps, int)


def test_vec_normalize() -> None:
    env = VecNormalize(tiny_envs(2), gamma=0.99)
    model = small_dipo(env)
    model.learn(40)
    assert model.replay_buffer is not None
    assert np.abs(model.replay_buffer.observations).max() <= 1  # stored as they came


def test_optimize_memory_usage() -> None:
    kwargs: dict[str, Any] = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = small_dipo(buffer_size=25, **kwargs)
    model.learn(60)
    assert model.replay_buffer is not None and model.replay_buffer.full


def test_her_learns() -> None:
    model = small_dipo(goal_envs(2), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    model.learn(30)
    assert model._n_updates == 10


def test_custom_architecture() -> None:
    model = small_dipo(
        policy_kwargs={"net_arch": {"pi": [8], "qf": [16, 12]}, "n_critics": 3, "activation_fn": th.nn.ReLU, "actor": "mlp"}
    )
    model.learn(20)
    assert [parameter.shape[0] for parameter in model.actor.parameters() if parameter.ndim == 2] == [8, 2]
    assert sorted({name.split(".")[0] for name in model.critic.state_dict()}) == ["qf0", "qf1", "qf2"]
    first: Any = model.critic.get_submodule("qf0")
    assert [parameter.shape[0] for parameter in first.parameters() if parameter.ndim == 2] == [16, 12, 1]


@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_networks_without_hidden_layers(actor: str) -> None:
    small_dipo(policy_kwargs={"net_arch": [], "actor": actor}).learn(20)


# ------------------------------------------------------------------------------------------------- features extractors


def test_shared_extractor_is_trained_by_the_critics_alone() -> None:
    policy_kwargs = {"features_extractor_class": LinearExtractor, "share_features_extractor": True}
    model = small_dipo(policy_kwargs=policy_kwargs, qf_learning_rate=0.0)
    assert model.actor.features_extractor is model.critic.features_extractor
    assert model.actor_target.features_extractor is model.critic_target.features_extractor
    assert model.critic_target.features_extractor is not model.critic.features_extractor
    assert not model.actor.extract_features(th.zeros(2, 3)).requires_grad
    shared = set(model.critic.features_extractor.parameters())
    assert not shared & {parameter for group in model.actor.optimizer.param_groups for parameter in group["params"]}
    assert shared <= {parameter for group in model.critic.optimizer.param_groups for parameter in group["params"]}
    before = everything_learned(model)
    model.learn(30)
    changed = {name for name in differences(before, everything_learned(model)) if name in before}
    assert any(name.startswith("actor.noise_network") for name in changed)
    assert not any(name.startswith(("critic.", "actor.features_extractor")) for name in changed)

    model = small_dipo(policy_kwargs=policy_kwargs, learning_rate=0.0, qf_learning_rate=1e-3)
    before = everything_learned(model)
    model.learn(30)
    changed = {name for name in differences(before, everything_learned(model)) if name in before}
    assert any(name.startswith("critic.features_extractor") for name in changed)
    assert not any(name.startswith("actor.noise_network") for name in changed)


def test_own_extractor_is_trained_by_the_actor() -> None:
    model = small_dipo(policy_kwargs={"features_extractor_class": LinearExtractor}, qf_learning_rate=0.0)
    assert model.actor.features_extractor is not model.critic.features_extractor
    assert model.actor.extract_features(th.zeros(2, 3)).requires_grad
    before = everything_learned(model)
    model.learn(30)
    changed = {name for name in differences(before, everything_learned(model)) if name in before}
    assert any(name.startswith("actor.features_extractor") for name in changed)
    assert any(name.startswith("actor_target.features_extractor") for name in changed)
    assert not any(name.startswith("critic.") for name in changed)


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_polyak_step_is_applied_once(share_features_extractor: bool) -> None:
    policy_kwargs = {
        "features_extractor_class": LinearExtractor,
        "share_features_extractor": share_features_extractor,
    }
    model = small_dipo(policy_kwargs=policy_kwargs, tau=0.25, learning_rate=0.1)
    model.learn(20)
    before = everything_learned(model)
    model.train(1, 8)
    after = everything_learned(model)
    for name, target in after.items():
        if name.startswith(("actor_target.", "critic_target.")):
            online = after[name.replace("_target", "", 1)]
            expected = before[name] + 0.25 * (online - before[name])
            th.testing.assert_close(target, expected, rtol=1e-5, atol=1e-7)
            if name.endswith("features_extractor.linear.weight"):
                assert (target - before[name]).abs().max() > 1e-3


def test_targets_start_as_copies_and_are_not_trained() -> None:
    model = small_dipo(policy_kwargs={"features_extractor_class": LinearExtractor}, tau=0.0)
    state = everything_learned(model)
    for name in state:
        if "_target." in name:
            assert th.equal(state[name], state[name.replace("_target", "", 1)])
    model.learn(30)
    changed = differences(state, everything_learned(model))
    assert not any("_target." in name for name in changed) and any(name.startswith("actor.") for name in changed)


def test_running_statistics_reach_the_targets() -> None:
    model = small_dipo(policy_kwargs={"features_extractor_class": BatchNormExtractor})
    model.learn(20)
    for online, target in ((model.actor, model.actor_target), (model.critic, model.critic_target)):
        own: Any = online.features_extractor.norm
        copy: Any = target.features_extractor.norm
        assert own.running_mean.abs().max() > 0
        assert th.equal(own.running_mean, copy.running_mean) and th.equal(own.running_var, copy.running_var)
        assert not target.training


def test_interval_of_the_actors_target() -> None:
    model = small_dipo(actor_target_update_interval=3)
    model.learn(11)  # update 0
    for update in range(1, 7):
        assert model._n_updates == update
        before = everything_learned(model)
        model.train(1, 8)
        changed = differences(before, everything_learned(model))
        assert any(name.startswith("actor_target.") for name in changed) == (update % 3 == 0)
        assert any(name.startswith("critic_target.") for name in changed)


# ------------------------------------------------------------------------------------------------- learning rates


class Watch(BaseCallback):
    """Notes both learning rates after every update."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[float, float, float]] = []

    def _on_step(self) -> bool:
        if self.model._n_updates:
            rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers()]
            # the rates are those of the last update, and this step has not moved the progress yet
            self.noted.append((self.model._current_progress_remaining, rates[0], rates[1]))
        return True

    def _optimizers(self) -> tuple[th.optim.Optimizer, th.optim.Optimizer]:
        assert isinstance(self.model, DIPO)
        return self.model.actor.optimizer, self.model.critic.optimizer


@pytest.mark.parametrize("own_schedule", [True, False])
def test_learning_rate_schedules_are_applied(own_schedule: bool) -> None:
    qf_learning_rate = (lambda progress: 1e-2 * (2 - progress)) if own_schedule else None
    model = small_dipo(learning_rate=lambda progress: 1e-3 * progress, qf_learning_rate=qf_learning_rate)
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-3
    assert model.critic.optimizer.param_groups[0]["lr"] == (1e-2 if own_schedule else 1e-3)
    model.learn(40, callback=(watch := Watch()))
    assert len(watch.noted) == 29
    for progress, actor_rate, critic_rate in watch.noted:
        assert actor_rate == pytest.approx(1e-3 * progress)
        assert critic_rate == pytest.approx(1e-2 * (2 - progress) if own_schedule else 1e-3 * progress)
    assert watch.noted[-1][0] == pytest.approx(1 / 40)
    assert logged(model, "learning_rate") == 0.0
    assert model.critic.optimizer.param_groups[0]["lr"] == (2e-2 if own_schedule else 0.0)


def test_a_schedule_that_is_replaced_counts_for_both() -> None:
    """Where the critics have none of their own, theirs is the actor's, also after it was changed."""
    model = small_dipo()
    model.learn(15)
    model.lr_schedule = lambda _: 1e-9
    model.learn(5, reset_num_timesteps=False)
    assert [network.optimizer.param_groups[0]["lr"] for network in (model.actor, model.critic)] == [1e-9, 1e-9]


def test_learning_rate_of_zero() -> None:
    model = small_dipo(learning_rate=0, qf_learning_rate=0.0)
    before = everything_learned(model)
    model.learn(30)
    changed = differences(before, everything_learned(model))
    assert not [name for name in changed if name.startswith(("actor.", "critic."))]


@pytest.mark.parametrize("name", ["learning_rate", "qf_learning_rate"])
@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_schedule_that_goes_wrong_later(name: str, bad: float) -> None:
    model = small_dipo(**{name: lambda progress: 1e-3 if progress > 0.5 else bad})
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.learn(40)
    assert all(th.isfinite(value).all() for value in everything_learned(model).values())


# ------------------------------------------------------------------------------------------------- callbacks and logs


def test_callbacks(tmp_path: pathlib.Path) -> None:
    evaluation = EvalCallback(
        Monitor(TinyEnv()),
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        eval_freq=20,
        n_eval_episodes=2,
        warn=True,
        verbose=0,
    )
    checkpoint = CheckpointCallback(25, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    model = small_dipo()
    model.learn(50, callback=[evaluation, checkpoint], progress_bar=True)
    assert {"best_model.zip", "evaluations.npz", "rl_model_25_steps.zip"} <= {path.name for path in tmp_path.iterdir()}
    best = DIPO.load(tmp_path / "best_model", env=TinyEnv())
    checked = DIPO.load(tmp_path / "rl_model_50_steps", env=TinyEnv())
    checked.load_replay_buffer(tmp_path / "rl_model_replay_buffer_50_steps")
    assert best.num_timesteps in (20, 40) and checked.num_timesteps == 50
    assert checked.replay_buffer is not None and model.replay_buffer is not None
    # the callback is called before the step's transition is stored
    assert (checked.replay_buffer.pos, model.replay_buffer.pos) == (49, 50)
    checked.learn(20, reset_num_timesteps=False)


def test_callback_can_stop_learning() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 17

    class Count(TinyEnv):
        """Observations count the steps."""

        def reset(self, **kwargs: Any) -> Any:
            self.count = 0
            return np.zeros(3, np.float32), super().reset(**kwargs)[1]

        def step(self, action: np.ndarray) -> Any:
            self.count += 1
            return np.full(3, self.count, np.float32), 0.0, False, False, {}

    model = small_dipo(Count())
    model.learn(100, callback=Stop())
    assert model.num_timesteps == 17
    # the last step was taken and not stored: its episode does not go on
    model.learn(5, reset_num_timesteps=False)
    buffer: Any = model.replay_buffer
    np.testing.assert_array_equal((buffer.next_observations - buffer.observations)[: buffer.pos], 1)


def test_everything_is_logged(tmp_path: pathlib.Path) -> None:
    model = small_dipo(tensorboard_log=str(tmp_path), seed=1)
    model.learn(60, log_interval=2)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "DIPO_1"
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in METRICS} <= tags
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps"} <= tags
    assert events.Scalars("train/learning_rate")[-1].value == pytest.approx(3e-4)
    assert [event.step for event in events.Scalars("train/actor_loss")] == [20, 30, 40, 50, 60]


def test_number_of_updates_is_logged(tmp_path: pathlib.Path) -> None:
    model = small_dipo()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60)
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert {f"train/{name}" for name in METRICS} <= set(header.split(","))
    assert rows[-1].split(",")[header.split(",").index("train/n_updates")] == "49"  # the episode ends before the update
    assert logged(model, "n_updates") == 50
    model.logger.close()


def test_logged_values() -> None:
    """Averages over the updates of one train(), against what the networks say with learning rates of zero."""
    model = small_dipo(learning_rate=0.0, buffer_size=1, gamma=0.0, policy_kwargs={"n_critics": 3})
    model.learn(30)
    buffer: Any = model.replay_buffer  # one transition
    buffer.actions[:] = buffer.improved_actions[:] = 0.1  # inside the box
    model.train(1, 8)
    observations, actions = th.as_tensor(buffer.observations[0]), th.as_tensor(buffer.actions[0])
    with th.no_grad():
        q_values = th.cat(model.critic(observations, actions), dim=1)
        improved = th.as_tensor(buffer.improved_actions[0])
        gain = model.critic.next_value(observations, improved) - model.critic.next_value(observations, actions)
    reward = float(buffer.rewards[0, 0])
    assert logged(model, "q_value") == pytest.approx(q_values.mean().item(), abs=1e-6)
    assert logged(model, "critic_loss") == pytest.approx(((q_values - reward) ** 2).sum().item(), rel=1e-5)
    assert logged(model, "improved_q_gain") == pytest.approx(gain.item(), rel=1e-3) and gain > 0
    shift = (improved - actions).norm().item()
    assert logged(model, "action_shift") == pytest.approx(shift, rel=1e-4) and shift > 0.01


def test_the_climb_is_measured_in_every_tenth_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo()
    model.learn(20)  # ten updates
    objective, calls = model.critic.objective, list[int]()

    def counted(obs: Any) -> Any:
        q_fn = objective(obs)

        def at(actions: th.Tensor) -> th.Tensor:
            calls.append(1)
            return q_fn(actions)

        return at

    monkeypatch.setattr(model.critic, "objective", counted)
    for updates, measured in ((1, 1), (9, 0), (1, 1), (19, 1), (20, 2)):
        calls.clear()
        model.train(updates, 8)
        assert len(calls) == updates * model.action_gradient_steps + 2 * measured
        assert logged(model, "improved_q_gain") and logged(model, "action_shift") > 0


def test_learning_goes_on(tmp_path: pathlib.Path) -> None:
    model = small_dipo(tensorboard_log=str(tmp_path))
    model.learn(30)
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 50 and model._n_updates == 40
    assert model.replay_buffer is not None and model.replay_buffer.pos == 50
    assert [path.name for path in tmp_path.iterdir()] == ["DIPO_1"]
    model.learn(15)
    assert model.num_timesteps == 15 and model.replay_buffer.pos == 65
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DIPO_1", "DIPO_2"]


def test_set_env() -> None:
    model = small_dipo()
    model.learn(20)
    env = TinyEnv()
    model.set_env(env)
    model.learn(20, reset_num_timesteps=False)
    assert len(env.received) == 20
    with pytest.raises(ValueError, match=r"[Aa]ction spaces do not match"):
        model.set_env(TinyEnv(spaces.Box(-1.0, 1.0, (5,))))
    with pytest.raises(ValueError, match=r"[Oo]bservation spaces do not match"):
        model.set_env(TinyEnv(observation="dict"))


# ------------------------------------------------------------------------------------------------- the first steps


@pytest.mark.parametrize(
    "total, learning_starts, n_envs, train_freq, learns",
    [
        (10, 10, 1, 1, False),
        (11, 10, 1, 1, True),
        (5, 10, 1, 1, False),
        (10, 12, 3, 1, False),  # ends at 12
        (10, 11, 3, 1, True),
        (13, 12, 3, 1, True),  # ends at 15
        (10, 12, 1, 4, False),  # ends at 12
        (10, 11, 1, 4, True),
        (17, 24, 3, 4, False),  # ends at 24
        (17, 23, 3, 4, True),
        (1, 0, 1, 1, True),
    ],
)
def test_warning_where_nothing_is_learned(
    total: int, learning_starts: int, n_envs: int, train_freq: int, learns: bool
) -> None:
    model = small_dipo(tiny_envs(n_envs), learning_starts=learning_starts, train_freq=train_freq)
    if learns:
        model.learn(total)  # any warning would be an error
    else:
        with pytest.warns(UserWarning, match="Nothing will be learned") as caught:
            model.learn(total)
        assert caught[0].filename == __file__  # it points at the user's line
    assert (model._n_updates > 0) == learns


def test_warning_where_nothing_is_learned_when_learning_goes_on() -> None:
    model = small_dipo(learning_starts=30)
    with pytest.warns(UserWarning, match="Nothing will be learned"):
        model.learn(15)
    with pytest.warns(UserWarning, match="after 30 steps"):
        model.learn(15, reset_num_timesteps=False)
    assert model._n_updates == 0
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 1
    with pytest.warns(UserWarning, match="Nothing will be learned"):
        model.learn(30)
    assert model._n_updates == 1


def test_no_warning_where_nobody_knows_or_nothing_is_asked_for() -> None:
    """The length of episodes is not known; of no steps at all nothing is expected."""
    model = small_dipo(TinyEnv(episode_length=7), learning_starts=10, train_freq=(1, "episode"))
    model.learn(10)  # ends at 14
    assert model._n_updates == 1
    model = small_dipo(gym.make("Pendulum-v1"), learning_starts=400, train_freq=(1, "episode"))
    model.learn(201)  # any warning would be an error
    assert (model.num_timesteps, model._n_updates) == (400, 0)
    model = small_dipo()
    model.learn(0)
    model.learn(0, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (0, 0)


class SilentEnvs(VecEnvWrapper):
    """Tells nothing of what it wraps."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":  # SB3 warns where it is missing
            return [None] * self.num_envs
        raise AttributeError(attr_name)


@pytest.mark.parametrize("train_freq", [3, (1, "episode")])
def test_environments_without_a_spec(train_freq: Any) -> None:
    """What a warning would like to know must not fail the run."""
    model = small_dipo(SilentEnvs(tiny_envs()), train_freq=train_freq)
    model.learn(20)
    assert model._n_updates > 0


def test_first_actions_are_uniform() -> None:
    env = TinyEnv(spaces.Box(-2.0, 2.0, (2,)))
    model = small_dipo(env, learning_starts=200)
    calls: list[None] = []
    model.actor.register_forward_hook(lambda *_: calls.append(None))
    model.learn(210)
    assert len(calls) == 10
    assert np.abs(np.mean(env.received[:200], axis=0)).max() < 0.3
    assert np.std(env.received[:200], axis=0) == pytest.approx(4 / 12**0.5, rel=0.15)


# ------------------------------------------------------------------------------------------------- ends of episodes


class OneStepEnv(TinyEnv):
    """Every episode is one step long and gives a reward of 1."""

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1.0, terminated, truncated, info


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("truncate", [True, False])
def test_a_time_limit_is_no_end(truncate: bool, n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo(OneStepEnv(episode_length=1, truncate=truncate), n_steps=n_steps, buffer_size=1, gamma=0.9)
    model.learn(12)
    buffer: Any = model.replay_buffer  # the last transition alone
    with th.no_grad():
        q_values = th.cat(model.critic(th.as_tensor(buffer.observations[0]), th.as_tensor(buffer.actions[0])), dim=1)
    monkeypatch.setattr(model.critic_target, "next_value", lambda observations, actions: th.full((len(actions), 1), 10.0))
    model.train(1, 8)
    target = 1 + 0.9 * 10 if truncate else 1
    assert logged(model, "critic_loss") == pytest.approx(((q_values - target) ** 2).sum().item(), rel=1e-4)


def test_n_step_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo(OneStepEnv(episode_length=1000), n_steps=3, gamma=0.5, learning_rate=0.0, learning_starts=5)
    model.learn(20)
    buffer: Any = model.replay_buffer
    # always draw the first transition, which many others follow
    monkeypatch.setattr(np.random, "randint", lambda low, high=None, size=None: np.zeros(size, dtype=np.int64))
    monkeypatch.setattr(model.critic_target, "next_value", lambda observations, actions: th.full((len(actions), 1), 8.0))
    with th.no_grad():
        q_values = th.cat(model.critic(th.as_tensor(buffer.observations[0]), th.as_tensor(buffer.actions[0])), dim=1)
    model.train(1, 4)
    target = 1 + 0.5 + 0.25 + 0.125 * 8
    assert logged(model, "critic_loss") == pytest.approx(((q_values - target) ** 2).sum().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_same_seed_same_weights(actor: str) -> None:
    runs = []
    for seed in (3, 3, 4):
        model = small_dipo(tiny_envs(2), policy_kwargs={"actor": actor}, seed=seed)
        model.learn(40)
        runs.append(everything_learned(model))
    assert not differences(runs[0], runs[1])
    changed = differences(runs[0], runs[2])
    assert any(name.startswith("actor.") for name in changed) and "actions" in changed


# ------------------------------------------------------------------------------------------------- losses not finite


def poisoned(model: DIPO, where: str) -> None:
    buffer: Any = model.replay_buffer
    getattr(buffer, where)[: buffer.size()] = math.nan


def not_statistics(names: list[str]) -> list[str]:
    """Without those of the numbers that batch normalisation keeps of what passed through it in training mode."""
    return [name for name in names if ".norm.running_" not in name and ".norm.num_batches_" not in name]


@pytest.mark.parametrize("fresh", [True, False], ids=["first update", "later update"])
@pytest.mark.parametrize("where", ["rewards", "observations", "next_observations"])
@pytest.mark.parametrize("extractor", [LinearExtractor, BatchNormExtractor])
def test_critic_loss_that_is_not_finite(extractor: type[Any], where: str, fresh: bool) -> None:
    """Neither its step is taken nor anything after it."""
    model = small_dipo(policy_kwargs={"features_extractor_class": extractor}, gradient_steps=0 if fresh else 1)
    model.learn(40)
    buffer: Any = model.replay_buffer
    values = getattr(buffer, where).copy()
    poisoned(model, where)
    before = everything_learned(model)
    updates = model._n_updates
    with pytest.raises(NonFiniteLossError, match=r"`critic_loss` or its gradient is not finite .*loss nan"):
        model.train(3, 8)
    assert model._n_updates == updates
    changed = differences(before, everything_learned(model))
    assert not_statistics(changed) == [] and not any("target" in name for name in changed)
    if (extractor, where) == (BatchNormExtractor, "observations"):
        return  # its statistics are those of observations that are not finite: as in SAC, they stay
    getattr(buffer, where)[:] = values
    model.train(3, 8)
    assert model._n_updates == updates + 3
    assert all(th.isfinite(value).all() for value in everything_learned(model).values())


CRITICS_PARTS = ("critic.", "critic optimizer")


@pytest.mark.parametrize("fresh", [True, False], ids=["first update", "later update"])
@pytest.mark.parametrize("extractor", [LinearExtractor, BatchNormExtractor])
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_actor_loss_that_is_not_finite(
    extractor: type[Any], share_features_extractor: bool, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic's step, which was finite, stays; the actor, the targets and the replay data are as before."""
    policy_kwargs = {"features_extractor_class": extractor, "share_features_extractor": share_features_extractor}
    model = small_dipo(policy_kwargs=policy_kwargs, gradient_steps=0 if fresh else 1)
    model.learn(40)
    loss = model.actor.loss
    before = everything_learned(model)
    updates = model._n_updates
    monkeypatch.setattr(model.actor, "loss", lambda features, actions: loss(features, actions) * math.nan)
    with pytest.raises(NonFiniteLossError, match=r"`actor_loss` or its gradient is not finite .*loss nan"):
        model.train(3, 8)
    assert model._n_updates == updates
    after = everything_learned(model)
    shared = ("actor.features_extractor",) if share_features_extractor else ()
    changed = not_statistics(differences(before, after))
    assert [name for name in changed if not name.startswith((*CRITICS_PARTS, *shared))] == []
    assert any(name.startswith("critic.qf0") for name in changed)
    assert float(after["critic optimizer 0 step"]) == (1 if fresh else updates + 1)  # one step, and no more
    assert all(th.isfinite(value).all() for value in after.values())
    monkeypatch.setattr(model.actor, "loss", loss)
    model.train(3, 8)
    assert model._n_updates == updates + 3
    assert all(th.isfinite(value).all() for value in everything_learned(model).values())


@pytest.mark.parametrize("part", ["actor", "critic"])
@pytest.mark.parametrize(
    "optimizer_class, optimizer_kwargs",
    [
        (th.optim.SGD, {}),
        (th.optim.SGD, {"momentum": 0.9}),
        (th.optim.RMSprop, {"momentum": 0.9}),
        (RMSpropTFLike, {"momentum": 0.9}),
        (th.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    ],
)
def test_other_optimizers_take_no_step(
    optimizer_class: type[th.optim.Optimizer],
    optimizer_kwargs: dict[str, Any],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy_kwargs = {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    model = small_dipo(policy_kwargs=policy_kwargs)
    model.learn(20)
    before = everything_learned(model)
    network = getattr(model, part)
    loss = network.loss
    monkeypatch.setattr(network, "loss", lambda *arguments: loss(*arguments) * math.nan)
    with pytest.raises(NonFiniteLossError, match=f"`{part}_loss`"):
        model.train(1, 8)
    changed = differences(before, everything_learned(model))
    assert [name for name in changed if not name.startswith(CRITICS_PARTS)] == []
    assert (changed == []) == (part == "critic")


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_loss_is_finite_but_its_gradient_is_not(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo()
    model.learn(20)
    before = everything_learned(model)
    network = getattr(model, part)
    parameter = next(network.parameters())
    loss = network.loss
    # sqrt has an infinite slope at 0, where its value is 0
    zero = lambda: (parameter.sum() * 0).abs().sqrt()  # noqa: E731
    monkeypatch.setattr(network, "loss", lambda *arguments: loss(*arguments) + zero())
    with pytest.raises(NonFiniteLossError, match=f"`{part}_loss` or its gradient is not finite .*gradient norm nan"):
        model.train(1, 8)
    changed = differences(before, everything_learned(model))
    assert [name for name in changed if part == "critic" or not name.startswith(CRITICS_PARTS)] == []


def test_infinite_observation_of_the_actors_minibatch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dipo()
    model.learn(20)
    before = everything_learned(model)
    buffer: Any = model.replay_buffer
    sample_improved = buffer.sample_improved

    def poisoned_sample(batch_size: int, env: Any = None) -> Any:
        batch = sample_improved(batch_size, env)
        return batch._replace(observations=batch.observations * math.inf)

    monkeypatch.setattr(buffer, "sample_improved", poisoned_sample)
    with pytest.raises(NonFiniteLossError, match="`actor_loss`"):
        model.train(1, 8)
    changed = differences(before, everything_learned(model))
    assert [name for name in changed if not name.startswith(CRITICS_PARTS)] == []


class NaNRewardEnv(TinyEnv):
    """The 25th reward is not a number."""

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        return observation, math.nan if len(self.received) == 25 else reward, *rest


def test_learning_stops_at_a_reward_that_is_not_finite() -> None:
    model = small_dipo(NaNRewardEnv(), batch_size=64)
    with pytest.raises(NonFiniteLossError, match="`critic_loss`"):
        model.learn(100)
    assert issubclass(NonFiniteLossError, ValueError)
    assert 25 <= model.num_timesteps < 35
    weights = {name: value for name, value in everything_learned(model).items() if "actions" not in name}
    assert all(th.isfinite(value).all() for value in weights.values())


# ------------------------------------------------------------------------------------------------- manners


def test_learning_leaves_pytorch_as_it_was() -> None:
    def settings() -> list[Any]:
        return [
            th.get_default_dtype(),
            th.get_num_threads(),
            th.is_grad_enabled(),
            th.are_deterministic_algorithms_enabled(),
            th.get_float32_matmul_precision(),
            th.backends.cudnn.benchmark,
            th.backends.cudnn.deterministic,
            np.geterr(),
        ]

    before = settings()
    model = small_dipo()
    model.learn(20)
    model.predict(np.zeros(3, dtype=np.float32), deterministic=True)
    assert settings() == before


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model = small_dipo()
    model.learn(60)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_registered_environment_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DIPO("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    assert isinstance(model.observation_space, gym.spaces.Box) and model.observation_space.shape == (3,)


def test_defaults_are_the_papers() -> None:
    model = DIPO("MlpPolicy", TinyEnv(), buffer_size=10, device="cpu")
    critic: Any = model.critic
    assert [layer.out_features for layer in critic.q_networks[0] if isinstance(layer, th.nn.Linear)] == [256, 256, 256, 1]
    assert len(critic.q_networks) == 2
    assert model.actor.optimizer.defaults["eps"] == 1e-5
    every_step = Sampler(noise_scale=1.0, solver="ddpm", num_inference_steps=None, timestep_spacing="linspace", eta=0.0)
    assert model.policy.samplers == {
        "behaviour": every_step,
        "target": every_step,
        "evaluation": replace(every_step, noise_scale=0.0),
    }
