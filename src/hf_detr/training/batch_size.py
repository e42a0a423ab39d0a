"""The largest batch that fits into memory, found by trying, without a change of what is trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..model.loss import LossNormalizers
from ..model.modeling_hf_detr import DetrForDetection


def find_batch_size(try_step: Callable[[int], object], wanted: int, accelerator: Accelerator) -> int:
    """The largest divisor of `wanted` with which a step fits into the memory of every process. All processes have to
    come here, and all get the same number.

    With it, `wanted // found` times as many steps of gradient accumulation keep the global batch as it was (but for the
    evening out of the last ones, see `DistributedBatches`). On
    a CPU memory is rarely refused: the system stops a process that takes too much, and nothing can be tried.

    Args:
        try_step: runs a step with this many images and raises as PyTorch does where memory runs out; see
            [`trial_step`].
        wanted: images per process and step that the recipe asks for.

    Raises:
        RuntimeError: not even one image fits; it says what helps.
    """
    divisors = iter([size for size in range(wanted - 1, 0, -1) if wanted % size == 0])

    def attempt(batch_size: int) -> int:
        failed: RuntimeError | None = None
        try:
            try_step(batch_size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            # without what it holds on to: the tensors of the step in its traceback
            failed = RuntimeError(str(error.args[0]))
        clear_device_cache(garbage_collection=True)
        # where it fits here but not elsewhere, all go on with the next size together
        flag = torch.tensor(int(failed is not None), device=accelerator.device)
        if int(accelerator.reduce(flag, reduction="sum")):
            raise failed or RuntimeError("CUDA out of memory. In another process.")
        return batch_size

    # the sizes are tried from the largest down; 0, after the last one, makes Accelerate give up
    search = find_executable_batch_size(
        attempt, starting_batch_size=wanted, reduce_batch_size_fn=lambda: next(divisors, 0)
    )
    try:
        return int(search())
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise RuntimeError(
            "Not even one image fits into memory. Smaller images (--image_size), a coarser feature map (--set "
            "feature_stride=32), gradient checkpointing, --mixed_precision bf16, or a smaller backbone take less."
        ) from None


def trial_step(
    model: DetrForDetection,
    optimizer_of: Callable[[DetrForDetection], torch.optim.Optimizer],
    rows: Any,
    sizes: Sequence[tuple[int, int]],
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    accelerator: Accelerator,
) -> Callable[[int], None]:
    """For [`find_batch_size`]: a step as expensive as any of the training, on a copy of the model.

    It takes the tallest, the widest and otherwise the largest images, which are padded together, then runs forward,
    backward and optimizer in the precision of `accelerator`. The model, its gradients and PyTorch's random numbers stay
    as they were, and the copy is freed. Not in it: the buffers in which DistributedDataParallel exchanges gradients,
    about the size of the weights that train.

    Args:
        model: not yet prepared.
        optimizer_of: makes the optimizer of the copy.
        rows: training images without augmentation, which crops and shrinks them.
        sizes: (height, width) of each after the resize, see `hf_detr.data.resized_sizes`.
        collate: makes a batch of them.
    """
    numbers = range(len(sizes))
    largest = sorted(numbers, key=lambda index: math.prod(sizes[index]), reverse=True)
    tallest, widest = (max(numbers, key=lambda index: sizes[index][axis]) for axis in (0, 1))

    def step(batch_size: int) -> None:
        # of a small data set some images come twice
        repeated = (largest * -(-batch_size // len(largest)))[:batch_size]
        chosen = repeated if batch_size < 2 else [tallest, widest, *repeated[: batch_size - 2]]
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            batch = send_to_device(collate([rows[index] for index in chosen]), accelerator.device)
            copy = deepcopy(model).to(accelerator.device).train()
            optimizer = optimizer_of(copy)
            # counted here alone: a process that runs out of memory would leave the others waiting
            normalizers = LossNormalizers.from_counts(copy.count_for_loss(**batch), 1)
            with accelerator.autocast():
                loss = copy(**batch, normalizers=normalizers).loss
            loss.backward()
            optimizer.step()

    return step
