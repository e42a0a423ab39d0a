"""Data sets in, batches out."""

from ..model.image_io import open_image
from .augmentation import Augmentation, AugmentedDataset, RandomSizeCrop, paper_augmentation, turns_augmentation
from .batching import (
    AspectRatioBatches,
    DistributedBatches,
    build_loader,
    image_sizes,
    padding_share,
    resized_sizes,
)
from .coco_export import export_coco
from .collate import DetectionCollator
from .find import find_source
from .load import load_detection_dataset
from .schema import category_ids, detection_features, detection_info, id2label, source_of
from .shapes import draw_shapes_dataset

__all__ = [
    "AspectRatioBatches",
    "Augmentation",
    "AugmentedDataset",
    "DetectionCollator",
    "DistributedBatches",
    "RandomSizeCrop",
    "build_loader",
    "category_ids",
    "detection_features",
    "detection_info",
    "draw_shapes_dataset",
    "export_coco",
    "find_source",
    "id2label",
    "image_sizes",
    "load_detection_dataset",
    "open_image",
    "padding_share",
    "paper_augmentation",
    "resized_sizes",
    "source_of",
    "turns_augmentation",
]
