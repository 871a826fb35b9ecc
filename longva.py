"""LongVA: a Qwen2 decoder that reads text, pictures and videos, and answers questions about them.

What      The language model (Sec. 3.1), the projector from CLIP to it (Sec. 3.2), loading, saving, generation. The
          decoder computes q, k, v and calls `attend(layer, q, k, v)`: causal attention, a KV cache and a ring of
          processes implement it, so the model contains no mask, no cache and no rank.
Paper     "Long Context Transfer from Language to Vision", arXiv 2406.16852, Sec. 3; Qwen2, arXiv 2407.10671.
Run       python longva.py "Which number is on the star?" --image assets/star.png
          python longva.py "Which number is on the house?" --video assets/film.mp4 --frames 64
          From Python:  model = longva.load("data/tiny/longva")
                        print(longva.answer(model, "Which number is on the house?", video="assets/film.mp4"))
Dimensions  B batch            T tokens held here     S tokens of the whole sequence
          D LM width         H query heads          G key/value heads      K head width
          F MLP width        V vocabulary           L layers
          N grids = frames   P patches per grid     M tokens per grid      E CLIP width
          C colour channels  Y X pixels             1 broadcast
Differs   bfloat16, never float16: Qwen2's activations overflow float16 (the release's "!!!!" answers).
          All 152,064 rows of the embedding are kept; the release cuts them to the tokenizer's length.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ring
import unires
from clip import ClipVision
from data import chat, memory, runs, tokenizer, video, weights
from data.activation_offload import ActivationOffload
from data.config import (
    LMConfig,
    LongVAConfig,
    RopeScaling,
    Sampling,
    read_config,
    read_sampling,
    sample,
    stop_ids,
    to_dict,
)
from data.flags import at_least, run, setting
from data.weights import fill_from

CHUNK = {"cpu": 2048, "cuda": 4608}  # tokens per prefill chunk: a CPU needs a mask for them; on a GPU it is 32 frames
LOSS_CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once: 2048 of Qwen2-7B are 0.6 GB in bf16
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q_BTHK, k_BTGK, v_BTGK) -> o_BTHK

# ---- the language model (Sec. 3.1) ---------------------------------------------------------------


def rope_frequencies(K: int, theta: float, scaling: RopeScaling | None, S: int, device: torch.device) -> Tensor:
    """Angle by which each pair j of a head's K numbers turns per position, float32[K / 2]: theta^(-2j / K).

    A pair that turns slowly meets angles beyond the trained length L that it never saw in training. A scaling by
    the factor s lets it turn more slowly, so that s * L positions have the angles of L; nothing is trained.
    S: tokens of the whole sequence, for dynamic NTK.
    """
    kind = scaling.rope_type if scaling else "default"
    if kind == "dynamic":  # NTK-aware: the slowest pair turns over S tokens as far as over L, the fastest as ever
        L = scaling.original_max_position_embeddings
        theta = theta * (scaling.factor * max(S, L) / L - scaling.factor + 1) ** (K / (K - 2))
    frequency = 1.0 / theta ** (torch.arange(0, K, 2, device=device, dtype=torch.int64).float() / K)
    if kind in ("default", "dynamic"):
        return frequency
    if kind == "linear":  # position interpolation (arXiv 2306.15595): all pairs, however fast
        return frequency / scaling.factor
    L = scaling.original_max_position_embeddings
    if kind == "llama3":  # pairs with many turns within L stay as they are: `kept` = 1; between, linear in the turns
        turns = L * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:  # YaRN (arXiv 2309.00071, Sec. 3.2): the same, but between the two linear in the pair's number j
        first, last = (
            K * math.log(L / (2 * math.pi * turns)) / (2 * math.log(theta))  # the j that makes so many turns within L
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, K - 1)
        kept = 1 - ((torch.arange(K // 2, device=device) - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def rope(pos_T: Tensor, K: int, theta: float, scaling: RopeScaling | None = None, S: int = 0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, for `rotate`: float32 (cos_TK, sin_TK) from integer positions.

    The product of position and frequency needs float32: bfloat16 cannot represent even the integer 257.
    """
    frequency = rope_frequencies(K, theta, scaling, S, pos_T.device)
    angle = pos_T.float()[:, None] * frequency
    amplitude = scaling.amplitude if scaling else 1.0  # YaRN: sharper attention in longer sequences
    cos, sin = amplitude * angle.cos(), amplitude * angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # `rotate` needs the minus


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate each pair of numbers (a, b) = (i, i + K/2) of every head by its position's angle (RoPE).

    The result is (a cos - b sin, b cos + a sin): `roll` swaps a and b, and sin_T1K contains the minus.
    """
    swapped_BTHK = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)  # one kernel on a GPU; negating and cat take two
    return x_BTHK * cos_T1K + swapped_BTHK * sin_T1K


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, and scale."""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise in float32, x / sqrt(mean(x^2) + eps), cast back, then scale: Qwen2's order."""
        return self.weight * F.rms_norm(x_BTD, x_BTD.shape[-1:], None, self.eps)


