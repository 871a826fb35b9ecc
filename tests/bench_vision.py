"""How much vision training costs: a step of train_vision.py's sft beside a plain loop around transformers.

What      64 samples made like LLaVA's, in steps of 8: a picture of 2 to 12 grids, of some the same picture as another
          sample's, and a conversation; one in eight is text alone. Forward, backward and AdamW, with the same weights.
          Theirs: CLIPVisionModel with all hidden states, a projector, Qwen2ForCausalLM with `labels`, sdpa; random
          steps, padded and masked; each picture seen where it occurs, with the base grid that the release encodes and
          drops. Ours: `llava.batch_indices`, `collate`, `train_step`. Four lines take from theirs, one after another, what ours does
          not do; each tells what that is worth here:
          base grid     one more for each picture, the more the fewer grids it has
          llava.batch_indices    steps of like length: less padding
          once          a picture that comes again in a step is seen once
          where asked   no logits of places without a target: visual tokens, questions, padding
          What is left are the last layer of the tower, the mask, and overhead. "nothing to gain" has none of the four:
          no base grid, one length, no picture twice, a target everywhere.
          A grid costs the language model without its head 5.4 times what it costs the tower, as in LongVA. The head is
          7 % of the language model in "like Qwen2-7B", as there; with "a vocabulary of 32k" it is 63 %, which flatters
          ours. The release, unlike the plain loop, does group samples, by their words: padding of that is printed, too.
          Memory is growth above model and optimizer, in a process of its own for each side (see bench.py). Not
          timed: reading and cutting pictures, tokenizing.
Paper     arXiv 2406.16852, Sec. 3.2.
Run       python tests/bench.py vision            about 4 minutes on an idle core
          python tests/bench.py vision --quick    toy sizes: only shows that every side still runs and agrees
Key       that of longva.py
Deviates  The rate is 0: AdamW does all its work and weights stay, so that all sides must find the same loss of the 64
          samples, however these are batched. Loss and gradients of one and the same step are compared first.

Pictures are noise and words random: only sizes and lengths matter. How often a picture comes again is assumed, not
LLaVA's, and padding depends on how many samples share a step.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import longva
import ring
import train_vision
import unires
from data import chat, llava, weights
from data.config import ClipConfig, LongVAConfig, read_config
from tests import bench

SAMPLES, STEP, GRIDS, SEED = 64, 8, 12, 0
ALONE = ring.World(0, 1, torch.device("cpu"))
ERROR, WANTED = 1e-5, 1.3
LM, TOWER = bench.lm(256, 1376, 4, 4, 1, 64, 32768), bench.tower(48, 192, 8, 2, 84)
FULL, LIKE_7B = {"lm": LM, "tower": TOWER}, {"lm": LM | {"V": 1536}, "tower": TOWER}
TOY = {"lm": bench.TOY, "tower": bench.tower(32, 64, 3, 2, 28)}
EYE = weights.TOWER
LOOKED_AT = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
             "model.layers.1.mlp.down_proj.weight", "model.mm_projector.0.weight", "model.mm_projector.2.bias",
             f"{EYE}embeddings.patch_embedding.weight", f"{EYE}encoder.layers.0.self_attn.q_proj.weight"]  # fmt: skip


# ---- the samples ---------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """A sample for both sides: as train_vision prepares it, and the base grid of each picture, pixels_1CYX."""

    example: llava.Example
    base: list[Tensor]


def some_picture(rng: np.random.Generator, config: LongVAConfig) -> tuple[Tensor, unires.Layout, Tensor]:
    """Noise of some size, 2 to GRIDS grids of it: (pixels_NCYX, layout, base_1CYX)."""
    width, height = rng.integers(config.vision.side // 2, 4 * config.vision.side, 2)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return *longva.preprocess(picture, config, GRIDS), unires.base_grid(picture, config.vision.side)


def some_talk(rng: np.random.Generator, V: int, seen: int) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation: answers are trained, some of a few words and some long; text alone is longer."""
    ids = [*rng.integers(1, V, 4).tolist(), *[chat.IMAGE] * seen]
    labels = [chat.IGNORE] * len(ids)
    for _ in range(rng.integers(1, 4) if seen else rng.integers(3, 7)):
        asked = rng.integers(1, V, rng.integers(3, 12)).tolist()
        said = rng.integers(1, V, rng.integers(1, 4) if rng.random() < 0.5 else rng.integers(10, 40)).tolist()
        ids, labels = ids + asked + said, labels + [chat.IGNORE] * len(asked) + said
    return ids, labels


