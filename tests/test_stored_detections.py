"""Detections that predict.py or another program has stored are measured like those of a model at work."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny_checkpoint
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset
from hf_detr.evaluation import METRICS, CocoEvaluator, StoredDetections

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = {0: "rectangle", 1: "ellipse", 2: "triangle"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=1, num_val=12, progress=False)


@pytest.fixture(scope="module")
def job(shapes, tmp_path_factory):
    """The folder of predict.py, whose image ids are not those of the annotations: it saw only a copy of the images."""
    folder = tmp_path_factory.mktemp("job")
    save_tiny_checkpoint(folder / "model", NAMES)
    shutil.copytree(shapes / "val", folder / "copy")
    Image.new("RGB", (30, 20)).save(folder / "copy" / "zebra.png")
    arguments = ["copy", "--model", "model", "--threshold", "0", "--output_dir", "found", "--no-pictures"]
    code, said = run_script(EXAMPLES / "predict.py", *arguments, cwd=folder)
    assert code == 0, said
    return folder


@pytest.fixture
def found(job, tmp_path):
    return Path(shutil.copytree(job / "found", tmp_path / "found"))


@pytest.fixture
def dataset(shapes, load):
    return load(shapes, "val", id2label=NAMES)


def near_truth(shapes):
    """COCO results near the ground truth, with the ids of the annotations; some classes are wrong."""
    generator = np.random.default_rng(0)
    truth = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    classes = [entry["id"] for entry in truth["categories"]]
    results = []
    for record in truth["annotations"]:
        for _ in range(2):
            wrong = generator.random() < 0.2
            x, y, w, h = record["bbox"]
            dx, dy, dw, dh = generator.uniform(-0.15, 0.15, 4)
            box = [x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh)]
            label = int(generator.choice(classes)) if wrong else record["category_id"]
            results.append({"image_id": record["image_id"], "category_id": label, "bbox": box}
                           | {"score": float(generator.random())})  # fmt: skip
    return truth, results


def by_pycocotools(shapes, results):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(shapes / "annotations" / "instances_val.json"))
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


def measured(path, dataset):
    evaluator = CocoEvaluator(dataset)
    notes = StoredDetections.read(path).add_to(evaluator, dataset)
    metrics = evaluator.compute()
    return {name: metrics[name] for name in METRICS}, notes


def test_coco_results_of_any_program_give_the_numbers_of_pycocotools(shapes, load, tmp_path):
    _, results = near_truth(shapes)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    metrics, notes = measured(file, load(shapes, "val"))
    expected = by_pycocotools(shapes, results)
    assert 0.1 < expected["AP"] < 0.9
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert [note.partition(" have ")[0] for note in notes] == ["1 of 12 images"], "it has no objects"
    kept = [record for record in results if record["image_id"] != results[0]["image_id"]]
    file.write_text(json.dumps(kept))
    metrics, notes = measured(file, load(shapes, "val"))
    assert metrics == pytest.approx(by_pycocotools(shapes, kept), abs=1e-9)
    assert [note.partition(" have ")[0] for note in notes] == ["2 of 12 images"]


def test_a_job_is_matched_by_file_names_because_its_ids_are_its_own(shapes, dataset, found):
    truth, results = near_truth(shapes)
    listed = json.loads((found / "images.json").read_text())
    ids = {entry["file_name"]: entry["id"] for entry in listed["images"]}
    names = {entry["id"]: entry["file_name"] for entry in truth["images"]}
    classes = {entry["id"]: entry["name"] for entry in truth["categories"]}
    own = {entry["name"]: entry["id"] for entry in listed["categories"]}
    rewritten = [
        record
        | {"image_id": ids[Path(names[record["image_id"]]).name], "category_id": own[classes[record["category_id"]]]}
        for record in results
    ]
    assert any(new["image_id"] != old["image_id"] for new, old in zip(rewritten, results, strict=True))
    (found / "detections.json").write_text(json.dumps(rewritten))
    metrics, notes = measured(found, dataset)
    assert metrics == pytest.approx(by_pycocotools(shapes, results), abs=1e-9)
    assert notes == ["1 of the predicted images are not in the data set and do not count."]


def test_the_script_gives_the_numbers_of_the_model_that_predicted(shapes, job, tmp_path):
    truth = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    listed = json.loads((job / "found" / "images.json").read_text())
    names = {entry["id"]: entry["file_name"] for entry in listed["images"]}
    ids = {Path(entry["file_name"]).name: entry["id"] for entry in truth["images"]}
    classes = {entry["id"]: entry["name"] for entry in listed["categories"]}
    own = {entry["name"]: entry["id"] for entry in truth["categories"]}
    found = json.loads((job / "found" / "detections.json").read_text())
    truth["annotations"] = []  # some of what the model finds, moved: it is not trained, and finds nothing else
    for number, record in enumerate(found[::3]):
        (x, y, w, h), image = record["bbox"], names[record["image_id"]]
        if image in ids:
            truth["annotations"].append(
                {"id": number + 1, "image_id": ids[image], "category_id": own[classes[record["category_id"]]]}
                | {"bbox": [x + w * (number % 5) / 10, y, w * (1 - (number % 5) / 10), h], "area": w * h, "iscrowd": 0}
            )
    folder = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(truth))
    for name, source in (("model", ["--model", job / "model"]), ("stored", ["--detections", job / "found"])):
        arguments = [*source, "--dataset", folder, "--output", f"{name}.json"]
        arguments += ["--report", "report"] if name == "stored" else []
        code, said = run_script(EXAMPLES / "evaluate.py", *arguments, cwd=tmp_path)
        assert code == 0, said
    assert "Note: 1 of the predicted images" in said
    assert (tmp_path / "report" / "report.html").is_file()
    assert len(json.loads((tmp_path / "stored.json").read_text())["notes"]) == 1
    model, stored = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("model", "stored"))
    assert model["AR100"] > 0.5
    for name in METRICS:  # its objects and scores are nearly equal, so the rounding in the file changes their order
        assert stored[name] == pytest.approx(model[name], abs=0.05)


def test_a_threshold_and_options_that_would_do_nothing_are_told(job, shapes, found, dataset, tmp_path):
    settings = json.loads((found / "job.json").read_text())
    settings["settings"] |= {"threshold": 0.5, "top_k": 10}
    (found / "job.json").write_text(json.dumps(settings))
    assert "a score above 0.5 were stored, which lowers AP" in measured(found, dataset)[1][1]
    assert "At most 10 detections per image were stored" in measured(found, dataset)[1][2]
    common = ["--detections", found, "--dataset", shapes]
    for more in (["--dtype", "bfloat16"], ["--batch_size", "8"], ["--save_thresholds"]):
        code, said = run_script(EXAMPLES / "evaluate.py", *common, *more, cwd=tmp_path)
        assert code == 2
        assert "is for a --model, not for --detections" in said
    code, said = run_script(EXAMPLES / "evaluate.py", "--detections", "none", "--dataset", shapes, cwd=tmp_path)
    assert (code, "There is no none." in said) == (1, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 99}, "record 1: image_id 99 is not one of the data set's"),
        ({"category_id": 99}, "record 1: category_id 99 is not one of the data set's"),
        ({"bbox": [1, 2, -3, 4]}, "record 1: bbox is"),
        ({"bbox": [1, 2, 3]}, "record 1: bbox is"),
        ({"score": float("nan")}, "record 1: score is a number, not nan"),
        ({"score": None}, "record 1: score is a number"),
        ({"score": 10**400}, "record 1: score is a number"),
        ({"image_id": True}, "record 1: image_id is a number or text, not True"),
    ],
)
def test_records_that_cannot_be_used_are_named(change, reason, shapes, load, tmp_path):
    _, results = near_truth(shapes)
    results[1] |= change
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=reason):
        measured(tmp_path / "results.json", load(shapes, "val"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "is not a list of COCO results"),
        ("[", "is not JSON"),
        ('[{"score": 1}]', "record 0: a detection has image_id, category_id, bbox, score"),
    ],
)
def test_other_files_are_refused(content, reason, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        StoredDetections.read(tmp_path / "results.json")


def test_an_unfinished_job_is_refused(found):
    (found / "detections.json").unlink()
    with pytest.raises(FileNotFoundError, match="not the folder of a finished prediction job"):
        StoredDetections.read(found)


def test_images_that_were_not_predicted_or_are_others_are_refused(dataset, found):
    listed = json.loads((found / "images.json").read_text())
    images = sorted(listed["images"], key=lambda image: image["file_name"] != "zebra.png")

    def refused(changed, reason):
        (found / "images.json").write_text(json.dumps(listed | {"images": changed}))
        with pytest.raises(ValueError, match=reason):
            measured(found, dataset)

    refused(images[:-1], f"1 images of the data set were not predicted.*{images[-1]['file_name']}")
    refused([*images[:-1], images[-1] | {"width": 7}], "they are not the same image")
    name = images[-1]["file_name"]
    twice = [images[-1] | {"file_name": f"{part}/{name}", "id": f"{part}"} for part in ("a", "b")]
    refused([*images[:-1], *twice], f"may be a/{name} or b/{name}")


def test_images_of_another_split_with_the_same_names_are_refused(job, shapes, dataset, tmp_path):
    """The first images of train and val have the same names; here also the same size in pixels."""
    generator = np.random.default_rng(0)
    (tmp_path / "train").mkdir()
    for path in sorted((shapes / "val").iterdir()):
        with Image.open(path) as image:
            pixels = generator.integers(0, 255, (image.height, image.width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / path.name)
    arguments = ["train", "--model", job / "model", "--threshold", "0", "--output_dir", "found", "--no-pictures"]
    code, said = run_script(EXAMPLES / "predict.py", *arguments, cwd=tmp_path)
    assert code == 0, said
    with pytest.raises(ValueError, match=r"has \d+ bytes in the data set and had \d+ bytes in .*not the same image"):
        measured(tmp_path / "found", dataset)


def test_files_are_found_by_their_places_where_names_are_not_unique(job, shapes, dataset, tmp_path):
    for part in ("train", "val"):  # two folders with the same names
        shutil.copytree(shapes / "val", tmp_path / "data" / part)
    shutil.copytree(shapes / "annotations", tmp_path / "data" / "annotations")
    arguments = ["data", "--model", job / "model", "--threshold", "0", "--output_dir", "found", "--no-pictures"]
    code, said = run_script(EXAMPLES / "predict.py", *arguments, cwd=tmp_path)
    assert code == 0, said
    with pytest.raises(ValueError, match="predict the images where the data set has them"):
        measured(tmp_path / "found", dataset)  # of another place
    code, said = run_script(EXAMPLES / "evaluate.py", "--detections", "found", "--dataset", "data", cwd=tmp_path)
    assert code == 0, said
    assert "Note: 12 of the predicted images are not in the data set" in said


@pytest.mark.parametrize(
    "change",
    [lambda x, y, w, h: [x, y, x + w, y + h], lambda x, y, w, h: [x / 160, y / 160, w / 160, h / 160]],
    ids=["corners", "relative"],
)
def test_boxes_in_another_format_are_refused(change, shapes, load, tmp_path):
    _, results = near_truth(shapes)
    results = [record | {"bbox": change(*record["bbox"])} for record in results]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results.json: bbox must be \[x_min, y_min, width, height\] in pixels, but"):
        measured(tmp_path / "results.json", load(shapes, "val"))


def test_category_ids_from_0_are_those_of_the_file(shapes, load, tmp_path):
    """A validation file that lists fewer classes than training, with ids that look like positions."""
    folder = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    file = folder / "annotations" / "instances_val.json"
    truth, results = near_truth(shapes)
    new = {entry["id"]: n for n, entry in enumerate([*truth["categories"][1:], truth["categories"][0]])}
    for record in (*truth["annotations"], *results):
        record["category_id"] = new[record["category_id"]]
    truth["categories"] = sorted(
        ({"id": new[entry["id"]], "name": entry["name"]} for entry in truth["categories"]),
        key=lambda entry: entry["id"],
    )
    file.write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    metrics, _ = measured(tmp_path / "results.json", load(folder, "val"))
    assert metrics == pytest.approx(by_pycocotools(folder, results), abs=1e-9)


@pytest.mark.parametrize("name", ["job.json", "images.json"])
def test_a_job_whose_files_were_changed_is_refused(name, found):
    for content in ("[]", "{}", "["):
        (found / name).write_text(content)
        with pytest.raises(ValueError, match=r"files of the prediction job in .* were changed"):
            StoredDetections.read(found)
