"""One predictor for every engine: columns of images in, columns of detections out."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..export.exported_model import ExportedDetr
from .detector import open_model, state_of_source
from .pipeline import DetrDetectionPipeline
from .predict import LoadedImage, load_image, predict_batch, reason_of
from .segments import SegmentOptions
from .shards import DETECTION_FIELDS, SEGMENTS_FIELD, detection_row
from .size_batches import UNKNOWN, group_by_size

SOURCES = ("image", "bytes", "path")  # columns that hold images, the first of them that a batch has
WINDOW = 4  # batches whose images are decoded at a time, to find those of equal size


class Predictor:
    """Detects objects in batches of columns: for `dataset.with_format("arrow").map(predictor, batched=True)`, for Ray
    Data's `map_batches(Predictor, ...)`, Spark's `mapInArrow` (see [`spark_udf`]), a queue of your own, or a server.

    A batch has one column of images: `image` (PIL images, arrays, or dicts with `bytes` and `path`, as `datasets` has
    them), `bytes` (the content of image files) or `path` (paths and URLs). The result has a row for each image in the
    same order, with all columns but the content of the images, and these:

        width, height   of the image in pixels
        scores          one per detection
        labels          class names; label_ids: class ids
        boxes           [x_min, y_min, x_max, y_max] in pixels
        segments        of a model with masks: COCO run lengths with class and score
        error           why an image could not be read; the columns above are null then. No image stops a job.

    Only its arguments are pickled. A worker loads the model at its first batch, onto its accelerator or the CPU.

    Args:
        source: see [`~hf_detr.prediction.detector.open_model`].
        threshold: score that a detection has to exceed, or "per_class".
        batch_size: images per forward pass, of like sizes; batches of an engine may have any size. The last digits of
            a score depend on which images share a pass; with 1 they do not.
        column: the column of images; None: the first of `image`, `bytes` and `path` that a batch has.
        dtype: of the computation; None: that of the weights.
        device: such as "cuda:1"; None: an accelerator if there is one. Exports run on the CPU.
        revision: branch, tag or commit on the Hub. A commit is the same model for every worker.
        top_k: the most detections per image; see `DetrImageProcessor.post_process_object_detection`.
        masks, panoptic_threshold: the kinds to compute, `"panoptic"` or `"instance"`, of a model that has masks, and
            the score of a panoptic segment; see [`~hf_detr.prediction.segments.SegmentOptions`].

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        threshold: float | str = 0.5,
        batch_size: int = 1,
        column: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        top_k: int | None = None,
        masks: Sequence[str] = (),
        panoptic_threshold: float | None = None,
    ) -> None:
        if batch_size < 1 or (top_k is not None and top_k < 1):
            raise ValueError(f"`batch_size` and `top_k` must be at least 1, got {batch_size} and {top_k}.")
        if threshold != "per_class" and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
            raise ValueError(f'`threshold` must be a number from 0 to 1 or "per_class", got {threshold!r}.')
        unknown = set(masks) - {"panoptic", "instance"}
        if unknown:
            raise ValueError(f'`masks` must be among "panoptic" and "instance", got {sorted(unknown)}.')
        if panoptic_threshold is not None and "panoptic" not in masks:
            raise ValueError('`panoptic_threshold` needs "panoptic" among `masks`.')
        self.source, self.threshold, self.batch_size, self.column = str(source), threshold, batch_size, column
        self.dtype, self.device, self.revision, self.top_k = dtype, device, revision, top_k
        self.masks, self.panoptic_threshold = tuple(masks), panoptic_threshold
        # caches of engines, such as that of `datasets.map`, know predictors by their pickles
        self.state_of_source = state_of_source(source)
        self._detector: DetrDetectionPipeline | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_detector": None}

    @property
    def detector(self) -> DetrDetectionPipeline:
        """The pipeline, loaded on first use.

        Raises:
            OSError, ValueError: there is no model, it cannot be used as the arguments say, or its files have changed
                since the predictor was made.
        """
        if self._detector is None:
            if state_of_source(self.source) != self.state_of_source:
                raise ValueError(f"{self.source} has changed since the job began. Start another one.")
            model, processor = open_model(self.source, self.dtype, revision=self.revision)
            if self.masks and not model.has_masks:
                raise ValueError(f"{self.source} has no masks.")
            device = self.device
            if isinstance(model, ExportedDetr):
                if device not in (None, "cpu"):
                    raise ValueError(f"{self.source} is an export, which runs on the CPU, not on {device}.")
                device = "cpu"
            device = device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
            self._detector = DetrDetectionPipeline(model=model, image_processor=processor, device=device)
        return self._detector

    def _segments(self) -> SegmentOptions | None:
        if not self.masks:
            return None
        stuff = frozenset(self.detector.model.config.stuff_label_ids)
        return SegmentOptions(self.masks, stuff, self.threshold, self.panoptic_threshold)

    def __call__(self, batch: Any) -> Any:
        """Columns as a dict of sequences give a dict of lists; a `pyarrow.Table` gives a `pyarrow.Table`.

        Raises:
            ValueError: the batch has no column of images, none of the name `column`, or one with the name of a column
                that is added.
        """
        is_table = isinstance(batch, (pa.Table, pa.RecordBatch))
        columns = {name: batch[name].to_pylist() for name in batch.schema.names} if is_table else dict(batch)
        source = self.source_of(columns)
        taken = sorted({field.name for field in self.fields}.intersection(columns))
        if taken:
            raise ValueError(f"The batch has the columns {', '.join(taken)}, which the predictor adds. Rename them.")
        rows = self._predict(list(columns[source]))
        others = {name: values for name, values in columns.items() if source == "path" or name != source}
        found = {field.name: [row.get(field.name) for row in rows] for field in self.fields}
        if not is_table:
            return {name: list(values) for name, values in others.items()} | found
        kept = {name: batch[name] for name in others}
        arrays = {field.name: pa.array(found[field.name], type=field.type) for field in self.fields}
        return pa.table(kept | arrays)

    @property
    def fields(self) -> list[pa.Field]:
        """The columns that are added, with their types."""
        return [*DETECTION_FIELDS, *([SEGMENTS_FIELD] if self.masks else [])]

    def source_of(self, columns: Iterable[str]) -> str:
        """Which of these columns has the images.

        Raises:
            ValueError: none.
        """
        columns = list(columns)
        wanted = (self.column,) if self.column else SOURCES
        for name in wanted:
            if name in columns:
                return name
        raise ValueError(
            f"The batch has no column of images ({' or '.join(wanted)}); it has the columns "
            f"{', '.join(columns) or 'none'}."
        )

    def _predict(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        window = 1 if self.batch_size == 1 else WINDOW * self.batch_size
        for start in range(0, len(images), window):
            rows += self.predict_loaded([self.load(image) for image in images[start : start + window]])
        return rows

    def load(self, image: Any) -> LoadedImage:
        """An image in any form, ready for the model, or the reason why it cannot be read."""
        detector = self.detector
        try:
            if image is None:
                raise ValueError("there is no image")
            return load_image(detector, 0, "", image)
        except Exception as error:
            return LoadedImage(0, "", error=reason_of(error))

    def predict_loaded(self, loaded: Sequence[LoadedImage]) -> list[dict[str, Any]]:
        """A row for each result of [`load`], in their order, from forward passes of up to `batch_size` like sizes."""
        names = self.detector.model.config.id2label
        inputs = [one.inputs for one in loaded]
        sizes = [UNKNOWN if given is None else tuple(given["pixel_values"][0].shape[-2:]) for given in inputs]
        rows: dict[int, dict[str, Any]] = {}
        for numbers in group_by_size(sizes, self.batch_size):
            batch = [loaded[number] for number in numbers]
            predictions = predict_batch(
                self.detector, batch, self.threshold, segments=self._segments(), top_k=self.top_k
            )
            rows |= zip(numbers, (detection_row(found, names) for found in predictions), strict=True)
        return [rows[number] for number in range(len(loaded))]
