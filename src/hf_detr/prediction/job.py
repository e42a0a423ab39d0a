"""The folder of a prediction job: what is to be done, what of it is done, and who may work on it.

```
job.json           the settings that decide about results, and the COCO categories
worklist.parquet   image_id and path of every image, fixed when the job begins
shards/            results, see `shards`: an image is done when a shard holds it
detections.json    COCO results, and
images.json        the images they are of; both are written when all images are done
```
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..runtime.files import PARTIAL, hold_lock, replacing
from .image_folder import annotation_ids, category_records, find_images
from .shards import done_ids

WORKLIST_SCHEMA = pa.schema({"image_id": pa.int64(), "path": pa.large_binary()})  # more than 2 GB of paths are possible
# of a configuration, what changes with the version or the place and not with the results
NO_SETTINGS = {"transformers_version", "_name_or_path", "architectures", "auto_map", "dtype"}


@dataclass(frozen=True)
class PredictionJob:
    """A job that this process takes part in.

    Attributes:
        folder: of the job, see above.
        image_folder: absolute; paths of the work list are relative to it.
        categories: COCO's, in the order of class ids.
        ids_from: the annotation file whose image ids are used; None where ids are positions in the work list.
        num_images: of the whole job.
        finished: the results were merged before this start.
    """

    folder: Path
    image_folder: Path
    categories: list[dict[str, Any]]
    ids_from: str | None
    num_images: int
    finished: bool
    _locks: list[IO[Any]] = field(default_factory=list, repr=False)

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

    def pending(self, num_processes: int = 1, process_index: int = 0) -> pa.Table:
        """This process' share of the images that no shard holds: every `num_processes`-th, `image_id` and `path`.

        All processes have to have come here before one of them writes a shard, or shares would overlap.

        Raises:
            ValueError: see `done_ids`.
        """
        left = np.flatnonzero(~np.isin(self.image_ids(), done_ids(self.shards)))
        return pq.read_table(self.folder / "worklist.parquet").take(left[process_index::num_processes])


def open_job(
    folder: Path,
    images: Path,
    settings: Mapping[str, Any],
    id2label: Mapping[int, str],
    *,
    is_main: bool = True,
) -> PredictionJob:
    """Begin a job, or go on with the one in the folder. The main process does it first; the others take what it left.

    Which images belong to the job is decided when it begins: later ones do not, and ones that are gone are reported.
    Ids are those of annotations if there are any for all images (see `annotation_ids`), else positions from 0 in the
    sorted list.

    Args:
        folder: of the job.
        images: an image or a folder of them.
        settings: all that decides about the results, as JSON has it; see `model_settings`.
        id2label: class id to name.

    Raises:
        FileNotFoundError, ValueError: there are no images; or the folder holds something else, and the message says
            what differs.
        TimeoutError: processes of another start still work on the job after a minute.
    """
    job_file, worklist = folder / "job.json", folder / "worklist.parquet"
    if not is_main:
        return _read_job(folder, [hold_lock(folder / ".workers.lock", shared=True)])
    settings = {"images": str(images.resolve())} | json.loads(json.dumps(settings, default=str))
    _refuse_other(folder, job_file, settings)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    try:
        main_lock = hold_lock(folder / ".main.lock")
        hold_lock(folder / ".workers.lock").close()  # those of a start whose main process was killed
    except TimeoutError as error:
        raise TimeoutError(f"Another start still works on {folder}. Wait for it, or end its processes.") from error
    _refuse_other(folder, job_file, settings)  # it may have begun another job meanwhile
    for name in ("shards/*.parquet", job_file.name, worklist.name, "images.json", "detections.json"):
        for leftover in folder.glob(f"{name}.*{PARTIAL}"):  # of a kill
            leftover.unlink()
    if not job_file.exists():
        image_folder, files = find_images(images)
        annotated = annotation_ids(image_folder, files)
        ids, source = annotated or (range(len(files)), None)
        with replacing(worklist, "wb") as file:
            columns = [pa.array(ids, pa.int64()), pa.array(files, pa.large_binary())]
            pq.write_table(pa.Table.from_arrays(columns, schema=WORKLIST_SCHEMA), file)
        about = {
            "settings": settings,
            "image_folder": str(image_folder),
            "ids_from": str(source.file) if source else None,
            "categories": category_records(id2label, source),
        }
        with replacing(job_file) as file:
            json.dump(about, file, indent=2)
    return _read_job(folder, [main_lock])


def _read_job(folder: Path, locks: list[IO[Any]]) -> PredictionJob:
    about = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return PredictionJob(
        folder,
        Path(about["image_folder"]),
        about["categories"],
        about["ids_from"],
        pq.read_metadata(folder / "worklist.parquet").num_rows,
        (folder / "detections.json").exists(),
        locks,
    )


def _refuse_other(folder: Path, job_file: Path, settings: Mapping[str, Any]) -> None:
    if not job_file.exists():
        for name in ("detections.json", "images.json", "shards/*.parquet"):
            for path in folder.glob(name):
                raise ValueError(f"{path} exists and is of no job. Name another --output_dir.")
        return
    compare_settings(folder, json.loads(job_file.read_text(encoding="utf-8"))["settings"], settings)


def compare_settings(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: the settings of the job in the folder were others; the message says which.
    """
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in names)
        raise ValueError(f"{folder} holds another job: {differences}. Name another --output_dir.")


def model_settings(model: DetrForDetection, processor: DetrImageProcessor) -> dict[str, Any]:
    """What of a model and its processor decides about results: `weights` (SHA-256), `config.*` and `processor.*`."""
    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    parts = {"config": model.config.to_dict(), "processor": processor.to_dict()}
    values = {f"{part}.{k}": v for part, given in parts.items() for k, v in given.items() if k not in NO_SETTINGS}
    return {"weights": digest.hexdigest(), **values}
