"""How much memory an answer takes, by arithmetic alone: for N frames on R ranks, before anything is loaded.

What      Weights, cache, reading and vision in bytes per rank (`memory`), what they come to at the worst moment
          (`peak`), the most frames that fit (`most_frames`), and the page that `longva.py --plan` prints.
Paper     Sec. 3.2: a frame is 144 tokens; Fig. 4 shows 3,000 frames. The bytes are computed here.
Run       python longva.py --plan --weights LongVA-7B --frames 3000 --device cuda
Key       D width   F MLP width   H query heads   G key/value heads   K head width   V vocabulary   L layers
          N frames = grids   P patches per grid (576)   M tokens per frame (144)   E, I CLIP's widths
          U tokens of a chunk   S tokens in all   R ranks   b bytes of a number
Deviates  The paper tells no such figures; each is derived where it stands, by counting the tensors that are
          alive at once, and compared with the peak of a process (tests/test_data_plan.py). Not counted is what
          allocators keep for later: a CUDA GPU's cache, and glibc's freed blocks of less than 32 MB, which
          for models far smaller than the paper's can be half as much again.
"""

import os
import resource
import sys
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch

from data import video
from data.config import LMConfig, LongVAConfig

GB = 10**9  # bytes
PROMPT = 64  # tokens around a question, about
CHAT = 4096  # tokens of room for a chat
FRAMES = (8, 32, 128, 384, 1000, 3000)  # the paper's, from Table 4 to Fig. 4
CHUNK = {"cpu": 2048, "cuda": 4608}  # tokens read at once, as longva.CHUNK
TOKENS = (8_192, 32_768, 131_072, 229_376, 1_048_576)
CARDS = (24, 48, 80, 141)  # GB of usual GPUs
PROCESS = 350_000_000  # bytes of Python and torch themselves, on a CPU
MOST = 10**7  # frames: nobody asks for more
HEAD = "  {:>9}   weights     cache   reading    vision      peak"
Model = LMConfig | LongVAConfig


# ------------------------------------------------------------------------------------------------- parameters


def lm_parameters(lm: LMConfig) -> int:
    """How many numbers the language model has.

    A layer: two norms; q, k, v (with biases, if any) and o; gate, up and down. Around all: embedding, norm and
    head, which may be the embedding again.
    """
    D, F, K = lm.hidden_size, lm.intermediate_size, lm.head_width
    q, kv = lm.num_attention_heads * K, 2 * lm.num_key_value_heads * K
    layer = 2 * D + (D + lm.attention_bias) * (q + kv) + q * D + 3 * D * F
    return lm.num_hidden_layers * layer + D + (1 if lm.tie_word_embeddings else 2) * lm.vocab_size * D


def eye_parameters(config: LongVAConfig) -> int:
    """How many numbers see: the tower with its unused last block, the projector, and AnyRes's newline.

    A block: two LayerNorms, four attention maps and two MLP maps, all with biases. Around them: class token,
    patch map (no bias), positions, two LayerNorms.
    """
    eye, D = config.vision, config.lm.hidden_size
    E, width = eye.hidden_size, eye.intermediate_size
    block = 4 * E + 4 * (E * E + E) + (2 * E * width + width + E)
    tower = E + 3 * eye.patch_size**2 * E + (eye.patches**2 + 1) * E + 4 * E + eye.num_hidden_layers * block
    return tower + (E * D + D) + (D * D + D) + (D if config.scheme == "anyres" else 0)


def parameters(config: Model) -> int:
    """How many numbers a model has; every rank holds all of them."""
    return lm_parameters(language(config)) + (eye_parameters(config) if isinstance(config, LongVAConfig) else 0)


def language(config: Model) -> LMConfig:
    """The language model's part of a config."""
    return config.lm if isinstance(config, LongVAConfig) else config


def frame_tokens(config: Model) -> int:
    """M, the tokens of a frame: its patches pooled 2x2 (Sec. 3.2). A language model counts in tokens: 1."""
    return config.vision.tokens_per_grid if isinstance(config, LongVAConfig) else 1


