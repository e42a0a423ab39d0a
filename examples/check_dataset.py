"""Check a dataset before training: read every record and every image as training does, and report all problems.

    python examples/check_dataset.py DATASET
    python examples/check_dataset.py DATASET --fix CLEANED --report report.html

DATASET is an annotated folder (the format is detected, see docs/layouts.md), an annotation file, or a Hugging Face
dataset, saved or on the Hub. `--fix` writes a cleaned COCO copy; DATASET itself is never modified.

Exit codes: 0 if training can start; 1 if there are errors, which would break it, or with `--strict` any findings; 2 if
the data cannot be read at all.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_detr.dataset_check import KINDS, CheckResult, check_dataset, write_clean_copy, write_page
from hf_detr.runtime import exit_on_error, prepare_output, require_source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="annotated folder, annotation file, or dataset on the Hub")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", metavar="FILE", help=f"annotation file of the {split} split")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images, if it is not beside the annotations")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned COCO copy to this new folder")
    parser.add_argument("--report", type=Path, default=Path("dataset_report.html"), help="HTML page with the findings")
    parser.add_argument("--json", type=Path, help="also write all findings to this JSON file")
    parser.add_argument("--num_queries", type=int, default=100, help="number of object queries of the model")
    parser.add_argument("--feature_stride", type=int, default=32, help="stride of the model's feature map, in pixels")
    parser.add_argument("--image_size", type=int, default=800, help="shortest edge in training, in pixels")
    parser.add_argument("--bbox_format", choices=("xywh", "xyxy"), help="how boxes are stored; default: detect")
    parser.add_argument("--crowds_as_objects", action="store_true", help="learn objects that are marked as crowds")
    parser.add_argument("--masks", action="store_true", help="also check masks; panoptic annotations come first")
    parser.add_argument("--image_range", type=float, nargs=2, metavar=("BLACK", "WHITE"),
                        help="values of images that are not 8-bit, such as 0 4095")  # fmt: skip
    parser.add_argument("--num_workers", type=int, help="threads that read images; default: one per CPU core")
    parser.add_argument("--streaming", action="store_true", help="images stay in the shards of DATASET")
    parser.add_argument("--engine", choices=("ray",), help="read the images on a Ray cluster (RAY_ADDRESS)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings as well")
    parser.add_argument("--show", type=int, default=3, help="number of examples to print per kind of finding")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.dataset is None and args.train is None:
        parser.error("name a DATASET, or its annotations with --train FILE")
    args.dataset = args.dataset or str(Path(args.train).parent)
    if args.streaming and args.fix:
        parser.error("--fix copies images to this machine; omit --streaming")
    for file in (args.report, args.json):
        if file is not None and file.resolve().is_relative_to(Path(args.dataset).resolve()):
            parser.error(f"{file} is inside {args.dataset}, which is never modified. Choose another file.")
    prepare_output(args.report)
    prepare_output(args.json)
    files = {split: getattr(args, split) for split in ("train", "val", "test") if getattr(args, split)}

    try:
        require_source(args.dataset)
        result = check_dataset(
            args.dataset,
            files=files or None,
            images=args.images,
            masks=args.masks,
            num_queries=args.num_queries,
            feature_stride=args.feature_stride,
            size={"shortest_edge": args.image_size, "longest_edge": round(args.image_size * 1333 / 800)},
            image_range=args.image_range,
            bbox_format=args.bbox_format,
            crowds_as_objects=args.crowds_as_objects,
            num_workers=args.num_workers,
            streaming=args.streaming,
            engine=args.engine,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"The data cannot be read: {error}", file=sys.stderr)
        return 2
    print_findings(result, args.show)
    if args.streaming and "val" not in result.splits:
        print("\nThere is no validation split: finetune.py --streaming needs annotations on this machine (--val FILE).")
    print(f"\n{len(result.errors)} errors, {len(result.findings) - len(result.errors)} warnings")
    print(f"Report: {write_page(result, args.report)}")
    if args.json:
        listed = [{n: getattr(f, n) for n in ("severity", "code", "split", "file", "record", "message")}
                  for f in result.findings]  # fmt: skip
        args.json.write_text(json.dumps(listed, indent=2))
    if args.fix:
        try:
            handled = write_clean_copy(result, args.fix)
        except FileExistsError as error:
            parser.error(str(error))
        summary = ", ".join(f"{count} {code}" for code, count in handled.items())
        print(f"Cleaned copy in {args.fix}: {summary or 'no change'}")
    failed = result.findings if args.strict else result.errors
    return 1 if failed else 0


def print_findings(result: CheckResult, show: int) -> None:
    """What was read, and `show` examples of each kind of finding."""
    for name, split in result.splits.items():
        boxes = [box for image in split.images for box in image.boxes]
        crowds = sum(box.iscrowd for box in boxes)
        counted = f"{len(boxes) - crowds} boxes" + (f" and {crowds} crowds" if crowds else "")
        print(f"{name}: {len(split.images)} images, {counted}, {len(split.names)} classes ({split.format})")
    for code, count in result.counts().items():
        severity, description, fix = KINDS[code]
        print(f"\n{severity.upper():8} {count:6}  {description}. {fix}")
        found = [finding for finding in result.findings if finding.code == code]
        for finding in found[:show]:
            print(f"    {finding}")
        if count > show:
            print(f"    ... and {count - show} more")


if __name__ == "__main__":
    with exit_on_error():
        sys.exit(main())
