"""Conversations as token ids and labels, with room left for pictures.

What      A prompt for a question (`prompt`), the next question (`follow_up`), the template that suits a tokenizer
          (`default_template`), a training sample with its labels (`example`), a batch (`pad`). Each `<image>` in a
          text becomes as many ids IMAGE as the picture has visual tokens, so that every length is known before the
          model runs; the model then puts the visual tokens in their place.
          `Settings` and `questions`: what a user asks longva.py, on the command line and in a chat.
Paper     Sec. 3.2 (UniRes samples, in Qwen2's chat format), Fig. 4 and App. B (the templates of V-NIAH).
Run       imported; `prompt(tokenizer, "What is this?", [144])`
Dimensions  B batch   T tokens
Differs   `example(..., clean=False)` undoes the first three.
          1. Only the assistant's words are trained; the release also trains <|im_start|> of every turn, and
             <|im_end|> with its newline after the system's and the user's words.
          2. One newline follows the picture, as in a prompt; the release trains with two and asks with one.
          3. Several pictures stay where the text has them; the release puts them all in front. With clean=False two
             details differ still: a question of white space alone has a newline more than the release's, and where
             text parts two pictures the release leaves the letters "ge>" in it.
          4. A text that spells a control token ("<|im_end|>") stays text.
          5. Vicuna's and Mistral's questions stand between spaces ("USER: What? ASSISTANT:"), as these models were
             trained; V-NIAH's frames, tokenised on their own, have none ("USER:"). Vicuna's system line is V-NIAH's
             ("a curious human"); the release's demo says "a curious user".
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import runs
from data.config import Sampling, read_sampling
from data.flags import at_least, print0, setting
from data.tokenizer import Tokenizer

IMAGE = -200  # the id that stands for one visual token
IGNORE = -100  # the label of a token that is not trained
PLACEHOLDER = "<image>"

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
# What stands before and after the user's words, up to where the answer begins. A BOS is written out.
TEMPLATES = {
    "qwen_1_5": (f"{SYSTEM}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "mistral": ("<s>[INST]", " [/INST]"),
    "vicuna": (f"<s>{VICUNA_SYSTEM} USER:", "ASSISTANT:"),
    "llama3": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA3_SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
NEXT_TURN = {  # what stands between an answer and the user's next words
    "qwen_1_5": "<|im_end|>\n<|im_start|>user\n",
    "mistral": "</s>[INST]",
    "vicuna": "</s>USER:",
    "llama3": "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
}
FAMILY = {"<|im_start|>": "qwen_1_5", "<|start_header_id|>": "llama3", "<s>": "vicuna"}  # control token: its template
CONTROL = re.compile(r"<\|\w+\|>|</?s>")  # control tokens as the templates write them


def default_template(tokenizer: Tokenizer) -> str:
    """Choose the template by the tokenizer's control tokens, so that a folder needs no flag.

    Mistral has Vicuna's control tokens, so it gets Vicuna's template; `template="mistral"` is for callers from Python.
    Raises ValueError for a tokenizer with the control tokens of no template.
    """
    for control, template in FAMILY.items():
        if control in tokenizer.special:
            return template
    raise ValueError(f"no chat template suits this tokenizer: it has none of the control tokens {', '.join(FAMILY)}")


def template_ids(tokenizer: Tokenizer, template: str = "qwen_1_5") -> tuple[list[int], list[int]]:
    """The ids before and after the user's words, tokenised on their own as V-NIAH does (Qwen2: 14 and 5)."""
    pre, post = get_template(tokenizer, template)
    return tokenizer.encode(pre, special=True), tokenizer.encode(post, special=True)


def prompt(tokenizer: Tokenizer, text: str, image_tokens: Sequence[int] = (), template: str = "qwen_1_5") -> list[int]:
    """Return the ids of the question `text`; the answer follows them.

    image_tokens: visual tokens of each picture, in the order of the placeholders `<image>`. A text without
    placeholders gets them in front, then a newline. The string is cut at placeholders and control tokens and
    each piece is tokenised on its own, as in the release. Raises ValueError for an unknown template, for one
    whose control tokens the tokenizer lacks, and when placeholders and pictures differ in number.
    """
    pre, post = get_template(tokenizer, template)
    if image_tokens and PLACEHOLDER not in text:
        text = " ".join([PLACEHOLDER] * len(image_tokens)) + "\n" + text
    check_count(text.count(PLACEHOLDER), image_tokens)
    return encode_with_images(tokenizer, *add_spaces(template, pre, text, post), iter(image_tokens))


