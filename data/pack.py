"""Pack documents into files of token ids, long documents upsampled within each source.

What      Reads JSON lines (plain, .gz or .zst), parquet and plain text, one document at a time; tosses a seeded coin
          for each document; writes the ids of those that stay into .npy files, which data/text.py reads.
Paper     Sec. 3.1: SlimPajama upsampled by length as in Fu et al. (2024), a BOS in front of each document. Its lines
          are {"text": ..., "meta": {"redpajama_set_name": ...}}.
Run       python -m data.pack --tokenizer data/tiny/tokenizer --out TOKENS.npy DOCUMENTS.jsonl.zst
          python -m data.pack --tokenizer Qwen2-7B-Instruct --out TOKENS --worker 0 --workers 64 SlimPajama-627B/train
Dimensions  none
Differs   Every source keeps the same part of its tokens, in expectation, so that the mixture stays as it was in the
          given files; Fu et al. fix a table of shares and stop each source at its share.
          A damaged file stops the run, a bad line does not; many loaders take the end of a cut file for its end.

Kill it at any moment and run the same command again: it continues, and ends with the same bytes.
"""

import fcntl
import gzip
import io
import json
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data import runs
from data.flags import run, setting
from data.text import find_shards, shard_file, summary_file, vocabulary_digest
from data.tokenizer import Tokenizer, load_tokenizer

MAX_BAD_FRACTION = 0.001  # of the documents
BAD_BEFORE_END = 1000  # bad documents: from here on MAX_BAD_FRACTION is checked before the end, too
NOTHING = "nothing was packed: the coin left out every document; try --keep-short 1"
CHARACTERS_PER_TOKEN = 3.68  # to guess a document's length before it is tokenized (Fu et al.)
SAVE_EVERY = 2000  # documents between two entries of the journal
UNNAMED = "(no source named)"
COLUMNS = ("documents", "estimate", "kept", "kept_estimate", "tokens")  # of a row of the table; estimates in tokens


@dataclass(frozen=True)
class Config:
    """Pack documents into files of token ids, long ones upsampled within each source (Sec. 3.1)."""

    files: tuple[Path, ...] = setting(
        MISSING, "documents: .txt .jsonl(.gz, .zst) .parquet, or folders of them (ours)", positional=True
    )
    tokenizer: Path = setting(MISSING, "model folder whose tokenizer to use (Sec. 3.1: Qwen2-7B-Instruct)")
    out: Path = setting(MISSING, "token file to write, .npy, or else a folder for one file per worker (ours)")
    worker: int = setting(0, "number of this process, from 0 (ours)")
    workers: int = setting(1, "processes, on any number of machines, that divide the documents (ours)")
    long: int = setting(4096, "length from which a document is long, tokens (release: upsample_4096)")
    keep_short: float = setting(
        0.1, "part of each source's tokens to keep; long documents are 1/this times likelier to stay; "
        "1: keep all (release: upsample_4096)",
    )  # fmt: skip
    seed: int = setting(42, "random seed of the coins (release: upsample_4096)")

    def __post_init__(self):
        """Raise ValueError for settings that contradict each other."""
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"--worker is {self.worker}, expected 0 to {self.workers - 1}, below --workers")
        if self.workers > 1 and self.out.suffix == ".npy":
            raise ValueError(f"--out is {self.out}, but {self.workers} workers write a file each; give a folder")
        if not 0 < self.keep_short <= 1:
            raise ValueError(f"--keep-short is {self.keep_short}, expected a share above 0, at most 1")
        if self.long < 1:
            raise ValueError(f"--long is {self.long}, expected 1 token or more")

    @property
    def shard(self) -> Path:
        """The token file that this worker writes."""
        return self.out if self.out.suffix == ".npy" else shard_file(self.out, self.worker, self.workers)


# ---- which documents stay ------------------------------------------------------------------------


def keep_probability(long: bool, keep_short: float, long_tokens: int, short_tokens: int) -> float:
    """Return the probability that a document stays, given the tokens of its source so far, itself included.

    A long document is 1 / keep_short times likelier to stay than a short one. Alone, that would let a source of long
    documents grow against the others. Divided by the source's own mean, every source keeps, in expectation, the part
    `keep_short` of its tokens, and so its share of the mixture; if its documents come in no order of length.
    """
    mean = (long_tokens + keep_short * short_tokens) / (long_tokens + short_tokens)
    return keep_short * (1 if long else keep_short) / mean


