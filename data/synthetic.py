"""A small world made from a seed: its words, its stories, its pictures, its film and its needles.

What      Everything that the tiny models are trained and tested on. Nothing is downloaded, and nothing repeats between
          training and test: each stream of random numbers is seeded with (purpose, seed, number), so that a sample is
          a function of these three alone.
Paper     Stands in for SlimPajama (Sec. 3.1), for the LLaVA-1.6 pictures (Sec. 3.2), and for the film and needles of
          V-NIAH (Sec. 4).
Run       imported; python -m data.tiny.make tokenizer writes the tokenizer
Dimensions  B batch   T tokens   Y X pixels   C colour channels
Differs   The loss is taken only where the text so far determines the next token (a fact stated before is asked for);
          the words between are drawn at random, and no model could learn them.
"""

import re
import string
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import niah, tokenizer
from data.chat import IGNORE

TOKENIZER = Path(__file__).parent / "tiny" / "tokenizer"
SIDE = 32  # pixels of a grid's side; 336 in the real model

# ---- words ---------------------------------------------------------------------------------------

THINGS = (  # in pictures and stories
    "star moon heart cross ring square triangle diamond arrow house tree fish flag key cup bell"
).split()
NOUNS = (  # in stories only
    "apple boat bridge candle chair clock cloud crown door drum fan feather fire flower fork gate glove hammer "
    "hat horn knife lamp leaf lock mirror nail needle pearl pen pipe plate rope saddle shell shoe spoon table tent"
).split()
COLOURS = {
    "red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 250), "yellow": (245, 225, 50),
    "purple": (175, 60, 220), "orange": (250, 145, 30), "pink": (250, 130, 190), "white": (250, 250, 250),
}  # fmt: skip
PEOPLE = "farmer sailor baker teacher king child doctor painter".split()
MOODS = "old young quiet happy tired brave kind wise".split()
MOVES = "walks runs looks comes goes turns sails rides".split()
PLACES = "river village forest hill market harbour garden road".split()
OTHERS = [*PEOPLE, *MOODS, *MOVES, *PLACES, *COLOURS]
SENTENCES = (
    " The {mood} {person} {moves} to the {place}.",
    " A {person} {moves} from the {mood} {place}.",
    " In the {place} a {mood} {person} {moves}.",
)
FACTS = (" The {thing} shows {number}.", " A {thing} with the number {number}.", " There is a {thing}: {number}.")
ASK_NUMBER = "Which number is on the {thing}?"
ASK_COLOUR = "Which colour is the {thing}?"
ASKED = "<|im_start|>user\n" + ASK_NUMBER + "<|im_end|>\n<|im_start|>assistant\n{number}<|im_end|>\n"
FORMS = (*FACTS, " {thing}{number}", ASKED, ASKED)
CAPTION = " a {colour} {thing} with the number {number}."
BARE = " a {colour} {thing}."


WORD = re.compile(r" ?[A-Za-z]+")
TOKEN = re.compile(r" ?[A-Za-z]+|.")


def lexicon() -> list[str]:
    """Every word of the small world as it stands in text, its space in front: each becomes one token."""
    templates = [niah.PREFIX, niah.NEEDLE, niah.QUESTION, *SENTENCES, *FACTS, ASK_NUMBER, ASK_COLOUR]
    templates += [CAPTION, BARE]
    plain = [literal for text in templates for literal, *_ in string.Formatter().parse(text)]
    plain += ["user", "assistant", "system\nYou are a helpful assistant."]
    lists = [THINGS, NOUNS, COLOURS, PEOPLE, MOODS, MOVES, PLACES, CITIES]
    words = [word for text in plain for word in WORD.findall(text)]
    return sorted({*words, *COLOURS, *(" " + word for some in lists for name in some for word in name.split())})


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE in Qwen2's file format that knows every word of the small world."""
    vocab, merges = tokenizer.train_bpe(lexicon())
    tokenizer.write_qwen2(folder, vocab, merges)


