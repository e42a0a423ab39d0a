"""Step 5 for masks: the mask head of the paper (section 4.4), the same whatever an image is padded to."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN


class QueryConv(nn.Conv2d):
    """A 3x3 convolution of feature maps concatenated with maps of a query. Convolution is linear, so the part of the
    features is computed once per image and added to that of each query."""

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:  # type: ignore[override]
        """(B, d, h, w) and (B, Q, n, h, w) with d + n = `in_channels` to (B, Q, out_channels, h, w)."""
        of_features, of_maps = self.weight.split((features.shape[1], maps.shape[2]), dim=1)
        shared = functional.conv2d(features, of_features, self.bias, padding=self.padding)
        own = functional.conv2d(maps.flatten(0, 1), of_maps, padding=self.padding)
        return own.unflatten(0, maps.shape[:2]) + shared[:, None]


class GroupNorm(nn.GroupNorm):
    """Group norm with 8 groups, or as many as divide 8 and the number of channels, whose statistics are those of the
    image without its padding."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(8, channels), channels)

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C, h, w); `mask` (N, 1, h, w), 1 = image, None if nothing is padded."""
        if mask is None:
            return torch.group_norm(maps, self.num_groups, self.weight, self.bias, self.eps)
        grouped, mask = maps.unflatten(1, (self.num_groups, -1)), mask[:, :, None]  # (N, G, C/G, h, w)
        fraction = mask.mean((2, 3, 4), keepdim=True)  # of the image; sums would be too large for float16
        centered = grouped - (grouped * mask).mean((2, 3, 4), keepdim=True) / fraction
        variance = ((centered * mask) ** 2).mean((2, 3, 4), keepdim=True) / fraction
        normed = (centered * (variance + self.eps).rsqrt()).flatten(1, 2)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class ConvBlock(nn.Module):
    """A 3x3 convolution, group norm and the activation."""

    def __init__(self, conv: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.conv = conv
        self.norm = GroupNorm(conv.out_channels)
        self.activation = ACT2FN[activation]

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, in, h, w) to (N, out, h, w); `mask` (N, 1, h, w) as for the norm: padding is zero in and out."""
        return self.finish(self.conv(maps), mask)

    def finish(self, convolved: Tensor, mask: Tensor | None) -> Tensor:
        """What comes after the convolution."""
        result = self.activation(self.norm(convolved, mask))
        return result if mask is None else result * mask


