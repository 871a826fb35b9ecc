"""A run's folder, runs/<name>/: its settings, what happened at each step, and a plot; how files are written safely.

What      config.json (the settings), log.jsonl (one line per step), curve.png (the loss). Saved state and the
          exported model lie beside them, in state/ and model/. Every file that any module publishes is written by
          `drafted`, every JSONL file read by `json_lines`; `fingerprints` say whether an input is still the same.
          `free_bytes` and `peak_bytes` of this process.
Paper     None.
Run       imported by all that reads or writes files; of a run's folder rank 0 alone writes
Dimensions  none
Differs   The release logs to Weights & Biases; here a log is a file, and a resumed run continues it without a gap.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data.flags import from_json, read_json

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


def vision_folders(stage: str, system: str, tiny: bool) -> dict[str, Path]:
    """Return where a stage of train_vision.py writes ("out") and what it starts from ("weights", "tower")."""
    folders = {"out": Path(f"runs/{system}-{stage}")}
    if stage == "align" and tiny:
        lm = "control" if system == "tiny-baseline" else "extended"
        folders["weights"] = trained_or_shipped(f"tiny-{lm}", lm)
        folders["tower"] = trained_or_shipped("tiny-tower", "tower")
    elif stage == "dpo" and tiny:
        folders["weights"] = trained_or_shipped(f"{system}-sft", system.removeprefix("tiny-"))
    elif stage != "align":
        before = {"sft": "align", "dpo": "sft"}[stage]
        folders["weights"] = Path(f"runs/{system}-{before}/model")
    return folders


def command_after_vision(stage: str, system: str, tiny: bool) -> str:
    """Return the command after a stage of train_vision.py, {} in place of its model."""
    if stage == "align":
        preset = "tiny" if system == "tiny-longva" else system
        data = "" if tiny else " --data LLAVA.json --images IMAGES"
        return f"{TORCHRUN_8} train_vision.py --stage sft --preset {preset}{data} --weights {{}}"
    if stage == "sft" and not tiny:
        return "python vniah.py --weights {} --haystack FILM.mp4"
    return 'python longva.py "What is shown?" --image PICTURE --weights {}'


# ---- files: written whole or not at all, known by their content, read line by line ---------------

DRAFT = ".draft-{}"  # the name of a file while it is being written
LARGE, SAMPLES, SAMPLE_BYTES = 2**30, 256, 2**20  # of a file in `digest`, bytes but for the number of samples
MAX_LINE_BYTES = 64 * 2**20  # a compressed file of 10 KB can hold a line of gigabytes


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Raise an OSError that names `file` for one of the `with` block: a full disk does not say whose write failed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file} cannot be written ({getattr(error, 'strerror', None) or error})") from error


@contextmanager
def drafted(file: Path) -> Iterator[Path]:
    """Yield the path to write `file` to; when the `with` block ends, it is flushed to the disk and gets its name.

    A kill leaves the old file or the new one, and maybe a draft, which `sweep` removes. Raises OSError that names
    the file, also for a full disk.
    """
    draft = file.with_name(DRAFT.format(file.name))
    try:
        with naming(file):
            yield draft
            publish(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def publish(draft: Path, file: Path) -> None:
    """Give a finished draft its name, both on the disk before this returns."""
    flush(draft)
    os.replace(draft, file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Make sure that a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot do this for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, *patterns: str) -> None:
    """Remove the drafts that killed processes left in `folder`, and what `patterns` match."""
    for pattern in (DRAFT.format("*"), *patterns):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob(".tmp" + 6 * "[A-Za-z0-9]"):  # where safetensors' save_file writes
        if path.is_file():
            path.unlink()


def replace_text(file: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old one or the new one."""
    with drafted(file) as draft:
        draft.write_text(text, encoding="utf-8", errors="replace")  # a path may be no UTF-8


def write_checked(file: Path, content: dict) -> None:
    """Write a JSON object whose damage `read_checked` will notice."""
    replace_text(file, json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n")


def read_checked(file: Path) -> dict:
    """Read it back; {} when there is no such file. Raises ValueError when it is damaged."""
    content = read_json(file)
    if content and content.pop("checksum", None) != checksum(content):
        raise ValueError(f"{file} is damaged; remove it, then run the same command again")
    return content


def checksum(content: dict) -> str:
    """Return a SHA-256 of what JSON can hold, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Return the checksum of a file, 64 hexadecimal digits."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(file: Path) -> str:
    """Return a checksum that tells a file from a changed one, 64 hexadecimal digits; at most 256 MiB are read.

    A file of up to 1 GiB counts in full, a larger one by its size and 256 MiB spread over it: while rank 0 reads 100 GB
    at each start, the other ranks would give up waiting.
    """
    if (size := file.stat().st_size) <= LARGE:
        return sha256(file)
    found = hashlib.sha256(str(size).encode())
    with open(file, "rb") as f:
        for i in range(SAMPLES):
            f.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            found.update(f.read(SAMPLE_BYTES))
    return found.hexdigest()


def fingerprints(paths: Mapping[str, Path | str | None]) -> dict[str, str]:
    """Return what each existing file or folder holds, as 16 hexadecimal digits; "synthetic" and None hold nothing.

    Of a folder, all files below it and their names count, but not hidden ones and texts about it (.md).
    """
    found = {}
    for name, path in paths.items():
        if path in (None, "synthetic") or not Path(path).exists():
            continue
        below = sorted(p for p in Path(path).rglob("*") if p.is_file() and p.suffix != ".md")
        named = [(p.relative_to(path).as_posix(), p) for p in below] if Path(path).is_dir() else [("", Path(path))]
        lines = [f"{digest(file)} {inside}" for inside, file in named if not f"/{inside}".count("/.")]
        found[name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return found


def json_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (first byte, content) of each line that is not blank; of a giant one its beginning, too long to parse."""
    start = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        rest, size = line, len(line)
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES + 1)
            size += len(rest)
        if line.strip():
            yield start, line
        start += size


