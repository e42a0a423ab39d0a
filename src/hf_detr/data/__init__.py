"""Data sets in, batches out."""

from ..images import open_image
from .coco import CocoDetection, find_annotations
from .collate import DetectionCollator, flip_horizontally
from .shapes import draw_shapes_dataset

__all__ = [
    "CocoDetection",
    "DetectionCollator",
    "draw_shapes_dataset",
    "find_annotations",
    "flip_horizontally",
    "open_image",
]
