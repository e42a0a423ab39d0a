"""COCO's numbers for other evaluation loops: lists of predictions and references, and transformers' `Trainer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import box_convert
from transformers import EvalPrediction

from ..model.annotations import canonical_id
from ..model.outputs import DetrDetectionOutput
from .coco_metrics import MAX_DETECTIONS, Floats, coco_metrics, id_order, no_garbage_collection

if TYPE_CHECKING:
    from ..model.image_processing_hf_detr import DetrImageProcessor

METRIC_PATH = str(Path(__file__).parent / "coco_detection")
"""`evaluate.load(METRIC_PATH)` loads the metric for Hugging Face's `evaluate`."""

Records = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]


@no_garbage_collection()
def records_from_batches(predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> Records:
    """Images, annotations and detections as `coco_metrics` takes them.

    Args:
        predictions: one dict per image: `boxes` (N, 4) xyxy in pixels, `scores` (N,), `labels` (N,) class ids.
        references: one dict per image: `boxes` (M, 4) xyxy in pixels, `labels` (M,), and optionally `area` (M,),
            `iscrowd` (M,) and `image_id`. Without `image_id` each reference is a separate image; of several with the
            same id the last counts.

    Raises:
        ValueError: predictions and references do not match; the message names the image.
    """
    if len(predictions) != len(references):
        raise ValueError(f"There are predictions for {len(predictions)} images but references for {len(references)}.")
    given = [reference.get("image_id") is not None for reference in references]
    if any(given) and not all(given):
        raise ValueError(f"Reference {given.index(False)} has no image_id, but others have: give all or none.")
    by_image: dict[Any, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        image_id = canonical_id(reference["image_id"]) if given[number] else number
        where = f"image {image_id} (number {number})"
        objects = {"bbox": _xywh(reference["boxes"], where), "category_id": reference.get("labels")}
        found = {"bbox": _xywh(prediction["boxes"], where), "category_id": prediction.get("labels")}
        found["score"] = prediction.get("scores")
        if any(values is None for values in (*objects.values(), *found.values())):
            raise ValueError(f"A reference needs boxes and labels, a prediction also scores; {where} lacks some.")
        optional = {key: reference[key] for key in ("area", "iscrowd") if reference.get(key) is not None}
        by_image[image_id] = _records(image_id, objects | optional, where), _records(image_id, found, where)
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


def _records(image_id: Any, columns: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One record per box from columns of equal length."""
    count = len(columns["bbox"])
    for key, values in columns.items():
        if len(values) != count:
            name = {"category_id": "labels", "score": "scores"}.get(key, key)
            raise ValueError(f"There are {count} boxes but {len(values)} {name} for {where}.")
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    return [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in rows]


class TrainerMetrics:
    """For transformers' `Trainer`: COCO's twelve numbers, and `AP_NAME` per class.

        metrics = TrainerMetrics(processor, model.config.id2label)
        Trainer(
            args=TrainingArguments(output_dir, remove_unused_columns=False, eval_do_concat_batches=False),
            data_collator=DetectionCollator(processor),
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.collect,
        )

    `collect` reduces each batch to boxes before the Trainer gathers it, so that memory use stays low. The Trainer's own
    gathering cuts every tensor of a smaller last batch, labels included, to as many entries as the batch has images
    (transformers 5.23, its issue 25939), and cannot concatenate labels of different lengths from several processes.
    Labels are therefore kept here, and processes exchange them in `__call__`.

    Objects come from the labels, which have no crowds. Use `CocoEvaluator` for data with crowds.
    """

    def __init__(
        self,
        processor: "DetrImageProcessor",
        id2label: Mapping[int, str],
        *,
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        self.processor = processor
        self.id2label = {int(i): name for i, name in id2label.items()}
        self.max_detections = max_detections
        self._images: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}  # image id -> prediction, reference

    def collect(self, outputs: Any, labels: list[Mapping[str, Any]]) -> Tensor:
        """`preprocess_logits_for_metrics`: keep the boxes of a batch and return a placeholder for the Trainer.

        Args:
            outputs: of the model without the loss, as a tuple: its first two tensors of three dimensions are `logits`
                and `pred_boxes`; dicts before them and hidden states after them are skipped.
            labels: the Trainer's list, which is emptied so that the Trainer does not gather it.
        """
        logits, pred_boxes = [value for value in outputs if getattr(value, "ndim", 0) == 3][:2]
        has_no_object = logits.shape[-1] == len(self.id2label) + 1
        independent = None if has_no_object else logits.float().sigmoid()
        sizes = torch.stack([label["orig_size"] for label in labels])
        results = self.processor.post_process_object_detection(
            DetrDetectionOutput(logits=logits, pred_boxes=pred_boxes, class_probabilities=independent),
            threshold=0.0,
            target_sizes=sizes,
        )
        for label, result in zip(labels, results, strict=True):
            prediction = {key: value.cpu().numpy() for key, value in result.items()}
            self._images[canonical_id(label["image_id"])] = prediction, _reference(label)
        labels.clear()
        return logits.new_zeros(len(results))

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """`compute_metrics`: the numbers of all batches since the last call.

        Args:
            prediction: from the Trainer; unused.
            compute_result: from the Trainer with `batch_eval_metrics`: whether this was the last batch.

        Raises:
            ValueError: the Trainer did not call `collect`.
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
        predictions, references = zip(*(images[image_id] for image_id in sorted(images, key=id_order)), strict=True)
        metrics = coco_metrics(
            *records_from_batches(predictions, references), self.id2label, max_detections=self.max_detections
        )
        per_class: dict[str, float] = metrics.pop("per_class")
        return metrics | {f"AP_{name}": ap for name, ap in per_class.items()}


def _reference(label: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of an image converted back to pixels of the original image, including the area."""
    height, width = label["orig_size"].tolist()
    boxes = box_convert(label["boxes"].double().cpu().reshape(-1, 4), "cxcywh", "xyxy")
    reference = {
        "image_id": canonical_id(label["image_id"]),
        "boxes": (boxes * torch.tensor([width, height, width, height])).numpy(),
        "labels": label["class_labels"].long().cpu().numpy(),
    }
    if "area" in label:
        resized_height, resized_width = label["size"].tolist()
        scale = (height / resized_height) * (width / resized_width)
        reference["area"] = (label["area"].double().cpu() * scale).numpy()
    return reference
