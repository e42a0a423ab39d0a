"""Boxes that change by fractions of their own sides (`relative_boxes`)."""

import json
import math

import pytest
import torch
from conftest import random_labels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert

from hf_detr import DetrForDetection
from hf_detr.model.dense_supervision import location_anchors
from hf_detr.model.heads import BoxHead
from hf_detr.training import parse_finetune_args

RELATIVE = {
    "query_type": "anchor", "relative_boxes": True, "query_proposals": True, "dense_loss_coefficient": 1,
    "feature_stride": 16,
}  # fmt: skip


def head_with(offsets: torch.Tensor) -> BoxHead:
    """A head whose result does not depend on its input."""
    head = BoxHead(8, relative=True).to(offsets.dtype)
    with torch.no_grad():
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.copy_(offsets)
    return head


def test_the_formula_is_that_of_faster_r_cnn():
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(50, 4, dtype=torch.float64, generator=generator) * 0.1
    anchors[:, :2] += 0.4
    for scale in (0.1, 0.5):
        offsets = torch.randn(4, dtype=torch.float64, generator=generator) * scale
        found = head_with(offsets)(torch.zeros(50, 8, dtype=torch.float64), anchors)
        corners = box_convert(anchors, "cxcywh", "xyxy")
        theirs = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(offsets.expand(50, 4), corners)
        torch.testing.assert_close(box_convert(found, "cxcywh", "xyxy"), theirs)


def test_a_change_means_the_same_everywhere_and_at_every_scale():
    head = head_with(torch.tensor([0.3, -0.2, 0.4, -0.5], dtype=torch.float64))
    content = torch.zeros(1, 8, dtype=torch.float64)
    anchor = torch.tensor([[0.3, 0.4, 0.2, 0.1]], dtype=torch.float64)
    here = head(content, anchor)
    moved = torch.tensor([[0.25, 0.1, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(head(content, anchor + moved), here + moved)
    torch.testing.assert_close(head(content, anchor / 4), here / 4)


def test_a_box_beyond_the_image_is_clipped_and_can_come_back():
    head = head_with(torch.tensor([4.0, 0.0, 9.0, 0.0]))
    anchors = torch.tensor([[0.9, 0.5, 0.2, 0.2]])
    box = head(torch.zeros(1, 8), anchors)
    torch.testing.assert_close(box, torch.tensor([[1.0, 0.5, 1.0, 0.2]]))
    (box - torch.tensor([[0.5, 0.5, 0.5, 0.2]])).abs().sum().backward()
    assert head.layers[-1].bias.grad[0] > 0  # descent moves it to the left


def test_sides_stay_finite_and_positive():
    for value in (-50.0, 50.0):
        box = head_with(torch.full((4,), value))(torch.zeros(1, 8), torch.tensor([[0.5, 0.5, 0.1, 0.1]]))
        assert ((box >= 0) & (box <= 1)).all()
    assert head_with(torch.full((4,), -5.0))(torch.zeros(1, 8), torch.tensor([[0.5, 0.5, 0.1, 0.1]]))[0, 2] > 0


def test_the_box_of_a_location_has_the_same_pixels_in_every_image():
    mask = torch.zeros(2, 6, 10, dtype=torch.bool)
    mask[0, :6, :10], mask[1, :4, :5] = True, True
    anchors = location_anchors(mask, relative=True).unflatten(1, (6, 10))
    for image, (rows, columns) in enumerate(((6, 10), (4, 5))):
        box = anchors[image, 1, 2] * torch.tensor([columns, rows, columns, rows])  # in locations
        torch.testing.assert_close(box, torch.tensor([2.5, 1.5, 2.5, 2.5]))
    fractions = location_anchors(mask).unflatten(1, (6, 10))
    assert (fractions[:, 1, 2, 2:] == 0.25).all()


def test_half_precision_keeps_the_place_of_a_box():
    """bfloat16 has steps of 1/256 near 1: offsets may have them, coordinates may not."""
    anchors = torch.tensor([[0.9013, 0.8007, 0.02, 0.03]])
    for dtype in (torch.bfloat16, torch.float16):
        head = head_with(torch.tensor([0.5, -0.25, 0.125, -0.125])).to(dtype)
        box = head(torch.zeros(1, 8, dtype=dtype), anchors)
        assert box.dtype == torch.float32
        exact = [0.9013 + 0.5 * 0.02, 0.8007 - 0.25 * 0.03, 0.02 * math.exp(0.125), 0.03 * math.exp(-0.125)]
        assert box[0].tolist() == pytest.approx(exact, abs=2e-4)


@torch.no_grad()
def test_predictions_do_not_depend_on_the_batch():
    model = tiny_model(**RELATIVE)
    for head in (model.model.decoder.bbox_predictor, model.model.proposals.head.bbox_predictor):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.2)
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 64)]
    padded, mask = torch.zeros(2, 3, 96, 96), torch.zeros(2, 96, 96, dtype=torch.int64)
    for index, image in enumerate(images):
        padded[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = 1
    together = model(padded, mask)
    for index, image in enumerate(images):
        alone = model(image[None])
        torch.testing.assert_close(together.pred_boxes[index], alone.pred_boxes[0], atol=1e-5, rtol=0)
        assert (alone.pred_boxes.std(1) > 0).all()


def test_a_checkpoint_keeps_the_formula(tmp_path):
    model = tiny_model(**RELATIVE)
    torch.nn.init.normal_(model.model.decoder.bbox_predictor.layers[-1].weight, std=0.2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["relative_boxes"] is True
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(pixel_values).pred_boxes
        torch.testing.assert_close(DetrForDetection.from_pretrained(tmp_path)(pixel_values).pred_boxes, expected)
        other = DetrForDetection.from_pretrained(tmp_path, relative_boxes=False)(pixel_values).pred_boxes
    assert not torch.allclose(other, expected, atol=1e-3)


def test_every_box_head_learns():
    model = tiny_model(**RELATIVE, denoising_groups=1).train()
    model(torch.randn(2, 3, 64, 96), labels=random_labels([2, 1], num_labels=5)).loss.backward()
    for head in (model.model.decoder.bbox_predictor, model.model.proposals.head.bbox_predictor):
        assert head.relative
        assert head.layers[-1].weight.grad.abs().sum() > 0


def test_it_can_be_chosen_on_the_command_line():
    command = ["--recipe", "paper", "--set", "query_type=anchor", "relative_boxes=true"]
    assert parse_finetune_args("", command).model.config_fields()["relative_boxes"] is True
    assert parse_finetune_args("", ["--set", "relative_boxes=false"]).model.config_fields()["relative_boxes"] is False


def test_it_is_refused_where_it_would_have_no_effect():
    with pytest.raises(StrictDataclassError, match="nothing else refines boxes"):
        tiny_config(relative_boxes=True)
    assert tiny_model(relative_boxes=True, dense_loss_coefficient=1).dense_head.bbox_predictor.relative
