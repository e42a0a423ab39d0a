"""Reading YOLO data sets."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from ..source import Box, Photo, Source, image_files, read_headers, read_text

logger = logging.get_logger(__name__)


def find_yolo(path: Path, split: str, names: tuple[str, ...]) -> Source | None:
    candidates = [path] if path.is_file() else sorted((*path.glob("*.yaml"), *path.glob("*.yml")))
    for file in candidates:
        if file.suffix not in (".yaml", ".yml"):
            continue
        try:
            content = yaml.safe_load(read_text(file))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from error
        if isinstance(content, dict) and "names" in content:
            key = next((name for name in names if content.get(name)), None)
            entries = [] if key is None else content[key] if isinstance(content[key], list) else [content[key]]
            if not entries:
                return None
            if split != "train" and not any(_place_of(file, content, entry) for entry in entries):
                # Roboflow names splits that it does not write
                logger.warning_once(f"{file} says that {split} images are in {entries[0]}, which is not there.")
                return None
            return read_yolo(file, content, entries, split)
    return None


def _place_of(file: Path, content: dict[str, Any], entry: str) -> Path | None:
    root = Path(content.get("path") or "")
    root = root if root.is_absolute() else file.parent / root
    # Roboflow writes ../train/images relative to a folder that does not exist; what it means is beside the yaml
    places = [root / entry, file.parent / entry, file.parent / entry.removeprefix("../")]
    return next((place for place in places if place.exists()), None)


def _images_of(place: Path) -> list[Path]:
    if place.is_dir():
        return image_files(place)
    lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]  # a list of images
    return [path if path.is_absolute() else place.parent / path for path in map(Path, lines)]


def yolo_places(folder: Path) -> Iterator[Path]:
    """Folders and lists outside `folder` that its yaml files name, with the files in them: what must not have changed
    for the rows in the cache to be right."""
    for file in [folder] if folder.is_file() else sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        try:
            content = yaml.safe_load(read_text(file))
        except (yaml.YAMLError, ValueError):
            continue
        if not isinstance(content, dict) or "names" not in content:
            continue
        for key in ("train", "val", "valid", "validation", "test"):
            for entry in [content[key]] if isinstance(content.get(key), str) else content.get(key) or []:
                place = _place_of(file, content, entry)
                if place is not None:
                    yield from (path for image in _images_of(place) for path in (image, _label_file(image)))


def read_yolo(file: Path, content: dict[str, Any], entries: list[str], split: str) -> Source:
    """A split of a YOLO data set: a label file an image, each line `class cx cy w h` in [0, 1], or a polygon
    `class x1 y1 x2 y2 ...`, of which the surrounding box is taken. Key points after a box are left out."""
    names = content["names"]
    ids = sorted(names) if isinstance(names, dict) else list(range(len(names)))
    class_of = {int(key): index for index, key in enumerate(ids)}
    labels_of = [str(names[key]) for key in ids]
    paths: list[Path] = []
    for entry in entries:
        place = _place_of(file, content, entry)
        if place is None:
            raise ValueError(f"{file}: the {split} images are said to be in {entry}, which is not there.")
        paths += _images_of(place)
    paths = [path.absolute() for path in paths]
    common = _common_folder(paths, file.parent)
    photos = [
        Photo(path, _relative(path, common), number, f"image {_relative(path, common)}")
        for number, path in enumerate(paths)
    ]
    read_headers(photos)
    labels = {photo.file_name: _label_file(photo.path) for photo in photos}
    for photo in photos:
        photo.boxes = list(_yolo_boxes(labels[photo.file_name], photo, class_of, "kpt_shape" in content))
    number = 0
    for photo in photos:
        for box in photo.boxes:
            box.id = number = number + 1
    with_image = set(labels.values())
    folders = {label.parent for label in with_image}
    stray = [
        ("annotation-without-image", f"{label.name}", "there is no image for this label file")
        for folder in sorted(folders)
        for label in sorted(folder.glob("*.txt"))
        if label not in with_image and label.name != "classes.txt"
    ]
    stray += [
        ("image-without-record", photo.where, f"there is no label file {labels[photo.file_name]}")
        for photo in photos
        if not labels[photo.file_name].is_file()
    ]
    return Source("YOLO", split, file, labels_of, [int(key) for key in ids], photos, common, stray)


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _yolo_boxes(label: Path, photo: Photo, class_of: dict[int, int], with_points: bool) -> Iterator[Box]:
    if not label.is_file():
        return
    width, height = photo.header.size if photo.header else (0, 0)
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{label.name} line {number}"
        try:
            kind, *values = (float(value) for value in line.split())
        except ValueError:
            yield Box(where, line.strip(), None, 0, problem=f"is not numbers: {line.strip()[:60]!r}")
            continue
        category = class_of.get(int(kind)) if math.isfinite(kind) and kind == int(kind) else None
        values = values[:4] if with_points else values
        problem = None
        if len(values) == 4:
            cx, cy, w, h = values
            bbox = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        elif len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = values[::2], values[1::2]
            bbox = [min(xs) * width, min(ys) * height, (max(xs) - min(xs)) * width, (max(ys) - min(ys)) * height]
        else:
            problem, bbox = f"has {len(values)} numbers; a box has 4, a polygon an even number from 6", values
        if problem is None and all(map(math.isfinite, values)) and max(map(abs, values)) > 2:
            problem = f"is not relative to the image: {values[:4]}; YOLO has values in [0, 1]"
        yield Box(where, bbox, category, 0, problem=problem, category_name=line.split()[0])


def _common_folder(paths: list[Path], default: Path) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths])) if paths else default


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
