"""Vision alignment: teach an extended language model to see, on single short pictures (Sec. 3.2).

What      --stage align   the projector alone learns, from captions (LLaVA-1.5's first stage)
          --stage sft     tower, projector and language model learn, from conversations about pictures
          --stage both    align, then sft (the miniature)
          --stage dpo     the same learn to prefer one answer about a video to another (LongVA-DPO)
          --stage tower   not in the paper, which takes OpenAI's CLIP: makes the tiny one, picture against caption
Paper     Sec. 3.2 and App. C: LLaVA-1.6's data and recipe, UniRes; no video, no long sequence. Sec. 5.2: DPO, which is
          arXiv 2305.18290, on pairs of answers about videos.
Run       python train_vision.py --stage tower
          torchrun --nproc-per-node 2 train_vision.py --stage align     the tiny model; then --stage sft
          torchrun --nproc-per-node 2 train_vision.py --stage align --preset tiny-anyres
          torchrun --nproc-per-node 8 train_vision.py --stage sft --preset longva --weights ALIGNED --data LLAVA.json
Key       B samples, pairs of them for dpo   S tokens of the longest, T of them held by this rank   N grids
          I visual tokens held here   E CLIP width
Deviates  --labels clean trains what the assistant says alone, and one newline follows a picture, as when it is asked;
          released, the full-size default, also trains the frame of the user's turns, two newlines (data/chat.py).
          The loss is the mean over all targets of a step, not the mean of the ranks' means.
          align shows pictures as sft does; the release's crops them square and leaves 576 tokens unpooled.
          A sample that is too long loses questions from its end, and is skipped, counted and reported if that is not
          enough: the release cuts tokens off. A broken one is, too; the release takes the next in its place.
          dpo: what the reference thinks of a pair is computed once, not at every step.

Ranks share a step's samples, or with --ring a sample's tokens; parameters are sharded over all. Killed and run again it
goes on, on a CPU to the bit.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import clip
import longva
import ring
import unires
from data import chat, llava, runs, synthetic, text, tokenizer, video, weights
from data.flags import at_least, run, setting
from data.offload import GradientSums


@dataclass(frozen=True)
class Config:
    """Teach a language model to see, on pictures only (Sec. 3.2). What is None is the stage's own: see STAGES."""

    stage: Literal["tower", "align", "sft", "both", "dpo"] = setting(
        "align", "what is taught; both: align and sft of the miniature (Sec. 3.2)"
    )
    out: Path | None = setting(None, "folder of this run (ours: runs/SYSTEM-STAGE)")
    system: str = setting("longva", "name of the model in the making, for folders (ours)")
    weights: Path | None = setting(None, "align: the language model; then what came before (Sec. 3.2: Qwen2-7B-224K)")
    tower: Path | None = setting(None, "align: the vision tower (Sec. 3.2: CLIP-ViT-L-336)")
    scheme: Literal["unires", "anyres"] = setting("unires", "how a picture becomes tokens (Sec. 3.2)")
    rule: Literal["canvas", "floor", "anyres"] | None = setting(None, "how many grids a picture gets (Sec. 3.2)")
    data: str = setting("synthetic", "LLaVA-style JSON or JSONL, or synthetic (Sec. 3.2: LLaVA-1.6's)")
    images: Path | None = setting(None, "folder that the JSON's pictures and videos are in (ours)")
    labels: Literal["released", "clean"] = setting("released", "what of a conversation is trained, see above (release)")
    max_len: int = setting(32_768, "tokens; a longer sample is cut between questions (release: finetune.sh)")
    max_skip_fraction: float = setting(0.001, "share of samples that may be broken before the run stops (ours)")
    grids: int = setting(49, "most grids per picture (Sec. 3.2)")
    frames: int = setting(10, "of each video (release: train_dpo.py)")
    resolution_curriculum: float = setting(
        0.0, "share of sft's steps in which synthetic pictures grow from 3 grids to --grids (ours)"
    )
    tiny: bool = setting(False, "the small world's sizes and rates (ours)")
    ring: int = setting(1, "ranks that share a sample; the rest take others (release: 1)")
    batch: int | None = setting(None, "samples per step over all ranks (release: pretrain.sh, finetune.sh)")
    micro_batch_size: int | None = setting(None, "of these, read at once by each ring; none: all (release: 16, 4, 1)")
    steps: int | None = setting(None, "optimizer steps (release: one epoch, dpo three)")
    lr: float | None = setting(None, "peak learning rate; then a cosine, for dpo a line, down to zero (release)")
    tower_lr: float | None = setting(None, "the tower's (release: finetune.sh)")
    warmup: float | None = setting(
        None, "share of the steps in which the rate rises from zero (release: 0.03, dpo 0.1)"
    )
    beta: float = setting(0.1, "dpo: how much the model may leave the reference (Sec. 5.2)")
    grad_clip: float = setting(1.0, "largest norm of the gradient (release: zero3.json)")
    precision: Literal["fp32", "bf16"] = setting(
        "bf16", "of activations; parameters and their sums stay fp32 (Sec. 3.2)"
    )
    checkpointing: Literal["none", "full"] = setting(
        "full", "activations recomputed in backward (release: finetune.sh)"
    )
    offload: bool = setting(False, "parameters and optimizer in CPU memory (release: zero3.json)")
    save_every: int = setting(500, "steps between saved states (ours)")
    seed: int = setting(42, "of new weights and of the order of data (release: finetune.sh)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, max_len=1, grids=1, frames=1, ring=1, batch=1, micro_batch_size=1, steps=1, save_every=1, seed=0)
        at_least(self, resolution_curriculum=0, lr=0, tower_lr=0, warmup=0, grad_clip=0, max_skip_fraction=0, beta=0)
        if self.max_skip_fraction > 1:
            raise ValueError(
                f"--max-skip-fraction {self.max_skip_fraction:g} makes no sense; give a share of the samples, 0 to 1"
            )


STAGES = {  # (release: pretrain.sh, finetune.sh, dpo.sh)
    "tower": {},
    "align": {"batch": 128, "micro_batch_size": 16, "steps": 4361, "lr": 1e-3, "tower_lr": 0.0, "warmup": 0.03},
    "sft": {"batch": 32, "micro_batch_size": 4, "steps": 24_353, "lr": 1e-5, "tower_lr": 2e-6, "warmup": 0.03},
    "dpo": {"batch": 128, "micro_batch_size": 1, "steps": 400, "lr": 5e-7, "tower_lr": 5e-7, "warmup": 0.1},
}
TINY_STAGES = {
    "tower": {"batch": 128, "steps": 1200, "lr": 2e-3, "tower_lr": 2e-3, "warmup": 0.03},
    "align": {"batch": 32, "steps": 500, "lr": 3e-3, "tower_lr": 0.0, "warmup": 0.03},
    "sft": {"batch": 16, "steps": 1000, "lr": 7e-4, "tower_lr": 3e-4, "warmup": 0.03},
    "dpo": {"batch": 16, "steps": 60, "lr": 1e-4, "tower_lr": 1e-4, "warmup": 0.1},
}
PAIRS = 512  # of synthetic answers to choose from
RULE = {"unires": "canvas", "anyres": "anyres"}  # the release's
TINY = {
    "tiny": True,
    "resolution_curriculum": 0.7,
    "rule": "floor",
    "labels": "clean",
    "max_len": 256,
    "precision": "fp32",
    "checkpointing": "none",
    "save_every": 50,
}
PRESETS = {  # the three systems of the miniature Figure 4; one to four minutes a stage on two CPU cores
    "tiny": {**TINY, "system": "tiny-longva"},
    "tiny-anyres": {**TINY, "system": "tiny-anyres", "scheme": "anyres", "grids": 9},
    "tiny-baseline": {**TINY, "system": "tiny-baseline"},
    "longva": {},  # 8 x 80 GB: 1.5 days on A100s for both stages (Sec. 3.2)
}
LANGUAGE = {"tiny-longva": "extended", "tiny-anyres": "extended", "tiny-baseline": "control"}
TINY_CLIP = clip.ClipConfig(
    hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, patch_size=8,
    image_size=synthetic.SIDE,
)  # fmt: skip


def resolve(cfg: Config) -> Config:
    """Fill what was left to the stage: rates, sizes, and where the stage before left its work."""
    rates = (TINY_STAGES if cfg.tiny else STAGES)[cfg.stage]
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    folders = {"out": Path(f"runs/{cfg.system}-{cfg.stage}")}
    if cfg.tiny and cfg.stage == "tower":
        folders = {"out": Path("runs/tiny-tower")}
    elif cfg.tiny and cfg.stage == "align":
        language = LANGUAGE.get(cfg.system, "extended")
        folders |= {
            "weights": runs.trained_or_shipped(f"tiny-{language}", language),
            "tower": runs.trained_or_shipped("tiny-tower", "tower"),
        }
    elif cfg.stage == "sft":
        folders |= {"weights": Path(f"runs/{cfg.system}-align/model")}
    elif cfg.tiny and cfg.stage == "dpo":
        folders |= {"weights": runs.trained_or_shipped(f"{cfg.system}-sft", cfg.system.removeprefix("tiny-"))}
    elif cfg.stage == "dpo":
        folders |= {"weights": Path(f"runs/{cfg.system}-sft/model")}
    return replace(cfg, **{**rates, **folders, **given})


def check(cfg: Config, rings: int) -> None:
    """Raise ValueError for what is missing or contradicts itself, before anything is loaded."""
    if cfg.batch % rings:
        raise ValueError(f"{cfg.batch} samples cannot be shared evenly by {rings} ranks or rings; change --batch")
    if cfg.stage == "tower" and not cfg.tiny:
        raise ValueError("--stage tower makes the tiny tower only; at full size give OpenAI's CLIP as --tower")
    for name in {"tower": (), "align": ("weights", "tower")}.get(cfg.stage, ("weights",)):
        if getattr(cfg, name) is None:
            raise ValueError(f"--stage {cfg.stage} at full size starts from a folder; give it as --{name}")
        if not getattr(cfg, name).is_dir():
            before = {"sft": "run --stage align first, or ", "dpo": "run --stage sft first, or "}.get(cfg.stage, "")
            raise ValueError(f"--{name} {getattr(cfg, name)} is no folder; {before}name another")
    if cfg.stage == "tower" and cfg.data != "synthetic":
        raise ValueError("--stage tower learns from the miniature's own pictures; leave out --data")
    if cfg.images and not cfg.images.is_dir():
        raise ValueError(f"--images {cfg.images} is no folder; name the one in which --data's paths start")
    if cfg.data == "synthetic" and not cfg.tiny:
        raise ValueError("the synthetic pictures are for the tiny model; give LLaVA-style JSON as --data")
    if cfg.stage in ("sft", "dpo") and (cfg.scheme != "unires" or cfg.rule) and not cfg.tiny:
        raise ValueError(f"--scheme and --rule belong to --stage align; {cfg.stage} goes on as the model was taught")


def learning_rate(peak: float, cfg: Config, step: int) -> float:
    """Up from zero over `warmup` of the steps, then down to zero: a cosine, for dpo a line."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, cfg.steps - warm)
    return peak * (1 - done if cfg.stage == "dpo" else 0.5 * (1 + math.cos(math.pi * done)))


# ------------------------------------------------------------------------------------ what each stage learns


class Contrast(nn.Module):
    """A picture against its caption, as CLIP is trained; the caption is a bag of words."""

    def __init__(self, config: clip.ClipConfig, V: int, E: int = 64):
        super().__init__()
        self.vision_model = clip.ClipVision(config)
        self.visual_projection = nn.Linear(config.hidden_size, E, bias=False)
        self.word = nn.EmbeddingBag(V, E, mode="mean", padding_idx=0)
        self.log_scale = nn.Parameter(torch.zeros(1))  # one element: FSDP2 shards no scalars

    def forward(self, pixels_NCYX: Tensor, captions_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of telling the right caption for each picture, and the right picture for each caption."""
        picture_NE = F.normalize(self.visual_projection(self.vision_model.features(pixels_NCYX)), dim=-1)
        caption_NE = F.normalize(self.word(captions_NT), dim=-1)
        scores_NN = (self.log_scale.exp() * 10) * picture_NE @ caption_NE.T
        right_N = torch.arange(len(scores_NN), device=scores_NN.device)
        both = F.cross_entropy(scores_NN, right_N, reduction="none") + F.cross_entropy(
            scores_NN.T, right_N, reduction="none"
        )
        return both / 2, torch.ones_like(both)


def build(cfg: Config, words: tokenizer.Tokenizer) -> nn.Module:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        if cfg.stage == "tower":
            return Contrast(TINY_CLIP, words.size)
        found = longva.read_config(cfg.weights)
        if cfg.stage != "align":
            if isinstance(found, longva.LMConfig):
                made = "what --stage align made" if cfg.stage == "sft" else "a model that sees"
                raise ValueError(f"{cfg.weights} is a language model; --stage {cfg.stage} starts from {made}")
            return longva.LongVA(found)
        if isinstance(found, longva.LongVAConfig):
            raise ValueError(f"{cfg.weights} sees already; --stage align starts from a language model")
        eye = clip.ClipConfig.from_dict(weights.read_config(cfg.tower))
        return longva.LongVA(longva.LongVAConfig(found, eye, cfg.scheme, cfg.rule or RULE[cfg.scheme]))


def initial_weights(cfg: Config, model: nn.Module) -> None:
    """Weights: from the stage before, from the language model and the tower, or new."""
    if cfg.stage == "tower":
        weights.fill_from(model, weights.init_weights(model, cfg.seed), ring.copy_shard)
    elif cfg.stage != "align":
        weights.fill_from(model, weights.read(cfg.weights), ring.copy_shard)
    else:
        new = {name for name, _ in model.named_parameters() if "mm_projector" in name or "image_newline" in name}
        weights.fill_from(model, weights.init_weights(model, cfg.seed), ring.copy_shard, only=new.__contains__)
        weights.fill_from(
            model, weights.read_tower(cfg.tower), ring.copy_shard, only=lambda n: n.startswith(weights.TOWER)
        )
        weights.fill_from(
            model, weights.read(cfg.weights), ring.copy_shard, only=lambda n: n not in new and "vision_tower" not in n
        )


def trained(cfg: Config, model: nn.Module) -> list[dict]:
    """Freeze what this stage does not train; the rest in groups, each with its peak rate."""
    groups = {rate: [] for rate in (cfg.lr, cfg.tower_lr)}
    for name, p in model.named_parameters():
        tower = "vision_model" in name
        learns = cfg.stage != "align" or "mm_projector" in name or "image_newline" in name
        p.requires_grad_(learns and (not tower or cfg.tower_lr > 0))
        if p.requires_grad:
            groups[cfg.tower_lr if tower else cfg.lr].append(p)
    return [{"params": params, "peak": rate} for rate, params in groups.items() if params]


def assemble(cfg: Config, words: tokenizer.Tokenizer, world: ring.World) -> tuple[nn.Module, list[dict]]:
    """The model, shapes first, then shards, then weights, and its parameters in groups, each with its peak rate."""
    model = build(cfg, words)
    trained(cfg, model)  # FSDP2 must know what is frozen; the optimizer is told below of what it made
    units = [m for m in model.modules() if isinstance(m, (longva.Block, clip.Block))]
    if cfg.stage != "tower":
        model.model.checkpointing, model.tower.recompute = cfg.checkpointing, cfg.checkpointing == "full"
    ring.shard_parameters(model, units, world, cfg.offload, torch.bfloat16 if cfg.precision == "bf16" else None)
    initial_weights(cfg, model)
    groups = trained(cfg, model)
    learning = sum(p.numel() for g in groups for p in g["params"])
    whole = sum(p.numel() for p in model.parameters())
    ring.print0(world, f"{whole:,} parameters, {learning:,} of them learn, on {world.ranks} rank(s), {world.device}")
    return model, groups


# ------------------------------------------------------------------------------------------------- its data


@dataclass(frozen=True)
class Source:
    """Where samples come from: how many there are (None: no end), the numbers of a step's, the sample of a number."""

    size: int | None
    pick: Callable[[int], list[int]]
    sample: Callable[[int], tuple[llava.Shown, list[llava.Turns]]]
    name: Callable[[int], dict] = lambda i: {"sample": i}  # how a number is reported
    bad: list[dict] = field(default_factory=list)  # records that this rank found unusable
    lost: set[int] = field(default_factory=set)  # pairs that `reference` could not read: to be left out for good


def open_source(cfg: Config, config: longva.LongVAConfig, world: ring.World) -> Source:
    """The samples that --data names."""
    if cfg.data == "synthetic":
        return synthetic_source(cfg)
    words_per_token = 0.75  # of English: lengths need only be like each other
    video_tokens = cfg.frames * config.vision.tokens_per_grid

    def measure(record: dict) -> int:
        """About how many tokens its sample has; ValueError if this stage cannot use it."""
        _, dialogues = llava.understand(record)
        if (len(dialogues) == 2) != (cfg.stage == "dpo"):
            kind = "a pair of answers; use --stage dpo" if len(dialogues) == 2 else "no 'chosen' and 'rejected' answer"
            raise ValueError(f"has {kind}")
        if cfg.stage == "align" and [role for role, _ in dialogues[0]] != ["user", "assistant"]:
            raise ValueError(f"has {len(dialogues[0])} turns, but --stage align takes a question and a caption")
        spoken = max(sum(len(said.split()) for _, said in turns) for turns in dialogues)
        sizes = llava.sizes(record, cfg.images)
        seen = [measure_picture(cfg, config, size) if size else video_tokens for size in sizes]
        return round(spoken / words_per_token) + sum(seen) + 1

    def summed(tokens: np.ndarray) -> np.ndarray:
        """Over the ranks, each of which measured its share of the records."""
        return ring.all_reduce_sum(torch.from_numpy(tokens).to(world.device), world).cpu().numpy()

    records = llava.open_records(cfg.data, measure, cfg.max_skip_fraction, (world.rank, world.ranks), summed)
    if lost := records.count - len(records):
        ring.print0(world, f"{lost:,} of {records.count:,} records are bad: {cfg.out / 'unusable-*.jsonl'} says why")
    return Source(
        len(records),
        lambda step: llava.pick(records.tokens, cfg.seed, step, cfg.batch),
        lambda i: llava.sample(records[i], cfg.images, cfg.frames),
        lambda i: {"record": records.numbers[i].item(), "id": records[i].get("id")},
        [{"record": i, "id": called, "why": why} for i, called, why in records.bad],
    )


def synthetic_source(cfg: Config) -> Source:
    """Samples made from the seed: captions, conversations about pictures that grow, or pairs of answers about films."""

    def converse(i: int) -> tuple[llava.Shown, list[llava.Turns]]:
        grown = min(1.0, i // cfg.batch / (cfg.resolution_curriculum * cfg.steps)) if cfg.resolution_curriculum else 1.0
        most = round(min(3, cfg.grids) * (cfg.grids / min(3, cfg.grids)) ** grown)
        pictures, turns = synthetic.conversation(cfg.seed, i, most)
        return pictures, [turns]

    def caption(i: int) -> tuple[llava.Shown, list[llava.Turns]]:
        pictures, turns = synthetic.captioned(cfg.seed, i)
        return pictures, [turns]

    def pair(i: int) -> tuple[llava.Shown, list[llava.Turns]]:
        return synthetic.preference(cfg.seed, i, cfg.frames)

    if cfg.stage == "dpo":
        return Source(PAIRS, lambda step: text.shuffled(PAIRS, cfg.seed, step * cfg.batch, cfg.batch), pair)
    made = caption if cfg.stage == "align" else converse
    return Source(None, lambda step: [*range(step * cfg.batch, (step + 1) * cfg.batch)], made)


def measure_picture(cfg: Config, config: longva.LongVAConfig, size: tuple[int, int]) -> int:
    """Visual tokens of a picture of so many pixels; ValueError if it cannot be shown."""
    rows, cols = unires.choose_grids(*size, config.vision.side, config.rule, cfg.grids)
    unpad = None if config.rule == "floor" else size
    return unires.Layout(rows, cols, config.scheme, unpad).tokens(config.vision.patches)


class Example(NamedTuple):
    """A sample as tokens: what is shown, as (pixels_NCYX, layout); ids and labels of its text, or of a pair's."""

    number: int
    shown: list[tuple[Tensor, unires.Layout]]
    texts: list[tuple[list[int], list[int]]]


def prepare(cfg: Config, config: longva.LongVAConfig, words: tokenizer.Tokenizer, source: Source, i: int) -> Example:
    """Sample number i, read, cut into grids, and written out with room for them; ValueError if it cannot be used."""
    if i in source.lost:
        raise ValueError("could not be read when the reference was asked, so that there is nothing to compare with")
    media, dialogues = source.sample(i)
    shown = [present(cfg, config, one) for one in media]
    lengths = [how.tokens(config.vision.patches) for _, how in shown]
    texts = [write(cfg, words, turns, lengths) for turns in dialogues]
    return Example(i, shown, texts)


def present(cfg: Config, config: longva.LongVAConfig, one: Image | list[Image]) -> tuple[Tensor, unires.Layout]:
    """A picture, or a video's frames in a row, as (pixels_NCYX, layout)."""
    if isinstance(one, list):
        return unires.frames(one, config.vision.side), unires.Layout(1, len(one))
    return longva.preprocess(one, config, cfg.grids)


def write(cfg: Config, words: tokenizer.Tokenizer, turns: llava.Turns, lengths: list[int]) -> tuple[list, list]:
    """(ids, labels); questions are left out from the end until it fits, never a part of a picture or of a turn."""
    template, clean = "plain" if cfg.stage == "align" else "qwen_1_5", cfg.labels == "clean"
    while len((example := chat.example(words, turns, lengths, template, clean))[0]) > cfg.max_len:
        last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=0)
        if chat.PLACEHOLDER in turns[last][1] or "assistant" not in [role for role, _ in turns[1:last]]:
            raise ValueError(
                f"with {sum(lengths)} visual tokens does not fit --max-len {cfg.max_len}; raise it or lower --grids"
            )
        turns = turns[:last]
    return example


class Part(NamedTuple):
    """What a rank's model is asked at once, and of which samples; `padding`: share of all ids that is none."""

    arguments: tuple
    numbers: list[int]
    targets: Tensor
    padding: float


def collate(
    examples: list[Example], config: longva.LongVAConfig, words: tokenizer.Tokenizer, circle: ring.World
) -> Part:
    """Join samples, and take of every text and of what is shown in it the share of this rank of the ring.

    The length of each placeholder is known by now, so that visual tokens are put in their places at once, wherever a
    shard begins. Both answers of a pair share its pictures.
    """
    texts = [text for example in examples for text in example.texts] or [([words.pad_id], [chat.IGNORE])]
    ids_BS, targets_BS = chat.pad(texts, words.pad_id, 2 * circle.ranks if circle.ranks > 1 else 1)
    pictures, shown = [], []  # all pictures; for each placeholder, the index of its picture
    for example in examples:
        first = len(pictures)
        pictures += example.shown
        shown += [*range(first, len(pictures))] * len(example.texts)
    unique = unires.UniqueGrids(pictures, shown, config.vision.patches, config.scheme)
    idx_T = ring.zigzag_index(ids_BS.shape[1], replace(circle, device=torch.device("cpu")))
    image_BS = ids_BS == chat.IMAGE
    nth_BS = image_BS.flatten().cumsum(0).view_as(ids_BS) - 1  # number of each visual token in the batch
    image_BT = image_BS[:, idx_T]
    pixels_NCYX, layout, row_I = unique.subset(nth_BS[:, idx_T][image_BT], config.vision.side)
    place_I = image_BT.flatten().nonzero()[:, 0]
    ids_BT, targets_BT, idx_T, pixels_NCYX, row_I, place_I = (
        unires.upload(x, circle.device)
        for x in (ids_BS[:, idx_T], targets_BS[:, idx_T], idx_T, pixels_NCYX, row_I, place_I)
    )
    padding = 1 - sum(len(ids) for ids, _ in texts) / ids_BS.numel()
    arguments = (ids_BT, idx_T, targets_BT, pixels_NCYX, layout, ring.zigzag_attend(circle), row_I, place_I)
    return Part(arguments, [example.number for example in examples], targets_BT, padding)


def load(
    cfg: Config, config: longva.LongVAConfig, words: tokenizer.Tokenizer, source: Source, numbers: list[int]
) -> list[Example | dict]:
    """Samples by their numbers, and in place of those that cannot be used, why; a thread may do it ahead."""
    found = []
    for i in numbers:
        try:
            found.append(prepare(cfg, config, words, source, i))
        except (ValueError, OSError) as e:
            found.append({**source.name(i), "why": str(e)})
    return found


def join(
    cfg: Config,
    config: longva.LongVAConfig,
    words: tokenizer.Tokenizer,
    circle: ring.World,
    loaded: list[Example | dict],
) -> tuple[list[Part], list[dict]]:
    """(parts of some samples, faults of those left out). A ring leaves out what one of its ranks lacks."""
    bad = [isinstance(one, dict) for one in loaded]
    lost = ring.all_reduce_sum(torch.tensor(bad).int().to(circle.device), circle).tolist()
    kept, size = [one for one, gone in zip(loaded, lost) if not gone], cfg.micro_batch_size or len(loaded)
    groups = [kept[start : start + size] for start in range(0, len(loaded), size)]  # as many on every ring
    faults = {json.dumps(one): one for one in loaded if isinstance(one, dict)}  # a record may come twice in a step
    return [collate(group, config, words, circle) for group in groups], [*faults.values()]


def make_parts(cfg: Config, model: nn.Module, words: tokenizer.Tokenizer, source: Source, circle: ring.World):  # noqa: ANN201
    """A function from some samples' numbers to (their parts, the faults of those that had to be left out)."""
    return lambda numbers: join(cfg, model.config, words, circle, load(cfg, model.config, words, source, numbers))


def make_batches(cfg: Config, model: nn.Module, words: tokenizer.Tokenizer, world: ring.World, circles: tuple):  # noqa: ANN201
    """(a function from some steps to each one's parts and faults, of this rank, the source and `make_parts`' function).

    Samples are read and cut into grids one step ahead of the model.
    """
    circle, number, many = circles
    if cfg.stage == "tower":  # every rank compares every picture with every caption: the stage is small

        def captioned(step: int) -> tuple[list[Part], list[dict]]:
            pictures, captions = synthetic.captioned_grids(cfg.seed, step, cfg.batch)
            rows = [words.encode(caption) for caption in captions]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True).to(world.device)
            pixels_NCYX = unires.normalise(unires.frames(pictures, synthetic.SIDE, "pad").to(world.device))
            return [Part((pixels_NCYX, ids), [], torch.zeros(len(rows)), 0.0)], []

        return lambda steps: video.prefetch(map(captioned, steps), 1), None
    source = open_source(cfg, model.config, world)

    def batches(steps: range) -> Iterator[tuple[list[Part], list[dict]]]:
        ours = (source.pick(step)[number::many] for step in steps)
        for loaded in video.prefetch((load(cfg, model.config, words, source, numbers) for numbers in ours), 1):
            yield join(cfg, model.config, words, circle, loaded)

    return batches, (source, make_parts(cfg, model, words, source, circle))


