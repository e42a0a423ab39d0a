"""Means of figures over the steps of an epoch, and images for the trackers."""

import math
import time
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


class EpochMeter(Meter):
    """A meter with the duration of what it has measured."""

    def clear(self) -> None:
        super().clear()
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.start = time.perf_counter() - state.get("seconds", 0.0)

    def figures(self, scheduler: Any) -> dict[str, float]:
        """Learning rates, images per second, and means of what was added, rounded."""
        means, seconds = self.means(), self.seconds
        images = means.pop("images", 0.0) * self.steps * self.accelerator.num_processes
        rates = scheduler.get_last_lr()
        line = {"learning_rate": rates[0], "backbone_learning_rate": rates[-1]}
        return line | {"images_per_second": round(images / seconds, 1)} | {n: round(v, 4) for n, v in means.items()}


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send an image to all trackers that show images. For the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(np.asarray(image))}, step=step)
        elif hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)


def describe_epoch(line: Mapping[str, float], epochs: int, *, left: float | None, best: str) -> str:
    """A line of the log for the console.

    Args:
        left: seconds until the end of the last epoch, None if they cannot be told.
        best: the best evaluation so far, in words; empty before the first one.
    """
    text = f"epoch {line['epoch']:3}/{epochs}  {line['seconds']:6.1f} s  loss {line.get('loss', math.nan):7.4f}"
    terms = (name for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice") if name in line)
    text += "".join(f"  {name.removeprefix('loss_')} {line[name]:.3f}" for name in terms)
    if "AP" in line:
        text += f"  AP {line['AP']:.4f}  AP50 {line['AP50']:.4f}  IoU {line['matched_iou']:.2f}"
        text += f"  mask AP {line['mask_AP']:.4f}" if "mask_AP" in line else ""
        text += f"  PQ {line['PQ']:.4f}" if "PQ" in line else ""
        text += f"  changed matches {line['changed_matches']:.0%}" if "changed_matches" in line else ""
    text += f"  best {best}" if best else ""
    return text if left is None else f"{text}  {describe_duration(left)} left"


def describe_duration(seconds: float) -> str:
    """In the unit that a person would say: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
