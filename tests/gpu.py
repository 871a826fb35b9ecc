"""Does everything that needs a GPU work on this one, and how fast is it?

What      Cases, each a few lines of a table: what, measured, expected, ok or not. Models are random, of the real
          width, made on the card; nothing is downloaded. Where transformers is installed it is measured beside.
Paper     The sizes are the paper's: Qwen2-7B and CLIP ViT-L/14, 224,000 tokens of text, 3,000 frames.
Run       python tests/gpu.py                               all cases, about 15 minutes on one card of 80 GB or more
          python tests/gpu.py --only kernels decode         some of them: the names are those of CASES
          python tests/gpu.py --json FILE                   also the rows as JSON
          python tests/gpu.py --dry                         toy sizes on the CPU: only shows that every case runs
Differs   NCCL takes one process per GPU, so that the ring's ranks are threads here, and a message is a queue.

Times are of one run after a warm-up, on a card that nothing else uses. Exit code 1 if a row is not ok.
"""

import argparse
import gc
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import longva
import ring
import train_vision
import unires
from clip import ClipVision
from data import llava, memory, synthetic, weights
from data.config import ClipConfig, LMConfig, LongVAConfig, to_dict, train_flop
from data.memory_saving import GradientSums

GB = 10**9
PEAK = 989e12  # FLOP/s in bf16 of an H100 or H200, without sparsity


@dataclass
class Row:
    """A line of the table; `ok` is None where there is nothing to expect."""

    case: str
    what: str
    measured: str
    expected: str = ""
    ok: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "ok", False: "NOT OK", None: ""}[self.ok]
        return f"{self.case:8} {self.what:62} {self.measured:>24}  {self.expected:28} {verdict}"


class Kit:
    """The table in the making, the device, and whether sizes are toys."""

    def __init__(self, dry: bool):
        self.dry, self.case, self.rows = dry, "", []
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.memory = 0 if dry else torch.cuda.get_device_properties(0).total_memory

    def row(self, what: str, measured: str, expected: str = "", ok: bool | None = None) -> None:
        """Add a line and print it. A dry run measures nothing: only finite errors can fail it."""
        self.rows.append(Row(self.case, what, measured, expected, ok))
        print(self.rows[-1], flush=True)

    def at_most(self, what: str, value: float, bound: float, unit: str = "") -> None:
        """A line whose figure has an upper bound."""
        self.row(what, f"{value:.4g} {unit}", f"<= {bound:g} {unit}", bool(value <= bound))

    def speed(self, what: str, value: float, bound: float, unit: str = "", least: bool = False) -> None:
        """The same of a time, or with `least` of a rate: not judged in a dry run."""
        good = value >= bound if least else value <= bound
        self.row(what, f"{value:.4g} {unit}", f"{'>=' if least else '<='} {bound:g} {unit}", None if self.dry else good)

    def planned(self, what: str, planned: float, reserved: float) -> None:
        """A line for the planner's figure, in GB."""
        ratio = planned / reserved
        self.row(what, f"{ratio:.3f}", "0.9 to 1.1", bool(0.9 <= ratio <= 1.1))

    def no_worse(self, what: str, ours: float, theirs: float, slack: float = 0.0) -> None:
        """A line for two errors, of which ours may be half as large again."""
        self.row(what, f"{ours:.1e}, {theirs:.1e}", "<= 1.5 times", bool(ours <= 1.5 * theirs + slack))

    def sync(self) -> None:
        """Wait for the card."""
        if not self.dry:
            torch.cuda.synchronize()

    def timed(self, f: Callable) -> tuple[Any, float]:
        """(result, seconds) of one call."""
        self.sync()
        began = time.perf_counter()
        result = f()
        self.sync()
        return result, time.perf_counter() - began

    def seconds(self, f: Callable) -> float:
        """Of one call."""
        return self.timed(f)[1]

    def clear(self) -> None:
        """Free what the last case left, and begin to count peaks."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> tuple[float, float]:
        """GB allocated and GB reserved, at most, since `clear`."""
        if self.dry:
            return 0.0, 0.0
        return torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB

    def noise(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype)

    def lm(self, layers: int) -> LMConfig:
        """Qwen2-7B with so many layers, or a toy."""
        if not self.dry:
            return LMConfig(num_hidden_layers=layers)
        sizes = {"vocab_size": 700, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": min(layers, 2)}
        return LMConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)

    def clip(self) -> ClipConfig:
        """CLIP ViT-L/14 at 336 pixels, or a toy."""
        return ClipConfig(32, 64, 2, 2, 14, 56) if self.dry else ClipConfig()

    def model(self, config: LMConfig | LongVAConfig, dtype: torch.dtype = torch.bfloat16) -> longva.LM:
        """A model with random weights, made on the device, to answer."""
        model = on_meta(longva.LongVA if isinstance(config, LongVAConfig) else longva.LM, config)
        model.to(dtype).to_empty(device=self.device).tie()
        randomise(model)
        return model.eval().requires_grad_(False)


def on_meta(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return kind(config)


def count_nan(model: nn.Module) -> int:
    """How many parameters are not finite."""
    return sum(not ring.local_shard(p)[0].isfinite().all() for p in model.parameters())


def randomise(model: nn.Module, device: torch.device | None = None) -> None:
    """Norms one, biases zero, the rest normal(0, 0.02); drawn on `device`, where the parameters are elsewhere."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            local = ring.local_shard(p)[0]
            if p.ndim == 1:
                local.fill_("norm" in name and name.endswith("weight"))
            else:
                drawn = torch.empty(local.shape, dtype=local.dtype, device=device or local.device)
                local.copy_(drawn.normal_(0, 0.02))


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest error, in units of the last place that bfloat16 has for the largest value."""
    want = want.double()
    if not got.isfinite().all():
        return math.inf
    last_place = 2.0 ** (math.floor(math.log2(want.abs().max().item())) - 7)
    return ((got.double() - want).abs().max() / last_place).item()


def usable_kernels(kit: Kit) -> list[str]:
    """Of ring.KERNELS, those that this machine can run in bf16."""
    if kit.dry:
        return ["cpu"]
    found = ["cuda"] + ["cudnn"] * (torch.cuda.get_device_capability() >= (9, 0))
    return found + ["flash_attn"] * (find_spec("flash_attn") is not None)


# ---- 1 kernels -----------------------------------------------------------------------------------


def kernels(kit: Kit) -> None:
    """Each kernel against the ten visible lines in fp32, at Qwen2-7B's heads, on slices of longer tensors."""
    H, G, K = (4, 2, 16) if kit.dry else (28, 4, 128)
    shapes = [(577, 577, True), (129, 129, True), (1, 577, False), (129, 577, False), (577, 129, False)]
    shapes += [(577, 1, False), (577, 192, False), (577, 640, False)]
    shapes = [(17, 17, True), (5, 13, False)] if kit.dry else shapes
    for kernel in usable_kernels(kit):
        worst = {"o": 0.0, "lse": 0.0, "dq": 0.0, "dk": 0.0, "dv": 0.0}
        for T, S, causal in shapes:
            if kernel == "cudnn" and S == 1:  # it takes no single key
                continue
            q, do = (kit.noise(2, T + 5, H, K)[:, 3 : 3 + T] for _ in range(2))
            k, v = (kit.noise(2, S + 5, G, K)[:, 2 : 2 + S] for _ in range(2))
            o, lse = ring.math_forward(q.float(), k.float(), v.float(), causal)
            fast_o, fast_lse = ring.block_attention(q, k, v, causal, kernel)
            found = {"o": ulps(fast_o, o), "lse": (fast_lse - lse).abs().max().item()}
            more = (lse, o) if causal else (lse + 0.5, o + 0.1)  # as if other blocks had been merged in
            lse, o = more[0], more[1].to(q.dtype)
            slow = ring.math_backward(*(x.float() for x in (do, q, k, v, o)), lse, causal)
            fast = ring.block_attention_backward(do, q, k, v, o, lse, causal, kernel)
            found |= {name: ulps(a, b) for name, a, b in zip(("dq", "dk", "dv"), fast, slow)}
            worst = {name: max(worst[name], found[name]) for name in worst}
        for name in ("o", "dq", "dk", "dv"):
            kit.at_most(f"{kernel}: {name}, worst of {len(shapes)} shapes, against math in fp32", worst[name], 2, "ulp")
        kit.at_most(f"{kernel}: log-sum-exp", worst["lse"], 1e-3)
    for kernel in usable_kernels(kit):
        extreme_lse(kit, kernel, H, G, K)
    cached_reading(kit, H, G, K)


