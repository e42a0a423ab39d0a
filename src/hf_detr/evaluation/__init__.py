"""How good the detections are, and what is wrong with the others."""

from .analysis import best_thresholds, confusion_matrix, f1_by_threshold, precision_recall
from .coco_metrics import METRICS, CocoEvaluator, coco_metrics, evaluate_detection, format_metrics, metrics_by_size
from .errors import ERROR_TYPES, error_breakdown, find_errors, worst_images
from .evaluation_report import analyse, save_class_thresholds, write_report
from .trainer_metrics import METRIC_PATH, TrainerMetrics, records_from_batches

__all__ = [
    "ERROR_TYPES",
    "METRICS",
    "METRIC_PATH",
    "CocoEvaluator",
    "TrainerMetrics",
    "analyse",
    "best_thresholds",
    "coco_metrics",
    "confusion_matrix",
    "error_breakdown",
    "evaluate_detection",
    "f1_by_threshold",
    "find_errors",
    "format_metrics",
    "metrics_by_size",
    "precision_recall",
    "records_from_batches",
    "save_class_thresholds",
    "worst_images",
    "write_report",
]
