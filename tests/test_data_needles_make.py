"""The shipped needles: the drawing script's own pixels, evenly spread, in the release's format, none like another."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.needles import make
from data.niah import read_needles

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
        assert needle.picture.size == (336, 336) and len(needle.picture.getcolors()) <= make.SHADES
    assert {file.stem for file in FOLDER.glob("*.png")} == {needle.name for needle in SHIPPED}
    assert sum(file.stat().st_size for file in FOLDER.glob("*.*")) < 1_200_000


@pytest.mark.parametrize("index", range(0, len(SPECS), 6))
def test_drawn_again_they_are_the_same(index):
    again = make.draw_needle(index)
    assert again.name == SHIPPED[index].name
    assert np.array_equal(np.asarray(again.picture.convert("RGB")), np.asarray(SHIPPED[index].picture))


def test_format_and_plain_answers_that_the_question_does_not_tell():
    letters = dict.fromkeys(("place", "object"), "[A-D]")
    answers = {"colour": "|".join(COLOURS), "count": "[2-9]", "text": r"[A-Z][a-z]+|\d+|\d:\d\d"} | letters
    for needle in SHIPPED:
        assert re.match(r"\n[A-Z][^\n]*\?\n", needle.question) and re.fullmatch(answers[needle.kind], needle.answer)
        if needle.kind in ("place", "object"):
            choices = dict(options(needle.question))
            assert [*choices] == [*"ABCD"] and len(set(choices.values())) == 4
            assert needle.question.endswith("\nAnswer with the option's letter from the given choices directly.")
            assert needle.question.count("\n") == 6
        else:
            assert not options(needle.question) and needle.question.count("\n") == 2
            assert needle.question.endswith("\nAnswer the question using a single word or phrase.")
        if needle.kind != "place":
            right = dict(options(needle.question)).get(needle.answer, needle.answer)
            assert right.lower() not in needle.question.split("\n")[1].lower().split()


def test_answers_are_evenly_spread():
    spread = {kind: Counter(needle.answer for needle in SHIPPED if needle.kind == kind) for kind in KINDS}
    assert spread["place"] + spread["object"] == dict.fromkeys("ABCD", 7)
    assert len(spread["count"]) == 8 and max(spread["count"].values()) == 2
    assert set(spread["colour"]) == set(COLOURS) and max(spread["colour"].values()) == 2
    assert max(spread["text"].values()) == 1


def test_no_two_ask_alike():
    assert len({needle.question.split("\n")[1] for needle in SHIPPED}) == len(SHIPPED)
    right = [dict(options(n.question))[n.answer] for n in SHIPPED if n.kind in ("place", "object")]
    assert len(set(right)) == len(right)
    pixels = [np.asarray(needle.picture.resize((21, 21), Image.Resampling.BOX)).astype(int) for needle in SHIPPED]
    for i, one in enumerate(pixels):
        assert all(np.abs(one - other).mean() > 4 for other in pixels[:i])


def test_as_many_are_drawn_as_the_answer_says():
    """Read off the plan, whose commands are (shape, tint, name, x, y, size)."""
    for _, question, answer, picture, _ in (plan for plan in SPECS if plan[0] == "count"):
        name = next(row[1] for row in make.COUNTED if row[0] in question)
        parts = [part for part in map(str.split, picture.split(";")) if len(part) == 6 and part[0] == "d"]
        drawn = [tuple(map(float, part[3:])) for part in parts if part[2] == name]
        assert len(drawn) == int(answer)
        for i, (x, y, size) in enumerate(drawn):  # apart from each other, and whole in the picture
            assert size / 4 <= x <= 100 - size / 4 and size <= y <= 100
            assert all(abs(x - a) > size / 4 or abs(y - b) >= size * 0.75 for a, b, _ in drawn[:i])


# ---- the means of drawing ------------------------------------------------------------------------


def drawn(shapes):
    canvas = make.Canvas()
    canvas.draw(shapes)
    return canvas.to_picture().convert("RGB")


@pytest.mark.parametrize("shape, share", [
    ("B ink 25 25 75 75", 0.25),
    ("P ink 0 0 100 0 0 100", 0.5),
    ("O ink 50 50 40 20", np.pi * 0.4 * 0.2),
    ("l ink 10 20 50 80 50", 0.6 * 0.1 + np.pi * 0.05**2),
    ("B ink 20 20 80 80 30", np.pi * 0.3**2),
    ("l ink 10 50 50 50 50", np.pi * 0.05**2),
])  # fmt: skip
def test_shapes_cover_what_geometry_says(shape, share):
    dark = 255 - np.asarray(drawn(shape))[..., 0].astype(int)
    assert dark.mean() / (255 - make.PAINT["ink"][0]) == pytest.approx(share, abs=0.002)


def test_pictures_have_few_colours_and_no_unknown_shapes():
    many = [f"B {name} {i} 0 {i + 1} 100;o {name} 50 {i} 30 9" for i, name in enumerate(make.PAINT)]
    assert len(drawn(";".join(many)).getcolors()) == make.SHADES
    with pytest.raises(ValueError, match="'q': expected o, b, p"):
        drawn("q red 0 0")


def test_a_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "needle_specs", lambda seed=1: SPECS[:2])
    make.main(make.Config(out=tmp_path / "drawn"))
    assert [needle.name for needle in read_needles(tmp_path / "drawn")] == ["text-01", "text-02"]
