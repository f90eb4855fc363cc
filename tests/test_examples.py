"""The examples run, for a few updates, and write where they are told to."""

import re
from pathlib import Path

import pytest
from PIL import Image
from processes import EXAMPLES, Scripts

from sb3_dipo import DIPO, RECOMMENDED


@pytest.mark.slow
def test_train(scripts: Scripts, tmp_path: Path) -> None:
    arguments = ("--timesteps", "105", "--learning-starts", "100", "--save-to", "here")
    printed = scripts.run(EXAMPLES / "train.py", *arguments, cwd=tmp_path)
    for line in (" at random, ", " before training.", " after 105 steps.", str(Path("here", "before_and_after.gif"))):
        assert line in printed
    with Image.open(tmp_path / "here" / "before_and_after.gif") as gif:
        assert gif.size == (410, 200)
        assert 100 < gif.n_frames <= 200  # frames that are alike are one
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    model = DIPO.load(tmp_path / "here" / "dipo.zip", device="cpu")
    assert model._n_updates == 5
    assert all(getattr(model, name) == value for name, value in RECOMMENDED.items())


@pytest.mark.slow
def test_compare(scripts: Scripts, tmp_path: Path) -> None:
    arguments = ("--timesteps", "1005", "--seeds", "0", "--folder", "here")
    printed = scripts.run(EXAMPLES / "compare.py", *arguments, cwd=tmp_path)
    for name in ("DIPO", "SAC", "TD3"):
        assert re.search(rf"^{name}: -\d+\.\d after 1,000 steps$", printed, flags=re.MULTILINE)
        assert (tmp_path / "here" / name.lower() / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()
    assert (tmp_path / "here" / "curves.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
