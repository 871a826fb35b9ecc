"""The same in less memory: recomputed and offloaded activations, attention and loss computed in chunks.

What      `recompute`: activation checkpointing. `nll`: head and cross-entropy over a chunk of positions at a time.
          `FAST_KERNELS`: FlashAttention forward and backward, on a CPU, a GPU, by cuDNN and by the package flash-attn.
          `ActivationOffload`: what each layer of one forward pass saves. On CUDA the copies run on a second stream,
          beside the computation, and the GPU holds what two layers saved, not all of them. `GradientSums`: gradients
          of offloaded parameters, summed over the micro-batches of a step.
          All memory on the GPU is allocated on the stream that computes, and that stream waits for a copy before the
          memory is freed. Tensor.record_stream would instead keep freed blocks from being reused for as long as the
          CPU runs ahead.
Paper     Sec. 3.1 trains on 224,000 tokens with activations on the CPU: 5.6 GB of hidden states per rank for Qwen2-7B.
Run       imported by longva.py, ring.py and both trainings
Dimensions  B batch   T tokens held here   S tokens of a block of keys   D LM width   V vocabulary
          H query heads   G key/value heads   K head width
Differs   The release copies on the stream that computes, which waits for each copy. Its loss makes all logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from data.chat import IGNORE
from data.memory import LOSS_CHUNK

# ---- recompute activations -----------------------------------------------------------------------


def recompute(on: bool, f: Callable, *x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """f(*x); where `on`, by activation checkpointing: only x is saved, and backward computes f(*x) again."""
    if not on or not torch.is_grad_enabled():
        return f(*x)
    return checkpoint(f, *x, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn at random


# ---- a loss without all its logits ---------------------------------------------------------------


class ChunkedNLL(torch.autograd.Function):
    """Head and cross-entropy over `chunk` positions at a time, so that all the logits never exist at once.

    At 224,000 tokens the logits alone are 68 GB in bfloat16: the limit the paper ran into. A chunk's gradients are
    computed with its logits, for positions of equal weight. Backward scales them; only where weights differ, as in
    DPO, it computes the logits again.
    """

    @staticmethod
    def forward_and_grads(
        h_TD: Tensor, head_VD: Tensor, targets_T: Tensor, weight_T: Tensor, chunk: int, needs_grad: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Negative log-likelihoods, and where needed the gradients of their weighted sum: (nll_T, dh_TD, dhead_VD).

        The head's gradient is accumulated in float32, 2.2 GB at Qwen2-7B's size. All chunks share one buffer of logits:
        newly allocated pages cost a CPU as much time as the softmax.
        """
        nll_T = torch.empty_like(weight_T)
        dh_TD = torch.empty_like(h_TD) if any(needs_grad) else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_grad[1] else None
        logits_buffer = h_TD.new_empty(min(chunk, len(h_TD)), len(head_VD))
        for i in range(0, len(h_TD), chunk):
            h, target, weight = (x[i : i + chunk] for x in (h_TD, targets_T[:, None], weight_T[:, None]))
            logits = torch.mm(h, head_VD.T, out=logits_buffer[: len(h)]).float()
            target_logit = logits.gather(1, target)
            highest = logits.amax(1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)  # in place: logits are their exponentials now
            nll_T[i : i + chunk] = (total.log() + highest - target_logit)[:, 0]
            if any(needs_grad):  # the gradient of the logits is softmax minus one-hot
                dlogits = logits.mul_(weight / total).scatter_add_(1, target, -weight).to(h_TD.dtype)
                torch.mm(dlogits, head_VD, out=dh_TD[i : i + chunk])
            if needs_grad[1] and dlogits.dtype == torch.float32:
                dhead_VD.addmm_(dlogits.T, h)
            elif needs_grad[1] and dlogits.is_cuda:  # accumulates in float32; the product is not rounded to bf16 first
                torch.ops.aten.addmm.dtype_out(dhead_VD, dlogits.T, h, torch.float32, out=dhead_VD)
            elif needs_grad[1]:
                dhead_VD += dlogits.T @ h
        return nll_T, dh_TD, dhead_VD

    @staticmethod
    def forward(ctx, h_TD, head_VD, targets_T, chunk, needs_grad):  # noqa: ANN001
        """Negative log-likelihood of every position, float32[T]; needs_grad: of h, of the head."""
        ones_T = torch.ones_like(targets_T, dtype=torch.float32)
        nll_T, *ctx.grads = ChunkedNLL.forward_and_grads(h_TD, head_VD, targets_T, ones_T, chunk, needs_grad)
        ctx.save_for_backward(h_TD, head_VD, targets_T)
        ctx.args = chunk, needs_grad
        return nll_T

    @staticmethod
    def backward(ctx, grad_T):  # noqa: ANN001
        """Forward's gradients, scaled, where all positions have equal weight; else computed again."""
        weight, inputs = grad_T[:1].sum(), ctx.saved_tensors  # a sum, since there may be no target
        grads, ctx.grads = ctx.grads, None  # a second backward must not scale them twice
        if grads and (grad_T == weight).all():
            dh_TD, dhead_VD = (x if x is None else x.mul_(weight) for x in grads)
        else:
            grads = None  # free them before the next are allocated
            _, dh_TD, dhead_VD = ChunkedNLL.forward_and_grads(*inputs, grad_T, *ctx.args)
        return dh_TD, None if dhead_VD is None else dhead_VD.to(inputs[1].dtype), None, None, None


