"""The miniature's studies: chains of trainings, the transfer curve's commands and reading, and where a model looks."""

import importlib
import json

import pytest

from data import flags, runs, synthetic
from data.tiny import attention, chains, transfer


def results(folder, rates):
    """A results.json with ten needles at each length, of which so many tenths are found."""
    folder.mkdir(parents=True, exist_ok=True)
    probes = {length: {f"n{i}": {"hit": i < tenths} for i in range(10)} for length, tenths in rates.items()}
    cells = [{"length": length, "probes": found} for length, found in probes.items()]
    (folder / "results.json").write_text(json.dumps({"cells": cells}))


@pytest.mark.parametrize("rates, longest", [
    ({8: 10, 16: 9, 128: 8}, 16), ({8: 8, 16: 10}, 0), ({8: 9, 16: 8, 128: 10}, 8), ({8: 10, 16: 10}, 16),
])  # fmt: skip
def test_the_longest_length_is_the_last_before_the_first_miss(tmp_path, rates, longest):
    results(tmp_path, dict(reversed(rates.items())))
    shares = transfer.shares_found(tmp_path, tokens=4)
    assert shares == {str(4 * length): tenths / 10 for length, tenths in rates.items()}
    assert transfer.longest(shares) == 4 * longest


def test_a_curve_s_chains_are_made_of_commands_that_parse(tmp_path, monkeypatch, capsys):
    asked = []

    def call(script, *words):
        if script == "-m":
            asked.append((script, words))
            return
        module = importlib.import_module(script.removesuffix(".py"))
        cfg = flags.parse(module.Config, getattr(module, "PRESETS", None), "tiny", [str(word) for word in words])
        asked.append((script, cfg))
        if script == "vniah.py":
            lengths = cfg.frames if cfg.task == "vision" else cfg.context
            results(cfg.out, dict.fromkeys(lengths, 10))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transfer, "call", call)
    monkeypatch.setattr(transfer, "FILE", tmp_path / "transfer.json")
    transfer.main(transfer.Config(seed=3))
    chain = transfer.load()["seed 3"]
    assert [*map(int, chain)] == [256, 512, 1024, 2048, 4096]
    assert [transfer.longest(chain[n]["film"]) for n in ("256", "2048")] == [2048, 8192]
    assert chain["256"]["text"].keys() < chain["2048"]["text"].keys() and max(map(int, chain["2048"]["text"])) == 8192
    texts = [cfg for script, cfg in asked if script == "train_text.py"]
    assert [cfg.seq_len for cfg in texts] == [256, 512, 1024, 2048, 4096]
    assert [cfg.seq_len * cfg.batch * cfg.grad_accumulation for cfg in texts] == [4096, 8192, 8192, 8192, 8192]
    assert {cfg.steps for cfg in texts} == {texts[0].steps} and {cfg.seed for _, cfg in asked[:3]} == {3}
    assert asked[-1] == ("-m", ("data.pictures", "transfer"))
    assert "| 256 | 1 | 2,048 | 2,048 |" in capsys.readouterr().out

    asked.clear()
    transfer.main(transfer.Config())
    texts = [cfg.seq_len for script, cfg in asked if script == "train_text.py"]
    assert texts == [512, 1024, 4096]
    tested = {cfg.weights for script, cfg in asked if script == "vniah.py"}
    assert {runs.TINY / name for name in ("control", "baseline", "extended", "longva")} <= tested
    assert [*transfer.load()] == ["seed 3", "presets' seeds"]


def test_chains_are_compared_by_all_their_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(chains, "FILE", tmp_path / "chains.json")

    def test_run(name, seed, found, way="yarn:16", shipped=("anyres",), of=4, frames=(8,)):
        cells = [("(i) LongVA", depth, n) for depth, n in enumerate(found)]
        cells += [(f"(iv) {way}, training-free", 0, 1), ("trial of x", 0, 0), ("(ii) LongVA, AnyRes", 0, 0)]
        settings = {"task": "vision", "seed": seed, "frames": frames, "depths": [0, 1], "own": True}
        settings |= {f"/another/clone/data/tiny/{model}": "hash" for model in shipped}
        names = ("system", "depth", "found", "length", "of")
        record = {"settings": settings, "cells": [dict(zip(names, (*cell, 8, of))) for cell in cells]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(record))
        return tmp_path / name

    one = test_run("a", 7, (4, 4)), test_run("b", 8, (2, 4))
    two = (test_run("c", 7, (1, 1), way="llama3:16"),)
    chains.main(chains.Config("one", one))
    chains.main(chains.Config("two", two))
    rates = chains.rates(chains.load(), "vision")
    assert rates == {"(i) LongVA": {8: [14 / 16, 2 / 8]}, "(iv) training-free": {8: [1 / 4, 1 / 4]}}
    assert "| (i) LongVA | 2 | 0.56 (0.25 to 0.88) |" in chains.table(chains.load(), "vision")
    for name, other in (("d", {"of": 5}), ("f", {"frames": (8, 16)})):
        with pytest.raises(ValueError, match="other lengths, depths or needles"):
            chains.main(chains.Config("three", (test_run(name, 7, (4, 4), **other),)))
    with pytest.raises(ValueError, match="is a second result of vision, seed 7"):
        chains.main(chains.Config("three", two + two))
    assert [*chains.load()["chains"]] == ["one", "two"]
    chains.main(chains.Config("two", (test_run("e", 7, (4, 4), shipped=("anyres", "baseline")),)))
    rates = chains.rates(chains.load(), "vision")
    assert rates == {"(i) LongVA": {8: [14 / 16, 1.0]}, "(iv) training-free": {8: [1 / 4]}}  # no baseline, no (iv)


def test_attention_is_shared_out_over_the_film(tmp_path, capsys):
    attention.main(attention.Config(frames=(8, 24), needle_count=3, out=tmp_path))
    lines = json.loads((tmp_path / "attention.json").read_text())
    assert len(lines) == 2 * 3 * 5
    assert all(0 <= sum(line["attention"]) <= 1.001 and 0 <= line["carrier"] <= 1.001 for line in lines)
    hits = [line for line in lines if line["hit"]]
    assert len(hits) > 25 and min(line["attention"][0] for line in hits) > 0.3  # it looks at the needle
    nouns = {" " + thing for thing in synthetic.THINGS}
    assert {line["token"] for line in hits} <= {"?", *nouns}  # from the question's noun, or its end
    assert {line["said"] for line in hits} == {"the needle's"}
    assert "found" in capsys.readouterr().out and (tmp_path / "attention.png").exists()


def test_both_studies_refuse_what_makes_no_sense(tmp_path):
    for config, wrong, message in (
        (transfer.Config, {"seed": -1}, "--seed -1"), (transfer.Config, {"base": tmp_path}, "give its --seed, too"),
        (attention.Config, {"needle_count": 0}, "--needle-count 0"), (chains.Config, {"chain": "x"}, "both or neither"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            config(**wrong)
