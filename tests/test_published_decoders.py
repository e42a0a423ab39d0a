"""Conditional DETR and DAB-DETR as published: losses, gradients and states of transformers' own models, independent
scores through everything that reads them, and what transformers' models get wrong. Outputs of every layout of their
checkpoints: see test_interop."""

import copy
import json
import math

import pytest
import torch
import transformers
from checkpoints import save_original, save_v5, their_model
from conftest import padded_batch, random_labels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation, DetrImageProcessor
from hf_detr.export import export_model, load_exported
from hf_detr.interop import load_original, save_for_transformers, to_transformers
from hf_detr.interop.transformers_export import _their_kind
from hf_detr.model.class_loss import ClassTargets, class_loss_of, sum_class_loss
from hf_detr.model.post_processing import best_detections
from hf_detr.speed import prepare_for_inference

SIZES = [(64, 96), (48, 70), (64, 40)]
KINDS = ("conditional", "dab")
SIGMOID = {"class_activation": "sigmoid", "class_loss": "focal"}
TOLERANCE = 1e-5


def pair(kind, tmp_path, **fields):
    """transformers' model with large random weights, and ours from its checkpoint."""
    torch.manual_seed(0)
    theirs = their_model(kind=kind, dropout=0.0, **fields)
    save_v5(theirs, tmp_path / kind)
    return theirs, DetrForDetection.from_pretrained(tmp_path / kind)


def published(kind, **changes):
    return tiny_model(query_type=kind, **(SIGMOID | changes))


# -- equal to transformers' --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fields"), [("conditional", {}), ("dab", {}), ("dab", {"num_patterns": 2})])
def test_states_losses_and_gradients_equal_those_of_transformers(kind, fields, tmp_path):
    """Of the last layer: theirs changes its predictions with auxiliary losses, see below. Its `cls_loss_coefficient`
    has no effect, so ours is 1."""
    theirs, ours = pair(kind, tmp_path, **fields)
    if kind == "conditional":  # DAB-DETR has no other
        theirs.set_attn_implementation("eager")
    ours.config.auxiliary_loss, ours.config.class_loss_coefficient = False, 1
    image, labels = torch.randn(2, 3, 64, 96), random_labels([3, 0])
    a = ours(image, labels=labels, output_hidden_states=True, output_attentions=True)
    b = theirs(pixel_values=image, labels=labels, output_hidden_states=True, output_attentions=True)
    for name in ("encoder_last_hidden_state", "last_hidden_state"):
        torch.testing.assert_close(a[name], b[name], atol=TOLERANCE, rtol=TOLERANCE)
    for name in ("cross_attentions", "decoder_attentions", "encoder_attentions"):
        for mine, other in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=TOLERANCE)
    for name, value in b.loss_dict.items():
        assert a.loss_dict[name].item() == pytest.approx(value.item(), rel=1e-4, abs=TOLERANCE), name
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-4)
    a.loss.backward()
    b.loss.backward()
    converted = to_transformers_names(ours, theirs)
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and "backbone" not in name:  # whose first stage trains in theirs only
            torch.testing.assert_close(converted[name], parameter.grad, atol=2e-5 * largest.item(), rtol=1e-3)
            compared += 1
    assert compared > 100


def to_transformers_names(ours, theirs):
    """Our gradients under their names, through the conversion of weights."""
    holder = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter, of_ours in zip(holder.parameters(), ours.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(parameter) if of_ours.grad is None else of_ours.grad)
    return _their_kind(ours).rename(holder)


