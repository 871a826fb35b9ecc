"""Videos as a stream of pictures: a file that FFmpeg opens, or a folder of pictures.

What it is. `frames(path)` yields (seconds, picture) one at a time, so an hour of film needs no more memory
than a minute. Pictures are chosen by time stamp: the frame on screen at t = 0, 1/fps, 2/fps, ..., or at
`count` times spread evenly over the film.

Paper. Sec. 3.2 treats a video as a sequence of grids, one per frame. The visual needle test (Sec. 4, Fig. 4)
takes its haystack at 1 frame per second; the video benchmarks take N uniform frames.

Run. `python -c "from data.video import duration; print(duration('film.mp4'))"`

Deviations. The release counts frames (every round(rate)-th one, through decord): that drifts at 29.97 frames
per second and is wrong where the rate varies. Time stamps are right for both, and give the same frames at a
constant whole rate. A film that ends early is never passed off as whole: `count` refuses it, since uniform
means over all of it; `fps` keeps what came and warns once.
"""

import contextlib
import itertools
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

SLACK = 0.001  # seconds: Matroska rounds time stamps to milliseconds
JUMP = 4.0  # seconds: targets further apart than this are reached by seeking, nearer ones by decoding on
TAIL = 1.0  # seconds that may miss at the end (headers round, decoders drop a frame) before a film is cut
STILL = 3600.0  # seconds that one frame may stay on screen; damaged time stamps would have it stay for days
# Containers that hold their own pictures. Playlists (concat, HLS, DASH) name other files and hosts: left out.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
# What PyAV raises on damaged files, apart from its own FFmpegError.
ODD = (ValueError, IndexError, AttributeError, OverflowError, MemoryError, OSError)

FORMATS = "JPEG PNG WEBP GIF BMP".split()  # Pillow would start Ghostscript for an EPS that is named .jpg
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 32_000_000  # a file of 10 KB can hold a picture of gigabytes
MAX_ASPECT = 200  # padding a picture of 1 x 60,000 to a square would need 10 GB


# ------------------------------------------------------------------------------------------------------------
# Pictures


def picture_files(folder: str | Path) -> list[Path]:
    """List a folder's pictures in natural order, frame2.png before frame10.png; ValueError if it has none."""

    def natural(file: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file.name.lower())]

    files = [f for f in Path(folder).iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "."]
    if not files:
        raise ValueError(f"{folder}: no picture in this folder; expected names that end in {', '.join(SUFFIXES)}")
    return sorted(files, key=natural)


def read_picture(path: str | Path) -> Image.Image:
    """Read one picture as RGB; raises ValueError, naming the file, when it is unreadable or absurdly large.

    As in the release, transparency is dropped, an animation's first frame is taken and the rotation in a
    camera's EXIF is not applied. 16-bit greys are scaled to 8 bits (Pillow alone would clip them to white).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such picture file")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            small, large = sorted(picture.size)
            if small * large > MAX_PIXELS or large > MAX_ASPECT * small:
                limits = f"at most {MAX_PIXELS:,} in all and {MAX_ASPECT} times as long as wide"
                raise ValueError(f"{picture.width} x {picture.height} pixels, expected {limits}")
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error


# ------------------------------------------------------------------------------------------------------------
# Video files


@dataclass(frozen=True)
class Index:
    """What a pass over the packets of a film tells, without decoding any."""

    stamps: list[float]  # when each frame comes on screen: seconds on the container's own clock, sorted
    seconds: float  # from the first frame to the end of the last
    cut: bool  # the packets end before the header says, or become unreadable


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _open(path: Path) -> tuple[Any, Any]:
    """Open a regular file with FFmpeg: (container, its first video stream that is not a cover picture)."""
    import av  # here, so that folders of pictures work without it

    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such video file or folder of pictures"
        raise ValueError(f"{path}: {what}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    rules = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:  # the absolute path, so that no "name:" in it is taken for a protocol
        container = av.open(str(path.resolve()), options=rules, metadata_errors="replace")
    except (av.error.FFmpegError, *ODD) as error:
        raise ValueError(f"{path}: not a video that FFmpeg can open ({_reason(error)})") from error
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        container.close()
        raise ValueError(f"{path}: has no video stream (sound only?)")
    streams[0].thread_type = "AUTO"  # frame threads: FFmpeg's default would use one core for ordinary H.264
    return container, streams[0]


def _scan(path: Path) -> Index:
    """Read the time stamps of all packets: headers are not enough, many state no length or a wrong one."""
    import av

    container, stream = _open(path)
    stamps, spans, whole, ours = [], {}, True, stream.index
    with container:  # once it is closed, asking `stream` anything reads freed memory
        try:
            for packet in container.demux([*container.streams.video, *container.streams.audio]):
                ticks = packet.dts if packet.pts is None else packet.pts
                if ticks is None:
                    continue  # the empty packet that ends a stream
                begin = float(ticks * packet.time_base)
                end = begin + float((packet.duration or 0) * packet.time_base)
                first, last = spans.get(packet.stream_index, (begin, end))
                spans[packet.stream_index] = min(first, begin), max(last, end)
                if packet.stream_index == ours and not packet.is_discard:
                    stamps.append(begin)
        except (av.error.FFmpegError, *ODD):
            whole = False  # what was read stays valid; the caller is told through `cut`
        if not stamps:
            raise ValueError(f"{path}: the video stream holds no frame")
        if stream.duration:  # the header's word, in seconds
            promised, first, last = float(stream.duration * stream.time_base), *spans[ours]
        else:
            promised = (container.duration or 0) / av.time_base  # of the longest stream, counted from time 0
            first, last = min(0.0, *(s[0] for s in spans.values())), max(s[1] for s in spans.values())
    stamps.sort()  # packets come in decoding order
    end = max(spans[ours][1], stamps[-1] + (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1))
    if (still := float(np.diff([*stamps, end]).max())) > STILL:
        raise ValueError(f"{path}: damaged time stamps (one frame would last {still:,.0f} s); repair the file")
    return Index(stamps, end - stamps[0], not whole or last - first < promised - TAIL)


def _decoded(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Decode from where the container stands: (seconds on its clock, frame). Damage ends it like the end."""
    import av

    try:
        for frame in container.decode(stream):
            ticks = frame.dts if frame.pts is None else frame.pts
            if ticks is not None:
                yield float(ticks * stream.time_base), frame
    except (av.error.FFmpegError, *ODD):
        return  # whether anything that was asked for is missing, `_on_screen` finds out


