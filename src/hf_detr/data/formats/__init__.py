"""One reader per annotation format. A new format is one file with an `AnnotationFormat`, and its entry in `FORMATS`."""

from collections.abc import Iterator
from pathlib import Path

from ..records import AnnotatedSplit
from .coco import COCO
from .imagefolder import IMAGEFOLDER
from .voc import PASCAL_VOC
from .yolo import YOLO

FORMATS = (COCO, YOLO, PASCAL_VOC, IMAGEFOLDER)  # in the order in which they are looked for


def find_annotations(path: str | Path, split: str) -> AnnotatedSplit | None:
    """Read one split of an annotated file or folder, in the first of `FORMATS` that finds it.

    Args:
        split: "train", "val" (found as "valid" and "validation", too), "test" or any other name.

    Returns:
        the split, or None if there is no such split.

    Raises:
        ValueError: an annotation file cannot be parsed; the message names it.
    """
    for annotation_format in FORMATS:
        found = annotation_format.find(Path(path), split)
        if found is not None:
            return found
    return None


def describe_layouts(split: str) -> str:
    """Where annotations of this split are looked for, for error messages."""
    return ", ".join(f"{entry.name} ({entry.layout.format(split=split)})" for entry in FORMATS)


def files_elsewhere(path: Path) -> Iterator[Path]:
    """Files outside a folder that its annotations refer to, in any format."""
    for annotation_format in FORMATS:
        yield from annotation_format.files_elsewhere(path)


__all__ = ["FORMATS", "describe_layouts", "files_elsewhere", "find_annotations"]
