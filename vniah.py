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
          A killed run continues where it stopped; a finished one only draws its tables and pictures anew.
Dimensions  B probes in one batch   N frames   M tokens per frame   T tokens   S tokens before an answer   D LM width
Differs   --engine cache reads needles inserted at the same position of a video once for all lengths, and all of them
          share the haystack's prefix. --engine ring is the paper's way: each probe is one pass, spread over all ranks.
          The miniature's haystacks contain distractors, else the only number were the answer; the paper's have none.
          Numbers in text are drawn anew for each cell; --protocol paper uses the same five everywhere.
          Controls ask the same questions without the needle, which shows what guessing scores, and with the options
          in another order, which shows whether a letter is preferred. Probes share needles: they are not independent.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import longva
import ring
import unires
from data import chat, evaluate, niah, results
from data.config import stop_ids
from data.evaluate import System
from data.flags import at_least, check_range, model_name, print0, progress, run, setting
from data.tokenizer import Tokenizer, load_tokenizer

# ---- the test: one probe, one forward pass -------------------------------------------------------


def encode_frames(model: longva.LongVA, pictures: Iterable[unires.Picture]) -> Tensor:
    """Visual tokens of frames, x_NMD; each frame is letterboxed, as in V-NIAH (release)."""
    vision = model.config.vision
    grids = (unires.frame(picture, vision.side, "pad") for picture in pictures)
    return torch.cat(list(longva.encode_video(model, grids))).unflatten(0, (-1, vision.tokens_per_grid))


def embed(model: longva.LM, ids: list[int]) -> Tensor:
    """Embed text: x_1TD."""
    return model.embed(torch.tensor([ids], device=model.device))


def insert_needle(prefix_1TD: Tensor, x_NMD: Tensor, needle: Tensor, before: int, question: Tensor) -> Tensor:
    """A probe up to its answer, x_1SD: system prompt, `before` frames, the needle, the other frames, the question."""
    frames = torch.cat([x_NMD[:before], needle, x_NMD[before:]])
    return torch.cat([prefix_1TD, frames.flatten(0, 1)[None], question], dim=1)


def visual_probe(
    model: longva.LongVA, tokenizer: Tokenizer, frames: Iterable[unires.Picture], needle: niah.Needle, depth: float
) -> tuple[Tensor, list[int]]:
    """A probe of V-NIAH (Sec. 4): (x_1SD up to the answer, ids of the answer), the needle inserted at `depth` (0..1).

    The question ends with the chat template's suffix, which opens the answer.
    """
    prefix_ids, suffix_ids = chat.template_ids(tokenizer, chat.default_template(tokenizer))
    question_ids = tokenizer.encode("\n" + needle.question.removeprefix("\n")) + suffix_ids  # "\n" as released
    x_NMD, needle_1MD = encode_frames(model, frames), encode_frames(model, [needle.picture])
    before = niah.insert_index(len(x_NMD), depth)
    x_1SD = insert_needle(embed(model, prefix_ids), x_NMD, needle_1MD, before, embed(model, question_ids))
    return x_1SD, tokenizer.encode(needle.answer)


def text_probe(
    model: longva.LM, tokenizer: Tokenizer, book: str, context: int, depth: float, number: str
) -> tuple[Tensor, list[int]]:
    """A probe of the magic-number test (App. A) without distractors: (x_1SD up to the answer, ids of the answer).

    The book fills `context` tokens; the number's sentence follows the next full stop after `depth`, or is first at 0.
    """
    encode, rng = tokenizer.encode, np.random.RandomState(0)
    periods = niah.period_ids(encode)
    ids, answer_ids = niah.text_probe(encode, encode(book), context, depth, number, (), rng, periods)
    return embed(model, ids), answer_ids


@torch.no_grad()
def answer_logits(model: longva.LM, x_1SD: Tensor, answer_ids: list[int]) -> Tensor:
    """Logits at the answer's positions, one row a token, from one causal pass over probe and answer."""
    x_1TD = torch.cat([x_1SD, embed(model, answer_ids)[:, :-1]], dim=1)  # the last token is predicted, never read
    pos_T = torch.arange(x_1TD.shape[1], device=x_1TD.device)
    model.model.rope_len = 0  # dynamic NTK: the length of this call
    h_1TD = model.model(x_1TD, pos_T)
    return model.logits(h_1TD[:, -len(answer_ids) :])[0]


