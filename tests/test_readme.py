"""The README keeps up with the code: its links lead where they say, and its tables name every argument."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from sb3_dipo import DIPO, DIPOPolicy
from sb3_dipo.actors import ACTORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", ["README.md", "examples/README.md"])
def test_links_lead_to_files(file: str) -> None:
    text = (ROOT / file).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert len(links) > 10
    for link in links:
        assert (ROOT / file).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("file", ["README.md", "examples/README.md"])
def test_commands_name_scripts_that_are_there(file: str) -> None:
    scripts = re.findall(r"python (\S+/\S+\.py)", (ROOT / file).read_text())
    assert len(scripts) > 3
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_links_to_code_lead_to_what_they_name() -> None:
    """To a file that defines it; never to a line, which would move whenever one above it is added."""
    assert not re.search(r"\]\([^)\s]*#L\d", README)
    links = re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)\)", README)
    assert len(links) > 10
    for code, link in links:
        text = (ROOT / link).read_text()
        for name in code.split("."):
            assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE), f"{link} does not define `{code}`"


def arguments() -> list[str]:
    named = [name for name in inspect.signature(DIPO).parameters if not name.startswith("_")]
    spaces_and_schedule = ("observation_space", "action_space", "lr_schedule", "samplers", "actor_options")
    of_policy = [name for name in inspect.signature(DIPOPolicy).parameters if name not in spaces_and_schedule]
    return [*named, *of_policy, *(option for actor in ACTORS.values() for option in actor.options)]


@pytest.mark.parametrize("name", sorted({*arguments()} - {"policy", "env", "features_extractor_kwargs", "optimizer_kwargs"}))
def test_every_argument_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README


def test_defaults_in_the_tables_are_the_codes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", README, flags=re.MULTILINE)
    assert len(rows) > 20
    classes: list[Any] = [DIPO, DIPOPolicy, *ACTORS.values()]
    signatures = [inspect.signature(each).parameters for each in classes]
    for name, default in rows:
        (actual,) = {str(parameters[name].default) for parameters in signatures if name in parameters}
        written = default.strip().strip('"').replace(",", "")
        if written in ("as the actor's", "[256 256 256]", "Mish"):  # None stands for these, or a class
            continue
        try:
            assert float(written) == float(actual), name
        except ValueError:
            assert written == actual, name
