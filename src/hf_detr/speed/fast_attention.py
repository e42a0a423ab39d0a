"""Attention for a CPU in bfloat16: matrix products and a softmax in place of PyTorch's fused kernel."""

from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import Attention, ConditionalAttention, MultiHeadAttention, PositionedSelfAttention

MAX_SCORES = 2**24  # the table of scores has to fit into caches to be fast


class _WrittenOut(Attention):
    """PyTorch's fused kernel takes two to four times as long as matrix products and a softmax there, whose table of
    scores is small for the few locations of a feature map."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        small = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= MAX_SCORES
        on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
        if attn_implementation != "sdpa" or not (small and on_cpu):
            return super().attend(query, key, value, attention_mask, attn_implementation, **kwargs)
        output, _ = super().attend(query, key, value, attention_mask, "eager", **kwargs)
        return output, None


class WrittenOutAttention(_WrittenOut, MultiHeadAttention):
    pass


class WrittenOutConditionalAttention(_WrittenOut, ConditionalAttention):
    pass


class WrittenOutPositionedAttention(_WrittenOut, PositionedSelfAttention):
    pass


def use_fast_attention(model: nn.Module) -> None:
    """Replace the attention of all layers, in place; parameters keep their names."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        MultiHeadAttention: WrittenOutAttention,
        ConditionalAttention: WrittenOutConditionalAttention,
        PositionedSelfAttention: WrittenOutPositionedAttention,
    }
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
