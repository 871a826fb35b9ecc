"""V-NIAH: find one frame in a haystack of thousands (Sec. 4), and its twin for text (App. A).

What      `vision` hides a picture among the frames of a film and asks about it, at every length and depth;
          `text` hides a number in a story. One score: every token of the answer must be the likeliest.
Paper     Sec. 4 and Fig. 4 (V-NIAH), App. A and Fig. 7 (needles in text).
Run       python vniah.py                                       the four systems of the miniature Figure 4
          python vniah.py text                                  the language models alone
          python vniah.py --haystack FILM.mp4 --needles FOLDER  your film (1 frame per second), your needles
          python vniah.py --weights LongVA-7B --frames 200 400 800 --haystack FILM.mp4 --needles FOLDER
Key       B probes read together   T tokens   D LM width   M tokens per frame   A tokens of the answer
Deviates  A few distractors (frames with other things and other numbers) lie in the haystack, else the only
          number would be the answer; --distractors 0 is the paper's test.
          The paper reads each probe on 8 GPUs through the ring; here one process does, in pieces (chunked prefill).
          Numbers in text are drawn anew for each cell. With your own --needles there are no distractors.
          The part of a haystack before the needle is read once for all needles, into a cache; nothing is padded.
          Intervals are Wilson's at 95 %, over all probes; the same needles come at every length and depth, so that
          probes are not independent, and other needles may differ by more. The same questions without the needle
          show what guessing gives.

Killed and started again it goes on where it was; the same numbers come out.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import longva
import ring
import unires
from data import chat, needles, runs, synthetic, tokenizer, video, weights
from data.flags import at_least, knob, run


@dataclass(frozen=True)
class Config:
    """Needle in a haystack, of frames or of text (Sec. 4, App. A)."""

    task: Literal["vision", "text"] = knob("vision", "what the haystack is made of (Sec. 4, App. A)", positional=True)
    weights: Path | None = knob(None, "one model folder; none: the shipped systems of Figure 4 (ours)")
    own: bool = knob(False, "test what the training commands left in runs/, not the shipped models (ours)")
    out: Path | None = knob(None, "folder of results (ours: runs/vniah-TASK-MODEL)")
    haystack: str = knob("synthetic", "a film, a folder of pictures or of .txt, or synthetic (Sec. 4)")
    needles: Path | None = knob(None, "folder with pictures and questions.json; none: drawn from the seed (Sec. 4)")
    needle_count: int = knob(5, "needles drawn from the seed (Sec. 4)")
    number_count: int = knob(5, "magic numbers asked for in each cell of a story (App. A)")
    frames: tuple[int, ...] = knob(tuple(range(200, 3001, 200)), "frames of the haystack (Sec. 4)")
    context: tuple[int, ...] = knob(tuple(range(32_000, 512_001, 32_000)), "tokens of the story (App. A)")
    depths: tuple[float, ...] = knob((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "where the needle lies, 0 first (Sec. 4)")
    distractors: int = knob(0, "look-alikes in a haystack of frames (ours)")
    distractor_counts: tuple[int, ...] = knob((0, 3, 5), "other cities' numbers in a story (App. A)")
    digits: int = knob(7, "digits of a magic number (release: eval_needle.py)")
    rope_theta: tuple[float, ...] = knob((3e6, 1e7, 1e8, 1e9), "RoPE bases to try on the baseline, untrained (Fig. 4)")
    trained_on: int | None = knob(
        None, "tokens the model was trained at, for the dotted line; none: its config's (ours)"
    )
    seed: int = knob(7, "of needles, film and story; training never uses it (ours)")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, digits=1, rope_theta=1, trained_on=1, needle_count=1, number_count=1, seed=0)
        most = len(needles.DISTRACTORS)
        for name in ("frames", "context"):
            if list(getattr(self, name)) != sorted({n for n in getattr(self, name) if n > 0}):
                raise ValueError(f"--{name} {getattr(self, name)}: name each length once, from short to long, above 0")
        if min(self.distractor_counts) < 0 or max(self.distractor_counts) > most:
            raise ValueError(
                f"--distractor-counts {self.distractor_counts}: there are {most} other cities, 0 to {most} go"
            )
        if not 0 <= self.distractors < len(synthetic.THINGS):
            raise ValueError(f"--distractors {self.distractors}: 0 to {len(synthetic.THINGS) - 1} go, one a thing")
        for depth in self.depths:
            needles.place(1, depth)  # refuses what is outside 0..1


PRESETS = {  # 90 seconds on two CPU cores; the paper's, by estimate: 2 hours on 8 A100s for pictures, 5 for text
    "tiny": {
        "needle_count": 20, "frames": (8, 32, 56, 128, 256, 512),
        "number_count": 8, "context": (128, 256, 512, 1024, 2048, 3072),
        "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "distractors": 3, "digits": 3, "rope_theta": (3e4, 1e5, 1e6),
    },
    "longva": {},
}  # fmt: skip
AT_ONCE = 2**17  # tokens read together, over all probes of a batch; longer haystacks are read one by one


@dataclass(frozen=True)
class Panel:
    """One heatmap: a model and what is asked of it."""

    name: str
    folder: Path
    rope_theta: float | None = None  # in place of the one it was trained with
    distractors: int = 3
    needle: bool = True  # False: the control, the same questions with the needle left out
    trial: bool = False  # True: other needles and another haystack, to choose a RoPE base by


Cells = dict[tuple[str, int, float], list[bool]]  # (panel, length, depth) -> was each needle found?


# -------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def exact_match(model: longva.LM, x_BTD: Tensor, answer_BA: Tensor, cache: longva.KVCache) -> list[bool]:
    """Read prompts behind what `cache` holds: is each token of the answer the likeliest one? (Sec. 4)

    The answer is fed as given, not as generated, so that all of its tokens are judged in one pass.
    """
    A = answer_BA.shape[1]
    x_BTD = torch.cat([x_BTD, model.embed(answer_BA[:, :-1])], dim=1)
    longva.read(model, x_BTD[:, :-A], cache)
    h_BAD = longva.read(model, x_BTD[:, -A:], cache)
    return (model.logits(h_BAD).argmax(-1) == answer_BA).all(1).tolist()


def alike(sizes: list, tokens: int) -> list[list[int]]:
    """Indices of probes of one size each, which can be read together; not too many of `tokens` tokens at once."""
    most = max(1, AT_ONCE // max(1, tokens))
    groups = [[i for i, found in enumerate(sizes) if found == size] for size in sorted(set(sizes))]
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


class Film:
    """V-NIAH: the film and the needles as one model sees them, and every cell of its panel (Sec. 4)."""

    def __init__(self, cfg: Config, panel: Panel, model: longva.LongVA, words: tokenizer.Tokenizer):
        self.panel, self.model, self.frames = panel, model, 0
        hidden, signs = pick_needles(cfg, panel)
        pre, post = chat.template_ids(words)
        self.pre_1TD = model.embed(torch.tensor([pre], device=model.device))
        self.answers = [words.encode(needle.answer) for needle in hidden]
        self.asks = [words.encode("\n" + needle.question.removeprefix("\n")) + post for needle in hidden]
        longest = max(cfg.frames)
        self.film_NMD = self.look(tqdm(open_film(cfg, panel, longest), "film", longest, leave=False))
        if len(self.film_NMD) < longest:
            raise ValueError(
                f"{cfg.haystack} gives {len(self.film_NMD)} frames at 1 per second, but the longest haystack has "
                f"{longest}; take a longer film or name shorter lengths, such as --frames {len(self.film_NMD)}"
            )
        self.needle_NMD = self.look(needle.picture for needle in hidden)
        self.sign_NMD = self.look(sign.picture for sign in signs) if signs else self.film_NMD[:0]

    def look(self, pictures) -> Tensor:  # noqa: ANN001
        """Visual tokens of each picture, x_NMD; letterboxed, as V-NIAH shows frames."""
        M = (self.model.config.vision.patches // 2) ** 2
        grids = (unires.frame(picture, self.model.config.vision.side, "pad") for picture in pictures)
        return torch.cat(list(longva.watch(self.model, grids))).unflatten(0, (-1, M))

    @torch.no_grad()
    def lay_out(self, frames: int) -> None:
        """Read a haystack of so many frames, its distractors evenly spread, into a cache that all needles share."""
        self.frames, self.hay_NMD = frames, self.film_NMD[:frames].clone()
        signs = self.sign_NMD[:frames]
        for i, sign_MD in enumerate(signs):
            self.hay_NMD[int((i + 0.5) * frames / len(signs))] = sign_MD
        x_1TD = torch.cat([self.pre_1TD, self.hay_NMD.flatten(0, 1)[None]], dim=1)
        self.cache = None  # the old haystack goes before the new one is read
        self.cache = longva.KVCache(self.model.model.config, 1, x_1TD.shape[1], x_1TD)
        longva.read(self.model, x_1TD, self.cache)

    def cell(self, frames: int, depth: float) -> list[bool]:
        """Was each needle found at this length and depth? It is inserted, so that frames + 1 are seen."""
        if frames != self.frames:
            self.lay_out(frames)
        at = needles.place(frames, depth)
        before = self.pre_1TD.shape[1] + at * self.hay_NMD.shape[1]
        found = [False] * len(self.asks)
        sizes = [(len(ask), len(answer)) for ask, answer in zip(self.asks, self.answers)]
        for group in alike(sizes, frames * self.hay_NMD.shape[1]):
            rest_BTD = self.hay_NMD[at:].flatten(0, 1).expand(len(group), -1, -1)
            ask_BTD = self.model.embed(torch.tensor([self.asks[i] for i in group], device=rest_BTD.device))
            hidden_BMD = self.needle_NMD[group] if self.panel.needle else rest_BTD[:, :0]
            x_BTD = torch.cat([hidden_BMD, rest_BTD, ask_BTD], dim=1)
            answer_BA = torch.tensor([self.answers[i] for i in group], device=x_BTD.device)
            cache = self.cache.branch(before, len(group), x_BTD.shape[1] + answer_BA.shape[1])
            for i, hit in zip(group, exact_match(self.model, x_BTD, answer_BA, cache)):
                found[i] = hit
            del cache  # before the next one is made: it may be the larger part of a GPU
        return found


def open_film(cfg: Config, panel: Panel, frames: int) -> Iterator:
    """The haystack's pictures, one per second of film, as a stream."""
    if cfg.haystack == "synthetic":
        return islice(synthetic.film(cfg.seed + 1000 * panel.trial), frames)
    return (picture for _, picture in islice(video.frames(cfg.haystack, fps=1.0), frames))


