"""Step 1: images and COCO annotations to what the model takes: `pixel_values`, `pixel_mask` and `labels`."""

from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
)

from .annotations import coco_to_labels
from .foreign import import_interop
from .image_io import Image, allocate_batch, flat_list_of_images, to_rgb_tensor
from .post_processing import post_process_detection


class HfDetrImageProcessor(TorchvisionBackend):
    """Resize, rescale, normalise and pad images, and turn COCO annotations into labels.

    Images may be PIL images, numpy arrays or torch tensors (channels first or last, grey, with or without alpha),
    paths or URLs, one or a list. Whatever they are, they become 8-bit RGB first: transparency is laid over white,
    EXIF orientation is applied (annotation tools show the turned image), and wider values are scaled: see
    `image_io.to_rgb_tensor` for the rule. `image_range=(black, white)` sets the values that are black and white in
    images that are not 8-bit. Float arrays with all values in [0, 1] are taken as already rescaled.

    Defaults are the paper's: shortest edge 800, longest at most 1333, ImageNet mean and standard deviation. Other
    forms of `size`: `{"height": h, "width": w}` for exactly this size, `{"max_height": h, "max_width": w}` for the
    largest that fits into it. `pad_size={"height": h, "width": w}` pads every batch to one size.
    """

    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True

    # The score at which a detection of each class counts, for `threshold="per_class"`; saved with the processor.
    class_thresholds: list[float] | None = None
    # The values of black and white in images that are not 8-bit; None takes the rule of `image_io.to_rgb_tensor`.
    image_range: tuple[float, float] | None = None

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; also reads the settings of transformers' DETR processors, of any version.

        Raises:
            ValueError: they are another model's, or another DETR's in a model repository without hf_detr installed.
        """
        stored = image_processor_dict
        kind = stored.get("image_processor_type") or stored.get("feature_extractor_type")
        if kind != cls.__name__:
            stored = import_interop(f"the settings of a {kind or 'processor without a name'}").read_processor(stored)
        return super().from_dict(stored, **kwargs)

    # -- images in -----------------------------------------------------------------------------------------------

    def _prepare_image_like_inputs(self, images: Any, *args: Any, device: Any = None, **kwargs: Any) -> list[Tensor]:
        """One image or any list of them to tensors (3, H, W), uint8, or float32 if they came as floats in [0, 1]."""
        images = flat_list_of_images(images)
        if not images:
            raise ValueError("There are no images.")
        return [to_rgb_tensor(image, image_range=self.image_range).to(device) for image in images]

    def preprocess(  # type: ignore[override]
        self,
        images: Image | list[Image],
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Args:
            images: one image or a list of them.
            annotations: one dict per image: `image_id` (int) and `annotations`, a list of COCO objects with `bbox`
                = [x_min, y_min, width, height] in pixels of the image, `category_id` in [0, num_labels), and
                optionally `area` and `iscrowd`. Crowd objects are not in the labels.
            kwargs: any attribute of the processor, for this call (`size=...`, `do_resize=False`, ...).

        Returns:
            `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W), 1 = image, 0 = padding; with annotations
            also `labels`, one dict per image: `class_labels` (N,), `boxes` (N, 4) cxcywh in [0, 1] of the image
            without its padding, `area` (N,) in resized pixels, `iscrowd` (N,), `image_id` (1,), `orig_size` and
            `size` = (height, width) before and after resizing.

        Raises:
            ValueError: an image or annotation cannot be used; the message names it and says why.
        """
        return super().preprocess(images, annotations, **kwargs)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Tensor],
        annotations: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        do_pad: bool,
        pad_size: SizeDict | None,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        if isinstance(annotations, dict):
            annotations = [annotations]
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"There are {len(images)} images but annotations for {len(annotations)}.")
        # labels first: they are cheap, and bad ones should not cost the resizing of a batch
        labels = None
        if annotations is not None:
            labels = [
                coco_to_labels(annotation, _height_width(image), index)
                for index, (image, annotation) in enumerate(zip(images, annotations, strict=True))
            ]
        resized = [self.resize(image, size, resample) if do_resize else image for image in images]
        factor, offset = _affine(do_rescale, rescale_factor, do_normalize, image_mean, image_std, resized[0].device)

        sizes = [_height_width(image) for image in resized]
        data: dict[str, Any]
        if do_pad or len(set(sizes)) == 1:
            batch_size = (pad_size.height, pad_size.width) if do_pad and pad_size is not None else None
            # written in place: no copy to normalise, no copy to pad, no copy to stack
            pixel_values, pixel_mask = allocate_batch(sizes, size=batch_size, device=resized[0].device)
            for image, values, (h, w) in zip(resized, pixel_values, sizes, strict=True):
                torch.mul(image, _scale_of(image, factor, do_rescale), out=values[:, :h, :w]).sub_(offset)
            data = {"pixel_values": pixel_values}
            if do_pad:
                data["pixel_mask"] = pixel_mask
        else:
            data = {"pixel_values": [image * _scale_of(image, factor, do_rescale) - offset for image in resized]}
        batch = BatchFeature(data, tensor_type=return_tensors if len(set(sizes)) == 1 or do_pad else None)
        if labels is not None:
            for label, (h, w) in zip(labels, sizes, strict=True):
                original_h, original_w = label["orig_size"].tolist()
                label["size"] = torch.tensor([h, w])
                label["area"] = label["area"] * (h / original_h) * (w / original_w)
            batch["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return batch

    # -- results out ---------------------------------------------------------------------------------------------

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float | str = 0.5,
        target_sizes: Tensor | list[tuple[int, int]] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Model outputs to `scores`, `labels` and `boxes` (xyxy, in pixels of `target_sizes` and clipped to it) of each
        image. See `hf_detr.model.post_processing.post_process_detection`.

        Args:
            threshold: detections with a score above it stay. "per_class": those whose score reaches the threshold of
                their class, from `class_thresholds`.

        Raises:
            ValueError: "per_class" without `class_thresholds`; the message says how to get them.
        """
        limit: float | list[float]
        if not isinstance(threshold, str):
            limit = threshold
        elif threshold != "per_class":
            raise ValueError(f'threshold must be a number or "per_class", got {threshold!r}.')
        elif self.class_thresholds is None:
            raise ValueError(
                'threshold="per_class" needs class_thresholds in preprocessor_config.json. Measure them with '
                "examples/evaluate.py --save_thresholds, or set processor.class_thresholds, one number for each class."
            )
        else:
            limit = list(self.class_thresholds)
        return post_process_detection(outputs.logits, outputs.pred_boxes, limit, target_sizes)


def _height_width(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _affine(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Rescaling and normalising as one `value * factor - offset`, each (3, 1, 1)."""
    factor = torch.full((3, 1, 1), rescale_factor if do_rescale else 1.0, dtype=torch.float64)
    offset = torch.zeros(3, 1, 1, dtype=torch.float64)
    if do_normalize:
        spread = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        factor, offset = factor / spread, torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) / spread
    return factor.to(device, torch.float32), offset.to(device, torch.float32)


def _scale_of(image: Tensor, factor: Tensor, do_rescale: bool) -> Tensor:
    """Floats in [0, 1] stand for bytes / 255: rescaled already."""
    return factor * 255 if image.is_floating_point() and do_rescale else factor


# The class is saved and registered by its own name. transformers looks image processors up by name alone: were ours
# called like its `DetrImageProcessor`, importing hf_detr would change how every other DETR checkpoint is read.
DetrImageProcessor = HfDetrImageProcessor

__all__ = ["DetrImageProcessor", "HfDetrImageProcessor"]