def train_flop(lm: LMConfig, S: int) -> float:
    """Floating-point operations per token of a training step on S tokens: what a utilisation (MFU) counts.

    Forward, each weight multiplies and adds once (the embedding only looks up), and a token attends to S / 2 others
    on average: logits and answer, 2 operations each, per layer and number of all heads. Backward is twice that.
    Computing again in backward is work, but no use: it does not count. Qwen2-7B at 224,000 tokens: 177 GFLOP.
    """
    looked_up = 0 if lm.tie_word_embeddings else lm.vocab_size * lm.hidden_size
    attention = 2 * S * lm.num_attention_heads * lm.head_width * lm.num_hidden_layers
    return 3 * (2 * (lm_parameters(lm) - looked_up) + attention)


# ------------------------------------------------------------------------------------- bytes, a term at a time


def cache_bytes(lm: LMConfig, S: int, b: int) -> int:
    """A key and a value per token, layer and key/value head: 57,344 bytes per token of Qwen2-7B in bfloat16."""
    return 2 * lm.num_hidden_layers * lm.num_key_value_heads * lm.head_width * b * S


def reading_bytes(lm: LMConfig, S: int, b: int, chunk: int, ranks: int, device: str) -> int:
    """What is alive at the widest moment of reading the last chunk of S tokens (longva.prefill).

    All along there are per token: the embedding, the layer's input and what follows from it, normalised, the last
    chunk's answer if there was one (4 D, or 5), and a cosine and a sine (K, float32). On top comes the larger of
      MLP        the sum after attention is what its norm read (1 D less to attend); silu(gate), up, product: 3 F
      rotation   of q: itself, times cosine, its halves swapped, those times sine: 4 HK; of k: HK + 4 GK
      attention  q, k, v and the answer: 2 HK + 2 GK; a CPU also makes the causal mask of a chunk of one process,
                 first as bools, then as numbers: 1 + b bytes for each of the chunk's tokens and all S.
    Each rank reads U / R of a chunk. Attending to the cache, it answers the queries of all ranks: these, side by
    side and regrouped, their answer, that in float32 and beside its log-sum-exp: at most 16 bytes per number.
    """
    D, F, K = lm.hidden_size, lm.intermediate_size, lm.head_width
    H, G = lm.num_attention_heads * K, lm.num_key_value_heads * K
    U, more = min(chunk, S), chunk < S
    mask = U * S * (1 + b) if device == "cpu" and ranks == 1 and more else 0
    exchange = U * 16 * H if ranks > 1 else 0
    mine = -(-U // ranks)
    if device == "cuda" and b == 4:  # no fast kernel takes float32 and grouped heads: scores of all, twice
        mask = 2 * U * S * 4 * lm.num_attention_heads
    widest = max(mine * b * (D + 3 * F), mine * b * max(4 * H, H + 4 * G), mine * b * (2 * H + 2 * G) + mask + exchange)
    return mine * (b * (3 + more) * D + 2 * 4 * K) + widest


def vision_bytes(config: LongVAConfig, N: int, b: int) -> int:
    """What is alive at the widest moment of seeing N frames at once (longva.encode_video and LongVA.encode_images).

    The frames are uint8, and in the numbers of the model. On top comes the widest of
      MLP        per place, the class token's too: a block's input, its sum after attention, normalised: 3 E;
                 and fc1, its gate, their product: 3 I
      attention  per place: the block's input, normalised, q, k, v, the answer, mapped: 7 E
      projector  per patch: features and two layers of the language model's width: E + 2 D
    """
    eye, D = config.vision, config.lm.hidden_size
    P, E, width = eye.patches**2, eye.hidden_size, eye.intermediate_size
    widest = max((P + 1) * (3 * E + 3 * width), (P + 1) * 7 * E, P * (E + 2 * D))
    return N * (3 * eye.side**2 * (1 + b) + b * widest)


def memory(
    config: Model, S: int, b: int = 2, chunk: int | None = None, batch: int = 32, ranks: int = 1, device: str = "cuda"
) -> dict[str, int]:
    """Bytes on each rank for S tokens in all, by what they are for; b bytes per number, `device` cpu or cuda.

    N frames are seen at once. Their tokens stay until the next have been seen, with R ranks those of all. On a CPU
    their pixels stay, too, and 2 N frames wait (video.prefetch);
    reading needs most at the end of a film, when none waits.
    """
    chunk = chunk or CHUNK[device]
    lm, rows = language(config), S if ranks == 1 else -(-S // ranks) + max(128, 2 * ranks)  # ring.ShardedCache
    terms = {"weights": b * parameters(config), "cache": cache_bytes(lm, rows, b)}
    if isinstance(config, LMConfig):
        return terms | {"reading": reading_bytes(lm, S, b, chunk, ranks, device), "vision": 0}
    M = frame_tokens(config)
    frames = -(-S // M)
    N = min(batch, frames)
    pixels = 3 * config.vision.side**2 if device == "cpu" else 0  # of a frame, before it is seen
    seen = N * M * lm.hidden_size * b * ranks
    reading = reading_bytes(lm, S, b, min(chunk, N * M * ranks), ranks, device)
    vision = vision_bytes(config, N, b) + pixels * min(2 * N, frames - N)
    return terms | {"reading": N * pixels + seen + reading, "vision": N * pixels + seen + vision}


def peak(terms: dict[str, int]) -> int:
    """The most that is needed at once: seeing and reading take turns."""
    return terms["weights"] + terms["cache"] + max(terms["reading"], terms["vision"])


def most_frames(config: Model, room: int, rest: int = 0, **how: int | str) -> int:
    """The most frames (of a language model: tokens) that fit in `room` bytes beside `rest` tokens of text.

    `how` is as for `memory`. More frames never take less, so that they are found by halving.
    """
    M = frame_tokens(config)
    return bisect_right(range(1, MOST), room, key=lambda n: peak(memory(config, n * M + rest, **how)))


# ----------------------------------------------------------------------------------------------------- the page


def room_bytes(device: str, ranks: int) -> int:
    """What a process can take here: what is free on its GPU, or its share of the memory that the CPU may use."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    rooms = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's, cgroups of version 2 and 1
        limit = Path("/sys/fs/cgroup", file)
        rooms += [int(text) for text in [limit.read_text().strip()] if text != "max"] if limit.is_file() else []
    return min(rooms) // ranks - PROCESS


def most_held(device: torch.device) -> int:
    """The most bytes that this process has held so far: of tensors on a GPU, or in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(config: Model, cfg: Any) -> None:
    """Print the page, on the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(table(config, cfg))


def table(config: Model, cfg: Any) -> str:
    """The page of `longva.py --plan`, for its settings `cfg`; a film is opened to count its frames, no more.

    Raises ValueError for a film that cannot be read.
    """
    sees, ranks = isinstance(config, LongVAConfig), int(os.environ.get("WORLD_SIZE", 1))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    short = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device == "cuda")
    b, dtype = (2, "bfloat16") if short else (4, "float32")
    asked, unit = cfg.frames if sees else 0, "frames" if sees else "tokens"
    if sees and cfg.video:
        asked = video.frames(cfg.video, **({"fps": cfg.fps} if cfg.fps else {"count": cfg.frames})).total
    text = PROMPT + cfg.max_tokens + (CHAT if cfg.chat else 0)
    how = {"b": b, "chunk": cfg.chunk, "batch": cfg.batch, "device": device}
    page = [f"{parameters(config) / 1e6:,.1f} million parameters, {dtype}, {device}; GB = 10^9 bytes"]
    for R in sorted({ranks, 8}):
        page += ["", "1 rank" if R == 1 else f"{R} ranks, each", HEAD.format(unit)]
        for n in sorted({asked, *FRAMES}) if sees else TOKENS:
            terms = memory(config, n * frame_tokens(config) + text, ranks=R, **how)
            sizes = "".join(f"{size / GB:10.3f}" for size in [*terms.values(), peak(terms)])
            page.append(f"{'*' if n == asked else ' '} {n:9,}{sizes}")
        away = device == "cuda" and not torch.cuda.is_available()
        for room in [size * GB for size in CARDS] if away else [room_bytes(device, R)]:
            most = most_frames(config, room, text, ranks=R, **how)
            page.append(
                f"  {'at most' if most < MOST - 1 else 'more than'} {most:,} {unit} in {room / GB:.1f} GB per rank"
            )
    seeing = f", {cfg.batch:,} frames seen at once" if sees else ""
    chunk = cfg.chunk or CHUNK[device]
    page += ["", f"With {text:,} tokens of text, read {chunk:,} tokens at once{seeing}; * is what was asked for."]
    if device == "cpu":
        page.append(f"Python and torch themselves take {PROCESS / GB:.2f} GB more, which are left free above.")
    return "\n".join(page)