def parse_line(line: bytes, **kinds: Any) -> dict:
    """Return the JSON object of a line with at least the fields `kinds`, of these types, numbers from 0 to 2**62.

    Raises ValueError that says "kind of fault: what was found" for anything else.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"giant line: more than {MAX_LINE_BYTES:,} bytes")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {str(e)[:80]}") from e
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: found {type(found).__name__}")
    for name, kind in kinds.items():
        if kind is not str or not isinstance(found.get(name), str):  # any text: a model may say half a surrogate pair
            from_json(kind, found.get(name), f"odd value: {name}", 0, 2**62)
    return found


# ---- the folder and its settings -----------------------------------------------------------------

LOCKS: dict[Path, TextIO] = {}  # open while this process lives; the system drops the lock when it ends


def lock(folder: Path) -> None:
    """Lock a run's folder as long as this process lives, where the file system supports locks.

    Waits 3 seconds, since a run that was just killed may still be exiting; then raises ValueError.
    """
    if folder.resolve() in LOCKS:
        return
    file, deadline = open(folder / ".lock", "w"), time.monotonic() + 3  # noqa: SIM115
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


def open_run(folder: Path, settings: dict, inputs: Iterable[str] = (), more_steps: bool = False) -> None:
    """Make and lock the folder, and write settings and fingerprints to config.json.

    Raises ValueError if another process is running there, or if the folder holds a run of other settings. What the
    settings `inputs` name may lie elsewhere, but must hold the same; `folder` may have been moved. more_steps: "steps"
    may grow, as no step depends on it.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file, but a run needs a folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    file, anew = folder / "config.json", f"choose another --out, or remove {folder} to start anew"
    content = fingerprints({name: settings[name] for name in inputs})
    new = json.loads(json.dumps({**settings, "inputs": content}, default=str))
    try:
        old = read_json(file) or new
    except ValueError as error:
        raise ValueError(f"{error}; {anew}") from error
    before, now = old.get("inputs", new["inputs"]), new["inputs"]
    if not isinstance(before, dict):
        raise ValueError(f"{file} is damaged, its inputs are no JSON object; {anew}")
    fixed = [name for name in {**old, **new} if name not in ("out", "inputs", *now)]
    changed = [name for name in fixed if old.get(name) != new.get(name)]
    if "steps" in changed and isinstance(old.get("steps"), int) and more_steps and old["steps"] < new["steps"]:
        changed.remove("steps")
    if changed:
        said = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)[:120]
        if changed == ["usable_records"]:
            raise ValueError(f"{folder}: {said}; bring the missing pictures back, then run the same command again")
        why = "; the learning rate depends on the number of steps" if "steps" in changed else ""
        raise ValueError(f"{folder} holds a run with other settings ({said}); {anew}{why}")
    if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise ValueError(f"{folder} holds a run on other data: the content of {other[0]} has changed; {anew}")
    sweep(folder)
    replace_text(file, json.dumps(new, indent=2) + "\n")


# ---- the log -------------------------------------------------------------------------------------


