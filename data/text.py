"""Packed token files: what train_text.py reads, sequence by sequence.

What      `open_tokens` opens a file of token ids, or a folder of them, without loading it; `windows` returns the
          sequences of one micro-batch; `document_starts` says where documents begin in them.
Paper     Sec. 3.1: SlimPajama, documents one behind the other with a BOS in front of each, cut into sequences.
Run       imported by train_text.py; data/pack.py writes the files.
Dimensions  B sequences   S tokens per sequence
Differs   Sequences are cut from one endless stream; the release cuts rows of 256K and drops the last 38K of each.
          Qwen2 has no BOS: <|endoftext|> separates documents.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from data.runs import digest, read_checked
from data.tokenizer import Tokenizer

DTYPES = ("uint16", "uint32", "int32")  # of a token file
BAD_HEADER = (ValueError, TypeError, SyntaxError, TokenError, OverflowError, MemoryError)  # numpy's answers to one

# ---- opening -------------------------------------------------------------------------------------


class TokenShards:
    """The token files of a folder, concatenated; slicing works as on one array."""

    def __init__(self, folder: Path, shards: Sequence[np.memmap]):
        self.filename, self.shards = folder, shards
        self.starts = np.cumsum([0, *map(len, shards)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        first, last, _ = where.indices(len(self))
        return np.concatenate(
            [shard[max(0, first - start) : max(0, last - start)] for shard, start in zip(self.shards, self.starts)]
        )


def open_tokens(path: str | Path, tokenizer: Tokenizer | None = None) -> np.memmap | TokenShards:
    """Memory-map the ids of a token file, or of a folder of them.

    tokenizer: that of the model to train; a file that was packed with another one is refused, if the summary
    that data/pack.py writes beside it is there to tell. Raises ValueError, naming the file, when it is missing, cut,
    empty, changed since it was packed, or of another dtype or shape, and when a folder lacks files or mixes those of
    several corpora.
    """
    path = Path(path)
    tokens = TokenShards(path, [open_shard(shard, tokenizer) for shard in find_shards(path)]) if path.is_dir() else None
    tokens = open_shard(path, tokenizer) if tokens is None else tokens
    if not len(tokens):
        raise ValueError(f"{path} holds no tokens; make it with python -m data.pack from more text")
    return tokens


def open_corpus(path: str | Path, tokenizer: Tokenizer) -> np.memmap | TokenShards:
    """Open a token file or folder and read it once; ValueError if an id is not in the tokenizer's vocabulary."""
    tokens = open_tokens(path, tokenizer)
    if (largest := largest_id(tokens)) >= tokenizer.size:
        raise ValueError(f"{path} holds token {largest}, but the model's tokenizer has {tokenizer.size}; pack it again")
    return tokens


def open_shard(path: Path, tokenizer: Tokenizer | None) -> np.memmap:
    """Open one token file, one dimension of uint16, uint32 or int32, and check it against its summary."""
    if not path.exists():
        raise ValueError(f"{path} is no file or folder of tokens; make it with python -m data.pack")
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (*BAD_HEADER, OSError) as e:
        raise ValueError(f"{path} is not a token file ({str(e)[:80]}); make one with python -m data.pack") from e
    if tokens.ndim != 1 or tokens.dtype not in DTYPES:
        raise ValueError(
            f"{path} holds {tokens.dtype}{list(tokens.shape)}, expected one dimension of {', '.join(DTYPES)}; "
            "make it with python -m data.pack"
        )
    if not (summary := read_checked(summary_file(path))):
        return tokens
    if summary["tokens"] != len(tokens):
        raise ValueError(
            f"{path} holds {len(tokens):,} tokens, but {summary_file(path).name} lists {summary['tokens']}; "
            "pack it again, or remove the summary if it is of another file"
        )
    if tokenizer and summary["job"]["tokenizer"] != vocabulary_digest(tokenizer):
        raise ValueError(
            f"{path} was packed with another tokenizer, of {summary['job']['vocabulary']:,} ids, than the model's, "
            f"of {tokenizer.size:,}; pack it again with --tokenizer and that model's folder"
        )
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # once on each machine
    if is_first_here and summary.get("digest") != digest(path):
        raise ValueError(f"{path} has changed since it was packed: its checksum differs; pack it again")
    return tokens


def find_shards(folder: Path) -> list[Path]:
    """Return the token files of a folder in the order of their workers; all must be there, from one corpus."""
    found = sorted(folder.glob("part-*-of-*.npy"))
    if not found:
        raise ValueError(f"{folder} holds no token files, part-*-of-*.npy; make them with python -m data.pack")
    workers = int(found[0].stem.split("-")[-1])
    shards = [shard_file(folder, worker, workers) for worker in range(workers)]
    missing = [worker for worker, shard in enumerate(shards) if shard not in found]
    if missing or len(found) > workers:
        raise ValueError(
            f"{folder} holds {len(found)} files of a corpus in {workers} parts, missing {missing[:5]}; run those "
            "workers of python -m data.pack, or pack into an empty folder"
        )
    alone = {"worker": None, "file_contents": None}  # what a worker has for itself
    jobs = [{**read_checked(summary_file(shard)).get("job", {}), **alone} for shard in shards]
    if odd := next((job for job in jobs if job != jobs[0]), None):
        names = ", ".join(name for name in jobs[0] if odd.get(name) != jobs[0][name])
        raise ValueError(f"{folder} mixes parts that were packed with different {names}; pack into an empty folder")
    return shards


def shard_file(folder: Path, worker: int, workers: int) -> Path:
    """Return the path of the token file that one worker writes."""
    return folder / f"part-{worker:05}-of-{workers:05}.npy"


def summary_file(shard: Path) -> Path:
    """Return the path of the summary that data/pack.py writes beside a token file."""
    return shard.with_suffix(".summary.json")


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's ids and their bytes."""
    return hashlib.sha256(repr(sorted(tokenizer.pieces.items())).encode()).hexdigest()


def largest_id(tokens: np.memmap | TokenShards, block: int = 2**24) -> int:
    """Return the largest id of a file, to compare with the vocabulary; a negative id counts as one above 2^31."""
    blocks = (tokens[i : i + block] for i in range(0, len(tokens), block))
    return max(int(ids.view(f"uint{8 * ids.itemsize}").max()) for ids in blocks)


# ---- reading -------------------------------------------------------------------------------------


def windows(
    tokens: np.memmap | TokenShards, seq_len: int, rows: int, seed: int, micro_batch: int
) -> tuple[Tensor, Tensor]:
    """Return (ids_BS, targets_BS), int64, of the `rows` sequences of one micro-batch (Sec. 3.1).

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
    starts = [seq_len * i for i in shuffled(count, seed, micro_batch * rows, rows)]
    read = torch.from_numpy(np.stack([tokens[i : i + seq_len + 1] for i in starts]).astype(np.int64))
    return read[:, :-1].clone(), read[:, 1:].clone()


def document_starts(ids_BS: Tensor, separator: int) -> list[list[int]]:
    """Return where documents begin in each packed row; the first at 0, which may be the middle of one."""
    return [sorted({0, *(ids_S == separator).nonzero()[:, 0].tolist()}) for ids_S in ids_BS]


def shuffled(count: int, seed: int, first: int, number: int) -> list[int]:
    """Return entries first ... first + number - 1 of an endless series: each epoch is 0 ... count - 1, shuffled."""
    places = (divmod(n, count) for n in range(first, first + number))
    return [int(permutation(count, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=2)  # a batch lies in one epoch or two
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)
