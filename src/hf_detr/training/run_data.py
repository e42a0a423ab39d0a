"""What a run is trained on, so that it does not go on with other data without a word."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..data.schema import id2label
from ..runtime import atomic_write, listed
from .checkpoints import Progress

COLUMNS = ["file_name", "width", "height", "objects"]
ROWS = 10_000  # at once


def identify(train_set: Any, val_set: Any) -> dict[str, Any]:
    """Class names, numbers of images, and digests of names, sizes and annotations of both splits; of images in shards,
    of their places in place of the sizes of their files."""
    identity: dict[str, Any] = {"classes": list(id2label(train_set).values())}
    for name, dataset in (("training", train_set), ("validation", val_set)):
        digest = hashlib.sha256()
        places = [name for name in ("image", "shard", "shard_row") if name in dataset.column_names]
        rows = dataset.select_columns([*COLUMNS, *places]).with_format("arrow")
        for start in range(0, len(rows), ROWS):
            table = rows[start : start + ROWS].combine_chunks()
            found = _image_sizes(table["image"]) if "image" in places else table.select(places).to_pylist()
            digest.update(repr(found).encode())
            for batch in table.select(COLUMNS).to_batches():  # not as Python objects: COCO has 860,000 boxes
                digest.update(batch.serialize())
        identity[name] = {"images": len(dataset), "digest": digest.hexdigest()}
    return identity


def _image_sizes(images: pa.ChunkedArray) -> list[int]:
    """Bytes of each image file, -1 if it cannot be looked at, which reading it reports."""
    embedded, paths = (pc.struct_field(images, name) for name in ("bytes", "path"))
    sizes: list[int] = []
    for length, path in zip(pc.binary_length(embedded).to_pylist(), paths.to_pylist(), strict=True):
        try:
            sizes.append(os.stat(path).st_size if length is None else length)
        except OSError:
            sizes.append(-1)
    return sizes


def remember_data(folder: Path, data: dict[str, Any]) -> None:
    """Write what several runs in a folder are trained on to its `data.json`, or compare it with that file.

    Args:
        data: see [`identify`].

    Raises:
        ValueError: the runs were begun with other data.
    """
    file = folder / "data.json"
    if file.is_file() and json.loads(file.read_text()) != data:
        raise ValueError(
            f"{folder} was begun with other images or annotations, and its scores cannot be compared with new ones. "
            "Name another --output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        json.dump(data, out)


def check_data(progress: Progress, now: dict[str, Any], folder: Any) -> list[str]:
    """Compare the data of a run that continues with those that it was trained on.

    Returns:
        what has changed and may change, in sentences. After other validation images the best so far is forgotten.

    Raises:
        ValueError: the classes are others, or the training images, in the middle of an epoch.
    """
    before = progress.data
    if before["classes"] != now["classes"]:
        gone = [name for name in before["classes"] if name not in now["classes"]]
        new = [name for name in now["classes"] if name not in before["classes"]]
        moved = f"gone are {listed(gone) or 'none'}, new are {listed(new) or 'none'}"
        what = moved if gone or new else "their order is another"
        raise ValueError(
            f"{folder} was trained on other classes than the data have now: {what}. Start another run from it, which "
            f"matches classes by name: --model {folder}"
        )
    said = []
    for name in ("training", "validation"):
        if before[name] == now[name]:
            continue
        counts = f"{before[name]['images']} before, {now[name]['images']} now"
        if name == "training" and progress.within_epoch():
            raise ValueError(
                f"{folder} stopped in the middle of an epoch, and its training images have changed since ({counts}). "
                f"Restore them, or start another run from it: --model {folder}"
            )
        said.append(f"The {name} images have changed ({counts}).")
        if name == "validation":
            said.append("What was the best so far is not compared with what comes.")
            progress.forget_best()
    return said
