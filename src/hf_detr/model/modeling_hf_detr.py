"""`DetrModel` and `DetrForDetection`: steps 2 to 7 wired together, as in figure 2 of the paper."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .annotations import check_labels, sizes_without_padding, tensor_labels
from .backbone import Backbone, FeatureLevel
from .configuration_hf_detr import DetrConfig
from .decoders import decoder_class
from .dense_supervision import DenseHead
from .encoder import Encoder, LayerOptions, Memory
from .foreign import import_visualization
from .heads import BoxHead, build_class_head
from .image_io import check_images
from .initialization import init_as_torch, init_class_head, init_queries
from .loss import DetrLoss, LossNormalizers
from .mask_loss import MaskPairs
from .matcher import Matching
from .outputs import DetrDetectionOutput, DetrModelOutput, detection_output
from .position_embedding import build_position_embedding
from .pretrained import DetrPreTrainedModel
from .proposals import Proposals
from .queries import Denoising, DenoisingQueries, Queries, build_queries
from .resizing import resize_class_head, resize_queries


class DetrModel(DetrPreTrainedModel):
    """DETR without its class head: images to one vector and one box per object query (steps 2 to 4).

    Args:
        further_strides: strides of shallower levels of the backbone that a head on top of this model reads.
    """

    def __init__(self, config: DetrConfig, further_strides: Sequence[int] = ()) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone,
            in_channels=config.num_channels,
            output_stride=16 if config.dilation else None,
            feature_stride=config.feature_stride,
            further_strides=further_strides,
            freeze_batch_norm=config.freeze_batch_norm,
            frozen_stages=config.frozen_stages,
            kwargs=config.backbone_kwargs,
        )
        self._returns_levels = len(further_strides) > 0
        self.input_projection = nn.Conv2d(self.backbone.channels[-1], config.d_model, kernel_size=1)
        dropouts = config.dropout, config.attention_dropout, config.activation_dropout
        of_layers = partial(LayerOptions, config.d_model)
        encoder_layer, decoder_layer = (
            of_layers(heads, ffn_dim, config.activation_function, *dropouts, config.pre_norm)
            for heads, ffn_dim in (
                (config.encoder_attention_heads, config.encoder_ffn_dim),
                (config.decoder_attention_heads, config.decoder_ffn_dim),
            )
        )
        decoder = decoder_class(config)
        self.encoder = Encoder(config.encoder_layers, encoder_layer, scale_positions=decoder.scales_encoder_positions)
        self.decoder = decoder.of(config, decoder_layer)
        are_boxes = decoder.queries_are_boxes
        self.position_embedding = build_position_embedding(
            config.position_embedding_type,
            config.d_model,
            temperature=config.position_temperature or decoder.temperature,
            centered=decoder.centered_positions,
        )
        # learned queries are position embeddings; anchors are inverse_sigmoid(cxcywh)
        self.query_position_embeddings = nn.Embedding(config.num_queries, 4 if are_boxes else config.d_model)
        self.patterns = nn.Embedding(config.num_patterns, config.d_model) if config.num_patterns else None
        self.proposals = (
            Proposals(config.d_model, config.num_labels, relative_boxes=config.relative_boxes)
            if config.query_proposals
            else None
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init_as_torch(self.input_projection)
            init_queries(self.query_position_embeddings, self.decoder.queries_are_boxes)
            if self.patterns is not None:
                init.normal_(self.patterns.weight)

    def freeze_backbone(self) -> None:
        """Stop the training of the whole backbone, statistics of batch norm included."""
        self.backbone.set_frozen(True)
        self.backbone.train(self.training)

    def unfreeze_backbone(self) -> None:
        """Let the backbone train again, except for the stages that the config freezes."""
        self.backbone.set_frozen(False)
        self.backbone.train(self.training)

    def resize_queries(self, num_queries: int) -> str:
        """Change the number of object queries, in place: the first ones keep their weights, additional ones are
        initialised as in a new model. Returns a sentence that describes the change."""
        return resize_queries(self, num_queries)

    def resize_channels(self, num_channels: int) -> str:
        """Take images of another number of channels than 3, in place; the weights of the first convolution are adapted
        as timm adapts pretrained ones. Returns a sentence that describes the change."""
        before = self.config.num_channels
        if not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"The number of channels must be at least 1, got {num_channels!r}.")
        if num_channels == before:
            return f"The model has {before} channels already."
        self.backbone.resize_channels(num_channels)
        self.config.num_channels = num_channels
        return f"Channels: {before} to {num_channels}, the weights of the first convolution are adapted."

    def build_queries(
        self,
        batch_size: int,
        device: torch.device,
        denoising: DenoisingQueries | None = None,
        content: Tensor | None = None,
    ) -> Queries:
        """The object queries of a batch.

        Args:
            content: (B, Q, d), what the decoder starts from, Q = `config.num_predictions`; None: the patterns, or zeros
                where the model has none.

        Raises:
            ValueError: the config has another number of queries than the model, or `content` another shape.
        """
        config, available = self.config, self.query_position_embeddings.num_embeddings
        if available != config.num_queries:
            raise ValueError(
                f"The config has num_queries={config.num_queries}, but the model has {available} queries. Change both "
                "with model.resize_queries."
            )
        if content is not None and self.proposals is not None:
            raise ValueError("`query_proposals` take their content from the image, not from `decoder_inputs_embeds`.")
        expected = (batch_size, config.num_predictions, config.d_model)
        if content is not None and tuple(content.shape) != expected:
            raise ValueError(f"`decoder_inputs_embeds` must be {expected}, got {tuple(content.shape)}.")
        return build_queries(
            self.query_position_embeddings(torch.arange(available, device=device)),  # a call, for offloaded weights
            batch_size,
            config.d_model,
            are_boxes=self.decoder.queries_are_boxes,
            denoising=denoising,
            content=content,
            patterns=None if self.patterns is None else self.patterns.weight,
        )

    def project(
        self, pixel_values: Tensor | None, pixel_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[int, int], tuple[FeatureLevel, ...] | None]:
        """Step 2: images to the vectors that the encoder starts from; arguments and errors as of `forward`.

        Returns:
            (B, hw, d), their mask (B, h, w) bool or None if nothing is padded, (h, w), and `feature_levels` of
            [`DetrModelOutput`].
        """
        if (pixel_values is None) == (inputs_embeds is None):
            raise ValueError("A model needs either `pixel_values` or `inputs_embeds`, not both and not none.")
        if pixel_values is not None:
            check_images(pixel_values, pixel_mask, self.config.num_channels)
            levels = self.backbone(pixel_values, pixel_mask)
            level = levels[-1]._replace(map=self.input_projection(levels[-1].map))
            further = (*levels, level) if self._returns_levels else None
            return level.map.flatten(2).transpose(1, 2), level.mask, level.map.shape[-2:], further
        assert inputs_embeds is not None
        side, d_model = math.isqrt(inputs_embeds.shape[1]), self.config.d_model
        if inputs_embeds.shape[1:] != (side**2, d_model):
            raise ValueError(
                f"`inputs_embeds` must be (batch, h * w, {d_model}) of a square feature map, got "
                f"{tuple(inputs_embeds.shape)}."
            )
        if pixel_mask is None:
            return inputs_embeds, None, (side, side), None
        mask = nn.functional.interpolate(pixel_mask[:, None].float(), size=(side, side))[:, 0] > 0.5
        return inputs_embeds, mask.to(inputs_embeds.device), (side, side), None

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        queries: Queries | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DetrModelOutput:
        """Args:
            pixel_values: (B, num_channels, H, W), normalised, padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None if nothing is padded. How padding is kept from changing
                an image's result: see [`~hf_detr.model.backbone.Backbone`].
            queries: the object queries; None: the model's own, see [`DetrModel.build_queries`].
            encoder_outputs: of an earlier call, a tuple or an output with `last_hidden_state` (B, hw, d); the encoder
                does not run, the backbone does.
            inputs_embeds: (B, hw, d), projected features of a square map, in place of `pixel_values`; `pixel_mask` may
                then have any height and width.
            decoder_inputs_embeds: (B, Q, d), the content that the queries start from, in place of zeros or patterns.
            output_attentions: also return attention weights; this call then runs "eager" attention, the only
                implementation that has them.
            output_hidden_states: also return every layer's hidden states.
            kwargs: `return_dict=False` returns a plain tuple; others as in transformers, for the attention
                implementation.

        Raises:
            ValueError: `pixel_values` is not (B, num_channels, H, W), `pixel_mask` does not fit it, or both or none of
                `pixel_values` and `inputs_embeds` are given.
            TypeError: an argument that transformers' models do not have either.
        """
        attentions, states = self._resolve_outputs(output_attentions, output_hidden_states, kwargs)
        if queries is not None and decoder_inputs_embeds is not None:
            raise ValueError("`queries` have a content; `decoder_inputs_embeds` cannot be given as well.")
        features, feature_mask, (height, width), levels = self.project(pixel_values, pixel_mask, inputs_embeds)  # 2
        positions = self.position_embedding(height, width, feature_mask, features.device).to(features.dtype)  # step 3

        attention = "eager" if attentions else str(self.config._attn_implementation)  # step 4
        if encoder_outputs is None:
            mask = self._attention_mask(feature_mask, features, features, attention)
            encoder_states, encoder_attentions = self.encoder(features, positions, mask, attention, **kwargs)
        else:
            encoder_states, encoder_attentions = _encoder_states(encoder_outputs, features)

        queries = queries or self.build_queries(features.shape[0], features.device, content=decoder_inputs_embeds)
        queries = queries.to(encoder_states[-1].dtype)
        memory = Memory(encoder_states[-1], positions, feature_mask, (height, width))
        if self.proposals is not None:
            queries = self.proposals(queries, memory, self.config.num_predictions)
        if attention not in (self.decoder.attn_implementations or (attention,)):
            attention = "sdpa"
        mask = self._attention_mask(feature_mask, queries.content, memory.features, attention)
        decoded = self.decoder(queries, memory._replace(attention_mask=mask), attention, **kwargs)
        return DetrModelOutput(
            last_hidden_state=decoded.hidden_states[-1],
            encoder_last_hidden_state=memory.features,
            intermediate_hidden_states=decoded.hidden_states,
            intermediate_boxes=decoded.boxes,
            decoder_hidden_states=decoded.layer_states if states else None,
            decoder_attentions=decoded.attentions if attentions else None,
            cross_attentions=decoded.cross_attentions if attentions else None,
            encoder_hidden_states=encoder_states if states else None,
            encoder_attentions=encoder_attentions if attentions else None,
            feature_mask=features.new_ones((features.shape[0], height, width), dtype=torch.int64)
            if feature_mask is None
            else feature_mask.long(),
            feature_levels=levels,
        )

    def _attention_mask(self, mask: Tensor | None, queries: Tensor, keys: Tensor, attention: str) -> Any:
        """(B, h, w) to the mask that the attention implementation takes; None where nothing is padded."""
        if mask is None:
            return None
        if attention in ("eager", "sdpa"):  # both broadcast, which saves a (hw, hw) table per image
            return mask.flatten(1)[:, None, None]
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=queries, attention_mask=mask.flatten(1), encoder_hidden_states=keys
        )


def _encoder_states(encoder_outputs: Any, features: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Hidden states and attention weights of an encoder that ran before.

    Raises:
        ValueError: the last state does not have the shape of `features`, (B, hw, d).
    """
    if isinstance(encoder_outputs, (list, tuple)) and len(encoder_outputs) > 0:
        encoder_outputs = BaseModelOutput(*encoder_outputs)
    prefix = "encoder_" if hasattr(encoder_outputs, "encoder_last_hidden_state") else ""  # of the whole model
    last, earlier, attentions = (
        getattr(encoder_outputs, prefix + name, None) for name in ("last_hidden_state", "hidden_states", "attentions")
    )
    if last is None:
        raise ValueError("`encoder_outputs` must be a tuple, or an output of the model or of an encoder.")
    if last.shape != features.shape:
        raise ValueError(f"`encoder_outputs` must be {tuple(features.shape)} for this batch, got {tuple(last.shape)}.")
    return (*(earlier or (last,))[:-1], last), attentions or ()


