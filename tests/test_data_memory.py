import ctypes
import gc
import json
import os
import re
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import longva
import ring
import train_text
from data import flags, memory, runs, synthetic, weights
from data.config import ClipConfig, LMConfig, LongVAConfig, num_parameters, to_dict
from data.memory import Step
from tests import ranks
from tests.test_data_config import small_clip as eye
from tests.test_data_config import small_lm as lm

QWEN = LMConfig()
REAL = LongVAConfig()
GB = 10**9
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and tunes glibc")


def total(step):
    return sum(memory.step_terms(step).values())


def test_cache_is_counted_as_it_is_made():
    cache = longva.KVCache(lm(head_dim=10), 1, 77, torch.empty(0, device="meta", dtype=torch.bfloat16))
    assert memory.cache_bytes(lm(head_dim=10), 77, 2) == cache.kv.nbytes


# ---- measured on an H100 of 80 GB and an H200, torch 2.11, expandable segments -------------------


def test_an_answer_on_an_h100():
    """3,000 frames with Qwen2-7B and ViT-L: 41.5 GB allocated, 41.7 reserved."""
    terms = memory.answer_terms(REAL, 3000 * 144 + 80)
    assert sum(terms.values()) == pytest.approx(41.7 * GB, rel=0.1)


@pytest.mark.parametrize("layers, tokens, reserved, settings", [
    (12, 28_000, 49.7, {"offload": False}),
    (12, 28_000, 51.7, {"offload": False, "offload_activations": False}),
    (4, 28_000, 18.6, {}),
    (4, 224_000, 37.1, {"checkpointing": "selective", "mlp_tile": 28_000}),
    (28, 28_000, 140.1, {"offload": False}),
])  # fmt: skip
def test_a_training_step_on_a_gpu(layers, tokens, reserved, settings):
    """Forward and backward of one micro-batch of several, on one rank; AdamW's moments beside all 28 layers alone."""
    step = Step(LMConfig(num_hidden_layers=layers), 1, tokens, grad_accumulation=2, **settings)
    terms = memory.step_terms(step)
    planned = sum(terms.values()) - terms["AdamW"] * (layers < 28)
    assert planned == pytest.approx(reserved * GB, rel=0.1)


# ---- measured here: processes that answer --------------------------------------------------------


