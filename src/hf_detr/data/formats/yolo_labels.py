"""The label files of YOLO: one per image, one object per line, `class cx cy w h` relative to the image, or a polygon
`class x1 y1 x2 y2 ...`, of which the bounding box is taken."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from ..records import BoxRecord
from .parsing import box_of_points, read_text


def label_file(image: Path) -> Path:
    """Where the labels of an image are: the last folder `images` of its path replaced by `labels`, or else beside it,
    or in a folder `labels` beside its own. The first that exists; the first of them if none does."""
    parts = os.path.splitext(image)[0].split(os.sep)
    last = next((i for i in range(len(parts) - 2, -1, -1) if parts[i].lower() == "images"), None)
    candidates = [[*parts[:last], _like(parts[last]), *parts[last + 1 :]]] if last is not None else []
    candidates += [parts, [*parts[:-2], "labels", parts[-1]]]
    files = [os.sep.join(candidate) + ".txt" for candidate in candidates]
    return Path(next((file for file in files if os.path.isfile(file)), files[0]))


def _like(images: str) -> str:
    return "Labels" if images == "Images" else "labels"


def looks_like_labels(file: Path) -> bool:
    """Whether the first line of a text file is a label, so that it is no list, README or notes."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            first = lines.readline(4096).split()
        return len(first) >= 5 and all(math.isfinite(float(value)) for value in first)
    except (OSError, ValueError):
        return False


def read_labels(
    file: Path, image_size: tuple[int, int], class_ids: dict[int, int], with_keypoints: bool
) -> Iterator[BoxRecord]:
    """The objects of a label file; `image_size` is (width, height) in pixels. Without a size, of an image that cannot
    be read, there are none: the boxes are relative to it. Keypoints after a box are ignored."""
    if not file.is_file() or min(image_size) <= 0:
        return
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        record = f"{file.name} line {number}"
        try:
            class_number, *values = (float(value) for value in line.split())
        except ValueError:
            yield BoxRecord(record, line.strip(), None, 0, problem=f"must be numbers, got {line.strip()[:60]!r}")
            continue
        values = values[:4] if with_keypoints else values
        valid_class = math.isfinite(class_number) and class_number == int(class_number)
        category = class_ids.get(int(class_number)) if valid_class else None
        relative, problem = _relative_box(values)
        bbox = [value * side for value, side in zip(relative, (*image_size, *image_size), strict=False)]
        is_outline = problem is None and len(values) > 4
        outline = [value * image_size[position % 2] for position, value in enumerate(values)] if is_outline else None
        yield BoxRecord(
            record,
            bbox,
            category,
            0,
            problem=problem,
            category_name=line.split()[0],
            segmentation=[outline] if outline is not None else None,
        )


def _relative_box(values: list[float]) -> tuple[list[float], str | None]:
    """[x_min, y_min, width, height] in [0, 1], and what is wrong with the values, if anything."""
    if len(values) == 4:
        cx, cy, w, h = values
        relative = [cx - w / 2, cy - h / 2, w, h]
    elif len(values) >= 6 and len(values) % 2 == 0:
        relative = box_of_points(values)
    else:
        return values, f"must have 4 numbers after the class, or an even number from 6 for a polygon, got {len(values)}"
    if all(map(math.isfinite, values)) and max(map(abs, values)) > 2:
        return relative, f"must be relative to the image, in [0, 1], got {values[:4]}"
    return relative, None