# ---- stories -------------------------------------------------------------------------------------
CITIES = [niah.CITY, *niah.DISTRACTORS]

# A text is a list of pieces (text, learn): `learn` marks what the text before determines. Pieces end
# where tokens end, so that the marks survive tokenising.

Pieces = list[tuple[str, bool]]


def filler_sentence(rng: np.random.Generator) -> str:
    """Return a filler sentence."""
    words = {"mood": MOODS, "person": PEOPLE, "moves": MOVES, "place": PLACES}
    chosen = {name: some[rng.integers(len(some))] for name, some in words.items()}
    return SENTENCES[rng.integers(len(SENTENCES))].format(**chosen)


def draw_numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Return numbers of that many digits which begin alike, by none to all but one digit; of half of the texts, those
    of three digits are made from three digits.

    Else a model learns to copy each digit from behind the digit before it, and errs where that one stands twice.
    """
    some = rng.permutation(10)[:3] if digits > 2 and rng.random() < 0.5 else np.arange(10)
    alike = rng.integers(digits)
    first, *others = some[rng.integers(len(some), size=(count, digits))].tolist()
    return ["".join(map(str, first[:alike] + one[alike:])) for one in (first, *others)]


def pair_lookup(rng: np.random.Generator, tokens: int, most: int) -> Pieces:
    """Nouns with a word or two digits each, round after round in a new order: " star king moon red moon red star king".

    From the second round on the text determines what belongs to a noun. This text teaches in-context lookup from
    scratch: every second token is a question. Words come first, as digits repeat within a text, so that lookup forms
    late from them; of two digits both are looked up by their noun. Cities are among the nouns: in magic numbers alone
    they are asked for too rarely for the model to tell them apart.
    """
    nouns = rng.permutation(THINGS + NOUNS[:13] + CITIES)[: max(1, min(most, tokens // 6))]
    if most > 8 and rng.random() < 0.5:
        nouns = nouns[: (len(nouns) + 1) // 2]  # so that each is asked for as often
        own = [[*number] for number in draw_numbers(rng, len(nouns), 2)]
    else:
        words = NOUNS[20:] + OTHERS
        own = [[" " + words[rng.integers(len(words))]] for _ in nouns]
    pieces: Pieces = []
    while len(pieces) <= tokens:
        known = bool(pieces)
        for i in rng.permutation(len(nouns)):
            pieces += [(" " + nouns[i], False), *((token, known) for token in own[i])]
    return pieces


def repeated_facts(
    rng: np.random.Generator, tokens: int, most: int, forms: Sequence[str] = FORMS, most_digits: int = 3
) -> Pieces:
    """The same facts stated and asked repeatedly, in every form: each time but the first, the text has the number."""
    facts = max(2, min(most, tokens // 16))
    nouns = rng.permutation(THINGS + NOUNS + CITIES)[:facts]
    digits = int(rng.integers(1, most_digits + 1))
    numbers = draw_numbers(rng, len(nouns), digits)
    pieces: Pieces = []
    length = 0
    while length < tokens:
        known = bool(pieces)
        for i in rng.permutation(len(nouns)):
            form = forms[rng.integers(len(forms))]
            before, after = form.format(thing=nouns[i], number="#").split("#")
            pieces += [(before, False), *((digit, known) for digit in numbers[i]), (after, False)]
            length += 1 + digits + len(WORD.findall(before))
    return pieces


def near_facts(rng: np.random.Generator, tokens: int, most: int) -> Pieces:
    """Facts whose digits follow their noun at once or after one word: a step between pairs and all forms of a fact."""
    return repeated_facts(rng, tokens, most, (FORMS[3], FORMS[0]), 2)


def captions(rng: np.random.Generator, tokens: int, most: int) -> Pieces:
    """Objects as loose words, then the same as sentences: " star7 red a red star with the number 7."

    The same sentences caption pictures: what visual tokens must say in the words' place (Sec. 3.2).
    """
    pieces: Pieces = []
    length = 0
    while length < tokens:
        shown = draw_objects(rng, int(rng.integers(1, min(most, 4) + 1)))
        for thing, colour, number in shown:
            words = [" " + thing, " " + colour] + [str(number)] * (number is not None)
            pieces.append(("".join(words[i] for i in rng.permutation(len(words))), False))
        for one in shown:
            pieces += [(word, True) for word in TOKEN.findall(describe(*one))]
        pieces.append(("\n", True))
        length += 12 * len(shown)
    return pieces


def stated_in_story(
    rng: np.random.Generator, numbers: list[str], sentence: Callable[[int], str], repeats: Sequence[bool], fillers: int
) -> Pieces:
    """Sentences that state the numbers, among filler sentences; where `repeats`, stated again further on."""
    order = [(i, False) for i in range(len(numbers))]
    for i, repeat in enumerate(repeats):
        if repeat:
            order.insert(int(rng.integers(order.index((i, False)) + 1, len(order) + 1)), (i, True))
    places = np.sort(rng.integers(0, max(0, fillers) + 1, len(order)))  # uniform: at both ends, too
    gaps = np.diff([0, *places, max(0, fillers)])
    pieces: Pieces = []
    for gap, (i, known) in zip(gaps, order):
        before, after = sentence(i).split("#")
        pieces.append(("".join(filler_sentence(rng) for _ in range(gap)) + before, False))
        pieces += [*((digit, known) for digit in numbers[i]), (after, False)]
    return [*pieces, ("".join(filler_sentence(rng) for _ in range(gaps[-1])), False)]


def facts_then_questions(rng: np.random.Generator, tokens: int, most: int) -> Pieces:
    """Facts among filler sentences, some stated twice, then a conversation that asks for some of them, each once."""
    facts = max(1, min(most, tokens // 16, 48))
    questions = max(1, min(facts, 24, (tokens - 11 * facts) // 16))
    nouns, digits = rng.permutation(THINGS + NOUNS)[:facts], rng.integers(0, 10, facts)
    repeats = rng.random(facts) < 0.5
    fillers = (tokens - 16 * questions - 8 * (facts + repeats.sum()) - 10) // 8

    def sentence(i: int) -> str:
        return FACTS[rng.integers(len(FACTS))].format(thing=nouns[i], number="#")

    story = stated_in_story(rng, [*map(str, digits)], sentence, repeats, fillers)
    asked = [(ASK_NUMBER.format(thing=nouns[i]), str(digits[i])) for i in rng.permutation(facts)[:questions]]
    return conversation_about(story, asked)


def words_then_questions(rng: np.random.Generator, tokens: int, most: int) -> Pieces:
    """Objects as loose words, each object's in any order, in long texts among filler sentences; then questions.

    Visual tokens have no order of words either. Without this text a model finds the digit behind a noun alone, and
    vision training does not form lookup.
    """
    most = max(2, min(most, len(THINGS), tokens // 19))
    shown = draw_objects(rng, int(rng.integers((most + 1) // 2, most + 1)))
    words = [[" " + thing, " " + colour] + [str(number)] * (number is not None) for thing, colour, number in shown]
    story = ["".join(some[i] for i in rng.permutation(len(some))) for some in words]
    if tokens > 512:
        story += [filler_sentence(rng) for _ in range((tokens - 20 * len(shown) - 10) // 8)]
        story = [story[i] for i in rng.permutation(len(story))]
    asked = [
        (ASK_COLOUR.format(thing=thing), colour)
        if number is None or rng.random() < 0.3
        else (ASK_NUMBER.format(thing=thing), str(number))
        for thing, colour, number in (shown[i] for i in rng.permutation(len(shown)))
    ]
    return conversation_about([("".join(story), False)], asked)


def conversation_about(story: Pieces, asked: list[tuple[str, str]]) -> Pieces:
    """The story, then questions with their answers, as a conversation."""
    pieces: Pieces = [("<|im_start|>user\n", False), *story, ("\n", False)]
    for turn, (question, answer) in enumerate(asked):
        user = "<|im_start|>user\n" if turn else ""
        pieces.append((user + question + "<|im_end|>\n<|im_start|>assistant\n", False))
        pieces += [(answer, True), ("<|im_end|>", True), ("\n", False)]
    return pieces


def magic_number_book(rng: np.random.Generator, tokens: int, most: int) -> Pieces:
    """A story with a magic number for one to six cities, some stated twice, then the questions of App. A."""
    digits = 3 if rng.random() < 0.6 else int(rng.integers(1, 3))
    cities = rng.permutation(CITIES)[: rng.integers(1, min(most, 6) + 1)]
    numbers = draw_numbers(rng, len(cities), digits)
    asked = max(1, min(len(cities), tokens // 80))
    repeats = rng.random(len(cities)) < 0.5
    room = tokens - 25 - (14 + digits) * (len(cities) + repeats.sum()) - (25 + digits) * asked

    def sentence(i: int) -> str:
        return niah.NEEDLE.format(city=cities[i], number="#")

    pieces = [(niah.PREFIX, False), *stated_in_story(rng, numbers, sentence, repeats, room // 8)]
    for turn, i in enumerate(rng.permutation(len(cities))[:asked]):
        question = niah.QUESTION.replace(niah.CITY, cities[i])
        pieces += [(question if turn == 0 else "\n" + question[question.index("Question") :], False)]
        pieces += [*((digit, True) for digit in numbers[i]), (".", True)]
    return pieces


def curriculum(part: int, tokens: int) -> dict[Callable, float]:
    """Probabilities of the kinds of text: the shortest first, and pair_lookup alone until lookup is learned."""
    if tokens <= 64:
        facts = near_facts if part < 900 else repeated_facts
        if part < 700:
            return {pair_lookup: 1.0}
        return {pair_lookup: 0.15, facts: 0.5, captions: 0.15, words_then_questions: 0.2}
    if tokens <= 512:
        short = {repeated_facts: 0.1, captions: 0.1, words_then_questions: 0.15}
        return short | {facts_then_questions: 0.2, magic_number_book: 0.45}
    return {words_then_questions: 0.3, facts_then_questions: 0.35, magic_number_book: 0.35}


def text_length(step: int, tokens: int, first_steps: int, short: int) -> int:
    """Return the tokens of each text of a step: 64 in the first steps, then `tokens`, or, if given, `short` by turns.

    Without short texts an extension forgets at 128 tokens what it had learned there: which digit of a number is next.
    """
    if step < first_steps:
        return 64
    return min(short, tokens) if short and step % 2 else tokens


def tokenised(words: tokenizer.Tokenizer, pieces: Pieces) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a text; what the text does not determine has label -100."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learn in pieces:
        piece = words.encode(text, special=True)
        ids += piece
        labels += piece if learn else [IGNORE] * len(piece)
    return ids, labels


def text_batch(words: tokenizer.Tokenizer, seed: int, part: int, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """`rows` texts of `tokens` tokens each: (ids_BT, targets_BT), int64; targets are -100 where undetermined.

    Nothing is cut off in front: a question whose answer is gone teaches a model to guess, and even 10 % of
    unanswerable questions delays the emergence of in-context lookup. A text that cannot be made to fit loses its end.
    """
    rng = np.random.default_rng([0x7E7, seed, part])
    ids_BT = torch.full((rows, tokens), words.pad_id)
    targets_BT = torch.full((rows, tokens), IGNORE)
    for row in range(rows):
        kinds = curriculum(part, tokens)
        kind = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
        most = (
            (min(3 + part // 56, 12) if kind is pair_lookup else 3)
            if tokens <= 64
            else int(3 * (tokens / 24) ** rng.random())
        )
        room = tokens + 1
        while True:
            ids, labels = tokenised(words, kind(rng, room, most))
            if kind in (pair_lookup, near_facts, repeated_facts, captions) or len(ids) <= tokens + 1 or room < 0:
                break
            room -= len(ids) - tokens
        ids, labels = ids[: tokens + 1], labels[: tokens + 1]
        ids_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets_BT[row, : len(ids) - 1] = torch.tensor(labels[1:])
    return ids_BT, targets_BT


# ---- pictures ------------------------------------------------------------------------------------

FINE = 8  # things are drawn this many times larger, then reduced: smooth edges
DIGITS = (  # five by seven dots each, rows from the top, as five-bit numbers
    (14, 17, 19, 21, 25, 17, 14), (4, 12, 4, 4, 4, 4, 14), (14, 17, 1, 2, 4, 8, 31), (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2), (31, 16, 30, 1, 1, 17, 14), (6, 8, 16, 30, 17, 17, 14), (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14), (14, 17, 17, 15, 1, 2, 12),
)  # fmt: skip
OUTLINES = {  # polygons in a unit square, y down
    "cross": [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65), (0.65, 1), (0.35, 1),
              (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)],
    "square": [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)],
    "triangle": [(0.5, 0.02), (1, 0.95), (0, 0.95)],
    "diamond": [(0.5, 0), (0.85, 0.5), (0.5, 1), (0.15, 0.5)],
    "arrow": [(0, 0.36), (0.5, 0.36), (0.5, 0.08), (1, 0.5), (0.5, 0.92), (0.5, 0.64), (0, 0.64)],
    "house": [(0.5, 0), (1, 0.45), (0.85, 0.45), (0.85, 1), (0.6, 1), (0.6, 0.65), (0.4, 0.65), (0.4, 1),
              (0.15, 1), (0.15, 0.45), (0, 0.45)],
    "tree": [(0.5, 0), (0.95, 0.7), (0.58, 0.7), (0.58, 1), (0.42, 1), (0.42, 0.7), (0.05, 0.7)],
    "flag": [(0.1, 0), (0.22, 0), (0.22, 0.06), (0.95, 0.3), (0.22, 0.55), (0.22, 1), (0.1, 1)],
    "bell": [(0.5, 0), (0.68, 0.12), (0.76, 0.6), (1, 0.82), (0, 0.82), (0.24, 0.6), (0.32, 0.12)],
    "star": [(0.5 + r * np.sin(a * np.pi / 5), 0.53 - r * np.cos(a * np.pi / 5))
             for a, r in zip(range(10), [0.53, 0.2] * 5)],
}  # fmt: skip


@cache
def outline(thing: str, pixels: int) -> np.ndarray:
    """How much of each pixel a thing of that width covers, float32[Y, X] in 0..1."""
    n = pixels * FINE
    canvas = Image.new("L", (n, n))
    draw = ImageDraw.Draw(canvas)

    def ellipse(x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        draw.ellipse([x0 * n, y0 * n, x1 * n, y1 * n], fill=fill)

    def box(x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        draw.rectangle([x0 * n, y0 * n, x1 * n, y1 * n], fill=fill)

    def polygon(points: list) -> None:
        draw.polygon([(x * n, y * n) for x, y in points], fill=255)

    if thing in OUTLINES:
        polygon(OUTLINES[thing])
    if thing == "ring":
        ellipse(0, 0, 1, 1), ellipse(0.28, 0.28, 0.72, 0.72, 0)
    elif thing == "moon":
        ellipse(0, 0, 1, 1), ellipse(0.35, -0.1, 1.25, 0.85, 0)
    elif thing == "heart":
        ellipse(0, 0.05, 0.54, 0.58), ellipse(0.46, 0.05, 1, 0.58), polygon([(0.04, 0.42), (0.96, 0.42), (0.5, 1)])
    elif thing == "fish":
        ellipse(0, 0.2, 0.75, 0.8), polygon([(0.6, 0.5), (1, 0.15), (1, 0.85)])
    elif thing == "key":
        ellipse(0, 0.25, 0.5, 0.75), ellipse(0.16, 0.41, 0.34, 0.59, 0), box(0.45, 0.42, 1, 0.58)
        box(0.7, 0.5, 0.78, 0.8), box(0.9, 0.5, 1, 0.8)
    elif thing == "cup":
        ellipse(0.5, 0.2, 1, 0.75)
        ellipse(0.62, 0.32, 0.88, 0.63, 0)
        polygon([(0, 0.1), (0.75, 0.1), (0.62, 1), (0.13, 1)])
    elif thing == "bell":
        ellipse(0.4, 0.78, 0.6, 1)
    return np.asarray(canvas.reduce(FINE), dtype=np.float32) / 255


@cache
def digit_mask(digit: int) -> np.ndarray:
    """A digit of 10 by 14 pixels, float32[Y, X] of 0 and 1."""
    dots = [[row >> (4 - x) & 1 for x in range(5)] for row in DIGITS[digit]]
    return np.kron(np.array(dots, dtype=np.float32), np.ones((2, 2), dtype=np.float32))


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A muted background: up to three colours a grid in each direction, interpolated, and noise, float32[Y, X, C].

    Large pictures must be as finely coloured as a film's frames, each of which has two or three colours: one frame
    whose background no picture had can take all the attention.
    """
    rows, cols = height // SIDE, width // SIDE
    knots = int(rng.integers(2, 3 * rows + 1)), int(rng.integers(2, 3 * cols + 1))
    coarse = rng.uniform(20, 135, (*knots, 3)).astype(np.float32)
    ways = [
        np.stack([np.interp(np.linspace(0, 1, n), np.linspace(0, 1, k), np.eye(k)[i]) for i in range(k)], axis=1)
        for n, k in ((height, coarse.shape[0]), (width, coarse.shape[1]))
    ]
    smooth = np.einsum("ya,abc,xb->yxc", ways[0], coarse, ways[1], optimize=True)
    return (smooth + rng.normal(0, rng.uniform(1, 7), (height, width, 1))).astype(np.float32)


