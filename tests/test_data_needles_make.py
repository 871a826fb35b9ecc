"""The shipped needles: the drawing script's own pixels, evenly spread, in the release's format, none like another."""

import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.needles import make
from data.niah import read_needles, shuffled_options

FOLDER = Path(make.__file__).parent
SHIPPED = read_needles(FOLDER)
SPECS = make.needle_specs()
KINDS = "text", "colour", "count", "place", "object"
COLOURS = "Red Orange Yellow Green Blue Purple Pink Brown Black White".split()


def options(question):
    return re.findall(r"^([A-Z])\. (.+)$", question, re.M)


def test_count_kinds_and_questions():
    assert len(SHIPPED) == len(SPECS) >= 60
    assert Counter(needle.kind for needle in SHIPPED) == dict.fromkeys(KINDS, make.PER_KIND)
    for needle, (kind, question, answer, *_) in zip(SHIPPED, SPECS, strict=True):
        assert (needle.kind, needle.question, needle.answer) == (kind, question, answer)
    assert {file.stem for file in FOLDER.glob("*.png")} == {needle.name for needle in SHIPPED}


@pytest.mark.parametrize("index", range(0, len(SPECS), 6))
def test_drawn_again_they_are_the_same(index):
    again = make.draw_needle(index)
    assert again.name == SHIPPED[index].name
    assert np.array_equal(np.asarray(again.picture.convert("RGB")), np.asarray(SHIPPED[index].picture))


def test_another_seed_asks_for_other_counts_and_letters():
    first, second = ([answer for _, _, answer, *_ in make.needle_specs(seed)] for seed in (1, 2))
    assert first[:28] == second[:28] and first[28:42] != second[28:42] and first[42:] != second[42:]


def test_size():
    files = list(FOLDER.glob("*.*"))
    assert sum(file.stat().st_size for file in files) < 1_200_000
    for needle in SHIPPED:
        with Image.open(FOLDER / f"{needle.name}.png") as picture:
            assert picture.size == (336, 336) and picture.mode == "P"
        assert len(needle.picture.getcolors()) <= make.SHADES


def test_format():
    for needle in SHIPPED:
        assert re.match(r"\n[A-Z][^\n]*\?\n", needle.question)
        if needle.kind in ("place", "object"):
            letters, texts = zip(*options(needle.question))
            assert letters == tuple("ABCD") and len(set(texts)) == 4 and needle.answer in letters
            assert needle.question.endswith("\nAnswer with the option's letter from the given choices directly.")
            assert needle.question.count("\n") == 6
        else:
            assert not options(needle.question) and needle.question.count("\n") == 2
            assert needle.question.endswith("\nAnswer the question using a single word or phrase.")


def test_answers_are_plain_and_not_told_by_the_question():
    for needle in SHIPPED:
        if needle.kind == "colour":
            assert needle.answer in COLOURS
        elif needle.kind == "count":
            assert needle.answer in list("23456789")
        elif needle.kind == "text":
            assert re.fullmatch(r"[A-Z][a-z]+|\d+|\d:\d\d", needle.answer)
        asked = needle.question.split("\n")[1]
        if needle.kind != "place":
            right = dict(options(needle.question)).get(needle.answer, needle.answer)
            assert right.lower() not in asked.lower().split()


def test_answers_are_evenly_spread():
    letters = Counter(needle.answer for needle in SHIPPED if needle.kind in ("place", "object"))
    assert letters == dict.fromkeys("ABCD", 7)
    counts = Counter(needle.answer for needle in SHIPPED if needle.kind == "count")
    assert len(counts) == 8 and max(counts.values()) == 2
    colours = Counter(needle.answer for needle in SHIPPED if needle.kind == "colour")
    assert set(colours) == set(COLOURS) and max(colours.values()) == 2
    texts = [needle.answer for needle in SHIPPED if needle.kind == "text"]
    assert len(set(texts)) == len(texts)


def test_no_two_ask_alike():
    asked = [needle.question.split("\n")[1] for needle in SHIPPED]
    assert len(set(asked)) == len(asked)
    right = [dict(options(n.question))[n.answer] for n in SHIPPED if n.kind in ("place", "object")]
    assert len(set(right)) == len(right)
    pixels = [np.asarray(needle.picture.resize((21, 21), Image.Resampling.BOX)).astype(int) for needle in SHIPPED]
    for i, one in enumerate(pixels):
        assert all(np.abs(one - other).mean() > 4 for other in pixels[:i])


def test_letters_of_the_shipped_can_be_shuffled():
    rng = np.random.default_rng(0)
    for needle in SHIPPED:
        other = shuffled_options(needle, rng)
        assert (other is None) == (needle.kind not in ("place", "object"))
        if other:
            assert dict(options(other.question))[other.answer] == dict(options(needle.question))[needle.answer]
            assert other.answer != needle.answer


