"""What the readers of all formats have in common."""

from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8; names the file.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def integer_id(given: Any, number: int) -> int:
    """The id if it is an integer, as COCO tools require; otherwise the running number."""
    return given if isinstance(given, int) and not isinstance(given, bool) else number


def recorded_size(width: Any, height: Any) -> tuple[int, int] | None:
    """(width, height) in pixels, from numbers or their text; None if they are missing or not numbers."""
    try:
        return int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        return None
