"""V-NIAH: find one frame in a haystack of thousands (Sec. 4), and its twin for text (App. A).

What      `vision` inserts a picture among the frames of a video and asks about it, at every length and depth; `text`
          inserts a number into a story. A probe counts as found when every token of the answer is the argmax at
          its position, the answer itself being the input (teacher forcing). The first section is that test, one
          forward pass a probe; below it, an engine that gives the same scores with fewer tokens.
Paper     Sec. 4 and Fig. 4 (V-NIAH), App. A and Fig. 7 (needles in text).
Run       python vniah.py                                       the four systems of the miniature Figure 4
          python vniah.py text                                  the language models alone
          python vniah.py --haystack FILM.mp4 --needles FOLDER  your video (1 frame per second), your needles
          python vniah.py --protocol paper --weights LongVA-7B --haystack FILM.mp4 --needles FOLDER
          torchrun --nproc-per-node 8 vniah.py ...              probes spread over ranks; or --engine ring
Dimensions  B probes in one batch   N frames   M tokens per frame   T tokens   S tokens of a whole probe   D LM width
Differs   --engine cache reads needles inserted at the same position once for all lengths, and all of them share the
          haystack's prefix. --engine ring is the paper's way: each probe is one pass, spread over all ranks.
          The miniature's haystacks contain a few distractors (other things with other numbers, or other needles
          of the folder), else the only number would be the answer; --distractors 0 is the paper's test.
          Numbers in text are drawn anew for each cell; --protocol paper uses the same five everywhere.
          Intervals are Wilson's at 95 % over all probes. The same needles are used at every length and depth, so
          probes are not independent. Controls ask the same questions without the needle, which shows what
          guessing scores, and with the options in another order, which shows whether a letter is preferred.

A killed run continues where it stopped, with the same results.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import longva
import ring
import unires
from data import chat, evaluate, niah, results, runs, synthetic, tokenizer, video, weights
from data.config import RopeScaling, stop_ids
from data.flags import at_least, print0, run, setting

# ---- the test: one probe, one forward pass -------------------------------------------------------


def encode_frames(model: longva.LongVA, pictures: Iterable[unires.Picture]) -> Tensor:
    """Visual tokens of frames, x_NMD; each frame is letterboxed, as V-NIAH shows them (Sec. 4)."""
    vision = model.config.vision
    grids = (unires.frame(picture, vision.side, "pad") for picture in pictures)
    return torch.cat(list(longva.encode_video(model, grids))).unflatten(0, (-1, vision.tokens_per_grid))


def embed(model: longva.LM, ids: list[int]) -> Tensor:
    """Embed text: x_1TD."""
    return model.embed(torch.tensor([ids], device=model.device))


def visual_probe(
    model: longva.LongVA,
    words: tokenizer.Tokenizer,
    frames: Iterable[unires.Picture],
    needle: niah.Needle,
    depth: float,
    template: str = "qwen_1_5",
) -> tuple[Tensor, list[int]]:
    """A probe of V-NIAH (Sec. 4): (x_1SD up to the answer, ids of the answer).

    The needle is inserted at `depth` (0..1) and makes N frames N + 1. The sequence is: system prompt, frames before
    the needle, the needle, frames after it, the question, and the template's suffix that opens the answer.
    """
    prefix_ids, suffix_ids = chat.template_ids(words, template)
    question_ids = words.encode("\n" + needle.question.removeprefix("\n")) + suffix_ids
    x_NMD = encode_frames(model, frames)
    needle_1MD = encode_frames(model, [needle.picture])
    before = niah.insert_index(len(x_NMD), depth)
    video_1TD = torch.cat([x_NMD[:before], needle_1MD, x_NMD[before:]]).flatten(0, 1)[None]
    x_1SD = torch.cat([embed(model, prefix_ids), video_1TD, embed(model, question_ids)], dim=1)
    return x_1SD, words.encode(needle.answer)


def text_probe(
    model: longva.LM, words: tokenizer.Tokenizer, book: str, context: int, depth: float, number: str
) -> tuple[Tensor, list[int]]:
    """A probe of the magic-number test (App. A) without distractors: (x_1SD up to the answer, ids of the answer).

    The book is cut or repeated to `context` tokens, and the sentence with the number is inserted at `depth` (0..1),
    after the next full stop.
    """
    rng, periods = np.random.RandomState(0), niah.period_ids(words.encode)
    ids, answer_ids = niah.text_probe(words.encode, words.encode(book), context, depth, number, (), rng, periods)
    return embed(model, ids), answer_ids


@torch.no_grad()
def answer_logits(model: longva.LM, x_1SD: Tensor, answer_ids: list[int]) -> Tensor:
    """Logits at the answer's positions, one row a token, from one causal pass over probe and answer."""
    x_1TD = torch.cat([x_1SD, embed(model, answer_ids)[:, :-1]], dim=1)  # the last token is predicted, never read
    pos_T = torch.arange(x_1TD.shape[1], device=x_1TD.device)
    h_1TD = model.model(x_1TD, pos_T)
    return model.logits(h_1TD[:, -len(answer_ids) :])[0]


