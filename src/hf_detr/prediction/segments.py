"""The masks that `predict.py` writes: panoptic segments, and a mask per object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.mask_results import result_masks
from ..data.masks import encode_masks
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.mask_post_processing import default_threshold

KINDS = ("panoptic", "instance")
Segments = Mapping[str, Any]  # `segmentation` and `segments_info` of an image, as post-processing returns them


@dataclass(frozen=True)
class SegmentOptions:
    """Which masks are computed.

    Args:
        kinds: one or both of `KINDS`. `panoptic`: each pixel to at most one segment, by the paper's rule. `instance`:
            the masks of objects, which may overlap; of classes that are not stuff.
        stuff_ids: class ids of the stuff.
        threshold: of the scores of objects, a number or `"per_class"`, see
            `DetrImageProcessor.post_process_object_detection`.
        panoptic_threshold: of the scores of panoptic segments; None: that of the processor, or the paper's.
    """

    kinds: tuple[str, ...]
    stuff_ids: frozenset[int] = frozenset()
    threshold: float | str = 0.5
    panoptic_threshold: float | None = None

    def lowest(self, processor: DetrImageProcessor) -> float:
        """The score above which masks have to be computed."""
        limits = [self.of_panoptic(processor)] if "panoptic" in self.kinds else []
        if "instance" in self.kinds:
            limits.append(self._of_objects(processor))
        return min(limits)

    def of_panoptic(self, processor: DetrImageProcessor) -> float:
        """The score above which a query becomes a panoptic segment."""
        if self.panoptic_threshold is not None:
            return self.panoptic_threshold
        return default_threshold("paper", processor.panoptic_threshold)

    def of(self, processor: DetrImageProcessor, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The masks of each image by kind, on the CPU.

        Args:
            outputs: of a model with masks; `sizes`: (height, width) of its images in pixels.
        """
        found: list[dict[str, Any]] = [{} for _ in sizes]
        if "panoptic" in self.kinds:
            panoptic = processor.post_process_panoptic_segmentation(
                outputs,
                threshold=self.of_panoptic(processor),
                target_sizes=sizes,
                label_ids_to_fuse=set(self.stuff_ids),
            )
            for of_image, result in zip(found, panoptic, strict=True):
                of_image["panoptic"] = result | {"segmentation": result["segmentation"].cpu()}
        if "instance" in self.kinds:
            limit = self._of_objects(processor)
            instances = processor.post_process_instance_segmentation(
                outputs, threshold=limit, target_sizes=sizes, return_binary_maps=True
            )
            for of_image, result in zip(found, instances, strict=True):
                of_image["instance"] = self._without_stuff(result, processor)
        return found

    def _of_objects(self, processor: DetrImageProcessor) -> float:
        if isinstance(self.threshold, str):
            return min(processor.class_thresholds or [0.0]) - 1e-6  # these have to be reached, not exceeded
        return self.threshold

    def _without_stuff(self, result: Segments, processor: DetrImageProcessor) -> dict[str, Any]:
        limits = processor.class_thresholds if self.threshold == "per_class" else None
        kept = [
            number
            for number, segment in enumerate(result["segments_info"])
            if segment["label_id"] not in self.stuff_ids
            and (limits is None or segment["score"] >= limits[segment["label_id"]])
        ]
        masks: Tensor = result["segmentation"].cpu()
        infos = [result["segments_info"][number] for number in kept]
        return {"segmentation": masks[torch.tensor(kept, dtype=torch.long)], "segments_info": infos}


def segment_rows(segments: Mapping[str, Segments], where: str) -> list[dict[str, Any]]:
    """The segments of an image as shards store them: `kind`, `label_id`, `score`, and `counts` of COCO's run-length
    encoding."""
    return [
        {"kind": kind, "label_id": info["label_id"], "score": info["score"], "counts": counts}
        for kind, result in segments.items()
        for info, counts in zip(
            result["segments_info"],
            encode_masks(result_masks(result["segmentation"], result["segments_info"], where)),
            strict=True,
        )
    ]
