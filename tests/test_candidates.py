"""The best of several actions, the bound on the climb, and the climb from the policy's own actions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from both import MIXED, observations_of, policy_for, small, space_envs
from helpers import fill, make_agent

from sb3_dipo import DIPO, improve_actions


def agent_with(number: int = 1, **kwargs: Any) -> DIPO:
    policy_kwargs = dict(net_arch=[32], num_train_timesteps=3, num_candidates=number, **kwargs.pop("policy_kwargs", {}))
    return make_agent(3, 2, policy_kwargs=policy_kwargs, **kwargs)


def learning(**kwargs: Any) -> DIPO:
    agent = make_agent(3, 2, policy_kwargs=dict(net_arch=[32], num_train_timesteps=3), **kwargs)
    generator = np.random.default_rng(0)
    fill(
        agent,
        observations=generator.normal(size=(64, 1, 3)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(64, 1, 2)).astype(np.float32),
        rewards=generator.normal(size=(64, 1)).astype(np.float32),
        next_observations=generator.normal(size=(64, 1, 3)).astype(np.float32),
        terminals=np.zeros((64, 1), np.float32),
    )
    return agent


@pytest.mark.parametrize("which", ["behaviour", "target", "evaluation"])
@pytest.mark.parametrize("accelerate", ["off", "auto", "compile"])
def test_the_candidate_that_the_critic_values_most_is_taken(which: str, accelerate: str) -> None:
    agent = agent_with(5, accelerate=accelerate)
    for parameter in agent.critic_target.parameters():
        parameter.data.neg_()  # so that the two critics choose differently
    of_target = which == "target"
    actor, critic = (agent.actor_target, agent.critic_target) if of_target else (agent.actor, agent.critic)
    observations = th.randn((7, 3), generator=th.Generator().manual_seed(0))
    sampler = agent.policy.samplers[which]
    with th.no_grad():
        features = observations.repeat_interleave(5, dim=0)
        th.manual_seed(3)
        if which == "evaluation":
            candidates = actor.deterministic_candidates(features, sampler)
        else:
            candidates = actor.sample(features, sampler=sampler)
        values = critic.next_value(features, candidates).view(7, 5)
        expected = candidates.view(7, 5, 2)[th.arange(7), values.argmax(dim=1)]
        th.manual_seed(3)
        th.testing.assert_close(agent.policy.act(observations, which), expected, rtol=0, atol=1e-6)
    assert values.std(dim=1).min() > 0


def test_one_candidate_is_todays_behaviour_to_the_bit() -> None:
    agent, one = agent_with(), agent_with(1)
    one.set_parameters(agent.get_parameters())
    observations = np.zeros((4, 3), np.float32)
    for deterministic in (False, True):
        actions = []
        for each in (agent, one):
            th.manual_seed(0)
            actions.append(each.predict(observations, deterministic=deterministic)[0])
        assert np.array_equal(actions[0], actions[1])


def test_evaluation_repeats_and_leaves_the_generator_alone() -> None:
    agent = agent_with(4)
    observations = np.zeros((6, 3), np.float32)
    before = th.get_rng_state()
    first = agent.predict(observations, deterministic=True)[0]
    assert th.equal(th.get_rng_state(), before)
    np.testing.assert_array_equal(agent.predict(observations, deterministic=True)[0], first)
    np.testing.assert_allclose(agent.predict(observations[:1], deterministic=True)[0][0], first[0], atol=1e-6)


def test_equal_values_leave_the_distribution_as_it_is() -> None:
    """With a critic that is constant, the first candidate is taken, which is a sample like any other."""
    agent = agent_with(8)
    for parameter in agent.critic.parameters():
        parameter.data.zero_()
    with th.no_grad():
        features = th.zeros(4_000, 3)
        th.manual_seed(0)
        chosen, one = agent.policy.act(features), agent.actor.sample(features)
    th.testing.assert_close(chosen.mean(dim=0), one.mean(dim=0), rtol=0, atol=0.06)
    th.testing.assert_close(chosen.std(dim=0), one.std(dim=0), rtol=0, atol=0.06)


def test_more_candidates_are_worth_more_to_the_critic() -> None:
    agent = agent_with(1)
    observations = th.randn((200, 3), generator=th.Generator().manual_seed(0))
    means = []
    for number in (1, 2, 8):
        agent.policy.set_sampler("behaviour", num_candidates=number)
        th.manual_seed(0)
        with th.no_grad():
            means.append(float(agent.critic.next_value(observations, agent.policy.act(observations)).mean()))
    assert means == sorted(means) and means[0] < means[-1]


@pytest.mark.parametrize("space", [MIXED, MIXED["camera"]], ids=["Dict", "images"])
def test_other_observations(space: Any) -> None:
    model = small(DIPO, space_envs(space), policy_for(space), policy_kwargs={"num_candidates": 3})
    model.learn(20)
    observations = observations_of(model)
    assert model.predict(observations)[0].shape == (5, *model.action_space.shape)
    first = model.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], first)


@pytest.mark.parametrize("actor", ["diffusion", "flow"])
def test_deterministic_actions_start_at_the_center_of_the_noise(actor: str) -> None:
    options = dict(num_train_timesteps=3) if actor == "diffusion" else {}
    agent = make_agent(3, 2, policy_kwargs=dict(actor=actor, net_arch=[32], **options), device="cpu")
    observations = np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3)
    quiet = replace(agent.actor.sampler, noise_scale=0.0)
    with th.no_grad():
        features = th.as_tensor(observations)
        from_center = agent.actor.sample(features, initial_noise=th.zeros(7, 2), sampler=quiet)
        np.testing.assert_allclose(agent.predict(observations, deterministic=True)[0], from_center, atol=1e-6)
        repeated = features.repeat_interleave(5, dim=0)
        several = agent.actor.deterministic_candidates(repeated, replace(quiet, num_candidates=5)).view(7, 5, 2)
    th.testing.assert_close(several[:, 0], from_center, rtol=0, atol=1e-6)
    assert several.std(dim=1).min() > 0


@pytest.mark.parametrize("actor", ["vae", "mlp"])
def test_actors_with_one_deterministic_action(actor: str) -> None:
    agent = make_agent(3, 2, policy_kwargs=dict(actor=actor, net_arch=[32], num_candidates=3))
    assert [agent.policy.samplers[use].num_candidates for use in ("behaviour", "target", "evaluation")] == [3, 3, 1]
    agent.predict(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="`num_candidates` must be 1 for `which='evaluation'`"):
        agent.policy.set_sampler("evaluation", num_candidates=2)


def test_the_samplers_are_saved(tmp_path: Any) -> None:
    agent = agent_with()
    agent.policy.set_sampler("behaviour", num_candidates=4)
    agent.save(tmp_path / "agent")
    assert DIPO.load(tmp_path / "agent").policy.samplers == agent.policy.samplers
    with pytest.raises(ValueError, match="`num_candidates` must be a whole number of at least 1"):
        agent.policy.set_sampler(num_candidates=0)


# ------------------------------------------------------------------------------------------------- the climb


def test_the_bound_holds_in_each_dimension() -> None:
    taken = th.tensor([[0.0, 0.5], [-0.95, 1.0]])
    start = th.tensor([[0.4, 0.5], [-0.9, 0.2]])
    improved = improve_actions(lambda a: a.sum(dim=1, keepdim=True), start, 0.5, 4, max_action_shift=0.1, actions_taken=taken)
    th.testing.assert_close(improved, th.tensor([[0.1, 0.6], [-0.85, 1.0]]))
    down = improve_actions(lambda a: -a.sum(dim=1, keepdim=True), start, 0.5, 4, max_action_shift=0.1, actions_taken=taken)
    th.testing.assert_close(down, th.tensor([[-0.1, 0.4], [-1.0, 0.9]]))
    free = improve_actions(lambda a: a.sum(dim=1, keepdim=True), start, 0.5, 4)
    th.testing.assert_close(free, th.ones(2, 2))


def test_the_replay_data_stay_within_the_bound_of_the_actions_taken() -> None:
    bound, free = (learning(max_action_shift=shift, action_lr=0.3) for shift in (0.05, None))
    for agent in (bound, free):
        agent.train(20, 64)
    shifts = [np.abs(agent.replay_buffer.improved_actions - agent.replay_buffer.actions).max() for agent in (bound, free)]  # type: ignore[union-attr]
    assert shifts[0] <= 0.05 + 1e-6 < shifts[1]


def test_the_climb_from_the_policy_writes_nothing_back() -> None:
    agent = learning(action_gradient_start="policy")
    starts: list[th.Tensor] = []
    improve = agent._improve

    def improve_and_keep(objective: Any, start: th.Tensor, actions_taken: th.Tensor) -> th.Tensor:
        starts.append(start)
        return improve(objective, start, actions_taken)

    agent._improve = improve_and_keep  # type: ignore[method-assign]
    agent.train(5, 32)
    buffer: Any = agent.replay_buffer
    np.testing.assert_array_equal(buffer.improved_actions[:64], buffer.actions[:64])
    known = {tuple(row) for row in buffer.actions[:64].reshape(-1, 2).tolist()}
    assert not any(tuple(row) in known for start in starts for row in start.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_action_shift=0), "`max_action_shift` must be a finite number above 0"),
        (dict(action_gradient_start="noise"), "`action_gradient_start` must be one of 'replay', 'policy'"),
        (dict(max_action_shift=0.1, action_gradient_start="policy"), "`max_action_shift` must be None with"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(3, 2, **arguments)
