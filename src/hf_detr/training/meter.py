"""Means of figures over many steps, and images for the trackers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor


class Meter:
    """Means over steps and processes of scalars on the device. Nothing is copied to the host before the means are
    computed."""

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
        """To be called on all processes together."""
        if not self.steps:
            return {}
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name].float() for name in names])
        means = self.accelerator.reduce(sums / self.steps, reduction="mean").tolist()
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The means over all processes; to be called on all of them together."""
        return {"means": self.means(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        device = self.accelerator.device
        self.sums = {n: torch.tensor(mean * self.steps, device=device) for n, mean in state["means"].items()}


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send an image to all trackers that show images. For the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(np.asarray(image))}, step=step)
        elif hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)