def causal_attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal attention: each token attends to itself and to those before it. Query head h uses key head h*G//H."""
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    o_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    return o_BHTK.transpose(1, 2)


class Attention(nn.Module):
    """The projections of grouped-query attention with rotary positions; `attend` computes attention itself."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        D, K, bias = config.hidden_size, config.head_width, config.attention_bias
        self.layer, self.K = layer, K
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=False)

    def qkv(self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two rotated by position: (q_BTHK, k_BTGK, v_BTGK)."""
        q_BTHK = rotate(self.q_proj(x_BTD).unflatten(-1, (-1, self.K)), cos_T1K, sin_T1K)
        k_BTGK = rotate(self.k_proj(x_BTD).unflatten(-1, (-1, self.K)), cos_T1K, sin_T1K)
        return q_BTHK, k_BTGK, self.v_proj(x_BTD).unflatten(-1, (-1, self.K))


class MLP(nn.Module):
    """SwiGLU. `tile` sets how many tokens are computed at a time: in a long sequence [T, F] tensors are the largest."""

    def __init__(self, config: LMConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)
        self.tile = 0  # tokens; 0 for all at once

    def swiglu(self, x_BTD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)): x_BTD."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """As `swiglu`; with tiles, its inner tensors exist for one tile at a time, in backward too: x_BTD."""
        if not self.tile or x_BTD.shape[1] <= self.tile:
            return self.swiglu(x_BTD)
        return torch.cat([recompute(True, self.swiglu, tile) for tile in x_BTD.split(self.tile, dim=1)], dim=1)


class Block(nn.Module):
    """One layer of Qwen2: attention, then MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor, attend: Attend, selective: bool = False
    ) -> Tensor:
        """The residual stream x_BTD after this layer; `selective`: see `selective_checkpointing`."""
        if selective:
            return self.selective_checkpointing(x_BTD, cos_T1K, sin_T1K, attend)

        q_BTHK, k_BTGK, v_BTGK = self.self_attn.qkv(self.input_layernorm(x_BTD), cos_T1K, sin_T1K)
        o_BTHK = attend(self.self_attn.layer, q_BTHK, k_BTGK, v_BTGK)
        x_BTD = x_BTD + self.self_attn.o_proj(o_BTHK.flatten(-2))

        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def selective_checkpointing(self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor, attend: Attend) -> Tensor:
        """The same; attention's inputs and output, the dearest to compute, are saved, the rest is recomputed."""

        def before_attention(x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.self_attn.qkv(self.input_layernorm(x_BTD), cos_T1K, sin_T1K)

        def after_attention(x_BTD: Tensor, o_BTHK: Tensor) -> Tensor:
            x_BTD = x_BTD + self.self_attn.o_proj(o_BTHK.flatten(-2))
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

        q_BTHK, k_BTGK, v_BTGK = recompute(True, before_attention, x_BTD)
        o_BTHK = attend(self.self_attn.layer, q_BTHK, k_BTGK, v_BTGK)
        return recompute(True, after_attention, x_BTD, o_BTHK)


class Decoder(nn.Module):
    """Qwen2 between embedding and head."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = "none"  # "full": one hidden state per layer is saved; "selective": see Block
        self.offload_activations = False  # keep tensors saved for backward in CPU memory
        self.rope_len = 0  # tokens that dynamic NTK scales for, where they come in pieces; 0: those of this call

    def forward(self, x_BTD: Tensor, pos_T: Tensor, attend: Attend = causal_attend) -> Tensor:
        """Hidden states h_BTD; `pos_T`: each token's position in the whole sequence."""
        lm, S = self.config, 0
        if lm.rope_scaling and lm.rope_scaling.rope_type == "dynamic":
            S = self.rope_len or int(pos_T.max()) + 1
        cos_sin = rope(pos_T, lm.head_width, lm.rope_theta, lm.rope_scaling, S)
        cos_T1K, sin_T1K = (angle_TK[:, None].to(x_BTD.dtype) for angle_TK in cos_sin)
        full, selective = self.checkpointing == "full", self.checkpointing == "selective"
        offload = ActivationOffload(x_BTD.device) if self.offload_activations else None
        for layer in self.layers:
            with offload.layer() if offload else nullcontext():  # positions come by closure: they are not offloaded
                x_BTD = recompute(full, lambda x, layer=layer: layer(x, cos_T1K, sin_T1K, attend, selective), x_BTD)
        return self.norm(x_BTD)


class LM(nn.Module):
    """A causal language model, its parameters named as in Hugging Face's Qwen2 files."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.folder: Path | None = None  # where `load` read it from
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

    def embed(self, ids_BT: Tensor, visual_tokens: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Embeddings x_BTD; the rows of `visual_tokens` [*, D] replace the positions of chat.IMAGE, in order.

        `positions`: where these are in the flattened batch; None computes them, which makes the CPU wait for a GPU.
        """
        image_BT = ids_BT == chat.IMAGE
        x_BTD = self.model.embed_tokens(ids_BT.masked_fill(image_BT, 0))
        if visual_tokens is None:
            return x_BTD
        positions = image_BT.flatten().nonzero()[:, 0] if positions is None else positions
        return x_BTD.flatten(0, 1).index_copy(0, positions, visual_tokens.to(x_BTD.dtype)).view_as(x_BTD)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Logits float32[B, T, V]; give few positions only, for V is large."""
        return self.lm_head(h_BTD).float()

    def forward(
        self,
        ids_BT: Tensor,
        pos_T: Tensor,
        targets_BT: Tensor,
        attend: Attend = causal_attend,
        score: Callable[[Tensor, Tensor, Tensor], tuple] | None = None,
    ) -> tuple:
        """Training loss (nll_B, count_B) of each row, see `nll`; or what another `score` function gives."""
        h_BTD = self.model(self.embed(ids_BT), pos_T, attend)
        return (score or nll)(h_BTD, self.lm_head.weight, targets_BT)


def plain_nll(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss: each row's summed negative log-likelihood and number of targets, float32 (nll_B, count_B).

    Targets of -100 are ignored. Training calls `nll` below: the same loss without the whole logits_BTV in memory.
    """
    logits_BTV = (h_BTD @ head_VD.T).float()
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, ignore_index=chat.IGNORE, reduction="none")
    return nll_BT.sum(1), (targets_BT != chat.IGNORE).sum(1).float()


