"""The ring against dense attention written out in fp64, on 1 to 8 ranks; sharded gradients; saved states."""

import json
import math
import os
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import product
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import longva
import ring
from data import checkpoint, flags, text
from data.config import LMConfig
from tests import ranks
from tests.ranks import ALONE

# (tokens, query heads, key heads, head width, logits times): GQA 7:1 and 4:2, odd widths, huge logits
CASES = [(48, 7, 1, 32, 1), (24, 4, 4, 5, 1), (48, 4, 2, 13, 100)]
BOUNDS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(q, k, v, starts=None):
    """The oracle: causal attention with every logit, in fp64; `starts`: where documents begin in each row."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[3])
    logits = logits + torch.full(logits.shape[-2:], -math.inf, dtype=torch.float64).triu(1)
    if starts:
        of_BS = torch.tensor([[sum(a <= t for a in begun) for t in range(q.shape[1])] for begun in starts])
        logits = logits.masked_fill((of_BS[:, :, None] != of_BS[:, None])[:, None], -math.inf)
    return torch.einsum("bhts,bshk->bthk", logits.softmax(-1), v)


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def case(S, H, G, K, times, dtype):
    """q, k, v and the gradient of o; rounded to `dtype` first, so that the oracle sees the same numbers."""
    made = (noise(2, S, H, K) * times, noise(2, S, G, K, seed=1), noise(2, S, G, K, seed=2), noise(2, S, H, K, seed=3))
    return [x.to(dtype) for x in made]


def with_gradients(attend, q, k, v, do):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o = attend(q, k, v)
    o.backward(do.to(o.dtype))
    return [o.detach(), q.grad, k.grad, v.grad]


def oracle(*q_k_v_do):
    """o, dq, dk, dv in fp64: also the inputs, or autograd would round the gradients to their dtype."""
    return with_gradients(dense, *(x.double() for x in q_k_v_do))


def worst(got, want):
    """Largest error over o, dq, dk, dv, relative to the largest entry of each (at least 1)."""
    return max(((g.double() - w).abs().max() / w.abs().max().clamp(min=1)).item() for g, w in zip(got, want))


def on_the_ring(world, kernel, q_k_v_do, starts=None):
    """o, dq, dk, dv of the ring, put together again, whole on every rank."""
    idx_T = ring.zigzag_index(q_k_v_do[0].shape[1], world)
    attend = partial(ring.zigzag_attend(world, kernel, starts), 0)
    return [ranks.unshard(x, world) for x in with_gradients(attend, *(x[:, idx_T] for x in q_k_v_do))]


def check_attention(world, out):
    shapes = [c for c in CASES if c[0] % (2 * world.ranks) == 0]
    for (dtype, bound), kernel, shape in product(BOUNDS, ["math", "cpu"], shapes):
        given = case(*shape, dtype)
        whole, want = on_the_ring(world, kernel, given), oracle(*given)
        assert whole[0].dtype == dtype
        # fp32 cannot hold logits of hundreds to 1e-5; there, torch's own attention is the measure
        rounding = worst(with_gradients(sdpa, *given), want) if dtype == torch.float32 else 0
        error, bound = worst(whole, want), max(bound, 2 * rounding)
        assert error <= bound, f"an error of {error:.2g} where {bound:.2g} is allowed: {dtype}, {kernel}, {shape}"


def check_documents(world, out):
    """Documents of one token, of many chunks, ending where chunks end and elsewhere, other ones in each row."""
    cases = [
        [[0], [0, 1, 2, 47]],
        [[0, 24], [0, 6, 12, 18, 24, 30, 36, 42]],
        [[0, 5, 40, 44], [0, 23, 25]],
        [[0, 8, 16, 32, 40], [0, 11, 13, 14, 37]],
    ]
    for (dtype, bound), starts in product(BOUNDS, cases):
        given = case(48, 4, 2, 13, 1, dtype)
        want = with_gradients(partial(dense, starts=starts), *(x.double() for x in given))
        assert worst(on_the_ring(world, None, given, starts), want) <= bound, (dtype, starts)


def check_packed_documents(world, out):
    """A packed row's loss and gradients are those of its documents run alone, each from its own place 0."""
    torch.manual_seed(0)
    model, starts = longva.LM(LMConfig(31, 24, 32, 2, 6, 2)).double(), [[0, 7, 8, 30], [0, 24, 41]]
    ids = torch.randint(1, 31, (2, 49))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 0, 1 if "embed" in name else 0.4)
    for row, begun in zip(ids, starts):
        row[begun] = 0  # the separator
    assert text.document_starts(ids[:, :-1], 0) == starts
    alone = torch.zeros(())
    for row, begun in zip(ids, starts):
        for a, z in zip(begun, [*begun[1:], 48]):
            alone = alone + model(row[None, a:z], torch.arange(z - a), row[None, a + 1 : z + 1])[0].sum()
    want = torch.autograd.grad(alone, model.parameters())
    idx_T = ring.zigzag_index(48, world)
    loss = model(ids[:, :-1][:, idx_T], idx_T, ids[:, 1:][:, idx_T], ring.zigzag_attend(world, starts=starts))[0].sum()
    got = [ring.all_reduce_sum(g, world) for g in torch.autograd.grad(loss, model.parameters())]
    assert_close(ring.all_reduce_sum(loss, world), alone.detach(), rtol=1e-5, atol=0)  # angles and losses are fp32
    assert worst(got, want) <= 1e-5
    together = model(ids[:, :-1], torch.arange(48), ids[:, 1:])[0].sum()
    assert abs(together - alone) > 1e-3 * alone  # to see other documents makes a difference


