"""Golden vectors: the package computes the same function as the authors' implementation (run in float32 on the CPU)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import MODES, GivenRowsBuffer, displacement_error, fill, give_noise, make_agent, networks, set_weights
from naive_dipo import Memory, NaiveDIPO, Settings

from sb3_dipo import DIPO, DiffusionActor, Sampler, improve_actions
from sb3_dipo.diffusion import SOLVERS, make_schedule, time_grid


def assert_close(actual: th.Tensor, expected: th.Tensor, rtol: float = 0.0, atol: float = 1e-5) -> None:
    """The tolerance of one forward pass, unless said otherwise."""
    th.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


class Golden:
    """A golden file, and agents with its weights."""

    def __init__(self, path: Path, accelerate: str):
        self.accelerate = accelerate
        self.arrays = dict(np.load(path, allow_pickle=False))
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def __getitem__(self, key: str) -> th.Tensor:
        return th.from_numpy(self.arrays[key])

    def weights(self, *prefixes: str) -> list[th.Tensor]:
        return [th.from_numpy(value) for prefix in prefixes for key, value in self.arrays.items() if key.startswith(prefix)]

    def agent(self, actor: str = "diffusion", **kwargs: Any) -> DIPO:
        meta, hidden = self.meta, self.meta["hidden"]
        options: dict[str, dict[str, Any]] = {
            "diffusion": {
                "num_train_timesteps": meta["K"],
                "beta_schedule": meta["schedule"],
                "time_embed_dim": meta["time_dim"],
            },
            "vae": {"latent_dim": hidden},
            "mlp": {},
        }
        agent = make_agent(
            meta["obs_dim"],
            meta["action_dim"],
            learning_rate=meta["lr"],
            batch_size=meta["batch"],
            tau=meta["tau"],
            action_lr=meta["action_lr"],
            action_gradient_steps=meta["action_gradient_steps"],
            action_grad_norm_ratio=meta["action_grad_norm"] / meta["action_dim"],
            max_grad_norm=meta["max_grad_norm"],
            accelerate=self.accelerate,
            policy_kwargs={"actor": actor, "net_arch": [hidden] * 3, **options[actor]},
            **kwargs,
        )
        actor_weights = {
            "diffusion": self.weights("actor."),
            "vae": self.weights("vae.encoder", "vae.fc_mu", "vae.fc_var", "vae.decoder", "vae.final_layer"),
            "mlp": self.weights("mlp.mid_layer", "mlp.final_layer"),
        }[actor]
        nets = networks(agent)
        for name in ("actor", "actor_target"):
            set_weights(nets[name], actor_weights)
        for name in ("critic", "critic_target"):
            set_weights(nets[name], self.weights("critic.q1_model", "critic.q2_model"))
        return agent


@pytest.fixture(scope="module", params=["hopper_cosine", "cheetah_vp"])
def file(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(file: str) -> Golden:
    """For what does not depend on how networks are computed."""
    return Golden(Path(__file__).parent / "data" / f"{file}.npz", "off")


@pytest.fixture(scope="module", params=MODES)
def golden(file: str, request: pytest.FixtureRequest) -> Golden:
    return Golden(Path(__file__).parent / "data" / f"{file}.npz", request.param)


@pytest.mark.parametrize("num_train_timesteps", [5, 20, 50, 100])
@pytest.mark.parametrize("beta_schedule", ["cosine", "linear", "vp"])
def test_schedules(plain: Golden, beta_schedule: str, num_train_timesteps: int) -> None:
    expected = plain[f"schedule.{beta_schedule}.{num_train_timesteps}.betas"]
    assert_close(make_schedule(beta_schedule, num_train_timesteps).betas.float(), expected, rtol=1e-6, atol=0.0)


def test_coefficient_tables(plain: Golden) -> None:
    schedule = make_schedule(plain.meta["schedule"], plain.meta["K"])
    table = SOLVERS["ddpm"](schedule, time_grid(plain.meta["K"], plain.meta["K"]), 1.0)
    rows = th.tensor(table.steps[::-1], dtype=th.float64)  # the golden tables count k upwards
    alpha_t, sigma_t, a, b, c, s = rows.unbind(1)
    assert_close(schedule.alphas_cumprod.float(), plain["process.alphas_cumprod"], rtol=2e-6, atol=0.0)
    assert_close((1 / alpha_t).float(), plain["process.sqrt_recip_alphas_cumprod"], rtol=2e-6, atol=0.0)
    # theirs is sqrt(1 / abar - 1) in float32, which rounds at the size of 1
    assert_close((sigma_t / alpha_t).float(), plain["process.sqrt_recipm1_alphas_cumprod"], rtol=2e-6, atol=1e-6)
    assert_close(b.float(), plain["process.posterior_mean_coef1"], rtol=2e-6, atol=0.0)
    assert_close(a.float(), plain["process.posterior_mean_coef2"], rtol=2e-6, atol=0.0)
    assert_close((s**2).float(), plain["process.posterior_variance"], rtol=2e-6, atol=0.0)
    assert not c.any()


def test_noise_prediction(golden: Golden) -> None:
    agent = golden.agent()
    assert isinstance(agent.actor, DiffusionActor)
    with th.no_grad():
        noise_pred = agent.actor.noise_network(golden["eps.x"], golden["eps.k"], golden["obs"])
    assert_close(noise_pred, golden["eps.out"])


@pytest.mark.parametrize("kind", ["stochastic", "noise_free"])
def test_sampling(golden: Golden, kind: str) -> None:
    agent = golden.agent()
    with th.no_grad():
        features = agent.actor.extract_features(golden["obs"])
        actions = agent.actor.sample(
            features,
            initial_noise=golden[f"sample.{kind}.x_K"],
            noise=golden[f"sample.{kind}.z"],
            sampler=Sampler(noise_scale=0.0 if kind == "noise_free" else 1.0),
        )
    assert_close(actions, golden[f"sample.{kind}.out"])


def test_denoising_loss_and_its_gradient(golden: Golden) -> None:
    agent = golden.agent()
    features = agent.actor.extract_features(golden["obs"])
    loss = agent.actor.loss(features, golden["actions"], timesteps=golden["loss.k"], noise=golden["loss.noise"])
    loss.backward()
    gradients = [parameter.grad for parameter in agent.actor.parameters() if parameter.grad is not None]
    grad_l2 = th.cat([gradient.flatten() for gradient in gradients]).norm()
    assert_close(loss.detach(), golden["loss.value"])
    assert_close(grad_l2, golden["loss.grad_l2"])


def test_critics(golden: Golden) -> None:
    agent = golden.agent()
    with th.no_grad():
        q1, q2 = agent.critic(golden["obs"], golden["actions"])
        objective = agent.critic.objective(golden["obs"])(golden["actions"])
    assert_close(q1, golden["critic.q1.out"])
    assert_close(q2, golden["critic.q2.out"])
    q_min = th.minimum(golden["critic.q1.out"], golden["critic.q2.out"])
    assert_close(objective, q_min)
    assert_close(agent.critic.next_value(golden["obs"], golden["actions"]), q_min)


def test_action_gradient(golden: Golden) -> None:
    agent, meta = golden.agent(), golden.meta
    improved = improve_actions(
        agent.critic.objective(golden["obs"]),
        golden["actions"],
        action_lr=meta["action_lr"],
        action_gradient_steps=meta["action_gradient_steps"],
        action_grad_norm_ratio=meta["action_grad_norm"] / meta["action_dim"],
    )
    assert (golden["action_gradient.out"] - golden["actions"]).abs().max() > 0.1
    assert_close(improved, golden["action_gradient.out"])


def test_three_whole_updates(golden: Golden) -> None:
    """Weights by displacement, network by network: weights that never moved would pass a comparison of weights."""
    agent = golden.agent(replay_buffer_class=GivenRowsBuffer)
    buffer = agent.replay_buffer
    assert isinstance(buffer, GivenRowsBuffer)
    discount_mask = golden.arrays["replay.discount_mask"]
    agent.gamma = 0.99
    arrays = [golden.arrays[f"replay.{name}"] for name in ("observations", "actions", "rewards", "next_observations")]
    obs, actions, rewards, next_obs = (array[:, None] for array in arrays)
    fill(agent, obs, actions, rewards[..., 0], next_obs, 1 - discount_mask / agent.gamma)

    buffer.critic_rows = list(golden.arrays["update.critic_indices"])
    buffer.actor_rows = list(golden.arrays["update.actor_indices"])
    give_noise(
        agent,
        [{"initial_noise": x_K, "noise": z} for x_K, z in zip(golden["update.x_K"], golden["update.z"], strict=True)],
        [{"timesteps": k, "noise": z} for k, z in zip(golden["update.k"], golden["update.noise"], strict=True)],
    )
    start = {name: [p.detach().clone() for p in parameters] for name, parameters in networks(agent).items()}
    for update in range(3):
        agent.train(gradient_steps=1, batch_size=golden.meta["batch"])
        expected = golden.arrays[f"update.{update}.improved_actions"]
        np.testing.assert_allclose(buffer.improved_actions[: len(expected), 0], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(buffer.actions[: len(expected), 0], golden.arrays["replay.actions"])

    for name, parameters in networks(agent).items():
        expected_weights = golden.weights(f"update.final.{name}.")
        # a target moves so little in three updates that the rounding of float32 shows; the critic's bound is tight, because
        # a TD target that samples from the policy instead of the target policy is off by no more than 2.7e-5
        bound = 3e-4 if name.endswith("target") else 1.5e-5
        assert displacement_error(parameters, start[name], expected_weights) < bound, name


def test_oracle_reaches_the_golden_weights_too(plain: Golden) -> None:
    """The naive implementation and the package are checked against each other; this checks that they do not err together."""
    meta = plain.meta
    settings = Settings(
        num_train_timesteps=meta["K"],
        beta_schedule=meta["schedule"],
        tau=meta["tau"],
        learning_rate=meta["lr"],
        qf_learning_rate=meta["lr"],
        action_lr=meta["action_lr"],
        action_gradient_steps=meta["action_gradient_steps"],
        action_grad_norm_ratio=meta["action_grad_norm"] / meta["action_dim"],
        max_grad_norm=meta["max_grad_norm"],
    )
    naive = NaiveDIPO(settings, meta["obs_dim"], meta["action_dim"], [meta["hidden"]] * 3)
    naive.load_golden(plain.arrays)
    start = naive.flat_parameters()
    names = ("observations", "actions", "rewards", "next_observations")
    data = {name: plain[f"replay.{name}"][:, None] for name in names}
    terminals = 1 - plain["replay.discount_mask"] / settings.gamma
    memory = Memory(**{**data, "rewards": data["rewards"][..., 0]}, terminals=terminals)
    for update in range(3):
        rows = {f"{which}_rows": plain[f"update.{which}_indices"][update] for which in ("critic", "actor")}
        envs = {f"{which}_envs": th.zeros(meta["batch"], dtype=th.int64) for which in ("critic", "actor")}
        noise = {"initial_noise": "x_K", "noise": "z", "timesteps": "k", "loss_noise": "noise"}
        naive.update(memory, {**rows, **envs, **{ours: plain[f"update.{theirs}"][update] for ours, theirs in noise.items()}})
    for name, weights in naive.flat_parameters().items():
        # processors round products differently: 2.1e-5 was seen; the least fault that counts is 2.7e-5, see above
        assert displacement_error(weights, start[name], plain.weights(f"update.final.{name}.")) < 2.5e-5, name


@pytest.mark.parametrize("actor", ["vae", "mlp"])
def test_actors_of_the_ablation(golden: Golden, actor: str) -> None:
    agent = golden.agent(actor)
    draws: dict[str, Any] = (
        {"initial_noise": golden["vae.sample.z"]} if actor == "vae" else {"noise": golden["mlp.sample.noise"]}
    )
    with th.no_grad():
        features = agent.actor.extract_features(golden["obs"])
        assert_close(agent.actor.sample(features, **draws), golden[f"{actor}.sample.out"])
        (drawn,) = draws.values()
        assert_close(agent.actor.sample(features, noise=drawn), agent.actor.sample(features, initial_noise=drawn), atol=0.0)
        assert_close(agent.actor.deterministic_action(features), golden[f"{actor}.sample.mode"])
        loss_noise = golden[f"{actor}.loss.{'eps' if actor == 'vae' else 'noise'}"]
        loss = agent.actor.loss(features, golden["actions"], noise=loss_noise)
    # a wrong power of the standard deviation would move the VAE's loss by 9e-6
    assert_close(loss, golden[f"{actor}.loss.value"], rtol=0.0, atol=1e-6)
