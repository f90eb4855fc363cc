"""
One thread of PyTorch: the networks of the tests are small, and more threads wait for each other. No GPU: no `gpu` tests. And
``accelerate="auto"`` is what it is without a compiler, so that it is another path than ``"compile"``.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch as th
from processes import PAPER, Scripts

th.set_num_threads(1)
if not th.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton: its kernels run line by line on the CPU
sys.path.append(str(PAPER))  # whose scripts import each other by name, and tests import them


@pytest.fixture(scope="session", autouse=True)
def no_kernel_by_itself() -> Iterator[None]:
    """In this process; what ``"auto"`` does with a compiler is in ``test_kernels.py``."""
    try:
        from sb3_dipo import fast
    except ImportError:  # it was left out
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "kernels_at_hand", lambda bfloat16=False: None)
        yield


@pytest.fixture
def scripts() -> Iterator[Scripts]:
    """To start programs with, which end with the test."""
    with Scripts() as started:
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not th.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
