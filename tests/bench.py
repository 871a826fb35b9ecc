"""How fast and how small: this code beside transformers, on this machine, with the same weights, in one run.

What      Each case computes one thing twice, here and there, and both must give the same result. They run in turns,
          ours and theirs, three times, and the best of each counts. What is timed is the CPU time of the process, on
          one thread: other work on the machine disturbs it by some 10 %, where it spoils wall time.
          Memory is measured in a process of its own for each side: how far it grows above the loaded model (Linux).
Paper     None: the models here are random, and of sizes at which arithmetic outweighs overhead on one core.
Run       python tests/bench.py model            about 4 minutes on an idle core
          python tests/bench.py train            about 15 minutes, and 15 GB of memory for their side
          python tests/bench.py ring             two minutes on two cores; see bench_ring.py
          python tests/bench.py vision           four minutes; see bench_vision.py
          python tests/bench.py model --quick    toy sizes: only shows that every case still runs and agrees
Key       that of longva.py
Deviates  Nothing to deviate from. Theirs runs as people run it: `generate`, sdpa, its own growing cache, `labels`.

A ratio above 1 means that ours takes less time; a share below 1, that ours takes less memory.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import longva
from clip import ClipVision
from data import chat, weights
from data.config import ClipConfig

# parameters of which 512 rows of the gradient are compared
LOOKED_AT = ["h", "head", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
             "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]  # fmt: skip
NEW = 64  # tokens said in a decoding case
PAGE = 4 / 1024  # MB; no growth is less than one
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave at once: the peak is of tensors, the same each time
Found = dict[str, Tensor]
Run = Callable[[int], Tensor | Found]  # n tokens or grids -> what was computed


@dataclass(frozen=True)
class Case:
    """One line of the table: `make` writes the weights; `ours` and `theirs` load them, and return what to run on n."""

    name: str
    make: Callable[[Path, dict], None]
    ours: Callable[[Path, int], Run]
    theirs: Callable[[Path, int], Run]
    sizes: dict  # of the model
    n: int  # tokens or grids
    wanted: float
    bound: str  # what limits the ratio
    quick: tuple[dict, int]  # sizes and n of the smoke test
    error: float = 1e-5  # allowed, as a share of the largest value
    memory: bool = False
    rounds: int = 3
    learns: bool = False  # forward and backward


# ---- models and inputs ---------------------------------------------------------------------------


def randomise(model: torch.nn.Module) -> None:
    """Every parameter random, biases and norms too, about as large as a trained one."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data.normal_(0, std, generator=generator).add_("norm" in name and name.endswith("weight"))


def make_lm(folder: Path, sizes: dict) -> None:
    """Write a Qwen2 of random weights."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {name: sizes[letter] for name, letter in zip(names, "DFLV")} | {
        "num_attention_heads": sizes["H"], "num_key_value_heads": sizes["G"], "head_dim": sizes["K"],
        "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    randomise(model)
    model.save_pretrained(folder)


def make_tower(folder: Path, sizes: dict) -> None:
    """Write a CLIP vision tower of random weights."""
    model = CLIPVisionModel(CLIPVisionConfig(**sizes))
    randomise(model)
    model.save_pretrained(folder)


def their(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Load a model as people do, then into memory of its own: pages of a mapped file come and go, and are counted."""
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def their_words(model: Qwen2ForCausalLM, ids_1T: Tensor, count: int, **cache: DynamicCache) -> Tensor:
    """What their `generate` says, greedily."""
    how = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **how, **cache)[0, ids_1T.shape[1] :]


def some_ids(V: int, T: int) -> Tensor:
    """A prompt, ids_1T."""
    return torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1))


def some_pixels(config: ClipConfig | CLIPVisionConfig, N: int) -> Tensor:
    """Grids, pixels_NCYX."""
    side = config.image_size
    return torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(1))


# ---- the cases -----------------------------------------------------------------------------------