def is_found(model: longva.LM, x_1SD: Tensor, answer_ids: list[int]) -> bool:
    """The score (Sec. 4): is every token of the answer the argmax, given the tokens before it?"""
    return answer_logits(model, x_1SD, answer_ids).argmax(-1).tolist() == answer_ids


# ---- the same score with several ranks, or after a cached prefix ---------------------------------


@torch.no_grad()
def is_found_by_ring(model: longva.LM, x_1SD: Tensor, answer_ids: list[int], world: ring.World) -> bool:
    """`is_found` with the sequence spread over all ranks by zigzag ring attention (Sec. 3.1)."""
    x = torch.cat([x_1SD, embed(model, answer_ids)[:, :-1]], dim=1)
    length, multiple = x.shape[1], 2 * world.ranks if world.ranks > 1 else 1
    x = torch.nn.functional.pad(x, (0, 0, 0, -length % multiple))  # causal attention never looks at the padding
    answer, padding = torch.tensor([answer_ids], device=x.device), (length - len(answer_ids), -length % multiple)
    targets = torch.nn.functional.pad(answer, padding, value=chat.IGNORE)
    idx_T = ring.zigzag_index(x.shape[1], world)
    model.model.rope_len = length  # for dynamic NTK: a rank's own positions do not tell the length without padding
    h_1TD = model.model(x[:, idx_T], idx_T, ring.zigzag_attend(world))
    correct, count = evaluate.count_correct(h_1TD, model.lm_head.weight, targets[:, idx_T])
    return ring.all_reduce_sum(count - correct, world).item() == 0


