"""What can be wrong with an annotated folder: the kinds of findings, and the checks that need no pixels.

An "error" makes training wrong or impossible; the loader refuses such data. A "warning" is worth a look.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from transformers.utils import logging

from .source import Box, Photo, Source

logger = logging.get_logger(__name__)

TOLERANCE = 1.0  # pixels by which a box may reach over the edge without a word: rounding
RELATIVE = 1.05  # the largest value of a box that is taken for relative to the image, if
MOST = 0.98  # of all boxes are like that; the same for boxes that are corners
FEW = 0.001  # of all boxes: so many that make no sense are left out when loading, with a word, like COCO's own two

KINDS: dict[str, tuple[str, str, str]] = {
    # code: (severity, what it is, what to do)
    "annotation-unreadable": ("error", "an annotation file or line cannot be read", "Correct or remove it."),
    "image-record": ("error", "an image record lacks its id or file name", "Complete the record."),
    "image-id-twice": ("error", "two image records share an id", "Give each image an id of its own."),
    "image-missing": ("error", "the image file is not there", "Put the file there, or remove the record."),
    "image-unreadable": ("error", "the file is no image that can be opened", "Replace the file, or remove the record."),
    "image-truncated": ("error", "the image file ends too early or is damaged", "Replace the file."),
    "image-size": ("error", "the recorded size is not that of the file", "Boxes would be off. Correct record or file."),
    "image-turned": (
        "error",
        "the recorded size is that before the EXIF orientation is applied",
        "Boxes would be off. Remove the orientation from the file, or turn record and boxes.",
    ),
    "box-not-numbers": ("error", "a box is not four finite numbers", "Correct or remove the record."),
    "box-empty": ("error", "a box has no area", "Correct or remove the record."),
    "box-outside": ("error", "a box lies outside its image", "Correct or remove the record."),
    "box-relative": (
        "error",
        "boxes are in [0, 1]",
        "They must be in pixels: multiply by width and height of the image.",
    ),
    "box-xyxy": (
        "error",
        "boxes are stored as [x_min, y_min, x_max, y_max]",
        'They must be [x_min, y_min, width, height]. Load them with bbox_format="xyxy".',
    ),
    "category-unknown": ("error", "the category of a box has no name", "Add the category, or correct the record."),
    "category-name-twice": ("error", "two categories have one name", "Merge or rename them."),
    "annotation-without-image": ("error", "an annotation belongs to no image", "Add the image, or remove it."),
    "box-over-edge": ("warning", "a box reaches over the edge of its image", "It is clipped in training."),
    "annotation-id-twice": ("warning", "two annotations share an id", "Ids should be unique."),
    "area-wrong": ("warning", "the area is not positive or larger than the box", "Correct it; COCO sorts sizes by it."),
    "box-twice": ("warning", "two equal boxes of one category in an image", "Remove one."),
    "image-exif": ("warning", "the image is turned by its EXIF orientation", "Fine if the boxes fit it as shown."),
    "image-without-record": ("warning", "an image file has no record", "Annotate it or move it away."),
    "image-twice": ("warning", "the same image twice in a split", "Remove one."),
    "image-in-both": ("error", "the same image in training and validation", "Remove it from one, or results lie."),
    "objects-too-many": ("warning", "an image has more objects than the model has queries", "Raise num_queries."),
    "box-tiny": (
        "warning",
        "a box is smaller than a cell of the feature map at the training size",
        "Train at a larger size or a smaller stride.",
    ),
    "class-empty": ("warning", "a class has no boxes", "It cannot be learned."),
    "class-rare": ("warning", "a class has few boxes", "Expect little of it, or collect more."),
    "class-only-in-val": ("error", "a class is in validation but not in training", "It cannot be learned."),
    "boxes-none": ("error", "no image has a box", "Check where the annotations are looked for."),
    "split-empty": ("error", "there are no images", "Check the folder."),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with the place to look at.

    Attributes:
        code: a key of `KINDS`.
        split, file, record: where; `file` is the annotation file or folder.
        message: what exactly.
        photo, box: the image and the object it is about, if it is about one.
        twin: the other image, where two are the same.
    """

    code: str
    split: str
    file: str
    record: str
    message: str
    photo: Photo | None = None
    box: Box | None = None
    twin: Photo | None = None

    @property
    def severity(self) -> str:
        return KINDS[self.code][0]

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.message}"


