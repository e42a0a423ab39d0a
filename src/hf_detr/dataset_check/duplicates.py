"""Decoding all images, and finding those that are identical up to resolution and compression."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from ..data.findings import Finding
from ..data.records import AnnotatedSplit, ImageRecord

THUMBNAIL_SIDE = 16  # pixels
MAX_HASH_DISTANCE = 3  # of the 64 bits of the perceptual hash
MAX_MEAN_DIFFERENCE = 2.0  # between two thumbnails, of 255
MAX_PIXEL_DIFFERENCE = 16.0  # in any thumbnail pixel: tells apart images of a static camera with a moving object
MIN_PARALLEL = 64  # images from which on worker processes are started


@dataclass(frozen=True)
class DecodedImage:
    """Perceptual hash and RGB thumbnail of an image, or why it cannot be decoded."""

    problem: str | None = None
    hash: int = 0
    thumbnail: bytes = b""


def decode_images(
    split: AnnotatedSplit, num_workers: int | None, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> list[DecodedImage]:
    """Decode all images of a split, in parallel.

    Args:
        num_workers: processes; None uses one per CPU core.
        progress: wraps the iterator over the images, to show a progress bar.
    """
    paths = [str(image.path) for image in split.images]
    workers = num_workers or len(os.sched_getaffinity(0))
    if workers <= 1 or len(paths) < MIN_PARALLEL:
        return [_decode(path) for path in progress(paths)]
    with ProcessPoolExecutor(max_workers=workers) as pool:
        return list(progress(pool.map(_decode, paths, chunksize=32)))


def _decode(path: str) -> DecodedImage:
    import imagehash

    try:
        with PIL.Image.open(path) as image:
            image.draft("RGB", (256, 256))  # decodes JPEG at a lower resolution, but to the end of the file
            image.load()
            grey = image.convert("L")
            thumbnail = image.convert("RGB").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), PIL.Image.Resampling.BOX)
            return DecodedImage(None, int(str(imagehash.phash(grey)), 16), thumbnail.tobytes())
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return DecodedImage(str(error))


def find_duplicates(splits: dict[str, AnnotatedSplit], decoded: dict[str, list[DecodedImage]]) -> Iterator[Finding]:
    """Identical images within a split, and in two splits.

    Hashes that differ in at most 3 bits have at least one of their four 16-bit parts in common, so only images that
    share a part are compared; the thumbnails decide.
    """
    by_part: dict[tuple[int, int], list[tuple[str, ImageRecord, DecodedImage]]] = {}
    for name, split in splits.items():
        for image, pixels in zip(split.images, decoded[name], strict=True):
            if pixels.problem is not None:
                continue
            keys = [(part, pixels.hash >> (16 * part) & 0xFFFF) for part in range(4)]
            same = [entry for key in keys for entry in by_part.get(key, ()) if _identical(pixels, entry[2])]
            in_split = next((entry for entry in same if entry[0] == name), None)
            elsewhere = next((entry for entry in same if entry[0] != name), None)
            for entry, code in ((in_split, "image-duplicate"), (elsewhere, "image-leaked")):
                if entry is not None:
                    message = f"is the same as {entry[1].record} of {entry[0]}"
                    yield Finding(code, name, str(split.file), image.record, message, image, other_image=entry[1])
            if not same:
                for key in keys:
                    by_part.setdefault(key, []).append((name, image, pixels))


def _identical(one: DecodedImage, other: DecodedImage) -> bool:
    if (one.hash ^ other.hash).bit_count() > MAX_HASH_DISTANCE:
        return False
    a, b = (np.frombuffer(image.thumbnail, dtype=np.uint8).astype(np.float32) for image in (one, other))
    difference = np.abs(a - b)
    return float(difference.mean()) <= MAX_MEAN_DIFFERENCE and float(difference.max()) <= MAX_PIXEL_DIFFERENCE
