"""Reading Pascal VOC XML."""

import xml.etree.ElementTree as ET
from pathlib import Path

from ..image_files import IMAGE_SUFFIXES
from ..records import AnnotatedSplit, AnnotationFormat, BoxRecord, ImageRecord, split_names
from .parsing import read_text, recorded_size


def find_voc(path: Path, split: str) -> AnnotatedSplit | None:
    """XML files in `Annotations/` that `ImageSets/Main/SPLIT.txt` lists, or that are in `Annotations/SPLIT/` or
    `SPLIT/`; without lists and subfolders, all XML files are the split "train"."""
    if not path.is_dir():
        return None
    candidates = (path / "Annotations", path / "annotations")
    annotations = next((folder for folder in candidates if any(folder.rglob("*.xml"))), path)
    files = _files_of_split(annotations, path / "ImageSets" / "Main", split)
    return read_voc(files, files[0].parent, split) if files else None


def _files_of_split(annotations: Path, lists: Path, split: str) -> list[Path]:
    for name in split_names(split):
        if (lists / f"{name}.txt").is_file():
            lines = [line.strip() for line in read_text(lists / f"{name}.txt").splitlines() if line.strip()]
            return [_listed_file(annotations, line) for line in lines]
        if any((annotations / name).glob("*.xml")):
            return sorted((annotations / name).glob("*.xml"))
    return sorted(annotations.glob("*.xml")) if split == "train" and not lists.is_dir() else []


def _listed_file(annotations: Path, line: str) -> Path:
    """A line is a name, which may have spaces, or a name followed by a flag."""
    file = annotations / f"{line}.xml"
    return file if file.is_file() else annotations / f"{line.split(maxsplit=1)[0]}.xml"


def read_voc(files: list[Path], folder: Path, split: str) -> AnnotatedSplit:
    """Pascal VOC: one XML file per image. The files of the VOC challenge count pixels from 1 and include the last one;
    annotation tools count from 0. The `database` that the challenge's files name tells them apart."""
    roots: list[tuple[Path, ET.Element]] = []
    orphans: list[tuple[str, str, str]] = []
    for file in files:
        try:
            roots.append((file, ET.fromstring(file.read_bytes())))
        except (ET.ParseError, OSError) as error:
            orphans.append(("annotation-unreadable", file.name, str(error)))
    found = {(entry.findtext("name") or "").strip() for _, root in roots for entry in root.iter("object")}
    names = sorted(found - {""})
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    folders, files_by_stem = _image_folders(folder)
    images: list[ImageRecord] = []
    number = 0
    for index, (file, root) in enumerate(roots):
        name = (root.findtext("filename") or "").strip() or f"{file.stem}.jpg"
        path = _image_path(name, file.stem, folders, files_by_stem)
        size = recorded_size(root.findtext("size/width"), root.findtext("size/height"))
        size = size if size and min(size) > 0 else None  # some tools write 0 for an unknown size
        image = ImageRecord(path, path.name, index, f"image {path.name} ({file.name})", size)
        origin = 1.0 if "VOC2" in (root.findtext("source/database") or "") else 0.0
        for position, element in enumerate(root.iter("object"), start=1):
            number += 1
            image.boxes.append(_box(element, f"{file.name} object {position}", number, origin, class_ids))
        images.append(image)
    image_folder = images[0].path.parent if images else folder
    return AnnotatedSplit(PASCAL_VOC.name, split, folder, names, list(range(len(names))), images, image_folder, orphans)


def _image_folders(folder: Path) -> tuple[list[Path], list[dict[str, Path]]]:
    """The usual folders of images, and the images in each by stem."""
    folders = [folder, folder.parent / "JPEGImages", folder.parent / "images", folder.parent]
    folders = [place for place in folders if place.is_dir()]
    if folder.parent.name in ("Annotations", "annotations"):
        usual = (folder.parents[1] / "images" / folder.name, folder.parents[1] / "images", folder.parents[1])
        folders += [place for place in usual if place.is_dir()]
    return folders, [{p.stem: p for p in place.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES} for place in folders]


def _image_path(name: str, stem: str, folders: list[Path], files_by_stem: list[dict[str, Path]]) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    found = next((files[stem] for files in files_by_stem if stem in files), None)
    return found or folders[1 if len(folders) > 1 else 0] / name


def _box(element: ET.Element, record: str, number: int, origin: float, class_ids: dict[str, int]) -> BoxRecord:
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(corner or "") for corner in corners)
    except ValueError:
        problem = f"bndbox must be four numbers, got {corners}"
        return BoxRecord(record, corners, class_ids.get(name), number, problem=problem, category_name=name)
    left, top = left - origin, top - origin
    bbox = [left, top, right - left, bottom - top]
    return BoxRecord(record, bbox, class_ids.get(name), number, category_name=name)


PASCAL_VOC = AnnotationFormat(
    "Pascal VOC", "Annotations/*.xml with ImageSets/Main/{split}.txt, or {split}/*.xml", find_voc
)
