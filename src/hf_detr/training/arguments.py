"""The command line of `examples/finetune.py` as frozen dataclasses."""

import json
import math
import os
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..model.configuration_hf_detr import DetrConfig
from ..model.pretrained import SHAPES_OF_WEIGHTS
from .optimization import SCHEDULES
from .recipes import AUGMENTATIONS, RECIPES

EMBEDDED_BACKBONE = "test_resnet"  # for the drawn images; a larger one takes too long on a few CPU cores
METRICS = ("AP", "AP50", "AP75", "AR100")
METRICS_OF_MASKS = ("mask_AP", "mask_AP50", "mask_AP75", "mask_AR100", "PQ", "PQ_things", "PQ_stuff")
# Fields of DetrConfig that only models with masks read.
FIELDS_OF_MASKS = ("mask_attention_gain", "mask_loss_coefficient", "dice_loss_coefficient")
# Further such fields: they may change when a run starts from a checkpoint, not within a run.
PARTS_OF_MODEL = (
    "num_queries",
    "num_channels",
    "denoising_groups",
    "dense_loss_coefficient",
    "query_proposals",
)


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """A field of an argument dataclass; `metadata` goes to `argparse` (`choices`, `metavar`)."""
    return HfArg(help=help, default=default, metadata=metadata)


