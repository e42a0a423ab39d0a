"""The output folder of a prediction job.

```
job.json           the settings that affect results, and the COCO categories
worklist.parquet   image_id, path, the source's id, size in bytes and time of every image; a later start adds new ones
shards/            results, see `shards`; an image is done once a shard contains it
detections.json    COCO results, and
images.json        the images they belong to; both are written when all images are done
masks.json         with masks: COCO results with run-length encodings, one mask per object
panoptic.json      and `panoptic/`: COCO's panoptic format
```
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.records import numbered
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..runtime import PARTIAL, acquire_lock, atomic_write, shortened
from .drawings import PANOPTIC, file_as_text, is_drawing, picture_of
from .image_folder import annotation_ids, category_records, find_images
from .shards import done_ids
from .work_list import WORKLIST, update_work_list, work_list_rows, write_work_list

if TYPE_CHECKING:
    from ..export.exported_model import ExportedDetr

JOB_FILE = "job.json"
RESULTS = ("detections.json", "images.json", "masks.json", "panoptic.json")
MAIN_LOCK = ".main.lock"
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
        finished: results of all images had been merged before this start.
        notes: what has changed in the image folder since the job started, in sentences.
        mask_kinds: the masks that are written, see [`~hf_detr.prediction.segments.SegmentOptions`].
        stuff_labels: names of the classes that are stuff.
    """

    folder: Path
    image_folder: Path
    categories: list[dict[str, Any]]
    ids_from: str | None
    num_images: int
    finished: bool
    notes: tuple[str, ...] = ()
    mask_kinds: tuple[str, ...] = ()
    stuff_labels: tuple[str, ...] = ()
    _lock: Any = field(default=None, repr=False)  # held as long as the job is referenced

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def detections_file(self) -> Path:
        return self.folder / "detections.json"

    @property
    def masks_file(self) -> Path:
        return self.folder / "masks.json"

    @property
    def panoptic_file(self) -> Path:
        """Its PNGs are in the folder of the same name."""
        return self.folder / f"{PANOPTIC}.json"

    @property
    def images_file(self) -> Path:
        return self.folder / "images.json"

    def image_ids(self) -> np.ndarray:
        """(num_images,), in the order of the work list."""
        return pq.read_table(self.folder / WORKLIST, columns=["image_id"])["image_id"].to_numpy()

    def source_ids(self) -> dict[int, int | str]:
        """The ids of the annotations by `image_id`, for results."""
        table = pq.read_table(self.folder / WORKLIST, columns=["image_id", "source_id"])
        pairs = zip(table["image_id"].to_pylist(), table["source_id"].to_pylist(), strict=True)
        return {image_id: json.loads(source_id) for image_id, source_id in pairs}

    def check_pictures(self, images: pa.Table) -> None:
        """Raise ValueError if the drawing of one of these images would replace a file that is none."""
        for path in images["path"].to_pylist():
            picture = picture_of(self.folder, file_as_text(path))
            if picture.exists() and not is_drawing(picture):
                raise ValueError(
                    f"{picture} would be replaced by the drawing of {file_as_text(path)}. Name another --output_dir, "
                    "or draw nothing with --no-pictures."
                )

    def pending(self, num_processes: int = 1, process_index: int = 0) -> pa.Table:
        """The rows of the work list for this process, out of those that are in no shard: every `num_processes`-th.

        All processes must call this before any of them writes a shard; otherwise their parts would overlap.

        Raises:
            ValueError: see `done_ids`.
        """
        rows = np.flatnonzero(~np.isin(self.image_ids(), done_ids(self.shards)))
        return pq.read_table(self.folder / WORKLIST).take(rows[process_index::num_processes])


