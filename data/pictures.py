"""The README's pictures, drawn by one command.

What      Each function below draws one picture and is named like its file: `ring` draws assets/ring.png.
Paper     Fig. 1 (pipeline), Sec. 3.1 (ring), Fig. 2 and 8 (unires), Fig. 4 (heatmap, comparison); the rest is ours.
Run       python -m data.pictures [NAME ...]      all of them, or the named ones, in 10 seconds
Dimensions  none: pictures are measured in pixels of the README, (0, 0) at the top left; files hold twice as many.
Differs   The heatmap runs from white to dark blue instead of the paper's red to green, for the colour-blind.
          What was measured comes from chains.json and transfer.json in data/tiny/; everything else is computed here.
          Pictures have a white background of their own, for dark pages.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from PIL import Image

from data import memory as planner
from data import niah, synthetic
from data.config import LMConfig
from data.tiny import chains
from data.tiny import transfer as study

ASSETS = Path(__file__).parents[1] / "assets"
WIDTH = 820  # pixels of the README's column
TEXT = 16  # pixels: the README's letters, and the smallest here
# Okabe and Ito's colours, which the colour-blind tell apart; the pink is darkened, to be legible as text.
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4488", "#E69F00", "#56B4E9"
PALE = {BLUE: "#CFE4F2", ORANGE: "#F8DCC8", GREEN: "#CDEBE1", PINK: "#F4E1EC", YELLOW: "#FBECCB", SKY: "#DDF0FB"}
INK, GREY = "#1A1A1A", "#5A5A5A"

Figure = Any  # matplotlib is imported where it is used, so that importing this module costs nothing
Axes = Any


# ---- drawing -------------------------------------------------------------------------------------


def sheet(height: int) -> tuple[Figure, Axes]:
    """A white figure of WIDTH x `height` pixels and axes over all of it, in pixels, y down."""
    from matplotlib.figure import Figure as New

    figure = New(figsize=(WIDTH / 100, height / 100), dpi=200, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def write(ax: Axes, x: float, y: float, text: str, size: float = TEXT, **options: Any) -> None:
    """Text centred at (x, y), its size in pixels; `options` are matplotlib's."""
    options = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25} | options
    ax.text(x, y, text, fontsize=size * 0.72, **options)


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **options: Any) -> None:
    """A pale box with an edge of `colour` and a text in its middle."""
    from matplotlib.patches import FancyBboxPatch

    style = f"round,pad=0,rounding_size={min(8, width / 4, height / 4)}"
    fill = PALE.get(colour, "#F0F0F0")
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=colour, linewidth=1))
    write(ax, x + width / 2, y + height / 2, text, **options)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, width: float = 1.4
) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    ax.annotate("", end, start, arrowprops=style)


def show(ax: Axes, picture: Image.Image, x: float, y: float, width: float, height: float) -> None:
    """A small picture with its pixels left visible."""
    ax.imshow(
        np.asarray(picture), extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto", zorder=1
    )


# ---- what LongVA does ----------------------------------------------------------------------------


def filmstrip_probe() -> tuple[list[Image.Image], niah.Needle]:
    """The film's 511 frames, and the needle that is inserted at frame 256."""
    return [*islice(synthetic.film(7), 511)], synthetic.draw_needles(7, 20, distractors=3)[0][7]


def filmstrip() -> Figure:
    """Eight of 512 frames, one of them the needle; the question, and the answer that tests/test_vniah.py checks."""
    from matplotlib.patches import Rectangle

    figure, ax = sheet(246)
    ax.add_patch(Rectangle((0, 40), WIDTH, 122, color="#2B2B2B"))
    frames, needle = filmstrip_probe()
    side, at = 92, (4, 49, 92, 180, 256, 310, 404, 511)
    for i, number in enumerate(at):
        x, hidden = 11 + i * 101, number == 256
        show(ax, needle.picture if hidden else frames[number - (number > 256)], x, 55, side, side)
        edge = {"edgecolor": YELLOW, "linewidth": 4} if hidden else {"edgecolor": "white", "linewidth": 0.8}
        ax.add_patch(Rectangle((x, 55), side, side, fill=False, zorder=2, **edge))
        write(
            ax, x + side / 2, 20, f"frame {number}", color=ORANGE if hidden else GREY, weight="bold" if hidden else None
        )
    write(ax, 11, 185, f"\N{LEFT DOUBLE QUOTATION MARK}{needle.question}\N{RIGHT DOUBLE QUOTATION MARK}", 19, ha="left")
    write(ax, 11, 220, "512 frames = 2,048 visual tokens; the needle is one frame", ha="left", color=GREY)
    box(ax, 560, 178, 249, 52, BLUE, f"the model answers: {needle.answer}", size=20)
    return figure


