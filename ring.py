"""Context parallelism: one long sequence on many processes, with exact attention and gradients (zigzag ring attention).

What      First the paper's idea: which tokens a rank holds, attention to one block of keys, the merge of two blocks by
          their log-sum-exp, the ring forward and backward. Then processes and sums over ranks, a KV cache sharded over
          ranks, sharded parameters (FSDP2), saved state. No other file imports torch.distributed; with one process
          only FSDP2 needs a group, and nothing is communicated.
Paper     Sec. 3.1: ring attention (arXiv 2310.01889) in zigzag order, FlashAttention-2, parameter offload.
Run       not by itself; every script calls `start()`, alone or under `torchrun --nproc-per-node 8`.
Dimensions  B batch   T tokens held here   S tokens of the whole sequence, or of a block of keys   R ranks
          H query heads   G key/value heads   Q query heads per key head   K head width
Differs   K and V travel with their G heads, not repeated to H: 7 times fewer bytes for Qwen2-7B, the same result.
          dK and dV make R - 1 hops instead of R: what a rank computes for its own keys never leaves it.
          Partial results are summed in fp32, as the release's, and in fp64 for fp64: errors do not grow with R.
          The loss is divided by the count of targets on all ranks: a mean of means would weigh tokens unequally.
"""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import checkpoint
from data.config import LMConfig
from data.memory_saving import FAST_KERNELS, best_kernel
from data.runs import pick_device

DocumentStarts = list[list[int]]  # where documents begin in each row of a batch
OLse = tuple[Tensor, Tensor]  # (o_BTHK, lse_BHT): attention to some of the keys, and its log-sum-exp


@dataclass(frozen=True)
class World:
    """This process in the run, or in one ring: its rank among `ranks` (the world size), computing on `device`."""

    rank: int
    ranks: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # of a ring that is not the whole run

    def peer(self, rank: int) -> int:
        """The rank in the whole run of this group's `rank` (mod R), which is what send, receive and broadcast take."""
        return dist.get_global_rank(self.group, rank % self.ranks) if self.group else rank % self.ranks


# ---- which tokens a rank holds -------------------------------------------------------------------


def zigzag_index(S: int, world: World) -> Tensor:
    """Global positions of the tokens held here, int64[T] on world.device: of 2R chunks, numbers r and 2R - 1 - r.

    A causal query attends to all keys before it, so a late chunk costs more than an early one. One early and one late
    chunk cost the same on every rank (load balancing). The positions are also the tokens' position ids.
    Raises ValueError if 2R does not divide S. One process takes any length, in order.
    """
    if world.ranks == 1:
        return torch.arange(S, device=world.device)
    chunks = 2 * world.ranks
    if S % chunks or S == 0:
        legal, uneven = max(chunks, math.ceil(S / chunks) * chunks), f"{S} tokens do not make {chunks} equal chunks"
        raise ValueError(f"{uneven}, two for each rank; the next length that does is {legal} tokens")
    chunk = torch.arange(S, device=world.device).chunk(chunks)
    return torch.cat([chunk[world.rank], chunk[-1 - world.rank]])


