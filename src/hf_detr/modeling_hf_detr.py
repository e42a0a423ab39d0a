"""`DetrModel` and `DetrForDetection`: steps 2 to 7 wired together, as in figure 2 of the paper."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask

from .backbone import Backbone
from .configuration_hf_detr import DetrConfig
from .heads import BoxHead, build_class_head
from .loss import check_labels, set_loss
from .outputs import DetrDetectionOutput, DetrModelOutput
from .position_embedding import LearnedPositionEmbedding, build_position_embedding
from .pretrained import DetrPreTrainedModel, fit_rows
from .transformer import Decoder, Encoder, FeedForward, MultiHeadAttention


def _init_as_torch(layer: nn.Linear | nn.Conv2d) -> None:
    """PyTorch's default for linear layers and convolutions; leaves alone what a checkpoint filled."""
    bound = layer.weight[0].numel() ** -0.5
    init.uniform_(layer.weight, -bound, bound)
    init.uniform_(layer.bias, -bound, bound)


def _init_transformer(stack: Encoder | Decoder, gain: float) -> None:
    """Xavier-uniform matrices as in the paper's code, where query, key and value form one (3d, d) matrix: its bound is
    the square root of 1/2 of the one for a (d, d) matrix. Attention biases are 0, those of feed-forward PyTorch's."""
    for module in stack.modules():
        if isinstance(module, MultiHeadAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                fused = projection is not module.o_proj
                init.xavier_uniform_(projection.weight, gain=gain * (0.5**0.5 if fused else 1.0))
                init.zeros_(projection.bias)
        elif isinstance(module, FeedForward):
            for layer in (module.fc1, module.fc2):
                init.xavier_uniform_(layer.weight, gain=gain)
                bound = layer.in_features**-0.5
                init.uniform_(layer.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


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
        self.position_embedding = build_position_embedding(config.position_embedding_type, config.d_model)
        self.input_projection = nn.Conv2d(self.backbone.channels, config.d_model, kernel_size=1)
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        layer = {
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": config.activation_dropout,
            "activation_function": config.activation_function,
            "pre_norm": config.pre_norm,
        }
        self.encoder = Encoder(
            config.encoder_layers, config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim, **layer
        )
        self.decoder = Decoder(
            config.decoder_layers, config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, **layer
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
        _init_as_torch(self.input_projection)
        init.normal_(self.query_position_embeddings.weight)
        if isinstance(self.position_embedding, LearnedPositionEmbedding):
            init.uniform_(self.position_embedding.row_embeddings.weight)
            init.uniform_(self.position_embedding.column_embeddings.weight)
        for stack in (self.encoder, self.decoder):
            _init_transformer(stack, self.config.init_xavier_std)
        self._is_hf_initialized = True

    @torch.no_grad()
    def resize_queries(self, num_queries: int) -> str:
        """Change the number of object queries, in place: the first ones keep their weights, further ones are drawn
        from N(0, 1) as in a new model. Returns one sentence that says what was done."""
        old = self.query_position_embeddings
        kept = {row: row for row in range(min(num_queries, old.num_embeddings))}
        new = nn.Embedding(num_queries, old.embedding_dim)
        self.query_position_embeddings = fit_rows(new, old, kept)
        before, self.config.num_queries = self.config.num_queries, num_queries
        rest = f"{num_queries - len(kept)} new ones start at random" if num_queries > before else "the rest is dropped"
        return f"Object queries: {before} to {num_queries}, the first {len(kept)} keep their weights, {rest}."

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DetrModelOutput | tuple[Any, ...]:
        """Args:
            pixel_values: (B, 3, H, W), normalised, padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None if nothing is padded. How padding is kept from
                changing an image's result: see [`~hf_detr.backbone.Backbone`].
            output_attentions: also return attention weights; this call then runs "eager" attention, the only
                implementation that has them.
            output_hidden_states: also return every layer's hidden states.
            return_dict: `False` returns a plain tuple.

        Raises:
            ValueError: `pixel_values` is not (B, num_channels, H, W), or `pixel_mask` does not fit it.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        _check_images(pixel_values, pixel_mask, config.num_channels)

        feature_map, mask = self.backbone(pixel_values, pixel_mask)
        height, width = feature_map.shape[-2:]
        features = self.input_projection(feature_map).flatten(2).transpose(1, 2)  # (B, hw, d)
        positions = self.position_embedding(height, width, mask, features.device).to(features.dtype)

        attention = "eager" if output_attentions else config._attn_implementation
        encoder_states, encoder_attentions = self.encoder(
            features, positions, self._attention_mask(mask, features, features, attention), attention
        )
        memory = encoder_states[-1]
        queries = self.query_position_embeddings.weight
        decoder_states, intermediate, decoder_attentions, cross_attentions = self.decoder(
            queries,
            memory,
            positions,
            self._attention_mask(mask, memory.new_empty(len(memory), *queries.shape), memory, attention),
            attention,
        )
        output = DetrModelOutput(
            last_hidden_state=decoder_states[-1],
            encoder_last_hidden_state=memory,
            intermediate_hidden_states=intermediate if config.auxiliary_loss else None,
            decoder_hidden_states=decoder_states if output_hidden_states else None,
            decoder_attentions=decoder_attentions if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions else None,
            encoder_hidden_states=encoder_states if output_hidden_states else None,
            encoder_attentions=encoder_attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

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
        self.bbox_predictor = BoxHead(config.d_model)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As for `DetrModel`, and PyTorch's own initialisation for the heads."""
        if getattr(self, "_is_hf_initialized", False):
            return
        self.model.initialize_weights()
        for layer in (self.class_labels_classifier, *self.bbox_predictor.layers):
            _init_as_torch(layer)
        self._is_hf_initialized = True

    @classmethod
    def from_pretrained_backbone(cls, config: DetrConfig, checkpoint: str | Path | None = None) -> Self:
        """A new DETR whose backbone starts from pretrained timm weights; everything else is random.

        Args:
            checkpoint: a local `.safetensors` or `.pth` file with the weights of the timm network (opened with
                `weights_only=True`); None fetches the weights that timm names for `config.backbone`, from the Hub.

        Raises:
            FileNotFoundError, ValueError: see [`~hf_detr.backbone.Backbone.load_pretrained`].
        """
        model = cls(config)
        model.model.backbone.load_pretrained(checkpoint)
        return model

    def resize_queries(self, num_queries: int) -> str:
        """See [`DetrModel.resize_queries`]."""
        return self.model.resize_queries(num_queries)

    @torch.no_grad()
    def resize_class_head(self, id2label: dict[int, str]) -> str:
        """Predict these classes from now on, in place. A class that the model knows by name keeps its weights, and so
        does "no object"; the others start at random. Names that say nothing (`LABEL_0`, or one that occurs twice, as
        "N/A" does in the published COCO checkpoints) are no match.

        Returns:
            one sentence that says what was done.
        """
        old_names, old = self.config.id2label, self.class_labels_classifier
        count = Counter(old_names.values())
        row_of = {n: row for row, n in old_names.items() if count[n] == 1 and not re.fullmatch(r"LABEL_\d+", n)}
        kept = {row: row_of[name] for row, name in id2label.items() if name in row_of}
        no_object = {len(id2label): len(old_names)}
        new = build_class_head(old.in_features, len(id2label))
        self.class_labels_classifier = fit_rows(new, old, kept | no_object)
        self.config.id2label = dict(id2label)
        self.config.label2id = {name: row for row, name in id2label.items()}
        fresh = [name for row, name in id2label.items() if row not in kept]
        some = f" ({', '.join(fresh[:5])}{', ...' if len(fresh) > 5 else ''})" if fresh else ""
        return (
            f"Class head: {len(old_names)} to {len(id2label)} classes, {len(kept)} keep their weights by name, "
            f"{len(fresh)} start at random{some}, {len(old_names) - len(kept)} are dropped."
        )

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Any]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DetrDetectionOutput | tuple[Any, ...]:
        """Args:
            labels: one dict an image: `class_labels` (N,) in [0, num_labels) and `boxes` (N, 4) cxcywh in [0, 1] of
                the image without its padding. N may be 0. The image processor makes them from COCO annotations.
            Others: see [`DetrModel.forward`].

        Raises:
            ValueError: labels that do not fit, before anything is computed (see `hf_detr.loss.check_labels`).
            FloatingPointError: with labels, a prediction is NaN or infinite.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None:
            check_labels(labels, self.config.num_labels, len(pixel_values))
        outputs = self.model(
            pixel_values,
            pixel_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states = dict(outputs)
        intermediate = states.pop("intermediate_hidden_states", None)  # (L, B, Q, d), the last layer last
        if labels is None or intermediate is None:
            intermediate = outputs.last_hidden_state[None]
        logits = self.class_labels_classifier(intermediate)  # (L, B, Q, num_labels+1)
        pred_boxes = self.bbox_predictor(intermediate)  # (L, B, Q, 4)

        loss, loss_dict, auxiliary_outputs = None, None, None
        if labels is not None:
            config = self.config
            loss, loss_dict = set_loss(
                logits,
                pred_boxes,
                labels,
                class_cost=config.class_cost,
                bbox_cost=config.bbox_cost,
                giou_cost=config.giou_cost,
                bbox_loss_coefficient=config.bbox_loss_coefficient,
                giou_loss_coefficient=config.giou_loss_coefficient,
                eos_coefficient=config.eos_coefficient,
            )
            if config.auxiliary_loss:
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


def _check_images(pixel_values: Tensor, pixel_mask: Tensor | None, num_channels: int) -> None:
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
