"""Boxes of images that were turned or resized after they were annotated."""

from dataclasses import replace
from typing import Any

from ..data.checks import EDGE_TOLERANCE, numeric_boxes
from ..data.records import BoxRecord, ImageRecord

SAME_ASPECT = 0.01  # relative difference of the aspect ratio up to which an image was resized, and not cropped


def repaired_boxes(image: ImageRecord) -> ImageRecord | None:
    """The record with the size of the file as shown, and boxes that fit it; None if it is not clear how they would.

    - The boxes extend beyond the recorded size, and not beyond the file: only the size was wrong.
    - The recorded size is that of the pixels as they are stored: the boxes are turned by the EXIF orientation.
    - The recorded size has the aspect ratio of the file: the file was resized, and the boxes are scaled.
    """
    recorded, header = image.recorded_size, image.header
    if recorded is None or header is None:
        return None
    width, height = header.size
    fits_recorded, fits_file = (_fit(image, size) for size in (recorded, header.size))
    if fits_file and not fits_recorded:
        return replace(image, recorded_size=header.size)
    if not fits_recorded:
        return None
    if recorded == header.stored:
        boxes = [_turned(box, recorded, header.orientation) for box in image.boxes]
    elif abs(recorded[0] * height / (recorded[1] * width) - 1) <= SAME_ASPECT:
        boxes = [_scaled(box, width / recorded[0], height / recorded[1]) for box in image.boxes]
    else:
        return None
    return replace(image, recorded_size=header.size, boxes=boxes)


def _fit(image: ImageRecord, size: tuple[int, int]) -> bool:
    """Whether all boxes end within this (width, height)."""
    width, height = size
    return all(
        x + w <= width + EDGE_TOLERANCE and y + h <= height + EDGE_TOLERANCE
        for x, y, w, h in (map(float, box.bbox) for box in numeric_boxes(image))
    )


def _numbers(box: BoxRecord) -> list[float] | None:
    try:
        values = [float(value) for value in box.bbox]
    except (TypeError, ValueError):
        return None
    return values if len(values) == 4 else None


def _turned(box: BoxRecord, stored: tuple[int, int], orientation: int) -> BoxRecord:
    """A box in the frame of the stored pixels, of this (width, height), to the frame as shown."""
    values = _numbers(box)
    if values is None:
        return box
    (x, y, w, h), (width, height) = values, stored
    right, bottom = width - x - w, height - y - h  # distances from the other edges
    shown: dict[int, Any] = {  # by the meaning of EXIF's orientation
        2: [right, y, w, h],
        3: [right, bottom, w, h],
        4: [x, bottom, w, h],
        5: [y, x, h, w],
        6: [bottom, x, h, w],
        7: [bottom, right, h, w],
        8: [y, right, h, w],
    }
    return replace(box, bbox=shown.get(orientation, values))


def _scaled(box: BoxRecord, horizontally: float, vertically: float) -> BoxRecord:
    values = _numbers(box)
    if values is None:
        return box
    x, y, w, h = values
    return replace(box, bbox=[x * horizontally, y * vertically, w * horizontally, h * vertically])
