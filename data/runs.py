"""A run's folder, runs/<name>/: its settings, what happened at each step, and a plot; the memory of the machine.

What      config.json (the settings), log.jsonl (one line per step), curve.png (the loss). Saved state and the
          exported model lie beside them, in state/ and model/. `free_bytes` and `peak_bytes` of this process.
Paper     None.
Run       imported by train_text.py, train_vision.py and vniah.py (cells.jsonl); rank 0 alone writes.
Dimensions  none
Differs   The release logs to Weights & Biases; here a log is a file, and a resumed run continues it without a gap.
"""

import fcntl
import json
import math
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from data.flags import read_json

TINY = Path(__file__).parent / "tiny"  # the shipped models
PROCESS = 350_000_000  # bytes of Python and torch themselves, on a CPU
BAR_KEYS = ("loss", "margin", "preferred", "norm", "tokens_per_s", "samples_per_s", "mfu", "gb")  # in the progress bar
TORCHRUN, TORCHRUN_8 = "torchrun --nproc-per-node 2", "torchrun --nproc-per-node 8"
MINIATURE = {  # run of the miniature: the command after it
    "tiny-base": f"{TORCHRUN} train_text.py",
    "tiny-extended": "python train_text.py --preset tiny-control",
    "tiny-control": "python -m data.tiny.make tower",
    "tiny-tower": f"{TORCHRUN} train_vision.py --stage align",
    "tiny-longva-align": f"{TORCHRUN} train_vision.py --stage sft",
    "tiny-longva-sft": f"{TORCHRUN} train_vision.py --stage align --preset tiny-baseline",
    "tiny-baseline-align": f"{TORCHRUN} train_vision.py --stage sft --preset tiny-baseline",
    "tiny-baseline-sft": f"{TORCHRUN} train_vision.py --stage align --preset tiny-anyres",
    "tiny-anyres-align": f"{TORCHRUN} train_vision.py --stage sft --preset tiny-anyres",
    "tiny-anyres-sft": f"{TORCHRUN} train_vision.py --stage align --preset tiny-anyres-pooled",
    "tiny-anyres-pooled-align": f"{TORCHRUN} train_vision.py --stage sft --preset tiny-anyres-pooled",
    "tiny-anyres-pooled-sft": "python vniah.py --own",
}


def trained_or_shipped(run: str, shipped: str) -> Path:
    """Return the model folder that a run left in runs/, else the shipped one that the same command made."""
    own = Path("runs") / run / "model"
    return own if (own / "config.json").is_file() else TINY / shipped


LOCKS: dict[Path, TextIO] = {}  # open while this process lives; the system drops the lock when it ends


def lock(folder: Path, patience: float = 3.0) -> None:
    """Lock a run's folder as long as this process lives, where the file system supports locks.

    Waits `patience` seconds, since a run that was just killed may still be exiting; then raises ValueError.
    """
    if folder.resolve() in LOCKS:
        return
    file, deadline = open(folder / ".lock", "w"), time.monotonic() + patience  # noqa: SIM115
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                file.close()
                raise ValueError(f"another run writes to {folder}; let it end, or choose another --out") from error
            time.sleep(0.1)
            continue
        except OSError:  # some network file systems have none
            pass
        LOCKS[folder.resolve()] = file
        return


def open_run(folder: Path, settings: dict) -> None:
    """Make and lock the folder, and write the settings to config.json.

    Raises ValueError if another process is running there, or if the folder holds a run with other settings.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file, but a run needs a folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    file = folder / "config.json"
    new = json.loads(json.dumps(settings, default=str))
    if file.exists():
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}); remove {folder} to start anew") from error
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another --out, "
                "or remove that folder to start anew"
            )
    replace_text(file, json.dumps(new, indent=2) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = file.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, file)


def truncate_log(folder: Path, step: int | None = None, name: str = "log.jsonl") -> None:
    """Remove the lines of step `step` and later, which will be written again, and torn lines."""
    file = folder / name
    if not file.exists():
        return
    kept = [line + "\n" for line, entry in entries(file) if step is None or entry["step"] < step]
    replace_text(file, "".join(kept))


def entries(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield (line, its JSON) of a log; a line that was torn when its writer was killed is left out."""
    for line in file.read_text(errors="replace").splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            continue


def log(folder: Path, line: dict, name: str = "log.jsonl") -> None:
    """Append one JSON line."""
    try:
        with open(folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"{folder / name} cannot be written ({error.strerror})") from error


def finite(step: int, losses: list[float]) -> float:
    """Sum the micro-batches' shares of a step's loss; FloatingPointError, before the update, if one is not finite."""
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            where = f"step {step}" + (f", micro-batch {i} of {len(losses)}" if len(losses) > 1 else "")
            raise FloatingPointError(f"{where}: the loss is {loss}; stopped before it reached the parameters")
    return sum(losses)


def log_step(folder: Path, line: dict, bar: tqdm, device: torch.device) -> None:
    """Append a step's line to log.jsonl, with the memory held, and show the main values in the progress bar."""
    line = line | {"gb": round(peak_bytes(device) / 1e9, 3)}
    log(folder, line)
    bar.set_postfix({name: f"{line[name]:.4g}" for name in BAR_KEYS if name in line})


