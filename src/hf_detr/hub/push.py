"""Push a checkpoint folder to the Hub in one commit: weights, configs, code, metrics, picture and the model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from ..interop import load_model
from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from .endpoint import keep_edited, write_handler
from .model_card import PICTURE, TEMPLATE, build_model_card, hash_of_weights, may_replace, read_metrics

logger = logging.get_logger(__name__)
# Entries of a run's args.json that do not enter the table of settings: local paths, which are private, and options
# without influence on the result. Data set and base model have their own places in the card.
_NOT_SETTINGS = (
    "auto_batch_size", "backbone_weights", "base_model", "chosen", "compile", "dataset", "datasets", "embedded",
    "found", "hub_private", "license", "logging_steps", "model", "on_nan", "output_dir", "overfit", "push_to_hub",
    "report_to", "resume", "save_minutes", "save_total_limit", "set",
)  # fmt: skip
# Weight files of earlier pushes, which may have been sharded differently. No "*": it would also match in subfolders.
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json")


def model_card_of(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    template: str | Path = TEMPLATE,
) -> ModelCard:
    """Build the model card that pushing `folder` writes. It shows the results in `metrics.json` if they belong to the
    weights, the settings in `args.json`, from which arguments that are not given are also taken, and `validation.png`.

    Args:
        license, base_model, datasets, template: see [`build_model_card`].

    Raises:
        OSError, ValueError: the folder does not hold a complete DETR checkpoint.
    """
    folder = Path(folder)
    return _card(folder, *_load(folder), repo_id, license, base_model, datasets, template)


def _card(
    folder: Path,
    model: DetrForDetection,
    processor: HfDetrImageProcessor,
    repo_id: str,
    license: str | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    template: str | Path = TEMPLATE,
) -> ModelCard:
    metrics = read_metrics(folder)
    if metrics is None and (folder / "metrics.json").exists():
        logger.warning(f"{folder / 'metrics.json'} was measured with other weights; its results do not enter the card.")
    settings = _read_json(folder / "args.json")
    return build_model_card(
        model,
        repo_id,
        processor=processor,
        metrics=metrics,
        settings={n: v for n, v in settings.items() if v is not None and v is not False and n not in _NOT_SETTINGS},
        picture=metrics is not None and (folder / PICTURE).is_file(),
        base_model=base_model or settings.get("base_model"),
        datasets=datasets or settings.get("datasets"),
        license=license or settings.get("license"),
        template=template,
    )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: str = "50GB",
    **about: Any,
) -> str:
    """Push the checkpoint in `folder` (model and processor, as saved by `finetune.py`, or any DETR checkpoint) with the
    code to run it, the handler of an Inference Endpoint, and a model card. The push is atomic. A card that was edited
    on the Hub (see the note at its end) is kept.

    Args:
        private, token, commit_message, revision, create_pr, max_shard_size: as in `model.push_to_hub`.
        about: `license`, `base_model`, `datasets` and `template` of the card, see [`model_card_of`].

    Returns:
        the URL of the commit, or of the pull request.

    Raises:
        OSError, ValueError: the folder does not hold a complete DETR checkpoint.
        huggingface_hub.errors.HfHubHTTPError: the Hub rejected the push; the message gives its reason.
    """
    folder = Path(folder)
    model, processor = _load(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        processor.save_pretrained(stage)
        write_handler(stage, has_masks=model.has_masks)
        for name in keep_edited(api, repo_id, revision, stage):
            logger.warning(f"{name} of {repo_id} was edited on the Hub; it is kept.")
        metrics = read_metrics(folder)
        if metrics is not None:
            # the same weights, but the files and so the hash may differ
            (stage / "metrics.json").write_text(json.dumps(metrics | {"weights": hash_of_weights(stage)}, indent=2))
            if (folder / PICTURE).is_file():
                shutil.copyfile(folder / PICTURE, stage / PICTURE)
        if _card_is_ours(api, repo_id, revision):
            _card(folder, model, processor, repo_id, **about).save(stage / "README.md")
        else:
            logger.warning(f"The model card of {repo_id} was edited on the Hub; it is kept.")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=stage,
            commit_message=commit_message or "Upload DETR",
            revision=revision,
            create_pr=create_pr,
            delete_patterns=[*_WEIGHTS, *_PICKLES],
        )
    return str(commit.pr_url or commit.commit_url)


def prepare_repo(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create the repository if it does not exist and check that the token may write to it; to be called before a long
    training run. Returns its full id.

    Raises:
        OSError: the Hub cannot be reached, or denies access; the message gives the reason.
    """
    api = HfApi(token=token)
    try:
        full = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        api.auth_check(full, write=True)  # create_repo does not check this if the repository exists
    except Exception as error:  # the client's errors, and those of its HTTP library
        raise OSError(f"Cannot push to {repo_id}: {error}") from error
    return full


def _load(folder: Path) -> tuple[DetrForDetection, HfDetrImageProcessor]:
    model, info = load_model(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} has no weights for {sorted(info['missing_keys'])[:5]}. It is incomplete.")
    return model, HfDetrImageProcessor.from_pretrained(folder)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _card_is_ours(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as empty_cache:  # a cached card may be outdated
        try:
            file = api.hf_hub_download(repo_id, "README.md", revision=revision, cache_dir=empty_cache)
        except LocalEntryNotFoundError:  # an EntryNotFoundError, too, but it means that the Hub cannot be reached
            raise
        except (EntryNotFoundError, RevisionNotFoundError):
            return True
        return may_replace(Path(file).read_text(encoding="utf-8"))


def write_model_card(model: Any, folder: Path, repo_id: str) -> None:
    """Write the card of `model` into `folder`, which `model.push_to_hub` is about to push and which already holds the
    repository's card or transformers' automatic one. An edited card is kept. The new card has no results, since nothing
    ties measured ones to these weights."""
    file = folder / "README.md"
    present = ModelCard.load(file)
    if not hasattr(model, "class_labels_classifier") or not may_replace(present.content):
        return
    metadata = present.data.to_dict()
    card = build_model_card(model, repo_id, license=metadata.get("license"), datasets=metadata.get("datasets"))
    ours = card.data.to_dict()
    ours["tags"] = list(dict.fromkeys([*ours["tags"], *metadata.get("tags", ())]))
    card.data = ModelCardData(**ours)
    card.save(file)
