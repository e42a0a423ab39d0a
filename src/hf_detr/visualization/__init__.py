"""Boxes and masks drawn on images."""

from .draw import compare_with_ground_truth, contact_sheet, draw_boxes, draw_detections
from .masks_drawing import compare_masks_with_ground_truth, draw_masks

__all__ = [
    "compare_masks_with_ground_truth",
    "compare_with_ground_truth",
    "contact_sheet",
    "draw_boxes",
    "draw_detections",
    "draw_masks",
]