def quick_checks(source: Source, *, bbox_format: str | None = None) -> list[Finding]:
    """All checks of one split that need its records and the headers of its images, which must have been read.

    Args:
        bbox_format: None also asks whether the boxes are stored in another form than ours; otherwise that is known.
    """

    def find(code: str, record: str, message: str, photo: Photo | None = None, box: Box | None = None) -> Finding:
        return Finding(code, source.split, str(source.file), record, message, photo, box)

    findings = [find(code, record, message) for code, record, message in source.stray]
    if not source.photos and not findings:
        findings.append(find("split-empty", source.kind, "there are no images"))
    if source.split == "train" and source.photos and not any(photo.boxes for photo in source.photos):
        findings.append(find("boxes-none", source.kind, f"{len(source.photos)} images without a single box"))
    first: dict[int, Photo] = {}
    for photo in source.photos:
        if first.setdefault(photo.id, photo) is not photo:
            findings.append(find("image-id-twice", photo.where, f"has the id of {first[photo.id].where}", photo))
    for name, count in Counter(source.names).items():
        if count > 1:
            findings.append(find("category-name-twice", "categories", f"{count} categories are called {name!r}"))
    suspicion = _whole_set_is_off(source) if bbox_format is None else None
    if suspicion is not None:
        findings.append(find(*suspicion))
    for photo in source.photos:
        findings += [find(code, photo.where, message, photo) for code, message in _photo_checks(photo)]
        size = photo.size if photo.header is None or photo.header.problem else photo.header.size
        seen: set[tuple[object, ...]] = set()
        for box in photo.boxes:
            where = f"{photo.where}, {box.where}"
            problems = list(box_checks(box, None if suspicion else size))
            findings += [find(code, where, message, photo, box) for code, message in problems]
            if not problems:
                key = (box.category, *box.bbox)
                if key in seen:
                    findings.append(find("box-twice", where, f"bbox {box.bbox} is there twice", photo, box))
                seen.add(key)
    return findings


def _photo_checks(photo: Photo) -> Iterator[tuple[str, str]]:
    header = photo.header
    if header is None:
        return
    if header.problem is not None:
        missing = not photo.path.exists()
        yield "image-missing" if missing else "image-unreadable", f"{photo.path}: {header.problem}"
        return
    if photo.size is not None and photo.size != header.size:
        told = f"recorded as {photo.size[0]} x {photo.size[1]}, the file has {header.size[0]} x {header.size[1]}"
        turned = photo.size == header.stored
        yield "image-turned" if turned else "image-size", told + (" as it is shown" if turned else "")
    elif header.orientation != 1:
        yield "image-exif", f"EXIF orientation {header.orientation}"


