"""Data sets in which some classes are rare: show their images more often."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .schema import learned_objects


def repeat_factors(dataset: Any, threshold: float) -> list[float]:
    """How often each image should be shown per epoch (LVIS, arXiv 1908.03195, section 6.1).

    A class that is in a fraction f of all images has the factor `max(1, sqrt(threshold / f))`, an image the largest
    factor of its classes, and an image without objects 1. Crowds do not count.

    Args:
        dataset: in the schema.
        threshold: in (0, 1]; classes in a smaller fraction of the images are shown more often.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold is a fraction of the images, in (0, 1], got {threshold}.")
    classes = _classes_of_images(dataset)
    images = Counter(name for of_image in classes for name in of_image)
    factors = {name: max(1.0, math.sqrt(threshold * len(classes) / count)) for name, count in images.items()}
    return [max((factors[name] for name in of_image), default=1.0) for of_image in classes]


def repeat_rare_classes(dataset: Any, threshold: float, seed: int = 0) -> list[int]:
    """Indices of the images of an epoch in which rare classes are shown more often, in order: every image once, and
    again as often as its repeat factor says, rounded up or down at random. Their number is the rounded sum of the
    factors.

    LVIS rounds anew in each epoch. Here it is done once, so that all epochs have equally many steps and a run can be
    continued in the middle of one; augmentation makes copies differ.

    Args:
        dataset, threshold: see [`repeat_factors`].
        seed: of the rounding.
    """
    more = np.array(repeat_factors(dataset, threshold)) - 1
    total, rng = round(more.sum()), np.random.default_rng(seed)
    order = rng.permutation(len(more))
    counts = np.ones(len(more), dtype=int)
    if total:
        # systematic sampling: evenly spaced points on a line on which each image is as long as what it lacks
        ends = np.cumsum(more[order]) * (total / more.sum())
        counts[order] += np.diff(np.floor(ends + rng.random()), prepend=0.0).astype(int)
    return np.repeat(np.arange(len(more)), counts).tolist()


def describe_repeats(dataset: Any, indices: Sequence[int], names: Sequence[str]) -> str:
    """What [`repeat_rare_classes`] changed, in a sentence: images per epoch, and of each class before and after."""
    classes = _classes_of_images(dataset)
    before = Counter(name for of_image in classes for name in of_image)
    after = Counter(name for index in indices for name in classes[index])
    changed = sorted(before, key=lambda name: after[name] / before[name], reverse=True)[:5]
    examples = ", ".join(f"{names[name]} {before[name]} to {after[name]}" for name in changed)
    return f"Images of rare classes are repeated: {len(classes)} to {len(indices)} per epoch ({examples})."


def _classes_of_images(dataset: Any) -> list[set[int]]:
    rows = dataset["objects"] if hasattr(dataset, "column_names") else [row["objects"] for row in dataset]
    return [set(learned_objects(objects)["category"]) for objects in rows]