# ---- attention to one block of keys --------------------------------------------------------------
# A kernel is two functions: (q, k, v, causal) -> (o, lse) and (do, q, k, v, o, lse, causal) -> (dq, dk, dv). Given a
# block of the keys, but o and lse of *all* keys, the second yields that block's share of the gradients. The two
# here write all logits to memory; FlashAttention, for a CPU or a GPU, computes the same without.


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype to add up in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def math_logits(q_BTHK: Tensor, k_BSGK: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Scaled queries with their heads in G groups of Q, and logits; no key is copied for its Q query heads."""
    q_BTGQK = q_BTHK.to(accumulate_dtype(q_BTHK)).unflatten(2, (k_BSGK.shape[2], -1)) * q_BTHK.shape[-1] ** -0.5
    logits_BGQTS = torch.einsum("btgqk,bsgk->bgqts", q_BTGQK, k_BSGK.to(q_BTGQK.dtype))
    if causal:
        future_TS = torch.ones(logits_BGQTS.shape[-2:], dtype=torch.bool, device=q_BTHK.device).triu(1)
        logits_BGQTS = logits_BGQTS.masked_fill(future_TS, -torch.inf)
    return q_BTGQK, logits_BGQTS


def math_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool) -> OLse:
    """Softmax attention as in the textbook, and the log of the softmax's denominator (log-sum-exp)."""
    _, logits_BGQTS = math_logits(q_BTHK, k_BSGK, causal)
    o_BTGQK = torch.einsum("bgqts,bsgk->btgqk", logits_BGQTS.softmax(-1), v_BSGK.to(logits_BGQTS.dtype))
    return o_BTGQK.flatten(2, 3).to(q_BTHK.dtype), logits_BGQTS.logsumexp(-1).flatten(1, 2)


def math_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal):  # noqa: ANN001, ANN201
    """Gradients of math_forward: p = exp(logits - lse), dlogits = p (dp - D), D = sum(do o): of all keys."""
    G, dtype = k_BSGK.shape[2], accumulate_dtype(q_BTHK)
    q_BTGQK, logits_BGQTS = math_logits(q_BTHK, k_BSGK, causal)
    do_BTGQK, o_BTGQK = do_BTHK.to(dtype).unflatten(2, (G, -1)), o_BTHK.to(dtype).unflatten(2, (G, -1))
    p_BGQTS = (logits_BGQTS - lse_BHT.unflatten(1, (G, -1))[..., None]).exp()
    dp_BGQTS = torch.einsum("btgqk,bsgk->bgqts", do_BTGQK, v_BSGK.to(dtype))
    dlogits_BGQTS = p_BGQTS * (dp_BGQTS - torch.einsum("btgqk,btgqk->bgqt", do_BTGQK, o_BTGQK)[..., None])
    dq_BTGQK = torch.einsum("bgqts,bsgk->btgqk", dlogits_BGQTS, k_BSGK.to(dtype)) * q_BTHK.shape[-1] ** -0.5
    dk_BSGK = torch.einsum("bgqts,btgqk->bsgk", dlogits_BGQTS, q_BTGQK)
    dv_BSGK = torch.einsum("bgqts,btgqk->bsgk", p_BGQTS, do_BTGQK)
    return dq_BTGQK.flatten(2, 3).to(q_BTHK.dtype), dk_BSGK.to(k_BSGK.dtype), dv_BSGK.to(v_BSGK.dtype)


KERNELS = {"math": (math_forward, math_backward), **FAST_KERNELS}  # see data/memory_saving.py


def block_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, kernel: str | None = None) -> OLse:
    """Attend to one block of keys: (o_BTHK, lse_BHT), to be merged with other blocks. No gradient.

    `lse` is contiguous, fp32 (fp64 for fp64). `causal`: square blocks alone, for kernels disagree about others.
    """
    assert k_BSGK.shape[1] > 0, "an empty block crashes the CPU kernel: leave it out, it adds nothing"
    assert not causal or q_BTHK.shape[1] == k_BSGK.shape[1], "causal needs as many queries as keys"
    return KERNELS[kernel or best_kernel(q_BTHK)][0](q_BTHK, k_BSGK, v_BSGK, causal)


def block_attention_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal, kernel=None):  # noqa: ANN001, ANN201
    """This block's share of (dq_BTHK, dk_BSGK, dv_BSGK); `o` and `lse` are those of all blocks, merged."""
    backward = KERNELS[kernel or best_kernel(q_BTHK)][1]
    return backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal)


