"""From the arguments of `examples/finetune.py` to data, processor, model and loaders."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torchvision.transforms import v2

from ..data import (
    Augmentation,
    AugmentedDataset,
    DetectionCollator,
    build_loader,
    draw_shapes_dataset,
    flip_rotate_augmentation,
    id2label,
    image_sizes,
    load_detection_dataset,
    padding_fraction,
    paper_augmentation,
    resized_sizes,
)
from ..model.configuration_hf_detr import DetrConfig
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.timm_network import feature_strides
from .arguments import TRAINING_VALUES
from .batch_size import find_batch_size, trial_step
from .diagnosis import TrainingProbe
from .lora import add_lora
from .optimization import parameter_groups
from .recipes import DataSummary, Recipe, choose_recipe

# The drawn images are small, and two cores have no time for a large backbone; the recipe chooses the rest.
SHAPES_SIZE = {"height": 96, "width": 96}
SHAPES_BACKBONE = "test_resnet"
PROBED = 32  # training images that are looked at after every epoch


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[str | Path, Any, Any]:
    """Where the data are, and both splits; to overfit, both are the first training images with objects.

    Raises:
        SystemExit, ValueError: something is wrong with the data; the message names file, record and fix.
    """
    progress = accelerator.is_main_process
    with accelerator.main_process_first():
        folder = args.dataset or _embedded_dataset(args.quick, progress=progress)
        train_set = load_detection_dataset(folder, "train", progress=progress)
        if args.overfit:
            with_objects = [i for i, objects in enumerate(train_set["objects"]) if objects["bbox"]]
            if not with_objects:
                raise SystemExit(f"{folder}: no training image has an object; there is nothing to learn.")
            train_set = train_set.select(with_objects[: args.overfit])
            return folder, train_set, train_set
        return folder, train_set, load_detection_dataset(folder, "val", id2label=id2label(train_set), progress=progress)


def _embedded_dataset(quick: bool, progress: bool) -> Path:
    if quick:
        return draw_shapes_dataset("data/shapes-quick", num_train=64, num_val=16, progress=progress)
    return draw_shapes_dataset("data/shapes", progress=progress)


def dataset_name(path: str | Path) -> str:
    """For folders and cards."""
    return Path(path).resolve().name if Path(path).exists() else str(path).replace("/", "-")


def build_processor(args: argparse.Namespace) -> DetrImageProcessor:
    """The checkpoint's, or a new one, with the size that was asked for."""
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


def settle(
    args: argparse.Namespace, data: DataSummary, processor: DetrImageProcessor, accelerator: Accelerator
) -> Recipe | None:
    """Choose the recipe, print it, and fill in what the user left open. None for a run that is resumed as it began.

    Raises:
        SystemExit: the recipe does not fit the start.
    """
    if args.resume:
        return None
    start = "scratch" if args.backbone_weights == "none" or args.embedded else "backbone"
    try:
        recipe = choose_recipe(
            args.recipe,
            data,
            "checkpoint" if args.model else start,  # type: ignore[arg-type]
            seen_size(processor),
            strides=[] if args.model else feature_strides(_backbone_name(args)),
            upright=args.dataset is not None,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error
    given = {name: getattr(args, name) for name in TRAINING_VALUES if getattr(args, name) is not None}
    accelerator.print(recipe.describe(args.set | {name: given[name] for name in args.chosen}))
    for name, value in recipe.values("training", given).items():
        setattr(args, name, value)
    return recipe


def _backbone_name(args: argparse.Namespace) -> str:
    return str(args.set.get("backbone") or args.backbone or (SHAPES_BACKBONE if args.embedded else "resnet50"))


def build_model(args: argparse.Namespace, recipe: Recipe | None, names: dict[int, str]) -> tuple[DetrForDetection, str]:
    """The model and one line on where it comes from."""
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    model: DetrForDetection
    if args.model:
        # classes that the checkpoint knows by name keep their weights; what was done is logged
        model = DetrForDetection.from_pretrained(args.model, id2label=names, ignore_mismatched_sizes=True, **args.set)
        start = f"Model: {args.model}."
    else:
        if recipe is not None:
            if args.embedded:
                args.backbone_weights = "none"
            small = {"attn_implementation": "eager"} if args.embedded else {}  # the fastest on so few cells
            args.set = recipe.values("model", {"backbone": _backbone_name(args)} | small | args.set)
        config = DetrConfig(**args.set, **labels)
        if args.backbone_weights == "none":
            model = DetrForDetection(config)
            start = f"Model: DETR on {config.backbone}, random weights."
        else:
            model = DetrForDetection.from_pretrained_backbone(config, args.backbone_weights)
            source = args.backbone_weights or "timm weights"
            start = f"Model: DETR, backbone {config.backbone} from {source}, the rest random."
    if args.lora_rank:
        add_lora(model, args.lora_rank)
        start += f" Adapters of rank {args.lora_rank} train, and the heads."
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, start


def fit_batch_size(
    args: argparse.Namespace,
    model: DetrForDetection,
    train_set: Any,
    processor: DetrImageProcessor,
    accelerator: Accelerator,
) -> list[int]:
    """The batch size that fits into memory, and how many of these batches are an optimizer step then.

    Raises:
        SystemExit: not even one image fits; it says what helps.
    """
    sizes = resized_sizes(image_sizes(train_set), processor.size)

    def optimizer_of(copy: DetrForDetection) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(copy, 0.0, 0.0, 0.0), fused=True)

    trial = trial_step(model, optimizer_of, train_set, sizes, DetectionCollator(processor), accelerator)
    try:
        found = find_batch_size(trial, args.batch_size, accelerator)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    return [found, args.gradient_accumulation_steps * (args.batch_size // found)]


def compile_for_training(model: DetrForDetection) -> None:
    """`torch.compile` for the parts that compute, in place. What depends on the data stays as it is: images are still
    run without their padding, and the loss with its matching on the host is no graph."""
    for part in (model.model.backbone.model, model.model.encoder, model.model.decoder):
        part.compile()


def augmentation(kind: str, processor: DetrImageProcessor) -> Augmentation:
    if kind == "paper":
        return paper_augmentation(processor.size)
    if kind == "turns":
        return flip_rotate_augmentation()
    return Augmentation(v2.RandomHorizontalFlip(0.5 if kind == "flip" else 0.0))


def build_loaders(
    args: argparse.Namespace, processor: DetrImageProcessor, train_set: Any, val_set: Any, accelerator: Accelerator
) -> tuple[Any, Any, TrainingProbe]:
    """Of training, of validation, and what looks at some training images."""
    train_rows: Sequence[Any] = train_set
    val_rows: Sequence[Any] = val_set
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
    probed = train_rows[:PROBED] if args.dataset is None else train_set.select(range(min(PROBED, len(train_set))))
    probe = TrainingProbe(probed, collate, args.batch_size)
    return train_loader, build_loader(val_rows, collate, training=False, **common), probe


def describe_padding(train_set: Any, loader: Any, processor: DetrImageProcessor) -> str:
    """What grouping by aspect ratio saves, at the sizes before augmentation; nothing if there is no padding."""
    sizes = resized_sizes(image_sizes(train_set), processor.size)
    grouped = padding_fraction(loader.batch_sampler.batches(), sizes)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(len(batch) for batch in loader.batch_sampler.batches())
    plain = padding_fraction([order[i : i + count] for i in range(0, len(order), count)], sizes)
    return f"Padding before augmentation: {grouped:.1%} of the pixels (ungrouped {plain:.1%}). " if plain > 0 else ""
