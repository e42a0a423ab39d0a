"""Formats with one annotation file per image: which files are a split's, and which image a file is about."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..dataset_folder import DatasetFolder, path_parts
from ..records import Orphan
from ..split_names import name_rank, split_of


def match_image(
    folder: DatasetFolder, file: Path, name: str, split: str, places: Sequence[Path], stems: set[str]
) -> tuple[Path, str | None]:
    """The image of an annotation file, and a sentence if its own name and the name in it disagree.

    The image that is called like the annotation file wins: the name inside goes stale when images are renamed. The name
    inside is taken if there is no such image, unless another annotation file is called like that one.

    Args:
        name: of the image, as the file has it; may be empty.
        places: where images usually are, the likeliest first.
        stems: names of all annotation files without their suffix.
    """
    own = folder.find_stem(file.stem, split, places)
    parts = path_parts(name)
    stem = Path(parts[-1]).stem if parts else file.stem
    if stem.casefold() == file.stem.casefold():
        exact = folder.find_image(name, split, places) if name else None
        return exact or own or _missing(places, file, parts), None
    named = folder.find_image(name, split, places)
    if own is not None:
        return own, f"{file.name} names {name!r}, another image; {own.name} is taken, which is called like the file"
    if named is not None and stem not in stems:
        return named, f"{file.name} names {name!r}; there is no image called like the file"
    return _missing(places, file, parts), None


def _missing(places: Sequence[Path], file: Path, parts: list[str]) -> Path:
    """Where the image should be, for the message that it is not there."""
    suffix = Path(parts[-1]).suffix if parts else ""
    return (list(places) or [file.parent])[0] / f"{file.stem}{suffix or '.jpg'}"


def files_of_split(folder: DatasetFolder, files: Sequence[Path], split: str) -> tuple[list[Path], list[Orphan]]:
    """The annotation files that are in a folder named after the split. If no folder is named after a split, all files
    are the split "train".

    Returns:
        the files, and, for "train", a record of each folder beside those of splits whose files are not used.
    """
    parts = {file: file.relative_to(folder.path).parts[:-1] for file in files}
    named = [file for file, names in parts.items() if any(name_rank(name, split) is not None for name in names)]
    others = [file for file, names in parts.items() if not any(split_of(name) for name in names)]
    if split != "train":
        return sorted(named), []
    if len(others) == len(files):
        return sorted(files), []
    unused = Counter(str(file.parent) for file in others)
    return sorted(named), [
        ("annotation-unused", place, f"{count} files are in no folder of a split, as others are")
        for place, count in unused.items()
    ]
