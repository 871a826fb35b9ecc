import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.shapes import watched


@pytest.fixture
def check_shapes():
    """Compare shape suffixes with tensors in all of our files while the test runs."""
    with watched(Path(__file__).parents[1]) as found:
        yield
    mismatches = [mismatch for mismatch in found if not mismatch.startswith("test_")]
    assert not mismatches, mismatches


def pytest_collection_modifyitems(items):
    """Tests that need a card come first, before it is hidden from the others; without one they are skipped by name."""
    items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; python tests/gpu.py tries the rest there"))


@contextmanager
def no_gpu():
    """As on a machine without one, for this process and those that it starts."""
    answers = {"is_available": lambda: False, "device_count": lambda: 0}
    with patch.multiple(torch.cuda, **answers), patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """All others compute on the CPU: they compare bits, and some start more ranks than there are GPUs."""
    with nullcontext() if item.get_closest_marker("gpu") else no_gpu():
        return (yield)
