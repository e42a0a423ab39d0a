"""The folder of a run: who may write into it, and whether a run in it goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from accelerate import Accelerator

from ..runtime import PARTIAL
from ..runtime import acquire_lock as hold_lock
from ..runtime import atomic_write as replacing
from .checkpoints import newest_checkpoint, remove

FINISHED = "last"  # the folder of the final weights, the last thing that a run writes
LOCK = ".lock"
GRACE = 60  # seconds that a process which was told to stop gets before another may not go on in its place
# Arguments that may differ when a run goes on: they do not change what is learned.
FREE = (
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


class Claim(NamedTuple):
    """A folder that is this run's; if it was begun there, its arguments and the checkpoint to go on from."""

    folder: Path
    begun: dict[str, Any]
    checkpoint: Path | None
    lock: IO[Any] | None


def claim_output_dir(
    output_dir: str | None, name: str, arguments: Mapping[str, Any], accelerator: Accelerator, *, resume: bool
) -> Claim:
    """The folder of this run, `output_dir` or the next free `runs/NAME-N`. A run that was begun there goes on with
    `resume`, or if it was begun with the same arguments, which are in its `args.json`. No other run gets in as long as
    the claim is held. All processes have to come here, and see the same folder.

    Raises:
        SystemExit: the folder holds another run, which is never written to, or one that has ended, or some process is
            writing there; or a machine does not see what the first one writes.
    """
    folder = Path(output_dir) if output_dir else _next_free(name)
    accelerator.wait_for_everyone()  # everyone has looked before one creates it
    lock = _lock(folder) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()  # a run that ends just now has written all it will
    checkpoint, begun = None, {}
    if any(entry.name != LOCK and entry.suffix != PARTIAL for entry in folder.glob("*")):
        checkpoint = newest_checkpoint(folder)
        if not resume:
            begun = _refuse_another_run(folder, arguments)
            if (folder / FINISHED).exists():
                raise SystemExit(f"{folder} holds this run, and it has ended. For more: --resume --epochs N")
        if resume and checkpoint is None:
            raise SystemExit(f"{folder} holds no checkpoint to resume from. Start without --resume, in another folder.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and (folder / FINISHED).exists():  # it is to go on
        remove(folder / FINISHED)
    note_arguments(folder, dict(arguments) | ({"found": begun["found"]} if begun.get("found") else {}), accelerator)
    accelerator.wait_for_everyone()
    if not (folder / "args.json").is_file():
        raise SystemExit(f"This machine does not see {folder}. Name an --output_dir that all machines share.")
    return Claim(folder, begun, checkpoint, lock)


def note_arguments(folder: Path, arguments: Mapping[str, Any], accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        with replacing(folder / "args.json") as file:
            json.dump(dict(arguments), file, indent=2)


def _next_free(name: str) -> Path:
    number = 1
    while Path(f"runs/{name}-{number}").exists():
        number += 1
    return Path(f"runs/{name}-{number}")


def _refuse_another_run(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run that was begun there, if they are the same."""
    try:
        begun: dict[str, Any] = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        raise SystemExit(f"{folder} is not empty. Name another --output_dir.") from None
    now = json.loads(json.dumps(dict(arguments)))
    names = sorted({*begun, *now} - set(FREE))
    different = [
        f"{name}: {begun.get(name)} there, {now.get(name)} here" for name in names if begun.get(name) != now.get(name)
    ]
    if different:
        raise SystemExit(
            f"{folder} holds another run ({'; '.join(different)}). "
            "Name another --output_dir, or --resume the run there."
        )
    return begun


def _lock(folder: Path) -> IO[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold_lock(folder / LOCK, seconds=GRACE)
    except TimeoutError:
        raise SystemExit(f"Another process trains in {folder}. Stop it, or name another --output_dir.") from None
