"""Check an annotated folder before training: read every record and every image, and report all problems.

    python examples/check_dataset.py FOLDER
    python examples/check_dataset.py FOLDER --fix CLEANED --report report.html

The format (COCO, YOLO, Pascal VOC or imagefolder) is detected. The exit code is 1 if there are errors, which would
break training, or with `--strict` any findings. `--fix` writes a cleaned COCO copy; FOLDER itself is never modified.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_detr.dataset_check import KINDS, check_dataset, write_clean_copy, write_page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned COCO copy to this new folder")
    parser.add_argument("--report", type=Path, default=Path("dataset_report.html"), help="HTML page with the findings")
    parser.add_argument("--json", type=Path, help="also write all findings to this JSON file")
    parser.add_argument("--num_queries", type=int, default=100, help="number of object queries of the model")
    parser.add_argument("--feature_stride", type=int, default=32, help="stride of the model's feature map, in pixels")
    parser.add_argument("--image_size", type=int, default=800, help="shortest edge in training, in pixels")
    parser.add_argument("--bbox_format", choices=("xywh", "xyxy"), help="how boxes are stored; default: detect")
    parser.add_argument("--num_workers", type=int, help="processes that read images; default: one per CPU core")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings as well")
    parser.add_argument("--show", type=int, default=3, help="number of examples to print per kind of finding")
    args = parser.parse_args()
    if not args.folder.exists():
        parser.error(f"{args.folder} does not exist.")
    for file in (args.report, args.json):
        if file is not None and file.resolve().is_relative_to(args.folder.resolve()):
            parser.error(f"{file} is inside {args.folder}, which is never modified. Choose another file.")

    try:
        result = check_dataset(
            args.folder,
            num_queries=args.num_queries,
            feature_stride=args.feature_stride,
            size={"shortest_edge": args.image_size, "longest_edge": round(args.image_size * 1333 / 800)},
            bbox_format=args.bbox_format,
            num_workers=args.num_workers,
        )
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    for name, split in result.splits.items():
        boxes = sum(len(image.boxes) for image in split.images)
        print(f"{name}: {len(split.images)} images, {boxes} boxes, {len(split.names)} classes ({split.format})")
    for code, count in result.counts().items():
        severity, description, fix = KINDS[code]
        print(f"\n{severity.upper():8} {count:6}  {description}. {fix}")
        found = [finding for finding in result.findings if finding.code == code]
        for finding in found[: args.show]:
            print(f"    {finding}")
        if count > args.show:
            print(f"    ... and {count - args.show} more")
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


if __name__ == "__main__":
    sys.exit(main())
