"""Results of the needle tests: hit rates with intervals, tables, heatmaps and the files that hold them.

What      Each probe is one line of cells-RANK.jsonl, each system's prompts and hashes one of systems.jsonl;
          results.json holds settings, inputs, systems and all cells; report.html shows them.
          `table` and `ascii_heatmap` print hit rates; `draw_heatmaps` and `draw_comparison` draw them.
Paper     Fig. 4 and Fig. 7: length across, depth down; a dotted line where training ended.
Run       imported by vniah.py
Dimensions  none
Differs   Intervals are Wilson's at 95 %; the paper gives none. The colours are cividis, which the colour-blind can
          read too, instead of red to green.
"""

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data import runs
from data.flags import read_json
from data.niah import Needle, ProbeGroup, describe, picture_hash

SHADES = " \u2591\u2592\u2593\u2588"  # none found; below a third, below two thirds, below all; all
CELLS = "cells-{}.jsonl"  # of each rank: one line a probe
SYSTEMS = "systems.jsonl"  # one line a system: its prompts, the hashes of its haystack
PAGE, TEMPLATE = "report.html", Path(__file__).with_name("report.html")
MAX_BYTES = 3_000_000  # of all needles' pictures on the page, before they become text
PROBE = {  # the fields of a probe, and their types in JSON
    "system": str, "length": int, "depth": float, "needle": str, "kind": str, "hit": bool,
    "generated_correct": bool | None, "generated_text": str, "answer": str, "tokens": int,
}  # fmt: skip

# (system, length, depth) -> needle -> its probe: hit, generated_correct, generated_text, tokens, kind
Results = dict[tuple[str, int, float], dict[str, dict]]


# ---- scores --------------------------------------------------------------------------------------


def answer_in_text(text: str, answer: str) -> bool:
    """Return whether a text gives the answer, as whole words anywhere; an option's letter must come first."""
    text, answer = text.strip().lower(), answer.strip().lower()
    if re.fullmatch("[a-j]", answer):  # "a dog", "I think" name no option; nor does "A is"
        return bool(re.match(rf"\W*{answer}(?![\w'])" + r"(?! \w)" * (answer in "ai"), text))
    return bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text))


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a hit rate, 95 % at z = 1.96; not of width 0 at rates of 0 and 1."""
    assert 0 <= hits <= trials and trials > 0, (hits, trials)
    rate, shrink = hits / trials, 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Heatmap:
    """The hits of one system: its name, its cells, and the length it was trained at, in the unit of lengths."""

    name: str
    grid: dict[tuple[int, float], list[bool]]  # (length, depth) -> was each needle found?
    trained_length: float

    def rate(self, length: int | None = None) -> tuple[int, int]:
        """Return (hits, trials) over the cells of a length, or over all."""
        cells = [hits for (n, _), hits in self.grid.items() if length in (None, n)]
        return sum(map(sum, cells)), sum(map(len, cells))

    def array(self, lengths: Sequence[int], depths: Sequence[float]) -> np.ndarray:
        """Return hit rates, one row per depth; nan where there are no probes."""
        cells = [[self.grid.get((n, d)) for n in lengths] for d in depths]
        return np.array([[np.mean(hits) if hits else np.nan for hits in row] for row in cells])


def heatmap_of(results: Results, system: str, trained_length: float, key: str = "hit") -> Heatmap:
    """Return the heatmap of one system; `key` "generated_correct" scores by the generated text instead."""
    grid = {}
    for (name, length, depth), probes in results.items():
        if name == system:
            grid[length, depth] = [probe[key] for probe in probes.values() if probe[key] is not None]
    return Heatmap(system, grid, trained_length)


def hit_rate(results: Results, system: str) -> float | None:
    """Return the hit rate over all probes of one system; None where there are none."""
    hits, trials = heatmap_of(results, system, 0).rate()
    return hits / trials if trials else None


# ---- files ---------------------------------------------------------------------------------------


def cell_files(folder: Path) -> list[Path]:
    """Return the files of finished probes in a run's folder, one of each rank."""
    return sorted(folder.glob(CELLS.format("*")))


