"""What the readers of all formats have in common."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.extras import import_extra
from ..dataset_folder import IMAGE_FOLDERS, DatasetFolder, path_parts


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, or cannot be read; names the file.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON; names the file.
    """
    try:
        return json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def recorded_size(width: Any, height: Any) -> tuple[int, int] | None:
    """(width, height) in pixels, from numbers or their text; None if they are missing, not numbers, or not positive:
    several tools write 0 or -1 for an unknown size."""
    try:
        size = int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def image_places(folder: DatasetFolder, annotations: Path, *names: str) -> list[Path]:
    """Where the images of annotations in the folder `annotations` usually are, the likeliest first: there, and in
    folders that are called `names`, `images/NAME` or one of `IMAGE_FOLDERS`, from there up to the dataset's folder."""
    places = [] if folder.images_given is None else [folder.images_given]
    places += [folder.images_given / name for name in names if folder.images_given is not None]
    above = [annotations, *annotations.parents]
    bases = above[: above.index(folder.path) + 1] if folder.path in above else [annotations, folder.path]
    relative = [*names, *(f"{place}/{name}" for place in IMAGE_FOLDERS for name in names), *IMAGE_FOLDERS]
    relative += [f"{name}/{place}" for name in names for place in ("images", "data")]
    places += [bases[0], *(base / name for base in bases for name in relative), *bases[1:]]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def locate_images(folder: DatasetFolder, names: Sequence[str], split: str, places: Sequence[Path]) -> list[Path]:
    """The image file of each name, see [`DatasetFolder.find_image`]. Those that are not found are expected where most
    others are."""
    found = [folder.find_image(name, split, places) for name in names]
    parents = Counter(path.parent for path in found if path is not None)
    likely = [*(place for place in places if place in folder.image_folders), *places]
    expected = parents.most_common(1)[0][0] if parents else next(iter(likely), folder.path)
    return [path or expected / "/".join(path_parts(name)) for path, name in zip(found, names, strict=True)]


def relative_ids(paths: Sequence[Path]) -> list[str]:
    """An id per file: its path without suffix, relative to the folder that all are in; with the suffix where that is
    not unique."""
    if not paths:
        return []
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [Path(os.path.relpath(path, common)).as_posix() for path in paths]
    stems = Counter(os.path.splitext(name)[0] for name in names)
    return [stem if stems[stem := os.path.splitext(name)[0]] == 1 else name for name in names]


def box_of_points(points: Any) -> list[float]:
    """The bounding box [x_min, y_min, width, height] of points (N, 2) or of their numbers in a row.

    Raises:
        ValueError: they are not pairs of numbers.
    """
    try:
        pairs = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        raise ValueError(f"must be pairs of numbers, got {str(points)[:60]}") from None
    if not len(pairs):
        raise ValueError("has no points")
    (left, top), (right, bottom) = pairs.min(axis=0).tolist(), pairs.max(axis=0).tolist()
    return [left, top, right - left, bottom - top]


def box_of_segmentation(segmentation: Any) -> list[float]:
    """The bounding box [x_min, y_min, width, height] of a COCO segmentation: polygons, or a run-length encoding.

    Raises:
        ValueError: it is neither.
        ImportError: it is a compressed run-length encoding, and hotcoco, which decodes it, is not installed.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise ValueError(f"a run-length encoding needs counts and size, got {str(segmentation)[:60]}")
        if isinstance(counts, (list, tuple)):
            return _box_of_runs([int(count) for count in counts], int(size[0]))
        if isinstance(counts, (str, bytes)):
            mask = import_extra("hotcoco", "evaluation").mask
            return [float(value) for value in np.asarray(mask.toBbox({"size": list(size), "counts": counts})).ravel()]
        raise ValueError(f"a run-length encoding needs counts and size, got {str(segmentation)[:60]}")
    if isinstance(segmentation, (list, tuple)) and len(segmentation):
        nested = all(isinstance(polygon, (list, tuple)) for polygon in segmentation)
        return box_of_points([value for polygon in segmentation for value in polygon] if nested else segmentation)
    raise ValueError("there is neither a bbox nor a segmentation")


def _box_of_runs(counts: list[int], height: int) -> list[float]:
    """Box of a mask as lengths of alternating runs of 0 and 1, down the columns."""
    ends = np.cumsum(counts)
    starts, stops = ends[0::2][: len(counts) // 2], ends[1::2]  # the runs of 1
    starts, stops = starts[stops > starts], stops[stops > starts] - 1
    if not len(starts):
        raise ValueError("the mask is empty")
    columns = np.concatenate((starts // height, stops // height))
    crosses = starts // height != stops // height  # a run over the end of a column touches the top and the bottom
    rows = np.concatenate((starts % height, stops % height, [0, height - 1] if crosses.any() else []))
    left, top = int(columns.min()), int(rows.min())
    return [float(left), float(top), float(columns.max() - left + 1), float(rows.max() - top + 1)]
