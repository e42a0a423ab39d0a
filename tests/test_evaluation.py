"""COCO numbers against pycocotools on random detections and edge cases."""

import contextlib
import io
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_detr.evaluation import METRICS, CocoEvaluator, format_metrics


class Truth:
    """What the evaluator reads of a data set."""

    def __init__(self, images, annotations, category_ids, id2label):
        self.images, self.annotations = images, annotations
        self.category_ids, self.id2label = category_ids, id2label


def random_case(seed, images=8, classes=3, crowd=False, most=12, detections=20):
    rng = np.random.default_rng(seed)

    def boxes(count):
        size = np.exp(rng.uniform(np.log(8), np.log(200), (count, 2)))
        return np.concatenate((rng.uniform(0, 300, (count, 2)), size), axis=1)

    number = 0
    annotations = {}
    for image in range(images):
        records = []
        for box in boxes(int(rng.integers(0, most + 1))):
            number += 1
            records.append({
                "id": number, "category_id": int(rng.integers(classes)), "bbox": box.tolist(),
                "area": float(box[2] * box[3] * rng.uniform(0.5, 1)), "iscrowd": int(crowd and rng.random() < 0.2),
            })  # fmt: skip
        annotations[10 + image] = records
    truth = Truth(
        [{"id": i, "width": 600, "height": 600} for i in annotations],
        annotations,
        {index: 5 * index + 2 for index in range(classes)},
        {index: f"class {index}" for index in range(classes)},
    )
    results = {}
    for image, records in annotations.items():
        found = [np.array(r["bbox"]) + rng.normal(0, 4, 4) for r in records if rng.random() < 0.7] + list(
            boxes(detections)
        )
        found = np.maximum(np.array(found).reshape(-1, 4), 0.5)
        labels = [r["category_id"] for r in records][: len(found)]
        labels += rng.integers(classes, size=len(found) - len(labels)).tolist()
        xyxy = np.concatenate((found[:, :2], found[:, :2] + found[:, 2:]), axis=1)
        results[image] = {
            "scores": torch.from_numpy(rng.random(len(found)).round(2)).float(),  # rounded: ties
            "labels": torch.tensor(labels, dtype=torch.long),
            "boxes": torch.from_numpy(xyxy).float(),
        }
    return truth, results


def with_pycocotools(truth, evaluator):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": truth.images,
            "categories": [{"id": c, "name": truth.id2label[i]} for i, c in truth.category_ids.items()],
            "annotations": [
                r | {"image_id": i, "category_id": truth.category_ids[r["category_id"]]}
                for i, records in truth.annotations.items()
                for r in records
            ],
        }
        coco.createIndex()
        engine = COCOeval(coco, coco.loadRes(evaluator.detections()), "bbox")
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
    return engine.stats


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"crowd": True},
        {"classes": 1},
        {"most": 0},
        {"images": 1, "most": 150, "detections": 200},
        {"detections": 0},
    ],
    ids=["plain", "crowd", "one class", "no objects", "more than 100", "no false positives"],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_twelve_numbers_equal_pycocotools(case, seed):
    truth, results = random_case(seed, **case)
    evaluator = CocoEvaluator(truth)
    evaluator.update(list(results), list(results.values()))
    if not evaluator.detections():
        pytest.skip("pycocotools cannot load an empty list of detections")
    metrics = evaluator.compute()
    expected = with_pycocotools(truth, evaluator)
    np.testing.assert_allclose([metrics[name] for name in METRICS], expected, atol=1e-6)


def test_per_class_numbers_average_to_the_whole():
    truth, results = random_case(3)
    evaluator = CocoEvaluator(truth)
    evaluator.update(list(results), list(results.values()))
    metrics = evaluator.compute()
    assert list(metrics["per_class"]) == ["class 0", "class 1", "class 2"]
    assert np.mean(list(metrics["per_class"].values())) == pytest.approx(metrics["AP"], abs=1e-6)


def test_nothing_found_is_zero_not_an_error():
    truth, _ = random_case(0)
    metrics = CocoEvaluator(truth).compute()
    assert metrics["AP"] == 0
    assert metrics["AR100"] == 0
    assert "AP50" in format_metrics(metrics)


def test_true_boxes_score_one_and_an_image_counts_once():
    truth, _ = random_case(1)
    evaluator = CocoEvaluator(truth)
    for _ in range(2):
        for image, records in truth.annotations.items():
            corners = torch.tensor([r["bbox"] for r in records]).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            labels = torch.tensor([r["category_id"] for r in records], dtype=torch.long)
            evaluator.update([image], [{"scores": torch.ones(len(records)), "labels": labels, "boxes": corners}])
    assert len(evaluator.detections()) == sum(len(records) for records in truth.annotations.values())
    assert evaluator.compute()["AP"] == pytest.approx(1.0)


def test_a_missing_engine_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"hf_detr\[evaluation\]"):
        CocoEvaluator(random_case(0)[0]).compute()
