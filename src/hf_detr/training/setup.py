"""From the arguments of `examples/finetune.py` to data, processor, model and loaders."""

import statistics
from collections.abc import Callable, Sequence
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
    load_streamed_dataset,
    padding_fraction,
    paper_augmentation,
    resized_sizes,
)
from ..data.augmentation import ResizeTo, with_color_jitter
from ..data.class_balance import describe_repeats, repeat_rare_classes
from ..data.mixing import build_mixers
from ..data.schema import learned_objects, require_objects, set_stuff_labels, stuff_labels
from ..data.streaming import SHUFFLE_BUFFER
from ..evaluation import ModelEvaluation
from ..interop import has_masks
from ..model.configuration_hf_detr import DetrConfig
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.processor_size import keeps_aspect_ratio, size_fields
from ..model.segmentation import STRIDES as MASK_STRIDES
from ..model.segmentation import DetrForSegmentation
from ..model.timm_network import pretrained_normalization
from ..runtime import listed, require_source
from .arguments import FinetuneArguments
from .lora import add_lora
from .run_recipe import RunRecipe
from .training_probe import TrainingProbe

# The paper's 0.85 is for the probabilities of cross-entropy. The IoU-aware loss trains scores to be the IoU, and 0.5 is
# that from which a segment counts in PQ; focal loss has low probabilities, too.
PANOPTIC_THRESHOLD = 0.5
SHAPES_SIZE = {"height": 96, "width": 96}  # of the drawn images after the resize, in pixels
ROUNDED = ("paper-rounded", "paper-one-size")  # augmentations
QUICK_IMAGES = 64
PROBED_IMAGES = 32  # training images that the probe evaluates after every epoch


def load_data(args: FinetuneArguments, accelerator: Accelerator) -> tuple[Any, Any]:
    """Training and validation split in the schema of `hf_detr.data`. With `--overfit` both are the first training
    images that have objects.

    Raises:
        ValueError: something is wrong with the data; the message names file, record and fix.
    """
    data, progress = args.data, accelerator.is_main_process
    for source in (data.dataset, args.model.model):
        if source:
            require_source(source)
    with accelerator.main_process_first():
        if data.is_drawn:
            few: dict[str, Any] = {"num_train": QUICK_IMAGES, "num_val": 16} if data.quick else {}
            draw_shapes_dataset(data.location, progress=progress, masks=data.reads_masks, **few)
        if data.streaming:
            return _load_streamed(args, progress)
        train_set = load_detection_dataset(split="train", progress=progress, **data.source)
        stuff = stuff_labels(train_set)
        if data.stuff and not stuff:
            raise ValueError(f"{data.location}: no class is stuff (COCO's panoptic format has some). Omit --stuff.")
        if stuff and not data.reads_masks:
            raise ValueError(
                f"{data.location}: {listed(stuff)} are stuff. To learn their boxes, too, add --stuff; to learn masks, "
                "--masks."
            )
        if data.overfit:
            with_objects = [i for i, objects in enumerate(train_set["objects"]) if learned_objects(objects)["bbox"]]
            if not with_objects:
                raise ValueError(f"{data.location}: no training image has an object, so there is nothing to learn.")
            train_set = train_set.select(with_objects[: data.overfit])
            ModelEvaluation(train_set, with_masks=data.masks)
            return train_set, train_set
        if data.train_images is not None:
            train_set = nested_subset(train_set, data.train_images, args.run.seed, data.location)
        val_set = load_detection_dataset(split="val", id2label=id2label(train_set), progress=progress, **data.source)
        _require_objects(args, train_set, val_set)
        _share_stuff(train_set, val_set, data.location)
        ModelEvaluation(val_set, with_masks=data.masks)  # masks that cannot be measured are refused now
        return train_set, val_set


