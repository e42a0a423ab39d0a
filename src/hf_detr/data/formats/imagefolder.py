"""Reading Hugging Face imagefolders, and the `objects` column of Hugging Face datasets."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ...model.annotations import canonical_id, is_ignored
from ..dataset_folder import DatasetFolder, path_parts
from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, Orphan
from ..split_names import name_rank, split_of, split_of_folder
from .parsing import box_of_segmentation, read_text, recorded_size

METADATA = ("metadata.jsonl", "metadata.parquet")

# names under which datasets on the Hub store each field of their objects
FIELD_NAMES = {
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "category": ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "id": ("id", "ids", "bbox_id", "annotation_id"),
    "segmentation": ("segmentation", "segmentations"),
}
# names of the numbers of a box that is a dict
BOX_KEYS = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
CORNER_KEYS = (("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"), ("x1", "y1", "x2", "y2"))


def find_imagefolder(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """The metadata in a folder that is named after the split. Metadata above the folders of splits has rows of all of
    them: a row is of the split whose folder its `file_name` begins with, and of "train" if it begins with none."""
    files = [file for file in folder.of_type(".jsonl", ".parquet", depth=3) if file.name.lower() in METADATA]
    ranked = []
    for file in files:
        ranks = [rank for part in _folders_of(folder, file) if (rank := name_rank(part, split)) is not None]
        if ranks:
            ranked.append((min(ranks), file))
    if ranked:
        best = min(ranked)[0]
        found = read_imagefolder(folder, [file for rank, file in sorted(ranked) if rank == best], split)
        unused = [str(file.relative_to(folder.path)) for rank, file in ranked if rank != best]
        found.orphans += [("annotation-unused", name, f"{found.file} names the split better") for name in unused]
        return found
    above = [file for file in files if not any(split_of(part) for part in _folders_of(folder, file))]
    if not above:
        return None
    found = read_imagefolder(folder, above, split)
    found.images = [image for image in found.images if (_split_of_row(image.file_name) or "train") == split]
    return found if found.images or split == "train" else None


def read_imagefolder_file(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """Metadata that the user named, or the folder with it."""
    inside = [file / name for name in METADATA if (file / name).is_file()] if file.is_dir() else []
    if file.suffix.lower() in (".jsonl", ".parquet") or inside:
        return read_imagefolder(folder, [inside[0] if inside else file], split)
    return None


def _folders_of(folder: DatasetFolder, file: Path) -> tuple[str, ...]:
    return file.relative_to(folder.path).parts[:-1]


def _split_of_row(file_name: str) -> str | None:
    folders = path_parts(file_name)[:-1]
    return split_of_folder(folders[0]) if folders else None


def read_imagefolder(folder: DatasetFolder, files: list[Path], split: str) -> AnnotatedSplit:
    """`metadata.jsonl` or `metadata.parquet` of a Hugging Face imagefolder: `file_name` and `objects` per row, with
    `bbox` and `category` (names or class ids, see `FIELD_NAMES`), as lists or as a list of dicts; `image_id`, `id`,
    `area` and `iscrowd` are optional. Several files are the parts of one split."""
    orphans: list[Orphan] = []
    images: list[ImageRecord] = []
    rows = []
    for file in files:
        where = f"{file.relative_to(folder.path)} " if len(files) > 1 else ""
        rows += [(file, *row) for row in _rows(file, where, orphans)]
    for index, (file, described, row) in enumerate(rows):
        name = str(row.get("file_name") or "")
        if not name:
            orphans.append(("image-record-incomplete", described, "needs a file_name"))
            continue
        places = [file.parent] if folder.images_given is None else [folder.images_given, file.parent]
        path = folder.find_image(name, split, places) or file.parent / name
        image_id = index if row.get("image_id") is None else row["image_id"]
        image = ImageRecord(path, name, image_id, f"{described} ({name})", _size(row))
        try:
            image.boxes = read_objects(row.get("objects"), described)
        except ValueError as error:
            orphans.append(("annotation-unreadable", described, str(error)))
            continue
        images.append(image)
    names, category_ids, has_names = number_categories(images)
    split_ = AnnotatedSplit("imagefolder", split, files[0], names, category_ids, images, files[0].parent, orphans)
    split_.has_names = has_names
    return split_


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    return recorded_size(row.get("width"), row.get("height"))


def _rows(file: Path, where: str, orphans: list[Orphan]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its name for messages, which begins with `where`; lines that are not JSON records go to
    `orphans`."""
    if file.suffix.lower() == ".parquet":
        try:
            rows = pq.read_table(file).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of both
            raise ValueError(f"{file} is not valid Parquet: {error}") from error
        yield from ((f"{where}row {number}", row) for number, row in enumerate(rows))
        return
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            orphans.append(("annotation-unreadable", f"{where}line {number}", str(error)))
            continue
        if isinstance(row, dict):
            yield f"{where}line {number}", row
        else:
            problem = f"must be a JSON object, got {line[:60]}"
            orphans.append(("annotation-unreadable", f"{where}line {number}", problem))


# -- objects, here and in datasets ---------------------------------------------------------------------------------


