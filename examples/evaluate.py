"""Print the COCO table of a checkpoint on a data set; with --report, also write a page that analyses its errors.

A model with masks is measured by those, too: mask AP and, where the data set has stuff, panoptic quality. With
--detections, what predict.py or another program has found is measured.

    accelerate launch examples/evaluate.py --model CHECKPOINT --dataset FOLDER --report report
    python examples/evaluate.py --detections predictions --dataset FOLDER
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_detr.data import DetectionCollator, load_detection_dataset, require_objects, source_of
from hf_detr.evaluation import (
    CocoEvaluator,
    ModelEvaluation,
    StoredDetections,
    best_thresholds,
    f1_by_threshold,
    format_evaluation,
    save_class_thresholds,
    write_report,
)
from hf_detr.interop import OtherDetector
from hf_detr.prediction import open_model
from hf_detr.runtime import exit_on_error, import_extra, prepare_output, require_source
from hf_detr.training import use_all_cores


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument(
        "--model",
        help="checkpoint (folder or Hub id), of hf_detr or another detector of transformers, or a folder of export.py",
    )
    measured.add_argument(
        "--detections", type=Path, help="folder of predict.py, or a file of COCO results: measure these instead"
    )
    parser.add_argument("--dataset", help="annotated folder, or data set on the Hub")
    parser.add_argument("--split", default="val", help="which images; default val")
    parser.add_argument("--annotations", metavar="FILE", help="annotation file of the split, if it is not found")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images, if it is not beside the annotations")
    parser.add_argument("--bbox_format", choices=("xywh", "xyxy"), help="xyxy: boxes are stored as corners")
    parser.add_argument("--crowds_as_objects", action="store_true", help="count objects that are marked as crowds")
    parser.add_argument(
        "--masks",
        action=argparse.BooleanOptionalAction,
        help="measure masks, too; default: those of a model or a job that has them",
    )
    parser.add_argument("--batch_size", type=int, help="images per process and forward pass, default 8")
    parser.add_argument("--num_workers", type=int, help="processes that load images, default 1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of prediction, for a checkpoint or an OpenVINO export; default: that of the weights",
    )
    parser.add_argument(
        "--max_detections",
        type=int,
        default=100,
        help="detections that count per image and class in the COCO table, by score; default: 100, as in COCO",
    )
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--report", type=Path, help="write report.html and report.json into this folder")
    parser.add_argument(
        "--save_thresholds",
        action="store_true",
        help='store the best threshold of each class in the checkpoint (a local folder), for threshold="per_class"',
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not args.dataset and not args.annotations:
        parser.error("name a --dataset, or --annotations FILE")
    if args.max_detections < 1:
        parser.error("--max_detections must be at least 1")
    args.dataset = args.dataset or str(Path(args.annotations).parent)
    if args.detections:
        for name in ("batch_size", "num_workers", "dtype", "save_thresholds"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is for a --model, not for --detections.")
    else:
        if args.save_thresholds and not (Path(args.model) / "preprocessor_config.json").is_file():
            parser.error(
                f"--save_thresholds writes into the checkpoint, and {args.model} is not a local folder with a "
                "preprocessor."
            )
        require_source(args.model)
    require_source(args.dataset)
    return args


def save_thresholds(model: str, boxes: CocoEvaluator) -> None:
    """Store the best threshold of each class in the checkpoint, and print them."""
    annotations, detections, _ = boxes.things()
    f1 = f1_by_threshold(annotations, detections, boxes.id2label)
    path = save_class_thresholds(model, best_thresholds(f1))
    print(f'\n{path} has a threshold for each class now; threshold="per_class" uses them:')
    rows = list(f1["best"].items())
    for name, row in rows[:100]:
        found = row["threshold"] is not None
        print(f"  {name}: {row['threshold']:.3f}" if found else f"  {name}: 0.500 (no true positive)")
    if len(rows) > 100:
        print(f"  and {len(rows) - 100} more classes")


def main() -> None:
    args = parse_args()
    prepare_output(args.output)
    prepare_output(args.report, folder=True)
    import_extra("hotcoco", "evaluation")
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    if args.detections:
        stored = StoredDetections.read(args.detections)
        classes = stored.id2label
        with_masks = stored.measures_masks(args.masks)
    else:
        model, processor = open_model(args.model, args.dtype)
        if isinstance(model, OtherDetector) and args.save_thresholds:
            raise ValueError("--save_thresholds is for the checkpoints of hf_detr, whose predictions can use them.")
        if args.masks and not model.has_masks:
            raise ValueError(f"{args.model} has no masks to measure. Train them: examples/finetune.py --masks.")
        classes, with_masks = model.config.id2label, model.has_masks if args.masks is None else args.masks
    with accelerator.main_process_first():  # the other processes read its cache
        dataset = load_detection_dataset(
            args.dataset,
            args.split,
            files={args.split: args.annotations} if args.annotations else None,
            images=args.images,
            id2label=classes,
            bbox_format=args.bbox_format,
            crowds_as_objects=args.crowds_as_objects,
            masks=with_masks,
            progress=accelerator.is_main_process,
        )
    require_objects(dataset, source_of(dataset), "measured")
    evaluation = ModelEvaluation(dataset, with_masks=with_masks, max_detections=args.max_detections)
    if args.detections:
        add = stored.add_masks_to if with_masks else stored.add_to
        notes = add(evaluation if with_masks else evaluation.boxes, dataset, args.max_detections)
    else:
        notes = []
        loader = DataLoader(
            dataset,
            batch_size=8 if args.batch_size is None else args.batch_size,
            collate_fn=DetectionCollator(processor),
            num_workers=1 if args.num_workers is None else args.num_workers,
        )
        model, loader = model.to(accelerator.device), accelerator.prepare(loader)  # unwrapped: nothing trains
        evaluation.run(model, loader, processor, progress=accelerator.is_main_process)
    if accelerator.is_main_process:
        source = args.detections or args.model
        metrics = evaluation.compute(args.max_detections) | ({"notes": notes} if notes else {})
        print(f"{source} on {len(dataset)} images of {source_of(dataset)}\n{format_evaluation(metrics)}")
        for note in notes:
            print(f"Note: {note}")
        if args.output:
            args.output.write_text(json.dumps(metrics, indent=2))
        if args.report:
            title = f"{Path(source).resolve().name} on {Path(args.dataset).name}"
            write_report(
                args.report, evaluation.boxes, dataset, title, max_detections=args.max_detections, metrics=metrics
            )
            print(f"\n{args.report / 'report.html'} shows the errors.")
        if args.save_thresholds:
            save_thresholds(args.model, evaluation.boxes)
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_error():
        main()
