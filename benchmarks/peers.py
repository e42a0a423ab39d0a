"""The detectors that convergence.py compares ours with.

`PEERS` are trained by the loop of convergence.py. Each is built from our model of the run, and then it is called as
models of transformers are: `model(pixel_values, pixel_mask, labels)` has `loss`, and without labels `logits` and
`pred_boxes`. `train_yolo` leaves training to ultralytics.

- `detr`, `dab`: transformers' DETR and DAB-DETR, with the sizes and the backbone of ours.
- `dfine`: transformers' D-FINE of size N, `rtdetr`: its RT-DETR with a ResNet-18, as published, from random weights.
  Their batch norms train. They have no mask of the padding: their boxes are relative to the padded image.
- `fcos`: torchvision's FCOS with a narrow pyramid over the backbone of ours.
"""

import contextlib
import copy
import functools
import importlib
import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import transformers
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2.functional import to_pil_image
from transformers.utils import ModelOutput

from hf_detr import DetrForDetection
from hf_detr.evaluation import CocoEvaluator

Fields = dict[str, Any]
Labels = list[dict[str, Tensor]]


class Recipe(Protocol):
    """What a peer is built from: fields of its config, and whether initial weights are as in the paper's code."""

    @property
    def fields(self) -> Fields: ...
    @property
    def paper_start(self) -> bool: ...


class SigmoidProcessor:
    """Of models without a class "no object": every pair of query and class has a score, and the best ones count, as in
    transformers' own post-processing of such models."""

    def __init__(self, detections: int = 100) -> None:
        self.detections = detections

    def post_process_object_detection(
        self, outputs: Any, threshold: float, target_sizes: Tensor, top_k: int | None = None
    ) -> list[dict[str, Tensor]]:
        classes = outputs.logits.shape[-1]
        pairs = outputs.logits.sigmoid().flatten(1)  # (B, queries * classes)
        scores, best = pairs.topk(min(top_k or self.detections, pairs.shape[1]), dim=1)
        labels = best % classes
        height, width = target_sizes.unbind(1)
        scale = torch.stack((width, height, width, height), dim=1)[:, None]
        every = box_convert(outputs.pred_boxes, "cxcywh", "xyxy").clamp(0, 1) * scale
        boxes = every.gather(1, (best // classes)[..., None].expand(-1, -1, 4))
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]


# -- DETR and DAB-DETR -------------------------------------------------------------------------------------------------


def build_detr(ours: DetrForDetection, recipe: Recipe, weights: Path | None, kind: str) -> nn.Module:
    """DETR or DAB-DETR with the sizes and the backbone of ours, its weights included."""
    config = ours.config
    network = {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "num_channels": config.num_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [ours.model.backbone._timm_kwargs["out_indices"][-1]],
    }
    shared = (
        "num_queries", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "decoder_layers",
        "decoder_ffn_dim", "decoder_attention_heads", "id2label", "label2id",
    )  # fmt: skip
    sizes = {name: getattr(config, name) for name in shared}
    their_config = getattr(transformers, f"{kind}Config")(
        backbone_config=network, hidden_size=config.d_model, attn_implementation="eager", **sizes | recipe.fields
    )
    theirs: Any = getattr(transformers, f"{kind}ForObjectDetection")(their_config)
    if recipe.paper_start:
        start_as_in_paper(theirs, kind)
    backbone = theirs.model.backbone.model if kind == "Detr" else theirs.model.backbone.conv_encoder.model
    backbone = getattr(backbone, "_backbone", backbone)
    unfreeze_batch_norm(backbone)
    backbone.load_state_dict(ours.model.backbone.model.state_dict())
    theirs.requires_grad_(True)
    theirs.loss_function = in_float32(theirs.loss_function)
    built: nn.Module = theirs
    return built


def unfreeze_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            setattr(module, name, nn.BatchNorm2d(child.get_buffer("weight").numel()))
        else:
            unfreeze_batch_norm(child)


@torch.no_grad()
def start_as_in_paper(model: Any, kind: str) -> None:
    """Initial weights as in the code of both papers: PyTorch's own, Xavier in the transformer, queries from N(0, 1).

    What DAB-DETR sets itself stays: the last layer of the boxes is zero, the classes start at their prior.
    """
    kept = {} if kind == "Detr" else {"class_embed.bias": model.class_embed.bias.clone()}
    for name, module in model.named_modules():
        if ".backbone." not in name and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for part in (model.model.encoder, model.model.decoder):
        for name, parameter in part.named_parameters():
            if parameter.dim() > 1 and "bbox_embed" not in name:
                nn.init.xavier_uniform_(parameter)
    if kind == "Detr":
        for name, parameter in model.model.named_parameters():
            if "attn" in name and name.endswith("bias"):  # nn.MultiheadAttention starts them at 0
                parameter.zero_()
    else:
        model.bbox_predictor.layers[-1].weight.zero_()
        model.bbox_predictor.layers[-1].bias.zero_()
    for name, value in kept.items():
        model.get_parameter(name).copy_(value)


def in_float32(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' loss in float32 whatever the model computes in."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return loss_function(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs)

    return wrapped


# -- D-FINE and RT-DETR ------------------------------------------------------------------------------------------------

# configs/dfine/dfine_hgnetv2_n_coco.yml of github.com/Peterande/D-FINE under transformers' names
DFINE_N: Fields = {
    "backbone_config": {
        "model_type": "hgnet_v2",
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 64, 256, 512],
        "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024],
        "hidden_sizes": [64, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "use_learnable_affine_block": True,
        "out_indices": [3, 4],
    },
    "encoder_in_channels": [512, 1024],
    "feat_strides": [16, 32],
    "num_feature_levels": 2,
    "encode_proj_layers": [1],
    "encoder_hidden_dim": 128,
    "encoder_ffn_dim": 512,
    "hidden_expansion": 0.34,
    "depth_mult": 0.5,
    "d_model": 128,
    "decoder_in_channels": [128, 128],
    "decoder_ffn_dim": 512,
    "decoder_layers": 3,
    "decoder_n_points": [6, 6],
}
# configs/rtdetr/rtdetr_r18vd_6x_coco.yml of github.com/lyuwenyu/RT-DETR under transformers' names
RTDETR_R18: Fields = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "layer_type": "basic",
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "out_indices": [2, 3, 4],
    },
    "encoder_in_channels": [128, 256, 512],
    "hidden_expansion": 0.5,
    "decoder_layers": 3,
}


