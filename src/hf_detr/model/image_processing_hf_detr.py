"""Step 1: images and COCO annotations to what the model takes: `pixel_values`, `pixel_mask` and `labels`."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .annotations import coco_to_labels
from .configuration_hf_detr import refuse_unknown
from .foreign import import_interop
from .image_io import Image, allocate_batch, flat_list_of_images, to_image_tensor
from .mask_post_processing import (
    Sizes,
    default_threshold,
    post_process_instance,
    post_process_panoptic,
    post_process_semantic,
    resize_nearest,
)
from .post_processing import post_process_detection
from .processor_size import resized_size, rounded_size

logger = logging.get_logger(__name__)
MAX_SIZE = 1333  # longest edge beside a shortest edge that is given as a number, as in the paper
# Arguments of transformers' image processors: the values that change nothing, and why others are refused.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "format": (("coco_detection",), "annotations are COCO's for detection"),
    "do_convert_annotations": ((True,), "labels are always relative to the image"),
    "masks_path": ((), "masks are read from the `segmentation` of each object"),
    "data_format": (("channels_first",), "the model takes channels first"),
    "do_convert_rgb": ((True,), "num_channels decides what images become"),
    "do_center_crop": ((False,), "objects would be cut off"),
    "crop_size": ((), "objects would be cut off"),
    "image_seq_length": ((), "there are no image tokens"),
}
# Names in files of processors, beside the attributes.
OTHER_NAMES = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "max_size",
    *UNSUPPORTED,
)


class DetrImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Attributes of the processor beside transformers' own."""

    image_range: list[float | int] | tuple[float | int, ...] | None
    num_channels: int | None
    class_thresholds: list[float] | None
    panoptic_threshold: float | None
    return_segmentation_masks: bool | None
    round_size: bool | None


