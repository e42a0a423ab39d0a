"""Part of steps 6 and 7: how a class prediction is judged, in the matching and in the loss.

All kinds judge the same softmax over the classes and "no object", so they share heads, post-processing and exports.
"""

import torch
from torch import Tensor

CLASS_LOSSES = ("cross_entropy", "focal", "iou_aware")
FOCUS = 2.0  # gamma of the focal loss
OBJECT_SHARE = 0.25  # alpha of the focal loss
QUALITY_POWER = 1.5  # gamma of the matchability-aware loss


def class_matching_cost(kind: str, probabilities: Tensor) -> Tensor:
    """Cost of answering for an object with a query that gives its class the probability `p`, any shape:

    - `"cross_entropy"`, `"iou_aware"`: `-p` (paper, section 3.1);
    - `"focal"`: what the focal loss gains, `a (1-p)² (-log p) - (1-a) p² (-log(1-p))`, `a = 0.25` (arXiv 2010.04159,
      as in its code).
    """
    if kind != "focal":
        return -probabilities
    p = probabilities.clamp(1e-8, 1 - 1e-8)
    gain = OBJECT_SHARE * (1 - p) ** FOCUS * -p.log()
    return gain - (1 - OBJECT_SHARE) * p**FOCUS * -(1 - p).log()


def class_loss(
    kind: str,
    logits: Tensor,
    target_classes: Tensor,
    quality: Tensor,
    normalizer: Tensor,
    *,
    eos_coefficient: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Class loss of each decoder layer, with `p` the softmax probabilities and `c` the target of a query:

    - `"cross_entropy"` (paper, section 3.1): the sum of `-log p[c]`, in which "no object" weighs `eos_coefficient`.
    - `"focal"` (arXiv 1708.02002, over the softmax): the sum of `a (1-p[c])² (-log p[c])`, with `a = 0.25` for objects
      and 0.75 for "no object": what is decided already hardly counts.
    - `"iou_aware"` (matchability-aware loss of DEIM, arXiv 2412.04234, over the softmax): the target of a matched query
      is its class with `t = IoU^1.5` and "no object" with `1 - t`, so that the score tells how good the box is, and a
      bad box is taught little: `-t log p[c] - (1-t) log p[none]`; of the others `(1-p[none])^1.5 (-log p[none])`.

    Args:
        logits: (L, B, Q, num_labels+1), float32 or wider; the last one is "no object".
        target_classes: (L, B, Q); `num_labels` where there is no object.
        quality: (L, B, Q), IoU of the predicted box and its object, without gradient; read for objects only.
        normalizer: scalar that the sum is divided by: for the cross-entropy the sum of all weights, which makes it a
            mean, for the others the number of boxes.
        valid: (B, Q) bool, queries that count; None: all.

    Returns:
        (L,)
    """
    no_object = logits.shape[-1] - 1
    log_p = logits.log_softmax(-1)
    log_target = log_p.gather(-1, target_classes[..., None])[..., 0]  # (L, B, Q)
    is_object = target_classes != no_object
    weight = torch.ones_like(log_target) if valid is None else valid.to(logits.dtype).expand_as(log_target)
    if kind == "cross_entropy":
        weight = weight * torch.where(is_object, 1.0, eos_coefficient)
        return -(weight * log_target).sum((1, 2)) / normalizer
    if kind == "focal":
        share = torch.where(is_object, OBJECT_SHARE, 1 - OBJECT_SHARE)
        loss = share * (1 - log_target.exp()) ** FOCUS * -log_target
    else:
        log_none = log_p[..., no_object]
        target = quality.clamp(min=0) ** QUALITY_POWER
        loss = torch.where(
            is_object,
            -target * log_target - (1 - target) * log_none,
            (1 - log_none.exp()).clamp(min=1e-12) ** QUALITY_POWER * -log_none,
        )
    return (weight * loss).sum((1, 2)) / normalizer
