"""Videos frame by frame: upright, with their times, and the audio that belongs between them.

Needs PyAV: `pip install "hf_detr[video]"`.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..runtime.extras import import_extra
from .pipeline import DetrDetectionPipeline
from .predict import LoadedImage, load_image
from .size_batches import run_ahead

VIDEO_SUFFIXES = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
}  # fmt: skip
MICROSECONDS = 1_000_000  # PyAV's unit of a file's times
SLACK = 0.5  # seconds: containers are not exact about their duration


@dataclass
class Frame:
    """A frame as it is shown.

    Attributes:
        index: from 0.
        pts: when it is shown, in units of the stream's time base from the start of the video.
        time: the same in seconds.
        pixels: (height, width, 3) uint8 RGB.
    """

    index: int
    pts: int
    time: float
    pixels: np.ndarray

    @property
    def picture(self) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.pixels)


@dataclass
class FrameBatch:
    """Frames, `images` of those that are to be predicted (`image_id` is the index of the frame), and packets of audio
    that belong between them."""

    frames: list[Frame]
    images: list[LoadedImage]
    audio: list[Any]


def is_video(path: Path) -> bool:
    """Whether a path is that of a video, by the ending of its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


class VideoReader:
    """The first video stream of a file, and its audio. What is damaged is left out and counted, what is there is read.

    Args:
        path: of the video.

    Attributes:
        num_frames: as the file says, or from its duration and its rate; None if it says neither.
        problems: after reading, what could not be read, in words.

    Raises:
        ImportError: PyAV is missing.
        ValueError: the file is no video, or so damaged that it cannot be opened.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._av = import_extra("av", "video")
        self.path = path
        self.problems: list[str] = []
        try:
            self._file = self._av.open(str(path), metadata_errors="replace")
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no {path}.") from None
        except (self._av.FFmpegError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a video: {error}") from error
        covers = self._av.stream.Disposition.attached_pic
        streams = [s for s in self._file.streams.video if not s.disposition & covers and s.codec_context is not None]
        if not streams:
            self._file.close()
            raise ValueError(f"{path} has no video that can be decoded.")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.audio = list(self._file.streams.audio)
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.time_base = self.stream.time_base or 1 / self.rate
        self.start = Fraction(self._file.start_time or 0, MICROSECONDS)
        self._seconds = float(self.stream.duration * self.time_base) if self.stream.duration else None
        if self._seconds is None and self._file.duration:
            self._seconds = self._file.duration / MICROSECONDS
        self.num_frames: int | None = self.stream.frames or (
            round(self._seconds * self.rate) if self._seconds else None
        )
        self._size: tuple[int, int] | None = None  # (width, height) of the first frame, before it is turned
        self._last = -1

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        """[`Frame`]s, and between them PyAV's packets of audio. To be read once."""
        index = packets = damaged = 0
        time = 0.0
        for packet in self._packets():
            if packet is not None and packet.stream is not self.stream:
                if packet.size:  # PyAV ends each stream with an empty packet
                    yield packet
                continue
            packets += packet is not None and packet.size > 0
            try:
                decoded = self.stream.decode(packet)
            except self._av.FFmpegError:
                damaged += 1
                continue
            for picture in decoded:
                damaged += picture.is_corrupt
                frame = self._frame(index, picture)
                index, time = index + 1, frame.time
                yield frame
        if not index:
            self.problems.append("no frame could be read")
        if damaged:
            self.problems.append(f"{damaged} frames are damaged")
        if self.stream.frames and packets < self.stream.frames:
            self.problems.append(f"it ends after {packets} of {self.stream.frames} frames")
        elif not self.stream.frames and self._seconds and time + 1 / self.rate < self._seconds - SLACK:
            self.problems.append(f"it ends after {time:.1f} of {self._seconds:.1f} seconds")

    def _packets(self) -> Iterator[Any]:
        """All there are, and None where the decoder has to be told that no more will come."""
        try:
            yield from self._file.demux(self.stream, *self.audio)
        except (self._av.FFmpegError, OSError) as error:
            self.problems.append(f"it cannot be read further: {error}")
            yield None

    def _frame(self, index: int, picture: Any) -> Frame:
        step = max(1, round(1 / (self.rate * self.time_base)))
        if picture.pts is None:
            pts = self._last + step if index else 0
        else:
            pts = picture.pts - round(self.start / self.time_base)
        self._last = max(pts, self._last + 1)  # times that stand still or go back are those of a damaged file
        self._size = self._size or (picture.width, picture.height)
        width, height = self._size
        pixels = picture.to_ndarray(format="rgb24", width=width, height=height)
        return Frame(index, self._last, float(self._last * self.time_base), _turn(pixels, picture))


def _turn(pixels: np.ndarray, picture: Any) -> np.ndarray:
    """As the display matrix of the file wants it to be shown, to the nearest quarter turn, with flips."""
    for data in picture.side_data:
        if data.type.name == "DISPLAYMATRIX":
            # the point (x, y) is shown at (a x + c y, b x + d y), shifted to where all is visible
            a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].astype(np.int64)
            if abs(b) + abs(c) > abs(a) + abs(d):
                pixels, a, d = pixels.transpose(1, 0, 2), c, b
            pixels = np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return pixels


def load_frames(
    detector: DetrDetectionPipeline,
    reader: VideoReader,
    *,
    batch_size: int,
    num_workers: int = 1,
    known: int = 0,
    tiles: bool = False,
) -> Iterator[FrameBatch]:
    """Frames in batches, a few of them in memory.

    Args:
        detector: prepares the frames.
        batch_size: frames at a time; with tiles, they come one by one.
        num_workers: 0 reads frames when a batch is asked for, more in a thread (one: they come in their order).
        known: frames at the beginning that need not be predicted.
        tiles: keep what tiles are cut from.
    """
    items = iter(reader)
    file = reader.path.name

    def load(_: None) -> FrameBatch:
        batch = FrameBatch([], [], [])
        for item in items:
            if not isinstance(item, Frame):
                batch.audio.append(item)
                continue
            batch.frames.append(item)
            if item.index >= known:
                image = load_image(detector, item.index, file, item.pixels, tiles=tiles)
                batch.images.append(image)
            if len(batch.frames) == (1 if tiles else batch_size):
                break
        return batch

    with closing(run_ahead(load, repeat(None), min(num_workers, 1))) as batches:
        for batch in batches:
            yield batch
            if not batch.frames:
                return