def nll(h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of targets of each row, float32 (nll_B, count_B).

    The same as longva.plain_nll. A target of -100 is ignored; its logits are not computed. `chunk`: positions whose
    logits exist at once; None takes memory.LOSS_CHUNK.
    """
    chunk = chunk or LOSS_CHUNK[h_BTD.device.type]
    is_target_BT = targets_BT != IGNORE
    row = is_target_BT.nonzero()[:, 0]
    needs_grad = tuple(torch.is_grad_enabled() and x.requires_grad for x in (h_BTD, head_VD))
    losses = ChunkedNLL.apply(h_BTD[is_target_BT], head_VD, targets_BT[is_target_BT], chunk, needs_grad)
    nll_B = losses.new_zeros(len(targets_BT)).index_add(0, row, losses)
    return nll_B, is_target_BT.sum(1).float()


# ---- attention without all its logits ------------------------------------------------------------
# Each pair computes what ring.math_forward and ring.math_backward do, by operators of torch that give the log-sum-exp.


def swap_axes(*tensors: Tensor) -> list[Tensor]:
    """[B, T, H, K] as [B, H, T, K], or back."""
    return [x.transpose(1, 2) for x in tensors]


def cpu_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What torch's scaled_dot_product_attention runs on a CPU."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o_BHTK, lse_BHT = forward(*swap_axes(q_BTHK, k_BSGK, v_BSGK), 0.0, causal)
    return o_BHTK.transpose(1, 2), lse_BHT.contiguous()


def cpu_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal):  # noqa: ANN001, ANN201
    """Gradients of cpu_forward."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return swap_axes(*backward(*swap_axes(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK), lse_BHT, 0.0, causal))


def cuda_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 as torch ships it: bf16 or fp16, K a multiple of 8 and at most 256."""
    forward, T, S = torch.ops.aten._flash_attention_forward, q_BTHK.shape[1], k_BSGK.shape[1]
    return forward(q_BTHK, k_BSGK, v_BSGK, None, None, T, S, 0.0, causal, False)[:2]


def cuda_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal):  # noqa: ANN001, ANN201
    """Gradients of cuda_forward. The kernel reads lse through its address, so it must be contiguous."""
    given = do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT.contiguous(), None, None
    # there is no dropout, so its random state is not read
    rng_state = [torch.zeros(n, dtype=torch.uint64, device=q_BTHK.device) for n in (2, 0)]
    backward = torch.ops.aten._flash_attention_backward
    return backward(*given, q_BTHK.shape[1], k_BSGK.shape[1], 0.0, causal, *rng_state)


def cudnn_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of cuDNN, made for Hopper: bf16 or fp16. Its lse has a fourth axis of length 1."""
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    o_BHTK, lse_BHT1 = forward(*swap_axes(q_BTHK, k_BSGK, v_BSGK), None, True, 0.0, causal)[:2]
    return o_BHTK.transpose(1, 2), lse_BHT1.squeeze(-1).contiguous()


def cudnn_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal):  # noqa: ANN001, ANN201
    """Gradients of cudnn_forward; FlashAttention-2 where cuDNN's own are in doubt."""
    if not causal and k_BSGK.shape[1] % 128 == 64:  # NaN on Hopper for lse < -89 (pytorch #196678; seen on an H100)
        return cuda_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal)
    given = *swap_axes(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK), lse_BHT.unsqueeze(-1).contiguous()
    # there is no dropout, so its random state is not read
    rng_state = [torch.zeros((), dtype=torch.int64, device=q_BTHK.device) for _ in range(2)]
    rest = None, None, None, q_BTHK.shape[1], k_BSGK.shape[1], 0.0, causal
    return swap_axes(*torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*given, *rng_state, *rest))


