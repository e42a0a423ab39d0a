"""What `predict.py` draws, marked so that it is never taken for input, and nothing else is replaced by it."""

import json
import os
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..data.image_files import IMAGE_SUFFIXES

MARK = b"drawn by hf_detr"
SEGMENTS_MARK = b"panoptic segments by hf_detr"
PANOPTIC = "panoptic"  # folder of the PNGs in the output folder
MARK_WITHIN = 200  # bytes: it comes before the pixels


def file_as_text(path: bytes) -> str:
    """A file name, which need not be valid text, as Parquet and JSON can store it."""
    return path.decode("utf-8", "backslashreplace")


def picture_of(folder: Path, file: str) -> Path:
    """Where the drawing of an image is saved.

    Args:
        folder: output folder of the job.
        file: of the image, relative to the job's image folder, as text.
    """
    return folder / f"{file}.png"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save a drawing with its mark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG", pnginfo=png_info(MARK))


def png_info(mark: bytes) -> PngImagePlugin.PngInfo:
    """The mark, to save in a PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", mark.decode())
    return info


def has_mark(path: Path, mark: bytes) -> bool:
    """Whether a PNG has this mark."""
    try:
        with path.open("rb") as file:
            return mark in file.read(MARK_WITHIN)
    except OSError:  # reading the image reports it
        return False


def is_drawing(path: Path) -> bool:
    """Whether a file is an image, a PNG of panoptic segments or a video that `predict.py` made: by the mark in it, or
    the job file beside it."""
    if path.suffix == ".png" and path.parent.name == PANOPTIC and has_mark(path, SEGMENTS_MARK):
        return True
    if path.suffix == ".png" and Path(path.stem).suffix.lower() in IMAGE_SUFFIXES:
        return has_mark(path, MARK)
    record = path.with_name(f"{path.stem}.job.json")
    if path.suffix != ".mp4" or not record.is_file():
        return False
    try:
        source = json.loads(record.read_text(encoding="utf-8"))["settings"]["images"]
    except (ValueError, KeyError, TypeError):  # of another program
        return False
    return source not in (str(path.resolve()), os.path.abspath(path))
