"""Needles read back as written; probes hold what they should where they should; intervals match known values."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from data import niah
from data.niah import Needle

# ---- visual needles ------------------------------------------------------------------------------


def picture(colour):
    return Image.new("RGB", (6, 4), colour)


@pytest.fixture
def folder(tmp_path):
    niah.write_needles(tmp_path, [
        Needle("cat", picture("red"), "\nWhich colour?\nA. Red\nB. Blue", "A"),
        Needle("zoo/dog", picture("blue"), "\nHow many?", "200", "count"),
    ])  # fmt: skip
    return tmp_path


def test_written_needles_read_back(folder):
    cat, dog = niah.read_needles(folder)
    assert (cat.name, cat.question, cat.answer, cat.kind) == ("cat", "\nWhich colour?\nA. Red\nB. Blue", "A", "")
    assert (dog.name, dog.question, dog.answer, dog.kind) == ("zoo/dog", "\nHow many?", "200", "count")
    assert ["kind" in record for record in json.loads((folder / "questions.json").read_text())] == [False, True]
    assert (dog.picture.mode, dog.picture.tobytes()) == ("RGB", picture("blue").tobytes())


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_release_s_names(folder, suffix):
    (folder / "questions.json").unlink()
    records = [
        {"path": "cat.png", "prompt": "q\u2028", "answer": "a"},
        {"image": "zoo/dog.png", "question": "r", "answer": "b"},
    ]
    text = json.dumps(records) if suffix == "json" else "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (folder / f"questions.{suffix}").write_text(text, encoding="utf-8")
    found = [(n.name, n.question, n.answer) for n in niah.read_needles(folder)]
    assert found == [("cat", "q\u2028", "a"), ("zoo/dog", "r", "b")]


GOOD = {"image": "cat.png", "question": "q", "answer": "a"}


@pytest.mark.parametrize("records, complaint", [
    ([], "questions.json is an empty list; at least one needle"),
    ({"image": "cat.png"}, "questions.json is {'image': 'cat.png'}; a list is expected"),
    ([GOOD, "cat.png"], "questions.json: record 2 is 'cat.png'; a dictionary is expected"),
    ([{"question": "q"}], "record 1 lacks image, answer"),
    ([GOOD | {"answer": " "}], "record 1 has an empty image, question or answer"),
    ([GOOD | {"answer": 200}], "record 1.answer is 200; text is expected"),
    ([GOOD | {"question": "\ud800"}], r"record 1.question is '\\ud800'; text is expected"),
    ([GOOD | {"kind": 3}], "record 1.kind is 3; text is expected"),
    ([{"path": "", "prompt": "q", "answer": "a"}], "record 1 has an empty image"),
    ([GOOD | {"image": "x" * 10**6}], "record 1: .*xxx"),
    ([GOOD, GOOD], "record 2: the needle 'cat' is record 1 already"),
    ([GOOD | {"image": "fox.png"}], "record 1: .*fox.png: no such picture file"),
    ([GOOD | {"image": "text.png"}], "record 1: .*text.png: cannot be read as a picture"),
    *(([GOOD | {"image": image}], f"record 1: the picture '{image}' lies outside the folder")
      for image in ("../cat.png", "/etc/passwd", ".", "link.png")),
    ([GOOD | {"image": "a\0b"}], "record 1: the picture .* lies outside the folder"),
])  # fmt: skip
def test_bad_needles(folder, records, complaint):
    (folder / "text.png").write_text("not a picture")
    (folder / "link.png").symlink_to("/etc/hostname")
    (folder / "questions.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=complaint) as error:
        niah.read_needles(folder)
    assert "questions.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize("text", ['[{"image": ', "[" * 100_000, "\udcff"], ids=["cut", "deep", "bytes"])
def test_bad_json(folder, text):
    (folder / "questions.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"questions\.json: is not valid JSON"):
        niah.read_needles(folder)
    (folder / "questions.json").unlink()
    with pytest.raises(ValueError, match=r"no questions\.json or questions\.jsonl"):
        niah.read_needles(folder)


def test_insert_index():
    assert [niah.insert_index(200, d) for d in (0, 0.2, 0.4, 0.6, 0.8, 1)] == [0, 40, 80, 120, 160, 200]
    assert niah.insert_index(7, 0.5) == 3  # rounded down, as in the release
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside the haystack"):
            niah.insert_index(10, depth)


@pytest.mark.parametrize("answer", "ABCD")
def test_shuffled_options_move_the_answer(answer):
    options = {"A": "Here", "B": "There", "C": "Elsewhere", "D": "Nowhere"}
    lines = ["", "Where is it?", *(f"{letter}. {text}" for letter, text in options.items()), "Answer with the letter."]
    needle, rng = Needle("n", picture("red"), "\n".join(lines), answer, "place"), np.random.default_rng(0)
    letters, orders = [], set()
    for _ in range(300):
        other = niah.shuffled_options(needle, rng)
        assert (other.name, other.kind, other.picture) == (needle.name, needle.kind, needle.picture)
        found = other.question.split("\n")
        assert (found[:2], found[6:]) == (lines[:2], lines[6:])
        moved = dict(line.split(". ") for line in found[2:6])
        assert (sorted(moved), sorted(moved.values())) == (sorted(options), sorted(options.values()))
        assert moved[other.answer] == options[answer]
        letters.append(other.answer)
        orders.add(tuple(moved.values()))
    assert len(orders) == 18  # every order but the 6 that leave the answer where it was
    assert all(60 < letters.count(letter) < 140 for letter in {*"ABCD"} - {answer}) and answer not in letters
    two = niah.shuffled_options(Needle("n", picture("red"), "\nWhich?\nA. Cat\nB. Dog", "B"), rng)
    assert (two.question, two.answer) == ("\nWhich?\nA. Dog\nB. Cat", "A")


@pytest.mark.parametrize("question, answer", [
    ("\nHow many?\nAnswer the question using a single word or phrase.", "3"),
    ("\nWho is A. Smith?", "A"),
    ("\nWhich?\nA. Cat", "A"),
    ("\nWhich?\nA. Cat\nB. Dog", "Cat"),
    ("\nWhich?\nA. Cat\nB. Dog", "AB"),
    ("\nWhich?\nA. Cat\nB. Dog", "C"),
    ("\nWhich?\nB. Cat\nC. Dog", "B"),
])  # fmt: skip
def test_no_options_to_shuffle(question, answer):
    assert niah.shuffled_options(Needle("n", picture("red"), question, answer), np.random.default_rng(0)) is None


# ---- text needles --------------------------------------------------------------------------------


class Toy:
    """A tokenizer by regular expression: every match is a token and new ones get the next id."""

    def __init__(self, pattern, prefix=""):
        self.pattern, self.prefix, self.ids = re.compile(pattern, re.S), prefix, {}

    def encode(self, text, special=False):
        assert not special
        return [self.ids.setdefault(t, len(self.ids)) for t in self.pattern.findall(self.prefix + text)]

    def decode(self, ids):
        words = list(self.ids)
        return "".join(words[i] for i in ids)


QWEN = r" ?\.\n*|[0-9]| ?[A-Za-z]+|\s| ?[^\sA-Za-z0-9]"  # digits alone, full stops joined with line ends
GPT = r" ?\.\n*| ?[0-9]{1,3}| ?[A-Za-z]+|\s| ?[^\sA-Za-z0-9]"  # a space goes with up to three digits
LLAMA = r" ?\.|[0-9]| ?[A-Za-z]+|\s| ?[^\sA-Za-z0-9]", " "  # a space before everything; line ends and digits alone


BOOK = "One day it rained. Then the sun came out! We all went home.\n\nThe end was near . Really. "


def test_magic_numbers():
    """Those of the release; all have their digits, and differ, as all cities do."""
    assert len({niah.CITY, *niah.DISTRACTORS}) == 7
    drawn = niah.magic_numbers(np.random.RandomState(niah.SEED), 10)
    assert drawn[:5] == ["2965478", "7624612", "7182423", "9211957", "7727364"]
    assert drawn[5:] == ["7875983", "1540810", "5050145", "4209505", "9134486"]
    for digits, count in [(1, 9), (2, 90), (3, 200)]:
        drawn = niah.magic_numbers(np.random.RandomState(0), count, digits)
        assert len(set(drawn)) == count and all(len(n) == digits and n[0] != "0" for n in drawn)
    for digits, count in [(1, 10), (0, 1)]:
        with pytest.raises(ValueError, match="ask for fewer, or for more digits"):
            niah.magic_numbers(np.random.RandomState(0), count, digits)


def test_period_ids():
    for toy, want in ((Toy(QWEN), {".", " .", ".\n", ".\n\n"}), (Toy(*LLAMA), {".", " ."})):
        assert {toy.decode([i]) for i in niah.period_ids(toy.encode)} == want
    with pytest.raises(ValueError, match="no token for a full stop"):
        niah.period_ids(Toy("[a-z]+").encode)


@pytest.mark.parametrize("toy, ends, answer", [
    (Toy(QWEN), "is: ", list("2965478")),  # as in the release: a trailing space, then seven digits
    (Toy(*LLAMA), "is: ", list("2965478")),
    (Toy(GPT), "is:", [" 296", "547", "8"]),  # the space is part of the first token of the answer
])  # fmt: skip
@pytest.mark.parametrize("number", ["2965478", "9965478"])
def test_question_and_answer(toy, ends, answer, number):
    question_ids, answer_ids = niah.question_and_answer(toy.encode, number)
    assert question_ids + answer_ids == toy.encode(niah.QUESTION + number)
    assert toy.decode(question_ids).endswith(ends)
    want = [t.replace("296", number[:3]).replace("2", number[0]) for t in answer]
    assert [toy.decode([i]) for i in answer_ids] == want
    with pytest.raises(ValueError, match="encodes different numbers alike"):
        niah.question_and_answer(Toy("[a-z]+").encode, "123")


def hide(encode, book, at, city, number):
    return [*book[:at], *encode(f"\nThe special magic {city} number is: {number}.\n"), *book[at:]]


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_probe(depth):
    """Against one put together by hand, without sentence ends; depth is of the book with its distractors."""
    encode, at = Toy(QWEN).encode, np.random.RandomState(3).randint(70)
    words, rome, rng = encode(BOOK), [("Rome", "77")], np.random.RandomState(3)
    book = hide(encode, (words * 9)[:70], at, "Rome", "77")
    book = hide(encode, book, int(depth * len(book)), "Singapore", "42")
    ids, answer = niah.text_probe(encode, words, 70, depth, "42", rome, rng, frozenset())
    assert ids == encode(niah.PREFIX) + book + encode(niah.QUESTION) and answer == encode("42")


@pytest.mark.parametrize("depth, after", [
    (0, ""), (0.1, "it rained."), (0.5, "home.\n\n"), (0.8, "was near ."), (0.9, "Really."), (1, "Really. "),
])  # fmt: skip
def test_a_needle_goes_after_a_sentence(depth, after):
    encode, rng = Toy(QWEN).encode, np.random.RandomState(0)
    book = encode(BOOK)
    ids, _ = niah.text_probe(encode, book, len(book), depth, "42", [], rng, niah.period_ids(encode))
    want = hide(encode, book, len(encode(BOOK[: BOOK.index(after) + len(after)])), "Singapore", "42")
    assert ids == encode(niah.PREFIX) + want + encode(niah.QUESTION)


def test_sentence_end():
    ids = [5, 1, 5, 5, 1, 5]
    assert [niah.sentence_end(ids, i, frozenset({1})) for i in range(7)] == [2, 2, 5, 5, 5, 5, 6]
    assert niah.sentence_end(ids, 3, frozenset({29889, 869})) == 3


def test_bad_probes():
    for book, context, depth, complaint in [
        ([], 10, 0.5, "0 tokens cannot fill a context of 10"), ([1, 2], 0, 0.5, "2 tokens cannot fill a context of 0"),
        ([1, 2], 10, 1.5, "depth of 1.5 is outside"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=complaint):
            niah.text_probe(Toy(QWEN).encode, book, context, depth, "42", [], np.random.RandomState(0), frozenset())


def test_text_haystack(tmp_path):
    encode = lambda text: [len(word) for word in text.split(" ")]  # noqa: E731
    # Repeated as text: at a seam its last and its first word may be one token; repeated tokens would hide that.
    assert niah.encode_repeated(encode, "ab c d", 7)[:7] == [2, 1, 3, 1, 3, 1, 3]
    assert niah.encode_repeated(encode, "ab c d", 3) == [2, 1, 1]
    (tmp_path / "b.txt").write_text("two.\n")
    (tmp_path / "a.txt").write_text("one \N{EURO SIGN}. ", encoding="utf-8")
    (tmp_path / "a.md").write_text("not this")
    assert niah.read_text_haystack(tmp_path) == "one \N{EURO SIGN}. two.\n"
    assert niah.read_text_haystack(tmp_path / "b.txt") == "two.\n"
    (tmp_path / "none").mkdir()
    (tmp_path / "c.txt").write_bytes(b"ab\xff")
    (tmp_path / "d.txt").write_text(" \n")
    for name, complaint in {
        "x.txt": r"x\.txt: no such text file or folder", "none": r"none: no \.txt file in this folder",
        "": r"c\.txt: is not UTF-8 text \(invalid start byte at byte 2\)", "d.txt": r"d\.txt: the haystack is empty",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=complaint):
            niah.read_text_haystack(tmp_path / name)
