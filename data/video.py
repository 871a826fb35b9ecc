"""Pictures from files, and videos as a stream of pictures: a file that FFmpeg opens, or a folder of pictures.

What      `frames(path)` yields (seconds, picture) one at a time, so an hour of film needs no more memory than a minute.
          Pictures are chosen by time stamp: the frame on screen at t = 0, 1/fps, 2/fps, ..., or at `count` times spread
          evenly over the film. The number of frames is known before the first one comes, each of many ranks can take
          its share alone, and `prefetch` decodes in a thread while the model computes:

              film = frames("film.mp4", count=256, keep=lambda n: n // 64 % ranks == rank)
              for seconds, picture in tqdm(prefetch(film, room=16), total=len(film)): ...

Paper     Sec. 3.2 treats a video as a sequence of grids, one per frame. The visual needle test (Sec. 4, Fig. 4) takes
          its haystack at 1 frame per second; the video benchmarks take N uniform frames.
Run       python -c "from data.video import frames; print(len(frames('film.mp4')))"
Dimensions  none
Differs   The release ignores the rotation in a camera's EXIF, so that photographs from a phone lie on their side; here
          they stand upright. The release counts frames (every round(rate)-th one, through decord): that drifts at 29.97
          frames per second and is wrong where the rate varies. Time stamps are right for both, and give the same frames
          at a constant whole rate. A film that ends early is never taken for a whole one: `count` refuses it, since
          uniform means over all of it; `fps` keeps what came and warns once. As in the release, pixels are taken to be
          square. Animated WebP is not supported.
"""

import contextlib
import itertools
import math
import os
import re
import struct
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.flags import warn

STAMP_SLACK_SECONDS = 0.001  # Matroska rounds time stamps to milliseconds
MIN_SEEK_SECONDS = 1.0  # a seek restarts the decoder, so it is worth it only beyond this
MISSING_TAIL_SECONDS = 1.0  # may be missing at the end (headers round, decoders drop a frame)
MAX_CLOCK_STEP_BACK_SECONDS = 1.0  # of decoding times, which never fall in a sound film
MAX_STILL_SECONDS = 3600.0  # for one frame; damaged time stamps can make it days
# Containers that hold their own pictures. Playlists (concat, HLS, DASH) name other files and hosts: left out.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,mxf,nut,ivf,rm,wtv"
# What PyAV raises on damaged files, apart from its own FFmpegError.
DECODE_ERRORS = (ValueError, IndexError, AttributeError, OverflowError, MemoryError, OSError)

FORMATS = "JPEG PNG WEBP GIF BMP".split()  # Pillow would start Ghostscript for an EPS that is named .jpg
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 36_000_000  # a file of 10 KB can hold a picture of gigabytes; 8K film has 33 million
MAX_ASPECT = 200  # padding a picture of 1 x 60,000 to a square would need 10 GB

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower; JPEGs are shrunk

Picture = Image.Image | np.ndarray  # an array is uint8[height, width, 3]
ORIENTATION = 0x0112  # EXIF's tag: how the camera was held
ROTATIONS = dict(
    enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2)
)


# ---- pictures ------------------------------------------------------------------------------------


def picture_files(folder: str | Path) -> list[Path]:
    """List a folder's pictures in natural order, frame2.png before frame10.png; ValueError if it has none."""

    def natural(file: Path) -> tuple[list, str]:
        parts = re.split(r"([0-9]+)", file.name.lower())  # every second one is a number
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name

    files = [f for f in Path(folder).iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "."]
    if not files:
        raise ValueError(f"{folder}: no picture in this folder; expected names that end in {', '.join(SUFFIXES)}")
    return sorted(files, key=natural)


