"""Step 4: the object queries of a batch: learned vectors or anchor boxes, and in training noised ground-truth
boxes; and which query attends to which."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

LABEL_NOISE = 0.2  # fraction of classes that are replaced by a random one (DN-DETR's code)
BOX_NOISE = 0.4  # largest shift and rescaling, as a fraction of the box (DN-DETR's code)
MIN_SIDE = 1e-3  # of a noised box, as a fraction of the image


class DenoisingQueries(NamedTuple):
    """T queries per image, made from ground-truth objects: `num_groups` noised copies, padded to the image with the
    most objects.

    Args:
        content: (B, T, d), an embedding of the noised class.
        boxes: (B, T, 4), noised, cxcywh in [0, 1].
        valid: (B, T) bool, False where an image has fewer objects.
        group: (T,), which copy a query belongs to, from 0.
        image, query, target: (M,), the ground truth of each query that is one: its image, its index among the T
            queries, and its object, counted through all objects of the batch.
    """

    content: Tensor
    boxes: Tensor
    valid: Tensor
    group: Tensor
    num_groups: int
    image: Tensor
    query: Tensor
    target: Tensor


class Queries(NamedTuple):
    """The object queries of a batch, T in all: the Q that predict, then, in training, denoising queries.

    Args:
        content: (B, T, d), what the decoder starts from.
        positions: (B, T, d), learned position embeddings; None if queries are boxes.
        boxes: (B, T, 4) cxcywh in [0, 1] of the image without its padding; None if queries are learned vectors.
        attention_mask: (B, 1, T, T) bool, True = attend; None: every query attends to every query.
        denoising: how the last ones were made, if there are any.
    """

    content: Tensor
    positions: Tensor | None
    boxes: Tensor | None
    attention_mask: Tensor | None = None
    denoising: DenoisingQueries | None = None

    def to(self, dtype: torch.dtype) -> "Queries":
        """Content and positions in the dtype of the features; boxes keep theirs, which has to hold coordinates."""
        positions = None if self.positions is None else self.positions.to(dtype)
        return self._replace(content=self.content.to(dtype), positions=positions)


def build_queries(
    embeddings: Tensor,
    batch_size: int,
    d_model: int,
    *,
    are_boxes: bool,
    denoising: DenoisingQueries | None = None,
    content: Tensor | None = None,
    patterns: Tensor | None = None,
) -> Queries:
    """The queries of a batch.

    Args:
        embeddings: the query parameters, (N, d) learned vectors, or (N, 4) `inverse_sigmoid(cxcywh)` if `are_boxes`.
        content: (B, Q, d), what the decoder starts from; None: the patterns, or zeros without them.
        patterns: (P, d), content vectors; every embedding is repeated for each of them: Q = P · N queries, all of one
            pattern, then all of the next (arXiv 2109.07107, section 3.2; DAB-DETR's code). None: Q = N.
    """
    if patterns is not None:
        if content is None:
            content = patterns.repeat_interleave(len(embeddings), dim=0).expand(batch_size, -1, -1)
        embeddings = embeddings.repeat(len(patterns), 1)
    positions = boxes = None
    if are_boxes:
        boxes = embeddings.float().sigmoid().expand(batch_size, -1, -1)
    else:
        positions = embeddings.expand(batch_size, -1, -1)
    if content is None:
        content = embeddings.new_zeros(batch_size, len(embeddings), d_model)
    if denoising is None:
        return Queries(content, positions, boxes)
    if boxes is None:
        raise ValueError("Denoising queries are boxes; they need a decoder whose queries are boxes.")
    valid = torch.cat((denoising.valid.new_ones(batch_size, len(embeddings)), denoising.valid), dim=1)
    group = torch.cat((denoising.group.new_zeros(len(embeddings)), denoising.group + 1))
    boxes = torch.cat((boxes, denoising.boxes), dim=1)
    content = torch.cat((content, denoising.content.to(content.dtype)), dim=1)
    return Queries(content, positions, boxes, group_mask(group, valid), denoising)


def group_mask(group: Tensor, valid: Tensor) -> Tensor:
    """Each query attends to the valid queries of its own group, and to itself.

    Args:
        group: (T,), the group of each query.
        valid: (B, T) bool.

    Returns:
        (B, 1, T, T) bool, True = attend.
    """
    same = (group[:, None] == group)[None, None]
    itself = torch.eye(len(group), dtype=torch.bool, device=group.device)
    return (same & valid[:, None, None]) | itself


class Denoising(nn.Module):
    """Training only: queries that start from a noised ground-truth object and have to restore it (DN-DETR, arXiv
    2203.01305). Their object is known, which matching does not tell other queries in the first epochs.

    Boxes: the centre moves by up to half of `BOX_NOISE` times width and height, both sides are scaled by 1 ±
    `BOX_NOISE`, and the result is clipped to the image (section 4.2). Classes: replaced by a random one with
    probability `LABEL_NOISE`.
    """

    def __init__(self, num_labels: int, d_model: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.class_embedding = nn.Embedding(num_labels, d_model)

    def forward(self, labels: list[dict[str, Any]]) -> DenoisingQueries:
        """`labels` as for the loss."""
        device, groups = self.class_embedding.weight.device, self.num_groups
        counts = [len(label["class_labels"]) for label in labels]
        size = max(counts)
        classes = pad_sequence([label["class_labels"].long() for label in labels], batch_first=True).to(device)
        boxes = pad_sequence([label["boxes"].float() for label in labels], batch_first=True, padding_value=0.5)
        present = torch.arange(size) < torch.tensor(counts)[:, None]  # (B, size), on the host
        classes, boxes, valid = (
            tensor.to(device).repeat(1, groups, *[1] * (tensor.ndim - 2)) for tensor in (classes, boxes, present)
        )
        flipped = torch.where(
            torch.rand(classes.shape, device=device) < LABEL_NOISE,
            torch.randint_like(classes, self.class_embedding.num_embeddings),
            classes,
        )
        image, query = present.repeat(1, groups).nonzero(as_tuple=True)
        first_object = torch.tensor([0, *counts]).cumsum(0)[:-1]
        target = first_object[image] + query % max(size, 1)
        return DenoisingQueries(
            content=self.class_embedding(flipped),
            boxes=_noised(boxes),
            valid=valid,
            group=torch.arange(groups, device=device).repeat_interleave(size),
            num_groups=groups,
            image=image.to(device),
            query=query.to(device),
            target=target.to(device),
        )


def _noised(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh to the same with noise."""
    noise = torch.rand(boxes.shape, device=boxes.device) * 2 - 1
    center = boxes[..., :2] + noise[..., :2] * boxes[..., 2:] * (BOX_NOISE / 2)
    size = boxes[..., 2:] * (1 + noise[..., 2:] * BOX_NOISE)
    corners = box_convert(torch.cat((center, size), dim=-1), "cxcywh", "xyxy").clamp(0, 1)
    center, size = box_convert(corners, "xyxy", "cxcywh").split(2, dim=-1)
    return torch.cat((center, size.clamp(min=MIN_SIDE)), dim=-1)