# ---- the projector and the vision tower (Sec. 3.2) -----------------------------------------------


class LongVA(LM):
    """A language model, CLIP's vision tower and a two-layer projector between them (Sec. 3.2).

    Names nest as in the released files: model.vision_tower.vision_tower.vision_model.*, model.mm_projector.*.
    """

    def __init__(self, config: LongVAConfig):
        super().__init__(config.lm)
        self.config, D = config, config.lm.hidden_size
        vision_tower = nn.ModuleDict({"vision_model": ClipVision(config.vision)})
        self.model.vision_tower = nn.ModuleDict({"vision_tower": vision_tower})
        self.model.mm_projector = nn.Sequential(nn.Linear(config.vision.hidden_size, D), nn.GELU(), nn.Linear(D, D))
        if config.scheme != "unires":
            self.model.image_newline = nn.Parameter(torch.empty(D))

    @property
    def tower(self) -> ClipVision:
        """The vision transformer."""
        return self.model.vision_tower["vision_tower"]["vision_model"]

    def encode_images(self, pixels_NCYX: Tensor, layout: list[unires.Layout]) -> Tensor:
        """Encode the grids of any number of pictures and videos: visual tokens [*, D], in order.

        Pixels are uint8, or floating and normalised already. `layout` gives the rows and columns of each picture's
        grids. The tower is called once, also for no grids: ranks that share its parameters must call it equally often.
        """
        weight = self.model.mm_projector[0].weight
        pixels_NCYX = pixels_NCYX.to(weight.device)
        if pixels_NCYX.dtype == torch.uint8:
            pixels_NCYX = unires.normalise(pixels_NCYX)
        z_NPE = self.tower(pixels_NCYX.to(weight.dtype))
        x_NPD = self.model.mm_projector(z_NPE)
        newline_D = getattr(self.model, "image_newline", None)
        parts = x_NPD.split([picture.grids for picture in layout])
        tokens = [picture.arrange(part, newline_D) for picture, part in zip(layout, parts)]
        none = [x_NPD.flatten(0, 1)[:0]]  # no picture at all gives no token
        if newline_D is not None:  # videos have no newline, yet all ranks must use the same parameters
            none.append(newline_D[None][:0].to(x_NPD.dtype))
        return torch.cat([*none, *tokens])

    def forward(  # all in one call: sharded parameters are whole only inside the root's forward
        self,
        ids_BT: Tensor,
        pos_T: Tensor,
        targets_BT: Tensor,
        pixels_NCYX: Tensor,
        layout: list[unires.Layout],
        attend: Attend = causal_attend,
        visual_index: Tensor | None = None,
        positions: Tensor | None = None,
        score: Callable[[Tensor, Tensor, Tensor], tuple] | None = None,
    ) -> tuple:
        """Training loss or score as in LM.forward, with visual tokens at the positions of chat.IMAGE.

        `visual_index`: the visual token of each position, if not each once and in order (unires.UniqueGrids).
        `positions`: as for `embed`.
        """
        visual_tokens = self.encode_images(pixels_NCYX, layout)
        visual_tokens = visual_tokens if visual_index is None else visual_tokens[visual_index]
        h_BTD = self.model(self.embed(ids_BT, visual_tokens, positions), pos_T, attend)
        return (score or nll)(h_BTD, self.lm_head.weight, targets_BT)


