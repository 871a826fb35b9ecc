"""Long text as packed files of token ids: made from documents, and the windows of them that training reads.

What      `pack` turns documents into token files, long ones upsampled within each source, the mixture of sources as
          it was; `open_tokens` and `windows` are what train_text.py reads them with.
Paper     Sec. 3.1: SlimPajama upsampled by length as in Fu et al. (2024), documents put one behind the other with
          a BOS in front of each, and cut into sequences.
Run       python -m data.text --tokenizer data/tiny/tokenizer --out TOKENS.npy DOCUMENTS.jsonl.zst
          python -m data.text --tokenizer Qwen2-7B-Instruct --out TOKENS --worker 0 --workers 64 SlimPajama-627B/train
Key       B rows   S tokens per sequence
Deviates  Sequences are cut from one endless stream; the release cuts rows of 256K and drops the last 38K of each.
          Qwen2 has no BOS: <|endoftext|> separates documents.
          Sources keep the shares that they have in the given files; Fu et al. fix a table of shares and a budget.
          Short documents are thinned evenly (every tenth of a kind), not by a coin, so that shares hold in small files.

Kill it at any moment and run the same command again: it goes on, and ends with the same bytes.
"""

import fcntl
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.documents import check, documents, find_files
from data.flags import run, setting
from data.tokenizer import Tokenizer, load_tokenizer, read_json
from data.weights import publish

DTYPES = ("uint16", "uint32", "int32")  # of a token file
BAD_SHARE, BAD_EARLY = 0.001, 1000  # of documents that may be bad; and how many before the end is waited for
CHARACTERS = 3.68  # per token, to guess a document's length before it is tokenised (Fu et al.)
SURVEY_FILES, SURVEY_DOCUMENTS = 64, 2**20  # read beforehand at most, to learn how long each source's documents are
SAVE_EVERY = 2000  # documents between two notes of how far it has come
COLUMNS = ("documents", "estimate", "kept", "kept_estimate", "tokens")  # of the table of what was read and written


@dataclass(frozen=True)
class Config:
    """Pack documents into files of token ids, long ones upsampled within each source (Sec. 3.1)."""

    files: tuple[Path, ...] = setting(
        MISSING, "documents: .txt .jsonl(.gz, .zst) .parquet, or folders of them (ours)", positional=True
    )
    tokenizer: Path = setting(MISSING, "folder of the model whose tokenizer to use (Sec. 3.1: Qwen2-7B-Instruct)")
    out: Path = setting(MISSING, "token file to write, .npy, or else a folder for one file per worker (ours)")
    worker: int = setting(0, "which of the workers this process is, from 0 (ours)")
    workers: int = setting(1, "processes, on any number of machines, that share the documents (ours)")
    long: int = setting(4096, "tokens from which a document is long, a power of two (release: upsample_4096)")
    keep_short: float = setting(
        0.1, "share of the shorter documents to keep; 1: no upsampling (release: upsample_4096)"
    )
    seed: int = setting(42, "of which short documents are kept (release: upsample_4096)")

    def __post_init__(self):
        """Refuse what no run could mean."""
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"--worker is {self.worker}, expected 0 to {self.workers - 1}, below --workers")
        if self.workers > 1 and self.out.suffix == ".npy":
            raise ValueError(f"--out is {self.out}, but {self.workers} workers write a file each; give a folder")
        if not 0 < self.keep_short <= 1:
            raise ValueError(f"--keep-short is {self.keep_short}, expected a share above 0, at most 1")
        if self.long < 1 or self.long & (self.long - 1):
            raise ValueError(f"--long is {self.long}, expected a power of two such as 4096")

    @property
    def part(self) -> Path:
        """The token file that this worker writes."""
        return self.out if self.out.suffix == ".npy" else part_file(self.out, self.worker, self.workers)


# ---- reading token files ----


