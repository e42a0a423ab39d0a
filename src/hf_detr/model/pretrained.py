"""What both models share: what transformers may do with them, and how a checkpoint becomes one of them."""

import json
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file, logging
from transformers.utils.generic import TransformersKwargs

from .configuration_hf_detr import DetrConfig
from .initialization import init_module

logger = logging.get_logger(__name__)
WhereFrom = str | os.PathLike[str] | None
# modules that exist in training only, where their option is on; a model without the option does not miss them
TRAINING_ONLY = ("extra_query_groups", "denoising", "dense_head")
# names in checkpoints of version 0.1 -> names now
RENAMED = {
    r"^bbox_predictor\.": "model.decoder.bbox_predictor.",
    r"further_query_groups\.": "extra_query_groups.",
    r"^denoising_content\.": "denoising.class_embedding.",
    r"decoder\.place_scale\.": "decoder.position_scale.",
}
# arguments of from_pretrained that say where a checkpoint is, and so are needed to look at its config first
LOCATION = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class DetrPreTrainedModel(PreTrainedModel):
    """Loading, saving and pushing, and what transformers may do with the models.

    Attributes:
        foreign_weight_names: by `model_type`, the weight names of other DETR checkpoints as {pattern: our name},
            applied in turn. Filled by `hf_detr.interop`; a copy of this file in a model repository knows our own only.
        write_model_card: writes `README.md` into a folder that is about to be pushed. Set by `hf_detr.hub`.
    """

    config: DetrConfig
    config_class = DetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Backbone", "EncoderLayer", "DecoderLayer", "AnchorDecoderLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # a count that only batch norm with momentum=None reads; frozen batch norm does not have it
    _keys_to_ignore_on_load_missing = [r"num_batches_tracked"]
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked", *(rf"{name}\." for name in TRAINING_ONLY)]

    foreign_weight_names: ClassVar[dict[str, dict[str, str]]] = {}
    write_model_card: ClassVar[Callable[[Any, Path, str], None] | None] = None

    def post_init(self) -> None:
        """As in transformers. Of the layers that may not be split only those stay that the model has: Accelerate's
        FSDP refuses a name without a module."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules or ()))

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers skips modules of code outside its own package whose own tensors were loaded, and with them what
        # they contain; ours check every tensor
        super()._initialize_weights(module)

    def _resolve_outputs(
        self, output_attentions: bool | None, output_hidden_states: bool | None, kwargs: Mapping[str, Any]
    ) -> tuple[bool, bool]:
        """Which outputs a call returns: its arguments, or else the config's.

        Raises:
            TypeError: `kwargs` has a name that transformers' models do not have either.
        """
        unknown = kwargs.keys() - TransformersKwargs.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward() got unexpected arguments: {', '.join(sorted(unknown))}.")
        config = self.config
        return (
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )

    def get_input_embeddings(self) -> None:
        """None: images are not looked up. transformers raises for a model without word embeddings, and with it
        Accelerate's FSDP2."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: WhereFrom,
        *model_args: Any,
        config: Any = None,
        ignore_mismatched_sizes: bool = False,
        weights_only: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load our own checkpoints, transformers' DETR and Table Transformer checkpoints, from a folder or the Hub.

        Weights that are missing, unexpected or of another shape are reported in a table.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id such as `"facebook/detr-resnet-50"`.
            config: a `DetrConfig`, or where to read one, in place of the checkpoint's own.
            ignore_mismatched_sizes: allow another number of classes or queries than the checkpoint has. Classes keep
                their weights by name, the first queries keep theirs (see `resize_class_head`, `resize_queries`), and
                what was done is logged. Other weights that do not fit start at random, and are reported.
            weights_only: cannot be switched off; a pickle that is more than tensors could run any code.
            kwargs: as in transformers, among them `id2label`, `num_labels`, `num_queries`, `dtype`, `device_map`,
                `revision`, `token`, and any field of the config.

        Raises:
            OSError: there is no checkpoint.
            ValueError: it is not a DETR, or `weights_only=False`.
            RuntimeError: classes or queries do not fit and `ignore_mismatched_sizes` is off.
            pickle.UnpicklingError: a `.bin` file holds more than tensors. Nothing in it has run.
        """
        if not weights_only:
            raise ValueError("Checkpoints are only opened with weights_only=True: a pickle can run any code.")
        kwargs |= {"ignore_mismatched_sizes": ignore_mismatched_sizes, "output_loading_info": True}
        location = {name: kwargs[name] for name in LOCATION if name in kwargs}
        stored = _stored_config(pretrained_model_name_or_path, location, needed=config is None)
        if stored is None:  # weights in memory, or without a config of their own: nothing to compare with
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            return (model, info) if output_loading_info else model

        names = cls.foreign_weight_names.get(stored["model_type"], {})
        kwargs["key_mapping"] = {**names, **RENAMED, **(kwargs.get("key_mapping") or {})}
        theirs = DetrConfig.from_dict(DetrConfig.translate(stored))
        if config is None:
            wanted = {name: kwargs.pop(name) for name in _RESIZABLE if name in kwargs}
            wanted = {name: value for name, value in wanted.items() if value is not None}
        else:  # load with the checkpoint's classes and queries, then fit them to those of `config`
            config = _own_config(config, location)
            wanted = {"id2label": config.id2label, "num_queries": config.num_queries}
            config.id2label, config.num_queries = theirs.id2label, theirs.num_queries
        labels, num_queries = _labels(wanted, theirs), wanted.get("num_queries", theirs.num_queries)
        has_head = hasattr(cls, "resize_class_head")
        other_classes = has_head and _other_classes(labels, theirs.id2label, ignore_mismatched_sizes)
        if not ignore_mismatched_sizes:
            num_labels = len(labels) if has_head else theirs.num_labels
            _check_sizes(str(pretrained_model_name_or_path), theirs, num_labels, num_queries)

        model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        changes = []
        if other_classes:
            changes.append(model.resize_class_head(labels))
            sizes = [torch.Size((n + 1, theirs.d_model)) for n in (theirs.num_labels, len(labels))]
            info["mismatched_keys"].add(("class_labels_classifier.weight", *sizes))
        model.config.id2label = labels
        model.config.label2id = {name: index for index, name in labels.items()}
        if num_queries != theirs.num_queries:
            changes.append(model.resize_queries(num_queries))
            width = 4 if theirs.query_type == "anchor" else theirs.d_model
            sizes = [torch.Size((n, width)) for n in (theirs.num_queries, num_queries)]
            info["mismatched_keys"].add(("query_position_embeddings.weight", *sizes))
        if changes:
            logger.warning(f"{pretrained_model_name_or_path}: {' '.join(changes)}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers. Weights keep our names, also those that came from a checkpoint with other names."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        # transformers calls this to push `working_dir`, with the card that the repository already has, or a blank one
        if self.write_model_card is not None:
            self.write_model_card(Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


_RESIZABLE = ("id2label", "label2id", "num_labels", "num_queries")


def _stored_config(where: WhereFrom, location: dict[str, Any], *, needed: bool) -> dict[str, Any] | None:
    """The checkpoint's own config as it is written; that of the base model for an adapter (PEFT). None if there is none
    and it is not needed."""
    if where is None:
        return None
    if not os.path.isfile(where):
        stored, _ = PreTrainedConfig.get_config_dict(where, **location)
        if stored:
            return {"model_type": DetrConfig.model_type, **stored}
        adapter = find_adapter_config_file(str(where), **location)
        if adapter is not None:
            with open(adapter, encoding="utf-8") as file:
                base = json.load(file)["base_model_name_or_path"]
            return _stored_config(base, {n: v for n, v in location.items() if n != "revision"}, needed=needed)
    if needed:
        raise OSError(f"There is no config.json in {where}, so it cannot be told which model the weights belong to.")
    return None


def _own_config(config: Any, location: dict[str, Any]) -> DetrConfig:
    """A copy of what was passed as `config`: ours, transformers' own for a DETR, or where to read one."""
    if isinstance(config, (str, os.PathLike)):
        return DetrConfig.from_pretrained(config, **location)
    if config.model_type != DetrConfig.model_type:
        return DetrConfig.from_dict(DetrConfig.translate(config.to_dict()))
    return deepcopy(config)


