"""Make the miniature's benchmark: 100 questions about synthetic pictures and films, for lmms-eval.

What      questions.json, and the pictures (PNG) and films (MP4) that it names: numbers and colours in a picture, a
          number in a film of 64 frames, a number in the first or second of two pictures, and both kinds of number
          question with four choices. Nothing repeats what a model was trained on: the seeds are others.
Paper     Stands in for the benchmarks of Tables 4, 6 and 7.
Run       python -m data.tiny.benchmark.make
Dimensions  none
Differs   A choice is a digit that the picture shows elsewhere, where there are enough, not a letter: the miniature has
          never seen letters.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data import synthetic
from data.flags import run, setting

FRAMES = 64  # of a film
KINDS = {"picture_number": 25, "picture_colour": 15, "film_number": 20, "two_pictures": 10}  # open questions
CHOICES = {"picture_choice": 15, "film_choice": 15}


@dataclass(frozen=True)
class Config:
    """Write the miniature's benchmark: 100 questions with their pictures and films."""

    out: Path = setting(Path("runs/tiny-benchmark"), "folder to write to (ours)")
    seed: int = setting(0, "random seed (ours)")


def write_film(file: Path, frames: list[Image.Image]) -> None:
    """Write frames as an MP4, one per second, with hardly any loss."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "8"})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def draw(rng: np.random.Generator, kind: str) -> tuple[list[list[Image.Image]], list[tuple[str, str, int]]]:
    """The visuals of a question, each as its frames, and what they show as (thing, colour, number), all different."""
    shown = synthetic.draw_objects(rng, 6, bare=0.0)
    numbers = rng.permutation(10)[: len(shown)]
    shown = [(thing, colour, int(number)) for (thing, colour, _), number in zip(shown, numbers)]
    if kind.startswith("film"):
        frames = [frame for frame, _ in zip(synthetic.film(int(rng.integers(2**31))), range(FRAMES))]
        for place, one in zip(rng.permutation(FRAMES), shown):
            frames[place] = synthetic.compose_picture(rng, 1, 1, [one])
        return [frames], shown
    parts = [shown[:3], shown[3:]] if kind == "two_pictures" else [shown]
    return [[synthetic.compose_picture(rng, 3, 4, part)] for part in parts], shown


def question(rng: np.random.Generator, kind: str, name: str, out: Path) -> dict:
    """Write one question's visuals; return its line of questions.json."""
    visuals, shown = draw(rng, kind)
    files = [out / f"{name}-{i}.{'mp4' if len(frames) > 1 else 'png'}" for i, frames in enumerate(visuals)]
    for file, frames in zip(files, visuals):
        write_film(file, frames) if len(frames) > 1 else frames[0].save(file)
    thing, colour, number = shown[rng.integers(len(shown))]
    asks, answer = (synthetic.ASK_COLOUR, colour) if "colour" in kind else (synthetic.ASK_NUMBER, str(number))
    choices = [str(n) for _, _, n in shown if n != number][:3] if "choice" in kind else []
    choices = [str(choice) for choice in rng.permutation([*choices, answer])] if choices else []
    answers = choices or (list(synthetic.COLOURS) if "colour" in kind else list("0123456789"))
    return {
        "kind": kind,
        "visuals": [str(file) for file in files],
        "question": asks.format(thing=thing),
        "choices": choices,
        "answer": answer,
        "chance": 1 / len(answers),
    }


def main(cfg: Config) -> None:
    """Write all questions and their visuals."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind, count in {**KINDS, **CHOICES}.items() for _ in range(count)]
    lines = []
    for n, kind in enumerate(kinds):
        rng = np.random.default_rng([0xBE7C, cfg.seed, n])
        lines.append(question(rng, kind, f"{n:03}", cfg.out))
    (cfg.out / "questions.json").write_text(json.dumps(lines, indent=1) + "\n")
    size = sum(file.stat().st_size for file in cfg.out.iterdir())
    print(f"{len(lines)} questions, {size / 1e6:.1f} MB: {cfg.out}")
    print("next:  python -m data.benchmarks")


if __name__ == "__main__":
    run(main, Config)
