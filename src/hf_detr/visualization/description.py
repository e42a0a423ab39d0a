"""What the parts of a model do with a batch: shapes, parameters, FLOPs and time, in the order of figure 2."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..model.pretrained import TRAINING_ONLY
from ..runtime.modes import evaluation_mode

# what `describe` lists, as far as a model has it: steps of the paper, and the modules that they consist of
STAGES = (
    ("backbone", "model.backbone"),
    ("projection", "model.input_projection"),
    ("position embedding", "model.position_embedding"),
    ("encoder", "model.encoder"),
    ("proposals", "model.proposals"),
    ("decoder, box head", "model.decoder"),
    ("class head", "class_labels_classifier"),
    ("mask attention", "bbox_attention"),
    ("mask head", "mask_head"),
)


@dataclass(frozen=True)
class Stage:
    """One part of a model.

    Args:
        shapes: of the main tensor that its last call returned, such as "1 x 100 x 256"; of the whole model, of each
            output.
        parameters: their number; `trained` is the number of those that require gradients.
        flops: floating point operations of matrix products, convolutions and attention in all its calls; a
            multiplication with its addition counts as two.
        milliseconds: of all its calls in one forward pass; the minimum over the passes.
    """

    name: str
    shapes: str
    parameters: int
    trained: int
    flops: int
    milliseconds: float


@dataclass(frozen=True)
class Description:
    """The parts of a model in order, for one batch, and the whole; `str` of it is a table."""

    stages: tuple[Stage, ...]
    whole: Stage
    images: tuple[int, ...]

    def __str__(self) -> str:
        rows = [("stage", "output", "parameters", "trained", "GFLOPs", "ms")]
        for stage in (*self.stages, self.whole):
            figures = (
                f"{stage.parameters:,}",
                f"{stage.trained:,}",
                f"{stage.flops / 1e9:.2f}",
                f"{stage.milliseconds:.1f}",
            )
            rows.append((stage.name, stage.shapes, *figures))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = [
            "  ".join(
                text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([f"Images: {shape_text(self.images)}", *(line.rstrip() for line in lines)])


@torch.no_grad()
def describe(model: Any, pixel_values: Tensor, pixel_mask: Tensor | None = None, *, repeats: int = 3) -> Description:
    """Run a model on a batch, in evaluation mode, and measure its parts.

    After one pass that counts operations, `repeats` passes are timed. The time of each part is its minimum over these
    passes, so the times of the parts need not sum to that of the model. GPUs are synchronized before and after each
    part.

    Args:
        pixel_values: (B, C, H, W), on the model's device and in its dtype.
        pixel_mask: (B, H, W), 1 = image, 0 = padding; None without padding.
    """
    parts = [(name, model.get_submodule(path)) for name, path in STAGES if _has(model, path)]
    with evaluation_mode(model):
        # the fused kernels of a CPU are not in the counter's table
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, _watch(parts) as (shapes, _):
            outputs = model(pixel_values, pixel_mask=pixel_mask)
        counts = counter.get_flop_counts()
        passes = []
        for _ in range(repeats):
            with _watch([*parts, ("whole", model)]) as (_, seconds):
                model(pixel_values, pixel_mask=pixel_mask)
            passes.append(seconds)
    root = type(model).__name__
    paths = dict(STAGES)
    times = {name: 1000 * min(one.get(name, 0.0) for one in passes) for name in (*dict(parts), "whole")}
    stages = [
        Stage(
            name,
            shapes.get(name, "not run"),
            *_parameters(module),
            sum(counts.get(f"{root}.{paths[name]}", {}).values()),
            times[name],
        )
        for name, module in parts
    ]
    known = {id(parameter) for _, module in parts for parameter in module.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    if others:
        training_only = any(getattr(model, name, None) is not None for name in TRAINING_ONLY)
        name = "queries, training-only parts" if training_only else "queries"
        trained = sum(parameter.numel() for parameter in others if parameter.requires_grad)
        stages.append(Stage(name, "", sum(parameter.numel() for parameter in others), trained, 0, 0.0))
    results = {name: getattr(outputs, name, None) for name in ("logits", "pred_boxes", "pred_masks")}
    text = ", ".join(f"{name} {shape_text(tensor.shape)}" for name, tensor in results.items() if tensor is not None)
    total = sum(counts["Global"].values())
    whole = Stage("whole model", text, *_parameters(model), total, times["whole"])
    return Description(tuple(stages), whole, tuple(pixel_values.shape))


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _parameters(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@contextmanager
def _watch(parts: list[tuple[str, nn.Module]]) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
    """Shapes of what the modules return, and the seconds of their calls, by name."""
    shapes: dict[str, str] = {}
    seconds: dict[str, float] = {}
    begun: dict[str, float] = {}

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def begin(name: str) -> Any:
        return lambda *_: begun.__setitem__(name, now())

    def end(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seconds[name] = seconds.get(name, 0.0) + now() - begun[name]
            shapes[name] = describe_shapes(output)

        return hook

    handles = [module.register_forward_pre_hook(begin(name)) for name, module in parts]
    handles += [module.register_forward_hook(end(name)) for name, module in parts]
    try:
        yield shapes, seconds
    finally:
        for handle in handles:
            handle.remove()


def describe_shapes(output: Any) -> str:
    """The shapes of a module's result: of the last level of a backbone, the last state of an encoder, and otherwise of
    the first tensor."""
    while not isinstance(output, Tensor):
        if hasattr(output, "map"):
            output = output.map
        elif isinstance(output, (list, tuple)) and len(output):
            levels = isinstance(output, list) or isinstance(output[0], Tensor)
            output = output[-1] if levels and not hasattr(output, "_fields") else output[0]
        else:
            return ""
    return shape_text(output.shape)


def shape_text(shape: Any) -> str:
    return " x ".join(str(side) for side in shape)
