"""Ground truth: COCO annotations to labels, and the one check of boxes and labels.

`annotations` are raw COCO records, boxes [x_min, y_min, width, height] in pixels; `labels` are tensors, boxes
(center x, center y, width, height) in [0, 1] of the image without its padding.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .mask_encoding import decode_mask

logger = logging.get_logger(__name__)

BOX_TOLERANCE = 1e-5  # rounding of float32 divisions by the image size
NOT_FINITE = "the box is not finite"
NO_AREA = "the box has no area. Remove it from the data"
# Values of a label that become tensors, and what stands for one that is missing: only `masks` may be.
_TENSORS: dict[str, Tensor | None] = {"class_labels": None, "boxes": None, "masks": torch.empty(0)}


def canonical_id(value: Any) -> Any:
    """One form per id: `"1"`, `1`, `1.0`, and arrays, tensors and lists of one of them, become the integer 1; other
    text stays text, and what cannot be an id becomes its text."""
    if type(value) is int:  # by far the most frequent
        return value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (np.ndarray, np.generic, Tensor)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and str(int(value)) == value:
        return int(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_flag(value: Any) -> bool:
    """A flag such as `iscrowd` as annotation tools write it: true, 1, 1.0, "1", "true" or "yes"; false, 0, 0.0, "0",
    "false", "no", "" or missing.

    Raises:
        ValueError: it is none of them.
    """
    if value is None or (type(value) is int and value in (0, 1)):  # by far the most frequent
        return bool(value)
    value = value.item() if hasattr(value, "item") else value
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text in ("", "0", "0.0", "false", "no"):
        return False
    raise ValueError(f"must be 0 or 1, got {value!r}")


def is_ignored(record: Mapping[str, Any]) -> bool:
    """Whether a COCO record marks a group (`iscrowd`) or a region to ignore (`ignore`) instead of an object.

    Raises:
        ValueError: one of the flags is neither true nor false; the message names it.
    """
    for name in ("iscrowd", "ignore"):
        try:
            if read_flag(record.get(name)):
                return True
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return False


def box_problem(bbox: Any, size: tuple[int, int] | None) -> tuple[str, str] | None:
    """Why a COCO box cannot be learned from, as a code and a sentence without its end; None if it can.

    Args:
        bbox: [x_min, y_min, width, height] in pixels.
        size: (height, width) of the image as shown, in pixels; None if it is not known.

    Returns:
        one of the codes "box-not-numbers", "box-empty" and "box-outside", and the reason.
    """
    if not isinstance(bbox, (list, tuple, np.ndarray, Tensor)) or len(bbox) != 4:
        return "box-not-numbers", "bbox must be [x_min, y_min, width, height] in pixels"
    try:
        x, y, width, height = (float(value) for value in bbox)
    except (TypeError, ValueError):
        return "box-not-numbers", "bbox must be four numbers, [x_min, y_min, width, height] in pixels"
    if not all(math.isfinite(value) for value in (x, y, width, height)):
        return "box-not-numbers", NOT_FINITE
    if width <= 0 or height <= 0:
        return "box-empty", NO_AREA
    if size is not None and (x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0):
        return "box-outside", (
            f"the box is outside the image of {size[1]} x {size[0]}. It must be [x_min, y_min, width, height] in "
            "pixels of the image as shown, with its EXIF orientation applied"
        )
    return None


def coco_to_labels(
    annotation: dict[str, Any], size: tuple[int, int], index: int = 0, *, masks: bool = False
) -> dict[str, Tensor]:
    """COCO annotations of one image to labels.

    Args:
        annotation: `image_id` and `annotations`; see `DetrImageProcessor.preprocess`.
        size: (height, width) of the image in pixels, EXIF orientation applied.
        index: position in the batch, for error messages.
        masks: also decode the mask of each object.

    Returns:
        `class_labels` (N,), `boxes` (N, 4) cxcywh in [0, 1], `area` (N,) in pixels, `iscrowd` (N,), `image_id` (1,)
        and `orig_size` (2,), height and width; with `masks` also `masks` (N, height, width) bool.

    Raises:
        ValueError: names the image and the record, and the fix.
    """
    where = f"Image {index}"
    if isinstance(annotation, Mapping) and "objects" in annotation and "annotations" not in annotation:
        annotation = {**annotation, "annotations": annotation["objects"]}  # a row of a dataset
    if not isinstance(annotation, Mapping) or "annotations" not in annotation or "image_id" not in annotation:
        raise ValueError(
            f'{where}: its annotation must be a dict {{"image_id": int, "annotations": [COCO objects]}}, got '
            f"{sorted(annotation) if isinstance(annotation, Mapping) else type(annotation).__name__}."
        )
    image_id = canonical_id(annotation["image_id"])
    if not isinstance(image_id, int):
        raise ValueError(f"{where}: image_id must be an integer, got {annotation['image_id']!r}.")
    if not -(2**63) <= image_id < 2**63:
        raise ValueError(f"{where}: image_id {image_id} does not fit 64 bits. Number the images instead.")
    where = f"Image {index} (image_id {image_id})"
    records = []
    for number, record in enumerate(_records(annotation["annotations"], where)):
        try:
            if is_ignored(record):
                logger.warning_once(
                    "Crowd annotations (iscrowd=1) mark groups, not objects; they are not in the labels."
                )
                continue
            problem, reason = box_problem(record.get("bbox"), size), None
        except ValueError as error:
            problem, reason = None, str(error)
        category = canonical_id(record.get("category_id"))
        reason = problem[1] if problem else reason
        if reason is None and (isinstance(category, bool) or not isinstance(category, int)):
            reason = f"category_id must be an integer, got {record.get('category_id')!r}"
        if reason:
            raise ValueError(
                f"{where}, annotation {number} (id {record.get('id', 'none')}), bbox {record.get('bbox')}: {reason}."
            )
        records.append({**record, "category_id": category})
    height, width = size
    # in NumPy, several times as fast as PyTorch on a few numbers
    given = np.array([[float(value) for value in record["bbox"]] for record in records]).reshape(-1, 4)
    low, high = (values.clip(0, (width, height)) for values in (given[:, :2], given[:, :2] + given[:, 2:]))
    boxes = np.concatenate(((low + high) / 2, high - low), axis=1) / (width, height, width, height)
    areas = [
        float(w * h if record.get("area") is None else record["area"])
        for record, (w, h) in zip(records, given[:, 2:].tolist(), strict=True)
    ]
    decoded = {"masks": _masks(records, size, where)} if masks else {}
    return {
        "class_labels": torch.tensor([record["category_id"] for record in records], dtype=torch.int64),
        "boxes": torch.from_numpy(boxes).float(),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.zeros(len(records), dtype=torch.int64),
        "image_id": torch.tensor([image_id]),
        "orig_size": torch.tensor([height, width]),
        **decoded,
    }


def _masks(records: list[dict[str, Any]], size: tuple[int, int], where: str) -> Tensor:
    """(N, height, width) bool, of each record's `segmentation`, or its `mask`, as rows of a data set call it."""
    masks = torch.zeros(len(records), *size, dtype=torch.bool)
    for number, record in enumerate(records):
        name = "mask" if record.get("segmentation") is None else "segmentation"
        try:
            if record.get(name) is None:
                raise ValueError("it has no `segmentation`, which return_segmentation_masks=True needs")
            masks[number] = decode_mask(record[name], size)
        except ValueError as error:
            raise ValueError(f"{where}, object {number} (id {record.get('id', 'none')}): {error}.") from error
    return masks


