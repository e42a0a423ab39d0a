"""Datasets in shards (Parquet files, WebDataset archives), of which only annotations are kept on this machine."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, Value

from .hub_access import find_split_name, is_hub_format, is_saved, open_archives, undecoded, with_image_column
from .hub_datasets import objects_column, read_split
from .records import AnnotatedSplit
from .split_source import Progress


class ShardSource:
    """Shards on the Hub, on a server or in a folder, as `datasets` reads them.

    All annotations are read once, shard by shard. Where Parquet files have `width` and `height`, that is all that is
    read of them; other shards are read as a whole, for the sizes of the images.

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
            raise ValueError(f"{path} holds no shards: {_why_no_shards(folder)}")
        self.name, self.keeps_images = path, keeps_images
        self.cache_dir, self.kwargs = None if cache_dir is None else str(cache_dir), kwargs
        try:
            self.builder = self._build()
            self.streams = self._streams()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} has a Parquet file that is cut off or damaged: {error}") from error
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{path} is no folder, and no dataset on the Hub that can be reached: {error}"
            ) from error

    @property
    def streamed(self) -> bool:
        return not self.keeps_images

    def _build(self, **kwargs: Any) -> Any:
        return datasets.load_dataset_builder(self.name, cache_dir=self.cache_dir, **self.kwargs, **kwargs)

    def _streams(self) -> dict[str, IterableDataset]:
        if self.builder.name == "webdataset":
            return open_archives(self.builder, self.cache_dir, streaming=True)
        streams = {}
        for name, stream in self.builder.as_streaming_dataset().items():
            rows = with_image_column(undecoded(stream))
            kept = set(rows.features or ()) - set(_images_in(rows)) | {"image"}
            rows = rows.select_columns([name for name in rows.features or () if name in kept])
            if "image" in (rows.features or ()):  # which may be stored as bytes or as a struct of bytes and path
                rows = rows.cast_column("image", Image(decode=False))
            streams[str(name)] = rows
        return streams

    def state(self) -> str:
        """The files with their revisions or times of change, and how they are read."""
        files = self.builder.config.data_files or {}
        known = {str(split): [list(of_split), of_split.origin_metadata] for split, of_split in files.items()}
        how = datasets.fingerprint.Hasher.hash(sorted(self.kwargs.items()))
        return json.dumps([self.name, self.keeps_images, how, known], sort_keys=True, default=str)

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
        sizes = [(rows.features or {}).get(size) for size in ("width", "height")]
        has_sizes = all(isinstance(size, Value) and "int" in size.dtype for size in sizes)
        if self.builder.name == "parquet" and has_sizes and not self.keeps_images:
            columns = [column for column in rows.features if column != "image"]
            rows = self._build(columns=columns).as_streaming_dataset()[name]
        reader = self._reader_of(name)
        for shard in range(rows.num_shards):
            try:
                for number, row in enumerate(rows.shard(rows.num_shards, shard)):
                    places.append((shard, number))
                    yield row, partial(_cannot_read, self.name)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{reader.name_of(shard)} cannot be read: {error}") from error

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
        told = f'{self.name} has no split "{split}", only {sorted(self.streams)}.'
        val = " None is split off while streaming: name annotated images on this machine with --val FILE."
        return told + val * (split == "val")

    def reader(self, split: str) -> "ShardReader":
        """Of the images of a split."""
        name = find_split_name(self.streams, split)
        if name is None:
            raise FileNotFoundError(self.describe_missing(split))
        return self._reader_of(name)

    def _reader_of(self, name: str) -> "ShardReader":
        files = [str(file) for file in (self.builder.config.data_files or {}).get(name, ())]
        return ShardReader(self.streams[name].select_columns(["image"]), files)


def _why_no_shards(folder: Path) -> str:
    names = [path.name.lower() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    if any(name.endswith((".tar.gz", ".tgz")) for name in names):
        return "unpack its .tar.gz files to .tar."
    if any(name.endswith(".tar") for name in names):
        return "its .tar files do not begin with an image and a .json of the same name that has objects."
    return (
        "it has no Parquet files with a column image, and no WebDataset archives. Images that are files are read one "
        "by one when they are needed, so they need no streaming: omit --streaming."
    )


def read_image(reader: "ShardReader", place: tuple[int, int]) -> bytes:
    """One image file, which is searched in its shard."""
    try:
        [image] = reader.read([place])
        return content_of(image)
    finally:
        reader.close()


def content_of(image: Mapping[str, Any]) -> bytes:
    """The file of an image, which is in the shard or named there."""
    content: bytes | None = image["bytes"]
    return Path(image["path"]).read_bytes() if content is None else content


def _images_in(rows: IterableDataset) -> list[str]:
    return [name for name, feature in (rows.features or {}).items() if isinstance(feature, Image)]


def _cannot_read(name: str, column: str) -> bytes:
    raise ValueError(f"{name}: the column {column} is not read while streaming.")


class ShardReader:
    """Image files at places in shards, fastest in the order of the places: a shard is read from its beginning on, and
    reading goes on where it has stopped.

    Args:
        rows: with the column `image`, not decoded.
        files: of the shards, for messages.
    """

    def __init__(self, rows: IterableDataset, files: Sequence[str] = ()) -> None:
        self.rows, self.files = rows, files
        self._shard = -1
        self._next = 0  # row of the open shard
        self._open: Iterator[Any] | None = None
        self._last: dict[str, Any] = {}  # the image before, which may be wanted several times

    def name_of(self, shard: int) -> str:
        """The file of a shard, or its number where shards are not files."""
        return self.files[shard] if len(self.files) == self.rows.num_shards else f"Shard {shard + 1}"

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
                while self._next <= row:
                    content = next(self._open)
                    self._next += 1
            except StopIteration:
                self._open = None
                raise ValueError(
                    f"{self.name_of(shard)} has only {self._next} images now; its annotations were read when it had "
                    "more. Start again, and they are read once more."
                ) from None
            except Exception:  # a connection that breaks leaves no shorter shard
                self._open = None
                raise
            self._last = content["image"]
            yield self._last

    def close(self) -> None:
        """Leave the open shard."""
        self._open = None

    def __getstate__(self) -> dict[str, Any]:  # for worker processes
        return vars(ShardReader(self.rows, self.files))
