"""Training images mixed from several: mosaics, and pasted objects."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .augmentation import Row, image_of
from .box_arrays import clip_boxes, corners_of, intersections, to_boxes
from .schema import learned_objects

Area = tuple[int, int, int, int]  # (left, top, right, bottom) in pixels
MIN_SIDE = 8  # pixels of an image that becomes a mosaic
RAREST = 20  # objects: a class with fewer is pasted as if it had these, so that the same few are not in all images


class Rows(Protocol):
    """Rows of a data set in the schema, without masks, such as a list; one may be read only when it is indexed."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


class Mixer(Protocol):
    """Changes a row with the help of other rows, before its augmentation; random numbers are from PyTorch's
    generator."""

    def __call__(self, row: Row, rows: Rows) -> Row: ...


class Mosaic:
    """Puts random crops of four images together (YOLOv4, arXiv 2004.10934, section 3.4), each in one quarter of an
    image of the size of the first.

    The quarters meet at a random point in the middle half of the image, and are shuffled. Before it is cropped, an
    image is resized so that its shorter side is that of the first image times a random factor, and enlarged further
    if it would not fill its quarter. Boxes are clipped to their quarter; those of which less than `min_visible`
    remains are dropped. `area` is scaled like the area of the box. An image with a side below 8 pixels stays as it is.

    Args:
        probability: of a training image to become a mosaic, in (0, 1].
        scales: range of the random factor.
        min_visible: fraction of the area of a box.

    Raises:
        ValueError: the probability is not in (0, 1]; when called, a row has masks, or another row has other channels or
            other columns of objects.
    """

    def __init__(
        self, probability: float = 0.5, *, scales: tuple[float, float] = (0.5, 1.5), min_visible: float = 0.3
    ) -> None:
        self.probability = _checked(probability)
        self.scales = scales
        self.min_visible = min_visible

    def __call__(self, row: Row, rows: Rows) -> Row:
        if _uniform(0, 1) >= self.probability:
            return row
        image = image_of(row)
        height, width = image.shape[-2:]
        if min(height, width) < MIN_SIDE:
            return row
        mixed = [row, *(rows[_below(len(rows))] for _ in range(3))]
        _check_columns(mixed)
        across, down = (round(_uniform(0.25, 0.75) * side) for side in (width, height))
        quarters = (
            (0, 0, across, down),
            (across, 0, width, down),
            (0, down, across, height),
            (across, down, width, height),
        )
        canvas = torch.empty_like(image.as_subclass(Tensor))
        objects: Row = {name: [] for name in row["objects"]}
        for number, quarter in zip(torch.randperm(4).tolist(), quarters, strict=True):
            source = _image_like(image, mixed[number])
            left, top, right, bottom = quarter
            factor = _uniform(*self.scales) * min(height, width) / min(source.shape[-2:])
            crop = _random_crop(source, (bottom - top, right - left), factor)
            canvas[:, top:bottom, left:right] = _resized(source, crop, (bottom - top, right - left))
            for name, values in _placed(mixed[number]["objects"], source, crop, quarter, self.min_visible).items():
                objects[name] += values
        return row | {"image": tv_tensors.Image(canvas), "width": width, "height": height, "objects": objects}


