"""Saved states as files: whole or not there, pruned, refused when a byte changed; ranks are threads here."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from data import checkpoint


def together(ranks, work):
    """What work(rank, gather) returns on each rank; gather is a table that all threads lay their tensor on."""
    table, barrier = [None] * ranks, Barrier(ranks, timeout=10)

    def gather(rank, x):
        table[rank] = x
        barrier.wait()
        everyone = list(table)
        barrier.wait()
        return everyone

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: work(rank, partial(gather, rank)), range(ranks)))


def trained(steps):
    """A small model and its AdamW after some steps, the same every time."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(folder, step, ranks=2):
    """Save the model as ranks would that hold rows of each tensor, and the first of them what has no rows."""
    found = {key: x.detach() for key, x in checkpoint.tensors(*trained(step)).items()}

    def work(rank, gather):
        mine = {key: x.tensor_split(ranks)[rank] if x.dim() else x for key, x in found.items() if x.dim() or rank == 0}
        checkpoint.save(folder, step, mine, rank, gather)

    together(ranks, work)


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def newest(folder, ranks=2):
    (found,) = set(together(ranks, lambda rank, gather: checkpoint.newest(folder, rank, gather)))
    return found


def copy(parameter, tensor):
    parameter.detach().copy_(tensor)


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_what_was_saved_is_restored(saved):
    model, optimizer = trained(0)
    assert checkpoint.restore(newest(saved), model, optimizer, copy) == 3
    want, got = checkpoint.tensors(*trained(3)), checkpoint.tensors(model, optimizer)
    assert got.keys() == want.keys() and len(want) == 2 + 2 * 3
    assert all(torch.equal(got[key], want[key]) for key in want)
    said = json.loads((saved / "step-3" / "manifest.json").read_text())
    assert (said["step"], said["ranks"], [*said["files"]]) == (3, 2, ["rank-0.safetensors", "rank-1.safetensors"])


@pytest.mark.parametrize("ranks", [1, 3])  # the ranks that read need not be those that wrote
@pytest.mark.parametrize("file, spoil, name", [
    ("rank-1.safetensors", flip, "rank-1.safetensors"),
    ("rank-1.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-7]), "rank-1.safetensors"),
    ("rank-1.safetensors", Path.unlink, "rank-1.safetensors"),
    ("manifest.json", lambda file: flip(file, 12), "manifest.json"),
    ("manifest.json", Path.unlink, "manifest.json"),
    ("manifest.sha256", Path.unlink, "manifest.json"),
])  # fmt: skip
def test_damage_is_seen_and_said_once(saved, capsys, ranks, file, spoil, name):
    assert newest(saved, ranks) == saved / "step-3" and capsys.readouterr().out == ""
    spoil(saved / "step-3" / file)
    assert newest(saved, ranks) == saved / "step-2"
    assert capsys.readouterr().out == f"{saved / 'step-3'} is not used: {name} is missing or damaged\n"
    flip(saved / "step-2" / "rank-0.safetensors")
    with pytest.raises(ValueError, match=r"every state in .* is damaged"):
        newest(saved, ranks)


def test_the_last_two_are_kept_and_one_saved_again_is_replaced(saved):
    assert checkpoint.saved_steps(saved) == [2, 3]
    flip(saved / "step-3" / "rank-0.safetensors")
    save(saved, 3)
    assert newest(saved) == saved / "step-3" and sorted(p.name for p in saved.iterdir()) == ["step-2", "step-3"]


def test_what_kills_left_is_ignored_and_swept(saved):
    """A killed probe of the shared folder, a third state, a draft, a stray file of such a name, a save cut short."""
    (saved / "step-1").mkdir(), (saved / ".draft-7").touch(), (saved / "step-9.tmp").touch()
    assert newest(saved) == saved / "step-3"
    assert sorted(p.name for p in saved.iterdir()) == ["step-2", "step-3"]
    (saved / "step-3").rename(saved / "step-4.tmp")  # killed just before the rename
    assert newest(saved) == saved / "step-2" and [p.name for p in saved.iterdir()] == ["step-2"]
    (saved / "step-2").rename(saved / "step-2.tmp")
    assert newest(saved) is None and newest(saved / "nowhere") is None


@pytest.mark.parametrize("change", [
    lambda said: said.pop("files"), lambda said: said.update(step="3"), lambda said: said.update(ranks=1),
    lambda said: said["files"].update({"../../x.safetensors": ""}), lambda said: said.update(files=["rank-0.safetensors"]),
])  # fmt: skip
def test_a_forged_manifest_is_not_used(saved, change):
    manifest, seal = saved / "step-3/manifest.json", saved / "step-3/manifest.sha256"
    said = json.loads(manifest.read_text())
    change(said)
    manifest.write_text(json.dumps(said))
    seal.write_text(checkpoint.sha256(manifest))
    assert newest(saved) == saved / "step-2"


def test_a_missing_moment_is_refused(tmp_path):
    model, optimizer = trained(1)
    found = checkpoint.tensors(model, optimizer)
    found.pop("optimizer/bias/exp_avg")
    found = {key: x.detach() for key, x in found.items()}
    together(1, lambda rank, gather: checkpoint.save(tmp_path, 1, found, rank, gather))
    with pytest.raises(ValueError, match="lacks a moment of bias"):
        checkpoint.restore(newest(tmp_path, 1), *trained(0), copy)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"step-1\.tmp/rank-0\.safetensors cannot be written \(No space left"):
        save(tmp_path, 1, ranks=1)


def test_a_sealed_tensor(tmp_path):
    """DPO's reference: damage is seen, and another number of pairs."""
    file, logp_P2 = tmp_path / "reference.safetensors", torch.randn(7, 2, dtype=torch.float64)
    checkpoint.write_sealed(file, "logp", logp_P2)
    assert torch.equal(checkpoint.read_sealed(file, "logp", (7, 2)), logp_P2)
    with pytest.raises(ValueError, match="is damaged, or not for 6 samples"):
        checkpoint.read_sealed(file, "logp", (6, 2))
    whole = file.read_bytes()
    for at in (3, 20, len(whole) // 2, -1):
        file.write_bytes(whole), flip(file, at)
        with pytest.raises(ValueError, match="start anew"):
            checkpoint.read_sealed(file, "logp", (7, 2))


def test_ranks_must_share_the_folder(saved, tmp_path):
    folders = [saved, tmp_path / "another machine's"]
    with pytest.raises(ValueError, match="ranks see different states"):
        together(2, lambda rank, gather: checkpoint.newest(folders[rank], rank, gather))


@pytest.mark.parametrize("model, message", [
    (nn.Linear(3, 5, bias=False), "only one of the two has bias"),
    (nn.Linear(3, 5).double(), "bias was saved as torch.float32"),
    (nn.Linear(4, 5), r"saved as .* \[5, 3\], but the model has .* \[5, 4\]"),
])  # fmt: skip
def test_another_model_is_refused(saved, model, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(newest(saved), model, torch.optim.AdamW(model.parameters()), copy)
