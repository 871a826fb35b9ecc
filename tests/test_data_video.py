"""Frames are chosen by time stamp, in every container; whatever is wrong with a file is said in one sentence.

Every test film has its frame numbers painted in: eight vertical stripes, black or white, one per bit.
"""

import contextlib
import itertools
import re
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data import video
from data.video import frames, prefetch, read_picture

av = pytest.importorskip("av")
FFMPEG_7 = av.library_versions["libavformat"] < (62,)  # of PyAV 15, in the environment of requirements-eval.txt
FILMS = [
    (".mp4", "libx264"), (".mkv", "libx264"), (".ts", "libx264"), (".nut", "libx264"), (".webm", "libvpx"),
    (".ogv", "libvpx"), (".avi", "mpeg4"), (".mpg", "mpeg2video"), (".mxf", "mpeg2video"), (".wtv", "mpeg2video"),
    (".mp4", "libx265"), (".mov", "prores_ks"),
    (".avi", "libx264"),  # its frames come in another order than its time stamps
]  # fmt: skip
CODEC = dict(reversed(FILMS))  # of the first row of a suffix


def stripes(number, size=(64, 48)):
    bits = [255 * (number >> b & 1) for b in range(8)]
    return Image.fromarray(np.repeat([bits], 48, 0).astype(np.uint8)).resize(size, Image.NEAREST).convert("RGB")


def noisy(i):
    """The same with noise, so that no two packets are alike."""
    return Image.blend(stripes(i), Image.effect_noise((64, 48), 90).convert("RGB"), 0.4)


def number(picture):
    row = np.asarray(picture)[24, 4::8, 0] > 127
    return int((row << np.arange(8)).sum())


def film(path, times, gop=12, rotation=0, clock=Fraction(1, 1000), picture=stripes, **how):
    """Write a film whose frame i comes on screen at times[i] seconds; an MP4's index comes last, or first."""
    codec = how.get("codec", CODEC.get(path.suffix))
    options = {"movflags": "faststart"} if how.get("index_first") and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        # MPEG-PS and AVI cannot vary their rate: give them the true one
        stream = container.add_stream(codec, rate=round(1 / (times[1] - times[0])))
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        stream.codec_context.time_base, stream.gop_size = clock, gop
        stream.codec_context.thread_count = 1  # several of libvpx wait for each other for a second
        stream.codec_context.max_b_frames = how.get("b_frames", stream.codec_context.max_b_frames)
        if stream.name == "libx264":
            stream.options = {"sc_threshold": "0"}  # key frames every `gop` frames and nowhere else
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


def seen(path, **how):
    return [(round(t, 3), number(picture)) for t, picture in frames(path, **how)]


def on_screen(times, t):
    """The oracle: the last frame that has begun by t."""
    return max(i for i, begin in enumerate(times) if begin <= t + 1e-3)


@pytest.fixture
def warned(monkeypatch):
    """The warnings that are printed."""
    said = []
    monkeypatch.setattr(video, "warn", said.append)
    return said


@pytest.mark.parametrize("suffix, codec", FILMS)
def test_constant_rate_in_every_container(tmp_path, suffix, codec):
    if codec not in av.codecs_available or (FFMPEG_7 and suffix == ".mpg"):
        pytest.skip(f"this FFmpeg cannot write {codec}, or not read {suffix}")
    rate = 25 if codec == "mpeg2video" else 10
    path = film(tmp_path / f"a{suffix}", regular(6 * rate, rate), codec=codec, clock=Fraction(1, rate))
    assert seen(path) == [(k, k * rate) for k in range(6)]
    assert seen(path, fps=2) == [(k / 2, int(k / 2 * rate)) for k in range(12)]
    for count in (1, 7, 6 * rate):  # the release's indices
        assert [n for _, n in seen(path, count=count)] == np.linspace(0, 6 * rate - 1, count).astype(int).tolist()
    assert video._scan(path).seconds == pytest.approx(6, abs=0.05)