@dataclass(frozen=True)
class DataArguments:
    dataset: str | None = option("annotated folder or Hub id; default: draw shapes into data/shapes")
    train: str | None = option("annotation file of the training images, if --dataset does not find it", metavar="FILE")
    val: str | None = option("annotation file of the validation images", metavar="FILE")
    images: str | None = option("folder of the images, if it is not beside the annotations", metavar="FOLDER")
    bbox_format: str | None = option("xyxy: boxes are stored as corners", choices=("xywh", "xyxy"))
    masks: bool = option("learn and measure masks, too: panoptic and instance segmentation", False)
    stuff: bool = option("also learn the boxes of stuff, to train a detector for a later --masks run", False)
    crowds_as_objects: bool = option("learn objects that are marked as crowds (iscrowd, difficult)", False)
    image_range: list[float] | None = field(
        default=None,
        metadata={"help": "values of black and white in images that are not 8-bit, such as 0 4095", "nargs": 2},
    )
    image_size: int | None = option("shortest edge in pixels, default 800 (shapes: 96 x 96)")
    repeat_threshold: float | None = option(
        "show images of classes that are in a smaller fraction of the images more often, such as 0.1",
        metavar="FRACTION",
    )
    streaming: bool = option("read images from shards (Parquet, WebDataset) as needed", False)
    shuffle_buffer: int | None = option("images that --streaming shuffles, default 1000", metavar="N")
    overfit: int | None = option("train on N images, until they are memorized", metavar="N")
    train_images: int | None = option("train on N of the images, drawn by --seed", metavar="N")
    fold: str | None = option("of N folds, validate on fold K, train on the others",
                              metavar="K/N")  # fmt: skip
    quick: bool = option("2 epochs on 64 images, as a smoke test", False)
    num_workers: int | None = option("processes that load images, default 2 (shapes: 0)")

    def __post_init__(self) -> None:
        _check_at_least_one(self, "image_size", "overfit", "train_images", "shuffle_buffer")
        if self.overfit and self.train_images:
            raise ValueError("--overfit N already sets the number of images; omit --train_images")
        if self.repeat_threshold is not None and not 0 < self.repeat_threshold <= 1:
            raise ValueError("--repeat_threshold is a fraction of the images, above 0 and at most 1")
        if self.masks and self.stuff:
            raise ValueError("--masks learns stuff in any case; omit --stuff")
        if self.streaming:
            self._check_streaming()
        elif self.shuffle_buffer:
            raise ValueError("--shuffle_buffer needs --streaming; other images are all shuffled")
        if self.fold and self.overfit:
            raise ValueError("--overfit measures the images that it trains on; omit --fold")
        if self.fold and self.val:
            raise ValueError("--fold validates on some of the training images; omit --val")
        self.held_out()
        if not self.dataset and not self.train and (self.val or self.images):
            raise ValueError("--val and --images need --train FILE or --dataset FOLDER")

    def _check_streaming(self) -> None:
        if not self.dataset:
            raise ValueError("--streaming reads shards: name them with --dataset, a folder or a Hub id")
        if self.images and not self.val:
            raise ValueError("--streaming reads the images of its shards; --images is only for those of --val FILE")
        for name, given in (
            ("--train", self.train), ("--masks", self.masks), ("--stuff", self.stuff), ("--overfit", self.overfit),
            ("--fold", self.fold),
        ):  # fmt: skip
            if given:
                raise ValueError(f"{name} needs the images on this machine; omit --streaming")

    def held_out(self) -> tuple[int, int] | None:
        """Number of the fold and of folds."""
        if self.fold is None:
            return None
        try:
            number, count = (int(part) for part in self.fold.split("/"))
        except ValueError:
            number, count = 0, 0
        if not (1 <= number <= count and count > 1):
            raise ValueError(f"--fold {self.fold}: it must be K/N, such as 1/5, with K from 1 to N")
        return number, count

    @property
    def is_drawn(self) -> bool:
        """Whether no data were named, so that shapes are drawn."""
        return not (self.dataset or self.train)

    @property
    def unmixable(self) -> str | None:
        """Why training images cannot be mixed with others, or None."""
        if self.streaming:
            return "streamed images come in the order in which they are stored"
        return "images with masks (--masks, --stuff) cannot be mixed" if self.reads_masks else None

    @property
    def reads_masks(self) -> bool:
        """Whether masks are read: panoptic annotations, which have stuff, are found with them."""
        return self.masks or self.stuff

    @property
    def location(self) -> str:
        """The folder or the Hub id; where no data set was named, the folder for the drawn one."""
        if self.train and not self.dataset:
            return str(Path(self.train).parent)
        return self.dataset or f"data/shapes{'-masks' if self.reads_masks else ''}{'-quick' if self.quick else ''}"

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of `load_detection_dataset` that say where and how the data are."""
        files = {split: file for split, file in (("train", self.train), ("val", self.val)) if file}
        return {
            "path": self.location,
            "files": files or None,
            "images": self.images,
            "bbox_format": self.bbox_format,
            "crowds_as_objects": self.crowds_as_objects,
            "masks": self.reads_masks,
            "fold": self.held_out(),
        }

    @property
    def streamed_source(self) -> dict[str, Any]:
        """Arguments of `load_streamed_dataset` that say where and how the data are."""
        names = ("path", "bbox_format", "crowds_as_objects")
        return {name: value for name, value in self.source.items() if name in names}

    @property
    def name(self) -> str:
        """Short name for cards and metrics."""
        return dataset_name(self.location)

    @property
    def loader_workers(self) -> int:
        """Drawn images stay in memory, where worker processes would only compete with the model for the cores."""
        return self.num_workers if self.num_workers is not None else 0 if self.is_drawn else 2


@dataclass(frozen=True)
class ModelArguments:
    model: str | None = option("checkpoint to start from, a folder or a Hub id")
    backbone: str | None = option("without --model: timm network to start from, default resnet50")
    backbone_weights: str | None = option('a local file, or "none" for random weights; default: from the Hub')
    set: list[str] | None = field(default=None, metadata={"help": "fields of DetrConfig", "metavar": "FIELD=VALUE"})
    freeze_backbone: bool = option("train everything but the backbone", False)
    freeze_detector: bool = option("with --masks: train the mask head only, as the paper does on a box model", False)
    lora_rank: int | None = option("train LoRA adapters of this rank and the heads only", metavar="R")
    gradient_checkpointing: bool = option("recompute activations: less memory, more time", False)
    compile: bool = option("torch.compile backbone, encoder and decoder", False)

    def __post_init__(self) -> None:
        _check_at_least_one(self, "lora_rank")
        if self.lora_rank and not self.model:
            raise ValueError("--lora_rank adapts a trained detector: name one with --model")
        if self.freeze_backbone and self.backbone_weights == "none":
            raise ValueError("--freeze_backbone would keep the random weights of --backbone_weights none")
        if self.freeze_detector and not self.model:
            raise ValueError("--freeze_detector keeps a trained detector as it is: name one with --model")
        if self.freeze_detector and (self.freeze_backbone or self.lora_rank):
            other = "--freeze_backbone" if self.freeze_backbone else "--lora_rank"
            raise ValueError(f"--freeze_detector trains the mask head only; omit {other}")
        if self.freeze_backbone and self.lora_rank:
            raise ValueError("--lora_rank trains no weight of the backbone already; omit --freeze_backbone")
        for name in ("backbone", "backbone_weights"):
            if self.model and getattr(self, name):
                raise ValueError(f"--{name} starts a new model, and --model names a trained one: give one of them")
        # these depend on what the recipe chooses
        apart = ("query_type", "relative_boxes", "class_weights", "num_patterns", "class_activation", *PARTS_OF_MODEL)
        try:
            DetrConfig(**{name: value for name, value in self.config_fields().items() if name not in apart})
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"--set: {' '.join(str(error).split())}") from error
        shapes = sorted(set(self.config_fields()) & set(SHAPES_OF_WEIGHTS))
        if self.model and shapes:
            raise ValueError(
                f"--set {shapes[0]}=... changes the weights of --model, which would start at random. Only its classes, "
                "num_queries, num_channels and what is not in its weights can change"
            )

    def config_fields(self) -> dict[str, Any]:
        """`--set` as fields of [`DetrConfig`] and their values."""
        return dict(_parse_config_field(text) for text in self.set or ())


@dataclass(frozen=True)
class RecipeArguments:
    """What was given on the command line; None where the recipe decides."""

    _argument_group_name = "recipe: chooses a value, and prints its reason, where none is given here"
    recipe: str = option("default: auto", "auto", choices=RECIPES)
    epochs: int | None = option("passes over the training images")
    batch_size: int | None = option("images per process and batch")
    learning_rate: float | None = option("of all but the backbone")
    backbone_learning_rate: float | None = option("of the backbone")
    weight_decay: float | None = option("of matrices; biases, norms and queries have none")
    schedule: str | None = option("wsd: warm-up, stable, decay; step: the paper's", choices=SCHEDULES)
    warmup: float | None = option("fraction of all steps in which the learning rate rises")
    decay: float | None = option("fraction of all steps, at the end, in which the rate falls (step: is a tenth)")
    ema: float | None = option("decay of the averaged weights, which are saved; 0: none", metavar="DECAY")
    augmentation: str | None = option("of the training images", choices=AUGMENTATIONS)
    mosaic: float | None = option("probability of an image to be a mosaic of four", metavar="P")
    copy_paste: float | None = option("probability of an image to get objects pasted", metavar="P")
    color_jitter: float | None = option("probability of an image to get other colors", metavar="P")
    eval_every: int | None = option("epochs between evaluations; the last always is")

    def __post_init__(self) -> None:
        _check_at_least_one(self, "epochs", "batch_size", "eval_every")
        for name in ("learning_rate", "backbone_learning_rate", "weight_decay"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"--{name} must be a number that is at least 0")
        for name in ("warmup", "decay"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"--{name} is a fraction of all steps, between 0 and 1")
        for name in ("mosaic", "copy_paste", "color_jitter"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"--{name} is a probability, between 0 and 1")
        if not 0 <= (self.ema or 0) < 1:
            raise ValueError(
                "--ema must be at least 0 and below 1: a decay such as 0.99, or 0 to not average the weights"
            )
        if (self.warmup or 0) + (self.decay or 0) > 1:
            raise ValueError("--warmup and --decay are fractions of all steps, together at most 1")

    def given(self) -> dict[str, Any]:
        """The values that replace the recipe's."""
        return {name: value for name, value in asdict(self).items() if name != "recipe" and value is not None}


