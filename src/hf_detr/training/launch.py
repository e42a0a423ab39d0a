"""The `Accelerator` of a training script."""

import os
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from ..runtime import end_with_launcher
from ..runtime.cores import use_all_cores
from .arguments import FinetuneArguments
from .optimization import preferred_precision
from .sharding import check_sharding, sharding_plugin


def build_accelerator(args: FinetuneArguments) -> Accelerator:
    """Accelerate as launched, but in the precision that is fast on this hardware unless one was chosen. From here on
    this process ends soon after its launcher, and uses its part of the machine's CPU cores.

    Raises:
        ValueError: a tracker is not installed, or FSDP is combined with what it does not support.
    """
    end_with_launcher()
    run = args.run
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" also where nothing was chosen
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision or (preferred_precision() if launched_with == "no" else None),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `TrainStep` accumulates
        fsdp_plugin=sharding_plugin(),
        log_with=run.report_to,
        project_dir="runs",
    )
    check_sharding(accelerator, ema=bool(args.recipe.ema), auto_batch_size=run.auto_batch_size)
    check_trackers(run.report_to, accelerator)
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    return accelerator


def check_trackers(requested: Sequence[str] | None, accelerator: Accelerator) -> None:
    """Accelerate skips trackers that are not installed silently.

    Raises:
        ValueError: a requested tracker is not installed.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = {str(name) for name in requested or ()} - {"all", *available}
    if missing:
        raise ValueError(f"--report_to {' '.join(sorted(missing))}: not installed. Install it, or omit it.")