def pipeline() -> Figure:
    """Long text, short pictures, long video, with the tokens of the paper and of the miniature."""
    figure, ax = sheet(280)
    stages = [
        (GREEN, "1  long text", "train the language\nmodel on long texts", "224,000 tokens", "2,048 tokens"),
        (BLUE, "2  short pictures", "train the projector,\nthen all weights", "up to 7,056 tokens", "up to 256 tokens"),
        (ORANGE, "3  long video", "no training: a video is\na row of picture grids", "432,000 tokens", "4,096 tokens"),
    ]
    for i, (colour, title, text, paper, ours) in enumerate(stages):
        x, wide = 125 + i * 235, 205
        box(ax, x, 10, wide, 130, colour)
        write(ax, x + wide / 2, 38, title, 20, weight="bold", color=INK)
        write(ax, x + wide / 2, 92, text)
        if i:
            arrow(ax, (x - 28, 75), (x - 3, 75), width=2)
        write(ax, x + wide / 2, 172, paper, 18)
        write(ax, x + wide / 2, 222, ours, 18)
    for y, name in ((172, "the paper"), (222, "the miniature")):
        write(ax, 8, y, name, ha="left", color=GREY)
    write(
        ax,
        8,
        262,
        "One frame is one grid: 144 tokens in the paper (3,000 frames), 4 in the miniature (1,024 frames).",
        ha="left",
        color=GREY,
    )
    ax.plot((8, WIDTH - 8), (197, 197), color="#BBBBBB", linewidth=0.8)
    return figure


# ---- how it works --------------------------------------------------------------------------------


def hops(ranks: int) -> np.ndarray:
    """int[2R, 2R]: after how many hops the queries of chunk i meet the keys of chunk j; -1 where j is later than i."""
    chunk = np.arange(2 * ranks)
    owner = np.minimum(chunk, 2 * ranks - 1 - chunk)
    hop = (owner[:, None] - owner[None]) % ranks
    return np.where(chunk[:, None] >= chunk[None], hop, -1)


def ring() -> Figure:
    """Zigzag for four ranks: who holds which chunks, and at which hop each block of attention is computed."""
    from matplotlib.patches import Polygon, Rectangle

    figure, ax = sheet(446)
    colours, ranks, cell, left, top = (BLUE, ORANGE, GREEN, PINK), 4, 40, 96, 92
    hop = hops(ranks)
    write(ax, left + 4 * cell, 20, "keys of chunk", color=GREY)
    write(ax, 26, top + 4 * cell, "queries of chunk", color=GREY, rotation=90)
    for i in range(2 * ranks):
        owner = colours[min(i, 2 * ranks - 1 - i)]
        box(ax, left + i * cell + 2, 44, cell - 4, 34, owner, f"{i}")
        box(ax, 50, top + i * cell + 3, cell - 4, 34, owner, f"{i}")
        for j in range(i + 1):
            x, y = left + j * cell, top + i * cell
            if i == j:  # causal: half a block
                ax.add_patch(
                    Polygon([(x, y), (x, y + cell), (x + cell, y + cell)], facecolor=PALE[owner], edgecolor=owner)
                )
            else:
                ax.add_patch(Rectangle((x, y), cell, cell, facecolor=PALE[owner], edgecolor=owner, linewidth=0.8))
            write(ax, x + cell * (0.5 if i > j else 0.3), y + cell * (0.5 if i > j else 0.68), f"{hop[i, j]}")
    write(ax, left + 4 * cell, top + 8 * cell + 20, "number: hop at which a block is computed", color=GREY)
    x = 474
    write(ax, x, 20, "blocks computed at hop", ha="left", color=GREY)
    for k, name in enumerate(("0", "1", "2", "3", "sum")):
        write(ax, x + 116 + 49 * k, 61, name)
    for r in range(ranks):
        y = 84 + 44 * r
        box(ax, x, y, 76, 36, colours[r], f"rank {r}")
        for k in range(ranks):
            mine = hop[[r, 2 * ranks - 1 - r]] == k
            blocks = mine.sum() - (1 if k == 0 else 0)  # the two on the diagonal are halves
            write(ax, x + 116 + 49 * k, y + 18, f"{blocks}")
        write(ax, x + 116 + 49 * 4, y + 18, "8", weight="bold")
    text = (
        "Rank r holds chunks r and 2R \N{MINUS SIGN} 1 \N{MINUS SIGN} r.\nAfter hop h it holds the keys of\n"
        "rank r \N{MINUS SIGN} h (mod R). Every rank does\nthe same work at every hop.\n\n"
        "Contiguous chunks instead: 2, 6, 10\nand 14 blocks; three ranks wait\nfor the last one."
    )
    write(ax, x, 350, text, ha="left")
    return figure


