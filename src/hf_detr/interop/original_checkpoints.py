"""Read the checkpoints of the papers' own code: of facebookresearch/detr (`detr-r50`, `detr-r101` and their `-dc5`, for
boxes and `-panoptic`), of Conditional DETR (Atten4Vis/ConditionalDETR), DAB-DETR (IDEA-Research/DAB-DETR) and DN-DETR
(IDEA-Research/DN-DETR, the single-scale one).

A file holds `{"model": state_dict}`, and if a training run wrote it, also its `args`. A state dict shows neither
whether the backbone is dilated nor the number of attention heads: these come from `args`, the caller or the file name.
"""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..model.configuration_hf_detr import DetrConfig
from ..model.modeling_hf_detr import DetrForDetection
from ..model.segmentation import DetrForSegmentation
from .transformers_checkpoints import (
    CONDITIONAL_ATTENTION,
    MASK_HEAD,
    NUM_PANOPTIC,
    OUR_BOX_HEAD,
    RESNETS,
    SIGMOID_FIELDS,
    STUFF,
    stuff_of_coco,
)

PROJECTS = "DETR, Conditional DETR, DAB-DETR or DN-DETR"
DENOISING_GROUPS = 5  # of the published DN-DETR
# {pattern: replacement}, applied in turn.
_NAMES = {
    r"^detr\.": "",  # the prefix of the detector in the panoptic model
    r"^transformer\.(encoder|decoder)\.norm\.": r"model.\1.layernorm.",
    r"^transformer\.": "model.",
    r"^(model\.\w+\.layers\.\d+)\.norm1\.": r"\1.self_attn_layer_norm.",
    r"^(model\.encoder\.layers\.\d+)\.norm2\.": r"\1.final_layer_norm.",
    r"^(model\.decoder\.layers\.\d+)\.norm2\.": r"\1.encoder_attn_layer_norm.",
    r"^(model\.decoder\.layers\.\d+)\.norm3\.": r"\1.final_layer_norm.",
    r"\.(multihead|cross)_attn\.": ".encoder_attn.",
    r"\.out_proj\.": ".o_proj.",
    r"\.linear([12])\.": r".mlp.fc\1.",
    r"(layers\.\d+)\.activation\.": r"\1.mlp.activation_fn.",
    r"coder\.query_scale\.": "coder.position_scale.",
    r"\.decoder\.ref_anchor_head\.": ".decoder.reference_size.",
    r"^refpoint_embed\.": "model.query_position_embeddings.",
    **CONDITIONAL_ATTENTION,
    r"^query_embed\.": "model.query_position_embeddings.",
    r"^input_proj\.": "model.input_projection.",
    r"^class_embed\.": "class_labels_classifier.",
    r"^(model\.decoder\.)?bbox_embed\.": OUR_BOX_HEAD,
    r"^backbone\.0\.body\.": "model.backbone.model.",
    r"^backbone\.1\.row_embed\.": "model.position_embedding.row_embeddings.",
    r"^backbone\.1\.col_embed\.": "model.position_embedding.column_embeddings.",
    **MASK_HEAD,
}