def check_bf16(world, out):
    """Partial results are not rounded to bf16 on the way: mean errors stay near those of one process."""
    given = case(48, 4, 2, 16, 1, torch.bfloat16)
    ours, alone, want = on_the_ring(world, "math", given), on_the_ring(ALONE, "math", given), oracle(*given)
    # Each block leaves its kernel rounded, hence more than 1; rounding the sums too gives o and dq over 1.44 at R > 2.
    for got, one, exact, bound in zip(ours, alone, want, (1.4, 1.4, 1.6, 1.6)):
        ratio = (got - exact).abs().mean() / (one - exact).abs().mean()
        assert got.dtype == torch.bfloat16 and ratio <= bound


def check_traffic(world, out):
    """R - 1 messages forward, 2 (R - 1) backward; K and V in their own dtype, their gradients in fp32."""
    T, sent, real = 8, [], dist.batch_isend_irecv
    q, k, v, do = (x[:, :T] for x in case(16, 4, 2, 8, 1, torch.bfloat16))

    def counting(ops):
        sent.extend((op.tensor.nbytes, op.tensor.dtype) for op in ops if op.op is dist.isend)
        return real(ops)

    with mock.patch.object(dist, "batch_isend_irecv", counting):
        with_gradients(lambda *qkv: ring.zigzag_attend(world, "math")(0, *qkv), q, k, v, do)
    kv, hops = k.nbytes + v.nbytes, world.ranks - 1
    assert Counter(sent) == Counter({(kv, torch.bfloat16): 2 * hops, (2 * kv, torch.float32): hops})


def check_mean(world, out):
    assert ring.all_reduce_sum(torch.tensor(world.rank + 1), world) == sum(range(world.ranks + 1))
    x = torch.tensor(1.0 + world.rank, requires_grad=True)
    count = torch.tensor(3 * world.rank)  # ragged, and rank 0 has no target
    targets = sum(3 * r for r in range(world.ranks))
    ring.global_mean(x * count, count, world).backward()
    assert_close(x.grad, torch.tensor(3.0 * world.rank * world.ranks / targets))
    with pytest.raises(ValueError, match="no target on any rank"):
        ring.global_mean(x, torch.tensor(0), world)


# ---- sharded parameters --------------------------------------------------------------------------

SIZES = LMConfig(11, 12, 16, 2, 4, 2, head_dim=4, tie_word_embeddings=True)  # no number of ranks divides 11 rows


def weights():
    torch.manual_seed(0)
    return longva.LM(SIZES).state_dict()


