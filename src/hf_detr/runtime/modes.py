"""The mode of a model during a task."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluation_mode(model: Any) -> Iterator[Any]:
    """The model in evaluation mode, without the wrapper of data parallelism, which would wait for processes that have
    no images left. Its mode is restored at the end."""
    model = getattr(model, "module", model)
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)
