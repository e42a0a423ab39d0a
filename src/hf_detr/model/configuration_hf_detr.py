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
        query_type: `"learned"`, the paper's queries, or `"anchor"`: queries are boxes (x, y, w, h) that start attention
            at their place, and that every decoder layer moves, `box = sigmoid(head + inverse_sigmoid(anchor))`
            (DAB-DETR, arXiv 2201.12329; cross-attention scores are content · content + place · place, arXiv
            2108.06152). Learns many times faster: the right choice wherever training does not start from a plain
            checkpoint.
        modulate_attention: with anchors, the sines of x are scaled by `wanted width / w` and those of y by
            `wanted height / h`, so that attention is as wide and as high as the box (DAB-DETR, equation 6). For
            objects of very different sizes.
        query_groups: in training, so many sets of `num_queries` queries that do not see each other, each matched to
            all objects; the loss is the mean over the sets, and the first one predicts (Group DETR, arXiv 2207.13085).
            Measured once here, 4 gave as much as the IoU-aware loss did. Decoder and matching work as many times. 1 is
            the paper.
        denoising_groups: in training, so many spoilt copies of the objects (centres moved, sides scaled, a fifth of the
            classes changed) as further queries that have to restore them, with the same loss and no matching (DN-DETR,
            arXiv 2203.01305). Needs anchors. For short trainings, in which the matching has no time to settle. Each
            copy costs as many decoder queries as an image has objects. 0 is the paper.
        dense_loss_coefficient: in training, weight of a loss that asks every cell of the feature map, before and after
            the encoder, for the object in whose middle it lies (after Co-DETR, arXiv 2211.12860; formula:
            [`~hf_detr.model.dense_supervision.DenseHead`]). With a backbone from random weights nothing speeds up learning
            as much. Costs one small head on all cells, twice. 0, the paper, is off; 1 is a good value.

            What each of these adds to a training step is measured in `benchmarks/README.md`.
        auxiliary_loss: each decoder layer gets its own loss when labels are given. Predictions do not depend on it.
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        bbox_loss_coefficient, giou_loss_coefficient: weights of the box losses.
        eos_coefficient: weight of the no-object class in the class loss.
        class_loss: `"cross_entropy"`, the paper's, `"focal"`, or `"iou_aware"`, whose scores tell how good the box is
            (formulas: [`~hf_detr.model.class_loss.class_loss`]). Costs nothing. The latter two ignore `eos_coefficient`, and
            want `prior_probability`. `"iou_aware"` goes with anchors or the dense loss: alone and from random weights,
            it learned more slowly than the paper's.
        class_loss_coefficient: weight of the class loss.
        prior_probability: an untrained model gives objects this probability (arXiv 1708.02002, section 4.1), so that
            it does not begin with unlearning: the bias of "no object" is `log(C (1 - p) / p)`, the others 0, for C
            classes. For the class losses other than the paper's; costs nothing. `None`, the paper, leaves it to chance.

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

    query_type: str = "learned"
    modulate_attention: bool = True
    query_groups: int = 1
    denoising_groups: int = 0
    dense_loss_coefficient: float | int = 0

    auxiliary_loss: bool = True
    class_cost: float | int = 1
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    eos_coefficient: float | int = 0.1
    class_loss: str = "cross_entropy"
    class_loss_coefficient: float | int = 1
    prior_probability: float | None = None

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

    def validate_accelerators(self) -> None:
        for name, known in (
            ("query_type", ("learned", "anchor")),
            ("class_loss", ("cross_entropy", "focal", "iou_aware")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name, least in (("query_groups", 1), ("denoising_groups", 0), ("dense_loss_coefficient", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.denoising_groups and self.query_type != "anchor":
            raise ValueError(
                '`denoising_groups` needs `query_type="anchor"`: a spoilt box is an anchor to start from, which a '
                "learned query has no place for."
            )
        if self.query_type == "anchor" and self.d_model % 8:
            raise ValueError(f"`d_model` ({self.d_model}) must be a multiple of 8 for anchors.")
        if self.query_type == "anchor" and self.position_embedding_type != "sine":
            raise ValueError(
                "Anchors are compared with the image's places by their sines: `position_embedding_type` must be "
                '"sine".'
            )
        if self.prior_probability is not None and not 0 < self.prior_probability < 1:
            raise ValueError(f"`prior_probability` must be between 0 and 1, got {self.prior_probability}.")

    def validate_costs(self) -> None:
        costs = (self.class_cost, self.bbox_cost, self.giou_cost)
        if min(costs) < 0 or max(costs) == 0:
            raise ValueError(f"Matching costs must not be negative and not all 0, got class, bbox, giou = {costs}.")


__all__ = ["DetrConfig"]
