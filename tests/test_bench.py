"""bench.py still runs, compares what it says it compares, and says so when both sides differ."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from tests import bench

pytestmark = pytest.mark.oracle


def test_every_case_runs_and_both_sides_agree(capsys):
    assert bench.main(["model", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(case.name) for line, case in zip(lines[2:], bench.MODEL, strict=True)] == [True] * 6
    assert not any("WRONG" in line for line in lines)


@pytest.mark.parametrize("case", [bench.MODEL[1], bench.MODEL[4]], ids=lambda case: case.name)
def test_a_difference_is_seen(capsys, monkeypatch, case):
    def wrong(folder, n):
        run = case.ours(folder, n)
        return lambda n: run(n) + 1

    monkeypatch.setitem(bench.CASES, "model", [replace(case, ours=wrong)])
    assert bench.main(["model", "--quick"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_error_is_relative_and_zero_only_for_equal_bits():
    a = torch.tensor([1.0, -4.0])
    assert bench.difference(a, a.clone()) == 0
    assert bench.difference(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert bench.difference(torch.tensor([3, 5]), torch.tensor([3, 4])) > 0


@pytest.mark.parametrize("arguments", [[], ["modle"], ["model", "--fast"]])
def test_a_wrong_call_is_told_the_right_one(capsys, arguments):
    assert bench.main(arguments) == 2
    assert capsys.readouterr().out == "usage: python tests/bench.py model [--quick]\n"
