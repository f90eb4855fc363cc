"""Imports point one way, everything public is documented, and importing the package has no side effects."""

import ast
import inspect
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import stable_baselines3

import sb3_dipo

PACKAGE = pathlib.Path(sb3_dipo.__file__).parent
ORDER = (
    "checks",
    "samplers",
    "diffusion",
    "networks",
    "actors",
    "critics",
    "action_gradient",
    "buffers",
    "guard",
    "policies",
    "base",
    "dipo",
    "env_state",
    "checkpoint_folder",
    "checkpoint",
    "recommended",
)
"""No module of the core imports a later one."""
FAST = "fast"
"""What the core imports inside functions only, where it is asked for; itself it imports what comes before the policies."""
OUTSIDE = ("zoo", "envs", "plots")
"""What the core never imports."""


def imports(path: pathlib.Path, in_functions: bool = True) -> list[str]:
    """The full names of all that a file imports, wherever in it or outside of functions alone."""
    found = []
    here = ("sb3_dipo", *path.relative_to(PACKAGE).parent.parts)
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop(0)
        if in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*here[: len(here) - node.level + 1], node.module or ""]).rstrip(".") if node.level else node.module
            )
            # `from sb3_dipo import networks` imports a module, too
            found += [f"{base}.{alias.name}" for alias in node.names] if base == "sb3_dipo" else [str(base)]
    return found


def module_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def core() -> list[pathlib.Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if module_of(path) not in OUTSIDE]


def imported_modules(path: pathlib.Path, in_functions: bool = True) -> set[str]:
    """The modules of the package that one of its files imports, without itself."""
    names = [name.split(".") for name in imports(path, in_functions) if name.split(".")[0] == "sb3_dipo"]
    assert all(len(parts) > 1 for parts in names), f"{path} imports the whole package"
    return {parts[1] for parts in names} - {module_of(path)}


def test_imports_point_one_way() -> None:
    seen = set()
    for path in core():
        own = module_of(path)
        if own not in ORDER:
            continue
        seen.add(own)
        for imported in imported_modules(path) - {FAST}:
            assert imported in ORDER, f"{path} imports {imported}, which needs its place in ORDER"
            assert ORDER.index(imported) < ORDER.index(own), f"{path} imports {imported}"
    assert seen == {*ORDER}


def test_fast_is_imported_where_it_is_asked_for_alone() -> None:
    for path in core():
        if module_of(path) in ORDER:
            assert FAST not in imported_modules(path, in_functions=False), path
    for path in sorted((PACKAGE / FAST).rglob("*.py")):
        for imported in imported_modules(path):
            assert ORDER.index(imported) < ORDER.index("policies"), f"{path} imports {imported}"