def flash_attn_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The flash-attn package, 2.7 or newer: FlashAttention-2 in bf16 or fp16, K at most 256."""
    from flash_attn import flash_attn_func  # builds on CUDA machines only

    return flash_attn_func(q_BTHK, k_BSGK, v_BSGK, causal=causal, return_attn_probs=True)[:2]


def flash_attn_backward(do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT, causal):  # noqa: ANN001, ANN201
    """Gradients of flash_attn_forward, by the package's inner function: the public one knows no other o and lse."""
    from flash_attn.flash_attn_interface import _flash_attn_backward

    given = [x.contiguous() for x in (do_BTHK, q_BTHK, k_BSGK, v_BSGK, o_BTHK, lse_BHT)]
    grads = tuple(torch.empty_like(x) for x in given[1:4])  # filled in place
    plain = {"dropout_p": 0.0, "softmax_scale": q_BTHK.shape[-1] ** -0.5, "softcap": 0.0, "alibi_slopes": None}
    window = {"causal": causal, "window_size_left": -1, "window_size_right": -1}
    _flash_attn_backward(*given, *grads, **plain, **window, deterministic=torch.are_deterministic_algorithms_enabled())
    return grads


FAST_KERNELS = {
    "cpu": (cpu_forward, cpu_backward),
    "cuda": (cuda_forward, cuda_backward),
    "cudnn": (cudnn_forward, cudnn_backward),
    "flash_attn": (flash_attn_forward, flash_attn_backward),
}


def best_kernel(q_BTHK: Tensor) -> str:
    """The fastest kernel of ring.KERNELS that supports these queries' device, dtype and head width."""
    if q_BTHK.device.type != "cuda":
        return "cpu" if q_BTHK.device.type == "cpu" else "math"
    K, half = q_BTHK.shape[-1], q_BTHK.dtype in (torch.bfloat16, torch.float16)
    fits = half and K % 8 == 0 and K <= 256 and torch.cuda.get_device_capability(q_BTHK.device) >= (8, 0)
    return "cuda" if fits else "math"


def fastest_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """The kernel for training on sequences of one length; None: `best_kernel` of each block.

    On an H100 cuDNN takes 0.6 of FlashAttention-2's time forward and 0.8 backward, but makes a plan for each shape.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "cudnn" if hopper and dtype == torch.bfloat16 else None


def choose_kernel(kernel: str, device: torch.device, precision: str, separate_documents: bool) -> str | None:
    """Return what --kernel names; for "auto" the fastest, where None leaves the choice to `best_kernel`.

    Raises ValueError, one sentence, if the kernel cannot run on this device, with "fp32", or with documents apart.
    """
    if kernel == "auto":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return None if separate_documents else fastest_kernel(device, dtype)
    if kernel == "cpu" and device.type == "cuda":
        raise ValueError("--kernel cpu needs tensors on the CPU, and this run computes on a GPU; leave it at auto")
    if kernel in ("cpu", "math"):
        return kernel
    if device.type == "cpu":
        raise ValueError(f"--kernel {kernel} needs a CUDA GPU, and this run computes on the CPU; leave it at auto")
    if kernel == "cudnn" and separate_documents:
        raise ValueError("--kernel cudnn would make a plan for each document's length; leave --kernel at auto")
    if precision == "fp32":
        raise ValueError(f"--kernel {kernel} takes no fp32; leave --precision at bf16, or --kernel at auto")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"--kernel {kernel} needs a GPU of compute capability 8.0 or more; leave it at auto")
    if kernel == "flash_attn" and not find_spec("flash_attn"):
        raise ValueError("--kernel flash_attn needs the package flash-attn; install it, or leave --kernel at auto")
    return kernel


# ---- activations and gradients in CPU memory -----------------------------------------------------


@cache
def copy_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """The stream for copies; None on a CPU, where a copy is done when the call returns."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@dataclass(eq=False)
class Saved:
    """A tensor in CPU memory, the number of the layer that saved it, and its copy on the device while there is one."""

    host: Tensor
    layer: int
    on_device: Tensor | None = None


