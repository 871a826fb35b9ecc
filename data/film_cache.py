"""What a model saw of a film, kept on the disk for the next run of vniah.py.

What      `digest` names a film by its bytes; `read_film` reads visual tokens that were kept.
Paper     None.
Run       imported by vniah.py.
"""

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import video, weights


def digest(film: Path | str) -> str:
    """Of a film's bytes, or of a folder's pictures in order. Raises ValueError where there is neither."""
    film = Path(film)
    if not film.exists():
        raise ValueError(f"{film}: no such video file or folder of pictures")
    return weights.hash_files(video.picture_files(film) if film.is_dir() else [film])


def read_film(file: Path, device: torch.device) -> tuple[torch.Tensor, list[str]] | None:
    """What vniah.py kept of a film, (x_NMD, digests of its frames); None where it is damaged, to be made again."""
    try:
        with safe_open(file, "pt", str(device)) as kept:
            return kept.get_tensor("film"), kept.metadata()["hashes"].split()
    except (SafetensorError, OSError) as error:
        print(f"({file} cannot be read ({error}): the film is looked at again)", file=sys.stderr)
        return None
