"""A cleaned copy of an annotated folder: correctable records are corrected, unusable ones removed."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, clip_boxes_to_image
from tqdm.auto import tqdm

from ..data.checks import numeric_boxes
from ..data.coco_export import write_coco
from ..data.findings import Finding
from ..data.records import AnnotatedSplit, BoxRecord, ImageRecord
from .full_check import CheckResult

REMOVED_IMAGES = {
    "image-missing",
    "image-unreadable",
    "image-truncated",
    "image-size-mismatch",
    "image-size-before-exif",
    "image-id-duplicate",
}
REMOVED_BOXES = {"box-not-numbers", "box-empty", "box-outside", "category-unknown", "box-duplicate"}


def write_clean_copy(result: CheckResult, folder: str | Path, *, progress: bool = True) -> dict[str, int]:
    """Write what [`clean`] returns as a COCO folder. The source is not modified.

    Returns:
        how many findings of each kind were corrected or removed, by code.

    Raises:
        FileExistsError: `folder` is not empty, or is inside the source.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Choose another folder.")
    if folder.resolve().is_relative_to(result.folder.resolve()):
        raise FileExistsError(f"{folder} is inside {result.folder}, which is never written to. Choose another folder.")
    splits, handled = clean(result)
    for name, split in splits.items():
        images = tqdm(split.images, desc=f"Writing {name}", disable=not progress, leave=False)
        write_coco(
            folder,
            name,
            dict(zip(split.category_ids, split.names, strict=True)),
            ((_to_record(image, split), _copy_of(image.path)) for image in images),
        )
    return handled


def clean(result: CheckResult) -> tuple[dict[str, AnnotatedSplit], dict[str, int]]:
    """The splits without unusable records, and how many findings of each kind were corrected or removed.

    Removed: images that cannot be read, or whose recorded size or id is wrong or ambiguous (their boxes cannot be
    trusted); duplicates of an image with the same boxes; training images that are also in validation; invalid boxes.
    Corrected: boxes beyond the image (clipped), boxes stored as corners or relative values, areas, duplicate ids and
    category names.
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
    leaked = {id(finding.other_image) for finding in result.findings if finding.code == "image-leaked"}
    splits = {}
    for name, split in result.splits.items():
        stored_as = split_codes.get(name, set()) & {"box-xyxy", "box-relative"}
        handled.update(stored_as)
        images = []
        for image in split.images:
            reasons = codes_of.get(id(image), set()) & REMOVED_IMAGES
            if id(image) in duplicates:
                reasons = reasons | {"image-duplicate"}
            if image.id in split.ambiguous_ids:
                reasons = reasons | {"image-id-duplicate"}
            if name == "train" and id(image) in leaked:
                reasons = reasons | {"image-leaked"}
            handled.update(reasons)
            if not reasons:
                boxes = [
                    _clean_box(box, image.size, codes_of.get(id(box), set()), stored_as, handled) for box in image.boxes
                ]
                images.append(replace(image, boxes=[box for box in boxes if box is not None]))
        handled.update(code for code, _, _ in split.orphans)
        splits[name] = _with_unique_ids(_with_unique_names(replace(split, images=images, orphans=[])))
    return _with_common_categories(splits), dict(handled)


def _is_redundant(finding: Finding) -> bool:
    """Whether it is about a duplicate with the same annotations as the other image, to 2 % of the image."""
    if finding.code != "image-duplicate" or finding.image is None or finding.other_image is None:
        return False
    a, b = (_relative_boxes(image) for image in (finding.image, finding.other_image))
    return a.shape == b.shape and bool(np.allclose(a, b, atol=0.02))


def _relative_boxes(image: ImageRecord) -> np.ndarray:
    """Class ids and boxes in [0, 1], (N, 5), sorted."""
    boxes = sorted((box.category or 0, *map(float, box.bbox)) for box in numeric_boxes(image))
    return np.array(boxes, dtype=float).reshape(-1, 5) / (1, *image.size, *image.size)


def _clean_box(
    box: BoxRecord, image_size: tuple[int, int], codes: set[str], stored_as: set[str], handled: Counter[str]
) -> BoxRecord | None:
    """The corrected box, or None if it is removed. `image_size` is (width, height) in pixels."""
    if codes & REMOVED_BOXES:
        handled.update(codes & REMOVED_BOXES)
        return None
    width, height = image_size
    given = torch.tensor([float(value) for value in box.bbox], dtype=torch.float64)
    if "box-xyxy" in stored_as:
        given = box_convert(given, "xyxy", "xywh")
    if "box-relative" in stored_as:
        given = given * torch.tensor([width, height, width, height])
    corners = box_convert(given, "xywh", "xyxy")
    clipped = clip_boxes_to_image(corners, (height, width))
    x, y, w, h = (given if clipped.equal(corners) else box_convert(clipped, "xyxy", "xywh")).tolist()
    if w <= 0 or h <= 0:
        handled["box-empty"] += 1
        return None
    handled.update(codes & {"box-partly-outside", "area-wrong"})
    unreliable = box.area is None or stored_as or "area-wrong" in codes
    return replace(box, bbox=[x, y, w, h], area=w * h if unreliable else min(box.area or 0.0, w * h))


def _with_unique_names(split: AnnotatedSplit) -> AnnotatedSplit:
    """Categories of the same name merged into the first one."""
    names = list(dict.fromkeys(split.names))
    if len(names) == len(split.names):
        return split
    category_ids = [split.category_ids[split.names.index(name)] for name in names]
    merged = {index: names.index(name) for index, name in enumerate(split.names)}
    images = [
        replace(
            image,
            boxes=[replace(box, category=merged[box.category]) for box in image.boxes if box.category is not None],
        )
        for image in split.images
    ]
    return replace(split, names=names, category_ids=category_ids, images=images)


def _with_unique_ids(split: AnnotatedSplit) -> AnnotatedSplit:
    """Annotation ids renumbered if they are not unique."""
    ids = [box.id for image in split.images for box in image.boxes]
    if len(set(ids)) == len(ids):
        return split
    new_ids = iter(range(1, len(ids) + 1))
    images = [replace(image, boxes=[replace(box, id=next(new_ids)) for box in image.boxes]) for image in split.images]
    return replace(split, images=images)


def _with_common_categories(splits: dict[str, AnnotatedSplit]) -> dict[str, AnnotatedSplit]:
    """The same category ids in all splits, if the source has none and the reader numbered the classes of each split."""
    if any(split.category_ids != list(range(len(split.names))) for split in splits.values()):
        return splits
    names = list(dict.fromkeys(name for split in splits.values() for name in split.names))
    return {
        key: replace(split, category_ids=[names.index(name) for name in split.names]) for key, split in splits.items()
    }


def _copy_of(path: Path) -> Callable[[Path], Any]:
    return lambda target: shutil.copyfile(path, target)


def _to_record(image: ImageRecord, split: AnnotatedSplit) -> dict[str, Any]:
    width, height = image.size
    return {
        "image_id": image.id,
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
            }
            for box in image.boxes
        ],
    }
