"""transformers' detectors of other architectures, to measure and compare them: RT-DETR, D-FINE, YOLOS and all others of
`AutoModelForObjectDetection`."""

import inspect
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import ModelOutput

from ..model.backbone import image_sizes
from ..model.configuration_hf_detr import DetrConfig
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.pretrained import read_stored_config
from ..speed import named_dtype
from .transformers_checkpoints import MODEL_TYPES


class OtherDetector(nn.Module):
    """A detector of transformers that is called like ours, and has no masks and no loss here.

    Images of different sizes are run apart and without padding: many of its models let padding change the result.
    """

    has_masks = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config
        self._takes_mask = "pixel_mask" in inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def prepared(self, dtype: torch.dtype | str | None) -> Self:
        """In this dtype, in place; None: as it was loaded."""
        named = named_dtype(dtype)
        return self if named is None else self.to(named)

    def can_generate(self) -> bool:
        """False; called by transformers' pipelines."""
        return False

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ModelOutput:
        """
        Args:
            pixel_values: (B, C, H, W), padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None if nothing is padded.

        Returns:
            `logits` (B, Q, C) and `pred_boxes` (B, Q, 4), as the model gives them.

        Raises:
            ValueError: the mask of an image is not one rectangle at the top left.
        """
        sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        if pixel_mask is not None:
            found = image_sizes(pixel_mask)
            if found is None:
                raise ValueError("The mask of each image must be one rectangle at its top left.")
            sizes = list(found)
        results: dict[int, tuple[Tensor, Tensor]] = {}
        for height, width in dict.fromkeys(sizes):
            numbers = [number for number, size in enumerate(sizes) if size == (height, width)]
            images = pixel_values[numbers, :, :height, :width].to(self.dtype)
            mask = {"pixel_mask": images.new_ones(len(images), height, width)} if self._takes_mask else {}
            outputs = self.model(pixel_values=images, **mask)
            results |= dict(zip(numbers, zip(outputs.logits, outputs.pred_boxes, strict=True), strict=True))
        ordered = [results[number] for number in range(len(sizes))]
        return ModelOutput(
            logits=torch.stack([logits for logits, _ in ordered]), pred_boxes=torch.stack([box for _, box in ordered])
        )


class OtherImageProcessor(DetrImageProcessor):
    """Images are prepared with the settings of another detector's processor, and boxes are made by its own rule."""

    _theirs: Any = None

    @classmethod
    def of(cls, theirs: Any) -> "OtherImageProcessor":
        """With the settings of transformers' processor `theirs`.

        Raises:
            ValueError: it does not prepare images as DETR does.
        """
        if "Yolos" in type(theirs).__name__:
            raise ValueError("YOLOS rounds image sizes to multiples of 16, which our image processor does not do.")
        processor: OtherImageProcessor = cls.from_dict(theirs.to_dict())
        processor.do_pad = True  # batches then have a mask, by which the detector removes the padding
        processor._theirs = theirs
        return processor

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_theirs"}

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float | str = 0.5,
        target_sizes: Any = None,
        top_k: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """As in [`DetrImageProcessor`], by the rule of the other detector, which gives at most as many detections as
        it has queries; boxes are clipped to the image.

        Raises:
            ValueError: `threshold` is "per_class", which only our checkpoints have.
        """
        if isinstance(threshold, str):
            raise ValueError("Thresholds per class are of hf_detr's own models.")
        sizes = None if target_sizes is None else torch.as_tensor(target_sizes).to(outputs.logits.device)
        results: list[dict[str, Tensor]] = self._theirs.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        limits = [(1, 1)] * len(results) if sizes is None else sizes.tolist()
        for result, (height, width) in zip(results, limits, strict=True):
            boxes = result["boxes"]
            result["boxes"] = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        if top_k is not None:
            best = [result["scores"].topk(min(top_k, len(result["scores"]))).indices for result in results]
            results = [{k: v[kept] for k, v in result.items()} for result, kept in zip(results, best, strict=True)]
        return results


def load_other(source: str | Path, **location: Any) -> tuple[OtherDetector, OtherImageProcessor]:
    """Model, in evaluation mode, and processor of a checkpoint of transformers.

    Args:
        location: as of `from_pretrained`, such as `revision`.

    Raises:
        OSError, ValueError: there is none, or it is not a detector.
    """
    model: Any = AutoModelForObjectDetection.from_pretrained(source, **location)
    return OtherDetector(model.eval()), OtherImageProcessor.of(AutoImageProcessor.from_pretrained(source, **location))


def is_other(source: str | Path, **location: Any) -> bool:
    """Whether a checkpoint is of a detector of transformers that hf_detr does not read as its own."""
    stored = read_stored_config(source, location, required=False) or {}
    model_type = stored.get("model_type")
    ours = (DetrConfig.model_type, *MODEL_TYPES)
    return model_type in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES and model_type not in ours
