"""Vision alignment: teach an extended language model to see, on single short pictures (Sec. 3.2).

What      --stage align   trains the projector alone, on captions (LLaVA-1.5's first stage)
          --stage sft     trains vision tower, projector and language model, on conversations about pictures
          --stage both    align, then sft, of the miniature
          --stage dpo     trains the same on pairs of answers about a video, one preferred (LongVA-DPO)
          The stages differ in what learns (`param_groups`) and in the loss (`NextTokenLoss`, `DPOLoss`). Ranks divide a
          step's samples, or with --ring a sample's tokens. A killed run, started again, goes on, on a CPU bit for bit.
Paper     Sec. 3.2, App. C: LLaVA-1.6's data and recipe, UniRes, no video. Sec. 5.2: DPO (arXiv 2305.18290) on videos.
Run       python train_vision.py --stage both
          torchrun --nproc-per-node 2 train_vision.py --stage align     the tiny model; then --stage sft
          torchrun --nproc-per-node 8 train_vision.py --stage sft --preset longva --weights ALIGNED --data LLAVA.json
Dimensions  B samples (for dpo 2 rows per pair, of P)   S tokens of the longest, T held by this rank   N grids
Differs   --labels clean trains the assistant's words alone, with one newline after a picture, as in inference;
          released, the full-size default, also the control tokens of user turns, with two newlines (data/chat.py).
          The loss is the mean over all targets of a step, not the mean of the ranks' means.
          align cuts pictures as sft does; the release's crops them square and leaves 576 tokens unpooled.
          An unusable sample is skipped and counted (data/llava.py). dpo computes reference log-probabilities once.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import longva
import ring
import unires
from data import chat, evaluate, llava, runs, weights
from data.config import check_trainable, to_dict
from data.flags import at_least, check_range, print0, progress, run, setting
from data.memory_saving import GradientSums
from data.tokenizer import Tokenizer, load_tokenizer

# ---- what each stage trains ----------------------------------------------------------------------

PROJECTOR = "model.mm_projector.", "model.image_newline"  # how names of its parameters begin


def param_groups(model: nn.Module, stage: str, lr: float, tower_lr: float) -> list[dict]:
    """Freeze what the stage does not train; return the rest as AdamW's groups, each with its peak learning rate."""
    groups = {rate: [] for rate in (lr, tower_lr)}
    for name, p in model.named_parameters():
        in_tower = "vision_model" in name
        p.requires_grad_((stage != "align" or name.startswith(PROJECTOR)) and (not in_tower or tower_lr > 0))
        if p.requires_grad:
            groups[tower_lr if in_tower else lr].append(p)
    return [{"params": params, "peak": rate} for rate, params in groups.items() if params]


# ---- the losses ----------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    """What one forward pass takes: forward's arguments, the samples' indices, and the targets among the arguments."""

    model_inputs: tuple
    sample_ids: list[int]
    targets: Tensor  # [B, T]


