"""Which split a file or folder belongs to, by its name."""

import re

# the names under which a split is found, the most usual first; any other split goes by its own name only
SPLIT_NAMES = {
    "train": ("train", "training", "trainval", "default"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def split_names(split: str) -> tuple[str, ...]:
    """The names under which this split is found, in any spelling of upper and lower case."""
    return SPLIT_NAMES.get(split, (split.lower(),))


def name_rank(name: str, split: str) -> int | None:
    """How well the name of a file or folder, such as `instances_Train2017`, names a split: 0 for the most usual of
    `split_names`; None if it does not name it. `train_val` names the training split."""
    words = _words(name)
    found = [number for number, alias in enumerate(split_names(split)) if alias in words or alias == name.lower()]
    if not found:
        return None
    others = {split_of_word(word) for word in words} - {None, split}
    if others and not (split == "train" and others == {"val"}):
        return None
    return found[0]


def split_of(name: str) -> str | None:
    """The one of train, val and test that a file or folder is named after, if any."""
    return next((split for split in SPLIT_NAMES if name_rank(name, split) is not None), None)


def split_of_word(word: str) -> str | None:
    """The one of train, val and test that this word stands for, if any."""
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def _words(name: str) -> list[str]:
    """The parts of a name between digits, underscores, hyphens and dots, in lower case."""
    return re.findall(r"[^\W\d_]+", name.lower())
