"""Scripts that are started by tests, and ended with all that they have started, whatever happens."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

EXAMPLES = Path(__file__).parent.parent / "examples"
PAPER = EXAMPLES / "paper"
MARK = "SB3_DIPO_STARTED_BY"
PATIENCE = 3_600.0
"""Seconds after which something hangs. Nothing that works takes that long, on however busy a machine."""


class Scripts:
    """
    Starts programs, each on one thread, and ends them on leaving the context.

    All that a program starts inherits a mark in its environment, by which it is found when the program itself is gone and
    whatever session it has moved to, as the processes of Ray.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.pipes = contextlib.ExitStack()

    def __enter__(self) -> "Scripts":
        return self

    def __exit__(self, *_: object) -> None:
        while left := self.left():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        self.pipes.close()

    def left(self) -> list[psutil.Process]:
        """What was started here, and is still running."""
        marked = [
            process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get(MARK) == self.mark
        ]
        return [process for process in marked if is_running(process)]

    def start(self, script: Path, *arguments: str, cwd: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, str(script), *arguments]
        pipe: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        pipe |= dict(preexec_fn=heed_ctrl_c, env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark})
        process = subprocess.Popen(command, cwd=cwd, **pipe)
        return self.pipes.enter_context(process)

    def run(self, script: Path, *arguments: str, cwd: Path) -> str:
        """Run to the end, which must be a good one; what was printed."""
        return finish(self.start(script, *arguments, cwd=cwd))


def heed_ctrl_c() -> None:
    """Where the tests run in the background of a shell, SIGINT is ignored, and so it would be by all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait until it has ended well, and return what it printed."""
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert "Warning" not in error
    return out


def until(condition: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> Any:
    """Wait until something is true, which a process is to bring about; it must not end before."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
