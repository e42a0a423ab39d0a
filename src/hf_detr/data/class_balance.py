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
    rows = dataset["objects"] if hasattr(dataset, "column_names") else [row["objects"] for row in dataset]
    classes = [set(learned_objects(objects)["category"]) for objects in rows]
    images = Counter(name for of_image in classes for name in of_image)
    factors = {name: max(1.0, math.sqrt(threshold * len(classes) / count)) for name, count in images.items()}
    return [max((factors[name] for name in of_image), default=1.0) for of_image in classes]


def repeat_rare_classes(dataset: Any, threshold: float, seed: int = 0) -> list[int]:
    """Indices of the images of an epoch in which rare classes are shown more often, in order: each image as often as
    its repeat factor says, rounded up or down at random, so that their number is the rounded sum of the factors.

    LVIS rounds anew in each epoch. Here it is done once, so that all epochs have equally many steps and a run can be
    continued in the middle of one; augmentation makes copies differ.

    Args:
        dataset, threshold: see [`repeat_factors`].
        seed: of the rounding.
    """
    factors = np.array(repeat_factors(dataset, threshold))
    # systematic sampling: evenly spaced points on a line on which each image is as long as its factor
    order = np.random.default_rng(seed).permutation(len(factors))
    total = max(1, round(factors.sum()))
    ends = np.cumsum(factors[order]) * (total / factors.sum())
    counts = np.diff(np.floor(ends + np.random.default_rng(seed).random()), prepend=0.0).astype(int)
    return sorted(np.repeat(order, counts).tolist())


def describe_repeats(dataset: Any, indices: Sequence[int], names: Sequence[str]) -> str:
    """What [`repeat_rare_classes`] changed, in a sentence: images per epoch, and of each class before and after."""
    rows = dataset["objects"] if hasattr(dataset, "column_names") else [row["objects"] for row in dataset]
    classes = [set(learned_objects(objects)["category"]) for objects in rows]
    before = Counter(name for of_image in classes for name in of_image)
    after = Counter(name for index in indices for name in classes[index])
    changed = sorted(before, key=lambda name: after[name] / before[name], reverse=True)[:5]
    examples = ", ".join(f"{names[name]} {before[name]} to {after[name]}" for name in changed)
    return f"Images of rare classes are repeated: {len(rows)} to {len(indices)} per epoch ({examples})."
