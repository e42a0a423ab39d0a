"""More objects than a model was trained with: more queries, or tiles.

    python benchmarks/many_objects.py --model CHECKPOINT [--counts 10 30 100 300 1000]

Drawings of the shapes of the embedded data set, as large in pixels as the model saw them in training, one in each cell
of a grid, so that a drawing with more objects is larger. The checkpoint must be trained on that data set
(`examples/finetune.py` without arguments, 0 to 4 objects per image). It predicts on the whole drawing at full
resolution, with its own queries and after `model.resize_queries`, and on tiles of the size of a training image.
"""

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from measure import machine
from PIL import Image, ImageDraw
from transformers import pipeline

import hf_detr
from hf_detr.data import shapes
from hf_detr.evaluation.coco_metrics import coco_metrics
from hf_detr.prediction import Tiling, load_image, predict_batch
from hf_detr.speed import prepare_for_inference

CELL = 48  # pixels per object
SIDES = (0.5, 0.9)  # of an object, as a fraction of its cell
OVERSAMPLING = 2


def draw(rng: np.random.Generator, count: int) -> tuple[Image.Image, list[Any]]:
    """A drawing, and its objects as (class, (x, y, width, height) in pixels)."""
    cells = math.ceil(math.sqrt(count))
    side = cells * CELL
    background = shapes._background(rng, side, side)
    canvas = Image.fromarray(background).resize((side * OVERSAMPLING, side * OVERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    objects = []
    for cell in rng.permutation(cells * cells)[:count]:
        corner = np.array([cell % cells, cell // cells]) * CELL
        class_id, outline = shapes._outline(rng, 100, 100)
        corners = np.array(outline)
        corners = (corners - corners.min(0)) / np.ptp(corners, axis=0).max() * rng.uniform(*SIDES) * CELL
        corners += corner + rng.uniform(1, CELL - 1 - np.ptp(corners, axis=0))
        (x, y), (right, bottom) = corners.min(0), corners.max(0)
        near = background[int(y) : int(bottom) + 1, int(x) : int(right) + 1].reshape(-1, 3).mean(0)
        pen.polygon([tuple(point) for point in corners * OVERSAMPLING], fill=shapes._colour(rng, near))
        objects.append((class_id, (x, y, right - x, bottom - y)))
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX)).astype(np.float32)
    pixels += rng.normal(0, rng.uniform(2, 8), size=pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def build_detector(args: argparse.Namespace, num_queries: int | None, side: int) -> Any:
    """The checkpoint, with another number of queries, at a working size of `side` pixels."""
    model = hf_detr.DetrForDetection.from_pretrained(args.model)
    if num_queries is not None:
        model.resize_queries(num_queries)
    processor = hf_detr.DetrImageProcessor.from_pretrained(args.model, size={"height": side, "width": side})
    return pipeline(
        "object-detection", model=prepare_for_inference(model), image_processor=processor, device=args.device
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--drawings", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    trained = hf_detr.DetrConfig.from_pretrained(args.model).num_queries
    names = hf_detr.DetrConfig.from_pretrained(args.model).id2label
    class_of = {name: class_id for class_id, name in names.items()}
    print(f"Model trained with {trained} queries; {args.drawings} drawings each ({machine()})\n")
    print("| objects | pixels | | AP50 | AR | s per drawing |\n|---|---|---|---|---|---|")
    for count in args.counts:
        side = math.ceil(math.sqrt(count)) * CELL
        queries = {f"{trained} queries, as trained": None}
        queries |= {f"{n} queries": n for n in (count, 2 * count, 4 * count) if n > trained}
        settings: dict[str, Any] = {name: (number, side, None) for name, number in queries.items()}
        settings["tiles of 96 pixels"] = (None, 96, Tiling(96, 0.5))
        for name, (number, working_size, tiling) in settings.items():
            detector = build_detector(args, number, working_size)
            truth, found, seconds = [], [], 0.0
            for image_id in range(args.drawings):
                drawing, objects = draw(np.random.default_rng([11, count, image_id]), count)
                truth += [{"image_id": image_id, "category_id": class_of[shapes.CLASSES[class_id]], "bbox": list(box)}
                          for class_id, box in objects]  # fmt: skip
                started = time.perf_counter()
                image = load_image(detector, image_id, "drawing", drawing, tiles=tiling is not None)
                with torch.inference_mode():
                    [result] = predict_batch(detector, [image], 0.0, tiling, 16)
                seconds += time.perf_counter() - started
                for class_id, box, score in zip(result.label_ids.tolist(), result.boxes.tolist(),
                                                result.scores.tolist(), strict=True):  # fmt: skip
                    x, y, right, bottom = box
                    found.append({"image_id": image_id, "category_id": class_id, "score": score,
                                  "bbox": [x, y, right - x, bottom - y]})  # fmt: skip
            images = [{"id": image_id} for image_id in range(args.drawings)]
            metrics = coco_metrics(images, truth, found, names, max_detections=5000)
            figures = f"{metrics['AP50']:.3f} | {metrics['AR100']:.3f} | {seconds / args.drawings:.2f}"
            print(f"| {count} | {side} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
