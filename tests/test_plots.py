"""Looking at a policy shows what it does, for each actor and for other agents, and changes nothing."""

import subprocess
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch as th
from both import MIXED, observations_of, parameters_of, policy_for, same, small, space_envs
from envs import TinyEnv
from gymnasium import spaces
from sb3_contrib import TQC
from stable_baselines3 import DQN, PPO, SAC, TD3

from sb3_dipo import DIPO, EnsembleCritic, plots

STATE = np.array([0.3, -0.5, 0.8], dtype=np.float32)
WIDE = spaces.Box(np.array([[-3.0, 0.0, 1.0]] * 2, np.float32), np.array([[1.0, 5.0, 2.0]] * 2, np.float32))
ACTORS: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "dpmpp_2m": dict(solver="dpmpp_2m", num_train_timesteps=10, num_inference_steps=4),
    "euler": dict(actor="flow", num_inference_steps=4),
    "midpoint": dict(actor="flow", num_inference_steps=4, solver="midpoint"),
    "vae": dict(actor="vae", latent_dim=4),
    "mlp": dict(actor="mlp"),
}
POINTS = dict(diffusion=4, dpmpp_2m=5, euler=5, midpoint=9, vae=1, mlp=1)


def of(actor: str, env: Any = None, **kwargs: Any) -> Any:
    options = {"net_arch": [8], **({"num_train_timesteps": 3} if actor == "diffusion" else {}), **ACTORS[actor]}
    return DIPO("MlpPolicy", env or TinyEnv(), policy_kwargs=options, seed=0, device="cpu", buffer_size=10, **kwargs)


def blobs(centers: Any, counts: Any, std: float = 0.05) -> np.ndarray:
    """Normal samples around each of the centers."""
    rows = np.repeat(np.array(centers, dtype=float), counts, axis=0)
    return rows + np.random.default_rng(0).normal(0, std, rows.shape)


# ------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("accelerate", ["off", "auto"])
@pytest.mark.parametrize("actor", ACTORS)
def test_path_leads_from_noise_to_the_actors_actions(actor: str, accelerate: str) -> None:
    model = of(actor, accelerate=accelerate)
    path = plots.denoising_path(model, STATE, 500)
    assert path.shape == (POINTS[actor], 500, 2)
    assert np.abs(path[-1]).max() <= 1
    th.manual_seed(0)
    with th.no_grad():
        features = model.actor.extract_features(th.as_tensor(np.tile(STATE, (500, 1))))
        np.testing.assert_allclose(path[-1], model.actor.sample(features), atol=1e-5)
    if len(path) > 1:
        th.manual_seed(0)
        np.testing.assert_array_equal(path[0], th.randn(500, 2))


def test_path_of_the_flow_follows_its_velocity() -> None:
    """Euler's method, written down once more."""
    model = of("euler")
    path = th.as_tensor(plots.denoising_path(model, STATE, 7))
    features = th.as_tensor(np.tile(STATE, (7, 1)))
    for i in range(4):
        with th.no_grad():
            velocity = model.actor.network(path[i], th.full((7,), 100 * i / 4), features)
        clean = (path[i] + (1 - i / 4) * velocity).clamp(-1, 1)  # the sampler clips what it predicts
        np.testing.assert_allclose(path[i + 1], path[i] + (clean - path[i]) / (4 - i), atol=1e-5)


def test_path_follows_the_sampler_for_acting() -> None:
    model = of("diffusion")
    model.policy.set_sampler("behaviour", num_inference_steps=2, num_candidates=3)
    assert plots.denoising_path(model, STATE, 5).shape == (3, 5, 2)


def test_actions_are_the_policys_on_its_own_scale() -> None:
    for algorithm in (DIPO, SAC):
        model = small(algorithm, TinyEnv(WIDE))
        assert plots.sample_actions(model, STATE, 4, deterministic=True).shape == (4, 6)
        for deterministic in (True, False):
            actions = plots.sample_actions(model, STATE, 4, deterministic, seed=3)
            th.manual_seed(3)
            taken = model.predict(np.tile(STATE, (4, 1)), deterministic=deterministic)[0]
            middle, half = (WIDE.high + WIDE.low) / 2, (WIDE.high - WIDE.low) / 2
            np.testing.assert_allclose(actions, ((taken - middle) / half).reshape(4, 6), atol=1e-5)


