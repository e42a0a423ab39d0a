"""A page in the browser that shows what a model finds and why, and collects corrections; `examples/app.py` serves
it."""

from .examples import example_images
from .serving import serve_page
from .viewer import Viewer

__all__ = ["Viewer", "example_images", "serve_page"]
