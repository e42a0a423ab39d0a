"""Where a loss or gradient that is not finite comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.modeling_hf_detr import DetrForDetection
from .normalizers import loss_normalizers


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite, and training stops."""


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
    """A sentence on the first module whose output is not finite. Runs the model once more; to reproduce dropout the
    caller restores the random state first. One process can call this alone.

    Args:
        model: not wrapped.
        batch: arguments of its `forward`.
    """
    if not _is_finite(batch["pixel_values"]):
        return "the image itself has values that are not finite"
    if not _is_finite([label["boxes"] for label in batch.get("labels") or ()]):
        return "the boxes of the labels are not finite"
    broken = [name for name, value in model.state_dict().items() if not _is_finite(value)]
    if broken:
        return f"the weights themselves are no longer finite, among them {broken[0]} ({len(broken)} tensors)"
    found: list[str] = []

    def watch(name: str, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(f"the first output that is not finite is that of {name or 'the model'} ({kind})")

        return hook

    hooks = [m.register_forward_hook(watch(name, type(m).__name__)) for name, m in model.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks of compiled modules are not called
            model(**batch, normalizers=loss_normalizers(model, [batch]))
    except FloatingPointError as error:  # raised by the matcher
        found.append(str(error))
    finally:
        for hook in hooks:
            hook.remove()
    return (
        found[0]
        if found
        else "all outputs of the model are finite, so it came from the backward pass or the sum of the loss"
    )


def save_batch(path: Path, batch: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Save the inputs of the model for inspection with `torch.load(path)`, together with `about`."""
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
