"""Export a checkpoint as a graph for other runtimes: ONNX Runtime, OpenVINO, or PyTorch without our code.

    python examples/export.py MODEL --format onnx
    python examples/export.py MODEL --format openvino --int8 --calibration IMAGES --dataset FOLDER

Batch, height and width are free, and `pixel_mask` is an input. Before anything is written, outputs are compared with
those of PyTorch over batches of many shapes, with padding and without. Leaves in the output folder:

    model.onnx, or model.xml and model.bin, or model.pt2
    config.json, preprocessor_config.json    of the model and its image processor
    export.json                              what was compared and how large the differences were, AP before and after

and in Python, on the runtime of the format:

    model = load_exported(FOLDER)  # of hf_detr.prediction; dtype="bfloat16" for OpenVINO on a CPU that has it
    detector = pipeline("object-detection", model=model, image_processor=FOLDER)

`examples/evaluate.py --model FOLDER` measures an export. Each format has its extra: pip install "hf_detr[onnx]",
"hf_detr[openvino]"; --dataset takes "hf_detr[evaluation]".
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import DetectionCollator, load_detection_dataset
from hf_detr.evaluation import evaluate_detection
from hf_detr.export import export_model
from hf_detr.runtime import import_extra
from hf_detr.training import use_all_cores


def main() -> None:
    args = parse_args()
    use_all_cores()
    if args.dataset:
        import_extra("hotcoco", "evaluation")
    model = DetrForDetection.from_pretrained(args.model, dtype=torch.float32)
    processor = DetrImageProcessor.from_pretrained(args.model)
    evaluate = None
    if args.dataset:
        dataset = load_detection_dataset(args.dataset, args.split, id2label=model.config.id2label)
        loader = DataLoader(dataset, batch_size=args.batch_size, collate_fn=DetectionCollator(processor))

        def evaluate(tested):
            return evaluate_detection(tested, loader, dataset, processor).compute()

    output_dir = args.output_dir or Path(
        "exports", f"{Path(args.model).resolve().name}-{args.format}{'-int8' * args.int8}"
    )
    try:
        export = export_model(
            model,
            processor,
            output_dir,
            graph_format=args.format,
            post_process=args.post_process,
            calibration=args.calibration,
            evaluate=evaluate,
        )
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from error
    size = sum(path.stat().st_size for path in output_dir.iterdir())
    print(
        f"{export['precision']} graph, {' + '.join(export['inputs'])} -> {' + '.join(export['outputs'])}, "
        f"{size / 2**20:.1f} MiB: {output_dir}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, a folder or a Hub id")
    parser.add_argument("--format", choices=("onnx", "openvino", "torch"), default="onnx")
    parser.add_argument(
        "--output_dir", type=Path, help="default: exports/MODEL-FORMAT; an earlier export of MODEL is replaced"
    )
    parser.add_argument(
        "--post_process",
        action="store_true",
        help="a third input, target_sizes (height, width), and scores, labels and boxes in pixels as further outputs",
    )
    parser.add_argument("--int8", action="store_true", help="quantise weights and activations; needs --calibration")
    parser.add_argument("--calibration", type=Path, help="folder of images like those the model is for; 300 are enough")
    parser.add_argument("--dataset", help="measure AP before and after on this annotated folder or Hub data set")
    parser.add_argument("--split", default="val", help="of --dataset")
    parser.add_argument("--batch_size", type=int, default=4, help="of --dataset")
    args = parser.parse_args()
    if args.int8 != bool(args.calibration):
        parser.error("--int8 and --calibration FOLDER go together.")
    if args.int8 and args.format == "torch":
        parser.error("--int8 is for onnx and openvino.")
    return args


if __name__ == "__main__":
    main()