def estimate_tokens(content: str | np.ndarray) -> int:
    """Return about how many tokens a document has, its separator included."""
    return 1 + (round(len(content) / CHARACTERS_PER_TOKEN) if isinstance(content, str) else len(content))


def add(row: dict[str, int], counts: dict[str, int]) -> None:
    """Add `counts` to a row of the table, in place."""
    for name, n in counts.items():
        row[name] = row.get(name, 0) + n


def sum_rows(rows: Iterable[dict]) -> dict[str, int]:
    """Return the sum of some rows of the table."""
    whole = dict.fromkeys(COLUMNS, 0)
    for row in rows:
        add(whole, row)
    return whole


# ---- reading documents ---------------------------------------------------------------------------


def open_zst(path: Path) -> BinaryIO:
    """Return the uncompressed bytes of a .zst of one frame or several; a cut one raises OSError at its end."""
    import pyarrow  # only these corpora need it

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def lines_of(path: Path, opened: Callable[[Path], BinaryIO]) -> Iterator[bytes]:
    """Yield the lines of a JSONL file."""
    with opened(path) as stream:
        for _, line in runs.json_lines(stream):
            yield line


def plain_text(path: Path) -> Iterator[dict]:
    """Yield the only document of a text file."""
    try:
        yield {"text": path.read_text(encoding="utf-8-sig")}  # Windows begins files with a mark, which is no text
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 ({e}); convert it: iconv -f ITS-ENCODING -t utf-8") from e


def parquet_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a parquet file: "input_ids", or else "text", and "meta"."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in ("input_ids", "text") if name in names), None)
        if column is None:
            raise ValueError(f"{path} has the columns {names}, expected 'text' or 'input_ids'")
        columns = [column, *({"meta"} & set(names))]
        for batch in file.iter_batches(batch_size=64, columns=columns):  # a row of token ids can have 2 MB
            metas = batch.column("meta") if "meta" in names else [None] * len(batch)
            for cell, meta in zip(batch.column(column), metas):
                is_list = isinstance(cell, pyarrow.ListScalar) and cell.is_valid
                content = cell.values.to_numpy(zero_copy_only=False) if is_list else cell.as_py()
                yield {column: content, "meta": meta and meta.as_py()}
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} cannot be read ({e}); copy or download it again") from e


READERS = {
    ".txt": plain_text,
    ".jsonl": partial(lines_of, opened=partial(open, mode="rb")),
    ".jsonl.gz": partial(lines_of, opened=gzip.open),
    ".jsonl.zst": partial(lines_of, opened=open_zst),
    ".parquet": parquet_rows,
}


def find_files(given: Iterable[Path]) -> list[Path]:
    """Return the given files, and those in the given folders sorted by name. Raises ValueError for an unknown kind."""
    files = []
    for path in given:
        inside = path.rglob("*") if path.is_dir() else [path]
        inside = sorted(f for f in inside if f == path or (f.is_file() and f.name.endswith(tuple(READERS))))
        if not inside:
            raise ValueError(f"{path} holds no documents; expected names that end in {', '.join(READERS)}")
        files += inside
    for path in files:  # all of them before the first is read: packing takes hours
        if not path.exists():
            raise ValueError(f"{path} is no file or folder; expected documents")
        if not path.name.endswith(tuple(READERS)):
            raise ValueError(f"{path} is of an unknown kind; expected a name that ends in {', '.join(READERS)}")
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is {'empty' if path.is_file() else 'no file'}; expected documents")
    return files


def documents(path: Path) -> Iterator[bytes | dict]:
    """Yield the documents of a file, not yet validated: a line of JSON as bytes, or a dict of fields.

    Raises ValueError, naming the file, when it is damaged or cut.
    """
    reader = next(reader for suffix, reader in READERS.items() if path.name.endswith(suffix))
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read to its end ({e}); copy or download it again") from e