def is_found(model: longva.LM, x_1SD: Tensor, answer_ids: list[int]) -> bool:
    """The score (Sec. 4): is every token of the answer the argmax, given the tokens before it?"""
    return answer_logits(model, x_1SD, answer_ids).argmax(-1).tolist() == answer_ids


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Needle in a haystack, of frames or of text (Sec. 4, App. A). Unset values come from --protocol."""

    task: Literal["vision", "text"] = setting("vision", "what the haystack is made of (Sec. 4, App. A)", True)
    weights: Path | None = setting(None, "model folder; none: the shipped systems of Figure 4 (ours)", group="Model")
    own: bool = setting(False, "test the models of your own training runs in runs/ (ours)")
    rope_theta: tuple[float, ...] = setting((), "RoPE bases to test without training (Fig. 4)")
    rope_scaling: tuple[str, ...] = setting((), "position scalings to test likewise, as KIND:FACTOR: yarn:8 (ours)")
    template: str | None = setting(None, "chat template; none: the tokenizer's (release: qwen2, mistral)", hidden=True)
    trained_on: int | None = setting(None, "tokens, for the dotted line; none: config.json's (ours)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")
    protocol: Literal["paper", "tiny"] = setting("paper", "the paper's grid, or the miniature's (App. A)", group="Test")
    haystack: str = setting("synthetic", "video file, folder of pictures or of .txt, or synthetic (Sec. 4)")
    needles: Path | None = setting(None, "folder with pictures and questions.json; none: synthetic (Sec. 4)")
    needle_count: int | None = setting(None, "number of synthetic needles (Sec. 4: 5)")
    number_count: int | None = setting(None, "magic numbers per cell, text only (App. A: 5)")
    frames: tuple[int, ...] | None = setting(None, "haystack lengths in frames (Sec. 4: 200 to 3000)")
    context: tuple[int, ...] | None = setting(None, "haystack lengths in tokens, text only (App. A: 32K to 512K)")
    depths: tuple[float, ...] | None = setting(None, "needle depths, 0 to 1 (Sec. 4: by 0.2; App. A: by 0.1)")
    distractors: int | None = setting(None, "distractor frames in a haystack (Sec. 4: 0)")
    distractor_counts: tuple[int, ...] = setting((0, 3, 5), "numbers of other cities, text only (App. A)")
    seed: int | None = setting(None, "random seed of needles and haystack, unused in training (release: 24242424)")
    digits: int | None = setting(None, "digits of a magic number (release: 7)", hidden=True)
    legacy_periods: bool = setting(False, "use Llama-2's full stops with every tokenizer (release)", hidden=True)
    controls: bool = setting(True, "also test without the needle, and with options reordered (ours)")
    max_new_tokens: int = setting(8, "tokens generated per question besides the score; 0: none (ours)")
    engine: Literal["cache", "ring"] = setting("cache", "share prefixes, or one pass per probe (Sec. 4)")
    out: Path | None = setting(None, "results folder; none: runs/vniah-TASK-MODEL (ours)", group="Output")
    plot_only: bool = setting(False, "run no probes; tables and pictures of earlier results (ours)")
    colours: Literal["safe", "paper"] = setting("safe", "for the colour-blind, or the paper's (Fig. 4)", hidden=True)

    def __post_init__(self):
        at_least(self, digits=1, rope_theta=1, trained_on=1, needle_count=1, number_count=1, seed=0, max_new_tokens=0)
        for name in ("frames", "context"):
            given = getattr(self, name)
            if given is not None and list(given) != sorted({n for n in given if n > 0}):
                raise ValueError(f"--{name} {given}: name each length once, from short to long, above 0")
        cities = len(niah.DISTRACTORS)
        if min(self.distractor_counts) < 0 or max(self.distractor_counts) > cities:
            raise ValueError(f"--distractor-counts {self.distractor_counts}: there are {cities} other cities to use")
        if not 0 <= (self.distractors or 0) < len(synthetic.THINGS):
            raise ValueError(f"--distractors {self.distractors}: give 0 to {len(synthetic.THINGS) - 1}, one per thing")
        for depth in self.depths or ():
            niah.insert_index(1, depth)  # raises outside 0..1


PRESETS = {"tiny": {"protocol": "tiny"}, "paper": {"protocol": "paper"}}
PROTOCOLS = {  # tiny: 90 seconds on two CPU cores; paper, by estimate: 2 hours on 8 A100s, text 5 hours
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
CANDIDATE_BASES = (3e4, 1e5, 1e6)  # RoPE bases tried on the miniature's baseline
CANDIDATE_SCALINGS = ()  # and position scalings
MAX_BATCH_TOKENS = 2**17  # over all probes of a batch; longer probes are read one by one
SELECTION_SEED = 1000  # added to the seed of runs that choose a RoPE base: other needles, another haystack
COSMETIC_FLAGS = ("plot_only", "colours", "trained_on", "device")  # these change no score


def resolve(cfg: Config) -> Config:
    """Fill unset values from the protocol."""
    values = {"depths": PAPER_DEPTHS[cfg.task]} | PROTOCOLS[cfg.protocol]
    name = [cfg.task, cfg.weights.resolve().name if cfg.weights else "own" if cfg.own else "tiny"]
    name += [Path(part).stem for part in (cfg.haystack, cfg.needles) if part and part != "synthetic"]
    values |= {"out": Path(f"runs/vniah-{'-'.join(name)}")} | ({"distractors": 0} if cfg.needles else {})
    return replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})


@dataclass(frozen=True)
class System:
    """One heatmap of the figure: a model and the conditions it is tested under."""

    name: str
    folder: Path
    rope_theta: float | None = None  # replaces the base that the model was trained with
    distractors: int = 3
    control: Literal["", "no needle", "shuffled"] = ""  # the needle left out, or options reordered
    selection_run: bool = False  # other needles and another haystack, to choose a RoPE base with
    rope_scaling: str = ""  # KIND:FACTOR, replaces the scaling that the model was trained with


def seed_of(cfg: Config, system: System) -> int:
    """The random seed of a system's needles and haystack."""
    return cfg.seed + SELECTION_SEED * system.selection_run


