"""The needle test: cells equal one pass per probe, killed runs go on, ranks agree, mistakes get one sentence."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import clip
import longva
import ring
import unires
import vniah
from data import chat, evaluate, niah, pictures, runs, synthetic, tokenizer, weights
from data import results as result_tables
from data.config import RopeScaling, to_dict
from tests import ranks
from tests.ranks import ALONE
from tests.test_data_results import Page

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random language model and a random LongVA; large weights, so that answers differ."""
    at, words = tmp_path_factory.mktemp("models"), tokenizer.load_tokenizer(synthetic.TOKENIZER)
    lm = longva.LMConfig(words.size, 32, 48, 2, 4, 2, rope_theta=1e4)
    eye = clip.ClipConfig(16, 32, 2, 2, 8, synthetic.SIDE)
    sees = longva.LongVA(longva.LongVAConfig(lm, eye, "unires", "floor"))
    for name, model in {"text": longva.LM(lm), "sees": sees}.items():
        stream = ((n, 20 * t if t.ndim > 1 and "vision" not in n else t) for n, t in weights.init_weights(model, 0))
        weights.copy_tokenizer(synthetic.TOKENIZER, at / name)
        weights.write(at / name, stream, to_dict(model.config))
    return at


@pytest.fixture
def cfg(tmp_path, folders):
    grid = {"frames": (3, 6), "depths": (0.0, 0.5, 1.0), "needle_count": 5, "distractors": 0, "max_new_tokens": 2}
    given = {"protocol": "paper", "weights": folders / "sees", "out": tmp_path / "out", "device": "cpu", "seed": 7}
    return vniah.resolve(vniah.Config(**given, **grid))


@pytest.fixture
def shipped(tmp_path):
    """The shipped model, which finds most needles but not all."""
    grid = {"frames": (3, 40), "depths": (0.0, 0.5), "needle_count": 3, "distractors": 2, "max_new_tokens": 4}
    given = {"protocol": "tiny", "weights": runs.TINY / "longva", "out": tmp_path / "out", "device": "cpu"}
    return vniah.resolve(vniah.Config(**given, **grid))


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take longer than all else."""
    for name in ("draw_heatmaps", "draw_comparison"):
        monkeypatch.setattr(result_tables, name, lambda *a: None)


@pytest.fixture
def own_needles(tmp_path):
    """A folder of needles whose questions and answers differ in length, of four sizes; two have options."""
    rng, made = np.random.default_rng(0), []
    for question, answer in [
        ("", "7"),
        ("\nA. red\nB. blue", "B"),
        (" star", "345"),
        ("\nA. one\nB. two\nC. six", "A"),
    ]:
        picture = synthetic.compose_picture(rng, 1, 1, synthetic.draw_objects(rng, 1))
        made.append(niah.Needle(f"n{len(made)}", picture, f"Which number?{question}", answer))
    niah.write_needles(tmp_path / "needles", made)
    return tmp_path / "needles"


def loaded(folder):
    """A model and its tokenizer."""
    return longva.load(folder, "cpu"), tokenizer.load_tokenizer(folder)


def all_cells(cfg):
    lengths = cfg.frames if cfg.task == "vision" else cfg.context
    return [(length, depth) for length in lengths for depth in cfg.depths]


def pick_needles(cfg, system):
    return evaluate.pick_needles(system, cfg.needles, cfg.needle_count, cfg.seed)


def open_haystack(cfg, system, frames):
    return evaluate.open_haystack(system, cfg.haystack, frames, cfg.seed, cfg.protocol == "paper", [])


def results(cfg):
    return json.loads((cfg.out / "results.json").read_text())


def found_by(cfg):
    """A run's cells as {(system, length, depth): {needle: what was found}}."""
    return {(c["system"], c["length"], c["depth"]): c["probes"] for c in results(cfg)["cells"]}


def load_nothing(monkeypatch):
    monkeypatch.setattr(longva, "load", lambda *a: pytest.fail("loaded a model for nothing"))


# ---- exactness -----------------------------------------------------------------------------------


def in_one_pass(model, ids, seen, answer):
    """Logits of the answer's places, the whole sequence read at once."""
    ids = [*ids, *answer]
    h = model.model(model.embed(torch.tensor([ids]), seen), torch.arange(len(ids)))
    return model.logits(h[:, -len(answer) - 1 : -1])[0]


