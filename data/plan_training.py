"""How much memory a training step takes, by arithmetic alone: per rank, before anything is loaded or made.

What      The tensors that are alive at each moment of a step which may be its widest (`moments`), what they come to on
          a GPU and in the memory of its machine (`needed`), the longest sequence that fits (`longest`), and the page
          that `train_text.py --plan` prints.
Paper     Sec. 3.1: 224,000 tokens on eight GPUs of 80 GB. The bytes are computed here.
Run       python train_text.py --preset longva --weights Qwen2-7B-Instruct --device cuda --plan
Key       D width   F MLP width   H query heads   G key/value heads   K head width   Q = H K   V vocabulary   L layers
          S tokens of a sequence   T tokens held by a rank   U tokens of a tile or chunk   R ranks
          b bytes of a number in computation; shards, their gradients and AdamW's moments always have 4
Deviates  The paper tells no such figures; each is derived where it stands, by counting the tensors that longva.py,
          ring.py, train_text.py and FSDP2 keep alive at once, and compared with the peak of processes
          (tests/test_data_plan_training.py). Not counted: what allocators keep for later, a CUDA context, NCCL's
          and cuBLAS's buffers (a few GB of a GPU: plan for less than it has), and reading and saving of weights.
"""

import os
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch

from data import plan
from data.config import LMConfig
from data.plan import CARDS, GB

CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits longva.nll holds at once, as longva.LOSS_CHUNK
MOST = 10**9  # tokens: nobody asks for more
TERMS = ("shards", "gradients", "AdamW", "gathered", "kept", "work")
HEAD = "  {:26}" + "".join(f"{name:>10}" for name in (*TERMS, "peak", "host")) + "   widest moment"


