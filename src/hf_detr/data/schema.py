"""The schema of all datasets, whatever their format: a `datasets.Dataset` with these columns.

| column | |
|---|---|
| `image` | the image, opened when it is read, EXIF orientation applied |
| `image_id` | int, unique in its split |
| `file_name` | as in the annotations |
| `width`, `height` | in pixels, of the image as shown (EXIF orientation applied) |
| `objects` | lists of equal length, one entry per object, see below |

`objects`: `id` int, `bbox` [x_min, y_min, width, height] in pixels, `category` class id in [0, N), `area` in pixels,
`iscrowd` 0 or 1.

The class names are in the features; the category ids of the source, if it has any, are in the dataset's info.
"""

import json
from collections import Counter
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, IterableDataset, List, Value
from transformers.utils import logging

logger = logging.get_logger(__name__)
DetectionDataset: TypeAlias = Dataset | IterableDataset


def detection_features(names: list[str]) -> Features:
    """The features of a dataset with these classes."""
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


def detection_info(names: list[str], category_ids: list[int], source: str) -> DatasetInfo:
    """The features, and in the description, which every copy and subset inherits, the source and its category ids."""
    return DatasetInfo(
        features=detection_features(names),
        description=json.dumps({"source": source, "category_ids": category_ids}),
    )


def id2label(dataset: DetectionDataset) -> dict[int, str]:
    """Class names by class id."""
    names: list[str] = dataset.features["objects"]["category"].feature.names
    return dict(enumerate(names))


def category_ids(dataset: DetectionDataset) -> dict[int, int]:
    """Category ids of the source by class id; 0 ... N-1 if the source has only names."""
    return dict(enumerate(_description(dataset).get("category_ids") or range(len(id2label(dataset)))))


def source_of(dataset: DetectionDataset) -> str:
    """The annotation file or folder the dataset was read from."""
    return str(_description(dataset).get("source", "a dataset"))


def _description(dataset: DetectionDataset) -> dict[str, Any]:
    try:
        content = json.loads(dataset.info.description)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def split_off_validation(dataset: Dataset, fraction: float, seed: int) -> DatasetDict:
    """Split off a random validation split: "train" and "test" of `train_test_split`.

    Raises:
        ValueError: there are less than two images.
    """
    if len(dataset) < 2:
        raise ValueError(f"{source_of(dataset)} has {len(dataset)} images, too few to split off a validation split.")
    logger.warning_once(
        f"{source_of(dataset)} has no validation split: {fraction:.0%} of its images are split off with seed {seed}."
    )
    return dataset.train_test_split(test_size=fraction, seed=seed)


def unique_names(names: list[str]) -> list[str]:
    """Append the class id to repeated names: the published COCO checkpoints have eleven classes "N/A"."""
    seen: Counter[str] = Counter()
    result = []
    for index, name in enumerate(names):
        result.append(f"{name} ({index})" if seen[name] else name)
        seen[name] += 1
    return result
