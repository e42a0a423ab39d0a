"""The files of a video's prediction, and going on after a kill.

```
clip.mp4           the video with boxes; not there before it is whole
clip.jsonl         a line a frame, in their order: {"frame": 0, "time": 0.0, "objects": [{"score": 0.9, "label": "cat",
                   "box": {"xmin": ..., "ymin": ..., "xmax": ..., "ymax": ...}}]}; time in seconds from the start,
                   boxes in pixels of the frame as shown
clip.job.json      the settings that decide about the results; at the end also what was found and what could not be read
```
While it goes, the first two are `clip.mp4.partial`, which no player can open, and `clip.jsonl.partial`. Frames that are
in the latter are only drawn and encoded again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import PIL.Image

from ..runtime.files import PARTIAL, hold_lock, replacing, sync
from .job import compare_settings
from .predict import Prediction
from .video import Frame, VideoReader
from .video_writer import VideoWriter


@dataclass(frozen=True)
class VideoSummary:
    """Numbers of a video; `problems`: what could not be read or copied, in words."""

    frames: int
    objects: int
    problems: list[str]


@dataclass(frozen=True)
class VideoJob:
    """The prediction of a video.

    Attributes:
        video, records, about: see above.
        settings: that it was begun with.
        result: of an earlier start that came to its end; None if there was none.
    """

    video: Path
    records: Path
    about: Path
    settings: dict[str, Any]
    result: VideoSummary | None
    _lock: IO[Any] | None = field(default=None, repr=False)


def open_video_job(folder: Path, source: Path, settings: Mapping[str, Any], pictures: bool = True) -> VideoJob:
    """Begin a job in a folder, or go on with the one that is there for a video of this name.

    Args:
        folder: of the outputs.
        source: the video.
        settings: all that decides about the results, as JSON has it; see `model_settings`.
        pictures: a video is wanted. A job that ended without one goes on then, with what it has found.

    Raises:
        FileNotFoundError: there is no such video.
        ValueError: one of the outputs is there and is of another job, or of none; the message says what differs.
        TimeoutError: another process works on it.
    """
    if not source.is_file():
        raise FileNotFoundError(f"There is no {source}.")
    video, records, about = (folder / f"{source.stem}{ending}" for ending in (".mp4", ".jsonl", ".job.json"))
    all_settings = {"images": str(source.resolve()), "bytes": source.stat().st_size, **settings}
    recorded = json.loads(json.dumps(all_settings, default=str))
    if not about.exists():
        for path in (video, records):
            if path.exists():
                raise ValueError(f"{path} exists and is of no job. Name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold_lock(folder / f".{source.stem}.lock", seconds=5)
    except TimeoutError as error:
        raise TimeoutError(f"Another process still works on {video}. Wait for it, or end it.") from error
    result = None
    if about.exists():
        content = json.loads(about.read_text(encoding="utf-8"))
        compare_settings(folder, content["settings"], recorded)
        if "result" in content and records.exists():
            if pictures and not video.exists():
                records.replace(records.with_name(records.name + PARTIAL))
            else:
                result = VideoSummary(**content["result"])
    else:
        with replacing(about) as file:
            json.dump({"settings": recorded}, file, indent=2)
    return VideoJob(video, records, about, recorded, result, lock)


class VideoOutput:
    """The outputs of a video's prediction while they grow. What `finish` has not completed is no video, and no records,
    for anybody else; frames that were recorded are known to the next start.

    Args:
        job: not finished.
        reader: of the video.

    Attributes:
        known: frames that an earlier start has recorded.
    """

    def __init__(self, job: VideoJob, reader: VideoReader) -> None:
        self.job = job
        self._reader = reader
        self._writer: VideoWriter | None = None
        self._partial_video, self._partial_records = (
            path.with_name(path.name + PARTIAL) for path in (job.video, job.records)
        )
        self.known = _whole_records(self._partial_records)
        self._records = self._partial_records.open("r+", encoding="utf-8")
        self._frames = self._objects = 0

    def __enter__(self) -> "VideoOutput":
        return self

    def record(self, frame: Frame, prediction: Prediction | None, id2label: dict[int, str]) -> list[dict[str, Any]]:
        """Note what was found in a frame; None for one that is known. Frames come in their order.

        Returns:
            the objects, as `pipeline("object-detection")` gives them, numbers as in the file.
        """
        if prediction is None:
            objects = json.loads(self._records.readline())["objects"]
        else:
            objects = [
                found | {"score": round(found["score"], 6), "box": {k: round(v, 5) for k, v in found["box"].items()}}
                for found in prediction.objects(id2label)
            ]
            line = {"frame": frame.index, "time": round(frame.time, 6), "objects": objects}
            self._records.seek(0, 2)
            self._records.write(json.dumps(line) + "\n")
            self._records.flush()
        self._frames += 1
        self._objects += len(objects)
        return objects

    def write(self, frame: Frame, picture: PIL.Image.Image) -> None:
        """A picture in the place of a frame. Where it is called for none, there will be no video."""
        if self._writer is None:
            self._writer = VideoWriter(self._partial_video, self._reader, *picture.size)
        self._writer.write(frame, picture)

    def copy_audio(self, packets: list[Any]) -> None:
        """To be called after the frames of their batch: the first one opens the file."""
        for packet in packets if self._writer is not None else ():
            self._writer.copy_audio(packet)  # type: ignore[union-attr]

    def finish(self) -> VideoSummary:
        """All frames were written: give the outputs their names."""
        problems = list(self._reader.problems)
        if self._writer is not None:
            self._writer.close()
            problems += self._writer.problems
            self._writer = None
            sync(self._partial_video)
            self._partial_video.replace(self.job.video)
        summary = VideoSummary(self._frames, self._objects, problems)
        with replacing(self.job.about) as file:
            json.dump({"settings": self.job.settings, "result": asdict(summary)}, file, indent=2)
        self._records.close()
        sync(self._partial_records)
        self._partial_records.replace(self.job.records)  # last: with it, the job is finished
        sync(self.job.records.parent)
        return summary

    def __exit__(self, *error: object) -> None:
        self._records.close()
        if self._writer is not None:
            try:
                self._writer.abandon()
            finally:
                self._partial_video.unlink(missing_ok=True)


def _whole_records(path: Path) -> int:
    """How many frames an earlier start has recorded; what a kill has left of a further line is cut off."""
    count = end = 0
    with path.open("a+b") as file:
        file.seek(0)
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["frame"] != count:
                    break
            except (ValueError, KeyError, TypeError):
                break
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count
