"""Annotated folders as Arrow files in the cache, valid until a file of the folder changes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from ..runtime.files import atomic_write
from .checks import quick_checks
from .findings import drop_few_invalid, log_warnings, raise_on_errors
from .formats import files_elsewhere, find_annotations
from .image_files import walk_files
from .records import AnnotatedSplit, read_headers
from .schema import detection_info, unique_names

CACHE_VERSION = 1  # increased when the cached rows change


class CachedFolder:
    """The splits of one folder.

    Beside the rows, the cache holds a JSON file per split with the class names, category ids and annotation file, so
    that annotations are parsed only once.

    Attributes:
        train_classes: classes of the training split, which come first in all other splits.
    """

    def __init__(
        self, folder: Path, cache: Path, id2label: dict[int, str] | None, bbox_format: str | None, progress: bool
    ) -> None:
        self.folder = folder
        self.cache = cache
        self.id2label = id2label
        self.train_classes: list[str] = []
        self.bbox_format = bbox_format
        self.progress = progress
        self._state = _state_of(folder)

    def has(self, split: str) -> bool:
        """Whether the folder has such a split."""
        entry = self._entry(split).with_suffix(".found")
        if not entry.is_file():
            _write_json(entry, find_annotations(self.folder, split) is not None)
        return bool(json.loads(entry.read_text()))

    def read(self, split: str) -> Dataset | None:
        """The rows of a split, or None if there is no such split.

        Raises:
            ValueError: the data would break training; see `load_detection_dataset`.
        """
        entry = self._entry(split)
        if entry.is_file():
            info = json.loads(entry.read_text())
            return self._rows(entry.stem, split, None, info) if info else None
        source = find_annotations(self.folder, split)
        if source is None:
            _write_json(entry, {})
            return None
        names, category_ids, classes = _classes(source, self.id2label, self.train_classes if split != "train" else [])
        if self.bbox_format == "xyxy":
            _corners_to_sizes(source)
        read_headers(source.images, lambda headers: self._bar(headers, len(source.images)))
        findings = drop_few_invalid(source, quick_checks(source, bbox_format=self.bbox_format))
        raise_on_errors(findings)
        log_warnings(source, findings)
        info = {"names": names, "category_ids": category_ids, "file": str(source.file)}
        dataset = self._rows(entry.stem, split, (source, classes), info)
        _write_json(entry, info)
        return dataset

    def _entry(self, split: str) -> Path:
        classes = self.train_classes if split != "train" else []
        folder = str(self.folder.resolve())
        key = [CACHE_VERSION, folder, split, self.id2label, classes, self.bbox_format, self._state]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return self.cache / "hf_detr" / f"{digest}.json"

    def _bar(self, iterable: Any, total: int) -> Any:
        return tqdm(iterable, desc="Reading image headers", total=total, disable=not self.progress, leave=False)

    def _rows(
        self, key: str, split: str, content: tuple[AnnotatedSplit, dict[int, int]] | None, info: dict[str, Any]
    ) -> Dataset:
        """The Arrow file with this key; written from `content` if there is none."""

        def rows() -> Iterator[dict[str, Any]]:
            if content is None:
                raise FileNotFoundError
            yield from _to_rows(*content)

        columns = detection_info(info["names"], info["category_ids"], info["file"])
        bars_disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            dataset = Dataset.from_generator(
                rows, features=columns.features, cache_dir=str(self.cache), fingerprint=key,
                split=datasets.NamedSplit(split),
            )  # fmt: skip
        except DatasetGenerationError as error:
            if content is not None or not isinstance(error.__cause__, FileNotFoundError):
                raise
            # only the Arrow file was deleted from the cache
            self._entry(split).unlink(missing_ok=True)
            again = self.read(split)
            if again is None:
                raise
            return again
        finally:
            if not bars_disabled:
                datasets.enable_progress_bars()
        dataset.info.description = columns.description
        return dataset


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        json.dump(content, partial)


def _state_of(path: Path) -> str:
    """A digest of the names, sizes and times of all files, which changes when the folder does."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(walk_files(path))
    for file in (*files, *files_elsewhere(path)):
        try:
            stat = file.stat()
        except OSError:  # deleted meanwhile, or a label file that an image does not have
            continue
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _classes(
    source: AnnotatedSplit, id2label: dict[int, str] | None, train_classes: list[str]
) -> tuple[list[str], list[int], dict[int, int]]:
    """Names and category ids by class id, and the class id of each class of the source.

    Raises:
        ValueError: the source has a class that `id2label` has not.
    """
    if id2label is None:
        given = [*train_classes, *(name for name in source.names if name not in train_classes)]
    else:
        given = [id2label[index] for index in sorted(id2label)]
    unknown = [name for name in source.names if name not in given]
    if unknown:
        raise ValueError(f"{source.file} has a category {unknown[0]!r}, which is none of the classes {given[:20]}.")
    if given == source.names:
        return unique_names(given), source.category_ids, {index: index for index in range(len(given))}
    classes = {index: given.index(name) for index, name in enumerate(source.names)}
    if source.category_ids == list(range(len(source.names))):  # assigned by the reader, so they may change
        return unique_names(given), list(range(len(given))), classes
    # classes that the source does not have get unused ids
    ids = {classes[index]: category_id for index, category_id in enumerate(source.category_ids)}
    unused = iter(i for i in range(len(given) + len(source.names) + 1) if i not in source.category_ids)
    return unique_names(given), [ids[i] if i in ids else next(unused) for i in range(len(given))], classes


def _corners_to_sizes(source: AnnotatedSplit) -> None:
    for image in source.images:
        for box in image.boxes:
            if isinstance(box.bbox, (list, tuple)) and len(box.bbox) == 4:
                x, y, right, bottom = box.bbox
                box.bbox = [x, y, right - x, bottom - y]


def _to_rows(source: AnnotatedSplit, classes: dict[int, int]) -> Iterator[dict[str, Any]]:
    for image in source.images:
        boxes = [(box, [float(value) for value in box.bbox]) for box in image.boxes]
        width, height = image.size
        yield {
            "image": str(image.path.resolve()),
            "image_id": image.id,
            "file_name": image.file_name,
            "width": width,
            "height": height,
            "objects": {
                "id": [box.id for box, _ in boxes],
                "bbox": [bbox for _, bbox in boxes],
                "category": [classes[box.category] for box, _ in boxes if box.category is not None],
                "area": [bbox[2] * bbox[3] if box.area is None else box.area for box, bbox in boxes],
                "iscrowd": [box.iscrowd for box, _ in boxes],
            },
        }