def test_diffusion_knows_nothing_of_reinforcement_learning() -> None:
    files = sorted((PACKAGE / "diffusion").glob("*.py"))
    assert len(files) >= 4
    for path in files:
        for name in imports(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "torch" or name.startswith("sb3_dipo.diffusion"), (path, name)


def test_core_imports_no_extras() -> None:
    for path in core():
        for name in imports(path):
            assert not name.startswith(tuple(f"sb3_dipo.{outside}" for outside in OUTSIDE)), f"{path} imports {name}"
            allowed = {"gymnasium", "numpy", "sb3_contrib", "stable_baselines3", "torch", "sb3_dipo"}
            allowed |= {"triton"} if path.name == "triton_kernels.py" else set()  # PyTorch for CUDA comes with it
            assert name.split(".")[0] in sys.stdlib_module_names or name.split(".")[0] in allowed, f"{path} imports {name}"


def test_imports_are_found() -> None:
    """The helper above sees each form of import."""
    path = PACKAGE / "diffusion" / "example.py"
    lines = ["import torch.nn", "from sb3_dipo import zoo", "from ..dipo import DIPO", "from . import solvers"]
    code = "\n".join([*lines, "def f():", "    import sb3_dipo.envs"])

    class Example(type(path)):  # type: ignore[misc]
        def read_text(self, *args: Any, **kwargs: Any) -> str:
            return code

    assert imports(Example(path)) == [
        "torch.nn",
        "sb3_dipo.zoo",
        "sb3_dipo.dipo",
        "sb3_dipo.diffusion",
        "sb3_dipo.envs",
    ]
    assert "sb3_dipo.envs" not in imports(Example(path), in_functions=False)
    assert "sb3_dipo.zoo" in imports(Example(path), in_functions=False)


def test_all_is_complete() -> None:
    assert sorted(sb3_dipo.__all__) == sorted(set(sb3_dipo.__all__))
    designed = {
        *("DIPO", "DIPOPolicy", "MlpPolicy", "CnnPolicy", "MultiInputPolicy", "DiffusionActor", "VAEActor", "MLPActor"),
        *("DIPOReplayBuffer", "DIPODictReplayBuffer", "DIPONStepReplayBuffer", "DIPOHerReplayBuffer", "Sampler"),
        *("improve_actions", "ExactCheckpointCallback", "save_checkpoint", "load_checkpoint", "NonFiniteLossError"),
    }
    assert designed <= set(sb3_dipo.__all__)
    for name in sb3_dipo.__all__:
        assert hasattr(sb3_dipo, name)


@pytest.mark.parametrize("name", [name for name in sb3_dipo.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(sb3_dipo, name)
    assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__, f"{name} has no docstring"
    if not inspect.isclass(thing):
        return
    for owner in thing.__mro__:
        if not owner.__module__.startswith("sb3_dipo"):
            continue
        for attribute, value in vars(owner).items():
            if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(thing, attribute)), f"{owner.__name__}.{attribute} has no docstring"


@pytest.mark.parametrize(
    "thing",
    [
        *(sb3_dipo.DIPO, sb3_dipo.DIPOPolicy, sb3_dipo.DiffusionActor, sb3_dipo.VAEActor, sb3_dipo.MLPActor),
        *(sb3_dipo.FlowActor, sb3_dipo.EnsembleCritic, sb3_dipo.QuantileCritic, sb3_dipo.Sampler),
    ],
)
def test_every_argument_is_documented(thing: Any) -> None:
    documentation = inspect.getdoc(thing) or ""
    for name, parameter in inspect.signature(thing).parameters.items():
        kind = "options" if parameter.kind is inspect.Parameter.VAR_KEYWORD and thing is sb3_dipo.DIPOPolicy else name
        assert f":param {name}:" in documentation or kind == "options", f"{thing.__name__} does not explain {name}"


def test_signature_is_that_of_the_design() -> None:
    parameters = inspect.signature(sb3_dipo.DIPO).parameters
    own = {
        "action_lr": 0.03,
        "action_gradient_steps": 20,
        "action_grad_norm_ratio": 0.1,
        "persist_improved_actions": True,
        "max_grad_norm": 2.0,
        "actor_target_update_interval": 1,
        "qf_learning_rate": None,
        "accelerate": "auto",
        "max_action_shift": None,
        "action_gradient_start": "replay",
    }
    assert {name: parameters[name].default for name in own} == own
    # what SAC has, in the same order and with the same defaults but for what the paper says
    sac = inspect.signature(stable_baselines3.SAC).parameters
    shared = [name for name in parameters if name not in own]
    assert shared == [name for name in sac if name in shared]
    different = {name for name in shared if parameters[name].default != sac[name].default}
    assert different == {"learning_starts"} and parameters["learning_starts"].default == 10_000


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_import_has_no_side_effects() -> None:
    finished = run(
        """
        import os, random, socket, sys, warnings
        import numpy as np
        import stable_baselines3
        import torch as th

        def refuse(*args, **kwargs):
            raise RuntimeError("opens the network")

        socket.socket.connect = refuse
        socket.socket.connect_ex = refuse
        socket.socket.bind = refuse
        socket.create_connection = refuse
        socket.getaddrinfo = refuse

        def settings():
            return {
                "dtype": th.get_default_dtype(),
                "device": str(th.get_default_device()),
                "gradients": th.is_grad_enabled(),
                "anomalies": th.is_anomaly_enabled(),
                "threads": (th.get_num_threads(), th.get_num_interop_threads()),
                "deterministic": th.are_deterministic_algorithms_enabled(),
                "precision": th.get_float32_matmul_precision(),
                "mkldnn": (th.backends.mkldnn.enabled, th.backends.mkldnn.matmul.fp32_precision),
                "cudnn": (th.backends.cudnn.enabled, th.backends.cudnn.benchmark, th.backends.cudnn.deterministic),
                "tf32": (th.backends.cuda.matmul.allow_tf32, th.backends.cudnn.allow_tf32),
                "random": (th.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
                "numpy": (np.geterr(), np.get_printoptions()),
                "warnings": list(warnings.filters),
                "environment": dict(os.environ),
                "print": repr(th.tensor([1e-9, 1.0])),
            }

        before = settings()
        import sb3_dipo
        after = settings()
        assert "sb3_dipo.dipo" in sys.modules
        for name in before:
            assert before[name] == after[name], (name, before[name], after[name])
        for name in ("rl_zoo3", "optuna", "diffusers", "mujoco", "sb3_dipo.fast"):
            assert name not in sys.modules, name
        """
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == finished.stderr == ""


def test_import_warns_of_nothing() -> None:
    # only of what this package does: its dependencies are imported first
    finished = run(
        """
        import gymnasium, numpy, stable_baselines3, torch, torch.utils.tensorboard
        import warnings
        warnings.simplefilter("error")
        import sb3_dipo
        """
    )
    assert finished.returncode == 0, finished.stderr
    finished = run("import sb3_dipo", "-W", "error")
    assert finished.returncode == 0, finished.stderr