def follow_up(tokenizer: Tokenizer, text: str, template: str = "qwen_1_5") -> list[int]:
    """Return the ids that continue a dialogue after an answer: its end, and the user's next turn `text`.

    The next answer follows them. Raises ValueError as `prompt` does; a follow-up shows no pictures.
    """
    _, post = get_template(tokenizer, template)
    check_count(text.count(PLACEHOLDER), ())
    return encode_with_images(tokenizer, *add_spaces(template, NEXT_TURN[template], text, post), iter(()))


def turn(tokenizer: Tokenizer, text: str, image_tokens: Sequence[int], template: str, first: bool) -> list[int]:
    """Return a question's ids that are not in the cache yet: those after the pictures, else `follow_up`'s."""
    if not first:
        return follow_up(tokenizer, text, template)
    ids = prompt(tokenizer, text, image_tokens, template)
    return ids[len(ids) - ids[::-1].index(IMAGE) :] if image_tokens else ids


def example(
    tokenizer: Tokenizer,
    turns: Sequence[tuple[str, str]],
    image_tokens: Sequence[int] = (),
    template: str = "qwen_1_5",
    clean: bool = True,
) -> tuple[list[int], list[int]]:
    """(ids, labels) of one training sample, of equal length; labels are not shifted (`pad` does that).

    turns: ("user" or "assistant", text); an assistant's turn in front is dropped, as in the release.
    image_tokens: as in `prompt`; only the user's texts hold placeholders, and one that is alone in its text
    moves to the front. template: "qwen_1_5" for instruction tuning; "plain" for the projector's stage:
    picture, caption, newline, of which the last two are trained (the user's words are dropped). clean=False:
    the release's labels, newlines and order. Raises ValueError as `prompt` does, and for unknown roles.
    """
    turns = list(turns[1:] if turns and turns[0][0] == "assistant" else turns)
    if not turns or any(role not in ("user", "assistant") for role, _ in turns):
        raise ValueError(f"expected turns of 'user' and 'assistant', found {[role for role, _ in turns]}")
    check_count(sum(text.count(PLACEHOLDER) for role, text in turns if role == "user"), image_tokens)
    if template == "plain":
        return caption(tokenizer, turns, image_tokens)
    if template != "qwen_1_5":
        raise ValueError(f"template {template!r} is for questions only; train with 'qwen_1_5' or 'plain'")
    get_template(tokenizer, template)
    return (clean_chat if clean else released_chat)(tokenizer, turns, iter(image_tokens))


