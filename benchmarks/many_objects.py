"""More objects than a model was trained with: more queries, or tiles.

    python -c "from small_symbols import draw_symbols_dataset as draw; draw('symbols', num_train=1000, num_val=100)"
    python ../examples/finetune.py --dataset symbols --backbone test_resnet --backbone_weights none --image_size 128
    python many_objects.py --model CHECKPOINT

The checkpoint is trained on 3 to 8 symbols of 8 to 20 pixels in images of 128 x 128. Here are more of them: closer
together in images of that size, and as close together in larger images. The model predicts on the whole image at full
resolution, with its own queries and after `model.resize_queries`, and on tiles of 128 pixels.
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import small_symbols
from measure import machine
from transformers import pipeline

import hf_detr
from hf_detr.evaluation.coco_metrics import coco_metrics
from hf_detr.prediction import Tiling, load_image, predict_batch
from hf_detr.speed import prepare_for_inference

TRAINED = small_symbols.SCENES["symbols"]
TRAINED_SIDE, TRAINED_OBJECTS = TRAINED.side, TRAINED.counts[1]
CASES = [  # (objects, side of the image in pixels)
    *((count, TRAINED_SIDE) for count in (8, 16, 32)),
    *((count, round(TRAINED_SIDE * (count / TRAINED_OBJECTS) ** 0.5)) for count in (30, 100, 300, 1000)),
]


def draw(image_id: int, count: int, side: int) -> small_symbols.Drawing:
    scene = dataclasses.replace(TRAINED, side=side, counts=(count, count))
    return small_symbols.draw_symbols_image(np.random.default_rng([11, count, side, image_id]), scene)


def build_detector(args: argparse.Namespace, num_queries: int | None, side: int) -> Any:
    """The checkpoint, with another number of queries, at a working size of `side` pixels."""
    model = hf_detr.DetrForDetection.from_pretrained(args.model)
    if num_queries is not None:
        model.resize_queries(num_queries)
    return pipeline(
        "object-detection", model=prepare_for_inference(model), device=args.device,
        image_processor=hf_detr.DetrImageProcessor(size={"height": side, "width": side}),
    )  # fmt: skip


def records(image_id: int, class_ids: list[int], boxes: list[Any], **columns: list[float]) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": class_id, "bbox": list(box)} | {k: v[i] for k, v in columns.items()}
        for i, (class_id, box) in enumerate(zip(class_ids, boxes, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="+", help="only these numbers of objects")
    parser.add_argument("--max_side", type=int, default=500, help="larger images are predicted in tiles only")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    config = hf_detr.DetrConfig.from_pretrained(args.model)
    class_of = {name: class_id for class_id, name in config.id2label.items()}
    print(f"{args.images} images each ({machine()})\n")
    print("| objects | pixels | | AP50 | AR | s per image |\n|---|---|---|---|---|---|")
    for count, side in CASES:
        if args.counts and count not in args.counts:
            continue
        settings: dict[str, Any] = {}
        if side <= args.max_side:
            more = [number for number in (count, 2 * count, 4 * count) if number > config.num_queries]
            settings = {f"{config.num_queries} queries, as trained": (None, side, None)}
            settings |= {f"{number} queries": (number, side, None) for number in more}
        if side > TRAINED_SIDE:
            settings[f"tiles of {TRAINED_SIDE}"] = (None, TRAINED_SIDE, Tiling(TRAINED_SIDE, 0.25))
        drawings = [draw(image_id, count, side) for image_id in range(args.images)]
        for name, (num_queries, working_size, tiling) in settings.items():
            detector = build_detector(args, num_queries, working_size)
            truth, found, seconds = [], [], 0.0
            for image_id, (drawing, objects) in enumerate(drawings):
                names = [class_of[small_symbols.CLASSES[class_id]] for class_id, _ in objects]
                truth += records(image_id, names, [box for _, box in objects])
                started = time.perf_counter()
                image = load_image(detector, image_id, "drawing", drawing, tiles=tiling is not None)
                [result] = predict_batch(detector, [image], 0.0, tiling, 16)
                seconds += time.perf_counter() - started
                boxes = result.boxes.clone()
                boxes[:, 2:] -= boxes[:, :2]
                found += records(image_id, result.label_ids.tolist(), boxes.tolist(), score=result.scores.tolist())
            images = [{"id": image_id} for image_id in range(args.images)]
            metrics = coco_metrics(images, truth, found, config.id2label, max_detections=5000)
            figures = f"{metrics['AP50']:.3f} | {metrics['AR100']:.3f} | {seconds / args.images:.2f}"
            print(f"| {len(truth) / args.images:.0f} | {side} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
