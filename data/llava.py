"""LLaVA's records (a conversation about pictures, as JSON) as training samples.

What      `read_records` reads and checks a file once, `pick` says which records a step takes, `sample` reads pictures.
Paper     Sec. 3.2 and App. C: LLaVA-1.6's data; LLaVA-1.5's captions for the projector. A record is
          {"id", "image": "path" or a list of paths (left out: text only),
           "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": ...}]}.
Run       imported by train_vision.py
Deviates  A bad record stops the run with a sentence; the release trains on the record after it instead.
          Steps are cut from an endless series, one shuffled epoch behind the other; the release drops the end of an
          epoch, and groups records of like length.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data.chat import PLACEHOLDER
from data.text import shuffled
from data.video import read_picture

ROLES = {"human": "user", "gpt": "assistant"}


def read_records(path: str | Path) -> list[dict]:
    """All records of a JSON list, or of a file with one record per line (JSONL).

    Every record is checked, its pictures not yet opened. Raises ValueError that names the file and its first five
    bad records, counted from 0.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        # Splitting at "\n" alone: str.splitlines would also cut at characters that JSON allows within a string.
        records = json.loads(text) if text.lstrip().startswith("[") else list(map(parse, text.strip().split("\n")))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a LLaVA file, a JSON list or a record per line ({e})") from e
    faults = [(i, reason) for i, record in enumerate(records) if (reason := fault(record))]
    if faults:
        first = "; ".join(f"record {i} (id {name(records[i])}) {reason}" for i, reason in faults[:5])
        raise ValueError(f"{path}: {len(faults):,} of {len(records):,} records are bad: {first}")
    if not records:
        raise ValueError(f"{path} holds no record; expected a list of conversations")
    return records


def parse(line: str) -> object:
    """A line of JSONL; one that is no JSON stays text, for `fault` to report with its number."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def name(record: object) -> str:
    """How errors call a record."""
    return repr(record.get("id")) if isinstance(record, dict) else "unknown"


def fault(record: object) -> str | None:
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return "is no JSON object"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "has no list of turns 'conversations'"
    if strange := [turn.get("from") for turn in turns if turn.get("from") not in tuple(ROLES)]:
        return f"has a turn from {strange[0]!r}, expected 'human' or 'gpt'"
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        return "has a turn whose 'value' is no text"
    if "gpt" not in [turn["from"] for turn in turns[1:]]:
        return "has no answer from 'gpt' after a question"
    images = pictures_of(record)
    if not isinstance(images, list) or not all(isinstance(i, str) and i and "\0" not in i for i in images):
        return "has an 'image' that is no path and no list of paths"
    placeholders = sum(turn["value"].count(PLACEHOLDER) for turn in turns if turn["from"] == "human")
    if placeholders != len(images):
        return f"has {placeholders} {PLACEHOLDER} for {len(images)} picture(s)"
    return None


def pictures_of(record: dict) -> list[str]:
    """The paths of a record's pictures, as they stand in the file."""
    image = record.get("image")
    if image is None:
        return []
    return [image] if isinstance(image, str) else image


def sample(record: dict, folder: str | Path | None) -> tuple[list[Image.Image], list[tuple[str, str]]]:
    """(pictures, turns) of a checked record; a turn is ("user" or "assistant", text), as data/chat.py takes them.

    folder: where picture paths start; text-only records need none. Raises ValueError that names record and file when
    a picture is missing, unreadable, or outside `folder`, be it by "..", an absolute path or a symbolic link.
    """
    pictures = []
    for image in pictures_of(record):
        if folder is None or not Path(folder).is_dir():
            raise ValueError(
                f"record {name(record)} shows {image}, but {folder} is no folder; give --images, where paths start"
            )
        root = os.path.realpath(folder)
        file = os.path.realpath(os.path.join(root, image))
        if not Path(file).is_relative_to(root):
            raise ValueError(
                f"record {name(record)} shows {image}: {file} is not inside {folder}; expected a path in it"
            )
        try:
            pictures.append(read_picture(file))
        except ValueError as e:
            raise ValueError(f"record {name(record)} shows {image}: {e}") from e
    return pictures, [(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]


def pick(records: Sequence[dict], seed: int, step: int, batch: int) -> list[dict]:
    """The `batch` records of a step, a pure function of its arguments: every record once per epoch, each shuffled."""
    return [records[i] for i in shuffled(len(records), seed, step * batch, batch)]
