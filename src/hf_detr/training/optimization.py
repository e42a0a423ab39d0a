"""Parameter groups, learning rate schedules, averaged weights and precision."""

import warnings
from collections.abc import Callable
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
    """Groups for AdamW: the backbone has its own learning rate (paper, section A.4), and parameters with one dimension
    (biases, weights of norms) and embeddings (object queries) have no weight decay. Frozen parameters are in no group,
    and no group is empty."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in embeddings
            groups.setdefault((".backbone." in f".{name}", not decays), []).append(parameter)
    return [
        {
            "params": groups[in_backbone, no_decay],
            "lr": backbone_learning_rate if in_backbone else learning_rate,
            "weight_decay": 0.0 if no_decay else weight_decay,
        }
        for in_backbone, no_decay in sorted(groups)
    ]


def preferred_precision() -> str:
    """A value for Accelerate's `mixed_precision`: `"bf16"` where the hardware multiplies bfloat16 matrices natively,
    else `"no"`."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "no"


def build_schedule(
    optimizer: torch.optim.Optimizer, kind: str, *, warmup: float, decay: float, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of the learning rate over `total_steps` optimizer steps.

    Args:
        kind: one of `SCHEDULES`: `"wsd"` (warm-up, stable, decay) falls linearly to 0 at the end; `"step"` (the
            paper's) is a tenth of the rate at the end; the others are those of transformers' `get_scheduler`, which do
            not use `decay`.
        warmup: fraction of the steps, at the beginning, in which the rate rises linearly.
        decay: fraction of the steps, at the end, in which it falls or is low.
    """
    rising, falling = warmup * total_steps, decay * total_steps  # not rounded: an epoch may get other steps later

    def warm(step: int) -> float:
        return min(1.0, step / rising) if rising else 1.0

    def wsd(step: int) -> float:
        return warm(step) * (min(1.0, max(0.0, total_steps - step) / falling) if falling else 1.0)

    def step_schedule(step: int) -> float:
        return warm(step + 1) * (1.0 if step < total_steps - falling else 0.1)

    if kind in ("wsd", "step"):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, wsd if kind == "wsd" else step_schedule)
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=round(rising), num_training_steps=total_steps
    )
    return schedule


def stretch_schedule(
    schedule: torch.optim.lr_scheduler.LRScheduler, kind: str, *, warmup: float, decay: float, total_steps: int
) -> None:
    """Give a schedule of [`build_schedule`] another number of steps; the arguments are as there. The optimizer has its
    rates after [`move_schedule`] or the next step."""
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    like = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=schedule.optimizer.defaults["lr"])
    other = build_schedule(like, kind, warmup=warmup, decay=decay, total_steps=total_steps)
    assert isinstance(other, torch.optim.lr_scheduler.LambdaLR)
    schedule.lr_lambdas = other.lr_lambdas * len(schedule.lr_lambdas)


def move_schedule(
    schedule: torch.optim.lr_scheduler.LRScheduler, step: int, *, rises_from: float | None = None, rise: int = 0
) -> None:
    """Put a schedule of [`build_schedule`] at an optimizer step: the optimizer gets the rates of that step, of its own
    base rates, whatever it had before.

    Args:
        rises_from: fraction of the base rates from which they rise linearly to those of the schedule, in `rise` steps
            from `step` on; None: they start there.
    """
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    if rises_from is not None:
        schedule.lr_lambdas = [_rising(factor, step, rises_from, rise) for factor in schedule.lr_lambdas]
    for group, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["initial_lr"] = rate
    schedule.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of")  # no optimizer step belongs to this one
        schedule.step()


def _rising(factor: Callable[[int], float], first: int, start: float, length: int) -> Callable[[int], float]:
    def rising(step: int) -> float:
        done = min(1.0, (step - first + 1) / (length + 1))
        return start + (factor(step) - start) * done

    return rising


class _Average:
    """How averaged weights follow the weights, see [`build_ema`]. `unit` is the number of steps that one step stands
    for, of the steps that `decay` is meant for."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.unit = 1.0

    @torch.no_grad()
    def __call__(self, averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        n = int(steps) * self.unit
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + n) / (10 + n)) ** self.unit)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of the weights, `ema += (1 - d) (weights - ema)` after each step, as a separate
    model (`.module`). `d` grows to `decay` as `(1 + n) / (10 + n)` with the number n of steps, so that initial weights
    lose their influence soon. Buffers, such as statistics of batch norm, are copied from the model."""
    ema = AveragedModel(model, multi_avg_fn=_Average(decay))
    ema.module.eval().requires_grad_(False)
    return ema


def rescale_ema(ema: AveragedModel, *, first: int, before: int, now: int) -> None:
    """Let an average forget as fast per image as before, where a step has another number of images.

    Args:
        first, before, now: images of an optimizer step at the beginning of the run, until now, and from now on.
    """
    average: Any = ema.multi_avg_fn
    average.unit = now / first
    ema.n_averaged.copy_(torch.round(ema.n_averaged * (before / now)).to(ema.n_averaged))
