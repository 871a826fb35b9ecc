"""What a model folder says in JSON, and what it means: sizes, how pictures become tokens, how an answer is sampled.

What      LMConfig, ClipConfig and LongVAConfig, under the names of Hugging Face's config.json; `read_config` and its
          inverse `to_dict`; counts of parameters and operations. Loading a model begins here, and a memory plan
          needs nothing else (data/memory.py). Sampling, `read_sampling` and `stop_ids`: generation_config.json;
          `sample` picks the next token by it.
Paper     Sec. 3.1 (Qwen2-7B), Sec. 3.2 (CLIP ViT-L/14-336, UniRes and AnyRes); Fig. 4's baselines. The release
          answers by its generation_config.json: temperature 0.7, top-p 0.8, top-k 20 and a repetition penalty of 1.05,
          which stays in force where it calls itself greedy.
Run       imported; `read_config("Qwen2-7B-Instruct").hidden_size`
Dimensions  V vocabulary   D LM width   F MLP width   K head width   E CLIP width   S tokens in all   M tokens per grid
Differs   What is not supported (sliding windows, other towers and projectors) is refused in one
          sentence, where others would load it and answer wrongly.
          The released LongVA-DPO's config names LLaVA-NeXT's five canvases and a second pooling, left over from the
          script that trained it on videos alone. It is read as the LongVA it was made from: 200 canvases, pooled once.
          Of tokens that tie at rank top_k, Hugging Face keeps all, here exactly top_k stay.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import weights
from data.flags import check_fields, from_json, read_json, short


def tokens_per_grid(patches: int) -> int:
    """M, the tokens of a grid of patches x patches once they are pooled 2x2 (Sec. 3.2): 144 of 24 x 24.

    Raises ValueError for an odd number of patches along the side.
    """
    if patches % 2:
        raise ValueError(
            f"a grid of {patches}x{patches} patches cannot be pooled 2x2; "
            "choose image_size and patch_size so that their quotient is even"
        )
    return (patches // 2) ** 2


# ---- values of config.json -----------------------------------------------------------------------

RAW = {  # of config.json, before it is understood
    "model_type": str, "hidden_act": str, "vision_config": dict, "rope_parameters": dict, "rope_scaling": dict,
    "mm_vision_tower": str, "mm_patch_merge_type": str, "mm_resampler_type": str, "use_sliding_window": bool,
    "image_grid_pinpoints": list[list[int]], "attention_bias": bool, "mlp_bias": bool,
}  # fmt: skip


def check_raw(raw: dict) -> None:
    """Raise ValueError where config.json has a value of another type than it must have."""
    for name, kind in RAW.items():
        from_json(kind | None, raw.get(name), name)


WIDTH, LAYERS = {"most": 2**18}, {"most": 1000}  # above what anybody has trained
THETA = {"least": 1.0, "most": 1e15}


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the tower, under the names of Hugging Face's config.json; the defaults are ViT-L/14-336's."""

    hidden_size: int = field(default=1024, metadata=WIDTH)
    intermediate_size: int = field(default=4096, metadata=WIDTH)
    num_hidden_layers: int = field(default=24, metadata=LAYERS)
    num_attention_heads: int = 16
    patch_size: int = 14  # pixels
    image_size: int = field(default=336, metadata={"most": 4096})  # pixels
    layer_norm_eps: float = field(default=1e-5, metadata={"most": 1.0})
    # Which hidden state `forward` returns: 0 enters block 0, -1 leaves the last block.
    select_layer: int = field(default=-2, metadata={"least": -1000, "most": 1000})

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"a vision width of {self.hidden_size} cannot be divided among {self.num_attention_heads} "
                "heads; check hidden_size and num_attention_heads"
            )
        if self.image_size % self.patch_size or self.image_size < 1:
            raise ValueError(
                f"a grid of {self.image_size} pixels is no whole number of {self.patch_size}-pixel patches; "
                "check image_size and patch_size"
            )
        if not -self.num_hidden_layers - 1 <= self.select_layer <= self.num_hidden_layers:
            raise ValueError(
                f"select_layer {self.select_layer} does not exist: {self.num_hidden_layers} layers have "
                f"hidden states 0 to {self.num_hidden_layers}, or -1 for the last; choose one of those"
            )

    @classmethod
    def from_dict(cls, raw: dict) -> "ClipConfig":
        """Read a config.json, either of the tower or of a whole CLIP (`vision_config` inside).

        Raises ValueError for a missing size or for a tower that this file does not compute.
        """
        check_raw(raw)
        raw = raw.get("vision_config") or raw
        if (act := raw.get("hidden_act", "quick_gelu")) != "quick_gelu":
            raise ValueError(f"the vision tower uses the activation {short(act)}, but only quick_gelu is built")
        if (channels := raw.get("num_channels", 3)) != 3:
            raise ValueError(f"the vision tower reads {short(channels)} colour channels, but pictures have 3 here")
        sizes = [f.name for f in fields(cls) if f.name not in ("layer_norm_eps", "select_layer")]
        if missing := [name for name in sizes if name not in raw]:
            raise ValueError(f"the vision config lacks {', '.join(missing)}; is this a CLIP's config.json?")
        return from_json(cls, raw)

    @property
    def side(self) -> int:
        """Pixels along the side of a grid (336)."""
        return self.image_size

    @property
    def tokens_per_grid(self) -> int:
        """M, the tokens of a grid after 2x2 pooling (144)."""
        return tokens_per_grid(self.patches)

    @property
    def patches(self) -> int:
        """Patches along the side of a grid (24)."""
        return self.image_size // self.patch_size

    @property
    def depth(self) -> int:
        """Number of blocks before the chosen hidden state (23)."""
        return self.select_layer % (self.num_hidden_layers + 1)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