def validate(document: bytes | dict, vocabulary: int) -> tuple[str | np.ndarray, str]:
    """Return (text or ids, name of the source) of a document; ValueError says "kind of fault: what was found".

    vocabulary: ids must be below it.
    """
    document = runs.parse_line(document) if isinstance(document, bytes) else document
    meta, content = document.get("meta"), document.get("input_ids")
    content = document.get("text") if content is None else content
    source = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    source = source.encode(errors="replace").decode() if source and isinstance(source, str) else UNNAMED
    try:
        if isinstance(content, str) and content:
            content.encode()  # half of a surrogate pair ("\ud800") is a ValueError
            return content, source
        ids = np.asarray(content)  # a list of lists of different lengths is a ValueError
    except ValueError as e:
        raise ValueError(f"odd text: {e}") from e
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError("no text: expected 'text' (a string, not empty) or 'input_ids' (a list of integers)")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"ids out of range: {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}")
    return ids, source


# ---- writing -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a worker has come: all that a killed process needs to continue, written to a journal."""

    job: dict  # see `job_spec`; must be the same to continue
    file: int = 0  # of this worker's files; those before it are done
    document: int = 0  # of that file; those before it are done
    tokens: int = 0
    table: dict = field(default_factory=dict)  # table[source]["long" or "short"]: a row of COLUMNS
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: list[str] = field(default_factory=list)

    def complaint(self) -> str | None:
        """Return an error message when too many documents are bad."""
        bad = sum(self.bad.values())
        read = bad + sum_rows(row for rows in self.table.values() for row in rows.values())["documents"]
        if not read and self.job["workers"] == 1:
            return "the files hold no document, nothing is written"
        if bad > MAX_BAD_FRACTION * read:
            return (
                f"{bad:,} of {read:,} documents are bad, at most {MAX_BAD_FRACTION:.1%} may be; nothing is written; "
                f"the first: {self.first_bad[0]}"
            )
        return None


def shown(file: Path) -> str:
    """Return a path as it can be printed and written to JSON, also one that is no UTF-8."""
    return str(file).encode(errors="backslashreplace").decode()


