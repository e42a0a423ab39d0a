"""Which split a file or folder belongs to, by its name."""

import re

# the names under which a split is found, the most usual first; any other split goes by its own name only
SPLIT_NAMES = {
    "train": ("train", "training", "trainval", "default"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# words beside the name of a split that say what the file or folder holds, not which part of the data
NEUTRAL_WORDS = frozenset(
    ["annotation", "annotations", "autosplit", "coco", "data", "dataset", "image", "images", "img", "imgs", "instances",
     "json", "label", "labels", "list", "obj", "set", "split", "subset"]
)  # fmt: skip


def split_names(split: str) -> tuple[str, ...]:
    """The names under which this split is found, in any spelling of upper and lower case."""
    return SPLIT_NAMES.get(split, (split.lower(),))


def name_rank(name: str, split: str) -> tuple[int, int] | None:
    """How well the name of a file or folder, such as `instances_Train2017`, names a split, the smaller the better: the
    number of words that say something else (`train_old` has one), and the place of its name for the split among
    `split_names`. None if it does not name the split. `train_val` names the training split."""
    words = _words(name)
    found = [number for number, alias in enumerate(split_names(split)) if alias in words or alias == name.lower()]
    if not found:
        return None
    others = {split_of_word(word) for word in words} - {None, split}
    if others and not (split == "train" and others == {"val"}):
        return None
    further = [word for word in words if word not in NEUTRAL_WORDS and split_of_word(word) is None]
    return (0 if name.lower() in split_names(split) else len(further)), found[0]


def split_of(name: str) -> str | None:
    """The one of train, val and test that a file or folder is named after, if any."""
    return next((split for split in SPLIT_NAMES if name_rank(name, split) is not None), None)


def split_of_folder(name: str) -> str | None:
    """The same for a folder whose name says nothing else: `test` and `test2017`, but not `test_rig`."""
    split = split_of(name)
    rank = None if split is None else name_rank(name, split)
    return split if rank is not None and rank[0] == 0 else None


def split_of_word(word: str) -> str | None:
    """The one of train, val and test that this word stands for, if any."""
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def _words(name: str) -> list[str]:
    """The parts of a name between digits, underscores, hyphens and dots, in lower case."""
    return re.findall(r"[^\W\d_]+", name.lower())