# --------------------------------------------------------------------------------------------------- preference


def reference(cfg: Config, model: longva.LongVA, world: ring.World, circles: tuple, data: tuple, first: int) -> Tensor:
    """Log-probability of the chosen and the rejected answer to each pair before anything is learned, float64[pairs, 2].

    Computed once and kept in reference.safetensors; 0 for a pair that could not be read, which is left out from then
    on, though it may be read again. Raises ValueError if a run that goes on has lost it.
    """
    file = cfg.out / "reference.safetensors"
    known = ring.all_gather(torch.tensor(file.exists()), world)[0]  # as rank 0 sees it: a shared folder may lag
    if not known:
        if first:
            raise ValueError(f"{file} is gone, and a model that has learned cannot make it again; remove {cfg.out}")
        logp_N2 = ask_reference(cfg, model, world, circles, data)
        if world.rank == 0:
            draft = file.with_suffix(".tmp")
            save_file({"logp": logp_N2.cpu()}, draft)
            draft.rename(file)
    else:
        logp_N2 = load_file(file)["logp"].to(world.device)
    data[0].lost.update((logp_N2 == 0).all(1).nonzero()[:, 0].tolist())
    return logp_N2


def ask_reference(cfg: Config, model: longva.LongVA, world: ring.World, circles: tuple, data: tuple) -> Tensor:
    """Compute what `reference` keeps: every pair once, dealt out to the rings."""
    (circle, number, many), (source, parts) = circles, data
    logp_N2 = torch.zeros(source.size, 2, dtype=torch.float64, device=world.device)
    size = cfg.batch // many
    bar = tqdm(range(0, source.size, size * many), "reference", disable=world.rank > 0)
    with ring.no_grad_reshard(model):
        for start in bar:
            numbers = [*range(start + number, min(start + size * many, source.size), many)]
            numbers += [source.size - 1] * (size - len(numbers))  # every ring asks equally often
            for part in parts(numbers)[0]:
                nll_B = ring.all_reduce_sum(model(*part.arguments)[0], circle)
                if part.numbers:
                    logp_N2[part.numbers] = -nll_B.double().view(-1, 2)
    # all ranks of a ring know a pair, and the last one may have been asked more than once
    times = ring.all_reduce_sum((logp_N2 != 0).double(), world).clamp(min=1)
    return ring.all_reduce_sum(logp_N2, world) / times


