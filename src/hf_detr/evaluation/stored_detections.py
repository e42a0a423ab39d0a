"""Detections in files, to measure without a model: those of a prediction job, or COCO results of any program."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch
from datasets import Image

from ..data.checks import doubtful_boxes
from ..model.annotations import canonical_id
from ..runtime.wording import listed, shortened
from .coco_evaluator import CocoEvaluator
from .coco_metrics import MAX_DETECTIONS
from .model_evaluation import ModelEvaluation

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset

FIELDS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True)
class PredictedImages:
    """The images of a prediction job, and what its settings say of its detections.

    Attributes:
        folder: of the job.
        image_folder: that file names are relative to.
        images: records `id`, `file_name`, `width` and `height` of the images that were read.
        sizes: file name to size of the file in bytes.
        categories: in the order of class ids.
        threshold: the score below which nothing was stored, or "per_class".
        limit: detections that were stored per image at most; None: all.
        mask_kinds: the masks that were stored, too, see [`~hf_detr.prediction.SegmentOptions`].
    """

    folder: Path
    image_folder: Path
    images: list[dict[str, Any]]
    sizes: dict[str, int]
    categories: list[dict[str, Any]]
    threshold: float | str
    limit: int | None
    mask_kinds: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "PredictedImages":
        from ..prediction.drawings import file_as_text  # not before it is needed: prediction has many parts
        from ..prediction.work_list import WORKLIST

        for name in ("job.json", WORKLIST, "images.json", "detections.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not the folder of a finished prediction job: it has no {name}.")
        try:
            job, results = (json.loads((folder / name).read_text("utf-8")) for name in ("job.json", "images.json"))
            work = pq.read_table(folder / WORKLIST, columns=["path", "bytes"])
            settings = job["settings"]
            limit = 100 if settings.get("config.class_activation") == "sigmoid" else None
            return cls(
                folder,
                Path(job["image_folder"]),
                [{key: image[key] for key in ("id", "file_name", "width", "height")} for image in results["images"]],
                dict(zip(map(file_as_text, work["path"].to_pylist()), work["bytes"].to_pylist(), strict=True)),
                [{key: entry[key] for key in ("id", "name")} for entry in results["categories"]],
                settings["threshold"],
                settings.get("top_k") or limit,
                tuple(settings.get("masks") or ()),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"The files of the prediction job in {folder} were changed ({error!r}).") from error

    def notes(self, max_detections: int) -> list[str]:
        notes = []
        if self.threshold != 0:
            kept = "the threshold of the class" if self.threshold == "per_class" else self.threshold
            notes.append(
                f"Only detections with a score above {kept} were stored, which lowers AP: predict with --threshold 0."
            )
        if self.limit is not None and self.limit < max_detections:
            notes.append(
                f"At most {self.limit} detections per image were stored, which lowers AP: predict with --top_k "
                f"{max_detections}."
            )
        return notes

    def segments(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The id of each image, as in `images`, and each of its segments, from the shards of the job."""
        from ..prediction.shards import read_shards

        ids = {image["file_name"]: image["id"] for image in self.images}
        for row in read_shards(self.folder / "shards", ["file", "segments"]):
            for segment in row["segments"] or ():
                yield ids[row["file"]], segment

    def ids_in(self, dataset: "DetectionDataset") -> dict[Any, Any]:
        """The data set's image id by the id of the job. An image is the same if it is the same file, or one elsewhere
        with the same name, file size and size in pixels.

        Raises:
            ValueError: an image of the data set has no such file, or more than one.
        """
        paths = {os.path.join(os.path.realpath(self.image_folder), image["file_name"]): image for image in self.images}
        by_name = defaultdict(list)
        for entry in self.images:
            by_name[_path(entry["file_name"]).name].append(entry)
        ids: dict[Any, Any] = {}
        missing: list[str] = []
        rows = dataset.select_columns(["image", "file_name", "height", "image_id", "width"])
        for row in rows.cast_column("image", Image(decode=False)).with_format(None):
            name, path = row["file_name"], row["image"]["path"]
            image = paths.get(os.path.realpath(path)) if path else None
            is_same_file = image is not None
            image = image or self._image_of_name(name, by_name)
            if image is None:
                missing.append(name)
                continue
            pixels = [f"{given['width']} x {given['height']} pixels" for given in (row, image)]
            sizes = [_bytes_of(row["image"]), self.sizes.get(image["file_name"], -1)]
            if is_same_file or min(sizes) < 0:  # a file that has been written again is told by its pixels only
                sizes = []
            for values in (pixels, [f"{size} bytes" for size in sizes]):
                if len(set(values)) > 1:
                    raise ValueError(
                        f"{name} has {values[0]} in the data set and had {values[1]} in {self.folder}: they are not "
                        "the same image."
                    )
            if ids.setdefault(canonical_id(image["id"]), row["image_id"]) != row["image_id"]:
                raise ValueError(f"Several images of the data set are {image['file_name']} of {self.folder}.")
        if missing:
            raise ValueError(
                f"{len(missing)} images of the data set were not predicted in {self.folder}, or could not be read: "
                f"{listed(missing, 5)}."
            )
        return ids

    def _image_of_name(self, name: str, by_name: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
        path = _path(name)
        candidates = [image for image in by_name.get(path.name, ()) if _same_end(path, _path(image["file_name"]))]
        candidates = [image for image in candidates if _path(image["file_name"]) == path] or candidates
        if len(candidates) > 1:
            raise ValueError(
                f"{name} of the data set may be {candidates[0]['file_name']} or {candidates[1]['file_name']} of "
                f"{self.folder}: predict the images where the data set has them."
            )
        return candidates[0] if candidates else None


@dataclass(frozen=True)
class StoredDetections:
    """Detections of a set of images.

    Attributes:
        file: the COCO results: a list of `image_id`, `category_id`, `bbox` [x_min, y_min, width, height] in pixels and
            `score`.
        records: that list.
        predicted: of a prediction job, its images; None of a file, whose ids are those of the annotations.
    """

    file: Path
    records: list[dict[str, Any]] = field(repr=False)
    predicted: PredictedImages | None = field(default=None, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "StoredDetections":
        """Read the folder that `predict.py` has written, or a file of COCO results.

        Raises:
            FileNotFoundError: there is none, or the job in the folder is not finished.
            ValueError: the file has something else; the message names the record.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}.")
        if not path.is_dir():
            return cls(path, _read_records(path))
        predicted = PredictedImages.read(path)
        return cls(path / "detections.json", _read_records(path / "detections.json"), predicted)

    @property
    def mask_kinds(self) -> tuple[str, ...]:
        """The masks that are stored: of a job those that it has found; of a file those of objects, if each record has
        a `segmentation`."""
        if self.predicted is not None:
            return self.predicted.mask_kinds
        has_masks = bool(self.records) and all(record.get("segmentation") for record in self.records)
        return ("instance",) if has_masks else ()

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class id to name; None of a file, which has no names."""
        return None if self.predicted is None else {n: e["name"] for n, e in enumerate(self.predicted.categories)}

    def add_to(
        self, evaluator: CocoEvaluator, dataset: "DetectionDataset", max_detections: int = MAX_DETECTIONS
    ) -> list[str]:
        """Give the detections to an evaluator of the data set. Those of a job belong to the image with the same file
        (see [`PredictedImages.ids_in`]); those of a file to the image with the same id.

        Args:
            dataset: that of the evaluator; for a prediction job loaded with `id2label` of this.
            max_detections: that will count per image and class.

        Returns:
            what a reader of the numbers should know, in sentences.

        Raises:
            ValueError: detections and data set are not of the same images or classes, or the boxes have another format.
        """
        notes = []
        others: set[Any] = set()
        image_ids, labels = self._ids_in(evaluator, dataset)
        if self.predicted is not None:
            others = {canonical_id(image["id"]) for image in self.predicted.images} - image_ids.keys()
            if others:
                notes.append(f"{len(others)} of the predicted images are not in the data set and do not count.")
            notes += self.predicted.notes(max_detections)
        found: dict[Any, list[tuple[list[float], int, float]]] = {image["id"]: [] for image in evaluator.images}
        for number, record in enumerate(self.records):
            image, label = canonical_id(record["image_id"]), labels.get(canonical_id(record["category_id"]))
            if label is None:
                raise self._unknown(number, "category_id", labels)
            if image in image_ids:
                found[image_ids[image]].append((record["bbox"], label, record["score"]))
            elif image not in others:
                raise self._unknown(number, "image_id", image_ids)
        sizes = {image["id"]: (image["width"], image["height"]) for image in evaluator.images}
        if doubt := doubtful_boxes([(sizes[key], box) for key, rows in found.items() for box, _, _ in rows]):
            raise ValueError(f"{self.file}: bbox must be [x_min, y_min, width, height] in pixels, but {doubt[1]}.")
        empty = sum(not rows for rows in found.values())
        if self.predicted is None and empty:
            notes.append(f"{empty} of {len(found)} images have no detection in {self.file}.")
        evaluator.update(found, map(_result, found.values()))
        return notes

    def add_masks_to(
        self, evaluation: ModelEvaluation, dataset: "DetectionDataset", max_detections: int = MAX_DETECTIONS
    ) -> list[str]:
        """The same for an evaluation with masks: boxes, and of masks the kinds that are stored. Others are not
        measured.

        Raises:
            ValueError: see [`add_to`]; or no masks are stored; or one is not of the size of its image.
        """
        if not self.mask_kinds:
            raise ValueError(f"{self.file.parent if self.predicted else self.file} has no masks to measure.")
        notes = self.add_to(evaluation.boxes, dataset, max_detections)
        image_ids, labels = self._ids_in(evaluation.boxes, dataset)
        empty: dict[str, Any] = {"counts": [], "labels": [], "scores": []}
        found = {kind: {image["id"]: deepcopy(empty) for image in evaluation.boxes.images} for kind in self.mask_kinds}
        for image, kind, label, score, counts in self._segments(evaluation.boxes, image_ids, labels):
            of_image = found[kind][image]
            for name, value in (("counts", counts), ("labels", label), ("scores", score)):
                of_image[name].append(value)
        if "instance" not in found:
            evaluation.masks = None
            notes.append("Masks of objects were not stored: predict with --masks instance to measure their AP.")
        if "panoptic" not in found and evaluation.segments is not None:
            notes.append("Panoptic segments were not stored: predict with --masks panoptic to measure PQ.")
        if "panoptic" in found and evaluation.segments is None:
            notes.append("Panoptic segments are not measured: no class of the data set is stuff.")
        if "panoptic" not in found:
            evaluation.segments = None
        for kind, evaluator in (("instance", evaluation.masks), ("panoptic", evaluation.segments)):
            if evaluator is not None:
                evaluator.update(found[kind], found[kind].values())
        return notes

    def _segments(
        self, evaluator: CocoEvaluator, image_ids: Mapping[Any, Any], labels: Mapping[Any, int]
    ) -> Iterator[tuple[Any, str, int, float, str]]:
        """Image id in the data set, kind, class id, score and run lengths of each mask of these images."""
        from ..data.masks import encode_segmentation

        if self.predicted is not None:
            for image, segment in self.predicted.segments():
                key = canonical_id(image)
                if key in image_ids:
                    yield image_ids[key], segment["kind"], segment["label_id"], segment["score"], segment["counts"]
            return
        sizes = {image["id"]: (image["height"], image["width"]) for image in evaluator.images}
        for number, record in enumerate(self.records):
            image = image_ids[canonical_id(record["image_id"])]
            try:
                counts = encode_segmentation(record["segmentation"], sizes[image])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.file}, record {number}: {error}.") from error
            yield image, "instance", labels[canonical_id(record["category_id"])], record["score"], counts

    def _ids_in(self, evaluator: CocoEvaluator, dataset: "DetectionDataset") -> tuple[dict[Any, Any], dict[Any, int]]:
        """The data set's image ids and class ids by those of the records."""
        if self.predicted is None:
            image_ids = {canonical_id(source): image_id for image_id, source in evaluator.ids_of_source.items()}
            return image_ids, {canonical_id(source): label for label, source in evaluator.category_ids.items()}
        labels = {canonical_id(entry["id"]): label for label, entry in enumerate(self.predicted.categories)}
        return self.predicted.ids_in(dataset), labels

    def _unknown(self, number: int, name: str, ids: Mapping[Any, Any]) -> ValueError:
        given = self.records[number][name]
        return ValueError(
            f"{self.file}, record {number}: {name} {given!r} is not one of the data set's: {listed(ids, 5)}."
        )


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(str(name).replace("\\", "/"))


def _same_end(one: PurePosixPath, other: PurePosixPath) -> bool:
    """Whether the shorter path is the end of the longer one."""
    length = min(len(one.parts), len(other.parts))
    return one.parts[-length:] == other.parts[-length:]


def _bytes_of(image: Mapping[str, Any]) -> int:
    """The size of an image file; -1 if it cannot be known."""
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.path.getsize(image["path"])
    except (OSError, TypeError):
        return -1


def _result(rows: list[tuple[list[float], int, float]]) -> Mapping[str, torch.Tensor]:
    """Detections of an image, as `CocoEvaluator.update` takes them."""
    boxes = torch.tensor([box for box, _, _ in rows], dtype=torch.float64).reshape(-1, 4)
    return {
        "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
        "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in rows], dtype=torch.float64),
    }


def _read_records(file: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}).") from error
    if not isinstance(records, list):
        raise ValueError(f"{file} is not a list of COCO results with {', '.join(FIELDS)}.")
    for number, record in enumerate(records):
        if problem := _problem(record):
            raise ValueError(f"{file}, record {number}: {problem}.")
    return records


def _problem(record: Any) -> str | None:
    """What is wrong with a detection."""
    if not isinstance(record, dict) or not record.keys() >= set(FIELDS):
        return f"a detection has {', '.join(FIELDS)}; this is {shortened(record)}"
    box, score = record["bbox"], record["score"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        return f"bbox is [x_min, y_min, width, height] in pixels, not {shortened(box)}"
    if not _is_number(score):
        return f"score is a number, not {shortened(score)}"
    for name in ("image_id", "category_id"):
        if isinstance(record[name], bool) or not isinstance(record[name], (int, float, str)):
            return f"{name} is a number or text, not {shortened(record[name])}"
    return None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float is as large as
        return False