def coco_labels() -> dict[int, str]:
    """COCO's category ids, 0 to 90, with their names as in the published checkpoints: "N/A" for ids that COCO does not
    use. Source: torchvision."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {index: "N/A" if index == 0 else name for index, name in enumerate(names)}


def panoptic_labels() -> dict[int, str]:
    """The 250 outputs of the paper's panoptic models: COCO's category ids of things and stuff, "N/A" for the others."""
    names = coco_labels() | STUFF
    return {index: names.get(index, "N/A") for index in range(NUM_PANOPTIC)}


def load_original(
    file: str | Path,
    *,
    dilation: bool | None = None,
    attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> tuple[DetrForDetection, list[str]]:
    """Load a checkpoint of the papers' code into our model, one with a mask head into a [`DetrForSegmentation`].
    Those that are read: see the top of this module.

    Args:
        file: the `.pth` file; it is opened with `weights_only=True`.
        dilation: whether the backbone is DC5. None: from the `args` in the file; without them, True if the file name
            contains "dc5".
        attention_heads: None: from the `args` in the file; without them, the paper's 8.
        id2label: class names. None: COCO's if there are 91 classes, those of COCO panoptic with its stuff if there are
            250, else `LABEL_0`, ...

    Returns:
        the model in evaluation mode, and one sentence per assumption that was made and per part that was dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of these projects, is a variant that none of them has published, or holds
            more than tensors (no code in it has run).
    """
    file = Path(file)
    state, args = _read(file)
    notes: list[str] = []
    try:
        renamed, values = _rename(state)
        values |= _read_sizes(renamed, has_no_object="class_activation" not in values) | _temperature(values, args)
    except KeyError as error:
        raise ValueError(f"{file} is not a checkpoint of {PROJECTS}: it has no {error}.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if "denoising_groups" in values:
        notes.append(
            'DN-DETR: its embedding of "no label" is the content of the anchors; training continues with '
            f"{DENOISING_GROUPS} denoising groups."
        )
    if dilation is None:
        dilation = getattr(args, "dilation", None)
        origin = "the args in the file"
    else:
        origin = "the caller"
    if dilation is None:
        dilation, origin = "dc5" in file.name.lower(), "the file's name"
    notes.append(f"Backbone {values['backbone']}{' with DC5' if dilation else ', not dilated'}, according to {origin}.")
    heads = attention_heads or getattr(args, "nheads", 8)
    if id2label is None:
        id2label = {len(names): names for names in (coco_labels(), panoptic_labels())}.get(values["num_labels"])
        if values["num_labels"] == NUM_PANOPTIC:
            values["stuff_labels"] = stuff_of_coco(panoptic_labels())
    if id2label is not None:
        if len(id2label) != values["num_labels"]:
            raise ValueError(f"{file} has {values['num_labels']} classes, but there are {len(id2label)} names.")
        del values["num_labels"]
        values |= {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    config = DetrConfig(dilation=dilation, encoder_attention_heads=heads, decoder_attention_heads=heads, **values)
    has_masks = any(name.startswith("mask_head.") for name in renamed)
    model = (DetrForSegmentation if has_masks else DetrForDetection)(config).eval()
    result = model.load_state_dict(renamed, strict=False)
    counts = [name for name in result.unexpected_keys if name.endswith("num_batches_tracked")]
    unknown = [name for name in result.unexpected_keys if name not in counts]
    if result.missing_keys or unknown:
        raise ValueError(
            f"{file} does not fit: {len(result.missing_keys)} weights are missing {result.missing_keys[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}."
        )
    return model, notes


def _temperature(values: dict[str, Any], args: Any) -> dict[str, float]:
    """Of the sines of DAB-DETR, if a training run wrote it.

    Raises:
        ValueError: height and width have different ones.
    """
    height, width = (getattr(args, f"pe_temperature{side}", None) for side in "HW")
    if height != width:
        raise ValueError(f"Its sines have the temperatures {height} and {width} for height and width; ours have one.")
    return {} if height is None or values.get("query_type") != "dab" else {"position_temperature": height}


def _read(file: Path) -> tuple[dict[str, Tensor], Any]:
    if not file.is_file():
        raise FileNotFoundError(f"No checkpoint at {file}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # which one depends on the content, if the file is not a pickle
        raise ValueError(f"{file} cannot be read as weights, and nothing in it was run: {error}") from error
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f'{file} is not a checkpoint of {PROJECTS}: those hold {{"model": {{name: tensor}}}}.')
    return state, content.get("args")


def _rename(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights under our names, and the fields of the config that the kind of decoder defines.

    Raises:
        ValueError: a variant of DAB-DETR that ours does not have.
    """
    kind = _decoder_of(state)
    name_of_points = {"conditional": "reference_point", "dab": "anchor_embedding"}.get(kind)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        name = name.replace("decoder.ref_point_head.", f"decoder.{name_of_points}.")  # noqa: PLW2901
        attention, fused, of_layer = name.partition(".in_proj_")
        if fused:  # one (3d, d) matrix for query, key and value
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{attention}.{projection}_proj.{of_layer}"] = part
        else:
            renamed[name] = tensor
    if kind == "learned":
        return renamed, {}
    fields: dict[str, Any] = SIGMOID_FIELDS | {"query_type": kind, "class_cost": 2, "class_loss_coefficient": 2}
    if kind == "dab":
        has_prelu = any(name.endswith(".activation_fn.weight") for name in renamed)
        fields |= {"activation_function": "prelu" if has_prelu else "relu"}
        fields |= {"modulate_attention": "model.decoder.reference_size.layers.0.weight" in renamed}
    labels = renamed.pop("label_enc.weight", None)
    patterns = renamed.pop("model.patterns.weight", None)
    if labels is not None:  # DN-DETR: a class, the last one of queries without one, and a channel that tells them apart
        embeddings = torch.cat((labels, labels.new_ones(len(labels), 1)), dim=1)
        renamed["denoising.class_embedding.weight"] = embeddings[:-1]
        unknown = torch.cat((labels[-1], labels.new_zeros(1)))[None]
        patterns = unknown if patterns is None else unknown + patterns
        fields["denoising_groups"] = DENOISING_GROUPS
    if patterns is not None:
        renamed["model.patterns.weight"] = patterns
        fields["num_patterns"] = len(patterns)
    return renamed, fields


