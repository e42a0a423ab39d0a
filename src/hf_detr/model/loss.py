"""Step 7: the set loss: matched queries owe class and box of their object, all others owe "no object"."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import cxcywh_to_xyxy, giou, iou
from .class_loss import class_loss as judge_classes
from .denoising import DenoisingQueries
from .matcher import hungarian_matching


@dataclass
class LossNormalizers:
    """What the sums of the loss are divided by, scalars on the device of the model. Each is a count over everything
    that one optimizer step learns from, divided by the number of processes, since gradients are averaged over them; so
    neither processes nor accumulation change the loss of the whole.

    Args:
        boxes: objects; of all together at least 1.
        class_weight: weights of the cross-entropy, over all queries.
        images: in the batches.
        cells: of the feature maps that have an object, of all together at least 1; None where they are counted in the
            forward pass.
    """

    boxes: Tensor
    class_weight: Tensor
    images: Tensor
    cells: Tensor | None = None

    @classmethod
    def from_counts(cls, counts: Tensor, num_processes: int) -> "LossNormalizers":
        """Of the counts (3,) that [`count_for_loss`] gives, or (4,) with cells, summed over batches and processes."""
        boxes, class_weight, images, *cells = counts.unbind()
        parts = (boxes.clamp(min=1), class_weight, images, *(c.clamp(min=1) for c in cells))
        return cls(*(part / num_processes for part in parts))


def count_for_loss(counts: list[int], num_queries: int, eos_coefficient: float, device: torch.device) -> Tensor:
    """Boxes, weights of the cross-entropy and images (3,) of a batch with this many objects an image. A query that is
    matched weighs 1 and another `eos_coefficient`, whichever is matched, so that no prediction is needed to know."""
    matched = sum(min(count, num_queries) for count in counts)
    others = len(counts) * num_queries - matched
    numbers = (sum(counts), matched + eos_coefficient * others, len(counts))
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def sum_over_processes(counts: Tensor) -> tuple[Tensor, int]:
    """The sum, and the number of processes. No transfer to the host."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts := counts.clone())
        return counts, dist.get_world_size()
    return counts, 1


