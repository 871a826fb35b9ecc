"""What models are tested with: the systems and needles of Figure 4, and held-out text while a model is trained.

What      `figure_systems` lists what vniah.py compares, `pick_needles` and `open_haystack` what it shows them.
          `eval_sets` makes the sequences of train_text.py --held-out once, before training; `evaluate` scores them with
          functions that the script passes in, so that nothing here knows of models or ranks.
Paper     Fig. 4 compares models; Sec. 3.1 extends the context; App. A hides numbers in text. The paper evaluates after
          training only.
Run       imported by vniah.py and train_text.py
Dimensions  B batch   T tokens held here   S tokens per sequence   D LM width   V vocabulary
Differs   Each token read of a held-out file is a target once; after the first window, late in its window.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import chat, flags, niah, runs, synthetic, text, video
from data.config import LMConfig, LongVAConfig, RopeScaling, finite, read_config
from data.tokenizer import Tokenizer

# ---- systems of the needle test ------------------------------------------------------------------

FIGURE = {  # system: model of the miniature
    "vision": {"(i) LongVA": "longva", "(ii) LongVA, AnyRes": "anyres", "(iii) not extended": "baseline"},
    "text": {"extended": "extended", "not extended": "control"},
}
MAX_DISTRACTORS = len(synthetic.THINGS) - 1  # drawn ones: other things than the needle's
SELECTION_NEEDLES = 8
SELECTION_SEED = 1000  # added to the seed of runs that choose training-free positions: other needles, another haystack


@dataclass(frozen=True)
class System:
    """One heatmap of the figure: a model and the conditions it is tested under."""

    name: str
    folder: Path
    distractors: int = 0
    rope_theta: float | None = None  # replaces the base that the model was trained with
    rope_scaling: str = ""  # KIND:FACTOR, replaces the scaling that the model was trained with
    control: Literal["", "no needle", "shuffled"] = ""  # the needle left out, or options reordered
    selection_run: bool = False  # other synthetic needles and haystack, to choose training-free positions with

    def change(self, trained: LMConfig, trained_on: int | None = None) -> LMConfig:
        """Return a language model's config with this system's positions; trained_on: tokens, if not config.json's."""
        changes = {"rope_theta": self.rope_theta} if self.rope_theta else {}
        if self.rope_scaling:
            changes["rope_scaling"] = RopeScaling.parse(
                self.rope_scaling, trained_on or trained.max_position_embeddings
            )
        return replace(trained, **changes)


def training_free(system: System, bases: Iterable[float], scalings: Iterable[str]) -> list[System]:
    """Return the ways in which a system may read longer sequences without training, named by what changes."""
    systems = [replace(system, name=f"RoPE base {theta:g}", rope_theta=theta) for theta in bases]
    return systems + [replace(system, name=scaling, rope_scaling=scaling) for scaling in scalings]


def figure_systems(
    task: str, weights: Path | None, own: bool, counts: Sequence[int], bases: Sequence[float], scalings: Sequence[str],
    needles: Path | None = None,
) -> list[System]:  # fmt: skip
    """Return the heatmaps to make, each with every number of distractors in `counts`.

    With `weights`, of that model, as it is and with each RoPE base and scaling; else of the miniature's models: the
    shipped ones, or with `own` those that the training commands left in runs/. Raises ValueError
    if one is missing or cannot see.
    """
    if own and weights:
        raise ValueError("--own tests what you trained, in place of --weights; give one of them")
    if weights:
        plain = System(flags.model_name(weights), weights)
        changed = training_free(plain, bases, scalings)
        models = [plain, *(replace(one, name=f"{plain.name}, {one.name}") for one in changed)]
    else:
        folders = {name: runs.TINY / model for name, model in FIGURE[task].items()}
        if own:
            stage = "-sft" if task == "vision" else ""
            folders = {n: runs.trained_or_shipped(f"tiny-{f.name}{stage}", f.name) for n, f in folders.items()}
        models = [System(name, folder) for name, folder in folders.items()]
    most = MAX_DISTRACTORS if task == "vision" else len(niah.DISTRACTORS)  # other things, or cities
    of_folder = needles and task == "vision"  # its other needles are distractors; niah checks that there are enough
    if min(counts) < 0 or (max(counts) > most and not of_folder):
        raise ValueError(f"distractors {counts} make no sense; give 0 to {most} for --task {task}")
    if missing := [model.folder for model in models if not model.folder.is_dir()]:
        raise ValueError(f"{missing[0]} is no folder; name a model's folder as --weights")
    if own and all(model.folder.parent == runs.TINY for model in models):
        raise ValueError("--own tests what the training commands left in runs/, but there is nothing yet; train first")
    for model in models:
        if task == "vision" and not isinstance(read_config(model.folder), LongVAConfig):
            raise ValueError(f"{model.folder} is a language model without vision; try: python vniah.py text")
    label = "" if task == "vision" else ", {} distractors"
    return [replace(one, name=one.name + label.format(n), distractors=n) for one in models for n in counts]