def test_the_slow_test_against_a_sequence_written_out(cfg, folders):
    """The test at the top of vniah.py, put together here from its parts once more, for frames and for text."""
    model, words = loaded(cfg.weights)
    film, needle = list(islice(synthetic.film(7), 6)), synthetic.draw_needles(7, 1)[0][0]
    pre, post = chat.template_ids(words)
    for depth, before in ((0.0, 0), (0.4, 2), (1.0, 6)):
        shown = unires.frames([*film[:before], needle.picture, *film[before:]], synthetic.SIDE, "pad")
        seen = model.encode_images(shown, [unires.Layout(1, 7)])
        ids = [*pre, *[chat.IMAGE] * len(seen), *words.encode("\n" + needle.question.removeprefix("\n")), *post]
        want = in_one_pass(model, ids, seen, words.encode(needle.answer))
        x_1SD, answer = vniah.visual_probe(model, words, film, needle, depth)
        assert x_1SD.shape[1] == len(ids) and answer == words.encode(needle.answer)
        assert_close(vniah.answer_logits(model, x_1SD, answer), want, rtol=1e-4, atol=1e-4)
        right = want.argmax(-1).tolist()
        assert vniah.is_found(model, x_1SD, right[:1]) and not vniah.is_found(model, x_1SD, [right[0] + 1])
    model, words = loaded(folders / "text")
    text = "the cup is red. one tree.\n"
    x_1SD, answer = vniah.text_probe(model, words, text, 30, 0.0, "42")
    sentence = words.encode("\nThe special magic Singapore number is: 42.\n")
    book, question = (words.encode(text) * 9)[:30], words.encode(niah.QUESTION + "42")
    ids = [*words.encode(niah.PREFIX), *sentence, *book, *question[: -len(answer)]]
    assert words.decode(answer).strip() == "42" and torch.equal(x_1SD, model.embed(torch.tensor([ids])))


def test_the_film_strip_of_the_readme_shows_what_the_model_answers():
    (frames, needle), (model, words) = pictures.filmstrip_probe(), loaded(runs.TINY / "longva")
    x_1SD, answer = vniah.visual_probe(model, words, frames, needle, 256 / 511)
    assert needle.answer == "4" and vniah.is_found(model, x_1SD, answer)


def naive(cfg, system, model, words):
    """The slow way, the test at the top of vniah.py: {probe: (hit, logits, tokens)}."""
    hidden, distractors = pick_needles(cfg, system)
    rng = np.random.default_rng([0x0B7, cfg.seed])
    asked = [niah.shuffled_options(one, rng) for one in hidden] if system.control == "shuffled" else hidden
    start, M, found = len(chat.template_ids(words)[0]), model.config.vision.tokens_per_grid, {}
    for frames, depth in all_cells(cfg):
        film = list(open_haystack(cfg, system, frames))
        for i, distractor in enumerate(distractors[:frames]):
            film[int((i + 0.5) * frames / len(distractors[:frames]))] = distractor.picture
        for needle in filter(None, asked):
            x_1SD, answer = vniah.visual_probe(model, words, film, needle, depth)
            if system.control == "no needle":
                at = start + int(depth * frames) * M
                x_1SD = torch.cat([x_1SD[:, :at], x_1SD[:, at + M :]], dim=1)
            logits = vniah.answer_logits(model, x_1SD, answer)
            found[frames, depth, needle.name] = logits.argmax(-1).tolist() == answer, logits, x_1SD.shape[1]
    return found


def listen(monkeypatch, world=ALONE):
    """The logits of what each call scores, whichever engine calls: a random model is right by luck alone."""
    heard, real = [], evaluate.count_correct

    def hits(h_BTD, head_VD, targets_BT):
        whole, targets = ranks.unshard(h_BTD, world), ranks.unshard(targets_BT, world)
        heard.append((whole[targets != chat.IGNORE] @ head_VD.T)[None])
        return real(h_BTD, head_VD, targets_BT)

    monkeypatch.setattr(evaluate, "count_correct", hits)
    monkeypatch.setattr(longva.LM, "logits", lambda self, h: heard.append(x := self.lm_head(h).float()) or x)
    return heard