def prefer(part: Part, nll_B: Tensor, before_N2: Tensor, beta: float, circle: ring.World) -> tuple[Tensor, Tensor]:
    """(a sum whose gradient is that of the pairs' summed DPO loss, sums of PREFERENCE); rows are pairs, chosen first.

    Each rank of a ring has its tokens' share of a row's log-probability. The loss is of the whole, so its derivative by
    each row is computed from the whole, and multiplied with the share.
    """
    if not part.numbers:
        return nll_B.sum() * 0, before_N2.new_zeros(len(PREFERENCE))
    logp_P2 = -ring.all_reduce_sum(nll_B, circle).double().view(-1, 2)
    reward_P2 = beta * (logp_P2 - before_N2[part.numbers])
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    slope_P = beta * torch.sigmoid(-margin_P)  # of the loss by the chosen row's nll; minus it, by the rejected one's
    slope_B = torch.stack([slope_P, -slope_P], dim=1).flatten().to(nll_B.dtype)
    preferred_P, accurate_P = (logp_P2[:, 0] > logp_P2[:, 1]).double(), (margin_P > 0).double()
    told = -F.logsigmoid(margin_P), margin_P, preferred_P, accurate_P, *reward_P2.T
    return (slope_B * nll_B).sum(), torch.stack([values_P.sum() for values_P in told])


