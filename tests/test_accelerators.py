"""What makes DETR learn faster: off it is the paper, on it does not touch predictions, and each does what it says."""

import math

import pytest
import torch
from conftest import padded_batch, random_labels, tiny_config, tiny_model
from torch import nn
from torchvision.ops import box_convert

from hf_detr import DetrForDetection
from hf_detr.interop import to_transformers
from hf_detr.model.attention import ConditionalAttention
from hf_detr.model.class_loss import ClassTargets, class_loss_of, sum_class_loss
from hf_detr.model.dense_supervision import DenseHead, assign_locations, location_centers
from hf_detr.model.loss import DetrLoss
from hf_detr.model.position_embedding import LOW_TEMPERATURE, box_waves, build_position_embedding
from hf_detr.model.pretrained import TRAINING_ONLY as PARTS_OF_TRAINING
from hf_detr.model.queries import BOX_NOISE, LABEL_NOISE, Denoising, group_mask

ALL_ON = {
    "query_type": "anchor",
    "denoising_groups": 2,
    "dense_loss_coefficient": 1,
    "class_loss": "iou_aware",
    "prior_probability": 0.02,
}
TRAINING_ONLY = {
    "denoising": {"denoising_groups": 2},
    "dense": {"dense_loss_coefficient": 1},
    "class_loss": {"class_loss": "focal", "class_loss_coefficient": 2},
    "all": {name: ALL_ON[name] for name in ("denoising_groups", "dense_loss_coefficient")},
}


