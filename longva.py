"""LongVA: a Qwen2 decoder that reads text and pictures, and answers questions about them.

What      The language model (Sec. 3.1), the projector that lets it see (Sec. 3.2), loading, saving, answering.
Paper     "Long Context Transfer from Language to Vision", arXiv 2406.16852, Sec. 3; Qwen2, arXiv 2407.10671.
Run       python longva.py "What is in the picture?" --image PICTURE.jpg
          python longva.py "Which number is on the star?" --video FILM.mp4 --frames 64
Key       B batch            T tokens held here     S tokens of the whole sequence
          D width            H query heads          G key/value heads      K head width
          F MLP width        V vocabulary           L layers
          N grids = frames   P patches per grid     M tokens per grid      E CLIP width
          C colour channels  Y X pixels             1 broadcast
          I visual tokens    U a chunk of tokens    J = K/2    R = H/G
Deviates  bfloat16, never float16: Qwen2's activations overflow float16 (the release's "!!!!" answers).
          All 152,064 rows of the embedding are kept; the release cuts them to the tokenizer's length.
          A grid is pooled also when it is alone; the release leaves a single crop at 576 tokens.

The decoder asks one question of the outside, `attend(layer, q, k, v)`. Causal attention, a cache, a ring over many
machines are answers to it; the decoder knows of no mask, no cache and no rank.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import unires
from clip import ClipVision
from data import chat, runs, tokenizer, video, weights
from data.config import LMConfig, LongVAConfig, read_config, to_dict
from data.flags import knob, run

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q_BTHK, k_BTGK, v_BTGK) -> o_BTHK


# ----------------------------------------------------------------------------------------- pure functions


def rope(pos_T: Tensor, K: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation at each position, float32 (cos_TK, sin_TK) from integer positions.

    The product of position and frequency is exact enough only in float32: bfloat16 cannot even hold 257.
    """
    turn_J = 1.0 / theta ** (torch.arange(0, K, 2, device=pos_T.device, dtype=torch.int64).float() / K)
    angle_TJ = pos_T.float()[:, None] * turn_J
    angle_TK = torch.cat([angle_TJ, angle_TJ], dim=-1)
    return angle_TK.cos(), angle_TK.sin()


def rotate(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair of numbers (i, i + K/2) of every head by its position's angle (RoPE)."""
    first, second = x_BTHK.chunk(2, dim=-1)
    cos_T1K, sin_T1K = cos_TK[:, None].to(x_BTHK.dtype), sin_TK[:, None].to(x_BTHK.dtype)
    return x_BTHK * cos_T1K + torch.cat([-second, first], dim=-1) * sin_T1K


def causal_attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attend to the tokens at hand: each sees itself and those before it. Query head h reads key head h*G//H."""
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    o_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    return o_BHTK.transpose(1, 2)


class KVCache:
    """Keys and values of what was read so far; `attend` adds to them and sees them all.

    Room for S tokens is taken once. Set `length` back to forget: what follows is overwritten.
    """

    def __init__(self, config: LMConfig, B: int, S: int, like: Tensor):
        self.config, self.length = config, 0
        shape = (config.num_hidden_layers, B, S, config.num_key_value_heads, config.head_width)
        self.k_LBSGK, self.v_LBSGK = like.new_empty(shape), like.new_empty(shape)

    def branch(self, length: int, B: int, room: int) -> "KVCache":
        """A new cache of B rows that all begin with this one's first `length` tokens, with room for more."""
        new = KVCache(self.config, B, length + room, self.k_LBSGK)
        new.k_LBSGK[:, :, :length], new.v_LBSGK[:, :, :length] = (
            self.k_LBSGK[:, :, :length],
            self.v_LBSGK[:, :, :length],
        )
        new.length = length
        return new

    def attend(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Remember this call's keys and values, then attend causally to everything remembered."""
        start, stop = self.length, self.length + q_BTHK.shape[1]
        assert stop <= self.k_LBSGK.shape[2], f"a cache for {self.k_LBSGK.shape[2]} tokens cannot hold {stop}"
        self.k_LBSGK[layer, :, start:stop] = k_BTGK
        self.v_LBSGK[layer, :, start:stop] = v_BTGK
        if layer == len(self.k_LBSGK) - 1:
            self.length = stop
        if start == 0:
            return causal_attend(layer, q_BTHK, k_BTGK, v_BTGK)
        k_BGSK = self.k_LBSGK[layer, :, :stop].transpose(1, 2)
        v_BGSK = self.v_LBSGK[layer, :, :stop].transpose(1, 2)
        if stop - start == 1:  # one query sees all: a group's query heads become rows, and no mask is needed
            q_BGRK = q_BTHK[:, 0].unflatten(1, (k_BTGK.shape[2], -1))
            return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK).flatten(1, 2)[:, None]
        q_BHTK, lower_right = q_BTHK.transpose(1, 2), causal_lower_right(stop - start, stop)
        o_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=lower_right, enable_gqa=True)
        return o_BHTK.transpose(1, 2)


