"""COCO's encodings of a mask, polygons and run lengths, to pixels and back, by hotcoco or pycocotools."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_MASK = -100.0  # the logit of padding and of masks that were not computed: a probability of 0


def decode_mask(segmentation: Any, size: tuple[int, int]) -> Tensor:
    """One object's mask, (height, width) bool.

    Args:
        segmentation: COCO's: a list of polygons [x1, y1, x2, y2, ...] in pixels, whose union is the object, or
            `{"size": [height, width], "counts": ...}` with run lengths, compressed (text) or not (a list). Compressed
            counts alone are of a mask at `size`. Or a mask, (height, width) of 0 and 1.
        size: (height, width) of the image as shown, in pixels.

    Raises:
        ImportError: neither hotcoco nor pycocotools is installed.
        ValueError: it is none of these, or of an image of another size; a sentence without its end.
    """
    height, width = size
    if isinstance(segmentation, (np.ndarray, Tensor)) and segmentation.ndim == 2:
        mask = torch.as_tensor(segmentation)
        _check_size(tuple(mask.shape), size)
        if mask.dtype != torch.bool and ((mask != 0) & (mask != 1)).any():
            raise ValueError("the values of its mask must be 0 and 1")
        return mask.bool()
    if isinstance(segmentation, (str, bytes)):
        segmentation = {"size": [height, width], "counts": segmentation}
    if isinstance(segmentation, Mapping):
        if not {"size", "counts"} <= set(segmentation):
            raise ValueError('its run lengths must be {"size": [height, width], "counts": ...}')
        _check_size(tuple(segmentation["size"]), size)
        runs = segmentation["counts"]
        if not isinstance(runs, (str, bytes)) and sum(runs) != height * width:
            raise ValueError(f"its run lengths sum up to {sum(runs)}, but the image has {height * width} pixels")
        return _decoded(dict(segmentation), size)
    if not isinstance(segmentation, (list, tuple)) or not segmentation:
        raise ValueError(
            "its `segmentation` must be a list of polygons [x1, y1, x2, y2, ...] or COCO run lengths, got "
            f"{str(segmentation)[:60]!r}"
        )
    polygons = [np.asarray(polygon, dtype=np.float64).reshape(-1).tolist() for polygon in segmentation]
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
            raise ValueError(
                f"a polygon must be [x1, y1, x2, y2, ...] with at least 3 points in pixels, got {polygon[:6]}"
            )
    return _decoded(polygons, size)


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """(height, width) bool to COCO's compressed run lengths, `{"size": [height, width], "counts": text}`."""
    encoded = _library().encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    counts = encoded["counts"]
    return {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _decoded(segmentation: Any, size: tuple[int, int]) -> Tensor:
    library = _library()
    try:
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
            runs = segmentation
        else:
            runs = library.frPyObjects(segmentation, *size)
        decoded = np.asarray(library.decode(runs))
    except Exception as error:  # the libraries raise errors of any kind
        raise ValueError(f"its `segmentation` cannot be decoded ({error})") from error
    if decoded.shape[:2] != size:
        raise ValueError(f"its run lengths do not fill an image of {size[0]} x {size[1]} pixels (height x width)")
    return torch.from_numpy(np.ascontiguousarray(decoded.any(2) if decoded.ndim == 3 else decoded)).bool()


def _check_size(given: tuple[int, ...], size: tuple[int, int]) -> None:
    if given != size:
        raise ValueError(
            f"its mask is of {' x '.join(map(str, given))} pixels (height x width), but the image has {size[0]} x "
            f"{size[1]}. Masks are of the image as shown, with its EXIF orientation applied"
        )


def _library() -> Any:
    """`hotcoco.mask` or `pycocotools.mask`; imported here because only masks need them."""
    for name in ("hotcoco.mask", "pycocotools.mask"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0]:
                raise
    raise ImportError(
        'Polygons and run lengths need hotcoco: pip install hotcoco, or pip install "hf_detr[evaluation]".'
    )
