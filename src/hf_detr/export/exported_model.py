"""Exported models with the interface of the original model. Loading one needs its runtime, but no checkpoint."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import ModelOutput

from ..model.backbone import image_sizes
from ..model.configuration_hf_detr import DetrConfig
from ..model.image_io import check_images
from ..model.mask_encoding import NO_MASK
from ..speed import named_dtype
from .runtimes import GRAPH_FILES, Run, open_graph

EXPORT_FILE = "export.json"


def input_names(post_process: bool, mask_padding: bool) -> list[str]:
    return ["pixel_values", *(["pixel_mask"] if mask_padding else []), *(["target_sizes"] if post_process else [])]


def output_names(post_process: bool, has_masks: bool) -> list[str]:
    of_masks = ["pred_masks", "mask_sizes"] if has_masks else []
    return ["logits", "pred_boxes", *of_masks, *(["scores", "labels", "boxes"] if post_process else [])]


@dataclass
class ExportedOutput(ModelOutput):
    """Outputs of an exported model; None for those that its graph does not have.

    Args:
        logits, pred_boxes, class_probabilities: see [`DetrDetectionOutput`].
        pred_masks, mask_sizes, image_sizes: see [`DetrSegmentationOutput`].
        scores, labels: (B, N), the detections of [`~hf_detr.model.post_processing.best_detections`]: the best class of
            each query, or, of independent scores, the best 100.
        boxes: (B, N, 4), xyxy clipped to the image, in pixels of `target_sizes`, or in [0, 1] without target sizes.
    """

    # only these: transformers' ModelOutput goes through all fields for each that it sets
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    class_probabilities: Tensor | None = None
    pred_masks: Tensor | None = None
    mask_sizes: Tensor | None = None
    image_sizes: Tensor | None = None
    scores: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None


class ExportedDetr:
    """An exported model that is called like [`DetrForDetection`] or [`DetrForSegmentation`], and can replace it in
    pipelines and [`~hf_detr.evaluation.run_evaluators`]. Create it with [`load_exported`].

    It computes on the CPU, and returns outputs on the device of its inputs. It has no loss and no training mode.

    Attributes:
        config: of the model that was exported.
        dtype: of `pixel_values`, always float32; the dtype of computation is an argument of [`load_exported`].
        export: contents of `export.json`.
        training: False.
    """

    training = False
    dtype = torch.float32
    device = torch.device("cpu")
    input_modalities = ("image",)  # used by the repr of pipelines

    def __init__(self, config: DetrConfig, export: dict[str, Any], run: Run, compute_dtype: torch.dtype | None) -> None:
        self.config = config
        self.export = export
        self._run = run
        self._compute_dtype = compute_dtype

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the path of its folder, which another process opens again."""
        return load_exported, (os.path.abspath(self.config.name_or_path), self._compute_dtype)

    def __repr__(self) -> str:
        return f"ExportedDetr({self.config.name_or_path!r}, {self.export['format']}, {self.export['precision']})"

    @property
    def has_masks(self) -> bool:
        return "pred_masks" in self.export["outputs"]

    @property
    def takes_pixel_mask(self) -> bool:
        """Whether `pixel_mask` is an input of the graph, which then takes padded batches."""
        return "pixel_mask" in self.export["inputs"]

    def graph_files(self) -> list[Path]:
        """The files of the graph and its weights."""
        return sorted(Path(self.config.name_or_path).glob("model.*"))

    def can_generate(self) -> bool:
        """False; called by transformers' pipelines."""
        return False

    def to(self, *args: Any, **kwargs: Any) -> "ExportedDetr":
        """Has no effect; called by pipelines."""
        return self

    def eval(self) -> "ExportedDetr":
        """Has no effect."""
        return self

    def train(self, mode: bool = True) -> "ExportedDetr":
        """
        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError("An exported model cannot be trained. Train the original model and export it again.")
        return self

    def __call__(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, target_sizes: Tensor | None = None
    ) -> ExportedOutput:
        """
        Args:
            pixel_values: (B, C, H, W), normalised, padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None if nothing is padded.
            target_sizes: (B, 2), height and width of each image in pixels, for `boxes`; only if the graph includes
                post-processing.

        Raises:
            ValueError: the inputs do not fit the model or each other.
        """
        target_sizes = None if target_sizes is None else torch.as_tensor(target_sizes)  # may be a list of pairs
        self._check(pixel_values, pixel_mask, target_sizes)
        inputs = {"pixel_values": pixel_values.detach().float().cpu()}
        if self.export["post_processing"]:
            if target_sizes is None:
                target_sizes = torch.ones(len(pixel_values), 2)
            inputs["target_sizes"] = target_sizes.long().cpu()
        mask = None if pixel_mask is None else pixel_mask.detach().long().cpu()
        outputs = self._run_masked(inputs, mask) if self.takes_pixel_mask else self._by_size(inputs, mask)
        names = output_names(self.export["post_processing"], self.has_masks)
        found: dict[str, Any] = dict(zip(names, (value.to(pixel_values.device) for value in outputs), strict=True))
        if self.has_masks:
            found["image_sizes"] = (
                torch.tensor([pixel_values.shape[2:]] * len(pixel_values))
                if pixel_mask is None
                else torch.stack((pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)), dim=1)
            )
        if not self.config.has_no_object:
            found["class_probabilities"] = found["logits"].sigmoid()
        return ExportedOutput(**found)

    def _check(self, pixel_values: Tensor, pixel_mask: Tensor | None, target_sizes: Tensor | None) -> None:
        check_images(pixel_values, pixel_mask, self.config.num_channels)
        if target_sizes is not None and not self.export["post_processing"]:
            raise ValueError("`target_sizes` needs an export with post-processing in the graph; this one has none.")
        if target_sizes is not None and target_sizes.shape != (len(pixel_values), 2):
            raise ValueError(
                f"`target_sizes` must be ({len(pixel_values)}, 2), height and width of each image, got "
                f"{tuple(target_sizes.shape)}."
            )
        self._check_size(pixel_values.shape[2], pixel_values.shape[3])

    def _run_masked(self, inputs: dict[str, Tensor], mask: Tensor | None) -> list[Tensor]:
        if mask is None:
            mask = torch.ones(len(inputs["pixel_values"]), *inputs["pixel_values"].shape[2:], dtype=torch.int64)
        return self._run_graph(inputs | {"pixel_mask": mask})

    def _run_graph(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Run the graph; one with a fixed shape in batches of its size, padded to it."""
        if self.export["shape"] is None:
            return self._run(inputs)
        batch, height, width = self.export["shape"]
        count, _, rows, columns = inputs["pixel_values"].shape
        padding = (0, width - columns, 0, height - rows)
        images = [name for name in ("pixel_values", "pixel_mask") if name in inputs]
        inputs = inputs | {name: functional.pad(inputs[name], padding) for name in images}
        parts = []
        for start in range(0, count, batch):
            part = {name: value[start : start + batch] for name, value in inputs.items()}
            missing = batch - len(part["pixel_values"])
            if missing:  # the last image again
                part = {n: torch.cat([v, v[-1:].expand(missing, *v.shape[1:])]) for n, v in part.items()}
            parts.append([value[: batch - missing] for value in self._run(part)])
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _check_size(self, height: int, width: int) -> None:
        if self.export["shape"] is not None:
            _, rows, columns = self.export["shape"]
            smaller = height <= rows and width <= columns and self.takes_pixel_mask
            if not smaller and (height, width) != (rows, columns):
                limit = "up to" if self.takes_pixel_mask else "exactly"
                raise ValueError(
                    f"This export takes images of {limit} {rows} x {columns} pixels, got {height} x {width}. Its own "
                    "image processor, in its folder, resizes to that."
                )
        smallest = self.export["smallest_side"]
        if min(height, width) < smallest:
            raise ValueError(
                f"This export needs images of at least {smallest} pixels on both sides, got {height} x {width}."
            )

    def _by_size(self, inputs: dict[str, Tensor], mask: Tensor | None) -> list[Tensor]:
        """Run images of equal size together and without their padding, which the graph would take for image."""
        if mask is None or mask.numpy().all():  # in numpy: see `_open_openvino`
            return self._run_graph(inputs)
        sizes = image_sizes(mask)
        if sizes is None:
            raise ValueError("This export needs masks that are one rectangle at the top left per image.")
        for size in sizes:
            self._check_size(*size)
        outputs: list[Tensor] = []
        for height, width in dict.fromkeys(sizes):
            indices = [index for index, size in enumerate(sizes) if size == (height, width)]
            part = {name: value[indices] for name, value in inputs.items()}
            part["pixel_values"] = part["pixel_values"][:, :, :height, :width].contiguous()
            found = self._run_graph(part)
            outputs = outputs or [value.new_empty(len(sizes), *value.shape[1:]) for value in found]
            for number, values in enumerate(found):
                if values.ndim == 4:  # masks, whose size is that of the images
                    outputs[number], values = _pad_masks(outputs[number], values)  # noqa: PLW2901
                outputs[number][indices] = values
        return outputs