def zigzag_lines(
    ax: Axes, x: float, y: float, width: float, height: float, lines: int, colour: str, marks: bool
) -> None:
    """Rows of arrows, left to right and top to bottom; `marks`: a token for each new line at their ends."""
    for k in range(lines):
        level = y + height * (k + 0.5) / lines
        arrow(ax, (x + 6, level), (x + width - (12 if marks else 6), level), colour)
        if marks:
            ax.plot(x + width - 3, level, "s", color=INK, markersize=4.5, zorder=3)


def unires() -> Figure:
    """A picture of 2 x 2 grids as UniRes and as AnyRes order it, and a video as UniRes sees it."""
    from matplotlib.patches import Rectangle

    figure, ax = sheet(470)
    picture = synthetic.compose_picture(np.random.default_rng(3), 2, 2, [("star", "yellow", 4), ("tree", "green", 7)])
    for left, name, note in (
        (12, "UniRes: grid after grid", "4 grids, each pooled to 144: 576 tokens"),
        (
            360,
            "AnyRes: base picture, then line by line",
            "(1 + 4) \N{MULTIPLICATION SIGN} 576 + 48 new lines = 2,928 tokens",
        ),
    ):
        write(ax, left, 18, name, 17, ha="left", weight="bold")
        write(ax, left, 262, note, ha="left", color=GREY)
    side = 98
    show(ax, picture, 12, 42, 2 * side, 2 * side)
    for i in range(4):
        x, y = 12 + i % 2 * side, 42 + i // 2 * side
        ax.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor="white", linewidth=2.5))
        zigzag_lines(ax, x, y, side, side, 4, "white", marks=False)
        box(ax, x + 3, y + 3, 24, 24, BLUE, f"{i + 1}")
    show(ax, picture.resize((32, 32)), 360, 42, side, side)
    zigzag_lines(ax, 360, 42, side, side, 4, "white", marks=False)
    box(ax, 363, 45, 24, 24, ORANGE, "1")
    show(ax, picture, 474, 42, 2 * side, 2 * side)
    zigzag_lines(ax, 474, 42, 2 * side + 10, 2 * side, 8, "white", marks=True)
    box(ax, 477, 45, 24, 24, ORANGE, "2")
    write(ax, 698, 140, "a new-line\ntoken ends\neach line", ha="left", color=GREY, size=TEXT)
    write(ax, 12, 312, "A video is a picture of one row: UniRes needs nothing new for it", 17, ha="left", weight="bold")
    for i, frame in enumerate(islice(synthetic.film(7), 0, 56, 8)):
        x = 12 + i * (side + 3)
        show(ax, frame, x, 334, side, side)
        zigzag_lines(ax, x, 334, side, side, 4, "white", marks=False)
        box(ax, x + 3, 337, 24, 24, BLUE, f"{i + 1}")
    write(ax, 768, 383, "\N{HORIZONTAL ELLIPSIS}", 30)
    write(
        ax,
        12,
        452,
        "Full size. N frames: N \N{MULTIPLICATION SIGN} 144 tokens. Neither align nor sft sees a video.",
        ha="left",
        color=GREY,
    )
    return figure


