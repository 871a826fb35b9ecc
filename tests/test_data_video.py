"""Frames are chosen by time stamp, in every container; whatever is wrong with a file is said in one sentence.

Every test film has its frame numbers painted in: eight vertical stripes, black or white, one per bit.
"""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from data import video
from data.video import duration, frames

av = pytest.importorskip("av")
CODEC = {
    ".mp4": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx",
    ".avi": "mpeg4",
    ".ts": "libx264",
    ".mpg": "mpeg2video",
}


def stripes(number, size=(64, 48)):
    bits = [255 * (number >> b & 1) for b in range(8)]
    return Image.fromarray(np.repeat([bits], 48, 0).astype(np.uint8)).resize(size, Image.NEAREST).convert("RGB")


def number(picture):
    row = np.asarray(picture)[24, 4::8, 0] > 127
    return int((row << np.arange(8)).sum())


def film(path, times, gop=12, rotation=0, clock=Fraction(1, 1000), picture=stripes, options=None):
    """Write a film whose frame i comes on screen at times[i] seconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        # MPEG-PS and AVI cannot vary their rate: give them the true one
        stream = container.add_stream(
            CODEC[path.suffix], rate=round(1 / (times[1] - times[0])) if len(times) > 1 else 10
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base, stream.gop_size = clock, gop
        if rotation:
            stream.set_display_rotation(rotation)
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_image(picture(i))
            frame.pts, frame.time_base = round(t / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def regular(n, rate=10):
    return [i / rate for i in range(n)]


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(path, **how):
    return [(round(t, 3), number(picture)) for t, picture in frames(path, **how)]


def on_screen(times, t):
    """The oracle: the last frame that has begun by t."""
    return max(i for i, begin in enumerate(times) if begin <= t + 1e-3)


@pytest.mark.parametrize("suffix", CODEC)
def test_constant_rate_in_every_container(tmp_path, suffix):
    clock = Fraction(1, 10) if suffix in (".avi", ".mpg") else Fraction(1, 1000)
    if suffix == ".mpg":
        clock = Fraction(1, 25)
    times = regular(60) if suffix != ".mpg" else regular(150, 25)
    rate = len(times) // 6
    path = film(tmp_path / f"a{suffix}", times, clock=clock)
    assert seen(path) == [(k, k * rate) for k in range(6)]
    assert seen(path, fps=2) == [(k / 2, int(k / 2 * rate)) for k in range(12)]
    for count in (1, 4, 7, len(times)):  # the release's indices
        assert [n for _, n in seen(path, count=count)] == np.linspace(0, len(times) - 1, count).astype(int).tolist()
    assert duration(path) == pytest.approx(6, abs=0.05)


def test_variable_rate(tmp_path):
    times = [0, 0.1, 0.2, 3.7, 3.9, 4.4, 9.5, 9.6, 9.7, 9.8, 11.0]
    path = film(tmp_path / "a.mp4", times)
    assert seen(path, fps=2)[:22] == [(k / 2, on_screen(times, k / 2)) for k in range(22)]
    assert seen(path, count=6) == [(round(t, 3), on_screen(times, t)) for t in np.linspace(0, 11, 6)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_jumps_give_the_frames_that_decoding_on_gives(tmp_path, suffix, monkeypatch):
    times, jumps = regular(240, 4), []
    path = film(tmp_path / f"a{suffix}", times)
    real = video._jump
    monkeypatch.setattr(video, "_jump", lambda *args: jumps.append(args) or real(*args))
    want = [(round(t, 3), on_screen(times, t)) for t in np.linspace(0, 59.75, 8)]
    assert seen(path, count=8) == want and len(jumps) == 7
    assert seen(path, fps=0.1) == [(k * 10, k * 40) for k in range(6)]
    monkeypatch.setattr(video, "JUMP", 1e9)
    jumps.clear()
    assert seen(path, count=8) == want and not jumps


def test_a_late_start_is_time_zero(tmp_path):
    path = film(tmp_path / "a.mkv", [5 + t for t in regular(30)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seen(path) == [(0, 0), (1, 10), (2, 20)]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation(tmp_path, rotation):
    def corner(_):
        picture = Image.new("RGB", (64, 48))
        picture.paste((255, 0, 0), (0, 0, 16, 16))  # red, top left
        return picture

    path = film(tmp_path / "a.mp4", regular(2), rotation=rotation, picture=corner)
    ((_, picture),) = frames(path)
    upright = np.rot90(np.asarray(corner(0)), rotation // 90)
    assert picture.size == upright.shape[1::-1]
    assert np.abs(np.asarray(picture).astype(int) - upright).mean() < 12


def test_resize_on_arrival_and_one_at_a_time(tmp_path):
    path = film(tmp_path / "a.mp4", regular(40))
    sizes = []
    stream = frames(path, resize=lambda picture: sizes.append(picture.size) or picture.resize((4, 3)))
    assert next(stream)[1].size == (4, 3) and sizes == [(64, 48)]  # nothing is decoded ahead of the caller
    assert [p.size for _, p in stream] == [(4, 3)] * 3

    def refuse(picture):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):  # the caller's own errors are not the film's
        next(frames(path, resize=refuse))


def cut(tmp_path, suffix, keep=0.6):
    """A film of 8 s whose header comes first and whose end is missing."""
    rng = np.random.default_rng(0)

    def noisy(i):  # so that the pictures, not the header, make up the file
        return Image.fromarray(
            np.clip(np.asarray(stripes(i)) * 0.6 + rng.integers(0, 60, (48, 64, 3)), 0, 255).astype(np.uint8)
        )

    path = film(
        tmp_path / f"a{suffix}",
        regular(80),
        picture=noisy,
        options={"movflags": "faststart"} if suffix == ".mp4" else {},
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_cut_film(tmp_path, suffix):
    path = cut(tmp_path, suffix)
    with pytest.warns(
        UserWarning, match=r"a\.\w+: the film is cut or damaged after [3-6]\.\d s; using what came"
    ) as told:
        kept = seen(path)
    assert len(told) == 1
    assert 4 <= len(kept) <= 7 and kept == [(k, 10 * k) for k in range(len(kept))]
    with pytest.raises(ValueError, match=r"a\.\w+: the film is cut or damaged after .* by fps instead"):
        frames(path, count=4)


def test_damage_inside(tmp_path, monkeypatch):
    """The packets are all there, but the decoder gives up half way."""
    path = film(tmp_path / "a.mp4", regular(60))
    real = video._decoded
    monkeypatch.setattr(video, "_decoded", lambda c, s: (x for x in real(c, s) if x[0] < 3.05))
    with pytest.warns(UserWarning, match=r"after 3\.0 s"):
        assert seen(path) == [(0, 0), (1, 10), (2, 20), (3, 30), (4, 30)]  # a frame may stay on for TAIL seconds
    with pytest.raises(ValueError, match=r"after 3\.0 s"):
        list(frames(path, count=6))
    monkeypatch.setattr(video, "_decoded", lambda c, s: iter(()))
    with pytest.raises(ValueError, match=r"a\.mp4: no frame could be decoded"):
        list(frames(path))


def test_damaged_time_stamps(tmp_path):
    path = film(tmp_path / "a.mkv", [0, 0.1, 5000])
    with pytest.raises(ValueError, match=r"a\.mkv: damaged time stamps \(one frame would last 5,000 s\)"):
        frames(path)


def test_whole_films_do_not_warn(tmp_path):
    path = film(tmp_path / "a.mp4", regular(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(seen(path)) == 3


def test_folder_of_pictures(tmp_path):
    for i in (10, 9, 2, 1, 0):
        stripes(i).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert seen(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 9), (4, 10)]
    assert seen(tmp_path, fps=2, count=3) == [(0, 0), (1, 2), (2, 10)]
    assert duration(tmp_path, fps=2) == 2.5
    with pytest.raises(ValueError, match="has 5 frames, but 6 were asked for"):
        frames(tmp_path, count=6)
    (tmp_path / "frame3.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"frame3\.png: cannot be read as a picture"):
        list(frames(tmp_path))


def test_bad_files(tmp_path):
    film(tmp_path / "film.mp4", regular(5))
    bad = {
        "missing.mp4": (None, "no such video file or folder"),
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"this is a letter, not a film\n" * 50, "not a video"),
        "list.mp4": (b"ffconcat version 1.0\nfile film.mp4\n", "not a video"),  # would read other files
        "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfilm.mp4\n", "not a video"),
        "half.mp4": ((tmp_path / "film.mp4").read_bytes()[:700], "not a video"),  # its index came last
        "http://127.0.0.1/a.mp4": (None, "no such video file or folder"),
    }
    for name, (content, complaint) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        path = tmp_path / name if "//" not in name else name
        for ask in (frames, duration):
            with pytest.raises(ValueError, match=complaint) as error:
                ask(path)
            assert name.split("/")[-1] in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"sound\.mp4: has no video stream"):
        frames(sound(tmp_path / "sound.mp4"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: no picture in this folder"):
        frames(tmp_path / "none")


def test_bad_questions(tmp_path):
    path = film(tmp_path / "a.mp4", regular(5))
    for how, complaint in [
        ({"fps": 0}, "0 frames per second"),
        ({"fps": float("nan")}, "nan frames per second"),
        ({"count": 0}, "at least 1"),
        ({"count": 6}, "has 5 frames, but 6 were asked for; ask for at most 5"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            frames(path, **how)


def test_damaged_bytes_end_in_a_sentence(tmp_path):
    """Flip bytes anywhere: frames, a warning, or a ValueError; nothing else comes out."""
    path, rng = film(tmp_path / "a.mp4", regular(20)), np.random.default_rng(0)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            mutant = data.copy()
            mutant[rng.integers(0, len(data), 12)] = rng.integers(0, 256, 12)
            path.write_bytes(mutant.tobytes())
            try:
                list(frames(path, fps=5))
            except ValueError as error:
                assert str(path) in str(error)


def test_pictures_of_every_kind(tmp_path):
    def read(picture, name="p.png"):
        picture.save(tmp_path / name)
        return video.read_picture(tmp_path / name)

    assert read(Image.fromarray(np.full((2, 2), 30000, np.uint16))).getpixel((0, 0)) == (117, 117, 117)  # 30000 / 257
    assert read(Image.new("RGBA", (2, 2), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
    assert read(Image.new("L", (2, 2), 5)).mode == read(Image.new("P", (2, 2))).mode == "RGB"
    with pytest.raises(ValueError, match=r"thin\.png: cannot be read as a picture \(1 x 201 pixels"):
        read(Image.new("1", (1, 201)), "thin.png")
    with pytest.raises(ValueError, match=r"big\.png: .*8000 x 4001 pixels, expected at most 32,000,000"):
        read(Image.new("1", (8000, 4001)), "big.png")
    for kind in ("EPS", "TIFF"):  # for the first, Pillow would run Ghostscript
        Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", format=kind)
        with pytest.raises(ValueError, match=r"a\.jpg: cannot be read"):
            video.read_picture(tmp_path / "a.jpg")
