"""The loss in chunks is the plain one; tensors that wait for backward in CPU memory come back, bit for bit, in time."""

import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import longva
from data import chat, memory_saving
from data.memory_saving import nll

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# ---- a loss without all its logits ---------------------------------------------------------------


def loss_case(dtype=torch.float32, B=3, T=7, D=12, V=29):
    """Hidden states, head and targets: a hole, an ignored row, an ignored end."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 2:4] = targets[1] = targets[-1, -1] = chat.IGNORE
    return h, head, targets


def plain_nll(h, head, targets):
    logits = (h.double() @ head.double().T).transpose(1, 2)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none").sum(1)


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk", [1, 3, 11, 1000])
@pytest.mark.parametrize("row_grad", [(0.5, 3.0, -2.0), (0.7, 0.7, 0.7)], ids=str)
def test_nll_is_cross_entropy(check_shapes, chunk, dtype, off, row_grad):
    """Also with another incoming gradient for each row, as DPO sends them. Logits are float32 at best."""
    h, head, targets = loss_case(dtype)
    row_grad = torch.tensor(row_grad)
    want = plain_nll(h, head, targets)
    want_h, want_head = torch.autograd.grad(want, (h, head), row_grad.double())
    got, count = nll(h, head, targets, chunk)
    assert_close((got, count), longva.plain_nll(h, head, targets), rtol=off, atol=0)
    assert got.dtype == count.dtype == torch.float32 and count.tolist() == [5, 0, 6]
    for keep in (True, False):  # twice, as retain_graph allows
        got_h, got_head = torch.autograd.grad(got, (h, head), row_grad, retain_graph=keep)
        assert got_h.dtype == got_head.dtype == dtype
        for a, b in (got, want), (got_h, want_h), (got_head, want_head):
            assert (a.double() - b.double()).abs().max() <= off * b.double().abs().max()
    for frozen, learning, want in [(head, h, got_h), (h, head, got_head)]:
        frozen.requires_grad_(False)
        got, _ = nll(h, head, targets, chunk)
        (alone,) = torch.autograd.grad(got, learning, row_grad)
        assert (alone - want).abs().max() <= off * want.abs().max()
        frozen.requires_grad_()


def test_nll_of_nothing_is_zero():
    h, head, targets = loss_case()
    lost, count = nll(h, head, torch.full_like(targets, chat.IGNORE))
    assert lost.tolist() == count.tolist() == [0, 0, 0]
    lost.sum().backward()
    assert not h.grad.any() and not head.grad.any()


class Sizes(TorchDispatchMode):
    """The size of every tensor that an operation returns, and how many rows of logits were multiplied."""

    def __init__(self, V):
        super().__init__()
        self.V, self.largest, self.rows = V, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and tensor.shape[-1] == self.V:
                    self.rows += len(tensor)
        return out


def test_nll_never_holds_all_logits_and_skips_what_is_ignored():
    """Forward and backward, in both passes; the plain loss, seen through the same glass, does hold them."""
    h, head, targets = loss_case(T=96, D=8, V=101)
    wanted = (targets != chat.IGNORE).sum().item()
    with Sizes(101) as seen:
        nll(h, head, targets, 4)[0].sum().backward()
    assert seen.largest <= 3 * 96 * 8  # as h itself; a chunk of logits is 404, the head 808
    assert seen.rows == wanted  # once, in both passes together
    with Sizes(101) as seen:
        F.cross_entropy((h @ head.T).flatten(0, 1), targets.flatten()).backward()
    assert seen.largest == 3 * 96 * 101


# ---- activations in CPU memory -------------------------------------------------------------------


class Watched(memory_saving.ActivationOffload):
    """Notes for each layer that backward reaches which layers' tensors are on the device."""

    def __init__(self, device):
        super().__init__(device)
        self.there = {}

    def unpack(self, saved):
        late = isinstance(saved, memory_saving.Saved) and saved.layer not in self.fetched
        x = super().unpack(saved)
        if isinstance(saved, memory_saving.Saved):
            self.there.setdefault(saved.layer, (late, sorted(self.fetched)))
        return x


