"""How long a run takes, from measured steps and evaluations, and how many epochs fit into a given time."""

import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..data import image_sizes, resized_sizes
from ..evaluation import ModelEvaluation
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..speed import prepare_for_training
from .batch_size import typical
from .normalizers import loss_normalizers
from .optimization import parameter_groups
from .run_recipe import RunRecipe

MEASURED = 3  # of each, after one to warm up
EVALUATIONS = 20  # of a run with --minutes, unless --eval_every is given
MAX_EPOCHS = 10_000


@dataclass(frozen=True)
class Pace:
    """Args:
    step: seconds of an optimizer step with its images.
    evaluation: seconds per evaluated image, in one process.
    """

    step: float
    evaluation: float


def measure_pace(
    recipe: RunRecipe,
    model: DetrForDetection,
    train_loader: Any,
    val_loader: Any,
    val_set: Any,
    processor: DetrImageProcessor,
    accelerator: Accelerator,
) -> Pace:
    """Train a copy of the model for a few steps on typical images, and evaluate a batch. The model and PyTorch's random
    state are unchanged. To be called on all processes together, which get the times of the slowest."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        copy = deepcopy(model).to(accelerator.device).train()
        prepare_for_training(copy)
        optimizer = torch.optim.AdamW(parameter_groups(copy, 0.0, 0.0, 0.0), fused=True)
        evaluation = ModelEvaluation(val_set, with_masks=copy.has_masks)

        def train(batch: Any) -> None:
            # of this process only: the others may be slower
            normalizers = loss_normalizers(copy, [batch])
            with accelerator.autocast():
                loss = copy(**batch, normalizers=normalizers).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def evaluate(batch: Any) -> None:
            with accelerator.autocast():
                evaluation.run(copy, [batch], processor, progress=False)

        step = _seconds(train_loader, recipe.batch_size, train, processor, accelerator)
        evaluated = _seconds(val_loader, recipe.batch_size, evaluate, processor, accelerator)
    slowest = accelerator.gather(torch.tensor([[step, evaluated]], device=accelerator.device)).amax(0)
    step, evaluated = slowest.tolist()
    return Pace(step * recipe.gradient_accumulation_steps, evaluated / recipe.batch_size)


def _seconds(
    loader: Any, batch_size: int, use: Callable[[Any], None], processor: DetrImageProcessor, accelerator: Accelerator
) -> float:
    """Seconds per batch of typical images: loading plus use, or the longer of the two if worker processes load."""
    choose = typical(resized_sizes(image_sizes(loader.dataset), processor.size))
    loading, using = [], []
    for _ in range(1 + MEASURED):
        start = time.perf_counter()
        batch = loader.collate_fn([loader.dataset[index] for index in choose(batch_size)])
        loaded = time.perf_counter()
        use(send_to_device(batch, accelerator.device))
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        loading.append(loaded - start)
        using.append(time.perf_counter() - loaded)
    load, used = (statistics.median(seconds[1:]) for seconds in (loading, using))
    return used + load if loader.num_workers == 0 else max(used, load / loader.num_workers)


def expected_seconds(recipe: RunRecipe, pace: Pace, num_train: int, num_val: int, processes: int) -> float:
    """Seconds of a whole run."""
    steps = recipe.epochs * math.ceil(num_train / (recipe.batch_size * recipe.gradient_accumulation_steps * processes))
    evaluations = math.ceil(recipe.epochs / recipe.eval_every)
    return pace.step * steps + pace.evaluation * evaluations * num_val / processes


def fit_epochs(
    recipe: RunRecipe,
    pace: Pace,
    seconds: float,
    num_train: int,
    num_val: int,
    processes: int,
    *,
    eval_every: int | None = None,
) -> RunRecipe:
    """The recipe with the largest number of epochs, at least 1, that take no longer than `seconds`.

    Args:
        eval_every: epochs between evaluations; None: about twenty evaluations.
    """
    longest = recipe
    for epochs in range(1, MAX_EPOCHS + 1):
        candidate = replace(recipe, epochs=epochs, eval_every=eval_every or math.ceil(epochs / EVALUATIONS))
        if epochs == 1 or expected_seconds(candidate, pace, num_train, num_val, processes) <= seconds:
            longest = candidate  # also after one that takes longer: 21 epochs have fewer evaluations than 20
    return longest
