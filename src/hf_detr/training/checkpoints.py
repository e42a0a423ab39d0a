"""Checkpoints that are there as a whole or not at all, whatever happens while they are written."""

import errno
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..runtime import PARTIAL, sync
from ..runtime import atomic_write as replacing

WEIGHTS = "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)(-epoch-\d+)?$")


class Progress:
    """What has to survive an interruption besides weights, optimizer, schedule and random numbers.

    Args:
        epoch: whole epochs that are done.
        batches: that each process has learned from in the epoch after that.
        step: optimizer steps that were taken.
        meter: figures of the epoch so far, as [`Meter.state_dict`] gives them; `seconds` it took.
        best: highest value of the metric so far; `best_epoch`: its epoch.
        evaluations: the lines of the log that have one.
        skipped: steps that were left out for numbers that were not finite.
        spread: over what an epoch is spread: processes, batch size, accumulated batches, seed.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches = 0
        self.step = 0
        self.meter: dict[str, Any] | None = None
        self.seconds = 0.0
        self.best = -1.0
        self.best_epoch = 0
        self.evaluations: list[dict[str, float]] = []
        self.skipped = 0
        self.spread: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def end_epoch(self) -> None:
        self.epoch, self.batches, self.meter, self.seconds = self.epoch + 1, 0, None, 0.0

    def note_evaluation(self, line: dict[str, float], metric: str) -> bool:
        """Whether it is as good as the best so far."""
        self.evaluations.append(line)
        if line[metric] > self.best:
            self.best_epoch = int(line["epoch"])
        as_good = line[metric] >= self.best
        self.best = max(self.best, line[metric])
        return as_good

    def without_improvement(self) -> int:
        """Evaluations since the best one."""
        return sum(line["epoch"] > self.best_epoch for line in self.evaluations)


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(m, path) for path in folder.glob("checkpoint-*") if (m := _NAME.match(path.name))]
    return [path for m, path in sorted(found, key=lambda pair: (int(pair[0][1]), bool(pair[0][2])))]


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints_in(folder)), None)


def use_plain_weights(accelerator: Accelerator, model: nn.Module, companions: Sequence[Any]) -> None:
    """Have Accelerate save and load the weights under the model's own names, whatever is wrapped around it, so that a
    run may go on with one process instead of several, and `from_pretrained` reads its checkpoints.

    Args:
        model: not wrapped.
        companions: config and processor, which are saved with it.
    """

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # what is left there, Accelerate would write
        if accelerator.is_main_process:
            state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt"})
            for companion in companions:
                companion.save_pretrained(folder)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        model.load_state_dict(load_file(Path(folder) / WEIGHTS))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, folder: Path, history: Progress, keep: int) -> Path:
    """Write `folder/checkpoint-STEP`, or `checkpoint-STEP-epoch-N` at the end of an epoch: all that Accelerate knows of
    the run. It has another name until it is complete and on the disk; then the oldest beyond `keep` go. All processes
    have to come here.

    Raises:
        SystemExit: it cannot be written, as on a full disk; the checkpoints before are still there.
    """
    name = f"checkpoint-{history.step}" + ("" if history.batches else f"-epoch-{history.epoch}")
    target, partial = folder / name, folder / (name + PARTIAL)
    if any_process(target.exists(), accelerator):
        return target
    if accelerator.is_main_process:
        for left in folder.glob(f"checkpoint-*{PARTIAL}"):  # by a run that was killed while saving
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()
    for write, everywhere in ((accelerator.save_state, True), (sync_all, False)):
        failure = None
        try:
            if everywhere or accelerator.is_main_process:
                write(partial)
        except (OSError, RuntimeError, SafetensorError) as error:  # the writers turn the first into the others
            if accelerator.is_fsdp2:  # in the middle of what all processes do together
                raise SystemExit(_cannot_save(target, str(error), folder)) from error
            failure = str(error)
        if any_process(failure is not None, accelerator):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise SystemExit(_cannot_save(target, failure or "another process failed", folder))
    if accelerator.is_main_process:
        partial.rename(target)
        sync(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for old in checkpoints_in(folder)[:-keep]:
            remove(old)
    return target


def _cannot_save(target: Path, why: str, folder: Path) -> str:
    left = newest_checkpoint(folder)
    text = f"{target} cannot be saved: {why}."
    if str(errno.ENOSPC) in why or "space" in why.lower():
        text += f" {shutil.disk_usage(folder).free / 2**20:.0f} MB are free."
    return f"{text} {f'{left} is whole; make room and start again with the same command.' if left else ''}"


def any_process(mine: bool, accelerator: Accelerator) -> bool:
    """Whether it is so on some process; all of them have to ask."""
    if accelerator.num_processes == 1:
        return mine
    flag = torch.tensor([float(mine)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def remove(folder: Path) -> None:
    """Delete a folder such that it is never there in part under its name."""
    doomed = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Wait until a folder with all that is in it is on the disk."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def replace_files(source: Path, target: Path) -> None:
    """Move the files of a folder over those of another, each at once and the weights first; a new folder is there as a
    whole. The source is gone then."""
    sync_all(source)
    if not target.exists():
        source.rename(target)
        return
    for path in sorted(source.iterdir(), key=lambda path: (path.name != WEIGHTS, path.name)):
        path.replace(target / path.name)
    source.rmdir()


def trim_log(path: Path, last_epoch: int) -> None:
    """Take out of a log what was written after the checkpoint that the run goes on from."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off
            continue
        if line["epoch"] <= last_epoch:
            kept.append(text)
    with replacing(path) as file:
        file.writelines(f"{text}\n" for text in kept)
