"""Step 3: the position of each location of the feature map, as a vector that is added to queries and keys.

Both kinds count rows and columns within each image: with a mask, padding is not counted, so an image gets the same
embedding alone and beside larger ones.
"""

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0  # of DETR and Conditional DETR, as for text
LOW_TEMPERATURE = 20.0  # DAB-DETR, section 4.4: lower than for text, since a feature map has few locations

MAX_CACHED = 2**24  # float32 values that are cached, 64 MiB; an image of 800 x 1066 at stride 32 has 0.2 million


class SinePositionEmbedding(nn.Module):
    """Fixed sines and cosines of the normalised row and column (paper, section A.4).

    With `p = 2π · row / rows` (rows counted from 1) the vector is `sin(p / 10000^(2i/n)), cos(p / 10000^(2i/n))` for
    `i < n/2`, `n = d_model / 2`: first for the row, then the same for the column. Nothing is learned or stored.

    Args:
        d_model: length of the vector, a multiple of 4.
        temperature: 10000 in the paper. The lower, the more the vectors of neighbouring locations differ.
        centered: positions are the centres of locations (rows counted from 0.5), as for boxes.
    """

    def __init__(
        self, d_model: int, temperature: float = TEMPERATURE, scale: float = 2 * math.pi, centered: bool = False
    ) -> None:
        super().__init__()
        self.features = d_model // 2
        self.temperature = temperature
        self.scale = scale
        self.first = 0.5 if centered else 1.0
        self._cache: dict[tuple[int, int, torch.device], Tensor] = {}  # embeddings of grids without padding

    def forward(self, height: int, width: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Embedding of a (height, width) grid.

        Args:
            mask: (B, height, width) bool, True where there is image, or None if all images fill the grid.

        Returns:
            (B, height*width, d_model) float32; B is 1 without a mask.
        """
        if mask is not None:
            return self._embed(mask)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return self._embed(torch.ones(1, height, width, dtype=torch.bool, device=device))
        key = (height, width, device)
        embedding = self._cache.get(key)
        if embedding is None:
            with torch.inference_mode(False):  # the cached tensor may be used in training later
                embedding = self._embed(torch.ones(1, height, width, dtype=torch.bool, device=device))
            if sum(cached.numel() for cached in list(self._cache.values())) + embedding.numel() > MAX_CACHED:
                self._cache = {}
            self._cache[key] = embedding
        return embedding

    def _embed(self, mask: Tensor) -> Tensor:
        rows = mask.cumsum(1, dtype=torch.float32)
        columns = mask.cumsum(2, dtype=torch.float32)
        rows = (rows + (self.first - 1)) / (rows[:, -1:, :] + 1e-6) * self.scale
        columns = (columns + (self.first - 1)) / (columns[:, :, -1:] + 1e-6) * self.scale
        waves = [sine_waves(position, self.features, self.temperature) for position in (rows, columns)]
        return torch.cat(waves, dim=-1).flatten(1, 2)


def sine_waves(position: Tensor, features: int, temperature: float) -> Tensor:
    """(...) angles to (..., features): sines and cosines of `position / temperature^(2i/features)`. Neighbours share a
    frequency: exponents are 0, 0, 2, 2, 4, 4, ...; one takes its sine, the other its cosine."""
    exponent = 2 * torch.arange(features // 2, dtype=torch.float32, device=position.device) / features
    angle = position[..., None] / temperature**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def box_waves(boxes: Tensor, features: int, temperature: float) -> Tensor:
    """Centres (..., 2) or boxes (..., 4), cxcywh in [0, 1], to the sines of y, x (, w and h), `features` each; those of
    y and x are the position embedding that an image has at that centre."""
    order = [1, 0, *range(2, boxes.shape[-1])]
    return sine_waves(boxes[..., order] * (2 * math.pi), features, temperature).flatten(-2)


class LearnedPositionEmbedding(nn.Module):
    """A learned vector per row and per column, as in the paper's code, for a grid of any size.

    Up to `table_size` rows, row `i` reads entry `i`. The rows of a larger image are spread evenly over the
    table, with linear interpolation between the two nearest entries, so that no grid is out of range. Columns alike.

    Args:
        d_model: length of the vector; half comes from the column, half from the row.
        table_size: learned entries per axis, 50 in the paper's code.
    """

    def __init__(self, d_model: int, table_size: int = 50) -> None:
        super().__init__()
        self.row_embeddings = nn.Embedding(table_size, d_model // 2)
        self.column_embeddings = nn.Embedding(table_size, d_model // 2)

    @staticmethod
    def _look_up(table: nn.Embedding, length: int, sizes: Tensor) -> Tensor:
        """(table_size, d/2) and the images' own sizes (B,) to entries 0 ... length-1, (B, length, d/2)."""
        last = table.num_embeddings - 1
        step = torch.where(sizes > last + 1, last / (sizes - 1).clamp(min=1), torch.ones_like(sizes))
        position = (torch.arange(length, device=sizes.device) * step[:, None]).clamp(max=last)  # (B, length)
        lower = position.floor().long()
        below, above = table(lower), table((lower + 1).clamp(max=last))
        fraction = (position - lower)[..., None].to(below.dtype)
        return below * (1 - fraction) + above * fraction

    def forward(self, height: int, width: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Embedding of a (height, width) grid, (B, height*width, d_model); arguments as for the sine embedding."""
        if mask is None:
            rows = torch.ones(1, height, device=device).sum(1)  # in a graph, a size is no number
            columns = torch.ones(1, width, device=device).sum(1)
        else:
            rows = mask.any(2).sum(1, dtype=torch.float32)
            columns = mask.any(1).sum(1, dtype=torch.float32)
        y = self._look_up(self.row_embeddings, height, rows)
        x = self._look_up(self.column_embeddings, width, columns)
        x = x[:, None].expand(-1, height, -1, -1)
        y = y[:, :, None].expand(-1, -1, width, -1)
        return torch.cat((x, y), dim=-1).flatten(1, 2)


def build_position_embedding(kind: str, d_model: int, *, temperature: float, centered: bool) -> nn.Module:
    """The module of a kind, `"sine"` or `"learned"`; the others are arguments of the sines.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "sine":
        return SinePositionEmbedding(d_model, temperature=temperature, centered=centered)
    if kind == "learned":
        return LearnedPositionEmbedding(d_model)
    raise ValueError(f'`position_embedding_type` must be "sine" or "learned", got {kind!r}.')
