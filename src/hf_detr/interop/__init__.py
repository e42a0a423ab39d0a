"""Read any checkpoint; read and write those of transformers; read those of the paper's code."""

from .loading import has_masks, load_model
from .original_checkpoints import load_original
from .transformers_checkpoints import WEIGHT_NAMES, read_config, read_processor
from .transformers_export import save_for_transformers, to_transformers

__all__ = [
    "WEIGHT_NAMES",
    "has_masks",
    "load_model",
    "load_original",
    "read_config",
    "read_processor",
    "save_for_transformers",
    "to_transformers",
]
