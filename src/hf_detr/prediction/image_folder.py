"""Which images there are, and what ids they and the classes have."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.formats.coco import find_coco
from ..data.image_files import IMAGE_SUFFIXES, walk_files
from ..data.records import AnnotatedSplit

logger = logging.get_logger(__name__)
SPLITS = ("val", "test", "train")  # of which one is what the name of a folder begins with


def find_images(source: str | Path) -> tuple[Path, list[bytes]]:
    """An image, or all images below a folder, those behind links as well.

    Returns:
        the folder as an absolute path, and the images relative to it, sorted; as bytes, since the name of a file need
        not be text. A folder below that cannot be listed is among them, to be reported like an unreadable image.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the folder holds no images.
    """
    folder = Path(os.path.abspath(source))
    if folder.is_file():
        return folder.parent, [os.fsencode(folder.name)]
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no {source}.")
    os.listdir(folder)  # or PermissionError; without it, not even a subfolder could be reported
    unlisted: list[Path] = []
    images = (path for path in walk_files(folder, unlisted.append) if path.suffix.lower() in IMAGE_SUFFIXES)
    start = len(os.fsencode(os.path.join(folder, "")))
    files = [os.fsencode(path)[start:] for path in itertools.chain(images, unlisted)]
    if not files:
        raise ValueError(f"{source} holds no images.")
    files.sort(key=lambda file: file.replace(os.fsencode(os.sep), b"\0"))  # folder by folder, as paths are sorted
    return folder, files


def annotation_ids(folder: Path, files: Sequence[bytes]) -> tuple[list[int], AnnotatedSplit] | None:
    """Image ids from COCO annotations that belong to a folder, so that results can be measured against them.

    Looked for where [`~hf_detr.data.formats.find_annotations`] does: for a folder named like a split (`val`, `val2017`,
    `test`, `train`), beside it and one level higher; then in it. All annotations of that split are read.

    Args:
        folder: absolute; `files` are relative to it.

    Returns:
        an id for each file, and the annotations; None if there are none, or none for some of the images.
    """
    split = next((split for split in SPLITS if folder.name.lower().startswith(split)), None)
    places = [(folder.parent, split), (folder.parent.parent, split)] if split else []
    for place, name in [*places, (folder, "train")]:
        try:
            source = find_coco(place, name)
        except Exception as error:
            # whatever is wrong with annotations, the images can be looked at
            logger.warning(f"Annotations in {place} cannot be used for image ids: {error}")
            continue
        if source is None:
            continue
        known = {os.fsencode(os.path.normpath(image.path)): image.id for image in source.images}
        ids = [known.get(os.path.join(os.fsencode(folder), file)) for file in files]
        complete = [number for number in ids if number is not None]
        if len(set(complete)) == len(files):
            return complete, source
    return None


def category_records(id2label: Mapping[int, str], source: AnnotatedSplit | None) -> list[dict[str, Any]]:
    """COCO's `categories`, in the order of the model's class ids: with the ids that the annotations have, if the model
    knows all their classes by name; else with class ids."""
    names = [name for _, name in sorted(id2label.items())]
    theirs = dict(zip(source.names, source.category_ids, strict=True)) if source else {}
    if not theirs or not set(theirs) <= set(names):
        return [{"id": index, "name": name} for index, name in enumerate(names)]
    taken = set(theirs.values())
    free = (number for number in itertools.count() if number not in taken)
    return [{"id": theirs.pop(name) if name in theirs else next(free), "name": name} for name in names]
