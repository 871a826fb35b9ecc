"""Why a needle is missed: where the model looks when it answers, and whose number it says.

What      Asks for needles in films of growing length, as vniah.py does. Of all heads and all tokens of the question, it
          takes the pair that looks at the needle most, and sums its attention over the needle, frames with another
          number, frames that show the same thing without a number, frames with another thing, and empty frames.
          Where that token is not the last, a later head must carry what was found from there to the answer: it also
          sums that head's attention over the whole film: what it takes in beside what was found.
Paper     Sec. 4 reports that needles are found; this is what finding and missing look like inside.
Run       python -m data.tiny.attention --weights data/tiny/longva --frames 128 512 1024
Dimensions  S tokens of a probe   Q of the question   M tokens per frame   N frames   B batch   T tokens   H query heads
          K head width   G key/value heads   D LM width
Differs   Nothing to differ from.
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import longva
import vniah
from data import chat, niah, runs, synthetic, tokenizer
from data.flags import at_least, run, setting

KINDS = ("needle", "another number", "same thing, no number", "another thing", "empty frames")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Config:
    """Show where a model looks when it finds and when it misses needles."""

    weights: Path = setting(runs.TINY / "longva", "model folder (ours)")
    frames: tuple[int, ...] = setting((32, 128, 512, 1024), "film lengths, frames (ours)")
    needle_count: int = setting(20, "needles, each at five depths (ours)")
    seed: int = setting(7, "seed of film, needles and distractors (ours)")
    out: Path = setting(Path("runs/attention"), "folder for attention.json and attention.png (ours)")

    def __post_init__(self):
        at_least(self, needle_count=1, seed=0)


def recording_attend(layers: list[Tensor], Q: int) -> longva.Attend:
    """Return causal attention that appends to `layers` each layer's attention of the last Q tokens, [H, Q, S]."""

    def attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        k_BTHK = k_BTGK.repeat_interleave(q_BTHK.shape[2] // k_BTGK.shape[2], dim=2)
        logits_BHQT = torch.einsum("bqhk,bthk->bhqt", q_BTHK[:, -Q:], k_BTHK) * q_BTHK.shape[-1] ** -0.5
        later_QT = torch.ones_like(logits_BHQT[0, 0], dtype=torch.bool).triu(k_BTHK.shape[1] - Q + 1)
        layers.append(logits_BHQT.masked_fill(later_QT, -torch.inf).softmax(-1)[0])
        return longva.causal_attend(layer, q_BTHK, k_BTGK, v_BTGK)

    return attend


@torch.no_grad()
def look(cfg: Config, N: int, model: longva.LongVA, words: tokenizer.Tokenizer) -> list[dict]:
    """Ask every needle at every depth of a film of N frames; one line per probe: hit, whose digit, attention."""
    needles, distractors = synthetic.draw_needles(cfg.seed, cfg.needle_count, 3)
    film = list(islice(synthetic.film_with_things(cfg.seed), N))
    places = [int((i + 0.5) * N / len(distractors)) for i in range(len(distractors))]
    for place, distractor in zip(places, distractors):
        film[place] = distractor.picture, None
    x_NMD = vniah.encode_frames(model, (picture for picture, _ in film))
    needle_NMD = vniah.encode_frames(model, (needle.picture for needle in needles))
    prefix_ids, suffix_ids = chat.template_ids(words, chat.default_template(words))
    prefix_1TD = vniah.embed(model, prefix_ids)
    M, lines = x_NMD.shape[1], []
    for depth in DEPTHS:
        before = niah.insert_index(N, depth)
        for i, needle in enumerate(needles):
            thing = needle.name.split("-")[1]
            frame_kinds = [
                1 if n in places else 2 if shown == thing else 3 if shown else 4 for n, (_, shown) in enumerate(film)
            ]
            kinds = torch.tensor([*frame_kinds[:before], 0, *frame_kinds[before:]]).repeat_interleave(M)
            video_1TD = torch.cat([x_NMD[:before], needle_NMD[i : i + 1], x_NMD[before:]]).flatten(0, 1)[None]
            question_ids = words.encode("\n" + needle.question) + suffix_ids
            x_1SD = torch.cat([prefix_1TD, video_1TD, vniah.embed(model, question_ids)], dim=1)
            layers: list[Tensor] = []
            h_1SD = model.model(x_1SD, torch.arange(x_1SD.shape[1]), recording_attend(layers, len(question_ids)))
            said = words.decode([model.logits(h_1SD[:, -1:])[0, 0].argmax().item()])
            heads_HQS = torch.cat(layers)  # of all layers
            start, end = prefix_1TD.shape[1], prefix_1TD.shape[1] + len(kinds)
            on_needle_HQ = heads_HQS[:, :, start:end][:, :, kinds == 0].sum(-1)
            head, token = divmod(on_needle_HQ.argmax().item(), len(question_ids))
            film_S = heads_HQS[head, token, start:end]
            answer_HS = heads_HQS[:, -1]
            carrier = answer_HS[:, end + token].argmax()  # the head that carries what that token found to the answer
            lines.append({
                "frames": N, "depth": depth, "needle": needle.name, "hit": said == needle.answer,
                "said": "the needle's" if said == needle.answer
                else "a distractor's" if said in [other.answer for other in distractors]
                else "another digit" if said.isdigit() else "no digit",
                "attention": [round(film_S[kinds == kind].sum().item(), 4) for kind in range(len(KINDS))],
                "token": words.decode([question_ids[token]]),
                "carrier": round(answer_HS[carrier, start:end].sum().item(), 4) if token < len(question_ids) - 1 else 0,
            })  # fmt: skip
    return lines


def draw(cfg: Config, lines: list[dict]) -> None:
    """Draw the mean attention of hits and of misses at each length as stacked bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    bars = [(N, hit) for N in cfg.frames for hit in (True, False)]
    for x, (N, hit) in enumerate(bars):
        chosen = [line["attention"] for line in lines if line["frames"] == N and line["hit"] == hit]
        bottom = 0.0
        for kind, colour in enumerate(("tab:blue", "tab:red", "tab:orange", "tab:purple", "0.7")):
            height = sum(row[kind] for row in chosen) / max(1, len(chosen))
            axes.bar(x, height, bottom=bottom, color=colour, label=KINDS[kind] if x == 0 else None)
            bottom += height
        axes.text(x, 1.02, f"n={len(chosen)}", ha="center", fontsize=8)
    axes.set_xticks(range(len(bars)), [f"{N:,}\n{'found' if hit else 'missed'}" for N, hit in bars], fontsize=8)
    axes.set(xlabel="frames", ylabel="attention of the question", ylim=(0, 1.12))
    axes.legend(frameon=False, bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(cfg.out / "attention.png", dpi=150)


def main(cfg: Config) -> None:
    """Ask, print a table, write attention.json, draw attention.png."""
    model, words = longva.load(cfg.weights), tokenizer.load_tokenizer(cfg.weights)
    lines = [line for N in tqdm(cfg.frames, "film lengths") for line in look(cfg, N, model, words)]
    print(f"{'frames':>7} {'':7} {'n':>4}   " + "   ".join(KINDS) + "   carrier: film")
    for N in cfg.frames:
        for hit in (True, False):
            chosen = [line for line in lines if line["frames"] == N and line["hit"] == hit]
            means = [
                sum(line["attention"][kind] for line in chosen) / max(1, len(chosen)) for kind in range(len(KINDS))
            ]
            cells = "   ".join(f"{mean:>{len(kind)}.3f}" for mean, kind in zip(means, KINDS))
            carrier = sum(line["carrier"] for line in chosen) / max(1, len(chosen))
            print(f"{N:>7,} {'found' if hit else 'missed':7} {len(chosen):>4}   {cells}   {carrier:>13.3f}")
        said = Counter(line["said"] for line in lines if line["frames"] == N and not line["hit"])
        print(f"{'':15}   said in place of it: " + (", ".join(f"{n} x {who}" for who, n in said.items()) or "nothing"))
    cfg.out.mkdir(parents=True, exist_ok=True)
    runs.replace_text(cfg.out / "attention.json", json.dumps(lines) + "\n")
    draw(cfg, lines)
    print(f"picture: {cfg.out / 'attention.png'}")


if __name__ == "__main__":
    run(main, Config)
