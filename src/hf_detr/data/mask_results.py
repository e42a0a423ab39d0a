"""A model's masks as COCO results: run-length encodings with class and score."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .masks import Size, encode_masks, segment_masks, to_coco_rle


def mask_results(
    result: Mapping[str, Any], image_id: Any, category_ids: Mapping[int, Any] | None = None
) -> list[dict[str, Any]]:
    """The result of `post_process_instance_segmentation` or `post_process_panoptic_segmentation` for one image as COCO
    results: `image_id`, `category_id`, `segmentation` and `score`. They have no `bbox`: pycocotools would take its area
    for that of the mask.

    Args:
        result: `segmentation`, a map (H, W) of ids or one mask (N, H, W) per segment, and `segments_info`.
        category_ids: of the source, by class id; None: the class ids.

    Raises:
        ValueError: maps and segments do not fit each other; names the image.
    """
    segments = result["segments_info"]
    masks = result_masks(result["segmentation"], segments, f"Image {image_id}")
    size = (masks.shape[1], masks.shape[2])
    return [
        {
            "image_id": image_id,
            "category_id": segment["label_id"] if category_ids is None else category_ids[segment["label_id"]],
            "segmentation": to_coco_rle(counts, size),
            "score": segment.get("score", 1.0),
        }
        for segment, counts in zip(segments, encode_masks(masks), strict=True)
    ]


def result_masks(
    segmentation: Any, segments: Sequence[Mapping[str, Any]], where: str, size: Size | None = None
) -> NDArray[np.bool_]:
    """One mask (N, H, W) per segment, from a map (H, W) of their ids or from masks (N, H, W).

    Args:
        segments: dicts with `id`, which masks do not need.
        where: identifies the image in messages.
        size: of the image; None: it is not known.

    Raises:
        ValueError: sizes, numbers or ids do not fit.
    """
    maps = np.asarray(segmentation.detach().cpu() if isinstance(segmentation, Tensor) else segmentation)
    if maps.ndim not in (2, 3) or (size is not None and maps.shape[-2:] != size):
        wanted = "(H, W) or (N, H, W)" if size is None else f"{size[0]} x {size[1]} as the image (height x width)"
        raise ValueError(
            f"{where}: segmentation must have {wanted} pixels, got {tuple(maps.shape)}. Pass the sizes of the images "
            "as target_sizes to the post-processing."
        )
    if maps.ndim == 3:
        if len(maps) != len(segments):
            raise ValueError(f"{where}: there are {len(maps)} masks, but {len(segments)} records of segments_info.")
        return maps > 0
    masks = segment_masks(maps, [segment["id"] for segment in segments], where)
    return np.stack(masks) if masks else np.zeros((0, *maps.shape), dtype=bool)