def sharded(world, **options):
    """A tied model, built without memory, sharded, then filled: the order of a training script; and its AdamW."""
    with torch.device("meta"):
        model = longva.LM(SIZES)
    model.model.checkpointing = "full"
    ring.shard_parameters(model, model.model.layers, world, **options)
    for name, p in model.named_parameters():
        ring.copy_shard(p, weights()[name])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def batch(step, S=48):
    """Ids and shifted targets; only a few late tokens are targets, so that ranks hold different counts."""
    ids = torch.randint(0, 11, (1, S + 1), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    targets[:, : S - 9] = -100  # at 4 ranks of 6-token chunks, ranks 2 and 3 have no target
    return ids[:, :-1], targets


def backward(model, step, world):
    """The mean loss of this rank's part of a batch, after its backward pass."""
    ids, targets = batch(step)
    idx_T = ring.zigzag_index(ids.shape[1], world)
    nll, count = model(ids[:, idx_T], idx_T, targets[:, idx_T], ring.zigzag_attend(world))
    loss = ring.global_mean(nll.sum(), count.sum(), world)
    loss.backward()
    return loss.detach()


def train(model, optimizer, world, steps):
    losses = []
    for step in steps:
        loss = backward(model, step, world)
        ring.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ring.all_reduce_sum(loss / world.ranks, world).item())
    return losses


def check_sharded_gradients(world, out):
    """FSDP2 + ring + checkpoint + ragged targets give the gradient of one plain process with dense attention."""
    plain = longva.LM(SIZES)
    plain.load_state_dict(weights())
    ids, targets = batch(0)
    nll, count = plain(ids, torch.arange(48), targets, lambda layer, q, k, v: dense(q, k, v).float())
    (nll.sum() / count.sum()).backward()
    want = {name: p.grad for name, p in plain.named_parameters()}
    norm = torch.stack([g.norm() for g in want.values()]).norm().item()
    for options, tolerance in [({}, 1e-5), ({"offload": True}, 1e-5), ({"param_dtype": torch.bfloat16}, 0.05)]:
        model, _ = sharded(world, **options)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        gathered = dict(ring.gather_parameters(model, world))
        assert gathered.keys() == (want.keys() if world.rank == 0 else set())
        for name, whole in gathered.items():
            assert torch.equal(whole, weights()[name]) and whole.dtype == torch.float32
        backward(model, 0, world)
        assert ring.clip_gradients(model, math.inf) == pytest.approx(norm, rel=tolerance)
        assert ring.clip_gradients(model, norm / 2) == pytest.approx(norm, rel=tolerance)
        assert ring.clip_gradients(model, math.inf) == pytest.approx(norm / 2, rel=tolerance)
        for name, p in model.named_parameters():
            got = p.grad.full_tensor() if world.ranks > 1 or options else p.grad
            assert_close(got * 2, want[name], rtol=tolerance, atol=tolerance * norm)
    if world.rank == world.ranks - 1:  # one rank's nan must stop them all
        local = model.model.layers[0].mlp.up_proj.weight.grad
        (local.to_local() if hasattr(local, "to_local") else local).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        ring.clip_gradients(model, 1.0)


def same(model, optimizer, other, other_optimizer):
    mine, its = checkpoint.tensors(model, optimizer), checkpoint.tensors(other, other_optimizer)
    assert mine.keys() == its.keys() and len(mine) > len(list(model.parameters()))
    for key in mine:
        assert torch.equal(ring.local_shard(mine[key])[0], ring.local_shard(its[key])[0]), key


def check_resume(world, out):
    """A step, a save, and two more in this model or in another that loads it: the same, every bit."""
    folder = out / f"state-{world.ranks}"
    through, optimizer = sharded(world)
    assert ring.load_state(folder, through, optimizer, world) == 0
    train(through, optimizer, world, [1])
    ring.save_state(folder, through, optimizer, 1, world)
    resumed, its_optimizer = sharded(world)
    assert ring.load_state(folder, resumed, its_optimizer, world) == 1
    same(through, optimizer, resumed, its_optimizer)
    losses = train(through, optimizer, world, [2, 3])
    assert train(resumed, its_optimizer, world, [2, 3]) == losses
    same(through, optimizer, resumed, its_optimizer)
    (out / f"losses-{world.ranks}.json").write_text(json.dumps(losses))


def check_resume_from(before, world, out):
    """Training goes on from what another number of ranks has saved in check_resume."""
    model, optimizer = sharded(world)
    assert ring.load_state(out / f"state-{before}", model, optimizer, world) == 1
    losses = json.loads((out / f"losses-{before}.json").read_text())
    assert train(model, optimizer, world, [2, 3]) == pytest.approx(losses, rel=1e-5)


# ---- the sharded cache ---------------------------------------------------------------------------


def cache_for(world, B, S, H, G, K, L, dtype=torch.float32):
    sizes = LMConfig(num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G, head_dim=K)
    return ring.ShardedCache(sizes, B, S, torch.empty(0, dtype=dtype), world)


