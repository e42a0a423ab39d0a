"""Which images go into which batch, on which process; and the loader that is made of it."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler, Subset
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from ..runtime.cores import keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

Size = tuple[int, int]

# Chosen on 20,000 images with a mix of shapes like COCO's, 4 a batch, where 27.6 % are padding without groups: 8 leave
# 5.1 %, 32 leave 1.5 %, 64 leave 0.9 %. Of small data sets, more would bring the same images together again and again.
BATCHES_PER_BLOCK = 32


class DistributedBatches(Sampler[list[int]]):
    """Batches of one of several processes: together they hold each image once an epoch, none twice, none left out.

    All processes get the same number of batches. To that end images are spread over as few batches as that takes, whose
    sizes differ by one at most: 100 images on 2 processes with a batch size of 32 become 4 batches of 25. Only where
    that cannot be (5 images on 2 processes with a batch size of 1), some batches hold 2 images instead of 1.

    An epoch is a function of `(seed, epoch)`, the same on all processes; nothing is drawn from global generators.

    Args:
        num_images: in the data set.
        batch_size: images a process and step, at most.
        shuffle: draw the batches anew each epoch; otherwise images stay in their order, and batch `i` goes to process
            `i % num_processes`.
        seed: not negative, the same on all processes.
        num_processes, process_index: how many there are, and which this is.
        drop_last: leave out the images, others each epoch, that do not fill a batch of `batch_size` on every process.
        allow_empty: with fewer images than processes, give the last processes no batch, instead of an error.

    Raises:
        ValueError: fewer images than processes, or with `drop_last` than a full batch on each.
    """

    # No attribute is called `batch_size`: with one, Accelerate's `gather_for_metrics` would assume that all batches but
    # the last have that size and that the end is filled up with images seen before, and cut off results of real ones.

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        drop_last: bool = False,
        allow_empty: bool = False,
    ) -> None:
        if batch_size < 1 or seed < 0 or not 0 <= process_index < num_processes:
            raise ValueError(
                "batch_size must be at least 1, seed at least 0 and process_index in [0, num_processes), got "
                f"{batch_size=}, {seed=}, {process_index=}, {num_processes=}."
            )
        least = num_processes * (batch_size if drop_last else 1)
        if num_images < least and not (allow_empty and not drop_last):
            raise ValueError(
                f"{num_images} images are too few for {num_processes} processes"
                f"{f' with full batches of {batch_size} each' if drop_last else ''}: it takes at least {least}. "
                "Use fewer processes, a smaller batch or more images."
            )
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._start = 0
        self.num_processes = num_processes
        self.process_index = process_index
        self.num_images = num_images
        self._sizes = _batch_sizes(num_images, batch_size, num_processes, drop_last)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:  # Accelerate's loader sets the same one again when it starts
            self.epoch, self._start = epoch, 0

    def skip(self, count: int) -> None:
        """Begin this epoch after so many batches of this process, to go on in the middle of it."""
        self._start = count

    def batches(self) -> list[list[int]]:
        """All batches of this epoch, of all processes; batch `i` is that of process `i % num_processes`."""
        rng = np.random.default_rng([self.seed, self.epoch])
        indices = rng.permutation(self.num_images) if self.shuffle else np.arange(self.num_images)
        batches = np.split(self._arrange(indices), np.cumsum(self._sizes))[:-1]
        order = rng.permutation(len(batches)) if self.shuffle else range(len(batches))
        return [batches[place].tolist() for place in order]

    def _arrange(self, indices: np.ndarray) -> np.ndarray:
        """The order in which images fill the batches, one after the other."""
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches()[self.process_index :: self.num_processes][self._start :])

    def __len__(self) -> int:
        return max(0, len(range(self.process_index, len(self._sizes), self.num_processes)) - self._start)


class AspectRatioBatches(DistributedBatches):
    """`DistributedBatches` of images that are similarly wide for their height, so that less is padded.

    The shuffled images are cut into blocks of 32 batches, at least two blocks; each block is sorted by aspect ratio and
    cut into batches, and the batches are shuffled. Blocks are others each epoch, so an image meets others each time.
    Without `shuffle`, all images are sorted by aspect ratio.

    Args:
        sizes: (height, width) of each image.
        batch_size and all others: see `DistributedBatches`.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, **options: Any) -> None:
        super().__init__(len(sizes), batch_size, **options)
        height, width = np.asarray(sizes, dtype=np.float64).reshape(-1, 2).T
        self._ratios = np.log(width / height)

    def _arrange(self, indices: np.ndarray) -> np.ndarray:
        half = max(1, -(-len(self._sizes) // 2))
        per_block = min(BATCHES_PER_BLOCK, half) if self.shuffle else 2 * half
        ends = np.cumsum(self._sizes)[per_block - 1 : -1 : per_block]
        blocks = np.split(indices, ends)
        return np.concatenate([block[np.argsort(self._ratios[block], kind="stable")] for block in blocks])


def _batch_sizes(num_images: int, batch_size: int, num_processes: int, drop_last: bool) -> list[int]:
    """Sizes of all batches, which differ by one at most; their number is a multiple of the processes if it can be."""
    if drop_last:
        return [batch_size] * (num_images // (batch_size * num_processes) * num_processes)
    if num_images <= num_processes:
        return [1] * num_images
    steps = -(-num_images // (batch_size * num_processes))
    number = min(steps, num_images // num_processes) * num_processes
    each, more = divmod(num_images, number)
    return [each + 1] * more + [each] * (number - more)


# -- how much is padding ---------------------------------------------------------------------------------------------


def image_sizes(dataset: Any) -> list[Size]:
    """(height, width) of each image as recorded, without opening it.

    Args:
        dataset: in the schema: a `datasets.Dataset`, a list of rows, an `AugmentedDataset` or `Subset` of one of them
            (whose images have these sizes before augmentation).
    """
    if isinstance(dataset, Subset):
        sizes = image_sizes(dataset.dataset)
        return [sizes[index] for index in dataset.indices]
    if hasattr(dataset, "column_names"):
        columns = dataset.select_columns(["height", "width"]).with_format(None)[:]
        return list(zip(columns["height"], columns["width"], strict=True))
    if hasattr(dataset, "dataset"):
        return image_sizes(dataset.dataset)
    return [(row["height"], row["width"]) for row in dataset]


def resized_sizes(sizes: Iterable[Size], size: Mapping[str, int | None]) -> list[Size]:
    """(height, width) after a processor's resize.

    Args:
        size: of the processor, any of its forms.
    """
    given = {key: value for key, value in dict(size).items() if value}
    if "shortest_edge" in given:
        return [get_size_with_aspect_ratio(s, given["shortest_edge"], given.get("longest_edge")) for s in sizes]
    if "max_height" in given:
        return [get_image_size_for_max_height_width(s, given["max_height"], given["max_width"]) for s in sizes]
    return [(given["height"], given["width"]) for _ in sizes]


def padding_share(batches: Iterable[Sequence[int]], sizes: Sequence[Size]) -> float:
    """Share of the pixels of all batches, each padded to its tallest and its widest image, that is padding, in [0, 1).

    Args:
        batches: indices of images.
        sizes: (height, width) of each image as it goes into its batch.
    """
    pixels = padded = 0
    for batch in batches:
        heights, widths = zip(*(sizes[index] for index in batch), strict=True)
        pixels += sum(height * width for height, width in zip(heights, widths, strict=True))
        padded += len(batch) * max(heights) * max(widths)
    return 1 - pixels / padded if padded else 0.0


# -- the loader ------------------------------------------------------------------------------------------------------


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
) -> DataLoader[Any]:
    """A loader that gives each process its share of the data set, ready to iterate over.

    Batches are `AspectRatioBatches` or `DistributedBatches`, which share the images out themselves. With an
    accelerator, Accelerate's own loader is put around them as if there were one process: it moves batches to the device
    and tells gradient accumulation when the epoch ends, and does not share out a second time. `accelerator.prepare`
    returns such a loader as it is. `loader.set_epoch(epoch)` reaches the batches and the augmentation; without an
    accelerator, call `set_epoch` of `loader.batch_sampler` and of `dataset`.

    Args:
        dataset: with a length, in the schema; for training usually an `AugmentedDataset`.
        collate_fn: usually a `DetectionCollator`.
        batch_size: images a process and step, at most.
        training: shuffled. Otherwise images come in order, each exactly once over all processes; all processes have the
            same number of batches, but where there are fewer images than processes, some have none.
        seed: of the batches and of the workers' generators.
        num_workers: processes that load. Each computes with one thread and stays for the next epoch.
        group_by_aspect_ratio: batches of similarly shaped images; default: when training. Without shuffling it makes
            batches run from tall to wide images.
        drop_last: see `DistributedBatches`.

    Raises:
        TypeError: the data set has no length, as one that is streamed.
        ValueError: too few images, see `DistributedBatches`.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{type(dataset).__name__} has no length, so its images cannot be shared out exactly. Load the data set "
            "without streaming."
        )
    num_processes, process_index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    options: dict[str, Any] = {
        "shuffle": training,
        "seed": seed,
        "num_processes": num_processes,
        "process_index": process_index,
        "drop_last": drop_last,
        "allow_empty": not training,
    }
    grouped = training if group_by_aspect_ratio is None else group_by_aspect_ratio
    batches = (
        AspectRatioBatches(image_sizes(dataset), batch_size, **options)
        if grouped
        else DistributedBatches(len(dataset), batch_size, **options)
    )
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
        generator=torch.Generator().manual_seed(worker_seed),  # the global one is left alone
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
    loader._is_accelerate_prepared = True  # Accelerate's own mark, by which `prepare` knows what it has seen
    return loader


def _start_worker(worker_id: int) -> None:
    """One thread a worker; PyTorch seeds its own generator, NumPy's and `random`'s from the loader's generator."""
    torch.set_num_threads(1)
    keep_freed_memory()  # batch after batch of the same size
    if "cv2" in sys.modules:  # what Albumentations computes with
        sys.modules["cv2"].setNumThreads(0)
