"""Shards: Parquet files with the results of some images each. Together they define which images are done."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..runtime import atomic_write
from .segments import segment_rows

if TYPE_CHECKING:
    from .predict import Prediction

DETECTION_FIELDS = (
    pa.field("width", pa.int32()),  # in pixels, EXIF orientation applied
    pa.field("height", pa.int32()),
    pa.field("scores", pa.list_(pa.float32())),  # one per detection
    pa.field("labels", pa.list_(pa.string())),  # class names
    pa.field("label_ids", pa.list_(pa.int32())),  # class ids of the model, 0 ... N-1
    pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # x_min, y_min, x_max, y_max in pixels of the image
    pa.field("error", pa.string()),  # why the image could not be read; the others are null then
)
SEGMENTS_FIELD = pa.field(
    "segments",
    pa.list_(
        pa.struct(
            {
                "kind": pa.string(),  # panoptic or instance
                "label_id": pa.int32(),
                "score": pa.float32(),
                "counts": pa.string(),  # COCO's run-length encoding, for an image of this height and width
            }
        )
    ),
)  # of a job with masks
# `file` is relative to the image folder
SHARD_SCHEMA = pa.schema([pa.field("image_id", pa.int64()), pa.field("file", pa.string()), *DETECTION_FIELDS])
MASK_SCHEMA = SHARD_SCHEMA.append(SEGMENTS_FIELD)


def detection_row(prediction: "Prediction", id2label: Mapping[int, str]) -> dict[str, Any]:
    """The values of `DETECTION_FIELDS` and `SEGMENTS_FIELD`; of an image that could not be read only `error`."""
    if prediction.size is None:
        return {"error": prediction.error}
    label_ids = prediction.label_ids.tolist()
    return {
        "width": prediction.size[0],
        "height": prediction.size[1],
        "scores": prediction.scores.tolist(),
        "labels": [id2label[index] for index in label_ids],
        "label_ids": label_ids,
        "boxes": prediction.boxes.tolist(),
        "error": prediction.error,
        "segments": segment_rows(prediction.segments, prediction.file),
    }


class ShardWriter:
    """Collects predictions, and writes a shard whenever there are `size` of them and when it is closed, also after an
    error.

    Shards are written atomically, and an image is never split over shards. Each writer uses unique file names, so any
    number of processes, of this launch and of later ones, can write to one folder.

    Args:
        folder: of the shards.
        process_index: part of the file names.
        id2label: class id to name.
        size: images per shard.
        masks: store masks, too.
    """

    def __init__(
        self, folder: Path, process_index: int, id2label: Mapping[int, str], size: int = 512, *, masks: bool = False
    ) -> None:
        if size < 1:
            raise ValueError(f"A shard must hold at least 1 image, got size={size}.")
        self.folder = folder
        self.id2label = id2label
        self.size = size
        self.schema = MASK_SCHEMA if masks else SHARD_SCHEMA
        self._name = f"{process_index:05d}-{uuid.uuid4().hex[:12]}"
        self._number = 0
        self._rows: list[dict[str, Any]] = []

    def add(self, prediction: "Prediction") -> None:
        row = {"image_id": prediction.image_id, "file": prediction.file}
        self._rows.append(row | detection_row(prediction, self.id2label))
        if len(self._rows) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard."""
        # cleared before writing: an interrupt can lose these rows but never duplicate them
        rows, self._rows = self._rows, []
        if rows:
            path = self.folder / f"{self._name}-{self._number:06d}.parquet"
            self._number += 1
            with atomic_write(path, "wb") as file:
                pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), file)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


def done_ids(folder: Path) -> np.ndarray:
    """(N,) image ids in all shards.

    Raises:
        ValueError: a shard cannot be read, or two shards contain the same image; the message names them.
    """
    ids = [np.zeros(0, dtype=np.int64)]
    paths = sorted(folder.glob("*.parquet"))
    for path in paths:
        try:
            ids.append(pq.read_table(path, columns=["image_id"])["image_id"].to_numpy())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}. Delete it; its images will be predicted again."
            ) from error
    done = np.concatenate(ids)
    unique, counts = np.unique(done, return_counts=True)
    if len(unique) < len(done):
        duplicate = unique[counts > 1][0]
        both = [path.name for path, part in zip(paths, ids[1:], strict=True) if duplicate in part]
        raise ValueError(
            f"Image {duplicate} is in {' and '.join(both)} of {folder}. Delete one of them; images that are in no "
            "other shard will be predicted again."
        )
    return done


def read_shards(folder: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of all shards with these columns of `SHARD_SCHEMA`."""
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as shard:
            for batch in shard.iter_batches(batch_size=256, columns=list(columns)):
                yield from batch.to_pylist()
