"""Boxes and masks on images, attention maps and a test of them, query slots, training curves."""

from .attention_maps import attention_maps
from .description import describe
from .draw import compare_with_ground_truth, contact_sheet, draw_boxes, draw_detections
from .explain import explain
from .masks_drawing import compare_masks_with_ground_truth, draw_masks
from .query_slots import query_slots
from .supervision_detections import from_supervision, to_supervision
from .training_curves import training_curves

__all__ = [
    "attention_maps",
    "compare_masks_with_ground_truth",
    "compare_with_ground_truth",
    "contact_sheet",
    "describe",
    "draw_boxes",
    "draw_detections",
    "draw_masks",
    "explain",
    "from_supervision",
    "query_slots",
    "to_supervision",
    "training_curves",
]
