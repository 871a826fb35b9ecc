"""Long-context extension: train a language model on long text, so that its context grows (Sec. 3.1).

What      Continued pretraining with a larger RoPE base; ring attention spreads one sequence over all ranks. Kill it at
          any moment and run the same command again: it continues, and on a CPU ends with the same weights to the bit.
Paper     Sec. 3.1: Qwen2-7B-Instruct, 224,000 tokens, RoPE base 1e9, 1000 steps of 4 sequences.
Run       python train_text.py --preset tiny-base                      the tiny base model, its context short
          torchrun --nproc-per-node 2 train_text.py                    its extension: two ranks, one sequence
          torchrun --nproc-per-node 8 train_text.py --preset longva --weights Qwen2-7B-Instruct --corpus TOKENS.npy
Dimensions  B sequences   S tokens of the whole sequence   T tokens held by this rank
Differs   The loss is the mean over all targets of a step, not the mean of its micro-batches' and ranks' means.
          The learning rate is what --lr says; the release's scheduler ignores its own flag.
          max_position_embeddings is set to the new length, which other programs read; the release leaves 32768.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import longva
import ring
from data import chat, evaluate, memory, memory_saving, runs, synthetic, text, weights
from data.config import LMConfig, check_trainable, read_config, to_dict, train_flop
from data.flags import at_least, print0, progress, run, setting
from data.memory_saving import GradientSums, nll
from data.tokenizer import Tokenizer, load_tokenizer

# ---- one step ------------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    """What one forward pass takes: of whole sequences [B, S], or the part of them that this rank holds [B, T]."""

    ids: Tensor
    targets: Tensor
    doc_starts: ring.DocumentStarts | None  # in each whole row, if its documents must not attend to each other


def shard(batch: MicroBatch, idx_T: Tensor) -> MicroBatch:
    """Keep the positions that this rank holds, on its device."""
    return MicroBatch(batch.ids.to(idx_T.device)[:, idx_T], batch.targets.to(idx_T.device)[:, idx_T], batch.doc_starts)


def train_step(
    model: longva.LM, batches: list[MicroBatch], kernel: str | None, offload: bool, group: ring.World, world: ring.World
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of one optimizer step.

    batches: whole sequences, of this ring (`group`) alone; world: all ranks. Returns (the loss of each micro-batch,
    summed over the tokens here; the step's targets over all ranks). Targets are counted first: the step's loss, and so
    each micro-batch's gradient, is divided by their number.
    """
    idx_T = ring.zigzag_index(batches[0].ids.shape[1], group)  # the positions that this rank holds of every sequence
    local = [shard(batch, idx_T) for batch in batches]
    count = sum((batch.targets != chat.IGNORE).sum() for batch in local)
    losses = []
    gradients = GradientSums(model, offload)  # where parameters are offloaded, FSDP2 does not accumulate them itself
    for batch in local:
        attend = ring.zigzag_attend(group, kernel, batch.doc_starts)
        nll_B, _ = model(batch.ids, idx_T, batch.targets, attend)
        ring.global_mean(nll_B.sum(), count, world).backward()
        gradients.take()
        losses.append(nll_B.detach().sum())
    gradients.put_back()
    return torch.stack(losses), ring.all_reduce_sum(count, world)


