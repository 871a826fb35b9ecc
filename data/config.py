"""What a model folder's config.json says: the sizes of decoder and eye, and how pictures become tokens.

What      LMConfig, ClipConfig and LongVAConfig, under the names of Hugging Face's files; `read_config` and its way
          back, `to_dict`. Loading a model begins here, and a memory plan needs nothing else (data/plan.py).
Paper     Sec. 3.1 (Qwen2-7B), Sec. 3.2 (CLIP ViT-L/14-336, UniRes and AnyRes); Fig. 4's baselines.
Run       imported; `read_config("Qwen2-7B-Instruct").hidden_size`
Deviates  What this decoder does not compute (RoPE scaling, sliding windows, other activations) is refused here, in
          one sentence, where others would load it and answer wrongly.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from data import weights


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the tower, under the names of Hugging Face's config.json; the defaults are ViT-L/14-336's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14  # pixels
    image_size: int = 336  # pixels
    layer_norm_eps: float = 1e-5
    select_layer: int = -2  # which hidden state `forward` returns: 0 enters block 0, -1 leaves the last block

    def __post_init__(self):
        if min(self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.patch_size) < 1:
            raise ValueError(f"a vision tower needs sizes of at least 1; check the vision config: {self}")
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
    def from_dict(cls, found: dict) -> "ClipConfig":
        """Read a config.json, either of the tower or of a whole CLIP (`vision_config` inside).

        Raises ValueError for a missing size or for a tower that this file does not compute.
        """
        found = found.get("vision_config", found)
        if (act := found.get("hidden_act", "quick_gelu")) != "quick_gelu":
            raise ValueError(f"the vision tower uses the activation {act!r}, but only quick_gelu is built")
        if (channels := found.get("num_channels", 3)) != 3:
            raise ValueError(f"the vision tower reads {channels} colour channels, but pictures have 3 here")
        sizes = [f.name for f in fields(cls) if f.name not in ("layer_norm_eps", "select_layer")]
        if missing := [name for name in sizes if name not in found]:
            raise ValueError(f"the vision config lacks {', '.join(missing)}; is this a CLIP's config.json?")
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    @property
    def side(self) -> int:
        """Pixels along the side of a grid (336)."""
        return self.image_size

    @property
    def patches(self) -> int:
        """Patches along the side of a grid (24)."""
        return self.image_size // self.patch_size

    @property
    def depth(self) -> int:
        """How many blocks stand before the chosen hidden state (23)."""
        return self.select_layer % (self.num_hidden_layers + 1)


@dataclass(frozen=True)
class LMConfig:
    """Sizes of the decoder, under the names of Hugging Face's config.json; the defaults are Qwen2-7B's."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None  # hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6  # the RoPE base; LongVA raises it to 1e9 (Sec. 3.1)
    max_position_embeddings: int = 32768  # what it was trained on; nothing here enforces it
    tie_word_embeddings: bool = False
    attention_bias: bool = True  # Qwen2: biases on q, k and v alone

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value "
                "heads evenly; check num_attention_heads and num_key_value_heads in config.json"
            )
        if self.head_width % 2:
            raise ValueError(f"RoPE turns pairs of numbers, but the head width is {self.head_width}; make it even")

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, found: dict) -> "LMConfig":
        """Pick our fields out of a config.json, old style (`rope_theta`) or new (`rope_parameters`)."""
        kind = found.get("model_type", "qwen2")
        found = {"attention_bias": kind in ("qwen2", "llava_qwen"), **found}
        found = {**(found.get("rope_parameters") or {}), **found}
        if missing := [name for name in ("vocab_size", "hidden_size", "rope_theta") if name not in found]:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is this the folder of a language model?")
        names = {f.name for f in fields(cls)}
        config = cls(**{name: value for name, value in found.items() if name in names and value is not None})
        scaled = (found.get("rope_scaling") or {}).get("rope_type", found.get("rope_type", "default"))
        window = found.get("use_sliding_window", kind == "mistral") and found.get("sliding_window")
        if scaled != "default" or window or found.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"config.json asks for RoPE scaling ({scaled}), a sliding window ({window or None}) or an activation "
                f"({found.get('hidden_act')}) that this decoder does not have; results would be wrong"
            )
        return config


@dataclass(frozen=True)
class LongVAConfig:
    """A decoder, an eye, and the scheme that turns pictures into tokens (Sec. 3.2)."""

    lm: LMConfig = field(default_factory=LMConfig)
    vision: ClipConfig = field(default_factory=ClipConfig)
    scheme: str = "unires"  # or "anyres": LLaVA-NeXT's, the paper's baseline
    rule: str = "canvas"  # how many grids a picture gets: a rule of unires.RULES

    @classmethod
    def from_dict(cls, found: dict) -> "LongVAConfig":
        """Read the released LongVA's config.json, or ours, which adds `vision_config` for other towers."""
        scheme = "unires" if found.get("mm_patch_merge_type", "unires") == "unires" else "anyres"
        vision = ClipConfig.from_dict(found["vision_config"]) if "vision_config" in found else ClipConfig()
        rule = found.get("grid_rule", "canvas" if scheme == "unires" else "anyres")
        return cls(LMConfig.from_dict(found), vision, scheme, rule)


def read_config(folder: Path | str) -> LMConfig | LongVAConfig:
    """What model a folder holds, by its config.json: a language model, or one that sees."""
    found = weights.read_config(folder)
    return (LongVAConfig if "mm_hidden_size" in found else LMConfig).from_dict(found)


def to_dict(config: LMConfig | LongVAConfig, dtype: str = "bfloat16") -> dict:
    """The config.json of a model, as transformers (for the language model) and the release read it."""
    if isinstance(config, LongVAConfig):
        return to_dict(config.lm, dtype) | {
            "architectures": ["LlavaQwenForCausalLM"], "image_aspect_ratio": "anyres", "grid_rule": config.rule,
            "mm_patch_merge_type": "unires" if config.scheme == "unires" else "spatial_unpad",
            "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2, "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": config.vision.hidden_size,
            "mm_vision_select_layer": config.vision.select_layer, "mm_vision_select_feature": "patch",
            "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "vision_config": asdict(config.vision),
        }  # fmt: skip
    name = "qwen2" if config.attention_bias else "llama"
    kind = {"architectures": [f"{name.capitalize()}ForCausalLM"], "model_type": name, "hidden_act": "silu"}
    sizes = asdict(config) | {"head_dim": config.head_width}
    return kind | sizes | {"use_sliding_window": False, "torch_dtype": dtype}
