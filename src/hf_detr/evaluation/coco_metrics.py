"""COCO average precision, with faster-coco-eval as the engine: over records, and for a model over a data set."""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.boxes import xyxy_to_xywh
from ..model.post_processing import to_host
from ..runtime.extras import import_extra

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset
    from ..model.image_processing_hf_detr import DetrImageProcessor

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
SIZES = ("small", "medium", "large")
Record = Mapping[str, Any]


# -- numbers over records ------------------------------------------------------------------------------------------


def coco_metrics(
    images: Iterable[Record], annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """COCO's twelve numbers.

    Args:
        images: records with an `id`. Every image counts, also one without objects or detections.
        annotations: records with `image_id`, `category_id` (a class id 0 ... N-1), `bbox` [x_min, y_min, width,
            height] in pixels, and optionally `area` in square pixels (else width x height) and `iscrowd`.
        detections: records with `image_id`, `category_id`, `bbox` and `score`.
        id2label: class id to name.

    Returns:
        the numbers by the names in `METRICS`, in [0, 1] (-1 where there is nothing to measure), and `per_class`: class
        name to AP. A name that two classes share is followed by the id.

    Raises:
        ImportError: faster-coco-eval is not installed; the extra that has it is named.
        ValueError: a record cannot be used; the message names it and says why.
    """
    engine = _run(images, annotations, detections, id2label)
    metrics: dict[str, Any] = dict(zip(METRICS, (float(value) for value in engine.stats[:12]), strict=True))
    precision = engine.eval["precision"][..., 0, -1]  # (IoU, recall, class); all sizes, 100 detections
    metrics["per_class"] = {name: _mean(precision[:, :, k]) for k, name in enumerate(class_names(id2label))}
    return metrics


def metrics_by_size(
    images: Iterable[Record], annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str]
) -> dict[str, dict[str, Any]]:
    """For small, medium and large objects (area up to 32², up to 96², above, in pixels): how many `objects` there are,
    crowds apart, their `AP`, `AP50`, `AP75`, `AR100`, and `per_class` AP. Arguments and errors as `coco_metrics`."""
    engine = _run(images, annotations, detections, id2label)
    areas = np.array([_area(record) for record in annotations if not record.get("iscrowd")])
    inside = ((0, 32**2), (32**2, 96**2), (96**2, 1e10))  # both ends belong, as in COCO
    table: dict[str, dict[str, Any]] = {}
    for number, size in enumerate(SIZES):
        low, high = inside[number]
        precision = engine.eval["precision"][:, :, :, number + 1, -1]
        table[size] = {
            "objects": int(((areas >= low) & (areas <= high)).sum()),
            "AP": _mean(precision),
            "AP50": _mean(precision[0]),
            "AP75": _mean(precision[5]),
            "AR100": _mean(engine.eval["recall"][:, :, number + 1, -1]),
            "per_class": {name: _mean(precision[:, :, k]) for k, name in enumerate(class_names(id2label))},
        }
    return table


def class_names(id2label: Mapping[int, str]) -> list[str]:
    """The names in the order of their ids, told apart by the id where two classes share one."""
    count = Counter(id2label.values())
    return [name if count[name] == 1 else f"{name} ({i})" for i, name in sorted(id2label.items())]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While hundreds of thousands of records are made, none of them in a cycle: searching them for cycles again and
    again would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_garbage_collection()
def _run(
    images: Iterable[Record], annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str]
) -> Any:
    """The engine, after it ran."""
    engine = import_extra("faster_coco_eval", "evaluation")
    image_records = [{"id": int(image["id"])} for image in images]
    image_ids = {image["id"] for image in image_records}
    if len(image_ids) != len(image_records):
        raise ValueError("Two images share one id.")
    if not image_ids or not id2label:
        raise ValueError("There is nothing to measure: no images, or no classes.")
    _check("Annotation", annotations, image_ids, id2label)
    _check("Detection", detections, image_ids, id2label)
    categories = [{"id": i, "name": name} for i, name in sorted(id2label.items())]
    truth, found = (
        _index(engine.COCO(), {"images": image_records, "categories": categories, "annotations": records})
        for records in (
            [
                {
                    "id": number,  # from 1: the engine takes 0 for "not matched"
                    "image_id": record["image_id"],
                    "category_id": record["category_id"],
                    "bbox": record["bbox"],
                    "area": _area(record),
                    "iscrowd": int(record.get("iscrowd") or 0),
                }
                for number, record in enumerate(annotations, start=1)
            ],
            [
                {
                    "id": number,
                    "image_id": record["image_id"],
                    "category_id": record["category_id"],
                    "bbox": record["bbox"],
                    "area": record["bbox"][2] * record["bbox"][3],
                    "iscrowd": 0,
                    "score": record["score"],
                }
                for number, record in enumerate(detections, start=1)
            ],
        )
    )
    run = engine.COCOeval_faster(truth, found, iouType="bbox", print_function=lambda *_: None)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run


def _index(coco: Any, content: dict[str, Any]) -> Any:
    coco.dataset = content
    coco.createIndex()
    return coco


