"""Images per second of the training loader, compared with the pipeline of transformers' example script.

python benchmarks/loader.py

Both read the same JPEG files from the same `datasets.Dataset`, with two persistent workers, in batches of 8, resized to
the same size. Theirs is built as in `examples/pytorch/object-detection/run_object_detection.py` of transformers:
Albumentations and `DetrImageProcessor` in `with_transform`, batches by `torch.stack`. Ours also returns the pixel mask,
which the script drops.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import albumentations as A
import numpy as np
import torch
import transformers
from datasets import Dataset
from measure import machine
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import hf_detr
from hf_detr.data import (
    Augmentation,
    AugmentedDataset,
    DetectionCollator,
    build_loader,
    detection_features,
    paper_augmentation,
)

SIZES = [(640, 480)] * 6 + [(480, 640), (500, 375), (1024, 768), (333, 500)]
IMAGES, OBJECTS, BATCH, WORKERS, EPOCHS = 200, 8, 8, 2, 7


def draw_images(folder: Path) -> Dataset:
    """JPEG files of rectangles on gradients, 60 % of them 640 x 480."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(IMAGES):
        width, height = SIZES[index % len(SIZES)]
        y, x = np.mgrid[:height, :width] / max(width, height)
        waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in rng.uniform(-6, 6, (3, 2))]
        image = Image.fromarray((np.stack(waves, axis=-1) * 127 + 128).astype(np.uint8))
        boxes = []
        for _ in range(OBJECTS):
            w, h = int(rng.integers(20, width // 2)), int(rng.integers(20, height // 2))
            left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            ImageDraw.Draw(image).rectangle((left, top, left + w - 1, top + h - 1), fill=colour)
            boxes.append([float(value) for value in (left, top, w, h)])
        path = folder / f"{index:04}.jpg"
        image.save(path, quality=90)
        rows.append(
            {
                "image": str(path),
                "image_id": index,
                "file_name": path.name,
                "width": width,
                "height": height,
                "objects": {
                    "id": list(range(index * OBJECTS, (index + 1) * OBJECTS)),
                    "bbox": boxes,
                    "category": rng.integers(0, 3, OBJECTS).tolist(),
                    "area": [w * h for *_, w, h in boxes],
                    "iscrowd": [0] * OBJECTS,
                },
            }
        )
    return Dataset.from_list(rows, features=detection_features(["a", "b", "c"]))


def script_augmentation(side: int) -> A.Compose:
    """The augmentation of the script."""
    zoom = A.Compose([A.SmallestMaxSize(max_size=side, p=1.0), A.RandomSizedBBoxSafeCrop(side, side, p=1.0)], p=0.2)
    blur = [
        A.Blur(blur_limit=7, p=0.5),
        A.MotionBlur(blur_limit=7, p=0.5),
        A.Defocus(radius=(1, 5), alias_blur=(0.1, 0.25), p=0.1),
    ]
    colour = [A.RandomBrightnessContrast(p=0.5), A.HueSaturationValue(p=0.1)]
    steps = [zoom, A.OneOf(blur, p=0.1), A.Perspective(p=0.1), A.HorizontalFlip(p=0.5), *colour]
    params = A.BboxParams(format="coco", label_fields=["category"], clip=True, min_area=25)
    return A.Compose(steps, bbox_params=params)


def script_loader(dataset: Dataset, side: int) -> DataLoader:
    square = {"max_height": side, "max_width": side}
    processor = transformers.DetrImageProcessor(size=square, do_pad=True, pad_size={"height": side, "width": side})
    return DataLoader(
        dataset.with_transform(partial(script_transform, script_augmentation(side), processor)),
        batch_size=BATCH,
        shuffle=True,
        collate_fn=script_collate,
        num_workers=WORKERS,
        persistent_workers=True,
    )


def script_transform(augmentation: A.Compose, processor: transformers.DetrImageProcessor, rows: dict) -> dict:
    images, annotations = [], []
    for image_id, image, objects in zip(rows["image_id"], rows["image"], rows["objects"], strict=True):
        pixels = np.array(image.convert("RGB"))
        result = augmentation(image=pixels, bboxes=objects["bbox"], category=objects["category"])
        images.append(result["image"])
        records = [
            {"image_id": image_id, "category_id": category, "iscrowd": 0, "area": area, "bbox": list(box)}
            for category, area, box in zip(result["category"], objects["area"], result["bboxes"], strict=False)
        ]
        annotations.append({"image_id": image_id, "annotations": records})
    batch = processor(images=images, annotations=annotations, return_tensors="pt")
    batch.pop("pixel_mask")
    return batch


def script_collate(rows: list) -> dict:
    return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": [r["labels"] for r in rows]}


def our_loader(dataset: Dataset, size: dict, pad_size: dict | None, augmentation: Augmentation) -> DataLoader:
    processor = hf_detr.DetrImageProcessor(size=size, pad_size=pad_size)
    return build_loader(
        AugmentedDataset(dataset, augmentation, seed=0),
        DetectionCollator(processor),
        batch_size=BATCH,
        training=True,
        num_workers=WORKERS,
    )


def images_per_second(loaders: dict[str, DataLoader]) -> dict[str, tuple[float, float]]:
    """Median and half the interquartile range over epochs that alternate between the loaders, after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(EPOCHS + 1):
        for name, loader in loaders.items():
            started = time.perf_counter()
            count = sum(len(batch["labels"]) for batch in loader)
            if epoch:
                rates[name].append(count / (time.perf_counter() - started))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in rates.items()}
    return {name: (median, (high - low) / 2) for name, (low, median, high) in quartiles.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(f"\nTraining loader, {IMAGES} JPEG files, {WORKERS} workers ({machine()})\n")
    print("| case | ours, images/s | transformers' script, images/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        dataset = draw_images(Path(folder))
        for side in (600, 800):
            size, pad_size = {"max_height": side, "max_width": side}, {"height": side, "width": side}
            rates = images_per_second(
                {
                    "the paper's augmentation": our_loader(dataset, size, pad_size, paper_augmentation(size)),
                    "the script's augmentation": our_loader(
                        dataset, size, pad_size, Augmentation(script_augmentation(side))
                    ),
                    "script": script_loader(dataset, side),
                }
            )
            theirs, their_spread = rates.pop("script")
            for name, (ours, spread) in rates.items():
                print(
                    f"| padded to {side} x {side}, {name} | {ours:.0f} ± {spread:.0f} | "
                    f"{theirs:.0f} ± {their_spread:.0f} | {ours / theirs:.1f}x |"
                )
        size = {"shortest_edge": 800, "longest_edge": 1333}
        rates = images_per_second({"ours": our_loader(dataset, size, None, paper_augmentation(size))})
        ours, spread = rates["ours"]
        print(f"| 480 to 800, at most 1333, the paper's augmentation | {ours:.0f} ± {spread:.0f} | | |")


if __name__ == "__main__":
    main()
