"""Faults that were seen once: of learning rates, of a warning's bookkeeping, of attributes, classes and samplers."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import LinearExtractor, TinyEnv, small_dipo
from gymnasium import spaces
from helpers import MODES
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from torch import nn
from torch.nn import functional as F

from sb3_dipo import DIPO, DiffusionActor, DIPOPolicy, EnsembleCritic, MLPActor, Sampler, VAEActor

modes = pytest.mark.parametrize("accelerate", MODES)

# ------------------------------------------------------------------------------------------------- A8: learning rates


def rates(model: DIPO) -> tuple[float, float]:
    """Of the actor's and of the critic's optimizer."""
    actor, critic = (float(network.optimizer.param_groups[0]["lr"]) for network in (model.actor, model.critic))
    return actor, critic


@modes
def test_a_schedule_that_is_replaced_between_two_learns(accelerate: str) -> None:
    """It is the critics' as well, as long as they have none of their own."""
    model = small_dipo(accelerate=accelerate, learning_rate=3e-4)
    model.learn(15)
    assert rates(model) == (3e-4, 3e-4)
    model.lr_schedule = lambda _: 1e-9
    before = [parameter.detach().clone() for parameter in (*model.actor.parameters(), *model.critic.parameters())]
    model.learn(15, reset_num_timesteps=False)
    assert rates(model) == (1e-9, 1e-9)
    after = [*model.actor.parameters(), *model.critic.parameters()]
    assert max(float((now.detach() - then).abs().max()) for now, then in zip(after, before, strict=True)) < 1e-6


def test_a_learning_rate_that_is_given_again_on_loading(tmp_path: Path) -> None:
    """As the documentation of SB3 does it, and RL Zoo: `custom_objects` with schedules of their own."""
    small_dipo(learning_rate=3e-4).save(tmp_path / "model")
    new = {"learning_rate": 1e-3, "lr_schedule": lambda _: 1e-5}
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), device="cpu", custom_objects=new)
    loaded.learn(15)
    assert rates(loaded)[0] == rates(loaded)[1]
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), device="cpu", learning_rate=2e-3)
    loaded.learn(15)
    assert rates(loaded) == (2e-3, 2e-3)


@modes
def test_the_critics_own_learning_rate_stays_theirs(accelerate: str) -> None:
    model = small_dipo(accelerate=accelerate, learning_rate=3e-4, qf_learning_rate=lambda progress: 1e-2 * (2 - progress))
    model.learn(20)
    model.lr_schedule = lambda _: 1e-9
    model.learn(20)
    actor, critic = rates(model)
    assert actor == 1e-9 and critic == 2e-2
    model.qf_learning_rate = None
    model._setup_lr_schedule()  # as SB3 does it when a model is loaded
    model.learn(15)
    assert rates(model) == (3e-4, 3e-4)


@modes
def test_a_schedule_is_the_same_function_for_both(accelerate: str) -> None:
    seen: list[float] = []

    def schedule(progress: float) -> float:
        seen.append(progress)
        return 1e-3 * progress + 1e-5

    model = small_dipo(accelerate=accelerate, learning_rate=schedule)
    model.learn(40)
    actor, critic = rates(model)
    assert actor == critic == pytest.approx(1e-3 * min(seen) + 1e-5)


def test_a_callback_may_change_the_schedule() -> None:
    model = small_dipo()

    def change(scope: dict[str, Any], _: Any) -> bool:
        model.lr_schedule = lambda _: 1e-7
        return True

    model.learn(20, callback=change)
    assert rates(model) == (1e-7, 1e-7)


# ------------------------------------------------------------------------------------------------- A10: bookkeeping


class WithoutSpec(TinyEnv):
    """As an environment that was never registered, and that says so rudely."""

    @property
    def spec(self) -> Any:
        raise RuntimeError("nobody knows me")

    @spec.setter
    def spec(self, value: Any) -> None: ...


