"""`DetrConfig`: every number that defines a DETR, with its meaning and its check."""

from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DetrConfig(PreTrainedConfig):
    r"""
    Configuration of [`DetrModel`] and [`DetrForDetection`]. The defaults are the paper's DETR-R50 (arXiv 2005.12872).
    Fields are named as in transformers' `DetrConfig` wherever both have them.

    Args:
        backbone: name of any timm network that supports `features_only=True`.
        backbone_kwargs: further keyword arguments for `timm.create_model`, e.g. `{"drop_path_rate": 0.1}`.
        num_channels: channels of the input images.
        dilation: stride of the backbone's last stage replaced by dilation, the paper's DC5 (output stride 16).
        feature_stride: which feature level feeds the transformer: the deepest one whose stride to the input is this
            many pixels. `None` takes the deepest level, as the paper does.
        freeze_batch_norm: batch-norm statistics and affine parameters stay fixed, the paper's setting. Training a
            backbone from random weights needs `False`.
        frozen_stages: how much of the backbone does not train. `-1` nothing, `0` the stem, `n` the stem and the
            first `n` stages. The paper trains from the second stage on (`1`).
        num_queries: object queries, the largest number of objects found in one image.
        d_model: width of the transformer.
        encoder_layers, decoder_layers: number of layers.
        encoder_attention_heads, decoder_attention_heads: attention heads per layer; they must divide `d_model`.
        encoder_ffn_dim, decoder_ffn_dim: hidden width of the feed-forward blocks.
        activation_function: activation of the feed-forward blocks, a name transformers knows.
        dropout: on the output of every attention and feed-forward block (paper, section A.4).
        attention_dropout: on the attention weights.
        activation_dropout: after the activation of the feed-forward blocks.
        pre_norm: layer norm before each block instead of after it; one more norm then closes the encoder.
        position_embedding_type: `"sine"` or `"learned"`.
        init_xavier_std: gain of the Xavier-uniform initialisation of the transformer's matrices.
        auxiliary_loss: each decoder layer gets its own loss when labels are given. Predictions do not depend on it.
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        bbox_loss_coefficient, giou_loss_coefficient: weights of the box losses; the class loss has weight 1.
        eos_coefficient: weight of the no-object class in the class loss.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or an impossible value.
    """

    model_type = "hf_detr"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    # How to read the config of another model type; filled by `hf_detr.interop`.
    translations: ClassVar[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

    backbone: str = "resnet50"
    backbone_kwargs: dict[str, Any] | None = None
    num_channels: int = 3
    dilation: bool = False
    feature_stride: int | None = None
    freeze_batch_norm: bool = True
    frozen_stages: int = 1

    num_queries: int = 100
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    pre_norm: bool = False
    position_embedding_type: str = "sine"
    init_xavier_std: float | int = 1.0
    is_encoder_decoder: bool = True

    auxiliary_loss: bool = True
    class_cost: float | int = 1
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    eos_coefficient: float | int = 0.1

    @classmethod
    def translate(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """A config as it is written in any DETR checkpoint to our fields.

        Raises:
            ValueError: it belongs to another kind of model.
        """
        model_type = stored.get("model_type", cls.model_type)
        if model_type == cls.model_type:
            return stored
        if model_type not in cls.translations:
            known = ", ".join(f'"{name}"' for name in (cls.model_type, *cls.translations))
            raise ValueError(f'This is a checkpoint of a "{model_type}" model. hf_detr reads {known}.')
        return cls.translations[model_type](stored) | {"model_type": cls.model_type}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        stored, unused = super().get_config_dict(*args, **kwargs)
        try:
            return cls.translate(stored), unused
        except ValueError as error:
            raise ValueError(f"{args[0] if args else 'The config'}: {error}") from error

    def validate_positive_sizes(self) -> None:
        for name in ("num_channels", "num_queries", "d_model", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.encoder_layers < 0:
            raise ValueError(f"`encoder_layers` must not be negative, got {self.encoder_layers}.")
        if self.frozen_stages < -1:
            raise ValueError(f"`frozen_stages` must be -1 (nothing frozen) or more, got {self.frozen_stages}.")

    def validate_width(self) -> None:
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, name)
            if heads < 1 or self.d_model % heads:
                raise ValueError(f"`d_model` ({self.d_model}) must be a multiple of `{name}` ({heads}).")
        if self.d_model % 4:
            raise ValueError(
                f"`d_model` ({self.d_model}) must be a multiple of 4: a position is sines and cosines of x and of y."
            )

    def validate_position_embedding_type(self) -> None:
        if self.position_embedding_type not in ("sine", "learned"):
            raise ValueError(
                f'`position_embedding_type` must be "sine" or "learned", got "{self.position_embedding_type}".'
            )

    def validate_costs(self) -> None:
        costs = (self.class_cost, self.bbox_cost, self.giou_cost)
        if min(costs) < 0 or max(costs) == 0:
            raise ValueError(f"Matching costs must not be negative and not all 0, got class, bbox, giou = {costs}.")


__all__ = ["DetrConfig"]