def read_results(folder: Path) -> Results:
    """Return every finished probe of a run, whichever rank found it."""
    results: Results = {}
    for file in cell_files(folder):
        for _, line in runs.read_log(file, **PROBE)[0]:
            results.setdefault((line["system"], line["length"], line["depth"]), {})[line["needle"]] = line
    return results


def open_results(folder: Path, settings: dict, inputs: Iterable[str] = ()) -> None:
    """Open a run's folder, on rank 0. A run with the same settings is continued, without lines that are damaged.

    Raises ValueError if the folder holds probes of other settings, or `inputs`, settings too, have other content.
    """
    if read_json(folder / "config.json").get("protocol") and not cell_files(folder):  # written by an earlier run here
        runs.lock(folder)
        for name in ("config.json", SYSTEMS):  # it ended with an error before any probe
            (folder / name).unlink(missing_ok=True)
    runs.open_run(folder, settings, inputs)
    for file in cell_files(folder):
        runs.truncate_log(folder, None, file.name, **PROBE)
    runs.truncate_log(folder, None, SYSTEMS, system=str)


class ProbeLog:
    """The finished probes of a run: `results`, those of all ranks; this rank appends its own to its file.

    `barrier`: waits for all ranks. They must agree on what is pending, so `read` calls it before and after.
    """

    def __init__(self, folder: Path, rank: int, barrier: Callable[[], object]):
        self.folder, self.rank, self.barrier = folder, rank, barrier
        self.asked: dict[str, list[Needle]] = {}  # of each system, as evaluate.asked_needles returns them
        self.read()

    def read(self) -> None:
        """Read what all ranks wrote."""
        self.barrier()
        self.results = read_results(self.folder)
        self.barrier()

    def is_done(self, system: str, cells: Iterable[tuple[int, float]]) -> bool:
        """Return whether every cell has a probe of each needle that is asked about."""
        names = {needle.name for needle in self.asked[system]}
        return all(names <= set(self.results.get((system, *cell), ())) for cell in cells)

    def pending(self, system: str, needles: list[Needle], groups: Iterable[ProbeGroup]) -> list[ProbeGroup]:
        """Return the groups with only the lengths and needles that are still missing."""
        pending = []
        for group in groups:
            missing: dict[tuple[int, ...], list[tuple]] = {}  # needles: the cells that lack exactly these
            for cell in group.cells:
                done = self.results.get((system, *cell), ())
                missing.setdefault(tuple(i for i in group.needle_ids if needles[i].name not in done), []).append(cell)
            pending += [group._replace(cells=tuple(cells), needle_ids=ids) for ids, cells in missing.items() if ids]
        return pending

    def append(self, lines: Iterable[dict]) -> None:
        """Append finished probes at once, so that a killed run loses none of them."""
        runs.log(self.folder, *lines, name=CELLS.format(self.rank))

    def note_system(self, name: str, found: dict) -> None:
        """Note a system's prompts and hashes before its first probe, on rank 0, for the results of a killed run."""
        if self.rank == 0 and name not in read_systems(self.folder):
            runs.log(self.folder, {"system": name, **found}, name=SYSTEMS)


def read_systems(folder: Path) -> dict[str, dict]:
    """Return the prompts and hashes of each system that was tested."""
    return {line.pop("system"): line for _, line in runs.read_log(folder / SYSTEMS, system=str)[0]}


def probe_line(
    system: str, cell: tuple, needle: Needle, tokens: int, hit: bool, answer: str, generated: str | None = None
) -> dict:
    """Return a finished probe; `tokens`: of the probe without its answer; answer: the right one."""
    line = {"system": system, "length": cell[0], "depth": cell[1], "needle": needle.name, "kind": needle.kind}
    right = None if generated is None else answer_in_text(generated, answer)
    line |= {"hit": hit, "generated_correct": right, "generated_text": generated or ""}
    return line | {"answer": answer, "tokens": tokens}