def print_verdict(loss: float, score: float, expected: tuple[float, ...]) -> None:
    """Print a stage's held-out loss and score beside what is `expected`, (loss at most, score at least); () for no one.

    A warning follows where it missed: a stage that learned nothing ends like one that learned all.
    """
    if not expected:
        return
    most, least = expected
    scores = f"loss {loss:.4f} (expected at most {most:g}), score {score:.3f} (expected at least {least:g})"
    tqdm.write(f"held-out: {scores}")
    if not (loss <= most and score >= least):
        tqdm.write("WARNING: this stage missed what it should reach; so will what is built on it; try another --seed")


def print_end(folder: Path, following: str) -> None:
    """Print where a finished run's files are, and the next command: the miniature's, else `following`."""
    print(f"model: {folder / 'model'}   log: {folder / 'log.jsonl'}   loss curve: {draw_curve(folder)}")
    chain = MINIATURE if folder.parent == Path("runs") else {}  # those commands take models from there
    print(f"next:  {chain.get(folder.name, following.format(folder / 'model'))}")


def speed(
    tokens_per_s: float, ranks: int, flop_per_token: float, peak_tflop: float, device: torch.device
) -> dict[str, float]:
    """Return what a log line says of speed; mfu, the part of the GPU's peak, on GPUs alone."""
    tflop_per_s = flop_per_token * tokens_per_s / ranks / 1e12
    mfu = {"mfu": round(tflop_per_s / peak_tflop, 4)} if device.type == "cuda" else {}
    return {"tflop_per_s_and_rank": float(f"{tflop_per_s:.4g}"), **mfu, "tokens_per_s": round(tokens_per_s)}


def column(folder: Path, key: str) -> list[float]:
    """Return the values of one key in log.jsonl, in the order of steps."""
    file = folder / "log.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [line[key] for line in lines if key in line]


def draw_curve(folder: Path) -> Path:
    """Draw the losses of log.jsonl over the steps, raw and smoothed, as curve.png; where sequences change, a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, losses, smooth = [line["step"] for line in lines], [line["loss"] for line in lines], []
    for loss in losses:
        smooth.append(loss if not smooth else 0.95 * smooth[-1] + 0.05 * loss)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="tab:blue", label="smoothed")
    for before, line in zip([{}, *lines], lines):
        if (now := line.get("seq_len")) and now != before.get("seq_len"):
            axes.axvline(line["step"], color="0.6", linestyle=":", linewidth=0.8)
            axes.text(line["step"], 1, f" {now:,} tokens", va="top", fontsize=7, transform=axes.get_xaxis_transform())
    axes.set(xlabel="step", ylabel="loss (nats per target)", title=folder.name, yscale="log")
    axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=150)
    plt.close(figure)
    return folder / "curve.png"


def versions() -> dict[str, str]:
    """Return the version of every package that takes part in a result."""
    found = {}
    for name in ("torch", "numpy", "pillow", "av", "safetensors", "tiktoken", "sentencepiece"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---- the model card ------------------------------------------------------------------------------

PARTS = {"weights": "model to start from", "tower": "vision tower", "corpus": "text", "data": "pictures and questions"}
HOW = "## How it was made\n"  # what follows is repeated in the card of every model that starts from this one


def model_card(folder: Path) -> str:
    """Return the README.md of the model that a run made: the command, the parts and their licences, and its bases'."""
    settings = read_json(folder / "config.json")
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun sets it
    start = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    command = shlex.join([*start, Path(sys.argv[0]).name, *sys.argv[1:]])
    rows, bases, earlier = [], [], []
    for name, part in PARTS.items():
        if not (source := settings.get(name)):
            continue
        card = Path(source, "README.md")
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        ours = source == "synthetic" or Path(source).is_relative_to(TINY)
        licence = "MIT" if ours else "not stated there"
        if stated := re.search(r"^license: *(.+)$", text, re.MULTILINE):
            licence = stated[1]
        if in_cache := re.search(r"models--(.+)--([^/]+)/snapshots/", source):  # its name in the Hub
            source = f"{in_cache[1]}/{in_cache[2]}"
            bases.append(source)
        rows.append(f"| {part} | {source} | {licence} |\n")
        earlier.append(text.partition(HOW)[2])
    based_on = f"base_model: [{', '.join(bases)}]\n" if bases else ""
    head = f"---\n{based_on}license: other\n---\n# {folder.name}\n\n{HOW}\n"
    table = "| part | from | licence |\n|---|---|---|\n" + "".join(rows)
    return f"{head}    {command}\n\n{table}{''.join(earlier)}"


# ---- memory of this machine ----------------------------------------------------------------------


def pick_device(name: str) -> str:
    """Return "cuda" or "cpu" for a --device of "auto", else the name itself."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def free_bytes(device: str, ranks: int) -> int:
    """Bytes that a process can take: what is free on its GPU, or its share of the memory that the CPU may use."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's: cgroups of version 2 and 1
        path = Path("/sys/fs/cgroup", file)
        limits += [int(text) for text in [path.read_text().strip()] if text != "max"] if path.is_file() else []
    return min(limits) // ranks - PROCESS


def check_free(needed: int, device: str, ranks: int, what: str) -> None:
    """Raise ValueError if `what` takes more bytes of each rank than are free."""
    if needed > (free := free_bytes(device, ranks)):
        sizes = f"{needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB can be had"
        raise ValueError(f"{what} take {sizes}; give fewer --frames or --max-tokens (see --plan)")


def peak_bytes(device: torch.device) -> int:
    """Most bytes that this process has held so far: of tensors on a GPU, or in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
