"""How often is learned, and at which rates: as SAC."""

from typing import Any

import pytest
from both import ALGORITHMS, both, small
from envs import tiny_envs
from stable_baselines3.common.callbacks import BaseCallback


@pytest.mark.parametrize("train_freq, gradient_steps", [((1, "episode"), -1), ((3, "step"), 2), (4, -1), (1, 3)], ids=str)
@pytest.mark.parametrize("n_envs", [1, 2])
@both
def test_number_of_updates(algorithm: type[Any], n_envs: int, train_freq: Any, gradient_steps: int) -> None:
    if isinstance(train_freq, tuple) and train_freq[1] == "episode" and n_envs > 1:
        with pytest.raises(AssertionError, match="You must use only one env"):
            small(algorithm, tiny_envs(n_envs), train_freq=train_freq).learn(30)
        return
    model = small(algorithm, tiny_envs(n_envs), train_freq=train_freq, gradient_steps=gradient_steps)
    model.learn(48)
    frequency = {(1, "episode"): 5, (3, "step"): 3, 4: 4, 1: 1}[train_freq]
    rollouts = -(-48 // (frequency * n_envs))
    without = 10 // (frequency * n_envs)
    # gradient_steps=-1: as many as steps in all environments
    updates = gradient_steps if gradient_steps > 0 else frequency * n_envs
    assert model._n_updates == (rollouts - without) * updates


class Rates(BaseCallback):
    """Notes the actor's and the critics' learning rates after each update."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[int, float, float]] = []

    def _on_step(self) -> bool:
        model: Any = self.model
        if model._n_updates:
            rates = [optimizer.param_groups[0]["lr"] for optimizer in (model.actor.optimizer, model.critic.optimizer)]
            self.noted.append((self.num_timesteps, rates[0], rates[1]))
        return True


@pytest.mark.parametrize("n_envs", [1, 2])
def test_schedules_are_read_as_by_sac(n_envs: int) -> None:
    """Where DIPO is given none for the critics, both rates are SAC's at every step, in what follows learn(), too."""
    noted = []
    for algorithm in ALGORITHMS:
        model = small(algorithm, tiny_envs(n_envs), learning_rate=lambda progress: 1e-3 * progress**2)
        model.learn(30, callback=(rates := Rates()))
        model.learn(30, callback=rates, reset_num_timesteps=False)
        model.learn(20, callback=rates)
        noted.append(rates.noted)
    assert noted[0] == noted[1] and len({rate for _, rate, _ in noted[0]}) > 15