def our_prefill(folder: Path, n: int) -> Run:
    """Read a prompt into a new cache, `longva.CHUNK` tokens at a time: logits of the last position."""
    model = longva.load(folder)

    def prefill(T: int) -> Tensor:
        ids_1T = some_ids(model.config.vocab_size, T)
        cache = longva.KVCache(model.config, 1, T, model.lm_head.weight)
        return model.logits(longva.prefill(model, model.embed(ids_1T), cache)[:, -1])

    return prefill


def their_prefill(folder: Path, n: int) -> Run:
    """The same, in one piece."""
    model = their(Qwen2ForCausalLM, folder)

    def prefill(T: int) -> Tensor:
        ids_1T = some_ids(model.config.vocab_size, T)
        return model(ids_1T, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1).logits[:, -1]

    return prefill


def our_decode(folder: Path, n: int) -> Run:
    """Say NEW tokens after a context of n, which was read before."""
    model = longva.load(folder)
    cache = longva.KVCache(model.config, 1, n + NEW, model.lm_head.weight)
    x_1TD = model.embed(some_ids(model.config.vocab_size, n))
    longva.prefill(model, x_1TD[:, :-1], cache)
    mark = cache.length

    def decode(n: int) -> Tensor:
        cache.length = mark
        return torch.tensor(list(longva.generate(model, x_1TD[:, -1:], cache, [], NEW)))

    return decode


def their_decode(folder: Path, n: int) -> Run:
    """The same by their `generate`."""
    model, cache = their(Qwen2ForCausalLM, folder), DynamicCache()
    ids_1T = some_ids(model.config.vocab_size, n)
    model(ids_1T[:, :-1], use_cache=True, past_key_values=cache, logits_to_keep=1)

    def decode(n: int) -> Tensor:
        cache.crop(n - 1 - cache.get_seq_length())  # how many to drop, as a number below 0
        return their_words(model, ids_1T, NEW, past_key_values=cache)

    return decode


def our_features(folder: Path, n: int) -> Run:
    """Patch features of the layer before the last, where LLaVA and LongVA read."""
    sizes = json.loads((folder / "config.json").read_text())
    model = ClipVision(ClipConfig.from_dict(sizes)).eval().requires_grad_(False)
    prefix = weights.TOWER
    weights.fill_from(model, ((name.removeprefix(prefix), x) for name, x in weights.read_tower(folder)))
    return lambda N: model(some_pixels(model.config, N))


def their_features(folder: Path, n: int) -> Run:
    """The same as LLaVA takes them: all layers, all hidden states, then a choice."""
    model = their(CLIPVisionModel, folder)
    return lambda N: model(some_pixels(model.config, N), output_hidden_states=True).hidden_states[-2][:, 1:]


def our_first_word(folder: Path, n: int) -> Run:
    """Read a long prompt and say one token."""
    model = longva.load(folder)

    def say(T: int) -> Tensor:
        x_1TD = model.embed(some_ids(model.config.vocab_size, T))
        cache = longva.KVCache(model.config, 1, T + 1, model.lm_head.weight)
        return torch.tensor(list(longva.generate(model, x_1TD, cache, [], 1)))

    return say


def their_first_word(folder: Path, n: int) -> Run:
    """The same by their `generate`."""
    model = their(Qwen2ForCausalLM, folder)
    return lambda T: their_words(model, some_ids(model.config.vocab_size, T), 1)


def some_lesson(V: int, T: int, eighths: int) -> tuple[Tensor, Tensor]:
    """Ids and what should follow each (ids_1T, targets_1T), where only so many eighths of them ask for an answer."""
    ids_1T = some_ids(V, T)
    asked_T = torch.arange(T) % 8 < eighths
    targets_1T = ids_1T.roll(-1, 1).where(asked_T, chat.IGNORE)
    targets_1T[:, -1] = chat.IGNORE
    return ids_1T, targets_1T


