"""One thread of PyTorch: the networks of the tests are small, and more threads wait for each other. No GPU: no `gpu` tests."""

import sys
from collections.abc import Iterator

import pytest
import torch as th
from processes import PAPER, Scripts

th.set_num_threads(1)
sys.path.append(str(PAPER))  # whose scripts import each other by name, and tests import them


@pytest.fixture
def scripts() -> Iterator[Scripts]:
    """To start programs with, which end with the test."""
    with Scripts() as started:
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not th.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
