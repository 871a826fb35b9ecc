"""How fast and how small: this code beside transformers, on this machine, with the same weights, in one run.

What      Each case computes one thing twice, here and there. First both must give the same result; then both are
          timed in turns, ours and theirs, three times, and the best of each counts. What is timed is the CPU time
          of the process, on one thread: other work on the machine disturbs it little, where it spoils wall time.
          Memory is measured in a process of its own for each side: how far it grows above the loaded model.
Paper     None: the models here are random, and of sizes at which arithmetic outweighs overhead on one core.
Run       python tests/bench.py model            about 4 minutes on an idle core
          python tests/bench.py model --quick    toy sizes: only shows that every case still runs and agrees
Key       those of longva.py and clip.py
Deviates  Nothing to deviate from. Theirs runs as people run it: sdpa, its own growing cache, no gradients.

A ratio above 1 means that ours takes less time; a share below 1, that ours takes less memory.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import longva
from clip import ClipVision
from data import parameters
from data.config import ClipConfig

ROUNDS = 3
Run = Callable[[int], Tensor]  # n tokens or grids -> what was computed


@dataclass(frozen=True)
class Case:
    """One line of the table. `make` writes the weights; `ours` and `theirs` load them and return what to run."""

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


# ------------------------------------------------------------------------------------------ models and inputs


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


def their_lm(folder: Path) -> Qwen2ForCausalLM:
    """Load it as people do."""
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def some_ids(V: int, T: int) -> Tensor:
    """A prompt, ids_1T."""
    return torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1))


def some_pixels(config: ClipConfig | CLIPVisionConfig, N: int) -> Tensor:
    """Grids, pixels_NCYX."""
    side = config.image_size
    return torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------- the cases


def our_prefill(folder: Path, n: int) -> Run:
    """Read a prompt into a new cache, `longva.CHUNK` tokens at a time: logits of the last position."""
    model = longva.load(folder)

    def prefill(T: int) -> Tensor:
        ids_1T = some_ids(model.config.vocab_size, T)
        cache = longva.KVCache(model.config, 1, T, model.lm_head.weight)
        return model.logits(longva.read(model, model.embed(ids_1T), cache)[:, -1])

    return prefill


def their_prefill(folder: Path, n: int) -> Run:
    """The same, in one piece."""
    model = their_lm(folder)

    def prefill(T: int) -> Tensor:
        ids_1T = some_ids(model.config.vocab_size, T)
        return model(ids_1T, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1).logits[:, -1]

    return prefill


NEW = 64  # tokens said in a decoding case


def our_decode(folder: Path, n: int) -> Run:
    """Say NEW tokens after a context of n, which was read before."""
    model = longva.load(folder)
    cache = longva.KVCache(model.config, 1, n + NEW, model.lm_head.weight)
    x_1TD = model.embed(some_ids(model.config.vocab_size, n))
    longva.read(model, x_1TD[:, :-1], cache)
    mark = cache.mark()

    def decode(n: int) -> Tensor:
        cache.rewind(mark)
        return torch.tensor(list(longva.generate(model, x_1TD[:, -1:], cache, [], NEW)))

    return decode


def their_decode(folder: Path, n: int) -> Run:
    """The same by the plain loop: leaner than their `generate`, which adds bookkeeping to every token."""
    model, cache = their_lm(folder), DynamicCache()
    ids_1T = some_ids(model.config.vocab_size, n)
    model(ids_1T[:, :-1], use_cache=True, past_key_values=cache, logits_to_keep=1)

    def decode(n: int) -> Tensor:
        cache.crop(n - 1 - cache.get_seq_length())  # how many to drop, as a number below 0
        said, ids_11 = [], ids_1T[:, -1:]
        for _ in range(NEW):
            ids_11 = model(ids_11, use_cache=True, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            said.append(ids_11.item())
        return torch.tensor(said)

    return decode


def our_features(folder: Path, n: int) -> Run:
    """Patch features of the layer before the last, where LLaVA and LongVA read."""
    sizes = json.loads((folder / "config.json").read_text())
    model = ClipVision(ClipConfig.from_dict(sizes)).eval().requires_grad_(False)
    prefix = parameters.TOWER
    parameters.fill_from(model, ((name.removeprefix(prefix), x) for name, x in parameters.read_tower(folder)))
    return lambda N: model(some_pixels(model.config, N))


def their_features(folder: Path, n: int) -> Run:
    """The same as LLaVA takes them: all layers, all hidden states, then a choice."""
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return lambda N: model(some_pixels(model.config, N), output_hidden_states=True).hidden_states[-2][:, 1:]


def our_first_word(folder: Path, n: int) -> Run:
    """Read a long prompt and say one token."""
    model = longva.load(folder)

    def say(T: int) -> Tensor:
        cache = longva.KVCache(model.config, 1, T + 1, model.lm_head.weight)
        return torch.tensor(
            list(longva.generate(model, model.embed(some_ids(model.config.vocab_size, T)), cache, [], 1))
        )

    return say


def their_first_word(folder: Path, n: int) -> Run:
    """The same by their `generate`."""
    model = their_lm(folder)
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def say(T: int) -> Tensor:
        ids_1T = some_ids(model.config.vocab_size, T)
        return model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **how)[0, T:]

    return say


def lm(D: int, F: int, L: int, H: int, G: int, K: int, V: int) -> dict:
    """Sizes by their letters."""
    return {"D": D, "F": F, "L": L, "H": H, "G": G, "K": K, "V": V}


def tower(E: int, F: int, L: int, H: int, side: int) -> dict:
    """Sizes under their names."""
    sizes = {"hidden_size": E, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H}
    return sizes | {"patch_size": 14, "image_size": side}


TOY, TOY_TOWER, VIT_L = lm(32, 64, 2, 4, 2, 8, 64), tower(32, 64, 3, 2, 28), tower(1024, 4096, 24, 16, 336)
MODEL = [
    Case("dense prefill, 1,024 tokens", make_lm, our_prefill, their_prefill, lm(1024, 4096, 6, 8, 2, 128, 8192), 1024,
         0.97, "matrix products: the same ones on both sides", (TOY, 32)),
    Case("decoding, small model", make_lm, our_decode, their_decode, lm(256, 1024, 4, 4, 2, 64, 2048), 32,
         1.5, "Python and dispatch per layer", (TOY, 32), error=0),
    Case("decoding after 8k tokens", make_lm, our_decode, their_decode, lm(512, 1408, 8, 8, 2, 64, 32768), 8192,
         1.4, "reading weights and keys from memory", (TOY, 64), error=0),
    Case("CLIP features, 1 grid", make_tower, our_features, their_features, VIT_L, 1,
         1.15, "matrix products of 23 blocks, theirs of 24", (TOY_TOWER, 2), error=0),
    Case("CLIP features, 4 grids", make_tower, our_features, their_features, VIT_L, 4,
         0.6, "one MLP's activations, theirs 25 hidden states more", (TOY_TOWER, 2), error=0, memory=True),
    Case("prompt of 32k tokens", make_lm, our_first_word, their_first_word, lm(512, 2752, 2, 2, 1, 64, 32768), 32768,
         0.6, "a chunk's mask, theirs the MLP of the whole prompt", (TOY, 4096), error=0, memory=True),
]  # fmt: skip
CASES = {"model": MODEL}


# ------------------------------------------------------------------------------------------------- measurements


def cpu_seconds(run: Run, n: int) -> float:
    """CPU time of one call."""
    gc.collect()
    begun = time.process_time()
    run(n)
    return time.process_time() - begun


def resident(field: str) -> float:
    """Memory of this process in MB: VmRSS, what it holds now, or VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def alone(case: Case, side: str, folder: Path, n: int) -> None:
    """One side of a memory case, in its own process: print the growth in MB, keep the result.

    A short run comes first, so that lazy imports and weights mapped from a file are not taken for growth.
    """
    run = getattr(case, side)(folder, n)
    run(1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    save_file({"result": run(n).contiguous()}, folder / f"{side}.result")
    print(resident("VmHWM") - before)


def measure_memory(case: Case, folder: Path, n: int, arguments: list[str]) -> tuple[float, float, Tensor, Tensor]:
    """Both sides in processes of their own: MB, MB, results."""
    grown = []
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, *arguments, "--alone", case.name, side, str(folder)]
        grown.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]))
    mine, other = (load_file(folder / f"{side}.result")["result"] for side in ("ours", "theirs"))
    return *grown, mine, other


