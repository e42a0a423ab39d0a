"""How good the detections are."""

from .coco import METRICS, CocoEvaluator, evaluate_detection, format_metrics

__all__ = ["METRICS", "CocoEvaluator", "evaluate_detection", "format_metrics"]