def merge(o_BTHK: Tensor, lse_BHT: Tensor, new_o_BTHK: Tensor, new_lse_BHT: Tensor) -> OLse:
    """Attention over two disjoint sets of keys from attention over each, as new fp32 tensors (fp64 for fp64).

    The online softmax: o = (1 - w) o + w o' with w = sigmoid(lse' - lse), since exp(lse) is the softmax's denominator;
    lse = log(exp(lse) + exp(lse')). Only differences are exponentiated, so no logit is too large. A row without keys
    has lse = -inf and any finite o; its weight is 0.
    """
    # a new block without keys has weight 0, also where the old one has none (-inf minus -inf is nan)
    gap_BHT = (new_lse_BHT - lse_BHT).masked_fill(new_lse_BHT == -torch.inf, -torch.inf)
    weight_BTH1 = gap_BHT.sigmoid().transpose(1, 2)[..., None]
    merged_BTHK = o_BTHK.to(weight_BTH1.dtype).lerp(new_o_BTHK.to(weight_BTH1.dtype), weight_BTH1)
    return merged_BTHK, torch.maximum(lse_BHT, new_lse_BHT) - F.logsigmoid(gap_BHT.abs())


# ---- the ring: who attends to whom ---------------------------------------------------------------
# After `hop` sends and receives (a "step" of ring attention) rank r has the keys of rank r - hop (mod R). A chunk
# attends to earlier chunks without a mask, to itself causally, and not to later ones.


class VisibleBlock(NamedTuple):
    """Queries and the keys they attend to: rows b of the batch, positions t of our queries, s of the received keys."""

    b: slice
    t: slice
    s: slice
    causal: bool


def visible_blocks(hop: int, world: World, T: int, starts: DocumentStarts | None = None) -> Iterator[VisibleBlock]:
    """Which queries attend to which of the keys that arrived after `hop` hops; a query's own chunk comes first.

    Rank r holds chunks r and 2R - 1 - r, so the lower rank's pair encloses the higher rank's. Hence the cases below,
    each half of a T x T square: all ranks compute equally much. With `starts`, only what lies within one document.
    """
    whole, half = slice(None), T // 2
    if starts is not None:
        for row, begins in enumerate(starts):
            yield from (VisibleBlock(slice(row, row + 1), *block) for block in document_blocks(hop, world, T, begins))
    elif hop == 0:
        yield VisibleBlock(whole, whole, whole, True)
    elif hop <= world.rank:  # a lower rank's keys: the front chunk precedes all of ours, the back chunk none
        yield VisibleBlock(whole, whole, slice(0, half), False)
    else:  # a higher rank's: all precede our back chunk, none our front chunk
        yield VisibleBlock(whole, slice(half, None), whole, False)


def document_blocks(hop: int, world: World, T: int, begins: list[int]) -> Iterator[tuple[slice, slice, bool]]:
    """(t, s, causal) of one sequence whose documents begin at `begins` (the first at 0) and attend only to themselves.

    A chunk attends causally to each of its documents, and to what an earlier chunk holds of its first document.
    """
    R, size = world.ranks, T // 2 if world.ranks > 1 else T  # size: tokens of a chunk
    ours, theirs = ([r, 2 * R - 1 - r] if R > 1 else [0] for r in (world.rank, (world.rank - hop) % R))
    pairs = sorted(product(enumerate(ours), enumerate(theirs)), key=lambda pair: pair[0][1] != pair[1][1])  # own first
    for (i, our_chunk), (j, their_chunk) in pairs:
        chunk_start = our_chunk * size
        first, last = bisect_right(begins, chunk_start) - 1, bisect_left(begins, chunk_start + size)
        ends = [*begins[first + 1 : last], chunk_start + size]
        if our_chunk == their_chunk:
            for begin, end in zip([chunk_start, *ends], ends):
                document = slice(begin - chunk_start + i * size, end - chunk_start + i * size)
                yield document, document, True
        elif their_chunk < our_chunk and (doc_start := max(begins[first] - their_chunk * size, 0)) < size:
            yield slice(i * size, i * size + ends[0] - chunk_start), slice(j * size + doc_start, (j + 1) * size), False


# ---- the ring: forward and backward --------------------------------------------------------------


class SendRecv:
    """Send a tensor to the next rank of the ring and receive the previous rank's, while computation goes on."""

    def __init__(self, tensor: Tensor, world: World):
        self.sent, self.received = tensor, torch.empty_like(tensor)  # both must live until the transfer is done
        send = dist.P2POp(dist.isend, tensor, world.peer(world.rank + 1), world.group)
        receive = dist.P2POp(dist.irecv, self.received, world.peer(world.rank - 1), world.group)
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        """The tensor of the previous rank."""
        for work in self.works:
            work.wait()
        return self.received


