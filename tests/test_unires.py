"""unires.py against slow loops, the release's token counts, and Hugging Face's CLIP and LLaVA-NeXT preprocessing."""

import random
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

import unires
from unires import Layout, choose_grids, normalise

# width, height, canvas (width, height), UniRes tokens, the paper's tokens, AnyRes map (h, w), AnyRes tokens.
# Computed with the release's functions. None: beyond 49 grids, checked below.
GOLDEN = [
    (336, 336, (336, 672), 288, 144, (24, 24), 1176),
    (100, 100, (336, 672), 288, 144, (24, 24), 1176),
    (500, 400, (672, 672), 576, 144, (38, 48), 2438),
    (480, 640, (672, 672), 576, 144, (48, 36), 2352),
    (672, 672, (672, 672), 576, 576, (48, 48), 2928),
    (1920, 1080, (2016, 1344), 3456, 2160, (28, 48), 1948),
    (1080, 1920, (1344, 2016), 3456, 2160, (48, 28), 1968),
    (1654, 2339, (1680, 2352), 5040, 3456, (48, 34), 2256),
    (2352, 2352, (2352, 2352), 7056, 7056, (48, 48), 2928),
    (800, 4000, (1008, 4032), 5184, 3168, (72, 14), 1656),
    (1200, 6000, (1008, 5040), 6480, None, (72, 14), 1656),
    (4000, 4000, (2352, 2352), 7056, None, (48, 48), 2928),
    (336, 3000, (336, 3024), 1296, 1152, (72, 8), 1224),
]  # fmt: skip