def extreme_lse(kit: Kit, kernel: str, H: int, G: int, K: int) -> None:
    """Logits of about -100: where cuDNN's backward gives NaN for S = 64 (mod 128)."""
    cases = [(64, False)] if kit.dry else [(n, c) for n in (64, 129, 192, 200, 640) for c in (False, True)]
    worst, lost = 0.0, []
    for S, causal in cases:
        T = S if causal else 128
        q, do, k, v = (kit.noise(1, n, heads, K) for n, heads in ((T, H), (T, H), (S, G), (S, G)))
        q[..., 0], k[..., 0] = 10, -10 * math.sqrt(K)  # this one entry makes all logits small
        o, lse = ring.math_forward(q.float(), k.float(), v.float(), causal)
        slow = ring.math_backward(*(x.float() for x in (do, q, k, v, o)), lse, causal)
        fast = ring.block_attention_backward(do, q, k, v, o.to(q.dtype), lse, causal, kernel)
        whole = all(x.isfinite().all() for x in fast)  # the entry's own gradients are a difference of large numbers
        worst = max(worst, max(ulps(a[..., 1:], b[..., 1:]) for a, b in zip(fast, slow)) if whole else math.inf)
        if kernel == "cudnn" and S % 128 == 64:
            heads_first = [x.transpose(1, 2) for x in (do, q, k, v, o.to(q.dtype))]
            zeros = [torch.zeros((), dtype=torch.int64, device=kit.device) for _ in range(2)]
            raw = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
            rest = None, None, None, T, S, 0.0, causal
            nan = raw(*heads_first, lse.unsqueeze(-1).contiguous(), *zeros, *rest)[0].isnan().float().mean()
            lost.append(f"{nan:.2f} at {S}{', causal' * causal}")
    kit.at_most(f"{kernel}: gradients where lse is about -95, worst of {len(cases)} shapes", worst, 2, "ulp")
    if lost:
        kit.row("  without the guard: share of dq that is NaN", "; ".join(lost))


def cached_reading(kit: Kit, H: int, G: int, K: int) -> None:
    """longva.attend_to_past, by which a model with a cache reads: 1, 129 or 577 queries at the end of the keys."""
    worst = 0.0
    for T, S in [(3, 9)] if kit.dry else [(1, 577), (1, 4096), (129, 577), (577, 577), (577, 1024)]:
        q, k, v = kit.noise(2, T, H, K), kit.noise(2, S + 9, G, K)[:, :S], kit.noise(2, S + 9, G, K)[:, :S]
        whole = F.pad(q.float(), (0, 0, 0, 0, S - T, 0))  # queries before ours, whose answers are left out
        want = ring.math_forward(whole, k.float(), v.float(), True)[0][:, S - T :]
        worst = max(worst, ulps(longva.attend_to_past(q, k, v), want))
    kit.at_most("attention of a KV cache, T = 1, 129, 577", worst, 2, "ulp")