def controls_of(system: System, folder: Path | None, count: int, seed: int) -> list[System]:
    """Return the same model without the needle and, where questions have options, with these reordered."""
    needles, _ = pick_needles(system, folder, count, seed)
    controls = [replace(system, name=f"{system.name}, no needle", control="no needle")]
    rng = np.random.default_rng(0)
    if any(niah.shuffled_options(needle, rng) for needle in needles):
        controls.append(replace(system, name=f"{system.name}, options moved", control="shuffled"))
    return controls


def trained_lengths(systems: Sequence[System], task: str, trained_on: int | None) -> tuple[dict[str, float], int]:
    """Return {system: the length that its language model was trained at} and the tokens per unit of length.

    The unit is a frame or a token. trained_on: tokens, instead of what the config.json of the models says.
    """
    lengths = {}
    for system in systems:
        config = read_config(system.folder)
        lm = config.lm if isinstance(config, LongVAConfig) else config
        unit = config.vision.tokens_per_grid if task == "vision" else 1
        lengths[system.name] = (trained_on or lm.max_position_embeddings) / unit
    return lengths, unit


# ---- needles and haystacks -----------------------------------------------------------------------


def seed_of(system: System, seed: int) -> int:
    """Return the random seed of a system's needles and haystack."""
    return seed + SELECTION_SEED * system.selection_run


def pick_needles(
    system: System, folder: Path | None, count: int, seed: int
) -> tuple[list[niah.Needle], list[niah.Needle]]:
    """Return (needles, distractors) of a folder or, where none is given, `count` needles drawn from the seed.

    A selection run gets drawn ones in any case: positions are chosen on other needles than they are tested on.
    """
    if system.selection_run:
        most = min(system.distractors, MAX_DISTRACTORS)
        return synthetic.draw_needles(seed_of(system, seed), SELECTION_NEEDLES, most)
    if folder:
        return niah.read_needles_and_distractors(folder, system.distractors, seed)
    return synthetic.draw_needles(seed, count, system.distractors)


def questions_for(system: System, needles: list[niah.Needle], seed: int) -> list[niah.Needle | None]:
    """Return the needles with this system's questions; None for one without options where they are reordered."""
    rng = np.random.default_rng([0x0B7, seed])
    return [niah.shuffled_options(needle, rng) for needle in needles] if system.control == "shuffled" else needles


def asked_needles(system: System, task: str, folder: Path | None, count: int, seed: int) -> list[niah.Needle]:
    """Return all needles that a system is asked about, without a picture where it sees none, as in text."""
    if task == "text":
        return [niah.Needle(f"number-{i}", None, niah.QUESTION, "") for i in range(count)]
    needles, _ = pick_needles(system, folder, count, seed)
    asked = [needle for needle in questions_for(system, needles, seed) if needle]
    return [replace(needle, picture=None) for needle in asked] if system.control == "no needle" else asked


def open_haystack(
    system: System, haystack: str, count: int, seed: int, by_count: bool, hashes: list[str]
) -> Iterator[Image.Image]:
    """Yield `count` pictures of a video, one per second, and append each one's hash.

    by_count: take every n-th frame of a file, as the release does, instead of going by time stamps. Raises ValueError
    at the end of a video that is too short.
    """
    if haystack == "synthetic":
        pictures = synthetic.film(seed_of(system, seed))
    else:
        pictures = (picture for _, picture in video.frames(haystack, by_count=by_count))
    for picture in islice(pictures, count):
        hashes.append(niah.picture_hash(picture))
        yield picture
    if len(hashes) < count:
        raise ValueError(
            f"{haystack} gives {len(hashes)} frames at 1 per second, but the longest haystack has {count}; take a "
            f"longer video or shorter lengths, such as --frames {len(hashes)}"
        )


def read_book(system: System, haystack: str, tokens: int, seed: int) -> str:
    """Return the text that numbers are hidden in: a file's, a folder's, or a synthetic one of about `tokens`."""
    if haystack == "synthetic":
        return synthetic.story(seed_of(system, seed), tokens)
    return niah.read_text_haystack(haystack)


# ---- held-out text while training ----------------------------------------------------------------

LOG = "eval.jsonl"  # in the run's folder
WINDOWS = 8  # of held-out text, for the perplexity
DEPTHS = (0, 0.25, 0.5, 0.75, 1) * 2  # of each hidden number in its text
IdsTargets = tuple[Tensor, Tensor]  # (ids_1S, targets_1S)


class EvalSets(NamedTuple):
    """The sequences that a model is scored on."""

    windows: list[IdsTargets]
    needles: list[IdsTargets]


