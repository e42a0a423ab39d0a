"""A model over the batches of a data set, for any of the evaluators."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..model.segmentation import DetrForSegmentation
from ..runtime.extras import import_extra
from ..runtime.modes import evaluation_mode
from .coco_evaluator import CocoEvaluator
from .mask_evaluators import MaskEvaluator, PanopticEvaluator

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset
    from ..model.image_processing_hf_detr import DetrImageProcessor


@torch.no_grad()
def predict_batches(
    model: Any,
    loader: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
    description: str = "Evaluating",
    masks: bool = True,
) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Each batch of a loader with the model's outputs, in evaluation mode, which is undone at the end.

    Args:
        model: any model or export; a wrapped one is unwrapped.
        loader: batches as `DetectionCollator` makes them, on any device.
        description: of the progress bar.
        masks: compute them, if the model has masks.
    """
    with evaluation_mode(model) as plain:
        options = {"masks_above": 1.0} if isinstance(plain, DetrForSegmentation) and not masks else {}
        device: Any = getattr(plain, "device", torch.device("cpu"))  # exported models run on the host
        for batch in tqdm(loader, desc=description, disable=not progress, leave=False):
            images, mask = (batch[name].to(device, non_blocking=True) for name in ("pixel_values", "pixel_mask"))
            yield batch, plain(pixel_values=images, pixel_mask=mask, **options)


def run_evaluators(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    processor: "DetrImageProcessor",
    evaluators: Sequence[CocoEvaluator],
    *,
    progress: bool = True,
) -> None:
    """Run a model over the batches of a data set once, and give all evaluators the results of all processes, in every
    process.

    Args:
        model: in training or evaluation mode; the mode is restored at the end.
        loader: batches as `DetectionCollator` makes them, on any device.
        evaluators: of the data set, without results.
        progress: show a progress bar.
    """
    for batch, outputs in predict_batches(model, loader, progress=progress):
        numbers = [torch.cat((label["image_id"].reshape(1), label["orig_size"])) for label in batch["labels"]]
        image_ids, sizes = torch.stack(numbers).cpu().split((1, 2), dim=1)
        for evaluator in evaluators:
            evaluator.update(image_ids[:, 0].tolist(), evaluator.post_process(processor, outputs, sizes))
    for evaluator in evaluators:
        evaluator.gather()


def evaluate_detection(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    dataset: "DetectionDataset",
    processor: "DetrImageProcessor",
    *,
    masks: bool = False,
    progress: bool = True,
) -> CocoEvaluator:
    """Run a model over the batches of a data set and collect the detections of all processes in every process.

    Args:
        model: in training or evaluation mode; the mode is restored at the end.
        loader: batches as `DetectionCollator` makes them, on any device.
        masks: collect the masks of the detections in place of their boxes, of a model with masks; the result is a
            [`MaskEvaluator`]. [`run_evaluators`] does both, and more, in one pass.
        progress: show a progress bar.

    Raises:
        ImportError: hotcoco is not installed; raised before the first batch.
        ValueError: with `masks`, the data set has none.
    """
    import_extra("hotcoco", "evaluation")
    evaluator = MaskEvaluator(dataset) if masks else CocoEvaluator(dataset)
    run_evaluators(model, loader, processor, [evaluator], progress=progress)
    return evaluator


def evaluate_panoptic(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    dataset: "DetectionDataset",
    processor: "DetrImageProcessor",
    *,
    progress: bool = True,
) -> PanopticEvaluator:
    """The same for the segments of a model with masks, by the paper's rule; `compute()` gives PQ, SQ and RQ.

    Raises:
        ImportError: hotcoco is not installed; raised before the first batch.
        ValueError: the data set has no masks.
    """
    import_extra("hotcoco", "evaluation")
    evaluator = PanopticEvaluator(dataset)
    run_evaluators(model, loader, processor, [evaluator], progress=progress)
    return evaluator
