"""Puts the start-up files of sb3_dipo/zoo/startup beside the packages; all else is in setup.cfg."""

from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build


class build_startup(Command):
    """Copy the start-up files to the root of the wheel; of an editable one, too, where `data_files` are left out."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False  # set by setuptools

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(root)
        for file in self.get_source_files():
            self.copy_file(file, root)

    def get_source_files(self):
        """Relative paths of what is copied, for the source distribution."""
        return sorted(path.as_posix() for path in Path("sb3_dipo/zoo/startup").iterdir() if path.is_file())


build.sub_commands.append(("build_startup", None))
setup(cmdclass={"build_startup": build_startup})
