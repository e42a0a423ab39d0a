"""The schema of all datasets, whatever their format: a `datasets.Dataset` with these columns.

| column | |
|---|---|
| `image` | the image, opened when it is read, EXIF orientation applied |
| `image_id` | int, unique in its split: the source's if all of its ids are such numbers, otherwise counted from 1 |
| `source_id` | optional: the source's id as JSON, a number of any size or text; see [`source_id`] |
| `file_name` | as in the annotations |
| `width`, `height` | in pixels, of the image as shown (EXIF orientation applied) |
| `shard`, `shard_row` | in place of `image`, where the images stay in shards; see [`StreamedDataset`] |
| `objects` | lists of equal length, one entry per object, see below |

`objects`: `id` int, `bbox` [x_min, y_min, width, height] in pixels, `category` class id in [0, N), `area` in pixels,
`iscrowd` 0 or 1. Of a dataset that was loaded with masks also `mask`: the `counts` of COCO's compressed run-length
encoding of the object's pixels, in an image of the row's height and width; `masks.decode_masks` reads it.

The class names are in the features; the category ids of the source, if it has any, and the classes that are stuff are
in the dataset's info.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, IterableDataset, List, Value

DetectionDataset: TypeAlias = Dataset | IterableDataset


def detection_features(names: list[str]) -> Features:
    """The features of a dataset with these classes, without the optional ones."""
    return Features(
        {
            "image": Image(),
            "image_id": Value("int64"),
            "file_name": Value("string"),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": {
                "id": List(Value("int64")),
                "bbox": List(List(Value("float64"), length=4)),
                "category": List(ClassLabel(names=names)),
                "area": List(Value("float64")),
                "iscrowd": List(Value("int8")),
            },
        }
    )


def loaded_features(names: list[str], masks: bool = False, streamed: bool = False) -> Features:
    """The features of a dataset that was loaded, with the optional ones. Streamed ones have no images, but places."""
    features = detection_features(names)
    objects = features["objects"] | ({"mask": List(Value("string"))} if masks else {})
    if streamed:
        del features["image"]
        features |= {"shard": Value("int32"), "shard_row": Value("int64")}
    return Features({**features, "objects": objects, "source_id": Value("string")})


def detection_info(names: list[str], category_ids: list[Any], source: str) -> DatasetInfo:
    """The features, and in the description, which every copy and subset inherits, the source and its category ids."""
    return DatasetInfo(
        features=detection_features(names),
        description=describe_source(category_ids, source),
    )


def describe_source(category_ids: list[Any], source: str, stuff: Sequence[str] = ()) -> str:
    """The description of a dataset's info."""
    content = {"source": source, "category_ids": category_ids}
    return json.dumps(content | ({"stuff": list(stuff)} if stuff else {}))


def id2label(dataset: DetectionDataset) -> dict[int, str]:
    """Class names by class id."""
    names: list[str] = dataset.features["objects"]["category"].feature.names
    return dict(enumerate(names))


def source_id(row: Mapping[str, Any]) -> int | str:
    """The id that an image has in the source: a number of any size, or text."""
    found: int | str = json.loads(row["source_id"]) if row.get("source_id") is not None else row["image_id"]
    return found


def learned_objects(objects: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The `objects` of a row without crowds, which are not learned."""
    kept = [index for index, crowd in enumerate(objects["iscrowd"]) if not crowd]
    return {name: [values[index] for index in kept] for name, values in objects.items()}


def require_objects(dataset: Any, source: str, verb: str) -> None:
    """Refuse images of which none has an object.

    Args:
        source: where they are from, for the message.
        verb: what cannot be done with them, such as "learned" or "measured".

    Raises:
        ValueError: there is none.
    """
    if not any(learned_objects(objects)["bbox"] for objects in dataset["objects"]):
        raise ValueError(
            f"{source}: none of the {len(dataset)} images has an object (crowds do not count), so nothing can be "
            f"{verb}. check_dataset.py shows what was read."
        )


def category_ids(dataset: DetectionDataset) -> dict[int, Any]:
    """Category ids of the source by class id; 0 ... N-1 if the source has only names."""
    return dict(enumerate(_description(dataset).get("category_ids") or range(len(id2label(dataset)))))


def stuff_labels(dataset: DetectionDataset) -> list[str]:
    """The names of the classes that are stuff: regions without instances, such as sky (`DetrConfig.stuff_labels`)."""
    return [str(name) for name in _description(dataset).get("stuff", [])]


def set_stuff_labels(dataset: DetectionDataset, names: Sequence[str]) -> None:
    """Let these classes of a dataset be stuff, in place."""
    described = _description(dataset)
    dataset.info.description = describe_source(list(category_ids(dataset).values()), described["source"], names)


def has_masks(dataset: DetectionDataset) -> bool:
    """Whether the objects have masks."""
    return "mask" in dataset.features["objects"]


def source_of(dataset: DetectionDataset) -> str:
    """The annotation file or folder the dataset was read from."""
    return str(_description(dataset).get("source", "a dataset"))


def _description(dataset: DetectionDataset) -> dict[str, Any]:
    try:
        content = json.loads(dataset.info.description)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def unique_names(names: list[str]) -> list[str]:
    """Append the class id to repeated names: the published COCO checkpoints have eleven classes "N/A"."""
    seen: Counter[str] = Counter()
    result = []
    for index, name in enumerate(names):
        result.append(f"{name} ({index})" if seen[name] else name)
        seen[name] += 1
    return result