def write_results(folder: Path, log: ProbeLog, trained: dict[str, float]) -> None:
    """Write results.json (settings, versions, prompts, hashes, every probe, intervals), and report.html with the same.

    trained: system -> the length it was trained at, in the unit of lengths.
    """
    file, cells = folder / "results.json", []
    for (system, length, depth), probes in sorted(log.results.items()):
        hits = [bool(probe["hit"]) for probe in probes.values()]
        low, high = wilson(sum(hits), len(hits))
        cell = {"system": system, "length": length, "depth": depth, "found": sum(hits), "of": len(hits)}
        cells.append(cell | {"wilson": [round(low, 4), round(high, 4)], "probes": probes})
    record = {"settings": read_json(folder / "config.json"), "versions": runs.versions()}
    record |= {"systems": read_systems(folder), "trained_lengths": trained, "cells": cells}
    runs.replace_text(file, json.dumps(record, indent=1) + "\n")
    write_page(folder, record, log.asked)
    print(f"results: {file}   pictures: {folder / 'heatmap.png'}, {folder / 'comparison.png'}   page: {folder / PAGE}")


# ---- the page of every probe ---------------------------------------------------------------------


def data_url(picture: Image.Image, max_bytes: int) -> str:
    """Return a picture as text for a page: PNG, or JPEG where that is too large; a byte a pixel is enough for most."""
    small = picture.convert("RGB")
    small.thumbnail((math.isqrt(max_bytes), math.isqrt(max_bytes)))
    for kind in ("png", "jpeg"):
        small.save(file := io.BytesIO(), kind)
        if file.tell() <= max_bytes:
            break
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def write_page(folder: Path, record: dict, asked: dict[str, list[Needle]]) -> None:
    """Write report.html: the page of data/report.html around all of results.json and each system's needles."""
    pictures = {picture_hash(one.picture): one.picture for needles in asked.values() for one in needles if one.picture}
    each = min(336**2, MAX_BYTES // max(1, len(pictures)))
    page = record | {"pictures": {name: data_url(picture, each) for name, picture in pictures.items()}}
    page["needles"] = {name: [describe(needle) for needle in needles] for name, needles in asked.items()}
    text = json.dumps(page, separators=(",", ":"), default=str).replace("<", r"\u003c")  # or "</script>" would end it
    runs.replace_text(folder / PAGE, TEMPLATE.read_text(encoding="utf-8").replace("@RESULTS@", text))


# ---- text ----------------------------------------------------------------------------------------


def table(heatmaps: Sequence[Heatmap], lengths: Sequence[int], unit: str) -> str:
    """Return hit rates per length, and over all with Wilson's 95 % interval."""
    width = max(len(one.name) for one in heatmaps)
    lines = [f"{unit:>{width}} " + "".join(f"{length:>7}" for length in lengths) + "    mean  95 % interval"]
    for one in heatmaps:
        rates = [one.rate(length) for length in lengths]
        row = "".join(f"{hits / count:7.2f}" if count else " " * 7 for hits, count in rates)
        hits, count = one.rate()
        low, high = wilson(hits, count) if count else (0, 1)
        mean = f"{hits / count:.3f}" if count else "  -  "
        lines.append(f"{one.name:>{width}} {row}    {mean}  {low:.3f} to {high:.3f}  (n={count})")
    return "\n".join(lines)


def table_by_kind(results: Results, systems: Sequence[str]) -> str:
    """Return hit rates of each kind of needle; an empty text where needles have no kinds."""
    hits_of: dict[tuple[str, str], list[bool]] = {}
    for (system, *_), probes in results.items():
        for probe in probes.values():
            if system in systems and probe.get("kind"):
                hits_of.setdefault((system, probe["kind"]), []).append(probe["hit"])
    width, lines = max(map(len, systems)), []
    for system in systems:
        rates = [(kind, np.mean(hits), len(hits)) for (name, kind), hits in sorted(hits_of.items()) if name == system]
        if rates:
            row = "   ".join(f"{kind} {rate:.2f} (n={count})" for kind, rate, count in rates)
            lines.append(f"{system:>{width}}   {row}")
    return "\n".join(lines)


def ascii_heatmap(heatmap: Heatmap, lengths: Sequence[int], depths: Sequence[float], unit: str) -> str:
    """Return a heatmap for a terminal: the fuller, the more were found; | where the trained length ends."""
    inside, rows = sum(length <= heatmap.trained_length for length in lengths), []
    for depth, row in zip(depths, heatmap.array(lengths, depths)):
        shades = ["  ?" if np.isnan(x) else SHADES[(x > 0) + int(3 * x)] * 3 for x in row]
        beyond = "|" * (inside < len(lengths)) + "".join(shades[inside:])
        rows.append(f"{100 * depth:3.0f}% {''.join(shades[:inside])}{beyond}")
    return "\n".join([f"{heatmap.name}, {unit} {lengths[0]} to {lengths[-1]}, depth down", *rows])


def report(
    folder: Path,
    results: Results,
    trained: dict[str, float],
    drawn: int,
    trials: dict[str, float],
    lengths: Sequence[int],
    depths: Sequence[float],
    tokens_per_unit: int,
) -> None:
    """Print the tables of a run and draw its pictures.

    trained: system -> the length it was trained at; the first `drawn` get a heatmap, and the others are controls.
    trials: hit rates of the training-free positions among which one was chosen.
    """
    unit = "tokens" if tokens_per_unit == 1 else "frames"
    compared = [heatmap_of(results, name, length) for name, length in trained.items()]
    heatmaps = compared[:drawn]
    print(table(compared, lengths, unit))
    generated = [heatmap_of(results, one.name, one.trained_length, "generated_correct") for one in heatmaps]
    if generated := [one for one in generated if one.rate()[1]]:
        print("\nscored by the generated text:\n" + table(generated, lengths, unit))
    if kinds := table_by_kind(results, [*trained]):
        print("\nby kind of needle:\n" + kinds)
    print("\n" + "\n".join(ascii_heatmap(one, lengths, depths, unit) for one in heatmaps) + "\n")
    if trials:
        rates = ", ".join(f"{name.removeprefix('trial of ')}: {rate:.2f}" for name, rate in trials.items())
        print(f"Training-free positions tried first, at the two greatest lengths: {rates}")
    draw_heatmaps(folder / "heatmap.png", heatmaps, lengths, depths, unit, tokens_per_unit)
    for i, one in enumerate(heatmaps):
        draw_heatmaps(folder / f"heatmap-{i + 1}.png", [one], lengths, depths, unit, tokens_per_unit)
    draw_comparison(folder / "comparison.png", compared, lengths, unit)


# ---- pictures ------------------------------------------------------------------------------------


def axis_label(count: int) -> str:
    """Return a number of frames or tokens for an axis: 224K for 224,000."""
    return f"{count / 1000:.3g}K" if count >= 10_000 else str(count)


def draw_heatmap(ax, heatmap, lengths, depths, unit, tokens_per_unit):  # noqa: ANN001, ANN201
    """One heatmap, as in the paper's Figure 4; the upper axis counts tokens where the lower one counts frames."""
    grid = heatmap.array(lengths, depths)
    picture = ax.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    ax.set_facecolor("0.88")  # cells without probes
    size, rotation = (7, 0) if len(lengths) <= 8 else (6, 60)
    for y, x in np.ndindex(*grid.shape):
        if not np.isnan(value := grid[y, x]):
            bright = np.dot(picture.cmap(value)[:3], (0.299, 0.587, 0.114)) > 0.45
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=size, color="k" if bright else "w")
    ax.set_xticks(range(len(lengths)), map(axis_label, lengths), rotation=rotation, fontsize=8)
    ax.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths], fontsize=8)
    mean = np.nanmean(grid) if not np.isnan(grid).all() else float("nan")
    ax.set(xlabel=unit, ylabel="depth")
    ax.set_title(f"{heatmap.name}: {mean:.2f}", fontsize=10)
    if tokens_per_unit > 1:
        above = ax.secondary_xaxis("top")
        tokens = [axis_label(n * tokens_per_unit) for n in lengths]
        above.set_xticks(range(len(lengths)), tokens, rotation=rotation, fontsize=6)
        above.set_xlabel("tokens", fontsize=7)
    inside = sum(length <= heatmap.trained_length for length in lengths)  # cells left of the line
    lines = (("w", "-", 3), ("k", ":", 1.8)) if inside < len(lengths) else ()  # visible on light and dark cells
    for colour, style, width in lines:
        ax.axvline(inside - 0.5, color=colour, linestyle=style, linewidth=width, clip_on=False)
    return picture