# ---- 2 ring --------------------------------------------------------------------------------------


@contextmanager
def virtual_ranks(R: int, device: torch.device) -> Iterator[Callable]:
    """A function that calls f(world) on R ranks, which are threads here, and returns their answers in order."""
    boxes = [queue.Queue() for _ in range(R)]

    class Hop:
        """As ring.SendRecv, through the next rank's queue."""

        def __init__(self, mine: Tensor, world: ring.World):
            self.box = boxes[world.rank]
            boxes[(world.rank + 1) % R].put(mine.clone())

        def wait(self) -> Tensor:
            return self.box.get(timeout=300)

    def on_all(f: Callable) -> list:
        return list(pool.map(f, [ring.World(r, R, device) for r in range(R)]))

    real = ring.SendRecv
    ring.SendRecv = Hop
    try:
        with ThreadPoolExecutor(R) as pool:
            yield on_all
    finally:
        ring.SendRecv = real


def full_ring(kit: Kit) -> None:
    """Zigzag ring attention at the paper's length, forward and backward, against one call and against fp64."""
    R, S, (H, G, K) = (4, 64, (4, 2, 16)) if kit.dry else (8, 224_000, (28, 4, 128))
    q, k, v, do = (kit.noise(1, S, heads, K) for heads in (H, G, G, H))
    rows = torch.linspace(0, S - 1, 16 if kit.dry else 64).long().to(kit.device)

    def exact_row(i: int) -> Tensor:
        """What query i attends to, in fp64."""
        return ring.math_forward(*(x.double() for x in (q[:, [i]], k[:, : i + 1], v[:, : i + 1])), False)[0]

    exact = torch.cat([exact_row(i) for i in rows.tolist()], dim=1)
    tflop = 4 * S * S / 2 * H * K / 1e12
    for kernel in usable_kernels(kit):
        ring.block_attention(q[:, :256], k[:, :256], v[:, :256], True, kernel)  # load it
        o, one = kit.timed(partial(ring.block_attention, q, k, v, True, kernel))
        alone, back = kit.timed(partial(ring.block_attention_backward, do, q, k, v, *o, True, kernel))
        kit.row(f"{kernel}: one call, {S:,} tokens: forward, backward", f"{one:.2f}, {back:.2f} s")
        kit.row(f"{kernel}: TFLOP/s forward, backward", f"{tflop / one:.0f}, {2.5 * tflop / back:.0f}")
        whole, all_forward, all_backward = all_ranks(kit, R, kernel, q, k, v, do)
        error = ulps(whole[0][:, rows], exact)
        kit.at_most(f"{kernel}: ring of {R}, o at {len(rows)} rows against fp64", error, 2, "ulp")
        for name, a, b in zip(("dq", "dk", "dv"), whole[1:], alone):
            kit.at_most(f"{kernel}: ring of {R}, {name} against one call", ulps(a, b), 4, "ulp")
        kit.speed(f"{kernel}: {R} ranks one after the other over one call: forward", all_forward / one, 1.25)
        kit.speed(f"{kernel}: the same, backward", all_backward / back, 1.25)
        del o, alone, whole
        kit.clear()


