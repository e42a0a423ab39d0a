"""Writing COCO folders."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from tqdm.auto import tqdm

from ..runtime.files import atomic_write
from .dataset_folder import path_parts
from .schema import category_ids, id2label, source_id


def export_coco(dataset: Dataset, folder: str | Path, split: str, *, progress: bool = True) -> Path:
    """Write `folder/annotations/instances_SPLIT.json`, and the unchanged image files into `folder/SPLIT`.

    Images and categories have the ids of the source. Loading the result gives the same rows.

    Returns:
        the annotation file.

    Raises:
        FileExistsError: the annotation file already exists.
    """
    ids = category_ids(dataset)
    names = {ids[index]: name for index, name in id2label(dataset).items()}
    rows = dataset.cast_column("image", Image(decode=False))
    bar = tqdm(rows, desc=f"Writing {split}", disable=not progress, leave=False)
    return write_coco(Path(folder), split, names, ((_record(row, ids), _writer(row["image"])) for row in bar))


def _record(row: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    objects = row["objects"]
    columns = zip(*(objects[key] for key in ("id", "category", "bbox", "area", "iscrowd")), strict=True)
    return row | {
        "image_id": source_id(row),
        "objects": [
            {"id": i, "category_id": ids[category], "bbox": bbox, "area": area, "iscrowd": crowd}
            for i, category, bbox, area, crowd in columns
        ],
    }


def _writer(image: dict[str, Any]) -> Callable[[Path], Any]:
    if image["bytes"] is not None:
        return lambda target: target.write_bytes(image["bytes"])
    return lambda target: shutil.copyfile(image["path"], target)


def write_coco(
    folder: Path, split: str, categories: dict[Any, str], rows: Iterable[tuple[dict[str, Any], Callable[[Path], Any]]]
) -> Path:
    """Write a split. The annotation file is written last, when all images are complete.

    Args:
        categories: names by category id.
        rows: per image its record, with `image_id`, `file_name`, `width`, `height` and COCO records as `objects`, and a
            function that writes the image file to a path.

    Raises:
        FileExistsError: the annotation file already exists.
    """
    target = folder / "annotations" / f"instances_{split}.json"
    if target.exists():
        raise FileExistsError(f"{target} already exists. Choose another folder.")
    images, annotations = [], []
    used: set[str] = set()
    for number, (record, write) in enumerate(rows, start=1):
        parts = path_parts(record["file_name"])
        name = "/".join(parts)
        if name in used or name != record["file_name"]:  # keep files within the folder, and names that all systems have
            name = f"{number}-{parts[-1]}"
        used.add(name)
        path = folder / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        images.append(
            {"id": record["image_id"], "file_name": name, "width": record["width"], "height": record["height"]}
        )
        annotations += [{"image_id": record["image_id"]} | entry for entry in record["objects"]]
    content = {
        "categories": [{"id": category_id, "name": name} for category_id, name in categories.items()],
        "images": images,
        "annotations": annotations,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        json.dump(content, file)
    return target
