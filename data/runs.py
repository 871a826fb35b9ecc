"""A run's folder, runs/<name>/: what was asked for, what happened at each step, and a picture of it.

What      config.json (the settings), log.jsonl (one line per step), curve.png (the loss). Saved state and the
          exported model lie beside them, in state/ and model/.
Run       imported by train_text.py and train_vision.py; rank 0 alone writes.
"""

import json
import os
from pathlib import Path


def open_run(folder: Path, settings: dict) -> None:
    """Make the folder and keep the settings in config.json.

    Raises ValueError where another run, with other settings, lives there: mixing two would spoil both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    text = json.dumps(settings, indent=2, default=str) + "\n"
    if file.exists() and (before := file.read_text()) != text:
        old, new = json.loads(before), json.loads(text)
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in new if old.get(k) != new.get(k)]
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed) or 'some are gone'}); "
            "choose another --out, or remove that folder to start anew"
        )
    file.write_text(text)


def rewind(folder: Path, step: int | None = None, name: str = "log.jsonl") -> None:
    """Forget the lines of step `step` and later: they will be made again. A torn last line goes too."""
    file = folder / name
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if step is None or entry["step"] < step:
            kept.append(line + "\n")
    whole = file.with_suffix(".tmp")
    whole.write_text("".join(kept))
    os.replace(whole, file)


def log(folder: Path, line: dict, name: str = "log.jsonl") -> None:
    """Append one line for programs to read."""
    with open(folder / name, "a") as file:
        file.write(json.dumps(line) + "\n")


def draw_curve(folder: Path) -> Path:
    """Draw the losses of log.jsonl over the steps, raw and smoothed, as curve.png."""
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
    axes.set(xlabel="step", ylabel="loss (nats per target)", title=folder.name)
    axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=150)
    plt.close(figure)
    return folder / "curve.png"
