"""LLaVA's records (a conversation about pictures, as JSON) as training samples, read when they are wanted.

What      `open_records` goes through a file once and remembers where each record begins and how long its sample will
          be; `pick` says which records a step takes; `sample` reads one's pictures and films.
Paper     Sec. 3.2 and App. C: LLaVA-1.6's data; LLaVA-1.5's captions for the projector; Sec. 5.2: pairs for DPO.
          {"id", "image": "path" or a list of paths (left out: text only; "images", "video", "videos" likewise),
           "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": ...}]}
          {"id", "video", "prompt", "chosen", "rejected"}                                           a pair for DPO
          A video is a file, or a folder of its frames; its placeholder is <video> or <image>.
Run       imported by train_vision.py
Deviates  A record that cannot be used is skipped, counted and reported, and too many stop the run; the release trains
          on the record after it instead, and says nothing.
          Steps are cut from an endless series, one shuffled epoch behind the other; the release drops the end of an
          epoch. Like the release's, a step's records are of like length, but visual tokens count as well.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from data import video
from data.chat import PLACEHOLDER
from data.text import shuffled

ROLES = {"human": "user", "gpt": "assistant"}
FILM = "<video>"  # a video's placeholder
MARK = re.compile(f"{PLACEHOLDER}|{FILM}")
LONGEST = 64 * 2**20  # characters of a record: no list of conversations has a longer one
BLOCK = 4 * 2**20  # bytes read at once
IN_HAND = 1024  # records that are looked at together
GROUP = 32  # steps whose records are sorted by length together

Turns = list[tuple[str, str]]  # ("user" or "assistant", text)
Shown = list[Image.Image | list[Image.Image]]  # pictures, and films as their frames


# ---------------------------------------------------------------------------------------- a file of records


class Records:
    """The records of a file that can be used, each read from the disk when it is asked for.

    `tokens`, int64 per record: how long its sample will be, about. `numbers`: its place in the file. `bad`: (place in
    the file, id, why) of those that this rank found unusable.
    """

    def __init__(self, path: Path, spans: array, tokens: np.ndarray, bad: list[tuple[int, object, str]]):
        self.numbers = used = np.flatnonzero(tokens)
        self.path, self.bad, self.count = path, bad, len(tokens)
        self.spans, self.tokens = np.array(spans, dtype=np.int64).reshape(-1, 2)[used], tokens[used]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> dict:
        return fetch(self.path, *self.spans[i].tolist())


def open_records(
    path: str | Path,
    measure: Callable[[dict], int] = lambda record: 1,
    max_skip_fraction: float = 0.0,
    mine: tuple[int, int] = (0, 1),
    share: Callable[[np.ndarray], np.ndarray] = lambda tokens: tokens,
) -> Records:
    """Go through a JSON list, or a file with one record per line (JSONL), once; it is never held as a whole.

    `measure(record)`: how many tokens the sample has, at least 1; a ValueError says why it cannot be used. It runs in
    threads, as it opens pictures. Ranks divide that work: `mine` is (rank, ranks), and `share` adds int64[records] up
    over ranks. Raises ValueError that names the file, and the first five of the records that cannot be used if they
    are more than a share of `max_skip_fraction`.
    """
    path, (rank, ranks) = Path(path), mine
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected LLaVA-style JSON or JSONL")
    spans, tokens, bad = array("q"), [], []
    try:
        with ThreadPoolExecutor(16) as pool, open(path, "rb") as file:
            records = scan(file)
            while some := list(islice(records, IN_HAND)):
                ours = [record for i, (*_, record) in enumerate(some, len(tokens)) if i % ranks == rank]
                weights = pool.map(lambda one: weigh(one, measure), ours)
                for start, stop, record in some:
                    weight = next(weights) if len(tokens) % ranks == rank else 0
                    if isinstance(weight, str):
                        bad.append((len(tokens), record.get("id") if isinstance(record, dict) else None, weight))
                    spans.extend((start, stop))
                    tokens.append(0 if isinstance(weight, str) else weight)
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is not a LLaVA file, a JSON list or a record per line ({e})") from e
    if not tokens:
        raise ValueError(f"{path} holds no record; expected a list of conversations")
    tokens = share(np.array(tokens))
    if (lost := int((tokens == 0).sum())) > max_skip_fraction * len(tokens):
        found = [(i, fetch(path, *spans[2 * i : 2 * i + 2])) for i in np.flatnonzero(tokens == 0)[:5].tolist()]
        first = "; ".join(f"record {i} (id {name(r)}) {weigh(r, measure)}" for i, r in found)  # others' as well as ours
        allowed = f", more than --max-skip-fraction {max_skip_fraction:g} allows" if max_skip_fraction else ""
        raise ValueError(f"{path}: {lost:,} of {len(tokens):,} records are bad{allowed}: {first}")
    return Records(path, spans, tokens, bad)


def fetch(path: Path, start: int, stop: int) -> object:
    """One record of a file, by its first byte and the one behind its last."""
    with open(path, "rb") as file:
        file.seek(start)
        return parse(file.read(stop - start))


def weigh(record: object, measure: Callable[[dict], int]) -> int | str:
    """The tokens of a record's sample, or why it cannot be used."""
    try:
        understand(record)
        return measure(record)
    except ValueError as e:
        return str(e)


