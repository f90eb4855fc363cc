"""The notebooks run from top to bottom, and those in the repository show what they made."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from processes import EXAMPLES

NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
TINY = {
    "policy_under_the_magnifier": "RANDOM_STEPS, UPDATES, SAMPLES = 300, 3, 100",
    "train_and_compare": "PENDULUM_STEPS, EVAL_FREQ, RANDOM_STEPS, UPDATES, ROLLOUTS = 110, 110, 300, 3, 2",
}
"""The sizes of a test, in the place of the cell that has those of a reader."""

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.slow
@notebooks
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """In a folder of its own, as it stands but for its sizes, and without a warning."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    names = set(re.findall(r"^(\w+) =", parameters.source, flags=re.MULTILINE))
    assert names == set(re.findall(r"[A-Z_]{3,}", TINY[path.stem])), "every size has a small value here"
    parameters.source = TINY[path.stem]
    NotebookClient(notebook, timeout=3_600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures(path)


def figures(path: Path) -> int:
    """How many cells end with a figure."""
    ends = [cell.source.splitlines()[-1] for cell in code_cells(path)]
    return sum(end == "figure" or end.startswith("plots.plot_policy(") for end in ends)


@notebooks
def test_it_is_in_the_repository_as_it_was_run_and_light(path: Path) -> None:
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures(path) >= 2
    assert path.stat().st_size < 500 * 1024
    assert "/home/" not in path.read_text() and "/opt/" not in path.read_text()


@notebooks
def test_the_first_code_cell_installs_the_package_where_it_is_missing(path: Path) -> None:
    first = code_cells(path)[0].source
    assert 'if importlib.util.find_spec("sb3_dipo") is None:\n    %pip install' in first and '"sb3_dipo[plots]"' in first
