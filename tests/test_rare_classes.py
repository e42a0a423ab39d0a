"""Rare classes: weights in the class loss against PyTorch's own, and images that are shown more often."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import random_labels, tiny_config
from huggingface_hub.errors import StrictDataclassError
from script_runner import run_script

from hf_detr import DetrConfig, DetrForDetection
from hf_detr.data import load_detection_dataset
from hf_detr.data.class_balance import repeat_factors, repeat_rare_classes
from hf_detr.data.shapes import draw_shapes_dataset
from hf_detr.model.dense_supervision import DenseHead
from hf_detr.model.loss import DetrLoss, LossNormalizers

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
NAMES = {0: "common", 1: "rare", 2: "usual"}
WEIGHTS = {"rare": 5.0, "usual": 0.5}
IN_ORDER = [1.0, 5.0, 0.5]


def configured(**changes):
    return tiny_config(id2label=NAMES, label2id={name: i for i, name in NAMES.items()}, **changes)


def predictions(counts, queries=6):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, len(counts), queries, len(NAMES) + 1, generator=generator)
    boxes = torch.rand(2, len(counts), queries, 4, generator=generator) * 0.4 + 0.2
    return logits, boxes, random_labels(counts, num_labels=len(NAMES), seed=3)


def targets_of(result, labels, queries):
    """The class that each query of the last layer was matched to."""
    classes = torch.full((len(labels), queries), len(NAMES))
    given = torch.cat([label["class_labels"] for label in labels])
    classes[result.matching.image, result.matching.query[-1]] = given[result.matching.target[-1]]
    return classes


def test_weighted_cross_entropy_is_that_of_pytorch():
    logits, boxes, labels = predictions([3, 0, 2])
    result = DetrLoss(configured(num_queries=6, class_weights=WEIGHTS))(logits, boxes, labels)
    targets = targets_of(result, labels, 6)
    expected = torch.nn.functional.cross_entropy(
        logits[-1].double().transpose(1, 2), targets, weight=torch.tensor([*IN_ORDER, 0.1], dtype=torch.float64)
    )
    assert result.loss_dict["loss_ce"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["focal", "iou_aware"])
def test_other_class_losses_count_an_object_as_often_as_its_weight_says(kind):
    """The loss is a sum over queries, so it is linear in the weight of a class."""
    logits, boxes, labels = predictions([3, 0, 2])
    of = {
        w: DetrLoss(configured(num_queries=6, class_loss=kind, class_weights={"rare": w}))(logits, boxes, labels)
        for w in (1.0, 2.0, 5.0)
    }
    once, twice, five = (of[w].loss_dict["loss_ce"].double() for w in (1.0, 2.0, 5.0))
    assert twice - once > 1e-3
    torch.testing.assert_close(five - once, 4 * (twice - once), rtol=1e-4, atol=1e-6)
    if kind == "focal":
        p = logits[-1].double().softmax(-1)
        targets = targets_of(of[1.0], labels, 6)
        of_rare = p[targets == 1][:, 1]
        by_hand = (0.25 * (1 - of_rare) ** 2 * -of_rare.log()).sum() / 5
        torch.testing.assert_close(twice - once, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_accumulated_batches_equal_one_batch_with_weights_too(kind):
    model = DetrForDetection(configured(class_loss=kind, class_weights=WEIGHTS)).eval()
    images, labels = torch.randn(3, 3, 64, 64), random_labels([3, 0, 2], num_labels=3)
    together = model(images, labels=labels).loss
    counts = sum(model.count_for_loss([label]) for label in labels)
    normalizers = LossNormalizers.from_counts(counts, 1)
    apart = sum(
        model(images[i : i + 1], labels=labels[i : i + 1], normalizers=normalizers).loss for i in range(len(labels))
    )
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_weights_count_in_dense_supervision_and_denoising():
    head, labels = (
        DenseHead(16, 3),
        [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}],
    )
    mask, features = torch.ones(1, 2, 2, dtype=torch.bool), [torch.randn(1, 4, 16)]
    boxes = torch.tensor(1.0)
    plain, doubled = (
        head(features, mask, labels, boxes, class_weights=w)["loss_ce"]
        for w in (None, torch.tensor([1.0, 2.0, 1.0, 1.0]))
    )
    torch.testing.assert_close(doubled, 2 * plain)  # every location is in the middle of the object, or nearest to it
    terms = {}
    for weights in (None, {"rare": 3.0}):
        torch.manual_seed(0)
        config = configured(
            query_type="anchor", d_model=32, denoising_groups=2, class_weights=weights, class_loss="focal"
        )
        model = DetrForDetection(config).train()
        torch.manual_seed(1)
        labels = [{"class_labels": torch.tensor([1, 1]), "boxes": torch.rand(2, 4) * 0.3 + 0.3}]
        terms[weights is None] = model(torch.randn(1, 3, 64, 64), labels=labels).loss_dict["loss_ce_denoising"].item()
    assert terms[False] > 1.5 * terms[True]


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"rar": 5}, "no class of `id2label`. Did you mean 'rare'"), ({"rare": 0}, "positive"), ({"rare": -1}, "positive"),
     ({"rare": math.inf}, "positive"), ({"zebra": 2}, "The classes are common, rare, usual")],
)  # fmt: skip
def test_weights_that_cannot_be_meant_are_refused(weights, message):
    with pytest.raises(StrictDataclassError, match=message):
        configured(class_weights=weights)


def test_weights_follow_the_classes_of_a_checkpoint(tmp_path):
    DetrForDetection(configured(class_weights=WEIGHTS)).save_pretrained(tmp_path)
    assert DetrForDetection.from_pretrained(tmp_path).config.class_weights == WEIGHTS
    assert DetrConfig.from_pretrained(tmp_path).class_weights == WEIGHTS
    other = {0: "usual", 1: "new"}
    kept = DetrForDetection.from_pretrained(tmp_path, id2label=other, ignore_mismatched_sizes=True)
    assert kept.config.class_weights == {"usual": 0.5}
    given = DetrForDetection.from_pretrained(
        tmp_path, id2label=other, ignore_mismatched_sizes=True, class_weights={"new": 2}
    )
    assert given.config.class_weights == {"new": 2}
    with pytest.raises(StrictDataclassError, match="'rare', which is no class"):
        DetrForDetection.from_pretrained(
            tmp_path, id2label=other, ignore_mismatched_sizes=True, class_weights={"rare": 2}
        )


def rows(*classes):
    return [{"objects": {"bbox": [[0, 0, 9, 9]] * len(c), "category": c, "iscrowd": [0] * len(c)}} for c in classes]


def test_repeat_factors_by_hand():
    """LVIS, section 6.1: f(0) = 8/10, f(1) = 1/10, f(2) = 2/10 with t = 0.4."""
    data = rows([0], [0], [0], [0], [0], [0], [0, 1], [0, 2], [2], [])
    expected = [1.0] * 6 + [2.0, math.sqrt(2), math.sqrt(2), 1.0]
    assert repeat_factors(data, 0.4) == pytest.approx(expected)
    crowd = rows([1])
    crowd[0]["objects"]["iscrowd"] = [1]
    assert repeat_factors([*data, *crowd], 0.4)[-1] == 1.0
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        repeat_factors(data, 0)


def test_images_occur_as_often_as_their_factor_says():
    data = rows(*([[0]] * 900 + [[0, 1]] * 10 + [[1, 2]] * 1))
    factors = repeat_factors(data, 0.25)
    totals = Counter()
    for seed in range(200):
        indices = repeat_rare_classes(data, 0.25, seed)
        assert len(indices) == round(sum(factors))
        counts = Counter(indices)
        assert all(math.floor(f) - 1 <= counts[i] <= math.ceil(f) + 1 for i, f in enumerate(factors))
        assert min(counts[i] for i in range(len(data))) >= 1
        totals += counts
    assert repeat_rare_classes(data, 0.25, 3) == repeat_rare_classes(data, 0.25, 3)
    for index in (0, 905, 910):
        assert totals[index] / 200 == pytest.approx(factors[index], rel=0.05)


def test_finetune_shows_images_of_rare_classes_more_often(tmp_path):
    folder = draw_shapes_dataset(tmp_path / "data", num_train=24, num_val=4, progress=False)
    train = load_detection_dataset(folder, "train", cache_dir=tmp_path / "cache", progress=False)
    expected = len(repeat_rare_classes(train, 1.0))
    assert expected > 24
    code, output = run_script(
        EXAMPLE, "--dataset", "data", "--backbone", "test_resnet", "--backbone_weights", "none", "--image_size", "64",
        "--epochs", "1", "--num_workers", "0", "--repeat_threshold", "1", "--batch_size", "8", "--output_dir", "out",
        "--set", "class_weights={\"triangle\": 3}", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, output
    assert f"24 to {expected} per epoch" in output
    assert DetrConfig.from_pretrained(tmp_path / "out").class_weights == {"triangle": 3}
    code, output = run_script(EXAMPLE, "--dataset", "data", "--repeat_threshold", "2", cwd=tmp_path)
    assert code == 2
    assert "--repeat_threshold is a fraction" in output
