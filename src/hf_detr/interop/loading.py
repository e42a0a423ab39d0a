"""The model of any checkpoint, with masks or without."""

from pathlib import Path
from typing import Any

from ..model.configuration_hf_detr import DetrConfig
from ..model.modeling_hf_detr import DetrForDetection
from ..model.segmentation import DetrForSegmentation


def has_masks(source: str | Path, **location: Any) -> bool:
    """Whether a checkpoint, ours or transformers', is of a model with masks, by the class that its `config.json` names.

    Args:
        location: as of `from_pretrained`, such as `revision`.
    """
    stored, _ = DetrConfig.get_config_dict(source, **location)
    return DetrForSegmentation.__name__ in (stored.get("architectures") or ())


def load_model(source: str | Path, **kwargs: Any) -> Any:
    """The model of a checkpoint: [`DetrForSegmentation`] if it has masks, otherwise [`DetrForDetection`]. Arguments,
    result and errors are those of their `from_pretrained`."""
    location = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
    kind = DetrForSegmentation if has_masks(source, **location) else DetrForDetection
    return kind.from_pretrained(source, **kwargs)
