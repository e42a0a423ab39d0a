"""Fine-tune DETR on annotated images: COCO, YOLO, Pascal VOC, an imagefolder, a Hub data set. Without arguments: on a
data set drawn on the spot.

    accelerate launch examples/finetune.py
    accelerate launch examples/finetune.py --dataset FOLDER --model CHECKPOINT
    accelerate launch examples/finetune.py --dataset FOLDER --push_to_hub ME/MODEL

The output folder holds the best checkpoint with its processor (`pipeline("object-detection", model=FOLDER)`),
`metrics.json`, `log.jsonl` with a line an epoch, `validation.png`, and `state/` to resume from.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import create_repo
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import get_wsd_schedule

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.data import (
    Augmentation,
    AugmentedDataset,
    DetectionCollator,
    build_loader,
    draw_shapes_dataset,
    id2label,
    image_sizes,
    load_detection_dataset,
    padding_share,
    paper_augmentation,
    resized_sizes,
)
from hf_detr.evaluation import evaluate_detection, format_metrics
from hf_detr.hub import hash_of_weights, push_folder
from hf_detr.training import parameter_groups, preferred_precision, use_all_cores
from hf_detr.visualization import compare_with_truth

# A small DETR that learns the drawn shapes from random weights in minutes on two cores. Everything is the paper's but
# the sizes, pre-norm (the paper's other variant), and a backbone that learns faster than the transformer, since it is
# new too. What mattered most when these values were chosen: few tokens (96 pixels at stride 16), few queries, three
# encoder layers, a rate that is not too high (1e-3, tried at 128 pixels, was on its plateau after three minutes) and
# that stays level until the last third.
SHAPES_MODEL = {
    "backbone": "test_resnet",
    "feature_stride": 16,
    "freeze_batch_norm": False,
    "frozen_stages": -1,
    "num_queries": 10,
    "d_model": 128,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "dropout": 0.0,
    "pre_norm": True,
    "attn_implementation": "eager",  # the fastest on so few tokens
}
SHAPES_SIZE = {"height": 96, "width": 96}
SHAPES_RATES = {
    "epochs": 76,
    "batch_size": 32,
    "learning_rate": 4e-4,
    "backbone_learning_rate": 1.2e-3,
    "eval_every": 8,
    "num_workers": 0,  # images stay in memory, and the cores are busy with the model
    "augmentation": "flip",
}
# The paper's rates, for a model that starts from a checkpoint or a pretrained backbone.
PAPER_RATES = {
    "epochs": 50,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "backbone_learning_rate": 1e-5,
    "eval_every": 1,
    "num_workers": 2,
    "augmentation": "paper",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="annotated folder or Hub id; default: draw shapes into data/shapes")
    parser.add_argument("--model", help="checkpoint to start from, a folder or a Hub id")
    parser.add_argument("--backbone", help="without --model: timm network to start from, default resnet50")
    parser.add_argument("--backbone_weights", help='a local file, or "none" for random; default: from the Hub')
    parser.add_argument("--output_dir", help="default: the next free runs/NAME-N")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output_dir, with its settings, after its last epoch",
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch_size", type=int, help="images per process and step")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--backbone_learning_rate", type=float)
    parser.add_argument("--weight_decay", type=float, default=1e-4)
    parser.add_argument("--warmup", type=float, default=0.03, help="share of all steps in which the rate rises")
    parser.add_argument(
        "--decay", type=float, default=0.35, help="share of all steps in which it falls to 0 at the end"
    )
    parser.add_argument("--image_size", type=int, help="shortest edge in pixels, default 800 (shapes: 96 x 96)")
    parser.add_argument("--augmentation", choices=("paper", "flip", "none"), help="default: paper (shapes: flip)")
    parser.add_argument("--eval_every", type=int, help="epochs between evaluations; the last epoch always has one")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: bf16 where it is fast")
    parser.add_argument("--num_workers", type=int, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 epochs on 64 images, to see that all works")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="push the best checkpoint and its model card")
    parser.add_argument("--hub_private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--license", help="for the model card, an identifier of the Hub such as apache-2.0")
    args = parser.parse_args()
    if args.resume:
        if not args.output_dir or not (Path(args.output_dir) / "args.json").is_file():
            parser.error("--resume needs the --output_dir of a run that was begun")
        begun = json.loads((Path(args.output_dir) / "args.json").read_text())
        parser.set_defaults(**begun | {"resume": True, "output_dir": args.output_dir})
        return parser.parse_args()
    rates = PAPER_RATES if args.dataset or args.model or args.backbone else SHAPES_RATES
    for name, value in rates.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick:
        args.epochs, args.eval_every = 2, 1
    # for the model card: where the weights are from, if others can get them there
    args.base_model = args.model if args.model and not Path(args.model).exists() else None
    args.datasets = [args.dataset] if args.dataset and not Path(args.dataset).exists() else None
    return args


def main() -> None:
    args = parse_args()
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" also when nobody chose
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision or (preferred_precision() if launched_with == "no" else None),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    threads = use_all_cores(accelerator.num_processes) if accelerator.device.type == "cpu" else None
    set_seed(args.seed)

    # data: read in full and checked, before anything is computed
    progress = accelerator.is_main_process
    with accelerator.main_process_first():
        folder = args.dataset or embedded_dataset(args.quick, progress=progress)
        train_set = load_detection_dataset(folder, "train", progress=progress)
        names = id2label(train_set)
        val_set = load_detection_dataset(folder, "val", id2label=names, progress=progress)

    # model
    model, processor, start = build(args, names)
    if args.push_to_hub and accelerator.is_main_process:  # not to find out after the training that it is not allowed
        args.push_to_hub = create_repo(args.push_to_hub, private=args.hub_private or None, exist_ok=True).repo_id
    output_dir = claim_output_dir(args, accelerator)  # when all that can be wrong with the arguments has been found
    if args.quick:
        train_set = train_set.select(range(min(64, len(train_set))))
    # small images stay decoded in memory
    train_rows = list(train_set) if args.dataset is None else train_set
    val_rows = list(val_set) if args.dataset is None else val_set
    collate = DetectionCollator(processor)
    train_loader = build_loader(
        AugmentedDataset(train_rows, augmentation(args.augmentation, processor), seed=args.seed),
        collate,
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
        accelerator=accelerator,
        training=True,
        group_by_aspect_ratio="shortest_edge" in {key for key, value in dict(processor.size).items() if value},
    )
    most = max(len(objects["bbox"]) for objects in train_set["objects"])
    if most > model.config.num_queries:
        accelerator.print(
            f"Up to {most} objects in an image, but {model.config.num_queries} queries: some are not learned."
        )
    val_loader = build_loader(
        val_rows, collate, batch_size=args.batch_size, num_workers=args.num_workers, accelerator=accelerator,
        training=False,
    )  # fmt: skip
    accelerator.print(
        f"{len(train_set)} training and {len(val_set)} validation images of {', '.join(names.values())}\n"
        f"{start}\n"
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f} M parameters train on "
        f"{accelerator.num_processes} x {accelerator.device}{f' with {threads} threads' if threads else ''}, "
        f"precision {accelerator.mixed_precision}. {padding(train_set, train_loader, processor)}Output: {output_dir}"
    )

    # optimisation: the paper's AdamW, clipping at 0.1 and a lower rate for the backbone
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.learning_rate, args.backbone_learning_rate, args.weight_decay), fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    total_steps = args.epochs * steps_per_epoch
    # up, level, and down over the last third: the level stretch is where DETR leaves its plateau
    scheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(args.warmup * total_steps),
        num_decay_steps=round(args.decay * total_steps),
        num_training_steps=total_steps,
        decay_type="linear",
    )
    history = Progress()
    accelerator.register_for_checkpointing(scheduler, history)
    if args.resume:
        accelerator.load_state(str(newest_state(output_dir)))
        accelerator.print(f"Resumed after epoch {history.epoch}; best AP so far {history.best_ap:.4f}")
    else:
        save_state(accelerator, output_dir)  # from here on the run can be resumed

    for epoch in range(history.epoch + 1, args.epochs + 1):
        train_loader.set_epoch(epoch)
        started = time.perf_counter()
        losses = train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, epoch)
        seconds = time.perf_counter() - started
        line = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0], "seconds": round(seconds, 1)} | losses
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            evaluator = evaluate_detection(model, val_loader, val_set, processor, progress=progress)
            metrics = evaluator.compute()
            line |= {name: metrics[name] for name in ("AP", "AP50")}
            if metrics["AP"] >= history.best_ap:
                history.best_ap = metrics["AP"]
                if accelerator.is_main_process:
                    about = {"epoch": epoch, "dataset": dataset_name(folder), "split": "val"}
                    about["num_images"] = len(val_set)
                    save(accelerator.unwrap_model(model), processor, output_dir, metrics | about)
        history.epoch = epoch
        save_state(accelerator, output_dir)
        if accelerator.is_main_process:
            report(line, args.epochs, output_dir)
    accelerator.wait_for_everyone()

    # the numbers that count: of the weights as they are saved, in float32, as evaluate.py and the pipeline run them
    best = DetrForDetection.from_pretrained(output_dir).to(accelerator.device)
    metrics = json.loads((output_dir / "metrics.json").read_text())  # before the evaluation, where processes meet again
    evaluator = evaluate_detection(best, val_loader, val_set, processor, progress=progress)
    metrics |= evaluator.compute()
    if accelerator.is_main_process:
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
        compare_with_truth(val_set, evaluator.detections()).save(output_dir / "validation.png")
    accelerator.print(
        f"\nBest checkpoint, epoch {metrics['epoch']}\n{format_metrics(metrics)}\n\nSaved in {output_dir}"
    )
    if args.push_to_hub and accelerator.is_main_process:
        address = push_folder(output_dir, args.push_to_hub, private=args.hub_private or None)
        accelerator.print(f"Pushed: {address}")
    accelerator.end_training()


def embedded_dataset(quick: bool, progress: bool) -> Path:
    if quick:
        return draw_shapes_dataset("data/shapes-quick", num_train=64, num_val=16, progress=progress)
    return draw_shapes_dataset("data/shapes", progress=progress)


def dataset_name(path: str | Path) -> str:
    return Path(path).resolve().name if Path(path).exists() else str(path).replace("/", "-")


def augmentation(kind: str, processor: DetrImageProcessor) -> Augmentation:
    if kind == "paper":
        return paper_augmentation(processor.size)
    return Augmentation(v2.RandomHorizontalFlip(0.5 if kind == "flip" else 0.0))


def padding(train_set, loader, processor: DetrImageProcessor) -> str:
    """What grouping by aspect ratio saves, at the sizes before augmentation."""
    sizes = resized_sizes(image_sizes(train_set), processor.size)
    grouped = padding_share(loader.batch_sampler.batches(), sizes)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(len(batch) for batch in loader.batch_sampler.batches())
    plain = padding_share([order[i : i + count] for i in range(0, len(order), count)], sizes)
    return f"Padding before augmentation: {grouped:.1%} of the pixels (ungrouped {plain:.1%}). " if plain > 0 else ""


class Progress:
    """What has to survive an interruption besides weights, optimizer, schedule and random numbers."""

    def __init__(self) -> None:
        self.epoch = 0
        self.best_ap = -1.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


def claim_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The folder of this run. One that holds another run is never written to."""
    if args.output_dir:
        output_dir = Path(args.output_dir)
        if not args.resume and output_dir.exists() and any(output_dir.iterdir()):
            raise SystemExit(f"{output_dir} is not empty. Name another --output_dir, or --resume the run in it.")
    else:
        name = dataset_name(args.dataset) if args.dataset else "shapes"
        number = 1
        while Path(f"runs/{name}-{number}").exists():
            number += 1
        output_dir = Path(f"runs/{name}-{number}")
    accelerator.wait_for_everyone()  # everyone has looked before one creates it
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    return output_dir


