"""Formats with one JSON file per split: which file is the split's."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..dataset_folder import DatasetFolder
from ..split_names import name_rank, split_of
from .parsing import read_json

logger = logging.get_logger(__name__)

MAX_UNNAMED = 20  # JSON files beside each other that no split is named after; more are one per image, as of labelme


def find_json(
    folder: DatasetFolder,
    split: str,
    accepts: Callable[[Any], bool],
    name: str,
    *,
    refused: Callable[[Any], str | None] = lambda content: None,
) -> tuple[Path, Any] | None:
    """The JSON file of a split and its content: the one that is named after the split, or lies in a folder that is.
    The only file of the format in a folder, whatever its name, is the split "train". Where several fit equally well,
    the last one by name is taken, which has the latest year, with a warning.

    Args:
        accepts: whether the content is of the format.
        name: of the format, for messages.
        refused: why the content of a file that is named after the split is not of the format, if it looks like it.

    Raises:
        ValueError: such a file is not of the format, or several are and none is named after a split.
    """
    candidates = sorted((rank, file) for file in folder.of_type(".json") if (rank := _rank(folder, file, split)))
    beside = Counter(file.parent for rank, file in candidates if rank[0])
    wrong: tuple[Path, str] | None = None
    fitting: list[tuple[tuple[Any, ...], Path, Any]] = []
    for rank, file in candidates:
        if (fitting and rank != fitting[0][0]) or (rank[0] and beside[file.parent] > MAX_UNNAMED):
            continue
        content = read_json(file)
        if accepts(content):
            fitting.append((rank, file, content))
        elif wrong is None and not rank[0] and (problem := refused(content)) is not None:
            wrong = file, problem
    if len(fitting) > 1:
        listed = ", ".join(file.name for _, file, _ in fitting)
        logger.warning(f"{folder.path}: {listed} fit the split {split}; the last is taken. --{split} FILE chooses.")
    if fitting:
        return fitting[-1][1:]
    if wrong is not None:
        raise ValueError(f"{wrong[0]} {wrong[1]}.")
    if split != "train":
        return None
    unnamed = [file for file in folder.of_type(".json") if split_of(file.stem) is None]
    found = [(file, content) for file in unnamed[:MAX_UNNAMED] if accepts(content := read_json(file))]
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(folder.path)) for file, _ in found[:4])
        raise ValueError(
            f"{folder.path} has several {name} files, and none is named after a split: {names}. Rename them, for "
            "example to train.json and val.json, or name them with --train FILE --val FILE."
        )
    return found[0] if found else None


def _rank(folder: DatasetFolder, file: Path, split: str) -> tuple[Any, ...] | None:
    """A sort key, best first, of how a file is named after the split; None if it is not. Its first value is whether
    only the file's folder is named after the split."""
    by_name = name_rank(file.stem, split)
    if by_name is not None:
        depth = len(file.relative_to(folder.path).parts)
        return False, "instances" not in file.stem.lower(), by_name, depth
    if split_of(file.stem) is not None:
        return None
    for depth, part in enumerate(reversed(file.relative_to(folder.path).parts[:-1])):
        by_folder = name_rank(part, split)
        if by_folder is not None:
            return True, "annotations" not in file.stem.lower(), by_folder, depth
    return None
