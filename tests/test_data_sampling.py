"""The next token's odds against transformers' own processors, one after the other, and the draw itself."""

import pytest
import torch

from data.config import Sampling
from data.sampling import next_token_probs, sample

CASES = [
    Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),  # the released folder's
    Sampling(temperature=1.0),
    Sampling(temperature=1.3, top_k=3),
    Sampling(temperature=0.5, top_p=0.3),
    Sampling(temperature=0.9, top_p=1e-9, repetition_penalty=2.0),
    Sampling(temperature=2.0, top_p=0.95, top_k=1000, repetition_penalty=0.5),
]


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("said", [[], [3, 3, 17], list(range(40))])
def test_odds_are_those_of_transformers(how, said):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(101, generator=torch.Generator().manual_seed(len(said))) * 4
    theirs = logits[None].clone()
    if said:
        theirs = warpers.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(torch.tensor([said]), theirs)
    theirs = warpers.TemperatureLogitsWarper(how.temperature)(None, theirs)
    if how.top_k:
        theirs = warpers.TopKLogitsWarper(how.top_k)(None, theirs)
    if how.top_p < 1:
        theirs = warpers.TopPLogitsWarper(how.top_p)(None, theirs)
    torch.testing.assert_close(odds_of_all(logits, said, how), theirs[0].softmax(-1), atol=1e-6, rtol=1e-5)


def odds_of_all(logits, said, how):
    ids, p = next_token_probs(logits, said, how)
    return torch.zeros_like(logits).index_copy(0, ids, p)


def test_greedy_takes_the_best_and_a_penalty_can_change_it():
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert sample(logits, [1], Sampling()) == 1
    assert sample(logits, [1], Sampling(repetition_penalty=1.05)) == 2
    assert sample(-logits, [3], Sampling(repetition_penalty=1.05)) == 3  # 1.0 / 1.05 still beats -1.0
    assert logits.tolist() == torch.tensor([1.0, 3.0, 2.9, -1.0]).tolist(), "the model's scores were changed"


def test_draws_follow_the_odds_and_the_seed():
    logits, how = torch.tensor([2.0, 1.0, 0.0, -1.0]), Sampling(temperature=1.0, top_k=3)
    dice = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, [], how, dice) for _ in range(4000)])
    share = draws.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, odds_of_all(logits, [], how), atol=0.03, rtol=0)
    again = torch.Generator().manual_seed(0)
    assert [sample(logits, [], how, again) for _ in range(50)] == draws[:50].tolist()
