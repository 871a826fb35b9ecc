"""V-NIAH: find one frame in a haystack of thousands (Sec. 4), and its twin for text (App. A).

What      `vision` hides a picture among the frames of a film and asks about it, at every length and depth;
          `text` hides a number in a story. The score: every token of the answer must be the likeliest, the answer fed
          as given; beside it, what the model says by itself.
Paper     Sec. 4 and Fig. 4 (V-NIAH), App. A and Fig. 7 (needles in text).
Run       python vniah.py                                       the four systems of the miniature Figure 4
          python vniah.py text                                  the language models alone
          python vniah.py --haystack FILM.mp4 --needles FOLDER  your film (1 frame per second), your needles
          python vniah.py --protocol paper --weights LongVA-7B --haystack FILM.mp4 --needles FOLDER
          torchrun --nproc-per-node 8 vniah.py ...              probes spread over ranks; or --engine ring: the paper's
Key       B probes read together   N frames   M tokens per frame   T tokens   S tokens of a whole probe   D LM width
          Q tokens of the question   A of the answer   I of the needle (M, or none)
Deviates  Needles with one place in the same haystack are read once for all lengths, into a cache that grows with the
          frames, is branched off at the needle, and cropped back behind each question. --engine ring is the paper's
          way: each probe is read by all ranks at once, nothing is kept. Both give the same scores.
          A few distractors (look-alikes: other things with other numbers, or other needles of the folder) lie in the
          miniature's haystack, else the only number would be the answer; --distractors 0 is the paper's test.
          Numbers in text are drawn anew for each cell; --protocol paper has the same five everywhere.
          Intervals are Wilson's at 95 %, over all probes; the same needles come at every length and depth, so that
          probes are not independent, and other needles may differ by more. The same questions without the needle
          show what guessing gives; with the options in another order, whether a letter is preferred.

Killed and started again it goes on where it was; the same numbers come out.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import longva
import ring
import unires
from data import chat, film_cache, niah, results, runs, synthetic, tokenizer, video, weights
from data.config import stop_ids
from data.flags import at_least, run, setting


@dataclass(frozen=True)
class Config:
    """Needle in a haystack, of frames or of text (Sec. 4, App. A). What is left out is the protocol's."""

    task: Literal["vision", "text"] = setting(
        "vision", "what the haystack is made of (Sec. 4, App. A)", positional=True
    )
    protocol: Literal["paper", "tiny"] = setting("paper", "the paper's grid and draws, or the miniature's (App. A)")
    weights: Path | None = setting(None, "one model folder; none: the shipped systems of Figure 4 (ours)")
    own: bool = setting(False, "test what the training commands left in runs/, not the shipped models (ours)")
    template: str | None = setting(None, "of the question; none: the tokenizer's family (release: qwen2, mistral, ...)")
    out: Path | None = setting(None, "folder of results (ours: runs/vniah-TASK-MODEL and what was given)")
    haystack: str = setting("synthetic", "a film, a folder of pictures or of .txt, or synthetic (Sec. 4)")
    needles: Path | None = setting(None, "folder with pictures and questions.json; none: drawn from the seed (Sec. 4)")
    needle_count: int | None = setting(None, "needles drawn from the seed (Sec. 4: 5)")
    number_count: int | None = setting(None, "magic numbers asked for in each cell of a story (App. A: 5)")
    frames: tuple[int, ...] | None = setting(None, "frames of the haystack (Sec. 4: 200 to 3000)")
    context: tuple[int, ...] | None = setting(None, "tokens of the story (App. A: 32K to 512K)")
    depths: tuple[float, ...] | None = setting(None, "where the needle lies, 0 first (Sec. 4: by 0.2; App. A: by 0.1)")
    distractors: int | None = setting(None, "look-alikes in a haystack of frames (Sec. 4: 0)")
    distractor_counts: tuple[int, ...] = setting((0, 3, 5), "other cities' numbers in a story (App. A)")
    digits: int | None = setting(None, "digits of a magic number (release: 7)")
    legacy_periods: bool = setting(False, "look for Llama-2's full stops in every tokenizer's text (release)")
    rope_theta: tuple[float, ...] = setting((), "RoPE bases to test untrained: of --weights, or of (iii) (Fig. 4)")
    controls: bool = setting(True, "also ask without the needle, and with options in another order (ours)")
    speak: int = setting(8, "tokens that the model says by itself to each question, 0: none (ours)")
    engine: Literal["cache", "ring"] = setting("cache", "keep what is read once, or the paper's way (Sec. 4)")
    keep: bool = setting(True, "keep the encoded film in --out, for the next run (ours)")
    plot_only: bool = setting(False, "no probes: tables and pictures of what is known (ours)")
    colours: Literal["safe", "paper"] = setting("safe", "legible to the colour-blind, or the paper's (Fig. 4)")
    trained_on: int | None = setting(
        None, "tokens the model was trained at, for the dotted line; none: its config's (ours)"
    )
    seed: int | None = setting(None, "of needles, film and story; training never uses it (release: 24242424)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, digits=1, rope_theta=1, trained_on=1, needle_count=1, number_count=1, seed=0, speak=0)
        most = len(niah.DISTRACTORS)
        for name in ("frames", "context"):
            given = getattr(self, name)
            if given is not None and list(given) != sorted({n for n in given if n > 0}):
                raise ValueError(f"--{name} {given}: name each length once, from short to long, above 0")
        if min(self.distractor_counts) < 0 or max(self.distractor_counts) > most:
            raise ValueError(
                f"--distractor-counts {self.distractor_counts}: there are {most} other cities, 0 to {most} go"
            )
        if not 0 <= (self.distractors or 0) < len(synthetic.THINGS):
            raise ValueError(f"--distractors {self.distractors}: 0 to {len(synthetic.THINGS) - 1} go, one a thing")
        for depth in self.depths or ():
            niah.insert_index(1, depth)  # refuses what is outside 0..1


PRESETS = {"tiny": {"protocol": "tiny"}, "paper": {"protocol": "paper"}}
PROTOCOLS = {  # the tiny: 90 seconds on two CPU cores; the paper's, by estimate: 2 hours on 8 A100s, for text 5
    "tiny": {
        "needle_count": 20, "frames": (8, 32, 56, 128, 256, 512),
        "number_count": 8, "context": (128, 256, 512, 1024, 2048, 3072),
        "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "distractors": 3, "digits": 3, "seed": 7,
    },
    "paper": {
        "needle_count": 5, "frames": tuple(range(200, 3001, 200)),
        "number_count": 5, "context": tuple(range(32_000, 512_001, 32_000)),
        "distractors": 0, "digits": 7, "seed": niah.SEED,
    },
}  # fmt: skip
PAPER_DEPTHS = {"vision": tuple(i / 5 for i in range(6)), "text": tuple(i / 10 for i in range(11))}
TRIALS = (3e4, 1e5, 1e6)  # RoPE bases tried on the miniature's baseline
AT_ONCE = 2**17  # tokens read together, over all probes of a batch; longer haystacks are read one by one


def resolve(cfg: Config) -> Config:
    """Fill what was left to the protocol."""
    values = {"depths": PAPER_DEPTHS[cfg.task]} | PROTOCOLS[cfg.protocol]
    name = [cfg.task, cfg.weights.resolve().name if cfg.weights else "own" if cfg.own else "tiny"]
    name += [Path(part).stem for part in (cfg.haystack, cfg.needles) if part and part != "synthetic"]
    values |= {"out": Path(f"runs/vniah-{'-'.join(name)}")} | ({"distractors": 0} if cfg.needles else {})
    return replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})


