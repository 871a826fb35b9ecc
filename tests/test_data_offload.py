"""Tensors that wait for backward in CPU memory: the same bits come back, in time, and few at once."""

import pytest
import torch

from data import offload


class Watched(offload.Away):
    """Counts how many tensors are on their way back or there, and not yet asked for."""

    def __init__(self, device):
        super().__init__(device)
        self.all, self.most, self.late = [], 0, 0

    def pack(self, x):
        self.all.append(super().pack(x))
        return self.all[-1]

    def unpack(self, kept):
        self.late += kept.back is None
        x = super().unpack(kept)
        self.most = max(self.most, 1 + sum(other.back is not None for other in self.all))
        return x


def chain(x, layers=6):
    for _ in range(layers):
        x = x.exp().sub(1).tanh()  # tanh keeps its answer, exp too
    return x


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_are_the_same_and_copies_come_ahead(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, device=device).t()  # not contiguous
    plain, away = (x.clone().requires_grad_() for _ in range(2))
    chain(plain).sum().backward()
    hooks = Watched(torch.device(device))
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        y = chain(away)
    assert all(kept.host.device.type == "cpu" for kept in hooks.all) and len(hooks.all) == 12
    y.sum().backward(retain_graph=True)
    assert torch.equal(away.grad, plain.grad)
    assert hooks.late == 1 and hooks.most == 2  # all but the first were under way when they were asked for
    y.sum().backward()  # asked again, they come again
    assert torch.equal(away.grad, 2 * plain.grad)


def test_all_passes_copy_on_one_stream(monkeypatch):
    """Torch hands out 32 in turn, and its allocator would keep memory for each of them."""
    offload.beside_computation.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())  # there may be no GPU
    gpu = torch.device("cuda", 0)
    assert offload.Away(gpu).side is offload.Away(gpu).side is not None
    assert offload.Away(torch.device("cpu")).side is None
    offload.beside_computation.cache_clear()


def test_what_is_kept_shares_nothing_with_what_is_computed():
    x = torch.ones(3, requires_grad=True)
    with offload.away(torch.device("cpu")):
        y = x.exp()
    kept = y.detach().clone()
    y.data.zero_()  # autograd cannot see this
    y.sum().backward()
    assert torch.equal(x.grad, kept)
