"""What a training step may hold and compute, counted and not timed: tensors, bytes for backward, calls, pairs of a rank.

The deterministic twins of `python tests/bench.py train` and `ring`.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import longva
import ring
from data.config import LMConfig
from tests import ranks
from tests.ranks import ALONE

S, V, D, F_, L, H, G, K, CHUNK = 2048, 4096, 64, 160, 3, 4, 2, 16, 512
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def lm(layers=L, checkpointing="none"):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F_, "num_hidden_layers": layers}
    model = longva.LM(LMConfig(**sizes, num_attention_heads=H, num_key_value_heads=G, head_dim=K))
    model.model.checkpointing = checkpointing
    return model


def forward(model, T, attend=longva.causal_attend):
    ids = torch.randint(V, (1, T + 1), generator=torch.Generator().manual_seed(0))
    return model(ids[:, :-1], torch.arange(T), ids[:, 1:], attend)[0].sum()


class Seen(TorchDispatchMode):
    """The size of the largest tensor that an operation returns, and how often each operation ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        made = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return out


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_no_tensor_of_a_step_is_as_large_as_the_logits(checkpointing):
    model = lm(checkpointing=checkpointing)
    with Seen() as seen:
        forward(model, S).backward()
    assert seen.largest == max(V * D, CHUNK * V, S * F_) < S * V / 3


def test_the_mlp_in_tiles():
    """Forward and backward make no tensor of [T, F]."""
    mlp, x = lm().model.layers[0].mlp, torch.randn(1, S, D, requires_grad=True)
    mlp.tile = 64
    with Seen() as seen:
        mlp(x).sum().backward()
    assert seen.largest == S * D < S * F_


def kept(layers, checkpointing, T=256):
    """Bytes of all memories that backward will read, parameters left out."""
    model, memories = lm(layers, checkpointing), {}

    def keep(x):
        memories[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = forward(model, T)
    assert held.requires_grad
    return sum(size for place, size in memories.items() if place not in own)


ASKED = 2 * H * K + 2 * G * K + H  # q, k, v, the answer and its log-sum-exp


@pytest.mark.parametrize("checkpointing, bound", [
    ("none", ASKED + 6 * D + 4 * F_ + 2),  # two norms: before, between, after, and a scale; four of the MLP
    ("selective", ASKED + D),
    ("full", D),  # one hidden state
])  # fmt: skip
def test_what_a_layer_keeps_of_a_token(checkpointing, bound):
    """Numbers of 4 bytes that one more layer keeps of each of 256 tokens."""
    numbers, rest = divmod(kept(3, checkpointing) - kept(2, checkpointing), 4 * 256)
    assert D <= numbers <= bound and rest == 0


@pytest.mark.parametrize("attend", [longva.causal_attend, ring.zigzag_attend(ALONE)], ids=["one process", "ring"])
@pytest.mark.parametrize("checkpointing, again", [("none", 0), ("selective", 0), ("full", L)])
def test_attention_runs_once_forward(checkpointing, again, attend):
    """Selective checkpointing computes nothing of attention again; full checkpointing, all of it."""
    model = lm(checkpointing=checkpointing)
    with Seen() as there:
        lost = forward(model, 64, attend)
    with Seen() as back:
        lost.backward()
    assert there.calls[FORWARD] == L and there.calls[BACKWARD] == 0
    assert back.calls[FORWARD] == again and back.calls[BACKWARD] == L


def check_balance(world):
    """Every rank computes as many pairs of query and key, and all together each causal pair once."""
    S, pairs, real = 48 * world.ranks, {"forward": 0, "backward": 0}, ring.KERNELS["math"]

    def counting(way, kernel, q_at):
        def run(*args):
            T, keys, causal = args[q_at].shape[1], args[q_at + 1].shape[1], args[-1]
            pairs[way] += T * (T + 1) // 2 if causal else T * keys
            return kernel(*args)

        return run

    ring.KERNELS["math"] = counting("forward", real[0], 0), counting("backward", real[1], 1)
    try:
        q, k, v = (torch.randn(1, S // world.ranks, n, 8, requires_grad=True) for n in (H, G, G))
        ring.zigzag_attend(world, "math")(0, q, k, v).sum().backward()
    finally:
        ring.KERNELS["math"] = real
    for mine in pairs.values():
        everyone = ring.all_reduce_sum(torch.tensor(mine), world).item()
        assert everyone == S * (S + 1) // 2
        assert abs(mine - everyone / world.ranks) <= 0.02 * everyone / world.ranks


@pytest.mark.ranks
def test_ranks_share_the_work_evenly():
    ranks.run(4, [check_balance])
