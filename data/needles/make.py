"""Draw the needles of data/needles: pictures that no video has, each with a question that only it answers.

What      Five kinds, 14 needles each: text (a number or a name to read), colour (of one thing), count (2 to 9),
          place (where is the animal? four options), object (which thing is there? four options).
          Pictures are put together from shapes, strokes and letters described in short lines of text. A description
          is a list of shapes, later ones on top: "o red 50 40 20 10; l ink 2 0 90 100 90". The kinds of shape:
              o colour x y rx ry            ellipse
              b colour x0 y0 x1 y1 [r]      box, its corners rounded by r
              p colour x y x y ...          polygon            c colour x y ...   the same with a smooth outline
              l colour width x y x y ...    stroke             s colour width ... the same, smooth
              t colour x y height words     letters around (x, y), "_" for a space; height is a capital's
              d tint name x y size          a drawing of ANIMALS or THINGS, its lower side's middle at (x, y)
          Small letters give o, b, p, c a dark edge, capital ones none. "*" is the tint given with the drawing.
          Units are per cent of the drawing's side, y down.
Paper     Sec. 4: each needle is a picture made up so that the question cannot be answered without it. The paper's
          five (Table 8) may not be redistributed; these take their place.
Run       python -m data.needles.make --out data/needles      draws the shipped needles again, pixel for pixel
          python -m data.needles.make --out FOLDER --seed 2   other counts, places and letters
Dimensions  Y X pixels (3 x 3 for one of the picture)   C colour channels
Differs   The paper's needles are photographs and pictures made by a model; these are drawn. Only sums, products and
          comparisons of rounded numbers, and no font file: neither Pillow's version nor the machine changes a pixel.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from data.flags import at_least, run, setting
from data.niah import Needle, write_needles

PER_KIND = 14  # needles of each kind
SEED = 1  # of the shipped needles
SHORT = "\nAnswer the question using a single word or phrase."  # the release's words, as in LLaVA's training data
LETTER = "\nAnswer with the option's letter from the given choices directly."

# ---- drawing -------------------------------------------------------------------------------------

SIDE = 336  # pixels of a picture's side: one grid
FINE = 3  # each pixel is the mean of FINE x FINE canvas pixels
SHADES = 64  # colours of a picture, which its PNG names by number
EDGE = 0.6  # width of dark edges, per cent of the picture

PAINT = {
    "red": (214, 32, 40), "orange": (248, 136, 20), "yellow": (252, 216, 40), "green": (36, 150, 64),
    "blue": (36, 88, 220), "purple": (132, 52, 180), "pink": (252, 136, 184), "brown": (120, 70, 34),
    "black": (16, 16, 20), "white": (252, 252, 252), "ink": (40, 36, 48), "grey": (150, 154, 164),
    "silver": (206, 210, 218), "sky": (176, 220, 244), "dusk": (244, 208, 188), "night": (32, 36, 72),
    "grass": (140, 196, 108), "sand": (236, 212, 152), "sea": (84, 160, 204), "wood": (186, 132, 80),
    "wall": (234, 226, 206), "mint": (204, 232, 214), "lilac": (222, 212, 240), "floor": (200, 172, 140),
    "leaf": (84, 160, 84), "cream": (248, 240, 220), "skin": (244, 200, 160), "stone": (128, 124, 128),
}  # fmt: skip

GLYPHS = {  # strokes of (x, y) as hexadecimal digits; y 0 is a capital's top, a the line, d the lowest; ~ is smooth
    "A": "0a306a/1757", "B": "30000a3a/0535/~30515435/~3566693a", "C": "~62402003072a4a68",
    "D": "20000a2a/~20516466592a", "E": "60000a6a/0555", "F": "60000a/0555", "G": "~62402003072a4a68/686636",
    "H": "000a/606a/0565", "I": "000a", "J": "~50574a1a07", "K": "000a/6006/246a", "L": "000a6a",
    "M": "0a0046808a", "N": "0a006a60", "O": "~30110307193a5967635130", "P": "0a0030/0636/~30616536",
    "Q": "~30110307193a5967635130/477b", "R": "0a0030/0636/~30616536/366a", "S": "~624020021456684a2a08",
    "T": "0060/303a", "U": "0006/6066/~06193a5966", "V": "003a60", "W": "002a436a80", "X": "006a/600a",
    "Y": "003560/353a", "Z": "00600a6a",
    "a": "545a/~55341507193a59", "b": "000a/~05244557492a09", "c": "~55341507193a59", "d": "505a/~55341507193a59",
    "e": "0757/~5745241507193a59", "f": "~402123/232a/0444", "g": "545b/~55341507193a59/~5b4d2d0c",
    "h": "000a/~06244557/575a", "i": "040a/0101", "j": "242b/~2b1d0d/2121", "k": "000a/5407/265a", "l": "000a",
    "m": "040a/~062446/464a/~466486/868a", "n": "040a/~06244557/575a", "o": "~341507193a59675534",
    "p": "040d/~05244557492a09", "q": "545d/~55341507193a59", "r": "040a/~062444", "s": "~553414051747594a2a09",
    "t": "2128/~283a4a/0444", "u": "0407/~07192a4957/545a", "v": "043a64", "w": "042a456a84", "x": "045a/540a",
    "y": "043a/642d", "z": "04540a5a",
    "0": "~30110307193a5967635130", "1": "02202a/0a4a", "2": "~02204062550a/0a6a",
    "3": "~012040625425/~2556684a2a09", "4": "4a400767", "5": "601005/~053466684a2a09", "6": "~502206193a5967553406",
    "7": "00602a", "8": "~30111435545130/~3506093a696635", "9": "~1a486451301103153664", ".": "0a0a",
    ":": "0505/0a0a", "-": "0636", "'": "0002", "$": "~624020021456684a2a08/303a", "!": "0007/0a0a",
}  # fmt: skip


def smooth(points: np.ndarray, closed: bool) -> np.ndarray:
    """Return a curve through the points, float[n, 2], as many short pieces (Catmull-Rom)."""
    if closed:
        before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
    else:
        before, after = np.vstack([points[:1], points[:-1]]), np.vstack([points[1:], points[-1:]])
    ahead, beyond = (after, np.roll(after, -1, axis=0)) if closed else (after, np.vstack([after[1:], after[-1:]]))
    pieces = []
    for t in np.arange(8) / 8:
        pieces.append(
            points
            + t / 2 * (ahead - before)
            + t * t / 2 * (2 * before - 5 * points + 4 * ahead - beyond)
            + t * t * t / 2 * (3 * points - before - 3 * ahead + beyond)
        )
    curve = np.stack(pieces, axis=1).reshape(-1, 2)
    return curve if closed else curve[:-7]


def letters(text: str) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the strokes of a line of text as (points, smooth?); a capital is 10 high, the line starts at x = 0."""
    x = 0.0
    for letter in text:
        strokes = GLYPHS[letter].split("/") if letter != "_" else []
        wide = 2.0
        for stroke in strokes:
            digits = stroke.lstrip("~")
            points = np.array([int(digit, 16) for digit in digits], dtype=float).reshape(-1, 2)
            wide = max(wide, points[:, 0].max()) if letter not in "Iil.:'!1" else points[:, 0].max()
            yield points + np.array([x, 0]), stroke.startswith("~")
        x += wide + 3.2


