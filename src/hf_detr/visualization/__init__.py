"""Boxes drawn on images."""

from .draw import class_colour, compare_with_ground_truth, contact_sheet, draw_boxes, draw_detections

__all__ = ["class_colour", "compare_with_ground_truth", "contact_sheet", "draw_boxes", "draw_detections"]
