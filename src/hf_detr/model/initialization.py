"""The weights to start from. Every function leaves alone what a checkpoint has filled."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .anchor_decoder import AnchorDecoder, ConditionalAttention
from .heads import MLP, inverse_sigmoid
from .transformer import Decoder, Encoder, FeedForward, MultiHeadAttention


def init_as_torch(layer: nn.Linear | nn.Conv2d) -> None:
    """PyTorch's default for linear layers and convolutions; leaves alone what a checkpoint filled."""
    bound = layer.weight[0].numel() ** -0.5
    init.uniform_(layer.weight, -bound, bound)
    init.uniform_(layer.bias, -bound, bound)


def init_mlp(mlp: MLP) -> None:
    for layer in mlp.layers:
        if isinstance(layer, nn.Linear):
            init_as_torch(layer)


def init_transformer(stack: Encoder | Decoder | AnchorDecoder, gain: float) -> None:
    """Xavier-uniform matrices as in the paper's code, where query, key and value form one (3d, d) matrix: its bound is
    the square root of 1/2 of the one for a (d, d) matrix. Attention biases are 0, those of feed-forward PyTorch's."""
    for module in stack.modules():
        if isinstance(module, MultiHeadAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                fused = projection is not module.o_proj
                init.xavier_uniform_(projection.weight, gain=gain * (0.5**0.5 if fused else 1.0))
                init.zeros_(projection.bias)
            if isinstance(module, ConditionalAttention):
                for projection in (module.q_position_proj, module.k_position_proj):
                    init.xavier_uniform_(projection.weight, gain=gain)
                    init.zeros_(projection.bias)
        elif isinstance(module, MLP):
            init_mlp(module)
        elif isinstance(module, FeedForward):
            for layer in (module.fc1, module.fc2):
                init.xavier_uniform_(layer.weight, gain=gain)
                bound = layer.in_features**-0.5
                init.uniform_(layer.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
    if isinstance(stack, AnchorDecoder):  # the first boxes are the anchors
        init.zeros_(stack.bbox_predictor.layers[-1].weight)
        init.zeros_(stack.bbox_predictor.layers[-1].bias)


def init_queries(queries: nn.Embedding, anchors: bool, first: int = 0) -> None:
    """N(0, 1) for learned queries. Anchors are spread evenly: the image is filled by the R2 sequence of M. Roberts (an
    evenly distributed sequence, whatever its length), from its element `first` on, with boxes of a quarter of the
    image's sides."""
    if not anchors:
        init.normal_(queries.weight)
        return
    number = torch.arange(first + 1, first + queries.num_embeddings + 1, dtype=torch.float64, device="cpu")
    step = torch.tensor([1 / 1.32471795724474602596, 1 / 1.32471795724474602596**2], dtype=torch.float64, device="cpu")
    centers = ((0.5 + number[:, None] * step) % 1).float()
    boxes = torch.cat((centers, torch.full_like(centers, 0.25)), dim=1)
    init.copy_(queries.weight, inverse_sigmoid(boxes))


def init_class_head(head: nn.Linear, prior_probability: float | None) -> None:
    """PyTorch's default, or a bias that gives all objects together the prior probability (arXiv 1708.02002, 4.1)."""
    init_as_torch(head)
    if prior_probability is not None:
        classes = head.out_features - 1
        bias = torch.zeros(head.out_features, device="cpu")
        bias[-1] = math.log(classes * (1 - prior_probability) / prior_probability)
        init.copy_(head.bias, bias)
