"""COCO average precision, with faster-coco-eval as the engine."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..boxes import xyxy_to_xywh

if TYPE_CHECKING:
    from ..data import CocoDetection
    from ..image_processing_hf_detr import DetrImageProcessor

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
DESCRIPTIONS = {
    "AP": "average precision, IoU 0.50:0.95",
    "AP50": "average precision, IoU 0.50",
    "AP75": "average precision, IoU 0.75",
    "APs": "average precision, small objects (area < 32²)",
    "APm": "average precision, medium objects",
    "APl": "average precision, large objects (area > 96²)",
    "AR1": "average recall, 1 detection an image",
    "AR10": "average recall, 10 detections an image",
    "AR100": "average recall, 100 detections an image",
    "ARs": "average recall, small objects",
    "ARm": "average recall, medium objects",
    "ARl": "average recall, large objects",
}


class CocoEvaluator:
    """Collects detections batch by batch and measures them as COCO does.

    Detections are kept as plain COCO records; logits are not kept.

    Args:
        dataset: the images and objects to measure against. Every image counts, also one that `update` never saw.
    """

    def __init__(self, dataset: "CocoDetection") -> None:
        self.dataset = dataset
        self._detections: dict[int, list[dict[str, Any]]] = {}

    def update(self, image_ids: Iterable[int], results: Iterable[Mapping[str, Tensor]]) -> None:
        """Add the results of `post_process_object_detection` (boxes xyxy in pixels of the original image, threshold 0)
        for these images. An image seen twice, as the last batch's filling of several processes is, counts once."""
        for image_id, result in zip(image_ids, results, strict=True):
            boxes = xyxy_to_xywh(result["boxes"]).tolist()
            self._detections[int(image_id)] = [
                {
                    "image_id": int(image_id),
                    "category_id": self.dataset.category_ids[label],
                    "bbox": box,
                    "score": score,
                }
                for label, box, score in zip(result["labels"].tolist(), boxes, result["scores"].tolist(), strict=True)
                if label in self.dataset.category_ids
            ]

    def gather(self) -> None:
        """Bring the detections of all processes together; every process then has them all."""
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self._detections)
            self._detections = {image_id: records for part in parts for image_id, records in part.items()}

    def detections(self) -> list[dict[str, Any]]:
        """COCO results: `image_id`, `category_id` of the data set's file, `bbox` [x, y, width, height], `score`."""
        return [record for image_id in sorted(self._detections) for record in self._detections[image_id]]

    def compute(self) -> dict[str, Any]:
        """COCO's twelve numbers by the names in `METRICS`, in [0, 1] (-1 where there is nothing to measure), and
        `per_class`: class name to AP.

        Raises:
            ImportError: faster-coco-eval is not installed; the extra that has it is named.
        """
        try:
            from faster_coco_eval import COCO, COCOeval_faster
        except ImportError as error:
            raise ImportError("Evaluation needs faster-coco-eval: pip install 'hf_detr[evaluation]'") from error
        dataset = self.dataset
        truth = COCO(
            {
                "images": [{key: image[key] for key in ("id", "width", "height")} for image in dataset.images],
                "categories": [{"id": c, "name": dataset.id2label[i]} for i, c in sorted(dataset.category_ids.items())],
                "annotations": [
                    {
                        "id": number,
                        "image_id": image_id,
                        "category_id": dataset.category_ids[record["category_id"]],
                        "bbox": record["bbox"],
                        "area": _area(record),
                        "iscrowd": record.get("iscrowd") or 0,
                    }
                    for number, (image_id, record) in enumerate(
                        ((i, r) for i, records in dataset.annotations.items() for r in records), start=1
                    )
                ],
            }
        )
        found = self.detections()
        if not found:  # the engine refuses an empty list
            found = [
                {"image_id": dataset.images[0]["id"], "category_id": c, "bbox": [0.0, 0.0, 0.0, 0.0], "score": 0.0}
                for c in list(dataset.category_ids.values())[:1]
            ]
        engine = COCOeval_faster(truth, truth.loadRes(found), iouType="bbox", print_function=lambda *_: None)
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
        metrics: dict[str, Any] = dict(zip(METRICS, (float(value) for value in engine.stats[:12]), strict=True))
        precision = torch.as_tensor(engine.eval["precision"])[:, :, :, 0, -1]  # (IoU, recall, class)
        metrics["per_class"] = {}
        for position, (class_id, _) in enumerate(sorted(dataset.category_ids.items(), key=lambda pair: pair[1])):
            values = precision[:, :, position]
            values = values[values > -1]
            metrics["per_class"][dataset.id2label[class_id]] = float(values.mean()) if len(values) else -1.0
        return metrics


def _area(record: Mapping[str, Any]) -> float:
    area = record.get("area")
    return float(record["bbox"][2] * record["bbox"][3] if area is None else area)


@torch.no_grad()
def evaluate_detection(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    dataset: "CocoDetection",
    processor: "DetrImageProcessor",
    *,
    progress: bool = True,
) -> CocoEvaluator:
    """Run a model over batches of a data set; the detections of all processes come back together.

    Args:
        model: in any mode; it is left in the mode it came in.
        loader: batches as `DetectionCollator` makes them, on the model's device.
        progress: show a bar.
    """
    was_training = model.training
    model.eval()
    evaluator = CocoEvaluator(dataset)
    for batch in tqdm(loader, desc="Evaluating", disable=not progress, leave=False):
        labels = batch["labels"]
        outputs = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
        sizes = torch.stack([label["orig_size"] for label in labels])
        results = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        evaluator.update([label["image_id"].item() for label in labels], results)
    evaluator.gather()
    model.train(was_training)
    return evaluator


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The twelve numbers and the AP of each class as a table to print."""
    lines = [f"{name:6} {metrics[name]:7.4f}  {DESCRIPTIONS[name]}" for name in METRICS]
    width = max((len(name) for name in metrics["per_class"]), default=0)
    lines += ["", "AP of each class", *(f"  {name:{width}} {ap:7.4f}" for name, ap in metrics["per_class"].items())]
    return "\n".join(lines)