def paste(canvas_YXC: np.ndarray, mask_YX: np.ndarray, top: int, left: int, colour: tuple) -> None:
    """Paint `colour` through a mask, in place."""
    part = canvas_YXC[top : top + mask_YX.shape[0], left : left + mask_YX.shape[1]]
    part += mask_YX[..., None] * (np.array(colour, dtype=np.float32) - part)


def draw_object(
    rng: np.random.Generator, canvas_YXC: np.ndarray, row: int, col: int, thing: str, colour: str, number: int | None
) -> None:
    """Draw a thing, and a number beside it, at a random place of grid (row, col), in place."""
    half = SIDE // 2  # pixels
    pixels = int(rng.integers(14, 17))
    top = row * SIDE + half * int(rng.integers(2))
    left = col * SIDE
    y, x = rng.integers(0, half - pixels + 1, 2)
    tint = tuple(np.clip(np.array(COLOURS[colour]) + rng.normal(0, 8, 3), 0, 255))
    paste(canvas_YXC, outline(thing, pixels), top + y, left + x, tint)
    if number is not None:
        y, x = rng.integers(0, 3), rng.integers(0, 6)
        paste(canvas_YXC, digit_mask(number), top + y, left + half + x, (250, 250, 250))


def to_image(canvas_YXC: np.ndarray) -> Image.Image:
    """The picture of a canvas."""
    return Image.fromarray(np.clip(canvas_YXC, 0, 255).astype(np.uint8))


