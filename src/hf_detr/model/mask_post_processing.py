"""Step 8 for masks: the masks of all queries, turned into segments of the image.

Masks are always cut out of the padded batch before they are resized, by `mask_sizes` of
[`~hf_detr.model.outputs.DetrSegmentationOutput`]; outputs without it have no padding.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .mask_encoding import NO_MASK, encode_mask

MIN_AREA = 5  # pixels; the paper's code removes segments of at most 4
PAPER_THRESHOLD = 0.85
Sizes = Sequence[tuple[int, int]] | Tensor | None


class ImageMasks(NamedTuple):
    """The queries of one image that were kept.

    Args:
        scores, labels: (n,), of the best class.
        logits: (n, h, w) of the masks, without padding.
        image_size: (height, width) of the image that the model got, in pixels.
        target_size: (height, width) of the wanted result, in pixels; None: as it is.
    """

    scores: Tensor
    labels: Tensor
    logits: Tensor
    image_size: tuple[int, int]
    target_size: tuple[int, int] | None


# -- the three tasks ---------------------------------------------------------------------------------------------------


def default_threshold(rule: str, of_processor: float | None) -> float:
    """The score above which a query becomes a panoptic segment; `of_processor` is its `panoptic_threshold`.

    Raises:
        ValueError: there is no such rule.
    """
    _check_rule(rule)
    if rule == "transformers":
        return 0.5
    return PAPER_THRESHOLD if of_processor is None else of_processor


@torch.no_grad()
def post_process_panoptic(
    outputs: Any,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    label_ids_to_fuse: set[int] | None,
    target_sizes: Sizes,
    rule: str,
) -> list[dict[str, Any]]:
    """Assign each pixel to at most one segment. See `DetrImageProcessor.post_process_panoptic_segmentation`.

    Raises:
        ValueError: there is no such rule, or `target_sizes` are not one per image.
    """
    _check_rule(rule)
    fused, results = {int(label) for label in label_ids_to_fuse or ()}, []
    for image in _kept(outputs, threshold, target_sizes):
        if rule == "paper":
            results.append(_segments_of_paper(image, fused))
        else:
            results.append(_segments_of_transformers(image, mask_threshold, overlap_mask_area_threshold, fused))
    return results


@torch.no_grad()
def post_process_instance(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sizes = None,
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
) -> list[dict[str, Any]]:
    """One mask per object. See `DetrImageProcessor.post_process_instance_segmentation`.

    Raises:
        ValueError: `target_sizes` are not one per image.
    """
    results = []
    for image in _kept(outputs, threshold, target_sizes):
        if return_binary_maps:
            result = _masks_of_paper(image, mask_threshold)
        else:
            result = _segments_of_transformers(image, mask_threshold, overlap_mask_area_threshold, set())
        if return_coco_annotation:
            masks = result["segmentation"]
            apart = masks if return_binary_maps else [masks == segment["id"] for segment in result["segments_info"]]
            result["segmentation"] = [encode_mask(mask) for mask in apart]
        results.append(result)
    return results


@torch.no_grad()
def post_process_semantic(outputs: Any, target_sizes: Sizes = None) -> list[tuple[Tensor, Tensor]]:
    """The best class of each pixel, and the scores of all classes: per image (height, width) and (num_labels, height,
    width), the sum over queries of class probability times mask probability.

    Raises:
        ValueError: `target_sizes` are not one per image, or the masks of some queries were not computed.
    """
    results = []
    for index, (logits, _, target_size) in enumerate(_images(outputs, target_sizes)):
        if _lacks_masks(logits):
            raise ValueError(
                "Semantic segmentation needs the masks of all queries: call the model without `masks_above`."
            )
        probabilities = outputs.logits[index].float().softmax(-1)[:, :-1]
        scores = torch.einsum("qc,qhw->chw", probabilities, logits.float().sigmoid())
        scores = _resize(scores, target_size)
        results.append((scores.argmax(0), scores))
    return results


def _check_rule(rule: str) -> None:
    if rule not in ("paper", "transformers"):
        raise ValueError(f'rule must be "paper" or "transformers", got {rule!r}.')


# -- the rules ---------------------------------------------------------------------------------------------------------


def _segments_of_paper(image: ImageMasks, fused: set[int]) -> dict[str, Any]:
    """The rule of the paper's code: at the size of the image, each pixel belongs to the query whose mask has the
    largest logit there (a softmax over the kept queries does not change which). All queries of one
    stuff class count as its first one. Queries left with at most 4 pixels, which includes the other queries of that
    stuff, are removed, and all pixels are assigned again, until none is that small."""
    scores, labels, logits = image.scores, image.labels, _resize(image.logits, image.image_size)
    target_size = image.target_size or image.image_size
    first = torch.arange(len(labels), device=labels.device)
    for label in fused:
        same = labels == label
        if same.any():
            first[same] = same.nonzero()[0, 0]
    assigned = torch.zeros(target_size, dtype=torch.int64, device=logits.device)
    while len(labels):
        assigned = resize_nearest(first[logits.argmax(0)], target_size)
        large = assigned.flatten().bincount(minlength=len(labels)) >= MIN_AREA
        if large.all():
            assigned = assigned + 1
            break
        scores, labels, logits = scores[large], labels[large], logits[large]
        first = torch.arange(len(labels), device=labels.device)
        assigned = torch.zeros_like(assigned)
    segments = [
        {"id": index + 1, "label_id": label, "was_fused": label in fused, "score": round(score, 6)}
        for index, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True))
    ]
    return {"segmentation": assigned.int(), "segments_info": segments}


def _segments_of_transformers(
    image: ImageMasks, mask_threshold: float, overlap_threshold: float, fused: set[int]
) -> dict[str, Any]:
    """The rule of transformers: each pixel belongs to the query with the largest score times mask probability. A query
    becomes a segment if its pixels are more than `overlap_threshold` of those where this product reaches
    `mask_threshold`. Its faults are not repeated: segments have ids of their own, and fused ones are listed once."""
    size = image.target_size or tuple(image.logits.shape[-2:])
    segmentation = torch.zeros(size, dtype=torch.int32, device=image.logits.device)
    segments: list[dict[str, Any]] = []
    if len(image.labels) == 0:
        return {"segmentation": segmentation, "segments_info": segments}
    weighted = _resize(image.logits.sigmoid(), image.target_size) * image.scores[:, None, None]
    best, id_of_stuff = weighted.argmax(0), dict[int, int]()
    areas = best.flatten().bincount(minlength=len(weighted)).tolist()
    whole = (weighted >= mask_threshold).flatten(1).sum(1).tolist()
    for query, (label, score) in enumerate(zip(image.labels.tolist(), image.scores.tolist(), strict=True)):
        if not (areas[query] and whole[query] and areas[query] / whole[query] > overlap_threshold):
            continue
        if label in id_of_stuff:
            segmentation[best == query] = id_of_stuff[label]
            continue
        identity = len(segments) + 1
        segmentation[best == query] = identity
        segments.append({"id": identity, "label_id": label, "was_fused": label in fused, "score": round(score, 6)})
        if label in fused:
            id_of_stuff[label] = identity
    return {"segmentation": segmentation, "segments_info": segments}


def _masks_of_paper(image: ImageMasks, mask_threshold: float) -> dict[str, Any]:
    """Each query's own mask, which may overlap others, (n, height, width) bool: thresholded at the size of the image,
    as in the paper's code."""
    masks = _resize(image.logits, image.image_size).sigmoid() > mask_threshold
    masks = resize_nearest(masks, image.target_size or image.image_size)
    segments = [
        {"id": index + 1, "label_id": label, "was_fused": False, "score": round(score, 6)}
        for index, (label, score) in enumerate(zip(image.labels.tolist(), image.scores.tolist(), strict=True))
    ]
    return {"segmentation": masks, "segments_info": segments}


