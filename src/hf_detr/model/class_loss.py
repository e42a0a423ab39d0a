"""Steps 6 and 7: the class term of the matching cost and of the loss, for both kinds of scores: a softmax over the
classes and "no object" (the paper), or a sigmoid for each class (Deformable and Conditional DETR)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FOCAL_GAMMA = 2.0  # arXiv 1708.02002
FOCAL_ALPHA = 0.25
MAL_GAMMA = 1.5  # of the matchability-aware loss, arXiv 2412.04234


@dataclass
class ClassTargets:
    """What the class logits of L layers should have been.

    Args:
        logits: (L, B, T, C), float32 or wider; C = num_labels + 1 where the last one is "no object", else num_labels.
        num_labels: number of classes.
        classes: (L, B, T); `num_labels` where there is no object.
        quality: (L, B, T), IoU of the predicted box and its object, without gradient; read for objects only.
        valid: (B, T) bool, queries that count; None: all.
        weights: (num_labels+1,), of each class and, last, 1 for "no object"; None: all 1.
    """

    logits: Tensor
    num_labels: int
    classes: Tensor
    quality: Tensor
    valid: Tensor | None = None
    weights: Tensor | None = None

    @property
    def no_object(self) -> int:
        """The class of a query without an object."""
        return self.num_labels

    def one_hot(self) -> Tensor:
        """(L, B, T, num_labels): 1 for the class of an object, 0 for the others and everywhere without an object."""
        return functional.one_hot(self.classes, self.num_labels + 1)[..., :-1].to(self.logits.dtype)

    def detected(self) -> Tensor:
        """(L, B, T) bool, predictions of an object: "no object" is not the most likely (softmax), or some
        class has a probability above 1/2 (sigmoid)."""
        if self.logits.shape[-1] == self.num_labels:
            return (self.logits > 0).any(-1)
        return self.logits.argmax(-1) != self.no_object


class ClassLoss(NamedTuple):
    """Args:
    cost: probability of an object's class, any shape, to the cost of matching a query to the object.
    loss: targets and the weight of "no object" to the loss of each query, (L, B, T).
    is_mean: divided by the sum of all weights, as PyTorch's cross-entropy is, or else by the number of boxes.
    """

    cost: Callable[[Tensor], Tensor]
    loss: Callable[[ClassTargets, float], Tensor]
    is_mean: bool = False


def negative_probability(probabilities: Tensor) -> Tensor:
    """`-p` (paper, section 3.1; its `1 - p` differs by a constant)."""
    return -probabilities


def focal_cost(probabilities: Tensor) -> Tensor:
    """`a (1-p)² (-log p) - (1-a) p² (-log(1-p))`, `a = 0.25` (arXiv 2010.04159, as in its code)."""
    p, eps = probabilities, 1e-8  # which keeps both logs finite, as in its code
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + eps).log()
    return positive - (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + eps).log()


def cross_entropy(targets: ClassTargets, eos_coefficient: float) -> Tensor:
    """`-w log p[c]` with w = `eos_coefficient` for "no object" and 1 for objects (paper, section 3.1)."""
    log_p = targets.logits.log_softmax(-1).gather(-1, targets.classes[..., None])[..., 0]
    return -torch.where(targets.classes == targets.no_object, eos_coefficient, 1.0) * log_p


def focal(targets: ClassTargets, eos_coefficient: float) -> Tensor:
    """`a (1-p[c])² (-log p[c])`, `a` = 0.25 for objects and 0.75 for "no object" (arXiv 1708.02002, over the softmax):
    predictions that are already right hardly count. `eos_coefficient` is not used."""
    log_p = targets.logits.log_softmax(-1).gather(-1, targets.classes[..., None])[..., 0]
    alpha = torch.where(targets.classes == targets.no_object, 1 - FOCAL_ALPHA, FOCAL_ALPHA)
    return alpha * (1 - log_p.exp()) ** FOCAL_GAMMA * -log_p


def iou_aware(targets: ClassTargets, eos_coefficient: float) -> Tensor:
    """The matchability-aware loss of DEIM (arXiv 2412.04234) over the softmax: the target of a matched query is its
    class with `t = IoU^1.5` and "no object" with `1 - t`, `-t log p[c] - (1-t) log p[none]`, so that the score predicts
    the quality of the box and low-quality matches teach little; of the others `(1-p[none])^1.5 (-log p[none])`.
    `eos_coefficient` is not used."""
    log_probabilities = targets.logits.log_softmax(-1)
    log_p = log_probabilities.gather(-1, targets.classes[..., None])[..., 0]
    log_none = log_probabilities[..., targets.no_object]
    soft_target = targets.quality.clamp(min=0) ** MAL_GAMMA
    return torch.where(
        targets.classes == targets.no_object,
        (1 - log_none.exp()).clamp(min=1e-12) ** MAL_GAMMA * -log_none,
        -soft_target * log_p - (1 - soft_target) * log_none,
    )


def sigmoid_focal(targets: ClassTargets, eos_coefficient: float) -> Tensor:
    """The sum over classes of `a (1-p)² (-log p)` for the class of the object and `(1-a) p² (-log(1-p))` for all
    others, `a` = 0.25 (arXiv 1708.02002, as in Deformable DETR). `eos_coefficient` is not used."""
    one_hot = targets.one_hot()
    log_p, log_not = functional.logsigmoid(targets.logits), functional.logsigmoid(-targets.logits)
    positive = FOCAL_ALPHA * log_not.exp() ** FOCAL_GAMMA * -log_p
    negative = (1 - FOCAL_ALPHA) * log_p.exp() ** FOCAL_GAMMA * -log_not
    return (one_hot * positive + (1 - one_hot) * negative).sum(-1)


def sigmoid_iou_aware(targets: ClassTargets, eos_coefficient: float) -> Tensor:
    """The matchability-aware loss as published (arXiv 2412.04234, equation 4): the sum over classes of
    `-t log p - (1-t) log(1-p)` with t = IoU^1.5 for the class of the object, and of `p^1.5 (-log(1-p))` for all others.
    `eos_coefficient` is not used."""
    one_hot = targets.one_hot()
    log_p, log_not = functional.logsigmoid(targets.logits), functional.logsigmoid(-targets.logits)
    soft_target = (targets.quality.clamp(min=0) ** MAL_GAMMA)[..., None]
    positive = -soft_target * log_p - (1 - soft_target) * log_not
    negative = log_p.exp().clamp(min=1e-12) ** MAL_GAMMA * -log_not
    return (one_hot * positive + (1 - one_hot) * negative).sum(-1)


CLASS_LOSSES = {
    "softmax": {
        "cross_entropy": ClassLoss(negative_probability, cross_entropy, is_mean=True),
        "focal": ClassLoss(focal_cost, focal),
        "iou_aware": ClassLoss(negative_probability, iou_aware),
    },
    "sigmoid": {
        "focal": ClassLoss(focal_cost, sigmoid_focal),
        "iou_aware": ClassLoss(negative_probability, sigmoid_iou_aware),
    },
}


def class_loss_of(kind: str, activation: str = "softmax") -> ClassLoss:
    """The class loss of that name for the scores of this activation.

    Raises:
        ValueError: there is none.
    """
    losses = CLASS_LOSSES.get(activation, {})
    if kind not in losses:
        known = ", ".join(losses) or "nothing"
        raise ValueError(f"`class_loss` for {activation} scores must be one of {known}, got {kind!r}.")
    return losses[kind]


def sum_class_loss(loss_of: ClassLoss, targets: ClassTargets, normalizer: Tensor, eos_coefficient: float) -> Tensor:
    """The class loss of each layer, (L,): the sum over its valid queries, each with the weight of its class, over
    `normalizer`."""
    loss = loss_of.loss(targets, eos_coefficient)  # (L, B, T)
    if targets.weights is not None:
        loss = loss * targets.weights[targets.classes]
    if targets.valid is not None:
        loss = loss * targets.valid
    return loss.sum((1, 2)) / normalizer
