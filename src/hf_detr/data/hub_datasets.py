"""Datasets of Hugging Face `datasets`, saved or on the Hub, whose rows have an image and `objects`, or an image of
segments with `segments_info`, COCO's panoptic format; and WebDataset archives, in which a `.json` beside each image has
the objects."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Image, IterableDataset

from ..model.image_io import ImageHeader, read_image_header
from .checks import box_problems
from .formats.imagefolder import FIELD_NAMES, number_categories, read_objects
from .hub_access import MAP_NAMES, find_split_name, open_rows
from .mask_checks import read_image_masks
from .masks import SegmentMap
from .records import AnnotatedSplit, ImageRecord, numbered
from .rows import match_classes, reinterpret, to_row
from .schema import DetectionDataset, describe_source, loaded_features
from .split_source import Progress
from .webdataset import FEATURES as WEBDATASET
from .webdataset import unpack_row


class RowsSource:
    """A dataset of `datasets`: a folder for which [`is_hub_format`] holds, or an id on the Hub.

    Args:
        kwargs: for `datasets.load_dataset`.

    Raises:
        FileNotFoundError: there is no such dataset.
    """

    max_invalid = 0.02  # of somebody else's data, which cannot be corrected in place; at least one box
    streamed = False

    def __init__(self, path: str, cache_dir: str | Path | None, **kwargs: Any) -> None:
        self.name = path
        self._loaded = open_rows(path, cache_dir, streaming=False, **kwargs)

    def state(self) -> str:
        fingerprints = {name: rows._fingerprint for name, rows in self._loaded.items()}
        return json.dumps([self.name, fingerprints], sort_keys=True)

    def split_name(self, split: str) -> str | None:
        """The dataset's own name of a split."""
        return find_split_name(self._loaded, split)

    def has(self, split: str) -> bool:
        return self.split_name(split) is not None

    def find(self, split: str, progress: Progress) -> AnnotatedSplit | None:
        name = self.split_name(split)
        if name is None:
            return None
        rows, source = self._loaded[name], f"{self.name} ({name})"
        objects = objects_column(rows, source)
        maps = _map_column(rows) if objects == "segments_info" else None
        raw = rows.cast_column("image", Image(decode=False))
        raw = raw if maps is None else raw.cast_column(maps, Image(decode=False))
        records = ((row, partial(_bytes_of, raw, index)) for index, row in enumerate(progress(raw, len(raw))))
        split_ = read_split(records, split, source, rows, objects, maps)
        split_.stuff = _stuff(split_, raw) if maps is not None else []
        return split_

    def images(self, split: str) -> Dataset | None:
        name = self.split_name(split)
        return None if name is None else self._loaded[name].select_columns("image").cast_column("image", Image())

    def describe_missing(self, split: str) -> str:
        return f'{self.name} has no split "{split}", only {sorted(self._loaded)}.'


Bytes = Callable[[str], bytes]  # reads the file of an image in a column of a row


def read_split(
    rows: Iterable[tuple[Mapping[str, Any], Bytes]],
    split: str,
    source: str,
    dataset: DetectionDataset,
    objects: str,
    maps: str | None = None,
) -> AnnotatedSplit:
    """The records of a split.

    Args:
        rows: undecoded, each with a function that reads its images.
        source: for messages.
        dataset: that the rows are from.
        objects, maps: see [`objects_column`].
    """
    found = AnnotatedSplit("datasets", split, Path(source), [], [], [], Path(source))
    for index, (given, read) in enumerate(rows):
        row, problem = given, None
        if objects == "json":
            try:
                row = unpack_row(given)
            except ValueError as error:
                row, problem = dict(given) | {"objects": []}, error
        image = image_record(row, index, partial(read, "image"))
        found.images.append(image)
        try:
            _add_objects(image, row, index, "objects" if objects == "json" else objects, maps, read)
        except ValueError as error:
            problem = error
        if problem is not None:
            record = image.record if objects == "json" else f"row {index}"
            found.orphans.append(("annotation-unreadable", record, str(problem)))
    names, ids, has_names = number_categories(found.images, _class_names(dataset, objects))
    found.names, found.category_ids, found.has_names = names, ids, has_names
    return found


