"""Data sets of Hugging Face `datasets`, saved or on the Hub, whose rows have an image and `objects`."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetDict, Image, IterableDataset, concatenate_datasets

from .checks import Finding, quick_checks, refuse
from .formats.coco import own_id
from .formats.imagefolder import OTHER_NAMES, objects_as_records
from .schema import DetectionDataset, detection_info, set_apart, unique_names
from .source import Box, Header, Photo, Source, read_header


def load_rows(
    path: str,
    split: str,
    *,
    id2label: dict[int, str] | None,
    bbox_format: str | None,
    validation_share: float,
    seed: int,
    streaming: bool,
    cache_dir: str | Path | None,
    **kwargs: Any,
) -> DetectionDataset:
    """See [`~hf_detr.data.load_detection_dataset`]. Images are not copied, only what is said of them is."""
    loaded = _open(path, streaming, cache_dir, **kwargs)
    names = {"val": ("val", "valid", "validation")}.get(split, (split,))
    name = next((name for name in names if name in loaded), None)
    no_validation = not {"val", "valid", "validation"} & set(loaded)
    cut = bool(validation_share) and no_validation and "train" in loaded and split in ("train", "val") and not streaming
    if name is None and not cut:
        hint = "; none can be set apart while streaming" if streaming else ""
        raise FileNotFoundError(f'{path} has no split "{split}", only {sorted(loaded)}{hint}.')
    part = "train" if cut else str(name)
    rows = to_schema(loaded[part], f"{path} ({part})", id2label=id2label, bbox_format=bbox_format)
    return set_apart(rows, validation_share, seed)["train" if split == "train" else "test"] if cut else rows


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

    Raises:
        ValueError: there is no `image` or no `objects`, or the records would break training.
    """
    features = rows.features
    if features is not None and not {"image", "objects"} <= set(features):
        raise ValueError(f"{source} has the columns {sorted(features)}; a detection data set has image and objects.")
    names = _names(rows, source)
    given = [id2label[index] for index in sorted(id2label)] if id2label is not None else [str(name) for name in names]
    unknown = [name for name in names if str(name) not in given]
    if unknown:
        raise ValueError(f"{source} has a category {unknown[0]!r}, which is none of the classes {given[:20]}.")
    class_of = {key: given.index(str(name)) for key, name in _keys(rows, names).items()}
    info = detection_info(unique_names(given), list(range(len(given))), source)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        return _convert(row, index, class_of, bbox_format)

    if isinstance(rows, IterableDataset):
        extra = [name for name in (rows.column_names or []) if name not in info.features]
        mapped = rows.map(convert, with_indices=True, remove_columns=extra, features=info.features)
        mapped.info.description = info.description
        return mapped
    raw = rows.cast_column("image", Image(decode=False))
    about = raw.map(
        convert, with_indices=True, remove_columns=rows.column_names, features=_without_image(info.features)
    )
    refuse(_check(about, given, source, bbox_format), on_disk=False)
    result = concatenate_datasets([raw.select_columns("image").cast_column("image", Image()), about], axis=1)
    result = result.select_columns(list(info.features))
    result.info.description = info.description
    return result


def _without_image(features: Any) -> Any:
    return datasets.Features({name: feature for name, feature in features.items() if name != "image"})


def _category_feature(rows: DetectionDataset) -> Any:
    objects = (rows.features or {}).get("objects")
    if objects is None:
        return None
    inner = getattr(objects, "feature", objects)
    for name in OTHER_NAMES["category"]:
        if isinstance(inner, dict) and name in inner:
            return getattr(inner[name], "feature", inner[name])
    return None


def _names(rows: DetectionDataset, source: str) -> list[Any]:
    """Names of the classes: of the feature, or all that occur."""
    feature = _category_feature(rows)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"{source} does not name its classes, which cannot be collected while streaming: pass id2label."
        )
    found = {
        r.get("category") for row in rows.select_columns("objects") for r in objects_as_records(row["objects"] or {})
    }
    return sorted(found - {None}, key=lambda name: (isinstance(name, str), name))


def _keys(rows: DetectionDataset, names: list[Any]) -> dict[Any, Any]:
    """What stands in the rows, to the name it means."""
    return dict(enumerate(names)) if isinstance(_category_feature(rows), datasets.ClassLabel) else {n: n for n in names}


def _convert(row: dict[str, Any], index: int, class_of: dict[Any, int], bbox_format: str | None) -> dict[str, Any]:
    records = objects_as_records(row["objects"] or {})
    boxes = [[float(value) for value in record["bbox"]] for record in records]
    if bbox_format == "xyxy":
        boxes = [[x, y, right - x, bottom - y] for x, y, right, bottom in boxes]
    width, height = _size(row["image"])
    name = row.get("file_name") or (row["image"].get("path") if isinstance(row["image"], dict) else None)
    return {
        "image_id": own_id(row.get("image_id"), index),
        "file_name": Path(name).name if name else f"{index}.png",
        "width": width,
        "height": height,
        "objects": {
            "id": [own_id(record.get("id"), number) for number, record in enumerate(records)],
            "bbox": boxes,
            "category": [class_of[record["category"]] for record in records],
            "area": [
                box[2] * box[3] if record.get("area") is None else float(record["area"])
                for box, record in zip(boxes, records, strict=True)
            ],
            "iscrowd": [int(bool(record.get("iscrowd") or 0)) for record in records],
        },
    }


def _size(image: Any) -> tuple[int, int]:
    """(width, height) as shown, of a decoded image or of its bytes."""
    if not isinstance(image, dict):
        return int(image.width), int(image.height)
    return read_header(BytesIO(image["bytes"]) if image.get("bytes") else Path(image["path"])).size


def _check(about: Iterable[dict[str, Any]], names: list[str], source: str, bbox_format: str | None) -> list[Finding]:
    """The quick checks, on rows that were converted already."""
    photos = []
    for row in about:
        objects, size = row["objects"], (row["width"], row["height"])
        where = f"image {row['image_id']}"
        header = Header(size, size, problem=None if min(size) > 0 else "cannot be opened as an image")
        columns = zip(objects["id"], objects["bbox"], objects["category"], objects["area"], strict=True)
        boxes = [Box(f"object {n}", bbox, category, i, area) for n, (i, bbox, category, area) in enumerate(columns)]
        photos.append(Photo(Path(row["file_name"]), row["file_name"], row["image_id"], where, None, boxes, header))
    kind = Source("datasets", "", Path(source), names, list(range(len(names))), photos, Path(source))
    return quick_checks(kind, bbox_format=bbox_format)