class Parts:
    """The token files of a folder, one behind the other, sliced as if they were one."""

    def __init__(self, folder: Path, parts: Sequence[np.memmap]):
        self.filename, self.parts = folder, parts
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        first, last, _ = where.indices(len(self))
        return np.concatenate(
            [part[max(0, first - start) : max(0, last - start)] for part, start in zip(self.parts, self.starts)]
        )


def open_tokens(path: str | Path, words: Tokenizer | None = None) -> np.memmap | Parts:
    """The ids of a token file, or of a folder of them, read from disk as they are used.

    words: the tokenizer of the model to train; tokens that were packed with another are refused. (Nothing is known
    of a token file without the summary that `pack` writes beside it.) Raises ValueError, naming the file, when it is
    missing, cut, empty, or of another kind or shape, and when a folder lacks parts or mixes those of several corpora.
    """
    path = Path(path)
    tokens = Parts(path, [open_part(part, words) for part in find_parts(path)]) if path.is_dir() else None
    tokens = open_part(path, words) if tokens is None else tokens
    if not len(tokens):
        raise ValueError(f"{path} holds no tokens; make it with python -m data.text from more text")
    return tokens


def open_part(path: Path, words: Tokenizer | None) -> np.memmap:
    """The ids of one token file, one dimension of uint16, uint32 or int32, held against its summary."""
    if not path.exists():
        raise ValueError(f"{path} is no file or folder of tokens; make it with python -m data.text")
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is not a token file ({e}); make one with python -m data.text") from e
    if tokens.ndim != 1 or tokens.dtype not in DTYPES:
        raise ValueError(
            f"{path} holds {tokens.dtype}{list(tokens.shape)}, expected one dimension of {', '.join(DTYPES)}; "
            "make it with python -m data.text"
        )
    summary = read_json(summary_file(path))
    if summary and summary.get("tokens") != len(tokens):
        raise ValueError(
            f"{path} holds {len(tokens):,} tokens, but {summary_file(path).name} speaks of {summary.get('tokens')}; "
            "pack it again, or remove the summary if it is of another file"
        )
    if words and summary and summary["job"]["tokenizer"] != vocabulary_digest(words):
        raise ValueError(
            f"{path} was packed with another tokenizer, of {summary['job']['vocabulary']:,} ids, than the model's, "
            f"of {words.size:,}; pack it again with --tokenizer and that model's folder"
        )
    return tokens


def find_parts(folder: Path) -> list[Path]:
    """The token files of a folder in the order of their workers; all must be there, packed as one corpus."""
    found = sorted(folder.glob("part-*-of-*.npy"))
    if not found:
        raise ValueError(f"{folder} holds no token files, part-*-of-*.npy; make them with python -m data.text")
    workers = int(found[0].stem.split("-")[-1])
    parts = [part_file(folder, worker, workers) for worker in range(workers)]
    missing = [worker for worker, part in enumerate(parts) if part not in found]
    if missing or len(found) > workers:
        raise ValueError(
            f"{folder} holds {len(found)} files of a corpus in {workers} parts, missing {missing[:5]}; run those "
            "workers of python -m data.text, or pack into an empty folder"
        )
    jobs = [{**read_json(summary_file(part)).get("job", {}), "worker": None} for part in parts]
    if odd := next((job for job in jobs if job != jobs[0]), None):
        names = ", ".join(name for name in jobs[0] if odd.get(name) != jobs[0][name])
        raise ValueError(f"{folder} mixes parts that were packed with different {names}; pack into an empty folder")
    return parts


def part_file(folder: Path, worker: int, workers: int) -> Path:
    """What a worker writes."""
    return folder / f"part-{worker:05}-of-{workers:05}.npy"


def summary_file(part: Path) -> Path:
    """Where it is told what a token file holds."""
    return part.with_suffix(".summary.json")


