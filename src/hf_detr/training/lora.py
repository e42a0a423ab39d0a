"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a trained detector, with PEFT."""

from copy import deepcopy

from ..model.modeling_hf_detr import DetrForDetection
from ..runtime.extras import import_extra

# All linear maps of the transformer, and `input_projection`, a 1x1 convolution that selects features of the frozen
# backbone.
TARGETS = (
    r"model\.(encoder|decoder)\.layers\.\d+\.(self_attn|encoder_attn|mlp)\.(\w+_proj|fc\d)|model\.input_projection"
)
# Not adapted but trained: small modules, among them those that depend on the classes or may be new (random) in a
# checkpoint that is adapted.
FULLY_TRAINED = (
    "class_labels_classifier",
    "bbox_predictor",
    "query_position_embeddings",
    "patterns",
    "dense_head",
    "mask_head",
    "bbox_attention",
    "proposals",
    "denoising",
)


def add_lora(model: DetrForDetection, rank: int) -> DetrForDetection:
    """Add low-rank adapters to the transformer of a trained detector and freeze its weights, in place.

    Every linear map W of attention and feed-forward layers, and the input projection, becomes W + 2·B·A, with B
    (outputs, rank) initially zero, so that predictions are unchanged at first. Class head, box head, mask head, object
    queries and modules that exist in training only are trained fully. Everything else is frozen: the backbone with the
    statistics of its batch norms, layer norms, position embeddings and the position networks of the anchor decoder.

    Args:
        model: from a checkpoint.
        rank: of the updates, such as 8 or 16.

    Returns:
        the same model, still a [`DetrForDetection`]. Save [`merge_lora`] of it as a checkpoint.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `rank` is not positive, or the model has adapters already.
    """
    peft = import_extra("peft", "lora")
    if rank < 1:
        raise ValueError(f"The rank of LoRA must be at least 1, got {rank}.")
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters already. Merge them first: `merge_lora(model)`.")
    # injected instead of wrapped: names and attributes of the model stay, for parameter groups and evaluation
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_("lora_" in name or not set(parts).isdisjoint(FULLY_TRAINED))
    model.model.backbone.freeze_batch_norm()
    model.config.freeze_batch_norm = True
    return model


def merge_lora(model: DetrForDetection) -> DetrForDetection:
    """A copy with the adapters of [`add_lora`] merged into its weights: a plain model that is saved and loaded without
    PEFT. `model` is unchanged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain.set_submodule(name, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    plain.requires_grad_(True)
    plain.model.backbone.freeze()
    return plain
