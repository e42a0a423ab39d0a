"""Reading Hugging Face imagefolders, and the `objects` that Hugging Face data sets have."""

import json
from pathlib import Path
from typing import Any

from ..source import Box, Photo, Source, read_text
from .coco import own_id


def find_imagefolder(path: Path, split: str, names: tuple[str, ...]) -> Source | None:
    if path.is_file():
        return None
    places = [path / name for name in names] + ([path] if split == "train" else [])
    file = next((place / "metadata.jsonl" for place in places if (place / "metadata.jsonl").is_file()), None)
    return None if file is None else read_imagefolder(file, split)


def read_imagefolder(file: Path, split: str) -> Source:
    """`metadata.jsonl` of a Hugging Face imagefolder: `file_name` and `objects` with `bbox` and `category` (or
    `categories`), names or class ids, as lists or as a list of dicts; `image_id`, `id`, `area`, `iscrowd` if there."""
    rows: list[tuple[str, dict[str, Any]]] = []
    stray: list[tuple[str, str, str]] = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append((f"line {number}", row | {"objects": objects_as_records(row.get("objects") or {})}))
            except (json.JSONDecodeError, TypeError, AttributeError, ValueError) as error:
                stray.append(("annotation-unreadable", f"line {number}", str(error)))
    kinds = {record.get("category") for _, row in rows for record in row["objects"]} - {None}
    if all(isinstance(kind, int) for kind in kinds):
        ids = sorted(kinds)
        names = [str(kind) for kind in ids]
        class_of = {kind: index for index, kind in enumerate(ids)}
    else:
        names = sorted(str(kind) for kind in kinds)
        ids = list(range(len(names)))
        class_of = {kind: names.index(str(kind)) for kind in kinds}
    photos, number = [], 0
    for index, (where, row) in enumerate(rows):
        name = str(row.get("file_name", ""))
        width, height = row.get("width"), row.get("height")
        size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
        photo = Photo(file.parent / name, name, own_id(row.get("image_id"), index), f"{where} ({name})", size)
        for position, record in enumerate(row["objects"]):
            number += 1
            category = class_of.get(record.get("category"))
            photo.boxes.append(
                Box(
                    f"{where} object {position}",
                    record.get("bbox"),
                    category,
                    own_id(record.get("id"), number),
                    record.get("area"),
                    int(bool(record.get("iscrowd") or 0)),
                    category_name=record.get("category"),
                )
            )
        photos.append(photo)
    return Source("imagefolder", split, file, names, [int(i) for i in ids], photos, file.parent, stray)


OTHER_NAMES = {
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "category": ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "id": ("id", "ids", "bbox_id", "annotation_id"),
}


def objects_as_records(objects: Any) -> list[dict[str, Any]]:
    """The `objects` of one row, a dict of lists or a list of dicts, to dicts with `bbox`, `category` and, where there
    are any, `area`, `iscrowd` and `id`.

    Raises:
        ValueError: there are no boxes or no categories, or not as many of one as of the other.
    """
    if isinstance(objects, list):
        return [
            {key: _pick(record, key) for key in OTHER_NAMES if _pick(record, key) is not None} for record in objects
        ]
    columns = {key: _pick(objects, key) for key in OTHER_NAMES if _pick(objects, key) is not None}
    if not columns:
        return []
    if "bbox" not in columns or "category" not in columns:
        raise ValueError(f"objects must have bbox and category, got {sorted(objects)}.")
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"objects have lists of different lengths: {lengths}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _pick(record: dict[str, Any], key: str) -> Any:
    return next((record[name] for name in OTHER_NAMES[key] if record.get(name) is not None), None)
