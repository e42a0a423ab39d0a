"""What the training loop needs besides the model: parameter groups, schedule, averaged weights and precision."""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import get_scheduler

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]

SCHEDULES = (
    "wsd", "step", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
)  # fmt: skip


def parameter_groups(
    model: nn.Module, learning_rate: float, backbone_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: the transformer with its heads, and the backbone, which gets a rate of its own (paper, section
    A.4). Of each, what has one dimension (biases, weights of norms) and embeddings (object queries) are a group without
    weight decay: nothing draws them to 0. Frozen parameters are in no group, and no group is empty."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in embeddings
            groups.setdefault((".backbone." in f".{name}", not decays), []).append(parameter)
    return [
        {
            "params": groups[in_backbone, spared],
            "lr": backbone_learning_rate if in_backbone else learning_rate,
            "weight_decay": 0.0 if spared else weight_decay,
        }
        for in_backbone, spared in sorted(groups)
    ]


def preferred_precision() -> str:
    """`"bf16"` where the hardware multiplies bfloat16 matrices natively, else `"no"`, in Accelerate's words."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "no"


def build_schedule(
    optimizer: torch.optim.Optimizer, kind: str, *, warmup: float, decay: float, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over all optimizer steps; it rises linearly in the first `warmup` share of them.

    Args:
        kind: one of `SCHEDULES`: `"wsd"` stays, and in the last `decay` share falls linearly to 0; `"step"` is a tenth
            in the last `decay` share (the paper's); the others are those of transformers' `get_scheduler`, in which
            `decay` has no part.
    """
    rising, falling = round(warmup * total_steps), round(decay * total_steps)

    def step_schedule(step: int) -> float:
        return min(1.0, (step + 1) / max(rising, 1)) * (1.0 if step < total_steps - falling else 0.1)

    if kind == "step":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, step_schedule)
    options = {"num_decay_steps": falling, "decay_type": "linear"} if kind == "wsd" else {}
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        "warmup_stable_decay" if kind == "wsd" else kind,
        optimizer,
        num_warmup_steps=rising,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=options,
    )
    return schedule


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of the weights, `ema += (1 - d) (weights - ema)` after each step, as a model of
    its own (`.module`). `d` grows to `decay` as `(1 + n) / (10 + n)` with the number of steps, so that the first,
    random weights are soon forgotten. Buffers, such as statistics of batch norm, are the model's."""

    @torch.no_grad()
    def update(averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        d = min(decay, (1 + int(steps)) / (10 + int(steps)))
        torch._foreach_lerp_(averages, weights, 1 - d)

    ema = AveragedModel(model, multi_avg_fn=update)
    ema.module.eval().requires_grad_(False)
    return ema
