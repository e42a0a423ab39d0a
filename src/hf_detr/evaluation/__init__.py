"""COCO's numbers of a model's detections and masks, panoptic quality, and an analysis of its errors."""

from .coco_evaluator import CocoEvaluator
from .coco_metrics import METRICS, coco_metrics, format_metrics
from .error_analysis import best_thresholds, f1_by_threshold
from .evaluation_loop import evaluate_detection, evaluate_panoptic, run_evaluators
from .evaluation_report import save_class_thresholds, write_report
from .mask_evaluators import MaskEvaluator, PanopticEvaluator
from .model_evaluation import MASK_METRICS, PANOPTIC_METRICS, ModelEvaluation, format_evaluation
from .panoptic_metrics import format_panoptic, panoptic_metrics
from .stored_detections import StoredDetections
from .trainer_metrics import METRIC_PATH, TrainerMetrics, records_from_batches

__all__ = [
    "MASK_METRICS",
    "METRICS",
    "METRIC_PATH",
    "PANOPTIC_METRICS",
    "CocoEvaluator",
    "MaskEvaluator",
    "ModelEvaluation",
    "PanopticEvaluator",
    "StoredDetections",
    "TrainerMetrics",
    "best_thresholds",
    "coco_metrics",
    "evaluate_detection",
    "evaluate_panoptic",
    "f1_by_threshold",
    "format_evaluation",
    "format_metrics",
    "format_panoptic",
    "panoptic_metrics",
    "records_from_batches",
    "run_evaluators",
    "save_class_thresholds",
    "write_report",
]
