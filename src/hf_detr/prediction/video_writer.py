"""A video with other pictures, and all the rest of the one that is read."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..runtime.extras import import_extra
from .video import Frame, VideoReader

ENCODERS = ("libx264", "libopenh264")  # the first that PyAV was built with
QUALITY = {"crf": "20", "preset": "fast"}  # of libx264
COLOUR_SPACES = {1, 4, 5, 6, 7, 9}  # of FFmpeg: those of YUV that can be converted; others are left to the default


class VideoWriter:
    """An MP4 file (H.264) with the size, the rate, the times and the audio of a video that is read.

    Times are those of each frame, also where the rate varies. Frames are written as they are shown, so that the file
    needs no display matrix. Audio is copied as it is, where MP4 can hold it.

    Args:
        path: written as it grows; whole when `close` has returned.
        reader: of the video.
        width, height: of the frames.

    Attributes:
        problems: what could not be copied, in words.
    """

    def __init__(self, path: Path, reader: VideoReader, width: int, height: int) -> None:
        self._av = import_extra("av", "video")
        self.problems: list[str] = []
        self._reader = reader
        encoder = next((name for name in ENCODERS if name in self._av.codecs_available), None)
        if encoder is None:
            raise ValueError(f"PyAV was built without an encoder for H.264 ({', '.join(ENCODERS)}).")
        self._file = self._av.open(str(path), "w", format="mp4")
        source = reader.stream.codec_context
        self._stream = self._file.add_stream(encoder, rate=reader.rate, options=QUALITY if encoder == "libx264" else {})
        self._stream.width, self._stream.height = width, height
        # H.264 stores colour at half the resolution, which needs even sides
        self._stream.pix_fmt = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
        context = self._stream.codec_context
        context.time_base = reader.time_base
        self._colours: dict[str, Any] = {"dst_color_range": "MPEG"}
        if source.colorspace in COLOUR_SPACES:
            self._colours["dst_colorspace"] = context.colorspace = source.colorspace
            context.color_primaries, context.color_trc = source.color_primaries, source.color_trc
        shape = reader.stream.sample_aspect_ratio
        if shape:
            turned = (width, height) != (source.width, source.height)
            context.sample_aspect_ratio = 1 / shape if turned else shape
        self._audio = {stream.index: self._copy_of(stream) for stream in reader.audio}
        self._refused = 0

    def _copy_of(self, stream: Any) -> Any:
        try:
            return self._file.add_stream_from_template(stream)
        except (ValueError, AttributeError, self._av.FFmpegError):
            name = stream.codec_context.name if stream.codec_context is not None else "unknown"
            self.problems.append(f"audio is left out: MP4 does not hold {name}")
            return None

    def write(self, frame: Frame, picture: PIL.Image.Image) -> None:
        """A picture of the same size in the place of a frame."""
        image = self._av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        image = image.reformat(format=self._stream.pix_fmt, **self._colours)
        image.pts, image.time_base = frame.pts, self._reader.time_base
        self._file.mux(self._stream.encode(image))

    def copy_audio(self, packet: Any) -> None:
        copy = self._audio[packet.stream.index]
        if copy is None:
            return
        shift = round(self._reader.start / packet.time_base)
        packet.pts, packet.dts = (None if time is None else time - shift for time in (packet.pts, packet.dts))
        packet.stream = copy
        try:
            self._file.mux(packet)
        except (ValueError, self._av.error.InvalidDataError):  # in a damaged file, times are missing or go back
            self._refused += 1

    def close(self) -> None:
        """Write what the encoder still holds, and the index without which nobody can play the file."""
        self._file.mux(self._stream.encode())
        self._file.close()
        if self._refused:
            self.problems.append(f"{self._refused} packets of damaged audio are left out")

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()