def recite(cache, world, x, chunk):
    """Feed q, k, v of further tokens, one triple per layer, to a cache; what it answers in each layer, whole."""
    T, answers, shared = x[0][0].shape[1], [], []
    for here, idx in cache.pieces(T, chunk):
        assert idx.dtype == torch.int64 and idx.device == world.device
        size = here.stop - here.start
        for layer, qkv in enumerate(x):
            o = cache.attend(layer, *(y[:, here][:, idx] for y in qkv))
            if cache.sharded:
                assert len(idx) == size // world.ranks and size <= max(chunk, 2 * world.ranks)
                o = ranks.unshard(o, world)
            else:
                shared.append(o)
            answers.append((here, layer, o))
    assert len(idx) == size > 0 and here.stop == T  # the last piece is known to all
    for o in shared:
        assert all(torch.equal(o, other) for other in ring.all_gather(o, world))
    return [torch.cat([o for _, of, o in answers if of == layer], dim=1) for layer in range(len(x))]


def check_cache(world, out):
    """Prompts of many lengths, and single tokens; in two layers, against dense attention."""
    reads = [(5, 64), (45, 24), (1, 8), (1, 8), (27, 9), (1, 8), (75, 32), (1, 64), (19, 64), (1, 1)]
    for dtype, bound, B, H, G, K in [(torch.float64, 1e-12, 2, 4, 2, 14), (torch.float32, 1e-5, 1, 7, 1, 8)]:
        cache = cache_for(world, B, 200, H, G, K, 2, dtype)
        known = [[torch.empty(B, 0, n, K, dtype=dtype) for n in (H, G, G)]] * 2
        for seed, (T, chunk) in enumerate(reads):
            new = [[noise(B, T, n, K, seed=10 * seed + 3 * layer + i).to(dtype) for i, n in enumerate((H, G, G))] for layer in range(2)]  # fmt: skip
            known = [[torch.cat(pair, 1) for pair in zip(*both)] for both in zip(known, new)]
            for o, qkv in zip(recite(cache, world, new, chunk), known):
                assert o.dtype == dtype
                assert worst([o], [dense(*qkv)[:, -T:]]) <= bound, (dtype, T, chunk)
            assert cache.length == known[0][0].shape[1]


def check_full_cache(world, out):
    """However it is filled, no rank runs out of room before the whole is full; then a sentence says so."""
    S = 3 * ring.REPLICATED
    cache = cache_for(world, 1, S, 1, 1, 2, 1)
    for T in [ring.REPLICATED, 2 * world.ranks + 1, ring.REPLICATED, 1]:
        recite(cache, world, [[noise(1, T, 1, 2).float()] * 3], 8 if T < ring.REPLICATED else S)
    while left := S - cache.length:
        recite(cache, world, [[noise(1, min(left, 20), 1, 2).float()] * 3], S)
    assert cache.length == S and max(cache.lengths) <= cache.k_LBSGK.shape[2]
    with pytest.raises(AssertionError, match=f"a cache for {S} tokens cannot hold {S + 1}"):
        next(cache.pieces(1, 8))


CHECKS = [check_attention, check_documents, check_packed_documents, check_cache, check_full_cache]
CHECKS += [check_sharded_gradients, check_resume]


@pytest.mark.ranks
@pytest.mark.parametrize("n", [2, 3, 4])
def test_ranks(n, tmp_path):
    check_resume(ALONE, tmp_path)
    ranks.run(n, [*CHECKS, check_mean, check_bf16, check_traffic, partial(check_resume_from, 1)], tmp_path)
    check_resume_from(n, ALONE, tmp_path)


@pytest.mark.ranks
def test_eight_ranks(tmp_path):
    """As many as the paper has."""
    ranks.run(8, [check_attention, check_traffic], tmp_path)


def test_one_process(check_shapes, tmp_path):
    assert ring.start("cpu") == ALONE
    try:
        for check in CHECKS:
            check(ALONE, tmp_path)
    finally:
        ring.stop()
    assert not dist.is_initialized()
    assert ring.zigzag_index(7, ALONE).tolist() == list(range(7))
    assert ring.global_mean(torch.tensor(6.0), torch.tensor(3), ALONE) == 2
    with pytest.raises(ValueError, match="no target"):
        ring.global_mean(torch.tensor(0.0), torch.tensor(0), ALONE)