class CopyPaste:
    """Pastes objects of other images, with a margin, at random locations (Cut, Paste and Learn, arXiv 1708.01642).

    Each is an object of a class drawn at random, with a probability inverse to the number of its objects, but at least
    20, so that rare classes are seen more often. Only objects with no other within their margin are pasted. No paste
    with its margin covers more than `max_overlap` of the smaller of itself and any box. As half of the pastes are of
    background, the edges of a paste are no evidence of an object; for the same reason most of them are blended.

    Args:
        objects: the column of exactly those rows that it will be called with.
        probability: of a training image to get pastes, in (0, 1].
        max_pastes: their number is from 1 to this one; None: an eighth of the mean number of objects of an image, but
            at least 3.
        scales: range of the random factor of their size, beside that which brings the shorter side of the other image
            to that of this one.
        margin: on all sides, as a fraction of the longer side of the box.
        max_overlap: fraction of an area, by each paste.

    Raises:
        ValueError: the probability is not in (0, 1], or `max_pastes` below 1; when called, there are more or fewer rows
            than `objects`, a row has masks, or another row has other channels or other columns of objects.
    """

    def __init__(
        self,
        objects: Sequence[Row],
        probability: float = 0.7,
        *,
        max_pastes: int | None = None,
        scales: tuple[float, float] = (0.5, 1.5),
        margin: float = 0.15,
        max_overlap: float = 0.15,
    ) -> None:
        self.probability = _checked(probability)
        self.scales = scales
        self.margin = margin
        self.max_overlap = max_overlap
        self.num_rows = len(objects)
        self.by_class: dict[int, list[tuple[int, int]]] = {}  # (row, object) of those that can be pasted
        for number, of_row in enumerate(objects):
            for index in self._separate(of_row):
                self.by_class.setdefault(of_row["category"][index], []).append((number, index))
        counts = Counter(label for of_row in objects for label in learned_objects(of_row)["category"])
        self.rarity = torch.tensor([1 / max(RAREST, counts[label]) for label in self.by_class])  # of each class
        if max_pastes is None:
            max_pastes = max(3, round(counts.total() / 8 / max(1, len(objects))))
        if max_pastes < 1:
            raise ValueError(f"max_pastes must be at least 1, got {max_pastes}.")
        self.max_pastes = max_pastes

    def _separate(self, objects: Row) -> list[int]:
        """The objects that are no crowds, with no other box within their margin."""
        given = to_boxes(objects["bbox"])
        boxes = corners_of(given)
        margin = self.margin * given[:, 2:].max(axis=1, keepdims=True) + 1  # as whole pixels are cropped
        wide = np.concatenate((boxes[:, :2] - margin, boxes[:, 2:] + margin), axis=1)
        touched = (intersections(wide[:, None], boxes) > 0).sum(axis=1) > 1  # by more than itself
        return [i for i, crowd in enumerate(objects["iscrowd"]) if not crowd and not touched[i]]

    def __call__(self, row: Row, rows: Rows) -> Row:
        if len(rows) != self.num_rows:
            raise ValueError(f"The objects to paste are of {self.num_rows} rows, but there are {len(rows)}.")
        if _uniform(0, 1) >= self.probability or not self.by_class:
            return row
        image = image_of(row)
        canvas = image.as_subclass(Tensor).clone()
        objects = {name: list(values) for name, values in row["objects"].items()}
        classes = list(self.by_class.values())
        for _ in range(1 + _below(self.max_pastes)):
            members = classes[int(torch.multinomial(self.rarity, 1))]
            number, index = members[_below(len(members))]
            other = rows[number]
            _check_columns([row, other])
            self._paste(canvas, objects, _image_like(image, other), other["objects"], index)
        height, width = canvas.shape[-2:]
        return row | {"image": tv_tensors.Image(canvas), "width": width, "height": height, "objects": objects}

    def _paste(self, canvas: Tensor, objects: Row, source: Tensor, others: Row, index: int) -> None:
        """Paste an object of another image, or background of the same size, into the canvas and the objects. Nothing
        changes if no free location is found for it."""
        height, width = source.shape[-2:]
        own = self._with_margin(others["bbox"][index], height, width)
        background = _uniform(0, 1) < 0.5
        as_large = (own[3] - own[1], own[2] - own[0])
        crop = _free_location(as_large, (height, width), others["bbox"], 0.0) if background else own
        if crop is None:
            return
        factor = _uniform(*self.scales) * min(canvas.shape[-2:]) / min(height, width)
        size = (max(2, round((crop[3] - crop[1]) * factor)), max(2, round((crop[2] - crop[0]) * factor)))
        target = _free_location(size, (canvas.shape[-2], canvas.shape[-1]), objects["bbox"], self.max_overlap)
        if target is None:
            return
        part = canvas[:, target[1] : target[3], target[0] : target[2]]
        opacity = _soft_edges(size) if _uniform(0, 1) < 0.7 else torch.ones(size)
        blended = part * (1 - opacity) + _resized(source, crop, size) * opacity
        part.copy_(blended if canvas.is_floating_point() else blended.round())
        if not background:
            of_object = {name: [values[index]] for name, values in others.items()}
            for name, values in _placed(of_object, source, crop, target, 0.0).items():
                objects[name] += values

    def _with_margin(self, box: Sequence[float], height: int, width: int) -> Area:
        x, y, w, h = box
        margin = self.margin * max(w, h)
        left, top = max(0, int(x - margin)), max(0, int(y - margin))
        return left, top, min(width, int(x + w + margin + 1)), min(height, int(y + h + margin + 1))


def build_mixers(rows: Any, *, mosaic: float, copy_paste: float) -> list[Mixer]:
    """The mixers of these probabilities; none of 0.

    Args:
        rows: those that will be mixed, a `datasets.Dataset` or a list.
    """
    mixers: list[Mixer] = [Mosaic(mosaic)] if mosaic else []
    if not copy_paste:
        return mixers
    objects = [row["objects"] for row in rows] if isinstance(rows, list) else rows["objects"]
    return [*mixers, CopyPaste(objects, copy_paste)]


