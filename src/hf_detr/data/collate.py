"""Rows of a dataset to batches for the model."""

from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..model.image_processing_hf_detr import DetrImageProcessor
from .masks import decode_masks, resize_masks
from .schema import learned_objects

MAX_STRETCH = 2.0  # of an image that gets the size of its batch


class Label(dict[str, Tensor]):
    """The labels of one image. Workers of a loader send all but the masks by value: by default PyTorch opens a shared
    memory file for each of the eight small tensors, which takes longer than the rest of the work on the image."""


def _by_value(label: Label) -> tuple[Any, tuple[dict[str, np.ndarray | Tensor]]]:
    return _to_label, ({name: values if name == "masks" else values.numpy() for name, values in label.items()},)


def _to_label(values: dict[str, np.ndarray | Tensor]) -> Label:
    return Label({name: torch.as_tensor(value) for name, value in values.items()})


ForkingPickler.register(Label, _by_value)  # between processes only; `copy` and `pickle` are not affected


class DetectionCollator:
    """`collate_fn` of a DataLoader: rows of the schema to `pixel_values`, `pixel_mask` and `labels`.

    Rows that an augmentation has already resized to the training resolution (`resized`, see `Augmentation`) keep their
    size, or get one size for the whole batch (`one_size_per_batch`, see [`to_one_size`]); all others are resized by the
    processor. Crowd objects are excluded from the labels. The mask is bool, an eighth of the data to transfer from
    workers.

    Rows with masks, of a data set loaded with them, give labels with `masks` (N, H, W), bool, of the resized image
    without its padding.

    Args:
        processor: resizes, normalises and pads the images, and converts the annotations.

    Raises:
        ValueError: some rows of a batch are already resized and others are not, or some have masks and others do not.
    """

    def __init__(self, processor: DetrImageProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        resized = {tuple(bool(row.get(name)) for name in ("resized", "one_size_per_batch")) for row in rows}
        if len(resized) > 1:
            raise ValueError(
                "Some rows of this batch are resized and others are not, or differently. Use the same augmentation "
                "for all."
            )
        ((is_resized, one_size),) = resized
        with_masks = {"mask" in row["objects"] for row in rows}
        if len(with_masks) > 1:
            raise ValueError("Some rows of this batch have masks and others do not. Load all data with masks=True.")
        options = {"do_resize": False} if is_resized else {}
        resized_rows = to_one_size(rows) if one_size else rows
        images = [row["image"] for row in resized_rows]
        annotations = [to_coco(row) for row in resized_rows]
        batch = dict(self.processor(images, annotations=annotations, return_tensors="pt", **options))
        if "pixel_mask" in batch:
            batch["pixel_mask"] = batch["pixel_mask"].bool()
        batch["labels"] = [Label(label) for label in batch["labels"]]
        if True in with_masks:
            for row, label in zip(rows, batch["labels"], strict=True):
                height, width = label["size"].tolist()
                masks = decode_masks(learned_objects(row["objects"])["mask"], (row["height"], row["width"]))
                label["masks"] = resize_masks(masks, (height, width))
        return batch


def to_one_size(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All rows in the size of the one with the median aspect ratio; boxes and areas are scaled, masks are not. The
    backbone then runs the batch at once; of images of several sizes, it runs each size on its own. An image whose
    aspect ratio would change by more than `MAX_STRETCH`, as that of a panorama, keeps its size. An object may become
    smaller than the `min_side` of its augmentation, but stays."""

    def ratio(row: Mapping[str, Any]) -> float:
        return float(row["width"] / row["height"])

    def fits(row: Mapping[str, Any]) -> bool:
        return 1 / MAX_STRETCH <= ratio(row) / ratio(middle) <= MAX_STRETCH

    middle = sorted(rows, key=ratio)[len(rows) // 2]
    return [_resized(row, middle["height"], middle["width"]) if fits(row) else row for row in rows]


def _resized(row: Mapping[str, Any], height: int, width: int) -> Mapping[str, Any]:
    if (row["height"], row["width"]) == (height, width):
        return row
    down, right = height / row["height"], width / row["width"]
    objects = dict(row["objects"])
    objects["bbox"] = [[x * right, y * down, w * right, h * down] for x, y, w, h in objects["bbox"]]
    if "area" in objects:
        objects["area"] = [area * down * right for area in objects["area"]]
    image = F.resize(row["image"], [height, width], antialias=True)
    return {**row, "image": image, "height": height, "width": width, "objects": objects}


def to_coco(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's objects in the format of the processor: `{"image_id": int, "annotations": [COCO records]}`."""
    objects = row["objects"]
    columns = {"category_id" if name == "category" else name: values for name, values in objects.items()}
    columns.pop("mask", None)  # decoded by the collator
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {"image_id": row["image_id"], "annotations": records}
