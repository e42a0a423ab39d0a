"""Splits whose ids, names and records agree with each other."""

from collections import Counter
from dataclasses import replace
from typing import Any

from ..data.records import AnnotatedSplit, ImageRecord, numbered


def with_merged_records(split: AnnotatedSplit, handled: Counter[str]) -> AnnotatedSplit:
    """One record per file, with the objects of all its records."""
    merged: dict[Any, ImageRecord] = {}
    for image in split.images:
        key = image.path if image.read is None else id(image)
        if key not in merged:
            merged[key] = replace(image)
            continue
        handled["image-record-duplicate"] += 1
        known = {(box.category, *box.bbox) for box in merged[key].boxes}
        merged[key].boxes += [box for box in image.boxes if (box.category, *box.bbox) not in known]
    return replace(split, images=list(merged.values()))


def with_unique_names(split: AnnotatedSplit) -> AnnotatedSplit:
    """Categories of the same name merged into the first one."""
    names = list(dict.fromkeys(split.names))
    if len(names) == len(split.names):
        return split
    category_ids = [split.category_ids[split.names.index(name)] for name in names]
    merged = {index: names.index(name) for index, name in enumerate(split.names)}
    images = [
        replace(
            image,
            boxes=[replace(box, category=merged[box.category]) for box in image.boxes if box.category is not None],
        )
        for image in split.images
    ]
    return replace(split, names=names, category_ids=category_ids, images=images)


def with_unique_ids(split: AnnotatedSplit) -> AnnotatedSplit:
    """Annotation ids renumbered if they are not unique numbers."""
    ids = [box.id for image in split.images for box in image.boxes]
    new_ids = numbered(ids)
    if new_ids is ids:
        return split
    numbers = iter(new_ids)
    images = [replace(image, boxes=[replace(box, id=next(numbers)) for box in image.boxes]) for image in split.images]
    return replace(split, images=images)


def without_unlearnable_classes(splits: dict[str, AnnotatedSplit], handled: Counter[str]) -> dict[str, AnnotatedSplit]:
    """The other splits without the boxes of classes that have none in training."""
    train = splits.get("train")
    if train is None:
        return splits
    learned = {
        train.names[box.category]
        for image in train.images
        for box in image.boxes
        if box.category is not None and not box.iscrowd
    }
    if not learned:
        return splits
    found = {"train": train}
    for name, split in splits.items():
        if name == "train":
            continue
        images = []
        for image in split.images:
            boxes = [box for box in image.boxes if box.category is None or split.names[box.category] in learned]
            handled["class-not-in-train"] += len(image.boxes) - len(boxes)
            images.append(replace(image, boxes=boxes))
        found[name] = replace(split, images=images)
    handled += Counter()  # drops zeros
    return found


def with_common_categories(splits: dict[str, AnnotatedSplit]) -> dict[str, AnnotatedSplit]:
    """The same category ids in all splits, if the source has none and the reader numbered the classes of each split."""
    if any(split.category_ids != list(range(len(split.names))) for split in splits.values()):
        return splits
    names = list(dict.fromkeys(name for split in splits.values() for name in split.names))
    return {
        key: replace(split, category_ids=[names.index(name) for name in split.names]) for key, split in splits.items()
    }