class ChunkedNLL(torch.autograd.Function):
    """Head and cross-entropy over `chunk` positions at a time, so that no step ever holds all the logits.

    At 224,000 tokens the logits alone are 68 GB in bfloat16: the limit the paper ran into. Only the
    log-normaliser of each position is kept; backward makes the chunk's logits again.
    """

    @staticmethod
    def forward(ctx, h_ND, head_VD, targets_N, chunk):  # noqa: ANN001
        """Negative log-likelihood of every position, float32[N]."""
        nll, lse = [], []
        for h, target in zip(h_ND.split(chunk), targets_N.split(chunk)):
            logits = (h @ head_VD.T).float()
            lse.append(logits.logsumexp(-1))
            nll.append(lse[-1] - logits.gather(-1, target[:, None])[:, 0])
        none = h_ND.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(h_ND, head_VD, targets_N, torch.cat([none, *lse]))
        ctx.chunk = chunk
        return torch.cat([none, *nll])

    @staticmethod
    def backward(ctx, grad_N):  # noqa: ANN001
        """Softmax minus one-hot, chunk by chunk; the head's gradient adds up in float32."""
        h_ND, head_VD, targets_N, lse_N = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]  # a frozen head needs no gradient: 2.2 GB at Qwen2-7B's size
        dh_ND, dhead_VD = torch.empty_like(h_ND), torch.zeros_like(head_VD, dtype=torch.float32) if learns else None
        for i in range(0, len(h_ND), ctx.chunk):
            here = slice(i, i + ctx.chunk)
            p_UV = ((h_ND[here] @ head_VD.T).float() - lse_N[here, None]).exp_()
            p_UV.scatter_add_(1, targets_N[here, None], torch.full_like(lse_N[here, None], -1.0))
            p_UV.mul_(grad_N[here, None])
            p_UV = p_UV.to(h_ND.dtype)
            dh_ND[here] = p_UV @ head_VD
            if learns:
                dhead_VD += (p_UV.T @ h_ND[here]).float()
        return dh_ND, dhead_VD.to(head_VD.dtype) if learns else None, None, None


def nll(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of targets of each row, float32 (nll_B, count_B).

    A target of -100 counts nothing and costs nothing: its logits are never computed.
    """
    wanted_BT = targets_BT != chat.IGNORE
    row_N = wanted_BT.nonzero()[:, 0]
    nll_N = ChunkedNLL.apply(h_BTD[wanted_BT], head_VD, targets_BT[wanted_BT], chunk)
    nll_B = nll_N.new_zeros(len(targets_BT)).index_add(0, row_N, nll_N)
    return nll_B, wanted_BT.sum(1).float()


# ------------------------------------------------------------------------------------------------ modules


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, and scale."""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise in float32, cast back, then multiply by the weight: Qwen2's order of roundings."""
        wide = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x_BTD.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; who is attended to is `attend`'s business."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        D, K, bias = config.hidden_size, config.head_width, config.attention_bias
        self.layer, self.K = layer, K
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, attend: Attend) -> Tensor:
        """Queries, keys and values, turned by position, answered by `attend`: x_BTD."""
        q_BTHK = rotate(self.q_proj(x_BTD).unflatten(-1, (-1, self.K)), cos_TK, sin_TK)
        k_BTGK = rotate(self.k_proj(x_BTD).unflatten(-1, (-1, self.K)), cos_TK, sin_TK)
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.K))
        return self.o_proj(attend(self.layer, q_BTHK, k_BTGK, v_BTGK).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LMConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)): x_BTD."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One layer: attention, then MLP, each normalised before and added after."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, attend: Attend) -> Tensor:
        """The residual stream after this layer, x_BTD."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TK, sin_TK, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Qwen2 between embedding and head."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.remat = False  # keep one hidden state per layer and compute the rest again in backward

    def forward(self, x_BTD: Tensor, pos_T: Tensor, attend: Attend = causal_attend) -> Tensor:
        """Hidden states h_BTD; `pos_T` is each token's place in the whole sequence, wherever it is held."""
        cos_TK, sin_TK = rope(pos_T, self.config.head_width, self.config.rope_theta)
        for layer in self.layers:
            if self.remat and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, cos_TK, sin_TK, attend, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, cos_TK, sin_TK, attend)
        return self.norm(x_BTD)


