"""Write our models as checkpoints of transformers' own, which give the same outputs there."""

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DabDetrForObjectDetection,
    DetrForObjectDetection,
    DetrImageProcessor,
    PreTrainedModel,
    TableTransformerForObjectDetection,
)
from transformers.utils import logging

from ..model.configuration_hf_detr import DetrConfig
from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.position_embedding import LOW_TEMPERATURE, TEMPERATURE
from ..model.pretrained import TRAINING_ONLY
from ..model.segmentation import DetrForSegmentation
from .transformers_checkpoints import OUR_BOX_HEAD, PROCESSOR_FIELDS, SHARED_FIELDS, THEIR_BOX_HEAD

logger = logging.get_logger(__name__)


def to_transformers(model: DetrForDetection) -> PreTrainedModel:
    """Convert our model to transformers' own with the same weights and the same outputs: `DetrForObjectDetection`, one
    with masks `DetrForSegmentation`, a pre-norm one `TableTransformerForObjectDetection`, and the decoders of
    Conditional DETR and DAB-DETR `ConditionalDetrForObjectDetection` and `DabDetrForObjectDetection`.

    Raises:
        ValueError: transformers has no counterpart of the model: it has none with queries of the type "anchor" and no
            `backbone_kwargs`, no other scores than those of the published models, and no pre-norm and no masks but
            those above; and it replaces all batch norms of the backbone by frozen ones with eps 1e-5 and without
            activation, which changes many timm networks. The latter is detected by comparing outputs.
    """
    config, kind = model.config, _their_kind(model)
    backbone_config: dict[str, Any] = {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "num_channels": config.num_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": list(model.model.backbone._timm_kwargs["out_indices"]),
    }
    if config.dilation:
        backbone_config["output_stride"] = 16
    if config.backbone_kwargs:
        raise ValueError(
            f"transformers' DETR does not support backbone_kwargs={config.backbone_kwargs}: it builds timm's "
            f'"{config.backbone}" with timm\'s defaults.'
        )
    fields = {name: getattr(config, name) for name in SHARED_FIELDS if hasattr(config, name)} | kind.fields(config)
    whole = [name for name in (*WHOLE_NUMBERS, "cls_loss_coefficient") if name in fields and fields[name] % 1 == 0]
    fields |= {name: int(fields[name]) for name in whole}  # which their configs insist on
    fields["auxiliary_loss"] = config.norm_between_layers  # which is what it switches on there
    if kind.width != "d_model":
        fields[kind.width] = fields.pop("d_model")
    known = kind.model.config_class.__dataclass_fields__
    fields = {name: value for name, value in fields.items() if name in known or name in ("id2label", "label2id")}
    theirs = kind.model(kind.model.config_class(**fields, backbone_config=backbone_config)).eval()
    theirs.to(model.device, model.dtype)
    theirs.load_state_dict(kind.rename(model))
    _check_outputs(model, theirs)
    return theirs


@dataclass(frozen=True)
class _Kind:
    """One of transformers' models.

    Args:
        names: {pattern: replacement} from our weights to theirs, applied in turn.
        fields: the fields of its config beside `SHARED_FIELDS`.
        width: its name of `d_model`.
        copies: {prefix: prefix} of weights that it has twice.
    """

    model: Any
    names: dict[str, str]
    fields: Callable[[DetrConfig], dict[str, Any]] = lambda config: {}
    width: str = "d_model"
    copies: Mapping[str, str] = field(default_factory=dict)

    def rename(self, model: DetrForDetection) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            training_only = any(f"{part}." in name for part in TRAINING_ONLY)
            if training_only or name.endswith("num_batches_tracked"):  # frozen batch norms have no such counter
                continue
            for pattern, replacement in self.names.items():
                name = re.sub(pattern, replacement, name)  # noqa: PLW2901
            state[name] = tensor
        for old, new in self.copies.items():
            state |= {new + name.removeprefix(old): t for name, t in state.items() if name.startswith(old)}
        return state


