"""Read transformers' checkpoints of DETR, Table Transformer, Conditional DETR and DAB-DETR: configs, weight names and
image processor settings.

Two layouts of weight names exist. The v4 layout is the one on the Hub, and the one that transformers still writes by
default (`model.backbone.conv_encoder.model`, `out_proj`, `fc1`). The v5 layout has transformers' names in memory, which
are ours, too. The backbone is a timm network, or transformers' own ResNet (`use_timm_backbone=False`), which has the
same weights as timm's under other names.
"""

import math
import re
from typing import Any

import timm
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import logging

from ..model.configuration_hf_detr import DetrConfig
from ..model.position_embedding import LOW_TEMPERATURE

logger = logging.get_logger(__name__)

MODEL_TYPES = ("detr", "table-transformer", "conditional_detr", "dab-detr")

# Prefix of the weights of the box head, in transformers' models and in ours.
THEIR_BOX_HEAD, OUR_BOX_HEAD = "bbox_predictor.", "model.decoder.bbox_predictor."
# {pattern: replacement}, applied in turn.
_LAYERS = {
    r"^detr\.": "",  # the prefix of the detector in DetrForSegmentation
    r"backbone\.conv_encoder\.model\.": "backbone.model.",
    r"backbone\.position_embedding\.": "position_embedding.",
    r"\.(self_attn|encoder_attn)\.out_proj\.": r".\1.o_proj.",
    r"coder\.layers\.(\d+)\.fc1\.": r"coder.layers.\1.mlp.fc1.",
    r"coder\.layers\.(\d+)\.fc2\.": r"coder.layers.\1.mlp.fc2.",
}
_RESNET = {
    r"backbone\.model\.embedder\.embedder\.convolution\.": "backbone.model.conv1.",
    r"backbone\.model\.embedder\.embedder\.normalization\.": "backbone.model.bn1.",
    **{rf"model\.encoder\.stages\.{i}\.layers\.": f"model.layer{i + 1}." for i in range(4)},
    r"(model\.layer\d+\.\d+)\.shortcut\.convolution\.": r"\1.downsample.0.",
    r"(model\.layer\d+\.\d+)\.shortcut\.normalization\.": r"\1.downsample.1.",
    **{rf"(model\.layer\d+\.\d+)\.layer\.{i}\.convolution\.": rf"\1.conv{i + 1}." for i in range(3)},
    **{rf"(model\.layer\d+\.\d+)\.layer\.{i}\.normalization\.": rf"\1.bn{i + 1}." for i in range(3)},
}
# The mask head, in the v4 layout and in the files of the paper's code; the v5 layout has our names.
MASK_HEAD = {
    r"^bbox_attention\.([qk])_linear\.": r"bbox_attention.\1_proj.",
    **{rf"^mask_head\.lay{i}\.": f"mask_head.conv{i}.conv." for i in (1, 2)},
    **{rf"^mask_head\.gn{i}\.": f"mask_head.conv{i}.norm." for i in (1, 2)},
    **{rf"^mask_head\.lay{i + 3}\.": f"mask_head.fpn_stages.{i}.refine.conv." for i in range(3)},
    **{rf"^mask_head\.gn{i + 3}\.": f"mask_head.fpn_stages.{i}.refine.norm." for i in range(3)},
    **{rf"^mask_head\.adapter{i + 1}\.": f"mask_head.fpn_stages.{i}.fpn_adapter." for i in range(3)},
    r"^mask_head\.out_lay\.": "mask_head.output_conv.",
}
# The attention of Conditional DETR's decoder, in the v4 layout and in the papers' files, then in the v5 layout.
# (Each pattern has one group, as transformers' loader replaces no second one.)
_LAYER = r"(decoder\.layers\.\d+)"
CONDITIONAL_ATTENTION = {
    **{rf"{_LAYER}\.sa_{x}content_proj\.": rf"\1.self_attn.{x}_proj." for x in "qk"},
    **{rf"{_LAYER}\.sa_{x}pos_proj\.": rf"\1.self_attn.{x}_position_proj." for x in "qk"},
    rf"{_LAYER}\.sa_v_proj\.": r"\1.self_attn.v_proj.",
    **{rf"{_LAYER}\.ca_{x}content_proj\.": rf"\1.encoder_attn.{x}_proj." for x in "qk"},
    rf"{_LAYER}\.ca_qpos_sine_proj\.": r"\1.encoder_attn.q_position_proj.",
    rf"{_LAYER}\.ca_qpos_proj\.": r"\1.encoder_attn.q_added_proj.",
    rf"{_LAYER}\.ca_kpos_proj\.": r"\1.encoder_attn.k_position_proj.",
    rf"{_LAYER}\.ca_v_proj\.": r"\1.encoder_attn.v_proj.",
}
_CONDITIONAL = CONDITIONAL_ATTENTION | {
    **{rf"\.(self_attn|encoder_attn)\.{x}_content_proj\.": rf".\1.{x}_proj." for x in "qk"},
    **{rf"\.self_attn\.{x}_pos_proj\.": f".self_attn.{x}_position_proj." for x in "qk"},
    r"\.encoder_attn\.q_pos_sine_proj\.": ".encoder_attn.q_position_proj.",
    r"\.encoder_attn\.q_pos_proj\.": ".encoder_attn.q_added_proj.",
    r"\.encoder_attn\.k_pos_proj\.": ".encoder_attn.k_position_proj.",
    r"decoder\.query_scale\.": "decoder.position_scale.",
    r"decoder\.ref_point_head\.": "decoder.reference_point.",
}
_DAB = {
    r"backbone\.model\._backbone\.": "backbone.model.",
    r"\.query_refpoint_embeddings\.": ".query_position_embeddings.",
    r"coder\.query_scale\.": "coder.position_scale.",
    r"decoder\.ref_point_head\.": "decoder.anchor_embedding.",
    r"decoder\.ref_anchor_head\.": "decoder.reference_size.",
    r"decoder\.bbox_embed\.": "decoder.bbox_predictor.",  # the same weights as `bbox_predictor`
    r"^class_embed\.": "class_labels_classifier.",
    r"\.self_attn\.self_attn_query_content_proj\.": ".self_attn.q_proj.",
    r"\.self_attn\.self_attn_key_content_proj\.": ".self_attn.k_proj.",
    r"\.self_attn\.self_attn_value_proj\.": ".self_attn.v_proj.",
    r"\.self_attn\.self_attn_query_pos_proj\.": ".self_attn.q_position_proj.",
    r"\.self_attn\.self_attn_key_pos_proj\.": ".self_attn.k_position_proj.",
    r"\.self_attn\.self_attn\.output_proj\.": ".self_attn.o_proj.",
    r"\.self_attn\.self_attn_layer_norm\.": ".self_attn_layer_norm.",
    r"\.cross_attn\.cross_attn_query_content_proj\.": ".encoder_attn.q_proj.",
    r"\.cross_attn\.cross_attn_key_content_proj\.": ".encoder_attn.k_proj.",
    r"\.cross_attn\.cross_attn_value_proj\.": ".encoder_attn.v_proj.",
    r"\.cross_attn\.cross_attn_query_pos_sine_proj\.": ".encoder_attn.q_position_proj.",
    r"\.cross_attn\.cross_attn_query_pos_proj\.": ".encoder_attn.q_added_proj.",
    r"\.cross_attn\.cross_attn_key_pos_proj\.": ".encoder_attn.k_position_proj.",
    r"\.cross_attn\.cross_attn\.output_proj\.": ".encoder_attn.o_proj.",
    r"\.cross_attn\.cross_attn_layer_norm\.": ".encoder_attn_layer_norm.",
    r"\.mlp\.final_layer_norm\.": ".final_layer_norm.",
    r"(encoder\.layers\.\d+)\.activation_fn\.": r"\1.mlp.activation_fn.",
}
_WEIGHT_NAMES = _LAYERS | _RESNET | {rf"^{re.escape(THEIR_BOX_HEAD)}": OUR_BOX_HEAD} | MASK_HEAD


