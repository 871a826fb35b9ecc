"""Saved state on disk: a folder per step that is there whole or not at all.

What      FOLDER/step-N/ holds rank-R.safetensors for each rank (its rows of every tensor), manifest.json with
          their checksums, and manifest.sha256, the seal of the manifest: a byte that changed anywhere is seen.
          All of it is written as step-N.tmp, flushed and renamed, so a kill leaves a whole state or none.
Paper     Sec. 3.1 trains for two days; something will stop it on the way.
Run       imported by ring.py, which knows the ranks and what each of them holds.
Dimensions  none
Differs   Not torch.distributed.checkpoint: it writes a pickle, which can run code when read, into a folder in
          which two half-written states can mix. Its safetensors storage works, but holds two copies of a
          rank's share while it saves: too much next to parameters kept in CPU memory.
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from data.flags import read_json
from data.runs import DRAFT, drafted, flush, replace_text, sha256, sweep

# ---- files and folders ---------------------------------------------------------------------------

Gather = Callable[[Tensor], list[Tensor]]  # everyone's tensor in rank order; waits for all ranks
MANIFEST, SEAL, PART = "manifest.json", "manifest.sha256", "rank-{}.safetensors"


def saved_steps(folder: Path) -> list[int]:
    """Steps with a state in `folder`, sound or not, in order."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything to save, by key: "model/NAME" and "optimizer/NAME/MOMENT"."""
    found = {}
    for name, p in model.named_parameters():
        found[f"model/{name}"] = p
        found |= {f"optimizer/{name}/{key}": x for key, x in optimizer.state.get(p, {}).items()}
    return found


# ---- writing -------------------------------------------------------------------------------------


def write_part(folder: Path, step: int, tensors: dict[str, Tensor], rank: int) -> str:
    """Write one rank's part of the draft `folder`/step-N.tmp; its checksum, when all of it is on the disk."""
    part = folder / f"step-{step}.tmp" / PART.format(rank)
    part.parent.mkdir(parents=True, exist_ok=True)
    with drafted(part) as draft:
        save_file({key: x.contiguous() for key, x in tensors.items()}, draft)
    return sha256(part)


def save(folder: Path, step: int, tensors: dict[str, Tensor], rank: int, gather: Gather) -> None:
    """Save one rank's tensors, in CPU memory, as its part of `folder`/step-N; all ranks call it together."""
    digest = bytes.fromhex(write_part(folder, step, tensors, rank))
    sums = gather(torch.tensor(list(digest)))  # and by now every part is on disk
    if rank == 0:
        publish(folder, step, [bytes(x.tolist()).hex() for x in sums])
    gather(torch.zeros(1))  # no one goes on before the new state is in place


def publish(folder: Path, step: int, sums: list[str]) -> None:
    """Seal the draft and rename it; the state before it is kept, older ones and what killed saves left go.

    Rank 0 calls it, once all parts are written; `sums`: their checksums, in rank order.
    """
    final, draft = folder / f"step-{step}", folder / f"step-{step}.tmp"
    files = {PART.format(rank): digest for rank, digest in enumerate(sums)}
    replace_text(draft / MANIFEST, json.dumps({"step": step, "ranks": len(sums), "files": files}, indent=2))
    replace_text(draft / SEAL, sha256(draft / MANIFEST))
    if final.exists():  # damaged, or saved twice; the new one takes its place
        final.rename(folder / f"step-{step}.old.tmp")
    draft.rename(final)
    flush(folder)
    for later in saved_steps(folder):  # of a run that had come further
        if later > step:
            shutil.rmtree(folder / f"step-{later}")
    prune(folder)


def prune(folder: Path) -> None:
    """Keep the last two states; older ones go, and what killed processes left."""
    sweep(folder, "step-*.tmp")
    for step in saved_steps(folder)[:-2]:
        shutil.rmtree(folder / f"step-{step}")


# ---- reading -------------------------------------------------------------------------------------


def read_manifest(state: Path) -> dict | None:
    """What a state says it is, or None if that is missing, not what was sealed, or no manifest of ours."""
    text, seal = state / MANIFEST, state / SEAL
    if not (text.is_file() and seal.is_file() and seal.read_bytes() == sha256(text).encode()):
        return None
    found, kinds = read_json(text), {"step": int, "ranks": int, "files": dict}
    whole = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    return found if whole and [*found["files"]] == [PART.format(rank) for rank in range(found["ranks"])] else None


