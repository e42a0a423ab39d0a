"""A model behind HTTP: images in, detections out, several requests in one forward pass."""

from .http import build_server

__all__ = ["build_server"]
