"""Writing our models in transformers' format: files that plain transformers loads, with the same outputs."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DetrForObjectDetection,
    DetrImageProcessor,
    PreTrainedModel,
    TableTransformerForObjectDetection,
)

from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.pretrained import TRAINING_ONLY
from .transformers_checkpoints import PROCESSOR_FIELDS, SHARED_FIELDS

_TABLE_TRANSFORMER_NAMES = {
    r"^model\.backbone\.model\.": "model.backbone.conv_encoder.model.",
    r"^model\.position_embedding\.": "model.backbone.position_embedding.",
    r"\.o_proj\.": ".out_proj.",
    r"coder\.layers\.(\d+)\.mlp\.": r"coder.layers.\1.",
}


def to_transformers(model: DetrForDetection) -> PreTrainedModel:
    """Our model as transformers' `DetrForObjectDetection`, or, if it is pre-norm, `TableTransformerForObjectDetection`,
    with the same weights and the same outputs.

    Raises:
        ValueError: transformers cannot express the model: its DETR replaces every batch norm of the backbone by a
            frozen one with eps 1e-5 and no activation, which is wrong for many timm networks. Found by comparing
            outputs.
    """
    config = model.config
    if config.query_type != "learned":
        raise ValueError("transformers' DETR has no anchor queries; only models with learned queries fit.")
    backbone_config: dict[str, Any] = {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "num_channels": config.num_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [model.model.backbone._timm_kwargs["out_indices"][-1]],
    }
    if config.dilation:
        backbone_config["output_stride"] = 16
    if config.backbone_kwargs:
        raise ValueError(
            f"transformers has no place for backbone_kwargs={config.backbone_kwargs}: its DETR builds timm's "
            f'"{config.backbone}" as timm defines it.'
        )
    theirs_class = TableTransformerForObjectDetection if config.pre_norm else DetrForObjectDetection
    fields = {name: getattr(config, name) for name in SHARED_FIELDS if hasattr(config, name)}
    theirs = theirs_class(theirs_class.config_class(**fields, backbone_config=backbone_config)).eval()
    theirs.to(model.device, model.dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if config.pre_norm:
            for pattern, replacement in _TABLE_TRANSFORMER_NAMES.items():
                name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        trained_only = any(f"{part}." in name for part in TRAINING_ONLY)
        if not trained_only and not name.endswith("num_batches_tracked"):  # a count of trained batch norm
            state[name.replace("model.decoder.bbox_predictor.", "bbox_predictor.")] = tensor
    theirs.load_state_dict(state)
    _check_outputs(model, theirs)
    return theirs


@torch.no_grad()
def _check_outputs(ours: DetrForDetection, theirs: PreTrainedModel) -> None:
    """In float32 on copies, so that rounding in a narrower type is no difference."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, ours.config.num_channels, 128, 160, generator=generator).to(ours.device)
    a, b = deepcopy(ours).float().eval()(image), deepcopy(theirs).float().eval()(image)
    difference = max((a.logits - b.logits).abs().max().item(), (a.pred_boxes - b.pred_boxes).abs().max().item())
    if not difference < 1e-4:
        raise ValueError(
            f'transformers computes the backbone "{ours.config.backbone}" differently: outputs are off by '
            f"{difference:.2g}. Its DETR replaces batch norm by one with eps 1e-5 and without the activation that timm "
            "fuses into it."
        )


def save_for_transformers(model: DetrForDetection, processor: HfDetrImageProcessor, folder: str | Path) -> None:
    """Write model and processor as a checkpoint of transformers' DETR (Table Transformer, if pre-norm).

    Versions 4 and 5 of transformers both read it: it has the weight names of v4, and says which backbone it has as the
    published files do. v5 is needed if the transformer reads another level than the fifth, and for learned positions,
    which v5 has renamed without reading the old name.

    Raises:
        ValueError: see [`to_transformers`]. Nothing has been written then.
    """
    theirs = to_transformers(model)
    folder = Path(folder)
    theirs.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    network = config.pop("backbone_config")
    if network["out_indices"] == [4]:  # what both take when nothing else is said
        config |= {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": network["backbone"]}
    else:
        config["backbone_config"] = network
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    fields = {name: getattr(processor, name) for name in PROCESSOR_FIELDS}
    DetrImageProcessor(**fields).save_pretrained(folder)
