"""IoU and GIoU of boxes whose leading axes broadcast; torchvision.ops has them for flat lists (N, 4) only, and the loss
has decoder layers and images in front. Conversions are `torchvision.ops.box_convert`."""

import torch
from torch import Tensor


def intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of `xyxy` boxes: (..., 4), (..., 4) to (...) each, in their squared unit."""
    width = torch.minimum(boxes1[..., 2], boxes2[..., 2]) - torch.maximum(boxes1[..., 0], boxes2[..., 0])
    height = torch.minimum(boxes1[..., 3], boxes2[..., 3]) - torch.maximum(boxes1[..., 1], boxes2[..., 1])
    intersection = width.clamp(min=0) * height.clamp(min=0)
    area1, area2 = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (boxes1, boxes2))
    return intersection, area1 + area2 - intersection


def iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of `xyxy` boxes: (..., 4), (..., 4) to (...). Pairwise: `iou(a[:, None], b)`."""
    intersection, union = intersection_and_union(boxes1, boxes2)
    return intersection / union


def giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of `xyxy` boxes: (..., 4), (..., 4) to (...).

    `giou = iou - (hull - union) / hull`, where `hull` is the area of the smallest box that encloses both. NaN where
    both boxes of a pair are empty.
    """
    intersection, union = intersection_and_union(boxes1, boxes2)
    hull_width = torch.maximum(boxes1[..., 2], boxes2[..., 2]) - torch.minimum(boxes1[..., 0], boxes2[..., 0])
    hull_height = torch.maximum(boxes1[..., 3], boxes2[..., 3]) - torch.minimum(boxes1[..., 1], boxes2[..., 1])
    hull = hull_width * hull_height
    return intersection / union - (hull - union) / hull
