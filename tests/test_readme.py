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


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in link]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).is_file(), link


def test_links_to_lines_lead_to_what_they_name() -> None:
    links = re.findall(r"\[`([^`]+)`\]\(([^)#\s]+)#L(\d+)\)", README)
    assert len(links) > 10
    for code, link, number in links:
        lines = (ROOT / link).read_text().splitlines()
        text = re.sub(r"^DIPO\.(\w+)$", r"def \1(", code)
        found = [i + 1 for i, line in enumerate(lines) if text in line]
        assert int(number) in found, f"`{code}` is in lines {found} of {link}, not {number}"


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