def scan(file: BinaryIO) -> Iterator[tuple[int, int, object]]:
    """(first byte, byte behind the last, content) of each record; a line that is no JSON stays bytes."""
    while (head := file.read(1)).isspace():
        pass
    if head == b"[":
        yield from listed(file, file.tell())
        return
    stop = file.seek(0)
    for line in file:
        start, stop = stop, stop + len(line)
        if line.strip():
            yield start, stop, parse(line)


def parse(line: bytes) -> object:
    """A line of JSONL; one that is no JSON stays as it is, to be reported with its number."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def listed(file: BinaryIO, byte: int) -> Iterator[tuple[int, int, object]]:
    """The members of a JSON list whose first one begins at or behind `byte`; a few megabytes are held at a time."""
    decode, read, text, at = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode, "", 0
    while True:
        begun = re.compile(r"[ \t\r\n,]*").match(text, at).end()
        byte, at = byte + begun - at, begun
        if text[at : at + 1] == "]":
            return
        try:
            record, end = read(text, at)
        except json.JSONDecodeError:
            more = file.read(BLOCK)  # the record goes on there, or the file is cut
            if not more or len(text) - at > LONGEST:
                raise
            text, at = text[at:] + decode(more), 0
            continue
        size = len(text[at:end].encode())
        yield byte, byte + size, record
        byte, at = byte + size, end


# ----------------------------------------------------------------------------------------------- one record


def name(record: object) -> str:
    """How errors call a record."""
    return repr(record.get("id")) if isinstance(record, dict) else "unknown"


def understand(record: object) -> tuple[list[tuple[str, str]], list[Turns]]:
    """(what is shown, as ("image" or "video", path) in the order of placeholders, dialogues about it) of a record.

    One dialogue, or the preferred and the rejected one of a pair; placeholders are all PLACEHOLDER by now. Raises
    ValueError that says what is wrong with the record, in words that follow its name.
    """
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    if "chosen" in record or "rejected" in record:
        return understand_pair(record)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("has no list of turns 'conversations'")
    if strange := [turn.get("from") for turn in turns if turn.get("from") not in tuple(ROLES)]:
        raise ValueError(f"has a turn from {strange[0]!r}, expected 'human' or 'gpt'")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise ValueError("has a turn whose 'value' is no text")
    if "gpt" not in [turn["from"] for turn in turns[1:]]:
        raise ValueError("has no answer from 'gpt' after a question")
    pictures, films = paths(record, "image"), paths(record, "video")
    marks = [mark for turn in turns if turn["from"] == "human" for mark in MARK.findall(turn["value"])]
    if len(marks) != len(pictures) + len(films) or (FILM in marks and marks.count(FILM) != len(films)):
        placeholders = f"{len(marks)} {PLACEHOLDER}" + (f" or {FILM}" if FILM in marks or films else "")
        raise ValueError(f"has {placeholders} for {len(pictures) + len(films)} picture(s)")
    waiting = {PLACEHOLDER: iter(pictures + ([] if FILM in marks else films)), FILM: iter(films)}
    shown = [next(waiting[mark]) for mark in marks]
    said = [(ROLES[turn["from"]], turn["value"]) for turn in turns]
    return shown, [[(role, MARK.sub(PLACEHOLDER, text) if role == "user" else text) for role, text in said]]


def understand_pair(record: dict) -> tuple[list[tuple[str, str]], list[Turns]]:
    """As `understand`, for {"prompt", "chosen", "rejected"}: what is shown comes before the question (release)."""
    if strange := [key for key in ("prompt", "chosen", "rejected") if not isinstance(record.get(key), str)]:
        raise ValueError(f"has a {strange[0]!r} that is no text")
    if record["chosen"] == record["rejected"]:
        raise ValueError("prefers an answer to itself: 'chosen' and 'rejected' are equal")
    shown = paths(record, "image") + paths(record, "video")
    asked = MARK.sub("", record["prompt"]).strip()
    asked = " ".join([PLACEHOLDER] * len(shown)) + "\n" + asked if shown else asked
    return shown, [[("user", asked), ("assistant", record[key])] for key in ("chosen", "rejected")]


def paths(record: dict, kind: str) -> list[tuple[str, str]]:
    """The pictures, or the videos, of a record: a path or a list of paths under "image" or "images"."""
    found = []
    for key in (kind, kind + "s"):
        value = record.get(key)
        some = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(some, list) or not all(isinstance(x, str) and x and "\0" not in x for x in some):
            raise ValueError(f"has no path, and no list of paths, under {key!r}")
        found += some
    return [(kind, path) for path in found]


def locate(path: str, folder: str | Path | None) -> str:
    """Where a picture or video lies; ValueError if it is outside `folder`, by "..", an absolute path or a link."""
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"shows {path}, but {folder} is no folder; give --images, where paths start")
    root = os.path.realpath(folder)
    file = os.path.realpath(os.path.join(root, path))
    if not Path(file).is_relative_to(root):
        raise ValueError(f"shows {path}: {file} is not inside {folder}; expected a path in it")
    return file


def sizes(record: dict, folder: str | Path | None) -> list[tuple[int, int] | None]:
    """(width, height) of each picture that a record shows, by their headers alone, and None for each video.

    Raises ValueError, as `sample` does, if there is no such file.
    """
    found = []
    for kind, path in understand(record)[0]:
        file = locate(path, folder)
        if kind == "video" and not os.path.exists(file):
            raise ValueError(f"shows {path}: there is no such video")
        try:
            found.append(video.picture_size(file) if kind == "image" else None)
        except ValueError as e:
            raise ValueError(f"shows {path}: {e}") from e
    return found


def sample(record: dict, folder: str | Path | None, frames: int = 10) -> tuple[Shown, list[Turns]]:
    """(what is shown, dialogues) of a record, as `understand`, with pictures read, of a video so many frames.

    folder: where paths start; text-only records need none. Raises ValueError that says what is wrong, in words that
    follow the record's name, if something is missing, unreadable, or outside `folder`.
    """
    shown, (media, dialogues) = [], understand(record)
    for kind, path in media:
        file = locate(path, folder)
        try:
            read = video.read_picture(file) if kind == "image" else film(file, frames)
        except ValueError as e:
            raise ValueError(f"shows {path}: {e}") from e
        shown.append(read)
    return shown, dialogues


def film(file: str, count: int) -> list[Image.Image]:
    """So many frames of a video, evenly spread; a shorter one's come again, as in the release."""
    return [picture for _, picture in video.frames(file, count=count, repeat=True)]


# ------------------------------------------------------------------------------------------- what a step takes


def pick(tokens: np.ndarray, seed: int, step: int, batch: int) -> list[int]:
    """The numbers of a step's `batch` records, of like length; a pure function of its arguments.

    Every record comes once per epoch. Of each GROUP steps, or as many as an epoch has, the records are sorted by
    `tokens`, shortest first, cut into batches, and these shuffled.
    """
    steps = min(GROUP, max(1, len(tokens) // batch))
    return group(tokens.tobytes(), seed, step // steps, steps, batch)[step % steps]


@lru_cache(1)
def group(tokens: bytes, seed: int, number: int, steps: int, batch: int) -> list[list[int]]:
    """The batches of some steps."""
    lengths = np.frombuffer(tokens, dtype=np.int64)
    drawn = sorted(shuffled(len(lengths), seed, number * steps * batch, steps * batch), key=lambda i: lengths[i])
    order = np.random.default_rng([seed, number]).permutation(steps)
    return [drawn[k * batch : (k + 1) * batch] for k in order]
