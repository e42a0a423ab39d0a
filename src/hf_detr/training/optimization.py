"""What the training loop needs besides the model: parameter groups, precision and the machine's cores."""

import ctypes
import os
import sys
from typing import Any

import torch
from torch import nn
from transformers import get_wsd_schedule

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # numbers of glibc's malloc.h


def parameter_groups(
    model: nn.Module, learning_rate: float, backbone_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups for AdamW, as in the paper (section A.4): the transformer with its heads, and the backbone, which gets
    a rate of its own. Frozen parameters are in neither."""
    backbone: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if ".backbone." in f".{name}" else others).append(parameter)
    return [
        {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": backbone, "lr": backbone_learning_rate, "weight_decay": weight_decay},
    ]


def use_all_cores(processes: int = 1) -> int:
    """Give this process its share of the machine's cores, and return how many that is.

    `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which leaves all cores but one idle on a CPU. Any
    other value was chosen by someone and stays; without one, PyTorch has chosen well.

    Args:
        processes: processes that share this machine, unless the launcher says so itself (LOCAL_WORLD_SIZE).
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
    keep_freed_memory()
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Ask the C library (glibc) to reuse freed blocks instead of giving them back to the kernel at once. A training
    step frees and allocates the same tensors again; clearing fresh pages can take as long as computing on them."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
            mallopt(option, value)


def preferred_precision() -> str:
    """`"bf16"` where the hardware multiplies bfloat16 matrices natively, else `"no"`, in Accelerate's words."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "no"


def build_schedule(
    optimizer: torch.optim.Optimizer, kind: str, *, warmup: float, decay: float, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over all optimizer steps: it rises linearly in the first `warmup` share of them, stays, and in
    the last `decay` share falls linearly to 0 (`"wsd"`) or is a tenth (`"step"`, the paper's)."""
    rising, falling = round(warmup * total_steps), round(decay * total_steps)

    def step_schedule(step: int) -> float:
        return min(1.0, (step + 1) / max(rising, 1)) * (1.0 if step < total_steps - falling else 0.1)

    if kind == "step":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, step_schedule)
    schedule: torch.optim.lr_scheduler.LambdaLR = get_wsd_schedule(
        optimizer,
        num_warmup_steps=rising,
        num_decay_steps=falling,
        num_training_steps=total_steps,
        decay_type="linear",
    )
    return schedule