class Canvas:
    """A square canvas, white at first; later shapes lie on top."""

    def __init__(self):
        self.canvas_YXC = np.full((SIDE * FINE, SIDE * FINE, 3), 255, dtype=np.uint8)

    def _window(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, np.ndarray, np.ndarray]:
        """Return the part of the canvas between two corners: (rows, columns, their centres' y and x)."""
        x0, y0 = np.clip(np.floor(low), 0, SIDE * FINE).astype(int)
        x1, y1 = np.clip(np.ceil(high), 0, SIDE * FINE).astype(int)
        return slice(y0, y1), slice(x0, x1), np.arange(y0, y1)[:, None] + 0.5, np.arange(x0, x1)[None] + 0.5

    def fill(self, points: np.ndarray, colour: str) -> None:
        """Paint the inside of a polygon; points in canvas pixels, float[n, 2]."""
        rows, cols, y_Y1, x_1X = self._window(points.min(0), points.max(0))
        inside_YX = np.zeros((y_Y1.size, x_1X.size), dtype=bool)
        for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0)):
            if ya == yb:
                continue
            crosses = (y_Y1[:, 0] >= min(ya, yb)) & (y_Y1[:, 0] < max(ya, yb))
            edge_Y1 = xa + (y_Y1[crosses] - ya) * (xb - xa) / (yb - ya)
            inside_YX[crosses] ^= x_1X >= edge_Y1
        self.canvas_YXC[rows, cols][inside_YX] = PAINT[colour]

    def stroke(self, points: np.ndarray, width: float, colour: str) -> None:
        """Paint a line with round ends and corners; points and width in canvas pixels."""
        for (xa, ya), (xb, yb) in pairwise(points):
            low, high = np.array([min(xa, xb), min(ya, yb)]), np.array([max(xa, xb), max(ya, yb)])
            rows, cols, y_Y1, x_1X = self._window(low - width / 2, high + width / 2)
            length = (xb - xa) * (xb - xa) + (yb - ya) * (yb - ya)
            along_YX = ((x_1X - xa) * (xb - xa) + (y_Y1 - ya) * (yb - ya)) / (length or 1.0)
            along_YX = np.clip(along_YX, 0, 1)
            dx_YX, dy_YX = x_1X - xa - along_YX * (xb - xa), y_Y1 - ya - along_YX * (yb - ya)
            self.canvas_YXC[rows, cols][dx_YX * dx_YX + dy_YX * dy_YX <= width * width / 4] = PAINT[colour]

    def draw(self, shapes: str, x: float = 50, y: float = 100, size: float = 100, tint: str = "white") -> None:
        """Draw a description so that the middle of its lower side is at (x, y) and its side is `size` per cent."""
        unit = SIDE * FINE / 100

        def to_canvas(points: np.ndarray) -> np.ndarray:
            placed = (np.asarray(points, dtype=float) - [50, 100]) * (size / 100) + [x, y]
            return np.round(placed * unit * 8) / 8

        for shape in filter(str.strip, shapes.split(";")):
            kind, colour, *rest = shape.split()
            colour = tint if colour == "*" else colour
            if kind == "t":
                height = float(rest[2])
                strokes = list(letters(rest[3]))
                middle = max(points[:, 0].max() for points, _ in strokes) / 2
                for points, bent in strokes:
                    points = (points - [middle, 5]) * (height / 10) + [float(rest[0]), float(rest[1])]
                    points = smooth(points, False) if bent and len(points) > 2 else points
                    self.stroke(to_canvas(points), 0.15 * height * size / 100 * unit, colour)
                continue
            numbers = [float(number) for number in rest]
            if kind in "ls":
                points = np.array(numbers[1:]).reshape(-1, 2)
                points = smooth(points, False) if kind == "s" else points
                self.stroke(to_canvas(points), numbers[0] * size / 100 * unit, colour)
                continue
            points = to_canvas(outline(kind.lower(), numbers))
            self.fill(points, colour)
            if kind.islower():
                self.stroke(np.vstack([points, points[:1]]), EDGE * unit, "ink")

    def to_picture(self) -> Image.Image:
        """Return the drawing, SIDE x SIDE, in its SHADES most frequent colours; others become the nearest of them."""
        fine = self.canvas_YXC.reshape(SIDE, FINE, SIDE, FINE, 3).astype(np.int64)
        mean_YXC = fine.sum((1, 3)) // (FINE * FINE)
        # One integer for each colour, so that equal colours can be counted.
        code_YX = mean_YXC @ [1 << 16, 1 << 8, 1]
        codes, index, counts = np.unique(code_YX.ravel(), return_inverse=True, return_counts=True)
        colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
        palette = colours[np.argsort(-counts, kind="stable")[:SHADES]]
        distance = ((colours[:, None] - palette) ** 2).sum(-1)
        nearest = distance.argmin(1)[index.reshape(-1)].reshape(SIDE, SIDE)
        picture = Image.fromarray(nearest.astype(np.uint8), "P")
        picture.putpalette(palette.astype(np.uint8).tobytes())
        return picture


def outline(kind: str, numbers: list[float]) -> np.ndarray:
    """Return the corners of a shape, float[n, 2], in the drawing's units."""
    if kind not in "obpc":
        raise ValueError(f"a shape of kind {kind!r}: expected o, b, p, c, l, s or t")
    if kind in "pc":
        points = np.array(numbers).reshape(-1, 2)
        return smooth(points, True) if kind == "c" else points
    angle = np.round(np.arange(48) * (np.pi / 24), 6)
    circle = np.round(np.stack([np.cos(angle), np.sin(angle)], axis=1), 5)
    if kind == "o":
        return circle * numbers[2:] + numbers[:2]
    x0, y0, x1, y1, r = [*numbers, 0][:5]
    if not r:
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    corners = [(x1 - r, y1 - r), (x0 + r, y1 - r), (x0 + r, y0 + r), (x1 - r, y0 + r)]
    return np.vstack([circle[12 * i : 12 * i + 13] * r + corner for i, corner in enumerate(corners)])


# ---- drawings of animals -------------------------------------------------------------------------

