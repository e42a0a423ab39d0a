"""DETR checkpoints of other code bases: in, and out again."""

from .original_checkpoints import coco_labels, load_original
from .transformers_checkpoints import register_readers
from .transformers_export import save_for_transformers, to_transformers

__all__ = ["coco_labels", "load_original", "register_readers", "save_for_transformers", "to_transformers"]