def open_job(
    folder: Path,
    images: Path | Sequence[Path],
    settings: Mapping[str, Any],
    id2label: Mapping[int, str],
    *,
    process_index: int = 0,
) -> PredictionJob:
    """Start a job, or resume the one in the folder. Process 0 must return from this before the other processes call it.

    Image ids come from annotations if these cover all images of one folder (see `annotation_ids`); otherwise they are
    positions in the sorted list, from 0. Images that were added since the job started join it, with the next ids; what
    has changed otherwise is in `notes`.

    Args:
        folder: output folder of the job.
        images: images, and folders of images.
        settings: everything that affects results, JSON-serialisable; see `model_settings`. `images` among them are the
            names of the images as the job records them; default: their absolute paths.
        id2label: class id to name.
        process_index: index of this process in the launch.

    Raises:
        FileNotFoundError, ValueError: there are no images, or the folder contains something else; the message tells
            the difference. Or annotations have other ids than before, or none for new images.
        TimeoutError: processes of another launch still work on the job after a minute.
    """
    job_file, worklist = folder / JOB_FILE, folder / WORKLIST
    if process_index > 0:
        return _read_job(folder, acquire_lock(folder / f".worker-{process_index}.lock"))
    sources = [images] if isinstance(images, Path) else list(images)
    settings = recorded_settings(sources, settings)
    check_folder(folder, settings)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire_lock(folder / MAIN_LOCK)
        for path in folder.glob(".worker-*.lock"):  # workers outlive a main process that was killed
            acquire_lock(path).release()
            if path.name.startswith(".worker-ray-"):  # each actor has one of its own
                path.unlink(missing_ok=True)
    except TimeoutError as error:
        raise TimeoutError(
            f"Processes of another launch still work on {folder}. Wait for them, or end them."
        ) from error
    check_folder(folder, settings)  # another job may have started in the meantime
    for name in ("shards/*.parquet", job_file.name, worklist.name, *RESULTS):
        for orphan in folder.glob(f"{name}.*{PARTIAL}"):  # left by a kill
            orphan.unlink()
    image_folder, files = find_images(*sources)
    # several sources may have nothing in common but the root of the file system
    panoptic = "panoptic" in (settings.get("masks") or ())
    annotated = annotation_ids(image_folder, files, panoptic=panoptic) if len(sources) == 1 else None
    notes = []
    if job_file.exists():
        content = json.loads(job_file.read_text(encoding="utf-8"))
        notes = update_work_list(worklist, content["ids_from"], image_folder, files, annotated)
    else:
        ids, source = annotated or (list(range(len(files))), None)
        write_work_list(worklist, work_list_rows(image_folder, files, numbered(ids), ids))
        content = {
            "settings": settings,
            "image_folder": str(image_folder),
            "ids_from": str(source.file) if source else None,
            "categories": category_records(id2label, source),
        }
        with atomic_write(job_file) as file:
            json.dump(content, file, indent=2)
    return _read_job(folder, lock, notes)


def _read_job(folder: Path, lock: Any, notes: Sequence[str] = ()) -> PredictionJob:
    content = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    job = PredictionJob(
        folder,
        Path(content["image_folder"]),
        content["categories"],
        content["ids_from"],
        pq.read_metadata(folder / WORKLIST).num_rows,
        False,
        tuple(notes),
        tuple(content["settings"].get("masks") or ()),
        tuple(content["settings"].get("config.stuff_labels") or ()),
        lock,
    )
    return replace(job, finished=job.detections_file.exists() and not len(job.pending()))


def recorded_settings(sources: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job as its file has them."""
    names = [str(source.resolve()) for source in sources]
    recorded: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return {"images": names[0] if len(names) == 1 else names} | recorded


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the folder has results of another job, or of none; the message tells the difference.
    """
    job_file = folder / JOB_FILE
    if not job_file.exists():
        for name in (*RESULTS, "shards/*.parquet"):
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
        differences = "; ".join(
            f"{name} was {shortened(recorded.get(name))} and is {shortened(settings.get(name))}" for name in names
        )
        raise ValueError(f"{folder} contains another job: {differences}. Use another --output_dir, or --overwrite it.")


def model_settings(model: "DetrForDetection | ExportedDetr", processor: DetrImageProcessor) -> dict[str, Any]:
    """Everything about a model and its processor that affects results: `weights` (SHA-256, of an export the one of its
    graph), `config.*` and `processor.*`."""
    digest = hashlib.sha256()
    if isinstance(model, torch.nn.Module):
        for name, values in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        for path in model.graph_files():
            digest.update(path.read_bytes())
    parts = {"config": model.config.to_dict(), "processor": processor.to_dict()}
    values = {f"{part}.{k}": v for part, given in parts.items() for k, v in given.items() if k not in IGNORED_FIELDS}
    return {"weights": digest.hexdigest(), **values}
