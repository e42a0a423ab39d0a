"""How many planted annotation errors `label_errors.py` finds on drawn images: precision and recall.

    python benchmarks/label_errors.py plant FOLDER --split val --seed 0
    python examples/label_errors.py --model CHECKPOINT --dataset FOLDER --min_suspicion 0.15 --output_dir FOUND
    python benchmarks/label_errors.py score FOLDER FOUND/label_errors.json

`plant` draws the data set of the quick start, with errors in one split: each of five kinds in 5 % of the annotations,
so about 25 % are affected: the annotation is dropped, gets another class, is moved by 30 to 50 % of its size, gets a
slightly shifted copy, or a box without an object is added. For the validation split, CHECKPOINT is that of
`examples/finetune.py` without arguments, trained on images without errors. For the training split it is the folder of a
cross-validation (`finetune.py --dataset FOLDER --folds 3 --output_dir CV`), whose models learn from wrong annotations.

`score` takes one or more pairs of a folder and what was found in it, and prints medians. A planted error counts as
found if its annotation (of a duplicate: one of the two) is reported, as any kind of error. A dropped annotation counts
as found if a "missing" object has an IoU of at least 0.5 with it. Recall is measured for the N highest suspicions, N
being the number of planted errors, and for all of at least 0.3; precision for all of at least 0.3.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from hf_detr.data import draw_shapes_dataset, export_coco, id2label, load_detection_dataset
from hf_detr.dataset_check import LABEL_ERRORS

PLANTED = "planted.json"

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


def write_planted(args: argparse.Namespace) -> None:
    """Draw the data set, with errors in one split, and note them in `planted.json` by file name and annotation id."""
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw_shapes_dataset(Path(scratch) / "drawn", progress=False)
        planted: dict[str, Any] = {"split": args.split, "annotations": [], "dropped": []}
        for split in ("train", "val"):
            dataset = load_detection_dataset(drawn, split, cache_dir=Path(scratch) / "cache", progress=False)
            if split == args.split:
                dataset = with_errors(dataset, args.fraction, args.seed, planted)
            export_coco(dataset, args.folder, split, progress=False)
    (args.folder / PLANTED).write_text(json.dumps(planted))
    print(f"{len(planted['annotations'])} wrong and {len(planted['dropped'])} dropped annotations in {args.folder}")


def with_errors(dataset: Any, fraction: float, seed: int, planted: dict[str, Any]) -> Any:
    rng, objects, count = np.random.default_rng(seed), [], 0
    for row in dataset:
        size, name = (row["width"], row["height"]), row["file_name"]
        changed, kinds, gone = plant(row["objects"], size, fraction, len(id2label(dataset)), rng)
        changed["id"] = [count + index for index in changed["id"]]
        count += len(kinds)
        objects.append(changed)
        for annotation, kind in zip(changed["id"], kinds, strict=True):
            if kind:
                planted["annotations"].append([name, annotation, kind])
        planted["dropped"] += [[name, box] for box in gone]
    feature = dataset.features["objects"]
    return dataset.remove_columns("objects").add_column("objects", objects, feature=feature)


def hits(records: list[dict[str, Any]], planted: dict[str, Any]) -> Counter[str]:
    """How many planted errors of each kind are among the reported ones."""
    kinds = {(name, annotation): kind for name, annotation, kind in planted["annotations"]}
    dropped = dict(enumerate(planted["dropped"]))
    counts: Counter[str] = Counter()
    for record in records:
        key = record["file_name"], record["annotation_id"]
        if record["kind"] == "duplicate" and key not in kinds:  # the copy follows the original
            key = key[0], key[1] + 1
        if key in kinds:
            counts[kinds.pop(key)] += 1
        elif record["kind"] == "missing":
            for index, (name, box) in list(dropped.items()):
                if name == record["file_name"] and overlap(record["suggested_bbox"], [box]) >= 0.5:
                    counts["missing"] += 1
                    del dropped[index]
    return counts


def print_scores(args: argparse.Namespace) -> None:
    if len(args.pairs) % 2:
        raise SystemExit("score takes pairs: FOLDER LABEL_ERRORS.json ...")
    table: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in (*LABEL_ERRORS, "all")}
    precisions = []
    for folder, file in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        planted = json.loads((Path(folder) / PLANTED).read_text())
        records = json.loads(Path(file).read_text())  # the highest suspicion first
        numbers = Counter(kind for _, _, kind in planted["annotations"]) + Counter(missing=len(planted["dropped"]))
        sure = [record for record in records if record["suspicion"] >= 0.3]
        top, found = hits(records[: numbers.total()], planted), hits(sure, planted)
        flagged = Counter(record["kind"] for record in sure)
        for kind in LABEL_ERRORS:
            recalls = top[kind] / numbers[kind], found[kind] / numbers[kind]
            table[kind].append((numbers[kind], *recalls, flagged[kind]))
        total = numbers.total()
        table["all"].append((total, top.total() / total, found.total() / total, len(sure)))
        precisions.append(found.total() / max(1, len(sure)))
    print("| | planted | recall of the N highest | recall at 0.3 | flagged at 0.3 |\n|---|---|---|---|---|")
    for kind, rows in table.items():
        n, top_recall, recall, flags = (statistics.median(values) for values in zip(*rows, strict=True))
        print(f"| {kind} | {n:.0f} | {top_recall:.2f} | {recall:.2f} | {flags:.0f} |")
    print(f"Precision at 0.3: {statistics.median(precisions):.2f}. Medians of {len(precisions)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    planting = commands.add_parser("plant")
    planting.add_argument("folder", type=Path)
    planting.add_argument("--split", choices=("train", "val"), default="val")
    planting.add_argument("--fraction", type=float, default=0.05)
    planting.add_argument("--seed", type=int, default=0)
    planting.set_defaults(run=write_planted)
    scoring = commands.add_parser("score")
    scoring.add_argument("pairs", nargs="+", metavar="FOLDER LABEL_ERRORS.json")
    scoring.set_defaults(run=print_scores)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