def rotate_kv(k_BTGK: Tensor, v_BTGK: Tensor, world: World) -> Iterator[tuple[int, Tensor]]:
    """(hop, K and V stacked): our own, then those of R - 1 others; the next arrive while the caller computes."""
    kv = torch.stack([k_BTGK, v_BTGK])
    for hop in range(world.ranks):
        transfer = SendRecv(kv, world) if hop < world.ranks - 1 else None
        yield hop, kv
        kv = transfer.wait() if transfer else kv


def ring_forward(q_BTHK, k_BTGK, v_BTGK, world, kernel=None, starts=None) -> OLse:  # noqa: ANN001
    """Causal attention to the keys of all ranks: (o_BTHK, lse_BHT) in fp32, with R - 1 messages of K and V."""
    o_BTHK = torch.empty_like(q_BTHK, dtype=accumulate_dtype(q_BTHK))
    lse_BHT = o_BTHK.new_empty(*o_BTHK.shape[:3]).transpose(1, 2).contiguous()
    for hop, (k_BSGK, v_BSGK) in rotate_kv(k_BTGK, v_BTGK, world):
        for b, t, s, causal in visible_blocks(hop, world, q_BTHK.shape[1], starts):
            part = block_attention(q_BTHK[b, t], k_BSGK[b, s], v_BSGK[b, s], causal, kernel)
            if not causal:  # a query's own chunk comes first, when there is nothing yet to merge with
                part = merge(o_BTHK[b, t], lse_BHT[b, :, t], *part)
            o_BTHK[b, t], lse_BHT[b, :, t] = part
            del part
    return o_BTHK, lse_BHT


def ring_backward(do_BTHK, q_BTHK, k_BTGK, v_BTGK, o_BTHK, lse_BHT, world, kernel=None, starts=None):  # noqa: ANN001, ANN201
    """Gradients (dq_BTHK, dk_BTGK, dv_BTGK), with R - 1 messages of K and V and R - 1 of fp32 sums of dK and dV.

    dq stays: queries never travel. dK and dV travel one hop behind their keys; every rank adds its share, and after
    R - 1 hops they reach the owner of the keys, which adds the share that it computed itself.
    """
    dq_BTHK, dkv_in_flight = torch.zeros_like(q_BTHK, dtype=accumulate_dtype(q_BTHK)), None
    own_dkv = dq_BTHK.new_zeros(2, *k_BTGK.shape)
    for hop, (k_BSGK, v_BSGK) in rotate_kv(k_BTGK, v_BTGK, world):
        dkv = own_dkv if hop == 0 else torch.zeros_like(own_dkv) if hop == 1 else None  # later: what comes in
        for b, t, s, causal in visible_blocks(hop, world, q_BTHK.shape[1], starts):
            grads = block_attention_backward(
                do_BTHK[b, t], q_BTHK[b, t], k_BSGK[b, s], v_BSGK[b, s], o_BTHK[b, t], lse_BHT[b, :, t], causal, kernel
            )
            if dkv is None:  # the sum comes in while the first block computes
                dkv = dkv_in_flight.wait()
            for accumulator, new in zip((dq_BTHK[b, t], dkv[0, b, s], dkv[1, b, s]), grads):
                accumulator += new
            del grads, new  # not to be held while the next is computed
        if hop > 0:
            if dkv is None:  # no document reaches from these keys to our queries
                dkv = dkv_in_flight.wait()
            dkv_in_flight = SendRecv(dkv, world)
    dk_BTGK, dv_BTGK = own_dkv + dkv_in_flight.wait() if dkv_in_flight else own_dkv
    return dq_BTHK.to(q_BTHK.dtype), dk_BTGK.to(k_BTGK.dtype), dv_BTGK.to(v_BTGK.dtype)


