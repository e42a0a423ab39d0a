"""Step 7: the box terms of the loss, also those of the matching cost: L1 and GIoU (paper, section 3.1)."""

from torch import Tensor
from torchvision.ops import box_convert

from .boxes import giou, iou


def l1_distance(boxes: Tensor, targets: Tensor) -> Tensor:
    """`|box - target|_1` of cxcywh boxes in [0, 1] whose leading axes broadcast: (..., 4), (..., 4) to (...)."""
    return (boxes - targets).abs().sum(-1)


def giou_of(boxes: Tensor, targets: Tensor) -> Tensor:
    """Generalised IoU of cxcywh boxes whose leading axes broadcast: (..., 4), (..., 4) to (...)."""
    return giou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(targets, "cxcywh", "xyxy"))


def iou_of(boxes: Tensor, targets: Tensor) -> Tensor:
    """IoU of cxcywh boxes whose leading axes broadcast: (..., 4), (..., 4) to (...)."""
    return iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(targets, "cxcywh", "xyxy"))
