"""
A pytest plugin: the package as if ``sb3_dipo.fast`` had been deleted, and agents that compute plainly where a test does not
say how. Tests that ask for another mode are left out.

    python -m pytest -p without_fast tests/test_run.py        with tests/ on the path
"""

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest

FAST = "sb3_dipo.fast"


class NoFast(importlib.abc.MetaPathFinder):
    """Finds nothing, and forbids others to look."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == FAST or fullname.startswith(f"{FAST}."):
            raise ModuleNotFoundError(f"No module named {fullname!r}: it was left out", name=fullname)
        return None


def leave_out_fast() -> None:
    """From now on nothing of it can be imported, and ``accelerate`` is "off" where it is not given."""
    assert FAST not in sys.modules
    sys.meta_path.insert(0, NoFast())

    from sb3_dipo import DIPO

    signature = inspect.signature(DIPO.__init__)
    defaults = [each.default for each in signature.parameters.values() if each.default is not inspect.Parameter.empty]
    names = [name for name, each in signature.parameters.items() if each.default is not inspect.Parameter.empty]
    defaults[names.index("accelerate")] = "off"
    DIPO.__init__.__defaults__ = tuple(defaults)


def pytest_configure(config: pytest.Config) -> None:
    leave_out_fast()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what asks for another mode by a parameter."""
    modes = ("auto", "compile", "cudagraphs")
    others = [item for item in items if {str(value) for value in getattr(item, "callspec", _None).params.values()} & {*modes}]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


class _None:
    params: dict[str, object] = {}  # noqa: RUF012


def pytest_sessionfinish(session: pytest.Session) -> None:
    assert FAST not in sys.modules
