"""CLIP's vision transformer, ViT-L/14 at 336 pixels: it turns a grid of pixels into patch features.

What      The architecture alone. Pictures become grids in unires.py; weights are read by data/weights.py.
Paper     Sec. 3.2 (the vision encoder); CLIP, arXiv 2103.00020; LLaVA's choice of the layer before the last.
Run       imported by longva.py
Dimensions  N grids = frames   P patches per grid (576), in x_NPE also the class token in front of them (577)
          E CLIP width       H heads   K head width        C colour channels   Y X pixels   1 one token
Differs   `forward` stops after block 23 of 24, where LLaVA reads; the release computes all and picks later.
          The last block and post_layernorm exist all the same: files have 391 tensors, and loading is strict.

Parameters have the names of Hugging Face's files below `vision_model.`, with CLIP's misspelt `pre_layrnorm`, so that
loading needs no table of renames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.config import ClipConfig
from data.memory_saving import recompute


class Embeddings(nn.Module):
    """Pixels to patches: one linear map of each square, a class token in front, learned positions."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        E, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(E))
        self.patch_embedding = nn.Conv2d(3, E, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.patches**2 + 1, E)  # patches: along a side

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """The first x_NPE, in the dtype of the parameters."""
        pixels_NCYX = pixels_NCYX.to(self.class_embedding.dtype)
        patches_NEP = self.patch_embedding(pixels_NCYX).flatten(2)  # row by row
        class_N1E = self.class_embedding.expand(len(pixels_NCYX), 1, -1)
        return torch.cat([class_N1E, patches_NEP.transpose(1, 2)], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one grid: no mask, no rotary positions."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        E, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x_NPE: Tensor) -> Tensor:
        """Attention's output x_NPE."""
        projected = (proj(x_NPE) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q_NHPK, k_NHPK, v_NHPK = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        o_NHPK = F.scaled_dot_product_attention(q_NHPK, k_NHPK, v_NHPK)
        return self.out_proj(o_NHPK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers around quick_gelu, CLIP's approximation of GELU."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NPE: Tensor) -> Tensor:
        """Each token separately: x_NPE."""
        f = self.fc1(x_NPE)
        return self.fc2(f * torch.sigmoid(1.702 * f))


class Block(nn.Module):
    """One transformer layer, normalised before attention and before the MLP."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_NPE: Tensor) -> Tensor:
        """The residual stream x_NPE after this layer."""
        x_NPE = x_NPE + self.self_attn(self.layer_norm1(x_NPE))
        return x_NPE + self.mlp(self.layer_norm2(x_NPE))


class ClipVision(nn.Module):
    """The vision transformer. `recompute` turns on activation checkpointing: one saved tensor per block."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config, self.recompute = config, False
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def hidden(self, pixels_NCYX: Tensor, depth: int) -> Tensor:
        """The state x_NPE after `depth` blocks, class token first."""
        side = self.config.side
        shape = tuple(pixels_NCYX.shape)
        assert shape[1:] == (3, side, side), f"{shape}, not [N, 3, {side}, {side}]"
        x_NPE = self.pre_layrnorm(self.embeddings(pixels_NCYX))
        for block in self.encoder.layers[:depth]:
            x_NPE = recompute(self.recompute, block, x_NPE)
        return x_NPE

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """Features z_NPE of the patches, row by row: the chosen hidden state without its class token.

        Pixels are normalised as unires.py does; any floating dtype, the answer has that of the parameters.
        """
        return self.hidden(pixels_NCYX, self.config.depth)[:, 1:].clone()  # FSDP2 warns of views

    def features(self, pixels_NCYX: Tensor) -> Tensor:
        """One vector cls_NE per grid: the class token after the last block and post_layernorm.

        This is what CLIP compares with captions; LongVA does not use it, contrastive pretraining does.
        """
        return self.post_layernorm(self.hidden(pixels_NCYX, self.config.num_hidden_layers)[:, 0])
