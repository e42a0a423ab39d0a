"""Quantising an exported graph to int8, calibrated on images."""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.image_files import image_files
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..prediction.size_batches import run_ahead
from .graph import quiet
from .runtimes import GRAPH_FILES, check_packages

Arrays = Callable[[dict[str, Tensor]], dict[str, Any]]
MAX_IMAGES = 300  # for calibration; NNCF's default


class CalibrationImages:
    """Preprocessed images of a folder, one at a time.

    Attributes:
        files: the images that are used: all, or `MAX_IMAGES` evenly spaced ones of the sorted list.
        found: number of images in the folder.
        unread: file to reason, for images that could not be read; complete after the first iteration.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it contains no images.
    """

    def __init__(self, folder: str | Path, processor: DetrImageProcessor) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"The folder {folder} of calibration images does not exist.")
        files = image_files(folder)
        if not files:
            raise ValueError(f"{folder} contains no images for calibration.")
        self.found = len(files)
        count = min(self.found, MAX_IMAGES)
        self.files = [files[index * self.found // count] for index in range(count)]
        self.unread: dict[Path, str] = {}
        self.processor = processor
        self.shape: tuple[int, int, int] | None = None

    def fit(self, processor: DetrImageProcessor, shape: tuple[int, int, int] | None) -> None:
        """Take the image processor of the export, and pad to its batch size, height and width."""
        self.processor, self.shape = processor, shape

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for path, inputs in zip(self.files, run_ahead(self._read, self.files, 1), strict=True):
            if isinstance(inputs, str):
                self.unread[path] = inputs
            else:
                yield inputs

    def _read(self, path: Path) -> dict[str, Tensor] | str:
        try:
            inputs = self.processor(path, return_tensors="pt", do_pad=False)
        except Exception as error:
            # decoders raise errors of any kind on damaged files
            return str(error) or type(error).__name__
        pixel_values: Tensor = inputs["pixel_values"]
        batch, _, height, width = pixel_values.shape
        read = {
            "pixel_values": pixel_values.float(),
            "pixel_mask": torch.ones(batch, height, width, dtype=torch.int64),
            "target_sizes": torch.tensor([[height, width]]),
        }
        if self.shape is not None:
            count, rows, columns = self.shape
            for name in ("pixel_values", "pixel_mask"):
                read[name] = functional.pad(read[name], (0, columns - width, 0, rows - height))
            read = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in read.items()}
        return read


def quantize_graph(graph_format: str, folder: Path, names: Sequence[str], images: CalibrationImages) -> None:
    """Replace the float32 graph in a folder by an int8 graph. The last layers of the prediction heads stay in float32:
    they take almost no time, and their errors would be errors of the detections.

    Args:
        graph_format: "onnx" or "openvino".
        names: names of the graph's inputs.

    Raises:
        ImportError: a package is missing; the message names the extra that installs it.
        ValueError: none of the images can be read.
    """
    check_packages(graph_format, quantize=True)
    if next(iter(images), None) is None:
        path, reason = next(iter(images.unread.items()))
        raise ValueError(f"None of the calibration images can be read. {path}: {reason}")

    def arrays(batch: dict[str, Tensor]) -> dict[str, Any]:
        return {name: batch[name].numpy() for name in names}

    with TemporaryDirectory(dir=folder) as temporary:
        if graph_format == "onnx":
            _quantize_onnx(folder / GRAPH_FILES["onnx"], Path(temporary), images, arrays)
        else:
            _quantize_openvino(folder / GRAPH_FILES["openvino"], Path(temporary), images, arrays)


def _quantize_openvino(path: Path, temporary: Path, images: CalibrationImages, arrays: Arrays) -> None:
    """With NNCF, OpenVINO's quantiser, which has a preset for transformers and corrects biases."""
    openvino, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    graph = openvino.Core().read_model(path)
    nodes = {node.get_friendly_name(): node for node in graph.get_ops()}
    sources = {
        name: [entry.get_source_output().get_node().get_friendly_name() for entry in node.inputs()]
        for name, node in nodes.items()
    }
    ends = [result.get_friendly_name() for result in graph.get_results()]
    last = _nearest(ends, sources, lambda name: nodes[name].get_type_name() == "MatMul")
    quantised = nncf.quantize(
        graph,
        nncf.Dataset(images, arrays),
        subset_size=len(images.files),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=last),
    )
    openvino.save_model(quantised, temporary / path.name, compress_to_fp16=False)
    for name in (path.name, path.with_suffix(".bin").name):
        (temporary / name).replace(path.with_name(name))


def _quantize_onnx(path: Path, temporary: Path, images: CalibrationImages, arrays: Arrays) -> None:
    """With ONNX Runtime's quantiser, which writes the patterns that the runtime's int8 kernels need.

    Convolutions and linear layers are quantised. Matrix products within attention are not, because neither of their
    operands is constant. Outputs of linear layers stay in float32, because errors would accumulate over the residual
    connections."""
    onnx, quantization = importlib.import_module("onnx"), importlib.import_module("onnxruntime.quantization")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else arrays(batch)

    large = path.with_name(path.name + ".data").is_file()
    prepared = temporary / "prepared.onnx"
    with quiet("root"):  # the quantiser logs to the root logger
        shapes.quant_pre_process(path, prepared, skip_symbolic_shape=True, save_as_external_data=large)
        graph = onnx.load(prepared, load_external_data=False).graph
        kinds = {output: node for node in graph.node for output in node.output}
        sources = {output: list(node.input) for output, node in kinds.items()}
        ends = [output.name for output in graph.output]
        last = _nearest(ends, sources, lambda name: kinds[name].op_type in ("MatMul", "Gemm"))
        weights = {entry.name for entry in graph.initializer}
        products = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
        quantization.quantize_static(
            prepared,
            temporary / path.name,
            Reader(),
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=[kinds[name].name for name in last] + products,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=large,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
    for file in temporary.glob(f"{path.name}*"):
        file.replace(path.with_name(file.name))


def _nearest(ends: list[str], sources: dict[str, list[str]], wanted: Callable[[str], bool]) -> list[str]:
    """The first wanted node on every path from the ends back to the inputs."""
    found, seen, waiting = [], set(ends), list(ends)
    while waiting:
        name = waiting.pop()
        if name in sources and wanted(name):
            found.append(name)
            continue
        following = [source for source in sources.get(name, ()) if source not in seen]
        seen.update(following)
        waiting += following
    return sorted(found)
