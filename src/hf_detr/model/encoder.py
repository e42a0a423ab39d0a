"""Step 4: the encoder relates all locations of the image.

Unlike in a plain transformer, positions are added to queries and keys at *every* attention layer, never to values
(paper, section 3.2 and figure 10).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiHeadAttention
from .heads import MLP


@dataclass(frozen=True)
class LayerOptions:
    """The numbers that define a transformer layer. Dropouts are probabilities; `dropout` applies to the output of each
    attention and feed-forward block; `pre_norm` normalises before each block instead of after it."""

    d_model: int
    num_heads: int
    ffn_dim: int
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    pre_norm: bool = False


class Memory(NamedTuple):
    """What the decoder reads of the image: the encoder's output, one token per location of the feature map.

    Args:
        features: (B, hw, d), the paper's memory.
        positions: (B or 1, hw, d), its spatial position embeddings.
        mask: (B, h, w) bool, True = image, or None if nothing is padded.
        size: (h, w) of the feature map.
        attention_mask: `mask` in the form that the attention implementation takes, or None.
    """

    features: Tensor
    positions: Tensor
    mask: Tensor | None
    size: tuple[int, int]
    attention_mask: Any = None


class FeedForward(nn.Module):
    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.fc1 = nn.Linear(options.d_model, options.ffn_dim)
        self.fc2 = nn.Linear(options.ffn_dim, options.d_model)
        self.activation_fn = ACT2FN[options.activation_function]
        self.activation_dropout = options.activation_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        return self.fc2(dropout(hidden_states, p=self.activation_dropout, training=self.training))


class TransformerLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: self-attention, a feed-forward block, and where norms and residuals go."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.dropout = options.dropout
        self.pre_norm = options.pre_norm
        self.self_attn: nn.Module = MultiHeadAttention(options.d_model, options.num_heads, options.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(options.d_model)
        self.mlp = FeedForward(options)
        self.final_layer_norm = nn.LayerNorm(options.d_model)

    def before_block(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.pre_norm else hidden_states

    def after_block(self, norm: nn.Module, residual: Tensor, update: Tensor) -> Tensor:
        hidden_states = residual + dropout(update, p=self.dropout, training=self.training)
        return hidden_states if self.pre_norm else norm(hidden_states)

    def self_attention(
        self, hidden_states: Tensor, positions: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.before_block(self.self_attn_layer_norm, hidden_states)
        positioned = normed + positions
        update, weights = self.self_attn(positioned, positioned, normed, attention_mask, attn_implementation, **kwargs)
        return self.after_block(self.self_attn_layer_norm, hidden_states, update), weights

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        update = self.mlp(self.before_block(self.final_layer_norm, hidden_states))
        return self.after_block(self.final_layer_norm, hidden_states, update)


class EncoderLayer(TransformerLayer):
    """Self-attention among the locations of the image, then a feed-forward block."""

    def forward(
        self, hidden_states: Tensor, positions: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, hw, d) to (B, hw, d) and the attention weights (B, heads, hw, hw) or None."""
        hidden_states, weights = self.self_attention(
            hidden_states, positions, attention_mask, attn_implementation, **kwargs
        )
        return self.feed_forward(hidden_states), weights


class Encoder(nn.Module):
    """A stack of encoder layers; pre-norm needs one more norm at its end.

    Args:
        scale_positions: multiply the positions, for each layer, by a function of its input, which all layers share
            (the code of DAB-DETR).
    """

    def __init__(self, num_layers: int, options: LayerOptions, *, scale_positions: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(options.d_model) if options.pre_norm else nn.Identity()
        self.position_scale = MLP([options.d_model] * 3) if scale_positions and num_layers else None

    def forward(
        self, features: Tensor, positions: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(B, hw, d) to hidden states (the input, then each layer's output; the last one is the encoder's result; each
        (B, hw, d)) and the attention weights of each layer."""
        states, weights = [features], []
        for layer in self.layers:
            scaled = positions if self.position_scale is None else positions * self.position_scale(states[-1])
            hidden_states, layer_weights = layer(states[-1], scaled, attention_mask, attn_implementation, **kwargs)
            states.append(hidden_states)
            weights.append(layer_weights)
        states[-1] = self.layernorm(states[-1])
        return tuple(states), tuple(weights)
