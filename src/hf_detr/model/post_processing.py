"""Step 8: what the model says about every query, turned into boxes in pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers.utils import ModelOutput


def to_host(outputs: Any) -> ModelOutput:
    """`logits` and `pred_boxes` of a model's outputs on the CPU, in float32, fetched in one piece: what comes after is
    a little work on many small tensors, each of which would wait for the device."""
    fetched = torch.cat((outputs.logits.float(), outputs.pred_boxes.float()), dim=-1).cpu()  # (B, Q, C + 1 + 4)
    logits, boxes = fetched.split((fetched.shape[-1] - 4, 4), dim=-1)
    return ModelOutput(logits=logits, pred_boxes=boxes)


@torch.no_grad()
def post_process_detection(
    logits: Tensor,
    pred_boxes: Tensor,
    threshold: float | Sequence[float] = 0.5,
    target_sizes: Tensor | list[tuple[int, int]] | None = None,
) -> list[dict[str, Tensor]]:
    """Queries whose best class is more likely than `threshold`, as boxes within their image.

    Args:
        logits: (B, Q, num_labels+1); `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the image without its padding.
        threshold: a number that the score has to exceed, or one for each class that it has to reach.
        target_sizes: (height, width) of each image in pixels, before any resizing; None keeps boxes in [0, 1].

    Returns:
        one dict per image: `scores` (N,), `labels` (N,) and `boxes` (N, 4), xyxy, clipped to the image.

    Raises:
        ValueError: the number of target sizes is not the number of images, or that of thresholds not of classes.
    """
    if target_sizes is not None and len(target_sizes) != len(logits):
        raise ValueError(f"There are {len(logits)} images but {len(target_sizes)} target sizes.")
    num_labels = logits.shape[-1] - 1
    if isinstance(threshold, Sequence) and len(threshold) != num_labels:
        raise ValueError(f"There are {num_labels} classes but {len(threshold)} thresholds.")
    scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)
    boxes = box_convert(pred_boxes.float(), "cxcywh", "xyxy").clamp(0, 1)
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
