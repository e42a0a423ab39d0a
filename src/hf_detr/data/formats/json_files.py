"""Formats with one JSON file per split: which file is the split's."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from ..dataset_folder import DatasetFolder
from ..records import Orphan
from ..split_names import name_rank, split_of
from .parsing import read_json

logger = logging.get_logger(__name__)

MAX_UNNAMED = 20  # JSON files beside each other that no split is named after; more are one per image, as of labelme
SNIFFED = 1 << 16  # bytes at both ends of a file that show whether it may be of a format


class JsonFile(NamedTuple):
    """The file of a split, its content, and a record of each file of the format that no split reads."""

    file: Path
    content: Any
    unused: list[Orphan]


def find_json(
    folder: DatasetFolder,
    split: str,
    accepts: Callable[[Any], bool],
    name: str,
    *,
    keys: tuple[str, ...],
    refused: Callable[[Any], str | None] = lambda content: None,
) -> JsonFile | None:
    """The JSON file of a split and its content: the one that is named after the split, or lies in a folder that is.
    The only file of the format in a folder, whatever its name, is the split "train". Of names that differ in digits
    only, the last one is taken, which has the latest year, with a warning.

    Args:
        accepts: whether the content is of the format.
        name: of the format, for messages.
        keys: that most files of the format have; others are not reported as unused.
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
        is_named = not rank[0] and rank[1][0] == 0  # after the split and nothing else
        is_expected = is_named or "annotation" in file.stem.lower() or beside[file.parent] == 1
        content = _read(file, keys, is_expected)
        if accepts(content):
            fitting.append((rank, file, content))
        elif wrong is None and is_named and (problem := refused(content)) is not None:
            wrong = file, problem
    if len(fitting) > 1:
        listed = ", ".join(file.name for _, file, _ in fitting)
        logger.warning(f"{folder.path}: {listed} fit the split {split}; the last is taken. --{split} FILE chooses.")
    if fitting:
        _, file, content = fitting[-1]
        known = [path for _, path, _ in fitting]
        others = _unused(folder, known, split, keys)
        return JsonFile(file, content, [("annotation-unused", other.name, f"{file.name} is read") for other in others])
    if wrong is not None:
        raise ValueError(f"{wrong[0]} {wrong[1]}.")
    if split != "train":
        return None
    unnamed = [file for file in folder.of_type(".json") if split_of(file.stem) is None]
    found = [(file, content) for file in unnamed[:MAX_UNNAMED] if accepts(content := _read(file, keys, False))]
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(folder.path)) for file, _ in found[:4])
        raise ValueError(
            f"{folder.path} has several {name} files, and none is named after a split: {names}. Rename them, for "
            "example to train.json and val.json, or name them with --train FILE --val FILE."
        )
    return JsonFile(*found[0], []) if found else None


def _read(file: Path, keys: tuple[str, ...], is_expected: bool) -> Any:
    """The content of a file, or None if it cannot be read and is neither expected nor looks like one of the format: a
    log or settings, with comments or one record per line.

    Raises:
        ValueError: it cannot be read, and is one of the two.
    """
    try:
        return read_json(file)
    except ValueError:
        if is_expected or _looks_like(file, keys):
            raise
        return None


def _unused(folder: DatasetFolder, taken: list[Path], split: str, keys: tuple[str, ...]) -> list[Path]:
    """Files beside the ones that fit the split which look like files of the format, and are named after the same split,
    or after none. The latter are reported with the training split only."""
    beside = [path for path in folder.of_type(".json") if path.parent == taken[0].parent and path not in taken]
    of_splits = (None, "train") if split == "train" else (split,)
    candidates = [path for path in beside if split_of(path.stem) in of_splits]
    return [path for path in candidates[:MAX_UNNAMED] if _looks_like(path, keys)]


def _looks_like(file: Path, keys: tuple[str, ...]) -> bool:
    with open(file, "rb") as opened:
        start = opened.read(SNIFFED)
        opened.seek(max(0, file.stat().st_size - SNIFFED))
        text = start + opened.read()
    return sum(f'"{key}"'.encode() in text for key in keys) >= 2


def _rank(folder: DatasetFolder, file: Path, split: str) -> tuple[Any, ...] | None:
    """A sort key, best first, of how a file is named after the split; None if it is not. Its first value is whether
    only the file's folder is named after the split."""
    by_name = name_rank(file.stem, split)
    if by_name is not None:
        depth = len(file.relative_to(folder.path).parts)
        return False, by_name, "instances" not in file.stem.lower(), depth
    if split_of(file.stem) is not None:
        return None
    for depth, part in enumerate(reversed(file.relative_to(folder.path).parts[:-1])):
        by_folder = name_rank(part, split)
        if by_folder is not None:
            return True, by_folder, "annotations" not in file.stem.lower(), depth
    return None
