"""The command line of `examples/finetune.py`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configuration_hf_detr import DetrConfig
from .recipes import RECIPES

TRAINING_VALUES = (
    "epochs", "batch_size", "learning_rate", "backbone_learning_rate", "weight_decay", "schedule", "warmup", "decay",
    "augmentation", "eval_every",
)  # fmt: skip
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
    add("--output_dir", help="default: the next free runs/NAME-N")
    add("--resume", action="store_true", help="continue the run in --output_dir after its last epoch")
    add("--overfit", type=int, metavar="N", help="learn N images by heart, to see that all is sound")
    add("--quick", action="store_true", help="2 epochs on 64 images, to see that all works")
    add("--image_size", type=int, help="shortest edge in pixels, default 800 (shapes: 96 x 96)")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: bf16 where it is fast")
    add("--num_workers", type=int, help="processes that load images, default 2 (shapes: 0)")
    add("--seed", type=int, default=0)
    add("--report_to", nargs="+", metavar="TRACKER", help="tensorboard, wandb, ... (see Accelerate)")
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
    recipe("--schedule", choices=("wsd", "step"), help="up, level, down; or the paper's, down to a tenth")
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
    try:
        args.set = begun.get("set", {}) | dict(_read_field(text) for text in args.set or ())
    except ValueError as error:
        parser.error(str(error))
    return args if args.resume else _complete(args, parser)


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