def test_auxiliary_losses_of_dab_equal_those_of_transformers(tmp_path):
    theirs, ours = pair("dab", tmp_path, auxiliary_loss=True)
    ours.config.class_loss_coefficient = 1
    image, labels = torch.randn(2, 3, 64, 96), random_labels([3, 1])
    a, b = ours(image, labels=labels), theirs(pixel_values=image, labels=labels)
    assert a.loss_dict.keys() == b.loss_dict.keys()
    assert len(a.loss_dict) == 12
    for name, value in b.loss_dict.items():
        assert a.loss_dict[name].item() == pytest.approx(value.item(), rel=1e-4, abs=TOLERANCE), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_transformers_processor(kind, tmp_path):
    theirs, ours = pair(kind, tmp_path)
    image = torch.randn(2, 3, 64, 96)
    sizes = [(640, 960), (100, 150)]
    other = transformers.ConditionalDetrImageProcessor()
    for threshold, top_k in ((0.0, 100), (0.5, 100), (0.3, 7)):
        expected = other.post_process_object_detection(
            theirs(image), threshold=threshold, target_sizes=torch.tensor(sizes), top_k=top_k
        )
        found = DetrImageProcessor().post_process_object_detection(ours(image), threshold, sizes, top_k)
        for mine, of_theirs, (height, width) in zip(found, expected, sizes, strict=True):
            assert len(mine["scores"]) == len(of_theirs["scores"])
            torch.testing.assert_close(mine["scores"], of_theirs["scores"], atol=1e-5, rtol=0)
            assert torch.equal(mine["labels"], of_theirs["labels"])
            inside = of_theirs["boxes"].clamp(min=0)
            inside[:, 0::2].clamp_(max=width)
            inside[:, 1::2].clamp_(max=height)
            torch.testing.assert_close(mine["boxes"], inside, atol=1e-2, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_written_for_transformers_gives_the_same_outputs_there_and_back(kind, tmp_path):
    _, ours = pair(kind, tmp_path, num_patterns=2) if kind == "dab" else pair(kind, tmp_path)
    save_for_transformers(ours, DetrImageProcessor(), tmp_path / "out")
    classes = transformers.ConditionalDetrForObjectDetection, transformers.DabDetrForObjectDetection
    there, info = classes[KINDS.index(kind)].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    image = torch.randn(1, 3, 64, 96)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(there(image)[name], ours(image)[name], atol=TOLERANCE, rtol=TOLERANCE)
    back = DetrForDetection.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    stored = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"].startswith("ConditionalDetrImageProcessor"), "whose scores are independent"


def test_what_transformers_does_not_have_is_refused():
    for changes, reason in (
        ({"query_type": "anchor"}, "no model with"),
        ({"query_type": "conditional"}, "scores of a sigmoid, not of a softmax"),
        ({"class_activation": "sigmoid", "class_loss": "focal"}, "scores of a softmax, not of a sigmoid"),
        ({"query_type": "dab", "relative_boxes": True} | SIGMOID, "requires `relative_boxes=False`"),
        ({"query_type": "dab", "pre_norm": True} | SIGMOID, "pre-norm in its Table Transformer only"),
        ({"query_type": "conditional", "position_temperature": 20} | SIGMOID, "10000 only"),
        ({"query_type": "dab", "decoder_layers": 1} | SIGMOID, "at least 2 decoder layers"),
        ({"query_type": "dab", "class_cost": 2.5} | SIGMOID, "an integer for `class_cost`"),
        ({"position_temperature": 20}, "10000 only"),
    ):
        with pytest.raises(ValueError, match=reason):
            to_transformers(tiny_model(**changes))


# -- what transformers' models get wrong -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_padding_losses_or_ignored_arguments(kind, tmp_path):
    theirs, ours = pair(kind, tmp_path)
    images, mask = padded_batch(SIZES)

    def change(model, **given):
        return (model(images, mask, **given).logits - model(images, mask).logits).abs().max().item()

    def of_padding(model):
        return (model(images, mask).logits[1] - model(images[1:2, :, :48, :70]).logits[0]).abs().max().item()

    assert of_padding(theirs) > 0.1
    assert of_padding(ours) < TOLERANCE
    given = {"decoder_inputs_embeds": torch.randn(3, 12, 32)}
    assert change(theirs, **given) == 0, "theirs drops it"
    assert change(ours, **given) > 0.1
    with pytest.raises(ValueError, match="not both"):
        ours(images, mask, inputs_embeds=torch.randn(3, 4, 32))
    theirs(images, mask, inputs_embeds=torch.randn(3, 4, 32))  # accepted, and without effect
    before = theirs(images, mask).logits, ours(images, mask).logits
    theirs.config.auxiliary_loss, ours.config.auxiliary_loss = True, True
    after = theirs(images, mask).logits, ours(images, mask).logits
    assert torch.equal(before[1], after[1])
    if kind == "conditional":
        assert (before[0] - after[0]).abs().max() > 0.1, "a norm between its layers that a loss switches on"


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_the_class_loss_counts(kind, tmp_path):
    theirs, ours = pair(kind, tmp_path)
    image, labels = torch.randn(1, 3, 64, 96), random_labels([2])
    assert ours.config.class_loss_coefficient == 2, "the published value"
    losses = []
    for weight in (1, 3):
        theirs.config.cls_loss_coefficient = ours.config.class_loss_coefficient = weight
        losses.append((theirs(pixel_values=image, labels=labels).loss.item(), ours(image, labels=labels).loss.item()))
    (a, b), (c, d) = losses
    assert a == c, "in theirs it has no effect"
    assert d > b * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_new_classes_start_unlikely_and_known_ones_keep_their_weights(kind, tmp_path):
    names = {0: "cat", 1: "dog", 2: "cow", 3: "hen", 4: "pig"}
    theirs, ours = pair(kind, tmp_path, id2label=names, label2id={n: i for i, n in names.items()})
    folder = tmp_path / kind
    new = {0: "dog", 1: "fox"}
    resized = DetrForDetection.from_pretrained(folder, id2label=new, ignore_mismatched_sizes=True)
    head, before = resized.class_labels_classifier, ours.class_labels_classifier
    assert head.out_features == 2
    assert torch.equal(head.weight[0], before.weight[1])
    assert torch.equal(head.bias[0], before.bias[1])
    assert head.bias[1].sigmoid().item() == pytest.approx(0.01, rel=1e-4)
    changed = {"id2label": new, "label2id": {"dog": 0, "fox": 1}, "ignore_mismatched_sizes": True}
    their_head = type(theirs).from_pretrained(folder, **changed)
    bias = (their_head.class_embed if kind == "dab" else their_head.class_labels_classifier).bias
    assert bias.sigmoid().min() > 0.2, "in theirs every class starts at every query"


@torch.no_grad()
def test_dab_runs_in_bfloat16_with_checkpointing_and_fast_attention(tmp_path):
    theirs, ours = pair("dab", tmp_path)
    image = torch.randn(1, 3, 64, 96)
    with pytest.raises(RuntimeError, match="same dtype"):
        theirs.bfloat16()(image.bfloat16())
    with pytest.raises(ValueError, match="does not support"):
        theirs.gradient_checkpointing_enable()
    expected = ours(image)
    assert ours.config._attn_implementation == "sdpa"
    found = copy.deepcopy(ours).bfloat16()(image.bfloat16())
    assert (found.pred_boxes - expected.pred_boxes).abs().max() < 0.1
    ours.gradient_checkpointing_enable()


@pytest.mark.parametrize("kind", KINDS)
def test_the_stem_and_the_first_stage_do_not_train(kind, tmp_path):
    theirs, ours = pair(kind, tmp_path)
    stem = "backbone.model.conv1.0.weight"
    of_theirs = {n.replace("conv_encoder.model._backbone", "model"): p for n, p in theirs.named_parameters()}
    assert of_theirs[f"model.{stem}"].requires_grad, "in theirs it does"
    assert not dict(ours.named_parameters())[f"model.{stem}"].requires_grad


# -- independent scores ------------------------------------------------------------------------------------------------


def by_hand(kind, logits, label, quality):
    """The loss of one query in float64: its class `label`, or None without an object."""
    total = 0.0
    for index, logit in enumerate(logits):
        p = 1 / (1 + math.exp(-logit))
        if index != label:
            total += 0.75 * p**2 * -math.log(1 - p) if kind == "focal" else p**1.5 * -math.log(1 - p)
        elif kind == "focal":
            total += 0.25 * (1 - p) ** 2 * -math.log(p)
        else:
            target = quality**1.5
            total += -target * math.log(p) - (1 - target) * math.log(1 - p)
    return total


@pytest.mark.parametrize("kind", ["focal", "iou_aware"])
def test_class_losses_of_independent_scores_by_hand(kind):
    logits = torch.tensor([[[[1.2, -0.7, 0.1], [-2.0, 0.4, 3.0]]]])  # (1, 1, 2, 3)
    classes, quality = torch.tensor([[[1, 3]]]), torch.tensor([[[0.6, 0.0]]])
    targets = ClassTargets(logits, 3, classes, quality)
    found = class_loss_of(kind, "sigmoid").loss(targets, 0.1)[0, 0].tolist()
    expected = [by_hand(kind, logits[0, 0, 0].tolist(), 1, 0.6), by_hand(kind, logits[0, 0, 1].tolist(), None, 0)]
    assert found == pytest.approx(expected, rel=1e-5)
    total = sum_class_loss(class_loss_of(kind, "sigmoid"), targets, torch.tensor(2.0), 0.1)
    assert total.tolist() == pytest.approx([sum(expected) / 2], rel=1e-5)
    assert targets.detected().tolist() == [[[True, True]]]
    assert not ClassTargets(-logits.abs(), 3, classes, quality).detected().any()


def test_the_sigmoid_losses_are_binary_cross_entropies_where_nothing_is_focused():
    """`t = 1` of the matchability-aware loss, on the class of the object alone."""
    logits = torch.randn(1, 1, 4, 1)
    ones = torch.ones(1, 1, 4)
    targets = ClassTargets(logits, 1, torch.zeros(1, 1, 4, dtype=torch.int64), ones)
    expected = binary_cross_entropy_with_logits(logits[..., 0], ones, reduction="none")
    torch.testing.assert_close(class_loss_of("iou_aware", "sigmoid").loss(targets, 0.1), expected)


@torch.no_grad()
@pytest.mark.parametrize("query_type", ["learned", "anchor", *KINDS])
def test_every_query_type_with_independent_scores(query_type, tmp_path):
    model = published(query_type, id2label=dict(enumerate("abcde")))
    image = torch.randn(1, 3, 64, 96)
    outputs = model(image)
    assert outputs.logits.shape == (1, 12, 5)
    torch.testing.assert_close(outputs.class_probabilities, outputs.logits.sigmoid())
    found = DetrImageProcessor().post_process_object_detection(outputs, 0.0, [(64, 96)])[0]
    assert len(found["scores"]) == 60, "each class of each query, up to 100"
    assert (found["scores"].diff() <= 0).all()
    best = best_detections(outputs)
    assert torch.equal(outputs.class_probabilities[0, best.queries[0], best.labels[0]], best.scores[0])
    model.save_pretrained(tmp_path)
    DetrImageProcessor().save_pretrained(tmp_path)
    detector = transformers.pipeline("object-detection", model=str(tmp_path))
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    results = detector(transformers.image_utils.to_numpy_array(pixels).transpose(1, 2, 0), threshold=0.0)
    assert len(results) == 60
    fast = prepare_for_inference(model)(image)
    torch.testing.assert_close(fast.class_probabilities, outputs.class_probabilities, atol=1e-4, rtol=0)


def test_scores_of_a_softmax_may_be_limited_too():
    model = tiny_model()
    outputs = model(torch.randn(1, 3, 64, 96))
    every = DetrImageProcessor().post_process_object_detection(outputs, -1.0)[0]["scores"]
    best = DetrImageProcessor().post_process_object_detection(outputs, -1.0, top_k=3)[0]["scores"]
    assert torch.equal(best, every.sort(descending=True).values[:3])
    with pytest.raises(ValueError, match="at least 1"):
        DetrImageProcessor().post_process_object_detection(outputs, -1.0, top_k=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.xdist_group("export")
def test_an_export_gives_the_detections_of_the_model(kind, tmp_path):
    torch.manual_seed(0)
    model = published(kind, **({"num_patterns": 2, "activation_function": "prelu"} if kind == "dab" else {}))
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    export_model(
        model, processor, tmp_path / "export", graph_format="torch", post_process=True, report=lambda line: None
    )
    exported = load_exported(tmp_path / "export")
    images, mask = padded_batch(SIZES)
    sizes = torch.tensor([[640, 960], [480, 700], [320, 200]])
    found = exported(images, mask, sizes)
    expected = processor.post_process_object_detection(model(images, mask), 0.0, sizes)
    for index, result in enumerate(expected):
        torch.testing.assert_close(found.scores[index], result["scores"], atol=1e-5, rtol=0)
    again = processor.post_process_object_detection(found, 0.0, sizes)
    for mine, result in zip(again, expected, strict=True):
        torch.testing.assert_close(mine["scores"], result["scores"], atol=1e-5, rtol=0)


# -- patterns, denoising, refusals -------------------------------------------------------------------------------------


def test_patterns_give_every_anchor_several_contents():
    model = published("dab", num_patterns=3)
    queries = model.model.build_queries(2, torch.device("cpu"))
    assert queries.content.shape == (2, 36, 32)
    assert torch.equal(queries.content[0, 12:24], model.model.patterns.weight[1].expand(12, -1))
    assert torch.equal(queries.boxes[0, :12], queries.boxes[0, 12:24])
    assert model.config.num_predictions == 36
    assert model(torch.randn(1, 3, 64, 96)).pred_boxes.shape == (1, 36, 4)
    model.resize_queries(5)
    assert model(torch.randn(1, 3, 64, 96)).pred_boxes.shape == (1, 15, 4)


def test_dab_learns_from_noised_boxes_as_dn_detr_does():
    model = published("dab", denoising_groups=2).train()
    output = model(torch.randn(2, 3, 64, 96), labels=random_labels([3, 1]))
    assert output.loss_dict["loss_ce_denoising"] > 0
    assert output.logits.shape == (2, 12, 5)
    output.loss.backward()
    assert model.denoising.class_embedding.weight.grad.abs().sum() > 0


def dn_file(tmp_path, model, labels):
    """A checkpoint of DN-DETR: that of DAB-DETR, and an embedding of the classes and of "unknown"."""
    file = save_original(model, tmp_path / "dn.pth")
    content = torch.load(file)
    content["model"]["label_enc.weight"] = labels
    torch.save(content, file)
    return file


@torch.no_grad()
@pytest.mark.parametrize("patterns", [0, 2])
def test_dn_detr_is_dab_detr_whose_queries_say_unknown(patterns, tmp_path):
    """By its code (IDEA-Research/DN-DETR): the content of a query is the embedding of "unknown" with a last channel
    of 0, plus its pattern; that of a noised box the embedding of its class with a last channel of 1."""
    theirs = their_model("resnet18", kind="dab", num_patterns=max(patterns, 1))
    labels = torch.randn(6, 31)
    unknown = torch.cat((labels[5], torch.zeros(1)))
    added = theirs.model.patterns.weight.clone()
    if not patterns:
        theirs.model.patterns.weight.copy_(unknown[None])
    file = dn_file(tmp_path, theirs, labels)
    if patterns:
        theirs.model.patterns.weight.copy_(added + unknown)
    else:
        content = torch.load(file)
        del content["model"]["transformer.patterns.weight"]
        torch.save(content, file)
    ours, notes = load_original(file, attention_heads=4)
    image = torch.randn(1, 3, 64, 96)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(ours(image)[name], theirs(image)[name], atol=TOLERANCE, rtol=TOLERANCE)
    assert ours.config.denoising_groups == 5
    assert torch.equal(ours.denoising.class_embedding.weight, torch.cat((labels[:5], torch.ones(5, 1)), dim=1))
    assert "DN-DETR" in notes[0]


def test_variants_that_were_never_published_are_refused(tmp_path):
    model = their_model("resnet18", kind="dab")
    for changes, reason in (
        ({"bbox_embed.0.layers.0.weight": torch.zeros(1)}, "box head of its own"),
        ({"refpoint_embed.weight": torch.zeros(12, 2)}, "queries are points"),
        ({"transformer.decoder.layers.1.ca_qpos_proj.weight": torch.zeros(32, 32)}, "keep_query_pos"),
        ({"transformer.encoder.norm.weight": torch.zeros(32)}, "pre_norm"),
    ):
        file = save_original(model, tmp_path / "dab.pth")
        content = torch.load(file)
        torch.save({"model": content["model"] | changes}, file)
        with pytest.raises(ValueError, match=reason):
            load_original(file)
    stored = {"model_type": "dab-detr", "backbone": "resnet18", "num_labels": 2}
    for changes, reason in (
        ({"temperature_height": 20, "temperature_width": 10}, "one for both"),
        ({"keep_query_pos": True}, "only the first decoder layer"),
        ({"normalize_before": True}, "without pre-norm"),
        ({"sine_position_embedding_scale": 1.0}, "2 pi"),
        ({"focal_alpha": 0.5}, "0.25"),
    ):
        with pytest.raises(ValueError, match=reason):
            DetrConfig.from_dict(stored | changes)


def test_checkpoints_of_other_architectures_name_the_class_that_reads_them(tmp_path):
    for config in (transformers.YolosConfig(), transformers.RTDetrConfig(), transformers.DeformableDetrConfig()):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"transformers\.\w+ForObjectDetection reads"):
            DetrForDetection.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"class_activation": "sigmoid"}, 'no "no object"'),
        ({"class_activation": "relu"}, "must be one of softmax, sigmoid"),
        ({"query_type": "deformable"}, "must be one of learned, anchor, conditional, dab"),
        ({"num_patterns": 2}, "`num_patterns` needs"),
        ({"query_type": "conditional", "num_patterns": 2}, "`num_patterns` needs"),
        ({"query_type": "conditional", "denoising_groups": 1}, "`denoising_groups` needs"),
        ({"query_type": "dab", "position_embedding_type": "learned"}, "Anchors need"),
        ({"query_type": "dab", "query_proposals": True, "dense_loss_coefficient": 1}, "`query_proposals` needs"),
        ({"position_temperature": 0.5}, "must be above 1"),
        ({"position_temperature": 20, "position_embedding_type": "learned"}, "needs `position_embedding_type"),
        (
            {"query_type": "anchor", "query_proposals": True, "dense_loss_coefficient": 1, "num_patterns": 2},
            "both define the content",
        ),
    ],
)
def test_contradicting_fields_are_refused(fields, reason):
    with pytest.raises(StrictDataclassError, match=reason):
        tiny_config(**fields)