class FusionStage(nn.Module):
    """Maps of queries, upsampled to a finer level of the backbone, plus that level, then a convolution."""

    def __init__(self, level_channels: int, channels: int, activation: str) -> None:
        super().__init__()
        self.fpn_adapter = nn.Conv2d(level_channels, channels, kernel_size=1)
        self.refine = ConvBlock(nn.Conv2d(channels, channels // 2, 3, padding=1), activation)

    def forward(self, maps: Tensor, level: Tensor, coarse: Tensor | None, fine: Tensor | None) -> Tensor:
        """Args:
            maps: (B, Q, channels, h, w).
            level: (B, level_channels, H, W); it is adapted once per image.
            coarse, fine: (B, 1, h, w) and (B, 1, H, W), 1 = image; None if nothing is padded.

        Returns:
            (B, Q, channels / 2, H, W)
        """
        adapted, shape = self.fpn_adapter(level), maps.shape[:2]
        upsampled = _upsample(
            maps.flatten(0, 1), adapted.shape[-2:], _repeat(coarse, shape[1]), _repeat(fine, shape[1])
        )
        fused = (upsampled.unflatten(0, shape) + adapted[:, None]).flatten(0, 1)
        mask = _repeat(fine, shape[1])
        return self.refine(fused if mask is None else fused * mask, mask).unflatten(0, shape)


class MaskHead(nn.Module):
    """The convolutional head of the paper (figure 8): features and attention maps to a mask per query, upsampled with
    three levels of the backbone. Channels: d + heads, d/2, d/4, d/8, d/16, 1."""

    def __init__(self, d_model: int, num_heads: int, level_channels: list[int], activation: str) -> None:
        """`level_channels`: of the levels of stride 16, 8 and 4."""
        super().__init__()
        width = d_model + num_heads
        self.conv1 = ConvBlock(QueryConv(width, width, 3, padding=1), activation)
        self.conv2 = ConvBlock(nn.Conv2d(width, d_model // 2, 3, padding=1), activation)
        self.fpn_stages = nn.ModuleList(
            FusionStage(channels, d_model // 2 ** (index + 1), activation)
            for index, channels in enumerate(level_channels)
        )
        self.output_conv = nn.Conv2d(d_model // 16, 1, 3, padding=1)

    def forward(
        self, features: Tensor, attention: Tensor, levels: list[Tensor], masks: list[Tensor] | None = None
    ) -> Tensor:
        """Args:
            features: (B, d, h, w), the projected features; zero in padding.
            attention: (B, Q, heads, h, w), zero in padding.
            levels: (B, C, h, w) of stride 16, 8 and 4.
            masks: (B, 1, h, w) of features and levels, 1 = image; None if nothing is padded.

        Returns:
            (B, Q, H, W) logits at the size of the last level.
        """
        shape = attention.shape[:2]
        of_features, *of_levels = masks or (None,) * (1 + len(levels))
        mask = _repeat(of_features, shape[1])
        maps = self.conv1.finish(self.conv1.conv(features, attention).flatten(0, 1), mask)
        maps = self.conv2(maps, mask).unflatten(0, shape)
        for stage, level, coarse, fine in zip(
            self.fpn_stages, levels, [of_features, *of_levels], of_levels, strict=False
        ):
            maps = stage(maps, level, coarse, fine)
        return self.output_conv(maps.flatten(0, 1)).unflatten(0, shape)[:, :, 0]


class MaskAttention(nn.Module):
    """Where each query looks: attention weights without values, one softmax over heads and locations together."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Q, d), (B, hw, d) and (B, hw) bool, True = image, to (B, Q, heads, hw)."""
        query = self.q_proj(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, Q, d / heads)
        key = self.k_proj(memory).unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1)  # (B, heads, d / heads, hw)
        scores = (query * query.shape[-1] ** -0.5 @ key).transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        return scores.flatten(2).softmax(-1).view_as(scores)


def extent_of(mask: Tensor) -> Tensor:
    """(B, h, w) to (B, 2), the rows and columns that have image."""
    return torch.stack((mask.any(2).sum(1), mask.any(1).sum(1)), dim=1)


def _repeat(mask: Tensor | None, num_queries: int) -> Tensor | None:
    """(B, 1, h, w) to (B · Q, 1, h, w)."""
    return None if mask is None else mask.repeat_interleave(num_queries, dim=0)


def _upsample(maps: Tensor, size: tuple[int, int], coarse: Tensor | None, fine: Tensor | None) -> Tensor:
    """(N, C, h, w) to (N, C, *size): nearest-neighbour upsampling, of each image as if it were alone: with masks (N, 1,
    h, w) and (N, 1, *size), by the sizes of the image without its padding."""
    if coarse is None or fine is None:
        return functional.interpolate(maps, size, mode="nearest")
    before, after = extent_of(coarse[:, 0] > 0), extent_of(fine[:, 0] > 0)
    for axis, length in zip((0, 1), size, strict=True):
        steps = torch.arange(length, device=maps.device)
        index = (steps * before[:, axis, None]) // after[:, axis, None]  # (N, length)
        index = index.clamp(max=maps.shape[2 + axis] - 1)
        if axis == 0:
            maps = maps.gather(2, index[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3]))
        else:
            maps = maps.gather(3, index[:, None, None, :].expand(-1, maps.shape[1], maps.shape[2], -1))
    return maps
