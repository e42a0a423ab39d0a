"""COCO numbers against pycocotools on random worlds and edge cases, and the same numbers by every way to get them."""

import contextlib
import io
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_image_processing import photo

from hf_detr import DetrDetectionPipeline, DetrImageProcessor
from hf_detr.data.schema import category_ids, detection_features, detection_info
from hf_detr.evaluation import (
    METRIC_PATH,
    METRICS,
    CocoEvaluator,
    TrainerMetrics,
    coco_metrics,
    evaluate_detection,
    format_metrics,
)
from hf_detr.evaluation.coco_metrics import coco_details
from hf_detr.model.annotations import canonical_id

CASES = {
    "plain": {},
    "crowd": {"crowd": True},
    "one class": {"classes": 1},
    "absent class": {"classes": 5, "used": 2},
    "no objects": {"most": 0},
    "one image, more than 100": {"images": 1, "classes": 1, "most": 130, "extra": 60, "found": 1.0},
    "no false positives": {"extra": 0},
    "no detections": {"extra": 0, "found": 0.0},
    "all scores equal": {"tied": True},
    "tiny and huge": {"sizes": (0.3, 600)},
    "integer boxes, IoU on the threshold": {"whole": True},
    "empty images": {"images": 9, "most": 1, "extra": 1},
    "ids beyond 2^53, unsorted": {"first_id": 20210312103000120, "unsorted": True, "tied": True},
}
SEEDS = {"one image, more than 100": 2}


def random_case(
    seed, images=5, classes=3, used=None, crowd=False, most=9, extra=12, found=0.7, tied=False, sizes=(8, 200),
    whole=False, first_id=10, unsorted=False,
):  # fmt: skip
    """Images, annotations, detections and names; areas are those of masks, smaller than width x height."""
    rng = np.random.default_rng(seed)
    used = used or classes

    def box():
        size = np.exp(rng.uniform(np.log(sizes[0]), np.log(sizes[1]), 2))
        values = np.append(rng.uniform(0, 300, 2), size)
        return (np.round(values / 20) * 20 + [0, 0, 20, 20]) if whole else values

    annotations, detections = [], []
    for image in range(images):
        for _ in range(int(rng.integers(0, most + 1)) if most < 100 else most):
            values = box()
            annotations.append({
                "image_id": first_id + 3 * image, "category_id": int(rng.integers(used)), "bbox": values.tolist(),
                "area": float(values[2] * values[3] * rng.uniform(0.5, 1)),
                "iscrowd": int(crowd and rng.random() < 0.2),
            })  # fmt: skip
            if rng.random() < found:
                moved = values + (rng.integers(-1, 2, 4) * 10 if whole else rng.normal(0, values[2] / 20, 4))
                moved[2:] = np.maximum(moved[2:], 0.5)
                label = annotations[-1]["category_id"] if rng.random() < 0.8 else int(rng.integers(classes))
                detections.append([annotations[-1]["image_id"], label, moved.tolist()])
        detections += [[first_id + 3 * image, int(rng.integers(classes)), box().tolist()] for _ in range(extra)]
    scores = np.full(len(detections), 0.5) if tied else rng.random(len(detections)).round(2)  # rounded: ties
    detections = [
        {"image_id": image, "category_id": label, "bbox": values, "score": float(score)}
        for (image, label, values), score in zip(detections, scores, strict=True)
    ]
    records = [{"id": first_id + 3 * image, "width": 600, "height": 600} for image in range(images)]
    if unsorted:
        for values in (records, annotations, detections):
            rng.shuffle(values)
    return records, annotations, detections, {i: f"class {i}" for i in range(classes)}


