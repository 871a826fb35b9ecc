"""Tables and heatmaps of the needle tests, for a terminal, a page and a paper.

What      `table` and `blocks` as text, `heatmap` and `comparison` as pictures, all of the same cells.
Paper     Fig. 4 and Fig. 7: length across, depth down, red to green; a dotted line where training ended.
Run       imported by vniah.py
Deviates  The colours are cividis, which the colour-blind read as everyone does; --colours paper gives the paper's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHADES = " \u2591\u2592\u2593\u2588"  # none found to all found
COLOURS = {"safe": "cividis", "paper": "RdYlGn"}

Grid = dict[tuple[int, float], list[bool]]  # (length, depth) -> was each needle found?


@dataclass(frozen=True)
class Map:
    """What a model found: a name, its cells, and the length it was trained at, in the unit of lengths."""

    name: str
    grid: Grid
    trained: float

    def rate(self, length: int | None = None, depth: float | None = None) -> tuple[int, int]:
        """(hits, trials) over the cells that match."""
        cells = [hits for (n, d), hits in self.grid.items() if length in (None, n) and depth in (None, d)]
        return sum(map(sum, cells)), sum(map(len, cells))

    def array(self, lengths: Sequence[int], depths: Sequence[float]) -> np.ndarray:
        """Hit rates, one row per depth; nan where nothing is known."""
        known = [[self.grid.get((n, d)) for n in lengths] for d in depths]
        return np.array([[np.mean(hits) if hits else np.nan for hits in row] for row in known])


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a hit rate, 95 % at z = 1.96; it stays honest at 0 and 1."""
    assert 0 <= hits <= trials and trials > 0, (hits, trials)
    rate, shrink = hits / trials, 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def table(maps: Sequence[Map], lengths: Sequence[int], unit: str) -> str:
    """Hit rates per length, and over all with Wilson's 95 % interval."""
    width = max(len(one.name) for one in maps)
    lines = [f"{unit:>{width}} " + "".join(f"{length:>7}" for length in lengths) + "    mean  95 % interval"]
    for one in maps:
        rates = [one.rate(length) for length in lengths]
        row = "".join(f"{hits / count:7.2f}" if count else " " * 7 for hits, count in rates)
        hits, count = one.rate()
        low, high = wilson(hits, count) if count else (0, 1)
        mean = f"{hits / count:.3f}" if count else "  -  "
        lines.append(f"{one.name:>{width}} {row}    {mean}  {low:.3f} to {high:.3f}  (n={count})")
    return "\n".join(lines)


def by_kind(known: dict, panels: Sequence[str]) -> str:
    """Hit rates of each kind of needle, if they have kinds; `known`: (panel, length, depth) -> needle -> probe."""
    found: dict[tuple[str, str], list[bool]] = {}
    for (panel, *_), probes in known.items():
        for probe in probes.values():
            if panel in panels and probe.get("kind"):
                found.setdefault((panel, probe["kind"]), []).append(probe["hit"])
    width, lines = max(map(len, panels)), []
    for panel in panels:
        rates = [(kind, np.mean(hits), len(hits)) for (name, kind), hits in sorted(found.items()) if name == panel]
        if rates:
            told = "   ".join(f"{kind} {rate:.2f} (n={count})" for kind, rate, count in rates)
            lines.append(f"{panel:>{width}}   {told}")
    return "\n".join(lines)


def blocks(one: Map, lengths: Sequence[int], depths: Sequence[float], unit: str) -> str:
    """A heatmap for a terminal: the darker, the more were found; | where training ended."""
    ends, rows = sum(length <= one.trained for length in lengths), []
    for depth, row in zip(depths, one.array(lengths, depths)):
        shades = ["  ?" if np.isnan(x) else SHADES[round(x * (len(SHADES) - 1))] * 3 for x in row]
        rows.append(f"{100 * depth:3.0f}% {''.join(shades[:ends])}|{''.join(shades[ends:])}")
    return "\n".join([f"{one.name}, {unit} {lengths[0]} to {lengths[-1]}, depth down", *rows])


def short(count: int) -> str:
    """A number of frames or tokens for an axis: 224K for 224,000."""
    return f"{count / 1000:.3g}K" if count >= 10_000 else str(count)


