"""Models as graphs for other runtimes: ONNX, OpenVINO, torch.export."""

from .exporting import export_model
from .exported_model import ExportedDetr, ExportedOutput, is_exported, load_exported

__all__ = ["ExportedDetr", "ExportedOutput", "export_model", "is_exported", "load_exported"]