def all_ranks(kit: Kit, R: int, kernel: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple:
    """([o, dq, dk, dv] of all ranks, put in order; seconds of all ranks' forward, of their backward)."""
    shards = [ring.zigzag_index(q.shape[1], ring.World(r, R, kit.device)) for r in range(R)]

    def forward(world: ring.World) -> tuple[Tensor, Tensor]:
        o, lse = ring.ring_forward(*(x[:, shards[world.rank]] for x in (q, k, v)), world, kernel)
        return o.to(q.dtype), lse

    def backward(world: ring.World) -> tuple[Tensor, Tensor, Tensor]:
        local = (x[:, shards[world.rank]] for x in (do, q, k, v))
        return ring.ring_backward(*local, *saved[world.rank], world, kernel)

    with virtual_ranks(R, kit.device) as on_all:
        saved = on_all(forward)  # once for cuDNN, which plans for each shape in each thread
        on_all(backward)
        saved, there = kit.timed(lambda: on_all(forward))
        grads, back = kit.timed(lambda: on_all(backward))
    whole = [torch.empty_like(x) for x in (q, q, k, v)]
    for idx, (o, _), grad in zip(shards, saved, grads):
        for x, part in zip(whole, (o, *grad)):
            x[:, idx] = part
    return whole, there, back


# ---- 3 decode ------------------------------------------------------------------------------------


def theirs_like(model: longva.LM) -> nn.Module:
    """Transformers' Qwen2 with this model's weights, sharing their memory."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = model.model.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    sizes = {name: getattr(c, name) for name in names.split()}
    config = Qwen2Config(**sizes, max_position_embeddings=10**6, rope_theta=c.rope_theta, tie_word_embeddings=False)
    dtype = model.lm_head.weight.dtype
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config).to(model.device)
    return theirs.eval()


@torch.no_grad()
def decode(kit: Kit) -> None:
    """Time per token when a long past is in the cache; the past is random. Memory's rate is the floor."""
    model = kit.model(kit.lm(28))
    config, new = model.model.config, 4 if kit.dry else 20
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    lengths = [40] if kit.dry else [8_000, 131_000, 432_000]
    for S in lengths:
        cache = longva.KVCache(config, 1, S + 3 * new, model.lm_head.weight)
        for kv in cache.kv.unbind(1):  # layer by layer, as fp32 noise is twice as large
            kv.copy_(kit.noise(*kv.shape))
        x_1TD = model.embed(torch.zeros(1, 1, dtype=torch.int64, device=kit.device))

        def ours(n: int, cache: longva.KVCache = cache, S: int = S, x_1TD: Tensor = x_1TD) -> None:
            cache.length = S
            list(longva.generate(model, x_1TD, cache, [], n))

        ours(3)
        mine = kit.seconds(partial(ours, new)) / (new + 1)  # a last pass stores the last token
        read = weights + memory.cache_bytes(config, S, 2)
        rate = f"{1e3 * mine:.2f} ({read / mine / 1e12:.2f} TB/s)"
        kit.row(f"after {S:,} tokens: ms per token (weights and cache read at)", rate)
        kv = [cache.kv[:, layer, :, :S].transpose(2, 3) for layer in range(config.num_hidden_layers)]
        if not find_spec("transformers") or (S > lengths[0] and weights + 3 * read > 1.9 * kit.memory):
            kit.row(f"after {S:,} tokens: beside transformers", "left out", "needs it, and its memory")
            continue
        other = best_of_theirs(kit, model, kv, new)
        if S == lengths[0]:
            kit.speed(f"after {S:,} tokens: transformers' time over ours", other / mine, 1.5, least=True)
        else:
            kit.row(f"after {S:,} tokens: transformers' time over ours", f"{other / mine:.2f}")
        del cache, kv
        kit.clear()


def best_of_theirs(kit: Kit, model: longva.LM, kv: list, new: int) -> float:
    """Seconds per token of transformers with a growing cache, sdpa with cuDNN or without: the faster one."""
    from transformers import DynamicCache

    theirs, found = theirs_like(model), []
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        cache = DynamicCache()
        for layer, (k, v) in enumerate(kv):
            cache.update(k, v, layer)

        def step(n: int, cache: DynamicCache = cache) -> None:
            token = torch.zeros(1, 1, dtype=torch.int64, device=kit.device)
            for _ in range(n):
                token = theirs(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                token.item()  # as generate, which looks for the end

        step(3)
        found.append(kit.seconds(partial(step, new)) / new)
        del cache, step
        kit.clear()
    torch.backends.cuda.enable_cudnn_sdp(False)
    kit.row("transformers, ms per token without and with cuDNN", ", ".join(f"{1e3 * s:.2f}" for s in found))
    return min(found)


# ---- 4 film --------------------------------------------------------------------------------------


@torch.no_grad()
def film(kit: Kit) -> None:
    """A question about 3,000 frames: CLIP, projector, prefill, 16 tokens of answer. Decoding a video is left out."""
    config = LongVAConfig(kit.lm(28), kit.clip())
    model = kit.model(config)
    M, side = config.vision.tokens_per_grid, config.vision.side
    chunked_equals_whole(kit, model, 40 if kit.dry else 222 * M)
    kit.clear()
    frames = 6 if kit.dry else 3000
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)) for i in range(8)]
    S = frames * M + 64 + 16
    cache = longva.KVCache(config.lm, 1, S, model.lm_head.weight)

    def answer(frames: int) -> None:
        cache.length = 0
        stream = longva.video.prefetch((unires.frame(pictures[i % 8], side) for i in range(frames)), 64)
        ids = longva.prefill_prompt(model, [1, 2, longva.chat.IMAGE, 3], [longva.encode_video(model, stream)], cache)
        list(longva.generate(model, model.embed(torch.tensor([ids], device=kit.device)), cache, [], 16))

    answer(2)  # load the kernels
    kit.clear()
    seconds = kit.seconds(partial(answer, frames))
    allocated, reserved = kit.peaks()
    kit.speed(f"{frames:,} frames, {S:,} tokens, 16 of them the answer's", seconds, 130, "s")
    work = frames * M * (train_flop(config.lm, frames * M) / 3)
    kit.row("language model alone, TFLOP/s", f"{work / seconds / 1e12:.0f}")
    kit.speed("GB reserved", reserved, 80 * 2**30 / GB, "GB")
    kit.row("GB allocated", f"{allocated:.1f} GB")
    if not kit.dry:
        kit.row("segments of the allocator can grow", str(torch.cuda.memory_snapshot()[0].get("is_expandable")))
        kit.planned("planned over reserved", sum(memory.answer_terms(config, S).values()) / GB, reserved)


def chunked_equals_whole(kit: Kit, model: longva.LM, S: int) -> None:
    """Reading in chunks through the cache gives the logits of one pass over all."""
    x_1SD = kit.noise(1, S, model.model.config.hidden_size, scale=0.02)
    cache = longva.KVCache(model.model.config, 1, S, x_1SD)
    got = model.logits(longva.prefill(model, x_1SD, cache, 7 if kit.dry else None)[:, -1:])
    attend = ring.zigzag_attend(ring.World(0, 1, kit.device))
    h_1SD = model.model(x_1SD, torch.arange(S, device=kit.device), attend)
    want = model.logits(h_1SD[:, -1:])
    error = ((got - want).norm() / want.norm()).item()
    kit.at_most(f"logits after {S:,} tokens, in chunks against one pass: relative error", error, 0.03)


# ---- 5 training ----------------------------------------------------------------------------------


