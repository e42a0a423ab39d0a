"""Models as graphs for other runtimes: ONNX Runtime, OpenVINO, and `torch.export`."""

from .exported_model import ExportedDetr, is_exported, load_exported
from .exporting import export_model

__all__ = ["ExportedDetr", "export_model", "is_exported", "load_exported"]
