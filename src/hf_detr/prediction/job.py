"""The output folder of a prediction job.

```
job.json           the settings that affect results, and the COCO categories
worklist.parquet   image_id, path and the source's id of every image, fixed when the job starts
shards/            results, see `shards`; an image is done once a shard contains it
detections.json    COCO results, and
images.json        the images they belong to; both are written when all images are done
```
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.records import numbered
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..runtime import PARTIAL, acquire_lock, atomic_write
from .image_folder import annotation_ids, category_records, find_images
from .shards import done_ids

# large: more than 2 GB of paths; source_id: as JSON
WORKLIST_SCHEMA = pa.schema({"image_id": pa.int64(), "path": pa.large_binary(), "source_id": pa.large_string()})
# fields of configurations that do not affect results
IGNORED_FIELDS = {"transformers_version", "_name_or_path", "architectures", "auto_map", "dtype"}


@dataclass(frozen=True)
class PredictionJob:
    """A job that this process works on.

    Attributes:
        folder: output folder, see the module.
        image_folder: absolute path; paths in the work list are relative to it.
        categories: COCO categories in the order of class ids.
        ids_from: the annotation file that image ids were taken from; None if ids are positions in the work list.
        num_images: size of the work list.
        finished: results had been merged before this start.
    """

    folder: Path
    image_folder: Path
    categories: list[dict[str, Any]]
    ids_from: str | None
    num_images: int
    finished: bool
    _lock: Any = field(default=None, repr=False)  # held as long as the job is referenced

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def detections_file(self) -> Path:
        return self.folder / "detections.json"

    @property
    def images_file(self) -> Path:
        return self.folder / "images.json"

    def image_ids(self) -> np.ndarray:
        """(num_images,), in the order of the work list."""
        return pq.read_table(self.folder / "worklist.parquet", columns=["image_id"])["image_id"].to_numpy()

    def source_ids(self) -> dict[int, int | str]:
        """The ids of the annotations by `image_id`, for results."""
        table = pq.read_table(self.folder / "worklist.parquet", columns=["image_id", "source_id"])
        pairs = zip(table["image_id"].to_pylist(), table["source_id"].to_pylist(), strict=True)
        return {image_id: json.loads(source_id) for image_id, source_id in pairs}

    def pending(self, num_processes: int = 1, process_index: int = 0) -> pa.Table:
        """The rows of the work list for this process, out of those that are in no shard: every `num_processes`-th.

        All processes must call this before any of them writes a shard; otherwise their parts would overlap.

        Raises:
            ValueError: see `done_ids`.
        """
        rows = np.flatnonzero(~np.isin(self.image_ids(), done_ids(self.shards)))
        return pq.read_table(self.folder / "worklist.parquet").take(rows[process_index::num_processes])


def open_job(
    folder: Path,
    images: Path,
    settings: Mapping[str, Any],
    id2label: Mapping[int, str],
    *,
    process_index: int = 0,
) -> PredictionJob:
    """Start a job, or resume the one in the folder. Process 0 must return from this before the other processes call it.

    The images of a job are fixed when it starts: images added later are ignored, and missing ones are reported. Image
    ids come from annotations if these cover all images (see `annotation_ids`); otherwise they are positions in the
    sorted list, from 0.

    Args:
        folder: output folder of the job.
        images: an image or a folder of images.
        settings: everything that affects results, JSON-serialisable; see `model_settings`.
        id2label: class id to name.
        process_index: index of this process in the launch.

    Raises:
        FileNotFoundError, ValueError: there are no images, or the folder contains something else; the message tells
            the difference.
        TimeoutError: processes of another launch still work on the job after a minute.
    """
    job_file, worklist = folder / "job.json", folder / "worklist.parquet"
    if process_index > 0:
        return _read_job(folder, acquire_lock(folder / f".worker-{process_index}.lock"))
    settings = {"images": str(images.resolve())} | json.loads(json.dumps(settings, default=str))
    _check_folder(folder, job_file, settings)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(folder / ".main.lock")
        for path in folder.glob(".worker-*.lock"):  # workers outlive a main process that was killed
            acquire_lock(path).release()
    except TimeoutError as error:
        raise TimeoutError(
            f"Processes of another launch still work on {folder}. Wait for them, or end them."
        ) from error
    _check_folder(folder, job_file, settings)  # another job may have started in the meantime
    for name in ("shards/*.parquet", job_file.name, worklist.name, "images.json", "detections.json"):
        for orphan in folder.glob(f"{name}.*{PARTIAL}"):  # left by a kill
            orphan.unlink()
    if not job_file.exists():
        image_folder, files = find_images(images)
        annotated = annotation_ids(image_folder, files)
        ids, source = annotated or (list(range(len(files))), None)
        with atomic_write(worklist, "wb") as file:
            columns = [
                pa.array(numbered(ids), pa.int64()),
                pa.array(files, pa.large_binary()),
                pa.array([json.dumps(image_id) for image_id in ids], pa.large_string()),
            ]
            pq.write_table(pa.Table.from_arrays(columns, schema=WORKLIST_SCHEMA), file)
        content = {
            "settings": settings,
            "image_folder": str(image_folder),
            "ids_from": str(source.file) if source else None,
            "categories": category_records(id2label, source),
        }
        with atomic_write(job_file) as file:
            json.dump(content, file, indent=2)
    return _read_job(folder, lock)


def _read_job(folder: Path, lock: Any) -> PredictionJob:
    content = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return PredictionJob(
        folder,
        Path(content["image_folder"]),
        content["categories"],
        content["ids_from"],
        pq.read_metadata(folder / "worklist.parquet").num_rows,
        (folder / "detections.json").exists(),
        lock,
    )


def _check_folder(folder: Path, job_file: Path, settings: Mapping[str, Any]) -> None:
    if not job_file.exists():
        for name in ("detections.json", "images.json", "shards/*.parquet"):
            for path in folder.glob(name):
                raise ValueError(
                    f"{path} already exists but does not belong to a prediction job. Use another --output_dir."
                )
        return
    compare_settings(folder, json.loads(job_file.read_text(encoding="utf-8"))["settings"], settings)


def compare_settings(folder: Path, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the recorded settings of the job in the folder differ; the message tells which.
    """
    names = [name for name in {**recorded, **settings} if recorded.get(name) != settings.get(name)]
    if names:
        differences = "; ".join(f"{name} was {recorded.get(name)!r} and is {settings.get(name)!r}" for name in names)
        raise ValueError(f"{folder} contains another job: {differences}. Use another --output_dir.")


def model_settings(model: DetrForDetection, processor: DetrImageProcessor) -> dict[str, Any]:
    """Everything about a model and its processor that affects results: `weights` (SHA-256), `config.*` and
    `processor.*`."""
    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    parts = {"config": model.config.to_dict(), "processor": processor.to_dict()}
    values = {f"{part}.{k}": v for part, given in parts.items() for k, v in given.items() if k not in IGNORED_FIELDS}
    return {"weights": digest.hexdigest(), **values}