def learning_rate(peak: float, step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Return the rate at a step: up over `warmup` steps, constant, down over the last `cooldown` of all, to a tenth."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    left = (steps - step) / max(1.0, cooldown * steps)
    return peak * rise * max(0.1, min(1.0, left))


# ---- the run of Sec. 3.1, in seven steps ---------------------------------------------------------


def train(cfg: "Config") -> None:
    """Train, save, export; continues where a killed run of the same settings stopped."""
    # 1. Processes: the ranks form rings; the ranks of a ring share each sequence.
    world = ring.start(cfg.device)
    group, ring_rank, num_rings = ring.split_groups(world, cfg.ring or world.ranks)
    kernel = check(cfg, group, num_rings)

    # 2. Data: a function from the number of a micro-batch to its sequences
    tokenizer = load_tokenizer(cfg.weights or synthetic.TOKENIZER)
    read_batch = make_batches(cfg, tokenizer)
    at_end = "synthetic" if cfg.expected and cfg.corpus == "synthetic" and cfg.seq_len >= SHORT["seq_len"] else None
    held_out = evaluate.eval_sets(cfg.held_out or at_end, cfg.seq_len, cfg.seed, tokenizer)

    # 3. Model, with the larger RoPE base
    model, config = build_sharded_model(cfg, world)

    # 4. Optimizer
    fused = (world.device.type == "cuda") or None  # one kernel, where foreach holds a third copy of all parameters
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, cfg.beta2), 1e-8, cfg.weight_decay, fused=fused)

    # 5. Resume
    if world.rank == 0:
        runs.open_run(cfg.out, asdict(cfg), ("weights", "corpus", "held_out"), more_steps=cfg.cooldown == 0)
    first = ring.load_state(cfg.out / "state", model, optimizer, world)
    runs.resume_log(cfg.out, first, world.rank, evaluate.LOG)

    # 6. The loop
    bar = progress(range(first, cfg.steps), cfg.out.name, cfg.steps, initial=first)
    signals = runs.Signals(partial(ring.all_reduce_sum, world=world))
    for step in signals.steps(bar):
        started = time.perf_counter()
        numbers = range(step * cfg.grad_accumulation, (step + 1) * cfg.grad_accumulation)
        batches = [read_batch(number) for number in numbers[ring_rank::num_rings]]  # each ring takes every n-th
        sums = torch.zeros(cfg.grad_accumulation, device=world.device)
        sums[ring_rank::num_rings], count = train_step(model, batches, kernel, cfg.offload, group, world)
        loss = runs.sum_finite(step, (ring.all_reduce_sum(sums, world) / count).tolist())
        norm = ring.clip_gradients(model, cfg.grad_clip)
        for params in optimizer.param_groups:
            params["lr"] = learning_rate(cfg.lr, step, cfg.steps, cfg.warmup, cfg.cooldown)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0:
            B, S = batches[0].ids.shape
            tokens_per_s = B * S * cfg.grad_accumulation / (time.perf_counter() - started)
            line = {"step": step, "loss": loss, "norm": norm, "lr": params["lr"], "seq_len": S}
            line |= runs.speed(tokens_per_s, world.ranks, train_flop(config, S), cfg.peak_tflop, world.device)
            runs.log_step(cfg.out, line, bar, world.device)
        is_last = step + 1 == cfg.steps
        due = is_last or (step + 1) % cfg.save_every == 0
        if due and (cfg.held_out or (is_last and held_out.windows)):
            scores = score_held_out(model, held_out, kernel, group)
            evaluate.log_scores(cfg.out, step + 1, scores, cfg.expected if is_last else (), world.rank)
        if signals.came() or due:
            ring.save_state(cfg.out / "state", model, optimizer, step + 1, world)

    # 7. Export, in Hugging Face's layout, beside the tokenizer
    stream = ring.gather_parameters(model, world)
    if world.rank == 0:
        weights.save(cfg.out / "model", stream, to_dict(config), cfg.weights or synthetic.TOKENIZER)
        runs.print_end(cfg.out, "python vniah.py text --weights {}" if cfg.corpus == "synthetic" else ALIGN)


# ---- model, data, evaluation ---------------------------------------------------------------------


def model_config(folder: Path | None) -> LMConfig:
    """Return the sizes of the model to train. Raises ValueError for one that sees."""
    if folder is None:
        return replace(TINY_LM, vocab_size=load_tokenizer(synthetic.TOKENIZER).size)
    config = read_config(folder)
    if not isinstance(config, LMConfig):
        raise ValueError(f"{folder} sees already; long text trains a language model before it learns to see")
    return check_trainable(config)


def build_sharded_model(cfg: "Config", world: ring.World) -> tuple[longva.LM, LMConfig]:
    """Return the model: shapes first, then shards, then weights, so that no rank ever holds all of it."""
    config = replace(model_config(cfg.weights), rope_theta=cfg.rope_theta, max_position_embeddings=cfg.seq_len)
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
    print0(f"{sum(p.numel() for p in model.parameters()):,} parameters on {world.ranks} rank(s), {world.device}")
    return model, config


