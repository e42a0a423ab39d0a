"""Which memory format a network runs in, and the convolutions that channels-last makes unsafe.

oneDNN up to the version in torch 2.14.1 (uxlfoundation/oneDNN#6035) computes the weight gradient of a strided 1x1
convolution in a workspace with room for `in_channels` values a pixel, but steps through it by a vector register (8 or
16 values). With fewer channels, float32 and channels-last, it writes past the end: wrong gradients, a hang, or a
process killed by "corrupted double-linked list". RepVGG, MobileOne and FastViT have such a convolution on the three
channels of the image. `benchmarks/backbones.py` covers all timm families.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

VECTOR_WIDTH = 16  # float32 values in the widest vector register (AVX-512)


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution without padding that first selects every stride-th pixel, then convolves them with
    stride 1: weights, values and gradients of `nn.Conv2d`, safe in any memory format of input and weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return conv2d(input[..., ::rows, ::columns], weight, bias)


def unsafe_convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Names and modules of the convolutions whose training in channels-last on a CPU corrupts memory."""
    for name, module in network.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and not isinstance(module, SubsampledConv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.padding in ((0, 0), "valid")
            and module.groups == 1
            and module.in_channels < VECTOR_WIDTH
        ):
            yield name, module


def replace_unsafe_convolutions(network: nn.Module) -> list[str]:
    """Put a [`SubsampledConv2d`] with the same parameters in the place of each unsafe convolution, in place.

    Names and parameters stay, so checkpoints and optimizers are not affected. Convolutions with a `forward` of their
    own (weight standardisation) stay: [`preferred_memory_format`] then keeps the whole network contiguous.

    Returns:
        The names of the modules replaced.
    """
    replaced = []
    for name, module in list(unsafe_convolutions(network)):
        if type(module).forward is not nn.Conv2d.forward:
            continue
        rows, columns = module.stride
        new = SubsampledConv2d(module.in_channels, module.out_channels, 1, (rows, columns), device="meta")
        new.weight, new.bias = module.weight, module.bias
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, new.train(module.training))
        replaced.append(name)
    return replaced


def preferred_memory_format(network: nn.Module) -> torch.memory_format:
    """The memory format for the input of a network: `torch.channels_last` if it convolves, else contiguous.

    A network convolves if its windows overlap. Networks that only cut the image into patches (ViT, Swin) compute on
    tokens, for which the format of the image makes no difference but costs a copy. A network with an unsafe convolution
    stays contiguous.
    """
    convolves = any(
        max(module.kernel_size) > max(module.stride) for module in network.modules() if isinstance(module, nn.Conv2d)
    )
    safe = next(unsafe_convolutions(network), None) is None
    return torch.channels_last if convolves and safe else torch.contiguous_format


class MemoryFormatHook:
    """A forward pre-hook that brings the images of a network to a memory format."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        self.memory_format = memory_format

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0].contiguous(memory_format=self.memory_format)

    def __reduce__(self) -> tuple[Any, ...]:  # torch.save cannot pickle a torch.memory_format
        return _hook_from_name, (str(self.memory_format).removeprefix("torch."),)


def _hook_from_name(name: str) -> MemoryFormatHook:
    return MemoryFormatHook(getattr(torch, name))


def use_memory_format(network: nn.Module) -> torch.memory_format:
    """Replace unsafe convolutions and run the network in its preferred memory format from now on, in place. Returns
    the format."""
    replace_unsafe_convolutions(network)
    memory_format = preferred_memory_format(network)
    if not any(isinstance(hook, MemoryFormatHook) for hook in network._forward_pre_hooks.values()):
        network.register_forward_pre_hook(MemoryFormatHook(memory_format))
    return memory_format
