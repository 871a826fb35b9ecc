import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data.flags
import longva
import train_text
from data import parameters, plan, plan_training, synthetic
from data.config import LMConfig
from data.plan_training import Step

ROOT = Path(__file__).parents[1]
QWEN = LMConfig()
PAPER = Step(QWEN, 224_000)
GB = 10**9


def lm(**sizes):
    small = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 4096, "num_hidden_layers": 3}
    return LMConfig(**small | {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes)


# ---- parameters ----


@pytest.mark.parametrize("config", [
    QWEN, lm(), lm(tie_word_embeddings=True), lm(attention_bias=False), lm(head_dim=30, num_attention_heads=6),
])  # fmt: skip
def test_shapes_are_those_of_the_model(config):
    with torch.device("meta"):
        model = longva.LM(config)
    layers, root = plan_training.layer_shapes(config), plan_training.root_shapes(config)
    layer = sorted(tuple(p.shape) if p.ndim > 1 else (len(p), 1) for p in model.model.layers[0].parameters())
    assert layer == sorted(layers)
    everything = config.num_hidden_layers * plan_training.numbers(layers) + plan_training.numbers(root)
    assert everything == sum(p.numel() for p in model.parameters()) == plan.lm_parameters(config)


def test_the_loss_takes_as_many_at_once():
    assert longva.LOSS_CHUNK == plan_training.CHUNK and longva.CHUNK == plan.CHUNK


# ---- processes, measured ----

WIDE = lm(hidden_size=1024, intermediate_size=256, num_hidden_layers=2)
HEADS = lm(hidden_size=512, intermediate_size=512, num_attention_heads=16, head_dim=32, num_hidden_layers=2)
CASES = {  # ranks, language model, tokens, flags
    "all kept": (1, lm(), 1536, ()),
    "recomputed": (1, lm(), 1536, ("--remat", "--grad-accumulation", "2")),
    "tiles": (1, WIDE, 3072, ("--remat", "--mlp-tile", "256")),
    "two ranks, recomputed around attention": (2, lm(), 3072, ("--remat", "--around")),
    "two ranks, tiles": (2, HEADS, 2560, ("--remat", "--mlp-tile", "256", "--offload")),
    "two ranks, all kept, bf16": (2, lm(hidden_size=32, num_hidden_layers=2), 8192, ("--precision", "bf16")),
}
PROBE = """
import gc, json, multiprocessing, os, socket, sys
import torch
import ring, train_text
from data import flags
import torch._dynamo

class Done(Exception):
    pass

def end(*_):
    raise Done

def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def train(flags_):
    try:
        train_text.main(flags.parse(train_text.Config, train_text.PRESETS, "tiny", flags_))
    except Done:  # two steps are made; saving is no part of one
        ring.stop()

def measure(rank, ranks, port, small, case, tell):
    torch.set_num_threads(1)
    if ranks > 1:
        here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({key: str(value) for key, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = str(port[0])
    ring.save_state = end
    train(small)  # torch's own code, once
    os.environ["MASTER_PORT"] = str(port[1])
    gc.collect()
    before = kilobytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins here
    train(case)
    tell.send(1024 * (kilobytes("VmHWM") - before))

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

for name, ranks, small, case in json.loads(sys.argv[1]):
    port, ears = (free_port(), free_port()), []
    for rank in range(ranks):
        ear, mouth = multiprocessing.Pipe()
        args = rank, ranks, port, small, case, mouth
        child = multiprocessing.get_context("fork").Process(target=measure, args=args)
        child.start()
        mouth.close()  # else a child that fails would leave us waiting
        ears.append((ear, child))
    print("MEASURED", json.dumps([name, max(ear.recv() for ear, _ in ears)]), flush=True)
    for _, child in ears:
        child.join()
"""


def command(folder, name, config, S):
    """Flags of two steps of a model of these sizes, made here."""
    model = folder / f"{name}-model"
    with torch.device("meta"):
        shapes = longva.LM(config)
    longva.save(model, parameters.init_weights(shapes, 0), config, synthetic.TOKENIZER)
    flags = {"weights": model, "corpus": folder / "tokens.npy", "out": folder / f"{name}-run", "seq-len": S}
    flags |= {"batch": 1, "steps": 2, "device": "cpu"}
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """By how many bytes resident memory grew, at most, in two steps of train_text.py, in each case, on any rank.

    Blocks of over 64 kB go back to the system when they are freed (see test_data_plan.py).
    """
    folder, jobs = tmp_path_factory.mktemp("plan"), []
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 500, 20_000).astype(np.uint16))
    for name, (ranks, config, S, flags) in CASES.items():
        small = command(folder, f"{name}-small", lm(hidden_size=32, intermediate_size=64), 64)
        jobs.append((name, ranks, [*small, *flags], [*command(folder, name, config, S), *flags]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    probe = [sys.executable, "-c", PROBE, json.dumps(jobs)]
    done = subprocess.run(probe, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("MEASURED"))


def settings(*flags):
    return data.flags.parse(train_text.Config, train_text.PRESETS, "tiny", [*flags])


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and tunes glibc")
@pytest.mark.parametrize("name", CASES)
def test_predicts_the_peak_of_a_process(measured, name):
    ranks, config, S, flags = CASES[name]
    step = plan_training.asked(config, settings("--seq-len", str(S), "--batch", "1", "--device", "cpu", *flags), ranks)
    moment, sizes = plan_training.widest(step)
    peak = sum(sizes.values())
    ratio = f"{name}: predicted / measured {peak / measured[name]:.3f} of {measured[name] / 1e6:.0f} MB"
    print(f"{ratio}, {moment}")
    assert peak == pytest.approx(measured[name], rel=0.05), ratio


# ---- what fits ----


def total(step):
    return sum(plan_training.widest(step)[1].values())


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("ideas", [
    {}, {"tile": 1024}, {"remat": False}, {"offload_activations": False}, {"around": True}, {"offload": False},
    {"b": 4}, {"device": "cpu"}, {"tile": 4096, "circle": 1},
])  # fmt: skip
def test_the_longest_fits_and_the_next_does_not(ranks, ideas):
    step = replace(PAPER, **{"ranks": ranks, "circle": ranks} | ideas)
    room, most = 250 * GB, plan_training.longest(step, 250 * GB, 4000 * GB)
    unit = 2 * step.circle if step.circle > 1 else 1
    assert most > 0 and most % unit == 0
    assert plan_training.fits(replace(step, S=most), room, 4000 * GB)
    assert not plan_training.fits(replace(step, S=most + unit), room, 4000 * GB)
    assert plan_training.longest(step, GB, 4000 * GB) == 0


def test_host_memory_can_be_what_ends_it():
    most = plan_training.longest(PAPER, 80 * GB, 2000 * GB)
    assert 0 < plan_training.longest(PAPER, 80 * GB, 400 * GB) < most
    assert plan_training.longest(PAPER, 80 * GB, 100 * GB) == 0
    assert plan_training.host(replace(PAPER, device="cpu")) == 0


def test_longer_takes_more_and_more_ranks_take_less():
    lengths = [2048 * 2**i for i in range(10)]
    for ideas in ({}, {"tile": 1024}, {"around": True}, {"remat": False}, {"b": 4}, {"device": "cpu"}):
        steps = [replace(PAPER, S=S, **ideas) for S in lengths]
        assert [*map(total, steps)] == sorted(map(total, steps))
        assert [*map(plan_training.host, steps)] == sorted(map(plan_training.host, steps))
        ranks = [replace(PAPER, ranks=R, circle=R, **ideas) for R in (16, 8, 4, 2)]
        assert [*map(total, ranks)] == sorted(map(total, ranks))


def test_each_idea_saves_what_it_is_for():
    for step in (PAPER, replace(PAPER, b=4, device="cpu")):
        assert total(replace(step, tile=1024)) < total(step) < total(replace(step, remat=False))
    assert total(PAPER) < total(replace(PAPER, offload_activations=False)) < total(replace(PAPER, remat=False))
    shards = plan_training.widest(replace(PAPER, offload=False))[1]
    assert shards["shards"] == pytest.approx(4 * plan.lm_parameters(QWEN) / 8, rel=1e-3)
    assert shards["AdamW"] == 2 * shards["shards"] and plan_training.widest(PAPER)[1]["AdamW"] == 0


def test_pinned_blocks_are_powers_of_two():
    assert [plan_training.pinned(n) for n in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]


# ---- the page ----


def test_page_shows_each_idea(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    cfg = data.flags.parse(
        train_text.Config, train_text.PRESETS, "tiny", "--preset longva --device cuda --host-gb 2000".split()
    )
    page = plan_training.table(QWEN, cfg)
    assert "4 ranks, each" in page and "8 ranks, each" in page and "1 rank\n" not in page
    step = plan_training.asked(QWEN, cfg, 8)
    row = [line for line in page.splitlines() if line.startswith("  as asked")]
    moment, sizes = plan_training.widest(step)
    numbers = [*sizes.values(), sum(sizes.values()), plan_training.host(step)]
    assert row[2].split()[2:10] == [f"{n / GB:.2f}" for n in numbers] and row[2].endswith(moment)
    most = [plan_training.longest(step, card * GB, 2000 * GB) for card in plan.CARDS]
    assert row[3].split()[2:] == [f"{S:,}" for S in most]
    for name in ("MLP by tiles", "recompute nothing", "hidden states on the GPU", "parameters on the GPU", "--around"):
        assert page.count(name) == 4, name


def test_plan_of_a_cpu_counts_all_as_one_memory(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    page = plan_training.table(lm(), settings("--device", "cpu", "--host-gb", "16", "--remat"))
    assert "8 GB" in page and "2 GB" in page and "GPU" not in page


@pytest.mark.parametrize("flags", [(), ("--preset", "longva"), ("--remat", "--mlp-tile", "64", "--around")])
def test_plan_makes_nothing(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(train_text.ring, "start", None)
    where = ["--plan", "--out", str(tmp_path / "run")]
    data.flags.run(train_text.main, train_text.Config, train_text.PRESETS, "tiny", [*flags, *where])
    assert "longest sequence" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_plan_reads_config_json_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(longva.to_dict(QWEN)))
    words = ["--preset", "longva", "--weights", str(tmp_path), "--device", "cuda", "--plan"]
    data.flags.run(train_text.main, train_text.Config, train_text.PRESETS, "tiny", words)
    assert "7,615.6 million parameters, bf16, cuda" in capsys.readouterr().out


@pytest.mark.parametrize("flags, complaint", [
    ("--plan --weights nowhere", "nowhere"),
    ("--plan --ring 3", "1 rank(s) cannot form rings of 3"),
    ("--plan --host-gb 0", "--host-gb 0.0 makes no sense"),
    ("--plan --mlp-tile -1", "--mlp-tile -1 makes no sense"),
    (f"--plan --weights {train_text.runs.TINY / 'longva'}", "sees already"),
])  # fmt: skip
def test_mistakes_get_one_sentence(capsys, flags, complaint):
    with pytest.raises(SystemExit) as refusal:
        data.flags.run(train_text.main, train_text.Config, train_text.PRESETS, "tiny", flags.split())
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and complaint in said and len(said.strip().splitlines()) == 1, said
