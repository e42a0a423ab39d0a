"""Images per second of the training loader from shards, compared with the same files in a folder.

    python benchmarks/streaming.py

The images and augmentation are those of `loader.py`; 1,000 images in 5 shards, 2 workers, batches of 8. Epochs are
measured in turn; the time to the first batch, in which a block of `shuffle_buffer` images is read, is given separately.
"""

import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from loader import BATCH, WORKERS, draw_images
from measure import machine

from hf_detr import DetrImageProcessor
from hf_detr.data import (
    AugmentedDataset,
    DetectionCollator,
    build_loader,
    load_streamed_dataset,
    paper_augmentation,
)

SHARDS, EPOCHS, BUFFER = 5, 5, 256


def write_shards(rows: Dataset, folder: Path) -> None:
    """The rows `SHARDS` times, as Parquet files with sizes and as WebDataset archives."""
    for kind in ("parquet", "webdataset"):
        (folder / kind / "data").mkdir(parents=True)
    files = [Path(image["path"]).read_bytes() for image in rows.cast_column("image", Image(decode=False))["image"]]
    objects = [{name: of_image[name] for name in ("bbox", "category")} for of_image in rows["objects"]]
    names = rows.features["objects"]["category"].feature
    features = Features(
        {"image": Image(), "width": Value("int64"), "height": Value("int64"),
         "objects": {"bbox": List(List(Value("float64"))), "category": List(ClassLabel(names=names.names))}}
    )  # fmt: skip
    table = [
        {"image": {"bytes": file, "path": None}, "width": width, "height": height, "objects": of_image}
        for file, width, height, of_image in zip(files, rows["width"], rows["height"], objects, strict=True)
    ]
    for shard in range(SHARDS):
        Dataset.from_list(table, features=features).to_parquet(
            folder / "parquet" / "data" / f"train-{shard:05}-of-{SHARDS:05}.parquet", batch_size=100
        )
        with tarfile.open(folder / "webdataset" / "data" / f"train-{shard:04}.tar", "w") as tar:
            for number, (file, of_image) in enumerate(zip(files, objects, strict=True)):
                about = {"bbox": of_image["bbox"], "category": names.int2str(of_image["category"])}
                for suffix, data in (("jpg", file), ("json", json.dumps({"objects": about}).encode())):
                    member = tarfile.TarInfo(f"{shard:04}{number:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = draw_images(folder)
        write_shards(rows, folder / "shards")
        datasets: dict[str, Any] = {"folder": concatenate_datasets([rows] * SHARDS)}
        for kind in ("parquet", "webdataset"):
            started = time.perf_counter()
            datasets[kind] = load_streamed_dataset(folder / "shards" / kind, cache_dir=folder / "cache", progress=False)
            print(f"{kind}: all annotations in {time.perf_counter() - started:.1f} s")
        processor = DetrImageProcessor()
        loaders = {
            name: build_loader(
                AugmentedDataset(dataset, paper_augmentation(processor.size)), DetectionCollator(processor),
                batch_size=BATCH, training=True, num_workers=WORKERS, shuffle_buffer=BUFFER,
            )
            for name, dataset in datasets.items()
        }  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        firsts: dict[str, list[float]] = {name: [] for name in loaders}
        for epoch in range(EPOCHS + 1):
            for name, loader in loaders.items():
                started, images = time.perf_counter(), 0
                for number, batch in enumerate(loader):
                    if number == 0:
                        firsts[name].append(time.perf_counter() - started)
                    images += len(batch["labels"])
                rates[name].append(images / (time.perf_counter() - started))
                assert images == len(datasets[name]), (epoch, images)
        print(f"{machine()}\n\n| images in | images/s | s to the first batch |\n|---|---|---|")
        for name in loaders:  # without the first epoch, in which workers start
            rate, first = statistics.median(rates[name][1:]), statistics.median(firsts[name][1:])
            print(f"| {name} | {rate:.1f} | {first:.2f} |")


if __name__ == "__main__":
    main()