class LM(nn.Module):
    """A causal language model, its parameters named as in Hugging Face's Qwen2 files."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Let head and embedding be one parameter, where the config says so; again after to_empty()."""
        if self.model.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lm_head.weight.device

    def embed(self, ids_BT: Tensor, seen_ID: Tensor | None = None) -> Tensor:
        """Embeddings x_BTD; the places of chat.IMAGE take the rows of `seen_ID`, in order."""
        image_BT = ids_BT == chat.IMAGE
        x_BTD = self.model.embed_tokens(ids_BT.masked_fill(image_BT, 0))
        if seen_ID is None:
            return x_BTD
        return x_BTD.masked_scatter(image_BT[..., None], seen_ID.to(x_BTD.dtype))

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, float32[B, T, V]; ask for few positions only."""
        return self.lm_head(h_BTD).float()

    def forward(self, ids_BT: Tensor, pos_T: Tensor, targets_BT: Tensor, attend: Attend = causal_attend) -> tuple:
        """The training question: (nll_B, count_B), summed over this call's positions with a target."""
        h_BTD = self.model(self.embed(ids_BT), pos_T, attend)
        return nll(h_BTD, self.lm_head.weight, targets_BT)


class LongVA(LM):
    """A language model with CLIP's eye and a two-layer projector between them (Sec. 3.2).

    Names nest as in the released files: model.vision_tower.vision_tower.vision_model.*, model.mm_projector.*.
    """

    def __init__(self, config: LongVAConfig):
        super().__init__(config.lm)
        self.config, D = config, config.lm.hidden_size
        eye = nn.ModuleDict({"vision_model": ClipVision(config.vision)})
        self.model.vision_tower = nn.ModuleDict({"vision_tower": eye})
        self.model.mm_projector = nn.Sequential(nn.Linear(config.vision.hidden_size, D), nn.GELU(), nn.Linear(D, D))
        if config.scheme == "anyres":
            self.model.image_newline = nn.Parameter(torch.empty(D))

    @property
    def tower(self) -> ClipVision:
        """The vision transformer."""
        return self.model.vision_tower["vision_tower"]["vision_model"]

    def see(self, pixels_NCYX: Tensor, layout: list[unires.Layout]) -> Tensor:
        """Turn the grids of any number of pictures and videos into visual tokens x_ID, in order.

        `layout` tells how many grids each picture has and how they lie. The tower is called once, whatever the
        number of grids, because ranks that share its parameters must call it equally often.
        """
        z_NPE = self.tower(pixels_NCYX.to(self.model.mm_projector[0].weight))
        x_NPD = self.model.mm_projector(z_NPE)
        newline_D = getattr(self.model, "image_newline", None)
        parts = x_NPD.split([picture.grids for picture in layout])
        tokens = [picture.arrange(part, newline_D) for picture, part in zip(layout, parts)]
        return torch.cat([x_NPD.flatten(0, 1)[:0], *tokens])  # no picture at all gives no token

    def forward(  # all in one call: sharded parameters are whole only inside the root's forward
        self,
        ids_BT: Tensor,
        pos_T: Tensor,
        targets_BT: Tensor,
        pixels_NCYX: Tensor,
        layout: list[unires.Layout],
        attend: Attend = causal_attend,
    ) -> tuple:
        """The training question, as LM.forward, with pictures in the places of chat.IMAGE."""
        seen_ID = self.see(pixels_NCYX, layout)
        h_BTD = self.model(self.embed(ids_BT, seen_ID), pos_T, attend)
        return nll(h_BTD, self.lm_head.weight, targets_BT)


