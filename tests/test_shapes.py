from pathlib import Path

import pytest
import torch

from tests.shapes import unknown_letters, watched

ROOT = Path(__file__).parents[1]


def honest(x_BTD):
    y_BD = x_BTD.mean(1)
    return y_BD


def wrong_rank(x_BTD):
    y_BD = x_BTD
    return y_BD


def wrong_size(x_BTD):
    y_BTD = x_BTD[:, :1]
    return y_BTD


def broadcast(x_BTD):
    s_1T1 = torch.zeros(1, x_BTD.shape[1], 1)
    return x_BTD + s_1T1


def no_broadcast(x_BTD):
    s_1D = x_BTD[0]
    return s_1D


def same_letter_twice(x_BTD):
    s_TT = x_BTD[0] @ x_BTD[1].T
    w_TT = x_BTD[0]
    return s_TT, w_TT


def plain_names(x_BTD):
    total, cfg_BT, n_T = x_BTD.sum(), "no tensor", 3
    return total, cfg_BT, n_T


def inner(x_BTD):
    """Letters mean one size inside one function, not across calls."""
    return honest(x_BTD[:, :1]), honest(x_BTD)


CASES = {
    honest: 0,
    wrong_rank: 1,
    wrong_size: 1,
    broadcast: 0,
    no_broadcast: 1,
    same_letter_twice: 1,
    plain_names: 0,
    inner: 0,
}


@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)
def test_watcher_sees_lies(f):
    with watched(ROOT) as told:
        f(torch.zeros(2, 3, 4))
    assert len(told) == CASES[f], told
    assert all(lie.startswith(f"test_shapes.py:{f.__name__}: ") for lie in told)


def test_watcher_looks_at_our_files_only(tmp_path):
    with watched(tmp_path) as told:
        wrong_rank(torch.zeros(2, 3, 4))
    assert not told


def test_watcher_stops():
    with watched(ROOT) as told:
        pass
    wrong_rank(torch.zeros(2, 3, 4))
    assert not told


def test_letters_outside_the_key_are_found():
    text = "def f(x_BTD, h_UD):\n    MAX_T, y_1D = 3, x_BTD\n    for id_W in y_1D:\n        pass\n"
    assert unknown_letters(text) == {"h_UD", "id_W"}


OURS = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")]


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_one_letter_has_one_dimension(path):
    assert unknown_letters(path.read_text()) == set()
