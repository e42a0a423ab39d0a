"""Items of a data set to batches the model takes."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch

from ..image_processing_hf_detr import DetrImageProcessor

Item = tuple[PIL.Image.Image, dict[str, Any]]


def flip_horizontally(image: PIL.Image.Image, annotation: dict[str, Any]) -> Item:
    """Mirror image and boxes left to right."""
    flipped = []
    for record in annotation["annotations"]:
        x, y, width, height = record["bbox"]
        flipped.append(record | {"bbox": [image.width - x - width, y, width, height]})
    return PIL.ImageOps.mirror(image), annotation | {"annotations": flipped}


class DetectionCollator:
    """`collate_fn` of a DataLoader: items of `CocoDetection` to `pixel_values`, `pixel_mask` and `labels`.

    Args:
        processor: resizes, normalises, pads and converts the annotations.
        flip_probability: share of images mirrored left to right; randomness is PyTorch's, so that the loader's seed
            decides.
    """

    def __init__(self, processor: DetrImageProcessor, flip_probability: float = 0.0) -> None:
        self.processor = processor
        self.flip_probability = flip_probability

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        items = [flip_horizontally(*item) if torch.rand(()).item() < self.flip_probability else item for item in items]
        images, annotations = zip(*items, strict=True)
        return dict(self.processor(list(images), annotations=list(annotations), return_tensors="pt"))