def pick_needles(cfg: Config, panel: Panel) -> tuple[list[needles.Needle], list[needles.Needle]]:
    """The needles, and the distractors: needles of other things, which no question asks about."""
    if cfg.needles:
        return needles.read_needles(cfg.needles), []
    count = cfg.needle_count if not panel.trial else 8
    return synthetic.draw_needles(cfg.seed + 1000 * panel.trial, count, panel.distractors)


class Story:
    """Needles in text: a story, a magic number hidden in it, other cities' numbers as distractors (App. A)."""

    def __init__(self, cfg: Config, panel: Panel, model: longva.LM, words: tokenizer.Tokenizer):
        self.cfg, self.panel, self.model, self.words = cfg, panel, model, words
        self.stops = needles.period_ids(words.encode)
        if cfg.haystack == "synthetic":
            text = synthetic.story(cfg.seed + 1000 * panel.trial, max(cfg.context))
        else:
            text = needles.read_text_haystack(cfg.haystack)
        self.ids = words.encode(text)

    def probes(self, context: int, depth: float) -> list[tuple[list[int], list[int]]]:
        """(ids, ids of the answer) of every probe of a cell; numbers and places are drawn anew for each."""
        rng = np.random.RandomState([self.cfg.seed, self.panel.trial, context, round(100 * depth)])
        made = []
        for _ in range(self.cfg.number_count):
            number, *others = needles.numbers(rng, 1 + self.panel.distractors, self.cfg.digits)
            lies = list(zip(needles.DISTRACTORS, others))
            probe = (self.words.encode, self.ids, context, depth, number, lies, rng, self.stops)
            made.append(needles.text_probe(*probe))
        return made

    def cell(self, context: int, depth: float) -> list[bool]:
        """Was each number found at this length and depth?"""
        probes = self.probes(context, depth)
        found = [False] * len(probes)
        for group in alike([len(ids) for ids, _ in probes], context):
            ids_BT = torch.tensor([probes[i][0] for i in group], device=self.model.device)
            answer_BA = torch.tensor([probes[i][1] for i in group], device=self.model.device)
            x_BTD = self.model.embed(ids_BT)
            room = x_BTD.shape[1] + answer_BA.shape[1]
            cache = longva.KVCache(self.model.model.config, len(group), room, x_BTD)
            for i, hit in zip(group, exact_match(self.model, x_BTD, answer_BA, cache)):
                found[i] = hit
        return found


