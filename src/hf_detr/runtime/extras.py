"""Packages that are installed by choice."""

import importlib
from typing import Any


def import_extra(package: str, extra: str) -> Any:
    """A package that an extra of ours installs. Called before a long job, so that nothing is lost for want of it.

    Raises:
        ImportError: it is not installed, or broken; says which extra has it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = "" if isinstance(error, ModuleNotFoundError) and error.name == package else f" ({error})"
        raise ImportError(f'This needs {package}: pip install "hf_detr[{extra}]"{reason}') from error