def some_lessons(config: LongVAConfig) -> list[Lesson]:
    """64 samples: every eighth is text alone, the others show 40 pictures."""
    rng, V = np.random.default_rng(SEED), config.lm.vocab_size
    pictures, lessons = [some_picture(rng, config) for _ in range(SAMPLES * 5 // 8)], []
    for i in range(SAMPLES):
        shown = [] if i % 8 == 7 else [pictures[rng.integers(len(pictures))]]
        text = some_talk(rng, V, sum(layout.tokens(config.vision.patches) for _, layout, _ in shown))
        example = llava.Example(i, [(pixels, layout, []) for pixels, layout, _ in shown], [text])
        lessons.append(Lesson(example, [base for *_, base in shown]))
    return lessons


def even_lessons(config: LongVAConfig) -> list[Lesson]:
    """One step in which nothing can be saved: other pictures of one size, one length, a target everywhere."""
    rng, V, side = np.random.default_rng(SEED), config.lm.vocab_size, config.vision.side
    lessons = []
    for i in range(STEP):
        picture = Image.fromarray(rng.integers(0, 256, (3 * side, 2 * side, 3), dtype=np.uint8))
        shown = longva.preprocess(picture, config, GRIDS)
        ids = [*rng.integers(1, V, 4), *[chat.IMAGE] * shown[1].tokens(config.vision.patches), *rng.integers(1, V, 40)]
        example = llava.Example(i, [(*shown, [])], [(ids, rng.integers(1, V, len(ids)).tolist())])
        lessons.append(Lesson(example, [unires.base_grid(picture, side)]))
    return lessons


def batches(lessons: list[Lesson], grouped: bool, words: bool = False) -> list[list[Lesson]]:
    """An epoch's steps: as llava.batch_indices groups them, by length or by the length of words alone, or in random order."""
    steps, ids = len(lessons) // STEP, [lesson.example.texts[0][0] for lesson in lessons]
    lengths = np.array([len(row) - words * row.count(chat.IMAGE) for row in ids])
    if grouped:
        numbers = [llava.batch_indices(lengths, SEED, step, STEP) for step in range(steps)]
    else:
        numbers = np.random.default_rng(SEED).permutation(len(lessons)).reshape(steps, STEP)
    return [[lessons[i] for i in some] for some in numbers]


def padding(steps: list[list[Lesson]]) -> float:
    """The share of ids that is padding."""
    lengths = [[len(lesson.example.texts[0][0]) for lesson in step] for step in steps]
    return 1 - sum(map(sum, lengths)) / sum(len(step) * max(step) for step in lengths)


# ---- the sides -----------------------------------------------------------------------------------


def make(folder: Path, sizes: dict) -> None:
    """Write a language model, a tower and a projector of random weights."""
    bench.make_lm(folder / "lm", sizes["lm"])
    bench.make_tower(folder / "tower", sizes["tower"])
    mlp = projector(sizes["tower"]["hidden_size"], sizes["lm"]["D"])
    bench.randomise(mlp)
    save_file(mlp.state_dict(), folder / "projector")


def projector(E: int, D: int) -> nn.Sequential:
    """LLaVA's, mlp2x_gelu."""
    return nn.Sequential(nn.Linear(E, D), nn.GELU(), nn.Linear(D, D))


def our_config(folder: Path) -> LongVAConfig:
    """Sizes of both, with the release's rule."""
    eye = ClipConfig.from_dict(weights.read_config(folder / "tower"))
    return LongVAConfig(read_config(folder / "lm"), eye, "unires", "canvas")


def our_model(folder: Path) -> longva.LongVA:
    """LongVA with what `make` wrote."""
    model = longva.LongVA(our_config(folder))
    mlp = {f"model.mm_projector.{name}": x for name, x in load_file(folder / "projector").items()}
    parts = [*weights.read(folder / "lm"), *weights.read_tower(folder / "tower"), *mlp.items()]
    weights.fill_from(model, iter(parts))
    return model


def our_loss(model: longva.LongVA, lessons: list[Lesson]) -> float:
    """Go forward and backward through a step of train_vision: its mean loss."""
    examples = [
        example._replace(images=[(pixels, layout) for pixels, layout, _ in example.images]) for example, _ in lessons
    ]
    batch = train_vision.collate(examples, model.config, 0, ALONE)
    objective = train_vision.Objective(train_vision.next_token_loss, train_vision.count_targets, ("loss",))
    return train_vision.train_step(model, [batch], objective, False, ALONE)["loss"]


@dataclass(frozen=True)
class How:
    """What theirs does; the last of all does only what ours does."""

    base: bool = True
    grouped: bool = False
    shared: bool = False  # a picture that occurs again in a step is seen once
    sparse: bool = False  # logits of places with a target only


class Plain(nn.Module):
    """What a plain loop trains: three models, and LLaVA's way to join them."""

    def __init__(self, folder: Path, how: How = How()):
        super().__init__()
        self.how, self.tower = how, bench.their(CLIPVisionModel, folder / "tower").train()
        self.lm = bench.their(Qwen2ForCausalLM, folder / "lm").train()
        self.projector = projector(self.tower.config.hidden_size, self.lm.config.hidden_size)
        self.projector.load_state_dict(load_file(folder / "projector"))

    def encode_images(self, lessons: list[Lesson]) -> list[list[Tensor]]:
        """Visual tokens x_TD of each picture of each sample; all grids of a step go through the tower at once."""
        shown = [(pixels, base) for example, bases in lessons for (pixels, *_), base in zip(example.images, bases)]
        keys = [id(pixels) if self.how.shared else i for i, (pixels, _) in enumerate(shown)]
        once = dict(zip(keys, shown))
        if not once:
            return [[] for _ in lessons]
        grids = [torch.cat([base, pixels]) if self.how.base else pixels for pixels, base in once.values()]
        grids = [unires.normalise(pixels) for pixels in grids]
        states = self.tower(torch.cat(grids), output_hidden_states=True).hidden_states
        parts = self.projector(states[-2][:, 1:]).split([len(x) for x in grids])
        tokens = {key: pool(x_NPD[1:] if self.how.base else x_NPD) for key, x_NPD in zip(once, parts)}
        seen = iter([tokens[key] for key in keys])
        return [[next(seen) for _ in lesson.base] for lesson in lessons]

    def forward(self, lessons: list[Lesson]) -> Tensor:
        """The mean loss of a step."""
        rows, labels = [], []
        for lesson, seen in zip(lessons, self.encode_images(lessons)):
            ids, wanted = lesson.example.texts[0]
            text = self.lm.get_input_embeddings()(torch.tensor([i for i in ids if i != chat.IMAGE]))
            before = ids.index(chat.IMAGE) if seen else 0
            rows.append(torch.cat([text[:before], *seen, text[before:]]))
            labels.append(torch.tensor(wanted))
        x_BTD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels_BT = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=chat.IGNORE)
        mask_BT = torch.arange(x_BTD.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        asked = {"inputs_embeds": x_BTD, "attention_mask": mask_BT, "position_ids": torch.arange(x_BTD.shape[1])[None]}
        if not self.how.sparse:
            return self.lm(**asked, labels=labels_BT, use_cache=False).loss
        targets_BT = F.pad(labels_BT, (-1, 1), value=chat.IGNORE)
        h_BTD, wanted_BT = self.lm.model(**asked, use_cache=False)[0], targets_BT != chat.IGNORE
        return F.cross_entropy(self.lm.lm_head(h_BTD[wanted_BT]), targets_BT[wanted_BT])


def pool(x_NPD: Tensor) -> Tensor:
    """2x2 patches to one, as the release does it: x_TD."""
    half = round(x_NPD.shape[1] ** 0.5)
    return F.avg_pool2d(x_NPD.transpose(1, 2).unflatten(2, (half, half)), 2).flatten(2).transpose(1, 2).flatten(0, 1)


def their_loss(model: Plain, lessons: list[Lesson]) -> float:
    """Go forward and backward: the mean loss."""
    loss = model(lessons)
    loss.backward()
    return loss.item()


def targets(lessons: list[Lesson]) -> int:
    """How many there are; the first label is nobody's to say."""
    return sum(label != chat.IGNORE for lesson in lessons for label in lesson.example.texts[0][1][1:])


def trainer(model: nn.Module, loss: Callable, steps: list[list[Lesson]]) -> bench.Run:
    """A function that trains the first n steps: the summed loss of their samples."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def run(n: int) -> bench.Found:
        nll = 0.0
        for lessons in steps[:n]:
            nll += loss(model, lessons) * targets(lessons)
            optimizer.step()
            optimizer.zero_grad()
        return {"nll": torch.tensor([nll], dtype=torch.float64)}

    return run


def ours(folder: Path, n: int, lessons: Callable = some_lessons) -> bench.Run:
    """train_vision's way."""
    model = our_model(folder)
    return trainer(model, our_loss, batches(lessons(model.config), True))


def theirs(folder: Path, n: int, how: How = How(), lessons: Callable = some_lessons) -> bench.Run:
    """The plain loop, or with less waste."""
    return trainer(Plain(folder, how), their_loss, batches(lessons(our_config(folder)), how.grouped))


# ---- the tables ----------------------------------------------------------------------------------


def gradients(folder: Path) -> float:
    """The largest difference of loss, and of some gradients, in one and the same step."""
    lessons = batches(some_lessons(our_config(folder)), False)[0]
    mine, other = our_model(folder), Plain(folder)
    loss = [torch.tensor([our_loss(mine, lessons)]), torch.tensor([their_loss(other, lessons)])]
    known = dict(other.lm.named_parameters())
    known |= {f"model.mm_projector.{name}": p for name, p in other.projector.named_parameters()}
    known |= {EYE + name.removeprefix("vision_model."): p for name, p in other.tower.named_parameters()}
    found = dict(mine.named_parameters())
    return max(bench.difference(*loss), *(bench.difference(found[name].grad, known[name].grad) for name in LOOKED_AT))


LADDER = {
    "theirs": How(),
    "  no base grid": How(base=False),
    "  and llava.batch_indices": How(base=False, grouped=True),
    "  and pictures once": How(base=False, grouped=True, shared=True),
    "  and head where asked": How(base=False, grouped=True, shared=True, sparse=True),
}
ENDS = {"theirs": How()}
EVEN = {"theirs": How(base=False)}
HOW = {"make": make, "ours": ours, "theirs": theirs, "n": SAMPLES // STEP, "quick": (TOY, SAMPLES // STEP),
       "memory": True, "learns": True}  # fmt: skip
MEMORY = [
    bench.Case("sft, words 32k: memory", sizes=FULL, wanted=0.6, bound="gradients; theirs all logits", **HOW),
    bench.Case(
        "sft, like Qwen2-7B: memory", sizes=LIKE_7B, wanted=1.05, bound="activations of the longest step", **HOW
    ),
]


def say_times(title: str, folder: Path, hows: dict[str, How], wanted: float, rounds: int, lessons: Callable) -> bool:
    """Print samples per second of each of theirs and of ours; do all agree?"""
    count = len(lessons(our_config(folder)))
    runs = {name: theirs(folder, 0, how, lessons) for name, how in hows.items()} | {"ours": ours(folder, 0, lessons)}
    turns = [{name: bench.cpu_seconds(run, count // STEP) for name, run in runs.items()} for _ in range(rounds)]
    best = {name: min(turn[name][0] for turn in turns) for name in runs}
    known, agree = turns[0]["theirs"][1]["nll"], True
    print(f"\n{title:<26}{'seconds':>9}{'samples/s':>11}{'to theirs':>11}{'error':>10}")
    for name, seconds in best.items():
        error = max(bench.difference(turn[name][1]["nll"], known) for turn in turns)
        agree &= error <= ERROR
        ratio, wrong = best["theirs"] / seconds, "" if error <= ERROR else "  WRONG"
        verdict = (
            f"  wanted >= {wanted}: {'ok' if ratio >= wanted else 'short'}" if name == "ours" and rounds >= 3 else ""
        )
        print(f"{name:<26}{seconds:>9.3f}{count / seconds:>11.2f}{ratio:>11.2f}{error:>10.1e}{verdict}{wrong}")
    return agree


def say_samples(config: LongVAConfig) -> None:
    """Print what the samples are, and how much of them is padding."""
    lessons = some_lessons(config)
    lengths = [len(lesson.example.texts[0][0]) for lesson in lessons]
    grids = [layout.grids for lesson in lessons for _, layout, _ in lesson.example.images]
    kinds = {grouped: batches(lessons, grouped) for grouped in (False, True)}
    again = [
        1 - len({id(x) for lesson in step for x, *_ in lesson.example.images}) / max(1, sum(len(s.base) for s in step))
        for step in kinds[True]
    ]
    print(f"{len(lessons)} samples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all, "
          f"{targets(lessons):,} of them targets; {len(grids)} pictures of {min(grids)} to {max(grids)} grids, "
          f"{sum(grids)} in all; {np.mean(again):.0%} of a step's pictures come again")  # fmt: skip
    print(f"padding: {padding(kinds[False]):.1%} of all ids in random order, {padding(batches(lessons, True, True)):.1%} "
          f"grouped by words alone, {padding(kinds[True]):.1%} by llava.batch_indices")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print the tables: 0, or 1 where results differ. Ratios fail nothing: they are for people to read."""
    if arguments[:1] == ["alone"]:  # called by bench.measure_memory
        return bench.main(arguments, {"vision": MEMORY})
    quick, agree = "--quick" in arguments, True
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32, one thread, steps of {STEP}")
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        full, small = Path(name) / "full", Path(name) / "small"
        make(full, TOY if quick else FULL)
        make(small, TOY if quick else LIKE_7B)
        say_samples(our_config(full))
        error = gradients(full)
        agree &= error <= ERROR
        print(f"one step, the same samples: loss and gradients differ by {error:.1e}{'' if agree else '  WRONG'}")
        agree &= say_times("a vocabulary of 32k", full, ENDS, WANTED, rounds, some_lessons)
        agree &= say_times("like Qwen2-7B", small, LADDER, WANTED, rounds, some_lessons)
        agree &= say_times("nothing to gain", small, EVEN, 0.95, 1 if quick else 9, even_lessons)
    print()
    return max(int(not agree), bench.main(["vision", *arguments], {"vision": MEMORY}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
