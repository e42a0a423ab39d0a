"""Step 7: how far a predicted mask is from its object's, by the focal and the dice loss of the paper's code."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


class MaskPairs(NamedTuple):
    """The masks of matched queries beside those of their objects, in lists, since images have different sizes.

    Args:
        logits: each (n, H, W), mask logits at the size of the image without its padding; float32 or wider.
        targets: each (n, H, W), bool.
    """

    logits: list[Tensor]
    targets: list[Tensor]


def focal_mask_loss(masks: MaskPairs) -> Tensor:
    """The sigmoid focal loss (arXiv 1708.02002) of each pair, (N,), the mean over the pixels of its image:

    p_t   = p where the object is, 1 - p elsewhere       p = sigmoid(logit)
    alpha = 0.25 where the object is, 0.75 elsewhere
    loss  = mean(-alpha · (1 - p_t)² · log(p_t))
    """
    return torch.cat([_focal(*pair) for pair in zip(*masks, strict=True)])


def _focal(logits: Tensor, targets: Tensor) -> Tensor:
    # log(1 - p) = log(p of the negated logit), so both kinds of pixels are one
    signed = torch.where(targets, logits, -logits)  # p_t = sigmoid(signed)
    alpha = torch.where(targets, FOCAL_ALPHA, 1 - FOCAL_ALPHA).to(logits.dtype)
    return (-alpha * (-signed).sigmoid() ** FOCAL_GAMMA * functional.logsigmoid(signed)).flatten(1).mean(1)


def dice_loss(masks: MaskPairs) -> Tensor:
    """The dice loss (arXiv 1606.04797) of each pair, (N,), over the pixels of its image; 1 is added to both areas, as
    in the paper's code: `1 - (2 sum(p · target) + 1) / (sum(p) + sum(target) + 1)`, p = sigmoid(logit)."""
    return torch.cat([_dice(*pair) for pair in zip(*masks, strict=True)])


def _dice(logits: Tensor, targets: Tensor) -> Tensor:
    probability, target = logits.sigmoid().flatten(1), targets.flatten(1)
    overlap = (probability * target).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
