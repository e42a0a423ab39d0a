"""The doctor: read an annotated folder once, and tell what is wrong with it before a model is trained on it.

    python examples/check_dataset.py FOLDER
    python examples/check_dataset.py FOLDER --fix CLEANED --report report.html

COCO, YOLO, Pascal VOC or imagefolder, found by looking. Exits with 1 if something would break training, so that it can
guard a pipeline; `--strict` takes warnings for errors. `--fix` writes a cleaned COCO copy; FOLDER is only read.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from hf_detr.dataset_check import KINDS, examine, write_clean_copy, write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned COCO copy into this new folder")
    parser.add_argument("--report", type=Path, default=Path("dataset_report.html"), help="the page to look at")
    parser.add_argument("--json", type=Path, help="write all findings to this file as well")
    parser.add_argument("--num_queries", type=int, default=100, help="object queries of the model")
    parser.add_argument("--feature_stride", type=int, default=32, help="pixels to a cell of the feature map")
    parser.add_argument("--image_size", type=int, default=800, help="shortest edge in training")
    parser.add_argument("--bbox_format", choices=("xywh", "xyxy"), help="how boxes are stored, if it is known")
    parser.add_argument("--num_workers", type=int, help="processes that read images; default: one a core")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings, too")
    parser.add_argument("--show", type=int, default=3, help="examples to print of each kind of finding")
    args = parser.parse_args()
    if not args.folder.exists():
        parser.error(f"There is no {args.folder}.")
    for file in (args.report, args.json):
        if file is not None and file.resolve().is_relative_to(args.folder.resolve()):
            parser.error(f"{file} lies in {args.folder}, which is only read. Name another --report.")

    examination = examine(
        args.folder,
        num_queries=args.num_queries,
        feature_stride=args.feature_stride,
        shortest_edge=args.image_size,
        longest_edge=round(args.image_size * 1333 / 800),
        bbox_format=args.bbox_format,
        num_workers=args.num_workers,
    )
    for split, source in examination.sources.items():
        boxes = sum(len(photo.boxes) for photo in source.photos)
        print(f"{split}: {len(source.photos)} images, {boxes} boxes, {len(source.names)} classes ({source.kind})")
    for code, count in Counter(finding.code for finding in examination.findings).items():
        severity, what, fix = KINDS[code]
        print(f"\n{severity.upper():8} {count:6}  {what}. {fix}")
        found = [finding for finding in examination.findings if finding.code == code]
        for finding in found[: args.show]:
            print(f"    {finding}")
        if count > args.show:
            print(f"    ... and {count - args.show} more")
    print(f"\n{len(examination.errors)} errors, {len(examination.findings) - len(examination.errors)} warnings")
    print(f"Report: {write_report(examination, args.report)}")
    if args.json:
        listed = [{n: getattr(f, n) for n in ("severity", "code", "split", "file", "record", "message")}
                  for f in examination.findings]  # fmt: skip
        args.json.write_text(json.dumps(listed, indent=2))
    if args.fix:
        done = write_clean_copy(examination, args.fix)
        print(f"Cleaned copy in {args.fix}: " + (", ".join(f"{n} {code}" for code, n in done.items()) or "no change"))
    failed = examination.findings if args.strict else examination.errors
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
