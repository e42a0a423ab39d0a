"""Annotations that a model contradicts: objects that were forgotten, mislabelled, badly placed, drawn twice, or that
are not there.

The model must not have been trained on these annotations, as it would have learned their errors. What it finds
confidently and the annotation denies is suspicious, as in confident learning (arXiv 1911.00068) and ObjectLab (arXiv
2309.00832); here all class probabilities of all queries are compared, not detections above a threshold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, nms

from ..data.schema import id2label, unique_names
from ..evaluation.evaluation_loop import predict_batches
from ..model.post_processing import class_probabilities

KINDS = {
    "missing": "an object without an annotation",
    "wrong class": "an annotation whose class the model contradicts",
    "misplaced": "an annotation whose box does not fit the object",
    "duplicate": "a second annotation of one object",
    "not an object": "an annotation where the model finds nothing",
}
SAME_PLACE = 0.5  # IoU from which a prediction and an annotation are of the same object
NEAR = 0.1  # IoU from which an annotation may belong to a predicted object
SAME_BOX = 0.7  # IoU from which two annotations of a class are duplicates, and a box is well placed
CONFIDENT = 0.5  # probability from which a second prediction at one place is a second object
MIN_SUSPICION = 0.15  # weaker ones are not reported


@dataclass(frozen=True)
class LabelError:
    """One suspected annotation error.

    Args:
        kind: one of `KINDS`.
        suspicion: 0 to 1; the higher, the more the model disagrees.
        image: index of the row in the data set.
        annotation: index in the row's `objects`; None for a missing object.
        label: class id of the annotation; None for a missing object.
        suggested_label, suggested_box: class id and box (xywh in pixels) predicted by the model; None if the annotation
            should be deleted.
    """

    kind: str
    suspicion: float
    image: int
    annotation: int | None
    label: int | None
    suggested_label: int | None
    suggested_box: tuple[float, float, float, float] | None


def find_label_errors(
    model: Any, loader: Iterable[Mapping[str, Any]], dataset: Any, *, progress: bool = True
) -> list[LabelError]:
    """Compare a model's predictions with the annotations of a data set.

    Args:
        model: in any mode, which is restored. It must not have been trained on these annotations.
        loader: batches of the data set in its order, as `DetectionCollator` makes them.
        dataset: in the schema; its classes are those of the model. Crowd annotations are not checked, and predictions
            of which half lies in one are not reported as missing.

    Returns:
        the suspected errors, the highest suspicion first; at most one per annotation. Overlapping predictions without
        an annotation are reported once.

    Raises:
        ValueError: the model has other classes than the data set.
    """
    names = list(id2label(dataset).values())
    theirs = unique_names([name for _, name in sorted(model.config.id2label.items())])  # as they are loaded
    if names != theirs:
        raise ValueError(
            f"The model has the classes {theirs}, the data set {names}. Use a model that was trained on the classes of "
            "the data set, in the same order."
        )
    rows = list(zip(dataset["image_id"], dataset["objects"], strict=True))
    errors: list[LabelError] = []
    number = 0
    for batch, outputs in predict_batches(model, loader, progress=progress, description="Predicting", masks=False):
        probabilities = class_probabilities(outputs).cpu()
        boxes = box_convert(outputs.pred_boxes.float().cpu(), "cxcywh", "xyxy").clamp(0, 1)
        for label, of_image, predicted in zip(batch["labels"], probabilities, boxes, strict=True):
            image_id, objects = rows[number]
            if int(label["image_id"]) != image_id:
                raise ValueError("The loader must have the images of the data set in its order.")
            height, width = label["orig_size"].tolist()
            scaled = predicted * torch.tensor([width, height, width, height])
            errors += compare(of_image, scaled, objects, number)
            number += 1
    return sorted(errors, key=lambda error: -error.suspicion)


def compare(probabilities: Tensor, boxes: Tensor, objects: Mapping[str, Sequence[Any]], image: int) -> list[LabelError]:
    """The suspicions of one image.

    Args:
        probabilities: (Q, C) of the classes, without "no object"; `boxes` (Q, 4) xyxy in pixels.
        objects: of the row.
    """
    crowd = torch.tensor(objects["iscrowd"], dtype=torch.bool)
    given = box_convert(torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")
    labels = torch.tensor(objects["category"], dtype=torch.int64)
    overlap = box_iou(boxes, given)  # (Q, G)
    if crowd.any():  # as in COCO: the fraction of a predicted box that lies in the crowd
        overlap[:, crowd] = _covered(boxes, given[crowd])
    errors = [
        error
        for index in (~crowd).nonzero()[:, 0].tolist()
        if (error := _check(index, probabilities, boxes, labels, overlap, image)) is not None
    ]
    errors += _duplicates(given, labels, crowd, probabilities, overlap, {e.annotation for e in errors}, image)
    explained = {error.suggested_box for error in errors if error.kind == "misplaced"}
    errors += _missing(probabilities, boxes, overlap, explained, image)
    return errors


def _check(
    index: int, probabilities: Tensor, boxes: Tensor, labels: Tensor, overlap: Tensor, image: int
) -> LabelError | None:
    """The strongest suspicion against one annotation."""
    label, iou = int(labels[index]), overlap[:, index]
    own = probabilities[:, label]
    support = float((own * (iou >= SAME_PLACE)).max())
    suspicions: list[tuple[float, str, int | None, int | None]] = []  # suspicion, kind, query, class
    here = probabilities * (iou >= SAME_PLACE)[:, None]
    here[:, label] = 0
    for index_of_other in (labels != label).nonzero()[:, 0].tolist():  # an object that has an annotation of its own
        own_place = overlap[:, index_of_other] >= SAME_PLACE
        here[own_place, labels[index_of_other]] = 0
    query, other = divmod(int(here.argmax()), here.shape[1])
    suspicions.append((float(here.max()) - support, "wrong class", query, other))
    # a box of this class near by that fits no other annotation of the class better
    others = overlap * (labels == label)[None]
    others[:, index] = 0
    free = (iou >= NEAR) & (others.amax(1) < iou)
    fits = float((own * (iou >= SAME_BOX)).max())
    near = own * free * (iou < SAME_BOX)
    best = int(near.argmax())
    suspicions.append(((float(near.max()) - fits) * (1 - float(iou[best])) / (1 - NEAR), "misplaced", best, label))
    anything = float((probabilities.amax(1) * (iou >= NEAR)).max())
    suspicions.append((1 - max(anything, support), "not an object", None, None))
    suspicion, kind, found, suggested = max(suspicions, key=lambda each: each[0])
    if suspicion < MIN_SUSPICION:
        return None
    box = None if found is None else _xywh(boxes[found])
    return LabelError(kind, suspicion, image, index, label, suggested, box)


def _duplicates(
    given: Tensor,
    labels: Tensor,
    crowd: Tensor,
    probabilities: Tensor,
    overlap: Tensor,
    known: set[int | None],
    image: int,
) -> list[LabelError]:
    """Annotations of one class that cover each other, unless the model finds an object for each."""
    errors = []
    between = box_iou(given, given).triu(1)
    for first, second in (between >= SAME_BOX).nonzero().tolist():
        same = labels[first] == labels[second] and not crowd[first] and not crowd[second]
        if not same or {first, second} & known:
            continue
        own = probabilities[:, labels[first]]
        at_both = (overlap[:, [first, second]] >= SAME_PLACE).all(1)
        if (own[at_both] > CONFIDENT).sum() > 1:
            continue
        support = (own[:, None] * overlap[:, [first, second]]).amax(0)
        worse = second if support[0] >= support[1] else first
        known = known | {worse}
        errors.append(
            LabelError("duplicate", float(between[first, second]), image, worse, int(labels[worse]), None, None)
        )
    return errors


def _missing(
    probabilities: Tensor, boxes: Tensor, overlap: Tensor, explained: set[Any], image: int
) -> list[LabelError]:
    """Predicted objects that no annotation covers, crowds included; of several at one place the most confident."""
    scores, classes = probabilities.max(1)
    covered = overlap.amax(1) if overlap.shape[1] else torch.zeros(len(boxes))
    suspicion = scores * (1 - covered)
    candidates = ((covered < SAME_PLACE) & (suspicion >= MIN_SUSPICION)).nonzero()[:, 0]
    kept = candidates[nms(boxes[candidates], scores[candidates], SAME_PLACE)]
    return [
        LabelError("missing", float(suspicion[query]), image, None, None, int(classes[query]), box)
        for query in kept.tolist()
        if (box := _xywh(boxes[query])) not in explained
    ]


def _covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Areas of the intersections over those of the boxes, (Q, 4) and (G, 4) xyxy to (Q, G)."""
    low = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)
    return (high - low).clamp(min=0).prod(2) / area[:, None]


def _xywh(corners: Tensor) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(value, 2) for value in corners.tolist())
    return left, top, round(right - left, 2), round(bottom - top, 2)
