"""Dropout and batch normalisation: in training mode within train() alone, and never in the targets."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from both import both, mode, observations_of, silent, small
from envs import BatchNormExtractor, LinearExtractor, tiny_envs
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_dipo import DIPO


class DropoutExtractor(LinearExtractor):
    """Drops half of its features."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 16):
        super().__init__(observation_space, features_dim)
        self.dropout = th.nn.Dropout(0.5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(super().forward(observations))


EXTRACTORS = [DropoutExtractor, BatchNormExtractor]


def modes_of(model: Any) -> dict[str, bool]:
    """Whether each network and all of its parts are in training mode; they must agree."""
    modes = {}
    for name in ("actor", "actor_target", "critic", "critic_target"):
        if hasattr(model, name):
            network = getattr(model, name)
            assert len({part.training for part in network.modules()}) == 1, name
            modes[name] = network.training
    return modes


def statistics_of(network: Any) -> list[th.Tensor]:
    return [value.clone() for name, value in network.state_dict().items() if "running_" in name or "num_batches" in name]


class WatchModes(BaseCallback):
    """Notes the modes at every step of the environment, right after the policy has acted."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[dict[str, bool]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps > self.model.learning_starts:  # type: ignore[attr-defined]
            self.noted.append({"actor": modes_of(self.model)["actor"], **_targets(self.model)})
        return True


def _targets(model: Any) -> dict[str, bool]:
    return {name: training for name, training in modes_of(model).items() if "target" in name}


@pytest.mark.parametrize("extractor", EXTRACTORS)
@both
def test_acting_is_in_evaluation_mode(algorithm: type[Any], extractor: type[Any]) -> None:
    model = small(algorithm, tiny_envs(2), policy_kwargs={"features_extractor_class": extractor})
    model.learn(30, callback=(watch := WatchModes()))
    assert len(watch.noted) >= 9
    assert not any(training for noted in watch.noted for training in noted.values())


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("share_features_extractor", [False, True])
@both
def test_learning_is_in_training_mode(
    algorithm: type[Any], share_features_extractor: bool, extractor: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_kwargs = {"features_extractor_class": extractor, "share_features_extractor": share_features_extractor}
    model = small(algorithm, policy_kwargs=policy_kwargs)
    model.learn(15)
    noted = []
    optimizers = {"actor": model.actor.optimizer, "critic": model.critic.optimizer}
    for name, optimizer in optimizers.items():

        def step(*args: Any, name: str = name, step: Any = optimizer.step) -> Any:
            noted.append((name, modes_of(model)))
            return step(*args)

        monkeypatch.setattr(optimizer, "step", step)
    mode(model)
    silent(model).train(1, 8)
    assert {name for name, _ in noted} == {"actor", "critic"}
    for name, modes in noted:
        assert modes[name] and not any(modes[target] for target in modes if "target" in target)
        assert modes["actor"] and modes["critic"]


@pytest.mark.parametrize("extractor", EXTRACTORS)
@both
def test_predictions_are_in_evaluation_mode(algorithm: type[Any], extractor: type[Any]) -> None:
    model = small(algorithm, policy_kwargs={"features_extractor_class": extractor})
    model.learn(20)
    model.policy.set_training_mode(True)
    before = statistics_of(model.policy)
    observations = observations_of(model, 6)
    actions = mode(model, observations)
    assert not model.actor.training
    np.testing.assert_array_equal(mode(model, observations), actions)
    # a row does not depend on the others
    np.testing.assert_allclose(mode(model, observations[:1])[0], actions[0], atol=1e-5)
    for _ in range(3):
        model.predict(observations)
    assert all(map(th.equal, before, statistics_of(model.policy)))


@both
def test_set_training_mode(algorithm: type[Any]) -> None:
    model = small(algorithm, policy_kwargs={"features_extractor_class": BatchNormExtractor})
    for training in (True, False):
        model.policy.set_training_mode(training)
        assert model.policy.training is training
        modes = modes_of(model)
        assert {modes["actor"], modes["critic"]} == {training}
        assert not any(modes[name] for name in modes if "target" in name)


@both
def test_a_part_in_another_mode_is_put_right(algorithm: type[Any]) -> None:
    model = small(algorithm)
    for training in (True, False):
        model.policy.set_training_mode(training)
        for network in (model.actor, model.critic):
            list(network.modules())[-1].train(not training)
        model.policy.set_training_mode(training)
        modes = modes_of(model)
        assert {modes["actor"], modes["critic"]} == {training}


@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_acting_and_targets_leave_the_running_statistics_alone(share_features_extractor: bool) -> None:
    """With learning rates of zero only the statistics of what is trained move, and once for each use in training."""
    model: DIPO = small(
        DIPO,
        policy_kwargs={"features_extractor_class": BatchNormExtractor, "share_features_extractor": share_features_extractor},
        learning_rate=0.0,
        tau=0.0,
        actor_target_update_interval=1000,
    )
    model.learn(12)  # the actor's target moves in update 0
    silent(model)
    before = {name: statistics_of(getattr(model, name)) for name in ("actor", "actor_target", "critic", "critic_target")}
    model.train(1, 8)

    def batches(name: str) -> int:
        return sum(
            int(new - old) for old, new in zip(before[name], statistics_of(getattr(model, name)), strict=True) if old.ndim == 0
        )

    # critic: Q of the actions taken and the action gradient; actor: its loss
    assert batches("critic") == (3 if share_features_extractor else 2)
    assert batches("actor") == (3 if share_features_extractor else 1)
    # the targets take over the running mean and variance, not the number of batches, as in SAC
    assert batches("critic_target") == batches("actor_target") == 0


@both
def test_statistics_are_saved(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, policy_kwargs={"features_extractor_class": BatchNormExtractor})
    model.learn(20)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    statistics = statistics_of(model.policy)
    assert max(float(value.abs().max()) for value in statistics) > 0
    assert all(map(th.equal, statistics, statistics_of(loaded.policy)))
    np.testing.assert_array_equal(mode(loaded), mode(model))