def vocabulary_digest(words: Tokenizer) -> str:
    """Which tokenizer this is: the SHA-256 of every id and its bytes."""
    return hashlib.sha256(repr(sorted(words.pieces.items())).encode()).hexdigest()


def largest(tokens: np.memmap | Parts, block: int = 2**24) -> int:
    """The largest id of a whole file, to hold against a vocabulary; a negative id counts as one above 2^31."""
    blocks = (tokens[i : i + block] for i in range(0, len(tokens), block))
    return max(int(ids.view(f"uint{8 * ids.itemsize}").max()) for ids in blocks)


def windows(tokens: np.memmap | Parts, seq_len: int, rows: int, seed: int, part: int) -> tuple[Tensor, Tensor]:
    """(ids_BS, targets_BS), int64, of `rows` sequences: number `part` of an endless series (Sec. 3.1).

    A pure function of its arguments, so that a resumed run needs no more than its step. Sequences start
    seq_len ids apart and are read with the id that follows: each id of the file but the first is the target
    of one place in one sequence, and all targets are trained. Every sequence comes once, in an order drawn
    from the seed, before any comes again. Raises ValueError when the file is shorter than one sequence.
    """
    count = (len(tokens) - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"{tokens.filename} holds {len(tokens):,} tokens, expected at least {seq_len + 1:,} for one sequence; "
            "pack more text or lower --seq-len"
        )
    starts = [seq_len * i for i in shuffled(count, seed, part * rows, rows)]
    read = torch.from_numpy(np.stack([tokens[i : i + seq_len + 1] for i in starts]).astype(np.int64))
    return read[:, :-1].clone(), read[:, 1:].clone()


def document_starts(ids_BS: Tensor, separator: int) -> list[list[int]]:
    """Where documents begin in each packed row; the first at 0, which may be the middle of one."""
    return [sorted({0, *(ids_S == separator).nonzero()[:, 0].tolist()}) for ids_S in ids_BS]


