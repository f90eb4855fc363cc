"""README and documentation keep up with the code: links lead where they say, and tables name every argument."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from sb3_dipo import DIPO, DIPOPolicy
from sb3_dipo.actors import ACTORS
from sb3_dipo.critics import CRITICS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARGUMENTS = (ROOT / "docs" / "arguments.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_link_names_is_in_its_file(page: Path) -> None:
    """`name` in [`file`](path): a function or an argument of that name is there."""
    named = re.findall(r"`([\w.]+)` in \[`[^`]+`\]\(([^)#\s]+)\)", page.read_text())
    assert named or page.name != "paper.md"
    for name, link in named:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", (page.parent / link).read_text()), (name, link)


def arguments() -> list[str]:
    named = [name for name in inspect.signature(DIPO).parameters if not name.startswith("_")]
    spaces_and_schedule = ("observation_space", "action_space", "lr_schedule", "samplers", "options")
    of_policy = [name for name in inspect.signature(DIPOPolicy).parameters if name not in spaces_and_schedule]
    classes: list[Any] = [*ACTORS.values(), *CRITICS.values()]
    return [*named, *of_policy, *(option for each in classes for option in each.options)]


@pytest.mark.parametrize("name", sorted({*arguments()} - {"policy", "env", "features_extractor_kwargs", "optimizer_kwargs"}))
def test_every_argument_is_documented(name: str) -> None:
    assert f"`{name}`" in ARGUMENTS


def test_defaults_in_the_tables_are_the_codes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", ARGUMENTS, flags=re.MULTILINE)
    assert len(rows) > 20
    classes: list[Any] = [DIPO, DIPOPolicy, *(base for each in (*ACTORS.values(), *CRITICS.values()) for base in each.mro())]
    signatures = [inspect.signature(each).parameters for each in classes if each.__module__.startswith("sb3_dipo")]
    for name, default in rows:
        actual = {str(parameters[name].default) for parameters in signatures if name in parameters}
        written = default.strip().strip('"').replace(",", "")
        if written in ("as the actor's", "[256 256 256]", "Mish") or name in (
            "solver",
            "num_inference_steps",
        ):  # None or a class stands for these, and the flow has others
            continue
        try:
            assert {float(written)} == {float(each) for each in actual}, name
        except ValueError:
            assert {written} == actual, name
