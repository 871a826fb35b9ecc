"""LongVA: a Qwen2 decoder that reads text and pictures, and answers questions about them.

What      The language model (Sec. 3.1), the projector that lets it see (Sec. 3.2), loading, saving, answering.
Paper     "Long Context Transfer from Language to Vision", arXiv 2406.16852, Sec. 3; Qwen2, arXiv 2407.10671.
Run       python longva.py "What is in the picture?" --image PICTURE.jpg
          python longva.py "Which number is on the star?" --video FILM.mp4 --frames 64
Key       B batch            T tokens held here     S tokens of the whole sequence
          D width            H query heads          G key/value heads      K head width
          F MLP width        V vocabulary           L layers
          N grids = frames   P patches per grid     M tokens per grid      E CLIP width
          C colours, Y X pixels   I visual tokens   U a chunk of tokens   J = K/2   R = H/G   1 broadcast
Deviates  bfloat16, never float16: Qwen2's activations overflow float16 (the release's "!!!!" answers).
          All 152,064 rows of the embedding are kept; the release cuts them to the tokenizer's length.

The decoder asks one question of the outside, `attend(layer, q, k, v)`. Causal attention, a cache, a ring over many
machines are answers to it; the decoder knows of no mask, no cache and no rank. (Only the script at the end of this file
does: `ring` is imported for it.)
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ring
import unires
from clip import ClipVision
from data import chat, memory, runs, tokenizer, video, weights
from data.config import LMConfig, LongVAConfig, Sampling, read_config, read_sampling, sample, stop_ids, to_dict
from data.flags import at_least, run, setting
from data.offload import ActivationOffload
from data.weights import fill_from

CHUNK = {"cpu": 2048, "cuda": 4608}  # tokens read at once: on a CPU they have a mask; on a GPU it is 32 frames
LOSS_CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once: 2048 of Qwen2-7B are 0.6 GB in bf16
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q_BTHK, k_BTGK, v_BTGK) -> o_BTHK


# ----------------------------------------------------------------------------------------- pure functions


def rope(pos_T: Tensor, K: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, for `rotate`: float32 (cos_TK, sin_TK) from integer positions.

    The product of position and frequency is exact enough only in float32: bfloat16 cannot even hold 257.
    """
    frequency_J = 1.0 / theta ** (torch.arange(0, K, 2, device=pos_T.device, dtype=torch.int64).float() / K)
    angle_TJ = pos_T.float()[:, None] * frequency_J
    cos_TJ, sin_TJ = angle_TJ.cos(), angle_TJ.sin()
    return torch.cat([cos_TJ, cos_TJ], dim=-1), torch.cat([-sin_TJ, sin_TJ], dim=-1)


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate each pair of numbers (a, b) = (i, i + K/2) of every head by its position's angle (RoPE).

    a cos - b sin, b cos + a sin: the roll swaps a and b, and the minus is in sin_T1K. Four kernels on a GPU, not six.
    """
    swapped_BTHK = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    return x_BTHK * cos_T1K + swapped_BTHK * sin_T1K


def causal_attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attend to the tokens at hand: each sees itself and those before it. Query head h reads key head h*G//H."""
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    o_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    return o_BHTK.transpose(1, 2)


def attend_to_past(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
    """Attention of the last T of S positions, each to the keys up to its own; no gradient.

    With one query no mask is needed: the query heads that share a key head become rows, and each key is read once.
    On a GPU FlashAttention is called by its own name, for scaled_dot_product_attention may take cuDNN's kernel, which
    makes a plan for each new S (some 50 ms a token); its causal mask is aligned to the last key.
    """
    T, S, G = q_BTHK.shape[1], *k_BSGK.shape[1:3]
    rows = (
        q_BTHK.unflatten(2, (G, -1)).squeeze(1).transpose(1, 2) if T == 1 else q_BTHK
    )  # [B, H / G, G, K] for one query
    if q_BTHK.is_cuda and q_BTHK.dtype.itemsize == 2:  # it takes bfloat16 and float16
        given = rows, k_BSGK, v_BSGK, None, None, rows.shape[1], S, 0.0, T > 1, False
        o = torch.ops.aten._flash_attention_forward(*given)[0].transpose(1, 2)
    else:
        heads_first = [x.transpose(1, 2) for x in (rows, k_BSGK, v_BSGK)]
        mask = causal_lower_right(T, S) if T > 1 else None
        o = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=T > 1)
    return o.flatten(1, 2).unsqueeze(1) if T == 1 else o.transpose(1, 2)


