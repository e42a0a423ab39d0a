"""Reading COCO JSON."""

import json
from pathlib import Path
from typing import Any

from .source import Box, Photo, Source, read_text


def find_coco(path: Path, split: str, names: tuple[str, ...]) -> Source | None:
    if path.is_file():
        is_it = path.suffix == ".json" and split == "train"
        return read_coco(path, path.parent, split) if is_it else None
    for name in names:
        for file in sorted((path / "annotations").glob(f"instances_{name}*.json")):
            images = file.stem.removeprefix("instances_")
            places = (path / images, path / "images" / images, path / name, path / "images" / name, path / "images")
            return read_coco(file, next((place for place in places if place.is_dir()), path), split)
        beside = path / name / "_annotations.coco.json"
        if beside.is_file():
            return read_coco(beside, beside.parent, split)
        alone = path / f"{name}.json"
        if alone.is_file():
            return read_coco(alone, next((d for d in (path / name, path / "images") if d.is_dir()), path), split)
    files = [f for f in path.glob("*.json") if f.name.endswith("coco.json") or f.stem == "annotations"]
    if split == "train" and len(files) == 1:
        return read_coco(files[0], path / "images" if (path / "images").is_dir() else path, split)
    return None


def read_coco(file: Path, image_folder: Path, split: str) -> Source:
    """COCO JSON. Category ids, whatever they are, become 0 ... N-1 in their order. A category without boxes that others
    name as their parent, as Roboflow writes one, is no class."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{file} is not COCO: it lacks {sorted(missing)}.")
    stray: list[tuple[str, str, str]] = []
    used = {record.get("category_id") for record in content["annotations"]}
    parents = {category.get("supercategory") for category in content["categories"]} - {"none"}
    categories = [c for c in content["categories"] if c.get("id") in used or c.get("name") not in parents]
    categories.sort(key=lambda category: category["id"])
    class_of = {category["id"]: index for index, category in enumerate(categories)}
    photos: dict[Any, Photo] = {}
    for number, record in enumerate(content["images"]):
        name = str(record.get("file_name", ""))
        where = f"image {record.get('id')} ({name})"
        if not name or not isinstance(record.get("id"), int):
            stray.append(("image-record", f"image number {number}", "needs an integer id and a file_name"))
        elif record["id"] in photos:
            stray.append(("image-id-twice", where, f"has the id of {photos[record['id']].file_name}"))
        else:
            size = (record.get("width"), record.get("height"))
            known = all(isinstance(side, (int, float)) for side in size)
            photos[record["id"]] = Photo(
                image_folder / name, name, record["id"], where, (int(size[0]), int(size[1])) if known else None
            )
    ids: set[Any] = set()
    for number, record in enumerate(content["annotations"]):
        where = f"annotation {record.get('id', f'number {number}')}"
        photo = photos.get(record.get("image_id"))
        if record.get("id") in ids:
            stray.append(("annotation-id-twice", where, "another annotation has this id"))
        ids.add(record.get("id"))
        if photo is None:
            stray.append(("annotation-without-image", where, f"there is no image {record.get('image_id')}"))
            continue
        category = class_of.get(record.get("category_id"))
        area = record.get("area")
        photo.boxes.append(
            Box(
                where,
                record.get("bbox"),
                category,
                record["id"] if isinstance(record.get("id"), int) else number,
                float(area) if isinstance(area, (int, float)) else None,
                int(bool(record.get("iscrowd", 0))),
                category_name=record.get("category_id"),
            )
        )
    return Source(
        "COCO",
        split,
        file,
        [str(category["name"]) for category in categories],
        [int(category["id"]) for category in categories],
        list(photos.values()),
        image_folder,
        stray,
    )