def test_masks_need_the_scores_of_a_softmax():
    with pytest.raises(ValueError, match='Masks need `class_activation="softmax"`'):
        DetrForSegmentation(tiny_config(**SIGMOID))


def test_the_temperature_reaches_the_sines_of_the_image():
    for query_type, expected in (("learned", 10000), ("conditional", 10000), ("anchor", 20), ("dab", 20)):
        assert tiny_model(query_type=query_type).model.position_embedding.temperature == expected
    assert tiny_model(query_type="dab", position_temperature=50).model.position_embedding.temperature == 50
    for query_type, name in (("anchor", "box_temperature"), ("conditional", "point_temperature")):
        decoder = tiny_model(query_type=query_type, position_temperature=50).model.decoder
        assert getattr(decoder, name) == 50, "queries are compared with the image"


def test_scores_of_one_and_zero_have_finite_costs():
    """A logit of 18 is a probability of 1 in float32."""
    cost = class_loss_of("focal", "sigmoid").cost(torch.tensor([0.0, 1.0, 0.3]))
    assert cost.isfinite().all()
    assert cost[2].item() == pytest.approx(0.25 * 0.49 * -math.log(0.3) - 0.75 * 0.09 * -math.log(0.7), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["detr", "table", "conditional", "masks"])
def test_a_checkpoint_that_transformers_trained_with_auxiliary_losses_predicts_as_there(kind, tmp_path):
    """They norm the states between the decoder's layers then, which the checkpoint has learned to do without the
    auxiliary losses of the papers' code."""
    torch.manual_seed(0)
    theirs = their_model(kind=kind, auxiliary_loss=True)
    save_v5(theirs, tmp_path / "theirs")
    owner = DetrForSegmentation if kind == "masks" else DetrForDetection
    ours = owner.from_pretrained(tmp_path / "theirs")
    assert ours.config.norm_between_layers
    image = torch.randn(1, 3, 64, 96)
    expected = theirs(image)
    for name in ("logits", "pred_boxes", *(["pred_masks"] if kind == "masks" else [])):
        torch.testing.assert_close(ours(image)[name], expected[name], atol=TOLERANCE, rtol=TOLERANCE)
    plain = owner.from_pretrained(tmp_path / "theirs", norm_between_layers=False)
    assert (plain(image).logits - expected.logits).abs().max() > 0.1
    save_for_transformers(ours, DetrImageProcessor(), tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back")
    assert back.config.auxiliary_loss
    torch.testing.assert_close(back(image).logits, expected.logits, atol=TOLERANCE, rtol=TOLERANCE)