def _pad_masks(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both (..., h, w), padded at the bottom and the right to the larger height and width."""
    height, width = (max(first.shape[axis], second.shape[axis]) for axis in (-2, -1))
    padded = (
        functional.pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2]), value=NO_MASK)
        for masks in (first, second)
    )
    return next(padded), next(padded)


def is_exported(path: str | Path) -> bool:
    """Whether a folder contains an exported model."""
    return (Path(path) / EXPORT_FILE).is_file()


def load_exported(path: str | Path, dtype: torch.dtype | str | None = None) -> ExportedDetr:
    """Load an exported model, for example for a pipeline:

        detector = pipeline("object-detection", model=load_exported("exports/r50"), image_processor="exports/r50")

    Args:
        path: folder written by `examples/export.py` or [`export_model`].
        dtype: OpenVINO's dtype of computation, `torch.bfloat16` or `torch.float16` if the CPU supports it; other
            formats always compute in the exported precision. None: float32, or int8 if it was quantised.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not an export, is damaged, or cannot compute in this `dtype`.
        ImportError: the runtime is not installed; the message names the extra that installs it.
    """
    folder, dtype = Path(path), named_dtype(dtype)
    export = _read_export(folder)
    config = DetrConfig.from_pretrained(folder)
    config.name_or_path = str(folder)  # pipelines load the image processor from here
    return ExportedDetr(config, export, open_graph(folder, export["format"], dtype), dtype)


def _read_export(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist.")
    advice, again = "Export a checkpoint with examples/export.py.", "Export the model again."
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; pass the folder of the export. {advice}")
    try:
        export: dict[str, Any] = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an exported model: it has no {EXPORT_FILE}. {advice}") from None
    except ValueError as error:
        raise ValueError(f"{folder / EXPORT_FILE} is damaged: {error}") from error
    if not isinstance(export, dict) or export.get("format") not in GRAPH_FILES:
        raise ValueError(f"{folder / EXPORT_FILE} was not written by hf_detr, or by a newer version.")
    needed = {"precision", "inputs", "outputs", "post_processing", "padding_exact", "smallest_side", "shape"}
    missing = needed - export.keys()
    if missing:
        raise ValueError(f"{folder / EXPORT_FILE} is damaged: it has no {', '.join(sorted(missing))}.")
    if ("pixel_mask" in export["inputs"]) != export["padding_exact"]:
        raise ValueError(
            f"{folder / EXPORT_FILE} is of an earlier version or damaged: padding_exact is {export['padding_exact']}, "
            f"and the inputs are {', '.join(export['inputs'])}. {again}"
        )
    files = [GRAPH_FILES[export["format"]], "config.json", *(["model.bin"] if export["format"] == "openvino" else [])]
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: it has no {name}. {again}")
    return export