@dataclass(frozen=True)
class RunArguments:
    output_dir: str | None = option("default: the next free runs/NAME-N; the same command again continues the run")
    resume: bool = option("continue the run in --output_dir with its arguments, except those given now", False)
    minutes: float | None = option(
        "train for about N minutes: as many epochs as fit, by measured steps and evaluations", metavar="N"
    )
    mixed_precision: str | None = option("default: bf16 where it is fast", choices=("no", "bf16", "fp16"))
    gradient_accumulation_steps: int = HfArg(
        default_factory=lambda: int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")),
        help="batches per optimizer step",
    )
    auto_batch_size: bool = option("reduce the batch size until it fits, and accumulate gradients instead", False)
    metric: str | None = option(
        "selects the best checkpoint, default AP; with --masks PQ where there is stuff, and mask_AP elsewhere",
        choices=(*METRICS, *METRICS_OF_MASKS),
    )
    max_detections: int = option("per image and class in the metrics, default 100", 100, metavar="N")
    early_stopping: int | None = option("stop after N evaluations without improvement", metavar="N")
    save_minutes: float = option("between checkpoints within an epoch, default 15", 15)
    save_total_limit: int = option("checkpoints to keep, default 1", 1, metavar="N")
    on_nan: str = option("what to do with a step that is not finite", "stop", choices=("stop", "skip"))
    learning_curve: bool = option("forecast what twice as many images would give", False)
    folds: int | None = option("cross-validation: N models, each without a fold", metavar="N")
    seed: int = option("of weights, batches and augmentation, default 0", 0)
    report_to: list[str] | None = field(
        default=None, metadata={"help": "tensorboard, wandb, trackio, ... (see Accelerate)", "metavar": "TRACKER"}
    )
    logging_steps: int = option("steps between lines to the trackers, default 50", 50)
    push_to_hub: str | None = option("push the best checkpoint and its model card", metavar="REPO_ID")
    hub_private: bool = option("make the repository private if it is new", False)
    license: str | None = option("for the model card, such as apache-2.0")

    def __post_init__(self) -> None:
        _check_at_least_one(self, "gradient_accumulation_steps", "save_total_limit", "logging_steps", "early_stopping")
        _check_at_least_one(self, "max_detections")
        if not 0 <= self.save_minutes < math.inf:
            raise ValueError("--save_minutes must be a number that is at least 0")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError("--minutes must be a number above 0")
        if self.seed < 0:
            raise ValueError("--seed must not be negative")
        if self.folds is not None and self.folds < 2:
            raise ValueError("--folds must be at least 2")


