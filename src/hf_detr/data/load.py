"""Any annotated folder, or a Hugging Face data set, to the one schema."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from .checks import leave_out_few, mention, quick_checks, refuse
from .find import find_source
from .formats.yolo import yolo_places
from .hub_datasets import load_rows
from .schema import DetectionDataset, detection_info, set_apart, unique_names
from .schema import id2label as names_of
from .source import Source, read_headers, walk_files

FORMAT_VERSION = 1  # of the cached rows; raised when they change


def load_detection_dataset(
    path: str | Path,
    split: str = "train",
    *,
    id2label: dict[int, str] | None = None,
    bbox_format: Literal["xywh", "xyxy"] | None = None,
    validation_share: float = 0.15,
    seed: int = 0,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> DetectionDataset:
    """Images and boxes of one split, with the columns of `hf_detr.data.schema`.

    A folder's format is found by looking (see [`~hf_detr.data.find_source`]): COCO, YOLO, Pascal VOC, imagefolder. What
    is none of these is a data set that `datasets` knows, saved or on the Hub, with an `objects` column. Folders are
    checked on the way; the result is an Arrow file in the cache, which is used until a file of the folder changes.

    Args:
        path: folder, annotation file or Hub id.
        split: "train", "val" or "test". Without a validation split, a share of the training split is set apart by
            `seed`; "train" is then the rest. This is said in the log.
        id2label: names of the classes, if a model gives them; classes are matched to them by name, and others are an
            error. Without them, all splits have the classes of the training split, and further ones after these.
        bbox_format: "xyxy" if boxes are stored as corners, "xywh" if they are certainly not. None takes them as they
            should be, and refuses data that look like corners.
        validation_share: how much is set apart; 0 leaves "train" whole.
        streaming: an `IterableDataset`, which reads as it goes. From the Hub only what is used is fetched, and nothing
            is checked beforehand.
        cache_dir: where the Arrow file goes; None is the cache of `datasets`.
        progress: show bars.
        kwargs: for `datasets.load_dataset`, e.g. `revision`, `token`, `name`.

    Returns:
        `datasets.Dataset`; images are opened when they are read, and nothing stays in memory.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no such split.
        ValueError: the data would break training. The message names the first records, and the fix. Less than one box
            in a thousand without an area, or outside its image, is left out, and said in the log.
    """
    folder = Path(path)
    if not folder.exists() or _is_known_to_datasets(folder):
        return load_rows(
            str(path), split, id2label=id2label, bbox_format=bbox_format, validation_share=validation_share, seed=seed,
            streaming=streaming, cache_dir=cache_dir, **kwargs,
        )  # fmt: skip
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    reader = _FolderReader(folder, cache, id2label, bbox_format, progress)
    if id2label is None and split != "train":
        train = reader.read("train")
        reader.known = [] if train is None else list(names_of(train).values())
    dataset = reader.read(split)
    if validation_share and split == "val" and dataset is None:
        whole = reader.read("train")
        dataset = None if whole is None else set_apart(whole, validation_share, seed)["test"]
    elif validation_share and split == "train" and dataset is not None and not reader.has("val"):
        dataset = set_apart(dataset, validation_share, seed)["train"]
    if dataset is None:
        raise FileNotFoundError(
            f'No split "{split}" in {folder}. Looked for COCO (annotations/instances_{split}*.json, '
            f"{split}/_annotations.coco.json, {split}.json), YOLO (data.yaml), Pascal VOC (Annotations/*.xml) and an "
            f"imagefolder ({split}/metadata.jsonl)."
        )
    return dataset.to_iterable_dataset() if streaming else dataset


class _FolderReader:
    """Splits of one folder; from the cache, without parsing annotations again, while no file of it has changed."""

    def __init__(
        self, folder: Path, cache: Path, id2label: dict[int, str] | None, bbox_format: str | None, progress: bool
    ) -> None:
        self.folder = folder
        self.cache = cache
        self.id2label = id2label
        self.known: list[str] = []  # classes of the training split
        self.bbox_format = bbox_format
        self.progress = progress
        self._state = _state_of(folder)

    def _note(self, split: str) -> Path:
        """A file beside the cached rows that says what they are, so that the annotations need not be parsed again."""
        known = self.known if split != "train" else []
        key = [FORMAT_VERSION, str(self.folder.resolve()), split, self.id2label, known, self.bbox_format, self._state]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return self.cache / "hf_detr" / f"{digest}.json"

    def has(self, split: str) -> bool:
        note = self._note(split).with_suffix(".found")
        if not note.is_file():
            self._write(note, find_source(self.folder, split) is not None)
        return bool(json.loads(note.read_text()))

    @staticmethod
    def _write(note: Path, content: Any) -> None:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        partial.write_text(json.dumps(content))
        partial.replace(note)

    def read(self, split: str) -> Dataset | None:
        note = self._note(split)
        if note.is_file():
            about = json.loads(note.read_text())
            if not about:
                return None
            return self._arrow(note.stem, split, None, about)
        source = find_source(self.folder, split)
        about = {}
        dataset = None
        if source is not None:
            names, ids, classes = _classes(source, self.id2label, self.known if split != "train" else [])
            about = {"names": names, "category_ids": ids, "file": str(source.file)}
            if self.bbox_format == "xyxy":
                _corners_to_sizes(source)
            read_headers(source.photos, lambda it: self._bar(it, "Reading image headers", len(source.photos)))
            findings = leave_out_few(source, quick_checks(source, bbox_format=self.bbox_format))
            refuse(findings)
            mention(source, findings)
            dataset = self._arrow(note.stem, split, (source, classes), about)
        self._write(note, about)
        return dataset

    def _bar(self, iterable: Any, text: str, total: int) -> Any:
        return tqdm(iterable, desc=text, total=total, disable=not self.progress, leave=False)

    def _arrow(
        self, key: str, split: str, content: tuple[Source, dict[int, int]] | None, about: dict[str, Any]
    ) -> Dataset:
        def rows() -> Iterator[dict[str, Any]]:
            found = content
            if found is None:  # the note is there and the rows are not: somebody emptied the cache
                self._note(split).unlink(missing_ok=True)
                raise FileNotFoundError("cache")
            yield from _rows(*found)

        info = detection_info(about["names"], about["category_ids"], about["file"])
        quiet = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            dataset = Dataset.from_generator(
                rows, features=info.features, cache_dir=str(self.cache), fingerprint=key,
                split=datasets.NamedSplit(split),
            )  # fmt: skip
        except DatasetGenerationError as error:
            if content is None and isinstance(error.__cause__, FileNotFoundError):
                dataset = self.read(split)
                if dataset is not None:
                    return dataset
            raise
        finally:
            if not quiet:
                datasets.enable_progress_bars()
        dataset.info.description = info.description
        return dataset


def _is_known_to_datasets(folder: Path) -> bool:
    """Saved by `save_to_disk`, or a folder of Parquet files as on the Hub."""
    marks = ("dataset_dict.json", "state.json")
    return any((folder / mark).is_file() for mark in marks) or any(
        any(place.glob("*.parquet")) for place in (folder, folder / "data")
    )


def _state_of(path: Path) -> str:
    """A digest of the names, sizes and times of all files: what changes when a folder does."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(walk_files(path))
    for file in (*files, *yolo_places(path)):
        try:
            stat = file.stat()
        except OSError:  # gone meanwhile, or a label file that an image does not have
            continue
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _classes(
    source: Source, id2label: dict[int, str] | None, known: list[str]
) -> tuple[list[str], list[int], dict[int, int]]:
    """Names and source ids by class id, and from the source's class ids to these.

    Raises:
        ValueError: the source has a class that `id2label` does not.
    """
    if id2label is None:
        given = [*known, *(name for name in source.names if name not in known)]
    else:
        given = [id2label[index] for index in sorted(id2label)]
    unknown = [name for name in source.names if name not in given]
    if unknown:
        raise ValueError(f"{source.file} has a category {unknown[0]!r}, which is none of the classes {given[:20]}.")
    if given == source.names:
        return unique_names(given), source.category_ids, {index: index for index in range(len(given))}
    classes = {index: given.index(name) for index, name in enumerate(source.names)}
    if source.category_ids == list(range(len(source.names))):  # numbers that the reader gave
        return unique_names(given), list(range(len(given))), classes
    # a class that the source does not have gets an id that it does not use
    ids = {classes[index]: category_id for index, category_id in enumerate(source.category_ids)}
    free = iter(i for i in range(len(given) + len(source.names) + 1) if i not in source.category_ids)
    return unique_names(given), [ids[i] if i in ids else next(free) for i in range(len(given))], classes


def _corners_to_sizes(source: Source) -> None:
    for photo in source.photos:
        for box in photo.boxes:
            if isinstance(box.bbox, (list, tuple)) and len(box.bbox) == 4:
                x, y, right, bottom = box.bbox
                box.bbox = [x, y, right - x, bottom - y]


def _rows(source: Source, classes: dict[int, int]) -> Iterator[dict[str, Any]]:
    for photo in source.photos:
        boxes = [(box, [float(value) for value in box.bbox]) for box in photo.boxes]
        width, height = photo.header.size if photo.header else (0, 0)
        yield {
            "image": str(photo.path.resolve()),
            "image_id": photo.id,
            "file_name": photo.file_name,
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
