"""A validation split, or folds, out of the training images, with the copies of an image on one side."""

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
    parts = _parts(groups, largest)
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
    return _divide(dataset, set(chosen))


def hold_out_fold(
    dataset: Dataset, groups: Sequence[Sequence[int]], fold: tuple[int, int], seed: int
) -> tuple[Dataset, Dataset]:
    """The rows outside a fold, and those in it. Whole groups go, in random order, to the fold with the fewest images;
    groups of more than half a fold are divided into parts of consecutive images.

    Args:
        fold: its number, from 1, and the number of folds. Each image is in exactly one fold of a seed.

    Raises:
        ValueError: there is no such fold, or there are fewer images than folds.
    """
    number, count = fold
    if count < 2 or not 1 <= number <= count:
        raise ValueError(f"Folds are at least 2, and numbered from 1: there is no fold {number} of {count}.")
    largest = max(1, len(dataset) // (2 * count))
    parts = _parts(groups, largest)
    copies, longest = len(dataset) - len(groups), max(map(len, groups), default=0)
    if copies:
        divided = f", but for groups of more than {largest}, which are divided in their order" * (longest > largest)
        logger.warning_once(
            f"{source_of(dataset)}: {copies} images look like another one; they stay in one fold{divided}."
        )
    if len(parts) < count:
        raise ValueError(f"{source_of(dataset)} has {len(dataset)} images, too few for {count} folds.")
    folds: list[list[int]] = [[] for _ in range(count)]
    for index in np.random.default_rng(seed).permutation(len(parts)).tolist():
        min(folds, key=len).extend(parts[index])
    return _divide(dataset, set(folds[number - 1]))


def _parts(groups: Sequence[Sequence[int]], largest: int) -> list[Sequence[int]]:
    """The groups, those of more than `largest` images in parts."""
    return [group[start : start + largest] for group in groups for start in range(0, len(group), largest)]


def _divide(dataset: Dataset, held_out: set[int]) -> tuple[Dataset, Dataset]:
    """The other rows, and those that are held out, in the order of the dataset."""
    others = [index for index in range(len(dataset)) if index not in held_out]
    return dataset.select(others), dataset.select(sorted(held_out))
