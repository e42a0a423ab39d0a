"""Pictures."""

from .draw import class_colour, compare_with_truth, contact_sheet, draw_boxes, draw_detections

__all__ = ["class_colour", "compare_with_truth", "contact_sheet", "draw_boxes", "draw_detections"]
