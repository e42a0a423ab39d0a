"""Where annotated splits come from: an annotated folder, or a dataset of Hugging Face `datasets`."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from .dataset_folder import DatasetFolder
from .formats import describe_layouts, files_elsewhere, find_annotations
from .records import AnnotatedSplit, read_headers

# wraps an iterator, of known length or not, to show a progress bar
Progress = Callable[[Iterable[Any], int | None], Iterable[Any]]


class SplitSource(Protocol):
    """What the loader and the dataset check need to know of a source.

    Attributes:
        name: for messages.
        max_invalid: fraction of the boxes that may be invalid and are dropped with a warning.
        streamed: images stay where they are, and rows name their place.
    """

    name: str
    max_invalid: float

    @property
    def streamed(self) -> bool: ...

    def state(self) -> str:
        """Changes whenever the content does."""

    def has(self, split: str) -> bool:
        """Whether there is such a split."""

    def find(self, split: str, progress: Progress) -> AnnotatedSplit | None:
        """The records of a split with the headers of its images, or None if there is no such split."""

    def images(self, split: str) -> Dataset | None:
        """The column `image` of a split, if its images are not files that the records name."""

    def describe_missing(self, split: str) -> str:
        """A sentence for a split that is not there."""


class FolderSource:
    """An annotated folder.

    Args:
        masks: the masks are wanted, so that panoptic annotations come before those without stuff.
    """

    max_invalid = 0.001  # COCO itself has two invalid boxes
    streamed = False

    def __init__(self, folder: DatasetFolder, masks: bool = False) -> None:
        self.folder = folder
        self.masks = masks
        self.name = str(folder.path)

    def state(self) -> str:
        given = {split: str(file.resolve()) for split, file in self.folder.files_given.items()}
        images = self.folder.images_given
        places = [str(self.folder.path.resolve()), given, None if images is None else str(images.resolve())]
        return json.dumps([*places, self.masks, self.folder.state(files_elsewhere(self.folder))])

    def has(self, split: str) -> bool:
        return find_annotations(self.folder, split, masks=self.masks) is not None

    def find(self, split: str, progress: Progress) -> AnnotatedSplit | None:
        found = find_annotations(self.folder, split, masks=self.masks)
        if found is not None:
            read_headers(found.images, lambda headers: progress(headers, len(found.images)))
        return found

    def images(self, split: str) -> Dataset | None:
        return None

    def describe_missing(self, split: str) -> str:
        if not self.folder.is_searched:
            given = ", ".join(str(file) for file in self.folder.files_given.values())
            return f'No split "{split}": only {given} was named. Name its annotations with --{split}.'
        packed = [path.name for path in Path(self.name).iterdir() if path.suffix.lower() in (".zip", ".tar", ".tgz")]
        archive = f"{self.name} holds the archive {packed[0]}: unpack it. " if packed else ""
        return (
            f'No split "{split}" in {self.name}. {archive}Annotations in other places can be named with --train FILE '
            f"--val FILE --images FOLDER. Looked for:{describe_layouts(split)}"
        )
