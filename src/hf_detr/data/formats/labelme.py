"""Reading labelme's JSON: one file per image, with polygons, rectangles and circles."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ...model.annotations import canonical_id
from ..dataset_folder import DatasetFolder
from ..image_files import walk_files
from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, Orphan
from .parsing import box_of_points, image_places, read_json, recorded_size, relative_ids
from .per_image import files_of_split, match_image

SHAPES_WITHOUT_BOX = ("point", "points", "line", "linestrip")
PROBED_FILES = 3  # of a folder, which show whether its JSON files are labelme's


def find_labelme(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """labelme's files in a folder named after the split; without such folders, all of them are the split "train"."""
    files = folder.of_type(".json", depth=9)
    by_folder = {file.parent: file for file in files}
    if not any(_is_labelme(file) for file in [*files[:PROBED_FILES], *by_folder.values()]):
        return None
    own, unused = files_of_split(folder, files, split)
    if not own:
        return None
    result = _read_labelme(folder, own, split)
    result.orphans += unused
    return result


def read_labelme_files(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A folder of labelme's files that the user named."""
    files = sorted(path for path in walk_files(file) if path.suffix.lower() == ".json") if file.is_dir() else []
    return _read_labelme(folder, files, split) if any(map(_is_labelme, files[:PROBED_FILES])) else None


def _is_labelme(file: Path) -> bool:
    try:
        content = read_json(file)
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def _read_labelme(folder: DatasetFolder, files: list[Path], split: str) -> AnnotatedSplit:
    """Files that are valid JSON but not labelme's are skipped, since class lists and settings lie beside them."""
    contents: list[tuple[Path, dict[str, Any]]] = []
    orphans: list[Orphan] = []
    for file in files:
        try:
            content = read_json(file)
        except ValueError as error:
            is_of_image = file.stem.casefold() in folder.image_stems
            orphans.append(("annotation-unreadable" if is_of_image else "annotation-unused", file.name, str(error)))
            continue
        if isinstance(content, dict) and isinstance(content.get("shapes"), list):
            contents.append((file, content))
    shapes = [shape for _, content in contents for shape in content["shapes"] if isinstance(shape, dict)]
    names = sorted({str(shape["label"]) for shape in shapes if shape.get("label")})
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    stems = {file.stem for file, _ in contents}
    images: list[ImageRecord] = []
    number = 0
    ids = relative_ids([file for file, _ in contents])
    for image_id, (file, content) in zip(ids, contents, strict=True):
        places = image_places(folder, file.parent, *dict.fromkeys((split, file.parent.name)))
        path, problem = match_image(folder, file, str(content.get("imagePath") or ""), split, places, stems)
        size = recorded_size(content.get("imageWidth"), content.get("imageHeight"))
        image = ImageRecord(path, path.name, image_id, f"image {path.name} ({image_id}.json)", size)
        if problem:
            orphans.append(("image-name-stale", image.record, problem))
        for position, shape in enumerate(content["shapes"], start=1):
            number += 1
            kind = shape.get("shape_type") if isinstance(shape, dict) else None
            if kind in SHAPES_WITHOUT_BOX:
                orphans.append(("annotation-unused", f"{file.name} shape {position}", f"a {kind} has no box"))
                continue
            image.boxes.append(_box(shape, f"{file.name} shape {position}", number, class_ids))
        images.append(image)
    place = files[0].parent
    image_folder = images[0].path.parent if images else place
    return AnnotatedSplit("labelme", split, place, names, list(range(len(names))), images, image_folder, orphans)


def _box(shape: Any, record: str, number: int, class_ids: dict[str, int]) -> BoxRecord:
    if not isinstance(shape, dict):
        return BoxRecord(record, shape, None, number, problem="a shape must be a JSON object")
    name, points = shape.get("label"), shape.get("points")
    is_outline = shape.get("shape_type", "polygon") == "polygon"
    problem: str | None = None
    bbox: Any
    try:
        if shape.get("shape_type") == "circle":
            (x, y), (edge_x, edge_y) = points or []  # the centre, and a point on the circle
            radius = math.hypot(edge_x - x, edge_y - y)
            bbox = [x - radius, y - radius, 2 * radius, 2 * radius]
        else:
            bbox = box_of_points(points)
    except (ValueError, TypeError) as error:
        problem, bbox = f"points: {error}", points
    category = class_ids.get(str(name)) if name else None
    return BoxRecord(
        record,
        bbox,
        category,
        number,
        problem=problem,
        category_name=canonical_id(name),
        segmentation=[np.ravel(points or []).tolist()] if is_outline and problem is None else None,
    )


LABELME = AnnotationFormat(
    "labelme", "one JSON file per image, in {split}/ or beside the images", find_labelme, read_labelme_files
)