def box_checks(box: Box, size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    """Codes and messages for one box of an image of this (width, height); None leaves out what needs the size."""
    if box.problem is not None:
        yield "box-not-numbers", box.problem
        return
    if box.category is None:
        yield "category-unknown", f"there is no category {box.category_name!r}"
        return
    values = box.bbox
    numbers = isinstance(values, (list, tuple)) and len(values) == 4
    if not numbers or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        yield "box-not-numbers", f"bbox {values} is not four finite numbers"
        return
    x, y, width, height = values
    if width <= 0 or height <= 0:
        yield "box-empty", f"bbox {values} has no area"
        return
    if size is not None:
        over = max(-x, -y, x + width - size[0], y + height - size[1])
        if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
            yield "box-outside", f"bbox {values} lies outside its image of {size[0]} x {size[1]}"
            return
        if over > TOLERANCE:
            yield "box-over-edge", f"bbox {values} reaches {over:.1f} pixels over the edge of {size[0]} x {size[1]}"
    if box.area is not None and not 0 < box.area <= width * height * 1.01 + 1:
        yield "area-wrong", f"area {box.area} of bbox {values}, whose own is {width * height:.1f}"


def _whole_set_is_off(source: Source) -> tuple[str, str, str] | None:
    """A frame that all boxes share and that is not ours. It is only said where it is certain: read the way that is
    meant, boxes break their images, and read the other way not one does."""
    boxes = [
        (photo.header.size, box.bbox)
        for photo in source.photos
        if photo.header is not None and photo.header.problem is None
        for box in photo.boxes
        if not [code for code, _ in box_checks(box, None) if code in ("box-not-numbers", "category-unknown")]
    ]
    if len(boxes) < 5:
        return None
    if sum(max(map(abs, bbox)) <= RELATIVE for _, bbox in boxes) >= MOST * len(boxes):
        return "box-relative", f"all {len(boxes)} boxes", f"most values are at most {RELATIVE}"
    over = sum(x + w > width + TOLERANCE or y + h > height + TOLERANCE for (width, height), (x, y, w, h) in boxes)
    fit = sum(
        x < right <= width + TOLERANCE and y < bottom <= height + TOLERANCE
        for (width, height), (x, y, right, bottom) in boxes
    )
    if fit >= MOST * len(boxes) and over >= max(3, len(boxes) // 10):
        message = f"read as [x, y, width, height], {over} of {len(boxes)} reach out of their images; as corners, "
        return "box-xyxy", f"all {len(boxes)} boxes", message + ("none" if fit == len(boxes) else f"{len(boxes) - fit}")
    return None


def leave_out_few(source: Source, findings: list[Finding]) -> list[Finding]:
    """Take boxes that make no sense out of the source if they are fewer than one in a thousand, and say so; returns
    the other findings."""
    bad = [f for f in findings if f.code in ("box-empty", "box-outside", "box-not-numbers") and f.box is not None]
    if not bad or len(bad) > FEW * sum(len(photo.boxes) for photo in source.photos):
        return findings
    gone = {id(finding.box) for finding in bad}
    for photo in source.photos:
        photo.boxes = [box for box in photo.boxes if id(box) not in gone]
    logger.warning(
        f"{source.file}: {len(bad)} boxes are left out. {'; '.join(f'{f.record}: {f.message}' for f in bad[:5])}"
    )
    return [finding for finding in findings if id(finding.box) not in gone]


def mention(source: Source, findings: list[Finding]) -> None:
    """Say in one line of the log what is worth a look."""
    counts = Counter(KINDS[finding.code][1] for finding in findings if finding.severity == "warning")
    if counts:
        listed = "; ".join(f"{count} times: {what}" for what, count in counts.most_common())
        logger.warning(f"{source.file}: {listed}. examples/check_dataset.py shows where.")


def refuse(findings: list[Finding], *, on_disk: bool = True) -> None:
    """Raise a ValueError with the first few of the findings that would break training, by kind, and the fix of each."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    lines = []
    for code, count in Counter(finding.code for finding in errors).most_common():
        examples = [f for f in errors if f.code == code][:3]
        more = f" (and {count - len(examples)} more)" if count > len(examples) else ""
        lines.append(f"  {'; '.join(f'{f.record}: {f.message}' for f in examples)}{more}. {KINDS[code][2]}")
    doctor = "\n`python examples/check_dataset.py FOLDER` shows all of them; with --fix OUT it writes a cleaned copy."
    raise ValueError(f"{errors[0].file}: {len(errors)} problems.\n" + "\n".join(lines) + (doctor if on_disk else ""))
