"""Which files `predict.py` drew, so that they are never taken for its input."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

WORKLIST = "worklist.parquet"


def picture_of(folder: Path, file: str) -> Path:
    """Where the drawing of an image is saved.

    Args:
        folder: output folder of the job.
        file: of the image, relative to the job's image folder, as text.
    """
    return folder / f"{file}.png"


def file_as_text(path: bytes) -> str:
    """A file name, which need not be valid text, as Parquet and JSON can store it."""
    return path.decode("utf-8", "backslashreplace")


def pictures_of_job(worklist: Path) -> Iterator[Path]:
    """The drawings that the job with this work list has made or may make."""
    for path in pq.read_table(worklist, columns=["path"])["path"].to_pylist():
        yield picture_of(worklist.parent, file_as_text(path))


def without_drawings(files: Iterable[Path]) -> tuple[list[Path], int]:
    """Files below a folder without drawings of jobs whose folders are among them; and how many were left out."""
    listed = list(files)
    drawings = {os.fspath(p) for path in listed if path.name == WORKLIST for p in pictures_of_job(path)}
    kept = [path for path in listed if os.fspath(path) not in drawings]
    return kept, len(listed) - len(kept)


def is_drawing(path: Path) -> bool:
    """Whether a file is an image or a video that a prediction job drew, by the job's files beside or above it."""
    path = Path(os.path.abspath(path))
    record = path.with_name(f"{path.stem}.job.json")
    if record.is_file() and path.suffix == ".mp4":
        source: str = json.loads(record.read_text(encoding="utf-8"))["settings"]["images"]
        return source != str(path.resolve())
    worklists = (folder / WORKLIST for folder in path.parents)
    return any(path in pictures_of_job(worklist) for worklist in worklists if worklist.is_file())
