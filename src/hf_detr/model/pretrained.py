"""Loading, saving and pushing, for both models."""

import inspect
import json
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file, logging
from transformers.utils.generic import TransformersKwargs

from .configuration_hf_detr import FIELDS_OF_TRANSFORMERS, DetrConfig, refuse_unknown
from .foreign import import_hub, import_interop
from .initialization import init_module
from .resizing import NAMED_BY_CLASS, keep_named_classes

logger = logging.get_logger(__name__)
Source = str | os.PathLike[str] | None
# Fields of DetrConfig on which the shape or the meaning of trained weights depends.
SHAPES_OF_WEIGHTS = (
    "backbone", "backbone_kwargs", "dilation", "feature_stride", "d_model", "encoder_layers", "encoder_attention_heads",
    "encoder_ffn_dim", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "activation_function",
    "pre_norm", "norm_between_layers", "position_embedding_type", "position_temperature", "query_type", "num_patterns",
    "modulate_attention", "relative_boxes", "class_activation",
)  # fmt: skip
# Modules that only training with their option uses; a model without the option ignores their weights.
TRAINING_ONLY = ("denoising", "dense_head")
# Names of weights in checkpoints saved by version 0.1, as {pattern: new name}: those checkpoints must keep loading.
RENAMED = {
    r"^bbox_predictor\.": "model.decoder.bbox_predictor.",
    r"^denoising_content\.": "denoising.class_embedding.",
    r"decoder\.place_scale\.": "decoder.position_scale.",
}
RETIRED = (r"(extra|further)_query_groups\.",)  # weights of version 0.1 that only training used
# Arguments of `from_pretrained` that locate a checkpoint; its config is read with them before its weights.
LOCATION = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
RESIZABLE = ("id2label", "label2id", "num_labels", "num_queries", "num_channels")


