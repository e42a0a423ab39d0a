"""A backbone whose features do not depend on padding, as one graph.

In PyTorch the backbone runs each image without its padding, which a static graph cannot do. In the graph, padding is
set to zero before every layer whose window crosses the image's edge. Such a layer then reads zeros there, as if the
image were alone, so the features at all locations inside the image are the same.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.backbone import Backbone, FeatureLevel
from ..model.timm_network import channels_first

Grid = tuple[int, int]  # (rows, columns) of a feature map in the trial run; identifies a resolution


@dataclass(frozen=True)
class Step:
    """How a layer maps one grid to the next: location `i` is inside the image if `offset + i * stride` was."""

    source: Grid
    offset: tuple[int, int]
    stride: tuple[int, int]


@dataclass
class MaskPlan:
    """Which layers need masks.

    Attributes:
        start: grid of the input image.
        steps: how each further grid is computed, in order.
        layers: names of the layers whose input is masked, with the grid of that input.
        averages: those that are average pools which exclude padding from their average.
        ends: grids of the feature maps, shallow to deep.
    """

    start: Grid
    steps: dict[Grid, Step] = field(default_factory=dict)
    layers: dict[str, Grid] = field(default_factory=dict)
    averages: set[str] = field(default_factory=set)
    ends: list[Grid] = field(default_factory=list)


class _Unplannable(Exception):
    pass


def plan_masks(backbone: Backbone, in_channels: int) -> MaskPlan | None:
    """Find the layers that need masks, and their resolutions, by a trial run on the meta device.

    Returns:
        None if masks are not sufficient: a layer changes the size in an unsupported way.
    """
    # sides that are no multiples of strides, and that differ at every stride
    stride = backbone.strides[-1]
    start = 5 * stride + stride // 2 + 3, 7 * stride + 5
    plan = MaskPlan(start)
    grids = {start}

    def record(name: str, layer: Any, inputs: Any, output: Tensor) -> None:
        grid: Grid = (inputs[0].shape[2], inputs[0].shape[3])
        following: Grid = (output.shape[2], output.shape[3])
        if grid not in grids or plan.layers.get(name, grid) != grid:
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
        grids.add(following)
        if window.crosses_edge:
            plan.layers[name] = grid
        if window.excludes_padding:
            plan.averages.add(name)

    twin = _on_meta(backbone)
    for name, layer in twin.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            layer.register_forward_hook(lambda layer, inputs, output, name=name: record(name, layer, inputs, output))
    try:
        with torch.no_grad():
            levels: list[Tensor] = twin(torch.zeros(1, in_channels, *start, device="meta"))
    except Exception:  # networks that reject odd sizes or the meta device raise errors of any kind
        return None
    for features in levels:
        height, width = channels_first(twin, features).shape[-2:]
        plan.ends.append((height, width))
    return plan if grids.issuperset(plan.ends) else None


def _on_meta(backbone: Backbone) -> Any:
    """A copy of the current network on the meta device; it may differ from timm's by folded norms."""
    meta: dict[int, Any] = {}
    for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
        bare = tensor.detach().to("meta")
        meta[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return deepcopy(backbone.model, meta).eval()


class _Window:
    """The sliding window of a convolution or pool, (rows, columns) each.

    Raises:
        _Unplannable: the padding is not a fixed number of zeros.
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
            raise _Unplannable  # output rows that see no image
        self.offset = (offset[0], offset[1])
        self.crosses_edge = max(padding) > 0 or self.ceil
        include = getattr(layer, "count_include_pad", None)
        if include and self.ceil:
            raise _Unplannable
        self.excludes_padding = include is False and self.crosses_edge

    def sizes(self, grid: Grid) -> Grid:
        rows, columns = (
            (size - 1 - offset) // stride + 1
            for size, offset, stride in zip(grid, self.offset, self.stride, strict=True)
        )
        return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, tuple) else (value, value)


class _Masks:
    """The masks of the current batch, (B, 1, rows, columns) of 0 and 1. Not a module, because `torch.export` forbids
    changing a module's tensors during `forward`."""

    def __init__(self) -> None:
        self.grids: dict[Grid, Tensor] = {}

    def fill(self, mask: Tensor, plan: MaskPlan) -> None:
        self.grids = {plan.start: mask}
        for grid, step in plan.steps.items():
            source = self.grids[step.source][:, :, step.offset[0] :, step.offset[1] :]
            # strided slicing would do, but `torch.export` cannot prove that its size (n + 1) // 2 equals the layer's
            # (n - 1) // 2 + 1
            self.grids[grid] = functional.max_pool2d(source, kernel_size=1, stride=step.stride)

    def mask_padding(self, grid: Grid) -> Any:
        return lambda layer, inputs: (inputs[0] * self.grids[grid], *inputs[1:])

    def exclude_padding(self, grid: Grid) -> Any:
        def divide(layer: nn.AvgPool2d, inputs: Any, output: Tensor) -> Tensor:
            fraction = functional.avg_pool2d(
                self.grids[grid], layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, False
            )
            return output / fraction.clamp(min=1e-6)  # 0 where there is only padding

        return divide


class MaskedBackbone(nn.Module):
    """Replaces a model's backbone in the graph.

    Args:
        backbone: modified in place: its layers get hooks.
        plan: from [`plan_masks`].
    """

    def __init__(self, backbone: Backbone, plan: MaskPlan) -> None:
        super().__init__()
        self.network: Any = backbone.model
        self.strides: list[int] = backbone.strides
        self.plan = plan
        self._masks = _Masks()
        for name, grid in plan.layers.items():
            layer = self.network.get_submodule(name)
            layer.register_forward_pre_hook(self._masks.mask_padding(grid))
            if name in plan.averages:
                layer.register_forward_hook(self._masks.exclude_padding(grid))

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[FeatureLevel]:
        """The same as [`Backbone.forward`], for `pixel_values` (B, C, H, W) and `pixel_mask` (B, H, W)."""
        self._masks.fill(pixel_mask.to(pixel_values.dtype)[:, None], self.plan)
        maps = [channels_first(self.network, features) for features in self.network(pixel_values)]
        masks = [self._masks.grids[end] for end in self.plan.ends]
        self._masks.grids.clear()
        levels = zip(maps, masks, self.strides, strict=True)
        return [FeatureLevel(features, mask[:, 0] > 0.5, stride) for features, mask, stride in levels]
