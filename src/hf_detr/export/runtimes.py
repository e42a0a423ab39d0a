"""The runtimes of exported graphs: their packages, and how they open a graph."""

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
    """The names of the packages that are needed to write a graph.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
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
        ImportError: the runtime is not installed; the message names the extra that installs it.
        ValueError: the file cannot be opened, or the runtime does not support this `dtype`.
    """
    if graph_format != "openvino" and dtype not in (None, torch.float32):
        raise ValueError(f"{folder} has the format {graph_format}, whose dtype cannot be changed to {dtype}.")
    runtimes = [import_extra(name, graph_format) for name in _PACKAGES[graph_format].to_load]
    graph = folder / GRAPH_FILES[graph_format]
    try:
        if graph_format == "onnx":
            return _open_onnx(graph, *runtimes)
        if graph_format == "openvino":
            return _open_openvino(graph, dtype or torch.float32, *runtimes)
        return _open_torch(graph)
    except Exception as error:  # each runtime raises its own types
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
    """Compiles two versions of a graph with `pixel_mask` on first use: one for batches with padding, and a faster one
    for batches without, from which the masks are removed."""
    core = openvino.Core()
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    if dtype not in precisions:
        raise ValueError(f"OpenVINO supports {', '.join(map(str, precisions))}, not {dtype}")
    # explicit, because OpenVINO's default is bfloat16 on CPUs that support it
    options = {"INFERENCE_PRECISION_HINT": precisions[dtype], "PERFORMANCE_HINT": "LATENCY"}
    requests: dict[bool, Any] = {}
    lock = Lock()  # a request is not thread-safe

    def open_request(padded: bool) -> Any:
        graph = core.read_model(path)
        if not padded:
            _remove_masks(graph)
        return core.compile_model(graph, "CPU", options).create_infer_request()

    core.read_model(path)  # raises an error if the file is damaged

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        # in numpy: PyTorch's idle threads would keep spinning on the cores that OpenVINO uses
        padded = "pixel_mask" in arrays and not bool(arrays["pixel_mask"].all())
        with lock:
            if padded not in requests:
                requests[padded] = open_request(padded)
            found = requests[padded].infer(arrays, share_inputs=True)
            return [torch.from_numpy(found[index]) for index in range(len(found))]

    return run


def _remove_masks(graph: Any) -> None:
    """Remove multiplications with `pixel_mask` at any resolution, which have no effect without padding."""
    masks = {"pixel_mask"}  # names of nodes that only depend on the mask
    for node in graph.get_ordered_ops():
        kind, sources = node.get_type_name(), [entry.get_source_output().get_node() for entry in node.inputs()]
        is_mask = [source.get_friendly_name() in masks for source in sources]
        if kind in ("Convert", "Unsqueeze", "Slice", "MaxPool") and is_mask[0]:
            masks.add(node.get_friendly_name())
        elif kind == "Multiply" and sum(is_mask) == 1:
            node.output(0).replace(node.input(is_mask.index(False)).get_source_output())
