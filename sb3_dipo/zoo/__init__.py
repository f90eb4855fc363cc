"""
DIPO in the RL Zoo, which has no place for algorithms from outside: :func:`register` adds it to the modules that hold one.

It is called by the start-up file ``startup/_sb3_dipo_zoo.py`` when rl_zoo3 is imported, or by ``python -m sb3_dipo.zoo``.
"""

import importlib.resources
import pathlib
from types import ModuleType
from typing import Any

from sb3_dipo.dipo import DIPO
from sb3_dipo.zoo.tuning import convert_dipo_params, sample_dipo_params

__all__ = ["ALGO", "MODULES", "convert_dipo_params", "register", "sample_dipo_params"]

ALGO = "dipo"
"""The value of ``--algo``. Plots and the hub lower the case of the class's name to find it."""

MODULES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
"""The modules that :func:`register` knows; the start-up file repeats the list, as it may import nothing."""


def register(module: ModuleType) -> None:
    """
    Add DIPO to a module of rl_zoo3 that has just been imported; doing so again changes nothing.

    ``rl_zoo3.utils`` gets the algorithm, ``rl_zoo3.hyperparams_opt`` the sampler and the converter of tuning, and
    ``rl_zoo3.exp_manager`` the default hyper-parameters and schedules for ``qf_learning_rate``.

    :param module: one of :data:`MODULES`; of another nothing is changed
    :raises AttributeError: if the module is not as rl_zoo3 2.9.2 has it
    """
    if module.__name__ == "rl_zoo3.utils":
        module.ALGOS[ALGO] = DIPO
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        module.HYPERPARAMS_SAMPLER[ALGO] = sample_dipo_params
        module.HYPERPARAMS_CONVERTER[ALGO] = convert_dipo_params
    elif module.__name__ == "rl_zoo3.exp_manager":
        _extend(module.ExperimentManager)


def _extend(manager: Any) -> None:
    """Let an ``ExperimentManager`` find our YAML, and take ``qf_learning_rate: lin_1e-3`` as it takes ``learning_rate``."""
    if getattr(manager, "_knows_dipo", False):
        return
    read_hyperparameters, preprocess_schedules = manager.read_hyperparameters, manager._preprocess_schedules

    def read_ours_by_default(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if _is_missing_default(self.config):
            self.config = str(importlib.resources.files("sb3_dipo.hyperparams") / f"{ALGO}.yml")
        return read_hyperparameters(self)

    def preprocess_both_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        if hyperparams.get("qf_learning_rate") is not None:
            critics = preprocess_schedules({"learning_rate": hyperparams["qf_learning_rate"]})
            hyperparams["qf_learning_rate"] = critics["learning_rate"]
        return preprocess_schedules(hyperparams)

    manager.read_hyperparameters = read_ours_by_default
    manager._preprocess_schedules = staticmethod(preprocess_both_schedules)
    manager._knows_dipo = True


def _is_missing_default(config: str) -> bool:
    """Whether a file is the zoo's own default for DIPO, in its package or (a checkout) beside it, and not there."""
    import rl_zoo3

    path, package = pathlib.Path(config), pathlib.Path(rl_zoo3.__file__).parent
    defaults = [folder / "hyperparams" / f"{ALGO}.yml" for folder in (package, package.parent)]
    return path in defaults and not path.exists()
