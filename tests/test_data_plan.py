import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import longva
from data import plan
from data.config import ClipConfig, LMConfig, LongVAConfig

ROOT = Path(__file__).parents[1]
REAL = LongVAConfig()


def eye(**sizes):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ClipConfig(**small | {"image_size": 112} | sizes)


def lm(**sizes):
    small = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LMConfig(**small | {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes)


# ---- known sizes ----


def test_qwen2_7b_with_vit_l():
    terms = plan.memory(REAL, 3000 * 144)
    assert plan.lm_parameters(REAL.lm) == 7_615_616_512  # what Qwen2-7B's page says
    assert terms["weights"] == pytest.approx(15.87e9, rel=1e-3)
    assert terms["cache"] == 3000 * 144 * 57_344 == pytest.approx(24.8e9, rel=2e-3)
    assert plan.peak(terms) < 45e9  # 3,000 frames fit on one card of 48 GB


CONFIGS = [
    REAL, REAL.lm, LongVAConfig(scheme="anyres"), lm(), lm(tie_word_embeddings=True), lm(attention_bias=False),
    lm(head_dim=30, num_attention_heads=6), LongVAConfig(lm(hidden_size=48), eye(patch_size=7, num_hidden_layers=3)),
    LongVAConfig(lm(tie_word_embeddings=True), eye(intermediate_size=99), "anyres"),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_counts_each_parameter(config):
    with torch.device("meta"):
        model = longva.LongVA(config) if isinstance(config, LongVAConfig) else longva.LM(config)
    assert plan.parameters(config) == sum(p.numel() for p in model.parameters())


def test_cache_is_counted_as_it_is_made():
    cache = longva.KVCache(lm(head_dim=10), 1, 77, torch.empty(0, device="meta", dtype=torch.bfloat16))
    assert plan.cache_bytes(lm(head_dim=10), 77, 2) == cache.kv.nbytes


# ---- a process, measured ----

CASES = {  # name, the term that is meant to prevail: language model, eye, frames, frames at once, tokens at once
    "weights": (lm(hidden_size=512, intermediate_size=2048, num_hidden_layers=9, vocab_size=4000), eye(), 16, 4, 64),
    "cache": (lm(num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, head_dim=64), eye(), 60, 4, 64),
    "reading": (lm(intermediate_size=2048), eye(patch_size=7), 96, 32, 2048),
    "vision": (
        lm(hidden_size=256, head_dim=16),
        eye(hidden_size=256, intermediate_size=999, image_size=224),
        48,
        24,
        64,
    ),
}
SAID = 4  # tokens of each answer
PROBE = """
import json, multiprocessing, sys
import numpy as np, torch
import longva
import ring
from tests.test_data_plan import CASES, SAID
from data.config import ClipConfig, LMConfig, LongVAConfig

def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

@torch.no_grad()
def answer(lm, eye, frames, batch, chunk):
    config = LongVAConfig(lm, eye)
    with torch.device("meta"):
        model = longva.LongVA(config)
    model.to_empty(device="cpu").tie()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    side, M = config.vision.side, config.vision.tokens_per_grid
    film = (longva.unires.frame(np.full((side, side, 3), i % 256, np.uint8), side) for i in range(frames))
    cache = longva.KVCache(lm, 1, frames * M + 2 + SAID, model.lm_head.weight)
    seen = longva.encode_video(model, longva.video.prefetch(film, 2 * batch), batch)
    parts = ring.gather_round_robin(seen, model.lm_head.weight[:0], batch * M, ring.World(0, 1, torch.device("cpu")))
    rest = longva.prefill_prompt(model, [1, longva.chat.IMAGE, 2], [parts], cache, chunk)
    list(longva.generate(model, model.embed(torch.tensor([rest])), cache, [], SAID, chunk=chunk))
    assert cache.length == frames * M + 2 + SAID

def measure(case, tell):
    answer(LMConfig(96, 64, 96, 2, 4, 2), ClipConfig(64, 96, 2, 2, 14, 112), 3, 2, 16)  # torch's own code, once
    before = kilobytes("VmRSS")
    answer(*case)
    tell.send(1024 * (kilobytes("VmHWM") - before))

for name, case in CASES.items():  # each in a process of its own, whose high-water mark begins at its birth
    ear, mouth = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=measure, args=(case, mouth))
    child.start()
    mouth.close()  # else a child that fails would leave us waiting
    print(json.dumps([name, ear.recv()]), flush=True)
    child.join()
"""


@pytest.fixture(scope="module")
def measured():
    """By how many bytes resident memory grew, at most, in each case.

    Blocks of over 64 kB are to go back to the system when they are freed: glibc otherwise keeps those below 32 MB
    for later, and models of this size have few larger ones.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and tunes glibc")
@pytest.mark.parametrize("name", CASES)
def test_predicts_the_peak_of_a_process(measured, name):
    lm_config, eye_config, frames, batch, chunk = CASES[name]
    config = LongVAConfig(lm_config, eye_config)
    terms = plan.memory(config, frames * plan.frame_tokens(config) + 2 + SAID, 4, chunk, batch, 1, "cpu")
    assert terms[name] > 0.6 * plan.peak(terms)
    print(f"{name}: predicted / measured {plan.peak(terms) / measured[name]:.3f} of {measured[name] / 1e6:.0f} MB")
    assert plan.peak(terms) == pytest.approx(measured[name], rel=0.05)


def test_operations_of_training():
    """Forward of Qwen2-7B: 14.14 GFLOP per token for its weights, 200,704 per token of length for attention."""
    assert plan.train_flop(REAL.lm, 0) == pytest.approx(3 * 14.14e9, rel=1e-3)
    assert plan.train_flop(REAL.lm, 224_000) - plan.train_flop(REAL.lm, 0) == 3 * 200_704 * 224_000
    assert plan.train_flop(REAL.lm, 224_000) == pytest.approx(177.3e9, rel=1e-3)


# ---- what fits ----


@pytest.mark.parametrize("config, how", [
    (REAL, {}), (REAL, {"ranks": 8}), (REAL, {"b": 4, "device": "cpu"}), (REAL.lm, {}), (REAL, {"chunk": 100_000}),
])  # fmt: skip
def test_most_frames_fit_and_one_more_does_not(config, how):
    M = plan.frame_tokens(config)
    most = plan.most_frames(config, 48 * 10**9, 320, **how)
    assert plan.peak(plan.memory(config, most * M + 320, **how)) <= 48e9
    assert plan.peak(plan.memory(config, (most + 1) * M + 320, **how)) > 48e9
    assert plan.most_frames(config, 10**9, 320, **how) == 0


# ---- the page ----


def settings(**changed):
    asked = {"frames": 40, "fps": None, "video": None, "batch": 32, "chunk": 2048, "dtype": "auto", "device": "cpu"}
    talk = {"chat": False, "max_tokens": 256}
    return SimpleNamespace(**asked | talk | changed)


def test_page_shows_what_was_asked_and_what_fits(monkeypatch):
    monkeypatch.setattr(plan, "room_bytes", lambda device, ranks: 80 * 10**9 // ranks)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    page = plan.table(REAL, settings())
    asked = next(line.split() for line in page.splitlines() if line.startswith("*"))
    terms = plan.memory(REAL, 40 * 144 + 256 + plan.PROMPT, 4, device="cpu")
    assert asked[1:] == ["40", *(f"{size / 1e9:.3f}" for size in [*terms.values(), plan.peak(terms)])]
    most = plan.most_frames(REAL, 80 * 10**9, 256 + plan.PROMPT, b=4, device="cpu")
    assert f"at most {most:,} frames in 80.0 GB" in page and "float32, cpu" in page
    assert "bfloat16, cpu" in plan.table(REAL, settings(dtype="bf16"))
    assert "4,416 tokens of text" in plan.table(REAL, settings(chat=True))


def test_page_is_for_as_many_ranks_as_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    page = plan.table(REAL, settings())
    assert "4 ranks, each" in page and "8 ranks, each" in page and "1 rank\n" not in page


def test_page_of_a_language_model_counts_tokens():
    page = plan.table(REAL.lm, settings())
    assert "229,376" in page and "frames" not in page


def test_page_counts_the_frames_of_a_film(tmp_path):
    for i in range(7):
        longva.video.Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    assert "*         7" in plan.table(REAL, settings(video=tmp_path, fps=1.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_page_for_a_gpu_can_be_made_without_one():
    page = plan.table(REAL, settings(device="cuda"))
    assert "bfloat16, cuda" in page and "in 80.0 GB per rank" in page
    assert 0 < plan.room_bytes("cpu", 1) < 10**13