class Ring(torch.autograd.Function):
    """ring_forward, with ring_backward as its gradient; all ranks must run both in the same order."""

    @staticmethod
    def forward(ctx, q_BTHK, k_BTGK, v_BTGK, *rest):  # noqa: ANN001, D102
        q_BTHK, k_BTGK, v_BTGK = (x.contiguous() for x in (q_BTHK, k_BTGK, v_BTGK))
        o_BTHK, lse_BHT = ring_forward(q_BTHK, k_BTGK, v_BTGK, *rest)
        o_BTHK = o_BTHK.to(q_BTHK.dtype)
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGK, o_BTHK, lse_BHT)
        ctx.rest = rest
        return o_BTHK

    @staticmethod
    def backward(ctx, do_BTHK):  # noqa: ANN001, D102
        return *ring_backward(do_BTHK.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None


def zigzag_attend(world: World, kernel: str | None = None, starts: DocumentStarts | None = None) -> Callable:
    """The model's `attend` for a sequence divided by `zigzag_index` (Sec. 3.1); one process: plain causal.

    Every rank must hold equally many tokens and call it in the same order. `kernel` forces one of KERNELS.
    `starts`: where documents begin in each row of the batch, the first at 0, if none may attend to another (ours).
    """

    def attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        assert world.ranks == 1 or q_BTHK.shape[1] % 2 == 0, "a rank holds two chunks of one length"
        return Ring.apply(q_BTHK, k_BTGK, v_BTGK, world, kernel, starts)

    return attend


# That was the paper's ring attention. What follows: processes, a sharded cache, FSDP2 and offload, saved state.
# ---- processes, and sums over them ---------------------------------------------------------------

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # gloo too, for tensors offloaded to the CPU
TIMEOUT = timedelta(minutes=10)  # for one exchange: longer than any rank keeps others waiting, e.g. to save


def start(device: str = "auto") -> World:
    """Join the other processes that torchrun started, if it did; one process starts no group.

    `device`: "cpu", "cuda", or "auto". Raises ValueError if this machine has fewer GPUs than processes.
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # as torchrun sets them
    rank, ranks, local_rank, local_ranks = (int(os.environ.get(name, default)) for name, default in names.items())
    set_cuda_defaults()
    kind = pick_device(device)
    if kind == "cuda":
        if local_ranks > (found := torch.cuda.device_count()):
            fix = f"start torchrun with --nproc-per-node {found}" if found else "choose --device cpu"
            raise ValueError(f"{local_ranks} process(es) need one GPU each, but torch sees {found}; {fix}")
        torch.cuda.set_device(local_rank)
    if ranks > 1:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a restart must not read the old keys of the store
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://", timeout=TIMEOUT))[0])
        dist.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    return World(rank, ranks, torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu"))


def set_cuda_defaults() -> None:
    """Settings of torch for a GPU; to be called before the first use of one."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # split-K adds in fp32
    torch.backends.cudnn.allow_tf32 = False  # CLIP's convolution in float32
    torch.backends.cuda.enable_cudnn_sdp(False)  # preferred on Hopper, but it makes a plan, 40 ms, for each new shape


def stop() -> None:
    """Leave the process group. With gloo ranks need not arrive together, so it may stand in a `finally`."""
    if dist.is_initialized():
        dist.destroy_process_group()


class RingGroup(NamedTuple):
    """This process's ring: its ranks share sequences; the rings among themselves are data parallel."""

    ring: World
    index: int  # number of this ring
    count: int  # rings in the run


def split_groups(world: World, size: int) -> RingGroup:
    """Split the run into rings of `size` neighbouring ranks, each of which shares a sequence.

    All ranks must call it. Raises ValueError if `size` does not divide the number of ranks.
    """
    if size < 1 or world.ranks % size:
        legal = ", ".join(str(n) for n in range(1, world.ranks + 1) if world.ranks % n == 0)
        raise ValueError(f"{world.ranks} rank(s) cannot form rings of {size}; choose one of {legal}")
    count, index = world.ranks // size, world.rank // size
    if count == 1:
        return RingGroup(world, 0, 1)
    groups = [dist.new_group(range(i * size, (i + 1) * size), timeout=TIMEOUT) for i in range(count)]
    return RingGroup(World(world.rank % size, size, world.device, groups[index]), index, count)


def all_reduce_sum(x: Tensor, world: World) -> Tensor:
    """Sum `x` over the ranks, without gradient. All ranks must call it."""
    x = x.detach().clone()
    if world.ranks > 1:
        dist.all_reduce(x, group=world.group)
    return x


def global_mean(loss_sum: Tensor, count: Tensor, world: World) -> Tensor:
    """This rank's share of the mean loss per target over all ranks: loss_sum * R / count of all ranks.

    `loss_sum`: over the targets here; `count`: how many these are, 0 allowed. R, because FSDP *averages* gradients over
    the ranks; the mean of all shares is the loss. Raises ValueError, on all ranks alike, if no rank has a target.
    """
    total_count = all_reduce_sum(count, world)
    if total_count == 0:
        raise ValueError("this batch has no target on any rank, so it has no loss; check the data's masks")
    return loss_sum * (world.ranks / total_count)


def all_gather(x: Tensor, world: World) -> list[Tensor]:
    """The tensors `x` of all ranks in rank order, without gradient; one shape and dtype on all ranks."""
    if world.ranks == 1:
        return [x.detach()]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world.ranks)]
    dist.all_gather(parts, x.detach().contiguous(), world.group)
    return parts