@dataclass(frozen=True)
class Panel:
    """One heatmap: a model and what is asked of it."""

    name: str
    folder: Path
    rope_theta: float | None = None  # in place of the one it was trained with
    distractors: int = 3
    control: Literal["", "no needle", "shuffled"] = ""  # the same questions, the needle left out, or options moved
    trial: bool = False  # True: other needles and another haystack, to choose a RoPE base by


class Job(NamedTuple):
    """Probes that are read together: needles (by number) with one place in one haystack, at some lengths."""

    at: int  # frames before the needle; of a story's cell, 0
    spread: int  # frames over which the distractors are spread; 0: there are none, and haystacks begin alike
    needles: tuple[int, ...]
    cells: tuple[tuple[int, float], ...]  # (length, depth), from short to long


Known = dict[tuple[str, int, float], dict[str, dict]]  # (panel, length, depth) -> needle -> what a probe found


# -------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def score_and_generate(
    model: longva.LM, ask_BQD: Tensor, answer_BA: Tensor, cache: longva.KVCache, speak: int, stops: list[int]
) -> tuple[list[bool], list[list[int]]]:
    """Ask behind what `cache` holds: (is each token of the answer the likeliest one? (Sec. 4), ids said unaided).

    The answer is fed as given, so that all of its tokens are judged in one pass. Then the model speaks, greedily, at
    most `speak` tokens. `cache` is cropped back to where it was.
    """
    begin = cache.mark()
    longva.prefill(model, ask_BQD[:, :-1], cache)
    asked = cache.mark()
    x_BAD = torch.cat([ask_BQD[:, -1:], model.embed(answer_BA[:, :-1])], dim=1)
    best_BA = model.logits(longva.prefill(model, x_BAD, cache)).argmax(-1)
    hits, said_B1 = (best_BA == answer_BA).all(1).tolist(), [best_BA[:, :1]]
    cache.rewind(asked + 1)
    stop = torch.tensor(stops, device=answer_BA.device)
    ended_B = torch.isin(said_B1[0][:, 0], stop)
    while len(said_B1) < speak and not ended_B.all():
        h_B1D = longva.prefill(model, model.embed(said_B1[-1]), cache)
        said_B1.append(model.logits(h_B1D).argmax(-1))
        ended_B |= torch.isin(said_B1[-1][:, 0], stop)
    cache.rewind(begin)
    rows = torch.cat(said_B1, dim=1).tolist() if speak else [[]] * len(hits)
    return hits, [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def says(text: str, answer: str) -> bool:
    """Whether a sentence gives the answer: as whole words somewhere; an option's letter must come first."""
    text, answer = text.strip().lower(), answer.strip().lower()
    if re.fullmatch("[a-e]", answer):
        return bool(re.match(rf"\(?{answer}(?![\w' ])", text))  # "a dog" is no option
    return bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text))


