"""Long text as one file of token ids, and the windows of it that training reads.

What      `open_tokens` and `windows` for train_text.py; `pack`, which makes the file from documents.
Paper     Sec. 3.1: documents are put one behind the other with a BOS in front of each, and cut into sequences.
Run       python -m data.text --tokenizer Qwen2-7B-Instruct --out TOKENS.npy DOCUMENTS.jsonl.zst ...
Key       B rows   S tokens per sequence
Deviates  Sequences are cut from one endless stream; the release cuts rows of 256K and drops the last 38K of each.
          Qwen2 has no BOS: <|endoftext|> separates documents.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.flags import knob, run
from data.tokenizer import Tokenizer, load_tokenizer
from data.weights import publish

DTYPES = ("uint16", "uint32", "int32")  # of a token file
LONGEST = 64 * 2**20  # bytes of a line; a file of 10 KB can unpack to a line of gigabytes
BAD_SHARE, BAD_EARLY = 0.001, 1000  # of documents that may be bad; and how many before the end is waited for


@dataclass(frozen=True)
class Config:
    """Pack documents into one file of token ids (Sec. 3.1)."""

    files: tuple[Path, ...] = knob(MISSING, "documents: .txt .jsonl(.gz, .zst) .parquet (ours)", positional=True)
    tokenizer: Path = knob(MISSING, "folder of the model whose tokenizer to use (Sec. 3.1: Qwen2-7B-Instruct)")
    out: Path = knob(MISSING, "token file to write, .npy (ours)")


# ---- reading a token file ----


def open_tokens(path: str | Path) -> np.memmap:
    """The ids of a token file, one dimension of uint16, uint32 or int32, read from disk as they are used.

    Raises ValueError, naming the file, when it is missing, cut, empty, or of another kind or shape.
    """
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is not a token file ({e}); make one with python -m data.text") from e
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype not in DTYPES:
        raise ValueError(
            f"{path} holds {tokens.dtype}{list(tokens.shape)}, expected one dimension of {', '.join(DTYPES)}, "
            "not empty; make it with python -m data.text"
        )
    return tokens


def largest(tokens: np.memmap, block: int = 2**24) -> int:
    """The largest id of a whole file, to hold against a vocabulary; a negative id counts as one above 2^31."""
    unsigned = np.dtype(f"uint{8 * tokens.itemsize}")
    return max(int(tokens[i : i + block].view(unsigned).max()) for i in range(0, len(tokens), block))


def windows(tokens: np.memmap, seq_len: int, rows: int, seed: int, part: int) -> tuple[Tensor, Tensor]:
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


def shuffled(count: int, seed: int, first: int, number: int) -> list[int]:
    """Entries first ... first + number - 1 of an endless series: epoch after epoch of 0 ... count - 1, shuffled."""
    places = (divmod(n, count) for n in range(first, first + number))
    return [int(permutation(count, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)  # a batch lies in one epoch or two
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


# ---- reading documents: a line of JSON as bytes, a text as str, pretokenised ids as an array ----


def open_zst(path: Path) -> BinaryIO:
    """The uncompressed bytes of a .zst, of one frame or several; a cut one is an OSError at its end."""
    import pyarrow  # only these corpora need it

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def json_lines(path: Path, opened: Callable[[Path], BinaryIO]) -> Iterator[bytes]:
    """The lines of a JSONL file, blank ones left out."""
    with opened(path) as stream:
        while line := stream.readline(LONGEST + 1):
            if len(line) > LONGEST:
                raise ValueError(f"{path} has a line of more than {LONGEST:,} bytes; expected a document in each line")
            if line.strip():
                yield line


def plain_text(path: Path) -> Iterator[str]:
    """A text file is one document."""
    yield path.read_text(encoding="utf-8")


def parquet_rows(path: Path) -> Iterator[str | np.ndarray | None]:
    """The column "input_ids" of a parquet file, or else "text", a few rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in ("input_ids", "text") if name in names), None)
        if column is None:
            raise ValueError(f"{path} has the columns {names}, expected 'text' or 'input_ids'")
        for batch in file.iter_batches(batch_size=64, columns=[column]):  # pretokenised rows can be of 2 MB
            for cell in batch.column(0):
                is_list = isinstance(cell, pyarrow.ListScalar) and cell.is_valid
                yield cell.values.to_numpy(zero_copy_only=False) if is_list else cell.as_py()
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} cannot be read ({e}); copy or download it again") from e


