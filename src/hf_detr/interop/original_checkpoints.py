"""Read the checkpoints of the paper's own code, facebookresearch/detr: `detr-r50`, `detr-r101` and their `-dc5`, for
boxes and `-panoptic`.

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
from .transformers_checkpoints import MASK_HEAD, NUM_PANOPTIC, OUR_BOX_HEAD, RESNETS, STUFF, stuff_of_coco

# {pattern: replacement}, applied in turn.
_NAMES = {
    r"^detr\.": "",  # the prefix of the detector in the panoptic model
    r"^transformer\.(encoder|decoder)\.norm\.": r"model.\1.layernorm.",
    r"^transformer\.": "model.",
    r"^(model\.\w+\.layers\.\d+)\.norm1\.": r"\1.self_attn_layer_norm.",
    r"^(model\.encoder\.layers\.\d+)\.norm2\.": r"\1.final_layer_norm.",
    r"^(model\.decoder\.layers\.\d+)\.norm2\.": r"\1.encoder_attn_layer_norm.",
    r"^(model\.decoder\.layers\.\d+)\.norm3\.": r"\1.final_layer_norm.",
    r"\.multihead_attn\.": ".encoder_attn.",
    r"\.out_proj\.": ".o_proj.",
    r"\.linear([12])\.": r".mlp.fc\1.",
    r"^query_embed\.": "model.query_position_embeddings.",
    r"^input_proj\.": "model.input_projection.",
    r"^class_embed\.": "class_labels_classifier.",
    r"^bbox_embed\.": OUR_BOX_HEAD,
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
    """Load a checkpoint of facebookresearch/detr into our model, one with a mask head into a [`DetrForSegmentation`].

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
        ValueError: it is not a checkpoint of facebookresearch/detr, or holds more than tensors (no code in it has run).
    """
    file = Path(file)
    state, args = _read(file)
    notes: list[str] = []
    renamed = _rename(state)
    try:
        values = _read_sizes(renamed)
    except KeyError as error:
        raise ValueError(f"{file} is not a checkpoint of facebookresearch/detr: it has no {error}.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None

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
        raise ValueError(
            f'{file} is not a checkpoint of facebookresearch/detr: those hold {{"model": {{name: tensor}}}}.'
        )
    return state, content.get("args")


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        attention, fused, kind = name.partition(".in_proj_")
        if fused:  # one (3d, d) matrix for query, key and value
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{attention}.{projection}_proj.{kind}"] = part
        else:
            renamed[name] = tensor
    return renamed


def _read_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
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
        "num_labels": len(state["class_labels_classifier.weight"]) - 1,
        "num_queries": len(state["model.query_position_embeddings.weight"]),
        "d_model": state["model.query_position_embeddings.weight"].shape[1],
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "encoder_ffn_dim": len(state["model.encoder.layers.0.mlp.fc1.weight"]) if layers["encoder"] else 2048,
        "decoder_ffn_dim": len(state["model.decoder.layers.0.mlp.fc1.weight"]),
        "pre_norm": "model.encoder.layernorm.weight" in state,
        "position_embedding_type": "learned" if "model.position_embedding.row_embeddings.weight" in state else "sine",
    }