def remux(path, *sources, default=None):
    """Copy the first stream of each source into one film; `default`: the number of the one that is to be shown."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(av.open(str(source))) for source in sources]
        joined = stack.enter_context(av.open(str(path), "w"))
        copies = [joined.add_stream_from_template(container.streams[0]) for container in opened]
        if default is not None:
            copies[default].disposition = av.stream.Disposition.default
        for container, copy in zip(opened, copies):
            for packet in container.demux():
                if packet.size:  # the empty one ends a stream
                    packet.stream = copy
                    joined.mux(packet)
    return path


def test_a_subtitle_that_outlasts_the_film_is_no_cut(tmp_path, warned):
    """An MKV states the length of its longest stream alone."""
    (tmp_path / "a.srt").write_text("1\n00:00:05,000 --> 00:00:12,000\nThe end\n")
    plain = film(tmp_path / "plain.mkv", regular(60), clock=Fraction(1, 10))
    path = remux(tmp_path / "a.mkv", plain, tmp_path / "a.srt")
    with av.open(str(path)) as container:
        assert container.duration > 11e6
    assert seen(path, count=4) == seen(plain, count=4) and seen(path) == seen(plain) and not warned


@pytest.mark.skipif(FFMPEG_7, reason="PyAV 15 cannot write a default stream")
def test_the_default_stream_is_shown(tmp_path):
    """Not the first: a preview may come before it."""
    preview, whole = (film(tmp_path / f"{k}.mkv", regular(20), picture=lambda i, k=k: stripes(i + k)) for k in (20, 0))
    assert seen(remux(tmp_path / "a.mkv", preview, whole, default=1)) == [(0, 0), (1, 10)]


@pytest.mark.parametrize("suffix, start", [(".mp4", 0), (".mkv", 5)])
def test_variable_rate(tmp_path, warned, suffix, start):
    """A late start is time zero."""
    times = [0, 0.1, 0.2, 3.7, 3.9, 4.4, 9.5, 9.6, 9.7, 9.8, 11.0]
    path = film(tmp_path / f"a{suffix}", [start + t for t in times])
    assert seen(path, fps=2)[:22] == [(k / 2, on_screen(times, k / 2)) for k in range(22)]
    assert seen(path, count=6) == [(round(t, 3), on_screen(times, t)) for t in np.linspace(0, 11, 6)]
    assert not warned


@pytest.mark.parametrize("rate, every", [(Fraction(25, 2), 12), (Fraction(7, 2), 4), (Fraction(1, 2), 1)])
def test_every_nth_frame(tmp_path, rate, every):
    """As in the release: n is the rounded rate, halves to the even number."""
    path = film(tmp_path / "a.mp4", regular(30, rate), clock=1 / Fraction(rate))
    assert [n for _, n in seen(path, by_count=True)] == [*range(0, 30, every)]
    assert len(seen(path, count=40, shorter="all")) == 30 and len(seen(path, count=40, shorter="repeat")) == 40


def pulled(monkeypatch):
    """A list that grows by one with each frame that is decoded."""
    real, got = video._decoded, []
    monkeypatch.setattr(video, "_decoded", lambda *a: (got.append(x[0]) or x for x in real(*a)))
    return got


@pytest.mark.parametrize("suffix, gop, most", [
    (".mp4", 12, 104), (".mkv", 12, 240), (".ts", 12, 480), (".mp4", 999, 240),
])  # fmt: skip
def test_no_more_is_decoded_than_must_be(tmp_path, monkeypatch, suffix, gop, most):
    """At worst a group of pictures for each frame; where all is one group, each of its frames once."""
    times = regular(240, 4)
    path, got = film(tmp_path / f"a{suffix}", times, gop=gop), pulled(monkeypatch)
    want = [(round(t, 3), on_screen(times, t)) for t in np.linspace(0, 59.75, 8)]
    assert seen(path, count=8) == want and len(got) <= most
    assert seen(path, fps=0.1) == [(k * 10, k * 40) for k in range(6)]
    monkeypatch.setattr(video, "MIN_SEEK_SECONDS", 1e9)  # without jumps the same
    got.clear()
    assert seen(path, count=8) == want and len(got) <= 240


@pytest.mark.parametrize("how", [{"count": 240}, {"fps": 2}])
def test_ranks_decode_their_share(tmp_path, monkeypatch, how):
    """Two ranks, blocks of 24: together all frames, each about half of the work; how many is known before the first."""
    path = film(tmp_path / "a.mp4", regular(240, 4))
    whole, got = seen(path, **how), pulled(monkeypatch)
    for rank in range(2):
        converted = []
        resize = lambda picture: converted.append(0) or picture  # noqa: B023, E731
        stream = frames(path, **how, keep=lambda n, rank=rank: n // 24 % 2 == rank, resize=resize)
        want = [pair for n, pair in enumerate(whole) if n // 24 % 2 == rank]
        assert (len(stream), stream.total) == (len(want), len(whole)) and not converted and not got
        assert [(round(t, 3), number(p)) for t, p in stream] == want
        assert len(converted) == len(want) and len(got) <= 190  # of 240
        got.clear()
    nothing = frames(path, **how, keep=lambda n: False)
    assert len(nothing) == 0 and list(nothing) == [] and not got


@pytest.mark.skipif(FFMPEG_7, reason="PyAV 15 cannot write a rotation")
@pytest.mark.parametrize("rotation", [90, -90])
def test_rotation(tmp_path, rotation):
    corner = Image.new("RGB", (64, 48))
    corner.paste((255, 0, 0), (0, 0, 16, 16))  # red, top left
    path = film(tmp_path / "a.mp4", regular(2), rotation=rotation, picture=lambda i: corner)
    ((_, picture),) = frames(path)
    upright = np.rot90(np.asarray(corner), rotation // 90)
    assert picture.size == upright.shape[1::-1]
    assert np.abs(np.asarray(picture).astype(int) - upright).mean() < 12


def test_resize_on_arrival_and_one_at_a_time(tmp_path):
    path = film(tmp_path / "a.mp4", regular(40))
    sizes = []
    stream = frames(path, resize=lambda picture: sizes.append(picture.size) or picture.resize((4, 3)))
    assert next(stream)[1].size == (4, 3) and sizes == [(64, 48)]  # nothing is decoded ahead of the caller
    assert [p.size for _, p in stream] == [(4, 3)] * 3
    with pytest.raises(ValueError, match=r"^invalid literal"):  # the caller's own errors are not the film's
        next(frames(path, resize=lambda picture: int("mine")))


@pytest.mark.parametrize("suffix, ticks, least", [(".mp4", 1000, 4), (".mkv", 1000, 4), (".avi", 10, 2)])
def test_cut_film(tmp_path, warned, suffix, ticks, least):
    """FFmpeg shortens an AVI's length to what is there; its header still has the number of frames."""
    path = film(tmp_path / f"a{suffix}", regular(80), clock=Fraction(1, ticks), picture=noisy, index_first=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    said, kept = rf"a\.\w+: the film is cut or damaged after [{least - 1}-6]\.\d s", seen(path)
    assert least <= len(kept) <= 7 and kept == [(k, 10 * k) for k in range(len(kept))]
    assert seen(path, keep=lambda n: n < 2) == [(0, 0), (1, 10)]  # a rank whose share ends long before the cut
    assert len(warned) == 2 and all(re.search(said + "; using what came", line) for line in warned)
    with pytest.raises(ValueError, match=said + ".* by fps instead"):
        frames(path, count=4)


@pytest.mark.parametrize("suffix, codec, packet", [
    (".mp4", "libx264", 25), (".mkv", "libx264", 25), (".avi", "mpeg4", 25),
    (".mp4", "libx264", 40), (".webm", "libvpx-vp9", 40), (".avi", "mpeg4", 40),
])  # fmt: skip
def test_a_broken_packet_costs_the_frames_up_to_the_next_key_frame(tmp_path, warned, suffix, codec, packet):
    """Packet 40 is a key frame; packet 25 is followed, in decoding order, by frames that come on screen before it."""
    path = film(tmp_path / f"a{suffix}", regular(60), codec=codec, gop=20, picture=noisy, index_first=True)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        content = [bytes(p) for p in packets]
        keys = [i for i, p in enumerate(packets) if p.is_keyframe]
        shown = np.argsort(np.argsort([p.dts if p.pts is None else p.pts for p in packets]))
    data = bytearray(path.read_bytes())
    assert data.count(content[packet]) == 1
    at = data.index(content[packet])
    data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data)
    lost = set(shown[packet : min([k for k in keys if k > packet], default=60)].tolist())
    want = [(i / 10, i) for i in range(60) if i not in lost]
    assert seen(path, fps=10) == want
    assert warned == [f"{path}: damaged in 1 place(s), {len(lost)} of 60 frames are left out"]
    for share in (5, 7):  # of ranks: the same frames, whatever else a rank decodes
        shares = [seen(path, fps=10, keep=lambda n, r=r: n // share % 3 == r) for r in range(3)]  # noqa: B023
        assert sorted(itertools.chain(*shares)) == want
    evenly = [(round(t, 3), on_screen(regular(60), t)) for t in np.linspace(0, 5.9, 30)]
    assert seen(path, count=30) == [(t, n) for t, n in evenly if n not in lost]


def test_damage_inside(tmp_path, monkeypatch, warned):
    """The packets are all there, but the decoder gives up half way."""
    path, real = film(tmp_path / "a.mp4", regular(60)), video._decoded
    monkeypatch.setattr(video, "_decoded", lambda *a: (x for x in real(*a) if x[0] < 3.05))
    assert seen(path) == [(0, 0), (1, 10), (2, 20), (3, 30), (4, 30)]  # MISSING_TAIL_SECONDS
    assert len(warned) == 1 and "after 3.0 s" in warned[0]
    with pytest.raises(ValueError, match=r"after 3\.0 s"):
        list(frames(path, count=6))
    for nothing in ([], [(0.0, None)]):
        monkeypatch.setattr(video, "_decoded", lambda *a, nothing=nothing: iter(nothing))
        with pytest.raises(ValueError, match=r"a\.mp4: no frame could be decoded"):
            list(frames(path))


def test_a_clock_that_wraps(tmp_path):
    """MPEG-TS counts to 2^33 at 90,000 a second; FFmpeg makes what comes before the wrap negative."""
    path = film(tmp_path / "a.ts", [2**33 / 90_000 - 9.5 + t for t in regular(200)], clock=Fraction(1, 90_000))
    assert video._scan(path).stamps[0] < 0
    assert seen(path, fps=0.3) == [(round(k / 0.3, 3), int(k / 0.03 + 1e-6)) for k in range(6)]
    for t, n in seen(path, count=7, keep=lambda n: n % 2 == 1):
        assert n == on_screen(regular(200), t)


@pytest.mark.skipif(FFMPEG_7, reason="FFmpeg 7 cannot read MPEG-PS safely")
def test_jumps_in_mpeg_ps(tmp_path):
    """After a seek its time stamps are others, so it is read on to the key frame."""
    clock = Fraction(1, 25)
    path = film(tmp_path / "a.mpg", regular(150, 25), gop=15, clock=clock, picture=noisy, b_frames=2)
    with av.open(str(path)) as container:
        plain = [number(frame.to_image()) for frame in container.decode(video=0)]
    for wanted in (67, 121, 127, 133):
        assert seen(path, fps=25, keep=lambda n, wanted=wanted: n == wanted) == [(wanted / 25, plain[wanted])]


def test_a_folder_s_order_is_the_same_everywhere(tmp_path):
    """Digits of other scripts are no numbers; names of equal numbers are in the order of their letters."""
    names = ["a.png", "F1.png", "f01.png", "f1.png", "f2.png", "f10.png", "\u00b92.png", "\uff111.png"]
    for name in sorted(names):
        (tmp_path / name).touch()
    assert [file.name for file in video.picture_files(tmp_path)] == names


def test_folder_of_pictures(tmp_path):
    for i in (10, 9, 2, 1, 0):
        stripes(i).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert seen(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 9), (4, 10)]
    assert seen(tmp_path, fps=2, count=3) == [(0, 0), (1, 2), (2, 10)]
    with pytest.raises(ValueError, match="has 5 frames, but 6 were asked for"):
        frames(tmp_path, count=6)
    assert [n for _, n in seen(tmp_path, count=6, shorter="all")] == [0, 1, 2, 9, 10]
    (tmp_path / "frame3.png").write_bytes(b"nonsense")
    assert seen(tmp_path, keep=lambda n: n < 3) == [(0, 0), (1, 1), (2, 2)]  # another rank reads it
    with pytest.raises(ValueError, match=r"frame3\.png: cannot be read as a picture"):
        list(frames(tmp_path))


def animation(path):
    """Pictures 1 to 6; the third stays for 0.7 s, the last for 0.4 s."""
    first, *others = [stripes(i) for i in range(1, 7)]
    first.save(path, save_all=True, append_images=others, duration=[100, 100, 700, 100, 100, 400])
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_animations_as_films(tmp_path, warned, name):
    path = animation(tmp_path / name)
    assert seen(path, fps=5) == [(0, 1), (0.2, 3), (0.4, 3), (0.6, 3), (0.8, 3), (1.0, 5), (1.2, 6), (1.4, 6)]
    assert [n for _, n in seen(path, count=3)] == [1, 3, 6]
    assert seen(path, fps=5, keep=lambda n: n > 5) == [(1.2, 6), (1.4, 6)]
    assert video._scan(path).seconds == pytest.approx(1.5) and not warned
    assert number(read_picture(path)) == 1  # as a picture: the first
    stripes(1).save(tmp_path / "one.gif")
    assert seen(tmp_path / "one.gif") == [(0, 1)]


def test_bad_files(tmp_path, monkeypatch):
    whole = film(tmp_path / "film.mp4", regular(5)).read_bytes()
    film(tmp_path / "still.mkv", [0, 0.1, 5000])
    (tmp_path / "none").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    clock = r"the clock starts again after 3\.7 s.* repair it.*ffmpeg -i joined\.ts"
    for name, content, complaint in [
        ("missing.mp4", None, "no such video file or folder"), ("http://127.0.0.1/a.mp4", None, "no such video file"),
        ("none", None, "no picture in this folder"), ("empty.mp4", b"", "is empty"),
        ("text.mp4", b"this is a letter, not a film\n" * 50, "not a video"),
        ("list.mp4", b"ffconcat version 1.0\nfile film.mp4\n", "not a video"),  # would read other files
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfilm.mp4\n", "not a video"),
        ("half.mp4", whole[:700], "not a video"),  # its index came last
        ("codec.mp4", whole.replace(b"avc1", b"zzzz"), "has a codec that FFmpeg lacks; convert it"),
        ("sound.mp4", None, "has no video stream"),
        ("still.mkv", None, r"damaged time stamps \(one frame would last 5,000 s\)"),
        ("joined.ts", film(tmp_path / "joined.ts", regular(40)).read_bytes() * 2, clock),
    ]:  # fmt: skip
        path = tmp_path / name if "//" not in name else name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint) as error:
            frames(path)
        assert name.split("/")[-1] in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match=r"film\.mp4: has frames of more than 3,071 pixels"):
        frames(tmp_path / "film.mp4")
    film(tmp_path / "a.mpg", regular(25, 25), clock=Fraction(1, 25))
    monkeypatch.setitem(av.library_versions, "libavformat", (61, 7, 100))  # FFmpeg 7 crashes on it
    with pytest.raises(ValueError, match=r"a\.mpg: not a video that FFmpeg can open"):
        frames(tmp_path / "a.mpg")


