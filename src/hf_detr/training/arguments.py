"""The command line of `examples/finetune.py`."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.configuration_hf_detr import DetrConfig
from .optimization import SCHEDULES
from .recipes import RECIPES

TRAINING_VALUES = (
    "epochs", "batch_size", "learning_rate", "backbone_learning_rate", "weight_decay", "schedule", "warmup", "decay",
    "augmentation", "eval_every",
)  # fmt: skip
COUNTS = (
    "epochs", "batch_size", "eval_every", "gradient_accumulation_steps", "save_total_limit", "logging_steps",
    "early_stopping", "lora_rank", "image_size",
)  # fmt: skip
FIXED = ("ema", "overfit", "embedded")  # a run has them or not
# to learn a few images by heart nothing may stand in the way
OVERFIT = {
    "epochs": 400,
    "eval_every": 20,
    "augmentation": "none",
    "weight_decay": 0.0,
    "schedule": "wsd",
    "decay": 0.0,
}


def parse_finetune_args(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; values of the recipe that were not given are None.

    Also set: `embedded` (the main job: drawn data and the small model), `chosen` (which values of the recipe the user
    gave), `base_model` and `datasets` (Hub ids for the model card), and `set` as a dict. With `--resume` everything is
    as the run began, but for what is given again.

    Raises:
        SystemExit: something is wrong; argparse says what.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", help="annotated folder or Hub id; default: draw shapes into data/shapes")
    add("--model", help="checkpoint to start from, a folder or a Hub id")
    add("--backbone", help="without --model: timm network to start from, default resnet50")
    add("--backbone_weights", help='a local file, or "none" for random; default: from the Hub')
    add("--output_dir", help="default: the next free runs/NAME-N; the same command again goes on with a run")
    add("--resume", action="store_true", help="go on with the run in --output_dir, as it began but for what is given")
    add("--overfit", type=int, metavar="N", help="learn N images by heart, to see that all is sound")
    add("--quick", action="store_true", help="2 epochs on 64 images, to see that all works")
    add("--image_size", type=int, help="shortest edge in pixels, default 800 (shapes: 96 x 96)")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: bf16 where it is fast")
    add("--gradient_accumulation_steps", type=int, default=_accumulation(), help="batches in an optimizer step")
    add("--auto_batch_size", action="store_true", help="smaller batches until they fit, and more of them a step")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--compile", action="store_true", help="torch.compile backbone, encoder and decoder")
    add("--lora_rank", type=int, metavar="R", help="train adapters of this rank and the heads, not the transformer")
    add("--ema", type=float, metavar="DECAY", help="average the weights, evaluate and save the average; such as 0.9998")
    add("--metric", choices=("AP", "AP50", "AP75", "AR100"), default="AP", help="which the best checkpoint is best in")
    add("--early_stopping", type=int, metavar="N", help="stop after N evaluations without a better one")
    add("--save_minutes", type=float, default=15, help="save to resume so often within an epoch, and after each")
    add("--save_total_limit", type=int, default=1, metavar="N", help="checkpoints to resume from that are kept")
    add("--on_nan", choices=("stop", "skip"), default="stop", help="what to do with a step that is not finite")
    add("--num_workers", type=int, help="processes that load images, default 2 (shapes: 0)")
    add("--seed", type=int, default=0)
    add("--report_to", nargs="+", metavar="TRACKER", help="tensorboard, wandb, trackio, ... (see Accelerate)")
    add("--logging_steps", type=int, default=50, help="optimizer steps between lines to the trackers")
    add("--push_to_hub", metavar="REPO_ID", help="push the best checkpoint and its model card")
    add("--hub_private", action="store_true", help="make the repository private if it is new")
    add("--license", help="for the model card, an identifier of the Hub such as apache-2.0")
    recipe = parser.add_argument_group("recipe", "chooses what is not given here, and says why").add_argument
    recipe("--recipe", choices=RECIPES, default="auto")
    recipe("--set", nargs="+", metavar="FIELD=VALUE", help="fields of DetrConfig")
    recipe("--epochs", type=int)
    recipe("--batch_size", type=int, help="images per process and step")
    recipe("--learning_rate", type=float)
    recipe("--backbone_learning_rate", type=float)
    recipe("--weight_decay", type=float)
    recipe("--schedule", choices=SCHEDULES, help="wsd: up, level, down; step: the paper's")
    recipe("--warmup", type=float, help="share of all steps in which the rate rises")
    recipe("--decay", type=float, help="share of all steps, at the end, in which it falls or is low")
    recipe("--augmentation", choices=("paper", "flip", "turns", "none"))
    recipe("--eval_every", type=int, help="epochs between evaluations; the last one always has one")
    args = parser.parse_args(argv)
    begun: dict[str, Any] = {}
    if args.resume:
        if not args.output_dir or not (Path(args.output_dir) / "args.json").is_file():
            parser.error("--resume needs the --output_dir of a run that was begun")
        begun = json.loads((Path(args.output_dir) / "args.json").read_text())
        parser.set_defaults(**begun | {"resume": True, "output_dir": args.output_dir, "set": None})
        args = parser.parse_args(argv)
        changed = [name for name in FIXED if bool(begun.get(name)) != bool(getattr(args, name))]
        changed += [name for name in ("lora_rank", "metric", "model") if begun.get(name) != getattr(args, name)]
        if changed:
            parser.error(f"--{changed[0]} cannot change within a run. Begin another from its checkpoint with --model")
        if args.batch_size != begun["batch_size"]:
            args.found = None
    try:
        args.set = begun.get("set", {}) | dict(_read_field(text) for text in args.set or ())
    except ValueError as error:
        parser.error(str(error))
    _check(args, parser)
    return args if args.resume else _complete(args, parser)


def _accumulation() -> int:
    """As `accelerate config` or `accelerate launch` was told."""
    return int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name in COUNTS:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("warmup", "decay"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} is a share of all steps, between 0 and 1")
    if (args.warmup or 0) + (args.decay or 0) > 1:
        parser.error("--warmup and --decay are shares of all steps, together at most 1")
    if args.save_minutes < 0:
        parser.error("--save_minutes must not be negative")
    if args.lora_rank and not args.model:
        parser.error("--lora_rank adapts a trained detector: name one with --model")
    if args.ema is not None and not 0 < args.ema < 1:
        parser.error("--ema is a decay between 0 and 1, such as 0.9998")


def _complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    args.chosen = [name for name in TRAINING_VALUES if getattr(args, name) is not None]
    if args.overfit is not None:
        if args.overfit < 1:
            parser.error("--overfit needs at least one image")
        if args.push_to_hub:
            parser.error("--overfit learns by heart; there is nothing to push")
        for name, value in OVERFIT.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.quick:
        args.epochs, args.eval_every = 2, 1
    args.found = None  # batch size and accumulation that --auto_batch_size has found
    args.embedded = not (args.dataset or args.model or args.backbone)
    if args.num_workers is None:  # drawn images stay in memory, and the cores are busy with the model
        args.num_workers = 2 if args.dataset else 0
    # for the model card: where the weights are from, if others can get them there
    args.base_model = args.model if args.model and not Path(args.model).exists() else None
    args.datasets = [args.dataset] if args.dataset and not Path(args.dataset).exists() else None
    return args


def _read_field(text: str) -> tuple[str, Any]:
    """`num_queries=50` to a name and a value."""
    name, equals, value = text.partition("=")
    if not equals or name not in DetrConfig.__dataclass_fields__ or name in ("id2label", "label2id", "num_labels"):
        raise ValueError(f"--set {text}: it must be FIELD=VALUE, with a field of DetrConfig other than its classes")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
