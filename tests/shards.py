"""Annotated images in shards, as Parquet files and as WebDataset archives."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from hf_detr.data import id2label

OBJECTS = {"bbox": List(List(Value("float64"))), "category": List(Value("string"))}


def contents(dataset: Dataset) -> list[dict[str, Any]]:
    """Rows as other programs write them: the image file, boxes and class names."""
    names = id2label(dataset)
    files = dataset.cast_column("image", Image(decode=False))["image"]
    return [
        {
            "image": {"bytes": Path(file["path"]).read_bytes(), "path": row["file_name"]},
            "image_id": row["image_id"],
            "width": row["width"],
            "height": row["height"],
            "objects": {
                "bbox": row["objects"]["bbox"],
                "category": [names[label] for label in row["objects"]["category"]],
            },
        }
        for row, file in zip(dataset.remove_columns("image"), files, strict=True)
    ]


def write_parquet(folder: Path, split: str, rows: Sequence[dict[str, Any]], counts: Sequence[int], sizes: bool = True):
    """Shards of `counts` rows, in row groups of 3; with or without `width` and `height`."""
    features = {"image": Image(), "image_id": Value("int64"), "objects": OBJECTS}
    features |= {"width": Value("int64"), "height": Value("int64")} if sizes else {}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number, (first, count) in enumerate(zip([0, *accumulated(counts)], counts, strict=False)):
        part = [{name: row[name] for name in features} for row in rows[first : first + count]]
        shard = Dataset.from_list(part, features=Features(features))
        shard.to_parquet(folder / "data" / f"{split}-{number:05}-of-{len(counts):05}.parquet", batch_size=3)


def write_webdataset(folder: Path, split: str, rows: Sequence[dict[str, Any]], counts: Sequence[int]):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (first, count) in enumerate(zip([0, *accumulated(counts)], counts, strict=False)):
        with tarfile.open(folder / f"{split}-{number:04}.tar", "w") as tar:
            for row in rows[first : first + count]:
                about = {"image_id": row["image_id"], "objects": row["objects"]}
                for suffix, data in (("jpg", row["image"]["bytes"]), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{row['image_id']:08}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def accumulated(counts: Sequence[int]) -> list[int]:
    return [sum(counts[: end + 1]) for end in range(len(counts))]
