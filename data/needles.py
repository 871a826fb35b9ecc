"""What the two needle tests hide, where they hide it, and how sure a hit rate is.

What it is. Visual needles: a folder of pictures with a question and an answer each. Text needles: the
sentences of the "magic number" test, built into a token sequence of a given length. Wilson's interval.

Paper. Visual needle in a haystack: Sec. 4, Fig. 4, Table 8. Text needle and distractors: Fig. 7.

Run. Nothing here runs by itself; `python vniah.py` and `python vniah.py text` use it.

Deviations.
- A text needle goes after the next full stop. The release looks for Llama-2's ids of it in every tokenizer;
  in Qwen2's those are two rare words, so depths collapse onto few places. `LLAMA_PERIODS` gives that back.
- Magic numbers have exactly the asked number of digits and no two are alike; the release's may be shorter.
- The haystack's files are read in sorted order, not in the order of the file system.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from data.video import read_picture

Encode = Callable[[str], list[int]]  # a tokenizer's `encode`: text to ids, nothing added

# ------------------------------------------------------------------------------------------------------------
# Visual needles


@dataclass(frozen=True)
class Needle:
    """A picture to hide among the frames, and a question that only it answers."""

    name: str  # the picture's path inside its folder, without the suffix; one needle per name
    picture: Image.Image
    question: str  # as the model is asked it, line breaks and answer instruction included
    answer: str
    kind: str = ""  # what is asked for, such as "colour"; folders may leave it out


def place(frames: int, depth: float) -> int:
    """Return where among `frames` frames a needle at `depth` (0..1) is inserted, which makes frames + 1."""
    if not 0 <= depth <= 1:
        raise ValueError(f"a depth of {depth} is outside the haystack; depths go from 0 (start) to 1 (end)")
    return int(depth * frames)


def _load_records(folder: Path) -> tuple[Path, list]:
    """Read the questions of a folder: (the file, its records, not yet checked)."""
    file = next((f for f in (folder / "questions.json", folder / "questions.jsonl") if f.is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: no questions.json or questions.jsonl in this folder of needles")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":  # one array out of many lines, so that errors name the line
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not valid JSON in UTF-8 ({error})") from error
    if not isinstance(records, list) or not records:
        got = "an empty list" if records == [] else type(records).__name__
        raise ValueError(f"{file}: expected a list with at least one needle, got {got}")
    return file, records


def _text(where: str, record: object, *keys: str) -> str:
    """Return the first of `keys` that the record has, which must be text that is not empty."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with image, question and answer, got {record!r:.60}")
    for key in keys:
        if key in record:
            if not isinstance(record[key], str) or not record[key].strip():
                raise ValueError(f'{where}: "{key}" must be text that is not empty, got {record[key]!r:.60}')
            return record[key]
    raise ValueError(f'{where}: has no "{keys[0]}"; a record needs image, question and answer')


def read_needles(folder: str | Path) -> list[Needle]:
    """Read a folder of pictures with a questions.json (a list) or questions.jsonl (one record per line).

    A record is {"image": "cat.png", "question": "...", "answer": "..."}; the release's names, "path" and
    "prompt", are understood too, and a "kind" is kept. Raises ValueError that names the file and the record.
    """
    folder = Path(folder)
    file, records = _load_records(folder)
    needles, taken = [], {}
    for i, record in enumerate(records, start=1):
        where = f"{file}: record {i}"
        image = _text(where, record, "image", "path")
        question = _text(where, record, "question", "prompt")
        answer = _text(where, record, "answer")
        if "\0" in image or not (folder / image).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where}: the picture {image!r} lies outside the folder; move it inside")
        name = Path(image).with_suffix("").as_posix()
        if name in taken:
            raise ValueError(f"{where}: the needle {name!r} is record {taken[name]} already; give each its own picture")
        taken[name] = i
        try:
            picture = read_picture(folder / image)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        kind = _text(where, record, "kind") if "kind" in record else ""
        needles.append(Needle(name, picture, question, answer, kind))
    return needles


