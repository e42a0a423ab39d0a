"""Step 5: what each query says: a class, and a box. The same two heads serve every decoder layer."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class BoxHead(nn.Module):
    """Three linear layers with ReLU between (paper, section 3.2, "prediction feed-forward networks")."""

    def __init__(self, d_model: int, num_layers: int = 3) -> None:
        super().__init__()
        widths = [d_model] * num_layers + [4]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d_model) to boxes (..., 4): cxcywh in [0, 1] of the image without its padding.

        Runs in the precision of its weights whatever the autocast: bfloat16 knows 256 places between 0.5 and 1, steps
        of 3 pixels in an image of 800.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(next(self.parameters()).dtype)
            for layer in self.layers[:-1]:
                hidden_states = layer(hidden_states).relu()
            return self.layers[-1](hidden_states).sigmoid()


def build_class_head(d_model: int, num_labels: int) -> nn.Linear:
    """(..., d_model) to class logits (..., num_labels + 1); the last one is "no object"."""
    return nn.Linear(d_model, num_labels + 1)
