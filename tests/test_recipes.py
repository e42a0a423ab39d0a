"""Recipes, the training probe and its hints, and the schedules."""

import dataclasses
import json
import statistics

import pytest
import torch
from conftest import random_labels, tiny_config, tiny_model

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.data import draw_shapes_dataset, load_detection_dataset
from hf_detr.data.mixing import build_mixers
from hf_detr.training import (
    build_processor,
    build_schedule,
    choose_recipe,
    fit_processor,
    parse_finetune_args,
    resolve_recipe,
    run_recipe,
    summarize,
)
from hf_detr.training.recipes import DataSummary, choose_stride
from hf_detr.training.training_advice import describe_overfit, explain_overfit, has_memorized, training_advice
from hf_detr.training.training_probe import TrainingProbe, count_duplicates

SMALL = DataSummary(
    num_images=200,
    num_objects=1000,
    num_classes=12,
    min_per_class=60,
    max_per_class=100,
    max_objects=8,
    object_side=0.1,
    megapixels=0.02,
)
LARGE = DataSummary(
    num_images=5000,
    num_objects=30000,
    num_classes=3,
    min_per_class=8000,
    max_per_class=12000,
    max_objects=40,
    object_side=0.2,
    megapixels=0.3,
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = draw_shapes_dataset(tmp_path_factory.mktemp("drawn"), num_train=12, num_val=1, progress=False)
    return load_detection_dataset(folder, "train", progress=False)


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gets_queries_for_all_objects_of_an_image():
    crowded = dataclasses.replace(LARGE, max_objects=130)
    recipe = choose_recipe("auto", crowded, "checkpoint", (800, 1333), num_queries=100)
    assert recipe.values("model", {}) == {"num_queries": 163}  # 1.25 * 130, rounded up
    assert "the 100 of the checkpoint keep their weights" in recipe.describe({})
    assert choose_recipe("auto", crowded, "checkpoint", (800, 1333), num_queries=130).model == {}
    huge = dataclasses.replace(LARGE, max_objects=5000)
    assert choose_recipe("auto", huge, "checkpoint", (800, 1333), num_queries=100).model["num_queries"].value == 1000


def test_the_summary_is_of_the_annotations(drawn):
    dataset = drawn
    summary = summarize(dataset)
    rows = [(row["width"], row["height"], row["objects"]) for row in dataset]
    sides = sorted((w * h) ** 0.5 / min(W, H) for W, H, objects in rows for _, _, w, h in objects["bbox"])
    assert summary.num_images == 12
    assert summary.num_objects == len(sides)
    assert summary.max_objects == max(len(objects["bbox"]) for *_, objects in rows)
    assert sum(side < summary.object_side for side in sides) == pytest.approx(len(sides) / 4, abs=1)
    assert summary.megapixels == pytest.approx(statistics.median(w * h for w, h, _ in rows) / 1e6)


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("auto", "checkpoint", "finetune"),
        ("auto", "backbone", "small-data"),
        ("auto", "scratch", "small-data"),
        ("paper", "backbone", "paper"),
        ("paper", "scratch", "paper"),
        ("small-data", "scratch", "small-data"),
        ("finetune", "checkpoint", "finetune"),
    ],
)
def test_what_is_chosen(name, start, expected):
    recipe = choose_recipe(name, LARGE, start, (800, 1333))
    assert recipe.name == expected
    assert f"{LARGE.num_images:,} images" in recipe.why
    model = recipe.values("model", {})
    assert DetrConfig(**model)
    assert set(model) <= set(DetrConfig.__dataclass_fields__)
    assert ("query_type" in model) == (expected == "small-data")
    assert set(recipe.values("training", {})) == {
        "epochs", "batch_size", "learning_rate", "backbone_learning_rate", "weight_decay", "schedule", "warmup",
        "decay", "ema", "augmentation", "mosaic", "copy_paste", "color_jitter", "eval_every",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("finetune", "scratch", "Name one with --model"),
        ("paper", "checkpoint", "Use --recipe finetune"),
        ("small-data", "checkpoint", "Use --recipe finetune"),
        ("best", "scratch", "auto, paper, paper-500, small-data, finetune"),
    ],
)
def test_what_does_not_fit_is_refused(name, start, message):
    with pytest.raises(ValueError, match=message):
        choose_recipe(name, SMALL, start, (800, 1333))


