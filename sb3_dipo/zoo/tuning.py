"""What Optuna tunes of DIPO in the RL Zoo: ``python -m rl_zoo3.train --algo dipo -optimize``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

# rl_zoo3.hyperparams_opt is imported where it is needed: it registers this module while it is being imported itself.

OF_ACTOR = ("actor", "num_train_timesteps", "beta_schedule", "solver", "num_inference_steps", "eta", "samplers")
OF_CRITIC = ("critic", "layer_norm", "n_quantiles", "top_quantiles_to_drop_per_net")
HER_PARAMS = ("n_sampled_goal", "goal_selection_strategy")


def sample_dipo_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Suggest hyper-parameters; every combination is one that DIPO can be built with.

    :param trial: the trial to ask
    :param n_actions: not used
    :param n_envs: not used
    :param additional_args: ``using_her_replay_buffer``, and its arguments as ``her_kwargs``
    :return: arguments of :class:`~sb3_dipo.DIPO`
    """
    params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 10),
        "tau": trial.suggest_float("tau", 1e-3, 0.08, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "large"]),
        "action_lr": trial.suggest_float("action_lr", 3e-3, 0.3, log=True),
        "action_gradient_steps": trial.suggest_int("action_gradient_steps", 1, 40, log=True),
        "action_grad_norm_ratio": trial.suggest_float("action_grad_norm_ratio", 0.03, 1.0, log=True),
        "action_gradient_start": trial.suggest_categorical("action_gradient_start", ["replay", "policy"]),
        "actor": trial.suggest_categorical("actor", ["diffusion", "flow"]),
        "behaviour_candidates": trial.suggest_int("behaviour_candidates", 1, 8, log=True),
        "critic": trial.suggest_categorical("critic", ["ensemble", "quantile"]),
        "layer_norm": trial.suggest_categorical("layer_norm", [True, False]),
    }
    if params["action_gradient_start"] == "replay":
        params["persist_improved_actions"] = trial.suggest_categorical("persist_improved_actions", [True, False])
        params["bound_shift"] = trial.suggest_categorical("bound_shift", [True, False])
        if params["bound_shift"]:
            params["max_action_shift"] = trial.suggest_float("max_action_shift", 0.05, 1.0, log=True)
    if params["critic"] == "quantile":
        params["n_quantiles"] = trial.suggest_int("n_quantiles", 5, 50, log=True)
        params["top_quantiles_to_drop_per_net"] = trial.suggest_int("top_quantiles_to_drop_per_net", 0, 4)
    # Optuna wants the same choices under the same name
    if params["actor"] == "flow":
        params["flow_solver"] = trial.suggest_categorical("flow_solver", ["euler", "midpoint"])
        params["flow_steps"] = trial.suggest_int("flow_steps", 1, 10, log=True)
    else:
        params.update(_suggest_diffusion(trial))

    her_kwargs: dict[str, Any] = {}
    if additional_args["using_her_replay_buffer"]:
        from rl_zoo3.hyperparams_opt import sample_her_params

        her_kwargs = sample_her_params(trial, {}, additional_args["her_kwargs"])["replay_buffer_kwargs"]
        params.update({name: her_kwargs[name] for name in HER_PARAMS})

    hyperparams = convert_dipo_params(params)
    # the true values, for whoever reads the study
    trial.set_user_attr("gamma", hyperparams["gamma"])
    trial.set_user_attr("batch_size", hyperparams["batch_size"])
    trial.set_user_attr("num_inference_steps", hyperparams["policy_kwargs"].get("num_inference_steps"))
    if her_kwargs:
        hyperparams["replay_buffer_kwargs"] = her_kwargs
    return hyperparams


def _suggest_diffusion(trial: "optuna.Trial") -> dict[str, Any]:
    params: dict[str, Any] = {
        "num_train_timesteps": trial.suggest_int("num_train_timesteps", 5, 100, log=True),
        "beta_schedule": trial.suggest_categorical("beta_schedule", ["cosine", "vp", "linear", "ou"]),
    }
    if params["beta_schedule"] == "ou":  # the exponential integrator can diverge on the other schedules
        solver = trial.suggest_categorical("ou_solver", ["ddpm", "ddim", "dpmpp_2m", "exponential_integrator"])
        params["ou_solver"] = solver
    else:
        solver = trial.suggest_categorical("solver", ["ddpm", "ddim", "dpmpp_2m"])
        params["solver"] = solver
    if solver == "ddim":
        params["eta"] = trial.suggest_float("eta", 0.0, 1.0)
    if solver != "exponential_integrator":  # which can diverge if it leaves steps out
        # a fraction of K, so that its range does not depend on another parameter
        params["inference_fraction"] = trial.suggest_float("inference_fraction", 0.2, 1.0)
    return params


def convert_dipo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn what a trial has suggested into arguments of DIPO: what ``--trial-id`` does. ``gradient_steps`` is ``train_freq``.

    With HER, the zoo puts the result's ``replay_buffer_kwargs`` in the place of the YAML's: give others, such as
    ``copy_info_dict``, by ``-params`` again.

    :param sampled_params: ``trial.params`` of :func:`sample_dipo_params`; not changed
    :return: arguments of :class:`~sb3_dipo.DIPO`
    """
    from rl_zoo3.hyperparams_opt import convert_offpolicy_params

    hyperparams = convert_offpolicy_params(sampled_params)
    hyperparams.pop("bound_shift", None)
    hyperparams.setdefault("max_action_shift", None)  # in the place of what was given beside the search
    for name, meaning in (("ou_solver", "solver"), ("flow_solver", "solver"), ("flow_steps", "num_inference_steps")):
        if name in hyperparams:
            hyperparams[meaning] = hyperparams.pop(name)
    if "inference_fraction" in hyperparams:
        steps = round(hyperparams.pop("inference_fraction") * hyperparams["num_train_timesteps"])
        hyperparams["num_inference_steps"] = max(1, steps)
    hyperparams["samplers"] = {"behaviour": {"num_candidates": hyperparams.pop("behaviour_candidates")}}
    policy_kwargs = {name: hyperparams.pop(name) for name in (*OF_ACTOR, *OF_CRITIC) if name in hyperparams}
    hyperparams["policy_kwargs"] = {**hyperparams["policy_kwargs"], **policy_kwargs}
    if HER_PARAMS[0] in hyperparams:
        hyperparams["replay_buffer_kwargs"] = {name: hyperparams.pop(name) for name in HER_PARAMS}
    return hyperparams
