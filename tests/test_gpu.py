"""What can be said of the GPU path without a card: the kit runs, and raw operators get what they take."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import longva
import ring
from data import memory_saving
from data.memory_saving import GradientSums
from tests import gpu
from tests.ranks import ALONE

ROOT = Path(__file__).parents[1]


SLOW = [pytest.param("pipeline", marks=pytest.mark.slow)]


@pytest.mark.parametrize("case", [name for name in gpu.CASES if name not in ("commands", "pipeline")] + SLOW)
def test_every_case_runs_at_toy_size(case, tmp_path):
    """A card's time is not to be wasted on a typing mistake. The commands have tests of their own."""
    kit = gpu.Kit(dry=True)
    gpu.run_case(kit, case)
    wrong = [str(row) for row in kit.rows if row.ok is False]
    assert kit.rows and not wrong, wrong


def test_the_table_and_its_file(tmp_path):
    command = [sys.executable, "tests/gpu.py", "--dry", "--only", "kernels", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["case"] for row in rows} == {"kernels"} and "| kernels | cpu: o" in done.stdout


def test_a_mistake_is_a_row_and_the_others_go_on(monkeypatch):
    def wrong(kit):
        raise KeyError("the reason")

    monkeypatch.setitem(gpu.CASES, "loss", wrong)
    kit = gpu.Kit(dry=True)
    gpu.run_case(kit, "loss")
    gpu.run_case(kit, "kernels")
    assert [row.what for row in kit.rows if row.ok is False] == ["stopped"] and len(kit.rows) > 3


def test_a_smaller_card_leaves_out_what_it_cannot_hold(monkeypatch):
    monkeypatch.setitem(gpu.CASES, "film", None)
    kit = gpu.Kit(dry=True)
    kit.dry, kit.memory = False, 24 * gpu.GB
    gpu.run_case(kit, "film")
    assert [(row.what, row.expected) for row in kit.rows] == [("left out", "needs 46 GB")]


def test_an_error_beyond_its_bound_is_not_ok():
    kit = gpu.Kit(dry=True)
    kit.at_most("an error", 2.1, 2, "ulp")
    kit.at_most("no number", float("nan"), 2)
    assert [row.ok for row in kit.rows] == [False, False]
    assert gpu.ulps(torch.tensor([1.0, 2.0**-7]), torch.tensor([1.0, 0.0])) == 1
    assert gpu.ulps(torch.tensor([torch.nan]), torch.tensor([1.0])) == torch.inf


# ---- operators that need a card, asked for shapes and dtypes alone -------------------------------


@pytest.mark.parametrize("T, S", [(1, 577), (129, 577), (577, 577)])
def test_reading_with_a_cache_calls_flash_attention_by_its_name(monkeypatch, T, S):
    """Not scaled_dot_product_attention, which would take cuDNN's kernel on Hopper and plan for each S."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # a T4, (7, 5), has none
    with FakeTensorMode():
        q = torch.empty(2, T, 28, 128, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 1000, 4, 128, device="cuda", dtype=torch.bfloat16).narrow(1, 0, S)
        o = longva.attend_to_past(q, k, k)
        assert (o.shape, o.dtype, o.device.type) == (q.shape, q.dtype, "cuda")


@pytest.mark.parametrize(
    "S, causal, cudnn", [(640, False, 1), (192, False, 0), (64, False, 0), (192, True, 1), (56_000, False, 0)]
)
def test_backward_of_cudnn_is_left_where_it_gives_no_numbers(monkeypatch, S, causal, cudnn):
    """Not causal and S = 64 (mod 128), as on 2 or 4 ranks at 224,000 tokens: seen on an H100."""
    called = []
    monkeypatch.setattr(memory_saving, "cuda_backward", lambda *args: called.append(args) or "flash")
    with FakeTensorMode():
        q, k = (torch.empty(1, n, heads, 128, device="cuda", dtype=torch.bfloat16) for n, heads in ((S, 28), (S, 4)))
        lse = torch.empty(1, 28, S, device="cuda")
        got = memory_saving.cudnn_backward(q, q, k, k, q, lse, causal)
    assert (got == "flash") == (not cudnn) == bool(called)


def test_cudnn_is_chosen_on_hopper_alone(monkeypatch):
    gpu_ = torch.device("cuda", 0)
    for capability, want in (((9, 0), "cudnn"), ((8, 0), None), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert memory_saving.fastest_kernel(gpu_, torch.bfloat16) == want
        assert memory_saving.fastest_kernel(gpu_, torch.float32) is None
    assert memory_saving.fastest_kernel(ALONE.device, torch.bfloat16) is None


def test_documents_kept_apart_get_no_plan_for_each_length():
    choose = partial(
        memory_saving.choose_kernel, device=torch.device("cuda"), precision="bf16", separate_documents=True
    )
    assert choose("auto") is None
    with pytest.raises(ValueError, match="a plan for each document's length; leave --kernel at auto"):
        choose("cudnn")


def test_settings_of_torch():
    ring.set_cuda_defaults()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.cudnn_sdp_enabled()


# ---- gradients of offloaded parameters -----------------------------------------------------------


def test_gradients_taken_aside_are_the_sum():
    """As FSDP2 and autograd add them, in the same order, to the bit."""
    torch.manual_seed(0)
    model, parts = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(3, 5, 3)
    for x in parts:
        model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    gradients = GradientSums(model)
    for x in parts:
        model(x).square().sum().backward()
        gradients.take()
        assert all(p.grad is None for p in model.parameters())
    gradients.put_back()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want)) and not gradients.sums
