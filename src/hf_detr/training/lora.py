"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a trained detector, with PEFT."""

from copy import deepcopy

from ..model.modeling_hf_detr import DetrForDetection
from ..runtime.extras import import_extra

# The linear maps of the transformer. `input_projection`, a 1x1 convolution, is one more: behind a frozen backbone it is
# what can choose other features, and by rank it costs little of the half million weights that it has.
TARGETS = (
    r"model\.(encoder|decoder)\.layers\.\d+\.(self_attn|encoder_attn|mlp)\.(\w+_proj|fc\d)|model\.input_projection"
)
# Trained in full: what depends on the classes or may start at random (see `resize_class_head`, `resize_queries` and
# options that the checkpoint did not have), and is small or has no full rank to be low against.
TRAINED_IN_FULL = (
    "class_labels_classifier",
    "bbox_predictor",
    "query_position_embeddings",
    "further_query_groups",
    "dense_head",
    "denoising_content",
)


def add_lora(model: DetrForDetection, rank: int) -> DetrForDetection:
    """Freeze a trained detector but for low-rank updates of its transformer, and its heads; in place.

    Every linear map W of the transformer's attention and feed-forward layers, and the input projection, becomes
    W + 2·B·A, with B (outputs, rank) zero at first, so that predictions begin as they were. Class head, box head,
    object queries, and what exists in training only train in full. All else is frozen: the backbone, whose batch norms
    no longer gather statistics either; norms; and what knows geometry only (position embeddings, and the small
    networks of the anchor decoder).

    Args:
        model: from a checkpoint. One with random weights has nothing to adapt.
        rank: of the updates, such as 8 or 16.

    Returns:
        the model, still a [`DetrForDetection`] with everything that has, but checkpoints are written of [`merged`].

    Raises:
        ImportError: PEFT is not installed.
        ValueError: `rank` is not positive, or the model has adapters already.
    """
    peft = import_extra("peft", "lora")
    if rank < 1:
        raise ValueError(f"The rank of LoRA must be at least 1, got {rank}.")
    if hasattr(model, "peft_config"):
        raise ValueError("The model has adapters already. Merge them first: `merged(model)`.")
    # injected, not wrapped: names and attributes stay those of the model, for the optimizer's groups and for evaluation
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_("lora_" in name or not set(parts).isdisjoint(TRAINED_IN_FULL))
    model.model.backbone.freeze_batch_norm()
    model.config.freeze_batch_norm = True
    return model


def merged(model: DetrForDetection) -> DetrForDetection:
    """A copy with the updates of [`add_lora`] added into the weights: a plain model to save, which loads without PEFT.
    `model` is not touched."""
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
