"""What the config files of the folders people have are read as, what is refused, and how folders want to answer."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch

import longva
from data import config as c
from data.config import ClipConfig, LMConfig, LongVAConfig, Sampling, sample

# ---- the config.json of the folders people have; what no field depends on is left out ------------

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "tie_word_embeddings": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = {"vocab_size": 151936, "tie_word_embeddings": True, "num_key_value_heads": 2}
QWEN2_HALF = QWEN2 | SMALL | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "max_position_embeddings": 131072, "sliding_window": 32768, "max_window_layers": 24,
}  # fmt: skip
QWEN2_1B = QWEN2 | SMALL | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "sliding_window": 32768,
}  # fmt: skip
QWEN25_3B = QWEN2 | SMALL | {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
}  # fmt: skip
QWEN2_NEW = {k: v for k, v in QWEN2.items() if k not in ("rope_theta", "torch_dtype")} | {  # as transformers 5 saves it
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16", "sliding_window": None,
    "layer_types": ["full_attention"] * 28,
}  # fmt: skip
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "rms_norm_eps": 1e-05, "max_position_embeddings": 4096, "pretraining_tp": 1,
    "rope_scaling": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
}  # fmt: skip
LLAMA1 = {k: v for k, v in LLAMA2.items() if k != "num_key_value_heads"} | {"rms_norm_eps": 1e-06}
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {k: v for k, v in MISTRAL.items() if k != "sliding_window"} | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
}  # fmt: skip
CANVASES = [[336 * i, 336 * j] for i in range(1, 50) for j in range(1, 49 // i + 1) if i * j > 1]
FIVE = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
EYES = {
    "image_aspect_ratio": "anyres", "image_crop_resolution": None, "mm_hidden_size": 1024, "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_tower_lr": 2e-06,
    "tokenizer_model_max_length": 32768, "use_mm_proj": True,
}  # fmt: skip
UNIRES = {"mm_patch_merge_type": "unires", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
LONGVA = QWEN2 | EYES | UNIRES | {
    "_name_or_path": "LongVa/Qwen2-7B-Instruct-extend-step_1000", "architectures": ["LlavaQwenForCausalLM"],
    "rope_theta": 1000000000.0, "image_grid_pinpoints": CANVASES,
}  # fmt: skip
LONGVA_DPO = LONGVA | {
    "model_type": "llava_qwen", "image_grid_pinpoints": FIVE, "mm_resampler_type": "spatial_pool",
    "mm_spatial_pool_out_channels": 1024,
}  # fmt: skip
NEXT = EYES | {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": FIVE}
NEXT_VICUNA = LLAMA2 | NEXT | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
NEXT_MISTRAL = MISTRAL | NEXT | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
NEXT_LLAMA3 = LLAMA3 | NEXT | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
NEXT_QWEN = QWEN2 | NEXT | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen"}
CLIP = {
    "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
    "intermediate_size": 4096, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16,
    "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
WHOLE_CLIP = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768, "vision_config": CLIP,
              "text_config": {"hidden_size": 768, "hidden_act": "quick_gelu", "vocab_size": 49408}}  # fmt: skip

# Every field, in LMConfig's order: V, D, F, layers, H, G, head_dim, eps, theta, positions, tied, biases.
QWEN2_IS = LMConfig(152064, 3584, 18944, 28, 28, 4, None, 1e-6, 1e6, 32768, False, True)
LLAMA2_IS = LMConfig(32000, 4096, 11008, 32, 32, 32, None, 1e-5, 1e4, 4096, False, False)
LLAMA1_IS = LMConfig(32000, 4096, 11008, 32, 32, 32, None, 1e-6, 1e4, 4096, False, False)
MISTRAL_IS = LMConfig(32000, 4096, 14336, 32, 32, 8, None, 1e-5, 1e6, 32768, False, False)
LLAMA3_IS = LMConfig(128256, 4096, 14336, 32, 32, 8, None, 1e-5, 5e5, 8192, False, False)
LONGVA_IS = LMConfig(152064, 3584, 18944, 28, 28, 4, None, 1e-6, 1e9, 32768, False, True)
CLIP_IS = ClipConfig(1024, 4096, 24, 16, 14, 336, 1e-5, -2)
FOLDERS = {  # name: config.json, what it is, tensors, parameters
    "Qwen2-0.5B": (QWEN2_HALF, LMConfig(151936, 896, 4864, 24, 14, 2, None, 1e-6, 1e6, 131072, True, True), 290, 494_032_768),
    "Qwen2-1.5B": (QWEN2_1B, LMConfig(151936, 1536, 8960, 28, 12, 2, None, 1e-6, 1e6, 32768, True, True), 338, 1_543_714_304),
    "Qwen2.5-3B": (QWEN25_3B, LMConfig(151936, 2048, 11008, 36, 16, 2, None, 1e-6, 1e6, 32768, True, True), 434, 3_085_938_688),
    "Qwen2-7B": (QWEN2, QWEN2_IS, 339, 7_615_616_512),
    "Qwen2-7B of transformers 5": (QWEN2_NEW, QWEN2_IS, 339, 7_615_616_512),
    "Llama-2-7B, Vicuna": (LLAMA2, LLAMA2_IS, 291, 6_738_415_616),
    "LLaMA-7B": (LLAMA1, LLAMA1_IS, 291, 6_738_415_616),
    "Mistral-7B v0.2": (MISTRAL, MISTRAL_IS, 291, 7_241_732_096),
    "Llama-3-8B": (LLAMA3, LLAMA3_IS, 291, 8_030_261_248),
    "LongVA-7B": (LONGVA, LongVAConfig(LONGVA_IS, CLIP_IS, "unires", "canvas"), 734, 7_935_646_208),
    "LongVA-7B-DPO": (LONGVA_DPO, LongVAConfig(LONGVA_IS, CLIP_IS, "unires", "canvas"), 734, 7_935_646_208),
    "LLaVA-NeXT Vicuna": (NEXT_VICUNA, LongVAConfig(LLAMA2_IS, CLIP_IS, "anyres", "anyres"), 687, 7_062_906_880),
    "LLaVA-NeXT Mistral": (NEXT_MISTRAL, LongVAConfig(MISTRAL_IS, CLIP_IS, "anyres", "anyres"), 687, 7_566_223_360),
    "LLaVA-NeXT Llama 3": (NEXT_LLAMA3, LongVAConfig(LLAMA3_IS, CLIP_IS, "anyres", "anyres"), 687, 8_354_752_512),
    "LLaVA-NeXT Qwen2": (NEXT_QWEN, LongVAConfig(QWEN2_IS, CLIP_IS, "anyres", "anyres"), 735, 7_935_649_792),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_every_field_and_the_number_of_tensors_and_parameters(tmp_path, name):
    """And our own config.json is read back."""
    found, want, tensors, parameters = FOLDERS[name]
    (tmp_path / "config.json").write_text(json.dumps(found))
    config = c.read_config(tmp_path)
    assert config == want
    sees = isinstance(config, LongVAConfig)
    with torch.device("meta"):
        model = longva.LongVA(config) if sees else longva.LM(config)
    held = dict(model.named_parameters())
    assert (len(held), sum(p.numel() for p in held.values())) == (tensors, parameters)
    assert ("lm_head.weight" in held) != (config.lm if sees else config).tie_word_embeddings
    assert ("model.image_newline" in held) == (found.get("mm_patch_merge_type") == "spatial_unpad")
    eye = [n for n in held if n.startswith("model.vision_tower.vision_tower.vision_model.")]
    assert (len(eye), sum(held[n].numel() for n in eye)) == ((391, 303_507_456) if sees else (0, 0))
    ours = c.to_dict(config)
    assert c.to_dict(type(config).from_dict(json.loads(json.dumps(ours)))) == ours
    if sees:  # the release's loader cannot show a picture without them
        assert ours["image_grid_pinpoints"] == (CANVASES if config.scheme == "unires" else FIVE)


def test_clip():
    assert ClipConfig.from_dict(CLIP) == ClipConfig.from_dict(WHOLE_CLIP) == CLIP_IS


@pytest.mark.oracle
@pytest.mark.parametrize("name", [n for n, row in FOLDERS.items() if isinstance(row[1], LMConfig)])
def test_transformers_reads_the_same(name):
    """Also where a file leaves out what transformers has a default for."""
    transformers = pytest.importorskip("transformers")
    found, ours, _, _ = FOLDERS[name]
    theirs = transformers.AutoConfig.for_model(**found)
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours.rope_theta}
    for field in asdict(ours).keys() - {"head_dim", "rope_theta", "rope_scaling", "attention_bias"}:
        assert getattr(theirs, field) == getattr(ours, field), field
    assert (getattr(theirs, "head_dim", None) or ours.head_width) == ours.head_width
    assert theirs.sliding_window is None if hasattr(theirs, "sliding_window") else True
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.AutoModelForCausalLM.from_config(theirs).named_parameters()}
        assert shapes == {n: p.shape for n, p in longva.LM(ours).named_parameters()}


def test_other_eyes_of_ours():
    eye = ClipConfig(96, 384, 4, 4, 8, 32, select_layer=-3)
    found = c.to_dict(LongVAConfig(QWEN2_IS, eye, "anyres", "floor"))
    again = LongVAConfig.from_dict(found)
    assert (again.vision, again.scheme, again.rule) == (eye, "anyres", "floor")
    assert found["image_grid_pinpoints"][0] == [32, 64]
    towers = [LongVAConfig(QWEN2_IS, vision) for vision in (eye, ClipConfig(), ClipConfig(select_layer=-1))]
    named = [c.to_dict(config)["mm_vision_tower"] for config in towers]
    assert named == ["clip-patch8-32", *["openai/clip-vit-large-patch14-336"] * 2]  # the toy's is not OpenAI's
    assert LongVAConfig.from_dict(LONGVA | {"mm_vision_select_layer": -1}).vision.select_layer == -1


WITHOUT = {"model_type": "llava_next", "text_config": LLAMA2, "vision_config": CLIP}
IMPOSSIBLE = [
    ({"rope_theta": math.nan}, "rope_theta is nan"), ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": -5}, "rope_theta is -5"), ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"), ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ({"head_dim": "32"}, "head_dim is '32'"), ({"head_dim": -2}, "head_dim is -2"), ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"), ({"hidden_size": True}, "hidden_size is True"),
    ({"model_type": []}, r"model_type is \[\]; text is expected"), ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"), ({"vocab_size": "9" * 10**6}, "vocab_size is '999"),
]  # fmt: skip
OTHER_TYPES = [
    ("image_grid_pinpoints", 5), ("mm_vision_tower", 5), ("vision_config", [3]), ("mm_patch_merge_type", 3),
    ("mm_vision_select_layer", "-2"), ("vision_config", {"hidden_size": "1024"}),
]  # fmt: skip


@pytest.mark.parametrize("found, complaint", [
    ({}, "lacks vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, rope_theta"),
    ({k: v for k, v in QWEN2.items() if k != "intermediate_size"}, "lacks intermediate_size;"),
    ({k: v for k, v in MISTRAL.items() if k != "num_key_value_heads"}, "lacks num_key_value_heads;"),
    (QWEN2 | {"rope_theta": None}, "lacks rope_theta"),
    (QWEN2 | {"num_hidden_layers": "28"}, "num_hidden_layers is '28'.* whole number"),
    (QWEN2 | {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    (QWEN2 | {"num_key_value_heads": 3}, "28 query heads cannot share 3 key/value"),
    (QWEN2 | {"head_dim": 7}, "head width is 7"),
    (QWEN2 | {"rope_parameters": {"rope_theta": 1e9}}, "two RoPE bases, 1000000.0 and 1000000000.0; remove one"),
    (QWEN2 | {"model_type": "gemma"}, "model_type 'gemma'; only qwen2, llama, mistral, .* are built"),
    (WITHOUT, "model_type 'llava_next'"),
    (QWEN2 | {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling.rope_type is 'longrope'; one of linear, dynamic, yarn, llama3 is"),
    (MISTRAL | {"sliding_window": 4096, "rope_theta": 1e4}, "sliding window of 4096 tokens"),
    (NEXT_MISTRAL | {"sliding_window": 4096}, "sliding window of 4096 tokens"),
    ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, "sliding window of 4096 tokens"),
    (QWEN2 | {"use_sliding_window": True}, "sliding window of 131072 tokens"),
    ({k: v for k, v in QWEN2.items() if k != "sliding_window"} | {"use_sliding_window": True}, "window of 4096 tokens"),
    (QWEN2 | {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "two RoPE bases, 1000000.0 and"),
    (NEXT_VICUNA | {"image_grid_pinpoints": FIVE[:2]}, "2 canvases; AnyRes is built with LLaVA-NeXT's five"),
    (LLAMA2 | {"hidden_act": "gelu"}, "activation 'gelu'"),
    (LLAMA2 | {"attention_bias": True}, "biases"),
    (LLAMA3 | {"mlp_bias": True}, "biases"),
    ({k: v for k, v in NEXT_VICUNA.items() if k != "mm_patch_merge_type"}, "mm_patch_merge_type 'flat'"),
    (NEXT_VICUNA | {"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type 'spatial'; only unires and spatial_unpad"),
    (NEXT_VICUNA | {"image_grid_pinpoints": [*FIVE, [336, 1344]]}, r"canvas of \[336, 1344\] pixels"),
    (NEXT_VICUNA | {"mm_resampler_type": "spatial_pool"}, "mm_resampler_type 'spatial_pool'"),
    (LONGVA | {"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer'"),
    (LONGVA | {"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9', but only 'anyres'"),
    (LONGVA | {"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
    (LONGVA | {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
    (LONGVA | {"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
    (LONGVA | {"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "tower 'google/siglip-.* without a vision_config"),
    (LONGVA | {"vision_config": CLIP | {"hidden_act": "gelu"}}, "only quick_gelu is built"),
    *((QWEN2 | change, complaint) for change, complaint in IMPOSSIBLE),
    *((LONGVA | {name: value}, "expected|lacks") for name, value in OTHER_TYPES),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_is_refused(tmp_path, found, complaint):
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=complaint) as error:
        c.read_config(tmp_path)
    assert len(str(error.value)) < 300


# ---- generation_config.json ----------------------------------------------------------------------

GENERATION = {  # as LongVA-7B's, two stray keys included
    "_attn_implementation": "flash_attention_2", "bos_token_id": 151643, "do_sample": True,
    "eos_token_id": [151645, 151643], "pad_token_id": 151643, "repetition_penalty": 1.05, "rope_theta": 1000000000.0,
    "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.40.0.dev0",
}  # fmt: skip


@pytest.mark.parametrize("found, want, stops", [
    (None, Sampling(0.0, 1.0, 0, 1.0), []),
    ({}, Sampling(), []),
    (GENERATION, Sampling(0.7, 0.8, 20, 1.05), [151645, 151643]),
    (GENERATION | {"do_sample": False}, Sampling(0.0, 1.0, 0, 1.05), [151645, 151643]),
    ({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}, Sampling(), [2]),  # do_sample left out is false
    ({"do_sample": True, "eos_token_id": None}, Sampling(1.0, 1.0, 50, 1.0), []),  # Hugging Face's defaults
    ({"do_sample": True, "temperature": None, "top_k": 0, "top_p": 0.9}, Sampling(1.0, 0.9, 0, 1.0), []),
])  # fmt: skip
def test_how_folders_want_to_answer(tmp_path, found, want, stops):
    if found is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(found))
    assert c.read_sampling(tmp_path) == want and c.stop_ids(tmp_path) == stops


@pytest.mark.parametrize("found, odd", [({"min_p": 0.1, "do_sample": True}, "min_p"), ({"num_beams": 4}, "num_beams")])
def test_ways_to_choose_tokens_that_are_not_built(tmp_path, found, odd):
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"generation_config.json asks for {odd}, which is not built here"):
        c.read_sampling(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"min_p": 0.1, "num_beams": 1}))
    assert c.read_sampling(tmp_path) == Sampling()  # greedy: min_p changes nothing


@pytest.mark.oracle
def test_defaults_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").GenerationConfig._get_default_generation_params()
    assert not theirs["do_sample"] and (theirs["temperature"], theirs["top_p"], theirs["top_k"]) == (1.0, 1.0, 50)
    assert theirs["repetition_penalty"] == 1.0


@pytest.mark.parametrize("setting, complaint", [
    ({"temperature": -0.1}, "temperature is -0.1; a number from 0 to 100 is"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_p": 0.0}, "top_p is 0.0; a number from 1e-30 to 1 is"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_k": -1}, "top_k is -1; a whole number from 0 to"),
    ({"top_k": 2.5}, "top_k is 2.5"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; a number from 0.01 to 100 is"),
])  # fmt: skip
def test_impossible_sampling(tmp_path, setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        Sampling(**setting)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(setting | {"do_sample": True}))
    with pytest.raises(ValueError, match=re.escape(str(file)) + ": " + complaint):
        c.read_sampling(tmp_path)


@pytest.mark.parametrize("eos", ["2", [2, None], [2, -1], 1.5])
def test_impossible_stop_ids(tmp_path, eos):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id"):
        c.stop_ids(tmp_path)


# ---- sizes ---------------------------------------------------------------------------------------


def small_lm(**sizes):
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LMConfig(**small | {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes)


def small_clip(**sizes):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ClipConfig(**small | {"image_size": 112} | sizes)


@pytest.mark.parametrize("config", [
    LongVAConfig(), LMConfig(), LongVAConfig(scheme="anyres"), small_lm(), small_lm(tie_word_embeddings=True),
    small_lm(attention_bias=False), small_lm(head_dim=30, num_attention_heads=6),
    LongVAConfig(small_lm(hidden_size=48), small_clip(patch_size=7, num_hidden_layers=3)),
    LongVAConfig(small_lm(tie_word_embeddings=True), small_clip(intermediate_size=99), "anyres"),
])  # fmt: skip
def test_counts_each_parameter(config):
    with torch.device("meta"):
        model = longva.LongVA(config) if isinstance(config, LongVAConfig) else longva.LM(config)
    assert c.num_parameters(config) == sum(p.numel() for p in model.parameters())
    lm = getattr(config, "lm", config)
    assert c.layer_parameters(lm) == sum(p.numel() for p in model.model.layers[0].parameters())
    assert lm.num_hidden_layers * c.layer_parameters(lm) + c.root_parameters(lm) == c.num_parameters(lm)


def test_operations_of_training():
    """Forward of Qwen2-7B: 14.14 GFLOP per token for its weights, 200,704 per token of length for attention."""
    lm = LMConfig()
    assert c.train_flop(lm, 0) == pytest.approx(3 * 14.14e9, rel=1e-3)
    assert c.train_flop(lm, 224_000) - c.train_flop(lm, 0) == 3 * 200_704 * 224_000
    assert c.train_flop(lm, 224_000) == pytest.approx(177.3e9, rel=1e-3)


# ---- sampling, against transformers' own processors ----------------------------------------------

SAMPLINGS = [
    Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),  # the released folder's
    Sampling(temperature=1.0),
    Sampling(temperature=1.3, top_k=3),
    Sampling(temperature=0.5, top_p=0.3),
    Sampling(temperature=0.9, top_p=1e-9, repetition_penalty=2.0),
    Sampling(temperature=2.0, top_p=0.95, top_k=1000, repetition_penalty=0.5),
]


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("said", [[], [3, 3, 17], list(range(40))])
def test_odds_are_those_of_transformers(how, said):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(101, generator=torch.Generator().manual_seed(len(said))) * 4
    theirs = logits[None].clone()
    if said:
        theirs = warpers.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(torch.tensor([said]), theirs)
    theirs = warpers.TemperatureLogitsWarper(how.temperature)(None, theirs)
    if how.top_k:
        theirs = warpers.TopKLogitsWarper(how.top_k)(None, theirs)
    if how.top_p < 1:
        theirs = warpers.TopPLogitsWarper(how.top_p)(None, theirs)
    torch.testing.assert_close(odds_of_all(logits, said, how), theirs[0].softmax(-1), atol=1e-6, rtol=1e-5)


def odds_of_all(logits, said, how):
    ids, p = c.next_token_probs(logits, said, how)
    return torch.zeros_like(logits).index_copy(0, ids, p)


def test_a_top_p_of_one_keeps_every_id():
    logits = torch.linspace(0, -20, 50_000)  # whose rounded sum passes 1 before the end
    assert len(c.next_token_probs(logits, [], Sampling(temperature=1.0, top_p=1.0, top_k=0))[0]) == 50_000


def test_greedy_takes_the_best_and_a_penalty_can_change_it():
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert sample(logits, [1], Sampling()) == 1
    assert sample(logits, [1], Sampling(repetition_penalty=1.05)) == 2
    assert sample(-logits, [3], Sampling(repetition_penalty=1.05)) == 3  # 1.0 / 1.05 still beats -1.0
    assert logits.tolist() == torch.tensor([1.0, 3.0, 2.9, -1.0]).tolist(), "the model's scores were changed"


def test_draws_follow_the_odds_and_the_seed():
    logits, how = torch.tensor([2.0, 1.0, 0.0, -1.0]), Sampling(temperature=1.0, top_k=3)
    dice = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, [], how, dice) for _ in range(4000)])
    share = draws.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, odds_of_all(logits, [], how), atol=0.03, rtol=0)
    again = torch.Generator().manual_seed(0)
    assert [sample(logits, [], how, again) for _ in range(50)] == draws[:50].tolist()
