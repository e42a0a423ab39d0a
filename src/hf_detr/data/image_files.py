"""Files below a folder, without what operating systems and editors leave there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL.Image

IMAGE_SUFFIXES = frozenset(PIL.Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".ps", ".eps"}
LITTER = frozenset({"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"})


def is_litter(name: str) -> bool:
    """Whether a file or folder is no content: hidden (`.ipynb_checkpoints`, macOS' `._1.jpg`), or one of `LITTER`."""
    return name.startswith(".") or name.lower() in LITTER


def walk_files(folder: Path, on_unreadable: Callable[[Path], None] = lambda folder: None) -> Iterator[Path]:
    """All files below a folder but litter, symbolic links followed, each folder once.

    Args:
        on_unreadable: called with each folder that cannot be listed.
    """
    visited: set[Path] = set()

    def report(error: OSError) -> None:
        on_unreadable(Path(error.filename))

    for root, subfolders, names in os.walk(folder, onerror=report, followlinks=True):
        current = Path(root)
        real = current.resolve()
        if real in visited:  # a circular link
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not is_litter(name)]
        yield from (current / name for name in names if not is_litter(name))


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted."""
    return sorted(path for path in walk_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
