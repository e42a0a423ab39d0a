"""Panoptic quality against the rule of panopticapi, mask AP against pycocotools, and both over batches."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_detr.data import PanopticWriter, category_ids, draw_shapes_dataset, id2label, mask_results, stuff_labels
from hf_detr.data.masks import decode_masks
from hf_detr.data.schema import set_stuff_labels
from hf_detr.evaluation import (
    METRICS,
    MaskEvaluator,
    ModelEvaluation,
    PanopticEvaluator,
    coco_metrics,
    evaluate_detection,
    evaluate_panoptic,
    format_panoptic,
    panoptic_metrics,
    run_evaluators,
)
from hf_detr.evaluation.coco_metrics import coco_details

NAMES = {0: "cat", 1: "dog", 2: "sky", 3: "road"}
STUFF = ["sky", "road"]


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


# -- panoptic quality ----------------------------------------------------------------------------------------------


def random_map(rng, seeds, size=(24, 33)):
    """The nearest seed (N, 2) of each pixel."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in seeds], axis=0) + 1


def random_world(seed):
    """Per image, (map, {id: class}, crowds) of the annotations and (map, {id: class}) of the predictions. Segments move
    a little, change class, appear and vanish; some pixels have no segment; several crowds may be of one class."""
    rng = np.random.default_rng(seed)
    world = []
    for _ in range(int(rng.integers(1, 5))):
        count = int(rng.integers(1, 9))
        seeds = rng.uniform(0, 30, size=(count, 2))
        classes = rng.integers(0, rng.integers(1, 5), size=count)
        truth = random_map(rng, seeds)
        moved = seeds + rng.normal(0, rng.choice([0, 0.5, 2.0]), size=seeds.shape)
        moved = np.concatenate((moved, rng.uniform(0, 30, size=(int(rng.integers(0, 3)), 2))))
        predicted = random_map(rng, moved)
        found = np.append(classes, rng.integers(0, 4, size=len(moved) - count))
        found = np.where(rng.random(len(found)) < 0.2, rng.integers(0, 4, size=len(found)), found)
        for ids, rate in ((truth, 0.15), (predicted, 0.15)):
            for number in np.unique(ids):
                if rng.random() < rate:
                    ids[ids == number] = 0
        crowds = {number for number in range(1, count + 1) if rng.random() < 0.2}
        world.append((
            truth, {i: int(classes[i - 1]) for i in np.unique(truth).tolist() if i}, crowds,
            predicted, {i: int(found[i - 1]) for i in np.unique(predicted).tolist() if i},
        ))  # fmt: skip
    return world


def as_records(world):
    images, annotations, segments = [], [], []
    for image_id, (truth, classes, crowds, predicted, found) in enumerate(world, start=5):
        images.append({"id": image_id, "height": truth.shape[0], "width": truth.shape[1]})
        for i, label in classes.items():
            annotations.append({
                "image_id": image_id, "category_id": label, "segmentation": rle(truth == i), "iscrowd": int(i in crowds)
            })  # fmt: skip
        for i, label in found.items():
            segments.append({"image_id": image_id, "category_id": label, "segmentation": rle(predicted == i)})
    return images, annotations, segments


def by_the_rule(world):
    """{class: (sum of IoU, tp, fp, fn)}, by hand in float64: two segments of one class match if their IoU, without the
    pixels of the prediction that the annotations leave open, is above 1/2; what does not match is wrong, unless most of
    it is open or in the last crowd of its class."""
    sums = {label: [0.0, 0, 0, 0] for label in NAMES}
    for truth, classes, crowds, predicted, found in world:
        matched, taken = set(), set()
        for i, label in classes.items():
            for j, other in found.items():
                if label != other or i in crowds:
                    continue
                a, b = truth == i, predicted == j
                iou = float((a & b).sum()) / float((a | b).sum() - (b & (truth == 0)).sum())
                if iou > 0.5:
                    sums[label][0] += iou
                    sums[label][1] += 1
                    matched.add(i)
                    taken.add(j)
        last_crowd = {label: i for i, label in classes.items() if i in crowds}
        for i, label in classes.items():
            sums[label][3] += i not in matched and i not in crowds
        for j, label in found.items():
            if j not in taken:
                b = predicted == j
                excused = (b & (truth == 0)).sum() + (b & (truth == last_crowd.get(label, -1))).sum()
                sums[label][2] += not excused / b.sum() > 0.5
    return sums


