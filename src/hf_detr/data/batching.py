"""The batches of each process, and the padding in them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler, Subset

Size = tuple[int, int]

# More batches per block save little more padding, and batches of small datasets would repeat the same combinations
BATCHES_PER_BLOCK = 32


class DistributedBatches(Sampler[list[int]]):
    """The batches of one of several processes. Over all processes, each image occurs exactly once per epoch.

    All processes get the same number of batches. Images are therefore distributed over the smallest such number of
    batches, whose sizes differ by at most one: 100 images on 2 processes with a batch size of 32 become 4 batches of
    25. Only if that is impossible (5 images on 2 processes with a batch size of 1), some batches have one image more
    than `batch_size`.

    An epoch is a function of `(seed, epoch)`, the same on all processes; no global random generator is used.

    Args:
        num_images: size of the dataset.
        batch_size: maximum number of images per process and step.
        shuffle: new random batches each epoch; otherwise images keep their order, and batch `i` goes to process
            `i % num_processes`.
        seed: not negative, the same on all processes.
        num_processes, process_index: number of processes, and index of this one.
        drop_last: drop the images, different ones each epoch, that do not fill a batch of `batch_size` on each process.
        allow_empty: with fewer images than processes, give the last processes no batch, instead of raising an error.

    Raises:
        ValueError: there are fewer images than processes, or with `drop_last` fewer than a full batch per process.
    """

    # There is no attribute `batch_size`: with one, Accelerate's `gather_for_metrics` assumes that all batches but the
    # last have that size and that the last is filled up with repeated images, and cuts off results of real ones.

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
        minimum = num_processes * (batch_size if drop_last else 1)
        if num_images < minimum and not (allow_empty and not drop_last):
            raise ValueError(
                f"{num_images} images are too few for {num_processes} processes"
                f"{f' with full batches of {batch_size} each' if drop_last else ''}: at least {minimum} are needed. "
                "Use fewer processes, a smaller batch size or more images."
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
        if epoch != self.epoch:  # Accelerate's loader sets the same epoch again when it starts
            self.epoch, self._start = epoch, 0

    def skip(self, count: int) -> None:
        """Skip the first `count` batches of this process in this epoch, to resume in the middle of it."""
        self._start = count

    def batches(self) -> list[list[int]]:
        """All batches of this epoch, of all processes; batch `i` belongs to process `i % num_processes`."""
        rng = np.random.default_rng([self.seed, self.epoch])
        indices = rng.permutation(self.num_images) if self.shuffle else np.arange(self.num_images)
        batches = np.split(self._arrange(indices), np.cumsum(self._sizes))[:-1]
        order = rng.permutation(len(batches)) if self.shuffle else range(len(batches))
        return [batches[index].tolist() for index in order]

    def _arrange(self, indices: np.ndarray) -> np.ndarray:
        """The order in which images are cut into batches."""
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches()[self.process_index :: self.num_processes][self._start :])

    def __len__(self) -> int:
        return max(0, len(range(self.process_index, len(self._sizes), self.num_processes)) - self._start)


class AspectRatioBatches(DistributedBatches):
    """`DistributedBatches` of images with similar aspect ratios, which need less padding.

    The shuffled images are divided into blocks of 32 batches, at least two blocks; each block is sorted by aspect ratio
    and cut into batches, and the batches are shuffled. The blocks change each epoch, so an image shares its batch with
    different images each time. Without `shuffle`, all images are sorted by aspect ratio.

    Args:
        sizes: (height, width) of each image.
        batch_size, options: see `DistributedBatches`.
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
    """Sizes of all batches, which differ by at most one; their number is a multiple of the processes if possible."""
    if drop_last:
        return [batch_size] * (num_images // (batch_size * num_processes) * num_processes)
    if num_images <= num_processes:
        return [1] * num_images
    steps = -(-num_images // (batch_size * num_processes))
    number = min(steps, num_images // num_processes) * num_processes
    size, remainder = divmod(num_images, number)
    return [size + 1] * remainder + [size] * (number - remainder)


# -- padding ---------------------------------------------------------------------------------------------------------


def image_sizes(dataset: Any) -> list[Size]:
    """(height, width) in pixels of each image as recorded, without opening it.

    Args:
        dataset: in the schema: a `datasets.Dataset`, a list of rows, or an `AugmentedDataset` or `Subset` of one of
            them; sizes are before augmentation.
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


def padding_fraction(batches: Iterable[Sequence[int]], sizes: Sequence[Size]) -> float:
    """The fraction of all pixels that is padding, in [0, 1), if each batch is padded to its maximum height and width.

    Args:
        batches: indices of images.
        sizes: (height, width) of each image after the resize.
    """
    pixels = padded = 0
    for batch in batches:
        heights, widths = zip(*(sizes[index] for index in batch), strict=True)
        pixels += sum(height * width for height, width in zip(heights, widths, strict=True))
        padded += len(batch) * max(heights) * max(widths)
    return 1 - pixels / padded if padded else 0.0
