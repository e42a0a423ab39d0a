"""Reading YOLO datasets: Ultralytics' and Roboflow's `data.yaml`, darknet's and CVAT's `obj.data`, and folders of
labels with a `classes.txt`, as Label Studio and labelImg write them."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from transformers.utils import logging

from ..dataset_folder import DESCRIPTIONS, DatasetFolder
from ..image_files import IMAGE_SUFFIXES, image_files, is_litter
from ..records import AnnotatedSplit, AnnotationFormat, ImageRecord, Orphan, read_headers
from ..split_names import name_rank, split_of
from .parsing import image_places, read_text, relative_ids
from .yolo_description import YoloDescription, describe_yolo, read_description, with_nearest_class_list
from .yolo_labels import label_file, looks_like_labels, read_labels

logger = logging.get_logger(__name__)


def find_yolo(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """The split that the description names; one that it does not name is looked for in a folder that is named after
    the split. Where it names no splits at all, lists of images are looked for as well, and for "train" all images are
    taken if nothing is named after a split."""
    description = describe_yolo(folder)
    if description is None:
        return None
    entries = description.entries_of(split)
    if entries:
        images = _named_images(folder, description, entries, split)
    elif not description.names_splits:
        images = _images_of_split(folder, split)
    else:
        images = _images_in_folder(folder, split)
        if images:
            logger.warning(f"{description.file} names no {split} images; those in {images[0].parent} are taken.")
    return read_yolo(folder, description, images, split) if images else None


def read_yolo_file(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A list of images or a folder of images that the user named; the classes are looked for beside it. A `.yaml` file
    stands for the split in it."""
    if file.is_file() and file.suffix.lower() in DESCRIPTIONS:
        described = read_description(file, folder)
        entries = described.entries_of(split) if described is not None else []
        if described is None or not entries:
            return None
        return read_yolo(folder, described, _named_images(folder, described, entries, split), split)
    if file.is_file() and file.suffix.lower() != ".txt":
        return None
    description = describe_yolo(folder)
    images = image_files(file) if file.is_dir() else _listed_images(folder, file, split)
    if description is None or not any(label_file(image).is_file() for image in images):
        return None
    return read_yolo(folder, description, images, split)


def yolo_files_elsewhere(folder: DatasetFolder) -> Iterator[Path]:
    """The images and label files outside the folder that a `data.yaml` names."""
    try:
        description = describe_yolo(folder)
    except ValueError:
        return
    if description is None:
        return
    for split, entries in description.entries.items():
        for place in (_resolve(folder, description, entry) for entry in entries):
            if place is not None and not place.resolve().is_relative_to(folder.path.resolve()):
                for image in image_files(place) if place.is_dir() else _listed_images(folder, place, split):
                    yield from (image, label_file(image))


# -- the images -----------------------------------------------------------------------------------------------------


def _named_images(folder: DatasetFolder, description: YoloDescription, entries: list[str], split: str) -> list[Path]:
    """The images that the description names for a split.

    Raises:
        ValueError: an entry does not exist.
    """
    images: list[Path] = []
    for entry in entries:
        place = _resolve(folder, description, entry)
        if place is None:
            raise ValueError(
                f"{description.file} names {entry} for the {split} images, which does not exist. Correct the path, or "
                f"remove the line if there is no {split} split."
            )
        images += image_files(place) if place.is_dir() else _listed_images(folder, place, split)
    return images


def _resolve(folder: DatasetFolder, description: YoloDescription, entry: str) -> Path | None:
    """An entry as Ultralytics reads it, relative to `path`; then relative to the file, as Roboflow means it; then the
    longest end of it that exists below the file, for paths of another machine."""
    parent = description.file.parent
    exact = parent / description.root / entry
    if exact.exists():
        return exact
    return folder.find_place(entry, [parent, folder.path])