FACE = "O ink 40 34 3 4; O ink 60 34 3 4; "
SITTING = "c * 28 100 26 78 36 56 50 50 64 56 74 78 72 100; o * 38 96 9 5; o * 62 96 9 5; "
ANIMALS = {
    "cat": "s ink 9.5 70 94 90 92 88 72 94 62; s * 7 70 94 90 92 88 72 94 62; p * 28 36 25 4 46 18; "
    "p * 72 36 75 4 54 18; " + SITTING + "o * 50 36 25 21; " + FACE + "P pink 46 41 54 41 50 46; "
    "s ink 1.5 43 50 47 51 50 46 53 51 57 50; l ink 1 36 44 18 40; l ink 1 36 47 18 49; l ink 1 64 44 82 40; "
    "l ink 1 64 47 82 49",
    "dog": "s ink 9.5 70 90 86 84 90 70; s * 7 70 90 86 84 90 70; " + SITTING + "o * 50 34 22 24; "
    "c * 32 14 20 20 16 46 24 52 33 40; c * 68 14 80 20 84 46 76 52 67 40; o white 50 45 14 11; o ink 50 40 5 4; "
    "l ink 1.5 50 44 50 50; c red 46 52 54 52 53 62 47 62; O ink 42 28 3 4; O ink 58 28 3 4",
    "rabbit": "o white 76 90 9 9; " + SITTING + "o * 39 10 8 22; o pink 39 11 3 15; o * 61 10 8 22; "
    "o pink 61 11 3 15; o * 50 40 22 18; " + FACE + "P pink 46 42 54 42 50 47; b white 46 50 54 58; "
    "l ink 1 50 50 50 58",
    "bear": SITTING + "o * 30 18 10 10; o * 70 18 10 10; o * 50 36 26 23; o cream 50 44 12 9; o ink 50 40 5 3; "
    "s ink 1.5 44 47 50 50 56 47; O ink 40 30 3 4; O ink 60 30 3 4; o cream 50 76 14 16",
    "mouse": "s ink 3 70 94 92 96 84 80 96 72; " + SITTING + "o * 24 20 17 17; o pink 24 20 10 10; o * 76 20 17 17; "
    "o pink 76 20 10 10; c * 30 26 50 20 70 26 66 42 50 54 34 42; O ink 42 32 3 4; O ink 58 32 3 4; "
    "o ink 50 50 4 3; l ink 1 44 46 28 44; l ink 1 56 46 72 44",
    "pig": SITTING + "p * 26 26 26 6 44 16; p * 74 26 74 6 56 16; o * 50 36 27 23; o cream 50 43 12 9; "
    "O ink 46 43 2 3; O ink 54 43 2 3; O ink 38 30 3 4; O ink 62 30 3 4; s ink 1.5 43 54 50 56 57 54",
    "elephant": SITTING + "c * 36 20 14 8 2 24 10 48 30 48; c * 64 20 86 8 98 24 90 48 70 48; o * 50 30 22 22; "
    "c * 42 38 58 38 57 56 62 68 56 74 46 68 43 54; O ink 41 26 3 4; O ink 59 26 3 4; l ink 1 45 52 55 52; "
    "l ink 1 46 58 56 58",
    "frog": "c * 20 100 8 92 14 76 30 70 34 50 66 50 70 70 86 76 92 92 80 100; o cream 50 82 16 15; "
    "o * 34 30 12 13; o * 66 30 12 13; o * 50 46 30 19; o white 34 29 7 8; o white 66 29 7 8; O ink 34 30 3 4; "
    "O ink 66 30 3 4; s ink 2 28 50 50 59 72 50",
    "owl": "c * 50 24 76 28 82 66 68 96 50 100 32 96 18 66 24 28; p * 24 32 22 8 44 24; p * 76 32 78 8 56 24; "
    "o cream 50 76 18 20; s ink 1.5 40 70 45 74 50 70 55 74 60 70; s ink 1.5 40 80 45 84 50 80 55 84 60 80; "
    "o white 38 40 13 13; o white 62 40 13 13; O ink 38 40 5 5; O ink 62 40 5 5; p orange 45 48 55 48 50 58; "
    "s ink 1.5 25 58 30 74 36 84; s ink 1.5 75 58 70 74 64 84",
    "penguin": "o orange 38 96 12 5; o orange 62 96 12 5; c * 22 52 8 60 4 78 14 76 24 66; "
    "c * 78 52 92 60 96 78 86 76 76 66; c * 50 6 72 20 78 60 70 92 50 97 30 92 22 60 28 20; "
    "c white 50 40 66 52 66 80 50 92 34 80 34 52; o white 42 26 8 9; o white 58 26 8 9; O ink 43 27 3 4; "
    "O ink 57 27 3 4; p orange 44 34 56 34 50 44",
    "duck": "c * 8 62 22 68 40 66 58 58 80 62 86 80 70 98 34 98 14 88; o * 70 36 20 20; "
    "p orange 87 30 104 36 87 43; O ink 76 30 3 4; c * 24 76 40 70 58 74 50 88 32 90",
    "lion": "s ink 8 70 94 90 90 90 70; s * 5 70 94 90 90 90 70; o brown 90 66 7 9; " + SITTING
    + "c brown 50 2 64 8 80 10 84 26 92 38 82 50 76 64 62 64 50 72 38 64 24 64 18 50 8 38 16 26 20 10 36 8; "
    "o * 50 36 23 22; " + FACE + "P ink 45 40 55 40 50 46; s ink 1.5 42 50 46 52 50 46 54 52 58 50",
    "turtle": "o leaf 24 92 9 8; o leaf 66 92 9 8; c leaf 74 84 82 64 96 58 100 70 90 80 82 92; "
    "P leaf 8 88 2 94 14 92; O ink 92 66 2.5 3; c * 10 88 16 60 44 46 72 60 78 88; s ink 1.5 12 84 44 88 76 84; "
    "l ink 1.5 34 51 30 84; l ink 1.5 54 51 58 84; l ink 1.5 17 66 72 66",
    "giraffe": "l ink 3 30 70 22 86; b yellow 28 78 36 100; b yellow 62 78 70 100; "
    "c yellow 26 66 50 60 60 62 60 30 58 12 70 8 78 20 72 30 74 84 50 88 28 84; l ink 2 60 10 58 0; "
    "l ink 2 68 10 70 0; o yellow 80 16 14 9; O ink 74 14 2.5 3; O ink 90 15 1.5 1.5; O brown 66 40 4 5; "
    "O brown 68 56 4 5; O brown 40 72 6 5; O brown 58 76 6 5; O brown 48 82 4 3; O brown 64 28 3 3",
    "snail": "c cream 4 100 12 92 60 92 78 86 80 60 92 60 96 78 90 100; l ink 2 82 62 76 44; l ink 2 90 62 94 44; "
    "O ink 76 43 3 3; O ink 94 43 3 3; o * 42 66 30 28; s ink 2 42 66 46 62 52 68 44 76 32 68 40 52 58 58 58 78; "
    "s ink 1.5 86 84 90 86 94 82",
    "snowman": "l brown 3 30 58 6 44; l brown 3 70 58 94 44; o white 50 80 27 20; o white 50 52 21 17; "
    "o white 50 26 16 15; O ink 44 23 2.5 3; O ink 56 23 2.5 3; p orange 50 28 66 32 50 33; O ink 50 46 2 2; "
    "O ink 50 56 2 2; O ink 50 74 2 2; s ink 1.5 43 35 50 38 55 37",
    "robot": "l ink 2 50 14 50 4; o red 50 4 4 4; b silver 30 14 70 44 5; b silver 24 48 76 84 4; "
    "b grey 32 84 44 100; b grey 56 84 68 100; b grey 10 50 20 78 4; b grey 80 50 90 78 4; o yellow 41 27 5 5; "
    "o yellow 59 27 5 5; b ink 40 36 60 40; b cream 36 56 64 74; O red 43 65 3 3; O green 57 65 3 3",
    "cactus": "s ink 15 50 66 26 64 24 42; s * 13 50 66 26 64 24 42; s ink 15 50 58 76 54 77 30; "
    "s * 13 50 58 76 54 77 30; b * 38 8 62 100 12; l ink 1 50 46 50 92; l ink 1 44 50 44 88; l ink 1 56 50 56 88",
}  # fmt: skip

