"""All checks of an annotated folder, including those that need pixels or several splits."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ..data.checks import numeric_boxes, quick_checks
from ..data.findings import KINDS, Finding
from ..data.image_files import image_files
from ..data.load import find_source, is_rows
from ..data.mask_checks import mask_checks, read_masks
from ..data.records import AnnotatedSplit
from ..data.rows import reinterpret
from ..data.shard_source import ShardSource
from ..data.similarity import Appearance, appearances
from ..data.split_source import Progress, SplitSource
from ..model.processor_size import resized_size
from ..runtime import import_extra
from .duplicates import find_duplicates
from .image_parts import appearances_here, appearances_on_ray, parts_of

SPLITS = ("train", "val", "test")
RARE = 0.02  # fraction of the boxes of the most frequent class
DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}


@dataclass
class CheckResult:
    """The findings, and the records they refer to.

    Attributes:
        source: the folder that was checked, or the id of a dataset on the Hub.
        splits: the records by split.
        findings: errors first.
        seconds: duration of the check.
    """

    source: str
    splits: dict[str, AnnotatedSplit]
    findings: list[Finding]
    seconds: float = 0.0

    @property
    def folder(self) -> Path | None:
        """The source, if it is a folder."""
        return Path(self.source) if Path(self.source).exists() else None

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def counts(self) -> dict[str, int]:
        """Number of findings by code, errors first, then the most frequent."""
        counts = Counter(finding.code for finding in self.findings).most_common()
        return dict(sorted(counts, key=lambda entry: KINDS[entry[0]].severity != "error"))


def check_dataset(
    path: str | Path,
    *,
    files: Mapping[str, str | Path] | None = None,
    images: str | Path | None = None,
    num_queries: int = 100,
    feature_stride: int = 32,
    size: Mapping[str, int | None] = DEFAULT_SIZE,
    image_range: tuple[float, float] | None = None,
    bbox_format: str | None = None,
    crowds_as_objects: bool = False,
    masks: bool = False,
    num_workers: int | None = None,
    streaming: bool = False,
    engine: Literal["ray"] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> CheckResult:
    """Read every record and every image once, as training does, and report all problems.

    Args:
        path, files, images, bbox_format, crowds_as_objects, masks, kwargs: what is checked; see
            [`~hf_detr.data.load_detection_dataset`].
        num_queries: of the model; images with more objects are reported.
        feature_stride: of the model, in pixels; boxes that are smaller at the training resolution are reported.
        size, image_range: of the image processor, `size` in any of its forms: the training resolution.
        num_workers: threads that decode images; None uses one per CPU core.
        streaming: the images stay in shards, see [`~hf_detr.data.load_streamed_dataset`].
        engine: "ray" spreads the images over a Ray cluster, whose nodes see the same files or shards.

    Raises:
        FileNotFoundError: there are no annotations.
        ValueError: the annotations of no split can be read; the message names the file.
    """
    started = time.perf_counter()
    if engine not in (None, "ray"):
        raise ValueError(f'engine must be "ray" or None, got {engine!r}.')
    if engine == "ray":
        import_extra("ray.data", "ray")
        if num_workers is not None:
            raise ValueError("On Ray, each part of the images gets a core: omit num_workers.")
        if not streaming and files is None and is_rows(path):
            raise ValueError(
                f"{path} would be in the cache of this machine, which a cluster does not see: add streaming."
            )
    source = find_source(path, files=files, images=images, masks=masks, streaming=streaming, **kwargs)

    def bar(iterable: Iterable[Any], total: int | None, text: str) -> Any:
        return tqdm(iterable, desc=text, total=total, disable=not progress, leave=False)

    splits, findings = _read_splits(source, lambda headers, total: bar(headers, total, "headers"))
    if not splits and findings:
        raise ValueError(findings[0].message)
    if not splits:
        raise FileNotFoundError(source.describe_missing("train"))
    looks: dict[str, list[Appearance]] = {}
    for name, split in splits.items():
        reinterpret(split, bbox_format, crowds_as_objects)
        if masks:
            read_masks(split.images, lambda images: bar(images, len(split.images), f"{name}: masks"))  # noqa: B023
            findings += mask_checks(split)
        quick = quick_checks(split, bbox_format=bbox_format)
        findings += quick
        looks[name] = _appearances_of(
            source,
            name,
            split,
            engine,
            lambda images: bar(images, len(split.images), f"{name}: images"),  # noqa: B023
            num_workers,
            image_range,
        )
        findings += _image_problems(split, looks[name])
        if not any(finding.code in ("box-xyxy", "box-relative") for finding in quick):
            findings += _limits_of_the_model(split, num_queries, feature_stride, size)
    findings += find_duplicates(splits, looks)
    findings += _class_problems(splits)
    findings += _images_without_record(splits)
    findings.sort(key=lambda finding: finding.severity != "error")
    return CheckResult(source.name, splits, findings, time.perf_counter() - started)


def _read_splits(source: SplitSource, progress: Progress) -> tuple[dict[str, AnnotatedSplit], list[Finding]]:
    splits: dict[str, AnnotatedSplit] = {}
    findings = []
    for name in SPLITS:
        try:
            split = source.find(name, progress)
        except ValueError as error:
            findings.append(Finding("annotation-unreadable", name, source.name, "annotations", str(error)))
            continue
        if split is not None:
            splits[name] = split
    return splits, findings


def _appearances_of(
    source: SplitSource,
    name: str,
    split: AnnotatedSplit,
    engine: str | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    num_workers: int | None,
    image_range: tuple[float, float] | None,
) -> list[Appearance]:
    """What all images of a split look like."""
    if engine is None and not isinstance(source, ShardSource):
        files = [image.path if image.read is None else image.read for image in split.images]
        return appearances(files, progress, num_workers=num_workers, image_range=image_range)
    parts = parts_of(split, source.reader(name) if isinstance(source, ShardSource) else None)
    if engine is None:
        return appearances_here(parts, progress, num_workers=num_workers, image_range=image_range)
    return appearances_on_ray(parts, progress, image_range=image_range)


def _image_problems(split: AnnotatedSplit, looks: list[Appearance]) -> Iterator[Finding]:
    """Images that training cannot read, or reads as nearly one shade, or that are not of the size that the columns of a
    stream have."""
    for image, look in zip(split.images, looks, strict=True):
        if image.header is None or image.header.problem is not None:
            continue  # reported already
        if look.problem is None and look.size != image.size:
            recorded, found = (f"{width} x {height}" for width, height in (image.size, look.size))
            message = f"recorded as {recorded}, but the file has {found}"
            yield Finding("image-size-mismatch", split.split, str(split.file), image.record, message, image)
        code = "image-unsupported" if look.is_unsupported else "image-truncated"
        message = f"{image.path}: {look.problem}"
        if look.problem is None and look.is_dim:
            code, message = "image-dim", f"{image.path}: it uses little of the range of values"
        if look.problem is not None or look.is_dim:
            yield Finding(code, split.split, str(split.file), image.record, message, image)


def _limits_of_the_model(
    split: AnnotatedSplit, num_queries: int, stride: int, size: Mapping[str, int | None]
) -> Iterator[Finding]:
    """Images with more objects than queries, and boxes smaller than one location of the feature map."""
    for image in split.images:
        objects = [box for box in numeric_boxes(image) if not box.iscrowd]
        if len(objects) > num_queries:
            message = f"{len(objects)} objects, more than {num_queries} queries"
            yield Finding("objects-exceed-queries", split.split, str(split.file), image.record, message, image)
        if image.header is None or image.header.problem:
            continue
        width, height = image.size
        resized_height, resized_width = resized_size((height, width), size)
        for box in objects:
            longer = max(box.bbox[2] * resized_width / width, box.bbox[3] * resized_height / height)
            if 0 < longer < stride:
                message = (
                    f"the longer side of bbox {box.bbox} is {longer:.1f} pixels in training; the stride is {stride}"
                )
                record = f"{image.record}, {box.record}"
                yield Finding("box-tiny", split.split, str(split.file), record, message, image, box)


def _class_problems(splits: dict[str, AnnotatedSplit]) -> Iterator[Finding]:
    if "train" not in splits:
        return
    counts = {
        name: Counter(
            split.names[box.category]
            for image in split.images
            for box in image.boxes
            if box.category is not None and not box.iscrowd
        )
        for name, split in splits.items()
    }
    train, largest = splits["train"], max(counts["train"].values(), default=0)
    for name in train.names:
        count = counts["train"][name]
        record = f"category {name!r}"
        if count == 0:
            yield Finding("class-empty", "train", str(train.file), record, "has no boxes")
        elif count < RARE * largest:
            message = f"has {count} boxes; the most frequent class has {largest}"
            yield Finding("class-rare", "train", str(train.file), record, message)
    if "val" in splits and splits["val"].images and not counts["val"]:
        images = len(splits["val"].images)
        message = f"none of the {images} images has a box that counts, so nothing can be measured"
        yield Finding("boxes-missing", "val", str(splits["val"].file), "validation", message)
    for split in ("val", "test"):
        for name in sorted(counts.get(split, ())):
            if not counts["train"][name]:
                message = f"has {counts[split][name]} boxes in {split} and none in train"
                yield Finding("class-not-in-train", split, str(splits[split].file), f"category {name!r}", message)


def _images_without_record(splits: dict[str, AnnotatedSplit]) -> Iterator[Finding]:
    images = [image for split in splits.values() for image in split.images]
    known = {image.path.resolve() for image in images}
    known |= {image.segment_map.path.resolve() for image in images if image.segment_map is not None}
    reported: set[Path] = set()
    for name, split in splits.items():
        if any(image.read is not None for image in split.images):
            continue
        for path in image_files(split.image_folder):
            if path.resolve() not in known and path not in reported:
                reported.add(path)
                yield Finding("image-unannotated", name, str(split.file), str(path), "no record names this file")