def compose_picture(
    rng: np.random.Generator, rows: int, cols: int, shown: list[tuple[str, str, int | None]]
) -> Image.Image:
    """A picture of rows x cols grids on one background, with each (thing, colour, number) in a grid of its own."""
    canvas_YXC = draw_background(rng, rows * SIDE, cols * SIDE)
    places = sorted(rng.permutation(rows * cols)[: len(shown)])
    for place, (thing, colour, number) in zip(places, shown):
        draw_object(rng, canvas_YXC, *divmod(int(place), cols), thing, colour, number)
    return to_image(canvas_YXC)


def draw_objects(rng: np.random.Generator, count: int, bare: float = 0.2) -> list[tuple[str, str, int | None]]:
    """Up to 16 different things, each with a colour and, unless it is left bare, a number."""
    things = rng.permutation(THINGS)[:count]
    colours = rng.choice(list(COLOURS), len(things))
    numbers = [None if rng.random() < bare else int(rng.integers(10)) for _ in things]
    return list(zip(map(str, things), map(str, colours), numbers))


# ---- film and needles ----------------------------------------------------------------------------


def film_with_things(seed: int) -> Iterator[tuple[Image.Image, str | None]]:
    """As `film`: (frame, the thing that it shows or None)."""
    rng = np.random.default_rng([0xF11, seed])
    while True:
        length = int(rng.integers(4, 25))
        start_YXC, end_YXC = (draw_background(rng, SIDE, SIDE) for _ in range(2))
        moving_object = draw_objects(rng, 1, bare=1.0)[0] if rng.random() < 0.5 else None
        for t in range(length):
            frame_YXC = start_YXC + (end_YXC - start_YXC) * (t / length)
            is_shown = moving_object is not None and rng.random() < 0.3
            if is_shown:
                draw_object(rng, frame_YXC, 0, 0, *moving_object)
            yield to_image(frame_YXC), moving_object[0] if is_shown else None