def _check(kind: str, records: Sequence[Record], image_ids: set[int], id2label: Mapping[int, str]) -> None:
    for number, record in enumerate(records):
        if record["image_id"] not in image_ids:
            raise ValueError(f"{kind} {number} is of image {record['image_id']}, which is not among the images.")
        if record["category_id"] not in id2label:
            raise ValueError(
                f"{kind} {number} (image {record['image_id']}) has class {record['category_id']}, but the classes are "
                f"{min(id2label)} to {max(id2label)}. Give the data set the classes of the model (id2label)."
            )
    numbers = np.array([[*record["bbox"], record.get("score", 0.0)] for record in records], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers.reshape(-1, 5)).all(axis=1))
    if len(bad):
        record = records[bad[0]]
        raise ValueError(
            f"{kind} {bad[0]} (image {record['image_id']}) is not finite: bbox {record['bbox']}, score "
            f"{record.get('score', 'none')}."
        )


def _area(record: Record) -> float:
    area = record.get("area")
    return float(record["bbox"][2] * record["bbox"][3] if area is None else area)


def _mean(values: Any) -> float:
    """Of what there is; -1 marks what there is not."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


# -- a model over a data set ---------------------------------------------------------------------------------------


class CocoEvaluator:
    """Collects detections batch by batch and measures them as COCO does.

    Of each image three small arrays are kept: no logits, and of the data set no images.

    Args:
        dataset: as `hf_detr.data.load_detection_dataset` gives it. Every image counts, also one `update` never saw.

    Attributes:
        id2label: class id to name; `category_ids`: class id to the source's category id.
        images: records with `id`, `width`, `height`; `annotations`: records as `coco_metrics` takes them.
    """

    def __init__(self, dataset: "DetectionDataset") -> None:
        from ..data.schema import category_ids, id2label

        self.id2label = id2label(dataset)
        self.category_ids = category_ids(dataset)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        for row in dataset.select_columns(["image_id", "width", "height", "objects"]).with_format(None):
            self.images.append({"id": row["image_id"], "width": row["width"], "height": row["height"]})
            objects = row["objects"]
            self.annotations += [
                {"image_id": row["image_id"], "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
                for label, box, area, crowd in zip(
                    objects["category"], objects["bbox"], objects["area"], objects["iscrowd"], strict=True
                )
            ]
        self._image_ids = {image["id"] for image in self.images}
        self._found: dict[int, tuple[Any, Any, Any]] = {}  # image id -> boxes xywh (N, 4), labels (N,), scores (N,)

    def update(self, image_ids: Iterable[int], results: Iterable[Mapping[str, Tensor]]) -> None:
        """Add the results of `post_process_object_detection` (boxes xyxy in pixels of the original image, threshold 0)
        for these images. An image seen twice, as the last batch's filling of several processes is, counts once.

        Raises:
            ValueError: an image is not of the data set.
        """
        for image_id, result in zip(image_ids, results, strict=True):
            if int(image_id) not in self._image_ids:
                raise ValueError(f"Image {int(image_id)} is not of the data set that is measured against.")
            self._found[int(image_id)] = (
                xyxy_to_xywh(result["boxes"].detach().cpu().double()).numpy(),
                result["labels"].cpu().numpy(),
                result["scores"].detach().float().cpu().numpy(),
            )

    def gather(self) -> None:
        """Bring the detections of all processes together; every process then has them all."""
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self._found)
            self._found = {image_id: found for part in parts for image_id, found in part.items()}

    @no_garbage_collection()
    def predictions(self) -> list[dict[str, Any]]:
        """Detections as `coco_metrics` and the functions of `analysis` take them: with class ids, in the order of
        image ids."""
        return [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for image_id, (boxes, labels, scores) in sorted(self._found.items())
            for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
        ]

    def detections(self) -> list[dict[str, Any]]:
        """COCO results: `image_id`, `category_id` of the data set's source, `bbox` [x, y, width, height], `score`."""
        return [record | {"category_id": self.category_ids[record["category_id"]]} for record in self.predictions()]

    def compute(self) -> dict[str, Any]:
        """The numbers of `coco_metrics`, with its errors."""
        return coco_metrics(self.images, self.annotations, self.predictions(), self.id2label)


@torch.no_grad()
def evaluate_detection(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    dataset: "DetectionDataset",
    processor: "DetrImageProcessor",
    *,
    progress: bool = True,
) -> CocoEvaluator:
    """Run a model over batches of a data set; the detections of all processes come back together.

    Args:
        model: in any mode; it is left in the mode it came in.
        loader: batches as `DetectionCollator` makes them, on the model's device.
        progress: show a bar.

    Raises:
        ImportError: faster-coco-eval is not installed, told before the first batch.
    """
    import_extra("faster_coco_eval", "evaluation")
    # without DistributedDataParallel around it, which would wait for processes that have no image left
    model = getattr(model, "module", model)
    was_training = model.training
    model.eval()
    evaluator = CocoEvaluator(dataset)
    for batch in tqdm(loader, desc="Evaluating", disable=not progress, leave=False):
        outputs = to_host(model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"]))
        numbers = [torch.cat((label["image_id"].reshape(1), label["orig_size"])) for label in batch["labels"]]
        image_ids, sizes = torch.stack(numbers).cpu().split((1, 2), dim=1)
        results = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        evaluator.update(image_ids[:, 0].tolist(), results)
    evaluator.gather()
    model.train(was_training)
    return evaluator


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The twelve numbers and the AP of each class as a table to print."""
    lines = [f"{name:6} {metrics[name]:7.4f}  {DESCRIPTIONS[name]}" for name in METRICS]
    width = max((len(name) for name in metrics["per_class"]), default=0)
    lines += ["", "AP of each class", *(f"  {name:{width}} {ap:7.4f}" for name, ap in metrics["per_class"].items())]
    return "\n".join(lines)
