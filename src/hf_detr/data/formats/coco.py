"""Reading COCO JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...model.annotations import canonical_id, is_ignored, read_flag
from ..dataset_folder import DatasetFolder
from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, Orphan
from ..split_names import name_rank
from .json_files import find_json
from .parsing import box_of_segmentation, image_places, locate_images, read_json, recorded_size

KEYS = {"images", "annotations", "categories"}


def find_coco(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """The COCO file that is named after the split, or lies in a folder that is. The only COCO file of a folder,
    whatever its name, is the split "train"."""
    # the files of COCO's test images have no annotations
    refused = _missing_keys if split != "test" else lambda content: None
    found = find_json(folder, split, is_coco, "COCO", keys=tuple(sorted(KEYS)), refused=refused)
    if found is None:
        return None
    result = read_coco(folder, found.file, split, found.content)
    result.orphans += [orphan for orphan in found.unused if not orphan[1].startswith("panoptic_")]  # has its own format
    return result


def read_coco_file(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A file that the user named."""
    if file.suffix.lower() != ".json":
        return None
    content = read_json(file)
    if is_coco(content):
        return read_coco(folder, file, split, content)
    if (problem := _missing_keys(content)) is not None:
        raise ValueError(f"{file} {problem}.")
    return None


def is_coco(content: Any) -> bool:
    return isinstance(content, dict) and set(content) >= KEYS and not is_panoptic(content)


def is_panoptic(content: Any) -> bool:
    """Whether a file is COCO's panoptic format, which has a record per image and not per object."""
    if not isinstance(content, dict) or not set(content) >= KEYS or not isinstance(content["annotations"], list):
        return False
    return any(isinstance(record, dict) and "segments_info" in record for record in content["annotations"][:1])


def _missing_keys(content: Any) -> str | None:
    """What a file lacks that has some of the keys of COCO, but not all."""
    missing = sorted(KEYS - set(content)) if isinstance(content, dict) and KEYS & set(content) else []
    return f"is not COCO: {missing} are missing" if missing else None


def read_coco(folder: DatasetFolder, file: Path, split: str, content: dict[str, Any]) -> AnnotatedSplit:
    """One COCO JSON file. Its category ids become class ids 0 ... N-1 in ascending order. A category without boxes that
    others name as their supercategory, as in Roboflow's exports, is not a class.

    Raises:
        ValueError: a part of it is not COCO; names the file, and the record.
    """
    for key in KEYS:
        if not isinstance(content[key], list) or not all(isinstance(record, dict) for record in content[key]):
            raise ValueError(f"{file} is not COCO: {key} must be a list of records.")
    return read_records(folder, file, split, content, content["annotations"], "COCO", _add_boxes)


def read_records(
    folder: DatasetFolder,
    file: Path,
    split: str,
    content: dict[str, Any],
    objects: list[dict[str, Any]],
    name: str,
    add_objects: Callable[[dict[Any, ImageRecord], list[dict[str, Any]], dict[Any, int]], list[Orphan]],
) -> AnnotatedSplit:
    """The split of a file with COCO's `images` and `categories`.

    Args:
        objects: all records that have a `category_id`.
        name: of the format.
        add_objects: attaches the content's `annotations` to their images (by id), given the class ids by category id,
            and returns the orphans.
    """
    categories = _classes(file, content["categories"], objects)
    stem = file.stem.removeprefix("instances_").removeprefix("panoptic_")
    places = image_places(folder, file.parent, *dict.fromkeys((stem, split, *_named_after(folder, split))))
    images, orphans, ambiguous_ids = _images(folder, content["images"], places, split)
    class_ids = {canonical_id(category["id"]): class_id for class_id, category in enumerate(categories)}
    orphans += add_objects(images, content["annotations"], class_ids)
    parents = {image.path.parent for image in images.values()}
    inside = [place for place in places if place in parents or any(place in p.parents for p in parents)]
    return AnnotatedSplit(
        name,
        split,
        file,
        [str(category["name"]) for category in categories],
        [canonical_id(category["id"]) for category in categories],
        list(images.values()),
        inside[0] if inside else folder.path,
        orphans,
        ambiguous_ids,
        has_category_ids=True,
        stuff=[str(category["name"]) for category in categories if _is_stuff(file, category)],
    )


def _is_stuff(file: Path, category: dict[str, Any]) -> bool:
    try:
        return not read_flag(category.get("isthing", 1))
    except ValueError as error:
        raise ValueError(f"{file}: isthing of the category {category['name']!r} {error}.") from None


