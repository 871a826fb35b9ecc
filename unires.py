"""UniRes: how a picture or a video becomes grids, and how the features of the grids become tokens.

What      The steps around CLIP and the projector (longva.py): choose how many grids a picture gets, cut it into
          them, and pool and order their features. AnyRes, the paper's baseline, stands beside each step.

              rows, cols = choose_grids(1920, 1080, side=336)      4 rows of 6 grids
              pixels_NCYX = cut(picture, rows, cols, side=336)     24 grids of 336x336 pixels
              x_NPD = projector(tower(pixels_NCYX))                24 x 576 features (longva.py)
              x_TD = unires(x_NPD)                                 24 x 144 = 3456 tokens

          A video is a picture of one row: its N frames are N grids. `preprocess` takes the first two steps; a
          `Layout` keeps what the last one needs.
Paper     Sec. 3.2 and Fig. 8 (UniRes against AnyRes); AnyRes is LLaVA-NeXT's.
Run       imported by longva.py, train_vision.py and vniah.py
Dimensions  N grids = frames   P patches per grid (576)   M tokens per pooled grid (144)   D LM width
          T tokens   C colour channels (3)   Y X pixels (336 336)
Differs   Rule "canvas" is the release's way to choose grids, "floor" the paper's. The release has 200 canvases, all
          but the single grid, so that the smallest picture takes two; kept, because its weights expect it.
          UniRes has no base grid: the release encodes one and then drops it.
          Every grid is pooled, also a single one; the release leaves a single crop unpooled (576 tokens).
          No newline follows a video in AnyRes; the release's code of June 2024 appends one image_newline.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, isqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import tokens_per_grid
from data.video import Picture, check_size, rgb

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, per colour, of pixels in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
FILL = (122, 116, 104)  # int(255 * MEAN): what a letterbox is filled with, nearly zero to CLIP
LIMIT = 49  # grids per picture, at most (Sec. 3.2)
ANYRES = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]  # LLaVA-NeXT's canvases, (rows, cols), first of equals wins
RULES = ("canvas", "floor", "anyres")  # ways to choose the number of grids


# ---- how many grids ------------------------------------------------------------------------------


def floor_grids(width: int, height: int, side: int, limit: int = LIMIT) -> tuple[int, int]:
    """The paper's rule: as many whole grids as fit each way (Sec. 3.2), at least one (ours) -> (rows, cols).

    Where these are more than `limit`, the picture is first scaled down, aspect kept, to the area of `limit`
    grids: then floor(sqrt(limit * width / height)) of them fit across, in integers so that 7.0 is never 6.
    """
    rows, cols = max(1, height // side), max(1, width // side)
    if rows * cols > limit:
        rows, cols = isqrt(limit * height // width), isqrt(limit * width // height)
        rows, cols = min(max(1, rows), limit), min(max(1, cols), limit)  # for pictures thinner than limit:1
    return rows, cols


def canvases(limit: int = LIMIT) -> list[tuple[int, int]]:
    """All (rows, cols) of 2 to `limit` grids in the release's order: narrow before wide, low before high."""
    return [(r, c) for c in range(1, limit + 1) for r in range(1, limit // c + 1) if r * c > 1]


def best_canvas(width: int, height: int, side: int, shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """The (rows, cols) that keeps most of the picture's pixels; of equals the one with least padding, then the first.

    Raises ValueError where there is no shape.
    """
    if not shapes:
        raise ValueError("no canvas has fewer than 2 grids; raise the limit or choose the rule 'floor'")

    def score(shape: tuple[int, int]) -> tuple[int, int]:
        rows, cols = shape
        scale = min(cols * side / width, rows * side / height)
        visible = min(int(width * scale) * int(height * scale), width * height)
        return visible, -(rows * cols * side * side - visible)

    return max(shapes, key=score)


def choose_grids(width: int, height: int, side: int, rule: str = "canvas", limit: int = LIMIT) -> tuple[int, int]:
    """How many grids of `side` pixels a picture of width x height pixels gets -> (rows, cols).

    rule "floor": the paper's; "canvas": the release's, the best of 200 canvases; "anyres": LLaVA-NeXT's, the best of
    five, its base grid not counted. Raises ValueError for a picture that check_size refuses, or another rule.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r} to choose grids; choose one of {', '.join(RULES)}")
    check_size(width, height)
    if rule == "floor":
        return floor_grids(width, height, side, limit)
    shapes = canvases(limit) if rule == "canvas" else [(r, c) for r, c in ANYRES if r * c <= limit]
    return best_canvas(width, height, side, shapes)


# ---- features to tokens --------------------------------------------------------------------------


def pool(x_NPD: Tensor) -> Tensor:
    """Average 2x2 patches inside each grid: x_NMD. Raises ValueError for an odd number of patches along a side."""
    patches = isqrt(x_NPD.shape[1])
    assert patches**2 == x_NPD.shape[1], f"{x_NPD.shape[1]} patches make no square"
    half = isqrt(tokens_per_grid(patches))  # which refuses an odd side
    return x_NPD.unflatten(1, (half, 2, half, 2)).mean(dim=(2, 4)).flatten(1, 2)  # over y and x inside each block


def unires(x_NPD: Tensor) -> Tensor:
    """Average 2x2 patches inside each grid, then put grid after grid: x_TD, T = N * P / 4 (Fig. 8).

    Takes the projector's output, patches row by row in each grid, grids row by row. Nothing separates grids, so a
    picture of six grids and a video of six frames look alike: what the model learns from pictures holds for video.
    """
    return pool(x_NPD).flatten(0, 1)  # tokens in the order grid, y, x


def anyres(x_NPD: Tensor, rows: int, cols: int, newline_D: Tensor, unpad: tuple[int, int] | None = None) -> Tensor:
    """LLaVA-NeXT's order: the base grid, then each row of the whole picture, ended by newline_D -> x_TD.

    The base comes first, N = 1 + rows * cols. A row of the picture runs across grids, so these are first put
    together to one map. `unpad`, the picture's (width, height) in pixels, trims padding. LLaVA-NeXT pools nothing.
    """
    (N, P, D), patches = x_NPD.shape, isqrt(x_NPD.shape[1])
    assert patches**2 == P and 1 + rows * cols == N, f"1 + {rows} x {cols} grids are not {tuple(x_NPD.shape)}"
    height, width = rows * patches, cols * patches
    grids = x_NPD[1:].unflatten(1, (patches, patches)).unflatten(0, (rows, cols))  # row, col, y, x, D
    feature_map = grids.transpose(1, 2).reshape(height, width, D)  # row and y, col and x, D
    top, left = unpad_margins(height, width, unpad)
    feature_map = feature_map[top : height - top, left : width - left]
    newlines = newline_D.to(x_NPD.dtype).expand(len(feature_map), 1, D)
    return torch.cat([x_NPD[0], torch.cat([feature_map, newlines], dim=1).flatten(0, 1)])


def unpad_margins(height: int, width: int, unpad: tuple[int, int] | None) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) to trim from a map of patches, as padding (`unpad_image`).

    `unpad` is the picture's (width, height) in pixels. The rounding is the release's: a row that shows a little of the
    picture may go, and of pictures thinner than 72:1 (36:1 of pooled grids) all rows do.
    """
    if unpad is None:
        return 0, 0
    if unpad[0] / unpad[1] > width / height:  # wider than the map
        return (height - int(unpad[1] * (width / unpad[0]))) // 2, 0
    return 0, (width - int(unpad[0] * (height / unpad[1]))) // 2


# ---- pictures to grids ---------------------------------------------------------------------------


def cut(picture: Picture, rows: int, cols: int, side: int, rule: str = "canvas") -> Tensor:
    """Lay a picture on rows x cols grids and cut them apart, row by row -> pixels_NCYX, uint8.

    Rules "canvas" and "anyres": the picture keeps its aspect in the middle of a black canvas (release).
    Rule "floor": it is stretched over the canvas, as the paper names no padding: all content is kept, and no token is
    spent on black. The aspect changes by up to 2:1; by more where a side is less than a grid, or the limit is reached.
    """
    image, width, height = rgb(picture), cols * side, rows * side
    if rule == "floor":
        canvas = image.resize((width, height), Image.BICUBIC)
    else:
        across, down = width / image.width, height / image.height
        if across < down:
            fitted = image.resize((width, min(ceil(image.height * across), height)), Image.BICUBIC)
        else:
            fitted = image.resize((min(ceil(image.width * down), width), height), Image.BICUBIC)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    grids = to_pixels(canvas).unflatten(2, (cols, side)).unflatten(1, (rows, side))  # colour, row, y, col, x
    return grids.permute(1, 3, 0, 2, 4).flatten(0, 1)


def base_grid(picture: Picture, side: int) -> Tensor:
    """The whole picture squashed into one grid, pixels_1CYX, uint8: what AnyRes puts first."""
    return to_pixels(rgb(picture).resize((side, side), Image.BICUBIC))[None]


def frame(picture: Picture, side: int, fit: str = "crop") -> Tensor:
    """One frame of a video as one grid, pixels_CYX, uint8.

    fit "crop": the short side becomes `side` and the middle is kept (the release's demo, its benchmarks, DPO).
    fit "pad": all is kept, on a square filled with CLIP's mean colour (V-NIAH, Sec. 4). The two look different
    to the model: scores of one are not comparable with the other's.
    """
    image = rgb(picture)
    if fit == "crop":
        short = min(image.size)
        image = image.resize((side * image.width // short, side * image.height // short), Image.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return to_pixels(image.crop((left, top, left + side, top + side)))
    assert fit == "pad", f"a frame can be fitted by 'crop' or by 'pad', not by {fit!r}"
    return to_pixels(letterbox(image, side))


def frames(pictures: Iterable[Picture], side: int, fit: str = "crop") -> Tensor:
    """The frames of a video as one row of grids, pixels_NCYX, uint8; ValueError where there is none."""
    grids = [frame(picture, side, fit) for picture in pictures]
    if not grids:
        raise ValueError("a video without frames cannot be shown; check how frames were sampled")
    return torch.stack(grids)


@dataclass(frozen=True)
class Layout:
    """How the grids of one picture or one video lie: all that is needed to turn their features into tokens.

    A video of N frames is Layout(1, N) in all schemes: AnyRes, too, shows video as pooled frames.
    """

    rows: int
    cols: int
    scheme: str = "unires"  # "anyres" has the base grid in front; "anyres_pooled" (ours) is that of pooled grids
    unpad: tuple[int, int] | None = None  # anyres: the picture's width and height, pixels

    @property
    def grids(self) -> int:
        """N, the grids that CLIP encodes."""
        return self.rows * self.cols + (self.scheme != "unires")

    def tokens(self, patches: int) -> int:
        """T, how many tokens they become; `patches` along the side of a grid. Needs no model."""
        if self.scheme == "unires":
            return self.grids * tokens_per_grid(patches)
        patches //= 2 if self.scheme == "anyres_pooled" else 1
        height, width = self.rows * patches, self.cols * patches
        top, left = unpad_margins(height, width, self.unpad)
        return patches**2 + (height - 2 * top) * (width - 2 * left + 1)  # each row ends in a newline

    def arrange(self, x_NPD: Tensor, newline_D: Tensor | None = None) -> Tensor:
        """Turn projected features into tokens x_TD by this layout's scheme; only AnyRes needs newline_D."""
        if self.scheme == "unires":
            return unires(x_NPD)
        if self.scheme == "anyres_pooled":
            x_NPD = pool(x_NPD)
        assert newline_D is not None, "anyres ends each row with the model's image_newline"
        return anyres(x_NPD, self.rows, self.cols, newline_D, self.unpad)


def preprocess(
    picture: Picture, side: int, rule: str = "canvas", limit: int = LIMIT, scheme: str | None = None
) -> tuple[Tensor, Layout]:
    """A picture as (pixels_NCYX, layout): choose grids by `rule` and cut; AnyRes has the base in front.

    The scheme follows from the rule (only "anyres" is AnyRes) unless it is given.
    """
    width, height = (picture.shape[1], picture.shape[0]) if isinstance(picture, np.ndarray) else picture.size
    rows, cols = choose_grids(width, height, side, rule, limit)
    pixels_NCYX = cut(picture, rows, cols, side, rule)
    scheme = scheme or ("anyres" if rule == "anyres" else "unires")
    if scheme == "unires":
        return pixels_NCYX, Layout(rows, cols)
    unpad = None if rule == "floor" else (width, height)  # a stretched picture has no padding to cut off
    return torch.cat([base_grid(picture, side), pixels_NCYX]), Layout(rows, cols, scheme, unpad)


# ---- pixels --------------------------------------------------------------------------------------


def letterbox(image: Image.Image, side: int) -> Image.Image:
    """All of an RGB picture in the middle of a square of `side` pixels, the rest in CLIP's mean colour.

    Equal to shrinking a square as wide as the picture's long side, which for a thin picture would take gigabytes: so
    it is shrunk in strips.
    """
    long = max(image.size)
    left, top = (long - image.width) // 2, (long - image.height) // 2
    narrow = Image.new("RGB", (side, long), FILL)
    for y in range(0, image.height, 256):
        strip = Image.new("RGB", (long, min(256, image.height - y)), FILL)
        strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
        narrow.paste(strip.resize((side, strip.height), Image.BICUBIC), (0, top + y))
    return narrow.resize((side, side), Image.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """8-bit RGB as pixels_CYX, uint8: a quarter of the bytes of float32, until `normalise`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU through pinned memory, so that the CPU does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def normalise(pixels_NCYX: Tensor) -> Tensor:
    """uint8 pixels as CLIP's input, on the same device: float32, (x / 255 - MEAN) / STD for each colour."""
    mean_C11, std_C11 = (torch.tensor(x, device=pixels_NCYX.device)[:, None, None] for x in (MEAN, STD))
    return pixels_NCYX.float().div_(255).sub_(mean_C11).div_(std_C11)


# ---- each picture encoded once, where its tokens are needed --------------------------------------


class UniqueGrids:
    """The grids that CLIP encodes for a batch, each picture's once, and which of their tokens each text shows.

    pictures: (pixels_NCYX, layout) of each picture or video. shown: for every placeholder of the batch, in order, the
    index of its picture; both answers of a DPO pair name the same one. A unit is what becomes tokens on its own:
    in UniRes a grid, in AnyRes a whole picture.
    """

    def __init__(self, pictures: list[tuple[Tensor, Layout]], shown: Iterable[int], patches: int, scheme: str):
        self.patches, self.scheme = patches, scheme
        self.units: list[tuple[Tensor, Layout]] = []
        self.starts = [0]  # the first token of each unit, then the number of all tokens
        tokens_of_picture = []
        for pixels_NCYX, layout in pictures:
            first = self.starts[-1]
            unit_layout = Layout(1, 1) if layout.scheme == "unires" else layout
            for unit_NCYX in pixels_NCYX.split(unit_layout.grids):
                self.units.append((unit_NCYX, unit_layout))
                self.starts.append(self.starts[-1] + unit_layout.tokens(patches))
            tokens_of_picture.append(range(first, self.starts[-1]))
        # For every visual token of the batch, in order: its index among the tokens of all units.
        self.token = torch.tensor([token for i in shown for token in tokens_of_picture[i]], dtype=torch.int64)

    def subset(self, wanted: Tensor, side: int) -> tuple[Tensor, list[Layout], Tensor]:
        """Return (pixels_NCYX, layouts, token) for the visual tokens numbered `wanted`, those that a rank holds.

        Where it holds none, a blank grid that no text shows keeps all ranks calling the same modules.
        """
        starts, token = torch.tensor(self.starts), self.token[wanted]
        unit = torch.bucketize(token, starts, right=True) - 1
        used, inverse = unit.unique(return_inverse=True)
        layouts = [self.units[i][1] for i in used] or [Layout(1, 1, self.scheme)]
        pixels = [self.units[i][0] for i in used] or [torch.zeros(layouts[0].grids, 3, side, side, dtype=torch.uint8)]
        local_starts = torch.tensor([0, *(layout.tokens(self.patches) for layout in layouts)]).cumsum(0)
        local_token = token - starts[unit] + local_starts[inverse]
        if all(layout.scheme == "unires" for layout in layouts):  # grid after grid, as in a video: one call, not many
            layouts = [Layout(1, sum(layout.grids for layout in layouts))]
        return torch.cat(pixels), layouts, local_token
