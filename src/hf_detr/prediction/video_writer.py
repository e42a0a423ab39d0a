"""Writing a video with the frame rate, times and audio of another one."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..runtime import import_extra
from .video import Frame, VideoReader

ENCODERS = ("libx264", "libopenh264")  # in order of preference
QUALITY = {"crf": "20", "preset": "fast"}  # of libx264
COLOR_SPACES = {1, 4, 5, 6, 7, 9}  # FFmpeg's YUV color spaces that can be converted; the default is used for others


class VideoWriter:
    """An MP4 file (H.264) with the size, frame rate, times and audio of a video that is being read.

    The presentation time of each frame is kept, also if the frame rate varies. Frames are stored as displayed, so the
    file has no display matrix. Audio packets are copied if MP4 supports their codec.

    Args:
        path: cannot be played before `close` has returned.
        reader: of the source video.
        width, height: of the frames, in pixels.

    Attributes:
        problems: messages about what could not be copied.
    """

    def __init__(self, path: Path, reader: VideoReader, width: int, height: int) -> None:
        self._av = import_extra("av", "video")
        self.problems: list[str] = []
        self._reader = reader
        encoder = next((name for name in ENCODERS if name in self._av.codecs_available), None)
        if encoder is None:
            raise ValueError(f"PyAV was built without an H.264 encoder ({', '.join(ENCODERS)}).")
        self._file = self._av.open(str(path), "w", format="mp4")
        source = reader.stream.codec_context
        self._stream = self._file.add_stream(encoder, rate=reader.rate, options=QUALITY if encoder == "libx264" else {})
        self._stream.width, self._stream.height = width, height
        # 4:2:0 chroma subsampling needs even sides
        self._stream.pix_fmt = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
        context = self._stream.codec_context
        context.time_base = reader.time_base
        self._color_options: dict[str, Any] = {"dst_color_range": "MPEG"}
        if source.colorspace in COLOR_SPACES:
            self._color_options["dst_colorspace"] = context.colorspace = source.colorspace
            context.color_primaries, context.color_trc = source.color_primaries, source.color_trc
        aspect_ratio = reader.stream.sample_aspect_ratio
        if aspect_ratio:
            rotated = (width, height) != (source.width, source.height)
            context.sample_aspect_ratio = 1 / aspect_ratio if rotated else aspect_ratio
        self._audio = {stream.index: self._copy_of(stream) for stream in reader.audio}
        self._num_skipped_packets = 0

    def _copy_of(self, stream: Any) -> Any:
        try:
            return self._file.add_stream_from_template(stream)
        except (ValueError, AttributeError, self._av.FFmpegError):
            name = stream.codec_context.name if stream.codec_context is not None else "unknown"
            self.problems.append(f"audio is dropped: MP4 does not support {name}")
            return None

    def write(self, frame: Frame, picture: PIL.Image.Image) -> None:
        """Write a picture of the same size in place of a frame."""
        image = self._av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        image = image.reformat(format=self._stream.pix_fmt, **self._color_options)
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
        except (ValueError, self._av.error.InvalidDataError):  # times in damaged files may be missing or go back
            self._num_skipped_packets += 1

    def close(self) -> None:
        """Flush the encoder, and write the index that players need."""
        self._file.mux(self._stream.encode())
        self._file.close()
        if self._num_skipped_packets:
            self.problems.append(f"{self._num_skipped_packets} packets of damaged audio are dropped")

    def abandon(self) -> None:
        """Close the file without completing it."""
        self._file.close()