def weight_names(model_type: str) -> dict[str, str]:
    """{pattern: our name}, applied in turn, of the weights in transformers' checkpoints of this `model_type`."""
    return _WEIGHT_NAMES | {"conditional_detr": _CONDITIONAL, "dab-detr": _DAB}.get(model_type, {})


SHARED_FIELDS = (
    "num_channels", "num_queries", "d_model", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads",
    "decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "activation_function", "dropout",
    "attention_dropout", "activation_dropout", "init_xavier_std", "position_embedding_type", "dilation", "class_cost",
    "bbox_cost", "giou_cost", "bbox_loss_coefficient", "giou_loss_coefficient", "mask_loss_coefficient",
    "dice_loss_coefficient", "eos_coefficient", "id2label", "label2id",
)  # fmt: skip
# Of Conditional DETR and DAB-DETR, which were trained with them; the prior probability is that of their code.
SIGMOID_FIELDS = {"class_activation": "sigmoid", "class_loss": "focal", "prior_probability": 0.01}
# COCO's stuff in the panoptic task, by category id
STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
NUM_PANOPTIC = 250  # outputs of the paper's panoptic models, by COCO's category ids
# timm's names of the ResNets of transformers and of the paper: {(bottleneck blocks, blocks per stage): name}
RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (True, (2, 2, 2, 2)): "resnet26", (True, (3, 4, 6, 3)): "resnet50", (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152", (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34",
}  # fmt: skip


