"""COCO average precision as a Hugging Face `evaluate` metric: `evaluate.load(hf_detr.evaluation.METRIC_PATH)`.

`evaluate` copies this file into its cache and runs it there, so it imports the package by its full name.
"""

from typing import Any

import datasets
import evaluate

from hf_detr.evaluation import METRICS, coco_metrics, records_from_batches
from hf_detr.model.annotations import canonical_id

_DESCRIPTION = "COCO average precision and recall of object detection: the twelve numbers, and AP per class."
_INPUTS = """
Args:
    predictions: one dict per image: `boxes` (N, 4), [x_min, y_min, x_max, y_max] in pixels of the image, `scores` (N,)
        and `labels` (N,), class ids from 0; the result of `post_process_object_detection` with threshold=0.
    references: one dict per image: `boxes` (M, 4) of the same form and `labels` (M,); optionally `area` (M,) in square
        pixels (default: the area of the box), `iscrowd` (M,), and `image_id`. Without `image_id` each reference is a
        separate image; several with the same id count once, as when processes repeat images to fill the last batch.
    id2label: in `compute`, class id to name; by default classes are named by their id.
    max_detections: in `compute`, the detections with the highest scores that count per image and class; default 100.

Returns:
    AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, and `per_class`: class name to AP.
"""


class CocoDetection(evaluate.Metric):
    # `evaluate` requires every field in every record, as plain lists
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and references of some images."""
        batch = {"predictions": predictions, "references": references}
        for name, records in batch.items():
            fields = self.features[name]
            batch[name] = [{key: _plain(record.get(key)) for key in fields} for record in records]
        for record in batch["references"]:  # numbers of any size, and text
            record["image_id"] = "" if record["image_id"] is None else str(canonical_id(record["image_id"]))
        super().add_batch(**batch, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add prediction and reference of one image."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        numbers, ids = datasets.Sequence(datasets.Value("float64")), datasets.Sequence(datasets.Value("int64"))
        boxes = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"boxes": boxes, "scores": numbers, "labels": ids},
                    "references": {
                        "boxes": boxes,
                        "labels": ids,
                        "area": numbers,
                        "iscrowd": ids,
                        "image_id": datasets.Value("string"),
                    },
                }
            ),
        )

    def _compute(
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        id2label: dict[int, str] | None = None,
        max_detections: int = 100,
    ) -> dict[str, Any]:
        given = [reference | {"image_id": reference["image_id"] or None} for reference in references]
        images, annotations, detections = records_from_batches(predictions, given)
        if id2label is None:
            ids = {record["category_id"] for record in annotations + detections}
            id2label = {i: str(i) for i in range(max(ids, default=0) + 1)}
        metrics = coco_metrics(images, annotations, detections, id2label, max_detections=max_detections)
        return {name: metrics[name] for name in (*METRICS, "per_class")}


def _plain(values: Any) -> Any:
    """Arrays, tensors and lists of them as numbers and lists."""
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return values.tolist() if hasattr(values, "tolist") else values
