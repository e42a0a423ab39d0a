"""From the records of a split to rows of the schema."""

import json
import math
from typing import Any, NamedTuple

from .masks import mask_areas
from .records import AnnotatedSplit, BoxRecord, ImageRecord
from .schema import unique_names


class Classes(NamedTuple):
    """Names and category ids by class id, and the class id of each class of the source."""

    names: list[str]
    category_ids: list[Any]
    class_ids: dict[int, int]

    def stuff_of(self, source: AnnotatedSplit) -> list[str]:
        """The names of the classes that are stuff."""
        return [self.names[self.class_ids[i]] for i, name in enumerate(source.names) if name in source.stuff]


def match_classes(source: AnnotatedSplit, id2label: dict[int, str] | None, train_classes: list[str]) -> Classes:
    """The classes of a model or of the training split, and where the classes of the source are among them. Classes are
    matched by name; categories of a source without names, whose numbers are no names of the model, by class id.

    Args:
        id2label: class names of a model by class id; None takes `train_classes`, then all others of the source.

    Raises:
        ValueError: the source has a class that `id2label` has not, or two that it cannot tell apart.
    """
    if id2label is None:
        given = [*train_classes, *(name for name in source.names if name not in train_classes)]
    else:
        given = [id2label[index] for index in sorted(id2label)]
    unknown = [name for name in source.names if name not in given]
    if unknown and id2label is not None and not source.has_names:
        return _match_by_id(source, id2label)
    if unknown:
        raise ValueError(f"{source.file} has a category {unknown[0]!r}, which is none of the classes {given[:20]}.")
    if given == source.names:
        return Classes(unique_names(given), source.category_ids, {index: index for index in range(len(given))})
    class_ids = {index: given.index(name) for index, name in enumerate(source.names)}
    if not source.has_category_ids and source.category_ids == list(range(len(source.names))):  # so they may change
        return Classes(unique_names(given), list(range(len(given))), class_ids)
    # classes that the source does not have get unused ids
    ids = {class_ids[index]: category_id for index, category_id in enumerate(source.category_ids)}
    unused = iter(i for i in range(len(given) + len(source.names) + 1) if i not in source.category_ids)
    return Classes(unique_names(given), [ids[i] if i in ids else next(unused) for i in range(len(given))], class_ids)


def _match_by_id(source: AnnotatedSplit, id2label: dict[int, str]) -> Classes:
    """The classes of a model for a source whose categories are only numbers."""
    unknown = [number for number in source.category_ids if number not in id2label]
    if unknown:
        raise ValueError(
            f"{source.file} has a category {unknown[0]}, which is none of the classes {list(id2label.items())[:20]}."
        )
    names = [id2label[class_id] for class_id in sorted(id2label)]
    positions = {class_id: position for position, class_id in enumerate(sorted(id2label))}
    class_ids = {index: positions[number] for index, number in enumerate(source.category_ids)}
    return Classes(unique_names(names), sorted(id2label), class_ids)


def reinterpret(source: AnnotatedSplit, bbox_format: str | None, crowds_as_objects: bool) -> None:
    """Take boxes and flags as the user says they are meant, in place; see `load_detection_dataset`."""
    if bbox_format == "xyxy":
        corners_to_sizes(source)
    if crowds_as_objects:
        take_crowds_as_objects(source)


def corners_to_sizes(source: AnnotatedSplit) -> None:
    """Boxes stored as [x_min, y_min, x_max, y_max] to [x_min, y_min, width, height], in place."""
    for image in source.images:
        for box in image.boxes:
            try:
                x, y, right, bottom = (float(value) for value in box.bbox)
            except (TypeError, ValueError):
                continue  # reported by the checks
            box.bbox = [x, y, right - x, bottom - y]


def take_crowds_as_objects(source: AnnotatedSplit) -> None:
    """Unset `iscrowd` of all boxes, in place."""
    for image in source.images:
        for box in image.boxes:
            box.iscrowd = 0


def to_row(
    image: ImageRecord, image_id: int, class_ids: dict[int, int], box_ids: list[int], with_masks: bool = False
) -> dict[str, Any]:
    """A row of the schema from a record whose boxes, and masks if they are wanted, are valid.

    Args:
        class_ids: class id of the row by class id of the source.
        box_ids: of the objects.
    """
    boxes = [(box, [float(value) for value in box.bbox]) for box in image.boxes]
    width, height = image.size
    masks = {"mask": [box.mask for box in image.boxes]} if with_masks else {}
    place = {} if image.place is None else dict(zip(("shard", "shard_row"), image.place, strict=True))
    return {
        "image": str(image.path.resolve()),
        "image_id": image_id,
        "source_id": json.dumps(image.source_id),
        "file_name": image.file_name,
        "width": width,
        "height": height,
        "objects": {
            "id": box_ids,
            "bbox": [bbox for _, bbox in boxes],
            "category": [class_ids[box.category] for box, _ in boxes if box.category is not None],
            "area": [_area(box, bbox, (height, width)) for box, bbox in boxes],
            "iscrowd": [box.iscrowd for box, _ in boxes],
            **masks,
        },
        **place,
    }


def _area(box: BoxRecord, bbox: list[float], size: tuple[int, int]) -> float:
    """The recorded area. If it is missing or not a finite number, that of the mask, or else of the box."""
    try:
        found = float(box.area)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if math.isfinite(found):
        return found
    return bbox[2] * bbox[3] if box.mask is None else float(mask_areas([box.mask], size)[0])
