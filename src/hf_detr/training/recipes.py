"""Training recipes: hyperparameters for a data set and a starting point, each with the reason for its value."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data.schema import learned_objects

Start = Literal["checkpoint", "backbone", "scratch"]
RECIPES = ("auto", "paper", "paper-500", "small-data", "finetune")
AUGMENTATIONS = ("paper", "paper-rounded", "paper-one-size", "flip", "turns", "none")

IMAGES_SEEN = {"checkpoint": 30_000, "backbone": 60_000, "scratch": 100_000}
FAST_DECODERS = {"conditional": "Conditional DETR", "dab": "DAB-DETR"}  # whose checkpoints learn in half of the epochs
MAX_QUERIES = 1000  # of a checkpoint that gets more; the cost of the decoder grows with their square
MAX_TOKENS = 1500  # locations of the feature map; the cost of self-attention grows with their square
STRIDES = (8, 16, 32)  # of most backbones
SMALL_DATA = 5_000  # images from which a pretrained backbone gets the paper's transformer
DENOISING_QUERIES = 100  # of an image, as in DINO (arXiv 2203.03605); a step takes longer the more there are
ENOUGH_QUERIES = 50  # more locations than objects find something, until scores separate them
SMALL_WIDTH = 128  # of that transformer otherwise
SMALL_IMAGE = 200  # pixels of the longest side up to which batches of 32 fit anywhere
BATCH_TOKENS = 2048  # locations per batch of small images; larger batches learn more slowly in the same time
FEW_OBJECTS = 100  # per class, up to which objects are pasted
VERY_FEW_OBJECTS = 50  # per class, up to which there are mosaics and color jitter as well
RARE = 10  # objects are also pasted where the most frequent class has more than this many times those of the rarest
MIXED_MEGAPIXELS = 2  # median image size up to which images are mixed; each then reads about three others
EMA_DECAY = 0.99  # averages about the last 100 steps


@dataclass(frozen=True)
class DataSummary:
    """Statistics of a data set that a recipe depends on.

    Args:
        min_per_class, max_per_class: number of objects of the rarest class that occurs, and of the most frequent one.
        max_objects: largest number of objects in one image.
        object_side: first quartile of the side of the objects, relative to the shorter side of their image. The side of
            a box is the square root of its area.
        megapixels: median of width times height of the images as they are stored, in millions of pixels.
    """

    num_images: int
    num_objects: int
    num_classes: int
    min_per_class: int
    max_per_class: int
    max_objects: int
    object_side: float
    megapixels: float


def summarize(dataset: Any) -> DataSummary:
    """Statistics of a data set in the schema of `hf_detr.data`, from its annotations, without crowds; no image is
    opened."""
    objects = [learned_objects(of_image) for of_image in dataset["objects"]]
    counts = [len(of_image["bbox"]) for of_image in objects]
    pixels = np.array(dataset["width"][:]) * np.array(dataset["height"][:])
    sides = [
        math.sqrt(width * height) / min(image_width, image_height)
        for of_image, image_width, image_height in zip(objects, dataset["width"], dataset["height"], strict=True)
        for _, _, width, height in of_image["bbox"]
    ]
    of_classes = Counter(label for of_image in objects for label in of_image["category"])
    return DataSummary(
        num_images=len(counts),
        num_objects=sum(counts),
        num_classes=len(of_classes),
        min_per_class=min(of_classes.values(), default=0),
        max_per_class=max(of_classes.values(), default=0),
        max_objects=max(counts, default=0),
        object_side=float(np.quantile(sides, 0.25)) if sides else 1.0,
        megapixels=float(np.median(pixels)) / 1e6 if len(pixels) else 0.0,
    )


@dataclass(frozen=True)
class Choice:
    value: Any
    reason: str


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters with reasons, see [`choose_recipe`].

    Args:
        name: one of `RECIPES`, but not `"auto"`.
        why: one line on why this recipe was chosen, and for which data.
        model: fields of [`DetrConfig`]; of a checkpoint only `num_queries`, where it has too few, and those of a new
            mask head.
        training: `epochs`, `batch_size` (images per process and batch), `learning_rate`, `backbone_learning_rate`,
            `weight_decay`, `schedule` (`"wsd"`: warm-up, stable, decay to 0; `"step"`: a tenth after two thirds),
            `warmup` and `decay` (fractions of all steps), `ema` (decay of averaged weights, 0 for none),
            `augmentation`, `mosaic` and `copy_paste` (probabilities of an image to be mixed with others, see
            `hf_detr.data.mixing`), `color_jitter` (probability), `eval_every` (epochs).
    """

    name: str
    why: str
    model: dict[str, Choice]
    training: dict[str, Choice]

    def values(self, part: Literal["model", "training"], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The values of one part, updated with `overrides`, which may have further names."""
        return {name: choice.value for name, choice in getattr(self, part).items()} | dict(overrides)

    def describe(self, overrides: Mapping[str, Any]) -> str:
        """A table to print: every value and its reason, with those in `overrides` marked as yours."""
        lines = [f"Recipe {self.name}: {self.why}"]
        choices = self.model | self.training
        for name, choice in choices.items():
            if name in overrides and overrides[name] != choice.value:
                lines.append(f"  {name:24}{overrides[name]!s:14} yours; the recipe has {choice.value}")
            else:
                lines.append(f"  {name:24}{choice.value!s:14} {choice.reason}")
        lines += [f"  {name:24}{value!s:14} yours" for name, value in overrides.items() if name not in choices]
        return "\n".join(lines)


def choose_recipe(
    name: str,
    data: DataSummary,
    start: Start,
    image_size: tuple[int, int],
    *,
    strides: Sequence[int] = STRIDES,
    upright: bool = True,
    num_queries: int | None = None,
    num_patterns: int = 1,
    query_type: str = "learned",
    feature_stride: int | None = None,
    d_model: int | None = None,
    query_proposals: bool = True,
    decoder_layers: int | None = None,
    new_masks: bool = False,
    freeze_detector: bool = False,
    unmixable: str | None = None,
    in_color: bool = True,
) -> Recipe:
    """The recipe of this name for this data set and starting point.

    `"auto"` is `"finetune"` from a checkpoint and `"small-data"` otherwise, for data sets of any size: what makes
    training converge on few images also makes it converge faster on many. `"paper"` reproduces the paper with the 300
    epochs of its ablations, `"paper-500"` with the 500 epochs of its best models.

    Args:
        start: `"checkpoint"`: a trained detector; `"backbone"`: a pretrained backbone, everything else random;
            `"scratch"`: everything random.
        image_size: shortest and longest side of the images after the resize, in pixels.
        strides: of the feature levels of the backbone, in pixels.
        upright: whether the images have an up and a down, as photographs do.
        num_queries: of the checkpoint; images with more objects get more queries.
        num_patterns, query_type: of the checkpoint; see `DetrConfig`.
        feature_stride: of the checkpoint, or of a new model if it was given, in pixels.
        d_model: of a new model, if it was given; a wide transformer on a pretrained backbone gets the paper's rates.
        query_proposals: of a new model, if it was given; queries that are no proposals get more decoder layers.
        decoder_layers: of a new model, if it was given; several layers always have denoising.
        new_masks: whether a mask head is trained from random weights. The paper's recipes have no values for mask
            heads.
        freeze_detector: whether only the mask head is trained.
        unmixable: why images cannot be mixed with others, if so.
        in_color: whether images are RGB.

    Raises:
        ValueError: there is no such recipe, or it does not fit the starting point.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}. Choose one of {', '.join(RECIPES)}.")
    if name == "finetune" and start != "checkpoint":
        raise ValueError(
            "The recipe finetune needs a trained detector. Name one with --model, or use --recipe small-data."
        )
    if name in ("small-data", "paper", "paper-500") and start == "checkpoint":
        raise ValueError(
            f"The recipe {name} builds a new model, but --model names a trained one. Use --recipe finetune."
        )
    size = f"{data.num_images:,} images with {data.num_objects:,} objects of {data.num_classes} classes"
    if name in ("paper", "paper-500"):
        training = _paper_training(500 if name == "paper-500" else 300)
        return Recipe(name, f"requested; {size}", _random_backbone() if start == "scratch" else {}, training)
    chosen = "chosen by auto" if name == "auto" else "requested"
    begins = {
        "checkpoint": "from a trained detector",
        "backbone": "from a pretrained backbone, everything else is random",
        "scratch": "all weights are random",
    }[start]
    if start == "checkpoint":
        model = _more_queries(data, num_queries, num_patterns)
    else:
        model = _model(data, start, image_size, strides, query_proposals, decoder_layers)
    if new_masks:
        model["mask_attention_gain"] = Choice(256, "masks depend on their query from the first step")
    if new_masks and not freeze_detector:
        why = "the mask head is new, and has one loss; boxes have one after every decoder layer and more"
        model |= {"mask_loss_coefficient": Choice(5, why), "dice_loss_coefficient": Choice(5, why)}
    name = "finetune" if start == "checkpoint" else "small-data"
    small = has_small_transformer(data, start) and (d_model or SMALL_WIDTH) <= SMALL_WIDTH
    chosen_stride = model["feature_stride"].value if "feature_stride" in model else max(STRIDES)
    stride = feature_stride or chosen_stride
    training = _training(data, start, image_size, stride, upright, small)
    if start == "checkpoint" and query_type in FAST_DECODERS:
        epochs = _epochs(data, IMAGES_SEEN[start] // 2)
        why = f"{epochs.reason}; half of a DETR's, as a {FAST_DECODERS[query_type]} learns sooner"
        training |= {"epochs": Choice(epochs.value, why), "eval_every": _evaluations(epochs.value)}
    training |= _variety(data, start, unmixable, in_color)
    if new_masks and freeze_detector:
        training["learning_rate"] = Choice(1e-3, "the mask head is random, and nothing else trains")
    return Recipe(name, f"{chosen}; {size}, {begins}", model, training)


def _random_backbone() -> dict[str, Choice]:
    return {
        "freeze_batch_norm": Choice(False, "a random backbone has no statistics to preserve"),
        "frozen_stages": Choice(-1, "all stages of a random backbone have to be trained"),
    }


def _more_queries(data: DataSummary, num_queries: int | None, num_patterns: int) -> dict[str, Choice]:
    """More queries for a checkpoint that has fewer, each with all patterns, than an image has objects."""
    if num_queries is None or data.max_objects <= num_queries * num_patterns:
        return {}
    wanted = math.ceil(min(MAX_QUERIES, 1.25 * data.max_objects) / num_patterns)
    why = f"up to {data.max_objects} objects per image; the {num_queries} of the checkpoint keep their weights"
    return {"num_queries": Choice(wanted, why)} if wanted > num_queries else {}


def _model(
    data: DataSummary,
    start: Start,
    image_size: tuple[int, int],
    strides: Sequence[int],
    query_proposals: bool,
    decoder_layers: int | None,
) -> dict[str, Choice]:
    side = data.object_side * image_size[0]
    stride = choose_stride(side, image_size, strides)
    locations = math.prod(math.ceil(edge / stride) for edge in image_size)
    one_layer = has_small_transformer(data, start) and query_proposals and decoder_layers in (None, 1)
    denoising_groups = max(0 if one_layer else 1, min(3, DENOISING_QUERIES // max(1, data.max_objects)))
    enough = max(10, min(ENOUGH_QUERIES, locations // 2))
    queries = min(300, max(enough, math.ceil(2.5 * data.max_objects)))
    model = {
        "query_type": Choice("anchor", "queries that are boxes attend to the right location from the first step"),
        "relative_boxes": Choice(
            True, "offsets are fractions of the sides of a box, the same at every position and scale"
        ),
        "giou_loss_coefficient": Choice(5, "boxes become precise sooner than with the paper's 2"),
        "query_proposals": Choice(True, "queries start at the most confident locations of the image"),
        "class_cost": Choice(6, "the matching follows the scores, so that one query keeps an object"),
        "dense_loss_coefficient": Choice(
            1, "every location of the feature map is supervised, not only matched queries"
        ),
        "denoising_groups": Choice(
            denoising_groups,
            "noised ground-truth boxes train the decoder before the matching is stable"
            if denoising_groups
            else f"noised boxes of up to {data.max_objects} objects per image take more time than they gain",
        ),
        "class_loss": Choice("iou_aware", "scores reflect the quality of the box"),
        "prior_probability": Choice(0.05, "initial scores are low, as most queries have no object"),
        "num_queries": Choice(
            queries,
            f"2.5 times the maximum number of objects per image ({data.max_objects}); at least {ENOUGH_QUERIES}, or "
            f"half of the {locations} locations",
        ),
        "feature_stride": Choice(
            stride,
            f"a quarter of the objects is smaller than {side:.0f} pixels; at most {MAX_TOKENS:,} locations per image",
        ),
    }
    if start == "scratch":
        model |= _random_backbone()
    if has_small_transformer(data, start):
        model |= {
            "d_model": Choice(SMALL_WIDTH, "a small transformer trains faster from random weights"),
            "encoder_layers": Choice(2, "a third layer takes more time than it gains"),
            "decoder_layers": Choice(1, "proposals need no further layer, and each one takes time")
            if query_proposals
            else Choice(3, "queries that are no proposals find their object layer by layer"),
            "encoder_ffn_dim": Choice(512, "as d_model"),
            "decoder_ffn_dim": Choice(512, "as d_model"),
            "pre_norm": Choice(True, "stable at a high learning rate"),
            "dropout": Choice(0.0, "augmentation is enough regularization at this size"),
        }
    return model


def has_small_transformer(data: DataSummary, start: Start) -> bool:
    """Whether the recipe has a transformer of 128 channels instead of the paper's of 6 + 6 layers of 256."""
    return start == "scratch" or data.num_images < SMALL_DATA


def choose_stride(side: float, image_size: tuple[int, int], strides: Sequence[int] = STRIDES) -> int:
    """The coarsest stride at which an object of `side` pixels still covers one and a half locations, among those whose
    feature map has at most `MAX_TOKENS` locations. Strides below 8 are used only if the backbone has no others."""
    usable = sorted(stride for stride in strides if stride >= min(8, max(strides)))
    affordable = [s for s in usable if math.prod(math.ceil(edge / s) for edge in image_size) <= MAX_TOKENS]
    affordable = affordable or usable[-1:]
    return max((stride for stride in affordable if 1.5 * stride <= side), default=affordable[0])


def _training(
    data: DataSummary, start: Start, image_size: tuple[int, int], stride: int, upright: bool, small_transformer: bool
) -> dict[str, Choice]:
    epochs = _epochs(data, IMAGES_SEEN[start])
    small = image_size[1] <= SMALL_IMAGE
    rates = {
        "checkpoint": (1e-4, 1e-5, "the paper's"),
        "backbone": (1e-4, 1e-5, "the paper's"),
        "scratch": (8e-4, 4.8e-3, "the backbone is random too, and tolerates a higher rate than the transformer"),
    }
    rate, backbone_rate, why = rates[start]
    if start == "backbone" and small_transformer:
        rate, backbone_rate, why = 4e-4, 2e-4, "a small transformer tolerates a high rate"
    if start == "scratch" and not small and not small_transformer:
        rate, backbone_rate, why = 2e-4, 4e-4, "all weights are random, the transformer is wide, and batches are small"
    return {
        "epochs": epochs,
        "batch_size": small_batch(image_size, stride) if small else Choice(4, "the paper's, per process"),
        "learning_rate": Choice(rate, why),
        "backbone_learning_rate": Choice(backbone_rate, why),
        "weight_decay": Choice(1e-4, "the paper's"),
        "schedule": Choice("wsd", "warm-up, stable, then linear decay to 0"),
        "warmup": Choice(0.03, "fraction of all steps in which the rate rises"),
        "decay": Choice(0.35, "fraction of all steps in which it falls"),
        "ema": Choice(EMA_DECAY, "the average of the weights is better than the last weights while the rate is high"),
        "augmentation": _upright_augmentation(start)
        if upright
        else Choice("turns", "the images have no up and no down: all flips and quarter turns"),
        "eval_every": _evaluations(epochs.value),
    }


def _upright_augmentation(start: Start) -> Choice:
    if start == "checkpoint":
        return Choice("paper-rounded", "crops, flips and scales; few sizes, as each costs time on a CPU")
    return Choice("paper-one-size", "crops, flips and scales; one of few sizes per batch, as each size costs time")


def _variety(data: DataSummary, start: Start, unmixable: str | None, in_color: bool) -> dict[str, Choice]:
    """Probabilities of mosaics, pasted objects and other colors, which help where a class has few objects. Pasted
    objects, most of which are of rare classes, also help where classes differ in frequency."""
    per_class = round(data.num_objects / max(1, data.num_classes))
    if unmixable is None and data.megapixels > MIXED_MEGAPIXELS:
        unmixable = f"reading several images of {data.megapixels:.0f} megapixels for one takes long"

    def few(limit: int) -> str | None:
        return f"{per_class} objects per class are few, and vary more with this" if per_class <= limit else None

    rare = None
    if RARE * data.min_per_class < data.max_per_class and data.num_images < SMALL_DATA:
        rare = f"classes have {data.min_per_class:,} to {data.max_per_class:,} objects"

    def choice(probability: float, reason: str | None, obstacle: str | None) -> Choice:
        if start == "checkpoint":
            return Choice(0.0, "not measured with trained detectors")
        if reason is None:
            return Choice(0.0, f"{per_class:,} objects per class are enough")
        return Choice(probability, reason) if obstacle is None else Choice(0.0, obstacle)

    return {
        "mosaic": choice(0.5, few(VERY_FEW_OBJECTS), unmixable),
        "copy_paste": choice(0.7, few(FEW_OBJECTS) or rare, unmixable),
        "color_jitter": choice(0.7, few(VERY_FEW_OBJECTS), None if in_color else "the images are not RGB"),
    }


def _epochs(data: DataSummary, seen: int) -> Choice:
    epochs = min(500, max(30, round(seen / max(data.num_images, 1))))
    return Choice(epochs, f"about {seen:,} images seen, between 30 and 500 epochs")


def _evaluations(epochs: int) -> Choice:
    return Choice(max(1, epochs // 20), "about twenty evaluations")


def small_batch(image_size: tuple[int, int], stride: int) -> Choice:
    """The batch size for small images: 8, 16 or 32, so that a batch has about `BATCH_TOKENS` locations. Smaller batches
    give more optimizer steps per minute, until the fixed cost of a step dominates."""
    locations = math.prod(math.ceil(edge / stride) for edge in image_size)
    size = 2 ** round(math.log2(BATCH_TOKENS / locations))
    return Choice(max(8, min(32, size)), f"small images, with {locations} locations each")


def _paper_training(epochs: int) -> dict[str, Choice]:
    paper = "section A.4"
    high = {300: 200, 500: 400}[epochs]
    return {
        "epochs": Choice(epochs, f"{paper}; 300 for its ablations, 500 for its best models"),
        "batch_size": Choice(4, f"{paper}, per process; it used 16 processes"),
        "learning_rate": Choice(1e-4, paper),
        "backbone_learning_rate": Choice(1e-5, paper),
        "weight_decay": Choice(1e-4, f"{paper}; not on biases, norms and queries here"),
        "schedule": Choice("step", f"{paper}: a tenth after {high} of {epochs} epochs"),
        "warmup": Choice(0.0, paper),
        "decay": Choice(round(1 - high / epochs, 4), paper),
        "ema": Choice(0.0, f"{paper}: no averaged weights"),
        "augmentation": Choice("paper", paper),
        "mosaic": Choice(0.0, paper),
        "copy_paste": Choice(0.0, paper),
        "color_jitter": Choice(0.0, paper),
        "eval_every": Choice(1, "as in its code"),
    }
