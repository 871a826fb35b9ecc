"""Vision alignment: teach an extended language model to see, on single short pictures (Sec. 3.2).

What      --stage align   the projector alone learns, from captions (LLaVA-1.5's first stage)
          --stage sft     tower, projector and language model learn, from conversations about pictures
          --stage tower   not in the paper, which takes OpenAI's CLIP: makes the tiny one, picture against caption
Paper     Sec. 3.2 and App. C: LLaVA-1.6's data and recipe, UniRes; no video, no long sequence.
Run       python train_vision.py --stage tower
          torchrun --nproc-per-node 2 train_vision.py --stage align     the tiny model; then --stage sft
          torchrun --nproc-per-node 2 train_vision.py --stage align --preset tiny-anyres
          torchrun --nproc-per-node 8 train_vision.py --stage sft --preset longva --weights ALIGNED --data LLAVA.json
Key       B samples   T tokens of the longest sample   N grids   E CLIP width
Deviates  Only what the assistant says is trained, and one newline follows a picture, as when it is asked; the
          release also trains the frame of the user's turns, and uses two newlines in training (data/chat.py).
          The loss is the mean over all targets of a step, not the mean of the ranks' means.
          align shows pictures as sft does; the release's crops them square and leaves 576 tokens unpooled.
          Samples come in random order, not grouped by length; one that is too long loses questions from its end,
          and stops the run if that is not enough: the release cuts tokens off. DPO is not here yet.

Ranks share a step's samples; parameters are sharded over them. Killed and run again it goes on, on a CPU to the bit.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clip
import longva
import ring
import unires
from data import chat, llava, parameters, runs, state, synthetic, tokenizer, weights
from data.flags import at_least, knob, run


@dataclass(frozen=True)
class Config:
    """Teach a language model to see, on pictures only (Sec. 3.2). What is None is the stage's own: see STAGES."""

    stage: Literal["tower", "align", "sft"] = knob("align", "what learns: CLIP, the projector, or all (Sec. 3.2)")
    out: Path | None = knob(None, "folder of this run (ours: runs/SYSTEM-STAGE)")
    system: str = knob("longva", "name of the model in the making, for folders (ours)")
    weights: Path | None = knob(None, "align: the language model; sft: what align made (Sec. 3.2: Qwen2-7B-224K)")
    tower: Path | None = knob(None, "align: the vision tower (Sec. 3.2: CLIP-ViT-L-336)")
    scheme: Literal["unires", "anyres"] = knob("unires", "how a picture becomes tokens (Sec. 3.2)")
    rule: Literal["canvas", "floor", "anyres"] | None = knob(None, "how many grids a picture gets (Sec. 3.2)")
    data: str = knob("synthetic", "LLaVA-style JSON, or synthetic (Sec. 3.2: LLaVA-1.6's)")
    images: Path | None = knob(None, "folder that the JSON's picture paths start from (ours)")
    max_len: int = knob(32_768, "tokens; a longer sample is refused (release: finetune.sh)")
    grids: int = knob(49, "most grids per picture (Sec. 3.2)")
    grow: float = knob(0.0, "share of sft's steps in which synthetic pictures grow from 3 grids to --grids (ours)")
    tiny: bool = knob(False, "the small world's sizes and rates (ours)")
    batch: int | None = knob(None, "samples per step over all ranks (release: pretrain.sh, finetune.sh)")
    steps: int | None = knob(None, "optimizer steps (release: one epoch)")
    lr: float | None = knob(None, "peak learning rate; then a cosine down to zero (release: pretrain.sh, finetune.sh)")
    tower_lr: float | None = knob(None, "the tower's (release: finetune.sh)")
    warmup: float = knob(0.03, "share of the steps in which the rate rises from zero (release: finetune.sh)")
    max_norm: float = knob(1.0, "largest norm of the gradient (release: zero3.json)")
    precision: Literal["fp32", "bf16"] = knob("bf16", "of activations; parameters and their sums stay fp32 (Sec. 3.2)")
    remat: bool = knob(True, "keep one hidden state per layer, compute the rest again (release: finetune.sh)")
    offload: bool = knob(False, "parameters and optimizer in CPU memory (release: zero3.json)")
    save_every: int = knob(500, "steps between saved states (ours)")
    async_save: bool = knob(False, "train on while a state is written, from a copy in CPU memory (ours)")
    seed: int = knob(42, "of new weights and of the order of data (release: finetune.sh)")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, max_len=1, grids=1, batch=1, steps=1, save_every=1, seed=0)
        at_least(self, grow=0, lr=0, tower_lr=0, warmup=0, max_norm=0)


