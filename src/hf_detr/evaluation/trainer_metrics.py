"""The same numbers from what other loops hold: lists of predictions and references, and transformers' `Trainer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import EvalPrediction

from ..model.boxes import cxcywh_to_xyxy
from ..model.outputs import DetrDetectionOutput
from .coco_metrics import coco_metrics, no_garbage_collection
from .detection_matching import Floats

if TYPE_CHECKING:
    from ..model.image_processing_hf_detr import DetrImageProcessor

METRIC_PATH = str(Path(__file__).parent / "coco_detection")
"""`evaluate.load(METRIC_PATH)` gives the metric of Hugging Face's `evaluate`."""

Records = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]


@no_garbage_collection()
def records_from_batches(predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> Records:
    """Images, annotations and detections as `coco_metrics` takes them.

    Args:
        predictions: an image each: `boxes` (N, 4) xyxy in pixels, `scores` (N,), `labels` (N,) class ids.
        references: an image each: `boxes` (M, 4) xyxy in pixels, `labels` (M,), and optionally `area` (M,), `iscrowd`
            (M,) and `image_id`. Without `image_id` each is an image of its own; of an id that comes twice the last
            counts.

    Raises:
        ValueError: the two do not fit together; the message names the image.
    """
    if len(predictions) != len(references):
        raise ValueError(f"There are predictions for {len(predictions)} images but references for {len(references)}.")
    given = [reference.get("image_id") is not None for reference in references]
    if any(given) and not all(given):
        raise ValueError(f"Reference {given.index(False)} has no image_id, but others have: give all or none.")
    by_image: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        image_id = int(reference["image_id"]) if given[number] else number
        where = f"image {image_id} (number {number})"
        truth, found = _xywh(reference["boxes"], where), _xywh(prediction["boxes"], where)
        optional = {key: _numbers(reference, key, len(truth), where) for key in ("area", "iscrowd")}
        labels = _numbers(reference, "labels", len(truth), where)
        said, scores = (_numbers(prediction, key, len(found), where) for key in ("labels", "scores"))
        if labels is None or said is None or scores is None:
            raise ValueError(f"A reference needs boxes and labels, a prediction also scores; {where} lacks some.")
        annotations = [
            {"image_id": image_id, "category_id": label, "bbox": box}
            | {key: values[i] for key, values in optional.items() if values is not None}
            for i, (label, box) in enumerate(zip(labels, truth.tolist(), strict=True))
        ]
        detections = [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(said, found.tolist(), scores, strict=True)
        ]
        by_image[image_id] = annotations, detections
    return (
        [{"id": image_id} for image_id in by_image],
        [record for annotations, _ in by_image.values() for record in annotations],
        [record for _, detections in by_image.values() for record in detections],
    )


def _xywh(boxes: Any, where: str) -> Floats:
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    size = corners[:, 2:] - corners[:, :2]
    if (size < 0).any():
        box = corners[(size < 0).any(axis=1)][0].tolist()
        raise ValueError(f"Box {box} of {where} must be [x_min, y_min, x_max, y_max], in pixels.")
    return np.concatenate((corners[:, :2], size), axis=1)


def _numbers(record: Mapping[str, Any], key: str, count: int, where: str) -> list[Any] | None:
    values = record.get(key)
    if values is not None and len(values) != count:
        raise ValueError(f"There are {count} boxes but {len(values)} {key} for {where}.")
    return None if values is None else np.asarray(values).tolist()


class TrainerMetrics:
    """For transformers' `Trainer`: COCO's twelve numbers, and `AP_NAME` of each class.

        metrics = TrainerMetrics(processor, model.config.id2label)
        Trainer(
            args=TrainingArguments(..., eval_do_concat_batches=False),
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.collect,
        )

    `collect` reduces each batch to boxes as it comes, so that memory stays flat, and it does so before the Trainer
    gathers: that cuts every tensor of a smaller last batch, labels included, to as many entries as the batch has images
    (transformers 5.23, its issue 25939), and cannot join labels of different lengths from several processes. So labels
    are not handed on, and the processes are brought together here instead.

    Objects are taken from the labels, which leave crowds out. On data with crowds compare by `CocoEvaluator`.
    """

    def __init__(self, processor: "DetrImageProcessor", id2label: Mapping[int, str]) -> None:
        self.processor = processor
        self.id2label = {int(i): name for i, name in id2label.items()}
        self._images: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # image id -> prediction, reference

    def collect(self, outputs: Any, labels: list[Mapping[str, Any]]) -> Tensor:
        """`preprocess_logits_for_metrics`: keep the boxes of a batch, and hand the Trainer next to nothing.

        Args:
            outputs: of the model without the loss, as a tuple: its first two tensors (B, Q, ...) are `logits` and
                `pred_boxes`, whatever dicts come before and hidden states after.
            labels: the Trainer's own list of them, which is emptied: it would go on to gather it.
        """
        logits, pred_boxes = [value for value in outputs if getattr(value, "ndim", 0) == 3][:2]
        sizes = torch.stack([label["orig_size"] for label in labels])
        results = self.processor.post_process_object_detection(
            DetrDetectionOutput(logits=logits, pred_boxes=pred_boxes), threshold=0.0, target_sizes=sizes
        )
        for label, result in zip(labels, results, strict=True):
            prediction = {key: value.cpu().numpy() for key, value in result.items()}
            self._images[int(label["image_id"])] = prediction, _reference(label)
        labels.clear()
        return logits.new_zeros(len(results))

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """`compute_metrics`: the numbers of all batches since the last call.

        Args:
            prediction: from the Trainer; not looked at.
            compute_result: from the Trainer with `batch_eval_metrics`: whether this was the last batch.

        Raises:
            ValueError: `collect` was not given to the Trainer.
        """
        if not compute_result:
            return {}
        images = self._images
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, images)
            images = {image_id: found for part in parts for image_id, found in part.items()}
        if not images:
            raise ValueError(
                "No batches were collected: give the Trainer preprocess_logits_for_metrics=metrics.collect."
            )
        self._images = {}
        predictions, references = zip(*(found for _, found in sorted(images.items())), strict=True)
        metrics = coco_metrics(*records_from_batches(predictions, references), self.id2label)
        per_class: dict[str, float] = metrics.pop("per_class")
        return metrics | {f"AP_{name}": ap for name, ap in per_class.items()}


def _reference(label: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of an image back to pixels of the original image, area included."""
    label = {key: value.double().cpu() for key, value in label.items()}
    height, width = label["orig_size"].tolist()
    boxes = cxcywh_to_xyxy(label["boxes"]).reshape(-1, 4) * torch.tensor([width, height, width, height])
    reference = {
        "image_id": int(label["image_id"]),
        "boxes": boxes.numpy(),
        "labels": label["class_labels"].long().numpy(),
    }
    if "area" in label:
        resized_height, resized_width = label["size"].tolist()
        reference["area"] = (label["area"] * (height / resized_height) * (width / resized_width)).numpy()
    return reference
