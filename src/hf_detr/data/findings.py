"""What can be wrong with an annotated folder: the kinds of findings, and what becomes of them when it is loaded.

An "error" makes training wrong or impossible, and such data are not loaded; a "warning" should be reviewed.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from transformers.utils import logging

from ..runtime.wording import more_about
from .records import AnnotatedSplit, BoxRecord, ImageRecord

logger = logging.get_logger(__name__)


class Kind(NamedTuple):
    """One kind of finding: "error" or "warning", what it is, and what to do."""

    severity: str
    description: str
    fix: str


KINDS: dict[str, Kind] = {
    code: Kind(*texts)
    for code, texts in {
        "annotation-unreadable": ("error", "an annotation file or line cannot be parsed", "Correct or remove it."),
        "image-record-incomplete": ("error", "an image record has no id or file name", "Complete the record."),
        "image-id-duplicate": ("error", "two image records have the same id", "Give each image a unique id."),
        "image-record-duplicate": (
            "error",
            "several image records name the same file",
            "The objects of each would be background for the others. Merge the records.",
        ),
        "image-name-stale": (
            "warning",
            "an annotation file names another image than the one that is called like it",
            "Correct the name, if the wrong image is taken.",
        ),
        "image-missing": ("error", "the image file does not exist", "Add the file, or remove the record."),
        "image-unreadable": ("error", "the file cannot be opened as an image", "Replace it, or remove the record."),
        "image-truncated": ("error", "the image file is truncated or corrupt", "Replace the file."),
        "image-unsupported": (
            "error",
            "training cannot read the values of the image",
            "Set image_range=(black, white) of the image processor (--image_range BLACK WHITE), or convert the file.",
        ),
        "image-dim": (
            "warning",
            "the image has more than 8 bits and becomes nearly one shade of grey",
            "Set image_range=(black, white) of the image processor (--image_range BLACK WHITE): 0 4095 for 12 bits.",
        ),
        "image-size-mismatch": (
            "error",
            "the recorded size differs from the size of the file",
            "The boxes would be misplaced. Correct the record or the file, or write a corrected copy with --fix. "
            + more_about("boxes-are-shifted"),
        ),
        "image-size-before-exif": (
            "error",
            "the recorded size is the size before the EXIF orientation is applied",
            "The boxes would be misplaced. Remove the orientation from the file, or rotate the record and its boxes.",
        ),
        "box-not-numbers": ("error", "a box is not four finite numbers", "Correct or remove the record."),
        "box-empty": ("error", "a box has no area", "Correct or remove the record."),
        "box-outside": ("error", "a box is outside its image", "Correct or remove the record."),
        "box-relative": (
            "error",
            "boxes are in [0, 1]",
            "They must be in pixels: multiply by the width and height of the image.",
        ),
        "box-xyxy": (
            "error",
            "boxes are stored as [x_min, y_min, x_max, y_max]",
            'They must be [x_min, y_min, width, height]. Load them with bbox_format="xyxy".',
        ),
        "category-unknown": ("error", "the category of a box is not defined", "Add it, or correct the record."),
        "category-name-duplicate": ("error", "two categories have the same name", "Merge or rename them."),
        "annotation-orphan": ("warning", "an annotation belongs to no image", "Add the image, or remove the record."),
        "crowds-only": (
            "error",
            "nearly all objects are marked as crowds (iscrowd, ignore or difficult), which are not learned",
            "If they are ordinary objects, as in some exports of masks, load them with crowds_as_objects=True "
            "(--crowds_as_objects).",
        ),
        "annotation-unused": (
            "warning",
            "an annotation is not used",
            "If it should be, name its file with --train or --val, or correct it.",
        ),
        "box-partly-outside": ("warning", "a box extends beyond its image", "It is clipped in training."),
        "annotation-id-duplicate": ("warning", "two annotations have the same id", "Ids should be unique."),
        "area-wrong": (
            "warning",
            "the area is not positive, or larger than the box",
            "Correct it: COCO's metrics for small, medium and large objects use it.",
        ),
        "mask-missing": (
            "error",
            "an object has no mask",
            "Add its segmentation, or load the data without masks.",
        ),
        "mask-empty": ("error", "a mask has no pixels in its image", "Correct or remove the record."),
        "mask-invalid": (
            "error",
            "a mask cannot be read, or is not of the size of its image",
            "Correct it: polygons in pixels, a run-length encoding of the image's height and width, or a PNG of them.",
        ),
        "segments-differ": (
            "error",
            "the ids of segments in a PNG and in the JSON differ",
            "Write both again: each colour of the PNG but black needs a record in segments_info, and the reverse.",
        ),
        "mask-outside-box": (
            "warning",
            "a box and its mask disagree",
            "Correct one of them: after a crop, boxes are those of the masks.",
        ),
        "mask-overlap": (
            "warning",
            "segments of a panoptic image overlap",
            "A pixel belongs to one segment: correct the masks. PQ cannot be measured against such an image.",
        ),
        "thing-without-box": ("warning", "an object has a mask and no box", "The box of its mask is taken."),
        "box-duplicate": ("warning", "two boxes of the same category are identical", "Remove one."),
        "image-exif-rotated": (
            "warning",
            "the image has an EXIF orientation",
            "Make sure that the boxes fit the image as shown.",
        ),
        "image-unannotated": ("warning", "an image file has no record", "Annotate it, or move it elsewhere."),
        "image-duplicate": ("warning", "an image occurs twice in a split", "Remove one."),
        "image-similar": (
            "warning",
            "an image looks like one of another split, with other boxes or nothing on it",
            "Make sure that it is another one.",
        ),
        "image-leaked": (
            "error",
            "an image is in two splits",
            "Remove it from one; otherwise the metrics are too optimistic. "
            + more_about("good-in-validation-bad-on-new-images"),
        ),
        "objects-exceed-queries": (
            "warning",
            "an image has more objects than the model has queries",
            "Increase num_queries.",
        ),
        "box-tiny": (
            "warning",
            "a box is smaller than one location of the feature map at the training resolution",
            "Train at a higher resolution or with a smaller stride.",
        ),
        "class-empty": ("warning", "a class has no boxes", "It cannot be learned."),
        "class-rare": ("warning", "a class has few boxes", "Its AP will be low; collect more."),
        "class-not-in-train": ("error", "a class occurs in validation but not in training", "It cannot be learned."),
        "boxes-missing": ("error", "no image has a box", "Check where the annotations are expected."),
        "split-empty": ("error", "there are no images", "Check the folder."),
    }.items()
}


MASK_ERRORS = ("mask-missing", "mask-empty", "mask-invalid", "segments-differ")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where.

    Attributes:
        code: a key of `KINDS`.
        split, file, record: where; `file` is the annotation file or folder.
        message: details.
        image, box: the image and the object concerned, if any.
        other_image: the image that this one duplicates, if any.
    """

    code: str
    split: str
    file: str
    record: str
    message: str
    image: ImageRecord | None = None
    box: BoxRecord | None = None
    other_image: ImageRecord | None = None

    @property
    def severity(self) -> str:
        return KINDS[self.code].severity

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.message}"


