"""Steps 5 and 7 for masks: `DetrForSegmentation`, the detector with the mask head of the paper (section 4.4)."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .backbone import FeatureLevel
from .configuration_hf_detr import DetrConfig
from .loss import LossNormalizers
from .mask_loss import MaskPairs
from .matcher import Matching
from .modeling_hf_detr import DetrForDetection
from .outputs import DetrDetectionOutput, DetrModelOutput, DetrSegmentationOutput

logger = logging.get_logger(__name__)
STRIDES = (4, 8, 16)  # of the levels of the backbone that the mask head reads, and 4 is that of its masks
NO_MASK = -100.0  # the logit of padding and of masks that were not computed: a probability of 0
QUERIES_AT_ONCE = 16  # in prediction: bounds memory, and what one layer writes is still in the cache for the next


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
        count = mask.sum((2, 3, 4), keepdim=True) * grouped.shape[2]
        centered = grouped - (grouped * mask).sum((2, 3, 4), keepdim=True) / count
        variance = ((centered * mask) ** 2).sum((2, 3, 4), keepdim=True) / count
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


class DetrForSegmentation(DetrForDetection):
    """DETR with masks: images to a set of boxes and masks with classes, for panoptic, instance and semantic
    segmentation (`post_process_panoptic_segmentation` and others of the image processor).

    Each image's masks are computed from the features of the image alone: padding reaches neither attention maps, nor
    convolutions, nor group norm, nor loss, so an image gets the same masks whatever it is batched with.

    Trained whole, from random weights or from a checkpoint of [`DetrForDetection`], or, as in the paper, with
    [`freeze_detector`] on a detector that was trained for boxes.

    Raises:
        ValueError: the backbone has no levels of stride 4, 8 and 16, or `d_model` is not a multiple of 16.
    """

    further_strides: ClassVar[tuple[int, ...]] = STRIDES
    needs_masks: ClassVar[bool] = True

    def __init__(self, config: DetrConfig) -> None:
        if config.d_model % 16:
            raise ValueError(
                f"`d_model` ({config.d_model}) must be a multiple of 16 for masks: the last layer of the mask head has "
                "d_model / 16 channels."
            )
        super().__init__(config)
        heads, channels = config.encoder_attention_heads, self.model.backbone.channels[: len(STRIDES)]
        self.mask_head = MaskHead(config.d_model, heads, channels[::-1], config.activation_function)
        self.bbox_attention = MaskAttention(config.d_model, heads)
        self.is_detector_frozen = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskHead):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    init.kaiming_uniform_(layer.weight, a=1)
                    init.zeros_(layer.bias)
                elif isinstance(layer, nn.GroupNorm):
                    init.ones_(layer.weight)
                    init.zeros_(layer.bias)
        elif isinstance(module, MaskAttention):
            for projection in (module.q_proj, module.k_proj):
                init.xavier_uniform_(projection.weight)
                init.zeros_(projection.bias)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As [`DetrForDetection.from_pretrained`]; also reads a checkpoint without masks, and a warning says that the
        mask head is new then."""
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if any(name.startswith("mask_head.") for name in info["missing_keys"]):
            logger.warning(
                f"{pretrained_model_name_or_path}: the checkpoint has no masks, so the mask head starts at random; "
                "train it, with model.freeze_detector() to keep the boxes as they are."
            )
        return (model, info) if output_loading_info else model

    def freeze_detector(self) -> None:
        """Train the mask head only, as the paper does on a model that was trained for boxes: no other weight and no
        statistic changes, and the detector runs as in prediction, without dropout."""
        self.is_detector_frozen = True
        self.requires_grad_(False)
        for part in (self.mask_head, self.bbox_attention):
            part.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch; a frozen detector stays in evaluation mode."""
        super().train(mode)
        if self.is_detector_frozen:
            self.model.eval()
        return self

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Any]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        normalizers: LossNormalizers | None = None,
        encoder_outputs: Any = None,
        decoder_inputs_embeds: Tensor | None = None,
        masks_above: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DetrSegmentationOutput:
        """Args:
            labels: as of [`DetrForDetection.forward`], with `masks` (N, H, W), bool or 0 and 1, at the size of the
                image without its padding. The image processor makes them with `return_segmentation_masks=True`.
            masks_above: compute only the masks of queries whose best class is an object with a score above this, which
                are all that post-processing with this threshold reads. None: of all queries.
            Others: see [`DetrForDetection.forward`].

        Raises:
            ValueError, FloatingPointError: see [`DetrForDetection.forward`].
        """
        if kwargs.get("inputs_embeds") is not None or pixel_values is None:
            raise ValueError("Masks need `pixel_values`: the mask head reads several levels of the backbone.")
        output: DetrDetectionOutput = super().forward(
            pixel_values,
            pixel_mask,
            labels,
            output_attentions,
            output_hidden_states,
            normalizers,
            encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name != "return_dict"},
        )
        masks = sizes = None
        if labels is None or not self.training:
            masks, sizes = self.predict_masks(output, masks_above)
        detected = {field.name: getattr(output, field.name) for field in fields(DetrDetectionOutput)}
        return DetrSegmentationOutput(
            **detected | {"feature_levels": None},
            pred_masks=masks,
            mask_sizes=sizes,
            image_sizes=_image_sizes(pixel_values, pixel_mask),
        )

    # -- masks -----------------------------------------------------------------------------------------------------

    def predict_masks(
        self, output: DetrDetectionOutput | DetrModelOutput, masks_above: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`pred_masks` and `mask_sizes` of [`DetrSegmentationOutput`]."""
        levels, attention = self._levels(output), self._attention_maps(output)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return self._masks_of_batch(levels, attention)
        finest, wide = levels[0].map, torch.promote_types(attention.dtype, torch.float32)
        sizes = _sizes_of_levels(levels)
        result = finest.new_full((*attention.shape[:2], *finest.shape[-2:]), NO_MASK, dtype=wide)
        for image, kept in enumerate(self._kept_queries(output, masks_above)):
            rows, columns = sizes[0][image]
            for some in kept.split(QUERIES_AT_ONCE):
                logits = self._masks_of_image(levels, sizes, attention[image, some], image)
                result[image, some, :rows, :columns] = logits.to(wide)
        return result, torch.tensor(sizes[0], device=finest.device)

    def mask_supervision(
        self, outputs: DetrModelOutput, labels: list[dict[str, Any]]
    ) -> Callable[[Matching], MaskPairs] | None:
        """A function from the matching of a layer to the masks of its pairs, at the size of the image."""

        def pairs_of(matching: Matching) -> MaskPairs:
            levels, attention = self._levels(outputs), self._attention_maps(outputs)
            sizes = _sizes_of_levels(levels)
            counts = [min(len(label["class_labels"]), self.config.num_queries) for label in labels]
            first, pairs = 0, MaskPairs([], [])
            of_images = zip(matching.query.split(counts), matching.target.split(counts), strict=True)
            for image, (queries, targets) in enumerate(of_images):
                objects = labels[image]["masks"].to(attention.device)
                logits = self._masks_of_image(levels, sizes, attention[image, queries], image)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                resized = functional.interpolate(wide[:, None], objects.shape[-2:], mode="bilinear")[:, 0]
                pairs.logits.append(resized)
                pairs.targets.append(objects[targets - first].bool())
                first += len(objects)
            return pairs

        return pairs_of

    def _levels(self, output: DetrDetectionOutput | DetrModelOutput) -> tuple[FeatureLevel, ...]:
        """The levels of stride 4, 8 and 16, and the projected features."""
        assert output.feature_levels is not None
        return (*output.feature_levels[: len(STRIDES)], output.feature_levels[-1])

    def _attention_maps(self, output: DetrDetectionOutput | DetrModelOutput) -> Tensor:
        """(B, T, heads, h, w), zero in padding."""
        level = self._levels(output)[-1]
        mask = None if level.mask is None else level.mask.flatten(1)
        maps = self.bbox_attention(output.last_hidden_state, output.encoder_last_hidden_state, mask)
        return maps.unflatten(-1, level.map.shape[-2:])

    def _masks_of_image(
        self, levels: tuple[FeatureLevel, ...], sizes: list[list[tuple[int, int]]], attention: Tensor, image: int
    ) -> Tensor:
        """(Q, heads, h, w) to (Q, H, W), without padding."""
        maps = [
            level.map[image : image + 1, :, :rows, :columns]
            for level, of_level in zip(levels, sizes, strict=True)
            for rows, columns in (of_level[image],)
        ]
        rows, columns = sizes[-1][image]
        return self.mask_head(maps[-1], attention[None, :, :, :rows, :columns], maps[-2::-1])[0]

    def _masks_of_batch(self, levels: tuple[FeatureLevel, ...], attention: Tensor) -> tuple[Tensor, Tensor]:
        """The same for all queries of a padded batch, as one graph."""
        maps = [level.map for level in levels[::-1]]
        valid = [level.mask for level in levels[::-1] if level.mask is not None]
        masks = None
        if len(valid) == len(maps):
            masks = [mask[:, None].to(of_level.dtype) for mask, of_level in zip(valid, maps, strict=True)]
            maps = [of_level * mask for of_level, mask in zip(maps, masks, strict=True)]
        logits = self.mask_head(maps[0], attention, maps[1:], masks)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        finest = logits.new_ones(logits[:, 0].shape, dtype=torch.bool) if masks is None else valid[-1]
        return logits.where(finest[:, None], NO_MASK), _extent(finest)

    def _kept_queries(self, output: Any, masks_above: float | None) -> tuple[Tensor, ...]:
        """The indices of the queries of each image whose masks are computed."""
        logits = output.logits
        if masks_above is None:
            return (torch.arange(logits.shape[1], device=logits.device),) * len(logits)
        scores, classes = logits.float().softmax(-1).max(-1)
        keep = (classes != logits.shape[-1] - 1) & (scores > masks_above)
        return tuple(of_image.nonzero()[:, 0] for of_image in keep)


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """(B, 2), height and width of each image without its padding; a graph for any size if it is traced."""
    if pixel_mask is None:
        pixel_mask = pixel_values.new_ones((pixel_values.shape[0], *pixel_values.shape[-2:]), dtype=torch.bool)
    return _extent(pixel_mask.bool()).to(pixel_values.device)


