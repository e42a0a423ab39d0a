"""Annotations that a model contradicts."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from script_runner import run_script
from torch import nn

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import DetectionCollator, build_loader, draw_shapes_dataset, id2label, load_detection_dataset
from hf_detr.dataset_check import as_records, find_label_errors, write_coco_suggestions, write_label_studio
from hf_detr.dataset_check.label_errors import compare, usual_confidence
from hf_detr.dataset_check.label_errors_files import corrected, write_label_errors_page

SCRIPT = Path(__file__).parents[1] / "examples" / "label_errors.py"
CAT, DOG = 0, 1


def objects_of(*given, crowd=()):
    """Boxes xywh with classes, as the `objects` of a row."""
    boxes, labels = [list(box) for box, _ in given], [label for _, label in given]
    flags = [int(index in crowd) for index in range(len(given))]
    areas = [box[2] * box[3] for box in boxes]
    return {"id": [10 + i for i in range(len(given))], "bbox": boxes, "category": labels, "area": areas,
            "iscrowd": flags}  # fmt: skip


def predictions(*found):
    """(probability of cat, of dog), box xywh."""
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in found], dtype=torch.float32).reshape(-1, 4)
    return torch.tensor([list(p) for p, _ in found], dtype=torch.float32).reshape(-1, 2), boxes


def suspicions(found, objects, image=0, usual=1.0):
    """Those of one image, by a model of this usual confidence."""
    return compare(*found, objects, image).errors({CAT: usual, DOG: usual})


A, B, FAR = (10, 10, 40, 40), (100, 10, 40, 60), (200, 200, 30, 30)


def test_what_the_model_confirms_is_not_suspicious():
    found = predictions(((0.9, 0.05), A), ((0.02, 0.95), (101, 11, 40, 60)), ((0.05, 0.02), FAR))
    assert suspicions(found, objects_of((A, CAT), (B, DOG))) == []


@pytest.mark.parametrize(
    ("found", "given", "kind", "suspicion", "suggested"),
    [
        ([((0.9, 0.0), A)], [], "missing", 0.9, (CAT, A)),
        ([((0.1, 0.8), A)], [(A, CAT)], "wrong class", 0.7, (DOG, A)),
        # an IoU of 20·40 / (2·1600 - 800) = 1/3 with the box 20 pixels beside it
        ([((0.9, 0.0), (30, 10, 40, 40))], [(A, CAT)], "misplaced", 0.9 * (2 / 3) / 0.9, (CAT, (30, 10, 40, 40))),
        ([((0.9, 0.0), A)], [(A, CAT), (FAR, DOG)], "not an object", 1.0, (None, None)),
        ([((0.9, 0.0), A)], [(A, CAT), ((12, 10, 40, 40), CAT)], "duplicate", 38 / 42, (None, None)),
    ],
)
def test_each_kind_of_error_is_found(found, given, kind, suspicion, suggested):
    [error] = suspicions(predictions(*found), objects_of(*given), 3)
    assert (error.kind, error.image) == (kind, 3)
    assert error.suspicion == pytest.approx(suspicion, abs=1e-5)
    assert (error.suggested_label, error.suggested_box) == suggested
    assert error.annotation == (None if kind == "missing" else len(given) - 1)


def test_two_objects_at_one_place_are_not_duplicates_if_the_model_finds_both():
    close = (12, 10, 40, 40)
    found = predictions(((0.9, 0.0), A), ((0.8, 0.0), close))
    assert suspicions(found, objects_of((A, CAT), (close, CAT))) == []


def test_an_unsure_model_suspects_only_what_it_finds_less_than_usual():
    given = objects_of((A, CAT), (B, DOG), (FAR, DOG))
    found = predictions(((0.45, 0.0), A), ((0.0, 0.5), B), ((0.0, 0.1), FAR))
    assert {error.annotation for error in suspicions(found, given, usual=1.0)} == {0, 1, 2}
    [error] = suspicions(found, given, usual=0.5)
    assert (error.kind, error.annotation) == ("not an object", 2)
    assert error.suspicion == pytest.approx(1 - 0.1 / 0.5)


def test_usual_confidence_is_the_median_of_a_class():
    cats = [compare(*predictions(((p / 20, 0.0), A)), objects_of((A, CAT)), 0) for p in range(1, 12)]  # 0.05 to 0.55
    dogs = [compare(*predictions(((0.0, p), B)), objects_of((B, DOG)), 0) for p in (0.02, 0.06)]
    usual = usual_confidence([*cats, *dogs])
    assert usual == pytest.approx({CAT: 0.3, DOG: 0.04})
    assert all(error.kind != "not an object" for image in dogs for error in image.errors(usual)), "it finds no dogs"
    assert usual_confidence([]) == {}


def test_crowds_are_neither_checked_nor_missed():
    found = predictions(((0.9, 0.0), (20, 20, 30, 30)))
    assert suspicions(found, objects_of(((0, 0, 300, 300), CAT), crowd=[0])) == []


def test_an_object_with_an_annotation_of_its_own_contradicts_no_other():
    rider, horse = (10, 10, 40, 40), (10, 15, 40, 45)
    found = predictions(((0.6, 0.0), rider), ((0.0, 0.95), horse))
    assert suspicions(found, objects_of((rider, CAT), (horse, DOG))) == []


def test_several_predictions_of_a_forgotten_object_are_one_suspicion():
    found = predictions(((0.9, 0.0), FAR), ((0.6, 0.1), (202, 200, 30, 30)))
    [error] = suspicions(found, objects_of((A, CAT), crowd=[0]))
    assert (error.kind, error.suspicion) == ("missing", pytest.approx(0.9))


def test_images_without_annotations_or_predictions_are_compared():
    assert suspicions(predictions(((0.01, 0.01), A)), objects_of()) == []


def test_corrected_annotations_have_all_suggestions():
    given = objects_of((A, CAT), (B, DOG), (FAR, DOG), ((0, 0, 9, 9), CAT), crowd=[3])
    found = predictions(((0.1, 0.9), A), ((0.0, 0.9), (120, 10, 40, 60)), ((0.9, 0.0), (60, 100, 30, 20)))
    errors = suspicions(found, given)
    assert sorted(error.kind for error in errors) == ["misplaced", "missing", "not an object", "wrong class"]
    assert corrected(given, errors) == [(DOG, A), (DOG, (120, 10, 40, 60)), (CAT, (60, 100, 30, 20))]


class Oracle(nn.Module):
    """Finds exactly the objects it was made with."""

    def __init__(self, dataset):
        super().__init__()
        self.config = SimpleNamespace(id2label=id2label(dataset))
        self.rows = [(row["objects"], row["width"], row["height"]) for row in dataset]
        self.next = 0

    def forward(self, pixel_values, pixel_mask):
        count, classes = len(pixel_values), len(self.config.id2label)
        logits, boxes = torch.full((count, 20, classes + 1), -8.0), torch.full((count, 20, 4), 0.01)
        logits[..., -1] = 8.0
        for image in range(count):
            objects, width, height = self.rows[self.next]
            self.next += 1
            for query, ((x, y, w, h), label) in enumerate(zip(objects["bbox"], objects["category"], strict=True)):
                boxes[image, query] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
                logits[image, query, -1], logits[image, query, label] = -8.0, 8.0
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = draw_shapes_dataset(tmp_path_factory.mktemp("labels") / "data", num_train=1, num_val=10, progress=False)
    return folder, load_detection_dataset(folder, "val", cache_dir=folder / "cache", progress=False)


def with_errors(dataset):
    """The data set with the class of the first object of image 1 changed, and the first object of image 2 dropped."""
    objects = [dict(row) for row in dataset["objects"]]
    objects[1] = objects[1] | {"category": [(objects[1]["category"][0] + 1) % 3, *objects[1]["category"][1:]]}
    objects[2] = {name: values[1:] for name, values in objects[2].items()}
    return dataset.remove_columns("objects").add_column("objects", objects, feature=dataset.features["objects"])


def loader_of(dataset):
    collator = DetectionCollator(DetrImageProcessor(size={"height": 64, "width": 64}))
    return build_loader(dataset, collator, batch_size=4, num_workers=0, training=False)


def test_planted_errors_are_found_and_no_others(drawn, tmp_path):
    _, clean = drawn
    dirty = with_errors(clean)
    assert find_label_errors(Oracle(clean), loader_of(clean), clean, progress=False) == []
    errors = find_label_errors(Oracle(clean), loader_of(dirty), dirty, progress=False)
    assert {(e.image, e.annotation, e.kind) for e in errors} == {(1, 0, "wrong class"), (2, None, "missing")}
    names = id2label(clean)
    wrong = next(record for record in as_records(errors, dirty) if record["kind"] == "wrong class")
    assert wrong["suggested_label"] == names[clean[1]["objects"]["category"][0]]
    assert (wrong["file_name"], wrong["bbox"]) == (clean[1]["file_name"], clean[1]["objects"]["bbox"][0])

    file = write_label_studio(errors, dirty, tmp_path / "tasks.json", root="/data/")
    tasks = {task["data"]["image"]: task["predictions"][0]["result"] for task in json.loads(file.read_text())}
    assert set(tasks) == {f"/data/{clean[i]['file_name']}" for i in (1, 2)}
    for index in (1, 2):
        row = clean[index]
        found = [
            ([v[k] / 100 for k in ("x", "y", "width", "height")], v["rectanglelabels"][0])
            for v in (result["value"] for result in tasks[f"/data/{row['file_name']}"])
        ]
        sides = [row["width"], row["height"]] * 2
        expected = [
            (np.array(box) / sides, names[label])
            for box, label in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
        ]
        assert sorted(name for _, name in found) == sorted(name for _, name in expected)
        for place, name in expected:
            assert any(other == name and np.allclose(place, box, atol=1e-3) for box, other in found)

    coco = json.loads(write_coco_suggestions(errors, dirty, tmp_path / "coco.json").read_text())
    assert [category["id"] for category in coco["categories"]] == [1, 2, 3], "CVAT takes category 0 for none"
    assert all(record["segmentation"] == [] for record in coco["annotations"])
    assert [image["file_name"] for image in coco["images"]] == [dirty[e.image]["file_name"] for e in errors]
    assert len(coco["annotations"]) == sum(len(clean[i]["objects"]["bbox"]) for i in (1, 2))
    page = write_label_errors_page(errors, dirty, tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 2
    assert "wrong class" in page
    assert "<script" not in page


def test_a_model_of_other_classes_is_refused(drawn):
    _, clean = drawn
    model = Oracle(clean)
    model.config.id2label = {0: "cat"}
    with pytest.raises(ValueError, match=r"The model has the classes \['cat'\]"):
        find_label_errors(model, loader_of(clean), clean)


def test_classes_that_the_model_does_not_find_are_named(drawn, warnings):
    _, clean = drawn
    model = Oracle(clean)
    model.rows = [(objects | {"bbox": [], "category": []}, width, height) for objects, width, height in model.rows]
    errors = find_label_errors(model, loader_of(clean), clean, progress=False)
    assert (
        "does not find the classes " + ", ".join(f"{name} (0.00)" for name in id2label(clean).values()) in warnings.text
    )
    assert errors == []


def test_another_order_of_images_is_refused(drawn):
    _, clean = drawn
    with pytest.raises(ValueError, match="in its order"):
        find_label_errors(Oracle(clean), loader_of(clean.select(range(9, -1, -1))), clean, progress=False)


def test_the_script_writes_the_page_and_the_files(drawn, tmp_path):
    folder, clean = drawn
    names = id2label(clean)
    config = tiny_config(id2label=names, label2id={name: index for index, name in names.items()})
    DetrForDetection(config).save_pretrained(tmp_path / "model")
    DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    code, output = run_script(
        SCRIPT, "--model", "model", "--dataset", folder, "--min_suspicion", "0.1", "--num_workers", "0", cwd=tmp_path
    )
    assert code == 0, output
    assert "suspected annotation errors in 10 images" in output
    written = {file.name for file in (tmp_path / "label_errors").iterdir()}
    assert written == {"label_errors.html", "label_errors.json", "label_studio.json", "coco.json"}
    code, output = run_script(
        SCRIPT, "--model", "model", "--dataset", folder, "--output_dir", folder / "x", cwd=tmp_path
    )
    assert code == 2
    assert "never modified" in output
