"""What a shared haystack saves: vniah.py --engine cache beside --engine ring, the paper's one pass per probe.

What      Two tables. Work: tokens that pass through the layers and pairs of a query and a key, counted for the paper's
          grid (15 lengths, 6 depths, 5 needles, 144 tokens a frame), all reading of the haystack included; nothing is
          run. Time: both engines answer the same probes with the shipped model in one process, in turns; the best
          CPU time of each counts, on one thread. Both must find the same.
Paper     Sec. 4: 450 forward passes of up to 432,000 tokens each.
Run       python tests/bench.py needles            about 2 minutes on an idle core
          python tests/bench.py needles --quick    toy sizes: only shows that both engines still run and agree
Dimensions  those of vniah.py
Differs   --engine ring on one process is a pass over the whole probe with plain causal attention: no ring is timed.
"""

import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import longva
import ring
import vniah
from data import runs, tokenizer

WANTED, WANTED_TIME = 1.6, 1.5
QUESTIONS, ANSWERS, PRE = (76, 47, 29, 41, 53), (1, 1, 3, 1, 1), 14  # tokens of the five of lmms-lab/v_niah_needles
POST = 5
ROUNDS = 3
LENGTHS, QUICK_LENGTHS = tuple(range(50, 501, 50)), (2, 4, 6)
Read = tuple[int, int, int]  # rows, tokens of each, tokens known before


