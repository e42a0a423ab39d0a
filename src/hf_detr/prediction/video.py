"""Reading videos: upright frames with their times, interleaved with packets of audio.

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

from ..runtime import import_extra
from .pipeline import DetrDetectionPipeline
from .predict import LoadedImage, load_image
from .size_batches import run_ahead

VIDEO_SUFFIXES = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
}  # fmt: skip
MICROSECONDS = 1_000_000  # PyAV's unit for times of a file
DURATION_TOLERANCE = 0.5  # seconds: durations in containers are approximate


@dataclass
class Frame:
    """A frame as displayed.

    Attributes:
        index: from 0.
        pts: presentation time from the start of the video, in units of the stream's time base.
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
    """Consecutive frames.

    Attributes:
        frames: all frames of the batch.
        images: those to predict; `image_id` is the index of the frame.
        audio: packets of audio between the frames.
    """

    frames: list[Frame]
    images: list[LoadedImage]
    audio: list[Any]


def is_video(path: Path) -> bool:
    """Whether a path has the suffix of a video file."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


class VideoReader:
    """The first video stream of a file, and its audio. Damaged frames are skipped and counted.

    Args:
        path: of the video.

    Attributes:
        num_frames: from the file, or from its duration and frame rate; None if unknown.
        problems: messages about what could not be read, complete after iteration.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the file is not a video, or too damaged to be opened.
        FileNotFoundError: the file does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._av = import_extra("av", "video")
        self.path = path
        self.problems: list[str] = []
        try:
            self._file = self._av.open(str(path), metadata_errors="replace")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist.") from None
        except (self._av.FFmpegError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a video: {error}") from error
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in self._file.streams.video if not s.disposition & cover and s.codec_context is not None]
        if not streams:
            self._file.close()
            raise ValueError(f"{path} has no video stream that can be decoded.")
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
        self._size: tuple[int, int] | None = None  # (width, height) of the first frame as stored
        self._last_pts = -1

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        """[`Frame`]s, interleaved with PyAV's packets of audio. Can be iterated once."""
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
            for av_frame in decoded:
                damaged += av_frame.is_corrupt
                frame = self._frame(index, av_frame)
                index, time = index + 1, frame.time
                yield frame
        if not index:
            self.problems.append("no frame could be read")
        if damaged:
            self.problems.append(f"{damaged} frames are damaged")
        if self.stream.frames and packets < self.stream.frames:
            self.problems.append(f"it ends after {packets} of {self.stream.frames} frames")
        elif not self.stream.frames and self._seconds and time + 1 / self.rate < self._seconds - DURATION_TOLERANCE:
            self.problems.append(f"it ends after {time:.1f} of {self._seconds:.1f} seconds")

    def _packets(self) -> Iterator[Any]:
        """All packets, and None to flush the decoder if the file cannot be read to its end."""
        try:
            yield from self._file.demux(self.stream, *self.audio)
        except (self._av.FFmpegError, OSError) as error:
            self.problems.append(f"it cannot be read further: {error}")
            yield None

    def _frame(self, index: int, av_frame: Any) -> Frame:
        step = max(1, round(1 / (self.rate * self.time_base)))
        if av_frame.pts is None:
            pts = self._last_pts + step if index else 0
        else:
            pts = av_frame.pts - round(self.start / self.time_base)
        self._last_pts = max(pts, self._last_pts + 1)  # times in damaged files may repeat or go back
        self._size = self._size or (av_frame.width, av_frame.height)
        width, height = self._size
        pixels = av_frame.to_ndarray(format="rgb24", width=width, height=height)
        return Frame(index, self._last_pts, float(self._last_pts * self.time_base), _apply_rotation(pixels, av_frame))


def _apply_rotation(pixels: np.ndarray, av_frame: Any) -> np.ndarray:
    """Apply the display matrix of a frame: flips, and rotation to the nearest quarter turn."""
    for data in av_frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            # the point (x, y) is displayed at (a x + c y, b x + d y), translated to non-negative coordinates
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
    num_done: int = 0,
    tiles: bool = False,
) -> Iterator[FrameBatch]:
    """Frames in batches, of which only a few are in memory at a time.

    Args:
        detector: preprocesses the frames.
        batch_size: frames per batch; 1 with tiles.
        num_workers: 0 reads frames on demand, more in one thread, because frames are decoded in order.
        num_done: number of frames at the beginning that need no prediction.
        tiles: keep the pixels for cutting tiles.
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
            if item.index >= num_done:
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
