"""A cleaned copy of an annotated folder: without what cannot be used, and with what can be put right."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.coco_export import write_coco
from ..data.source import Box, Photo, Source
from .examine import Examination, good_boxes

_DROP_PHOTO = {"image-missing", "image-unreadable", "image-truncated", "image-size", "image-turned", "image-id-twice"}
_DROP_BOX = {"box-not-numbers", "box-empty", "box-outside", "category-unknown", "box-twice"}


def clean(examination: Examination) -> tuple[dict[str, Source], dict[str, int]]:
    """The sources without what cannot be used, and how often each kind of finding was dealt with.

    Left out: images that cannot be read, or whose recorded size or id is not theirs alone (their boxes cannot be
    trusted), second copies of an image with the same boxes, training images that are in validation too, and boxes that
    make no sense. Put right: boxes over the edge (clipped), corners and relative values (converted), wrong areas, ids
    and equal category names.
    """
    done: Counter[str] = Counter()
    by_photo: dict[int, set[str]] = {}
    by_box: dict[int, set[str]] = {}
    whole: dict[str, set[str]] = {}
    for finding in examination.findings:
        if finding.box is not None:
            by_box.setdefault(id(finding.box), set()).add(finding.code)
        elif finding.photo is not None:
            by_photo.setdefault(id(finding.photo), set()).add(finding.code)
        else:
            whole.setdefault(finding.split, set()).add(finding.code)
    copies = {
        id(finding.photo)
        for finding in examination.findings
        if finding.code == "image-twice" and finding.photo and finding.twin and _same_boxes(finding.photo, finding.twin)
    }
    twins = {id(finding.twin) for finding in examination.findings if finding.code == "image-in-both"}
    sources = {}
    for split, source in examination.sources.items():
        frame = whole.get(split, set()) & {"box-xyxy", "box-relative"}
        done.update(frame)
        photos = []
        for photo in source.photos:
            bad = by_photo.get(id(photo), set()) & _DROP_PHOTO
            if id(photo) in copies:
                bad = bad | {"image-twice"}
            if photo.id in source.ambiguous:
                bad = bad | {"image-id-twice"}
            if split == "train" and id(photo) in twins:
                bad = bad | {"image-in-both"}
            done.update(bad)
            if not bad:
                boxes = [_clean_box(box, photo, by_box.get(id(box), set()), frame, done) for box in photo.boxes]
                photos.append(replace(photo, boxes=[box for box in boxes if box is not None]))
        done.update(code for code, _, _ in source.stray)
        sources[split] = _with_own_ids(_with_unique_names(replace(source, photos=photos, stray=[])))
    return _with_one_table(sources), dict(done)


def _same_boxes(photo: Photo, twin: Photo) -> bool:
    """Whether two copies of an image, perhaps of different sizes, are annotated alike, to 2 % of the image."""

    def relative(one: Photo) -> np.ndarray:
        width, height = one.header.size if one.header else (1, 1)
        boxes = sorted((box.category or 0, *box.bbox) for box in good_boxes(one))
        return np.array(boxes, dtype=float).reshape(-1, 5) / (1, width, height, width, height)

    a, b = relative(photo), relative(twin)
    return a.shape == b.shape and bool(np.allclose(a, b, atol=0.02))


def _with_one_table(sources: dict[str, Source]) -> dict[str, Source]:
    """The same category ids in all splits, where the source has none of its own and the reader numbered each split."""
    if all(source.category_ids == list(range(len(source.names))) for source in sources.values()):
        names = list(dict.fromkeys(name for source in sources.values() for name in source.names))
        return {
            split: replace(source, category_ids=[names.index(name) for name in source.names])
            for split, source in sources.items()
        }
    return sources


def _clean_box(box: Box, photo: Photo, codes: set[str], frame: set[str], done: Counter[str]) -> Box | None:
    dropped = codes & _DROP_BOX
    if dropped:
        done.update(dropped)
        return None
    width, height = photo.header.size if photo.header is not None else (0, 0)
    x, y, w, h = (float(value) for value in box.bbox)
    if "box-xyxy" in frame:
        w, h = w - x, h - y
    if "box-relative" in frame:
        x, y, w, h = x * width, y * height, w * width, h * height
    left, top = min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))
    right, bottom = min(max(x + w, 0.0), float(width)), min(max(y + h, 0.0), float(height))
    over = (
        [left, top, right - left, bottom - top] if (x < 0 or y < 0 or x + w > width or y + h > height) else [x, y, w, h]
    )
    if over[2] <= 0 or over[3] <= 0:
        done["box-empty"] += 1
        return None
    done.update(codes & {"box-over-edge", "area-wrong"})
    own = over[2] * over[3]
    area = own if box.area is None or frame or "area-wrong" in codes else min(box.area, own)
    return replace(box, bbox=over, area=area)


def _with_unique_names(source: Source) -> Source:
    names = list(dict.fromkeys(source.names))
    if len(names) == len(source.names):
        return source
    ids = [source.category_ids[source.names.index(name)] for name in names]
    new = {index: names.index(name) for index, name in enumerate(source.names)}
    photos = [
        replace(p, boxes=[replace(b, category=new[b.category]) for b in p.boxes if b.category is not None])
        for p in source.photos
    ]
    return replace(source, names=names, category_ids=ids, photos=photos)


def _with_own_ids(source: Source) -> Source:
    ids = [box.id for photo in source.photos for box in photo.boxes]
    if len(set(ids)) == len(ids):
        return source
    fresh = iter(range(1, len(ids) + 1))
    photos = [replace(p, boxes=[replace(box, id=next(fresh)) for box in p.boxes]) for p in source.photos]
    return replace(source, photos=photos)


def write_clean_copy(examination: Examination, folder: str | Path, *, progress: bool = True) -> dict[str, int]:
    """Write what [`clean`] leaves as a COCO folder. The source is only read.

    Returns:
        how often each kind of finding was dealt with.

    Raises:
        FileExistsError: `folder` is there and not empty, or is part of the source.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name another folder.")
    if folder.resolve().is_relative_to(examination.folder.resolve()):
        raise FileExistsError(f"{folder} lies in {examination.folder}, which is never written to. Name another folder.")
    sources, done = clean(examination)
    for split, source in sources.items():
        photos = tqdm(source.photos, desc=f"Writing {split}", disable=not progress, leave=False)
        write_coco(
            folder,
            split,
            dict(zip(source.category_ids, source.names, strict=True)),
            ((_record(photo, source), _copy_of(photo.path)) for photo in photos),
        )
    return done


def _copy_of(path: Path) -> Callable[[Path], Any]:
    return lambda target: shutil.copyfile(path, target)


def _record(photo: Photo, source: Source) -> dict[str, Any]:
    width, height = photo.header.size if photo.header is not None else (0, 0)
    return {
        "image_id": photo.id,
        "file_name": photo.file_name,
        "width": width,
        "height": height,
        "objects": [
            {
                "id": box.id,
                "category_id": source.category_ids[box.category or 0],
                "bbox": list(box.bbox),
                "area": box.area,
                "iscrowd": box.iscrowd,
            }
            for box in photo.boxes
        ],
    }
