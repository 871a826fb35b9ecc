"""How fast and how small: this code beside transformers, torch or one process, on this machine, in one run.

What      Each case computes one thing twice, and both results must agree. Time is CPU time of one thread, the best of
          some rounds in turns: other work on the machine disturbs it by some 10 %, where it spoils wall time.
          Memory is growth above the loaded model, in a process of its own for each side (Linux).
Paper     `needles` has the grid of Sec. 4; the models are random, so large that arithmetic outweighs overhead.
Run       python tests/bench.py model            about 4 minutes on an idle core
          python tests/bench.py train            about 15 minutes, and 15 GB of memory for their side
          python tests/bench.py ring             two ranks against one process, a minute on two cores
          python tests/bench.py needles          tokens that shared prefixes save, by count; seconds
          python tests/bench.py model --quick    toy sizes: only shows that every case still runs and agrees
Dimensions  those of longva.py
Differs   Theirs runs as people run it: `generate`, sdpa, its own growing cache, `labels`.

Ratios fail nothing: they are for people to read. The exit code is 1 where results differ.
"""

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import longva
import ring
import vniah
from data import chat, niah
from data.config import LMConfig
from tests import ranks

# Parameters of which 512 rows of the gradient are compared.
COMPARED = ["h", "head", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
COMPARED += ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]
Found = dict[str, Tensor]


def report(name: str, ours: float, theirs: float, target: str, found: Found, want: Found, error: float) -> bool:
    """Print a line of the table: theirs / ours, or ours / theirs where the target is an upper bound. Do they agree?"""
    assert found.keys() == want.keys(), f"{[*found]} here, {[*want]} there"
    worst = max((difference(found[key], want[key]) for key in found), default=0.0)
    ratio = ours / theirs if target.startswith("<=") else theirs / ours
    verdict = "" if worst <= error else "WRONG"
    print(f"{name:<44}{ours:>14,.3f}{theirs:>16,.3f}{ratio:>8.2f}  {target:<8}{worst:<9.1e}{verdict}", flush=True)
    return worst <= error


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value; exactly 0 where the bits are equal."""
    assert a.shape == b.shape, f"{list(a.shape)} here, {list(b.shape)} there"
    return 0.0 if torch.equal(a, b) else ((a.double() - b).abs().max() / b.abs().max()).item()


def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(V: int, T: int) -> Tensor:
    """A prompt, ids_1T."""
    return torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1))


# ---- model, train: one side of a case, as a function to be measured ------------------------------


def load(side: str, sizes: dict) -> nn.Module:
    """A Qwen2 with the same random weights on both sides."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = LMConfig(**sizes)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, rope_theta=config.rope_theta))
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1  # about as large as trained ones
        p.data.normal_(0, std, generator=generator).add_("norm" in name and name.endswith("weight"))
    if side == "theirs":
        return theirs.eval()
    ours = longva.LM(config)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


def answer(side: str, sizes: dict, n: int, new: int, past: int = 0) -> Callable[[], Found]:
    """Greedy generation of `new` tokens after n, of which `past` are in the cache before time is taken."""
    model, ids_1T = load(side, sizes), random_ids(sizes["vocab_size"], n)
    if side == "ours":
        x_1TD = model.embed(ids_1T)
        make_cache = partial(longva.KVCache, model.model.config, 1, n + new, model.lm_head.weight)
        cache = make_cache() if past else None
        if past:
            longva.prefill(model, x_1TD[:, :past], cache)

        def run() -> Found:
            kept = cache or make_cache()
            kept.length = past
            return {"ids": torch.tensor(list(longva.generate(model, x_1TD[:, past:], kept, [], new)))}

        return run
    from transformers import DynamicCache

    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if past:
        settings["past_key_values"] = DynamicCache()
        model(ids_1T[:, :past], use_cache=True, logits_to_keep=1, past_key_values=settings["past_key_values"])

    def run() -> Found:
        if past:  # how many tokens to drop, as a number below 0
            settings["past_key_values"].crop(past - settings["past_key_values"].get_seq_length())
        return {"ids": model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **settings)[0, n:]}

    return run


