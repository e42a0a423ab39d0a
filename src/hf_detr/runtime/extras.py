"""Optional packages, which extras of this package install."""

import importlib
from typing import Any


def import_extra(package: str, extra: str) -> Any:
    """Import an optional package. Call it before a long job, so that a missing package does not waste the job's work.

    Raises:
        ImportError: the package is not installed or cannot be imported; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = "" if isinstance(error, ModuleNotFoundError) and error.name == package else f" ({error})"
        raise ImportError(f'This needs {package}: pip install "hf_detr[{extra}]"{reason}') from error
