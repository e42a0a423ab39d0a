"""`DetrForSegmentation`: the detector with masks (paper, section 4.4)."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .backbone import FeatureLevel
from .configuration_hf_detr import DetrConfig
from .loss import LossNormalizers
from .mask_encoding import NO_MASK
from .mask_head import MaskAttention, MaskHead, QueryConv, extent_of
from .mask_loss import MaskPairs
from .matcher import Matching
from .modeling_hf_detr import DetrForDetection
from .outputs import DetrDetectionOutput, DetrModelOutput, DetrSegmentationOutput

logger = logging.get_logger(__name__)
STRIDES = (4, 8, 16)  # of the backbone levels that the mask head reads; its masks have stride 4
QUERIES_AT_ONCE = 16  # in prediction: bounds memory, and what one layer writes is still in the cache for the next


class DetrForSegmentation(DetrForDetection):
    """DETR with masks: images to a set of boxes and masks with classes, for panoptic, instance and semantic
    segmentation (`post_process_panoptic_segmentation` and others of the image processor).

    Each image's masks are computed from the features of the image alone: padding reaches neither attention maps, nor
    convolutions, nor group norm, nor loss, so an image gets the same masks whatever it is batched with.

    Trained whole, from random weights or from a checkpoint of [`DetrForDetection`], or, as in the paper, with
    [`freeze_detector`] on a detector that was trained for boxes.

    Raises:
        ValueError: the backbone has no levels of stride 4, 8 and 16, `d_model` is not a multiple of 16, or the scores
            of the config are not those of a softmax.
    """

    further_strides: ClassVar[tuple[int, ...]] = STRIDES
    has_masks: ClassVar[bool] = True

    def __init__(self, config: DetrConfig) -> None:
        if config.d_model % 16:
            raise ValueError(
                f"`d_model` ({config.d_model}) must be a multiple of 16 for masks: the last layer of the mask head has "
                "d_model / 16 channels."
            )
        if not config.has_no_object:
            raise ValueError(
                'Masks need `class_activation="softmax"`: post-processing of masks decides by "no object".'
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
                    if isinstance(layer, QueryConv):
                        gains = torch.ones(layer.in_channels, 1, 1, device=layer.weight.device)
                        gains[self.config.d_model :] = self.config.mask_attention_gain
                        init.copy_(layer.weight, layer.weight * gains)
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
        """As [`DetrForDetection.from_pretrained`]; a checkpoint without masks is read, too, with a warning that the
        mask head is new."""
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
            masks_above: compute only the masks of queries whose best class is an object and whose score is above this
                value; panoptic and instance post-processing with this threshold, or a higher one, need no others.
                Semantic post-processing needs all masks: None, the default.
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
            for some in kept.split(QUERIES_AT_ONCE) if len(kept) else ():
                logits = self._masks_of_images(levels, sizes, attention[image, some][None], [image])[0]
                result[image, some, :rows, :columns] = logits.to(wide)
        return result, torch.tensor(sizes[0], device=finest.device)

    def mask_supervision(
        self, outputs: DetrModelOutput, labels: list[dict[str, Any]]
    ) -> Callable[[Matching], MaskPairs] | None:
        """A function from the matching of a layer to the masks of its pairs, at the size of the image."""

        def pairs_of(matching: Matching) -> MaskPairs:
            levels, attention = self._levels(outputs), self._attention_maps(outputs)
            sizes = _sizes_of_levels(levels)
            objects = [label["masks"].to(attention.device) for label in labels]
            counts = [min(len(of_image), self.config.num_predictions) for of_image in objects]
            first = torch.tensor([0, *map(len, objects)]).cumsum(0)
            queries, targets = matching.query.split(counts), matching.target.split(counts)
            alike: dict[tuple[Any, ...], list[int]] = {}
            for image, of_image in enumerate(objects):
                key = (of_image.shape[-2:], *(of_level[image] for of_level in sizes))
                alike.setdefault(key, []).append(image)
            pairs = MaskPairs([], [])
            for images in _together(list(alike.values()), counts):
                query = pad_sequence([queries[image] for image in images], batch_first=True)
                maps = attention[torch.tensor(images, device=query.device)[:, None], query]
                logits = self._masks_of_images(levels, sizes, maps, images).flatten(0, 1)
                found = [row * query.shape[1] + n for row, image in enumerate(images) for n in range(counts[image])]
                logits = logits[torch.tensor(found, dtype=torch.int64, device=logits.device)]
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                size = objects[images[0]].shape[-2:]
                pairs.logits.append(functional.interpolate(wide[:, None], size, mode="bilinear")[:, 0])
                pairs.targets.append(torch.cat([objects[i][targets[i] - first[i]].bool() for i in images]))
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

    def _masks_of_images(
        self, levels: tuple[FeatureLevel, ...], sizes: list[list[tuple[int, int]]], attention: Tensor, images: list[int]
    ) -> Tensor:
        """(B, Q, heads, h, w) of these images, which have one size, to (B, Q, H, W), without padding."""
        chosen: slice | Tensor = slice(images[0], images[-1] + 1)
        if images != list(range(images[0], images[-1] + 1)):
            chosen = torch.tensor(images, device=attention.device)
        maps = []
        for level, of_level in zip(levels, sizes, strict=True):
            rows, columns = of_level[images[0]]
            maps.append(level.map[chosen, :, :rows, :columns])
        rows, columns = sizes[-1][images[0]]
        return self.mask_head(maps[-1], attention[..., :rows, :columns], maps[-2::-1])

    def _masks_of_batch(self, levels: tuple[FeatureLevel, ...], attention: Tensor) -> tuple[Tensor, Tensor]:
        """The same for all queries of a padded batch, as one graph."""
        maps = [level.map for level in levels[::-1]]
        valid = [level.mask for level in levels[::-1] if level.mask is not None]
        masks = None
        if len(valid) == len(maps):
            masks = [mask[:, None].to(of_level.dtype) for mask, of_level in zip(valid, maps, strict=True)]
            maps = [of_level * mask for of_level, mask in zip(maps, masks, strict=True)]
        parts = attention.split(QUERIES_AT_ONCE, dim=1)  # a known number, also in a graph
        logits = torch.cat([self.mask_head(maps[0], some, maps[1:], masks) for some in parts], dim=1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        finest = logits.new_ones(logits[:, 0].shape, dtype=torch.bool) if masks is None else valid[-1]
        return logits.where(finest[:, None], NO_MASK), extent_of(finest)

    def _kept_queries(self, output: Any, masks_above: float | None) -> tuple[Tensor, ...]:
        """The indices of the queries of each image whose masks are computed."""
        logits = output.logits
        if masks_above is None:
            return (torch.arange(logits.shape[1], device=logits.device),) * len(logits)
        scores, classes = logits.float().softmax(-1).max(-1)
        keep = (classes != logits.shape[-1] - 1) & (scores > masks_above)
        return tuple(of_image.nonzero()[:, 0] for of_image in keep)


def _together(alike: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Images that go through the mask head in one call, padded to the one with the most objects.

    Args:
        alike: images of one size each.
        counts: of the objects of every image; where padding would more than double them, images go one by one.
    """

    def fits(images: list[int]) -> bool:
        of_images = [counts[image] for image in images]
        return len(images) * max(of_images) <= 2 * sum(of_images)

    return [call for images in alike for call in ([images] if fits(images) else [[image] for image in images])]


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """(B, 2), height and width of each image without its padding; a graph for any size if it is traced."""
    if pixel_mask is None:
        pixel_mask = pixel_values.new_ones((pixel_values.shape[0], *pixel_values.shape[-2:]), dtype=torch.bool)
    return extent_of(pixel_mask.bool()).to(pixel_values.device)


def _sizes_of_levels(levels: tuple[FeatureLevel, ...]) -> list[list[tuple[int, int]]]:
    """(rows, columns) of each image in each level, without padding. One transfer from the device."""
    whole = [torch.tensor([level.map.shape[-2:]] * len(level.map)) for level in levels]
    padded = [level.mask for level in levels if level.mask is not None]
    if padded:
        known = iter(torch.stack([extent_of(mask) for mask in padded]).cpu())
        whole = [size if level.mask is None else next(known) for level, size in zip(levels, whole, strict=True)]
    return [[(rows, columns) for rows, columns in sizes.tolist()] for sizes in whole]
