"""Reading YOLO data sets."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .source import Box, Photo, Source, image_files, read_headers, read_text


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
            return None if key is None else read_yolo(file, content, content[key], split)
    return None


def read_yolo(file: Path, content: dict[str, Any], images: str | list[str], split: str) -> Source:
    """A split of a YOLO data set: a label file an image, each line `class cx cy w h` in [0, 1], or a polygon
    `class x1 y1 x2 y2 ...`, of which the surrounding box is taken."""
    names = content["names"]
    names = [str(names[key]) for key in sorted(names)] if isinstance(names, dict) else [str(name) for name in names]
    root = Path(content.get("path") or "")
    root = root if root.is_absolute() else file.parent / root
    paths: list[Path] = []
    for entry in [images] if isinstance(images, str) else images:
        # Roboflow writes ../train/images relative to a folder that does not exist; what it means is beside the yaml
        places = [root / entry, file.parent / entry, file.parent / entry.removeprefix("../")]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise ValueError(f"{file}: the {split} images are said to be in {entry}, which is not there.")
        if place.is_dir():
            paths += image_files(place)
        else:  # a list of images
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            paths += [p if p.is_absolute() else place.parent / p for p in map(Path, lines)]
    common = _common_folder(paths, file.parent)
    photos = [
        Photo(path, _relative(path, common), number, f"image {_relative(path, common)}")
        for number, path in enumerate(paths)
    ]
    read_headers(photos)
    labels = {photo.file_name: _label_file(photo.path) for photo in photos}
    for photo in photos:
        photo.boxes = list(_yolo_boxes(labels[photo.file_name], photo, len(names)))
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
    return Source("YOLO", split, file, names, list(range(len(names))), photos, common, stray)


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _yolo_boxes(label: Path, photo: Photo, num_classes: int) -> Iterator[Box]:
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
        category = int(kind) if kind == int(kind) and 0 <= kind < num_classes else None
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
    if not paths:
        return default
    parents = [path.parent for path in paths]
    common = parents[0]
    while not all(parent.is_relative_to(common) for parent in parents):
        common = common.parent
    return common


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
