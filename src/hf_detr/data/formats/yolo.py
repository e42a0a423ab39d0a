"""Reading YOLO datasets."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from ..image_files import image_files
from ..records import SPLIT_NAMES, AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, read_headers, split_names
from .parsing import read_text

logger = logging.get_logger(__name__)


def find_yolo(path: Path, split: str) -> AnnotatedSplit | None:
    """The split that a `.yaml` file names, with labels in `labels/` beside `images/`."""
    for file in _yaml_files(path):
        try:
            content = yaml.safe_load(read_text(file))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from error
        if isinstance(content, dict) and "names" in content:
            entries = next((_entries(content, name) for name in split_names(split) if content.get(name)), [])
            if not entries:
                return None
            if split != "train" and not any(_resolve(file, content, entry) for entry in entries):
                # Roboflow's yaml files name splits that were not exported
                logger.warning_once(f"{file} names {entries[0]} for the {split} images, which does not exist.")
                return None
            return read_yolo(file, content, entries, split)
    return None


def yolo_files_elsewhere(path: Path) -> Iterator[Path]:
    """The images and label files that the yaml files of a folder name, in that folder or outside."""
    for file in _yaml_files(path):
        try:
            content = yaml.safe_load(read_text(file))
        except (yaml.YAMLError, ValueError):
            continue
        if not isinstance(content, dict) or "names" not in content:
            continue
        for name in (*SPLIT_NAMES["train"], *SPLIT_NAMES["val"], "test"):
            for entry in _entries(content, name):
                place = _resolve(file, content, entry)
                for image in _images_in(place) if place is not None else ():
                    yield from (image, _label_file(image))


def _yaml_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in (".yaml", ".yml") else []
    return sorted((*path.glob("*.yaml"), *path.glob("*.yml")))


def _entries(content: dict[str, Any], name: str) -> list[str]:
    """The folders and image lists of a split."""
    value = content.get(name) or []
    return value if isinstance(value, list) else [value]


def _resolve(file: Path, content: dict[str, Any], entry: str) -> Path | None:
    root = Path(content.get("path") or "")
    root = root if root.is_absolute() else file.parent / root
    # Roboflow writes ../train/images for a folder that is beside the yaml file
    candidates = [root / entry, file.parent / entry, file.parent / entry.removeprefix("../")]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _images_in(place: Path) -> list[Path]:
    """The images in a folder, or those that a text file lists."""
    if place.is_dir():
        return image_files(place)
    lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
    return [path if path.is_absolute() else place.parent / path for path in map(Path, lines)]


def read_yolo(file: Path, content: dict[str, Any], entries: list[str], split: str) -> AnnotatedSplit:
    """A split of a YOLO dataset: one label file per image, each line `class cx cy w h` in [0, 1], or a polygon `class
    x1 y1 x2 y2 ...`, of which the bounding box is taken. Keypoints after a box are ignored.

    Raises:
        ValueError: the images of the split do not exist.
    """
    names = content["names"]
    keys = sorted(names) if isinstance(names, dict) else list(range(len(names)))
    class_ids = {int(key): class_id for class_id, key in enumerate(keys)}
    paths: list[Path] = []
    for entry in entries:
        place = _resolve(file, content, entry)
        if place is None:
            raise ValueError(f"{file} names {entry} for the {split} images, which does not exist.")
        paths += [path.absolute() for path in _images_in(place)]
    folder = Path(os.path.commonpath([path.parent for path in paths])) if paths else file.parent
    images = []
    for number, path in enumerate(paths):
        name = path.relative_to(folder).as_posix()
        images.append(ImageRecord(path, name, number, f"image {name}"))
    read_headers(images)
    number = 0
    for image in images:
        image.boxes = list(_boxes(_label_file(image.path), image.size, class_ids, "kpt_shape" in content))
        for box in image.boxes:
            box.id = number = number + 1
    return AnnotatedSplit(
        "YOLO",
        split,
        file,
        [str(names[key]) for key in keys],
        [int(key) for key in keys],
        images,
        folder,
        _orphans(images),
    )


def _orphans(images: list[ImageRecord]) -> list[tuple[str, str, str]]:
    labels = [_label_file(image.path) for image in images]
    known = set(labels)
    orphans = [
        ("annotation-orphan", label.name, "there is no image for this label file")
        for folder in sorted({label.parent for label in labels})
        for label in sorted(folder.glob("*.txt"))
        if label not in known and label.name != "classes.txt"
    ]
    return orphans + [
        ("image-unannotated", image.record, f"there is no label file {label}")
        for image, label in zip(images, labels, strict=True)
        if not label.is_file()
    ]


def _label_file(image: Path) -> Path:
    """The last folder `images` in the path replaced by `labels`, the suffix by `.txt`."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _boxes(
    label: Path, image_size: tuple[int, int], class_ids: dict[int, int], with_keypoints: bool
) -> Iterator[BoxRecord]:
    """The objects of a label file; `image_size` is (width, height) in pixels."""
    if not label.is_file():
        return
    scale = (*image_size, *image_size)
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        if not line.strip():
            continue
        record = f"{label.name} line {number}"
        try:
            class_number, *values = (float(value) for value in line.split())
        except ValueError:
            yield BoxRecord(record, line.strip(), None, 0, problem=f"must be numbers, got {line.strip()[:60]!r}")
            continue
        values = values[:4] if with_keypoints else values
        valid_class = math.isfinite(class_number) and class_number == int(class_number)
        category = class_ids.get(int(class_number)) if valid_class else None
        problem, relative = None, values
        if len(values) == 4:
            cx, cy, w, h = values
            relative = [cx - w / 2, cy - h / 2, w, h]
        elif len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = values[::2], values[1::2]
            relative = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        else:
            problem = f"must have 4 numbers after the class, or an even number from 6 for a polygon, got {len(values)}"
        if problem is None and all(map(math.isfinite, values)) and max(map(abs, values)) > 2:
            problem = f"must be relative to the image, in [0, 1], got {values[:4]}"
        bbox = [value * side for value, side in zip(relative, scale, strict=False)]
        yield BoxRecord(record, bbox, category, 0, problem=problem, category_name=line.split()[0])


YOLO = AnnotationFormat(
    "YOLO", "a .yaml file that names {split} and the classes, such as data.yaml", find_yolo, yolo_files_elsewhere
)