def row() -> Figure:
    """One training sample as tokens, and which of them are targets of the loss."""
    figure, ax = sheet(220)
    parts = [
        (124, GREY, "system and\nuser header", "14 tokens", False),
        (212, BLUE, "visual tokens of\na 2 \N{MULTIPLICATION SIGN} 2 picture", "576", False),
        (196, GREEN, "Which number is\non the star?", "question", False),
        (122, GREY, "assistant\nheader", "5", False),
        (46, ORANGE, "4", "", True),
        (84, ORANGE, "end of\nturn", "", True),
    ]
    x = 10
    for width, colour, text, count, is_target in parts:
        box(ax, x, 46, width, 74, colour, text)
        write(ax, x + width / 2, 24, count, color=GREY)
        ax.plot(
            (x + 3, x + width - 3),
            (136, 136),
            color=ORANGE if is_target else "#999999",
            linewidth=5 if is_target else 2,
        )
        x += width + 3
    write(ax, 350, 160, "target \N{MINUS SIGN}100: no loss, and no logits computed", color=GREY)
    write(ax, 740, 160, "loss", 18, weight="bold", color=ORANGE)
    write(
        ax,
        10,
        198,
        "The model sees all tokens; position t predicts token t + 1; the loss is a mean over targets.",
        ha="left",
        color=GREY,
    )
    return figure


def training_memory() -> dict[str, dict[str, float]]:
    """GB on each of eight GPUs for a step of 224,000 tokens of Qwen2-7B, as switches are added: row -> term -> GB.

    The numbers are those of `train_text.py --plan`; only logits that are made all at once are counted here.
    """
    given = planner.Step(LMConfig())  # the paper's settings: every switch is on
    steps = {
        "loss in chunks": replace(given, checkpointing="none", offload_activations=False, offload=False),
        "+ checkpointing": replace(given, offload_activations=False, offload=False),
        "+ hidden states to CPU": replace(given, offload=False),
        "+ AdamW on the CPU": given,
    }
    groups = {
        "parameters, gradients, AdamW": ("shards", "gradients", "AdamW"),
        "gathered weights": ("gathered", "whole grads", "reduce stream"),
        "activations": ("activations",),
    }
    rows = {}
    for row, step in steps.items():
        sizes = planner.step_terms(step)
        rows[row] = {group: sum(sizes[name] for name in names) / 1e9 for group, names in groups.items()}
    logits = 8 * given.T * given.lm.vocab_size / 1e9  # bf16; fp32; their gradient in bf16
    return {"no savings": rows["loss in chunks"] | {"logits": logits}} | rows


def memory() -> Figure:
    """Where the memory of a training step goes, and which switch removes what."""
    from matplotlib.patches import Rectangle

    figure, ax = sheet(318)
    rows, left, scale = training_memory(), 205, 2.2  # pixels a GB
    colours = dict(zip(rows["no savings"], (BLUE, SKY, YELLOW, ORANGE)))
    for x, (term, colour) in zip((10, 310, 516, 664), colours.items()):
        ax.add_patch(Rectangle((x, 14), 18, 18, color=colour))
        write(ax, x + 26, 24, term, ha="left")
    for i, (name, terms) in enumerate(rows.items()):
        y, x = 52 + 46 * i, left
        write(ax, left - 10, y + 17, name, ha="right")
        for term, size in terms.items():
            ax.add_patch(Rectangle((x, y), size * scale, 34, color=colours[term], linewidth=0))
            x += size * scale
        write(ax, x + 8, y + 17, f"{sum(terms.values()):.0f} GB", 17, ha="left", weight="bold")
    ax.plot((left + 80 * scale,) * 2, (46, 282), color=INK, linewidth=1.4, linestyle=":")
    write(ax, left + 80 * scale, 296, "an 80 GB card", weight="bold")
    write(ax, 530, 262, "Qwen2-7B, 224,000 tokens,\neach of 8 GPUs", ha="left", color=GREY)
    return figure


# ---- what was measured ---------------------------------------------------------------------------


TRAINED = {"(i) LongVA": 512, "(ii) LongVA, AnyRes": 512}  # frames that the text's length amounts to; else 64
TITLES = {
    "(i) LongVA": "(i) LongVA",
    "(ii) LongVA, AnyRes": "(ii) LongVA with AnyRes",
    "(iii) not extended": "(iii) not extended on text",
    "(iv) training-free": "(iv) = (iii), RoPE rescaled",
}


