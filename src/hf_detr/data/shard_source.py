"""Datasets in shards (Parquet files, WebDataset archives), of which only annotations are kept on this machine."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, IterableDataset

from .hub_datasets import (
    find_split_name,
    is_hub_format,
    is_saved,
    objects_column,
    read_split,
    undecoded,
    with_image_column,
)
from .records import AnnotatedSplit
from .split_source import Progress

SIZES = {"width", "height"}


class ShardSource:
    """Shards on the Hub, on a server or in a folder, as `datasets` reads them.

    All annotations are read once, shard by shard. Parquet files with `width` and `height` give them without the images;
    of others, the images are read, too, and forgotten.

    Args:
        keeps_images: copy the images of the splits that are used to the cache, and give rows with them. Otherwise rows
            name the place of their image: `shard`, and `shard_row` in it.
        kwargs: for `datasets.load_dataset_builder`.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError: it is not in shards.
    """

    max_invalid = 0.02  # as of `RowsSource`

    def __init__(self, path: str, cache_dir: str | Path | None, *, keeps_images: bool, **kwargs: Any) -> None:
        folder = Path(path)
        if folder.exists() and (is_saved(folder) or not is_hub_format(folder)):
            raise ValueError(
                f"{path} holds no shards (Parquet files or WebDataset archives). Its images are read one by one when "
                "they are needed, so nothing is gained by streaming: omit streaming."
            )
        self.name, self.keeps_images = path, keeps_images
        self.cache_dir, self.kwargs = None if cache_dir is None else str(cache_dir), kwargs
        try:
            self.builder = self._build()
            self.streams = self._streams(self.builder)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{path} is no folder, and no dataset on the Hub that can be reached: {error}"
            ) from error

    @property
    def streamed(self) -> bool:
        return not self.keeps_images

    def _build(self, **kwargs: Any) -> Any:
        return datasets.load_dataset_builder(self.name, cache_dir=self.cache_dir, **self.kwargs, **kwargs)

    @staticmethod
    def _streams(builder: Any) -> dict[str, IterableDataset]:
        return {str(name): with_image_column(undecoded(rows)) for name, rows in builder.as_streaming_dataset().items()}

    def state(self) -> str:
        """The files with their revisions or times of change."""
        files = self.builder.config.data_files or {}
        known = {str(split): [list(of_split), of_split.origin_metadata] for split, of_split in files.items()}
        return json.dumps([self.name, self.keeps_images, known], sort_keys=True, default=str)

    def has(self, split: str) -> bool:
        return find_split_name(self.streams, split) is not None

    def find(self, split: str, progress: Progress) -> AnnotatedSplit | None:
        name = find_split_name(self.streams, split)
        if name is None:
            return None
        rows, source = self.streams[name], f"{self.name} ({name})"
        objects = objects_column(rows, source)
        if objects == "segments_info":
            raise ValueError(f"{source}: masks are not streamed. Load the data without streaming.")
        known = self.builder.info.splits or {}
        total = known[name].num_examples if name in known else None
        places: list[tuple[int, int]] = []
        records = self._records(name, places)
        found = read_split(progress(records, total), split, source, rows, objects)
        reader = self.reader(split)
        for image, place in zip(found.images, places, strict=True):
            image.place, image.read = place, partial(read_image, reader, place)
        return found

    def _records(self, name: str, places: list[tuple[int, int]]) -> Iterator[Any]:
        """Rows of all shards, without decoding images; `places` grows with them."""
        rows = self.streams[name]
        if self.builder.name == "parquet" and set(rows.features or {}) >= SIZES and not self.keeps_images:
            columns = [column for column in self.builder.info.features if column != self._image_column()]
            rows = self._build(columns=columns).as_streaming_dataset()[name]
        for shard in range(rows.num_shards):
            for number, row in enumerate(rows.shard(rows.num_shards, shard)):
                places.append((shard, number))
                yield row, partial(_cannot_read, self.name)

    def _image_column(self) -> str:
        return next(name for name, feature in self.builder.info.features.items() if isinstance(feature, Image))

    def images(self, split: str) -> Dataset | None:
        name = find_split_name(self.streams, split)
        if name is None or not self.keeps_images:
            return None
        rows = self.streams[name].select_columns(["image"])
        return Dataset.from_generator(
            lambda: iter(rows), features=Features({"image": Image()}), cache_dir=self.cache_dir,
            fingerprint=datasets.fingerprint.Hasher.hash([self.state(), name]),
        )  # fmt: skip

    def describe_missing(self, split: str) -> str:
        return (
            f'{self.name} has no split "{split}", only {sorted(self.streams)}; no validation split can be split off '
            "while streaming. Name annotated images on this machine with --val FILE."
        )

    def reader(self, split: str) -> "ShardReader":
        """Of the images of a split."""
        name = find_split_name(self.streams, split)
        if name is None:
            raise FileNotFoundError(self.describe_missing(split))
        return ShardReader(self.streams[name].select_columns(["image"]))


def read_image(reader: "ShardReader", place: tuple[int, int]) -> bytes:
    """One image file, which is searched in its shard."""
    [image] = reader.read([place])
    reader.close()
    content: bytes = image["bytes"]
    return content


def _cannot_read(name: str, column: str) -> bytes:
    raise ValueError(f"{name}: the column {column} is not read while streaming.")


class ShardReader:
    """Image files at places in shards, fastest in the order of the places: a shard is read from its beginning on, and
    reading goes on where it has stopped.

    Args:
        rows: with the column `image`, not decoded.
    """

    def __init__(self, rows: IterableDataset) -> None:
        self.rows = rows
        self._shard = -1
        self._next = 0  # row of the open shard
        self._open: Iterator[Any] | None = None
        self._last: dict[str, Any] = {}  # the image before, which may be wanted several times

    def read(self, places: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """`{"bytes": ..., "path": ...}` of each image.

        Raises:
            ValueError: the shard has no such row any more.
        """
        for shard, row in places:
            if self._open is not None and (shard, row) == (self._shard, self._next - 1):
                yield self._last
                continue
            if self._open is None or shard != self._shard or row < self._next:
                self._open, self._shard, self._next = iter(self.rows.shard(self.rows.num_shards, shard)), shard, 0
            try:
                while True:
                    content = next(self._open)
                    self._next += 1
                    if self._next > row:
                        break
            except StopIteration:
                self._open = None
                raise ValueError(
                    f"Shard {shard + 1} has only {self._next} images now; its annotations were read when it had more. "
                    "Start again, and they are read once more."
                ) from None
            self._last = content["image"]
            yield self._last

    def close(self) -> None:
        """Leave the open shard."""
        self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_shard": -1, "_next": 0, "_open": None, "_last": {}}  # for worker processes
