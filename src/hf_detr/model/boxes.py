"""Boxes as tensors (..., 4): conversions between formats, IoU and GIoU, pairwise and paired.

Formats: `cxcywh` (centre, width, height; what DETR predicts), `xyxy` (two corners), `xywh` (top-left corner, width,
height; what COCO stores). All functions broadcast, so "pairwise" is one inserted axis: `giou(a[:, None], b)`.
torchvision.ops has the same functions for flat (N, 4) lists only; the loss needs decoder layers and images in front.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) to (x_min, y_min, x_max, y_max). Any unit, shape (..., 4)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x_min, y_min, x_max, y_max) to (centre x, centre y, width, height). Any unit, shape (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """COCO's (x_min, y_min, width, height) to (x_min, y_min, x_max, y_max). Any unit, shape (..., 4)."""
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(x_min, y_min, x_max, y_max) to COCO's (x_min, y_min, width, height). Any unit, shape (..., 4)."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of `xyxy` boxes, (..., 4) to (...), in squared units of the boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    width = torch.minimum(boxes1[..., 2], boxes2[..., 2]) - torch.maximum(boxes1[..., 0], boxes2[..., 0])
    height = torch.minimum(boxes1[..., 3], boxes2[..., 3]) - torch.maximum(boxes1[..., 1], boxes2[..., 1])
    intersection = width.clamp(min=0) * height.clamp(min=0)
    return intersection, box_area(boxes1) + box_area(boxes2) - intersection


def iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of `xyxy` boxes whose leading axes broadcast: (..., 4), (..., 4) to (...)."""
    intersection, union = _intersection_and_union(boxes1, boxes2)
    return intersection / union


def giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of `xyxy` boxes whose leading axes broadcast: (..., 4), (..., 4) to (...).

    `giou = iou - (hull - union) / hull` with `hull` the area of the smallest box around both. NaN where both boxes of
    a pair are empty.
    """
    intersection, union = _intersection_and_union(boxes1, boxes2)
    hull_width = torch.maximum(boxes1[..., 2], boxes2[..., 2]) - torch.minimum(boxes1[..., 0], boxes2[..., 0])
    hull_height = torch.maximum(boxes1[..., 3], boxes2[..., 3]) - torch.minimum(boxes1[..., 1], boxes2[..., 1])
    hull = hull_width * hull_height
    return intersection / union - (hull - union) / hull