def check_probes(test, groups, heard, slow):
    """These groups' probes against `slow`; nothing is generated, so that each list of lines was scored in one call."""
    asked = []
    for lines in (lines for group in groups for lines in test.probe(group)):
        rows = [row for call in heard for row in call]
        heard.clear()
        for line, logits in zip(lines, rows, strict=True):
            asked.append((line["length"], line["depth"], line["needle"]))
            hit, want, tokens = slow[asked[-1]]
            assert (line["hit"], line["tokens"]) == (hit, tokens), asked[-1]
            assert (line["generated_correct"], line["generated_text"]) == (None, "")
            assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert sorted(asked) == sorted(slow) != []


def scale_by_length(model, dynamic):
    """Dynamic NTK, if wanted, from 8 tokens on: then the angles depend on the length of the whole sequence."""
    if dynamic:
        model.model.config = replace(model.model.config, rope_scaling=RopeScaling("dynamic", 8.0, 8))


@pytest.mark.parametrize("engine", ["cache", "ring"])
@pytest.mark.parametrize("own, dynamic, control, distractors", [
    (True, False, "", 0), (False, False, "", 3), (True, False, "no needle", 2), (True, False, "shuffled", 0),
    (False, True, "", 0),
])  # fmt: skip
def test_cells_equal_one_pass_per_probe(
    check_shapes, cfg, own_needles, monkeypatch, engine, own, dynamic, control, distractors
):
    """Places 0, 1 and 3 are shared by several lengths; questions and answers differ in length; groups in any order."""
    cfg = replace(cfg, engine=engine, frames=(3, 6, 8), depths=(0.0, 0.2, 0.4, 0.5, 1.0), max_new_tokens=0)
    cfg = replace(cfg, needles=own_needles if own else None)
    system, (model, words) = vniah.System("x", cfg.weights, distractors, control=control), loaded(cfg.weights)
    scale_by_length(model, dynamic)
    slow = naive(cfg, system, model, words)
    film = vniah.VisualNIAH(cfg, system, model, words, ALONE)
    assert film.stop_ids == sorted(words.stop_ids) != []  # the folder has no generation_config.json
    groups = film.groups(all_cells(cfg))
    if engine == "cache" and not dynamic and not distractors:
        assert any(len({length for length, _ in group.cells}) == 3 for group in groups)  # shared places
    heard = listen(monkeypatch)
    check_probes(film, groups, heard, slow)
    film.cache = None
    check_probes(film, [groups[i] for i in np.random.default_rng(1).permutation(len(groups))], heard, slow)


@pytest.mark.parametrize("engine", ["cache", "ring"])
@pytest.mark.parametrize("protocol, dynamic", [("tiny", True), ("paper", False)])
def test_story_cells_equal_one_pass_per_probe(check_shapes, cfg, folders, monkeypatch, engine, protocol, dynamic):
    change = {"task": "text", "protocol": protocol, "engine": engine, "weights": folders / "text", "context": (40, 90)}
    cfg = replace(cfg, **change, number_count=4, max_new_tokens=0)
    model, words = loaded(cfg.weights)
    scale_by_length(model, dynamic)
    story, slow = vniah.TextNIAH(cfg, vniah.System("x", cfg.weights, 3), model, words, ALONE), {}
    for cell in all_cells(cfg):
        for i, (ids, answer) in enumerate(story.probes(*cell)):
            logits = vniah.answer_logits(model, model.embed(torch.tensor([ids])), answer)
            slow[*cell, f"number-{i}"] = logits.argmax(-1).tolist() == answer, logits, len(ids)
    check_probes(story, story.groups(all_cells(cfg))[::-1], listen(monkeypatch), slow)
    ids, answer = story.probes(40, 0.5)[0]  # the one pass is as before, whatever length was probed last
    again = vniah.answer_logits(model, model.embed(torch.tensor([ids])), answer)
    assert torch.equal(again, slow[40, 0.5, "number-0"][1])
    assert story.probes(90, 0.5) == story.probes(90, 0.5) != story.probes(90, 0.0)


