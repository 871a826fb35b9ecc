"""Which token comes next: what the settings of generation_config.json (data/config.py) mean.

What      `choose` picks an id by a model's scores of all tokens: the best one, or one drawn by Sampling's rules.
Paper     The release answers with its folder's generation_config.json: temperature 0.7, top-p 0.8, top-k 20 and
          a repetition penalty of 1.05, which stays in force where it calls itself greedy.
Run       imported by longva.py.
Key       V vocabulary   W those that may be drawn
Deviates  Of tokens that tie at place top_k, Hugging Face keeps all, here exactly top_k stay. The order of the rules
          is Hugging Face's.
"""

import torch
from torch import Tensor

from data.config import Sampling


def next_token_probs(logits_V: Tensor, said: list[int], how: Sampling) -> tuple[Tensor, Tensor]:
    """The ids that may come next, likeliest first, and their probabilities (id_W, p_W), in CPU memory.

    Penalty, temperature, top-k, top-p, in this order. The penalty is on what was `said` in this answer, not on the
    prompt, as in the release, whose prompts are embeddings and have no ids. Temperature 0 leaves the best id.
    """
    logits_V = logits_V.float()
    if said and how.repetition_penalty != 1:
        said_W = torch.tensor(said, device=logits_V.device)
        scores_W = logits_V[said_W]
        scores_W = torch.where(scores_W < 0, scores_W * how.repetition_penalty, scores_W / how.repetition_penalty)
        logits_V = logits_V.index_put((said_W,), scores_W)
    most = 1 if how.temperature == 0 else min(how.top_k or len(logits_V), len(logits_V))
    best_W, id_W = (x.cpu() for x in logits_V.topk(most))  # where the scores are: a vocabulary is slow to move and sort
    p_W = (best_W / (how.temperature or 1.0)).softmax(-1)
    enough = (p_W.cumsum(-1) - p_W < how.top_p).sum()  # those before it do not suffice yet; the best one always stays
    return id_W[:enough], p_W[:enough] / p_W[:enough].sum()


def sample(logits_V: Tensor, said: list[int], how: Sampling, dice: torch.Generator | None = None) -> int:
    """The next id: the best one at temperature 0, else one drawn by its odds; `dice` are a CPU's."""
    if how.temperature == 0 and how.repetition_penalty == 1:
        return logits_V.argmax().item()
    id_W, p_W = next_token_probs(logits_V, said, how)
    return id_W[torch.multinomial(p_W, 1, generator=dice)].item()
