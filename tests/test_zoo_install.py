"""
What ``pip install`` brings: ``python -m rl_zoo3.train --algo dipo`` works away from the checkout, from a wheel and from an
editable install, and whatever happens to the package, Python starts and the other algorithms train.

The environments are new ones, which borrow all but sb3_dipo from the one that runs the tests.
"""

import ast
import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import sb3_dipo.zoo.__main__
from sb3_dipo import DIPO

ROOT = Path(__file__).parent.parent
SOURCES = ("sb3_dipo", "hyperparams", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
STARTUP = ROOT / "sb3_dipo" / "zoo" / "startup"
MODES = ("wheel", "editable")
SMALL = (
    *("learning_starts:100", "buffer_size:1000", "batch_size:16"),
    "policy_kwargs:dict(net_arch=[16],num_train_timesteps=3,beta_schedule='cosine')",
)


@dataclass(frozen=True)
class Environment:
    """A virtual environment with sb3_dipo in it."""

    folder: Path
    shared: Path
    """The folder of what it borrows."""
    source: Path | None
    """The copy of the checkout that an editable install points at."""

    @property
    def site(self) -> Path:
        (site,) = self.folder.glob("lib/python3.*/site-packages")
        return site

    @property
    def package(self) -> Path:
        return (self.source or self.site) / "sb3_dipo"

    @property
    def hyperparams(self) -> Path:
        return (self.source / "hyperparams" if self.source else self.package / "hyperparams") / "dipo.yml"

    def start(self, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python, by default in the folder of the environment, with none of the settings of whoever runs the tests."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SB3_DIPO"))}
        outside.pop("VIRTUAL_ENV", None)
        return subprocess.run(
            [str(self.folder / "bin" / "python"), *arguments],
            cwd=cwd or self.folder,
            env={**outside, "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy", **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
        """The same for what must succeed; returns what it printed."""
        done = self.start(*arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: str, cwd: Path | None = None) -> str:
        return self.run("-m", "pip", "--isolated", "--disable-pip-version-check", *arguments, cwd=cwd)


def copy_sources(folder: Path) -> Path:
    """A copy, as building leaves files in the folder that it builds from."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def make_environment(folder: Path, shared: Path, source: Path | None = None) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    environment = Environment(folder, shared, source)
    (environment.site / "shared.pth").write_text(f"{shared}\n")
    return environment


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Links to all that this environment holds, but for sb3_dipo, which it has, too: that one must not be found by mistake.

    Python runs no start-up files from here, as it is no site-packages.
    """
    folder = tmp_path_factory.mktemp("shared")
    for site in [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]:
        for path in site.iterdir():
            if "dipo" not in path.name and path.name != "__pycache__" and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """The source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    source = copy_sources(folder / "source")
    builder = make_environment(folder / "builder", shared)
    builder.run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    builder.pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(sdist))
    return folder


Install = Callable[[str, Path], Environment]


@pytest.fixture(scope="module")
def install(shared: Path, dist: Path) -> Install:
    """Makes an environment in a folder, and installs sb3_dipo in one of the MODES."""

    def install(mode: str, folder: Path) -> Environment:
        source = copy_sources(folder / "checkout") if mode == "editable" else None
        environment = make_environment(folder / "environment", shared, source)
        (wheel,) = dist.glob("*.whl")
        what = ("--no-build-isolation", "--editable", str(source)) if source else (str(wheel),)
        environment.pip("install", "--no-deps", "--no-index", *what)
        return environment

    return install


@pytest.fixture(scope="module", params=MODES)
def environment(request: pytest.FixtureRequest, install: Install, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Both kinds of install, for tests that change nothing in it."""
    return install(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wheel(install: Install, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The same where one of the two is enough."""
    return install("wheel", tmp_path_factory.mktemp("only_wheel"))


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.fixture
def small_zoo(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with an rl_zoo3 that needs no PyTorch and has the names that matter."""
    folder = tmp_path / "small_zoo"
    files = {
        "__init__": "from rl_zoo3.utils import ALGOS",
        "utils": "ALGOS = {'td3': object}",
        "hyperparams_opt": "HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER = {}, {}",
        "exp_manager": "class ExperimentManager: ...",
        "train": "import rl_zoo3.exp_manager, rl_zoo3.hyperparams_opt\nprint(*rl_zoo3.ALGOS)",
    }
    write_package(folder / "rl_zoo3", {f"{name}.py": f"{content}\n" for name, content in files.items()})
    return folder


FINDERS = "[type(finder).__name__ for finder in sys.meta_path if type(finder).__module__ == '_sb3_dipo_zoo']"


# --- the literal command ---


def trained(folder: Path, number: int = 1) -> DIPO:
    return DIPO.load(folder / "logs" / "dipo" / f"Pendulum-v1_{number}" / "Pendulum-v1.zip", device="cpu")


@pytest.mark.slow
def test_literal_commands(environment: Environment, tmp_path: Path) -> None:
    """Train, enjoy, record a video, tune, and train with what a trial suggested."""
    zoo = ("--algo", "dipo", "--env", "Pendulum-v1", "-f", "logs")
    train = ("-m", "rl_zoo3.train", *zoo, "--device", "cpu", "--seed", "1", "--eval-freq", "-1")

    printed = environment.run(*train, "-n", "210", "-params", *SMALL, cwd=tmp_path)
    assert f"Loading hyperparameters from: {environment.hyperparams}\n" in printed
    assert "Using 'default' hyperparameters" not in printed
    agent = trained(tmp_path)
    assert agent._n_updates >= 100
    ours = yaml.safe_load(environment.hyperparams.read_text())["Pendulum-v1"]
    for name in ("action_lr", "action_gradient_steps", "action_grad_norm_ratio", "tau", "gamma"):
        assert getattr(agent, name) == ours[name], name

    printed = environment.run("-m", "rl_zoo3.enjoy", *zoo, "--device", "cpu", "--no-render", "-n", "205", cwd=tmp_path)
    assert "Mean reward: -" in printed and "1 Episodes" in printed

    environment.run("-m", "rl_zoo3.record_video", *zoo, "-n", "5", "-o", "videos", cwd=tmp_path)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert b"ftyp" in video.read_bytes()[:16]

    # a trial may suggest 100 denoising steps for networks of any size: few updates, and short episodes to evaluate it
    study = ("--storage", "study.log", "--study-name", "s", "-n", "24", "-params", "learning_starts:20", "buffer_size:1000")
    tune = ("-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots")
    printed = environment.run(*train, *tune, "--env-kwargs", "max_episode_steps:10", *study, cwd=tmp_path)
    assert "Number of finished trials:  2" in printed
    (report,) = (tmp_path / "logs" / "dipo").glob("report_*.csv")
    with report.open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]

    printed = environment.run(*train, "--trial-id", "1", *study, cwd=tmp_path)  # the zoo takes no notice of number 0
    assert "Loading from Optuna study" in printed
    assert_is_trial(trained(tmp_path, 3), trials[1])  # tuning has made a folder, too
    assert trials[0]["params_learning_rate"] != trials[1]["params_learning_rate"]

    assert {path.name for path in tmp_path.iterdir()} == {"logs", "videos", "study.log"}


def assert_is_trial(agent: DIPO, trial: dict[str, str]) -> None:
    """Every parameter that Optuna reported is the agent's."""
    suggested = {name.removeprefix("params_"): value for name, value in trial.items() if name.startswith("params_")}
    params = {name: value for name, value in suggested.items() if value}
    expected: dict[str, Any] = {
        "gamma": 1 - float(params.pop("one_minus_gamma")),
        "batch_size": 2 ** int(params.pop("batch_size_pow")),
        "gradient_steps": int(params["train_freq"]),
        "action_gradient_start": params.pop("action_gradient_start"),
    }
    if expected["action_gradient_start"] == "replay":
        expected["persist_improved_actions"] = params.pop("persist_improved_actions") == "True"
        if params.pop("bound_shift") == "True":
            expected["max_action_shift"] = float(params.pop("max_action_shift"))
    for name in ("tau", "action_lr", "action_gradient_steps", "action_grad_norm_ratio"):
        expected[name] = float(params.pop(name))
    found = {name: getattr(agent, name) for name in expected}
    assert found.pop("action_gradient_start") == expected.pop("action_gradient_start")
    assert found == pytest.approx(expected)
    assert agent.lr_schedule(1.0) == pytest.approx(float(params.pop("learning_rate")))
    assert agent.train_freq.frequency == int(params.pop("train_freq"))  # type: ignore[union-attr]

    kwargs = dict(agent.policy_kwargs)
    sizes = {"small": [64, 64], "medium": [256, 256], "large": [256, 256, 256]}  # rl_zoo3's names for them
    assert kwargs.pop("net_arch") == sizes[params.pop("net_arch")]
    assert kwargs.pop("samplers") == {"behaviour": {"num_candidates": int(params.pop("behaviour_candidates"))}}
    actor, critic = params.pop("actor"), params.pop("critic")
    assert (kwargs.pop("actor"), kwargs.pop("critic")) == (actor, critic)
    assert str(kwargs.pop("layer_norm")) == params.pop("layer_norm")
    if critic == "quantile":
        for name in ("n_quantiles", "top_quantiles_to_drop_per_net"):
            assert kwargs.pop(name) == int(float(params.pop(name)))
    if actor == "flow":
        assert kwargs.pop("solver") == params.pop("flow_solver")
        assert kwargs.pop("num_inference_steps") == int(float(params.pop("flow_steps")))
    else:
        steps = int(float(params.pop("num_train_timesteps")))
        solver = params.pop("solver", None) or params.pop("ou_solver")
        assert kwargs.pop("num_train_timesteps") == steps
        assert kwargs.pop("beta_schedule") == params.pop("beta_schedule") and kwargs.pop("solver") == solver
        if "eta" in params:
            assert kwargs.pop("eta") == pytest.approx(float(params.pop("eta")))
        if "inference_fraction" in params:
            fraction = kwargs["num_inference_steps"] / steps
            assert fraction == pytest.approx(float(params.pop("inference_fraction")), abs=0.51 / steps)
            # what the trial itself has used
            assert kwargs.pop("num_inference_steps") == float(trial["user_attrs_num_inference_steps"])
    assert not params, "a new parameter of tuning is to be compared here, too"
    assert not set(kwargs) & {"solver", "ou_solver", "eta", "num_inference_steps"}


@pytest.mark.slow
def test_explicit_command(wheel: Environment, tmp_path: Path) -> None:
    """``python -m sb3_dipo.zoo`` needs no start-up file: with it switched off, and where Python sees no site-packages."""
    zoo = ("--algo", "dipo", "--env", "Pendulum-v1", "-f", "logs", "--device", "cpu")
    options = ("-n", "105", "--eval-freq", "-1", "-params", *SMALL)
    # the same command without us: this is what it is for
    refused = wheel.start("-m", "rl_zoo3.train", *zoo, *options, cwd=tmp_path, SB3_DIPO_ZOO="0")
    assert refused.returncode == 2 and "invalid choice: 'dipo'" in refused.stderr
    assert "Warning" not in refused.stderr and not list(tmp_path.iterdir())

    printed = wheel.run("-m", "sb3_dipo.zoo", "train", *zoo, *options, cwd=tmp_path, SB3_DIPO_ZOO="0")
    assert f"Loading hyperparameters from: {wheel.hyperparams}\n" in printed
    assert trained(tmp_path)._n_updates == 5

    path = os.pathsep.join([str(wheel.site), str(wheel.shared)])
    command = ("-S", "-m", "sb3_dipo.zoo", "enjoy", *zoo, "--no-render", "-n", "205")
    assert "1 Episodes" in wheel.run(*command, cwd=tmp_path, PYTHONPATH=path)


def test_explicit_command_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["trian", "--algo", "dipo"]):
        monkeypatch.setattr(sys, "argv", ["sb3_dipo.zoo", *arguments])
        with pytest.raises(SystemExit, match=r"usage: python -m sb3_dipo\.zoo \{train,enjoy,"):  # a text: status 1, on stderr
            sb3_dipo.zoo.__main__.main()
    zoo = importlib.util.find_spec("rl_zoo3")
    assert zoo is not None and zoo.origin is not None
    for name, module in sb3_dipo.zoo.__main__.SCRIPTS.items():
        assert module.split(".")[-1] == name
        assert Path(zoo.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").exists(), f"rl_zoo3 has no {module}"


# --- what is built and installed ---


def test_distributions(dist: Path) -> None:
    startup = {path.name for path in STARTUP.iterdir() if path.is_file()}
    assert startup == {"_sb3_dipo_zoo.py", "sb3_dipo.pth"}
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"sb3_dipo/zoo/startup/{name}" for name in startup} <= packed
    with zipfile.ZipFile(wheel) as installed:
        names = {name for name in installed.namelist() if ".dist-info/" not in name}
        for name in startup:
            assert installed.read(name) == (STARTUP / name).read_bytes()
        for name in ("dipo.yml", "dipo_paper.yml"):
            assert installed.read(f"sb3_dipo/hyperparams/{name}") == (ROOT / "hyperparams" / name).read_bytes()
    files = {path.relative_to(ROOT) for path in (ROOT / "sb3_dipo").rglob("*") if path.is_file() and path.parent != STARTUP}
    files |= {Path("sb3_dipo", path.relative_to(ROOT)) for path in (ROOT / "hyperparams").iterdir() if path.is_file()}
    assert names == startup | {path.as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_real_modules(environment: Environment) -> None:
    """Whatever way the zoo's modules are imported, they are what they were, plus DIPO; and all is from this environment."""
    code = """
        import importlib, importlib.resources, inspect, pathlib, sys
        import rl_zoo3.train
        import sb3_dipo, sb3_dipo.zoo, _sb3_dipo_zoo

        for module in (sb3_dipo, sb3_dipo.zoo, _sb3_dipo_zoo):
            print(module.__file__)
        for name in sb3_dipo.zoo.MODULES:
            module = sys.modules[name]
            assert type(module.__spec__.loader).__name__ == "SourceFileLoader" and module.__loader__ is module.__spec__.loader
            text = pathlib.Path(module.__file__).read_text()
            assert inspect.getsource(module) == text == module.__spec__.loader.get_source(name)
            assert importlib.resources.files("rl_zoo3").joinpath(name.split(".")[1] + ".py").read_text() == text
            again = importlib.reload(module)
            assert again is module and module.__spec__.loader.get_source(name) == text
        from rl_zoo3 import ALGOS, hyperparams_opt, utils
        for table in (ALGOS, utils.ALGOS):
            assert table["dipo"] is sb3_dipo.DIPO and {"ppo", "sac", "td3", "tqc"} < set(table)
        assert "dipo" in hyperparams_opt.HYPERPARAMS_SAMPLER and "dipo" in hyperparams_opt.HYPERPARAMS_CONVERTER
    """
    printed = environment.run("-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)).splitlines()
    package, site = environment.package, environment.site
    assert printed == [str(package / "__init__.py"), str(package / "zoo" / "__init__.py"), str(site / "_sb3_dipo_zoo.py")]


def test_requirements_are_met(environment: Environment) -> None:
    """Those of sb3_dipo; of what else is there this knows nothing."""
    assert "sb3_dipo" in environment.pip("list", "--format=freeze", "--path", str(environment.site)).replace("-", "_")
    done = environment.start("-m", "pip", "--isolated", "check")
    assert done.returncode == 0 or "requires" in done.stdout, done.stderr
    assert "sb3_dipo" not in done.stdout.replace("-", "_")


@pytest.mark.parametrize("mode", MODES)
def test_uninstalling_leaves_nothing(mode: str, install: Install, tmp_path: Path) -> None:
    environment = install(mode, tmp_path)
    assert {"sb3_dipo.pth", "_sb3_dipo_zoo.py"} < {path.name for path in environment.site.iterdir()}
    environment.pip("uninstall", "--yes", "sb3_dipo")
    assert not list(environment.folder.rglob("*dipo*"))
    done = environment.start("-c", "import importlib.util, sys; print(importlib.util.find_spec('sb3_dipo'), sys.meta_path)")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("None ") and "dipo" not in done.stdout


# --- the start of Python ---


def test_start_up_loads_one_module(environment: Environment, tmp_path: Path) -> None:
    """Ours, and nothing for its sake: no PyTorch, not the package, nothing of the standard library."""
    without = Environment(tmp_path / "without", environment.shared, environment.source)
    shutil.copytree(environment.folder, without.folder, symlinks=True)
    (without.site / "sb3_dipo.pth").unlink()
    code = "import sys; print(*sys.modules)"
    loaded, usual = set(environment.run("-c", code).split()), set(without.run("-c", code).split())
    assert loaded - usual == {"_sb3_dipo_zoo"} and usual <= loaded
    assert "torch" not in loaded and "sb3_dipo" not in loaded


@pytest.mark.parametrize("options", ["", "-I", "-s", "-E", "-I -s -E", "-W error", "-X utf8=0 -B -O"])
def test_start_up_is_silent(options: str, wheel: Environment) -> None:
    done = wheel.start(*options.split(), "-c", f"import sys; print({FINDERS})")
    assert done.stderr == "" and done.stdout == "['Finder']\n"


@pytest.mark.parametrize(("value", "count"), [("0", 0), ("1", 1), ("", 1)])
def test_switch(value: str, count: int, wheel: Environment) -> None:
    done = wheel.start("-c", f"import sys; print(len({FINDERS}))", SB3_DIPO_ZOO=value)
    assert done.stderr == "" and done.stdout == f"{count}\n"


def test_installing_twice(wheel: Environment) -> None:
    code = f"import sys, _sb3_dipo_zoo as ours; ours.install(); ours.install(); print(len({FINDERS}))"
    assert wheel.run("-c", code) == "1\n"


def test_start_up_file_is_portable() -> None:
    """It imports `os` and `sys`, which every start loads on every system, and of `os` it uses what every system has."""
    tree = ast.parse((STARTUP / "_sb3_dipo_zoo.py").read_text())
    for block in [node for node in tree.body if isinstance(node, ast.If)]:
        assert ast.unparse(block.test) == "TYPE_CHECKING" and not block.orelse
        tree.body.remove(block)
    at_once = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    assert at_once == {"import os", "import sys"}
    in_all = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert in_all - at_once == {"import warnings", "from sb3_dipo.zoo import register"}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    assert {node.attr for node in used if ast.unparse(node.value) == "os"} == {"environ"}
    assert {node.attr for node in used if ast.unparse(node.value) == "sys"} == {"meta_path"}
    # run by Python itself, in the encoding of the machine before 3.13
    assert all(path.read_bytes().isascii() for path in STARTUP.iterdir() if path.is_file())


def test_modules_are_those_of_the_package() -> None:
    spec = importlib.util.spec_from_file_location("startup_file", STARTUP / "_sb3_dipo_zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(module.MODULES) == sorted(sb3_dipo.zoo.MODULES)


def test_registers_after_each_import(wheel: Environment, small_zoo: Path) -> None:
    """With a package that only reports what it is called with."""
    write_package(small_zoo / "sb3_dipo", {"__init__.py": ""})
    report = "def register(module):\n    print(module.__name__, *[name for name in vars(module) if name[0].isalpha()])\n"
    write_package(small_zoo / "sb3_dipo" / "zoo", {"__init__.py": report})
    code = """
        import importlib, importlib.util, sys
        import rl_zoo3  # imports utils
        importlib.import_module("rl_zoo3.exp_manager")
        from rl_zoo3 import hyperparams_opt, train
        import rl_zoo3.utils
        importlib.reload(rl_zoo3.utils)
        del sys.modules["rl_zoo3.exp_manager"]
        assert importlib.util.find_spec("rl_zoo3.exp_manager").origin.endswith("exp_manager.py")
        import rl_zoo3.exp_manager
        try:
            import rl_zoo3.no_such_module
        except ModuleNotFoundError as error:
            print(error)
    """
    printed = wheel.run("-W", "error", "-c", textwrap.dedent(code), PYTHONPATH=str(small_zoo)).splitlines()
    assert printed == [
        "rl_zoo3.utils ALGOS",
        "rl_zoo3.exp_manager ExperimentManager",
        "rl_zoo3.hyperparams_opt HYPERPARAMS_SAMPLER HYPERPARAMS_CONVERTER",
        "td3",  # what train prints: it is not one of ours
        "rl_zoo3.utils ALGOS",
        "rl_zoo3.exp_manager ExperimentManager",
        "No module named 'rl_zoo3.no_such_module'",
    ]


def test_errors_of_the_zoo_are_its_own(wheel: Environment, small_zoo: Path) -> None:
    (small_zoo / "rl_zoo3" / "utils.py").write_text("import no_such_module\n")
    done = wheel.start("-c", "import rl_zoo3", PYTHONPATH=str(small_zoo))
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")
    assert "Warning" not in done.stderr


# --- a broken package ---

BROKEN: dict[str, dict[str, str | None]] = {
    "raises on import": {"__init__.py": "raise RuntimeError('broken')"},
    "lacks a dependency": {"__init__.py": "import no_such_module"},
    "cannot be compiled": {"__init__.py": "", "zoo/__init__.py": "def register(:"},
    "is of another version": {"__init__.py": "", "zoo/__init__.py": ""},
    "does not fit the zoo": {"__init__.py": "", "zoo/__init__.py": "def register(module): module.ALGORITHMS['dipo'] = 1"},
    "fails at the end": {
        "__init__.py": "",
        "zoo/__init__.py": "def register(module): assert 'exp_manager' not in module.__name__",
    },
    "fails after a look at the zoo": {"__init__.py": "", "zoo/__init__.py": "import rl_zoo3.exp_manager\nraise OSError"},
    "has no zoo": {"__init__.py": "", "zoo": None},
    "is gone": {"": None},
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_package(damage: str, install: Install, small_zoo: Path, tmp_path: Path) -> None:
    """One warning, when rl_zoo3 is imported, and its own algorithms are there."""
    environment = install("wheel", tmp_path)
    for name, content in BROKEN[damage].items():
        if content is None:
            shutil.rmtree(environment.package / name)
        else:
            (environment.package / name).write_text(content)
    silent = environment.start("-c", f"import sys; print({FINDERS})")
    assert silent.stderr == "" and silent.stdout == "['Finder']\n"
    code = f"import rl_zoo3.train, rl_zoo3.exp_manager, sys; print({FINDERS})"
    done = environment.start("-W", "always", "-c", code, PYTHONPATH=str(small_zoo))
    assert done.returncode == 0 and done.stdout == "td3\n[]\n"  # it does not try again
    assert done.stderr.count("Warning: ") == 1
    assert "sb3_dipo could not be registered" in done.stderr and "SB3_DIPO_ZOO=0" in done.stderr
    off = environment.start("-m", "rl_zoo3.train", PYTHONPATH=str(small_zoo), SB3_DIPO_ZOO="0")
    assert off.stdout == "td3\n" and off.stderr == ""


@pytest.mark.slow
def test_moved_checkout(install: Install, tmp_path: Path) -> None:
    """An editable install whose folder is elsewhere now: rl_zoo3 trains TD3, and says what it lacks."""
    environment = install("editable", tmp_path)
    (tmp_path / "checkout").rename(tmp_path / "elsewhere")
    command = ("-m", "rl_zoo3.train", "--algo", "td3", "--env", "Pendulum-v1", "-n", "105", "--eval-freq", "-1")
    small = ("learning_starts:100", "buffer_size:1000", "policy_kwargs:dict(net_arch=[16])")
    done = environment.start(*command, "--device", "cpu", "-params", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs" / "td3" / "Pendulum-v1_1" / "Pendulum-v1.zip").exists()
    assert done.stderr.count("RuntimeWarning: sb3_dipo could not be registered") == 1
