"""Documents out of files, one at a time: JSON lines, plain or compressed, parquet, plain text.

What      `find_files` lists a corpus, `documents` reads a file of it, `check` says what is wrong with a document.
Paper     Sec. 3.1: SlimPajama, whose lines are {"text": ..., "meta": {"redpajama_set_name": ...}}.
Run       imported by data/text.py.
Deviates  A damaged file stops the run, a bad line does not; many loaders take the end of a cut file for its end.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

LONGEST = 64 * 2**20  # bytes of a line; a file of 10 KB can unpack to a line of gigabytes
UNNAMED = "(no source named)"


def open_zst(path: Path) -> BinaryIO:
    """The uncompressed bytes of a .zst, of one frame or several; a cut one is an OSError at its end."""
    import pyarrow  # only these corpora need it

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def json_lines(path: Path, opened: Callable[[Path], BinaryIO]) -> Iterator[bytes]:
    """The lines of a JSONL file, blank ones left out; of a giant one the beginning, too long to be accepted."""
    with opened(path) as stream:
        while line := stream.readline(LONGEST + 1):
            rest = line
            while len(rest) > LONGEST and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST + 1)
            if line.strip():
                yield line


def plain_text(path: Path) -> Iterator[dict]:
    """A text file is one document."""
    yield {"text": path.read_text(encoding="utf-8")}


def parquet_rows(path: Path) -> Iterator[dict]:
    """The column "input_ids" of a parquet file, or else "text", and "meta", a few rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in ("input_ids", "text") if name in names), None)
        if column is None:
            raise ValueError(f"{path} has the columns {names}, expected 'text' or 'input_ids'")
        columns = [column, *({"meta"} & set(names))]
        for batch in file.iter_batches(batch_size=64, columns=columns):  # pretokenised rows can be of 2 MB
            metas = batch.column("meta") if "meta" in names else [None] * len(batch)
            for cell, meta in zip(batch.column(column), metas):
                is_list = isinstance(cell, pyarrow.ListScalar) and cell.is_valid
                content = cell.values.to_numpy(zero_copy_only=False) if is_list else cell.as_py()
                yield {column: content, "meta": meta and meta.as_py()}
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} cannot be read ({e}); copy or download it again") from e


READERS = {
    ".txt": plain_text,
    ".jsonl": partial(json_lines, opened=partial(open, mode="rb")),
    ".jsonl.gz": partial(json_lines, opened=gzip.open),
    ".jsonl.zst": partial(json_lines, opened=open_zst),
    ".parquet": parquet_rows,
}


def find_files(given: Iterable[Path]) -> list[Path]:
    """The files that were given, folders by what they hold, in order of names; refused before hours go into others."""
    files = []
    for path in given:
        inside = path.rglob("*") if path.is_dir() else [path]
        inside = sorted(f for f in inside if f == path or (f.is_file() and f.name.endswith(tuple(READERS))))
        if not inside:
            raise ValueError(f"{path} holds no documents; expected names that end in {', '.join(READERS)}")
        files += inside
    for path in files:
        if not path.exists():
            raise ValueError(f"{path} is no file or folder; expected documents")
        if not path.name.endswith(tuple(READERS)):
            raise ValueError(f"{path} is of an unknown kind; expected a name that ends in {', '.join(READERS)}")
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is {'empty' if path.is_file() else 'no file'}; expected documents")
    return files


def documents(path: Path) -> Iterator[bytes | dict]:
    """The documents of a file, not yet checked: a line of JSON as bytes, or the fields of one.

    Raises ValueError, naming the file, when it is damaged or cut.
    """
    reader = next(reader for suffix, reader in READERS.items() if path.name.endswith(suffix))
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read to its end ({e}); copy or download it again") from e


def check(document: bytes | dict, vocabulary: int) -> tuple[str | np.ndarray, str]:
    """(text or ids, name of the source) of a document; ValueError says "kind of fault: what was found".

    vocabulary: ids must be below it.
    """
    if isinstance(document, bytes):
        if len(document) > LONGEST:
            raise ValueError(f"giant line: more than {LONGEST:,} bytes")
        try:
            document = json.loads(document)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not JSON: {e}") from e
    if not isinstance(document, dict):
        raise ValueError(f"no JSON object: found {type(document).__name__}")
    meta, content = document.get("meta"), document.get("input_ids", document.get("text"))
    source = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    source = source if source and isinstance(source, str) else UNNAMED
    try:
        if isinstance(content, str) and content:
            content.encode()  # half of a surrogate pair ("\ud800") is a ValueError
            return content, source
        ids = np.asarray(content)  # so is a list of lists of different lengths
    except ValueError as e:
        raise ValueError(f"odd text: {e}") from e
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError("no text: expected 'text' (a string, not empty) or 'input_ids' (a list of integers)")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"ids out of range: {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}")
    return ids, source