def shuffled(count: int, seed: int, first: int, number: int) -> list[int]:
    """Entries first ... first + number - 1 of an endless series: epoch after epoch of 0 ... count - 1, shuffled."""
    places = (divmod(n, count) for n in range(first, first + number))
    return [int(permutation(count, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)  # a batch lies in one epoch or two
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


# ---- upsampling: which documents are kept ----


def table_row(table: dict, content: str | np.ndarray, source: str) -> tuple[dict, int, int]:
    """(counts of the documents like this one, estimate of its tokens, separator and all, that rounded down to 2^n)."""
    tokens = 1 + (round(len(content) / CHARACTERS) if isinstance(content, str) else len(content))
    at_least = 1 << (tokens.bit_length() - 1)
    kinds = table.setdefault(source, {})
    return kinds.setdefault(str(at_least), dict.fromkeys(COLUMNS, 0)), tokens, at_least


def add(row: dict[str, int], counts: dict[str, int]) -> None:
    """Count on."""
    for name, n in counts.items():
        row[name] = row.get(name, 0) + n


def total(rows: Iterable[dict]) -> dict[str, int]:
    """Rows of the table added up."""
    whole = dict.fromkeys(COLUMNS, 0)
    for row in rows:
        add(whole, row)
    return whole


def survey(files: Sequence[Path], words: Tokenizer) -> dict:
    """table[source][length]: how long each source's documents are, from files spread evenly over the list.

    Nothing is tokenised, so this takes a fraction of the time of packing. All workers find the same.
    """
    chosen, table = files[:: -(-len(files) // SURVEY_FILES)], {}
    for path in chosen:
        for document in islice(documents(path), SURVEY_DOCUMENTS // len(chosen)):
            try:
                content, source = check(document, words.size)
            except ValueError:  # it is counted when it is packed
                continue
            row, tokens, _ = table_row(table, content, source)
            add(row, {"documents": 1, "estimate": tokens})
    return table


def upsampling(table: dict, long: int, keep_short: float) -> dict[str, tuple[float, float]]:
    """{source: (share of its short documents to keep, share of its long ones)} that leave the mixture as it was.

    Fu et al. keep a tenth of the short documents and stop each source at its share of the tokens. The same without
    stopping: a source made of long documents would grow against the others, so it is thinned as a whole until all
    are left with the same part of their tokens, that of the source with the fewest long ones. A source that the
    survey did not meet, "", is left with that part too, short and long alike.
    """
    left = {}
    for source, kinds in table.items():
        kept = sum(row["estimate"] * (keep_short if int(length) < long else 1) for length, row in kinds.items())
        left[source] = kept / total(kinds.values())["estimate"]
    least = min(left.values(), default=1.0)
    return {"": (least, least), **{source: (keep_short * least / part, least / part) for source, part in left.items()}}


@lru_cache(maxsize=2**16)
def phase(*kind: object) -> float:
    """A number in [0, 1) drawn for a kind of documents."""
    return random.Random(" ".join(map(str, kind))).random()


def is_kept(row: dict, rate: float, start: float, owed: float) -> bool:
    """Whether the next of the documents that `row` counts is kept: a `rate` of them, spread evenly.

    start: of the spread, from 0 to 1. owed: what the source has too few tokens, in lengths of this document; it
    brings its turn forward, or puts it off, by half a document at most, so that chance favours no source for long.
    """
    turn = (row["documents"] + 1) * rate + start + max(-0.5, min(0.5, owed))
    return rate >= 1 or turn - row["kept"] >= 1


# ---- packing ----


@dataclass
class Progress:
    """How far a part has come: all that a killed process needs to go on, noted in a journal beside its draft."""

    job: dict  # see `describe`; what must be the same to go on
    rates: dict[str, tuple[float, float]]  # see `upsampling`
    file: int = 0  # of this worker's; those before it are done
    document: int = 0  # of that file; those before it are done
    tokens: int = 0
    table: dict = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)  # tokens of each source that chance kept back so far
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: list[str] = field(default_factory=list)

    def complaint(self) -> str | None:
        """A sentence, when so many documents are bad that something else is wrong than a few documents."""
        bad = sum(self.bad.values())
        seen = bad + total(row for kinds in self.table.values() for row in kinds.values())["documents"]
        if not seen and self.job["workers"] == 1:
            return "the files hold no document, nothing is written"
        if bad > BAD_SHARE * seen:
            return (
                f"{bad:,} of {seen:,} documents are bad, at most {BAD_SHARE:.1%} may be; nothing is written; "
                f"the first: {self.first_bad[0]}"
            )
        return None


def encode(content: str | np.ndarray, words: Tokenizer) -> np.ndarray:
    """The ids of a document, the separator in front."""
    ids = np.array(words.encode(content)) if isinstance(content, str) else content
    return ids if ids[0] == words.bos_id else np.append(words.bos_id, ids)


def describe(cfg: Config, files: Sequence[Path], words: Tokenizer) -> dict:
    """What a part is made of. Folders are left out: machines may see the same files under different ones."""
    names = hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest()
    made = {"files": len(files), "names": names, "tokenizer": vocabulary_digest(words), "vocabulary": words.size}
    return made | {name: getattr(cfg, name) for name in ("long", "keep_short", "seed", "worker", "workers")}


def write_json(file: Path, content: dict) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = file.with_name(f".{file.name.lstrip('.')}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    publish(draft, file)


def sweep(part: Path) -> None:
    """Remove what lies hidden beside a part: draft, journal, and files that a kill kept from getting their names."""
    for name in (part.name, summary_file(part).name):
        for hidden in part.parent.glob(f".{name}.*"):
            hidden.unlink()


def write_header(file: BinaryIO, dtype: str, count: int) -> int:
    """The head of an .npy, its length returned; numpy pads it: it is as long for one token as for a trillion."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})
    return file.tell()


def resume(journal: Path, job: dict, written: int) -> Progress | None:
    """What a killed process of the same job noted; None when there is no such note, or the draft has fewer tokens."""
    noted = read_json(journal)
    return Progress(**noted) if noted.get("job") == job and noted["tokens"] <= written else None


def fill(file: BinaryIO, dtype: str, cfg: Config, files: Sequence[Path], words: Tokenizer, at: Progress) -> Iterator:
    """Append this worker's documents to `file` and keep `at` up to date; yields after each document.

    Workers share out the files, or the documents of each file when there are fewer files than workers.
    """
    by_file = len(files) >= cfg.workers
    mine = files[cfg.worker :: cfg.workers] if by_file else files
    first, step = (0, 1) if by_file else (cfg.worker, cfg.workers)
    while at.file < len(mine):
        for document in islice(documents(mine[at.file]), at.document, None):
            at.document += 1
            if (at.document - 1) % step != first:
                continue
            try:
                content, source = check(document, words.size)
            except ValueError as e:
                kind = str(e).split(":")[0]
                at.bad[kind] = at.bad.get(kind, 0) + 1
                at.first_bad = [*at.first_bad, f"{mine[at.file]}, document {at.document}: {e}"][:5]
                yield
                continue
            row, estimate, length = table_row(at.table, content, source)
            rate = at.rates.get(source, at.rates[""])[length >= cfg.long]
            owed = at.owed.get(source, 0.0)
            at.owed[source] = owed + rate * estimate
            if is_kept(row, rate, phase(cfg.seed, cfg.worker, source, length), owed / estimate):
                at.owed[source] -= estimate
                ids = encode(content, words)
                file.write(ids.astype(dtype).tobytes())
                at.tokens += len(ids)
                add(row, {"kept": 1, "kept_estimate": estimate, "tokens": len(ids)})
            add(row, {"documents": 1, "estimate": estimate})
            yield
        at.file, at.document = at.file + 1, 0


def pack(cfg: Config, words: Tokenizer) -> dict:
    """Write this worker's documents as a token file, and return its summary (see `summarize`).

    Each document is preceded by the tokenizer's `bos_id`. One is in memory at a time. A bad document is left out and
    counted. The file gets its name when it is complete; until then a draft and a journal lie beside it, hidden, from
    which the same call goes on. Raises ValueError when more than one in a thousand are bad, for files that are
    missing, damaged or cut, and when another process writes this part.
    """
    files = find_files(cfg.files)
    job, part = describe(cfg, files, words), cfg.part
    draft, journal = part.with_name(f".{part.name}.writing"), part.with_name(f".{part.name}.journal")
    summary = read_json(summary_file(part))
    if summary.get("job") == job and part.exists() and not draft.exists():
        sweep(part)
        return summary

    dtype = np.dtype("uint16" if words.size <= 2**16 else "uint32")
    part.parent.mkdir(parents=True, exist_ok=True)
    draft.touch()
    with open(draft, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(f"{part} is being written by another process; give each its own --worker") from e
        head = write_header(file, dtype, 0)
        at = resume(journal, job, (draft.stat().st_size - head) // dtype.itemsize)
        if at is None:
            table = {} if cfg.keep_short == 1 else survey(files, words)
            at = Progress(job, upsampling(table, cfg.long, cfg.keep_short))
        file.truncate(head + at.tokens * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        steps = fill(file, dtype, cfg, files, words, at)
        for n, _ in enumerate(tqdm(steps, part.name, unit=" documents", disable=None), start=1):
            if n % SAVE_EVERY == 0:
                file.flush()
                os.fsync(file.fileno())
                write_json(journal, asdict(at))
                if sum(at.bad.values()) > BAD_EARLY and at.complaint():
                    break
        write_header(file, dtype, at.tokens)
    if complaint := at.complaint():
        sweep(part)
        raise ValueError(complaint)
    summary = summarize([asdict(at)])
    write_json(summary_file(part), summary)
    publish(draft, part)
    sweep(part)
    return summary


# ---- the summary ----


def summarize(parts: Sequence[dict]) -> dict:
    """What parts hold, added up: documents read, kept and bad, tokens, the mixture before and after, lengths.

    parts: of each its job, table, bad and first_bad, which the summary has too, so that summaries can be summarized.
    Shares are of tokens; those before count a source's text by the tokens per character of what was kept of it.
    """
    table, bad = {}, {}
    for part in parts:
        add(bad, part["bad"])
        for source, kinds in part["table"].items():
            for length, row in kinds.items():
                add(table.setdefault(source, {}).setdefault(length, {}), row)
    sources = {source: total(kinds.values()) for source, kinds in sorted(table.items())}
    steps = sorted({int(length) for kinds in table.values() for length in kinds})
    lengths = {n: total(kinds[str(n)] for kinds in table.values() if str(n) in kinds) for n in steps}
    whole = total(sources.values())
    before = {s: n["estimate"] * (n["tokens"] / n["kept_estimate"] if n["kept"] else 1) for s, n in sources.items()}
    for source, n in sources.items():
        n["share_before"] = before[source] / sum(before.values())
        n["share_after"] = n["tokens"] / max(1, whole["tokens"])
    for n in lengths.values():
        n["share_before"] = n["estimate"] / whole["estimate"]
        n["share_after"] = n["tokens"] / max(1, whole["tokens"])
    return {
        "job": parts[0]["job"] | ({"worker": None} if len(parts) > 1 else {}),
        **{name: whole[name] for name in ("documents", "kept", "tokens")},
        "bad": bad,
        "first_bad": [line for part in parts for line in part["first_bad"]][:5],
        "sources": sources,
        "lengths": {str(n): row for n, row in lengths.items()},
        "table": table,
    }


def report(name: Path, summary: dict) -> str:
    """A summary for people."""
    lines = [f"{name}: {summary['documents']:,} documents, {summary['kept']:,} kept, {summary['tokens']:,} tokens"]
    if bad := summary["bad"]:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(bad.items()))
        lines.append(f"{sum(bad.values()):,} bad documents left out ({kinds}); the first: {summary['first_bad'][0]}")
    longer = {f"{int(n):,} tokens or more": row for n, row in summary["lengths"].items()}
    for title, rows in (("source", summary["sources"]), ("length, estimated", longer)):
        lines.append(f"{title:28}{'documents':>13}{'kept':>13}{'tokens':>17}{'before':>9}{'after':>9}")
        for label, n in rows.items():
            shares = f"{n['share_before']:9.2%}{n['share_after']:9.2%}"
            lines.append(f"{label:28}{n['documents']:13,}{n['kept']:13,}{n['tokens']:17,}{shares}")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Pack, say what was packed, and when the last of several workers is done sum them up."""
    words = load_tokenizer(cfg.tokenizer)
    packed = pack(cfg, words)
    print(report(cfg.part, packed))
    if not packed["tokens"]:
        raise ValueError("nothing was packed: short documents are thinned out, and these all are; try --keep-short 1")
    if cfg.part != cfg.out:
        done = [part for n in range(cfg.workers) if (part := part_file(cfg.out, n, cfg.workers)).exists()]
        if len(done) < cfg.workers:
            print(f"{len(done)} of {cfg.workers} parts are complete; the corpus is when all workers are done")
            return
        summary = summarize([read_json(summary_file(part)) for part in find_parts(cfg.out)])
        write_json(cfg.out / "summary.json", summary)
        if cfg.workers > 1:
            print(report(cfg.out, summary))
    settings = f"--preset longva --weights {cfg.tokenizer} --corpus {cfg.out}"
    print(f"next:  torchrun --nproc-per-node 8 train_text.py {settings}")


if __name__ == "__main__":
    run(main, Config)