def build_real_time(ours: DetrForDetection, recipe: Recipe, weights: Path | None, kind: str) -> nn.Module:
    """D-FINE or RT-DETR as published, with the classes of ours and random weights, the backbone's too."""
    labels = {"id2label": ours.config.id2label, "label2id": ours.config.label2id}
    published = {"DFine": DFINE_N, "RTDetr": RTDETR_R18}[kind]
    config = getattr(transformers, f"{kind}Config")(
        **copy.deepcopy(published) | {"freeze_backbone_batch_norms": False} | recipe.fields | labels
    )
    model: nn.Module = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return PaddedImages(model.requires_grad_(True))


class PaddedImages(nn.Module):
    """D-FINE or RT-DETR, whose boxes are relative to the padded image, for batches in which they are relative to the
    image.

    They need sides that are a multiple of 32, and as many locations as queries; small images have fewer queries.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        self.queries: Any = self.config.num_queries

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, labels: Labels | None = None) -> Any:
        height, width = pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, -width % 32, 0, -height % 32))
        locations = sum(padded[0, 0, ::stride, ::stride].numel() for stride in self.config.feat_strides)
        self.config.num_queries = min(self.queries, locations)
        heights, widths = image_sizes(pixel_mask)
        share = torch.stack((widths / padded.shape[-1], heights / padded.shape[-2]), dim=1).repeat(1, 2)  # (B, 4)
        if labels is not None:
            labels = [label | {"boxes": label["boxes"] * part} for label, part in zip(labels, share, strict=True)]
            return self.model(pixel_values=padded, labels=[dict(label) for label in labels])
        outputs = self.model(pixel_values=padded)
        return ModelOutput(logits=outputs.logits, pred_boxes=outputs.pred_boxes / share[:, None])


def image_sizes(pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths of the images in a batch without their padding, both (B,)."""
    return pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)


