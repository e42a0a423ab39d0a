"""Everything that can be found wrong with an annotated folder, pixels included."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from ..data.checks import Finding, quick_checks
from ..data.find import find_source
from ..data.source import Box, Photo, Source, image_files, read_headers
from ..runtime.extras import import_extra

THUMB = 16  # pixels a side of what is kept of each image to compare it with others
MAX_HASH_DISTANCE = 3  # of 64 bits, and
MAX_THUMB_DISTANCE = 2.0  # of 255 in the mean, and
MAX_CELL_DISTANCE = 16.0  # in each of its cells: a thing that has moved before a still background is another image
RARE = 0.02  # of the boxes of the most frequent class


@dataclass
class Examination:
    """What was found.

    Attributes:
        folder: what was examined.
        sources: by split.
        findings: all of them, errors first.
        seconds: how long it took.
    """

    folder: Path
    sources: dict[str, Source]
    findings: list[Finding]
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def counts(self) -> dict[str, int]:
        """Code of each kind found, to how often."""
        return dict(Counter(finding.code for finding in self.findings).most_common())


@dataclass(frozen=True)
class _Look:
    """What decoding an image told."""

    problem: str | None = None
    hash: int = 0
    thumb: bytes = b""


def examine(
    folder: str | Path,
    *,
    num_queries: int = 100,
    feature_stride: int = 32,
    shortest_edge: int = 800,
    longest_edge: int = 1333,
    bbox_format: str | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> Examination:
    """Read every record and every image once, in parallel, and tell what is wrong.

    Args:
        folder: annotated in any format that [`~hf_detr.data.find_source`] knows.
        num_queries: of the model; images with more objects are reported.
        feature_stride, shortest_edge, longest_edge: boxes smaller than a cell of this many pixels, when images are
            resized for training, are reported.
        num_workers: processes that decode images; None is one a core.

    Raises:
        FileNotFoundError: there is nothing annotated.
        ImportError: imagehash is not installed; the extra that has it is named.
    """
    import_extra("imagehash", "doctor")  # used in the workers; better missed here
    started = time.perf_counter()
    folder = Path(folder)
    sources: dict[str, Source] = {}
    findings: list[Finding] = []
    for split in ("train", "val", "test"):
        try:
            source = find_source(folder, split)
        except ValueError as error:
            findings.append(Finding("annotation-unreadable", split, str(folder), "annotations", str(error)))
            continue
        if source is not None:
            sources[split] = source
    if not sources and not findings:
        raise FileNotFoundError(f"There are no annotations in {folder} (COCO, YOLO, Pascal VOC, imagefolder).")

    def bar(iterable: Iterable[Any], text: str, total: int) -> Any:
        return tqdm(iterable, desc=text, total=total, disable=not progress, leave=False)

    looks: dict[str, list[_Look]] = {}
    for split, source in sources.items():
        read_headers(source.photos, lambda it: bar(it, f"{split}: headers", len(source.photos)))  # noqa: B023
        found = quick_checks(source, bbox_format=bbox_format)
        findings += found
        looks[split] = _decode(source, num_workers, lambda it: bar(it, f"{split}: images", len(source.photos)))  # noqa: B023
        findings += list(_truncated(source, looks[split]))
        if not any(finding.code in ("box-xyxy", "box-relative") for finding in found):
            findings += list(_for_the_model(source, num_queries, feature_stride, shortest_edge, longest_edge))
    findings += list(_same_images(sources, looks))
    findings += list(_about_classes(sources))
    findings += list(_without_record(sources))
    findings.sort(key=lambda finding: finding.severity != "error")
    return Examination(folder, sources, findings, time.perf_counter() - started)


# -- pixels ----------------------------------------------------------------------------------------------------------


def _look(path: str) -> _Look:
    import imagehash

    try:
        with PIL.Image.open(path) as image:
            image.draft("RGB", (256, 256))  # JPEG is decoded at a lower resolution, but read to its end
            image.load()
            grey = image.convert("L")
            small = image.convert("RGB").resize((THUMB, THUMB), PIL.Image.Resampling.BOX)
            return _Look(None, int(str(imagehash.phash(grey)), 16), small.tobytes())
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return _Look(str(error))


def _decode(source: Source, num_workers: int | None, bar: Callable[[Any], Any]) -> list[_Look]:
    paths = [str(photo.path) for photo in source.photos]
    workers = num_workers or len(os.sched_getaffinity(0))
    if workers <= 1 or len(paths) < 64:
        return [_look(path) for path in bar(paths)]
    with ProcessPoolExecutor(max_workers=workers) as pool:
        return list(bar(pool.map(_look, paths, chunksize=32)))


def _truncated(source: Source, looks: list[_Look]) -> Iterator[Finding]:
    for photo, look in zip(source.photos, looks, strict=True):
        if look.problem is not None and photo.header is not None and photo.header.problem is None:
            message = f"{photo.path}: {look.problem}"
            yield Finding("image-truncated", source.split, str(source.file), photo.where, message, photo)


def _same_images(sources: dict[str, Source], looks: dict[str, list[_Look]]) -> Iterator[Finding]:
    """Images that look the same, in one split or in two. Hashes within 3 bits share one of four 16-bit bands, so only
    images that do are compared; the small pictures decide."""
    bands: dict[tuple[int, int], list[tuple[str, Photo, _Look]]] = {}
    for split, source in sources.items():
        for photo, look in zip(source.photos, looks[split], strict=True):
            if look.problem is not None:
                continue
            keys = [(band, look.hash >> (16 * band) & 0xFFFF) for band in range(4)]
            twins = [entry for key in keys for entry in bands.get(key, ()) if _alike(look, entry[2])]
            elsewhere = next((entry for entry in twins if entry[0] != split), None)
            here = next((entry for entry in twins if entry[0] == split), None)
            for twin, code in ((here, "image-twice"), (elsewhere, "image-in-both")):
                if twin is not None:
                    message = f"shows the same as {twin[1].where} of {twin[0]}"
                    yield Finding(code, split, str(source.file), photo.where, message, photo, twin=twin[1])
            if not twins:
                for key in keys:
                    bands.setdefault(key, []).append((split, photo, look))


def _alike(one: _Look, other: _Look) -> bool:
    if (one.hash ^ other.hash).bit_count() > MAX_HASH_DISTANCE:
        return False
    a, b = (np.frombuffer(look.thumb, dtype=np.uint8).astype(np.float32) for look in (one, other))
    difference = np.abs(a - b)
    return float(difference.mean()) <= MAX_THUMB_DISTANCE and float(difference.max()) <= MAX_CELL_DISTANCE


# -- the data as a whole ---------------------------------------------------------------------------------------------


def good_boxes(photo: Photo) -> list[Box]:
    """Those with a category and four values."""
    return [
        box
        for box in photo.boxes
        if box.category is not None
        and box.problem is None
        and isinstance(box.bbox, (list, tuple))
        and len(box.bbox) == 4
    ]


def _for_the_model(
    source: Source, num_queries: int, stride: int, shortest_edge: int, longest_edge: int
) -> Iterator[Finding]:
    for photo in source.photos:
        objects = [box for box in good_boxes(photo) if not box.iscrowd]
        if len(objects) > num_queries:
            message = f"{len(objects)} objects, more than {num_queries} queries"
            yield Finding("objects-too-many", source.split, str(source.file), photo.where, message, photo)
        if photo.header is None or photo.header.problem:
            continue
        scale = min(shortest_edge / min(photo.header.size), longest_edge / max(photo.header.size))
        for box in objects:
            longer = max(box.bbox[2:]) * scale
            if 0 < longer < stride:
                message = f"bbox {box.bbox} is {longer:.1f} pixels long in training, a cell is {stride}"
                where = f"{photo.where}, {box.where}"
                yield Finding("box-tiny", source.split, str(source.file), where, message, photo, box)


def _about_classes(sources: dict[str, Source]) -> Iterator[Finding]:
    counts = {
        split: Counter(source.names[box.category] for p in source.photos for box in p.boxes if box.category is not None)
        for split, source in sources.items()
    }
    if "train" not in sources:
        return
    train, most = sources["train"], max(counts["train"].values(), default=0)
    for name in train.names:
        count = counts["train"][name]
        where = f"category {name!r}"
        if count == 0:
            yield Finding("class-empty", "train", str(train.file), where, "has no boxes")
        elif count < RARE * most:
            yield Finding("class-rare", "train", str(train.file), where, f"has {count} boxes; the largest has {most}")
    for split in ("val", "test"):
        for name in sorted(counts.get(split, ())):
            if not counts["train"][name]:
                message = f"has {counts[split][name]} boxes in {split} and none in train"
                yield Finding("class-only-in-val", split, str(sources[split].file), f"category {name!r}", message)


def _without_record(sources: dict[str, Source]) -> Iterator[Finding]:
    known = {photo.path.resolve() for source in sources.values() for photo in source.photos}
    seen: set[Path] = set()
    for split, source in sources.items():
        for path in image_files(source.image_folder):
            if path.resolve() not in known and path not in seen:
                seen.add(path)
                yield Finding("image-without-record", split, str(source.file), str(path), "no record names this file")
