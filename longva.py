"""LongVA: a Qwen2 decoder that reads text, pictures and videos, and answers questions about them.

What      The language model (Sec. 3.1), the projector from CLIP to it (Sec. 3.2), loading, saving, generation. The
          decoder computes q, k, v and calls `attend(layer, q, k, v)`: causal attention, a KV cache and a ring of
          processes implement it, so the model contains no mask, no cache and no rank.
Paper     "Long Context Transfer from Language to Vision", arXiv 2406.16852, Sec. 3; Qwen2, arXiv 2407.10671.
Run       python longva.py "Which number is on the star?" --image assets/star.png
          python longva.py "Which number is on the house?" --video assets/film.mp4 --frames 64
          python longva.py "What happens?" --weights LongVA-7B --video FILM.mp4 --fps 1 --chat
          From Python:  model = longva.load("data/tiny/longva")
                        print(longva.answer(model, "Which number is on the house?", video="assets/film.mp4"))
Dimensions  B batch            T tokens held here     S tokens of the whole sequence
          D LM width         H query heads          G key/value heads      K head width
          F MLP width        V vocabulary           L layers
          N grids = frames   P patches per grid     M tokens per grid      E CLIP width
          C colour channels  Y X pixels             0 1 sizes
Differs   bfloat16, never float16: Qwen2's activations overflow float16 (the release's "!!!!" answers).
          All 152,064 rows of the embedding are kept; the release cuts them to the tokenizer's length.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ring
import unires
from clip import ClipVision
from data import chat, memory, runs, tokenizer, video, weights
from data.config import LMConfig, LongVAConfig, RopeScaling, check_size, finite, read_config, sample, stop_ids
from data.flags import model_folder, print0, progress, run
from data.memory_saving import ActivationOffload, best_kernel, nll, recompute

BATCH = 32  # frames of a video per call of the vision tower
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q_BTHK, k_BTGK, v_BTGK) -> o_BTHK

# ---- the language model (Sec. 3.1) ---------------------------------------------------------------


def rope(pos_T: Tensor, K: int, theta: float, scaling: RopeScaling | None = None, S: int = 0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, for `rotate`: float32 (cos_TK, sin_TK) from integer positions.

    Pair j of a head's K numbers turns by theta^(-2j / K) per position; LongVA raises theta to 1e9 (Sec. 3.1). The
    product of position and frequency needs float32: bfloat16 cannot represent even the integer 257.
    """
    theta = scaling.base(theta, K, S) if scaling else theta
    frequency = 1.0 / theta ** (torch.arange(0, K, 2, device=pos_T.device, dtype=torch.int64).float() / K)
    frequency, amplitude = (scaling.scale(frequency, theta), scaling.amplitude) if scaling else (frequency, 1.0)
    angle = pos_T.float()[:, None] * frequency
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

    def forward(self, x_BTD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)); with tiles, its inner tensors exist for one tile at a time, in backward too."""

        def swiglu(x_BTD: Tensor) -> Tensor:
            return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))

        if not self.tile or x_BTD.shape[1] <= self.tile:
            return swiglu(x_BTD)
        return torch.cat([recompute(True, swiglu, tile) for tile in x_BTD.split(self.tile, dim=1)], dim=1)


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

        `selective` checkpointing saves attention's inputs and output, for attention is the dearest to compute; backward
        recomputes what stands before and after it.
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
        self.checkpointing = "none"  # "full": one hidden state per layer is saved; "selective": see Block
        self.offload_activations = False  # keep tensors saved for backward in CPU memory
        self.rope_len = 0  # the length that dynamic NTK assumes, for a prompt in pieces; 0: that of this call

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
            with offload.layer() if offload else nullcontext():  # cos, sin by closure: arguments would be offloaded
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
        """Logits float32[B, T, V]; give few positions only, for V is large. FloatingPointError if one is not finite."""
        return finite(self.lm_head(h_BTD).float())

    def forward(
        self, ids_BT: Tensor, pos_T: Tensor, targets_BT: Tensor, attend: Attend = causal_attend, score: Callable = nll
    ) -> tuple:
        """Training loss (nll_B, count_B) of each row; or what another `score(h_BTD, head_VD, targets_BT)` gives."""
        h_BTD = self.model(self.embed(ids_BT), pos_T, attend)
        return score(h_BTD, self.lm_head.weight, targets_BT)


def plain_nll(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss: each row's summed negative log-likelihood and number of targets, float32 (nll_B, count_B).

    targets_BT[b, t] is the token after t, or -100: ignored. Training calls memory_saving.nll: the same in less memory.
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

    def encode_images(self, pixels_NCYX: Tensor, layouts: list[unires.Layout]) -> Tensor:
        """Encode the grids of any number of pictures and videos: visual tokens [*, D], in order.

        Pixels are uint8, or floating and normalised already. `layouts`: the rows and columns of each picture's
        grids. The tower is called once, also for no grids: ranks that share its parameters must call it equally often.
        """
        weight = self.model.mm_projector[0].weight
        pixels_NCYX = pixels_NCYX.to(weight.device)
        if pixels_NCYX.dtype == torch.uint8:
            pixels_NCYX = unires.normalise(pixels_NCYX)
        z_NPE = self.tower(pixels_NCYX.to(weight.dtype))
        x_NPD = self.model.mm_projector(z_NPE)
        newline_D = getattr(self.model, "image_newline", None)
        parts = x_NPD.split([picture.grids for picture in layouts])
        tokens = [picture.arrange(part, newline_D) for picture, part in zip(layouts, parts)]
        empty = [x_NPD.flatten(0, 1)[:0]]  # no picture at all gives no token
        if newline_D is not None:  # videos have no newline, yet all ranks must use the same parameters
            empty.append(newline_D[None][:0].to(x_NPD.dtype))
        return torch.cat([*empty, *tokens])

    def forward(  # all in one call: sharded parameters are whole only inside the root's forward
        self,
        ids_BT: Tensor,
        pos_T: Tensor,
        targets_BT: Tensor,
        pixels_NCYX: Tensor,
        layouts: list[unires.Layout],
        attend: Attend = causal_attend,
        visual_index: Tensor | None = None,
        positions: Tensor | None = None,
        score: Callable = nll,
    ) -> tuple:
        """Training loss or score as in LM.forward, with visual tokens at the positions of chat.IMAGE.

        `visual_index`: which visual token each position takes; None: each once, in order (see unires.UniqueGrids).
        `positions`: as for `embed`.
        """
        visual_tokens = self.encode_images(pixels_NCYX, layouts)
        visual_tokens = visual_tokens if visual_index is None else visual_tokens[visual_index]
        h_BTD = self.model(self.embed(ids_BT, visual_tokens, positions), pos_T, attend)
        return score(h_BTD, self.lm_head.weight, targets_BT)


# ---- machinery: KV cache, generation, loading ----------------------------------------------------


def attend_to_past(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
    """Attention of the last T of S positions, each to the keys up to its own; no gradient.

    With one query no mask is needed: the query heads that share a key head become rows, and each key is read once.
    On a GPU FlashAttention, whose causal mask is aligned to the last key, is called by its own name, for
    scaled_dot_product_attention may take cuDNN's kernel, which makes a plan for each new S (some 50 ms a token).
    """
    T, S, G = q_BTHK.shape[1], *k_BSGK.shape[1:3]
    rows = q_BTHK if T > 1 else q_BTHK.unflatten(2, (G, -1)).squeeze(1).transpose(1, 2)  # [B, H / G, G, K]
    if best_kernel(q_BTHK) == "cuda":  # half precision, on a GPU that has FlashAttention
        arguments = rows, k_BSGK, v_BSGK, None, None, rows.shape[1], S, 0.0, T > 1, False
        o = torch.ops.aten._flash_attention_forward(*arguments)[0].transpose(1, 2)
    else:
        heads_first = [x.transpose(1, 2) for x in (rows, k_BSGK, v_BSGK)]
        mask = torch.ones(T, S, dtype=torch.bool, device=rows.device).tril(S - T) if 1 < T < S else None
        o = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=T > 1 and T == S, enable_gqa=T > 1)
    return o.flatten(1, 2).unsqueeze(1) if T == 1 else o.transpose(1, 2)


class KVCache:
    """Keys and values of all tokens so far; `attend` appends to them and attends to them all.

    Memory for S tokens is allocated once. Setting `length` back drops the tokens after it: the next ones overwrite
    them. ring.ShardedCache, over processes, has `pieces`, `attend` and `length` too, but that `length` is read-only.
    """

    def __init__(self, config: LMConfig, B: int, S: int, reference: Tensor):
        self.config, self.length, self.room = config, 0, S
        shape = 2, config.num_hidden_layers, B, S, config.num_key_value_heads, config.head_width
        self.kv = reference.new_empty(shape)  # keys, then values, of each layer; dtype and device of `reference`

    def pieces(self, T: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """Split T more tokens into slices of at most `chunk`, each with the indices computed here (all)."""
        for start in range(0, T, chunk):
            stop = min(start + chunk, T)
            yield slice(start, stop), torch.arange(stop - start, device=self.kv.device)

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


def encode_video(model: LongVA, frames: Iterable[Tensor], batch: int = BATCH) -> Iterator[Tensor]:
    """Visual tokens x_TD of a video's frames (unires.frame: pixels_CYX; None: lost), `batch` at a time, lazily."""
    frames = iter(frames)
    while group := list(islice(frames, batch)):
        pixels = [pixels_CYX for pixels_CYX in group if pixels_CYX is not None]
        layout, none_0D = unires.Layout(1, len(pixels)), model.lm_head.weight[:0]
        yield model.encode_images(unires.upload(torch.stack(pixels), model.device), [layout]) if pixels else none_0D


