"""Read any checkpoint; read and write those of transformers; read those of the paper's code."""

from .loading import has_masks, load_detector, load_model
from .original_checkpoints import load_original
from .other_detectors import OtherDetector
from .transformers_checkpoints import read_config, read_processor, weight_names
from .transformers_export import save_for_transformers, to_transformers

__all__ = [
    "OtherDetector",
    "has_masks",
    "load_detector",
    "load_model",
    "load_original",
    "read_config",
    "read_processor",
    "save_for_transformers",
    "to_transformers",
    "weight_names",
]
