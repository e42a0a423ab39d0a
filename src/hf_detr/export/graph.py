"""Tracing a model as one graph for any batch and image size, and writing that graph in each format."""

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.post_processing import best_detections
from ..speed import prepare_for_inference
from .exported_model import input_names
from .masked_backbone import MaskedBackbone, plan_masks
from .runtimes import GRAPH_FILES, check_packages

if TYPE_CHECKING:
    from ..model.modeling_hf_detr import DetrForDetection

MAX_ONE_FILE = 1.5 * 2**30  # bytes of weights in one ONNX file; protobuf is limited to 2 GiB


class ExportGraph(nn.Module):
    """The module that is exported: `pixel_values` in, `logits` and `pred_boxes` out, and of a model with masks
    `pred_masks` (B, Q, h, w) of all queries and `mask_sizes` (B, 2), what of h and w shows the image.

    Args:
        model: in eval mode; modified in place.
        mask_padding: adds the input `pixel_mask`, see [`MaskedBackbone`]; without it, batches must not be padded.
        post_process: adds the input `target_sizes` (B, 2), height and width of each image in pixels, and the outputs
            `scores` (B, Q), `labels` (B, Q) and `boxes` (B, Q, 4), xyxy in pixels and clipped to the image, equal to
            `post_process_detection` without a threshold.

    Raises:
        ValueError: padding cannot be masked for this backbone.
    """

    def __init__(self, model: "DetrForDetection", *, mask_padding: bool, post_process: bool) -> None:
        super().__init__()
        backbone = model.model.backbone
        model.set_attn_implementation("sdpa")
        if mask_padding:
            plan = plan_masks(backbone, model.config.num_channels)
            if plan is None:
                raise ValueError(f'Padding cannot be masked for the backbone "{backbone.name}".')
            model.model.backbone = MaskedBackbone(backbone, plan)  # type: ignore[assignment]
        self.model = model
        self.post_process = post_process

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, target_sizes: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        logits, pred_boxes = outputs.logits, outputs.pred_boxes
        plain = (logits, pred_boxes, *((outputs.pred_masks, outputs.mask_sizes) if self.model.has_masks else ()))
        if not self.post_process or target_sizes is None:
            return plain
        found = best_detections(outputs)
        height, width = target_sizes.to(pred_boxes.dtype).unbind(1)
        scale = torch.stack((width, height, width, height), dim=1)[:, None]
        return *plain, found.scores, found.labels, found.boxes * scale


def trace(
    model: "DetrForDetection", *, mask_padding: bool, post_process: bool, shape: tuple[int, int, int] | None = None
) -> torch.export.ExportedProgram:
    """The graph of a copy of the model, for any batch size, height and width.

    Args:
        shape: the only batch size, height and width, instead of any.

    Raises:
        ValueError: this backbone cannot be traced; the message gives the reason.
    """
    prepared = prepare_for_inference(model, torch.float32).cpu()
    graph = ExportGraph(prepared, mask_padding=mask_padding, post_process=post_process)
    stride = model.model.backbone.strides[-1]
    # sizes that occur nowhere else in the model, so that none is mistaken for one of its constants
    batch, height, width = shape or (2, 4 * stride + 3, 5 * stride + 7)
    inputs = {
        "pixel_values": torch.zeros(batch, model.config.num_channels, height, width),
        "pixel_mask": torch.ones(batch, height, width, dtype=torch.int64),
        "target_sizes": torch.tensor([[height, width]] * batch),
    }
    free = torch.export.Dim.DYNAMIC
    shapes = {
        "pixel_values": {0: free, 2: free, 3: free},
        "pixel_mask": {0: free, 1: free, 2: free},
        "target_sizes": {0: free},
    }
    names = input_names(post_process, mask_padding)
    try:
        with torch.no_grad(), quiet("torch.fx.experimental.symbolic_shapes"):
            return torch.export.export(
                graph,
                (),
                kwargs={name: inputs[name] for name in names},
                dynamic_shapes=None if shape else {name: shapes[name] for name in names},
                strict=False,
            )
    except Exception as error:  # layers raise errors of any kind
        what = f"images of {height} x {width}" if shape else "any image size"
        raise ValueError(
            f'"{model.model.backbone.name}" cannot be exported for {what}: {str(error).strip() or repr(error)}'
        ) from error


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Suppress warnings that have no consequence; the comparison with the model finds real problems."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# -- files ---------------------------------------------------------------------------------------------------------


