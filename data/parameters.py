"""How a model's parameters get their values: from a folder, from a CLIP's folder, or from a seed.

What      Streams of (name, tensor) under our parameters' names, which are the released files', and the strict filling
          of a model from such a stream, sharded or not.
Paper     Sec. 3.1 and 3.2: a language model and a tower from elsewhere, a projector from nothing.
Run       imported through longva.py.
"""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from data import weights

UNUSED = ("*rotary_emb.inv_freq", "*position_ids")  # buffers of old files; what they hold is computed here
TOWER = "model.vision_tower.vision_tower.vision_model."  # LongVA's name for what CLIP's files call vision_model.
NOT_SEEING = ("text_model.*", "*_projection.weight", "logit_scale")  # the half of a whole CLIP that reads


def init_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """New weights for a model, which may be on the meta device: a stream of (name, tensor). Plain initialisation.

    Maps and embeddings of the language model are normal(0, 0.02), as Qwen2's; those of tower and projector have
    deviation 1/sqrt(inputs). Norms are one, biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        tensor = torch.zeros(p.shape)
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif p.ndim > 1 or name.endswith(("image_newline", "class_embedding")):
            seeing = name.startswith(("vision", "visual", "word", "model.vision", "model.mm_", "model.image_"))
            fan_in = p[0].numel() if p.ndim > 1 else p.numel()
            tensor.normal_(0, fan_in**-0.5 if seeing else 0.02, generator=generator)
        yield name, tensor


def read_tower(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """The vision tower of a CLIP folder, under LongVA's names; with or without `vision_model.` in front."""
    for name, tensor in weights.read(folder):
        if not any(fnmatchcase(name, pattern) for pattern in NOT_SEEING):
            yield TOWER + name.removeprefix("vision_model."), tensor


def fill_from(
    model: nn.Module,
    stream: Iterable[tuple[str, Tensor]],
    fill: Callable | None = None,
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill the parameters that `only` names from a stream, strictly: each once, no tensor left over.

    `fill(parameter, tensor)` copies, and knows about shards where there are any. Raises ValueError naming keys.
    """
    parameters = {name: p for name, p in model.named_parameters() if only(name)}
    tied = [] if "lm_head.weight" in parameters else ["lm_head.weight"]
    weights.fill_strictly(parameters, ((n, x) for n, x in stream if only(n)), fill, ignore=[*UNUSED, *tied])
