"""Any annotated folder, or a Hugging Face dataset, to one schema."""

from pathlib import Path
from typing import Any, Literal

import datasets

from .folder_cache import CachedFolder
from .formats import describe_layouts
from .hub_datasets import load_rows
from .schema import DetectionDataset, split_off_validation
from .schema import id2label as names_of


def load_detection_dataset(
    path: str | Path,
    split: str = "train",
    *,
    id2label: dict[int, str] | None = None,
    bbox_format: Literal["xywh", "xyxy"] | None = None,
    validation_fraction: float = 0.15,
    seed: int = 0,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> DetectionDataset:
    """Images and boxes of one split, with the columns of `hf_detr.data.schema`.

    The format of a folder is detected (COCO, YOLO, Pascal VOC or imagefolder; `hf_detr.data.formats` has the layouts).
    Anything else is a dataset that `datasets` can load, saved or on the Hub, with an `objects` column. Folders are
    checked; the result is an Arrow file in the cache, which is used until a file of the folder changes.

    Args:
        path: folder, annotation file or Hub id.
        split: "train", "val" or "test". Without a validation split, a fraction of the training split is split off by
            `seed`, with a warning; "train" is then the rest.
        id2label: class names, by class id, of a model. Classes are matched to them by name, and unknown classes are an
            error. Without them, all splits have the classes of the training split first, then any others.
        bbox_format: "xyxy" if boxes are stored as corners, "xywh" if they certainly are not. None expects [x_min,
            y_min, width, height], and raises an error if the boxes appear to be corners.
        validation_fraction: fraction of the training images to split off; 0 keeps "train" complete.
        streaming: return an `IterableDataset`. From the Hub only what is used is then downloaded, and nothing is
            checked in advance.
        cache_dir: where the Arrow file is written; None is the cache of `datasets`.
        progress: show progress bars.
        kwargs: for `datasets.load_dataset`, e.g. `revision`, `token`, `name`.

    Returns:
        a `datasets.Dataset`; images are opened when they are read and not kept in memory.

    Raises:
        FileNotFoundError: `path` does not exist, or has no such split.
        ValueError: the data would break training. The message names the first records and the fix. Invalid boxes (no
            area, outside the image) are dropped with a warning instead if they are at most one in a thousand.
    """
    folder = Path(path)
    if not folder.exists() or _is_hub_format(folder):
        return load_rows(
            str(path), split, id2label=id2label, bbox_format=bbox_format, validation_fraction=validation_fraction,
            seed=seed, streaming=streaming, cache_dir=cache_dir, **kwargs,
        )  # fmt: skip
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    cached = CachedFolder(folder, cache, id2label, bbox_format, progress)
    if id2label is None and split != "train":
        train = cached.read("train")
        cached.train_classes = [] if train is None else list(names_of(train).values())
    dataset = cached.read(split)
    if validation_fraction and split == "val" and dataset is None:
        complete = cached.read("train")
        dataset = None if complete is None else split_off_validation(complete, validation_fraction, seed)["test"]
    elif validation_fraction and split == "train" and dataset is not None and not cached.has("val"):
        dataset = split_off_validation(dataset, validation_fraction, seed)["train"]
    if dataset is None:
        raise FileNotFoundError(f'No split "{split}" in {folder}. Looked for {describe_layouts(split)}.')
    return dataset.to_iterable_dataset() if streaming else dataset


def _is_hub_format(folder: Path) -> bool:
    """Whether a folder was saved by `save_to_disk` or holds Parquet files as on the Hub."""
    markers = ("dataset_dict.json", "state.json")
    return any((folder / marker).is_file() for marker in markers) or any(
        any(place.glob("*.parquet")) for place in (folder, folder / "data")
    )
