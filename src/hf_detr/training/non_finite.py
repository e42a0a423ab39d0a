"""When a number is not finite: where it came from, and what to look at later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.loss import LossNormalizers
from ..model.modeling_hf_detr import DetrForDetection


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite, and training was told to stop at that."""


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, Mapping):
        return all(_is_finite(entry) for entry in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(entry) for entry in value)
    return True


@torch.no_grad()
def first_non_finite(model: DetrForDetection, batch: Mapping[str, Any]) -> str:
    """Which module's output was the first that is not finite, in words. Runs the model once more; the caller sees to it
    that dropout draws the same.

    Args:
        model: not wrapped.
        batch: what its `forward` takes.

    No process waits for another here.
    """
    if not _is_finite(batch["pixel_values"]):
        return "the image itself has values that are not finite"
    if not _is_finite([label["boxes"] for label in batch.get("labels") or ()]):
        return "the boxes of the labels are not finite"
    broken = [name for name, value in model.state_dict().items() if not _is_finite(value)]
    if broken:
        return f"the weights themselves are no longer finite, among them {broken[0]} ({len(broken)} tensors)"
    found: list[str] = []

    def look(name: str, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(f"the first output that is not finite is that of {name or 'the model'} ({kind})")

        return hook

    hooks = [m.register_forward_hook(look(name, type(m).__name__)) for name, m in model.named_modules()]
    try:
        normalizers = LossNormalizers.from_counts(model.count_for_loss(**batch), 1)  # without asking other processes
        with torch.compiler.set_stance("force_eager"):  # hooks do not see into compiled parts
            model(**batch, normalizers=normalizers)
    except FloatingPointError as error:  # of the matching
        found.append(str(error))
    finally:
        for hook in hooks:
            hook.remove()
    return (
        found[0] if found else "all outputs of the model are finite; it was the backward pass, or the sum of the loss"
    )


def save_batch(path: Path, batch: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Keep a batch for inspection: `torch.load(path)` gives what the model was given, and `about`."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def on_host(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu()
        if isinstance(value, Mapping):
            return {key: on_host(entry) for key, entry in value.items()}
        return [on_host(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    torch.save({name: on_host(batch[name]) for name in batch} | {"about": dict(about)}, path)
    return path


def image_ids(batch: Mapping[str, Any]) -> list[int]:
    return [int(label["image_id"]) for label in batch["labels"] if "image_id" in label]