def draw_heatmaps(
    file: Path,
    heatmaps: Sequence[Heatmap],
    lengths: Sequence[int],
    depths: Sequence[float],
    unit: str,
    tokens_per_unit: int = 1,
) -> None:
    """Draw `heatmaps` side by side into a file; dotted: training ended here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    narrow = len(lengths) <= 8
    cols = min(3, len(heatmaps)) if narrow and len(heatmaps) != 4 else 1 + (len(heatmaps) > 3)
    rows = -(-len(heatmaps) // cols)
    wide, high = (4.6, 2.5) if narrow else (7.0, 3.2)
    size = (wide * cols + 0.6, (high + 0.35 * (tokens_per_unit > 1)) * rows + 0.3)
    figure, axes = plt.subplots(rows, cols, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(heatmaps) :]:
        ax.axis("off")
    for ax, one in zip(axes.flat, heatmaps):
        picture = draw_heatmap(ax, one, lengths, depths, unit, tokens_per_unit)
    figure.colorbar(picture, ax=axes, label="found", shrink=0.8)
    with runs.drafted(file) as draft:
        figure.savefig(draft, dpi=130, format="png")
    plt.close(figure)


def draw_comparison(file: Path, heatmaps: Sequence[Heatmap], lengths: Sequence[int], unit: str) -> None:
    """Draw the hit rate of each system over the length, with Wilson's 95 % interval as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
    for i, one in enumerate(heatmaps):
        counts = {length: one.rate(length) for length in lengths if one.rate(length)[1]}
        if not counts:
            continue
        rates = [hits / trials for hits, trials in counts.values()]
        low, high = zip(*(wilson(hits, trials) for hits, trials in counts.values()))
        colour, dash = colours[i % len(colours)], ("-", "--", "-.", ":")[i // 2 % 4]
        ax.plot([*counts], rates, dash, color=colour, marker="os^Dv<>"[i % 7], markersize=4, label=one.name)
        ax.fill_between([*counts], low, high, color=colour, alpha=0.15, linewidth=0)
    for trained_length in {one.trained_length for one in heatmaps if one.trained_length <= lengths[-1]}:
        ax.axvline(trained_length, color="0.5", linestyle=":", linewidth=1)
    ax.set(xlabel=unit, ylabel="found", ylim=(-0.03, 1.03), xscale="log" if lengths[-1] > 20 * lengths[0] else "linear")
    ax.set_xticks(lengths, map(axis_label, lengths), fontsize=7, rotation=0 if len(lengths) <= 8 else 60)
    ax.minorticks_off()
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    with runs.drafted(file) as draft:
        figure.savefig(draft, dpi=130, format="png")
    plt.close(figure)
