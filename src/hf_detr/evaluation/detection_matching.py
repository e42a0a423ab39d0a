"""Which detection found which object, by COCO's rule.

hotcoco has no matching that serves confusion matrices with crowds, thresholds per class and a preference for the
object's own class, so the matching is written here. It has no limit on the number of detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.annotations import canonical_id, is_ignored
from ..runtime.extras import import_extra
from .coco_metrics import Floats, Record, id_order

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Matching:
    """D detections, in the order of image ids and within an image of descending scores, and G objects without crowds.

    Attributes:
        detections, objects: the records, of length D and G.
        scores, labels: (D,) and `object_labels` (G,), class ids.
        matched: (D,) index of the object that the detection found, or -1.
        ignored: (D,) the detection lies in a crowd of its class and found no object, so it does not count.
        nearest: (D, 2) index of the object of the same class, and of the object of another class, with the largest IoU;
            -1 where there is none.
        overlap: (D, 2) these IoUs; 0 where there is none.
    """

    detections: list[Record]
    objects: list[Record]
    scores: Floats
    labels: Ints
    object_labels: Ints
    matched: Ints
    ignored: Bools
    nearest: Ints
    overlap: Floats

    @property
    def missed(self) -> Ints:
        """Indices of the objects that no detection found."""
        return np.setdiff1d(np.arange(len(self.objects)), self.matched)


def match_detections(
    annotations: Sequence[Record],
    detections: Sequence[Record],
    *,
    iou_threshold: float = 0.5,
    any_class: bool = False,
) -> Matching:
    """Match as COCO does: in the order of descending scores, each detection takes the unmatched object of its class
    with the largest IoU, if that reaches the threshold.

    Args:
        annotations, detections: records as `coco_metrics` takes them.
        any_class: a detection that finds no object of its class may take one of another class, and crowds of every
            class count; for confusion matrices.
    """
    bbox_iou = import_extra("hotcoco", "evaluation").primitives.bbox_iou
    by_image: dict[Any, tuple[list[Record], list[Record], list[Record]]] = {}
    for records, crowd, other in ((annotations, 1, 0), (detections, 2, 2)):
        for record in records:
            groups = by_image.setdefault(canonical_id(record["image_id"]), ([], [], []))
            groups[crowd if is_ignored(record) else other].append(record)
    found: list[Record] = []
    objects: list[Record] = []
    parts: list[tuple[Any, ...]] = [(np.empty(0, int), np.empty(0, bool), np.empty((0, 2), int), np.empty((0, 2)))]
    for image_id in sorted(by_image, key=id_order):
        own, crowds, candidates = by_image[image_id]
        candidates.sort(key=lambda record: -record["score"])
        count, limit = len(own), min(iou_threshold, 1 - 1e-10)
        labels, own_labels = _labels(candidates), _labels([*own, *crowds])
        iou = np.zeros((len(candidates), len(own_labels)))
        if iou.size:
            boxes, own_boxes = (
                np.array([r["bbox"] for r in records], dtype=np.float64) for records in (candidates, [*own, *crowds])
            )
            iou = np.array(bbox_iou(boxes, own_boxes, np.arange(len(own_labels)) >= count))
        same = labels[:, None] == own_labels[None]
        in_crowd = ((iou >= limit) & (same | any_class))[:, count:].any(axis=1)
        iou, same = iou[:, :count], same[:, :count]
        matched = _match(iou, same, limit, any_class)
        nearest, overlap = np.full((len(labels), 2), -1), np.zeros((len(labels), 2))
        for column, allowed in enumerate((iou * same, iou * ~same) if count else ()):
            overlap[:, column] = allowed.max(axis=1)
            nearest[:, column] = np.where(overlap[:, column] > 0, allowed.argmax(axis=1) + len(objects), -1)
        parts.append((np.where(matched < 0, -1, matched + len(objects)), in_crowd & (matched < 0), nearest, overlap))
        found += candidates
        objects += own
    scores = np.array([record["score"] for record in found], dtype=np.float64)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Matching(found, objects, scores, _labels(found), _labels(objects), *columns)


def _labels(records: Sequence[Record]) -> Ints:
    return np.array([canonical_id(record["category_id"]) for record in records], dtype=np.int64)


def _match(iou: Floats, same: Bools, limit: float, any_class: bool) -> Ints:
    """The object that each detection takes, or -1. iou, same: (D, G), detections by descending score."""
    matched = np.full(len(iou), -1)
    free = np.ones(iou.shape[1], dtype=bool)
    candidates = iou >= limit if any_class else (iou >= limit) & same
    for d in np.flatnonzero(candidates.any(axis=1)):
        allowed = candidates[d] & free
        if (allowed & same[d]).any():
            allowed &= same[d]
        if allowed.any():
            overlap = np.where(allowed, iou[d], -1.0)
            matched[d] = len(overlap) - 1 - int(overlap[::-1].argmax())  # the last of equal ones, as in COCO
            free[matched[d]] = False
    return matched