class KVCache:
    """Keys and values of what was read so far; `attend` adds to them and sees them all.

    Room for S tokens is taken once. ring.ShardedCache, spread over many processes, answers to the same `length`,
    `pieces`, `attend`, `mark` and `rewind`.
    """

    def __init__(self, config: LMConfig, B: int, S: int, like: Tensor):
        self.config, self.length, self.room = config, 0, S
        self.kv = like.new_empty(  # keys, then values, of each layer
            2, config.num_hidden_layers, B, S, config.num_key_value_heads, config.head_width
        )

    def pieces(self, T: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """How to read T more tokens: slices of at most `chunk`, and which places of each are computed here (all)."""
        for start in range(0, T, chunk):
            stop = min(start + chunk, T)
            yield slice(start, stop), torch.arange(stop - start, device=self.kv.device)

    def mark(self) -> int:
        """A bookmark for `rewind`."""
        return self.length

    def rewind(self, mark: int) -> None:
        """Forget what was read after the mark: it will be overwritten."""
        self.length = mark

    def branch(self, length: int, B: int, room: int) -> "KVCache":
        """A new cache of B rows that all begin with this one's first `length` tokens, with room for more."""
        new = KVCache(self.config, B, length + room, self.kv)
        new.kv[:, :, :, :length] = self.kv[:, :, :, :length]
        new.length = length
        return new

    def attend(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Remember this call's keys and values, then attend causally to everything remembered."""
        start, stop = self.length, self.length + q_BTHK.shape[1]
        assert stop <= self.room, f"a cache for {self.room} tokens cannot hold {stop}"
        self.kv[0, layer, :, start:stop], self.kv[1, layer, :, start:stop] = k_BTGK, v_BTGK
        if layer == self.kv.shape[1] - 1:
            self.length = stop
        if start == 0 and not q_BTHK.is_cuda:
            return causal_attend(layer, q_BTHK, k_BTGK, v_BTGK)  # without a mask in memory
        return attend_to_past(q_BTHK, *self.kv[:, layer, :, :stop])


class ChunkedNLL(torch.autograd.Function):
    """Head and cross-entropy over `chunk` positions at a time, so that no step ever holds all the logits.

    At 224,000 tokens the logits alone are 68 GB in bfloat16: the limit the paper ran into. A chunk's gradients are
    made while its logits are there, for positions of equal weight. Backward scales them; only where weights differ,
    as in DPO, it makes the logits again.
    """

    @staticmethod
    def sweep(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weight_N: Tensor, chunk: int, learns: tuple) -> tuple:
        """Negative log-likelihoods, and the gradients of their weighted sum where asked for: (nll_N, dh_ND, dhead_VD).

        The head's gradient adds up in float32, 2.2 GB at Qwen2-7B's size. All chunks' logits take one memory: fresh
        pages would cost a CPU as much time as the softmax.
        """
        nll_N, dh_ND = torch.empty_like(weight_N), torch.empty_like(h_ND) if any(learns) else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if learns[1] else None
        room = h_ND.new_empty(min(chunk, len(h_ND)), len(head_VD))
        for i in range(0, len(h_ND), chunk):
            h_UD, target_U1, weight_U1 = (x[i : i + chunk] for x in (h_ND, targets_N[:, None], weight_N[:, None]))
            logits_UV = torch.mm(h_UD, head_VD.T, out=room[: len(h_UD)]).float()
            said_U1, top_U1 = logits_UV.gather(1, target_U1), logits_UV.amax(1, keepdim=True)
            sum_U1 = logits_UV.sub_(top_U1).exp_().sum(1, keepdim=True)
            nll_N[i : i + chunk] = (sum_U1.log() + top_U1 - said_U1)[:, 0]
            if any(learns):  # softmax minus one-hot
                p_UV = logits_UV.mul_(weight_U1 / sum_U1).scatter_add_(1, target_U1, -weight_U1).to(h_ND.dtype)
                torch.mm(p_UV, head_VD, out=dh_ND[i : i + chunk])
            if learns[1] and p_UV.dtype == torch.float32:
                dhead_VD.addmm_(p_UV.T, h_UD)
            elif learns[1] and p_UV.is_cuda:  # adds up in float32, without a rounded product in between
                torch.ops.aten.addmm.dtype_out(dhead_VD, p_UV.T, h_UD, torch.float32, out=dhead_VD)
            elif learns[1]:
                dhead_VD += p_UV.T @ h_UD
        return nll_N, dh_ND, dhead_VD

    @staticmethod
    def forward(ctx, h_ND, head_VD, targets_N, chunk, learns):  # noqa: ANN001
        """Negative log-likelihood of every position, float32[N]; does h, does the head learn?"""
        ones_N = torch.ones_like(targets_N, dtype=torch.float32)
        nll_N, *ctx.made = ChunkedNLL.sweep(h_ND, head_VD, targets_N, ones_N, chunk, learns)
        ctx.save_for_backward(h_ND, head_VD, targets_N)
        ctx.rest = chunk, learns
        return nll_N

    @staticmethod
    def backward(ctx, grad_N):  # noqa: ANN001
        """What forward made, scaled, where all positions weigh the same."""
        weight, inputs = grad_N[:1].sum(), ctx.saved_tensors
        made, ctx.made = ctx.made, None  # a second backward must not scale them twice
        if made and (grad_N == weight).all():
            dh_ND, dhead_VD = (x if x is None else x.mul_(weight) for x in made)
        else:
            _, dh_ND, dhead_VD = ChunkedNLL.sweep(*inputs, grad_N, *ctx.rest)
        return dh_ND, None if dhead_VD is None else dhead_VD.to(inputs[1].dtype), None, None, None


def nll(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of targets of each row, float32 (nll_B, count_B).

    A target of -100 counts nothing and costs nothing: its logits are never computed. `chunk`: see LOSS_CHUNK.
    """
    chunk = chunk or LOSS_CHUNK[h_BTD.device.type]
    wanted_BT = targets_BT != chat.IGNORE
    row_N = wanted_BT.nonzero()[:, 0]
    learns = tuple(torch.is_grad_enabled() and x.requires_grad for x in (h_BTD, head_VD))
    nll_N = ChunkedNLL.apply(h_BTD[wanted_BT], head_VD, targets_BT[wanted_BT], chunk, learns)
    nll_B = nll_N.new_zeros(len(targets_BT)).index_add(0, row_N, nll_N)
    return nll_B, wanted_BT.sum(1).float()


@torch.no_grad()
def count_correct(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """How many targets of each row are the likeliest token of their place, and how many there are, float32[B] both."""
    wanted_BT = targets_BT != chat.IGNORE
    likeliest_N = [(h @ head_VD.T).argmax(-1) for h in h_BTD[wanted_BT].split(chunk)]
    hit_BT = torch.zeros_like(wanted_BT)
    hit_BT[wanted_BT] = torch.cat([targets_BT[:0, 0], *likeliest_N]) == targets_BT[wanted_BT]
    return hit_BT.sum(1).float(), wanted_BT.sum(1).float()


# ------------------------------------------------------------------------------------------------ modules


def recompute(on: bool, f: Callable, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """f(*x); where `on`, by activation checkpointing: only x is saved, and backward computes f(*x) again."""
    if not on or not torch.is_grad_enabled():
        return f(*x)
    return checkpoint(f, *x, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn at random


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, and scale."""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise in float32, x / sqrt(mean(x^2) + eps), cast back, then scale: Qwen2's order."""
        return self.weight * F.rms_norm(x_BTD, x_BTD.shape[-1:], None, self.eps)


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

    def qkv(self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two turned by position: (q_BTHK, k_BTGK, v_BTGK)."""
        q_BTHK = rotate(self.q_proj(x_BTD).unflatten(-1, (-1, self.K)), cos_T1K, sin_T1K)
        k_BTGK = rotate(self.k_proj(x_BTD).unflatten(-1, (-1, self.K)), cos_T1K, sin_T1K)
        return q_BTHK, k_BTGK, self.v_proj(x_BTD).unflatten(-1, (-1, self.K))


class MLP(nn.Module):
    """SwiGLU. Set `tile` to compute so many tokens at a time: for a long sequence F-wide tensors outgrow all else."""

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
        """As `swiglu`, whose inner tensors then exist for one tile at a time, in backward too: x_BTD."""
        if not self.tile or x_BTD.shape[1] <= self.tile:
            return self.swiglu(x_BTD)
        return torch.cat([recompute(True, self.swiglu, x_BUD) for x_BUD in x_BTD.split(self.tile, dim=1)], dim=1)


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
        """The residual stream x_BTD after this layer.

        `selective` checkpointing saves attention's inputs and output, the dearest to compute, and recomputes the rest.
        """

        def before_attention(x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.self_attn.qkv(self.input_layernorm(x_BTD), cos_T1K, sin_T1K)

        def after_attention(x_BTD: Tensor, o_BTHK: Tensor) -> Tensor:
            x_BTD = x_BTD + self.self_attn.o_proj(o_BTHK.flatten(-2))
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

        q_BTHK, k_BTGK, v_BTGK = recompute(selective, before_attention, x_BTD)
        o_BTHK = attend(self.self_attn.layer, q_BTHK, k_BTGK, v_BTGK)
        return recompute(selective, after_attention, x_BTD, o_BTHK)


class Decoder(nn.Module):
    """Qwen2 between embedding and head."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = "none"  # "full": one hidden state per layer is saved; "selective": see Block.forward
        self.offload_activations = False  # what is saved for backward waits in CPU memory

    def forward(self, x_BTD: Tensor, pos_T: Tensor, attend: Attend = causal_attend) -> Tensor:
        """Hidden states h_BTD; `pos_T` is each token's place in the whole sequence, wherever it is held."""
        turn = rope(pos_T, self.config.head_width, self.config.rope_theta)
        cos_T1K, sin_T1K = (angle_TK[:, None].to(x_BTD.dtype) for angle_TK in turn)
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

    def embed(self, ids_BT: Tensor, seen_ID: Tensor | None = None, place_I: Tensor | None = None) -> Tensor:
        """Embeddings x_BTD; the places of chat.IMAGE take the rows of `seen_ID`, in order.

        `place_I`: these places in the flattened batch; without it a GPU is asked for them and has to be waited for.
        """
        image_BT = ids_BT == chat.IMAGE
        x_BTD = self.model.embed_tokens(ids_BT.masked_fill(image_BT, 0))
        if seen_ID is None:
            return x_BTD
        place_I = image_BT.flatten().nonzero()[:, 0] if place_I is None else place_I
        return x_BTD.flatten(0, 1).index_copy(0, place_I, seen_ID.to(x_BTD.dtype)).view_as(x_BTD)

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, float32[B, T, V]; ask for few positions only."""
        return self.lm_head(h_BTD).float()

    def forward(
        self,
        ids_BT: Tensor,
        pos_T: Tensor,
        targets_BT: Tensor,
        attend: Attend = causal_attend,
        score: Callable[[Tensor, Tensor, Tensor], tuple] = nll,
    ) -> tuple:
        """The training question: (nll_B, count_B), summed over this call's places with a target; or another `score`."""
        h_BTD = self.model(self.embed(ids_BT), pos_T, attend)
        return score(h_BTD, self.lm_head.weight, targets_BT)


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

    def encode_images(self, pixels_NCYX: Tensor, layout: list[unires.Layout]) -> Tensor:
        """Turn the grids of any number of pictures and videos into visual tokens x_ID, in order.

        Pixels are uint8, or floating and normalised already. `layout` tells how many grids each picture has and how
        they lie. The tower is called once, whatever the number of grids, because ranks that share its parameters must
        call it equally often.
        """
        like = self.model.mm_projector[0].weight
        pixels_NCYX = pixels_NCYX.to(like.device)
        if pixels_NCYX.dtype == torch.uint8:
            pixels_NCYX = unires.normalise(pixels_NCYX)
        z_NPE = self.tower(pixels_NCYX.to(like.dtype))
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
        row_I: Tensor | None = None,
        place_I: Tensor | None = None,
    ) -> tuple:
        """The training question, as LM.forward, with pictures in the places of chat.IMAGE.

        `row_I`: which of the visual tokens goes where, if not once each and in order (unires.UniqueGrids).
        `place_I`: where, as for `embed`.
        """
        seen_ID = self.encode_images(pixels_NCYX, layout)
        seen_ID = seen_ID if row_I is None else seen_ID[row_I]
        h_BTD = self.model(self.embed(ids_BT, seen_ID, place_I), pos_T, attend)
        return nll(h_BTD, self.lm_head.weight, targets_BT)


# ----------------------------------------------------------------------------------------- weights in and out


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


def encode_video(model: LongVA, frames: Iterable[Tensor], batch: int = 32) -> Iterator[Tensor]:
    """Visual tokens x_TD of a video's frames (unires.frame: pixels_CYX), `batch` of them at a time, as they come."""
    frames = iter(frames)
    while held := list(islice(frames, batch)):
        yield model.encode_images(unires.upload(torch.stack(held), model.device), [unires.Layout(1, len(held))])


def preprocess(
    picture: unires.Picture, config: LongVAConfig, limit: int = unires.LIMIT
) -> tuple[Tensor, unires.Layout]:
    """A picture as (pixels_NCYX, layout), cut as this model was taught to see."""
    return unires.preprocess(picture, config.vision.side, config.rule, limit, config.scheme)


@torch.inference_mode()
def prefill(model: LM, x_BTD: Tensor, cache: KVCache, chunk: int | None = None) -> Tensor:
    """Read embedded tokens behind what `cache` holds, `chunk` at a time; the hidden states of the last piece."""
    chunk = chunk or CHUNK[x_BTD.device.type]
    for here, idx_U in cache.pieces(x_BTD.shape[1], chunk):
        h_BUD = model.model(x_BTD[:, here][:, idx_U], cache.length + idx_U, cache.attend)
    return h_BUD


def prefill_prompt(
    model: LM, ids: list[int], shown: Iterable[Iterable[Tensor]], cache: KVCache, chunk: int | None = None
) -> list[int]:
    """Read a prompt up to its last picture; the ids that follow it, which are still to be read.

    Each chat.IMAGE in `ids` stands for the next of `shown`: a picture's or a video's visual tokens x_TD, in parts
    that are read as they come, so that a long video is never held as a whole.
    """
    for parts in shown:
        if place := ids.index(chat.IMAGE):
            prefill(model, model.embed(torch.tensor([ids[:place]], device=model.device)), cache, chunk)
        for x_TD in parts:
            prefill(model, x_TD[None], cache, chunk)
        ids = ids[place + 1 :]
    return ids


@torch.inference_mode()
def next_logits(model: LM, x_1TD: Tensor, cache: KVCache, chunk: int | None) -> Tensor:
    """Read embedded tokens behind what `cache` holds; logits_V of what comes next."""
    return model.logits(prefill(model, x_1TD, cache, chunk)[:, -1:])[0, 0]


def greedy(logits_V: Tensor, said: list[int]) -> int:
    """The likeliest id."""
    return logits_V.argmax().item()


def generate(
    model: LM,
    x_1TD: Tensor,
    cache: KVCache,
    stop_ids: Iterable[int],
    max_tokens: int = 256,
    pick: Callable[[Tensor, list[int]], int] = greedy,
    chunk: int | None = None,
) -> Iterator[int]:
    """Answer embedded tokens that follow what `cache` holds, id by id as they are found.

    Ends after `max_tokens`, or before a stop id; when it has ended, the cache holds all that was said. Only the
    last position is ever given logits; `pick` chooses by them and by the ids said so far (config.sample).
    """
    stop, said = set(stop_ids), []
    while len(said) < max_tokens:
        best = pick(next_logits(model, x_1TD, cache, chunk), said)
        if best in stop:
            return
        said.append(best)
        yield best
        x_1TD = model.embed(torch.tensor([[best]], device=x_1TD.device))
    prefill(model, x_1TD, cache, chunk)  # a next question must find the answer's last word, too


# ----------------------------------------------------------------------------------------------------- main

TINY_MODEL = runs.TINY / "longva"
QUESTION = "What is in the picture?"
CHAT = 4096  # tokens of room for what is said in a chat
PROMPT = 64  # tokens of a chat template, about


@dataclass(frozen=True)
class Config:
    """Ask LongVA about pictures or a video, once or in a chat; under torchrun its memory is spread over all ranks."""

    question: str | None = setting(None, f"what to ask (ours) [{QUESTION}]", positional=True)
    image: tuple[Path, ...] = setting((), "picture files (ours)")
    video: Path | None = setting(None, "a video file, or a folder of pictures (ours)")
    frames: int = setting(32, "frames taken evenly from the video (Table 4: 8 to 384)")
    fps: float | None = setting(None, "frames per second instead, of however long a video (Sec. 4: 1)")
    weights: Path = setting(TINY_MODEL, "model folder (ours)")
    chat: bool = setting(False, "go on asking, line by line, about the same film (ours)")
    template: str | None = setting(
        None, "chat template; none: the one that fits the tokenizer (release: conversation.py)"
    )
    max_tokens: int = setting(256, "tokens of an answer, at most (ours)")
    temperature: float | None = setting(None, "0 takes the best token; none: generation_config.json's (release)")
    top_p: float | None = setting(None, "draw from the likeliest tokens of this sum; none: the folder's (release)")
    top_k: int | None = setting(None, "draw from so many of the likeliest, 0: all; none: the folder's (release)")
    repetition_penalty: float | None = setting(None, "on tokens of the answer so far; none: the folder's (release)")
    seed: int = setting(0, "of what is drawn (ours)")
    batch: int = setting(32, "frames that the tower sees at once (ours)")
    chunk: int | None = setting(None, "tokens read at once; none: 2048 on a CPU, 4608 on a GPU (ours)")
    plan: bool = setting(
        False, "print the memory that this would take, and the most frames that fit; load nothing (ours)"
    )
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


def progress(parts: Iterable[Tensor], frames: int, M: int) -> Iterator[Tensor]:
    """A film's visual tokens as they come; the bar moves on when a part has been read."""
    tokens = 0
    with tqdm(total=frames, unit="frame") as bar:
        for x_TD in parts:
            yield x_TD
            tokens += len(x_TD)
            bar.update(len(x_TD) // M)
            bar.set_postfix(tokens_per_s=f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f}")


def open_film(cfg: Config, world: ring.World) -> video.Frames:
    """This rank's frames of the film: blocks of --batch go round the ranks."""
    rate = {"fps": cfg.fps} if cfg.fps else {"count": cfg.frames}
    return video.frames(cfg.video, **rate, keep=lambda i: i // cfg.batch % world.ranks == world.rank)


def look(
    cfg: Config, model: LongVA, pictures: list[Image], film: video.Frames | None, world: ring.World
) -> tuple[list[Iterable[Tensor]], int]:
    """What is shown, as read_prompt wants it, and how many tokens it is at most."""
    if film is None:
        seen = [
            model.encode_images(pixels, [how])
            for pixels, how in (preprocess(picture, model.config) for picture in pictures)
        ]
        return [[x_TD] for x_TD in seen], sum(map(len, seen))
    M = model.config.vision.tokens_per_grid
    grids = (unires.frame(picture, model.config.vision.side, "crop") for _, picture in film)
    mine = encode_video(model, video.prefetch(grids, 2 * cfg.batch), cfg.batch)
    parts = ring.gather_round_robin(mine, model.lm_head.weight[:0], cfg.batch * M, world)
    return [parts if world.rank else progress(parts, film.total, M)], film.total * M


def new_cache(model: LM, S: int, world: ring.World) -> KVCache | ring.ShardedCache:
    """An empty cache for S tokens: here, or spread over the ranks."""
    lm, like = model.model.config, model.lm_head.weight
    needed, free = (
        memory.cache_bytes(lm, S, like.itemsize) // world.ranks,
        runs.free_bytes(world.device.type, world.ranks),
    )
    if needed > free:
        gb = f"{needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB can be had"
        raise ValueError(f"{S:,} tokens take {gb}; give fewer --frames or --max-tokens (see --plan)")
    if world.ranks == 1:
        return KVCache(lm, 1, S, like)
    return ring.ShardedCache(world, lm.num_hidden_layers, 1, S, lm.num_key_value_heads, lm.head_width, like)


def note(world: ring.World, text: str) -> None:
    """Tell what is no answer: on rank 0, beside the output."""
    if world.rank == 0:
        print(text, file=sys.stderr, flush=True)


def questions(cfg: Config, world: ring.World) -> Iterator[str]:
    """The question of the command line; then, in a chat, each line that is typed until there are no more."""
    if cfg.question or not cfg.chat:
        yield cfg.question or QUESTION
    if cfg.chat:
        note(world, "(one line, one question; Ctrl-D ends)")
    while cfg.chat:
        if world.rank == 0 and sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = ring.broadcast_text(sys.stdin.readline() if world.rank == 0 else "", world)
        if not line:
            return
        if chat.PLACEHOLDER in line:
            note(world, f"({chat.PLACEHOLDER} cannot be asked for in a chat: what is shown was read before)")
        elif line.strip():
            yield line.strip()


@torch.no_grad()
def main(cfg: Config) -> None:
    """Look once, then answer each question as it comes."""
    config = read_config(cfg.weights)
    if cfg.plan:
        text = PROMPT + cfg.max_tokens + (CHAT if cfg.chat else 0)
        device = runs.pick_device(cfg.device)
        short = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device == "cuda")
        memory.show_answer(config, cfg.frames, text, device, b=2 if short else 4, chunk=cfg.chunk, batch=cfg.batch)
        return
    if isinstance(config, LongVAConfig) != bool(cfg.video or cfg.image):
        blind = f"{cfg.weights} is a language model and cannot see; give a LongVA folder as --weights"
        raise ValueError(blind if cfg.video or cfg.image else "give either --image FILE ... or --video FILE to look at")
    world = ring.start(cfg.device)
    words = tokenizer.load_tokenizer(cfg.weights)
    template = cfg.template or chat.default_template(words)
    chat.get_template(words, template)  # like all that follows, before the model: a mistake shows at once
    wanted = {f.name: getattr(cfg, f.name) for f in fields(Sampling) if getattr(cfg, f.name) is not None}
    how = replace(read_sampling(cfg.weights), **wanted)
    pictures = [video.read_picture(file) for file in cfg.image]
    film = open_film(cfg, world) if cfg.video else None
    model = load(cfg.weights, world.device, {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype))
    if cfg.weights == TINY_MODEL:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        note(world, f"(a toy of {size:.1f} million parameters, trained on synthetic pictures of shapes and digits)")

    # 1 look, once
    shown, tokens = look(cfg, model, pictures, film, world)
    places = [1] * len(shown)  # one id stands for each picture or film, however many tokens it has
    ids = chat.prompt(words, cfg.question or QUESTION, places, template)
    room = tokens + len(ids) + cfg.max_tokens + (CHAT if cfg.chat else 0)
    cache = new_cache(model, room, world)
    prefill_prompt(model, ids, shown, cache, cfg.chunk)  # up to the last picture; chat.turn gives what follows it
    begin = cache.mark()
    del shown, pictures

    # 2 answer, as often as asked
    stop = {*words.stop_ids, *stop_ids(cfg.weights)}
    dice, typing = torch.Generator().manual_seed(cfg.seed), ring.long_timeout_group(world)

    def pick(logits_V: Tensor, said: list[int]) -> int:
        """Rank 0's choice: ranks on unlike machines may differ in a last bit."""
        return int(ring.broadcast_text(str(sample(logits_V, said, how, dice)), typing))

    for text in questions(cfg, typing):
        ids = chat.turn(words, text, places, template, first=cache.mark() == begin)
        left = min(cfg.max_tokens, room - cache.length - len(ids))
        if left < 1:
            note(world, f"({len(ids)} tokens do not fit in {room - cache.length}; ask shorter, or start again)")
            continue
        x_1TD = model.embed(torch.tensor([ids], device=world.device))
        for piece in words.stream(generate(model, x_1TD, cache, stop, left, pick, cfg.chunk)):
            ring.print0(world, piece, end="")
        ring.print0(world, "")
    ring.stop()


if __name__ == "__main__":
    run(main, Config)
