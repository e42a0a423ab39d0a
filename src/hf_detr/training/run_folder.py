"""The folder of a run: which process may write into it, and whether it holds a run to continue."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from filelock import BaseFileLock

from ..runtime import PARTIAL, acquire_lock, atomic_write
from .checkpoints import newest_checkpoint, remove, verify_checkpoint

FINISHED = "last"  # folder of the final weights, which a run writes last
LOCK = ".lock"
GRACE = 60  # seconds to wait for a process that was asked to stop and still holds the lock
FOUND_IN_TIME = ("epochs", "eval_every")  # what a run with `minutes` finds itself
# Arguments that may differ when a run continues: they do not change its result.
CHANGEABLE = (
    "output_dir",
    "resume",
    "found",
    "logging_steps",
    "report_to",
    "num_workers",
    "push_to_hub",
    "hub_private",
    "license",
    "save_total_limit",
    "save_minutes",
)


class RunEndedError(FileExistsError):
    """The folder holds this run, and it has ended."""


class RunFolder(NamedTuple):
    """The folder of this run.

    Args:
        arguments: as written to `args.json`; `found` is what the run has found with `--auto_batch_size` before.
        checkpoint: to continue from, if there is one.
        changes: arguments that are not those of the start before, each in words.
        lock: held until it is released or the process ends. None on all processes but the main one.
    """

    path: Path
    arguments: dict[str, Any]
    checkpoint: Path | None
    changes: list[str]
    lock: BaseFileLock | None


def acquire_run_dir(
    output_dir: str | None, name: str, arguments: Mapping[str, Any], accelerator: Accelerator, *, resume: bool
) -> RunFolder:
    """Create and lock the folder of this run: `output_dir`, or the next free `runs/NAME-N`. A run in it continues with
    `resume`, or if it was started with the same arguments, which are in its `args.json`. To be called on all processes
    together; all of them have to see the same folder. Of the same time (`minutes`) come the same epochs: a run that
    continues keeps those it has found.

    Raises:
        FileExistsError: the folder holds another run or other files, which are left alone, or the run has ended.
        FileNotFoundError: there is nothing to resume, or a machine does not see the files of the first one.
        TimeoutError: another process holds the lock.
        ValueError: a file of the checkpoint to continue from is damaged.
    """
    folder = Path(output_dir) if output_dir else next_free_run(name)
    accelerator.wait_for_everyone()  # all processes have looked for a free folder before one creates it
    lock = _lock(folder) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()  # a run that was ending has written all its files
    checkpoint, saved = None, {}
    if any(entry.name != LOCK and entry.suffix != PARTIAL for entry in folder.glob("*")):
        checkpoint, saved = newest_checkpoint(folder), _read_arguments(folder)
        if not resume:
            if saved.get("minutes") is not None and saved["minutes"] == arguments.get("minutes"):
                arguments = {**arguments, **{name: saved[name] for name in FOUND_IN_TIME}}
            _check_same_run(folder, saved, arguments)
            if (folder / FINISHED).exists():
                raise RunEndedError(f"{folder} holds this run, and it has ended. For more: --resume --epochs N")
        elif checkpoint is None:
            raise FileNotFoundError(
                f"{folder} holds no checkpoint to resume from. Start without --resume, in another folder."
            )
        if checkpoint is not None and accelerator.is_main_process:  # it reads all of it
            verify_checkpoint(checkpoint)
    accelerator.wait_for_everyone()
    same_batch_size = saved.get("batch_size") == arguments.get("batch_size")
    found = {"found": saved["found"]} if saved.get("found") and same_batch_size else {}
    if checkpoint is None:  # else `begin` writes them, when nothing can fail any more
        write_arguments(folder, dict(arguments) | found, accelerator)
    accelerator.wait_for_everyone()
    if not (folder / "args.json").is_file():
        raise FileNotFoundError(f"This machine does not see {folder}. Name an --output_dir that all machines share.")
    changes = _differences(saved, arguments) if checkpoint is not None else []
    return RunFolder(folder, dict(arguments) | found, checkpoint, changes, lock)


def begin(folder: RunFolder, accelerator: Accelerator) -> None:
    """The run goes on: it is not finished any more, and has the arguments given now. Called once everything that can
    be wrong has been checked."""
    if accelerator.is_main_process and (folder.path / FINISHED).exists():
        remove(folder.path / FINISHED)
    write_arguments(folder.path, folder.arguments, accelerator)


def write_arguments(folder: Path, arguments: Mapping[str, Any], accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        with atomic_write(folder / "args.json") as file:
            json.dump(dict(arguments), file, indent=2)


def next_free_run(name: str) -> Path:
    """The first of `runs/NAME-1`, `runs/NAME-2`, ... that does not exist."""
    number = 1
    while Path(f"runs/{name}-{number}").exists():
        number += 1
    return Path(f"runs/{name}-{number}")


def _read_arguments(folder: Path) -> dict[str, Any]:
    try:
        arguments: dict[str, Any] = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{folder} is not empty. Name another --output_dir.") from None
    return arguments


def _check_same_run(folder: Path, saved: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    different = _differences(saved, arguments, "{name}: {before} there, {now} here")
    if different:
        raise FileExistsError(
            f"{folder} holds another run ({'; '.join(different)}). "
            "Name another --output_dir, or --resume the run there."
        )


def _differences(
    saved: Mapping[str, Any], arguments: Mapping[str, Any], form: str = "{name} {before}, now {now}"
) -> list[str]:
    """Arguments that matter and are not as saved, each in words. One that an older version did not have is as saved if
    it is not used."""
    now = json.loads(json.dumps(dict(arguments)))
    saved = dict(saved) | ({"ema": 0.0} if saved.get("ema", 0.0) is None else {})  # of version 0.1
    new = {name for name, value in now.items() if name not in saved and value in (None, False)}
    names = sorted({*saved, *now} - set(CHANGEABLE) - new)
    return [
        form.format(name=name, before=saved.get(name), now=now.get(name))
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _lock(folder: Path) -> BaseFileLock:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return acquire_lock(folder / LOCK, seconds=GRACE)
    except TimeoutError:
        raise TimeoutError(f"Another process trains in {folder}. Stop it, or name another --output_dir.") from None
