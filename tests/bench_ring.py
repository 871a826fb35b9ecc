"""How much a ring costs: ring.zigzag_attend beside one process, and beside the ring that torch keeps private.

What      Three tables. Time: forward and backward of causal attention to one sequence, CPU seconds added over the
          ranks, each on one thread; all sides run in turns, three times, and the best sum counts. The work of one
          process is done by both ranks at once, and halved, so that all sides share the machine alike. A rank that
          waits for a message sleeps: waiting is not counted; what gloo's own threads do is.
          Error: o, dq, dk, dv against attention written out in fp64, as a share of the largest entry of each.
          Traffic: what one rank sends for one layer, as counted, and as the formula says.
Paper     arXiv 2406.16852, Sec. 3.1; ring attention, arXiv 2310.01889.
Run       python tests/bench.py ring            about 2 minutes on two idle cores
          python tests/bench.py ring --quick    toy sizes: only shows that every side still runs and agrees
Key       that of ring.py
Deviates  Theirs is not public: torch's context_parallel has no CPU kernel, but the loop inside takes one.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import ring
from tests import ranks

H, G, K = 8, 2, 64
S_TIME, S_ERROR, RANKS = 8192, 1024, (1, 2, 4, 8)
WANTED = 1.06  # CPU time on two ranks, one process = 1
ROUNDS = 3
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
Side = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]  # q, k, v, do -> o, dq, dk, dv; all [B, T, heads, K]


# ---- the sides -----------------------------------------------------------------------------------


def some_qkv(S: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of o, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, S, n, K, generator=generator).to(dtype) for n in (H, G, G, H)]


def with_gradients(attend: Callable, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """Forward and backward by autograd."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attend(q, k, v)
    o.backward(do)
    return [o.detach(), q.grad, k.grad, v.grad]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What one process would call."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with every logit."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[3])
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshk->bthk", logits.masked_fill(future, -math.inf).softmax(-1), v)


def ours(world: ring.World) -> Side:
    """Our ring."""
    attend = ring.zigzag_attend(world)
    return lambda *qkv_do: with_gradients(lambda q, k, v: attend(0, q, k, v), *qkv_do)


def torchs() -> Side:
    """Torch's ring, balanced in the same zigzag, around the CPU kernel that ours calls as well."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

    def run(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        o, lse = theirs._templated_ring_attention(dist.group.WORLD, 2, forward, q, k, v, is_causal=True)
        known = {"query": q, "key": k, "value": v, "out": o, "logsumexp": lse, "is_causal": True, "dropout_p": 0.0}
        how = {"grad_out": do, "grad_out_name": "grad_out"}
        grads = theirs._templated_ring_attention_backward(dist.group.WORLD, 2, backward, **how, **known)
        return [x.transpose(1, 2) for x in (o, *grads)]

    return run


# ---- what runs on each of the ranks --------------------------------------------------------------


def seconds(side: Side, qkv_do: list[Tensor], world: ring.World) -> float:
    """CPU seconds of one forward and backward here; the ranks begin together."""
    ring.all_reduce_sum(torch.zeros(1), world)
    begun = time.process_time()
    side(*qkv_do)
    return time.process_time() - begun


def time_sides(world: ring.World, out: Path, S: int, rounds: int) -> None:
    """Best sums of CPU seconds: one process (every rank computes it, and their mean counts), ours, torch's."""
    whole = some_qkv(S, torch.float32)
    idx_T = ring.zigzag_index(S, world)
    local = [x[:, idx_T] for x in whole]
    sides = {"one process": lambda *x: with_gradients(sdpa, *x), "ours": ours(world), "torch": torchs()}
    given = {"one process": whole, "ours": local, "torch": local}
    results = {name: side(*given[name]) for name, side in sides.items()}  # the first turn warms up
    known = [x[:, idx_T] for x in results["one process"]]
    error = {name: max(errors(results[name], known)) for name in ("ours", "torch")}
    turns = [[seconds(side, given[name], world) for name, side in sides.items()] for _ in range(rounds)]
    sums = ring.all_reduce_sum(torch.tensor(turns, dtype=torch.float64), world)
    best = dict(zip(sides, sums.min(0).values.tolist()))
    best["one process"] /= world.ranks
    if world.rank == 0:
        (out / "time.json").write_text(json.dumps({"seconds": best, "error": error}))


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """The largest difference of each, as a share of its largest entry."""
    return [((g.double() - w.double()).abs().max() / w.double().abs().max()).item() for g, w in zip(got, want)]