READERS = {
    ".txt": plain_text,
    ".jsonl": partial(json_lines, opened=partial(open, mode="rb")),
    ".jsonl.gz": partial(json_lines, opened=gzip.open),
    ".jsonl.zst": partial(json_lines, opened=open_zst),
    ".parquet": parquet_rows,
}


def documents(path: Path) -> Iterator[bytes | str | np.ndarray | None]:
    """The documents of a file, not yet checked; ValueError, naming it, when it is damaged or cut."""
    reader = next(reader for suffix, reader in READERS.items() if path.name.endswith(suffix))
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read to its end ({e}); copy or download it again") from e


def encode(document: bytes | str | np.ndarray | None, words: Tokenizer) -> np.ndarray:
    """The ids of a document, the separator in front; ValueError says what is wrong with it."""
    if isinstance(document, bytes):
        try:
            fields = json.loads(document)
        except RecursionError as e:
            raise ValueError("nested too deeply") from e
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, found {type(fields).__name__}")
        document = fields.get("input_ids", fields.get("text"))
    if isinstance(document, str):
        document.encode()  # half of a surrogate pair ("\ud800") is a ValueError
        document = words.encode(document)
    ids = np.asarray(document)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError("expected 'text' (a string, not empty) or 'input_ids' (a list of integers)")
    if ids.min() < 0 or ids.max() >= words.size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, expected 0 to {words.size - 1}")
    return ids if ids[0] == words.bos_id else np.append(words.bos_id, ids)


# ---- packing ----


def check_files(files: Sequence[Path]) -> None:
    """Refuse files that are missing, empty or of unknown kind, before hours go into those in front."""
    for path in files:
        if not path.name.endswith(tuple(READERS)):
            raise ValueError(f"{path} is of an unknown kind; expected a name that ends in {', '.join(READERS)}")
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is {'empty' if path.is_file() else 'no file'}; expected documents")


def check_bad(bad: list[str], seen: int) -> None:
    """Refuse to go on when too many documents are bad: then something else is wrong than a few documents."""
    if len(bad) > BAD_SHARE * seen:
        raise ValueError(
            f"{len(bad):,} of {seen:,} documents are bad, at most {BAD_SHARE:.1%} may be; nothing is written; "
            f"the first: {bad[0]}"
        )


def write_header(file: BinaryIO, dtype: str, count: int) -> None:
    """The head of an .npy; numpy pads it, so that it is as long for one token as for a trillion."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    shape = {"descr": descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, shape)


def pack(files: Sequence[Path], words: Tokenizer, out: Path) -> tuple[int, int, list[str]]:
    """Write the documents of `files`, in order, as a token file: (documents, tokens, what was left out and why).

    Each document is preceded by the tokenizer's `bos_id`. One is in memory at a time. `out` gets its name when it is
    complete. A bad document is left out; raises ValueError when more than one in a thousand are bad, and for files
    that are missing, damaged or cut.
    """
    check_files(files)
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if words.size <= 2**16 else "uint32"
    unfinished = out.with_name(f".{out.name}.writing")
    seen, tokens, bad = 0, 0, []

    try:
        with open(unfinished, "wb") as file, tqdm(unit=" documents", disable=None) as bar:
            write_header(file, dtype, 0)
            for path in files:
                for number, document in enumerate(documents(path), start=1):
                    seen += 1
                    try:
                        ids = encode(document, words)
                    except ValueError as e:
                        bad.append(f"{path}, document {number}: {e}")
                        if len(bad) > BAD_EARLY:
                            check_bad(bad, seen)
                        continue
                    file.write(ids.astype(dtype).tobytes())
                    tokens += len(ids)
                    bar.update()
            check_bad(bad, seen)
            if not tokens:
                raise ValueError(f"{files[0]} and the other files hold no document, nothing is written")
            file.seek(0)
            write_header(file, dtype, tokens)
        publish(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return seen - len(bad), tokens, bad


def main(cfg: Config) -> None:
    """Pack and say what was packed."""
    count, tokens, bad = pack(cfg.files, load_tokenizer(cfg.tokenizer), cfg.out)
    print(f"{cfg.out}: {count:,} documents, {tokens:,} tokens")
    if bad:
        print(f"{len(bad):,} bad documents left out; the first: {bad[0]}")
    settings = f"--preset longva --weights {cfg.tokenizer} --corpus {cfg.out}"
    print(f"next:  torchrun --nproc-per-node 8 train_text.py {settings}")


if __name__ == "__main__":
    run(main, Config)
