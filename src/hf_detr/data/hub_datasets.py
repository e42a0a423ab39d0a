"""Datasets of Hugging Face `datasets`, saved or on the Hub, whose rows have an image and `objects`, or an image of
segments with `segments_info`, COCO's panoptic format; and WebDataset archives, in which a `.json` beside each image has
the objects."""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image, IterableDataset

from ..model.image_io import ImageHeader, read_image_header
from .checks import box_problems
from .formats.imagefolder import FIELD_NAMES, METADATA, number_categories, read_objects
from .image_files import is_litter
from .mask_checks import read_image_masks
from .masks import SegmentMap
from .records import AnnotatedSplit, ImageRecord, numbered
from .rows import match_classes, reinterpret, to_row
from .schema import DetectionDataset, describe_source, loaded_features
from .split_names import name_rank
from .split_source import Progress

# names of the column that has the image of segments, beside `segments_info`
MAP_NAMES = ("segmentation_map", "panoptic_map", "panoptic", "segmentation", "mask", "label", "annotation")


# what the `.json` of a WebDataset sample calls its objects
JSON_NAMES = ("objects", "annotations")


def is_hub_format(folder: Path) -> bool:
    """Whether a folder was saved by `save_to_disk`, or holds Parquet files as on the Hub or WebDataset archives."""
    if is_saved(folder) or any(is_webdataset(file) for file in islice(archives_in(folder), 3)):
        return True
    files = [file for place in (folder, folder / "data") for file in place.glob("*.parquet")]
    return any(
        "image" in _columns(file) for file in files if file.name.lower() not in METADATA and not is_litter(file.name)
    )


def archives_in(folder: Path) -> Iterator[Path]:
    """The `.tar` files of a folder and of its folders, such as `train/`."""
    found = sorted(file for pattern in ("*.tar", "*/*.tar") for file in folder.glob(pattern))
    return (file for file in found if not is_litter(file.name))


def is_webdataset(archive: Path) -> bool:
    """Whether the first sample of an archive is an image with a `.json` of the same name."""
    try:
        with tarfile.open(archive) as tar:
            members = [Path(member.name) for member in islice((m for m in tar if m.isfile()), 2)]
    except (OSError, tarfile.TarError):
        return False
    suffixes = {name.suffix.lower() for name in members}
    return len(members) == 2 and len({m.with_suffix("") for m in members}) == 1 and ".json" in suffixes


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    is_dataset = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return is_dataset or (folder / "dataset_dict.json").is_file()


def _columns(file: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(file).names
    except (OSError, ValueError):
        return []
    return names


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
    for index, (row, read) in enumerate(rows):
        image = image_record(row, index, partial(read, "image"))
        found.images.append(image)
        try:
            _add_objects(image, row, index, objects, maps, read)
        except ValueError as error:
            found.orphans.append(("annotation-unreadable", f"row {index}", str(error)))
    names, ids, has_names = number_categories(found.images, _class_names(dataset, objects))
    found.names, found.category_ids, found.has_names = names, ids, has_names
    return found


def open_rows(path: str, cache_dir: str | Path | None, *, streaming: bool, **kwargs: Any) -> Mapping[str, Any]:
    """The splits of a dataset by their names. Streams give the files of images, see [`undecoded`].

    Raises:
        FileNotFoundError: there is no such dataset, or it cannot be reached.
    """
    folder = Path(path)
    if not folder.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise FileNotFoundError(f"{path} does not exist.")
    if is_saved(folder):
        loaded = datasets.load_from_disk(path)
        loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return {n: undecoded(rows.to_iterable_dataset()) for n, rows in loaded.items()} if streaming else loaded
    cache = None if cache_dir is None else str(cache_dir)
    try:
        loaded = datasets.load_dataset(path, streaming=streaming, cache_dir=cache, **kwargs)
        return {name: with_image_column(undecoded(rows) if streaming else rows) for name, rows in loaded.items()}
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{path} is no folder, and no dataset on the Hub that can be reached: {error}"
        ) from error


def undecoded(rows: IterableDataset) -> IterableDataset:
    """A stream that gives the files of its images. This comes first: any other change of a stream, such as a new name
    of a column, decodes images and encodes them once more, which costs time and, for JPEG, quality."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def with_image_column(rows: DetectionDataset) -> DetectionDataset:
    """The dataset, whose only column of images is called `image`, whatever its name was (`jpg`, in a WebDataset)."""
    features = rows.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, Image) and name not in MAP_NAMES]
    return rows.rename_column(images[0], "image") if "image" not in features and len(images) == 1 else rows


def find_split_name(loaded: Mapping[str, Any], split: str) -> str | None:
    """The name that fits a split best."""
    ranked = [(rank, name) for name in loaded if (rank := name_rank(name, split)) is not None]
    return min(ranked)[1] if ranked else None


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

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        image = image_record(row, index, lambda: b"")
        try:
            _add_objects(image, row, index, objects, maps, lambda column: row[column]["bytes"])
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
    if {"image", "json"} <= set(rows.features):
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
    if column == "json":
        entries = _objects_of_json(entries)
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


def _objects_of_json(content: Any) -> Any:
    """The objects in the `.json` of a WebDataset sample: under one of `JSON_NAMES`, or all of it.

    Raises:
        ValueError: it has none; an image without objects has an empty list of them.
    """
    if isinstance(content, Mapping):
        for name in JSON_NAMES:
            if content.get(name) is not None:
                return content[name]
    if isinstance(content, list) or (isinstance(content, Mapping) and content.get("bbox") is not None):
        return content
    raise ValueError(f"its .json has none of the keys {', '.join(JSON_NAMES)}, nor is it a list of objects")


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
    if isinstance(row.get("json"), Mapping):  # of a WebDataset
        row = {name: row["json"].get(name) for name in ("file_name", "image_id")} | {"image": image}
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
