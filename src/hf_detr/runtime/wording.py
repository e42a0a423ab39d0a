"""Sentences that stay short, and where to read on."""

from collections.abc import Iterable


def listed(items: Iterable[object], limit: int = 10) -> str:
    """`a, b, c and 497 more`: at most `limit` items."""
    texts = [str(item) for item in items]
    left = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {left} more" if left > 0 else "")


def more_about(symptom: str) -> str:
    """Where a message points to: a section of docs/troubleshooting.md, by its anchor, which the command prints."""
    return f"More: hf-detr troubleshoot {symptom}"


def shortened(value: object, limit: int = 100) -> str:
    """The repr of a value, cut in the middle beyond `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"