def gather_round_robin(parts: Iterable[Tensor], no_0D: Tensor, rows: int, times: int, world: World) -> Iterator[Tensor]:
    """All ranks' first part x_TD in rank order, concatenated, on all ranks; then their second; `times` in all.

    T is 0 to `rows`; ranks may have fewer parts. `no_0D` gives width, dtype and device.
    """
    parts = iter(parts)
    for _ in range(times):
        mine = next(parts, no_0D)
        counts = all_gather(torch.tensor(len(mine), device=no_0D.device), world)
        gathered = all_gather(F.pad(mine, (0, 0, 0, rows - len(mine))), world)
        joined = torch.cat([x_TD[:n] for x_TD, n in zip(gathered, counts)])
        del gathered, mine  # free them while the caller computes
        yield joined


def long_timeout_group(world: World, hours: int = 30 * 24) -> World:
    """The ranks of the whole run in a gloo group that waits longer: for typed input, or ranks with unequal work."""
    if world.ranks == 1:
        return world
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # a rank that is lost before it comes here is noticed
    dist.distributed_c10d._set_pg_timeout(timedelta(hours=hours), group)
    return replace(world, device=torch.device("cpu"), group=group)


def broadcast_text(read: Callable[[], str], world: World) -> str:
    """The text of `read()`, called on rank 0 alone, on every rank; bytes that are no UTF-8 become "?"."""
    box = [read().encode(errors="replace").decode() if world.rank == 0 else ""]
    if world.ranks > 1:
        dist.broadcast_object_list(box, world.peer(0), world.group)
    return box[0]


# ---- a KV cache sharded over ranks ---------------------------------------------------------------
# Keys and values stay on the rank that computed them (3,000 frames: 25 GB for Qwen2-7B). Queries travel, since a chunk
# is short and its past long ("pass-Q", arXiv 2411.01783); outputs come back, each with its log-sum-exp.

REPLICATED = 128  # tokens; so few are computed by every rank: reading the weights takes longer than using them


def join_o_lse(o_BTHK: Tensor, lse_BHT: Tensor) -> Tensor:
    """Output and log-sum-exp as one tensor to send: [B, T, H, K + 1] in fp32 (fp64 for fp64)."""
    return torch.cat([o_BTHK.to(lse_BHT.dtype), lse_BHT.transpose(1, 2).unsqueeze(-1)], dim=-1)


