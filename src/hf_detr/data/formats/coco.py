"""Reading COCO JSON."""

import json
from pathlib import Path
from typing import Any

from ..source import Box, Photo, Source, read_text


def find_coco(path: Path, split: str, names: tuple[str, ...]) -> Source | None:
    if path.is_file():
        return read_coco(path, path.parent, split) if path.suffix == ".json" and split == "train" else None
    for name in names:
        for file in sorted((path / "annotations").glob(f"instances_{name}*.json")):
            return read_coco(file, path, split)
        for file in (path / name / "_annotations.coco.json", path / f"{name}.json"):
            if file.is_file():
                return read_coco(file, path, split)
    if split == "train":  # a folder with one COCO file, whatever its name
        files = sorted((*path.glob("*.json"), *(path / "annotations").glob("*.json")))
        if len(files) == 1 and _looks_like_coco(files[0]):
            return read_coco(files[0], path, split)
    return None


def _looks_like_coco(file: Path) -> bool:
    try:
        content = json.loads(read_text(file))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content)


def _image_folder(file: Path, folder: Path, split: str, content: dict[str, Any]) -> Path:
    """Where the images lie: the first place that has the first image whose file is somewhere."""
    stem = file.stem.removeprefix("instances_")
    near = [
        base / place
        for base in (folder, folder.parent)
        for place in (stem, split, f"images/{stem}", f"images/{split}", "images", "")
    ]
    places = [place for place in (file.parent, *near) if place.is_dir()]
    for record in content["images"][:20]:
        for place in places:
            if record.get("file_name") and (place / str(record["file_name"])).is_file():
                return place
    return next((place for place in near[:5] if place.is_dir()), folder)


def read_coco(file: Path, folder: Path, split: str) -> Source:
    """COCO JSON. Category ids, whatever they are, become 0 ... N-1 in their order. A category without boxes that others
    name as their parent, as Roboflow writes one, is no class."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{file} is not COCO: it lacks {sorted(missing)}.")
    image_folder = _image_folder(file, folder, split, content)
    stray: list[tuple[str, str, str]] = []
    lacking = [c for c in content["categories"] if not isinstance(c.get("id"), int) or not c.get("name")]
    if lacking:
        raise ValueError(f"{file}: each category needs an integer id and a name, unlike {lacking[0]}.")
    used = {record.get("category_id") for record in content["annotations"]}
    parents = {c.get("supercategory") for c in content["categories"] if c.get("supercategory") != c["name"]} - {"none"}
    categories = [c for c in content["categories"] if c.get("id") in used or c.get("name") not in parents]
    categories.sort(key=lambda category: category["id"])
    class_of = {category["id"]: index for index, category in enumerate(categories)}
    photos: dict[Any, Photo] = {}
    ambiguous: set[int] = set()
    for number, record in enumerate(content["images"]):
        name = str(record.get("file_name", ""))
        where = f"image {record.get('id')} ({name})"
        if not name or record.get("id") is None:
            stray.append(("image-record", f"image number {number}", "needs an id and a file_name"))
        elif record["id"] in photos:
            stray.append(("image-id-twice", where, f"has the id of {photos[record['id']].file_name}"))
            ambiguous.add(photos[record["id"]].id)
        else:
            width, height = record.get("width"), record.get("height")
            known = isinstance(width, (int, float)) and isinstance(height, (int, float))
            size = (int(width), int(height)) if known else None
            photos[record["id"]] = Photo(image_folder / name, name, own_id(record["id"], number), where, size)
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
                own_id(record.get("id"), number),
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
        ambiguous,
    )


def own_id(given: Any, number: int) -> int:
    """An id that is a number, as COCO's tools need; the running number for any other."""
    return given if isinstance(given, int) and not isinstance(given, bool) else number
