"""What all experiments share: the names and colors of algorithms, and how files, tables and figures are written."""

import io
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import mujoco
from matplotlib.figure import Figure
from PIL import Image

NAMES = dict(dipo="DIPO", sac="SAC", td3="TD3", ppo="PPO", tqc="TQC", crossq="CrossQ")
COLORS = dict(dipo="tab:blue", sac="tab:orange", td3="tab:green", ppo="tab:red", tqc="tab:purple", crossq="tab:brown")


def palette(names: Collection[str]) -> dict[str, str]:
    """Colors of algorithms and variants, no two of twelve the same; the first DIPO has DIPO's."""
    ours = next((name for name in names if name.startswith("dipo")), "dipo")
    known = COLORS if "dipo" in names else COLORS | {ours: COLORS["dipo"]}
    taken = [known[name] for name in names if name in known]
    others = ["tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:grey"]
    others += ["tab:orange", "tab:green", "tab:red", "black", "gold", "navy"]
    free = itertools.cycle(color for color in others if color not in taken)
    return {name: known.get(name) or next(free) for name in names}


def log_to(folder: Path) -> None:
    """Send MuJoCo's warnings to a file in the folder. Otherwise MuJoCo writes one wherever the script is started."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(handlers=[logging.FileHandler(folder / "warnings.log", delay=True)])
    mujoco.set_mju_user_warning(logging.warning)


def write(path: Path, content: str | bytes) -> None:
    """Write the whole file at once, so that whoever is killed meanwhile leaves the old one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a PNG with a palette of 128 colours, which is a third of the size. The same figure gives the same bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    small = io.BytesIO()
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True)
    write(path, small.getvalue())


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table whose first column is aligned to the left, and the others to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def command() -> str:
    """The command that makes what this script writes, for a report."""
    return shlex.join(["python", f"examples/paper/{Path(sys.argv[0]).name}", *(a for a in sys.argv[1:] if a != "--report")])