# ------------------------------------------------------------------------------------------- the probe loop


class Bench:
    """The models under test, each loaded once, with what it has seen of the film."""

    def __init__(self, cfg: Config):
        self.cfg, self.tests = cfg, {}

    def test(self, panel: Panel) -> Film | Story:
        """The test of a panel, made or made over from another panel of the same model."""
        key = (panel.folder, panel.trial)
        if key not in self.tests:
            model = longva.load(panel.folder, ring.start(self.cfg.device).device)
            if self.cfg.task == "vision" and not isinstance(model, longva.LongVA):
                raise ValueError(f"{panel.folder} is a language model and cannot see; try: python vniah.py text")
            kind, words = Film if self.cfg.task == "vision" else Story, tokenizer.load_tokenizer(panel.folder)
            self.tests[key] = kind(self.cfg, panel, model, words), model.model.config.rope_theta
        test, trained_theta = self.tests[key]
        test.panel, test.frames = panel, 0  # frames: what the film's cache holds was read with another RoPE base
        config = test.model.model.config
        test.model.model.config = replace(config, rope_theta=panel.rope_theta or trained_theta)
        return test

    def probe(self, panels: list[Panel], lengths: tuple, depths: tuple, cells: Cells, bar: tqdm) -> None:
        """Fill in the cells of `panels` that are not there yet, and keep each on disk as soon as it is known."""
        for panel in panels:
            keys = [(panel.name, length, depth) for length in lengths for depth in depths]
            todo = [key for key in keys if key not in cells]
            bar.update(len(keys) - len(todo))
            if not todo:
                continue
            bar.set_description(panel.name[:40])
            test = self.test(panel)
            for name, length, depth in todo:
                cells[name, length, depth] = hits = test.cell(length, depth)
                line = {"panel": name, "length": length, "depth": depth, "hits": [int(hit) for hit in hits]}
                runs.log(self.cfg.out, line, CELLS)
                bar.update()