class NextTokenLoss:
    """What align and sft minimize: -log p of the targets, the tokens that have a label (see --labels)."""

    metrics = ("loss",)  # means over targets

    def count(self, batch: MicroBatch) -> Tensor:
        """Return how many targets the sums below are over."""
        return (batch.targets != chat.IGNORE).sum()

    def sums(self, batch: MicroBatch, nll_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the summed loss, with a gradient; the sums of the metrics)."""
        return nll_B.sum(), nll_B.detach().sum().double()


@dataclass(frozen=True)
class DPOLoss:
    """What dpo minimizes: -logsigmoid(margin) of each pair; rows are chosen, rejected, chosen, ... (Sec. 5.2).

    margin = beta * ((log p_chosen - log p_rejected) - the same of the reference); P counts pairs. Each rank of
    the ring `group` has its own tokens' share of a row's log-probability, while the loss is a function of the whole.
    So its derivative is computed from the whole, and multiplied with the share: the gradient comes out right.
    """

    reference_logps: Tensor  # [P, 2], of all pairs of the data set
    beta: float
    group: ring.World
    metrics = ("loss", "margin", "preferred", "accuracy", "chosen", "rejected")  # means over pairs; last two: rewards

    def count(self, batch: MicroBatch) -> Tensor:
        """Return how many pairs the sums below are over."""
        return torch.tensor(len(batch.sample_ids))

    def sums(self, batch: MicroBatch, nll_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (this rank's share of the summed loss, with a gradient; the sums of the metrics)."""
        if not batch.sample_ids:
            return nll_B.sum() * 0, self.reference_logps.new_zeros(len(self.metrics))
        logp_P2 = -ring.all_reduce_sum(nll_B, self.group).double().view(-1, 2)
        reward_P2 = self.beta * (logp_P2 - self.reference_logps[batch.sample_ids])
        margin_P = reward_P2[:, 0] - reward_P2[:, 1]
        # d(-logsigmoid(margin)) / d(nll): plus this for the chosen row, minus this for the rejected one
        grad_weight_P = self.beta * torch.sigmoid(-margin_P)
        grad_weight_B = torch.stack([grad_weight_P, -grad_weight_P], dim=1).flatten().to(nll_B.dtype)
        preferred_P = (logp_P2[:, 0] > logp_P2[:, 1]).double()  # by log p alone
        accurate_P = (margin_P > 0).double()  # by reward
        metrics = -F.logsigmoid(margin_P), margin_P, preferred_P, accurate_P, *reward_P2.T
        # `count` is summed over ranks, so it has each pair once for every rank of the ring; so must the loss
        return (grad_weight_B * nll_B).sum() * self.group.ranks, torch.stack([values_P.sum() for values_P in metrics])


# ---- the loop ------------------------------------------------------------------------------------


def learning_rate(peak: float, step: int, steps: int, warmup: float, linear: bool) -> float:
    """Return the rate: a linear rise over `warmup` of the steps (the release's from 0), then a cosine or a line."""
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    fraction = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (1 - fraction if linear else 0.5 * (1 + math.cos(math.pi * fraction)))


def train_step(
    model: nn.Module, batches: list[MicroBatch], loss: NextTokenLoss | DPOLoss, offload: bool, world: ring.World
) -> dict[str, float]:
    """Accumulate the gradient of one step, unless gradients are off; return the means of the metrics over all ranks."""
    count = sum(loss.count(batch) for batch in batches).to(world.device)
    metrics = torch.zeros(len(loss.metrics), dtype=torch.float64, device=world.device)
    gradients = GradientSums(model, offload)  # offloaded: adding in FSDP2 would stall backward at each layer
    for batch in batches:
        nll_B, _ = model(*batch.model_inputs)
        loss_sum, metric_sums = loss.sums(batch, nll_B)
        if torch.is_grad_enabled():
            ring.global_mean(loss_sum, count, world).backward()
            gradients.take()
        metrics += metric_sums
    gradients.put_back()
    means = ring.all_reduce_sum(metrics, world) / ring.all_reduce_sum(count, world)
    return dict(zip(loss.metrics, means.tolist()))