STAGES = {  # (release: pretrain.sh, finetune.sh)
    "tower": {},
    "align": {"batch": 128, "steps": 4361, "lr": 1e-3, "tower_lr": 0.0},
    "sft": {"batch": 32, "steps": 24_353, "lr": 1e-5, "tower_lr": 2e-6},
}
TINY_STAGES = {
    "tower": {"batch": 128, "steps": 1200, "lr": 2e-3, "tower_lr": 2e-3},
    "align": {"batch": 32, "steps": 500, "lr": 3e-3, "tower_lr": 0.0},
    "sft": {"batch": 16, "steps": 1000, "lr": 7e-4, "tower_lr": 3e-4},
}
RULE = {"unires": "canvas", "anyres": "anyres"}  # the release's
TINY = {
    "tiny": True,
    "grow": 0.7,
    "rule": "floor",
    "max_len": 256,
    "precision": "fp32",
    "remat": False,
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


def settle(cfg: Config) -> Config:
    """Fill what was left to the stage: rates, sizes, and where the stage before left its work."""
    rates = (TINY_STAGES if cfg.tiny else STAGES)[cfg.stage]
    given = {name: value for name, value in asdict(cfg).items() if value is not None}
    folders = {"out": Path(f"runs/{cfg.system}-{cfg.stage}")}
    if cfg.tiny and cfg.stage == "tower":
        folders = {"out": Path("runs/tiny-tower")}
    elif cfg.tiny and cfg.stage == "align":
        language = LANGUAGE.get(cfg.system, "extended")
        folders |= {"weights": runs.made(f"tiny-{language}", language), "tower": runs.made("tiny-tower", "tower")}
    elif cfg.stage == "sft":
        folders |= {"weights": Path(f"runs/{cfg.system}-align/model")}
    return replace(cfg, **{**rates, **folders, **given})


def check(cfg: Config) -> None:
    """Raise ValueError for what is missing or contradicts itself, before anything is loaded."""
    if cfg.stage == "tower" and not cfg.tiny:
        raise ValueError("--stage tower makes the tiny tower only; at full size give OpenAI's CLIP as --tower")
    for name in {"tower": (), "align": ("weights", "tower"), "sft": ("weights",)}[cfg.stage]:
        if getattr(cfg, name) is None:
            raise ValueError(f"--stage {cfg.stage} at full size starts from a folder; give it as --{name}")
        if not getattr(cfg, name).is_dir():
            before = "; run --stage align first, or name another" if cfg.stage == "sft" else "; name another"
            raise ValueError(f"--{name} {getattr(cfg, name)} is no folder{before}")
    if cfg.data == "synthetic" and not cfg.tiny:
        raise ValueError("the synthetic pictures are for the tiny model; give LLaVA-style JSON as --data")
    if cfg.stage == "sft" and (cfg.scheme != "unires" or cfg.rule) and not cfg.tiny:
        raise ValueError("--scheme and --rule belong to --stage align; sft goes on as the aligned model was taught")


def learning_rate(peak: float, cfg: Config, step: int) -> float:
    """Up from zero over `warmup` of the steps, then a cosine down to zero."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


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
        if cfg.stage == "sft":
            if isinstance(found, longva.LMConfig):
                raise ValueError(f"{cfg.weights} is a language model; --stage sft starts from what --stage align made")
            return longva.LongVA(found)
        if isinstance(found, longva.LongVAConfig):
            raise ValueError(f"{cfg.weights} sees already; --stage align starts from a language model")
        eye = clip.ClipConfig.from_dict(weights.read_config(cfg.tower))
        return longva.LongVA(longva.LongVAConfig(found, eye, cfg.scheme, cfg.rule or RULE[cfg.scheme]))


def initial_weights(cfg: Config, model: nn.Module) -> None:
    """Weights: from the stage before, from the language model and the tower, or new."""
    if cfg.stage == "tower":
        parameters.fill_from(model, parameters.fresh(model, cfg.seed), ring.fill)
    elif cfg.stage == "sft":
        parameters.fill_from(model, weights.read(cfg.weights), ring.fill)
    else:
        new = {name for name, _ in model.named_parameters() if "mm_projector" in name or "image_newline" in name}
        parameters.fill_from(model, parameters.fresh(model, cfg.seed), ring.fill, only=new.__contains__)
        parameters.fill_from(
            model, parameters.read_tower(cfg.tower), ring.fill, only=lambda n: n.startswith(parameters.TOWER)
        )
        parameters.fill_from(
            model, weights.read(cfg.weights), ring.fill, only=lambda n: n not in new and "vision_tower" not in n
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


# ------------------------------------------------------------------------------------------------- its data


def make_samples(cfg: Config, mine: slice):  # noqa: ANN201
    """A function from the step to this rank's samples, (pictures, turns) each; all ranks' make the step's batch."""
    if cfg.data != "synthetic":
        records = llava.read_records(cfg.data)
        return lambda step: [llava.sample(r, cfg.images) for r in llava.pick(records, cfg.seed, step, cfg.batch)[mine]]
    if cfg.stage == "align":
        return lambda step: [synthetic.captioned(cfg.seed, step * cfg.batch + i) for i in range(cfg.batch)[mine]]

    def samples(step: int) -> list:
        grown = min(1.0, step / (cfg.grow * cfg.steps)) if cfg.grow else 1.0
        most = round(min(3, cfg.grids) * (cfg.grids / min(3, cfg.grids)) ** grown)
        return [synthetic.conversation(cfg.seed, step * cfg.batch + i, most) for i in range(cfg.batch)[mine]]

    return samples


def collate(cfg: Config, config: longva.LongVAConfig, words: tokenizer.Tokenizer, samples: list) -> tuple:
    """(ids_BT, targets_BT, pixels_NCYX, layout): pictures cut into grids, and room for their tokens in the text."""
    template = "plain" if cfg.stage == "align" else "qwen_1_5"
    pixels, layout, examples = [], [], []
    for pictures, turns in samples:
        shown = [longva.show(picture, config, cfg.grids) for picture in pictures]
        lengths = [how.tokens(config.vision.patches) for _, how in shown]
        example = chat.example(words, turns, lengths, template)
        if len(example[0]) > cfg.max_len:
            example = fit(cfg, words, turns, lengths, template)
        pixels += [x for x, _ in shown]
        layout += [how for _, how in shown]
        examples.append(example)
    if not pixels:  # text alone: a blank picture that no token shows keeps all ranks calling the same modules
        layout = [unires.Layout(1, 1, config.scheme)]
        pixels = [torch.zeros(layout[0].grids, 3, config.vision.side, config.vision.side)]
    return *chat.pad(examples, words.pad_id), torch.cat(pixels), layout


def fit(cfg: Config, words: tokenizer.Tokenizer, turns: list, lengths: list[int], template: str) -> tuple:
    """Leave out questions from the end of a conversation until it fits; never cut inside a picture or a turn."""
    while len(turns) > 2 and chat.PLACEHOLDER not in turns[-2][1]:
        turns = turns[:-2]
        example = chat.example(words, turns, lengths, template)
        if len(example[0]) <= cfg.max_len:
            return example
    raise ValueError(
        f"a sample with {sum(lengths)} visual tokens does not fit --max-len {cfg.max_len}; raise it or lower --grids"
    )


def make_batches(cfg: Config, model: nn.Module, words: tokenizer.Tokenizer, world: ring.World):  # noqa: ANN201
    """A function from the step to this rank's arguments of the model."""
    if cfg.stage == "tower":  # every rank compares every picture with every caption: the stage is small

        def pairs(step: int) -> tuple[Tensor, Tensor]:
            pictures, captions = synthetic.captioned_grids(cfg.seed, step, cfg.batch)
            rows = [words.encode(caption) for caption in captions]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
            return unires.frames(pictures, synthetic.SIDE, "pad").to(world.device), ids.to(world.device)

        return pairs
    samples = make_samples(cfg, slice(world.rank, None, world.ranks))

    def part(step: int) -> tuple:
        ids_BT, targets_BT, pixels_NCYX, layout = collate(cfg, model.config, words, samples(step))
        pos_T = torch.arange(ids_BT.shape[1], device=world.device)
        ids_BT, targets_BT, pixels_NCYX = (x.to(world.device) for x in (ids_BT, targets_BT, pixels_NCYX))
        return ids_BT, pos_T, targets_BT, pixels_NCYX, layout

    return part


# ----------------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> None:
    """Train one stage, save, export; resumes where a killed run of the same settings stopped."""
    # 1 processes
    cfg = settle(cfg)
    world = ring.start(cfg.device)
    check(cfg)
    if cfg.batch % world.ranks:
        raise ValueError(f"{cfg.batch} samples cannot be shared evenly by {world.ranks} ranks; change --batch")

    # 2 model: shapes first, then shards, then weights
    words = tokenizer.load_tokenizer(synthetic.TOKENIZER if cfg.stage == "tower" else cfg.weights)
    model = build(cfg, words)
    trained(cfg, model)  # FSDP2 must know what is frozen; the optimizer is told below of what it made
    units = [m for m in model.modules() if isinstance(m, (longva.Block, clip.Block))]
    if cfg.stage != "tower":
        model.model.remat = model.tower.recompute = cfg.remat
    ring.shard_parameters(model, units, world, cfg.offload, torch.bfloat16 if cfg.precision == "bf16" else None)
    initial_weights(cfg, model)
    groups = trained(cfg, model)
    learning = sum(p.numel() for g in groups for p in g["params"])
    whole = sum(p.numel() for p in model.parameters())
    ring.say(world, f"{whole:,} parameters, {learning:,} of them learn, on {world.ranks} rank(s), {world.device}")

    # 3 data
    batch = make_batches(cfg, model, words, world)

    # 4 optimizer
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    # 5 resume
    if world.rank == 0:
        runs.open_run(cfg.out, asdict(cfg))
    first = ring.load_state(cfg.out / "state", model, optimizer, world)
    if world.rank == 0:
        runs.rewind(cfg.out, first)

    # 6 the loop
    saver = state.Saver(cfg.async_save)
    bar = tqdm(range(first, cfg.steps), cfg.out.name, cfg.steps, initial=first, disable=world.rank > 0)
    for step in bar:
        saver.check()
        began = time.perf_counter()
        nll_B, count_B = model(*batch(step))
        ring.global_mean(nll_B.sum(), count_B.sum(), world).backward()
        loss = runs.finite(step, [(ring.total(nll_B.sum(), world) / ring.total(count_B.sum(), world)).item()])
        norm = ring.clip_gradients(model, cfg.max_norm, world)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak"], cfg, step)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0:
            seconds = time.perf_counter() - began
            line = {"step": step, "loss": loss, "norm": norm, "lr": learning_rate(cfg.lr, cfg, step)}
            runs.log(cfg.out, {**line, "samples_per_s": round(cfg.batch / seconds, 2)})
            bar.set_postfix(loss=f"{loss:.3f}", samples_per_s=f"{cfg.batch / seconds:.1f}")
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            ring.save_state(cfg.out / "state", model, optimizer, step + 1, world, saver)
    saver.wait()

    # 7 export
    export(cfg, model, world)
    ring.stop(world)


def export(cfg: Config, model: nn.Module, world: ring.World) -> None:
    """Write the model as Hugging Face lays it out, beside its tokenizer, and say what comes next."""
    stream, folder = ring.whole_parameters(model, world), cfg.out / "model"
    if world.rank > 0:
        return
    preset = "" if cfg.system == "tiny-longva" else f" --preset {cfg.system if cfg.tiny else 'longva'}"
    follow = f"torchrun --nproc-per-node 2 train_vision.py --stage sft{preset}"
    if cfg.stage == "tower":
        eye = ((name, tensor) for name, tensor in stream if name.startswith("vision_model."))
        weights.write(folder, eye, {"model_type": "clip_vision_model", **asdict(TINY_CLIP)}, dtype=torch.bfloat16)
        follow = "torchrun --nproc-per-node 2 train_vision.py --stage align"
    else:
        longva.save(folder, stream, model.config, cfg.weights)
    if cfg.stage == "sft":
        other = {"tiny-longva": "tiny-baseline", "tiny-baseline": "tiny-anyres"}.get(cfg.system)
        follow = f"torchrun --nproc-per-node 2 train_vision.py --stage align --preset {other}"
        if not other:
            follow = "python vniah.py --own" if cfg.tiny else f"python vniah.py --weights {folder} --haystack FILM.mp4"
    print(f"model: {folder}   log: {cfg.out / 'log.jsonl'}   loss curve: {runs.draw_curve(cfg.out)}")
    print(f"next:  {follow}")


if __name__ == "__main__":
    run(main, Config, PRESETS, default="tiny")
