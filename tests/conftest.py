import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests that need a card are skipped by name where there is none."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; python tests/gpu.py tries the rest there"))
