"""Boxes of rows as arrays, against torchvision's functions of tensors."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_area, box_convert, box_iou, clip_boxes_to_image

from hf_detr.data.box_arrays import clip_boxes, corners_of, intersections, to_boxes


@pytest.fixture
def boxes():
    rng = np.random.default_rng(0)
    return np.concatenate((rng.uniform(-30, 90, (40, 2)), rng.uniform(1, 60, (40, 2))), axis=1)


def test_corners_and_intersections(boxes):
    corners = corners_of(boxes)
    expected = box_convert(torch.from_numpy(boxes), "xywh", "xyxy")
    assert torch.from_numpy(corners).equal(expected)
    iou, area = box_iou(expected, expected), box_area(expected)
    common = (area[:, None] + area) * iou / (1 + iou)  # from the IoU to the intersection
    found = intersections(corners[:, None], corners)
    assert (found == 0).any()
    assert (found > 0).any()
    np.testing.assert_allclose(found, common.numpy(), atol=1e-9)
    np.testing.assert_array_equal(intersections(corners[3], corners), found[3])


def test_boxes_are_clipped_and_those_inside_stay_to_the_last_digit(boxes):
    inside = to_boxes([[0.1, 0.2, 0.7, 0.1]])  # 0.2 + 0.1 - 0.2 is not 0.1
    clipped = clip_boxes(np.concatenate((boxes, inside)), 80, 100)
    assert clipped[-1].tolist() == inside[0].tolist()
    corners = clip_boxes_to_image(box_convert(torch.from_numpy(boxes), "xywh", "xyxy"), (80, 100))
    np.testing.assert_allclose(clipped[:-1], box_convert(corners, "xyxy", "xywh").numpy(), atol=1e-12)
    assert (clipped[:-1] != boxes).any(axis=1).sum() > 10


def test_no_boxes():
    none = to_boxes([])
    assert none.shape == corners_of(none).shape == clip_boxes(none, 5, 5).shape == (0, 4)
