"""Convert checkpoints: the files of the papers' code and transformers' to ours, and ours to transformers'.

    python examples/convert.py detr-r50-e632da11.pth OUT
    python examples/convert.py facebook/detr-resnet-50 OUT
    python examples/convert.py CHECKPOINT OUT --to transformers

`from_pretrained` reads transformers' checkpoints, too; a converted one only loads faster. `--to
transformers` needs a model with the decoder of DETR, Conditional DETR or DAB-DETR, such as one fine-tuned from a
published checkpoint. A mask head is converted, too. The papers' files, of DETR, Conditional DETR, DAB-DETR and DN-DETR,
do not always contain the number of attention heads, the class names, and whether the backbone is DC5. Options set them;
the defaults are 8 heads, COCO's names if there are 91 classes (COCO panoptic's if there are 250), and DC5 if the file
name contains "dc5".
"""

import argparse
import json
from pathlib import Path

from hf_detr import DetrImageProcessor
from hf_detr.interop import load_model, load_original, save_for_transformers
from hf_detr.runtime import exit_on_error, prepare_output, require_source


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .pth file of the papers' code, a checkpoint folder or a Hub id")
    parser.add_argument("output_dir", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--to", choices=("hf_detr", "transformers"), default="hf_detr", help="whose format is written; default hf_detr"
    )
    parser.add_argument("--dilation", action=argparse.BooleanOptionalAction, help=".pth: whether the backbone is DC5")
    parser.add_argument(
        "--attention_heads", type=int, help=".pth: number of attention heads; default: 8, as in the paper"
    )
    parser.add_argument("--labels", type=Path, help='.pth: JSON with the class names, ["cat", "dog"] or {"0": "cat"}')
    parser.add_argument("--revision", default="main", help="Hub: branch, tag or commit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"{args.output_dir} already exists and is not an empty folder.")
    is_original = Path(args.source).is_file() or args.source.endswith(".pth")
    for name in ("dilation", "attention_heads", "labels"):
        if not is_original and getattr(args, name) is not None:
            parser.error(f"--{name} is only for the papers' .pth files; {args.source} has it in its config.")
    if args.labels and not args.labels.is_file():
        parser.error(f"There is no file {args.labels}.")
    args.is_original = is_original
    return args


def main() -> None:
    args = parse_args()
    require_source(args.source)
    prepare_output(args.output_dir)
    if args.is_original:
        labels = json.loads(args.labels.read_text()) if args.labels else None
        if labels is not None:
            labels = {int(i): name for i, name in (labels.items() if isinstance(labels, dict) else enumerate(labels))}
        model, notes = load_original(
            args.source, dilation=args.dilation, attention_heads=args.attention_heads, id2label=labels
        )
        processor = DetrImageProcessor()  # its defaults are the paper's
    else:
        model, info = load_model(args.source, revision=args.revision, output_loading_info=True)
        processor = DetrImageProcessor.from_pretrained(args.source, revision=args.revision)
        if info["missing_keys"]:
            raise ValueError(f"{args.source} has no weights for {sorted(info['missing_keys'])}; nothing was written.")
        notes = [f"{len(info['unexpected_keys'])} weights that do not belong to the model are dropped."]
    if args.to == "transformers":
        save_for_transformers(model, processor, args.output_dir)
    else:
        model.save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    config = model.config
    print(
        *notes,
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.num_predictions} queries, "
        f"{config.num_labels} classes, backbone {config.backbone}. Saved in {args.output_dir}",
        sep="\n",
    )


if __name__ == "__main__":
    with exit_on_error():
        main()
