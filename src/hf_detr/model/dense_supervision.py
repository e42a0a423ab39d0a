"""Training only: every place of the image, too, is asked what lies there, so that backbone and encoder learn at once.

Matching gives the image's features a gradient for a handful of queries, through a decoder that does not know yet where
to look. Here each cell in the middle of an object predicts its class and box straight from its feature vector, before
the encoder and after it: one-to-many labels on an auxiliary head, as in Co-DETR (arXiv 2211.12860), with the central
region of FCOS (arXiv 1904.01355) for the assignment. The head is not used for predictions and not part of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .boxes import cxcywh_to_xyxy, giou
from .heads import BoxHead, build_class_head
from .loss import sum_over_processes

CENTRAL = 0.35  # cells up to this far from the centre of a box, as a share of its width and height, belong to it
CELL_BOX = 0.25  # width and height that a cell's box starts from
CELL_PRIOR = 0.1  # probability of an object that an untrained head gives a cell
NO_OBJECT_WEIGHT = 0.5
NOTHING = -1  # no class


def cell_centers(height: int, width: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Where cells lie, (B, hw, 2): x and y in [0, 1] of each image without its padding, and -1 in the padding. B is 1
    without a mask (B, h, w)."""
    if mask is None:
        mask = torch.ones(1, height, width, dtype=torch.bool, device=device)
    y, x = mask.cumsum(1, dtype=torch.float32) - 0.5, mask.cumsum(2, dtype=torch.float32) - 0.5
    rows, columns = (mask.any(axis).sum(1).clamp(min=1)[:, None, None] for axis in (2, 1))
    return torch.stack((x / columns, y / rows), dim=-1).masked_fill(~mask[..., None], -1.0).flatten(1, 2)


@torch.no_grad()
def assign_cells(centers: Tensor, valid: Tensor, labels: list[dict[str, Any]], no_object: int) -> tuple[Tensor, Tensor]:
    """The object that each cell has to name: the smallest one in whose central part it lies. The cell nearest to the
    centre of an object belongs to it in any case, so that none is too small.

    Args:
        centers: (B, hw, 2); valid (B, hw), False in the padding.

    Returns:
        classes (B, hw), `no_object` where there is none, and boxes (B, hw, 4) cxcywh, zeros where there is none.
    """
    counts = [len(label["class_labels"]) for label in labels]
    most = max(counts, default=0)
    classes = torch.full(valid.shape, no_object, dtype=torch.int64, device=valid.device)
    boxes = torch.zeros(*valid.shape, 4, device=valid.device)
    if most == 0:
        return classes, boxes
    padded = nn.utils.rnn.pad_sequence([label["boxes"].float() for label in labels], batch_first=True).to(valid.device)
    names = nn.utils.rnn.pad_sequence([label["class_labels"] for label in labels], batch_first=True).to(valid.device)
    exists = torch.arange(most, device=valid.device) < torch.tensor(counts, device=valid.device)[:, None]  # (B, T)
    offset = (centers[:, :, None] - padded[:, None, :, :2]).abs()  # (B, hw, T, 2)
    inside = (offset <= CENTRAL * padded[:, None, :, 2:]).all(-1)
    distance = offset.square().sum(-1).masked_fill(~valid[..., None], torch.inf)
    inside |= distance == distance.amin(1, keepdim=True)
    inside &= exists[:, None] & valid[..., None]
    area = padded[..., 2:].prod(-1)[:, None].expand_as(inside).masked_fill(~inside, torch.inf)
    smallest, owner = area.min(2)  # (B, hw)
    owned = smallest.isfinite()
    classes = torch.where(owned, names.gather(1, owner), classes)
    return classes, torch.where(owned[..., None], padded.gather(1, owner[..., None].expand(-1, -1, 4)), boxes)


def count_cells(labels: list[dict[str, Any]], sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """How many cells have to name an object, as a scalar, on feature maps of these (rows, columns), one an image."""
    count = torch.zeros((), dtype=torch.float32, device=device)
    for size in set(sizes):
        alike = [label for label, other in zip(labels, sizes, strict=True) if other == size]
        centers = cell_centers(*size, None, device).expand(len(alike), -1, -1)
        everywhere = torch.ones(centers.shape[:2], dtype=torch.bool, device=device)
        classes, _ = assign_cells(centers, everywhere, alike, no_object=NOTHING)
        count += (classes != NOTHING).sum()
    return count


class DenseHead(nn.Module):
    """Class and box of each cell, from its feature vector; one head for the features before and after the encoder."""

    def __init__(self, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.class_labels_classifier = build_class_head(d_model, num_labels)
        self.bbox_predictor = BoxHead(d_model)

    def forward(
        self, features: Tensor, centers: Tensor, valid: Tensor, classes: Tensor, boxes: Tensor, cells: Tensor
    ) -> dict[str, Tensor]:
        """The loss of one set of features (B, hw, d); the rest as `assign_cells` takes and gives it.

        Returns:
            `loss_ce`: the sum over cells of `w (1 - p[c]) (-log p[c])`, w = 0.5 without an object and 1 with one (a
            focal loss with gamma 1); `loss_bbox` and `loss_giou` of the cells with an object, as in the set loss. All
            over `cells`, the number of cells with an object, averaged over processes.
        """
        logits = self.class_labels_classifier(features).float()
        owned = classes < logits.shape[-1] - 1
        log_p = logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]
        weight = torch.where(owned, 1.0, NO_OBJECT_WEIGHT) * valid
        anchors = torch.cat((centers, torch.full_like(centers, CELL_BOX)), dim=-1)
        at = owned.flatten().nonzero()[:, 0]
        vectors, anchors, objects = (t.flatten(0, 1)[at] for t in (features, anchors, boxes))
        predicted = self.bbox_predictor(vectors, anchors).float()
        return {
            "loss_ce": (weight * (1 - log_p.exp()) * -log_p).sum() / cells,
            "loss_bbox": (predicted - objects).abs().sum() / cells,
            "loss_giou": (1 - giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(objects))).sum() / cells,
        }


def dense_loss(
    head: DenseHead,
    feature_sets: Sequence[Tensor],
    centers: Tensor,
    labels: list[dict[str, Any]],
    cells: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of [`DenseHead`], summed over several features (B, hw, d) of the same cells.

    Args:
        centers: as [`cell_centers`] gives them.
        labels: one dict an image with `class_labels` (N,) and `boxes` (N, 4), as for the set loss.
        cells: see [`~hf_detr.model.loss.LossNormalizers`]; None counts those of this batch, on all processes.
    """
    centers = centers.expand(len(feature_sets[0]), -1, -1)
    valid = centers[..., 0] >= 0
    no_object = head.class_labels_classifier.out_features - 1
    classes, boxes = assign_cells(centers, valid, labels, no_object)
    if cells is None:
        total, num_processes = sum_over_processes((classes < no_object).sum())
        cells = total.clamp(min=1) / num_processes
    each = [head(features, centers, valid, classes, boxes, cells) for features in feature_sets]
    return {name: torch.stack([terms[name] for terms in each]).sum() for name in each[0]}