def preprocess(
    picture: unires.Picture, config: LongVAConfig, limit: int = unires.LIMIT
) -> tuple[Tensor, unires.Layout]:
    """A picture as (pixels_NCYX, layout), cut into grids as in this model's training."""
    return unires.preprocess(picture, config.vision.side, config.rule, limit, config.scheme)


@torch.inference_mode()
def prefill(model: LM, x_BTD: Tensor, cache: KVCache, chunk: int | None = None) -> Tensor:
    """Append embedded tokens to the cache, `chunk` at a time; the hidden states of the last piece."""
    chunk = chunk or memory.CHUNK[x_BTD.device.type]
    for piece, index in cache.pieces(x_BTD.shape[1], chunk):
        h = model.model(x_BTD[:, piece][:, index], cache.length + index, cache.attend)
    return h


def prefill_prompt(model: LM, ids: list[int], visual_inputs: Iterable[Iterable[Tensor]], cache: KVCache) -> list[int]:
    """Prefill a prompt up to its last picture; return the ids after it.

    Each chat.IMAGE in `ids` stands for the next of `visual_inputs`: the visual tokens of a picture or a video, in
    chunks x_TD that are prefilled one by one, so that a long video is never in memory as a whole.
    """
    for chunks in visual_inputs:
        if position := ids.index(chat.IMAGE):
            prefill(model, model.embed(torch.tensor([ids[:position]], device=model.device)), cache)
        for x_TD in filter(len, chunks):
            prefill(model, x_TD[None], cache)
        ids = ids[position + 1 :]
    return ids