# ---- drawings of things --------------------------------------------------------------------------

THINGS = {
    "key": "o * 22 70 19 19; o white 22 70 9 9; b * 41 65 96 75; b * 74 75 81 90; b * 87 75 95 88",
    "umbrella": "l ink 5 50 40 50 90; s ink 5 50 86 52 97 62 97 64 88; l wood 3 50 40 50 90; "
    "s wood 3 50 86 52 97 62 97 64 88; l ink 3 50 2 50 12; "
    "c * 4 52 16 22 50 8 84 22 96 52 82 46 66 52 50 46 34 52 18 46; s ink 1.5 50 8 36 26 34 51; "
    "s ink 1.5 50 8 64 26 66 51",
    "clock": "o * 50 54 42 42; o white 50 54 34 34; l ink 3 50 24 50 28; l ink 3 50 80 50 84; l ink 3 20 54 24 54; "
    "l ink 3 76 54 80 54; l ink 4 50 54 50 32; l ink 4 50 54 66 62; O ink 50 54 4 4",
    "anchor": "o * 50 14 11 11; o white 50 14 5 5; b * 26 30 74 38 3; b * 45 24 55 92; "
    "c * 8 62 12 82 30 96 50 100 70 96 88 82 92 62 80 70 76 80 62 86 50 88 38 86 24 80 20 70",
    "boot": "c * 28 6 60 6 60 52 70 64 90 70 94 90 50 92 28 90; b ink 26 88 94 98 2; b cream 25 0 63 15 2",
    "hammer": "b wood 44 34 56 100 3; b * 20 8 70 34 3; p * 70 12 92 16 92 26 70 30",
    "lamp": "b * 46 50 54 92; o * 50 94 24 6; p yellow 34 10 66 10 84 54 16 54; l ink 2 66 54 66 68; O ink 66 70 3 3",
    "crown": "p * 8 90 6 34 28 58 50 16 72 58 94 34 92 90; o cream 50 16 6 6; o cream 6 34 6 6; o cream 94 34 6 6; "
    "b cream 8 80 92 92; O ink 30 86 3 3; O ink 50 86 3 3; O ink 70 86 3 3",
    "ladder": "b * 24 2 32 100; b * 68 2 76 100; b * 32 12 68 19; b * 32 30 68 37; b * 32 48 68 55; "
    "b * 32 66 68 73; b * 32 84 68 91",
    "drum": "b * 12 36 88 88; o * 50 88 38 11; B * 13 70 87 88; l white 2 14 44 32 92; l white 2 32 92 50 48; "
    "l white 2 50 48 68 92; l white 2 68 92 86 44; o cream 50 36 38 12; l wood 4 16 6 44 32; l wood 4 84 6 56 32; "
    "O wood 44 32 4 4; O wood 56 32 4 4",
    "mushroom": "c cream 38 56 62 56 66 98 34 98; c * 4 56 14 24 50 8 86 24 96 56 50 64; O white 30 36 7 6; "
    "O white 54 24 8 6; O white 72 44 7 6; O white 46 50 5 4",
    "candle": "b * 38 36 62 98 2; l ink 2 50 36 50 28; c orange 50 4 60 20 50 31 40 20; O yellow 50 22 4 6",
    "bell": "o ink 50 90 9 8; c * 50 8 66 14 74 40 78 68 92 84 8 84 22 68 26 40 34 14; b * 6 80 94 88 4; o * 50 8 7 6",
    "guitar": "b brown 46 6 54 56; b ink 43 0 57 12 2; c * 50 44 66 48 64 62 76 78 66 98 34 98 24 78 36 62 34 48; "
    "o ink 50 68 9 9; b ink 38 86 62 90; l cream 1 48 4 48 88; l cream 1 52 4 52 88",
    "teapot": "s ink 10 80 46 98 50 94 74 76 80; s * 7 80 46 98 50 94 74 76 80; c * 20 76 2 44 -2 36 10 34 26 52; "
    "c * 50 32 76 40 84 68 70 94 30 94 16 68 24 40; o * 50 34 20 6; o * 50 25 6 6",
    "hourglass": "p white 24 12 76 12 54 52 76 92 24 92 46 52; P orange 36 32 64 32 50 54; "
    "P orange 50 66 70 90 30 90; b * 16 4 84 14 2; b * 16 90 84 100 2",
    "pencil": "p * 20 66 70 16 86 32 36 82; p skin 20 66 36 82 8 94; P ink 12 84 18 90 8 94; "
    "p pink 70 16 78 8 94 24 86 32",
    "banana": "c * 8 36 20 62 46 76 76 66 92 38 84 34 68 48 46 54 26 46 16 30; P brown 84 34 92 38 94 28 88 26",
    "envelope": "b * 4 26 96 88; l ink 2 4 88 40 56; l ink 2 96 88 60 56; p * 4 26 96 26 50 64",
    "scissors": "l ink 9 30 66 78 8; l ink 9 70 66 22 8; l silver 6 30 66 78 8; l silver 6 70 66 22 8; "
    "o * 24 80 18 16; o white 24 80 9 8; o * 76 80 18 16; o white 76 80 9 8; O ink 50 42 3 3",
    "fish": "p * 70 60 98 36 98 84; c * 2 60 20 38 50 34 78 58 50 86 20 82; O white 22 54 6 6; O ink 22 54 3 3; "
    "s ink 1.5 34 44 40 60 34 76",
    "balloon": "c * 50 2 82 14 84 50 62 76 50 82 38 76 16 50 18 14; p * 44 88 56 88 50 80; "
    "s ink 2 50 88 46 93 54 97 50 100; O white 34 26 5 9",
    "star": "p * 50 4 62 38 98 38 69 59 80 94 50 73 20 94 31 59 2 38 38 38",
    "egg": "c * 50 6 74 30 84 66 68 94 50 98 32 94 16 66 26 30",
    "bird": "c * 14 58 4 76 20 72 40 78 62 76 78 56 60 46 40 52; o * 72 44 17 16; p orange 88 40 100 46 87 49; "
    "O ink 76 40 3 3; l ink 2 46 78 46 100; l ink 2 56 78 56 100; c * 26 60 44 56 54 64 40 70",
    "apple": "s ink 4 50 24 52 12 58 4; p leaf 54 16 74 4 80 14 64 20; "
    "c * 50 26 70 18 92 36 84 76 62 98 50 92 38 98 16 76 8 36 30 18",
    "cup": "s ink 9 66 52 90 50 88 74 64 78; s * 6 66 52 90 50 88 74 64 78; p * 14 36 70 36 64 96 20 96",
    "sheep": "b ink 30 76 37 98; b ink 62 76 69 98; "
    "c * 22 40 40 30 60 30 78 38 86 56 78 76 58 82 40 82 20 76 12 58; c ink 76 36 92 34 98 50 88 62 78 56; "
    "O white 88 46 3 3; l ink 4 80 40 70 44",
    "hat": "b * 24 8 76 80 3; b cream 24 60 76 74; b * 4 80 96 94 6",
    "scarf": "b * 58 42 80 100 3; b * 2 20 98 52 12; l white 2 58 78 80 78; l white 2 58 88 80 88",
    "bow": "p * 4 26 48 50 4 76; p * 96 26 52 50 96 76; o * 50 51 11 12",
    "kite": "s ink 2 50 92 40 98 60 104 50 110; p * 50 2 86 40 50 94 14 40; l ink 2 50 2 50 94; l ink 2 14 40 86 40",
    "ball": "o * 50 50 48 48; s white 4 6 34 30 50 30 66 10 76; s white 4 94 34 70 50 70 66 90 76",
    "glasses": "l ink 5 4 30 96 30; o * 26 44 22 20; o * 74 44 22 20",
    "gift": "b * 8 34 92 98; b * 2 22 98 40; b cream 43 22 57 98; c cream 50 22 30 4 22 12 34 20; "
    "c cream 50 22 70 4 78 12 66 20",
    "flag": "b brown 10 2 18 100; c * 18 6 40 10 64 4 92 8 92 48 64 44 40 50 18 46",
    "boat": "b brown 47 6 53 70; p * 56 8 94 60 56 60; p * 44 18 44 60 14 60; c brown 4 66 96 66 84 98 16 98",
    "car": "c * 4 70 10 52 26 50 36 26 66 26 80 50 94 54 98 72 96 86 4 86; p sky 34 50 40 33 50 33 50 50; "
    "p sky 55 50 55 33 63 33 72 50; o ink 24 86 12 12; o silver 24 86 5 5; o ink 76 86 12 12; o silver 76 86 5 5",
}  # fmt: skip

