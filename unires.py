"""UniRes: how a picture or a video becomes grids, and how the features of the grids become tokens.

What      Three steps around CLIP and the projector (longva.py): choose how many grids a picture gets, cut
          them out of it, and, once they are features, pool and order them. AnyRes, the baseline, is the twin.
Paper     Sec. 3.2 and Fig. 8 (UniRes against AnyRes); AnyRes is LLaVA-NeXT's.
Run       imported by longva.py, train_vision.py and vniah.py.
Key       N grids = frames   P patches per grid (576)   D LM width   T tokens
          C colour channels  Y X pixels (336 336)       H W height and width of a map of patches
Deviates  "canvas" is the release's way to choose grids, "floor" the paper's. The release has 200 canvases,
          all but the single grid, so that the smallest picture takes two; kept, for its weights expect it.
          The base grid is not made for UniRes: the release encodes it and then throws it away.
          Every grid is pooled, also a lone one; the release leaves a single crop unpooled (576 tokens).
          As in the release, transparency is dropped. Against it, 16-bit grey is scaled to 8 bits (it would
          clip to white) and absurdly large or thin pictures are refused. Pictures are shown as they are
          given: turning photographs upright is for whoever reads them (data/video.py).

    rows, cols = choose_grids(1920, 1080, side=336)           4 rows of 6 grids
    pixels_NCYX = cut(picture, rows, cols, side=336)          24 grids of 336x336 pixels
    x_NPD = projector(tower(pixels_NCYX))                     24 x 576 features (longva.py)
    x_TD = unires(x_NPD, rows, cols)                          24 x 144 = 3456 tokens

A video is a picture of one row: its N frames are N grids (`frames`, then `unires(x_NPD, 1, N)`). `show` does
the first two steps at once, and a `Layout` keeps what the last one needs: callers need not know the scheme.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, isqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import tokens_per_grid
from data.video import MAX_ASPECT, MAX_PIXELS

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, per colour, of pixels in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
FILL = (122, 116, 104)  # int(255 * MEAN): what a letterbox is filled with, nearly zero to CLIP
LIMIT = 49  # grids per picture, at most (Sec. 3.2)
ANYRES = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]  # LLaVA-NeXT's canvases, (rows, cols), first of equals wins

Picture = Image.Image | np.ndarray  # an array is uint8[Y, X, 3]


# ----------------------------------------------------------------------------------- 1 how many grids


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture too large or too thin to handle, before it is decoded. In pixels."""
    short, long = sorted((width, height))
    if short < 1 or short * long > MAX_PIXELS or long > MAX_ASPECT * short:
        raise ValueError(
            f"a picture of {width}x{height} pixels cannot be used: at most {MAX_PIXELS // 10**6} megapixels "
            f"and a long side of at most {MAX_ASPECT} times the short one are expected; shrink or crop it"
        )


