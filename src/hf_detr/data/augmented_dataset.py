"""Rows of a dataset with a new augmentation each epoch, reproducible by seed."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .augmentation import Row
from .mixing import Mixer
from .streaming import StreamedDataset, StreamedRow


class AugmentedDataset(Dataset[Row]):
    """Rows of a dataset with a new augmentation each epoch, a function of `(seed, epoch, index)` only.

    The same seed thus gives the same epoch, whatever the number of workers and processes and the order of the batches
    (but for sizes that depend on the batch, see `Augmentation`).
    The global generators of PyTorch (CPU), NumPy and `random` are seeded for each row and restored afterwards (except
    for a normal number that `np.random` may hold in reserve).

    Args:
        dataset: a `datasets.Dataset` or `StreamedDataset` in the schema, or any sequence of such rows.
        augmentation: from row to row; an `Augmentation`, or any callable that uses the generators above. If it has a
            method `set_random_seed`, that is called with a seed for each row.
        seed: not negative.
        to_tensor: reads the image of a row, such as `DetrImageProcessor.to_tensor`; the augmentation then gets a
            `tv_tensors.Image` (C, H, W). None leaves that to the augmentation, which makes RGB of all images.
        mixers: change rows with the help of others, one after the other, before the augmentation.

    Raises:
        ValueError: the seed is negative; mixers of a `StreamedDataset`, whose images cannot be read in random order.
    """

    def __init__(
        self,
        dataset: Any,
        augmentation: Callable[[Row], Row],
        seed: int = 0,
        *,
        to_tensor: Callable[[Any], torch.Tensor] | None = None,
        mixers: Sequence[Mixer] = (),
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        if mixers and isinstance(dataset, StreamedDataset):
            raise ValueError("Mixing needs images in random order, and streamed ones come as they are stored.")
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.to_tensor = to_tensor
        self.mixers = tuple(mixers)
        self._rows = _Rows(self._read, len(dataset))
        self._generator = np.random.MT19937(0)
        # in shared memory, so that persistent workers, which have a copy of this object, see changes
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in this process and in the workers that are already running."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | StreamedRow) -> Row:
        key = key if isinstance(key, StreamedRow) else int(key)
        index = key.index if isinstance(key, StreamedRow) else key
        seeds = np.random.SeedSequence([self.seed, int(self._epoch), index % len(self)]).generate_state(4)
        row = self._read(key)
        with _seeded(int(seeds[0]), int(seeds[1]), int(seeds[2]), self._generator):
            for mixer in self.mixers:
                row = mixer(row, self._rows)
            if hasattr(self.augmentation, "set_random_seed"):
                self.augmentation.set_random_seed(int(seeds[3]))
            return self.augmentation(row)

    def _read(self, key: int | StreamedRow) -> Row:
        row: Row = self.dataset[key]
        if self.to_tensor is None:
            return row
        return row | {"image": tv_tensors.Image(self.to_tensor(row["image"]))}


class _Rows:
    """Rows that are read whenever they are indexed."""

    def __init__(self, read: Callable[[int], Row], count: int) -> None:
        self._read_row, self._count = read, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return self._read_row(index)


@contextmanager
def _seeded(for_torch: int, for_numpy: int, for_random: int, generator: np.random.MT19937) -> Iterator[None]:
    """`generator` takes the place of NumPy's global one; to copy the state of that takes a hundred times as long. It is
    in use already where a row is read while one of the same dataset is augmented."""
    if get_bit_generator() is generator:
        generator = np.random.MT19937(0)
    before = torch.get_rng_state(), get_bit_generator(), random.getstate()
    set_bit_generator(generator)
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would also seed the accelerators
    np.random.seed(for_numpy)
    random.seed(for_random)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        set_bit_generator(before[1])
        random.setstate(before[2])
