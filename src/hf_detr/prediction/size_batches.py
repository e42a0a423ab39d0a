"""Batches of images that the processor resizes to the same size, so that little or nothing is padded."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ..model.image_io import read_image_header
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.processor_size import resized_size

Item = TypeVar("Item")
Result = TypeVar("Result")
Size = tuple[int, int]

WINDOW = 1024  # images that are grouped at a time: enough to fill batches, and quick to scan before the first batch
MAX_PADDING = 0.05  # padding pixels over image pixels, in a batch of mixed sizes
UNKNOWN: Size = (0, 0)


def size_sorted_batches(
    processor: DetrImageProcessor, image_folder: Path, images: pa.Table, batch_size: int, num_workers: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Rows of a table in batches of images that will have the same size, largest first within each 1,024 rows.

    Sizes are read from file headers; a wrong header only costs padding. Remainders of neighbouring sizes share a batch
    if that adds at most 5 % of padding.

    Args:
        image_folder: paths are relative to it.
        images: table with a column `path`.
        num_workers: 0 reads headers on demand, more in a thread.
    """
    resized: dict[Size, Size] = {}

    def plan(start: int) -> list[list[dict[str, Any]]]:
        rows = images.slice(start, WINDOW).to_pylist()
        sizes = []
        for row in rows:
            size = read_size(image_folder / os.fsdecode(row["path"]))
            if size not in resized:
                resized[size] = processed_size(processor, size)
            sizes.append(resized[size])
        return [[rows[index] for index in batch] for batch in group_by_size(sizes, batch_size)]

    for batches in run_ahead(plan, range(0, len(images), WINDOW), min(num_workers, 1)):
        yield from batches


def read_size(path: Path) -> Size:
    """(height, width) of an image as shown, from its header; (0, 0) if the header cannot be read."""
    try:
        width, height = read_image_header(path).size
    except Exception:  # damaged files raise errors of any kind; reading the image reports them
        return UNKNOWN
    return height, width


def processed_size(processor: DetrImageProcessor, size: Size) -> Size:
    """(height, width) after the processor's resize."""
    return resized_size(size, processor.size) if processor.do_resize and size != UNKNOWN else size


def group_by_size(sizes: Sequence[Size], batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size`, largest sizes first; see `size_sorted_batches`."""
    of_size = defaultdict(list)
    for index, size in enumerate(sizes):
        of_size[size].append(index)
    batches, remainder = [], []
    for size in sorted(of_size, reverse=True):
        indices = of_size[size]
        full = len(indices) // batch_size * batch_size
        batches += [indices[start : start + batch_size] for start in range(0, full, batch_size)]
        remainder += indices[full:]
    batch: list[int] = []
    for index in remainder:
        if batch and (len(batch) == batch_size or _padding([sizes[i] for i in (*batch, index)]) > MAX_PADDING):
            batches.append(batch)
            batch = []
        batch.append(index)
    return [*batches, batch] if batch else batches


def _padding(sizes: Sequence[Size]) -> float:
    """Padding pixels of a batch, as a fraction of its image pixels."""
    pixels = sum(height * width for height, width in sizes)
    padded = len(sizes) * max(height for height, _ in sizes) * max(width for _, width in sizes)
    return padded / pixels - 1 if pixels else 0.0


def run_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Like `map`, in order, but computed in threads; at most `num_workers + 1` results are pending. 0 threads computes
    each result on demand."""
    if num_workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