def floor_grids(width: int, height: int, side: int, limit: int = LIMIT) -> tuple[int, int]:
    """The paper's rule: as many whole grids as fit each way, at least one -> (rows, cols) (Sec. 3.2).

    Where these are more than `limit`, the picture is first scaled down, aspect kept, to the area of `limit`
    grids: then floor(sqrt(limit * width / height)) of them fit across, in integers so that 7.0 is never 6.
    """
    rows, cols = max(1, height // side), max(1, width // side)
    if rows * cols > limit:
        rows, cols = isqrt(limit * height // width), isqrt(limit * width // height)
        rows, cols = min(max(1, rows), limit), min(max(1, cols), limit)  # for pictures thinner than limit:1
    return rows, cols


def canvases(limit: int = LIMIT) -> list[tuple[int, int]]:
    """All (rows, cols) of 2 to `limit` grids, in the release's order: narrow before wide, low before high."""
    return [(r, c) for c in range(1, limit + 1) for r in range(1, limit // c + 1) if r * c > 1]


def best_canvas(width: int, height: int, side: int, shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """The (rows, cols) that shows most of the picture's own pixels; of equals the least wasteful, the first.

    Enlarging adds no pixels, so that a small picture takes the canvas with the least waste.
    """
    if not shapes:
        raise ValueError("no canvas has fewer than 2 grids; raise the limit or choose the rule 'floor'")

    def merit(shape: tuple[int, int]) -> tuple[int, int]:
        rows, cols = shape
        scale = min(cols * side / width, rows * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, -(rows * cols * side * side - shown)

    return max(shapes, key=merit)


def canvas_grids(width: int, height: int, side: int, limit: int = LIMIT) -> tuple[int, int]:
    """The release's rule: the best of all canvases, 200 of them -> (rows, cols)."""
    return best_canvas(width, height, side, canvases(limit))


def anyres_grids(width: int, height: int, side: int, limit: int = LIMIT) -> tuple[int, int]:
    """LLaVA-NeXT's rule: the best of five canvases -> (rows, cols), the base grid not counted."""
    return best_canvas(width, height, side, [(r, c) for r, c in ANYRES if r * c <= limit])


RULES = {"canvas": canvas_grids, "floor": floor_grids, "anyres": anyres_grids}


def choose_grids(width: int, height: int, side: int, rule: str = "canvas", limit: int = LIMIT) -> tuple[int, int]:
    """How many grids of `side` pixels a picture of width x height pixels gets -> (rows, cols).

    Raises ValueError for a picture that check_size refuses, a rule not in RULES, or a limit below 1.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r} to choose grids; choose one of {', '.join(RULES)}")
    if limit < 1:
        raise ValueError(f"a picture cannot be shown in at most {limit} grids; allow at least 1")
    check_size(width, height)
    return RULES[rule](width, height, side, limit)


# ------------------------------------------------------------------------------- 2 pictures to pixels


def rgb(picture: Picture) -> Image.Image:
    """Any picture as 8-bit RGB.

    Raises ValueError where check_size does, and for numbers whose range is unknown (mode F, or over 16 bits).
    """
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    check_size(*image.size)
    if image.mode[0] in "FI":  # one number per pixel; convert("RGB") would turn all above 255 into white
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() >= 2**16:
            raise ValueError(f"a picture of mode {image.mode} has no known range; save it as RGB")
        image = Image.fromarray(((grey.astype(np.int32) + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """8-bit RGB as pixels_CYX, uint8: a quarter of the bytes of float32, until `normalise`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU through pinned memory, so that the CPU goes on meanwhile."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def normalise(pixels_NCYX: Tensor) -> Tensor:
    """uint8 pixels as CLIP was trained on them, where they are: float32, mean 0 and deviation 1 per colour."""
    mean_C11, std_C11 = (torch.tensor(x, device=pixels_NCYX.device)[:, None, None] for x in (MEAN, STD))
    return pixels_NCYX.float().div_(255).sub_(mean_C11).div_(std_C11)


def cut(picture: Picture, rows: int, cols: int, side: int, rule: str = "canvas") -> Tensor:
    """Lay a picture on rows x cols grids and cut them apart, row by row -> pixels_NCYX, uint8.

    Rules "canvas" and "anyres": the picture keeps its aspect in the middle of a black canvas (release).
    Rule "floor": it is stretched over the canvas. The paper names no padding, and what is left over each way
    is less than a grid: stretching keeps all of the content, and no token is spent on black.
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


def letterbox(image: Image.Image, side: int) -> Image.Image:
    """All of an RGB picture in the middle of a square of `side` pixels, the rest in CLIP's mean colour.

    What comes out is the picture on a square as wide as its long side, shrunk: bicubic, across and then down.
    That square would take gigabytes where the picture is long and thin, so strips of it go across one by one.
    """
    long = max(image.size)
    left, top = (long - image.width) // 2, (long - image.height) // 2
    narrow = Image.new("RGB", (side, long), FILL)
    for y in range(0, image.height, 256):
        strip = Image.new("RGB", (long, min(256, image.height - y)), FILL)
        strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
        narrow.paste(strip.resize((side, strip.height), Image.BICUBIC), (0, top + y))
    return narrow.resize((side, side), Image.BICUBIC)


def frame(picture: Picture, side: int, how: str = "crop") -> Tensor:
    """One frame of a video as one grid, pixels_CYX, uint8.

    "crop": the short side becomes `side` and the middle is kept (the release's demo, its benchmarks, DPO).
    "pad": all is kept, on a square filled with CLIP's mean colour (V-NIAH, Sec. 4). The two look different to
    the model: scores of one are not comparable with the other's.
    """
    image = rgb(picture)
    if how == "crop":
        short = min(image.size)
        image = image.resize((side * image.width // short, side * image.height // short), Image.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return to_pixels(image.crop((left, top, left + side, top + side)))
    if how == "pad":
        return to_pixels(letterbox(image, side))
    raise ValueError(f"a frame can be fitted by 'crop' or by 'pad', not by {how!r}")


def frames(pictures: Iterable[Picture], side: int, how: str = "crop") -> Tensor:
    """The frames of a video as one row of grids, pixels_NCYX, uint8. Raises ValueError where there is no frame."""
    grids = [frame(picture, side, how) for picture in pictures]
    if not grids:
        raise ValueError("a video without frames cannot be shown; check how frames were sampled")
    return torch.stack(grids)


# -------------------------------------------------------------------------------- 3 features to tokens


def check_even(patches: int) -> None:
    """Raise ValueError unless a grid of patches x patches can be pooled 2x2."""
    if patches % 2:
        raise ValueError(
            f"a grid of {patches}x{patches} patches cannot be pooled 2x2; "
            "choose image_size and patch_size so that their quotient is even"
        )


def unires(x_NPD: Tensor, rows: int, cols: int) -> Tensor:
    """Average 2x2 patches inside each grid, then put grid after grid: x_TD, T = N * P / 4 (Fig. 8).

    Takes features that left the whole projector, patches row by row in each grid, grids row by row. Nothing
    stands between grids, so that a picture of six grids and a video of six frames look alike: what the model
    learns from pictures holds for video. Raises ValueError for an odd number of patches along a side.
    """
    (N, P, _), patches = x_NPD.shape, isqrt(x_NPD.shape[1])
    assert patches**2 == P and rows * cols == N, f"{rows} x {cols} grids are not {tuple(x_NPD.shape)}"
    check_even(patches)
    half = patches // 2
    return x_NPD.unflatten(1, (half, 2, half, 2)).mean(dim=(2, 4)).flatten(0, 2)  # grid, row, y, col, x, D


def margins(height: int, width: int, unpad: tuple[int, int] | None) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) of a map of patches that show padding alone.

    `unpad` is the picture's (width, height) in pixels; the rounding is the release's.
    """
    if unpad is None:
        return 0, 0
    if unpad[0] / unpad[1] > width / height:  # wider than the map
        return (height - int(unpad[1] * (width / unpad[0]))) // 2, 0
    return 0, (width - int(unpad[0] * (height / unpad[1]))) // 2


def anyres(x_NPD: Tensor, rows: int, cols: int, newline_D: Tensor, unpad: tuple[int, int] | None = None) -> Tensor:
    """LLaVA-NeXT's order: the base grid, then each row of the whole picture, ended by newline_D -> x_TD.

    The base comes first, N = 1 + rows * cols; nothing is pooled. A row of the picture runs across grids, so
    these are first put together to one map. `unpad`, the picture's (width, height) in pixels, trims padding.
    """
    (N, P, D), patches = x_NPD.shape, isqrt(x_NPD.shape[1])
    assert patches**2 == P and 1 + rows * cols == N, f"1 + {rows} x {cols} grids are not {tuple(x_NPD.shape)}"
    height, width = rows * patches, cols * patches
    grids = x_NPD[1:].unflatten(1, (patches, patches)).unflatten(0, (rows, cols))  # row, col, y, x, D
    whole = grids.transpose(1, 2).reshape(height, width, D)
    top, left = margins(height, width, unpad)
    map_HWD = whole[top : height - top, left : width - left]
    newline_H1D = newline_D.to(x_NPD.dtype).expand(len(map_HWD), 1, D)
    return torch.cat([x_NPD[0], torch.cat([map_HWD, newline_H1D], dim=1).flatten(0, 1)])


def token_count(
    rows: int, cols: int, patches: int, scheme: str = "unires", unpad: tuple[int, int] | None = None
) -> int:
    """T, how many tokens `unires` or `anyres` will make of grids of patches x patches; needs no model."""
    if scheme == "unires":
        check_even(patches)
        return rows * cols * tokens_per_grid(patches)
    assert scheme == "anyres", scheme
    height, width = rows * patches, cols * patches
    top, left = margins(height, width, unpad)
    return patches**2 + (height - 2 * top) * (width - 2 * left + 1)


@dataclass(frozen=True)
class Layout:
    """How the grids of one picture or one video lie: all that is needed to turn their features into tokens.

    A video of N frames is Layout(1, N) in both schemes: AnyRes, too, shows video as pooled frames.
    """

    rows: int
    cols: int
    scheme: str = "unires"  # or "anyres", which has the base grid in front
    unpad: tuple[int, int] | None = None  # anyres: the picture's width and height, pixels

    def __post_init__(self):
        if self.scheme not in ("unires", "anyres"):
            raise ValueError(f"there is no scheme {self.scheme!r}; choose unires or anyres")

    @property
    def grids(self) -> int:
        """N, how many grids CLIP sees."""
        return self.rows * self.cols + (self.scheme == "anyres")

    def tokens(self, patches: int) -> int:
        """T, how many tokens they become; `patches` along the side of a grid."""
        return token_count(self.rows, self.cols, patches, self.scheme, self.unpad)

    def arrange(self, x_NPD: Tensor, newline_D: Tensor | None = None) -> Tensor:
        """Turn projected features into tokens x_TD by this layout's scheme; only anyres needs newline_D."""
        if self.scheme == "unires":
            return unires(x_NPD, self.rows, self.cols)
        assert newline_D is not None, "anyres ends each row with the model's image_newline"
        return anyres(x_NPD, self.rows, self.cols, newline_D, self.unpad)


def preprocess(
    picture: Picture, side: int, rule: str = "canvas", limit: int = LIMIT, scheme: str | None = None
) -> tuple[Tensor, Layout]:
    """A picture as (pixels_NCYX, layout): choose grids by `rule` and cut; scheme "anyres" has the base in front.

    The scheme follows from the rule (only "anyres" is AnyRes) unless it is given.
    """
    width, height = (picture.shape[1], picture.shape[0]) if isinstance(picture, np.ndarray) else picture.size
    rows, cols = choose_grids(width, height, side, rule, limit)
    pixels_NCYX = cut(picture, rows, cols, side, rule)
    if (scheme or ("anyres" if rule == "anyres" else "unires")) == "unires":
        return pixels_NCYX, Layout(rows, cols)
    unpad = None if rule == "floor" else (width, height)  # a stretched picture has no padding to cut off
    return torch.cat([base_grid(picture, side), pixels_NCYX]), Layout(rows, cols, "anyres", unpad)


# ------------------------------------------------------------------------- 4 each thing seen once, where it is needed


def grid_hashes(pixels_NCYX: Tensor, layout: Layout) -> list[bytes]:
    """A digest of each part of a picture or video: of its grids, or with AnyRes of the whole."""
    return [hashlib.blake2b(part.numpy().tobytes()).digest() for part in cut_up(pixels_NCYX, layout)]


def cut_up(pixels_NCYX: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The parts of a picture or video: what becomes tokens on its own."""
    return pixels_NCYX.split(1 if layout.scheme == "unires" else len(pixels_NCYX))


class UniqueGrids:
    """What CLIP must see for a batch, each different thing once, and which of its tokens goes where in the text.

    A part is what becomes tokens on its own: with UniRes a grid, with AnyRes a picture. `row_I`, int64: for every
    visual token of the batch, in order, its row among the tokens of all parts. `shown`: (pixels, layout, keys) of each.
    """

    def __init__(self, shown: Iterable[tuple[Tensor, Layout, list[bytes]]], patches: int, scheme: str):
        self.patches, self.scheme, self.pixels, self.layouts = patches, scheme, [], []
        known, rows = {}, []
        self.starts = [0]  # of the parts' tokens
        for pixels_NCYX, layout, names in shown:
            how = Layout(1, 1) if layout.scheme == "unires" else layout
            for piece_NCYX, name in zip(cut_up(pixels_NCYX, layout), names):
                if (key := (name, how)) not in known:
                    known[key] = range(self.starts[-1], self.starts[-1] + how.tokens(patches))
                    self.pixels.append(piece_NCYX)
                    self.layouts.append(how)
                    self.starts.append(known[key].stop)
                rows += known[key]
        self.row_I = torch.tensor(rows, dtype=torch.int64)

    def only(self, nth_J: Tensor, side: int) -> tuple[Tensor, list[Layout], Tensor]:
        """(pixels_NCYX, layout, row_J) for some of the visual tokens, numbers `nth_J` of them, and no part without use.

        Where nothing is shown, a blank grid that no token shows keeps all ranks calling the same modules.
        """
        row_J = self.row_I[nth_J]
        part_J = torch.bucketize(row_J, torch.tensor(self.starts), right=True) - 1
        used, which_J = part_J.unique(return_inverse=True)
        layout = [self.layouts[i] for i in used] or [Layout(1, 1, self.scheme)]
        size = torch.tensor([0, *(how.tokens(self.patches) for how in layout)]).cumsum(0)
        moved_J = row_J - torch.tensor(self.starts)[part_J] + size[which_J]
        pixels = [self.pixels[i] for i in used] or [torch.zeros(layout[0].grids, 3, side, side, dtype=torch.uint8)]
        if all(how.scheme == "unires" for how in layout):
            layout = [Layout(1, sum(how.grids for how in layout))]  # grid after grid, as in a video: one call, not many
        return torch.cat(pixels), layout, moved_J
