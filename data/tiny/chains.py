"""The miniature trained several times from nothing: the needles that each chain finds, and how much chains differ.

What      A chain is all commands of the README, from the base model to (iv), with one seed; `add` reads what its
          `python vniah.py --own` left, for any number of test seeds, into one JSON file. `table` shows the median over
          chains, the minimum and the maximum; data/pictures.py draws them. The first chain is the shipped one.
Paper     Fig. 4. The paper trains one model of each kind.
Run       python -m data.tiny.chains
          python -m data.tiny.chains --chain "seed 3" --results runs/vniah --results runs/v8
Dimensions  none
Differs   Intervals over the needles of one model do not show how much models differ.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from data import evaluate, runs
from data.flags import read_json, run, setting

FILE = Path(__file__).with_name("chains.json")
TRIAL = "trial of"  # how the names of candidates for (iv) begin
Found = dict[str, dict[str, list[int]]]  # system, length: needles found at each depth


@dataclass(frozen=True)
class Config:
    """Add a chain's results, if one is named, and print what all chains find."""

    chain: str | None = setting(None, "name of the chain to add or replace, such as 'seed 3' (ours)")
    results: tuple[Path, ...] = setting((), "folder of a needle test of it; once for each test and seed (ours)")

    def __post_init__(self):
        if bool(self.chain) != bool(self.results):
            raise ValueError("--chain names the chain whose tests --results gives; give both or neither")


def load() -> dict:
    """Return {"vision", "text": {"lengths", "depths", "of": needles a cell}, "chains": {chain: {test: Found}}}."""
    return read_json(FILE) if FILE.exists() else {"chains": {}}


def own_cells(record: dict) -> list[dict]:
    """Return the cells of a results.json without candidates, and without shipped models where a chain has none."""
    settings, models = record["settings"], evaluate.FIGURE[record["settings"]["task"]]
    folders = [Path(name).parts[-3:] for name in settings]  # wherever the project stood
    shipped = tuple(name for name, model in models.items() if settings["own"] and ("data", "tiny", model) in folders)
    *_, baseline = models

    def is_own(system: str) -> bool:
        trained = baseline if "training-free" in system else system  # (iv) is the baseline with other positions
        return not system.startswith(TRIAL) and not trained.startswith(shipped)

    return [cell for cell in record["cells"] if is_own(cell["system"])]


def add(data: dict, chain: str, folders: Iterable[Path]) -> None:
    """Put a chain's results, of one folder for each test and seed, in the place of those that it had.

    Raises ValueError for two results of the same test and seed, and for other lengths, depths or numbers of needles
    than the other results have.
    """
    tests = data["chains"][chain] = {}
    for folder in folders:
        record = read_json(folder / "results.json")
        settings, cells = record["settings"], own_cells(record)
        lengths = settings["frames" if settings["task"] == "vision" else "context"]
        shape = {"lengths": lengths, "depths": settings["depths"], "of": cells[0]["of"]}
        if data.setdefault(settings["task"], shape) != shape:
            raise ValueError(f"{folder} has other lengths, depths or needles than the other results: {shape}")
        found: Found = {}
        for cell in sorted(cells, key=lambda cell: (cell["system"], cell["length"], cell["depth"])):
            found.setdefault(cell["system"], {}).setdefault(str(cell["length"]), []).append(cell["found"])
        test = f"{settings['task']}, seed {settings['seed']}"
        if test in tests:
            raise ValueError(f"{folder} is a second result of {test}; give each test once")
        tests[test] = found


def plain(system: str) -> str:
    """Return a system's name, of (iv) without its RoPE base or scaling, as chains may choose different ones."""
    return re.sub(r"^(\(iv\) )?.*training-free", r"\1training-free", system)


def rates(data: dict, task: str) -> dict[str, dict[int, list[float]]]:
    """Return {system: {length: each chain's share, over depths and test seeds}}."""
    shares: dict[str, dict[int, list[float]]] = {}
    for tests in data["chains"].values():
        hits: dict[tuple[str, int], list[int]] = {}
        for test, found in tests.items():
            for system, lengths in found.items() if test.startswith(task) else ():
                for length, some in lengths.items():
                    hits.setdefault((plain(system), int(length)), []).extend(some)
        for (system, length), some in hits.items():
            shares.setdefault(system, {}).setdefault(length, []).append(sum(some) / len(some) / data[task]["of"])
    return shares


def table(data: dict, task: str) -> str:
    """Return lines of Markdown, one for each system: at each length the median over chains (minimum to maximum)."""

    def cell(shares: list[float]) -> str:
        lowest, middle, highest = (f"{share:.2f}" for share in (min(shares), median(shares), max(shares)))
        return middle if lowest == highest else f"{middle} ({lowest} to {highest})"

    shares = rates(data, task)
    lengths = data[task]["lengths"]
    lines = [" | ".join(["", "frames" if task == "vision" else "tokens", "chains", *map(str, lengths), ""]).strip()]
    lines += ["|---|" + "--:|" * (len(lengths) + 1)]
    for system, by_length in sorted(shares.items()):
        cells = [cell(some) for _, some in sorted(by_length.items())]
        lines.append(f"| {system} | {len(by_length[lengths[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Add a chain, if one is named; print the tables."""
    data = load()
    if cfg.chain:
        add(data, cfg.chain, cfg.results)
        runs.replace_text(FILE, json.dumps(data) + "\n")
    for task in sorted(data.keys() - {"chains"}, reverse=True):
        print(table(data, task), end="\n\n")


if __name__ == "__main__":
    run(main, Config)
