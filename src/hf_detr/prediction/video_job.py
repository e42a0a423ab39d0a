"""The output files of a video's prediction, resumable after a kill.

```
clip.mp4           the video with boxes, written atomically
clip.jsonl         one line per frame, in order: {"frame": 0, "time": 0.0, "objects": [{"score": 0.9, "label": "cat",
                   "box": {"xmin": ..., "ymin": ..., "xmax": ..., "ymax": ...}}]}; time in seconds from the start,
                   boxes in pixels of the frame as displayed
clip.job.json      the settings that affect results; at the end also the number of frames and objects, and problems
```
During prediction, the first two are `clip.mp4.partial`, which no player can open, and `clip.jsonl.partial`. Frames that
are recorded in the latter are drawn and encoded again after a kill, but not predicted again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from ..runtime import PARTIAL, acquire_lock, atomic_write, sync
from .drawings import is_drawing
from .job import compare_settings
from .predict import Prediction
from .video import Frame, VideoReader
from .video_writer import VideoWriter


@dataclass(frozen=True)
class VideoSummary:
    """Counts over a video; `problems` are messages about what could not be read or copied."""

    frames: int
    objects: int
    problems: list[str]


@dataclass(frozen=True)
class VideoJob:
    """The prediction of a video.

    Attributes:
        video, records, job_file: the output files, see the module.
        settings: as recorded.
        result: of an earlier start that finished the job, or None.
    """

    video: Path
    records: Path
    job_file: Path
    settings: dict[str, Any]
    result: VideoSummary | None
    _lock: Any = field(default=None, repr=False)  # held as long as the job is referenced


def open_video_job(folder: Path, source: Path, settings: Mapping[str, Any], pictures: bool = True) -> VideoJob:
    """Start a job, or resume the one in the folder for a video of this name.

    Args:
        folder: of the output files.
        source: the video.
        settings: everything that affects results, JSON-serialisable; see `model_settings`. `images` among them is the
            name of the video as the job records it; default: its absolute path.
        pictures: write a video. A job that was finished without one is resumed from its records then.

    Raises:
        FileNotFoundError: the video does not exist.
        ValueError: an output file exists and belongs to another job, or to none; the message tells the difference.
        TimeoutError: another process works on the job.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist.")
    if is_drawing(source):
        raise ValueError(f"{source} was drawn by predict.py. Name the video that it shows.")
    video, records, job_file = output_files(folder, source)
    recorded = recorded_video_settings(source, settings)
    check_video(folder, source, recorded)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(folder / f".{source.stem}.lock", seconds=5)
    except TimeoutError as error:
        raise TimeoutError(f"Another process still works on {video}. Wait for it, or end it.") from error
    result = None
    if job_file.exists():
        content = json.loads(job_file.read_text(encoding="utf-8"))
        compare_settings(folder, content["settings"], recorded)
        if "result" in content and records.exists():
            if pictures and not video.exists():
                records.replace(records.with_name(records.name + PARTIAL))
            else:
                result = VideoSummary(**content["result"])
    else:
        with atomic_write(job_file) as file:
            json.dump({"settings": recorded}, file, indent=2)
    return VideoJob(video, records, job_file, recorded, result, lock)


def output_files(folder: Path, source: Path) -> tuple[Path, Path, Path]:
    """Video, records and settings of the prediction of a video."""
    video, records, job_file = (folder / f"{source.stem}{ending}" for ending in (".mp4", ".jsonl", ".job.json"))
    return video, records, job_file


def recorded_video_settings(source: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a video's job as its file has them."""
    recorded: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    size = {} if "bytes" in recorded else {"bytes": source.stat().st_size}
    return {"images": str(source.resolve()), **size, **recorded}


def check_video(folder: Path, source: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the output files exist, and belong to another job, or to none; the message tells the difference.
    """
    video, records, job_file = output_files(folder, source)
    if job_file.exists():
        compare_settings(folder, json.loads(job_file.read_text(encoding="utf-8"))["settings"], settings)
        return
    for path in (video, records):
        if path.exists():
            raise ValueError(
                f"{path} already exists but does not belong to a prediction job. Use another --output_dir."
            )


class VideoOutput:
    """The output files of a video's prediction. They get their final names in `finish`; a later start resumes after the
    recorded frames.

    Args:
        job: not finished.
        reader: of the video.

    Attributes:
        num_recorded: frames that earlier starts have recorded.
    """

    def __init__(self, job: VideoJob, reader: VideoReader) -> None:
        self.job = job
        self._reader = reader
        self._writer: VideoWriter | None = None
        self._partial_video, self._partial_records = (
            path.with_name(path.name + PARTIAL) for path in (job.video, job.records)
        )
        self.num_recorded = _count_records(self._partial_records)
        self._records = self._partial_records.open("r+", encoding="utf-8")
        self._frames = self._objects = 0

    def __enter__(self) -> "VideoOutput":
        return self

    def record(self, frame: Frame, prediction: Prediction | None, id2label: dict[int, str]) -> list[dict[str, Any]]:
        """Record the objects of a frame; call it for each frame in order, with None for recorded frames.

        Returns:
            the objects in the format of `pipeline("object-detection")`, rounded as in the file.
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
        """Write a picture in place of a frame. If it is never called, no video is written."""
        if self._writer is None:
            self._writer = VideoWriter(self._partial_video, self._reader, *picture.size)
        self._writer.write(frame, picture)

    def copy_audio(self, packets: list[Any]) -> None:
        """Copy the audio of a batch, after its frames were written."""
        if self._writer is not None:
            for packet in packets:
                self._writer.copy_audio(packet)

    def finish(self) -> VideoSummary:
        """Give the output files their final names, after the last frame."""
        problems = list(self._reader.problems)
        if self._writer is not None:
            self._writer.close()
            problems += self._writer.problems
            self._writer = None
            sync(self._partial_video)
            self._partial_video.replace(self.job.video)
        summary = VideoSummary(self._frames, self._objects, problems)
        with atomic_write(self.job.job_file) as file:
            json.dump({"settings": self.job.settings, "result": asdict(summary)}, file, indent=2)
        self._records.close()
        sync(self._partial_records)
        self._partial_records.replace(self.job.records)  # last, because it marks the job as finished
        sync(self.job.records.parent)
        return summary

    def __exit__(self, *error: object) -> None:
        self._records.close()
        if self._writer is not None:
            try:
                self._writer.abandon()
            finally:
                self._partial_video.unlink(missing_ok=True)


def _count_records(path: Path) -> int:
    """The number of recorded frames. An incomplete last line, left by a kill, is removed."""
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
