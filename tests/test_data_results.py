"""Tables count what the cells hold; pictures are drawn whatever is missing; the page has every probe."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data import niah, results, runs

LENGTHS, DEPTHS = (8, 16, 32), (0.0, 0.5, 1.0)


def test_table():
    one = results.Heatmap("p", {(8, 0.0): [True, False], (8, 1.0): [True, True], (16, 0.0): [False, False]}, 8)
    assert one.rate() == (3, 6) and one.rate(8) == (3, 4) and one.rate(99) == (0, 0)
    np.testing.assert_array_equal(one.array(LENGTHS, (0.0, 1.0)), [[0.5, 0, np.nan], [1, np.nan, np.nan]])
    none = results.Heatmap("nothing known", {}, 8)
    head, row, empty = results.table([one, none], LENGTHS, "frames").splitlines()
    low, high = results.wilson(3, 6)
    assert head.split() == ["frames", "8", "16", "32", "mean", "95", "%", "interval"]
    assert row.split() == ["p", "0.75", "0.00", "0.500", f"{low:.3f}", "to", f"{high:.3f}", "(n=6)"]
    assert "nothing known" in empty and empty.split()[2:] == ["-", "0.000", "to", "1.000", "(n=0)"]
    assert head.index("mean") + 4 == row.index("0.500") + 4 and len({line.rindex("  ") for line in (row, empty)}) == 1


def test_ascii_heatmap():
    grid = {(8, 0.0): [True] * 4, (16, 0.0): [True, False], (32, 0.0): [False], (8, 0.5): [True, False, False, False]}
    text = results.ascii_heatmap(results.Heatmap("p", grid, 16), LENGTHS, DEPTHS, "frames").splitlines()
    assert text[0].startswith("p, frames 8 to 32")
    assert text[1:] == ["  0% ███▒▒▒|   ", " 50% ░░░  ?|  ?", "100%   ?  ?|  ?"]
    grid = {(8, 0.0): [True] + [False] * 9, (16, 0.0): [True] * 9 + [False]}  # no line: all lengths were trained on
    text = results.ascii_heatmap(results.Heatmap("p", grid, 999), LENGTHS, DEPTHS, "frames")
    assert text.splitlines()[1] == "  0% ░░░▓▓▓  ?"


@pytest.mark.parametrize("lengths, depths, count, tokens", [
    (LENGTHS, DEPTHS, 4, 4), ((16,), (0.5,), 5, 1), (tuple(range(2_000, 50_001, 6_000)), DEPTHS, 2, 4),
])  # fmt: skip
def test_pictures(tmp_path, lengths, depths, count, tokens):
    """Of random hits; of four systems one was never tested, and the others lack cells."""
    rng, maps = np.random.default_rng(0), []
    for i in range(count):
        hits = {(n, d): rng.integers(0, 2, 5).tolist() for n in lengths for d in depths}
        if count == 4:
            hits = {cell: found[: 5 * (cell[0] > 8)] for cell, found in hits.items() if i < 3 and cell[1] < 1}
        maps.append(results.Heatmap(f"model {i}", hits, 10**9 if i == 3 else 16))
    results.draw_heatmaps(tmp_path / "heatmap.png", maps, lengths, depths, "frames", tokens)
    results.draw_comparison(tmp_path / "comparison.png", maps, lengths, "frames")
    for name in ("heatmap", "comparison"):
        picture = Image.open(tmp_path / f"{name}.png")
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 20


def test_wilson_is_where_the_score_test_is_z():
    """The defining property: at either end p of the interval, |rate - p| is z standard errors of p."""
    for hits, trials, z in [(3, 20, 1.96), (7, 9, 1.0), (40, 50, 2.58), (0, 10, 1.96), (10, 10, 1.96), (1, 1, 1.96)]:
        low, high = results.wilson(hits, trials, z)
        assert 0 <= low <= hits / trials <= high <= 1 and low < high
        for p in (low, high):
            assert abs(hits / trials - p) == pytest.approx(z * (p * (1 - p) / trials) ** 0.5)
    # z of 95 %, on LongVA-7B's published heat map
    assert results.wilson(409, 450) == pytest.approx((0.8787, 0.9321), abs=5e-5)


@pytest.mark.parametrize("answer, right, wrong", [
    ("7", ["7", " 7.", "It is 7 there"], ["17", "72", ""]),
    ("yellow", ["Yellow", "a yellow balloon."], ["yellowish"]),
    ("Yellow", ["a yellow balloon."], []),
    ("2965478", ["the number is 2965478."], ["29654780"]),
    ("a+b", ["a+b"], ["aab"]),
    ("A", ["A - a house", "A (a house)", "A: a dog"], ["A dog", "A's"]),
    ("B", ["B", "b", "B.", "(B) the cup", "B. cup", "B is the answer", "**B**", "[B] a house"], ["Bird", "The answer is B"]),
    ("E", ["E", "e\n"], ["the end"]),
    ("I", ["I - a house"], ["I think B"]),
])  # fmt: skip
def test_answer_in_text(answer, right, wrong):
    assert [text for text in right + wrong if results.answer_in_text(text, answer)] == right


# ---- the page of every probe ---------------------------------------------------------------------

HOSTILE = '</script><script>alert("1")</script><!--<script>&lt;\u2028\ud800@RESULTS@'


class Page(HTMLParser):
    """The names of all tags of a page, and what it is made to load or to run, and its JSON."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.loads, self.scripts = [], [], []
        self.feed((folder / results.PAGE).read_text(encoding="utf-8"))
        self.json = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [name for name, _ in attributes if name in ("src", "href", "srcset", "onload", "onerror")]

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script" and text.strip():
            self.scripts.append(text)


