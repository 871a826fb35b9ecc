"""What a model read of a film, kept on the disk for the next question.

What      A cache's keys and values, layer by layer, in a folder whose name is a digest of all that decides them: the
          film's bytes, weights and config, the frames taken, the words before. Anything else gets another folder.
Paper     None. Computed: at 57,344 bytes per token of Qwen2-7B, 3000 frames are 25 GB; nothing here is ever deleted.
Run       python longva.py "And then?" --video FILM.mp4 --cache FOLDER
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data import video, weights
from data.config import LongVAConfig, to_dict


def digest(film: Path | str) -> str:
    """Of a film's bytes, or of a folder's pictures in order. Raises ValueError where there is neither."""
    film = Path(film)
    if not film.exists():
        raise ValueError(f"{film}: no such video file or folder of pictures")
    return weights.sha_of(video.picture_files(film) if film.is_dir() else [film])


def facts(cfg: Any, config: LongVAConfig, dtype: torch.dtype, before: list[int]) -> dict:
    """All that decides what a cache holds of a film: its bytes, the model, the ids before, and how it is shown."""
    shown = {"frames": None if cfg.fps else cfg.frames, "fps": cfg.fps, "how": "crop", "before": before}
    model = {"config": to_dict(config), "weights": weights.sha(cfg.weights), "dtype": str(dtype)}
    return {"film": digest(cfg.video), **shown, **model}


def place(root: Path, facts: dict) -> Path:
    """The folder of what `facts` decide."""
    return root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check(root: Path, ranks: int) -> None:
    """Raise ValueError, before any work is done, for a folder that cannot be written to, or more than one rank."""
    if ranks > 1:
        raise ValueError(f"--cache keeps what one process read, and here are {ranks}; leave it out")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ValueError(f"--cache {root} cannot be written to ({error.strerror}); name another folder") from error


def keep(root: Path, facts: dict, cache: Any) -> None:
    """Write what the cache holds; complete or not at all, however it ends.

    A full disk costs the memory of the film, told in one sentence, not the answer for which it was read.
    """
    try:
        weights.write(place(root, facts), cache.layers(), facts | {"length": cache.length}, shard_bytes=1 << 30)
    except (OSError, SafetensorError) as error:
        print(f"(--cache {root} keeps nothing of this film: {error})", file=sys.stderr)


def recall(root: Path, facts: dict, cache: Any) -> bool:
    """Fill the cache from the disk; False where nothing is kept of this, or what is kept is damaged."""
    folder = place(root, facts)
    if not (folder / weights.CONFIG).is_file():
        return False
    try:
        cache.fill(weights.read(folder), weights.read_config(folder)["length"])
    except ValueError as error:
        print(f"({error}: the film is read again)", file=sys.stderr)
        return False
    return True


def read_film(file: Path, device: torch.device) -> tuple[torch.Tensor, list[str]] | None:
    """What vniah.py kept of a film, (x_NMD, digests of its frames); None where it is damaged, to be made again."""
    try:
        with safe_open(file, "pt", str(device)) as kept:
            return kept.get_tensor("film"), kept.metadata()["hashes"].split()
    except (SafetensorError, OSError) as error:
        print(f"({file} cannot be read ({error}): the film is looked at again)", file=sys.stderr)
        return None