_BOX_HEAD = {f"^{re.escape(OUR_BOX_HEAD)}": THEIR_BOX_HEAD}
_IN_DETECTOR = {r"^(?!mask_head\.|bbox_attention\.)": "detr."}
_TABLE_TRANSFORMER_NAMES = {
    r"^model\.backbone\.model\.": "model.backbone.conv_encoder.model.",
    r"^model\.position_embedding\.": "model.backbone.position_embedding.",
    r"\.o_proj\.": ".out_proj.",
    r"coder\.layers\.(\d+)\.mlp\.": r"coder.layers.\1.",
}
_CONDITIONAL_NAMES = {
    r"(decoder\.layers\.\d+\.\w+_attn)\.([qk])_proj\.": r"\1.\2_content_proj.",
    r"\.self_attn\.([qk])_position_proj\.": r".self_attn.\1_pos_proj.",
    r"\.encoder_attn\.q_position_proj\.": ".encoder_attn.q_pos_sine_proj.",
    r"\.encoder_attn\.q_added_proj\.": ".encoder_attn.q_pos_proj.",
    r"\.encoder_attn\.k_position_proj\.": ".encoder_attn.k_pos_proj.",
    r"decoder\.position_scale\.": "decoder.query_scale.",
    r"decoder\.reference_point\.": "decoder.ref_point_head.",
}
_DAB_NAMES = {
    r"^model\.backbone\.model\.": "model.backbone.conv_encoder.model._backbone.",
    r"^model\.query_position_embeddings\.": "model.query_refpoint_embeddings.",
    r"coder\.position_scale\.": "coder.query_scale.",
    r"decoder\.anchor_embedding\.": "decoder.ref_point_head.",
    r"decoder\.reference_size\.": "decoder.ref_anchor_head.",
    r"^class_labels_classifier\.": "class_embed.",
    r"(encoder\.layers\.\d+\.self_attn)\.o_proj\.": r"\1.out_proj.",
    r"(encoder\.layers\.\d+)\.mlp\.": r"\1.",
    r"(decoder\.layers\.\d+)\.final_layer_norm\.": r"\1.mlp.final_layer_norm.",
    **{
        rf"(decoder\.layers\.\d+)\.{ours}_attn{old}": rf"\1.{theirs}_attn.{theirs}_attn{new}"
        for ours, theirs in (("self", "self"), ("encoder", "cross"))
        for old, new in (
            (r"\.q_proj\.", "_query_content_proj."),
            (r"\.k_proj\.", "_key_content_proj."),
            (r"\.v_proj\.", "_value_proj."),
            (r"\.o_proj\.", ".output_proj."),
            (r"\.k_position_proj\.", "_key_pos_proj."),
            (r"\.q_position_proj\.", "_query_pos_proj." if ours == "self" else "_query_pos_sine_proj."),
            (r"\.q_added_proj\.", "_query_pos_proj."),
            (r"_layer_norm\.", "_layer_norm."),
        )
    },
}


def _scores_of_theirs(config: DetrConfig) -> dict[str, Any]:
    return {"cls_loss_coefficient": config.class_loss_coefficient}


def _fields_of_dab(config: DetrConfig) -> dict[str, Any]:
    temperature = config.position_temperature or LOW_TEMPERATURE
    return _scores_of_theirs(config) | {
        "temperature_height": int(temperature),
        "temperature_width": int(temperature),
        "num_patterns": config.num_patterns,
        "initializer_bias_prior_prob": config.prior_probability,
    }


WHOLE_NUMBERS = (
    "class_cost", "bbox_cost", "giou_cost", "class_loss_coefficient", "bbox_loss_coefficient", "giou_loss_coefficient",
)  # fmt: skip


