"""A prediction job on a Ray cluster: Ray schedules, retries and scales, the job's folder records what is done."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..runtime import acquire_lock, atomic_write, listed
from ..runtime.ray_cluster import connect_to_ray
from .drawings import file_as_text
from .job import PredictionJob
from .predictor import Predictor
from .shards import MASK_SCHEMA, SHARD_SCHEMA

ATTEMPTS = "ray-attempts"  # a folder of the job, with a file of a byte per attempt for each shard
MAX_ATTEMPTS = 10


class ShardPredictor:
    """An actor that predicts the images of a shard and writes its file. The file is named after the images and written
    atomically, so that a shard that Ray runs twice, after a node was lost, is written twice to the same place.

    Ray repeats a shard whenever its actor or node is lost, however often. Images that end the process that predicts
    them would do so for ever: after `MAX_ATTEMPTS` the job ends with their names.

    Args:
        predictor: which loads its model here, and raises if its files have changed since the job began.
        image_folder, shards: of the job, on a file system that all nodes see.
    """

    def __init__(self, predictor: Predictor, image_folder: str, shards: str) -> None:
        self.predictor = predictor
        self.image_folder, self.shards = Path(image_folder), Path(shards)
        self.attempts = self.shards.parent / ATTEMPTS
        # a later start of the job waits for it, see `open_job`
        self._lock = acquire_lock(self.shards.parent / f".worker-ray-{uuid.uuid4().hex}.lock")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, paths = list(row["image_id"]), list(row["path"])
        name = shard_name(ids)
        target = self.shards / f"ray-{name}.parquet"
        if not target.exists():
            with (self.attempts / name).open("ab") as file:
                if file.tell() >= MAX_ATTEMPTS:
                    raise ValueError(
                        f"The process that predicts these images was lost {MAX_ATTEMPTS} times: "
                        f"{listed([file_as_text(path) for path in paths])}. One of them may end it, for example by "
                        "taking too much memory: move it away, or give actors more memory or fewer images "
                        "(--shard_size)."
                    )
                file.write(b".")
            found = self.predictor({"path": [str(self.image_folder / os.fsdecode(path)) for path in paths]})
            del found["path"]
            columns = {"image_id": ids, "file": [file_as_text(path) for path in paths]} | found
            schema = MASK_SCHEMA if self.predictor.masks else SHARD_SCHEMA
            with atomic_write(target, "wb") as file:
                pq.write_table(pa.table(columns, schema=schema), file)
        return {"images": len(ids)}


def shard_name(ids: list[int]) -> str:
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def predict_with_ray(
    job: PredictionJob,
    predictor: Predictor,
    *,
    shard_size: int,
    workers: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    progress: Callable[[int], None] = lambda images: None,
) -> None:
    """Predict what is not done of a job, on the Ray cluster that this process is connected to, or a new one of this
    machine. Every shard is complete or absent at any time; after a kill, the same call resumes.

    Args:
        predictor: of the job's model.
        shard_size: images per shard, which is what Ray schedules and, after a loss, runs again.
        workers: actors at most; None: as many as the cluster has room for.
        cpus, gpus: that each actor gets.
        progress: called with the number of images of each finished shard.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no node of the cluster has so many CPUs and GPUs.
    """
    ray = connect_to_ray()
    pending = job.pending().select(["image_id", "path"]).to_pydict()
    rows = [
        {name: values[start : start + shard_size] for name, values in pending.items()}
        for start in range(0, len(pending["image_id"]), shard_size)
    ]
    if not rows:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise ValueError(f"No node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for an actor.")
    if workers is None:
        free = ray.cluster_resources()
        room = [free.get("CPU", 1) / cpus] if cpus else []
        room += [free.get("GPU", 0) / gpus] if gpus else []
        workers = max(1, int(min(room, default=1)))
    attempts = job.shards.parent / ATTEMPTS
    shutil.rmtree(attempts, ignore_errors=True)
    attempts.mkdir(exist_ok=True)
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardPredictor,
        fn_constructor_args=(predictor, str(job.image_folder), str(job.shards)),
        concurrency=(1, min(workers, len(rows))),
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=-1,  # the loss of one node takes several of them
    )
    for row in data.iter_rows():
        progress(row["images"])
    shutil.rmtree(attempts, ignore_errors=True)
