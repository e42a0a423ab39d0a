"""The model of any checkpoint, with masks or without."""

from pathlib import Path
from typing import Any

from ..model.modeling_hf_detr import DetrForDetection
from ..model.pretrained import LOCATION, read_stored_config
from ..model.segmentation import DetrForSegmentation


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