# ----------------------------------------------------------------------------------------------------- main

SKIPPED = "skipped-{}.jsonl"  # of each rank, in the run's folder
SHOWN = ("loss", "margin", "preferred", "norm", "samples_per_s", "gb")  # in the bar, of a line of the log
PREFERENCE = ("loss", "margin", "preferred", "accuracy", "chosen", "rejected")  # per pair: see `prefer`


def learn(
    cfg: Config, model: nn.Module, parts: list[Part], before: Tensor | None, world: ring.World, circle: ring.World
) -> dict:
    """The gradient of a step, and what is to be logged of it: means over all its targets, or pairs."""
    if before is None:
        names, count = ("loss",), sum((part.targets != chat.IGNORE).sum() for part in parts).to(world.device)
    else:  # each rank of a ring counts the ring's pairs
        names, count = PREFERENCE, torch.tensor(sum(len(part.numbers) for part in parts), device=world.device)
    sums = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    gradients = GradientSums(model)  # of the parts so far, where parameters are offloaded
    for part in parts:
        nll_B, _ = model(*part.arguments)
        if before is None:
            summed, told = nll_B.sum(), nll_B.detach().sum().double()
        else:
            summed, told = prefer(part, nll_B, before, cfg.beta, circle)
            summed = summed * circle.ranks
        ring.global_mean(summed, count, world).backward()
        if cfg.offload:
            gradients.take()
        sums += told
    gradients.put_back()
    means = ring.all_reduce_sum(sums, world) / ring.all_reduce_sum(count, world)
    return dict(zip(names, means.tolist()))


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