# -- configs -------------------------------------------------------------------------------------------------------


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Convert the `config.json` of a checkpoint of transformers, of any version, to the fields of our config.

    `auxiliary_loss` is off in the published files, although the models were trained with it; fine-tuning here has it.
    Where it is on, transformers' models norm the states between the layers of their decoder (but not DAB-DETR), and
    their checkpoints have learned to predict so: `norm_between_layers`.

    Raises:
        ValueError: the `model_type` is not in `MODEL_TYPES`, a field has a value that our model does not have, or timm
            has no equivalent of the backbone.
    """
    model_type = theirs.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(_not_readable(str(model_type)))
    generic = ("num_labels", "dtype", "torch_dtype", "_commit_hash")
    ours = {name: theirs[name] for name in (*SHARED_FIELDS, *generic) if theirs.get(name) is not None}
    if theirs.get("encoder_layerdrop") or theirs.get("decoder_layerdrop"):
        logger.warning("LayerDrop is not supported: training this checkpoint further never skips a layer.")
    stuff = {"stuff_labels": stuff_of_coco(ours["id2label"])} if len(ours.get("id2label", ())) == NUM_PANOPTIC else {}
    ours |= stuff | _read_backbone(theirs) | {"pre_norm": model_type == "table-transformer"}
    if theirs.get("auxiliary_loss") and model_type != "dab-detr":
        ours["norm_between_layers"] = True
    if model_type in ("conditional_detr", "dab-detr"):
        ours |= _independent_scores(theirs) | {
            "query_type": "conditional" if model_type == "conditional_detr" else "dab"
        }
    return ours | (_read_dab(theirs) if model_type == "dab-detr" else {})


def _not_readable(model_type: str) -> str:
    """The reason why a checkpoint of this type is not read, and what reads it."""
    readable = ", ".join(f'"{name}"' for name in (DetrConfig.model_type, *MODEL_TYPES))
    reader = MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.get(model_type)
    advice = f" transformers.{reader} reads it." if reader else ""
    what = f'This is a checkpoint of a "{model_type}" model, which hf_detr does not have.'
    return f"{what}{advice} hf_detr reads {readable}."


def _independent_scores(theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields of models that were trained with the focal loss of a sigmoid."""
    if theirs.get("focal_alpha", 0.25) != 0.25:
        raise ValueError(f"focal_alpha={theirs['focal_alpha']}: our focal loss has the published 0.25.")
    return SIGMOID_FIELDS | {
        "num_queries": theirs.get("num_queries", 300),
        "class_cost": theirs.get("class_cost", 2),
        "class_loss_coefficient": theirs.get("cls_loss_coefficient", 2),
    }


