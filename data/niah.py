"""Needles in a haystack: the needles, where they are inserted, and the questions about them.

What      Visual needles: a folder of pictures with a question and an answer each. Text needles: the sentences of the
          magic-number test, inserted into a text of a given length in tokens.
Paper     Visual needle in a haystack: Sec. 4, Fig. 4, Table 8. Text needles and distractors: App. A, Fig. 7.
Run       imported by vniah.py, data/synthetic.py and data/needles/make.py
Dimensions  none
Differs   A text needle goes after the next full stop. The release looks for Llama-2's ids of it in every tokenizer's
          text; in Qwen2's those are two rare words, so depths collapse onto few positions.
          Magic numbers have exactly the requested number of digits and all differ; the release's may be shorter.
          A folder's text files are read in sorted order, not in the order of the file system.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.flags import from_json, short, shorten
from data.video import read_picture

Encode = Callable[[str], list[int]]  # a tokenizer's `encode`: text to ids, nothing added

# ---- visual needles ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needle:
    """A picture to insert among the frames, and a question that only it answers."""

    name: str  # the picture's path inside its folder, without the suffix; one needle per name
    picture: Image.Image | None
    question: str  # as the model reads it, line breaks and answer instruction included
    answer: str
    kind: str = ""  # what the question is about, such as "colour"; optional


def insert_index(length: int, depth: float) -> int:
    """Return how many of the haystack's `length` items (frames, tokens) come before a needle at `depth` (0..1).

    Rounded down, as in the release. Raises ValueError for a depth outside 0..1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"a depth of {depth} is outside the haystack; depths go from 0 (start) to 1 (end)")
    return int(depth * length)


