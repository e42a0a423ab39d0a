"""The checks of an annotated folder that need no pixels."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..model.annotations import box_problem
from .findings import Finding
from .records import AnnotatedSplit, BoxRecord, ImageRecord

EDGE_TOLERANCE = 1.0  # pixels by which a box may extend beyond its image through rounding
MAX_RELATIVE = 1.05  # largest value of a box that is still taken for relative to the image
MAX_CROWDS = 0.9  # fraction of the boxes that may be crowds
MIN_AGREEMENT = 0.98  # fraction of boxes that must fit another box format before it is suspected


def quick_checks(split: AnnotatedSplit, *, bbox_format: str | None = None) -> list[Finding]:
    """All checks of one split that need only its records and image headers; see [`~hf_detr.data.records.read_headers`].

    Args:
        bbox_format: None also checks whether the boxes are stored in another format than [x_min, y_min, width, height]
            in pixels. Any other value skips that check.
    """

    def finding(
        code: str, record: str, message: str, image: ImageRecord | None = None, box: BoxRecord | None = None
    ) -> Finding:
        return Finding(code, split.split, str(split.file), record, message, image, box)

    findings = [finding(*orphan) for orphan in split.orphans]
    findings += [finding(*problem) for problem in _split_problems(split)]
    suspicion = suspected_format(split) if bbox_format is None else None
    if suspicion is not None:
        findings.append(finding(*suspicion))
    first: dict[Any, ImageRecord] = {}
    files: dict[Path, ImageRecord] = {}
    for image in split.images:
        if first.setdefault(image.source_id, image) is not image:
            message = f"has the same id as {first[image.source_id].record}"
            findings.append(finding("image-id-duplicate", image.record, message, image))
        if image.read is None and files.setdefault(image.path, image) is not image:
            message = f"names the same file as {files[image.path].record}"
            findings.append(finding("image-record-duplicate", image.record, message, image))
    for image in split.images:
        findings += [finding(code, image.record, message, image) for code, message in _image_problems(image)]
        size = image.recorded_size if image.header is None or image.header.problem else image.size
        unique: set[tuple[object, ...]] = set()
        for box in image.boxes:
            record = f"{image.record}, {box.record}"
            problems = list(box_problems(box, None if suspicion else size))
            findings += [finding(code, record, message, image, box) for code, message in problems]
            if not problems:
                key = (box.category, *box.bbox)
                if key in unique:
                    findings.append(finding("box-duplicate", record, f"bbox {box.bbox} occurs twice", image, box))
                unique.add(key)
    return findings


def _split_problems(split: AnnotatedSplit) -> Iterator[tuple[str, str, str]]:
    """Code, record and message of each problem of the split as a whole."""
    if not split.images and not split.orphans:
        yield "split-empty", split.format, "there are no images"
    boxes = [box for image in split.images for box in image.boxes]
    crowds = sum(box.iscrowd for box in boxes)
    if boxes and crowds > MAX_CROWDS * len(boxes) and (len(boxes) >= 5 or split.split == "train"):
        yield "crowds-only", split.format, f"{crowds} of {len(boxes)} boxes"
    elif split.split == "train" and not boxes and any(image.size != (0, 0) for image in split.images):
        yield "boxes-missing", split.format, f"none of the {len(split.images)} images has a box"
    for name, count in Counter(split.names).items():
        if count > 1:
            yield "category-name-duplicate", "categories", f"{count} categories are named {name!r}"


def _image_problems(image: ImageRecord) -> Iterator[tuple[str, str]]:
    header, recorded = image.header, image.recorded_size
    if header is None:
        return
    if header.problem is not None:
        code = "image-unreadable" if image.read is not None or image.path.exists() else "image-missing"
        yield code, f"{image.path}: {header.problem}"
    elif recorded is not None and recorded != header.size:
        message = f"recorded as {recorded[0]} x {recorded[1]}, but the file has {header.size[0]} x {header.size[1]}"
        if recorded == header.stored:
            yield "image-size-before-exif", f"{message} as shown"
        else:
            yield "image-size-mismatch", message
    elif header.orientation != 1:
        yield "image-exif-rotated", f"EXIF orientation {header.orientation}"


def box_problems(box: BoxRecord, size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    """Code and message of each problem of a box.

    Args:
        size: (width, height) of the image in pixels; None skips what needs it.
    """
    if box.problem is not None:
        yield "box-not-numbers", box.problem
        return
    if box.category is None:
        yield "category-unknown", f"there is no category {box.category_name!r}"
        return
    problem = box_problem(box.bbox, None if size is None else (size[1], size[0]))
    if problem is not None:
        code, reason = problem
        yield code, f"bbox {box.bbox}: {reason.partition('. ')[0]}"  # `KINDS` has the fix
        return
    x, y, width, height = (float(value) for value in box.bbox)
    if size is not None:
        excess = max(-x, -y, x + width - size[0], y + height - size[1])
        if excess > EDGE_TOLERANCE:
            message = f"bbox {box.bbox} extends {excess:.1f} pixels beyond the image of {size[0]} x {size[1]}"
            yield "box-partly-outside", message
    area = _number(box.area)
    if box.area is not None and (area is None or not 0 < area <= width * height * 1.01 + 1):
        yield "area-wrong", f"the area is {box.area}, but bbox {box.bbox} has {width * height:.1f}"


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def numeric_boxes(image: ImageRecord) -> list[BoxRecord]:
    """The boxes with a known category and four finite numbers, whatever else may be wrong with them."""
    skipped = ("box-not-numbers", "category-unknown")
    return [box for box in image.boxes if not any(code in skipped for code, _ in box_problems(box, None))]


def suspected_format(split: AnnotatedSplit) -> tuple[str, str, str] | None:
    """Code, record and message if all boxes appear to be stored in another format.

    Corners are suspected only if there is no doubt: many boxes extend beyond their images when they are read as [x_min,
    y_min, width, height], and almost none when they are read as corners.
    """
    boxes = [
        (image.size, [float(value) for value in box.bbox])
        for image in split.images
        if image.header is not None and image.header.problem is None
        for box in numeric_boxes(image)
    ]
    found = doubtful_boxes(boxes)
    return found and (found[0], f"all {len(boxes)} boxes", found[1])


def doubtful_boxes(boxes: list[tuple[tuple[int, int], list[float]]]) -> tuple[str, str] | None:
    """Code and message if boxes, each with the (width, height) of its image, appear not to be [x_min, y_min, width,
    height] in pixels; see [`suspected_format`]."""
    if len(boxes) < 5:
        return None
    if sum(max(map(abs, bbox)) <= MAX_RELATIVE for _, bbox in boxes) >= MIN_AGREEMENT * len(boxes):
        return "box-relative", f"the values of most boxes are at most {MAX_RELATIVE}"
    tolerance = EDGE_TOLERANCE
    outside = sum(x + w > width + tolerance or y + h > height + tolerance for (width, height), (x, y, w, h) in boxes)
    fitting = sum(
        x < right <= width + tolerance and y < bottom <= height + tolerance
        for (width, height), (x, y, right, bottom) in boxes
    )
    if fitting < MIN_AGREEMENT * len(boxes) or outside < max(3, len(boxes) // 10):
        return None
    others = "none" if fitting == len(boxes) else str(len(boxes) - fitting)
    message = (
        f"{outside} of {len(boxes)} extend beyond their images when read as [x, y, width, height]; as corners, {others}"
    )
    return "box-xyxy", message