class Bare(VecEnv):
    """A VecEnv of one's own that has no environments to ask."""

    render_mode = None

    def __init__(self) -> None:
        self.inner = TinyEnv()
        super().__init__(1, self.inner.observation_space, self.inner.action_space)

    def reset(self) -> Any:
        return self.inner.reset()[0][None]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        obs, reward, terminated, truncated, info = self.inner.step(self.actions[0])
        if terminated or truncated:
            info = {**info, "terminal_observation": obs, "TimeLimit.truncated": truncated, "episode": {"r": 0.0, "l": 5}}
            obs = self.inner.reset()[0]
        return obs[None], np.array([reward]), np.array([terminated or truncated]), [info]

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":  # SB3's own question
            return [None]
        raise NotImplementedError

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False]


@pytest.mark.parametrize("train_freq", [1, 3, (1, "episode"), (2, "episode"), (7, "step")], ids=str)
@pytest.mark.parametrize("make", [Bare, lambda: DummyVecEnv([WithoutSpec])], ids=["bare", "without a spec"])
def test_environments_that_cannot_be_asked(make: Callable[[], VecEnv], train_freq: Any) -> None:
    model = small_dipo(make(), train_freq=train_freq)
    model.learn(25)
    assert model._n_updates > 0


def register_and_make() -> gym.Env[Any, Any]:
    """In the worker alone."""
    gym.register("sb3_dipo_tests/InTheWorker-v0", lambda **_: TinyEnv(episode_length=100), max_episode_steps=7)
    return gym.make("sb3_dipo_tests/InTheWorker-v0")


@pytest.mark.parametrize("train_freq", [(1, "episode"), 3], ids=str)
def test_an_environment_that_only_the_worker_knows(train_freq: Any) -> None:
    """Its ``spec`` names what the registry of this process does not hold."""
    env = SubprocVecEnv([register_and_make], start_method="spawn")
    try:
        assert "sb3_dipo_tests/InTheWorker-v0" not in gym.registry
        model = small_dipo(env, train_freq=train_freq)
        model.learn(15)
        assert model._n_updates > 0
    finally:
        env.close()


