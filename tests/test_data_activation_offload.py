"""Tensors that wait for backward in CPU memory: the same bits come back, one layer ahead, and few at once."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from data import activation_offload

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Watched(activation_offload.ActivationOffload):
    """Notes for each layer that backward reaches which layers' tensors are on the device."""

    def __init__(self, device):
        super().__init__(device)
        self.there = {}

    def unpack(self, saved):
        late = isinstance(saved, activation_offload.Saved) and saved.layer not in self.back
        x = super().unpack(saved)
        if isinstance(saved, activation_offload.Saved):
            self.there.setdefault(saved.layer, (late, sorted(self.back)))
        return x


def layer(x):
    return x.exp().sub(1).tanh()  # tanh saves its answer, exp too


def chain(x, hooks, layers=6):
    for _ in range(layers):
        with hooks.layer():
            x = layer(x)
    return x


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_same_and_copies_come_ahead(device):
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, device=device).t()  # not contiguous
    plain, away = (x.clone().requires_grad_() for _ in range(2))
    y = plain
    for _ in range(6):
        y = layer(y)
    y.sum().backward()
    hooks = Watched(torch.device(device))
    y = chain(away, hooks)
    assert [len(saved) for saved in hooks.layers] == [2] * 6
    assert all(saved.host.device.type == "cpu" for kept in hooks.layers for saved in kept.values())
    assert len(hooks.leaving) == 2  # of the last layer; those before it are free
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
    hooks, y = activation_offload.ActivationOffload(torch.device(device)), away
    for _ in range(2):
        with hooks.layer():
            y = checkpoint(layer, y, use_reentrant=False, preserve_rng_state=False)
    assert [len(saved) for saved in hooks.layers] == [1, 1]
    y.sum().backward()
    assert torch.equal(away.grad, plain.grad)


def test_what_is_empty_or_elsewhere_stays():
    hooks = activation_offload.ActivationOffload(CPU)
    with hooks.layer():
        empty, elsewhere = torch.empty(0), torch.empty(3, device="meta")
        assert hooks.pack(empty) is empty and hooks.pack(elsewhere) is elsewhere
        assert hooks.unpack(elsewhere) is elsewhere


def test_a_tensor_that_two_operations_save_is_copied_once():
    x = torch.ones(3, requires_grad=True)
    hooks = activation_offload.ActivationOffload(CPU)
    with hooks.layer():
        y = x.exp()
        z = y * y
    assert len(hooks.layers[0]) == 1
    z.sum().backward()
    assert torch.equal(x.grad, 2 * y.detach() ** 2)


def test_host_memory_is_free_as_soon_as_backward_is_done():
    gc.disable()  # nothing may wait for the collector
    try:
        x, hooks = torch.ones(3, requires_grad=True), activation_offload.ActivationOffload(CPU)
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
    activation_offload.copy_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())  # there may be no GPU
    gpu = torch.device("cuda", 0)
    assert (
        activation_offload.ActivationOffload(gpu).stream is activation_offload.ActivationOffload(gpu).stream is not None
    )
    assert activation_offload.ActivationOffload(CPU).stream is None
    activation_offload.copy_stream.cache_clear()


def test_what_is_kept_shares_nothing_with_what_is_computed():
    x = torch.ones(3, requires_grad=True)
    with activation_offload.ActivationOffload(CPU).layer():
        y = x.exp()
    kept = y.detach().clone()
    y.data.zero_()  # autograd cannot see this
    y.sum().backward()
    assert torch.equal(x.grad, kept)
