"""Mask AP and panoptic quality of a model over a data set with masks, in one process or several."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .coco_evaluator import CocoEvaluator
from .coco_metrics import MAX_DETECTIONS
from .panoptic_metrics import panoptic_metrics, refuse_overlaps

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset
    from ..model.image_processing_hf_detr import DetrImageProcessor


class MaskEvaluator(CocoEvaluator):
    """Collects the masks of objects batch by batch and computes COCO's numbers from them: mask AP.

    It keeps a run-length encoding, a label and a score per detection, and reads no images. `detections()` are COCO
    results with `segmentation`, as pycocotools reads them.

    Args:
        dataset: loaded with masks. Every image counts, also one without an `update`.

    Raises:
        ValueError: the data set has no masks.
    """

    place = "segmentation"

    def __init__(self, dataset: "DetectionDataset") -> None:
        from ..data.masks import to_coco_rle
        from ..data.schema import has_masks

        if not has_masks(dataset):
            raise ValueError("The data set has no masks to measure against: load it with masks=True.")
        super().__init__(dataset)
        self._sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        rows = dataset.select_columns("objects").with_format(None)
        masks = (counts for row in rows for counts in row["objects"]["mask"])
        sizes = (self._sizes[record["image_id"]] for record in self.annotations)
        for record, counts, size in zip(self.annotations, masks, sizes, strict=True):
            record["segmentation"] = to_coco_rle(counts, size)

    def post_process(self, processor: "DetrImageProcessor", outputs: Any, sizes: Tensor) -> list[dict[str, Any]]:
        return processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )

    def _read(self, key: Any, result: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Reads results of `post_process_instance_segmentation` and `post_process_panoptic_segmentation`, and stored
        ones: `counts` of run-length encodings, `labels` and `scores`."""
        from ..data.mask_results import result_masks
        from ..data.masks import encode_masks, to_coco_rle

        if "counts" in result:
            stored = np.empty(len(result["counts"]), dtype=object)
            stored[:] = [to_coco_rle(text, self._sizes[key]) for text in result["counts"]]
            return stored, np.array(result["labels"], dtype=np.int64), np.array(result["scores"], dtype=np.float64)
        segments, size = result["segments_info"], self._sizes[key]
        counts = encode_masks(result_masks(result["segmentation"], segments, f"Image {key}", size))
        places = np.empty(len(counts), dtype=object)
        places[:] = [to_coco_rle(text, size) for text in counts]
        labels = np.array([segment["label_id"] for segment in segments], dtype=np.int64)
        return places, labels, np.array([segment.get("score", 1.0) for segment in segments], dtype=np.float64)


class PanopticEvaluator(MaskEvaluator):
    """Collects segments batch by batch and computes panoptic quality: PQ, SQ and RQ of all classes, things and stuff.

    Args:
        dataset: loaded with masks that do not overlap.

    Raises:
        ValueError: the data set has no masks, or some overlap.
    """

    def __init__(self, dataset: "DetectionDataset") -> None:
        super().__init__(dataset)
        refuse_overlaps("Annotation", self.annotations)

    def post_process(self, processor: "DetrImageProcessor", outputs: Any, sizes: Tensor) -> list[dict[str, Any]]:
        return processor.post_process_panoptic_segmentation(
            outputs, target_sizes=sizes, label_ids_to_fuse=self.stuff_ids
        )

    def compute(self, max_detections: int = MAX_DETECTIONS) -> dict[str, Any]:
        """The result of `panoptic_metrics`, with its errors; all segments count."""
        return panoptic_metrics(self.images, self.annotations, self.predictions(), self.id2label, self.stuff_labels)