# ---- pictures ------------------------------------------------------------------------------------

OUTSIDE = "B sky 0 0 100 70; B grass 0 70 100 100; "
INSIDE = "B wall 0 0 100 74; B floor 0 74 100 100; l ink 0.5 0 74 100 74; "
SHORE, NIGHT = "B sky 0 0 100 34; B sea 0 34 100 58; B sand 0 58 100 100; ", "B night 0 0 100 100; "
WATER = "B sky 0 0 100 56; B sea 0 56 100 100; "
STARS = "d cream star 14 20 5; d cream star 84 26 6; d cream star 88 66 5; d cream star 10 76 6; d cream star 76 92 5; "

TEXTS = [  # question, answer, picture
    ("How many dollars does the guitar cost?", "64", INSIDE + "d orange guitar 36 92 84; l ink 0.8 38 30 68 40; "
     "p cream 54 50 62 36 96 36 96 64 62 64; t ink 78 50 12 $64"),
    ("Which room number is on the green door?", "417", "B wall 0 0 100 88; B floor 0 88 100 100; b wood 20 4 80 88; "
     "b green 25 9 75 88; b cream 32 22 68 44 2; t ink 50 33 12 417; o yellow 69 58 3 3"),
    ("According to the road sign, how many kilometres is it to Marlow?", "38", OUTSIDE
     + "P stone 34 100 46 70 54 70 66 100; b grey 22 50 26 92; b grey 74 50 78 92; b green 6 14 94 56 4; "
     "t white 50 27 10 Marlow; t white 50 45 10 38_km"),
    ("What name is painted on the hull of the boat?", "Juniper", WATER + "b brown 47 6 51 62; "
     "p white 53 8 86 54 53 54; p white 45 16 45 54 18 54; c cream 4 58 96 58 86 86 14 86; t ink 50 71 10 Juniper; "
     "s white 1.5 2 92 20 88 38 92 56 88 74 92 92 88"),
    ("What name is written above the entrance of the dog house?", "Biscuit", OUTSIDE + "b wood 18 46 82 92; "
     "p red 8 48 50 12 92 48; c ink 36 92 36 74 50 66 64 74 64 92; b cream 24 48 76 64 2; t ink 50 56 9 Biscuit; "
     "d brown dog 50 94 28"),
    ("Whose name is on the birthday cake?", "Nora", INSIDE + "b wood 4 84 96 90; b pink 14 44 86 84 5; "
     "c white 14 44 86 44 86 54 74 60 62 54 50 60 38 54 26 60 14 54; d blue candle 32 44 22; "
     "d blue candle 50 44 22; d blue candle 68 44 22; t ink 50 71 13 Nora"),
    ("Which day of June does the calendar show?", "23", "B mint 0 0 100 100; b white 20 16 80 90 3; "
     "b red 20 16 80 38 3; t white 50 27 11 June; t ink 50 64 28 23; l ink 2 34 10 34 20; l ink 2 66 10 66 20"),
    ("Which fruit is on the label of the jam jar?", "Cherry", INSIDE + "b wood 0 84 100 90; "
     "c purple 20 30 80 30 84 50 82 84 18 84 16 50; b silver 22 14 78 28 3; b cream 17 42 83 72 2; "
     "t ink 50 52 10 Cherry; t ink 50 65 8 Jam"),
    ("Which animal is in the title of the book?", "Walrus", "B lilac 0 0 100 100; b white 20 10 84 94 2; "
     "b blue 16 6 80 90 2; B night 17 7 23 89; t white 51 22 7 The; t white 51 36 8 Silent; "
     "t yellow 51 52 9 Walrus; d sky star 51 84 20"),
    ("Which soup does the blackboard offer?", "Pumpkin", "B sand 0 0 100 100; l brown 4 28 80 20 98; "
     "l brown 4 72 80 80 98; b wood 10 8 90 84 2; b ink 14 12 86 80; t white 50 27 7 Soup_of; "
     "t white 50 42 7 the_day; t yellow 50 62 10 Pumpkin"),
    ("Which number is on the striped shirt?", "86", "B mint 0 0 100 100; "
     "p red 30 18 6 38 16 58 28 50 28 94 72 94 72 50 84 58 94 38 70 18 60 18 50 26 40 18; B white 29 30 71 36; "
     "B white 29 76 71 82; t white 50 57 24 86"),
    ("Which line number does the bus show?", "29", "B sky 0 0 100 84; B stone 0 84 100 100; b orange 16 6 84 86 6; "
     "b ink 26 10 74 34 2; t yellow 50 22 15 29; b mint 22 38 78 62 3; o cream 27 74 6 6; o cream 73 74 6 6; "
     "b ink 38 70 62 78 2; b ink 22 86 34 94 2; b ink 66 86 78 94 2"),
    ("What time does the alarm clock show?", "6:52", INSIDE + "b wood 4 78 96 84; b wood 12 84 18 100; "
     "b wood 82 84 88 100; b red 14 34 86 76 8; b ink 22 42 78 68 3; t yellow 50 55 16 6:52; b grey 40 28 60 34 2; "
     "b ink 24 76 32 79; b ink 68 76 76 79"),
    ("How many grams does the teapot on the scales weigh?", "735", INSIDE + "d blue teapot 50 46 40; "
     "b silver 16 46 84 51 2; b grey 46 51 54 58; p silver 28 58 72 58 84 90 16 90; b ink 30 65 70 83 2; "
     "t yellow 50 74 9 735_g"),
]  # fmt: skip

