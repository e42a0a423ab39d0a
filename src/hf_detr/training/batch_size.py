"""The largest batch size that fits into memory, without changing the optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..data import DetectionCollator, image_sizes, resized_sizes
from ..data.schema import learned_objects
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..runtime import more_about
from .normalizers import loss_normalizers
from .optimization import parameter_groups
from .run_recipe import RunRecipe


def fit_batch_size(
    recipe: RunRecipe, model: DetrForDetection, train_set: Any, processor: DetrImageProcessor, accelerator: Accelerator
) -> tuple[int, int]:
    """The batch size that fits into memory, and the number of such batches per optimizer step, which together give the
    global batch of the recipe.

    Args:
        model: not yet prepared.
        train_set: in the schema of `hf_detr.data`, without augmentation.

    Raises:
        torch.OutOfMemoryError: not even one image fits; the message suggests what to change.
    """
    sizes = resized_sizes(image_sizes(train_set), processor.size)

    def build_optimizer(copy: DetrForDetection) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(copy, 0.0, 0.0, 0.0), fused=True)

    collate = DetectionCollator(processor)
    counts = [len(learned_objects(objects)["bbox"]) for objects in train_set["objects"]] if model.has_masks else None
    trial = trial_step(model, build_optimizer, train_set, most_expensive(sizes, counts), collate, accelerator)
    found = find_batch_size(trial, recipe.batch_size, accelerator)
    return found, recipe.gradient_accumulation_steps * (recipe.batch_size // found)


def find_batch_size(try_step: Callable[[int], object], wanted: int, accelerator: Accelerator) -> int:
    """The largest divisor of `wanted` with which a step fits into the memory of every process. To be called on all
    processes together; all of them get the same number.

    On a CPU an allocation rarely fails: the operating system kills a process that uses too much memory instead.

    Args:
        try_step: runs a step with this many images and raises PyTorch's error where memory runs out; see
            [`trial_step`].
        wanted: images per process and batch of the recipe.

    Raises:
        torch.OutOfMemoryError: not even one image fits; the message suggests what to change.
    """
    divisors = iter([size for size in range(wanted - 1, 0, -1) if wanted % size == 0])

    def attempt(batch_size: int) -> int:
        failed: RuntimeError | None = None
        try:
            try_step(batch_size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            # a new error, since the traceback of this one holds the tensors of the step
            failed = RuntimeError(str(error.args[0]))
        clear_device_cache(garbage_collection=True)
        # all processes continue with the next size where one has failed
        flag = torch.tensor(int(failed is not None), device=accelerator.device)
        if int(accelerator.reduce(flag, reduction="sum")):
            raise failed or RuntimeError("CUDA out of memory. In another process.")  # Accelerate matches the text
        return batch_size

    # from the largest to the smallest; 0, after the last one, ends the search
    search = find_executable_batch_size(
        attempt, starting_batch_size=wanted, reduce_batch_size_fn=lambda: next(divisors, 0)
    )
    try:
        return int(search())
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise torch.OutOfMemoryError(
            "Not even one image fits into memory. Smaller images (--image_size), a coarser feature map (--set "
            "feature_stride=32), --gradient_checkpointing, --mixed_precision bf16 or a smaller --backbone need less. "
            + more_about("out-of-memory")
        ) from None


def trial_step(
    model: DetrForDetection,
    build_optimizer: Callable[[DetrForDetection], torch.optim.Optimizer],
    rows: Any,
    choose: Callable[[int], Sequence[int]],
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    accelerator: Accelerator,
) -> Callable[[int], None]:
    """A function that runs a training step on a copy of the model, for [`find_batch_size`].

    Forward, backward and optimizer run in the precision of `accelerator`. The model, its gradients and PyTorch's random
    state are unchanged, and the copy is freed. The gradient buffers of DistributedDataParallel, about the size of the
    trained weights, are not included.

    Args:
        model: not yet prepared.
        build_optimizer: for the copy.
        rows: training images without augmentation, which makes most of them smaller, and sides at most 32 pixels
            longer.
        choose: batch size to indices of rows, such as [`most_expensive`].
        collate: makes a batch of them.
    """

    def step(batch_size: int) -> None:
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            batch = send_to_device(collate([rows[index] for index in choose(batch_size)]), accelerator.device)
            copy = deepcopy(model).to(accelerator.device).train()
            optimizer = build_optimizer(copy)
            # of this process only: the others would wait for one that runs out of memory
            normalizers = loss_normalizers(copy, [batch])
            with accelerator.autocast():
                loss = copy(**batch, normalizers=normalizers).loss
            loss.backward()
            optimizer.step()

    return step


def most_expensive(sizes: Sequence[tuple[int, int]], counts: Sequence[int] | None = None) -> Callable[[int], list[int]]:
    """For [`trial_step`]: the tallest, the widest and otherwise the largest images.

    Args:
        sizes: (height, width) of each image after the resize, see `hf_detr.data.resized_sizes`.
        counts: objects of each image, where each takes memory as large as the image, which masks do.
    """
    numbers = range(len(sizes))
    weights = counts or [1] * len(sizes)
    largest = sorted(numbers, key=lambda index: math.prod(sizes[index]) * max(weights[index], 1), reverse=True)
    tallest, widest = (max(numbers, key=lambda index: sizes[index][axis]) for axis in (0, 1))

    def choose(batch_size: int) -> list[int]:
        repeated = (largest * -(-batch_size // len(largest)))[:batch_size]  # a small data set is repeated
        return repeated if batch_size < 2 else [tallest, widest, *repeated[: batch_size - 2]]

    return choose


def typical(sizes: Sequence[tuple[int, int]]) -> Callable[[int], list[int]]:
    """Batch size to indices of images that are evenly spaced by size; `sizes` as of [`most_expensive`]."""
    order = sorted(range(len(sizes)), key=lambda index: math.prod(sizes[index]))
    return lambda batch_size: [order[(2 * k + 1) * len(order) // (2 * batch_size)] for k in range(batch_size)]
