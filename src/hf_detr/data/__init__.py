"""Datasets in any format, augmentation, and batches for training."""

from ..model.processor_size import resized_sizes
from .augmentation import Augmentation, flip_rotate_augmentation, paper_augmentation
from .augmented_dataset import AugmentedDataset
from .batching import image_sizes, padding_fraction
from .coco_export import export_coco
from .collate import DetectionCollator
from .load import load_detection_dataset, load_streamed_dataset
from .loader import build_loader
from .mask_results import mask_results
from .mixing import CopyPaste, Mosaic
from .panoptic_export import PanopticWriter, export_panoptic
from .schema import category_ids, detection_features, id2label, require_objects, source_of, stuff_labels
from .shapes import draw_shapes_dataset
from .streaming import StreamedDataset

__all__ = [
    "Augmentation",
    "AugmentedDataset",
    "CopyPaste",
    "DetectionCollator",
    "Mosaic",
    "PanopticWriter",
    "StreamedDataset",
    "build_loader",
    "category_ids",
    "detection_features",
    "draw_shapes_dataset",
    "export_coco",
    "export_panoptic",
    "flip_rotate_augmentation",
    "id2label",
    "image_sizes",
    "load_detection_dataset",
    "load_streamed_dataset",
    "mask_results",
    "padding_fraction",
    "paper_augmentation",
    "require_objects",
    "resized_sizes",
    "source_of",
    "stuff_labels",
]