def _labels(wanted: dict[str, Any], theirs: DetrConfig) -> dict[int, str]:
    """The classes that are asked for, as {0: name, 1: name, ...}."""
    labels: dict[int, str]
    if wanted.get("id2label"):
        names = wanted["id2label"]
        labels = {int(i): name for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}
    elif wanted.get("label2id"):
        labels = {int(index): name for name, index in wanted["label2id"].items()}
    elif wanted.get("num_labels", theirs.num_labels) == theirs.num_labels:
        return dict(theirs.id2label)
    else:
        return {index: f"LABEL_{index}" for index in range(wanted["num_labels"])}
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"Class ids must be 0 to {len(labels) - 1}, got {sorted(labels)}.")
    if wanted.get("num_labels", len(labels)) != len(labels):
        raise ValueError(f"num_labels={wanted['num_labels']}, but there are names for {len(labels)} classes.")
    return dict(sorted(labels.items()))


def _other_classes(labels: dict[int, str], theirs: dict[int, str], ignore_mismatched_sizes: bool) -> bool:
    """Whether the class head has to be fitted. Other names for as many classes are ambiguous: a translation, or another
    data set? Only `ignore_mismatched_sizes` says the latter."""
    if len(labels) != len(theirs):
        return True
    if labels == dict(theirs):
        return False
    if not ignore_mismatched_sizes:
        logger.warning(
            f"The {len(labels)} classes have other names than in the checkpoint; they are taken as the same classes in "
            "the same order. If they are other classes, pass ignore_mismatched_sizes=True to match them by name."
        )
    return ignore_mismatched_sizes


def _check_sizes(where: str, theirs: DetrConfig, num_labels: int, num_queries: int) -> None:
    for what, has, wants in (("classes", theirs.num_labels, num_labels), ("queries", theirs.num_queries, num_queries)):
        if has != wants:
            raise RuntimeError(
                f"{where} has {has} {what}, not {wants}. With ignore_mismatched_sizes=True it is fitted: classes keep "
                "their weights by name, the first queries keep theirs, the others start at random."
            )


__all__ = ["DetrPreTrainedModel"]
