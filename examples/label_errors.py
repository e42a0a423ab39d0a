"""Find annotations that a model contradicts: missing, mislabelled, badly placed, drawn twice, or not an object.

    python examples/label_errors.py --model CHECKPOINT --dataset FOLDER

The model must not have been trained on these annotations; the default is the validation split. To check the training
images, train with `finetune.py --folds N --output_dir FOLDER`, and name that folder with `--model`: each image is
checked with the model that has not seen it.

OUTPUT_DIR gets `label_errors.html` with crops, the highest suspicion first; `label_errors.json`; and, for labelling
tools, `label_studio.json` and `coco.json` (CVAT), which contain the affected images with corrected boxes. The data set
is never modified.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch.utils.data import DataLoader

from hf_detr import DetrImageProcessor
from hf_detr.data import DetectionCollator, load_detection_dataset, require_objects, source_of
from hf_detr.dataset_check import (
    LABEL_ERRORS,
    LabelError,
    as_records,
    find_label_errors,
    write_coco_suggestions,
    write_label_errors_page,
    write_label_studio,
)
from hf_detr.interop import load_model
from hf_detr.runtime import exit_on_error, prepare_output, require_source
from hf_detr.speed import prepare_for_inference
from hf_detr.training import folder_of_fold, held_out_images, read_folds, use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint, a folder or a Hub id; or the folder of --folds")
    parser.add_argument("--dataset", help="annotated folder, or data set on the Hub")
    parser.add_argument("--split", help="which images; default val, with folds train")
    parser.add_argument("--annotations", metavar="FILE", help="annotation file of the split, if it is not found")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images, if it is not beside the annotations")
    parser.add_argument("--bbox_format", choices=("xywh", "xyxy"), help="xyxy: boxes are stored as corners")
    parser.add_argument("--crowds_as_objects", action="store_true", help="check objects that are marked as crowds")
    parser.add_argument("--output_dir", type=Path, default=Path("label_errors"), help="default: label_errors")
    parser.add_argument("--min_suspicion", type=float, default=0.3, help="0 to 1, default 0.3; lower finds more")
    parser.add_argument("--label_studio_root", default="", metavar="TEXT", help="put before the names of image files")
    parser.add_argument("--batch_size", type=int, default=8, help="images per forward pass, default 8")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that load images, default 1")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not args.dataset and not args.annotations:
        parser.error("name a --dataset, or --annotations FILE")
    args.dataset = args.dataset or str(Path(args.annotations).parent)
    if not 0 <= args.min_suspicion <= 1:
        parser.error("--min_suspicion is between 0 and 1")
    folds = read_folds(args.model)
    if folds is None:
        require_source(args.model)
    require_source(args.dataset)
    if Path(args.dataset).is_dir() and args.output_dir.resolve().is_relative_to(Path(args.dataset).resolve()):
        parser.error(f"{args.output_dir} is inside {args.dataset}, which is never modified. Choose another folder.")
    prepare_output(args.output_dir, folder=True)
    if folds is not None and args.split not in (None, "train"):
        parser.error(f"the models in {args.model} were trained on folds of the training images; omit --split")
    together = Path(args.model).parent
    if folds is None and args.split == "train" and Path(args.model).is_dir() and read_folds(together) is not None:
        parser.error(f"{args.model} was trained on most of these images; name {together} with --model")
    if not torch.cuda.is_available():
        use_all_cores()
    if folds is None:
        dataset, errors = check(args, args.model)
    else:
        found = []
        for number, images in enumerate(folds["held_out"], start=1):
            print(f"Fold {number} of {folds['folds']}", flush=True)
            model = str(folder_of_fold(Path(args.model), number))
            found.append(check(args, model, fold=(number, folds["folds"]), images=images))
        starts = accumulate([len(dataset) for dataset, _ in found], initial=0)
        errors = [
            replace(error, image=start + error.image)
            for start, (_, of_fold) in zip(starts, found, strict=False)
            for error in of_fold
        ]
        errors.sort(key=lambda error: -error.suspicion)
        dataset = concatenate_datasets([dataset for dataset, _ in found])
    counts = Counter(error.kind for error in errors)
    print(f"{len(errors)} suspected annotation errors in {len(dataset)} images of {source_of(dataset)}:")
    for kind, text in LABEL_ERRORS.items():
        print(f"  {counts[kind]:5}  {kind}: {text}")
    annotations = sum(len(objects["bbox"]) for objects in dataset["objects"])
    if sum(error.annotation is not None for error in errors) > annotations / 2:
        print("That is more than half of the annotations: the model may not be trained well enough to check them.")
    (args.output_dir / "label_errors.json").write_text(json.dumps(as_records(errors, dataset), indent=1))
    page = write_label_errors_page(errors, dataset, args.output_dir / "label_errors.html")
    write_label_studio(errors, dataset, args.output_dir / "label_studio.json", root=args.label_studio_root)
    write_coco_suggestions(errors, dataset, args.output_dir / "coco.json")
    print(f"Open {page} to review them; files for labelling tools are in {args.output_dir}.")


def check(
    args: argparse.Namespace, checkpoint: str, fold: tuple[int, int] | None = None, images: str = ""
) -> tuple[Any, list[LabelError]]:
    """The annotated images, or a fold of them, and what a model contradicts in them.

    Args:
        images: digest of the names of the images that the fold had when the model was trained.
    """
    model = prepare_for_inference(load_model(checkpoint)).to("cuda" if torch.cuda.is_available() else "cpu")
    processor = DetrImageProcessor.from_pretrained(checkpoint)
    split = args.split or "val"
    dataset = load_detection_dataset(
        args.dataset,
        split,
        files={split if fold is None else "train": args.annotations} if args.annotations else None,
        images=args.images,
        id2label=model.config.id2label,
        bbox_format=args.bbox_format,
        crowds_as_objects=args.crowds_as_objects,
        fold=fold,
    )
    if fold is not None and held_out_images(dataset) != images:
        raise ValueError(
            f"{source_of(dataset)} has other images than when {args.model} was trained, so that its models may have "
            "seen those that they would check. Train again with --folds."
        )
    require_objects(dataset, source_of(dataset), "checked")
    loader = DataLoader(
        dataset, batch_size=args.batch_size, collate_fn=DetectionCollator(processor), num_workers=args.num_workers
    )
    return dataset, [e for e in find_label_errors(model, loader, dataset) if e.suspicion >= args.min_suspicion]


if __name__ == "__main__":
    with exit_on_error():
        main()
