"""clip.py against Hugging Face's CLIPVisionModel, on small random towers of odd and even sizes."""

import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from clip import ClipConfig, ClipVision

SIZES = {  # hidden, intermediate, layers, heads, patch, image
    "plain": ClipConfig(32, 64, 3, 4, 8, 32),
    "odd heads": ClipConfig(48, 40, 2, 3, 7, 28),
    "odd patches": ClipConfig(24, 96, 4, 2, 5, 25),
    "one patch, one layer": ClipConfig(16, 16, 1, 1, 8, 8),
}


def twins(name, dtype=torch.float32):
    """Hugging Face's tower and ours with the same random weights (biases and norms too), and some pixels."""
    transformers = pytest.importorskip("transformers")
    config = SIZES[name]
    torch.manual_seed(0)
    sizes = {k: v for k, v in vars(config).items() if k != "select_layer"}
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).eval()
    for weight in theirs.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    ours = ClipVision(config)
    ours.load_state_dict({k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}, strict=True)
    pixels = torch.randn(3, 3, config.side, config.side)
    return theirs.to(dtype), ours.to(dtype), pixels.to(dtype)


@pytest.mark.oracle
@pytest.mark.parametrize("name", SIZES)
def test_equals_transformers(name):
    """Each hidden state that can be chosen, and the vector that CLIP compares with captions."""
    theirs, ours, pixels = twins(name)
    want = theirs(pixels, output_hidden_states=True)
    assert_close(ours(pixels), want.hidden_states[-2][:, 1:], atol=1e-5, rtol=1e-5)
    assert_close(ours.features(pixels), want.pooler_output, atol=1e-5, rtol=1e-5)
    layers = ours.config.num_hidden_layers
    for layer in range(-layers - 1, layers + 1):
        ours.config = replace(SIZES[name], select_layer=layer)
        assert_close(ours(pixels), want.hidden_states[layer][:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
def test_gradients_equal_transformers_and_survive_recomputing():
    theirs, ours, pixels = twins("odd heads")
    weight = torch.randn(3, 16, 48)
    (theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:] * weight).sum().backward()
    want = {k.removeprefix("vision_model."): p.grad for k, p in theirs.named_parameters()}
    for ours.recompute in (False, True):
        ours.zero_grad()
        (ours(pixels) * weight).sum().backward()
        for name, p in ours.named_parameters():
            if re.match(r"encoder.layers.1|post_layernorm", name):  # behind the chosen state: never run
                assert p.grad is None, name
            else:
                assert_close(p.grad, want[name], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.oracle
def test_bfloat16_is_no_worse_than_transformers():
    """Both round differently; measured against float32, ours may err at most 1.5 times as much, and 5 %."""
    theirs, ours, pixels = twins("plain", torch.bfloat16)
    exact = ours.float()(pixels.float())
    theirs_off = (theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].float() - exact).norm()
    got = ours.bfloat16()(pixels)
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() <= min(1.5 * theirs_off, 0.05 * exact.norm())


def test_real_size_on_meta(check_shapes):
    """What the projector expects; test_data_config.py counts the parameters."""
    with torch.device("meta"):
        model, pixels = ClipVision(ClipConfig()).bfloat16(), torch.empty(2, 3, 336, 336, dtype=torch.bfloat16)
        assert model(pixels).shape == (2, 576, 1024) and model.features(pixels).shape == (2, 1024)


@pytest.mark.parametrize("change, message", [
    ({"num_channels": 1}, "reads 1 colour channels"),
    ({"num_attention_heads": 5}, "32 cannot be divided among 5 heads"),
    ({"image_size": 30}, "30 pixels is no whole number of 8-pixel patches"),
    ({"select_layer": -5}, "select_layer -5 does not exist"), ({"patch_size": 0}, "a whole number from 1"),
])  # fmt: skip
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ClipConfig.from_dict({**vars(SIZES["plain"]), **change})


def test_other_errors():
    with pytest.raises(ValueError, match="lacks patch_size"):
        ClipConfig.from_dict({k: v for k, v in vars(SIZES["plain"]).items() if k != "patch_size"})
    with pytest.raises(AssertionError, match="not \\[N, 3, 32, 32\\]"):  # a grid of another size
        ClipVision(SIZES["plain"])(torch.zeros(1, 3, 28, 32))
