"""Step 7: every location of the feature map predicts the object at its position, so that backbone and
encoder get a gradient from the first step on.

Matching gives the image's features a gradient through a handful of queries, whose decoder does not yet attend to the
right locations. Here each location in the middle of an object predicts its class and box from its feature vector,
before and after the encoder: one-to-many labels on an auxiliary head, as in Co-DETR (arXiv 2211.12860), with the
central region of FCOS (arXiv 1904.01355) as assignment. The head takes part in predictions only where queries are
proposals (see `proposals.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .box_loss import giou_of, l1_distance
from .heads import BoxHead, build_class_head

CENTRAL_REGION = 0.35  # locations up to this far from the centre of a box, as a fraction of its sides, belong to it
INITIAL_SIDE = 0.25  # width and height of the box that a location refines, as a fraction of the image
RELATIVE_SIDE = 2.5  # side of this box with relative boxes, in locations (feature strides)
PRIOR = 0.1  # probability that an untrained head gives an object
NO_OBJECT_WEIGHT = 0.5


def location_centers(mask: Tensor) -> Tensor:
    """Centres of the locations of a feature map, (B, h, w) bool (True = image) to (B, hw, 2): x and y in [0, 1] of
    each image without its padding, and -1 in the padding."""
    y, x = mask.cumsum(1, dtype=torch.float32) - 0.5, mask.cumsum(2, dtype=torch.float32) - 0.5
    centers = torch.stack((x, y), dim=-1) / locations_per_side(mask)[:, None, None]
    return centers.masked_fill(~mask[..., None], -1.0).flatten(1, 2)


def locations_per_side(mask: Tensor) -> Tensor:
    """Columns and rows of each image in a feature map, without padding, (B, h, w) bool to (B, 2), at least 1."""
    return torch.stack([mask.any(axis).sum(1) for axis in (1, 2)], dim=-1).clamp(min=1)


def location_anchors(mask: Tensor, *, relative: bool = False) -> Tensor:
    """The boxes that the locations of a feature map refine, (B, h, w) bool to (B, hw, 4) cxcywh.

    Args:
        relative: square boxes of the same size in pixels in every image, `RELATIVE_SIDE` times the stride: a feature
            vector contains the size of an object in pixels, not as a fraction of the image. Otherwise their sides are
            `INITIAL_SIDE` of the image.
    """
    centers = location_centers(mask)
    if not relative:
        return torch.cat((centers, torch.full_like(centers, INITIAL_SIDE)), dim=-1)
    sides = RELATIVE_SIDE / locations_per_side(mask)[:, None].to(centers.dtype)
    return torch.cat((centers, sides.expand_as(centers)), dim=-1)


@torch.no_grad()
def assign_locations(
    centers: Tensor, valid: Tensor, labels: list[dict[str, Any]], no_object: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The target of each location: the smallest object whose central region contains it. The location nearest to the
    centre of an object is always in its central region, so that no object is too small.

    Args:
        centers: (B, hw, 2); valid (B, hw), False in the padding.

    Returns:
        classes (B, hw), `no_object` where there is none, boxes (B, hw, 4) cxcywh, zeros where there is none, and
        weights (B, hw), one over the number of locations of the object, 0 where there is none.
    """
    counts = [len(label["class_labels"]) for label in labels]
    size = max(counts, default=0)
    classes = torch.full(valid.shape, no_object, dtype=torch.int64, device=valid.device)
    boxes, weights = torch.zeros(*valid.shape, 4, device=valid.device), torch.zeros(valid.shape, device=valid.device)
    if size == 0:
        return classes, boxes, weights
    padded = pad_sequence([label["boxes"].float() for label in labels], batch_first=True).to(valid.device)
    names = pad_sequence([label["class_labels"] for label in labels], batch_first=True).to(valid.device)
    exists = torch.arange(size, device=valid.device) < torch.tensor(counts, device=valid.device)[:, None]  # (B, N)
    offset = (centers[:, :, None] - padded[:, None, :, :2]).abs()  # (B, hw, N, 2)
    inside = (offset <= CENTRAL_REGION * padded[:, None, :, 2:]).all(-1)
    distance = offset.square().sum(-1).masked_fill(~valid[..., None], torch.inf)
    inside |= distance == distance.amin(1, keepdim=True)
    inside &= exists[:, None] & valid[..., None]
    area = padded[..., 2:].prod(-1)[:, None].expand_as(inside).masked_fill(~inside, torch.inf)
    smallest, owner = area.min(2)  # (B, hw)
    assigned = smallest.isfinite()
    classes = torch.where(assigned, names.gather(1, owner), classes)
    boxes = torch.where(assigned[..., None], padded.gather(1, owner[..., None].expand(-1, -1, 4)), boxes)
    locations = torch.zeros(len(valid), size, device=valid.device).scatter_add_(1, owner, assigned.float())
    return classes, boxes, torch.where(assigned, 1 / locations.clamp(min=1).gather(1, owner), weights)


