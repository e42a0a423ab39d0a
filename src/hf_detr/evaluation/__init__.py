"""COCO's numbers of a model's detections, and an analysis of its errors."""

from .coco_evaluator import CocoEvaluator, evaluate_detection
from .coco_metrics import METRICS, coco_metrics, format_metrics
from .error_analysis import best_thresholds, f1_by_threshold
from .evaluation_report import save_class_thresholds, write_report
from .trainer_metrics import METRIC_PATH, TrainerMetrics, records_from_batches

__all__ = [
    "METRICS",
    "METRIC_PATH",
    "CocoEvaluator",
    "TrainerMetrics",
    "best_thresholds",
    "coco_metrics",
    "evaluate_detection",
    "f1_by_threshold",
    "format_metrics",
    "records_from_batches",
    "save_class_thresholds",
    "write_report",
]
