"""LLaVA's records (a conversation about pictures, as JSON) as training samples, read lazily.

What      `open_records` indexes a file once: where each record begins, and how long its sample will be.
          `batch_indices` says which records a step takes, `read_sample` reads a record's pictures and videos,
          `json_dataset` and `synthetic_dataset` give both as a Dataset, `tokenize_and_trim` makes ids and labels.
Paper     Sec. 3.2 and App. C: LLaVA-1.6's data; LLaVA-1.5's captions for the projector; Sec. 5.2: pairs for DPO.
          {"id", "image": "path" or a list of paths (left out: text only; "images", "video", "videos" likewise),
           "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": ...}]}
          {"id", "video", "prompt", "chosen", "rejected"}                                           a pair for DPO
          A video is a file, or a folder of its frames; its placeholder is <video> or <image>.
Run       imported by train_vision.py
Dimensions  none
Differs   A record that cannot be used is skipped, counted and reported, and too many stop the run; the release trains
          on the record after it instead, and says nothing.
          A placeholder without a picture or video, if only in words, makes a record unusable; the release reads on.
          A sample that is too long loses questions from its end; the release cuts tokens off.
          Steps are cut from an endless series, one shuffled epoch behind the other; the release drops the end of an
          epoch. Like the release's, a step's records are of like length, but visual tokens count as well.
"""

import codecs
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import chat, runs, synthetic, video
from data.chat import PLACEHOLDER
from data.checkpoint import read_sealed, write_sealed
from data.flags import HALF, print0, short, shorten
from data.text import shuffled
from data.tokenizer import Tokenizer

ROLES = {"human": "user", "gpt": "assistant"}
VIDEO_PLACEHOLDER = "<video>"  # a video's placeholder
PLACEHOLDERS = re.compile(f"{PLACEHOLDER}|{VIDEO_PLACEHOLDER}")
NOISE = "QA_GT_caption_based_noisy"  # stands in some of LLaVA's texts; the release removes it, too
MAX_RECORD_CHARACTERS = 64 * 2**20  # characters of a record: no list of conversations has a longer one
MAX_REASON_CHARACTERS = 200  # why a record cannot be used: a name in it may be of any length
BLOCK_BYTES = 4 * 2**20  # bytes read at once
RECORDS_AT_ONCE = 1024  # records that are looked at together
STEPS_PER_GROUP = 32  # steps whose records are sorted by length together

NO_PATH = re.compile(f"\0|{HALF.pattern}")  # what no file's name contains

Turns = list[tuple[str, str]]  # ("user" or "assistant", text)
Media = list[Image.Image | list[Image.Image]]  # pictures, and videos as lists of frames


# ---- a file of records ---------------------------------------------------------------------------


class Records:
    """The usable records of a file, each read from disk when asked for.

    `tokens`, int64 per record: about how long its sample will be. `numbers`: its index in the file. `bad`: (index in
    the file, id, reason) of those that this rank found unusable.
    """

    def __init__(self, path: Path, spans: array, tokens: np.ndarray, bad: list[tuple[int, object, str]]):
        self.numbers = used = np.flatnonzero(tokens)
        self.path, self.bad, self.count = path, bad, len(tokens)
        self.spans, self.tokens = np.array(spans, dtype=np.int64).reshape(-1, 2)[used], tokens[used]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> dict:
        return read_record(self.path, *self.spans[i].tolist())


