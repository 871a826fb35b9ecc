"""Evaluation while training on long text: perplexity of held-out text, and magic numbers hidden in it.

What      `eval_sets` makes the sequences once, before training; `evaluate` scores them with functions that the
          training script passes in, so that nothing here knows of models or ranks.
Paper     Sec. 3.1 extends the context; App. A hides numbers in text. The paper evaluates after training only.
Run       imported by train_text.py (--held-out); vniah.py takes `count_correct`.
Dimensions  B batch   T tokens held here   S tokens per sequence   D LM width   V vocabulary
Differs   Each token of the held-out text is a target once, late in its window: windows are half a sequence apart.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import chat, niah, synthetic, text
from data.tokenizer import Tokenizer

LOG = "eval.jsonl"  # in the run's folder
DEPTHS = (0, 0.25, 0.5, 0.75, 1)  # of a hidden number in the text
Sequence = tuple[Tensor, Tensor]  # (ids_1S, targets_1S)


class EvalSets(NamedTuple):
    """The sequences that a model is scored on."""

    windows: list[Sequence]
    needles: list[Sequence]


def eval_sets(
    held_out: str | None, seq_len: int, windows: int, needles: int, seed: int, tokenizer: Tokenizer
) -> EvalSets:
    """Return both sets, empty ones where nothing is held out; `needles` numbers at each of DEPTHS."""
    if held_out is None:
        return EvalSets([], [])
    return EvalSets(
        [*perplexity_windows(held_out, seq_len, windows, seed, tokenizer)],
        [*needle_windows(held_out, seq_len, needles * len(DEPTHS), seed, tokenizer)],
    )


def perplexity_windows(held_out: str, seq_len: int, count: int, seed: int, tokenizer: Tokenizer) -> Iterator[Sequence]:
    """Yield windows half a sequence apart, whose targets are their second half; of the first window all of it."""
    if held_out == "synthetic":
        yield from (synthetic.text_batch(tokenizer, seed + 1, 10**6 + i, 1, seq_len) for i in range(count))
        return
    tokens = text.open_corpus(held_out, tokenizer)
    if len(tokens) <= seq_len:
        raise ValueError(f"{held_out} holds {len(tokens):,} tokens, expected more than {seq_len:,}; pack more text")
    for start in range(0, len(tokens) - seq_len, seq_len // 2)[:count]:
        window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))[None]
        targets_1S = window[:, 1:].clone()
        targets_1S[:, : seq_len - seq_len // 2 if start else 0] = chat.IGNORE
        yield window[:, :-1], targets_1S


def needle_windows(held_out: str, seq_len: int, count: int, seed: int, tokenizer: Tokenizer) -> Iterator[Sequence]:
    """Yield sequences with a magic number hidden in held-out text (App. A); the number's tokens are the targets."""
    period_ids = niah.period_ids(tokenizer.encode)
    if held_out == "synthetic":
        haystack, digits = tokenizer.encode(synthetic.story(seed + 1, seq_len)), 3
    else:
        tokens = text.open_corpus(held_out, tokenizer)[:seq_len].tolist()
        haystack, digits = [i for i in tokens if i != tokenizer.bos_id], 7
    for i, number in enumerate(niah.magic_numbers(np.random.RandomState(seed), count, digits)):
        context, rng = 1, np.random.RandomState(0)  # there are no distractors, so nothing is drawn
        for _ in range(2):  # the first pass finds the length of prefix, needle and question
            depth = DEPTHS[i % len(DEPTHS)]
            ids, answer = niah.text_probe(tokenizer.encode, haystack, context, depth, number, (), rng, period_ids)
            context += seq_len + 1 - len(ids) - len(answer)
            if context < 1:
                raise ValueError(f"--seq-len {seq_len} is too short to ask for a hidden number; leave out --held-out")
        whole = torch.tensor([ids + answer])
        targets_1S = whole[:, 1:].clone()
        targets_1S[:, : -len(answer)] = chat.IGNORE
        yield whole[:, :-1], targets_1S


@torch.no_grad()
def count_correct(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Return each row's number of targets that are the argmax at their position, and its number of targets."""
    is_target_BT = targets_BT != chat.IGNORE
    predicted = [(h @ head_VD.T).argmax(-1) for h in h_BTD[is_target_BT].split(chunk)]
    correct_BT = torch.zeros_like(is_target_BT)
    correct_BT[is_target_BT] = torch.cat([targets_BT[:0, 0], *predicted]) == targets_BT[is_target_BT]
    return correct_BT.sum(1).float(), is_target_BT.sum(1).float()


def evaluate(
    sets: EvalSets,
    sum_nll: Callable[[Tensor, Tensor], tuple[float, float]],
    sum_correct: Callable[[Tensor, Tensor], tuple[float, float]],
) -> dict[str, float]:
    """Return the held-out loss, its perplexity, and the fraction of numbers found.

    sum_nll, sum_correct: (ids_1S, targets_1S) -> the sum over all targets of -log p, or of correct argmaxes, and
    the number of targets. A number is found when all its tokens are correct.
    """
    losses = [sum_nll(*window) for window in sets.windows]
    loss = sum(nll for nll, _ in losses) / sum(count for _, count in losses)
    answers = [sum_correct(*needle) for needle in sets.needles]
    found = sum(correct == count for correct, count in answers) / len(answers)
    perplexity = math.exp(min(loss, 700))  # float64 overflows at exp(710)
    return {"held_out_loss": loss, "perplexity": perplexity, "needles_found": found}
