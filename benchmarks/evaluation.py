"""Time of COCO's twelve numbers on the same detections: ours (hotcoco), pycocotools, faster-coco-eval and torchmetrics'
`MeanAveragePrecision`; the last two only if they are installed.

python benchmarks/evaluation.py [--images 5000] [--repeats 1]
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from measure import machine
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_detr.evaluation import METRICS, coco_metrics, records_from_batches

DETECTIONS, OBJECTS, CLASSES = 100, 8, 80  # per image; COCO has 7.3 objects per image


def draw(images: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Predictions and references of images of 640 x 480: a quarter of the detections lie near objects, the rest is
    random."""
    rng = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        corner = rng.uniform(0, (500, 380), (count, 2))
        return np.concatenate((corner, corner + np.exp(rng.uniform(np.log(8), np.log(250), (count, 2)))), axis=1)

    predictions, references = [], []
    for _ in range(images):
        objects, labels = boxes(OBJECTS), rng.integers(CLASSES, size=OBJECTS)
        near = rng.integers(OBJECTS, size=DETECTIONS // 4)
        found = np.concatenate((objects[near] + rng.normal(0, 5, (len(near), 4)), boxes(DETECTIONS - len(near))))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        predicted = np.concatenate((labels[near], rng.integers(CLASSES, size=DETECTIONS - len(near))))
        predictions.append({
            "boxes": torch.from_numpy(found).float(), "labels": torch.from_numpy(predicted),
            "scores": torch.from_numpy(rng.random(DETECTIONS)).float(),
        })  # fmt: skip
        references.append({"boxes": torch.from_numpy(objects).float(), "labels": torch.from_numpy(labels)})
    return predictions, references


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all sides in turn; medians are printed")
    args = parser.parse_args()
    torch.set_num_threads(2)
    predictions, references = draw(args.images)
    id2label = {i: str(i) for i in range(CLASSES)}

    def ours() -> list[float]:
        metrics = coco_metrics(*records_from_batches(predictions, references), id2label)
        return [metrics[name] for name in METRICS]

    def reference(index: Callable[[], Any], evaluator: Callable[..., Any]) -> list[float]:
        images, annotations, detections = records_from_batches(predictions, references)
        ground_truth = index()
        ground_truth.dataset = {
            "images": images,
            "categories": [{"id": i, "name": name} for i, name in id2label.items()],
            "annotations": [
                record | {"id": number, "area": record["bbox"][2] * record["bbox"][3], "iscrowd": 0}
                for number, record in enumerate(annotations, start=1)
            ],
        }
        ground_truth.createIndex()
        engine = evaluator(ground_truth, ground_truth.loadRes(detections), "bbox")
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
        return list(engine.stats[:12])

    def torchmetrics() -> list[float]:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
        for start in range(0, args.images, 8):
            metric.update(predictions[start : start + 8], references[start : start + 8])
        found = metric.compute()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100",
                 "mar_small", "mar_medium", "mar_large")  # fmt: skip
        return [float(found[name]) for name in names]

    sides: dict[str, Callable[[], list[float]]] = {
        "ours": ours, "pycocotools": lambda: reference(COCO, COCOeval)
    }  # fmt: skip
    if find_spec("faster_coco_eval"):
        import faster_coco_eval

        sides["faster-coco-eval"] = lambda: reference(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    if find_spec("torchmetrics"):
        sides["torchmetrics"] = torchmetrics
    times: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for _ in range(args.repeats):
        for name, function in sides.items():
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                values[name] = function()
            times[name].append(time.perf_counter() - started)
    for name, found in values.items():  # torchmetrics has recalls in float32
        np.testing.assert_allclose(values["ours"], found, atol=1e-3 if name == "torchmetrics" else 1e-12)

    medians = {name: statistics.median(measured) for name, measured in times.items()}
    print(
        f"\n{args.images} images x {DETECTIONS} detections, {OBJECTS} objects, {CLASSES} classes; equal to 1e-12 "
        f"(torchmetrics: 1e-3) ({machine()})\n\n| | seconds | relative to ours |\n|---|---|---|"
    )
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.1f} | {seconds / medians['ours']:.1f}x |")


if __name__ == "__main__":
    main()