@torch.no_grad()
def score_and_generate(
    model: longva.LM, question: Tensor, answer: Tensor, cache: longva.KVCache, max_new_tokens: int, stops: list[int]
) -> tuple[list[bool], list[list[int]]]:
    """Ask behind the cached prefix: (is each row's answer the argmax throughout?, ids generated greedily).

    question: embedded, [B, tokens, D]; answer: ids, [B, tokens], which is teacher-forced in one pass. Generation then
    starts after the question and ends after `max_new_tokens` or at a stop id. Restores the cache's length.
    """
    prefix_len = cache.length
    longva.prefill(model, question[:, :-1], cache)
    asked_len = cache.length
    teacher_forced = torch.cat([question[:, -1:], model.embed(answer[:, :-1])], dim=1)
    best = model.logits(longva.prefill(model, teacher_forced, cache)).argmax(-1)
    hits, generated = (best == answer).all(1).tolist(), [best[:, :1]]
    cache.length = asked_len + 1  # the question's last token stays: `best` already holds what follows it
    stop = torch.tensor(stops, device=answer.device)
    ended_B = torch.isin(generated[0][:, 0], stop)
    while len(generated) < max_new_tokens and not ended_B.all():
        h_B1D = longva.prefill(model, model.embed(generated[-1]), cache)
        generated.append(model.logits(h_B1D).argmax(-1))
        ended_B |= torch.isin(generated[-1][:, 0], stop)
    cache.length = prefix_len
    rows = torch.cat(generated, dim=1).tolist() if max_new_tokens else [[]] * len(hits)
    return hits, [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


# ---- the engine: probes that share a prefix ------------------------------------------------------


class NIAH:
    """A needle test of one system; subclasses know what a haystack is made of, and make `sequences` of it."""

    def __init__(self, cfg: "Config", system: System, model: longva.LM, tokenizer: Tokenizer, world: ring.World):
        self.cfg, self.system, self.model, self.tokenizer, self.world = cfg, system, model, tokenizer, world
        self.stop_ids = sorted({*tokenizer.stop_ids, *stop_ids(system.folder)})

    def probe(self, group: niah.ProbeGroup) -> Iterator[list[dict]]:
        """Run a group's probes, each in one pass; yield result lines as soon as they are known."""
        for cell in group.cells:
            for i, (x_1SD, answer_ids) in zip(group.needle_ids, self.sequences(cell, group.needle_ids)):
                tokens = x_1SD.shape[1]
                if self.cfg.engine == "ring":
                    hit = is_found_by_ring(self.model, x_1SD, answer_ids, self.world)
                    answer = self.tokenizer.decode(answer_ids)
                    yield [results.probe_line(self.system.name, cell, self.needles[i], tokens, hit, answer)]
                    continue
                self.model.model.rope_len = tokens + len(answer_ids) - 1  # for dynamic NTK: prefill sees pieces
                answer = torch.tensor([answer_ids], device=self.model.device)
                room = tokens + max(len(answer_ids), self.cfg.max_new_tokens)
                yield self.score(cell, [i], x_1SD, answer, longva.KVCache(self.model.model.config, 1, room, x_1SD))

    def score(self, cell: tuple, ids: list[int], suffix: Tensor, answer: Tensor, cache: longva.KVCache) -> list[dict]:
        """`score_and_generate` for the needles `ids`, whose probes end with `suffix`; their result lines."""
        new_tokens, lines, decode = self.cfg.max_new_tokens, [], self.tokenizer.decode
        hits, generated = score_and_generate(self.model, suffix, answer, cache, new_tokens, self.stop_ids)
        tokens = cache.length + suffix.shape[1]
        for i, hit, new_ids, answer_ids in zip(ids, hits, generated, answer.tolist()):
            texts = decode(answer_ids), decode(new_ids) if new_tokens else None
            lines.append(results.probe_line(self.system.name, cell, self.needles[i], tokens, hit, *texts))
        return lines


class VisualNIAH(NIAH):
    """V-NIAH: haystack and needles as the model's visual tokens (Sec. 4); `earlier`: a test of the same model."""

    def __init__(self, cfg, system, model, tokenizer, world, earlier: "VisualNIAH | None" = None):  # noqa: ANN001
        super().__init__(cfg, system, model, tokenizer, world)
        needles, distractors = evaluate.pick_needles(system, cfg.needles, cfg.needle_count, cfg.seed)
        template = chat.default_template(tokenizer)
        prefix_ids, suffix_ids = chat.template_ids(tokenizer, template)
        questions = evaluate.questions_for(system, needles, cfg.seed)
        self.needles, described = needles, [niah.describe(one) for one in questions if one]
        self.prompts = {"template": template, "pre": prefix_ids, "post": suffix_ids, "needles": described}
        texts = [one and "\n" + one.question.removeprefix("\n") for one in questions]
        self.question_ids = [text and tokenizer.encode(text) + suffix_ids for text in texts]
        self.answer_ids = [one and tokenizer.encode(one.answer) for one in questions]
        self.prefix_1TD = embed(model, prefix_ids)
        self.cache, self.hashes, N = None, [], max(cfg.frames)
        if earlier and earlier.system.selection_run == system.selection_run:  # thousands of frames, encoded once
            self.haystack_NMD, self.hashes = earlier.haystack_NMD, earlier.hashes
        else:
            frames = evaluate.open_haystack(system, cfg.haystack, N, cfg.seed, cfg.protocol == "paper", self.hashes)
            self.haystack_NMD = encode_frames(model, progress(frames, "haystack", N, leave=False))
        pictures = [needle.picture for needle in [*needles, *distractors]]
        self.needle_NMD, self.distractor_NMD = encode_frames(model, pictures).tensor_split([len(needles)])

    def groups(self, cells: list[tuple[int, float]]) -> list[niah.ProbeGroup]:
        """One group for each position in a haystack and each (question, answer) size, sorted by position."""
        sizes = {i: (len(ids), len(self.answer_ids[i])) for i, ids in enumerate(self.question_ids) if ids}
        return niah.group_probes(cells, sizes, self.haystack_NMD.shape[1], shared=not len(self.distractor_NMD))

    def haystack(self, haystack_len: int, N: int) -> Tensor:
        """The first N frames, x_NMD; evenly over `haystack_len` of them, distractors take the place of frames."""
        distractors = self.distractor_NMD[:haystack_len]
        x_NMD = self.haystack_NMD[:N].clone() if len(distractors) else self.haystack_NMD[:N]
        for i, distractor_MD in enumerate(distractors):
            if (position := int((i + 0.5) * haystack_len / len(distractors))) < N:
                x_NMD[position] = distractor_MD
        return x_NMD

    def sequences(self, cell: tuple[int, float], needle_ids: Iterable[int]) -> Iterator[tuple[Tensor, list[int]]]:
        """Each needle's whole probe: (x_1SD up to the answer, ids of the answer)."""
        haystack_NMD, before = self.haystack(cell[0], cell[0]), niah.insert_index(*cell)
        shown = 0 if self.system.control == "no needle" else 1
        for i in needle_ids:
            needle, question = self.needle_NMD[i : i + shown], embed(self.model, self.question_ids[i])
            yield insert_needle(self.prefix_1TD, haystack_NMD, needle, before, question), self.answer_ids[i]

    @torch.no_grad()
    def extend_cache(self, group: niah.ProbeGroup) -> int:
        """Prefill the shared cache up to the needle; return its length in tokens. Groups come sorted by position."""
        M, prefix = self.haystack_NMD.shape[1], self.prefix_1TD.shape[1]
        if self.cache is None or self.cached_haystack != group.haystack_len:
            S = prefix + (group.haystack_len or len(self.haystack_NMD)) * M
            self.cache = None  # free the old cache before the new one is allocated
            self.cache = longva.KVCache(self.model.model.config, 1, S, self.prefix_1TD)
            longva.prefill(self.model, self.prefix_1TD, self.cache)
            self.cached_haystack = group.haystack_len
        cached = (self.cache.length - prefix) // M
        if group.insert_at > cached:
            x_NMD = self.haystack(group.haystack_len, group.insert_at)[cached:]
            longva.prefill(self.model, x_NMD.flatten(0, 1)[None], self.cache)
        return prefix + group.insert_at * M

    def probe(self, group: niah.ProbeGroup) -> Iterator[list[dict]]:
        """Run a group's probes behind their shared prefix; yield the result lines of each of its cells."""
        scaling = self.model.model.config.rope_scaling
        # With dynamic NTK keys depend on the length of their sequence, so lengths cannot share them.
        if self.cfg.engine == "ring" or (scaling and scaling.rope_type == "dynamic"):
            yield from super().probe(group)
            return
        ids, M, longest = list(group.needle_ids), self.haystack_NMD.shape[1], group.cells[-1][0]
        question = self.model.embed(torch.tensor([self.question_ids[i] for i in ids], device=self.model.device))
        answer = torch.tensor([self.answer_ids[i] for i in ids], device=self.model.device)
        # 1 the frames before the needle are in the shared cache; each needle continues from a copy of it
        shared, new_tokens = self.extend_cache(group), max(answer.shape[1], self.cfg.max_new_tokens)
        room = (longest - group.insert_at + 1) * M + question.shape[1] + new_tokens
        cache, cached = self.cache.branch(shared, len(ids), room), group.insert_at
        if self.system.control != "no needle":
            longva.prefill(self.model, self.needle_NMD[ids], cache)  # [B, M, D]: a needle a row
        # 2 the frames after it, a little further for each length; `score` takes its question out of the cache again
        haystack_NMD = self.haystack(group.haystack_len, longest)
        for length, depth in group.cells:
            if length > cached:
                x_TD = haystack_NMD[cached:length].flatten(0, 1)
                longva.prefill(self.model, x_TD.expand(len(ids), -1, -1), cache)
                cached = length
            yield self.score((length, depth), ids, question, answer, cache)


class TextNIAH(NIAH):
    """Needles in text: a book, a magic number inserted into it, other cities' numbers as distractors (App. A)."""

    def __init__(self, cfg, system, model, tokenizer, world, earlier: "TextNIAH | None" = None):  # noqa: ANN001
        super().__init__(cfg, system, model, tokenizer, world)
        self.period_ids, self.prompts = niah.period_ids(tokenizer.encode), niah.PROMPTS
        book = evaluate.read_book(system, cfg.haystack, max(cfg.context), cfg.seed)
        self.hashes = [hashlib.sha256(book.encode()).hexdigest()[:16]]
        self.ids = niah.encode_repeated(tokenizer.encode, book, max(cfg.context) if cfg.protocol == "paper" else 0)
        self.needles = evaluate.asked_needles(system, cfg.task, cfg.needles, cfg.number_count, cfg.seed)

    def groups(self, cells: list[tuple[int, float]]) -> list[niah.ProbeGroup]:
        """One group a cell: a text is one pass, and a prefix that texts may share is not reused."""
        return [niah.ProbeGroup(0, 0, tuple(range(self.cfg.number_count)), (cell,)) for cell in cells]

    def probes(self, context: int, depth: float) -> list[tuple[list[int], list[int]]]:
        """(ids, ids of the answer) of every probe of a cell; --protocol paper draws numbers as the release does."""
        cfg, encode, counts = self.cfg, self.tokenizer.encode, (self.cfg.number_count, self.system.distractors)
        seeds = [cfg.seed % 2**32, self.system.selection_run, context, round(100 * depth)]
        draws = niah.cell_draws(seeds, counts, DIGITS[cfg.protocol])
        if cfg.protocol == "paper":
            seed, grid = evaluate.seed_of(self.system, cfg.seed), (cfg.context, cfg.depths)
            draws = niah.release_draws(encode, seed, counts, DIGITS[cfg.protocol], grid, (context, depth))
        return [niah.text_probe(encode, self.ids, context, depth, *draw, self.period_ids) for draw in draws]

    def sequences(self, cell: tuple[int, float], needle_ids: Iterable[int]) -> Iterator[tuple[Tensor, list[int]]]:
        """Each needle's whole probe: (x_1SD up to the answer, ids of the answer)."""
        probes = self.probes(*cell)
        return ((embed(self.model, probes[i][0]), probes[i][1]) for i in needle_ids)


# ---- the grid loop -------------------------------------------------------------------------------


def run_missing(cfg: "Config", plan: list[tuple], world: ring.World, log: results.ProbeLog) -> None:
    """Run every missing probe of a plan, which is a list of (system, lengths, depths), and record it at once."""
    folder = None
    kind, count = (VisualNIAH, cfg.needle_count) if cfg.task == "vision" else (TextNIAH, cfg.number_count)
    for system, lengths, depths in plan:
        cells = [(length, depth) for length in lengths for depth in depths]
        log.asked[system.name] = evaluate.asked_needles(system, cfg.task, cfg.needles, count, cfg.seed)
        if log.is_done(system.name, cells):
            continue
        if folder != system.folder:
            model = test = None  # free the old model before the next is loaded
            model, folder = longva.load(system.folder, world.device), system.folder
            trained = model.model.config
        model.model.config = system.change(trained, cfg.trained_on)
        test = kind(cfg, system, model, load_tokenizer(folder), world, test)
        log.note_system(system.name, {"prompts": test.prompts, "haystack": test.hashes})
        mine = slice(world.rank, None, world.ranks) if cfg.engine == "cache" else slice(None)  # ring: all work on each
        groups = log.pending(system.name, test.needles, test.groups(cells))[mine]
        total = sum(len(group.needle_ids) * len(group.cells) for group in groups)
        with progress(total=total, desc=system.name[:40]) as bar:
            for lines in (lines for group in groups for lines in test.probe(group)):
                if world.rank == 0 or cfg.engine == "cache":
                    log.append(lines)
                bar.update(len(lines))
    log.read()


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Needle in a haystack, of frames or of text (Sec. 4, App. A). Unset values come from --protocol."""

    task: Literal["vision", "text"] = setting("vision", "what the haystack is made of (Sec. 4, App. A)", True)
    weights: Path | None = setting(None, "model folder; none: the shipped systems of Figure 4 (ours)", group="Model")
    own: bool = setting(False, "test the models of your own training runs in runs/ (ours)")
    rope_theta: tuple[float, ...] = setting((), "RoPE bases to test without training (Fig. 4)")
    rope_scaling: tuple[str, ...] = setting((), "position scalings to test likewise, as KIND:FACTOR: yarn:8 (ours)")
    trained_on: int | None = setting(None, "tokens, for the dotted line and scalings; none: config.json's (ours)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")
    protocol: Literal["paper", "tiny"] = setting("tiny", "the paper's grid, or the miniature's (App. A)", group="Test")
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
    controls: bool = setting(True, "also test without the needle, and with options reordered (ours)")
    max_new_tokens: int = setting(8, "tokens generated per question besides the score; 0: none (ours)")
    engine: Literal["cache", "ring"] = setting("cache", "reuse prefixes; ring: one pass a probe, only scored (Sec. 4)")
    out: Path | None = setting(None, "results folder; none: runs/vniah-TASK-MODEL (ours)", group="Output")

    def __post_init__(self):
        at_least(self, rope_theta=1, trained_on=1, needle_count=1, number_count=1, seed=0, max_new_tokens=0)
        at_least(self, frames=1, context=1)
        for name in ("frames", "context", "depths"):
            given = getattr(self, name)
            if given is not None and list(given) != sorted(set(given)):
                raise ValueError(f"--{name} {given}: name each value once, in rising order")
        check_range("depths", self.depths, 0, 1)


PROTOCOLS = {  # tiny: one minute on two CPU cores, text four; paper, by estimate: 2 hours on 8 A100s, text 5 hours
    "tiny": {
        "needle_count": 10, "frames": (8, 32, 128, 256, 512, 1024),
        "number_count": 8, "context": (128, 256, 512, 1024, 2048, 4096),
        "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "distractors": 3, "seed": 7,
    },
    "paper": {
        "needle_count": 5, "frames": tuple(range(200, 3001, 200)),
        "number_count": 5, "context": tuple(range(32_000, 512_001, 32_000)),
        "distractors": 0, "seed": niah.SEED,
    },
}  # fmt: skip
PAPER_DEPTHS = {"vision": tuple(i / 5 for i in range(6)), "text": tuple(i * 0.1 for i in range(11))}  # as np.arange
DIGITS = {"tiny": 3, "paper": 7}  # of a magic number
CANDIDATES = (3e5,), ("yarn:16", "llama3:16")  # RoPE bases, scalings for (iv); data/tiny/README.md has all tried


def resolve(cfg: Config) -> Config:
    """Fill unset values from the protocol."""
    values = {"depths": PAPER_DEPTHS[cfg.task]} | PROTOCOLS[cfg.protocol]
    name = [cfg.task, model_name(cfg.weights) if cfg.weights else "own" if cfg.own else "tiny"]
    name += [Path(part).stem for part in (cfg.haystack, cfg.needles) if part and part != "synthetic"]
    values |= {"out": Path(f"runs/vniah-{'-'.join(name)}")} | ({"distractors": 0} if cfg.needles else {})
    return replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})


# ---- main ----------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    """Run every missing probe, then print the tables and draw the figures."""
    world, cfg = ring.start(cfg.device), resolve(cfg)
    vision = cfg.task == "vision"
    lengths, counts = (cfg.frames, (cfg.distractors,)) if vision else (cfg.context, cfg.distractor_counts)
    positions, candidates = (cfg.rope_theta, cfg.rope_scaling), []
    systems = evaluate.figure_systems(cfg.task, cfg.weights, cfg.own, counts, *positions, cfg.needles)
    drawn = cfg.needles, cfg.needle_count, cfg.seed
    controls = evaluate.controls_of(systems[0], *drawn) if cfg.controls and vision else []
    if not cfg.weights:
        baseline = replace(systems[-1], distractors=max(counts), selection_run=True)  # the last is not extended
        candidates = evaluate.training_free(baseline, *(positions if any(positions) else CANDIDATES))
    folders = sorted({system.folder for system in systems})
    free = ("device", "trained_on" if cfg.weights and not cfg.rope_scaling else "")  # may change when a run continues
    settings = {name: value for name, value in asdict(cfg).items() if name not in free}
    settings |= {str(folder): folder for folder in folders}
    print0("testing " + ", ".join(map(str, folders)))
    if world.rank == 0:
        results.open_results(cfg.out, settings, [*map(str, folders), "haystack", "needles"])
    barrier = ring.long_timeout_group(world, hours=2)  # ends if a rank hangs; a restart repeats no finished probe
    log = results.ProbeLog(cfg.out, world.rank, lambda: ring.all_reduce_sum(torch.zeros(1), barrier))

    plan = [(system, lengths, cfg.depths) for system in systems]
    plan += [(control, lengths, cfg.depths[len(cfg.depths) // 2 :][:1]) for control in controls]  # at one depth
    trials = {f"trial of {one.name}": one for one in candidates}  # on the hardest lengths, some depths
    plan += [(replace(one, name=name), lengths[-2:], cfg.depths[::2]) for name, one in trials.items()]
    run_missing(cfg, plan, world, log)
    rates = {name: results.hit_rate(log.results, name) for name in trials}
    if trials:  # system (iv): the baseline with the positions that scored best on other needles
        best = trials[max(trials, key=rates.get)]
        name = f"{best.name}, training-free"
        name = f"(iv) {name}" if vision else f"{name}, {best.distractors} distractors"
        systems.append(replace(best, name=name, selection_run=False))
        run_missing(cfg, [(systems[-1], lengths, cfg.depths)], world, log)

    if world.rank == 0:
        trained, unit = evaluate.trained_lengths([*systems, *controls], cfg.task, cfg.trained_on)
        results.report(cfg.out, log.results, trained, len(systems), rates, lengths, cfg.depths, unit)
        results.write_results(cfg.out, log, trained)
        if not cfg.weights:
            print(f"next:    python {'vniah.py text' if vision else 'train_text.py --preset tiny-base'}")
    ring.stop()


if __name__ == "__main__":
    run(main, Config)
