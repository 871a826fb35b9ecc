"""Flat drawings from short descriptions: shapes, strokes and letters of our own, the same pixels on every machine.

What      A description is a list of shapes, later ones on top: "o red 50 40 20 10; l ink 2 0 90 100 90".
          o colour x y rx ry            ellipse
          b colour x0 y0 x1 y1 [r]      box, its corners rounded by r
          p colour x y x y ...          polygon            c colour x y ...   the same with a smooth outline
          l colour width x y x y ...    stroke             s colour width ... the same, smooth
          t colour x y height words     letters around (x, y), "_" for a space; height is a capital's
          Small letters give o, b, p, c a dark edge, capital ones none. "*" is the tint given with the drawing.
          Units are per cent of the drawing's side, y down.
Paper     None; the needles of Sec. 4 are pictures, and these are drawn (data/needle_kit.py).
Run       Nothing here runs by itself.
Key       Y X fine pixels   C colour channels   P points   2 (x, y)
Deviates  Only sums, products and comparisons of rounded numbers, and no font file: neither Pillow's version nor the
          machine changes a pixel.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from PIL import Image

SIDE = 336  # pixels of a picture's side, what the vision tower sees
FINE = 3  # each pixel is the mean of FINE x FINE
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


def smooth(points_P2: np.ndarray, closed: bool) -> np.ndarray:
    """A curve through the points (Catmull-Rom), as many short pieces."""
    if closed:
        before, after = np.roll(points_P2, 1, axis=0), np.roll(points_P2, -1, axis=0)
    else:
        before, after = np.vstack([points_P2[:1], points_P2[:-1]]), np.vstack([points_P2[1:], points_P2[-1:]])
    ahead, beyond = (after, np.roll(after, -1, axis=0)) if closed else (after, np.vstack([after[1:], after[-1:]]))
    pieces = []
    for t in np.arange(8) / 8:
        pieces.append(
            points_P2
            + t / 2 * (ahead - before)
            + t * t / 2 * (2 * before - 5 * points_P2 + 4 * ahead - beyond)
            + t * t * t / 2 * (3 * points_P2 - before - 3 * ahead + beyond)
        )
    curve_P2 = np.stack(pieces, axis=1).reshape(-1, 2)
    return curve_P2 if closed else curve_P2[:-7]


def letters(words: str) -> Iterator[tuple[np.ndarray, bool]]:
    """The strokes of a line of text as (points_P2, smooth?); a capital is 10 high, the line starts at x = 0."""
    x = 0.0
    for letter in words:
        strokes = GLYPHS[letter].split("/") if letter != "_" else []
        wide = 2.0
        for stroke in strokes:
            digits = stroke.lstrip("~")
            points_P2 = np.array([int(digit, 16) for digit in digits], dtype=float).reshape(-1, 2)
            wide = max(wide, points_P2[:, 0].max()) if letter not in "Iil.:'!1" else points_P2[:, 0].max()
            yield points_P2 + np.array([x, 0]), stroke.startswith("~")
        x += wide + 3.2


class Sketch:
    """A square canvas, white at first; later shapes lie on top."""

    def __init__(self):
        self.canvas_YXC = np.full((SIDE * FINE, SIDE * FINE, 3), 255, dtype=np.uint8)

    def _window(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, np.ndarray, np.ndarray]:
        """The part of the canvas between two corners: (rows, columns, y of the rows' middles, x of the columns')."""
        x0, y0 = np.clip(np.floor(low), 0, SIDE * FINE).astype(int)
        x1, y1 = np.clip(np.ceil(high), 0, SIDE * FINE).astype(int)
        return slice(y0, y1), slice(x0, x1), np.arange(y0, y1)[:, None] + 0.5, np.arange(x0, x1)[None] + 0.5

    def fill(self, points_P2: np.ndarray, colour: str) -> None:
        """Paint the inside of a polygon of fine pixels."""
        rows, cols, y_Y1, x_1X = self._window(points_P2.min(0), points_P2.max(0))
        inside_YX = np.zeros((y_Y1.size, x_1X.size), dtype=bool)
        for (xa, ya), (xb, yb) in zip(points_P2, np.roll(points_P2, -1, axis=0)):
            if ya == yb:
                continue
            crossed = (y_Y1[:, 0] >= min(ya, yb)) & (y_Y1[:, 0] < max(ya, yb))
            at_Y1 = xa + (y_Y1[crossed] - ya) * (xb - xa) / (yb - ya)
            inside_YX[crossed] ^= x_1X >= at_Y1
        self.canvas_YXC[rows, cols][inside_YX] = PAINT[colour]

    def stroke(self, points_P2: np.ndarray, width: float, colour: str) -> None:
        """Paint a line with round ends and corners through fine pixels."""
        for (xa, ya), (xb, yb) in pairwise(points_P2):
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

        def fine(points_P2: np.ndarray) -> np.ndarray:
            placed_P2 = (np.asarray(points_P2, dtype=float) - [50, 100]) * (size / 100) + [x, y]
            return np.round(placed_P2 * unit * 8) / 8

        for shape in filter(str.strip, shapes.split(";")):
            kind, colour, *rest = shape.split()
            colour = tint if colour == "*" else colour
            if kind == "t":
                height = float(rest[2])
                strokes = list(letters(rest[3]))
                middle = max(points_P2[:, 0].max() for points_P2, _ in strokes) / 2
                for points_P2, bent in strokes:
                    points_P2 = (points_P2 - [middle, 5]) * (height / 10) + [float(rest[0]), float(rest[1])]
                    points_P2 = smooth(points_P2, False) if bent and len(points_P2) > 2 else points_P2
                    self.stroke(fine(points_P2), 0.15 * height * size / 100 * unit, colour)
                continue
            numbers = [float(number) for number in rest]
            if kind in "ls":
                points_P2 = np.array(numbers[1:]).reshape(-1, 2)
                points_P2 = smooth(points_P2, False) if kind == "s" else points_P2
                self.stroke(fine(points_P2), numbers[0] * size / 100 * unit, colour)
                continue
            points_P2 = fine(outline(kind.lower(), numbers))
            self.fill(points_P2, colour)
            if kind.islower():
                self.stroke(np.vstack([points_P2, points_P2[:1]]), EDGE * unit, "ink")

    def picture(self) -> Image.Image:
        """The drawing, SIDE x SIDE, with the SHADES most frequent colours; others become the nearest of them."""
        fine_YXC = self.canvas_YXC.reshape(SIDE, FINE, SIDE, FINE, 3).astype(np.int64)
        mean_N = (fine_YXC.sum((1, 3)) // (FINE * FINE)) @ [1 << 16, 1 << 8, 1]
        found_N, where_N, count_N = np.unique(mean_N.ravel(), return_inverse=True, return_counts=True)
        found_NC = np.stack([found_N >> 16, found_N >> 8 & 255, found_N & 255], axis=1)
        kept_SC = found_NC[np.argsort(-count_N, kind="stable")[:SHADES]]
        far_NS = ((found_NC[:, None] - kept_SC) ** 2).sum(-1)
        picture = Image.fromarray(far_NS.argmin(1)[where_N.reshape(-1)].reshape(SIDE, SIDE).astype(np.uint8), "P")
        picture.putpalette(kept_SC.astype(np.uint8).tobytes())
        return picture


def outline(kind: str, numbers: list[float]) -> np.ndarray:
    """The corners of a shape, points_P2 in the drawing's units."""
    if kind not in "obpc":
        raise ValueError(f"a shape of kind {kind!r}: expected o, b, p, c, l, s or t")
    if kind in "pc":
        points_P2 = np.array(numbers).reshape(-1, 2)
        return smooth(points_P2, True) if kind == "c" else points_P2
    turn = np.round(np.arange(48) * (np.pi / 24), 6)
    circle_P2 = np.round(np.stack([np.cos(turn), np.sin(turn)], axis=1), 5)
    if kind == "o":
        return circle_P2 * numbers[2:] + numbers[:2]
    x0, y0, x1, y1, r = [*numbers, 0][:5]
    if not r:
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    corners = [(x1 - r, y1 - r), (x0 + r, y1 - r), (x0 + r, y0 + r), (x1 - r, y0 + r)]
    return np.vstack([circle_P2[12 * i : 12 * i + 13] * r + corner for i, corner in enumerate(corners)])
