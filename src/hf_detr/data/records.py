"""An annotated folder as it is written: the records that the readers of all formats return.

A reader changes nothing and drops nothing: an invalid record is returned with its `problem`, and `checks` reports it.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.image_io import ImageHeader, read_image_header

# every name under which the files of a split are found; any other split goes by its own name only
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


def split_names(split: str) -> tuple[str, ...]:
    """The names under which the files of this split are found."""
    return SPLIT_NAMES.get(split, (split,))


@dataclass
class BoxRecord:
    """One annotated object as it was written.

    Attributes:
        record: identifies the record in messages: "annotation 17", "line 3".
        bbox: [x_min, y_min, width, height] in pixels, whatever the format stores; or the original content if that
            cannot be parsed.
        category: class id in [0, N); None if the source has no category `category_name`.
        problem: why the record cannot be parsed, if it cannot.
    """

    record: str
    bbox: Any
    category: int | None
    id: int
    area: float | None = None
    iscrowd: int = 0
    problem: str | None = None
    category_name: Any = None


@dataclass
class ImageRecord:
    """One image and its objects as they were written.

    Attributes:
        record: identifies the record in messages: "image 3 (a.jpg)".
        recorded_size: (width, height) in pixels according to the annotations, if they have it.
        header: size and orientation of the file, filled in by [`read_headers`].
    """

    path: Path
    file_name: str
    id: int
    record: str
    recorded_size: tuple[int, int] | None = None
    boxes: list[BoxRecord] = field(default_factory=list)
    header: ImageHeader | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the image as shown; (0, 0) if the file cannot be read or was not."""
        return self.header.size if self.header is not None else (0, 0)


@dataclass
class AnnotatedSplit:
    """One split of an annotated folder.

    Attributes:
        format: name of the annotation format, such as "COCO".
        file: the annotation file, or the folder of annotation files.
        names, category_ids: of the classes, by class id.
        image_folder: where the images are, and images without a record would be.
        orphans: (code of `findings.KINDS`, record, message) of annotations without an image, of images without
            annotations, and of other records that the reader could not use, such as duplicate ids.
        ambiguous_ids: ids that several image records share, so that their annotations cannot be assigned.
    """

    format: str
    split: str
    file: Path
    names: list[str]
    category_ids: list[int]
    images: list[ImageRecord]
    image_folder: Path
    orphans: list[tuple[str, str, str]] = field(default_factory=list)
    ambiguous_ids: set[int] = field(default_factory=set)


def _no_files(path: Path) -> Iterable[Path]:
    return ()


@dataclass(frozen=True)
class AnnotationFormat:
    """The contract of an annotation format: one file in `data/formats/` with an entry in `FORMATS`.

    Attributes:
        name: for messages.
        layout: where the format is looked for, with `{split}` for the name of the split.
        find: (file or folder, split) to the split; None if the folder has no such split in this format. Raises
            ValueError, naming the file, if an annotation file cannot be parsed.
        files_elsewhere: files outside a folder that its annotations refer to. Cached rows are invalid once one of them
            changes.
    """

    name: str
    layout: str
    find: Callable[[Path, str], AnnotatedSplit | None]
    files_elsewhere: Callable[[Path], Iterable[Path]] = _no_files


def read_headers(
    images: list[ImageRecord], progress: Callable[[Iterator[Any]], Iterable[Any]] = lambda headers: headers
) -> None:
    """Fill in the `header` of each image that has none yet, with eight threads.

    Args:
        progress: wraps the iterator over the headers, to show a progress bar.
    """
    missing = [image for image in images if image.header is None]
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = progress(pool.map(read_image_header, [image.path for image in missing]))
        for image, header in zip(missing, headers, strict=True):
            image.header = header
