"""A validation split out of the training images, with the copies of an image on one side."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers.utils import logging

from .schema import source_of
from .similarity import SimilarImages, appearances

logger = logging.get_logger(__name__)

# what tools append to the names of copies: Roboflow's versions, "a (2)", "a - Copy", "a_aug3"
COPY_ENDINGS = re.compile(
    r"(\.rf\.[0-9a-zA-Z]+|[ _-]*\(\d+\)|[ _-]+cop(y|ie)( ?\d+)?|[ _-]+aug(mented)?[ _-]*\d*)+$", re.I
)
TOLERANCE = 4.0  # of similarity: it does no harm if images of one scene stay on one side, too


def groups_of_copies(dataset: Dataset, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> list[list[int]]:
    """Indices of the images, those that are copies of each other together, in the order of the data set: images with
    one name but for the endings of copies, and images that look the same.

    Args:
        progress: wraps the iterator over the images, all of which are read.
    """
    names = [_original_name(name) for name in dataset["file_name"]]
    raw = dataset.cast_column("image", Image(decode=False))

    def reader(index: int) -> Callable[[], bytes]:
        def read() -> bytes:
            image = raw[index]["image"]
            return image["bytes"] if image.get("bytes") else Path(image["path"]).read_bytes()

        return read

    looks = appearances([reader(index) for index in range(len(dataset))], progress)
    pairs: list[tuple[int, int]] = []  # of copies; what is connected by them is one group
    first: dict[str, int] = {}
    similar = SimilarImages(TOLERANCE)
    for index, (name, look) in enumerate(zip(names, looks, strict=True)):
        pairs.append((index, first.setdefault(name, index)))
        if look.problem is None:
            same = next(similar.find(look), None)
            if same is None:
                similar.add(index, look)
            else:
                pairs.append((index, same))
    edges = coo_array((np.ones(len(pairs)), tuple(np.array(pairs).T)), shape=(len(dataset), len(dataset)))
    _, labels = connected_components(edges, directed=False)
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(index)
    return list(groups.values())


def _original_name(file_name: str) -> str:
    """The name of the image that a file is a copy of: without the suffix and what tools append."""
    path = Path(file_name)
    return str(path.with_name(COPY_ENDINGS.sub("", path.stem) or path.stem)).casefold()


def cut_validation(
    dataset: Dataset, groups: Sequence[Sequence[int]], fraction: float, seed: int
) -> tuple[Dataset, Dataset]:
    """Training and validation rows. Whole groups are drawn at random until `fraction` of the images is reached. Groups
    of more than half of that, such as the images of a fixed camera, are divided into parts of consecutive images.

    Raises:
        ValueError: there are less than two images.
    """
    if len(dataset) < 2:
        raise ValueError(f"{source_of(dataset)} has {len(dataset)} images, too few to split off a validation split.")
    count = max(1, round(fraction * len(dataset)))
    largest = max(1, count // 2)
    parts = [group[start : start + largest] for group in groups for start in range(0, len(group), largest)]
    chosen: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(parts)).tolist():
        if len(chosen) + len(parts[number]) <= count:
            chosen += parts[number]
    copies = len(dataset) - len(groups)
    told = f" {copies} images look like another one; they stay on one side" if copies else ""
    if max(map(len, groups)) > largest:
        told += f", but for groups of more than {largest}, which are divided in their order"
    logger.warning_once(
        f"{source_of(dataset)} has no validation split: {len(chosen)} of its {len(dataset)} images are split off with "
        f"seed {seed}.{told + '.' if told else ''}"
    )
    validation = set(chosen)
    train = [index for index in range(len(dataset)) if index not in validation]
    return dataset.select(train), dataset.select(sorted(validation))
