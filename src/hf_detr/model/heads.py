"""Step 5: the prediction heads, a class and a box per query, shared by all decoder layers."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

MAX_LOG_SCALE = math.log(1000 / 16)  # log of the largest factor by which a refinement enlarges a side, as torchvision


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of numbers in [0, 1], clamped to [eps, 1 - eps] to stay finite."""
    values = values.clamp(eps, 1 - eps)
    return (values / (1 - values)).log()


class MLP(nn.Module):
    """Linear layers of the given widths (input first) with ReLU between."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., widths[0]) to (..., widths[-1])"""
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)


class BoxHead(MLP):
    """Three linear layers with ReLU between (section 3.2, "prediction feed-forward networks"). Without anchors, the box
    is the sigmoid of the output. With anchors (x, y, w, h), the output is four offsets (dx, dy, dw, dh), applied by one
    of two formulas:

    - `sigmoid(offsets + inverse_sigmoid(anchor))` (DAB-DETR, arXiv 2201.12329). The same offset moves a box farther in
      the middle of the image than near its edges, whatever the size of the box.
    - `relative`: `(x + dx · w, y + dy · h, w · e^dw, h · e^dh)`, clipped to [0, 1] (Faster R-CNN, arXiv 1506.01497,
      equation 2). The same offset means the same at every position and scale.
    """

    def __init__(self, d_model: int, num_layers: int = 3, *, relative: bool = False) -> None:
        super().__init__([d_model] * num_layers + [4])
        self.relative = relative

    def forward(self, hidden_states: Tensor, anchors: Tensor | None = None) -> Tensor:
        """(..., d_model) to boxes (..., 4): cxcywh in [0, 1] of the image without its padding.

        `anchors` (..., 4) are boxes in the same frame. Clipping to [0, 1] does not stop gradients (straight-through).

        Runs in the precision of its weights whatever the autocast: bfloat16 has 256 values between 0.5 and 1, steps of
        3 pixels in an image of 800.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            offsets = super().forward(hidden_states.to(self._dtype(hidden_states)))
            if anchors is None:
                return offsets.sigmoid()
            if not self.relative:
                return (offsets + inverse_sigmoid(anchors)).sigmoid()
            centers, sides = anchors.split(2, dim=-1)
            moved = centers + offsets[..., :2] * sides
            boxes = torch.cat((moved, sides * offsets[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()), dim=-1)
            return boxes + (boxes.clamp(0, 1) - boxes).detach()

    def _dtype(self, hidden_states: Tensor) -> torch.dtype:
        """Of the weights; of the input where weights are not floating point (quantised layers)."""
        weight = getattr(self.layers[0], "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
        return hidden_states.dtype


def build_class_head(d_model: int, num_labels: int, *, has_no_object: bool = True) -> nn.Linear:
    """(..., d_model) to class logits (..., num_labels + 1), the last one is "no object", or (..., num_labels)."""
    return nn.Linear(d_model, num_labels + has_no_object)
