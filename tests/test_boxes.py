"""Boxes against torchvision's functions."""

import pytest
import torch
from torchvision import ops

from hf_detr.model import boxes as ours


@pytest.fixture
def two_lists():
    low = torch.rand(2, 40, 2, dtype=torch.float64)
    return torch.cat((low, low + torch.rand(2, 40, 2, dtype=torch.float64) + 0.01), dim=-1)


def test_pairwise_iou_and_giou_equal_torchvision(two_lists):
    a, b = two_lists
    torch.testing.assert_close(ours.iou(a[:, None], b), ops.box_iou(a, b))
    torch.testing.assert_close(ours.giou(a[:, None], b), ops.generalized_box_iou(a, b))


def test_paired_giou_is_the_diagonal_of_the_pairwise_one(two_lists):
    a, b = two_lists
    torch.testing.assert_close(ours.giou(a, b), ops.generalized_box_iou(a, b).diagonal())


def test_touching_identical_and_distant_boxes():
    a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert ours.giou(a, a).item() == 1
    assert ours.giou(a, torch.tensor([[1.0, 0.0, 2.0, 1.0]])).item() == 0  # touching: the hull is the union
    assert ours.giou(a, torch.tensor([[3.0, 0.0, 4.0, 1.0]])).item() == pytest.approx(-0.5)  # 2 of 4 are empty
