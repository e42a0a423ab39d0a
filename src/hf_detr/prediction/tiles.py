"""Large images in tiles: where they lie, and one box for each object that several of them show.

A model sees an image at the size that its processor gives it, and what is small in a large image is nothing then. In
tiles it is as large as the model knows it. The whole image is one more view, for what is larger than a tile.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

View = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image

SAME_OBJECT = 0.4  # IoU; low, since what is small in the whole image is placed less exactly there than in a tile
MOST_OF_A_PIECE = 0.5  # of a box that a tile cuts
SAME_PIECE = 0.5  # IoU within what both tiles show
EDGE = 0.02  # of a tile's side: boxes that come this close to it may go on behind it


@dataclass(frozen=True)
class Tiling:
    """Tiles of `size` x `size` pixels, of which neighbours share at least the part `overlap` of their side: whatever
    is smaller than `overlap * size` in both directions lies in one of them as a whole.

    Raises:
        ValueError: a size that is not positive, or an overlap outside [0, 1).
    """

    size: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"The size of tiles must be at least 1 pixel, got {self.size}.")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"The overlap of tiles must be at least 0 and below 1, got {self.overlap}.")

    def tiles(self, width: int, height: int) -> list[View]:
        """Tiles that cover an image, row by row and spread evenly; as narrow or low as the image where that is smaller
        than a tile. None for an image that is not larger than a tile."""
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
        step = max(1, math.floor(self.size * (1 - self.overlap)))
        steps = math.ceil(room / step)
        return [round(index * room / steps) for index in range(steps + 1)]


def merge_views(views: Sequence[View], results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What was found in several views of an image, each object once. Only boxes of one class and of different views are
    compared: two boxes in one view are two objects there, and stay so.

    1. A box that ends within the image at an edge of its view is taken for cut. Of boxes that are not, and that overlap
       with an IoU of at least 0.4, the one with the highest score stays.
    2. A cut box goes if at least half of it lies in a box that stays.
    3. Cut boxes that are left are pieces. Two of them belong together if they agree (IoU of at least 0.5) about what
       both tiles show; together they become one box that surrounds them, with the highest of their scores.

    Args:
        views: in pixels of the image.
        results: `scores` (N,), `labels` (N,) and `boxes` (N, 4) xyxy, in pixels of its view, of each view.

    Returns:
        `scores`, `labels` and `boxes` in pixels of the image, by falling score.
    """
    frames = np.array(views, dtype=np.float64)
    view = np.repeat(np.arange(len(views)), [len(result["scores"]) for result in results])
    scores, labels, boxes = (
        np.concatenate([result[name].double().numpy() for result in results]) for name in ("scores", "labels", "boxes")
    )
    boxes = boxes + frames[view][:, [0, 1, 0, 1]]
    cut = _is_cut(boxes, frames[view], frames)
    kept, gone = [], np.zeros(len(boxes), dtype=bool)
    for index in np.argsort(-scores, kind="stable"):
        if cut[index] or gone[index]:
            continue
        kept.append(index)
        shared, own = _intersection(boxes[index], boxes), _area(boxes)
        same = shared >= SAME_OBJECT * (_area(boxes[index]) + own - shared)
        piece = cut & (shared >= MOST_OF_A_PIECE * own)
        gone |= (same | piece) & (labels == labels[index]) & (view != view[index])
    pieces = np.flatnonzero(cut & ~gone)
    group = _group_pieces(boxes[pieces], labels[pieces], view[pieces], frames)
    for number in range(group.max(initial=-1) + 1):
        members = pieces[group == number]
        best = members[np.argmax(scores[members])]
        boxes[best] = [*boxes[members, :2].min(0), *boxes[members, 2:].max(0)]
        kept.append(best)
    order = np.array(sorted(kept, key=lambda index: -scores[index]), dtype=np.int64)
    dtypes = {name: results[0][name].dtype for name in ("scores", "labels", "boxes")}
    merged = {"scores": scores[order], "labels": labels[order], "boxes": boxes[order]}
    return {name: torch.from_numpy(values).to(dtypes[name]) for name, values in merged.items()}


def _is_cut(boxes: np.ndarray, frame: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N,) whether boxes end at an edge of their view (N, 4) that is none of the image."""
    image = np.concatenate((frames[:, :2].min(0), frames[:, 2:].max(0)))
    sides = (frame[:, 2:] - frame[:, :2])[:, [0, 1, 0, 1]]
    return ((np.abs(boxes - frame) <= np.maximum(EDGE * sides, 1)) & (frame != image)).any(1)


def _group_pieces(boxes: np.ndarray, labels: np.ndarray, view: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N,) the number of the object that each cut box is a piece of; of one view, each object has one piece at most."""
    pairs: list[tuple[float, int, int]] = []
    for index in range(len(boxes)):
        # as far as both views show them; areas are negative nowhere, so that views apart never agree
        window = _clip(frames[view], frames[view[index]])
        mine, others = _clip(window, boxes[index]), _clip(window, boxes)
        shared = _area(_clip(mine, others))
        agreement = shared / np.maximum(_area(mine) + _area(others) - shared, 1e-9)
        agree = (shared > 0) & (agreement >= SAME_PIECE) & (labels == labels[index]) & (view != view[index])
        pairs += [(-agreement[other], index, int(other)) for other in np.flatnonzero(agree) if other > index]
    group = np.arange(len(boxes))
    for _, one, other in sorted(pairs):  # those that agree best first
        members, others = group == group[one], group == group[other]
        if not set(view[members]) & set(view[others]):
            group[others] = group[one]
    return np.unique(group, return_inverse=True)[1]


def _clip(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """What boxes (N, 4) share with others, (4,) or (N, 4), as boxes; inside out if they share nothing."""
    low, high = np.maximum(boxes[..., :2], window[..., :2]), np.minimum(boxes[..., 2:], window[..., 2:])
    return np.concatenate((low, high), axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(-1)


def _intersection(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,) the area that a box shares with others."""
    return _area(_clip(boxes, box))
