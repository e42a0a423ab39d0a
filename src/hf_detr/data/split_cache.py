"""Annotated splits as Arrow files in the cache, valid until their source changes."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from ..runtime.files import atomic_write
from .checks import quick_checks
from .findings import drop_few_invalid, log_warnings, raise_on_errors
from .mask_checks import mask_checks, read_masks
from .records import AnnotatedSplit, numbered
from .rows import Classes, match_classes, reinterpret, to_row
from .schema import describe_source, loaded_features
from .split_source import SplitSource
from .validation_cut import groups_of_copies

CACHE_VERSION = 4  # increased when the cached rows change


class SplitCache:
    """The splits of one source.

    Beside the rows, the cache holds a JSON file per split with the class names, category ids and annotation file, so
    that annotations are parsed only once.

    Args:
        crowds_as_objects: learn objects that are marked as crowds, as mask exports mark all of them.
        masks: the rows have masks.

    Attributes:
        train_classes: classes of the training split, which come first in all other splits.
    """

    def __init__(
        self,
        source: SplitSource,
        cache: Path,
        *,
        id2label: dict[int, str] | None = None,
        bbox_format: str | None = None,
        crowds_as_objects: bool = False,
        masks: bool = False,
        progress: bool = True,
    ) -> None:
        self.source = source
        self.cache = cache
        self.id2label = id2label
        self.train_classes: list[str] = []
        self.bbox_format = bbox_format
        self.crowds_as_objects = crowds_as_objects
        self.masks = masks
        self.progress = progress
        self._state = source.state()

    def has(self, split: str) -> bool:
        """Whether the source has such a split."""
        entry = self._entry("has", split)
        if not entry.is_file():
            _write_json(entry, self.source.has(split))
        return bool(json.loads(entry.read_text()))

    def read(self, split: str) -> Dataset | None:
        """The rows of a split, or None if there is no such split.

        Raises:
            ValueError: the data would break training; see `load_detection_dataset`.
        """
        classes_of_train = self.train_classes if split != "train" else []
        options = [self.id2label, classes_of_train, self.bbox_format, self.crowds_as_objects, self.masks]
        entry = self._entry("rows", split, *options)
        if entry.is_file():
            info = json.loads(entry.read_text())
            return self._rows(entry, split, None, info) if info else None
        records = self.source.find(split, lambda headers, total: self._bar(headers, total, "Reading image headers"))
        if records is None:
            _write_json(entry, {})
            return None
        reinterpret(records, self.bbox_format, self.crowds_as_objects)
        if self.masks:
            read_masks(records.images, lambda images: self._bar(images, len(records.images), "Reading masks"))
        findings = quick_checks(records, bbox_format=self.bbox_format)
        findings += mask_checks(records) if self.masks else []
        findings = drop_few_invalid(records, findings, self.source.max_invalid)
        raise_on_errors(findings)
        classes = match_classes(records, self.id2label, classes_of_train)
        log_warnings(records, findings)
        info = {"names": classes.names, "category_ids": classes.category_ids, "file": str(records.file)}
        info |= {"stuff": classes.stuff_of(records)}
        dataset = self._rows(entry, split, (records, classes), info)
        _write_json(entry, info)
        return dataset

    def copies(self, dataset: Dataset) -> list[list[int]]:
        """See [`~hf_detr.data.validation_cut.groups_of_copies`], which reads all images."""
        entry = self._entry("copies", "train", len(dataset))
        if not entry.is_file():
            _write_json(
                entry, groups_of_copies(dataset, lambda images: self._bar(images, len(dataset), "Comparing images"))
            )
        found: list[list[int]] = json.loads(entry.read_text())
        return found

    def _entry(self, kind: str, split: str, *options: Any) -> Path:
        key = [CACHE_VERSION, kind, self._state, split, *options]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return self.cache / "hf_detr" / f"{digest}.json"

    def _bar(self, iterable: Iterable[Any], total: int | None, text: str) -> Any:
        return tqdm(iterable, desc=text, total=total, disable=not self.progress, leave=False)

    def _rows(
        self, entry: Path, split: str, content: tuple[AnnotatedSplit, Classes] | None, info: dict[str, Any]
    ) -> Dataset:
        """The Arrow file of this entry; written from `content` if there is none."""

        def rows() -> Iterator[dict[str, Any]]:
            if content is None:
                raise FileNotFoundError
            for row in _to_rows(*content, self.masks):
                yield {name: value for name, value in row.items() if name in features}

        all_features = loaded_features(info["names"], self.masks, self.source.streamed)
        images = self.source.images(split)
        features = {name: f for name, f in all_features.items() if images is None or name != "image"}
        bars_disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            dataset = Dataset.from_generator(
                rows, features=datasets.Features(features), cache_dir=str(self.cache), fingerprint=entry.stem,
                split=datasets.NamedSplit(split),
            )  # fmt: skip
        except DatasetGenerationError as error:
            if content is not None or not isinstance(error.__cause__, FileNotFoundError):
                raise
            # only the Arrow file was deleted from the cache
            entry.unlink(missing_ok=True)
            again = self.read(split)
            if again is None:
                raise
            return again
        finally:
            if not bars_disabled:
                datasets.enable_progress_bars()
        if images is not None:
            dataset = concatenate_datasets([images, dataset], axis=1).select_columns(list(all_features))
        dataset.info.description = describe_source(info["category_ids"], info["file"], info["stuff"])
        return dataset


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        json.dump(content, partial)


def _to_rows(source: AnnotatedSplit, classes: Classes, masks: bool) -> Iterator[dict[str, Any]]:
    image_ids = numbered([image.source_id for image in source.images])
    box_ids = iter(numbered([box.id for image in source.images for box in image.boxes]))
    for image, image_id in zip(source.images, image_ids, strict=True):
        yield to_row(image, image_id, classes.class_ids, [next(box_ids) for _ in image.boxes], masks)
