"""An annotated folder as it is written: the records that the readers of all formats return.

A reader changes nothing and drops nothing: an invalid record is returned with its `problem`, and `checks` reports it.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from ..model.annotations import canonical_id
from ..model.image_io import ImageHeader, read_image_header
from .dataset_folder import DatasetFolder
from .masks import SegmentMap

WITHOUT_BOX = "the segment has no bbox. Load the data with masks=True, which takes it from the mask"
Orphan: TypeAlias = tuple[str, str, str]  # code of `findings.KINDS`, record, message


@dataclass
class BoxRecord:
    """One annotated object as it was written.

    Attributes:
        record: identifies the record in messages: "annotation 17", "line 3".
        bbox: [x_min, y_min, width, height] in pixels, whatever the format stores; or the original content if that
            cannot be parsed.
        category: class id in [0, N); None if the source has no category `category_name`.
        id: of the source, or a number.
        iscrowd: 1 for groups and regions to ignore, which are not learned and whose detections do not count.
        problem: why the record cannot be parsed, if it cannot.
        has_own_box: the source has a box; otherwise it is that of the mask.
        segmentation: COCO polygons in pixels, or a run-length encoding, as written.
        segment: id of the object in the image's map of segments, if that has its mask.
        mask: the mask as `counts` of a run-length encoding, and `mask_problem`: code and reason if it has none that can
            be used; filled in by `mask_checks.read_masks`.
    """

    record: str
    bbox: Any
    category: int | None
    id: Any
    area: float | None = None
    iscrowd: int = 0
    problem: str | None = None
    category_name: Any = None
    has_own_box: bool = True
    segmentation: Any = None
    segment: int | None = None
    mask: str | None = None
    mask_problem: tuple[str, str] | None = None


@dataclass
class ImageRecord:
    """One image and its objects as they were written.

    Attributes:
        source_id: the id in the annotations, a number of any size or text, in the form of `canonical_id`.
        record: identifies the record in messages: "image 3 (a.jpg)".
        recorded_size: (width, height) in pixels according to the annotations, if they have it.
        header: size and orientation of the file, filled in by [`read_headers`].
        read: reads the file's bytes, where the image is not a file at `path`.
        place: number of a shard and of the row in it, where the image stays in shards.
        segment_map: the masks of all objects in one image, where the format has them so.
        unlisted_segments: ids in that map that no object has; filled in by `mask_checks.read_masks`.
    """

    path: Path
    file_name: str
    source_id: Any
    record: str
    recorded_size: tuple[int, int] | None = None
    boxes: list[BoxRecord] = field(default_factory=list)
    header: ImageHeader | None = None
    read: Callable[[], bytes] | None = None
    place: tuple[int, int] | None = None
    segment_map: SegmentMap | None = None
    unlisted_segments: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source_id = canonical_id(self.source_id)

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
        names, category_ids: of the classes, by class id. Category ids are numbers or text.
        image_folder: where the images are, and images without a record would be.
        orphans: code, record and message of annotations without an image, of images without annotations, and of other
            records that the reader could not use, such as duplicate ids.
        ambiguous_ids: ids that several image records share, so that their annotations cannot be assigned.
        has_names: whether the source names its classes; otherwise `names` are its category ids as text.
        has_category_ids: whether the source has the category ids; otherwise the reader has numbered the names.
        stuff: names of the classes that are stuff (COCO's `isthing` 0): regions without instances, such as sky.
    """

    format: str
    split: str
    file: Path
    names: list[str]
    category_ids: list[Any]
    images: list[ImageRecord]
    image_folder: Path
    orphans: list[Orphan] = field(default_factory=list)
    ambiguous_ids: set[Any] = field(default_factory=set)
    has_names: bool = True
    has_category_ids: bool = False
    stuff: list[str] = field(default_factory=list)


def numbered(ids: list[Any]) -> list[int]:
    """The ids themselves if all are different integers of 64 bits, which datasets and models can carry; otherwise
    running numbers from 1."""
    if len(set(ids)) == len(ids) and all(type(value) is int and 0 <= value < 2**63 for value in ids):
        return ids
    return list(range(1, len(ids) + 1))


def _no_files(folder: DatasetFolder) -> Iterable[Path]:
    return ()


@dataclass(frozen=True)
class AnnotationFormat:
    """The contract of an annotation format: one file in `data/formats/` with an entry in `FORMATS`.

    Attributes:
        name: for messages.
        layout: where the format is looked for, with `{split}` for the name of the split.
        find: (folder, split) to the split; None if the folder has no such split in this format. Raises ValueError,
            naming the file, if an annotation file cannot be parsed, or if it names a split that is not there.
        read: (folder, file, split) to the split in an annotation file (or folder of them) that the user named; None if
            the file is not of this format.
        files_elsewhere: files outside a folder that its annotations refer to. Cached rows are invalid once one of them
            changes.
    """

    name: str
    layout: str
    find: Callable[[DatasetFolder, str], AnnotatedSplit | None]
    read: Callable[[DatasetFolder, Path, str], AnnotatedSplit | None]
    files_elsewhere: Callable[[DatasetFolder], Iterable[Path]] = _no_files


def read_headers(
    images: list[ImageRecord], progress: Callable[[Iterator[Any]], Iterable[Any]] = lambda headers: headers
) -> None:
    """Fill in the `header` of each image that has none yet, with eight threads.

    Args:
        progress: wraps the iterator over the headers, to show a progress bar.
    """
    missing = [image for image in images if image.header is None]
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = progress(pool.map(_read_header, missing))
        for image, header in zip(missing, headers, strict=True):
            image.header = header


def _read_header(image: ImageRecord) -> ImageHeader:
    return read_image_header(image.path if image.read is None else BytesIO(image.read()))
