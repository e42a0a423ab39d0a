"""Checkpoints to resume from, written atomically."""

import errno
import hashlib
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

from ..runtime import PARTIAL, atomic_write, sync

WEIGHTS = "model.safetensors"
DIGESTS = "digests.json"  # of the other files of a checkpoint
_NAME = re.compile(r"checkpoint-(\d+)(-epoch-\d+)?$")


class Progress:
    """What a checkpoint holds besides weights, optimizer, schedule and random states.

    Attributes:
        epoch: completed epochs.
        batches: batches of the current epoch that each process has trained on; `trained`: they are all, and the rest
            of the epoch is its evaluation.
        step: optimizer steps so far.
        meter: figures of the current epoch, see [`EpochMeter.state_dict`].
        best: highest value of the metric so far, None before the first evaluation; `best_epoch`: its epoch.
        evaluations: lines of the log with an evaluation.
        skipped: steps that were skipped because loss or gradients were not finite.
        spread: what the batches of an epoch depend on: processes, batch size, accumulated batches, seed, and of a
            stream the images that are shuffled together.
        data: what the run was trained on so far, see [`~hf_detr.training.run_data.identify`].
        planned_epochs: of the whole run.
        step_images: images of an optimizer step; `first_step_images`: at the beginning of the run.
        columns: names in the lines of the log.
        rate: the learning rate as a fraction of its maximum.
        rise: (epoch, fraction of the maximum, epochs): where, from what, and how long the rate rises to the schedule,
            since a run went on after its end.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches = 0
        self.trained = False
        self.step = 0
        self.meter: dict[str, Any] | None = None
        self.best: float | None = None
        self.best_epoch = 0
        self.evaluations: list[dict[str, float]] = []
        self.skipped = 0
        self.spread: dict[str, int] = {}
        self.data: dict[str, Any] = {}
        self.planned_epochs = self.step_images = self.first_step_images = 0
        self.columns: list[str] = []
        self.rate = 0.0
        self.rise: tuple[float, float, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def end_epoch(self) -> None:
        self.epoch, self.batches, self.trained, self.meter = self.epoch + 1, 0, False, None

    def within_epoch(self) -> bool:
        """Whether batches of the current epoch remain, out of those that some have been trained on."""
        return self.batches > 0 and not self.trained

    def add_evaluation(self, line: dict[str, float], metric: str) -> bool:
        """Whether it is at least as good as the best so far."""
        self.evaluations.append(line)
        if self.best is None or line[metric] > self.best:
            self.best_epoch = int(line["epoch"])
        is_best = self.best is None or line[metric] >= self.best
        self.best = line[metric] if self.best is None else max(self.best, line[metric])
        return is_best

    def forget_best(self) -> None:
        """What was measured on other images is not compared with what comes."""
        self.best, self.best_epoch = None, self.epoch

    def evaluations_since_best(self) -> int:
        return sum(line["epoch"] > self.best_epoch for line in self.evaluations)


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(m, path) for path in folder.glob("checkpoint-*") if (m := _NAME.match(path.name))]
    return [path for m, path in sorted(found, key=lambda pair: (int(pair[0][1]), bool(pair[0][2])))]


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints_in(folder)), None)


def use_plain_weights(accelerator: Accelerator, model: nn.Module, companions: Sequence[Any]) -> None:
    """Make Accelerate save and load weights under the names of the unwrapped model, so that a run can continue with
    another number of processes, and `from_pretrained` reads its checkpoints.

    Args:
        model: not wrapped.
        companions: config and processor, which are saved with it.
    """

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # Accelerate writes what remains in it
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


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, keep: int) -> Path:
    """Save the state of Accelerate as `folder/checkpoint-STEP`, or `checkpoint-STEP-epoch-N` at the end of an epoch.
    The folder gets its name when it is complete and on the disk; then the oldest checkpoints beyond `keep` are deleted.
    To be called on all processes together.

    Raises:
        OSError: it cannot be written, for example because the disk is full; earlier checkpoints are kept.
    """
    name = f"checkpoint-{progress.step}" + ("" if progress.batches else f"-epoch-{progress.epoch}")
    target, partial = folder / name, folder / (name + PARTIAL)
    if any_process(target.exists(), accelerator):
        return target
    if accelerator.is_main_process:
        for left in folder.glob(f"checkpoint-*{PARTIAL}"):  # of a run that was killed while saving
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()
    for write, everywhere in ((accelerator.save_state, True), (seal, False)):
        failure = None
        try:
            if everywhere or accelerator.is_main_process:
                write(partial)
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors wrap OSError in the others
            if accelerator.is_fsdp2:  # other processes wait in a collective operation and cannot be told
                raise OSError(_cannot_save(target, str(error), folder)) from error
            failure = str(error)
        if any_process(failure is not None, accelerator):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(_cannot_save(target, failure or "another process failed", folder))
    if accelerator.is_main_process:
        partial.rename(target)
        sync(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for old in checkpoints_in(folder)[:-keep]:
            remove(old)
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, progress: Progress, spread: dict[str, int]) -> None:
    """Restore everything that is registered with Accelerate, `progress` among it.

    Args:
        spread: what the batches of an epoch depend on now, see [`Progress`].

    Raises:
        ValueError: the checkpoint is from the middle of an epoch with other batches, or cannot be read.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{checkpoint} does not fit this run: {reason}") from error
    before = progress.spread
    different = ", ".join(
        f"{name} {value}, now {spread[name]}" for name, value in before.items() if value != spread[name]
    )
    if different and progress.within_epoch():
        raise ValueError(
            f"{checkpoint} was saved in the middle of an epoch, whose remaining batches depend on: {different}"
        )
    batches = f" and {progress.batches} batches" if progress.batches else ""
    accelerator.print(f"Resumed after epoch {progress.epoch}{batches}")


