"""Which token comes next: the settings of generation_config.json, and what they mean.

What      `choose` picks an id by a model's scores of all tokens: the best one, or one drawn by Sampling's rules.
Paper     The release answers with its folder's generation_config.json: temperature 0.7, top-p 0.8, top-k 20 and
          a repetition penalty of 1.05, which stays in force where it calls itself greedy.
Run       imported by longva.py.
Deviates  Nothing; the order of the rules is Hugging Face's.
"""

import torch
from torch import Tensor

from data.config import Sampling


def odds(logits_V: Tensor, said: list[int], how: Sampling) -> Tensor:
    """The probability p_V with which each id comes next: penalty, temperature, top-k, top-p, in this order.

    The penalty is on what was `said` in this answer, not on the prompt, as in the release, whose prompts are
    embeddings and have no ids. Temperature 0 gives all to the best id.
    """
    logits_V = logits_V.float().clone()
    if said and how.repetition_penalty != 1:
        scores = logits_V[said]
        logits_V[said] = torch.where(scores < 0, scores * how.repetition_penalty, scores / how.repetition_penalty)
    if how.temperature == 0:
        return torch.zeros_like(logits_V).index_fill(0, logits_V.argmax(), 1.0)
    best_V, id_V = (logits_V / how.temperature).sort(descending=True)
    p_V = best_V[: how.top_k or None].softmax(-1)
    p_V[p_V.cumsum(-1) - p_V >= how.top_p] = 0  # those before it suffice; the best one always stays
    return torch.zeros_like(logits_V).index_copy(0, id_V[: len(p_V)], p_V / p_V.sum())


def choose(logits_V: Tensor, said: list[int], how: Sampling, dice: torch.Generator | None = None) -> int:
    """The next id: the best one at temperature 0, else one drawn by its odds; `dice` are a CPU's."""
    if how.temperature == 0 and how.repetition_penalty == 1:
        return logits_V.argmax().item()
    p_V = odds(logits_V.cpu(), said, how)
    return torch.multinomial(p_V, 1, generator=dice).item()