COLOURED = [  # question, colour, picture
    ("Which colour is the balloon that the penguin holds?", "orange", "B sky 0 0 100 66; B white 0 66 100 100; "
     "s ink 0.8 64 64 74 56 76 44; d night penguin 40 92 62; d * balloon 76 46 36"),
    ("Which colour is the umbrella that the snowman holds?", "red", "B dusk 0 0 100 70; B white 0 70 100 100; "
     "d white snowman 42 96 72; d * umbrella 69 88 58"),
    ("Which colour is the hat of the elephant?", "pink", OUTSIDE + "d grey elephant 50 96 72; d * hat 50 40 32"),
    ("Which colour is the scarf of the giraffe?", "blue", OUTSIDE + "d yellow giraffe 46 96 88; d * scarf 58 67 22"),
    ("Which colour is the bow tie of the owl?", "purple", NIGHT + "b brown 0 84 100 92; d wood owl 50 88 78; "
     "d * bow 50 76 32"),
    ("Which colour are the sails of the robot's boat?", "green", WATER + "d * boat 48 92 84; d silver robot 74 68 34"),
    ("Which colour is the kite that the frog flies?", "yellow", OUTSIDE + "s ink 0.8 70 44 58 52 46 56 40 70; "
     "d leaf frog 34 94 44; d * kite 72 46 40"),
    ("Which colour is the ball on the bear's head?", "brown", "B lilac 0 0 100 76; B red 0 76 100 100; "
     "d cream bear 50 94 62; d * ball 50 37 28"),
    ("Which colour is the shell of the snail on the book?", "pink", INSIDE + "b wood 0 82 100 90; "
     "b blue 10 70 90 82 1; B white 12 72 90 80; d * snail 50 70 58"),
    ("Which colour are the sunglasses of the cactus?", "yellow", "B sky 0 0 100 66; B sand 0 66 100 100; "
     "d leaf cactus 50 94 88; d * glasses 50 60 40"),
    ("Which colour is the crown of the pig?", "white", "B mint 0 0 100 70; B lilac 0 70 100 100; "
     "d skin pig 50 96 72; d * crown 50 39 32"),
    ("Which colour is the car with the teapot on its roof?", "black", "B sky 0 0 100 78; B stone 0 78 100 100; "
     "d * car 50 94 80; d orange teapot 47 36 32"),
    ("Which colour is the gift in front of the rabbit?", "green", INSIDE + "d grey rabbit 34 90 72; "
     "d * gift 64 94 36"),
    ("Which colour is the flag on the turtle's back?", "red", SHORE + "d green turtle 46 92 76; d * flag 54 56 42"),
]  # fmt: skip

TREE = "b brown 43 50 57 96; c leaf 50 6 74 10 88 26 92 46 80 64 50 68 20 64 8 46 12 26 26 10; "
TUB = "c white 8 60 92 60 84 88 70 92 30 92 16 88; b white 4 56 96 62 3; b grey 20 91 28 96; b grey 72 91 80 96; "
COUNTED = [  # question, thing, tint, columns, rows, (x0, y0, x1, y1) of their lower sides, size, picture behind them
    ("How many pink birds sit on the wires?", "bird", "pink", 5, 2, (13, 45, 86, 81), 17, "B sky 0 0 100 100; "
     "l ink 0.7 0 45 100 45; l ink 0.7 0 81 100 81"),
    ("How many green eggs lie in the nest?", "egg", "green", 5, 2, (26, 58, 74, 72), 12, "B sky 0 0 100 100; "
     "o brown 50 62 46 28; o wood 50 60 38 20; s brown 1.5 8 72 30 86 60 84; s wood 1.5 30 80 60 88 90 72"),
    ("How many blue candles stand on the cake?", "candle", "blue", 9, 1, (17, 54, 83, 54), 24, INSIDE
     + "b wood 2 88 98 94; b brown 10 53 90 88 4; c pink 10 53 90 53 90 62 77 70 63 62 50 70 37 62 23 70 10 62"),
    ("How many red fish swim in the tank?", "fish", "red", 3, 3, (28, 44, 72, 76), 16, INSIDE
     + "b sky 10 16 90 88 2; B sea 11 24 89 87; B sand 11 82 89 87"),
    ("How many black stars are on the flag?", "star", "black", 3, 3, (30, 30, 82, 66), 15, "B sky 0 0 100 100; "
     "b brown 8 4 12 100; b yellow 12 10 96 74"),
    ("How many blue mushrooms grow under the tree?", "mushroom", "blue", 5, 2, (13, 80, 87, 97), 15,
     "B sky 0 0 100 62; B grass 0 62 100 100; b brown 45 40 55 72; c leaf 50 4 76 12 84 32 70 48 30 48 16 32 24 12"),
    ("How many purple sheep stand on the hill?", "sheep", "purple", 3, 3, (22, 56, 78, 96), 22, "B sky 0 0 100 100; "
     "O grass 50 110 90 80"),
    ("How many orange balloons are tied to the bathtub?", "balloon", "orange", 5, 2, (14, 28, 86, 50), 17,
     "B lilac 0 0 100 100; " + TUB),
    ("How many purple ducks swim on the pond?", "duck", "purple", 3, 3, (24, 46, 74, 84), 20, "B grass 0 0 100 100; "
     "o sea 50 56 46 40; s white 0.8 14 60 18 58 22 60; s white 0.8 76 70 80 68 84 70; s white 0.8 46 92 50 90 54 92"),
    ("How many blue apples hang in the tree?", "apple", "blue", 3, 3, (28, 26, 72, 58), 13, OUTSIDE + TREE),
    ("How many orange cups stand on the shelves?", "cup", "orange", 4, 3, (18, 32, 82, 88), 16,
     "B wall 0 0 100 100; b wood 6 32 94 36; b wood 6 60 94 64; b wood 6 88 94 92"),
    ("How many green clocks hang on the wall?", "clock", "green", 3, 3, (20, 32, 80, 88), 20, "B dusk 0 0 100 100"),
    ("How many red umbrellas stand on the beach?", "umbrella", "red", 5, 2, (12, 72, 88, 95), 16, SHORE),
    ("How many pink cactuses stand in the desert?", "cactus", "pink", 5, 2, (13, 74, 87, 96), 20,
     "B sky 0 0 100 50; B sand 0 50 100 100; O yellow 84 16 8 8"),
]  # fmt: skip

