"""
Installed beside sb3_dipo and run at each start of Python: has sb3_dipo.zoo.register() follow the import of rl_zoo3.

Every interpreter of the environment pays for this file, so it imports nothing that is not loaded already, and does nothing
but wait. SB3_DIPO_ZOO=0 switches it off.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

MODULES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})


class Finder:
    """Finds nothing by itself: for the modules above it takes what the others find, and registers DIPO after the import."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in MODULES:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec and find_spec(name, path, target)
            if spec is not None:
                try:
                    self._register_after(spec.loader)
                except Exception as error:
                    self._give_up(error)
                return spec
        return None

    def _register_after(self, loader: "Loader | None") -> None:
        assert loader is not None
        exec_module = loader.exec_module

        def exec_and_register(module: "ModuleType") -> None:
            exec_module(module)
            if self not in sys.meta_path:  # given up
                return
            try:
                from sb3_dipo.zoo import register

                register(module)
            except Exception as error:
                self._give_up(error)

        loader.exec_module = exec_and_register  # type: ignore[method-assign]  # a loader is its module's alone

    def _give_up(self, error: Exception) -> None:
        """Whatever is wrong with sb3_dipo, rl_zoo3 works without it: warn once, and wait no longer."""
        if self not in sys.meta_path:  # given up already, while sb3_dipo was importing rl_zoo3 itself
            return
        import warnings

        sys.meta_path.remove(self)
        warnings.warn(
            f"sb3_dipo could not be registered with rl_zoo3, where `--algo dipo` will not work "
            f"({type(error).__name__}: {error}). Set SB3_DIPO_ZOO=0 to switch this off.",
            RuntimeWarning,
            stacklevel=2,
        )


def install() -> None:
    """Wait for rl_zoo3, once per interpreter."""
    if os.environ.get("SB3_DIPO_ZOO") != "0" and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
