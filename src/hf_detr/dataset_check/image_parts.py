"""What every image of a split looks like: where files are, in shards, or spread over a Ray cluster."""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..data.records import AnnotatedSplit
from ..data.shard_source import ShardReader, content_of
from ..data.similarity import Appearance, appearances
from ..runtime.ray_cluster import connect_to_ray

FILES_TOGETHER = 256
IN_MEMORY = 64  # image files of a shard


@dataclass(frozen=True)
class FilePart:
    """Some image files. `numbers` are those of the images in the split."""

    numbers: list[int]
    files: list[str]

    def appearances(self, num_workers: int | None, image_range: tuple[float, float] | None) -> Iterator[Appearance]:
        """What the images look like, in the order of `numbers`."""
        yield from appearances(self.files, iter, num_workers=num_workers, image_range=image_range)


@dataclass(frozen=True)
class ShardPart:
    """The images of a shard, in their order in it."""

    numbers: list[int]
    places: list[tuple[int, int]]
    reader: ShardReader

    def appearances(self, num_workers: int | None, image_range: tuple[float, float] | None) -> Iterator[Appearance]:
        contents = self.reader.read(self.places)
        while some := list(islice(contents, IN_MEMORY)):
            files = [partial(content_of, image) for image in some]
            yield from appearances(files, iter, num_workers=num_workers, image_range=image_range)
        self.reader.close()


Part: TypeAlias = FilePart | ShardPart


def parts_of(split: AnnotatedSplit, reader: ShardReader | None) -> list[Part]:
    """All images of a split in parts, each for one worker.

    Args:
        reader: of the images' places, if they are in shards.
    """
    numbers = range(len(split.images))
    if reader is None:
        some = (list(numbers[start : start + FILES_TOGETHER]) for start in range(0, len(numbers), FILES_TOGETHER))
        return [FilePart(part, [str(split.images[number].path.resolve()) for number in part]) for part in some]
    shards: dict[int, ShardPart] = {}
    for number, image in enumerate(split.images):
        if image.place is not None:
            part = shards.setdefault(image.place[0], ShardPart([], [], reader))
            part.numbers.append(number)
            part.places.append(image.place)
    return list(shards.values())


def appearances_here(
    parts: Sequence[Part],
    progress: Callable[[Iterable[Appearance]], Iterable[Appearance]],
    *,
    num_workers: int | None,
    image_range: tuple[float, float] | None,
) -> list[Appearance]:
    """What all images look like, by their number, one part after the other, in threads."""
    numbers = [number for part in parts for number in part.numbers]
    found = progress(each for part in parts for each in part.appearances(num_workers, image_range))
    return [each for _, each in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])]


def appearances_on_ray(
    parts: Sequence[Part],
    progress: Callable[[Iterable[Appearance]], Iterable[Appearance]],
    *,
    image_range: tuple[float, float] | None,
) -> list[Appearance]:
    """The same on a Ray cluster, see [`connect_to_ray`]: each part on one core of a node, which has to see the same
    files or shards. Ray repeats a part if its node is lost.

    Raises:
        ImportError: Ray is not installed.
    """
    ray = connect_to_ray()
    rows = [{"part": pickle.dumps(part)} for part in parts]
    data = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(
        partial(_appearances_of_row, image_range=image_range), num_cpus=1
    )

    numbers: list[int] = []

    def as_they_come() -> Iterator[Appearance]:
        for row in data.iter_rows():  # in any order
            if row["missing"] and Path(row["missing"]).exists():
                raise ValueError(f"A node of the Ray cluster does not see {row['missing']}, which is here.")
            for number, appearance in pickle.loads(row["appearances"]):
                numbers.append(number)
                yield appearance

    found = list(progress(as_they_come()))
    return [each for _, each in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])]


def _appearances_of_row(row: dict[str, Any], image_range: tuple[float, float] | None) -> dict[str, Any]:
    part: Part = pickle.loads(row["part"])
    files = part.files if isinstance(part, FilePart) else []
    missing = next((file for file in files if not Path(file).exists()), "")
    return {
        "missing": missing,
        "appearances": pickle.dumps(list(zip(part.numbers, part.appearances(1, image_range), strict=True))),
    }