def layer(x):
    return x.exp().sub(1).tanh()  # tanh saves its answer, exp too


def chain(x, hooks=None):
    for _ in range(6):
        with hooks.layer() if hooks else nullcontext():
            x = layer(x)
    return x


def test_a_tensor_that_changes_in_place_is_saved_again():
    x = torch.tensor([0.5], requires_grad=True)
    with memory_saving.ActivationOffload(torch.device("cpu")).layer():
        y = x * 1
        z = y.sin()
        y.add_(1)
        z = z + y.cos()
    z.backward()
    assert x.grad.item() == pytest.approx(math.cos(0.5) - math.sin(1.5))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_same_and_copies_come_ahead(device):
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, device=device).t()  # not contiguous
    plain, away = (x.clone().requires_grad_() for _ in range(2))
    chain(plain).sum().backward()
    hooks = Watched(torch.device(device))
    y = chain(away, hooks)
    assert [len(saved) for saved in hooks.layers] == [2] * 6
    assert all(saved.host.device.type == "cpu" for kept in hooks.layers for saved in kept.values())
    assert len(hooks.copying) == 2  # of the last layer; those before it are free
    y.sum().backward(retain_graph=True)
    assert torch.equal(away.grad, plain.grad)
    # the last layer's are fetched when they are asked for, all others while the layer above computes
    assert hooks.there == {5: (True, [4, 5])} | {n: (False, [n - 1, n]) for n in (4, 3, 2, 1)} | {0: (False, [0])}
    y.sum().backward()  # asked again, they come again
    assert torch.equal(away.grad, 2 * plain.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoint_inside(device):
    """One tensor a layer is saved, its input; checkpoint of torch 2.11 also saves an empty tensor on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, device=device)
    plain, away = (x.clone().requires_grad_() for _ in range(2))
    layer(layer(plain)).sum().backward()
    hooks, y = memory_saving.ActivationOffload(torch.device(device)), away
    for _ in range(2):
        with hooks.layer():
            y = checkpoint(layer, y, use_reentrant=False, preserve_rng_state=False)
    assert [len(saved) for saved in hooks.layers] == [1, 1]
    y.sum().backward()
    assert torch.equal(away.grad, plain.grad)


def test_what_is_empty_or_elsewhere_stays():
    hooks = memory_saving.ActivationOffload(CPU)
    with hooks.layer():
        empty, elsewhere = torch.empty(0), torch.empty(3, device="meta")
        assert hooks.pack(empty) is empty and hooks.pack(elsewhere) is elsewhere
        assert hooks.unpack(elsewhere) is elsewhere


def test_a_tensor_is_copied_once_and_the_copy_shares_nothing():
    x, hooks = torch.ones(3, requires_grad=True), memory_saving.ActivationOffload(CPU)
    with hooks.layer():
        y = x.exp()
        z = y * y  # both operations save y
    assert len(hooks.layers[0]) == 1
    kept = y.detach().clone()
    y.data.zero_()  # autograd cannot see this
    z.sum().backward()
    assert torch.equal(x.grad, 2 * kept**2)


def test_host_memory_is_free_as_soon_as_backward_is_done():
    gc.disable()  # nothing may wait for the collector
    try:
        x, hooks = torch.ones(3, requires_grad=True), memory_saving.ActivationOffload(CPU)
        y = chain(x, hooks)
        alive = weakref.ref(next(iter(hooks.layers[0].values())).host)
        del hooks
        y.sum().backward()
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_all_passes_copy_on_one_stream(monkeypatch):
    """Torch hands out 32 in turn, and its allocator would keep memory for each of them."""
    memory_saving.copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())  # there may be no GPU
    gpu = torch.device("cuda", 0)
    assert memory_saving.ActivationOffload(gpu).stream is memory_saving.ActivationOffload(gpu).stream is not None
    assert memory_saving.ActivationOffload(CPU).stream is None
    memory_saving.copy_stream.cache_clear()
