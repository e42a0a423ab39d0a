"""Figures of many steps, and where they are shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor


class Meter:
    """Means over steps and processes of figures that come as scalars on the device; nothing crosses to the host before
    the mean is asked for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.steps += 1

    def means(self) -> dict[str, float]:
        """All processes have to ask."""
        if not self.steps:
            return {}
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name].float() for name in names])
        means = self.accelerator.reduce(sums / self.steps, reduction="mean").tolist()
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All processes have to ask, and each gets the mean over them."""
        return {"means": self.means(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        device = self.accelerator.device
        self.sums = {n: torch.tensor(mean * self.steps, device=device) for n, mean in state["means"].items()}


def check_trackers(wanted: Sequence[str] | None, accelerator: Accelerator) -> None:
    """Accelerate leaves out what is not installed without a word.

    Raises:
        SystemExit: a tracker that was asked for is not installed.
    """
    there = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = {str(name) for name in wanted or ()} - {"all", *there}
    if missing:
        raise SystemExit(f"--report_to {' '.join(sorted(missing))}: not installed. Install it, or leave it out.")


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Show a picture in all trackers that can; on the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(np.asarray(picture))}, step=step)
        elif hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)
