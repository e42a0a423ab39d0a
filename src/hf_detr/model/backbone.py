"""Step 2: a timm network turns pixels into feature maps; their masks tell locations of the image from padding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .timm_network import (
    adapt_input,
    channels_first,
    create_network,
    modules_of_frozen_stages,
    plan_levels,
    pretrained_state_dict,
    probe_network,
)

ImageSizes = list[tuple[int, int]]


class FeatureLevel(NamedTuple):
    """One level of the backbone's features.

    Args:
        map: (B, channels, h, w).
        mask: (B, h, w) bool, True = image; None if nothing is padded.
        stride: pixels of the image per location.
    """

    map: Tensor
    mask: Tensor | None
    stride: int


class Backbone(nn.Module):
    """Features of any timm network that supports `features_only=True`.

    **Padding.** An image gives the same features alone and beside larger ones: the network runs each image without its
    padding, images of equal size together, and the *feature maps* are padded. The mask comes from their real sizes, and
    no FLOPs are spent on padding. Convolving the padded batch instead would let padding leak into the image, since
    after the first bias or norm it is no longer zero. Three cases have to run the padded batch as it is, with the mask
    downsampled to the stride: batch norm that gathers statistics in training (it needs the batch in one piece), tracing
    by `torch.compile`, `torch.export` or `torch.jit` (sizes are data there), and a mask that is not one rectangle at
    the top left.

    Args:
        name: timm model name.
        in_channels: channels of the images.
        output_stride: dilate the last stages down to this stride (16 is the paper's DC5), or None.
        feature_stride: the last level returned is the deepest one of this stride; None takes the network's deepest.
        further_strides: strides of shallower levels to return as well; see
            [`~hf_detr.model.timm_network.plan_levels`].
        freeze_batch_norm: fix statistics and affine parameters of every batch norm, keeping its eps.
        frozen_stages: -1 nothing, 0 the stem, n the stem and the first n stages. A stage is a level of stride 4 or more
            in timm's `feature_info`; whatever comes before the first of them is the stem.
        kwargs: more arguments for `timm.create_model`.

    Attributes:
        channels, strides: of the levels returned, shallow to deep.
        multiple: the network needs sides that are a multiple of this number, and each image is padded with zeros to it,
            at the bottom and the right; 1 for most networks.

    Raises:
        ValueError: timm does not have the name, or the network cannot give features, has no level of that stride, or
            does not take images of any size.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        output_stride: int | None = None,
        feature_stride: int | None = None,
        further_strides: Sequence[int] = (),
        freeze_batch_norm: bool = True,
        frozen_stages: int = 1,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        kwargs = dict(kwargs or {}, in_chans=in_channels)
        if output_stride is not None:
            kwargs["output_stride"] = output_stride
        self.name = name
        self.is_frozen = False
        self._built_on_meta = torch.empty(0).is_meta  # by `from_pretrained`; timm's initialisation had no effect
        self._timm_kwargs, levels = plan_levels(name, feature_stride, further_strides, kwargs)
        returned = [levels[index] for index in self._timm_kwargs["out_indices"]]
        self.channels = [int(level["num_chs"]) for level in returned]
        self.strides = [int(level["reduction"]) for level in returned]
        self.model = create_network(name, **self._timm_kwargs)
        if freeze_batch_norm:
            self.freeze_batch_norm()
        unused, self.multiple = probe_network(self.model, name, self._timm_kwargs)
        self._frozen = self._freeze_norms(modules_of_frozen_stages(self.model, name, frozen_stages, levels)) + unused
        self.freeze()

    # -- which parts train ---------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop the training of the frozen stages. Also called after `from_pretrained`, which replaces the parameters
        and forgets that they were frozen."""
        parameters = dict(self.model.named_parameters())
        for name in self._frozen:
            if name in parameters:  # a batch norm that was frozen since then has none
                parameters[name].requires_grad_(False)

    def _freeze_norms(self, modules: list[tuple[str, nn.Module]]) -> list[str]:
        """Fix the batch norms among these modules; returns the names of the parameters that are left in them."""
        frozen = []
        for name, module in modules:
            if isinstance(module, _BatchNorm):
                self.model.set_submodule(name, _frozen(module))  # which has buffers only
            else:
                frozen += [f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False)]
        return frozen

    def train(self, mode: bool = True) -> "Backbone":
        """As in PyTorch; a backbone that was frozen as a whole gathers no statistics of batch norm."""
        return super().train(mode and not self.is_frozen)

    def set_frozen(self, frozen: bool) -> None:
        """Stop the training of all of it, or let it train again, except for the frozen stages."""
        self.is_frozen = frozen
        self.model.requires_grad_(not frozen)
        if not frozen:
            self.freeze()

    def freeze_batch_norm(self) -> None:
        """Fix statistics and affine parameters of every batch norm from now on, in place."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, _BatchNorm):
                self.model.set_submodule(name, _frozen(module))

    def gathers_statistics(self) -> bool:
        """True while some batch norm computes statistics of the batch, so that images must not be run apart."""
        return self.training and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())

    # -- weights -------------------------------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str | Path | None = None) -> None:
        """Load timm's pretrained weights in place; arguments and errors as of
        [`~hf_detr.model.timm_network.pretrained_state_dict`]."""
        self.model.load_state_dict(pretrained_state_dict(self.name, self._timm_kwargs, checkpoint))

    def resize_channels(self, in_channels: int) -> None:
        """Take images of another number of channels from now on, in place; see
        [`~hf_detr.model.timm_network.adapt_input`]."""
        kwargs = self._timm_kwargs | {"in_chans": in_channels}
        adapt_input(self.model, self.name, self._timm_kwargs, kwargs)
        self._timm_kwargs = kwargs

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill what `from_pretrained` left empty: timm's initial weights where a checkpoint had none, and the buffers
        that are never saved (such as Swin's relative positions), which come back empty from the `meta` device."""
        if not self._built_on_meta:
            return
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        empty = {name for name, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)}
        if not empty:
            return
        network = create_network(self.name, **self._timm_kwargs)
        fresh = dict(network.named_parameters()) | dict(network.named_buffers())
        for name in empty:
            state[name].copy_(fresh[name])

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> list[FeatureLevel]:
        """Args:
            pixel_values: (B, in_channels, H, W), normalised, padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding, on any device; None if nothing is padded. A mask on the host
                saves waiting for the device.

        Returns:
            the levels, shallow to deep.
        """
        if pixel_mask is None:
            return self._levels([(features, None) for features in self._features(pixel_values)])
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        sizes = None if tracing else image_sizes(pixel_mask)
        if sizes is None or (len(set(sizes)) > 1 and self.gathers_statistics()):
            return self._levels(self._run_padded(pixel_values, pixel_mask.to(pixel_values.device)))
        return self._levels(self._run_by_size(pixel_values, sizes))

    def _levels(self, features: Sequence[tuple[Tensor, Tensor | None]]) -> list[FeatureLevel]:
        return [FeatureLevel(*level, stride) for level, stride in zip(features, self.strides, strict=True)]

    def _features(self, pixel_values: Tensor) -> list[Tensor]:
        dtype = next(self.model.parameters()).dtype
        if self.multiple == 1:
            return [channels_first(self.model, features) for features in self.model(pixel_values.to(dtype))]
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        of_padded = self.model(nn.functional.pad(pixel_values, padding).to(dtype))
        return [  # without the locations that see nothing but this padding
            channels_first(self.model, features)[:, :, : -(-height // stride), : -(-width // stride)]
            for features, stride in zip(of_padded, self.strides, strict=True)
        ]

    def _run_padded(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        mask = pixel_mask[:, None].float()
        return [
            (features, nn.functional.interpolate(mask, size=features.shape[-2:])[:, 0] > 0.5)
            for features in self._features(pixel_values)
        ]

    def _run_by_size(self, pixel_values: Tensor, sizes: ImageSizes) -> Sequence[tuple[Tensor, Tensor | None]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        if len(groups) == 1:
            height, width = sizes[0]
            return [(features, None) for features in self._features(pixel_values[:, :, :height, :width])]
        of_sizes = [self._features(pixel_values[indices, :, :h, :w]) for (h, w), indices in groups.items()]
        return [pad_features(maps, list(groups.values())) for maps in zip(*of_sizes, strict=True)]


def _frozen(norm: _BatchNorm) -> nn.Module:
    """The same with fixed statistics and affine parameters; also under Accelerate's `init_empty_weights`, where a norm
    has parameters on the meta device beside buffers that are not."""
    if norm.weight is None or not norm.weight.is_meta:
        return freeze_batch_norm_2d(norm)
    with torch.device("meta"):
        return freeze_batch_norm_2d(norm.to("meta"))


def pad_features(maps: Sequence[Tensor], indices: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Feature maps (n, C, h, w) of images of several sizes, each with the indices of its images in the batch, to one
    map (B, C, max h, max w) and its mask (B, max h, max w); None if all maps have one size."""
    count, channels = sum(map(len, indices)), maps[0].shape[1]
    height, width = max(features.shape[2] for features in maps), max(features.shape[3] for features in maps)
    padded = torch.empty(
        (count, channels, height, width),
        dtype=maps[0].dtype,
        device=maps[0].device,
        memory_format=torch.channels_last,  # the transformer reads tokens
    ).zero_()
    mask = torch.zeros(count, height, width, dtype=torch.bool, device=padded.device)
    for features, of_images in zip(maps, indices, strict=True):
        h, w = features.shape[2:]
        padded[of_images, :, :h, :w] = features
        mask[of_images, :h, :w] = True
    return padded, None if len({features.shape[2:] for features in maps}) == 1 else mask


def image_sizes(pixel_mask: Tensor) -> ImageSizes | None:
    """(height, width) of each image, or None if some mask is not one rectangle at the top left. One transfer from
    the device."""
    mask = pixel_mask.bool()
    heights, widths = mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)
    in_rows = torch.arange(mask.shape[1], device=mask.device) < heights[:, None]
    in_columns = torch.arange(mask.shape[2], device=mask.device) < widths[:, None]
    is_rectangle = (mask == (in_rows[:, :, None] & in_columns[:, None, :])).flatten(1).all(1) & (heights > 0)
    table = torch.stack((heights, widths, is_rectangle), dim=1).tolist()
    return [(height, width) for height, width, _ in table] if all(row[2] for row in table) else None