def test_the_paper_s_long_recipe_drops_the_rate_after_400_of_500_epochs():
    values = choose_recipe("paper-500", LARGE, "backbone", (800, 1333)).values("training", {})
    assert (values["epochs"], values["schedule"], values["decay"]) == (500, "step", 0.2)


def test_the_paper_is_the_paper():
    recipe = choose_recipe("paper", LARGE, "backbone", (800, 1333))
    assert recipe.model == {}
    assert choose_recipe("paper", LARGE, "scratch", (800, 1333)).values("model", {})["frozen_stages"] == -1
    values = recipe.values("training", {})
    assert (values["learning_rate"], values["backbone_learning_rate"], values["weight_decay"]) == (1e-4, 1e-5, 1e-4)
    assert (values["epochs"], values["schedule"], values["decay"], values["batch_size"]) == (300, "step", 0.3333, 4)
    assert values["ema"] == 0


def test_values_follow_the_data():
    large = choose_recipe("auto", LARGE, "backbone", (800, 1333)).values("model", {})
    small = choose_recipe("auto", SMALL, "scratch", (128, 128))
    assert large["num_queries"] == 100
    assert choose_recipe("auto", SMALL, "scratch", (48, 64)).values("model", {})["num_queries"] == 24  # of 48 locations
    assert large["feature_stride"] == 32  # 160 pixels
    assert small.values("model", {})["num_queries"] == 50
    assert small.values("model", {})["feature_stride"] == 8  # 13 pixels
    assert (
        small.values("training", {})["epochs"]
        > choose_recipe("auto", LARGE, "scratch", (128, 128)).values("training", {})["epochs"]
    )
    # small objects in large images: not so many cells that attention cannot be afforded
    assert choose_recipe("auto", SMALL, "backbone", (800, 1333)).values("model", {})["feature_stride"] == 32
    assert choose_recipe("auto", SMALL, "backbone", (320, 480)).values("model", {})["feature_stride"] == 16


@pytest.mark.parametrize(
    ("max_objects", "groups"), [(0, 3), (4, 3), (33, 3), (34, 2), (60, 1), (100, 1), (101, 0), (500, 0)]
)
def test_many_objects_get_fewer_denoising_groups(max_objects, groups):
    data = dataclasses.replace(SMALL, max_objects=max_objects)
    chosen = choose_recipe("auto", data, "scratch", (96, 96)).model["denoising_groups"]
    assert chosen.value == groups
    assert ("more time than they gain" in chosen.reason) == (groups == 0)
    several_layers = choose_recipe("auto", data, "scratch", (96, 96), query_proposals=False)
    of_paper = choose_recipe("auto", dataclasses.replace(LARGE, max_objects=max_objects), "backbone", (96, 96))
    given = [choose_recipe("auto", data, "scratch", (96, 96), decoder_layers=layers) for layers in (1, 3)]
    assert given[0].model["denoising_groups"].value == groups
    for recipe in (several_layers, of_paper, given[1]):
        assert recipe.model["denoising_groups"].value == max(1, groups), "measured with one layer only"


@pytest.mark.parametrize("start", ["checkpoint", "scratch"])
def test_a_new_mask_head_gets_what_a_random_head_needs(start):
    def chosen(**masks):
        recipe = choose_recipe("auto", SMALL, start, (96, 96), **masks)
        return recipe.values("model", {}), recipe.values("training", {})

    gain, weights = {"mask_attention_gain": 256}, {"mask_loss_coefficient": 5, "dice_loss_coefficient": 5}
    boxes, training = chosen()
    assert chosen(new_masks=True) == (boxes | gain | weights, training)
    assert chosen(new_masks=True, freeze_detector=True) == (boxes | gain, training | {"learning_rate": 1e-3})
    assert chosen(freeze_detector=True) == (boxes, training)  # of a trained mask head


def test_only_strides_that_the_backbone_has_are_chosen():
    assert choose_stride(300.0, (800, 1333), [16]) == 16
    assert choose_stride(10.0, (128, 128), [4, 8, 16, 32]) == 8
    assert choose_stride(10.0, (128, 128), [2, 4]) == 4
    vit = choose_recipe("auto", LARGE, "backbone", (800, 1333), strides=[16]).values("model", {})
    assert vit["feature_stride"] == 16