class DetrForDetection(DetrPreTrainedModel):
    """DETR: images to a set of boxes with classes (steps 2 to 7).

    `DetrForDetection(config)` starts from random weights, `from_pretrained_backbone(config)` from a backbone that timm
    has weights for, `from_pretrained(path_or_hub_id)` from a full checkpoint.
    """

    accepts_loss_kwargs = False  # `Trainer` divides the loss by the number of accumulated batches
    # of a model with a further head: the levels of the backbone that it reads, and whether it predicts masks, which
    # labels must have then
    further_strides: ClassVar[tuple[int, ...]] = ()
    has_masks: ClassVar[bool] = False

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.model = DetrModel(config, self.further_strides)
        self.class_labels_classifier = build_class_head(
            config.d_model, config.num_labels, has_no_object=config.has_no_object
        )
        # training only
        denoise, dense = config.denoising_groups > 0, config.dense_loss_coefficient > 0
        self.denoising = Denoising(config.num_labels, config.d_model, config.denoising_groups) if denoise else None
        dense = dense and not config.query_proposals  # which have the head
        self.dense_head = (
            DenseHead(config.d_model, config.num_labels, relative_boxes=config.relative_boxes) if dense else None
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            config = self.config
            init_class_head(self.class_labels_classifier, config.prior_probability, has_no_object=config.has_no_object)

    @classmethod
    def from_pretrained_backbone(cls, config: DetrConfig, checkpoint: str | Path | None = None) -> Self:
        """A new DETR whose backbone starts from pretrained timm weights; everything else is random.

        Args:
            checkpoint: a local `.safetensors` or `.pth` file with the weights of the timm network (opened with
                `weights_only=True`); None fetches the weights that timm names for `config.backbone`, from the Hub.

        Raises:
            FileNotFoundError, ValueError: see [`~hf_detr.model.timm_network.pretrained_state_dict`].
        """
        model = cls(config)
        model.model.backbone.load_pretrained(checkpoint)
        return model

    @property
    def bbox_predictor(self) -> BoxHead:
        """The box head, a part of the decoder, which may refine boxes layer by layer."""
        return self.model.decoder.bbox_predictor

    def freeze_backbone(self) -> None:
        """See [`DetrModel.freeze_backbone`]."""
        self.model.freeze_backbone()

    def unfreeze_backbone(self) -> None:
        """See [`DetrModel.unfreeze_backbone`]."""
        self.model.unfreeze_backbone()

    def resize_queries(self, num_queries: int) -> str:
        """See [`DetrModel.resize_queries`]."""
        return self.model.resize_queries(num_queries)

    def resize_channels(self, num_channels: int) -> str:
        """See [`DetrModel.resize_channels`]."""
        return self.model.resize_channels(num_channels)

    def resize_class_head(self, id2label: dict[int, str]) -> str:
        """Predict these classes from now on, in place. A class that the model has under the same name keeps its
        weights, and so does "no object"; the others start at random. Names without meaning (`LABEL_0`, or one that
        occurs twice, as "N/A" does in the published COCO checkpoints) do not match.

        Returns:
            a sentence that describes the change.
        """
        return resize_class_head(self, id2label)

    def describe(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Any:
        """A table of the model's parts for this batch: shapes, parameters, floating point operations and times. See
        `hf_detr.visualization.describe`."""
        return import_visualization().describe(self, pixel_values, pixel_mask)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Any]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        normalizers: LossNormalizers | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DetrDetectionOutput:
        """Args:
            labels: one dict per image: `class_labels` (N,) in [0, num_labels) and `boxes` (N, 4) cxcywh in [0, 1] of
                the image without its padding. N may be 0. The image processor makes them from COCO annotations.
            normalizers: of a loss over more than this batch, made of [`count_for_loss`]; None: of this batch, on all
                processes.
            Others: see [`DetrModel.forward`].

        Raises:
            ValueError: labels that do not fit, before anything is computed (see `check_labels`).
            FloatingPointError: with labels, a prediction is NaN or infinite.
        """
        attentions, states = self._resolve_outputs(output_attentions, output_hidden_states, kwargs)
        self._check_class_head()
        denoising = result = None
        given = inputs_embeds if pixel_values is None else pixel_values
        if given is None:
            raise ValueError("A model needs either `pixel_values` or `inputs_embeds`, not both and not none.")
        if labels is not None:
            sizes = None
            if pixel_values is not None:
                check_images(pixel_values, pixel_mask, self.config.num_channels)
                sizes = sizes_without_padding(pixel_values, pixel_mask)
            labels = tensor_labels(labels)
            check_labels(labels, self.config.num_labels, given.shape[0], sizes, needs_masks=self.has_masks)
            denoising = self.denoising(labels) if self.model.training and self.denoising is not None else None
        dense_head = self.dense_head if self.model.proposals is None else self.model.proposals.head
        dense_head = dense_head if self.model.training and labels is not None else None
        outputs = self.model(  # steps 2 to 4
            pixel_values,
            pixel_mask,
            self.model.build_queries(given.shape[0], given.device, denoising, decoder_inputs_embeds),
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            output_attentions=attentions,
            output_hidden_states=states or dense_head is not None,
            return_dict=True,
            **kwargs,
        )
        auxiliary = labels is not None and self.config.auxiliary_loss
        first_layer = 0 if auxiliary else -1
        logits = self.class_labels_classifier(outputs.intermediate_hidden_states[first_layer:])  # (L, B, T, C), 5
        pred_boxes = outputs.intermediate_boxes[first_layer:]  # (L, B, T, 4)
        if labels is not None:  # steps 6 and 7
            criterion = self.criterion
            dense = None if dense_head is None else dense_head.of(outputs, criterion.class_weights(logits.device))
            masks = self.mask_supervision(outputs, labels)
            result = criterion(logits, pred_boxes, labels, denoising, dense, normalizers, masks)
        output = detection_output(outputs, logits, pred_boxes, self.config, result, auxiliary)
        if not states:
            output.encoder_hidden_states = output.decoder_hidden_states = None
        return output

    def mask_supervision(
        self, outputs: DetrModelOutput, labels: list[dict[str, Any]]
    ) -> Callable[[Matching], MaskPairs] | None:
        """What [`DetrLoss`] supervises masks with; None without a mask head."""
        return None

    @property
    def criterion(self) -> DetrLoss:
        """The loss with the coefficients that the config has now."""
        return DetrLoss(self.config)

    def _check_class_head(self) -> None:
        """Raises ValueError if the config names another number of classes than the head predicts."""
        outputs = getattr(self.class_labels_classifier, "out_features", None)
        predicted = None if outputs is None else outputs - self.config.has_no_object
        if predicted not in (None, self.config.num_labels):
            raise ValueError(
                f"The config names {self.config.num_labels} classes, but the class head predicts {predicted}. Change "
                "both with model.resize_class_head."
            )

    @torch.no_grad()
    def count_for_loss(self, labels: list[dict[str, Any]]) -> Tensor:
        """The counts of a batch that [`LossNormalizers`] are made of, (3,).

        A step over several batches and processes equals one step over all of their images, if all of them get

            counts = sum(model.count_for_loss(batch["labels"]) for batch in batches)  # and over processes
            normalizers = LossNormalizers.from_counts(counts, num_processes)

        Batch norm that is being trained still computes its statistics batch by batch.
        """
        return self.criterion.count(tensor_labels(labels), self.class_labels_classifier.weight.device)


__all__ = ["DetrForDetection", "DetrModel"]
