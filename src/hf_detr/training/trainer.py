"""transformers' `Trainer` with the exact loss of an optimizer step."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from .normalizers import loss_normalizers


class DetrTrainer(Trainer):
    """`Trainer` whose step over several batches and processes equals one step over all of their images.

    `Trainer` itself takes the mean of the losses of all batches, in which an object counts less the more objects its
    batch has; for detection it does not know the number of objects that a sum would have to be divided by. Here every
    batch gets the counts of the whole step, see [`~hf_detr.training.normalizers.loss_normalizers`]. Batch norm that is
    being trained still computes its statistics batch by batch.

    Arguments and methods are those of `Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the losses of the batches are summed, not averaged

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and what their losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        model = self.accelerator.unwrap_model(self.model)
        return batches, loss_normalizers(model, batches, self.accelerator) if batches else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As in `Trainer`; `num_items_in_batch` are the `LossNormalizers` of a training step."""
        return super().compute_loss(model, {**inputs, "normalizers": num_items_in_batch}, return_outputs)