def gradients(loss: Tensor, model: nn.Module) -> Found:
    """Go backward: the loss and some of the gradients, of which none is left in the model."""
    loss.backward()
    parameters = dict(model.named_parameters())
    found = {name: parameters[name].grad[:512].clone() for name in COMPARED if name in parameters}
    model.zero_grad()
    return found | {"loss": loss.detach()}


def random_targets(V: int, T: int, eighths: int) -> tuple[Tensor, Tensor]:
    """(ids_1T, targets_1T): so many eighths of the ids have a target."""
    ids_1T = random_ids(V, T)
    targets_1T = ids_1T.roll(-1, 1).where(torch.arange(T) % 8 < eighths, chat.IGNORE)
    targets_1T[:, -1] = chat.IGNORE
    return ids_1T, targets_1T


def step(side: str, sizes: dict, n: int, eighths: int, checkpointing: bool = False) -> Callable[[], Found]:
    """Forward and backward of a training step, without the optimizer."""
    model = load(side, sizes).train().requires_grad_()
    ids_1T, targets_1T = random_targets(sizes["vocab_size"], n, eighths)
    if side == "ours":
        model.model.checkpointing = "full" if checkpointing else "none"

        def run() -> Found:
            nll_1, count_1 = model(ids_1T, torch.arange(n), targets_1T)
            return gradients(nll_1.sum() / count_1.sum(), model)

        return run
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels_1T = F.pad(targets_1T, (1, -1), value=chat.IGNORE)  # they shift them back
    return lambda: gradients(model(ids_1T, labels=labels_1T, use_cache=False).loss, model)


def loss(side: str, sizes: dict, n: int) -> Callable[[], Found]:
    """Forward and backward of the loss alone, with 7/8 of the targets; theirs has all logits in memory."""
    V, D = sizes["vocab_size"], sizes["hidden_size"]
    model = nn.ParameterDict({"head": random(V, D, seed=0) * D**-0.5, "h": random(n, D)})
    targets_1T = random_targets(V, n, 7)[1]

    def run() -> Found:
        if side == "ours":
            total = longva.nll(model["h"][None], model["head"], targets_1T)[0].sum()
        else:
            total = F.cross_entropy(model["h"] @ model["head"].T, targets_1T[0], reduction="sum")
        return gradients(total, model)

    return run


@dataclass(frozen=True)
class Case:
    """Lines of the table: make(side, sizes, n) returns what to run, measured for time, for memory or for both."""

    name: str
    make: Callable[[str, dict, int], Callable[[], Found]]
    sizes: dict
    n: int  # tokens
    speed: float | None  # target: times as fast
    share: float | None  # target: share of memory
    quick: tuple[dict, int]  # toy sizes and n
    error: float = 1e-5  # allowed, as a share of the largest value
    rounds: int = 3


