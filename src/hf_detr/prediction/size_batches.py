"""Which images go through the model together: those that the processor brings to one size. Nothing is padded then."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
import pyarrow as pa
import torch

from ..model.image_processing_hf_detr import DetrImageProcessor

Item = TypeVar("Item")
Result = TypeVar("Result")
Size = tuple[int, int]

WINDOW = 1024  # images among which equal sizes are looked for: enough to fill batches, little to read before the first
MOST_PADDING = 0.05  # of the pixels of a batch of several sizes
UNKNOWN: Size = (0, 0)
ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height are swapped


def size_sorted_batches(
    processor: DetrImageProcessor, image_folder: Path, images: pa.Table, batch_size: int, num_workers: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a table in batches of images that will have one size, the largest first, 1,024 rows at a time.

    Sizes are read from the headers of the files, in which a wrong one only costs padding. What is left over of each
    size shares batches with its neighbours where that adds 5 % of padding at most.

    Args:
        image_folder: paths are relative to it.
        images: with `path`.
        num_workers: 0 reads headers when a batch is asked for, more in a thread.
    """
    known: dict[Size, Size] = {}

    def plan(start: int) -> list[list[dict[str, Any]]]:
        rows = images.slice(start, WINDOW).to_pylist()
        sizes = []
        for row in rows:
            size = read_size(image_folder / os.fsdecode(row["path"]))
            if size not in known:
                known[size] = processed_size(processor, size)
            sizes.append(known[size])
        return [[rows[index] for index in batch] for batch in group_by_size(sizes, batch_size)]

    for batches in run_ahead(plan, range(0, len(images), WINDOW), min(num_workers, 1)):
        yield from batches


def read_size(path: Path) -> Size:
    """(height, width) of an image as shown, from its header; (0, 0) if there is none to read."""
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            # of a PNG, Pillow would read all pixels for it
            turned = image.format in ("JPEG", "MPO", "WEBP") and image.getexif().get(ORIENTATION, 1) >= 5
    except Exception:
        # whatever is wrong with the file, it is found, and reported, when it is read
        return UNKNOWN
    return (width, height) if turned else (height, width)


def processed_size(processor: DetrImageProcessor, size: Size) -> Size:
    """(height, width) that the processor brings an image of this one to; (0, 0) if it cannot."""
    if size == UNKNOWN or not processor.do_resize:
        return size
    try:  # with its own rules, on an image without pixels
        image = torch.empty(3, *size, dtype=torch.uint8, device="meta")
        height, width = processor.resize(image, processor.size, processor.resample).shape[-2:]
    except (ValueError, RuntimeError):  # a side of less than a pixel is left of it
        return UNKNOWN
    return height, width


def group_by_size(sizes: Sequence[Size], batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size`, the largest sizes first; see `size_sorted_batches`."""
    of_size = defaultdict(list)
    for index, size in enumerate(sizes):
        of_size[size].append(index)
    batches, left = [], []
    for size in sorted(of_size, reverse=True):
        indices = of_size[size]
        full = len(indices) // batch_size * batch_size
        batches += [indices[start : start + batch_size] for start in range(0, full, batch_size)]
        left += indices[full:]
    batch: list[int] = []
    for index in left:
        if batch and (len(batch) == batch_size or _padding([sizes[i] for i in (*batch, index)]) > MOST_PADDING):
            batches.append(batch)
            batch = []
        batch.append(index)
    return [*batches, batch] if batch else batches


def _padding(sizes: Sequence[Size]) -> float:
    """Pixels of padding, as a part of those of the images."""
    pixels = sum(height * width for height, width in sizes)
    padded = len(sizes) * max(height for height, _ in sizes) * max(width for _, width in sizes)
    return padded / pixels - 1 if pixels else 0.0


def run_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """`map` in threads; at most `num_workers + 1` results are made or wait."""
    if num_workers == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
