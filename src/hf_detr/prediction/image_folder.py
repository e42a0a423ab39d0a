"""The images of a folder, and the COCO ids of images and classes."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.dataset_folder import DatasetFolder
from ..data.formats.coco import find_coco, read_coco_file
from ..data.formats.coco_panoptic import read_panoptic_file
from ..data.image_files import IMAGE_SUFFIXES, is_litter, walk_files
from ..data.records import AnnotatedSplit
from ..data.split_names import name_rank, split_of
from .drawings import is_drawing

logger = logging.get_logger(__name__)


def find_images(*sources: str | Path) -> tuple[Path, list[bytes]]:
    """Single images, and all images below folders, including those behind symbolic links. What `predict.py` drew is
    left out, see `is_drawing`.

    Returns:
        the folder as an absolute path (of several sources the innermost that holds all of them), and the sorted paths
        of the images relative to it, as bytes because file names need not be valid text. Subfolders that cannot be
        listed are included, so that they are reported like unreadable images.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        PermissionError: a folder itself cannot be listed.
        ValueError: a folder contains no images, or a file is a drawing.
    """
    paths = [Path(os.path.abspath(source)) for source in sources]
    folder = Path(os.path.commonpath([path.parent if path.is_file() else path for path in paths]))
    start = len(os.fsencode(os.path.join(folder, "")))
    files = {os.fsencode(file)[start:] for path in paths for file in _images_at(path)}
    return folder, sorted(files, key=lambda file: file.replace(os.fsencode(os.sep), b"\0"))  # as `Path`s


def _images_at(path: Path) -> list[Path]:
    if path.is_file():
        if is_drawing(path):
            raise ValueError(f"{path} was drawn by predict.py. Name the image that it shows.")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist.")
    os.listdir(path)  # raises PermissionError
    unlisted: list[Path] = []
    found = [file for file in walk_files(path, unlisted.append) if file.suffix.lower() in IMAGE_SUFFIXES]
    images = [file for file in found if not is_drawing(file)]
    if not images and not unlisted:
        raise ValueError(f"{path} contains no images{' but drawings of predict.py' if found else ''}.")
    return [*images, *unlisted]


def annotation_ids(
    folder: Path, files: Sequence[bytes], *, panoptic: bool = False
) -> tuple[list[Any], AnnotatedSplit] | None:
    """Image ids from the COCO annotations of a folder, so that detections can be evaluated against them.

    If the folder is named after a split (`val`, `val2017`, `test`, `train`), COCO files of that split are looked for
    next to the folder and one level higher, also in `annotations/`; then annotations inside the folder.

    Args:
        folder: absolute path; `files` are relative to it.
        panoptic: prefer COCO's panoptic format, which has the categories of stuff, too.

    Returns:
        one id per file, a number or text, and the annotations; None if there are no annotations, or if some images
        have none.
    """
    split = split_of(folder.name)
    try:
        inside = DatasetFolder(folder)
        found_files = _coco_files(folder, split)
        readers = [(file, read_coco_file) for file in found_files]
        if panoptic:
            readers = [(file, read_panoptic_file) for file in found_files] + readers
        for file, read in readers:
            source = read(inside, file, split or "train")
            found = None if source is None else _ids_of(folder, files, source)
            if source is not None and found is not None:
                return found, source
        source = find_coco(inside, "train")
        found = None if source is None else _ids_of(folder, files, source)
        return None if source is None or found is None else (found, source)
    except Exception as error:
        # broken annotations of any kind must not prevent prediction
        logger.warning(f"Annotations of {folder} cannot be used for image ids: {error}")
    return None


def _coco_files(folder: Path, split: str | None) -> list[Path]:
    """JSON files beside the folder and above that are named after the split."""
    places = [folder.parent, folder.parent / "annotations", folder.parent.parent, folder.parent.parent / "annotations"]
    files = [file for place in places for file in sorted(place.glob("*.json")) if not is_litter(file.name)]
    return [file for file in files if split is not None and name_rank(file.stem, split) is not None]


def _ids_of(folder: Path, files: Sequence[bytes], source: AnnotatedSplit) -> list[Any] | None:
    """One id per file, or None if some have none."""
    id_of = {os.fsencode(os.path.normpath(image.path)): image.source_id for image in source.images}
    ids = [id_of.get(os.path.join(os.fsencode(folder), file)) for file in files]
    return ids if len({number for number in ids if number is not None}) == len(files) else None


def category_records(id2label: Mapping[int, str], source: AnnotatedSplit | None) -> list[dict[str, Any]]:
    """COCO's `categories` in the order of the model's class ids. Category ids come from the annotations if the model
    has a class for each of their names; otherwise they are the class ids."""
    names = [name for _, name in sorted(id2label.items())]
    annotated = dict(zip(source.names, source.category_ids, strict=True)) if source else {}
    if not annotated or not set(annotated) <= set(names):
        return [{"id": index, "name": name} for index, name in enumerate(names)]
    used = set(annotated.values())
    unused = (number for number in itertools.count() if number not in used)
    return [{"id": annotated.pop(name) if name in annotated else next(unused), "name": name} for name in names]