def learnt(loss: Tensor, model: torch.nn.Module) -> Found:
    """Go backward: the loss and some of the gradients, of which none is left in the model."""
    loss.backward()
    gradients = dict(model.named_parameters())
    found = {name: gradients[name].grad[:512].clone() for name in LOOKED_AT if name in gradients}
    model.zero_grad()
    return found | {"loss": loss.detach()}


def our_step(folder: Path, n: int, eighths: int, remat: bool = False) -> Run:
    """Forward and backward of a training step, without the optimizer."""
    model = longva.load(folder).requires_grad_()
    model.model.checkpointing = "full" if remat else "none"

    def step(T: int) -> Found:
        ids_1T, targets_1T = some_lesson(model.config.vocab_size, T, eighths)
        nll_1, count_1 = model(ids_1T, torch.arange(T), targets_1T)
        return learnt(nll_1.sum() / count_1.sum(), model)

    return step


def their_step(folder: Path, n: int, eighths: int, remat: bool = False) -> Run:
    """The same with `labels`, which they shift themselves."""
    model = their(Qwen2ForCausalLM, folder).train()
    if remat:  # renamed in transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def step(T: int) -> Found:
        ids_1T, targets_1T = some_lesson(model.config.vocab_size, T, eighths)
        labels_1T = F.pad(targets_1T, (1, -1), value=chat.IGNORE)
        return learnt(model(ids_1T, labels=labels_1T, use_cache=False).loss, model)

    return step


def make_head(folder: Path, sizes: dict) -> None:
    """Write a random head."""
    head_VD = torch.randn(sizes["V"], sizes["D"], generator=torch.Generator().manual_seed(0)) * sizes["D"] ** -0.5
    save_file({"head": head_VD}, folder / "head")