def test_judge_feeds_the_answer_then_lets_the_model_speak(folders):
    model, rng = longva.load(folders / "text", "cpu"), torch.Generator().manual_seed(3)
    before, ask = torch.randint(20, 600, (1, 9), generator=rng), torch.randint(20, 600, (3, 6), generator=rng)
    unaided = []
    for row in ask.tolist():
        ids = [*before[0].tolist(), *row]
        for _ in range(5):
            ids.append(in_one_pass(model, ids, None, [0]).argmax().item())
        unaided.append(ids[-5:])
    answer = torch.tensor([row[:3] for row in unaided])
    answer[1, 0] += 1  # wrong at once: its tail does not matter
    answer[2, 2] += 1  # wrong at the end
    stop, first = unaided[1][2], [row[0] for row in unaided]
    until_stop = [row[: row.index(stop)] if stop in row else row for row in unaided]

    whole = longva.KVCache(model.model.config, 1, 9, model.embed(before))
    longva.prefill(model, model.embed(before), whole)
    cache = whole.branch(9, 3, 6 + 5)
    known = cache.kv[:, :, :, :9].clone()
    for new_tokens, stops, said in [
        (5, [stop], until_stop), (5, [], unaided), (0, [stop], [[]] * 3), (1, [], [[one] for one in first]),
        (5, first, [[]] * 3),
    ]:  # fmt: skip
        found = vniah.score_and_generate(model, model.embed(ask), answer, cache, new_tokens, stops)
        assert found == ([True, False, False], said)
        assert cache.length == 9 and torch.equal(cache.kv[:, :, :, :9], known)


# ---- whole runs ----------------------------------------------------------------------------------


def test_whole_run_reports_all_that_is_needed_to_do_it_again(shipped, capsys):
    vniah.main(shipped)
    said = capsys.readouterr().out
    assert all(word in said for word in ("95 % interval", "heatmap.png", "no needle", "scored by the generated text"))
    found = results(shipped)
    hidden, _ = pick_needles(shipped, vniah.System("", None, 2))
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["settings"]["inputs"] == runs.fingerprints({str(shipped.weights): shipped.weights}) != {}
    assert found["settings"]["seed"] == 7 and found["settings"]["frames"] == [3, 40]
    haystack, told = found["systems"]["longva"]["haystack"], found["systems"]["longva"]["prompts"]
    assert haystack == [niah.picture_hash(frame) for frame in islice(synthetic.film(7), 40)]
    assert told["needles"] == [niah.describe(one) for one in hidden]
    assert told["template"] == "qwen_1_5" and told["pre"] and told["post"]
    cells = found_by(shipped)
    assert sorted(name for name, *_ in cells) == ["longva"] * 4 + ["longva, no needle"] * 2
    for cell in found["cells"]:
        hits = [probe["hit"] for probe in cell["probes"].values()]
        assert (cell["found"], cell["of"]) == (sum(hits), 3) and set(cell["probes"]) == {n.name for n in hidden}
        assert cell["wilson"] == [round(x, 4) for x in result_tables.wilson(sum(hits), 3)]
    assert all(probe["hit"] and probe["generated_correct"] for probe in cells["longva", 3, 0.0].values())
    assert not all(probe["hit"] for probe in cells["longva, no needle", 40, 0.5].values())
    assert {file.name for file in shipped.out.glob("*.png")} == {"heatmap.png", "heatmap-1.png", "comparison.png"}


def run(cfg, kill=None):
    """How many lines were written; the run is killed in place of the write numbered `kill`."""
    written, real = [], result_tables.ProbeLog.append

    def write(self, lines):
        if len(written) == kill:
            raise KeyboardInterrupt
        written.append(len(lines))
        real(self, lines)

    killed = pytest.raises(KeyboardInterrupt) if kill else nullcontext()
    with mock.patch.object(result_tables.ProbeLog, "append", write), killed:
        vniah.main(cfg)
    return written


