"""Step 7: the set loss: matched queries owe class and box of their object, all others owe "no object"."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import cxcywh_to_xyxy, giou
from .matcher import hungarian_matching

BOX_TOLERANCE = 1e-5  # rounding of float32 divisions by the image size


def check_labels(labels: list[dict[str, Any]], num_labels: int, batch_size: int) -> None:
    """Refuse labels that would train something else than what was meant.

    Args:
        labels: one dict an image with `class_labels` (N,), integers in [0, num_labels), and `boxes` (N, 4), cxcywh in
            [0, 1] of the image without its padding, with positive width and height.

    Raises:
        ValueError: names the image of the batch, the box and the fix.
    """
    if len(labels) != batch_size:
        raise ValueError(f"There are {batch_size} images in the batch but {len(labels)} labels.")
    for image, label in enumerate(labels):
        missing = {"class_labels", "boxes"} - set(label)
        if missing:
            raise ValueError(f"{_where(labels, image)}: the label lacks {sorted(missing)}; it has {sorted(label)}.")
        ids, boxes = label["class_labels"], label["boxes"]
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1:
            raise ValueError(
                f"{_where(labels, image)}: `class_labels` must be a list of integers, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        if boxes.shape != (len(ids), 4):
            raise ValueError(
                f"{_where(labels, image)}: `boxes` must be ({len(ids)}, 4) to fit `class_labels`, got "
                f"{tuple(boxes.shape)}."
            )
    ids = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    if len(ids) == 0:
        return
    wrong = torch.stack(
        (
            (ids < 0) | (ids >= num_labels),
            ~boxes.isfinite().all(1),
            ((boxes < -BOX_TOLERANCE) | (boxes > 1 + BOX_TOLERANCE)).any(1),
            (boxes[:, 2:] <= 0).any(1),
        )
    )
    if not wrong.any():  # the only transfer from the device
        return
    reasons = (
        f"the class id is not in [0, {num_labels}). Ids count from 0, and the config's `id2label` must name them all",
        "the box is not finite",
        "the box is not within [0, 1]. Boxes are (center x, center y, width, height) divided by the image's width and "
        "height; pixel values belong into the image processor's `annotations`",
        "the box has no area. Remove it from the data",
    )
    kind, row = wrong.nonzero()[0].tolist()
    owners = [(image, box) for image, label in enumerate(labels) for box in range(len(label["class_labels"]))]
    image, position = owners[row]
    raise ValueError(
        f"{_where(labels, image)}, box {position}: {reasons[kind]}. "
        f"Class id {int(ids[row])}, box {[round(value, 4) for value in boxes[row].tolist()]}."
    )


def _where(labels: list[dict[str, Any]], image: int) -> str:
    image_id = labels[image].get("image_id")
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = image_id.item()
    return f"Image {image} of the batch" + ("" if image_id is None else f" (image_id {image_id})")


def average_over_processes(count: int, device: torch.device) -> Tensor:
    """Number of boxes in the batch, averaged over processes, at least 1, as a scalar on `device`.

    Gradients are averaged over processes too, so that together they give the loss of the whole global batch divided
    by all of its boxes. No transfer to the host.
    """
    boxes = torch.tensor(float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(boxes)
        boxes = boxes / dist.get_world_size()
    return boxes.clamp(min=1)


def set_loss(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: list[dict[str, Any]],
    *,
    class_cost: float = 1.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    bbox_loss_coefficient: float = 5.0,
    giou_loss_coefficient: float = 2.0,
    eos_coefficient: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of DETR (paper, section 3.1), for all decoder layers together.

    Each layer is matched on its own (see `hungarian_matching`). Per layer, with `w = eos_coefficient` for queries whose
    target is "no object" and 1 for the others:

        loss_ce   = sum(w · cross_entropy) / sum(w)                over all queries of the batch
        loss_bbox = sum(|box - object|_1) / boxes                  over matched pairs
        loss_giou = sum(1 - GIoU(box, object)) / boxes             over matched pairs
        loss     += loss_ce + bbox_loss_coefficient · loss_bbox + giou_loss_coefficient · loss_giou

    `boxes` is the number of objects in the batch, averaged over processes once, at least 1.

    Args:
        logits: (L, B, Q, num_labels+1) of L decoder layers, the last one last; computed in float32 or wider.
        pred_boxes: (L, B, Q, 4) cxcywh in [0, 1] of the image without its padding.
        labels: one dict an image with `class_labels` (N,) and `boxes` (N, 4), on any device; see `check_labels`.

    Returns:
        the weighted sum over layers, and the unweighted terms by name: `loss_ce`, `loss_bbox`, `loss_giou` and
        `cardinality_error` (for logging: mean |queries that are not "no object" - objects|) of the last layer, and
        the same with `_0`, `_1`, ... of the earlier ones. The terms carry gradients; `cardinality_error` does not.

    Raises:
        FloatingPointError: a prediction is NaN or infinite.
    """
    logits, pred_boxes = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (logits, pred_boxes))
    layers, _, _, classes = logits.shape
    device = logits.device
    counts = [len(label["class_labels"]) for label in labels]
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
    )
    layer = torch.arange(layers, device=device)[:, None]  # (L, 1) beside image (M,) and query (L, M)
    num_boxes = average_over_processes(sum(counts), device)

    no_object = classes - 1
    target_classes = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=device)
    target_classes[layer, image, query] = class_labels[target]
    log_likelihood = logits.log_softmax(-1).gather(-1, target_classes[..., None])[..., 0]  # (L, B, Q)
    weight = torch.where(target_classes == no_object, eos_coefficient, 1.0).to(logits.dtype)
    loss_ce = -(weight * log_likelihood).sum((1, 2)) / weight.sum((1, 2))

    matched, objects = pred_boxes[layer, image, query], boxes[target]  # (L, M, 4)
    loss_bbox = (matched - objects).abs().sum((1, 2)) / num_boxes
    loss_giou = (1 - giou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(objects))).sum(1) / num_boxes

    with torch.no_grad():
        found = (logits.argmax(-1) != no_object).sum(2)  # (L, B)
        cardinality_error = (found - torch.tensor(counts, device=device)).abs().to(logits.dtype).mean(1)

    loss = (loss_ce + bbox_loss_coefficient * loss_bbox + giou_loss_coefficient * loss_giou).sum()
    terms = {
        "loss_ce": loss_ce,
        "loss_bbox": loss_bbox,
        "loss_giou": loss_giou,
        "cardinality_error": cardinality_error,
    }
    loss_dict = {name: values[-1] for name, values in terms.items()}
    for index in range(layers - 1):
        loss_dict |= {f"{name}_{index}": values[index] for name, values in terms.items()}
    return loss, loss_dict