@contextlib.contextmanager
def picture_errors(path: Path) -> Iterator[None]:
    """Turn Pillow's exceptions on a bad file into one ValueError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read as a picture; expected {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error


def _open_picture(path: Path) -> Image.Image:
    """Read a picture's header and check it; nothing is decoded before its size is known to be sane.

    A JPEG of more than MAX_PIXELS will be decoded at 1/2 or 1/4 of its width and height, which is cheap; Pillow itself
    refuses more than 179 million.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        raise ValueError(f"{path}: no such picture file")
    with picture_errors(path):
        picture = Image.open(path, formats=FORMATS)
        scale, is_jpeg = 1, picture.format in ("JPEG", "MPO")  # MPO: a JPEG with a second picture, as phones write
        while is_jpeg and picture.width * picture.height > MAX_PIXELS * scale**2 and scale < 4:
            scale *= 2
        picture.draft(None, (picture.width // scale, picture.height // scale))
        small, large = sorted(picture.size)
        if small * large > MAX_PIXELS or large > MAX_ASPECT * small:
            limits = f"at most {MAX_PIXELS:,} in all and {MAX_ASPECT} times as long as wide"
            raise ValueError(f"{picture.width} x {picture.height} pixels, expected {limits}")
    return picture


def _rotation(picture: Image.Image) -> str | None:
    """Return the transposition that EXIF asks for; None where it says nothing readable."""
    try:  # not ImageOps.exif_transpose: it also rewrites the EXIF and fails where any other tag is odd
        return ROTATIONS.get(picture.getexif().get(ORIENTATION))
    except (SyntaxError, struct.error, ValueError):
        return None


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as read_picture will return it, by its header alone; ValueError as there.

    A PNG's EXIF is not read.
    """
    path = Path(path)
    picture = _open_picture(path)
    with picture_errors(path), picture:
        if picture.format == "PNG":  # whose EXIF may come behind the pixels, and hardly ever turns it
            return picture.size
        sideways = "TRANSPOSE ROTATE_90 ROTATE_270 TRANSVERSE".split()
        return picture.size[::-1] if _rotation(picture) in sideways else picture.size


def read_picture(path: str | Path) -> Image.Image:
    """Read one picture as upright RGB; raises ValueError, naming the file, if unreadable or absurdly large.

    The rotation in a camera's EXIF is applied (the release ignores it). As in the release, transparency is
    dropped, so that colours hidden by it show, and an animation's first picture is taken. 16-bit greys are
    scaled to 8 bits (Pillow alone would clip them to white).
    """
    path = Path(path)
    picture = _open_picture(path)
    with picture_errors(path), picture:
        turn = _rotation(picture)
        picture.load()
        picture.info.pop("transparency", None)  # else Pillow warns of what it drops
        if picture.mode.startswith("I"):
            picture = Image.fromarray(((np.asarray(picture, np.uint32) + 128) // 257).astype(np.uint8))
        picture = picture.convert("RGB")
        return picture.transpose(Image.Transpose[turn]) if turn else picture


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture too large or too thin to handle, before it is decoded. In pixels."""
    short, long = sorted((width, height))
    if short < 1 or short * long > MAX_PIXELS or long > MAX_ASPECT * short:
        raise ValueError(
            f"a picture of {width}x{height} pixels cannot be used: at most {MAX_PIXELS // 10**6} megapixels "
            f"and a long side of at most {MAX_ASPECT} times the short one are expected; shrink or crop it"
        )


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


# ---- video files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """Time stamps of a film, from one pass over its packets without decoding."""

    stamps: list[float]  # when each frame comes on screen: seconds on the container's own clock, sorted
    order: list[int]  # of each of them: the number of its packet; packets come in decoding order
    reach: list[float]  # of each: the latest stamp among the packets from its key frame to its own
    keys: list[float]  # those stamps where decoding can start
    seconds: float  # from the first frame to the end of the last
    rate: float  # frames per second as the header states it, or as the time stamps do
    in_turn: bool  # H.264 in AVI has decoding times alone: frames take them in turn; a dropped one shifts those behind
    cut: bool  # the packets end earlier than the header says, or become unreadable

    def number(self, stamp: float) -> int:
        """The number of the frame on screen at a time on the film's clock."""
        return max(0, bisect_right(self.stamps, stamp + STAMP_SLACK_SECONDS) - 1)

    def find(self, seconds: float) -> tuple[int, float]:
        """The number of the frame on screen at `seconds` of the film, and the key frame where its decoding starts."""
        i = self.number(self.stamps[0] + seconds)
        return i, self.keys[bisect_right(self.keys, self.stamps[i] + STAMP_SLACK_SECONDS) - 1]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _open(path: Path, threads: int = 0) -> tuple[Any, Any]:
    """Open a regular file with FFmpeg: (container, its best video stream that is not a cover picture).

    threads: of the decoder; 0: as many as it likes.
    """
    import av  # here, so that folders of pictures work without it

    if not os.path.isfile(path):
        what = "not a regular file" if os.path.exists(path) else "no such video file or folder of pictures"
        raise ValueError(f"{path}: {what}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    rules = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    if av.library_versions["libavformat"] < (62,):  # FFmpeg 7 (PyAV 15) crashes on MPEG-PS where there is a whitelist
        rules["format_whitelist"] = CONTAINERS.replace(",mpeg,", ",")
    try:  # the absolute path, so that no "name:" in it is taken for a protocol
        container = av.open(str(path.resolve()), options=rules, metadata_errors="replace")
    except (av.error.FFmpegError, *DECODE_ERRORS) as error:
        kinds = "MP4, MKV, WebM, AVI, MPEG-TS, GIF or the like"
        raise ValueError(f"{path}: not a video that FFmpeg can open ({_reason(error)}); expected {kinds}") from error
    cover, best = av.stream.Disposition.attached_pic, container.streams.best("video")
    streams = [s for s in (best, *container.streams.video) if s and not s.disposition & cover]
    if not streams:
        container.close()
        raise ValueError(f"{path}: has no video stream (sound only?)")
    codec = streams[0].codec_context
    if codec is None or codec.width * codec.height > MAX_PIXELS:
        container.close()
        what = "a codec that FFmpeg lacks" if codec is None else f"frames of more than {MAX_PIXELS:,} pixels"
        raise ValueError(f"{path}: has {what}; convert it, to H.264 for instance")
    codec.thread_count, codec.thread_type = threads, "AUTO"  # FFmpeg's default would use one core for ordinary H.264
    return container, streams[0]


def _packets(container: Any, streams: Any) -> Iterator[Any]:
    """The packets from where the container stands; an unreadable rest of the file ends them as its end does."""
    import av

    with contextlib.suppress(av.error.FFmpegError, *DECODE_ERRORS):
        yield from container.demux(streams)


def _seconds(timed: Any, stream: Any) -> float:
    """When a packet or a frame comes on screen, on the film's clock; inf for one that does not say."""
    ticks = timed.dts if timed.pts is None else timed.pts
    return math.inf if ticks is None else float(ticks * stream.time_base)


def _scan(path: Path) -> Index:
    """Read the time stamps of all packets: headers are not enough, many state no length or a wrong one."""
    import av

    container, stream = _open(path)
    packets, clock, spans, ours = [], [], {}, stream.index
    with container:  # once it is closed, asking `stream` anything reads freed memory
        rate, frames_of_avi = float(stream.average_rate or 0), stream.frames if container.format.name == "avi" else 0
        h264_in_avi = container.format.name == "avi" and stream.codec_context.name == "h264"
        reorders = h264_in_avi and stream.codec_context.has_b_frames
        timed = container.streams.video, container.streams.audio, container.streams.subtitles
        for packet in _packets(container, [*itertools.chain(*timed)]):
            if math.isinf(begin := _seconds(packet, packet.stream)):
                continue  # the empty packet that ends a stream
            end = begin + float((packet.duration or 0) * packet.time_base)
            first, last = spans.get(packet.stream_index, (begin, end))
            spans[packet.stream_index] = min(first, begin), max(last, end)
            if packet.stream_index == ours and not packet.is_discard:
                packets.append((begin, packet.is_keyframe))
                clock.append(begin if packet.dts is None else float(packet.dts * packet.time_base))
        if not packets:
            raise ValueError(f"{path}: the video stream holds no frame with a time stamp")
        if stream.duration or frames_of_avi:  # the length in the header, in seconds
            promised, first, last = float((stream.duration or 0) * stream.time_base), *spans[ours]
            promised = max(promised, frames_of_avi / rate if rate else 0.0)  # FFmpeg shortens a cut AVI's duration
        else:
            promised = (container.duration or 0) / av.time_base  # of the longest stream, counted from time 0
            first, last = min(0.0, *(s[0] for s in spans.values())), max(s[1] for s in spans.values())
    stamps, reach = [begin for begin, _ in packets], []
    for begin, is_key in packets:
        reach.append(begin if is_key or not reach else max(begin, reach[-1]))
    order = np.argsort(stamps, kind="stable").tolist()  # packets come in decoding order
    # Files joined end to end start their clock again. One odd stamp among others is damage.
    for a, b, c, d in zip(clock, clock[1:], clock[2:], clock[3:]):
        if max(c, d) < min(a, b) - MAX_CLOCK_STEP_BACK_SECONDS:
            raise ValueError(
                f"{path}: the clock starts again after {b - stamps[order[0]]:.1f} s, as in files that were joined "
                f"end to end; repair it, for instance with ffmpeg -i {path.name} -c copy new.mkv"
            )
    keys = sorted({stamps[order[0]], *(begin for begin, is_key in packets if is_key)})
    stamps, reach = [stamps[i] for i in order], [reach[i] for i in order]
    end = max(spans[ours][1], stamps[-1] + (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1))
    if (still := float(np.diff([*stamps, end]).max())) > MAX_STILL_SECONDS:
        raise ValueError(f"{path}: damaged time stamps (one frame would last {still:,.0f} s); repair the file")
    rate = rate or (len(stamps) - 1) / max(stamps[-1] - stamps[0], STAMP_SLACK_SECONDS)
    cut = last - first < promised - MISSING_TAIL_SECONDS
    in_turn = bool(reorders) and order == [*range(len(order))]
    return Index(stamps, order, reach, keys, end - stamps[0], rate, in_turn, cut)


def _decoded(packets: Iterable, stream: Any, in_turn: bool) -> Iterator[tuple[float, Any]]:
    """Decode packets: (seconds on the film's clock, frame), in the order of display; in_turn: as `Index` says.

    None stands for a broken packet or a damaged frame: with several threads, for one of the last packets. Behind a
    broken packet come the frames that were decoded before it, then none up to the next key frame.
    """
    import av

    errors, whole, stamps = (av.error.FFmpegError, *DECODE_ERRORS), True, deque()
    for packet in packets:
        if not (whole := whole or packet.is_keyframe):
            continue
        frames = []
        if in_turn and packet.size:
            stamps.append(_seconds(packet, stream))
        try:
            if packet.is_corrupt:  # parts are missing, as the container says
                raise ValueError
            frames = stream.decode(packet)
        except errors:
            whole = False
            yield stamps.pop() if stamps else _seconds(packet, stream), None
            with contextlib.suppress(*errors):
                frames = stream.decode(None)
            stream.codec_context.flush_buffers()
        for frame in frames:
            if not math.isinf(seconds := stamps.popleft() if stamps else _seconds(frame, stream)):
                yield seconds, None if frame.is_corrupt else frame
        if not whole:
            stamps.clear()


def _jump(container: Any, stream: Any, key: float, index: Index) -> Iterator[tuple[float, Any]]:
    """Go to the key frame at `key` seconds on the film's clock, and decode on from there."""
    import av

    start = index.stamps[0]
    floor = min(0, round(start / stream.time_base))  # a clock may start below 0; AVI fails far below
    # Containers without an index (MPEG-TS) land too late: aim earlier. MPEG-PS states other times after a seek,
    # except at its start: read on to the key frame.
    for back in (None, math.inf) if container.format.name == "mpeg" else (0.0, 10.0, math.inf):
        if back is not None:
            target = floor if back == math.inf else max(floor, round((key - back) / stream.time_base))
            with contextlib.suppress(av.error.FFmpegError):  # one that cannot seek is read on, which is right too
                container.seek(target, stream=stream)
        packets = _packets(container, stream)
        if key > start:  # else an edit list may want packets that come before
            packets = itertools.dropwhile(lambda packet: _seconds(packet, stream) < key - STAMP_SLACK_SECONDS, packets)
        first = next(packets, None)
        if first and (key == start or _seconds(first, stream) <= key + STAMP_SLACK_SECONDS):
            return _decoded(itertools.chain([first], packets), stream, index.in_turn)
    return iter(())


def _pull(following: Iterator, arrived: deque, wanted: float, reach: float, key: float) -> float | None:
    """Decode up to `reach`; keep in `arrived` the last frame that begins by `wanted`, and those behind it.

    Returns None, or the time of a broken packet, from `key` on, that came before: call again to go on behind it.
    """
    while True:
        while len(arrived) > 1 and arrived[1][0] < wanted + STAMP_SLACK_SECONDS / 10:
            arrived.popleft()
        if arrived and arrived[-1][0] > reach - STAMP_SLACK_SECONDS / 10:
            return None
        coming = next(following, None)
        if coming is None:  # the film ends; decoders may drop its last frames
            return None
        seconds, frame = coming
        if frame is not None:
            arrived.append(coming)
        elif seconds >= key - STAMP_SLACK_SECONDS:
            return seconds


def _decode_alone(path: Path, index: Index, i: int, key: float) -> tuple[float, deque]:
    """Decode frame number i from its key frame on, with one thread, so that an error comes at its own packet.

    Returns (number of the first broken packet behind the key frame, inf if none came; the frame as `_pull` leaves it).
    """
    container, stream = _open(path, threads=1)
    broken, arrived = math.inf, deque()
    with container:
        following = _jump(container, stream, key, index)
        while (damage := _pull(following, arrived, index.stamps[i], index.reach[i], key)) is not None:
            broken = min(broken, index.order[index.number(damage)])
            if broken <= index.order[i]:
                arrived.clear()
                break
    return broken, arrived


def _is_missing(index: Index, i: int, key: float, arrived: deque) -> bool:
    """Whether frame number i did not arrive, though later ones did: decoders drop what they cannot decode.

    Single packets without a picture are common, and the frame before stays on screen; so is a start between key frames.
    """
    (first, _), *later = arrived
    if first > index.stamps[i] + STAMP_SLACK_SECONDS:
        return key > index.stamps[0]
    return bool(later) and index.number(first) < i and index.number(later[0][0]) - index.number(first) > 2


def _upright(path: Path, t: float, frame: Any) -> Image.Image:
    """Convert a decoded frame to RGB and turn it the way the camera was held."""
    try:
        rgb = frame.to_ndarray(format="rgb24")
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: the frame at {t:.1f} s cannot be made RGB ({_reason(error)})") from error
    return Image.fromarray(np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90)))


def _refuse_cut(path: Path, seconds: float) -> NoReturn:
    raise ValueError(
        f"{path}: the film is cut or damaged after {seconds:.1f} s, so frames cannot be spread "
        "over all of it; repair the file, or sample by fps instead of count to use what is there"
    )


def decode_at(
    path: Path, index: Index, times: list[float], share: list[float], resize: Callable, strict: bool, gaps: bool
) -> Iterator:
    """Yield (t, picture) for the frame on screen at each t of this rank's `share` of the rising `times`.

    A frame is lost if a packet between its key frame and its own, in decoding order, is broken: its picture may be
    wrong. That depends on the file alone, not on the other times, so it is the same for every rank. A lost frame is
    left out, or with `gaps` (t, None).
    """
    container, stream = _open(path)
    start, end = index.stamps[0], index.seconds if index.cut else None
    here = start
    broken, lost, shown = {}, 0, 0  # broken: key frame -> number of the first broken packet behind it
    with container:
        following, arrived = _decoded(_packets(container, stream), stream, index.in_turn), deque()
        for t in share:
            i, key = index.find(t)
            if index.order[i] < broken.get(key, math.inf):
                if following is None or key - (arrived[-1][0] if arrived else start) > MIN_SEEK_SECONDS:
                    following = _jump(container, stream, key, index)
                    arrived.clear()
                damage = _pull(following, arrived, index.stamps[i], index.reach[i], key)
                if damage is not None or (arrived and _is_missing(index, i, key, arrived)):
                    broken[key], arrived = _decode_alone(path, index, i, key)
                    following = None
            if index.order[i] >= broken.get(key, math.inf) or (arrived and _is_missing(index, i, key, arrived)):
                lost += 1
                if gaps:
                    yield t, None
                continue
            here, frame = arrived[0] if arrived else (here, None)
            if frame is None or index.stamps[i] - here > MISSING_TAIL_SECONDS:
                end = here - start
                break
            shown += 1
            yield t, resize(_upright(path, t, frame))
    # Other ranks may see some frames; if none does, all of them say so.
    if share and not shown and not any(_decode_alone(path, index, *index.find(t))[1] for t in times):
        raise ValueError(f"{path}: no frame could be decoded (damaged, or a codec that FFmpeg lacks)")
    if end is not None and strict:
        _refuse_cut(path, end)
    places = sum(place < math.inf for place in broken.values())
    where = f"damaged in {places} place(s), " if places else ""
    said = [f"{where}{lost} of {len(share)} frames are left out"] if lost else []
    said += [f"the film is cut or damaged after {end:.1f} s; using what came"] if end is not None else []
    if said:
        warn(f"{path}: {'; '.join(said)}")


# ---- frames of either ----------------------------------------------------------------------------


def uniform_indices(path: Path, total: int, count: int | None, shorter: str = "refuse") -> list[int]:
    """Choose `count` of `total` indices as the release does (rounded down); all of them without a count.

    shorter: where `total` is less than `count`, "refuse" raises ValueError, "repeat" chooses some again, and "all"
    chooses each once.
    """
    if count is not None and count > total and shorter == "all":
        count = total
    if count is not None and count > total and shorter == "refuse":
        raise ValueError(f"{path}: has {total} frames, but {count} were asked for; ask for at most {total} (--frames)")
    return np.linspace(0, total - 1, count or total).astype(int).tolist()


class Frames:
    """An iterator of (seconds, picture) whose length is known before the first.

    `len` counts those that it yields, `total` also those that `keep` left to other ranks.
    """

    def __init__(self, total: int, expected: int, stream: Iterator[tuple[float, Any]]):
        self.total, self.expected, self.stream = total, expected, stream

    def __len__(self) -> int:
        return self.expected

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        return self

    def __next__(self) -> tuple[float, Any]:
        return next(self.stream)


def frames(
    path: str | Path,
    fps: float = 1.0,
    count: int | None = None,
    resize: Callable[[Image.Image], Any] | None = None,
    keep: Callable[[int], bool] | None = None,
    shorter: Literal["refuse", "repeat", "all"] = "refuse",
    by_count: bool = False,
    gaps: bool = False,
) -> Frames:
    """Stream a video as (seconds from its start, upright RGB picture); its `len` is the number of frames.

    Without `count`, one frame per 1/fps seconds; with it, `count` frames spread evenly from first to last.
    In a folder each picture is a frame that lasts 1/fps seconds. `resize` is applied to each picture on
    arrival and its result is yielded instead, so that no list of frames holds them at full size.
    `keep(number)` is called for each frame's number, 0, 1, 2, ...: where it is false the frame is neither counted
    by `len` nor yielded, converted or resized, nor decoded where a key frame lets the decoder jump over them.
    shorter: what a video of fewer frames than `count` does: "repeat" shows some again, "all" gives those there are.
    Frames that cannot be decoded, from a broken packet up to the next key frame, are left out, with a warning; with
    `gaps`, None comes for each, so that ranks can tell where theirs belong.
    by_count: without `count`, take every n-th frame of a file, n being its rounded rate, as the release does.

    Raises ValueError, naming the file, when it is no video, has no picture or fewer frames than `count`: in
    the call itself where it can be known, on the way where damage shows only then. A film that ends early is
    an error with `count`; without, it gives one warning, and perhaps fewer frames than `len` said.
    """
    path, resize, keep = Path(path), resize or (lambda picture: picture), keep or (lambda number: True)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"{path}: cannot take {fps} frames per second; fps must be a positive number")
    if count is not None and count < 1:
        raise ValueError(f"{path}: cannot take {count} frames; ask for at least 1")
    if os.path.isdir(path):
        files = picture_files(path)
        chosen = uniform_indices(path, len(files), count, shorter)
        ours = [i for n, i in enumerate(chosen) if keep(n)]
        return Frames(len(chosen), len(ours), ((i / fps, resize(read_picture(files[i]))) for i in ours))

    index = _scan(path)
    if count is None and by_count:
        times = [stamp - index.stamps[0] for stamp in index.stamps[:: max(1, round(index.rate))]]
    elif count is None:
        number = max(1, math.ceil((index.seconds - STAMP_SLACK_SECONDS) * fps))
        if fps > 4 and number > 4 * len(index.stamps):
            rate = len(index.stamps) / max(index.seconds, STAMP_SLACK_SECONDS)
            raise ValueError(f"{path}: shows {rate:.3g} frames per second, but {fps:g} were asked for; lower --fps")
        times = [k / fps for k in range(number)]
    else:
        chosen = uniform_indices(path, len(index.stamps), count, shorter)
        times = np.linspace(0.0, index.stamps[-1] - index.stamps[0], len(chosen)).tolist()
        if index.cut:
            _refuse_cut(path, index.seconds)
    ours = [t for n, t in enumerate(times) if keep(n)]
    return Frames(len(times), len(ours), decode_at(path, index, times, ours, resize, count is not None, gaps))


def prefetch(items: Iterable, room: int) -> Iterator:
    """Yield `items` in order while a thread makes up to `room` of them ahead, so that decoding and model overlap.

    What `items` raises comes out here, in its turn. The thread starts with the first item asked for and has
    ended when this generator has: read to its end, closed or dropped. That waits for the item in work, no more.
    """
    assert room >= 1, "with no room ahead nothing overlaps"
    source, end, thread = iter(items), object(), ThreadPoolExecutor(1, "ahead")
    try:
        coming = deque(thread.submit(next, source, end) for _ in range(room))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, source, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
