"""Boxes of rows as NumPy arrays of float64. On a few numbers NumPy is several times as fast as PyTorch, and a training
image takes dozens of such steps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]


def to_boxes(values: Sequence[Sequence[float]]) -> Boxes:
    """The boxes of a row, (N, 4), also if there are none."""
    return np.array(values, dtype=np.float64).reshape(-1, 4)


def corners_of(boxes: Boxes) -> Boxes:
    """Boxes (N, 4) xywh as xyxy."""
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def clip_boxes(boxes: Boxes, height: int, width: int) -> Boxes:
    """Boxes (N, 4) xywh clipped to the image; boxes inside are returned without rounding errors."""
    corners = corners_of(boxes)
    clipped = np.clip(corners, 0, (width, height, width, height))
    inside = (clipped == corners).all(axis=1, keepdims=True)
    return np.where(inside, boxes, np.concatenate((clipped[:, :2], clipped[:, 2:] - clipped[:, :2]), axis=1))


def intersections(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Areas of the intersections of boxes xyxy whose leading axes broadcast: (..., 4), (..., 4) to (...)."""
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    return sides.clip(min=0).prod(axis=-1)