def kilobytes(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def growth(run, first, args):
    """By how many bytes resident memory grows, at most, in run(*args), once run(*first) has loaded torch's own code.

    glibc is told to return freed blocks of over 64 kB to the system: it otherwise keeps those below 32 MB, and models
    of this size have few larger ones.
    """
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    torch.set_num_threads(1)
    run(*first)
    gc.collect()
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    run(*args)
    return 1024 * (kilobytes("VmHWM") - before)


def compare(predicted, run, first, cases):
    """Compare with the most that a process grew; each case runs in a process of its own, all at once."""
    with ProcessPoolExecutor(len(cases), ranks.forkserver()) as pool:
        measured = max(pool.map(partial(growth, run), first, cases, timeout=300))
    print(f"predicted / measured {predicted / measured:.3f} of {measured / 1e6:.0f} MB")
    assert predicted == pytest.approx(measured, rel=0.1)


WIDE_LM, WIDE_EYE = lm(hidden_size=256, head_dim=16), eye(hidden_size=256, intermediate_size=999, image_size=224)
ANSWERS = {  # what prevails: language model, eye, frames, frames at once, tokens at once
    "weights": (lm(hidden_size=512, intermediate_size=2048, num_hidden_layers=9, vocab_size=4000), eye(), 16, 4, 64),
    "cache": (lm(num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, head_dim=64), eye(), 60, 4, 64),
    "prefill": (lm(intermediate_size=2048), eye(patch_size=7), 96, 32, 2048),
    "vision": (WIDE_LM, WIDE_EYE, 48, 24, 64),
}
SAID = 4  # tokens of each answer


@torch.no_grad()
def answer(lm_config, eye_config, frames, batch, chunk):
    config = LongVAConfig(lm_config, eye_config)
    with torch.device("meta"):
        model = longva.LongVA(config)
    model.to_empty(device="cpu").tie()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    side, M = config.vision.side, config.vision.tokens_per_grid
    film = (longva.unires.frame(np.full((side, side, 3), i % 256, np.uint8), side) for i in range(frames))
    cache = longva.KVCache(lm_config, 1, frames * M + 2 + SAID, model.lm_head.weight)
    seen = longva.encode_video(model, longva.video.prefetch(film, 2 * batch), batch)
    parts = ring.gather_round_robin(seen, model.lm_head.weight[:0], batch * M, -(-frames // batch), ranks.ALONE)
    longva.memory.CHUNK["cpu"] = chunk
    rest = longva.prefill_prompt(model, [1, longva.chat.IMAGE, 2], [parts], cache)
    list(longva.generate(model, model.embed(torch.tensor([rest])), cache, [], SAID))
    assert cache.length == frames * M + 2 + SAID


@LINUX
@pytest.mark.parametrize("name", ANSWERS)
def test_predicts_the_peak_of_an_answer(name):
    lm_config, eye_config, frames, batch, chunk = ANSWERS[name]
    config = LongVAConfig(lm_config, eye_config)
    terms = memory.answer_terms(config, frames * config.vision.tokens_per_grid + 2 + SAID, 4, chunk, batch, 1, "cpu")
    predicted = sum(terms.values())
    assert terms[name if name in terms else "work"] > 0.6 * predicted
    small = LMConfig(96, 64, 96, 2, 4, 2), ClipConfig(64, 96, 2, 2, 14, 112), 3, 2, 16
    compare(predicted, answer, [small], [ANSWERS[name]])


# ---- measured here: processes that train ---------------------------------------------------------


def text_lm(**sizes):
    return lm(**{"vocab_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 3} | sizes)


WIDE = text_lm(hidden_size=512, intermediate_size=256, num_hidden_layers=2)
HEADS = text_lm(hidden_size=512, intermediate_size=512, num_attention_heads=16, head_dim=32, num_hidden_layers=2)
STEPS = {  # ranks, language model, tokens, flags
    "all kept": (1, text_lm(), 1536, ()),
    "recomputed": (1, text_lm(), 1536, ("--checkpointing", "full", "--grad-accumulation", "2")),
    "tiles": (1, WIDE, 3072, ("--checkpointing", "full", "--mlp-tile", "256")),
    "two ranks, recomputed around attention": (2, text_lm(), 3072, ("--checkpointing", "selective")),
    "two ranks, tiles": (2, HEADS, 2560, ("--checkpointing", "full", "--mlp-tile", "256", "--offload")),
    "two ranks, all kept, bf16": (2, text_lm(hidden_size=32, num_hidden_layers=2), 8192, ("--precision", "bf16")),
}


def parse(words):
    return flags.parse(train_text.Config, train_text.PRESETS, "tiny", words)


class StoppedError(Exception):
    """Two steps are made; saving is no part of one."""


def train(rank, world_size, port, words):
    """Two steps of train_text.py on one of several ranks."""
    if world_size > 1:
        here = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
        here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in here.items()})
    with patch.object(ring, "save_state", side_effect=StoppedError), suppress(StoppedError):
        train_text.main(parse(words))
    ring.stop()


def jobs(folder, world_size, config, S, words):
    """What `train` takes on each rank, for a model of these sizes that is made here."""
    folder.mkdir()
    with torch.device("meta"):
        shapes = longva.LM(config)
    weights.save(folder / "model", weights.init_weights(shapes, 0), to_dict(config), synthetic.TOKENIZER)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 500, 20_000).astype(np.uint16))
    given = {"weights": folder / "model", "corpus": folder / "tokens.npy", "out": folder / "run", "seq-len": S}
    given |= {"batch": 1, "steps": 2, "device": "cpu"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [*(str(word) for flag, value in given.items() for word in (f"--{flag}", value)), *words]
    return [(rank, world_size, port, words) for rank in range(world_size)]


@pytest.mark.ranks
@LINUX
@pytest.mark.parametrize("name", STEPS)
def test_predicts_the_peak_of_a_training_step(tmp_path, name):
    world_size, config, S, words = STEPS[name]
    small = jobs(tmp_path / "small", world_size, text_lm(hidden_size=32, intermediate_size=64), 64, words)
    cases = jobs(tmp_path / "case", world_size, config, S, words)
    compare(total(replace(Step.of(config, parse(cases[0][3])), ranks=world_size)), train, small, cases)


# ---- what fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("settings", [
    {}, {"mlp_tile": 1024}, {"checkpointing": "none"}, {"offload_activations": False}, {"checkpointing": "selective"},
    {"offload": False}, {"precision": "fp32"}, {"device": "cpu"}, {"mlp_tile": 4096, "ring": 1},
])  # fmt: skip
def test_the_longest_sequence_fits_and_the_next_does_not(ranks, settings):
    step = Step(QWEN, ranks, **settings)
    unit = 2 * (step.ring or ranks)

    def terms(S):
        return memory.step_terms(replace(step, seq_len=S))

    most = memory.most(unit, 250 * GB, terms)
    assert most > 0 and most % unit == 0
    assert sum(terms(most).values()) <= 250 * GB < sum(terms(most + unit).values())
    assert memory.most(unit, GB, terms) == 0