# -- FCOS --------------------------------------------------------------------------------------------------------------

FCOS_CHANNELS = 128  # of the pyramid and the head; torchvision has 256, too much for a CPU
FCOS_DETECTIONS = 300


def build_fcos(ours: DetrForDetection, recipe: Recipe, weights: Path | None) -> nn.Module:
    """FCOS over levels of strides 8, 16 and 32 of the backbone of ours. With ImageNet weights its batch norms are
    frozen, as torchvision's are."""
    name = ours.config.backbone
    network = timm.create_model(name, features_only=True, pretrained=False)
    levels = [index for index, stride in enumerate(network.feature_info.reduction()) if stride in (8, 16, 32)]
    options: Fields = {"pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    network = timm.create_model(name, features_only=True, out_indices=levels, pretrained=bool(weights), **options)
    if weights:
        network = freeze_batch_norm_2d(network)
    return Fcos(Pyramid(network, FCOS_CHANNELS), len(ours.config.id2label), **recipe.fields)


class Pyramid(nn.Module):
    """A timm network with torchvision's feature pyramid, strides 8 to 128."""

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.network, self.out_channels = network, channels
        self.pyramid = FeaturePyramidNetwork(
            network.feature_info.channels(), channels, extra_blocks=LastLevelP6P7(channels, channels)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = self.pyramid(OrderedDict((str(k), x) for k, x in enumerate(self.network(images))))
        return levels


class Fcos(nn.Module):
    """torchvision's FCOS with the interface of transformers' models, on images that are already resized and normalised.

    A detection becomes a query: its class has the logit of its score, all others have score 0.
    """

    def __init__(self, backbone: nn.Module, classes: int, **fields: Any) -> None:
        super().__init__()
        self.classes = classes
        as_they_are: Fields = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}
        # of the published thresholds, 0.2 would cost AP
        kept: Fields = {"score_thresh": 0.001, "detections_per_img": FCOS_DETECTIONS}
        self.detector = FCOS(backbone, classes, **as_they_are | kept | fields)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, labels: Labels | None = None) -> Any:
        heights, widths = image_sizes(pixel_mask)
        images = [x[:, :h, :w] for x, h, w in zip(pixel_values, heights.tolist(), widths.tolist(), strict=True)]
        scales = torch.stack((widths, heights), dim=1).repeat(1, 2)  # (B, 4)
        if labels is None:
            return as_queries(self.detector(images), scales, self.classes)
        targets = [
            {"boxes": box_convert(label["boxes"], "cxcywh", "xyxy") * scale, "labels": label["class_labels"]}
            for label, scale in zip(labels, scales, strict=True)
        ]
        return ModelOutput(loss=torch.stack(list(self.detector(images, targets).values())).sum())


def as_queries(detections: list[dict[str, Tensor]], scales: Tensor, classes: int) -> ModelOutput:
    """`boxes` (N, 4) xyxy in pixels, `labels` and `scores` (N,) of each image as `logits` and `pred_boxes`, which
    `SigmoidProcessor` turns back.

    Args:
        scales: (B, 4), width, height, width, height of each image.
    """
    queries = max(1, *(len(found["scores"]) for found in detections))
    logits = torch.full((len(detections), queries, classes), -1e4)
    boxes = torch.zeros(len(detections), queries, 4)
    for number, (found, scale) in enumerate(zip(detections, scales, strict=True)):
        count = len(found["scores"])
        logits[number, torch.arange(count), found["labels"]] = found["scores"].float().logit(eps=1e-6)
        boxes[number, :count] = box_convert(found["boxes"].float() / scale, "xyxy", "cxcywh")
    return ModelOutput(logits=logits, pred_boxes=boxes)