def test_an_observation_may_be_a_dict_with_images_or_one_for_each_action() -> None:
    model = small(DIPO, space_envs(MIXED), policy_for(MIXED))
    each = observations_of(model, 3)
    one = {key: values[1] for key, values in each.items()}
    actions = plots.sample_actions(model, one, 3)
    assert len(np.unique(actions, axis=0)) == 3
    np.testing.assert_allclose(plots.sample_actions(model, each, 3)[1], actions[1], atol=1e-5)
    np.testing.assert_allclose(
        plots.denoising_path(model, each, 3)[:, 1], plots.denoising_path(model, one, 3)[:, 1], atol=1e-5
    )
    np.testing.assert_allclose(plots.q_values(model, each, actions)[1], plots.q_values(model, one, actions)[1], rtol=1e-5)
    with pytest.raises(ValueError, match="`observation` must be a single observation, or one for each of the 4 actions"):
        plots.sample_actions(model, each, 4)


# ------------------------------------------------------------------------------------------------- values


def test_values_are_the_objective_that_each_algorithm_climbs() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    given = th.as_tensor(np.tile(STATE, (5, 1))), th.as_tensor(actions)
    for model in (small(DIPO), small(DIPO, policy_kwargs=dict(n_critics=3)), small(SAC), small(TD3)):
        with th.no_grad():
            expected = th.cat(model.critic(*given), dim=1).min(dim=1).values
        np.testing.assert_allclose(plots.q_values(model, STATE, actions), expected, rtol=1e-5)
    for model in (small(DIPO, policy_kwargs=dict(critic="quantile")), small(TQC)):
        with th.no_grad():
            expected = model.critic(*given).mean(dim=(1, 2))
        np.testing.assert_allclose(plots.q_values(model, STATE, actions), expected, rtol=1e-5)


class Hill(EnsembleCritic):
    """Highest at the action (0.5, -0.4, 0.2)."""

    def objective(self, obs: Any) -> Any:
        return lambda actions: -(actions - th.tensor([0.5, -0.4, 0.2])).square().sum(dim=1, keepdim=True)


@pytest.fixture
def on_a_hill() -> Any:
    return small(DIPO, TinyEnv(spaces.Box(-1.0, 1.0, (3,))), policy_kwargs=dict(critic=Hill))


def test_q_is_drawn_over_the_dimensions_that_are_asked_for(on_a_hill: Any) -> None:
    held = np.array([0.1, 0.2, 0.3])
    for dims in ((0, 1), (2, 1)):
        axes = plots.plot_q(on_a_hill, STATE, dims, held, levels=30)
        top: Any = axes.collections[0]
        other = ({0, 1, 2} - {*dims}).pop()
        assert top.zmax == pytest.approx(-((np.array([0.5, -0.4, 0.2]) - held)[other] ** 2), abs=2e-3)
        highest = [path.vertices for path in top.get_paths() if len(path.vertices)][-1].mean(axis=0)
        np.testing.assert_allclose(highest, np.array([0.5, -0.4, 0.2])[[*dims]], atol=0.05)
        assert axes.get_xlabel() == f"action, dimension {dims[0]}" and axes.get_ylabel() == f"action, dimension {dims[1]}"
    (line,) = plots.plot_q(on_a_hill, STATE, (2,), held, points=21).lines
    x, y = np.array(line.get_data(), dtype=float)
    np.testing.assert_allclose(x, np.linspace(-1, 1, 21))
    np.testing.assert_allclose(y, -((x - 0.2) ** 2) - 0.4**2 - 0.6**2, atol=1e-5)


def test_q_holds_the_others_at_the_deterministic_action(on_a_hill: Any) -> None:
    best = plots.sample_actions(on_a_hill, STATE, 1, deterministic=True)[0]
    lines = [plots.plot_q(on_a_hill, STATE, (1,), action).lines[0].get_ydata() for action in (None, best, best + 0.1)]
    np.testing.assert_array_equal(lines[0], lines[1])
    assert not np.allclose(lines[0], lines[2])


# ------------------------------------------------------------------------------------------------- numbers


def test_evenness_by_hand() -> None:
    assert plots.evenness(np.array([3, 3, 3, 3])) == pytest.approx(1)
    assert plots.evenness(np.array([0.5, 0.5, 0, 0])) == pytest.approx(0.5)  # log 2 / log 4
    assert [plots.evenness(np.array(counts)) for counts in ([0, 7], [0, 0, 0], [1.0], [])] == [0, 0, 0, 0]