# ---- machinery: memory while training ------------------------------------------------------------


def recompute(on: bool, f: Callable, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """f(*x); where `on`, by activation checkpointing: only x is saved, and backward computes f(*x) again."""
    if not on or not torch.is_grad_enabled():
        return f(*x)
    return checkpoint(f, *x, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn at random


class ChunkedNLL(torch.autograd.Function):
    """Head and cross-entropy over `chunk` positions at a time, so that all the logits never exist at once.

    At 224,000 tokens the logits alone are 68 GB in bfloat16: the limit the paper ran into. A chunk's gradients are
    computed with its logits, for positions of equal weight. Backward scales them; only where weights differ, as in
    DPO, it computes the logits again.
    """

    @staticmethod
    def forward_and_grads(
        h_TD: Tensor, head_VD: Tensor, targets_T: Tensor, weight_T: Tensor, chunk: int, needs_grad: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Negative log-likelihoods, and where needed the gradients of their weighted sum: (nll_T, dh_TD, dhead_VD).

        The head's gradient is accumulated in float32, 2.2 GB at Qwen2-7B's size. All chunks share one buffer of logits:
        newly allocated pages cost a CPU as much time as the softmax.
        """
        nll_T = torch.empty_like(weight_T)
        dh_TD = torch.empty_like(h_TD) if any(needs_grad) else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_grad[1] else None
        logits_buffer = h_TD.new_empty(min(chunk, len(h_TD)), len(head_VD))
        for i in range(0, len(h_TD), chunk):
            h, target, weight = (x[i : i + chunk] for x in (h_TD, targets_T[:, None], weight_T[:, None]))
            logits = torch.mm(h, head_VD.T, out=logits_buffer[: len(h)]).float()
            target_logit = logits.gather(1, target)
            highest = logits.amax(1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)  # in place: logits are their exponentials now
            nll_T[i : i + chunk] = (total.log() + highest - target_logit)[:, 0]
            if any(needs_grad):  # the gradient of the logits is softmax minus one-hot
                dlogits = logits.mul_(weight / total).scatter_add_(1, target, -weight).to(h_TD.dtype)
                torch.mm(dlogits, head_VD, out=dh_TD[i : i + chunk])
            if needs_grad[1] and dlogits.dtype == torch.float32:
                dhead_VD.addmm_(dlogits.T, h)
            elif needs_grad[1] and dlogits.is_cuda:  # accumulates in float32; the product is not rounded to bf16 first
                torch.ops.aten.addmm.dtype_out(dhead_VD, dlogits.T, h, torch.float32, out=dhead_VD)
            elif needs_grad[1]:
                dhead_VD += dlogits.T @ h
        return nll_T, dh_TD, dhead_VD

    @staticmethod
    def forward(ctx, h_TD, head_VD, targets_T, chunk, needs_grad):  # noqa: ANN001
        """Negative log-likelihood of every position, float32[T]; needs_grad: of h, of the head."""
        ones_T = torch.ones_like(targets_T, dtype=torch.float32)
        nll_T, *ctx.grads = ChunkedNLL.forward_and_grads(h_TD, head_VD, targets_T, ones_T, chunk, needs_grad)
        ctx.save_for_backward(h_TD, head_VD, targets_T)
        ctx.args = chunk, needs_grad
        return nll_T

    @staticmethod
    def backward(ctx, grad_T):  # noqa: ANN001
        """Forward's gradients, scaled, where all positions have equal weight; else computed again."""
        weight, inputs = grad_T[:1].sum(), ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None  # a second backward must not scale them twice
        if grads and (grad_T == weight).all():
            dh_TD, dhead_VD = (x if x is None else x.mul_(weight) for x in grads)
        else:
            _, dh_TD, dhead_VD = ChunkedNLL.forward_and_grads(*inputs, grad_T, *ctx.args)
        return dh_TD, None if dhead_VD is None else dhead_VD.to(inputs[1].dtype), None, None, None


def nll(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of targets of each row, float32 (nll_B, count_B).

    A target of -100 is ignored; its logits are not computed. `chunk`: see LOSS_CHUNK.
    """
    chunk = chunk or LOSS_CHUNK[h_BTD.device.type]
    is_target_BT = targets_BT != chat.IGNORE
    row = is_target_BT.nonzero()[:, 0]
    needs_grad = tuple(torch.is_grad_enabled() and x.requires_grad for x in (h_BTD, head_VD))
    losses = ChunkedNLL.apply(h_BTD[is_target_BT], head_VD, targets_BT[is_target_BT], chunk, needs_grad)
    nll_B = losses.new_zeros(len(targets_BT)).index_add(0, row, losses)
    return nll_B, is_target_BT.sum(1).float()


@torch.no_grad()
def count_correct(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Each row's number of targets that are the argmax at their position, and its number of targets, float32[B]."""
    is_target_BT = targets_BT != chat.IGNORE
    predicted = [(h @ head_VD.T).argmax(-1) for h in h_BTD[is_target_BT].split(chunk)]
    correct_BT = torch.zeros_like(is_target_BT)
    correct_BT[is_target_BT] = torch.cat([targets_BT[:0, 0], *predicted]) == targets_BT[is_target_BT]
    return correct_BT.sum(1).float(), is_target_BT.sum(1).float()


# ---- machinery: KV cache and generation ----------------------------------------------------------


def attend_to_past(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
    """Attention of the last T of S positions, each to the keys up to its own; no gradient.

    With one query no mask is needed: the query heads that share a key head become rows, and each key is read once.
    On a GPU FlashAttention is called by its own name, for scaled_dot_product_attention may take cuDNN's kernel, which
    makes a plan for each new S (some 50 ms a token); its causal mask is aligned to the last key.
    """
    T, S, G = q_BTHK.shape[1], *k_BSGK.shape[1:3]
    rows = q_BTHK
    if T == 1:
        rows = q_BTHK.unflatten(2, (G, -1)).squeeze(1).transpose(1, 2)  # [B, H / G, G, K]
    if q_BTHK.is_cuda and q_BTHK.dtype.itemsize == 2:  # it takes bfloat16 and float16
        arguments = rows, k_BSGK, v_BSGK, None, None, rows.shape[1], S, 0.0, T > 1, False
        o = torch.ops.aten._flash_attention_forward(*arguments)[0].transpose(1, 2)
    else:
        heads_first = [x.transpose(1, 2) for x in (rows, k_BSGK, v_BSGK)]
        mask = causal_lower_right(T, S) if T > 1 else None
        o = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=T > 1)
    return o.flatten(1, 2).unsqueeze(1) if T == 1 else o.transpose(1, 2)


class KVCache:
    """Keys and values of all tokens so far; `attend` appends to them and attends to them all.

    Memory for S tokens is allocated once. ring.ShardedCache, sharded over processes, has the same interface: `length`,
    `pieces`, `attend`, `mark`, `rewind`.
    """

    def __init__(self, config: LMConfig, B: int, S: int, reference: Tensor):
        self.config, self.length, self.room = config, 0, S
        self.kv = reference.new_empty(  # keys, then values, of each layer; dtype and device of `reference`
            2, config.num_hidden_layers, B, S, config.num_key_value_heads, config.head_width
        )

    def pieces(self, T: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """Split T more tokens into slices of at most `chunk`, each with the indices computed here (all)."""
        for start in range(0, T, chunk):
            stop = min(start + chunk, T)
            yield slice(start, stop), torch.arange(stop - start, device=self.kv.device)

    def mark(self) -> int:
        """The present length, for `rewind`."""
        return self.length

    def rewind(self, mark: int) -> None:
        """Drop the tokens after the mark; the next ones overwrite them."""
        self.length = mark

    def branch(self, length: int, B: int, room: int) -> "KVCache":
        """A new cache of B rows that all begin with this one's first `length` tokens, and memory for `room` more."""
        new = KVCache(self.config, B, length + room, self.kv)
        new.kv[:, :, :, :length] = self.kv[:, :, :, :length]
        new.length = length
        return new

    def attend(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Append this call's keys and values, then attend causally to all in the cache."""
        start, stop = self.length, self.length + q_BTHK.shape[1]
        assert stop <= self.room, f"a cache for {self.room} tokens cannot hold {stop}"
        self.kv[0, layer, :, start:stop], self.kv[1, layer, :, start:stop] = k_BTGK, v_BTGK
        if layer == self.kv.shape[1] - 1:
            self.length = stop
        if start == 0 and not q_BTHK.is_cuda:
            return causal_attend(layer, q_BTHK, k_BTGK, v_BTGK)  # without a mask in memory
        return attend_to_past(q_BTHK, *self.kv[:, layer, :, :stop])


def encode_video(model: LongVA, frames: Iterable[Tensor], batch: int = 32) -> Iterator[Tensor]:
    """Visual tokens x_TD of a video's frames (unires.frame: pixels_CYX), `batch` frames at a time, lazily."""
    frames = iter(frames)
    while pixels := list(islice(frames, batch)):
        yield model.encode_images(unires.upload(torch.stack(pixels), model.device), [unires.Layout(1, len(pixels))])


def preprocess(
    picture: unires.Picture, config: LongVAConfig, limit: int = unires.LIMIT
) -> tuple[Tensor, unires.Layout]:
    """A picture as (pixels_NCYX, layout), cut into grids as in this model's training."""
    return unires.preprocess(picture, config.vision.side, config.rule, limit, config.scheme)


@torch.inference_mode()
def prefill(model: LM, x_BTD: Tensor, cache: KVCache, chunk: int | None = None) -> Tensor:
    """Append embedded tokens to the cache, `chunk` at a time; the hidden states of the last piece."""
    chunk = chunk or CHUNK[x_BTD.device.type]
    for piece, index in cache.pieces(x_BTD.shape[1], chunk):
        h = model.model(x_BTD[:, piece][:, index], cache.length + index, cache.attend)
    return h


def prefill_prompt(
    model: LM, ids: list[int], visual_inputs: Iterable[Iterable[Tensor]], cache: KVCache, chunk: int | None = None
) -> list[int]:
    """Prefill a prompt up to its last picture; return the ids after it.

    Each chat.IMAGE in `ids` stands for the next of `visual_inputs`: the visual tokens of a picture or a video, in
    chunks x_TD that are prefilled one by one, so that a long video is never in memory as a whole.
    """
    for chunks in visual_inputs:
        if position := ids.index(chat.IMAGE):
            prefill(model, model.embed(torch.tensor([ids[:position]], device=model.device)), cache, chunk)
        for x_TD in chunks:
            prefill(model, x_TD[None], cache, chunk)
        ids = ids[position + 1 :]
    return ids


@torch.inference_mode()
def next_logits(model: LM, x_1TD: Tensor, cache: KVCache, chunk: int | None) -> Tensor:
    """Append embedded tokens to the cache; logits_V of the token that follows them."""
    return model.logits(prefill(model, x_1TD, cache, chunk)[:, -1:])[0, 0]


def greedy(logits_V: Tensor, generated: list[int]) -> int:
    """The id with the highest logit."""
    return logits_V.argmax().item()


def generate(
    model: LM,
    x_1TD: Tensor,
    cache: KVCache,
    stop_ids: Iterable[int],
    max_tokens: int = 256,
    sample: Callable[[Tensor, list[int]], int] = greedy,
    chunk: int | None = None,
) -> Iterator[int]:
    """Generate the ids that follow the cache and the embedded tokens x_1TD, one by one.

    Ends after `max_tokens`, or before a stop id; the cache then contains everything that was generated. `sample`
    chooses an id from the last position's logits and the ids generated so far (config.sample).
    """
    stop, generated = set(stop_ids), []
    while len(generated) < max_tokens:
        token = sample(next_logits(model, x_1TD, cache, chunk), generated)
        if token in stop:
            return
        generated.append(token)
        yield token
        x_1TD = model.embed(torch.tensor([[token]], device=x_1TD.device))
    prefill(model, x_1TD, cache, chunk)  # the last token too, for the next question


# ---- machinery: weights --------------------------------------------------------------------------


def save(
    folder: Path, stream: Iterable[tuple[str, Tensor]], config: LMConfig | LongVAConfig, tokenizer_folder: Path
) -> None:
    """Write a model folder in bfloat16 from a stream of weights, with the tokenizer of another folder."""
    weights.copy_tokenizer(tokenizer_folder, folder)
    weights.write(folder, stream, to_dict(config), dtype=torch.bfloat16)


def load(folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LM:
    """The model of a folder, ready to generate: an LM, or a LongVA where config.json describes a vision tower.

    dtype: of the parameters; None takes bfloat16 on a GPU and float32 elsewhere, whatever the file holds.
    Raises ValueError if a file is missing, or a tensor is missing, unknown or of another shape.
    """
    config = read_config(folder)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = LM(config) if isinstance(config, LMConfig) else LongVA(config)
    model.to(dtype).to_empty(device=device).tie()
    fill_from(model, weights.read(folder))
    model.folder = Path(folder)
    return model.eval().requires_grad_(False)


# ---- main ----------------------------------------------------------------------------------------

TINY_MODEL = runs.TINY / "longva"
QUESTION = "What is in the picture?"
CHAT = 4096  # tokens of cache space reserved for a chat
PROMPT = 64  # tokens of a chat template, about


@dataclass(frozen=True)
class Config:
    """Ask LongVA about pictures or a video, once or in a chat; torchrun shards the KV cache over its processes."""

    question: str | None = setting(None, f"the question (ours) [{QUESTION}]", positional=True)
    image: tuple[Path, ...] = setting((), "picture files (ours)")
    video: Path | None = setting(None, "a video file, or a folder of pictures (ours)")
    frames: int = setting(32, "frames taken evenly from the video (Table 4: 8 to 384)")
    fps: float | None = setting(None, "sample this many frames per second instead of --frames (Sec. 4: 1)")
    weights: Path = setting(TINY_MODEL, "model folder (ours)")
    chat: bool = setting(False, "read more questions about the same input from stdin (ours)")
    template: str | None = setting(
        None, "chat template; none: the one that fits the tokenizer (release: conversation.py)"
    )
    max_tokens: int = setting(256, "tokens of an answer, at most (ours)")
    temperature: float | None = setting(
        None, "0 takes the most probable token; none: generation_config.json's (release)"
    )
    top_p: float | None = setting(None, "sample from the most probable tokens with this sum; none: as above (release)")
    top_k: int | None = setting(None, "sample from this many most probable tokens, 0: all; none: as above (release)")
    repetition_penalty: float | None = setting(None, "penalty on tokens of the answer so far; none: as above (release)")
    seed: int = setting(0, "random seed for sampling (ours)")
    batch: int = setting(32, "frames per call of the vision tower (ours)")
    chunk: int | None = setting(None, "tokens per prefill chunk; none: 2048 on a CPU, 4608 on a GPU (ours)")
    plan: bool = setting(False, "print the memory needed and the most frames that fit; load nothing (ours)")
    dtype: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "of weights and cache; auto: bf16 on a GPU, else fp32 (ours)"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, frames=1, max_tokens=1, batch=1, chunk=1, seed=0)
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"--fps {self.fps} makes no sense; give a positive number of frames per second")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed} is too large; give a number below 2**63")
        if os.path.isfile(self.question or ""):
            raise ValueError(f"{self.question} is a file where the question should stand; write --image before each")
        if self.video and self.image:
            raise ValueError("give either --image FILE ... or --video FILE to look at: one of them, not both")


def log_stderr(world: ring.World, text: str) -> None:
    """Print on rank 0, to stderr: stdout has the answers alone."""
    if world.rank == 0:
        print(text, file=sys.stderr, flush=True)


def progress(chunks: Iterable[Tensor], frames: int, M: int) -> Iterator[Tensor]:
    """Pass a video's visual tokens on; the bar advances when a chunk has been prefilled."""
    with tqdm(total=frames, unit="frame") as bar:
        for x_TD in chunks:
            yield x_TD
            bar.update(len(x_TD) // M)


def open_video(cfg: Config, world: ring.World) -> video.Frames:
    """This rank's frames of the video: rank r encodes every R-th group of --batch frames."""
    rate = {"fps": cfg.fps} if cfg.fps else {"count": cfg.frames}
    return video.frames(cfg.video, **rate, keep=lambda i: i // cfg.batch % world.ranks == world.rank)


def encode_inputs(
    cfg: Config, model: LongVA, pictures: Sequence[unires.Picture], frames: video.Frames | None, world: ring.World
) -> tuple[list[Iterable[Tensor]], int]:
    """Visual tokens as `prefill_prompt` takes them, and their number (at most)."""
    if frames is None:
        cut = [preprocess(picture, model.config) for picture in pictures]
        visual_tokens = [model.encode_images(pixels_NCYX, [layout]) for pixels_NCYX, layout in cut]
        return [[x_TD] for x_TD in visual_tokens], sum(map(len, visual_tokens))
    M = model.config.vision.tokens_per_grid
    grids = (unires.frame(picture, model.config.vision.side, "crop") for _, picture in frames)
    local = encode_video(model, video.prefetch(grids, 2 * cfg.batch), cfg.batch)
    chunks = ring.gather_round_robin(local, model.lm_head.weight[:0], cfg.batch * M, world)
    return [chunks if world.rank else progress(chunks, frames.total, M)], frames.total * M


def new_cache(model: LM, S: int, world: ring.World) -> KVCache | ring.ShardedCache:
    """An empty cache for S tokens, sharded where there are several ranks."""
    lm, reference = model.model.config, model.lm_head.weight
    needed = memory.cache_bytes(lm, S, reference.itemsize) // world.ranks
    free = runs.free_bytes(world.device.type, world.ranks)
    if needed > free:
        gb = f"{needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB can be had"
        raise ValueError(f"{S:,} tokens take {gb}; give fewer --frames or --max-tokens (see --plan)")
    if world.ranks == 1:
        return KVCache(lm, 1, S, reference)
    return ring.ShardedCache(world, lm.num_hidden_layers, 1, S, lm.num_key_value_heads, lm.head_width, reference)


def questions(cfg: Config, world: ring.World) -> Iterator[str]:
    """The command line's question; then, in a chat, each line of stdin until its end."""
    if cfg.question or not cfg.chat:
        yield cfg.question or QUESTION
    if cfg.chat:
        log_stderr(world, "(one line, one question; Ctrl-D ends)")
    while cfg.chat:
        if world.rank == 0 and sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = ring.broadcast_text(sys.stdin.readline() if world.rank == 0 else "", world)
        if not line:
            return
        if chat.PLACEHOLDER in line:
            log_stderr(
                world,
                f"({chat.PLACEHOLDER} cannot be asked for in a chat: the pictures come before the first question)",
            )
        elif line.strip():
            yield line.strip()


@torch.no_grad()
def answers(cfg: Config, world: ring.World, model: LongVA | None = None) -> Iterator[Iterator[str]]:
    """Encode the pictures or the video once, then answer each question: one stream of text per answer.

    Loads the model of --weights unless given, after all else, so that a user's mistake shows at once.
    """
    if isinstance(read_config(cfg.weights), LongVAConfig) != bool(cfg.video or cfg.image):
        blind = f"{cfg.weights} is a language model and cannot see; give a LongVA folder as --weights"
        raise ValueError(blind if cfg.video or cfg.image else "give either --image FILE ... or --video FILE to look at")
    words = tokenizer.load_tokenizer(cfg.weights)
    template = cfg.template or chat.default_template(words)
    chat.get_template(words, template)  # raises for an unknown one
    overrides = {f.name: getattr(cfg, f.name) for f in fields(Sampling) if getattr(cfg, f.name) is not None}
    sampling = replace(read_sampling(cfg.weights), **overrides)
    pictures = [video.read_picture(file) for file in cfg.image]
    frames = open_video(cfg, world) if cfg.video else None
    if model is None:
        model = load(cfg.weights, world.device, {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype))
    if cfg.weights == TINY_MODEL:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        log_stderr(
            world, f"(a toy of {size:.1f} million parameters, trained on synthetic pictures of shapes and digits)"
        )

    # 1. Prefill the prompt up to the end of the pictures or the video.
    visual_inputs, visual_tokens = encode_inputs(cfg, model, pictures, frames, world)
    image_tokens = [1] * len(visual_inputs)  # one id stands for each picture or video, however many tokens it has
    ids = chat.prompt(words, cfg.question or QUESTION, image_tokens, template)
    room = visual_tokens + len(ids) + cfg.max_tokens + (CHAT if cfg.chat else 0)
    cache = new_cache(model, room, world)
    model.model.rope_len = room
    prefill_prompt(model, ids, visual_inputs, cache, cfg.chunk)
    first_turn = cache.mark()
    del visual_inputs, pictures

    # 2. Answer each question; the cache grows by the question and the answer.
    stop = {*words.stop_ids, *stop_ids(cfg.weights)}
    generator, stdin_group = torch.Generator().manual_seed(cfg.seed), ring.long_timeout_group(world)

    def sample_on_rank0(logits_V: Tensor, generated: list[int]) -> int:
        """Rank 0's choice: on unlike machines the logits may differ in the last bit."""
        return int(ring.broadcast_text(str(sample(logits_V, generated, sampling, generator)), stdin_group))

    for question in questions(cfg, stdin_group):
        ids = chat.turn(words, question, image_tokens, template, first=cache.mark() == first_turn)
        left = min(cfg.max_tokens, room - cache.length - len(ids))
        if left < 1:
            log_stderr(world, f"({len(ids)} tokens do not fit in {room - cache.length}; ask shorter, or start again)")
            continue
        x_1TD = model.embed(torch.tensor([ids], device=world.device))
        yield words.stream(generate(model, x_1TD, cache, stop, left, sample_on_rank0, cfg.chunk))


def answer(
    model: LongVA, question: str, images: Sequence[Path | str] = (), video: Path | str | None = None, **settings: Any
) -> str:
    """The answer of a model from `load` about picture files or one video file.

    settings: fields of Config such as frames, max_tokens, temperature. Raises ValueError as the command line does.
    """
    files = {"image": tuple(map(Path, images)), "video": video and Path(video)}
    cfg = Config(question, weights=model.folder, **files, **settings)
    return "".join(next(answers(cfg, ring.World(0, 1, model.device), model)))


@torch.no_grad()
def main(cfg: Config) -> None:
    """Print the answers, or with --plan the memory they need."""
    if cfg.plan:
        text = PROMPT + cfg.max_tokens + (CHAT if cfg.chat else 0)
        device = runs.pick_device(cfg.device)
        short = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device == "cuda")
        sizes = {"b": 2 if short else 4, "chunk": cfg.chunk, "batch": cfg.batch}
        memory.show_answer(read_config(cfg.weights), cfg.frames, text, device, **sizes)
        return
    world = ring.start(cfg.device)
    for stream in answers(cfg, world):
        for piece in stream:
            ring.print0(world, piece, end="")
        ring.print0(world, "")
    ring.stop()


if __name__ == "__main__":
    run(main, Config)
