"""All numbers of a model over a data set from one pass: boxes, masks and panoptic segments."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from ..runtime.extras import import_extra
from .coco_evaluator import CocoEvaluator
from .coco_metrics import MAX_DETECTIONS, METRICS, format_metrics
from .evaluation_loop import run_evaluators
from .mask_evaluators import MaskEvaluator, PanopticEvaluator
from .panoptic_metrics import QUALITIES, format_panoptic

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset
    from ..model.image_processing_hf_detr import DetrImageProcessor

MASK_METRICS = tuple(f"mask_{name}" for name in METRICS)
PANOPTIC_METRICS = tuple(f"{name}{group}" for group in ("", "_things", "_stuff") for name in QUALITIES)


class ModelEvaluation:
    """COCO's numbers of boxes; of a model with masks also those of its masks, and panoptic quality where the data set
    has stuff.

    Args:
        dataset: with masks, if these are measured; and if it has stuff, they must not overlap.
        with_masks: of a model with masks, measure them.
        max_detections: that will count per image and class; more than 100 are also kept of models whose scores are
            independent.

    Attributes:
        boxes, masks, segments: the evaluators; the latter two are None where nothing is measured.

    Raises:
        ImportError: hotcoco is not installed; raised before the first batch.
        ValueError: the data set has no masks, or has stuff and some masks overlap.
    """

    def __init__(
        self, dataset: "DetectionDataset", *, with_masks: bool = False, max_detections: int = MAX_DETECTIONS
    ) -> None:
        import_extra("hotcoco", "evaluation")
        self.boxes = CocoEvaluator(dataset, top_k=max_detections if max_detections > MAX_DETECTIONS else None)
        self.masks = MaskEvaluator(dataset) if with_masks else None
        self.segments = PanopticEvaluator(dataset) if with_masks and self.boxes.stuff_labels else None

    def run(
        self,
        model: nn.Module,
        loader: Iterable[Mapping[str, Any]],
        processor: "DetrImageProcessor",
        *,
        progress: bool = True,
    ) -> Self:
        """Run a model over the batches of the data set; see [`run_evaluators`].

        Returns:
            this evaluation, with the results of all processes in every process.
        """
        evaluators = [evaluator for evaluator in (self.boxes, self.masks, self.segments) if evaluator is not None]
        run_evaluators(model, loader, processor, evaluators, progress=progress)
        return self

    def compute(self, max_detections: int = MAX_DETECTIONS) -> dict[str, Any]:
        """The result of `coco_metrics` for boxes; that for masks with `mask_` before each name; and that of
        `panoptic_metrics`, whose numbers per class are `panoptic_per_class`."""
        metrics = self.boxes.compute(max_detections)
        if self.masks is not None:
            metrics |= {f"mask_{name}": value for name, value in self.masks.compute(max_detections).items()}
        if self.segments is not None:
            of_segments = self.segments.compute()
            metrics |= {"panoptic_per_class": of_segments.pop("per_class")} | of_segments
        return metrics


def format_evaluation(metrics: Mapping[str, Any]) -> str:
    """The result of [`ModelEvaluation.compute`] as tables to print."""
    if "mask_AP" not in metrics and "PQ" not in metrics:
        return format_metrics(metrics)
    parts = [f"Boxes\n{format_metrics(metrics)}"]
    if "mask_AP" in metrics:
        of_masks = {name.removeprefix("mask_"): value for name, value in metrics.items() if name.startswith("mask_")}
        parts.append(f"Masks\n{format_metrics(of_masks)}")
    if "PQ" in metrics:
        of_segments = {**metrics, "per_class": metrics["panoptic_per_class"]}
        parts.append(f"Panoptic segments, in percent\n{format_panoptic(of_segments)}")
    return "\n\n".join(parts)