def attend_unmasked(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
    """Attention to keys that are all in the past, [B, T, H, K + 1] as `join_o_lse`; without keys lse is -inf.

    The Q queries that share a key head become its rows, so that a decode step reads each key once, not Q times.
    """
    if k_BSGK.shape[1] == 0:
        return F.pad(torch.zeros_like(q_BTHK, dtype=accumulate_dtype(q_BTHK)), (0, 1), value=-torch.inf)
    T, Q = q_BTHK.shape[1], q_BTHK.shape[2] // k_BSGK.shape[2]
    rows = q_BTHK.unflatten(2, (-1, Q)).transpose(2, 3).flatten(1, 2)
    part = join_o_lse(*block_attention(rows, k_BSGK, v_BSGK, False))
    return part.unflatten(1, (T, Q)).transpose(2, 3).flatten(2, 3)


class ShardedCache:
    """longva.KVCache with its keys and values on R ranks: the same interface, so the model knows of no rank.

    A *sharded* piece is computed in zigzag order, and each rank keeps the keys that it computed. A *replicated* one is
    computed by all ranks, which get the same bits, and kept by the rank that has fewest. All ranks make the same calls.
    """

    def __init__(self, lm: LMConfig, B: int, S: int, reference: Tensor, world: World):
        self.world, self.S = world, S
        self.sharded, self.lengths = False, (0,) * world.ranks  # tokens on each rank, which all ranks know
        room = math.ceil(S / world.ranks) + max(REPLICATED, 2 * world.ranks)  # lengths differ by one piece at most
        shape = lm.num_hidden_layers, B, room, lm.num_key_value_heads, lm.head_width
        self.k_LBSGK, self.v_LBSGK = (reference.new_empty(shape) for _ in range(2))

    @property
    def length(self) -> int:
        """Tokens in the cache, on all ranks together."""
        return sum(self.lengths)

    def pieces(self, T: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """Split T more tokens into slices of about `chunk`, each with the indices computed on this rank (int64).

        Sets `sharded` for `attend`. The last token is in a replicated piece, so that every rank has its hidden state.
        """
        assert self.length + T <= self.S, f"a cache for {self.S} tokens cannot hold {self.length + T}"
        even = 2 * self.world.ranks
        size = max(chunk // even, 1) * even
        sharded_tokens = (T - 1) // even * even if min(REPLICATED, chunk) < T else 0
        for start in range(0, sharded_tokens, size):
            self.sharded, stop = True, min(start + size, sharded_tokens)
            yield slice(start, stop), zigzag_index(stop - start, self.world)
        self.sharded = False
        yield slice(sharded_tokens, T), torch.arange(T - sharded_tokens, device=self.world.device)

    def past(self, layer: int, q_BTHK: Tensor) -> list[Tensor]:
        """Attention of our queries to each rank's share of the past: R parts as `join_o_lse`."""
        R, n = self.world.ranks, self.lengths[self.world.rank]
        k_BSGK, v_BSGK = self.k_LBSGK[layer, :, :n], self.v_LBSGK[layer, :, :n]
        if not self.sharded or R == 1:
            return all_gather(attend_unmasked(q_BTHK, k_BSGK, v_BSGK), self.world)
        parts = attend_unmasked(torch.cat(all_gather(q_BTHK, self.world), dim=1), k_BSGK, v_BSGK)
        sent = parts.unflatten(1, (R, -1)).movedim(1, 0).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.world.group)
        return [*received]

    def attend(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Attend to this piece, causally, and to all that came before it; keep the piece. No gradient."""
        T, rank, qkv = q_BTHK.shape[1], self.world.rank, (q_BTHK, k_BTGK, v_BTGK)
        within = ring_forward(*qkv, self.world) if self.sharded else block_attention(*qkv, True)
        parts = torch.stack([join_o_lse(*within), *(self.past(layer, q_BTHK) if self.length else ())])
        weights = parts[..., -1:].softmax(0)  # `merge` of all parts at once
        owner = self.lengths.index(min(self.lengths))
        lengths = tuple(n + T if self.sharded or r == owner else n for r, n in enumerate(self.lengths))
        if (old := self.lengths[rank]) < (new := lengths[rank]):
            self.k_LBSGK[layer, :, old:new], self.v_LBSGK[layer, :, old:new] = k_BTGK, v_BTGK
        if layer == len(self.k_LBSGK) - 1:
            self.lengths = lengths
        return (parts[..., :-1] * weights).sum(0).to(q_BTHK.dtype)


# ---- sharded parameters, saved state -------------------------------------------------------------


def shard_parameters(model: nn.Module, units: Iterable, world: World, offload=False, param_dtype=None) -> None:  # noqa: ANN001
    """Give each rank 1/R of every parameter, in place (FSDP2); a model on meta gets memory, its values unset.

    `units`: modules to gather one at a time, usually the layers. `offload`: keep parameters, gradients and optimizer
    state in CPU memory (Sec. 3.1). `param_dtype`, a torch.dtype or None: what to compute in; shards keep their dtype,
    and gradients are summed in fp32. One process that asks for neither keeps a plain model.
    """
    device = torch.device("cpu") if offload else world.device  # of the shards
    if offload and world.device.type == "cuda":  # torchrun allows one thread, and one CPU core would do all of AdamW
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if world.ranks == 1 and not offload and param_dtype is None:
        materialised: dict[nn.Parameter, nn.Parameter] = {}  # to_empty would give tied parameters two memories
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.is_meta and p not in materialised:
                    materialised[p] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                setattr(module, name, materialised.get(p, p))
        model.to(device)
        return
    if not dist.is_initialized():  # FSDP2 needs a group even of one process
        dist.init_process_group(BACKENDS[world.device.type], store=dist.HashStore(), rank=0, world_size=1)
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload_policy = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(world.device.type, (world.ranks,))
    for module in [*units, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload_policy)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=device)


@contextmanager
def no_grad_reshard(model: nn.Module) -> Iterator[None]:
    """Evaluate a model that is being trained: no gradients, and its gathered parameters are freed afterwards."""
    with torch.no_grad():
        yield
    if isinstance(model, FSDPModule):  # FSDP2 keeps the root gathered after forward, for a backward
        model.reshard()


def local_shard(x: Tensor) -> tuple[Tensor, int]:
    """The part of `x` on this rank, as memory to write to, and its first row's number in the whole."""
    x = x.detach()
    if not isinstance(x, DTensor):
        return x, 0
    per_rank = math.ceil(x.shape[0] / x.device_mesh.size())  # FSDP2 divides rows as torch.chunk does
    return x.to_local(), min(x.device_mesh.get_rank() * per_rank, x.shape[0])


def copy_shard(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a plain parameter, or this rank's rows into a sharded one; the dtype is converted."""
    assert parameter.shape == tensor.shape, f"{[*tensor.shape]} does not fit {[*parameter.shape]}"
    local, first = local_shard(parameter)
    local.copy_(tensor[first : first + len(local)] if isinstance(parameter, DTensor) else tensor)


def gather_parameters(model: nn.Module, world: World) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, whole tensor in CPU memory) to rank 0, tied parameters once. All ranks must call it.

    The other ranks give their rows here and get an empty stream; rank 0 must run through all of its own.
    """
    parameters = ((name, p.detach()) for name, p in model.named_parameters())
    stream = ((name, (p.full_tensor() if isinstance(p, DTensor) else p).cpu()) for name, p in parameters)
    for _ in stream if world.rank > 0 else ():
        pass
    return stream


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most `max_norm`; the norm before that is returned.

    Raises FloatingPointError, on all ranks alike, if the norm is not finite: call it before optimizer.step.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: stopped before it reached the parameters")
    for g in gradients if norm > max_norm else []:
        g.mul_(max_norm / norm)
    return norm


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, world: World) -> None:
    """Save parameters and optimizer moments as `folder`/step-N; the last two states are kept.

    All ranks call it, on one shared folder. Learning rates and batches are functions of the step, so not saved.
    """
    tensors = checkpoint.tensors(model, optimizer).items()
    mine = {key: local_shard(x)[0].cpu() for key, x in tensors if isinstance(x, DTensor) or world.rank == 0}
    checkpoint.save(Path(folder), step, mine, world.rank, partial(all_gather, world=world))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Load the newest intact state into `model` and `optimizer`; return its step, 0 if nothing was saved.

    All ranks call it once. Any number of ranks may have saved it; with the same number, training goes on bit for bit.
    """
    newest = checkpoint.newest(Path(folder), world.rank, partial(all_gather, world=world))
    return checkpoint.restore(newest, model, optimizer, copy_shard) if newest else 0