def with_pycocotools(images, annotations, detections, id2label):
    def index(records):
        coco = COCO()
        coco.dataset = {
            "images": images,
            "categories": [{"id": i, "name": name} for i, name in id2label.items()],
            "annotations": [record | {"id": number} for number, record in enumerate(records, start=1)],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        found = [d | {"area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0} for d in detections]  # as its loadRes does
        engine = COCOeval(index(annotations), index(found), "bbox")
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
    return engine


def as_dataset(images, annotations, id2label, ids=None, pictures=None):
    """The same ground truth as a data set of the schema."""
    names = list(id2label.values())
    rows = []
    for image in images:
        own = [a for a in annotations if a["image_id"] == image["id"]]
        rows.append({
            "image": (pictures or {}).get(image["id"]), "image_id": image["id"], "file_name": f"{image['id']}.png",
            "width": image["width"], "height": image["height"],
            "objects": {
                "id": list(range(len(own))), "bbox": [a["bbox"] for a in own],
                "category": [a["category_id"] for a in own], "area": [a["area"] for a in own],
                "iscrowd": [a["iscrowd"] for a in own],
            },
        })  # fmt: skip
    info = detection_info(names, ids or list(range(len(names))), "a test")
    return datasets.Dataset.from_list(rows, features=detection_features(names), info=info)


def as_results(images, detections):
    """What post-processing gives for each image."""
    results = []
    for image in images:
        own = [d for d in detections if d["image_id"] == image["id"]]
        boxes = torch.tensor([d["bbox"] for d in own], dtype=torch.float64).reshape(-1, 4)
        results.append({
            "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
            "scores": torch.tensor([d["score"] for d in own]),
            "labels": torch.tensor([d["category_id"] for d in own], dtype=torch.long),
        })  # fmt: skip
    return results


def flat(metrics):
    return {name: metrics[name] for name in METRICS} | metrics["per_class"]


def mean(values):
    """As pycocotools averages: -1 marks what does not exist."""
    return values[values > -1].mean() if (values > -1).any() else -1


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_pycocotools_on_random_worlds(case):
    for seed in range(SEEDS.get(case, 5)):
        records = random_case(1000 * list(CASES).index(case) + seed, **CASES[case])
        details = coco_details(*records)
        engine = with_pycocotools(*records)
        metrics, precision = details["metrics"], engine.eval["precision"]  # (IoU, recall, class, size, max detections)
        assert metrics == coco_metrics(*records)
        np.testing.assert_allclose([metrics[name] for name in METRICS], engine.stats, atol=1e-12)
        expected = [mean(precision[:, :, k, 0, -1]) for k in range(len(records[3]))]
        assert list(metrics["per_class"].values()) == pytest.approx(expected, abs=1e-12)
        for number, row in enumerate(details["by_size"].values(), start=1):
            assert row["AP"] == metrics[("APs", "APm", "APl")[number - 1]]
            assert row["AP50"] == pytest.approx(mean(precision[0, :, :, number, -1]), abs=1e-12)
            assert row["AP75"] == pytest.approx(mean(precision[5, :, :, number, -1]), abs=1e-12)
            assert row["AR100"] == pytest.approx(mean(engine.eval["recall"][:, :, number, -1]), abs=1e-12)
        for iou, index in (("0.5", 0), ("0.75", 5)):
            found = details["precision_recall"][iou]["precision"]
            for k, name in records[3].items():
                if (precision[index, :, k, 0, -1] > -1).any():
                    np.testing.assert_allclose(found[name], precision[index, :, k, 0, -1], atol=1e-12)
                else:
                    assert name not in found


def shifted_pairs(image_ids):
    """One object per image, and a detection of each in the next image, where it is wrong."""
    annotations = [
        {"image_id": image_id, "category_id": 0, "bbox": [10.0 * i, 0, 8, 8]} for i, image_id in enumerate(image_ids)
    ]
    detections = [
        annotation | {"image_id": image_ids[i ^ 1], "score": 0.9 - 0.01 * i} for i, annotation in enumerate(annotations)
    ]
    return [{"id": image_id} for image_id in image_ids], annotations, detections


@pytest.mark.parametrize(
    "image_ids",
    [[20210312103000120 + i for i in range(8)], [2**63 + i for i in range(8)], [f"cam{i}_1" for i in range(8)]],
    ids=["beyond 2^53", "beyond 2^63", "text"],
)
def test_large_and_text_ids_are_never_confused(image_ids):
    images, annotations, wrong = shifted_pairs(image_ids)
    assert coco_metrics(images, annotations, wrong, {0: "a"})["AP"] == 0
    right = [annotation | {"score": 0.5} for annotation in annotations]
    assert coco_metrics(images, annotations, right, {0: "a"})["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match=f"Detection 0 is of image {image_ids[0]}"):
        coco_metrics(images[1:], annotations[1:], right, {0: "a"})


def test_text_integer_and_float_of_one_number_are_one_id():
    images, annotations, _ = shifted_pairs(list(range(8)))
    forms = [str, float, int, np.int64, torch.tensor, str, float, int]
    detections = [
        annotation | {"image_id": form(annotation["image_id"]), "category_id": form(0), "score": 0.5}
        for annotation, form in zip(annotations, forms, strict=True)
    ]
    assert coco_metrics(images, annotations, detections, {"0": "a"})["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="share one id, 1"):
        coco_metrics([{"id": "1"}, {"id": 1.0}], [], [], {0: "a"})
    assert [canonical_id(value) for value in ("007", "1.5", "-3", 1.5, "cam 1")] == ["007", "1.5", -3, 1.5, "cam 1"]


def test_more_than_100_detections_count_on_request():
    boxes = [[20.0 * (i % 15), 20.0 * (i // 15), 15.0, 15.0] for i in range(180)]
    annotations = [{"image_id": 1, "category_id": 0, "bbox": box} for box in boxes]
    detections = [annotation | {"score": 1 - i / 200} for i, annotation in enumerate(annotations)]
    world = [{"id": 1}], annotations, detections, {0: "a"}
    assert coco_metrics(*world)["AP"] == pytest.approx(56 / 101)  # recalls 0, 0.01, ..., 0.55 are reached
    metrics = coco_metrics(*world, max_detections=500)
    found = [metrics[name] for name in ("AP", "ARs", "AR1", "AR10", "AR100")]
    assert found == pytest.approx([1, 1, 1 / 180, 10 / 180, 100 / 180])
    assert coco_metrics(*world, max_detections=5)["AR100"] == pytest.approx(5 / 180)


def test_objects_are_counted_by_size():
    squares = [(10, 0), (32, 0), (33, 0), (96, 0), (97, 0), (300, 0), (300, 1)]
    annotations = [
        {"image_id": 1, "category_id": 0, "bbox": [0, 0, side, side], "iscrowd": crowd} for side, crowd in squares
    ]
    table = coco_details([{"id": 1}], annotations, [], {0: "a"})["by_size"]
    # an object of exactly 32² or 96² is of both sizes, in COCO as well
    assert {size: row["objects"] for size, row in table.items()} == {"small": 2, "medium": 3, "large": 3}


def test_nothing_found_is_zero_not_an_error():
    images, annotations, _, id2label = random_case(0)
    metrics = coco_metrics(images, annotations, [], id2label)
    assert metrics["AP"] == 0
    assert metrics["AR100"] == 0
    assert "AP50" in format_metrics(metrics)


def test_classes_of_one_name_keep_a_number_each():
    metrics = coco_metrics([{"id": 1}], [], [], {0: "N/A", 1: "cat", 2: "N/A"})
    assert list(metrics["per_class"]) == ["N/A (0)", "cat", "N/A (2)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "Detection 1 is of image 9, which is not among"),
        ({"category_id": 2}, r"Detection 1 \(image 1\) has class 2, but the classes are 0 to 1.*id2label"),
        ({"bbox": [0, 0, float("nan"), 1]}, r"Detection 1 \(image 1\) is not finite"),
        ({"score": float("inf")}, "not finite"),
    ],
)
def test_records_that_cannot_be_used_are_named(change, message):
    record = {"image_id": 1, "category_id": 0, "bbox": [0, 0, 5, 5], "score": 0.5}
    with pytest.raises(ValueError, match=message):
        coco_metrics([{"id": 1}], [], [record, record | change], {0: "a", 1: "b"})


def test_no_images_and_images_of_one_id_are_errors():
    with pytest.raises(ValueError, match="no images"):
        coco_metrics([], [], [], {0: "a"})
    with pytest.raises(ValueError, match="share one id"):
        coco_metrics([{"id": 1}, {"id": 1}], [], [], {0: "a"})


def test_a_missing_engine_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match=r"hf_detr\[evaluation\]"):
        coco_metrics(*random_case(0))
    with pytest.raises(ImportError, match=r"hf_detr\[evaluation\]"):
        evaluate_detection(None, None, None, None)  # before model, batches and data set are used


def test_the_input_records_are_left_as_they_were():
    images, annotations, detections, id2label = random_case(0)
    coco_metrics(images, annotations, detections, id2label)
    assert random_case(0) == (images, annotations, detections, id2label)


# -- over a data set -----------------------------------------------------------------------------------------------


def test_the_evaluator_gives_the_same_numbers_and_the_sources_category_ids():
    images, annotations, detections, id2label = random_case(3, crowd=True)
    dataset = as_dataset(images, annotations, id2label, ids=[7, 90, 4])
    assert category_ids(dataset) == {0: 7, 1: 90, 2: 4}
    evaluator = CocoEvaluator(dataset)
    evaluator.update([image["id"] for image in images], as_results(images, detections))
    expected = with_pycocotools(images, annotations, detections, id2label).stats
    metrics = evaluator.compute()
    np.testing.assert_allclose([metrics[name] for name in METRICS], expected, atol=1e-6)
    assert [d["category_id"] for d in evaluator.detections()] == [[7, 90, 4][d["category_id"]] for d in detections]
    np.testing.assert_allclose([d["bbox"] for d in evaluator.detections()], [d["bbox"] for d in detections], atol=1e-10)


def test_an_image_counts_once_and_no_image_is_decoded():
    images, annotations, detections, id2label = random_case(1)
    broken = {image["id"]: {"bytes": b"not an image", "path": None} for image in images}
    evaluator = CocoEvaluator(as_dataset(images, annotations, id2label, pictures=broken))
    for _ in range(2):
        evaluator.update([image["id"] for image in images], as_results(images, detections))
    assert len(evaluator.detections()) == len(detections)


def test_an_image_of_another_data_set_is_an_error():
    images, annotations, detections, id2label = random_case(1)
    with pytest.raises(ValueError, match="Image 5 is not of the data set"):
        CocoEvaluator(as_dataset(images, annotations, id2label)).update([5], as_results(images, detections)[:1])


def test_a_streamed_data_set_is_measured_alike():
    images, annotations, detections, id2label = random_case(1)
    dataset = as_dataset(images, annotations, id2label)
    evaluators = CocoEvaluator(dataset), CocoEvaluator(dataset.to_iterable_dataset())
    for evaluator in evaluators:
        evaluator.update([image["id"] for image in images], as_results(images, detections))
    assert evaluators[0].compute() == evaluators[1].compute()


def _half(rank, folder, evaluator, images, detections):
    """One of two processes: every other image, and the first image again to fill the last batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = (images + images[:1])[rank::2]
    evaluator.update([image["id"] for image in own], as_results(own, detections))
    evaluator.gather()
    torch.save(evaluator.predictions(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_numbers_as_one_with_no_image_lost_or_counted_twice(tmp_path):
    images, annotations, detections, id2label = random_case(7)
    assert len(images) % 2
    evaluator = CocoEvaluator(as_dataset(images, annotations, id2label))
    arguments = (str(tmp_path), evaluator, images, detections)
    # a fork would have the locks of other tests' threads, but no threads
    torch.multiprocessing.start_processes(_half, args=arguments, nprocs=2, start_method="forkserver")
    expected = flat(coco_metrics(images, annotations, detections, id2label))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == len(detections)
        assert flat(coco_metrics(images, annotations, found, id2label)) == pytest.approx(expected, abs=1e-9)


# -- other ways to the same numbers --------------------------------------------------------------------------------


@pytest.fixture
def metric(tmp_path, monkeypatch):
    """Loaded offline, from a module cache of its own."""
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(METRIC_PATH, cache_dir=str(tmp_path / "data"))


def as_references(images, annotations):
    references = []
    for image in images:
        own = [a for a in annotations if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        references.append({
            "image_id": image["id"], "boxes": boxes, "labels": [a["category_id"] for a in own],
            "area": [a["area"] for a in own], "iscrowd": [a["iscrowd"] for a in own],
        })  # fmt: skip
    return references


def test_the_evaluate_metric_gives_the_same_numbers_batch_by_batch(metric):
    images, annotations, detections, id2label = random_case(4, crowd=True)
    references, results = as_references(images, annotations), as_results(images, detections)
    for start in (0, 2, 4):
        metric.add_batch(predictions=results[start : start + 2], references=references[start : start + 2])
    metric.add_batch(predictions=results[:1], references=references[:1])  # filled up by a second process
    found = metric.compute(id2label=id2label)
    assert flat(found) == pytest.approx(flat(coco_metrics(images, annotations, detections, id2label)), abs=1e-6)
    assert list(found["per_class"]) == ["class 0", "class 1", "class 2"]


def test_the_evaluate_metric_needs_boxes_and_labels_only(metric):
    boxes, nothing = [[0.0, 0.0, 10.0, 10.0]], {"boxes": [], "labels": [], "scores": []}
    references = [{"boxes": boxes, "labels": [1]}, {"boxes": [], "labels": []}]
    found = metric.compute(
        predictions=[{"boxes": boxes, "labels": [1], "scores": [0.9]}, nothing], references=references
    )
    assert found["AP"] == pytest.approx(1)
    assert found["per_class"] == pytest.approx({"0": -1, "1": 1})


def test_predictions_that_do_not_fit_their_references_are_named(metric):
    image = {"boxes": [[0.0, 0.0, 10.0, 10.0]], "labels": [0]}
    with pytest.raises(ValueError, match="1 boxes but 2 scores for image 0"):
        metric.compute(predictions=[image | {"scores": [0.5, 0.4]}], references=[image])
    with pytest.raises(ValueError, match=r"must be \[x_min, y_min, x_max, y_max\]"):
        metric.compute(predictions=[image | {"scores": [0.5]}], references=[image | {"boxes": [[50.0, 0.0, 9.0, 9.0]]}])
    with pytest.raises(ValueError, match="Reference 1 has no image_id"):
        metric.compute(predictions=[image | {"scores": [0.5]}] * 2, references=[image | {"image_id": 3}, image])


@pytest.fixture(scope="module")
def found_in_part():
    """A tiny model with spread predictions, its processor, and images of different sizes whose objects lie near some
    of its predictions: (model, processor, images, annotations, items, collate)."""
    torch.manual_seed(0)
    model = tiny_model(num_labels=3)
    with torch.no_grad():
        model.bbox_predictor.layers[-1].weight.mul_(20)
        model.class_labels_classifier.weight.mul_(3)
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120})
    images = [{"id": 5 + i, "width": 80 + 10 * i, "height": 120 - 10 * i} for i in range(5)]
    pictures = {image["id"]: photo(image["width"], image["height"], image["id"]) for image in images}
    rng = np.random.default_rng(0)
    annotations = []
    for image in images:
        with torch.no_grad():
            outputs = model(**processor(pictures[image["id"]], return_tensors="pt"))
        size = [(image["height"], image["width"])]
        result = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)[0]
        for box, label in zip(result["boxes"][::2].tolist(), result["labels"][::2].tolist(), strict=True):
            left, top = np.clip(box[:2] + rng.normal(0, 2, 2), 0, 70)
            width, height = np.maximum(np.subtract(box[2:], [left, top]) + rng.normal(0, 2, 2), 5)
            annotations.append({
                "id": len(annotations), "image_id": image["id"], "category_id": label,
                "bbox": [float(left), float(top), float(width), float(height)], "area": float(width * height * 0.7),
                "iscrowd": 0,
            })  # fmt: skip
    for record in annotations:  # labels are boxes within the image
        image = next(image for image in images if image["id"] == record["image_id"])
        record["bbox"][2] = min(record["bbox"][2], image["width"] - record["bbox"][0])
        record["bbox"][3] = min(record["bbox"][3], image["height"] - record["bbox"][1])
    items = [
        (pictures[image["id"]], {
            "image_id": image["id"], "annotations": [a for a in annotations if a["image_id"] == image["id"]]
        })
        for image in images
    ]  # fmt: skip

    def collate(batch):
        pixels, labels = zip(*batch, strict=True)
        return dict(processor(list(pixels), annotations=list(labels), return_tensors="pt"))

    return model, processor, images, annotations, items, collate


@pytest.mark.parametrize("per_batch", [False, True], ids=["at the end", "batch by batch"])
def test_the_trainer_gives_the_numbers_of_the_accelerate_loop(found_in_part, tmp_path, per_batch):
    model, processor, images, annotations, items, collate = found_in_part
    id2label = {0: "a", 1: "b", 2: "c"}
    batches = [collate(items[:2]), collate(items[2:4]), collate(items[4:])]
    expected = evaluate_detection(
        model, batches, as_dataset(images, annotations, id2label), processor, progress=False
    ).compute()
    assert 0.05 < expected["AP"] < expected["AP50"] < 1

    from transformers import Trainer, TrainingArguments

    metrics = TrainerMetrics(processor, id2label)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=2, eval_do_concat_batches=False,
            batch_eval_metrics=per_batch, remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True,
        ),
        data_collator=collate, eval_dataset=items, compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.collect,
    )  # fmt: skip
    for _ in range(2):  # nothing is left over from one evaluation to the next
        found = trainer.evaluate()
        for name in METRICS:
            assert found[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6), name
        for name, ap in expected["per_class"].items():
            assert found[f"eval_AP_{name}"] == pytest.approx(ap, abs=1e-6)


def test_a_pipeline_over_the_same_images_gives_the_same_numbers(found_in_part):
    model, processor, images, annotations, items, collate = found_in_part
    dataset = as_dataset(images, annotations, {0: "a", 1: "b", 2: "c"})
    expected = evaluate_detection(model, [collate(items)], dataset, processor, progress=False).compute()
    detector = DetrDetectionPipeline(model=model, image_processor=processor)
    label2id, evaluator = model.config.label2id, CocoEvaluator(dataset)
    for image, found in zip(
        images, detector([item[0] for item in items], threshold=0.0, round_boxes=False, batch_size=2), strict=True
    ):
        evaluator.update([image["id"]], [{
            "boxes": torch.tensor([list(f["box"].values()) for f in found]),
            "scores": torch.tensor([f["score"] for f in found]),
            "labels": torch.tensor([label2id[f["label"]] for f in found]),
        }])  # fmt: skip
    assert flat(evaluator.compute()) == pytest.approx(flat(expected), abs=1e-3)


def test_a_trainer_without_collect_is_told_so():
    with pytest.raises(ValueError, match=r"preprocess_logits_for_metrics=metrics\.collect"):
        TrainerMetrics(DetrImageProcessor(), {0: "a"})(None)