def _read_dab(theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields that only DAB-DETR has.

    Raises:
        ValueError: a variant that no published checkpoint has.
    """
    heights, widths = (theirs.get(f"temperature_{side}", LOW_TEMPERATURE) for side in ("height", "width"))
    if heights != widths:
        raise ValueError(f"temperature_height={heights} and temperature_width={widths}: ours has one for both.")
    scale = theirs.get("sine_position_embedding_scale")
    if scale is not None and abs(scale - 2 * math.pi) > 1e-6:
        raise ValueError(f"sine_position_embedding_scale={scale}: ours has 2 pi.")
    for name, reason in (
        ("keep_query_pos", "only the first decoder layer adds positions to contents here and in every published one"),
        ("normalize_before", "a norm after an encoder without pre-norm is in no published one, and not supported"),
    ):
        if theirs.get(name):
            raise ValueError(f"This checkpoint has {name}=True: {reason}.")
    if theirs.get("random_refpoints_xy"):
        logger.warning(
            "The centres of the anchors of this checkpoint were fixed in training; training it here moves them."
        )
    ours = {"activation_function": theirs.get("activation_function", "prelu")}
    ours |= {"d_model": theirs.get("hidden_size", theirs.get("d_model", 256))}
    ours |= {"num_patterns": theirs.get("num_patterns") or 0}
    if theirs.get("initializer_bias_prior_prob"):
        ours["prior_probability"] = theirs["initializer_bias_prior_prob"]
    return ours | ({"position_temperature": heights} if heights != LOW_TEMPERATURE else {})


def stuff_of_coco(id2label: dict[Any, str]) -> list[str]:
    """The names of stuff in a panoptic checkpoint of the paper, whose class ids are those of COCO panoptic; nothing of
    other classes."""
    return [name for index, name in id2label.items() if STUFF.get(int(index)) == name]


def _read_backbone(theirs: dict[str, Any]) -> dict[str, Any]:
    nested = theirs.get("backbone_config")
    if nested:
        is_timm = nested.get("model_type") == "timm_backbone"  # v5
        if theirs.get("use_timm_backbone") and not is_timm:
            raise ValueError(
                f"use_timm_backbone=True, but backbone_config is of transformers' {nested.get('model_type')}."
            )
        channels = {"num_channels": nested["num_channels"]} if nested.get("num_channels") else {}
        if is_timm:
            stride = {"output_stride": nested.get("output_stride")}
            return channels | _timm_backbone(nested["backbone"], nested.get("out_indices"), stride)
        return channels | _resnet_of_transformers(nested)
    name = theirs.get("backbone") or "resnet50"
    if theirs.get("use_timm_backbone", True):  # v4; the oldest files do not have the field
        extra = dict(theirs.get("backbone_kwargs") or {})
        extra.pop("num_channels", None)
        return _timm_backbone(name, extra.pop("out_indices", None), extra)
    known = {f"microsoft/resnet-{depth}": f"resnet{depth}" for depth in (18, 26, 34, 50, 101, 152)}
    if name not in known:
        raise ValueError(f'No timm network is known for the backbone "{name}" of this checkpoint.')
    return {"backbone": known[name], "dilation": False}


def _timm_backbone(name: str, out_indices: list[int] | None, extra: dict[str, Any]) -> dict[str, Any]:
    """Convert the name and the arguments of a timm network to our fields. Of `out_indices`, the last level feeds the
    transformer; unless it is the network's deepest, `feature_stride` selects it."""
    ours: dict[str, Any] = {"backbone": name}
    stride = extra.pop("output_stride", None)
    if stride == 16:
        ours["dilation"] = True
    elif stride not in (None, 32):
        extra["output_stride"] = stride
    try:
        with torch.device("meta"):
            network = timm.create_model(name, features_only=True, **extra)
    except RuntimeError as error:
        raise ValueError(
            f'The backbone of this checkpoint is timm\'s "{name}", which cannot be built: {error}'
        ) from error
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if any(type(norm) is not nn.BatchNorm2d or norm.eps != 1e-5 for norm in norms):
        raise ValueError(
            f"transformers' DETR replaces the batch norms of timm's \"{name}\" by ones with eps 1e-5 and without the "
            "activation that timm fuses into them. A checkpoint trained that way is another network than timm's and "
            "cannot be read."
        )
    if out_indices:
        reductions = network.feature_info.reduction()
        last = max(index % len(reductions) for index in out_indices)
        if last < len(reductions) - 1:
            ours["feature_stride"] = reductions[last]
    kept = {k: v for k, v in extra.items() if k not in ("in_chans", "features_only")}
    return ours | ({"backbone_kwargs": kept} if kept else {})


def _resnet_of_transformers(theirs: dict[str, Any]) -> dict[str, Any]:
    """Convert transformers' `ResNetConfig` to timm's name of the network; sizes without a name of their own become
    `backbone_kwargs`."""
    if theirs.get("model_type") != "resnet":
        raise ValueError(
            f"The backbone of this checkpoint is transformers' \"{theirs.get('model_type')}\". Of transformers' own "
            "backbones, only ResNets can be read as timm networks."
        )
    fixed_in_timm = {
        "embedding_size": (theirs.get("embedding_size", 64), 64),
        "hidden_act": (theirs.get("hidden_act", "relu"), "relu"),
        "downsample_in_first_stage": (theirs.get("downsample_in_first_stage", False), False),
        "downsample_in_bottleneck": (theirs.get("downsample_in_bottleneck", False), False),
    }
    for field, (value, needed) in fixed_in_timm.items():
        if value != needed:
            raise ValueError(f"The ResNet of this checkpoint has {field}={value}; timm's has {needed}.")
    bottleneck = theirs.get("layer_type", "bottleneck") == "bottleneck"
    depths = tuple(theirs.get("depths") or (3, 4, 6, 3))
    widths = tuple(theirs.get("hidden_sizes") or (256, 512, 1024, 2048))
    channels = tuple(width // 4 for width in widths) if bottleneck else widths
    name = RESNETS.get((bottleneck, depths))
    sizes: dict[str, Any] = {} if name else {"layers": list(depths)}
    if channels != (64, 128, 256, 512):
        sizes["channels"] = list(channels)
    ours: dict[str, Any] = {"backbone": name or ("resnet50" if bottleneck else "resnet18"), "dilation": False}
    stages = [int(stage.removeprefix("stage")) for stage in theirs.get("out_features") or () if stage != "stem"]
    last = max(stages or theirs.get("out_indices") or [4])
    if 0 < last < 4:
        ours["feature_stride"] = 2 ** (last + 1)
    return ours | ({"backbone_kwargs": sizes} if sizes else {})


# -- processors ----------------------------------------------------------------------------------------------------

PROCESSOR_FIELDS = (
    "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
    "do_pad", "pad_size",
)  # fmt: skip


def read_processor(theirs: dict[str, Any]) -> dict[str, Any]:
    """Convert the `preprocessor_config.json` of any version of transformers to the fields of our image processor.

    In early versions `size` is a number next to `max_size`, and `do_pad` is called `pad_and_return_pixel_mask`. Later
    Table Transformers have only `size={"longest_edge": n}`.

    Raises:
        ValueError: it belongs to a model that is not a DETR.
    """
    kind = theirs.get("image_processor_type") or theirs.get("feature_extractor_type")
    if kind is not None and "Detr" not in kind and "Yolos" not in kind:
        raise ValueError(f"This is the configuration of a {kind}, which does not process images as DETR does.")
    ours = {name: theirs[name] for name in PROCESSOR_FIELDS if theirs.get(name) is not None}
    if "pad_and_return_pixel_mask" in theirs:
        ours.setdefault("do_pad", theirs["pad_and_return_pixel_mask"])
    size, longest = ours.get("size"), theirs.get("max_size", 1333)
    if isinstance(size, int):
        ours["size"] = {"shortest_edge": size, "longest_edge": longest}
    elif isinstance(size, dict) and set(size) == {"shortest_edge"}:
        ours["size"] = size | {"longest_edge": longest}
    elif isinstance(size, dict) and set(size) == {"longest_edge"}:
        ours["size"] = {"max_height": size["longest_edge"], "max_width": size["longest_edge"]}
    return ours
