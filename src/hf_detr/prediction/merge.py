"""Merging the shards of a job into COCO's JSON files, a few rows at a time."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ..data.masks import decode_masks, to_coco_rle
from ..data.panoptic_export import PanopticWriter
from ..runtime import atomic_write
from .drawings import SEGMENTS_MARK, has_mark, png_info
from .job import PredictionJob
from .shards import done_ids, read_shards

NO_IMAGES = '{"images": []'  # how `images.json` begins then


@dataclass(frozen=True)
class Summary:
    """Counts over a job.

    Attributes:
        objects: detections in all images.
        images: images that could be read.
        unreadable: files that could not be read.
        errors: (absolute path, reason) of the first of these files.
    """

    objects: int
    images: int
    unreadable: int
    errors: list[tuple[str, str]]


def is_unreadable(job: PredictionJob) -> bool:
    """Whether no image of a finished job could be read."""
    with job.images_file.open(encoding="utf-8") as file:
        return file.read(len(NO_IMAGES)) == NO_IMAGES


def merge_shards(job: PredictionJob, max_errors: int = 100) -> Summary:
    """Write `images.json` and `detections.json`; of a job with masks also `masks.json`, and `panoptic.json` with PNGs.

    Images have the ids of the annotations, if there are any.

    `detections.json` contains COCO results: `image_id`, `category_id`, `bbox` [x_min, y_min, width, height] in pixels
    and `score`; the order of images is arbitrary. `images.json` contains the matching COCO `images` and `categories`,
    and `unreadable`: `id`, `file_name` and `error` of each file that could not be read.

    Args:
        max_errors: maximum length of `Summary.errors`.

    Raises:
        ValueError: images of the work list are in no shard, or in two; the message tells how to continue.
    """
    missing = np.setdiff1d(job.image_ids(), done_ids(job.shards))
    if len(missing):
        raise ValueError(f"{len(missing)} images of {job.folder} are not done. Run the same command again.")
    job.detections_file.unlink(missing_ok=True)  # of fewer images; it marks the job as finished
    source_ids = job.source_ids()
    images = unreadable = objects = 0
    errors: list[tuple[str, str]] = []

    def readable_images() -> Iterator[dict[str, Any]]:
        nonlocal images
        for row in read_shards(job.shards, ["image_id", "file", "width", "height", "error"]):
            if row["error"] is None:
                images += 1
                size = {"width": row["width"], "height": row["height"]}
                yield {"id": source_ids[row["image_id"]], "file_name": row["file"], **size}

    def unreadable_images() -> Iterator[dict[str, Any]]:
        nonlocal unreadable
        for row in read_shards(job.shards, ["image_id", "file", "error"]):
            if row["error"] is not None:
                unreadable += 1
                if len(errors) < max_errors:
                    errors.append((str(job.image_folder / row["file"]), row["error"]))
                yield {"id": source_ids[row["image_id"]], "file_name": row["file"], "error": row["error"]}

    def detections() -> Iterator[dict[str, Any]]:
        nonlocal objects
        for row in read_shards(job.shards, ["image_id", "scores", "label_ids", "boxes"]):
            for score, label_id, box in zip(
                *(row[name] or () for name in ("scores", "label_ids", "boxes")), strict=True
            ):
                objects += 1
                left, top, right, bottom = box
                yield {
                    "image_id": source_ids[row["image_id"]],
                    "category_id": job.categories[label_id]["id"],
                    "bbox": [round(value, 5) for value in (left, top, right - left, bottom - top)],
                    "score": round(score, 6),
                }

    with atomic_write(job.images_file) as file:
        file.write('{"images": ')
        _write_list(file, readable_images())
        file.write(f',\n"categories": {json.dumps(job.categories)},\n"unreadable": ')
        _write_list(file, unreadable_images())
        file.write("}\n")
    if "instance" in job.mask_kinds:
        with atomic_write(job.masks_file) as file:
            _write_list(file, _masks(job, source_ids))
            file.write("\n")
    if "panoptic" in job.mask_kinds:
        _write_panoptic(job, source_ids)
    with atomic_write(job.detections_file) as file:  # last, because it marks the job as finished
        _write_list(file, detections())
        file.write("\n")
    return Summary(objects, images, unreadable, errors)


def _masks(job: PredictionJob, source_ids: dict[int, Any]) -> Iterator[dict[str, Any]]:
    for row in read_shards(job.shards, ["image_id", "width", "height", "segments"]):
        for segment in row["segments"] or ():
            if segment["kind"] == "instance":
                yield {
                    "image_id": source_ids[row["image_id"]],
                    "category_id": job.categories[segment["label_id"]]["id"],
                    "segmentation": to_coco_rle(segment["counts"], (row["height"], row["width"])),
                    "score": round(segment["score"], 6),
                }


def _write_panoptic(job: PredictionJob, source_ids: dict[int, Any]) -> None:
    folder = job.panoptic_file.with_suffix("")
    job.panoptic_file.unlink(missing_ok=True)  # of fewer images
    for path in folder.glob("*.png"):  # the folder may have other files, such as drawings of images in one of this name
        if has_mark(path, SEGMENTS_MARK):
            path.unlink()
    others = [path.name for path in folder.glob("*")]
    categories = [entry | {"isthing": int(entry["name"] not in job.stuff_labels)} for entry in job.categories]
    writer = PanopticWriter(job.panoptic_file, categories, taken=others, png_info=png_info(SEGMENTS_MARK))
    for row in read_shards(job.shards, ["image_id", "file", "width", "height", "segments", "error"]):
        if row["error"] is not None:
            continue
        found = [segment for segment in row["segments"] if segment["kind"] == "panoptic"]
        size = (row["height"], row["width"])
        ids = np.zeros(size, dtype=np.int64)
        for number, mask in enumerate(decode_masks([segment["counts"] for segment in found], size).numpy(), start=1):
            ids[mask] = number
        segments = [
            {
                "id": number,
                "category_id": job.categories[segment["label_id"]]["id"],
                "score": round(segment["score"], 6),
            }
            for number, segment in enumerate(found, start=1)
        ]
        image = {"id": source_ids[row["image_id"]], "file_name": row["file"], "width": size[1], "height": size[0]}
        writer.add(image, ids, segments)
    writer.close()


def _write_list(file: IO[str], records: Iterable[dict[str, Any]]) -> None:
    """A JSON list with one record per line."""
    file.write("[")
    for number, record in enumerate(records):
        file.write(f"{',' if number else ''}\n{json.dumps(record)}")
    file.write("]")
