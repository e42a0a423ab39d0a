"""How many planted annotation errors are found: precision and recall of `label_errors.py` on drawn images.

    python benchmarks/label_errors.py --model CHECKPOINT [--fraction 0.05] [--seeds 0 1 2]

In the validation images of the generated data set, each of five errors is planted in 5 % of the annotations, so about
25 % are affected: the annotation is dropped, gets another class, is moved by 30 to 50 % of its size, gets a slightly
shifted copy, or a box without an object is added. The checkpoint is that of `examples/finetune.py` without arguments,
trained on the other split, which has no errors.

A planted error counts as found if its annotation (of a duplicate: one of the two) is reported, as any kind of error. A
dropped annotation counts as found if a "missing" object has an IoU of at least 0.5 with it. Recall is measured for the
N highest suspicions, N being the number of planted errors, and for all of at least 0.3; precision for all of at least
0.3.
"""

import argparse
import statistics
import tempfile
from collections import Counter
from typing import Any

import numpy as np
import torch
from measure import machine
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou

from hf_detr import DetrImageProcessor
from hf_detr.data import DetectionCollator, draw_shapes_dataset, load_detection_dataset
from hf_detr.dataset_check import LABEL_ERRORS, find_label_errors
from hf_detr.interop import load_model
from hf_detr.speed import prepare_for_inference
from hf_detr.training import use_all_cores

Objects = dict[str, list[Any]]


def plant(objects: Objects, size: tuple[int, int], fraction: float, classes: int, rng: np.random.Generator) -> Any:
    """The objects of a row with errors, the kind of each annotation that has one, and the boxes that were dropped."""
    width, height = size
    boxes, labels, kinds, dropped = [], [], [], []
    for drawn, of_class in zip(objects["bbox"], objects["category"], strict=True):
        box, label = drawn, of_class
        x, y, w, h = drawn
        draw = rng.random()
        kind = list(LABEL_ERRORS)[int(draw / fraction)] if draw < fraction * len(LABEL_ERRORS) else ""
        if kind == "missing":
            dropped.append(box)
            continue
        if kind == "wrong class":
            label = (label + int(rng.integers(1, classes))) % classes
        elif kind == "misplaced":
            side, sign = rng.uniform(0.3, 0.5, 2), rng.choice([-1, 1], 2)
            box = inside(x + sign[0] * side[0] * w, y + sign[1] * side[1] * h, w, h, size)
        boxes.append(box)
        labels.append(label)
        kinds.append(kind if kind in ("wrong class", "misplaced") else "")
        if kind == "duplicate":
            boxes.append(inside(x + 0.05 * w, y + 0.05 * h, w, h, size))
            labels.append(label)
            kinds.append(kind)
        elif kind == "not an object":
            for _ in range(20):
                w, h = rng.uniform(0.15, 0.4, 2) * size
                other = inside(rng.uniform(0, width - w), rng.uniform(0, height - h), w, h, size)
                if overlap(other, objects["bbox"]) < 0.1:
                    boxes.append(other)
                    labels.append(int(rng.integers(classes)))
                    kinds.append(kind)
                    break
    count = len(boxes)
    areas = [w * h for _, _, w, h in boxes]
    columns = {"id": list(range(count)), "bbox": boxes, "category": labels, "area": areas, "iscrowd": [0] * count}
    return columns, kinds, dropped


def inside(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> list[float]:
    x, y = max(0.0, min(x, size[0] - 4.0)), max(0.0, min(y, size[1] - 4.0))
    return [x, y, min(w, size[0] - x), min(h, size[1] - y)]


def overlap(box: Any, others: list[Any]) -> float:
    if not others:
        return 0.0
    corners = box_convert(torch.tensor([list(box), *map(list, others)], dtype=torch.float32), "xywh", "xyxy")
    return float(box_iou(corners[:1], corners[1:]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    use_all_cores()
    model, processor = prepare_for_inference(load_model(args.model)), DetrImageProcessor.from_pretrained(args.model)
    folder = draw_shapes_dataset(tempfile.mkdtemp(), num_train=1, progress=False)
    clean = load_detection_dataset(folder, "val", id2label=model.config.id2label, progress=False)
    print(f"{len(clean)} images; {machine()}")
    table: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in (*LABEL_ERRORS, "all")}
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        planted, dropped, objects = {}, {}, []
        for index, row in enumerate(clean):
            size = row["width"], row["height"]
            changed, kinds, gone = plant(row["objects"], size, args.fraction, len(model.config.id2label), rng)
            objects.append(changed)
            planted |= {(index, number): kind for number, kind in enumerate(kinds) if kind}
            dropped |= {(index, number): box for number, box in enumerate(gone)}
        feature = clean.features["objects"]
        dataset = clean.remove_columns("objects").add_column("objects", objects, feature=feature)
        loader = DataLoader(dataset, batch_size=16, collate_fn=DetectionCollator(processor))
        errors = find_label_errors(model, loader, dataset, progress=False)
        total = len(planted) + len(dropped)

        def found(chosen: Any, planted: Any = planted, dropped: Any = dropped) -> Counter[str]:
            counts: Counter[str] = Counter()
            hit = set()
            for error in chosen:
                key: Any = (error.image, error.annotation)
                if error.kind == "duplicate" and key not in planted:  # the copy follows the original
                    key = (error.image, error.annotation + 1)
                if key in planted and key not in hit:
                    counts[planted[key]] += 1
                    hit.add(key)
                for other, box in dropped.items():
                    near = other[0] == error.image and error.kind == "missing" and ("d", other) not in hit
                    if near and overlap(error.suggested_box, [box]) >= 0.5:
                        counts["missing"] += 1
                        hit.add(("d", other))
            return counts

        sure = [error for error in errors if error.suspicion >= 0.3]
        top, all_found = found(errors[:total]), found(sure)
        numbers = Counter(planted.values()) + Counter({"missing": len(dropped)})
        flagged = Counter(error.kind for error in sure)
        for kind in LABEL_ERRORS:
            recalls = top[kind] / numbers[kind], all_found[kind] / numbers[kind]
            table[kind].append((numbers[kind], *recalls, flagged[kind]))
        everything = sum(top.values()) / total, sum(all_found.values()) / total
        table["all"].append((total, *everything, len(sure), sum(all_found.values()) / max(1, len(sure))))
    print("| | planted | recall of the N highest | recall at 0.3 | flagged at 0.3 |\n|---|---|---|---|---|")
    for kind, rows in table.items():
        n, top_recall, recall, flags = (statistics.median(values) for values in list(zip(*rows, strict=True))[:4])
        print(f"| {kind} | {n:.0f} | {top_recall:.2f} | {recall:.2f} | {flags:.0f} |")
    precision = statistics.median(row[4] for row in table["all"])
    print(f"Precision at 0.3: {precision:.2f}. Medians of {len(args.seeds)} seeds.")


if __name__ == "__main__":
    main()
