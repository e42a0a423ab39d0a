"""Seconds and peak memory of loading and of the dataset check, on synthetic images of 640 x 480.

python benchmarks/dataset_check.py [--images 5000]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from hf_detr.data import load_detection_dataset
from hf_detr.dataset_check import check_dataset


def draw(folder: Path, count: int) -> None:
    """Images with gradients and noise, which compress about as well as photographs, and 1 to 15 boxes each."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    images, annotations = [], []
    y, x = np.mgrid[:480, :640]
    for number in tqdm(range(count), desc="Drawing", leave=False):
        base = rng.uniform(0, 255, 3) + np.stack([x, y, x + y], -1) * rng.uniform(-0.2, 0.2, 3)
        noise = rng.normal(0, 12, (60, 80, 3)).repeat(8, 0).repeat(8, 1)
        image = Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(1, 16))):
            w, h = rng.uniform(20, 250, 2)
            left, top = rng.uniform(0, 640 - w), rng.uniform(0, 480 - h)
            pen.rectangle((left, top, left + w, top + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": int(rng.integers(1, 11)),
                                "bbox": [left, top, w, h], "area": w * h, "iscrowd": 0})  # fmt: skip
        image.save(folder / "train" / f"{number:06}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number:06}.jpg", "width": 640, "height": 480})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 11)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))


def load(folder: Path) -> None:
    load_detection_dataset(folder / "data", cache_dir=folder / "cache", progress=False)


def check(folder: Path) -> None:
    check_dataset(folder / "data", num_workers=2, progress=False)


STEPS = {
    "imports only": lambda folder: None,
    "load for the first time (check headers, write Arrow)": load,
    "load, from the cache": load,
    "dataset check (all pixels, 2 workers)": check,
}


def run_step(name: str, folder: Path) -> None:
    """Run one step in this process; print its seconds and the peak memory of this process and of its largest worker."""
    started = time.perf_counter()
    STEPS[name](folder)
    seconds = time.perf_counter() - started
    own, worker = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"| {name} | {seconds:.1f} | {own:.0f} | {f'{worker:.0f}' if worker > 50 else '-'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_step(args.step[0], Path(args.step[1]))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        draw(folder / "data", args.images)
        size = sum(path.stat().st_size for path in (folder / "data").rglob("*")) / 1e6
        print(f"{args.images} images of 640 x 480, {size:.0f} MB\n", flush=True)
        print(
            "| step | seconds | peak memory, MB | peak memory of the largest worker, MB |\n|---|---|---|---|",
            flush=True,
        )
        for name in STEPS:
            subprocess.run([sys.executable, __file__, "--step", name, str(folder)], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