def read_objects(objects: Any, where: str) -> list[BoxRecord]:
    """The `objects` of one row as box records, whose `category_name` is what the row has, and whose `category` is None
    until [`number_categories`].

    Args:
        objects: a dict of lists, a list of dicts, or None.
        where: identifies the row in messages.

    Raises:
        ValueError: boxes or categories are missing, or their numbers differ.
    """
    return [
        _box_record(entry, f"{where} object {position}", position)
        for position, entry in enumerate(objects_as_records(objects))
    ]


def _box_record(entry: Mapping[str, Any], record: str, position: int) -> BoxRecord:
    problem, crowd, bbox = None, False, entry.get("bbox")
    has_own_box = bbox is not None
    try:
        crowd = is_ignored(entry)
        has_own_box = bbox is not None and len(bbox) > 0
        bbox = _box_numbers(bbox) if has_own_box else box_of_segmentation(entry.get("segmentation"))
    except (ValueError, TypeError) as error:
        problem = str(error)
    area = entry.get("area")
    category = entry.get("category")
    return BoxRecord(
        record,
        bbox,
        None,
        position if entry.get("id") is None else canonical_id(entry["id"]),
        area,
        int(crowd),
        problem,
        category_name=category.item() if isinstance(category, np.generic) else category,
        has_own_box=has_own_box,
        segmentation=entry.get("segmentation"),
    )


def _box_numbers(bbox: Any) -> Any:
    """A box as a list, from a list, a dict with the usual keys, or text such as "[1, 2, 3, 4]" and "1,2,3,4"."""
    if isinstance(bbox, Mapping):
        for keys in (*BOX_KEYS, *CORNER_KEYS):
            if set(keys) <= set(bbox):
                values = [bbox[key] for key in keys]
                if keys in BOX_KEYS:
                    return values
                left, top, right, bottom = (float(value) for value in values)
                return [left, top, right - left, bottom - top]
        raise ValueError(f"a bbox that is a dict must have the keys {', '.join(BOX_KEYS[0])}, got {sorted(bbox)}")
    if isinstance(bbox, str):
        return [float(value) for value in bbox.strip(" []()").replace(";", ",").replace(",", " ").split()]
    return list(bbox)


def objects_as_records(objects: Any) -> list[dict[str, Any]]:
    """The `objects` of one row, a dict of lists or a list of dicts, to one dict per object with `bbox`, `category` and,
    where present, `area`, `iscrowd` and `id`.

    Raises:
        ValueError: boxes or categories are missing, or their numbers differ.
    """
    if objects is None:
        return []
    if isinstance(objects, (list, tuple, np.ndarray)):
        wrong = next((entry for entry in objects if not isinstance(entry, Mapping)), None)
        if wrong is not None:
            raise ValueError(f"each of the objects must be a dict, got {str(wrong)[:60]}")
        return [_fields(entry) for entry in objects]
    if not isinstance(objects, Mapping):
        raise ValueError(f"objects must be a dict of lists or a list of dicts, got {str(objects)[:60]}")
    columns = _fields(objects)
    if not columns:
        return []
    if not {"bbox", "segmentation"} & set(columns) or "category" not in columns:
        raise ValueError(f"objects must have bbox and category, got {sorted(objects)}")
    wrong = next((name for name, values in columns.items() if not hasattr(values, "__len__")), None)
    if wrong is not None:
        raise ValueError(f"{wrong} of objects must be a list, got {columns[wrong]!r}")
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of objects must have equal lengths, got {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields that are set, under our names."""
    found = {
        key: next((entry[name] for name in names if entry.get(name) is not None), None)
        for key, names in FIELD_NAMES.items()
    }
    return {key: value for key, value in found.items() if value is not None}


def number_categories(images: list[ImageRecord], names: list[str] | None = None) -> tuple[list[str], list[Any], bool]:
    """Give each box record its class id.

    Args:
        names: of the classes, if the source has them; its categories are then their numbers, or names.

    Returns:
        names and category ids by class id, and whether the source has names: without them, its categories are only
        numbers.
    """
    boxes = [box for image in images for box in image.boxes]
    if names is not None:
        known = {name: class_id for class_id, name in enumerate(names)}
        for box in boxes:
            category = canonical_id(box.category_name)
            if isinstance(category, str):
                box.category = known.get(category)
            elif isinstance(category, int) and 0 <= category < len(names):
                box.category = category
            else:
                box.category = known.get(str(category))
        return names, list(range(len(names))), True
    found = {canonical_id(box.category_name) for box in boxes} - {None}
    found = {category for category in found if isinstance(category, (int, str)) and category != ""}
    only_numbers = bool(found) and all(isinstance(category, int) for category in found)
    ordered = sorted(found) if only_numbers else sorted(found, key=str)
    class_ids = {category: class_id for class_id, category in enumerate(ordered)}
    for box in boxes:
        category = canonical_id(box.category_name)
        box.category = class_ids.get(category) if isinstance(category, (int, str)) else None
    ids = ordered if only_numbers else list(range(len(ordered)))
    return [str(category) for category in ordered], ids, not only_numbers


IMAGEFOLDER = AnnotationFormat(
    "imagefolder", "{split}/metadata.jsonl or metadata.parquet", find_imagefolder, read_imagefolder_file
)
