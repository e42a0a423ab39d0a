"""One optimizer step over accumulated batches and processes, in any precision."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from ..model.loss import LossNormalizers
from ..runtime import more_about
from .checkpoints import any_process
from .non_finite import NonFiniteError, first_non_finite, image_ids, save_batch
from .normalizers import loss_normalizers

Batch = dict[str, Any]
MAX_SKIPPED_IN_A_ROW = 20
MAX_SAVED_BATCHES = 10  # for inspection


def in_groups(loader: Any, size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches of a loader, one per optimizer step; the last one may be shorter."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Copy the buffers of the first process to all others, in place. Trained batch norms collect statistics of the
    images of their own process; without this, processes would evaluate different models."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer, from_process=0)


class TrainStep:
    """An optimizer step over one or several batches per process.

    The loss is that of all images of all batches on all processes, divided by the number of all of their objects (see
    [`~hf_detr.model.loss.LossNormalizers`]): in float32 the gradients equal those of one process with one large batch.

    Args:
        model: as `accelerator.prepare` returned it.
        plain: the same model, not wrapped.
        ema: average of the weights, updated after each step, or None.
        clip: maximum norm of all gradients together (paper's code: 0.1).
        on_nan: `"stop"` or `"skip"` a step whose loss or gradients are not finite. In both cases the batch is saved in
            `folder/non_finite`, and a report names the module where it began. With a gradient scaler (fp16) gradients
            that overflow are left to the scaler, which skips the step and reduces its scale.

    Attributes:
        skipped: number of steps that were skipped.
        reports: a sentence on each of them; the loop prints and clears them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        plain: Any,
        optimizer: Any,
        scheduler: Any,
        *,
        ema: AveragedModel | None = None,
        clip: float = 0.1,
        on_nan: str = "stop",
        folder: Path = Path("."),
    ) -> None:
        self.accelerator, self.model, self.plain = accelerator, model, plain
        self.optimizer, self.scheduler, self.ema = optimizer, scheduler, ema
        self.clip, self.on_nan, self.folder = clip, on_nan, folder
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.norms = [m for m in plain.modules() if isinstance(m, _BatchNorm)]
        self.skipped = self.in_a_row = 0
        self.reports: list[str] = []

    def __call__(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor] | None:
        """The loss terms by name and `gradient_norm` before clipping, detached scalars of this process; their means
        over processes are those of the global batch. None if the step was skipped.

        Raises:
            NonFiniteError: loss or gradients are not finite and `on_nan` is `"stop"`, or 20 steps in a row were
                skipped; on all processes together.
        """
        normalizers = self._normalizers(batches)
        # a skipped step restores what the forward pass changes
        statistics = [(b, b.clone()) for norm in self.norms if norm.training for b in norm.buffers()]
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                random = self._random_state()
                loss, failure = None, None
                try:
                    with self.accelerator.autocast():  # the wrapped model has none under FSDP2
                        outputs = self.model(**batch, normalizers=normalizers)
                    loss = outputs.loss
                    finite = bool(loss.detach().isfinite())
                except FloatingPointError as error:
                    finite, failure = False, str(error)
                # before the backward pass, a collective operation
                if any_process(not finite, self.accelerator):
                    what = failure or f"loss {loss}"
                    self._skip(step, statistics, None if finite else batch, random, what)
                    return None
                self.accelerator.backward(loss)
            for name, value in outputs.loss_dict.items():
                sums[name] = sums.get(name, 0) + value.detach()
            sums["loss"] = sums.get("loss", 0) + outputs.loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP shards it
        if self.accelerator.scaler is None and not bool(norm.isfinite()):  # the same on all processes
            self._skip(step, statistics, batches[-1], random, f"norm of the gradients {norm.item()}")
            return None
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:  # by the scaler, on all processes
            self.in_a_row += 1
            if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteError(
                    f"Step {step}: gradients were not finite in fp16 in {MAX_SKIPPED_IN_A_ROW} steps in a row. "
                    f"{more_about('the-loss-is-nan')}"
                )
            return sums
        if self.ema is not None:
            self.ema.update_parameters(self.plain)
        self.in_a_row = 0
        return sums | {"gradient_norm": norm.detach()}

    def _random_state(self) -> list[Tensor]:
        """Of the CPU and of this process' GPU."""
        device = self.accelerator.device
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])

    def _set_random_state(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self.accelerator.device)

    def _normalizers(self, batches: Sequence[Batch]) -> LossNormalizers | None:
        accelerator = self.accelerator
        if len(batches) == 1 and accelerator.num_processes == 1:
            return None  # the model counts its batch itself
        return loss_normalizers(self.plain, batches, accelerator)

    def _skip(
        self,
        step: int,
        statistics: list[tuple[Tensor, Tensor]],
        batch: Batch | None,
        random: Sequence[Tensor],
        what: str,
    ) -> None:
        """Undo the step, report it, and stop if requested. `batch` is None where this process was not affected."""
        for buffer, before in statistics:
            buffer.copy_(before)
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.skipped += 1
        self.in_a_row += 1
        report = f"Step {step}: another process met numbers that are not finite."
        if batch is not None:
            report = f"Step {step}, images {image_ids(batch)}: {what}"
            if self.skipped <= MAX_SAVED_BATCHES:
                name = f"step-{step}-process-{self.accelerator.process_index}.pt"
                try:
                    report += f" (saved in {save_batch(self.folder / 'non_finite' / name, batch, {'what': what})})"
                except (OSError, RuntimeError) as error:
                    report += f" (cannot be saved: {error})"
            now = self._random_state()
            self._set_random_state(random)
            report += f"; {self._where(batch)}."
            self._set_random_state(now)
            for buffer, before in statistics:
                buffer.copy_(before)
        self.accelerator.wait_for_everyone()  # the launcher ends the others soon after one has raised
        self.reports.append(report)
        if self.on_nan == "stop":
            advice = "Lower the learning rate, check the images, or use --on_nan skip."
            raise NonFiniteError(f"{report} {advice} {more_about('the-loss-is-nan')}")
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{report} {MAX_SKIPPED_IN_A_ROW} steps in a row were skipped. {more_about('the-loss-is-nan')}"
            )

    def _where(self, batch: Batch) -> str:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return "the module where it began is not searched for under FSDP, where all processes have to run the model"
        with self.accelerator.autocast():
            return first_non_finite(self.plain, batch)