@pytest.mark.parametrize("kind", ["frames", "one cell", "text"])
def test_a_killed_run_goes_on_and_repeats_nothing(
    undrawn, cfg, folders, own_needles, tmp_path, monkeypatch, capsys, kind
):
    """Also where lines are damaged; with one cell, the groups that were not begun are known from no line."""
    cfg = replace(cfg, needles=own_needles, max_new_tokens=0)  # four sizes: at each place four groups
    if kind == "one cell":
        cfg = replace(cfg, frames=(4,), depths=(0.0,), controls=False)
    if kind == "text":
        change = {"context": (30, 50), "number_count": 3, "distractor_counts": (0, 2)}
        cfg = replace(cfg, task="text", weights=folders / "text", **change)
    whole = replace(cfg, out=tmp_path / "whole")
    written, want = run(whole), results(whole)
    if kind == "frames":
        asked = want["systems"]["sees, options moved"]["prompts"]["needles"]
        assert [one["name"] for one in asked] == ["n1", "n3"] and asked[0]["question"].endswith("A. blue\nB. red")
        assert set(found_by(whole)["sees, options moved", 3, 0.5]) == {"n1", "n3"}
    for kill in {1, min(5, len(written) - 2), len(written) - 1}:
        at = replace(cfg, out=tmp_path / f"killed-{kill}")
        before, file = run(at, kill), at.out / "cells-0.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(["5\n", *lines[1:], lines[0][:20]]))  # one line is lost, one is torn
        assert sum(before) - 1 + sum(run(at)) == sum(written)
        assert {**results(at), "settings": 0} == {**want, "settings": 0}
        assert re.search(r"cells-0.jsonl: \d damaged .* left out, the first: line 1, no JSON", capsys.readouterr().out)
    load_nothing(monkeypatch)
    (whole.out / "results.json").write_text("damaged")
    vniah.main(whole)
    assert results(whole) == want
    own_needles.joinpath("n1.png").write_bytes(own_needles.joinpath("n2.png").read_bytes())
    with pytest.raises(ValueError, match="the content of needles has changed"):
        vniah.main(whole)


# ---- ranks ---------------------------------------------------------------------------------------


def ring_on_ranks(world, cfgs, slow):
    """--engine ring: logits of the answers, put together from all ranks, are those of one pass."""
    cfg = cfgs["logits"]
    film = vniah.VisualNIAH(cfg, vniah.System("x", cfg.weights, 2), *loaded(cfg.weights), world)
    with pytest.MonkeyPatch.context() as patch:
        check_probes(film, film.groups(all_cells(cfg)), listen(patch, world), slow)
    assert len({tokens % 4 for _, _, tokens in slow.values()}) > 1  # some lengths need padding


def runs_on_ranks(world, cfgs, slow):
    """Runs as torchrun would start them, in a process that is a rank already."""
    with mock.patch.multiple(ring, start=lambda device: world, stop=lambda: None):
        for name in ("ring", "cache", "resumed", "text"):
            vniah.main(cfgs[name])


@pytest.mark.ranks
def test_two_ranks_find_what_one_process_finds(undrawn, cfg, shipped, own_needles, tmp_path, monkeypatch):
    text = {"task": "text", "weights": runs.TINY / "extended", "context": (128, 256), "distractor_counts": (0, 3)}
    cfgs = {"logits": replace(cfg, engine="ring", needles=own_needles, frames=(3, 4), max_new_tokens=0)}
    for name, change in {
        "ring": {"engine": "ring"}, "cache": {}, "resumed": {}, "alone": {}, "text": text, "text alone": text,
    }.items():  # fmt: skip
        cfgs[name] = replace(shipped, out=tmp_path / name, number_count=3, **change)
    run(cfgs["resumed"], kill=3)
    runs.LOCKS.pop(cfgs["resumed"].out.resolve()).close()  # what was killed holds its folder no longer
    slow = naive(cfgs["logits"], vniah.System("x", cfg.weights, 2), *loaded(cfg.weights))
    ranks.run(2, [ring_on_ranks, runs_on_ranks], cfgs, slow)

    # Whole runs give one process's cells, whoever began them
    vniah.main(cfgs["alone"])
    vniah.main(cfgs["text alone"])
    assert found_by(cfgs["cache"]) == found_by(cfgs["resumed"]) == found_by(cfgs["alone"])
    assert found_by(cfgs["text"]) == found_by(cfgs["text alone"])
    hits, rung = (
        [probe["hit"] for _, probes in sorted(found_by(cfgs[name]).items()) for _, probe in sorted(probes.items())]
        for name in ("alone", "ring")
    )
    assert hits == rung and len(set(hits)) == 2

    # Both had work, and no probe was asked twice
    for name in ("cache", "resumed", "text"):
        lines = [file.read_text().splitlines() for file in cfgs[name].out.glob("cells-*.jsonl")]
        assert len(lines) == 2 and all(lines)
        assert sum(map(len, lines)) == sum(map(len, found_by(cfgs[name]).values()))
    load_nothing(monkeypatch)
    vniah.main(cfgs["resumed"])  # one process again: all is known