class DetrPreTrainedModel(PreTrainedModel):
    """What transformers needs to load, save, push, place and split the models."""

    config: DetrConfig
    config_class = DetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Backbone", "EncoderLayer", "DecoderLayer", "AnchorDecoderLayer", "ConditionalDecoderLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A counter that only batch norms with momentum=None read; frozen batch norms do not have it.
    _keys_to_ignore_on_load_missing = [r"num_batches_tracked"]
    _keys_to_ignore_on_load_unexpected = [
        r"num_batches_tracked",
        *(rf"{name}\." for name in TRAINING_ONLY),
        *RETIRED,
    ]

    def __init__(self, config: DetrConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # fields may have been set since it was made
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """As in transformers, and drop the classes from `_no_split_modules` that this model does not contain:
        Accelerate's FSDP raises on them."""
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
        self, output_attentions: bool | None, output_hidden_states: bool | None, kwargs: dict[str, Any]
    ) -> tuple[bool, bool]:
        """Which outputs a call returns: its arguments, or else the config's.

        Raises:
            TypeError: `kwargs` has a name that transformers' models do not have either, or one that no DETR can obey.
        """
        if "decoder_attention_mask" in kwargs and kwargs["decoder_attention_mask"] is None:
            del kwargs["decoder_attention_mask"]  # what transformers' wrappers pass
        unknown = kwargs.keys() - TransformersKwargs.__annotations__.keys()
        unknown |= {name for name in ("is_causal",) if kwargs.get(name)}
        if unknown:  # looking at the signature at every call would cost time
            known = inspect.signature(self.forward).parameters
            refuse_unknown(f"{type(self).__name__}.forward()", sorted(unknown), known)
        config = self.config
        return (
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )

    def get_input_embeddings(self) -> None:
        """None: there are no word embeddings. transformers' own method raises then, and with it Accelerate's FSDP2."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Source,
        *model_args: Any,
        config: Any = None,
        ignore_mismatched_sizes: bool = False,
        weights_only: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint from a folder or the Hub: our own, or a DETR, Conditional DETR, DAB-DETR or
        Table Transformer of transformers.

        Missing, unexpected and mismatched weights are logged as a table.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id such as `"facebook/detr-resnet-50"`.
            config: a `DetrConfig`, transformers' own config of a DETR, or where to read one; it replaces the
                checkpoint's config.
            ignore_mismatched_sizes: allow other classes, or another number of queries or channels, than in the
                checkpoint. Classes keep their weights by name and the first queries keep theirs (see
                `resize_class_head`, `resize_queries`, `resize_channels`); a warning reports what was done. Other
                weights of another shape are initialized at random and reported.
            weights_only: must be True: unpickling anything but tensors can run arbitrary code.
            output_loading_info: also return transformers' dict of missing, unexpected and mismatched weights.
            kwargs: as in transformers, among them `id2label`, `num_labels`, `num_queries`, `num_channels`, `dtype`,
                `device_map`, `revision`, `token`, and any field of the config.

        Returns:
            the model in evaluation mode, or (model, loading info).

        Raises:
            OSError: there is no checkpoint.
            ValueError: it is not a DETR checkpoint, or `weights_only=False`.
            RuntimeError: the number of classes, queries or channels differs, without `ignore_mismatched_sizes`.
            pickle.UnpicklingError: a `.bin` file holds more than tensors; no code in it has run.
        """
        if not weights_only:
            raise ValueError("Checkpoints are only opened with weights_only=True: a pickle can run any code.")
        kwargs |= {"ignore_mismatched_sizes": ignore_mismatched_sizes, "output_loading_info": True}
        location = {name: kwargs[name] for name in LOCATION if name in kwargs}
        stored = read_stored_config(pretrained_model_name_or_path, location, required=config is None)
        if stored is None:  # weights in memory, or without a config: nothing to resize from
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            return (model, info) if output_loading_info else model

        kwargs["key_mapping"] = _weight_names(stored["model_type"]) | (kwargs.get("key_mapping") or {})
        saved, repaired = _saved_config(stored, pretrained_model_name_or_path, kwargs.get("id2label"))
        if repaired and config is None:
            config = deepcopy(saved)
            for name in [name for name in kwargs if name in DetrConfig.__dataclass_fields__ and name not in RESIZABLE]:
                setattr(config, name, kwargs.pop(name))
            kwargs.pop("id2label")
        wanted = kwargs if config is None else _as_detr_config(config, location).to_dict()
        _warn_of_changes(pretrained_model_name_or_path, saved.to_dict(), wanted)
        if config is None:
            requested = {name: kwargs.pop(name) for name in RESIZABLE if name in kwargs}
            requested = {name: value for name, value in requested.items() if value is not None}
            by_class = {name: kwargs.pop(name, getattr(saved, name)) for name in NAMED_BY_CLASS}
        else:  # load with the checkpoint's classes and queries, then resize to those of `config`
            config = _as_detr_config(config, location)
            requested = {name: getattr(config, name) for name in ("id2label", "num_queries", "num_channels")}
            config.id2label, config.num_queries = saved.id2label, saved.num_queries
            config.num_channels = saved.num_channels
            by_class = {name: getattr(config, name) for name in NAMED_BY_CLASS}
            config.class_weights, config.stuff_labels = saved.class_weights, saved.stuff_labels
        id2label = _requested_classes(requested, saved)
        num_queries = requested.get("num_queries", saved.num_queries)
        num_channels = requested.get("num_channels", saved.num_channels)
        has_head = hasattr(cls, "resize_class_head")
        new_classes = has_head and _are_new_classes(id2label, saved.id2label, ignore_mismatched_sizes)
        if not ignore_mismatched_sizes:
            num_labels = len(id2label) if has_head else saved.num_labels
            _check_sizes(pretrained_model_name_or_path, saved, num_labels, num_queries, num_channels)

        model, info = cls._load(pretrained_model_name_or_path, model_args, config, kwargs)
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        changes = []
        if new_classes:
            changes.append(model.resize_class_head(id2label))
        model.config.id2label = id2label
        model.config.label2id = {name: index for index, name in id2label.items()}
        for name, value in by_class.items():
            setattr(model.config, name, value)
        keep_named_classes(model.config, [name for name, value in by_class.items() if value is getattr(saved, name)])
        model.config.validate()
        if num_queries != saved.num_queries:
            changes.append(model.resize_queries(num_queries))
        if num_channels != saved.num_channels:
            changes.append(model.resize_channels(num_channels))
        if changes:
            logger.warning(f"{pretrained_model_name_or_path}: {' '.join(changes)}")
        resized = [(name, shapes[name], weight.shape) for name, weight in model.named_parameters()]
        info["mismatched_keys"].update(entry for entry in resized if entry[1] != entry[2])
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, source: Source, model_args: tuple[Any, ...], config: Any, kwargs: dict[str, Any]) -> Any:
        """transformers' own `from_pretrained`; a name that it does not know is refused with the nearest field."""
        for name in set(kwargs) & set(FIELDS_OF_TRANSFORMERS):
            raise TypeError(f"{cls.__name__}.from_pretrained: give {name!r} to a DetrConfig, and that as `config`.")
        try:
            return super().from_pretrained(source, *model_args, config=config, **kwargs)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown and unknown[1] in kwargs:
                refuse_unknown(f"{cls.__name__}.from_pretrained", [unknown[1]], DetrConfig.__dataclass_fields__)
            raise

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers. Weights are saved under our names, also those from another project's checkpoint;
        `AutoModel` loads the `DetrModel` of a detector."""
        if self._auto_class is not None:
            auto_map = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = auto_map | {"AutoModel": "modeling_hf_detr.DetrModel"}
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        # transformers pushes `working_dir` here; it already holds the repository's card, or a blank one.
        hub = import_hub()
        if hub is not None:
            hub.write_model_card(self, Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _weight_names(model_type: str) -> dict[str, str]:
    """{pattern: name} of the weights in a checkpoint of this `model_type` that have other names here."""
    if model_type == DetrConfig.model_type:
        return RENAMED
    names: dict[str, str] = import_interop(f'a "{model_type}" checkpoint').weight_names(model_type)
    return names


def read_stored_config(source: Source, location: dict[str, Any], *, required: bool) -> dict[str, Any] | None:
    """The checkpoint's `config.json`; for a PEFT adapter, that of its base model. None if there is none and it is not
    required."""
    if source is None:
        return None
    if not os.path.isfile(source):
        stored, _ = PreTrainedConfig.get_config_dict(source, **location)
        if stored:
            return {"model_type": DetrConfig.model_type, **stored}
        adapter = find_adapter_config_file(str(source), **location)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
            of_base = {name: value for name, value in location.items() if name != "revision"}
            return read_stored_config(base, of_base, required=required)
    if required:
        raise OSError(f"There is no config.json in {source}, so the model that the weights belong to is unknown.")
    return None


def _saved_config(stored: dict[str, Any], source: Source, id2label: Any) -> tuple[DetrConfig, bool]:
    """The checkpoint's config, and whether `id2label`, as given now, repaired it: the ids of its classes were not 0, 1,
    ..., and there are as many names.

    Raises:
        ValueError: the ids of its classes are not 0, 1, ...
    """
    stored = DetrConfig.translate(stored)
    classes = stored.get("id2label")
    if not classes or sorted(map(int, classes)) == list(range(len(classes))):
        return DetrConfig.from_dict(stored), False
    if id2label is None or len(id2label) != len(classes):
        raise ValueError(
            f"{source}: the ids of `id2label` in its config.json must be 0 to {len(classes) - 1}, got {list(classes)}. "
            f"Load it with id2label={{0: ..., 1: ...}}, its {len(classes)} classes in the order of its outputs, and "
            "save it."
        )
    names = id2label.items() if isinstance(id2label, dict) else enumerate(id2label)
    given = {int(index): name for index, name in names}
    return DetrConfig.from_dict(stored | {"id2label": given, "label2id": {n: i for i, n in given.items()}}), True


def _warn_of_changes(source: Source, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Say which fields have other values than those that the weights were trained for."""
    for name in SHAPES_OF_WEIGHTS:
        if name in wanted and wanted[name] != saved[name]:
            logger.warning(
                f"{source}: its weights were trained with {name}={saved[name]!r}, and are used with {wanted[name]!r}. "
                "Train the model before you use its predictions."
            )


