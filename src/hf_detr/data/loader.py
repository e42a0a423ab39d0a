"""The training and validation loaders."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler

from ..runtime.cores import keep_freed_memory
from .batching import AspectRatioBatches, DistributedBatches, image_sizes
from .streaming import SHUFFLE_BUFFER, ImageFeed, ShardedBatches, StreamedDataset

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_loader(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    num_workers: int = 0,
    accelerator: "Accelerator | None" = None,
    group_by_aspect_ratio: bool | None = None,
    drop_last: bool = False,
    shuffle_buffer: int = SHUFFLE_BUFFER,
) -> DataLoader[Any]:
    """The loader of this process: each process loads its own part of the dataset.

    The batch sampler is `AspectRatioBatches` or `DistributedBatches`, which distributes the images over the processes.
    With an accelerator, Accelerate's loader wraps it as if there were a single process, so that images are not
    distributed twice: it moves batches to the device and signals the end of the epoch to gradient accumulation.
    `accelerator.prepare` returns such a loader unchanged. `loader.set_epoch(epoch)` sets the epoch of the batches and
    of the augmentation; without an accelerator, call `set_epoch` of `loader.batch_sampler` and of `dataset`.

    Args:
        dataset: with a length, in the schema; for training usually an `AugmentedDataset`, also of a `StreamedDataset`,
            whose images this process then reads in the order of `ShardedBatches`.
        collate_fn: usually a `DetectionCollator`.
        batch_size: maximum number of images per process and step.
        training: shuffle. Otherwise images keep their order, each exactly once over all processes; all processes have
            the same number of batches, but with fewer images than processes, some have none.
        seed: of the batches and of the workers' random generators.
        num_workers: worker processes. Each uses one thread and is kept for the next epoch.
        group_by_aspect_ratio: `AspectRatioBatches`; default: for training only. Without shuffling, batches are sorted
            from tall to wide images.
        drop_last: see `DistributedBatches`.
        shuffle_buffer: of a `StreamedDataset`, see `ShardedBatches`; up to twice as many image files are in memory.

    Raises:
        TypeError: the dataset has no length, for example because it is an `IterableDataset`; or images for validation
            are streamed.
        ValueError: too few images, see `DistributedBatches`.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{type(dataset).__name__} has no length, so its images cannot be distributed over processes. Load it "
            "without streaming, or with load_streamed_dataset."
        )
    num_processes, process_index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    streamed = getattr(dataset, "dataset", dataset)
    if isinstance(streamed, StreamedDataset) and not training:
        raise TypeError("Images for validation are not streamed: load them with load_detection_dataset.")
    options: dict[str, Any] = {
        "seed": seed,
        "num_processes": num_processes,
        "process_index": process_index,
        "drop_last": drop_last,
    }
    grouped = training if group_by_aspect_ratio is None else group_by_aspect_ratio
    batches: Sampler[Any]
    if isinstance(streamed, StreamedDataset):
        sizes = image_sizes(streamed) if grouped else None
        planned = ShardedBatches(streamed.places(), sizes, batch_size, shuffle_buffer=shuffle_buffer, **options)
        batches = ImageFeed(planned, streamed)
    elif grouped:
        batches = AspectRatioBatches(
            image_sizes(dataset), batch_size, shuffle=training, allow_empty=not training, **options
        )
    else:
        batches = DistributedBatches(len(dataset), batch_size, shuffle=training, allow_empty=not training, **options)
    pin_memory = accelerator is not None and accelerator.device.type == "cuda"
    worker_seed = int(np.random.SeedSequence([seed, process_index]).generate_state(1)[0])
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(worker_seed),  # leaves the global generator unchanged
    )
    if accelerator is None:
        return loader
    loader = prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        rng_types=None,
        non_blocking=pin_memory,
    )
    loader._is_accelerate_prepared = True  # Accelerate's own flag: `prepare` skips such loaders
    return loader


def _start_worker(worker_id: int) -> None:
    """One thread per worker. PyTorch seeds torch, NumPy and `random` in each worker from the loader's generator."""
    torch.set_num_threads(1)
    keep_freed_memory()  # batches of the same size follow each other
    if "cv2" in sys.modules:  # used by Albumentations
        sys.modules["cv2"].setNumThreads(0)