PLACES = [  # animal, tint, where it is, picture
    ("cat", "blue", "On a roof", OUTSIDE + "b cream 22 54 78 92; p red 12 56 28 36 72 36 88 56; "
     "b brown 44 68 56 92; b sky 28 64 38 76; b sky 62 64 72 76; d * cat 50 38 36"),
    ("dog", "green", "Under a table", INSIDE + "d * dog 50 92 42; b wood 8 42 92 49; b wood 12 49 18 92; "
     "b wood 82 49 88 92"),
    ("rabbit", "purple", "In a boat", WATER + "d * rabbit 50 78 52; c brown 8 64 92 64 80 88 20 88; "
     "s white 1.5 2 92 20 88 38 92 56 88 74 92 92 88"),
    ("mouse", "pink", "On the moon", NIGHT + STARS + "c yellow 66 8 36 16 18 50 36 86 76 92 52 76 42 50 48 26; "
     "d * mouse 64 84 36"),
    ("owl", "red", "In a tree", OUTSIDE + TREE + "d * owl 50 54 36; c leaf 28 50 38 46 50 50 62 46 72 50 66 60 34 60"),
    ("frog", "orange", "In a box", INSIDE + "d * frog 50 74 46; p wood 24 60 12 70 18 76 28 68; "
     "p wood 76 60 88 70 82 76 72 68; b wood 24 60 76 92; l cream 3 50 62 50 90"),
    ("elephant", "yellow", "On a car", "B sky 0 0 100 78; B stone 0 78 100 100; d red car 50 94 76; "
     "d * elephant 46 42 36"),
    ("penguin", "purple", "In a bathtub", "B mint 0 0 100 80; B floor 0 80 100 100; d * penguin 46 76 54; " + TUB
     + "o white 22 50 5 5; o white 30 54 4 4; o white 72 52 5 5; o white 64 54 3 3; s grey 3 94 56 94 44 86 44 86 50"),
    ("lion", "green", "In a bed", "B lilac 0 0 100 84; B floor 0 84 100 100; b brown 10 24 90 80 6; "
     "b white 26 44 74 64 6; d * lion 50 76 44; b blue 8 62 92 88 4; b cream 8 62 92 69 2; b brown 6 58 12 96; "
     "b brown 88 58 94 96"),
    ("bear", "blue", "On a chair", INSIDE + "b wood 28 16 34 66; b wood 66 16 72 66; b wood 34 20 66 27; "
     "b wood 34 33 66 40; b wood 24 64 76 70; b wood 26 70 32 96; b wood 68 70 74 96; d * bear 50 66 42"),
    ("pig", "green", "On a cloud", "B sky 0 0 100 100; "
     "c white 8 70 14 58 28 54 40 62 50 56 62 60 74 54 88 60 92 72 80 82 62 80 50 86 34 80 18 82; d * pig 50 64 44"),
    ("duck", "pink", "On a bridge", WATER + "B grass 0 60 14 100; B grass 86 60 100 100; "
     "p stone 0 56 100 56 100 92 82 92 76 76 64 68 50 66 36 68 24 76 18 92 0 92; d * duck 50 57 40; "
     "s white 1.2 30 92 42 89 54 92 66 89"),
    ("turtle", "orange", "On a mountain top", "B sky 0 0 100 100; p stone 2 100 40 42 60 42 98 100; "
     "p white 30 57 40 42 60 42 70 57 62 54 56 62 48 54 40 62; d * turtle 50 44 40"),
    ("snail", "red", "In a cage", "B sand 0 0 100 100; b wood 8 86 92 94 2; d * snail 50 86 60; "
     "b grey 8 12 92 17 2; " + "".join(f"b grey {x} 17 {x + 2} 86; " for x in range(10, 91, 13)) + "o grey 50 8 4 4"),
]  # fmt: skip

OBJECTS = [  # thing, tint, question, picture
    ("teapot", "red", "Which thing lies on the beach?", SHORE + "s white 1.2 0 58 20 60 40 57 60 60 80 57 100 59; "
     "O wood 50 88 26 5; d * teapot 50 90 46"),
    ("boot", "brown", "Which thing lies on the plate?", "B mint 0 0 100 100; o white 50 62 46 34; "
     "o cream 50 62 34 24; d * boot 50 76 48"),
    ("clock", "purple", "Which thing lies in the nest?", "B sky 0 0 100 100; d * clock 50 70 46; "
     "c brown 8 60 30 66 50 68 70 66 92 60 86 84 66 94 34 94 14 84; s wood 1.5 14 70 40 80 80 72; "
     "s wood 1.5 20 84 50 88 84 78; s wood 1.5 30 72 56 76 76 88"),
    ("anchor", "blue", "Which thing lies in the shopping cart?", "B wall 0 0 100 88; B grey 0 88 100 100; "
     "d * anchor 54 70 54; l ink 2 8 34 22 34 32 74 84 74; l ink 1.5 24 42 92 42 84 66 30 66; l ink 1 38 42 42 66; "
     "l ink 1 52 42 53 66; l ink 1 66 42 64 66; l ink 1 80 42 75 66; l ink 1 27 54 88 54; l ink 2 38 74 38 84; "
     "l ink 2 76 74 76 84; o ink 38 84 5 5; o ink 76 84 5 5"),
    ("guitar", "orange", "Which thing lies on the railway track?", "B sky 0 0 100 34; B grass 0 34 100 100; "
     + "".join(f"b brown {36 - y / 3} {34 + y} {64 + y / 3} {37 + y + y / 20}; " for y in range(2, 64, 10))
     + "l stone 2.5 42 34 20 100; l stone 2.5 58 34 80 100; d * guitar 50 94 66"),
    ("key", "yellow", "Which thing lies in the fish bowl?", INSIDE + "b wood 4 86 96 92; "
     "c sky 28 22 72 22 90 46 84 74 68 86 32 86 16 74 10 46; c sea 13 42 87 42 86 66 68 85 32 85 14 66; "
     "c white 24 18 76 18 76 24 24 24; d * key 50 78 48"),
    ("drum", "green", "Which thing stands on the throne?", "B lilac 0 0 100 84; B red 0 84 100 100; "
     "c yellow 24 82 24 22 34 12 42 16 50 4 58 16 66 12 76 22 76 82; b purple 31 24 69 66 3; b yellow 16 50 25 92; "
     "b yellow 75 50 84 92; b purple 24 66 76 74 2; b yellow 24 74 76 92; d * drum 50 69 38"),
    ("bell", "yellow", "Which thing lies on the lily pad?", "B sea 0 0 100 100; o leaf 50 72 44 20; "
     "P sea 52 72 60 96 76 96; o leaf 84 30 12 5; c pink 10 26 6 18 12 20 16 12 20 20 26 18 22 26; "
     "d * bell 46 76 46; s white 0.8 44 22 50 20 56 22; s white 0.8 6 46 12 44 18 46; s white 0.8 10 96 16 94 22 96"),
    ("crown", "orange", "Which thing lies in the wheelbarrow?", OUTSIDE + "d * crown 48 56 44; "
     "p green 14 50 84 50 70 76 32 76; l wood 3 74 62 98 52; l ink 2.5 30 74 24 84; l ink 2.5 64 76 68 94; "
     "o ink 24 86 9 9; o silver 24 86 4 4"),
    ("envelope", "cream", "Which thing sticks out of the toaster?", INSIDE + "b wood 4 84 96 90; "
     "d * envelope 50 58 48; b silver 14 44 86 82 9; b ink 86 54 92 60 1; b grey 20 64 80 67 1; b ink 20 81 30 85; "
     "b ink 70 81 80 85"),
    ("lamp", "blue", "Which thing stands on the swing?", OUTSIDE + "b brown 6 6 94 11; b brown 10 11 15 94; "
     "b brown 85 11 90 94; l ink 1 32 11 32 74; l ink 1 68 11 68 74; b wood 28 72 72 77; d * lamp 50 73 46"),
    ("hammer", "red", "Which thing is on top of the fir tree?", "B dusk 0 0 100 84; B white 0 84 100 100; "
     "b brown 45 84 55 94; p green 50 60 86 86 14 86; p green 50 46 78 68 22 68; p green 50 32 70 52 30 52; "
     "d * hammer 50 38 34"),
    ("banana", "yellow", "Which thing is shown in the golden frame?", "B lilac 0 0 100 100; b yellow 12 14 88 86 2; "
     "b orange 17 19 83 81; b white 21 23 79 77; d * banana 50 74 48"),
    ("scissors", "purple", "Which thing hangs from the fishing rod?", WATER + "b wood 0 70 34 76; "
     "b brown 8 76 13 100; b brown 24 76 29 100; l brown 2 12 70 66 10; l ink 0.6 66 10 66 40; d * scissors 66 76 38"),
]  # fmt: skip
WRONG_OPTIONS = "Umbrella Hourglass Candle Ladder Pencil Mushroom Apple".split()  # offered as wrong options only