def things(index):
    """The (name, tint, x, y, size) of what COUNTED scatters, read off the plan."""
    _, question, answer, picture, _ = SPECS[index]
    parts = [part.split() for part in picture.split(";")]
    name = next(row[1] for row in make.COUNTED if row[0] in question)
    return int(answer), [(float(x), float(y), float(size)) for d, _, n, x, y, size in
                         (part for part in parts if len(part) == 6 and part[0] == "d") if n == name]  # fmt: skip


def test_as_many_are_drawn_as_the_answer_says():
    for index in (i for i, plan in enumerate(SPECS) if plan[0] == "count"):
        count, drawn = things(index)
        assert len(drawn) == count
        for i, (x, y, size) in enumerate(drawn):  # apart from each other, and whole in the picture
            assert size / 4 <= x <= 100 - size / 4 and size <= y <= 100
            assert all(abs(x - a) > size / 4 or abs(y - b) >= size * 0.75 for a, b, _ in drawn[:i])


# ---- the means of drawing ------------------------------------------------------------------------


def pixels(shapes, **where):
    drawn = make.Canvas()
    drawn.draw(shapes, **where)
    return np.asarray(drawn.to_picture().convert("RGB")).astype(int)


def test_shapes_cover_what_geometry_says():
    side = make.SIDE * make.SIDE
    for shape, share in [
        ("B ink 25 25 75 75", 0.25),
        ("P ink 0 0 100 0 0 100", 0.5),
        ("O ink 50 50 40 20", np.pi * 0.4 * 0.2),
        ("l ink 10 20 50 80 50", 0.6 * 0.1 + np.pi * 0.05**2),
        ("B ink 20 20 80 80 30", np.pi * 0.3**2),
        ("l ink 10 50 50 50 50", np.pi * 0.05**2),
    ]:
        dark = (255 - pixels(shape)[..., 0]).sum() / (255 - make.PAINT["ink"][0]) / side
        assert dark == pytest.approx(share, abs=0.002), shape


def test_a_drawing_stands_where_it_is_put():
    whole = pixels("B red 0 0 100 100", x=25, y=75, size=50)
    red = (whole == make.PAINT["red"]).all(-1)
    assert red[84:252, :168].all() and red.sum() == 168 * 168
    assert (pixels("B * 0 0 100 100", tint="blue") == make.PAINT["blue"]).all()


def test_smooth_curves_pass_through_their_points():
    corners = np.array([[0.0, 0], [8, 2], [5, 9]])
    for closed, pieces in [(False, 2), (True, 3)]:
        curve = make.smooth(corners, closed)
        assert np.allclose(curve[::8], corners) and len(curve) == 8 * pieces + (not closed)


def test_edges_are_drawn_for_small_letters_alone():
    plain, edged = pixels("B sky 25 25 75 75"), pixels("b sky 25 25 75 75")
    assert plain.min() > 150 and (edged == make.PAINT["ink"]).all(-1).any()


def test_letters_keep_their_distance():
    for one, two in pairwise(make.GLYPHS):
        drawn = [points for points, _ in make.letters(one + two)]
        count = len(make.GLYPHS[one].split("/"))
        assert max(p[:, 0].max() for p in drawn[:count]) + 2 <= min(p[:, 0].min() for p in drawn[count:])


def test_pictures_have_few_colours_and_no_unknown_shapes():
    many = "".join(f"B {name} {i} 0 {i + 1} 100;" for i, name in enumerate(make.PAINT))
    many += "".join(f"o {name} 50 {i} 30 9;" for i, name in enumerate(make.PAINT))
    drawn = make.Canvas()
    drawn.draw(many)
    assert len(drawn.to_picture().convert("RGB").getcolors()) == make.SHADES
    with pytest.raises(ValueError, match="'q': expected o, b, p"):
        drawn.draw("q red 0 0")


# ---- the command ---------------------------------------------------------------------------------


def command(*words):
    line = [sys.executable, "-m", "data.needles.make", *words]
    return subprocess.run(line, cwd=FOLDER.parents[1], capture_output=True, text=True)


def test_help_helps_and_nothing_is_written_without_a_folder(tmp_path):
    before = {file: file.stat().st_mtime_ns for file in FOLDER.glob("*.*")}
    shown, refused = command("--help"), command()
    assert shown.returncode == 0 and "--out" in shown.stdout and "--seed" in shown.stdout
    assert refused.returncode == 2 and "--out" in refused.stderr
    assert {file: file.stat().st_mtime_ns for file in FOLDER.glob("*.*")} == before


def test_a_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "needle_specs", lambda seed=1: SPECS[:2])
    make.main(make.Config(out=tmp_path / "drawn"))
    assert [needle.name for needle in read_needles(tmp_path / "drawn")] == ["text-01", "text-02"]