# ------------------------------------------------------------------------------------------------- figures


def rate(cells: Cells, panel: Panel, length: int | None = None, depth: float | None = None) -> tuple[int, int]:
    """(hits, trials) over the cells of a panel that match."""
    hits = [
        hit
        for (name, at, deep), found in cells.items()
        if name == panel.name and length in (None, at) and depth in (None, deep)
        for hit in found
    ]
    return sum(hits), len(hits)


def table(cells: Cells, panels: list[Panel], lengths: tuple, unit: str) -> str:
    """Hit rates per length, and over all lengths with Wilson's 95 % interval, as lines of text."""
    width = max(len(panel.name) for panel in panels)
    lines = [f"{unit:>{width}} " + "".join(f"{length:>7}" for length in lengths) + "    mean  95 % interval"]
    for panel in panels:
        known = [length for length in lengths if rate(cells, panel, length)[1]]
        row = "".join(
            f"{rate(cells, panel, n)[0] / rate(cells, panel, n)[1]:7.2f}" if n in known else " " * 7 for n in lengths
        )
        hits, trials = rate(cells, panel)
        low, high = needles.wilson(hits, trials)
        lines.append(f"{panel.name:>{width}} {row}    {hits / trials:.3f}  {low:.3f} to {high:.3f}  (n={trials})")
    return "\n".join(lines)