def a_loss(folder: Path, n: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """Forward and backward of a summed loss(h_TD, head_VD, targets_T), with 7/8 of the targets."""
    head_VD = load_file(folder / "head")["head"].clone()
    model = torch.nn.ParameterDict({"head": head_VD})

    def run(T: int) -> Found:
        V, D = model["head"].shape
        model["h"] = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
        return learnt(loss(model["h"], model["head"], some_lesson(V, T, 7)[1][0]), model)

    return run


def chunked_loss(h_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Ours."""
    return longva.nll(h_TD[None], head_VD, targets_T[None])[0].sum()


def plain_loss(h_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The loss that holds all the logits."""
    return F.cross_entropy(h_TD @ head_VD.T, targets_T, reduction="sum")


def torchs_loss(h_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Torch's own chunked loss."""
    how = {"reduction": "sum", "ignore_index": chat.IGNORE, "options": torch.nn.LinearCrossEntropyOptions()}
    return F.linear_cross_entropy(h_TD, head_VD, targets_T, **how)


def lm(D: int, F_: int, L: int, H: int, G: int, K: int, V: int) -> dict:
    """Sizes by their letters."""
    return {"D": D, "F": F_, "L": L, "H": H, "G": G, "K": K, "V": V}


def tower(E: int, F_: int, L: int, H: int, side: int) -> dict:
    """Sizes under their names."""
    sizes = {"hidden_size": E, "intermediate_size": F_, "num_hidden_layers": L, "num_attention_heads": H}
    return sizes | {"patch_size": 14, "image_size": side}


TOY, TOY_TOWER, VIT_L = lm(32, 64, 2, 4, 2, 8, 64), tower(32, 64, 3, 2, 56), tower(1024, 4096, 24, 16, 336)
MODEL = [
    Case("dense prefill, 1,024 tokens", make_lm, our_prefill, their_prefill, lm(1024, 4096, 6, 8, 2, 128, 8192), 1024,
         0.97, "matrix products, the same on both sides", (TOY, 32)),
    Case("decoding, small model", make_lm, our_decode, their_decode, lm(128, 352, 4, 4, 2, 32, 2048), 32,
         1.5, "Python around some 300 small operations per token", (TOY, 32), error=0, rounds=12),
    Case("decoding after 8k tokens", make_lm, our_decode, their_decode, lm(512, 1408, 8, 8, 2, 64, 32768), 8192,
         1.4, "memory: reading weights; theirs copies all keys as well", (TOY, 64), error=0),
    Case("CLIP features, 2 grids", make_tower, our_features, their_features, VIT_L, 2,
         1.15, "matrix products, of 23 blocks for 24", (TOY_TOWER, 2), error=0),
    Case("CLIP features, 4 grids", make_tower, our_features, their_features, VIT_L, 4,
         0.6, "activations of one MLP; theirs 25 hidden states as well", (TOY_TOWER, 500), error=0, memory=True),
    Case("prompt of 32k tokens", make_lm, our_first_word, their_first_word, lm(512, 2752, 2, 2, 1, 64, 32768), 32768,
         0.6, "mask of a chunk; theirs the MLP of the whole prompt", (TOY, 3072), error=0, memory=True),
]  # fmt: skip
WORDS = 151_936
STEP, LONG_STEP = lm(512, 1408, 8, 8, 2, 64, WORDS), lm(256, 704, 4, 4, 2, 64, WORDS)
SHORT, LONG = {"eighths": 7}, {"eighths": 4, "remat": True}


def both(name: str, case: tuple, n: int, quick: tuple, speed: float, share: float, bound: str, rounds: int) -> list:
    """A training case twice: for its time and for its memory."""
    (make, ours, theirs, sizes), rest = case, {"learns": True, "error": 1e-4, "rounds": rounds}
    how = {"make": make, "ours": ours, "theirs": theirs, "sizes": sizes, "n": n, "quick": quick}
    return [
        Case(f"{name}: time", wanted=speed, bound=f"matrix products; {bound}", **how, **rest),
        Case(f"{name}: memory", wanted=share, bound="gradients; theirs all logits", memory=True, **how, **rest),
    ]


TRAIN = [
    *both("step, 2k tokens", (make_lm, partial(our_step, **SHORT), partial(their_step, **SHORT), STEP), 2048, (TOY, 32),
          1.25, 0.3, "theirs the head of ignored tokens, too", 2),
    *both("step, 8k, remat", (make_lm, partial(our_step, **LONG), partial(their_step, **LONG), LONG_STEP), 8192,
          (TOY, 64), 2.0, 0.08, "half of the tokens are ignored", 1),
    *both("loss, 8k tokens", (make_head, partial(a_loss, loss=chunked_loss), partial(a_loss, loss=plain_loss), LONG_STEP),
          8192, (TOY, 700), 2.0, 0.05, "theirs fresh memory as well", 1),
]  # fmt: skip
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    case = (make_head, partial(a_loss, loss=chunked_loss), partial(a_loss, loss=torchs_loss), LONG_STEP)
    TRAIN += both("loss, beside torch's", case, 8192, (TOY, 700), 3.0, 1.5, "theirs in smaller pieces", 1)
CASES = {"model": MODEL, "train": TRAIN}
APART = ("ring", "vision", "needles")  # each a script of its own


# ---- measurements --------------------------------------------------------------------------------


def cpu_seconds(run: Run, n: int) -> tuple[float, Tensor | Found]:
    """CPU time of one call, and its result."""
    gc.collect()
    begun = time.process_time()
    result = run(n)
    return time.process_time() - begun, result


def resident(field: str) -> float:
    """Memory of this process in MB: VmRSS, what it holds now, or VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def alone(case: Case, side: str, folder: Path, n: int) -> float:
    """One side of a memory case: by how many MB it grows at most; the result is left in the folder.

    A short run comes first, so that late imports are not taken for growth.
    """
    run = getattr(case, side)(folder, n)
    run(1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    save_file(named(run(n)), folder / f"{side}.result")
    return max(resident("VmHWM") - before, PAGE)


def measure_memory(case: Case, folder: Path, quick: bool) -> tuple[float, float, Found, Found]:
    """Both sides, each in a process of its own: MB, MB, results."""
    grown = []
    for side in ("ours", "theirs"):
        if quick:  # here, since a process of its own would begin with five seconds of imports
            grown.append(alone(case, side, folder, case.quick[1]))
        else:
            command = [sys.executable, sys.argv[0], "alone", case.name, side, str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | MALLOC)
            grown.append(float(done.stdout.split()[-1]))
    return *grown, *(load_file(folder / f"{side}.result") for side in ("ours", "theirs"))


def measure_time(case: Case, folder: Path, n: int, rounds: int) -> tuple[float, float, Found, Found]:
    """Both sides here, in turns: the best seconds of each, results."""
    runs = case.ours(folder, n), case.theirs(folder, n)
    turns = [[cpu_seconds(run, n) for run in runs] for _ in range(rounds)]
    ours, theirs = zip(*turns)
    best = (min(seconds for seconds, _ in side) for side in (ours, theirs))
    return *best, named(ours[0][1]), named(theirs[0][1])


def named(result: Tensor | Found) -> Found:
    """What was computed, by name."""
    found = result if isinstance(result, dict) else {"result": result}
    return {name: x.contiguous() for name, x in found.items()}


def difference(mine: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value; exactly 0 where the bits are equal."""
    assert mine.shape == other.shape, f"{list(mine.shape)} here, {list(other.shape)} there"
    if torch.equal(mine, other):
        return 0.0
    return ((mine - other).abs().max() / other.abs().max()).item()


def measure(case: Case, quick: bool) -> bool:
    """Print a case's line of the table; did both sides agree?"""
    sizes, n = case.quick if quick else (case.sizes, case.n)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(not case.learns):
        case.make(folder := Path(name), sizes)
        gc.collect()
        if case.memory:
            ours, theirs, mine, other = measure_memory(case, folder, quick)
        else:
            ours, theirs, mine, other = measure_time(case, folder, n, 1 if quick else case.rounds)
    assert mine.keys() == other.keys(), f"{[*mine]} here, {[*other]} there"
    error = max(difference(mine[name], other[name]) for name in mine)
    if case.memory:
        ratio, unit, sign = ours / theirs, "MB", "<="
        fits = ratio <= case.wanted
    else:
        ratio, unit, sign = theirs / ours, "s ", ">="
        fits = ratio >= case.wanted
    agree = error <= case.error
    verdict = "WRONG" if not agree else "agrees" if quick else "ok" if fits else "short"
    print(
        f"{case.name:<28}{ours:>10.3f} {unit}{theirs:>10.3f} {unit}{ratio:>7.2f}  {sign} {case.wanted:<6}"
        f"{verdict:<7}{error:<9.1e}{case.bound}",
        flush=True,
    )
    return agree


def main(arguments: list[str], known: dict[str, list[Case]] = CASES) -> int:
    """Measure a group of cases: 0, or 1 where results differ. Ratios fail nothing: they are for people to read."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments[:1] == ["alone"]:  # called by measure_memory
        _, name, side, folder = arguments
        case = next(case for cases in known.values() for case in cases if case.name == name)
        with torch.inference_mode(not case.learns):
            print(alone(case, side, Path(folder), case.n))
        return 0
    if not arguments or arguments[0] not in [*known, *APART] or arguments[1:] not in ([], ["--quick"]):
        print(f"usage: python tests/bench.py {'|'.join([*known, *APART])} [--quick]")
        return 2
    if arguments[0] not in known:  # a ring's ranks are made from a process that did not import transformers
        script = Path(__file__).with_name(f"bench_{arguments[0]}.py")
        return subprocess.run([sys.executable, script, *arguments[1:]]).returncode
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32, one thread")
    print(f"{'case':<28}{'ours':>10}   {'theirs':>10}   {'ratio':>6}  {'wanted':<16}{'error':<9}what bounds it")
    agree = [measure(case, quick="--quick" in arguments) for case in known[arguments[0]]]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