class HfDetrImageProcessor(TorchvisionBackend):
    """Resize, rescale, normalise and pad images, and turn COCO annotations into labels.

    Images may be PIL images, numpy arrays or torch tensors (channels first or last, grey, with or without alpha),
    paths or URLs, one or a list. Whatever they are, they become 8-bit RGB first: transparency is laid over white,
    EXIF orientation is applied (annotation tools show the turned image), and wider values are scaled: see
    `image_io.to_image_tensor` for the rule. `image_range=(black, white)` sets the values that are black and white in
    images that are not 8-bit. Float arrays with all values in [0, 1] are taken as already rescaled.

    Defaults are the paper's: shortest edge 800, longest at most 1333, ImageNet mean and standard deviation. Other
    forms of `size`: `{"height": h, "width": w}` for exactly this size, `{"max_height": h, "max_width": w}` for the
    largest that fits into it. `pad_size={"height": h, "width": w}` pads every batch to one size.
    """

    model_input_names = ["pixel_values", "pixel_mask"]
    valid_kwargs = DetrImagesKwargs
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
    # The score above which a query becomes a panoptic segment; None: the paper's 0.85. Saved with the processor.
    panoptic_threshold: float | None = None
    # The values of black and white in images that are not 8-bit; None takes the rule of `image_io.to_image_tensor`.
    image_range: tuple[float, float] | None = None
    # 3: RGB of any image; 1: grey of any image; others: images with this number of channels, as they are.
    num_channels: int = 3
    # Labels also have `masks`, as DetrForSegmentation needs them.
    return_segmentation_masks: bool = False
    # Heights and widths are rounded after the resize (`processor_size.rounded_size`), as they were in training with the
    # augmentations "paper-rounded" and "paper-one-size". At other sizes the last row and column of the feature map lie
    # partly outside the image. A model that has not seen such images places boxes too far to the right and the bottom.
    round_size: bool = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**self._usable(kwargs))

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
        known = {*cls.valid_kwargs.__annotations__, *OTHER_NAMES}
        unknown = sorted(set(stored) - known)
        if unknown:
            logger.warning_once(f"{cls.__name__} leaves out {unknown} of the stored settings, which it does not have.")
        stored = {name: value for name, value in stored.items() if name in known}
        # loaders pass names of their own, so that only what is nearly a setting can be told to be meant as one
        nearly = [name for name in kwargs if name not in known and difflib.get_close_matches(name, known, 1, 0.75)]
        refuse_unknown(cls.__name__, nearly, known)
        given = cls._usable({name: value for name, value in kwargs.items() if name in known}, stored.get("size"))
        others = {name: value for name, value in kwargs.items() if name not in known}
        return super().from_dict(stored | given, **others)

    # -- images in -----------------------------------------------------------------------------------------------

    def _prepare_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        *args: Any,
        device: Any = None,
        do_rescale: bool = True,
        input_data_format: Any = None,
        image_range: tuple[float, float] | None = None,
        num_channels: int = 3,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One image or any list of them to tensors (C, H, W), uint8, or float32 if they came as floats."""
        images = flat_list_of_images(images)
        if not images:
            raise ValueError("There are no images.")
        last = None if input_data_format is None else ChannelDimension(input_data_format) == ChannelDimension.LAST
        tensors = []
        for index, image in enumerate(images):
            with _naming(index, len(images)):
                tensor = to_image_tensor(
                    image, num_channels=num_channels, image_range=image_range, do_rescale=do_rescale, channels_last=last
                )
            tensors.append(tensor.to(device))
        return tensors

    def to_tensor(self, image: Image, timeout: float | None = None) -> Tensor:
        """An image as (C, H, W), as the attributes of this processor say; see [`to_image_tensor`]."""
        return to_image_tensor(
            image,
            timeout,
            num_channels=self.num_channels,
            image_range=self.image_range,
            do_rescale=bool(self.do_rescale),
        )

    def _standardize_kwargs(self, size: Any = None, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; a number as `size` is the shortest edge, with the paper's longest edge."""
        if isinstance(size, int) and not kwargs.get("default_to_square"):
            size = {"shortest_edge": size, "longest_edge": MAX_SIZE}
        return super()._standardize_kwargs(size=size, **kwargs)

    @classmethod
    def _usable(cls, given: dict[str, Any], size: Any = None) -> dict[str, Any]:
        """Arguments without those that change nothing. `size` is what `max_size` limits where no size is given.

        Raises:
            TypeError: there is no such argument.
            ValueError: it has a value that is not supported.
        """
        owner = cls.__name__
        refuse_unknown(owner, given, {*cls.valid_kwargs.__annotations__, *OTHER_NAMES})
        for name, (harmless, reason) in UNSUPPORTED.items():
            value = getattr(given.get(name), "value", given.get(name))
            if value is not None and value not in harmless:
                raise ValueError(f"{owner}: {name}={value!r} is not supported: {reason}.")
        kept = {name: value for name, value in given.items() if name not in UNSUPPORTED and name != "max_size"}
        if (limit := given.get("max_size")) is not None:
            wanted = kept.get("size") or {"shortest_edge": dict(size or cls.size).get("shortest_edge")}
            wanted = {"shortest_edge": wanted} if isinstance(wanted, int) else dict(wanted)
            wanted = {name: value for name, value in wanted.items() if value}
            if "shortest_edge" not in wanted or wanted.setdefault("longest_edge", limit) != limit:
                raise ValueError(f"max_size={limit} limits the longest edge, which contradicts size={wanted}.")
            kept["size"] = wanted
        if "num_channels" in kept and not (isinstance(kept["num_channels"], int) and kept["num_channels"] > 0):
            raise ValueError(f"{owner}: num_channels must be at least 1, got {kept['num_channels']!r}.")
        if kept.get("image_range") is not None and len(set(kept["image_range"])) != 2:
            raise ValueError(f"{owner}: image_range must be the values of black and white, got {kept['image_range']}.")
        return kept

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
                optionally `area` and `iscrowd`. Crowd objects are not in the labels. With
                `return_segmentation_masks=True` also `segmentation`: polygons or run lengths, as COCO has them.
            kwargs: any attribute of the processor, for this call (`size=...`, `do_resize=False`, ...).
                `input_data_format` says where arrays have their channels, if their shape does not.

        Returns:
            `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W), 1 = image, 0 = padding; with annotations
            also `labels`, one dict per image: `class_labels` (N,), `boxes` (N, 4) cxcywh in [0, 1] of the image
            without its padding, `area` (N,) in resized pixels, `iscrowd` (N,), `image_id` (1,), `orig_size` and
            `size` = (height, width) before and after resizing; with `return_segmentation_masks=True` also `masks`
            (N, height, width) bool of the resized image without its padding.

        Raises:
            ValueError: an image or annotation cannot be used; the message names it and says why.
            TypeError: there is no such argument.
        """
        return super().preprocess(images, annotations, **self._usable(kwargs, self.size))

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
        return_segmentation_masks: bool | None = False,
        round_size: bool | None = False,
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
                coco_to_labels(annotation, _height_width(image), index, masks=bool(return_segmentation_masks))
                for index, (image, annotation) in enumerate(zip(images, annotations, strict=True))
            ]
        resized = []
        for index, image in enumerate(images):
            with _naming(index, len(images)):
                resized.append(self._resized(image, size, resample, bool(round_size)) if do_resize else image)
        channels, device = resized[0].shape[0], resized[0].device
        factor, offset = _affine(do_rescale, rescale_factor, do_normalize, image_mean, image_std, channels, device)

        sizes = [_height_width(image) for image in resized]
        data: dict[str, Any]
        if do_pad or len(set(sizes)) == 1:
            batch_size = (pad_size.height, pad_size.width) if do_pad and pad_size is not None else None
            # written in place: no copy to normalise, no copy to pad, no copy to stack
            pixel_values, pixel_mask = allocate_batch(sizes, channels, batch_size, device=device)
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
                if "masks" in label:
                    label["masks"] = resize_nearest(label["masks"], (h, w))
            batch["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return batch

    def _resized(self, image: Tensor, size: SizeDict, resample: Any, rounded: bool) -> Tensor:
        height, width = _height_width(image)
        resized = resized_size((height, width), size)
        if rounded:
            resized = rounded_size(resized, size)
        if resized == (height, width):
            return image
        if rounded or 1 in resized:  # transformers would make 0 pixels of a very thin image
            size = SizeDict(height=resized[0], width=resized[1])
        try:
            return self.resize(image, size, resample)
        except RuntimeError as error:
            raise ValueError(f"An image of {width} x {height} pixels cannot be resized: {error}") from error

    def pad(  # type: ignore[override]
        self, images: list[Tensor] | Tensor, pad_size: Any = None, return_tensors: Any = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Pad images that are preprocessed to one size, at the bottom and the right.

        Args:
            images: (C, H, W) each.
            pad_size: `{"height": h, "width": w}`, or a number for both; None: the largest height and width.

        Returns:
            `pixel_values` (B, C, H, W) and `pixel_mask` (B, H, W), 1 = image, 0 = padding.
        """
        refuse_unknown(f"{type(self).__name__}.pad", kwargs, ())
        tensors = [torch.as_tensor(image) for image in images]
        if isinstance(pad_size, int):
            pad_size = {"height": pad_size, "width": pad_size}
        if isinstance(pad_size, SizeDict):
            pad_size = {"height": pad_size.height, "width": pad_size.width}
        if not (pad_size is None or isinstance(pad_size, Mapping)):
            raise TypeError(f'`pad_size` must be {{"height": h, "width": w}} or a number, got {pad_size!r}.')
        batch_size = None if pad_size is None else (pad_size["height"], pad_size["width"])
        if not tensors:
            raise ValueError("There are no images.")
        sizes, first = [_height_width(image) for image in tensors], tensors[0]
        pixel_values, pixel_mask = allocate_batch(
            sizes, first.shape[0], batch_size, dtype=first.dtype, device=first.device
        )
        for image, values, (h, w) in zip(tensors, pixel_values, sizes, strict=True):
            values[:, :h, :w] = image
        return BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, tensor_type=return_tensors)

    # -- results out ---------------------------------------------------------------------------------------------

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float | str = 0.5,
        target_sizes: Tensor | list[tuple[int, int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Model outputs to `scores`, `labels` and `boxes` (xyxy, in pixels of `target_sizes` and clipped to it) of each
        image. See `hf_detr.model.post_processing.post_process_detection`.

        Args:
            threshold: detections with a score above it stay. "per_class": those whose score reaches the threshold of
                their class, from `class_thresholds`.
            top_k: the most detections per image; None: one per query, or 100 of a model whose classes have independent
                scores (`class_activation="sigmoid"`).

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
        return post_process_detection(outputs, limit, target_sizes, top_k)

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: Sizes = None,
        rule: str = "paper",
    ) -> list[dict[str, Any]]:
        """Outputs of [`DetrForSegmentation`] to segments: each pixel belongs to at most one, and stuff is fused.

        Args:
            threshold: queries whose best class is an object with a score above it are kept; None: for the paper's rule
                `panoptic_threshold`, or 0.85 if the processor has none, and 0.5 for transformers'.
            mask_threshold, overlap_mask_area_threshold: of transformers' rule.
            label_ids_to_fuse: the classes that are stuff, such as `model.config.stuff_label_ids`; None: no class is.
            target_sizes: (height, width) of each image in pixels, before any resizing; None: that of the resized image
                for the paper's rule, that of the masks for transformers'.
            rule: `"paper"`: each pixel belongs to the kept query with the largest logit; all queries of a class that is
                stuff count as one segment, and segments of at most 4 pixels are removed and their pixels assigned
                again. `"transformers"`: each pixel belongs to the query with the largest score times mask probability,
                and queries that lose much of their mask to others are dropped.

        Returns:
            one dict per image: `segmentation` (height, width) int32, the id of a segment or 0, and `segments_info`, one
            dict per segment with `id` (from 1), `label_id`, `was_fused` and `score`.
        """
        if label_ids_to_fuse is None:
            logger.warning_once(
                "label_ids_to_fuse is not given, so no class is fused: pass label_ids_to_fuse="
                "model.config.stuff_label_ids, or an empty set if all classes are things."
            )
        if threshold is None:
            threshold = default_threshold(rule, self.panoptic_threshold)
        return post_process_panoptic(
            outputs, threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse, target_sizes, rule
        )

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sizes = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """Outputs of [`DetrForSegmentation`] to objects.

        Args:
            threshold: queries whose best class is an object with a score above it are kept.
            mask_threshold: probability above which a pixel is the object's.
            overlap_mask_area_threshold: a query is dropped unless more than this fraction of its mask is left to it.
            target_sizes: (height, width) of each image in pixels, before any resizing; None: that of the masks, with
                `return_binary_maps` that of the resized image.
            return_coco_annotation: `segmentation` is a list of COCO's run lengths, one per object.
            return_binary_maps: each object's own mask, which may overlap others, as the paper's code has it and COCO
                metrics need it; `overlap_mask_area_threshold` is not used then.

        Returns:
            one dict per image: `segmentation` (height, width) int32, the id of an object or 0; with
            `return_binary_maps` (N, height, width) bool. `segments_info`, one dict per object with `id` (from 1),
            `label_id`, `was_fused` (False) and `score`.

        Raises:
            ImportError: `return_coco_annotation` needs hotcoco or pycocotools, and none is installed.
        """
        return post_process_instance(
            outputs, threshold, mask_threshold, overlap_mask_area_threshold, target_sizes,
            bool(return_coco_annotation), return_binary_maps,
        )  # fmt: skip

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sizes = None, return_segmentation_scores: bool = False
    ) -> list[Any]:
        """Outputs of [`DetrForSegmentation`], with the masks of all queries, to the class of each pixel.

        Args:
            target_sizes: (height, width) of each image in pixels, before any resizing; None: that of the masks.
            return_segmentation_scores: also return the scores of all classes.

        Returns:
            one (height, width) of class ids per image; with scores, transformers'
            `SemanticSegmentationPostProcessorOutput` with `segmentation` and `segmentation_scores` (num_labels, height,
            width).
        """
        results = post_process_semantic(outputs, target_sizes)
        if not return_segmentation_scores:
            return [classes for classes, _ in results]
        from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

        return [
            SemanticSegmentationPostProcessorOutput(data={"segmentation": classes, "segmentation_scores": scores})
            for classes, scores in results
        ]


def _height_width(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _affine(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Rescaling and normalising as one `value * factor - offset`, each (C, 1, 1)."""
    factor = torch.full((channels, 1, 1), rescale_factor if do_rescale else 1.0, dtype=torch.float64)
    offset = torch.zeros(channels, 1, 1, dtype=torch.float64)
    if do_normalize:
        mean_of, spread = (
            torch.tensor(_per_channel(values, channels, name), dtype=torch.float64).view(-1, 1, 1)
            for name, values in (("image_mean", mean), ("image_std", std))
        )
        factor, offset = factor / spread, mean_of / spread
    return factor.to(device, torch.float32), offset.to(device, torch.float32)


def _per_channel(values: Any, channels: int, name: str) -> list[float]:
    """One value per channel. ImageNet's three of RGB become their mean for other numbers of channels."""
    listed = [float(value) for value in values] if isinstance(values, (list, tuple)) else [float(values)]
    if len(listed) == channels:
        return listed
    if len(listed) == 1 or listed in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        return [sum(listed) / len(listed)] * channels
    raise ValueError(f"{name} has {len(listed)} values, but the images have {channels} channels.")


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Adds which image of several an error is about."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if count == 1:
            raise
        raise type(error)(f"Image {index} of {count}: {error}") from error


def _scale_of(image: Tensor, factor: Tensor, do_rescale: bool) -> Tensor:
    """Floats in [0, 1] stand for bytes / 255: rescaled already."""
    return factor * 255 if image.is_floating_point() and do_rescale else factor


# The class is saved and registered by its own name. transformers looks image processors up by name alone: were ours
# called like its `DetrImageProcessor`, importing hf_detr would change how every other DETR checkpoint is read.
DetrImageProcessor = HfDetrImageProcessor

__all__ = ["DetrImageProcessor", "HfDetrImageProcessor"]
