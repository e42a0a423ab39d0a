"""Reading the JSON of the VGG Image Annotator (VIA), a project or its export of regions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..dataset_folder import DatasetFolder
from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, Orphan
from .json_files import find_json
from .parsing import box_of_points, image_places, locate_images, read_json

# attributes of a region that hold its class, where it has several
CLASS_ATTRIBUTES = ("label", "class", "name", "category", "type", "object", "classname", "class_name")


def find_via(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """A file that is named after the split, or lies in a folder that is; the only one is the split "train"."""
    keys = ("regions", "shape_attributes", "region_attributes")
    found = find_json(folder, split, lambda content: _entries(content) is not None, "VIA", keys=keys)
    if found is None:
        return None
    result = _read_via(folder, found.file, split, found.content)
    result.orphans += found.unused
    return result


def read_via_file(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A file that the user named."""
    content = read_json(file) if file.suffix.lower() == ".json" else None
    return None if _entries(content) is None else _read_via(folder, file, split, content)


def _entries(content: Any) -> list[dict[str, Any]] | None:
    """One entry per image, or None if the content is not VIA's."""
    if isinstance(content, dict) and "_via_img_metadata" in content:
        content = content["_via_img_metadata"]
    if not isinstance(content, dict) or not content:
        return None
    entries = list(content.values())
    fits = all(isinstance(entry, dict) and {"filename", "regions"} <= set(entry) for entry in entries)
    return entries if fits else None


def _read_via(folder: DatasetFolder, file: Path, split: str, content: Any) -> AnnotatedSplit:
    entries = _entries(content) or []
    listed = [(entry, _regions(entry)) for entry in entries]
    attribute = _class_attribute(file, [region for _, regions in listed for region in regions])
    names = sorted({name for _, regions in listed for r in regions if (name := _name(r, attribute)) is not None})
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    places = image_places(folder, file.parent, *dict.fromkeys((split, file.parent.name)))
    images: list[ImageRecord] = []
    orphans: list[Orphan] = []
    number = 0
    names_of_files = [str(entry["filename"] or "") for entry in entries]
    paths = locate_images(folder, names_of_files, split, places)
    for index, (path, name, (_, regions)) in enumerate(zip(paths, names_of_files, listed, strict=True)):
        if not name:
            orphans.append(("image-record-incomplete", f"image number {index}", "needs a filename"))
            continue
        image = ImageRecord(path, name, index, f"image {name}")
        for position, region in enumerate(regions, start=1):
            number += 1
            if (shape := _shape_without_box(region)) is not None:
                orphans.append(("annotation-unused", f"{image.record}, region {position}", f"a {shape} has no box"))
                continue
            image.boxes.append(_box(region, f"region {position}", number, attribute, class_ids))
        images.append(image)
    image_folder = images[0].path.parent if images else file.parent
    return AnnotatedSplit("VIA", split, file, names, list(range(len(names))), images, image_folder, orphans)


def _regions(entry: Mapping[str, Any]) -> list[Any]:
    """The regions, a list or, in VIA 1, a dict with their numbers."""
    regions = entry["regions"] or []
    return list(regions.values()) if isinstance(regions, dict) else list(regions)


def _attributes(region: Any) -> dict[str, Any]:
    found = region.get("region_attributes") if isinstance(region, dict) else None
    return found if isinstance(found, dict) else {}


def _class_attribute(file: Path, regions: list[Any]) -> str:
    """The attribute that holds the class.

    Raises:
        ValueError: there are several, and none has a usual name.
    """
    found = sorted({name for region in regions for name in _attributes(region)})
    usual = [name for candidate in CLASS_ATTRIBUTES for name in found if name.lower() == candidate]
    if usual or len(found) <= 1:
        return (usual or found or ["label"])[0]
    raise ValueError(
        f"{file}: the regions have the attributes {', '.join(found)}. Call the one that holds the class `label`."
    )


def _name(region: Any, attribute: str) -> str | None:
    """The class of a region: text, or the one option of checkboxes that is set."""
    value = _attributes(region).get(attribute)
    if isinstance(value, dict):
        chosen = [option for option, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else None
    return str(value).strip() or None if value is not None else None


def _shape_without_box(region: Any) -> str | None:
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    kind = shape.get("name") if isinstance(shape, dict) else None
    return kind if kind in ("point", "polyline") else None


def _box(region: Any, record: str, number: int, attribute: str, class_ids: dict[str, int]) -> BoxRecord:
    name = _name(region, attribute)
    shape = region.get("shape_attributes") if isinstance(region, dict) else None
    bbox: Any = shape
    problem = None
    try:
        bbox = _box_of_shape(shape or {})
    except KeyError as error:
        problem = f"shape_attributes: {error} is missing"
    except (TypeError, ValueError) as error:
        problem = f"shape_attributes: {error}"
    is_outline = problem is None and isinstance(shape, dict) and shape.get("name") == "polygon"
    points = zip(shape["all_points_x"], shape["all_points_y"], strict=True) if is_outline and shape is not None else ()
    return BoxRecord(
        record,
        bbox,
        None if name is None else class_ids[name],
        number,
        problem=problem,
        category_name=name,
        segmentation=[[value for point in points for value in point]] if is_outline else None,
    )


def _box_of_shape(shape: Mapping[str, Any]) -> list[float]:
    """[x_min, y_min, width, height] in pixels."""
    kind = shape.get("name")
    if kind == "rect":
        return [float(shape[key]) for key in ("x", "y", "width", "height")]
    if kind == "polygon":
        return box_of_points(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))
    if kind in ("circle", "ellipse"):
        x, y = float(shape["cx"]), float(shape["cy"])
        width, height = (float(shape[key]) for key in (("r", "r") if kind == "circle" else ("rx", "ry")))
        return [x - width, y - height, 2 * width, 2 * height]
    raise ValueError(f"a {kind} has no box")


VIA = AnnotationFormat("VIA", "{split}.json, {split}/*.json, or one file", find_via, read_via_file)