def finished(folder, task, needles, cells=((8, 0.0), (8, 1.0)), said=HOSTILE):
    """Write the results of one system that found all needles but the first."""
    log = results.ProbeLog(folder, 0, lambda: None)
    log.asked["a system"] = needles
    log.append(results.probe_line("a system", cell, needle, 40, i > 0, "7", said) for cell in cells
               for i, needle in enumerate(needles))  # fmt: skip
    log.read()
    runs.replace_text(folder / "config.json", json.dumps({"task": task, "weights": {HOSTILE: "0"}}))
    results.write_results(folder, log, {"a system": 8.0})


@pytest.mark.parametrize("task", ["vision", "text"])
def test_page_has_every_probe_and_no_text_acts(tmp_path, task):
    """Also a resumed run's, whose log has read nothing and made nothing."""
    picture = Image.new("RGB", (500, 400), "red") if task == "vision" else None
    needles = [niah.Needle(f"{HOSTILE}{i}", picture, HOSTILE, "7", "colour" * i) for i in range(3)]
    finished(tmp_path, task, needles)
    first, page = (tmp_path / results.PAGE).read_text(), Page(tmp_path)
    want = json.loads((tmp_path / "results.json").read_text())
    assert {name: page.json[name] for name in want} == want and set(page.json) == {*want, "pictures", "needles"}
    cells = page.json["cells"]
    probes = [probe for cell in cells for probe in cell["probes"].values()]
    assert (len(probes), sum(probe["hit"] for probe in probes)) == (6, 4)
    assert [(cell["of"], cell["found"]) for cell in cells] == [(3, 2)] * 2
    assert {(p["generated_text"], p["answer"], p["generated_correct"]) for p in probes} == {(HOSTILE, "7", False)}
    assert page.json["needles"] == {"a system": [niah.describe(needle) for needle in needles]}
    assert len(page.json["pictures"]) == (task == "vision")
    assert page.tags.count("script") == len(page.scripts) == 2 and not page.loads and first.isascii()
    resumed = results.ProbeLog(tmp_path, 0, lambda: None)
    resumed.asked["a system"] = needles
    results.write_results(tmp_path, resumed, {"a system": 8.0})
    assert (tmp_path / results.PAGE).read_text() == first


def test_page_of_many_noisy_photographs_is_small(tmp_path, monkeypatch):
    """Noise is what neither PNG nor JPEG makes small."""
    monkeypatch.setattr(results, "MAX_BYTES", results.MAX_BYTES // 10)
    noise = np.random.default_rng(0).integers(0, 256, (60, 99, 99, 3), np.uint8)
    needles = [niah.Needle(f"{i}", Image.fromarray(pixels), "Which?" * 20, "7") for i, pixels in enumerate(noise)]
    finished(tmp_path, "vision", needles, cells=[(8, 0.5)])
    assert len(Page(tmp_path).json["pictures"]) == 60 and (tmp_path / results.PAGE).stat().st_size < 500_000


def test_script_and_style_of_the_page_are_all_it_may_use():
    """Nothing of the network, and no text as markup."""
    text = results.TEMPLATE.read_text()
    assert "default-src 'none'; img-src data:" in text and text.count("@RESULTS@") == 1
    assert not [word for word in ("http:", "https:", "innerHTML", "insertAdjacent", "document.write", "eval(", "fetch",
                                  "import(", "url(") if word in text]  # fmt: skip


def test_probes_that_are_missing_are_asked_for_once(tmp_path):
    """Whichever probes of a group a killed run left: no group asks for one that is there."""
    needles = [niah.Needle(f"n{i}", None, "?", "7") for i in range(3)]
    done = {(8, 0), (8, 2), (16, 0), (64, 0), (64, 1), (64, 2)}  # (length, number of the needle)
    log = results.ProbeLog(tmp_path, 0, lambda: None)
    log.append(results.probe_line("s", (n, 0.5), needles[i], 9, True, "7", None) for n, i in done)
    log.read()
    pending = log.pending("s", needles, [niah.ProbeGroup(0, 8, (0, 1, 2), tuple((n, 0.5) for n in (8, 16, 32, 64)))])
    asked = [(n, i) for group in pending for n, _ in group.cells for i in group.needle_ids]
    assert sorted(asked) == [(n, i) for n in (8, 16, 32) for i in range(3) if (n, i) not in done]


def test_the_settings_of_another_program_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="holds a run with other settings"):
        results.open_results(tmp_path, {"protocol": "tiny", "seed": 7})
    assert (tmp_path / "config.json").read_text() == '{"model_type": "qwen2"}'
