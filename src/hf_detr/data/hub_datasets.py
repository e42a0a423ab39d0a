"""Datasets of Hugging Face `datasets`, saved or on the Hub, whose rows have an image and `objects`."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetDict, Image, IterableDataset, concatenate_datasets

from ..model.image_io import ImageHeader, read_image_header
from .checks import quick_checks
from .findings import Finding, raise_on_errors
from .formats.imagefolder import FIELD_NAMES, objects_as_records
from .formats.parsing import integer_id
from .records import AnnotatedSplit, BoxRecord, ImageRecord, split_names
from .schema import DetectionDataset, detection_info, split_off_validation, unique_names


def load_rows(
    path: str,
    split: str,
    *,
    id2label: dict[int, str] | None,
    bbox_format: str | None,
    validation_fraction: float,
    seed: int,
    streaming: bool,
    cache_dir: str | Path | None,
    **kwargs: Any,
) -> DetectionDataset:
    """See [`~hf_detr.data.load_detection_dataset`]. Images are not copied, only their annotations are."""
    loaded = _open(path, streaming, cache_dir, **kwargs)
    name = next((name for name in split_names(split) if name in loaded), None)
    part_of_train = (
        bool(validation_fraction)
        and split in ("train", "val")
        and "train" in loaded
        and not any(name in loaded for name in split_names("val"))
        and not streaming
    )
    if name is None and not part_of_train:
        hint = "; a validation split cannot be split off while streaming" if streaming else ""
        raise FileNotFoundError(f'{path} has no split "{split}", only {sorted(loaded)}{hint}.')
    name = "train" if part_of_train else str(name)
    rows = to_schema(loaded[name], f"{path} ({name})", id2label=id2label, bbox_format=bbox_format)
    if not part_of_train:
        return rows
    return split_off_validation(rows, validation_fraction, seed)["train" if split == "train" else "test"]


def _open(path: str, streaming: bool, cache_dir: str | Path | None, **kwargs: Any) -> Any:
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(path)
        loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return {name: rows.to_iterable_dataset() for name, rows in loaded.items()} if streaming else loaded
    return datasets.load_dataset(
        path, streaming=streaming, cache_dir=None if cache_dir is None else str(cache_dir), **kwargs
    )


def to_schema(
    rows: DetectionDataset, source: str, *, id2label: dict[int, str] | None = None, bbox_format: str | None = None
) -> DetectionDataset:
    """Rows with `image` and `objects` (boxes and categories, as lists or as dicts) to the schema.

    Args:
        source: names the dataset in messages.

    Raises:
        ValueError: there is no `image` or no `objects` column, or the records would break training.
    """
    features = rows.features
    if features is not None and not {"image", "objects"} <= set(features):
        raise ValueError(
            f"{source} has the columns {sorted(features)}; a detection dataset must have image and objects."
        )
    names = _class_names(rows, source)
    given = [id2label[index] for index in sorted(id2label)] if id2label is not None else [str(name) for name in names]
    unknown = [name for name in names if str(name) not in given]
    if unknown:
        raise ValueError(f"{source} has a category {unknown[0]!r}, which is none of the classes {given[:20]}.")
    stored = range(len(names)) if isinstance(_category_feature(rows), datasets.ClassLabel) else names
    class_ids = {value: given.index(str(name)) for value, name in zip(stored, names, strict=True)}
    info = detection_info(unique_names(given), list(range(len(given))), source)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        return _convert(row, index, class_ids, bbox_format)

    if isinstance(rows, IterableDataset):
        extra = [name for name in (rows.column_names or []) if name not in info.features]
        mapped = rows.map(convert, with_indices=True, remove_columns=extra, features=info.features)
        mapped.info.description = info.description
        return mapped
    raw = rows.cast_column("image", Image(decode=False))
    without_image = datasets.Features({name: f for name, f in info.features.items() if name != "image"})
    converted = raw.map(convert, with_indices=True, remove_columns=rows.column_names, features=without_image)
    raise_on_errors(_check(converted, given, source, bbox_format), on_disk=False)
    images = raw.select_columns("image").cast_column("image", Image())
    result = concatenate_datasets([images, converted], axis=1).select_columns(list(info.features))
    result.info.description = info.description
    return result


def _category_feature(rows: DetectionDataset) -> Any:
    objects = (rows.features or {}).get("objects")
    if objects is None:
        return None
    inner = getattr(objects, "feature", objects)
    for name in FIELD_NAMES["category"]:
        if isinstance(inner, dict) and name in inner:
            return getattr(inner[name], "feature", inner[name])
    return None


def _class_names(rows: DetectionDataset, source: str) -> list[Any]:
    """The names of a `ClassLabel`; without one, all categories that occur."""
    feature = _category_feature(rows)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"{source} does not name its classes, and they cannot be collected while streaming: pass id2label."
        )
    found = {
        entry.get("category")
        for row in rows.select_columns("objects")
        for entry in objects_as_records(row["objects"] or {})
    }
    return sorted(found - {None}, key=lambda name: (isinstance(name, str), name))


def _convert(row: dict[str, Any], index: int, class_ids: dict[Any, int], bbox_format: str | None) -> dict[str, Any]:
    entries = objects_as_records(row["objects"] or {})
    boxes = [[float(value) for value in entry["bbox"]] for entry in entries]
    if bbox_format == "xyxy":
        boxes = [[x, y, right - x, bottom - y] for x, y, right, bottom in boxes]
    width, height = _image_size(row["image"])
    name = row.get("file_name") or (row["image"].get("path") if isinstance(row["image"], dict) else None)
    return {
        "image_id": integer_id(row.get("image_id"), index),
        "file_name": Path(name).name if name else f"{index}.png",
        "width": width,
        "height": height,
        "objects": {
            "id": [integer_id(entry.get("id"), number) for number, entry in enumerate(entries)],
            "bbox": boxes,
            "category": [class_ids[entry["category"]] for entry in entries],
            "area": [
                box[2] * box[3] if entry.get("area") is None else float(entry["area"])
                for box, entry in zip(boxes, entries, strict=True)
            ],
            "iscrowd": [int(bool(entry.get("iscrowd") or 0)) for entry in entries],
        },
    }


def _image_size(image: Any) -> tuple[int, int]:
    """(width, height) in pixels as shown, of a decoded image or of its file."""
    if not isinstance(image, dict):
        return int(image.width), int(image.height)
    return read_image_header(BytesIO(image["bytes"]) if image.get("bytes") else Path(image["path"])).size


def _check(
    converted: Iterable[dict[str, Any]], names: list[str], source: str, bbox_format: str | None
) -> list[Finding]:
    """The quick checks on converted rows."""
    images = []
    for row in converted:
        objects, size = row["objects"], (row["width"], row["height"])
        header = ImageHeader(size, size, problem=None if min(size) > 0 else "cannot be opened as an image")
        columns = zip(objects["id"], objects["bbox"], objects["category"], objects["area"], strict=True)
        boxes = [
            BoxRecord(f"object {number}", bbox, category, object_id, area)
            for number, (object_id, bbox, category, area) in enumerate(columns)
        ]
        image = ImageRecord(Path(row["file_name"]), row["file_name"], row["image_id"], f"image {row['image_id']}")
        image.boxes, image.header = boxes, header
        images.append(image)
    split = AnnotatedSplit("datasets", "", Path(source), names, list(range(len(names))), images, Path(source))
    return quick_checks(split, bbox_format=bbox_format)