# ----------------------------------------------------------------------------------------- weights in and out

UNUSED = ("*rotary_emb.inv_freq", "*position_ids")  # buffers of old files; what they hold is computed here
TOWER = "model.vision_tower.vision_tower.vision_model."  # LongVA's name for what CLIP's files call vision_model.
NOT_SEEING = ("text_model.*", "*_projection.weight", "logit_scale")  # the half of a whole CLIP that reads


def fresh(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """New weights for a model, which may be on the meta device: a stream of (name, tensor). Plain initialisation.

    Maps and embeddings of the language model are normal(0, 0.02), as Qwen2's; those of tower and projector have
    deviation 1/sqrt(inputs). Norms are one, biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        tensor = torch.zeros(p.shape)
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif p.ndim > 1 or name.endswith(("image_newline", "class_embedding")):
            seeing = name.startswith(("vision", "visual", "word", "model.vision", "model.mm_", "model.image_"))
            fan_in = p[0].numel() if p.ndim > 1 else p.numel()
            tensor.normal_(0, fan_in**-0.5 if seeing else 0.02, generator=generator)
        yield name, tensor


def read_tower(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """The vision tower of a CLIP folder, under LongVA's names; with or without `vision_model.` in front."""
    for name, tensor in weights.read(folder):
        if not any(fnmatchcase(name, pattern) for pattern in NOT_SEEING):
            yield TOWER + name.removeprefix("vision_model."), tensor


def fill_from(
    model: nn.Module,
    stream: Iterable[tuple[str, Tensor]],
    fill: Callable | None = None,
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill the parameters that `only` names from a stream, strictly: each once, no tensor left over.

    `fill(parameter, tensor)` copies, and knows about shards where there are any. Raises ValueError naming keys.
    """
    parameters = {name: p for name, p in model.named_parameters() if only(name)}
    tied = [] if "lm_head.weight" in parameters else ["lm_head.weight"]
    weights.fill_strictly(parameters, ((n, x) for n, x in stream if only(n)), fill, ignore=[*UNUSED, *tied])


def save(folder: Path, stream: Iterable[tuple[str, Tensor]], config: LMConfig | LongVAConfig, words: Path) -> None:
    """Write a model folder in bfloat16 from a stream of weights, with the tokenizer of folder `words`."""
    weights.copy_tokenizer(words, folder)
    weights.write(folder, stream, to_dict(config), dtype=torch.bfloat16)


def load(folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LM:
    """The model of a folder, ready to answer: an LM, or a LongVA where the folder has eyes.

    dtype: of the parameters; None takes bfloat16 on a GPU and float32 elsewhere, whatever the file holds.
    Raises ValueError if a file is missing, or a tensor is missing, unknown or of another shape.
    """
    config = read_config(folder)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = LM(config) if isinstance(config, LMConfig) else LongVA(config)
    model.to(dtype).to_empty(device=device).tie()
    fill_from(model, weights.read(folder))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------- seeing and answering


def watch(model: LongVA, pictures: Iterable[unires.Picture], how: str = "crop", batch: int = 64) -> Tensor:
    """Visual tokens x_TD of a video's frames as they come; only `batch` frames are held at a time.

    how: "crop" as the release shows videos, "pad" as V-NIAH does. Raises ValueError where there is no frame.
    """
    parts, pictures = [], iter(pictures)
    while held := [unires.frame(picture, model.config.vision.side, how) for picture in islice(pictures, batch)]:
        parts.append(model.see(torch.stack(held).to(model.device), [unires.Layout(1, len(held))]))
    if parts:
        return torch.cat(parts)
    raise ValueError("a video without frames cannot be shown; check how frames were sampled")


def show(picture: unires.Picture, config: LongVAConfig, limit: int = unires.LIMIT) -> tuple[Tensor, unires.Layout]:
    """A picture as (pixels_NCYX, layout), cut as this model was taught to see."""
    return unires.show(picture, config.vision.side, config.rule, limit, config.scheme)


@torch.no_grad()
def read(model: LM, x_BTD: Tensor, cache: KVCache, chunk: int = 4096) -> Tensor:
    """Read embedded tokens behind what `cache` holds, `chunk` at a time; the hidden states of the last chunk."""
    for x_BUD in x_BTD.split(chunk, dim=1):
        pos_U = torch.arange(cache.length, cache.length + x_BUD.shape[1], device=x_BTD.device)
        h_BUD = model.model(x_BUD, pos_U, cache.attend)
    return h_BUD


def generate(model: LM, x_1TD: Tensor, stop_ids: Iterable[int], max_tokens: int = 256, chunk: int = 4096) -> Iterator:
    """Greedy answer to embedded tokens, id by id as they are found; ends after `max_tokens` or before a stop id.

    Only the prompt's last position is given logits. Without the release's repetition penalty of 1.05.
    """
    stop = set(stop_ids)
    cache = KVCache(model.model.config, 1, x_1TD.shape[1] + max_tokens, x_1TD)
    for _ in range(max_tokens):
        best_11 = model.logits(read(model, x_1TD, cache, chunk)[:, -1:]).argmax(-1)
        if best_11.item() in stop:
            return
        yield best_11.item()
        x_1TD = model.embed(best_11)


def pick_device(asked: str) -> torch.device:
    """The device for a flag of auto, cpu or cuda; ValueError where there is no GPU to be had."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or auto")
    return torch.device("cpu" if asked == "cpu" or not torch.cuda.is_available() else "cuda")


# ----------------------------------------------------------------------------------------------------- main

TINY_MODEL = runs.TINY / "longva"


@dataclass(frozen=True)
class Config:
    """Ask LongVA about pictures or a video."""

    question: str = knob("What is in the picture?", "what to ask (ours)", positional=True)
    image: tuple[Path, ...] = knob((), "picture files (ours)")
    video: Path | None = knob(None, "a video file, or a folder of pictures (ours)")
    frames: int = knob(32, "frames taken evenly from the video (Table 4: 8 to 384)")
    weights: Path = knob(TINY_MODEL, "model folder (ours)")
    max_tokens: int = knob(256, "tokens of the answer, at most (ours)")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "where to compute (ours)")