def train(cfg: "Config", world: ring.World) -> None:
    """Train one stage, save, export; continues where a killed run of the same settings stopped."""
    # 1. Processes: the ranks form rings; a ring shares a sample's tokens.
    rings = ring.split_groups(world, cfg.ring)
    check(cfg, rings.count)

    # 2. Model and data
    tokenizer = load_tokenizer(cfg.weights)
    model, groups = build_sharded_model(cfg, world)
    dataset = open_dataset(cfg, model.config, world)
    loader = make_loader(cfg, dataset, model.config, tokenizer, rings)

    # 3. Optimizer
    fused = (world.device.type == "cuda") or None  # one kernel, where foreach holds a third copy of all parameters
    optimizer = torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), 1e-8, weight_decay=0.0, fused=fused)

    # 4. Resume
    if world.rank == 0:
        runs.open_run(cfg.out, asdict(cfg) | dataset.usable, ("weights", "tower", "data"))
    first = ring.load_state(cfg.out / "state", model, optimizer, world)
    runs.resume_log(cfg.out, first, world.rank)
    sum_over_ranks = partial(ring.all_reduce_sum, world=world)
    skips = llava.SkipLog(cfg.out, world.rank, first, dataset, cfg.batch, cfg.max_skip_fraction, sum_over_ranks)

    # 5. Loss
    loss = NextTokenLoss()
    if cfg.stage == "dpo":
        loss = DPOLoss(reference_logps(cfg, first, model, loader, rings, world), cfg.beta, rings.ring)

    # 6. The loop
    bar = progress(range(first, cfg.steps), cfg.out.name, cfg.steps, initial=first)
    signals = runs.Signals(sum_over_ranks)
    started = time.perf_counter()
    for step, (batches, unreadable) in zip(signals.steps(bar), loader.batches(range(first, cfg.steps))):
        used = sum(len(batch.sample_ids) for batch in batches) if rings.ring.rank == 0 else 0  # once for each ring
        skipped, metrics = skips.add(step, unreadable, used), {}
        for params in optimizer.param_groups:
            params["lr"] = learning_rate(params["peak"], step, cfg.steps, cfg.warmup, cfg.stage == "dpo")
        if skipped < cfg.batch:  # else no sample of this step can be used, and the parameters stay
            metrics = train_step(model, batches, loss, cfg.offload, world)
            runs.sum_finite(step, [metrics["loss"]])  # raises, before the update, if the loss is not finite
            metrics["norm"] = ring.clip_gradients(model, cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        if world.rank == 0:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            line = {"step": step, **metrics, "lr": optimizer.param_groups[0]["lr"]}
            line |= {"samples_per_s": round(cfg.batch / seconds, 2), "skipped": skipped}
            runs.log_step(cfg.out, line, bar, world.device)
        if signals.came() or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            ring.save_state(cfg.out / "state", model, optimizer, step + 1, world)

    # 7. Export, in Hugging Face's layout, beside the tokenizer
    if cfg.tiny and cfg.expected:
        print_held_out_score(cfg, model, tokenizer, rings, world)
    stream = ring.gather_parameters(model, world)
    if world.rank == 0:
        weights.save(cfg.out / "model", stream, to_dict(model.config), cfg.weights)
        runs.print_end(cfg.out, runs.command_after_vision(cfg.stage, cfg.system, cfg.tiny))


# ---- the model -----------------------------------------------------------------------------------


def model_config(cfg: "Config") -> longva.LongVAConfig:
    """Return the sizes of the model to train. Raises ValueError for weights of another kind."""
    found = longva.read_config(cfg.weights)
    sees = isinstance(found, longva.LongVAConfig)
    if sees == (cfg.stage == "align"):
        kind = "sees already" if sees else "is a language model"
        start = {"align": "a language model", "sft": "what --stage align made", "dpo": "a model that sees"}[cfg.stage]
        raise ValueError(f"{cfg.weights} {kind}; --stage {cfg.stage} starts from {start}")
    check_trainable(found.lm if sees else found)
    if sees:
        return found
    vision = clip.ClipConfig.from_dict(weights.read_config(cfg.tower))
    return longva.LongVAConfig(found, vision, cfg.scheme, cfg.rule or DEFAULT_RULE[cfg.scheme])


def build_sharded_model(cfg: "Config", world: ring.World) -> tuple[longva.LongVA, list[dict]]:
    """Return the model and AdamW's parameter groups: shapes first, then shards, then weights."""
    with torch.device("meta"):
        model = longva.LongVA(model_config(cfg))
    param_groups(model, cfg.stage, cfg.lr, cfg.tower_lr)  # FSDP2 must know what is frozen
    model.model.checkpointing, model.tower.recompute = cfg.checkpointing, cfg.checkpointing == "full"
    units = [m for m in model.modules() if isinstance(m, (longva.Block, clip.Block))]
    ring.shard_parameters(model, units, world, cfg.offload, torch.bfloat16 if cfg.precision == "bf16" else None)
    stream = weights.read(cfg.weights)
    if cfg.stage == "align":
        new = ((name, x) for name, x in weights.init_weights(model, cfg.seed) if name.startswith(PROJECTOR))
        stream = chain(new, weights.read_tower(cfg.tower), stream)
    weights.fill_from(model, stream, ring.copy_shard)
    groups = param_groups(model, cfg.stage, cfg.lr, cfg.tower_lr)  # of the shards, which are new parameters
    trained = sum(p.numel() for group in groups for p in group["params"])
    total = sum(p.numel() for p in model.parameters())
    print0(f"{total:,} parameters, {trained:,} of them trained, on {world.ranks} rank(s), {world.device}")
    return model, groups


# ---- the data ------------------------------------------------------------------------------------


def open_dataset(cfg: "Config", config: longva.LongVAConfig, world: ring.World) -> llava.Dataset:
    """Return the samples that --data names. All ranks must call it: they divide the work of measuring records."""
    if cfg.data == "synthetic":
        growth_steps = cfg.resolution_curriculum * cfg.steps
        return llava.synthetic_dataset(cfg.stage, cfg.seed, cfg.batch, cfg.frames, cfg.grids, growth_steps)

    def picture_tokens(width: int, height: int) -> int:
        rows, cols = unires.choose_grids(width, height, config.vision.side, config.rule, cfg.grids)
        unpad = None if config.rule == "floor" else (width, height)
        return unires.Layout(rows, cols, config.scheme, unpad).tokens(config.vision.patches)

    measure = partial(llava.measure, cfg.stage, cfg.images, picture_tokens, cfg.frames * config.vision.tokens_per_grid)
    sum_over_ranks = partial(ring.all_reduce_sum, world=world)
    records = llava.open_records(cfg.data, measure, cfg.max_skip_fraction, world.rank, world.ranks, sum_over_ranks)
    return llava.json_dataset(records, cfg.images, cfg.frames, cfg.seed, cfg.batch)


def make_loader(
    cfg: "Config", dataset: llava.Dataset, config: longva.LongVAConfig, tokenizer: Tokenizer, rings: ring.RingGroup
) -> llava.Loader:
    """Return what turns samples into this rank's micro-batches."""
    template, clean = "plain" if cfg.stage == "align" else "qwen_1_5", cfg.labels == "clean"
    tokenize = partial(llava.tokenize_and_trim, tokenizer, template=template, clean=clean, max_len=cfg.max_len)

    def prepare(i: int, media: llava.Media, dialogues: list[llava.Turns]) -> llava.Example:
        """Cut pictures into grids and tokenize; ValueError if the sample cannot be used."""
        images = []
        for one in media:
            if isinstance(one, list):  # a video: its frames in a row
                images.append((unires.frames(one, config.vision.side), unires.Layout(1, len(one))))
            else:
                images.append(longva.preprocess(one, config, cfg.grids))
        lengths = [layout.tokens(config.vision.patches) for _, layout in images]
        return llava.Example(i, images, [tokenize(turns, lengths) for turns in dialogues])

    join = partial(collate, config=config, pad_id=tokenizer.pad_id, group=rings.ring)
    sum_over_ring = partial(ring.all_reduce_sum, world=rings.ring)
    return llava.Loader(dataset, prepare, join, cfg.micro_batch_size, sum_over_ring, rings.index, rings.count)


def collate(examples: list[llava.Example], config: longva.LongVAConfig, pad_id: int, group: ring.World) -> MicroBatch:
    """Join samples; keep this rank's share of each text, and the pictures whose tokens fall in it.

    Every picture's number of tokens is known beforehand, so that a picture's tokens may be split between ranks.
    """
    multiple = 2 * group.ranks if group.ranks > 1 else 1
    ids_BS, targets_BS, pictures, shown = llava.join_examples(examples, pad_id, multiple)
    grids = unires.UniqueGrids(pictures, shown, config.vision.patches, config.scheme)
    idx_T = ring.zigzag_index(ids_BS.shape[1], replace(group, device=torch.device("cpu")))
    is_image_BS = ids_BS == chat.IMAGE
    number_BS = is_image_BS.flatten().cumsum(0).view_as(ids_BS) - 1  # of each visual token in the batch
    is_image_BT = is_image_BS[:, idx_T]
    pixels_NCYX, layout, visual_index = grids.subset(number_BS[:, idx_T][is_image_BT], config.vision.side)
    positions = is_image_BT.flatten().nonzero()[:, 0]
    ids_BT, targets_BT, idx_T, pixels_NCYX, visual_index, positions = (
        unires.upload(x, group.device)
        for x in (ids_BS[:, idx_T], targets_BS[:, idx_T], idx_T, pixels_NCYX, visual_index, positions)
    )
    model_inputs = (ids_BT, idx_T, targets_BT, pixels_NCYX, layout, ring.zigzag_attend(group), visual_index, positions)
    return MicroBatch(model_inputs, [example.sample_id for example in examples], targets_BT)


# ---- before and after training -------------------------------------------------------------------


def print_held_out_score(
    cfg: "Config", model: longva.LongVA, tokenizer: Tokenizer, rings: ring.RingGroup, world: ring.World
) -> None:
    """Print the loss of HELD_OUT or more synthetic samples of another seed, and the share of targets that are argmax.

    For dpo: the loss with a reference that prefers nothing, and the share of pairs whose preferred answer is likelier.
    """
    dataset = llava.synthetic_dataset(cfg.stage, cfg.seed + 1, cfg.batch, cfg.frames, cfg.grids, 0)
    loader = make_loader(cfg, dataset, model.config, tokenizer, rings)
    starts = range(0, llava.HELD_OUT, cfg.batch)
    batches = [batch for i in starts for batch in loader.micro_batches([*range(i, i + cfg.batch)])[0]]
    with ring.no_grad_reshard(model):
        if cfg.stage == "dpo":
            no_reference_P2 = torch.zeros(len(starts) * cfg.batch, 2, dtype=torch.float64, device=world.device)
            metrics = train_step(model, batches, DPOLoss(no_reference_P2, cfg.beta, rings.ring), False, world)
            loss, score = metrics["loss"], metrics["preferred"]
        else:
            loss = train_step(model, batches, NextTokenLoss(), False, world)["loss"]
            counts = [torch.stack(model(*one.model_inputs, score=evaluate.count_correct)).sum(1) for one in batches]
            correct, targets = ring.all_reduce_sum(sum(counts).double(), world).tolist()
            score = correct / targets
    if world.rank == 0:
        runs.print_verdict(loss, score, cfg.expected)


def reference_logps(
    cfg: "Config", first: int, model: longva.LongVA, loader: llava.Loader, rings: ring.RingGroup, world: ring.World
) -> Tensor:
    """Return log p of each pair's chosen and rejected answer before training, float64[pairs, 2], computed once.

    It is kept in the run's folder, for a run that continues. 0 stands for a pair that could not be read, which is
    skipped from then on. Raises ValueError if a run that continues at step `first` > 0 has lost the file.
    """
    pairs = loader.dataset.size
    logp_P2 = llava.read_reference(cfg.out, first, pairs)
    if not all(ring.all_gather(torch.tensor(logp_P2 is not None), world)):  # a shared folder may lag for some ranks
        logp_P2 = torch.zeros(pairs, 2, dtype=torch.float64, device=world.device)
        with ring.no_grad_reshard(model):
            for start in progress(range(0, pairs, cfg.batch), "reference"):
                # Every ring makes as many passes, since collectives must match: the last batch repeats a pair.
                indices = [min(i, pairs - 1) for i in range(start, start + cfg.batch)]
                for micro_batch in loader.micro_batches(indices)[0]:
                    nll_B = ring.all_reduce_sum(model(*micro_batch.model_inputs)[0], rings.ring)
                    if micro_batch.sample_ids:
                        logp_P2[micro_batch.sample_ids] = -nll_B.double().view(-1, 2)
        logp_P2 = torch.stack(ring.all_gather(logp_P2, world)).amin(0)  # log p < 0; 0: another rank's pair
        if world.rank == 0:
            llava.write_reference(cfg.out, logp_P2)
    loader.dataset.unreadable.update((logp_P2 == 0).all(1).nonzero()[:, 0].tolist())
    return logp_P2.to(world.device)


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Teach a language model to see, on pictures only (Sec. 3.2). None means the stage's default, see STAGES."""

    stage: Literal["align", "sft", "both", "dpo"] = setting("align", "both: align, then sft (Sec. 3.2)", group="Run")
    out: Path | None = setting(None, "folder of this run, none: runs/SYSTEM-STAGE (ours)")
    seed: int = setting(42, "random seed of new weights and of the order of data (release: finetune.sh)")
    save_every: int = setting(500, "steps between saved states (ours)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to compute on (ours)")
    system: str = setting("longva", "name of the model in the making, for folders (ours)", hidden=True)
    tiny: bool = setting(False, "use the miniature's sizes and rates (ours)", hidden=True)
    weights: Path | None = setting(None, "model folder to start from (Sec. 3.2: Qwen2-7B-224K)", group="Model")
    tower: Path | None = setting(None, "folder of the vision tower, for align (Sec. 3.2: CLIP-ViT-L-336)")
    scheme: Literal["unires", "anyres", "anyres_pooled"] = setting("unires", "how a picture becomes tokens (Sec. 3.2)")
    rule: Literal["canvas", "floor", "anyres"] | None = setting(None, "how many grids (Sec. 3.2)", hidden=True)
    data: str = setting("synthetic", "LLaVA-style JSON or JSONL, or synthetic (Sec. 3.2: LLaVA-1.6's)", group="Data")
    images: Path | None = setting(None, "folder in which the paths of --data start (ours)")
    labels: Literal["released", "clean"] = setting("released", "which tokens are trained, see data/chat.py (release)")
    max_len: int = setting(32_768, "tokens; a longer sample loses questions from its end (release: finetune.sh)")
    grids: int = setting(49, "largest number of grids per picture (Sec. 3.2)")
    frames: int = setting(10, "frames of each video (release: train_dpo.py)")
    max_skip_fraction: float = setting(0.001, "stop when more samples are unreadable, 0 to 1 (ours)", hidden=True)
    resolution_curriculum: float = setting(0.0, "part of the steps in which pictures grow (ours)", hidden=True)
    batch: int | None = setting(None, "samples per step, over all ranks (release: 128, 32)", group="Optimization")
    micro_batch_size: int | None = setting(None, "samples per forward pass of a ring; none: all (release: 16, 4, 1)")
    steps: int | None = setting(None, "optimizer steps; none: an epoch of the release's data, dpo three (release)")
    lr: float | None = setting(None, "peak learning rate; then a cosine, for dpo a line, to zero (release)")
    beta: float = setting(0.1, "dpo: strength of the KL penalty that keeps the model near the reference (Sec. 5.2)")
    tower_lr: float | None = setting(None, "peak learning rate of the vision tower (release: finetune.sh)", hidden=True)
    warmup: float | None = setting(None, "part of the steps in which the rate rises (release: 0.03, 0.1)", hidden=True)
    beta2: float = setting(0.999, "AdamW's beta2; beta1 is 0.9 (release)", hidden=True)
    grad_clip: float = setting(1.0, "largest norm of the gradient (release: zero3.json)", hidden=True)
    expected: tuple[float, ...] | None = setting(None, "held-out loss and score to reach (ours)", hidden=True)
    ring: int = setting(1, "context-parallel size: ranks that share a sample's tokens (release: 1)", group="Hardware")
    precision: Literal["fp32", "bf16"] = setting("bf16", "of activations; parameters stay fp32 (Sec. 3.2)")
    checkpointing: Literal["none", "full"] = setting("full", "activations to recompute in backward (release)")
    offload: bool = setting(False, "keep parameters and optimizer in CPU memory (release: zero3.json)")

    def __post_init__(self):
        at_least(self, max_len=1, grids=1, frames=1, ring=1, batch=1, micro_batch_size=1, steps=1, save_every=1, seed=0)
        at_least(self, resolution_curriculum=0, lr=0, tower_lr=0, warmup=0, grad_clip=0, beta=0)
        check_range("max_skip_fraction", self.max_skip_fraction, 0, 1)


STAGES = {  # (release: pretrain.sh, finetune.sh, dpo.sh)
    "align": {"batch": 128, "micro_batch_size": 16, "steps": 4361, "lr": 1e-3, "tower_lr": 0.0, "warmup": 0.03},
    "sft": {"batch": 32, "micro_batch_size": 4, "steps": 24_353, "lr": 1e-5, "tower_lr": 2e-6, "warmup": 0.03},
    "dpo": {"batch": 128, "micro_batch_size": 1, "steps": 400, "lr": 5e-7, "tower_lr": 5e-7, "warmup": 0.1},
}
TINY_STAGES = {
    "align": {"batch": 32, "steps": 1000, "lr": 3e-3, "tower_lr": 0.0, "warmup": 0.03, "expected": (0.2, 0.95)},
    "sft": {"batch": 16, "steps": 1100, "lr": 7e-4, "tower_lr": 3e-4, "warmup": 0.03, "expected": (0.03, 0.99)},
    "dpo": {"batch": 16, "steps": 120, "lr": 1e-4, "tower_lr": 1e-4, "warmup": 0.1, "expected": (0.5, 0.9)},
}
TINY = {
    "tiny": True, "resolution_curriculum": 0.4, "rule": "floor", "labels": "clean", "max_len": 256,
    "beta2": 0.95, "precision": "fp32", "checkpointing": "none", "save_every": 50,
}  # fmt: skip
PRESETS = {  # the systems of the miniature Figure 4; a stage takes one to twelve minutes
    "tiny": {**TINY, "system": "tiny-longva"},
    "tiny-anyres": {**TINY, "system": "tiny-anyres", "scheme": "anyres", "grids": 9},
    "tiny-anyres-pooled": {**TINY, "system": "tiny-anyres-pooled", "scheme": "anyres_pooled", "grids": 36},
    "tiny-baseline": {**TINY, "system": "tiny-baseline"},
    "longva": {},  # 8 x 80 GB: 1.5 days on A100s for both stages (Sec. 3.2)
}
DEFAULT_RULE = {"unires": "canvas", "anyres": "anyres", "anyres_pooled": "anyres"}  # the release's


def resolve(cfg: Config) -> Config:
    """Fill in what was left to the stage: rates, sizes, and the folder that the stage before wrote."""
    rates = (TINY_STAGES if cfg.tiny else STAGES)[cfg.stage]
    if cfg.tiny and cfg.stage == "sft" and cfg.scheme == "anyres":
        rates = rates | {"expected": (0.1, 0.95)}  # learns more slowly
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    return replace(cfg, **{**rates, **runs.vision_folders(cfg.stage, cfg.system, cfg.tiny), **given})


def check(cfg: Config, num_rings: int) -> None:
    """Raise ValueError for settings that are missing or contradict each other, before anything is loaded."""
    if cfg.batch % num_rings:
        raise ValueError(f"{cfg.batch} samples cannot be shared evenly by {num_rings} ranks or rings; change --batch")
    for name in ("weights", "tower") if cfg.stage == "align" else ("weights",):
        folder = getattr(cfg, name)
        if folder is None or not folder.is_dir():
            before = {"sft": "; run --stage align first", "dpo": "; run --stage sft first"}.get(cfg.stage, "")
            raise ValueError(f"--stage {cfg.stage} needs a folder as --{name}, but {folder} is none{before}")
    if cfg.images and not cfg.images.is_dir():
        raise ValueError(f"--images {cfg.images} is no folder; name the one in which --data's paths start")
    if cfg.data == "synthetic" and not cfg.tiny:
        raise ValueError("the synthetic pictures are for the tiny model; give LLaVA-style JSON as --data")
    if cfg.stage != "align" and (cfg.scheme != "unires" or cfg.rule) and not cfg.tiny:
        raise ValueError(f"--scheme and --rule belong to --stage align; {cfg.stage} goes on as the model was taught")


def main(cfg: Config) -> None:
    """Train a stage, or align and then sft."""
    world = ring.start(cfg.device)
    stages = ("align", "sft") if cfg.stage == "both" else (cfg.stage,)
    if len(stages) > 1 and (not cfg.tiny or cfg.out or cfg.weights):
        raise ValueError("--stage both is for the miniature, in its own folders; at full size run align, then sft")
    for stage in stages:
        train(resolve(replace(cfg, stage=stage)), world)
        ring.all_reduce_sum(torch.zeros(1, device=world.device), world)  # rank 0 has written what the next one reads
    ring.stop()


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
