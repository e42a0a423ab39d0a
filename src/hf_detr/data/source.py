"""What an annotated folder holds, as it is written: the form that the readers of all formats give it.

A reader changes nothing and drops nothing: a record that makes no sense comes through with its `problem`, for `checks`
to judge. Boxes are [x_min, y_min, width, height] in pixels whatever the format has.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

IMAGE_SUFFIXES = frozenset(PIL.Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".ps", ".eps"}
EXIF_ORIENTATION = 0x0112
TURNED_BY_90_DEGREES = (5, 6, 7, 8)


@dataclass
class Box:
    """One object as it was written.

    Attributes:
        where: its record, for messages: "annotation 17", "line 3".
        bbox: [x_min, y_min, width, height] in pixels, or whatever stood there.
        category: class id 0 ... N-1; None if the source has no category `category_name`.
        problem: why its numbers cannot be read, if so.
    """

    where: str
    bbox: Any
    category: int | None
    id: int
    area: float | None = None
    iscrowd: int = 0
    problem: str | None = None
    category_name: Any = None


@dataclass
class Photo:
    """One image and its objects as they were written.

    Attributes:
        size: (width, height) as the annotations say, None if they do not.
        header: what the file says of itself, filled by [`read_header`].
        where: its record, for messages.
    """

    path: Path
    file_name: str
    id: int
    where: str
    size: tuple[int, int] | None = None
    boxes: list[Box] = field(default_factory=list)
    header: "Header | None" = None


@dataclass(frozen=True)
class Header:
    """(width, height) of the image as shown and as stored, its orientation, or why the file cannot be opened."""

    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    orientation: int = 1
    problem: str | None = None


@dataclass
class Source:
    """One split of an annotated folder.

    Attributes:
        kind: "COCO", "YOLO", "Pascal VOC" or "imagefolder".
        file: the annotation file, or the folder of them.
        names, category_ids: of the classes, by class id.
        image_folder: where images without a record would lie.
        stray: (code, record, message) of what belongs to no image; see `checks`.
        ambiguous: ids that several image records share, so that it cannot be told whose the boxes are.
    """

    kind: str
    split: str
    file: Path
    names: list[str]
    category_ids: list[int]
    photos: list[Photo]
    image_folder: Path
    stray: list[tuple[str, str, str]] = field(default_factory=list)
    ambiguous: set[int] = field(default_factory=set)


def read_header(path: Path | BinaryIO) -> Header:
    """Size and orientation of an image file (a path or an open file), without decoding it."""
    try:
        with PIL.Image.open(path) as image:
            stored, orientation, format_ = image.size, image.getexif().get(EXIF_ORIENTATION, 1), image.format
    except FileNotFoundError:
        return Header(problem="there is no such file")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return Header(problem=f"cannot be opened as an image: {error}")
    turned = orientation in TURNED_BY_90_DEGREES and format_ != "TIFF"  # of which Pillow gives the turned size
    return Header(stored[::-1] if turned else stored, stored, orientation)


def read_headers(photos: list[Photo], progress: Callable[[Any], Any] = lambda iterable: iterable) -> None:
    """Fill `header` of each photo that has none yet, several at a time."""
    waiting = [photo for photo in photos if photo.header is None]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for photo, header in zip(waiting, progress(pool.map(read_header, [p.path for p in waiting])), strict=True):
            photo.header = header


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def walk_files(folder: Path, unlisted: Callable[[Path], None] = lambda place: None) -> Iterator[Path]:
    """All files below a folder, those behind links as well, each folder once. `unlisted` is told of folders that may
    not be listed."""
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, onerror=lambda error: unlisted(Path(error.filename)), followlinks=True):
        place = Path(root)
        real = place.resolve()
        if real in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(real)
        yield from (place / name for name in names)


def image_files(folder: Path) -> list[Path]:
    return sorted(path for path in walk_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
