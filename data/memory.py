"""The memory that an answer or a training step takes, by arithmetic, before anything is loaded.

What      `answer_terms` and `step_terms`: bytes per rank, one line a term, its formula beside it. `most_frames` and
          `longest`: what fits. `answer_table` and `step_table`: what --plan prints.
Paper     Sec. 3.1: 224,000 tokens on eight GPUs of 80 GB. Sec. 3.2 and Fig. 4: 3,000 frames of 144 tokens.
Run       python longva.py --plan --weights LongVA-7B --frames 3000 --device cuda
          python train_text.py --plan --preset longva --weights Qwen2-7B-Instruct --device cuda
Dimensions  D LM width   F MLP width   H query heads   G key/value heads   K head width   V vocabulary   L layers
          S tokens of the sequence   T tokens held here   R ranks   N frames   M tokens per frame   P patches per grid
          E CLIP width   b bytes per number in computation (training keeps shards, gradients and moments in 4)
Differs   The paper gives no such figures. Each is derived from the tensors alive at once, and tested against the peaks
          of processes and of an H100 (tests/test_data_memory.py). GPU_MARGIN names what is not counted.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from data.config import LMConfig, LongVAConfig, layer_parameters, parameters, root_parameters
from data.runs import free_bytes

GB = 10**9  # bytes
CHUNK = {"cpu": 2048, "cuda": 4608}  # tokens per prefill chunk, as longva.CHUNK
LOSS_CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once, as longva.LOSS_CHUNK
FRAMES = (8, 32, 128, 384, 1000, 3000)  # the paper's, from Table 4 to Fig. 4
CARDS = (24, 48, 80, 141)  # GB of usual GPUs
GPU_MARGIN = 2 * GB  # CUDA context, buffers of NCCL and cuBLAS, fragments: an allowance, not a measured figure
MOST = 10**9  # tokens: where a search ends
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
    exchange = (
        chunk * 16 * H * K if ranks > 1 else 0
    )  # all ranks' queries, regrouped; outputs, in fp32 with log-sum-exp
    scores = 2 * chunk * S * 4 * H if device == "cuda" and b == 4 else 0  # no fast kernel takes fp32
    return T * stream + max(T * mlp, T * attention + mask + exchange + scores)


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
    terms = {"weights": b * parameters(config), "cache": cache_bytes(lm, rows, b)}  # rows: see ring.ShardedCache
    if isinstance(config, LMConfig):
        return terms | {"prefill or vision": prefill_bytes(lm, S, b, chunk, ranks, device)}
    M = config.frame_tokens
    frames = -(-S // M)
    N = min(batch, frames)
    picture = 3 * config.vision.side**2 if device == "cpu" else 0  # decoded frames are in the same memory
    tokens = N * picture + ranks * N * M * lm.hidden_size * b  # visual tokens of all ranks, until the next are made
    waiting = min(2 * N, frames - N) * picture  # video.prefetch decodes ahead; at the last chunk none waits
    prefill = prefill_bytes(lm, S, b, min(chunk, N * M * ranks), ranks, device)
    return terms | {"prefill or vision": tokens + max(prefill, waiting + vision_bytes(config, N, b))}


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

    circle = property(lambda self: self.ring or self.ranks)  # ranks of a ring
    micro_batches = property(lambda self: self.grad_accumulation * self.circle // self.ranks)
    T = property(lambda self: self.batch * -(-self.seq_len // self.circle))
    b = property(lambda self: 2 if self.precision == "bf16" else 4)
    tiled = property(lambda self: 0 < self.mlp_tile < self.T // self.batch)
    sharded = property(lambda self: self.ranks > 1 or self.offload or self.b == 2)  # by FSDP2, see ring.py
    gpu = property(lambda self: self.device == "cuda")

    def __post_init__(self):
        if self.ranks % self.circle:
            raise ValueError(f"{self.ranks} rank(s) cannot form rings of {self.ring}; give a --ring that divides them")
        if self.grad_accumulation * self.circle % self.ranks:
            raise ValueError(f"--grad-accumulation {self.grad_accumulation} cannot be shared by all rings evenly")


def layer_bytes(step: Step) -> tuple[int, int, int]:
    """Bytes of a layer's T tokens: kept on the device until its backward, alive in it, and gradients beside these."""
    lm, b, T, R = step.lm, step.b, step.T, step.circle
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


