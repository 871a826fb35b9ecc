"""Long-context extension: train a language model on long text, and its context grows (Sec. 3.1).

What      Continued pretraining with the RoPE base raised, one sequence spread over all ranks by ring attention.
Paper     Sec. 3.1: Qwen2-7B-Instruct, 224,000 tokens, RoPE base 1e9, 1000 steps of 4 sequences.
Run       python train_text.py --preset tiny-base                      the tiny base model, its context short
          torchrun --nproc-per-node 2 train_text.py                    its extension: two ranks, one sequence
          torchrun --nproc-per-node 8 train_text.py --preset longva --weights Qwen2-7B-Instruct --corpus TOKENS.npy
Key       B sequences   S tokens of the whole sequence   T tokens held by this rank   P parts
Deviates  The loss is the mean over all targets of a step, not the mean of its parts' and ranks' means.
          The learning rate is the one asked for; the release's flag is ignored by its scheduler.
          max_position_embeddings is set to the new length, which other programs go by; the release leaves 32768.
          The tiny model is made from nothing here, so that nothing need be downloaded; the paper starts from Qwen2.

Kill it at any moment and run the same command again: it goes on, and on a CPU ends with the same weights to the bit.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import longva
import ring
from data import chat, memory, niah, runs, synthetic, text, tokenizer, weights
from data.config import train_flop
from data.flags import at_least, run, setting
from data.offload import GradientSums


@dataclass(frozen=True)
class Config:
    """Extend a language model's context by training on long text (Sec. 3.1)."""

    out: Path = setting(Path("runs/extended"), "folder of this run: log, saved state, exported model (ours)")
    weights: Path | None = setting(
        None, "model folder to start from; none: tiny, from scratch (Sec. 3.1: Qwen2-7B-Instruct)"
    )
    corpus: str = setting(
        "synthetic", "packed token file or folder (python -m data.pack), or synthetic (Sec. 3.1: SlimPajama)"
    )
    seq_len: int = setting(224_000, "tokens per sequence (Sec. 3.1)")
    batch: int = setting(1, "sequences read at once (release: extend_qwen2.sh)")
    grad_accumulation: int = setting(4, "parts that make one step, over all rings (release: extend_qwen2.sh)")
    ring: int | None = setting(
        None, "ranks that share a sequence; none: all, fewer: rings side by side (Sec. 3.1: all)"
    )
    steps: int = setting(1000, "optimizer steps (Sec. 3.1)")
    curriculum_steps: int = setting(0, "of these, first steps on short sequences (ours)")
    curriculum_len: int = setting(64, "tokens per sequence in those steps, as many tokens in all (ours)")
    rope_theta: float = setting(1e9, "RoPE base (Sec. 3.1)")
    lr: float = setting(1e-5, "learning rate, constant (release: extend_qwen2.sh)")
    warmup: int = setting(0, "steps in which it rises from zero (release: extend_qwen2.sh)")
    cooldown: float = setting(0.0, "share of the steps, at the end, in which it falls to a tenth (ours)")
    beta2: float = setting(0.95, "AdamW's second decay; the first is 0.9 (release: extend_qwen2.sh)")
    weight_decay: float = setting(0.1, "on all parameters alike (release: extend_qwen2.sh)")
    grad_clip: float = setting(1.0, "largest norm of the gradient (release: extend_qwen2.sh)")
    precision: Literal["fp32", "bf16"] = setting(
        "bf16", "of activations; parameters and their sums stay fp32 (Sec. 3.1)"
    )
    checkpointing: Literal["none", "full", "selective"] = setting(
        "full", "activations recomputed in backward; selective: all but attention, so the ring runs once (Sec. 3.1)"
    )
    offload_activations: bool = setting(True, "with checkpointing: saved activations go to CPU memory (release)")
    mlp_tile: int = setting(0, "tokens of a rank that the MLP takes at once, 0: all (ours)")
    offload: bool = setting(True, "parameters and optimizer in CPU memory (Sec. 3.1)")
    separate_documents: bool = setting(False, "packed documents do not see each other (Sec. 3.1: they do)")
    kernel: Literal["auto", "math", "cpu", "cuda", "cudnn", "flash_attn"] = setting("auto", "of attention (ours)")
    held_out: str | None = setting(None, "to evaluate on when state is saved: a token file, or synthetic (ours)")
    eval_windows: int = setting(8, "windows for its perplexity, half a sequence apart (ours)")
    eval_needles: int = setting(1, "magic numbers to be found at each of five depths (App. A)")
    save_every: int = setting(200, "steps between saved states (release: extend_qwen2.sh)")
    seed: int = setting(2024, "of weights, if from scratch, and of the order of data (release: extend_qwen2.sh)")
    peak_tflop: float = setting(312.0, "TFLOP/s that one GPU can do in bf16, for MFU; H100: 989 (Sec. 3.1: A100)")
    plan: bool = setting(
        False, "print the memory that a step would take, and the longest sequence; load nothing (ours)"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, seq_len=2, curriculum_len=2, batch=1, grad_accumulation=1, ring=1, steps=1, save_every=1)
        at_least(self, curriculum_steps=0, warmup=0, cooldown=0, rope_theta=1, lr=0, weight_decay=0, grad_clip=0)
        at_least(self, mlp_tile=0, seed=0, peak_tflop=1, eval_windows=1, eval_needles=1)


