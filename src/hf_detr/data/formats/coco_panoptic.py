"""Reading COCO's panoptic format: a JSON file with the segments of each image, and PNGs whose colours are their ids."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...model.annotations import canonical_id, is_ignored
from ..dataset_folder import DatasetFolder
from ..image_files import walk_files
from ..masks import SegmentMap
from ..records import WITHOUT_BOX, AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, Orphan
from .coco import KEYS, is_panoptic, read_records
from .json_files import find_json
from .parsing import read_json


def find_panoptic(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """The panoptic file that is named after the split, or lies in a folder that is."""
    found = find_json(folder, split, is_panoptic, "COCO panoptic", keys=(*sorted(KEYS), "segments_info"))
    if found is None:
        return None
    result = read_panoptic(folder, found.file, split, found.content)
    result.orphans += [orphan for orphan in found.unused if not orphan[1].startswith("instances_")]  # the same objects
    return result


def read_panoptic_file(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A file that the user named."""
    content = read_json(file) if file.suffix.lower() == ".json" else None
    return read_panoptic(folder, file, split, content) if content is not None and is_panoptic(content) else None


def read_panoptic(folder: DatasetFolder, file: Path, split: str, content: dict[str, Any]) -> AnnotatedSplit:
    """One panoptic JSON file. Each segment is an object with the mask that the PNG has, stuff as well as things. The
    PNGs are in the folder that is called like the file without its suffix, or beside it.

    Raises:
        ValueError: a part of it is not COCO panoptic; names the file, and the record.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(content[key], list) or not all(isinstance(record, dict) for record in content[key]):
            raise ValueError(f"{file} is not COCO panoptic: {key} must be a list of records.")
    for number, record in enumerate(content["annotations"]):
        segments = record.get("segments_info")
        if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
            raise ValueError(f"{file}: annotation number {number} needs segments_info, a list of records.")
    segments = [segment for record in content["annotations"] for segment in record["segments_info"]]
    return read_records(folder, file, split, content, segments, "COCO panoptic", partial(_add_segments, file))


def _add_segments(
    file: Path, images: dict[Any, ImageRecord], records: list[dict[str, Any]], class_ids: dict[Any, int]
) -> list[Orphan]:
    """Attach the segments to their images; returns annotations without an image, and images without segments."""
    orphans: list[Orphan] = []
    for number, record in enumerate(records):
        name = str(record.get("file_name") or "")
        image = images.get(canonical_id(record.get("image_id")))
        if image is None:
            described = f"annotation number {number} ({name})"
            orphans.append(("annotation-orphan", described, f"there is no image {record.get('image_id')}"))
            continue
        if image.segment_map is not None:
            message = f"{image.segment_map.path.name} and {name} are both of this image"
            orphans.append(("annotation-unused", image.record, message))
            continue
        image.segment_map = SegmentMap(_png(file, name or f"{Path(image.file_name).stem}.png"))
        for segment in record["segments_info"]:
            image.boxes.append(_segment(segment, class_ids))
    orphans += [
        ("annotation-unused", image.record, "it has no segments: all of it counts as unlabelled")
        for image in images.values()
        if image.segment_map is None
    ]
    return orphans


def _png(file: Path, name: str) -> Path:
    """Where a PNG is; the first place if it is in none."""
    places = [file.with_suffix("") / name, file.parent / name]
    return next((place for place in places if place.is_file()), places[0])


def _segment(segment: dict[str, Any], class_ids: dict[Any, int]) -> BoxRecord:
    segment_id, bbox = canonical_id(segment.get("id")), segment.get("bbox")
    has_own_box = not (bbox is None or bbox == [])
    problem = None if has_own_box else WITHOUT_BOX
    crowd = False
    if type(segment_id) is not int or segment_id <= 0:
        problem = f"the id of a segment must be a positive integer, got {segment.get('id')!r}"
    try:
        crowd = is_ignored(segment)
    except ValueError as error:
        problem = str(error)
    category = canonical_id(segment.get("category_id"))
    return BoxRecord(
        f"segment {segment_id}",
        bbox if has_own_box else None,
        class_ids.get(category) if isinstance(category, (int, str)) else None,
        segment_id,
        segment.get("area"),
        int(crowd),
        problem,
        category_name=segment.get("category_id"),
        has_own_box=has_own_box,
        segment=segment_id if type(segment_id) is int else None,
    )


def _pngs_elsewhere(folder: DatasetFolder) -> Iterator[Path]:
    """The PNGs of files that the user named, outside the folder."""
    for file in folder.files_given.values():
        place = file.with_suffix("")
        if file.suffix.lower() == ".json" and place.is_dir() and not place.is_relative_to(folder.path):
            yield from sorted(walk_files(place))


COCO_PANOPTIC = AnnotationFormat(
    "COCO panoptic",
    "annotations/panoptic_{split}.json, and PNGs in annotations/panoptic_{split}/",
    find_panoptic,
    read_panoptic_file,
    _pngs_elsewhere,
)