def seal(checkpoint: Path) -> None:
    """Note the digests of all files of a checkpoint in it, and wait until they are on the disk."""
    digests = {name: _digest(checkpoint / name) for name in _files_of(checkpoint)}
    (checkpoint / DIGESTS).write_text(json.dumps(digests, indent=2))
    sync_all(checkpoint)


def verify_checkpoint(checkpoint: Path) -> None:
    """Raise ValueError if a file of a checkpoint is damaged or missing; names it, and the checkpoint before."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text())
    except (OSError, ValueError):
        digests = {DIGESTS: ""}
    for name, digest in digests.items():
        path = checkpoint / name
        if path.is_file() and _digest(path) == digest:
            continue
        problem = "is damaged" if path.is_file() else "is missing"
        others = [other for other in checkpoints_in(checkpoint.parent) if other != checkpoint]
        fix = f"Move {checkpoint.name} away to go on from {others[-1].name}" if others else "There is no other"
        raise ValueError(f"{path} {problem}. {fix}. (--save_total_limit 2 keeps two checkpoints.)")


def _files_of(checkpoint: Path) -> list[str]:
    found = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != DIGESTS)
    return sorted(path.relative_to(checkpoint).as_posix() for path in found)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_save(target: Path, why: str, folder: Path) -> str:
    left = newest_checkpoint(folder)
    text = f"{target} cannot be saved: {why}."
    if str(errno.ENOSPC) in why or "space" in why.lower():
        text += f" {shutil.disk_usage(folder).free / 2**20:.0f} MB are free."
    return f"{text} {f'{left} is complete; free some space and start the same command again.' if left else ''}"


def any_process(mine: bool, accelerator: Accelerator) -> bool:
    """Whether `mine` is true on any process; to be called on all of them together."""
    if accelerator.num_processes == 1:
        return mine
    flag = torch.tensor([float(mine)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def remove(folder: Path) -> None:
    """Delete a folder; it loses its name before its files, so that no incomplete folder has the name."""
    doomed = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Wait until a folder and its files are on the disk."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def replace_files(source: Path, target: Path) -> None:
    """Move the files of a folder over those of another, each of them atomically and the weights first. If the target
    does not exist, the folder is moved at once."""
    sync_all(source)
    if not target.exists():
        source.rename(target)
        return
    for path in sorted(source.iterdir(), key=lambda path: (path.name != WEIGHTS, path.name)):
        path.replace(target / path.name)
    source.rmdir()


def trim_log(path: Path, last_epoch: int) -> None:
    """Remove the lines of a log that were written after the checkpoint from which a run continues."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # incomplete, the run was killed while writing it
            continue
        if line["epoch"] <= last_epoch:
            kept.append(text)
    with atomic_write(path) as file:
        file.writelines(f"{text}\n" for text in kept)
