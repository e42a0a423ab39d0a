"""Write our models as checkpoints of transformers' own DETR, which give the same outputs there."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    DetrForObjectDetection,
    DetrImageProcessor,
    PreTrainedModel,
    TableTransformerForObjectDetection,
)
from transformers.utils import logging

from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.pretrained import TRAINING_ONLY
from ..model.segmentation import DetrForSegmentation
from .transformers_checkpoints import OUR_BOX_HEAD, PROCESSOR_FIELDS, SHARED_FIELDS, THEIR_BOX_HEAD

logger = logging.get_logger(__name__)

_TABLE_TRANSFORMER_NAMES = {
    r"^model\.backbone\.model\.": "model.backbone.conv_encoder.model.",
    r"^model\.position_embedding\.": "model.backbone.position_embedding.",
    r"\.o_proj\.": ".out_proj.",
    r"coder\.layers\.(\d+)\.mlp\.": r"coder.layers.\1.",
}


def to_transformers(model: DetrForDetection) -> PreTrainedModel:
    """Convert our model to transformers' `DetrForObjectDetection`, one with masks to its `DetrForSegmentation`, or a
    pre-norm one to `TableTransformerForObjectDetection`, with the same weights and the same outputs.

    Raises:
        ValueError: transformers' DETR has no counterpart of the model: it has no anchors, no `backbone_kwargs` and no
            pre-norm model with masks, and it replaces all batch norms of the backbone by frozen ones with eps 1e-5 and
            without activation, which changes many timm networks. The latter is detected by comparing outputs.
    """
    config = model.config
    if config.query_type != "learned":
        raise ValueError("transformers' DETR has no anchors: only models with learned queries can be converted.")
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
    has_masks = isinstance(model, DetrForSegmentation)
    if has_masks and config.pre_norm:
        raise ValueError("transformers has masks for its DETR only, which has no pre-norm: keep the model as it is.")
    theirs_class: Any = TableTransformerForObjectDetection if config.pre_norm else DetrForObjectDetection
    if has_masks:
        theirs_class = transformers.DetrForSegmentation
    fields = {name: getattr(config, name) for name in SHARED_FIELDS if hasattr(config, name)}
    theirs = theirs_class(theirs_class.config_class(**fields, backbone_config=backbone_config)).eval()
    theirs.to(model.device, model.dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if config.pre_norm:
            for pattern, replacement in _TABLE_TRANSFORMER_NAMES.items():
                name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        training_only = any(f"{part}." in name for part in TRAINING_ONLY)
        if not training_only and not name.endswith("num_batches_tracked"):  # frozen batch norms have no such counter
            name = re.sub(f"^{re.escape(OUR_BOX_HEAD)}", THEIR_BOX_HEAD, name)  # noqa: PLW2901
            prefix = "detr." if has_masks and not name.startswith(("mask_head.", "bbox_attention.")) else ""
            state[prefix + name] = tensor
    theirs.load_state_dict(state)
    _check_outputs(model, theirs)
    return theirs


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
    """Write model and processor as a checkpoint of transformers' DETR, or Table Transformer if the model is pre-norm.

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
    if network["out_indices"] in ([4], [1, 2, 3, 4]):  # the default of both versions
        config |= {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": network["backbone"]}
    else:
        config["backbone_config"] = network
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    fields = {name: getattr(processor, name) for name in PROCESSOR_FIELDS}
    DetrImageProcessor(**fields).save_pretrained(folder)
