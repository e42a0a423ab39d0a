"""What is wrong with the detections: thresholds, confusions, types of errors and the worst images, as plain numbers.

All functions take records as `coco_metrics` does, and count all detections, however many an image has. Detections in
crowds do not count. The types of errors follow TIDE (Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object
Detection Errors", arXiv 2008.08115, section 2). hotcoco's `tide_errors` counts overlap with a crowd as overlap with an
object, and gives a class without any detection no cost of missed objects, so they are computed here.

With t_f = 0.5 (foreground) and t_b = 0.1 (background), a detection that found no object has the first type that fits:

| type | its largest IoU |
|---|---|
| `localisation` | with an object of its class is in [t_b, t_f) |
| `classification` | with an object of another class is at least t_f |
| `duplicate` | with an object of its class is at least t_f, but a detection with a higher score found that object |
| `background` | with every object is at most t_b |
| `both` | with an object of another class is between them: wrong class and wrong box |

`missed` is an object that no detection found, and that no corrected classification or localisation error would find.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..model.annotations import canonical_id
from ..runtime.extras import import_extra
from .coco_metrics import Floats, Record, class_names, id_order
from .detection_matching import Bools, Ints, Matching, match_detections

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1
THRESHOLDS = np.linspace(0.0, 1.0, 101)
DEFAULT_THRESHOLD = 0.5


# -- thresholds ----------------------------------------------------------------------------------------------------


def f1_by_threshold(
    annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str], iou_threshold: float = 0.5
) -> dict[str, Any]:
    """F1 = 2 TP / (2 TP + FP + FN) of the detections whose score reaches a threshold, and the best threshold per class.
    hotcoco's `f_scores` gives the best F1 as a mean over classes, without the thresholds.

    The best threshold lies midway between the lowest kept and the highest dropped score (0 if all are kept), so that
    rounding of scores does not matter; of several with the same F1, it is the highest.

    Returns:
        `threshold`: 101 values; `f1`: class name to 101 values; `best`: class name to `threshold`, `f1`, `precision`,
        `recall` and `objects`. Without a true positive `threshold` is None.
    """
    matching = match_detections(annotations, detections, iou_threshold=iou_threshold)
    curves: dict[str, list[float]] = {}
    best: dict[str, dict[str, Any]] = {}
    for label, name in zip(sorted(id2label), class_names(id2label), strict=True):
        chosen = (matching.labels == label) & ~matching.ignored
        objects = int((matching.object_labels == label).sum())
        order = np.argsort(-matching.scores[chosen], kind="stable")
        ranked = matching.scores[chosen][order]
        hits = np.append(0, np.cumsum(matching.matched[chosen][order] >= 0))
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
    """The best threshold per class in the order of class ids, from the result of `f1_by_threshold`; `default` for
    classes that have none. A processor's `class_thresholds` takes this list."""
    return [default if row["threshold"] is None else row["threshold"] for row in f1["best"].values()]


def above(detections: Sequence[Record], threshold: float | Sequence[float]) -> list[Record]:
    """Detections whose score reaches the threshold, one for all classes or one per class."""
    limits = threshold if isinstance(threshold, Sequence) else None
    return [d for d in detections if d["score"] >= (threshold if limits is None else limits[d["category_id"]])]


# -- confusions ----------------------------------------------------------------------------------------------------


def confusion_matrix(
    annotations: Sequence[Record],
    detections: Sequence[Record],
    id2label: Mapping[int, str],
    *,
    threshold: float | Sequence[float] = DEFAULT_THRESHOLD,
    iou_threshold: float = 0.5,
) -> list[list[int]]:
    """Counts (N+1) x (N+1): rows are the classes of objects, columns predicted classes; the last of each is background.
    hotcoco's `confusion_matrix` counts detections in crowds as errors and has one threshold for all classes.

    In the order of descending scores, each detection takes the unmatched object with the largest IoU, if that reaches
    the threshold, and prefers objects of its own class. Unmatched objects are in the last column, unmatched detections
    in the last row.
    """
    background = len(id2label)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    matching = match_detections(annotations, above(detections, threshold), iou_threshold=iou_threshold, any_class=True)
    hit = matching.matched >= 0
    np.add.at(matrix, (matching.object_labels[matching.matched[hit]], matching.labels[hit]), 1)
    matrix[-1] += np.bincount(matching.labels[~hit & ~matching.ignored], minlength=background + 1)
    matrix[:, -1] += np.bincount(matching.object_labels[matching.missed], minlength=background + 1)
    counts: list[list[int]] = matrix.tolist()
    return counts


# -- types of errors -----------------------------------------------------------------------------------------------


class DetectionError(NamedTuple):
    """One of `ERROR_TYPES`, and the record of the detection, or of the missed object."""

    kind: str
    record: Record


class _Errors(NamedTuple):
    kinds: NDArray[np.str_]  # (D,) type of each detection, "" for true positives and ignored ones
    targets: Ints  # (D,) the object that a corrected detection would find, or -1
    missed: Ints  # (M,) objects


