"""How long a run takes, from a measured step, and how many epochs fit into a given time."""

import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import DetectionCollator, image_sizes, resized_sizes
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from .arguments import FinetuneArguments
from .batch_size import trial_step, typical
from .meter import describe_duration
from .optimization import parameter_groups
from .run_recipe import RunRecipe

MEASURED_STEPS = 3
EVALUATION = 0.4  # time of an image in an evaluation, of that in a training step: a forward pass and the matching
EVALUATIONS = 20  # of a run with --minutes


def measure_step(
    recipe: RunRecipe, model: DetrForDetection, train_set: Any, processor: DetrImageProcessor, accelerator: Accelerator
) -> float:
    """Seconds of an optimizer step on typical images, without loading them: the median of a few, after one to warm up.
    Nothing is trained. To be called on all processes together, which get the time of the slowest."""
    sizes = resized_sizes(image_sizes(train_set), processor.size)

    def build_optimizer(copy: DetrForDetection) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(copy, 0.0, 0.0, 0.0), fused=True)

    step = trial_step(model, build_optimizer, train_set, typical(sizes), DetectionCollator(processor), accelerator)
    seconds = []
    for _ in range(1 + MEASURED_STEPS):
        start = time.perf_counter()
        step(recipe.batch_size)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(seconds[1:]), device=accelerator.device)
    gathered = accelerator.gather(slowest[None])
    return float(gathered.max()) * recipe.gradient_accumulation_steps


def expected_seconds(recipe: RunRecipe, step: float, num_train: int, num_val: int, processes: int) -> float:
    """Seconds of a whole run.

    Args:
        step: seconds of an optimizer step.
    """
    images = recipe.batch_size * recipe.gradient_accumulation_steps * processes
    steps = recipe.epochs * math.ceil(num_train / images)
    evaluations = math.ceil(recipe.epochs / recipe.eval_every)
    return step * (steps + EVALUATION * evaluations * num_val / images)


def plan_time(
    args: FinetuneArguments,
    recipe: RunRecipe,
    model: DetrForDetection,
    train_set: Any,
    val_set: Any,
    processor: DetrImageProcessor,
    accelerator: Accelerator,
) -> RunRecipe:
    """Say how long the run will take. With `--minutes`, the recipe with as many epochs as fit; a run that continues
    keeps those that it began with."""
    step = measure_step(recipe, model, train_set, processor, accelerator)
    counts = len(train_set), len(val_set), accelerator.num_processes
    if args.run.minutes is not None:
        epochs = _begun_with(args) or _epochs_within(60 * args.run.minutes, recipe, step, *counts)
        recipe = replace(recipe, epochs=epochs, eval_every=max(1, epochs // EVALUATIONS))
    seconds = expected_seconds(recipe, step, *counts)
    text = f"Expected: about {describe_duration(seconds)} here for {recipe.epochs} epochs, {step:.2g} s a step."
    if args.run.minutes is not None and seconds > 60 * args.run.minutes:
        text += f" That is more than --minutes {args.run.minutes:g}: fewer images or a smaller model take less."
    accelerator.print(text)
    return recipe


def _epochs_within(budget: float, recipe: RunRecipe, step: float, num_train: int, num_val: int, processes: int) -> int:
    """The largest number of epochs, at least 1, that take no longer than `budget` seconds."""
    epochs = 1
    while epochs < 10_000:
        longer = replace(recipe, epochs=epochs + 1, eval_every=max(1, (epochs + 1) // EVALUATIONS))
        if expected_seconds(longer, step, num_train, num_val, processes) > budget:
            break
        epochs += 1
    return epochs


def _begun_with(args: FinetuneArguments) -> int | None:
    """The epochs of the run in the output folder, if it was started with the same time."""
    file = Path(args.run.output_dir or "") / "args.json"
    if not args.run.output_dir or not file.is_file():
        return None
    saved = json.loads(file.read_text())
    return int(saved["epochs"]) if saved.get("minutes") == args.run.minutes else None
