"""One optimizer step, whatever it is spread over: batches that are accumulated, processes, precisions."""

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
from .checkpoints import any_process
from .non_finite import NonFiniteError, first_non_finite, image_ids, save_batch

Batch = dict[str, Any]
PATIENCE = 20  # steps in a row that may be left out
MOST_SAVED = 10  # batches that are kept for inspection


def in_groups(loader: Any, size: int) -> Iterator[list[Batch]]:
    """The batches of a loader, `size` for each optimizer step; the last step may have fewer."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the buffers of the first one, in place. Batch norm that is being trained gathers statistics of
    a process' own images; without this, processes would evaluate different models, and not the one that is saved."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer, from_process=0)


class TrainStep:
    """Learn from a few batches at once.

    The loss is that of all images of all batches on all processes together, divided by all of their objects (see
    [`~hf_detr.model.loss.LossNormalizers`]): in float32 the gradients equal those of one process with one batch.

    Args:
        model: as `accelerator.prepare` gave it; `plain` without what Accelerate wraps around it, which is called for
            what belongs to one process.
        ema: averages the weights after each step, or None.
        clip: largest norm of all gradients together (paper's code: 0.1).
        on_nan: what to do with a loss or gradients that are not finite: `"stop"`, or `"skip"` the step. Either way the
            batch is saved in `folder/non_finite` and a sentence says where in the model it began. With a gradient
            scaler (fp16) gradients that overflow are its business: it leaves out the step and scales less.

    Attributes:
        skipped: steps that were left out; `reports`: a sentence on each, to be said and cleared by the loop.
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
        """The loss terms by name and `gradient_norm` before clipping, scalars without gradient, of this process: means
        over processes are those of the whole. None if the step was left out.

        Raises:
            NonFiniteError: a loss or gradients are not finite, and `on_nan` says stop; or 20 steps in a row were left
                out. On all processes at once.
        """
        normalizers = self._normalizers(batches)
        # a step that is left out has to bring back what the forward pass changes
        statistics = [(b, b.clone()) for norm in self.norms if norm.training for b in norm.buffers()]
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                random = self._random_state()
                loss, failure = None, None
                try:
                    with self.accelerator.autocast():  # which FSDP2 does not bring along
                        outputs = self.model(**batch, normalizers=normalizers)
                    loss = outputs.loss
                    finite = bool(loss.detach().isfinite())
                except FloatingPointError as error:
                    finite, failure = False, str(error)
                # before the backward pass, in which processes wait for each other
                if any_process(not finite, self.accelerator):
                    what = failure or f"loss {loss}"
                    self._leave_out(step, statistics, None if finite else batch, random, what)
                    return None
                self.accelerator.backward(loss)
            for name, value in outputs.loss_dict.items():
                sums[name] = sums.get(name, 0) + value.detach()
            sums["loss"] = sums.get("loss", 0) + outputs.loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # under FSDP each process has a part
        if self.accelerator.scaler is None and not bool(norm.isfinite()):  # the same on all processes
            self._leave_out(step, statistics, batches[-1], random, f"norm of the gradients {norm.item()}")
            return None
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:  # by the scaler, on all processes
            self.in_a_row += 1
            if self.in_a_row >= PATIENCE:
                raise NonFiniteError(f"Step {step}: in {PATIENCE} steps in a row gradients were not finite in fp16.")
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
            return None  # the model counts by itself
        counts = torch.stack([self.plain.count_for_loss(**batch) for batch in batches]).sum(0)
        return LossNormalizers.from_counts(accelerator.reduce(counts, reduction="sum"), accelerator.num_processes)

    def _leave_out(
        self,
        step: int,
        statistics: list[tuple[Tensor, Tensor]],
        batch: Batch | None,
        random: Sequence[Tensor],
        what: str,
    ) -> None:
        """Take back what the step has done so far; stop if that was asked for. `batch` is None where all was finite."""
        for buffer, before in statistics:
            buffer.copy_(before)
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.skipped += 1
        self.in_a_row += 1
        report = f"Step {step}: another process met numbers that are not finite."
        if batch is not None:
            report = f"Step {step}, images {image_ids(batch)}: {what}"
            if self.skipped <= MOST_SAVED:
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
        self.accelerator.wait_for_everyone()  # a launcher ends the others soon after one has raised
        self.reports.append(report)
        if self.on_nan == "stop":
            raise NonFiniteError(f"{report} Lower the learning rate, look at the images, or go on with --on_nan skip.")
        if self.in_a_row >= PATIENCE:
            raise NonFiniteError(f"{report} {PATIENCE} steps in a row were left out.")

    def _where(self, batch: Batch) -> str:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return "where it began is not looked for under FSDP, where all processes have to run the model"
        with self.accelerator.autocast():
            return first_non_finite(self.plain, batch)