# ---- the engine: probes that share a prefix ------------------------------------------------------


class ProbeGroup(NamedTuple):
    """Probes that are read in one batch: needles (by number) at one position of one haystack, at some lengths."""

    insert_at: int  # frames before the needle; 0 for a text
    haystack_len: int  # frames over which the distractors are spread; 0: none, so that all lengths share a prefix
    needle_ids: tuple[int, ...]
    cells: tuple[tuple[int, float], ...]  # (length, depth), from short to long


@torch.no_grad()
def score_and_generate(
    model: longva.LM, question: Tensor, answer: Tensor, cache: longva.KVCache, max_new_tokens: int, stops: list[int]
) -> tuple[list[bool], list[list[int]]]:
    """Ask behind the cached prefix: (is each row's answer the argmax throughout?, ids generated greedily).

    question: embedded, [B, tokens, D]; answer: ids, [B, tokens]. The answer is teacher-forced in one pass. Generation
    starts again after the question and ends after `max_new_tokens` or at a stop id. Restores the cache's length.
    """
    prefix = cache.length
    longva.prefill(model, question[:, :-1], cache)
    asked = cache.length
    teacher_forced = torch.cat([question[:, -1:], model.embed(answer[:, :-1])], dim=1)
    best = model.logits(longva.prefill(model, teacher_forced, cache)).argmax(-1)
    hits, generated = (best == answer).all(1).tolist(), [best[:, :1]]
    cache.length = asked + 1  # the question's last token stays: `best` already holds what follows it
    stop = torch.tensor(stops, device=answer.device)
    ended_B = torch.isin(generated[0][:, 0], stop)
    while len(generated) < max_new_tokens and not ended_B.all():
        h_B1D = longva.prefill(model, model.embed(generated[-1]), cache)
        generated.append(model.logits(h_B1D).argmax(-1))
        ended_B |= torch.isin(generated[-1][:, 0], stop)
    cache.length = prefix
    rows = torch.cat(generated, dim=1).tolist() if max_new_tokens else [[]] * len(hits)
    return hits, [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


@torch.no_grad()
def probe_one_pass(model: longva.LM, x_1SD: Tensor, answer_ids: list[int], world: ring.World) -> bool:
    """`is_found` with the sequence spread over all ranks by zigzag ring attention (Sec. 3.1)."""
    x = torch.cat([x_1SD, embed(model, answer_ids)[:, :-1]], dim=1)
    stop, multiple = x.shape[1], 2 * world.ranks if world.ranks > 1 else 1
    x = torch.nn.functional.pad(x, (0, 0, 0, -stop % multiple))  # causal attention never looks at the padding
    targets = torch.full(x.shape[:2], chat.IGNORE, device=x.device)
    targets[0, stop - len(answer_ids) : stop] = torch.tensor(answer_ids, device=x.device)
    idx_T = ring.zigzag_index(x.shape[1], world)
    model.model.rope_len = stop  # for dynamic NTK: no rank sees the last position alone
    h_1TD = model.model(x[:, idx_T], idx_T, ring.zigzag_attend(world))
    correct, count = evaluate.count_correct(h_1TD, model.lm_head.weight, targets[:, idx_T])
    return ring.all_reduce_sum(count - correct, world).item() == 0


def group_by_shape(sizes: list, tokens: int) -> list[tuple[int, ...]]:
    """Indices of probes of equal size, which can be one batch; at most MAX_BATCH_TOKENS / `tokens` in each."""
    most = max(1, MAX_BATCH_TOKENS // max(1, tokens))
    groups = [[i for i, other in enumerate(sizes) if other == size] for size in sorted(set(sizes))]
    return [tuple(group[i : i + most]) for group in groups for i in range(0, len(group), most)]


class NIAH:
    """A needle test of one model; subclasses know what a haystack is made of."""

    names: list[str]  # of the needles
    dynamic = False  # RoPE by dynamic NTK: keys depend on the length of their sequence, so lengths cannot share them

    def __init__(self, cfg: Config, system: System, model: longva.LM, words: tokenizer.Tokenizer, world: ring.World):
        self.cfg, self.system, self.model, self.words, self.world = cfg, system, model, words, world
        self.stop_ids = sorted({*words.stop_ids, *stop_ids(system.folder)})

    def result_line(self, cell: tuple, name: str, answer: str, tokens: int, hit: bool, generated: list[int]) -> dict:
        """A line of cells-RANK.jsonl; `tokens`: of the probe without its answer."""
        text = self.words.decode(generated)
        scored = self.cfg.max_new_tokens and self.cfg.engine == "cache"
        line = {"panel": self.system.name, "length": cell[0], "depth": cell[1], "needle": name, "hit": hit}
        line |= {"generated_correct": results.answer_in_text(text, answer) if scored else None}
        return line | {"generated_text": text, "tokens": tokens}


class VisualNIAH(NIAH):
    """V-NIAH: haystack and needles as the model's visual tokens (Sec. 4)."""

    def __init__(self, cfg: Config, system: System, model: longva.LM, words: tokenizer.Tokenizer, world: ring.World):
        super().__init__(cfg, system, model, words, world)
        self.needles, distractors = pick_needles(cfg, system)
        self.names = [needle.name for needle in self.needles]
        template = cfg.template or chat.default_template(words)
        prefix_ids, self.suffix_ids = chat.template_ids(words, template)
        self.prefix_1TD = embed(model, prefix_ids)
        self.haystack_NMD, self.hashes = encode_haystack(cfg, system, model)
        self.needle_NMD = encode_frames(model, (needle.picture for needle in self.needles))
        self.distractor_NMD = self.haystack_NMD[:0]
        if distractors:
            self.distractor_NMD = encode_frames(model, (needle.picture for needle in distractors))
        described = [niah.describe(needle) for needle in self.needles]
        self.prompts = {"template": template, "pre": prefix_ids, "post": self.suffix_ids, "needles": described}
        self.reset(system)

    def reset(self, system: System) -> None:
        """Prepare for another system of this model: its questions, and an empty cache."""
        self.system, self.cached_haystack, self.cache = system, None, None
        scaling = self.model.model.config.rope_scaling
        self.dynamic = scaling is not None and scaling.rope_type == "dynamic"
        self.questions = questions_for(self.cfg, system, self.needles)
        encode = self.words.encode
        texts = [one and "\n" + one.question.removeprefix("\n") for one in self.questions]
        self.question_ids = [text and encode(text) + self.suffix_ids for text in texts]
        self.answer_ids = [one and encode(one.answer) for one in self.questions]

    def groups(self, cells: list[tuple[int, float]]) -> list[ProbeGroup]:
        """One group for each position in a haystack and each (question, answer) size."""
        M, positions = self.haystack_NMD.shape[1], {}
        for length, depth in cells:
            haystack_len = length if len(self.distractor_NMD) or self.dynamic else 0
            positions.setdefault((haystack_len, niah.insert_index(length, depth)), []).append((length, depth))
        asked, groups = [i for i, question in enumerate(self.question_ids) if question], []
        sizes = [(len(self.question_ids[i]), len(self.answer_ids[i])) for i in asked]
        for (haystack_len, insert_at), cached in sorted(positions.items()):
            # --engine ring reads one probe at a time.
            tokens = max(cached)[0] * M if self.cfg.engine == "cache" else MAX_BATCH_TOKENS
            for batch in group_by_shape(sizes, tokens):
                needle_ids = tuple(asked[j] for j in batch)
                groups.append(ProbeGroup(insert_at, haystack_len, needle_ids, tuple(sorted(cached))))
        return groups

    def haystack(self, haystack_len: int, N: int) -> Tensor:
        """The first N frames, x_NMD, with the distractors spread evenly over `haystack_len` of them."""
        distractors = self.distractor_NMD[:haystack_len]
        if not len(distractors):
            return self.haystack_NMD[:N]
        x_NMD = self.haystack_NMD[:N].clone()
        for i, distractor_MD in enumerate(distractors):
            if (position := int((i + 0.5) * haystack_len / len(distractors))) < N:
                x_NMD[position] = distractor_MD
        return x_NMD

    @torch.no_grad()
    def extend_cache(self, group: ProbeGroup, groups: list[ProbeGroup]) -> int:
        """Prefill the shared cache up to the needle; return its length in tokens.

        Groups come sorted by position, so each frame is read once for all of them.
        """
        M, prefix = self.haystack_NMD.shape[1], self.prefix_1TD.shape[1]
        question = max(len(ids) for ids in self.question_ids if ids)
        self.model.model.rope_len = prefix + (group.haystack_len + 1) * M + question  # for dynamic NTK
        if self.cache is None or self.cached_haystack != group.haystack_len:
            frames = max(other.insert_at for other in groups if other.haystack_len == group.haystack_len)
            self.cache = None  # free the old cache before the new one is allocated
            self.cache = longva.KVCache(self.model.model.config, 1, prefix + frames * M, self.prefix_1TD)
            longva.prefill(self.model, self.prefix_1TD, self.cache)
            self.cached_haystack = group.haystack_len
        cached = (self.cache.length - prefix) // M
        if group.insert_at > cached:
            x_NMD = self.haystack(group.haystack_len, group.insert_at)[cached:]
            longva.prefill(self.model, x_NMD.flatten(0, 1)[None], self.cache)
        return prefix + group.insert_at * M

    def probe(self, group: ProbeGroup, groups: list[ProbeGroup]) -> Iterator[list[dict]]:
        """Run a group's probes; yield the result lines of each of its cells."""
        ids, M = list(group.needle_ids), self.haystack_NMD.shape[1]
        haystack_NMD = self.haystack(group.haystack_len, group.cells[-1][0])
        needles = self.needle_NMD[ids, : 0 if self.system.control == "no needle" else M]  # [B, M or 0, D]
        question = self.model.embed(torch.tensor([self.question_ids[i] for i in ids], device=self.model.device))
        answer = torch.tensor([self.answer_ids[i] for i in ids], device=self.model.device)
        if self.cfg.engine == "ring":
            for length, depth in group.cells:
                before, after = (x.flatten(0, 1) for x in haystack_NMD[:length].tensor_split([group.insert_at]))
                x_1SD = torch.cat([self.prefix_1TD, torch.cat([before, needles[0], after])[None], question], dim=1)
                hit = probe_one_pass(self.model, x_1SD, answer[0].tolist(), self.world)
                yield [self.line(ids[0], (length, depth), x_1SD.shape[1], hit, [])]
            return
        # 1 the frames before the needle are in the shared cache; each needle continues from a copy of it
        prefix, new_tokens = self.extend_cache(group, groups), max(answer.shape[1], self.cfg.max_new_tokens)
        room = (group.cells[-1][0] - group.insert_at + 1) * M + question.shape[1] + new_tokens
        cache, cached = self.cache.branch(prefix, len(ids), room), group.insert_at
        if needles.numel():
            longva.prefill(self.model, needles, cache)
        # 2 the frames after it, a little further for each length; the question is asked and forgotten again
        for length, depth in group.cells:
            if length > cached:
                x_TD = haystack_NMD[cached:length].flatten(0, 1)
                longva.prefill(self.model, x_TD.expand(len(ids), -1, -1), cache)
                cached = length
            found = score_and_generate(self.model, question, answer, cache, self.cfg.max_new_tokens, self.stop_ids)
            tokens = cache.length + question.shape[1]
            yield [self.line(i, (length, depth), tokens, *one) for i, *one in zip(ids, *found)]

    def line(self, i: int, cell: tuple, tokens: int, hit: bool, generated: list[int]) -> dict:
        """The result line of needle number i."""
        line = self.result_line(cell, self.names[i], self.questions[i].answer, tokens, hit, generated)
        return line | {"kind": self.needles[i].kind}


def encode_haystack(cfg: Config, system: System, model: longva.LongVA) -> tuple[Tensor, list[str]]:
    """(visual tokens x_NMD of the longest haystack, its frames' hashes). Raises ValueError for a short video."""
    N, hashes = max(cfg.frames), []

    def pictures() -> Iterator[unires.Picture]:
        for picture in tqdm(open_haystack(cfg, system, N), "haystack", N, leave=False):
            hashes.append(niah.picture_hash(picture))
            yield picture

    haystack_NMD = encode_frames(model, pictures())
    if len(haystack_NMD) < N:
        raise ValueError(
            f"{cfg.haystack} gives {len(haystack_NMD)} frames at 1 per second, but the longest haystack has "
            f"{N}; take a longer video or shorter lengths, such as --frames {len(haystack_NMD)}"
        )
    return haystack_NMD, hashes


def open_haystack(cfg: Config, system: System, frames: int) -> Iterator:
    """The haystack's pictures, one per second; the paper's protocol counts frames of a file instead of time stamps."""
    if cfg.haystack == "synthetic":
        return islice(synthetic.film(seed_of(cfg, system)), frames)
    fps = video.release_rate(cfg.haystack) if cfg.protocol == "paper" and Path(cfg.haystack).is_file() else 1.0
    return (picture for _, picture in islice(video.frames(cfg.haystack, fps=fps), frames))


def questions_for(cfg: Config, system: System, given: list[niah.Needle]) -> list[niah.Needle | None]:
    """The needles with the questions of this system; None for one without options where they are reordered."""
    rng = np.random.default_rng([0x0B7, cfg.seed])
    return [niah.shuffled_options(needle, rng) for needle in given] if system.control == "shuffled" else given


def pick_needles(cfg: Config, system: System) -> tuple[list[niah.Needle], list[niah.Needle]]:
    """(needles, distractors); of a folder, some needles serve as distractors and are not asked about."""
    if cfg.needles:
        given, count = niah.read_needles(cfg.needles), system.distractors
        if len(given) <= count:
            raise ValueError(f"{cfg.needles} has {len(given)} needles, too few for --distractors {count}")
        order = np.random.default_rng([0xD15, cfg.seed]).permutation(len(given)).tolist()
        return [given[i] for i in sorted(order[count:])], [given[i] for i in order[:count]]
    count = 8 if system.selection_run else cfg.needle_count
    return synthetic.draw_needles(seed_of(cfg, system), count, system.distractors)


class TextNIAH(NIAH):
    """Needles in text: a book, a magic number inserted into it, other cities' numbers as distractors (App. A)."""

    def __init__(self, cfg: Config, system: System, model: longva.LM, words: tokenizer.Tokenizer, world: ring.World):
        super().__init__(cfg, system, model, words, world)
        self.period_ids = niah.LLAMA_PERIODS if cfg.legacy_periods else niah.period_ids(words.encode)
        if cfg.haystack == "synthetic":
            text = synthetic.story(seed_of(cfg, system), max(cfg.context))
        else:
            text = niah.read_text_haystack(cfg.haystack)
        self.ids, self.hashes = words.encode(text), [hashlib.sha256(text.encode()).hexdigest()[:16]]
        self.names = needle_names(cfg, system)
        self.prompts = {"before": niah.PREFIX, "needle": niah.NEEDLE, "question": niah.QUESTION}
        self.reset(system)

    def reset(self, system: System) -> None:
        """Prepare for another system of this model."""
        self.system = system
        cfg, self.release_draws = self.cfg, None
        if cfg.protocol == "paper":
            counts, grid, seed = (cfg.number_count, system.distractors), (cfg.context, cfg.depths), seed_of(cfg, system)
            self.release_draws = niah.release_rng_states(self.words.encode, seed, counts, cfg.digits, grid)

    def groups(self, cells: list[tuple[int, float]]) -> list[ProbeGroup]:
        """One group a cell: no two texts share a prefix."""
        return [ProbeGroup(0, 0, tuple(range(self.cfg.number_count)), (cell,)) for cell in cells]

    def probes(self, context: int, depth: float) -> list[tuple[list[int], list[int]]]:
        """(ids, ids of the answer) of every probe of a cell, with numbers and positions drawn for this cell.

        With the paper's protocol they come from one stream of draws for the whole grid, as in the release.
        """
        rng = np.random.RandomState([self.cfg.seed % 2**32, self.system.selection_run, context, round(100 * depth)])
        probes = []
        for i in range(self.cfg.number_count):
            if self.release_draws:
                numbers, states = self.release_draws
                number, others = numbers[i], numbers[self.cfg.number_count :]
                rng.set_state(states[context, depth, i])
            else:
                number, *others = niah.magic_numbers(rng, 1 + self.system.distractors, self.cfg.digits)
            distractors, encode = list(zip(niah.DISTRACTORS, others)), self.words.encode
            probes.append(niah.text_probe(encode, self.ids, context, depth, number, distractors, rng, self.period_ids))
        return probes

    def probe(self, group: ProbeGroup, groups: list[ProbeGroup]) -> Iterator[list[dict]]:
        """Run the probes of the group's one cell; yield their result lines."""
        ((context, depth),) = group.cells
        probes, found = self.probes(context, depth), []
        for batch in group_by_shape([(len(ids), len(answer)) for ids, answer in probes], context):
            batch = [i for i in batch if i in group.needle_ids]
            if self.cfg.engine == "ring":
                for i in batch:
                    hit = probe_one_pass(self.model, embed(self.model, probes[i][0]), probes[i][1], self.world)
                    found.append((i, hit, []))
            elif batch:
                found += zip(batch, *self.score_batch([probes[i] for i in batch]))
        lines = []
        for i, hit, generated in sorted(found):
            ids, answer_ids = probes[i]
            answer = self.words.decode(answer_ids)
            lines.append(self.result_line((context, depth), self.names[i], answer, len(ids), hit, generated))
        yield lines

    def score_batch(self, probes: list[tuple[list[int], list[int]]]) -> tuple[list[bool], list[list[int]]]:
        """`score_and_generate` for probes of one length."""
        ids, answer = (torch.tensor(rows, device=self.model.device) for rows in zip(*probes))
        x_BTD, new_tokens = self.model.embed(ids), max(answer.shape[1], self.cfg.max_new_tokens)
        self.model.model.rope_len = x_BTD.shape[1]
        cache = longva.KVCache(self.model.model.config, len(probes), x_BTD.shape[1] + new_tokens, x_BTD)
        return score_and_generate(self.model, x_BTD, answer, cache, self.cfg.max_new_tokens, self.stop_ids)


# ---- the grid loop -------------------------------------------------------------------------------


class Runner:
    """Runs the probes that are missing, one model loaded at a time, and records them."""

    def __init__(self, cfg: Config, world: ring.World):
        self.cfg, self.world, self.loaded, self.provenance = cfg, world, None, {}
        self.barrier = ring.long_timeout_group(world)
        self.read()

    def read(self) -> None:
        """Read what all ranks wrote. The two sums are barriers: ranks must agree on what is missing."""
        ring.all_reduce_sum(torch.zeros(1), self.barrier)
        self.results = results.read_results(self.cfg.out)
        ring.all_reduce_sum(torch.zeros(1), self.barrier)

    def load(self, system: System) -> VisualNIAH | TextNIAH:
        """The test of a system; a model that is already loaded is kept."""
        key = (system.folder, system.selection_run)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # free the old model before the next is loaded
            model = longva.load(system.folder, self.world.device)
            if self.cfg.task == "vision" and not isinstance(model, longva.LongVA):
                raise ValueError(f"{system.folder} is a language model without vision; try: python vniah.py text")
            kind = VisualNIAH if self.cfg.task == "vision" else TextNIAH
            test = kind(self.cfg, system, model, tokenizer.load_tokenizer(system.folder), self.world)
            self.loaded = key, test, model.model.config
        _, test, trained = self.loaded
        changes = {"rope_theta": system.rope_theta} if system.rope_theta else {}
        if system.rope_scaling:
            changes["rope_scaling"] = RopeScaling.parse(system.rope_scaling, trained.max_position_embeddings)
        test.model.model.config = replace(trained, **changes)
        test.reset(system)
        self.provenance[system.name] = {"prompts": test.prompts, "haystack": test.hashes}
        return test

    def run(self, systems: list[System], lengths: tuple, depths: tuple) -> None:
        """Run every missing probe and append its result to disk."""
        for system in systems:
            cells = [(length, depth) for length in lengths for depth in depths]
            names = set(needle_names(self.cfg, system))
            if all(names <= set(self.results.get((system.name, *cell), ())) for cell in cells):
                continue
            test = self.load(system)
            groups = [part for group in test.groups(cells) if (part := self.pending(system, test, group)).cells]
            if self.cfg.engine == "cache":  # else all ranks work on each probe together
                groups = groups[self.world.rank :: self.world.ranks]
            count = sum(len(group.needle_ids) * len(group.cells) for group in groups)
            with tqdm(total=count, desc=system.name[:40], disable=self.world.rank > 0) as bar:
                for group in groups:
                    for lines in test.probe(group, groups):
                        self.write(lines)
                        bar.update(len(lines))
        self.read()

    def pending(self, system: System, test: NIAH, group: ProbeGroup) -> ProbeGroup:
        """The lengths and needles of a group that are still missing."""
        pairs = [(cell, i) for cell in group.cells for i in group.needle_ids]
        pairs = [(cell, i) for cell, i in pairs if test.names[i] not in self.results.get((system.name, *cell), ())]
        cells, needle_ids = sorted({cell for cell, _ in pairs}), sorted({i for _, i in pairs})
        return group._replace(cells=tuple(cells), needle_ids=tuple(needle_ids))

    def write(self, lines: list[dict]) -> None:
        """Record the probes of a cell; with --engine ring all ranks hold the same and rank 0 writes."""
        if self.cfg.engine == "cache" or self.world.rank == 0:
            results.append_probes(self.cfg.out, self.world.rank, lines)


# ---- the systems of Figure 4 ---------------------------------------------------------------------


def needle_names(cfg: Config, system: System) -> list[str]:
    """The names of all needles that a system is asked about; needs no model."""
    if cfg.task == "text":
        return [f"number-{i}" for i in range(cfg.number_count)]
    return [needle.name for needle in questions_for(cfg, system, pick_needles(cfg, system)[0]) if needle]


def model_dir(cfg: Config, name: str) -> Path:
    """The folder of one of the miniature's models: the shipped one, or with --own the reader's."""
    stage = "" if name in ("extended", "control") else "-sft"
    return runs.trained_or_shipped(f"tiny-{name}{stage}", name) if cfg.own else runs.TINY / name


def controls_of(cfg: Config, system: System) -> list[System]:
    """The same model without the needle and, where questions have options, with these reordered."""
    controls = [replace(system, name=f"{system.name}, no needle", control="no needle")]
    rng = np.random.default_rng(0)
    if any(niah.shuffled_options(needle, rng) for needle in pick_needles(cfg, system)[0]):
        controls.append(replace(system, name=f"{system.name}, options moved", control="shuffled"))
    return controls if cfg.controls else []


def untrained_positions(bases: Iterable[float], scalings: Iterable[str]) -> dict[str, tuple[float | None, str]]:
    """{name: (RoPE base, scaling)} of the ways to read longer sequences without training."""
    return {f"RoPE base {theta:g}": (theta, "") for theta in bases} | {text: (None, text) for text in scalings}


def figure_systems(cfg: Config) -> tuple[list[System], list[System], list[System]]:
    """(the figure's systems, the controls, and the candidates of which one RoPE base is chosen for the baseline)."""
    counts = (cfg.distractors,) if cfg.task == "vision" else cfg.distractor_counts
    suffix = {n: "" if cfg.task == "vision" else f", {n} distractors" for n in counts}
    if cfg.weights:
        name = cfg.weights.resolve().name
        changes = {"": (None, "")} | untrained_positions(cfg.rope_theta, cfg.rope_scaling)
        systems = [
            System(name + (change and f", {change}") + suffix[n], cfg.weights, theta, n, rope_scaling=scaling)
            for change, (theta, scaling) in changes.items()
            for n in counts
        ]
        return systems, controls_of(cfg, systems[0]) if cfg.task == "vision" else [], []
    if cfg.task == "vision":
        folders = {"(i) LongVA": "longva", "(ii) LongVA, AnyRes": "anyres", "(iii) not extended": "baseline"}
    else:
        folders = {"extended": "extended", "not extended": "control"}
    systems = [
        System(name + suffix[n], model_dir(cfg, folder), None, n) for name, folder in folders.items() for n in counts
    ]
    baseline = replace(systems[-1], distractors=max(counts), selection_run=True)
    given = cfg.rope_theta or cfg.rope_scaling
    tried = (cfg.rope_theta, cfg.rope_scaling) if given else (CANDIDATE_BASES, CANDIDATE_SCALINGS)
    candidates = [
        replace(baseline, name=f"trial of {change}", rope_theta=theta, rope_scaling=scaling)
        for change, (theta, scaling) in untrained_positions(*tried).items()
    ]
    return systems, controls_of(cfg, systems[0]) if cfg.task == "vision" else [], candidates


def trained_length(cfg: Config, system: System) -> tuple[float, int]:
    """(the length that a system's language model was trained at, tokens per unit of length)."""
    config = longva.read_config(system.folder)
    lm = config.lm if isinstance(config, longva.LongVAConfig) else config
    tokens_per_unit = config.vision.tokens_per_grid if cfg.task == "vision" else 1
    return (cfg.trained_on or lm.max_position_embeddings) / tokens_per_unit, tokens_per_unit


def open_results(cfg: Config, systems: list[System], world: ring.World) -> dict:
    """Open the results folder and return the run's key: everything that its scores depend on.

    An earlier run with the same key is continued; a line that a kill left incomplete is dropped.
    """
    if cfg.plot_only and not results.cell_files(cfg.out):
        raise ValueError(f"{cfg.out} holds no run to draw; run without --plot-only first")
    folders = sorted({system.folder for system in systems})
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"{missing[0]} is no folder; name a model's folder as --weights")
    if cfg.own and all(folder.parent == runs.TINY for folder in folders):
        raise ValueError("--own tests what the training commands left in runs/, but there is nothing yet; train first")
    run_key = {name: value for name, value in asdict(cfg).items() if name not in COSMETIC_FLAGS}
    if cfg.plot_only:
        return run_key
    run_key |= {"weights": {str(folder): weights.hash_weights(folder) for folder in folders}}
    print0("testing " + ", ".join(os.path.relpath(folder) for folder in folders))
    if world.rank == 0:
        if cfg.out.is_dir() and not results.cell_files(cfg.out):
            runs.lock(cfg.out)
            (cfg.out / "config.json").unlink(missing_ok=True)  # of a run that ended with an error before any probe
        runs.open_run(cfg.out, run_key)
        for file in results.cell_files(cfg.out):
            runs.truncate_log(cfg.out, None, file.name)
    return run_key


# ---- main ----------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    """Run every missing probe, then print the tables and draw the figures."""
    world, cfg = ring.start(cfg.device), resolve(cfg)
    lengths, unit = (cfg.frames, "frames") if cfg.task == "vision" else (cfg.context, "tokens")
    systems, controls, candidates = figure_systems(cfg)
    run_key = open_results(cfg, [*systems, *candidates], world)
    runner = Runner(cfg, world)
    if not cfg.plot_only:
        runner.run(systems, lengths, cfg.depths)
        runner.run(controls, lengths, cfg.depths[len(cfg.depths) // 2 :][:1])
        runner.run(candidates, lengths[-2:], cfg.depths[::2])

    # System (iv): the baseline with the RoPE base that scored best on other needles in another haystack.
    rates = {candidate: results.hit_rate(runner.results, candidate.name) for candidate in candidates}
    if any(rate is not None for rate in rates.values()):
        best = max(candidates, key=lambda candidate: rates[candidate] or 0)
        name = f"{best.name.removeprefix('trial of ')}, untrained"
        name = f"(iv) {name}" if cfg.task == "vision" else f"{name}, {best.distractors} distractors"
        systems.append(replace(best, name=name, selection_run=False))
        if not cfg.plot_only:
            runner.run(systems[-1:], lengths, cfg.depths)

    if world.rank == 0:
        shown, rest = ({one.name: trained_length(cfg, one)[0] for one in part} for part in (systems, controls))
        results.report(runner.results, shown, rest, lengths, unit)
        if any(rate is not None for rate in rates.values()):
            needles = "with the same needles" if cfg.needles else "with another haystack and other needles"
            tried = ", ".join(f"{one.name.removeprefix('trial of ')}: {rate or 0:.2f}" for one, rate in rates.items())
            print(f"Untrained positions tried {needles}, at the two greatest lengths: {tried}")
        heatmaps = [results.heatmap_of(runner.results, *item) for item in shown.items()]
        compared = [results.heatmap_of(runner.results, *item) for item in (shown | rest).items()]
        print("\n" + "\n".join(results.ascii_heatmap(one, lengths, cfg.depths, unit) for one in heatmaps) + "\n")
        axes = (lengths, cfg.depths, unit, trained_length(cfg, systems[0])[1], cfg.colours)
        results.draw_heatmaps(cfg.out / "heatmap.png", heatmaps, *axes)
        for i, one in enumerate(heatmaps):
            results.draw_heatmaps(cfg.out / f"heatmap-{i + 1}.png", [one], *axes)
        results.draw_comparison(cfg.out / "comparison.png", compared, lengths, unit)
        results.write_results(cfg.out, run_key, runner.provenance, runner.results, redraw=cfg.plot_only)
        if not cfg.weights:
            follow = "vniah.py text" if cfg.task == "vision" else "train_text.py --preset tiny-base"
            print(f"next:    python {follow}")
    ring.stop()


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