def qualities(sums):
    """PQ, SQ and RQ of each class that occurs, and their means over all, things and stuff."""
    each = {}
    for label, (iou, tp, fp, fn) in sums.items():
        if tp + fp + fn:
            weight = tp + 0.5 * fp + 0.5 * fn
            each[label] = np.array([iou / weight, iou / tp if tp else 0.0, tp / weight])
    groups = {"": set(NAMES), "_things": {0, 1}, "_stuff": {2, 3}}
    means = {}
    for suffix, members in groups.items():
        rows = [values for label, values in each.items() if label in members]
        means[suffix] = np.mean(rows, axis=0) if rows else np.full(3, -1.0)
    return each, means


def test_panoptic_quality_is_that_of_the_rule_on_200_random_worlds():
    kinds = {"tp": 0, "fp": 0, "fn": 0}
    for seed in range(200):
        world = random_world(seed)
        found = panoptic_metrics(*as_records(world), NAMES, STUFF)
        sums = by_the_rule(world)
        each, means = qualities(sums)
        for suffix, values in means.items():
            assert [found[f"{name}{suffix}"] for name in ("PQ", "SQ", "RQ")] == pytest.approx(values, abs=1e-9)
        for label, name in NAMES.items():
            result = found["per_class"][name]
            assert [result["tp"], result["fp"], result["fn"]] == sums[label][1:]
            expected = each.get(label, [-1.0] * 3)
            assert [result[key] for key in ("PQ", "SQ", "RQ")] == pytest.approx(expected, abs=1e-9)
            kinds = {key: kinds[key] + result[key] for key in kinds}
    assert min(kinds.values()) > 200


def test_one_image_by_hand():
    """Two cats of 4 x 4; one is found but for a column, in place of the other there is a dog; the sky is perfect."""
    truth = np.full((8, 8), 3)
    truth[:4, :4], truth[4:, 4:] = 1, 2
    predicted = truth.copy()
    predicted[:4, 0] = 0
    labels = {1: 0, 2: 0, 3: 2}
    found = panoptic_metrics(*as_records([(truth, labels, set(), predicted, labels | {2: 1})]), NAMES, STUFF)
    assert found["per_class"]["cat"] == {"PQ": 0.75 / 1.5, "SQ": 0.75, "RQ": 1 / 1.5, "tp": 1, "fp": 0, "fn": 1}
    assert found["per_class"]["dog"] == {"PQ": 0, "SQ": 0, "RQ": 0, "tp": 0, "fp": 1, "fn": 0}
    assert (found["PQ_stuff"], found["PQ_things"], found["PQ"]) == (1.0, 0.25, 0.5)
    table = format_panoptic(found)
    assert "All       50.00   58.33   55.56" in table
    assert "–" in next(line for line in table.splitlines() if "road" in line)


def test_records_that_cannot_be_measured_are_named():
    images, annotations, segments = as_records(random_world(3))
    with pytest.raises(ValueError, match=r"Segments of image 5 overlap by \d+ pixels"):
        panoptic_metrics(images, annotations, [*segments, segments[0]], NAMES)
    with pytest.raises(ValueError, match=f"Annotations of image {annotations[0]['image_id']} overlap"):
        panoptic_metrics(images, [*annotations, annotations[0]], segments, NAMES)
    with pytest.raises(ValueError, match="Segment 0 is of image 77, which is not among the images"):
        panoptic_metrics(images, annotations, [segments[0] | {"image_id": 77}], NAMES)
    with pytest.raises(ValueError, match=r"Segment 0 \(image 5\) has class 9, but the classes are 0 to 3"):
        panoptic_metrics(images, annotations, [segments[0] | {"category_id": 9}], NAMES)
    small = segments[0] | {"segmentation": rle(np.ones((4, 4)))}
    with pytest.raises(ValueError, match=r"Image 5 has 24 x 33 pixels .* and a mask 4 x 4\."):
        panoptic_metrics(images, annotations, [small], NAMES)


# -- mask AP -------------------------------------------------------------------------------------------------------


