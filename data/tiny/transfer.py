"""The paper's title as a curve: how long a film is understood, against how long the text was that was trained on.

What      From one base model, extends twins to texts of 512, 1,024, 2,048 and 4,096 tokens with equally many steps of
          8,192 tokens; the twin of 256 is the control, `--preset tiny-control`, with as many steps. Aligns each alike
          on pictures of at most 256 tokens; then finds the longest film, and the longest text, up to which at least
          nine of ten needles are found. Every step is one of the project's commands, so a killed run continues.
          data/pictures.py draws it.
Paper     Sec. 1 and Sec. 4: long context transfers from language to vision. The paper has one length, 224,000 tokens.
Run       python -m data.tiny.transfer                       the shipped chain, about 70 core-minutes
          python -m data.tiny.transfer --seed 1 --base MODEL    another chain
Dimensions  none
Differs   The paper trains one length; a curve needs several, which only a miniature can afford.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from data import runs
from data.flags import at_least, read_json, run, setting

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("transfer.json")
LENGTHS = (256, 512, 1024, 2048, 4096)  # tokens of the texts trained on
STEP_TOKENS = 8192  # tokens per step of an extension; the control's steps have half as many
FRAMES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # of the films tested
CONTEXTS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # tokens of the texts tested
TOKENS_PER_FRAME = 4
SHIPPED = {  # language model and LongVA of the shipped chain, which the README's commands made
    256: (runs.TINY / "control", runs.TINY / "baseline"),
    2048: (runs.TINY / "extended", runs.TINY / "longva"),
}
BEYOND = 8  # times the trained length: the longest test
FOUND = 0.9  # share of needles that counts as understood
Shares = dict[str, float]  # tokens of a film or text: share of its needles that are found


@dataclass(frozen=True)
class Config:
    """Train and test one chain of the transfer curve, and draw all chains."""

    seed: int | None = setting(None, "seed of the chain's trainings and name of its folder; none: the presets' (ours)")
    base: Path = setting(runs.TINY / "base", "model folder that is extended (ours)")
    tower: Path = setting(runs.TINY / "tower", "vision tower of the alignment (ours)")

    def __post_init__(self):
        at_least(self, seed=0)
        if self.seed is None and (self.base, self.tower) != (runs.TINY / "base", runs.TINY / "tower"):
            raise ValueError("--base and --tower are for another chain than the shipped one; give its --seed, too")


def call(*words: object) -> None:
    """Run one of the project's scripts, and stop where it fails."""
    print("$", *words, flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{words[0]} ended with exit code {done.returncode}; mend that, and run this again")


def shares_found(folder: Path, tokens: int) -> Shares:
    """Return the shares of needles found in a test of vniah.py; `tokens` is how many one unit of its lengths has."""
    probes: dict[int, list[bool]] = {}
    for cell in read_json(folder / "results.json")["cells"]:
        probes.setdefault(cell["length"], []).extend(probe["hit"] for probe in cell["probes"].values())
    return {str(length * tokens): sum(hits) / len(hits) for length, hits in sorted(probes.items())}


def longest(shares: Shares) -> int:
    """Return the greatest length up to which at every length the share found is at least FOUND; 0 for none."""
    reached = 0
    for length, share in sorted((int(length), share) for length, share in shares.items()):
        if share < FOUND:
            break
        reached = length
    return reached


def is_whole(model: Path) -> bool:
    """Return whether a stage exported its model to the end: config.json comes last."""
    return (model / "config.json").is_file()


def train_and_test(cfg: Config, length: int) -> dict[str, Shares]:
    """Extend to texts of `length` tokens, align, and test: what is found in {"film", "text"}."""
    out = Path(f"runs/transfer-{'presets' if cfg.seed is None else cfg.seed}/{length}").absolute()
    seed = [] if cfg.seed is None else ["--seed", cfg.seed]
    language_model, longva = out / "text/model", out / "sft/model"
    if cfg.seed is None and length in SHIPPED:
        language_model, longva = SHIPPED[length]
    if not is_whole(language_model):
        preset = "tiny-control" if length == min(LENGTHS) else "tiny"
        shape = [] if length == min(LENGTHS) else ["--seq-len", length, "--batch", STEP_TOKENS // length]
        call(
            "train_text.py", "--preset", preset, "--weights", cfg.base.absolute(), *shape, *seed, "--out", out / "text"
        )
    if not is_whole(longva):
        if not is_whole(out / "align/model"):
            start = ["--weights", language_model, "--tower", cfg.tower.absolute()]
            call("train_vision.py", "--stage", "align", *start, *seed, "--out", out / "align")
        call("train_vision.py", "--stage", "sft", "--weights", out / "align/model", *seed, "--out", out / "sft")
    same = ["--protocol", "tiny", "--max-new-tokens", 0, "--no-controls"]
    films = [frames for frames in FRAMES if frames * TOKENS_PER_FRAME <= BEYOND * length]
    texts = [context for context in CONTEXTS if context <= BEYOND * length]
    call("vniah.py", "--weights", longva, *same, "--frames", *films, "--out", out / "vniah")
    text = ["--context", *texts, "--distractor-counts", 5]
    call("vniah.py", "text", "--weights", language_model, *same, *text, "--out", out / "vniah-text")
    return {"film": shares_found(out / "vniah", TOKENS_PER_FRAME), "text": shares_found(out / "vniah-text", 1)}


def load() -> dict[str, dict[str, dict[str, Shares]]]:
    """Return {chain: {tokens of the texts trained on: {"film", "text"}}} of all chains."""
    return read_json(FILE) if FILE.exists() else {}


def reached(chains: dict, length: int, kind: str) -> list[int]:
    """Return the longest film, or text, in tokens, that each chain understands after texts of `length` tokens."""
    return [longest(chain[str(length)][kind]) for chain in chains.values() if str(length) in chain]


def table(chains: dict) -> str:
    """Return lines of Markdown, one for each length trained on: the median over chains (lowest to highest)."""
    lines = ["| tokens of the texts trained on | chains | film, tokens | text, tokens |", "|--:|--:|--:|--:|"]
    for length in LENGTHS:
        cells = []
        for kind in ("film", "text"):
            some = reached(chains, length, kind)
            span = f" ({min(some):,} to {max(some):,})" if some and min(some) < max(some) else ""
            cells.append(f"{median_low(some):,}{span}" if some else "")
        lines.append(f"| {length:,} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares_table(chains: dict) -> str:
    """Return lines of Markdown: the share of needles found in films from 512 tokens on, for each length and chain."""
    films = [TOKENS_PER_FRAME * frames for frames in FRAMES if TOKENS_PER_FRAME * frames >= 512]
    lines = ["| texts | chain | " + " | ".join(f"{tokens:,}" for tokens in films) + " |"]
    lines += ["|--:|---|" + "--:|" * len(films)]
    for length in LENGTHS:
        for name, chain in chains.items():
            found = chain.get(str(length), {}).get("film", {})
            cells = [f"{found[str(tokens)]:.2f}" if str(tokens) in found else "" for tokens in films]
            lines += [f"| {length:,} | {name} | {' | '.join(cells)} |"] if found else []
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Train and test what is missing of a chain, then draw all."""
    chains, name = load(), "presets' seeds" if cfg.seed is None else f"seed {cfg.seed}"
    for length in LENGTHS:
        chains.setdefault(name, {})[str(length)] = train_and_test(cfg, length)
        runs.replace_text(FILE, json.dumps(chains) + "\n")
    call("-m", "data.pictures", "transfer")
    print(table(chains), shares_table(chains), sep="\n\n")


if __name__ == "__main__":
    run(main, Config)
