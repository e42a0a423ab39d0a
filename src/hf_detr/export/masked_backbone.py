"""A backbone that takes a padded batch in one graph and still gives each image the features it has alone.

In PyTorch the backbone runs every image without its padding, which a graph with fixed steps cannot. In the graph,
padding is set to zero again before every layer that looks beyond an image's edge. Such a layer then reads the zeros
that it would read there if the image were alone, so all cells inside the image come out the same.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.backbone import Backbone

Grid = tuple[int, int]  # (rows, columns) of a feature map in the trial run, which tells one resolution from another


@dataclass(frozen=True)
class Step:
    """A layer turns one grid into the next: cell `i` of it is inside the image if cell `offset + i * stride` was."""

    source: Grid
    offset: tuple[int, int]
    stride: tuple[int, int]


@dataclass
class MaskPlan:
    """Where masks go.

    Attributes:
        steps: each further grid, in the order in which they come up.
        layers: names of the layers whose input is masked, and its grid.
        shares: of these, average pools that divide by how much of their window is image.
        end: grid of the feature map.
    """

    start: Grid
    steps: dict[Grid, Step] = field(default_factory=dict)
    layers: dict[str, Grid] = field(default_factory=dict)
    shares: set[str] = field(default_factory=set)
    end: Grid = (0, 0)


class _Unplannable(Exception):
    pass


def plan_masks(backbone: Backbone, in_channels: int) -> MaskPlan | None:
    """Read off a trial run without weights which layers look beyond the edge, and at which resolution.

    Returns:
        None where masks cannot help: a layer changes the size in a way that is not understood.
    """
    # neither side divides by anything, and the two stay apart at every stride
    start = 5 * backbone.stride + backbone.stride // 2 + 3, 7 * backbone.stride + 5
    plan = MaskPlan(start)
    known = {start}

    def note(name: str, layer: Any, inputs: Any, output: Tensor) -> None:
        grid: Grid = (inputs[0].shape[2], inputs[0].shape[3])
        following: Grid = (output.shape[2], output.shape[3])
        if grid not in known or plan.layers.get(name, grid) != grid:
            raise _Unplannable
        window = _Window(layer)
        if window.sizes(grid) != following:
            raise _Unplannable
        step = Step(grid, window.offset, window.stride)
        if following == grid:
            if step.stride != (1, 1) or step.offset != (0, 0):
                raise _Unplannable
        elif plan.steps.setdefault(following, step) != step:
            raise _Unplannable
        known.add(following)
        if window.looks_outside:
            plan.layers[name] = grid
        if window.counts_image:
            plan.shares.add(name)

    twin = _on_meta(backbone)
    for name, layer in twin.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            layer.register_forward_hook(lambda layer, inputs, output, name=name: note(name, layer, inputs, output))
    try:
        with torch.no_grad():
            features: Tensor = twin(torch.zeros(1, in_channels, *start, device="meta"))[0]
    except Exception:  # of whatever kind a network raises at an odd size or without weights; then masks cannot help
        return None
    height_first = getattr(twin, "output_fmt", None) == "NHWC"
    plan.end = (features.shape[1], features.shape[2]) if height_first else (features.shape[2], features.shape[3])
    return plan if plan.end in known else None


def _on_meta(backbone: Backbone) -> Any:
    """The network without weights, as it is now: its norms may have been folded since timm built it."""
    meta: dict[int, Any] = {}
    for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
        bare = tensor.detach().to("meta")
        meta[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return deepcopy(backbone.model, meta).eval()


class _Window:
    """The part of its input that a convolution or pool reads for one output cell, (rows, columns) each.

    Raises:
        _Unplannable: a kind of padding that is not zeros beyond the edge.
    """

    def __init__(self, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> None:
        if isinstance(layer.padding, str) or getattr(layer, "padding_mode", "zeros") != "zeros":
            raise _Unplannable
        kernel, dilation = _pair(layer.kernel_size), _pair(getattr(layer, "dilation", 1))
        self.stride, padding = _pair(layer.stride), _pair(layer.padding)
        self.ceil = bool(getattr(layer, "ceil_mode", False))
        # an output row i exists if i * stride + offset is a row of the input
        rounding = [stride - 1 if self.ceil else 0 for stride in self.stride]
        offset = [d * (k - 1) - 2 * p - r for d, k, p, r in zip(dilation, kernel, padding, rounding, strict=True)]
        if min(offset) < 0:
            raise _Unplannable  # rows that hold nothing of the image
        self.offset = (offset[0], offset[1])
        self.looks_outside = max(padding) > 0 or self.ceil
        include = getattr(layer, "count_include_pad", None)
        if include and self.ceil:
            raise _Unplannable
        self.counts_image = include is False and self.looks_outside

    def sizes(self, grid: Grid) -> Grid:
        rows, columns = (
            (size - 1 - offset) // stride + 1
            for size, offset, stride in zip(grid, self.offset, self.stride, strict=True)
        )
        return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)


class _Masks:
    """The masks of the batch that is under way, (B, 1, rows, columns) as 0 and 1. No module and no dict of one:
    `torch.export` forbids tensors to come and go there."""

    def __init__(self) -> None:
        self.grids: dict[Grid, Tensor] = {}

    def fill(self, mask: Tensor, plan: MaskPlan) -> None:
        self.grids = {plan.start: mask}
        for grid, step in plan.steps.items():
            source = self.grids[step.source][:, :, step.offset[0] :, step.offset[1] :]
            # a pool over single cells picks every n-th of them, and has its size in the words that the layer has:
            # `torch.export` does not know that (n + 1) // 2 is (n - 1) // 2 + 1
            self.grids[grid] = functional.max_pool2d(source, kernel_size=1, stride=step.stride)

    def hide_padding(self, grid: Grid) -> Any:
        return lambda layer, inputs: (inputs[0] * self.grids[grid], *inputs[1:])

    def count_image(self, grid: Grid) -> Any:
        def divide(layer: nn.AvgPool2d, inputs: Any, output: Tensor) -> Tensor:
            share = functional.avg_pool2d(
                self.grids[grid], layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, False
            )
            return output / share.clamp(min=1e-6)  # 0 / 0 where there is only padding

        return divide


class MaskedBackbone(nn.Module):
    """In a model's `backbone`'s place in a graph.

    Args:
        backbone: is taken over and changed: its layers get hooks.
        plan: from [`plan_masks`]; None leaves padding in, so that only batches without padding come out right.
    """

    def __init__(self, backbone: Backbone, plan: MaskPlan | None) -> None:
        super().__init__()
        self.network: Any = backbone.model
        self.channels, self.stride = backbone.channels, backbone.stride
        self.plan = plan
        self._masks = _Masks()
        for name, grid in plan.layers.items() if plan else ():
            layer = self.network.get_submodule(name)
            layer.register_forward_pre_hook(self._masks.hide_padding(grid))
            if plan and name in plan.shares:
                layer.register_forward_hook(self._masks.count_image(grid))

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and (B, H, W), 1 = image, to features (B, channels, h, w) and their mask (B, h, w), bool."""
        mask = pixel_mask.to(pixel_values.dtype)[:, None]
        if self.plan is not None:
            self._masks.fill(mask, self.plan)
        features: Tensor = self.network(pixel_values)[0]
        if getattr(self.network, "output_fmt", None) == "NHWC":
            features = features.permute(0, 3, 1, 2)
        if self.plan is None:
            mask = functional.interpolate(mask, size=features.shape[-2:])
        else:
            mask = self._masks.grids[self.plan.end]
            self._masks.grids.clear()
        return features, mask[:, 0] > 0.5