def random_masks(seed, crowd=False, tied=False, images=4, most=7):
    """Images, annotations and detections, all ellipses; detections are moved, resized, of another class or new."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160]

    def ellipse(values):
        cx, cy, a, b = values
        return ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 <= 1

    annotations, detections = [], []
    for image_id in range(1, images + 1):
        for _ in range(int(rng.integers(0, most))):
            shape = np.append(rng.uniform(10, 110, 2), np.exp(rng.uniform(1.5, 4.2, 2)))
            label, mask = int(rng.integers(3)), ellipse(shape)
            annotations.append({
                "image_id": image_id, "category_id": label, "segmentation": rle(mask), "area": float(mask.sum()),
                "iscrowd": int(crowd and rng.random() < 0.3),
            })  # fmt: skip
            for _ in range(int(rng.integers(0, 3))):
                other = label if rng.random() < 0.8 else int(rng.integers(3))
                moved = ellipse(shape * rng.normal(1, 0.07, 4))
                if moved.any():
                    detections.append({"image_id": image_id, "category_id": other, "segmentation": rle(moved)})
        new = ellipse(np.append(rng.uniform(10, 110, 2), rng.uniform(5, 40, 2)))
        detections.append({"image_id": image_id, "category_id": int(rng.integers(3)), "segmentation": rle(new)})
    for detection in detections:
        detection["score"] = 0.5 if tied else round(float(rng.random()), 2)
    records = [{"id": i, "height": 120, "width": 160} for i in range(1, images + 1)]
    return records, annotations, detections, {0: "a", 1: "b", 2: "c"}


def with_pycocotools(images, annotations, detections, id2label):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": images,
            "categories": [{"id": i, "name": name} for i, name in id2label.items()],
            "annotations": [record | {"id": i} for i, record in enumerate(annotations, start=1)],
        }
        truth.createIndex()
        engine = COCOeval(truth, truth.loadRes([dict(record) for record in detections]), "segm")
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
    return engine


@pytest.mark.parametrize("case", [{}, {"crowd": True}, {"tied": True}, {"images": 1, "most": 30}])
def test_mask_ap_equals_pycocotools_on_random_worlds(case):
    for seed in range(5):
        records = random_masks(seed, **case)
        engine = with_pycocotools(*records)
        metrics = coco_metrics(*records, masks=True)
        np.testing.assert_allclose([metrics[name] for name in METRICS], engine.stats, atol=1e-12)
        precision = engine.eval["precision"][:, :, :, 0, -1]
        expected = [p[p > -1].mean() if (p > -1).any() else -1 for p in np.moveaxis(precision, 2, 0)]
        assert list(metrics["per_class"].values()) == pytest.approx(expected, abs=1e-12)
        without = (records[0], [{k: v for k, v in r.items() if k != "area"} for r in records[1]], *records[2:])
        assert coco_details(*without, masks=True)["metrics"] == metrics, "areas default to the number of pixels"


def test_records_without_masks_are_named():
    images, annotations, detections, names = random_masks(0)
    boxes = [{"image_id": 1, "category_id": 0, "bbox": [1, 2, 3, 4], "score": 0.5}]
    with pytest.raises(ValueError, match=r"Detection 0 \(image 1\) has no mask"):
        coco_metrics(images, annotations, boxes, names, masks=True)
    wrong = [detections[0] | {"segmentation": rle(np.ones((60, 80)))}]
    with pytest.raises(ValueError, match=r"Image 1 has 120 x 160 pixels .*a mask 60 x 80\. .*target_sizes"):
        coco_metrics(images, annotations, wrong, names, masks=True)


# -- over batches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_shapes_dataset(tmp_path_factory.mktemp("drawn"), num_train=2, num_val=8, masks=True, progress=False)


@pytest.fixture
def rows(drawn, load):
    return load(drawn, "val", masks=True)


def perfect(row, first_id=1):
    """The ground truth of a row as results of panoptic and of instance post-processing."""
    masks = decode_masks(row["objects"]["mask"], (row["height"], row["width"]))
    ids = torch.arange(first_id, first_id + len(masks))
    info = [
        {"id": int(i), "label_id": label, "was_fused": False, "score": 0.9}
        for i, label in zip(ids, row["objects"]["category"], strict=True)
    ]
    as_map = (masks * ids[:, None, None]).sum(0).to(torch.int32)
    return {"segmentation": as_map, "segments_info": info}, {"segmentation": masks, "segments_info": info}


class PerfectProcessor:
    """Answers with the ground truth, whatever the model's outputs, and records what it was asked for."""

    def __init__(self, rows):
        self.rows = {row["image_id"]: row for row in rows}
        self.asked = {}

    def post_process_panoptic_segmentation(self, outputs, target_sizes, **kwargs):
        self.asked["panoptic"] = kwargs
        return [perfect(self.rows[i])[0] for i in self._of(outputs, target_sizes)]

    def post_process_instance_segmentation(self, outputs, target_sizes, **kwargs):
        self.asked["instance"] = kwargs
        return [perfect(self.rows[i])[1] for i in self._of(outputs, target_sizes)]

    def _of(self, outputs, target_sizes):
        for image_id, size in zip(outputs, target_sizes.tolist(), strict=True):
            assert size == [self.rows[image_id]["height"], self.rows[image_id]["width"]]
        return outputs