def _records(annotations: Any, where: str) -> list[Mapping[str, Any]]:
    """COCO records, of a list of them or of a dict of lists as `datasets` has it, in which the category may be called
    `category`."""
    if isinstance(annotations, Mapping):
        scalars = [name for name, values in annotations.items() if not hasattr(values, "__len__")]
        if scalars:
            raise ValueError(
                f"{where}: annotations that are a dict must have lists of equal length; {scalars} are not."
            )
        lengths = {name: len(values) for name, values in annotations.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{where}: the lists of its annotations must have equal lengths, got {lengths}.")
        columns = annotations.values()
        annotations = [dict(zip(annotations, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(annotations, (list, tuple)) or not all(isinstance(record, Mapping) for record in annotations):
        raise ValueError(f"{where}: annotations must be a list of COCO objects, got {str(annotations)[:80]}.")
    return [{**record, "category_id": record.get("category_id", record.get("category"))} for record in annotations]


def tensor_labels(labels: Any) -> list[dict[str, Any]]:
    """Labels whose `class_labels`, `boxes` and `masks` are lists or arrays, as tensors. Tensors stay as they are.

    Raises:
        ValueError: they are not a list of dicts, or what is in them is not numbers.
    """
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, Mapping) for label in labels):
        raise ValueError(
            "`labels` must be a list of dicts with `class_labels` and `boxes`, one per image, as the image processor "
            f"makes them; got {type(labels).__name__}."
        )
    if all(isinstance(label.get(name, no_tensor), Tensor) for label in labels for name, no_tensor in _TENSORS.items()):
        return list(labels)
    return [{**label, **_tensors(label, index)} for index, label in enumerate(labels)]


def _tensors(label: Mapping[str, Any], index: int) -> dict[str, Tensor]:
    try:
        found = {name: torch.as_tensor(label[name]) for name in _TENSORS if name in label}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Image {index} of the batch: its labels are not numbers of one shape: {error}") from error
    if "class_labels" in found:
        classes = found["class_labels"].reshape(-1)
        found["class_labels"] = classes if len(classes) else classes.to(torch.int64)  # an empty list is float
    if "boxes" in found:
        boxes = found["boxes"].float()
        found["boxes"] = boxes if boxes.numel() else boxes.reshape(-1, 4)
    if "masks" in found and found["masks"].shape == (0,):
        found["masks"] = found["masks"].reshape(0, 1, 1)
    return found


def check_labels(
    labels: list[dict[str, Any]],
    num_labels: int,
    batch_size: int,
    image_sizes: Tensor | None = None,
    *,
    needs_masks: bool = False,
) -> None:
    """Refuse labels that would train something else than what was meant.

    Args:
        labels: one dict per image with `class_labels` (N,), integers in [0, num_labels), and `boxes` (N, 4), cxcywh in
            [0, 1] of the image without its padding, with positive width and height. A `size` (height, width), which
            image processors add, must be that of the image.
        image_sizes: see [`sizes_without_padding`]; None if they are not known.
        needs_masks: the labels must have `masks` (N, H, W) as well, bool or 0 and 1, at the size of the image without
            its padding. Models without masks do not read them.

    Raises:
        ValueError: names the image of the batch, the box and the fix.
    """
    if len(labels) != batch_size:
        raise ValueError(f"There are {batch_size} images in the batch but {len(labels)} labels.")
    for image, label in enumerate(labels):
        missing = {"class_labels", "boxes", *(("masks",) if needs_masks else ())} - set(label)
        if missing:
            hint = ""
            if missing == {"masks"}:
                hint = " The image processor makes them with return_segmentation_masks=True, from `segmentation`."
            raise ValueError(
                f"{_where(labels, image)}: the label lacks {sorted(missing)}; it has {sorted(label)}.{hint}"
            )
        ids, boxes = label["class_labels"], label["boxes"]
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1:
            raise ValueError(
                f"{_where(labels, image)}: `class_labels` must be a list of integers, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        if boxes.shape != (len(ids), 4):
            raise ValueError(
                f"{_where(labels, image)}: `boxes` must be ({len(ids)}, 4) to fit `class_labels`, got "
                f"{tuple(boxes.shape)}."
            )
        if needs_masks and (label["masks"].ndim != 3 or len(label["masks"]) != len(ids)):
            raise ValueError(
                f"{_where(labels, image)}: `masks` must be ({len(ids)}, height, width) to fit `class_labels`, got "
                f"{tuple(label['masks'].shape)}."
            )
    ids = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    wrong_size = _wrong_sizes(labels, image_sizes, ids.device)
    wrong = torch.stack(
        (
            (ids < 0) | (ids >= num_labels),
            ~boxes.isfinite().all(1),
            ((boxes < -BOX_TOLERANCE) | (boxes > 1 + BOX_TOLERANCE)).any(1),
            (boxes[:, 2:] <= 0).any(1),
        )
    )
    wrong_masks = _wrong_masks(labels, image_sizes, ids.device) if needs_masks else wrong.new_zeros(2, len(labels))
    if not (wrong.any() | wrong_size.any() | wrong_masks.any()):  # the only transfer from the device
        return
    if wrong_size.any():
        raise ValueError(_describe_wrong_size(labels, int(wrong_size.nonzero()[0]), image_sizes))
    if wrong_masks.any():
        kind, image = wrong_masks.nonzero()[0].tolist()
        raise ValueError(_describe_wrong_masks(labels, kind, image, image_sizes))
    reasons = (
        f"the class id is not in [0, {num_labels}). Ids count from 0, and the config's `id2label` must name them all",
        NOT_FINITE,
        "the box is not within [0, 1]. Boxes are (center x, center y, width, height) divided by the image's width and "
        "height; pixel values belong into the image processor's `annotations`",
        NO_AREA,
    )
    kind, row = wrong.nonzero()[0].tolist()
    owners = [(image, box) for image, label in enumerate(labels) for box in range(len(label["class_labels"]))]
    image, position = owners[row]
    raise ValueError(
        f"{_where(labels, image)}, box {position}: {reasons[kind]}. "
        f"Class id {int(ids[row])}, box {[round(value, 4) for value in boxes[row].tolist()]}."
    )


def sizes_without_padding(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """(B, 2), height and width of each image of a batch (B, C, H, W) with its mask (B, H, W)."""
    if pixel_mask is None:
        return torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
    mask = pixel_mask.bool()
    return torch.stack((mask.any(2).sum(1), mask.any(1).sum(1)), dim=1)


def _wrong_sizes(labels: list[dict[str, Any]], image_sizes: Tensor | None, device: torch.device) -> Tensor:
    """(B,) bool, the labels whose `size` is not that of the image: their boxes are relative to another frame."""
    known = [image for image, label in enumerate(labels) if "size" in label]
    if image_sizes is None or not known:
        return torch.zeros(len(labels), dtype=torch.bool, device=device)
    wrong = torch.zeros(len(labels), dtype=torch.bool, device=device)
    wrong[known] = (_stored_sizes(labels, known, device) != image_sizes[known].to(device)).any(1)
    return wrong


def _stored_sizes(labels: list[dict[str, Any]], known: list[int], device: torch.device) -> Tensor:
    sizes = []
    for image in known:
        try:
            sizes.append(torch.as_tensor(labels[image]["size"], device=device).reshape(2))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{_where(labels, image)}: `size` must be (height, width), got {labels[image]['size']!r}."
            ) from error
    return torch.stack(sizes)


def _wrong_masks(labels: list[dict[str, Any]], image_sizes: Tensor | None, device: torch.device) -> Tensor:
    """(2, B) bool, the labels whose masks are not at the size of the image, and those with other values than 0 and
    1."""
    wrong = torch.zeros(2, len(labels), dtype=torch.bool, device=device)
    if image_sizes is not None:
        shapes = torch.tensor([label["masks"].shape[-2:] for label in labels], device=device)
        are_some = torch.tensor([len(label["masks"]) > 0 for label in labels], device=device)
        wrong[0] = (shapes != image_sizes.to(device)).any(1) & are_some
    for image, label in enumerate(labels):
        masks = label["masks"]
        if masks.dtype != torch.bool and len(masks):
            wrong[1, image] = ((masks != 0) & (masks != 1)).any()
    return wrong


def _describe_wrong_masks(labels: list[dict[str, Any]], kind: int, image: int, image_sizes: Tensor | None) -> str:
    where = _where(labels, image)
    if kind == 1:
        return f"{where}: `masks` must be bool, or 0 and 1, one mask per object; a map of ids is not."
    height, width = labels[image]["masks"].shape[-2:]
    image_height, image_width = image_sizes[image].tolist() if image_sizes is not None else (None, None)
    return (
        f"{where}: its masks have {height} x {width} pixels (height x width), but the image in the batch has "
        f"{image_height} x {image_width} without its padding. Masks must be at the size of the resized image, and not "
        "padded; the image processor makes them with return_segmentation_masks=True."
    )


def _describe_wrong_size(labels: list[dict[str, Any]], image: int, image_sizes: Tensor | None) -> str:
    label_height, label_width = (int(side) for side in labels[image]["size"])
    height, width = image_sizes[image].tolist() if image_sizes is not None else (None, None)
    return (
        f"{_where(labels, image)}: the label is for an image of {label_height} x {label_width} pixels (height x "
        f"width), but the image in the batch has {height} x {width} without its padding. Boxes must be "
        "relative to the image without its padding; transformers' own DetrImageProcessor makes them relative to the "
        "padded batch. Use hf_detr.DetrImageProcessor, and pass its `pixel_mask` too. If the images were resized after "
        "the processor, drop `size` from the labels."
    )


def _where(labels: list[dict[str, Any]], image: int) -> str:
    image_id = labels[image].get("image_id")
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = image_id.item()
    return f"Image {image} of the batch" + ("" if image_id is None else f" (image_id {image_id})")