def eval_sets(held_out: str | None, seq_len: int, seed: int, tokenizer: Tokenizer) -> EvalSets:
    """Return both sets, empty ones where nothing is held out; a hidden number at each of DEPTHS."""
    if held_out is None:
        return EvalSets([], [])
    tokens = None if held_out == "synthetic" else text.open_corpus(held_out, tokenizer)
    if tokens is not None and len(tokens) <= seq_len:
        raise ValueError(f"{held_out} holds {len(tokens):,} tokens, expected more than {seq_len:,}; pack more text")
    return EvalSets(
        [*perplexity_windows(tokens, seq_len, WINDOWS, seed, tokenizer)],
        [*needle_windows(tokens, seq_len, len(DEPTHS), seed, tokenizer)],
    )


def perplexity_windows(
    tokens: np.memmap | text.TokenShards | None, seq_len: int, count: int, seed: int, tokenizer: Tokenizer
) -> Iterator[IdsTargets]:
    """Yield windows half a sequence apart. Targets are a window's second half, in the first window all of it.

    tokens: of the held-out file; None yields synthetic texts.
    """
    if tokens is None:
        yield from (synthetic.text_batch(tokenizer, seed + 1, 10**6 + i, 1, seq_len) for i in range(count))
        return
    for start in range(0, len(tokens) - seq_len, seq_len // 2)[:count]:
        window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))[None]
        targets_1S = window[:, 1:].clone()
        targets_1S[:, : seq_len - seq_len // 2 if start else 0] = chat.IGNORE
        yield window[:, :-1], targets_1S


def needle_windows(
    tokens: np.memmap | text.TokenShards | None, seq_len: int, count: int, seed: int, tokenizer: Tokenizer
) -> Iterator[IdsTargets]:
    """Yield sequences with a magic number hidden in held-out text (App. A); the number's tokens are the targets.

    In synthetic text five other cities have numbers too: a tiny model may find numbers and confuse whose they are.
    """
    period_ids = niah.period_ids(tokenizer.encode)
    if tokens is None:
        haystack, digits, cities = tokenizer.encode(synthetic.story(seed + 1, seq_len)), 3, niah.DISTRACTORS[:5]
    else:
        haystack, digits, cities = [i for i in tokens[:seq_len].tolist() if i != tokenizer.bos_id], 7, ()
    seed %= 2**32  # RandomState takes no more
    numbers = niah.magic_numbers(np.random.RandomState(seed), count + len(cities), digits)
    distractors = list(zip(cities, numbers[count:]))
    for i, number in enumerate(numbers[:count]):
        context = 1
        for _ in range(2):  # the first pass finds the length of all but the haystack
            depth, rng = DEPTHS[i], np.random.RandomState([seed, i])
            ids, answer = niah.text_probe(
                tokenizer.encode, haystack, context, depth, number, distractors, rng, period_ids
            )
            context += seq_len + 1 - len(ids) - len(answer)
            if context < 1:
                raise ValueError(f"--seq-len {seq_len} is too short to ask for a hidden number; leave out --held-out")
        whole = torch.tensor([ids + answer])
        targets_1S = whole[:, 1:].clone()
        targets_1S[:, : -len(answer)] = chat.IGNORE
        yield whole[:, :-1], targets_1S


@torch.no_grad()
def count_correct(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's number of targets that are the argmax at their position, and its number of targets."""
    is_target_BT = targets_BT != chat.IGNORE
    predicted = [finite(h @ head_VD.T).argmax(-1) for h in h_BTD[is_target_BT].split(1024)]
    correct_BT = torch.zeros_like(is_target_BT)
    correct_BT[is_target_BT] = torch.cat(predicted) == targets_BT[is_target_BT]
    return correct_BT.sum(1).float(), is_target_BT.sum(1).float()


def evaluate(
    sets: EvalSets, score: Callable[[Tensor, Tensor, Callable], tuple[float, float]], nll: Callable
) -> dict[str, float]:
    """Return the held-out loss, its perplexity, and the fraction of numbers found.

    score: (ids_1S, targets_1S, measure) -> the sum of a measure over all targets, and the number of targets. Measures
    are `nll`, -log p, and `count_correct`: a number is found when all its tokens are correct.
    """
    losses = [score(*window, nll) for window in sets.windows]
    loss = sum(total for total, _ in losses) / sum(count for _, count in losses)
    answers = [score(*needle, count_correct) for needle in sets.needles]
    found = sum(correct == count for correct, count in answers) / len(answers)
    perplexity = math.exp(min(loss, 700))  # float64 overflows at exp(710)
    return {"held_out_loss": loss, "perplexity": perplexity, "needles_found": found}


def log_scores(out: Path, step: int, scores: dict[str, float], expected: tuple[float, ...], rank: int = 0) -> None:
    """Write the scores as a line of eval.jsonl, and print them beside what is expected; on rank 0 alone."""
    if rank > 0:
        return
    runs.log(out, {"step": step} | scores, name=LOG)
    tqdm.write("  ".join([f"step {step}", *(f"{name} {value:.3f}" for name, value in scores.items())]))
    runs.print_verdict(scores["held_out_loss"], scores["needles_found"], expected)
