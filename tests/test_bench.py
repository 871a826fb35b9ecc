"""bench.py still runs, compares what it says it compares, and says so when both sides differ."""

from dataclasses import replace

import pytest
import torch

from tests import bench


@pytest.mark.oracle
@pytest.mark.parametrize("group", ["model", "train", pytest.param("ring", marks=pytest.mark.ranks), "needles"])
def test_every_case_runs_and_both_sides_agree(capfd, group):
    pytest.importorskip("transformers")
    assert bench.main([group, "--quick"]) == 0
    printed = capfd.readouterr().out
    assert all(case.name in printed for case in bench.CASES.get(group, ())) and "WRONG" not in printed
    assert "these numbers mean nothing" in printed


@pytest.mark.oracle
@pytest.mark.parametrize("group, index", [("model", 1), ("train", 0), ("train", 2)])
def test_a_difference_is_seen(capsys, monkeypatch, group, index):
    pytest.importorskip("transformers")
    case = bench.CASES[group][index]

    def wrong(side, sizes, n):
        run = case.make(side, sizes, n)
        return lambda: {name: x + (side == "ours") for name, x in run().items()}

    monkeypatch.setitem(bench.CASES, group, [replace(case, make=wrong)])
    assert bench.main([group, "--quick"]) == 1
    assert capsys.readouterr().out.count("WRONG") == 1 + bool(case.speed and case.share)


def test_error_is_relative_and_zero_only_for_equal_bits():
    a = torch.tensor([1.0, -4.0])
    assert bench.difference(a, a.clone()) == 0
    assert bench.difference(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert bench.difference(torch.tensor([3, 5]), torch.tensor([3, 4])) > 0


def test_the_paper_s_grid_takes_less_than_a_pass_per_probe():
    single, ours = bench.paper_work().values()
    frames, text = 14 + 144 * 1 + 5, 76 + 47 + 29 + 41 + 53 + 2
    assert single[0] == sum(5 * 6 * (frames + 144 * n) + 6 * text for n in range(200, 3001, 200))
    assert single[0] / ours[0] >= 1.6 and single[1] / ours[1] >= 1.6
