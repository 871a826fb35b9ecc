"""Offload beside the computation: activations that wait in CPU memory for backward, gradients that add up there.

What      `ActivationOffload`: what each layer of one forward pass saves. On CUDA the copies run on a second stream,
          beside the computation, and the GPU holds what two layers saved, not all of them. `GradientSums`: gradients
          of offloaded parameters, summed over the micro-batches of a step.
          All memory on the GPU is allocated on the stream that computes, and that stream waits for a copy before the
          memory is freed. Tensor.record_stream would instead keep freed blocks from being reused for as long as the
          CPU runs ahead.
Paper     Sec. 3.1 trains on 224,000 tokens with activations on the CPU: 5.6 GB of hidden states per rank for Qwen2-7B.
Run       imported by longva.py, for Decoder.offload, and by both trainings
Dimensions  none
Differs   The release copies on the stream that computes, which waits for each copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@cache
def copy_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """The stream for copies; None on a CPU, where a copy is done when the call returns."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@dataclass(eq=False)
class Saved:
    """A tensor in CPU memory, the number of the layer that saved it, and its copy on the device while there is one."""

    host: Tensor
    layer: int
    back: Tensor | None = None


class ActivationOffload:
    """Saved tensors of one forward pass; autograd calls the hooks `pack` and `unpack` inside `layer`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = copy_stream(device)
        self.layers: list[dict[tuple, Saved]] = []  # what each layer saved
        self.leaving: list[Tensor] = []  # tensors that the newest layer saved: alive until they are copied
        self.back: dict[int, torch.cuda.Event | None] = {}  # layers whose tensors are on the device or being copied

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Enter this context around the forward pass of each layer, in order."""
        self.release()
        self.layers.append({})
        with saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, x: Tensor) -> Tensor | Saved:
        """Start to copy a tensor to CPU memory; a tensor that is there already, or empty, is returned unchanged."""
        if x.device.type != self.device.type or not x.numel():
            return x
        saved, key = self.layers[-1], (x.data_ptr(), x.shape, x.stride())
        if key not in saved:  # one tensor may be saved by several operations of a layer
            host = torch.empty_like(x, device="cpu", pin_memory=self.stream is not None)
            if self.stream:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))  # x is computed by then
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                host.copy_(x, non_blocking=True)
            self.leaving.append(x)
            saved[key] = Saved(host, len(self.layers) - 1)
        return saved[key]

    def release(self) -> None:
        """Free what the layer before saved, once it is copied: the stream that computes waits until then."""
        if self.stream and self.leaving:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.leaving.clear()

    def fetch(self, layer: int) -> None:
        """Start to copy to the device what a layer saved, unless it is there or being copied."""
        if layer < 0 or layer in self.back:
            return
        saved = self.layers[layer].values()
        for one in saved:
            one.back = torch.empty_like(one.host, device=self.device)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # earlier uses of this memory are done
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for one in saved:
                one.back.copy_(one.host, non_blocking=True)
        self.back[layer] = self.stream.record_event() if self.stream else None

    def unpack(self, saved: Tensor | Saved) -> Tensor:
        """Return a tensor on the device, and prefetch the previous layer's, needed by the next layer's backward."""
        if isinstance(saved, Tensor):
            return saved
        self.release()
        for layer in [n for n in self.back if n > saved.layer]:
            del self.back[layer]
            for one in self.layers[layer].values():
                one.back = None
        self.fetch(saved.layer)
        self.fetch(saved.layer - 1)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_event(self.back[saved.layer])
        return saved.back


class GradientSums:
    """Gradients of offloaded parameters, taken from the parameters after each micro-batch.

    FSDP2 copies gradients to the CPU while backward continues, but only for parameters that have none yet: from the
    second micro-batch on it stops backward at each layer, to copy and to add. On one H100 with four layers of Qwen2-7B
    and 28,000 tokens the GPU was idle for 24 % of a micro-batch instead of 79 %.
    """

    def __init__(self, model: nn.Module):
        self.model, self.sums = model, {}

    def take(self) -> None:
        """Add the gradients to the sums, and remove them from the parameters."""
        for p in self.model.parameters():
            if p.grad is not None:
                self.sums[p] = self.sums[p].add_(p.grad) if p in self.sums else p.grad
                p.grad = None

    def put_back(self) -> None:
        """Give each parameter the sum of its gradients."""
        for p, gradient in self.sums.items():
            p.grad = gradient
        self.sums.clear()
