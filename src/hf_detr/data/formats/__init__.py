"""One reader per annotation format. A new format is one file with an `AnnotationFormat`, and its entry in `FORMATS`."""

from collections.abc import Iterator
from pathlib import Path

from ..dataset_folder import DatasetFolder
from ..records import AnnotatedSplit
from .coco import COCO
from .coco_panoptic import COCO_PANOPTIC
from .imagefolder import IMAGEFOLDER
from .labelme import LABELME
from .via import VIA
from .voc import PASCAL_VOC
from .yolo import YOLO

# in the order in which they are looked for
FORMATS = (COCO, COCO_PANOPTIC, YOLO, PASCAL_VOC, IMAGEFOLDER, LABELME, VIA)


def find_annotations(folder: DatasetFolder, split: str, *, masks: bool = False) -> AnnotatedSplit | None:
    """One split of an annotated folder: the file that was given for it, or else what the first of `FORMATS` finds. A
    YOLO description that was named is the only one that is searched.

    Args:
        split: "train", "val" (found as "valid" and "validation", too), "test" or any other name.
        masks: panoptic annotations come first, since they have the masks of stuff, too.

    Returns:
        the split, or None if there is no such split.

    Raises:
        ValueError: an annotation file cannot be parsed, or is of none of the formats; the message names it.
    """
    file = folder.files_given.get(split)
    if file is not None:
        for annotation_format in FORMATS:
            found = annotation_format.read(folder, file, split)
            if found is not None:
                return found
        names = ", ".join(entry.name for entry in FORMATS)
        raise ValueError(f"{file} is of none of the formats that can be read: {names}.")
    if not folder.is_searched:
        return None
    formats = FORMATS if folder.description is None else (YOLO,)
    for annotation_format in sorted(formats, key=lambda entry: masks and entry is not COCO_PANOPTIC):
        found = annotation_format.find(folder, split)
        if found is not None:
            return found
    return None


def describe_layouts(split: str) -> str:
    """Where annotations of this split are looked for, a line per format, for error messages."""
    return "".join(f"\n  {entry.name}: {entry.layout.format(split=split)}" for entry in FORMATS)


def files_elsewhere(folder: DatasetFolder) -> Iterator[Path]:
    """Files outside a folder that its annotations refer to, in any format."""
    for annotation_format in FORMATS:
        yield from annotation_format.files_elsewhere(folder)


__all__ = ["FORMATS", "describe_layouts", "files_elsewhere", "find_annotations"]