def test_every_value_has_a_reason_and_can_be_overridden():
    recipe = choose_recipe("auto", SMALL, "scratch", (128, 128), upright=False)
    choices = recipe.model | recipe.training
    assert all(choice.reason for choice in choices.values())
    text = recipe.describe({"epochs": 7, "num_queries": 99, "dropout": 0.0, "backbone": "resnet18"})
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert set(lines) == set(choices) | {"backbone"}
    assert "yours" in lines["epochs"]
    assert "yours" in lines["num_queries"]
    assert "50" in lines["num_queries"]
    assert "yours" not in lines["dropout"]  # the recipe has it, too
    assert recipe.values("training", {"epochs": 7})["epochs"] == 7
    assert recipe.values("training", {})["augmentation"] == "turns"


def test_images_have_few_sizes_unless_the_recipe_is_the_paper_s():
    chosen = {
        start: choose_recipe("auto", SMALL, start, (384, 640)).training["augmentation"].value
        for start in ("scratch", "backbone", "checkpoint")
    }
    one_size = "paper-one-size"  # not measured with trained detectors
    assert chosen == {"scratch": one_size, "backbone": one_size, "checkpoint": "paper-rounded"}
    assert choose_recipe("paper", SMALL, "backbone", (384, 640)).training["augmentation"].value == "paper"


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "last"), [("wsd", 0.0), ("step", 0.1)])
def test_schedules(kind, last):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = build_schedule(optimizer, kind, warmup=0.1, decay=0.3, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] < 0.11
    assert rates[:10] == sorted(rates[:10])
    assert set(rates[10:70]) == {1.0}
    assert rates[99] == pytest.approx(last, abs=0.04)
    assert rates[85] == pytest.approx(0.5 if kind == "wsd" else 0.1, abs=0.01)


# -- the probe --------------------------------------------------------------------------------------------------------


class Answers(torch.nn.Module):
    """A model that says what it is told to."""

    def __init__(self, logits, boxes):
        super().__init__()
        self.told = torch.nn.Parameter(logits)
        self.boxes = boxes
        self.config = DetrConfig(num_queries=logits.shape[1], num_labels=logits.shape[2] - 1)

    def forward(self, pixel_values):
        from hf_detr.model.outputs import DetrDetectionOutput

        return DetrDetectionOutput(logits=self.told, pred_boxes=self.boxes)


def test_the_probe_by_hand():
    labels = random_labels([2, 1])
    labels[1]["boxes"] = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    boxes = torch.tensor([[0.9, 0.9, 0.01, 0.01]]).repeat(2, 4, 1)
    boxes[0, 1], boxes[0, 3] = labels[0]["boxes"][0], labels[0]["boxes"][1]
    boxes[1, 2] = torch.tensor([0.5, 0.5, 0.1, 0.2])  # half of it
    logits = torch.zeros(2, 4, 6)
    logits[..., 5] = 5.0
    for image, query, name in ((0, 1, labels[0]["class_labels"][0]), (0, 3, (labels[0]["class_labels"][1] + 1) % 5)):
        logits[image, query, name] = 9.0
    logits[1, 2, labels[1]["class_labels"][0]] = 9.0
    model = Answers(logits, boxes).train()
    rows = [{"pixel_values": torch.zeros(1, 3, 8, 8), "labels": labels}]
    probe = TrainingProbe(rows, lambda some: some[0], 4)
    first = probe.measure(model)
    assert model.training
    assert first["matched_iou"] == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-3)
    assert first["class_error"] == pytest.approx(1 / 3, abs=1e-3)
    assert first["never_matched"] == 0.25
    assert first["duplicates"] == 0
    assert "changed_matches" not in first
    model.boxes = boxes.clone()
    model.boxes[1, 0], model.boxes[1, 2] = boxes[1, 2], boxes[1, 0]
    model.told.data[1, 0], model.told.data[1, 2] = logits[1, 2].clone(), logits[1, 0].clone()
    second = probe.measure(model)
    assert second["changed_matches"] == pytest.approx(1 / 3, abs=1e-3)
    assert second["never_matched"] == 0
    resumed = TrainingProbe(rows, lambda some: some[0], 4)
    resumed.load_state_dict(probe.state_dict())
    assert resumed.measure(model)["changed_matches"] == 0