def _listed_images(folder: DatasetFolder, file: Path, split: str) -> list[Path]:
    """The images that a text file lists, each once. Those that are not found are returned as they are written, below
    its folder."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    places = [*image_places(folder, file.parent, split), folder.path]
    found = [folder.find_image(line, split, places) or file.parent / line for line in lines]
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        logger.warning(f"{file} lists {len(found) - len(unique)} images more than once; each is taken once.")
    return unique


def _images_of_split(folder: DatasetFolder, split: str) -> list[Path]:
    """The images of a split that no description names, by lists such as `autosplit_train.txt`, or by folders."""
    lists = sorted(
        (rank, file)
        for file in folder.of_type(".txt", depth=2)
        if (rank := name_rank(file.stem, split)) is not None
        and file.stem.casefold() not in folder.image_stems
        and _names_images(file)
    )
    if lists:
        return _listed_images(folder, lists[0][1], split)
    inside = _images_in_folder(folder, split)
    if inside or split != "train":
        return inside
    places = [place.relative_to(folder.path).parts for place in folder.image_folders if _is_inside(folder, place)]
    return [] if any(split_of(name) for parts in places for name in parts) else folder.images


def _is_inside(folder: DatasetFolder, path: Path) -> bool:
    return path.is_relative_to(folder.path)


def _names_images(file: Path) -> bool:
    """Whether the first lines of a text file name images."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            first = [line.strip() for line in islice(lines, 20)]
    except (OSError, UnicodeDecodeError):
        return False
    return any(Path(line).suffix.lower() in IMAGE_SUFFIXES for line in first)


def _images_in_folder(folder: DatasetFolder, split: str) -> list[Path]:
    """The images in folders that are named after the split."""
    named = {
        place
        for place in folder.image_folders
        if _is_inside(folder, place)
        and any(name_rank(part, split) is not None for part in place.relative_to(folder.path).parts)
    }
    return [path for path in folder.images if path.parent in named]


def read_yolo(folder: DatasetFolder, description: YoloDescription, paths: list[Path], split: str) -> AnnotatedSplit:
    """A split of a YOLO dataset, with the labels of each image."""
    paths = [path.absolute() for path in paths]
    places = {os.path.dirname(path) for path in paths}
    common = Path(os.path.commonpath(places)) if places else description.file.parent
    images = []
    for path, image_id in zip(paths, relative_ids(paths), strict=True):
        name = path.relative_to(common).as_posix()
        images.append(ImageRecord(path, name, image_id, f"image {name}"))
    read_headers(images)
    label_files = [label_file(image.path) for image in images]
    if not description.names_splits:
        description = with_nearest_class_list(folder, description, label_files)
    keys = sorted(description.names)
    class_ids = {key: class_id for class_id, key in enumerate(keys)}
    number = 0
    for image, labels in zip(images, label_files, strict=True):
        image.boxes = list(read_labels(labels, image.size, class_ids, description.has_keypoints))
        for box in image.boxes:
            box.id = number = number + 1
    names = [description.names[key] for key in keys]
    orphans = _orphans(folder, images, label_files)
    return AnnotatedSplit("YOLO", split, description.file, names, list(keys), images, common, orphans)


def _orphans(folder: DatasetFolder, images: list[ImageRecord], label_files: list[Path]) -> list[Orphan]:
    """Label files whose name no image of the dataset has, in any split, and images without a label file."""
    known = folder.image_stems | {image.path.stem.casefold() for image in images}
    orphans = [
        ("annotation-orphan", label.name, "there is no image for this label file")
        for place in sorted({label.parent for label in label_files})
        for label in sorted(place.glob("*.txt"))
        if label.stem.casefold() not in known and not is_litter(label.name) and looks_like_labels(label)
    ]
    return orphans + [
        ("image-unannotated", image.record, f"there is no label file {labels}")
        for image, labels in zip(images, label_files, strict=True)
        if not labels.is_file()
    ]


YOLO = AnnotationFormat(
    "YOLO",
    "a .yaml or obj.data file that names {split} and the classes, or classes.txt with labels beside images",
    find_yolo,
    read_yolo_file,
    yolo_files_elsewhere,
)