def draw(ax, one: Map, lengths: Sequence[int], depths: Sequence[float], unit: str, per_unit: int, colours: str):  # noqa: ANN001, ANN201
    """One heatmap, as in the paper's Figure 4; the upper axis counts tokens where the lower one counts frames."""
    grid = one.array(lengths, depths)
    picture = ax.imshow(grid, vmin=0, vmax=1, cmap=COLOURS[colours], aspect="auto")
    ax.set_facecolor("0.88")  # cells of which nothing is known
    size, turned = (7, 0) if len(lengths) <= 8 else (6, 60)
    for y, x in np.ndindex(*grid.shape):
        if not np.isnan(value := grid[y, x]):
            bright = np.dot(picture.cmap(value)[:3], (0.299, 0.587, 0.114)) > 0.45
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=size, color="k" if bright else "w")
    ax.set_xticks(range(len(lengths)), map(short, lengths), rotation=turned, fontsize=8)
    ax.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths], fontsize=8)
    mean = np.nanmean(grid) if not np.isnan(grid).all() else float("nan")
    ax.set(xlabel=unit, ylabel="depth")
    ax.set_title(f"{one.name}: {mean:.2f}", fontsize=10)
    if per_unit > 1:
        above = ax.secondary_xaxis("top")
        tokens = [short(n * per_unit) for n in lengths]
        above.set_xticks(range(len(lengths)), tokens, rotation=turned, fontsize=6)
        above.set_xlabel("tokens", fontsize=7)
    inside = sum(length <= one.trained for length in lengths)  # cells left of the line lie within what was trained
    for ink, style, width in (("w", "-", 3), ("k", ":", 1.8)):  # seen on light and dark
        ax.axvline(inside - 0.5, color=ink, linestyle=style, linewidth=width, clip_on=False)
    return picture


def heatmap(
    file: Path,
    maps: Sequence[Map],
    lengths: Sequence[int],
    depths: Sequence[float],
    unit: str,
    per_unit: int = 1,
    colours: str = "safe",
) -> None:
    """Draw `maps` side by side into a file; dotted: training ended here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    narrow = len(lengths) <= 8
    cols = (1 if len(maps) < 4 else 2) if not narrow else 2 if len(maps) == 4 else min(3, len(maps))
    rows = -(-len(maps) // cols)
    wide, high = (4.6, 2.5) if narrow else (7.0, 3.2)
    size = (wide * cols + 0.6, (high + 0.35 * (per_unit > 1)) * rows + 0.3)
    figure, axes = plt.subplots(rows, cols, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(maps) :]:
        ax.axis("off")
    for ax, one in zip(axes.flat, maps):
        picture = draw(ax, one, lengths, depths, unit, per_unit, colours)
    figure.colorbar(picture, ax=axes, label="found", shrink=0.8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def comparison(file: Path, maps: Sequence[Map], lengths: Sequence[int], unit: str) -> None:
    """Draw the hit rate of each map over the length, with Wilson's 95 % interval as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    inks = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
    for i, one in enumerate(maps):
        known = [(n, *one.rate(n)) for n in lengths if one.rate(n)[1]]
        if not known:
            continue
        at, rates = [n for n, *_ in known], [hits / count for _, hits, count in known]
        low, high = zip(*(wilson(hits, count) for _, hits, count in known))
        ink, dash = inks[i % len(inks)], ("-", "--", "-.", ":")[i // 2 % 4]
        ax.plot(at, rates, dash, color=ink, marker="os^Dv<>"[i % 7], markersize=4, label=one.name)
        ax.fill_between(at, low, high, color=ink, alpha=0.15, linewidth=0)
    for trained in {one.trained for one in maps if one.trained <= lengths[-1]}:
        ax.axvline(trained, color="0.5", linestyle=":", linewidth=1)
    ax.set(xlabel=unit, ylabel="found", ylim=(-0.03, 1.03), xscale="log" if lengths[-1] > 20 * lengths[0] else "linear")
    ax.set_xticks(lengths, map(short, lengths), fontsize=7, rotation=0 if len(lengths) <= 8 else 60)
    ax.minorticks_off()
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=130)
    plt.close(figure)