def heatmap() -> Figure:
    """The paper's Figure 4 in miniature: the share of needles found, by frames and depth, for four systems."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    figure, ax = sheet(544)
    data, colours = chains.load(), colormaps["Blues"]
    shipped = next(iter(data["chains"].values()))["vision, seed 7"]
    wide, high = 54, 34
    found_by = {chains.plain(name): found for name, found in shipped.items()}
    for i, (name, title) in enumerate(TITLES.items()):
        found = found_by[name]
        left, top = 94 + i % 2 * 366, 46 + i // 2 * 216
        rates = np.array([*found.values()]).T / data["vision"]["of"]
        write(ax, left, top - 18, f"{title}: {rates.mean():.2f}", 17, ha="left", weight="bold")
        for (y, x), rate in np.ndenumerate(rates):
            ax.add_patch(Rectangle((left + x * wide, top + y * high), wide, high, color=colours(rate), linewidth=0))
            ink = "white" if rate > 0.58 else INK
            write(ax, left + (x + 0.5) * wide, top + (y + 0.5) * high, f"{rate:.2f}", color=ink)
        ax.add_patch(Rectangle((left, top), 6 * wide, 5 * high, fill=False, edgecolor=GREY, linewidth=0.8))
        for x, frames in enumerate(found if i > 1 else ()):
            write(ax, left + (x + 0.5) * wide, top + 5 * high + 15, f"{frames}", color=GREY)
        end = left + wide * sum(int(n) <= TRAINED.get(name, 64) for n in found)
        ax.plot((end, end), (top - 6, top + 5 * high), color=ORANGE, linestyle=(0, (2, 1.2)), linewidth=2.6)
        for y, depth in enumerate(data["vision"]["depths"] if i % 2 == 0 else ()):
            write(ax, left - 8, top + (y + 0.5) * high, f"{100 * depth:.0f}%", ha="right", color=GREY)
    write(ax, 439, 476, "frames (4 tokens each)", color=GREY)
    write(ax, 16, 238, "depth of the needle", color=GREY, rotation=90)
    ax.plot((94, 134), (524, 524), color=ORANGE, linestyle=(0, (2, 1.2)), linewidth=2.6)
    write(ax, 144, 524, "the language model was trained up to here", ha="left", color=ORANGE)
    ramp = colours(np.linspace(0, 1, 256))[None, :, :3]
    ax.imshow(ramp, extent=(600, 784, 532, 516), aspect="auto")
    chance = 600 + 0.1 * 184
    ax.plot((chance, chance), (508, 532), color=ORANGE, linewidth=2)
    for x, name in ((590, "0"), (796, "1"), (chance + 30, "chance")):
        write(ax, x, 498 if name == "chance" else 524, name)
    ax.set(xlim=(0, WIDTH), ylim=(544, 0))
    return figure


def comparison() -> Figure:
    """The systems as curves: share found against frames, the median over chains, from the lowest to the highest."""
    figure, ax = sheet(400)
    rates = chains.rates(chains.load(), "vision")
    left, right, top, bottom = 76, 545, 40, 340
    frames = np.array(sorted(rates["(i) LongVA"]))
    x = left + (right - left) * np.log2(frames / 8) / np.log2(1024 / 8)
    for rate in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - (bottom - top) * rate
        ax.plot((left, right), (y, y), color="#DDDDDD", linewidth=0.8)
        write(ax, left - 10, y, f"{rate:g}", ha="right", color=GREY)
    for at, n in zip(x, frames):
        write(ax, at, bottom + 18, f"{n}", color=GREY)
    write(ax, (left + right) / 2, bottom + 44, "frames (4 tokens each)", color=GREY)
    write(ax, 16, (top + bottom) / 2, "needles found", color=GREY, rotation=90)
    ax.plot((left, right), (bottom - 0.1 * (bottom - top),) * 2, color=GREY, linestyle="--", linewidth=1)
    write(ax, left + 6, bottom - 0.1 * (bottom - top) - 12, "chance", ha="left", color=GREY)
    for at, text, side in ((64, "(iii), (iv): text of 256 tokens", "right"), (512, "(i), (ii): 2,048", "right")):
        here = left + (right - left) * np.log2(at / 8) / np.log2(1024 / 8)
        ax.plot((here, here), (top - 8, bottom), color=INK, linestyle=":", linewidth=1.6)
        write(ax, here + 60, top - 22, text, ha=side)
    places = {3: 48, 0: 112, 2: 226, 1: 288}  # y of the labels, apart from one another
    marks = (BLUE, "-", "o"), (PINK, "--", "s"), (ORANGE, "-", "^"), (GREEN, "-.", "D")
    for i, name in enumerate(TITLES):
        colour, dash, mark = marks[i]
        shares = np.array([rates[name][n] for n in frames])  # one row a length, one column a chain
        y, low, high = (bottom - (bottom - top) * some for some in (np.median(shares, 1), shares.min(1), shares.max(1)))
        ax.plot(x, y, dash, color=colour, marker=mark, markersize=5, linewidth=2)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        label = TITLES[name].replace(" with", "\nwith").replace(" on text", "\non text").replace(", RoPE", ",\nRoPE")
        write(ax, 578, places[i], label, 17, ha="left", color=colour, weight="bold")
        ax.plot((right + 4, 572), (y[-1], places[i]), color=colour, linewidth=0.8)
    return figure


def transfer() -> Figure:
    """The longest film and text in which needles are found, against the length of the texts trained on; log scales."""
    figure, ax = sheet(430)
    measured = study.load()
    lengths = np.array(study.LENGTHS)
    left, right, top, bottom = 110, 780, 24, 356
    ticks = [*study.LENGTHS, max(study.CONTEXTS)]
    x = np.linspace(left + 40, right - 40, len(lengths))

    def height(tokens: int | np.ndarray) -> np.ndarray:
        return bottom - (bottom - top) * np.log2(np.maximum(tokens, 128) / 128) / np.log2(ticks[-1] / 128)

    for tokens in ticks:
        ax.plot((left, right), (height(tokens),) * 2, color="#DDDDDD", linewidth=0.8)
        write(ax, left - 10, height(tokens), f"{tokens:,}", ha="right", color=GREY)
    for at, tokens in zip(x, lengths):
        write(ax, at, bottom + 18, f"{tokens:,}", color=GREY)
    write(ax, (left + right) / 2, bottom + 48, "tokens of the texts trained on", color=GREY)
    write(ax, 24, (top + bottom) / 2, "longest with 90 % found, tokens", color=GREY, rotation=90)
    ax.plot(x, height(lengths), ":", color=GREY, linewidth=1.6)
    ax.plot(x, height(np.minimum(study.BEYOND * lengths, ticks[-1])), "--", color=GREY, linewidth=1.6)
    for kind, colour, dash, mark, aside in (("film", BLUE, "-", "o", -6), ("text", ORANGE, "-.", "s", 6)):
        reached = [study.reached(measured, length, kind) for length in study.LENGTHS]
        ax.plot(x + aside, height(np.array([median_low(some) for some in reached])), dash, color=colour, linewidth=2)
        for at, some in zip(x + aside, reached):
            ax.plot((at, at), height(np.array([min(some), max(some)])), color=colour, linewidth=1.4)
            ax.plot(at, height(median_low(some)), mark, color=colour, markersize=8)
    keys = (
        ("film", BLUE, "-"),
        ("text", ORANGE, "-."),
        ("as long as the texts", GREY, ":"),
        ("longest test", GREY, "--"),
    )
    for i, (name, colour, dash) in enumerate(keys):
        y = bottom - 92 + 24 * i
        ax.plot((560, 600), (y, y), dash, color=colour, linewidth=2)
        write(ax, 610, y, name, ha="left", color=colour)
    return figure


DRAWN: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw for draw in (filmstrip, pipeline, ring, unires, row, memory, heatmap, comparison, transfer)
}


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG with a palette of 256 colours, which is a third of the bytes."""
    figure.savefig(file)
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def main(words: list[str]) -> None:
    """Draw the named pictures, or all."""
    parser = argparse.ArgumentParser(description="Draw the README's pictures into assets/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(DRAWN)}; none: all")
    names = parser.parse_args(words).names
    if unknown := set(names) - set(DRAWN):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(DRAWN)}")
    for name in names or DRAWN:
        file = ASSETS / f"{name}.png"
        save(DRAWN[name](), file)
        print(file.relative_to(ASSETS.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