def noise(width, height, mode="RGB", seed=0):
    """A smooth random picture: resizing it has something to interpolate."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 5), max(2, width // 5), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC).convert(mode)


def coded(N, side):
    """Features that say where they are: (grid, patch row, patch column)."""
    places = torch.cartesian_prod(torch.arange(N), torch.arange(side), torch.arange(side))
    return places.float().view(N, side * side, 3)


# ---- how many grids ------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height, canvas, tokens, paper, shape, anyres_tokens", GOLDEN)
def test_golden_token_counts(width, height, canvas, tokens, paper, shape, anyres_tokens):
    rows, cols = choose_grids(width, height, 336)
    assert (cols * 336, rows * 336) == canvas and Layout(rows, cols).tokens(24) == tokens
    if paper:
        rows, cols = choose_grids(width, height, 336, "floor")
        assert (rows, cols) == (max(1, height // 336), max(1, width // 336)) and Layout(rows, cols).tokens(24) == paper
    layout = Layout(*choose_grids(width, height, 336, "anyres"), "anyres", (width, height))
    assert layout.tokens(24) == anyres_tokens == 576 + shape[0] * (shape[1] + 1)


def test_canvases_are_the_release_s_200():
    slow = [(w, h) for w in range(1, 50) for h in range(1, 50) if w * h <= 49 and (w, h) != (1, 1)]
    assert [(cols, rows) for rows, cols in unires.canvases()] == slow
    assert len(slow) == 200 and slow[:2] == [(1, 2), (1, 3)] and slow[-1] == (49, 1)


@pytest.mark.oracle
def test_best_canvas_equals_transformers():
    """LLaVA-NeXT's select_best_resolution, here with the 200 canvases: same choice on random pictures."""
    processing = pytest.importorskip("transformers.image_processing_utils")
    rng = random.Random(0)
    for shapes, side, _ in product((unires.canvases(), unires.ANYRES, unires.canvases(6)), (336, 32), range(8)):
        width, height = rng.randint(1, 3000), rng.randint(1, 3000)
        pixels = [(r * side, c * side) for r, c in shapes]
        h, w = processing.select_best_resolution((height, width), pixels)
        assert unires.best_canvas(width, height, side, shapes) == (h // side, w // side), (width, height)


def test_floor_rule_scales_large_pictures_down():
    """Over the limit: the largest scaled-down copy whose area is at most 49 grids, searched for here slowly."""
    rng = random.Random(1)
    sizes = [(rng.randint(2700, 9000), rng.randint(2700, 9000)) for _ in range(50)]
    for width, height in [*sizes, (4000, 4000), (1200, 6000), (40000, 336), (336, 40000), (60000, 400)]:
        rows = max((n for n in range(1, 50) if n * n * width <= 49 * height), default=1)
        cols = max((n for n in range(1, 50) if n * n * height <= 49 * width), default=1)
        assert unires.floor_grids(width, height, 336) == (rows, cols) and rows * cols <= 49


def test_sizes_are_arguments():
    assert choose_grids(64, 64, 32, "canvas", limit=16) == (2, 2)
    assert choose_grids(100, 70, 32, "floor") == (2, 3)
    assert choose_grids(200, 130, 32, "floor", limit=4) == (1, 2)  # 4 x 6 grids shrunk to 1.61 x 2.48
    assert choose_grids(100, 30, 32, "anyres", limit=2) == (1, 2)


# ---- pictures to pixels --------------------------------------------------------------------------


def theirs(name, image, side, **how):
    """Pixels from one of transformers' image processors: the kind with Pillow and numpy, as the release's."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"{name}Pil", getattr(transformers, name))
    square = {"height": side, "width": side}
    return kind(size={"shortest_edge": side}, crop_size=square, **how)(image, return_tensors="pt")["pixel_values"][0]


SIZES = [(40, 30), (30, 40), (31, 57), (32, 32), (33, 200), (500, 40), (17, 5), (1, 3), (1, 1), (97, 96), (1921, 1081),
         (64, 700), (700, 513)]  # fmt: skip


@pytest.mark.oracle
def test_normalise_equals_transformers():
    """Bit for bit, for every value that a colour can have."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))
    assert torch.equal(normalise(unires.to_pixels(ramp)), theirs("CLIPImageProcessor", ramp, 256))
    assert tuple(int(255 * mean) for mean in unires.MEAN) == unires.FILL


@pytest.mark.oracle
@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize("size", SIZES)
def test_frames_equal_transformers(size, side):
    """CLIP's own processor, bit for bit; for "pad" on a square padded by hand: strips change nothing."""
    image, long = noise(*size), max(size)
    square = Image.new("RGB", (long, long), unires.FILL)
    square.paste(image, ((long - size[0]) // 2, (long - size[1]) // 2))
    for fit, whole in (("crop", image), ("pad", square)):
        assert torch.equal(normalise(unires.frame(image, side, fit)), theirs("CLIPImageProcessor", whole, side))


@pytest.mark.oracle
@pytest.mark.parametrize("rule", ["canvas", "anyres"])
@pytest.mark.parametrize("size", [s for s in SIZES if max(s) < 1000])
def test_cut_equals_transformers(size, rule):
    """Bit for bit LLaVA-NeXT's grids, with its 5 canvases or the release's 200; its first is the base grid."""
    side, image = 32, noise(*size)
    shapes = unires.canvases() if rule == "canvas" else unires.ANYRES
    pinpoints = [[rows * side, cols * side] for rows, cols in shapes]
    want = theirs("LlavaNextImageProcessor", image, side, image_grid_pinpoints=pinpoints)
    pixels, layout = unires.preprocess(image, side, rule, scheme="anyres")
    assert layout.grids == len(want) and torch.equal(normalise(pixels), want)
    assert torch.equal(normalise(unires.cut(image, layout.rows, layout.cols, side, rule)), want[1:])


@pytest.mark.parametrize("size", [(41, 30), (33, 100), (7, 5)])
def test_floor_is_stretched_and_cut_row_by_row(size):
    """The other rules' grids are compared with transformers above."""
    image, side = noise(*size), 16
    whole = unires.to_pixels(image.resize((3 * side, 2 * side), Image.BICUBIC))
    want = [whole[:, y : y + side, x : x + side] for y in (0, 16) for x in (0, 16, 32)]
    assert torch.equal(unires.cut(image, 2, 3, side, "floor"), torch.stack(want))


def test_letterbox_of_a_long_picture_stays_small():
    got = unires.frame(Image.new("RGB", (20000, 200), "white"), 32, "pad")  # else a square of 1.2 GB
    assert got.shape == (3, 32, 32) and got[:, 15:17].min() > 128


def test_frames_and_arrays(check_shapes):
    images = [noise(50, 40, seed=s) for s in range(3)]
    got = unires.frames((np.array(image) for image in images), 32)
    assert torch.equal(got, torch.stack([unires.frame(image, 32) for image in images]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, ">u2"])
def test_numbers_of_16_bits(dtype):
    """test_data_video.py has what else files hold."""
    for value, want in [(0, 0), (30000, 117), (60000, 233), (65535, 255)]:
        assert unires.rgb(Image.fromarray(np.full((4, 4), value, dtype))).getpixel((0, 0)) == (want,) * 3


class Undecoded(Image.Image):
    """A picture whose header claims a size, and which must not be decoded."""

    size = (9000, 4001)

    def load(self):
        raise AssertionError("decoded before its size was checked")


@pytest.mark.parametrize("image, message", [
    (Image.new("L", (201, 1)), "201x1 pixels cannot be used: .* at most 200 times"),
    (Image.new("L", (0, 5)), "0x5 pixels"),
    (Undecoded(), "9000x4001 pixels cannot be used: at most 36 megapixels"),
    (Image.new("F", (4, 4)), "mode F has no known range"),
    (Image.new("I", (4, 4), 70000), "mode I has no known range"),
    (Image.new("I", (4, 4), -1), "mode I has no known range"),
])  # fmt: skip
def test_refused_pictures(image, message):
    for call in (unires.rgb, partial(unires.cut, rows=1, cols=2, side=32), partial(unires.preprocess, side=32),
                 partial(unires.frame, side=32)):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call(image)


@pytest.mark.parametrize("call, error, message", [
    (lambda: choose_grids(9001, 4000, 336), ValueError, "9001x4000"),
    (lambda: choose_grids(10, 10, 336, "best"), ValueError, "no rule 'best'.*canvas, floor, anyres"),
    (lambda: choose_grids(10, 10, 336, "canvas", limit=1), ValueError, "fewer than 2 grids"),
    (lambda: unires.frame(noise(8, 8), 32, "stretch"), AssertionError, "not by 'stretch'"),
    (lambda: unires.frames([], 32), ValueError, "without frames"),
    (lambda: unires.unires(torch.zeros(2, 9, 4)), ValueError, "3x3 patches cannot be pooled"),
    (lambda: Layout(1, 2).tokens(3), ValueError, "3x3 patches cannot be pooled"),
    (lambda: unires.unires(torch.zeros(4, 12, 4)), AssertionError, "12 patches make no square"),
    (lambda: unires.anyres(torch.zeros(4, 16, 4), 2, 2, torch.zeros(4)), AssertionError, "1 [+] 2 x 2 grids are not"),
    (lambda: unires.anyres(torch.zeros(5, 12, 4), 2, 2, torch.zeros(4)), AssertionError, "1 [+] 2 x 2 grids are not"),
])  # fmt: skip
def test_other_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_largest_pictures():
    for largest in (9000, 4000), (7680, 4320), (1, 200):  # the second is an 8K film
        unires.check_size(*largest)


# ---- features to tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(1, 1), (2, 3), (3, 2), (1, 5)])
def test_unires_order_and_pooling(rows, cols):
    """Token by token: grid after grid, inside a grid row by row, each the mean of its four patches."""
    side, x = 6, coded(rows * cols, 6)
    blocks = product(range(rows * cols), range(0, side, 2), range(0, side, 2))
    want = [[grid, y + 0.5, c + 0.5] for grid, y, c in blocks]
    layout = Layout(rows, cols)
    assert unires.unires(x).tolist() == layout.arrange(x).tolist() == want
    assert len(want) == layout.tokens(side) and layout.grids == rows * cols


@pytest.mark.parametrize("rows, cols, unpad", [
    (1, 2, None), (2, 1, (10, 20)), (2, 2, (50, 50)), (2, 2, (500, 400)), (2, 2, (9, 200)), (1, 3, (70, 17)),
    (3, 1, (17, 70)), (2, 2, (199, 1)),
])  # fmt: skip
def test_anyres_order_newlines_and_unpad(check_shapes, rows, cols, unpad):
    """Token by token: the base, then each row of the picture across grids, a newline after each row."""
    side, x = 4, coded(1 + rows * cols, 4)
    newline = torch.tensor([-1.0, -2.0, -3.0])
    height, width, top, left = rows * side, cols * side, 0, 0
    if unpad and unpad[0] / unpad[1] > width / height:
        top = (height - int(unpad[1] * (width / unpad[0]))) // 2
    elif unpad:
        left = (width - int(unpad[0] * (height / unpad[1]))) // 2
    want = [[0, y, c] for y in range(side) for c in range(side)]
    for y in range(top, height - top):
        for c in range(left, width - left):
            grid = (y // side) * cols + c // side
            want.append([1 + grid, y % side, c % side])
        want.append([-1, -2, -3])
    layout = Layout(rows, cols, "anyres", unpad)
    assert unires.anyres(x, rows, cols, newline, unpad).tolist() == layout.arrange(x, newline).tolist() == want
    assert len(want) == layout.tokens(side) and layout.grids == len(x)
    with pytest.raises(AssertionError, match="image_newline"):
        layout.arrange(x)


@pytest.mark.parametrize("unpad", [None, (50, 40), (90, 20)])
def test_pooled_anyres_is_anyres_of_pooled_grids(unpad):
    x_NPD, newline = coded(7, 8), torch.zeros(3)
    pooled_NMD = unires.unires(x_NPD).view(7, 16, 3)
    layout = Layout(2, 3, "anyres_pooled", unpad)
    tokens = layout.arrange(x_NPD, newline)
    assert torch.equal(tokens, unires.anyres(pooled_NMD, 2, 3, newline, unpad))
    assert len(tokens) == layout.tokens(8) == Layout(2, 3, "anyres", unpad).tokens(4)


@pytest.mark.parametrize("rule", unires.RULES)
def test_show_from_picture_to_tokens(check_shapes, rule):
    for size in [(100, 70), (31, 33), (20, 300)]:
        image = noise(*size)
        pixels, layout = unires.preprocess(image, 32, rule, limit=16)
        rows, cols = choose_grids(*size, 32, rule, limit=16)
        assert (layout.rows, layout.cols) == (rows, cols) and pixels.shape == (layout.grids, 3, 32, 32)
        if rule == "anyres":
            assert layout.unpad == size and torch.equal(pixels[:1], unires.base_grid(image, 32))
        assert torch.equal(pixels[-rows * cols :], unires.cut(image, rows, cols, 32, rule))
        assert torch.equal(unires.preprocess(np.array(image), 32, rule, limit=16)[0], pixels)
        assert len(layout.arrange(coded(layout.grids, 4), torch.zeros(3))) == layout.tokens(4)


@pytest.mark.parametrize("scheme", ["unires", "anyres"])
def test_a_picture_shown_twice_is_encoded_once(check_shapes, scheme):
    """Token by token: each text shows its own pictures' tokens in order, whatever part of them is wanted."""
    sizes = [(2, 1), (1, 3), (1, 1)] if scheme == "unires" else [(2, 1), (1, 2), (1, 1)]
    layouts = [Layout(*size, scheme) for size in sizes]
    patches, side, newline = 4, 8, torch.zeros(3)
    features = coded(sum(layout.grids for layout in layouts), patches)  # of all grids; its first number is the grid's
    pictures, tokens, first = [], [], 0
    for layout in layouts:
        numbers = torch.arange(first, first + layout.grids, dtype=torch.uint8)
        pictures.append((numbers[:, None, None, None].expand(-1, 3, side, side), layout))
        tokens.append(layout.arrange(features[first : first + layout.grids], newline))
        first += layout.grids
    shown = [0, 1, 0, 1, 2]  # the two answers of a pair, then another sample
    want = torch.cat([tokens[i] for i in shown])
    unique = unires.UniqueGrids(pictures, shown, patches, scheme)
    assert len(unique.token) == len(want)
    for wanted in (torch.arange(len(want)), torch.arange(3, 9), torch.tensor([len(want) - 1, 0])):
        pixels, arranged, row = unique.subset(wanted, side)
        numbers = pixels[:, 0, 0, 0].tolist()
        assert len(numbers) == len(set(numbers)) and (len(numbers) == len(features)) == (len(wanted) == len(want))
        parts = features[numbers].split([layout.grids for layout in arranged])
        encoded = torch.cat([layout.arrange(x, newline) for layout, x in zip(arranged, parts, strict=True)])
        assert torch.equal(encoded[row], want[wanted])
    pixels, arranged, row = unique.subset(torch.arange(0), side)
    assert not pixels.any() and len(pixels) == arranged[0].grids and len(row) == 0
