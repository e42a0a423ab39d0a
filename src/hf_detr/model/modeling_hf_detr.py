"""`DetrModel` and `DetrForDetection`: steps 2 to 7 wired together, as in figure 2 of the paper."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask

from .anchor_decoder import AnchorDecoder
from .annotations import check_labels
from .backbone import Backbone
from .configuration_hf_detr import DetrConfig
from .denoising import DenoisingQueries, denoising_queries, group_mask
from .dense_supervision import CELL_PRIOR, DenseHead, cell_centers, count_cells, dense_loss
from .heads import BoxHead, build_class_head
from .initialization import init_as_torch, init_class_head, init_mlp, init_queries, init_transformer
from .loss import LossNormalizers, count_for_loss, set_loss
from .outputs import DetrDetectionOutput, DetrModelOutput
from .position_embedding import LearnedPositionEmbedding, build_position_embedding
from .preparation import prepare
from .pretrained import DetrPreTrainedModel
from .resizing import resize_class_head, resize_queries
from .transformer import Decoder, Encoder


class DetrModel(DetrPreTrainedModel):
    """DETR without its heads: images to one vector an object query (steps 2 to 4)."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone,
            in_channels=config.num_channels,
            output_stride=16 if config.dilation else None,
            feature_stride=config.feature_stride,
            freeze_batch_norm=config.freeze_batch_norm,
            frozen_stages=config.frozen_stages,
            kwargs=config.backbone_kwargs,
        )
        anchors = config.query_type == "anchor"
        self.position_embedding = build_position_embedding(
            "anchor" if anchors else config.position_embedding_type, config.d_model
        )
        self.input_projection = nn.Conv2d(self.backbone.channels, config.d_model, kernel_size=1)
        # learned queries are position embeddings; anchors are inverse_sigmoid(cxcywh)
        query_width = 4 if anchors else config.d_model
        self.query_position_embeddings = nn.Embedding(config.num_queries, query_width)
        self.further_query_groups = (
            nn.Embedding((config.query_groups - 1) * config.num_queries, query_width)
            if config.query_groups > 1
            else None
        )
        layer: dict[str, Any] = {
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": config.activation_dropout,
            "activation_function": config.activation_function,
            "pre_norm": config.pre_norm,
        }
        self.encoder = Encoder(
            config.encoder_layers, config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim, **layer
        )
        decoder = (config.decoder_layers, config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim)
        self.decoder = (
            AnchorDecoder(*decoder, modulate_attention=config.modulate_attention, **layer)
            if anchors
            else Decoder(*decoder, **layer)
        )
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fill every weight that no checkpoint has filled: the paper's initialisation (section A.4 and its code), and
        timm's for the backbone. transformers calls this after construction and after loading."""
        if getattr(self, "_is_hf_initialized", False):
            return
        self.backbone.reset_parameters()
        self.backbone.freeze()
        init_as_torch(self.input_projection)
        anchors = self.config.query_type == "anchor"
        init_queries(self.query_position_embeddings, anchors)
        if self.further_query_groups is not None:
            init_queries(self.further_query_groups, anchors, first=self.config.num_queries)
        if isinstance(self.position_embedding, LearnedPositionEmbedding):
            init.uniform_(self.position_embedding.row_embeddings.weight)
            init.uniform_(self.position_embedding.column_embeddings.weight)
        for stack in (self.encoder, self.decoder):
            init_transformer(stack, self.config.init_xavier_std)
        self._is_hf_initialized = True

    def resize_queries(self, num_queries: int) -> str:
        """Change the number of object queries, in place: the first ones keep their weights, further ones are as in a
        new model. The same in every further query group. Returns one sentence that says what was done."""
        return resize_queries(self, num_queries)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        denoising: tuple[DenoisingQueries, Tensor] | None = None,
    ) -> DetrModelOutput | tuple[Any, ...]:
        """Args:
            pixel_values: (B, 3, H, W), normalised, padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None if nothing is padded. How padding is kept from
                changing an image's result: see [`~hf_detr.model.backbone.Backbone`].
            output_attentions: also return attention weights; this call then runs "eager" attention, the only
                implementation that has them.
            output_hidden_states: also return every layer's hidden states.
            return_dict: `False` returns a plain tuple.
            denoising: in training, T further queries and their content (B, T, d); they come after all others.

        In training mode hidden states are of `query_groups` times `num_queries` queries, the first group first.

        Raises:
            ValueError: `pixel_values` is not (B, num_channels, H, W), or `pixel_mask` does not fit it.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        check_images(pixel_values, pixel_mask, config.num_channels)

        feature_map, mask = self.backbone(pixel_values, pixel_mask)
        height, width = feature_map.shape[-2:]
        features = self.input_projection(feature_map).flatten(2).transpose(1, 2)  # (B, hw, d)
        positions = self.position_embedding(height, width, mask, features.device).to(features.dtype)

        dense = self.training and bool(config.dense_loss_coefficient)
        attention = "eager" if output_attentions else config._attn_implementation
        encoder_states, encoder_attentions = self.encoder(
            features, positions, self._attention_mask(mask, features, features, attention), attention
        )
        memory = encoder_states[-1]
        queries, query_mask = self._queries(denoising)
        if isinstance(self.decoder, AnchorDecoder) and attention != "eager":
            attention = "sdpa"
        cross_mask = self._attention_mask(mask, memory.new_empty(memory.shape[0], len(queries), 1), memory, attention)
        boxes = None
        if isinstance(self.decoder, AnchorDecoder):
            anchors = queries.float().sigmoid().expand(memory.shape[0], -1, -1)
            content = memory.new_zeros(*anchors.shape[:2], config.d_model)
            if denoising is not None:
                anchors = torch.cat((anchors, denoising[0].anchors), dim=1)
                content = torch.cat((content, denoising[1].to(content.dtype)), dim=1)
            decoder_states, intermediate, boxes, decoder_attentions, cross_attentions = self.decoder(
                content, anchors, memory, positions, query_mask, cross_mask, attention
            )
        else:
            decoder_states, intermediate, decoder_attentions, cross_attentions = self.decoder(
                queries, memory, positions, query_mask, cross_mask, attention
            )
        output = DetrModelOutput(
            last_hidden_state=decoder_states[-1],
            encoder_last_hidden_state=memory,
            intermediate_hidden_states=intermediate if config.auxiliary_loss else None,
            intermediate_boxes=boxes,
            encoder_input=features if dense else None,
            cell_centers=cell_centers(height, width, mask, features.device) if dense else None,
            decoder_hidden_states=decoder_states if output_hidden_states else None,
            decoder_attentions=decoder_attentions if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions else None,
            encoder_hidden_states=encoder_states if output_hidden_states else None,
            encoder_attentions=encoder_attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _queries(self, denoising: tuple[DenoisingQueries, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """All queries but denoising ones, (Q, d) or (Q, 4), and the mask among all, (1 or B, 1, T, T) or None."""
        queries = self.query_position_embeddings.weight
        group = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        if self.training and self.further_query_groups is not None:
            queries = torch.cat((queries, self.further_query_groups.weight))
            group = torch.arange(len(queries), device=queries.device) // self.config.num_queries
        if denoising is None:
            return queries, None if len(queries) == self.config.num_queries else group_mask(group, None)
        extra = denoising[0]
        ordinary = torch.ones(len(extra.valid), len(queries), dtype=torch.bool, device=queries.device)
        return queries, group_mask(
            torch.cat((group, extra.group + self.config.query_groups)), torch.cat((ordinary, extra.valid), dim=1)
        )

    def _attention_mask(self, mask: Tensor | None, queries: Tensor, keys: Tensor, attention: str | None) -> Any:
        """(B, h, w) to what the attention implementation wants; None where nothing is padded."""
        if mask is None:
            return None
        if attention in ("eager", "sdpa"):  # both broadcast, which saves a (hw, hw) table an image
            return mask.flatten(1)[:, None, None]
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=queries, attention_mask=mask.flatten(1), encoder_hidden_states=keys
        )


class DetrForDetection(DetrPreTrainedModel):
    """DETR: images to a set of boxes with classes (steps 2 to 7).

    `DetrForDetection(config)` starts from random weights, `from_pretrained_backbone(config)` from a backbone that timm
    has weights for, `from_pretrained(path_or_hub_id)` from a full checkpoint.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.model = DetrModel(config)
        self.class_labels_classifier = build_class_head(config.d_model, config.num_labels)
        # with anchors it is part of the decoder, which moves the anchors with it
        self.bbox_predictor = BoxHead(config.d_model) if config.query_type == "learned" else None
        # in training only
        self.denoising_content = nn.Embedding(config.num_labels, config.d_model) if config.denoising_groups else None
        self.dense_head = DenseHead(config.d_model, config.num_labels) if config.dense_loss_coefficient else None
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As for `DetrModel`, and PyTorch's own initialisation for the heads."""
        if getattr(self, "_is_hf_initialized", False):
            return
        self.model.initialize_weights()
        init_class_head(self.class_labels_classifier, self.config.prior_probability)
        if self.bbox_predictor is not None:
            init_mlp(self.bbox_predictor)
        if self.dense_head is not None:
            init_class_head(self.dense_head.class_labels_classifier, CELL_PRIOR)
            init_mlp(self.dense_head.bbox_predictor)
        if self.denoising_content is not None:
            init.normal_(self.denoising_content.weight)
        self._is_hf_initialized = True

    @classmethod
    def from_pretrained_backbone(cls, config: DetrConfig, checkpoint: str | Path | None = None) -> Self:
        """A new DETR whose backbone starts from pretrained timm weights; everything else is random.

        Args:
            checkpoint: a local `.safetensors` or `.pth` file with the weights of the timm network (opened with
                `weights_only=True`); None fetches the weights that timm names for `config.backbone`, from the Hub.

        Raises:
            FileNotFoundError, ValueError: see [`~hf_detr.model.backbone.Backbone.load_pretrained`].
        """
        model = cls(config)
        model.model.backbone.load_pretrained(checkpoint)
        return model

    def prepare_for_inference(self, dtype: torch.dtype | str | None = None, compile: bool = False) -> Self:
        """A copy that only predicts, called like the model, with the same outputs (to 1e-4 in float32), and faster:
        batch norm is folded into the convolutions, which run in channels-last. It neither trains nor saves; the model
        stays as it is. `pipeline("object-detection")` uses such a copy by itself.

        Args:
            dtype: of weights and activations, also by name; None: the model's own. On a CPU with AMX or AVX-512 BF16
                `torch.bfloat16` is several times faster. Heads and outputs have at least float32.
            compile: with `torch.compile`, for any image size. The first calls take minutes.

        Raises:
            ValueError: there is no such `dtype`.
        """
        return prepare(self, dtype, compile)

    def resize_queries(self, num_queries: int) -> str:
        """See [`DetrModel.resize_queries`]."""
        return self.model.resize_queries(num_queries)

    def resize_class_head(self, id2label: dict[int, str]) -> str:
        """Predict these classes from now on, in place. A class that the model knows by name keeps its weights, and so
        does "no object"; the others start at random. Names that say nothing (`LABEL_0`, or one that occurs twice, as
        "N/A" does in the published COCO checkpoints) are no match.

        Returns:
            one sentence that says what was done.
        """
        return resize_class_head(self, id2label)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Any]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        normalizers: LossNormalizers | None = None,
    ) -> DetrDetectionOutput | tuple[Any, ...]:
        """Args:
            labels: one dict an image: `class_labels` (N,) in [0, num_labels) and `boxes` (N, 4) cxcywh in [0, 1] of
                the image without its padding. N may be 0. The image processor makes them from COCO annotations.
            normalizers: of a loss over more than this batch, made of [`count_for_loss`]; None: of this batch, on all
                processes.
            Others: see [`DetrModel.forward`].

        Raises:
            ValueError: labels that do not fit, before anything is computed (see `hf_detr.model.loss.check_labels`).
            FloatingPointError: with labels, a prediction is NaN or infinite.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if labels is not None:
            check_labels(labels, config.num_labels, len(pixel_values))
        extra = denoising = None
        if labels is not None and self.training and self.denoising_content is not None:
            extra = denoising_queries(labels, config.num_labels, config.denoising_groups, pixel_values.device)
            denoising = (extra, self.denoising_content(extra.class_labels))
        outputs = self.model(
            pixel_values,
            pixel_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            denoising=denoising,
        )
        states = dict(outputs)
        intermediate = states.pop("intermediate_hidden_states", None)  # (L, B, Q, d), the last layer last
        pred_boxes = states.pop("intermediate_boxes", None)  # (L, B, Q, 4)
        encoder_input, centers = states.pop("encoder_input", None), states.pop("cell_centers", None)
        if labels is None or intermediate is None:
            intermediate = outputs.last_hidden_state[None]
            pred_boxes = None if pred_boxes is None else pred_boxes[-1:]
        logits = self.class_labels_classifier(intermediate)  # (L, B, Q, num_labels+1)
        if self.bbox_predictor is not None:
            pred_boxes = self.bbox_predictor(intermediate)

        loss, loss_dict, auxiliary_outputs = None, None, None
        if labels is not None:
            loss, loss_dict = self._set_loss(logits, pred_boxes, labels, extra, normalizers)
            if self.dense_head is not None and centers is not None:
                memory = outputs.encoder_last_hidden_state
                cells = None if normalizers is None else normalizers.cells
                terms = dense_loss(self.dense_head, (encoder_input, memory), centers, labels, cells)
                loss = loss + config.dense_loss_coefficient * (
                    terms["loss_ce"]
                    + config.bbox_loss_coefficient * terms["loss_bbox"]
                    + config.giou_loss_coefficient * terms["loss_giou"]
                )
                loss_dict |= {f"{name}_dense": value for name, value in terms.items()}
        # from here on the queries that predict
        logits, pred_boxes = logits[:, :, : config.num_queries], pred_boxes[:, :, : config.num_queries]
        if labels is not None and config.auxiliary_loss:
            auxiliary_outputs = [
                {"logits": layer_logits, "pred_boxes": layer_boxes}
                for layer_logits, layer_boxes in zip(logits[:-1], pred_boxes[:-1], strict=True)
            ]
        output = DetrDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=pred_boxes[-1],
            auxiliary_outputs=auxiliary_outputs,
            **states,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def count_for_loss(
        self, pixel_values: Tensor, labels: list[dict[str, Any]], pixel_mask: Tensor | None = None
    ) -> Tensor:
        """What this batch adds to the counts that [`LossNormalizers`] are made of, (3,), or (4,) with the dense loss.

        A step over several batches and processes is the step over all of their images at once, if all of them get

            counts = sum(model.count_for_loss(**batch) for batch in batches)  # and over processes
            normalizers = LossNormalizers.from_counts(counts, num_processes)

        Batch norm that is being trained still sees each batch on its own.
        """
        config, device = self.config, pixel_values.device
        objects = [len(label["class_labels"]) for label in labels]
        counts = count_for_loss(objects, config.num_queries, config.eos_coefficient, device)
        if self.dense_head is None:
            return counts
        sizes = self.model.backbone.feature_sizes(pixel_values, pixel_mask)
        return torch.cat((counts, count_cells(labels, sizes, device)[None]))

    def _set_loss(
        self,
        logits: Tensor,
        pred_boxes: Tensor,
        labels: list[dict[str, Any]],
        extra: DenoisingQueries | None,
        normalizers: LossNormalizers | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        groups = config.query_groups if self.training else 1
        ordinary = groups * config.num_queries
        return set_loss(
            logits[:, :, :ordinary],
            pred_boxes[:, :, :ordinary],
            labels,
            class_cost=config.class_cost,
            bbox_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            class_loss_coefficient=config.class_loss_coefficient,
            bbox_loss_coefficient=config.bbox_loss_coefficient,
            giou_loss_coefficient=config.giou_loss_coefficient,
            eos_coefficient=config.eos_coefficient,
            class_loss=config.class_loss,
            query_groups=groups,
            denoised=None if extra is None else (logits[:, :, ordinary:], pred_boxes[:, :, ordinary:], extra),
            normalizers=normalizers,
        )


def check_images(pixel_values: Tensor, pixel_mask: Tensor | None, num_channels: int) -> None:
    """Raises:
    ValueError: not (B, num_channels, H, W), or a mask that is not (B, H, W).
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` must be (batch, {num_channels}, height, width), got {tuple(pixel_values.shape)}. "
            "The image processor makes them."
        )
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if pixel_mask is not None and pixel_mask.shape != expected:
        raise ValueError(
            f"`pixel_mask` must be {tuple(expected)} to fit `pixel_values`, got {tuple(pixel_mask.shape)}."
        )


__all__ = ["DetrForDetection", "DetrModel"]