@pytest.mark.parametrize("R", [2, 3, 4])
def test_zigzag_index(R):
    S = 6 * R
    for rank in range(R):
        idx_T = ring.zigzag_index(S, ring.World(rank, R, torch.device("cpu")))
        first, last = 3 * rank, 3 * (2 * R - 1 - rank)
        assert idx_T.tolist() == [*range(first, first + 3), *range(last, last + 3)]
    for uneven, legal in ((S - 1, S), (0, 2 * R)):
        with pytest.raises(ValueError, match=f"next length that does is {legal} tokens"):
            ring.zigzag_index(uneven, ring.World(0, R, torch.device("cpu")))


@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_documents_cost_what_they_see(R):
    """No pair of a query and a key is computed twice, and none that is masked but for the squares' upper halves."""
    pairs = 0
    for rank, hop in product(range(R), range(R)):
        world = ring.World(rank, R, torch.device("cpu"))
        for _, t, s, causal in ring.visible_blocks(hop, world, 48 // R, [[0, 5, 40, 44]]):
            n, m = t.stop - t.start, s.stop - s.start
            pairs += n * (n + 1) // 2 if causal else n * m
    assert pairs == sum(n * (n + 1) // 2 for n in (5, 35, 4, 4))


def test_start_complains(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, n in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(n))
    with pytest.raises(ValueError, match=r"4 process.* torch sees 2; start torchrun with --nproc-per-node 2"):
        ring.start("cuda")


def test_merge_equals_one_softmax():
    q, k, v, _ = case(24, 4, 2, 16, 100, torch.float32)
    first = ring.block_attention(q, k[:, :10], v[:, :10], False)
    second = ring.block_attention(q, k[:, 10:], v[:, 10:], False)
    both = ring.block_attention(q.double(), k.double(), v.double(), False, "math")
    for got in (ring.merge(*first, *second), ring.merge(*second, *first)):
        assert_close([x.double() for x in got], [*both], rtol=1e-5, atol=1e-5)
        assert all(not torch.equal(a, b) for a, b in zip(got, first))  # the inputs are left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_extremes(dtype):
    o, new = noise(1, 5, 1, 2, dtype=dtype), noise(1, 5, 1, 2, seed=1, dtype=dtype)
    inf = math.inf
    lse, new_lse = torch.tensor([[[-inf, -inf, 3.0, 1e4, -1e4]], [[-inf, 2.0, -inf, -1e4, 1e4]]], dtype=dtype)[:, None]
    got, got_lse = ring.merge(o, lse, new, new_lse)
    want = torch.stack([o[:, 0], new[:, 1], o[:, 2], o[:, 3], new[:, 4]], dim=1)
    assert torch.equal(got, want) and got_lse.flatten().tolist() == [-inf, 2.0, 3.0, 1e4, 1e4]
    half, half_lse = ring.merge(o.bfloat16(), torch.zeros(1, 1, 5), new.bfloat16(), torch.zeros(1, 1, 5))
    assert half.dtype == torch.float32 and torch.allclose(half_lse, torch.tensor(2.0).log())


@pytest.mark.parametrize("kernel, dtype, bound", [
    ("cpu", torch.float64, 1e-12), ("cpu", torch.float32, 1e-5), ("cpu", torch.bfloat16, 0.02),
    *(pytest.param(kernel, dtype, bound, marks=pytest.mark.gpu) for kernel in ("cuda", "cudnn", "flash_attn")
      for dtype, bound in ((torch.bfloat16, 0.02), (torch.float16, 0.003))),
])  # fmt: skip
@pytest.mark.parametrize("causal, all_keys", [(True, True), (False, True), (False, False)])
def test_kernels_agree(kernel, dtype, bound, causal, all_keys):
    """Each kernel equals math in fp64, also backward from the o and lse of more keys than the block's."""
    if kernel == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    if kernel == "flash_attn" and not find_spec("flash_attn"):
        pytest.skip("needs flash-attn: pip install flash-attn --no-build-isolation")
    T, H, G, K, device = (21, 6, 2, 7, "cpu") if kernel == "cpu" else (128, 8, 2, 64, "cuda")
    q, k, v, do = (x.to(device) for x in case(T, H, G, K, 1, dtype))
    k, v = (x if all_keys else x[:, : T // 2].contiguous() for x in (k, v))
    lse_dtype = torch.promote_types(dtype, torch.float32)
    o, lse = ring.block_attention(*(x.double() for x in (q, k, v)), causal, "math")
    fast_o, fast_lse = ring.block_attention(q, k, v, causal, kernel)
    assert worst([fast_o, fast_lse], [o, lse]) <= bound
    assert lse.is_contiguous() and fast_lse.is_contiguous() and fast_lse.dtype == lse_dtype
    if not causal:
        o, lse = o + 0.1, lse + 0.5
    slow = ring.block_attention_backward(*(x.double() for x in (do, q, k, v, o, lse)), causal, "math")
    fast = ring.block_attention_backward(do, q, k, v, o.to(dtype), lse.to(lse_dtype), causal, kernel)
    assert [x.dtype for x in fast] == [dtype] * 3 and worst(fast, slow) <= 2 * bound


@pytest.mark.parametrize("kernel", ["cuda", "cudnn"])
def test_cuda_kernel_signatures(monkeypatch, kernel):
    """Shapes and dtypes of the CUDA kernels without a GPU: only torch's own account of its operators is asked."""
    with FakeTensorMode():
        q, k = (torch.empty(2, 16, G, 32, device="cuda", dtype=torch.bfloat16) for G in (4, 2))
        o, lse = ring.block_attention(q, k, k, True, kernel)
        assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 4, 16), torch.float32)
        q, o, lse = q.narrow(1, 8, 8), o.narrow(1, 8, 8), torch.empty(2, 4, 8, device="cuda")
        grads = ring.block_attention_backward(o, q, k, k, o, lse, False, kernel)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
        monkeypatch.setattr(ring, "best_kernel", lambda q_BTHK: "cuda")
        part = ring.attend_unmasked(q.narrow(1, 0, 1), k.narrow(1, 0, 9), k.narrow(1, 0, 9))  # a decode step
        assert (part.shape, part.dtype) == ((2, 1, 4, 33), torch.float32)


def fails(world):
    if world.rank == 1:
        raise KeyError("the reason")
    time.sleep(60)  # else this rank, whose message is lost with the other, may be the first to fail


@pytest.mark.ranks
def test_a_failing_rank_fails_the_test():
    with pytest.raises(Exception, match="the reason"):
        ranks.run(2, [fails])


def test_flash_attn_is_called_as_its_package_wants(monkeypatch):
    """A stand-in with the package's signatures (2.7 to 2.8, all arguments given by name) that computes by math."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        assert return_attn_probs
        return *ring.math_forward(q, k, v, causal), None

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                             window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
                             rng_state=None):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        assert softmax_scale == q.shape[-1] ** -0.5
        assert all(x.is_contiguous() for x in (dout, q, k, v, out, softmax_lse))
        for to, x in zip((dq, dk, dv), ring.math_backward(dout, q, k, v, out, softmax_lse, causal)):
            to.copy_(x)

    package, inner = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_func, inner._flash_attn_backward = flash_attn_func, _flash_attn_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", inner)
    q, k, v, do = case(20, 6, 3, 5, 1, torch.float64)
    got = with_gradients(partial(ring.zigzag_attend(ALONE, "flash_attn"), 0), q, k, v, do)
    assert worst(got, oracle(q, k, v, do)) <= 1e-12


# ---- a rank that is lost or frozen ---------------------------------------------------------------


def freeze(rank, port, when, said):
    """Rank 0 freezes before or after a group is made that waits long; what each rank says goes to a file."""
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    ring.TIMEOUT = timedelta(seconds=4)
    world = ring.start("cpu")
    if rank == 0 and when == "before":
        time.sleep(300)
    group = ring.long_timeout_group(world, hours=2 / 3600)
    if rank == 0:
        time.sleep(300)
    ring.all_reduce_sum(torch.zeros(1), group)


@pytest.mark.ranks
def test_a_frozen_rank_is_noticed(tmp_path):
    """Also while a group is made that waits for days, and without a torchrun that ends the others."""
    jobs = []
    for when in ("before", "after"):  # both at once: they wait most of the time
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(2):
            said = tmp_path / f"{when}-{rank}"
            jobs.append((ranks.forkserver().Process(target=freeze, args=(rank, port, when, said)), said))
            jobs[-1][0].start()
    try:
        for process, said in jobs[1::2]:
            process.join(100)
            assert process.exitcode == 1 and flags.LOST.search(said.read_text().splitlines()[-1]), said.read_text()
    finally:
        for process, _ in jobs:
            process.kill()
            process.join()