def images(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def away_from_zero(model):
    """Every weight is moved, so that none hides a difference by being 0, as the last layer of the boxes is at first."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


# -- off, and on at prediction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", TRAINING_ONLY)
@pytest.mark.parametrize("query_type", ["learned", "anchor"])
def test_options_of_training_do_not_touch_predictions(option, query_type):
    if query_type == "learned" and "denoising_groups" in TRAINING_ONLY[option]:
        pytest.skip("denoising needs anchors")
    plain = away_from_zero(tiny_model(query_type=query_type))
    trained = tiny_model(query_type=query_type, **TRAINING_ONLY[option])
    missing, unexpected = trained.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(any(f"{part}." in name for part in PARTS_OF_TRAINING) for name in missing)
    ours, theirs = plain(images()), trained(images())
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.pred_boxes, theirs.pred_boxes)
    with_labels = trained(images(), labels=random_labels([2, 3]))
    assert torch.equal(with_labels.logits, theirs.logits)
    assert not any(part in name for name in with_labels.loss_dict for part in ("denoising", "dense"))


def test_in_training_the_queries_that_predict_do_not_see_the_others():
    plain = away_from_zero(tiny_model(query_type="anchor", dropout=0.0)).train()
    trained = tiny_model(dropout=0.0, **ALL_ON).train()
    trained.load_state_dict(plain.state_dict(), strict=False)
    ours, theirs = plain(images()), trained(images(), labels=random_labels([2, 3]))
    assert theirs.logits.shape == ours.logits.shape
    assert theirs.last_hidden_state.shape == ours.last_hidden_state.shape  # nothing that only the loss reads
    torch.testing.assert_close(theirs.logits, ours.logits, atol=2e-6, rtol=0)
    torch.testing.assert_close(theirs.pred_boxes, ours.pred_boxes, atol=2e-6, rtol=0)


def test_all_off_is_the_paper_s_model():
    names = set(tiny_model().state_dict())
    assert not any("dense" in name or "denoising" in name or "anchor" in name for name in names)
    config = tiny_config()
    assert (config.query_type, config.denoising_groups) == ("learned", 0)
    assert (config.dense_loss_coefficient, config.class_loss, config.prior_probability) == (0, "cross_entropy", None)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_everything_on_trains_every_weight(attention):
    model = tiny_model(**ALL_ON, freeze_batch_norm=False, frozen_stages=-1, attn_implementation=attention).train()
    away_from_zero(model)(images(), labels=random_labels([2, 3])).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_a_batch_without_objects_gives_a_finite_loss_and_every_gradient():
    """With several processes, every weight has to take part in every step."""
    model = tiny_model(**ALL_ON, freeze_batch_norm=False, frozen_stages=-1).train()
    output = model(images(), labels=random_labels([0, 0]))
    assert output.loss.isfinite()
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_everything_on_trains_in_bfloat16_and_with_checkpointing():
    labels, losses = random_labels([2, 3]), {}
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = away_from_zero(tiny_model(**ALL_ON, dropout=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        loss = model(images(), labels=labels).loss
        loss.backward()
        losses[checkpointing] = loss.item(), model.model.decoder.layers[0].encoder_attn.q_proj.weight.grad.clone()
    assert losses[False][0] == pytest.approx(losses[True][0])
    torch.testing.assert_close(losses[False][1], losses[True][1])
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(images(), labels=labels)
    assert narrow.pred_boxes.dtype == torch.float32
    assert narrow.loss.item() == pytest.approx(losses[True][0], rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_padded_anchors_run_with_every_attention(attention):
    pixel_values, pixel_mask = padded_batch([(64, 96), (96, 64)])
    model = away_from_zero(tiny_model(query_type="anchor", attn_implementation="eager"))
    expected = model(pixel_values, pixel_mask)
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):  # without the minutes that the kernels of flex_attention take
        torch.testing.assert_close(model(pixel_values, pixel_mask).logits, expected.logits, atol=1e-4, rtol=0)


def test_one_decoder_layer_has_no_idle_weights():
    model = tiny_model(**ALL_ON, decoder_layers=1).train()
    away_from_zero(model)(images(), labels=random_labels([2, 3])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_type": "box"}, "learned, anchor"),
        ({"class_loss": "hinge"}, "cross_entropy, focal, iou_aware"),
        ({"denoising_groups": 2}, 'needs `query_type` "anchor" or "dab"'),
        ({"dense_loss_coefficient": -1}, "at least 0"),
        ({"prior_probability": 1.0}, "between 0 and 1"),
        ({"query_type": "anchor", "position_embedding_type": "learned"}, "sine"),
        ({"query_type": "anchor", "d_model": 36}, "multiple of 8"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**change)


# -- anchors ----------------------------------------------------------------------------------------------------------


def test_an_anchor_s_sines_are_those_of_the_cell_it_lies_on():
    height, width, d = 3, 5, 32
    grid = build_position_embedding("sine", d, temperature=LOW_TEMPERATURE, centered=True)(
        height, width, None, torch.device("cpu")
    )[0]  # (hw, d)
    x, y = (2 + 0.5) / width, (1 + 0.5) / height
    waves = box_waves(torch.tensor([x, y, 0.3, 0.4]), d // 2, LOW_TEMPERATURE)
    assert waves.shape == (2 * d,)
    torch.testing.assert_close(waves[:d], grid[1 * width + 2], atol=1e-5, rtol=0)
    by_hand = [f(2 * math.pi * 0.3 / 20 ** (2 * i / (d // 2))) for i in range(d // 4) for f in (math.sin, math.cos)]
    torch.testing.assert_close(waves[d : d + d // 2], torch.tensor(by_hand), atol=1e-5, rtol=0)


def test_conditional_attention_is_content_with_content_and_place_with_place():
    attention = ConditionalAttention(8, 2, 0.0).double()
    query, place, key, key_place = (torch.randn(1, n, 8, dtype=torch.float64) for n in (3, 3, 5, 5))
    output, weights = attention(query, place, key, key_place, None, "eager")
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        score = attention.q_proj(query)[0, :, part] @ attention.k_proj(key)[0, :, part].T
        score += attention.q_position_proj(place)[0, :, part] @ attention.k_position_proj(key_place)[0, :, part].T
        torch.testing.assert_close(weights[0, head], (score / math.sqrt(8)).softmax(-1))
    values = torch.cat([weights[0, h] @ attention.v_proj(key)[0, :, 4 * h : 4 * h + 4] for h in range(2)], dim=1)
    torch.testing.assert_close(output[0], attention.o_proj(values))


def test_boxes_start_as_the_anchors_and_each_layer_moves_those_of_the_one_before():
    model = tiny_model(query_type="anchor")
    anchors = model.model.query_position_embeddings.weight.sigmoid()
    centers = anchors[:, :2]
    assert (centers[:, None] - centers).norm(dim=-1).fill_diagonal_(1).min() > 0.1  # spread over the image
    output = model.train()(images(), labels=random_labels([2, 2]))
    for layer in (*output.auxiliary_outputs, output):
        torch.testing.assert_close(layer["pred_boxes"][0], anchors.detach(), atol=1e-4, rtol=0)
    away_from_zero(model)
    states = model.eval().model(images())
    boxes, hidden = states.intermediate_boxes, states.intermediate_hidden_states
    before = model.model.query_position_embeddings.weight.sigmoid().expand_as(boxes[0])
    for layer in range(len(boxes)):
        offset = hidden[layer]
        for number, linear in enumerate(model.model.decoder.bbox_predictor.layers):
            offset = linear(offset if number == 0 else offset.relu())
        torch.testing.assert_close(boxes[layer], (offset + (before / (1 - before)).log()).sigmoid(), atol=1e-5, rtol=0)
        before = boxes[layer]


def test_attention_narrows_with_the_box():
    """DAB-DETR, equation 6: the sines of x are scaled by wanted width over width, those of y by the heights."""
    model = away_from_zero(tiny_model(query_type="anchor"))
    decoder = model.model.decoder
    content, anchors = torch.randn(1, 2, 32), torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.3, 0.7, 0.5, 0.1]]])
    waves = box_waves(anchors, 16, LOW_TEMPERATURE)
    wanted = decoder.reference_size(content).sigmoid()
    place = decoder.center_positions(waves, anchors, content, True)
    torch.testing.assert_close(place[..., :16], waves[..., :16] * (wanted[..., 1:] / anchors[..., 3:]))
    torch.testing.assert_close(place[..., 16:], waves[..., 16:32] * (wanted[..., :1] / anchors[..., 2:3]))


def test_attention_without_modulation_is_the_place_itself():
    model = tiny_model(query_type="anchor", modulate_attention=False)
    assert model.model.decoder.reference_size is None
    anchors = torch.rand(1, 2, 4)
    waves = box_waves(anchors, 16, LOW_TEMPERATURE)
    assert torch.equal(
        model.model.decoder.center_positions(waves, anchors, torch.randn(1, 2, 32), True), waves[..., :32]
    )
    away_from_zero(model).train()(images(), labels=random_labels([1, 2])).loss.backward()


def test_padding_changes_nothing_for_anchors():
    model = away_from_zero(tiny_model(**ALL_ON))
    sizes = [(64, 96), (96, 64), (50, 70)]
    pixel_values, pixel_mask = padded_batch(sizes)
    together = model(pixel_values, pixel_mask)
    for index, (height, width) in enumerate(sizes):
        alone = model(pixel_values[index : index + 1, :, :height, :width])
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.pred_boxes[index], alone.pred_boxes[0], atol=1e-5, rtol=0)


def test_no_two_anchors_are_alike():
    anchors = tiny_model(query_type="anchor", num_queries=36).model.query_position_embeddings.weight
    assert torch.cdist(anchors, anchors).fill_diagonal_(1).min() > 0.05


# -- denoising --------------------------------------------------------------------------------------------------------


def test_spoilt_objects_stay_near_their_object():
    labels = random_labels([3, 0, 200], num_labels=50)
    denoising = Denoising(50, 50, 4)
    denoising.class_embedding.weight.data = torch.eye(50)
    queries = denoising(labels)
    assert queries.boxes.shape == (3, 800, 4)
    assert queries.valid.sum(1).tolist() == [12, 0, 800]
    spoilt, true = queries.boxes[2], labels[2]["boxes"].repeat(4, 1)
    corners = box_convert(spoilt, "cxcywh", "xyxy")
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6
    inside = (corners > 1e-6).all(1) & (corners < 1 - 1e-6).all(1)  # not cut off
    shift = ((spoilt - true)[:, :2].abs() / true[:, 2:])[inside]
    growth = (spoilt[:, 2:] / true[:, 2:])[inside]
    assert 0.45 * BOX_NOISE < shift.max() <= BOX_NOISE / 2 + 1e-5
    assert 1 - BOX_NOISE - 1e-5 <= growth.min() < growth.max() <= 1 + BOX_NOISE + 1e-5
    flipped = (queries.content[2].argmax(-1) != labels[2]["class_labels"].repeat(4)).float().mean().item()
    assert flipped == pytest.approx(LABEL_NOISE * 49 / 50, abs=0.05)


def test_copies_see_only_themselves():
    labels = random_labels([2, 1])
    queries = Denoising(5, 8, 2)(labels)
    mask = group_mask(queries.group, queries.valid)
    assert mask.shape == (2, 1, 4, 4)
    both = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == both
    # the second image has one object: the filling is seen by itself only
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_what_fills_up_the_copies_changes_nothing():
    """The same image in a batch with one of many objects: its denoising queries predict the same."""
    model = away_from_zero(tiny_model(**ALL_ON, dropout=0.0)).train()
    content = torch.randn(4, 32)
    few, many = random_labels([2, 2]), random_labels([2, 6])
    many[0] = few[0]
    predicted = []
    for labels in (few, many):
        extra = model.denoising(labels)
        per_copy = extra.boxes.unflatten(1, (2, -1)), extra.content.unflatten(1, (2, -1))
        with torch.no_grad():  # the same two noised objects in both
            per_copy[0][0, :, :2] = few[0]["boxes"] + 0.01
            per_copy[1][0, :, :2] = content.unflatten(0, (2, 2))
        states = model.model(images(), queries=model.model.build_queries(2, torch.device("cpu"), extra))
        per_copy = states.intermediate_boxes[-1, 0, 36:].unflatten(0, (2, -1))
        predicted.append(per_copy[:, :2])
    torch.testing.assert_close(*predicted, atol=1e-5, rtol=0)


def test_the_denoising_loss_by_hand():
    labels = random_labels([2, 1])
    logits, boxes = torch.randn(1, 2, 6, 6), torch.rand(1, 2, 6, 4) * 0.4 + 0.3
    extra = Denoising(5, 8, 2)(labels)
    said, found = torch.randn(1, 2, 4, 6), torch.rand(1, 2, 4, 4) * 0.4 + 0.3
    criterion = DetrLoss(tiny_config(num_queries=6))
    result = criterion(torch.cat((logits, said), dim=2), torch.cat((boxes, found), dim=2), labels, extra)
    loss, terms = result.loss, result.loss_dict
    without = criterion(logits, boxes, labels).loss
    ce, l1, gi, count = 0.0, 0.0, 0.0, 0
    for image, label in enumerate(labels):
        for copy in range(2):
            for index, (name, box) in enumerate(zip(label["class_labels"], label["boxes"], strict=True)):
                query = copy * 2 + index
                ce -= said[0, image, query].double().log_softmax(-1)[name].item()
                l1 += (found[0, image, query] - box).abs().sum().item()
                a, b = (box_convert(x, "cxcywh", "xyxy") for x in (found[0, image, query], box))
                hull = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod().item()
                shared = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod().item()
                union = (a[2:] - a[:2]).prod().item() + (b[2:] - b[:2]).prod().item() - shared
                gi += 1 - (shared / union - (hull - union) / hull)
                count += 1
    assert terms["loss_ce_denoising"].item() == pytest.approx(ce / count, rel=1e-5)
    assert terms["loss_bbox_denoising"].item() == pytest.approx(l1 / count, rel=1e-5)
    assert terms["loss_giou_denoising"].item() == pytest.approx(gi / count, rel=1e-5)
    assert (loss - without).item() == pytest.approx((ce + 5 * l1 + 2 * gi) / count, rel=1e-4)


# -- class losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_entropy", "focal", "iou_aware"])
def test_class_losses_by_hand(kind):
    logits = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    targets = torch.tensor([[0, 3, 2, 3], [3, 1, 3, 3]]).expand(2, -1, -1)
    quality = torch.rand(2, 2, 4, dtype=torch.float64)
    normalizer = torch.tensor(3 + 5 * 0.1 if kind == "cross_entropy" else 3.0, dtype=torch.float64)
    result = sum_class_loss(
        class_loss_of(kind), ClassTargets(logits, logits.shape[-1] - 1, targets, quality), normalizer, 0.1
    )
    for layer in range(2):
        total, weights = 0.0, 0.0
        for image in range(2):
            for query in range(4):
                odds = [math.exp(value) for value in logits[layer, image, query].tolist()]
                p = [value / sum(odds) for value in odds]
                c, q = targets[layer, image, query].item(), quality[layer, image, query].item()
                if kind == "cross_entropy":
                    weight = 0.1 if c == 3 else 1.0
                    total, weights = total - weight * math.log(p[c]), weights + weight
                elif kind == "focal":
                    total += (0.75 if c == 3 else 0.25) * (1 - p[c]) ** 2 * -math.log(p[c])
                elif c == 3:
                    total += (1 - p[3]) ** 1.5 * -math.log(p[3])
                else:
                    total += -(q**1.5) * math.log(p[c]) - (1 - q**1.5) * math.log(p[3])
        expected = total / (weights if kind == "cross_entropy" else 3)
        assert result[layer].item() == pytest.approx(expected, rel=1e-8)  # 0.1 is a float32


def test_the_focal_matching_cost_by_hand():
    p = 0.3
    expected = 0.25 * 0.7**2 * -math.log(0.3) - 0.75 * 0.3**2 * -math.log(0.7)
    assert class_loss_of("focal").cost(torch.tensor([p])).item() == pytest.approx(expected, rel=1e-5)
    assert class_loss_of("iou_aware").cost(torch.tensor([p])).item() == pytest.approx(-p)


def test_iou_aware_scores_are_best_at_the_quality_of_the_box():
    """The least loss of a matched query is where its class has the probability IoU^1.5."""
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logits = torch.stack((p.log(), (1 - p).log()), dim=-1)[None, :, None]
    matched = torch.zeros(1, 1, 1, dtype=torch.long)
    losses = [
        class_loss_of("iou_aware")
        .loss(ClassTargets(logits[:, i : i + 1], logits.shape[-1] - 1, matched, matched + 0.7), 0.1)
        .item()
        for i in range(99)
    ]
    assert p[losses.index(min(losses))].item() == pytest.approx(0.7**1.5, abs=0.006)


@pytest.mark.parametrize("classes", [1, 5])
def test_the_prior_is_what_a_new_model_says(classes):
    model = tiny_model(num_labels=classes, prior_probability=0.03)
    with torch.no_grad():
        model.class_labels_classifier.weight.zero_()
    said = model(images()).logits.softmax(-1)[..., :-1].sum(-1)
    torch.testing.assert_close(said, torch.full_like(said, 0.03), atol=1e-5, rtol=0)


# -- dense supervision ------------------------------------------------------------------------------------------------


def test_cells_lie_where_the_image_is():
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, :, :] = True
    mask[1, :2, :3] = True
    centers = location_centers(mask).unflatten(1, (3, 4))
    assert centers[0, 1, 2].tolist() == pytest.approx([2.5 / 4, 1.5 / 3])
    assert centers[1, 1, 2].tolist() == pytest.approx([2.5 / 3, 1.5 / 2])
    assert (centers[1, 2] == -1).all()
    assert (centers[1, :, 3] == -1).all()


def test_cells_are_assigned_as_by_hand():
    mask = torch.ones(3, 6, 5, dtype=torch.bool)
    mask[1, 4:] = False
    labels = random_labels([4, 3, 0], seed=3)
    labels[0]["boxes"][1] = torch.tensor([0.42, 0.37, 0.01, 0.01])  # smaller than a cell
    centers = location_centers(mask)
    valid = mask.flatten(1)
    classes, boxes, weights = assign_locations(centers, valid, labels, 5)
    for image, label in enumerate(labels):
        objects = list(zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True))
        nearest, chosen = [], []
        for _, (x, y, _, _) in objects:
            distance = ((centers[image] - torch.tensor([x, y])) ** 2).sum(1)
            nearest.append(distance.masked_fill(~valid[image], 9).argmin().item())
        for cell in range(30):
            cx, cy = centers[image, cell].tolist()
            owners = [
                (w * h, name, (x, y, w, h), index)
                for index, (name, (x, y, w, h)) in enumerate(objects)
                if valid[image, cell]
                and ((abs(cx - x) <= 0.35 * w and abs(cy - y) <= 0.35 * h) or nearest[index] == cell)
            ]
            _, name, box, owner = min(owners) if owners else (0, 5, (0, 0, 0, 0), None)
            assert classes[image, cell].item() == name
            assert boxes[image, cell].tolist() == pytest.approx(box)
            chosen.append(owner)
        for cell, owner in enumerate(chosen):
            expected = 0 if owner is None else 1 / chosen.count(owner)
            assert weights[image, cell].item() == pytest.approx(expected)


def test_the_dense_loss_by_hand_and_without_regard_to_padding():
    head = DenseHead(16, 5).double()
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[1, :, 2:] = False
    labels = random_labels([2, 1, 0])
    centers = location_centers(mask)
    features = [torch.randn(3, 16, 16, dtype=torch.float64) for _ in range(2)]
    terms = head(features, mask, labels, torch.tensor(3.0))
    classes, boxes, _ = assign_locations(centers, mask.flatten(1), labels, 5)
    ce, l1 = 0.0, 0.0
    for memory in features:
        for image, objects in enumerate((2, 1, 0)):
            without = 0.5 * max(objects, 1) / max((classes[image] < 5).sum().item(), 1)  # all objects have locations
            of_object = boxes[image].tolist()  # no two objects have the same box
            for location in range(16):
                if not mask.flatten(1)[image, location]:
                    continue
                logits = head.class_labels_classifier(memory[image, location]).float()
                p = logits.softmax(-1)[classes[image, location]].item()
                assigned = classes[image, location] < 5
                weight = (1 / of_object.count(of_object[location]) if assigned else without) / 3
                ce += weight * (1 - p) * -math.log(p)
                if assigned:
                    anchor = torch.tensor([*centers[image, location].tolist(), 0.25, 0.25], dtype=torch.float64)
                    box = head.bbox_predictor(memory[image, location], anchor).float()
                    l1 += weight * (box - boxes[image, location]).abs().sum().item()
    assert terms["loss_ce"].item() == pytest.approx(ce, rel=1e-4)
    assert terms["loss_bbox"].item() == pytest.approx(l1, rel=1e-4)
    changed = [memory.clone() for memory in features]
    for memory in changed:
        memory[1].unflatten(0, (4, 4))[:, 2:] = 7.0  # the padding
    again = head(changed, mask, labels, torch.tensor(3.0))
    assert all(torch.equal(again[name], terms[name]) for name in terms)


def test_of_two_objects_with_the_same_box_one_has_the_locations():
    label = {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]] * 2)}
    valid = torch.ones(1, 16, dtype=torch.bool)
    centers = location_centers(torch.ones(1, 4, 4, dtype=torch.bool))
    classes, _, weights = assign_locations(centers, valid, [label], 5)
    assert (classes < 5).sum() == 4  # of the middle
    assert weights.sum().item() == pytest.approx(1)
    head, mask = DenseHead(16, 5), torch.ones(1, 4, 4, dtype=torch.bool)
    features = [torch.zeros(1, 16, 16)]
    twice = head(features, mask, [label], torch.tensor(1.0))
    once = head(features, mask, [{name: values[:1] for name, values in label.items()}], torch.tensor(1.0))
    assert twice["loss_bbox"] == once["loss_bbox"]


def test_the_dense_loss_of_a_step_does_not_depend_on_how_it_is_cut_into_batches():
    """Normalizers are known before the forward pass: accumulated batches add up to the loss of all images at once."""
    head = DenseHead(16, 5)
    labels = random_labels([2, 1, 0, 5])
    mask, features = torch.ones(4, 3, 3, dtype=torch.bool), [torch.randn(4, 9, 16)]
    together = head(features, mask, labels, torch.tensor(8.0))
    apart = [head([features[0][i : i + 1]], mask[i : i + 1], labels[i : i + 1], torch.tensor(8.0)) for i in range(4)]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(terms[name] for terms in apart))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_with_everything_on_come_back(tmp_path):
    model = away_from_zero(tiny_model(**ALL_ON))
    model.save_pretrained(tmp_path)
    loaded, info = DetrForDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(images()).pred_boxes, model(images()).pred_boxes)
    off = {"denoising_groups": 0, "dense_loss_coefficient": 0}
    bare, info = DetrForDetection.from_pretrained(tmp_path, output_loading_info=True, **off)
    assert not any(info.values())
    assert torch.equal(bare(images()).pred_boxes, model(images()).pred_boxes)


def test_a_plain_checkpoint_is_trained_on_with_options(tmp_path):
    model = away_from_zero(tiny_model())
    model.save_pretrained(tmp_path)
    options = {"dense_loss_coefficient": 1}
    loaded, info = DetrForDetection.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert info["missing_keys"]
    assert all("dense_head" in name for name in info["missing_keys"])
    assert all(parameter.isfinite().all() for parameter in loaded.dense_head.parameters())
    assert torch.equal(loaded(images()).pred_boxes, model(images()).pred_boxes)


def test_classes_and_queries_are_fitted_in_every_part(tmp_path):
    model = away_from_zero(tiny_model(**ALL_ON, id2label={0: "a", 1: "b", 2: "c"}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.resize_class_head({0: "c", 1: "new", 2: "a", 3: "x"})
    model.resize_queries(14)
    after = model.state_dict()
    for head in ("class_labels_classifier", "dense_head.class_labels_classifier"):
        assert torch.equal(after[f"{head}.weight"][[0, 2, 4]], before[f"{head}.weight"][[2, 0, 3]])
    assert torch.equal(
        after["denoising.class_embedding.weight"][[0, 2]], before["denoising.class_embedding.weight"][[2, 0]]
    )
    queries, old = (state["model.query_position_embeddings.weight"] for state in (after, before))
    assert queries.shape == (14, 4)
    assert torch.equal(queries[:12], old)
    output = model.train()(images(), labels=random_labels([2, 3], num_labels=4))
    assert output.logits.shape == (2, 14, 5)
    assert output.loss.isfinite()


def test_writing_for_transformers_leaves_out_what_only_trains_and_refuses_anchors():
    model = away_from_zero(tiny_model(dense_loss_coefficient=1))
    theirs = to_transformers(model)
    torch.testing.assert_close(theirs(images()).logits, model(images()).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="only models with learned queries"):
        to_transformers(tiny_model(query_type="anchor"))


def test_the_box_head_of_anchors_starts_at_zero_and_linear_layers_do_not():
    model = tiny_model(query_type="anchor")
    assert not model.model.decoder.bbox_predictor.layers[-1].weight.any()
    for module in model.model.decoder.modules():
        if isinstance(module, nn.Linear) and module is not model.model.decoder.bbox_predictor.layers[-1]:
            assert module.weight.std() > 0.01