def write_needles(folder: str | Path, needles: Sequence[Needle]) -> None:
    """Write a folder that `read_needles` reads back alike: a PNG per needle and questions.json."""
    folder, records = Path(folder), []
    for needle in needles:
        image = f"{needle.name}.png"
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        needle.picture.save(folder / image, optimize=True)
        record = {"image": image, "question": needle.question, "answer": needle.answer}
        records.append(record | ({"kind": needle.kind} if needle.kind else {}))
    (folder / "questions.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def describe(needle: Needle) -> dict:
    """What results.json tells of a needle."""
    told = {"name": needle.name, "question": needle.question, "answer": needle.answer, "kind": needle.kind}
    return told | {"picture": digest(needle.picture)}


def digest(picture: Image.Image) -> str:
    """16 hexadecimal digits that tell one picture from another."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]


def shuffled_options(needle: Needle, rng: np.random.Generator) -> Needle | None:
    """Put the options of a multiple-choice question in another order; None for any other question.

    The right option always gets another letter, each as likely as the next: a model that finds the needle
    follows it, one that prefers a letter does not. Options are lines "A. ...", "B. ..." and so on, at least two.
    """
    lines = needle.question.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith("A. ")), len(lines))
    options = []
    for letter, line in zip("ABCDEFGHIJ", lines[first:]):
        if not line.startswith(f"{letter}. "):
            break
        options.append(line[3:])
    letters = "ABCDEFGHIJ"[: len(options)]
    if len(options) < 2 or needle.answer not in list(letters):
        return None
    old = letters.index(needle.answer)
    new = int(rng.choice([i for i in range(len(options)) if i != old]))
    right = options.pop(old)
    options = [options[i] for i in rng.permutation(len(options))]
    options.insert(new, right)
    lines[first : first + len(options)] = [f"{letter}. {option}" for letter, option in zip(letters, options)]
    return replace(needle, question="\n".join(lines), answer=letters[new])


def same_probes(one: dict, other: dict) -> bool:
    """Whether runs with these settings ask the same: needles of a folder in a given film owe nothing to the seed."""
    agree = {name for name in ("needles", "seed", "haystack", "weights") if one[name] == other[name]}
    given = one["needles"] and one["haystack"] != "synthetic" and {"needles", "haystack", "weights"} <= agree
    return {"needles", "seed"} <= agree or bool(given)


# ------------------------------------------------------------------------------------------------------------
# Text needles

SEED = 24242424  # the release's; numbers(np.random.RandomState(SEED), 10): its 5 needles, then 5 distractors
PREFIX = "This is a very long story book: <book>"
NEEDLE = "\nThe special magic {city} number is: {number}.\n"
CITY = "Singapore"  # the one that is asked for
DISTRACTORS = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")
QUESTION = (
    "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    "Answer: The special magic Singapore number is: "
)
LLAMA_PERIODS = frozenset({29889, 869})  # Llama-2's "." and " .", which the release uses for every model


def numbers(rng: np.random.RandomState, count: int, digits: int = 7) -> list[str]:
    """Draw `count` different numbers of exactly `digits` digits, no leading zero, in the release's order.

    Draw needles and distractors in one call: alike numbers would let a wrong sentence give the right answer.
    """
    if digits < 1 or count > 9 * 10 ** (digits - 1):
        raise ValueError(f"no {count} different numbers have {digits} digits; ask for fewer, or for more digits")
    drawn: dict[str, None] = {}  # a set that keeps its order
    while len(drawn) < count:
        number = int(rng.randint(10**digits))
        if number >= 10 ** (digits - 1):
            drawn[str(number)] = None
    return list(drawn)


def period_ids(encode: Encode) -> frozenset[int]:
    """Find the tokens that end a sentence: full stops with what a tokenizer may join to them, each one token.

    Qwen2: 13 ".", 659 " .", 624 ".\\n" and 382 ".\\n\\n". Raises ValueError when there is none.
    """
    word = encode("a")
    ended = [encode("a" + stop) for stop in (".", " .", ".\n", ".\n\n")]
    found = frozenset(ids[-1] for ids in ended if ids[:-1] == word)
    if not found:
        raise ValueError("this tokenizer has no token for a full stop; needles go between sentences")
    return found


def question_and_answer(encode: Encode, number: str, question: str = QUESTION) -> tuple[list[int], list[int]]:
    """Encode question and number together, then split where the number begins to matter.

    A tokenizer may join the question's trailing space to the first digits. Encoded apart, the question would
    then end in a token that the model never saw before a digit; split here, such a space belongs to the
    answer. Where digits stand alone (Qwen2), the question ends in the space token, as in the release.
    """
    whole = encode(question + number)
    other = encode(question + str(int(number[0]) % 9 + 1) + number[1:])  # the same but for its first digit
    same = next((i for i, (a, b) in enumerate(zip(whole, other)) if a != b), None)
    if same is None:
        raise ValueError("this tokenizer encodes different numbers alike, so there is no number to ask for")
    return whole[:same], whole[same:]


def sentence_end(ids: Sequence[int], start: int, stops: frozenset[int]) -> int:
    """Return the index after the first of `stops` at or after `start`; `start` itself when none follows."""
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in stops), start)


def text_probe(
    encode: Encode,
    haystack_ids: Sequence[int],
    context: int,
    depth: float,
    number: str,
    distractors: Sequence[tuple[str, str]],
    rng: np.random.RandomState,
    stops: frozenset[int],
    snap: bool = True,
) -> tuple[list[int], list[int]]:
    """Build one probe of the magic-number test: (ids up to the answer, ids of the answer).

    The haystack is repeated or cut to `context` tokens; prefix, needle, distractors and question come on top.
    First each distractor (city, number) goes to a place drawn from `rng`, then the needle to `depth` (0..1)
    of what has grown. With `snap` both move on to the next sentence end, after one of `stops` (see
    `period_ids`), except a needle at depth 0.

    Raises ValueError for an empty haystack or a depth outside 0..1.
    """
    if context < 1 or len(haystack_ids) == 0:
        have = len(haystack_ids)
        raise ValueError(f"a haystack of {have} tokens cannot fill a context of {context}; both must be > 0")
    stops = stops if snap else frozenset()
    book = list(islice(cycle(haystack_ids), context))
    for city, other in distractors:
        at = sentence_end(book, int(rng.randint(len(book))), stops)
        book[at:at] = encode(NEEDLE.format(city=city, number=other))
    at = sentence_end(book, place(len(book), depth), stops) if depth else 0
    book[at:at] = encode(NEEDLE.format(city=CITY, number=number))
    question_ids, answer_ids = question_and_answer(encode, number)
    return encode(PREFIX) + book + question_ids, answer_ids


def read_text_haystack(path: str | Path) -> str:
    """Read a text file, or the .txt files of a folder in sorted order, joined as they are.

    Raises ValueError that names the file or folder when there is no text or it is not UTF-8.
    """
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no .txt file in this folder; put the essays of the haystack there")
    parts = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such text file or folder")
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    text = "".join(parts)
    if not text.strip():
        raise ValueError(f"{path}: the haystack is empty; it needs some text")
    return text


# ------------------------------------------------------------------------------------------------------------
# Statistics


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a hit rate, 95 % at z = 1.96; it stays honest at 0 and 1."""
    assert 0 <= hits <= trials and trials > 0, (hits, trials)
    rate, shrink = hits / trials, 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)
