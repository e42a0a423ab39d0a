"""Reading Pascal VOC XML."""

import xml.etree.ElementTree as ET
from pathlib import Path

from ..source import IMAGE_SUFFIXES, Box, Photo, Source, read_text


def find_voc(path: Path, split: str, names: tuple[str, ...]) -> Source | None:
    files: list[Path] = []
    if path.is_dir():
        annotations = next((d for d in (path / "Annotations", path / "annotations") if any(d.rglob("*.xml"))), path)
        files = _files_of_split(annotations, path / "ImageSets" / "Main", split, names)
    return read_voc(files, files[0].parent, split) if files else None


def _files_of_split(annotations: Path, lists: Path, split: str, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if (lists / f"{name}.txt").is_file():
            lines = [line.strip() for line in read_text(lists / f"{name}.txt").splitlines() if line.strip()]
            whole = [annotations / f"{line}.xml" for line in lines]  # a name may have spaces, or a flag behind it
            return [f if f.is_file() else annotations / f"{f.stem.split()[0]}.xml" for f in whole]
        if any((annotations / name).glob("*.xml")):
            return sorted((annotations / name).glob("*.xml"))
    return sorted(annotations.glob("*.xml")) if split == "train" and not lists.is_dir() else []


def read_voc(files: list[Path], folder: Path, split: str) -> Source:
    """Pascal VOC: an XML file an image. The VOC challenge's own files count pixels from 1 and include the last one;
    annotation tools count from 0. They are told apart by the `database` that the challenge's files name."""
    roots: list[tuple[Path, ET.Element | None, str]] = []
    for file in files:
        try:
            roots.append((file, ET.fromstring(file.read_bytes()), ""))
        except (ET.ParseError, OSError) as error:
            roots.append((file, None, str(error)))
    names = {
        (o.findtext("name") or "").strip() for _, root, _ in roots if root is not None for o in root.iter("object")
    }
    class_names = sorted(names - {""})
    class_of = {name: index for index, name in enumerate(class_names)}
    photos: list[Photo] = []
    stray: list[tuple[str, str, str]] = []
    places = [d for d in (folder, folder.parent / "JPEGImages", folder.parent / "images", folder.parent) if d.is_dir()]
    if folder.parent.name in ("Annotations", "annotations"):
        places += [folder.parents[1] / "images" / folder.name, folder.parents[1] / "images", folder.parents[1]]
    by_stem = [{p.stem: p for p in place.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES} for place in places]
    number = 0
    for index, (file, root, problem) in enumerate(roots):
        if root is None:
            stray.append(("annotation-unreadable", file.name, problem))
            continue
        name = (root.findtext("filename") or "").strip() or f"{file.stem}.jpg"
        path = _voc_image(name, file.stem, places, by_stem)
        first = 1.0 if "VOC2" in (root.findtext("source/database") or "") else 0.0
        photo = Photo(path, path.name, index, f"image {path.name} ({file.name})", _voc_size(root))
        for position, element in enumerate(root.iter("object"), start=1):
            number += 1
            photo.boxes.append(_voc_box(element, f"{file.name} object {position}", number, first, class_of))
        photos.append(photo)
    image_folder = photos[0].path.parent if photos else folder
    return Source("Pascal VOC", split, folder, class_names, list(range(len(class_names))), photos, image_folder, stray)


def _voc_image(name: str, stem: str, places: list[Path], by_stem: list[dict[str, Path]]) -> Path:
    for place in places:
        if (place / name).is_file():
            return place / name
    found = next((files[stem] for files in by_stem if stem in files), None)
    return found or places[1 if len(places) > 1 else 0] / name


def _voc_size(root: ET.Element) -> tuple[int, int] | None:
    try:
        width, height = int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0)
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _voc_box(element: ET.Element, where: str, number: int, first: float, class_of: dict[str, int]) -> Box:
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(corner or "") for corner in corners)
    except ValueError:
        return Box(where, corners, class_of.get(name), number, problem=f"bndbox is not four numbers: {corners}")
    left, top = left - first, top - first
    return Box(where, [left, top, right - left, bottom - top], class_of.get(name), number, category_name=name)
