"""The programs that run a graph: what they are installed with, and how they open its file."""

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.extras import import_extra

GRAPH_FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
Run = Callable[[dict[str, Tensor]], list[Tensor]]


class _Packages(NamedTuple):
    to_load: tuple[str, ...]
    to_write: tuple[str, ...]
    to_quantize: tuple[str, ...]


_PACKAGES = {
    "onnx": _Packages(("onnxruntime",), ("onnx", "onnxscript", "onnxruntime"), ("onnx", "onnxruntime")),
    "openvino": _Packages(("openvino",), ("openvino",), ("openvino", "nncf")),
    "torch": _Packages((), (), ()),
}


def check_packages(graph_format: str, quantize: bool = False) -> list[str]:
    """The names of the packages that write a graph.

    Raises:
        ImportError: one is missing; the extra that has it is named.
    """
    packages = _PACKAGES[graph_format]
    names = list(dict.fromkeys(packages.to_write + packages.to_quantize * quantize))
    for name in names:
        import_extra(name, graph_format)
    return names


def open_graph(folder: Path, graph_format: str, dtype: torch.dtype | None) -> Run:
    """A function that runs the graph in a folder.

    Args:
        dtype: see [`load_exported`].

    Raises:
        ImportError: the runtime is not installed; the extra that has it is named.
        ValueError: the file cannot be opened, or not in this `dtype`.
    """
    if graph_format != "openvino" and dtype not in (None, torch.float32):
        raise ValueError(f"{folder} is of format {graph_format}, which cannot be told to compute in {dtype}.")
    runtimes = [import_extra(name, graph_format) for name in _PACKAGES[graph_format].to_load]
    graph = folder / GRAPH_FILES[graph_format]
    try:
        if graph_format == "onnx":
            return _open_onnx(graph, *runtimes)
        if graph_format == "openvino":
            return _open_openvino(graph, dtype or torch.float32, *runtimes)
        return _open_torch(graph)
    except Exception as error:  # each runtime has its own
        raise ValueError(f"{graph} cannot be opened: {error}") from error


def _open_onnx(path: Path, runtime: Any) -> Run:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in found]

    return run


def _open_torch(path: Path) -> Run:
    graph: Any = torch.export.load(path).module()

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(graph(**inputs))

    return run


def _open_openvino(path: Path, dtype: torch.dtype, openvino: Any) -> Run:
    """Two programs of one graph, each compiled when it is first needed: one for batches with padding, and one for
    batches without, from which all that hides padding is taken out. That is a tenth of the time and more."""
    core = openvino.Core()
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    if dtype not in precisions:
        raise ValueError(f"OpenVINO computes in {', '.join(map(str, precisions))}, not {dtype}")
    # said in any case: left to itself, OpenVINO takes bfloat16 where the processor has it
    options = {"INFERENCE_PRECISION_HINT": precisions[dtype], "PERFORMANCE_HINT": "LATENCY"}
    requests: dict[bool, Any] = {}
    busy = Lock()  # a request serves one caller at a time

    def open_request(padded: bool) -> Any:
        graph = core.read_model(path)
        if not padded:
            _take_out_masks(graph)
        return core.compile_model(graph, "CPU", options).create_infer_request()

    core.read_model(path)  # what is wrong with the file is told now

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        # asked of numpy: PyTorch's threads would wait for more work on the cores that OpenVINO needs now
        padded = not bool(arrays["pixel_mask"].all())
        with busy:
            if padded not in requests:
                requests[padded] = open_request(padded)
            found = requests[padded].infer(arrays, share_inputs=True)
            return [torch.from_numpy(found[index]) for index in range(len(found))]

    return run


def _take_out_masks(graph: Any) -> None:
    """Multiplications with `pixel_mask` at any resolution: where everything is image, they change nothing."""
    masks = {"pixel_mask"}  # names of nodes that are the mask and nothing else
    for node in graph.get_ordered_ops():
        kind, sources = node.get_type_name(), [entry.get_source_output().get_node() for entry in node.inputs()]
        is_mask = [source.get_friendly_name() in masks for source in sources]
        if kind in ("Convert", "Unsqueeze", "Slice", "MaxPool") and is_mask[0]:
            masks.add(node.get_friendly_name())
        elif kind == "Multiply" and sum(is_mask) == 1:
            node.output(0).replace(node.input(is_mask.index(False)).get_source_output())