def _random_crop(image: Tensor, size: tuple[int, int], factor: float) -> Area:
    """A random part of an image that `factor` enlarges to this (height, width); a larger factor where it is smaller."""
    have = image.shape[-2:]
    factor = max(factor, *(wanted / side for wanted, side in zip(size, have, strict=True)))
    height, width = (max(1, min(side, round(wanted / factor))) for wanted, side in zip(size, have, strict=True))
    top, left = _below(have[0] - height + 1), _below(have[1] - width + 1)
    return left, top, left + width, top + height


def _resized(image: Tensor, crop: Area, size: tuple[int, int]) -> Tensor:
    """Part of an image in this (height, width), not both of one pixel, which PyTorch 2.14 cannot resize to."""
    left, top, right, bottom = crop
    return F.resize(image.as_subclass(Tensor)[:, top:bottom, left:right], list(size), antialias=True)


def _placed(objects: Row, image: Tensor, crop: Area, place: Area, min_visible: float) -> Row:
    """The objects of an image of which at least a fraction is in the crop, as they are when it is resized to another
    place; none of less than a pixel."""
    given = corners_of(clip_boxes(to_boxes(objects["bbox"]), image.shape[-2], image.shape[-1]))
    scale = np.array([(place[2] - place[0]) / (crop[2] - crop[0]), (place[3] - place[1]) / (crop[3] - crop[1])])
    low = np.maximum(given[:, :2], crop[:2])
    sides = (np.minimum(given[:, 2:], crop[2:]) - low).clip(min=0)
    with np.errstate(invalid="ignore"):  # 0 / 0, of a box that ends where the image begins
        visible = sides.prod(axis=1) / (given[:, 2:] - given[:, :2]).prod(axis=1)
    kept = np.flatnonzero((visible >= min_visible) & (sides * scale >= 1).all(axis=1)).tolist()
    placed = np.concatenate(((low - crop[:2]) * scale + place[:2], sides * scale), axis=1)
    changed = {name: [values[index] for index in kept] for name, values in objects.items()}
    changed["bbox"] = placed[kept].tolist()
    if "area" in changed:
        growth = (visible * scale.prod())[kept].tolist()
        changed["area"] = [area * factor for area, factor in zip(changed["area"], growth, strict=True)]
    return changed


def _free_location(
    size: tuple[int, int], within: tuple[int, int], boxes: Sequence[Sequence[float]], max_overlap: float
) -> Area | None:
    """A random location for a paste of this (height, width) in an image of another (height, width), at which it
    overlaps no box by more than this fraction of the smaller of the two; None if ten random locations do not."""
    if size[0] > within[0] or size[1] > within[1]:
        return None
    given = to_boxes(boxes)
    taken, smaller = corners_of(given), given[:, 2:].prod(axis=1).clip(max=size[0] * size[1])
    for _ in range(10):
        top, left = _below(within[0] - size[0] + 1), _below(within[1] - size[1] + 1)
        place = (left, top, left + size[1], top + size[0])
        if (intersections(np.array(place, dtype=np.float64), taken) <= max_overlap * smaller).all():
            return place
    return None


def _soft_edges(size: tuple[int, int]) -> Tensor:
    """Opacity (H, W): 1, and falling to 0 within a tenth of the shorter side from the edges."""
    reach = max(1, round(0.1 * min(size))) + 1
    rows, columns = (
        (torch.minimum(torch.arange(n), torch.arange(n).flip(0)) + 1).div(reach).clamp(max=1) for n in size
    )
    return rows[:, None] * columns


def _checked(probability: float) -> float:
    if not 0 < probability <= 1:
        raise ValueError(f"A probability of mixed images must be above 0 and at most 1, got {probability}.")
    return probability


def _check_columns(rows: Sequence[Row]) -> None:
    columns = set(rows[0]["objects"])
    if any("mask" in row["objects"] for row in rows):
        raise ValueError("Mixing images whose objects have masks is not supported.")
    for row in rows[1:]:
        if set(row["objects"]) != columns:
            raise ValueError(
                f"The objects of image {row.get('image_id')} have {sorted(row['objects'])}, those of image "
                f"{rows[0].get('image_id')} {sorted(columns)}. Mixed images must have the same."
            )


def _image_like(first: Tensor, row: Row) -> Tensor:
    """The image of a row with the range of values of another."""
    image = image_of(row)
    if len(image) != len(first):
        raise ValueError(
            f"Image {row.get('image_id')} has {len(image)} channels; it is mixed with one of {len(first)}."
        )
    return F.to_dtype(image, first.dtype, scale=True)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _below(count: int) -> int:
    """A random index below this number."""
    return int(torch.randint(count, ()))