@dataclass(frozen=True)
class FinetuneArguments:
    """All of them.

    Args:
        saved: of a run that continues with `--resume`: its `args.json`; otherwise empty.
    """

    data: DataArguments
    model: ModelArguments
    recipe: RecipeArguments
    run: RunArguments
    saved: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data.overfit and self.run.push_to_hub:
            raise ValueError("--overfit memorizes a few images; there is nothing to push")
        if self.data.streaming and self.run.auto_batch_size:
            raise ValueError("--auto_batch_size tries the largest images, which lie all over the shards; omit it")
        mixing = [name for name in ("mosaic", "copy_paste") if getattr(self.recipe, name)]
        if mixing and self.data.unmixable:
            raise ValueError(f"--{mixing[0]} mixes images, which is not possible: {self.data.unmixable}")
        for option, several in (("--learning_curve", self.run.learning_curve), ("--folds", bool(self.run.folds))):
            if several:
                self._check_several_models(option)
        if not self.data.masks:
            self._check_without_masks()
        if self.model.freeze_detector and self.recipe.backbone_learning_rate and not self.saved:
            raise ValueError("--backbone_learning_rate is for a backbone that trains; omit --freeze_detector")
        if self.model.freeze_backbone and self.recipe.backbone_learning_rate and not self.saved:
            raise ValueError("--backbone_learning_rate is for a backbone that trains; omit --freeze_backbone")
        if self.run.minutes is not None and not self.saved and (self.recipe.epochs or self.data.quick):
            raise ValueError("--minutes chooses the number of epochs; omit --epochs and --quick")
        if self.embedded and self.model.freeze_backbone:
            raise ValueError("--freeze_backbone needs trained weights: name --model, or --dataset or --backbone")

    def _check_without_masks(self) -> None:
        if self.model.freeze_detector:
            raise ValueError("--freeze_detector trains the mask head only: add --masks")
        if self.run.metric in METRICS_OF_MASKS:
            raise ValueError(f"--metric {self.run.metric} measures masks: add --masks")
        unused = sorted(set(self.model.config_fields()) & set(FIELDS_OF_MASKS))
        if unused:
            raise ValueError(f"--set {unused[0]}=... is for masks: add --masks")

    def _check_several_models(self, option: str) -> None:
        run, data = self.run, self.data
        if not run.output_dir:
            raise ValueError(f"{option} trains several models: name a folder for them with --output_dir")
        unused: list[tuple[str, Any]] = [
            ("--overfit", data.overfit), ("--quick", data.quick), ("--resume", run.resume),
            ("--train_images", data.train_images), ("--push_to_hub", run.push_to_hub), ("--fold", data.fold),
            ("--streaming", data.streaming),
        ]  # fmt: skip
        unused += [("--val", data.val), ("--learning_curve", run.learning_curve)] if run.folds else []
        for name, given in unused:
            if given:
                raise ValueError(f"{option} trains several models; omit {name}")

    @property
    def embedded(self) -> bool:
        """Whether the run uses the drawn images and the small model, as it does without arguments."""
        return bool(self.saved.get("embedded", self.data.is_drawn and not (self.model.model or self.model.backbone)))

    @property
    def random_backbone(self) -> bool:
        """Whether a new model starts without pretrained weights."""
        return self.model.model is None and (self.model.backbone_weights == "none" or self.embedded)

    @property
    def backbone(self) -> str:
        """The timm network of a new model."""
        config = self.saved.get("set", {}) | self.model.config_fields()
        name: str | None = config.get("backbone") or self.model.backbone
        return name or (EMBEDDED_BACKBONE if self.embedded else "resnet50")

    def to_dict(self) -> dict[str, Any]:
        """Flat, by the names of the command line, with the Hub ids that a model card names."""
        flat = asdict(self.data) | asdict(self.model) | asdict(self.recipe) | asdict(self.run)
        model, dataset = self.model.model, self.data.dataset
        return flat | {
            "embedded": self.embedded,
            "base_model": model if model and not Path(model).exists() else None,
            "datasets": [dataset] if dataset and not Path(dataset).exists() else None,
        }


