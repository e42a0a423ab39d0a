"""Reading Pascal VOC XML, as labelImg, CVAT, Roboflow and FiftyOne write it."""

import os
import xml.etree.ElementTree as ET
from pathlib import Path

from ...model.annotations import read_flag
from ..dataset_folder import DatasetFolder, path_parts
from ..image_files import walk_files
from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, Orphan
from ..split_names import name_rank, split_of
from .parsing import image_places, read_text, recorded_size, relative_ids
from .per_image import files_of_split, match_image


def find_voc(folder: DatasetFolder, split: str) -> AnnotatedSplit | None:
    """XML files that `ImageSets/Main/SPLIT.txt` lists, or that are in a folder named after the split; without lists and
    such folders, all XML files are the split "train"."""
    files = _xml_files(folder)
    if not files:
        return None
    lists = [file for file in folder.of_type(".txt") if _in_image_sets(file)]
    ranked = sorted((rank, file) for file in lists if (rank := name_rank(file.stem, split)) is not None)
    if not ranked and any(split_of(file.stem) for file in lists):
        return None
    unused: list[Orphan] = []
    if ranked:
        best = [file for rank, file in ranked if rank == ranked[0][0]]
        files = [found for file in best for found in _listed_files(file, files)]
    else:
        files, unused = files_of_split(folder, files, split)
    result = read_voc(folder, files, split) if files else None
    if result is not None:
        result.orphans += unused
    return result


def _xml_files(folder: DatasetFolder) -> list[Path]:
    return [file for file in folder.of_type(".xml", depth=9) if not _is_sidecar(file)]


def _is_sidecar(file: Path) -> bool:
    """Whether an XML file is GDAL's, beside each image."""
    return file.name.lower().endswith(".aux.xml")


def _in_image_sets(file: Path) -> bool:
    return [part.lower() for part in file.parts[-3:-1]] == ["imagesets", "main"]


def read_voc_files(folder: DatasetFolder, file: Path, split: str) -> AnnotatedSplit | None:
    """A folder of XML files that the user named, or a list of their names beside `Annotations/`."""
    if file.is_dir():
        files = sorted(path for path in walk_files(file) if path.suffix.lower() == ".xml" and not _is_sidecar(path))
    elif file.suffix.lower() == ".txt" and (known := _xml_files(folder)):
        files = _listed_files(file, known)
    else:
        return None
    return read_voc(folder, files, split) if files else None


def _listed_files(file: Path, files: list[Path]) -> list[Path]:
    """The XML files of a list, from the tree that the list is in. A line is a name, which may have spaces, a folder and
    a suffix, or a name and a flag."""
    root = file.parents[2] if _in_image_sets(file) else file.parent
    inside = [path for path in files if path.is_relative_to(root)] or files
    by_stem: dict[str, list[Path]] = {}
    for path in inside:
        by_stem.setdefault(path.stem, []).append(path)
    found = []
    for line in (line.strip() for line in read_text(file).splitlines()):
        if line:
            first = line.split(maxsplit=1)[0]
            names = (line, os.path.splitext(line)[0], first, os.path.splitext(first)[0])
            matches = filter(None, (_ending_like(by_stem, name) for name in names))
            found.append(next(matches, inside[0].parent / f"{first}.xml"))
    return found


def _ending_like(by_stem: dict[str, list[Path]], name: str) -> Path | None:
    """The only XML file whose path ends like `name`, which has no suffix."""
    parts = path_parts(name)
    if not parts:
        return None
    candidates = by_stem.get(parts[-1], [])
    exact = [path for path in candidates if [*path.parts[:-1], path.stem][-len(parts) :] == parts]
    return next((found[0] for found in (exact, candidates) if len(found) == 1), None)


def read_voc(folder: DatasetFolder, files: list[Path], split: str) -> AnnotatedSplit | None:
    """Pascal VOC: one XML file per image. The files of the VOC challenge count pixels from 1 and include the last one;
    annotation tools count from 0. The `database` that the challenge's files name tells them apart. Objects that are
    marked `difficult` are not learned, and detections of them do not count, as in the challenge."""
    roots: list[tuple[Path, ET.Element]] = []
    orphans: list[Orphan] = []
    for file in files:
        try:
            root = ET.fromstring(file.read_bytes())
        except (ET.ParseError, OSError) as error:
            orphans.append(("annotation-unreadable", file.name, str(error)))
            continue
        if root.tag == "annotation":
            roots.append((file, root))
        elif root.tag != "annotations":
            orphans.append(("annotation-unused", file.name, f"<{root.tag}> is not Pascal VOC"))
        else:
            problem = f"<{root.tag}> is not Pascal VOC; export as COCO, if this is CVAT's own format"
            orphans.append(("annotation-unreadable", file.name, problem))
    if not roots and all(code == "annotation-unused" for code, _, _ in orphans):
        return None  # other tools' XML
    found = {(entry.findtext("name") or "").strip() for _, root in roots for entry in root.iter("object")}
    names = sorted(found - {""})
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    stems = {file.stem for file in files}
    images: list[ImageRecord] = []
    number = 0
    ids = relative_ids([file for file, _ in roots])
    for image_id, (file, root) in zip(ids, roots, strict=True):
        places = image_places(folder, file.parent, *dict.fromkeys((split, file.parent.name)))
        name = (root.findtext("filename") or "").strip()
        path, problem_of_name = match_image(folder, file, name, split, places, stems)
        size = recorded_size(root.findtext("size/width"), root.findtext("size/height"))
        image = ImageRecord(path, path.name, image_id, f"image {path.name} ({image_id}.xml)", size)
        if problem_of_name:
            orphans.append(("image-name-stale", image.record, problem_of_name))
        origin = 1.0 if "VOC2" in (root.findtext("source/database") or "") else 0.0
        for position, element in enumerate(root.iter("object"), start=1):
            number += 1
            image.boxes.append(_box(element, f"{file.name} object {position}", number, origin, class_ids))
        images.append(image)
    place = files[0].parent
    image_folder = images[0].path.parent if images else place
    return AnnotatedSplit("Pascal VOC", split, place, names, list(range(len(names))), images, image_folder, orphans)


def _box(element: ET.Element, record: str, number: int, origin: float, class_ids: dict[str, int]) -> BoxRecord:
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    category = class_ids.get(name)
    try:
        left, top, right, bottom = (float(corner or "") for corner in corners)
    except ValueError:
        wrong = f"bndbox must be four numbers, got {corners}"
        return BoxRecord(record, corners, category, number, problem=wrong, category_name=name)
    left, top = left - origin, top - origin
    bbox = [left, top, right - left, bottom - top]
    problem: str | None = None
    try:
        difficult = read_flag(element.findtext("difficult"))
    except ValueError as error:
        difficult, problem = False, f"difficult {error}"
    return BoxRecord(record, bbox, category, number, iscrowd=int(difficult), problem=problem, category_name=name)


PASCAL_VOC = AnnotationFormat(
    "Pascal VOC",
    "Annotations/*.xml with ImageSets/Main/{split}.txt, or {split}/*.xml",
    find_voc,
    read_voc_files,
)