def measure_errors(world: ring.World, out: Path, S: int) -> None:
    """Errors of o, dq, dk, dv for each dtype: our ring's, and one process's on the same numbers."""
    table = {}
    for dtype in BOUNDS:
        whole, idx_T = some_qkv(S, dtype), ring.zigzag_index(S, world)
        got = [ranks.unshard(x, world) for x in ours(world)(*(x[:, idx_T] for x in whole))]
        if world.rank == 0:
            want = with_gradients(written_out, *(x.double() for x in whole))
            alone = with_gradients(sdpa, *whole) if world.ranks == 1 else []
            table[str(dtype)] = {"ring": errors(got, want), "alone": errors(alone, want)}
    if world.rank == 0:
        (out / f"errors-{world.ranks}.json").write_text(json.dumps(table))


def count_traffic(world: ring.World, out: Path, S: int) -> None:
    """Messages and bytes that this rank sends for one layer in bf16, forward and backward."""
    sent, real = [], dist.batch_isend_irecv
    qkv_do = some_qkv(S // world.ranks, torch.bfloat16)

    def counting(ops: list) -> list:
        sent.extend(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return real(ops)

    dist.batch_isend_irecv = counting
    try:
        ours(world)(*qkv_do)
    finally:
        dist.batch_isend_irecv = real
    kv, hops = sum(x.nbytes for x in qkv_do[1:3]), world.ranks - 1
    formula = [3 * hops, hops * (2 * kv + 2 * kv)]  # K and V twice in bf16, and their gradients in fp32, twice as wide
    assert [len(sent), sum(sent)] == formula, f"{len(sent)} messages of {sum(sent)} bytes, not {formula}"
    if world.rank == 0:
        (out / f"traffic-{world.ranks}.json").write_text(json.dumps(formula))


# ---- the tables ----------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """A table that rank 0 left."""
    return json.loads(path.read_text())


def say_time(table: dict, S: int) -> bool:
    """Print the table of CPU time; do the sides agree?"""
    print(f"torch {torch.__version__}; forward and backward, {S:,} tokens, H={H} G={G} K={K}, fp32, 2 ranks")
    print(f"{'CPU time of all ranks':<24}{'seconds':>9}{'to one process':>16}{'error':>10}")
    spent = table["seconds"]
    for name, seconds in spent.items():
        ratio, error = seconds / spent["one process"], table["error"].get(name, 0.0)
        wrong = "" if error <= BOUNDS[torch.float32] else "  WRONG"
        print(f"{name:<24}{seconds:>9.3f}{ratio:>16.3f}{error:>10.1e}{wrong}")
    to_one, to_torch = (spent["ours"] / spent[other] for other in ("one process", "torch"))
    verdict = "ok" if to_one <= WANTED and to_torch < 1.005 else "short"
    print(
        f"ours to one process {to_one:.2f}, wanted <= {WANTED}; ours to torch's {to_torch:.2f}, wanted <= 1: {verdict}"
    )
    return max(table["error"].values()) <= BOUNDS[torch.float32]


def say_errors(tables: dict[int, dict], S: int) -> bool:
    """Print the table of errors; is each within its bound?"""
    print(f"\nerror against fp64, {S:,} tokens, share of the largest entry")
    print(f"{'':<18}{'o':>9}{'dq':>9}{'dk':>9}{'dv':>9}")
    agree = True
    for dtype, bound in BOUNDS.items():
        rows = {"one process": tables[1][str(dtype)]["alone"]}
        rows |= {f"ring of {R}": table[str(dtype)]["ring"] for R, table in tables.items()}
        for name, row in rows.items():
            right = max(row) <= bound
            agree &= right
            cells = "".join(f"{e:>9.1e}" for e in row)
            print(f"{NAMES[dtype]:<5}{name:<13}{cells}"
                  f"{'' if right else '  WRONG'}")  # fmt: skip
    return agree


def main(arguments: list[str]) -> int:
    """Print the three tables: 0, or 1 where results differ. Ratios fail nothing: they are for people to read."""
    quick = "--quick" in arguments
    S_time, S_error, counts, rounds = (64, 32, (1, 2), 1) if quick else (S_TIME, S_ERROR, RANKS, ROUNDS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        ranks.run(2, [time_sides], out, S_time, rounds)
        agree = say_time(read(out / "time.json"), S_time)
        for R in counts:
            if R == 1:
                measure_errors(ring.World(0, 1, torch.device("cpu")), out, S_error)
            else:
                ranks.run(R, [measure_errors, count_traffic], out, S_error)
        agree &= say_errors({R: read(out / f"errors-{R}.json") for R in counts}, S_error)
        print(f"\nsent by each rank for one layer, {S_error:,} tokens, bf16: (R-1) (2 KV + dKV in fp32)")
        for R in counts[1:]:
            messages, sent = read(out / f"traffic-{R}.json")
            print(f"{R} ranks{messages:>5} messages{sent / 1024:>9,.0f} KiB")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