def lm(D: int, F_: int, L: int, H: int, G: int, V: int) -> dict:
    """Sizes of a language model by their letters."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip((*names, "vocab_size"), (D, F_, L, H, G, V)))


TOY, SMALL, WIDE = lm(32, 64, 2, 4, 2, 64), lm(128, 352, 4, 4, 2, 2048), lm(1024, 4096, 6, 8, 2, 8192)
DEEP, LONG_PROMPT = lm(512, 1408, 8, 8, 2, 32768), lm(512, 2752, 2, 2, 1, 32768) | {"head_dim": 64}
STEP, LONG_STEP = DEEP | {"vocab_size": 151_936}, lm(256, 704, 4, 4, 2, 151_936)
SHORT, LONG = partial(step, eighths=7), partial(step, eighths=4, checkpointing=True)
PROMPT, DECODE = partial(answer, new=1), partial(answer, new=64, past=31)
CASES = {
    "model": [
        Case("prefill of 1,024 tokens", PROMPT, WIDE, 1024, 0.97, None, (TOY, 32), 0),
        Case("decoding, small model", DECODE, SMALL, 32, 1.5, None, (TOY, 32), 0, 12),
        Case("decoding after 8,000 tokens", partial(DECODE, past=8191), DEEP, 8192, 1.4, None, (TOY, 8192), 0),
        Case("prompt of 32,000 tokens", PROMPT, LONG_PROMPT, 32768, None, 0.6, (TOY, 3072), 0),
    ],
    "train": [
        Case("step of 2,000 tokens", SHORT, STEP, 2048, 1.25, 0.3, (TOY, 64), 1e-4, 2),
        Case("step of 8,000, activation checkpointing", LONG, LONG_STEP, 8192, 2, 0.08, (TOY, 64), 1e-4, 1),
        Case("loss alone, against F.cross_entropy", loss, LONG_STEP, 8192, 1.5, 0.05, (TOY, 700), 1e-4, 1),
    ],
}


def cpu_seconds(run: Callable) -> tuple[float, Found]:
    """CPU time of one call, and its result."""
    gc.collect()
    began = time.process_time()
    result = run()
    return time.process_time() - began, result


def peak_memory(group: str, index: int, side: str, quick: bool) -> tuple[float, dict]:
    """(MB by which memory grows at most, result as arrays) of one side of a case, after a run in toy sizes."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    torch.set_num_threads(1)
    case = CASES[group][index]
    with torch.inference_mode(group == "model"):
        case.make(side, *case.quick)()  # so that late imports are not taken for growth
        run = case.make(side, *(case.quick if quick else (case.sizes, case.n)))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
        found = run()
        grown = resident("VmHWM") - before
    return max(grown, 4 / 1024), {name: x.numpy() for name, x in found.items()}  # no growth is less than a page


def measure(group: str, index: int, quick: bool) -> bool:
    """Print a case's lines; do both sides agree?"""
    case, sides, agree = CASES[group][index], ("ours", "theirs"), True
    if case.speed:
        with torch.inference_mode(group == "model"):
            runs_ = [case.make(side, *(case.quick if quick else (case.sizes, case.n))) for side in sides]
            turns = [[cpu_seconds(run) for run in runs_] for _ in range(1 if quick else case.rounds)]
        seconds = [min(seconds for seconds, _ in turn) for turn in zip(*turns)]
        found, want = (result for _, result in turns[0])
        agree = report(f"{case.name}: s", *seconds, f">= {case.speed}", found, want, case.error)
        del runs_, turns
    if case.share:
        if quick:
            both = [peak_memory(group, index, side, quick) for side in sides]
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors leave at once, so that the peak is theirs
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
                both = [pool.submit(peak_memory, group, index, side, quick).result() for side in sides]
        found, want = ({name: torch.as_tensor(x) for name, x in arrays.items()} for _, arrays in both)
        megabytes = [mb for mb, _ in both]
        agree &= report(f"{case.name}: MB", *megabytes, f"<= {case.share}", found, want, case.error)
    return agree


# ---- ring ----------------------------------------------------------------------------------------