class Echo(torch.nn.Module):
    """A model whose outputs are the ids in its pixels."""

    def forward(self, pixel_values, pixel_mask):
        assert not self.training
        return pixel_values[:, 0, 0, 0].long().tolist()


def batches(rows):
    for start in range(0, len(rows), 3):
        part = [rows[i] for i in range(start, min(start + 3, len(rows)))]
        ids = torch.tensor([row["image_id"] for row in part])
        yield {
            "pixel_values": ids[:, None, None, None].float().expand(-1, 3, 4, 4),
            "pixel_mask": torch.ones(len(part), 4, 4),
            "labels": [
                {"image_id": torch.tensor([r["image_id"]]), "orig_size": torch.tensor([r["height"], r["width"]])}
                for r in part
            ],
        }


def test_perfect_results_over_batches_have_a_quality_and_an_ap_of_one(rows):
    model, processor = Echo().train(), PerfectProcessor(rows)
    panoptic = evaluate_panoptic(model, batches(rows), rows, processor, progress=False)
    assert model.training
    result = panoptic.compute()
    assert {result[f"{name}{group}"] for name in ("PQ", "SQ", "RQ") for group in ("", "_things", "_stuff")} == {1.0}
    assert sum(row["tp"] for row in result["per_class"].values()) == sum(len(o["id"]) for o in rows["objects"])
    assert processor.asked["panoptic"] == {"label_ids_to_fuse": {3, 4}}
    masks = evaluate_detection(model, batches(rows), rows, processor, masks=True, progress=False)
    metrics = masks.compute()
    assert metrics["AP"] == metrics["AP50"] == 1.0
    assert set(metrics["per_class"]) == {"rectangle", "ellipse", "triangle"}, "stuff has no AP"
    assert processor.asked["instance"] == {"threshold": 0.0, "return_binary_maps": True}
    both = PanopticEvaluator(rows), MaskEvaluator(rows)
    run_evaluators(model, batches(rows), processor, both, progress=False)
    assert (both[0].compute(), both[1].compute()) == (result, metrics)


def test_an_image_without_results_counts_and_ids_may_begin_at_zero(rows):
    evaluator = PanopticEvaluator(rows)
    results = [perfect(row, first_id=0)[0] for row in rows]
    for row, result in zip(rows, results, strict=True):  # transformers' instance maps: ids from 0, -1 elsewhere
        result["segmentation"] = torch.where(torch.ones(row["height"], row["width"]).bool(), result["segmentation"], -1)
    evaluator.update(rows["image_id"][1:], results[1:])
    found = evaluator.compute()
    missed = len(rows[0]["objects"]["id"])
    assert sum(row["fn"] for row in found["per_class"].values()) == missed
    assert sum(row["fp"] for row in found["per_class"].values()) == 0
    empty = {"segmentation": torch.full((rows[0]["height"], rows[0]["width"]), -1), "segments_info": []}
    evaluator.update([rows[0]["image_id"]], [empty])
    assert evaluator.compute() == found


def test_detections_are_results_that_pycocotools_reads(rows, drawn):
    evaluator, ids = MaskEvaluator(rows), category_ids(rows)
    results = [perfect(row)[1] for row in rows]
    for result in results:
        result["segmentation"] = torch.roll(result["segmentation"], 3, dims=2)
    evaluator.update(rows["image_id"], results)
    things = [d for d in json.loads(json.dumps(evaluator.detections())) if d["category_id"] <= 3]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(drawn / "annotations" / "instances_val.json")
        engine = COCOeval(truth, truth.loadRes([dict(d) for d in things]), "segm")
        engine.evaluate()
        engine.accumulate()
        engine.summarize()
    metrics = evaluator.compute()
    assert 0.2 < metrics["AP"] < 0.95
    one_by_one = [
        r for row, found in zip(rows, results, strict=True) for r in mask_results(found, row["image_id"], ids)
    ]
    assert [r for r in one_by_one if r["category_id"] <= 3] == things
    assert [metrics[name] for name in METRICS] == pytest.approx(engine.stats.tolist(), abs=1e-12)