# -- all that our loop trains ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A side that the loop of convergence.py trains.

    Args:
        build: (our model of the run, recipe, file with the ImageNet weights or None) -> model.
        processor: has `post_process_object_detection`; None: ours.
    """

    build: Callable[[DetrForDetection, Recipe, Path | None], nn.Module]
    processor: Any = None


PEERS: dict[str, Peer] = {
    "detr": Peer(functools.partial(build_detr, kind="Detr")),
    "dab": Peer(functools.partial(build_detr, kind="DabDetr"), SigmoidProcessor()),
    "dfine": Peer(functools.partial(build_real_time, kind="DFine"), SigmoidProcessor(300)),
    "rtdetr": Peer(functools.partial(build_real_time, kind="RTDetr"), SigmoidProcessor(300)),
    "fcos": Peer(build_fcos, SigmoidProcessor(FCOS_DETECTIONS)),
}


# -- YOLO --------------------------------------------------------------------------------------------------------------

# ultralytics' defaults are everything else: batches of 16, its choice of optimizer, its augmentation with mosaics,
# averaged weights.
YOLO_SETTINGS: Fields = {
    "amp": False,  # what its check says on a CPU, without fetching the weights that it checks with
    "cache": True,  # decoded images stay in memory, as ours do
    "deterministic": False,
    "device": "cpu",
    "plots": False,
    "save": False,
    "val": False,
    "verbose": False,
}


@functools.cache
def import_ultralytics() -> tempfile.TemporaryDirectory[str]:
    """Imports ultralytics with settings of its own, offline and silent. Returns the folder of the settings, which is
    there until the process ends.

    Raises:
        ImportError: it is not installed.
    """
    folder = tempfile.TemporaryDirectory(prefix="ultralytics-")
    os.environ |= {
        "YOLO_CONFIG_DIR": folder.name,
        "YOLO_OFFLINE": "true",  # no telemetry, no look for a new version
        "YOLO_AUTOINSTALL": "false",
        "YOLO_VERBOSE": "false",
    }
    settings = Path(folder.name, "Ultralytics")
    settings.mkdir()
    (settings / "Arial.ttf").touch()  # else it fetches the font, for plots that nobody draws
    with own_threads():
        try:
            module = importlib.import_module("ultralytics")
        except ImportError as error:
            raise ImportError("The YOLO variants are trained by ultralytics (AGPL). pip install ultralytics") from error
        loggers = ("clearml", "comet", "dvc", "hub", "mlflow", "neptune", "raytune", "sync", "tensorboard", "wandb")
        module.settings.update({name: False for name in loggers if name in module.settings})
    return folder


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Restores PyTorch's number of threads, which ultralytics sets to one less than there are cores."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_yolo(
    data: Any,
    model: str,
    seed: int,
    minutes: float,
    every: float,
    keep_model: Callable[[nn.Module], None] | None = None,
) -> Iterator[tuple[float, int, float, CocoEvaluator, bool]]:
    """Trains a model of ultralytics from random weights by its own trainer.

    Its `time` is the wall time of its training loop, from which its validation and checkpoints are left out here. It
    keeps its averaged weights each `every` seconds, which are evaluated after training.

    Args:
        data: `Data` of convergence.py.
        model: "yolo26n", say.
        keep_model: gets the trained model, with averaged weights.

    Yields:
        minutes of training, steps of the optimizer, loss, detections, and whether it is the end.
    """
    import_ultralytics()
    from ultralytics.models.yolo.detect import DetectionTrainer

    threads = torch.get_num_threads()
    kept: list[tuple[float, int, float, Fields]] = []
    ends: list[float] = []

    class Trainer(DetectionTrainer):  # type: ignore[misc, valid-type]
        def validate(self) -> tuple[Fields, float]:
            return {}, 0.0

        def final_eval(self) -> None:
            pass

        def save_model(self) -> bool:
            return False

    def elapsed(trainer: Any) -> float:
        return time.time() - float(trainer.train_time_start)

    def keep(trainer: Any, when: float) -> None:
        weights = {name: value.clone() for name, value in trainer.ema.ema.state_dict().items()}
        kept.append((when / 60, trainer.ema.updates, trainer.loss.item() / trainer.batch_size, weights))

    def start(trainer: Any) -> None:
        torch.set_num_threads(threads)
        batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
        trainer.train_loader.reset()
        trial = copy.deepcopy(trainer.model).train()  # what PyTorch prepares at the first step belongs to nobody
        trial(batch)[0].sum().backward()
        trainer.train_time_start = trainer.epoch_time_start = time.time()

    def after_batch(trainer: Any) -> None:
        when = elapsed(trainer)
        if when >= (kept[-1][0] * 60 if kept else 0.0) + every and when < minutes * 60:
            started = time.time()
            keep(trainer, when)
            trainer.train_time_start += time.time() - started

    with tempfile.TemporaryDirectory(prefix="yolo-") as folder, own_threads():
        overrides = YOLO_SETTINGS | {
            "model": f"{model}.yaml",
            "data": str(write_yolo_dataset(data, Path(folder))),
            "imgsz": max(data.size.values()),
            "time": minutes / 60,
            "seed": seed,
            "project": folder,
        }
        trainer = Trainer(overrides=overrides)
        trainer.add_callback("on_train_start", start)
        trainer.add_callback("on_train_batch_end", after_batch)
        trainer.add_callback("on_train_epoch_end", lambda t: ends.append(elapsed(t)))
        trainer.train()
        keep(trainer, ends[-1])
    for number, (when, step, loss, weights) in enumerate(kept, start=1):
        trainer.ema.ema.load_state_dict(weights)
        yield when, step, loss, evaluate_yolo(trainer.ema.ema, data), number == len(kept)
    if keep_model is not None:
        keep_model(trainer.ema.ema)


def yolo_version() -> str:
    import_ultralytics()
    return str(importlib.import_module("ultralytics").__version__)


def yolo_parameters(model: str, classes: int) -> int:
    import_ultralytics()
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return sum(p.numel() for p in tasks.DetectionModel(f"{model}.yaml", nc=classes, verbose=False).parameters())


def write_yolo_dataset(data: Any, folder: Path) -> Path:
    """The training images in ultralytics' format; its validation, which does not run, has the same ones."""
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number, row in enumerate(data.train_rows):
        image = row["image"] if not isinstance(row["image"], Tensor) else to_pil_image(row["image"])
        image.convert("RGB").save(folder / "images" / f"{number:06}.png", compress_level=1)
        (folder / "labels" / f"{number:06}.txt").write_text(yolo_labels(row["objects"], *image.size))
    file = folder / "data.yaml"
    described = {"path": str(folder), "train": "images", "val": "images", "names": data.names}
    file.write_text(json.dumps(described))  # JSON is YAML
    return file


