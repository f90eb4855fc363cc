"""Two agents with the same weights and data, one that computes plainly and one that does not, and what both compute."""

from typing import Any

import numpy as np
import torch as th
from envs import everything_learned
from helpers import fill, make_agent

from sb3_dipo import DIPO, DiffusionActor, Sampler, improve_actions

OBS_DIM, ACTION_DIM, STEPS = 5, 2, 4
FLOAT32_ROUNDING = 1e-5

Results = dict[str, th.Tensor]


def filled(rows: int = 64, seed: int = 0, **kwargs: Any) -> DIPO:
    """An agent with made-up data; the same weights and data for the same seed."""
    kwargs["policy_kwargs"] = {"net_arch": [64, 64], **kwargs.get("policy_kwargs", {})}
    if kwargs["policy_kwargs"].get("actor", "diffusion") == "diffusion":
        kwargs["policy_kwargs"].setdefault("num_train_timesteps", STEPS)
        # a process that starts with some signal left, so that few actions end in the corners of their box
        kwargs["policy_kwargs"].setdefault("beta_schedule", "linear")
    model = make_agent(OBS_DIM, ACTION_DIM, seed=seed, **kwargs)
    generator = np.random.default_rng(seed)
    for network in (model.actor, model.critic):
        for parameter in network.parameters():  # larger ones than at the start of a training, and biases that are not 0
            noise = generator.normal(size=parameter.shape).astype(np.float32)
            parameter.data.mul_(1.5).add_(
                th.from_numpy(noise).to(parameter.device), alpha=0.1 if parameter.dim() < 2 else 0.02
            )
    model.actor_target.load_state_dict(model.actor.state_dict())
    model.critic_target.load_state_dict(model.critic.state_dict())
    fill(
        model,
        observations=generator.normal(size=(rows, 1, OBS_DIM)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(rows, 1, ACTION_DIM)).astype(np.float32),
        rewards=generator.normal(size=(rows, 1)).astype(np.float32),
        next_observations=generator.normal(size=(rows, 1, OBS_DIM)).astype(np.float32),
        terminals=(generator.random((rows, 1)) < 0.1).astype(np.float32),
    )
    return model


def train(model: DIPO, updates: int, batch_size: int = 32, seed: int = 0, progress: float = 1.0) -> None:
    """Updates under given random numbers."""
    th.manual_seed(seed)
    np.random.seed(seed)
    model._current_progress_remaining = progress
    model.train(updates, batch_size)


def largest_difference(first: DIPO, second: DIPO) -> float:
    """Of any weight, optimizer state or stored action."""
    ours, theirs = everything_learned(first), everything_learned(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


class Inputs:
    """A batch, always the same for a number of rows: made once, so that it can be handed to several agents."""

    def __init__(self, rows: int, steps: int = STEPS, dtype: th.dtype = th.float32):
        generator = th.Generator("cpu").manual_seed(rows)

        def normal(*shape: int) -> th.Tensor:
            return th.randn(shape, generator=generator, device="cpu", dtype=th.float32).to(dtype)

        self.observations, self.targets = normal(rows, OBS_DIM), normal(rows, 1)
        self.actions = normal(rows, ACTION_DIM).mul(0.5).clamp(-1, 1)
        self.initial_noise, self.noise = normal(rows, ACTION_DIM), normal(steps, rows, ACTION_DIM)
        self.timesteps = th.arange(rows, device="cpu") % steps


def gradients_of(loss: th.Tensor, module: th.nn.Module) -> Results:
    """Of a module's parameters, zeros where there is none."""
    parameters = {name: each for name, each in module.named_parameters() if each.requires_grad}
    found: Any = th.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: th.zeros_like(each) if gradient is None else gradient
        for (name, each), gradient in zip(parameters.items(), found, strict=True)
    }


def computed(model: DIPO, given: Inputs, sampler: Sampler | None = None) -> Results:
    """All that an actor and a critic compute of a batch: actions, values, losses, and their gradients."""
    actor, critic, results = model.actor, model.critic, {}
    assert isinstance(actor, DiffusionActor)
    with th.no_grad():
        features = actor.extract_features(given.observations)
        results["deterministic"] = actor.deterministic_action(features, sampler)
        results["sample"] = actor.sample(features, given.initial_noise, given.noise, sampler)
        results["noise_pred"] = actor.noise_network(given.actions, given.timesteps, features)
        results["q_values"] = th.cat(critic(given.observations, given.actions), dim=1)
        results["next_value"] = critic.next_value(given.observations, given.actions)
        objective = critic.objective(given.observations)
        results["objective"] = objective(given.actions)
    climber = given.actions.clone().requires_grad_()
    results["slope"] = th.autograd.grad(objective(climber).sum(), climber)[0]
    results["improved"] = improve_actions(objective, given.actions, action_gradient_steps=3)

    given_features = features.clone().requires_grad_()
    sampled = actor.sample(given_features, given.initial_noise, given.noise, sampler)
    results["sample's slope"] = th.autograd.grad(sampled.sum(), given_features)[0]
    for name, module, loss in (
        ("critic", critic, critic.loss(given.observations, given.actions, given.targets)),
        ("actor", actor, actor.loss(features, given.actions, given.timesteps, given.actions)),
    ):
        results[f"{name}.loss"] = loss.detach()
        results.update({f"{name}.{key}": gradient for key, gradient in gradients_of(loss, module).items()})
    return results


def furthest_apart(first: Results, second: Results) -> float:
    """The largest difference of any number that both have."""
    return max(
        float((first[name].double() - second[name].double()).abs().max())
        for name in first
        if name in second and first[name].shape == second[name].shape
    )


def assert_same(actual: Results, expected: Results, atol: float = FLOAT32_ROUNDING, rtol: float = 1e-4) -> None:
    """Of all results the same types, shapes and, but for rounding, numbers."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        try:
            th.testing.assert_close(actual[name], value, atol=atol, rtol=rtol)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


class KernelMish:
    """Mish, and its gradient, as the compiled kernel computes them: an MLP of one unit whose weights are 1."""

    def __init__(self) -> None:
        from sb3_dipo.fast.kernels import load_kernels
        from sb3_dipo.fast.layers import Layer

        self.kernels, self.mlps = load_kernels(), [[Layer(th.ones(1, 1), th.zeros(1))] * 2]

    def mish(self, x: th.Tensor) -> th.Tensor:
        return self.kernels.forward(self.mlps, x.reshape(-1, 1))[0].view(x.shape)

    def mish_backward(self, grad_output: th.Tensor, x: th.Tensor) -> th.Tensor:
        column, of_y = x.reshape(-1, 1), grad_output.reshape(-1, 1, 1)
        kept = self.kernels.forward(self.mlps, column, keep=True)[1]
        assert kept is not None
        gradient = self.kernels.backward(self.mlps, column, kept, of_y, True, [False] * 4)[0]
        assert gradient is not None
        return gradient.view(x.shape)
