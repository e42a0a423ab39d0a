"""Export a checkpoint as a graph for other runtimes: ONNX Runtime, OpenVINO, or PyTorch without this package.

    python examples/export.py MODEL --format onnx
    python examples/export.py MODEL --format openvino --int8 --calibration IMAGES --dataset FOLDER
    python examples/export.py MODEL --format onnx --shape 1 320 320 --opset 18 --post_process

The graph of a model with masks also gives `pred_masks`, logits of the masks of all queries at a quarter of the size of
the batch, and `mask_sizes`, the rows and columns of each that show the image. The graph takes any batch size, height
and width, or with --shape only one, and `pixel_mask` as an input, unless images are never padded or their padding
cannot be masked. Before anything is written, its outputs are compared with those of PyTorch on batches of many shapes,
with and without padding. Files in the output folder:

    model.onnx, or model.xml and model.bin, or model.pt2
    config.json, preprocessor_config.json    of the model and its image processor
    export.json                              the comparison and its differences; AP before and after

To use an export:

    from hf_detr.export import load_exported
    model = load_exported(FOLDER)  # dtype="bfloat16" for OpenVINO on a CPU that supports it
    detector = pipeline("object-detection", model=model, image_processor=FOLDER)

`examples/evaluate.py --model FOLDER` evaluates an export. Requirements: pip install "hf_detr[onnx]" or
"hf_detr[openvino]" for these formats, "hf_detr[evaluation]" for --dataset.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_detr import DetrImageProcessor
from hf_detr.data import DetectionCollator, load_detection_dataset, require_objects, source_of
from hf_detr.evaluation import ModelEvaluation
from hf_detr.export import export_model
from hf_detr.interop import load_model
from hf_detr.runtime import exit_on_error, import_extra, prepare_output, require_source
from hf_detr.training import use_all_cores


def main() -> None:
    args = parse_args()
    require_source(args.model)
    if args.dataset:
        require_source(args.dataset)
    prepare_output(args.output_dir)
    use_all_cores()
    if args.dataset:
        import_extra("hotcoco", "evaluation")
    model = load_model(args.model, dtype=torch.float32)
    processor = DetrImageProcessor.from_pretrained(args.model)
    evaluate = None
    if args.dataset:
        dataset = load_detection_dataset(
            args.dataset, args.split, id2label=model.config.id2label, masks=model.has_masks
        )
        require_objects(dataset, source_of(dataset), "measured")
        loader = DataLoader(dataset, batch_size=args.batch_size, collate_fn=DetectionCollator(processor))

        def evaluate(model_or_export):
            evaluation = ModelEvaluation(dataset, with_masks=model.has_masks)
            return evaluation.run(model_or_export, loader, processor).compute()

    output_dir = args.output_dir or Path(
        "exports", f"{Path(args.model).resolve().name}-{args.format}{'-int8' * args.int8}{'-fp16' * args.fp16}"
    )
    content = export_model(
        model,
        processor,
        output_dir,
        graph_format=args.format,
        post_process=args.post_process,
        shape=tuple(args.shape) if args.shape else None,
        opset=args.opset,
        half=args.fp16,
        calibration=args.calibration,
        evaluate=evaluate,
    )
    size = sum(path.stat().st_size for path in output_dir.iterdir())
    print(
        f"{content['precision']} graph, {' + '.join(content['inputs'])} -> {' + '.join(content['outputs'])}, "
        f"{size / 2**20:.1f} MiB: {output_dir}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint: a folder or a Hub id")
    parser.add_argument(
        "--format", choices=("onnx", "openvino", "torch"), default="onnx", help="default onnx; torch: torch.export"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="default: exports/MODEL-FORMAT; an earlier export of MODEL is replaced"
    )
    parser.add_argument(
        "--post_process",
        action="store_true",
        help="add the input target_sizes (height, width) and the outputs scores, labels and boxes in pixels",
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("BATCH", "HEIGHT", "WIDTH"),
        help="one fixed shape, for runtimes that need it; the export's image processor resizes to it",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators; default: PyTorch's")
    parser.add_argument("--fp16", action="store_true", help="float16 weights: half the size")
    parser.add_argument("--int8", action="store_true", help="quantise to int8; needs --calibration")
    parser.add_argument("--calibration", type=Path, help="folder of images for --int8; 300 are enough")
    parser.add_argument("--dataset", help="annotated folder or Hub data set to measure AP on, before and after")
    parser.add_argument("--split", default="val", help="of --dataset")
    parser.add_argument("--batch_size", type=int, default=4, help="of --dataset")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.int8 != bool(args.calibration):
        parser.error("--int8 and --calibration FOLDER must be used together.")
    for name in ("int8", "fp16"):
        if getattr(args, name) and args.format == "torch":
            parser.error(f"--{name} needs --format onnx or openvino.")
    if args.int8 and args.fp16:
        parser.error("--int8 and --fp16 exclude each other.")
    if args.opset is not None and args.format != "onnx":
        parser.error("--opset is for --format onnx.")
    if args.shape and min(args.shape) < 1:
        parser.error("--shape must be at least 1 in each place.")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
