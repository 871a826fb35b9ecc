"""bench.py still runs, compares what it says it compares, and says so when both sides differ."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from tests import bench, bench_needles, bench_ring, bench_vision

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("group", bench.CASES)
def test_every_case_runs_and_both_sides_agree(capsys, group):
    assert bench.main([group, "--quick"]) == 0
    lines, cases = capsys.readouterr().out.splitlines(), bench.CASES[group]
    assert all(line.startswith(case.name) for line, case in zip(lines[2:], cases, strict=True))
    assert len({case.name for case in cases}) == len(cases) >= 6
    assert not any("WRONG" in line for line in lines)


@pytest.mark.parametrize("case", [bench.MODEL[1], bench.MODEL[4], *bench.TRAIN[:2]], ids=lambda case: case.name)
def test_a_difference_is_seen(capsys, monkeypatch, case):
    def wrong(folder, n):
        run = case.ours(folder, n)
        return lambda n: {
            name: x + (name in ("result", "model.norm.weight")) for name, x in bench.named(run(n)).items()
        }

    monkeypatch.setitem(bench.CASES, "model", [replace(case, ours=wrong)])
    assert bench.main(["model", "--quick"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_error_is_relative_and_zero_only_for_equal_bits():
    a = torch.tensor([1.0, -4.0])
    assert bench.difference(a, a.clone()) == 0
    assert bench.difference(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert bench.difference(torch.tensor([3, 5]), torch.tensor([3, 4])) > 0


@pytest.mark.ranks
def test_the_ring_runs_and_agrees(capfd):
    assert bench.main(["ring", "--quick"]) == 0
    said = capfd.readouterr().out
    assert all(word in said for word in ("one process", "ours", "torch", "ring of 2", "3 messages"))
    assert "WRONG" not in said


def test_the_needle_engines_run_and_agree(capfd):
    assert bench.main(["needles", "--quick"]) == 0
    said = capfd.readouterr().out
    assert all(word in said for word in ("450 probes", "one pass per probe", "--engine ring", "--engine cache"))
    assert "WRONG" not in said and "short" not in said.splitlines()[4]


def test_needle_engines_that_differ_are_seen(capsys, monkeypatch):
    real = bench_needles.answers_of

    def wrong(film, engine, cells):
        found, spent = real(film, engine, cells)
        return (found if engine == "ring" else {probe: not hit for probe, hit in found.items()}), spent

    monkeypatch.setattr(bench_needles, "answers_of", wrong)
    assert bench_needles.main(["--quick"]) == 1 and "WRONG" in capsys.readouterr().out


def test_a_ring_that_errs_is_seen(capsys):
    right = {"ring": [1e-7] * 4, "alone": [1e-7] * 4}
    tables = {R: dict.fromkeys(map(str, bench_ring.BOUNDS), right) for R in (1, 2)}
    tables[1]["torch.float64"] = tables[2]["torch.float64"] = {"ring": [1e-15] * 4, "alone": [1e-15] * 4}
    times = {"seconds": {"one process": 1.0, "ours": 1.0, "torch": 1.0}, "error": {"ours": 1e-7, "torch": 1e-7}}
    assert bench_ring.say_errors(tables, 32) and bench_ring.say_time(times, 64)
    tables[2]["torch.float32"] = {"ring": [1e-7, 1e-7, 1e-4, 1e-7], "alone": []}
    assert not bench_ring.say_errors(tables, 32)
    assert not bench_ring.say_time(times | {"error": {"ours": 1e-4, "torch": 1e-7}}, 64)
    assert capsys.readouterr().out.count("WRONG") == 2


def test_vision_runs_and_agrees(capfd):
    assert bench.main(["vision", "--quick"]) == 0
    said = capfd.readouterr().out
    words = ("padding", "loss and gradients", "like Qwen2-7B", "head where asked", "nothing to gain", "memory")
    assert all(word in said for word in words) and "WRONG" not in said


@pytest.mark.parametrize("where", ["our_loss", "their_loss"])
def test_a_vision_step_that_errs_is_seen(capsys, monkeypatch, where):
    right = getattr(bench_vision, where)
    monkeypatch.setattr(bench_vision, where, lambda model, lessons: right(model, lessons) * 1.001)
    assert bench_vision.main(["--quick"]) == 1
    assert capsys.readouterr().out.count("WRONG") >= 3


def test_a_gradient_that_errs_is_seen(monkeypatch, tmp_path):
    bench_vision.make(tmp_path, bench_vision.TOY)
    assert bench_vision.gradients(tmp_path) <= bench_vision.ERROR
    right = bench_vision.pool
    monkeypatch.setattr(bench_vision, "pool", lambda x_NPD: right(x_NPD).flip(0))
    assert bench_vision.gradients(tmp_path) > 100 * bench_vision.ERROR


def test_padding_is_the_share_of_ids_that_are_none():
    def step(*lengths):
        return [bench_vision.Lesson(bench_vision.llava.Example(0, [], [([1] * n, [1] * n)]), []) for n in lengths]

    assert bench_vision.padding([step(3, 3), step(5, 5)]) == 0
    assert bench_vision.padding([step(1, 3), step(4, 4)]) == pytest.approx(2 / 14)


@pytest.mark.parametrize("arguments", [[], ["modle"], ["model", "--fast"]])
def test_a_wrong_call_is_told_the_right_one(capsys, arguments):
    assert bench.main(arguments) == 2
    assert capsys.readouterr().out == "usage: python tests/bench.py model|train|ring|vision|needles [--quick]\n"
