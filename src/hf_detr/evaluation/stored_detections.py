"""Detections in files, to measure without a model: those of a prediction job, or COCO results of any program."""

import json
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.checks import doubtful_boxes
from ..model.annotations import canonical_id
from ..runtime.wording import listed, shortened
from .coco_evaluator import CocoEvaluator
from .coco_metrics import MAX_DETECTIONS
from .model_evaluation import ModelEvaluation
from .predicted_images import PredictedImages

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset

FIELDS = ("image_id", "category_id", "bbox", "score")


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
        return self._add_boxes_to(evaluator, self._ids_in(evaluator, dataset), max_detections)

    def _add_boxes_to(
        self, evaluator: CocoEvaluator, ids: tuple[dict[Any, Any], dict[Any, int]], max_detections: int
    ) -> list[str]:
        notes = []
        others: set[Any] = set()
        image_ids, labels = ids
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

    def measures_masks(self, asked: bool | None) -> bool:
        """Whether masks are measured: if that is asked, and by default those of a job.

        Raises:
            ValueError: it is asked, and none are stored.
        """
        if asked is None:
            return self.predicted is not None and bool(self.mask_kinds)
        if not asked or self.mask_kinds:
            return asked
        if self.predicted is not None:
            raise ValueError(f"The job in {self.file.parent} has no masks to measure: predict with --masks.")
        number = next((n for n, record in enumerate(self.records) if not record.get("segmentation")), None)
        where = "" if number is None else f": record {number} has no segmentation"
        raise ValueError(f"{self.file} has no masks to measure{where}.")

    def add_masks_to(
        self, evaluation: ModelEvaluation, dataset: "DetectionDataset", max_detections: int = MAX_DETECTIONS
    ) -> list[str]:
        """The same for an evaluation with masks: boxes, and of masks the kinds that are stored. Others are not
        measured.

        Raises:
            ValueError: see [`add_to`]; or no masks are stored; or one is not of the size of its image.
        """
        self.measures_masks(True)
        ids = image_ids, labels = self._ids_in(evaluation.boxes, dataset)
        notes = self._add_boxes_to(evaluation.boxes, ids, max_detections)
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