TINY = {  # two CPU cores, one to six minutes each; see README.md for the losses and scores to expect
    "grad_accumulation": 1, "weight_decay": 0.01, "beta2": 0.98, "precision": "fp32",
    "checkpointing": "none", "offload_activations": False, "offload": False, "save_every": 50, "cooldown": 0.2,
}  # fmt: skip
LONG = {"seq_len": 2048, "batch": 4, "steps": 160, "rope_theta": 1e6, "lr": 7e-4, "warmup": 20, "cooldown": 0.4}
SHORT = {"seq_len": 256, "batch": 16, "rope_theta": 1e4, "lr": 1e-3}
BASE = runs.trained_or_shipped("tiny-base", "base")
PRESETS = {
    "tiny-base": {
        **TINY,
        **SHORT,
        "steps": 1600,
        "curriculum_steps": 700,
        "warmup": 100,
        "out": Path("runs/tiny-base"),
    },
    "tiny": {**TINY, **LONG, "weights": BASE, "out": Path("runs/tiny-extended")},
    "tiny-control": {
        **TINY,
        **SHORT,
        "steps": 160,
        "lr": 7e-4,
        "warmup": 20,
        "cooldown": 0.4,
        "weights": BASE,
        "out": Path("runs/tiny-control"),
    },
    "longva": {"out": Path("runs/longva-text")},  # 8 x 80 GB: 2 days on A100s (Sec. 3.1)
}
PLANNING = ("plan",)  # settings that are no part of a run
SHOWN = ("loss", "norm", "tokens_per_s", "mfu", "gb")  # in the bar, of a line of the log
NEXT = {
    "tiny-base": "torchrun --nproc-per-node 2 train_text.py",
    "tiny-extended": "python train_text.py --preset tiny-control",
    "tiny-control": "python -m data.tiny.make tower",
}
TINY_LM = longva.LMConfig(  # 0.8 million parameters; V is set by the tokenizer
    hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    rope_theta=1e4, max_position_embeddings=256,
)  # fmt: skip


def learning_rate(cfg: Config, step: int) -> float:
    """The rate at a step: up over `warmup`, constant, and down to a tenth over the last `cooldown` of the steps."""
    up = min(1.0, (step + 1) / max(1, cfg.warmup))
    left = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
    return cfg.lr * up * max(0.1, min(1.0, left))


def open_tokens(corpus: str, words: tokenizer.Tokenizer) -> np.memmap | text.TokenShards:
    """A packed corpus; ValueError if it is not of this model's tokenizer."""
    tokens = text.open_tokens(corpus, words)
    if (largest := text.largest_id(tokens)) >= words.size:
        raise ValueError(f"{corpus} holds token {largest}, but the model's tokenizer has {words.size}; pack it again")
    return tokens


