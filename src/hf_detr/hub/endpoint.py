"""The handler with which a model repository serves itself as an Inference Endpoint of the Hub."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

MARKER = "written by hf_detr; remove this line to keep your own version"
# The toolkit of Inference Endpoints imports `EndpointHandler` from handler.py, creates it with the folder of the
# repository, and calls it with the request: an image that it has decoded, or JSON. Nothing but the packages in
# requirements.txt is installed beside PyTorch and transformers, so this uses the code that the repository carries.
HANDLER = '''# MARKER
"""Serves this repository as an Inference Endpoint: an image in, its objects out."""

from typing import Any

import torch
from transformers import AutoImageProcessor, MODEL_CLASS, pipeline

PARAMETERS = ("threshold", "timeout")


class EndpointHandler:
    def __init__(self, path: str = "") -> None:
        """Loads the model in the folder `path`, on a GPU if there is one."""
        model = MODEL_CLASS.from_pretrained(path, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        device = 0 if torch.cuda.is_available() else -1
        self.detector = pipeline("TASK", model=model, image_processor=processor, device=device)

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data: `inputs`, an image (PIL), a URL, or the content of an image file in base64, or a list of these; and
                optionally `parameters` with `threshold` and `timeout` (seconds, for a URL).

        Returns:
            what the pipeline "TASK" returns; for a request that cannot be served {"error": sentence}.
        """
        images, parameters = data.get("inputs"), data.get("parameters") or {}
        if images is None or (isinstance(images, (list, str)) and not images):
            return {"error": "The request has no image in `inputs`."}
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if unknown:
            return {"error": f"Unknown parameters: {', '.join(unknown)}. Known: {', '.join(PARAMETERS)}."}
        try:
            return self.detector(images, **parameters)
        except (ValueError, TypeError, OSError) as error:
            return {"error": f"The request cannot be processed: {error}"}
'''
REQUIREMENTS = "# MARKER\ntimm>=1.0.20\nscipy>=1.11\ntorchvision\ntransformers>=5.20\n"


def write_handler(folder: Path, *, has_masks: bool) -> None:
    """Write `handler.py` and its `requirements.txt` into the folder of a model repository."""
    kind = "AutoModelForImageSegmentation" if has_masks else "AutoModelForObjectDetection"
    task = "image-segmentation" if has_masks else "object-detection"
    handler = HANDLER.replace("MARKER", MARKER).replace("MODEL_CLASS", kind).replace("TASK", task)
    (folder / "handler.py").write_text(handler, encoding="utf-8")
    (folder / "requirements.txt").write_text(REQUIREMENTS.replace("MARKER", MARKER), encoding="utf-8")


def keep_edited(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> list[str]:
    """Remove from the folder the files of [`write_handler`] that somebody has replaced in the repository. Returns their
    names."""
    kept = []
    for name in ("handler.py", "requirements.txt"):
        with tempfile.TemporaryDirectory() as empty_cache:  # a cached file may be outdated
            try:
                file = api.hf_hub_download(repo_id, name, revision=revision, cache_dir=empty_cache)
            except LocalEntryNotFoundError:  # an EntryNotFoundError, too, but it means that the Hub cannot be reached
                raise
            except (EntryNotFoundError, RevisionNotFoundError):
                continue
            if MARKER not in Path(file).read_text(encoding="utf-8"):
                (folder / name).unlink()
                kept.append(name)
    return kept
