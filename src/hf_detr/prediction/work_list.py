"""The work list of a prediction job: its images, and what has become of them since."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.records import AnnotatedSplit
from ..runtime import atomic_write
from .drawings import file_as_text

WORKLIST = "worklist.parquet"
# large: more than 2 GB of paths; source_id: as JSON
WORKLIST_SCHEMA = pa.schema(
    {
        "image_id": pa.int64(),
        "path": pa.large_binary(),
        "source_id": pa.large_string(),
        "bytes": pa.int64(),
        "modified": pa.int64(),  # nanoseconds since 1970
    }
)


def work_list_rows(image_folder: Path, files: Sequence[bytes], numbers: Sequence[int], ids: Sequence[Any]) -> pa.Table:
    """Rows of a work list; a file that cannot be looked at has -1 bytes."""
    states = [_state(image_folder / os.fsdecode(file)) for file in files]
    columns = [
        pa.array(numbers, pa.int64()),
        pa.array(files, pa.large_binary()),
        pa.array([json.dumps(image_id) for image_id in ids], pa.large_string()),
        pa.array([size for size, _ in states], pa.int64()),
        pa.array([modified for _, modified in states], pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=WORKLIST_SCHEMA)


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # such as a broken link; reading the image reports it
        return -1, 0
    return found.st_size, found.st_mtime_ns


def write_work_list(path: Path, rows: pa.Table) -> None:
    with atomic_write(path, "wb") as file:
        pq.write_table(rows, file)


def update_work_list(
    worklist: Path,
    ids_from: str | None,
    image_folder: Path,
    files: Sequence[bytes],
    annotated: tuple[list[Any], AnnotatedSplit] | None,
) -> list[str]:
    """Add new images to the work list of a job; returns what has changed, in sentences."""
    before = pq.read_table(worklist)
    paths, ids, sizes, times = (before[name].to_pylist() for name in ("path", "source_id", "bytes", "modified"))
    recorded = dict(zip(paths, zip(sizes, times, strict=True), strict=True))
    ids_before = {path: json.loads(source_id) for path, source_id in zip(paths, ids, strict=True)}
    added = [file for file in files if file not in recorded]
    notes = []
    of_file = dict(zip(files, annotated[0], strict=True)) if ids_from and annotated else {}
    moved = [file for file, image_id in of_file.items() if ids_before.get(file, image_id) != image_id]
    if moved:
        raise ValueError(
            f"The ids in {ids_from} have changed since the job started: {file_as_text(moved[0])} had "
            f"{ids_before[moved[0]]!r} and has {of_file[moved[0]]!r}. Name another --output_dir, or --overwrite it."
        )
    if added:
        first = max(before["image_id"].to_pylist(), default=-1) + 1
        numbers = list(range(first, first + len(added)))
        new_ids: list[Any] = numbers
        if ids_from:
            unknown = [file for file in added if file not in of_file]
            if unknown:
                raise ValueError(
                    f"{len(unknown)} images were added to {image_folder} since the job started, such as "
                    f"{file_as_text(unknown[0])}, and have no id in {ids_from}. Add them there, or name "
                    "another --output_dir."
                )
            new_ids = [of_file[file] for file in added]
        write_work_list(worklist, pa.concat_tables([before, work_list_rows(image_folder, added, numbers, new_ids)]))
        notes.append(f"{len(added)} images were added since the job started, such as {file_as_text(added[0])}.")
    listed = set(files)
    gone = [file for file in recorded if file not in listed]
    if gone:
        notes.append(
            f"{len(gone)} images of the job are not there any more, such as {file_as_text(gone[0])}. What was found in "
            "them stays in the results."
        )
    changed = [f for f in recorded if f in listed and _state(image_folder / os.fsdecode(f)) != recorded[f]]
    if changed:
        notes.append(
            f"{len(changed)} images were written again since the job started, such as {file_as_text(changed[0])}. What "
            "is done is not predicted again; --overwrite predicts all of them."
        )
    return notes
