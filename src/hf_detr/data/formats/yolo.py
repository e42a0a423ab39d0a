"""Reading YOLO datasets: Ultralytics' and Roboflow's `data.yaml`, darknet's and CVAT's `obj.data`, and folders of
labels with a `classes.txt`, as Label Studio and labelImg write them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from ..dataset_folder import DatasetFolder
from ..image_files import image_files, is_litter
from ..records import AnnotatedSplit, AnnotationFormat, ImageRecord, Orphan, read_headers
from ..split_names import SPLIT_NAMES, name_rank, split_names
from .parsing import image_places, read_text
from .yolo_labels import label_file, looks_like_labels, read_labels

logger = logging.get_logger(__name__)

CLASS_LISTS = ("classes.txt", "obj.names", "classes.names", "labels.txt", "names.txt")


@dataclass
class YoloDescription:
    """The file that names the classes, and what it says of the splits.

    Attributes:
        names: by the class number of the labels.
        entries: by the split's name as it is written, folders and lists of images.
        root: the folder that they are relative to, if the file names one.
        names_splits: whether the file names splits; otherwise they are looked for.
    """

    file: Path
    names: dict[int, str]
    entries: dict[str, list[str]] = field(default_factory=dict)
    root: str = ""
    names_splits: bool = True
    has_keypoints: bool = False

    def entries_of(self, split: str) -> list[str]:
        named = {name.lower(): entries for name, entries in self.entries.items() if entries}
        return next((named[name] for name in split_names(split) if name in named), [])


def find_yolo(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """The split that the description names. Without one that names splits: a list of images or a folder that is named
    after the split; for "train" all images, if nothing is named after any split."""
    description = describe_yolo(folder)
    if description is None:
        return None
    if description.names_splits:
        entries = description.entries_of(split)
        return (
            read_yolo(folder, description, _named_images(folder, description, entries, split), split)
            if entries
            else None
        )
    images = _images_of_split(folder, split)
    return read_yolo(folder, description, images, split) if images else None


def read_yolo_file(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A list of images or a folder of images that the user named; the classes are looked for beside it. A `.yaml` file
    stands for the split in it."""
    if file.is_file() and file.suffix.lower() in (".yaml", ".yml", ".data"):
        described = _read_description(file, folder)
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
    for name in (*SPLIT_NAMES["train"], *SPLIT_NAMES["val"], "test") if description is not None else ():
        for entry in description.entries.get(name, ()):  # type: ignore[union-attr]
            place = _resolve(folder, description, entry)  # type: ignore[arg-type]
            if place is not None and not place.resolve().is_relative_to(folder.path.resolve()):
                for image in image_files(place) if place.is_dir() else _listed_images(folder, place, name):
                    yield from (image, label_file(image))


# -- the description ------------------------------------------------------------------------------------------------


def describe_yolo(folder: DatasetFolder) -> YoloDescription | None:
    """The first description of a folder, nearest to its top.

    Raises:
        ValueError: it cannot be understood; names the file.
    """
    for file in folder.of_type(".yaml", ".yml", ".data", depth=2):
        description = _read_description(file, folder)
        if description is not None:
            return description
    lists = [file for file in folder.of_type(".txt", ".names", depth=3) if file.name.lower() in CLASS_LISTS]
    if lists and any(looks_like_labels(file) for file in _possible_labels(folder)[:20]):
        lines = [line.strip() for line in read_text(lists[0]).splitlines() if line.strip()]
        return YoloDescription(lists[0], dict(enumerate(lines)), names_splits=False)
    return None


def _possible_labels(folder: DatasetFolder) -> list[Path]:
    return [
        file
        for file in folder.of_type(".txt", depth=9)
        if file.name.lower() not in CLASS_LISTS and file.stem.casefold() in folder.image_stems
    ]


def _read_description(file: Path, folder: DatasetFolder) -> YoloDescription | None:
    return _read_darknet(file, folder) if file.suffix.lower() == ".data" else _read_yaml(file)


