"""Step 5: the prediction heads, a class and a box per query, shared by all decoder layers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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
    """Three linear layers with ReLU between, and a sigmoid (section 3.2, "prediction feed-forward networks")."""

    def __init__(self, d_model: int, num_layers: int = 3) -> None:
        super().__init__([d_model] * num_layers + [4])

    def forward(self, hidden_states: Tensor, anchors: Tensor | None = None) -> Tensor:
        """(..., d_model) to boxes (..., 4): cxcywh in [0, 1] of the image without its padding.

        With `anchors` (..., 4), boxes in the same frame, the head predicts the change: sigmoid(head +
        inverse_sigmoid(anchor)).

        Runs in the precision of its weights whatever the autocast: bfloat16 has 256 values between 0.5 and 1, steps of
        3 pixels in an image of 800.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            offsets = super().forward(hidden_states.to(self._dtype(hidden_states)))
            return (offsets if anchors is None else offsets + inverse_sigmoid(anchors)).sigmoid()

    def _dtype(self, hidden_states: Tensor) -> torch.dtype:
        """Of the weights; of the input where weights are not floating point (quantised layers)."""
        weight = getattr(self.layers[0], "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
        return hidden_states.dtype


def build_class_head(d_model: int, num_labels: int) -> nn.Linear:
    """(..., d_model) to class logits (..., num_labels + 1); the last one is "no object"."""
    return nn.Linear(d_model, num_labels + 1)