def heatmap(
    file: Path, cells: Cells, panels: list[Panel], lengths: tuple, depths: tuple, lines: list[float], unit: str
) -> None:
    """Draw one heatmap per panel, length across and depth down, as the paper's Figure 4; dotted: trained until here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cols = 2 if len(panels) in (2, 4) else 3
    rows = -(-len(panels) // cols)
    figure, axes = plt.subplots(rows, cols, figsize=(4.6 * cols, 2.5 * rows + 0.4), layout="constrained", squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, panel, line in zip(axes.flat, panels, lines):
        grid = np.array([[np.mean(cells[panel.name, n, d]) for n in lengths] for d in depths])
        picture = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, x in np.ndindex(*grid.shape):
            ax.text(
                x, y, f"{grid[y, x]:.2f}", ha="center", va="center", fontsize=7, color="w" if grid[y, x] < 0.6 else "k"
            )
        ax.set_xticks(range(len(lengths)), lengths)
        ax.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
        ax.set(xlabel=unit, ylabel="depth", title=f"{panel.name}: {grid.mean():.2f}")
        ax.axvline(np.interp(line, lengths, range(len(lengths))), color="w", linestyle=":")
    figure.colorbar(picture, ax=axes, label="found", shrink=0.8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------- main

CELLS = "cells.jsonl"


def system(cfg: Config, name: str) -> Path:
    """The folder of one system of the miniature: the shipped one, or the reader's own."""
    stage = "" if name in ("extended", "control") else "-sft"
    return runs.made(f"tiny-{name}{stage}", name) if cfg.own else runs.TINY / name


def systems(cfg: Config) -> tuple[list[Panel], list[Panel], list[Panel]]:
    """The figure's panels, the controls, and the trials that choose a RoPE base for the baseline."""
    if cfg.task == "vision":
        if cfg.weights:
            one = Panel(cfg.weights.name, cfg.weights, distractors=cfg.distractors)
            return [one], [replace(one, name=f"{one.name}, no needle", needle=False)], []
        panels = [
            Panel("(i) LongVA", system(cfg, "longva"), None, cfg.distractors),
            Panel("(ii) LongVA, AnyRes", system(cfg, "anyres"), None, cfg.distractors),
            Panel("(iii) not extended", system(cfg, "baseline"), None, cfg.distractors),
        ]
        controls = [replace(panels[0], name="(i) without needle", needle=False)]
        trials = [replace(panels[2], name=f"trial {t:g}", rope_theta=t, trial=True) for t in cfg.rope_theta]
        return panels, controls, trials
    if cfg.weights:
        return (
            [Panel(f"{cfg.weights.name}, {n} distractors", cfg.weights, None, n) for n in cfg.distractor_counts],
            [],
            [],
        )
    control = system(cfg, "control")
    folders = {"extended": system(cfg, "extended"), "not extended": control}
    panels = [
        Panel(f"{name}, {n} distractors", at, None, n) for name, at in folders.items() for n in cfg.distractor_counts
    ]
    most = max(cfg.distractor_counts)
    return panels, [], [Panel(f"trial {t:g}", control, t, most, trial=True) for t in cfg.rope_theta]