def moments(step: Step) -> dict[str, dict[str, int]]:
    """Bytes on the device, by term, at each moment of the last micro-batch that may be the widest of a step."""
    lm, b, T, R, L = step.lm, step.b, step.T, step.ranks, step.lm.num_hidden_layers
    D, F, V = lm.hidden_size, lm.intermediate_size, lm.vocab_size
    layer, root, n = layer_parameters(lm), root_parameters(lm), -(-parameters(lm) // R)
    kept, alive, flow = layer_bytes(step)
    on_device = not (step.offload and step.gpu)
    more = step.micro_batches > 1  # then all gradients exist, from the micro-batch before
    inputs = 16 * T * step.micro_batches + 2 * b * lm.head_width * T // step.batch  # ids, targets; cosine, sine
    stream = 4 * root * (step.gpu and step.sharded)  # FSDP2 reduces on a second stream, whose memory serves no other

    def moment(made: int, gathered: int, activations: int, whole: int) -> dict[str, int]:
        shards = {"shards": 4 * n, "gradients": 4 * (n if more else made), "AdamW": 8 * n}
        rest = {"gathered": gathered * step.sharded, "activations": activations + inputs, "whole grads": whole}
        return {name: size * on_device for name, size in shards.items()} | rest | {"reduce stream": stream}

    around = b * (root + layer * min(R, 2))  # FSDP2 gathers the root, a layer and, with several ranks, the next
    head = b * V * D + b * layer + 4 * layer  # gradients of head and layer; of the layer after, in fp32
    first, last = (L - 1) * layer // R, 0  # gradients that are sharded already
    if not step.sharded:
        head, first, last = 4 * F * D * more, L * layer + V * D, layer + V * D
    logits = min(LOSS_CHUNK[step.device], T) * V * (4 if b == 4 else 2 * b + 4)  # bf16: also in fp32, and as p - y
    hidden = T * ((8 if b == 4 else 6) * D + 2 * b * D + 40)  # of the last norm; with a target, all, their gradient
    of_root = (b * root + 4 * root + 4 * root // R - stream) * step.sharded
    return {
        "loss": moment(0, around, L * kept + hidden + logits, V * D * (4 if b == 4 else 6)),
        "last layer": moment(last, around, (L - 1) * kept + alive + flow, head),
        "first layer": moment(first, around, alive + flow, head),
        "root": moment(n - root // R, 0, 0, of_root),
        "AdamW": moment(n, 0, 0, 0 if step.gpu else 8 * D * max(V, F) // R),  # two tensors of the largest shard
    }


def step_terms(step: Step) -> dict[str, int]:
    """Bytes on the device, by term, at the widest moment."""
    return max(moments(step).values(), key=lambda terms: sum(terms.values()))


def host_bytes(step: Step) -> int:
    """CPU memory of a rank that computes on a GPU, before PyTorch rounds pinned blocks up to powers of two."""
    states = 16 * parameters(step.lm) // step.ranks  # shards, their gradients, two moments
    kept = layer_bytes(replace(step, device="cpu"))[0] * step.lm.num_hidden_layers
    offloads = step.offload_activations and step.checkpointing != "none"
    return step.gpu * (states * step.offload + kept * offloads)


def most(unit: int, room: int, terms: Callable[[int], dict[str, int]]) -> int:
    """Largest multiple of `unit` tokens or frames whose `terms` fit in `room` bytes, by bisection."""
    return unit * bisect_right(range(unit, MOST, unit), room, key=lambda n: sum(terms(n).values()))


# ---- the tables of --plan ------------------------------------------------------------------------


def rooms(device: str, ranks: int) -> dict[str, int]:
    """Bytes that one rank may fill, by name: of usual GPUs, or its share of this machine's memory."""
    if device == "cuda":
        return {f"{size} GB": size * GB - GPU_MARGIN for size in CARDS}
    free = free_bytes(device, ranks)
    return {f"{free / GB:.1f} GB": free}


def block(ranks: int, rows: dict[str, dict[str, int]], notes: list[str]) -> list[str]:
    """Return the lines of one table: a column per term, their sum, and a note at the end of each row."""
    names = [*next(iter(rows.values())), "peak"]
    lines = ["", f"{f'{ranks} rank(s), GB each':24}" + "".join(f"{name:>18}" for name in names)]
    for (name, terms), note in zip(rows.items(), notes):
        sizes = [*terms.values(), sum(terms.values())]
        lines.append(f"{name:24}" + "".join(f"{size / GB:18.3f}" for size in sizes) + note)
    return lines


def answer_table(config: Model, frames: int, text: int, ranks: int, device: str, **sizes: Any) -> str:
    """Return the page of `longva.py --plan` for `frames` beside `text` tokens; sizes: b, chunk and batch."""
    M, unit = (config.frame_tokens, "frames") if isinstance(config, LongVAConfig) else (1, "tokens")
    page = [f"{parameters(config) / 1e6:,.1f} million parameters, {device}, {text:,} tokens of text"]
    for R in sorted({ranks, 8}):
        terms = lambda n, R=R: answer_terms(config, n * M + text, ranks=R, device=device, **sizes)  # noqa: E731
        counts = sorted({frames, *FRAMES})
        page += block(R, {f"{n:,} {unit}": terms(n) for n in counts}, [" *" * (n == frames) for n in counts])
        page += [f"at most {most(1, size, terms):,} {unit} in {name}" for name, size in rooms(device, R).items()]
    return "\n".join(page)


def step_table(step: Step) -> str:
    """Return the page of `train_text.py --plan`: the step as given, and with one setting changed at a time."""
    page = [f"{parameters(step.lm) / 1e6:,.1f} million parameters, {step.precision}, {step.seq_len:,} tokens"]
    changes = [*(("checkpointing", way) for way in ("none", "full", "selective")), ("mlp_tile", 1024), ("offload", 0)]
    for R in sorted({step.ranks, 8}):
        given, room = replace(step, ranks=R), rooms(step.device, R)
        ways = {"as given": given} | {f"{name} {value}": replace(given, **{name: value}) for name, value in changes}
        notes = []
        for way in ways.values():
            terms = lambda S, way=way: step_terms(replace(way, seq_len=S))  # noqa: E731
            longest = "".join(f"{most(2 * way.circle, size, terms):14,}" for size in room.values())
            notes.append(f"   host {host_bytes(way) / GB:8.1f}   longest{longest}")
        page += [*block(R, {name: step_terms(way) for name, way in ways.items()}, notes)]
        page.append(f"longest: tokens of a sequence that fits in {', '.join(room)}")
    return "\n".join(page)