def _their_kind(model: DetrForDetection) -> _Kind:
    """The model of transformers that computes what ours does.

    Raises:
        ValueError: there is none.
    """
    config, has_masks = model.config, isinstance(model, DetrForSegmentation)
    if config.query_type == "anchor":
        raise ValueError(
            'transformers has no model with `query_type="anchor"`: only models with learned queries, and those of '
            "Conditional DETR and DAB-DETR, can be converted."
        )
    learned = config.query_type == "learned"
    if config.has_no_object != learned:
        activation = "softmax" if learned else "sigmoid"
        raise ValueError(
            f'transformers\' model with the queries of `query_type="{config.query_type}"` has the scores of a '
            f"{activation}, not of a {config.class_activation}."
        )
    if config.pre_norm and (has_masks or not learned):
        raise ValueError(
            "transformers has pre-norm in its Table Transformer only, without masks: keep the model as it is."
        )
    if config.query_type != "dab" and config.position_temperature not in (None, TEMPERATURE):
        raise ValueError(f"transformers' DETR and Conditional DETR have `position_temperature` {TEMPERATURE:.0f} only.")
    if has_masks:
        return _Kind(transformers.DetrForSegmentation, _BOX_HEAD | _IN_DETECTOR)
    if learned and config.pre_norm:
        return _Kind(TableTransformerForObjectDetection, _BOX_HEAD | _TABLE_TRANSFORMER_NAMES)
    if learned:
        return _Kind(DetrForObjectDetection, _BOX_HEAD)
    _check_numbers(config)
    if config.query_type == "conditional":
        return _Kind(ConditionalDetrForObjectDetection, _BOX_HEAD | _CONDITIONAL_NAMES, _scores_of_theirs)
    copies = {THEIR_BOX_HEAD: "model.decoder.bbox_embed."}
    return _Kind(DabDetrForObjectDetection, _BOX_HEAD | _DAB_NAMES, _fields_of_dab, "hidden_size", copies)


def _check_numbers(config: DetrConfig) -> None:
    """
    Raises:
        ValueError: transformers' Conditional DETR or DAB-DETR does not take a number.
    """
    if config.decoder_layers < 2 or config.encoder_layers < 1:
        raise ValueError("transformers' Conditional DETR and DAB-DETR need an encoder and at least 2 decoder layers.")
    for name in WHOLE_NUMBERS:
        if getattr(config, name) % 1:
            raise ValueError(f"transformers' model needs an integer for `{name}`, got {getattr(config, name)}.")
    if config.query_type != "dab":
        return
    if config.relative_boxes or not config.modulate_attention:
        raise ValueError("transformers' DAB-DETR requires `relative_boxes=False` and `modulate_attention=True`.")
    if (config.position_temperature or LOW_TEMPERATURE) % 1:
        raise ValueError("transformers' DAB-DETR requires an integer `position_temperature`.")


@torch.no_grad()
def _check_outputs(ours: DetrForDetection, theirs: PreTrainedModel) -> None:
    """Compare both models' outputs in float32, on copies: in a narrower type, rounding alone would differ."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, ours.config.num_channels, 128, 160, generator=generator).to(ours.device)
    a, b = deepcopy(ours).float().eval()(image), deepcopy(theirs).float().eval()(image)
    compared = [name for name in ("logits", "pred_boxes", "pred_masks") if name in a]
    difference = max((a[name] - b[name]).abs().max().item() for name in compared)
    if not difference < 1e-4:
        raise ValueError(
            f'transformers computes the backbone "{ours.config.backbone}" differently: outputs differ by '
            f"{difference:.2g}. Its DETR replaces batch norms by ones with eps 1e-5 and without the activation that "
            "timm fuses into them."
        )


def save_for_transformers(model: DetrForDetection, processor: HfDetrImageProcessor, folder: str | Path) -> None:
    """Write model and processor as a checkpoint of transformers, of the class that [`to_transformers`] chooses.

    Versions 4 and 5 of transformers both read it: it has the weight names of v4 and names the backbone as the published
    files do. Version 5 is required if the transformer reads another feature level than the fifth, and for learned
    position embeddings, which v5 renamed without reading the old name.

    Raises:
        ValueError: see [`to_transformers`]. Nothing is written then.
    """
    theirs = to_transformers(model)
    if processor.round_size:
        logger.warning(
            "The processor rounds the sizes of images as in training, and transformers' does not. Boxes may be less "
            "exact there towards the right and the bottom."
        )
    folder = Path(folder)
    theirs.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    network = config.pop("backbone_config")
    takes_channels = network["num_channels"] == 3 or model.config.query_type != "dab"  # DAB-DETR's own default has 3
    if network["out_indices"] in ([4], [1, 2, 3, 4]) and takes_channels:  # the default of both versions
        config |= {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": network["backbone"]}
    else:
        config["backbone_config"] = network
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    fields = {name: getattr(processor, name) for name in PROCESSOR_FIELDS}
    kind = DetrImageProcessor if model.config.has_no_object else ConditionalDetrImageProcessor
    kind(**fields).save_pretrained(folder)