# ---- the protocol --------------------------------------------------------------------------------


def test_the_paper_s_protocol():
    cfg = vniah.resolve(vniah.Config(protocol="paper"))
    assert cfg.frames == tuple(200 * i for i in range(1, 16)) and cfg.depths == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert (cfg.needle_count, cfg.distractors, cfg.seed, vniah.DIGITS[cfg.protocol]) == (5, 0, 24242424, 7)
    cfg = vniah.resolve(vniah.Config(task="text", protocol="paper"))
    assert cfg.context == tuple(32_000 * i for i in range(1, 17)) and cfg.number_count == 5
    assert cfg.depths == tuple(np.arange(0, 1.1, 0.1).tolist()) and cfg.distractor_counts == (0, 3, 5)
    assert vniah.resolve(replace(cfg, depths=(0.5,), seed=3)) == replace(cfg, depths=(0.5,), seed=3)


def released(cfg, words, ids, distractors):
    """The release's probes, written out: one generator, all numbers, then the grid cell by cell."""
    rng = np.random.RandomState(24242424)
    mine = [str(rng.randint(10**7)) for _ in range(5)]
    others = [str(rng.randint(10**7)) for _ in range(distractors)]
    stops, made = niah.period_ids(words.encode), {}
    prefix = "This is a very long story book: <book>"
    question = "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    question += "Answer: The special magic Singapore number is: "
    cities = ("New York", "London", "Paris", "Tokyo", "Beijing")

    def hide(book, start, city, number, snap=True):
        at = start
        while snap and at < len(book) and book[at] not in stops:
            at += 1
        at = start if not snap or at == len(book) else at + 1
        return book[:at] + words.encode(f"\nThe special magic {city} number is: {number}.\n") + book[at:]

    for context, depth in all_cells(cfg):
        for number in mine:
            book = (ids * (context // len(ids) + 1))[:context]
            for city, other in zip(cities, others):
                book = hide(book, rng.randint(len(book)), city, other)
            book = hide(book, int(len(book) * depth), "Singapore", number, snap=depth > 0)
            whole = words.encode(prefix) + book + words.encode(question + number)
            made.setdefault((context, depth), []).append(whole)
    return made


@pytest.mark.parametrize("distractors", [0, 5])
def test_the_release_s_draws_in_whatever_order_cells_are_asked_in(cfg, folders, tmp_path, distractors):
    text = tmp_path / "essay.txt"
    text.write_text("the cup is red. the star is blue and large. one tree.\n" * 30)
    grid = {"context": (200, 333, 700), "depths": (0.0, 0.3, 0.7, 1.0), "seed": None}
    cfg = replace(cfg, task="text", weights=folders / "text", haystack=str(text), number_count=None, **grid)
    cfg, words = vniah.resolve(cfg), tokenizer.load_tokenizer(cfg.weights)
    story = vniah.TextNIAH(cfg, vniah.System("x", cfg.weights, distractors), None, words, ALONE)
    made = released(cfg, words, words.encode(text.read_text()), distractors)
    for i in np.random.default_rng(0).permutation(len(made)):
        probes = story.probes(*list(made)[i])
        assert [ids + answer for ids, answer in probes] == list(made.values())[i]
        assert words.decode(probes[0][1]).strip() == "2965478"


@pytest.mark.parametrize("protocol", ["paper", "tiny"])
def test_a_trial_has_other_needles(cfg, folders, own_needles, protocol):
    cfg = replace(cfg, protocol=protocol, context=(40,), number_count=4)
    systems = [vniah.System("x", folders / "text", selection_run=trial) for trial in (False, True)]
    words = tokenizer.load_tokenizer(folders / "text")
    stories = [vniah.TextNIAH(replace(cfg, task="text"), system, None, words, ALONE) for system in systems]
    assert stories[0].ids != stories[1].ids
    numbers = [{words.decode(answer) for _, answer in story.probes(40, 0.5)} for story in stories]
    drawn = [{n.picture.tobytes() for n in pick_needles(cfg, system)[0]} for system in systems]
    for first, other in (numbers, drawn):
        assert len(first) >= 4 and not first & other
    cfg = replace(cfg, needles=own_needles)  # those of a folder are for the test alone
    assert {n.picture.tobytes() for n in pick_needles(cfg, systems[1])[0]} == drawn[1]
    assert len(pick_needles(cfg, replace(systems[1], distractors=70))[0]) == 8  # a folder may have more than there are


def test_other_needles_of_a_folder_are_its_distractors(cfg, own_needles):
    """As many as asked for, never asked about themselves, the same on every run; without the flag there are none."""
    cfg = vniah.resolve(replace(cfg, needles=own_needles, distractors=2))
    hidden, signs = ([n.name for n in part] for part in pick_needles(cfg, vniah.System("x", cfg.weights, 2)))
    assert len(hidden) == len(signs) == 2 and not {*hidden} & {*signs}
    assert [hidden, signs] == [[n.name for n in part] for part in pick_needles(cfg, vniah.System("x", cfg.weights, 2))]
    assert vniah.resolve(replace(cfg, distractors=None, protocol="tiny")).distractors == 0
    with pytest.raises(ValueError, match="has 4 needles, too few for --distractors 4"):
        pick_needles(cfg, vniah.System("x", cfg.weights, 4))


def test_training_never_sees_what_is_tested():
    """Needles, film and story come from streams of random numbers that no training text or picture uses."""
    tested = {n.picture.tobytes() for seed in (7, 1007) for n in synthetic.draw_needles(seed, 24, 3)[0]}
    trained = {p.tobytes() for step in range(3) for p in synthetic.captioned_grids(42, step, 100)[0]}
    assert not tested & trained and len(tested) == 48


def test_a_film_is_sampled_as_the_release_does(cfg, tmp_path):
    """Every round(rate)-th frame, where time stamps would take another: 29.97 frames per second."""
    pytest.importorskip("av")
    from tests import test_data_video as films

    ntsc = films.film(tmp_path / "film.mp4", [i * 1001 / 30000 for i in range(200)], clock=Fraction(1001, 30000))
    pal = films.film(tmp_path / "pal.mkv", [i / 25 for i in range(80)], clock=Fraction(1, 1000))
    for file, protocol, want in [
        (ntsc, "paper", [0, 30, 60, 90, 120, 150, 180]), (ntsc, "tiny", [0, 30, 59, 89, 119, 149, 179]),
        (pal, "paper", [0, 25, 50, 75]),
    ]:  # fmt: skip
        shown = open_haystack(replace(cfg, haystack=str(file), protocol=protocol), vniah.System("x", None), len(want))
        assert [films.number(picture) for picture in shown] == want


# ---- panels --------------------------------------------------------------------------------------


def test_rope_bases_give_panels_of_one_model(check_shapes, undrawn, cfg, folders, monkeypatch):
    thetas, forward = [], longva.Decoder.forward

    def noting(decoder, *rest):
        thetas.append(decoder.config.rope_theta)
        return forward(decoder, *rest)

    monkeypatch.setattr(longva.Decoder, "forward", noting)
    cfg = replace(cfg, rope_theta=(1e5, 1e7), max_new_tokens=0)
    with (
        mock.patch.object(longva, "load", wraps=longva.load) as loads,
        mock.patch.object(evaluate, "open_haystack", wraps=evaluate.open_haystack) as films,
    ):
        vniah.main(cfg)
    assert loads.call_count == films.call_count == 1  # three bases and a control of one model: the film is read once
    names = ["sees", "sees, RoPE base 100000", "sees, RoPE base 1e+07"]
    assert {name for name, *_ in found_by(cfg)} == {*names, "sees, no needle"}
    assert list(dict.fromkeys(thetas)) == [1e4, 1e5, 1e7] and thetas[-1] == 1e4  # the control has its own again
    systems = evaluate.figure_systems("text", cfg.weights, False, (0, 3), (1e5, 1e7), ())
    assert len(systems) == 6
    assert systems[3] == vniah.System("sees, RoPE base 100000, 3 distractors", cfg.weights, 3, 1e5)
    scaled, trained = vniah.System("x", cfg.weights, rope_scaling="yarn:4"), longva.read_config(folders / "text")
    lengths = [scaled.change(trained, tokens).rope_scaling for tokens in (None, 512)]
    assert lengths == [RopeScaling("yarn", 4.0, n) for n in (trained.max_position_embeddings, 512)]


@pytest.mark.parametrize("task", ["vision", "text"])
def test_the_miniature_figure(undrawn, tmp_path, capsys, task):
    grid = {"frames": (2, 4), "context": (60, 90), "depths": (0.0, 0.5), "needle_count": 2, "number_count": 2}
    rest = {"max_new_tokens": 0, "distractor_counts": (0, 2), "rope_theta": (3e4, 1e6), "distractors": 1}
    cfg = vniah.Config(task, protocol="tiny", out=tmp_path / "out", **grid, **rest)
    vniah.main(cfg)
    said, found = capsys.readouterr().out, results(cfg)
    names, page = {cell["system"] for cell in found["cells"]}, Page(cfg.out).json
    tried = "Training-free positions tried first, at the two greatest lengths: RoPE base 30000: "
    assert tried in said and "next:" in said
    assert {"trial of RoPE base 30000", "trial of RoPE base 1e+06"} < names
    assert sum("training-free" in name for name in names) == 1
    assert page["cells"] == found["cells"] and {*page["needles"]} == names
    assert bool(page["pictures"]) == (task == "vision")
    vniah.main(cfg)  # draws again
    assert results(cfg)["cells"] == found["cells"] and Page(cfg.out).json == page


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, complaint", [
    ({"frames": (3, 600), "haystack": "film"}, "gives 1 frames .* longest haystack has 600"),
    ({"weights": Path("text")}, "without vision"),
    ({"depths": (0.5, 1.5)}, "1.5"),
    ({"haystack": "nowhere.mp4"}, "nowhere.mp4: no such video file or folder"),
    ({"haystack": "noise.mp4"}, "noise.mp4: not a video"),
    ({"haystack": "nowhere.txt", "task": "text", "weights": Path("text")}, "nowhere.txt"),
    ({"needles": Path("film")}, "questions.json"),
    ({"frames": (6, 3)}, "name each value once, in rising order"),
    ({"depths": (0.0, 0.5, 0.5)}, "name each value once, in rising order"),
    ({"frames": (0, 3)}, "--frames 0 makes no sense"),
    ({"distractors": 99}, "distractors \\(99,\\) make no sense; give 0 to"),
    ({"distractor_counts": (0, 9), "task": "text", "needles": Path("film")}, "\\(0, 9\\) make no sense; give 0 to 6"),
    ({"distractors": -1, "needles": Path("film")}, "distractors \\(-1,\\) make no sense"),
    ({"distractors": 70, "needles": runs.TINY.parent / "needles"}, "has 70 needles, too few for --distractors 70"),
    ({"own": True}, "--own tests what you trained, in place of --weights"),
    ({"rope_theta": (0.5,)}, "--rope-theta 0.5"),
    ({"out": Path("noise.mp4")}, "is a file"),
])  # fmt: skip
def test_mistakes_get_one_sentence(cfg, folders, tmp_path, monkeypatch, change, complaint):
    monkeypatch.chdir(tmp_path)
    Path("film").mkdir()
    next(synthetic.film(0)).save("film/0.png")
    Path("noise.mp4").write_bytes(b"not a film" * 100)
    Path("text").symlink_to(folders / "text")
    with pytest.raises(ValueError, match=complaint) as error:
        vniah.main(replace(cfg, **change))
    assert "\n" not in str(error.value)


def test_a_folder_keeps_its_settings(undrawn, cfg):
    with pytest.raises(ValueError, match="nowhere"):
        vniah.main(replace(cfg, haystack="nowhere.mp4"))
    vniah.main(cfg)  # a mistake is mended in the same folder
    assert found_by(cfg)
    with pytest.raises(ValueError, match=r"other settings \(seed was 7, is 8\)"):
        vniah.main(replace(cfg, seed=8))
    vniah.main(replace(cfg, trained_on=16))  # changes the pictures alone