class ActivationOffload:
    """Saved tensors of one forward pass; autograd calls the hooks `pack` and `unpack` inside `layer`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = copy_stream(device)
        self.layers: list[dict[tuple, Saved]] = []  # what each layer saved
        self.copying: list[Tensor] = []  # tensors that the newest layer saved: alive until they are copied
        self.fetched: dict[int, torch.cuda.Event | None] = {}  # layers whose tensors are on the device or being copied

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
        saved, key = self.layers[-1], (x.data_ptr(), x._version, x.dtype, x.shape, x.stride())
        if key not in saved:  # one tensor may be saved by several operations of a layer
            host = torch.empty_like(x, device="cpu", pin_memory=self.stream is not None)
            if self.stream:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))  # x is computed by then
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                host.copy_(x, non_blocking=True)
            self.copying.append(x)
            saved[key] = Saved(host, len(self.layers) - 1)
        return saved[key]

    def release(self) -> None:
        """Free what the layer before saved, once it is copied: the stream that computes waits until then."""
        if self.stream and self.copying:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.copying.clear()

    def fetch(self, layer: int) -> None:
        """Start to copy to the device what a layer saved, unless it is there or being copied."""
        if layer < 0 or layer in self.fetched:
            return
        saved = self.layers[layer].values()
        for one in saved:
            one.on_device = torch.empty_like(one.host, device=self.device)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # earlier uses of this memory are done
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for one in saved:
                one.on_device.copy_(one.host, non_blocking=True)
        self.fetched[layer] = self.stream.record_event() if self.stream else None

    def unpack(self, saved: Tensor | Saved) -> Tensor:
        """Return a tensor on the device, and prefetch those of the layer below, whose backward runs next."""
        if isinstance(saved, Tensor):
            return saved
        self.release()
        for layer in [n for n in self.fetched if n > saved.layer]:
            del self.fetched[layer]
            for one in self.layers[layer].values():
                one.on_device = None
        self.fetch(saved.layer)
        self.fetch(saved.layer - 1)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_event(self.fetched[saved.layer])
        return saved.on_device


class GradientSums:
    """Gradients of offloaded parameters, taken from the parameters after each micro-batch.

    FSDP2 copies gradients to the CPU while backward continues, but only for parameters that have none yet: from the
    second micro-batch on it stops backward at each layer, to copy and to add. On one H100 with four layers of Qwen2-7B
    and 28,000 tokens the GPU was idle for 24 % of a micro-batch instead of 79 %.
    """

    def __init__(self, model: nn.Module, enabled: bool = True):
        self.parameters, self.sums = list(model.parameters()) if enabled else [], {}

    def take(self) -> None:
        """Add the gradients to the sums, and remove them from the parameters; nothing where not enabled."""
        for p in self.parameters:
            if p.grad is not None:
                self.sums[p] = self.sums[p].add_(p.grad) if p in self.sums else p.grad
                p.grad = None

    def put_back(self) -> None:
        """Give each parameter the sum of its gradients."""
        for p, gradient in self.sums.items():
            p.grad = gradient
        self.sums.clear()