def pad(examples: Sequence[tuple[list[int], list[int]]], pad_id: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """(ids_BT, targets_BT), int64, padded on the right to the longest of `examples`, T a multiple of `multiple`.

    targets_BT[b, t] is the label of token t + 1, so that position t predicts it; the last one is IGNORE.
    """
    length = -(-max(len(ids) for ids, _ in examples) // multiple) * multiple
    ids_BT = torch.full((len(examples), length), pad_id)
    targets_BT = torch.full((len(examples), length), IGNORE)
    for row, (ids, labels) in enumerate(examples):
        assert len(ids) == len(labels)
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        targets_BT[row, : len(ids) - 1] = torch.tensor(labels[1:])
    return ids_BT, targets_BT


# ---- the three kinds of samples ------------------------------------------------------------------


def clean_chat(tokenizer: Tokenizer, turns: Sequence, image_tokens: Iterator[int]) -> tuple[list[int], list[int]]:
    """Ids as a prompt has them, but one picture inside a text moves to its front; labels on the assistant's words.

    Its <|im_end|> and the newline after it have labels, too.
    """
    ids = tokenizer.encode(SYSTEM, special=True)
    labels = [IGNORE] * len(ids)
    end = tokenizer.encode("<|im_end|>\n", special=True)
    for role, text in turns:
        if role == "user":
            text_ids = encode_with_images(
                tokenizer, "<|im_start|>user\n", image_first(text), "<|im_end|>\n", image_tokens
            )
            ids += text_ids
            labels += [IGNORE] * len(text_ids)
        else:
            header = tokenizer.encode("<|im_start|>assistant\n", special=True)
            text_ids = tokenizer.encode(text) + end
            ids += header + text_ids
            labels += [IGNORE] * len(header) + text_ids
    return ids, labels


def released_chat(tokenizer: Tokenizer, turns: Sequence, image_tokens: Iterator[int]) -> tuple[list[int], list[int]]:
    """Ids and labels as released: structural tokens trained, pictures in front, two newlines after them."""
    start, newline = tokenizer.special["<|im_start|>"], tokenizer.encode("\n")
    end = [tokenizer.special["<|im_end|>"], *newline]
    words = tokenizer.encode("system") + newline + tokenizer.encode("You are a helpful assistant.")
    ids, labels = [start, *words, *end], [start] + [IGNORE] * len(words) + end
    for role, text in turns:
        header, text_ids = tokenizer.encode(role) + newline, []
        if role == "user" and PLACEHOLDER in text:
            text = image_first(text)
            for _ in range(text.count(PLACEHOLDER)):
                header += [IMAGE] * next(image_tokens)
            header += newline  # the first of two: the text itself still begins with one
            text = text.replace(PLACEHOLDER, "")
        text_ids = tokenizer.encode(text)
        ids += [start, *header, *text_ids, *end]
        trained = text_ids if role == "assistant" else [IGNORE] * len(text_ids)
        labels += [start] + [IGNORE] * len(header) + trained + end
    return ids, labels


def caption(tokenizer: Tokenizer, turns: Sequence, image_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """A captioned picture for the projector's stage: no chat tokens, no question."""
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise ValueError(f"template 'plain' needs one question and one caption, found {len(turns)} turn(s)")
    text_ids = tokenizer.encode(turns[1][1] + "\n")
    picture = [IMAGE] * sum(image_tokens)
    return picture + text_ids, [IGNORE] * len(picture) + text_ids


# ---- templates, counts, pictures -----------------------------------------------------------------


def get_template(tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    """The (pre, post) strings of a template whose control tokens the tokenizer has."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; known are {', '.join(sorted(TEMPLATES))}")
    pre, post = TEMPLATES[template]
    if missing := set(CONTROL.findall(pre + post + NEXT_TURN[template])) - set(tokenizer.special):
        raise ValueError(
            f"template {template!r} needs control tokens that this tokenizer lacks: {sorted(missing)}; "
            "choose the template of the model's family"
        )
    return pre, post


def add_spaces(template: str, pre: str, text: str, post: str) -> tuple[str, str, str]:
    """Spaces around the user's words in the templates that write them between words of their own."""
    if template in ("vicuna", "mistral"):
        return pre + " ", text, " " + post.lstrip(" ")
    return pre, text, post


def check_count(placeholders: int, image_tokens: Sequence[int]) -> None:
    """One placeholder per picture, and no empty pictures."""
    if placeholders != len(image_tokens):
        raise ValueError(
            f"the text has {placeholders} placeholder(s) {PLACEHOLDER} for {len(image_tokens)} picture(s); "
            "write one for each"
        )
    if any(n < 1 for n in image_tokens):
        raise ValueError(f"each picture needs at least one visual token, found {list(image_tokens)}")


def image_first(text: str) -> str:
    """A text with one placeholder, inside or behind, gets it in front with a newline, as in the release."""
    if text.count(PLACEHOLDER) != 1 or text.startswith(PLACEHOLDER):
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}"


def encode_with_images(tokenizer: Tokenizer, pre: str, text: str, post: str, image_tokens: Iterator[int]) -> list[int]:
    """Ids of pre + text + post, control tokens in pre and post only, the next picture at each placeholder.

    Pieces of plain text that touch are tokenised together ("user\n" and the first words), as in one string.
    """
    *pre, before = tokenizer.split(pre)
    after, *post = tokenizer.split(post)
    first, *rest = (before + text + after).split(PLACEHOLDER)
    ids = tokenizer.encode("".join(pre), special=True) + tokenizer.encode(first)
    for piece in rest:
        ids += [IMAGE] * next(image_tokens) + tokenizer.encode(piece)
    return ids + tokenizer.encode("".join(post), special=True)


# ---- asking: longva.py's settings, and what a person types ---------------------------------------

TINY_MODEL = runs.TINY / "longva"
QUESTION = "What is in the picture?"
FRAMES = 32  # of a video, where neither --frames nor --fps says how many
CHAT = 4096  # tokens of cache space reserved for a chat
ENDS = ("exit", "quit", "/exit", "/quit")  # what is typed to end a chat


@dataclass(frozen=True)
class Settings:
    """The settings of longva.py."""

    question: str | None = setting(None, f"the question (ours) [{QUESTION}]", positional=True)
    image: tuple[Path, ...] = setting((), "a picture file; several: --image A --image B (ours)")
    video: Path | None = setting(None, "a video file, or a folder of pictures (ours)")
    frames: int | None = setting(None, "frames taken evenly from the video; none: at most 32 (Table 4: 8 to 384)")
    fps: float | None = setting(None, "frames per second to take, instead of --frames (Sec. 4: 1)")
    weights: Path = setting(TINY_MODEL, "model folder (ours)")
    chat: bool = setting(False, "read more questions about the same input from stdin, one a line (ours)")
    max_tokens: int = setting(256, "tokens of an answer, at most (ours)")
    temperature: float | None = setting(None, "0: the most probable token; none: the folder's (release)")
    top_p: float | None = setting(
        None, "sample from the most probable tokens with this sum; none: the folder's (release)"
    )
    top_k: int | None = setting(
        None, "sample from this many most probable tokens, 0: all; none: the folder's (release)"
    )
    repetition_penalty: float | None = setting(
        None, "penalty on tokens of the answer so far; none: the folder's (release)"
    )
    seed: int = setting(0, "random seed for sampling (ours)")
    plan: bool = setting(False, "print the memory needed and the most frames that fit; load nothing (ours)")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "of weights and cache; auto: bf16 on a GPU (ours)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute (ours)")

    def __post_init__(self):
        at_least(self, frames=1, fps=0.001, max_tokens=1, seed=0)
        if os.path.isfile(self.question or ""):
            raise ValueError(f"{self.question} is a file where the question should stand; write --image before each")
        if self.video and self.image:
            raise ValueError("give either --image FILE or --video FILE to look at: one of them, not both")
        if self.fps and self.frames:
            raise ValueError("--fps and --frames both say how many frames to take; give one of them")
        if self.plan and (self.image or self.fps):
            raise ValueError("--plan counts frames; give --frames, without --image and --fps")

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen: as the model folder says, but for the flags that were given."""
        given = {f.name: getattr(self, f.name) for f in fields(Sampling)}
        return replace(read_sampling(self.weights), **{name: x for name, x in given.items() if x is not None})

    @property
    def rate(self) -> dict[str, float | str]:
        """Which frames of the video to take, as arguments of video.frames."""
        if self.fps:
            return {"fps": self.fps}
        return {"count": self.frames or FRAMES, "shorter": "refuse" if self.frames else "all"}

    @property
    def text_tokens(self) -> int:
        """Tokens of cache space for answers and further questions."""
        return self.max_tokens + (CHAT if self.chat else 0)


def note(text: str) -> None:
    """Print a remark on rank 0, to stderr: stdout has the answers alone."""
    print0(f"({text})", file=sys.stderr, flush=True)


def note_length(tokens: int, trained: int) -> None:
    """Say so where an input is four times longer than any sequence that the model was trained on, or more."""
    if tokens >= 4 * trained:
        note(f"{tokens:,} tokens, but config.json says {trained:,}: if it was trained on no more, expect wrong answers")


def questions(cfg: Settings, broadcast: Callable[[Callable[[], str]], str]) -> Iterator[str]:
    """Yield the command line's question; then, in a chat, each line of stdin until its end.

    broadcast(read): what `read()` returns on rank 0, on every rank; a person types to rank 0 alone.
    """
    if cfg.question or not cfg.chat:
        yield cfg.question or QUESTION
    if cfg.chat:
        note("one line, one question; exit or Ctrl-D ends")
    while cfg.chat and (line := broadcast(read_question)):
        yield line


def read_question() -> str:
    """Read the next question that is typed; "" at the end of stdin, or when an end is asked for."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            importlib.import_module("readline")  # arrow keys and history; a system may lack it
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return ""
        if line.lower() in ENDS:
            return ""
        if PLACEHOLDER in line:
            note(f"{PLACEHOLDER} cannot be asked for in a chat: the pictures come before the first question")
        elif line:
            return line
