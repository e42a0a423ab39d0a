"""The set loss against a float64 computation by hand, its edge cases, and what refuses to be trained on."""

import itertools

import pytest
import torch
from conftest import random_labels, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_detr.model.annotations import check_labels
from hf_detr.model.loss import DetrLoss
from hf_detr.model.matcher import hungarian_matching

CLASSES = 5


def set_loss(logits, boxes, labels):
    result = DetrLoss(tiny_config(num_queries=logits.shape[2]))(logits, boxes, labels)
    return result.loss, result.loss_dict


def predictions(layers=3, images=2, queries=6, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, CLASSES + 1, generator=generator, dtype=dtype)
    boxes = torch.rand(layers, images, queries, 4, generator=generator, dtype=dtype) * 0.5 + 0.2
    return logits, boxes


def giou_by_hand(a, b):
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def loss_by_hand(logits, boxes, labels):
    """One layer's terms in Python floats, the matching by trying every assignment."""
    log_probability = logits.double().log_softmax(-1)
    boxes = boxes.double().tolist()
    total, nll, weights, l1, giou = sum(len(x["class_labels"]) for x in labels), 0.0, 0.0, 0.0, 0.0
    for image, label in enumerate(labels):
        classes, objects = label["class_labels"].tolist(), label["boxes"].double().tolist()
        probability = log_probability[image].exp()

        def distance(query, index, image=image, objects=objects):
            return sum(abs(p - t) for p, t in zip(boxes[image][query], objects[index], strict=True))

        def overlap(query, index, image=image, objects=objects):
            return giou_by_hand(boxes[image][query], objects[index])

        def cost(query, index, classes=classes, probability=probability):
            return -probability[query, classes[index]].item() + 5 * distance(query, index) - 2 * overlap(query, index)

        queries = range(logits.shape[1])
        best = min(
            itertools.permutations(queries, len(classes)), key=lambda p: sum(cost(q, i) for i, q in enumerate(p))
        )
        targets = dict(zip(best, classes, strict=True))
        for query in queries:
            weight = 1.0 if query in targets else 0.1
            nll -= weight * log_probability[image, query, targets.get(query, CLASSES)].item()
            weights += weight
        l1 += sum(distance(q, i) for i, q in enumerate(best))
        giou += sum(1 - overlap(q, i) for i, q in enumerate(best))
    return {"loss_ce": nll / weights, "loss_bbox": l1 / max(total, 1), "loss_giou": giou / max(total, 1)}


@pytest.mark.parametrize("counts", [[2, 3], [0, 3], [0, 0], [1, 1]])
def test_every_term_of_every_layer_equals_a_float64_hand_computation(counts):
    logits, boxes = predictions()
    labels = random_labels(counts)
    loss, terms = set_loss(logits, boxes, labels)
    total = 0.0
    for layer, suffix in enumerate(("_0", "_1", "")):
        expected = loss_by_hand(logits[layer], boxes[layer], labels)
        for name, value in expected.items():
            assert terms[name + suffix].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name + suffix
        total += expected["loss_ce"] + 5 * expected["loss_bbox"] + 2 * expected["loss_giou"]
        found = (logits[layer].argmax(-1) != CLASSES).sum(1)
        error = sum(abs(int(f) - c) for f, c in zip(found, counts, strict=True)) / len(counts)
        assert terms["cardinality_error" + suffix].item() == pytest.approx(error)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_auxiliary_losses_of_the_model_equal_hand_computation_and_leave_logits_alone():
    model = tiny_model(num_queries=5, dropout=0.0)
    images, labels = torch.randn(2, 3, 64, 64), random_labels([2, 1])
    outputs = model(images, labels=labels)
    for layer, auxiliary in enumerate(outputs.auxiliary_outputs):
        expected = loss_by_hand(auxiliary["logits"], auxiliary["pred_boxes"], labels)
        for name, value in expected.items():
            assert outputs.loss_dict[f"{name}_{layer}"].item() == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert len(outputs.auxiliary_outputs) == 2
    model.config.auxiliary_loss = False
    without = model(images, labels=labels)
    assert torch.equal(outputs.logits, without.logits)
    assert torch.equal(outputs.logits, model(images).logits)
    assert without.auxiliary_outputs is None
    assert set(without.loss_dict) == {"loss_ce", "loss_bbox", "loss_giou", "cardinality_error"}


def test_more_objects_than_queries_leaves_the_dearest_objects_out():
    logits, boxes = predictions(layers=1, images=1, queries=3)
    labels = random_labels([5])
    image, query, target = hungarian_matching(logits, boxes, labels[0]["class_labels"], labels[0]["boxes"], [5])
    assert image.tolist() == [0, 0, 0]
    assert sorted(query[0].tolist()) == [0, 1, 2]
    assert len(set(target[0].tolist())) == 3
    loss, terms = set_loss(logits, boxes, labels)
    assert loss.isfinite()
    matched = [sum((boxes[0, 0, q] - labels[0]["boxes"][t]).abs()) for q, t in zip(query[0], target[0], strict=True)]
    assert terms["loss_bbox"].item() == pytest.approx(sum(matched).item() / 5, rel=1e-5)