def encode(content: str | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of a document with the separator in front."""
    ids = np.array(tokenizer.encode(content)) if isinstance(content, str) else content
    return ids if ids[0] == tokenizer.bos_id else np.append(tokenizer.bos_id, ids)


def job_spec(cfg: Config, files: Sequence[Path], tokenizer: Tokenizer) -> dict:
    """Return what decides the content of a token file. Folders do not: machines may mount the files elsewhere."""
    own = files[cfg.worker :: cfg.workers] if len(files) >= cfg.workers else files
    facts = {"file_names": [os.fsencode(file.name).hex() for file in files]}
    facts |= {
        "file_sizes": [file.stat().st_size for file in files],
        "file_contents": [runs.sha256(file) for file in own],
    }
    spec = {"files": len(files)} | {name: runs.checksum(fact) for name, fact in facts.items()}
    spec |= {"tokenizer": vocabulary_digest(tokenizer), "vocabulary": tokenizer.size}
    return spec | {name: getattr(cfg, name) for name in ("long", "keep_short", "seed", "worker", "workers")}


def clean_up(shard: Path) -> None:
    """Remove the hidden files of a token file: draft, journal, and what a killed process left; no other's."""
    journal, summary = f".{shard.name}.journal", summary_file(shard).name
    for name in (f".{shard.name}.writing", journal, runs.DRAFT.format(journal), runs.DRAFT.format(summary)):
        (shard.parent / name).unlink(missing_ok=True)


def write_header(file: BinaryIO, dtype: str, count: int) -> int:
    """Write the head of an .npy and return its length, which numpy pads to be the same for every count."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})
    return file.tell()


def resume(journal: Path, job: dict, written: int) -> Progress:
    """Return what a killed process of the same job noted; nothing if it is damaged, or the draft has fewer tokens."""
    try:
        noted = runs.read_checked(journal)
    except ValueError:
        noted = {}
    changed = [name for name in noted.get("job", ()) if noted["job"][name] != job.get(name)]
    if changed:
        print(f"{journal.parent} holds the beginning of another packing, begun anew: changed {', '.join(changed)}")
    return Progress(**noted) if noted and not changed and noted["tokens"] <= written else Progress(job)


def write_documents(
    file: BinaryIO, dtype: str, cfg: Config, files: Sequence[Path], tokenizer: Tokenizer, done: Progress
) -> Iterator[None]:
    """Append this worker's documents to `file` and keep `done` up to date; yields after each document.

    Workers divide the files, or the documents of each file when there are fewer files than workers.
    """
    by_file = len(files) >= cfg.workers
    numbers = range(cfg.worker, len(files), cfg.workers) if by_file else range(len(files))
    first, step = (0, 1) if by_file else (cfg.worker, cfg.workers)
    while done.file < len(numbers):
        number = numbers[done.file]
        for document in islice(documents(files[number]), done.document, None):
            done.document += 1
            if (done.document - 1) % step != first:
                continue
            try:
                content, source = validate(document, tokenizer.size)
            except ValueError as e:
                kind = str(e).split(":")[0]
                done.bad[kind] = done.bad.get(kind, 0) + 1
                done.first_bad = [*done.first_bad, f"{shown(files[number])}, document {done.document}: {e}"][:5]
                yield
                continue
            tokens = estimate_tokens(content)
            length = "long" if tokens >= cfg.long else "short"
            rows = done.table.setdefault(source, {kind: dict.fromkeys(COLUMNS, 0) for kind in ("long", "short")})
            add(rows[length], {"documents": 1, "estimate": tokens})
            read_so_far = rows["long"]["estimate"], rows["short"]["estimate"]
            coin = random.Random(f"{cfg.seed} {number} {done.document}").random()
            if coin < keep_probability(length == "long", cfg.keep_short, *read_so_far):
                ids = encode(content, tokenizer)
                file.write(ids.astype(dtype).tobytes())
                done.tokens += len(ids)
                add(rows[length], {"kept": 1, "kept_estimate": tokens, "tokens": len(ids)})
            yield
        done.file, done.document = done.file + 1, 0


def pack(cfg: Config, tokenizer: Tokenizer) -> dict:
    """Write this worker's documents as a token file, and return its summary (see `summarize`).

    Each document is preceded by the tokenizer's `bos_id`. A bad document is left out and counted. The file gets its
    name when it is complete; until then a hidden draft and a journal lie beside it, from which the same call
    continues. Raises ValueError when more than one in a thousand are bad, for files that are missing, damaged or cut,
    and when another process writes this file.
    """
    files = find_files(cfg.files)
    job, shard = job_spec(cfg, files, tokenizer), cfg.shard
    draft, journal = shard.with_name(f".{shard.name}.writing"), shard.with_name(f".{shard.name}.journal")
    dtype = np.dtype("uint16" if tokenizer.size <= 2**16 else "uint32")
    shard.parent.mkdir(parents=True, exist_ok=True)
    with runs.naming(shard), os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
        lock_draft(file, draft, shard)
        if summary := finished(shard, job):
            clean_up(shard)
            return summary
        head = write_header(file, dtype, 0)
        done = resume(journal, job, (draft.stat().st_size - head) // dtype.itemsize)
        file.truncate(head + done.tokens * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        steps = write_documents(file, dtype, cfg, files, tokenizer, done)
        for n, _ in enumerate(tqdm(steps, shard.name, unit=" documents", disable=None), start=1):
            if n % SAVE_EVERY == 0:
                file.flush()
                os.fsync(file.fileno())  # the journal must not name tokens that a power cut loses
                runs.write_checked(journal, asdict(done))
                if sum(done.bad.values()) > BAD_BEFORE_END and done.complaint():
                    break
        write_header(file, dtype, done.tokens)
        file.flush()
        if complaint := done.complaint():
            clean_up(shard)
            raise ValueError(complaint)
        summary = summarize([asdict(done)]) | {"digest": runs.digest(draft)}
        runs.write_checked(summary_file(shard), summary)
        runs.publish(draft, shard)
        clean_up(shard)
    return summary


def lock_draft(file: BinaryIO, draft: Path, shard: Path) -> None:
    """Lock an open draft until it is closed. Raises ValueError if another process writes, or has published, it."""
    taken = f"{shard} is being written by another process; give each its own --worker"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(taken) from error
    except OSError:  # some network file systems have no locks
        pass
    if not draft.exists() or not os.path.samestat(os.fstat(file.fileno()), draft.stat()):
        raise ValueError(taken)


def finished(shard: Path, job: dict) -> dict:
    """Return the summary of a token file that is whole and of this job; of any other {}, after a sentence why."""
    if not (shard.exists() and summary_file(shard).exists()):
        return {}
    try:
        summary = runs.read_checked(summary_file(shard))
        changed = [name for name in job if summary["job"].get(name) != job[name]]
        why = f"changed {', '.join(changed)}" if changed else "damaged" * (summary["digest"] != runs.digest(shard))
    except (ValueError, KeyError):
        why = "its summary is damaged"
    if why:
        print(f"{shard} is packed anew: {why}")
    return {} if why else summary


def is_of_job(shard: Path, job: dict) -> bool:
    """Return whether another worker's token file is of this job, not of one packed here before."""
    found = runs.read_checked(summary_file(shard)).get("job", {})
    return all(found.get(name) == job[name] for name in job if name not in ("worker", "file_contents"))


# ---- the summary ---------------------------------------------------------------------------------


def summarize(shards: Sequence[dict]) -> dict:
    """Return what token files hold together: documents read, kept and bad, tokens, the mixture before and after.

    shards: of each its job, table, bad and first_bad; a summary has these too, so summaries can be summarized.
    Shares are of tokens; those before count a source's text by the tokens per character of what was kept of it.
    """
    table, bad = {}, {}
    for shard in shards:
        add(bad, shard["bad"])
        for source, rows in shard["table"].items():
            for length, row in rows.items():
                add(table.setdefault(source, {}).setdefault(length, {}), row)
    sources = {source: sum_rows(rows.values()) for source, rows in sorted(table.items())}
    lengths = {length: sum_rows(rows[length] for rows in table.values()) for length in ("long", "short")}
    whole = sum_rows(sources.values())
    before = {s: n["estimate"] * (n["tokens"] / n["kept_estimate"] if n["kept"] else 1) for s, n in sources.items()}
    for source, n in sources.items():
        n["share_before"] = before[source] / sum(before.values())
        n["share_after"] = n["tokens"] / max(1, whole["tokens"])
    for n in lengths.values():
        n["share_before"] = n["estimate"] / max(1, whole["estimate"])
        n["share_after"] = n["tokens"] / max(1, whole["tokens"])
    return {
        "job": shards[0]["job"] | ({"worker": None} if len(shards) > 1 else {}),
        **{name: whole[name] for name in ("documents", "kept", "tokens")},
        "bad": bad,
        "first_bad": [line for shard in shards for line in shard["first_bad"]][:5],
        "sources": sources,
        "lengths": lengths,
        "table": table,
    }


def report(name: Path, summary: dict) -> str:
    """Return a summary as a table of text."""
    lines = [f"{name}: {summary['documents']:,} documents, {summary['kept']:,} kept, {summary['tokens']:,} tokens"]
    if bad := summary["bad"]:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(bad.items()))
        lines.append(f"{sum(bad.values()):,} bad documents left out ({kinds}); the first: {summary['first_bad'][0]}")
    for title, rows in (("source", summary["sources"]), ("length, estimated", summary["lengths"])):
        lines.append(f"{title:28}{'documents':>13}{'kept':>13}{'tokens':>17}{'before':>9}{'after':>9}")
        for label, n in rows.items():
            shares = f"{n['share_before']:9.2%}{n['share_after']:9.2%}"
            lines.append(f"{label:28}{n['documents']:13,}{n['kept']:13,}{n['tokens']:17,}{shares}")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Pack and print a summary; the last of several workers prints that of all."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    packed = pack(cfg, tokenizer)
    print(report(cfg.shard, packed))
    if not packed["tokens"] and cfg.workers == 1:
        raise ValueError(NOTHING)
    if cfg.shard != cfg.out:
        shards = [shard_file(cfg.out, n, cfg.workers) for n in range(cfg.workers)]
        complete = [shard for shard in shards if shard.exists() and is_of_job(shard, packed["job"])]
        if len(complete) < cfg.workers:
            print(f"{len(complete)} of {cfg.workers} files are complete; the corpus is when all workers are done")
            if others := [shard.name for shard in shards if shard.exists() and shard not in complete]:
                print(f"{len(others)} were packed with other settings, such as {others[0]}; run those workers again")
            return
        summary = summarize([runs.read_checked(summary_file(shard)) for shard in find_shards(cfg.out)])
        if not summary["tokens"]:
            raise ValueError(NOTHING)
        runs.replace_text(cfg.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        if cfg.workers > 1:
            print(report(cfg.out, summary))
    settings = f"--preset longva --weights {cfg.tokenizer} --corpus {cfg.out}"
    print(f"next:  torchrun --nproc-per-node 8 train_text.py {settings}")


if __name__ == "__main__":
    run(main, Config)