def save_state(accelerator: Accelerator, output_dir: Path) -> None:
    """What --resume needs, in `state/`. The last one is there until the new one is complete."""
    new, current, old = (output_dir / name for name in ("state-new", "state", "state-old"))
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def newest_state(output_dir: Path) -> Path:
    for name in ("state", "state-old"):
        if (output_dir / name).is_dir():
            return output_dir / name
    raise SystemExit(f"{output_dir} holds no state to resume from.")


def build(args: argparse.Namespace, id2label: dict[int, str]) -> tuple[DetrForDetection, DetrImageProcessor, str]:
    """Model and processor, and one line on where they come from."""
    if args.model:
        # classes that the checkpoint knows by name keep their weights; what was done is logged
        model = DetrForDetection.from_pretrained(args.model, id2label=id2label, ignore_mismatched_sizes=True)
        processor = DetrImageProcessor.from_pretrained(args.model)
        start = f"Model: {args.model}."
    else:
        labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
        if args.dataset or args.backbone:
            config = DetrConfig(backbone=args.backbone or "resnet50", **labels)
            processor = DetrImageProcessor()
        else:
            config = DetrConfig(**SHAPES_MODEL, **labels)
            processor = DetrImageProcessor(size=SHAPES_SIZE)
            args.backbone_weights = "none"
        if args.backbone_weights == "none":
            model = DetrForDetection(config)
            start = f"Model: DETR on {config.backbone}, random weights."
        else:
            model = DetrForDetection.from_pretrained_backbone(config, args.backbone_weights)
            source = args.backbone_weights or "timm weights"
            start = f"Model: DETR, backbone {config.backbone} from {source}, the rest random."
    if args.image_size:
        longest = round(args.image_size * 1333 / 800)
        processor.size = type(processor)(size={"shortest_edge": args.image_size, "longest_edge": longest}).size
    return model.to(memory_format=torch.channels_last), processor, start


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, epoch: int) -> dict[str, float]:
    """One pass over the training images; returns the mean of each loss term of the last decoder layer."""
    model.train()
    sums = torch.zeros(4, device=accelerator.device)
    bar = tqdm(loader, desc=f"Epoch {epoch}", disable=not accelerator.is_main_process, leave=False)
    for batch in bar:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        terms = (outputs.loss, *(outputs.loss_dict[name] for name in ("loss_ce", "loss_bbox", "loss_giou")))
        sums += torch.stack([term.detach() for term in terms])
    means = accelerator.reduce(sums / len(loader), reduction="mean").tolist()
    return dict(zip(("loss", "loss_ce", "loss_bbox", "loss_giou"), (round(mean, 4) for mean in means), strict=True))


def save(model: DetrForDetection, processor: DetrImageProcessor, output_dir: Path, metrics: dict) -> None:
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    metrics["weights"] = hash_of_weights(output_dir)  # the numbers belong to these and no others
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))


def report(line: dict, epochs: int, output_dir: Path) -> None:
    """One tidy line an epoch on the console, and in the log."""
    with (output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    text = f"epoch {line['epoch']:3}/{epochs}  {line['seconds']:6.1f} s  loss {line['loss']:7.4f}"
    text += "".join(
        f"  {name.removeprefix('loss_')} {line[name]:.3f}" for name in ("loss_ce", "loss_bbox", "loss_giou")
    )
    if "AP" in line:
        text += f"  AP {line['AP']:.4f}  AP50 {line['AP50']:.4f}"
    tqdm.write(text)


if __name__ == "__main__":
    main()
