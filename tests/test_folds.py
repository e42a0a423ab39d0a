"""Cross-validation: folds of the training images, the runs on them, and label errors found by them."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset
from hf_detr.data.validation_cut import hold_out_fold
from hf_detr.training.arguments import parse_finetune_args

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    "--epochs", "1", "--image_size", "64", "--num_workers", "0", "--backbone", "test_resnet", "--backbone_weights",
    "none", "--set", "encoder_layers=1", "decoder_layers=1", "d_model=32", "encoder_ffn_dim=32", "decoder_ffn_dim=32",
    "encoder_attention_heads=4", "decoder_attention_heads=4", "num_queries=10",
]  # fmt: skip


def test_every_image_is_in_one_fold_and_copies_are_together():
    dataset = Dataset.from_dict({"number": list(range(23))})
    groups = [[0, 5], [1], [2, 3], *([n] for n in (4, *range(6, 11))), list(range(11, 23))]
    folds = [hold_out_fold(dataset, groups, (number, 3), seed=0) for number in (1, 2, 3)]
    inside = [set(held_out["number"]) for _, held_out in folds]
    assert sorted(n for fold in inside for n in fold) == list(range(23))
    assert max(map(len, inside)) - min(map(len, inside)) <= 3, "groups and parts have at most 3 images"
    for (outside, _), fold in zip(folds, inside, strict=True):
        assert set(outside["number"]) == set(range(23)) - fold
        for group in ([0, 5], [2, 3]):
            assert len(fold & set(group)) in (0, 2)
    other = hold_out_fold(dataset, groups, (1, 3), seed=1)[1]["number"]
    assert list(other) != sorted(inside[0])


@pytest.mark.parametrize(
    ("fold", "reason"),
    [((0, 3), "no fold 0 of 3"), ((4, 3), "no fold 4 of 3"), ((1, 1), "no fold 1 of 1"), ((1, 5), "too few for 5")],
)
def test_a_fold_that_cannot_be_is_refused(fold, reason):
    with pytest.raises(ValueError, match=reason):
        hold_out_fold(Dataset.from_dict({"number": [0, 1, 2]}), [[0], [1], [2]], fold, seed=0)


def test_images_that_look_the_same_are_told(caplog):
    dataset = Dataset.from_dict({"number": list(range(12))})
    hold_out_fold(dataset, [list(range(12))], (1, 2), seed=0)
    assert "11 images look like another one; they stay in one fold, but for groups of more than 3" in caplog.text


def test_a_run_does_not_go_on_with_another_fold(tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps({"fold": "1/2", "epochs": 3}))
    for fold in (["--fold", "2/2"], ["--fold", "1/3"]):
        with pytest.raises(SystemExit):
            parse_finetune_args("", ["--output_dir", str(tmp_path), "--resume", *fold])
        assert "--fold cannot change within a run" in capsys.readouterr().err


def test_folds_of_a_data_set_are_of_its_training_images(load, tmp_path):
    draw_shapes_dataset(tmp_path / "data", num_train=10, num_val=4, progress=False)
    complete = load(tmp_path / "data", validation_fraction=0)["file_name"]
    held_out = [load(tmp_path / "data", split="val", fold=(number, 2))["file_name"] for number in (1, 2)]
    rest = load(tmp_path / "data", split="train", fold=(1, 2))["file_name"]
    assert sorted([*held_out[0], *held_out[1]]) == sorted(complete)
    assert list(rest) == list(held_out[1])
    with pytest.raises(ValueError, match='not "test"'):
        load(tmp_path / "data", split="test", fold=(1, 2))
    with pytest.raises(ValueError, match="without streaming"):
        load(tmp_path / "data", fold=(1, 2), streaming=True)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--folds", "1", "--output_dir", "x"], "--folds must be at least 2"),
        (["--folds", "2"], "name a folder for them with --output_dir"),
        (["--folds", "2", "--output_dir", "x", "--fold", "1/2"], "omit --fold"),
        (["--folds", "2", "--output_dir", "x", "--learning_curve"], "omit"),
        (["--folds", "2", "--output_dir", "x", "--train", "a.json", "--val", "b.json"], "omit --val"),
        (["--fold", "3/2"], "--fold 3/2: it must be K/N"),
        (["--fold", "1/2", "--overfit", "3"], "omit --fold"),
        (["--fold", "two"], "--fold two: it must be K/N"),
        (["--fold", "1/2", "--train", "a.json", "--val", "b.json"], "omit --val"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, reason, capsys):
    with pytest.raises(SystemExit):
        parse_finetune_args("", given)
    assert reason in capsys.readouterr().err


def test_each_annotation_is_checked_by_the_model_that_has_not_seen_it(tmp_path):
    data = draw_shapes_dataset(tmp_path / "data", num_train=12, num_val=2, progress=False)
    annotations = data / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    first = {record["image_id"]: record for record in reversed(content["annotations"])}
    copies = [record | {"id": 1000 + number} for number, record in enumerate(first.values())]
    annotations.write_text(json.dumps(content | {"annotations": content["annotations"] + copies}))
    command = [EXAMPLES / "finetune.py", "--dataset", "data", "--folds", "2", "--output_dir", "cv", *TINY]
    code, output = run_script(*command, cwd=tmp_path)
    assert code == 0, output
    found = json.loads((tmp_path / "cv" / "folds.json").read_text())
    for number in (1, 2):
        of_fold = json.loads((tmp_path / "cv" / f"fold-{number}" / "metrics.json").read_text())
        assert found["scores"]["AP"][number - 1] == of_fold["AP"]
        assert of_fold["num_images"] == 6
    assert "hf-detr label-errors --model cv --dataset data" in output

    check = [EXAMPLES / "label_errors.py", "--model", "cv", "--dataset", "data", "--num_workers", "0"]
    code, output = run_script(*check, "--min_suspicion", "0", cwd=tmp_path)
    assert code == 0, output
    assert "suspected annotation errors in 12 images" in output
    names = {image["id"]: image["file_name"] for image in content["images"]}
    boxes = {(names[record["image_id"]], tuple(record["bbox"])) for record in content["annotations"]}
    records = json.loads((tmp_path / "label_errors" / "label_errors.json").read_text())
    given = {(record["file_name"], tuple(record["bbox"])) for record in records if record["bbox"]}
    assert given <= boxes, "an annotation is reported with the image that it is in"
    duplicates = {record["file_name"] for record in records if record["kind"] == "duplicate"}
    assert duplicates == {names[image] for image in first}, "of both folds"

    code, output = run_script(*check, "--split", "val", cwd=tmp_path)
    assert code == 2
    assert "trained on folds of the training images; omit --split" in output
    code, output = run_script(*check[:2], "cv/fold-1", *check[3:], "--split", "train", cwd=tmp_path)
    assert code == 2
    assert "was trained on most of these images; name cv with --model" in output
    code, output = run_script(EXAMPLES / "evaluate.py", "--model", "cv", "--dataset", "data", cwd=tmp_path)
    assert code == 1
    assert "cv is a cross-validation. Name one of its models, such as cv/fold-1." in output
    content["images"] = content["images"][:-1]
    content["annotations"] = [r for r in content["annotations"] if names[r["image_id"]] != names[12]]
    (data / "annotations" / "instances_train.json").write_text(json.dumps(content))
    code, output = run_script(*check, cwd=tmp_path)
    assert code == 1
    assert "has other images than when cv was trained" in output
    code, output = run_script(*command, cwd=tmp_path)
    assert code == 1
    assert "cv was begun with other images or annotations" in output
    code, output = run_script(*command, "--folds", "3", cwd=tmp_path)
    assert code == 1
    assert "cv has a cross-validation with 2 folds. Name another --output_dir." in output
    shutil.copytree(tmp_path / "cv", tmp_path / "half")
    (tmp_path / "half" / "folds.json").write_text(json.dumps({"folds": 2, "held_out": []}))
    code, output = run_script(*check[:2], "half", *check[3:], cwd=tmp_path)
    assert code == 1
    assert "has not ended: start its command again" in output
