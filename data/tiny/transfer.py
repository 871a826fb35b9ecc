"""The paper's title as a curve: how long a film is understood, against how long the text was that was trained on.

What      From one base model, extends twins to texts of 256 (the control), 512, 1,024, 2,048 and 4,096 tokens with
          equal steps of equally many tokens; aligns each alike on pictures of at most 256 tokens; then finds the
          longest film, and the longest text, in which at least nine of ten needles are found. Every step is one of
          the project's commands, so a killed run continues.
Paper     Sec. 1 and Sec. 4: long context transfers from language to vision. The paper has one length, 224,000 tokens.
Run       python -m data.tiny.transfer --seed 1          one chain, about 100 core-minutes; adds to the JSON file
          python -m data.tiny.transfer --draw            the picture alone, from the JSON file
Dimensions  none
Differs   The paper trains one length; a curve needs several, which only a miniature can afford.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data import runs
from data.flags import at_least, run, setting

ROOT = Path(__file__).parents[2]
LENGTHS = (256, 512, 1024, 2048, 4096)  # tokens of the texts trained on
STEP_TOKENS = 8192  # tokens per step of the extension, at every length
FRAMES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # of the films tested
CONTEXTS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # tokens of the texts tested
TOKENS_PER_FRAME = 4
FOUND = 0.9  # share of needles that counts as understood
FILE, PICTURE = ROOT / "data/tiny/transfer.json", ROOT / "assets/transfer.png"


@dataclass(frozen=True)
class Config:
    """Train and test one chain of the transfer curve, and draw all chains."""

    seed: int = setting(1, "seed of the chain's extensions and alignments; its folder is runs/transfer-SEED (ours)")
    base: Path = setting(runs.TINY / "base", "model folder that is extended (ours)")
    tower: Path = setting(runs.TINY / "tower", "vision tower of the alignment (ours)")
    draw: bool = setting(False, "draw the picture from the JSON file, train nothing (ours)")

    def __post_init__(self):
        at_least(self, seed=0)


def call(*words: object) -> None:
    """Run one of the project's scripts, and stop where it fails."""
    print("$", *words, flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{words[0]} ended with exit code {done.returncode}; mend that, and run this again")


def longest(folder: Path, lengths: tuple[int, ...]) -> int:
    """Return the greatest length up to which every length has at least FOUND of its needles found; 0 for none."""
    cells = json.loads((folder / "results.json").read_text())["cells"]
    reached = 0
    for length in lengths:
        hits = [probe["hit"] for cell in cells if cell["length"] == length for probe in cell["probes"].values()]
        if sum(hits) < FOUND * len(hits):
            break
        reached = length
    return reached


def train_and_test(cfg: Config, length: int) -> dict[str, int]:
    """Extend to texts of `length` tokens, align, and test: {"film": tokens, "text": tokens} understood."""
    out = Path(f"runs/transfer-{cfg.seed}/{length}").absolute()
    preset = "tiny-control" if length == min(LENGTHS) else "tiny"  # the control keeps its RoPE base
    shape = ["--seq-len", length, "--batch", STEP_TOKENS // length]
    seed = ["--seed", cfg.seed]
    if not (out / "text/model").exists():
        base = ["--preset", preset, "--weights", cfg.base.absolute()]
        call("train_text.py", *base, *shape, *seed, "--out", out / "text")
    if not (out / "align/model").exists():
        start = ["--weights", out / "text/model", "--tower", cfg.tower.absolute()]
        call("train_vision.py", "--stage", "align", *start, *seed, "--out", out / "align")
    if not (out / "sft/model").exists():
        call("train_vision.py", "--stage", "sft", "--weights", out / "align/model", *seed, "--out", out / "sft")
    same = ["--protocol", "tiny", "--max-new-tokens", 0, "--no-controls"]
    films = tuple(frames for frames in FRAMES if frames * TOKENS_PER_FRAME <= 8 * length)
    texts = tuple(context for context in CONTEXTS if context <= 8 * length)
    call("vniah.py", "--weights", out / "sft/model", *same, "--frames", *films, "--out", out / "vniah")
    text = ["--context", *texts, "--distractor-counts", 5]
    call("vniah.py", "text", "--weights", out / "text/model", *same, *text, "--out", out / "vniah-text")
    return {"film": longest(out / "vniah", films) * TOKENS_PER_FRAME, "text": longest(out / "vniah-text", texts)}


def draw(chains: dict[str, dict[str, dict[str, int]]]) -> None:
    """Draw every chain's points, their medians, and the line where film and trained text are equally long."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(LENGTHS, LENGTHS, ":", color="0.5", label="as long as the texts trained on")
    for kind, label, colour, shift in (("film", "film", "tab:blue", 0.97), ("text", "text", "tab:orange", 1.03)):
        values = [[chain[str(n)][kind] for chain in chains.values() if str(n) in chain] for n in LENGTHS]
        medians = [sorted(some)[len(some) // 2] for some in values if some]
        lengths = [n for n, some in zip(LENGTHS, values) if some]
        axes.plot([n * shift for n in lengths], medians, "o-", color=colour, label=f"longest {label} understood")
        for n, some in zip(LENGTHS, values):
            axes.plot([n * shift] * len(some), some, "_", color=colour, markersize=9)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of the texts trained on",
        ylabel=f"tokens in which {FOUND:.0%} of needles are found",
    )
    axes.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    axes.set_yticks((*LENGTHS, 8192), [f"{n:,}" for n in (*LENGTHS, 8192)])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)


def main(cfg: Config) -> None:
    """Train and test what is missing of a chain, then draw all."""
    chains = json.loads(FILE.read_text()) if FILE.exists() else {}
    for length in () if cfg.draw else LENGTHS:
        chains.setdefault(str(cfg.seed), {})[str(length)] = train_and_test(cfg, length)
        runs.replace_text(FILE, json.dumps(chains, indent=1) + "\n")
    if not chains:
        raise ValueError(f"{FILE} is not there yet; run without --draw first")
    draw(chains)
    for seed, chain in chains.items():
        for length, found in chain.items():
            print(f"seed {seed}: text of {int(length):,} tokens: {found['film']:,} of film, {found['text']:,} of text")
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    run(main, Config)
