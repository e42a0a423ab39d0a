"""The image processor of an export: the sizes of its images, and whether it pads them."""

import torch
from torch import Tensor

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.processor_size import keeps_aspect_ratio, size_fields


def pads(processor: DetrImageProcessor) -> bool:
    """Whether batches of this image processor may be padded."""
    if not processor.do_resize or keeps_aspect_ratio(processor.size):
        return True
    pad_size = size_fields(processor.pad_size or {})
    return bool(processor.do_pad and pad_size) and pad_size != size_fields(processor.size)


def fit_processor(
    processor: DetrImageProcessor, shape: tuple[int, int, int], padding_exact: bool
) -> DetrImageProcessor:
    """A copy whose images fit the graph."""
    names = ("max_height", "max_width") if padding_exact else ("height", "width")
    size = dict(zip(names, shape[1:], strict=True))
    fields = processor.to_dict() | {"size": size, "do_resize": True, "pad_size": None}
    fitting: DetrImageProcessor = type(processor).from_dict(fields)
    return fitting


def working_size(processor: DetrImageProcessor) -> tuple[int, int]:
    """(height, width) of a 4:3 image after the processor's resize."""
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    values: Tensor = processor(image, return_tensors="pt")["pixel_values"]
    return values.shape[2], values.shape[3]