def first_damaged(state: Path, share: slice = slice(None)) -> str | None:
    """The first file of a state that is missing or has changed; None if there is none.

    `share`: which of the ranks' files to read, so that several processes can divide them.
    """
    manifest = read_manifest(state)
    if manifest is None:
        return MANIFEST
    for name in [*manifest["files"]][share]:
        if not (state / name).is_file() or sha256(state / name) != manifest["files"][name]:
            return name
    return None


def newest(folder: Path, rank: int, gather: Gather) -> Path | None:
    """The newest sound state in `folder`, None if nothing was saved; all ranks call it, while no one saves.

    Deletes what killed saves left behind, and prints a sentence about each state that is passed over. Raises
    ValueError if every state is damaged, or if ranks see different folders.
    """
    probe = secrets.randbits(62) if rank == 0 else 0
    probe = folder / DRAFT.format(gather(torch.tensor(probe))[0].item())
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder)
        probe.touch()
    gather(torch.zeros(1))
    steps = saved_steps(folder)
    views = [view.tolist() for view in gather(torch.tensor([probe.exists(), len(steps), sum(steps)]))]
    if rank == 0:
        probe.unlink()
    if any(view != views[0] for view in views):
        raise ValueError(f"ranks see different states in {folder}; all machines must share this folder")
    for state in (folder / f"step-{step}" for step in reversed(steps)):
        bad = first_damaged(state, slice(rank, None, len(views)))  # ranks share the reading
        found = [x.item() for x in gather(torch.tensor([bad is not None]).int())]
        if not any(found):
            return state
        if rank == found.index(1):
            print(f"{state} is not used: {bad} is missing or damaged", flush=True)
    if steps:
        raise ValueError(f"every state in {folder} is damaged; move it away to start again from step 0")
    return None


def join(slices: list) -> Tensor:
    """Read safetensors slices and put their rows together; a single number is saved once."""
    return torch.cat([x[...] for x in slices]) if slices[0].get_shape() else slices[0][...]


def restore(state: Path, model: nn.Module, optimizer: Optimizer, fill: Callable[[Tensor, Tensor], None]) -> int:
    """Fill parameters and moments from a sound state of any number of ranks; the steps it had taken.

    `fill(parameter, tensor)` copies, and knows about shards where there are any. Raises ValueError if the state
    is of another model.
    """
    manifest, saved, parameters = read_manifest(state), {}, dict(model.named_parameters())
    for part in manifest["files"]:
        with safe_open(state / part, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                saved.setdefault(key, []).append(file.get_slice(key))
    if strange := {key[6:] for key in saved if key.startswith("model/")} ^ parameters.keys():
        raise ValueError(f"{state} is of another model: only one of the two has {min(strange)}")
    moments = {}  # of each parameter
    for kind, name, *moment in (key.split("/") for key in saved):
        moments.setdefault(name, set()).update(moment if kind == "optimizer" else ())
    if odd := [name for name, found in moments.items() if found and found != set().union(*moments.values())]:
        raise ValueError(f"{state} lacks a moment of {odd[0]} that others have; remove that folder")
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, slices in saved.items():
        whole, (kind, name, *moment) = join(slices), key.split("/")
        target = parameter = parameters[name]
        if kind == "optimizer":  # AdamW counts its steps on the CPU unless it is fused
            count = torch.zeros((), device=parameter.device if fused else "cpu")
            target = torch.zeros_like(parameter.detach()) if whole.dim() else count
            optimizer.state[parameter][moment[0]] = target
        if whole.shape != target.shape or whole.dtype != target.dtype:
            is_now = f"{target.dtype} {[*target.shape]}"
            raise ValueError(f"{key} was saved as {whole.dtype} {[*whole.shape]}, but the model has {is_now}")
        fill(target, whole)
    return manifest["step"]


# ---- a file of its own ---------------------------------------------------------------------------


def write_sealed(file: Path, name: str, tensor: Tensor) -> None:
    """Write one tensor, on the CPU, and its checksum."""
    digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    with drafted(file) as draft:
        save_file({name: tensor.contiguous()}, draft, {"sha256": digest})


def read_sealed(file: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read it back. Raises ValueError if it is damaged or of another shape."""
    try:
        with safe_open(file, "pt") as opened:
            tensor, digest = opened.get_tensor(name), (opened.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove {file.parent} to start anew") from error
    if tensor.shape != shape or hashlib.sha256(tensor.numpy().tobytes()).hexdigest() != digest:
        raise ValueError(f"{file} is damaged, or not for {shape[0]} samples; remove {file.parent} to start anew")
    return tensor