def find_errors(annotations: Sequence[Record], detections: Sequence[Record]) -> list[DetectionError]:
    """Every error of these detections: wrong ones by image id and descending score, then missed objects."""
    matching = match_detections(annotations, detections, iou_threshold=FOREGROUND)
    errors = _classify(matching)
    wrong = [DetectionError(str(errors.kinds[d]), matching.detections[d]) for d in np.flatnonzero(errors.kinds != "")]
    return wrong + [DetectionError("missed", matching.objects[index]) for index in errors.missed]


def _classify(matching: Matching) -> _Errors:
    same, other = matching.overlap.T
    conditions = {
        "": (matching.matched >= 0) | matching.ignored,
        "localisation": (same >= BACKGROUND) & (same < FOREGROUND),
        "classification": other >= FOREGROUND,
        "duplicate": same >= FOREGROUND,
        "background": np.maximum(same, other) <= BACKGROUND,
    }
    kinds = np.select(list(conditions.values()), list(conditions), default="both")
    targets = np.select([kinds == "localisation", kinds == "classification"], matching.nearest.T, default=-1)
    targets[~np.isin(targets, matching.missed)] = -1
    return _Errors(kinds, targets, np.setdiff1d(matching.missed, targets))


def error_breakdown(
    annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """Number and cost of each type of error; the definitions are in the docstring of this module.

    The cost is the gain in AP50 if all errors of one type were corrected: `classification` and `localisation` become
    true positives of the object, the one with the highest score if there are several of the type, and the others, those
    of an object that was found, and errors of the other types are removed; objects that were `missed` are not counted.
    As in the paper all detections take part; pass those of `above` to count what a user of a threshold sees.

    Returns:
        `ap50`: mean over the classes that have objects, in [0, 1], -1 if none has; `errors`: type to `count` and
        `delta_ap50`. A class whose objects are all missed drops out of the mean when that is corrected; if no class
        is left, AP50 is 1.
    """
    matching = match_detections(annotations, detections, iou_threshold=FOREGROUND)
    kinds, targets, missed = _classify(matching)
    objects = np.bincount(matching.object_labels, minlength=len(id2label))
    labels, correct = matching.labels, matching.matched >= 0
    base = _ap50(matching.scores, labels, correct, matching.ignored, objects)
    errors = {}
    for kind in ERROR_TYPES:
        if kind == "missed":
            left = objects - np.bincount(matching.object_labels[missed], minlength=len(id2label))
            fixed = _ap50(matching.scores, labels, correct, matching.ignored, left)
            fixed = 1.0 if fixed < 0 <= base else fixed
        else:
            of_kind = kinds == kind
            candidates = np.flatnonzero(of_kind & (targets >= 0))
            candidates = candidates[np.argsort(-matching.scores[candidates], kind="stable")]
            best = candidates[np.unique(targets[candidates], return_index=True)[1]]  # one detection per object
            new_labels, new_correct, removed = labels.copy(), correct.copy(), matching.ignored | of_kind
            new_labels[best], new_correct[best], removed[best] = matching.object_labels[targets[best]], True, False
            fixed = _ap50(matching.scores, new_labels, new_correct, removed, objects)
        count = len(missed) if kind == "missed" else int((kinds == kind).sum())
        errors[kind] = {"count": count, "delta_ap50": fixed - base}
    return {"ap50": base, "errors": errors}


def _ap50(scores: Floats, labels: Ints, correct: Bools, ignored: Bools, objects: Ints) -> float:
    average_precision = import_extra("hotcoco", "evaluation").metrics.average_precision
    values = []
    for label in np.flatnonzero(objects):
        chosen = (labels == label) & ~ignored
        values.append(average_precision(scores[chosen], correct[chosen], int(objects[label])))
    return float(np.mean(values)) if values else -1.0


def worst_images(errors: Sequence[DetectionError], num_images: int = 12) -> list[dict[str, Any]]:
    """The images with the largest weight of errors: the score of each wrong detection, and 1 per missed object.

    Args:
        errors: from `find_errors`, best over the detections of `above`; otherwise hundreds of low scores add up.

    Returns:
        largest weight first: `image_id`, `weight`, `errors` (their number) and `kinds`: type to number.
    """
    by_image: dict[Any, list[DetectionError]] = {}
    for error in errors:
        by_image.setdefault(canonical_id(error.record["image_id"]), []).append(error)
    rows: list[dict[str, Any]] = [
        {
            "image_id": found[0].record["image_id"],
            "weight": sum(1.0 if error.kind == "missed" else error.record["score"] for error in found),
            "errors": len(found),
            "kinds": {k: n for k in ERROR_TYPES if (n := sum(error.kind == k for error in found))},
        }
        for found in by_image.values()
    ]
    return sorted(rows, key=lambda row: (-row["weight"], id_order(row["image_id"])))[:num_images]
