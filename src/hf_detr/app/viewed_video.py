"""A short video with its detections."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import pipeline

from ..prediction import VideoReader, load_frames, predict_batch
from ..prediction.video import Frame
from ..prediction.video_writer import VideoWriter
from ..visualization.draw import draw_detections
from .viewer import MIN_SCORE, Viewer, gone

MAX_FRAMES = 900  # half a minute
BATCH = 4


@dataclass(frozen=True)
class FoundVideo:
    """A video file, its original name, and the detections of each frame with a score above `MIN_SCORE`, in the
    format of `pipeline("object-detection")`."""

    file: Path
    name: str
    objects: list[list[dict[str, Any]]]


def detect_in_video(
    viewer: Viewer, file: Path, name: str, on_progress: Callable[[tuple[int, int | None]], Any] | None = None
) -> FoundVideo:
    """The detections in a video: boxes, without masks.

    Args:
        on_progress: is called with the number of frames that are done, and of all frames if it is known.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the file cannot be read as a video, or has more than `MAX_FRAMES` frames.
    """
    with viewer.one_at_a_time:  # the pipeline moves the model, if it is told no device
        detector: Any = pipeline(
            "object-detection", model=viewer.model, image_processor=viewer.processor, device=viewer.model.device
        )
    found: list[list[dict[str, Any]]] = []
    with _reader(file, name) as reader:
        if (reader.num_frames or 0) > MAX_FRAMES:
            raise ValueError(_too_long(name, f"{reader.num_frames}"))
        for batch in load_frames(detector, reader, batch_size=BATCH, num_workers=1):
            with viewer.one_at_a_time:
                predicted = predict_batch(detector, batch.images, MIN_SCORE) if batch.images else []
            found += [prediction.objects(viewer.names) for prediction in predicted]
            if len(found) > MAX_FRAMES:  # the number of frames may be missing in the file
                raise ValueError(_too_long(name, f"more than {MAX_FRAMES}"))
            if on_progress is not None:
                on_progress((len(found), reader.num_frames))
    if not found:
        raise ValueError(f"{name} cannot be read as a video: no frame could be read")
    return FoundVideo(file, name, found)


def draw_video(viewer: Viewer, found: FoundVideo, threshold: float, target: Path) -> list[str]:
    """Write an MP4 file: the video with the detections above the threshold, its times and its audio.

    Returns:
        messages about what could not be read or copied.
    """
    label2id = {name: index for index, name in reversed(viewer.names.items())}
    writer: VideoWriter | None = None
    with _reader(found.file, found.name) as reader, ExitStack() as unfinished:
        for item in reader:
            if not isinstance(item, Frame):
                if writer is not None:
                    writer.copy_audio(item)
                continue
            objects = [detection for detection in found.objects[item.index] if detection["score"] > threshold]
            picture = draw_detections(item.picture, objects, label2id)
            if writer is None:
                writer = VideoWriter(target, reader, *picture.size)
                unfinished.callback(writer.abandon)
            writer.write(item, picture)
        assert writer is not None
        writer.close()
        unfinished.pop_all()
        return reader.problems + writer.problems


def _reader(file: Path, name: str) -> VideoReader:
    if not file.is_file():
        raise ValueError(gone(name))
    try:
        return VideoReader(file)
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), name)) from error


def _too_long(name: str, frames: str) -> str:
    return (
        f"{name} has {frames} frames, and the limit of this page is {MAX_FRAMES}. For longer videos: hf-detr predict "
        "VIDEO --model MODEL"
    )