def write_graph(
    program: torch.export.ExportedProgram,
    graph_format: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    folder: Path,
    *,
    fixed: bool = False,
    opset: int | None = None,
) -> None:
    """Write the graph as `model.onnx`, `model.xml` with `model.bin`, or `model.pt2`.

    Args:
        inputs, outputs: their names.
        fixed: the program was traced for one shape.
        opset: version of ONNX's operators; None: that of `torch.onnx.export`.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
        ValueError: there is no graph of this opset.
    """
    check_packages(graph_format)
    path = folder / GRAPH_FILES[graph_format]
    if graph_format == "torch":
        torch.export.save(program, path)
    elif graph_format == "onnx":
        _write_onnx(program, inputs, outputs, path, fixed, opset)
    else:
        _write_openvino(program, inputs, outputs, path, fixed)


def _write_onnx(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    fixed: bool,
    opset: int | None,
) -> None:
    shapes = {
        "pixel_values": {0: "batch", 2: "height", 3: "width"},
        "pixel_mask": {0: "batch", 1: "height", 2: "width"},
        "target_sizes": {0: "batch"},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # the two inputs share axes on purpose
        written = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=None if fixed else {name: shapes[name] for name in inputs},
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    if written is None:
        raise RuntimeError("torch.onnx.export returned no graph.")
    made = written.model.opset_imports[""]
    if opset is not None and made != opset:
        raise ValueError(f"the graph has opset {made} and cannot be converted to {opset}.")
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    written.save(path, external_data=size > MAX_ONE_FILE)


def _write_openvino(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], path: Path, fixed: bool
) -> None:
    openvino = importlib.import_module("openvino")
    # not through ONNX: in PyTorch's graph attention is one node
    graph = openvino.convert_model(program)
    examples = program.example_inputs[1]
    channels = examples["pixel_values"].shape[1]
    shapes = {"pixel_values": [-1, channels, -1, -1], "pixel_mask": [-1, -1, -1], "target_sizes": [-1, 2]}
    if fixed:
        shapes = {name: list(example.shape) for name, example in examples.items()}
    graph.reshape({name: shapes[name] for name in inputs})
    for output, name in zip(graph.outputs, outputs, strict=True):
        output.get_tensor().set_names({name})
    openvino.save_model(graph, path, compress_to_fp16=False)


def halve_graph(graph_format: str, folder: Path) -> None:
    """Make a float32 graph in a folder one with float16 weights: of ONNX all of it but inputs and outputs, of OpenVINO
    the weights in the file; the type of its computation is chosen when it is loaded.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
    """
    path = folder / GRAPH_FILES[graph_format]
    if graph_format == "openvino":
        openvino = importlib.import_module("openvino")
        with TemporaryDirectory(dir=folder) as temporary:
            openvino.save_model(openvino.Core().read_model(path), Path(temporary, path.name), compress_to_fp16=True)
            for name in (path.name, path.with_suffix(".bin").name):
                Path(temporary, name).replace(path.with_name(name))
        return
    onnx, convert = importlib.import_module("onnx"), importlib.import_module("onnxruntime.transformers.float16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the float32 number")  # tiny weights become 0, as they should
        halved = convert.convert_float_to_float16(onnx.load(path), keep_io_types=True)
    for left in folder.glob(f"{path.name}.data"):
        left.unlink()
    onnx.save(halved, path, save_as_external_data=halved.ByteSize() > MAX_ONE_FILE, location=f"{path.name}.data")