@pytest.mark.parametrize("settings, complaint", [
    ({"fps": 0}, "0 frames per second"), ({"fps": float("nan")}, "nan frames per second"),
    ({"fps": 50}, "shows 10 frames per second, but 50 were asked for; lower --fps"),
    ({"count": 0}, "at least 1"), ({"count": 6}, "has 5 frames, but 6 were asked for; ask for at most 5"),
])  # fmt: skip
def test_bad_settings(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        frames(film(tmp_path / "film.mp4", regular(5)), **settings)


def test_damaged_bytes_end_in_a_sentence(tmp_path):
    """Flip bytes anywhere: frames, a warning, or a ValueError; nothing else comes out."""
    path, rng = film(tmp_path / "a.mp4", regular(20)), np.random.default_rng(0)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        mutant = data.copy()
        mutant[rng.integers(0, len(data), 12)] = rng.integers(0, 256, 12)
        path.write_bytes(mutant.tobytes())
        try:
            list(frames(path, fps=5))
        except ValueError as error:
            assert str(path) in str(error)


def png(path, width, height, bits, kind, data):
    """Write a PNG by hand: Pillow writes no colours of 16 bits, and no size that is not there."""

    def part(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = part(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(data)) + part(b"IEND", b""))
    return path


@pytest.mark.filterwarnings("error")
def test_pictures_of_every_kind(tmp_path):
    def read(picture, name="p.png", **how):
        picture.save(tmp_path / name, **how)
        picture = read_picture(tmp_path / name)
        assert picture.mode == "RGB"
        return picture.getpixel((0, 0))

    for value, want in [(0, 0), (30000, 117), (60000, 233), (65535, 255)]:  # divided by 257
        assert read(Image.fromarray(np.full((2, 2), value, np.uint16))) == (want,) * 3
    row = b"\0" + b"".join(v.to_bytes(2, "big") for v in (30000, 255, 65535))
    assert read_picture(png(tmp_path / "deep.png", 1, 1, 16, 2, row)).getpixel((0, 0)) == (117, 0, 255)  # cut to 8 bits
    assert read(Image.new("RGBA", (2, 2), (9, 8, 7, 0))) == (9, 8, 7)  # the hidden colour shows, as in the release
    assert read(Image.new("LA", (2, 2), (9, 0))) == (9, 9, 9)
    assert read(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert np.allclose(read(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "p.jpg"), (255, 0, 0), atol=3)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert read(palette) == read(palette, "p.bmp") == read(palette, "p.gif") == (200, 100, 50)
    for transparency in (1, b"\x80\x40"):
        assert read(palette, transparency=transparency) == (200, 100, 50)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_stand_upright(tmp_path, form):
    """All eight ways to hold a camera, against Pillow's own exif_transpose."""
    small = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    picture, path = Image.fromarray(small).resize((48, 32), Image.NEAREST), tmp_path / "photo.jpg"
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = picture.getexif()
        exif[0x0112] = orientation
        picture.save(path, form, exif=exif)
        with Image.open(path) as stored:
            want = ImageOps.exif_transpose(stored).convert("RGB")
        assert want.size == ((32, 48) if orientation in (5, 6, 7, 8) else (48, 32))
        assert np.array_equal(read_picture(path), want)


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_leaves_the_picture_as_stored(tmp_path):
    """Cut anywhere, or no EXIF at all: what cannot be read does not turn the picture, nor keep it from being read."""
    exif, profile, path = Image.Exif(), PngInfo(), tmp_path / "a.webp"
    exif[0x0112], exif[0x010F] = 6, "Maker"
    profile.add_text("Raw profile type exif", "\nexif\n 5\nzz")
    whole = exif.tobytes()
    cuts = [{"format": "WEBP", "exif": whole[:end]} for end in range(0, len(whole), 2)]
    for how in [*cuts, {"format": "PNG", "pnginfo": profile}]:
        stripes(5).save(path, **how)
        assert read_picture(path).size == (64, 48)


@pytest.mark.parametrize("width, height, complaint", [
    (9000, 4001, "9000 x 4001 pixels, expected at most 36,000,000 in all"), (20000, 20000, "exceeds limit of"),
    (1, 201, "1 x 201 pixels, .* 200 times as long as wide"),
])  # fmt: skip
def test_refused_pictures_are_not_decoded(tmp_path, monkeypatch, width, height, complaint):
    path = png(tmp_path / "a.png", width, height, 1, 0, b"")
    Image.init()  # Pillow's plugins load a picture when they are imported
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(ValueError, match=rf"a\.png: cannot be read as a picture .*{complaint}"):
        read_picture(path)


def test_large_photographs_are_shrunk(tmp_path, monkeypatch):
    """A JPEG, to 1/2 or 1/4 of its sides, before it is decoded, also one with a second picture; its EXIF still turns it."""
    monkeypatch.setattr(video, "MAX_PIXELS", 640 * 480 // 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    stripes(5, (640, 480)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == video.picture_size(tmp_path / "a.jpg") == (120, 160)
    assert number(read_picture(tmp_path / "a.jpg").rotate(90, expand=True).resize((64, 48))) == 5
    stripes(5, (640, 480)).save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[stripes(6, (640, 480))])
    assert read_picture(tmp_path / "b.jpg").size == video.picture_size(tmp_path / "b.jpg") == (160, 120)
    monkeypatch.setattr(video, "MAX_PIXELS", 640 * 480 // 65)
    with pytest.raises(ValueError, match="160 x 120 pixels, expected at most"):
        read_picture(tmp_path / "a.jpg")


def test_bad_pictures(tmp_path):
    for kind in ("EPS", "TIFF", "ICO"):  # for the first, Pillow would run Ghostscript
        Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", format=kind)
        with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as a picture; expected JPEG, PNG, WEBP, GIF"):
            read_picture(tmp_path / "a.jpg")
    stripes(3).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"", b"text", whole[:60], whole[:-30]):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png: cannot be read as a picture"):
            read_picture(tmp_path / "a.png")
    for name in ("none.png", "."):
        with pytest.raises(ValueError, match="no such picture file"):
            read_picture(tmp_path / name)


# ---- ahead ---------------------------------------------------------------------------------------


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_ahead_keeps_order_and_room():
    """It runs ahead by three and no more; an error comes in its turn."""
    made = []

    def source():
        for n in range(40):
            made.append(n)
            yield n
        raise ValueError("film.mp4: is damaged")

    coming = prefetch(source(), room=3)
    assert not made and not threads()  # nothing starts before it is asked for
    for n in range(40):
        assert next(coming) == n
        deadline, most = time.monotonic() + 2, min(n + 4, 40)
        while len(made) < most and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.002)
        assert len(made) == most
    with pytest.raises(ValueError, match=r"^film\.mp4: is damaged$"):
        next(coming)
    assert not threads() and next(coming, None) is None
    assert list(prefetch([], 2)) == [] and list(prefetch(iter("abc"), 9)) == ["a", "b", "c"]


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_ahead_stops_its_thread(leave):
    made = []
    coming = prefetch((time.sleep(0.01) or made.append(0) for _ in itertools.count()), room=50)
    next(coming)
    assert threads()
    if leave == "close":
        coming.close()
    del coming
    assert not threads() and len(made) < 25  # the fifty of its room are not made first


def test_ahead_does_not_hold_up_the_exit():
    code = "import itertools, time; from data.video import prefetch; "
    code += "ahead = prefetch((time.sleep(0.01) for _ in itertools.count()), room=4); next(ahead); raise SystemExit(7)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60, capture_output=True)
    assert done.returncode == 7 and not done.stderr
