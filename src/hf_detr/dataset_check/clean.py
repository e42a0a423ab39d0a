"""A cleaned copy of a dataset: correctable records are corrected, unusable ones removed."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert, clip_boxes_to_image
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.checks import quick_checks
from ..data.coco_export import write_coco
from ..data.findings import MASK_ERRORS, Finding, has_unreadable_map
from ..data.masks import mask_areas, mask_boxes, to_coco_rle
from ..data.records import AnnotatedSplit, BoxRecord, ImageRecord
from ..data.rows import take_crowds_as_objects
from .box_repair import repaired_boxes
from .consistency import (
    with_common_categories,
    with_merged_records,
    with_unique_ids,
    with_unique_names,
    without_unlearnable_classes,
)
from .duplicates import has_same_boxes
from .full_check import CheckResult

logger = logging.get_logger(__name__)

REMOVED_IMAGES = {
    "image-missing",
    "image-unreadable",
    "image-truncated",
    "image-unsupported",
    "image-id-duplicate",
}
REMOVED_BOXES = {
    "box-not-numbers",
    "box-empty",
    "box-outside",
    "category-unknown",
    "box-duplicate",
    *MASK_ERRORS,
}
MUCH = 0.1  # fraction of images or boxes whose removal is worth a warning


@dataclass
class CleanResult:
    """What [`clean`] returns.

    Attributes:
        splits: without unusable records.
        handled: how many findings of each kind were corrected or removed, by code.
        removed: what and how much was removed, in a sentence per split, where it is much.
    """

    splits: dict[str, AnnotatedSplit]
    handled: Counter[str] = field(default_factory=Counter)
    removed: list[str] = field(default_factory=list)


def write_clean_copy(result: CheckResult, folder: str | Path, *, progress: bool = True) -> dict[str, int]:
    """Write what [`clean`] returns as a COCO folder. The source is not modified. If more than a tenth of the images or
    boxes of a split is removed, a warning is logged.

    Returns:
        how many findings of each kind were corrected or removed, by code.

    Raises:
        FileExistsError: `folder` is not empty, or is inside the source.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Choose another folder.")
    if result.folder is not None and folder.resolve().is_relative_to(result.folder.resolve()):
        raise FileExistsError(f"{folder} is inside {result.folder}, which is never written to. Choose another folder.")
    cleaned = clean(result)
    for sentence in cleaned.removed:
        logger.warning(sentence)
    for name, split in cleaned.splits.items():
        images = tqdm(split.images, desc=f"Writing {name}", disable=not progress, leave=False)
        write_coco(
            folder,
            name,
            dict(zip(split.category_ids, split.names, strict=True)),
            ((_to_record(image, split), _copy_of(image)) for image in images),
            split.stuff,
        )
    return dict(cleaned.handled)


def clean(result: CheckResult) -> CleanResult:
    """The splits without unusable records.

    Removed: images that cannot be read, or whose id or recorded size is ambiguous, so that their boxes cannot be
    trusted; duplicates of an image with the same boxes; training images that are also in validation or test, and
    validation images that are also in test; invalid boxes; boxes of classes that the training split does not have.
    Corrected: boxes of images that were resized (scaled) or recorded before their EXIF orientation (turned), boxes
    beyond the image (clipped), boxes stored as corners or relative values, objects that are all marked as crowds,
    several records of one file (merged), areas, duplicate ids and category names. If masks were checked, objects
    without a usable mask and images that were resized or turned are removed, and boxes that disagree with their masks
    become those of the masks.
    """
    handled: Counter[str] = Counter()
    codes_of: dict[int, set[str]] = {}  # by the `id()` of an image or box record
    split_codes: dict[str, set[str]] = {}
    for finding in result.findings:
        about = finding.box if finding.box is not None else finding.image
        if about is not None:
            codes_of.setdefault(id(about), set()).add(finding.code)
        else:
            split_codes.setdefault(finding.split, set()).add(finding.code)
    duplicates = {id(finding.image) for finding in result.findings if _is_redundant(finding)}
    leaked = _leaked_images(result)
    splits = {}
    for name, split in result.splits.items():
        stored_as = split_codes.get(name, set()) & {"box-xyxy", "box-relative"}
        handled.update(stored_as)
        images = []
        for image in split.images:
            codes = codes_of.get(id(image), set())
            misplaced = codes & {"image-size-mismatch", "image-size-before-exif"}
            conditions = {
                "image-duplicate": id(image) in duplicates,
                "image-id-duplicate": image.source_id in split.ambiguous_ids,
                "image-leaked": id(image) in leaked,
            }
            reasons = codes & REMOVED_IMAGES | {code for code, holds in conditions.items() if holds}
            if any(box.mask is not None or box.mask_problem is not None for box in image.boxes):
                reasons |= misplaced  # where the masks would have to be is not known
            if has_unreadable_map(image):  # without its objects it would be background
                reasons.add("mask-invalid")
            kept: ImageRecord | None = image
            if not reasons and stored_as:
                kept = replace(image, boxes=[_converted(box, image.size, stored_as) for box in image.boxes])
            if kept is not None and not reasons and misplaced:
                kept = repaired_boxes(kept)
                handled.update(misplaced)
            handled.update(reasons)
            if kept is not None and not reasons:
                boxes = [_clean_box(box, image.size, codes_of.get(id(given), set()), stored_as | misplaced, handled)
                         for given, box in zip(image.boxes, kept.boxes, strict=True)]  # fmt: skip
                images.append(replace(kept, boxes=[box for box in boxes if box is not None]))
        handled.update(code for code, _, _ in split.orphans)
        cleaned = replace(split, images=images, orphans=[], ambiguous_ids=set())
        if "crowds-only" in split_codes.get(name, set()):
            take_crowds_as_objects(cleaned)
            handled["crowds-only"] += 1
        cleaned = with_merged_records(with_unique_names(cleaned), handled)
        splits[name] = with_unique_ids(_without_errors(cleaned, handled))
    splits = with_common_categories(without_unlearnable_classes(splits, handled))
    return CleanResult(splits, handled, _describe_losses(result.splits, splits))