def _extent(mask: Tensor) -> Tensor:
    """(B, h, w) to (B, 2), the rows and columns that have image."""
    return torch.stack((mask.any(2).sum(1), mask.any(1).sum(1)), dim=1)


def _sizes_of_levels(levels: tuple[FeatureLevel, ...]) -> list[list[tuple[int, int]]]:
    """(rows, columns) of each image in each level, without padding. One transfer from the device."""
    whole = [torch.tensor([level.map.shape[-2:]] * len(level.map)) for level in levels]
    padded = [level.mask for level in levels if level.mask is not None]
    if padded:
        known = iter(torch.stack([_extent(mask) for mask in padded]).cpu())
        whole = [size if level.mask is None else next(known) for level, size in zip(levels, whole, strict=True)]
    return [[(rows, columns) for rows, columns in sizes.tolist()] for sizes in whole]


def _repeat(mask: Tensor | None, num_queries: int) -> Tensor | None:
    """(B, 1, h, w) to (B · Q, 1, h, w)."""
    return None if mask is None else mask.repeat_interleave(num_queries, dim=0)


def _upsample(maps: Tensor, size: tuple[int, int], coarse: Tensor | None, fine: Tensor | None) -> Tensor:
    """(N, C, h, w) to (N, C, *size), each location that of the nearest one before it, as if each image were alone:
    with masks (N, 1, h, w) and (N, 1, *size), by the sizes of the image without its padding."""
    if coarse is None or fine is None:
        return functional.interpolate(maps, size, mode="nearest")
    before, after = _extent(coarse[:, 0] > 0), _extent(fine[:, 0] > 0)
    for axis, length in zip((0, 1), size, strict=True):
        steps = torch.arange(length, device=maps.device)
        index = (steps * before[:, axis, None]) // after[:, axis, None]  # (N, length)
        index = index.clamp(max=maps.shape[2 + axis] - 1)
        if axis == 0:
            maps = maps.gather(2, index[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3]))
        else:
            maps = maps.gather(3, index[:, None, None, :].expand(-1, maps.shape[1], maps.shape[2], -1))
    return maps
