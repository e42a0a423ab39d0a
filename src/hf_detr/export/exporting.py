"""Exporting a model to a folder, after comparing the graph with the model."""

import copy
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.processor_size import size_fields
from .export_check import REPLACED_FLOAT16, TOLERANCE, TOLERANCE_FLOAT16, Case, CheckResult, check_cases, compare
from .export_folder import atomic_folder, check_folder, model_source
from .export_processor import fit_processor, pads, working_size
from .exported_model import EXPORT_FILE, ExportedDetr, input_names, load_exported, output_names
from .graph import halve_graph, trace, write_graph
from .masked_backbone import plan_masks
from .quantize import CalibrationImages, quantize_graph
from .runtimes import GRAPH_FILES, check_packages

MIN_OPSET = 18  # the oldest that PyTorch's exporter makes
Evaluate = Callable[[Any], Mapping[str, Any]]


def export_model(
    model: DetrForDetection,
    processor: DetrImageProcessor,
    output_dir: str | Path,
    *,
    graph_format: str = "onnx",
    post_process: bool = False,
    shape: tuple[int, int, int] | None = None,
    opset: int | None = None,
    half: bool = False,
    calibration: str | Path | None = None,
    evaluate: Evaluate | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write `model` as a graph with its configuration and image processor, for any batch size, height and width, or for
    one.

    The graph's outputs are compared with PyTorch's on batches of many shapes, with and without padding; if they differ
    by more than 1e-4, nothing is written. (Queries that are proposals have no order: each is compared with the one that
    it is closest to.)

    The graph takes `pixel_mask` and masks padding before the backbone's convolutions, so that the results of an image
    do not depend on padding. It has no such input, and `padding_exact` is False, where padding cannot be masked
    (squeeze-and-excitation, windowed attention), or where `processor` resizes all images to one size, which makes the
    graph faster. [`load_exported`] then runs images of equal size together.

    Args:
        model: float32. One with masks also gives `pred_masks` and `mask_sizes`.
        output_dir: a new or empty folder, or an earlier export of the same model, which is replaced.
        graph_format: "onnx", "openvino" or "torch".
        post_process: see [`~hf_detr.export.graph.ExportGraph`].
        shape: batch size, height and width, for runtimes that need them fixed. The image processor of the export then
            makes images that fit: with the aspect ratio of the image, and padding, where `padding_exact`; otherwise of
            exactly this height and width.
        opset: version of ONNX's operators; None: that of `torch.onnx.export`.
        half: float16 weights, and of ONNX also computation. The float32 graph is checked as above; the differences of
            the float16 graph are reported, and above 0.05 nothing is written; of proposals, 15 % may be others.
        calibration: a folder of images for quantisation to int8 (weights and activations), with reports but
            no limit.
        evaluate: computes COCO metrics, including "AP"; called with `model` and with the exported model.
        report: called with each message about the progress.

    Returns:
        the contents of `export.json`: `model` (its origin), `format`, `precision`, `opset`, `inputs`, `outputs`,
        `post_processing`, `padding_exact`, `shape` (null: any), `smallest_side` in pixels, `versions`, `check` (of
        float32: `tolerance`, `cases`, `largest_difference`), and if applicable `float16_check`, `int8_check`,
        `calibration`, `evaluation` (`before`, `after`, and `drop` of AP).

    Raises:
        ValueError: an argument is invalid, the backbone cannot be exported, or the comparison failed.
        FileExistsError: the folder contains something else, or the export of another model.
        TimeoutError: another process exports to this folder.
        ImportError: a package is missing; the message names the extra that installs it.
    """
    output_dir = Path(os.path.abspath(output_dir))
    images = _check_request(output_dir, model, processor, graph_format, calibration, shape, opset, half)
    was_training = model.training
    reference = (model if model.device.type == "cpu" else copy.deepcopy(model).cpu()).eval()
    try:
        with atomic_folder(output_dir) as folder:
            check_folder(output_dir, model)  # again, now that the folder is locked
            cases = check_cases(model.model.backbone.strides[-1], working_size(processor), shape)
            job = _Job(folder, reference, cases, report, shape, opset)
            model.config.to_json_file(folder / "config.json", use_diff=True)
            export = {"model": model_source(model)} | job.make_float32(graph_format, post_process, pads(processor))
            if shape is not None:
                processor = fit_processor(processor, shape, export["padding_exact"])
                report(f"The image processor of the export resizes to {size_fields(processor.size)}.")
            processor.to_json_file(folder / "preprocessor_config.json")
            if half:
                export |= job.make_half(export)
            if images is not None:
                images.fit(processor, shape)
                export |= job.make_int8(export, images)
            if evaluate is not None:
                export["evaluation"] = job.evaluate(export, evaluate)
            export["versions"] = _versions(graph_format, images is not None)
            _write_json(folder / EXPORT_FILE, export)
    finally:
        model.train(was_training)
    return export


@dataclass(frozen=True)
class _Job:
    """An export to `folder` of `model`, compared on `cases`."""

    folder: Path
    model: DetrForDetection
    cases: list[Case]
    report: Callable[[str], None]
    shape: tuple[int, int, int] | None
    opset: int | None

    def make_float32(self, graph_format: str, post_process: bool, padded: bool) -> dict[str, Any]:
        """Write the graph, with padding masked if batches are padded and if possible."""
        name = self.model.model.backbone.name
        options = [True, False]
        if not padded:
            self.report("All images have one size after the resize, so the graph takes no pixel_mask.")
            options = [False]
        elif plan_masks(self.model.model.backbone, self.model.config.num_channels) is None:
            self.report(f'Padding cannot be masked for the backbone "{name}".')
            options = [False]
        for mask_padding in options:
            try:
                export, result = self._make(graph_format, post_process, mask_padding)
            except (OSError, ImportError):
                raise
            except Exception as error:  # exporters and runtimes raise their own types
                reason = f"{type(error).__name__}: {str(error).strip()}"
                if mask_padding:
                    self.report(f'The graph with masked padding failed for "{name}" ({reason.splitlines()[0][:200]}).')
                    continue
                raise ValueError(f'"{name}" cannot be exported as {graph_format}. {reason}') from error
            self.report(f"{graph_format}, float32 against PyTorch: {result.summary()}.")
            if result.passes():
                break
            if not mask_padding or result.unpadded > TOLERANCE:
                raise ValueError(
                    f"The results of the exported graph differ from PyTorch's: {result.summary()}; the tolerance is "
                    f"{TOLERANCE:.0e}. Nothing was written. {result.worst()}"
                )
            self.report(f'Padding changes the results of "{name}" in spite of masks. Exporting a graph without masks.')
        if padded and not export["padding_exact"]:
            self.report(
                "padding_exact: false. Results of the graph for an image depend on its padding. load_exported runs "
                "images of equal size together; other users of the graph have to do the same."
            )
        return export | {"check": result.record(TOLERANCE)}

    def _make(self, graph_format: str, post_process: bool, mask_padding: bool) -> tuple[dict[str, Any], CheckResult]:
        """Write one graph, and compare it with the model."""
        program = trace(self.model, mask_padding=mask_padding, post_process=post_process, shape=self.shape)
        fixed = self.shape is not None
        inputs = input_names(post_process, mask_padding)
        outputs = output_names(post_process, self.model.has_masks)
        write_graph(program, graph_format, inputs, outputs, self.folder, fixed=fixed, opset=self.opset)
        export: dict[str, Any] = {
            "format": graph_format,
            "precision": "float32",
            "opset": _opset(self.folder) if graph_format == "onnx" else None,
            "inputs": inputs,
            "outputs": outputs,
            "post_processing": post_process,
            "padding_exact": mask_padding,
            "shape": list(self.shape) if self.shape else None,
            "smallest_side": _smallest_side(program) if graph_format == "torch" and not fixed else 1,
        }
        return export, self.check(export)

    def make_half(self, export: dict[str, Any]) -> dict[str, Any]:
        """Turn the float32 graph in the folder into float16."""
        halve_graph(export["format"], self.folder)
        result = self.check(export, replaced=REPLACED_FLOAT16)
        self.report(f"{export['format']}, float16 against PyTorch, on random images: {result.summary()}.")
        if max(result.unpadded, result.padded) > TOLERANCE_FLOAT16:
            raise ValueError(
                f"In float16 the results differ by more than {TOLERANCE_FLOAT16}: {result.summary()}. Some values of "
                "this model are too large or too small for it. Nothing was written. Export it without float16."
            )
        return {"precision": "float16", "float16_check": result.record(None)}

    def make_int8(self, export: dict[str, Any], images: CalibrationImages) -> dict[str, Any]:
        """Quantise the float32 graph in the folder."""
        quantize_graph(export["format"], self.folder, export["inputs"], images)
        result = self.check(export)
        used, unread = len(images.files) - len(images.unread), len(images.unread)
        self.report(f"{export['format']}, int8 against PyTorch, on random images: {result.summary()}.")
        self.report(f"Calibrated on {used} of {images.found} images; {unread} could not be read.")
        for path, reason in list(images.unread.items())[:10]:
            self.report(f"  not read: {path}: {reason}")
        calibration = {"images": used, "unread": unread, "in_folder": images.found}
        return {"precision": "int8", "int8_check": result.record(None), "calibration": calibration}

    def evaluate(self, export: dict[str, Any], evaluate: Evaluate) -> dict[str, Any]:
        before, after = dict(evaluate(self.model)), dict(evaluate(self.open(export)))
        drop = before["AP"] - after["AP"]
        self.report(f"AP {before['AP']:.4f} in PyTorch, {after['AP']:.4f} exported: a drop of {drop * 100:.2f} points.")
        return {"before": before, "after": after, "drop": drop}

    def check(self, export: dict[str, Any], *, replaced: float = 0.0) -> CheckResult:
        cases = self.cases
        if self.shape is not None and not export["padding_exact"]:  # images of exactly this size
            batch, height, width = self.shape
            cases = [Case(count, height, width, padded=False) for count in (batch, batch + 1)]
        return compare(self.open(export), self.model, cases, replaced=replaced)

    def open(self, export: dict[str, Any]) -> ExportedDetr:
        """Through `load_exported`, so that users get exactly what was compared."""
        _write_json(self.folder / EXPORT_FILE, export)
        return load_exported(self.folder)


# -- before --------------------------------------------------------------------------------------------------------


def _check_request(
    output_dir: Path,
    model: DetrForDetection,
    processor: DetrImageProcessor,
    graph_format: str,
    calibration: str | Path | None,
    shape: tuple[int, int, int] | None,
    opset: int | None,
    half: bool,
) -> CalibrationImages | None:
    """Raise all errors that can be found before anything is computed."""
    if graph_format not in GRAPH_FILES:
        raise ValueError(f'Unknown format "{graph_format}"; use one of {", ".join(GRAPH_FILES)}.')
    check_folder(output_dir, model)
    types = {parameter.dtype for parameter in model.parameters()}
    if types != {torch.float32}:
        raise ValueError(f"Only float32 models can be exported, got {', '.join(map(str, types))}. Call model.float().")
    if calibration is not None and graph_format == "torch":
        raise ValueError('int8 needs the format "onnx" or "openvino".')
    if half and graph_format == "torch":
        raise ValueError('float16 needs the format "onnx" or "openvino".')
    if half and calibration is not None:
        raise ValueError("float16 and int8 exclude each other.")
    if opset is not None and graph_format != "onnx":
        raise ValueError(f'An opset is for the format "onnx", not "{graph_format}".')
    check_packages(graph_format, quantize=calibration is not None)
    newest = importlib.import_module("onnx").defs.onnx_opset_version() if opset is not None else 0
    if opset is not None and not MIN_OPSET <= opset <= newest:
        raise ValueError(f"The opset must be between {MIN_OPSET} and {newest}, got {opset}.")
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ValueError(f"A fixed shape is a batch size, a height and a width of at least 1, got {shape}.")
    if calibration is None:
        return None
    return CalibrationImages(calibration, processor)


# -- after ---------------------------------------------------------------------------------------------------------


def _opset(folder: Path) -> int:
    onnx = importlib.import_module("onnx")
    graph = onnx.load(folder / GRAPH_FILES["onnx"], load_external_data=False)
    return next(int(entry.version) for entry in graph.opset_import if not entry.domain)


def _smallest_side(program: torch.export.ExportedProgram) -> int:
    return max((int(bounds.lower) for bounds in program.range_constraints.values()), default=1)


def _versions(graph_format: str, quantized: bool) -> dict[str, str]:
    packages = {"hf_detr", "torch", "transformers", "timm", *check_packages(graph_format, quantized)}
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # imported from a source folder
            versions[package] = "unknown"
    return versions


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