def step(kit: Kit) -> None:
    """A part of a training step, forward and backward: 28,000 tokens a rank, and 224,000 on one card."""
    kernels = usable_kernels(kit)[:2]
    tokens, long, tile = (64, 128, 32) if kit.dry else (28_000, 224_000, 28_000)
    ways = {}, {"offload_activations": False}, {"checkpointing": "selective"}
    run = Training(kit, 12, offload=False)  # AdamW's moments would not fit on 80 GB beside all this
    for kernel in kernels:
        for way in ways:
            name = run.measure(tokens, kernel, 2, **way)
    kit.row(f"  {name}: share of time the card is idle", f"{100 * run.idle_share():.1f} %")
    del run
    run = Training(kit, 4, offload=True)
    run.measure(tokens, kernels[-1], 2)
    kit.row("  share of time the card is idle", f"{100 * run.idle_share():.1f} %")
    run.aside = False
    run.measure(tokens, kernels[-1], 2)
    kit.row("  the same, gradients added by FSDP2", f"{100 * run.idle_share():.1f} %")
    run.aside = True
    for kernel in kernels:
        run.measure(long, kernel, 0, checkpointing="selective", mlp_tile=tile)
    run.update()


def whole(kit: Kit) -> None:
    """All 28 layers on one card with AdamW's moments: 16 bytes a parameter are 122 GB."""
    run, T, kernel = Training(kit, 28, offload=False), 64 if kit.dry else 28_000, usable_kernels(kit)[:2][-1]
    run.prepare(T, kernel)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses = [run.descend() for _ in range(4)]  # the first makes the moments
    run.measure(T, kernel, 1)  # as a second micro-batch, beside the gradients of the first
    kit.row("  AdamW on the card", f"{1e3 * kit.seconds(run.optimizer.step):.0f} ms")
    falls = all(a > b for a, b in pairwise(losses))
    kit.row("losses of four steps on one text", ", ".join(f"{x:.3f}" for x in losses), "fall", falls)
    kit.at_most("parameters that are NaN", count_nan(run.model), 0)