def _load_records(folder: Path) -> tuple[Path, list]:
    """Read the questions of a folder: (the file, its records, not yet checked)."""
    file = next((f for f in (folder / "questions.json", folder / "questions.jsonl") if f.is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: no questions.json or questions.jsonl in this folder of needles")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":  # one array; an error counts the lines that are not blank
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not valid JSON in UTF-8 ({error})") from error
    if not from_json(list, records, f"{file}: "):
        raise ValueError(f"{file} is an empty list; at least one needle is expected")
    return file, records


@dataclass(frozen=True)
class Record:
    """What questions.json says of a needle."""

    image: str
    question: str
    answer: str
    kind: str = ""


RELEASED = {"path": "image", "prompt": "question"}  # the release's names


def read_needles(folder: str | Path) -> list[Needle]:
    """Read a folder of pictures with a questions.json (a list) or questions.jsonl (one record per line).

    A record is {"image": "cat.png", "question": "...", "answer": "..."} and may have a "kind"; the release's
    names "path" and "prompt" work too. Raises ValueError that names the file and the record.
    """
    folder = Path(folder)
    file, records = _load_records(folder)
    needles, taken = [], {}
    for i, record in enumerate(records, start=1):
        where = f"{file}: record {i}"
        record = from_json(dict, record, where)
        record = from_json(Record, {RELEASED.get(key, key): x for key, x in record.items()}, where)
        image = record.image
        if not (image.strip() and record.question.strip() and record.answer.strip()):
            raise ValueError(f"{where} has an empty image, question or answer; each must be text")
        if "\0" in image or folder.resolve() not in (folder / image).resolve().parents:
            raise ValueError(f"{where}: the picture {short(image)} lies outside the folder; move it inside")
        name = Path(image).with_suffix("").as_posix()
        if name in taken:
            raise ValueError(
                f"{where}: the needle {short(name)} is record {taken[name]} already; name pictures apart, suffix aside"
            )
        taken[name] = i
        try:
            picture = read_picture(folder / image)
        except ValueError as error:
            raise ValueError(shorten(f"{where}: {error}")) from error
        needles.append(Needle(name, picture, record.question, record.answer, record.kind))
    return needles


def read_needles_and_distractors(folder: Path, distractors: int, seed: int) -> tuple[list[Needle], list[Needle]]:
    """Read a folder of needles; `distractors` of them, drawn from the seed, are not asked about."""
    needles = read_needles(folder)
    if len(needles) <= distractors:
        raise ValueError(f"{folder} has {len(needles)} needles, too few for --distractors {distractors}")
    order = np.random.default_rng([0xD15, seed]).permutation(len(needles)).tolist()
    return [needles[i] for i in sorted(order[distractors:])], [needles[i] for i in order[:distractors]]


def write_needles(folder: str | Path, needles: Sequence[Needle]) -> None:
    """Write a folder that `read_needles` reads: a PNG per needle and questions.json."""
    folder, records = Path(folder), []
    for needle in needles:
        image = f"{needle.name}.png"
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        needle.picture.save(folder / image, optimize=True)
        record = {"image": image, "question": needle.question, "answer": needle.answer}
        records.append(record | ({"kind": needle.kind} if needle.kind else {}))
    (folder / "questions.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def describe(needle: Needle) -> dict:
    """Return a needle as results.json records it, its picture by hash."""
    text = {"name": needle.name, "question": needle.question, "answer": needle.answer, "kind": needle.kind}
    return text | {"picture": needle.picture and picture_hash(needle.picture)}


def picture_hash(picture: Image.Image) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]


def shuffled_options(needle: Needle, rng: np.random.Generator) -> Needle | None:
    """Put the options of a multiple-choice question in another order; None for any other question.

    The right option always gets another letter, each with equal probability: a model that finds the needle
    gives the new letter, one that prefers a letter does not. Options are at least two lines: "A. ...", "B. ...".
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


# ---- probes that share a prefix ------------------------------------------------------------------


class ProbeGroup(NamedTuple):
    """Probes that are read in one batch: needles (by number) at one position of one haystack, at some lengths."""

    insert_at: int  # frames before the needle; 0 for a text
    haystack_len: int  # frames over which the distractors are spread; 0: none, so that all lengths share a prefix
    needle_ids: tuple[int, ...]
    cells: tuple[tuple[int, float], ...]  # (length, depth), from short to long


MAX_BATCH_TOKENS = 2**17  # over all probes of a batch; longer probes are read one by one


def group_by_shape(sizes: dict[int, tuple], tokens: int) -> list[tuple[int, ...]]:
    """Return the keys of equal size together; at most MAX_BATCH_TOKENS / `tokens` in each group."""
    most = max(1, MAX_BATCH_TOKENS // max(1, tokens))
    groups = [[i for i, other in sizes.items() if other == size] for size in sorted(set(sizes.values()))]
    return [tuple(group[i : i + most]) for group in groups for i in range(0, len(group), most)]


def group_probes(
    cells: Iterable[tuple[int, float]], sizes: dict[int, tuple], tokens_per_frame: int, shared: bool
) -> list[ProbeGroup]:
    """Return one group for each position in a haystack and each size of question and answer, sorted by position.

    sizes: of each needle's question and answer. shared: the haystacks of all lengths begin alike.
    """
    positions, groups = {}, []
    for length, depth in cells:
        haystack = 0 if shared else length, insert_index(length, depth)
        positions.setdefault(haystack, []).append((length, depth))
    for (haystack_len, insert_at), of_position in sorted(positions.items()):
        for needle_ids in group_by_shape(sizes, max(of_position)[0] * tokens_per_frame):
            groups.append(ProbeGroup(insert_at, haystack_len, needle_ids, tuple(sorted(of_position))))
    return groups


# ---- text needles --------------------------------------------------------------------------------

SEED = 24242424  # the release's; magic_numbers(np.random.RandomState(SEED), 10): its 5 needles, then 5 distractors
PREFIX = "This is a very long story book: <book>"
NEEDLE = "\nThe special magic {city} number is: {number}.\n"
CITY = "Singapore"  # the city of the question
DISTRACTORS = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")
QUESTION = (
    "</book>.\n Based on the content of the book, Question: What is the special magic Singapore number? "
    "Answer: The special magic Singapore number is: "
)
PROMPTS = {"before": PREFIX, "needle": NEEDLE, "question": QUESTION}  # as results.json records them


def magic_numbers(rng: np.random.RandomState, count: int, digits: int = 7) -> list[str]:
    """Draw `count` different numbers of exactly `digits` digits, no leading zero, in the release's order.

    Draw needles and distractors in one call: equal numbers would let a wrong sentence give the right answer.
    """
    if digits < 1 or count > 9 * 10 ** (digits - 1):
        raise ValueError(f"no {count} different numbers have {digits} digits; ask for fewer, or for more digits")
    drawn: dict[str, None] = {}  # a dict keeps the order, a set would not
    while len(drawn) < count:
        number = int(rng.randint(10**digits))
        if number >= 10 ** (digits - 1):
            drawn[str(number)] = None
    return list(drawn)


def period_ids(encode: Encode) -> frozenset[int]:
    """Return the tokens that end a sentence: a full stop, alone or joined with a space or line breaks.

    Qwen2: 13 ".", 659 " .", 624 ".\\n" and 382 ".\\n\\n". Raises ValueError when there is none.
    """
    word = encode("a")
    ended = [encode("a" + stop) for stop in (".", " .", ".\n", ".\n\n")]
    found = frozenset(ids[-1] for ids in ended if ids[:-1] == word)
    if not found:
        raise ValueError("this tokenizer has no token for a full stop; needles go between sentences")
    return found


def question_and_answer(encode: Encode, number: str) -> tuple[list[int], list[int]]:
    """Encode question and number together, then split at the first token that depends on the number.

    A tokenizer may join the question's trailing space to the first digits. Encoded apart, the question would
    then end in a token that the model never saw before a digit; split here, such a space belongs to the
    answer. Where digits are tokens of their own (Qwen2), the question ends in the space token, as in the release.
    """
    ids = encode(QUESTION + number)
    other_ids = encode(QUESTION + str(int(number[0]) % 9 + 1) + number[1:])  # another first digit
    split = next((i for i, (a, b) in enumerate(zip(ids, other_ids)) if a != b), None)
    if split is None:
        raise ValueError("this tokenizer encodes different numbers alike, so a magic number cannot be tested")
    return ids[:split], ids[split:]


def sentence_end(ids: Sequence[int], start: int, period_ids: frozenset[int]) -> int:
    """Return the index after the first of `period_ids` at or after `start`; `start` itself when none follows."""
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in period_ids), start)


def text_probe(
    encode: Encode,
    haystack_ids: Sequence[int],
    context: int,
    depth: float,
    number: str,
    distractors: Sequence[tuple[str, str]],
    rng: np.random.RandomState,
    period_ids: frozenset[int],
) -> tuple[list[int], list[int]]:
    """Build one probe of the magic-number test: (ids up to the answer, ids of the answer).

    The haystack is repeated or cut to `context` tokens; prefix, needle, distractors and question come on top.
    First each distractor (city, number) is inserted at a position drawn from `rng`, then the needle at `depth`
    (0..1) of the text with distractors. Both move on to the next sentence end, after one of `period_ids`, except a
    needle at depth 0.

    Raises ValueError for an empty haystack or a depth outside 0..1.
    """
    if context < 1 or len(haystack_ids) == 0:
        have = len(haystack_ids)
        raise ValueError(f"a haystack of {have} tokens cannot fill a context of {context}; both must be > 0")
    book = list(islice(cycle(haystack_ids), context))
    for city, other in distractors:
        at = sentence_end(book, int(rng.randint(len(book))), period_ids)
        book[at:at] = encode(NEEDLE.format(city=city, number=other))
    at = sentence_end(book, insert_index(len(book), depth), period_ids) if depth else 0
    book[at:at] = encode(NEEDLE.format(city=CITY, number=number))
    question_ids, answer_ids = question_and_answer(encode, number)
    return encode(PREFIX) + book + question_ids, answer_ids


Draw = tuple[str, list[tuple[str, str]], np.random.RandomState]  # number, distractors, generator of their positions


def cell_draws(seeds: list[int], counts: tuple[int, int], digits: int) -> Iterator[Draw]:
    """Yield what `text_probe` needs for each probe of a cell, numbers and positions from the cell's own seeds.

    counts: of needles and distractors. Numbers come from the generator that `text_probe` draws positions from, so each
    probe must be built before the next one is drawn.
    """
    rng = np.random.RandomState(seeds)
    for _ in range(counts[0]):
        number, *others = magic_numbers(rng, 1 + counts[1], digits)
        yield number, list(zip(DISTRACTORS, others)), rng


def release_draws(
    encode: Encode,
    seed: int,
    counts: tuple[int, int],
    digits: int,
    grid: tuple[Sequence[int], Sequence[float]],
    cell: tuple[int, float],
) -> Iterator[Draw]:
    """Yield the same in the release's order: one stream of draws for the whole grid of contexts and depths.

    First come all needles' numbers and the distractors' numbers, then for each context, depth and needle one position
    per distractor, in a text that already contains the distractors before it. Draws of other cells are skipped.
    """
    rng = np.random.RandomState(seed % 2**32)
    numbers = magic_numbers(rng, sum(counts), digits)
    distractors = list(zip(DISTRACTORS, numbers[counts[0] :]))
    added = [len(encode(NEEDLE.format(city=city, number=number))) for city, number in distractors]
    for context, depth in product(*grid):
        for number in numbers[: counts[0]]:
            if (context, depth) == cell:
                yield number, distractors, rng
                continue
            for i in range(len(added)):
                rng.randint(context + sum(added[:i]))


def encode_repeated(encode: Encode, text: str, tokens: int) -> list[int]:
    """Encode a text, repeated as often as `tokens` need; as text, as the release does it, for tokens may join at seams.

    `text_probe` would repeat the tokens.
    """
    ids = encode(text)
    return encode(text * (1 + -(-tokens // len(ids)))) if 0 < len(ids) < tokens else ids


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
