"""The `size` of an image processor, in any of its forms, and the sizes of the resized images."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width


def size_fields(size: Mapping[str, int | None] | Any) -> dict[str, int]:
    """The fields that are set, such as `{"shortest_edge": 800, "longest_edge": 1333}`, in pixels."""
    return {name: value for name, value in dict(size).items() if value}


def resized_size(image_size: tuple[int, int], size: Mapping[str, int | None] | Any) -> tuple[int, int]:
    """(height, width) of an image of this (height, width) after a processor's resize, in pixels, at least 1."""
    given = size_fields(size)
    if "shortest_edge" in given:
        resized = get_size_with_aspect_ratio(image_size, given["shortest_edge"], given.get("longest_edge"))
    elif "max_height" in given:
        resized = get_image_size_for_max_height_width(image_size, given["max_height"], given["max_width"])
    else:
        resized = given["height"], given["width"]
    return max(1, int(resized[0])), max(1, int(resized[1]))


def rounded_side(side: int, limit: int | None = None) -> int:
    """The nearest multiple of 64 pixels, or below 256 of 32, below 128 of 16, and so on: a side changes by at most an
    eighth.

    Args:
        limit: if the nearest is longer, the one before it.
    """
    step = min(64, 1 << max(0, side.bit_length() - 3))
    nearest = round(side / step) * step
    return nearest - step if limit and nearest > limit else nearest


def rounded_size(image_size: tuple[int, int], size: Mapping[str, int | None] | Any) -> tuple[int, int]:
    """(height, width) of a resized image, rounded by [`rounded_side`] within the limits of a processor's size; as it is
    where the size is exact."""
    given = size_fields(size)
    height, width = image_size
    if "height" in given:
        return height, width
    if "max_height" in given:
        return rounded_side(height, given["max_height"]), rounded_side(width, given["max_width"])
    shortest, longest = given["shortest_edge"], given.get("longest_edge")
    rounded = [rounded_side(side, shortest if side == min(image_size) else longest) for side in image_size]
    return rounded[0], rounded[1]


def resized_sizes(
    image_sizes: Iterable[tuple[int, int]], size: Mapping[str, int | None] | Any
) -> list[tuple[int, int]]:
    """[`resized_size`] of each image: (height, width) pairs to (height, width) pairs, in pixels."""
    return [resized_size(image_size, size) for image_size in image_sizes]


def size_range(size: Mapping[str, int | None] | Any) -> tuple[int, int]:
    """The smallest and the largest number of the size, in pixels."""
    given = sorted(size_fields(size).values())
    return given[0], given[-1]


def keeps_aspect_ratio(size: Mapping[str, int | None] | Any) -> bool:
    """Whether images of different shapes still have different shapes after the resize."""
    return "height" not in size_fields(size)
