"""Tables count what the cells hold; pictures are drawn whatever is missing; the page has every probe."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data import niah, results, runs

LENGTHS, DEPTHS = (8, 16, 32), (0.0, 0.5, 1.0)


def some(lengths, depths, name="a model", trained=16, gaps=False, seed=0):
    """A map whose rates fall with the length; with `gaps`, some cells are not there and some are empty."""
    rng, grid = np.random.default_rng(seed), {}
    for n in lengths:
        for d in depths:
            if not gaps or rng.random() < 0.7:
                grid[n, d] = (rng.random(5) > n / lengths[-1] * 0.8).tolist() if not gaps or rng.random() < 0.8 else []
    return results.Heatmap(name, grid, trained)


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


@pytest.mark.parametrize("lengths, depths, count, gaps", [
    (LENGTHS, DEPTHS, 4, True), ((16,), (0.5,), 1, False), ((16,), DEPTHS, 3, True),
    (tuple(range(32_000, 480_001, 32_000)), tuple(i / 10 for i in range(11)), 2, False),
])  # fmt: skip
def test_pictures(tmp_path, lengths, depths, count, gaps):
    maps = [some(lengths, depths, f"model {i}", seed=i, gaps=gaps) for i in range(count)]
    maps[-1] = results.Heatmap("nothing known", {}, 10**9) if gaps else maps[-1]
    results.draw_heatmaps(tmp_path / "heatmap.png", maps, lengths, depths, "frames", 4)
    results.draw_heatmaps(tmp_path / "plain.png", maps, lengths, depths, "tokens")
    results.draw_comparison(tmp_path / "comparison.png", maps, lengths, "frames")
    for name in ("heatmap", "plain", "comparison"):
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


@pytest.mark.parametrize("text, answer, right", [
    ("7", "7", True), (" 7.", "7", True), ("17", "7", False), ("It is 7 there", "7", True), ("72", "7", False),
    ("Yellow", "yellow", True), ("a yellow balloon.", "Yellow", True), ("yellowish", "yellow", False),
    ("B", "B", True), ("b", "B", True), ("B.", "B", True), ("(B) the cup", "B", True), ("B. cup", "B", True),
    ("Bird", "B", False), ("The answer is B", "B", False), ("A dog", "A", False), ("A: a dog", "A", True),
    ("A's", "A", False), ("", "7", False), ("200 mg", "200", True), ("a+b", "a+b", True), ("aab", "a+b", False),
    ("the number is 2965478.", "2965478", True), ("29654780", "2965478", False), ("E", "E", True), ("e\n", "E", True),
    ("B is the answer", "B", True), ("**B**", "B", True), ("[B] a house", "B", True), ("B - a house", "B", True),
    ("I think B", "I", False), ("A - a house", "A", True), ("A (a house)", "A", True), ("Because", "B", False), ("A: a dog", "A", True),
])  # fmt: skip
def test_answer_in_text(text, answer, right):
    assert results.answer_in_text(text, answer) == right


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
    probes = [probe for cell in page.json["cells"] for probe in cell["probes"].values()]
    assert len(probes) == 6 == sum(cell["of"] for cell in want["cells"])
    assert sum(probe["hit"] for probe in probes) == 4 == sum(cell["found"] for cell in want["cells"])
    assert {(p["generated_text"], p["answer"], p["generated_correct"]) for p in probes} == {(HOSTILE, "7", False)}
    assert page.json["needles"] == {"a system": [niah.describe(needle) for needle in needles]}
    assert len(page.json["pictures"]) == (task == "vision")
    assert page.tags.count("script") == len(page.scripts) == 2 and not page.loads and first.isascii()
    resumed = results.ProbeLog(tmp_path, 0, lambda: None)
    resumed.asked["a system"] = needles
    results.write_results(tmp_path, resumed, {"a system": 8.0})
    assert (tmp_path / results.PAGE).read_text() == first


def test_page_of_600_noisy_photographs_is_small(tmp_path):
    """Noise is what neither PNG nor JPEG makes small."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 99, 99, 3), np.uint8)
    needles = [niah.Needle(f"{i}", Image.fromarray(pixels), "Which?" * 20, "7") for i, pixels in enumerate(noise)]
    finished(tmp_path, "vision", needles, cells=[(8, 0.5)])
    assert len(Page(tmp_path).json["pictures"]) == 600 and (tmp_path / results.PAGE).stat().st_size < 5_000_000


def test_script_and_style_of_the_page_are_all_it_may_use():
    """Nothing of the network, and no text as markup."""
    text = results.TEMPLATE.read_text()
    assert "default-src 'none'; img-src data:" in text and text.count("@RESULTS@") == 1
    assert not [word for word in ("http:", "https:", "innerHTML", "insertAdjacent", "document.write", "eval(", "fetch",
                                  "import(", "url(") if word in text]  # fmt: skip


def test_probes_that_are_missing_are_asked_for_once(tmp_path):
    """Whichever probes of a group a killed run left: no group asks for one that is there."""
    needles = [niah.Needle(f"n{i}", None, "?", "7") for i in range(3)]
    done = {8: ("n0", "n2"), 16: ("n0",), 32: (), 64: ("n0", "n1", "n2")}
    log = results.ProbeLog(tmp_path, 0, lambda: None)
    log.append(
        [results.probe_line("s", (n, 0.5), needles[int(x[1])], 9, True, "7", None) for n in done for x in done[n]]
    )
    log.read()
    group = niah.ProbeGroup(0, 8, (0, 1, 2), tuple((n, 0.5) for n in done))
    asked = [
        (cell[0], f"n{i}") for one in log.pending("s", needles, [group]) for cell in one.cells for i in one.needle_ids
    ]
    assert sorted(asked) == [(n, x) for n in done for x in ("n0", "n1", "n2") if x not in done[n]]


def test_the_settings_of_another_program_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="holds a run with other settings"):
        results.open_results(tmp_path, {"protocol": "tiny", "seed": 7})
    assert (tmp_path / "config.json").read_text() == '{"model_type": "qwen2"}'