@torch.no_grad()
def main(cfg: Config) -> None:
    """Look, read the question, and print the answer as it comes."""
    if bool(cfg.video) == bool(cfg.image):
        raise ValueError("give either --image FILE ... or --video FILE to look at: one of them, not both")
    device = pick_device(cfg.device)
    pictures = [video.read_picture(file) for file in cfg.image]  # before the model: a wrong path fails at once
    film = video.frames(cfg.video, count=cfg.frames) if cfg.video else iter(())
    words = tokenizer.load_tokenizer(cfg.weights)
    model = load(cfg.weights, device)
    if not isinstance(model, LongVA):
        raise ValueError(f"{cfg.weights} is a language model and cannot see; give a LongVA folder as --weights")
    if cfg.weights == TINY_MODEL:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"(a toy of {size:.1f} million parameters, trained on synthetic pictures of shapes and digits)")
    if cfg.video:
        seen_ID = watch(model, tqdm((frame for _, frame in film), "frames", cfg.frames))
        lengths = [len(seen_ID)]
    else:
        shown = [show(picture, model.config) for picture in pictures]
        seen_ID = model.see(torch.cat([pixels for pixels, _ in shown]).to(device), [how for _, how in shown])
        lengths = [how.tokens(model.config.vision.patches) for _, how in shown]
    ids_1T = torch.tensor([chat.prompt(words, cfg.question, lengths)], device=device)
    x_1TD = model.embed(ids_1T, seen_ID)
    for piece in words.stream(generate(model, x_1TD, words.stop_ids, cfg.max_tokens)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main, Config)
