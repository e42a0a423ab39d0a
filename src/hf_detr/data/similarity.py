"""Images that look the same: a perceptual hash and a thumbnail of each, and the pairs in which both agree."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from scipy.fft import dctn
from torchvision.transforms.functional import to_pil_image

from ..model.image_io import read_image_header, to_image_tensor
from ..runtime.cores import available_cores

THUMBNAIL_SIDE = 16  # pixels
MAX_HASH_DISTANCE = 3  # of the 64 bits of the perceptual hash
MAX_MEAN_DIFFERENCE = 2.0  # between two thumbnails, of 255
MAX_PIXEL_DIFFERENCE = 16.0  # in any thumbnail pixel: tells apart images of a static camera with a moving object
MAX_COMPARED = 64  # images of one part of the hash, with which an image is compared
MAX_BLANK_RANGE = 6.0  # between the darkest and the brightest thumbnail pixel of an image that shows nothing
MIN_RANGE = 32  # of 255, that an image with wider values than 8 bits should use


@dataclass(frozen=True)
class Appearance:
    """What an image looks like, or why it cannot be used.

    Attributes:
        problem: why training cannot read it.
        is_unsupported: the file is complete, but has values that the image processor refuses.
        content: a digest; equal for equal files, and for equal pixels of files without loss.
        hash: perceptual hash of 64 bits: which of the 8 x 8 lowest frequencies are above their median.
        thumbnail: (16, 16, 3) RGB bytes.
        size: (width, height) in pixels as shown.
        is_dim: it has values wider than 8 bits, and becomes nearly one shade of grey.
    """

    problem: str | None = None
    is_unsupported: bool = False
    content: bytes = b""
    hash: int = 0
    thumbnail: bytes = b""
    size: tuple[int, int] = (0, 0)
    is_dim: bool = False

    @cached_property
    def pixels(self) -> np.ndarray:
        """The thumbnail as float32 (16, 16, 3)."""
        flat = np.frombuffer(self.thumbnail, dtype=np.uint8).astype(np.float32)
        return flat.reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)

    @property
    def is_blank(self) -> bool:
        """Whether the image shows next to nothing."""
        return float(np.ptp(self.pixels, axis=(0, 1)).max()) <= MAX_BLANK_RANGE


def appearance_of(file: str | Path | bytes, image_range: tuple[float, float] | None = None) -> Appearance:
    """Decode an image as training does.

    Args:
        file: a path, or the content of a file.
        image_range: see `to_image_tensor`.
    """
    try:
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        with PIL.Image.open(BytesIO(data)) as image:
            content = hashlib.blake2b(data, digest_size=16)
            size = read_image_header(BytesIO(data)).size
            image.draft("RGB", (256, 256))  # decodes JPEG at a lower resolution, but to the end of the file
            image.load()
            is_wide = image.mode not in (
                "1",
                "L",
                "LA",
                "P",
                "PA",
                "RGB",
                "RGBA",
                "RGBX",
                "CMYK",
                "YCbCr",
                "LAB",
                "HSV",
            )
            if image.format != "JPEG":
                content = hashlib.blake2b(image.tobytes() + str(image.size).encode(), digest_size=16)
            if image.mode == "RGB" and "transparency" not in image.info:
                rgb: PIL.Image.Image = image.copy()
            else:
                try:
                    rgb = to_pil_image(to_image_tensor(image, image_range=image_range))
                except (ValueError, TypeError) as error:
                    return Appearance(str(error), is_unsupported=True)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return Appearance(str(error))
    return Appearance(
        content=content.digest(),
        hash=perceptual_hash(rgb),
        size=size,
        thumbnail=rgb.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), PIL.Image.Resampling.BOX).tobytes(),
        is_dim=is_wide and bool(np.ptp(np.asarray(rgb)) < MIN_RANGE),
    )


def perceptual_hash(image: PIL.Image.Image) -> int:
    """64 bits that hardly change with resolution and compression, as in the library imagehash: the signs of the lowest
    frequencies of the discrete cosine transform, against their median."""
    grey = np.asarray(image.convert("L").resize((32, 32), PIL.Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey)[:8, :8]
    return int("".join("1" if value else "0" for value in (low > np.median(low)).ravel()), 2)


def appearances(
    files: Sequence[str | Path | Callable[[], bytes]],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    *,
    num_workers: int | None = None,
    image_range: tuple[float, float] | None = None,
) -> list[Appearance]:
    """Of many images, in threads, since decoding does not hold the interpreter's lock.

    Args:
        files: paths, or functions that read the content.
        progress: wraps the iterator over the images, to show a progress bar.
        num_workers: threads; None uses one per CPU core.
        image_range: see `to_image_tensor`.
    """

    def one(file: str | Path | Callable[[], bytes]) -> Appearance:
        try:
            content = file() if callable(file) else file
        except OSError as error:
            return Appearance(str(error))
        return appearance_of(content, image_range)

    with ThreadPoolExecutor(num_workers or available_cores()) as pool:
        return list(progress(pool.map(one, files)))


def look_the_same(one: Appearance, other: Appearance, tolerance: float = 1.0) -> bool:
    """Whether hash and thumbnail agree, up to resolution and compression.

    Args:
        tolerance: factor of the differences that thumbnails may have.
    """
    if (one.hash ^ other.hash).bit_count() > MAX_HASH_DISTANCE:
        return False
    difference = np.abs(one.pixels - other.pixels)
    return bool(
        difference.mean() <= tolerance * MAX_MEAN_DIFFERENCE and difference.max() <= tolerance * MAX_PIXEL_DIFFERENCE
    )


class SimilarImages:
    """Images that were added, and those among them that look like another one.

    Hashes that differ in at most 3 bits have at least one of their four 16-bit parts in common, so only images that
    share a part are compared, and of those the `MAX_COMPARED` that were added last: a fixed camera takes thousands of
    images with one hash.

    Args:
        tolerance: see [`look_the_same`].
    """

    def __init__(self, tolerance: float = 1.0) -> None:
        self.tolerance = tolerance
        self._by_part: dict[tuple[int, int], list[tuple[Any, Appearance]]] = {}

    def find(self, appearance: Appearance) -> Iterator[Any]:
        """The keys of the images that look the same, each once."""
        seen: set[int] = set()
        for key in self._parts(appearance):
            for entry in self._by_part.get(key, [])[-MAX_COMPARED:]:
                if id(entry) not in seen:
                    seen.add(id(entry))
                    if look_the_same(appearance, entry[1], self.tolerance):
                        yield entry[0]

    def add(self, key: Any, appearance: Appearance) -> None:
        entry = (key, appearance)
        for part in self._parts(appearance):
            self._by_part.setdefault(part, []).append(entry)

    @staticmethod
    def _parts(appearance: Appearance) -> list[tuple[int, int]]:
        return [(part, appearance.hash >> (16 * part) & 0xFFFF) for part in range(4)]
