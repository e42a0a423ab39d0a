"""All checks of an annotated folder, including those that need pixels or several splits."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.checks import numeric_boxes, quick_checks
from ..data.findings import KINDS, Finding
from ..data.formats import describe_layouts, find_annotations
from ..data.image_files import image_files
from ..data.processor_size import resized_size
from ..data.records import AnnotatedSplit, read_headers
from ..runtime.extras import import_extra
from .duplicates import DecodedImage, decode_images, find_duplicates

SPLITS = ("train", "val", "test")
RARE = 0.02  # fraction of the boxes of the most frequent class
DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}


@dataclass
class CheckResult:
    """The findings, and the records they refer to.

    Attributes:
        splits: the records by split.
        findings: errors first.
        seconds: duration of the check.
    """

    folder: Path
    splits: dict[str, AnnotatedSplit]
    findings: list[Finding]
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def counts(self) -> dict[str, int]:
        """Number of findings by code, errors first, then the most frequent."""
        counts = Counter(finding.code for finding in self.findings).most_common()
        return dict(sorted(counts, key=lambda entry: KINDS[entry[0]].severity != "error"))


def check_dataset(
    folder: str | Path,
    *,
    num_queries: int = 100,
    feature_stride: int = 32,
    size: Mapping[str, int | None] = DEFAULT_SIZE,
    bbox_format: str | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> CheckResult:
    """Read every record and every image once, in parallel, and report all problems.

    Args:
        folder: annotated in any of the formats of `hf_detr.data.formats`.
        num_queries: of the model; images with more objects are reported.
        feature_stride: of the model, in pixels; boxes that are smaller at the training resolution are reported.
        size: of the image processor, any of its forms: the training resolution.
        bbox_format: how boxes are stored, if known; see [`~hf_detr.data.load_detection_dataset`].
        num_workers: processes that decode images; None uses one per CPU core.

    Raises:
        FileNotFoundError: the folder has no annotations.
        ImportError: imagehash is not installed; the message names the extra that installs it.
    """
    import_extra("imagehash", "doctor")  # needed in the workers, where the error would come late
    started = time.perf_counter()
    folder = Path(folder)
    splits, findings = _read_splits(folder)
    if not splits and not findings:
        raise FileNotFoundError(f"{folder} has no annotations. Looked for {describe_layouts('train')}.")

    def bar(iterable: Iterable[Any], text: str, total: int) -> Any:
        return tqdm(iterable, desc=text, total=total, disable=not progress, leave=False)

    decoded: dict[str, list[DecodedImage]] = {}
    for name, split in splits.items():
        count = len(split.images)
        read_headers(split.images, lambda headers: bar(headers, f"{name}: headers", count))  # noqa: B023
        quick = quick_checks(split, bbox_format=bbox_format)
        findings += quick
        decoded[name] = decode_images(split, num_workers, lambda images: bar(images, f"{name}: images", count))  # noqa: B023
        findings += _truncated_images(split, decoded[name])
        if not any(finding.code in ("box-xyxy", "box-relative") for finding in quick):
            findings += _limits_of_the_model(split, num_queries, feature_stride, size)
    findings += find_duplicates(splits, decoded)
    findings += _class_problems(splits)
    findings += _images_without_record(splits)
    findings.sort(key=lambda finding: finding.severity != "error")
    return CheckResult(folder, splits, findings, time.perf_counter() - started)


def _read_splits(folder: Path) -> tuple[dict[str, AnnotatedSplit], list[Finding]]:
    splits: dict[str, AnnotatedSplit] = {}
    findings = []
    for name in SPLITS:
        try:
            split = find_annotations(folder, name)
        except ValueError as error:
            findings.append(Finding("annotation-unreadable", name, str(folder), "annotations", str(error)))
            continue
        if split is not None:
            splits[name] = split
    return splits, findings


def _truncated_images(split: AnnotatedSplit, decoded: list[DecodedImage]) -> Iterator[Finding]:
    for image, pixels in zip(split.images, decoded, strict=True):
        if pixels.problem is not None and image.header is not None and image.header.problem is None:
            message = f"{image.path}: {pixels.problem}"
            yield Finding("image-truncated", split.split, str(split.file), image.record, message, image)


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
            split.names[box.category] for image in split.images for box in image.boxes if box.category is not None
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
    for split in ("val", "test"):
        for name in sorted(counts.get(split, ())):
            if not counts["train"][name]:
                message = f"has {counts[split][name]} boxes in {split} and none in train"
                yield Finding("class-not-in-train", split, str(splits[split].file), f"category {name!r}", message)


def _images_without_record(splits: dict[str, AnnotatedSplit]) -> Iterator[Finding]:
    known = {image.path.resolve() for split in splits.values() for image in split.images}
    reported: set[Path] = set()
    for name, split in splits.items():
        for path in image_files(split.image_folder):
            if path.resolve() not in known and path not in reported:
                reported.add(path)
                yield Finding("image-unannotated", name, str(split.file), str(path), "no record names this file")
