"""Which detection found which object: COCO's matching, kept image by image so that one can ask what went wrong."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Record = Mapping[str, Any]

RECALLS = np.linspace(0.0, 1.0, 101)
MOST_DETECTIONS = 100  # of a class in an image; COCO's


@dataclass(frozen=True)
class ImageMatches:
    """Detections and objects of one image. D detections, best first; G objects, crowds left out.

    Attributes:
        image_id: of the records.
        scores, labels: (D,), and `boxes` (D, 4), [x_min, y_min, width, height] in pixels.
        truth_labels: (G,), and `truth_boxes` (G, 4), the same form.
        iou: (D, G), between all of them, whatever their classes.
        matched: (D,) the object that a detection found, or -1.
        ignored: (D,) not counted at all: it lies in a crowd of its class and found no object.
    """

    image_id: int
    scores: Floats
    labels: Ints
    boxes: Floats
    truth_labels: Ints
    truth_boxes: Floats
    iou: Floats
    matched: Ints
    ignored: Bools


def match_images(
    annotations: Sequence[Record],
    detections: Sequence[Record],
    *,
    iou_threshold: float = 0.5,
    any_class: bool = False,
) -> Iterator[ImageMatches]:
    """Match as COCO does: the best detection first, each takes the object of its class that it overlaps most and nobody
    took before, if their IoU reaches the threshold.

    Args:
        annotations, detections: records as `coco_metrics` takes them.
        any_class: a detection that finds no object of its class may take one of another class (crowds of any class
            excuse it then); for confusion matrices.

    Yields:
        images that have objects or detections, by their ids.
    """
    objects, found = _by_image(annotations), _by_image(detections)
    for image_id in sorted(objects.keys() | found.keys()):
        yield _match(image_id, objects.get(image_id, []), found.get(image_id, []), iou_threshold, any_class)


def average_precision(scores: Floats, correct: Bools, num_objects: int) -> float:
    """The area under the interpolated precision-recall curve at COCO's 101 recalls; nan without objects.

    Args:
        scores, correct: (D,) of the detections of one class, in any order; equal scores keep theirs.
    """
    return float(interpolated_precision(scores, correct, num_objects).mean()) if num_objects else float("nan")


def interpolated_precision(scores: Floats, correct: Bools, num_objects: int) -> Floats:
    """The best precision at each of COCO's 101 recalls or beyond it, (101,); 0 where that recall is not reached."""
    hits = np.cumsum(correct[np.argsort(-scores, kind="mergesort")])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / num_objects, RECALLS, side="left")
    return np.append(envelope, 0.0)[np.minimum(places, len(envelope))]


def _by_image(records: Sequence[Record]) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["image_id"], []).append(record)
    return groups


def _match(
    image_id: int, objects: list[Record], found: list[Record], iou_threshold: float, any_class: bool
) -> ImageMatches:
    scores = np.array([record["score"] for record in found], dtype=np.float64)
    order = np.argsort(-scores, kind="mergesort")
    labels = np.array([record["category_id"] for record in found], dtype=np.int64)[order]
    if len(order) > MOST_DETECTIONS:
        kept = np.zeros(len(order), dtype=bool)
        for label in np.unique(labels):
            kept[np.flatnonzero(labels == label)[:MOST_DETECTIONS]] = True
        order, labels = order[kept], labels[kept]
    boxes = np.array([record["bbox"] for record in found], dtype=np.float64).reshape(-1, 4)[order]
    truth_labels = np.array([record["category_id"] for record in objects], dtype=np.int64)
    truth_boxes = np.array([record["bbox"] for record in objects], dtype=np.float64).reshape(-1, 4)
    crowd = np.array([bool(record.get("iscrowd")) for record in objects], dtype=bool)
    iou = _overlap(boxes, truth_boxes, crowd)

    threshold = min(iou_threshold, 1 - 1e-10)
    same = labels[:, None] == truth_labels[None]
    close = iou >= threshold
    in_crowd = (close & (same | any_class) & crowd).any(axis=1)
    iou, same, close = iou[:, ~crowd], same[:, ~crowd], close[:, ~crowd]
    matched = np.full(len(order), -1, dtype=np.int64)
    taken = np.zeros(int((~crowd).sum()), dtype=bool)
    candidates = close if any_class else close & same
    for d in np.flatnonzero(candidates.any(axis=1)):
        free = candidates[d] & ~taken
        if (free & same[d]).any():
            free &= same[d]
        if free.any():
            overlap = np.where(free, iou[d], -1.0)
            matched[d] = len(overlap) - 1 - int(overlap[::-1].argmax())  # of equals the last, as COCO
            taken[matched[d]] = True
    return ImageMatches(
        image_id=image_id,
        scores=scores[order],
        labels=labels,
        boxes=boxes,
        truth_labels=truth_labels[~crowd],
        truth_boxes=truth_boxes[~crowd],
        iou=iou,
        matched=matched,
        ignored=in_crowd & (matched < 0),
    )


def _overlap(boxes: Floats, others: Floats, crowd: Bools) -> Floats:
    """(D, G) IoU of xywh boxes; for crowds the intersection over the detection's own area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], others[None, :, :2] + others[None, :, 2:])
    intersection = (high - low).clip(min=0).prod(axis=2)
    area, other_area = boxes[:, 2:].prod(axis=1)[:, None], others[:, 2:].prod(axis=1)[None]
    union = np.where(crowd[None], area, area + other_area - intersection)
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