def generate(
    model: LM,
    x_1TD: Tensor,
    cache: KVCache,
    stop: Container[int],
    max_tokens: int = 256,
    choose: Callable[[Tensor, list[int]], int] | None = None,
) -> Iterator[int]:
    """Generate the ids that follow the cache and the embedded tokens x_1TD, one by one.

    Ends after `max_tokens`, or before a stop id; the cache then contains everything that was generated. `choose`
    picks an id from the last position's logits and the ids generated so far (config.sample); None: the argmax.
    """
    generated = []
    while len(generated) < max_tokens:
        with torch.inference_mode():
            logits_V = model.logits(prefill(model, x_1TD, cache)[:, -1:])[0, 0]
        token = choose(logits_V, generated) if choose else logits_V.argmax().item()
        if token in stop:
            return
        generated.append(token)
        yield token
        x_1TD = model.embed(torch.tensor([[token]], device=x_1TD.device))
    prefill(model, x_1TD, cache)  # the last token too, for the next question


def load(folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LM:
    """The model of a folder, ready to generate: an LM, or a LongVA where config.json describes a vision tower.

    folder: or a name such as lmms-lab/LongVA-7B in the Hugging Face Hub's local cache. dtype: of the parameters; None
    takes bfloat16 on a GPU, else float32. Raises ValueError if a file or tensor is missing, or of another shape.
    """
    folder = model_folder(folder)
    config = check_size(read_config(folder), folder)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = LM(config) if isinstance(config, LMConfig) else LongVA(config)
    model.to(dtype).to_empty(device=device).tie()
    weights.fill_from(model, weights.read(folder))
    model.folder = folder
    return model.eval().requires_grad_(False)


# ---- main ----------------------------------------------------------------------------------------


class Config(chat.Settings):
    """Ask LongVA about pictures or a video, once or in a chat; torchrun shards the KV cache over its processes."""


def encode_inputs(model: LongVA, pictures: list, frames: video.Frames | None, world: ring.World) -> tuple[list, int]:
    """Visual tokens as `prefill_prompt` takes them, and their number (at most)."""
    if frames is None:
        cut = [preprocess(picture, model.config) for picture in pictures]
        visual_tokens = [model.encode_images(pixels_NCYX, [layout]) for pixels_NCYX, layout in cut]
        return [[x_TD] for x_TD in visual_tokens], sum(map(len, visual_tokens))
    N, M, per_round = frames.total, model.config.vision.tokens_per_grid, BATCH * world.ranks
    grids = (picture and unires.frame(picture, model.config.vision.side, "crop") for _, picture in frames)
    local = encode_video(model, video.prefetch(grids, 2 * BATCH))
    chunks = ring.gather_round_robin(local, model.lm_head.weight[:0], BATCH * M, -(-N // per_round), world)
    return [progress(chunks, total=-(-N // per_round), unit=f"{per_round} frames")], N * M


@torch.no_grad()
def answers(cfg: Config, world: ring.World, model: LongVA | None = None) -> Iterator[Iterator[str]]:
    """Encode the pictures or the video once, then answer each question: one stream of text per answer.

    Loads the model of --weights unless given, after every file is opened, so that a wrong path shows at once.
    """
    if isinstance(read_config(cfg.weights), LongVAConfig) != bool(cfg.video or cfg.image):
        blind = f"{cfg.weights} is a language model and cannot see; give a LongVA folder as --weights"
        raise ValueError(blind if cfg.video or cfg.image else "give either --image FILE or --video FILE to look at")
    words, sampling = tokenizer.load_tokenizer(cfg.weights), cfg.sampling
    template = chat.default_template(words)
    pictures, frames = [video.read_picture(file) for file in cfg.image], None
    if cfg.video:  # rank r encodes every R-th group of frames
        frames = video.frames(cfg.video, **cfg.rate, keep=lambda i: i // BATCH % world.ranks == world.rank, gaps=True)
    if model is None:
        model = load(cfg.weights, world.device, {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype))

    # 1. Prefill the prompt up to the end of the pictures or the video.
    visual_inputs, visual_tokens = encode_inputs(model, pictures, frames, world)
    image_tokens = [1] * len(visual_inputs)  # one id stands for each picture or video, however many tokens it has
    ids = chat.prompt(words, cfg.question or chat.QUESTION, image_tokens, template)
    room = visual_tokens + len(ids) + cfg.text_tokens
    lm, reference = model.model.config, model.lm_head.weight
    needed = memory.cache_bytes(lm, room, reference.itemsize) // world.ranks
    runs.check_free(needed, world.device.type, world.ranks, f"{room:,} tokens")
    cache = KVCache(lm, 1, room, reference) if world.ranks == 1 else ring.ShardedCache(lm, 1, room, reference, world)
    model.model.rope_len = room
    chat.note_length(visual_tokens + len(ids), lm.max_position_embeddings)
    prefill_prompt(model, ids, visual_inputs, cache)
    first_turn = cache.length
    del visual_inputs, pictures

    # 2. Answer each question; the cache grows by the question and the answer.
    stop = {*words.stop_ids, *stop_ids(cfg.weights)}
    generator = torch.Generator().manual_seed(cfg.seed)
    broadcast = partial(ring.broadcast_text, world=ring.long_timeout_group(world))

    def sample_on_rank0(logits_V: Tensor, generated: list[int]) -> int:
        """Rank 0's choice: on unlike machines the logits may differ in the last bit."""
        return int(broadcast(lambda: str(sample(logits_V, generated, sampling, generator))))

    for question in chat.questions(cfg, broadcast):
        ids = chat.turn(words, question, image_tokens, template, first=cache.length == first_turn)
        left = min(cfg.max_tokens, room - cache.length - len(ids))
        if left < 1:
            chat.note(f"{len(ids)} tokens do not fit in {room - cache.length}; ask shorter, or start again")
            continue
        x_1TD = model.embed(torch.tensor([ids], device=world.device))
        yield words.stream(generate(model, x_1TD, cache, stop, left, sample_on_rank0))


def answer(
    model: LongVA, question: str, images: Sequence | Path | str = (), video: Path | str | None = None, **settings: Any
) -> str:
    """The answer of a model from `load` about one picture file, several, or one video file.

    settings: fields of Config such as frames, max_tokens, temperature. Raises ValueError as the command line does.
    """
    images = [images] if isinstance(images, Path | str) else images
    cfg = Config(question, tuple(map(Path, images)), video and Path(video), weights=model.folder, **settings)
    return "".join(next(answers(cfg, ring.World(0, 1, model.device), model)))


def main(cfg: Config) -> None:
    """Print the answers, or with --plan the memory they need."""
    if cfg.plan:
        itemsize = {"bf16": 2, "fp32": 4}.get(cfg.dtype)
        memory.show_answer(read_config(cfg.weights), cfg.rate["count"], cfg.text_tokens, cfg.device, itemsize)
        return
    if cfg.weights == chat.TINY_MODEL:
        chat.note("a toy, trained on synthetic pictures of shapes and digits")
    world = ring.start(cfg.device)
    for stream in answers(cfg, world):
        for piece in stream:
            print0(piece, end="", flush=True)
        print0()
    ring.stop()


if __name__ == "__main__":
    run(main, Config)
