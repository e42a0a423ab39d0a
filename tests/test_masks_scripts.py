"""Masks through the scripts: finetune.py --masks, resumed and in its two stages, evaluate.py, predict.py, export.py."""

import contextlib
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import padded_batch, randomise_norms, relative_difference, tiny_segmentation
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from transformers import pipeline
from warm_python import WarmPython

from hf_detr import DetrForDetection, DetrForSegmentation, DetrImageProcessor
from hf_detr.data import category_ids, draw_shapes_dataset, id2label, load_detection_dataset, stuff_labels
from hf_detr.evaluation import MaskEvaluator, ModelEvaluation, format_evaluation
from hf_detr.export import export_model, exporting, load_exported
from hf_detr.hub import model_card_of
from hf_detr.interop import has_masks, load_model
from hf_detr.prediction.image_folder import find_images
from hf_detr.training import parse_finetune_args

pytestmark = pytest.mark.xdist_group("masks_scripts")  # its fixtures are expensive: one worker runs them once

EXAMPLES = Path(__file__).parents[1] / "examples"
IMPORTS = """
import accelerate, tqdm.auto, hf_detr, hf_detr.data, hf_detr.evaluation, hf_detr.hub, hf_detr.interop
import hf_detr.prediction, hf_detr.runtime, hf_detr.training, hf_detr.visualization
"""
NAMES = ["rectangle", "ellipse", "triangle", "stripes", "speckles"]
SMALL = ("encoder_layers=1", "decoder_layers=1", "d_model=32", "encoder_ffn_dim=32", "decoder_ffn_dim=32",
         "encoder_attention_heads=4", "decoder_attention_heads=4", "num_queries=8")  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """Run a script of examples/ with these arguments; return what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with WarmPython(IMPORTS, environment) as warm:

        def run_script(name, *arguments, cwd, ok=True):
            argv = [str(EXAMPLES / name), *map(str, arguments)]
            done = warm.run("import runpy, sys\nrunpy.run_path(sys.argv[0], run_name='__main__')", argv, cwd=cwd)
            output = done.stdout + done.stderr
            assert (done.returncode == 0) == ok, output
            return output

        yield run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory, script):
    """A folder in which the drawn data and a tiny model with masks are, and what its training printed."""
    cwd = tmp_path_factory.mktemp("masks")
    output = script("finetune.py", "--masks", "--quick", "--set", *SMALL, "--output_dir", "run", cwd=cwd)
    return cwd, output


@pytest.fixture(scope="module")
def boxes(trained, script):
    """A detector of all classes of the panoptic data, stuff among them, in the same folder."""
    cwd, _ = trained
    script("finetune.py", "--stuff", "--quick", "--epochs", 1, "--set", *SMALL, "--output_dir", "boxes", cwd=cwd)
    return cwd / "boxes"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_with_masks_measures_boxes_masks_and_segments(trained):
    cwd, output = trained
    metrics = json.loads((cwd / "run" / "metrics.json").read_text())
    for name in ("AP", "mask_AP", "mask_AP50", "PQ", "PQ_things", "PQ_stuff"):
        assert 0 <= metrics[name] <= 1
        assert name in log_of(cwd / "run")[-1]
    assert list(metrics["per_class"]) == list(metrics["mask_per_class"]) == NAMES[:3]  # stuff has no AP
    assert list(metrics["panoptic_per_class"]) == NAMES
    assert {"loss_mask", "loss_dice"} <= log_of(cwd / "run")[0].keys()
    assert "The best checkpoint has the highest PQ; stripes, speckles are stuff." in output
    assert "mask AP 0." in output
    config = json.loads((cwd / "run" / "config.json").read_text())
    assert config["architectures"] == ["DetrForSegmentation"]
    assert config["stuff_labels"] == ["stripes", "speckles"]
    assert json.loads((cwd / "run" / "args.json").read_text())["metric"] == "PQ"
    assert json.loads((cwd / "run" / "preprocessor_config.json").read_text())["panoptic_threshold"] == 0.5


def test_the_best_checkpoint_is_chosen_by_the_metric_that_is_named(trained, script):
    cwd, _ = trained
    arguments = ("--masks", "--quick", "--epochs", 1, "--set", *SMALL)
    output = script(
        "finetune.py", *arguments, "--metric", "mask_AR100", "--output_dir", "by_recall", cwd=cwd
    )  # fmt: skip
    assert "The best checkpoint has the highest mask_AR100" in output
    assert "best mask_AR100 0." in output
    assert "mask_AR100" in log_of(cwd / "by_recall")[-1]


def test_a_run_with_masks_goes_on(trained, script):
    cwd, _ = trained
    script("finetune.py", "--masks", "--quick", "--epochs", 1, "--set", *SMALL, "--output_dir", "more", cwd=cwd)
    output = script("finetune.py", "--output_dir", "more", "--resume", "--epochs", 2, cwd=cwd)
    assert "Resumed after epoch 1" in output
    assert [line["epoch"] for line in log_of(cwd / "more")] == [1, 2]
    assert has_masks(cwd / "more")


def test_a_frozen_detector_keeps_its_weights_and_gets_a_mask_head(trained, boxes, script):
    cwd, _ = trained
    output = script(
        "finetune.py", "--masks", "--model", boxes, "--freeze_detector", "--quick", "--output_dir", "frozen", cwd=cwd
    )
    assert "The detector is frozen, and the mask head is trained." in output
    before = DetrForDetection.from_pretrained(boxes).state_dict()
    after = DetrForSegmentation.from_pretrained(cwd / "frozen").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert set(after) - set(before) == {n for n in after if n.startswith(("mask_head.", "bbox_attention."))}
    last = DetrForSegmentation.from_pretrained(cwd / "frozen" / "last")
    assert last.config.stuff_labels == ["stripes", "speckles"]


def test_adapters_and_a_mask_head_train_together(trained, boxes, script):
    cwd, _ = trained
    script(
        "finetune.py", "--masks", "--model", boxes, "--lora_rank", 2, "--quick", "--epochs", 1, "--output_dir", "lora",
        cwd=cwd,
    )  # fmt: skip
    saved, before = load_file(cwd / "lora" / "model.safetensors"), load_file(boxes / "model.safetensors")
    assert any(name.startswith("mask_head.") for name in saved)
    assert not any("lora" in name for name in saved)
    changed = {name for name in set(before) & set(saved) if not torch.equal(saved[name], before[name])}
    assert any(name.startswith("model.encoder.") for name in changed), "the adapters are merged"


def test_a_detector_of_stuff_is_a_detector(boxes):
    config = json.loads((boxes / "config.json").read_text())
    assert config["architectures"] == ["DetrForDetection"]
    assert list(config["id2label"].values()) == NAMES
    assert "mask_AP" not in json.loads((boxes / "metrics.json").read_text())


def test_a_detector_with_too_fine_features_is_refused(trained, boxes, script, tmp_path):
    cwd, _ = trained
    for path in boxes.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["feature_stride"] == 16
    (tmp_path / "config.json").write_text(json.dumps(config | {"feature_stride": 8}))
    output = script(
        "finetune.py", "--masks", "--model", tmp_path, "--quick", "--output_dir", "fine", cwd=cwd, ok=False
    )  # fmt: skip
    assert "--masks needs features of stride 16 or more" in " ".join(output.split())


def test_a_frozen_detector_must_know_all_classes(trained, script, tmp_path):
    cwd, _ = trained
    model = DetrForDetection.from_pretrained(cwd / "run", id2label=dict(enumerate(NAMES[:3])),
                                             ignore_mismatched_sizes=True)  # fmt: skip
    model.save_pretrained(tmp_path / "things")
    DetrImageProcessor.from_pretrained(cwd / "run").save_pretrained(tmp_path / "things")
    output = script(
        "finetune.py", "--masks", "--model", tmp_path / "things", "--freeze_detector", "--quick", "--output_dir", "no",
        cwd=cwd, ok=False,
    )  # fmt: skip
    assert "does not detect stripes, speckles" in " ".join(output.split())
    assert not (cwd / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--freeze_detector --model M", "--freeze_detector trains the mask head only: add --masks"),
        ("--masks --freeze_detector", "name one with --model"),
        ("--masks --freeze_detector --model M --lora_rank 4", "omit --lora_rank"),
        ("--masks --freeze_detector --model M --freeze_backbone", "omit --freeze_backbone"),
        ("--masks --freeze_detector --model M --backbone_learning_rate 1e-4", "omit --freeze_detector"),
        ("--masks --stuff", "omit --stuff"),
        ("--metric PQ", "--metric PQ measures masks: add --masks"),
        ("--set mask_attention_gain=256", "--set mask_attention_gain=... is for masks: add --masks"),
        ("--stuff --set dice_loss_coefficient=5", "--set dice_loss_coefficient=... is for masks: add --masks"),
    ],
)
def test_contradictions_are_refused_before_data_are_read(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_finetune_args(None, arguments.split())
    assert message in " ".join(capsys.readouterr().err.split())


def test_initial_weights_of_a_trained_mask_head_are_refused(trained, script):
    cwd, _ = trained
    options = ["--masks", "--model", "run", "--set", "mask_attention_gain=256", "--quick", "--output_dir", "no"]
    output = script("finetune.py", *options, cwd=cwd, ok=False)
    assert "is for the initial weights of a mask head, and run has a trained one" in output
    assert not (cwd / "no").exists()


def test_panoptic_quality_needs_stuff(trained, script):
    cwd, _ = trained
    annotations = "data/shapes-masks-quick/annotations"
    output = script(
        "finetune.py", "--masks", "--metric", "PQ", "--train", f"{annotations}/instances_train.json", "--val",
        f"{annotations}/instances_val.json", "--images", "data/shapes-masks-quick", "--backbone", "test_resnet",
        "--backbone_weights", "none", cwd=cwd, ok=False,
    )  # fmt: skip
    assert "is stuff. Use --metric mask_AP" in " ".join(output.split())


def test_the_card_has_the_numbers_of_masks(trained):
    cwd, _ = trained
    metrics = json.loads((cwd / "run" / "metrics.json").read_text())
    card = model_card_of(cwd / "run", "me/shapes")
    assert card.data.pipeline_tag == "image-segmentation"
    assert 'pipeline("image-segmentation", model="me/shapes")' in card.content
    assert f"| PQ | {metrics['PQ']:.3f} |" in card.content
    assert "| class | AP | mask AP | PQ |" in card.content
    assert 'detector("image.jpg", threshold=0.5)' in card.content
    assert "leaves the parts of stuff (stripes, speckles) apart" in card.content
    stripes = metrics["panoptic_per_class"]["stripes"]["PQ"]
    assert f"| stripes | n/a | n/a | {stripes:.3f} |" in card.content
    assert {result.metric_type for result in card.data.eval_results} == {"mean_average_precision", "panoptic_quality"}


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_numbers_of_training(trained, script):
    cwd, _ = trained
    data = cwd / "data" / "shapes-masks-quick"
    output = script(
        "evaluate.py", "--model", "run", "--dataset", data, "--output", "m.json", "--report", "report", cwd=cwd
    )
    before = json.loads((cwd / "run" / "metrics.json").read_text())
    after = json.loads((cwd / "m.json").read_text())
    for name in ("AP", "mask_AP", "PQ", "SQ_stuff"):
        assert after[name] == pytest.approx(before[name], abs=1e-3), name
    assert "Panoptic segments, in percent" in output
    report = json.loads((cwd / "report" / "report.json").read_text())
    assert report["masks"]["PQ"] == after["PQ"]
    assert report["objects"] == sum(
        len(row["bbox"]) for row in load_detection_dataset(data, "val", progress=False)["objects"]
    )
    page = (cwd / "report" / "report.html").read_text()
    assert "<h2>Masks</h2>" in page
    assert "<td>speckles</td>" in page


def test_a_model_with_masks_can_be_measured_by_its_boxes_alone(trained, boxes, script):
    cwd, _ = trained
    data = cwd / "data" / "shapes-masks-quick"
    output = script("evaluate.py", "--model", "run", "--dataset", data, "--no-masks", cwd=cwd)
    assert "Masks" not in output
    output = script("evaluate.py", "--model", boxes, "--dataset", data, "--masks", cwd=cwd, ok=False)
    assert "has no masks to measure" in output


def test_perfect_masks_score_one_and_stuff_has_no_ap(tmp_path):
    """The numbers of the annotations themselves, through the evaluators of the scripts."""
    draw_shapes_dataset(tmp_path, num_train=1, num_val=3, masks=True, progress=False)
    rows = load_detection_dataset(tmp_path, "val", masks=True, progress=False, validation_fraction=0)
    evaluation = ModelEvaluation(rows, with_masks=True)
    for evaluator in (evaluation.masks, evaluation.segments):
        for row in rows:
            size = (row["height"], row["width"])
            masks = [coco_mask.decode({"size": size, "counts": c.encode()}) for c in row["objects"]["mask"]]
            infos = [{"id": i, "label_id": label, "score": 0.9} for i, label in enumerate(row["objects"]["category"])]
            evaluator.update([row["image_id"]], [{"segmentation": np.stack(masks), "segments_info": infos}])
    for row in rows:
        corners = [[x, y, x + w, y + h] for x, y, w, h in row["objects"]["bbox"]]
        result = {"boxes": torch.tensor(corners), "labels": torch.tensor(row["objects"]["category"])}
        evaluation.boxes.update([row["image_id"]], [result | {"scores": torch.full((len(corners),), 0.9)}])
    metrics = evaluation.compute()
    assert [metrics[name] for name in ("AP", "mask_AP", "PQ", "PQ_stuff")] == pytest.approx([1, 1, 1, 1])
    assert set(metrics["per_class"]) == set(NAMES[:3])
    assert "Panoptic segments" in format_evaluation(metrics)


def test_stuff_of_training_and_validation_images_has_to_agree(trained, script, tmp_path):
    cwd, _ = trained
    folder = Path(shutil.copytree(cwd / "data/shapes-masks-quick", tmp_path / "data"))
    command = ("finetune.py", "--masks", "--quick", "--epochs", 1, "--set", *SMALL, "--backbone", "test_resnet",
               "--backbone_weights", "none", "--image_size", 64, "--dataset", "data")  # fmt: skip
    named = ("--train", "data/annotations/panoptic_train.json", "--val", "data/annotations/instances_val.json")
    output = script(*command, *named, cwd=tmp_path, ok=False)
    assert "stripes, speckles are stuff in the training images, and nothing is in the validation images" in output
    file = folder / "annotations" / "panoptic_val.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["isthing"] = int(category["isthing"] or category["name"] == "speckles")
    file.write_text(json.dumps(content))
    output = script(*command, "--output_dir", "run", cwd=tmp_path)  # speckles are stuff in both, as in training
    assert {"PQ", "PQ_stuff"} <= log_of(tmp_path / "run")[-1].keys()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["per_class"]) == NAMES[:3]
    for category in content["categories"]:
        category["isthing"] = int(category["name"] not in ("triangle", "stripes"))
    file.write_text(json.dumps(content))
    output = script(*command, cwd=tmp_path, ok=False)
    assert "triangle are stuff in the validation images and not in the training ones" in output
    (folder / "annotations" / "instances_train.json").unlink()
    without = [argument for argument in command if argument != "--masks"]
    output = script(*without, cwd=tmp_path, ok=False)
    assert "stripes, speckles are stuff. To learn their boxes, too, add --stuff; to learn masks, --masks." in output


# -- prediction --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(trained, script):
    """The output folder of predict.py with both kinds of masks."""
    cwd, _ = trained
    model = load_model(cwd / "run")
    with torch.no_grad():  # some confident queries of several classes
        model.class_labels_classifier.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(0))
        model.class_labels_classifier.bias[-1] = -1.0
    model.save_pretrained(cwd / "confident")
    DetrImageProcessor.from_pretrained(cwd / "run").save_pretrained(cwd / "confident")
    script(
        "predict.py", "data/shapes-masks-quick/val", "--model", "confident", "--output_dir", "out", "--masks",
        "panoptic", "instance", "--threshold", 0.3, "--panoptic_threshold", 0.4, "--batch_size", 3, cwd=cwd,
    )  # fmt: skip
    return cwd, cwd / "out"


def near_truth(dataset, kinds):
    """What a job would have stored: the annotated masks, but for every fifth object of the panoptic ones, and of the
    others each twice, with random scores, every fourth with a wrong class."""
    generator = np.random.default_rng(0)
    stuff = {index for index, name in id2label(dataset).items() if name in stuff_labels(dataset)}
    things, count = [index for index in id2label(dataset) if index not in stuff], 0
    for row in dataset:
        segments = []
        for counts, label in zip(row["objects"]["mask"], row["objects"]["category"], strict=True):
            count += 1
            if "panoptic" in kinds and (label in stuff or count % 5):
                segments.append({"kind": "panoptic", "label_id": label, "score": 0.9, "counts": counts})
            for number in range(2) if "instance" in kinds and label not in stuff else ():
                other = generator.choice(things) if (count + number) % 4 == 0 else label
                score = float(np.float32(generator.random()))
                segments.append({"kind": "instance", "label_id": int(other), "score": score, "counts": counts})
        yield row["file_name"], segments


def test_stored_masks_are_measured(predicted, script, tmp_path):
    """Mask AP as pycocotools has it; PQ of exact segments, of which some are missing, by its formula."""
    cwd, output = predicted
    source = cwd / "data/shapes-masks-quick"
    names = {n: entry["name"] for n, entry in enumerate(json.loads((output / "job.json").read_text())["categories"])}
    dataset = load_detection_dataset(source, "val", masks=True, id2label=names, progress=False)
    found = {}
    for kinds in (("panoptic", "instance"), ("panoptic",), ("instance",)):
        folder = tmp_path / "-".join(kinds)
        shutil.copytree(output, folder)
        job = json.loads((folder / "job.json").read_text())
        job["settings"] |= {"masks": list(kinds)}
        (folder / "job.json").write_text(json.dumps(job))
        segments = dict(near_truth(dataset, kinds))
        for file in (folder / "shards").glob("*.parquet"):
            table = pq.read_table(file)
            rows = [row | {"segments": segments[row["file"]]} for row in table.to_pylist()]
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
        script(
            "evaluate.py", "--detections", folder, "--dataset", source, "--output", tmp_path / "m.json", cwd=tmp_path
        )
        found[kinds] = json.loads((tmp_path / "m.json").read_text())

    evaluator = MaskEvaluator(dataset)
    ids = {row["file_name"]: row["image_id"] for row in dataset.remove_columns("image")}
    sizes = {row["file_name"]: [row["height"], row["width"]] for row in dataset.remove_columns("image")}
    results = [
        {"image_id": ids[file], "category_id": segment["label_id"], "score": segment["score"],
         "segmentation": {"size": sizes[file], "counts": segment["counts"]}}
        for file, segments in near_truth(dataset, ("instance",)) for segment in segments
    ]  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "images": evaluator.images, "categories": [{"id": n, "name": name} for n, name in names.items()],
        "annotations": [
            record | {"id": number} for number, record in enumerate(evaluator.annotations, start=1)
            if names[record["category_id"]] not in stuff_labels(dataset)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        measured = COCOeval(truth, truth.loadRes(results), "segm")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    for kinds in (("panoptic", "instance"), ("instance",)):
        for name, value in zip(("mask_AP", "mask_AP50", "mask_AP75"), measured.stats, strict=False):
            assert found[kinds][name] == pytest.approx(value, abs=1e-9)
    assert 0.2 < measured.stats[0] < 0.9

    stored = Counter(s["label_id"] for _, segments in near_truth(dataset, ("panoptic",)) for s in segments)
    annotated = Counter(label for objects in dataset["objects"] for label in objects["category"])
    qualities = [stored[n] / (stored[n] + (annotated[n] - stored[n]) / 2) for n in annotated]
    for kinds in (("panoptic", "instance"), ("panoptic",)):
        assert found[kinds]["PQ"] == pytest.approx(sum(qualities) / len(qualities), abs=1e-6)
    assert "mask_AP" not in found[("panoptic",)]
    assert "PQ" not in found[("instance",)]
    assert "predict with --masks instance" in " ".join(found[("panoptic",)]["notes"])
    assert "predict with --masks panoptic" in " ".join(found[("instance",)]["notes"])

    def results_file(name, change):
        records = [
            {"image_id": source_ids[r["image_id"]], "category_id": categories[r["category_id"]], "score": r["score"],
             "bbox": [1, 1, 5, 5], "segmentation": r["segmentation"]}
            for r in results
        ]  # fmt: skip
        change(records)
        (tmp_path / name).write_text(json.dumps(records))
        arguments = ("--detections", tmp_path / name, "--dataset", source, "--masks", "--output", tmp_path / "f.json")
        return arguments

    source_ids, categories = evaluator.ids_of_source, category_ids(dataset)
    script("evaluate.py", *results_file("file.json", lambda records: None), cwd=tmp_path)
    assert json.loads((tmp_path / "f.json").read_text())["mask_AP"] == pytest.approx(measured.stats[0], abs=1e-9)
    for change, reason in (
        (lambda records: records[3].pop("segmentation"), "has no masks to measure"),
        (lambda records: records[3].update(segmentation={"size": [7, 7], "counts": "01"}), "record 3:"),
    ):
        said = script("evaluate.py", *results_file("bad.json", change), cwd=tmp_path, ok=False)
        assert reason in said


def test_predict_writes_what_the_pipeline_finds(predicted):
    cwd, output = predicted
    content = json.loads((output / "panoptic.json").read_text())
    source = json.loads((cwd / "data/shapes-masks-quick/annotations/panoptic_val.json").read_text())
    assert content["categories"] == source["categories"]
    segmenter = pipeline("image-segmentation", model=str(cwd / "confident"), device="cpu")
    total = 0
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        colours = np.asarray(Image.open(output / "panoptic" / annotation["file_name"])).astype(int)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        expected = segmenter(str(cwd / "data/shapes-masks-quick/val" / image["file_name"]), threshold=0.4)
        segments = annotation["segments_info"]
        total += len(segments)
        names = {category["id"]: category["name"] for category in content["categories"]}
        assert [names[s["category_id"]] for s in segments] == [s["label"] for s in expected]
        for segment, other in zip(segments, expected, strict=True):
            assert segment["score"] == pytest.approx(other["score"], abs=1e-4)
            assert (ids == segment["id"]).sum() == segment["area"]
            different = (ids == segment["id"]) != (np.asarray(other["mask"]) > 0)
            assert different.mean() < 0.01
    assert total > 5


def test_masks_of_objects_are_coco_results_without_stuff(predicted):
    cwd, output = predicted
    records = json.loads((output / "masks.json").read_text())
    images = {image["id"]: image for image in json.loads((output / "images.json").read_text())["images"]}
    source = json.loads((cwd / "data/shapes-masks-quick/annotations/panoptic_val.json").read_text())
    assert {image["id"] for image in source["images"]} == set(images)
    things = {category["id"] for category in source["categories"] if category["isthing"]}
    assert records
    for record in records:
        image = images[record["image_id"]]
        assert record["category_id"] in things
        assert coco_mask.decode(record["segmentation"]).shape == (image["height"], image["width"])
        assert record["score"] > 0.3


def test_other_files_in_the_folder_of_the_segments_stay(predicted, script, tmp_path):
    cwd, _ = predicted
    images = sorted((cwd / "data/shapes-masks-quick/val").glob("*.jpg"))[:2]
    folder = tmp_path / "data"
    for place in (folder, folder / "panoptic"):
        place.mkdir()
        for image in images:
            shutil.copy(image, place)
    mine = folder / "panoptic" / "000000.png"
    Image.new("L", (9, 9)).save(mine)
    before = mine.read_bytes()
    command = ("predict.py", folder, "--model", cwd / "confident", "--output_dir", folder, "--masks", "panoptic")
    script(*command, "--panoptic_threshold", 0.4, cwd=tmp_path)
    content = json.loads((folder / "panoptic.json").read_text())
    assert len(content["annotations"]) == 5, "the PNG was an image like the others"
    names = [annotation["file_name"] for annotation in content["annotations"]]
    assert len(set(names)) == 5
    assert mine.read_bytes() == before
    assert (folder / "panoptic" / "000000.jpg.png").is_file(), "the drawing of panoptic/000000.jpg"
    shutil.copy(images[0], folder / "more.jpg")
    output = script(*command, "--panoptic_threshold", 0.4, cwd=tmp_path)
    assert "1 images were added since the job started, such as more.jpg" in output
    content = json.loads((folder / "panoptic.json").read_text())
    assert len(content["annotations"]) == 6
    assert all((folder / "panoptic" / annotation["file_name"]).is_file() for annotation in content["annotations"])
    assert mine.read_bytes() == before


@pytest.mark.parametrize("masks", [("--masks", "instance"), ("--masks", "none"), ("--tile", 64)])
def test_a_threshold_of_segments_that_are_not_made_is_refused(predicted, script, masks):
    cwd, _ = predicted
    images = "data/shapes-masks-quick/val"
    output = script(
        "predict.py", images, "--model", "confident", *masks, "--panoptic_threshold", 0.4, cwd=cwd, ok=False
    )
    assert "--panoptic_threshold is for panoptic segments" in output


def test_masks_of_a_video_are_refused(predicted, script):
    cwd, _ = predicted
    (cwd / "clip.mp4").write_bytes(b"not read before the refusal")
    output = script("predict.py", "clip.mp4", "--model", "confident", "--masks", "panoptic", cwd=cwd, ok=False)
    assert "Videos get boxes only: predict them without --masks, apart from images." in output


def test_drawings_and_pngs_of_segments_are_not_taken_for_input(predicted, script):
    cwd, output = predicted
    picture = Image.open(output / "000000.jpg.png")
    assert picture.height > Image.open(cwd / "data/shapes-masks-quick/val/000000.jpg").height  # with its legend
    with pytest.raises(ValueError, match="no images but drawings"):
        find_images(output)
    again = script(
        "predict.py", "data/shapes-masks-quick/val", "--model", "confident", "--output_dir", "out", "--masks",
        "instance", "--overwrite", cwd=cwd,
    )  # fmt: skip
    assert "objects in 16 images" in again
    assert (output / "masks.json").is_file()
    assert not (output / "panoptic.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "boxes", "--masks", "instance"), "has no masks"),
        (("--model", "run", "--masks", "instance", "--tile", "64"), "use --tile without --masks"),
        (("--model", "run", "--masks", "none", "instance"), "--masks none writes no masks"),
    ],
)
def test_masks_that_cannot_be_written_are_refused(trained, boxes, script, arguments, message):
    cwd, _ = trained
    output = script("predict.py", "data/shapes-masks-quick/val", *arguments, cwd=cwd, ok=False)
    assert message in " ".join(output.split())


def test_the_model_of_a_checkpoint_is_found_wherever_from_pretrained_finds_it(trained, tmp_path):
    cwd, _ = trained
    shutil.copytree(cwd / "run", tmp_path / "repo" / "part", ignore=shutil.ignore_patterns("checkpoint-*", "last"))
    assert has_masks(tmp_path / "repo", subfolder="part")
    assert type(load_model(tmp_path / "repo", subfolder="part")) is DetrForSegmentation
    (tmp_path / "adapter").mkdir()
    base = {"base_model_name_or_path": str(cwd / "run"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    assert has_masks(tmp_path / "adapter")


# -- exports -----------------------------------------------------------------------------------------------------------


EDGES, EXACT = {"shortest_edge": 64, "longest_edge": 120}, {"height": 96, "width": 128}  # the latter without masks


@pytest.fixture(scope="module", params=[("onnx", EDGES), ("openvino", EDGES), ("torch", EDGES), ("openvino", EXACT)])
def exported(request, tmp_path_factory):
    kind, size = request.param
    torch.manual_seed(0)
    model = tiny_segmentation(encoder_layers=1, decoder_layers=1, num_queries=4, stuff_labels=["LABEL_4"])
    randomise_norms(model)
    with torch.no_grad():
        model.class_labels_classifier.bias[-1] = -9.0  # every query has an object
    folder = tmp_path_factory.mktemp("exports") / kind
    processor = DetrImageProcessor(size=size)
    with pytest.MonkeyPatch.context() as patch:
        few = exporting.check_cases
        patch.setattr(exporting, "check_cases", lambda *args: few(*args)[3:5])
        content = export_model(model, processor, folder, graph_format=kind, report=lambda text: None)
    return model, folder, content


@torch.no_grad()
def test_an_export_gives_the_masks_of_the_model_for_any_size(exported):
    model, folder, content = exported
    assert content["outputs"] == ["logits", "pred_boxes", "pred_masks", "mask_sizes"]
    assert content["check"]["largest_difference"] < 1e-4
    assert all("pred_masks" in case for case in content["check"]["cases"])
    loaded = load_exported(folder)
    for sizes in ([(97, 131), (64, 200), (50, 70)], [(128, 96)]):
        pixel_values, pixel_mask = padded_batch(sizes)
        found, expected = loaded(pixel_values, pixel_mask), model(pixel_values, pixel_mask)
        if len(sizes) == 1:
            assert torch.equal(found.image_sizes, loaded(pixel_values).image_sizes), "with a mask or without"
        assert torch.equal(found.mask_sizes, expected.mask_sizes)
        assert torch.equal(found.image_sizes, torch.tensor(sizes))
        for index, (rows, columns) in enumerate(expected.mask_sizes.tolist()):
            masks = (output.pred_masks[index, :, :rows, :columns] for output in (found, expected))
            assert relative_difference(*masks) < 1e-4


def test_pipeline_and_predict_segment_with_an_export(exported, script, tmp_path):
    model, folder, _ = exported
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 110, 3), dtype=np.uint8))
    processor = DetrImageProcessor.from_pretrained(folder)
    ours, theirs = (
        pipeline("image-segmentation", model=predictor, image_processor=processor)(image, threshold=0.0)
        for predictor in (model, load_exported(folder))
    )
    assert [segment["label"] for segment in ours] == [segment["label"] for segment in theirs]
    assert len(ours) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (np.asarray(one["mask"]) != np.asarray(other["mask"])).mean() < 0.01
    image.save(tmp_path / "image.png")
    script(
        "predict.py", "image.png", "--model", folder, "--panoptic_threshold", 0, "--output_dir", "out", cwd=tmp_path
    )  # fmt: skip
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = [names[segment["category_id"]] for segment in content["annotations"][0]["segments_info"]]
    assert found == [segment["label"] for segment in ours]


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_masks_of_a_float16_graph_are_nearly_those_of_the_model(kind, tmp_path, monkeypatch):
    check_cases = exporting.check_cases
    monkeypatch.setattr(exporting, "check_cases", lambda *args: check_cases(*args)[2:6])
    torch.manual_seed(0)
    model = tiny_segmentation(d_model=32, query_type="anchor")
    randomise_norms(model)
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107})
    content = export_model(model, processor, tmp_path, graph_format=kind, half=True, report=lambda text: None)
    assert 0 < content["float16_check"]["largest_difference"] < 0.05
    # sums over more locations than the largest float16, of which group norm takes the mean
    sizes = [(320, 448), (300, 300)]
    found = load_exported(tmp_path)(*padded_batch(sizes))
    with torch.no_grad():
        expected = model(*padded_batch(sizes))
    assert relative_difference(found["pred_masks"][..., :80, :112], expected.pred_masks[..., :80, :112]) < 0.05


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch"])
@torch.no_grad()
def test_a_graph_of_one_shape_gives_the_masks_of_images_that_fit(kind, tmp_path):
    torch.manual_seed(0)
    model = tiny_segmentation(encoder_layers=1, decoder_layers=1, num_queries=4, query_type="anchor")
    randomise_norms(model)
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107})
    export_model(model, processor, tmp_path, graph_format=kind, shape=(2, 96, 128), report=lambda text: None)
    loaded = load_exported(tmp_path)
    for sizes in ([(96, 128)], [(60, 100), (96, 40), (33, 47)]):
        found, expected = loaded(*padded_batch(sizes)), model(*padded_batch(sizes))
        assert torch.equal(found.mask_sizes, expected.mask_sizes)
        for index, (rows, columns) in enumerate(expected.mask_sizes.tolist()):
            masks = (output.pred_masks[index, :, :rows, :columns] for output in (found, expected))
            assert relative_difference(*masks) < 1e-4


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
@torch.no_grad()
def test_masks_of_an_int8_graph_are_nearly_those_of_the_model(kind, tmp_path, monkeypatch):
    check_cases = exporting.check_cases
    monkeypatch.setattr(exporting, "check_cases", lambda *args: check_cases(*args)[3:5])
    torch.manual_seed(0)
    model = tiny_segmentation(encoder_layers=1, decoder_layers=1, num_queries=4, query_type="anchor")
    randomise_norms(model)
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = np.kron(generator.integers(0, 255, (8, 10, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107})
    content = export_model(
        model, processor, tmp_path / "int8", graph_format=kind, calibration=images, report=lambda text: None
    )
    assert content["precision"] == "int8"
    batch = processor([Image.open(file) for file in sorted(images.glob("*.png"))], return_tensors="pt")
    found, expected = load_exported(tmp_path / "int8")(**batch), model(**batch)
    difference = relative_difference(found.pred_masks, expected.pred_masks)
    assert 1e-4 < difference < 0.5
