"""One thread of PyTorch: the networks of the tests are small, and more threads wait for each other. No GPU: no `gpu` tests."""

import pytest
import torch as th

th.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not th.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
