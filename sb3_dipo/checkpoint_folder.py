"""
The folder in which one run keeps its checkpoints, each in a directory of its own, and the lock that keeps other runs away.

A directory with a manifest is a complete checkpoint. This is apart from ``checkpoint.py`` because it knows nothing of agents.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
PREFIX = "checkpoint_"


def _sequence(directory: pathlib.Path) -> int:
    return int(directory.name.removeprefix(PREFIX))


def directories(folder: pathlib.Path) -> list[pathlib.Path]:
    """The directories of checkpoints, complete or not, in the order in which they were made."""
    found = folder.glob(f"{PREFIX}*") if folder.is_dir() else ()
    return sorted((path for path in found if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()), key=_sequence)


def complete(folder: pathlib.Path) -> list[pathlib.Path]:
    """Those of them that have a manifest."""
    return [directory for directory in directories(folder) if (directory / MANIFEST).is_file()]


def new_directory(folder: pathlib.Path) -> pathlib.Path:
    """Make the next directory. Where locks do not work, another run may make the same one first, and then it is left alone."""
    number = max([0, *map(_sequence, directories(folder))])
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            path = folder / f"{PREFIX}{number:06d}"
            path.mkdir()
            return path


# The folders that trainings of this process write into, each with the descriptor that holds its lock and the thread of the
# training. What a thread has left locked, because its training ended in an error, its next training uses again.
_claims: dict[pathlib.Path, tuple[int, int]] = {}


def claim(folder: pathlib.Path) -> bool:
    """Lock a folder for this thread. True if it is new; False if this thread has it already, or nothing can be locked."""
    folder.mkdir(parents=True, exist_ok=True)
    key, thread = folder.resolve(), threading.get_ident()
    holder = _claims.get(key, (0, 0))[1]
    if holder == thread or fcntl is None:
        return False
    if holder and holder not in [running.ident for running in threading.enumerate()]:
        release(folder, holder)  # its training ended in an error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(
                f"`folder` must belong to one run, and another one is writing its checkpoints into {folder}: choose another "
                "folder for this run, or wait until that one has ended."
            ) from None
        return False
    _claims[key] = descriptor, thread
    return True


def release(folder: pathlib.Path, thread: int | None = None) -> None:
    """Unlock a folder, if this thread, or the one given, has locked it."""
    descriptor, holder = _claims.get(folder.resolve(), (0, 0))
    if holder and holder == (thread or threading.get_ident()):
        del _claims[folder.resolve()]
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[None]:
    """Lock a folder, unless the running training has done so for longer."""
    new = claim(folder)
    try:
        yield
    finally:
        if new:
            release(folder)


def names(directories: list[pathlib.Path]) -> str:
    return ", ".join(map(str, directories)) or "none"


def find(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """
    Find the newest complete checkpoint, and read its manifest.

    :param folder: where the checkpoints lie, or one of them
    :raises ValueError: if there is none, or its manifest is not one of ours
    """
    if not (folder / MANIFEST).is_file():
        whole = complete(folder)
        if not whole:
            raise ValueError(f"`folder` must hold a whole checkpoint, one of the directories {PREFIX}*: {folder} has none.")
        folder = whole[-1]
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        manifest = None
    if not (isinstance(manifest, dict) and "algorithm" in manifest and isinstance(manifest.get("files"), dict)):
        raise ValueError(f"{folder / MANIFEST} is not the manifest of a checkpoint.")
    return folder, manifest


def checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: pathlib.Path) -> None:
    """Write a file or directory through to the disk, so that no later rename gets there first."""
    if os.name == "nt" and path.is_dir():  # which Windows does not open
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