def open_records(
    path: str | Path,
    measure: Callable[[dict], int] = lambda record: 1,
    max_skip_fraction: float = 0.0,
    rank: int = 0,
    ranks: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Records:
    """Index a JSON list, or a file with one record per line (JSONL), in one pass; memory never holds the whole file.

    `measure(record)`: how many tokens the sample has, at least 1; a ValueError says why it cannot be used. It runs in
    threads, as it opens pictures. Ranks divide that work, and `sum_over_ranks` adds up int64[records] of theirs.
    Raises ValueError that names the file, and the first five unusable records if more than `max_skip_fraction` are.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected LLaVA-style JSON or JSONL")
    spans, tokens, bad = array("q"), [], []
    try:
        with ThreadPoolExecutor(16) as pool, open(path, "rb") as file:
            records = iter_records(file)
            while chunk := list(islice(records, RECORDS_AT_ONCE)):
                ours = [record for i, (*_, record) in enumerate(chunk, len(tokens)) if i % ranks == rank]
                measured = pool.map(lambda record: measure_or_error(record, measure), ours)
                for start, stop, record in chunk:
                    length = next(measured) if len(tokens) % ranks == rank else 0  # 0: another rank measures it
                    if isinstance(length, str):
                        bad.append((len(tokens), record.get("id") if isinstance(record, dict) else None, length))
                    spans.extend((start, stop))
                    tokens.append(0 if isinstance(length, str) else length)
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is not a LLaVA file, a JSON list or a record per line ({e})") from e
    if not tokens:
        raise ValueError(f"{path} holds no record; expected a list of conversations")
    tokens = sum_over_ranks(torch.tensor(tokens)).numpy()
    unusable = int((tokens == 0).sum())
    if unusable > max_skip_fraction * len(tokens) or unusable == len(tokens):
        found = [(i, read_record(path, *spans[2 * i : 2 * i + 2])) for i in np.flatnonzero(tokens == 0)[:5].tolist()]
        named = "; ".join(f"record {i} (id {record_id(r)}) {measure_or_error(r, measure)}" for i, r in found)
        allowed = f", more than --max-skip-fraction {max_skip_fraction:g} allows" if max_skip_fraction else ""
        raise ValueError(shorten(f"{path}: {unusable:,} of {len(tokens):,} records are bad{allowed}: {named}"))
    if unusable:
        print0(f"{unusable:,} of {len(tokens):,} records are bad: the run's unusable-*.jsonl says why")
    return Records(path, spans, tokens, bad)


def read_record(path: Path, start: int, stop: int) -> object:
    """Read the record in bytes `start` to `stop` of a file."""
    with open(path, "rb") as file:
        file.seek(start)
        return parse(file.read(stop - start))


def measure_or_error(record: object, measure: Callable[[dict], int]) -> int | str:
    """Return the tokens of a record's sample, or the reason why it cannot be used."""
    try:
        validate(record)
        return measure(record)
    except (ValueError, OSError) as e:
        return shorten(str(e), MAX_REASON_CHARACTERS)


def iter_records(file: BinaryIO) -> Iterator[tuple[int, int, object]]:
    """Yield (first byte, byte after the last, content) of each record; a line that is not JSON stays bytes."""
    if file.read(3) != codecs.BOM_UTF8:
        file.seek(0)
    while (head := file.read(1)).isspace():
        pass
    if head == b"[":
        yield from iter_json_list(file, file.tell())
        return
    file.seek(0)  # json.loads passes over a BOM itself
    for start, line in runs.json_lines(file):
        yield start, start + len(line), parse(line)


def parse(line: bytes) -> object:
    """Parse a line of JSONL; one that is not JSON is returned as it is, to be reported with its index."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def iter_json_list(file: BinaryIO, byte: int) -> Iterator[tuple[int, int, object]]:
    """Yield the members of a JSON list that begins before `byte`, with a few megabytes in memory at a time."""
    decode, read, text, at = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode, "", 0
    while True:
        begun = re.compile(r"[ \t\r\n,]*").match(text, at).end()
        byte, at = byte + begun - at, begun
        if text[at : at + 1] == "]":
            return
        try:
            record, end = read(text, at)
        except json.JSONDecodeError:
            more = file.read(BLOCK_BYTES)  # the record goes on there, or the file is cut
            if not more or len(text) - at > MAX_RECORD_CHARACTERS:
                raise
            text, at = text[at:] + decode(more), 0
            continue
        size = len(text[at:end].encode())
        yield byte, byte + size, record
        byte, at = byte + size, end


# ---- one record ----------------------------------------------------------------------------------


def record_id(record: object) -> str:
    """Return a record's id for error messages."""
    return short(record.get("id")) if isinstance(record, dict) else "unknown"


def validate(record: object) -> tuple[list[tuple[str, str]], list[Turns]]:
    """Return a record's media, as ("image" or "video", path) in the order of placeholders, and its dialogues.

    One dialogue, or the chosen and the rejected one of a pair; every placeholder becomes PLACEHOLDER. Raises
    ValueError that says what is wrong with the record, in words that follow its id.
    """
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    if record.get("chosen") is not None or record.get("rejected") is not None:  # tables fill up with null
        return validate_pair(record)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("has no list of turns 'conversations'")
    if unknown := [turn.get("from") for turn in turns if turn.get("from") not in tuple(ROLES)]:
        raise ValueError(f"has a turn from {short(unknown[0])}, expected 'human' or 'gpt'")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise ValueError("has a turn whose 'value' is no text")
    if "gpt" not in [turn["from"] for turn in turns[1:]]:
        raise ValueError("has no answer from 'gpt' after a question")
    if any(HALF.search(turn["value"]) for turn in turns):
        raise ValueError("has a turn with half of a surrogate pair, which is no text")
    pictures, films = paths(record, "image"), paths(record, "video")
    marks = [mark for turn in turns if turn["from"] == "human" for mark in PLACEHOLDERS.findall(turn["value"])]
    video_marks = marks.count(VIDEO_PLACEHOLDER)
    if len(marks) != len(pictures) + len(films) or video_marks not in (0, len(films)):
        placeholders = f"{len(marks)} {PLACEHOLDER}" + (f" or {VIDEO_PLACEHOLDER}" if video_marks or films else "")
        raise ValueError(f"has {placeholders} for {len(pictures) + len(films)} picture(s)")
    waiting = {PLACEHOLDER: iter(pictures + ([] if video_marks else films)), VIDEO_PLACEHOLDER: iter(films)}
    media = [next(waiting[mark]) for mark in marks]
    texts = [(ROLES[turn["from"]], turn["value"].replace(NOISE, "")) for turn in turns]
    return media, [[(role, PLACEHOLDERS.sub(PLACEHOLDER, text) if role == "user" else text) for role, text in texts]]


def validate_pair(record: dict) -> tuple[list[tuple[str, str]], list[Turns]]:
    """Do as `validate` for {"prompt", "chosen", "rejected"}: media come before the question (release)."""
    if unknown := [key for key in ("prompt", "chosen", "rejected") if not isinstance(record.get(key), str)]:
        raise ValueError(f"has a {unknown[0]!r} that is no text")
    if any(HALF.search(record[key]) for key in ("prompt", "chosen", "rejected")):
        raise ValueError("has half of a surrogate pair in 'prompt', 'chosen' or 'rejected', which is no text")
    if record["chosen"] == record["rejected"]:
        raise ValueError("prefers an answer to itself: 'chosen' and 'rejected' are equal")
    media = paths(record, "image") + paths(record, "video")
    question = PLACEHOLDERS.sub("", record["prompt"]).strip()
    question = " ".join([PLACEHOLDER] * len(media)) + "\n" + question if media else question
    return media, [[("user", question), ("assistant", record[key])] for key in ("chosen", "rejected")]


def paths(record: dict, kind: str) -> list[tuple[str, str]]:
    """Return the pictures, or the videos, of a record: a path or a list of paths under "image" or "images"."""
    found = []
    for key in (kind, kind + "s"):
        value = record.get(key)
        some = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(some, list) or not all(isinstance(x, str) and x and not NO_PATH.search(x) for x in some):
            raise ValueError(f"has no path, and no list of paths, under {key!r}")
        found += some
    return [(kind, path) for path in found]


def locate(path: str, folder: str | Path | None) -> str:
    """Return the file of a path; ValueError if it is outside `folder`, by "..", an absolute path or a link."""
    if folder is None or not Path(folder).is_dir():
        given = f"{folder} is no folder" if folder else "no folder is given"
        raise ValueError(f"shows {shorten(path, 60)}, but {given}: name as --images the one where paths start")
    root = os.path.realpath(folder)
    file = os.path.realpath(os.path.join(root, path))
    if not Path(file).is_relative_to(root):
        raise ValueError(f"shows {shorten(path, 60)}: it is not inside {folder}; expected a path in it")
    return file


def sizes(record: dict, folder: str | Path | None) -> list[tuple[int, int] | None]:
    """Return (width, height) of each picture of a record, from its header alone, and None for each video.

    Raises ValueError, as `read_sample` does, if there is no such file.
    """
    found = []
    for kind, path in validate(record)[0]:
        file = locate(path, folder)
        if kind == "video" and not os.path.exists(file):
            raise ValueError(f"shows {shorten(path, 60)}: there is no such video")
        try:
            found.append(video.picture_size(file) if kind == "image" else None)
        except ValueError as e:
            raise ValueError(shorten(f"shows {path}: {e}", MAX_REASON_CHARACTERS)) from e
    return found


WORDS_PER_TOKEN = 0.75  # of English; lengths decide only which samples share a step


def measure(
    stage: str, folder: Path | None, picture_tokens: Callable[[int, int], int], video_tokens: int, record: dict
) -> int:
    """Return about how many tokens a record's sample has; ValueError if the stage (align, sft, dpo) cannot use it.

    picture_tokens: of a picture of (width, height) pixels.
    """
    _, dialogues = validate(record)
    if (len(dialogues) == 2) != (stage == "dpo"):
        kind = "a pair of answers; use --stage dpo" if len(dialogues) == 2 else "no 'chosen' and 'rejected' answer"
        raise ValueError(f"has {kind}")
    if stage == "align" and [role for role, _ in dialogues[0]] != ["user", "assistant"]:
        raise ValueError(f"has {len(dialogues[0])} turns, but --stage align takes a question and a caption")
    words = max(sum(len(text.split()) for _, text in turns) for turns in dialogues)
    visual = [picture_tokens(*size) if size else video_tokens for size in sizes(record, folder)]
    return 1 + round(words / WORDS_PER_TOKEN) + sum(visual)


def read_sample(record: dict, folder: str | Path | None, frames: int = 10) -> tuple[Media, list[Turns]]:
    """Return (media, dialogues) of a record: as `validate`, with pictures read, and `frames` frames of each video.

    folder: where paths start; text-only records need none. Raises ValueError that says what is wrong, in words that
    follow the record's id, if something is missing, unreadable, or outside `folder`.
    """
    media, (paths_of_media, dialogues) = [], validate(record)
    for kind, path in paths_of_media:
        file = locate(path, folder)
        try:
            medium = video.read_picture(file) if kind == "image" else read_video(file, frames)
        except ValueError as e:
            raise ValueError(shorten(f"shows {path}: {e}", MAX_REASON_CHARACTERS)) from e
        media.append(medium)
    return media, dialogues


def read_video(file: str, count: int) -> list[Image.Image]:
    """Read `count` frames of a video, evenly spread, fewer where some are damaged; a shorter video repeats frames."""
    return [picture for _, picture in video.frames(file, count=count, shorter="repeat")]


# ---- which records a step takes ------------------------------------------------------------------


def batch_indices(tokens: np.ndarray, seed: int, step: int, batch: int) -> list[int]:
    """Return the indices of a step's `batch` records, of like length; a pure function of its arguments.

    Every record comes once per epoch. The records of STEPS_PER_GROUP steps, or of as many as an epoch has, are sorted
    by `tokens`, shortest first, cut into batches, and these are shuffled.
    """
    steps = min(STEPS_PER_GROUP, max(1, len(tokens) // batch))
    return length_groups(tokens.tobytes(), seed, step // steps, steps, batch)[step % steps]


@lru_cache(1)
def length_groups(tokens: bytes, seed: int, number: int, steps: int, batch: int) -> list[list[int]]:
    """Return the batches of the `number`-th group of steps."""
    lengths = np.frombuffer(tokens, dtype=np.int64)
    drawn = sorted(shuffled(len(lengths), seed, number * steps * batch, steps * batch), key=lambda i: lengths[i])
    order = np.random.default_rng([seed, number]).permutation(steps)
    return [drawn[k * batch : (k + 1) * batch] for k in order]


# ---- data sets -----------------------------------------------------------------------------------


SYNTHETIC_PAIRS = 512  # of synthetic answers for DPO; captions and conversations have no end
HELD_OUT = 128  # synthetic samples, of another seed, on which a stage of the miniature is scored


@dataclass(frozen=True)
class Dataset:
    """Samples by index. `size` is None for an endless stream."""

    size: int | None
    batch_indices: Callable[[int], list[int]]  # step -> the indices of its samples, over all ranks
    get: Callable[[int], tuple[Media, list[Turns]]]  # index -> (media, dialogues); ValueError if it cannot be used
    describe: Callable[[int], dict] = lambda i: {"sample": i}  # index -> how reports name the sample
    usable: dict = field(default_factory=dict)  # of a file: how many of its records can be used, and a checksum of them
    rejected: list[dict] = field(default_factory=list)  # records that this rank found unusable at the start
    unreadable: set[int] = field(default_factory=set)  # samples that failed once and must not be used later


def json_dataset(records: Records, folder: Path | None, frames: int, seed: int, batch: int) -> Dataset:
    """Return the records of a file as samples; `frames` of each video."""
    return Dataset(
        len(records),
        lambda step: batch_indices(records.tokens, seed, step, batch),
        lambda i: read_sample(records[i], folder, frames),
        lambda i: {"record": records.numbers[i].item(), "id": records[i].get("id")},
        {"usable_records": f"{len(records)} of {records.count}, {hashlib.sha256(records.tokens).hexdigest()[:16]}"},
        [{"record": i, "id": name, "why": why} for i, name, why in records.bad],
    )


def synthetic_dataset(stage: str, seed: int, batch: int, frames: int, max_grids: int, growth_steps: float) -> Dataset:
    """Return samples drawn from the seed: captions (align), conversations (sft), or pairs of answers (dpo).

    growth_steps: over so many steps the conversations' pictures grow to `max_grids`; 0: at once. In the first quarter
    they stay at 8 grids, until the model looks for what is asked: with 3, often of one thing, it learned that late.
    """

    def endless(step: int) -> list[int]:
        return [*range(step * batch, (step + 1) * batch)]

    def conversation(i: int) -> tuple[Media, list[Turns]]:
        progress = i // batch / growth_steps if growth_steps else 1.0
        progress = min(1.0, max(0.0, progress - 0.25) / 0.75)
        least = min(8, max_grids)
        grids = round(least * (max_grids / least) ** progress)
        pictures, turns = synthetic.conversation(seed, i, grids)
        return pictures, [turns]

    def caption(i: int) -> tuple[Media, list[Turns]]:
        pictures, turns = synthetic.captioned(seed, i)
        return pictures, [turns]

    if stage == "dpo":
        pairs = SYNTHETIC_PAIRS
        return Dataset(
            pairs,
            lambda step: shuffled(pairs, seed, step * batch, batch),
            lambda i: synthetic.preference(seed, i, frames),
        )
    return Dataset(None, endless, caption if stage == "align" else conversation)


class Example(NamedTuple):
    """One sample as tokens: its pictures as (pixels_NCYX, layout); (ids, labels) of each dialogue."""

    sample_id: int
    images: list[tuple]
    texts: list[tuple[list[int], list[int]]]


def tokenize_and_trim(
    tokenizer: Tokenizer, turns: Turns, image_tokens: list[int], template: str, clean: bool, max_len: int
) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a dialogue of at most `max_len` tokens, dropping questions from its end if need be.

    A picture or a turn is never cut. template, clean: as in `chat.example`. Raises ValueError if what cannot be
    dropped is too long.
    """
    while len((example := chat.example(tokenizer, turns, image_tokens, template, clean))[0]) > max_len:
        last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=0)
        if PLACEHOLDER in turns[last][1] or "assistant" not in [role for role, _ in turns[1:last]]:
            raise ValueError(
                f"with {sum(image_tokens)} visual tokens does not fit --max-len {max_len}; raise it or lower --grids"
            )
        turns = turns[:last]
    return example


def join_examples(examples: list[Example], pad_id: int, multiple: int) -> tuple[Tensor, Tensor, list[tuple], list[int]]:
    """Return (ids_BS, targets_BS, all pictures, for each placeholder the index of its picture); S as in `chat.pad`.

    Both answers of a pair share its pictures. Without an example there is one row, of no target.
    """
    texts = [text for example in examples for text in example.texts] or [([pad_id], [chat.IGNORE])]
    ids_BS, targets_BS = chat.pad(texts, pad_id, multiple)
    pictures, shown = [], []
    for example in examples:
        first = len(pictures)
        pictures += example.images
        shown += [*range(first, len(pictures))] * len(example.texts)
    return ids_BS, targets_BS, pictures, shown


def load_examples(
    dataset: Dataset, indices: list[int], prepare: Callable[[int, Media, list[Turns]], Example]
) -> list[Example | dict]:
    """Read and prepare some samples; in place of one that cannot be used stands a dict that says why."""
    found: list[Example | dict] = []
    for i in indices:
        try:
            if i in dataset.unreadable:
                raise ValueError("could not be read when the reference was computed, so it has nothing to compare with")
            found.append(prepare(i, *dataset.get(i)))
        except (ValueError, OSError) as e:
            found.append({**dataset.describe(i), "why": str(e)})
    return found


@dataclass(frozen=True)
class Loader:
    """Reads samples and makes micro-batches of them, for one rank of a ring."""

    dataset: Dataset
    prepare: Callable[[int, Media, list[Turns]], Example]  # see `load_examples`
    collate: Callable[[list[Example]], object]  # some examples -> a micro-batch
    micro_batch_size: int | None  # None: all samples at once
    sum_over_ring: Callable[[Tensor], Tensor]  # element by element, over the ranks of the ring
    ring_index: int = 0  # of this rank's ring, which takes every `num_rings`-th sample
    num_rings: int = 1

    def load(self, indices: list[int]) -> list[Example | dict]:
        """Read this ring's share of some samples; a dict in place of one that cannot be used says why."""
        return load_examples(self.dataset, indices[self.ring_index :: self.num_rings], self.prepare)

    def make_micro_batches(self, loaded: list[Example | dict]) -> tuple[list, list[dict]]:
        """Return (micro-batches, what this rank skipped). A ring leaves out what one of its ranks cannot read."""
        missing = self.sum_over_ring(torch.tensor([isinstance(one, dict) for one in loaded], dtype=torch.int64))
        kept = [one for one, count in zip(loaded, missing) if not count]
        size = self.micro_batch_size or len(loaded)
        starts = range(0, len(loaded), size)  # as many on every ring, even if some are empty: collectives must match
        skipped = {json.dumps(one): one for one in loaded if isinstance(one, dict)}  # a sample may come twice
        return [self.collate(kept[i : i + size]) for i in starts], [*skipped.values()]

    def micro_batches(self, indices: list[int]) -> tuple[list, list[dict]]:
        """Return (this ring's micro-batches of some samples, what was skipped)."""
        return self.make_micro_batches(self.load(indices))

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[list, list[dict]]]:
        """Yield the same for the samples of each step, which are read one step ahead, in a thread."""
        for loaded in video.prefetch(map(self.load, map(self.dataset.batch_indices, steps)), 1):
            yield self.make_micro_batches(loaded)


# ---- files beside the log ------------------------------------------------------------------------

SKIPPED, UNUSABLE = "skipped-{}.jsonl", "unusable-{}.jsonl"  # of each rank: samples of a step, records of the file
REFERENCE = "reference.safetensors"


class SkipLog:
    """Counts the samples that a run skips, over all ranks, and names those of this rank in the run's folder.

    first: the step at which the run begins, or continues: then its log says what was skipped before. Every rank
    makes one, and calls `add` at each step.
    """

    def __init__(
        self, folder: Path, rank: int, first: int, dataset: Dataset, batch: int, max_skip_fraction: float,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self.folder, self.name, self.size, self.batch = folder, SKIPPED.format(rank), dataset.size or 0, batch
        self.max_skip_fraction, self.sum_over_ranks = max_skip_fraction, sum_over_ranks
        runs.truncate_log(folder, first, self.name)
        if dataset.rejected:
            unusable = "".join(json.dumps(one) + "\n" for one in dataset.rejected)
            runs.replace_text(folder / UNUSABLE.format(rank), unusable)
        logged = sum(runs.column(folder, "skipped")) if rank == 0 else 0
        self.skipped = sum_over_ranks(torch.tensor(logged)).item()

    def add(self, step: int, unreadable: list[dict], used: int) -> int:
        """Log what this rank could not use, and return how many samples of a step all of them skipped.

        used: this rank's share of the samples that were used. Raises ValueError when more were skipped in all than
        --max-skip-fraction allows.
        """
        runs.log(self.folder, *({"step": step, **one} for one in unreadable), name=self.name)
        skipped = self.batch - self.sum_over_ranks(torch.tensor(used)).item()
        self.skipped += skipped
        read = max((step + 1) * self.batch, self.size)
        if self.skipped > self.max_skip_fraction * read:
            raise ValueError(
                f"{self.skipped:,} samples of {read:,} could not be used, more than --max-skip-fraction "
                f"{self.max_skip_fraction:g} allows; {self.folder / SKIPPED.format('*')} says which and why: mend "
                "them, or allow more"
            )
        return skipped


def read_reference(folder: Path, first: int, pairs: int) -> Tensor | None:
    """Return DPO's reference, log p of each pair's answers before training, float64[pairs, 2]; None in a new run.

    Raises ValueError if a run that continues at step `first` > 0 has lost it, or if it is damaged.
    """
    file = folder / REFERENCE
    if file.exists():
        return read_sealed(file, "logp", (pairs, 2))
    if first:
        raise ValueError(f"{file} is gone, and a trained model cannot make it again; remove {folder}")
    return None


def write_reference(folder: Path, logp_P2: Tensor) -> None:
    """Keep DPO's reference for a run that continues."""
    write_sealed(folder / REFERENCE, "logp", logp_P2.cpu())
