"""Images that a page offers to start with."""

from pathlib import Path

import numpy as np

from ..data.image_files import image_files
from ..data.shapes import CLASSES, draw_shapes_image
from .viewer import Viewer

MAX_EXAMPLES = 12
DRAWN = 4


def example_images(viewer: Viewer, source: Path | None, folder: Path) -> list[Path]:
    """The first images of a folder, or an image file. Without a source, images are drawn for a model of the embedded
    data set, and there are none for others.

    Args:
        source: an image or a folder, searched recursively.
        folder: of the drawn images.

    Raises:
        ValueError: the source has no image.
    """
    if source is not None:
        found = [source] if source.is_file() else image_files(source)[:MAX_EXAMPLES]
        if not found:
            raise ValueError(f"{source} has no images.")
        return found
    if set(viewer.names.values()) != set(CLASSES):
        return []
    files = [folder / f"shapes-{number}.png" for number in range(1, DRAWN + 1)]
    for number, file in enumerate(files, start=1):
        draw_shapes_image(np.random.default_rng([7, number]))[0].save(file)
    return files