def _load_streamed(args: FinetuneArguments, progress: bool) -> tuple[Any, Any]:
    """Training images in shards, and validation images on this machine: a split of the shards, or `--val`."""
    data = args.data
    if data.val and not Path(data.val).exists():
        raise FileNotFoundError(f"There is no {data.val}.")
    needs = () if data.val else ("val",)
    train_set: Any = load_streamed_dataset(split="train", needs=needs, progress=progress, **data.streamed_source)
    for index in train_set.first():
        train_set[index]  # so that sizes that are not those of the images are refused now
    names = id2label(train_set)
    if data.train_images is not None:
        train_set = nested_subset(train_set, data.train_images, args.run.seed, data.location)
    if data.val:
        beside = Path(data.val).parent
        folder = beside.parent if beside.name == "annotations" else beside
        source = data.source | {"path": str(folder), "files": {"val": data.val}}
        val_set: Any = load_detection_dataset(split="val", id2label=names, progress=progress, **source)
    else:
        val_set = load_streamed_dataset(
            split="val", keep_images=True, id2label=names, progress=progress, **data.streamed_source
        )
    _require_objects(args, train_set, val_set)
    ModelEvaluation(val_set)
    return train_set, val_set


def _require_objects(args: FinetuneArguments, train_set: Any, val_set: Any) -> None:
    require_objects(train_set, f"{args.data.location}, training", "learned")
    require_objects(val_set, f"{args.data.location}, validation", "measured")


def nested_subset(dataset: Any, number: int, seed: int, location: str) -> Any:
    """`number` randomly chosen images, in the order of the data set. With the same seed, a larger subset contains the
    smaller ones.

    Raises:
        ValueError: there are fewer.
    """
    if number > len(dataset):
        raise ValueError(f"{location} has {len(dataset)} training images, fewer than --train_images {number}.")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:number]
    return dataset.select(sorted(chosen.tolist()))


def _share_stuff(train_set: Any, val_set: Any, source: str) -> None:
    """Let the classes that are stuff in the training images be stuff in the validation images, in which some of them
    may not occur.

    Raises:
        ValueError: there are others, or none.
    """
    learned, measured = stuff_labels(train_set), stuff_labels(val_set)
    others = [name for name in measured if name not in learned]
    if others:
        raise ValueError(f"{source}: {listed(others)} are stuff in the validation images and not in the training ones.")
    if learned and not measured:
        raise ValueError(
            f"{source}: {listed(learned)} are stuff in the training images, and nothing is in the validation images. "
            "Take both from panoptic annotations (--train, --val)."
        )
    if learned:
        set_stuff_labels(val_set, learned)


def repeat_images(args: FinetuneArguments, train_set: Any, accelerator: Accelerator) -> Any:
    """The training images, with `--repeat_threshold` those of rare classes several times; prints what changed."""
    if args.data.repeat_threshold is None:
        return train_set
    indices = repeat_rare_classes(train_set, args.data.repeat_threshold, args.run.seed)
    accelerator.print(describe_repeats(train_set, indices, list(id2label(train_set).values())))
    return train_set.select(indices)


def build_processor(args: FinetuneArguments) -> DetrImageProcessor:
    """The checkpoint's or a new one, with the requested size. A new one normalises images as those were that the
    pretrained backbone was trained on."""
    if args.model.model:
        processor = DetrImageProcessor.from_pretrained(args.model.model)
    elif args.embedded:
        processor = DetrImageProcessor(size=SHAPES_SIZE)
    else:
        processor = DetrImageProcessor()
        known = None if args.random_backbone else pretrained_normalization(args.backbone)
        if known is not None:
            processor.image_mean, processor.image_std = known
    if args.data.image_size:
        longest = round(args.data.image_size * 1333 / 800)
        processor.size = type(processor)(size={"shortest_edge": args.data.image_size, "longest_edge": longest}).size
    processor.num_channels = args.model.config_fields().get("num_channels", processor.num_channels)
    if processor.num_channels != 3 and not args.model.model:  # those of red, green and blue mean nothing there
        processor.image_mean, processor.image_std = (
            [statistics.mean(values)] for values in (processor.image_mean, processor.image_std)
        )
    if args.data.image_range:
        black, white = args.data.image_range
        processor.image_range = black, white
    return processor


def fit_processor(processor: DetrImageProcessor, model: DetrForDetection, recipe: RunRecipe) -> DetrImageProcessor:
    """The processor with what it has to know of the model and its training: the score from which a query is a panoptic
    segment, unless it has one, and whether sizes are rounded."""
    if recipe.augmentation in ("paper", *ROUNDED) and keeps_aspect_ratio(processor.size):  # which resize
        processor.round_size = recipe.augmentation in ROUNDED
    if model.has_masks and processor.panoptic_threshold is None and model.config.class_loss != "cross_entropy":
        processor.panoptic_threshold = PANOPTIC_THRESHOLD
    return processor


