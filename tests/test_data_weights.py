"""Weights to a folder and back; what is refused; what Hugging Face reads."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import longva
from data import flags
from data import weights as w
from data.config import ClipConfig, LMConfig, to_dict


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 6, generator=g),
        "b.weight": torch.randn(8, 3, generator=g).to(torch.bfloat16),
        "b.bias": torch.arange(8),
        "scalar": torch.tensor(1.5),
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype and torch.equal(found[k], expected[k]) for k in expected
    )


ONE, TWO = 10**9, 150  # bytes of a shard, by the number of files that `state` then has


@pytest.mark.parametrize("shard_bytes, shards", [
    (ONE, ["model.safetensors"]), (TWO, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
])  # fmt: skip
def test_round_trip(tmp_path, shard_bytes, shards):
    config = {"model_type": "qwen2", "rope_theta": 1e9}
    w.write(tmp_path, iter(state().items()), config, shard_bytes)
    assert same(dict(w.read(tmp_path)), state()) and w.read_config(tmp_path) == config
    names = ["config.json", *shards, *([w.INDEX] if len(shards) > 1 else [])]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if len(shards) > 1:
        index = json.loads((tmp_path / w.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state().values())
        assert index["weight_map"].keys() == state().keys()
    for name in shards:
        with safe_open(tmp_path / name, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_reading_is_lazy(tmp_path):
    w.write(tmp_path, state().items(), {}, shard_bytes=1)
    stream = w.read(tmp_path)
    next(stream)
    (tmp_path / "model-00004-of-00004.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model-00004.*cannot be read"):
        list(stream)


def test_tensors_are_written_as_they_look(tmp_path):
    """Slices, transposes and parameters; a precision is that of floating tensors only."""
    fused = torch.arange(24.0).view(6, 4)
    tensors = {"q": fused[:2], "k": fused[2:], "t": fused.t(), "all": fused, "p": nn.Parameter(fused)} | state()
    for dtype in (None, torch.bfloat16):
        w.write(tmp_path, tensors.items(), {}, dtype=dtype)
        want = {name: t.to(dtype if dtype and t.is_floating_point() else t.dtype) for name, t in tensors.items()}
        assert same(dict(w.read(tmp_path)), want)


@pytest.mark.parametrize("old", [ONE, TWO], ids=["single", "shards"])
@pytest.mark.parametrize("new", [ONE, TWO], ids=["to single", "to shards"])
def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, old, new):
    """Stop before each change of a name on the disk; the folder must hold one whole model every time."""

    def stops(call):
        def run(*args, **kwargs):
            if next(changes) == last:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return run

    seen, last, changes = [], -1, itertools.count()
    while last < next(changes):  # all were tried when the last one is not reached
        last, changes = last + 1, itertools.count()
        folder = tmp_path / str(last)
        w.write(folder, state(1).items(), {"model": 1}, old)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(w.os, "replace", stops(os.replace))
            patch.setattr(type(tmp_path), "unlink", stops(type(tmp_path).unlink))
            w.write(folder, state(2).items(), {"model": 2}, new)
        found = dict(w.read(folder))
        seen.append(1 if same(found, state(1)) else 2 if same(found, state(2)) else 0)
        w.write(folder, state(3).items(), {"model": 3}, new)  # and the next export works and sweeps up
        assert same(dict(w.read(folder)), state(3)) and w.read_config(folder) == {"model": 3}
        assert len(list(folder.glob("*.safetensors"))) == (1 if new == ONE else 2)
        assert not list(folder.glob(".*"))
    assert seen == sorted(seen) and {1, 2} == set(seen) and len(seen) > 5


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_peaks_at_the_models_own_size(tmp_path, dtype):
    """One file: were all of it mapped (or held) while the model is filled, the peak would be 2 or 1.5 times that."""
    config = LMConfig(8000, 512, 2048, 12, 8, 2, rope_theta=1e4)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in longva.LM(config).named_parameters()}
    w.write(tmp_path, ((n, torch.ones(s, dtype=torch.bfloat16)) for n, s in shapes.items()), to_dict(config))

    def peak():  # bytes that this process held at most since it was told to count anew
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    model = longva.load(tmp_path, dtype=dtype)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 90e6
    # 8 MB for what torch needs once, whatever the model: threads, first calls.
    assert peak() - before < 1.15 * size + 8e6, f"{(peak() - before) / size:.2f} times its size"


# ---- strict filling ------------------------------------------------------------------------------


def test_fill_strictly():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    parameters = dict(model.named_parameters())
    values = enumerate(parameters.items())
    stream = {f"model.{name}": torch.full(p.shape, float(i), dtype=torch.float64) for i, (name, p) in values}
    stream["model.rotary.inv_freq"] = torch.ones(7)
    w.fill_strictly(parameters, stream.items(), rename=lambda n: n.removeprefix("model."), ignore=["*.inv_freq"])
    assert [p.unique().item() for p in parameters.values()] == [0.0, 1.0, 2.0]
    assert all(p.dtype == torch.float32 for p in parameters.values())


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s.pop(), "1 missing: b"),
    (lambda s: s.append(("a", torch.ones(2))), "a comes twice"),
    (lambda s: s.__setitem__(0, ("a", torch.ones(3))), r"a is \[3\], expected \[2\]"),
    (lambda s: s.extend((f"c{i}", torch.ones(1)) for i in range(9)), "9 not expected: c0, c1, c2, c3, c4$"),
])  # fmt: skip
def test_fill_strictly_complains(change, complaint):
    stream = [("a", torch.ones(2)), ("b", torch.ones(2))]
    change(stream)
    with pytest.raises(ValueError, match=complaint):
        w.fill_strictly({"a": torch.zeros(2), "b": torch.zeros(2)}, stream)


# ---- what users get wrong ------------------------------------------------------------------------


def index(**weight_map):
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize("files, complaint", [
    ({"pytorch_model.bin": "x"}, "expected safetensors; convert it, in that folder: python -c .* pytorch_model.bin$"),
    ({"training_args.bin": "x"}, "has no weights"),
    ({w.INDEX: "{"}, "is not valid JSON"),
    ({w.INDEX: "{}"}, "has no weight_map"),
    ({w.INDEX: '{"weight_map": ["x.safetensors"]}'}, "has no weight_map"),
    ({w.INDEX: index(a="../x.safetensors")}, r"puts a in '\.\./x.safetensors', expected a bare"),
    ({w.INDEX: index(a="x.bin")}, "expected a bare"),
    ({w.INDEX: index(a=3)}, "expected a bare"),
    ({w.INDEX: index(a="x.safetensors")}, r"lacks 1 file\(s\).* first x.safetensors"),
    ({w.INDEX: index(a="x.safetensors", b="x.safetensors"), "x.safetensors": {"a": 1}}, "1 missing: b"),
    ({w.SINGLE: "not safetensors at all"}, "cannot be read .* again"),
])  # fmt: skip
def test_complaints_about_folders(tmp_path, files, complaint):
    for name, content in files.items():
        if isinstance(content, dict):
            save_file({k: torch.ones(1) for k in content}, tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        list(w.read(tmp_path))


def test_complaints_about_config(tmp_path):
    for folder, complaint in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "config.json is missing")):
        with pytest.raises(ValueError, match=complaint):
            w.read_config(folder)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        w.read_config(tmp_path)


def test_the_conversion_works_as_printed(tmp_path, capsys):
    """With tied tensors, and with two files."""
    tied = state() | {"tied": (a := torch.ones(3)), "twin": a}
    for n, names in enumerate((["a.weight", "tied", "twin"], ["b.weight", "b.bias", "scalar"])):
        torch.save({name: tied[name] for name in names}, tmp_path / f"pytorch_model-{n}.bin")
    with pytest.raises(SystemExit):
        flags.run(lambda _: list(w.read(tmp_path)), dataclasses.make_dataclass("Cls", []), argv=[])
    command = re.search(r"python -c .*", capsys.readouterr().err)[0]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    assert same(dict(w.read(tmp_path)), tied)


def test_model_card(tmp_path, monkeypatch):
    """Command, parts and licences of a run and of the runs before it; what a user wrote stays."""
    hub = tmp_path / "models--Qwen--Qwen2-7B/snapshots/abc"
    parts = [{"weights": hub, "corpus": "my tokens"}, {"weights": tmp_path / "text/model", "data": "synthetic"}]
    hub.mkdir(parents=True)
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Qwen2\n")
    (hub / "vocab.json").write_text("{}")
    for name, settings in zip(("text", "sft"), parts):
        monkeypatch.setattr(sys, "argv", [f"/x/train_{name}.py", "--out", "a folder"])
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings | {"tower": None}, default=str))
        w.save(tmp_path / name / "model", state().items(), {}, hub)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    text = (tmp_path / "text/model/README.md").read_text()
    assert text == (
        "---\nbase_model: [Qwen/Qwen2-7B]\nlicense: other\n---\n# text\n\n## How it was made\n\n"
        "    python train_text.py --out 'a folder'\n\n| part | from | licence |\n|---|---|---|\n"
        "| model to start from | Qwen/Qwen2-7B | apache-2.0 |\n| text | my tokens | not stated there |\n"
    )
    card = tmp_path / "sft/model/README.md"
    later = card.read_text()
    assert "    torchrun --nproc-per-node 8 train_sft.py" in later and "synthetic | MIT |" in later
    assert later.endswith(text.split("## How it was made\n")[1])
    card.write_text("mine")
    w.save(tmp_path / "sft/model", state().items(), {}, hub)
    assert card.read_text() == "mine"


def test_copy_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tokenizer files"):
        w.copy_tokenizer(tmp_path, tmp_path / "x")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("x")
    w.copy_tokenizer(tmp_path, tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["vocab.json"]

    def killed(source, target):
        Path(target).write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(w.shutil, "copyfile", killed)  # again, into a folder that is complete
    with pytest.raises(KeyboardInterrupt):
        w.copy_tokenizer(tmp_path, tmp_path / "new")
    assert (tmp_path / "new" / "vocab.json").read_text() == "{}"


def test_a_full_disk_gets_its_room_back(tmp_path, monkeypatch):
    save, calls = w.save_file, iter(range(9))

    def full(tensors, file, metadata):
        save(tensors, file, metadata)
        if next(calls):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(w, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device"):
        w.write(tmp_path, state().items(), {}, 100)
    assert not [*tmp_path.iterdir()]


# ---- whole folders -------------------------------------------------------------------------------


def test_any_precision_on_the_disk_and_in_memory(tmp_path):
    torch.manual_seed(0)
    config = LMConfig(48, 16, 24, 2, 4, 2, rope_theta=1e4)
    tensors = {name: torch.randn_like(p) for name, p in longva.LM(config).named_parameters()}
    on_disk, in_memory = (torch.float32, torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)
    for kept, wanted in itertools.product(on_disk, in_memory):
        w.write(tmp_path, tensors.items(), to_dict(config), shard_bytes=6_000, dtype=kept)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        for name, p in longva.load(tmp_path, dtype=wanted).named_parameters():
            assert p.dtype == wanted and torch.equal(p, tensors[name].to(kept).to(wanted)), name


@pytest.mark.oracle
@pytest.mark.parametrize("whole", [True, False], ids=["whole CLIP", "tower alone"])
def test_a_clip_folder_of_transformers(tmp_path, whole):
    transformers = pytest.importorskip("transformers")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    eye = transformers.CLIPVisionConfig(**dict(zip(names, (32, 48, 2, 4, 4, 16))))
    text = dict(zip(names, (16, 24, 1, 2))) | {"vocab_size": 50}
    both = transformers.CLIPConfig(text_config=text, vision_config=eye.to_dict())
    theirs = transformers.CLIPModel(both) if whole else transformers.CLIPVisionModel(eye)
    theirs.save_pretrained(tmp_path)
    config = ClipConfig.from_dict(w.read_config(tmp_path))
    assert config == ClipConfig(32, 48, 2, 4, 4, 16)
    ours = longva.ClipVision(config)
    w.fill_from(ours, ((name.removeprefix(w.TOWER), tensor) for name, tensor in w.read_tower(tmp_path)))
    want = {n.split("vision_model.")[-1]: p for n, p in theirs.named_parameters()}
    assert all(torch.equal(p, want[name]) for name, p in ours.named_parameters())


@pytest.mark.oracle
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_reads_what_we_write(tmp_path, shard_bytes):
    transformers = pytest.importorskip("transformers")
    ours = to_dict(LMConfig(64, 32, 48, 2, 4, 2, rope_theta=1e4)) | {"torch_dtype": "float32"}
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**ours)).eval()
    w.write(tmp_path, theirs.state_dict().items(), ours, shard_bytes)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids_BT).logits, theirs(ids_BT).logits)
    again.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if shard_bytes < 10**9 else "1GB")
    assert same(dict(w.read(tmp_path / "theirs")), dict(theirs.state_dict()))