@dataclass(frozen=True)
class Step:
    """What decides how much memory a training step takes: a model, its ranks and the settings of train_text.py."""

    lm: LMConfig
    S: int  # tokens of a sequence
    B: int = 1  # sequences at once
    ranks: int = 8
    circle: int = 8  # ranks that share a sequence
    parts: int = 4  # of a step, for each ring
    b: int = 2
    remat: bool = True
    around: bool = False
    offload_activations: bool = True
    tile: int = 0
    offload: bool = True
    device: str = "cuda"

    @property
    def T(self) -> int:  # noqa: N802
        """Tokens held by a rank."""
        return self.B * -(-self.S // self.circle)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 is at work: one process that asks for nothing keeps a plain model (ring.shard_parameters)."""
        return self.ranks > 1 or self.offload or self.b == 2

    @property
    def away(self) -> bool:
        """Whether shards, gradients and moments lie in CPU memory while a GPU computes."""
        return self.offload and self.device == "cuda"

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """(D, F, Q, G K)."""
        lm, K = self.lm, self.lm.head_width
        return lm.hidden_size, lm.intermediate_size, lm.num_attention_heads * K, lm.num_key_value_heads * K


# ------------------------------------------------------------------------------------------------- parameters


def layer_shapes(lm: LMConfig) -> list[tuple[int, int]]:
    """(rows, columns) of each parameter of a layer; a vector is rows of 1."""
    D, F = lm.hidden_size, lm.intermediate_size
    q, kv = lm.num_attention_heads * lm.head_width, lm.num_key_value_heads * lm.head_width
    biases = [(q, 1), (kv, 1), (kv, 1)] if lm.attention_bias else []
    return [(q, D), (kv, D), (kv, D), (D, q), (F, D), (F, D), (D, F), (D, 1), (D, 1), *biases]


def root_shapes(lm: LMConfig) -> list[tuple[int, int]]:
    """The same of what stands around the layers: embedding and head, which may be one, and the norm."""
    return [(lm.vocab_size, lm.hidden_size)] * (1 if lm.tie_word_embeddings else 2) + [(lm.hidden_size, 1)]


def numbers(shapes: list[tuple[int, int]]) -> int:
    """How many numbers these parameters hold."""
    return sum(rows * columns for rows, columns in shapes)


def shards(step: Step, shapes: list[tuple[int, int]]) -> list[int]:
    """Numbers of each parameter on the first rank: FSDP2 deals rows out, rounded up."""
    return [-(-rows // step.ranks) * columns for rows, columns in shapes]


def all_shards(step: Step) -> list[int]:
    """Numbers of each parameter of the model on the first rank."""
    return shards(step, layer_shapes(step.lm)) * step.lm.num_hidden_layers + shards(step, root_shapes(step.lm))


# ------------------------------------------------------------------------------------- bytes per token of a layer


def norm_saved(step: Step) -> int:
    """What RMSNorm saves for backward beside its input, bytes per token: 8 D either way.

    float32: the normalised input and its product with the weight, which the projections read, 4 D each. bfloat16: the
    input in float32 (4 D), the normalised input (2 D) and the product (2 D).
    """
    return 8 * step.widths[0] + 4  # and one over the root mean square


def attention_saved(step: Step) -> int:
    """What ring.Ring saves: q, k, v, its answer, and the log-sum-exp in float32."""
    _, _, Q, GK = step.widths
    return step.b * (2 * Q + 2 * GK) + 4 * step.lm.num_attention_heads


def stream(step: Step) -> int:
    """A hidden state, bytes per token."""
    return step.b * step.widths[0]


def kept_on_device(step: Step) -> int:
    """What one layer leaves alive on the device until its backward, bytes per token.

    remat: its input. around: also q, k, v, attention's answer and log-sum-exp. With
    offload_activations a GPU keeps neither.
    Neither: all that its operations save: two norms, attention, gate, silu, up and their product (4 F; with tiles the
    MLP is computed again: its input is the norm's product), and in float32 also the input and the sum after
    attention, since the norms read them without a copy; in bfloat16 nobody reads them again.
    """
    if step.remat and step.offload_activations and step.device == "cuda":
        return 0
    if step.remat:
        return stream(step) + (attention_saved(step) if step.around else 0)
    mlp = 0 if tiled(step) else 4 * step.widths[1] * step.b
    return 2 * norm_saved(step) + attention_saved(step) + mlp + (2 * stream(step) if step.b == 4 else 0)


def tiled(step: Step) -> bool:
    """Whether the MLP takes its tokens tile by tile."""
    return 0 < step.tile < step.T // step.B


def recomputed(step: Step) -> int:
    """What a layer's backward begins with, bytes per token, beside what `kept_on_device` keeps of it: the rest.

    With around, what stands before attention is computed again only after attention's backward, so that the first
    norm never meets the widest moments. An input that was offloaded comes back.
    """
    if not step.remat:
        return 0
    back = 0 if kept_on_device(step) else stream(step) + (attention_saved(step) if step.around else 0)
    attention = 0 if step.around else norm_saved(step) + attention_saved(step)
    mlp = 0 if tiled(step) else 4 * step.widths[1] * step.b
    return back + attention + norm_saved(step) + mlp + (stream(step) if step.b == 4 else 0)


# ----------------------------------------------------------------------------------- the widest moments of a layer


def mlp_backward(step: Step) -> int:
    """Bytes beside what the layer saved, when the product of silu(gate) and up hands its gradient down.

    All along there is the gradient of the layer's output (D). The product itself is gone; its gradient and those of
    both factors are there: 2 F more than was saved. With tiles the gradients of all tiles' inputs (D), and of one tile
    these 6 F, or 5 F a moment before, when its gradient of a weight and the new sum lie beside the sum so far.
    """
    D, F, _, _ = step.widths
    if not tiled(step):
        return step.T * (stream(step) + 2 * F * step.b)
    tile = step.B * step.tile * F * step.b
    return step.T * 2 * stream(step) + max(6 * tile, 5 * tile + 2 * F * D * step.b)


def norm_backward(step: Step) -> int:
    """The same when the second norm's square hands its gradient down; the MLP's inner tensors are gone.

    In float32 the mean's gradient, the input's power, its double, and their product: 4 D. Beside it, what has come so
    far: in bfloat16 the gradient of the output (D) and, in float32, that through the normalised input; in float32 these
    are added already. What the norm saved, its input in float32 excepted, is gone.
    """
    D, F, _, _ = step.widths
    gone = (8 if step.b == 4 else 4) * D + (0 if tiled(step) else 4 * F * step.b)
    come = 4 * D if step.b == 4 else stream(step) + 4 * D
    return step.T * (come + 4 * 4 * D - gone)


def attention_backward(step: Step) -> int:
    """The same in ring.ring_backward; all that follows attention is gone, its gradient (D) waits at the sum.

    With the answer's gradient (Q), the widest of
      own keys       the sums of dq and of home's dk, dv in float32; K and V stacked, and the next, if any, under way;
                     dq, dk, dv; what the kernel takes for itself
      another's keys these sums; K and V, and the sum of dk, dv that follows them, both coming and going from three
                     ranks on; a block's dq, its dk, dv of half the keys; what the kernel takes
      the end        these sums and the last K, V; dk, dv as sent, as received, and added to home's; in bfloat16 also
                     all three as they are returned.
    The CUDA kernel adds dq up in float32 and makes dk and dv for each query head: 4 Q per query and 2 b Q per key.
    Without it (float32 on a GPU) five matrices of scores are there (ring.math_backward).
    """
    _, F, Q, GK = step.widths
    b, R, cuda = step.b, step.circle, step.device == "cuda"
    gone = norm_saved(step) + (stream(step) if b == 4 else 0) + (0 if tiled(step) else 4 * F * b)
    scores = 5 * 4 * step.lm.num_attention_heads * -(-step.S // R) if cuda and b == 4 else 0
    fast = cuda and b == 2
    own = b * (Q + 2 * GK) + b * 2 * GK * min(R, 2) + scores + (4 * Q + 2 * b * Q if fast else 0)
    summed = 4 * Q + 4 * 2 * GK
    travelling = (b * 2 * GK + 4 * 2 * GK) * (2 if R > 2 else 1)
    block = b * (Q + GK) + scores // 2 + (4 * Q + b * Q if fast else 0)
    last = b * 2 * GK + 3 * 4 * 2 * GK + (b * (Q + 2 * GK) if b == 2 else 0)
    widest = summed + max(own, max(travelling + block, last) if R > 1 else 0)
    return step.T * (stream(step) + b * Q + widest - gone)


WIDEST = {"MLP": mlp_backward, "norm": norm_backward, "attention": attention_backward}


def loss_backward(step: Step) -> int:
    """Bytes at the widest moment of longva.ChunkedNLL, whose forward makes the gradients; the kept layers left aside.

    Per token: what the last norm saved (in float32 its input and output, in bfloat16 its input in float32 and its
    output), the hidden states that have a target, all of them, and their gradient; indices, targets, weights and
    losses. Then the head's gradient in float32 (4 V D) and a chunk's logits; in bfloat16 these in float32 too, their
    part of the head's gradient, and the probabilities: those of the chunk before, while its successor's are made.
    """
    D, V, b, U = step.widths[0], step.lm.vocab_size, step.b, min(CHUNK[step.device], step.T)
    per_token = (8 if b == 4 else 6) * D + 2 * stream(step) + 2 * 8 + 8 + 8 + 4 + 4
    chunk = U * V * b if b == 4 else U * V * (b + 4 + b) + b * V * D
    return step.T * per_token + 4 * V * D + chunk


def tables(step: Step) -> int:
    """Bytes all along: cosines and sines of the positions, and ids and targets of all parts of the step."""
    return 2 * step.lm.head_width * step.b * (step.T // step.B) + 2 * 8 * step.T * step.parts


# ----------------------------------------------------------------------------------------------------- a step


def terms(step: Step, done: int, gradients: int = 0, gathered: int = 0, kept: int = 0, work: int = 0) -> dict[str, int]:
    """The bytes on a device at one moment, by TERMS; `done` shards have their gradient.

    What stays from part to part: shards, AdamW's two moments and, from the second part on, all gradients, 4 bytes
    each; of a GPU they are on the device only without offload. `gradients`: whole ones, before they are dealt out.
    """
    n = 0 if step.away else sum(all_shards(step))
    own = min(n, sum(all_shards(step)) if step.parts > 1 else done)
    return dict(zip(TERMS, (4 * n, 4 * own + gradients, 8 * n, gathered, kept, tables(step) + work)))


def layer_moments(step: Step, i: int) -> dict[str, dict[str, int]]:
    """Moments in the backward of layer i of L, counted from 1: those before it are still kept, those after are done.

    FSDP2 has gathered, in b bytes, the root (embedding, norm and head: it stays from its forward to the end) and the
    layer, and has begun to gather the layer before. Whole gradients, in b bytes: the head's, and those of the layer
    that are made by then (down alone at the MLP's widest; later gate and up, then o). The float32 buffer of the layer
    after, whose sum over the ranks is taken meanwhile, lives until this layer's is made.
    """
    (D, F, Q, _), b, L, V = step.widths, step.b, step.lm.num_hidden_layers, step.lm.vocab_size
    layer, root, b_if = numbers(layer_shapes(step.lm)), numbers(root_shapes(step.lm)), step.b * step.sharded
    done = sum(shards(step, layer_shapes(step.lm))) * (L - i) + (0 if step.sharded else V * D)
    kept, again = i * step.T * kept_on_device(step), step.T * recomputed(step)
    ahead = b_if * layer if step.ranks > 1 and i > 1 else 0
    gathered, buffer = b_if * (root + layer) + ahead, 4 * layer * step.sharded * (i < L)
    made = {"MLP": F * D, "norm": 3 * F * D, "attention": 3 * F * D + D * Q}
    if tiled(step):
        made["MLP"] = 3 * F * D
    found = {}
    for name, widest in WIDEST.items():
        grads = b_if * (V * D + made[name]) + buffer
        if not step.sharded:  # AdamW's own, or one that is about to be added to an earlier part's
            grads = 4 * (F * D if step.parts > 1 else made[name])
        found[f"{name} of layer {i}"] = terms(step, done, grads, gathered, kept, again + widest(step))
    if step.sharded:
        whole = b * (V * D + layer) + 4 * layer + 4 * layer // step.ranks
        gathered = b * root + ahead
        kept = kept - step.T * kept_on_device(step)
        found[f"gradients of layer {i}"] = terms(step, done, whole, gathered, kept, step.T * stream(step))
    return found


def moments(step: Step) -> dict[str, dict[str, int]]:
    """Bytes on a device at each moment of a step that may be its widest, the last one's parts all made.

    Forward holds less than the loss, which comes when all layers are kept, and a layer's own forward less than its
    backward, which holds as much again beside the gradients. From the second layer to the last but one all grows or
    shrinks evenly, so that the widest is one of these or of their neighbours.
    """
    D, b, V, L = step.widths[0], step.b, step.lm.vocab_size, step.lm.num_hidden_layers
    layer, root, n = numbers(layer_shapes(step.lm)), numbers(root_shapes(step.lm)), sum(all_shards(step))
    gathered = b * (root + layer * (step.ranks > 1)) if step.sharded else 0
    found = {"loss": terms(step, 0, 0, gathered, L * step.T * kept_on_device(step), loss_backward(step))}
    for i in sorted({1, min(2, L), max(L - 1, 1), L}):
        found |= layer_moments(step, i)
    if step.sharded:
        rest = n - sum(shards(step, root_shapes(step.lm)))
        whole = b * 2 * V * D + 4 * layer
        found["embedding"] = terms(step, rest, whole, b * root, 0, step.T * stream(step))
        found["gradients of the root"] = terms(step, rest, b * root + 4 * root + 4 * root // step.ranks)
    else:
        found["embedding"] = terms(step, n, 4 * V * D * (step.parts > 1), 0, 0, step.T * stream(step))
    found["AdamW"] = terms(step, n, work=0 if step.away else adamw(step))
    return found


def adamw(step: Step) -> int:
    """What AdamW takes beside its moments: two numbers of the largest shard on a CPU, one of all shards on a GPU."""
    sizes = all_shards(step)
    return 4 * sum(sizes) if step.device == "cuda" and not step.away else 2 * 4 * max(sizes)


def pinned(size: int) -> int:
    """Bytes that torch takes of the host for a pinned block: the next power of two (CachingHostAllocator)."""
    return 1 << (size - 1).bit_length() if size else 0


def host(step: Step) -> int:
    """Bytes of CPU memory for one rank whose device is a GPU; 0 on a CPU, where all is counted as the device's.

    With offload: shards and their gradients, each pinned, and AdamW's moments; fused, it takes nothing else. With
    offload_activations what remat keeps, pinned: a layer's input; with around it and attention's answer twice, as two
    computations need them, q, k, v and the log-sum-exp. And the step's ids and targets, whole.
    """
    if step.device != "cuda":
        return 0
    sizes, (D, _, Q, GK), b, T = all_shards(step), step.widths, step.b, step.T
    states = 2 * sum(pinned(4 * size) for size in sizes) + 8 * sum(sizes) if step.away else 0
    kept = [D] if not step.around else [D, D, Q, Q, Q, GK, GK]
    lse = pinned(4 * T * step.lm.num_attention_heads) if step.around else 0
    hidden = step.lm.num_hidden_layers * (sum(pinned(b * T * width) for width in kept) + lse)
    return states + (hidden if step.remat and step.offload_activations else 0) + 16 * step.B * step.S * step.parts


def widest(step: Step) -> tuple[str, dict[str, int]]:
    """The widest moment of a step: its name, and its bytes by TERMS."""
    return max(moments(step).items(), key=lambda moment: sum(moment[1].values()))


def fits(step: Step, room: int, host_room: int) -> bool:
    """Whether a step fits on devices of `room` bytes, all ranks on one machine of `host_room` bytes."""
    return sum(widest(step)[1].values()) <= room and host(step) * step.ranks <= host_room


def longest(step: Step, room: int, host_room: int) -> int:
    """The longest sequence that fits, a multiple of what can be dealt out evenly; 0 if none.

    A longer one never takes less, so that it is found by halving.
    """
    unit = 2 * step.circle if step.circle > 1 else 1
    lengths = range(unit, MOST, unit)
    return unit * bisect_left(lengths, True, key=lambda S: not fits(replace(step, S=S), room, host_room))


# ----------------------------------------------------------------------------------------------------- the page


def asked(lm: LMConfig, cfg: Any, ranks: int) -> Step:
    """The step that the settings of train_text.py ask for on so many ranks.

    Raises ValueError where they cannot form rings or share the parts, as the run itself would.
    """
    circle = cfg.ring or ranks
    if ranks % circle:
        raise ValueError(f"{ranks} rank(s) cannot form rings of {circle}; give a --ring that divides them")
    if cfg.grad_accumulation % (ranks // circle):
        raise ValueError(
            f"--grad-accumulation {cfg.grad_accumulation} parts cannot be dealt evenly to {ranks // circle} rings"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    sizes = {
        "S": cfg.seq_len,
        "B": cfg.batch,
        "ranks": ranks,
        "circle": circle,
        "b": 2 if cfg.precision == "bf16" else 4,
    }
    ideas = {"around": cfg.remat and cfg.around, "tile": cfg.mlp_tile, "offload": cfg.offload, "device": device}
    parts = cfg.grad_accumulation * circle // ranks
    return Step(lm, parts=parts, remat=cfg.remat, offload_activations=cfg.offload_activations, **sizes, **ideas)


def variants(step: Step) -> dict[str, Step]:
    """The step as asked for, and with one idea at a time turned round."""
    tile, turned = step.tile or 1024, {
        "recompute nothing": {"remat": False, "around": False},
        "hidden states on the GPU": {"offload_activations": False},
        "parameters on the GPU": {"offload": False},
    }  # fmt: skip
    if step.device == "cpu":
        del turned["hidden states on the GPU"], turned["parameters on the GPU"]
    if not step.remat:
        turned = {"recompute all (--remat)": {"remat": True}} | turned
        del turned["recompute nothing"]
    mlp = {f"MLP by tiles of {tile}": {"tile": tile}} if not step.tile else {"MLP without tiles": {"tile": 0}}
    around = {} if step.around or not step.remat else {"attention kept (--around)": {"around": True}}
    return {name: replace(step, **how) for name, how in ({"as asked": {}} | mlp | around | turned).items()}


def show(lm: LMConfig, cfg: Any) -> None:
    """Print the page, on the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(table(lm, cfg))


def table(lm: LMConfig, cfg: Any) -> str:
    """The page of `train_text.py --plan`, for its settings `cfg`. Raises ValueError as `asked` does."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    counts = sorted({ranks, 8} if not cfg.ring or 8 % cfg.ring == 0 else {ranks})
    steps = [asked(lm, cfg, R) for R in counts]
    device, host_room = steps[0].device, int(cfg.host_gb * GB) if cfg.host_gb else plan.room_bytes("cpu", 1)
    cards = [size * GB for size in CARDS] if device == "cuda" else []
    page = [
        f"{plan.lm_parameters(lm) / 1e6:,.1f} million parameters, {cfg.precision}, {device}; a step of {cfg.seq_len:,} "
        f"tokens; GB = 10^9 bytes, per rank; {host_room / GB:,.0f} GB of CPU memory for all ranks of a machine"
    ]
    for step in steps:
        page += ["", "1 rank" if step.ranks == 1 else f"{step.ranks} ranks, each", HEAD.format("")]
        for name, variant in variants(step).items():
            moment, sizes = widest(variant)
            bytes_ = [*sizes.values(), sum(sizes.values()), host(variant)]
            page.append(f"  {name:26}" + "".join(f"{size / GB:10.2f}" for size in bytes_) + f"   {moment}")
        heads = [f"{room / GB:.0f} GB" for room in cards or [host_room / step.ranks]]
        page += ["", f"  {'longest sequence, tokens':26}" + "".join(f"{head:>12}" for head in heads)]
        for name, variant in variants(step).items():
            most = [longest(variant, room, host_room) for room in cards or [host_room // step.ranks]]
            page.append(f"  {name:26}" + "".join(f"{S:12,}" for S in most))
    return "\n".join(page)