def build_model(args: FinetuneArguments, recipe: RunRecipe, train_set: Any) -> DetrForDetection:
    """The checkpoint's model with its class head adapted, or a new one for the classes of `train_set`. Classes that the
    checkpoint has under the same name keep their weights; what was kept and what was reset is logged."""
    names = id2label(train_set)
    kind: type[DetrForDetection] = DetrForSegmentation if args.data.masks else DetrForDetection
    fields = recipe.config | ({"stuff_labels": stuff_labels(train_set)} if args.data.reads_masks else {})
    model: DetrForDetection
    if args.model.model:
        if args.data.masks:
            _check_stride(args.model.model)
        if args.model.freeze_detector:
            _check_known_classes(args.model.model, names)
        model = kind.from_pretrained(args.model.model, id2label=names, ignore_mismatched_sizes=True, **fields)
    else:
        config = DetrConfig(**fields, id2label=names, label2id={name: index for index, name in names.items()})
        if recipe.random_backbone:
            model = kind(config)
        else:
            model = kind.from_pretrained_backbone(config, args.model.backbone_weights)
    if isinstance(model, DetrForSegmentation) and args.model.freeze_detector:
        model.freeze_detector()
    if args.model.freeze_backbone:
        model.freeze_backbone()
    if args.model.lora_rank:
        add_lora(model, args.model.lora_rank)
    if args.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _check_stride(checkpoint: str) -> None:
    """Raise ValueError if the features of a detector are too fine for a mask head."""
    stored, _ = DetrConfig.get_config_dict(checkpoint)
    stride, smallest = stored.get("feature_stride"), MASK_STRIDES[-1]
    if stride is not None and stride < smallest:
        raise ValueError(
            f"--masks needs features of stride {smallest} or more, and {checkpoint} has {stride}. Train one with "
            f"--set feature_stride={smallest} (or --stuff, if the data have stuff), or omit --model."
        )


def _check_known_classes(checkpoint: str, names: dict[int, str]) -> None:
    """Raise ValueError if a detector that is to stay as it is does not know some of these classes."""
    stored, _ = DetrConfig.get_config_dict(checkpoint)
    known = set((stored.get("id2label") or {}).values())
    unknown = [name for name in names.values() if name not in known]
    if unknown:
        raise ValueError(
            f"--freeze_detector keeps the classes of {checkpoint}, which does not detect {listed(unknown)}. Train it "
            "on all classes first (--stuff, without --masks), or omit --freeze_detector."
        )


def compile_for_training(model: DetrForDetection) -> None:
    """Apply `torch.compile` to backbone, encoder and decoder, in place. The rest depends on the data and stays eager:
    padding is cut off before the backbone, and the loss is matched on the host."""
    for part in (model.model.backbone.model, model.model.encoder, model.model.decoder):
        part.compile()


def build_augmentation(kind: str, processor: DetrImageProcessor, color_jitter: float = 0.0) -> Augmentation:
    """One of `AUGMENTATIONS` by name, and random colors with a probability."""
    if kind in ("paper", *ROUNDED):
        one_size = kind == "paper-one-size"
        augmentation = paper_augmentation(processor.size, rounded=kind in ROUNDED, one_size_per_batch=one_size)
    elif kind == "turns":
        augmentation = flip_rotate_augmentation()
    elif kind in ("flip", "none"):
        augmentation = Augmentation(v2.RandomHorizontalFlip(0.5 if kind == "flip" else 0.0), few_sizes=True)
    else:
        raise ValueError(f"Unknown augmentation {kind!r}.")
    return with_color_jitter(augmentation, color_jitter) if color_jitter else augmentation