@pytest.mark.parametrize("action_dim", [1, 2, 6, 17])
def test_modes_are_counted_in_few_and_in_many_dimensions(action_dim: int) -> None:
    centers = np.array([[0.5], [-0.5]]) * np.ones(action_dim)
    modes = plots.find_modes(blobs(centers, [100, 300], 0.08))
    assert modes.number == 2
    np.testing.assert_array_equal(modes.labels, [1] * 100 + [0] * 300)  # the largest first
    np.testing.assert_allclose(modes.centers, centers[::-1], atol=0.05)
    np.testing.assert_allclose(modes.shares, [0.75, 0.25])
    assert modes.evenness == pytest.approx(0.8113, abs=1e-4)  # the entropy of 3/4 and 1/4 in bits
    assert str(modes) == "2 modes (75%, 25%), evenness 0.81"
    assert plots.find_modes(blobs(centers[:1], [200], 0.08)).number == 1


def test_modes_leave_out_what_is_rare_or_spread_out() -> None:
    actions = blobs([[0.8, 0], [-0.8, 0], [0, 0.8]], [93, 3, 4], 0.02)
    modes = plots.find_modes(actions)
    assert str(modes) == "1 mode (93%)" and modes.evenness == 0
    np.testing.assert_array_equal(modes.labels, [0] * 93 + [-1] * 7)
    assert plots.find_modes(actions, min_share=0.035).number == 2
    assert plots.find_modes(actions, radius=1.2).number == 1
    for action_dim in (2, 6):
        spread = plots.find_modes(np.random.default_rng(0).uniform(-1, 1, (1000, action_dim)))
        assert spread.number == 0 and spread.centers.shape == (0, action_dim) and spread.evenness == 0
        assert str(spread) == "no mode: the actions are spread out"


# ------------------------------------------------------------------------------------------------- figures


def test_density_is_over_the_dimensions_that_are_asked_for() -> None:
    actions = blobs([[0.62, -0.33, 0.95]], [50], 0.0)
    axes = plots.plot_actions(actions, (1, 0), bins=20)
    drawn: Any = axes.collections[0]
    density = drawn.get_array().reshape(20, 20)
    assert np.unravel_index(density.argmax(), density.shape) == (16, 6)  # the row is the second dimension
    assert density.max() == pytest.approx(100)  # all in one of the cells, which are 0.1 wide
    bars: Any = plots.plot_actions(actions, [2], bins=20).patches
    assert [bar.get_x() for bar in bars if bar.get_height()] == [pytest.approx(0.9)]


def test_denoising_is_drawn_in_the_colors_of_the_modes() -> None:
    ends = blobs([[0.7, 0], [-0.7, 0], [0, 0.5]], [60, 38, 2], 0.02)
    path = np.stack([np.full((100, 2), each, dtype=float) for each in range(10)] + [ends])
    axes = plots.plot_denoising(path)
    assert [each.get_title() for each in axes] == ["noise", "step 2 of 10", "step 5 of 10", "step 8 of 10", "action"]
    first, last = axes[0].collections, axes[-1].collections
    assert [len(np.asarray(each.get_offsets())) for each in last] == [2, 60, 38]  # outside, and the modes
    assert len({tuple(np.ravel(each.get_facecolor())) for each in last}) == 3
    np.testing.assert_allclose(np.concatenate([each.get_offsets() for each in last]), np.roll(ends, 2, axis=0))
    assert all((np.asarray(each.get_offsets()) == 0).all() for each in first)
    (only,) = plots.plot_denoising(path[-1:])
    assert only.get_title() == "action"
    assert len(plots.plot_denoising(path, [1])[0].patches) == 3 * 60


AGENTS: dict[str, Any] = {
    **{actor: lambda actor=actor: of(actor) for actor in ACTORS},
    "one dimension": lambda: of("diffusion", "Pendulum-v1"),
    "sac": lambda: small(SAC),
    "td3": lambda: small(TD3),
    "tqc": lambda: small(TQC, TinyEnv(WIDE)),
    "candidates": lambda: small(DIPO, policy_kwargs=dict(num_candidates=2)),
}