# ---- needles -------------------------------------------------------------------------------------


def render(picture: str, tint: str = "white") -> Canvas:
    """Draw a description; "*" in it is the tint."""
    canvas = Canvas()
    for part in filter(str.strip, picture.split(";")):
        kind, colour, *rest = part.split()
        if kind == "d":
            name, x, y, size = rest
            drawing = ANIMALS.get(name) or THINGS[name]
            canvas.draw(drawing, float(x), float(y), float(size), tint if colour == "*" else colour)
        else:
            canvas.draw(part, tint=tint)
    return canvas


def arrange(rng: np.random.Generator, row: tuple, count: int) -> str:
    """Return the description for a row of COUNTED with `count` things, on random cells of a slightly uneven grid."""
    _, name, tint, cols, rows, (x0, y0, x1, y1), size, picture = row
    positions = []
    for cell in sorted(rng.permutation(cols * rows)[:count]):
        x = x0 + (x1 - x0) * (cell % cols) / max(cols - 1, 1) + float(rng.integers(-4, 5)) / 4
        positions.append((x, y0 + (y1 - y0) * (cell // cols) / max(rows - 1, 1)))
    strings = [f"l ink 0.5 {x} {y - 1} {40 + x / 5} 57" for x, y in positions if name == "balloon"]
    return ";".join([picture, *strings, *(f"d {tint} {name} {x} {y} {size}" for x, y in positions)])


def with_options(rng: np.random.Generator, question: str, right: str, wrong: list[str], letter: str) -> tuple[str, str]:
    """Return (question, answer) with four options, the right one at `letter`."""
    options = [wrong[i] for i in rng.permutation(len(wrong))[:3]]
    options.insert("ABCD".index(letter), right)
    lines = "\n".join(f"{a}. {option}" for a, option in zip("ABCD", options))
    return f"\n{question}\n{lines}{LETTER}", letter


def needle_specs(seed: int = SEED) -> list[tuple[str, str, str, str, str]]:
    """Return (kind, question, answer, picture, tint) of every needle; nothing is drawn yet."""
    rng = np.random.default_rng([0x717, seed])
    specs = [("text", f"\n{question}{SHORT}", answer, picture, "white") for question, answer, picture in TEXTS]
    for question, tint, picture in COLOURED:
        specs.append(("colour", f"\n{question}{SHORT}", tint.capitalize(), picture, tint))
    counts = rng.permutation([2, 3, 4, 5, 6, 7, 8, 9, 3, 4, 5, 6, 7, 8])
    for row, count in zip(COUNTED, counts):
        specs.append(("count", f"\n{row[0]}{SHORT}", str(count), arrange(rng, row, count), "white"))
    letters = ["ABCD"[i % 4] for i in rng.permutation(len(PLACES) + len(OBJECTS))]
    for animal, tint, where, picture in PLACES:
        wrong = [other for _, _, other, _ in PLACES if other != where]
        question, answer = with_options(rng, f"Where is the {tint} {animal}?", where, wrong, letters.pop())
        specs.append(("place", question, answer, picture, tint))
    for thing, tint, question, picture in OBJECTS:
        wrong = [other.capitalize() for other, *_ in OBJECTS if other != thing] + WRONG_OPTIONS
        question, answer = with_options(rng, question, thing.capitalize(), wrong, letters.pop())
        specs.append(("object", question, answer, picture, tint))
    return specs


def draw_needle(index: int, seed: int = SEED) -> Needle:
    """Draw one needle; its picture has 336 x 336 pixels, so that letterboxing changes nothing."""
    kind, question, answer, picture, tint = needle_specs(seed)[index]
    return Needle(f"{kind}-{index % PER_KIND + 1:02}", render(picture, tint).to_picture(), question, answer, kind)


# ---- main ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Draw 70 needles for the V-NIAH test (Sec. 4) and write them with their questions."""

    out: Path = setting(MISSING, "folder to write, such as data/needles; files of the same names are replaced (ours)")
    seed: int = setting(SEED, "random seed of counts, positions and letters (ours)")

    def __post_init__(self):
        at_least(self, seed=0)


def main(cfg: Config) -> None:
    """Draw every needle and write the folder."""
    write_needles(cfg.out, [draw_needle(index, cfg.seed) for index in range(len(needle_specs()))])
    print(f"wrote {len(needle_specs())} needles to {cfg.out}")


if __name__ == "__main__":
    run(main, Config)
