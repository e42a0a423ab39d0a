"""`DetrConfig`: the fields that define a DETR, with their meaning and the checks of their values."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .foreign import import_interop

logger = logging.get_logger(__name__)

# Fields of transformers' `DetrConfig` that ours does not have: the values that change nothing (None: translated), and
# why others are refused.
FIELDS_OF_TRANSFORMERS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "backbone_config": (None, ""),
    "use_timm_backbone": (None, ""),
    "use_pretrained_backbone": ((False,), "load weights with DetrForDetection.from_pretrained_backbone(config)"),
    "encoder_layerdrop": ((0, 0.0), "this model does not skip layers in training"),
    "decoder_layerdrop": ((0, 0.0), "this model does not skip layers in training"),
    "train_backbone": ((True,), "call model.freeze_backbone()"),
    "init_std": ((0.02,), "initial weights are the paper's; `init_xavier_std` scales them"),
}
QUERIES_ARE_BOXES = ("anchor", "dab")  # values of `query_type`
RETIRED = ("query_groups",)  # fields of version 0.1 that changed training only
# What transformers itself passes to a config or writes into `config.json`, beside the fields that all configs have.
NAMES_OF_TRANSFORMERS = (
    "_attn_implementation", "_commit_hash", "_name_or_path", "attn_implementation", "auto_map", "custom_pipelines",
    "experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config",
    "quantization_config", "torch_dtype", "use_cache",
)  # fmt: skip


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for a name that is not known, with the nearest that is."""
    known = set(known)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"{owner} has no {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""))