def film(seed: int) -> Iterator[Image.Image]:
    """An endless film of scenes: backgrounds that change into each other, and now and then a thing, never a number."""
    return (frame for frame, _ in film_with_things(seed))


def draw_needles(seed: int, count: int, distractors: int = 0) -> tuple[list[niah.Needle], list[niah.Needle]]:
    """(needles, distractors): frames that show a thing with a number, each with its question and answer.

    Distractors show things that no needle shows. Things and digits come in turn, so that no answer is frequent.
    """
    rng = np.random.default_rng([0x4EE, seed])
    things = [str(thing) for thing in rng.permutation(THINGS)]
    digits = rng.permutation(10)

    def sign(i: int, thing: str) -> niah.Needle:
        number, colour = int(digits[i % 10]), str(rng.choice(list(COLOURS)))
        picture = compose_picture(rng, 1, 1, [(thing, colour, number)])
        return niah.Needle(f"{i:02}-{thing}-{number}", picture, ASK_NUMBER.format(thing=thing), str(number))

    others, asked = things[:distractors], things[distractors:]
    return [sign(i, asked[i % len(asked)]) for i in range(count)], [
        sign(3 * i, thing) for i, thing in enumerate(others)
    ]


def story(seed: int, tokens: int) -> str:
    """At least `tokens` tokens of sentences, the haystack of the text needle test."""
    rng = np.random.default_rng([0x570, seed])
    return "".join(filler_sentence(rng) for _ in range(tokens // 7 + 1))


# ---- training pictures ---------------------------------------------------------------------------


def grids_of(rng: np.random.Generator, fewest: int, most: int) -> tuple[int, int]:
    """Rows and columns of a picture of about so many grids, of any shape."""
    area = int(rng.integers(fewest, most + 1))
    rows = int(rng.integers(1, int(area**0.5) + 1))
    cols = area // rows
    return (cols, rows) if rng.random() < 0.3 else (rows, cols)


def describe(thing: str, colour: str, number: int | None) -> str:
    """Return a thing's caption."""
    return (
        BARE.format(thing=thing, colour=colour)
        if number is None
        else CAPTION.format(thing=thing, colour=colour, number=number)
    )


def captioned_grids(seed: int, step: int, count: int) -> tuple[list[Image.Image], list[str]]:
    """`count` pictures of one grid and their captions, for the tower; no caption comes twice.

    A batch has few colours and few digits but every thing, so that things must be told apart by their shape.
    """
    rng = np.random.default_rng([0x70E, seed, step])
    colours, numbers = rng.permutation(list(COLOURS))[:2], [None, *map(int, rng.permutation(10)[:4])]
    every = [(thing, str(colour), number) for thing in THINGS for colour in colours for number in numbers]
    shown = [every[i] for i in rng.permutation(len(every))[:count]]
    return [compose_picture(rng, 1, 1, [one]) for one in shown], [describe(*one) for one in shown]


def captioned(seed: int, index: int) -> tuple[list[Image.Image], list[tuple[str, str]]]:
    """A picture of one grid and a caption that tells what it shows, for the projector."""
    rng = np.random.default_rng([0xCA9, seed, index])
    shown = draw_objects(rng, 1)
    return [compose_picture(rng, 1, 1, shown)], [("user", "<image>"), ("assistant", describe(*shown[0]))]


def conversation(seed: int, index: int, most: int) -> tuple[list[Image.Image], list[tuple[str, str]]]:
    """A picture of up to `most` grids and a conversation about numbers and colours in it.

    Up to three things stand there many times, as in a film. One that has a number shows it once, and only the number is
    asked for. Others have none, and nobody asks for them. With one copy at most, a model looks at the wrong one of the
    ten in a film of 1,024 frames.
    Half of the pictures are sparse once they are large: one to four things in as many grids as allowed. Else the
    attention that a film's empty frames take is never trained away: each takes little, but a film has hundreds.
    """
    rng = np.random.default_rng([0x5F7, seed, index])
    sparse = most > len(THINGS) and rng.random() < 0.5
    rows, cols = grids_of(rng, most if sparse else 1, most)
    most_things = 4 if sparse else min(rows * cols, len(THINGS))
    fewest_things = 1 if sparse else (most_things + 1) // 2
    shown = draw_objects(rng, int(rng.integers(fewest_things, most_things + 1)), bare=0.3)
    numbered = [thing for thing, _, number in shown if number is not None]
    absent = [thing for thing in THINGS if thing not in [one[0] for one in shown]]
    repeatable = [*numbered, *rng.permutation(absent)[: len(numbered) if sparse else None]]
    free = min(rows * cols - len(shown), rows * cols // (4 if sparse else 2))
    repeated = list(map(str, rng.permutation(repeatable)[: rng.integers(1, 4)]))
    copies = [str(rng.choice(repeated)) for _ in range(rng.integers(free + 1))] if repeated else []
    without_number = [(thing, str(rng.choice(list(COLOURS))), None) for thing in copies]
    turns = []
    for i in rng.permutation(len(shown)):
        thing, colour, number = shown[i]
        if number is None or (thing not in repeated and rng.random() < 0.15):
            turns += [("user", ASK_COLOUR.format(thing=thing)), ("assistant", colour)]
        else:
            turns += [("user", ASK_NUMBER.format(thing=thing)), ("assistant", str(number))]
    turns[0] = ("user", "<image>\n" + turns[0][1])
    mixed = [*shown, *without_number]
    return [compose_picture(rng, rows, cols, [mixed[i] for i in rng.permutation(len(mixed))])], turns


def preference(seed: int, index: int, frames: int) -> tuple[list, list[list[tuple[str, str]]]]:
    """A film of so many frames, and two answers to the question which number a thing has.

    Where it has one, that is preferred to the thing's colour; where it has none, its colour is preferred to any number:
    a model that was never asked about what is not there makes one up. As a conversation: ([the film's frames], [the
    dialogue with the preferred answer, with the rejected one]).
    """
    rng = np.random.default_rng([0xD90, seed, index])
    shown = draw_objects(rng, frames, bare=0.5)
    thing, colour, number = shown[0]
    answers = [colour, str(int(rng.integers(10)))] if number is None else [str(number), colour]
    film = [compose_picture(rng, 1, 1, shown[i : i + 1]) for i in rng.permutation(frames)]
    return [film], [[("user", "<image>\n" + ASK_NUMBER.format(thing=thing)), ("assistant", said)] for said in answers]
