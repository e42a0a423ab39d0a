"""Convert DETR checkpoints: the paper's own files and transformers' into ours, and ours into transformers'.

    python examples/convert.py detr-r50-e632da11.pth OUT
    python examples/convert.py facebook/detr-resnet-50 OUT
    python examples/convert.py runs/shapes-1 OUT --to transformers

`from_pretrained` reads transformers' checkpoints by itself; converting them only saves doing it again. What the paper's
files do not say (attention heads, DC5 if the file's name lacks "dc5", names of classes other than COCO's) is told here.
"""

import argparse
import json
from pathlib import Path

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.interop import load_original, save_for_transformers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .pth file of facebookresearch/detr, a checkpoint folder or a Hub id")
    parser.add_argument("output_dir", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--to", choices=("hf_detr", "transformers"), default="hf_detr")
    parser.add_argument("--dilation", action=argparse.BooleanOptionalAction, help=".pth: the backbone is DC5, or not")
    parser.add_argument("--attention_heads", type=int, help=".pth: heads of attention, 8 in the paper")
    parser.add_argument("--labels", type=Path, help='.pth: JSON with the class names, ["cat", "dog"] or {"0": "cat"}')
    parser.add_argument("--revision", default="main", help="Hub: branch, tag or commit")
    args = parser.parse_args()
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"{args.output_dir} exists and is not an empty folder.")
    is_original = Path(args.source).is_file() or args.source.endswith(".pth")
    for name in ("dilation", "attention_heads", "labels"):
        if not is_original and getattr(args, name) is not None:
            parser.error(f"--{name} is for the paper's .pth files; {args.source} says it by itself.")
    if args.labels and not args.labels.is_file():
        parser.error(f"There is no file {args.labels}.")
    return args


def main() -> None:
    args = parse_args()
    if Path(args.source).is_file() or args.source.endswith(".pth"):
        labels = json.loads(args.labels.read_text()) if args.labels else None
        if labels is not None:
            labels = {int(i): name for i, name in (labels.items() if isinstance(labels, dict) else enumerate(labels))}
        model, notes = load_original(
            args.source, dilation=args.dilation, attention_heads=args.attention_heads, id2label=labels
        )
        processor = DetrImageProcessor()  # its defaults are the paper's
    else:
        model, info = DetrForDetection.from_pretrained(args.source, revision=args.revision, output_loading_info=True)
        processor = DetrImageProcessor.from_pretrained(args.source, revision=args.revision)
        if info["missing_keys"]:
            raise SystemExit(f"{args.source} has no weights for {sorted(info['missing_keys'])}; nothing was written.")
        notes = [f"{len(info['unexpected_keys'])} weights belong to other parts and are left out."]
    if args.to == "transformers":
        save_for_transformers(model, processor, args.output_dir)
    else:
        model.save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    config = model.config
    print(
        *notes,
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.num_queries} queries, "
        f"{config.num_labels} classes, backbone {config.backbone}. Saved in {args.output_dir}",
        sep="\n",
    )


if __name__ == "__main__":
    main()