def test_learn_0_does_not_warn() -> None:
    """Of no steps nothing is expected: it is a way to set an agent up."""
    model = small_dipo(learning_starts=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(0)
        model.learn(0, reset_num_timesteps=False)
    with pytest.warns(UserWarning, match="Nothing will be learned"):
        model.learn(1)
    assert model.num_timesteps == 1


# ------------------------------------------------------------------------------------------------- A14: attributes


class Accelerated(LinearExtractor):
    """A user's own, with attributes whose names the package uses, too."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 4):
        super().__init__(observation_space, features_dim)
        self.accelerate = 9.81
        self.ops = "operations"
        self.sampler = "everyone"
        self.samplers = ["me"]
        self.linear.accelerate = "mine"  # type: ignore[assignment]
        self.linear.ops = "mine"  # type: ignore[assignment]


@modes
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_attributes_of_a_users_extractor_are_left_alone(
    accelerate: str, share_features_extractor: bool, tmp_path: Path
) -> None:
    options = {"features_extractor_class": Accelerated, "share_features_extractor": share_features_extractor}
    model = small_dipo(accelerate=accelerate, policy_kwargs=options)
    model.learn(20)
    model.policy.set_accelerate("off")
    model.policy.set_accelerate(accelerate)
    model.policy.set_sampler(noise_scale=0.5)
    model.save(tmp_path / "model")
    for policy in (model.policy, DIPO.load(tmp_path / "model", device="cpu").policy):
        extractors = [module for module in policy.modules() if isinstance(module, Accelerated)]
        assert len(extractors) == (2 if share_features_extractor else 4)
        for extractor in extractors:
            found = (extractor.accelerate, extractor.ops, extractor.sampler, extractor.samplers)
            assert found == (9.81, "operations", "everyone", ["me"])
            assert extractor.linear.accelerate == extractor.linear.ops == "mine"


# ------------------------------------------------------------------------------------------------- B1: classes


class Squashed(MLPActor):
    """An actor of one's own, with an option of its own and a sampler's."""

    options = (*MLPActor.options, "limit")  # type: ignore[assignment, unused-ignore]

    def __init__(self, *args: Any, limit: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limit = limit

    def sample(self, *args: Any, **kwargs: Any) -> th.Tensor:
        return super().sample(*args, **kwargs) * self.limit

    def deterministic_action(self, *args: Any, **kwargs: Any) -> th.Tensor:
        return super().deterministic_action(*args, **kwargs) * self.limit


class Median(EnsembleCritic):
    """A critic of one's own: what counts is the median, and the loss is Huber's."""

    options = (*EnsembleCritic.options, "delta")  # type: ignore[assignment, unused-ignore]

    def __init__(self, *args: Any, delta: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.delta = delta
        self.asked = 0

    def next_value(self, obs: Any, actions: th.Tensor) -> th.Tensor:
        self.asked += 1
        with th.no_grad():
            return th.cat(self(obs, actions), dim=1).median(dim=1, keepdim=True)[0]

    def loss(self, obs: Any, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        q_values = th.cat(self(obs, actions), dim=1)
        self.q_value = q_values.detach().mean()
        return F.huber_loss(q_values, targets.expand_as(q_values), delta=self.delta)

    def objective(self, obs: Any) -> Callable[[th.Tensor], th.Tensor]:
        return lambda actions: th.cat(self(obs, actions), dim=1).median(dim=1, keepdim=True)[0]


@modes
def test_actor_and_critic_as_classes(accelerate: str, tmp_path: Path) -> None:
    """With options of their own: they learn, act, and are saved."""
    options = {"actor": Squashed, "critic": Median, "limit": 0.25, "delta": 0.1, "n_critics": 3, "noise_scale": 0.5}
    model = small_dipo(accelerate=accelerate, policy_kwargs=options)
    assert isinstance(model.actor, Squashed) and isinstance(model.critic_target, Median)
    before = [parameter.clone() for parameter in (*model.actor.parameters(), *model.critic.parameters())]
    model.learn(30)
    after = [*model.actor.parameters(), *model.critic.parameters()]
    assert all(not th.equal(now, then) for now, then in zip(after, before, strict=True))
    assert model.critic_target.asked == model._n_updates == 20 and model.critic.asked == 0
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.pkl"))
    observations = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    expected = model.predict(observations, deterministic=True)[0]
    assert 0 < np.abs(expected).max() <= 0.25
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), device="cpu")
    for policy in (loaded.policy, DIPOPolicy.load(str(tmp_path / "policy.pkl")), pickle.loads(pickle.dumps(model.policy))):
        np.testing.assert_array_equal(policy.predict(observations, deterministic=True)[0], expected)
        assert isinstance(policy.actor, Squashed) and isinstance(policy.critic, Median)
        assert (policy.actor.limit, policy.critic.delta, policy.critic.n_critics) == (0.25, 0.1, 3)
        assert policy.samplers["behaviour"].noise_scale == 0.5
    loaded.learn(5, reset_num_timesteps=False)


def test_the_packages_own_classes_are_their_names() -> None:
    for name, kind in (("diffusion", DiffusionActor), ("vae", VAEActor), ("mlp", MLPActor)):
        agents = [small_dipo(policy_kwargs={"actor": each, "net_arch": [8]}) for each in (name, kind)]
        assert type(agents[0].actor) is type(agents[1].actor) is kind
        assert agents[0].policy.sampler_settings() == agents[1].policy.sampler_settings()
    agents = [small_dipo(policy_kwargs={"critic": each, "n_critics": 4}) for each in ("ensemble", EnsembleCritic)]
    assert type(agents[0].critic) is type(agents[1].critic) is EnsembleCritic
    assert len(agents[1].critic(th.zeros(2, 3), th.zeros(2, 2))) == 4


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"actor": "mpl"}, ValueError, "`actor`.*'diffusion'.*'vae', 'mlp'"),
        ({"critic": "ensembel"}, ValueError, "`critic`.*'ensemble'"),
        ({"actor": EnsembleCritic}, ValueError, "`actor`.*GenerativeActor"),
        ({"critic": MLPActor}, ValueError, "`critic`.*Critic"),
        ({"critic": nn.Linear}, ValueError, "`critic`.*Critic"),
        ({"actor": None}, ValueError, "`actor`"),
        ({"actor": Squashed, "limt": 1.0}, TypeError, "limt"),
        ({"actor": Squashed, "latent_dim": 3}, ValueError, "`latent_dim`.*'vae'"),
        ({"actor": "mlp", "limit": 1.0}, TypeError, "limit"),
        ({"critic": "ensemble", "delta": 1.0}, TypeError, "delta"),
        ({"critic": Median, "n_critics": 0}, ValueError, "`n_critics`"),
        ({"actor": Squashed, "noise_scale": -1}, ValueError, "`noise_scale`"),
    ],
    ids=str,
)
def test_wrong_classes_and_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_dipo(policy_kwargs={"net_arch": [8], **({} if "actor" in options else {"actor": "mlp"}), **options})


# ------------------------------------------------------------------------------------------------- samplers


def test_a_sampler_is_set_for_one_use_alone() -> None:
    model = small_dipo()
    uses = ("behaviour", "target", "evaluation")
    for i, use in enumerate(uses):
        before = dict(model.policy.samplers)
        model.policy.set_sampler(use, num_inference_steps=i + 1)
        assert model.policy.samplers[use].num_inference_steps == i + 1
        assert {other: model.policy.samplers[other] for other in uses if other != use} == {
            other: before[other] for other in uses if other != use
        }
    with pytest.raises(AttributeError):
        model.policy.samplers["target"].eta = 0.5  # type: ignore[misc]
    assert model.actor.sampler == Sampler()  # what the actor was made with


def test_each_use_takes_its_own_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acting, TD targets and evaluation: told apart by the number of steps that they take."""
    model = small_dipo(accelerate="off")
    for i, use in enumerate(("behaviour", "target", "evaluation")):
        model.policy.set_sampler(use, num_inference_steps=i + 2)
    steps: list[int] = []
    for network in (model.actor, model.actor_target):
        network.noise_network.register_forward_hook(lambda *_: steps.append(1))  # type: ignore[union-attr]
    for deterministic, expected in ((False, 2), (True, 4)):
        steps.clear()
        model.predict(np.zeros((5, 3), np.float32), deterministic=deterministic)
        assert len(steps) == expected
    model.learn(11)
    steps.clear()
    model.train(1, 8)
    assert len(steps) == 3 + 1  # the target's steps, and one call of the loss


def test_policies_do_not_share_samplers(tmp_path: Path) -> None:
    """Nor do an agent and its copies, or two that were loaded from one file."""
    first, second = small_dipo(), small_dipo()
    first.save(tmp_path / "model")
    loaded = [DIPO.load(tmp_path / "model", device="cpu") for _ in range(2)]
    others = [second.policy, *(each.policy for each in loaded), pickle.loads(pickle.dumps(first.policy))]
    first.policy.set_sampler(solver="ddim", eta=0.5, num_inference_steps=2)
    loaded[0].policy.set_sampler("behaviour", noise_scale=0.0)
    for policy in (others[0], *others[2:]):
        assert policy.samplers["behaviour"] == policy.samplers["target"] == Sampler()
    assert others[1].samplers["behaviour"] == Sampler(noise_scale=0.0)
    assert first.policy.samplers["target"] == Sampler(solver="ddim", eta=0.5, num_inference_steps=2)
    # the arguments of the constructor are the user's
    kwargs = {"net_arch": [8], "num_train_timesteps": 5, "solver": "ddim"}
    model = DIPO("MlpPolicy", TinyEnv(), policy_kwargs=kwargs, device="cpu")
    model.policy.set_sampler(solver="dpmpp_2m")
    assert kwargs == {"net_arch": [8], "num_train_timesteps": 5, "solver": "ddim"}


def test_a_wrong_sampler_changes_nothing_anywhere() -> None:
    model = small_dipo()
    model.policy.set_sampler("target", num_inference_steps=3)
    before = dict(model.policy.samplers)
    wrong: list[dict[str, Any]] = [
        {"solver": "euler"},
        {"num_inference_steps": 99},
        {"eta": 2.0},
        {"noise_scale": -1.0},
        {"steps": 3},
    ]
    for changes in wrong:
        with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]):
            model.policy.set_sampler(**{"noise_scale": 0.5, **changes})
        assert model.policy.samplers == before
