"""Where each object query puts its boxes (the paper's figure 7)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.collate import DetectionCollator
from ..evaluation.evaluation_loop import predict_batches
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.post_processing import class_probabilities
from ..runtime.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL_AREA = 0.05  # of the image; the paper gives no number
COLOURS = {"small": "tab:green", "large, wide": "tab:red", "large, tall": "tab:blue"}


def query_boxes(
    model: DetrForDetection, batches: Iterable[Mapping[str, Any]], *, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """The boxes of all queries in all images.

    Args:
        batches: with `pixel_values` and `pixel_mask`, as a `DataLoader` with [`DetectionCollator`] gives them.

    Returns:
        boxes (N, Q, 4), cxcywh in [0, 1] of each image, and scores (N, Q), the probability of the best class.
    """
    boxes, scores = [], []
    for _, outputs in predict_batches(model, batches, progress=progress, description="Images", masks=False):
        boxes.append(outputs.pred_boxes.float().cpu())
        scores.append(class_probabilities(outputs).amax(-1).cpu())
    return torch.cat(boxes), torch.cat(scores)


def query_slots(
    model: DetrForDetection,
    dataset: Any,
    processor: DetrImageProcessor,
    *,
    queries: Sequence[int] | None = None,
    num_images: int = 500,
    columns: int = 5,
    batch_size: int = 8,
    progress: bool = True,
) -> "Figure":
    """The centres of the boxes that each query predicts over the images of a data set, one panel per query: small boxes
    in green, large wide ones in red, large tall ones in blue. Learned queries and anchors specialise in regions and
    sizes. Proposals are chosen anew for each image, so their query number is a rank by confidence and not tied to a
    region.

    Args:
        dataset: in the schema of `hf_detr.data`.
        queries: their indices; default: the 20 whose score exceeds 0.5 in the most images, in that order.
        num_images: at most, spread evenly over the data set.

    Raises:
        ValueError: the data set is empty, or there is no such query.
        ImportError: matplotlib is not installed.
    """
    figure_class = import_extra("matplotlib.figure", "visualization").Figure
    if len(dataset) == 0:
        raise ValueError("The data set has no images.")
    wrong = [query for query in queries or () if not 0 <= query < model.config.num_predictions]
    if wrong:
        raise ValueError(f"There are {model.config.num_predictions} queries, numbered from 0, no number {wrong[0]}.")
    chosen = dataset.select(range(0, len(dataset), max(1, math.ceil(len(dataset) / num_images))))
    batches = DataLoader(chosen, batch_size=batch_size, collate_fn=DetectionCollator(processor))
    boxes, scores = query_boxes(model, batches, progress=progress)
    used = (scores > 0.5).float().mean(0)  # (Q,)
    shown = list(queries) if queries is not None else used.argsort(descending=True, stable=True)[:20].tolist()
    rows = math.ceil(len(shown) / columns)
    figure: Figure = figure_class(figsize=(2 * columns, 2.3 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, query in zip(panels, shown, strict=False):
        panel.set_axis_on()
        for name, of_kind in box_kinds(boxes[:, query]).items():
            x, y = boxes[of_kind, query, 0], boxes[of_kind, query, 1]
            panel.scatter(x, y, s=4, color=COLOURS[name], label=name, linewidths=0)
        panel.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
        panel.set_title(f"query {query}: {used[query]:.0%}", fontsize="small")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, markerscale=3, frameon=False)
    kind = "proposals, the most confident location first" if model.config.query_proposals else "object queries"
    title = f"Box centres in {len(boxes)} images by query ({kind}); %: images in which its score exceeds 0.5"
    figure.suptitle(title, fontsize="medium")
    return figure


def box_kinds(boxes: Tensor) -> dict[str, Tensor]:
    """Boxes (N, 4) cxcywh by size and shape, each a mask (N,) bool."""
    width, height = boxes[:, 2], boxes[:, 3]
    small = width * height < SMALL_AREA
    return {"small": small, "large, wide": ~small & (width >= height), "large, tall": ~small & (width < height)}