def make_batches(cfg: Config, words: tokenizer.Tokenizer):  # noqa: ANN201
    """A function from the number of a part to its (ids_BS, targets_BS, starts): nothing else decides what is read.

    `starts`: where the documents of each row begin, if they are not to see each other.
    """
    if cfg.corpus != "synthetic":
        tokens = open_tokens(cfg.corpus, words)

        def packed(part: int) -> tuple[Tensor, Tensor, list | None]:
            ids_BS, targets_BS = text.windows(tokens, cfg.seq_len, cfg.batch, cfg.seed, part)
            apart = cfg.separate_documents
            return ids_BS, targets_BS, text.document_starts(ids_BS, words.bos_id) if apart else None

        return packed

    def story(part: int) -> tuple[Tensor, Tensor, None]:
        step = part // cfg.grad_accumulation
        S = cfg.curriculum_len if step < cfg.curriculum_steps else cfg.seq_len
        return *synthetic.text_batch(words, cfg.seed, part, cfg.batch * cfg.seq_len // S, S), None

    return story


def language_model(cfg: Config) -> longva.LMConfig:
    """The sizes of the model to train. Raises ValueError for one that sees."""
    if not cfg.weights:
        return replace(TINY_LM, vocab_size=tokenizer.load_tokenizer(synthetic.TOKENIZER).size)
    config = longva.read_config(cfg.weights)
    if not isinstance(config, longva.LMConfig):
        raise ValueError(f"{cfg.weights} sees already; long text trains a language model before it learns to see")
    return config


def check(cfg: Config, circle: ring.World, circles: int) -> None:
    """Raise ValueError for what contradicts itself or cannot be shared, before anything is loaded."""
    if cfg.weights and not cfg.weights.is_dir():
        raise ValueError(f"--weights {cfg.weights} is no folder; name a model's folder")
    if cfg.corpus == "synthetic" and cfg.seq_len > 8192:
        raise ValueError("the synthetic stories are for the tiny model; give a token file as --corpus (data/pack.py)")
    if cfg.corpus != "synthetic" and cfg.weights is None:
        raise ValueError("--corpus is made with some model's tokenizer; give that model's folder as --weights")
    if cfg.separate_documents and cfg.corpus == "synthetic":
        raise ValueError("synthetic texts are not packed, so there is nothing to separate; give a --corpus")
    if cfg.kernel not in ("auto", "math", "cpu") and circle.device.type == "cpu":
        raise ValueError(f"--kernel {cfg.kernel} needs a CUDA GPU, and this run computes on the CPU; leave it at auto")
    if cfg.kernel == "cudnn" and cfg.separate_documents:
        raise ValueError("--kernel cudnn would make a plan for each document's length; leave --kernel at auto")
    if cfg.kernel == "cpu" and circle.device.type == "cuda":
        raise ValueError("--kernel cpu needs tensors on the CPU, and this run computes on a GPU; leave it at auto")
    if cfg.kernel not in ("auto", "math", "cpu") and cfg.precision == "fp32":
        raise ValueError(f"--kernel {cfg.kernel} takes no fp32; leave --precision at bf16, or --kernel at auto")
    if cfg.grad_accumulation % circles:
        raise ValueError(
            f"--grad-accumulation {cfg.grad_accumulation} parts cannot be dealt evenly to {circles} rings; change one"
        )
    for S in {cfg.seq_len, cfg.curriculum_len if cfg.curriculum_steps else cfg.seq_len}:
        ring.zigzag_index(S, circle)


def share(batch, parts: range, circle: ring.World) -> tuple[Tensor, list, Tensor]:  # noqa: ANN001
    """This rank's share of a step: places idx_T, (ids_BT, targets_BT, starts) of each part, how many targets they have.

    `parts` are this ring's; each part's tokens go round it in zigzag. Targets are counted before any loss is
    computed, so that a step's loss is their mean however many rings and ranks there are.
    """
    whole = [batch(part) for part in parts]
    idx_T = ring.zigzag_index(whole[0][0].shape[1], circle)
    mine = [(*deal(pair, idx_T), starts) for *pair, starts in whole]
    return idx_T, mine, sum((targets_BT != chat.IGNORE).sum() for _, targets_BT, _ in mine)


def attention(cfg: Config, circle: ring.World, starts: ring.DocumentStarts | None = None) -> longva.Attend:
    """The `attend` of a part whose documents begin at `starts`, if they are not to see each other."""
    if cfg.kernel != "auto":
        return ring.zigzag_attend(circle, cfg.kernel, starts)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    one_shape = starts is None  # documents have as many lengths as there are documents
    return ring.zigzag_attend(circle, ring.fastest_kernel(circle.device, dtype) if one_shape else None, starts)


def learn(
    cfg: Config, model: longva.LM, mine: range, idx_T: Tensor, parts: list, count: Tensor, circle: ring.World,
    world: ring.World,
) -> Tensor:  # fmt: skip
    """The gradient of a step, summed over its parts; each part's summed loss, of the tokens here."""
    loss_P = torch.zeros(cfg.grad_accumulation, device=world.device)
    gradients = GradientSums(model)  # of the parts so far, where parameters are offloaded
    for part, (ids_BT, targets_BT, starts) in zip(mine, parts):
        nll_B, _ = model(ids_BT, idx_T, targets_BT, attention(cfg, circle, starts))
        ring.global_mean(nll_B.sum(), count, world).backward()
        if cfg.offload:
            gradients.take()
        loss_P[part % cfg.grad_accumulation] += nll_B.detach().sum()
    gradients.put_back()
    return loss_P


def deal(pair: tuple[Tensor, Tensor], idx_T: Tensor) -> list[Tensor]:
    """What this rank holds of (ids_BS, targets_BS)."""
    return [x_BS.to(idx_T.device)[:, idx_T] for x_BS in pair]


# ------------------------------------------------------------------------------------- evaluation at saved steps

EVALUATED, DEPTHS = "eval.jsonl", (0, 0.25, 0.5, 0.75, 1)


def slide(cfg: Config, words: tokenizer.Tokenizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids_1S, targets_1S) of windows half a sequence apart: each token is a target once, late in its window."""
    S = cfg.seq_len
    if cfg.held_out is None:
        return
    if cfg.held_out == "synthetic":
        yield from (synthetic.text_batch(words, cfg.seed + 1, 10**6 + i, 1, S) for i in range(cfg.eval_windows))
        return
    tokens = open_tokens(cfg.held_out, words)
    if len(tokens) <= S:
        raise ValueError(f"{cfg.held_out} holds {len(tokens):,} tokens, expected more than {S:,}; pack more text")
    for start in range(0, len(tokens) - S, S // 2)[: cfg.eval_windows]:
        read = torch.from_numpy(tokens[start : start + S + 1].astype(np.int64))[None]
        targets_1S = read[:, 1:].clone()
        targets_1S[:, : S - S // 2 if start else 0] = chat.IGNORE
        yield read[:, :-1], targets_1S


def hide(cfg: Config, words: tokenizer.Tokenizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids_1S, targets_1S) of magic numbers hidden in held-out text (App. A); the numbers alone are targets."""
    if cfg.held_out is None:
        return
    S, stops, digits, count = cfg.seq_len, niah.period_ids(words.encode), 7, cfg.eval_needles * len(DEPTHS)
    if cfg.held_out == "synthetic":
        book, digits = words.encode(synthetic.story(cfg.seed + 1, S)), 3
    else:
        book = [i for i in open_tokens(cfg.held_out, words)[:S].tolist() if i != words.bos_id]
    for i, number in enumerate(niah.magic_numbers(np.random.RandomState(cfg.seed), count, digits)):
        context, rng = 1, np.random.RandomState(0)  # there are no distractors, so that nothing is drawn
        for _ in range(2):  # once for the length of all but the book
            probe = (words.encode, book, context, DEPTHS[i % len(DEPTHS)], number, (), rng, stops)
            ids, answer = niah.text_probe(*probe)
            context += S + 1 - len(ids) - len(answer)
            if context < 1:
                raise ValueError(f"--seq-len {S} is too short to ask for a hidden number; leave out --held-out")
        whole = torch.tensor([ids + answer])
        targets_1S = whole[:, 1:].clone()
        targets_1S[:, : -len(answer)] = chat.IGNORE
        yield whole[:, :-1], targets_1S


def evaluate(cfg: Config, model: longva.LM, windows: list, hidden: list, circle: ring.World, step: int) -> None:
    """Write perplexity over `slide`'s windows and the share of `hide`'s numbers found to eval.jsonl."""
    loss, count, found = torch.zeros((), device=circle.device), torch.zeros((), device=circle.device), []
    idx_T, attend = ring.zigzag_index(cfg.seq_len, circle), attention(cfg, circle)
    with ring.no_grad_reshard(model):
        for pair in windows:
            ids_BT, targets_BT = deal(pair, idx_T)
            nll_B, count_B = model(ids_BT, idx_T, targets_BT, attend)
            loss, count = loss + nll_B.sum(), count + count_B.sum()
        for pair in hidden:
            ids_BT, targets_BT = deal(pair, idx_T)
            hits_B, of_B = model(ids_BT, idx_T, targets_BT, attend, longva.count_correct)
            found.append(ring.all_reduce_sum(of_B - hits_B, circle).item() == 0)
    mean = (ring.all_reduce_sum(loss, circle) / ring.all_reduce_sum(count, circle)).item()
    scores = {"perplexity": math.exp(min(mean, 700)), "needles_found": sum(found) / len(found)}
    if circle.peer(circle.rank) == 0:
        runs.log(cfg.out, {"step": step, "held_out_loss": mean} | scores, EVALUATED)
        tqdm.write("  ".join([f"step {step}", *(f"{name} {value:.3f}" for name, value in scores.items())]))


def main(cfg: Config) -> None:
    """Train, save, export; resumes where a killed run of the same settings stopped."""
    if cfg.plan:
        memory.show_step(memory.Step.of(language_model(cfg), cfg))
        return
    # 1 processes
    world = ring.start(cfg.device)
    circle, number, circles = ring.split_groups(world, cfg.ring or world.ranks)  # parts of a step go round the rings
    check(cfg, circle, circles)

    # 2 model: shapes first, then shards, then weights, so that no rank ever holds all of it
    words, config = tokenizer.load_tokenizer(cfg.weights or synthetic.TOKENIZER), language_model(cfg)
    config = replace(config, rope_theta=cfg.rope_theta, max_position_embeddings=cfg.seq_len)
    with torch.device("meta"):
        model = longva.LM(config)
    model.model.checkpointing = cfg.checkpointing
    model.model.offload_activations = cfg.offload_activations and cfg.checkpointing != "none"
    for block in model.model.layers:
        block.mlp.tile = cfg.mlp_tile
    param_dtype = torch.bfloat16 if cfg.precision == "bf16" else None
    ring.shard_parameters(model, model.model.layers, world, cfg.offload, param_dtype)
    source = weights.read(cfg.weights) if cfg.weights else weights.init_weights(model, cfg.seed)
    weights.fill_from(model, source, ring.copy_shard)
    size = sum(p.numel() for p in model.parameters())
    ring.print0(world, f"{size:,} parameters on {world.ranks} rank(s), device {world.device}")

    # 3 data
    batch = make_batches(cfg, words)
    exam = [*slide(cfg, words)], [*hide(cfg, words)]

    # 4 optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8, weight_decay=cfg.weight_decay,
        fused=(world.device.type == "cuda") or None,  # one kernel, where foreach holds a third copy of all parameters
    )  # fmt: skip

    # 5 resume
    if world.rank == 0:
        runs.open_run(cfg.out, {name: value for name, value in asdict(cfg).items() if name not in PLANNING})
    first = ring.load_state(cfg.out / "state", model, optimizer, world)
    if world.rank == 0:
        runs.truncate_log(cfg.out, first)
        runs.truncate_log(cfg.out, first + 1, EVALUATED)

    # 6 the loop
    bar = tqdm(range(first, cfg.steps), cfg.out.name, cfg.steps, initial=first, disable=world.rank > 0)
    for step in bar:
        began = time.perf_counter()
        mine = range(step * cfg.grad_accumulation + number, (step + 1) * cfg.grad_accumulation, circles)
        idx_T, parts, count = share(batch, mine, circle)
        loss_P = learn(cfg, model, mine, idx_T, parts, count, circle, world)
        loss = runs.finite(step, (ring.all_reduce_sum(loss_P, world) / ring.all_reduce_sum(count, world)).tolist())
        norm = ring.clip_gradients(model, cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0:
            speed = parts[0][0].numel() * circle.ranks * cfg.grad_accumulation / (time.perf_counter() - began)
            line = {"step": step, "loss": loss, "norm": norm, "lr": learning_rate(cfg, step)}
            work = train_flop(config, len(idx_T) * circle.ranks) * speed / world.ranks / 1e12
            line |= {"tokens_per_s": round(speed), "tflop_per_s_and_rank": float(f"{work:.4g}")}
            line |= {"gb": round(runs.peak_bytes(world.device) / memory.GB, 3)}
            if world.device.type == "cuda":
                line |= {"mfu": round(work / cfg.peak_tflop, 4)}
            runs.log(cfg.out, line)
            bar.set_postfix({name: f"{line[name]:.4g}" for name in SHOWN if name in line})
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            if cfg.held_out:
                evaluate(cfg, model, *exam, circle, step + 1)
            ring.save_state(cfg.out / "state", model, optimizer, step + 1, world)

    # 7 export
    export(cfg, config, model, world)
    ring.stop()


def export(cfg: Config, config: longva.LMConfig, model: longva.LM, world: ring.World) -> None:
    """Write the model as Hugging Face lays it out, beside its tokenizer, and say what comes next."""
    stream, folder = ring.gather_parameters(model, world), cfg.out / "model"
    if world.rank > 0:
        return
    longva.save(folder, stream, config, cfg.weights or synthetic.TOKENIZER)
    follow = "torchrun --nproc-per-node 8 train_vision.py --preset longva --stage align --tower CLIP --data LLAVA.json"
    follow = f"python vniah.py text --weights {folder}" if cfg.corpus == "synthetic" else f"{follow} --weights {folder}"
    print(f"model: {folder}   log: {cfg.out / 'log.jsonl'}   loss curve: {runs.draw_curve(cfg.out)}")
    print(f"next:  {NEXT.get(cfg.out.name, follow)}")


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
