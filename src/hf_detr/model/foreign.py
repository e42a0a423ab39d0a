"""Access to the installed hf_detr package, for what the model files need from it but do not carry.

The files in this folder travel with every pushed checkpoint. The readers of other projects' checkpoints and the writer
of model cards stay in the package and are imported when they are first needed. Where hf_detr is not installed, a model
repository still loads, trains and saves its own checkpoints.
"""

import importlib
from typing import Any


def import_interop(source: str) -> Any:
    """Import `hf_detr.interop`, the readers of other projects' checkpoints.

    Args:
        source: what is about to be read, e.g. `'a "detr" checkpoint'`. It is named in the error.

    Raises:
        ValueError: hf_detr is not installed.
    """
    interop = _import_installed("hf_detr.interop")
    if interop is None:
        raise ValueError(
            f"This model repository reads only hf_detr checkpoints; `pip install hf_detr` to read {source}."
        )
    return interop


def import_hub() -> Any:
    """Import `hf_detr.hub`, the writer of model cards; None where hf_detr is not installed."""
    return _import_installed("hf_detr.hub")


def import_visualization() -> Any:
    """Import `hf_detr.visualization`.

    Raises:
        ImportError: hf_detr is not installed.
    """
    visualization = _import_installed("hf_detr.visualization")
    if visualization is None:
        raise ImportError("This needs hf_detr: pip install hf_detr")
    return visualization


def _import_installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "hf_detr":  # a dependency of hf_detr is missing
            raise
        return None
