"""Step 7: the set loss. Matched queries are trained to predict the class and box of their object, all others "no
object"."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .box_loss import giou_of, iou_of, l1_distance
from .class_loss import ClassTargets, class_loss_of, sum_class_loss
from .configuration_hf_detr import DetrConfig
from .mask_loss import MaskPairs, dice_loss, focal_mask_loss
from .matcher import Matching, hungarian_matching
from .queries import DenoisingQueries


@dataclass
class LossNormalizers:
    """What the sums of the loss are divided by, scalars on the device of the model. Each is a count over everything
    that one optimizer step learns from, divided by the number of processes, since gradients are averaged over them; so
    neither processes nor gradient accumulation change the loss.

    Args:
        boxes: objects, at least 1 in all.
        class_weight: sum of the weights of the cross-entropy over all queries.
        images: images.
    """

    boxes: Tensor
    class_weight: Tensor
    images: Tensor

    @classmethod
    def from_counts(cls, counts: Tensor, num_processes: int) -> "LossNormalizers":
        """Of the counts (3,) that `count_for_loss` gives, summed over batches and processes."""
        boxes, class_weight, images = counts.unbind()
        return cls(boxes.clamp(min=1) / num_processes, class_weight / num_processes, images / num_processes)


@dataclass
class LossOutput:
    """Args:
    loss: scalar, the weighted sum.
    loss_dict: the unweighted terms by name.
    matching: which query was matched to which object, per layer: (layers, M).
    """

    loss: Tensor
    loss_dict: dict[str, Tensor]
    matching: Matching


@dataclass
class MatchedPredictions:
    """The predictions of L layers beside what they should have been; what each term of the loss reads.

    Args:
        classes: of all queries.
        boxes, targets: (L, M, 4), predicted boxes of matched queries and their objects, cxcywh in [0, 1].
        counts: (B,), number of objects per image.
        normalizers: see [`LossNormalizers`].
    """

    classes: ClassTargets
    boxes: Tensor
    targets: Tensor
    counts: Tensor
    normalizers: LossNormalizers


class DetrLoss:
    """The loss of DETR (paper, section 3.1) for all decoder layers together, with everything that is supervised.

    Each layer is matched on its own (see `hungarian_matching`). Per layer:

        loss_ce   = class loss over all queries           see `class_loss.CLASS_LOSSES`; the paper's is
                    sum(w · cross_entropy) / sum(w), w = eos_coefficient for "no object" and 1 for the others, or
                    their `class_weights`
        loss_bbox = sum(|box - object|_1) / boxes         over matched pairs
        loss_giou = sum(1 - GIoU(box, object)) / boxes    over matched pairs

    and the loss is their weighted sum, `class_loss_coefficient`, `bbox_loss_coefficient` and `giou_loss_coefficient`.
    `boxes` is the number of objects in the batch, at least 1. It and `sum(w)` are averaged over processes, once (the
    paper's code averages `boxes` only). Denoising queries add the same terms with known objects in place of a matching,
    and `boxes` times the number of their groups in place of both normalizers. Dense supervision adds its own.

    A term is a method and an entry of `terms`: name -> (method, weight). A weight of None only reports the term.
    `mask_terms` are the same for the masks of a model that has a mask head, of the last layer only (paper, section
    4.4):

        loss_mask = sum(focal loss of a mask) / boxes     over matched pairs; see `mask_loss.focal_mask_loss`
        loss_dice = sum(dice loss of a mask) / boxes      over matched pairs; see `mask_loss.dice_loss`
    """

    def __init__(self, config: DetrConfig) -> None:
        config.validate_costs()  # fields may have been set since the model was made
        config.validate_weights()
        config.validate_class_weights()
        self.config = config
        self.terms: dict[str, tuple[Callable[[MatchedPredictions], Tensor], float | None]] = {
            "loss_ce": (self.class_term, config.class_loss_coefficient),
            "loss_bbox": (self.l1_term, config.bbox_loss_coefficient),
            "loss_giou": (self.giou_term, config.giou_loss_coefficient),
            "cardinality_error": (self.cardinality_error, None),
        }
        self.mask_terms: dict[str, tuple[Callable[[MaskPairs, LossNormalizers], Tensor], float]] = {
            "loss_mask": (self.mask_term, config.mask_loss_coefficient),
            "loss_dice": (self.dice_term, config.dice_loss_coefficient),
        }

    # -- the terms, each (L,) ------------------------------------------------------------------------------------------

    def class_term(self, matched: MatchedPredictions) -> Tensor:
        loss_of = class_loss_of(self.config.class_loss, self.config.class_activation)
        normalizers = matched.normalizers
        normalizer = normalizers.class_weight if loss_of.is_mean else normalizers.boxes
        return sum_class_loss(loss_of, matched.classes, normalizer, self.config.eos_coefficient)

    def l1_term(self, matched: MatchedPredictions) -> Tensor:
        return l1_distance(matched.boxes, matched.targets).sum(1) / matched.normalizers.boxes

    def giou_term(self, matched: MatchedPredictions) -> Tensor:
        return (1 - giou_of(matched.boxes, matched.targets)).sum(1) / matched.normalizers.boxes

    @torch.no_grad()
    def cardinality_error(self, matched: MatchedPredictions) -> Tensor:
        """Mean over images of |queries that predict an object - objects|."""
        detected = matched.classes.detected().sum(2)  # (L, B)
        return (detected - matched.counts).abs().sum(1) / matched.normalizers.images

    # -- the terms of masks, scalars -----------------------------------------------------------------------------------

    def mask_term(self, masks: MaskPairs, normalizers: LossNormalizers) -> Tensor:
        return focal_mask_loss(masks).sum() / normalizers.boxes

    def dice_term(self, masks: MaskPairs, normalizers: LossNormalizers) -> Tensor:
        return dice_loss(masks).sum() / normalizers.boxes

    # -- the sum -------------------------------------------------------------------------------------------------------

    def class_weights(self, device: torch.device) -> Tensor | None:
        """The config's `class_weights`, (num_labels+1,) with 1 for "no object"; None if it has none."""
        weights = self.config.class_weights
        if not weights:
            return None
        names = dict(sorted(self.config.id2label.items())).values()
        return torch.tensor([*(weights.get(name, 1.0) for name in names), 1.0], device=device)

    def count(self, labels: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Objects, weights of the cross-entropy and images of a batch, (3,). A matched query weighs as much as its
        class and any other `eos_coefficient`, whichever is matched, so that no prediction is needed to know the sum.
        (Of an image with more objects than queries, the mean of its classes counts.)"""
        objects = [len(label["class_labels"]) for label in labels]
        queries = self.config.num_predictions
        matched = sum(min(count, queries) for count in objects)
        others = len(objects) * queries - matched
        numbers = (sum(objects), matched + self.config.eos_coefficient * others, len(objects))
        counts = torch.tensor(numbers, dtype=torch.float32, device=device)
        weights = self.class_weights(device)
        if weights is not None:
            for label, count in zip(labels, objects, strict=True):
                above_one = weights[label["class_labels"].to(device)].sum() - count
                counts[1] += above_one * min(1.0, queries / max(count, 1))
        return counts

    def __call__(
        self,
        logits: Tensor,
        pred_boxes: Tensor,
        labels: list[dict[str, Any]],
        denoising: DenoisingQueries | None = None,
        dense: Callable[[list[dict[str, Any]], Tensor], dict[str, Tensor]] | None = None,
        normalizers: LossNormalizers | None = None,
        masks: Callable[[Matching], MaskPairs] | None = None,
    ) -> LossOutput:
        """Args:
            logits: (L, B, T, C) of L decoder layers, the last one last; C = num_labels + 1 where the last one is "no
                object", else num_labels. The first `num_predictions` of T
                predict, then come denoising queries. Computed in float32 or wider.
            pred_boxes: (L, B, T, 4) cxcywh in [0, 1] of the image without its padding.
            labels: one dict per image with `class_labels` (N,) and `boxes` (N, 4), on any device; see
                `hf_detr.model.annotations.check_labels`.
            denoising: how the denoising queries were made.
            dense: labels and number of boxes to the terms of [`~hf_detr.model.dense_supervision.DenseHead`].
            normalizers: of an optimizer step over several batches; None counts this batch, on all processes.
            masks: the matching of the last layer to the masks of its pairs.

        Returns:
            `loss_dict` has the terms of the last layer by name, those of earlier layers with `_0`, `_1`, ..., those of
            denoising queries with `_denoising`, and those of dense supervision with `_dense`.

        Raises:
            FloatingPointError: a prediction is NaN or infinite.
        """
        logits, pred_boxes = (t.float() if t.dtype.itemsize < 4 else t for t in (logits, pred_boxes))
        device = logits.device
        if normalizers is None:  # processes wait for each other here, before any of them can raise
            normalizers = LossNormalizers.from_counts(*sum_over_processes(self.count(labels, device)))
        classes = torch.cat([label["class_labels"] for label in labels]).to(device, torch.int64)
        boxes = torch.cat([label["boxes"] for label in labels]).to(device, pred_boxes.dtype)
        counts = [len(label["class_labels"]) for label in labels]

        layers, split = len(logits), logits.shape[2] - (0 if denoising is None else len(denoising.group))
        own_logits, own_boxes = logits[:, :, :split], pred_boxes[:, :, :split]
        matching = self.match(own_logits, own_boxes, classes, boxes, counts)
        weights = self.class_weights(device)
        objects = _Objects(classes, boxes, counts, self.config.num_labels)
        matched = _apply(matching, own_logits, own_boxes, objects, normalizers, None, weights)
        terms = {name: term(matched) for name, (term, _) in self.terms.items()}
        loss, loss_dict = self._weighted_sum(terms), _by_layer(terms)
        if denoising is not None:
            num_boxes = normalizers.boxes * denoising.num_groups
            known = Matching(denoising.image, *(t.expand(layers, -1) for t in (denoising.query, denoising.target)))
            matched = _apply(
                known, logits[:, :, split:], pred_boxes[:, :, split:], objects,
                LossNormalizers(num_boxes, num_boxes, normalizers.images), denoising.valid, weights,
            )  # fmt: skip
            terms = {name: term(matched) for name, (term, weight) in self.terms.items() if weight is not None}
            loss = loss + self._weighted_sum(terms)
            loss_dict |= {f"{name}_denoising": value for name, value in _by_layer(terms).items()}
        if dense is not None:
            dense_terms = dense(labels, normalizers.boxes)
            loss = loss + self.config.dense_loss_coefficient * self._weighted_sum(dense_terms)
            loss_dict |= {f"{name}_dense": value for name, value in dense_terms.items()}
        if masks is not None:
            pairs = masks(Matching(matching.image, matching.query[-1], matching.target[-1]))
            mask_terms = {name: term(pairs, normalizers) for name, (term, _) in self.mask_terms.items()}
            loss = loss + torch.stack([self.mask_terms[name][1] * value for name, value in mask_terms.items()]).sum()
            loss_dict |= mask_terms
        return LossOutput(loss, loss_dict, matching)

    def match(
        self, logits: Tensor, pred_boxes: Tensor, class_labels: Tensor, boxes: Tensor, counts: list[int]
    ) -> Matching:
        """`hungarian_matching` with the costs of the config."""
        config = self.config
        return hungarian_matching(
            logits, pred_boxes, class_labels, boxes, counts,
            class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost,
            class_loss=config.class_loss, class_activation=config.class_activation,
        )  # fmt: skip

    def _weighted_sum(self, terms: dict[str, Tensor]) -> Tensor:
        weights = {name: self.terms[name][1] for name in terms}
        weighted = [weight * terms[name].sum() for name, weight in weights.items() if weight is not None]
        return torch.stack(weighted).sum()


class _Objects(NamedTuple):
    """The objects of a batch, one image after the other: classes (N,), boxes (N, 4) and their number in each image."""

    classes: Tensor
    boxes: Tensor
    counts: list[int]
    num_labels: int


def _apply(
    matching: Matching,
    logits: Tensor,
    pred_boxes: Tensor,
    objects: _Objects,
    normalizers: LossNormalizers,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> MatchedPredictions:
    """Predictions (L, B, T, ...) beside the objects that they are matched to."""
    layer = torch.arange(len(logits), device=logits.device)[:, None]  # (L, 1) beside image (M,) and query (L, M)
    at = layer, matching.image, matching.query
    classes = torch.full(logits.shape[:3], objects.num_labels, dtype=torch.int64, device=logits.device)
    classes[at] = objects.classes[matching.target]
    predicted, targets = pred_boxes[at], objects.boxes[matching.target]  # (L, M, 4)
    quality = torch.zeros_like(classes, dtype=logits.dtype)
    quality[at] = iou_of(predicted.detach(), targets)
    return MatchedPredictions(
        ClassTargets(logits, objects.num_labels, classes, quality, valid, weights),
        predicted,
        targets,
        torch.tensor(objects.counts, device=logits.device),
        normalizers,
    )


def _by_layer(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms (L,) to scalars: the last layer's by the plain name, the earlier ones' with `_0`, `_1`, ..."""
    loss_dict = {name: values[-1] for name, values in terms.items()}
    for index in range(len(terms["loss_ce"]) - 1):
        loss_dict |= {f"{name}_{index}": values[index] for name, values in terms.items()}
    return loss_dict


def sum_over_processes(counts: Tensor) -> tuple[Tensor, int]:
    """The sum, and the number of processes. No transfer to the host."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts := counts.clone())
        return counts, dist.get_world_size()
    return counts, 1