def stream_rows(
    path: str,
    split: str,
    *,
    id2label: dict[int, str] | None,
    bbox_format: str | None,
    crowds_as_objects: bool,
    masks: bool,
    cache_dir: str | Path | None,
    **kwargs: Any,
) -> IterableDataset:
    """Rows in the schema, converted while they are read. An unusable row raises a ValueError that names it.

    Raises:
        FileNotFoundError: there is no such split.
    """
    loaded = open_rows(path, cache_dir, streaming=True, **kwargs)
    name = find_split_name(loaded, split)
    if name is None:
        raise FileNotFoundError(
            f'{path} has no split "{split}", only {sorted(loaded)}; a validation split cannot be split off while '
            "streaming."
        )
    rows, source = loaded[name], f"{path} ({name})"
    objects = objects_column(rows, source)
    maps = _map_column(rows) if objects == "segments_info" else None
    rows = rows if maps is None else rows.cast_column(maps, Image(decode=False))
    names = _class_names(rows, objects)
    if names is None and id2label is None:
        raise ValueError(
            f"{source} does not name its classes, and they cannot be collected while streaming: pass id2label."
        )
    given = names if names is not None else list((id2label or {}).values())
    template = AnnotatedSplit("datasets", split, Path(source), given, list(range(len(given))), [], Path(source))
    classes = match_classes(template, id2label, [])
    features = loaded_features(classes.names, masks)

    def convert(original: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            row = unpack_row(original) if objects == "json" else original
            image = image_record(row, index, lambda: b"")
            column = "objects" if objects == "json" else objects
            _add_objects(image, row, index, column, maps, lambda column: original[column]["bytes"])
        except ValueError as error:
            raise ValueError(f"{source}, row {index}: {error}") from error
        template.images = [image]
        number_categories(template.images, given)
        reinterpret(template, bbox_format, crowds_as_objects)
        if masks:
            read_image_masks(image)
        for box in image.boxes:
            if box.mask_problem is not None:
                raise ValueError(f"{source}, {box.record}: {box.mask_problem[1]}")
            width, height = image.size
            for code, message in box_problems(box, (width, height) if width else None):
                if code not in ("box-partly-outside", "area-wrong"):
                    raise ValueError(f"{source}, {box.record}: {message}")
        image_id = image.source_id if numbered([image.source_id]) == [image.source_id] else index
        ids = numbered([box.id for box in image.boxes])
        decoded = {"image": Image().decode_example(row["image"])}
        return to_row(image, image_id, classes.class_ids, ids, masks) | decoded

    extra = [column for column in (rows.column_names or []) if column not in features]
    mapped = rows.map(convert, with_indices=True, remove_columns=extra, features=features)
    mapped.info.description = describe_source(classes.category_ids, source)
    return mapped


def objects_column(rows: DetectionDataset, source: str) -> str:
    """The column with the objects: `objects`, `segments_info` beside an image of segments, or the `json` of a
    WebDataset.

    Raises:
        ValueError: there is none, or no `image`.
    """
    if rows.features is None or {"image", "objects"} <= set(rows.features):
        return "objects"
    if {"image", "segments_info"} <= set(rows.features) and _map_column(rows) is not None:
        return "segments_info"
    if set(rows.features) == set(WEBDATASET):
        return "json"
    raise ValueError(
        f"{source} has the columns {sorted(rows.features)}; a detection dataset must have image and objects."
    )


def _map_column(rows: DetectionDataset) -> str | None:
    features = rows.features or {}
    return next((name for name in MAP_NAMES if isinstance(features.get(name), Image)), None)


def _add_objects(
    image: ImageRecord, row: Mapping[str, Any], index: int, column: str, maps: str | None, read: Callable[[str], bytes]
) -> None:
    """The objects of a row; `read` reads the bytes of an image in a column, such as that of segments in `maps`."""
    entries = row[column]
    if maps is None:
        image.boxes = read_objects(entries, f"row {index}")
        return
    if isinstance(entries, Mapping):  # a dict of lists
        entries = [dict(zip(entries, values, strict=True)) for values in zip(*entries.values(), strict=True)]
    image.boxes = read_objects(entries, f"row {index}")
    for box in image.boxes:
        box.record = f"row {index} segment {box.id}"
        box.segment = box.id if type(box.id) is int else None
    stored = row[maps]
    has_bytes = stored is not None and stored.get("bytes") is not None
    path = Path((stored or {}).get("path") or f"{maps} of row {index}")
    image.segment_map = SegmentMap(path, partial(read, maps) if has_bytes else None)


def _stuff(split: AnnotatedSplit, rows: Dataset) -> list[str]:
    """Names of the classes whose segments have `isthing` false."""
    found: set[int] = set()
    for image, entries in zip(split.images, rows["segments_info"], strict=True):
        records = [] if entries is None else entries  # a list of dicts, or a dict of lists
        flags = records.get("isthing", []) if isinstance(records, Mapping) else [e.get("isthing") for e in records]
        pairs = zip(image.boxes, flags, strict=False)
        found |= {box.category for box, thing in pairs if box.category is not None and thing in (0, False)}
    return [split.names[category] for category in sorted(found)]


def image_record(row: Mapping[str, Any], index: int, read: Callable[[], bytes]) -> ImageRecord:
    """The record of a row with the header of its image, without objects."""
    image = row.get("image")
    name = row.get("file_name") or (image.get("path") if isinstance(image, dict) else None)
    file_name = Path(name).name if name else f"{index}.png"
    source_id = index if row.get("image_id") is None else row["image_id"]
    record = ImageRecord(Path(file_name), file_name, source_id, f"row {index} ({file_name})")
    if "image" not in row:
        record.header = _recorded_header(row)
    elif image is None:
        record.header = ImageHeader(problem="the image is None")
    elif not isinstance(image, dict):  # decoded, in a stream
        record.header = ImageHeader((image.width, image.height), (image.width, image.height))
    elif image.get("bytes") is not None:
        record.header, record.read = read_image_header(BytesIO(image["bytes"])), read
    else:
        record.path = Path(image["path"])
        record.header = read_image_header(record.path)
    return record


def _recorded_header(row: Mapping[str, Any]) -> ImageHeader:
    """The size in the columns of a row that was read without its image."""
    width, height = row.get("width"), row.get("height")
    if not (type(width) is int and type(height) is int and width > 0 and height > 0):
        return ImageHeader(
            problem=f"its columns width and height have {width} and {height}. Fill them in, or leave both columns out"
        )
    return ImageHeader((width, height), (width, height))


def _bytes_of(rows: Dataset, index: int, column: str) -> bytes:
    content: bytes = rows[index][column]["bytes"]
    return content


def _class_names(rows: DetectionDataset, column: str) -> list[str] | None:
    """The names of the `ClassLabel` of the categories, if they are one."""
    objects = (rows.features or {}).get(column)
    inner = getattr(objects, "feature", objects)
    if isinstance(inner, Mapping):
        for name in FIELD_NAMES["category"]:
            if name in inner:
                feature = getattr(inner[name], "feature", inner[name])
                return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return None
