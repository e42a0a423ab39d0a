"""Reading Hugging Face imagefolders, and the `objects` column of Hugging Face datasets."""

import json
from pathlib import Path
from typing import Any

from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, split_names
from .parsing import integer_id, read_text, recorded_size

# names under which datasets on the Hub store each field of their objects
FIELD_NAMES = {
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "category": ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "id": ("id", "ids", "bbox_id", "annotation_id"),
}


def find_imagefolder(path: Path, split: str) -> AnnotatedSplit | None:
    """`metadata.jsonl` in the folder of the split; for "train" also in the folder itself."""
    if path.is_file():
        return None
    folders = [path / name for name in split_names(split)] + ([path] if split == "train" else [])
    files = (folder / "metadata.jsonl" for folder in folders)
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else read_imagefolder(file, split)


def read_imagefolder(file: Path, split: str) -> AnnotatedSplit:
    """`metadata.jsonl` of a Hugging Face imagefolder: `file_name` and `objects` per line, with `bbox` and `category`
    (names or class ids, see `FIELD_NAMES`), as lists or as a list of dicts; `image_id`, `id`, `area` and `iscrowd` are
    optional."""
    rows: list[tuple[str, dict[str, Any]]] = []
    orphans: list[tuple[str, str, str]] = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append((f"line {number}", row | {"objects": objects_as_records(row.get("objects") or {})}))
            except (json.JSONDecodeError, TypeError, AttributeError, ValueError) as error:
                orphans.append(("annotation-unreadable", f"line {number}", str(error)))
    names, category_ids, class_ids = _classes({entry.get("category") for _, row in rows for entry in row["objects"]})
    images, number = [], 0
    for index, (line, row) in enumerate(rows):
        name = str(row.get("file_name", ""))
        size = recorded_size(row.get("width"), row.get("height"))
        image = ImageRecord(file.parent / name, name, integer_id(row.get("image_id"), index), f"{line} ({name})", size)
        for position, entry in enumerate(row["objects"]):
            number += 1
            image.boxes.append(
                BoxRecord(
                    f"{line} object {position}",
                    entry.get("bbox"),
                    class_ids.get(entry.get("category")),
                    integer_id(entry.get("id"), number),
                    entry.get("area"),
                    int(bool(entry.get("iscrowd") or 0)),
                    category_name=entry.get("category"),
                )
            )
        images.append(image)
    return AnnotatedSplit("imagefolder", split, file, names, category_ids, images, file.parent, orphans)


def _classes(categories: set[Any]) -> tuple[list[str], list[int], dict[Any, int]]:
    """Names and category ids by class id, and class ids by category."""
    categories = categories - {None}
    if all(isinstance(category, int) for category in categories):
        ids = sorted(categories)
        return [str(i) for i in ids], [int(i) for i in ids], {i: class_id for class_id, i in enumerate(ids)}
    names = sorted(str(category) for category in categories)
    return names, list(range(len(names))), {category: names.index(str(category)) for category in categories}


def objects_as_records(objects: Any) -> list[dict[str, Any]]:
    """The `objects` of one row, a dict of lists or a list of dicts, to one dict per object with `bbox`, `category` and,
    where present, `area`, `iscrowd` and `id`.

    Raises:
        ValueError: boxes or categories are missing, or their numbers differ.
    """
    if isinstance(objects, list):
        return [_fields(entry) for entry in objects]
    columns = _fields(objects)
    if not columns:
        return []
    if "bbox" not in columns or "category" not in columns:
        raise ValueError(f"objects must have bbox and category, got {sorted(objects)}.")
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The lists of objects must have equal lengths, got {lengths}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    """The known fields that are set, under our names."""
    found = {
        key: next((entry[name] for name in names if entry.get(name) is not None), None)
        for key, names in FIELD_NAMES.items()
    }
    return {key: value for key, value in found.items() if value is not None}


IMAGEFOLDER = AnnotationFormat("imagefolder", "{split}/metadata.jsonl", find_imagefolder)