FAMILIES = {  # model_type -> what it computes; llava_*: with a vision tower inside
    "qwen2": "qwen2", "llama": "llama", "mistral": "mistral",
    "llava_qwen": "qwen2", "llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral",
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained ones are scaled, under config.json's names; `longva.rope` asks for it."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]  # dynamic: NTK
    factor: float = field(metadata={"least": 1.0, "most": 1e4})  # how many times longer sequences get
    original_max_position_embeddings: int = field(metadata={"most": 2**31})  # tokens of the sequences before that
    beta_fast: float = 32.0  # yarn: pairs with at least so many turns over the original length stay as they are
    beta_slow: float = 1.0  # yarn: pairs with at most so many are divided by the factor
    truncate: bool = True  # yarn: whole numbers for the first and the last pair between the two
    high_freq_factor: float = 4.0  # llama3: as beta_fast
    low_freq_factor: float = 1.0  # llama3: as beta_slow
    attention_factor: float | None = None  # cos and sin are multiplied by it; None: yarn 0.1 ln(factor) + 1, others 1

    def __post_init__(self):
        check_fields(self)
        if self.low_freq_factor >= self.high_freq_factor or self.beta_slow >= self.beta_fast:
            raise ValueError(
                "the RoPE scaling's low_freq_factor and beta_slow must be below its high_freq_factor, beta_fast"
            )

    @classmethod
    def from_dict(cls, raw: dict) -> "RopeScaling | None":
        """Read `rope_scaling`, or a newer config's `rope_parameters`, of a whole config.json; None for plain RoPE."""
        found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        found = {name: value for name, value in found.items() if value is not None and name != "rope_theta"}
        rope_type = found.pop("type", "default")
        found = {"rope_type": rope_type} | found
        if found["rope_type"] == "default":
            return None
        trained = raw.get("max_position_embeddings", LMConfig.max_position_embeddings)
        if found["rope_type"] not in ("yarn", "llama3"):  # transformers takes no other length for these
            found["original_max_position_embeddings"] = trained
        found = {"original_max_position_embeddings": trained} | found
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ValueError(f"the RoPE scaling has {short(', '.join(unknown))}, which this decoder does not know")
        return from_json(cls, found, "rope_scaling")

    @classmethod
    def parse(cls, text: str, trained: int) -> "RopeScaling":
        """Read KIND:FACTOR, such as yarn:8, for a model that was trained on sequences of `trained` tokens."""
        kind, _, factor = text.partition(":")
        try:
            return cls(kind, float(factor), trained)
        except ValueError as e:
            raise ValueError(f"--rope-scaling {text}: {e}; write KIND:FACTOR, such as yarn:8") from e

    def base(self, theta: float, K: int, S: int) -> float:
        """Return the RoPE base for S tokens and heads of K numbers: a larger one for dynamic NTK, else theta.

        NTK-aware: the slowest pair turns over S tokens as far as over the original L, the fastest as ever.
        """
        L = self.original_max_position_embeddings
        grown = self.factor * max(S, L) / L - self.factor + 1
        return theta * grown ** (K / (K - 2)) if self.rope_type == "dynamic" else theta

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        """Scale the angle by which each pair j of a head's numbers turns per position, float32[K / 2].

        A pair that turns slowly meets angles beyond the original length L that it never saw in training. Divided by
        the factor, it has the angles of L over factor * L positions; nothing is trained.
        """
        L, K = self.original_max_position_embeddings, 2 * len(frequency)
        if self.rope_type == "dynamic":  # see `base`
            return frequency
        if self.rope_type == "linear":  # position interpolation (arXiv 2306.15595): all pairs, however fast
            return frequency / self.factor
        if self.rope_type == "llama3":  # pairs with many turns within L are kept; between, linear in the turns
            turns = L * frequency / (2 * math.pi)
            kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        else:  # YaRN (arXiv 2309.00071, Sec. 3.2): the same, but between the two linear in the pair's number j
            first, last = (
                K * math.log(L / (2 * math.pi * turns)) / (2 * math.log(theta))  # the j with so many turns within L
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, K - 1)
            j = torch.arange(K // 2, device=frequency.device)
            kept = 1 - ((j - first) / max(last - first, 0.001)).clamp(0, 1)
        return frequency * kept + frequency / self.factor * (1 - kept)

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by, so that logits get sharper in longer sequences (YaRN, eq. 22)."""
        if self.attention_factor is not None and self.rope_type == "yarn":
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.rope_type == "yarn" else 1.0


def check_lm_supported(family: str, raw: dict) -> None:
    """Raise ValueError, one sentence, where config.json asks for what the decoder does not support."""
    places = raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    bases = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    if any(base != bases[0] for base in bases[1:]):
        raise ValueError(f"config.json has two RoPE bases, {' and '.join(map(short, bases))}; remove one")
    window = raw.get("sliding_window", 4096)  # Hugging Face's default
    if window and raw.get("use_sliding_window", family == "mistral"):
        raise ValueError(
            f"config.json asks for a sliding window of {short(window)} tokens, which this decoder does not have, and "
            "answers would differ beyond it; take a model without one (of Mistral, v0.2)"
        )
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json asks for the activation {short(act)}, but only silu is built")
    if raw.get("mlp_bias") or (family != "qwen2" and raw.get("attention_bias")):
        raise ValueError("config.json asks for biases in attention or MLP; a Llama or Mistral has none here")


@dataclass(frozen=True)
class LMConfig:
    """Sizes of the decoder, under the names of Hugging Face's config.json; the defaults are Qwen2-7B's."""

    vocab_size: int = 152064
    hidden_size: int = field(default=3584, metadata=WIDTH)
    intermediate_size: int = field(default=18944, metadata=WIDTH)
    num_hidden_layers: int = field(default=28, metadata=LAYERS)
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = field(default=None, metadata={"most": 4096})  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = field(default=1e-6, metadata={"most": 1.0})
    rope_theta: float = field(default=1e6, metadata=THETA)  # the RoPE base; LongVA raises it to 1e9 (Sec. 3.1)
    # What it was trained on; nothing here enforces it.
    max_position_embeddings: int = field(default=32768, metadata={"most": 2**31})
    tie_word_embeddings: bool = False
    attention_bias: bool = True  # Qwen2: biases on q, k and v alone
    rope_scaling: RopeScaling | None = None  # plain RoPE

    def __post_init__(self):
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value "
                "heads evenly; check num_attention_heads and num_key_value_heads in config.json"
            )
        if self.rope_scaling and self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta is {self.rope_theta}, and RoPE scaling needs a base above 1; check config.json"
            )
        if self.head_width % 2 or not self.head_width:
            raise ValueError(f"RoPE turns pairs of numbers, but the head width is {self.head_width}; make it even")

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: dict) -> "LMConfig":
        """Pick our fields out of a config.json, old style (`rope_theta`) or new (`rope_parameters`).

        Raises ValueError for a missing size, another architecture, and what this decoder does not compute.
        """
        check_raw(raw)
        kind = raw.get("model_type", "qwen2")
        family = FAMILIES.get(kind)
        if family is None:
            raise ValueError(f"config.json says model_type {short(kind)}; only {', '.join(FAMILIES)} are built here")
        scaling = RopeScaling.from_dict(raw)
        check_lm_supported(family, raw)
        raw = {name: value for name, value in raw.items() if value is not None}
        for place in ("rope_parameters", "rope_scaling"):
            if base := raw.get(place, {}).get("rope_theta"):
                raw = {"rope_theta": base} | raw
        raw["rope_scaling"] = scaling
        if family == "llama":  # the first LLaMA had one RoPE base and as many key heads as query heads
            raw = {"rope_theta": 1e4, "num_key_value_heads": raw.get("num_attention_heads")} | raw
        if missing := [name for name in (*SIZES, "rope_theta") if name not in raw]:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is this the folder of a language model?")
        return from_json(cls, {"attention_bias": family == "qwen2"} | raw)


TOWER = "clip-vit-large-patch14-336"  # what ClipConfig's defaults are
SCHEMES = {"unires": "unires", "spatial_unpad": "anyres", "spatial_unpad_pooled": "anyres_pooled"}
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # of LLaVA-NeXT's five canvases; columns, rows
UNIRES_GRIDS = [(c, r) for c in range(1, 50) for r in range(1, 49 // c + 1) if r * c > 1]  # of the release's 200
SUPPORTED = {
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "image_aspect_ratio": "anyres",
    "mm_use_im_start_end": False,
}  # fmt: skip


def check_vision_supported(raw: dict) -> None:
    """Raise ValueError, one sentence, where config.json asks for another tower, projector or way to cut pictures."""
    if (merge := raw.get("mm_patch_merge_type", "flat")) not in SCHEMES:
        raise ValueError(
            f"config.json asks for mm_patch_merge_type {short(merge)}; only {' and '.join(SCHEMES)} are built"
        )
    for key, built in SUPPORTED.items():
        if (asked := raw.get(key)) not in (None, built):
            raise ValueError(f"config.json asks for {key} {short(asked)}, but only {built!r} is built")
    resampler = raw.get("mm_resampler_type")
    if resampler and (merge, resampler) != ("unires", "spatial_pool"):  # LongVA-DPO's, which nothing used
        raise ValueError(f"config.json asks for mm_resampler_type {short(resampler)}, which is not built")
    tower = raw.get("mm_vision_tower") or TOWER
    if TOWER not in tower and not raw.get("vision_config"):
        raise ValueError(
            f"config.json names the tower {short(tower)} without a vision_config; only {TOWER} is known by name"
        )


@dataclass(frozen=True)
class LongVAConfig:
    """A decoder, a vision tower, and the scheme that turns pictures into tokens (Sec. 3.2)."""

    lm: LMConfig = field(default_factory=LMConfig)
    vision: ClipConfig = field(default_factory=ClipConfig)
    # "anyres": LLaVA-NeXT's, the paper's baseline; "anyres_pooled": the same of pooled grids
    scheme: Literal["unires", "anyres", "anyres_pooled"] = "unires"
    rule: Literal["canvas", "floor", "anyres"] = "canvas"  # how many grids a picture gets: a rule of unires.RULES

    @classmethod
    def from_dict(cls, raw: dict) -> "LongVAConfig":
        """Read the config.json of LongVA, of a LLaVA-NeXT, or ours, which adds `grid_rule` and `vision_config`.

        Raises ValueError as LMConfig's does, and for towers, projectors and ways to cut pictures not supported here.
        """
        check_raw(raw)
        check_vision_supported(raw)
        vision = raw.get("vision_config") or asdict(ClipConfig())
        if "mm_vision_select_layer" in raw:
            vision = vision | {"select_layer": raw["mm_vision_select_layer"]}
        scheme = SCHEMES[raw["mm_patch_merge_type"]]
        rule = raw.get("grid_rule", "canvas" if scheme == "unires" else "anyres")
        parts = {"lm": LMConfig.from_dict(raw), "vision": ClipConfig.from_dict(vision)}
        config = from_json(cls, parts | {"scheme": scheme, "rule": rule})
        canvases = raw.get("image_grid_pinpoints") or []
        if scheme != "unires" and (other := [one for one in canvases if one not in config.canvases]):
            only = "only LLaVA-NeXT's five are built for AnyRes"
            raise ValueError(f"config.json has a canvas of {short(other[0])} pixels; {only}")
        if scheme != "unires" and canvases and len(canvases) < len(config.canvases):
            raise ValueError(f"config.json has {len(canvases)} canvases; AnyRes is built with LLaVA-NeXT's five here")
        return config

    @property
    def canvases(self) -> list[list[int]]:
        """The sizes that a picture is fitted into, [width, height] in pixels; the release's loader needs the list."""
        grids, side = UNIRES_GRIDS if self.scheme == "unires" else NEXT_GRIDS, self.vision.side
        return [[cols * side, rows * side] for cols, rows in grids]


def check_trainable(lm: LMConfig) -> LMConfig:
    """Return the sizes. Raises ValueError for a scaling by the length of a sequence, which a rank does not know."""
    if lm.rope_scaling and lm.rope_scaling.rope_type == "dynamic":
        raise ValueError(
            "config.json asks for dynamic NTK scaling, which is for answering; remove rope_scaling to train"
        )
    return lm


# ---- sizes ---------------------------------------------------------------------------------------


def layer_parameters(lm: LMConfig) -> int:
    """Count the parameters of a layer: two norms; q, k, v with biases, and o; gate, up and down."""
    D, F = lm.hidden_size, lm.intermediate_size
    q, kv = lm.num_attention_heads * lm.head_width, 2 * lm.num_key_value_heads * lm.head_width
    return 2 * D + (D + lm.attention_bias) * (q + kv) + q * D + 3 * D * F


def root_parameters(lm: LMConfig) -> int:
    """Count the parameters outside the layers: the last norm, the embedding, and the head unless it is tied."""
    return lm.hidden_size + (1 if lm.tie_word_embeddings else 2) * lm.vocab_size * lm.hidden_size


def num_parameters(config: LMConfig | LongVAConfig) -> int:
    """Count all parameters; with vision also the tower's (and its unused last block's) and the projector's."""
    if isinstance(config, LMConfig):
        return config.num_hidden_layers * layer_parameters(config) + root_parameters(config)
    clip, D = config.vision, config.lm.hidden_size
    E, width = clip.hidden_size, clip.intermediate_size
    block = 4 * E + 4 * (E * E + E) + (2 * E * width + width + E)  # two LayerNorms, four attention maps, two MLP maps
    around = E + 3 * clip.patch_size**2 * E + (clip.patches**2 + 1) * E + 4 * E  # class, patch map, positions, norms
    projector = (E * D + D) + (D * D + D) + (D if config.scheme != "unires" else 0)  # AnyRes: and the newline
    return num_parameters(config.lm) + clip.num_hidden_layers * block + around + projector


def train_flop(lm: LMConfig, S: int) -> float:
    """Floating-point operations per token of a training step on S tokens, as model FLOP utilisation (MFU) counts.

    Forward: 2 per weight (the embedding only looks up), and 2 + 2 per number of all query heads, in logits and
    output, for each of the S / 2 tokens that a token attends to on average. Backward: twice that. Recomputation
    does not count. Qwen2-7B at 224,000 tokens: 177 GFLOP.
    """
    looked_up = 0 if lm.tie_word_embeddings else lm.vocab_size * lm.hidden_size
    attention = 2 * S * lm.num_attention_heads * lm.head_width * lm.num_hidden_layers
    return 3 * (2 * (num_parameters(lm) - looked_up) + attention)


# ---- config.json ---------------------------------------------------------------------------------


def check_size(config: LMConfig | LongVAConfig, folder: Path | str) -> LMConfig | LongVAConfig:
    """Return the config; ValueError if the weight files beside it are too small for it, before memory is taken."""
    count = num_parameters(config)
    held = sum((Path(folder) / file).stat().st_size for file in weights.shards(Path(folder)))
    if 2 * count > held:
        raise ValueError(
            f"{folder}/config.json describes {count:,} parameters, but the weight files have {held:,} bytes; both must "
            "be of one model"
        )
    return config


def read_config(folder: Path | str) -> LMConfig | LongVAConfig:
    """Read a folder's config.json: a language model's, or a LongVA's."""
    raw = weights.read_config(folder)
    return (LongVAConfig if "mm_hidden_size" in raw else LMConfig).from_dict(raw)


def to_dict(config: LMConfig | LongVAConfig, dtype: str = "bfloat16") -> dict:
    """The config.json of a model, as transformers (for the language model) and the release read it."""
    if isinstance(config, LongVAConfig):
        is_openai = replace(config.vision, select_layer=ClipConfig().select_layer) == ClipConfig()
        tower = f"openai/{TOWER}" if is_openai else f"clip-patch{config.vision.patch_size}-{config.vision.image_size}"
        return to_dict(config.lm, dtype) | {
            "architectures": ["LlavaQwenForCausalLM"], "image_aspect_ratio": "anyres", "grid_rule": config.rule,
            "mm_patch_merge_type": {ours: theirs for theirs, ours in SCHEMES.items()}[config.scheme],
            "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2, "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": tower, "mm_hidden_size": config.vision.hidden_size,
            "mm_vision_select_layer": config.vision.select_layer, "mm_vision_select_feature": "patch",
            "image_grid_pinpoints": config.canvases, "vision_config": asdict(config.vision),
            "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        }  # fmt: skip
    name = "qwen2" if config.attention_bias else "llama"
    kind = {"architectures": [f"{name.capitalize()}ForCausalLM"], "model_type": name, "hidden_act": "silu"}
    sizes = asdict(config) | {"head_dim": config.head_width}
    scaling = sizes.pop("rope_scaling")
    scaling = {"rope_scaling": {name: x for name, x in scaling.items() if x is not None}} if scaling else {}
    return kind | sizes | scaling | {"use_sliding_window": False, "sliding_window": None, "torch_dtype": dtype}


# ---- how to answer: generation_config.json -------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are greedy."""

    # 0: greedy, the likeliest token always
    temperature: float = field(default=0.0, metadata={"least": 0.0, "most": 100.0})
    # draw from the likeliest tokens that have this probability together; 1: from all
    top_p: float = field(default=1.0, metadata={"most": 1.0})
    # draw from so many of the likeliest tokens; 0: from all
    top_k: int = field(default=0, metadata={"least": 0})
    # above 1, tokens said before in an answer get less likely (release: 1.05)
    repetition_penalty: float = field(default=1.0, metadata={"least": 0.01, "most": 100.0})

    def __post_init__(self):
        check_fields(self)


GENERATION = "generation_config.json"
UNBUILT = ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens")  # ways to choose tokens


def read_sampling(folder: Path | str) -> Sampling:
    """How a folder's makers want it to answer, by generation_config.json as Hugging Face reads it.

    Without the file, or where it does not ask for sampling, greedy; a repetition penalty stays even then. What
    sampling leaves out is Hugging Face's default: temperature 1, top_p 1 and top_k 50. Raises ValueError.
    """
    file = Path(folder) / GENERATION
    raw = {name: value for name, value in read_json(file).items() if value is not None}
    odd = [name for name in UNBUILT if raw.get(name)] + ["num_beams"] * (raw.get("num_beams", 1) != 1)
    odd += ["min_p"] * bool(raw.get("do_sample") and raw.get("min_p"))
    if odd:
        raise ValueError(f"{file} asks for {odd[0]}, which is not built here; remove it from the file")
    raw = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0} | raw
    found = from_json(Sampling, raw, f"{file}: ")
    return found if raw.get("do_sample", False) else Sampling(repetition_penalty=found.repetition_penalty)


def stop_ids(folder: Path | str) -> list[int]:
    """The ids that end an answer, by generation_config.json; [] where it names none. Raises ValueError."""
    named = read_json(file := Path(folder) / GENERATION).get("eos_token_id")
    ids = from_json(list[int] | int | None, named, f"{file}: eos_token_id", least=0)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


# ---- sampling ------------------------------------------------------------------------------------

COLD = 1e-6  # a temperature below it is 0: divided by it, logits could overflow


def finite(logits: Tensor) -> Tensor:
    """Return logits that a token is chosen from; FloatingPointError unless all are finite.

    The argmax of NaN is token 0, Qwen2's "!": an answer that looks like one.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite: weights or config.json are damaged, or numbers overflowed")
    return logits


def next_token_probs(logits_V: Tensor, generated: list[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the ids that may come next, most probable first, and their probabilities, both on the CPU.

    Penalty, temperature, top-k, top-p, in this order. The penalty is on the ids `generated` in this answer, not on
    the prompt, as in the release, whose prompts are embeddings and have no ids. Temperature 0 leaves the best id.
    """
    logits_V = logits_V.float()
    if generated and sampling.repetition_penalty != 1:
        repeated = torch.tensor(generated, device=logits_V.device)
        scores = logits_V[repeated]
        scores = torch.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
        logits_V = logits_V.index_put((repeated,), scores)
    kept = 1 if sampling.temperature < COLD else min(sampling.top_k or len(logits_V), len(logits_V))
    logits, ids = (x.cpu() for x in logits_V.topk(kept))  # on the device: a vocabulary is slow to copy and to sort
    probs = (logits / max(sampling.temperature, COLD)).softmax(-1)
    # Keep an id while those before it sum to less than top_p; the best one always stays.
    enough = (probs.cumsum(-1) - probs < sampling.top_p).sum() if sampling.top_p < 1 else kept  # sums are rounded
    return ids[:enough], probs[:enough] / probs[:enough].sum()


def sample(logits_V: Tensor, generated: list[int], sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Return the next id: the best one at temperature 0, else one drawn with `generator`, a CPU's."""
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        return logits_V.argmax().item()
    ids, probs = next_token_probs(logits_V, generated, sampling)
    return ids[torch.multinomial(probs, 1, generator=generator)].item()