def make_batches(cfg: "Config", tokenizer: Tokenizer) -> Callable[[int], MicroBatch]:
    """Return a function from the number of a micro-batch to its whole sequences: nothing else decides what is read."""
    tokens = None if cfg.corpus == "synthetic" else text.open_corpus(cfg.corpus, tokenizer)

    def read_batch(number: int) -> MicroBatch:
        if tokens is None:
            step = number // cfg.grad_accumulation
            S = synthetic.text_length(step, cfg.seq_len, cfg.curriculum_steps, cfg.short_texts)
            return MicroBatch(*synthetic.text_batch(tokenizer, cfg.seed, number, cfg.batch * cfg.seq_len // S, S), None)
        ids_BS, targets_BS = text.windows(tokens, cfg.seq_len, cfg.batch, cfg.seed, number)
        doc_starts = text.document_starts(ids_BS, tokenizer.bos_id) if cfg.separate_documents else None
        return MicroBatch(ids_BS, targets_BS, doc_starts)

    return read_batch


def score_held_out(model: longva.LM, sets: evaluate.EvalSets, kernel: str | None, group: ring.World) -> dict:
    """Score the model on held-out text; each ring does it all."""

    def score(ids_1S: Tensor, targets_1S: Tensor, measure: Callable) -> tuple[float, float]:
        idx_T = ring.zigzag_index(ids_1S.shape[1], group)
        batch = shard(MicroBatch(ids_1S, targets_1S, None), idx_T)
        sum_B, count_B = model(batch.ids, idx_T, batch.targets, ring.zigzag_attend(group, kernel), measure)
        return tuple(ring.all_reduce_sum(torch.stack([sum_B.sum(), count_B.sum()]).double(), group).tolist())

    with ring.no_grad_reshard(model):
        return evaluate.evaluate(sets, score, nll)


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Extend a language model's context by training on long text (Sec. 3.1)."""

    out: Path = setting(Path("runs/extended"), "folder of this run: log, state, exported model (ours)", group="Run")
    seed: int = setting(2024, "random seed of new weights and of the order of data (release: extend_qwen2.sh)")
    save_every: int = setting(200, "steps between saved states (release: extend_qwen2.sh)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to compute on (ours)")
    plan: bool = setting(False, "print the memory that a step needs and the longest sequence; train nothing (ours)")
    weights: Path | None = setting(None, "model folder; none: tiny, from scratch (Sec. 3.1: Qwen2-7B)", group="Model")
    rope_theta: float = setting(1e9, "RoPE base (Sec. 3.1)")
    corpus: str = setting("synthetic", "token file (data/pack.py), or synthetic (Sec. 3.1: SlimPajama)", group="Data")
    seq_len: int = setting(224_000, "tokens per sequence (Sec. 3.1)")
    separate_documents: bool = setting(False, "packed documents do not attend to each other (Sec. 3.1: they do)")
    held_out: str | None = setting(None, "text to evaluate on when state is saved: as --corpus (ours)")
    expected: tuple[float, ...] = setting((), "held-out loss and share of numbers to reach (ours)", hidden=True)
    curriculum_steps: int = setting(0, "first steps, on synthetic sequences of 64 tokens (ours)", hidden=True)
    short_texts: int = setting(0, "synthetic text length of every second step; 0: as all (ours)", hidden=True)
    batch: int = setting(1, "sequences per micro-batch (release: extend_qwen2.sh)", group="Optimization")
    grad_accumulation: int = setting(4, "micro-batches per optimizer step, over all rings (release: extend_qwen2.sh)")
    steps: int = setting(1000, "optimizer steps (Sec. 3.1)")
    lr: float = setting(1e-5, "learning rate between warm-up and cooldown (release: extend_qwen2.sh)")
    warmup: int = setting(0, "steps in which the rate rises from zero (release: extend_qwen2.sh)")
    cooldown: float = setting(0.0, "part of the steps, at the end, in which it falls to a tenth (ours)", hidden=True)
    beta2: float = setting(0.95, "AdamW's beta2; beta1 is 0.9 (release: extend_qwen2.sh)", hidden=True)
    weight_decay: float = setting(0.1, "AdamW's, of all parameters (release: extend_qwen2.sh)", hidden=True)
    grad_clip: float = setting(1.0, "largest norm of the gradient (release: extend_qwen2.sh)", hidden=True)
    ring: int | None = setting(None, "ranks that share a sequence; none: all (Sec. 3.1: all)", group="Hardware")
    precision: Literal["fp32", "bf16"] = setting("bf16", "of activations; parameters stay fp32 (Sec. 3.1)")
    checkpointing: Literal["none", "full", "selective"] = setting(
        "full", "activations to recompute in backward; selective: all but attention (Sec. 3.1)"
    )
    offload_activations: bool = setting(True, "offload checkpointed activations to CPU memory (release: train.py)")
    offload: bool = setting(True, "keep parameters and optimizer in CPU memory (Sec. 3.1)")
    mlp_tile: int = setting(0, "tokens per pass of the MLP, to save memory; 0: all (ours)", hidden=True)
    kernel: Literal["auto", "math", "cpu", "cuda", "cudnn", "flash_attn"] = setting("auto", "attention kernel (ours)")
    peak_tflop: float = setting(312.0, "peak bf16 TFLOP/s of a GPU, for mfu; H100: 989 (Sec. 3.1: A100)", hidden=True)

    def __post_init__(self):
        at_least(self, seq_len=2, batch=1, grad_accumulation=1, ring=1, steps=1, save_every=1, seed=0, peak_tflop=1)
        at_least(self, curriculum_steps=0, short_texts=0, warmup=0, cooldown=0, rope_theta=1, lr=0, mlp_tile=0)
        at_least(self, weight_decay=0, grad_clip=0)


TINY = {  # two to fourteen minutes each on a CPU core; data/tiny/README.md has the losses and scores to expect
    "grad_accumulation": 1, "weight_decay": 0.01, "beta2": 0.98, "precision": "fp32",
    "checkpointing": "none", "offload_activations": False, "offload": False, "save_every": 50, "cooldown": 0.2,
}  # fmt: skip
LONG = {"seq_len": 2048, "batch": 4, "short_texts": 256, "rope_theta": 1e7, "expected": (0.05, 0.9)}
SHORT = {"seq_len": 256, "batch": 16, "rope_theta": 1e4, "expected": (0.1, 0.9)}
BASE = runs.trained_or_shipped("tiny-base", "base")
EXTEND = {"steps": 400, "lr": 7e-4, "warmup": 20, "cooldown": 0.6, "weights": BASE}
SCRATCH = {"steps": 3000, "curriculum_steps": 1400, "cooldown": 0.4, "lr": 1e-3, "warmup": 100}
PRESETS = {
    "tiny-base": {**TINY, **SHORT, **SCRATCH, "out": Path("runs/tiny-base")},
    "tiny": {**TINY, **LONG, **EXTEND, "out": Path("runs/tiny-extended")},
    "tiny-control": {**TINY, **SHORT, **EXTEND, "out": Path("runs/tiny-control")},
    "longva": {"out": Path("runs/longva-text")},  # 8 x 80 GB: 2 days on A100s (Sec. 3.1)
}
ALIGN = runs.TORCHRUN_8 + " train_vision.py --preset longva --stage align --tower CLIP --data LLAVA.json --weights {}"
TINY_LM = LMConfig(  # 0.8 million parameters; the vocabulary's size is the tokenizer's
    hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
    rope_theta=1e4, max_position_embeddings=256,
)  # fmt: skip


def check(cfg: Config, group: ring.World, num_rings: int) -> str | None:
    """Return the attention kernel. Raises ValueError for settings that contradict each other, before all else."""
    if cfg.corpus == "synthetic" and cfg.seq_len > 8192:
        raise ValueError("the synthetic stories are for the tiny model; give a token file as --corpus (data/pack.py)")
    if cfg.corpus != "synthetic" and cfg.weights is None:
        raise ValueError("--corpus is made with some model's tokenizer; give that model's folder as --weights")
    if cfg.separate_documents and cfg.corpus == "synthetic":
        raise ValueError("synthetic texts are not packed, so there is nothing to separate; give a --corpus")
    if cfg.grad_accumulation % num_rings:
        micro_batches = f"--grad-accumulation {cfg.grad_accumulation} micro-batches"
        raise ValueError(f"{micro_batches} cannot be divided evenly among {num_rings} rings; change one")
    for tokens in (cfg.seq_len, cfg.short_texts or cfg.seq_len):
        ring.zigzag_index(tokens, group)  # a ValueError unless they divide evenly
    return memory_saving.choose_kernel(cfg.kernel, group.device, cfg.precision, cfg.separate_documents)


def main(cfg: Config) -> None:
    """Train, or with --plan print the memory that it would need."""
    if cfg.plan:
        name = cfg.weights or "the tiny model, for --weights names no other"
        memory.show_step(memory.Step.of(model_config(cfg.weights), cfg), name)
    else:
        train(cfg)
        ring.stop()


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
