"""What one run trains with: the recipe, updated with what was given on the command line."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data.schema import stuff_labels
from ..interop import has_masks
from ..model.configuration_hf_detr import DetrConfig
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.processor_size import size_range
from ..model.segmentation import STRIDES as MASK_STRIDES
from ..model.timm_network import feature_strides
from ..runtime import listed
from .arguments import FinetuneArguments
from .recipes import DataSummary, Start, choose_recipe, summarize
from .sharding import is_sharded

# nothing may regularize a model that is to memorize a few images
OVERFIT = {
    "epochs": 400, "eval_every": 20, "augmentation": "none", "weight_decay": 0.0, "schedule": "wsd", "decay": 0.0,
    "ema": 0.0, "mosaic": 0.0, "copy_paste": 0.0, "color_jitter": 0.0,
}  # fmt: skip
QUICK = {"epochs": 2, "eval_every": 1}


@dataclass(frozen=True)
class RunRecipe:
    """Hyperparameters of a run; see `Recipe.training` for the first ones.

    Args:
        metric: name of the number that selects the best checkpoint.
        config: fields of [`DetrConfig`] that differ from its defaults, or from those of the checkpoint.
        random_backbone: no pretrained weights are loaded into it.
        data: statistics of the training images.
        description: the recipe with its reasons, to print.
    """

    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    backbone_learning_rate: float
    weight_decay: float
    schedule: str
    warmup: float
    decay: float
    ema: float
    augmentation: str
    mosaic: float
    copy_paste: float
    color_jitter: float
    eval_every: int
    metric: str
    config: dict[str, Any]
    random_backbone: bool
    data: DataSummary
    description: str

    def settings(self, args: FinetuneArguments) -> dict[str, Any]:
        """All arguments and what became of them, for `args.json`."""
        hidden = ("config", "random_backbone", "data", "description")
        values = {name: value for name, value in asdict(self).items() if name not in hidden}
        weights = "none" if self.random_backbone else args.model.backbone_weights
        return args.to_dict() | values | {"set": self.config, "backbone_weights": weights}


def resolve_recipe(args: FinetuneArguments, train_set: Any, processor: DetrImageProcessor) -> RunRecipe:
    """Choose a recipe for these training images and apply what was given on the command line. A run that is resumed
    keeps its values, except those given now.

    Args:
        train_set: in the schema of `hf_detr.data`; its annotations are read, not its images.

    Raises:
        ValueError: the recipe, or a field of the config, does not fit the starting point.
    """
    given, config, data = args.recipe.given(), args.model.config_fields(), summarize(train_set)
    if args.saved:  # `given` is complete then
        config = args.saved.get("set", {}) | config
        none = dict.fromkeys(("ema", "mosaic", "copy_paste", "color_jitter"), 0.0)
        given = none | given  # runs of 0.1 have none
        description = f"Recipe and arguments of the run in {args.run.output_dir}, except those given now."
    else:
        if args.data.overfit:
            given = OVERFIT | given
        if args.data.quick:
            given = QUICK | given
        new_masks = args.data.masks and not (args.model.model and has_masks(args.model.model))
        if args.data.masks and not new_masks and "mask_attention_gain" in config:
            raise ValueError(
                f"--set mask_attention_gain=... is for the initial weights of a mask head, and {args.model.model} has "
                "a trained one."
            )
        start: Start = "checkpoint" if args.model.model else "scratch" if args.random_backbone else "backbone"
        recipe = choose_recipe(
            args.recipe.recipe,
            data,
            start,
            size_range(processor.size),
            strides=[] if start == "checkpoint" else _strides(args.backbone, masks=args.data.reads_masks),
            upright=not args.data.is_drawn,
            new_masks=new_masks,
            freeze_detector=args.model.freeze_detector,
            d_model=config.get("d_model"),
            query_proposals=config.get("query_proposals", True),
            decoder_layers=config.get("decoder_layers"),
            unmixable=args.data.unmixable,
            in_color=_in_color(processor),
            feature_stride=config.get("feature_stride") or _stride_of(args.model.model),
            **(_queries_of(args.model.model) if args.model.model and not args.model.freeze_detector else {}),
        )
        description = recipe.describe(config | given)
        if is_sharded() and not given.get("ema"):
            description += "\n  FSDP shards the weights, so they are not averaged: ema 0.0"
            given["ema"] = 0.0
        given = recipe.values("training", given)
        if start == "checkpoint":
            config = recipe.values("model", config)
        else:
            small = {"attn_implementation": "eager"} if args.embedded else {}  # the fastest at so few locations
            config = recipe.values("model", {"backbone": args.backbone} | small | config)
    if given["color_jitter"] and not _in_color(processor):
        raise ValueError("--color_jitter is for RGB images, which the processor rescales; omit it")
    metric, why = _choose_metric(args, stuff_labels(train_set))
    return RunRecipe(
        **given,
        metric=metric,
        gradient_accumulation_steps=args.run.gradient_accumulation_steps,
        config=config,
        random_backbone=args.random_backbone,
        data=data,
        description=f"{description}{why}",
    )


def _in_color(processor: DetrImageProcessor) -> bool:
    return processor.num_channels == 3 and bool(processor.do_rescale)


def _strides(backbone: str, *, masks: bool) -> list[int]:
    """The strides of a backbone that a recipe may choose; with masks not the finer ones, which the mask head reads."""
    strides = feature_strides(backbone)
    return [stride for stride in strides if stride >= MASK_STRIDES[-1]] or strides if masks else strides


def _choose_metric(args: FinetuneArguments, stuff: Sequence[str]) -> tuple[str, str]:
    """The number that selects the best checkpoint, and a sentence on it; empty for boxes.

    Raises:
        ValueError: panoptic quality was asked for, and there is no stuff.
    """
    asked = args.run.metric
    if not args.data.masks:
        return asked or "AP", ""
    if asked is not None and asked.startswith("PQ") and not stuff:
        raise ValueError(
            f"--metric {asked} is of panoptic segmentation, but no class of {args.data.location} is stuff. Use "
            "--metric mask_AP."
        )
    metric = asked or ("PQ" if stuff else "mask_AP")
    kinds = f"{listed(stuff)} are stuff" if stuff else "no class is stuff"
    return metric, f"\nThe best checkpoint has the highest {metric}; {kinds}. To choose another number: --metric"


def _stride_of(checkpoint: str | None) -> int | None:
    """The stride of a checkpoint's feature map, where it is not its backbone's deepest."""
    if checkpoint is None:
        return None
    stored, _ = DetrConfig.get_config_dict(checkpoint)
    return stored.get("feature_stride") or (16 if stored.get("dilation") else None)


def _queries_of(checkpoint: str) -> dict[str, Any]:
    """The number and kind of object queries of a checkpoint, ours or transformers'."""
    stored, _ = DetrConfig.get_config_dict(checkpoint)
    queries: int = stored.get("num_queries", DetrConfig().num_queries)
    kind = stored.get("query_type", DetrConfig().query_type)
    return {"num_queries": queries, "num_patterns": max(1, stored.get("num_patterns", 0)), "query_type": kind}
