"""Any annotated folder, or a Hugging Face dataset, to one schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset
from transformers.utils import logging

from .dataset_folder import DatasetFolder
from .hub_access import is_hub_format
from .hub_datasets import RowsSource, stream_rows
from .schema import DetectionDataset
from .schema import id2label as names_of
from .shard_source import ShardSource
from .split_cache import SplitCache
from .split_source import FolderSource, SplitSource
from .streaming import StreamedDataset
from .validation_cut import cut_validation, hold_out_fold

logger = logging.get_logger(__name__)


def load_detection_dataset(
    path: str | Path,
    split: str = "train",
    *,
    files: Mapping[str, str | Path] | None = None,
    images: str | Path | None = None,
    id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    bbox_format: Literal["xywh", "xyxy"] | None = None,
    crowds_as_objects: bool = False,
    masks: bool = False,
    validation_fraction: float = 0.15,
    fold: tuple[int, int] | None = None,
    seed: int = 0,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> DetectionDataset:
    """Images and boxes of one split, with the columns of `hf_detr.data.schema`.

    The format of a folder is detected (COCO, YOLO, Pascal VOC, imagefolder, labelme, VIA or WebDataset; docs/layouts.md
    has the layouts). Anything else is a dataset that `datasets` can load, saved or on the Hub, with an `objects`
    column. The records are checked; the result is an Arrow file in the cache, which is used until a file of the source
    changes.

    Args:
        path: folder, annotation file or Hub id.
        split: "train", "val" or "test". Without a validation split, a fraction of the training split is split off by
            `seed`, with a warning; "train" is then the rest. Images that look the same stay on one side.
        files: annotation files (or folders of them) by split, in place of a search of `path`.
        images: the folder of the images, if it is not where they are usually looked for.
        id2label: class names, by class id, of a model. Classes are matched to them by name, categories that are only
            numbers by class id, and unknown classes are an error. Without them, all splits have the classes of the
            training split first, then any others.
        bbox_format: "xyxy" if boxes are stored as corners, "xywh" if they certainly are not. None expects [x_min,
            y_min, width, height], and raises an error if the boxes appear to be corners.
        crowds_as_objects: learn objects that are marked as crowds, as some exports of masks mark all of them.
        masks: also read the masks of the objects: COCO's polygons, run-length encodings and panoptic PNGs, polygons of
            labelme, VIA and YOLO, and in Hugging Face datasets a column `segmentation` of the objects, or an image of
            segments beside `segments_info`. Where a split has both, panoptic annotations are read, since they have
            stuff, too; `files` chooses. Objects without a mask are invalid, like boxes without an area.
        validation_fraction: fraction of the training images to split off; 0 keeps "train" complete.
        fold: (number from 1, number of folds), for cross-validation: "val" is this fold of the training images, "train"
            the other ones. A validation split of the data is not used. Images that look the same are in one fold.
        streaming: return an `IterableDataset`. From the Hub only what is used is then downloaded, and nothing is
            checked in advance.
        cache_dir: where the Arrow file is written; None is the cache of `datasets`.
        progress: show progress bars.
        kwargs: for `datasets.load_dataset`, e.g. `revision`, `token`, `name`.

    Returns:
        a `datasets.Dataset`; images are opened when they are read and not kept in memory.

    Raises:
        FileNotFoundError: `path` does not exist, or has no such split.
        ValueError: the data would break training. The message names the first records and the fix. Invalid objects (no
            area, outside the image, with `masks` also without a mask) are dropped with a warning instead if they are
            few: one in a thousand in a folder, one in fifty, or one, in a Hugging Face dataset.
        TypeError: `kwargs` has arguments that an annotated folder does not take.
    """
    names = _class_names(id2label)
    if bbox_format not in (None, "xywh", "xyxy"):
        raise ValueError(f'bbox_format must be "xywh", "xyxy" or None, got {bbox_format!r}.')
    if fold is not None and split not in ("train", "val"):
        raise ValueError(f'Folds are of the training images: split is "train" or "val", not "{split}".')
    from_hub = files is None and is_rows(path)
    if fold is not None and streaming:
        raise ValueError("A stream is not divided into folds: load the data without streaming.")
    if from_hub and streaming:
        return stream_rows(
            str(path), split, id2label=names, bbox_format=bbox_format, crowds_as_objects=crowds_as_objects,
            masks=masks, cache_dir=cache_dir, **kwargs,
        )  # fmt: skip
    cache = SplitCache(
        find_source(path, files=files, images=images, masks=masks, cache_dir=cache_dir, **kwargs),
        Path(cache_dir or datasets.config.HF_DATASETS_CACHE),
        id2label=names,
        bbox_format=bbox_format,
        crowds_as_objects=crowds_as_objects,
        masks=masks,
        progress=progress,
    )
    if fold is not None:
        complete = cache.read("train")
        if complete is None:
            raise FileNotFoundError(cache.source.describe_missing("train"))
        if cache.has("val"):
            logger.warning_once(f"{cache.source.name} has a validation split, which is not used with folds.")
        outside, inside = hold_out_fold(complete, cache.copies(complete), fold, seed)
        return outside if split == "train" else inside
    if names is None and split != "train":
        train = cache.read("train")
        cache.train_classes = [] if train is None else list(names_of(train).values())
    dataset = cache.read(split)
    is_cut = split in ("train", "val") and bool(validation_fraction)
    if is_cut and (dataset is None if split == "val" else not cache.has("val")):
        complete = cache.read("train")
        if complete is not None:
            train, validation = cut_validation(complete, cache.copies(complete), validation_fraction, seed)
            dataset = train if split == "train" else validation
    if dataset is None:
        raise FileNotFoundError(cache.source.describe_missing(split))
    return dataset.to_iterable_dataset() if streaming else dataset


def load_streamed_dataset(
    path: str | Path,
    split: str = "train",
    *,
    keep_images: bool = False,
    needs: Sequence[str] = (),
    id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    bbox_format: Literal["xywh", "xyxy"] | None = None,
    crowds_as_objects: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> StreamedDataset | Dataset:
    """One split of a dataset in shards that need not fit on this disk: Parquet files or WebDataset archives (images,
    each with a `.json` of `objects`), on the Hub or in a folder.

    All annotations are read once, checked like any others, and kept in the cache until the shards change; images are
    read while training. Of Parquet files with the columns `width` and `height` only the annotations are read before;
    other shards are read as a whole.

    Args:
        keep_images: also copy the images of this split, and only of this one, to the cache, for validation.
        needs: other splits that have to be there, too, before any is read.
        path, split, options: see [`load_detection_dataset`].

    Returns:
        a `StreamedDataset` for [`build_loader`], or with `keep_images` a `datasets.Dataset`.

    Raises:
        FileNotFoundError: there is no such dataset, or no such split.
        ValueError: it is not in shards, or the data would break training.
    """
    source = ShardSource(str(path), cache_dir, keeps_images=keep_images, **kwargs)
    for name in (split, *needs):
        if not source.has(name):
            raise FileNotFoundError(source.describe_missing(name))
    cache = SplitCache(
        source,
        Path(cache_dir or datasets.config.HF_DATASETS_CACHE),
        id2label=_class_names(id2label),
        bbox_format=bbox_format,
        crowds_as_objects=crowds_as_objects,
        progress=progress,
    )
    rows = cache.read(split)
    if rows is None:
        raise FileNotFoundError(source.describe_missing(split))
    return rows if keep_images else StreamedDataset(rows, source.reader(split))


def is_rows(path: str | Path) -> bool:
    """Whether `path` is a dataset of `datasets`, saved or on the Hub, and no annotated folder."""
    return not Path(path).exists() or is_hub_format(Path(path))


def find_source(
    path: str | Path,
    *,
    files: Mapping[str, str | Path] | None = None,
    images: str | Path | None = None,
    masks: bool = False,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> SplitSource:
    """The source at a path; the arguments are those of [`load_detection_dataset`], or with `streaming` of
    [`load_streamed_dataset`]."""
    if streaming:
        if files is not None or images is not None or masks:
            raise ValueError("Shards have their images and no masks: omit files, images and masks, or streaming.")
        return ShardSource(str(path), cache_dir, keeps_images=False, **kwargs)
    if files is None and is_rows(path):
        if images is not None:
            raise ValueError(f"{path} is a Hugging Face dataset, which holds its images: images={images} has no use.")
        return RowsSource(str(path), cache_dir, **kwargs)
    if kwargs:
        raise TypeError(f"{path} is an annotated folder, for which {sorted(kwargs)[0]} has no meaning.")
    return FolderSource(DatasetFolder(path, files, images), masks)


def _class_names(id2label: Mapping[Any, str] | None) -> dict[int, str] | None:
    """Names by class id; text keys, as JSON has them, are numbers."""
    if id2label is None:
        return None
    try:
        return {int(class_id): name for class_id, name in id2label.items()}
    except (TypeError, ValueError):
        raise ValueError(f"The keys of id2label must be class ids, got {list(id2label)[:5]}.") from None