def _decoder_of(state: dict[str, Tensor]) -> str:
    """`query_type` of a checkpoint.

    Raises:
        ValueError: a variant of DAB-DETR that ours does not have.
    """
    if "transformer.decoder.layers.0.sa_qcontent_proj.weight" not in state:
        return "learned"
    if "refpoint_embed.weight" not in state:
        return "conditional"
    if state["refpoint_embed.weight"].shape[1] != 4:
        raise ValueError("Its queries are points; those of DAB-DETR's published checkpoints are boxes.")
    if "transformer.encoder.norm.weight" in state:
        raise ValueError("A norm closes its encoder (pre_norm), which no published checkpoint of DAB-DETR has.")
    if any(name.startswith("bbox_embed.0.") for name in state):
        raise ValueError("Each of its decoder layers has a box head of its own; ours share one, as published.")
    if "transformer.decoder.layers.1.ca_qpos_proj.weight" in state:
        raise ValueError("All of its layers add positions to contents (keep_query_pos); ours do so in the first only.")
    return "dab"


def _read_sizes(state: dict[str, Tensor], *, has_no_object: bool) -> dict[str, Any]:
    """The fields of the config that follow from the names and shapes of the weights."""
    backbone = "model.backbone.model."
    names = [name.removeprefix(backbone) for name in state if name.startswith(f"{backbone}layer")]
    blocks = {".".join(name.split(".")[:2]) for name in names}
    depths = Counter(name.split(".")[0] for name in blocks)
    bottleneck = f"{backbone}layer1.0.conv3.weight" in state
    network = RESNETS.get((bottleneck, tuple(depths[f"layer{i}"] for i in range(1, 5))))
    if network is None:
        raise ValueError(
            f"The backbone is not a ResNet that timm has a name for: its stages have {dict(depths)} blocks."
        )
    layers = Counter(re.sub(r"^model\.(\w+)\.layers\.\d+\.self_attn\.q_proj\.weight$", r"\1", name) for name in state)
    return {
        "backbone": network,
        "num_labels": len(state["class_labels_classifier.weight"]) - has_no_object,
        "num_queries": len(state["model.query_position_embeddings.weight"]),
        "d_model": len(state["model.input_projection.weight"]),
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "encoder_ffn_dim": len(state["model.encoder.layers.0.mlp.fc1.weight"]) if layers["encoder"] else 2048,
        "decoder_ffn_dim": len(state["model.decoder.layers.0.mlp.fc1.weight"]),
        "pre_norm": "model.encoder.layernorm.weight" in state,
        "position_embedding_type": "learned" if "model.position_embedding.row_embeddings.weight" in state else "sine",
    }