PARTS = (DataArguments, ModelArguments, RecipeArguments, RunArguments)


def parse_finetune_args(description: str | None, argv: Sequence[str] | None = None) -> FinetuneArguments:
    """Parse the command line, by default that of this process. With `--resume` the defaults are the arguments with
    which the run was started. Mistakes end the process with a message, as `argparse` does."""
    parser = HfArgumentParser(
        PARTS,
        description=description,
        formatter_class=_HelpFormatter,
        usage="%(prog)s [options]",
        epilog="--debug shows the traceback of an error.",
    )
    saved: dict[str, Any] = {}
    first, _ = parser.parse_known_args(argv)
    if first.resume:
        file = Path(first.output_dir or "") / "args.json"
        if not first.output_dir or not file.is_file():
            parser.error("--resume needs the --output_dir of a run that was started")
        saved = json.loads(file.read_text())
        names = {argument.name for part in PARTS for argument in fields(part)} - {"set"}
        parser.set_defaults(**{name: value for name, value in saved.items() if name in names})
    try:
        *parts, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
        args = FinetuneArguments(*parts, saved=saved)  # type: ignore[misc]
        if saved:
            _check_unchanged(args)
    except ValueError as error:
        parser.error(str(error))
    return args


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Shows each option once, without the spelling with hyphens and the value of flags that `HfArgumentParser` adds."""

    def _format_action_invocation(self, action: Action) -> str:
        if action.nargs == "?":
            return action.option_strings[0]
        spellings, action.option_strings = action.option_strings, action.option_strings[:1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


def _check_unchanged(args: FinetuneArguments) -> None:
    """Raise ValueError where an argument cannot change within a run."""
    saved, now = args.saved, args.to_dict()
    changed = [
        name
        for name in ("ema", "freeze_backbone", "freeze_detector", "masks", "overfit", "streaming", "stuff")
        if bool(saved.get(name)) != bool(now[name])
    ]
    fixed = (
        "backbone",
        "backbone_weights",
        "fold",
        "lora_rank",
        "metric",
        "minutes",
        "model",
        "recipe",
        "repeat_threshold",
    )
    changed += [name for name in fixed if saved.get(name) != now[name]]
    before = DetrConfig().to_dict() | saved.get("set", {})
    fields_now = args.model.config_fields()
    changed += [
        f"set {n}" for n in (*SHAPES_OF_WEIGHTS, *PARTS_OF_MODEL) if n in fields_now and fields_now[n] != before[n]
    ]
    if changed:
        raise ValueError(f"--{changed[0]} cannot change within a run. Start another from its checkpoint with --model")


def _check_at_least_one(arguments: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1")


def _parse_config_field(text: str) -> tuple[str, Any]:
    """`num_queries=50` to a name and a value."""
    name, equals, value = text.partition("=")
    if not equals or name not in DetrConfig.__dataclass_fields__ or name in ("id2label", "label2id", "num_labels"):
        raise ValueError(f"--set {text}: it must be FIELD=VALUE, with a field of DetrConfig other than its classes")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def dataset_name(path: str | Path) -> str:
    """For folders and cards."""
    return Path(path).resolve().name if Path(path).exists() else str(path).replace("/", "-")
