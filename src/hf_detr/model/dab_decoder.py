"""Step 4, the decoder of DAB-DETR and DN-DETR as published (`query_type="dab"`, arXiv 2201.12329 and 2203.01305).

Queries are boxes, which every layer refines. `query_type="anchor"` is our variant: the sines of image and boxes have
the same temperature and are measured at the centres of locations, the self-attention has no separate projections of
positions, and boxes are refined from the same states as the predictions.
"""

from typing import Any

import torch
from torch import nn

from .anchor_decoder import AnchorDecoder
from .conditional_decoder import ConditionalDecoderLayer
from .decoder import DecoderOutput
from .encoder import LayerOptions, Memory
from .position_embedding import TEMPERATURE, box_waves
from .queries import Queries


class DabDecoder(AnchorDecoder):
    """A stack of conditional decoder layers on boxes.

    The next layer reads the box that the head makes of this layer's output, without gradient. The predicted box is made
    of the *normed* output and the box that this layer read, with gradient, as in the published code. The temperature of
    the boxes' sines is 10000 there, whatever that of the image.

    DN-DETR's denoising queries also attend to those that predict; here, as for every decoder, they do not.
    """

    centered_positions = False
    scales_encoder_positions = True
    min_side = 1e-6  # the published code divides by any number

    def build_layer(self, options: LayerOptions, *, is_first: bool) -> nn.Module:
        return ConditionalDecoderLayer(options, is_first=is_first)

    def forward(self, queries: Queries, memory: Memory, attn_implementation: str, **kwargs: Any) -> DecoderOutput:
        if queries.boxes is None:
            raise ValueError("The decoder of DAB-DETR needs queries that are boxes.")
        read = [queries.boxes]  # by each layer, with gradient
        self_attn_implementation = self.self_attn_implementation(queries, attn_implementation)
        states, normed, self_weights, cross_weights = [queries.content], [], [], []
        for number, layer in enumerate(self.layers):
            boxes = read[-1] if number == 0 else read[-1].detach()
            waves = box_waves(boxes, self.d_model // 2, TEMPERATURE).to(states[-1].dtype)
            hidden_states, layer_self, layer_cross = layer(
                states[-1],
                self.anchor_embedding(waves),
                self.center_positions(waves, boxes, states[-1], number == 0),
                memory.features,
                memory.positions,
                queries.attention_mask,
                memory.attention_mask,
                attn_implementation,
                self_attn_implementation,
                **kwargs,
            )
            read.append(self.bbox_predictor(hidden_states, boxes))
            states.append(hidden_states)
            normed.append(self.layernorm(hidden_states))
            self_weights.append(layer_self)
            cross_weights.append(layer_cross)
        hidden_states = torch.stack(normed)  # (L, B, T, d)
        predicted = self.bbox_predictor(hidden_states, torch.stack(read[:-1]))
        layer_states = (*states[:-1], normed[-1])
        return DecoderOutput(hidden_states, predicted, layer_states, tuple(self_weights), tuple(cross_weights))
