"""Images per second over a folder, from files to boxes: this package against transformers' pipeline.

    python benchmarks/throughput.py [--dtype bfloat16] [--batch_size 4] [--num_workers 1]

100 generated JPEG images of mixed sizes and orientations. Both models are a ResNet-50 DETR with the same weights. Both
sides decode, resize, predict and return boxes in pixels, alternating in one process after one warm-up round. Ours
does what `examples/predict.py` does between the work list and the shards; transformers' pipeline only supports batch
size 1 for images of different sizes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from measure import machine
from PIL import Image, ImageDraw
from transformers import pipeline

import hf_detr
from hf_detr.interop import to_transformers
from hf_detr.prediction import load_batches, predict_batch
from hf_detr.speed import prepare_for_inference

# (width, height) to its number of images in 20
SIZES = {(640, 480): 6, (480, 640): 4, (500, 375): 3, (375, 500): 2, (1920, 1080): 2, (1080, 1920): 1, (1600, 1200): 1,
         (640, 427): 1}  # fmt: skip


def draw_images(folder: Path, count: int, scale: float) -> list[str]:
    """Gradients with noise, which compress about as well as photos, and rectangles."""
    rng = np.random.default_rng(0)
    sizes = [size for size, number in SIZES.items() for _ in range(number)]
    paths = []
    for number in range(count):
        width, height = (round(side * scale) for side in sizes[int(rng.integers(len(sizes)))])
        y, x = np.mgrid[:height, :width] / max(width, height)
        base = rng.uniform(40, 215, 3) + np.stack([x, y, x + y], -1) * rng.uniform(-80, 80, 3)
        noise = rng.normal(0, 12, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
        image = Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))
        for _ in range(8):
            w, h = rng.uniform(0.05, 0.4, 2) * (width, height)
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            ImageDraw.Draw(image).rectangle((left, top, left + w, top + h), fill=colour)
        paths.append(str(folder / f"{number:04}.jpg"))
        image.save(paths[-1], quality=90)
    return paths


class Timed:
    """Measures the seconds inside a model's forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._started = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def run_ours(detector: Any, paths: list[str], batch_size: int, num_workers: int) -> list[list[dict[str, Any]]]:
    folder = Path(paths[0]).parent
    names = [Path(path).name.encode() for path in paths]
    images = pa.table({"image_id": range(len(paths)), "path": pa.array(names, pa.large_binary())})
    found: list[list[dict[str, Any]]] = [[] for _ in paths]
    id2label = detector.model.config.id2label
    for batch in load_batches(detector, folder, images, batch_size=batch_size, num_workers=num_workers):
        for prediction in predict_batch(detector, batch, 0.0):
            found[prediction.image_id] = prediction.objects(id2label)
    return found


def largest_difference(ours: list[list[dict[str, Any]]], theirs: list[list[dict[str, Any]]]) -> float:
    """Of scores, in the order of queries; transformers rounds boxes to integers."""
    return max(
        abs(a["score"] - b["score"])
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--compile", action="store_true", help="compile our model")
    parser.add_argument("--batch_size", type=int, default=1, help="of ours; transformers' is 1")
    parser.add_argument("--num_workers", type=int, default=0, help="our reading threads")
    parser.add_argument("--their_workers", type=int, default=0, help="loader processes of transformers")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds of both sides")
    parser.add_argument("--quick", action="store_true", help="a few small images and a small model, to test the script")
    args = parser.parse_args()
    torch.manual_seed(0)
    fields = {"encoder_layers": 1, "decoder_layers": 1, "backbone": "resnet18"} if args.quick else {}
    size = {"shortest_edge": 160, "longest_edge": 266} if args.quick else {"shortest_edge": 800, "longest_edge": 1333}
    model = hf_detr.DetrForDetection(hf_detr.DetrConfig(**fields)).eval()
    theirs = to_transformers(model)
    ours = prepare_for_inference(model, dtype=getattr(torch, args.dtype), compile=args.compile)
    our_pipeline = pipeline(
        "object-detection", model=ours, image_processor=hf_detr.DetrImageProcessor(size=size), device="cpu"
    )
    their_pipeline = pipeline(
        "object-detection", model=theirs, image_processor=transformers.DetrImageProcessor(size=size), device="cpu"
    )
    with tempfile.TemporaryDirectory() as name:
        paths = draw_images(Path(name), 8 if args.quick else 100, 0.25 if args.quick else 1.0)
        clocks = {"ours": Timed(ours), "theirs": Timed(theirs)}
        sides = {
            "ours": lambda: run_ours(our_pipeline, paths, args.batch_size, args.num_workers),
            "theirs": lambda: list(their_pipeline(paths, threshold=0.0, num_workers=args.their_workers)),
        }
        results, rates, fractions = {}, {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
        for round_number in range(args.repeats + 1):
            for side, run in sides.items():
                clocks[side].seconds = 0.0
                started = time.perf_counter()
                results[side] = run()
                seconds = time.perf_counter() - started
                if round_number:
                    rates[side].append(len(paths) / seconds)
                    fractions[side].append(clocks[side].seconds / seconds)
    difference = largest_difference(results["ours"], results["theirs"])
    print(f"\nmaximum difference of scores: {difference:.1g}")
    if args.dtype == "float32" and difference > 1e-3:
        raise SystemExit("The results of the two sides differ.")
    print(
        f"\n{len(paths)} images, {args.repeats} rounds ({machine()})\n\n"
        "| | images/s | fraction of time in the model |\n|---|---|---|"
    )
    ours_is = f"ours, {args.dtype}{', compiled' if args.compile else ''}, batch size {args.batch_size}"
    names = {"ours": f"{ours_is}, {args.num_workers} reading threads", "theirs": "transformers, float32"}
    for side, label in names.items():
        values = rates[side]
        spread = (max(values) - min(values)) / 2
        fraction = f"{statistics.median(fractions[side]):.0%}" if side == "ours" or not args.their_workers else ""
        print(f"| {label} | {statistics.median(values):.2f} ± {spread:.2f} | {fraction} |")
    print(f"\nratio {statistics.median(rates['ours']) / statistics.median(rates['theirs']):.1f}x")


if __name__ == "__main__":
    main()
