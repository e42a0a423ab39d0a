"""What the loss of an optimizer step is divided by."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..model.loss import LossNormalizers
from ..model.modeling_hf_detr import DetrForDetection


def loss_normalizers(
    model: DetrForDetection, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator | None = None
) -> LossNormalizers:
    """Counts over all batches of an optimizer step and, with an accelerator, over all processes, which then have to
    call this together. Without one no process waits for another.

    Args:
        model: not wrapped.
        batches: as `DetectionCollator` makes them, of this process.
    """
    counts = torch.stack([model.count_for_loss(batch["labels"]) for batch in batches]).sum(0)
    if accelerator is None:
        return LossNormalizers.from_counts(counts, 1)
    return LossNormalizers.from_counts(accelerator.reduce(counts, reduction="sum"), accelerator.num_processes)
