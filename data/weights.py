"""Model weights: a Hugging Face folder as a stream of (name, tensor), a model filled from it, and back.

What      `read` streams any folder with config.json and safetensors, in one file or in shards; `read_tower` a
          CLIP's; `init_weights` makes new weights. `fill_from` fills a model from such a stream, sharded or not.
          `write` is the way back. Reading holds one tensor in memory at a time (filling peaks at the model and one
          tensor), writing one shard.
Paper     Sec. 3.1 starts from Qwen2-7B-Instruct, Sec. 3.2 from CLIP ViT-L/14-336 and a new projector.
Run       imported; `for name, tensor in read("Qwen2-7B-Instruct"): ...`
Dimensions  none
Differs   Loading is strict (every tensor used once, every parameter filled once, shapes equal), where the release
          warns and continues. Only safetensors and JSON are read: other formats can run code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data import runs
from data.flags import read_json, short, shorten

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
UNUSED = ("*rotary_emb.inv_freq", "*position_ids")  # buffers of old files; what they hold is computed here
TOWER = "model.vision_tower.vision_tower.vision_model."  # LongVA's name for what CLIP's files call vision_model.
TEXT_HALF = ("text_model.*", "*_projection.weight", "logit_scale")  # the text half of a whole CLIP
OUR_SHARD = re.compile(r"model-([ab]-)?\d{5}-of-\d{5}\.safetensors")
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
CONVERT = (  # weights_only: a pickle that would run code is refused; clone: tied tensors may not share memory
    'python -c "import sys, torch; from safetensors.torch import save_file as save; '
    "d = {k: v for f in sys.argv[1:] for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; "
    "save({k: v.clone().contiguous() for k, v in d.items()}, 'model.safetensors', {'format': 'pt'})\" "
)


# ---- reading -------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of config.json as it stands; ValueError when it is missing or no JSON object."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; give the path of a downloaded model")
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise ValueError(f"{file} is missing; a model folder needs it beside its weights")
    return read_json(file)


def shards(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a folder, and the tensors that must be in each (None: whatever is in it)."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return {SINGLE: None}
        if pickled := sorted(p.name for p in folder.glob("pytorch_model*.bin")):
            command = CONVERT + " ".join(pickled)
            raise ValueError(f"{folder} has {pickled[0]}, expected safetensors; convert it, in that folder: {command}")
        raise ValueError(f"{folder} has no weights; expected {SINGLE}, or {INDEX} and the files that it names")
    files: dict[str, list[str] | None] = {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map that tells each tensor's file; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} puts {shorten(name, 60)} in {short(file)}, expected a bare *.safetensors file name"
            )
        files.setdefault(file, []).append(name)
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder} lacks {len(missing)} file(s) that {INDEX} names, first {shorten(missing[0], 60)}")
    return files


def read(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor on the CPU) of a folder, each read when it is touched and forgotten with the tensor.

    Raises ValueError for a folder without safetensors, for damaged files, and where index and files differ.
    """
    folder = Path(folder)
    for file, names in shards(folder).items():
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                inside = tensors.keys()
            if names is not None:
                check_names(names, inside, f"{folder / file} and its index disagree")
            for name in inside:
                # Opened anew each time: a file stays in memory, page by page, as long as it is mapped.
                with safe_open(folder / file, framework="pt") as tensors:
                    tensor = tensors.get_tensor(name)
                yield name, tensor
                del tensor
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{folder / file} cannot be read ({shorten(str(e), 100)}); copy or download it again"
            ) from e