def forward_and_backward(attend: Callable, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> None:
    """Attend and compute the gradients of q, k, v."""
    attend(0, *(x.requires_grad_() for x in (q, k, v))).backward(do)


def time_ring(world: ring.World, out: Path, S: int, rounds: int) -> None:
    """Rank 0 writes CPU seconds, added over the ranks, of one process (computed by each rank) and of the ring."""
    whole, idx_T = [random(1, S, heads, 64) for heads in (8, 2, 2, 8)], ring.zigzag_index(S, world)
    sides = [(longva.causal_attend, whole), (ring.zigzag_attend(world), [x[:, idx_T] for x in whole])]
    seconds = []
    for _ in range(1 + rounds):  # the first warms up
        for attend, x in sides:
            ring.all_reduce_sum(torch.zeros(1), world)  # the ranks begin together; who waits takes no CPU time
            seconds.append(cpu_seconds(partial(forward_and_backward, attend, *x))[0])
    total = ring.all_reduce_sum(torch.tensor(seconds, dtype=torch.float64), world)
    if world.rank == 0:
        torch.save(total.view(-1, 2)[1:].min(0).values.tolist(), out)


def measure_ring(quick: bool) -> bool:
    """Print CPU time of two ranks beside that of one process; test_ring.py compares what they compute."""
    S, rounds = (64, 1) if quick else (8192, 3)
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(2, [time_ring], out := Path(folder) / "found", S, rounds)
        one, two = torch.load(out)
    return report(f"ring, 2 ranks, one process, {S:,} tokens: s", two, one / 2, "<= 1.06", {}, {}, 0)


# ---- needles -------------------------------------------------------------------------------------

QUESTIONS, ANSWERS, PRE = (81, 52, 34, 46, 58), (1, 1, 3, 1, 1), 14  # tokens of the five of lmms-lab/v_niah_needles
Read = tuple[int, int, int]  # rows, tokens of each, tokens known before


def work(reads: Iterable[Read]) -> tuple[int, int]:
    """(tokens that pass through the layers, pairs of a query and a key that it may see)."""
    reads = list(reads)
    return sum(B * T for B, T, _ in reads), sum(B * (T * known + T * (T + 1) // 2) for B, T, known in reads)


def paper_work() -> dict[str, tuple[int, int]]:
    """The work of each engine on the paper's grid of 450 probes: the engine runs, but reading only counts."""
    cfg = vniah.resolve(vniah.Config(protocol="paper", max_new_tokens=0))
    film = vniah.VisualNIAH.__new__(vniah.VisualNIAH)  # without a video and what encodes it
    film.cfg, film.system, film.model = cfg, vniah.System("", Path()), longva.LM(LMConfig(1, 2, 1, 1, 1, 1))
    film.tokenizer, film.stop_ids, film.cache = SimpleNamespace(decode=len), [], None  # lines have answers' lengths
    film.needles = [niah.Needle(str(i), None, "", "") for i in range(len(QUESTIONS))]
    film.question_ids, film.answer_ids = ([[0] * n for n in sizes] for sizes in (QUESTIONS, ANSWERS))
    film.prefix_1TD, film.haystack_NMD = torch.zeros(1, PRE, 2), torch.zeros(max(cfg.frames), 144, 2)
    film.needle_NMD, film.distractor_NMD = torch.zeros(len(QUESTIONS), 144, 2), torch.zeros(0, 144, 2)
    shared, single = [], []

    def count(model: longva.LM, x_BTD: Tensor, cache: longva.KVCache) -> Tensor:
        shared.append((*x_BTD.shape[:2], cache.length))
        cache.length += x_BTD.shape[1]
        return x_BTD

    groups = film.groups([(length, depth) for length in cfg.frames for depth in cfg.depths])
    with mock.patch.object(longva, "prefill", count):
        lines = [line for group in groups for cell in film.probe(group) for line in cell]
    for line in lines:  # in one pass each: the answer's last token is predicted, never read
        single.append((1, line["tokens"] + line["answer"] - 1, 0))
    return {"ring": work(single), "cache": work(shared)}


def measure_needles(_quick: bool) -> bool:
    """Print the work on the paper's grid; nothing is run."""
    single, ours = paper_work().values()
    for i, name in enumerate(("million tokens", "million query-key pairs")):
        report(f"450 probes: {name}", ours[i] / 1e6, single[i] / 1e6, ">= 1.6", {}, {}, 0)
    return True


def main(argv: list[str]) -> int:
    """Measure a group of cases: 0, or 1 where results differ."""
    groups = {name: [partial(measure, name, i) for i in range(len(cases))] for name, cases in CASES.items()}
    groups |= {"ring": [measure_ring], "needles": [measure_needles]}
    parser = argparse.ArgumentParser(description="Benchmarks on a CPU.")
    parser.add_argument("group", choices=groups, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="toy sizes: only shows that every case runs and agrees")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, one thread")
    print(f"{'':<44}{'ours':>14}{'theirs':>16}{'ratio':>8}  {'target':<8}error")
    if given.quick:
        print("toy sizes, whatever the names say: these numbers mean nothing, only `error` does")
    agree = [run(given.quick) for run in groups[given.group]]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