def test_a_batch_without_objects_has_zero_box_losses_that_still_reach_every_parameter():
    model = tiny_model(frozen_stages=-1)
    outputs = model(torch.randn(2, 3, 64, 64), labels=random_labels([0, 0]))
    assert outputs.loss_dict["loss_bbox"] == 0
    assert outputs.loss_dict["loss_giou"] == 0
    outputs.loss.backward()
    # DistributedDataParallel waits for a gradient of each parameter on every process
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("tensor", "value"), [("logits", float("nan")), ("pred_boxes", float("inf"))])
def test_non_finite_predictions_are_named_before_matching(tensor, value):
    logits, boxes = predictions()
    {"logits": logits, "pred_boxes": boxes}[tensor][1, 1, 2, 0] = value
    for counts in ([2, 1], [0, 0]):
        with pytest.raises(FloatingPointError, match=rf"`{tensor}`.*layer 1, image 1 .*query 2"):
            set_loss(logits, boxes, random_labels(counts))


def test_minus_infinity_in_a_single_logit_is_found_although_its_softmax_is_finite():
    logits, boxes = predictions()
    logits[0, 0, 0, 3] = -float("inf")
    with pytest.raises(FloatingPointError, match="`logits` is infinite"):
        set_loss(logits, boxes, random_labels([1, 1]))


def test_half_precision_predictions_are_matched_and_scored_in_float32():
    logits, boxes = predictions(dtype=torch.bfloat16)
    labels = random_labels([2, 3])
    loss, _ = set_loss(logits, boxes, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(set_loss(logits.float(), boxes.float(), labels)[0].item(), rel=1e-6)


class _Transfers(TorchDispatchMode):
    """Counts what has to wait for the device: reads of single values, and copies to the host."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads.append(func)
        return func(*args, **(kwargs or {}))


def test_the_loss_of_all_layers_crosses_to_the_host_once(monkeypatch):
    logits, boxes = predictions(layers=6, images=4)
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor, *a: copies.append(tensor.shape) or cpu(tensor, *a))
    with _Transfers() as transfers:
        set_loss(logits, boxes, random_labels([2, 0, 5, 1]))
    assert len(copies) == 1
    assert transfers.reads == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"class_labels": torch.tensor([1, 5])},
            r"Image 1 of the batch \(image_id 101\), box 1: the class id is not in \[0, 5\)",
        ),
        ({"class_labels": torch.tensor([-1, 2])}, r"Image 1 .*box 0: the class id"),
        (
            {"boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1], [250.0, 200.0, 40.0, 30.0]])},
            r"box 1: the box is not within \[0, 1\]",
        ),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.0, 0.1], [0.5, 0.5, 0.1, 0.1]])}, r"box 0: the box has no area"),
        (
            {"boxes": torch.tensor([[0.5, float("nan"), 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]])},
            r"box 0: the box is not finite",
        ),
        ({"boxes": torch.rand(3, 4)}, r"`boxes` must be \(2, 4\)"),
        ({"class_labels": torch.tensor([1.0, 2.0])}, "must be a list of integers"),
    ],
)
def test_labels_are_refused_at_the_door_with_image_and_box(change, message):
    labels = random_labels([3, 2])
    labels[1] |= change
    model = tiny_model()
    model.model.forward = None  # nothing may be computed
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 3, 64, 64), labels=labels)


def test_the_number_of_labels_has_to_be_the_number_of_images():
    with pytest.raises(ValueError, match="2 images in the batch but 1 labels"):
        check_labels(random_labels([1]), 5, 2)


def test_the_loss_returns_the_matching_that_it_used():
    logits, boxes = predictions()
    labels = random_labels([2, 3])
    criterion = DetrLoss(tiny_config(num_queries=6))
    matching = criterion(logits, boxes, labels).matching
    objects = [torch.cat([label[name] for label in labels]) for name in ("class_labels", "boxes")]
    for ours, expected in zip(matching, hungarian_matching(logits, boxes, *objects, [2, 3]), strict=True):
        assert torch.equal(ours, expected)
    assert matching.query.shape == (3, 5)


def test_a_further_term_is_weighted_by_its_own_name_only():
    """A term whose name begins like another's is not weighted as that one."""
    logits, boxes = predictions()
    labels = random_labels([2, 3])
    criterion = DetrLoss(tiny_config(num_queries=6))
    plain = criterion(logits, boxes, labels)
    criterion.terms["loss_ce_smoothed"] = (lambda matched: matched.boxes.sum((1, 2)), 7.0)
    criterion.terms["loss_bbox_report"] = (lambda matched: matched.boxes.sum((1, 2)), None)
    more = criterion(logits, boxes, labels)
    added = sum(more.loss_dict[f"loss_ce_smoothed{suffix}"] for suffix in ("", "_0", "_1"))
    torch.testing.assert_close(more.loss, plain.loss + 7 * added)
