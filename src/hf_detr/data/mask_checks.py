"""The masks of a split's objects, from whatever its format stores, and what is wrong with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..model.annotations import box_problem
from ..runtime.extras import import_extra
from .checks import EDGE_TOLERANCE
from .findings import Finding
from .masks import Ids, Size, encode_masks, encode_segmentation, find_overlap, mask_areas, mask_boxes, unlisted_ids
from .records import WITHOUT_BOX, AnnotatedSplit, BoxRecord, ImageRecord

BOX_TOLERANCE = 1 + EDGE_TOLERANCE  # pixels; a polygon's pixels may begin one before its coordinates
MIN_BOX_OVERLAP = 0.25  # IoU of a box and the box around its mask; occlusion makes visible masks smaller than objects


def read_masks(
    images: Sequence[ImageRecord], progress: Callable[[Iterator[Any]], Iterable[Any]] = lambda done: done
) -> None:
    """Fill in `mask` or `mask_problem` of all objects, with eight threads. Objects without a box get that of their
    mask. The original segmentations are dropped, to free their memory.

    Args:
        progress: wraps an iterator with an entry per image, to show a progress bar.

    Raises:
        ImportError: hotcoco is not installed.
    """
    import_extra("hotcoco", "evaluation")
    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in progress(pool.map(read_image_masks, images)):
            pass


def read_image_masks(image: ImageRecord) -> None:
    """The same for one image."""
    size = (image.size[1], image.size[0])
    if 0 in size:
        return  # an image that cannot be read, which is reported as such
    ids, problem = _segments(image, size)
    for box in image.boxes:
        box.mask, box.mask_problem = None, problem
        if ids is not None:
            box.mask = encode_masks((ids == box.segment)[None])[0]
            if not mask_areas([box.mask], size)[0]:
                path = image.segment_map.path if image.segment_map is not None else ""
                box.mask_problem = "segments-differ", f"segment {box.segment} is in the JSON and not in {path}"
        elif problem is None:
            box.mask, box.mask_problem = _read_mask(box.segmentation, size)
        box.segmentation = None
        if box.mask is not None and box.mask_problem is None and box.bbox is None:
            box.bbox = mask_boxes([box.mask], size)[0]
            box.problem = None if box.problem == WITHOUT_BOX else box.problem


def _segments(image: ImageRecord, size: Size) -> tuple[Ids | None, tuple[str, str] | None]:
    """The image's map of segments, if it has one, and what is wrong with it."""
    if image.segment_map is None:
        return None, None
    try:
        ids = image.segment_map.ids()
    except ValueError as error:
        return None, ("mask-invalid", str(error))
    if ids.shape != size:
        (height, width), path = ids.shape, image.segment_map.path
        return None, ("mask-invalid", f"{path} has {width} x {height} pixels, but the image {size[1]} x {size[0]}")
    listed = [box.segment for box in image.boxes if box.segment is not None]
    image.unlisted_segments = unlisted_ids(ids, listed)
    return ids, None


def _read_mask(segmentation: Any, size: Size) -> tuple[str | None, tuple[str, str] | None]:
    if segmentation is None or (isinstance(segmentation, (list, tuple)) and not segmentation):
        return None, ("mask-missing", "it has no segmentation")
    try:
        counts = encode_segmentation(segmentation, size)
    except (TypeError, ValueError, OverflowError) as error:
        return None, ("mask-invalid", str(error))
    if not mask_areas([counts], size)[0]:
        return None, ("mask-empty", "its segmentation has no pixel in the image")
    return counts, None


def mask_checks(split: AnnotatedSplit) -> list[Finding]:
    """All checks of the masks of one split, after [`read_masks`]. The file of a finding is the map of segments, where
    the split has such maps."""
    findings: list[Finding] = []
    for image in split.images:
        size = (image.size[1], image.size[0])
        if 0 in size:
            continue
        file = str(split.file if image.segment_map is None else image.segment_map.path)

        def finding(code: str, record: str, message: str, box: BoxRecord | None = None) -> None:
            findings.append(Finding(code, split.split, file, record, message, image, box))  # noqa: B023

        for segment in image.unlisted_segments:
            finding("segments-differ", image.record, f"segment {segment} is in {file} and not in the JSON")
        for box in image.boxes:
            record = f"{image.record}, {box.record}"
            if box.mask_problem is not None:
                code, reason = box.mask_problem
                finding(code, record, reason, box)
            elif box.mask is not None:
                if not box.has_own_box and _is_thing(box, split):
                    finding("thing-without-box", record, f"its box is that of its mask, {box.bbox}", box)
                if box_problem(box.bbox, None) is None and (message := _disagreement(box, box.mask, size)):
                    finding("mask-outside-box", record, message, box)
        if split.stuff:
            _check_overlap(image, size, finding)
    return findings


def _is_thing(box: BoxRecord, split: AnnotatedSplit) -> bool:
    return box.category is None or split.names[box.category] not in split.stuff


def _disagreement(box: BoxRecord, mask: str, size: Size) -> str | None:
    """How a box and its mask disagree, if they do."""
    x, y, width, height = (float(value) for value in box.bbox)
    left, top, mask_width, mask_height = mask_boxes([mask], size)[0]
    right, bottom = left + mask_width, top + mask_height
    excess = max(x - left, y - top, right - x - width, bottom - y - height)
    found = f"the mask covers {[left, top, mask_width, mask_height]}"
    if excess > BOX_TOLERANCE:
        return f"{found}, {excess:.1f} pixels beyond bbox {box.bbox}"
    shared = max(0.0, min(right, x + width) - max(left, x)) * max(0.0, min(bottom, y + height) - max(top, y))
    union = width * height + mask_width * mask_height - shared
    return f"{found}, little of bbox {box.bbox}" if shared < MIN_BOX_OVERLAP * union else None


def _check_overlap(image: ImageRecord, size: Size, finding: Callable[..., None]) -> None:
    masks = [box.mask for box in image.boxes if box.mask is not None and box.mask_problem is None]
    overlap = find_overlap(masks, size)
    if overlap:
        finding("mask-overlap", image.record, f"{overlap} pixels belong to more than one segment")