class Training:
    """A model with real layers, made to be trained, and one part of a step after the other."""

    def __init__(self, kit: Kit, layers: int, offload: bool):
        kit.clear()
        self.kit, self.offload, self.aside = kit, offload, True
        self.config, self.world = kit.lm(layers), ring.World(0, 1, kit.device)
        self.model = on_meta(longva.LM, self.config)
        ring.shard_parameters(self.model, self.model.model.layers, self.world, offload, torch.bfloat16)
        randomise(self.model, kit.device)
        self.gradients, self.optimizer = GradientSums(self.model), None

    def part(self) -> Tensor:
        """Forward and backward; the loss."""
        T = self.ids.shape[1] - 1
        attend = ring.zigzag_attend(self.world, self.kernel)
        pos_T = torch.arange(T, device=self.kit.device)
        loss = self.model(self.ids[:, :-1], pos_T, self.ids[:, 1:], attend)[0].sum().div(T)
        loss.backward()
        if self.offload and self.aside:
            self.gradients.take()
        return loss.detach()

    def descend(self) -> float:
        """A whole step; the loss before it."""
        loss = self.part()
        ring.clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def prepare(self, T: int, kernel: str, **settings: Any) -> memory.Step:
        """Draw a text and apply settings, those of memory.Step."""
        step = memory.Step(self.config, 1, T, grad_accumulation=2, offload=self.offload, **settings)
        self.kernel, self.model.model.checkpointing = kernel, step.checkpointing
        self.model.model.offload_activations = step.offload_activations
        for block in self.model.model.layers:
            block.mlp.tile = step.mlp_tile
        self.ids = torch.randint(self.config.vocab_size, (1, T + 1), device=self.kit.device)
        return step

    def measure(self, T: int, kernel: str, warm: int, **settings: Any) -> str:
        """Rows about one part, after `warm` others; settings: memory.Step's. Returns what they are, in words."""
        kit, step = self.kit, self.prepare(T, kernel, **settings)
        selective = step.checkpointing == "selective"
        for _ in range(warm):
            self.part()
        kit.clear()
        seconds = kit.seconds(self.part)
        allocated, reserved = kit.peaks()
        name = kernel + ", hidden states on the CPU" * step.offload_activations
        name += ", attention not recomputed" * selective
        name += f", MLP in tiles of {step.mlp_tile:,}" if step.mlp_tile else ""
        place = "on the CPU" if self.offload else "on the card"
        kit.row(f"{self.config.num_hidden_layers} layers {place}, {T:,} tokens, {name}", f"{T / seconds:,.0f} tokens/s")
        mfu = 100 * train_flop(self.config, T) * T / seconds / PEAK
        if selective and not self.offload:
            kit.speed("  MFU", mfu, 45 if kernel == "cudnn" else 35, "%", least=True)
        else:
            kit.row("  MFU", f"{mfu:.1f} %")
        if not kit.dry:
            sizes = memory.step_terms(step)
            planned = (sum(sizes.values()) - sizes["AdamW"] * (self.optimizer is None)) / GB
            kit.row("  GB allocated, reserved, planned", f"{allocated:.1f}, {reserved:.1f}, {planned:.1f}")
            kit.planned("  planned over reserved", planned, reserved)
        return name

    def idle_share(self) -> float:
        """Share of the time of a part in which no kernel runs on the card."""
        if self.kit.dry:
            self.part()
            return 0.0
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.part()
            self.kit.sync()
        spans = sorted(
            (e.time_range.start, e.time_range.end) for e in seen.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset"))
        )  # fmt: skip
        busy, end = 0.0, spans[0][0]
        for a, z in spans:
            busy += max(0.0, z - max(a, end))
            end = max(end, z)
        return 1 - busy / (end - spans[0][0])

    def update(self) -> None:
        """Rows about AdamW."""
        kit, threads = self.kit, torch.get_num_threads()
        self.gradients.put_back()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        n = sum(p.numel() for p in self.model.parameters()) / 1e9
        for name in ("first, which makes the moments", "next"):
            seconds = kit.seconds(optimizer.step)
            kit.row(f"AdamW on the CPU, {n:.1f}e9 numbers, {threads} threads: {name}", f"{seconds:.2f} s")
        status = Path("/proc/self/status").read_text().splitlines()
        host = float(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 / GB
        kit.row("GB of CPU memory, at most, so far", f"{host:.0f}")
        kit.at_most("parameters that are NaN", count_nan(self.model), 0)


# ---- 6 loss --------------------------------------------------------------------------------------


def loss(kit: Kit) -> None:
    """Head and cross-entropy by chunks: time, memory, and the error of the gradients against fp64."""
    N, V, D = (96, 300, 64) if kit.dry else (28_000, 152_064, 3584)
    h, head = kit.noise(1, N, D), kit.noise(V, D, scale=0.02)
    targets = torch.randint(V, (1, N), device=kit.device)

    def once(chunk: int, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (x.detach().requires_grad_() for x in (h[:, :n], head))
        total = longva.nll(a, b, targets[:, :n], chunk)[0].sum()
        total.backward()
        return total, a.grad, b.grad

    n, rows = min(N, 4096), 512  # rows of the head whose gradient is compared
    logits = h[0, :n].float() @ head.float().T
    p = logits.softmax(-1)
    p[torch.arange(n, device=kit.device), targets[0, :n]] -= 1
    want = p[:, :rows].double().T @ h[0, :n].double()
    del logits, p
    for chunk in [32] if kit.dry else [512, 2048, 4096]:
        once(chunk, n)
        kit.clear()
        seconds = kit.seconds(partial(once, chunk))
        least = 3 * 2 * N * V * D / PEAK
        kit.row(f"{N:,} tokens by {chunk}: seconds (arithmetic at the card's peak: {least:.3f})", f"{seconds:.3f} s")
        kit.row("  GB allocated", f"{kit.peaks()[0]:.1f}")
        kit.at_most("  gradient of the head against fp64", ulps(once(chunk, n)[2][:rows], want), 2, "ulp")


# ---- 7 vision ------------------------------------------------------------------------------------


def vision(kit: Kit) -> None:
    """A step of sft, all parameters on the card, on pictures of 1 to 49 grids; and how fast the CPU reads them."""
    config = LongVAConfig(kit.lm(4), kit.clip())
    world, side = ring.World(0, 1, kit.device), config.vision.side
    model = on_meta(longva.LongVA, config)
    model.model.checkpointing, model.tower.recompute = "full", True
    ring.shard_parameters(model, [*model.model.layers, *model.tower.encoder.layers], world, False, torch.bfloat16)
    randomise(model, kit.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for rows, cols in [(1, 1), (1, 2)] if kit.dry else [(1, 2), (2, 3), (4, 6), (7, 7)]:
        noise = np.random.default_rng(0).integers(0, 256, (rows * side, cols * side, 3), np.uint8)
        began = time.perf_counter()
        pixels, layout = longva.preprocess(Image.fromarray(noise), config)
        cpu = time.perf_counter() - began
        tokens = layout.tokens(config.vision.patches)
        ids = [5] * 20 + [longva.chat.IMAGE] * tokens + [6] * 60
        labels = [longva.chat.IGNORE] * (20 + tokens) + [6] * 60
        example = llava.Example(0, [(pixels, layout)], [(ids, labels)])
        batch = train_vision.collate([example], config, 0, world)

        def once(batch: train_vision.MicroBatch = batch) -> None:
            model(*batch.model_inputs)[0].sum().div(60).backward()
            ring.clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        kit.clear()
        first, then = kit.seconds(once), kit.seconds(once)
        name = f"{layout.grids} grids, {len(ids):,} tokens"
        kit.row(f"{name}: first step, next; CPU before it", f"{first:.2f}, {then:.2f}; {cpu:.2f} s")
        kit.row("  GB allocated, reserved", "{:.1f}, {:.1f}".format(*kit.peaks()))
    kit.at_most("parameters that are NaN after these steps", count_nan(model), 0)


# ---- 8 parity ------------------------------------------------------------------------------------


COMPARED = "logits", "loss", "gradient of q_proj", "gradient of down_proj", "gradient of the head"


def parity(kit: Kit) -> None:
    """Two layers of the real width, and CLIP, beside transformers: logits, loss and gradients."""
    if not find_spec("transformers"):
        kit.row("beside transformers", "left out", "needs it")
        return
    config, T = kit.lm(2), 32 if kit.dry else 1024
    ids = torch.randint(config.vocab_size, (1, T + 1), device=kit.device)
    exact = kit.model(config, torch.float32).requires_grad_()
    want, theirs = logits_and_grads(exact, ids), logits_and_grads(theirs_like(exact).requires_grad_(), ids)
    for name, a, b in zip(COMPARED, want, theirs):
        kit.at_most(f"fp32: {name}, relative difference", distance(a, b), 1e-4)
    half = kit.model(config)
    half.load_state_dict(exact.state_dict())
    half.requires_grad_()
    ours, theirs = logits_and_grads(half, ids), logits_and_grads(theirs_like(half).requires_grad_(), ids)
    for name, x, a, b in zip(COMPARED, want, ours, theirs):
        kit.no_worse(f"bf16: {name}, relative error, ours and theirs", distance(a, x), distance(b, x), 1e-5)
    del exact, half, ours, theirs, want
    kit.clear()
    clip_parity(kit)


def clip_parity(kit: Kit) -> None:
    """The vision encoder beside transformers'."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = kit.clip()
    tower = on_meta(ClipVision, config).to_empty(device=kit.device)
    randomise(tower)
    sizes = {name: getattr(config, name) for name in asdict(config) if name != "select_layer"}
    other = CLIPVisionModel(CLIPVisionConfig(**sizes)).to(kit.device).eval()
    state = {name.removeprefix("vision_model."): name for name in other.state_dict()}
    other.load_state_dict({state[name]: x for name, x in tower.state_dict().items()}, strict=False)
    pixels = kit.noise(2, 3, config.side, config.side, dtype=torch.float32)
    with torch.no_grad():
        want = other(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        kit.at_most("CLIP in fp32, relative difference", distance(tower(pixels), want), 1e-4)
        ours, pixels = tower.bfloat16()(pixels), pixels.bfloat16()
        theirs = other.bfloat16()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        name = "CLIP in bf16, relative error, ours and theirs"
        kit.no_worse(name, distance(ours, want), distance(theirs, want))


def logits_and_grads(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Logits of the last tokens, mean loss, and some gradients, of our model or of transformers'."""
    model.zero_grad()
    if isinstance(model, longva.LM):
        pos_T = torch.arange(ids.shape[1] - 1, device=ids.device)
        attend = ring.zigzag_attend(ring.World(0, 1, ids.device))
        with torch.no_grad():
            logits = model.logits(model.model(model.embed(ids[:, :-1]), pos_T, attend)[:, -16:])
        mean = model(ids[:, :-1], pos_T, ids[:, 1:], attend)[0].sum() / len(pos_T)
    else:
        logits = model(ids[:, :-1]).logits.float()
        mean = F.cross_entropy(logits[0], ids[0, 1:])
        logits = logits[:, -16:].detach()
    mean.backward()
    first, last = model.model.layers[0], model.model.layers[-1]
    learned = first.self_attn.q_proj, last.mlp.down_proj, model.lm_head
    return [logits, mean.detach(), *(layer.weight.grad for layer in learned)]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error in the root mean square."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- 9 commands ----------------------------------------------------------------------------------


def commands(kit: Kit) -> None:
    """The README's commands: needles, fifty steps of both trainings, and one of them killed and started again."""
    with tempfile.TemporaryDirectory() as folder:
        out, device, steps = Path(folder), f"--device {'cpu' if kit.dry else 'cuda'}", 6 if kit.dry else 50
        small = "--frames 8 --needle-count 2 --depths 0.5 --no-controls" if kit.dry else ""
        text = f"train_text.py --preset tiny-base --steps {steps} --save-every {steps // 3} {device}"
        jobs = {
            "python vniah.py": f"vniah.py {small} --out {out / 'needles'} {device}",
            f"{steps} steps of train_text.py": f"{text} --out {out / 'text'}",
            f"{steps} steps of data/tiny/make.py": f"-m data.tiny.make tower --steps {steps} --out {out / 'tower'} {device}",
        }
        began = time.perf_counter()
        running = {name: start(words, out / f"{n}.txt") for n, (name, words) in enumerate(jobs.items())}
        killed_and_resumed(kit, f"{text} --out {out / 'killed'}", out, steps)
        for n, (name, job) in enumerate(running.items()):
            code, spent = job.wait(timeout=500), time.perf_counter() - began
            kit.row(f"{name}: exit code, and seconds, all at once", f"{code}, {spent:.0f} s", "0", code == 0)
            if code:
                print((out / f"{n}.txt").read_text()[-2000:])
        compare_logs(kit, out)
        cells = json.loads((out / "needles" / "results.json").read_text())["cells"]
        for system in dict.fromkeys(cell["system"] for cell in cells):
            mine = [cell for cell in cells if cell["system"] == system and "trial" not in system]
            if mine and not kit.dry:
                found = sum(cell["found"] for cell in mine) / sum(cell["of"] for cell in mine)
                kit.row(f"needles found: {system}", f"{found:.3f}")


def start(words: str, log: Path) -> subprocess.Popen:
    """A command, its output in a file."""
    command = [sys.executable, *words.split()]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT)


def killed_and_resumed(kit: Kit, words: str, out: Path, steps: int) -> None:
    """Kill a run in its second half, and start it again."""
    job, log = start(words, out / "killed.txt"), out / "killed" / "log.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and job.poll() is None:
        if log.exists() and log.read_text().count("\n") > steps // 2:
            break
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGKILL)
    job.wait()
    code = start(words, out / "resumed.txt").wait(timeout=300)
    kit.row("killed and started again: exit code", f"{code}", "0", code == 0)


def compare_logs(kit: Kit, out: Path) -> None:
    """Losses of the run that was killed beside those of the run that was not."""
    logs = [(out / name / "log.jsonl").read_text().splitlines() for name in ("text", "killed")]
    a, b = ([json.loads(line)["loss"] for line in log] for log in logs)
    worst = max(abs(x - y) / x for x, y in zip(a, b)) if len(a) == len(b) else math.inf
    kit.at_most("killed and started again: losses against the undisturbed run", worst, 0 if kit.dry else 1e-3)


# ---- 10 pipeline ---------------------------------------------------------------------------------


SPEEDS = "tokens_per_s", "samples_per_s", "mfu", "gb"  # of log.jsonl


def pipeline(kit: Kit) -> None:
    """The paper's commands from text to needles: two layers of the real width, a smaller vocabulary, random weights."""
    with tempfile.TemporaryDirectory() as folder:
        out, tokens = Path(folder), 64 if kit.dry else 28_000
        write_inputs(kit, out, tokens)
        torchrun = "-m torch.distributed.run --nproc-per-node 1"
        device = f"--device {kit.device.type}"
        vision = f"{torchrun} train_vision.py --preset longva {device} --steps 2 --batch 8 --data {out}/data.json --images {out}/pictures"
        commands = {
            "pack": f"-m data.pack {out / 'texts'} --tokenizer {out / 'lm'} --out {out / 'tokens.npy'} --keep-short 1",
            "text": f"{torchrun} train_text.py --preset longva {device} --weights {out / 'lm'} --corpus {out / 'tokens.npy'} "
            f"--seq-len {tokens} --grad-accumulation 2 --steps 2 --peak-tflop 989 --out {out / 'text'}",
            "align": f"{vision} --stage align --weights {out / 'text/model'} --tower {out / 'clip'} --out {out / 'align'}",
            "sft": f"{vision} --stage sft --weights {out / 'align/model'} --out {out / 'sft'}",
            "needles": f"vniah.py --protocol paper {device} --weights {out / 'sft/model'} --haystack {out / 'pictures'} "
            f"--needles data/needles --frames 16 --depths 0.5 --out {out / 'needles'}",
            "question": f"longva.py Why? {device} --weights {out / 'sft/model'} --video {out / 'pictures'} --frames 8",
        }
        for name, words in commands.items():
            job, began = start(words, out / f"{name}.txt"), time.perf_counter()
            try:
                code, spent = job.wait(timeout=300), time.perf_counter() - began
            finally:
                job.kill()  # if it takes longer, it shall not go on beside the cases that follow
            kit.row(f"{name}: exit code, and seconds in all", f"{code}, {spent:.0f} s", "0", code == 0)
            if code:
                print((out / f"{name}.txt").read_text()[-3000:])
                return
            if (log := out / name / "log.jsonl").exists():
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                kit.row("  loss of each step", ", ".join(f"{line['loss']:.3f}" for line in lines))
                speed = {key: lines[-1][key] for key in SPEEDS if key in lines[-1]}
                kit.row("  of the last step", ", ".join(f"{key} {x:,.2f}" for key, x in speed.items()))
                shutil.rmtree(out / name / "state")  # 12 bytes a parameter


def write_inputs(kit: Kit, out: Path, tokens: int) -> None:
    """Folders with a language model, a CLIP, texts, and LLaVA-style records with their pictures."""
    names, rng = synthetic.lexicon(), np.random.default_rng(0)
    lm = kit.lm(2) if kit.dry else replace(kit.lm(2), vocab_size=32_000)  # states of 8 GB instead of 19
    for kind, config, name in ((longva.LM, lm, "lm"), (ClipVision, kit.clip(), "clip")):
        model = on_meta(kind, config).to(torch.bfloat16).to_empty(device=kit.device)
        randomise(model)
        prefix = "vision_model." * (name == "clip")
        sizes = {"model_type": "clip_vision_model"} | asdict(config) if prefix else to_dict(config)
        weights.write(out / name, ((prefix + key, x.cpu()) for key, x in model.state_dict().items()), sizes)
    weights.copy_tokenizer(synthetic.TOKENIZER, out / "lm")
    for folder in ("texts", "pictures"):
        (out / folder).mkdir()
    for i in range(8):
        (out / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(names, tokens)))
    records = []
    for i in range(16):
        noise = rng.integers(0, 256, (*rng.integers(40, 100 if kit.dry else 1500, 2), 3), np.uint8)
        Image.fromarray(noise).save(out / "pictures" / f"{i:02}.png")
        said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise and no more."}]
        records.append({"id": str(i), "image": f"{i:02}.png", "conversations": said})
    (out / "data.json").write_text(json.dumps(records))