def measure_time(case: Case, folder: Path, n: int) -> tuple[float, float, Tensor, Tensor]:
    """Both sides here, in turns: the best seconds of each, results."""
    ours, theirs = case.ours(folder, n), case.theirs(folder, n)
    mine, other = ours(n), theirs(n)
    times = [(cpu_seconds(ours, n), cpu_seconds(theirs, n)) for _ in range(ROUNDS)]
    return *map(min, zip(*times)), mine, other


def difference(mine: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value; exactly 0 where the bits are equal."""
    assert mine.shape == other.shape, f"{list(mine.shape)} here, {list(other.shape)} there"
    if torch.equal(mine, other):
        return 0.0
    return ((mine - other).abs().max() / other.abs().max()).item()


def measure(case: Case, quick: bool, arguments: list[str]) -> bool:
    """Print a case's line of the table; did both sides agree?"""
    sizes, n = case.quick if quick else (case.sizes, case.n)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.make(folder, sizes)
        gc.collect()
        if case.memory:
            ours, theirs, mine, other = measure_memory(case, folder, n, arguments)
        else:
            ours, theirs, mine, other = measure_time(case, folder, n)
    error = difference(mine, other)
    ratio = ours / theirs if case.memory else theirs / ours
    fits = ratio <= case.wanted if case.memory else ratio >= case.wanted
    agree = error <= case.error
    unit, sign = ("MB", "<=") if case.memory else ("s ", ">=")
    verdict = ("ok" if fits else "short") if agree else "WRONG"
    print(
        f"{case.name:<28}{ours:>9.3f} {unit}{theirs:>9.3f} {unit}{ratio:>8.2f}  {sign} {case.wanted:<5}"
        f"{verdict:<7}{error:<9.1e}{case.bound}",
        flush=True,
    )
    return agree


@torch.inference_mode()
def main(arguments: list[str]) -> int:
    """Measure a group of cases; 1 where results differ, whatever the ratios."""
    if not arguments or arguments[0] not in CASES:
        print(f"usage: python tests/bench.py {{{','.join(CASES)}}} [--quick]")
        return 2
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases, quick = CASES[arguments[0]], "--quick" in arguments
    if "--alone" in arguments:
        name, side, folder = arguments[arguments.index("--alone") + 1 :]
        case = next(case for case in cases if case.name == name)
        alone(case, side, Path(folder), case.quick[1] if quick else case.n)
        return 0
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32, one thread")
    print(f"{'case':<28}{'ours':>9}   {'theirs':>9}   {'ratio':>7}  {'wanted':<8}{'':<7}{'error':<9}what bounds it")
    return 0 if all([measure(case, quick, arguments) for case in cases]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
