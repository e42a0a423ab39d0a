"""The model of any checkpoint, with masks or without, and any detector of transformers beside ours."""

from pathlib import Path
from typing import Any

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.pretrained import LOCATION, read_stored_config
from ..model.segmentation import DetrForSegmentation
from .other_detectors import is_other, load_other


def has_masks(source: str | Path, **location: Any) -> bool:
    """Whether a checkpoint, ours or transformers', is of a model with masks, by the class that its `config.json` names;
    of a PEFT adapter, that of its base model.

    Args:
        location: as of `from_pretrained`, such as `revision`.
    """
    stored = read_stored_config(source, location, required=False) or {}
    return DetrForSegmentation.__name__ in (stored.get("architectures") or ())


def load_model(source: str | Path, **kwargs: Any) -> Any:
    """The model of a checkpoint: [`DetrForSegmentation`] if it has masks, otherwise [`DetrForDetection`]. Arguments,
    result and errors are those of their `from_pretrained`."""
    location = {name: kwargs[name] for name in LOCATION if name in kwargs}
    kind = DetrForSegmentation if has_masks(source, **location) else DetrForDetection
    return kind.from_pretrained(source, **kwargs)


def load_detector(source: str | Path, **location: Any) -> tuple[Any, DetrImageProcessor]:
    """Model and image processor of a checkpoint, to measure it or to predict: [`load_model`], or, of a detector of
    transformers with another architecture, an [`~hf_detr.interop.other_detectors.OtherDetector`].

    Args:
        location: as of `from_pretrained`, such as `revision`.
    """
    if is_other(source, **location):
        return load_other(source, **location)
    return load_model(source, **location), DetrImageProcessor.from_pretrained(source, **location)