def test_each_setting_saves_what_it_is_for():
    paper = Step(QWEN)
    for step in (paper, replace(paper, precision="fp32", device="cpu")):
        assert total(replace(step, mlp_tile=1024)) < total(step) < total(replace(step, checkpointing="none"))
    assert total(paper) < total(replace(paper, offload_activations=False))
    terms = memory.step_terms(replace(paper, offload=False))
    assert terms["shards"] == pytest.approx(4 * num_parameters(QWEN) / 8, rel=1e-3)
    assert terms["AdamW"] == 2 * terms["shards"] and memory.step_terms(paper)["AdamW"] == 0
    states = 16 * num_parameters(QWEN) / 8
    hidden = 28 * 28_000 * 3584 * 2  # Sec. 3.1: activations in CPU memory, 5.6 GB a rank
    assert memory.host_bytes(paper) == pytest.approx(states + hidden, rel=1e-6)
    assert memory.host_bytes(replace(paper, device="cpu")) == 0


# ---- the tables of --plan ------------------------------------------------------------------------


def test_table_of_an_answer(capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device, ranks: 80 * GB // ranks)
    monkeypatch.setenv("WORLD_SIZE", "4")
    memory.show_answer(REAL, 40, 320, "cpu", b=4)
    said = capsys.readouterr().out
    assert "4 rank(s)" in said and "8 rank(s)" in said and "320 tokens of text" in said
    terms = memory.answer_terms(REAL, 40 * 144 + 320, 4, ranks=4, device="cpu")
    row = next(line.split() for line in said.splitlines() if line.startswith("40 frames"))
    assert row[2:] == [f"{size / GB:.3f}" for size in [*terms.values(), sum(terms.values())]]
    most = memory.most(1, 20 * GB, lambda n: memory.answer_terms(REAL, n * 144 + 320, 4, ranks=4, device="cpu"))
    assert f"most frames: {most:,} in 20.0 GB" in said
    memory.show_answer(QWEN, 40, 320, "cuda", b=2)
    said = capsys.readouterr().out
    assert "3,000 k tokens" in said and "frames" not in said and "in 78.0 GB" in said
    monkeypatch.setenv("RANK", "1")
    memory.show_answer(REAL, 40, 320, "cpu", b=4)
    assert capsys.readouterr().out == ""


def test_table_of_a_step(capsys):
    memory.show_step(Step(QWEN, 4))
    said = capsys.readouterr().out
    assert "4 rank(s)" in said and "8 rank(s)" in said and "7,615.6 M parameters, bf16, cuda" in said
    terms = memory.step_terms(Step(QWEN, 4))
    row = next(line.split() for line in said.splitlines() if line.startswith("as given"))
    assert row[2:] == [f"{size / GB:.3f}" for size in [*terms.values(), sum(terms.values())]]
    for name in ("checkpointing none", "checkpointing selective", "mlp_tile 1024", "offload False"):
        assert said.count(f"\n{name}") == 4, name
    memory.show_step(Step(QWEN, 1, ring=3))
    assert "3 rank(s)" in capsys.readouterr().out


@pytest.mark.parametrize("words, model", [
    ("", ""), ("--preset longva", "the tiny model, for --weights names no other: 0.8 M"),
    ("--preset longva --device cuda --weights {folder}", "{folder}: 7,615.6 M parameters, bf16, cuda"),
])  # fmt: skip
def test_plan_makes_nothing_and_reads_config_json_alone(tmp_path, capsys, monkeypatch, words, model):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(QWEN)))
    monkeypatch.setattr(train_text.ring, "start", None)
    words = [*words.format(folder=tmp_path).split(), "--plan", "--out", str(tmp_path / "run")]
    flags.run(train_text.main, train_text.Config, train_text.PRESETS, "tiny", words)
    said = capsys.readouterr().out
    assert said.startswith(model.format(folder=tmp_path)) and ("the tiny model" in said) == ("tiny" in model)
    assert "longest sequence" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, complaint", [
    ("--plan --weights nowhere", "nowhere"),
    ("--plan --mlp-tile -1", "--mlp-tile -1 makes no sense"),
    (f"--plan --weights {runs.TINY / 'longva'}", "sees already"),
])  # fmt: skip
def test_mistakes_get_one_sentence(capsys, words, complaint):
    with pytest.raises(SystemExit) as refusal:
        flags.run(train_text.main, train_text.Config, train_text.PRESETS, "tiny", words.split())
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and complaint in said and len(said.strip().splitlines()) == 1, said
