"""Reading COCO JSON."""

import json
from pathlib import Path
from typing import Any

from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, split_names
from .parsing import integer_id, read_text, recorded_size

KEYS = {"images", "annotations", "categories"}


def find_coco(path: Path, split: str) -> AnnotatedSplit | None:
    """COCO JSON of one split, see `COCO.layout`. A single `.json` file, or a folder with only one COCO file, whatever
    its name, is the split "train"."""
    if path.is_file():
        return read_coco(path, path.parent, split) if path.suffix == ".json" and split == "train" else None
    for name in split_names(split):
        candidates = sorted((path / "annotations").glob(f"instances_{name}*.json"))
        for file in (*candidates, path / name / "_annotations.coco.json", path / f"{name}.json"):
            if file.is_file():
                return read_coco(file, path, split)
    if split == "train":
        files = sorted((*path.glob("*.json"), *(path / "annotations").glob("*.json")))
        if len(files) == 1 and _is_coco(files[0]):
            return read_coco(files[0], path, split)
    return None


def _is_coco(file: Path) -> bool:
    try:
        content = json.loads(read_text(file))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and set(content) >= KEYS


def read_coco(file: Path, folder: Path, split: str) -> AnnotatedSplit:
    """One COCO JSON file. Its category ids become class ids 0 ... N-1 in ascending order. A category without boxes that
    others name as their supercategory, as in Roboflow's exports, is not a class.

    Raises:
        ValueError: the file is not COCO; names it, and the record.
    """
    content = _parse(file)
    image_folder = _image_folder(file, folder, split, content)
    categories = _classes(file, content)
    images, orphans, ambiguous_ids = _images(content["images"], image_folder)
    class_ids = {category["id"]: class_id for class_id, category in enumerate(categories)}
    orphans += _add_boxes(images, content["annotations"], class_ids)
    return AnnotatedSplit(
        "COCO",
        split,
        file,
        [str(category["name"]) for category in categories],
        [category["id"] for category in categories],
        list(images.values()),
        image_folder,
        orphans,
        ambiguous_ids,
    )


def _parse(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    missing = KEYS - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{file} is not COCO: {sorted(missing)} are missing.")
    for category in content["categories"]:
        if not isinstance(category.get("id"), int) or not category.get("name"):
            raise ValueError(f"{file}: each category needs an integer id and a name, got {category}.")
    return dict(content)


def _image_folder(file: Path, folder: Path, split: str, content: dict[str, Any]) -> Path:
    """The first of the usual folders that holds one of the first images."""
    stem = file.stem.removeprefix("instances_")
    usual = [
        base / name
        for base in (folder, folder.parent)
        for name in (stem, split, f"images/{stem}", f"images/{split}", "images", "")
    ]
    folders = [place for place in (file.parent, *usual) if place.is_dir()]
    for record in content["images"][:20]:
        for place in folders:
            if record.get("file_name") and (place / str(record["file_name"])).is_file():
                return place
    return next((place for place in usual[:5] if place.is_dir()), folder)


def _classes(file: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The categories that are classes, by id."""
    used = {record.get("category_id") for record in content["annotations"]}
    parents = {c.get("supercategory") for c in content["categories"] if c.get("supercategory") != c["name"]} - {"none"}
    classes = [c for c in content["categories"] if c["id"] in used or c["name"] not in parents]
    return sorted(classes, key=lambda category: category["id"])


def _images(
    records: list[dict[str, Any]], image_folder: Path
) -> tuple[dict[Any, ImageRecord], list[tuple[str, str, str]], set[int]]:
    """Image records by their original id, orphans, and ambiguous ids."""
    images: dict[Any, ImageRecord] = {}
    orphans, ambiguous_ids = [], set()
    for number, record in enumerate(records):
        name, given_id = str(record.get("file_name", "")), record.get("id")
        described = f"image {given_id} ({name})"
        if not name or given_id is None:
            orphans.append(("image-record-incomplete", f"image number {number}", "needs an id and a file_name"))
        elif given_id in images:
            other = images[given_id]
            orphans.append(("image-id-duplicate", described, f"has the same id as {other.file_name}"))
            ambiguous_ids.add(other.id)
        else:
            size = recorded_size(record.get("width"), record.get("height"))
            path = image_folder / name
            images[given_id] = ImageRecord(path, name, integer_id(given_id, number), described, size)
    return images, orphans, ambiguous_ids


def _add_boxes(
    images: dict[Any, ImageRecord], records: list[dict[str, Any]], class_ids: dict[Any, int]
) -> list[tuple[str, str, str]]:
    """Attach the annotations to their images; returns those without an image, and duplicate ids."""
    orphans: list[tuple[str, str, str]] = []
    ids: set[Any] = set()
    for number, record in enumerate(records):
        described = f"annotation {record.get('id', f'number {number}')}"
        if record.get("id") in ids:
            orphans.append(("annotation-id-duplicate", described, "another annotation has the same id"))
        ids.add(record.get("id"))
        image = images.get(record.get("image_id"))
        if image is None:
            orphans.append(("annotation-orphan", described, f"there is no image {record.get('image_id')}"))
            continue
        area = record.get("area")
        image.boxes.append(
            BoxRecord(
                described,
                record.get("bbox"),
                class_ids.get(record.get("category_id")),
                integer_id(record.get("id"), number),
                float(area) if isinstance(area, (int, float)) else None,
                int(bool(record.get("iscrowd", 0))),
                category_name=record.get("category_id"),
            )
        )
    return orphans


COCO = AnnotationFormat(
    "COCO", "annotations/instances_{split}*.json, {split}/_annotations.coco.json, {split}.json", find_coco
)