def build_loaders(
    args: FinetuneArguments,
    recipe: RunRecipe,
    processor: DetrImageProcessor,
    train_set: Any,
    val_set: Any,
    accelerator: Accelerator,
    augmentation: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any, TrainingProbe]:
    """Loaders of training (augmented, shuffled) and validation images, and a probe of some training images.

    Args:
        augmentation: a function of a row, in place of the recipe's, usually a `hf_detr.data.Augmentation`. Then there
            is no `--color_jitter`, either; images are still mixed, before it.
    """
    train_rows: Sequence[Any] = train_set
    val_rows: Sequence[Any] = val_set
    if args.data.is_drawn:  # drawn images are small: decoded once, and kept in memory
        train_rows, val_rows = list(train_set), list(val_set)
    if args.embedded and not args.data.image_size:  # resized once, too
        resize = Augmentation(ResizeTo(SHAPES_SIZE["height"], SHAPES_SIZE["width"]))
        train_rows = [resize(row) for row in train_rows]
    collate, seed = DetectionCollator(processor), args.run.seed
    reads_as_usual = processor.num_channels == 3 and processor.image_range is None and processor.do_rescale
    common = {
        "batch_size": recipe.batch_size,
        "num_workers": args.data.loader_workers,
        "accelerator": accelerator,
    }
    train_loader = build_loader(
        AugmentedDataset(
            train_rows,
            augmentation or build_augmentation(recipe.augmentation, processor, recipe.color_jitter),
            seed=seed,
            to_tensor=None if reads_as_usual else processor.to_tensor,
            mixers=build_mixers(train_rows, mosaic=recipe.mosaic, copy_paste=recipe.copy_paste),
        ),
        collate,
        seed=seed,
        training=True,
        group_by_aspect_ratio="shortest_edge" in size_fields(processor.size),
        shuffle_buffer=args.data.shuffle_buffer or SHUFFLE_BUFFER,
        **common,
    )
    val_loader = build_loader(val_rows, collate, training=False, **common)
    count = min(PROBED_IMAGES, len(train_set))
    probed = train_rows[:count] if args.data.is_drawn else train_set.select(range(count))
    return train_loader, val_loader, TrainingProbe(probed, collate, recipe.batch_size)


def describe_run(
    args: FinetuneArguments,
    recipe: RunRecipe,
    model: DetrForDetection,
    processor: DetrImageProcessor,
    train_set: Any,
    val_set: Any,
    train_loader: Any,
    accelerator: Accelerator,
) -> str:
    """What is trained on what, where it starts from, and on which hardware: a few lines to print."""
    images = f"{len(train_set)} training and {len(val_set)} validation images of {listed(id2label(train_set).values())}"
    if args.model.model:
        start = f"Model: {args.model.model}."
    elif recipe.random_backbone:
        start = f"Model: DETR on {model.config.backbone}, random weights."
    else:
        source = args.model.backbone_weights or "timm weights"
        start = f"Model: DETR, backbone {model.config.backbone} from {source}, everything else random."
    if args.model.lora_rank:
        start += f" LoRA adapters of rank {args.model.lora_rank} and the heads are trained."
    if args.model.freeze_backbone:
        start += " The backbone is frozen."
    if args.model.freeze_detector:
        start += " The detector is frozen, and the mask head is trained."
    if args.model.model and not args.data.masks and has_masks(args.model.model):
        start += " Its mask head is dropped; --masks keeps it."
    if recipe.data.max_objects > (queries := model.config.num_predictions):
        wanted = round(1.25 * recipe.data.max_objects * model.config.num_queries / queries)
        start += (
            f"\nUp to {recipe.data.max_objects} objects per image, but {queries} queries: some cannot be learned. For "
            f"more queries: --set num_queries={wanted}"
        )
    if recipe.data.max_objects > args.run.max_detections:
        start += (
            f"\nUp to {recipe.data.max_objects} objects per image: the metrics count {args.run.max_detections} "
            f"detections per image and class. For more: --max_detections {recipe.data.max_objects}"
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    device = f"{accelerator.num_processes} x {accelerator.device}"
    threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    return (
        f"{images}\n{start}\n{trained:.1f} M parameters train on {device}{threads}, precision "
        f"{accelerator.mixed_precision}. {_describe_padding(train_set, train_loader, processor)}"
    )


def _describe_padding(train_set: Any, loader: Any, processor: DetrImageProcessor) -> str:
    """Fraction of padding with and without grouping by aspect ratio, at the sizes before augmentation; empty if no
    image is padded."""
    if not keeps_aspect_ratio(processor.size):
        return ""
    sizes = resized_sizes(image_sizes(train_set), processor.size)
    batches = list(loader.batch_sampler.batches())
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(len(batch) for batch in batches)
    ungrouped = padding_fraction([order[i : i + count] for i in range(0, len(order), count)], sizes)
    if ungrouped == 0:
        return ""
    grouped = padding_fraction(batches, sizes)
    return f"Padding before augmentation: {grouped:.1%} of the pixels (ungrouped {ungrouped:.1%}). "
