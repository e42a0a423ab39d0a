"""Conversion to and from `supervision.Detections`, for supervision's annotators, trackers and zones."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..runtime.extras import import_extra
from .draw import CORNERS


def to_supervision(detections: Iterable[Mapping[str, Any]], label2id: Mapping[str, int]) -> Any:
    """Detections of `pipeline("object-detection")`, or `AttentionMaps.detections`, as `supervision.Detections`. Class
    names are in `data["class_name"]`, which supervision's annotators use as captions.

    Args:
        detections: each with `label`, `score` and `box`, corners in pixels.
        label2id: of the model: `model.config.label2id`.

    Raises:
        ValueError: a label is not in `label2id`.
        ImportError: supervision is not installed.
    """
    supervision = import_extra("supervision", "visualization")
    detections = list(detections)
    unknown = {detection["label"] for detection in detections} - set(label2id)
    if unknown:
        raise ValueError(f"`label2id` has no class {min(unknown)!r}. Pass that of the model that predicted.")
    if not detections:
        return supervision.Detections.empty()
    return supervision.Detections(
        xyxy=np.array([[float(d["box"][key]) for key in CORNERS] for d in detections], dtype=np.float32),
        confidence=np.array([float(d["score"]) for d in detections], dtype=np.float32),
        class_id=np.array([label2id[d["label"]] for d in detections], dtype=int),
        data={"class_name": np.array([d["label"] for d in detections])},
    )


def from_supervision(detections: Any, id2label: Mapping[int, str]) -> list[dict[str, Any]]:
    """`supervision.Detections` in the form of `pipeline("object-detection")`, with corners that are not rounded.

    Args:
        id2label: of the model: `model.config.id2label`.

    Raises:
        ValueError: the detections have no scores or no classes, or a class is not in `id2label`.
    """
    if len(detections) == 0:
        return []
    if detections.confidence is None or detections.class_id is None:
        raise ValueError("The detections need both scores (`confidence`) and classes (`class_id`).")
    unknown = set(detections.class_id.tolist()) - set(id2label)
    if unknown:
        raise ValueError(f"`id2label` has no class {min(unknown)}. Pass that of the model that predicted.")
    return [
        {"score": float(score), "label": id2label[int(label)], "box": dict(zip(CORNERS, box.tolist(), strict=True))}
        for box, score, label in zip(detections.xyxy, detections.confidence, detections.class_id, strict=True)
    ]