def main(cfg: Config) -> None:
    """Probe every cell that is not known yet, then print the table and draw the figure."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("vniah.py runs as one process for now; start it with python, not torchrun")
    model = cfg.weights.resolve().name if cfg.weights else "own" if cfg.own else "tiny"
    cfg = replace(cfg, out=cfg.out or Path(f"runs/vniah-{cfg.task}-{model}"))
    lengths, unit = (cfg.frames, "frames") if cfg.task == "vision" else (cfg.context, "tokens")
    panels, controls, trials = systems(cfg)
    asked = {panel.folder for panel in (*panels, *trials)}
    stamp = asdict(cfg) | {"weights": {str(folder): weights.sha(folder) for folder in sorted(asked)}}
    cells, bench = read_cells(cfg.out, stamp), Bench(cfg)
    print("testing " + ", ".join(sorted(os.path.relpath(folder) for folder in asked)))

    middle = cfg.depths[len(cfg.depths) // 2 :][:1]
    counts = [(panels, lengths, cfg.depths), (controls, lengths, middle), (trials, lengths[-2:], cfg.depths[::2])]
    size = sum(len(p) * len(n) * len(d) for p, n, d in counts) + bool(trials) * len(lengths) * len(cfg.depths)
    with tqdm(total=size) as bar:
        for some, at, deep in counts:
            bench.probe(some, at, deep, cells, bar)
        if trials:
            best = max(trials, key=lambda trial: rate(cells, trial)[0])
            tail = f", {best.distractors} distractors" if cfg.task == "text" else ""
            raised = f"{'(iv) ' * (cfg.task == 'vision')}RoPE base {best.rope_theta:g}, untrained{tail}"
            panels.append(replace(best, name=raised, trial=False))
            bench.probe(panels[-1:], lengths, cfg.depths, cells, bar)

    print(table(cells, panels + controls, lengths, unit))
    if trials:
        tried = ((trial, rate(cells, trial)) for trial in trials)
        tried = ", ".join(f"{trial.rope_theta:g}: {hits / count:.2f}" for trial, (hits, count) in tried)
        by = "with the same needles" if cfg.needles else "with another haystack and other needles"
        print(f"RoPE bases tried {by}, at the two greatest lengths: {tried}")
    heatmap(cfg.out / "heatmap.png", cells, panels, lengths, cfg.depths, [trained(cfg, p) for p in panels], unit)
    found = [{"panel": p, "length": n, "depth": d, "hits": [int(h) for h in hits]} for (p, n, d), hits in cells.items()]
    (cfg.out / "results.json").write_text(json.dumps(stamp | {"cells": found}, indent=1, default=str) + "\n")
    print(f"results: {cfg.out / 'results.json'}   picture: {cfg.out / 'heatmap.png'}")
    if not cfg.weights:
        after = "python vniah.py text" if cfg.task == "vision" else "python train_text.py --preset tiny-base"
        print(f"next:    {after}")


def trained(cfg: Config, panel: Panel) -> float:
    """Where the dotted line stands: the length that a panel's language model was trained at, in units of length."""
    config = longva.read_config(panel.folder)
    lm = config.lm if isinstance(config, longva.LongVAConfig) else config
    per_unit = (config.vision.patches // 2) ** 2 if cfg.task == "vision" else 1
    return (cfg.trained_on or lm.max_position_embeddings) / per_unit


def read_cells(folder: Path, stamp: dict) -> Cells:
    """What an earlier run with these settings and weights found out; a torn last line is probed again."""
    runs.open_run(folder, stamp)
    runs.rewind(folder, None, CELLS)
    file = folder / CELLS
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(line["panel"], line["length"], line["depth"]): [bool(h) for h in line["hits"]] for line in lines}


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
