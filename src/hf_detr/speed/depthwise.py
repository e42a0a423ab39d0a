"""Depthwise convolutions that train in bfloat16 on a CPU. oneDNN has a fast gradient in channels-last for 3x3 kernels
without stride and dilation only; all others take up to nine times as long as in float32. They run in float32,
therefore, inside a network that otherwise runs in bfloat16."""

from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn


def has_slow_gradient(convolution: nn.Conv2d) -> bool:
    """Whether its gradient is slow in bfloat16 and channels-last."""
    depthwise = convolution.groups == convolution.in_channels > 1
    form = convolution.kernel_size, convolution.stride, convolution.dilation
    return depthwise and form != ((3, 3), (1, 1), (1, 1))


def convolve(convolution: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of `input`, padded if `same_padding`, with this weight and bias; in float32 under autocast on a
    CPU if its gradient is slow in bfloat16. The result has the dtype of autocast in any case."""
    if getattr(convolution, "same_padding", False):
        sizes = (list(size) for size in (convolution.kernel_size, convolution.stride, convolution.dilation))
        input = pad_same(input, *sizes)  # type: ignore[arg-type]
    if (
        input.device.type != "cpu"
        or not torch.is_autocast_enabled("cpu")
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not has_slow_gradient(convolution)
    ):
        return convolution._conv_forward(input, weight, bias)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        wide = None if bias is None else bias.float()
        return convolution._conv_forward(input.float(), weight.float(), wide).to(dtype)


class WideConv2d(nn.Conv2d):
    """A convolution that runs by [`convolve`].

    Attributes:
        same_padding: as timm's `Conv2dSame` pads.
    """

    same_padding: bool

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Conv2d
        return convolve(self, input, self.weight, self.bias)


def widen(network: nn.Module) -> None:
    """Replace depthwise convolutions with a slow gradient, in place; parameters keep their names. A convolution of
    another class stays, since it may do more with its weights."""
    for module in network.modules():
        if type(module) in (nn.Conv2d, Conv2dSame) and has_slow_gradient(module):  # type: ignore[arg-type]
            convolution: Any = module
            convolution.same_padding = isinstance(module, Conv2dSame)
            convolution.__class__ = WideConv2d


def narrow(network: nn.Module) -> None:
    """Undo [`widen`], in place."""
    for module in network.modules():
        if type(module) is WideConv2d:
            convolution: Any = module
            plain = Conv2dSame if convolution.same_padding else nn.Conv2d
            del convolution.same_padding
            convolution.__class__ = plain