def test_written_panoptic_results_are_read_again_with_a_quality_of_one(rows, tmp_path, load):
    """Predictions to PNG and JSON, beside the images, and back as a data set, against which the same results are
    perfect."""
    ids, names = category_ids(rows), id2label(rows)
    categories = [{"id": ids[i], "name": name, "isthing": int(i < 3)} for i, name in names.items()]
    writer = PanopticWriter(tmp_path / "annotations" / "panoptic_train.json", categories)
    (tmp_path / "train").mkdir()
    for row in rows:
        row["image"].save(tmp_path / "train" / row["file_name"])
        image = {"id": row["image_id"], **{key: row[key] for key in ("file_name", "width", "height")}}
        result = perfect(row, first_id=300)[0]
        segments = [segment | {"category_id": ids[segment["label_id"]]} for segment in result["segments_info"]]
        writer.add(image, result["segmentation"], segments)
    file = writer.close()
    assert json.loads(file.read_text())["annotations"][0]["segments_info"][0]["score"] == 0.9
    again = load(tmp_path, masks=True)
    evaluator = PanopticEvaluator(again)
    evaluator.update(rows["image_id"], [perfect(row)[0] for row in rows])
    assert (evaluator.compute()["PQ"], evaluator.compute()["PQ_stuff"]) == (1.0, 1.0)
    with pytest.raises(FileExistsError, match="already exists"):
        PanopticWriter(file, categories)


def test_results_that_contradict_themselves_or_the_image_are_refused(rows, load, drawn, tmp_path):
    evaluator, row = PanopticEvaluator(rows), rows[0]
    as_map, as_masks = perfect(row)
    cases = {  # in each of them the image is named first
        r"the ids \[1\] are in the map of segments and not among": as_map
        | {"segments_info": as_map["segments_info"][1:]},
        "two segments have the same id": as_map | {"segments_info": as_map["segments_info"] * 2},
        "as target_sizes to the post-processing": as_map | {"segmentation": as_map["segmentation"][:-1]},
        r"there are \d masks, but \d records": as_masks | {"segments_info": as_masks["segments_info"][1:]},
    }
    for message, result in cases.items():
        with pytest.raises(ValueError, match=rf"(?i)image {row['image_id']}\b.*{message}"):
            evaluator.update([row["image_id"]], [result])
    with pytest.raises(ValueError, match="Image 4711 is not of the data set"):
        evaluator.update([4711], [as_map])
    with pytest.raises(ValueError, match="load it with masks=True"):
        PanopticEvaluator(load(drawn, "val"))
    overlapping = rows.map(
        lambda row: {"objects": row["objects"] | {"mask": row["objects"]["mask"][:1] * len(row["objects"]["mask"])}}
    )
    with pytest.raises(ValueError, match=r"Annotations of image 1 overlap by \d+ pixels"):
        PanopticEvaluator(overlapping)
    writer = PanopticWriter(tmp_path / "p.json", [])
    nothing = np.zeros((2, 3), dtype=int)
    for name in ("2-a.jpg", "x/a.jpg", "y/a.jpg", "z/a.jpg"):  # no PNG replaces another
        writer.add({"id": name, "file_name": name, "width": 3, "height": 2}, nothing, [])
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["2-a.png", "3-a.png", "4-a.png", "a.png"]
    image = SimpleNamespace(record={"id": 1, "file_name": "a.png", "width": 3, "height": 2}).record
    with pytest.raises(ValueError, match=r"image 1 \(a\.png\): the ids \[7\]"):
        writer.add(image, np.full((2, 3), 7), [])
    with pytest.raises(ValueError, match=r"image 1 \(a\.png\) has 2 x 3 pixels"):
        writer.add(image, np.full((3, 2), 7), [{"id": 7, "category_id": 1}])


def test_where_all_classes_are_stuff_there_are_segments_to_measure_and_no_boxes(rows):
    every = rows.select(range(len(rows)))
    set_stuff_labels(every, list(id2label(rows).values()))
    assert stuff_labels(every) == list(id2label(rows).values())
    assert category_ids(every) == category_ids(rows)
    evaluation = ModelEvaluation(every, with_masks=True)
    for row in every:
        evaluation.segments.update([row["image_id"]], [perfect(row)[0]])
    metrics = evaluation.compute()
    assert (metrics["PQ"], metrics["PQ_stuff"], metrics["PQ_things"]) == (1.0, 1.0, -1.0)
    assert (metrics["AP"], metrics["mask_AP50"], metrics["per_class"]) == (-1.0, -1.0, {})
