"""Which token comes next: what the settings of generation_config.json (data/config.py) mean.

What      `sample` picks an id from a model's logits: the best one, or one drawn by Sampling's rules.
Paper     The release answers with its folder's generation_config.json: temperature 0.7, top-p 0.8, top-k 20 and
          a repetition penalty of 1.05, which stays in force where it calls itself greedy.
Run       imported by longva.py
Dimensions  V vocabulary
Differs   Of tokens that tie at rank top_k, Hugging Face keeps all, here exactly top_k stay. The order of the rules
          is Hugging Face's.
"""

import torch
from torch import Tensor

from data.config import Sampling


def next_token_probs(logits_V: Tensor, generated: list[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the ids that may come next, most probable first, and their probabilities, both on the CPU.

    Penalty, temperature, top-k, top-p, in this order. The penalty is on the ids `generated` in this answer, not on
    the prompt, as in the release, whose prompts are embeddings and have no ids. Temperature 0 leaves the best id.
    """
    logits_V = logits_V.float()
    if generated and sampling.repetition_penalty != 1:
        repeated = torch.tensor(generated, device=logits_V.device)
        scores = logits_V[repeated]
        scores = torch.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
        logits_V = logits_V.index_put((repeated,), scores)
    kept = 1 if sampling.temperature == 0 else min(sampling.top_k or len(logits_V), len(logits_V))
    logits, ids = (x.cpu() for x in logits_V.topk(kept))  # on the device: a vocabulary is slow to copy and to sort
    probs = (logits / (sampling.temperature or 1.0)).softmax(-1)
    # Keep an id while those before it sum to less than top_p; the best one always stays.
    enough = (probs.cumsum(-1) - probs < sampling.top_p).sum()
    return ids[:enough], probs[:enough] / probs[:enough].sum()


def sample(logits_V: Tensor, generated: list[int], sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Return the next id: the best one at temperature 0, else one drawn with `generator`, a CPU's."""
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        return logits_V.argmax().item()
    ids, probs = next_token_probs(logits_V, generated, sampling)
    return ids[torch.multinomial(probs, 1, generator=generator)].item()
