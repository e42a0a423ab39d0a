"""Writing COCO folders."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from tqdm.auto import tqdm

from ..runtime.files import atomic_write
from .dataset_folder import path_parts
from .masks import to_coco_rle
from .schema import category_ids, id2label, source_id, stuff_labels

Writer = Callable[[Path], Any]  # writes an image file to a path


def export_coco(dataset: Dataset, folder: str | Path, split: str, *, progress: bool = True) -> Path:
    """Write `folder/annotations/instances_SPLIT.json`, and the unchanged image files into `folder/SPLIT`.

    Images and categories have the ids of the source; masks are run-length encodings. Loading the result gives the same
    rows.

    Returns:
        the annotation file.

    Raises:
        FileExistsError: the annotation file already exists.
    """
    ids = category_ids(dataset)
    names = {ids[index]: name for index, name in id2label(dataset).items()}
    rows = ((_record(row, ids), _writer(row["image"])) for row in _rows(dataset, split, progress))
    return write_coco(Path(folder), split, names, rows, stuff_labels(dataset))


def copy_images(
    dataset: Dataset, folder: Path, split: str, *, progress: bool = True
) -> Iterator[tuple[dict[str, Any], str]]:
    """Copy the image files into `folder/SPLIT`, and yield each row with the name of its file there."""
    images = ((row, _writer(row["image"])) for row in _rows(dataset, split, progress))
    return _copied(folder / split, images)


def _rows(dataset: Dataset, split: str, progress: bool) -> Iterable[dict[str, Any]]:
    rows = dataset.cast_column("image", Image(decode=False))
    bar: Iterable[dict[str, Any]] = tqdm(rows, desc=f"Writing {split}", disable=not progress, leave=False)
    return bar


def _record(row: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    objects, size = row["objects"], (row["height"], row["width"])
    columns = zip(*(objects[key] for key in ("id", "category", "bbox", "area", "iscrowd")), strict=True)
    records: list[dict[str, Any]] = [
        {"id": i, "category_id": ids[category], "bbox": bbox, "area": area, "iscrowd": crowd}
        for i, category, bbox, area, crowd in columns
    ]
    for record, counts in zip(records, objects.get("mask") or (), strict=False):
        record["segmentation"] = to_coco_rle(counts, size)
    return row | {"image_id": source_id(row), "objects": records}


def _writer(image: dict[str, Any]) -> Writer:
    if image["bytes"] is not None:
        return lambda target: target.write_bytes(image["bytes"])
    return lambda target: shutil.copyfile(image["path"], target)


def write_coco(
    folder: Path,
    split: str,
    categories: dict[Any, str],
    rows: Iterable[tuple[dict[str, Any], Writer]],
    stuff: Sequence[str] = (),
) -> Path:
    """Write a split. The annotation file is written last, when all images are complete.

    Args:
        categories: names by category id.
        rows: per image its record, with `image_id`, `file_name`, `width`, `height` and COCO records as `objects`, and a
            function that writes the image file to a path.
        stuff: names of the categories that are stuff; with some, all categories have `isthing`.

    Raises:
        FileExistsError: the annotation file already exists.
    """
    target = folder / "annotations" / f"instances_{split}.json"
    if target.exists():
        raise FileExistsError(f"{target} already exists. Choose another folder.")
    images, annotations = [], []
    for record, name in _copied(folder / split, rows):
        images.append(
            {"id": record["image_id"], "file_name": name, "width": record["width"], "height": record["height"]}
        )
        annotations += [{"image_id": record["image_id"]} | entry for entry in record["objects"]]
    kinds = {name: {"isthing": int(name not in stuff)} if stuff else {} for name in categories.values()}
    content = {
        "categories": [{"id": category_id, "name": name} | kinds[name] for category_id, name in categories.items()],
        "images": images,
        "annotations": annotations,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        json.dump(content, file)
    return target


def _copied(place: Path, rows: Iterable[tuple[dict[str, Any], Writer]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Write the image files, and yield each record with the name of its file in the folder `place`."""
    used: set[str] = set()
    for number, (record, write) in enumerate(rows, start=1):
        parts = path_parts(record["file_name"])
        name = "/".join(parts)
        if name in used or name != record["file_name"]:  # keep files within the folder, and names that all systems have
            name = f"{number}-{parts[-1]}"
        used.add(name)
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        yield record, name
