"""Detection in tiles of large images: where the tiles are, and how detections of several tiles are merged.

The processor resizes an image to the model's working size, at which small objects of a large image vanish. In a tile
they keep their size. The full image is one more view, for objects larger than a tile.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

View = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image

DUPLICATE_IOU = 0.4  # low, because small objects are localised less precisely in the full image than in a tile
COVERED_FRACTION = 0.5  # of the area of a truncated box
FRAGMENT_IOU = 0.5  # within the region that both tiles show
EDGE_MARGIN = 0.02  # of a tile's side: boxes this close to the tile's edge may continue beyond it


@dataclass(frozen=True)
class Tiling:
    """Tiles of `size` x `size` pixels. Neighbouring tiles overlap by at least the fraction `overlap` of their side, so
    every object with both sides shorter than `overlap * size` is complete in at least one tile.

    Raises:
        ValueError: the size is not positive, or the overlap is outside [0, 1).
    """

    size: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"The size of tiles must be at least 1 pixel, got {self.size}.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"The overlap of tiles must be at least 0 and below 1, got {self.overlap}.")

    def tiles(self, width: int, height: int) -> list[View]:
        """Evenly spaced tiles that cover an image, row by row; cropped to the image along a side that is shorter than a
        tile. Empty if the image is not larger than a tile."""
        if max(width, height) <= self.size:
            return []
        return [
            (left, top, min(left + self.size, width), min(top + self.size, height))
            for top in self._starts(height)
            for left in self._starts(width)
        ]

    def _starts(self, length: int) -> list[int]:
        room = length - self.size
        if room <= 0:
            return [0]
        max_step = max(1, math.floor(self.size * (1 - self.overlap)))
        steps = math.ceil(room / max_step)
        return [round(index * room / steps) for index in range(steps + 1)]


def merge_views(views: Sequence[View], results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the detections of several views of an image into one box per object. Only boxes of the same class and of
    different views are compared: two boxes in one view are two objects.

    1. A box that touches an edge of its view inside the image is truncated. Among complete boxes with an IoU of at
       least 0.4, the one with the highest score is kept.
    2. A truncated box is dropped if at least half of its area is inside a kept box.
    3. The remaining truncated boxes are fragments. Two fragments belong to one object if they agree (IoU of at least
       0.5) within the region that both tiles show. They are replaced by the box that encloses them, with the highest of
       their scores.

    Args:
        views: in pixels of the image.
        results: per view, `scores` (N,), `labels` (N,) and `boxes` (N, 4) xyxy in pixels of the view.

    Returns:
        `scores`, `labels` and `boxes` in pixels of the image, in order of decreasing score.
    """
    frames = np.array(views, dtype=np.float64)
    view = np.repeat(np.arange(len(views)), [len(result["scores"]) for result in results])
    scores, labels, boxes = (
        np.concatenate([result[name].double().numpy() for result in results]) for name in ("scores", "labels", "boxes")
    )
    boxes = boxes + frames[view][:, [0, 1, 0, 1]]
    truncated = _is_truncated(boxes, frames[view], frames)
    kept, dropped = [], np.zeros(len(boxes), dtype=bool)
    for index in np.argsort(-scores, kind="stable"):
        if truncated[index] or dropped[index]:
            continue
        kept.append(index)
        intersection, area = _intersection(boxes[index], boxes), _area(boxes)
        duplicate = intersection >= DUPLICATE_IOU * (_area(boxes[index]) + area - intersection)
        covered = truncated & (intersection >= COVERED_FRACTION * area)
        dropped |= (duplicate | covered) & (labels == labels[index]) & (view != view[index])
    fragments = np.flatnonzero(truncated & ~dropped)
    group = _group_fragments(boxes[fragments], labels[fragments], view[fragments], frames)
    for number in range(group.max(initial=-1) + 1):
        members = fragments[group == number]
        best = members[np.argmax(scores[members])]
        boxes[best] = [*boxes[members, :2].min(0), *boxes[members, 2:].max(0)]
        kept.append(best)
    order = np.array(sorted(kept, key=lambda index: -scores[index]), dtype=np.int64)
    dtypes = {name: results[0][name].dtype for name in ("scores", "labels", "boxes")}
    merged = {"scores": scores[order], "labels": labels[order], "boxes": boxes[order]}
    return {name: torch.from_numpy(values).to(dtypes[name]) for name, values in merged.items()}


def _is_truncated(boxes: np.ndarray, frame: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N,) whether boxes touch an edge of their view, `frame` (N, 4), that is not an edge of the image."""
    image = np.concatenate((frames[:, :2].min(0), frames[:, 2:].max(0)))
    sides = (frame[:, 2:] - frame[:, :2])[:, [0, 1, 0, 1]]
    return ((np.abs(boxes - frame) <= np.maximum(EDGE_MARGIN * sides, 1)) & (frame != image)).any(1)


def _group_fragments(boxes: np.ndarray, labels: np.ndarray, view: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N,) index of the object that each fragment belongs to. An object has at most one fragment per view."""
    pairs: list[tuple[float, int, int]] = []
    for index in range(len(boxes)):
        # the region that both views show; it is inverted, with area 0, for views that do not overlap
        window = _clip(frames[view], frames[view[index]])
        own, others = _clip(window, boxes[index]), _clip(window, boxes)
        intersection = _area(_clip(own, others))
        iou = intersection / np.maximum(_area(own) + _area(others) - intersection, 1e-9)
        match = (intersection > 0) & (iou >= FRAGMENT_IOU) & (labels == labels[index]) & (view != view[index])
        pairs += [(-iou[other], index, int(other)) for other in np.flatnonzero(match) if other > index]
    group = np.arange(len(boxes))
    for _, one, other in sorted(pairs):  # best matches first
        members, others = group == group[one], group == group[other]
        if not set(view[members]) & set(view[others]):
            group[others] = group[one]
    return np.unique(group, return_inverse=True)[1]


def _clip(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """The intersection of boxes (N, 4) with others, (4,) or (N, 4), as boxes; inverted where it is empty."""
    low, high = np.maximum(boxes[..., :2], window[..., :2]), np.minimum(boxes[..., 2:], window[..., 2:])
    return np.concatenate((low, high), axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    """(N,), 0 for inverted boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(-1)


def _intersection(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,) area of the intersection of a box with others."""
    return _area(_clip(boxes, box))
