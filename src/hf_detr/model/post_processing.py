"""Step 8: the predictions of every query, turned into boxes in pixels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers.utils import ModelOutput

TOP_K = 100  # detections per image of independent scores; as published for Conditional and DAB-DETR


def class_probabilities(outputs: Any) -> Tensor:
    """Of a model's outputs, (B, Q, num_labels) in float32: their `class_probabilities`, or else the softmax over their
    `logits` without "no object"."""
    given: Tensor | None = getattr(outputs, "class_probabilities", None)
    if given is not None:
        return given.float()
    logits: Tensor = outputs.logits
    return logits.float().softmax(-1)[..., :-1]


def _num_labels(outputs: Any) -> int:
    given: Tensor | None = getattr(outputs, "class_probabilities", None)
    return outputs.logits.shape[-1] - 1 if given is None else given.shape[-1]


def to_host(outputs: Any) -> ModelOutput:
    """`logits`, `pred_boxes` and, if there are, `class_probabilities` of a model's outputs on the CPU, in float32,
    fetched in one piece: what comes after is a little work on many small tensors, each of which would wait for the
    device."""
    names = ["logits", "pred_boxes"]
    if getattr(outputs, "class_probabilities", None) is not None:
        names.append("class_probabilities")
    values = [getattr(outputs, name).float() for name in names]  # (B, Q, ...)
    fetched = torch.cat(values, dim=-1).cpu().split([value.shape[-1] for value in values], dim=-1)
    return ModelOutput(**dict(zip(names, fetched, strict=True)))


class Detections(NamedTuple):
    """The N best detections of each of B images: scores, class ids and query numbers (B, N), boxes (B, N, 4) xyxy in
    [0, 1], clipped to the image."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor


def best_detections(outputs: Any, top_k: int | None = None) -> Detections:
    """The detections of each image before any threshold.

    With the scores of a softmax, a query is one detection, of its best class (paper, section 4). With independent
    scores (`class_probabilities`), each class of each query is one, and the best of them count (Deformable DETR, arXiv
    2010.04159, as in its code).

    Args:
        outputs: with `logits` (B, Q, C), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the image without its padding, and
            `class_probabilities` (B, Q, num_labels) or None.
        top_k: the most detections per image; None: one per query, or 100 of independent scores.

    Returns:
        in the order of the queries, or with the best first where `top_k` applies.
    """
    probabilities = class_probabilities(outputs)  # (B, Q, C)
    boxes = box_convert(outputs.pred_boxes.float(), "cxcywh", "xyxy").clamp(0, 1)
    if getattr(outputs, "class_probabilities", None) is not None:
        ranked = probabilities.flatten(1)
        scores, index = ranked.topk(min(top_k or TOP_K, ranked.shape[1]), dim=1)
        queries, labels = index // probabilities.shape[-1], index % probabilities.shape[-1]
    else:
        scores, labels = probabilities.max(-1)
        if top_k is None:
            queries = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
            return Detections(scores, labels, boxes, queries)
        scores, queries = scores.topk(min(top_k, scores.shape[1]), dim=1)
        labels = labels.gather(1, queries)
    return Detections(scores, labels, boxes.gather(1, queries[..., None].expand(-1, -1, 4)), queries)


@torch.no_grad()
def post_process_detection(
    outputs: Any,
    threshold: float | Sequence[float] = 0.5,
    target_sizes: Tensor | list[tuple[int, int]] | None = None,
    top_k: int | None = None,
) -> list[dict[str, Tensor]]:
    """Detections more likely than `threshold`, as boxes within their image.

    Args:
        outputs, top_k: see [`best_detections`].
        threshold: a number that the score has to exceed, or one for each class that it has to reach.
        target_sizes: (height, width) of each image in pixels, before any resizing; None keeps boxes in [0, 1].

    Returns:
        one dict per image: `scores` (N,), `labels` (N,) and `boxes` (N, 4), xyxy, clipped to the image.

    Raises:
        ValueError: the number of target sizes is not the number of images, that of thresholds not of classes, or
            `top_k` is below 1.
    """
    images, num_labels = outputs.pred_boxes.shape[0], _num_labels(outputs)
    if target_sizes is not None and len(target_sizes) != images:
        raise ValueError(f"There are {images} images but {len(target_sizes)} target sizes.")
    if isinstance(threshold, Sequence) and len(threshold) != num_labels:
        raise ValueError(f"There are {num_labels} classes but {len(threshold)} thresholds.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    scores, labels, boxes, _ = best_detections(outputs, top_k)
    if target_sizes is not None:
        sizes = torch.stack([torch.as_tensor(size) for size in target_sizes]).to(boxes)  # also a list of tensors
        height, width = sizes.unbind(1)
        boxes = boxes * torch.stack((width, height, width, height), dim=1)[:, None]
    if isinstance(threshold, Sequence):
        keep = scores >= torch.tensor(threshold, dtype=scores.dtype, device=scores.device)[labels]
    else:
        keep = scores > threshold
    counts: list[Any] = keep.sum(1).tolist()
    parts = (scores[keep].split(counts), labels[keep].split(counts), boxes[keep].split(counts))
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(*parts, strict=True)]
