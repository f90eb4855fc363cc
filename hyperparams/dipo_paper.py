"""The paper's hyper-parameters as a module: ``python -m rl_zoo3.train --algo dipo -conf sb3_dipo.hyperparams.dipo_paper``."""

import importlib.resources
from typing import Any

import yaml

hyperparams: dict[str, dict[str, Any]] = yaml.safe_load(
    (importlib.resources.files("sb3_dipo.hyperparams") / "dipo_paper.yml").read_text(encoding="utf-8")
)
