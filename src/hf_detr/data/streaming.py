"""Training on images that stay in shards: annotations on this machine, images read in a shuffled order of the shards.

A row knows the shard and the place in it of its image, so an epoch is planned like that of a dataset on disk, as a list
of batches of indices, of which this process reads the images of its own. Where it is in the epoch is the number of
batches done: a run continues in the middle of an epoch without a state of the stream.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from datasets import Dataset, Image
from torch.utils.data import Sampler

from .batching import AspectRatioBatches, Size
from .shard_source import ShardReader

SHUFFLE_BUFFER = 1000
FIX = "Correct or remove it in its shard; check_dataset.py --streaming lists all such images."
NUM_FIRST = 64  # images at the beginning of the first shard, to measure with


@dataclass(frozen=True)
class StreamedRow:
    """An index, with the image file that was read for it."""

    index: int
    image: dict[str, Any]


class StreamedDataset:
    """Rows in the schema whose images stay in shards.

    `dataset[index]` searches the image in its shard, which takes long; `dataset[StreamedRow(index, image)]` is given
    it. A column, by name, is that of the annotations.

    Args:
        annotations: rows with `shard` and `shard_row` in place of `image`.
        reader: of the images.
    """

    def __init__(self, annotations: Dataset, reader: ShardReader) -> None:
        self.annotations, self.reader = annotations, reader
        self._first: dict[int, dict[str, Any]] | None = None

    @property
    def features(self) -> Any:
        return self.annotations.features

    @property
    def info(self) -> Any:
        return self.annotations.info

    @property
    def column_names(self) -> list[str]:
        return list(self.annotations.column_names)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: "int | StreamedRow | str") -> Any:
        if isinstance(key, str):
            return self.annotations[key]
        if isinstance(key, StreamedRow):
            return self._row(key.index, key.image)
        index = range(len(self))[int(key)]
        first = self._first_images()
        if index in first:
            return self._row(index, first[index])
        [image] = self.read([index])
        self.reader.close()
        return self._row(index, image)

    def _row(self, index: int, image: dict[str, Any]) -> dict[str, Any]:
        row = dict(self.annotations[index])
        where = f"{row['file_name']} (row {row['shard_row']} of {self.reader.name_of(row['shard'])})"
        if image["bytes"] is None and not Path(image["path"]).is_file():
            raise ValueError(
                f"{where} is not in its shard, which only names {image['path']}, and there is no such file. Write "
                "shards with the images in them, as Dataset.push_to_hub does."
            )
        try:
            row["image"] = Image().decode_example(image)
            size = row["image"].size
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{where} cannot be read: {error}. {FIX}") from error
        if size != (row["width"], row["height"]):
            raise ValueError(
                f"{where} is recorded as {row['width']} x {row['height']}, but the image has {size[0]} x {size[1]} as "
                f"shown, so that its boxes may be misplaced. {FIX}"
            )
        return row

    def places(self) -> np.ndarray:
        """(N, 2) shard and row in it of each image."""
        columns = self.annotations.select_columns(["shard", "shard_row"]).with_format("numpy")
        return np.stack([np.asarray(columns[name][:], dtype=np.int64) for name in ("shard", "shard_row")], axis=1)

    def read(self, indices: Sequence[int], reader: ShardReader | None = None) -> Iterator[dict[str, Any]]:
        """The image files of these rows; fastest in the order of their places.

        Args:
            reader: another than the dataset's own, for another thread.
        """
        rows = self.annotations.select_columns(["shard", "shard_row"]).select(indices)
        return (reader or self.reader).read((row["shard"], row["shard_row"]) for row in rows)

    def new_reader(self) -> ShardReader:
        return ShardReader(self.reader.rows, self.reader.files)

    def first(self) -> list[int]:
        """Indices of a few images that are at the beginning of the first shard, and in memory once they are used."""
        places = self.places()
        at_beginning = np.lexsort((places[:, 1], places[:, 0]))[:NUM_FIRST]
        return at_beginning.tolist()

    def _first_images(self) -> dict[int, dict[str, Any]]:
        if self._first is None:
            indices = self.first()
            self._first = dict(zip(indices, self.read(indices), strict=True))
            self.reader.close()
        return self._first

    def select(self, indices: Sequence[int]) -> "StreamedDataset":
        return StreamedDataset(self.annotations.select(indices), self.new_reader())

    def select_columns(self, names: list[str]) -> Dataset:
        return self.annotations.select_columns(names)

    def __getstate__(self) -> dict[str, Any]:
        return {"annotations": self.annotations, "reader": self.reader, "_first": None}


class ShardedBatches(AspectRatioBatches):
    """Batches of images in shards. Shards are shuffled, each process gets an equal part of their images in a row, and
    this part is shuffled in blocks of `shuffle_buffer` images. Over all processes, each image occurs exactly once per
    epoch, and all processes have the same number of batches.

    Args:
        places: (N, 2) shard and row in it of each image.
        sizes: (height, width) of each image, to group them in a block; None does not.
        batch_size, options: see `DistributedBatches`.
    """

    def __init__(
        self,
        places: np.ndarray,
        sizes: Sequence[Size] | None,
        batch_size: int,
        *,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        **options: Any,
    ) -> None:
        super().__init__(sizes or [(1, 1)] * len(places), batch_size, shuffle=True, **options)
        if shuffle_buffer < batch_size:
            raise ValueError(f"A shuffle_buffer of {shuffle_buffer} images is smaller than a batch of {batch_size}.")
        self.places = places
        self._per_block = max(1, shuffle_buffer // batch_size)
        self._is_grouped = sizes is not None

    def batches(self) -> list[list[int]]:
        of_process = [
            [batch for block in self._blocks(process) for batch in block] for process in range(self.num_processes)
        ]
        return [batch for step in zip(*of_process, strict=True) for batch in step]

    def blocks(self) -> Iterator[list[list[int]]]:
        """The batches of this process that are left in this epoch, in blocks whose images are read together."""
        left = self._start
        for block in self._blocks(self.process_index):
            if left < len(block):
                yield block[left:]
            left = max(0, left - len(block))

    def reading_order(self) -> np.ndarray:
        """The images of this epoch, shard by shard."""
        shards, of_image = np.unique(self.places[:, 0], return_inverse=True)
        rank = np.empty(len(shards), dtype=np.int64)
        rank[np.random.default_rng([self.seed, self.epoch]).permutation(len(shards))] = np.arange(len(shards))
        return np.lexsort((self.places[:, 1], rank[of_image]))

    def _blocks(self, process: int) -> Iterator[list[list[int]]]:
        counts = [sum(self._sizes[each :: self.num_processes]) for each in range(self.num_processes)]
        sizes, start = self._sizes[process :: self.num_processes], sum(counts[:process])
        order = self.reading_order()
        for number, first in enumerate(range(0, len(sizes), self._per_block)):
            of_block = sizes[first : first + self._per_block]
            rng = np.random.default_rng([self.seed, self.epoch, process, number])
            images = rng.permutation(order[start : start + sum(of_block)])
            if self._is_grouped:
                images = images[np.argsort(self._ratios[images], kind="stable")]
            batches = np.split(images, np.cumsum(of_block)[:-1])
            yield [batches[index].tolist() for index in rng.permutation(len(batches))]
            start += sum(of_block)


class ImageFeed(Sampler[list[StreamedRow]]):
    """`ShardedBatches` with the images. While a block is used, a thread reads the next one.

    Args:
        dataset: of which the batches are.
    """

    def __init__(self, batches: ShardedBatches, dataset: StreamedDataset) -> None:
        self._batches, self._dataset = batches, dataset

    def set_epoch(self, epoch: int) -> None:
        self._batches.set_epoch(epoch)

    def skip(self, count: int) -> None:
        self._batches.skip(count)

    def batches(self) -> list[list[int]]:
        return self._batches.batches()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[StreamedRow]]:
        reader, order = self._dataset.new_reader(), self._batches.reading_order()
        turn = np.empty_like(order)  # of each image
        turn[order] = np.arange(len(order))

        stopped = Event()

        def read(block: list[list[int]]) -> dict[int, dict[str, Any]]:
            indices = sorted((index for batch in block for index in batch), key=turn.__getitem__)
            images = {}
            for index, image in zip(indices, self._dataset.read(indices, reader), strict=True):
                images[index] = image
                if stopped.is_set():  # nobody waits for the block
                    reader.close()
                    break
            return images

        pool = ThreadPoolExecutor(1, thread_name_prefix="shards")
        try:
            reading: tuple[list[list[int]], Future[dict[int, dict[str, Any]]]] | None = None
            for block in [*self._batches.blocks(), None]:
                coming = None if block is None else (block, pool.submit(read, block))
                if reading is not None:
                    images = reading[1].result()
                    for batch in reading[0]:
                        yield [StreamedRow(index, images[index]) for index in batch]
                reading = coming
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