# ---- main ----------------------------------------------------------------------------------------

NEEDS = {"ring": 20, "loss": 14, "decode": 45, "vision": 54, "step": 56, "film": 46, "whole": 142, "pipeline": 40}  # GB
CASES = {
    "kernels": kernels, "ring": full_ring, "loss": loss, "parity": parity, "commands": commands, "decode": decode,
    "vision": vision, "step": step, "film": film, "pipeline": pipeline, "whole": whole,
}  # fmt: skip


def run_case(kit: Kit, name: str) -> None:
    """One case; a mistake in it is a row, and the others go on."""
    kit.case = name
    if not kit.dry and kit.memory < NEEDS.get(name, 0) * GB:
        kit.row("left out", f"{kit.memory / GB:.0f} GB", f"needs {NEEDS[name]} GB")
        return
    kit.clear()
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        CASES[name](kit)
    except Exception as error:  # noqa: BLE001  (a card's time is too dear to stop at the first)
        import traceback

        traceback.print_exc()
        kit.row("stopped", type(error).__name__, str(error).split("\n")[0][:100], False)
    print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Run the cases and print the table once more, ready for tests/README.md."""
    parser = argparse.ArgumentParser(description="Acceptance on a GPU.")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    asked = parser.parse_args()
    if not asked.dry and not torch.cuda.is_available():  # this does not start CUDA
        sys.exit("no CUDA GPU is here; --dry runs every case at toy size on the CPU")
    ring.set_cuda_defaults()
    kit = Kit(asked.dry)
    name = "CPU, toy sizes" if kit.dry else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for case in asked.only:
        run_case(kit, case)
    if dist.is_initialized():
        dist.destroy_process_group()
    print(f"\n| case | {name}, torch {torch.__version__} | measured | expected | |\n|---|---|--:|---|---|")
    for row in kit.rows:
        verdict = {True: "ok", False: "**not ok**", None: ""}[row.ok]
        print(f"| {row.case} | {row.what} | {row.measured} | {row.expected} | {verdict} |")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in kit.rows], indent=1) + "\n")
    sys.exit(any(row.ok is False for row in kit.rows))


if __name__ == "__main__":
    main()