def train(cfg: Config, world: ring.World) -> None:
    """Train one stage, save, export; resumes where a killed run of the same settings stopped."""
    # 1 processes
    circles = circle, _, many = ring.split_groups(world, cfg.ring)
    check(cfg, many)

    # 2 model
    words = tokenizer.load_tokenizer(synthetic.TOKENIZER if cfg.stage == "tower" else cfg.weights)
    model, groups = assemble(cfg, words, world)

    # 3 data
    batches, data = make_batches(cfg, model, words, world, circles)

    # 4 optimizer
    fused = (world.device.type == "cuda") or None  # one kernel, where foreach holds a third copy of all parameters
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=fused)

    # 5 resume
    if world.rank == 0:
        runs.open_run(cfg.out, asdict(cfg))
    first = ring.load_state(cfg.out / "state", model, optimizer, world)
    if world.rank == 0:
        runs.truncate_log(cfg.out, first)
    runs.truncate_log(cfg.out, first, SKIPPED.format(world.rank))
    if data and data[0].bad:
        runs.replace_text(cfg.out / f"unusable-{world.rank}.jsonl", "\n".join(map(json.dumps, data[0].bad)) + "\n")
    before = reference(cfg, model, world, circles, data, first) if cfg.stage == "dpo" else None
    skipped = ring.all_reduce_sum(
        torch.tensor(sum(runs.column(cfg.out, "skipped")) if world.rank == 0 else 0), world
    ).item()

    # 6 the loop
    bar = tqdm(range(first, cfg.steps), cfg.out.name, cfg.steps, initial=first, disable=world.rank > 0)
    began = time.perf_counter()
    for step, (parts, left_out) in zip(bar, batches(range(first, cfg.steps))):
        for fault in left_out:
            runs.log(cfg.out, {"step": step, **fault}, SKIPPED.format(world.rank))
        lost, padding = census(cfg, parts, world, circles)
        skipped += lost
        refuse_many(cfg, skipped, max((step + 1) * cfg.batch, data[0].size or 0) if data else 0)
        told = learn(cfg, model, parts, before, world, circle)
        runs.finite(step, [told["loss"]])
        norm = ring.clip_gradients(model, cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak"], cfg, step)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0:
            seconds, began = time.perf_counter() - began, time.perf_counter()
            line = {"step": step, **told, "norm": norm, "lr": learning_rate(cfg.lr, cfg, step)}
            line |= {"samples_per_s": round(cfg.batch / seconds, 2), "padding": round(padding, 4), "skipped": lost}
            line |= {"gb": round(runs.peak_bytes(world.device) / 1e9, 3)}
            runs.log(cfg.out, line)
            bar.set_postfix({name: f"{line[name]:.4g}" for name in SHOWN if name in line})
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            ring.save_state(cfg.out / "state", model, optimizer, step + 1, world)

    # 7 export
    export(cfg, model, world)


def census(cfg: Config, parts: list[Part], world: ring.World, circles: tuple) -> tuple[int, float]:
    """(samples of a step that were left out, share of its ids that is padding), over all ranks."""
    circle, _, many = circles
    here = cfg.batch // many - sum(len(part.numbers) for part in parts) if cfg.stage != "tower" else 0
    padding = sum(part.padding for part in parts) / len(parts)
    both = ring.all_reduce_sum(torch.tensor([here, padding], dtype=torch.float64, device=world.device), world).tolist()
    return round(both[0] / circle.ranks), both[1] / world.ranks


def refuse_many(cfg: Config, skipped: int, seen: int) -> None:
    """Raise ValueError, on all ranks alike, where more samples were broken than --max-skip-fraction allows."""
    if skipped > cfg.max_skip_fraction * seen:
        raise ValueError(
            f"{skipped:,} samples of {seen:,} could not be read, more than --max-skip-fraction "
            f"{cfg.max_skip_fraction:g} allows; "
            f"{cfg.out / SKIPPED.format('*')} says which and why: mend them, or allow more"
        )


def export(cfg: Config, model: nn.Module, world: ring.World) -> None:
    """Write the model as Hugging Face lays it out, beside its tokenizer, and say what comes next."""
    stream, folder = ring.gather_parameters(model, world), cfg.out / "model"
    if world.rank > 0:
        return
    preset = "" if cfg.system == "tiny-longva" else f" --preset {cfg.system}"
    follow = f"torchrun --nproc-per-node 2 train_vision.py --stage sft{preset}"
    if cfg.out != Path(f"runs/{cfg.system}-{cfg.stage}"):
        follow += f" --weights {folder}"
    if not cfg.tiny:
        follow = "torchrun --nproc-per-node 8 train_vision.py --stage sft --preset longva"
        follow += f" --weights {folder} --data LLAVA.json --images IMAGES"
    if cfg.stage == "tower":
        eye = ((name, tensor) for name, tensor in stream if name.startswith("vision_model."))
        weights.write(folder, eye, {"model_type": "clip_vision_model", **asdict(TINY_CLIP)}, dtype=torch.bfloat16)
        follow = "torchrun --nproc-per-node 2 train_vision.py --stage align"
    else:
        longva.save(folder, stream, model.config, cfg.weights)
    if cfg.stage == "dpo":
        follow = f'python longva.py "What happens in the film?" --video FILM.mp4 --weights {folder}'
    if cfg.stage == "sft":
        padding = runs.column(cfg.out, "padding")
        print(f"padding: {sum(padding) / len(padding):.1%} of all ids")
        other = {"tiny-longva": "tiny-baseline", "tiny-baseline": "tiny-anyres"}.get(cfg.system)
        follow = f"torchrun --nproc-per-node 2 train_vision.py --stage align --preset {other}"
        if not other:
            follow = "python vniah.py --own" if cfg.tiny else f"python vniah.py --weights {folder} --haystack FILM.mp4"
    if cfg.stage == "sft" and cfg.tiny and cfg.data != "synthetic":
        follow = f'python longva.py "QUESTION" --image PICTURE --weights {folder}'
    print(f"model: {folder}   log: {cfg.out / 'log.jsonl'}   loss curve: {runs.draw_curve(cfg.out)}")
    print(f"next:  {follow}")


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
