"""A checkpoint folder to the Hub, in one commit: weights, configs, code, picture, numbers and the model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.pretrained import DetrPreTrainedModel
from .model_card import PICTURE, TEMPLATE, build_model_card, hash_of_weights, may_replace, read_metrics

logger = logging.get_logger(__name__)
# What a run's args.json says about where things were, which is nobody's business, or how the run was handled. The data
# set and the base model have their own places in the card.
_NOT_SETTINGS = (
    "auto_batch_size", "backbone_weights", "base_model", "chosen", "compile", "dataset", "datasets", "embedded",
    "found", "hub_private", "license", "logging_steps", "model", "on_nan", "output_dir", "overfit", "push_to_hub",
    "report_to", "resume", "save_minutes", "save_total_limit", "set",
)  # fmt: skip
# Weights of earlier pushes that were split differently. A pattern's star would reach into folders that are not ours.
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
    """The model card that a push of `folder` writes. What is not given is read from the run: the numbers from
    `metrics.json` if they belong to these weights, the settings and the base model from `args.json`, the picture from
    `validation.png`.

    Args:
        license, base_model, datasets, template: see [`build_model_card`].

    Raises:
        OSError, ValueError: the folder holds no complete DETR checkpoint.
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
        logger.warning(f"metrics.json in {folder} was not measured with the weights there; the card leaves it out.")
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
    """Push the checkpoint in `folder` (model and processor, as `finetune.py` leaves them, or any DETR checkpoint) with
    the code to run it and a model card. All of it becomes visible at once, or nothing does.

    A card that somebody has edited on the Hub (see the note at its end) is left as it is.

    Args:
        private, token, commit_message, revision, create_pr, max_shard_size: as for `model.push_to_hub`.
        about: `license`, `base_model`, `datasets` and `template` of the card, see [`model_card_of`].

    Returns:
        the address of the commit, or of the pull request.

    Raises:
        OSError, ValueError: the folder holds no complete DETR checkpoint.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; the message says why.
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
        metrics = read_metrics(folder)
        if metrics is not None:
            # the same weights, perhaps in other files
            (stage / "metrics.json").write_text(json.dumps(metrics | {"weights": hash_of_weights(stage)}, indent=2))
            if (folder / PICTURE).is_file():
                shutil.copyfile(folder / PICTURE, stage / PICTURE)
        if _card_is_ours(api, repo_id, revision):
            _card(folder, model, processor, repo_id, **about).save(stage / "README.md")
        else:
            logger.warning(f"The model card of {repo_id} has been edited there; it is left as it is.")
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
    """Create the repository, if there is none, and make sure that this token may write to it, before hours are spent on
    what is to be pushed. Returns its id.

    Raises:
        SystemExit: the Hub cannot be reached, or refuses; the message says why.
    """
    api = HfApi(token=token)
    try:
        full = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        api.auth_check(full, write=True)  # of a repository that is there, creating it again would tell nothing
    except Exception as error:  # the client's own, and those of the HTTP library under it, which changes
        raise SystemExit(f"--push_to_hub {repo_id}: {error}") from error
    return full


def _load(folder: Path) -> tuple[DetrForDetection, HfDetrImageProcessor]:
    model, info = DetrForDetection.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} has no weights for {sorted(info['missing_keys'])[:5]}. It is not complete.")
    return model, HfDetrImageProcessor.from_pretrained(folder)


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _card_is_ours(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as fresh:  # a card in the cache may be an old one
        try:
            file = api.hf_hub_download(repo_id, "README.md", revision=revision, cache_dir=fresh)
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError, but it says: could not look
            raise
        except (EntryNotFoundError, RevisionNotFoundError):
            return True
        return may_replace(Path(file).read_text(encoding="utf-8"))


def register_model_card() -> None:
    """Give every `model.push_to_hub` a card. transformers puts the card that the repository has, or a blank one, into
    the folder that it is about to push; one that is not somebody's own is written anew, without numbers, since nothing
    says that these weights were measured."""

    def write_model_card(self: DetrPreTrainedModel, folder: Path, repo_id: str) -> None:
        file = folder / "README.md"
        there = ModelCard.load(file)
        if isinstance(self, DetrForDetection) and may_replace(there.content):
            said = there.data.to_dict()
            card = build_model_card(self, repo_id, license=said.get("license"), datasets=said.get("datasets"))
            new = card.data.to_dict()
            card.data = ModelCardData(**new | {"tags": list(dict.fromkeys([*new["tags"], *said.get("tags", ())]))})
            card.save(file)

    DetrPreTrainedModel.write_model_card = write_model_card
