"""A model to a folder that other runtimes read, checked before it is written."""

import copy
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..runtime.files import PARTIAL, hold_lock
from .export_check import TOLERANCE, Case, CheckResult, check_cases, compare
from .exported_model import EXPORT_FILE, ExportedDetr, input_names, is_exported, load_exported, output_names
from .graph import trace, write_graph
from .masked_backbone import plan_masks
from .quantize import CalibrationImages, quantize_graph
from .runtimes import GRAPH_FILES, check_packages

Evaluate = Callable[[Any], Mapping[str, Any]]


def export_model(
    model: DetrForDetection,
    processor: DetrImageProcessor,
    output_dir: str | Path,
    *,
    graph_format: str = "onnx",
    post_process: bool = False,
    calibration: str | Path | None = None,
    evaluate: Evaluate | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write `model` as a graph for any batch, height and width, with its configuration and processor.

    First its outputs are compared with those of PyTorch, on batches of many shapes with and without padding; if they
    differ by more than 1e-4, nothing is written. The graph hides padding from the convolutions, so that an image gives
    the same result alone and in a padded batch. For some backbones (squeeze-and-excitation, windows) that is not known
    how; then `padding_exact` is False, and what [`load_exported`] gives runs images of equal size together instead.

    Args:
        model: float32.
        output_dir: a new or empty folder, or an earlier export of the same model, which is replaced.
        graph_format: "onnx", "openvino" or "torch".
        post_process: see [`~hf_detr.export.graph.ExportGraph`].
        calibration: a folder of images; weights and activations become int8. The float32 graph is checked as said,
            and the differences of int8 are reported.
        evaluate: a model, ours or exported, to COCO's numbers; called for both.
        report: gets sentences about what was found.

    Returns:
        what stands in `export.json`, beside the graph: `model` (where it came from), `format`, `precision`, `opset`,
        `inputs`, `outputs`, `post_processing`, `padding_exact`, `smallest_side` in pixels, `versions`, `check` (of
        float32: `tolerance`, `cases`, `largest_difference`), and where there is something to say `int8_check`,
        `calibration`, `evaluation` (`before`, `after`, and `drop` of AP).

    Raises:
        ValueError: something given does not fit, the backbone cannot be exported, or the check failed.
        FileExistsError: the folder has something else in it, or the export of another model.
        TimeoutError: another process exports to this folder.
        ImportError: a package is missing; the extra that has it is named.
    """
    output_dir = Path(os.path.abspath(output_dir))
    images = _check_request(output_dir, model, processor, graph_format, calibration)
    was_training = model.training
    reference = (model if model.device.type == "cpu" else copy.deepcopy(model).cpu()).eval()
    try:
        with _whole_folder(output_dir) as folder:
            _check_folder(output_dir, model)  # now that no other export can put one there
            job = _Job(folder, reference, check_cases(model.model.backbone.stride, _working_size(processor)), report)
            model.config.to_json_file(folder / "config.json", use_diff=True)
            processor.to_json_file(folder / "preprocessor_config.json")
            export = {"model": _source(model)} | job.make_float32(graph_format, post_process)
            if images is not None:
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
    """What an export works with: the folder to fill, the model to compare with, on what, and who hears of it."""

    folder: Path
    model: DetrForDetection
    cases: list[Case]
    report: Callable[[str], None]

    def make_float32(self, graph_format: str, post_process: bool) -> dict[str, Any]:
        """Write the graph; the way that hides padding first, if there is one."""
        name = self.model.model.backbone.name
        ways = [True, False]
        if plan_masks(self.model.model.backbone, self.model.config.num_channels) is None:
            self.report(f'It is not known how to hide padding from "{name}".')
            ways = [False]
        for hide_padding in ways:
            try:
                export, result = self._make(graph_format, post_process, hide_padding)
            except (OSError, ImportError):
                raise
            except Exception as error:  # exporters and runtimes have their own
                reason = f"{type(error).__name__}: {str(error).strip()}"
                if hide_padding:
                    self.report(f'A graph that hides padding fails with "{name}" ({reason.splitlines()[0][:200]}).')
                    continue
                raise ValueError(f'"{name}" cannot be exported as {graph_format}. {reason}') from error
            self.report(f"{graph_format}, float32 against PyTorch: {result.summary()}.")
            if result.passes():
                break
            if not hide_padding or result.unpadded > TOLERANCE:
                raise ValueError(
                    f"The exported graph gives other results than PyTorch: {result.summary()}, and {TOLERANCE:.0e} is "
                    f"allowed. Nothing was written. {result.worst()}"
                )
            self.report(f'Padding changes what "{name}" gives. Another graph, which does not hide it, is made instead.')
        if not export["padding_exact"]:
            self.report(
                "padding_exact: false. In a padded batch the graph gives an image another result than alone. "
                "load_exported runs images of equal size together instead; other users of the graph have to as well."
            )
        return export | {"check": result.record(TOLERANCE)}

    def _make(self, graph_format: str, post_process: bool, hide_padding: bool) -> tuple[dict[str, Any], CheckResult]:
        """Write one graph, and compare it with the model."""
        program = trace(self.model, hide_padding=hide_padding, post_process=post_process)
        write_graph(program, graph_format, post_process, self.folder)
        export: dict[str, Any] = {
            "format": graph_format,
            "precision": "float32",
            "opset": _opset(self.folder) if graph_format == "onnx" else None,
            "inputs": input_names(post_process),
            "outputs": output_names(post_process),
            "post_processing": post_process,
            "padding_exact": hide_padding,
            "smallest_side": _smallest_side(program) if graph_format == "torch" else 1,
        }
        return export, self.check(export)

    def make_int8(self, export: dict[str, Any], images: CalibrationImages) -> dict[str, Any]:
        """Quantise the graph that is there."""
        quantize_graph(export["format"], self.folder, export["inputs"], images)
        result = self.check(export)
        used, unread = len(images.files) - len(images.unread), len(images.unread)
        self.report(f"{export['format']}, int8 against PyTorch, on noise: {result.summary()}.")
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

    def check(self, export: dict[str, Any]) -> CheckResult:
        return compare(self.open(export), self.model, self.cases)

    def open(self, export: dict[str, Any]) -> ExportedDetr:
        """As its users will: what is checked is what they get."""
        _write_json(self.folder / EXPORT_FILE, export)
        return load_exported(self.folder)


# -- before --------------------------------------------------------------------------------------------------------


def _check_request(
    output_dir: Path,
    model: DetrForDetection,
    processor: DetrImageProcessor,
    graph_format: str,
    calibration: str | Path | None,
) -> CalibrationImages | None:
    """Everything that can be wrong before anything is computed."""
    if graph_format not in GRAPH_FILES:
        raise ValueError(f'There is no format "{graph_format}"; there are {", ".join(GRAPH_FILES)}.')
    _check_folder(output_dir, model)
    types = {parameter.dtype for parameter in model.parameters()}
    if types != {torch.float32}:
        raise ValueError(f"Only float32 models are exported, got {', '.join(map(str, types))}. Call model.float().")
    if calibration is not None and graph_format == "torch":
        raise ValueError('int8 is for the formats "onnx" and "openvino".')
    check_packages(graph_format, quantize=calibration is not None)
    if calibration is None:
        return None
    return CalibrationImages(calibration, processor)


def _check_folder(output_dir: Path, model: DetrForDetection) -> None:
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise FileExistsError(f"{output_dir} is a file; an export is a folder.")
    if not any(output_dir.iterdir()):
        return
    if not is_exported(output_dir):
        raise FileExistsError(f"{output_dir} is neither empty nor an export. Nothing was written.")
    earlier = json.loads((output_dir / EXPORT_FILE).read_text(encoding="utf-8")).get("model")
    if earlier != _source(model):
        raise FileExistsError(
            f"{output_dir} is the export of another model ({earlier or 'made in Python'}). Nothing was written. Name "
            "another folder."
        )


def _source(model: DetrForDetection) -> str:
    """Where the model came from: a folder or a name on the Hub; empty if it was made here."""
    name = model.config.name_or_path
    return os.path.realpath(name) if name and os.path.isdir(name) else name


def _working_size(processor: DetrImageProcessor) -> tuple[int, int]:
    """(height, width) that the processor makes of a photo of 3:4."""
    photo = torch.zeros(3, 480, 640, dtype=torch.uint8)
    values: Tensor = processor(photo, return_tensors="pt")["pixel_values"]
    return values.shape[2], values.shape[3]


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
        except PackageNotFoundError:  # used from a folder, without being installed
            versions[package] = "unknown"
    return versions


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, put in the place of `target` when nothing went wrong, and removed if something did. If only the
    last step fails, it is kept, and the error says where. What a kill left behind is put right by the next export."""
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old, lock = (target.with_name(f".{target.name}{ending}") for ending in (PARTIAL, ".old", ".lock"))
    with hold_lock(lock, seconds=1):
        try:
            if old.exists() and not target.exists():  # killed between the last two steps
                old.rename(target)
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _put_in_place(partial, target, old)
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                lock.unlink()


def _put_in_place(partial: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        kept = partial.rename(target.with_name(f"{target.name}-{uuid4().hex[:8]}"))
        raise OSError(f"The export is whole, but cannot be put at {target} ({error}). It is in {kept}.") from error
    shutil.rmtree(old, ignore_errors=True)
