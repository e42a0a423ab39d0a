"""Boxes drawn on images."""

from .draw import compare_with_ground_truth, contact_sheet, draw_boxes, draw_detections

__all__ = ["compare_with_ground_truth", "contact_sheet", "draw_boxes", "draw_detections"]