def _read_yaml(file: Path) -> YoloDescription | None:
    try:
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)  # all values stay text: "on" is no boolean
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or "names" not in content:
        return None
    splits = {name: value for name, value in content.items() if any(name in known for known in _known_names())}
    entries = {name: value if isinstance(value, list) else [value] for name, value in splits.items() if value}
    for name, values in entries.items():
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{file}: {name} must be a path or a list of paths, got {content[name]}.")
    names = _names(file, content)
    return YoloDescription(file, names, entries, str(content.get("path") or ""), bool(entries), "kpt_shape" in content)


def _known_names() -> tuple[tuple[str, ...], ...]:
    return tuple(split_names(split) for split in SPLIT_NAMES)


def _names(file: Path, content: dict[str, Any]) -> dict[int, str]:
    """Class names by number.

    Raises:
        ValueError: `names` is neither a list nor numbered, or `nc` contradicts it.
    """
    given = content["names"]
    if isinstance(given, dict):
        try:
            names = {int(number): name for number, name in given.items()}
        except ValueError:
            raise ValueError(f"{file}: the keys of names must be class numbers, got {list(given)[:5]}.") from None
    elif isinstance(given, list):
        names = dict(enumerate(given))
    else:
        raise ValueError(f"{file}: names must be a list such as [nut, bolt], or numbered names, got {given!r}.")
    if not names or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"{file}: names must be a list of class names, got {given}.")
    count = content.get("nc")
    if count and str(count) != str(len(names)):
        raise ValueError(f"{file}: nc is {count}, but names has {len(names)} classes. Correct one of them.")
    return names


def _read_darknet(file: Path, folder: DatasetFolder) -> YoloDescription | None:
    """`obj.data`: lines such as `train = data/train.txt`, with the classes in the file that it calls `names`."""
    pairs = (line.split("=", 1) for line in read_text(file).splitlines() if "=" in line and not line.startswith("#"))
    content = {key.strip().lower(): value.strip() for key, value in pairs}
    if "names" not in content:
        return None
    names = folder.find_place(content["names"], [file.parent, folder.path])
    if names is None:
        raise ValueError(f"{file} names {content['names']} for the classes, which does not exist.")
    lines = [line.strip() for line in read_text(names).splitlines() if line.strip()]
    entries = {name: [content[name]] for known in _known_names() for name in known if content.get(name)}
    return YoloDescription(file, dict(enumerate(lines)), entries)


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
    lists = [
        file
        for file in folder.of_type(".txt", depth=2)
        if name_rank(file.stem, split) is not None and not looks_like_labels(file)
    ]
    if lists:
        return _listed_images(folder, lists[0], split)
    parts = {
        path: path.relative_to(folder.path).parts[:-1] for path in folder.images if path.is_relative_to(folder.path)
    }
    inside = [path for path, names in parts.items() if any(name_rank(name, split) is not None for name in names)]
    if inside or split != "train":
        return inside
    others = (name_rank(name, other) for names in parts.values() for name in names for other in SPLIT_NAMES)
    return [] if any(rank is not None for rank in others) else folder.images


def read_yolo(folder: DatasetFolder, description: YoloDescription, paths: list[Path], split: str) -> AnnotatedSplit:
    """A split of a YOLO dataset, with the labels of each image."""
    keys = sorted(description.names)
    class_ids = {key: class_id for class_id, key in enumerate(keys)}
    paths = [path.absolute() for path in paths]
    places = {os.path.dirname(path) for path in paths}
    common = Path(os.path.commonpath(places)) if places else description.file.parent
    images = []
    for path in paths:
        name = path.relative_to(common).as_posix()
        images.append(ImageRecord(path, name, os.path.splitext(name)[0], f"image {name}"))
    read_headers(images)
    label_files = [label_file(image.path) for image in images]
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
