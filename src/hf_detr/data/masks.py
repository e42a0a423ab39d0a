"""Masks of objects, as COCO's compressed run-length encodings, whose text (`counts`) is what rows hold.

hotcoco's encoder and decoder, which equal those of pycocotools byte by byte, are several times faster than NumPy: 20
masks of 800 x 1066 pixels take 13 ms to encode and as long to decode.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.extras import import_extra

Size = tuple[int, int]  # (height, width) in pixels
Ids = NDArray[np.int64]


def encode_masks(masks: NDArray[Any] | Tensor) -> list[str]:
    """The `counts` of each of the masks (N, H, W), bool or 0 and 1."""
    encode = _codec().encode
    arrays = np.asarray(masks.detach().cpu() if isinstance(masks, Tensor) else masks).astype(bool, copy=False)
    return [encode(mask)["counts"].decode() for mask in arrays]


def decode_masks(counts: Sequence[str], size: Size) -> Tensor:
    """The masks (N, H, W), bool, of an image of this size."""
    if not counts:
        return torch.zeros((0, *size), dtype=torch.bool)
    stacked = _codec().decode([_rle(text, size) for text in counts])  # (H, W, N), columns first
    return torch.from_numpy(np.stack([mask.T for mask in stacked.T])).view(torch.bool)  # faster than one transposition


def resize_masks(masks: Tensor, size: Size) -> Tensor:
    """Masks (N, H, W) in another size: each pixel is the one of the original that its centre falls into."""
    if masks.shape[-2:] == size:
        return masks
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, masks.shape[-2:], strict=True)
    )
    return torch.from_numpy(masks.numpy().take(columns, axis=2).take(rows, axis=1))  # faster than PyTorch's indexing


def mask_boxes(counts: Sequence[str], size: Size) -> list[list[float]]:
    """[x_min, y_min, width, height] in pixels of the smallest box around each mask; zeros for an empty one."""
    return [_codec().to_bbox(_rle(text, size)).tolist() for text in counts]


def mask_areas(counts: Sequence[str], size: Size) -> list[int]:
    """The number of pixels of each mask."""
    return [int(_codec().area(_rle(text, size))) for text in counts]


def find_overlap(counts: Sequence[str], size: Size) -> int:
    """How many pixels belong to more than one of the masks, each counted once less than it has masks."""
    if len(counts) < 2:
        return 0
    union = _codec().merge([_rle(text, size) for text in counts])
    return sum(mask_areas(counts, size)) - int(_codec().area(union))


def to_coco_rle(counts: str, size: Size) -> dict[str, Any]:
    """The `segmentation` of a COCO record."""
    return {"size": list(size), "counts": counts}


def encode_segmentation(segmentation: Any, size: Size) -> str:
    """The `counts` of a COCO segmentation: polygons in pixels, or a run-length encoding, compressed or not.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], one such polygon, or a dict with `counts` and `size`.
            Polygons of fewer than three points have no pixels and do not count beside others.
        size: of the image as shown.

    Raises:
        ValueError: it is neither, or not of this size; the reason, without the record.
    """
    height, width = size
    if isinstance(segmentation, dict):
        given = segmentation.get("size")
        if "counts" not in segmentation or not isinstance(given, (list, tuple)) or len(given) != 2:
            raise ValueError(f"a run-length encoding needs counts and size, got {str(segmentation)[:60]}")
        if tuple(int(side) for side in given) != size:
            raise ValueError(f"the mask is of {given[1]} x {given[0]} pixels, but the image has {width} x {height}")
        counts = segmentation["counts"]
        counts = [int(count) for count in counts] if isinstance(counts, (list, tuple)) else counts
        rle = {"size": list(size), "counts": counts}
        codec = _codec()
        codec.area(rle)  # the checks of counts that are text
        encoded: bytes = codec.frPyObjects(rle, height, width)["counts"] if isinstance(counts, list) else counts
        return encoded.decode() if isinstance(encoded, bytes) else encoded
    polygons = [_polygon(points, size) for points in _polygons_of(segmentation)]
    usable = [polygon for polygon in polygons if len(polygon) >= 6]
    if not usable:
        raise ValueError("a polygon needs at least three points")
    codec = _codec()
    return str(codec.merge([codec.fr_poly(polygon, height, width) for polygon in usable])["counts"].decode())


def _polygons_of(segmentation: Any) -> list[Any]:
    if not isinstance(segmentation, (list, tuple, np.ndarray)) or not len(segmentation):
        raise ValueError(f"a segmentation must be polygons or a run-length encoding, got {str(segmentation)[:60]}")
    nested = all(isinstance(polygon, (list, tuple, np.ndarray)) for polygon in segmentation)
    return list(segmentation) if nested else [segmentation]


def _polygon(points: Any, size: Size) -> list[float]:
    """[x1, y1, x2, y2, ...], not so far outside that drawing it would take forever."""
    try:
        values = np.asarray(points, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        raise ValueError(f"a polygon must be pairs of numbers, got {str(points)[:60]}") from None
    if len(values) % 2 or not np.isfinite(values).all():
        raise ValueError(f"a polygon must be pairs of finite numbers, got {str(points)[:60]}")
    reach = np.abs(values.reshape(-1, 2)) > 10 * np.array([size[1], size[0]])
    if reach.any():
        raise ValueError(f"a polygon reaches {np.abs(values).max():.0f} pixels from an image of {size[1]} x {size[0]}")
    return list(values.tolist())


def _rle(counts: str, size: Size) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


def _codec() -> Any:
    return import_extra("hotcoco", "evaluation").mask


# -- maps of segments --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentMap:
    """The segments of an image as COCO's panoptic format stores them: an image of 8-bit RGB, in which a segment has the
    colour (id % 256, id // 256 % 256, id // 65536); 0 is no segment.

    Attributes:
        path: of the file, or what messages call it.
        read: reads its bytes, where it is not a file at `path`.
    """

    path: Path
    read: Callable[[], bytes] | None = None

    def ids(self) -> Ids:
        """The id of the segment at each pixel (H, W).

        Raises:
            ValueError: it cannot be read; names the file.
        """
        try:
            with PIL.Image.open(self.path if self.read is None else BytesIO(self.read())) as image:
                if image.mode not in ("RGB", "RGBA"):
                    raise ValueError(f"has the mode {image.mode}, but ids are colours of RGB")
                colours = np.asarray(image.convert("RGB")).astype(np.int64)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}") from error
        return colours @ np.array([1, 256, 256**2])


def segment_colours(ids: NDArray[Any]) -> NDArray[np.uint8]:
    """The colours (H, W, 3) of the ids of segments (H, W), as COCO's panoptic format has them.

    Raises:
        ValueError: an id is not in [0, 2^24).
    """
    ids = np.asarray(ids).astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= 256**3):
        raise ValueError(f"Ids of segments must be in [0, 2^24), got {ids.min()} to {ids.max()}.")
    return np.stack((ids % 256, ids // 256 % 256, ids // 256**2), axis=-1).astype(np.uint8)


def segment_masks(segmentation: NDArray[Any], ids: Sequence[int], where: str) -> list[NDArray[np.bool_]]:
    """The mask (H, W) of each segment of a map (H, W) of their ids; -1, and 0 unless it is an id, are no segment.

    Args:
        ids: of the segments.
        where: identifies the image in messages.

    Raises:
        ValueError: an id is listed twice, or is in the map and not listed.
    """
    if len(set(ids)) < len(ids):
        raise ValueError(f"{where}: two segments have the same id, of {sorted(ids)}.")
    unlisted = [number for number in unlisted_ids(segmentation, ids) if number != -1]
    if unlisted:
        raise ValueError(f"{where}: the ids {unlisted[:5]} are in the map of segments and not among the segments.")
    return [segmentation == number for number in ids]


def unlisted_ids(ids: NDArray[Any], listed: Iterable[int]) -> list[int]:
    """Ids of a map of segments that are not listed, without 0, which is no segment."""
    return sorted(set(np.unique(ids).tolist()) - set(listed) - {0})
