"""What a change of the code's form must not change: first losses of every stage, needles found, prompts, tensor names.

What      Runs each stage of the miniature for a few steps, on one rank and on two, and a small grid of needles, and
          compares all of it with what was recorded in tests/goldens.json: equal to the last bit on the machine that
          recorded it, and nearly equal on another (a processor decides the order of additions).
Paper     None.
Run       python tests/goldens.py             compare; about two minutes on two cores
          python tests/goldens.py --record    write the file anew, after a change of what is computed
Differs   Nothing to differ from.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "goldens.json"
TEXT, VISION = "train_text.py", "train_vision.py"
SFT = ["--stage", "sft", "--weights", "{out}/align/model"]
RUNS = {  # name: (ranks, command)
    "base": (1, [TEXT, "--preset", "tiny-base", "--steps", 10, "--curriculum-steps", 5]),
    "extended": (1, [TEXT, "--steps", 4, "--batch", 1]),
    "extended, two ranks": (2, [TEXT, "--steps", 4, "--batch", 1]),
    "offloaded": (1, [TEXT, "--steps", 3, "--batch", 1, "--grad-accumulation", 2, "--offload"]),
    "bf16": (1, [TEXT, "--steps", 3, "--batch", 1, "--precision", "bf16", "--mlp-tile", 512]),
    "align": (1, [VISION, "--stage", "align", "--steps", 6]),
    "align, two ranks": (2, [VISION, "--stage", "align", "--steps", 6]),
    "sft": (1, [VISION, *SFT, "--steps", 6]),
    "sft, a ring of two ranks": (2, [VISION, *SFT, "--steps", 6, "--ring", 2]),
    "AnyRes": (1, [VISION, "--stage", "align", "--preset", "tiny-anyres", "--steps", 4]),
    "dpo": (1, [VISION, "--stage", "dpo", "--steps", 2]),
    "needles": (1, ["vniah.py", "--frames", 8, 128, "--needle-count", 6]),
    "needles in text": (1, ["vniah.py", "text", "--context", 128, 1024, "--number-count", 3]),
}


def run(name: str, out: Path) -> dict:
    """What a run leaves: its losses and norms, or its cells and prompts; and the names of what it exports."""
    ranks, command = RUNS[name]
    folder, words = out / name, [str(word).format(out=out) for word in command]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, *words, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // ranks)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    if (folder / "log.jsonl").exists():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        with safe_open(folder / "model" / "model.safetensors", "pt") as file:
            names = sorted(file.keys())
        return {"losses": [[line["loss"], line["norm"]] for line in log], "tensors": names}
    results = json.loads((folder / "results.json").read_text())
    cells = [[cell[key] for key in ("system", "length", "depth", "found")] for cell in results["cells"]]
    for row, cell in zip(cells, results["cells"]):
        row.append([probe["generated_text"] for probe in cell["probes"].values()])
    return {"cells": cells, "prompts": results["systems"]}


def difference(now: object, then: object) -> float:
    """0 for equal, the largest relative difference of numbers of one shape, and infinity for anything else."""
    if isinstance(now, float) and isinstance(then, float):
        return abs(now - then) / max(abs(then), 1e-12)
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return max(map(difference, now, then), default=0.0)
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        return max((difference(now[key], then[key]) for key in now), default=0.0)
    return 0.0 if now == then else float("inf")


def main() -> None:
    """Compare, or record."""
    record = sys.argv[1:] == ["--record"]
    known = {} if record else json.loads(FILE.read_text())
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            found = run(name, Path(folder))
            if record:
                known[name] = found
                continue
            apart = difference(found, known[name])
            worst = max(worst, apart)
            print(f"{name:28} {'equal to the bit' if apart == 0 else f'differs by {apart:.1e}'}", flush=True)
    if record:
        FILE.write_text(json.dumps(known) + "\n")
    sys.exit(worst > 1e-3)


if __name__ == "__main__":
    main()
