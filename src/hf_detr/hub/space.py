"""A Space of the Hub that serves the page of `examples/app.py` with a model."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from transformers.utils import logging

from ..runtime.extras import import_extra

logger = logging.get_logger(__name__)
EXAMPLES = "examples"  # folder of the images in the Space

APP = '''"""The page of hf_detr for {model_id}."""

from hf_detr.cli import main

main(["app", "--model", "{model_id}"{examples}])
'''

README = """---
{metadata}---

# {title}

[{model_id}](https://huggingface.co/{model_id}) in the browser: what it finds in an image or a short video, and where
each query attends. Made with hf_detr.
"""


def push_space(
    model_id: str,
    space_id: str,
    *,
    examples: Sequence[Path] = (),
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Make a Gradio Space that shows a model of the Hub, or update it. Other files of the Space stay as they are.

    Args:
        model_id: USER/NAME on the Hub. If it is private, a warning says that the Space needs a secret HF_TOKEN.
        space_id: USER/NAME or NAME of the Space.
        examples: images to start with.
        private: create the Space as private.

    Returns:
        the URL of the Space.

    Raises:
        ValueError: `model_id` is not an id on the Hub, or two examples have the same name.
        FileNotFoundError: an example does not exist.
        ImportError: Gradio is not installed; its version is that of the Space.
        huggingface_hub.errors.HfHubHTTPError: there is no such model, or the Hub rejected the push.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise ValueError(f"A Space loads its model from the Hub by USER/NAME, not {model_id!r}. Push the model first.")
    names = [file.name for file in examples]
    if len(set(names)) < len(names):
        raise ValueError("Two example images have the same name; rename one.")
    for file in examples:
        if not file.is_file():
            raise FileNotFoundError(f"There is no example image {file}.")
    api = HfApi(token=token)
    model_is_private = api.model_info(model_id).private
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        _write(stage, model_id, examples)
        url = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, repo_type="space", folder_path=stage, commit_message=f"The page of {model_id}"
        )
    if model_is_private:
        logger.warning(
            f"{model_id} is private: in the settings of the Space {url.repo_id}, add a secret HF_TOKEN with read "
            "access to it."
        )
    return str(url)


def _write(folder: Path, model_id: str, examples: Sequence[Path]) -> None:
    """The files of a Space."""
    title = model_id.rsplit("/", maxsplit=1)[-1]
    metadata = {
        "title": title, "sdk": "gradio", "sdk_version": import_extra("gradio", "app").__version__,
        "python_version": "3.11",
        "app_file": "app.py", "models": [model_id], "pinned": False,
    }  # fmt: skip
    front = yaml.safe_dump(metadata, sort_keys=False)
    (folder / "README.md").write_text(README.format(metadata=front, title=title, model_id=model_id), encoding="utf-8")
    (folder / "requirements.txt").write_text(f"hf_detr[app,video]=={version('hf_detr')}\n")
    given = f', "--examples", "{EXAMPLES}"' if examples else ""
    (folder / "app.py").write_text(APP.format(model_id=model_id, examples=given), encoding="utf-8")
    for file in examples:
        (folder / EXAMPLES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / EXAMPLES / file.name)
