"""What kinds of errors cost how much, after TIDE (Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object
Detection Errors", arXiv 2008.08115, section 2).

With t_f = 0.5 (foreground) and t_b = 0.1 (background), a detection that found no object is one of

| type | its largest IoU |
|---|---|
| `localisation` | with an object of its class is in [t_b, t_f) |
| `classification` | with an object of another class is at least t_f |
| `duplicate` | with an object of its class is at least t_f, but a better detection found that object |
| `background` | with every object is at most t_b |
| `both` | with an object of another class is in between: wrong class and wrong place |

asked in this order, as in the authors' code where one detection could be several. `missed` is an object that no
detection found, and that no classification or localisation error would find if it were corrected.

Fixing a type means: classification, the detection gets the object's class; localisation, it gets the object's box; of
several such of this type for one object the best stays, the others go, as do those whose object was found anyway;
duplicate, background and both: the detection goes; missed: the object is no longer counted. The gain in AP50 is the
cost. AP is COCO's: the mean over the classes that have objects, with ties in the order of images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .coco_metrics import Record
from .detection_matching import ImageMatches, average_precision, match_images

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1


@dataclass(frozen=True)
class DetectionError:
    """One error.

    Attributes:
        kind: one of `ERROR_TYPES`; `image_id`: of the record.
        label: class id of the detection, or of the missed object; `score` of the detection, None if missed.
        truth_label: class id of the object it is about, if there is one.
        box: [x_min, y_min, width, height] in pixels, of the detection or the missed object.
        truth: number of the object in its image, crowds left out; None if it is about none.
        fixable: fixing it would find an object that nobody found.
    """

    kind: str
    image_id: int
    label: int
    score: float | None
    truth_label: int | None
    box: tuple[float, ...]
    truth: int | None
    fixable: bool


Entry = tuple[int, float, DetectionError | None]  # label and score of a detection, what is wrong with it


def find_errors(annotations: Sequence[Record], detections: Sequence[Record]) -> list[DetectionError]:
    """Every error of these detections, by image id, the best-scored first. Records as `coco_metrics` takes them."""
    errors: list[DetectionError] = []
    for image in match_images(annotations, detections, iou_threshold=FOREGROUND):
        wrong, missed = _errors_of(image)
        errors += [*(error for error in wrong if error), *missed]
    return errors


def _errors_of(image: ImageMatches) -> tuple[list[DetectionError | None], list[DetectionError]]:
    """What is wrong with each detection, None for right and ignored ones; and the missed objects."""
    found = np.zeros(len(image.truth_labels), dtype=bool)
    found[image.matched[image.matched >= 0]] = True
    covered = found.copy()
    same = image.labels[:, None] == image.truth_labels[None]
    wrong: list[DetectionError | None] = [None] * len(image.labels)
    for d in np.flatnonzero((image.matched < 0) & ~image.ignored).tolist():
        kind, truth = _kind(image.iou[d], same[d])
        fixable = kind in ("classification", "localisation") and truth is not None and not found[truth]
        if fixable:
            covered[truth] = True
        wrong[d] = DetectionError(
            kind=kind,
            image_id=image.image_id,
            label=int(image.labels[d]),
            score=float(image.scores[d]),
            truth_label=None if truth is None else int(image.truth_labels[truth]),
            box=tuple(image.boxes[d].tolist()),
            truth=truth,
            fixable=fixable,
        )
    missed = []
    for truth in np.flatnonzero(~covered).tolist():
        label, box = int(image.truth_labels[truth]), tuple(image.truth_boxes[truth].tolist())
        missed.append(DetectionError("missed", image.image_id, label, None, label, box, truth, fixable=False))
    return wrong, missed


def _kind(iou: Any, same: Any) -> tuple[str, int | None]:
    """Type of a detection that found nothing, and the object it is about. iou, same: (G,)."""
    if not len(iou):
        return "background", None
    of_class, of_others = iou * same, iou * ~same
    truth, other = int(of_class.argmax()), int(of_others.argmax())
    if BACKGROUND <= of_class[truth] < FOREGROUND:
        return "localisation", truth
    if of_others[other] >= FOREGROUND:
        return "classification", other
    if of_class[truth] >= FOREGROUND:
        return "duplicate", truth
    if iou.max() <= BACKGROUND:
        return "background", None
    return "both", other


def error_breakdown(
    annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """Each type of error: how many there are and what they cost. Definitions: the docstring of this module.

    As in the paper all detections take part, whatever their score; pass those of `above` to count what a user of a
    threshold sees.

    Returns:
        `ap50`: mean over the classes that have objects, in [0, 1], -1 if none has; `errors`: type to `count` and
        `delta_ap50`, the AP50 that fixing this type alone would add. A class whose objects are all missed leaves the
        mean when that is fixed; if no class is left, AP50 is 1.
    """
    entries: list[Entry] = []
    missed: list[DetectionError] = []
    objects = dict.fromkeys(id2label, 0)
    for image in match_images(annotations, detections, iou_threshold=FOREGROUND):
        wrong, missed_here = _errors_of(image)
        missed += missed_here
        entries += [
            (label, score, error)
            for label, score, error, ignored in zip(
                image.labels.tolist(), image.scores.tolist(), wrong, image.ignored.tolist(), strict=True
            )
            if not ignored
        ]
        for label in image.truth_labels.tolist():
            objects[label] += 1
    base = _ap50(entries, objects)
    errors = {}
    for kind in ERROR_TYPES:
        count = dict(objects)
        if kind == "missed":
            for error in missed:
                count[error.label] -= 1
        fixed = _ap50(_fix(entries, kind), count)
        if fixed < 0 <= base:
            fixed = 1.0
        number = len(missed) if kind == "missed" else sum(e is not None and e.kind == kind for *_, e in entries)
        errors[kind] = {"count": number, "delta_ap50": fixed - base}
    return {"ap50": base, "errors": errors}


def _fix(entries: list[Entry], kind: str) -> list[Entry]:
    """The detections after the errors of one type were corrected, or taken out."""
    best: dict[tuple[int, int | None], float] = {}
    for _, score, error in entries:
        if error is not None and error.kind == kind and error.fixable:
            key = (error.image_id, error.truth)
            best[key] = max(score, best.get(key, -1.0))
    fixed: list[Entry] = []
    for label, score, error in entries:
        if error is None or error.kind != kind:
            fixed.append((label, score, error))
        elif error.fixable and best.get((error.image_id, error.truth)) == score:
            del best[error.image_id, error.truth]  # one detection an object
            fixed.append((label if error.truth_label is None else error.truth_label, score, None))
    return fixed


def _ap50(entries: list[Entry], objects: Mapping[int, int]) -> float:
    labels = np.array([entry[0] for entry in entries], dtype=np.int64)
    scores = np.array([entry[1] for entry in entries], dtype=np.float64)
    correct = np.array([entry[2] is None for entry in entries], dtype=bool)
    values = [
        average_precision(scores[labels == label], correct[labels == label], count)
        for label, count in objects.items()
        if count
    ]
    return float(np.mean(values)) if values else -1.0


def worst_images(errors: Sequence[DetectionError], num_images: int = 12) -> list[dict[str, Any]]:
    """The images with the heaviest errors: a wrong detection weighs its score, a missed object 1.

    Args:
        errors: from `find_errors`, best over the detections of `above`, lest hundreds of faint ones outweigh all.

    Returns:
        heaviest first: `image_id`, `weight`, `errors` (their number) and `kinds`: type to number.
    """
    by_image: dict[int, list[DetectionError]] = {}
    for error in errors:
        by_image.setdefault(error.image_id, []).append(error)
    rows: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "weight": sum(1.0 if error.score is None else error.score for error in found),
            "errors": len(found),
            "kinds": {k: n for k in ERROR_TYPES if (n := sum(error.kind == k for error in found))},
        }
        for image_id, found in by_image.items()
    ]
    return sorted(rows, key=lambda row: (-row["weight"], row["image_id"]))[:num_images]