def test_the_probe_looks_at_real_models_and_at_no_objects():
    model = tiny_model(query_type="anchor").train()
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "pixel_mask": torch.ones(2, 64, 64)}
    rows = [batch | {"labels": random_labels([0, 0])}]
    assert TrainingProbe(rows, lambda some: some[0], 4).measure(model)["matched_iou"] == 0
    assert model.training


def test_duplicates_are_confident_repetitions():
    logits = torch.tensor([[[3.0, 0, 0], [4.0, 0, 0], [0, 4.0, 0], [4.0, 0, 0], [4.1, 0, 6]]])
    box = [0.5, 0.5, 0.2, 0.2]
    boxes = torch.tensor([[box, box, box, [0.2, 0.2, 0.2, 0.2], box]])
    assert count_duplicates(logits.softmax(-1)[..., :-1], boxes) == (
        4,
        1,
    )  # the first repeats the second; the last says "no object"


# -- hints ------------------------------------------------------------------------------------------------------------


def line(ap50, **changes):
    figures = {"matched_iou": 0.65, "class_error": 0.1, "changed_matches": 0.1, "duplicates": 0.0, "never_matched": 0.2}
    return {"AP50": ap50, "loss": 5.0} | figures | changes


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"matched_iou": 0.9, "class_error": 0.02}, "overfits"),
        ({"matched_iou": 0.7, "class_error": 0.5}, "labels"),
        ({"changed_matches": 0.8}, "a new model with anchors"),
        ({"duplicates": 0.5}, "repeat"),
        ({"matched_iou": 0.3}, "feature_stride=8"),
        ({"matched_iou": 0.9, "class_error": 0.0, "duplicates": 0.6}, "repeat"),
        ({"never_matched": 0.9}, "num_queries"),
        ({}, "train longer"),
    ],
)
def test_stuck_training_gets_a_hint_that_fits(figures, words):
    assert words in training_advice([line(0.1, **figures)] * 6, query_type="learned", stride=16)


def test_hints_fit_the_model():
    text = training_advice([line(0.1, changed_matches=0.8)] * 6, query_type="anchor", stride=8)
    assert "anchors" not in text
    assert "feature_stride" not in training_advice([line(0.1, matched_iou=0.3)] * 6, query_type="anchor", stride=8)


def test_training_that_goes_well_gets_none():
    facts = {"query_type": "anchor", "stride": 16}
    assert training_advice([line(0.1)] * 4, **facts) is None  # too early to say
    assert training_advice([line(0.05 * step) for step in range(8)], **facts) is None
    assert training_advice([line(0.7)] * 9, **facts) is None


@pytest.mark.parametrize(
    ("losses", "figures", "facts", "words"),
    [
        ((9, 5, 5, 5), {}, {"max_objects": 30}, "30 objects"),
        ((5, 4, 8, 9), {}, {}, "Lower --learning_rate"),
        ((9, 8, 6, 4), {}, {}, "still falling"),
        ((9, 5, 5, 5), {"matched_iou": 0.5}, {"object_pixels": 10.0}, "10 pixels"),
        ((9, 5, 5, 5), {"class_error": 0.4}, {}, "different names"),
        ((9, 5, 5, 5), {"matched_iou": 0.4}, {}, "not the boxes"),
        ((9, 5, 5, 5), {}, {}, "another --learning_rate"),
    ],
)
def test_what_cannot_be_overfitted_is_explained(losses, figures, facts, words):
    history = [line(0.3, **figures) | {"loss": float(loss)} for loss in losses]
    known = {"object_pixels": 40.0, "stride": 16, "max_objects": 4, "num_queries": 10} | facts
    assert words in explain_overfit(history, **known)


# -- arguments --------------------------------------------------------------------------------------------------------


def resolve(drawn, argv):
    args = parse_finetune_args("", argv)
    return args, resolve_recipe(args, drawn, build_processor(args))


