"""Queries that start at the most confident locations of the image."""

import pytest
import torch
from conftest import tiny_config, tiny_model

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.export import export_model, load_exported
from hf_detr.export.export_check import Case, compare
from hf_detr.model.proposals import overlaps

PROPOSALS = {
    "query_type": "anchor", "query_proposals": True, "dense_loss_coefficient": 1, "d_model": 32, "num_queries": 6,
    "feature_stride": 16,
}  # fmt: skip


def proposing_model(**changes) -> DetrForDetection:
    torch.manual_seed(0)
    model = tiny_model(**PROPOSALS | changes)
    head = model.model.proposals.head
    torch.nn.init.normal_(head.class_labels_classifier.weight, std=0.5)  # locations that differ
    torch.nn.init.normal_(head.bbox_predictor.layers[-1].weight, std=0.5)
    return model


def test_the_overlap_of_a_proposal_is_with_more_confident_ones_only():
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]]])
    classes = torch.tensor([[0, 1, 1, 0]])
    # half of either box is shared by the first two: 0.08 / (0.16 + 0.16 - 0.08)
    expected = [[0.0, 0.0], [1 / 3, 0.0], [1.0, 1 / 3], [0.0, 0.0]]
    assert torch.allclose(overlaps(boxes, classes)[0], torch.tensor(expected), atol=1e-6)


def test_boxes_without_area_in_float16_overlap_nothing():
    boxes = torch.tensor([[[0.5, 0.5, 1e-4, 1e-4], [0.5, 0.5, 1e-4, 1e-4]]], dtype=torch.float16)
    assert torch.equal(overlaps(boxes, torch.tensor([[0, 0]])), torch.zeros(1, 2, 2, dtype=torch.float16))


@torch.no_grad()
def test_queries_start_at_the_locations_that_most_likely_have_an_object():
    model, seen = proposing_model(), {}
    model.model.decoder.register_forward_pre_hook(lambda _, args: seen.update(queries=args[0], memory=args[1]))
    outputs = model(torch.randn(2, 3, 64, 80))
    height, width = outputs.feature_mask.shape[1:]
    assert (height, width) == (4, 5)
    head, features = model.model.proposals.head, outputs.encoder_last_hidden_state
    for image in range(2):
        probabilities = head.class_labels_classifier(features[image]).double().softmax(-1)
        best = sorted(range(height * width), key=lambda at: float(probabilities[at, -1]))[:6]
        for query, at in enumerate(best):
            center = ((at % width + 0.5) / width, (at // width + 0.5) / height)
            box = head.bbox_predictor(features[image, at], torch.tensor([*center, 0.25, 0.25]))
            assert torch.allclose(seen["queries"].boxes[image, query], box, atol=1e-5)
    first = features[
        0, min(range(20), key=lambda at: float(head.class_labels_classifier(features[0, at]).softmax(-1)[-1]))
    ]
    rest = model.model.proposals.overlap_embedding(torch.zeros(2))
    assert torch.allclose(seen["queries"].content[0, 0], first + rest, atol=1e-5)  # nothing comes before the first


@torch.no_grad()
def test_an_image_with_fewer_locations_than_queries_has_the_anchors_after_them():
    model, seen = proposing_model(num_queries=9), {}
    model.model.decoder.register_forward_pre_hook(lambda _, args: seen.update(queries=args[0]))
    model(torch.randn(1, 3, 32, 48))  # 2 x 3 locations
    anchors = model.model.query_position_embeddings.weight.sigmoid()
    assert torch.allclose(seen["queries"].boxes[0, 6:], anchors[:3], atol=1e-6)
    assert not torch.allclose(seen["queries"].boxes[0, :3], anchors[:3], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 80), (32, 32)])  # more locations than queries, and fewer
def test_padding_does_not_change_predictions(size):
    model, image = proposing_model(), torch.randn(1, 3, *size)
    padded, mask = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.int64)
    padded[0, :, : size[0], : size[1]] = image[0]
    mask[0, : size[0], : size[1]] = 1
    padded[1], mask[1] = torch.randn(3, 96, 128), 1
    alone, together = model(image), model(padded, mask)
    assert torch.allclose(alone.logits[0], together.logits[0], atol=1e-5)
    assert torch.allclose(alone.pred_boxes[0], together.pred_boxes[0], atol=1e-5)


def test_the_head_of_the_proposals_learns_from_the_dense_loss_only():
    model = proposing_model(denoising_groups=1).train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.4]])}]
    terms = model(torch.randn(1, 3, 64, 64), labels=labels).loss_dict
    head = list(model.model.proposals.head.parameters())
    decoder = terms["loss_ce"] + terms["loss_bbox"] + terms["loss_giou"]
    gradients = torch.autograd.grad(decoder, head, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    dense = terms["loss_ce_dense"] + terms["loss_bbox_dense"] + terms["loss_giou_dense"]
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(dense, head))


