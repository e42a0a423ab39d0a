"""Training only: queries that start from a spoilt copy of an object and have to restore it (DN-DETR, arXiv 2203.01305).

What matching does not tell a query in the first epochs, which object is its own, these queries know.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

LABEL_NOISE = 0.2  # share of classes that are replaced by a random one; the value of the paper's code
BOX_NOISE = 0.4  # largest shift and rescaling, as a share of the box; the value of the paper's code
SMALLEST_SIDE = 1e-3


@dataclass
class DenoisingQueries:
    """T queries an image: `denoising_groups` spoilt copies of its objects, filled up to the most objects of an image.

    Args:
        class_labels: (B, T), spoilt; where `valid` is False 0.
        anchors: (B, T, 4), spoilt, cxcywh in [0, 1].
        target_classes: (B, T), the true classes.
        target_boxes: (B, T, 4), the true boxes.
        valid: (B, T) bool, False where an image has fewer objects.
        group: (T,), which copy a query belongs to, counted from 0 to `copies` - 1.
    """

    class_labels: Tensor
    anchors: Tensor
    target_classes: Tensor
    target_boxes: Tensor
    valid: Tensor
    group: Tensor
    copies: int


def denoising_queries(
    labels: list[dict[str, Any]], num_labels: int, groups: int, device: torch.device
) -> DenoisingQueries:
    """Spoilt copies of the objects of a batch.

    Boxes: the centre moves by up to half of `BOX_NOISE` times width and height, both sides are scaled by 1 ±
    `BOX_NOISE`, and what leaves the image is cut off (section 4.2). Classes: with probability `LABEL_NOISE` any class.
    """
    counts = [len(label["class_labels"]) for label in labels]
    most = max(counts)
    classes = pad_sequence([label["class_labels"].long() for label in labels], batch_first=True).to(device)
    boxes = pad_sequence([label["boxes"].float() for label in labels], batch_first=True, padding_value=0.5).to(device)
    valid = (torch.arange(most)[None] < torch.tensor(counts)[:, None]).to(device)
    classes, boxes, valid = (t.repeat(1, groups, *[1] * (t.ndim - 2)) for t in (classes, boxes, valid))
    flipped = torch.where(
        torch.rand(classes.shape, device=device) < LABEL_NOISE, torch.randint_like(classes, num_labels), classes
    )
    noise = torch.rand(boxes.shape, device=device) * 2 - 1
    center = boxes[..., :2] + noise[..., :2] * boxes[..., 2:] * (BOX_NOISE / 2)
    size = boxes[..., 2:] * (1 + noise[..., 2:] * BOX_NOISE)
    spoilt = xyxy_to_cxcywh(cxcywh_to_xyxy(torch.cat((center, size), dim=-1)).clamp(0, 1))
    spoilt = torch.cat((spoilt[..., :2], spoilt[..., 2:].clamp(min=SMALLEST_SIDE)), dim=-1)
    group = torch.arange(groups, device=device).repeat_interleave(most)
    return DenoisingQueries(flipped, spoilt, classes, boxes, valid, group, groups)


def group_mask(groups: Tensor, valid: Tensor | None) -> Tensor:
    """Which query sees which: those of its own group that are valid, and itself.

    Args:
        groups: (T,), the group of each query.
        valid: (B, T) bool, or None if all are.

    Returns:
        (1 or B, 1, T, T) bool, True = attend.
    """
    same = (groups[:, None] == groups)[None, None]
    if valid is None:
        return same
    itself = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    return (same & valid[:, None, None]) | itself