@strict
class DetrConfig(PreTrainedConfig):
    r"""
    Configuration of [`DetrModel`] and [`DetrForDetection`]. The defaults are the paper's DETR-R50 (arXiv 2005.12872).
    Fields have the names of transformers' `DetrConfig` wherever both have them. What the options for training cost and
    gain is measured in `benchmarks/README.md`.

    Args:
        backbone: name of any timm network that supports `features_only=True`.
        backbone_kwargs: further keyword arguments of `timm.create_model`, e.g. `{"drop_path_rate": 0.1}`.
        num_channels: channels of the input images.
        dilation: replace the stride of the backbone's last stage by dilation: output stride 16, the paper's DC5.
        feature_stride: stride, in input pixels, of the feature level that feeds the transformer; the deepest level with
            this stride is used. `None`: the deepest level of all, as in the paper.
        freeze_batch_norm: keep the statistics and affine parameters of batch norms fixed, as in the paper. Use `False`
            to train a backbone from random weights.
        frozen_stages: number of backbone stages whose weights are frozen: `-1` none, `0` the stem, `n` the stem and
            the first `n` stages. The paper freezes the stem and the first stage (`1`).
        num_queries: number of object queries, each of which gives at most one detection (with
            `class_activation="sigmoid"`, one per class).
        num_patterns: `"anchor"` and `"dab"` only: number of learned content vectors. Every anchor is combined with each
            of them, so that objects at the same place have several queries (DAB-DETR's code; arXiv 2109.07107). 0: one
            query per anchor, whose content is zero. There are `num_predictions` queries in all.
        d_model: width of the transformer.
        encoder_layers, decoder_layers: number of layers.
        encoder_attention_heads, decoder_attention_heads: attention heads per layer; each must divide `d_model`.
        encoder_ffn_dim, decoder_ffn_dim: hidden width of the feed-forward blocks.
        activation_function: activation of the feed-forward blocks, by its name in transformers.
        dropout: dropout on the output of every attention and feed-forward block (paper, section A.4).
        attention_dropout: dropout on the attention weights.
        activation_dropout: dropout after the activation of the feed-forward blocks.
        pre_norm: apply layer norm before each block instead of after it; an additional norm then closes the encoder.
        norm_between_layers: `"learned"` and `"conditional"` only: each decoder layer reads the normed output of the
            layer before it, and the last output is normed twice. This is what transformers' models do with
            `auxiliary_loss=True`, so checkpoints that they have trained that way need it; leave it `False` otherwise.
        position_embedding_type: `"sine"` or `"learned"`, the spatial position embeddings of the feature map.
        position_temperature: of these sines; at a lower one, neighbouring locations differ more. `None`: as published
            for the `query_type`, 10000, or 20 for `"anchor"` and `"dab"`.
        init_xavier_std: gain of the Xavier-uniform initialization of the transformer's matrices.
        query_type: `"learned"`: the paper's learned object queries. `"anchor"`: each query is a box (cx, cy, w, h) from
            which its attention starts and which every decoder layer refines (DAB-DETR, arXiv 2201.12329; formula:
            `relative_boxes`), with cross-attention scores
            `content · content + position · position` (Conditional DETR, arXiv 2108.06152). Anchors converge many times
            faster; prefer them unless training starts from a checkpoint with other queries. `"conditional"` and `"dab"`
            are the decoders of Conditional DETR and DAB-DETR as published, for their checkpoints; `"dab"` also scales
            the positions in the encoder.
        modulate_attention: `"anchor"` and `"dab"` only: scale the sine embeddings of x by `predicted width / w` and
            those of y by `predicted height / h`, which fits the extent of attention to the box (DAB-DETR, equation 6).
            Use it for objects of very different sizes.
        relative_boxes: with anchors or the dense loss: boxes are refined by offsets in units of their own sides (Faster
            R-CNN, arXiv 1506.01497, equation 2), and every location starts from a box of the same size in pixels. The
            offsets for an object then do not depend on its position or on the image size, which is far easier to learn
            from few images. `False`: offsets of the logits of the coordinates, as in DAB-DETR (formulas:
            [`~hf_detr.model.heads.BoxHead`]).
        query_proposals: `"anchor"` only: the queries of an image start at its most confident locations. Each location
            of the encoder's output predicts a class and a box; the boxes of the best `num_queries` are the anchors,
            their feature vectors the content (two stages, arXiv 2010.04159, section 4.2; see
            [`~hf_detr.model.proposals.Proposals`]). Needs `dense_loss_coefficient`, which trains the locations. Use it
            with a `class_cost` of 6: what distinguishes queries at the same object is their score.
        denoising_groups: training only, needs `"anchor"` or `"dab"`: number of noised copies of the ground-truth boxes
            (shifted centers, scaled sides, a fifth of the labels flipped). They enter the decoder as extra queries that
            are trained to restore their object, with the same loss and without matching (DN-DETR, arXiv 2203.01305).
            Each group adds as many queries as the image has objects. Use it for short schedules. 0 (the paper) is off.
        dense_loss_coefficient: training only: weight of an auxiliary loss on every location of the feature map, before
            and after the encoder. A location predicts the object in whose central region it lies (after Co-DETR, arXiv
            2211.12860; formula: [`~hf_detr.model.dense_supervision.DenseHead`]). Use it above all with a backbone from
            random weights. 0 (the paper) is off; 1 is a good value.
        auxiliary_loss: add the losses of all earlier decoder layers. Predictions do not depend on it.
        class_cost, bbox_cost, giou_cost: weights of the class, L1 and GIoU terms of the matching cost.
        bbox_loss_coefficient, giou_loss_coefficient: weights of the L1 and GIoU losses.
        mask_loss_coefficient, dice_loss_coefficient: weights of the focal and the dice loss of masks, which only
            [`~hf_detr.model.segmentation.DetrForSegmentation`] has.
        eos_coefficient: weight of the no-object class in the class loss `"cross_entropy"`.
        class_activation: how logits become scores. `"softmax"` (the paper): the classes and "no object" exclude each
            other. `"sigmoid"` (Conditional DETR and what follows it): one independent score per class, without "no
            object"; a query may give several detections. Needs `class_loss` `"focal"` or `"iou_aware"`.
        class_loss: `"cross_entropy"` (the paper), `"focal"`, or `"iou_aware"`, which trains the score to reflect the
            IoU of the box (formulas: [`~hf_detr.model.class_loss.CLASS_LOSSES`]). Set `prior_probability` with the
            latter two. `"iou_aware"` is meant for anchors or the dense loss; with neither, and from random weights, it
            converges more slowly than `"cross_entropy"`.
        class_loss_coefficient: weight of the class loss.
        class_weights: weight of the objects of a class in the class loss, by name of the class, such as
            `{"rare": 5}`; classes that are not named have weight 1. Matching does not use them.
        stuff_labels: names of the classes that are stuff in panoptic segmentation, such as `"sky"`: all that an image
            has of such a class is one segment. `None`: all classes are things.
        prior_probability: probability p that an untrained model assigns to all C classes together (arXiv 1708.02002,
            section 4.1): the bias of no-object starts at `log(C (1 - p) / p)`, all others at 0; with
            `class_activation="sigmoid"`, p is the probability of each class: all biases start at `log(p / (1 - p))`.
            Use it with the class losses `"focal"` and `"iou_aware"`. `None` (the paper): PyTorch's random biases.
        mask_attention_gain: factor on the initial weights of the mask head's first convolution that are applied to
            attention maps. The maps of a query sum to 1 over heads and locations, so their values are small compared
            with the features. 1 is the paper; 256 is a good value.

    Fields of transformers' `DetrConfig` that say the same in other words (`backbone_config`, `use_timm_backbone`) are
    translated; those that this model does not have are refused unless they are off.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or an invalid value.
        TypeError: there is no such field.
        ValueError: a field of transformers' has a value that this model does not support.
    """

    model_type = "hf_detr"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    backbone: str = "resnet50"
    backbone_kwargs: dict[str, Any] | None = None
    num_channels: int = 3
    dilation: bool = False
    feature_stride: int | None = None
    freeze_batch_norm: bool = True
    frozen_stages: int = 1

    num_queries: int = 100
    num_patterns: int = 0
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
    norm_between_layers: bool = False
    position_embedding_type: str = "sine"
    position_temperature: float | int | None = None
    init_xavier_std: float | int = 1.0
    is_encoder_decoder: bool = True

    query_type: str = "learned"
    modulate_attention: bool = True
    relative_boxes: bool = False
    query_proposals: bool = False
    denoising_groups: int = 0
    dense_loss_coefficient: float | int = 0

    auxiliary_loss: bool = True
    class_cost: float | int = 1
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    mask_loss_coefficient: float | int = 1
    dice_loss_coefficient: float | int = 1
    eos_coefficient: float | int = 0.1
    class_activation: str = "softmax"
    class_loss: str = "cross_entropy"
    class_loss_coefficient: float | int = 1
    class_weights: dict[str, float | int] | None = None
    stuff_labels: list[str] | None = None
    prior_probability: float | None = None
    mask_attention_gain: float | int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        theirs = {name: kwargs.pop(name) for name in FIELDS_OF_TRANSFORMERS if name in kwargs}
        known = {*(field.name for field in fields(self)), *self.attribute_map, *NAMES_OF_TRANSFORMERS}
        refuse_unknown(type(self).__name__, kwargs, known)
        if any(value is not None for value in theirs.values()):
            self._take_over(theirs)
        super().__post_init__(**kwargs)
        label2id: dict[str, int] | None = getattr(self, "label2id", None)
        if label2id is None and self.id2label is not None:  # not derived by transformers
            self.label2id = {name: index for index, name in reversed(self.id2label.items())}

    def _take_over(self, theirs: dict[str, Any]) -> None:
        """Set the fields that transformers' names stand for.

        Raises:
            ValueError: a value is not supported.
        """
        for name, (harmless, reason) in FIELDS_OF_TRANSFORMERS.items():
            value = theirs.get(name)
            if value is not None and harmless is not None and value not in harmless:
                raise ValueError(f"{name}={value!r}: {reason}.")
        nested, is_timm = theirs.get("backbone_config"), theirs.get("use_timm_backbone")
        if nested is None and is_timm is not False:
            return
        if not (nested is None or isinstance(nested, dict) or hasattr(nested, "to_dict")):
            raise ValueError(
                f"backbone_config={nested!r}: it must be a config or a dict. timm's names are for `backbone`."
            )
        nested = nested if nested is None or isinstance(nested, dict) else nested.to_dict()
        if nested and nested.get("use_pretrained_backbone"):
            logger.warning_once(
                "use_pretrained_backbone of backbone_config has no effect here: DetrForDetection(config) starts from "
                "random weights, DetrForDetection.from_pretrained_backbone(config) from pretrained ones."
            )
        own = {"model_type": "detr", "backbone": self.backbone, "backbone_kwargs": self.backbone_kwargs}
        translated = import_interop("transformers' backbone_config").read_config(
            own | {"backbone_config": nested, "use_timm_backbone": is_timm}
        )
        for name in ("backbone", "backbone_kwargs", "dilation", "feature_stride", "num_channels"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if name in translated and translated[name] != value:
                if value != default and (nested or name != "backbone"):
                    raise ValueError(f"{name}={value!r} contradicts the backbone, which has {translated[name]!r}.")
                setattr(self, name, translated[name])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, for the config of any DETR checkpoint.

        Raises:
            TypeError: `kwargs` has a name that is not a field.
        """
        returns_unused = kwargs.get("return_unused_kwargs", False)
        stored = cls._without_unknown(cls.translate(config_dict))
        config, unused = super().from_dict(stored, **kwargs | {"return_unused_kwargs": True})
        config.validate()
        if returns_unused:
            return config, unused
        refuse_unknown(cls.__name__, unused, {*(field.name for field in fields(cls)), *NAMES_OF_TRANSFORMERS})
        return config

    @classmethod
    def _without_unknown(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Stored fields that this class has; a warning names the others, which other programs may have added, except
        for those of version 0.1 that changed training only."""
        stored = {name: value for name, value in stored.items() if name not in RETIRED}
        known = {*(field.name for field in fields(cls)), *cls.attribute_map, *FIELDS_OF_TRANSFORMERS}
        known |= set(NAMES_OF_TRANSFORMERS)
        unknown = sorted(set(stored) - known)
        if unknown:
            logger.warning_once(f"The stored config has {unknown}, which {cls.__name__} does not have and leaves out.")
        return {name: value for name, value in stored.items() if name not in unknown}

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As in transformers, for the config of any DETR checkpoint."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def translate(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """The `config.json` of any DETR checkpoint as fields of this class.

        Raises:
            ValueError: it belongs to another kind of model, or to another project's DETR where hf_detr is not
                installed.
        """
        model_type = stored.get("model_type", cls.model_type)
        if model_type == cls.model_type:
            return stored
        read_config = import_interop(f'a "{model_type}" checkpoint').read_config
        return {**read_config(stored), "model_type": cls.model_type}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        stored, unused = super().get_config_dict(*args, **kwargs)
        try:
            return cls.translate(stored), unused
        except ValueError as error:
            raise ValueError(f"{args[0] if args else 'The config'}: {error}") from error

    @property
    def num_predictions(self) -> int:
        """Number of queries in all, each of which predicts a box: `num_queries`, or so many for each pattern."""
        return self.num_queries * max(1, self.num_patterns)

    @property
    def has_no_object(self) -> bool:
        """Whether the last class logit is "no object"."""
        return self.class_activation == "softmax"

    # transformers runs every method that is called validate_...

    def validate_sizes(self) -> None:
        self._check_minimum("frozen_stages", -1)
        self._check_minimum("encoder_layers", 0)
        self._check_minimum("num_patterns", 0)
        for name in ("num_channels", "num_queries", "d_model", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"):
            self._check_minimum(name, 1)

    def validate_width(self) -> None:
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, name)
            if heads < 1 or self.d_model % heads:
                raise ValueError(f"`d_model` ({self.d_model}) must be a multiple of `{name}` ({heads}).")
        if self.d_model % 4:
            raise ValueError(
                f"`d_model` ({self.d_model}) must be a multiple of 4, for the sines and cosines of x and y."
            )

    def validate_choices(self) -> None:
        self._check_choice("position_embedding_type", "sine", "learned")
        self._check_choice("query_type", "learned", "anchor", "conditional", "dab")
        self._check_choice("class_activation", "softmax", "sigmoid")
        self._check_choice("class_loss", "cross_entropy", "focal", "iou_aware")
        if self.class_activation == "sigmoid" and self.class_loss == "cross_entropy":
            raise ValueError(
                '`class_activation="sigmoid"` has no "no object", which `class_loss="cross_entropy"` needs: use '
                '"focal", as published, or "iou_aware".'
            )

    def validate_weights(self) -> None:
        for name in (
            "bbox_loss_coefficient", "giou_loss_coefficient", "class_loss_coefficient", "eos_coefficient",
            "dense_loss_coefficient", "mask_loss_coefficient", "dice_loss_coefficient", "mask_attention_gain",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")

    def validate_layers(self) -> None:
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability, got {getattr(self, name)}.")
        if self.activation_function not in ACT2FN:
            nearest = difflib.get_close_matches(self.activation_function, ACT2FN, 1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"`activation_function` is {self.activation_function!r}, which does not exist.{hint}")

    def validate_classes(self) -> None:
        if self.id2label is not None and len(self.id2label) == 0:
            raise ValueError("A detector needs at least one class.")
        if self.id2label is not None and sorted(map(int, self.id2label)) != list(range(len(self.id2label))):
            raise ValueError(
                f"The ids of `id2label` must be 0 to {len(self.id2label) - 1}, got {list(self.id2label)[:10]}."
            )

    def validate_class_weights(self) -> None:
        for name, weight in (self.class_weights or {}).items():
            self._check_class("class_weights", name)
            if not 0 < weight < math.inf:
                raise ValueError(f"`class_weights` must be positive, got {weight} for {name!r}.")

    def validate_stuff(self) -> None:
        for name in self.stuff_labels or ():
            self._check_class("stuff_labels", name)

    @property
    def stuff_label_ids(self) -> set[int]:
        """The ids of `stuff_labels`, as `post_process_panoptic_segmentation` takes them."""
        return {int(index) for index, name in self.id2label.items() if name in (self.stuff_labels or ())}

    def validate_anchors(self) -> None:
        if self.query_type != "learned" and self.d_model % 8:
            raise ValueError(
                f"`d_model` ({self.d_model}) must be a multiple of 8 for `query_type={self.query_type!r}`."
            )
        if self.query_type in QUERIES_ARE_BOXES and self.position_embedding_type != "sine":
            raise ValueError(
                'Anchors need `position_embedding_type="sine"`: their sine embeddings are compared with those of the '
                "feature map."
            )
        if self.norm_between_layers and self.query_type in QUERIES_ARE_BOXES:
            raise ValueError('`norm_between_layers` is for `query_type` "learned" and "conditional".')
        if self.num_patterns and self.query_type not in QUERIES_ARE_BOXES:
            raise ValueError('`num_patterns` needs `query_type` "anchor" or "dab", whose queries are boxes.')
        if self.num_patterns and self.query_proposals:
            raise ValueError(
                "`num_patterns` and `query_proposals` both define the content of queries: use one of them."
            )
        if self.position_temperature is not None and not 1 < self.position_temperature < math.inf:
            raise ValueError(f"`position_temperature` must be above 1, got {self.position_temperature}.")
        if self.position_temperature is not None and self.position_embedding_type != "sine":
            raise ValueError('`position_temperature` needs `position_embedding_type="sine"`.')

    def validate_training_options(self) -> None:
        self._check_minimum("denoising_groups", 0)
        if self.denoising_groups and self.query_type not in QUERIES_ARE_BOXES:
            raise ValueError(
                '`denoising_groups` needs `query_type` "anchor" or "dab": a noised box is the anchor of its query, and '
                "other queries have no anchor."
            )
        if self.relative_boxes and self.query_type not in QUERIES_ARE_BOXES and not self.dense_loss_coefficient:
            raise ValueError(
                '`relative_boxes` needs `query_type` "anchor" or "dab", or `dense_loss_coefficient` above 0: nothing '
                "else refines boxes."
            )
        if self.query_proposals and self.query_type != "anchor":
            raise ValueError('`query_proposals` needs `query_type="anchor"`: a proposal is the box of its query.')
        if self.query_proposals and not self.dense_loss_coefficient:
            raise ValueError("`query_proposals` needs `dense_loss_coefficient` above 0, which trains the proposals.")
        if self.prior_probability is not None and not 0 < self.prior_probability < 1:
            raise ValueError(f"`prior_probability` must be between 0 and 1, got {self.prior_probability}.")

    def validate_costs(self) -> None:
        costs = (self.class_cost, self.bbox_cost, self.giou_cost)
        if not all(0 <= cost < math.inf for cost in costs) or not any(costs):
            raise ValueError(f"Matching costs must be finite, not negative and not all 0, got {costs}.")

    def _check_minimum(self, name: str, minimum: int) -> None:
        if getattr(self, name) < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")

    def _check_class(self, field: str, name: str) -> None:
        names = set(self.id2label.values()) if self.id2label else set()
        if name not in names:
            nearest = difflib.get_close_matches(name, names, 1)
            some = f"The classes are {', '.join(sorted(names)[:10])}."
            hint = f"Did you mean {nearest[0]!r}?" if nearest else some
            raise ValueError(f"`{field}` has {name!r}, which is no class of `id2label`. {hint}")

    def _check_choice(self, name: str, *choices: str) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")


__all__ = ["DetrConfig"]