def test_new_classes_keep_the_rows_of_the_proposals_by_name():
    model = proposing_model(id2label={0: "cat", 1: "dog"})
    before = model.model.proposals.head.class_labels_classifier.weight.clone()
    model.resize_class_head({0: "bird", 1: "cat"})
    after = model.model.proposals.head.class_labels_classifier.weight
    assert torch.equal(after[1], before[0])
    assert torch.equal(after[2], before[2])  # no object


def test_a_saved_model_proposes_the_same(tmp_path):
    model, image = proposing_model(), torch.randn(1, 3, 64, 80)
    model.save_pretrained(tmp_path)
    loaded = DetrForDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image).pred_boxes, model(image).pred_boxes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"query_type": "learned"}, "query_type"),
        ({"dense_loss_coefficient": 0}, "dense_loss_coefficient"),
    ],
)
def test_what_contradicts_proposals_is_refused(changes, named):
    with pytest.raises(Exception, match=named):
        tiny_config(**PROPOSALS | changes)


def test_a_content_of_one_s_own_is_refused():
    with pytest.raises(ValueError, match="decoder_inputs_embeds"):
        proposing_model()(torch.randn(1, 3, 64, 80), decoder_inputs_embeds=torch.zeros(1, 6, 32))


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_exports_propose_the_same_for_any_size(kind, tmp_path):
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107})
    messages = []
    model = proposing_model(relative_boxes=True)  # as in the recipe
    content = export_model(model, processor, tmp_path, graph_format=kind, report=messages.append)
    assert content["check"]["largest_difference"] < 1e-4
    loaded, image = load_exported(tmp_path), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
    found = loaded(image, torch.ones(1, 64, 96, dtype=torch.int64))
    assert torch.allclose(torch.as_tensor(found.pred_boxes), expected.pred_boxes, atol=1e-4)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_float16_may_reorder_proposals(kind, tmp_path):
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107})
    model = proposing_model(num_queries=20, relative_boxes=True)
    content = export_model(model, processor, tmp_path, graph_format=kind, half=True, report=lambda text: None)
    assert 0 < content["float16_check"]["largest_difference"] < 0.05


class Changed:
    """The outputs of a model, changed, in place of an export."""

    export = {"post_processing": False}
    has_masks = False

    def __init__(self, model, change):
        self.model, self.change = model, change

    def __call__(self, pixel_values, pixel_mask):
        outputs = self.model(pixel_values, pixel_mask)
        return self.change({"logits": outputs.logits.clone(), "pred_boxes": outputs.pred_boxes.clone()})


def replace_last(outputs):
    outputs["pred_boxes"][:, -1] = outputs["pred_boxes"][:, -1].flip(-1)
    return outputs


def break_last(outputs):
    outputs["logits"][:, -1] = float("nan")
    return outputs


@pytest.mark.parametrize(
    ("change", "replaced", "equal"),
    [
        (lambda outputs: {name: value.flip(1) for name, value in outputs.items()}, 0.0, True),
        (lambda outputs: outputs | {"logits": outputs["logits"].flip(1)}, 0.0, False),  # boxes stay where they were
        (replace_last, 0.0, False),
        (replace_last, 0.05, True),
        (break_last, 0.05, False),
    ],
    ids=["reordered", "logits of others", "another box", "another box, which is allowed", "not a number"],
)
@torch.no_grad()
def test_an_export_is_compared_by_its_set_of_proposals(change, replaced, equal):
    model = proposing_model(num_queries=20)
    result = compare(Changed(model, change), model, [Case(2, 96, 128, False)], replaced=replaced)
    assert result.passes() == equal


@torch.no_grad()
def test_what_may_be_replaced_is_a_part_of_all_queries_and_a_small_one_of_an_image():
    def of_one_image(wrong):
        def change(outputs):
            if len(outputs["logits"]) == 2:  # of the last case only
                outputs["pred_boxes"][0, :wrong] = outputs["pred_boxes"][0, :wrong].flip(-1)
            return outputs

        return Changed(model, change)

    model = proposing_model(num_queries=20)
    cases = [*[Case(1, 96, 128, False)] * 10, Case(2, 96, 128, False)]  # 240 queries, of which 24 may be others
    assert compare(of_one_image(8), model, cases, replaced=0.1).passes()
    assert not compare(of_one_image(8), model, cases, replaced=0.01).passes()
    assert not compare(of_one_image(12), model, cases, replaced=0.1).passes(), "many queries of one image are wrong"