def read_tower(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """The vision tower of a CLIP folder, under LongVA's names; with or without `vision_model.` in front."""
    for name, tensor in read(folder):
        if not any(fnmatchcase(name, pattern) for pattern in TEXT_HALF):
            yield TOWER + name.removeprefix("vision_model."), tensor


def check_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Raise ValueError, with the first five on each side, unless the names are the same."""
    expected, found = set(expected), set(found)
    sides = (("missing", expected - found), ("not expected", found - expected))
    if expected != found:
        lists = [f"{len(names)} {side}: {', '.join(sorted(names)[:5])}" for side, names in sides if names]
        raise ValueError(f"{what}; {'; '.join(lists)}")


def fill_strictly(
    parameters: Mapping[str, Tensor],
    stream: Iterable[tuple[str, Tensor]],
    fill: Callable[[Tensor, Tensor], object] | None = None,
    rename: Callable[[str], str] | None = None,
    ignore: Iterable[str] = (),
) -> None:
    """Fill each of `parameters` from the tensor of its name in `stream`: all of them, exactly once.

    fill(parameter, tensor) copies (default: `parameter.copy_`: casts and moves); rename(name in the file) is
    our name for it; ignore: patterns ("*.inv_freq") of names in the file that have no parameter. Raises
    ValueError with the first five names that are missing, not expected, repeated or of another shape.
    """
    ignore = tuple(ignore)
    filled: set[str] = set()
    wrong = []
    for name, tensor in stream:
        if any(fnmatchcase(name, pattern) for pattern in ignore):
            continue
        ours = rename(name) if rename else name
        if ours in filled:
            wrong.append(f"{ours} comes twice")
        elif ours in parameters and parameters[ours].shape != tensor.shape:
            wrong.append(f"{ours} is {list(tensor.shape)}, expected {list(parameters[ours].shape)}")
        elif ours in parameters:
            (fill or copy)(parameters[ours], tensor)
        filled.add(ours)
    if wrong:
        raise ValueError(f"{len(wrong)} tensor(s) do not fit the model of {CONFIG}: {'; '.join(wrong[:5])}")
    check_names(parameters, filled, f"the weights are not those of the model that {CONFIG} describes")


@torch.no_grad()
def copy(parameter: Tensor, tensor: Tensor) -> None:
    """Fill an ordinary parameter, casting and moving."""
    parameter.copy_(tensor)


def fill_from(model: nn.Module, stream: Iterable[tuple[str, Tensor]], fill: Callable | None = None) -> None:
    """Fill all parameters from a stream, strictly: each once, no tensor left over.

    `fill(parameter, tensor)` copies, and knows about shards where there are any. Raises ValueError naming keys.
    """
    parameters = dict(model.named_parameters())
    tied = [] if "lm_head.weight" in parameters else ["lm_head.weight"]
    fill_strictly(parameters, stream, fill, ignore=[*UNUSED, *tied])


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
            vision = ("vision", "visual", "text_embedding", "model.vision", "model.mm_", "model.image_")
            is_vision = name.startswith(vision)
            fan_in = p[0].numel() if p.ndim > 1 else p.numel()
            tensor.normal_(0, fan_in**-0.5 if is_vision else 0.02, generator=generator)
        yield name, tensor


# ---- writing -------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    stream: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder in Hugging Face's layout: config.json, model.safetensors or shards with an index.

    shard_bytes: no file is larger, unless one tensor is; dtype: cast floating tensors to it. Files get their
    names when all are complete, and the rename or removal of the index (else the rename of the single file) turns old
    weights into new ones; config.json follows when the old are removed. A kill leaves the old weights or the new ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs.sweep(folder)
    try:
        in_use = shards(folder)
    except ValueError:  # none yet, or not readable
        in_use = {}
    remove_shards(folder, in_use)  # of killed exports
    drafts = folder / runs.DRAFT.format("shards")
    drafts.mkdir()
    written: list[list[str]] = []
    total = 0
    try:
        for shard in grouped(stream, shard_bytes, dtype):
            # Older readers refuse a file that does not say which framework it comes from.
            with runs.drafted(drafts / str(len(written))) as draft:
                save_file(shard, draft, metadata={"format": "pt"})
                draft.chmod(0o644)  # safetensors makes files that their owner alone can read
            written.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
            del shard  # not to be held while the next is filled
    except OSError:
        runs.sweep(folder)  # a full disk gets its room back
        raise
    files = shard_names(len(written), in_use)
    weight_map = {name: file for file, names in zip(files, written) for name in names}
    assert written and len(weight_map) == sum(map(len, written)), "no tensor, or a name that comes twice"
    for i, file in enumerate(files):
        os.replace(drafts / str(i), folder / file)
    runs.flush(folder)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        runs.replace_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    remove_shards(folder, files)
    runs.replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    drafts.rmdir()


def remove_shards(folder: Path, in_use: Container[str]) -> None:
    """Remove weight files of ours that are not `in_use`."""
    for file in folder.glob("*.safetensors"):
        if file.name not in in_use and (file.name == SINGLE or OUR_SHARD.fullmatch(file.name)):
            file.unlink()


def grouped(
    stream: Iterable[tuple[str, Tensor]], shard_bytes: int, dtype: torch.dtype | None
) -> Iterator[dict[str, Tensor]]:
    """The stream in dictionaries of at most `shard_bytes`, of contiguous tensors on the CPU."""
    shard: dict[str, Tensor] = {}
    size, taken = 0, set()
    for name, tensor in stream:
        to = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        tensor = tensor.detach().to("cpu", to).contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size, taken = {}, 0, set()
        assert name not in shard, f"{name} comes twice"
        # safetensors refuses tensors that share memory (slices of a fused weight): later ones get their own.
        memory = tensor.untyped_storage().data_ptr()
        shard[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
        size += tensor.nbytes
    if shard:
        yield shard


def shard_names(count: int, in_use: Container[str]) -> list[str]:
    """Return file names for `count` shards, none of which is `in_use` (a single file replaces its like)."""
    if count == 1:
        return [SINGLE]
    plain, other = ([f"model-{tag}{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] for tag in ("", "b-"))
    return other if any(name in in_use for name in plain) else plain


def save(folder: Path, stream: Iterable[tuple[str, Tensor]], config: dict[str, Any], tokenizer: Path) -> None:
    """Write the model folder of a run in bfloat16, with the tokenizer of the folder `tokenizer`, and a model card."""
    copy_tokenizer(tokenizer, folder)
    if not (card := folder / "README.md").exists():  # what a user added to it stays
        runs.replace_text(card, runs.model_card(folder.parent))
    write(folder, stream, config, dtype=torch.bfloat16)


def copy_tokenizer(src: str | Path, dst: str | Path) -> None:
    """Copy the tokenizer's and the generation settings' files, so that `dst` is a complete model folder."""
    found = [file for file in TOKENIZER_FILES if (Path(src) / file).is_file()]
    if not found:
        raise ValueError(f"{src} has no tokenizer files to copy; expected one of {', '.join(TOKENIZER_FILES[:6])}")
    Path(dst).mkdir(parents=True, exist_ok=True)
    for file in found:
        with runs.drafted(Path(dst) / file) as draft:
            shutil.copyfile(Path(src) / file, draft)