def _named_after(folder: DatasetFolder, split: str) -> list[str]:
    """Folders of the dataset that are named after the split, such as `Train`."""
    inside = (place.relative_to(folder.path) for place in folder.image_folders if place.is_relative_to(folder.path))
    parts = {part for place in inside for part in place.parts}
    return sorted(part for part in parts if name_rank(part, split) is not None)


def _classes(file: Path, categories: list[dict[str, Any]], objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The categories that are classes, by id."""
    for category in categories:
        category_id = canonical_id(category.get("id"))
        if isinstance(category_id, bool) or not isinstance(category_id, (int, str)) or not category.get("name"):
            raise ValueError(f"{file}: each category needs an id and a name, got {category}.")
    used = {canonical_id(record.get("category_id")) for record in objects}
    parents = {c.get("supercategory") for c in categories if c.get("supercategory") != c["name"]} - {"none"}
    classes = [c for c in categories if canonical_id(c["id"]) in used or c["name"] not in parents]
    return sorted(classes, key=lambda c: (isinstance(canonical_id(c["id"]), str), canonical_id(c["id"])))


def _images(
    folder: DatasetFolder, records: list[dict[str, Any]], places: list[Path], split: str
) -> tuple[dict[Any, ImageRecord], list[Orphan], set[Any]]:
    """Image records by their id, orphans, and ambiguous ids."""
    images: dict[Any, ImageRecord] = {}
    orphans: list[Orphan] = []
    ambiguous_ids = set()
    for number, record in enumerate(records):
        name, given_id = str(record.get("file_name") or ""), canonical_id(record.get("id"))
        described = f"image {given_id} ({name})"
        if not name or given_id is None or not isinstance(given_id, (int, float, str)):
            orphans.append(("image-record-incomplete", f"image number {number}", "needs an id and a file_name"))
        elif given_id in images:
            other = images[given_id]
            orphans.append(("image-id-duplicate", described, f"has the same id as {other.file_name}"))
            ambiguous_ids.add(given_id)
        else:
            size = recorded_size(record.get("width"), record.get("height"))
            images[given_id] = ImageRecord(folder.path, name, given_id, described, size)
    paths = locate_images(folder, [image.file_name for image in images.values()], split, places)
    for image, path in zip(images.values(), paths, strict=True):
        image.path = path
    return images, orphans, ambiguous_ids


def _add_boxes(
    images: dict[Any, ImageRecord], records: list[dict[str, Any]], class_ids: dict[Any, int]
) -> list[Orphan]:
    """Attach the annotations to their images; returns those without an image, and duplicate ids."""
    orphans: list[Orphan] = []
    ids: set[Any] = set()
    for number, record in enumerate(records):
        annotation_id = canonical_id(record.get("id"))
        described = f"annotation {f'number {number}' if annotation_id is None else annotation_id}"
        if annotation_id is not None and annotation_id in ids:
            orphans.append(("annotation-id-duplicate", described, "another annotation has the same id"))
        ids.add(annotation_id)
        image = images.get(canonical_id(record.get("image_id")))
        if image is None:
            orphans.append(("annotation-orphan", described, f"there is no image {record.get('image_id')}"))
            continue
        image.boxes.append(_box(record, described, number if annotation_id is None else annotation_id, class_ids))
    return orphans


def _box(record: dict[str, Any], described: str, box_id: Any, class_ids: dict[Any, int]) -> BoxRecord:
    category_id, bbox, area, problem = record.get("category_id"), record.get("bbox"), record.get("area"), None
    crowd = False
    has_own_box = not (bbox is None or bbox == [])
    try:
        crowd = is_ignored(record)
        if not has_own_box:
            bbox = box_of_segmentation(record.get("segmentation"))
    except ValueError as error:
        problem = str(error)
    category = canonical_id(category_id)
    return BoxRecord(
        described,
        bbox,
        class_ids.get(category) if isinstance(category, (int, str)) else None,
        box_id,
        area,
        int(crowd),
        problem,
        category_name=category_id,
        has_own_box=has_own_box,
        segmentation=record.get("segmentation"),
    )


COCO = AnnotationFormat(
    "COCO",
    "annotations/instances_{split}.json, {split}/_annotations.coco.json, {split}.json, or one COCO file",
    find_coco,
    read_coco_file,
)