def test_fields_of_the_config_are_read_and_refused(capsys):
    args = parse_finetune_args("", ["--set", "num_queries=7", "query_type=learned", "prior_probability=null"])
    assert args.model.config_fields() == {"num_queries": 7, "query_type": "learned", "prior_probability": None}
    for wrong in ("num_querys=7", "num_queries", "id2label={}"):
        with pytest.raises(SystemExit):
            parse_finetune_args("", ["--set", wrong])
        assert f"--set {wrong}" in capsys.readouterr().err
    wrongs = (
        ["--overfit", "0"], ["--overfit", "3", "--push_to_hub", "me/x"], ["--resume"], ["--batch_size", "0"],
        ["--warmup", "2"], ["--warmup", "0.6", "--decay", "0.6"], ["--ema", "1"], ["--lora_rank", "2"], ["--sed", "1"],
        ["--save_minutes", "-1"], ["--schedule", "none"],
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(SystemExit) as error:
            parse_finetune_args("", wrong)
        assert error.value.code == 2


def test_a_resumed_run_has_its_arguments_and_takes_changes(tmp_path, drawn):
    args, recipe = resolve(drawn, ["--learning_rate", "0.5", "--epochs", "5", "--set", "num_queries=7", "d_model=64"])
    (tmp_path / "args.json").write_text(json.dumps(recipe.settings(args)))
    again = ["--output_dir", str(tmp_path), "--resume"]
    args, same = resolve(drawn, again)
    assert args.embedded
    assert dataclasses.replace(same, description=recipe.description) == recipe
    assert (same.config["num_queries"], same.config["d_model"], same.epochs, same.learning_rate) == (7, 64, 5, 0.5)
    args, changed = resolve(drawn, [*again, "--epochs", "9", "--set", "dropout=0.1", "num_queries=7"])
    assert (changed.config, changed.epochs) == (recipe.config | {"dropout": 0.1}, 9)
    for wrong in (["--ema", "0"], ["--metric", "AP50"]):
        with pytest.raises(SystemExit):
            parse_finetune_args("", [*again, *wrong])


def test_weights_are_averaged_unless_they_are_sharded(drawn, monkeypatch):
    assert resolve(drawn, [])[1].ema == 0.99
    assert resolve(drawn, ["--ema", "0"])[1].ema == 0
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert resolve(drawn, [])[1].ema == 0


def test_one_decoder_layer_refines_proposals_and_three_other_queries(drawn):
    for start in ("scratch", "backbone"):
        assert choose_recipe("auto", SMALL, start, (96, 96)).model["decoder_layers"].value == 1
    assert "decoder_layers" not in choose_recipe("auto", LARGE, "backbone", (800, 1333)).model, "the paper's"
    assert choose_recipe("auto", SMALL, "scratch", (96, 96), query_proposals=False).model["decoder_layers"].value == 3
    assert {name: resolve(drawn, [])[1].config[name] for name in ("decoder_layers", "denoising_groups")} == {
        "decoder_layers": 1,
        "denoising_groups": 3,
    }
    many = dataclasses.replace(SMALL, max_objects=500)
    for options, groups in (([], 0), (["--set", "decoder_layers=3"], 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_recipe, "summarize", lambda dataset: many)
            assert resolve(drawn, options)[1].config["denoising_groups"] == groups
    assert "layer by layer" in resolve(drawn, ["--set", "query_proposals=false"])[1].description
    assert resolve(drawn, ["--set", "decoder_layers=2"])[1].config["decoder_layers"] == 2


def test_images_are_mixed_where_classes_have_few_objects(drawn):
    few = dataclasses.replace(SMALL, num_objects=300)  # 25 of each of 12 classes

    def mixed(*args, **options):
        training = choose_recipe(*args, **options).training
        return tuple(training[name].value for name in ("mosaic", "copy_paste", "color_jitter"))

    assert mixed("auto", few, "scratch", (160, 160)) == (0.5, 0.7, 0.7)
    assert mixed("auto", few, "backbone", (160, 160)) == (0.5, 0.7, 0.7)
    assert mixed("auto", few, "backbone", (160, 160), in_color=False) == (0.5, 0.7, 0)
    assert mixed("auto", SMALL, "scratch", (160, 160)) == (0, 0.7, 0), "83 of each"
    assert mixed("auto", LARGE, "backbone", (160, 160)) == (0, 0, 0)
    assert mixed("auto", few, "checkpoint", (160, 160)) == (0, 0, 0)
    assert mixed("auto", dataclasses.replace(few, megapixels=12.0), "backbone", (800, 1333)) == (0, 0, 0.7)
    assert mixed("paper", few, "backbone", (160, 160)) == (0, 0, 0)
    assert mixed("auto", few, "scratch", (160, 160), unmixable="no") == (0, 0, 0.7)
    unlike = dataclasses.replace(LARGE, num_images=4999, min_per_class=1000, max_per_class=20000)
    assert mixed("auto", unlike, "backbone", (160, 160)) == (0, 0.7, 0), "rare classes are pasted"
    reason = choose_recipe("auto", unlike, "backbone", (160, 160)).training["copy_paste"].reason
    assert "1,000 to 20,000 objects" in reason
    assert mixed("auto", unlike, "backbone", (160, 160), unmixable="no") == (0, 0, 0)
    assert mixed("auto", dataclasses.replace(unlike, num_images=5000), "backbone", (160, 160)) == (0, 0, 0)
    assert mixed("auto", dataclasses.replace(unlike, min_per_class=2000), "backbone", (160, 160)) == (0, 0, 0)
    empty = dataclasses.replace(SMALL, num_objects=0, num_classes=0, min_per_class=0, max_per_class=0)
    assert mixed("auto", empty, "scratch", (160, 160)) == (0.5, 0.7, 0.7)
    _, recipe = resolve(drawn, ["--mosaic", "0", "--copy_paste", "0.2"])
    assert (recipe.mosaic, recipe.copy_paste) == (0, 0.2)
    [mixer] = build_mixers(drawn, mosaic=recipe.mosaic, copy_paste=recipe.copy_paste)
    assert mixer.probability == 0.2
    assert sum(map(len, mixer.by_class.values())) > 0
    _, recipe = resolve(drawn, ["--overfit", "4"])
    assert (recipe.mosaic, recipe.copy_paste, recipe.color_jitter) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mosaic", "1.5"], "--mosaic is a probability, between 0 and 1"),
        (["--copy_paste", "-1"], "--copy_paste is a probability, between 0 and 1"),
        (["--color_jitter", "2"], "--color_jitter is a probability"),
        (["--mosaic", "0.5", "--masks"], "images with masks (--masks, --stuff) cannot be mixed"),
        (
            ["--copy_paste", "0.5", "--dataset", "x", "--streaming"],
            "--copy_paste mixes images, which is not possible: streamed images",
        ),
    ],
)
def test_images_that_cannot_be_mixed_are_refused(options, reason, capsys):
    with pytest.raises(SystemExit):
        parse_finetune_args("", options)
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("side", "objects", "expected"), [(96, 0.5, 32), (96, 0.1, 16), (128, 0.1, 8), (192, 0.1, 8)])
def test_small_images_with_more_locations_come_in_smaller_batches(side, objects, expected):
    data = dataclasses.replace(SMALL, object_side=objects)
    recipe = choose_recipe("small-data", data, "scratch", (side, side))
    assert recipe.training["batch_size"].value == expected
    locations = (side // recipe.model["feature_stride"].value) ** 2
    assert f"{locations} locations" in recipe.training["batch_size"].reason


def test_a_run_of_version_0_1_is_resumed_without_averaged_weights_and_mixed_images(tmp_path, drawn):
    args, recipe = resolve(drawn, ["--ema", "0"])
    saved = recipe.settings(args) | {"ema": None}
    for name in ("mosaic", "copy_paste", "color_jitter"):
        del saved[name]
    (tmp_path / "args.json").write_text(json.dumps(saved))
    resumed = resolve(drawn, ["--output_dir", str(tmp_path), "--resume"])[1]
    assert (resumed.ema, resumed.mosaic, resumed.copy_paste, resumed.color_jitter) == (0, 0, 0, 0)


def test_a_checkpoint_with_a_fine_feature_map_gets_small_batches(tmp_path, drawn):
    sizes = {}
    for stride in (8, None):
        DetrForDetection(tiny_config(feature_stride=stride)).save_pretrained(tmp_path / str(stride))
        DetrImageProcessor().save_pretrained(tmp_path / str(stride))
        options = ["--model", str(tmp_path / str(stride)), "--image_size", "112"]
        sizes[stride] = resolve(drawn, options)[1].batch_size
    assert sizes == {8: 8, None: 32}


@pytest.mark.parametrize(
    ("options", "rounded"),
    [
        (["--image_size", "300"], True),
        (["--recipe", "paper"], False),
        (["--augmentation", "paper-rounded"], True),
        (["--augmentation", "paper-one-size"], True),
        (["--augmentation", "flip"], False),
        (None, False),
    ],
)
def test_images_are_rounded_in_prediction_if_they_are_in_training(drawn, options, rounded):
    random = ["--dataset", "x", "--backbone", "test_resnet", "--backbone_weights", "none"]
    args = parse_finetune_args("", [] if options is None else [*random, *options])
    processor = build_processor(args)
    recipe = resolve_recipe(args, drawn, processor)
    assert fit_processor(processor, tiny_model(), recipe).round_size is rounded
    processor.round_size = True  # of a checkpoint, which is trained further
    further = fit_processor(processor, tiny_model(), recipe).round_size
    assert further == (recipe.augmentation != "paper"), "its images are rounded by the augmentation or the processor"


def test_overfitting_takes_away_what_stands_in_its_way(drawn):
    args, recipe = resolve(drawn, ["--overfit", "4", "--epochs", "7"])
    assert (recipe.epochs, recipe.augmentation, recipe.weight_decay, recipe.decay) == (7, "none", 0.0, 0.0)
    assert args.recipe.given() == {"epochs": 7}
    assert args.embedded
    assert not parse_finetune_args("", ["--dataset", "x"]).embedded


def test_arguments_and_what_the_recipe_decides_do_not_change(drawn):
    args, recipe = resolve(drawn, [])
    for part, name in ((args, "data"), (args.run, "seed"), (args.recipe, "epochs"), (recipe, "epochs")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        (("--backbone", "tf_efficientnet_lite0"), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (("--set", "backbone=vit_small_patch16_224"), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (("--backbone", "resnet50"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # resnet50
        (
            ("--backbone", "tf_efficientnet_lite0", "--backbone_weights", "none"),
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
        ),
        (("--backbone", "resnet50", "--set", "num_channels=1"), (0.449,), (0.226,)),
    ],
)
def test_images_are_normalised_as_the_pretrained_backbone_was_trained(options, mean, std):
    args = parse_finetune_args(None, ["--dataset", "somewhere", *options])
    processor = build_processor(args)
    assert list(processor.image_mean) == pytest.approx(mean)
    assert list(processor.image_std) == pytest.approx(std)


@pytest.mark.parametrize(
    ("numbers", "memorized"),
    [
        ({"AP50": 0.95}, True),
        ({"AP50": 0.85}, False),
        ({"AP50": 0.95, "mask_AP50": 0.2, "PQ_stuff": 0.95}, False),
        ({"AP50": 0.95, "mask_AP50": 0.93, "PQ_stuff": 0.95}, True),
        ({"AP50": 0.95, "mask_AP50": 0.93, "PQ_stuff": 0.4}, False),
        ({"AP50": -1.0, "mask_AP50": -1.0, "PQ_stuff": 0.95}, True),  # stuff only
        ({"AP50": -1.0, "mask_AP50": -1.0, "PQ_stuff": -1.0}, False),
    ],
)
def test_images_are_memorized_when_boxes_and_masks_are(numbers, memorized):
    history = [{"loss": 1.0, "matched_iou": 0.9, "class_error": 0.0} | numbers]
    assert has_memorized(history) == memorized
    sizes = {"object_pixels": 40.0, "stride": 16, "max_objects": 3, "num_queries": 50}
    text = describe_overfit(history, num_images=8, steps=100, **sizes)
    assert text.startswith("Overfit: yes" if memorized else "Overfit: NO")
    assert ("mask AP50" in text) == (numbers.get("mask_AP50", -1) != -1)


@pytest.mark.parametrize(
    ("start", "d_model", "rates"),
    [
        ("backbone", None, (4e-4, 2e-4)),
        ("backbone", 64, (4e-4, 2e-4)),
        ("backbone", 256, (1e-4, 1e-5)),  # the paper's
        ("scratch", None, (8e-4, 4.8e-3)),
        ("scratch", 256, (2e-4, 4e-4)),
    ],
)
def test_a_transformer_that_is_made_wide_again_gets_lower_rates(start, d_model, rates):
    recipe = choose_recipe("auto", SMALL, start, (320, 480), d_model=d_model)
    assert recipe.values("model", {})["d_model"] == 128
    assert tuple(recipe.training[name].value for name in ("learning_rate", "backbone_learning_rate")) == rates