def drop_few_invalid(split: AnnotatedSplit, findings: list[Finding], max_invalid: float) -> list[Finding]:
    """Drop objects whose box or mask is invalid from the split, with a warning, if they are few; and images whose map
    of segments cannot be read, which would be background without them.

    Args:
        max_invalid: fraction of the boxes that counts as few. From one in a hundred on, a single box always does.

    Returns:
        the findings without those of the dropped boxes.
    """
    codes = ("box-empty", "box-outside", "box-not-numbers", "category-unknown", *MASK_ERRORS)
    invalid = [finding for finding in findings if finding.code in codes and finding.box is not None]
    limit = max_invalid * sum(len(image.boxes) for image in split.images)
    dropped = {id(finding.box) for finding in invalid}
    if not invalid or len(dropped) > max(limit, 1 if max_invalid >= 0.01 else 0):
        return findings
    unreadable = [image for image in split.images if has_unreadable_map(image)]
    split.images = [image for image in split.images if not has_unreadable_map(image)]
    for image in split.images:
        image.boxes = [box for box in image.boxes if id(box) not in dropped]
    examples = "; ".join(f"{finding.record}: {finding.message}" for finding in invalid[:5])
    images = f", with {len(unreadable)} images whose segments cannot be read" if unreadable else ""
    logger.warning(f"{split.file}: {len(dropped)} invalid {_kind(invalid)} are dropped{images}. {examples}")
    return [finding for finding in findings if id(finding.box) not in dropped]


def has_unreadable_map(image: ImageRecord) -> bool:
    """Whether the masks of an image were to be read from a map of segments that cannot be read."""
    of_map = image.segment_map is not None and bool(image.boxes)
    return of_map and all((box.mask_problem or ("",))[0] == "mask-invalid" for box in image.boxes)


def _kind(invalid: list[Finding]) -> str:
    return "objects" if any(finding.code in MASK_ERRORS for finding in invalid) else "boxes"


def log_warnings(split: AnnotatedSplit, findings: list[Finding]) -> None:
    """One line in the log with the number of warnings of each kind."""
    counts = Counter(KINDS[finding.code].description for finding in findings if finding.severity == "warning")
    if counts:
        listed = "; ".join(f"{description} ({count} times)" for description, count in counts.most_common())
        logger.warning(f"{split.file}: {listed}. Run examples/check_dataset.py to list them.")


def raise_on_errors(findings: list[Finding]) -> None:
    """Raise a ValueError with the first errors of each kind and their fix, if there are any."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    lines = []
    for code, count in Counter(finding.code for finding in errors).most_common():
        examples = [finding for finding in errors if finding.code == code][:3]
        listed = "; ".join(f"{finding.record}: {finding.message}" for finding in examples)
        more = f" (and {count - len(examples)} more)" if count > len(examples) else ""
        lines.append(f"  {listed}{more}. {KINDS[code].fix}")
    lines.append("`python examples/check_dataset.py DATASET` lists all; --fix OUT also writes a cleaned copy.")
    raise ValueError(f"{errors[0].file}: {len(errors)} problems.\n" + "\n".join(lines))
