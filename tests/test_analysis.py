"""Analysis of errors: planted errors are found with their type; expected numbers are worked out by hand."""

import base64
import html.parser
import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import tiny_model
from PIL import Image
from test_evaluation import CASES, as_dataset, as_results, random_case
from test_image_processing import photo

from hf_detr import DetrDetectionOutput, DetrImageProcessor
from hf_detr.data import draw_shapes_dataset
from hf_detr.evaluation import (
    METRICS,
    CocoEvaluator,
    best_thresholds,
    coco_metrics,
    f1_by_threshold,
    save_class_thresholds,
    write_report,
)
from hf_detr.evaluation.error_analysis import (
    ERROR_TYPES,
    above,
    confusion_matrix,
    error_breakdown,
    find_errors,
    worst_images,
)
from hf_detr.model.post_processing import post_process_detection

NAMES = {0: "cat", 1: "dog", 2: "owl"}
SIDE = 100  # of every planted object, on a grid with gaps of its own size


def planted(num_images=4, per_image=9):
    """Objects far from each other, and a perfect detection of each with a score of its own above 0.5."""
    annotations = [
        {"image_id": image, "category_id": (image + k) % 3, "iscrowd": 0, "area": SIDE**2,
         "bbox": [200.0 * (k % 3), 200.0 * (k // 3), SIDE, SIDE]}
        for image in range(num_images) for k in range(per_image)
    ]  # fmt: skip
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": list(a["bbox"]), "score": 0.99 - 0.01 * n}
        for n, a in enumerate(annotations)
    ]
    return annotations, detections


def moved(detection, fraction, **changes):
    """The detection shifted right by this fraction of its width: IoU = (1 - fraction) / (1 + fraction)."""
    x, y, width, height = detection["bbox"]
    return detection | {"bbox": [x + fraction * width, y, width, height]} | changes


def plant(kind, detections, at):
    """Make one error of this kind out of the perfect detection number `at`."""
    right = detections[at]
    other = (right["category_id"] + 1) % 3
    if kind == "classification":
        detections[at] = right | {"category_id": other}
    elif kind == "localisation":
        detections[at] = moved(right, 0.5)  # IoU 1/3
    elif kind == "both":
        detections.append(moved(right, 0.5, category_id=other, score=0.3))
    elif kind == "duplicate":
        detections.append(moved(right, 0.1, score=0.3))  # IoU 0.82, found with a higher score
    elif kind == "background":
        detections.append(right | {"bbox": [5000.0, 5000.0, 10.0, 10.0], "score": 0.3})
    else:
        detections[at] = None


def counts(annotations, detections):
    found = error_breakdown(annotations, detections, NAMES)
    return {kind: row["count"] for kind, row in found["errors"].items()}


def test_perfect_detections_have_no_errors():
    annotations, detections = planted()
    found = error_breakdown(annotations, detections, NAMES)
    assert found["ap50"] == pytest.approx(1)
    assert found["errors"] == {kind: {"count": 0, "delta_ap50": 0} for kind in ERROR_TYPES}
    assert find_errors(annotations, detections) == []


@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("kind", ERROR_TYPES)
def test_planted_errors_of_one_kind_are_found_exactly_and_cost_the_whole_loss_of_ap(kind, number):
    annotations, detections = planted()
    for at in range(number):
        plant(kind, detections, 4 * at + 1)
    detections = [d for d in detections if d]
    found = error_breakdown(annotations, detections, NAMES)
    assert {k: row["count"] for k, row in found["errors"].items()} == {k: number * (k == kind) for k in ERROR_TYPES}
    for other, row in found["errors"].items():
        assert row["delta_ap50"] == pytest.approx(1 - found["ap50"] if other == kind else 0, abs=1e-12)


def test_planted_errors_of_all_kinds_at_once_are_found_exactly():
    annotations, detections = planted()
    numbers = dict(zip(ERROR_TYPES, (5, 3, 4, 6, 2, 7), strict=True))
    places = iter(range(len(annotations)))
    for kind, number in numbers.items():
        for _ in range(number):
            plant(kind, detections, next(places))
    detections = [d for d in detections if d]
    assert counts(annotations, detections) == numbers
    shuffled = [detections[i] for i in np.random.default_rng(0).permutation(len(detections))]
    assert counts(annotations, shuffled) == numbers
    errors = find_errors(annotations, detections)
    assert [sum(e.kind == kind for e in errors) for kind in ERROR_TYPES] == list(numbers.values())


def test_the_bounds_of_the_bins_are_the_papers():
    objects = [{"image_id": 1, "category_id": 0, "bbox": [0.0, 0.0, 100.0, 100.0], "iscrowd": 0}]

    def kind(width, label):
        """Of a box that covers this much of the object: IoU = width / 100."""
        box = {"image_id": 1, "category_id": label, "bbox": [0.0, 0.0, float(width), 100.0], "score": 0.9}
        return [error.kind for error in find_errors(objects, [box])]

    assert [kind(width, 0) for width in (51, 50)] == [[], []]
    assert [kind(width, 0) for width in (49, 10)] == [["localisation"]] * 2
    assert kind(9, 0) == ["background", "missed"]
    assert [kind(width, 1) for width in (51, 50)] == [["classification"]] * 2
    assert [kind(width, 1) for width in (49, 11)] == [["both", "missed"]] * 2
    assert [kind(width, 1) for width in (10, 9)] == [["background", "missed"]] * 2


def test_cost_of_one_error_by_hand():
    """One class, two objects: found with 0.9; a wrong box with 0.8; the second object 0.7."""
    annotations = [
        {"image_id": 1, "category_id": 0, "bbox": [x, 0.0, 100.0, 100.0], "iscrowd": 0} for x in (0.0, 500.0)
    ]
    right = [
        {"image_id": 1, "category_id": 0, "bbox": a["bbox"], "score": s}
        for a, s in zip(annotations, (0.9, 0.7), strict=True)
    ]
    wrong = {"image_id": 1, "category_id": 0, "bbox": [2000.0, 0.0, 10.0, 10.0], "score": 0.8}
    found = error_breakdown(annotations, [*right, wrong], {0: "cat"})
    ap50 = (51 * 1 + 50 * 2 / 3) / 101  # 101 recalls: 51 up to 0.5 with precision 1, 50 beyond with 2/3
    assert found["ap50"] == pytest.approx(ap50)
    assert found["errors"]["background"] == {"count": 1, "delta_ap50": pytest.approx(1 - ap50)}


def test_of_two_corrected_detections_of_one_object_the_better_counts():
    annotations, detections = planted(1, 3)
    first = detections.pop(0)
    detections += [moved(first, 0.5, score=0.6), moved(first, 0.4, score=0.5)]
    errors = error_breakdown(annotations, detections, NAMES)["errors"]
    assert errors["localisation"]["count"] == 2
    assert errors["missed"]["count"] == 0  # correcting the box would find it
    # class 0: no true detection; corrected, the better of the two is it and the other goes
    assert errors["localisation"]["delta_ap50"] == pytest.approx(1 / 3)


def test_a_class_that_was_never_found_is_missed_and_nothing_else():
    annotations, detections = planted()
    left = [d for d in detections if d["category_id"] != 2]
    found = error_breakdown(annotations, left, NAMES)
    assert found["ap50"] == pytest.approx(2 / 3)
    assert found["errors"]["missed"] == {"count": 12, "delta_ap50": pytest.approx(1 / 3)}
    nothing = error_breakdown(annotations, [], NAMES)
    assert nothing["ap50"] == 0
    assert nothing["errors"]["missed"] == {"count": 36, "delta_ap50": 1}
    assert error_breakdown([], [], NAMES)["ap50"] == -1


def test_detections_in_a_crowd_are_no_errors():
    annotations, detections = planted(1, 3)
    annotations.append({"image_id": 0, "category_id": 1, "bbox": [0.0, 600.0, 600.0, 300.0], "iscrowd": 1})
    for x in (0.0, 200.0):
        detections.append({"image_id": 0, "category_id": 1, "bbox": [x, 650.0, 90.0, 90.0], "score": 0.9})
    assert find_errors(annotations, detections) == []
    detections[-1]["category_id"] = 0  # a crowd of dogs does not excuse a cat
    assert [error.kind for error in find_errors(annotations, detections)] == ["background"]


@pytest.mark.parametrize("case", [case for case in CASES if case != "one image, more than 100"])
def test_ap50_of_the_breakdown_equals_coco(case):
    for seed in range(3):
        images, annotations, detections, id2label = random_case(seed, **CASES[case])
        expected = coco_metrics(images, annotations, detections, id2label)["AP50"]
        assert error_breakdown(annotations, detections, id2label)["ap50"] == pytest.approx(expected, abs=1e-9)


def test_more_than_100_objects_in_an_image_are_all_counted():
    boxes = [[20.0 * (i % 15), 20.0 * (i // 15), 15.0, 15.0] for i in range(180)]
    annotations = [{"image_id": 1, "category_id": 0, "bbox": box, "iscrowd": 0} for box in boxes]
    detections = [annotation | {"score": 1 - i / 200} for i, annotation in enumerate(annotations)]
    assert confusion_matrix(annotations, detections, {0: "a"}, threshold=0.0) == [[180, 0], [0, 0]]
    assert f1_by_threshold(annotations, detections, {0: "a"})["best"]["a"]["recall"] == 1
    assert error_breakdown(annotations, detections, {0: "a"})["ap50"] == pytest.approx(1)
    assert find_errors(annotations, detections) == []


def test_f1_and_the_best_threshold_by_hand():
    """Four objects; scores 0.9 right, 0.8 wrong, 0.6 right, 0.6 right, 0.2 wrong. F1 = 2 TP / (kept + objects)."""
    annotations = [
        {"image_id": 1, "category_id": 0, "bbox": [200.0 * x, 0.0, 100.0, 100.0], "iscrowd": 0} for x in range(4)
    ]
    nowhere = [900.0, 900.0, 10.0, 10.0]
    rows = [(0.9, annotations[0]["bbox"]), (0.8, nowhere), (0.6, annotations[1]["bbox"]),
            (0.6, annotations[2]["bbox"]), (0.2, nowhere)]  # fmt: skip
    detections = [{"image_id": 1, "category_id": 0, "bbox": box, "score": score} for score, box in rows]
    found = f1_by_threshold(annotations, detections, {0: "cat", 1: "dog"})
    expected = {
        0.95: 0,
        0.9: 2 / 5,
        0.85: 2 / 5,
        0.8: 2 / 6,
        0.7: 2 / 6,
        0.6: 6 / 8,
        0.3: 6 / 8,
        0.2: 6 / 9,
        0.0: 6 / 9,
    }
    for threshold, f1 in expected.items():
        assert found["f1"]["cat"][round(threshold * 100)] == pytest.approx(f1), threshold
    assert found["best"]["cat"] == pytest.approx(
        {"threshold": 0.4, "f1": 0.75, "precision": 0.75, "recall": 0.75, "objects": 4}
    )
    assert found["best"]["dog"] == {"threshold": None, "f1": 0, "precision": 0, "recall": 0, "objects": 0}
    assert best_thresholds(found) == pytest.approx([0.4, 0.5])
    assert len(above(detections, best_thresholds(found))) == 4
    json.dumps(found)  # plain numbers


def test_no_threshold_beats_the_best_one():
    for seed in range(5):
        _, annotations, detections, id2label = random_case(seed, crowd=True)
        found = f1_by_threshold(annotations, detections, id2label)
        for name in id2label.values():
            assert max(found["f1"][name]) <= found["best"][name]["f1"] + 1e-12


def test_confusions_are_counted_in_their_cell():
    annotations, detections = planted()
    assert confusion_matrix(annotations, detections, NAMES) == np.diag([12, 12, 12, 0]).tolist()
    plant("classification", detections, 0)  # a cat predicted as a dog
    plant("missed", detections, 1)  # a dog
    plant("background", detections, 2)  # an owl in the background, with score 0.3
    plant("localisation", detections, 5)  # an owl beside an owl: one is missed, one is background
    detections = [d for d in detections if d]
    expected = [[11, 1, 0, 0], [0, 11, 0, 1], [0, 0, 11, 1], [0, 0, 1, 0]]
    assert confusion_matrix(annotations, detections, NAMES) == expected
    expected[3][2] += 1
    assert confusion_matrix(annotations, detections, NAMES, threshold=0.3) == expected
    assert confusion_matrix(annotations, detections, NAMES, threshold=[0.5, 0.5, 0.3]) == expected


def test_two_objects_with_one_box_are_not_confused():
    box = [0.0, 0.0, 100.0, 100.0]
    annotations = [{"image_id": 1, "category_id": label, "bbox": box, "iscrowd": 0} for label in (0, 1)]
    detections = [{"image_id": 1, "category_id": label, "bbox": box, "score": 0.9 - label / 10} for label in (1, 0)]
    assert confusion_matrix(annotations, detections, {0: "a", 1: "b"}) == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_the_worst_image_comes_first():
    annotations, detections = planted()
    for at in (9, 10, 11):  # image 1: three missed, weight 1 each
        detections[at] = None
    plant("background", detections, 18)  # image 2: two of low score, weight 0.3 each
    plant("background", detections, 18)
    detections[27] = detections[27] | {"category_id": 2}  # image 3: a confusion with its score
    rows = worst_images(find_errors(annotations, [d for d in detections if d]))
    assert [row["image_id"] for row in rows] == [1, 3, 2]
    assert [row["weight"] for row in rows] == pytest.approx([3, detections[27]["score"], 0.6])
    assert [row["kinds"] for row in rows] == [{"missed": 3}, {"classification": 1}, {"background": 2}]
    assert len(worst_images(find_errors(annotations, []), 2)) == 2


# -- thresholds in the checkpoint ----------------------------------------------------------------------------------


def outputs_with(scores):
    """Outputs of one image in which query i predicts class i with this score."""
    logits = torch.full((1, len(scores), len(scores) + 1), -30.0)
    for i, score in enumerate(scores):
        logits[0, i, i], logits[0, i, -1] = np.log(score), np.log(1 - score)
    return DetrDetectionOutput(logits=logits, pred_boxes=torch.full((1, len(scores), 4), 0.5))


def test_thresholds_of_each_class_are_saved_with_the_processor_and_used_when_asked(tmp_path):
    processor = DetrImageProcessor()
    assert processor.class_thresholds is None
    processor.save_pretrained(tmp_path)
    assert "class_thresholds" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    processor.class_thresholds = [0.3, 0.8, 0.55]
    processor.save_pretrained(tmp_path)
    again = DetrImageProcessor.from_pretrained(tmp_path)
    assert again.class_thresholds == [0.3, 0.8, 0.55]
    outputs = outputs_with([0.4, 0.7, 0.6])
    labels = again.post_process_object_detection(outputs, threshold="per_class")[0]["labels"]
    assert labels.tolist() == [0, 2]
    assert again.post_process_object_detection(outputs, threshold=0.5)[0]["labels"].tolist() == [1, 2]


def test_a_score_that_reaches_its_threshold_is_kept():
    outputs = outputs_with([0.4, 0.7])
    scores = post_process_detection(outputs, 0.0)[0]["scores"].tolist()
    assert len(post_process_detection(outputs, scores)[0]["scores"]) == 2


def test_thresholds_that_are_not_there_or_do_not_fit_are_errors():
    processor, outputs = DetrImageProcessor(), outputs_with([0.4, 0.7])
    with pytest.raises(ValueError, match=r"examples/evaluate\.py --save_thresholds"):
        processor.post_process_object_detection(outputs, threshold="per_class")
    with pytest.raises(ValueError, match='a number or "per_class"'):
        processor.post_process_object_detection(outputs, threshold="best")
    processor.class_thresholds = [0.5]
    with pytest.raises(ValueError, match="2 classes but 1 thresholds"):
        processor.post_process_object_detection(outputs, threshold="per_class")


def test_a_processor_with_thresholds_processes_images_as_before():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    one = DetrImageProcessor(size={"height": 32, "width": 32})
    two = DetrImageProcessor(size={"height": 32, "width": 32}, class_thresholds=[0.1] * 5)
    assert two.class_thresholds == [0.1] * 5
    torch.testing.assert_close(
        one(image, return_tensors="pt").pixel_values, two(image, return_tensors="pt").pixel_values
    )
    assert tiny_model(num_labels=5)(**two(image, return_tensors="pt")).logits.shape[-1] == 6


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """An evaluator and its report: (evaluator, folder)."""
    images, annotations, detections, _ = random_case(5, crowd=True, images=6)
    pictures = {image["id"]: photo(image["width"], image["height"], image["id"]) for image in images}
    dataset = as_dataset(images, annotations, dict(enumerate(("cat", "<b>dog</b>", "owl"))), pictures=pictures)
    evaluator = CocoEvaluator(dataset)
    evaluator.update([image["id"] for image in images], as_results(images, detections))
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "report"
    write_report(folder, evaluator, dataset, "a & b")
    return evaluator, folder


def test_a_report_needs_no_other_file_and_no_network(report):
    folder = report[1]
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    page = (folder / "report.html").read_text()
    assert "<title>a &amp; b</title>" in page
    assert not re.findall(r"https?://|<link|<script|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 6
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
        assert max(picture.size) == 360
    assert "<b>dog" not in page
    assert page.count("&lt;b&gt;dog&lt;/b&gt;") > 4
    html.parser.HTMLParser().feed(page)


def test_a_report_has_the_numbers_of_the_evaluator(report):
    evaluator, folder = report
    found = json.loads((folder / "report.json").read_text())
    assert found["metrics"] == evaluator.compute()
    assert [found[key] for key in ("images", "detections")] == [6, len(evaluator.detections())]
    assert found["objects"] == sum(not record["iscrowd"] for record in evaluator.annotations)
    assert found["errors"]["ap50"] == pytest.approx(found["metrics"]["AP50"], abs=1e-9)
    assert np.mean(
        [np.mean(values) for values in found["precision_recall"]["0.75"]["precision"].values()]
    ) == pytest.approx(found["metrics"]["AP75"], abs=1e-9)
    counts = np.array(found["confusion_matrix"]["counts"])
    assert counts[:-1].sum() == found["objects"]
    page = (folder / "report.html").read_text()
    for name in METRICS:
        value = found["metrics"][name]
        assert f"<div>{name}<b>{'–' if value == -1 else format(value, '.3f')}</b>" in page


def test_a_report_without_detections_and_with_many_classes_is_written(tmp_path):
    names = [f"class {i}" for i in range(40)]
    images, annotations, _, _ = random_case(2, classes=40)
    pictures = {image["id"]: photo(20, 30) for image in images}
    dataset = as_dataset(images, annotations, dict(enumerate(names)), pictures=pictures)
    numbers = write_report(tmp_path, CocoEvaluator(dataset), dataset, "nothing")
    assert numbers["class_thresholds"] == [0.5] * 40
    assert "16 others are in report.json" in (tmp_path / "report.html").read_text()
    empty = as_dataset(images, [], dict(enumerate(names)), pictures=pictures)
    write_report(tmp_path, CocoEvaluator(empty), empty, "no objects either")
    assert "No image has an error" in (tmp_path / "report.html").read_text()
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_thresholds_are_stored_in_a_local_checkpoint_of_ours_and_nothing_else_changes(tmp_path):
    DetrImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "preprocessor_config.json").read_text())
    path = save_class_thresholds(tmp_path, [0.25, 0.5])
    assert json.loads(path.read_text()) == before | {"class_thresholds": [0.25, 0.5]}
    assert DetrImageProcessor.from_pretrained(tmp_path).class_thresholds == [0.25, 0.5]
    with pytest.raises(ValueError, match="local folder"):
        save_class_thresholds("facebook/detr-resnet-50", [0.5])
    transformers.DetrImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"examples/convert\.py"):
        save_class_thresholds(tmp_path, [0.5])


def test_a_processor_translated_from_transformers_has_no_thresholds(tmp_path):
    transformers.DetrImageProcessor().save_pretrained(tmp_path)
    assert DetrImageProcessor.from_pretrained(tmp_path).class_thresholds is None


def test_the_example_writes_report_and_thresholds(tmp_path, monkeypatch, capsys):
    folder = draw_shapes_dataset(tmp_path / "shapes", num_train=2, num_val=6, progress=False)
    names = ["rectangle", "ellipse", "triangle"]
    tiny_model(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}).save_pretrained(
        tmp_path / "model"
    )
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "model")
    script = str(Path(__file__).parents[1] / "examples" / "evaluate.py")
    arguments = ["--model", "model", "--dataset", str(folder), "--num_workers", "0", "--max_detections", "12"]
    arguments += ["--report", "report", "--save_thresholds", "--output", "metrics.json"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "preprocessor_config.json has a threshold for each class now" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.html").is_file()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["metrics"] == json.loads((tmp_path / "metrics.json").read_text())
    stored = DetrImageProcessor.from_pretrained(tmp_path / "model").class_thresholds
    assert stored == report["class_thresholds"]
    assert list(report["metrics"]["per_class"]) == names


def test_the_example_exits_with_one_sentence_where_thresholds_cannot_be_saved(monkeypatch, capsys):
    script = str(Path(__file__).parents[1] / "examples" / "evaluate.py")
    monkeypatch.setattr(sys, "argv", [script, "--model", "org/name", "--dataset", "data", "--save_thresholds"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    assert "org/name is not a local folder with a preprocessor" in capsys.readouterr().err
