"""The losses of masks against float64 by hand, whatever the padding, the batch and the number of processes."""

import math

import pytest
import torch
from conftest import padded_batch, random_labels, randomise_norms, tiny_segmentation

from hf_detr.model.loss import LossNormalizers
from hf_detr.model.mask_loss import MaskPairs, dice_loss, focal_mask_loss

SIZES = [(64, 96), (48, 70), (61, 40)]


def labels_with_masks(counts, sizes=SIZES, seed=0):
    labels = random_labels(counts, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for label, count, size in zip(labels, counts, sizes, strict=True):
        label["masks"] = torch.rand(count, *size, generator=generator) > 0.6
    return labels


def model_for_masks(**changes):
    model = tiny_segmentation(**changes)
    randomise_norms(model)
    return model


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def by_hand(logits, target):
    """The focal and the dice loss of one mask, in Python's floats."""
    focal, overlap, predicted, area, count = 0.0, 0.0, 0.0, 0.0, 0
    for x, t in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = sigmoid(x)
        p_t, alpha = (p, 0.25) if t else (1 - p, 0.75)
        focal -= alpha * (1 - p_t) ** 2 * math.log(max(p_t, 1e-300))
        overlap, predicted, area, count = overlap + p * t, predicted + p, area + t, count + 1
    return focal / count, 1 - (2 * overlap + 1) / (predicted + area + 1)


def bilinear_by_hand(mask, size):
    """(h, w) to `size`, float64: the value at a pixel's center, edges repeated."""
    (h, w), (height, width) = mask.shape, size
    result = torch.zeros(height, width, dtype=torch.float64)
    values = mask.double().tolist()
    for y in range(height):
        for x in range(width):
            v, u = max((y + 0.5) * h / height - 0.5, 0), max((x + 0.5) * w / width - 0.5, 0)
            i, j = int(v), int(u)
            k, m, a, b = min(i + 1, h - 1), min(j + 1, w - 1), v - int(v), u - int(u)
            upper = values[i][j] * (1 - b) + values[i][m] * b
            lower = values[k][j] * (1 - b) + values[k][m] * b
            result[y, x] = upper * (1 - a) + lower * a
    return result


def test_both_losses_equal_float64_by_hand():
    logits = [torch.randn(2, 9, 7) * 4, torch.randn(1, 5, 12) * 4]
    targets = [torch.rand(2, 9, 7) > 0.5, torch.zeros(1, 5, 12, dtype=torch.bool)]
    focal, dice = (loss(MaskPairs(logits, targets)) for loss in (focal_mask_loss, dice_loss))
    pairs = [pair for image in zip(logits, targets, strict=True) for pair in zip(*image, strict=True)]
    for index, pair in enumerate(pairs):
        expected = by_hand(*pair)
        assert focal[index].item() == pytest.approx(expected[0], rel=1e-5)
        assert dice[index].item() == pytest.approx(expected[1], rel=1e-5)


def test_extreme_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([[[200.0, -200.0], [-200.0, 200.0]]], requires_grad=True)
    pairs = MaskPairs([logits], [torch.tensor([[[True, True], [False, False]]])])
    loss = focal_mask_loss(pairs).sum() + dice_loss(pairs).sum()
    loss.backward()
    # a wrong pixel costs its logit: half of them wrong, alphas 0.25 and 0.75
    assert focal_mask_loss(pairs).item() == pytest.approx((0.25 * 200 + 0.75 * 200) / 4)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("counts", [[2, 0, 1], [1, 2, 1]])
def test_the_model_s_terms_equal_float64_by_hand_on_the_masks_it_predicts(counts):
    model = model_for_masks()
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks(counts)
    with torch.no_grad():
        outputs = model(images, mask, labels)
        result = model.criterion(outputs.logits[None], outputs.pred_boxes[None], labels)
    image, query, target = result.matching
    matched = list(zip(image.tolist(), query[0].tolist(), target[0].tolist(), strict=True))
    assert len(matched) == sum(counts)
    owners = [(index, number) for index, count in enumerate(counts) for number in range(count)]
    focal = dice = 0.0
    for index, query_index, position in matched:
        owner, number = owners[position]
        assert owner == index
        rows, columns = outputs.mask_sizes[index].tolist()
        predicted = bilinear_by_hand(outputs.pred_masks[index, query_index, :rows, :columns], SIZES[index])
        terms = by_hand(predicted, labels[index]["masks"][number])
        focal, dice = focal + terms[0], dice + terms[1]
    assert outputs.loss_dict["loss_mask"].item() == pytest.approx(focal / sum(counts), rel=1e-4)
    assert outputs.loss_dict["loss_dice"].item() == pytest.approx(dice / sum(counts), rel=1e-4)


def test_the_weights_of_the_config_are_those_of_the_sum():
    model = model_for_masks(dropout=0.0)
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks([2, 1, 3])
    with torch.no_grad():
        both = model(images, mask, labels)
        model.config.mask_loss_coefficient, model.config.dice_loss_coefficient = 7, 0.5
        weighted = model(images, mask, labels)
        model.config.mask_loss_coefficient = model.config.dice_loss_coefficient = 0
        without = model(images, mask, labels)
    focal, dice = both.loss_dict["loss_mask"], both.loss_dict["loss_dice"]
    torch.testing.assert_close(both.loss - without.loss, focal + dice)
    torch.testing.assert_close(weighted.loss - without.loss, 7 * focal + 0.5 * dice)
    assert "loss_mask_0" not in both.loss_dict, "masks are of the last layer only"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_padded_batch_has_the_mask_loss_of_its_images_alone(mode):
    model = model_for_masks(dropout=0.0)
    getattr(model, mode)()
    counts = [2, 3, 1]
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks(counts)
    normalizers = LossNormalizers.from_counts(model.count_for_loss(labels), 1)
    batch = model(images, mask, labels)
    alone = [
        model(images[index : index + 1, :, :h, :w], labels=labels[index : index + 1], normalizers=normalizers)
        for index, (h, w) in enumerate(SIZES)
    ]
    for name in ("loss_mask", "loss_dice"):
        total = sum(output.loss_dict[name] for output in alone)
        assert batch.loss_dict[name].item() == pytest.approx(total.item(), abs=1e-5)


def test_training_computes_masks_of_matched_queries_only_and_the_loss_of_evaluation():
    model = model_for_masks(dropout=0.0)
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks([2, 0, 3])
    queries = []
    model.mask_head.register_forward_pre_hook(lambda head, args: queries.append(args[1].shape[1]))
    evaluated = model(images, mask, labels)
    queries.clear()
    trained = model.train()(images, mask, labels)
    assert queries == [2, 0, 3]
    assert trained.pred_masks is None
    torch.testing.assert_close(trained.loss, evaluated.loss)


@pytest.mark.parametrize(
    ("counts", "calls"),
    [
        ([2, 3, 0, 4], [(3, 4), (1, 3)]),
        ([1, 3, 0, 8], [(1, 1), (1, 0), (1, 8), (1, 3)]),  # 3 times 8 are more than twice 1 + 0 + 8
    ],
    ids=["together", "too much padding"],
)
def test_images_of_one_size_go_through_the_head_together_with_the_loss_of_each_alone(counts, calls):
    model = model_for_masks(dropout=0.0).train()
    sizes = [(64, 96), (48, 70), (64, 96), (64, 96)]
    images, mask = padded_batch(sizes)
    labels = labels_with_masks(counts, sizes)
    normalizers = LossNormalizers.from_counts(model.count_for_loss(labels), 1)
    alone = [
        model(images[i : i + 1, :, :h, :w], labels=labels[i : i + 1], normalizers=normalizers).loss_dict
        for i, (h, w) in enumerate(sizes)
    ]
    shapes = []
    model.mask_head.register_forward_pre_hook(lambda head, args: shapes.append(tuple(args[1].shape[:2])))
    together = model(images, mask, labels, normalizers=normalizers).loss_dict
    assert shapes == calls
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(together[name], sum(terms[name] for terms in alone))


def test_a_batch_without_objects_reaches_every_parameter_of_the_mask_head():
    model = model_for_masks(frozen_stages=-1).train()
    images, mask = padded_batch(SIZES)
    outputs = model(images, mask, labels_with_masks([0, 0, 0]))
    assert outputs.loss_dict["loss_mask"] == outputs.loss_dict["loss_dice"] == 0
    outputs.loss.backward()
    # DistributedDataParallel waits for a gradient of each parameter on every process
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_denoising_leaves_masks_to_the_queries_that_predict():
    model = model_for_masks(query_type="anchor", denoising_groups=2, dropout=0.0).train()
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks([2, 1, 3])
    outputs = model(images, mask, labels)
    outputs.loss.backward()
    assert model.mask_head.output_conv.weight.grad.abs().sum() > 0
    single = model_for_masks(query_type="anchor", dropout=0.0).train()
    single.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(outputs.loss_dict["loss_mask"], single(images, mask, labels).loss_dict["loss_mask"])


def test_more_objects_than_queries_are_no_problem():
    model = model_for_masks(num_queries=2).train()
    images, mask = padded_batch(SIZES)
    outputs = model(images, mask, labels_with_masks([5, 1, 0]))
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, r"Image 1 .*lacks \['masks'\].*return_segmentation_masks=True"),
        (torch.zeros(3, 48, 70, dtype=torch.bool), r"Image 1 .*`masks` must be \(2, height, width\)"),
        (torch.zeros(2, 64, 96, dtype=torch.bool), r"Image 1 .*64 x 96 pixels.*48 x 70 without its padding"),
        (torch.full((2, 48, 70), 2), "must be bool, or 0 and 1"),
        (torch.full((2, 48, 70), 0.5), "must be bool, or 0 and 1"),
        (torch.zeros(48, 70), r"`masks` must be \(2, height, width\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_is_computed(masks, message):
    labels = labels_with_masks([1, 2, 0])
    if masks is None:
        del labels[1]["masks"]
    else:
        labels[1]["masks"] = masks
    model = tiny_segmentation()
    model.model.forward = None
    images, mask = padded_batch(SIZES)
    with pytest.raises(ValueError, match=message):
        model(images, mask, labels)


def test_masks_of_0_and_1_and_lists_are_masks():
    model = model_for_masks()
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks([1, 2, 0])
    expected = model(images, mask, labels).loss
    for change in (lambda m: m.to(torch.uint8), lambda m: m.float(), lambda m: m.numpy(), lambda m: m.tolist()):
        changed = [label | {"masks": change(label["masks"])} for label in labels]
        torch.testing.assert_close(model(images, mask, changed).loss, expected)
