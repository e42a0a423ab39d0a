"""Step 6: which prediction is responsible for which object: a bipartite matching per image and per decoder layer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import is_scipy_available

from .box_loss import giou_of, l1_distance
from .class_loss import class_loss_of

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment


class Matching(NamedTuple):
    """M pairs of a query and an object, for each of L layers.

    Args:
        image: (M,), index of the image in the batch.
        query: (L, M), index among the queries of that image.
        target: (L, M), index among the objects of the batch, one image after the other.
    """

    image: Tensor
    query: Tensor
    target: Tensor


def matching_costs(
    logits: Tensor,
    pred_boxes: Tensor,
    class_labels: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    *,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    class_loss: str = "cross_entropy",
    class_activation: str = "softmax",
) -> Tensor:
    """Cost of matching every query of an image to every object *of that image* (paper, sections 3.1 and A.2).

    `cost = class_cost · (-p[class]) + bbox_cost · |box - object|_1 + giou_cost · (-GIoU)`. The paper's class term is
    `1 - p`; the constant 1 does not change the matching. Other class losses have class costs of their own
    ([`~hf_detr.model.class_loss.CLASS_LOSSES`]).

    Args:
        logits: (L, B, Q, C) of L decoder layers, whose scores `class_activation` defines; `pred_boxes` (L, B, Q, 4)
            cxcywh in [0, 1].
        class_labels: (T,) of all T objects of the batch; `boxes` (T, 4) cxcywh in [0, 1]; `image_index` (T,), the
            image of the batch each belongs to.

    Returns:
        (L, T, Q)
    """
    every = logits.sigmoid() if class_activation == "sigmoid" else logits.softmax(-1)
    probabilities = every[:, image_index, :, class_labels].transpose(0, 1)  # (L, T, Q)
    predicted = pred_boxes[:, image_index]  # (L, T, Q, 4)
    objects = boxes[:, None]  # (T, 1, 4)
    cost = class_cost * class_loss_of(class_loss, class_activation).cost(probabilities)
    return cost + bbox_cost * l1_distance(predicted, objects) - giou_cost * giou_of(predicted, objects)


@torch.no_grad()
def hungarian_matching(
    logits: Tensor,
    pred_boxes: Tensor,
    class_labels: Tensor,
    boxes: Tensor,
    counts: Sequence[int],
    *,
    class_cost: float = 1.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    class_loss: str = "cross_entropy",
    class_activation: str = "softmax",
) -> Matching:
    """Optimal one-to-one matching of queries to objects for all decoder layers and images of a batch.

    Costs are computed within an image only, for all layers at once; they cross from the device to the host in one
    transfer, together with the check that every prediction is finite.

    Args:
        logits: (L, B, Q, C), float32 or wider; `pred_boxes` (L, B, Q, 4) cxcywh in [0, 1].
        class_labels: (T,) objects of all images, one image after the other; `boxes` (T, 4) cxcywh in [0, 1].
        counts: number of objects of each image, B numbers that sum to T.

    Returns:
        indices, int64, on the device of `logits`. `M` is the sum of min(Q, count) over images: with more objects than
        queries the cheapest assignment has no query for some of the objects.

    Raises:
        FloatingPointError: some prediction is NaN or infinite; the message says which, where and in which layer.
    """
    layers, _, queries = logits.shape[:3]
    device = logits.device
    image_index = torch.repeat_interleave(
        torch.arange(len(counts), device=device), torch.tensor(counts, device=device), output_size=sum(counts)
    )
    costs = matching_costs(
        logits,
        pred_boxes,
        class_labels,
        boxes,
        image_index,
        class_cost=class_cost,
        bbox_cost=bbox_cost,
        giou_cost=giou_cost,
        class_loss=class_loss,
        class_activation=class_activation,
    )
    finite = logits.isfinite().all() & pred_boxes.isfinite().all()
    on_host = torch.cat((costs.flatten(), finite.to(costs.dtype)[None])).cpu().numpy()
    if not on_host[-1]:
        raise FloatingPointError(_describe_non_finite(logits, pred_boxes))
    table = on_host[:-1].reshape(layers, -1, queries)

    query_index: list[list[np.ndarray]] = [[] for _ in range(layers)]
    object_index: list[list[np.ndarray]] = [[] for _ in range(layers)]
    matched_image = []
    start = 0
    for image, count in enumerate(counts):
        for layer in range(layers):
            rows, columns = linear_sum_assignment(table[layer, start : start + count])
            query_index[layer].append(columns)
            object_index[layer].append(rows + start)
        matched_image.append(np.full(min(count, queries), image))
        start += count
    matched = np.stack(
        [np.concatenate(matched_image)] * layers
        + [np.concatenate(indices) for indices in query_index]
        + [np.concatenate(indices) for indices in object_index]
    )
    image, query, target = torch.from_numpy(matched.astype(np.int64)).to(device).split(layers)
    return Matching(image[0], query, target)


def _describe_non_finite(logits: Tensor, pred_boxes: Tensor) -> str:
    for name, tensor in (("logits", logits), ("pred_boxes", pred_boxes)):
        bad = ~tensor.isfinite()
        if bad.any():
            layer, image, query = bad.nonzero()[0, :3].tolist()
            kind = "NaN" if tensor.isnan().any() else "infinite"
            return (
                f"`{name}` is {kind} in {int(bad.sum())} of {tensor.numel()} values, first in decoder layer {layer}, "
                f"image {image} of the batch, query {query}. The model has diverged or its weights or inputs are not "
                "finite: look for NaN in pixel_values, lower the learning rate, or avoid float16."
            )
    return "A prediction is not finite."
