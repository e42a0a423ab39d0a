"""Any model that predicts, in the form that is fastest."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..export import is_exported, load_exported
from ..interop import OtherDetector, load_detector
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..speed import prepare_for_inference


def open_model(
    source: str | Path, dtype: torch.dtype | str | None = None, *, revision: str | None = None
) -> tuple[Any, DetrImageProcessor]:
    """A model in the form that predicts fastest, and its image processor.

    Args:
        source: a checkpoint (a folder or a Hub id), a folder written by `examples/export.py`, or a detector of
            transformers of another architecture.
        dtype: of the computation; None: that of the weights, or of the export.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError, ValueError: there is none, or it cannot compute in this dtype.
    """
    if is_exported(source):
        return load_exported(source, dtype), DetrImageProcessor.from_pretrained(source)
    model, processor = load_detector(source, **({} if revision is None else {"revision": revision}))
    if isinstance(model, OtherDetector):
        return model.prepared(dtype), processor
    return prepare_for_inference(model, dtype), processor


def state_of_source(source: str | Path) -> str:
    """What tells that the files of a local model have changed: their names, sizes and times. Empty for a Hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return ""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
