from pathlib import Path

import pytest
import torch

from tests.shapes import mismatches, unknown_letters, watched

ROOT = Path(__file__).parents[1]


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize("names, count", [
    ({"x_BTD": X, "y_BD": X[:, 0]}, 0),
    ({"x_BTD": X, "y_BD": X}, 1),  # a dimension too many
    ({"x_BTD": X, "y_BTD": X[:, :1]}, 1),  # another size
    ({"x_BTD": X, "s_1T1": X[:1, :, :1]}, 0),
    ({"x_BTD": X, "s_1D": X[0]}, 1),  # no broadcast
    ({"s_TT": X[0, :, :3]}, 0),
    ({"w_TT": X[0]}, 1),
    ({"x_BTD": X, "total": X.sum(), "cfg_BT": "no tensor", "n_T": 3}, 0),
], ids=lambda x: ", ".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_names_and_shapes(names, count):
    assert len(mismatches(names)) == count


def wrong_rank(x_BTD):
    y_BD = x_BTD
    return y_BD


def outer(x_BTD):
    """Letters mean one size inside one function, not across calls."""
    return inner(x_BTD), inner(x_BTD[:, :1])


def inner(x_BTD):
    return x_BTD.sum()


def test_watcher_sees_returns_of_our_files_while_it_runs(tmp_path):
    with watched(ROOT) as found:
        wrong_rank(X)
        outer(X)
    wrong_rank(X)
    assert [*found] == ["test_shapes.py:wrong_rank: y_BD has shape (2, 3, 4)"]
    with watched(tmp_path) as found:
        wrong_rank(X)
    assert not found


def test_letters_outside_the_key_are_found():
    text = "def f(x_BTD, h_UD):\n    MAX_T, y_1D = 3, x_BTD\n    for id_W in y_1D:\n        pass\n"
    assert unknown_letters(text) == {"h_UD", "id_W"}


OURS = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_one_letter_has_one_dimension(path):
    assert unknown_letters(path.read_text()) == set()