# -- queries and sizes -------------------------------------------------------------------------------------------------


def _kept(outputs: Any, threshold: float, target_sizes: Sizes) -> Iterator[ImageMasks]:
    """The queries of each image whose best class is an object with a score above `threshold`."""
    best, classes = outputs.logits.float().softmax(-1).max(-1)
    keep = (classes != outputs.logits.shape[-1] - 1) & (best > threshold)
    for index, (logits, image_size, target_size) in enumerate(_images(outputs, target_sizes)):
        of_image = keep[index]
        if _lacks_masks(logits[of_image]):
            raise ValueError(
                f"Some queries have scores above {threshold} and no masks: call the model with `masks_above` of at "
                "most this threshold."
            )
        yield ImageMasks(
            best[index, of_image], classes[index, of_image], logits[of_image].float(), image_size, target_size
        )


def _images(outputs: Any, target_sizes: Sizes) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int] | None]]:
    """Of each image: mask logits (Q, h, w) without padding, the size of the image, and the wanted size."""
    masks = outputs.pred_masks
    if masks is None:
        raise ValueError("These outputs have no `pred_masks`: a model in training does not compute them.")
    targets = [None] * len(masks) if target_sizes is None else [(int(h), int(w)) for h, w in target_sizes]
    if len(targets) != len(masks):
        raise ValueError(f"There are {len(masks)} images but {len(targets)} target sizes.")
    mask_sizes, image_sizes = getattr(outputs, "mask_sizes", None), getattr(outputs, "image_sizes", None)
    whole = [masks.shape[-2:]] * len(masks)
    of_masks = whole if mask_sizes is None else mask_sizes.tolist()
    of_images = of_masks if image_sizes is None else image_sizes.tolist()
    for logits, (rows, columns), (height, width), target in zip(masks, of_masks, of_images, targets, strict=True):
        yield logits[:, :rows, :columns], (int(height), int(width)), target


def _lacks_masks(logits: Tensor) -> bool:
    """Whether the mask of some query was not computed."""
    return bool((logits <= NO_MASK).flatten(1).all(1).any())


def _resize(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(n, h, w) to (n, *size), bilinear."""
    if size is None or not len(maps):
        return maps.new_zeros((0, *size)) if size else maps
    return functional.interpolate(maps[None].float(), size, mode="bilinear", align_corners=False)[0]


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w) to (..., *size), nearest neighbour by pixel centres, as in PIL."""
    for axis, length in zip((-2, -1), size, strict=True):
        before = maps.shape[axis]
        if before != length:
            steps = torch.arange(length, device=maps.device)
            maps = maps.index_select(axis, (2 * steps + 1) * before // (2 * length))
    return maps
