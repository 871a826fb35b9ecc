from pathlib import Path

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
    """Tests that need a card are skipped by name where there is none."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; python tests/gpu.py tries the rest there"))
