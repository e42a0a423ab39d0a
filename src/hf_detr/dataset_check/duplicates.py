"""Images that occur twice, within a split or in two."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..data.checks import numeric_boxes
from ..data.findings import Finding
from ..data.records import AnnotatedSplit, ImageRecord
from ..data.similarity import Appearance, SimilarImages

BOX_TOLERANCE = 0.02  # of the image, between the boxes of two copies


class Entry(NamedTuple):
    """An image that others are compared with."""

    split: str
    image: ImageRecord
    look: Appearance


def find_duplicates(splits: dict[str, AnnotatedSplit], looks: dict[str, list[Appearance]]) -> Iterator[Finding]:
    """Images that look the same within a split, and in two splits.

    An image of another split is "leaked" if its content is equal, or if it looks the same and has the same boxes. One
    that only looks the same, as the images of a fixed camera do and those that show nothing, is "similar".
    """
    similar = SimilarImages()
    by_content: dict[bytes, list[Entry]] = {}
    for name, split in splits.items():
        for image, look in zip(split.images, looks[name], strict=True):
            if look.problem is not None:
                continue
            same = [*by_content.get(look.content, ()), *similar.find(look)]
            in_split = [entry for entry in same if entry.split == name and not _is_same_file(image, entry.image)]
            elsewhere = [entry for entry in same if entry.split != name]
            leaked = [entry for entry in elsewhere if _is_copy(image, look, entry)]
            for code, entries in (
                ("image-duplicate", in_split[:1]),
                ("image-leaked", list({id(entry): entry for entry in leaked}.values())),
                ("image-similar", [] if leaked else elsewhere[:1]),
            ):
                for other in entries:
                    verb = "looks like" if code == "image-similar" else "is the same as"
                    message = f"{verb} {other.image.record} of {other.split}"
                    yield Finding(code, name, str(split.file), image.record, message, image, other_image=other.image)
            entry = Entry(name, image, look)
            by_content.setdefault(look.content, []).append(entry)
            similar.add(entry, look)


def _is_same_file(image: ImageRecord, other: ImageRecord) -> bool:
    """Whether two records name one file, which is reported as such."""
    return image.read is None and image.path == other.path


def _is_copy(image: ImageRecord, look: Appearance, entry: Entry) -> bool:
    """Whether an image that looks the same is the same one, and not only of the same scene."""
    return look.content == entry.look.content or (not look.is_blank and has_same_boxes(image, entry.image))


def has_same_boxes(image: ImageRecord, other: ImageRecord) -> bool:
    """Whether both have the same objects, to 2 % of the image."""
    a, b = relative_boxes(image), relative_boxes(other)
    return a.shape == b.shape and bool(np.allclose(a, b, atol=BOX_TOLERANCE))


def relative_boxes(image: ImageRecord) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Class ids and boxes in [0, 1], (N, 5), sorted."""
    boxes = sorted((box.category or 0, *map(float, box.bbox)) for box in numeric_boxes(image))
    return np.array(boxes, dtype=float).reshape(-1, 5) / (1, *image.size, *image.size)