def _jump(container: Any, stream: Any, seconds: float) -> Iterator[tuple[float, Any]]:
    """Seek to a key frame at or before `seconds` and decode on from there."""
    import av

    for back in (0.0, 10.0, math.inf):  # containers without an index (MPEG-TS) land too late: aim earlier
        with contextlib.suppress(av.error.FFmpegError):  # one that cannot seek decodes on, which is right too
            container.seek(max(0, round((seconds - min(back, seconds)) / stream.time_base)), stream=stream)
        following = _decoded(container, stream)
        first = next(following, None)
        if first and first[0] <= seconds + SLACK:
            break
    return itertools.chain([first] if first else [], following)


def _upright(path: Path, t: float, frame: Any) -> Image.Image:
    """Convert a decoded frame to RGB and turn it the way the camera was held."""
    try:
        rgb = frame.to_ndarray(format="rgb24")
    except ODD as error:
        raise ValueError(f"{path}: the frame at {t:.1f} s cannot be made RGB ({_reason(error)})") from error
    return Image.fromarray(np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90)))


def _refuse_cut(path: Path, seconds: float) -> NoReturn:
    raise ValueError(
        f"{path}: the film is cut or damaged after {seconds:.1f} s, so frames cannot be spread "
        "over all of it; repair the file, or sample by fps instead of count to use what is there"
    )


def _on_screen(path: Path, index: Index, times: list[float], resize: Callable, strict: bool) -> Iterator:
    """Yield (t, picture) for the frame on screen at each of the rising `times`, holding one decoded frame."""
    container, stream = _open(path)
    start, ended = index.stamps[0], index.cut
    with container:
        following, here, frame = _decoded(container, stream), start, None
        for t in times:
            wanted = index.stamps[bisect_right(index.stamps, start + t + SLACK) - 1]
            if wanted - here > JUMP:
                following = _jump(container, stream, wanted)
            while frame is None or here < wanted - SLACK / 10:
                arrived = next(following, None)
                if arrived is None:
                    break
                here, frame = arrived
            if frame is None:
                raise ValueError(f"{path}: no frame could be decoded (damaged, or a codec that FFmpeg lacks)")
            if wanted - here > TAIL:
                ended = True
                break
            yield t, resize(_upright(path, t, frame))
    if ended and strict:
        _refuse_cut(path, here - start)
    if ended:
        notice = f"{path}: the film is cut or damaged after {here - start:.1f} s; using what came"
        warnings.warn(notice, stacklevel=2)


# ------------------------------------------------------------------------------------------------------------
# Frames of either


def _evenly(path: Path, total: int, count: int | None) -> list[int]:
    """Choose `count` of `total` indices as the release does (rounded down); all of them without a count."""
    if count is not None and count > total:
        raise ValueError(f"{path}: has {total} frames, but {count} were asked for; ask for at most {total}")
    return np.linspace(0, total - 1, count or total).astype(int).tolist()


def frames(
    path: str | Path, fps: float = 1.0, count: int | None = None, resize: Callable[[Image.Image], Any] | None = None
) -> Iterator[tuple[float, Any]]:
    """Stream a video as (seconds from its start, upright RGB picture).

    Without `count`, one frame per 1/fps seconds; with it, `count` frames spread evenly from first to last.
    In a folder each picture is a frame that lasts 1/fps seconds. `resize` is applied to each picture on
    arrival and its result is yielded instead, so that whoever collects frames never holds them at full size.

    Raises ValueError, naming the file, when it is no video, has no picture or fewer frames than `count`: in
    the call itself where it can be known, on the way where damage shows only then. A film that ends early is
    an error with `count` and one warning without.
    """
    path, resize = Path(path), resize or (lambda picture: picture)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"{path}: cannot take {fps} frames per second; fps must be a positive number")
    if count is not None and count < 1:
        raise ValueError(f"{path}: cannot take {count} frames; ask for at least 1")
    if path.is_dir():
        files = picture_files(path)
        chosen = _evenly(path, len(files), count)
        return ((i / fps, resize(read_picture(files[i]))) for i in chosen)

    index = _scan(path)
    start, end = index.stamps[0], index.stamps[-1]
    if count is None:
        times = [k / fps for k in range(max(1, math.ceil((index.seconds - SLACK) * fps)))]
    else:
        _evenly(path, len(index.stamps), count)
        times = np.linspace(0.0, end - start, count).tolist()
        if index.cut:
            _refuse_cut(path, index.seconds)
    return _on_screen(path, index, times, resize, strict=count is not None)


def duration(path: str | Path, fps: float = 1.0) -> float:
    """Return the seconds from the first frame to the end of the last; raises ValueError as `frames` does."""
    path = Path(path)
    return len(picture_files(path)) / fps if path.is_dir() else _scan(path).seconds
