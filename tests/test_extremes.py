"""Data at the ends of what is possible: thin images, one image, 500 classes, more objects than queries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_labels, save_tiny_checkpoint, tiny_model
from PIL import Image
from safetensors.torch import load_file
from script_runner import run_script

from hf_detr import DetrImageProcessor
from hf_detr.data import paper_augmentation, resized_sizes
from hf_detr.evaluation import format_metrics
from hf_detr.evaluation.coco_metrics import METRICS
from hf_detr.runtime import listed, shortened

pytestmark = pytest.mark.xdist_group("extremes")
EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
SIZES = [{"shortest_edge": 80, "longest_edge": 133}, {"max_height": 96, "max_width": 64}, {"height": 48, "width": 64}]


def coco(folder, split, images, categories):
    """Write images of (width, height) with boxes [x, y, width, height] of class 1, and their annotations."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    records, annotations = [], []
    for index, (size, boxes) in enumerate(images, start=1):
        noise = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / split / f"{index}.png")
        records.append({"id": index, "file_name": f"{index}.png", "width": size[0], "height": size[1]})
        for box in boxes:
            row = {"image_id": index, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append(row | {"id": len(annotations) + 1})
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: next(iter(size)))
@pytest.mark.parametrize("shape", [(3, 2000), (2000, 3), (1, 5000), (5000, 1), (1, 1)], ids=str)
def test_thin_images_keep_a_pixel_on_each_side(size, shape):
    processor = DetrImageProcessor(size=size)
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    batch = processor([image, np.zeros((40, 60, 3), np.uint8)], return_tensors="pt")
    [(height, width)] = resized_sizes([shape], size)
    assert min(height, width) >= 1
    assert batch["pixel_mask"][0].sum() == height * width
    with torch.no_grad():
        outputs = tiny_model().eval()(**batch)
    assert outputs.logits.isfinite().all()
    if max(shape) > 1:
        assert outputs.pred_boxes.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 2000), (5000, 1)], ids=str)
def test_thin_images_are_augmented(shape):
    rng = np.random.default_rng(0)
    row = {
        "image": Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)), "image_id": 1,
        "width": shape[1], "height": shape[0],
        "objects": {"bbox": [[0.0, 0.0, shape[1], shape[0]]], "category": [0], "area": [1.0], "iscrowd": [0]},
    }  # fmt: skip
    augmentation = paper_augmentation(SIZES[0])
    for seed in range(30):
        augmentation.set_random_seed(seed)
        found = augmentation(row)
        assert min(found["image"].shape[-2:]) >= 1
        assert max(found["image"].shape[-2:]) <= 133


def test_a_loss_on_a_thin_image_is_finite():
    torch.manual_seed(0)
    model = tiny_model(query_type="anchor", denoising_groups=1, dense_loss_coefficient=1).train()
    labels = random_labels([2])
    loss = model(pixel_values=torch.randn(1, 3, 1, 133), labels=labels).loss
    loss.backward()
    assert loss.isfinite()


@pytest.fixture(scope="module")
def extreme(tmp_path_factory):
    """A run from a checkpoint with 12 queries and 500 classes, on images with 20 objects, one of them thin."""
    folder = tmp_path_factory.mktemp("extreme")
    categories = [{"id": 1, "name": "thing"}] + [{"id": i, "name": f"unused {i}"} for i in range(2, 501)]
    many = [[x * 10, y * 12, 8, 9] for x in range(5) for y in range(4)]
    coco(folder / "data", "train", [((60, 50), many)] * 7 + [((2000, 3), [[100, 0, 900, 3]])], categories)
    coco(folder / "data", "val", [((60, 50), many)], categories)
    save_tiny_checkpoint(folder / "model", {i: c["name"] for i, c in enumerate(categories)})
    code, output = run_script(
        EXAMPLE, "--dataset", "data", "--model", "model", "--freeze_backbone", "--epochs", "3", "--eval_every", "2",
        "--image_size", "64", "--num_workers", "0", "--output_dir", "run", "--batch_size", "2", cwd=folder,
    )  # fmt: skip
    assert code == 0, output
    return folder, output


def test_the_recipe_gives_a_checkpoint_queries_for_all_objects(extreme):
    folder, output = extreme
    assert json.loads((folder / "run" / "config.json").read_text())["num_queries"] == 25  # 1.25 * 20
    assert "up to 20 objects per image; the 12 of the checkpoint keep their weights" in output
    assert "some cannot be learned" not in output


def test_many_classes_make_no_wall_of_names(extreme):
    _, output = extreme
    assert "thing, unused 2, unused 3" in output
    assert "and 490 more" in output
    lines = output.splitlines()
    assert sum("unused" in line for line in lines) < 10
    assert max(len(line.split("\r")[-1]) for line in lines if "unused" in line) < 300


def test_a_frozen_backbone_keeps_its_weights(extreme):
    folder, output = extreme
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "run/last"))
    backbone = [name for name in before if ".backbone." in name]
    assert len(backbone) > 10
    assert all(after[name].equal(before[name]) for name in backbone)
    assert not after["model.encoder.layers.0.self_attn.q_proj.weight"].equal(
        before["model.encoder.layers.0.self_attn.q_proj.weight"]
    )
    assert "The backbone is frozen." in output


def test_every_line_of_the_log_has_the_same_keys_and_the_console_says_how_long_it_takes(extreme):
    folder, output = extreme
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert len({tuple(line) for line in lines}) == 1
    assert [line["AP"] is None for line in lines] == [True, False, False]
    assert lines[0]["changed_matches"] is None
    assert {"backbone_learning_rate", "loss_giou", "matched_iou"} <= set(lines[0])
    epochs = [line for line in output.splitlines() if "/3  " in line]
    assert [line.endswith(" left") for line in epochs] == [True] * 3
    assert epochs[2].endswith("  0 s left")
    assert "best" not in epochs[0]
    assert "best AP 0.0" in epochs[1]
    assert "(epoch 2)" in epochs[1]


def test_one_image_of_one_class_is_enough(tmp_path):
    categories = [{"id": 1, "name": "thing"}]
    for split in ("train", "val"):
        coco(tmp_path / "data", split, [((60, 50), [[5, 5, 30, 30]])], categories)
    save_tiny_checkpoint(tmp_path / "model", {0: "thing"})
    code, output = run_script(
        EXAMPLE, "--dataset", "data", "--model", "model", "--epochs", "1", "--image_size", "64", "--num_workers", "0",
        "--output_dir", "run", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, output
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


def test_tables_of_many_classes_show_the_best_and_the_worst():
    aps = {f"class {i}": i / 200 for i in range(150)} | {"without objects": -1.0}
    text = format_metrics({name: -1.0 if name == "APs" else 0.5 for name in METRICS} | {"per_class": aps})
    assert "the 20 best and the 20 worst of 150 classes with objects" in text
    assert len(text.splitlines()) == 12 + 2 + 40
    assert "-1" not in text
    assert "without objects" not in text
    assert "class 149" in text
    assert "class 0 " in text
    assert "class 75" not in text
    few = format_metrics(dict.fromkeys(METRICS, 0.5) | {"per_class": {"cat": 0.25, "dog": -1.0}})
    assert few.splitlines()[-1].split() == ["dog", "–"]


def test_sentences_stay_short():
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(500), 3) == "0, 1, 2 and 497 more"
    assert shortened([1, 2]) == "[1, 2]"
    assert len(shortened(list(range(500)))) < 90
