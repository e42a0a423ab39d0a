"""What stands behind an average precision: curves, thresholds, confusions and the worst images, as plain numbers.

All functions take records as `coco_metrics` does: annotations with `image_id`, `category_id` (a class id), `bbox`
[x_min, y_min, width, height], `iscrowd`; detections with `score` besides. What lies in crowds is not counted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .coco_metrics import Record, class_names
from .detection_matching import RECALLS, Bools, Floats, interpolated_precision, match_images

THRESHOLDS = np.linspace(0.0, 1.0, 101)
DEFAULT_THRESHOLD = 0.5


def detections_by_class(
    annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str], iou_threshold: float = 0.5
) -> dict[int, tuple[Floats, Bools, int]]:
    """Class id to the scores (D,) of its detections, whether each found an object (D,), and the number of objects."""
    scores: dict[int, list[Any]] = {i: [np.empty(0)] for i in id2label}
    correct: dict[int, list[Any]] = {i: [np.empty(0, dtype=bool)] for i in id2label}
    objects = dict.fromkeys(id2label, 0)
    for image in match_images(annotations, detections, iou_threshold=iou_threshold):
        for label in np.unique(image.labels).tolist():
            chosen = (image.labels == label) & ~image.ignored
            scores[label].append(image.scores[chosen])
            correct[label].append(image.matched[chosen] >= 0)
        for label in image.truth_labels.tolist():
            objects[label] += 1
    return {i: (np.concatenate(scores[i]), np.concatenate(correct[i]), objects[i]) for i in sorted(id2label)}


def precision_recall(
    annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str], iou_threshold: float = 0.5
) -> dict[str, Any]:
    """Interpolated precision at COCO's 101 recalls.

    Returns:
        `recall`: 101 values; `precision`: class name to 101 values, their mean being the class's AP at this IoU.
        Classes without objects are left out.
    """
    found = detections_by_class(annotations, detections, id2label, iou_threshold)
    return {
        "recall": RECALLS.tolist(),
        "precision": {
            name: interpolated_precision(scores, correct, objects).tolist()
            for name, (scores, correct, objects) in zip(class_names(id2label), found.values(), strict=True)
            if objects
        },
    }


def f1_by_threshold(
    annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str], iou_threshold: float = 0.5
) -> dict[str, Any]:
    """F1 = 2 TP / (2 TP + FP + FN) of the detections whose score reaches a threshold, and the best one of each class.

    The best threshold lies midway between the lowest score kept and the highest one dropped (0, if all are kept), so
    that the last digits of a score do not decide; of several with the same F1, the highest.

    Returns:
        `threshold`: 101 values; `f1`: class name to 101 values; `best`: class name to `threshold`, `f1`, `precision`,
        `recall` and `objects`. Without a true detection `threshold` is None.
    """
    found = detections_by_class(annotations, detections, id2label, iou_threshold)
    curves: dict[str, list[float]] = {}
    best: dict[str, dict[str, Any]] = {}
    for name, (scores, correct, objects) in zip(class_names(id2label), found.values(), strict=True):
        order = np.argsort(-scores, kind="mergesort")
        ranked, hits = scores[order], np.append(0, np.cumsum(correct[order]))
        f1 = 2 * hits / np.maximum(np.arange(len(hits)) + objects, 1)  # by the number of detections kept
        curves[name] = f1[np.searchsorted(-ranked, -THRESHOLDS, side="right")].tolist()
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) + 1 if len(ranked) else np.zeros(1, int)
        kept = int(ends[f1[ends].argmax()])  # equal scores are kept together
        lower = ranked[kept] if kept < len(ranked) else 0.0
        best[name] = {
            "threshold": float((ranked[kept - 1] + lower) / 2) if f1[kept] else None,
            "f1": float(f1[kept]),
            "precision": float(hits[kept] / kept) if f1[kept] else 0.0,
            "recall": float(hits[kept] / objects) if f1[kept] else 0.0,
            "objects": objects,
        }
    return {"threshold": THRESHOLDS.tolist(), "f1": curves, "best": best}


def best_thresholds(f1: Mapping[str, Any], default: float = DEFAULT_THRESHOLD) -> list[float]:
    """The best threshold of each class, by class id, from the result of `f1_by_threshold`; `default` for classes that
    have none. This is what a processor's `class_thresholds` takes."""
    return [default if row["threshold"] is None else row["threshold"] for row in f1["best"].values()]


def above(detections: Sequence[Record], threshold: float | Sequence[float]) -> list[Record]:
    """Detections whose score reaches the threshold, one for all or one a class."""
    limit = threshold if isinstance(threshold, Sequence) else None
    return [d for d in detections if d["score"] >= (threshold if limit is None else limit[d["category_id"]])]


def confusion_matrix(
    annotations: Sequence[Record],
    detections: Sequence[Record],
    id2label: Mapping[int, str],
    *,
    threshold: float | Sequence[float] = DEFAULT_THRESHOLD,
    iou_threshold: float = 0.5,
) -> list[list[int]]:
    """Counts (N+1) x (N+1): rows are what is there, columns what was said; the last of each is background.

    The best detection first, each takes the object it overlaps most that nobody took before, if their IoU reaches the
    threshold: one of its own class if there is such a one. Objects nobody took are in the last column, detections that
    took none in the last row.
    """
    background = len(id2label)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image in match_images(annotations, above(detections, threshold), iou_threshold=iou_threshold, any_class=True):
        hit = image.matched >= 0
        truth = image.truth_labels[image.matched[hit]]
        np.add.at(matrix, (truth, image.labels[hit]), 1)
        matrix[background] += np.bincount(image.labels[~hit & ~image.ignored], minlength=background + 1)
        missed = np.delete(image.truth_labels, image.matched[hit])
        matrix[:, background] += np.bincount(missed, minlength=background + 1)
    counts: list[list[int]] = matrix.tolist()
    return counts