def yolo_labels(objects: Fields, width: int, height: int) -> str:
    """A line for each object: class, center x, center y, width, height, relative to the image."""
    lines = []
    for category, box, crowd in zip(objects["category"], objects["bbox"], objects["iscrowd"], strict=True):
        if not crowd:
            x, y, w, h = (float(value) for value in box)
            places = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join([str(int(category)), *(f"{place:.6f}" for place in places)]))
    return "\n".join(lines)


def evaluate_yolo(model: nn.Module, data: Any) -> CocoEvaluator:
    """The detections on the validation images by ultralytics' own prediction, with its non-maximum suppression."""
    from ultralytics.models.yolo.detect import DetectionPredictor

    evaluator = CocoEvaluator(data.val_set)
    with own_threads(), tempfile.TemporaryDirectory(prefix="yolo-") as folder:
        options: Fields = {"conf": 0.001, "imgsz": max(data.size.values()), "project": folder}
        quiet: Fields = {"device": "cpu", "mode": "predict", "save": False, "verbose": False}
        predictor = DetectionPredictor(overrides=options | quiet)
        predictor.setup_model(copy.deepcopy(model).eval(), verbose=False)
        for row in data.val_rows:
            found = predictor(row["image"].convert("RGB"))[0].boxes.data
            evaluator.update([row["image_id"]], [from_yolo(found)])
    return evaluator


def from_yolo(found: Tensor) -> dict[str, Tensor]:
    """Detections of ultralytics, (N, 6): box xyxy in pixels, score, class, as `CocoEvaluator` takes them."""
    return {"boxes": found[:, :4], "scores": found[:, 4], "labels": found[:, 5].long()}