def set_loss(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: list[dict[str, Any]],
    *,
    class_cost: float = 1.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    class_loss_coefficient: float = 1.0,
    bbox_loss_coefficient: float = 5.0,
    giou_loss_coefficient: float = 2.0,
    eos_coefficient: float = 0.1,
    class_loss: str = "cross_entropy",
    query_groups: int = 1,
    denoised: tuple[Tensor, Tensor, DenoisingQueries] | None = None,
    normalizers: LossNormalizers | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of DETR (paper, section 3.1), for all decoder layers together.

    Each layer is matched on its own (see `hungarian_matching`). Per layer:

        loss_ce   = class loss over all queries of the batch       see `class_loss.class_loss`; the paper's is
                    sum(w · cross_entropy) / sum(w), w = eos_coefficient for "no object" and 1 for the others
        loss_bbox = sum(|box - object|_1) / boxes                  over matched pairs
        loss_giou = sum(1 - GIoU(box, object)) / boxes             over matched pairs
        loss     += class_loss_coefficient · loss_ce + bbox_loss_coefficient · loss_bbox
                    + giou_loss_coefficient · loss_giou

    `boxes` is the number of objects in the batch, at least 1. It and `sum(w)` are averaged over processes, once (the
    paper's code averages `boxes` only). With query groups each group is matched and judged like this, and terms are
    means over groups. Denoising queries add the same terms, with the objects they were made from in place of a
    matching, and `boxes` times the number of copies in place of both.

    Args:
        logits: (L, B, query_groups * Q, num_labels+1) of L decoder layers, the last one last; computed in float32 or
            wider.
        pred_boxes: (L, B, query_groups * Q, 4) cxcywh in [0, 1] of the image without its padding.
        labels: one dict an image with `class_labels` (N,) and `boxes` (N, 4), on any device; see `check_labels`.
        denoised: logits (L, B, T, num_labels+1) and boxes (L, B, T, 4) of denoising queries, and what they are.
        normalizers: for an optimizer step over several batches; None counts this batch, on all processes.

    Returns:
        the weighted sum over layers, and the unweighted terms by name: `loss_ce`, `loss_bbox`, `loss_giou` and, for
        logging, `cardinality_error` (mean |queries that are not "no object" - objects|) of the last layer, the same
        with `_0`, `_1`, ... of the earlier ones, and the losses with `_denoising` of the denoising queries. Losses
        carry gradients; `cardinality_error` does not.

    Raises:
        FloatingPointError: a prediction is NaN or infinite.
    """
    logits, pred_boxes = (_widen(t) for t in (logits, pred_boxes))
    layers, device, no_object = len(logits), logits.device, logits.shape[-1] - 1
    counts = [len(label["class_labels"]) for label in labels]
    if normalizers is None:  # processes meet here, before any of them can find fault with its predictions
        mine = count_for_loss(counts, logits.shape[2] // query_groups, eos_coefficient, device)
        normalizers = LossNormalizers.from_counts(*sum_over_processes(mine))
    num_boxes = normalizers.boxes
    # (L, B, G·Q, ...) to (L·G, B, Q, ...): to the matching a group is one more prediction, like a layer
    logits, pred_boxes = (
        t.unflatten(2, (query_groups, -1)).movedim(2, 1).flatten(0, 1) if query_groups > 1 else t
        for t in (logits, pred_boxes)
    )
    class_labels = torch.cat([label["class_labels"] for label in labels]).to(device, torch.int64)
    boxes = torch.cat([label["boxes"] for label in labels]).to(device, pred_boxes.dtype)
    image, query, target = hungarian_matching(
        logits,
        pred_boxes,
        class_labels,
        boxes,
        counts,
        class_cost=class_cost,
        bbox_cost=bbox_cost,
        giou_cost=giou_cost,
        class_loss=class_loss,
    )
    layer = torch.arange(len(logits), device=device)[:, None]  # (L, 1) beside image (M,) and query (L, M)

    target_classes = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=device)
    target_classes[layer, image, query] = class_labels[target]
    matched, objects = cxcywh_to_xyxy(pred_boxes[layer, image, query]), cxcywh_to_xyxy(boxes[target])  # (L, M, 4)
    with torch.no_grad():
        quality = torch.zeros_like(target_classes, dtype=logits.dtype)
        quality[layer, image, query] = iou(matched, objects)
        found = (logits.argmax(-1) != no_object).sum(2)  # (L, B)
    terms = {
        "loss_ce": judge_classes(
            class_loss,
            logits,
            target_classes,
            quality,
            normalizers.class_weight if class_loss == "cross_entropy" else num_boxes,
            eos_coefficient=eos_coefficient,
        ),
        "loss_bbox": (pred_boxes[layer, image, query] - boxes[target]).abs().sum((1, 2)) / num_boxes,
        "loss_giou": (1 - giou(matched, objects)).sum(1) / num_boxes,
        "cardinality_error": (found - torch.tensor(counts, device=device)).abs().sum(1) / normalizers.images,
    }
    loss_dict = _by_layer({name: values.unflatten(0, (layers, -1)).mean(1) for name, values in terms.items()})
    if denoised is not None:
        of_denoising = _denoising_terms(*denoised, class_loss, num_boxes)
        loss_dict |= {f"{name}_denoising": value for name, value in _by_layer(of_denoising).items()}
    coefficients = {
        "loss_ce": class_loss_coefficient,
        "loss_bbox": bbox_loss_coefficient,
        "loss_giou": giou_loss_coefficient,
    }
    weighted = [
        coefficient * value
        for term, coefficient in coefficients.items()
        for name, value in loss_dict.items()
        if name.startswith(term)
    ]
    return torch.stack(weighted).sum(), loss_dict


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _by_layer(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms (L,) to scalars: the last layer's by the plain name, the earlier ones' with `_0`, `_1`, ..."""
    loss_dict = {name: values[-1] for name, values in terms.items()}
    for index in range(len(terms["loss_ce"]) - 1):
        loss_dict |= {f"{name}_{index}": values[index] for name, values in terms.items()}
    return loss_dict


def _denoising_terms(
    logits: Tensor, pred_boxes: Tensor, queries: DenoisingQueries, class_loss: str, num_boxes: Tensor
) -> dict[str, Tensor]:
    """Each term of the loss, (L,), for queries that know their object."""
    logits, pred_boxes = _widen(logits), _widen(pred_boxes)
    valid, objects = queries.valid, queries.target_boxes.to(pred_boxes.dtype)
    num_boxes = num_boxes * queries.copies
    a, b = cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(objects)
    return {
        "loss_ce": judge_classes(
            class_loss,
            logits,
            queries.target_classes.expand(logits.shape[:3]),
            iou(a, b).detach(),
            num_boxes,
            eos_coefficient=1.0,
            valid=valid,
        ),
        "loss_bbox": ((pred_boxes - objects).abs().sum(-1) * valid).sum((1, 2)) / num_boxes,
        "loss_giou": ((1 - giou(a, b)) * valid).sum((1, 2)) / num_boxes,
    }