class DenseHead(nn.Module):
    """Class and box of each location from its feature vector; one head for the features before and after the encoder.

    Each object with at least one location has the same weight, so that a small one counts as much as one that fills
    the image, and the normalizers are known before the forward pass. Summed over both features:

        loss = Σ_objects (mean over its locations of the term) / number of boxes

    with the terms `loss_ce` = `w (1 - p[c]) (-log p[c])` (a focal loss with gamma 1), w = 1 or the weight of the class,
    `loss_bbox` = L1 and `loss_giou` = 1 - GIoU. An object has no location if all belong to smaller ones, or to another
    one with the same box. Locations without an object have `loss_ce`, too, each with half the mean weight
    of the assigned locations of their image, or 0.5 in an image without objects.
    """

    def __init__(self, d_model: int, num_labels: int, *, relative_boxes: bool = False) -> None:
        super().__init__()
        self.class_labels_classifier = build_class_head(d_model, num_labels)
        self.bbox_predictor = BoxHead(d_model, relative=relative_boxes)

    def anchors(self, mask: Tensor) -> Tensor:
        """The boxes that the locations of a feature map refine, (B, h, w) bool to (B, hw, 4) cxcywh."""
        return location_anchors(mask, relative=self.bbox_predictor.relative)

    def of(
        self, outputs: Any, class_weights: Tensor | None = None
    ) -> Callable[[list[dict[str, Any]], Tensor], dict[str, Tensor]]:
        """Labels and number of boxes to the terms, for a `DetrModelOutput` with hidden states."""
        features = outputs.encoder_hidden_states[0], outputs.encoder_last_hidden_state
        return partial(self, features, outputs.feature_mask.bool(), class_weights=class_weights)

    def forward(
        self,
        feature_sets: Sequence[Tensor],
        mask: Tensor,
        labels: list[dict[str, Any]],
        num_boxes: Tensor,
        class_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms, summed over several features of the same locations.

        Args:
            feature_sets: each (B, hw, d).
            mask: (B, h, w) bool, True = image.
            labels: one dict per image with `class_labels` (N,) and `boxes` (N, 4), as for the loss.
            num_boxes: see [`~hf_detr.model.loss.LossNormalizers`].
            class_weights: (num_labels+1,), of each class and, last, 1 for "no object"; None: all 1.
        """
        anchors, valid = self.anchors(mask), mask.flatten(1)
        no_object = self.class_labels_classifier.out_features - 1
        classes, boxes, weights = assign_locations(anchors[..., :2], valid, labels, no_object)
        assigned = classes < no_object
        objects = weights.sum(1)  # that have locations, (B,)
        without = NO_OBJECT_WEIGHT * objects.clamp(min=1) / assigned.sum(1).clamp(min=1)
        weights = weights / num_boxes
        of_classes = torch.where(assigned, weights, valid * without[:, None] / num_boxes)
        if class_weights is not None:
            of_classes = of_classes * class_weights[classes]
        each = [self._terms(features, anchors, classes, boxes, weights, of_classes) for features in feature_sets]
        return {name: torch.stack([terms[name] for terms in each]).sum() for name in each[0]}

    def _terms(
        self,
        features: Tensor,
        anchors: Tensor,
        classes: Tensor,
        boxes: Tensor,
        weights: Tensor,
        class_weights: Tensor,
    ) -> dict[str, Tensor]:
        logits = self.class_labels_classifier(features).float()
        assigned = classes < logits.shape[-1] - 1
        log_p = logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]
        at = assigned.flatten().nonzero()[:, 0]
        vectors, anchors, targets = (tensor.flatten(0, 1)[at] for tensor in (features, anchors, boxes))
        box_weights = weights.flatten()[at]
        predicted = self.bbox_predictor(vectors, anchors).float()
        return {
            "loss_ce": (class_weights * (1 - log_p.exp()) * -log_p).sum(),
            "loss_bbox": (box_weights * l1_distance(predicted, targets)).sum(),
            "loss_giou": (box_weights * (1 - giou_of(predicted, targets))).sum(),
        }
