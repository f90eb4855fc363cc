"""The pages show what works: every block of Python runs as it stands, and Sphinx builds them without a warning."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_dipo import DIPO, ExactCheckpointCallback
from sb3_dipo.diffusion import SOLVERS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
BEFORE = {"speed.md": 'from sb3_dipo import DIPO\nenv = "Pendulum-v1"\n'}
"""What a page takes for granted."""


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The blocks of Python of a page, each with the number of its first line."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        yield text.count("\n", 0, block.start(1)), block[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training takes a second, however long and with whatever networks a page asks for."""
    set_up, learn, init = DIPO._setup_model, OffPolicyAlgorithm.learn, ExactCheckpointCallback.__init__

    def small_set_up(model: Any) -> None:
        model.learning_starts, model.batch_size = min(model.learning_starts, 20), 8
        model.buffer_size = min(model.buffer_size, 1_000)
        model.policy_kwargs = {"net_arch": [8, 8], **model.policy_kwargs}
        set_up(model)

    def short_learn(model: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        return learn(model, min(total_timesteps, 30), *args, **kwargs)

    def early_checkpoints(callback: Any, save_freq: int, *args: Any, **kwargs: Any) -> None:
        init(callback, min(save_freq, 10), *args, **kwargs)

    monkeypatch.setattr(DIPO, "_setup_model", small_set_up)
    monkeypatch.setattr(OffPolicyAlgorithm, "learn", short_learn)
    monkeypatch.setattr(ExactCheckpointCallback, "__init__", early_checkpoints)
    monkeypatch.setitem(SOLVERS, "renoise", SOLVERS["ddpm"])  # the solver of docs/extending.md is gone after the test
    monkeypatch.chdir(tmp_path)


def run(page: Path) -> dict[str, Any]:
    """Run all blocks of a page one after the other, as a reader would; what they have defined."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(BEFORE.get(page.name, ""), names)
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)
    return names


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "page", [page for page in (ROOT / "README.md", *PAGES) if any(blocks(page))], ids=lambda page: page.name
)
def test_code_runs(page: Path) -> None:
    run(page)


@pytest.mark.usefixtures("quick")
def test_parts_of_ones_own_learn() -> None:
    """Each agent of the page has made updates with the part that the page defines."""
    names = run(ROOT / "docs" / "extending.md")
    model = DIPO(
        "MlpPolicy", "Pendulum-v1", policy_kwargs=dict(actor=names["MixtureActor"], critic=names["PessimisticCritic"])
    )
    model.policy.set_sampler(num_candidates=3, which="behaviour")
    model.learn(30)
    assert model._n_updates == 10
    assert names["model"]._n_updates == 10
    assert names["model"].policy.samplers["behaviour"].solver == "renoise"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text(), flags=re.MULTILINE))
    assert {page.stem for page in PAGES} - {"index"} <= listed


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [link for name in ("href", "src") if (link := given.get(name))]
        self.anchors |= {given["id"] or ""} if "id" in given else set()


@pytest.mark.slow
def test_pages_are_built_without_a_warning_and_without_a_dead_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", "docs"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", ".", tmp_path / "html"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.resolve(): Links(path) for path in (tmp_path / "html").rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            file = file.partition("?")[0]
            if re.match(r"\w+:", link):
                continue
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), (path, link)
            # from a listing, viewcode leads back to where a class is defined, and the API has it where it is imported from
            if anchor and target in pages and "_modules" not in path.parts:
                assert anchor in pages[target].anchors, (path, link)
