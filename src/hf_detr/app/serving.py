"""Serves the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.extras import import_extra
from .viewer import MAX_THRESHOLD, MIN_SCORE, Viewer


def serve_page(
    viewer: Viewer,
    examples: Sequence[Path] = (),
    corrections: Path | None = None,
    threshold: float = 0.5,
    **launch: Any,
) -> Any:
    """Serve the page until the program is interrupted.

    Args:
        viewer: the model.
        examples: image files to choose from; the first one is shown at the start.
        corrections: folder of a COCO data set that corrected images are saved into; None: each visitor has one of their
            own, to download.
        threshold: of the scores, at the start.
        launch: of `gradio.Blocks.launch`, such as `server_port` or `share`; `prevent_thread_lock=True` returns at once.

    Returns:
        the `gradio.Blocks`, which has `local_url` and `close()`.

    Raises:
        ImportError: Gradio or its annotation component is not installed.
        ValueError: the threshold is not on the page's scale.
        OSError: the port is in use.
    """
    if not MIN_SCORE <= threshold <= MAX_THRESHOLD:
        raise ValueError(f"The threshold must be between {MIN_SCORE} and {MAX_THRESHOLD}, got {threshold}.")
    import_extra("gradio", "app")
    import_extra("gradio_image_annotation", "app")
    from .page import Page

    return Page(viewer, examples, corrections, threshold).serve(**launch)
