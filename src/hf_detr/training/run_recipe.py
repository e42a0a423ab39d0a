"""What one run trains with: the recipe, updated with what was given on the command line."""

from dataclasses import asdict, dataclass
from typing import Any

from ..model.configuration_hf_detr import DetrConfig
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.processor_size import size_range
from ..model.timm_network import feature_strides
from .arguments import FinetuneArguments
from .recipes import DataSummary, Start, choose_recipe, summarize

# nothing may regularize a model that is to memorize a few images
OVERFIT = {
    "epochs": 400, "eval_every": 20, "augmentation": "none", "weight_decay": 0.0, "schedule": "wsd", "decay": 0.0,
}  # fmt: skip
QUICK = {"epochs": 2, "eval_every": 1}


@dataclass(frozen=True)
class RunRecipe:
    """Hyperparameters of a run; see `Recipe.training` for the first ones.

    Args:
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
    augmentation: str
    eval_every: int
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
        ValueError: the recipe does not fit the starting point.
    """
    given, config, data = args.recipe.given(), args.model.config_fields(), summarize(train_set)
    if args.saved:  # `given` is complete then
        config = args.saved.get("set", {}) | config
        description = f"Recipe and arguments of the run in {args.run.output_dir}, except those given now."
    else:
        if args.data.overfit:
            given = OVERFIT | given
        if args.data.quick:
            given = QUICK | given
        start: Start = "checkpoint" if args.model.model else "scratch" if args.random_backbone else "backbone"
        recipe = choose_recipe(
            args.recipe.recipe,
            data,
            start,
            size_range(processor.size),
            strides=[] if start == "checkpoint" else feature_strides(args.backbone),
            upright=not args.data.is_drawn,
            num_queries=_queries_of(args.model.model) if args.model.model else None,
        )
        description = recipe.describe(config | given)
        given = recipe.values("training", given)
        if start == "checkpoint":
            config = recipe.values("model", config)
        else:
            small = {"attn_implementation": "eager"} if args.embedded else {}  # the fastest at so few locations
            config = recipe.values("model", {"backbone": args.backbone} | small | config)
    return RunRecipe(
        **given,
        gradient_accumulation_steps=args.run.gradient_accumulation_steps,
        config=config,
        random_backbone=args.random_backbone,
        data=data,
        description=description,
    )


def _queries_of(checkpoint: str) -> int:
    """The number of object queries of a checkpoint, ours or transformers'."""
    stored, _ = DetrConfig.get_config_dict(checkpoint)
    queries: int = stored.get("num_queries", DetrConfig().num_queries)
    return queries
