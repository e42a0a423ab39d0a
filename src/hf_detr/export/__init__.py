"""Models as graphs for other runtimes: ONNX, OpenVINO, torch.export."""

from .exported_model import ExportedDetr, ExportedOutput, is_exported, load_exported
from .exporting import export_model

__all__ = ["ExportedDetr", "ExportedOutput", "export_model", "is_exported", "load_exported"]
