"""`examples/predict.py` in this process: what its users see, without the seconds that a new process takes to import."""

import importlib.util
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest

PREDICT = Path(__file__).parents[1] / "examples" / "predict.py"


class PredictExample:
    """Call it with the script's arguments; it returns what the script prints. `module` is the script.

    Args:
        checkpoint: the default of `--model`; the default of `--threshold` is 0.25.
    """

    def __init__(self, checkpoint: Path) -> None:
        spec = importlib.util.spec_from_file_location("predict_example", PREDICT)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType | Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.checkpoint = checkpoint

    def __call__(self, *arguments: Any) -> str:
        command = [str(PREDICT), *map(str, arguments)]
        command += [] if "--model" in arguments else ["--model", str(self.checkpoint)]
        command += [] if "--threshold" in arguments else ["--threshold", "0.25"]
        with _restored_state(), redirect_stdout(io.StringIO()) as output, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.setenv("ACCELERATE_USE_CPU", "true")
            self.module.main()
        return output.getvalue()


@contextmanager
def _restored_state() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    limit = PIL.Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
        for number, handler in handlers.items():
            signal.signal(number, handler)
