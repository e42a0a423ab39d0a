"""What the models return: named tensors with their shapes."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .backbone import FeatureLevel
from .configuration_hf_detr import DetrConfig
from .loss import LossOutput


@dataclass
class DetrModelOutput(ModelOutput):
    """Hidden states of [`DetrModel`]. B images, T queries, L decoder layers, d = `d_model`, hw locations of the feature
    map. T is Q = `config.num_predictions`; in training with denoising queries, those come after the first Q.

    Args:
        last_hidden_state: (B, T, d), the last decoder layer's output, normed.
        encoder_last_hidden_state: (B, hw, d), the paper's memory.
        intermediate_hidden_states: (L, B, T, d), every decoder layer's output, normed.
        intermediate_boxes: (L, B, T, 4), every decoder layer's boxes, in the frame of `pred_boxes`.
        decoder_hidden_states: with `output_hidden_states`: the decoder's input, each layer's output, and last the
            normed result, each (B, T, d).
        decoder_attentions, cross_attentions: with `output_attentions`: per decoder layer (B, heads, T, T) among the
            queries and (B, heads, T, hw) from queries to the image.
        encoder_hidden_states: with `output_hidden_states`: the projected features, then each layer's output, each
            (B, hw, d).
        encoder_attentions: with `output_attentions`: per encoder layer (B, heads, hw, hw).
        feature_mask: (B, h, w), 1 = image, 0 = padding, as `pixel_mask`; h and w are the rows and columns of hw.
        feature_levels: of a model that was built with `further_strides`: the levels of the backbone, shallow to deep,
            and last the projected features, (B, d, h, w).
    """

    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_boxes: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    feature_mask: Tensor | None = None
    feature_levels: tuple[FeatureLevel, ...] | None = None


@dataclass
class DetrDetectionOutput(ModelOutput):
    """Predictions of [`DetrForDetection`], and their loss if labels were given. Everything is of the Q queries that
    predict.

    Args:
        loss: scalar, the weighted sum over decoder layers.
        loss_dict: the unweighted terms: `loss_ce`, `loss_bbox`, `loss_giou`, and others; see
            [`~hf_detr.model.loss.DetrLoss`].
        logits: (B, Q, num_labels + 1), the last one is no-object; (B, Q, num_labels) with
            `class_activation="sigmoid"`.
        pred_boxes: (B, Q, 4), cxcywh in [0, 1] of the image without its padding.
        class_probabilities: (B, Q, num_labels), with `class_activation="sigmoid"` only: an independent probability of
            each class. None: the softmax over `logits`. Post-processing distinguishes the two by it.
        auxiliary_outputs: `logits` and `pred_boxes` of each earlier decoder layer; with labels and `auxiliary_loss`.
        feature_levels: None; a head that reads several levels finds them here, and drops them.
        last_hidden_state and all that follow: see [`DetrModelOutput`].
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    class_probabilities: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    feature_mask: Tensor | None = None
    feature_levels: tuple[FeatureLevel, ...] | None = None


@dataclass
class DetrSegmentationOutput(DetrDetectionOutput):
    """Predictions of [`DetrForSegmentation`], and their loss if labels were given.

    Args:
        pred_masks: (B, Q, h, w), mask logits at stride 4 of the padded batch; a pixel is the object's if its logit is
            above 0. Padding, and queries whose masks were not computed, have the logit
            `hf_detr.model.mask_encoding.NO_MASK`. None in training, which computes masks of matched queries only.
        mask_sizes: (B, 2), rows and columns of `pred_masks` that show the image; the rest is padding.
        image_sizes: (B, 2), height and width of each image in `pixel_values`, without its padding.
        Others: see [`DetrDetectionOutput`]; `loss_dict` has `loss_mask` and `loss_dice` as well.
    """

    pred_masks: Tensor | None = None
    mask_sizes: Tensor | None = None
    image_sizes: Tensor | None = None


def detection_output(
    outputs: DetrModelOutput,
    logits: Tensor,
    pred_boxes: Tensor,
    config: DetrConfig,
    result: LossOutput | None,
    auxiliary: bool,
) -> DetrDetectionOutput:
    """The output of the first Q of all queries.

    Args:
        logits: (L, B, T, C); `pred_boxes` (L, B, T, 4), the last layer last.
        result: the loss; None without labels.
        auxiliary: whether the layers before the last one are `auxiliary_outputs`.
    """

    num_queries = config.num_predictions

    def first(states: tuple[Tensor, ...] | None, axes: int = 1) -> tuple[Tensor, ...] | None:
        if states is None:
            return None
        return tuple(s[:, :, :num_queries] if axes == 1 else s[:, :, :num_queries, :num_queries] for s in states)

    logits, pred_boxes = logits[:, :, :num_queries], pred_boxes[:, :, :num_queries]
    auxiliary_outputs = None
    if auxiliary:
        earlier = zip(logits[:-1], pred_boxes[:-1], strict=True)
        auxiliary_outputs = [{"logits": of_layer, "pred_boxes": boxes} for of_layer, boxes in earlier]
    states = outputs.decoder_hidden_states
    last_hidden_state = outputs.last_hidden_state
    return DetrDetectionOutput(
        loss=None if result is None else result.loss,
        loss_dict=None if result is None else result.loss_dict,
        logits=logits[-1],
        pred_boxes=pred_boxes[-1],
        class_probabilities=None if config.has_no_object else logits[-1].float().sigmoid(),
        auxiliary_outputs=auxiliary_outputs,
        last_hidden_state=None if last_hidden_state is None else last_hidden_state[:, :num_queries],
        decoder_hidden_states=None if states is None else tuple(state[:, :num_queries] for state in states),
        decoder_attentions=first(outputs.decoder_attentions, axes=2),
        cross_attentions=first(outputs.cross_attentions),
        encoder_last_hidden_state=outputs.encoder_last_hidden_state,
        encoder_hidden_states=outputs.encoder_hidden_states,
        encoder_attentions=outputs.encoder_attentions,
        feature_mask=outputs.feature_mask,
        feature_levels=outputs.feature_levels,
    )