def _leaked_images(result: CheckResult) -> set[int]:
    """`id()` of the images that are also in a later one of train, val and test."""
    split_of = {id(image): name for name, split in result.splits.items() for image in split.images}
    order = list(result.splits)
    found = set()
    for finding in result.findings:
        if finding.code == "image-leaked" and finding.image is not None and finding.other_image is not None:
            pair = sorted((finding.image, finding.other_image), key=lambda image: order.index(split_of[id(image)]))
            found.add(id(pair[0]))
    return found


def _is_redundant(finding: Finding) -> bool:
    """Whether it is about a duplicate with the same annotations as the other image."""
    if finding.code != "image-duplicate" or finding.image is None or finding.other_image is None:
        return False
    return has_same_boxes(finding.image, finding.other_image)


def _converted(box: BoxRecord, image_size: tuple[int, int], stored_as: set[str]) -> BoxRecord:
    """A box stored as corners or relative to its image, to [x_min, y_min, width, height] in pixels."""
    try:
        values = torch.tensor([float(value) for value in box.bbox], dtype=torch.float64)
    except (TypeError, ValueError):
        return box
    if len(values) != 4:
        return box
    if "box-xyxy" in stored_as:
        values = box_convert(values, "xyxy", "xywh")
    if "box-relative" in stored_as:
        values = values * torch.tensor([*image_size, *image_size])
    return replace(box, bbox=values.tolist())


def _clean_box(
    box: BoxRecord, image_size: tuple[int, int], codes: set[str], changed: set[str], handled: Counter[str]
) -> BoxRecord | None:
    """The corrected box, or None if it is removed.

    Args:
        image_size: (width, height) in pixels.
        codes: of the findings about it; those about its place do not count if it has `changed`.
    """
    removed = codes & (REMOVED_BOXES - {"box-outside"} if changed else REMOVED_BOXES)
    if "box-empty" in removed and "box-xyxy" in changed:
        removed.discard("box-empty")
    if removed:
        handled.update(removed)
        return None
    width, height = image_size
    given = torch.tensor([float(value) for value in box.bbox], dtype=torch.float64)
    corners = box_convert(given, "xywh", "xyxy")
    clipped = clip_boxes_to_image(corners, (height, width))
    x, y, w, h = (given if clipped.equal(corners) else box_convert(clipped, "xyxy", "xywh")).tolist()
    if w <= 0 or h <= 0:
        handled["box-empty"] += 1
        return None
    handled.update(codes & {"box-partly-outside", "area-wrong", "mask-outside-box", "thing-without-box"})
    if box.mask is not None and ("mask-outside-box" in codes or "area-wrong" in codes):
        area = float(mask_areas([box.mask], (height, width))[0])
        bbox = mask_boxes([box.mask], (height, width))[0] if "mask-outside-box" in codes else [x, y, w, h]
        return replace(box, bbox=bbox, area=area)
    unreliable = box.area is None or changed or "area-wrong" in codes
    return replace(box, bbox=[x, y, w, h], area=w * h if unreliable else min(box.area or 0.0, w * h))


def _without_errors(split: AnnotatedSplit, handled: Counter[str]) -> AnnotatedSplit:
    """Without the records that are still invalid, because one fault hid another."""
    while True:
        findings = [
            finding
            for finding in quick_checks(split, bbox_format="xywh")
            if finding.severity == "error" and finding.image is not None
        ]
        if not findings:
            return split
        boxes = {id(finding.box) for finding in findings if finding.box is not None}
        images = {id(finding.image) for finding in findings if finding.box is None}
        handled.update(finding.code for finding in findings)
        kept = [image for image in split.images if id(image) not in images]
        kept = [replace(image, boxes=[box for box in image.boxes if id(box) not in boxes]) for image in kept]
        split = replace(split, images=kept)


def _describe_losses(before: dict[str, AnnotatedSplit], after: dict[str, AnnotatedSplit]) -> list[str]:
    """A sentence per split of which much was removed."""
    sentences = []
    for name, split in before.items():
        images, boxes = len(split.images), sum(len(image.boxes) for image in split.images)
        kept = len(after[name].images), sum(len(image.boxes) for image in after[name].images)
        if images - kept[0] > MUCH * images or boxes - kept[1] > MUCH * boxes:
            sentences.append(
                f"{name}: {images - kept[0]} of {images} images and {boxes - kept[1]} of {boxes} boxes are removed. "
                "Correct the source instead, if that is too much."
            )
    return sentences


def _copy_of(image: ImageRecord) -> Callable[[Path], Any]:
    read = image.read
    if read is not None:
        return lambda target: target.write_bytes(read())
    return lambda target: shutil.copyfile(image.path, target)


def _to_record(image: ImageRecord, split: AnnotatedSplit) -> dict[str, Any]:
    width, height = image.size
    return {
        "image_id": image.source_id,
        "file_name": image.file_name,
        "width": width,
        "height": height,
        "objects": [
            {
                "id": box.id,
                "category_id": split.category_ids[box.category or 0],
                "bbox": list(box.bbox),
                "area": box.area,
                "iscrowd": box.iscrowd,
                **({} if box.mask is None else {"segmentation": to_coco_rle(box.mask, (height, width))}),
            }
            for box in image.boxes
        ],
    }
