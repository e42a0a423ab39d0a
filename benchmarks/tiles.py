"""Recall of small objects in large drawings: the full image alone against the full image and tiles.

    python benchmarks/tiles.py --model CHECKPOINT [--tile 160] [--overlap 0.3]

The drawings have sides of 2,000 pixels and contain many shapes of 20 to 40 pixels and a few large ones, as in the
embedded data set. The checkpoint must be trained on that data set (`examples/finetune.py` without arguments). A
shape is found if it is matched to a box of its class with a score above the threshold and an IoU of at least 0.5.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from measure import machine
from PIL import Image, ImageDraw
from transformers import pipeline

import hf_detr
from hf_detr.data import shapes
from hf_detr.evaluation.detection_matching import match_detections
from hf_detr.prediction import Tiling, load_image, predict_batch
from hf_detr.speed import prepare_for_inference

SMALL = (20.0, 40.0)  # the longer side in pixels
LARGE = (0.2, 0.4)  # the same, as a fraction of the drawing's side
OVERSAMPLING = 2

Box = tuple[float, float, float, float]


def draw(rng: np.random.Generator, side: int, num_small: int, num_large: int) -> tuple[Image.Image, list[Any]]:
    """A drawing, and its objects as (class, (x, y, width, height) in pixels), large ones first, without overlap."""
    background = shapes._background(rng, side, side)
    canvas = Image.fromarray(background).resize((side * OVERSAMPLING, side * OVERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    objects: list[tuple[int, Box]] = []
    for number in range(num_large + num_small):
        low, high = (fraction * side for fraction in LARGE) if number < num_large else SMALL
        for _attempt in range(200):
            class_id, outline = shapes._outline(rng, 100, 100)
            corners = np.array(outline)
            corners = (corners - corners.min(0)) / (corners.max(0) - corners.min(0)).max() * rng.uniform(low, high)
            corners += rng.uniform(1, side - 1 - corners.max(0))
            (x, y), (right, bottom) = corners.min(0), corners.max(0)
            gap = 4
            if all(x > a + w + gap or right < a - gap or y > b + h + gap or bottom < b - gap
                   for _, (a, b, w, h) in objects):  # fmt: skip
                break
        else:
            continue
        near = background[int(y) : int(bottom) + 1, int(x) : int(right) + 1].reshape(-1, 3).mean(0)
        pen.polygon([tuple(corner) for corner in corners * OVERSAMPLING], fill=shapes._colour(rng, near))
        objects.append((class_id, (x, y, right - x, bottom - y)))
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX)).astype(np.float32)
    pixels += rng.normal(0, rng.uniform(2, 8), size=pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def records(image_id: int, objects: list[tuple[int, Box]], **scores: list[float]) -> list[dict[str, Any]]:
    """COCO records, with class ids as category ids."""
    return [
        {"id": 1000 * image_id + number, "image_id": image_id, "category_id": class_id, "bbox": list(box),
         "area": box[2] * box[3], "iscrowd": 0} | {name: values[number] for name, values in scores.items()}
        for number, (class_id, box) in enumerate(objects)
    ]  # fmt: skip


def count(truth: list[dict[str, Any]], found: list[dict[str, Any]], edge: float) -> dict[str, int]:
    """Small and large objects, how many of each were found, and detections that are none of them."""
    matching = match_detections(truth, found)
    hit = np.isin(np.arange(len(matching.objects)), matching.matched)
    small = np.array([max(record["bbox"][2:]) <= edge for record in matching.objects], dtype=bool)
    total = {"wrong": int((matching.matched < 0).sum())}
    for name, members in (("small", small), ("large", ~small)):
        total |= {name: int(members.sum()), f"{name}_found": int((members & hit).sum())}
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tile", type=int, default=160)
    parser.add_argument("--overlap", type=float, default=0.3)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--batch_size", type=int, default=8, help="tiles per forward pass")
    parser.add_argument("--drawings", type=int, default=10)
    parser.add_argument("--side", type=int, default=2000, help="of a drawing, in pixels")
    args = parser.parse_args()
    model = hf_detr.DetrForDetection.from_pretrained(args.model)
    class_of = {name: class_id for class_id, name in model.config.id2label.items()}
    if not set(shapes.CLASSES) <= set(class_of):
        parser.error(
            f"--model has the classes {sorted(class_of)}, not those of the embedded data set, {list(shapes.CLASSES)}."
        )
    detector = pipeline(
        "object-detection", model=prepare_for_inference(model),
        image_processor=hf_detr.DetrImageProcessor.from_pretrained(args.model), device="cpu",
    )  # fmt: skip
    settings = {
        "full image": None,
        f"and tiles of {args.tile}, overlap {args.overlap}": Tiling(args.tile, args.overlap),
    }
    ground_truth: list[dict[str, Any]] = []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    seconds = dict.fromkeys(settings, 0.0)
    for image_id in range(args.drawings):
        rng = np.random.default_rng([7, image_id])
        drawing, objects = draw(rng, args.side, round(120 * (args.side / 2000) ** 2), 4)
        ground_truth += records(image_id, [(class_of[shapes.CLASSES[class_id]], box) for class_id, box in objects])
        for name, tiling in settings.items():
            started = time.perf_counter()
            image = load_image(detector, image_id, "drawing", drawing, tiles=True)
            [result] = predict_batch(detector, [image], args.threshold, tiling, args.batch_size)
            seconds[name] += time.perf_counter() - started
            sizes = torch.cat((result.boxes[:, :2], result.boxes[:, 2:] - result.boxes[:, :2]), dim=1).tolist()
            boxes = [(class_id, tuple(box)) for class_id, box in zip(result.label_ids.tolist(), sizes, strict=True)]
            found[name] += records(image_id, boxes, score=result.scores.tolist())
    print(f"\n{args.drawings} drawings of {args.side} x {args.side} ({machine()})\n")
    print("| | recall, 20 to 40 px | recall, large | false positives | s per drawing |\n|---|---|---|---|---|")
    for name in settings:
        n = count(ground_truth, found[name], SMALL[1])
        small, large = n["small_found"] / max(1, n["small"]), n["large_found"] / max(1, n["large"])
        print(f"| {name} | {small:.1%} of {n['small']} | {large:.1%} of {n['large']} | {n['wrong']} | "
              f"{seconds[name] / args.drawings:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
