"""Print the COCO table of a checkpoint on a data set.

accelerate launch examples/evaluate.py --model CHECKPOINT --dataset FOLDER
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import CocoDetection, DetectionCollator
from hf_detr.evaluation import evaluate_detection, format_metrics
from hf_detr.training import use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint, a folder or a Hub id")
    parser.add_argument("--dataset", required=True, help="folder with COCO annotations")
    parser.add_argument("--split", default="val")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file as well")
    args = parser.parse_args()

    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        use_all_cores(accelerator.num_processes)
    model = DetrForDetection.from_pretrained(args.model)
    processor = DetrImageProcessor.from_pretrained(args.model)
    dataset = CocoDetection(
        args.dataset, args.split, id2label=model.config.id2label, progress=accelerator.is_main_process
    )
    loader = DataLoader(
        dataset, batch_size=args.batch_size, collate_fn=DetectionCollator(processor), num_workers=args.num_workers
    )
    model, loader = accelerator.prepare(model, loader)
    evaluator = evaluate_detection(model, loader, dataset, processor, progress=accelerator.is_main_process)
    if accelerator.is_main_process:
        metrics = evaluator.compute()
        print(f"{args.model} on {len(dataset)} images of {dataset.file}\n{format_metrics(metrics)}")
        if args.output:
            args.output.write_text(json.dumps(metrics, indent=2))
    accelerator.end_training()


if __name__ == "__main__":
    main()