@torch.no_grad()
def score_one_pass(model: longva.LM, x_1SD: Tensor, answer: list[int], world: ring.World) -> bool:
    """Read a probe, the answer but for its last token included, on all ranks at once: is each token likeliest?"""
    S, A = x_1SD.shape[1], len(answer)
    room = 2 * world.ranks if world.ranks > 1 else 1
    x_1SD = torch.nn.functional.pad(x_1SD, (0, 0, 0, -S % room))  # behind all that counts
    targets_1S = torch.full(x_1SD.shape[:2], chat.IGNORE, device=x_1SD.device)
    targets_1S[0, S - A : S] = torch.tensor(answer, device=x_1SD.device)
    idx_T = ring.zigzag_index(x_1SD.shape[1], world)
    h_1TD = model.model(x_1SD[:, idx_T], idx_T, ring.zigzag_attend(world))
    hits_1, of_1 = longva.count_correct(h_1TD, model.lm_head.weight, targets_1S[:, idx_T])
    return ring.all_reduce_sum(of_1 - hits_1, world).item() == 0


def group_by_shape(sizes: list, tokens: int) -> list[tuple[int, ...]]:
    """Indices of probes of one size each, which can be read together; not too many of `tokens` tokens at once."""
    most = max(1, AT_ONCE // max(1, tokens))
    groups = [[i for i, found in enumerate(sizes) if found == size] for size in sorted(set(sizes))]
    return [tuple(group[i : i + most]) for group in groups for i in range(0, len(group), most)]


class Film:
    """V-NIAH: the film and the needles as one model sees them (Sec. 4)."""

    def __init__(self, cfg: Config, panel: Panel, model: longva.LongVA, words: tokenizer.Tokenizer, world: ring.World):
        self.cfg, self.model, self.words, self.world = cfg, model, words, world
        self.hidden, signs = pick_needles(cfg, panel)
        template = cfg.template or chat.default_template(words)
        pre, self.post = chat.template_ids(words, template)
        self.pre_1TD = model.embed(torch.tensor([pre], device=model.device))
        self.stops = sorted({*words.stop_ids, *stop_ids(panel.folder)})
        self.film_NMD, self.hashes = encode_film(cfg, panel, model, world)
        self.names = [needle.name for needle in self.hidden]
        self.needle_NMD = encode_frames(model, (needle.picture for needle in self.hidden))[0]
        self.sign_NMD = encode_frames(model, (sign.picture for sign in signs))[0] if signs else self.film_NMD[:0]
        told = list(map(niah.describe, self.hidden))
        self.prompts = {"template": template, "pre": pre, "post": self.post, "needles": told}
        self.enter(panel)

    def enter(self, panel: Panel) -> None:
        """Prepare for a panel of this model: what is asked, and a cache that knows nothing."""
        self.panel, self.spread, self.cache = panel, None, None
        asks = asked(self.cfg, panel, self.hidden)
        self.asked = [i for i, needle in enumerate(asks) if needle]
        encode = self.words.encode
        self.asks = [n and encode("\n" + n.question.removeprefix("\n")) + self.post for n in asks]
        self.answers = [n and encode(n.answer) for n in asks]
        self.wanted = [n and n.answer for n in asks]

    def jobs(self, cells: list[tuple[int, float]]) -> list[Job]:
        """Cells whose needles have one place in the same haystack are one job, and so is each size of question."""
        M, places = self.film_NMD.shape[1], {}
        for length, depth in cells:
            spread = length if len(self.sign_NMD) else 0
            places.setdefault((spread, niah.insert_index(length, depth)), []).append((length, depth))
        made = []
        for (spread, at), served in sorted(places.items()):
            sizes = [(len(self.asks[i]), len(self.answers[i])) for i in self.asked]
            together = max(served)[0] * M if self.cfg.engine == "cache" else AT_ONCE  # the paper reads one by one
            for group in group_by_shape(sizes, together):
                made.append(Job(at, spread, tuple(self.asked[j] for j in group), tuple(sorted(served))))
        return made

    def hay(self, spread: int, N: int) -> Tensor:
        """The first N frames, x_NMD; with the distractors evenly over `spread` of them, if there are any."""
        signs = self.sign_NMD[:spread]
        if not len(signs):
            return self.film_NMD[:N]
        hay_NMD = self.film_NMD[:N].clone()
        for i, sign_MD in enumerate(signs):
            if (place := int((i + 0.5) * spread / len(signs))) < N:
                hay_NMD[place] = sign_MD
        return hay_NMD

    @torch.no_grad()
    def grow(self, job: Job, jobs: list[Job]) -> int:
        """Let the shared cache know the haystack up to the job's needle; how many tokens that are.

        Jobs come sorted, so that each frame is read once for all of them.
        """
        M, before = self.film_NMD.shape[1], self.pre_1TD.shape[1]
        if self.cache is None or self.spread != job.spread:
            room = before + max(other.at for other in jobs if other.spread == job.spread) * M
            self.cache = None  # the old one goes before the new one is made
            self.cache = longva.KVCache(self.model.model.config, 1, room, self.pre_1TD)
            longva.prefill(self.model, self.pre_1TD, self.cache)
            self.spread = job.spread
        known = (self.cache.length - before) // M
        if job.at > known:
            longva.prefill(self.model, self.hay(job.spread, job.at)[known:].flatten(0, 1)[None], self.cache)
        return before + job.at * M

    def probe(self, job: Job, jobs: list[Job]) -> Iterator[list[dict]]:
        """What each needle's probe finds, a list for each of the job's cells; the needle makes frames + 1 of them."""
        group, longest = list(job.needles), job.cells[-1][0]
        hay_NMD, M = self.hay(job.spread, longest), self.film_NMD.shape[1]
        needle_BID = self.needle_NMD[group, : 0 if self.panel.control == "no needle" else M]
        ask_BQ = torch.tensor([self.asks[i] for i in group], device=self.model.device)
        answer_BA = torch.tensor([self.answers[i] for i in group], device=self.model.device)
        ask_BQD = self.model.embed(ask_BQ)
        if self.cfg.engine == "ring":
            yield from (self.whole(job, hay_NMD, needle_BID, ask_BQD, answer_BA, *cell) for cell in job.cells)
            return
        before, said = self.grow(job, jobs), max(answer_BA.shape[1], self.cfg.speak)
        cache = self.cache.branch(before, len(group), (longest - job.at + 1) * M + ask_BQ.shape[1] + said)
        known = job.at
        if needle_BID.numel():
            longva.prefill(self.model, needle_BID, cache)
        for length, depth in job.cells:
            if length > known:
                x_TD = hay_NMD[known:length].flatten(0, 1)
                longva.prefill(self.model, x_TD.expand(len(group), -1, -1), cache)
                known = length
            hits, said = score_and_generate(self.model, ask_BQD, answer_BA, cache, self.cfg.speak, self.stops)
            tokens = cache.length + ask_BQ.shape[1]
            yield [self.record(i, length, depth, tokens, *found) for i, *found in zip(group, hits, said)]

    def whole(self, job, hay_NMD, needle_1ID, ask_1QD, answer_1A, length, depth) -> list[dict]:  # noqa: ANN001
        """A probe the paper's way: one pass over all of it, spread over the ranks."""
        before, after = (part.flatten(0, 1) for part in hay_NMD[:length].tensor_split([job.at]))
        film_1TD = torch.cat([before, needle_1ID[0], after])[None]
        x_1SD = torch.cat([self.pre_1TD, film_1TD, ask_1QD, self.model.embed(answer_1A[:, :-1])], dim=1)
        hit = score_one_pass(self.model, x_1SD, answer_1A[0].tolist(), self.world)
        return [self.record(job.needles[0], length, depth, x_1SD.shape[1] - answer_1A.shape[1] + 1, hit, [])]

    def record(self, i: int, length: int, depth: float, tokens: int, hit: bool, said: list[int]) -> dict:
        """A line of cells-RANK.jsonl."""
        text = self.words.decode(said)
        spoken = says(text, self.wanted[i]) if self.cfg.speak and self.cfg.engine == "cache" else None
        found = {"panel": self.panel.name, "length": length, "depth": depth, "needle": self.hidden[i].name}
        return found | {"kind": self.hidden[i].kind, "hit": hit, "spoken": spoken, "said": text, "tokens": tokens}


def encode_frames(model: longva.LongVA, pictures) -> tuple[Tensor, list[str]]:  # noqa: ANN001
    """Visual tokens of each picture, x_NMD, letterboxed as V-NIAH shows frames; and the pictures' digests."""
    M, hashes = model.config.vision.tokens_per_grid, []

    def grids() -> Iterator[Tensor]:
        for picture in pictures:
            hashes.append(niah.picture_hash(picture))
            yield unires.frame(picture, model.config.vision.side, "pad")

    return torch.cat(list(longva.encode_video(model, grids()))).unflatten(0, (-1, M)), hashes


def encode_film(cfg: Config, panel: Panel, model: longva.LongVA, world: ring.World) -> tuple[Tensor, list[str]]:
    """The haystack as the model sees it, x_NMD, and its frames' digests; encoded once and kept in --out/seen.

    With several ranks the first encodes and the others read. Raises ValueError for a film that is too short.
    """
    N = max(cfg.frames)
    source = (
        ["synthetic", cfg.seed + 1000 * panel.trial] if cfg.haystack == "synthetic" else film_cache.digest(cfg.haystack)
    )
    facts = {"film": source, "frames": N, "protocol": cfg.protocol, "weights": weights.hash_weights(panel.folder)}
    facts |= {"dtype": str(model.lm_head.weight.dtype)}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file, waiting = cfg.out / "seen" / f"{name}.safetensors", ring.long_timeout_group(world)
    if world.rank == 0 and not (file.exists() and (kept := film_cache.read_film(file, model.device))):
        kept = film_NMD, hashes = encode_frames(model, tqdm(open_film(cfg, panel, N), "film", N, leave=False))
        if cfg.keep or world.ranks > 1:
            file.parent.mkdir(parents=True, exist_ok=True)
            told = {"hashes": " ".join(hashes), "facts": json.dumps(facts)}
            save_file({"film": film_NMD}, file.with_suffix(".tmp"), told)
            file.with_suffix(".tmp").rename(file)
    ring.all_reduce_sum(torch.zeros(1), waiting)
    film_NMD, hashes = kept if world.rank == 0 else film_cache.read_film(file, model.device)
    ring.all_reduce_sum(torch.zeros(1), waiting)  # all have read it
    if not cfg.keep and world.rank == 0:
        file.unlink(missing_ok=True)
    if len(film_NMD) < N:
        raise ValueError(
            f"{cfg.haystack} gives {len(film_NMD)} frames at 1 per second, but the longest haystack has "
            f"{N}; take a longer film or name shorter lengths, such as --frames {len(film_NMD)}"
        )
    return film_NMD, hashes


def open_film(cfg: Config, panel: Panel, frames: int) -> Iterator:
    """The haystack's pictures, one per second of film, as a stream; the paper's protocol counts frames of a file."""
    if cfg.haystack == "synthetic":
        return islice(synthetic.film(cfg.seed + 1000 * panel.trial), frames)
    fps = video.release_rate(cfg.haystack) if cfg.protocol == "paper" and Path(cfg.haystack).is_file() else 1.0
    return (picture for _, picture in islice(video.frames(cfg.haystack, fps=fps), frames))


def asked(cfg: Config, panel: Panel, hidden: list[niah.Needle]) -> list[niah.Needle | None]:
    """The needles as a panel asks about them; None for one that it leaves out, for want of options to move."""
    rng = np.random.default_rng([0x0B7, cfg.seed])
    return [niah.shuffled_options(one, rng) for one in hidden] if panel.control == "shuffled" else hidden


def pick_needles(cfg: Config, panel: Panel) -> tuple[list[niah.Needle], list[niah.Needle]]:
    """The needles, and the distractors: needles of other things, of a folder some that are then not asked about."""
    if cfg.needles:
        given = niah.read_needles(cfg.needles)
        if len(given) <= panel.distractors:
            raise ValueError(f"{cfg.needles} has {len(given)} needles, too few for --distractors {panel.distractors}")
        drawn = np.random.default_rng([0xD15, cfg.seed]).permutation(len(given)).tolist()
        return [given[i] for i in sorted(drawn[panel.distractors :])], [given[i] for i in drawn[: panel.distractors]]
    count = cfg.needle_count if not panel.trial else 8
    return synthetic.draw_needles(cfg.seed + 1000 * panel.trial, count, panel.distractors)


class Story:
    """Needles in text: a story, a magic number hidden in it, other cities' numbers as distractors (App. A)."""

    def __init__(self, cfg: Config, panel: Panel, model: longva.LM, words: tokenizer.Tokenizer, world: ring.World):
        self.cfg, self.model, self.words, self.world = cfg, model, words, world
        self.stops = niah.LLAMA_PERIODS if cfg.legacy_periods else niah.period_ids(words.encode)
        self.ends = sorted({*words.stop_ids, *stop_ids(panel.folder)})
        seed, given = cfg.seed + 1000 * panel.trial, cfg.haystack != "synthetic"
        text = niah.read_text_haystack(cfg.haystack) if given else synthetic.story(seed, max(cfg.context))
        self.ids, self.hashes = words.encode(text), [hashlib.sha256(text.encode()).hexdigest()[:16]]
        self.names = asked_names(cfg, panel)
        self.prompts = {"before": niah.PREFIX, "needle": niah.NEEDLE, "question": niah.QUESTION}
        self.enter(panel)

    def enter(self, panel: Panel) -> None:
        """Prepare for a panel of this model."""
        self.panel = panel
        self.draws = released_draws(self.cfg, panel, self.words) if self.cfg.protocol == "paper" else None

    def jobs(self, cells: list[tuple[int, float]]) -> list[Job]:
        """Each cell is a job, for no two texts begin alike."""
        return [Job(0, 0, tuple(range(self.cfg.number_count)), (cell,)) for cell in cells]

    def probes(self, context: int, depth: float) -> list[tuple[list[int], list[int]]]:
        """(ids, ids of the answer) of every probe of a cell; numbers and places are drawn anew for each.

        With the paper's protocol they come from one stream of draws for the whole grid, as in the release.
        """
        rng = np.random.RandomState([self.cfg.seed % 2**32, self.panel.trial, context, round(100 * depth)])
        made = []
        for i in range(self.cfg.number_count):
            if self.draws:
                numbers, states = self.draws
                number, others = numbers[i], numbers[self.cfg.number_count :]
                rng.set_state(states[context, depth, i])
            else:
                number, *others = niah.magic_numbers(rng, 1 + self.panel.distractors, self.cfg.digits)
            lies = list(zip(niah.DISTRACTORS, others))
            probe = (self.words.encode, self.ids, context, depth, number, lies, rng, self.stops)
            made.append(niah.text_probe(*probe))
        return made

    def probe(self, job: Job, jobs: list[Job]) -> Iterator[list[dict]]:
        """What each probe of the job's one cell finds."""
        ((context, depth),) = job.cells
        probes, found = self.probes(context, depth), []
        for group in group_by_shape([(len(ids), len(answer)) for ids, answer in probes], context):
            group = tuple(i for i in group if i in job.needles)
            found += self.whole(probes, group) if self.cfg.engine == "ring" else self.read(probes, group)
        lines = []
        for i, hit, said in sorted(found):
            answer, text = self.words.decode(probes[i][1]), self.words.decode(said)
            spoken = says(text, answer) if self.cfg.speak and self.cfg.engine == "cache" else None
            line = {"panel": self.panel.name, "length": context, "depth": depth, "needle": self.names[i], "hit": hit}
            lines.append(line | {"spoken": spoken, "said": text, "tokens": len(probes[i][0])})
        yield lines

    def read(self, probes: list, group: tuple[int, ...]) -> Iterator[tuple[int, bool, list[int]]]:
        """(number of the probe, hit, ids said) of probes of one length, read together."""
        ids_BT = torch.tensor([probes[i][0] for i in group], device=self.model.device)
        answer_BA = torch.tensor([probes[i][1] for i in group], device=self.model.device)
        x_BTD = self.model.embed(ids_BT)
        room = x_BTD.shape[1] + max(answer_BA.shape[1], self.cfg.speak)
        cache = longva.KVCache(self.model.model.config, len(group), room, x_BTD)
        yield from zip(group, *score_and_generate(self.model, x_BTD, answer_BA, cache, self.cfg.speak, self.ends))

    def whole(self, probes: list, group: tuple[int, ...]) -> Iterator[tuple[int, bool, list[int]]]:
        """The same the paper's way, one after the other on all ranks at once."""
        for i in group:
            ids, answer = probes[i]
            x_1SD = self.model.embed(torch.tensor([ids + answer[:-1]], device=self.model.device))
            yield i, score_one_pass(self.model, x_1SD, answer, self.world), []


def released_draws(cfg: Config, panel: Panel, words: tokenizer.Tokenizer) -> tuple[list[str], dict]:
    """(the numbers, the state of the generator before each probe's places are drawn) as the release draws them.

    From one seed: all needles' numbers, then the distractors', then for each length, depth and number one place per
    distractor, in a text that has grown by those before.
    """
    rng = np.random.RandomState((cfg.seed + 1000 * panel.trial) % 2**32)
    numbers = niah.magic_numbers(rng, cfg.number_count + panel.distractors, cfg.digits)
    lies = list(zip(niah.DISTRACTORS, numbers[cfg.number_count :]))
    grown = [len(words.encode(niah.NEEDLE.format(city=city, number=number))) for city, number in lies]
    states = {}
    for context in cfg.context:
        for depth in cfg.depths:
            for i in range(cfg.number_count):
                states[context, depth, i], size = rng.get_state(), context
                for more in grown:
                    rng.randint(size)
                    size += more
    return numbers, states


# ------------------------------------------------------------------------------------------- the probe loop


class Bench:
    """The models under test, each loaded once, and what is known of every cell, on this rank and the others."""

    def __init__(self, cfg: Config, world: ring.World, known: Known):
        self.cfg, self.world, self.known, self.tests, self.told = cfg, world, known, {}, {}
        self.waiting = ring.long_timeout_group(world)

    def test(self, panel: Panel) -> Film | Story:
        """The test of a panel, made or made over from another panel of the same model."""
        key = (panel.folder, panel.trial)
        if key not in self.tests:
            self.tests.clear()  # one model at a time
            model = longva.load(panel.folder, self.world.device)
            if self.cfg.task == "vision" and not isinstance(model, longva.LongVA):
                raise ValueError(f"{panel.folder} is a language model and cannot see; try: python vniah.py text")
            kind, words = Film if self.cfg.task == "vision" else Story, tokenizer.load_tokenizer(panel.folder)
            test = kind(self.cfg, panel, model, words, self.world)
            self.tests[key] = test, model.model.config.rope_theta
        test, trained_theta = self.tests[key]
        config = test.model.model.config
        test.model.model.config = replace(config, rope_theta=panel.rope_theta or trained_theta)
        test.enter(panel)
        self.told[panel.name] = {"prompts": test.prompts, "haystack": test.hashes}
        return test

    def probe(self, panels: list[Panel], lengths: tuple, depths: tuple) -> None:
        """Find out what is not known of the cells of `panels`, and keep each on disk as soon as it is known."""
        for panel in panels:
            cells = [(length, depth) for length in lengths for depth in depths]
            names = set(asked_names(self.cfg, panel))
            if all(names <= set(self.known.get((panel.name, *cell), ())) for cell in cells):
                continue
            test = None  # one model at a time: the old one goes before the next is loaded
            test = self.test(panel)
            jobs = [left for job in test.jobs(cells) if (left := self.left(panel, test, job)).cells]
            mine = jobs if self.cfg.engine == "ring" else jobs[self.world.rank :: self.world.ranks]
            count = sum(len(job.needles) * len(job.cells) for job in mine)
            with tqdm(total=count, desc=panel.name[:40], disable=self.world.rank > 0) as bar:
                for job in mine:
                    for lines in test.probe(job, mine):
                        self.write(lines)
                        bar.update(len(lines))
        self.known.clear()
        self.known.update(all_cells(self.cfg, self.waiting))

    def left(self, panel: Panel, test: Film | Story, job: Job) -> Job:
        """The part of a job that is not known: lengths that want a needle, and needles that a length wants."""
        pairs = [(cell, i) for cell in job.cells for i in job.needles]
        pairs = [(cell, i) for cell, i in pairs if test.names[i] not in self.known.get((panel.name, *cell), ())]
        return job._replace(cells=tuple(sorted({c for c, _ in pairs})), needles=tuple(sorted({i for _, i in pairs})))

    def write(self, lines: list[dict]) -> None:
        """Keep what was found of a cell."""
        if self.cfg.engine == "ring" and self.world.rank > 0:
            return
        with open(self.cfg.out / CELLS.format(self.world.rank), "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


# ----------------------------------------------------------------------------------------------------- main

CELLS = "cells-{}.jsonl"  # of each rank


def asked_names(cfg: Config, panel: Panel) -> list[str]:
    """The names of all needles that a panel asks about; known before any model is loaded."""
    if cfg.task == "text":
        return [f"number-{i}" for i in range(cfg.number_count)]
    return [needle.name for needle in asked(cfg, panel, pick_needles(cfg, panel)[0]) if needle]


def all_cells(cfg: Config, world: ring.World) -> Known:
    """What all ranks wrote. None goes on before all have read, or they would share out what is left differently."""
    ring.all_reduce_sum(torch.zeros(1), world)
    known = read_cells(cfg.out)
    ring.all_reduce_sum(torch.zeros(1), world)
    return known


def read_cells(folder: Path) -> Known:
    """What a run found out."""
    known: Known = {}
    for file in sorted(folder.glob(CELLS.format("*"))):
        for _, line in runs.entries(file):
            known.setdefault((line["panel"], line["length"], line["depth"]), {})[line["needle"]] = line
    return known


def system(cfg: Config, name: str) -> Path:
    """The folder of one system of the miniature: the shipped one, or the reader's own."""
    stage = "" if name in ("extended", "control") else "-sft"
    return runs.trained_or_shipped(f"tiny-{name}{stage}", name) if cfg.own else runs.TINY / name


def controls_of(cfg: Config, panel: Panel) -> list[Panel]:
    """The same model and questions without the needle, and with options in another order, if they have options."""
    made = [replace(panel, name=f"{panel.name}, no needle", control="no needle")]
    rng = np.random.default_rng(0)
    if any(niah.shuffled_options(needle, rng) for needle in pick_needles(cfg, panel)[0]):
        made.append(replace(panel, name=f"{panel.name}, options moved", control="shuffled"))
    return made if cfg.controls else []


def systems(cfg: Config) -> tuple[list[Panel], list[Panel], list[Panel]]:
    """The figure's panels, the controls, and the trials that choose a RoPE base for the baseline."""
    if cfg.weights:
        counts = (cfg.distractors,) if cfg.task == "vision" else cfg.distractor_counts
        tails = [""] if cfg.task == "vision" else [f", {n} distractors" for n in counts]
        panels = [
            Panel(f"{cfg.weights.resolve().name}{base}{tail}", cfg.weights, theta, n)
            for theta, base in [(None, ""), *((t, f", RoPE base {t:g}") for t in cfg.rope_theta)]
            for n, tail in zip(counts, tails)
        ]
        return panels, controls_of(cfg, panels[0]) if cfg.task == "vision" else [], []
    bases = cfg.rope_theta or TRIALS
    if cfg.task == "vision":
        names = {"(i) LongVA": "longva", "(ii) LongVA, AnyRes": "anyres", "(iii) not extended": "baseline"}
        panels = [Panel(name, system(cfg, folder), None, cfg.distractors) for name, folder in names.items()]
        trials = [replace(panels[2], name=f"trial {t:g}", rope_theta=t, trial=True) for t in bases]
        return panels, controls_of(cfg, panels[0]), trials
    control = system(cfg, "control")
    folders = {"extended": system(cfg, "extended"), "not extended": control}
    panels = [
        Panel(f"{name}, {n} distractors", at, None, n) for name, at in folders.items() for n in cfg.distractor_counts
    ]
    return panels, [], [Panel(f"trial {t:g}", control, t, max(cfg.distractor_counts), trial=True) for t in bases]


def main(cfg: Config) -> None:
    """Probe every cell that is not known yet, then print the tables and draw the results."""
    world, cfg = ring.start(cfg.device), resolve(cfg)
    lengths = cfg.frames if cfg.task == "vision" else cfg.context
    panels, controls, trials = systems(cfg)
    stamp, known = open_results(cfg, [*panels, *trials], world)
    bench = Bench(cfg, world, known)
    middle, best = cfg.depths[len(cfg.depths) // 2 :][:1], None
    stages = [(panels, lengths, cfg.depths), (controls, lengths, middle), (trials, lengths[-2:], cfg.depths[::2])]
    for stage in () if cfg.plot_only else stages:
        bench.probe(*stage)
    if trials and any(hits_of(known, trial) for trial in trials):
        best = max(trials, key=lambda trial: np.mean(hits_of(known, trial) or [0]))
        tail = f", {best.distractors} distractors" if cfg.task == "text" else ""
        raised = f"{'(iv) ' * (cfg.task == 'vision')}RoPE base {best.rope_theta:g}, untrained{tail}"
        panels.append(replace(best, name=raised, trial=False))
        if not cfg.plot_only:
            bench.probe(panels[-1:], lengths, cfg.depths)
    if world.rank == 0:
        show(cfg, known, panels, controls, trials)
        keep_results(cfg, stamp, bench.told, known)
    ring.stop()


def open_results(cfg: Config, panels: list[Panel], world: ring.World) -> tuple[dict, Known]:
    """(what the results depend on, what earlier runs with the same found out); a torn last line is probed again."""
    if cfg.plot_only and not list(cfg.out.glob(CELLS.format("*"))):
        raise ValueError(f"{cfg.out} holds no run to draw; run without --plot-only first")
    folders = sorted({panel.folder for panel in panels})
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"{missing[0]} is no folder; name a model's folder as --weights")
    if cfg.own and all(folder.parent == runs.TINY for folder in folders):
        raise ValueError("--own tests what the training commands of the README left in runs/, where none of it is")
    stamp = {name: value for name, value in asdict(cfg).items() if name not in LOOKS}
    if not cfg.plot_only:
        stamp |= {"weights": {str(folder): weights.hash_weights(folder) for folder in folders}}
        ring.print0(world, "testing " + ", ".join(os.path.relpath(folder) for folder in folders))
        if world.rank == 0:
            if cfg.out.is_dir() and not list(cfg.out.glob(CELLS.format("*"))):
                runs.lock(cfg.out)
                (cfg.out / "config.json").unlink(missing_ok=True)  # of a run that a mistake ended: begin anew
            runs.open_run(cfg.out, stamp)
            for file in cfg.out.glob(CELLS.format("*")):
                runs.truncate_log(cfg.out, None, file.name)
    elif world.rank == 0:
        cfg.out.mkdir(parents=True, exist_ok=True)
    return stamp, all_cells(cfg, ring.long_timeout_group(world))


LOOKS = ("plot_only", "colours", "trained_on", "device", "keep")  # change no score


def hits_of(known: Known, panel: Panel, length: int | None = None, key: str = "hit") -> list[bool]:
    """What the probes of a panel found, at one length or all; `key` "spoken": by what was said."""
    cells = [found for (name, n, _), found in known.items() if name == panel.name and length in (None, n)]
    return [probe[key] for found in cells for probe in found.values() if probe[key] is not None]


def show(cfg: Config, known: Known, panels: list[Panel], controls: list[Panel], trials: list[Panel]) -> None:
    """Print tables and a heatmap for terminals, and draw the pictures."""
    lengths, unit = (cfg.frames, "frames") if cfg.task == "vision" else (cfg.context, "tokens")

    def map_of(panel: Panel, key: str = "hit") -> results.Map:
        cells = [(n, d, found.values()) for (name, n, d), found in known.items() if name == panel.name]
        grid = {(n, d): [probe[key] for probe in found if probe[key] is not None] for n, d, found in cells}
        return results.Map(panel.name, grid, trained(cfg, panel)[0])

    maps = [map_of(panel) for panel in panels]
    print(results.table([*maps, *map(map_of, controls)], lengths, unit))
    spoken = [map_of(panel, "spoken") for panel in panels if hits_of(known, panel, key="spoken")]
    if spoken:
        print("\nby what the models say themselves:\n" + results.table(spoken, lengths, unit))
    if kinds := results.by_kind(known, [panel.name for panel in [*panels, *controls]]):
        print("\nby kind of needle:\n" + kinds)
    if trials and any(hits_of(known, trial) for trial in trials):
        tried = ", ".join(f"{trial.rope_theta:g}: {np.mean(hits_of(known, trial)):.2f}" for trial in trials)
        by = "with the same needles" if cfg.needles else "with another haystack and other needles"
        print(f"RoPE bases tried {by}, at the two greatest lengths: {tried}")
    print("\n" + "\n".join(results.blocks(one, lengths, cfg.depths, unit) for one in maps) + "\n")
    per_unit = trained(cfg, panels[0])[1]
    results.heatmap(cfg.out / "heatmap.png", maps, lengths, cfg.depths, unit, per_unit, cfg.colours)
    for i, one in enumerate(maps):
        results.heatmap(cfg.out / f"heatmap-{i + 1}.png", [one], lengths, cfg.depths, unit, per_unit, cfg.colours)
    results.comparison(cfg.out / "comparison.png", [*maps, *map(map_of, controls)], lengths, unit)


def keep_results(cfg: Config, stamp: dict, told: dict, known: Known) -> None:
    """Write results.json: all that is needed to do it again, every probe, and each cell's Wilson interval."""
    file = cfg.out / "results.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    cells = []
    for (panel, length, depth), found in sorted(known.items()):
        hits = [bool(probe["hit"]) for probe in found.values()]
        low, high = results.wilson(sum(hits), len(hits))
        cell = {"panel": panel, "length": length, "depth": depth, "found": sum(hits), "of": len(hits)}
        cells.append(cell | {"wilson": [round(low, 4), round(high, 4)], "probes": found})
    record = {"settings": stamp, "versions": runs.versions(), "panels": before.get("panels", {}) | told}
    record = ((cfg.plot_only and before) or record) | {"cells": cells}  # a drawing changes nothing of the run
    runs.replace_text(file, json.dumps(record, indent=1, default=str) + "\n")
    print(f"results: {file}   pictures: {cfg.out / 'heatmap.png'}, {cfg.out / 'comparison.png'}")
    if not cfg.weights:
        print("next:    python " + ("vniah.py text" if cfg.task == "vision" else "train_text.py --preset tiny-base"))


def trained(cfg: Config, panel: Panel) -> tuple[float, int]:
    """(the length that a panel's language model was trained at, for the dotted line, tokens per unit of length)."""
    config = longva.read_config(panel.folder)
    lm = config.lm if isinstance(config, longva.LongVAConfig) else config
    per_unit = config.vision.tokens_per_grid if cfg.task == "vision" else 1
    return (cfg.trained_on or lm.max_position_embeddings) / per_unit, per_unit


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
