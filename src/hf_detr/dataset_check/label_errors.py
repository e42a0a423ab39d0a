"""Annotations that a model contradicts: objects that were forgotten, mislabelled, badly placed, drawn twice, or that
are not there.

The model must not have been trained on these annotations, as it would have learned their errors. What it finds
confidently and the annotation denies is suspicious, as in confident learning (arXiv 1911.00068) and ObjectLab (arXiv
2309.00832); here all class probabilities of all queries are compared, not detections above a threshold. As in confident
learning, an object counts as not found relative to how confident the model usually is of the class: a model that
learned from wrong annotations is unsure of right ones, too.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, nms
from transformers.utils import logging

from ..data.schema import id2label, unique_names
from ..evaluation.evaluation_loop import predict_batches
from ..model.boxes import intersection_and_union
from ..model.post_processing import class_probabilities

logger = logging.get_logger(__name__)

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
MIN_CONFIDENCE = 0.1  # usual confidence below which a model does not find a class


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


@dataclass(frozen=True)
class ComparedAnnotation:
    """What the model predicts at one annotation.

    Args:
        label: class id of the annotation.
        support: the highest probability of this class at its place.
        presence: the highest probability of any class near it.
        contradicted: the strongest of the suspicions of a wrong class and a misplaced box, of any strength.
    """

    label: int
    support: float
    presence: float
    contradicted: LabelError


@dataclass(frozen=True)
class ComparedImage:
    """The annotations and predictions of one image, compared.

    Args:
        annotations: by index in the row; crowds are missing.
        duplicates: pairs of annotations of one object with the suspicion against the worse one.
        missing: predicted objects that no annotation covers.
    """

    annotations: Mapping[int, ComparedAnnotation]
    duplicates: Sequence[tuple[int, LabelError]]
    missing: Sequence[LabelError]

    def errors(self, usual: Mapping[int, float]) -> list[LabelError]:
        """The suspicions of at least `MIN_SUSPICION`, at most one per annotation.

        Args:
            usual: the model's usual confidence of each class, of `usual_confidence`.
        """
        found = {
            index: error
            for index, annotation in self.annotations.items()
            if (error := _strongest(annotation, usual[annotation.label])).suspicion >= MIN_SUSPICION
        }
        explained = {error.suggested_box for error in found.values() if error.kind == "misplaced"}
        for other, error in self.duplicates:
            assert error.annotation is not None
            if other not in found and error.annotation not in found:
                found[error.annotation] = error
        return [*found.values(), *(error for error in self.missing if error.suggested_box not in explained)]


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
        an annotation are reported once. "not an object" is not reported of classes that the model does not find
        (their usual confidence is below 0.1); a warning names them.

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
    compared: list[ComparedImage] = []
    for batch, outputs in predict_batches(model, loader, progress=progress, description="Predicting", masks=False):
        probabilities = class_probabilities(outputs).cpu()
        boxes = box_convert(outputs.pred_boxes.float().cpu(), "cxcywh", "xyxy").clamp(0, 1)
        for label, of_image, predicted in zip(batch["labels"], probabilities, boxes, strict=True):
            image_id, objects = rows[len(compared)]
            if int(label["image_id"]) != image_id:
                raise ValueError("The loader must have the images of the data set in its order.")
            height, width = label["orig_size"].tolist()
            scaled = predicted * torch.tensor([width, height, width, height])
            compared.append(compare(of_image, scaled, objects, len(compared)))
    usual = usual_confidence(compared)
    unknown = [f"{names[label]} ({usual[label]:.2f})" for label in sorted(usual) if usual[label] < MIN_CONFIDENCE]
    if unknown:
        logger.warning(
            f"The model does not find the classes {', '.join(unknown)}; the numbers are median probabilities at their "
            "annotations. It cannot tell which of these are wrong. Train it longer, or with more images of the classes."
        )
    errors = chain.from_iterable(image.errors(usual) for image in compared)
    return sorted(errors, key=lambda error: -error.suspicion)


def usual_confidence(images: Iterable[ComparedImage]) -> dict[int, float]:
    """The median probability of each class at its annotations, of which up to half may be wrong."""
    by_class: dict[int, list[float]] = {}
    for annotation in chain.from_iterable(image.annotations.values() for image in images):
        by_class.setdefault(annotation.label, []).append(annotation.support)
    return {label: statistics.median(supports) for label, supports in by_class.items()}


def _strongest(annotation: ComparedAnnotation, usual: float) -> LabelError:
    """The strongest suspicion against an annotation of a class in which the model has this confidence."""
    contradicted = annotation.contradicted
    absence = 1 - annotation.presence / usual if usual >= MIN_CONFIDENCE else 0.0
    if absence <= contradicted.suspicion:
        return contradicted
    return LabelError(
        "not an object", absence, contradicted.image, contradicted.annotation, annotation.label, None, None
    )


def compare(probabilities: Tensor, boxes: Tensor, objects: Mapping[str, Sequence[Any]], image: int) -> ComparedImage:
    """Compare the annotations of one image with its predictions.

    Args:
        probabilities: (Q, C) of the classes, without "no object"; `boxes` (Q, 4) xyxy in pixels.
        objects: of the row.
        image: index of the row.
    """
    crowd = torch.tensor(objects["iscrowd"], dtype=torch.bool)
    given = box_convert(torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")
    labels = torch.tensor(objects["category"], dtype=torch.int64)
    overlap = box_iou(boxes, given)  # (Q, G)
    if crowd.any():  # as in COCO: the fraction of a predicted box that lies in the crowd
        overlap[:, crowd] = _covered(boxes, given[crowd])
    return ComparedImage(
        annotations={
            index: _compare_annotation(index, probabilities, boxes, labels, overlap, image)
            for index in (~crowd).nonzero()[:, 0].tolist()
        },
        duplicates=_duplicates(given, labels, crowd, probabilities, overlap, image),
        missing=_missing(probabilities, boxes, overlap, image),
    )


def _compare_annotation(
    index: int, probabilities: Tensor, boxes: Tensor, labels: Tensor, overlap: Tensor, image: int
) -> ComparedAnnotation:
    label, iou = int(labels[index]), overlap[:, index]
    own = probabilities[:, label]
    support = float((own * (iou >= SAME_PLACE)).max())
    here = probabilities * (iou >= SAME_PLACE)[:, None]
    here[:, label] = 0
    for index_of_other in (labels != label).nonzero()[:, 0].tolist():  # an object that has an annotation of its own
        own_place = overlap[:, index_of_other] >= SAME_PLACE
        here[own_place, labels[index_of_other]] = 0
    query, other = divmod(int(here.argmax()), here.shape[1])
    wrong_class = float(here.max()) - support
    # a box of this class near by that fits no other annotation of the class better
    others = overlap * (labels == label)[None]
    others[:, index] = 0
    free = (iou >= NEAR) & (others.amax(1) < iou)
    fits = float((own * (iou >= SAME_BOX)).max())
    near = own * free * (iou < SAME_BOX)
    best = int(near.argmax())
    misplaced = (float(near.max()) - fits) * (1 - float(iou[best])) / (1 - NEAR)
    if wrong_class >= misplaced:
        error = LabelError("wrong class", wrong_class, image, index, label, other, _xywh(boxes[query]))
    else:
        error = LabelError("misplaced", misplaced, image, index, label, label, _xywh(boxes[best]))
    presence = float((probabilities.amax(1) * (iou >= NEAR)).max())
    return ComparedAnnotation(label, support, presence, error)


def _duplicates(
    given: Tensor,
    labels: Tensor,
    crowd: Tensor,
    probabilities: Tensor,
    overlap: Tensor,
    image: int,
) -> list[tuple[int, LabelError]]:
    """Pairs of annotations of one class that cover each other, unless the model finds an object for each.

    Returns:
        the index of the better annotation, and the suspicion against the worse one.
    """
    pairs = []
    between = box_iou(given, given).triu(1)
    for first, second in (between >= SAME_BOX).nonzero().tolist():
        same = labels[first] == labels[second] and not crowd[first] and not crowd[second]
        if not same:
            continue
        own = probabilities[:, labels[first]]
        at_both = (overlap[:, [first, second]] >= SAME_PLACE).all(1)
        if (own[at_both] > CONFIDENT).sum() > 1:
            continue
        support = (own[:, None] * overlap[:, [first, second]]).amax(0)
        better, worse = (first, second) if support[0] >= support[1] else (second, first)
        suspicion = float(between[first, second])
        pairs.append((better, LabelError("duplicate", suspicion, image, worse, int(labels[worse]), None, None)))
    return pairs


def _missing(probabilities: Tensor, boxes: Tensor, overlap: Tensor, image: int) -> list[LabelError]:
    """Predicted objects that no annotation covers, crowds included; of several at one place the most confident."""
    scores, classes = probabilities.max(1)
    covered = overlap.amax(1) if overlap.shape[1] else torch.zeros(len(boxes))
    suspicion = scores * (1 - covered)
    candidates = ((covered < SAME_PLACE) & (suspicion >= MIN_SUSPICION)).nonzero()[:, 0]
    kept = candidates[nms(boxes[candidates], scores[candidates], SAME_PLACE)]
    return [
        LabelError("missing", float(suspicion[query]), image, None, None, int(classes[query]), _xywh(boxes[query]))
        for query in kept.tolist()
    ]


def _covered(boxes: Tensor, regions: Tensor) -> Tensor:
    """Areas of the intersections over those of the boxes, (Q, 4) and (G, 4) xyxy to (Q, G)."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)
    return intersection_and_union(boxes[:, None], regions)[0] / area[:, None]


def _xywh(corners: Tensor) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(value, 2) for value in corners.tolist())
    return left, top, round(right - left, 2), round(bottom - top, 2)
