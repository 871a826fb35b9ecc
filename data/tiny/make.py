"""Make the two shipped files that no training script makes: the tiny tokenizer and the tiny vision tower.

What      `tokenizer` trains a byte-level BPE that knows every word of the synthetic world.
          `tower` trains a CLIP of 0.5 million parameters, picture against caption, on synthetic pictures of one grid.
Paper     None: it takes Qwen2's tokenizer and OpenAI's CLIP, which are too large for the miniature.
Run       python -m data.tiny.make tower
          python -m data.tiny.make tokenizer --out runs/tiny-tokenizer
Dimensions  N pictures   C colour channels   Y X pixels   T tokens of a caption   V vocabulary   E CLIP width
Differs   A caption is encoded as the mean of its words' embeddings, not by a transformer.

The other folders of data/tiny come from train_text.py and train_vision.py: see README.md.
"""

import math
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clip
import ring
import unires
from data import runs, synthetic, tokenizer, weights
from data.flags import at_least, run, setting

TINY_CLIP = clip.ClipConfig(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    patch_size=8,
    image_size=synthetic.SIDE,
)
LEARNING_RATE, WARMUP, SEED = 2e-3, 0.03, 42


@dataclass(frozen=True)
class Config:
    """Make the tiny tokenizer or the tiny vision tower."""

    what: Literal["tower", "tokenizer"] = setting(MISSING, "which file to make (ours)", positional=True)
    out: Path | None = setting(None, "folder to write to, none: runs/tiny-tower or runs/tiny-tokenizer (ours)")
    steps: int = setting(1200, "optimizer steps of the tower (ours)")
    batch: int = setting(128, "pictures per step (ours)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to compute on (ours)")

    def __post_init__(self):
        at_least(self, steps=1, batch=2)


class ClipContrastive(nn.Module):
    """CLIP's training: each picture is compared with every caption of the batch."""

    def __init__(self, config: clip.ClipConfig, vocab_size: int, width: int = 64):
        super().__init__()
        self.vision_model = clip.ClipVision(config)
        self.visual_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.text_embedding = nn.EmbeddingBag(vocab_size, width, mode="mean", padding_idx=0)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, pixels_NCYX: Tensor, captions_NT: Tensor) -> Tensor:
        """Return loss_N: of finding the caption of each picture, and the picture of each caption, halved."""
        picture_NE = F.normalize(self.visual_projection(self.vision_model.features(pixels_NCYX)), dim=-1)
        caption_NE = F.normalize(self.text_embedding(captions_NT), dim=-1)
        similarity_NN = (self.log_scale.exp() * 10) * picture_NE @ caption_NE.T
        target_N = torch.arange(len(similarity_NN), device=similarity_NN.device)
        find_caption_N = F.cross_entropy(similarity_NN, target_N, reduction="none")
        find_picture_N = F.cross_entropy(similarity_NN.T, target_N, reduction="none")
        return (find_caption_N + find_picture_N) / 2


def learning_rate(step: int, steps: int) -> float:
    """Return the rate at a step: a rise from zero over WARMUP of the steps, then a cosine to zero."""
    warmup_steps = max(1, round(WARMUP * steps))
    if step < warmup_steps:
        return LEARNING_RATE * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def captioned_batch(words: tokenizer.Tokenizer, step: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (pixels_NCYX normalised, captions_NT padded with 0) of a step."""
    pictures, captions = synthetic.captioned_grids(SEED, step, batch)
    rows = [torch.tensor(words.encode(caption)) for caption in captions]
    captions_NT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    pixels_NCYX = unires.frames(pictures, synthetic.SIDE, "pad").to(device)
    return unires.normalise(pixels_NCYX), captions_NT


def make_tower(out: Path, steps: int, batch: int, device: str) -> None:
    """Train the tower on one process; write out/log.jsonl and, as CLIP's files are, out/model."""
    world = ring.start(device)
    words = tokenizer.load_tokenizer(synthetic.TOKENIZER)
    model = ClipContrastive(TINY_CLIP, words.size)
    weights.fill_from(model, weights.init_weights(model, SEED))
    model.to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    out.mkdir(parents=True, exist_ok=True)
    runs.truncate_log(out, 0)
    bar = tqdm(range(steps), out.name)
    for step in bar:
        loss_N = model(*captioned_batch(words, step, batch, world.device))
        optimizer.zero_grad()
        ring.global_mean(loss_N.sum(), torch.tensor(batch), world).backward()
        norm = ring.clip_gradients(model, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        loss = runs.sum_finite(step, [loss_N.detach().sum().item() / batch])
        runs.log(out, {"step": step, "loss": loss, "norm": norm})
        bar.set_postfix(loss=f"{loss:.4g}")
    tower = ((name, x.detach()) for name, x in model.named_parameters() if name.startswith("vision_model."))
    weights.write(out / "model", tower, {"model_type": "clip_vision_model", **asdict(TINY_CLIP)}, dtype=torch.bfloat16)
    card = "---\nlicense: mit\n---\n# {}\n\nMade from synthetic pictures: `python -m data.tiny.make tower`.\n"
    if not (file := out / "model" / "README.md").exists():  # what a user added to it stays
        runs.replace_text(file, card.format(out.name))
    runs.print_end(out, f"{runs.TORCHRUN} train_vision.py --stage align --tower {{}}")


def main(cfg: Config) -> None:
    """Make one of the two."""
    out = cfg.out or Path(f"runs/tiny-{cfg.what}")
    if cfg.what == "tokenizer":
        synthetic.write_tokenizer(out)
        print(f"tokenizer: {out}")
    else:
        make_tower(out, cfg.steps, cfg.batch, cfg.device)


if __name__ == "__main__":
    run(main, Config)