def log(folder: Path, *lines: dict, name: str = "log.jsonl") -> None:
    """Append JSON lines. They are on the disk before this returns, so no saved state is newer than the log."""
    if not lines:
        return
    with naming(folder / name), open(folder / name, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_log(file: Path, **kinds: Any) -> tuple[list[tuple[bytes, dict]], list[str]]:
    """Return the (line, its JSON) of a log that `parse_line` accepts, and what is wrong with each of the others.

    A last line that was torn when its writer was killed is in neither list. No file is an empty one.
    """
    good, faults = [], []
    if not file.exists():
        return good, faults
    with open(file, "rb") as stream:
        for number, (_, line) in enumerate(json_lines(stream), start=1):
            try:
                good.append((line.removesuffix(b"\n") + b"\n", parse_line(line, **kinds)))
            except ValueError as error:
                faults += [f"line {number}, {error}"] if line.endswith(b"\n") else []
    return good, faults


def truncate_log(folder: Path, step: int | None = None, name: str = "log.jsonl", **kinds: Any) -> list[dict]:
    """Remove the lines of step `step` and later, which will be written again, and damaged ones; return the others.

    A sentence counts the damaged ones: they are no JSON object with at least the fields `kinds`.
    """
    kinds |= {} if step is None else {"step": int}
    good, faults = read_log(folder / name, **kinds)
    kept = [(line, entry) for line, entry in good if step is None or entry["step"] < step]
    if faults:
        print(f"{folder / name}: {len(faults)} damaged line(s) left out, the first: {faults[0]}")
    if (folder / name).exists():
        with drafted(folder / name) as draft:
            draft.write_bytes(b"".join(line for line, _ in kept))
    return [entry for _, entry in kept]


def resume_log(folder: Path, step: int, rank: int, *others: str) -> None:
    """Truncate log.jsonl, on rank 0, for a run that continues at `step`; say so, and what steps the log has lost.

    others: logs of states, which keep the line of this step.
    """
    if rank > 0:
        return
    logged = {entry["step"] for entry in truncate_log(folder, step)}
    for name in others:
        truncate_log(folder, step + 1, name)
    if step:
        print(f"{folder} resumes at step {step}")
    if lost := [n for n in range(step) if n not in logged]:
        print(f"WARNING: {folder / 'log.jsonl'} lacks {len(lost)} of {step} steps, the first: step {lost[0]}")


class Signals:
    """Ctrl-C (SIGINT) and SIGTERM during a loop of steps: the loop can save, then it ends by KeyboardInterrupt.

    sum_over_ranks: adds up a number of each rank, so that all of them stop at one step.
    """

    def __init__(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]):
        self.sum_over_ranks, self.noted, self.stop = sum_over_ranks, [], False

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Yield the steps. A first signal is noted; a second one of its kind (torchrun sends both) acts as ever."""

        def note(number: int, frame: object) -> None:
            self.noted.append(number)
            signal.signal(number, before[number])
            if os.environ.get("RANK", "0") == "0":  # not by print, which may be what was interrupted
                limit = b" (torchrun leaves 30 s, or --shutdown-timeout)" * ("TORCHELASTIC_RUN_ID" in os.environ)
                os.write(2, b"\nsaves after this step" + limit + b", and ends; again: ends at once\n")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in steps:
                yield step
                if self.stop:
                    raise KeyboardInterrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def came(self) -> bool:
        """Return whether this step is the last, as a signal came to some rank. All ranks must call it in each step."""
        self.stop = self.sum_over_ranks(torch.tensor(len(self.noted))).item() > 0
        return self.stop


def sum_finite(step: int, losses: list[float]) -> float:
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
    bar.set_postfix({name: f"{line[name]:.4g}" for name in BAR_KEYS if name in line}, refresh=False)


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
    print(f"next:  {chain.get(folder.name, following.format(shlex.quote(str(folder / 'model'))))}")


def speed(
    tokens_per_s: float, ranks: int, flop_per_token: float, peak_tflop: float, device: torch.device
) -> dict[str, float]:
    """Return what a log line says of speed; mfu, the part of the GPU's peak, on GPUs alone."""
    tflop_per_s = flop_per_token * tokens_per_s / ranks / 1e12
    mfu = {"mfu": round(tflop_per_s / peak_tflop, 4)} if device.type == "cuda" else {}
    return {"tflop_per_s_and_rank": float(f"{tflop_per_s:.4g}"), **mfu, "tokens_per_s": round(tokens_per_s)}


def column(folder: Path, key: str) -> list[float]:
    """Return the values of one key in log.jsonl, in the order of steps."""
    return [entry[key] for _, entry in read_log(folder / "log.jsonl", **{key: float})[0]]


def draw_curve(folder: Path) -> Path:
    """Draw the losses of log.jsonl over the steps, raw and smoothed, as curve.png; a line where texts get longer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [entry for _, entry in read_log(folder / "log.jsonl", step=int, loss=float)[0]]
    steps, losses, smooth = [line["step"] for line in lines], [line["loss"] for line in lines], []
    for loss in losses:
        smooth.append(loss if not smooth else 0.95 * smooth[-1] + 0.05 * loss)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="tab:blue", label="smoothed")
    longest = 0
    for line in lines:
        if (now := line.get("seq_len") or 0) > longest:
            longest = now
            axes.axvline(line["step"], color="0.6", linestyle=":", linewidth=0.8)
            axes.text(line["step"], 1, f" {now:,} tokens", va="top", fontsize=7, transform=axes.get_xaxis_transform())
    axes.set(xlabel="step", ylabel="loss (nats per target)", title=folder.name, yscale="log")
    axes.legend(frameon=False)
    with drafted(folder / "curve.png") as draft:
        figure.savefig(draft, dpi=150, format="png")
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
    rows, bases, earlier, licences = [], [], [], set()
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
        if Path(source).is_relative_to(TINY):
            source = str(Path(source).relative_to(TINY.parents[1]))
        rows.append(f"| {part} | {source} | {licence} |\n")
        licences.add(licence.lower())
        earlier.append(text.partition(HOW)[2])
    based_on = f"base_model: [{', '.join(bases)}]\n" if bases else ""
    head = f"---\n{based_on}license: {'mit' if licences == {'mit'} else 'other'}\n---\n# {folder.name}\n\n{HOW}\n"
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