@pytest.mark.parametrize("name", AGENTS)
def test_policy_in_one_figure(name: str) -> None:
    from matplotlib import pyplot

    model = AGENTS[name]()
    before = dict(matplotlib.rcParams)
    figure = plots.plot_policy(model, STATE, n_samples=200)
    titles = [axes.get_title() or axes.get_ylabel() for axes in figure.get_axes()]
    steps = [title for title in titles if title.startswith("step")]
    if POINTS.get(name, 1) > 1:
        assert titles[: len(steps) + 2] == ["noise", *steps, "action"]
        assert len({*steps}) == len(steps) == min(POINTS[name], 5) - 2
    assert [title for title in titles if title in ("density", "Q(s, a)")] == ["density", "Q(s, a)"]
    assert figure.get_suptitle() == str(plots.find_modes(plots.sample_actions(model, STATE, 200)))
    figure.canvas.draw()
    assert pyplot.get_fignums() == [] and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("algorithm", [DIPO, SAC])
def test_looking_changes_nothing(algorithm: Any) -> None:
    model = small(algorithm)
    model.policy.set_training_mode(True)
    weights, drawn, python = parameters_of(model), th.get_rng_state(), repr(np.random.get_state())
    plots.plot_policy(model, STATE, n_samples=50)
    assert th.equal(th.get_rng_state(), drawn) and repr(np.random.get_state()) == python
    assert same(parameters_of(model), weights)
    assert model.actor.training and model.critic.training and th.is_grad_enabled()
    assert not any(module._forward_pre_hooks for module in model.policy.modules())


def test_draws_repeat_with_the_seed() -> None:
    for look in (plots.sample_actions, plots.denoising_path):
        first, again, other = (look(small(DIPO), STATE, 50, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


# ------------------------------------------------------------------------------------------------- errors


def test_errors_name_what_is_wrong() -> None:
    model = small(DIPO)
    actions = np.zeros((4, 2))
    wrong: list[tuple[Any, type[Exception], str]] = [
        (lambda: plots.sample_actions(model, STATE, 0), ValueError, "`n_samples` must be a whole number of at least 1"),
        (lambda: plots.q_values(model, STATE, actions[0]), ValueError, r"`actions` must have the shape \(n, 2\)"),
        (lambda: plots.q_values(model, STATE, np.zeros((4, 3))), ValueError, r"`actions` must have the shape \(n, 2\)"),
        (lambda: plots.find_modes(actions[0]), ValueError, r"`actions` must have the shape \(n, action_dim\)"),
        (lambda: plots.find_modes(actions[:0]), ValueError, "at least one action"),
        (lambda: plots.find_modes(actions, radius=0), ValueError, "`radius` must be a finite number above 0"),
        (lambda: plots.find_modes(actions, min_share=2), ValueError, "`min_share` must be .* at most 1"),
        (lambda: plots.plot_q(model, STATE, action=np.zeros(3)), ValueError, r"`action` must have the shape \(2,\)"),
        (lambda: plots.plot_q(model, STATE, points=1), ValueError, "`points` must be a whole number of at least 2"),
        *(
            (lambda dims=dims: plots.plot_policy(model, STATE, dims), ValueError, "`dims`")
            for dims in ((), (0, 0), (0, 1, 1), (0, 2), (-1,))
        ),
        (lambda: plots.denoising_path(small(SAC), STATE), TypeError, "`model` must be a DIPO agent.*SAC"),
        (lambda: plots.q_values(ppo(), STATE, actions), TypeError, r"`model` must have a critic Q\(s, a\).*not PPO"),
        (lambda: plots.plot_policy(ppo(), STATE), TypeError, r"`model` must have a critic Q\(s, a\).*not PPO"),
        (lambda: plots.sample_actions(DQN("MlpPolicy", "CartPole-v1"), np.zeros(4)), TypeError, "bounded Box of actions"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()


def ppo() -> PPO:
    return PPO("MlpPolicy", TinyEnv(), n_steps=8, batch_size=8, device="cpu")


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_named(missing: str) -> None:
    """And the rest of the package does without it."""
    code = (
        "import sys\nimport stable_baselines3\n"
        f"for name in [each for each in sys.modules if each.split('.')[0] == {missing!r}]: del sys.modules[name]\n"
        f"sys.modules[{missing!r}] = None\nimport sb3_dipo\n"
        "try:\n    import sb3_dipo.plots\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "sb3_dipo.plots needs matplotlib and scikit-learn: install the extra, 'sb3_dipo[plots]'.\n"