def work(reads: Iterable[Read]) -> tuple[int, int]:
    """(tokens that pass through the layers, pairs of a query and a key that it may see)."""
    reads = list(reads)
    return sum(B * T for B, T, _ in reads), sum(B * (T * known + T * (T + 1) // 2) for B, T, known in reads)


def outline(cfg: vniah.Config, pre: int, M: int, asks: Iterable[int], answers: Iterable[int]) -> vniah.VisualNIAH:
    """A Film without a model: enough to make jobs of."""
    film = vniah.VisualNIAH.__new__(vniah.VisualNIAH)
    film.cfg, film.prefix_1TD = cfg, torch.empty(1, pre, 0)
    film.haystack_NMD, film.distractor_NMD = torch.empty(0, M, 0), torch.empty(0, M, 0)
    film.question_ids, film.answer_ids = [[0] * n for n in asks], [[0] * n for n in answers]
    return film


def cache_reads(film: vniah.VisualNIAH, cells: list[tuple[int, float]]) -> Iterable[Read]:
    """What --engine cache reads in one process, with --max-new-tokens 0 and without distractors."""
    pre, M, known = film.prefix_1TD.shape[1], film.haystack_NMD.shape[1], 0
    yield 1, pre, 0
    for job in film.groups(cells):
        if job.insert_at > known:
            yield 1, (job.insert_at - known) * M, pre + known * M
            known = job.insert_at
        B, ask, answer = (
            len(job.needle_ids),
            len(film.question_ids[job.needle_ids[0]]),
            len(film.answer_ids[job.needle_ids[0]]),
        )
        here = pre + job.insert_at * M
        yield B, M, here
        here += M
        for length, _ in job.cells:
            tail = pre + (length + 1) * M - here
            if tail:
                yield B, tail, here
            here += tail
            yield B, ask - 1, here
            yield B, answer, here + ask - 1


def single_reads(film: vniah.VisualNIAH, cells: list[tuple[int, float]]) -> Iterable[Read]:
    """One pass for each probe: prompt, needle and haystack, question, and the answer but for its last token."""
    pre, M = film.prefix_1TD.shape[1], film.haystack_NMD.shape[1]
    for length, _ in cells:
        for i in range(len(film.question_ids)):
            yield 1, pre + (length + 1) * M + len(film.question_ids[i]) + len(film.answer_ids[i]) - 1, 0


def paper_work() -> dict[str, tuple[int, int]]:
    """The work of either engine on the paper's grid."""
    cfg = vniah.resolve(vniah.Config(protocol="paper"))
    film = outline(cfg, PRE, 144, [n + POST for n in QUESTIONS], ANSWERS)
    cells = [(length, depth) for length in cfg.frames for depth in cfg.depths]
    return {"one pass per probe": work(single_reads(film, cells)), "ours": work(cache_reads(film, cells))}


def say_work(table: dict[str, tuple[int, int]]) -> bool:
    """Print the table of work; is it as little as wanted?"""
    print("the paper's grid, 450 probes, M=144")
    print(f"{'':<24}{'tokens':>16}{'pairs':>22}")
    for name, (tokens, pairs) in table.items():
        print(f"{name:<24}{tokens:>16,}{pairs:>22,}")
    single, ours = table.values()
    ratios = [theirs / mine for theirs, mine in zip(single, ours)]
    verdict = "ok" if min(ratios) >= WANTED else "short"
    print(f"saved: {ratios[0]:.2f} times the tokens, {ratios[1]:.2f} times the pairs, wanted >= {WANTED}: {verdict}")
    return min(ratios) >= WANTED


def answers_of(film: vniah.VisualNIAH, engine: str, cells: list[tuple[int, float]]) -> tuple[dict, float]:
    """({probe: hit}, CPU seconds) of all probes by one engine; encoding the film is not counted."""
    film.cfg = replace(film.cfg, engine=engine)
    film.reset(film.system)
    jobs, begun = film.groups(cells), time.process_time()
    lines = [line for job in jobs for found in film.probe(job, jobs) for line in found]
    spent = time.process_time() - begun
    return {(line["length"], line["depth"], line["needle"]): line["hit"] for line in lines}, spent


def time_engines(lengths: tuple[int, ...], rounds: int) -> tuple[dict[str, float], float, bool]:
    """(best CPU seconds of each engine, share found, do they agree?) with the shipped model."""
    folder, world = runs.TINY / "longva", ring.World(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as out:
        grid = {"frames": lengths, "depths": vniah.PAPER_DEPTHS["vision"], "needle_count": 5, "distractors": 0}
        cfg = vniah.resolve(vniah.Config(protocol="tiny", weights=folder, out=Path(out), max_new_tokens=0, **grid))
        model, words = longva.load(folder), tokenizer.load_tokenizer(folder)
        film = vniah.VisualNIAH(cfg, vniah.System("longva", folder, None, 0), model, words, world)
        cells = [(length, depth) for length in cfg.frames for depth in cfg.depths]
        best, found = {}, {}
        for _ in range(rounds):
            for engine in ("ring", "cache"):
                found[engine], spent = answers_of(film, engine, cells)
                best[engine] = min(spent, best.get(engine, spent))
    hits = found["cache"]
    return best, sum(hits.values()) / len(hits), found["cache"] == found["ring"] and len(hits) == 5 * len(cells)


def say_time(best: dict[str, float], share: float, agree: bool, lengths: tuple[int, ...]) -> None:
    """Print the table of CPU time."""
    print(f"\ntorch {torch.__version__}; shipped model, {len(lengths)} lengths to {lengths[-1]} frames, 6 depths, "
          f"5 needles, {share:.2f} found")  # fmt: skip
    ratio = best["ring"] / best["cache"]
    verdict = "WRONG" if not agree else "ok" if ratio >= WANTED_TIME else "short"
    print(f"--engine ring {best['ring']:.2f} s, --engine cache {best['cache']:.2f} s of CPU time: "
          f"ratio {ratio:.2f}, wanted >= {WANTED_TIME}: {verdict}")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print both tables: 0, or 1 where the engines disagree. Ratios fail nothing: they are for people to read."""
    quick = "--quick" in arguments
    torch.set_num_threads(1)
    say_work(paper_work())
    lengths = QUICK_LENGTHS if quick else LENGTHS
    best, share, agree = time_engines(lengths, 1 if quick else ROUNDS)
    say_time(best, share, agree, lengths)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
