"""The file that describes a YOLO dataset: the classes, and where its splits are."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..dataset_folder import DESCRIPTIONS, DatasetFolder
from ..split_names import SPLIT_NAMES, split_names
from .parsing import read_text
from .yolo_labels import looks_like_labels

CLASS_LISTS = ("classes.txt", "obj.names", "classes.names", "labels.txt", "names.txt")


@dataclass
class YoloDescription:
    """The file that names the classes, and what it says of the splits.

    Attributes:
        names: by the class number of the labels.
        entries: by the split's name as it is written, folders and lists of images.
        root: the folder that they are relative to, if the file names one.
        names_splits: whether the file names splits; otherwise they are looked for.
    """

    file: Path
    names: dict[int, str]
    entries: dict[str, list[str]] = field(default_factory=dict)
    root: str = ""
    names_splits: bool = True
    has_keypoints: bool = False

    def entries_of(self, split: str) -> list[str]:
        named = {name.lower(): entries for name, entries in self.entries.items() if entries}
        return next((named[name] for name in split_names(split) if name in named), [])


def describe_yolo(folder: DatasetFolder) -> YoloDescription | None:
    """The first description of a folder, nearest to its top.

    Raises:
        ValueError: it cannot be understood; names the file.
    """
    named = folder.description
    for file in folder.of_type(*DESCRIPTIONS, depth=2) if named is None else [named]:
        if named is None and not _may_describe(file):
            continue
        description = read_description(file, folder)
        if description is not None:
            return description
    lists = _class_lists(folder)
    if lists and any(looks_like_labels(file) for file in _possible_labels(folder)[:20]):
        return YoloDescription(lists[0], dict(enumerate(_lines(lists[0]))), names_splits=False)
    if named is not None:
        raise ValueError(f"{named} has no names of classes.")
    return None


def _may_describe(file: Path) -> bool:
    """Whether a file has a line that begins with `names`; others are settings of other programs."""
    try:
        return re.search(r"^\s*[\"']?names[\"']?\s*[:=]", read_text(file), re.MULTILINE) is not None
    except ValueError:
        return False


def _possible_labels(folder: DatasetFolder) -> list[Path]:
    return [
        file
        for file in folder.of_type(".txt", depth=9)
        if file.name.lower() not in CLASS_LISTS and file.stem.casefold() in folder.image_stems
    ]


def read_description(file: Path, folder: DatasetFolder) -> YoloDescription | None:
    return _read_darknet(file, folder) if file.suffix.lower() == ".data" else _read_yaml(file)


def _read_yaml(file: Path) -> YoloDescription | None:
    try:
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)  # all values stay text: "on" is no boolean
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or "names" not in content:
        return None
    splits = {name: value for name, value in content.items() if any(name in known for known in known_names())}
    entries = {name: value if isinstance(value, list) else [value] for name, value in splits.items() if value}
    for name, values in entries.items():
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{file}: {name} must be a path or a list of paths, got {content[name]}.")
    names = _names(file, content)
    return YoloDescription(file, names, entries, str(content.get("path") or ""), bool(entries), "kpt_shape" in content)


def known_names() -> tuple[tuple[str, ...], ...]:
    return tuple(split_names(split) for split in SPLIT_NAMES)


def _names(file: Path, content: dict[str, Any]) -> dict[int, str]:
    """Class names by number.

    Raises:
        ValueError: `names` is neither a list nor numbered, or `nc` contradicts it.
    """
    given = content["names"]
    if isinstance(given, dict):
        try:
            names = {int(number): name for number, name in given.items()}
        except ValueError:
            raise ValueError(f"{file}: the keys of names must be class numbers, got {list(given)[:5]}.") from None
    elif isinstance(given, list):
        names = dict(enumerate(given))
    else:
        raise ValueError(f"{file}: names must be a list such as [nut, bolt], or numbered names, got {given!r}.")
    if not names or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"{file}: names must be a list of class names, got {given}.")
    count = content.get("nc")
    if count and str(count) != str(len(names)):
        raise ValueError(f"{file}: nc is {count}, but names has {len(names)} classes. Correct one of them.")
    return names


def _read_darknet(file: Path, folder: DatasetFolder) -> YoloDescription | None:
    """`obj.data`: lines such as `train = data/train.txt`, with the classes in the file that it calls `names`."""
    pairs = (line.split("=", 1) for line in read_text(file).splitlines() if "=" in line and not line.startswith("#"))
    content = {key.strip().lower(): value.strip() for key, value in pairs}
    if "names" not in content:
        return None
    names = folder.find_place(content["names"], [file.parent, folder.path])
    if names is None:
        raise ValueError(f"{file} names {content['names']} for the classes, which does not exist.")
    entries = {name: [content[name]] for known in known_names() for name in known if content.get(name)}
    return YoloDescription(file, dict(enumerate(_lines(names))), entries)


def with_nearest_class_list(
    folder: DatasetFolder, description: YoloDescription, label_files: list[Path]
) -> YoloDescription:
    """The description with the class list that is nearest to the labels, in their folder or above; labelImg writes one
    into each folder.

    Raises:
        ValueError: the labels have several class lists that differ.
    """
    lists = {file.parent: file for file in reversed(_class_lists(folder))}
    places = {file.parent for file in label_files}
    nearest = {next((lists[above] for above in (place, *place.parents) if above in lists), None) for place in places}
    found = {file: _lines(file) for file in sorted(file for file in nearest if file is not None)}
    if len({tuple(lines) for lines in found.values()}) > 1:
        raise ValueError(
            f"The class lists {', '.join(map(str, found))} differ. Make them equal, or load one folder each."
        )
    if not found:
        return description
    file, lines = next(iter(found.items()))
    return replace(description, file=file, names=dict(enumerate(lines)))


def _class_lists(folder: DatasetFolder) -> list[Path]:
    return [file for file in folder.of_type(".txt", ".names", depth=4) if file.name.lower() in CLASS_LISTS]


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]
