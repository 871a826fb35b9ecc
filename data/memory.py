"""The memory that an answer or a training step takes, by arithmetic, before anything is loaded.

What      `answer_terms` and `step_terms`: bytes per rank, one line a term, its formula beside it.
          `most`: what fits. `show_answer` and `show_step`: what --plan prints.
Paper     Sec. 3.1: 224,000 tokens on eight GPUs of 80 GB. Sec. 3.2 and Fig. 4: 3,000 frames of 144 tokens.
Run       python longva.py --plan --weights LongVA-7B --frames 3000 --device cuda
          python train_text.py --plan --preset longva --weights Qwen2-7B-Instruct --device cuda
Dimensions  D LM width   F MLP width   H query heads   G key/value heads   K head width   V vocabulary   L layers
          S tokens of the sequence   T held here   R ranks   N frames   M tokens per frame   P patches   b bytes
Differs   The paper gives no such figures. Each is derived from the tensors alive at once, and tested against the peaks
          of processes and of an H100 (tests/test_data_memory.py). GPU_MARGIN names what is not counted.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

from data.config import LMConfig, LongVAConfig, layer_parameters, num_parameters, root_parameters
from data.flags import print0, world_size
from data.runs import free_bytes, pick_device

GB = 10**9  # bytes
CHUNK = {"cpu": 2048, "cuda": 4608}  # tokens per prefill chunk: a CPU needs a mask for them; on a GPU it is 32 frames
LOSS_CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once: 2048 of Qwen2-7B are 0.6 GB in bf16
FRAMES = (8, 32, 128, 384, 1000, 3000)  # the paper's, from Table 4 to Fig. 4
CARDS = (24, 48, 80, 141)  # GB of usual GPUs
GPU_MARGIN = 2 * GB  # CUDA context, buffers of NCCL and cuBLAS, fragments: an allowance, not a measured figure
CHANGES = [("checkpointing", how) for how in ("none", "full", "selective")] + [("mlp_tile", 1024), ("offload", False)]
Model = LMConfig | LongVAConfig

# ---- an answer -----------------------------------------------------------------------------------


def cache_bytes(lm: LMConfig, S: int, b: int) -> int:
    """A key and a value per token, layer and key/value head: 57,344 bytes per token of Qwen2-7B in bfloat16."""
    return 2 * lm.num_hidden_layers * lm.num_key_value_heads * lm.head_width * b * S


def prefill_bytes(lm: LMConfig, S: int, b: int, chunk: int, ranks: int, device: str) -> int:
    """Bytes alive at the widest moment of the last chunk of S tokens; each rank computes 1/R of a chunk."""
    D, F, H, K = lm.hidden_size, lm.intermediate_size, lm.num_attention_heads, lm.head_width
    chunk, later = min(chunk, S), chunk < S
    T = -(-chunk // ranks)
    stream = (3 + later) * b * D + 2 * 4 * K  # embedding, input, normalised, last output; cosine, sine
    mlp = b * (D + 3 * F)  # the sum after attention; silu(gate), up, their product
    attention = b * 4 * H * K  # q, k, v, output; or q, its swapped halves and two products
    mask = chunk * S * (1 + b) if device == "cpu" and ranks == 1 and later else 0  # as bools and as numbers
    exchange = chunk * 16 * H * K * (ranks > 1)  # queries of all ranks, regrouped; their outputs, also in fp32
    return T * stream + max(T * mlp, T * attention + mask + exchange)


def vision_bytes(config: LongVAConfig, N: int, b: int) -> int:
    """Bytes alive at the widest moment of CLIP and projector over N frames."""
    clip, D, P = config.vision, config.lm.hidden_size, config.vision.patches**2
    pixels = 3 * clip.side**2 * (1 + b)  # uint8, and normalised
    mlp = (P + 1) * b * 3 * (clip.hidden_size + clip.intermediate_size)  # input, sum, normalised; fc1, gate, product
    projector = P * b * (clip.hidden_size + 2 * D)  # features, and two layers of the language model's width
    return N * (pixels + max(mlp, projector))


def answer_terms(
    config: Model, S: int, b: int = 2, chunk: int | None = None, batch: int = 32, ranks: int = 1, device: str = "cuda"
) -> dict[str, int]:
    """Bytes per rank for S tokens in all: `batch` frames are encoded and `chunk` tokens prefilled at once."""
    chunk, rows = chunk or CHUNK[device], S if ranks == 1 else -(-S // ranks) + max(128, 2 * ranks)
    lm = config.lm if isinstance(config, LongVAConfig) else config
    terms = {"weights": b * num_parameters(config), "cache": cache_bytes(lm, rows, b)}  # rows: see ring.ShardedCache
    if isinstance(config, LMConfig):
        return terms | {"work": prefill_bytes(lm, S, b, chunk, ranks, device)}
    M = config.vision.tokens_per_grid
    frames = -(-S // M)
    N = min(batch, frames)
    picture = 3 * config.vision.side**2 if device == "cpu" else 0  # decoded frames are in the same memory
    tokens = N * picture + ranks * N * M * lm.hidden_size * b  # visual tokens of all ranks, until the next are made
    waiting = min(2 * N, frames - N) * picture  # video.prefetch decodes ahead; at the last chunk none waits
    prefill = prefill_bytes(lm, S, b, min(chunk, N * M * ranks), ranks, device)
    return terms | {"work": tokens + max(prefill, waiting + vision_bytes(config, N, b))}


# ---- a training step -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A model, its ranks, and the settings of train_text.py that decide a step's memory, under their names."""

    lm: LMConfig
    ranks: int = 8
    seq_len: int = 224_000
    batch: int = 1
    grad_accumulation: int = 4
    ring: int | None = None
    precision: str = "bf16"
    checkpointing: str = "full"
    offload_activations: bool = True
    mlp_tile: int = 0
    offload: bool = True
    device: str = "cuda"

    ring_size = property(lambda self: self.ring or self.ranks)  # ranks of a ring
    micro_batches = property(lambda self: self.grad_accumulation * self.ring_size // self.ranks)
    T = property(lambda self: self.batch * -(-self.seq_len // self.ring_size))
    b = property(lambda self: 2 if self.precision == "bf16" else 4)
    tiled = property(lambda self: 0 < self.mlp_tile < self.T // self.batch)
    sharded = property(lambda self: self.ranks > 1 or self.offload or self.b == 2)  # by FSDP2, see ring.py
    gpu = property(lambda self: self.device == "cuda")

    @classmethod
    def of(cls, lm: LMConfig, settings: object) -> "Step":
        """Take what has the same name in `settings`, a train_text.Config."""
        given = {field.name: getattr(settings, field.name) for field in fields(cls)[2:]}
        return cls(lm, world_size(), **given | {"device": pick_device(given["device"])})


def layer_bytes(step: Step) -> tuple[int, int, int]:
    """Bytes of a layer's T tokens: kept on the device until its backward, alive in it, and gradients beside these."""
    lm, b, T, R = step.lm, step.b, step.T, step.ring_size
    D, F, H = lm.hidden_size, lm.intermediate_size, lm.num_attention_heads
    HK, GK = H * lm.head_width, lm.num_key_value_heads * lm.head_width
    norm = 8 * D + 4  # normalised and scaled; bf16: and the input in fp32
    attention = b * (2 * HK + 2 * GK) + 4 * H  # q, k, v, output; log-sum-exp
    mlp = 0 if step.tiled else b * 4 * F  # gate, silu(gate), up, their product
    inputs = b * D * (2 if b == 4 else step.checkpointing != "none")  # of both norms; bf16: of the layer
    alive = (1 if step.checkpointing == "selective" else 2) * norm + attention + mlp + inputs
    kept = {"none": alive, "full": b * D, "selective": b * D + attention}[step.checkpointing]
    offloaded = step.checkpointing != "none" and step.offload_activations and step.gpu
    # Backward is widest in one of three places; what it has used up by then is subtracted.
    in_mlp = T * b * (D + 2 * F)  # of the output; of silu(gate) and up
    if step.tiled:  # of output and input; of a tile six tensors, or five beside a weight's gradient and its sum so far
        tile = step.batch * step.mlp_tile * F * b
        in_mlp = T * b * 2 * D + max(6 * tile, 5 * tile + 2 * F * D * b)
    in_norm = (12 if b == 4 else 18) * D - mlp  # four fp32 tensors of the mean square, and the gradient so far
    sums = (4 + b) * (HK + 2 * GK)  # dq, dk, dv in fp32, and one block's
    ring = 2 * GK * (b * min(R, 2) + (4 + b) * min(R - 1, 2))  # keys and values, the next; their gradients
    kernel = (4 + 2 * b) * HK if step.gpu else 0  # FlashAttention: dq in fp32; dk, dv per query head
    in_attention = b * (HK + D * (b == 2)) + sums + ring + kernel - 8 * D - mlp
    return 0 if offloaded else T * kept, T * alive, max(in_mlp, T * in_norm, T * in_attention)


def step_terms(step: Step) -> dict[str, int]:
    """Bytes on the device, by term, at the widest moment of a step's last micro-batch and update."""
    lm, b, T, R, L = step.lm, step.b, step.T, step.ranks, step.lm.num_hidden_layers
    D, F, V = lm.hidden_size, lm.intermediate_size, lm.vocab_size
    layer, root, n = layer_parameters(lm), root_parameters(lm), -(-num_parameters(lm) // R)
    kept, alive, flow = layer_bytes(step)
    on_device = not (step.offload and step.gpu)
    inputs = 16 * T * step.micro_batches + 2 * b * lm.head_width * T // step.batch  # ids, targets; cosine, sine
    stream = 4 * root * (step.gpu and step.sharded)  # FSDP2 reduces on a second stream, whose memory serves no other

    def moment(made: int, gathered: int, activations: int, whole: int) -> dict[str, int]:
        shards = {"shards": 4 * n, "gradients": 4 * (n if step.micro_batches > 1 else made), "AdamW": 8 * n}
        rest = {"gathered": gathered * step.sharded, "activations": activations + inputs, "whole grads": whole}
        return {name: size * on_device for name, size in shards.items()} | rest | {"reduce stream": stream}

    around = b * (root + layer * min(R, 2))  # FSDP2 gathers the root, a layer and, with several ranks, the next
    head = b * V * D + b * layer + 4 * layer  # gradients of head and layer; of the layer after, in fp32
    first, last = (L - 1) * layer // R, 0  # gradients that are sharded already
    if not step.sharded:
        head, first, last = 4 * F * D * (step.micro_batches > 1), L * layer + V * D, layer + V * D
    logits = min(LOSS_CHUNK[step.device], T) * V * (4 if b == 4 else 2 * b + 4)  # bf16: also in fp32, and as p - y
    hidden = T * ((8 if b == 4 else 6) * D + 2 * b * D + 40)  # of the last norm; with a target, all, their gradient
    candidates = [
        moment(0, around, L * kept + hidden + logits, V * D * (4 if b == 4 else 6)),  # loss: all layers are kept
        moment(last, around, (L - 1) * kept + alive + flow, head),  # backward of the last layer
        moment(first, around, alive + flow, head),  # backward of the first: most gradients are made
        moment(n - root // R, 0, 0, (b * root + 4 * root + 4 * root // R - stream) * step.sharded),  # end of backward
        moment(n, 0, 0, 0 if step.gpu else 8 * D * max(V, F) // R),  # AdamW; on a CPU twice the largest shard
    ]
    return max(candidates, key=lambda terms: sum(terms.values()))


def host_bytes(step: Step) -> int:
    """CPU memory of a rank that computes on a GPU, before PyTorch rounds pinned blocks up to powers of two."""
    states = 16 * num_parameters(step.lm) // step.ranks  # shards, their gradients, two moments
    kept = layer_bytes(replace(step, device="cpu"))[0] * step.lm.num_hidden_layers * (step.checkpointing != "none")
    return step.gpu * (states * step.offload + kept * step.offload_activations)


def most(unit: int, room: int, terms: Callable[[int], dict[str, int]]) -> int:
    """Largest multiple of `unit` tokens or frames whose `terms` fit in `room` bytes, by bisection up to 10^9."""
    return unit * bisect_right(range(unit, 10**9, unit), room, key=lambda n: sum(terms(n).values()))


def show(ranks: int, rows: dict[str, dict[str, int]]) -> None:
    """Print one table in GB: a column per term, and their sum."""
    print0(f"\n{f'{ranks} rank(s), GB each':24}", *(f"{name:>13}" for name in (*next(iter(rows.values())), "peak")))
    for name, terms in rows.items():
        print0(f"{name:24}", *(f"{size / GB:13.3f}" for size in (*terms.values(), sum(terms.values()))))


def fit(unit: int, device: str, ranks: int, terms: Callable[[int], dict[str, int]]) -> str:
    """Return what fits in each of CARDS, less GPU_MARGIN, or in a rank's share of this machine's memory."""
    rooms = [size * GB - GPU_MARGIN for size in CARDS] if device == "cuda" else [free_bytes(device, ranks)]
    return ", ".join(f"{most(unit, room, terms):,} in {room / GB:,.1f} GB" for room in rooms)


def show_answer(config: Model, frames: int, text: int, device: str, b: int | None = None) -> None:
    """Print memory for `frames` and for the paper's numbers, beside `text` tokens; b: None takes load's default."""
    device = pick_device(device)
    b = b or (2 if device == "cuda" else 4)
    M, unit = (config.vision.tokens_per_grid, "frames") if isinstance(config, LongVAConfig) else (1000, "k tokens")
    print0(f"{num_parameters(config) / 1e6:,.1f} M parameters, {device}, {text:,} tokens of text; GB = 10^9 bytes")
    for R in sorted({world_size(), 8}):
        terms = partial(lambda R, n: answer_terms(config, n * M + text, b, ranks=R, device=device), R)
        show(R, {f"{n:,} {unit}": terms(n) for n in sorted({frames, *FRAMES})})
        print0(f"most {unit}: {fit(1, device, R, terms)}")


def show_step(step: Step, of: object = "model") -> None:
    """Print memory for the step `of` a model, then with one setting changed at a time."""
    print0(f"{of}: {num_parameters(step.lm) / 1e6:,.1f} M parameters, {step.precision}, {step.device}; GB = 10^9 bytes")
    for R in [R for R in sorted({step.ranks, 8}) if R % (step.ring or R) == 0] or [step.ring]:
        ways = {"as given": replace(step, ranks=R)}
        ways |= {f"{key} {x}": replace(step, ranks=R, **{key: x}) for key, x in CHANGES if x != getattr(step, key)}
        show(R, {name: step_terms(way) for name, way in ways.items()})
        for name, way in ways.items():
            terms = partial(lambda way, S: step_terms(replace(way, seq_len=S)), way)
            longest = fit(2 * way.ring_size, step.device, R, terms)  # zigzag_index makes two chunks a rank
            print0(f"{name:24} {host_bytes(way) / GB:8.1f} GB a rank in CPU memory; longest sequence: {longest}")
