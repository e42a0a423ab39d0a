"""The one form all data sets take, whatever format they come from: a `datasets.Dataset` with these columns.

| column | |
|---|---|
| `image` | the image, opened when it is read, turned as its EXIF orientation says |
| `image_id` | int, unique in its split |
| `file_name` | as the annotations call it |
| `width`, `height` | in pixels, of the image as shown (EXIF orientation applied) |
| `objects` | lists of equal length, an entry an object, see below |

`objects`: `id` int, `bbox` [x_min, y_min, width, height] in pixels, `category` class id 0 ... N-1, `area` in pixels,
`iscrowd` 0 or 1.

Names of the classes are in the features; the category ids of the source, where it has some, in the data set's info.
"""

import json
from collections import Counter
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, IterableDataset, List, Value
from transformers.utils import logging

logger = logging.get_logger(__name__)
DetectionDataset: TypeAlias = Dataset | IterableDataset


def detection_features(names: list[str]) -> Features:
    """The features of a data set with these classes."""
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
    """Features, and in the description, which travels with every copy and subset, where the data came from."""
    return DatasetInfo(
        features=detection_features(names),
        description=json.dumps({"source": source, "category_ids": category_ids}),
    )


def id2label(dataset: DetectionDataset) -> dict[int, str]:
    """Class id to name."""
    names: list[str] = dataset.features["objects"]["category"].feature.names
    return dict(enumerate(names))


def category_ids(dataset: DetectionDataset) -> dict[int, int]:
    """Class id to the category id of the source; 0 ... N-1 again where the source has names only."""
    return dict(enumerate(_about(dataset).get("category_ids") or range(len(id2label(dataset)))))


def source_of(dataset: DetectionDataset) -> str:
    """The annotation file or folder the data set was read from."""
    return str(_about(dataset).get("source", "a data set"))


def _about(dataset: DetectionDataset) -> dict[str, Any]:
    try:
        about = json.loads(dataset.info.description)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def set_apart(dataset: Dataset, share: float, seed: int) -> DatasetDict:
    """Set a validation split apart: "train" and "test" of `train_test_split`."""
    if len(dataset) < 2:
        raise ValueError(f"{source_of(dataset)} has {len(dataset)} images; too few to set some apart for validation.")
    logger.warning_once(
        f"{source_of(dataset)} has no validation split: {share:.0%} of its images are set apart by seed {seed}."
    )
    return dataset.train_test_split(test_size=share, seed=seed)


def unique_names(names: list[str]) -> list[str]:
    """Names that occur before get their number: the published COCO checkpoints have eleven classes "N/A"."""
    seen: Counter[str] = Counter()
    result = []
    for index, name in enumerate(names):
        result.append(f"{name} ({index})" if seen[name] else name)
        seen[name] += 1
    return result
