"""Position scaling against transformers: frequencies, amplitude, logits; config.json in and out."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longva
import vniah
from data import results, weights
from data.config import LMConfig, RopeScaling, check_trainable, read_config, to_dict
from data.runs import TINY

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
SCALINGS = [  # as folders write them
    {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},  # Qwen2.5's
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "truncate": False},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},  # Llama-3.1's; 3.2 and 3.3 have other numbers alone
]  # fmt: skip
KINDS = [f"{s.get('type', s.get('rope_type'))}-{i}" for i, s in enumerate(SCALINGS)]


def config_of(scaling, kind="qwen2", **changes):
    return LMConfig.from_dict({"model_type": kind, **SIZES, **changes, "rope_scaling": scaling})


@pytest.mark.parametrize("scaling", SCALINGS, ids=KINDS)
def test_cos_sin_logits_and_a_cache_in_pieces_equal_transformers(tmp_path, scaling):
    kind = "llama" if scaling.get("rope_type") == "llama3" else "qwen2"
    config = AutoConfig.for_model(kind, **SIZES, rope_scaling=dict(scaling), tie_word_embeddings=False)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    weights.write(tmp_path, theirs.named_parameters(), {"model_type": kind, **SIZES, "rope_scaling": scaling})
    ours = longva.load(tmp_path)
    lm, S = ours.config, 150
    pos_S, ids_1S = torch.arange(S), torch.arange(S)[None] * 31 % 97

    cos_1SK, sin_1SK = theirs.model.rotary_emb(torch.zeros(1), pos_S[None])
    cos_SK, sin_SK = longva.rope(pos_S, lm.head_width, lm.rope_theta, lm.rope_scaling, S)
    sign_K = torch.tensor([-1.0, 1.0]).repeat_interleave(lm.head_width // 2)  # `rotate` adds with a minus
    assert_close(cos_SK, cos_1SK[0], rtol=0, atol=2e-6)
    assert_close(sign_K * sin_SK, sin_1SK[0], rtol=0, atol=2e-6)
    with torch.no_grad():
        x_1SD = ours.embed(ids_1S)
        h_1SD = ours.model(x_1SD, pos_S)
        logits_1SV = ours.logits(h_1SD)
        assert_close(logits_1SV, theirs(ids_1S).logits, rtol=0, atol=2e-5)
        ours.model.rope_len = S
        h_1TD = longva.prefill(ours, x_1SD, longva.KVCache(lm, 1, S, x_1SD), chunk=32)
        assert_close(h_1TD[:, -1], h_1SD[:, -1], rtol=0, atol=1e-5)
        ours.model.config = replace(lm, rope_scaling=None)  # the scaling matters: without it, logits differ
        assert (ours.logits(ours.model(x_1SD, pos_S)) - logits_1SV).abs().max() > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS, ids=KINDS)
@pytest.mark.parametrize("K, theta", [(32, 1e4), (128, 1e6), (128, 5e5)])
def test_frequencies_equal_transformers(scaling, K, theta):
    changes = {"hidden_size": 4 * K, "rope_theta": theta, "max_position_embeddings": 8192}
    scaling = {name: x for name, x in scaling.items() if name != "original_max_position_embeddings"}
    theirs = AutoConfig.for_model("llama", **{**SIZES, **changes}, rope_scaling=dict(scaling))
    ours = config_of(scaling, "llama", **changes)
    for S in (100, 8192, 50_000):
        kind = ours.rope_scaling.rope_type
        frequency, amplitude = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=S)
        base = ours.rope_scaling.base(theta, K, S)
        found = ours.rope_scaling.scale(base ** (-torch.arange(0, K, 2) / K), base)
        assert_close(found, frequency, rtol=1e-6, atol=0)
        assert ours.rope_scaling.amplitude == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS, ids=KINDS)
def test_config_goes_out_as_it_came_in(tmp_path, scaling):
    config = config_of(scaling)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path) == replace(config, head_dim=16)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_type"] == config.rope_scaling.rope_type
    assert theirs.rope_parameters["factor"] == config.rope_scaling.factor
    new_style = {"rope_type" if name == "type" else name: x for name, x in scaling.items()} | {"rope_theta": 1e4}
    raw = {name: x for name, x in SIZES.items() if name != "rope_theta"} | {"rope_parameters": new_style}
    assert LMConfig.from_dict(raw | {"rope_parameters": None, "rope_scaling": new_style}).rope_theta == 1e4  # qwen2
    assert LMConfig.from_dict({"model_type": "qwen2", **raw}) == config


@pytest.mark.parametrize("scaling, complaint", [
    ({"type": "yarn"}, "rope_scaling lacks factor"),
    ({"type": "linear", "factor": 0.5}, "factor is 0.5"),
    ({"type": "linear", "factor": math.nan}, "factor is nan"),
    ({"type": "yarn", "factor": "8"}, "factor is '8'"),
    ({"type": "yarn", "factor": 8, "mscale": 1}, "has 'mscale'"),
    ({"type": "llama3", "factor": 8, "low_freq_factor": 4}, "must be below"),
    ({"type": "yarn", "factor": 8, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
])  # fmt: skip
def test_refusals(scaling, complaint):
    with pytest.raises(ValueError, match=complaint):
        config_of(scaling)


def test_refusals_for_another_base_to_train_and_on_the_command_line():
    with pytest.raises(ValueError, match="needs a base above 1"):
        config_of({"type": "yarn", "factor": 8}, rope_theta=1)
    with pytest.raises(ValueError, match="dynamic NTK scaling, which is for answering"):
        check_trainable(config_of({"type": "dynamic", "factor": 2}))
    check_trainable(config_of({"type": "yarn", "factor": 2}))
    for scaling, complaint in (("ntk:8", "rope_type is 'ntk'"), ("yarn", "")):
        with pytest.raises(ValueError, match=f"--rope-scaling {scaling}: {complaint}.*write KIND:FACTOR"):
            RopeScaling.parse(scaling, 256)


def test_needles_with_a_scaling_are_scored_as_in_one_pass(tmp_path, monkeypatch):
    """Also dynamic NTK, whose keys depend on the haystack's length, so that lengths cannot share a cache."""
    for name in ("draw_heatmaps", "draw_comparison"):
        monkeypatch.setattr(results, name, lambda *a: None)
    grid = {"frames": (8, 300), "depths": (0.0, 0.5), "needle_count": 3, "distractors": 0, "max_new_tokens": 0}
    grid |= {"weights": TINY / "baseline", "controls": False, "rope_scaling": ("dynamic:1", "yarn:8")}
    found = []
    for engine in ("cache", "ring"):
        vniah.main(vniah.Config(protocol="tiny", engine=engine, out=tmp_path / engine, **grid))
        lines = results.read_results(tmp_path / engine)
        found.append({key: {n: p["hit"] for n, p in probes.items()} for key, probes in lines.items()})
    assert found[0] == found[1] and len(found[0]) == 3 * 4
    rates = {name: sum(sum(p.values()) for key, p in found[0].items() if key[0] == name) for name, *_ in found[0]}
    assert len(set(rates.values())) > 1, rates  # a scaling changes something