def _as_detr_config(config: Any, location: dict[str, Any]) -> DetrConfig:
    """A copy of the argument `config` as a `DetrConfig`."""
    if isinstance(config, (str, os.PathLike)):
        return DetrConfig.from_pretrained(config, **location)
    if config.model_type != DetrConfig.model_type:
        return DetrConfig.from_dict(DetrConfig.translate(config.to_dict()))
    return deepcopy(config)


def _requested_classes(requested: dict[str, Any], saved: DetrConfig) -> dict[int, str]:
    """The requested classes as {0: name, 1: name, ...}; the checkpoint's own if none are requested."""
    id2label: dict[int, str]
    if names := requested.get("id2label"):
        id2label = {int(i): name for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}
    elif requested.get("label2id"):
        id2label = {int(index): name for name, index in requested["label2id"].items()}
    elif requested.get("num_labels", saved.num_labels) == saved.num_labels:
        return dict(saved.id2label)
    else:
        return {index: f"LABEL_{index}" for index in range(requested["num_labels"])}
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"Class ids must be 0 to {len(id2label) - 1}, got {sorted(id2label)}.")
    if requested.get("num_labels", len(id2label)) != len(id2label):
        raise ValueError(f"num_labels={requested['num_labels']}, but there are names for {len(id2label)} classes.")
    return dict(sorted(id2label.items()))


def _are_new_classes(id2label: dict[int, str], saved: dict[int, str], ignore_mismatched_sizes: bool) -> bool:
    """Whether the class head must be resized. The same number of other names is ambiguous, a translation or another
    data set; `ignore_mismatched_sizes` means the latter."""
    if len(id2label) == len(saved) and id2label != dict(saved) and not ignore_mismatched_sizes:
        logger.warning(
            f"The {len(id2label)} classes have other names than in the checkpoint; they are taken as the same classes "
            "in the same order. If they are other classes, pass ignore_mismatched_sizes=True to match them by name."
        )
        return False
    return id2label != dict(saved)


def _check_sizes(source: Source, saved: DetrConfig, num_labels: int, num_queries: int, num_channels: int) -> None:
    for what, has, wanted in (
        ("classes", saved.num_labels, num_labels),
        ("queries", saved.num_queries, num_queries),
        ("channels", saved.num_channels, num_channels),
    ):
        if not isinstance(wanted, int):
            raise ValueError(f"The number of {what} must be an integer, got {wanted!r}.")
        if has != wanted:
            raise RuntimeError(
                f"{source} has {has} {what}, not {wanted}. With ignore_mismatched_sizes=True it is resized: classes "
                "keep their weights by name, the first queries keep theirs, the others start at random; the first "
                "convolution is adapted to other channels."
            )


__all__ = ["DetrPreTrainedModel"]
