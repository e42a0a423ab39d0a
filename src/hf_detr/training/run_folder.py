"""The folder of a run: who may write into it, and what is in it to resume from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Progress:
    """What has to survive an interruption besides weights, optimizer, schedule and random numbers."""

    def __init__(self) -> None:
        self.epoch = 0
        self.best_ap = -1.0
        self.evaluations: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def claim_output_dir(
    output_dir: str | None, name: str, arguments: Mapping[str, Any], accelerator: Accelerator, *, resume: bool
) -> Path:
    """The folder of this run, `output_dir` or the next free `runs/NAME-N`, with the arguments in its `args.json`. All
    processes have to come here.

    Raises:
        SystemExit: the folder holds another run, which is never written to.
    """
    if output_dir:
        folder = Path(output_dir)
        if not resume and folder.exists() and any(folder.iterdir()):
            raise SystemExit(f"{folder} is not empty. Name another --output_dir, or --resume the run in it.")
    else:
        number = 1
        while Path(f"runs/{name}-{number}").exists():
            number += 1
        folder = Path(f"runs/{name}-{number}")
    accelerator.wait_for_everyone()  # everyone has looked before one creates it
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(dict(arguments), indent=2))
    return folder


def save_state(accelerator: Accelerator, output_dir: Path) -> None:
    """What resuming needs, in `state/`. The last one is there until the new one is complete."""
    new, current, old = (output_dir / name for name in ("state-new", "state", "state-old"))
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def newest_state(output_dir: Path) -> Path:
    """The folder to resume from.

    Raises:
        SystemExit: there is none.
    """
    for name in ("state", "state-old"):
        if (output_dir / name).is_dir():
            return output_dir / name
    raise SystemExit(f"{output_dir} holds no state to resume from.")
