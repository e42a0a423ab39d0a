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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import create_repo
from torchvision.transforms import v2
from tqdm.auto import tqdm

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
    turns_augmentation,
)
from hf_detr.evaluation import evaluate_detection, format_metrics
from hf_detr.hub import hash_of_weights, push_folder
from hf_detr.training import (
    TRAINING_VALUES,
    DataSummary,
    Progress,
    Recipe,
    TrainingProbe,
    build_schedule,
    choose_recipe,
    claim_output_dir,
    explain_overfit,
    feature_strides,
    hint,
    newest_state,
    parameter_groups,
    parse_finetune_args,
    preferred_precision,
    save_state,
    summarize,
    use_all_cores,
)
from hf_detr.visualization import compare_with_truth

# The drawn images are small, and two cores have no time for a large backbone; the recipe chooses the rest.
SHAPES_SIZE = {"height": 96, "width": 96}
SHAPES_BACKBONE = "test_resnet"
PROBED = 32  # training images that are looked at after every epoch
OVERFIT_AP50 = 0.9


def main() -> None:
    args = parse_finetune_args(__doc__)
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" also when nobody chose
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision or (preferred_precision() if launched_with == "no" else None),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir="runs",
    )
    check_trackers(args.report_to, accelerator)
    threads = use_all_cores(accelerator.num_processes) if accelerator.device.type == "cpu" else None
    set_seed(args.seed)

    # data: read in full and checked, before anything is computed
    folder, train_set, val_set = load_data(args, accelerator)
    names = id2label(train_set)
    data = summarize(train_set)

    # model
    processor = build_processor(args)
    recipe = settle(args, data, processor, accelerator)
    model, start = build(args, recipe, names)
    if args.push_to_hub and accelerator.is_main_process:  # not to find out after the training that it is not allowed
        args.push_to_hub = create_repo(args.push_to_hub, private=args.hub_private or None, exist_ok=True).repo_id
    run_name = (dataset_name(args.dataset) if args.dataset else "shapes") + ("-overfit" if args.overfit else "")
    # when all that can be wrong with the arguments has been found
    output_dir = claim_output_dir(args.output_dir, run_name, vars(args), accelerator, resume=args.resume)
    if args.quick:
        train_set = train_set.select(range(min(64, len(train_set))))
    train_loader, val_loader, probe = build_loaders(args, processor, train_set, val_set, accelerator)
    accelerator.print(
        f"{len(train_set)} training and {len(val_set)} validation images of {', '.join(names.values())}\n{start}\n"
        f"{describe(model, data, accelerator)}{f' with {threads} threads' if threads else ''}, precision "
        f"{accelerator.mixed_precision}. {padding(train_set, train_loader, processor)}Output: {output_dir}"
    )

    # optimisation: AdamW and clipping at 0.1, as the paper; rates and schedule are the recipe's
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.learning_rate, args.backbone_learning_rate, args.weight_decay), fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    scheduler = build_schedule(
        optimizer, args.schedule, warmup=args.warmup, decay=args.decay, total_steps=args.epochs * steps_per_epoch
    )
    history = Progress()
    accelerator.register_for_checkpointing(scheduler, history, probe)
    if args.resume:
        accelerator.load_state(str(newest_state(output_dir)))
        accelerator.print(f"Resumed after epoch {history.epoch}; best AP so far {history.best_ap:.4f}")
    elif not args.overfit:
        save_state(accelerator, output_dir)  # from here on the run can be resumed
    plain = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
    accelerator.project_configuration.logging_dir = str(output_dir)
    accelerator.init_trackers("hf_detr", config=plain)

    plain_model = accelerator.unwrap_model(model)
    run = Run(args, accelerator, plain_model, folder, output_dir, processor, val_set, val_loader, history)
    for epoch in range(history.epoch + 1, args.epochs + 1):
        train_loader.set_epoch(epoch)
        started = time.perf_counter()
        losses = train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, epoch)
        line = {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
        line |= {"seconds": round(time.perf_counter() - started, 1)} | losses
        evaluated = epoch % args.eval_every == 0 or epoch == args.epochs
        if accelerator.is_main_process and (evaluated or not args.overfit):
            line |= probe.look(plain_model)
        if evaluated:
            line |= evaluate_and_keep(run, model, epoch)
            history.evaluations.append(line)
        history.epoch = epoch
        if not args.overfit:
            save_state(accelerator, output_dir)
        accelerator.log(line, step=epoch)
        if accelerator.is_main_process:
            report(run, line)
        if args.overfit and line.get("AP50", 0) > OVERFIT_AP50:
            break
    accelerator.wait_for_everyone()
    conclude(run)
    learned = not args.overfit or conclude_overfit(run, data, history.epoch * steps_per_epoch)
    accelerator.wait_for_everyone()  # none leaves, and has the others stopped, before everything is said
    accelerator.end_training()
    if not learned:
        raise SystemExit(1)


def describe(model: DetrForDetection, data: DataSummary, accelerator: Accelerator) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    text = f"{trained:.1f} M parameters train on {accelerator.num_processes} x {accelerator.device}"
    if data.most_objects > (queries := model.config.num_queries):
        text = f"Up to {data.most_objects} objects in an image, but {queries} queries: some are not learned.\n{text}"
    return text


@dataclass
class Run:
    """What evaluating, keeping and reporting need."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: DetrForDetection  # as it is, without what Accelerate wraps around it
    folder: str | Path
    output_dir: Path
    processor: DetrImageProcessor
    val_set: Any
    val_loader: Any
    history: Progress

    def evaluate(self, model: Any) -> Any:
        progress = self.accelerator.is_main_process
        return evaluate_detection(model, self.val_loader, self.val_set, self.processor, progress=progress)


def evaluate_and_keep(run: Run, model: Any, epoch: int) -> dict[str, float]:
    """AP and AP50; the best checkpoint so far is saved."""
    metrics = run.evaluate(model).compute()
    if metrics["AP"] >= run.history.best_ap:
        run.history.best_ap = metrics["AP"]
        if run.accelerator.is_main_process:
            split = "train" if run.args.overfit else "val"
            about = {"epoch": epoch, "dataset": dataset_name(run.folder), "split": split}
            about["num_images"] = len(run.val_set)
            save(run.model, run.processor, run.output_dir, metrics | about)
    return {name: metrics[name] for name in ("AP", "AP50")}


def conclude(run: Run) -> None:
    """The numbers that count: of the weights as they are saved, in float32, as evaluate.py and the pipeline run them.
    The best checkpoint is pushed if that was asked for."""
    accelerator, args, output_dir = run.accelerator, run.args, run.output_dir
    best = DetrForDetection.from_pretrained(output_dir).to(accelerator.device)
    metrics = json.loads((output_dir / "metrics.json").read_text())  # before the evaluation, where processes meet again
    evaluator = run.evaluate(best)
    metrics |= evaluator.compute()
    if accelerator.is_main_process:
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
        compare_with_truth(run.val_set, evaluator.detections()).save(output_dir / "validation.png")
    accelerator.print(
        f"\nBest checkpoint, epoch {metrics['epoch']}\n{format_metrics(metrics)}\n\nSaved in {output_dir}"
    )
    if args.push_to_hub and accelerator.is_main_process:
        address = push_folder(output_dir, args.push_to_hub, private=args.hub_private or None)
        accelerator.print(f"Pushed: {address}")


def conclude_overfit(run: Run, data: DataSummary, steps: int) -> bool:
    """Say whether the images were learned by heart, and if not, why."""
    evaluations, stride = run.history.evaluations, run.model.model.backbone.stride
    learned = evaluations[-1]["AP50"] > OVERFIT_AP50
    text = f"AP50 {evaluations[-1]['AP50']:.2f} on {data.num_images} images after {steps} steps"
    if run.accelerator.is_main_process:
        reason = explain_overfit(
            evaluations,
            object_pixels=data.object_side * seen_size(run.processor)[0],
            stride=stride,
            most_objects=data.most_objects,
            num_queries=run.model.config.num_queries,
        )
        sound = "labels, model and learning rate work together."
        print(f"Overfit: yes, {text}: {sound}" if learned else f"Overfit: NO, {text}. {reason}", flush=True)
    return learned


def check_trackers(wanted: list[str] | None, accelerator: Accelerator) -> None:
    """Accelerate leaves out what is not installed without a word."""
    missing = {str(name) for name in wanted or ()} - {
        "all",
        *(str(getattr(t, "value", t)) for t in accelerator.log_with),
    }
    if missing:
        raise SystemExit(f"--report_to {' '.join(sorted(missing))}: not installed. Install it, or leave it out.")


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[str | Path, Any, Any]:
    """Where the data are, and both splits; to overfit, both are the first training images with objects."""
    progress = accelerator.is_main_process
    with accelerator.main_process_first():
        folder = args.dataset or embedded_dataset(args.quick, progress=progress)
        train_set = load_detection_dataset(folder, "train", progress=progress)
        if args.overfit:
            with_objects = [i for i, objects in enumerate(train_set["objects"]) if objects["bbox"]]
            if not with_objects:
                raise SystemExit(f"{folder}: no training image has an object; there is nothing to learn.")
            train_set = train_set.select(with_objects[: args.overfit])
            return folder, train_set, train_set
        return folder, train_set, load_detection_dataset(folder, "val", id2label=id2label(train_set), progress=progress)


def build_loaders(
    args: argparse.Namespace, processor: DetrImageProcessor, train_set: Any, val_set: Any, accelerator: Accelerator
) -> tuple[Any, Any, TrainingProbe]:
    train_rows, val_rows = train_set, val_set
    if args.dataset is None:  # small images stay in memory, decoded
        train_rows, val_rows = list(train_set), list(val_set)
    if args.embedded and not args.image_size:  # and for training as large as the model sees them
        resize = Augmentation(v2.Resize([SHAPES_SIZE["height"], SHAPES_SIZE["width"]]))
        train_rows = [resize(row) for row in train_rows]
    collate = DetectionCollator(processor)
    common = {"batch_size": args.batch_size, "num_workers": args.num_workers, "accelerator": accelerator}
    train_loader = build_loader(
        AugmentedDataset(train_rows, augmentation(args.augmentation, processor), seed=args.seed),
        collate,
        seed=args.seed,
        training=True,
        group_by_aspect_ratio="shortest_edge" in {key for key, value in dict(processor.size).items() if value},
        **common,
    )
    probed = train_rows[:PROBED] if args.dataset is None else train_rows.select(range(min(PROBED, len(train_rows))))
    probe = TrainingProbe(probed, collate, args.batch_size)
    return train_loader, build_loader(val_rows, collate, training=False, **common), probe


def settle(
    args: argparse.Namespace, data: DataSummary, processor: DetrImageProcessor, accelerator: Accelerator
) -> Recipe | None:
    """Choose the recipe, print it, and fill in what the user left open."""
    if args.resume:
        return None
    start = "scratch" if args.backbone_weights == "none" or args.embedded else "backbone"
    try:
        recipe = choose_recipe(
            args.recipe,
            data,
            "checkpoint" if args.model else start,
            seen_size(processor),
            strides=[] if args.model else feature_strides(backbone_name(args)),
            upright=args.dataset is not None,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error
    given = {name: getattr(args, name) for name in TRAINING_VALUES if getattr(args, name) is not None}
    accelerator.print(recipe.describe(args.set | {name: given[name] for name in args.chosen}))
    for name, value in recipe.values("training", given).items():
        setattr(args, name, value)
    return recipe


def embedded_dataset(quick: bool, progress: bool) -> Path:
    if quick:
        return draw_shapes_dataset("data/shapes-quick", num_train=64, num_val=16, progress=progress)
    return draw_shapes_dataset("data/shapes", progress=progress)


def dataset_name(path: str | Path) -> str:
    return Path(path).resolve().name if Path(path).exists() else str(path).replace("/", "-")


def augmentation(kind: str, processor: DetrImageProcessor) -> Augmentation:
    if kind == "paper":
        return paper_augmentation(processor.size)
    if kind == "turns":
        return turns_augmentation()
    return Augmentation(v2.RandomHorizontalFlip(0.5 if kind == "flip" else 0.0))


def padding(train_set, loader, processor: DetrImageProcessor) -> str:
    """What grouping by aspect ratio saves, at the sizes before augmentation."""
    sizes = resized_sizes(image_sizes(train_set), processor.size)
    grouped = padding_share(loader.batch_sampler.batches(), sizes)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(len(batch) for batch in loader.batch_sampler.batches())
    plain = padding_share([order[i : i + count] for i in range(0, len(order), count)], sizes)
    return f"Padding before augmentation: {grouped:.1%} of the pixels (ungrouped {plain:.1%}). " if plain > 0 else ""


def backbone_name(args: argparse.Namespace) -> str:
    return args.set.get("backbone") or args.backbone or (SHAPES_BACKBONE if args.embedded else "resnet50")


def build_processor(args: argparse.Namespace) -> DetrImageProcessor:
    if args.model:
        processor = DetrImageProcessor.from_pretrained(args.model)
    elif args.embedded:
        processor = DetrImageProcessor(size=SHAPES_SIZE)
    else:
        processor = DetrImageProcessor()
    if args.image_size:
        longest = round(args.image_size * 1333 / 800)
        processor.size = type(processor)(size={"shortest_edge": args.image_size, "longest_edge": longest}).size
    return processor


def seen_size(processor: DetrImageProcessor) -> tuple[int, int]:
    """Shortest and longest side, in pixels, of what the model sees."""
    given = sorted(value for value in dict(processor.size).values() if value)
    return given[0], given[-1]


def build(args: argparse.Namespace, recipe: Recipe | None, id2label: dict[int, str]) -> tuple[DetrForDetection, str]:
    """The model, and one line on where it comes from."""
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if args.model:
        # classes that the checkpoint knows by name keep their weights; what was done is logged
        model = DetrForDetection.from_pretrained(
            args.model, id2label=id2label, ignore_mismatched_sizes=True, **args.set
        )
        return model.to(memory_format=torch.channels_last), f"Model: {args.model}."
    if recipe is not None:
        if args.embedded:
            args.backbone_weights = "none"
        small = {"attn_implementation": "eager"} if args.embedded else {}  # the fastest on so few cells
        args.set = recipe.values("model", {"backbone": backbone_name(args)} | small | args.set)
    config = DetrConfig(**args.set, **labels)
    if args.backbone_weights == "none":
        model = DetrForDetection(config)
        start = f"Model: DETR on {config.backbone}, random weights."
    else:
        model = DetrForDetection.from_pretrained_backbone(config, args.backbone_weights)
        source = args.backbone_weights or "timm weights"
        start = f"Model: DETR, backbone {config.backbone} from {source}, the rest random."
    return model.to(memory_format=torch.channels_last), start


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


def stuck(run: Run) -> str | None:
    model = run.model
    return hint(run.history.evaluations, query_type=model.config.query_type, stride=model.model.backbone.stride)


def report(run: Run, line: dict) -> None:
    """One tidy line an epoch on the console (to overfit: an evaluation), and in the log; and a hint, if it is stuck."""
    with (run.output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    if run.args.overfit and "AP" not in line:
        return
    text = f"epoch {line['epoch']:3}/{run.args.epochs}  {line['seconds']:6.1f} s  loss {line['loss']:7.4f}"
    text += "".join(
        f"  {name.removeprefix('loss_')} {line[name]:.3f}" for name in ("loss_ce", "loss_bbox", "loss_giou")
    )
    if "AP" in line:
        text += f"  AP {line['AP']:.4f}  AP50 {line['AP50']:.4f}  IoU {line['matched_iou']:.2f}"
        text += f"  other query {line['changed_matches']:.0%}" if "changed_matches" in line else ""
        advice = None if run.args.overfit else stuck(run)
        text += f"\nStuck? {advice}" if advice else ""
    tqdm.write(text)


if __name__ == "__main__":
    main()
