"""Batch norm with fixed statistics multiplies each channel and adds to it, which the convolution before it can do as
well: norm(conv(x)) = conv'(x) with weight' = scale · weight and bias' = shift + scale · bias.

In training that is done anew in each step, so that gradients of the weight are those of the two modules in turn, while
nothing of the norm is computed on activations. For prediction it is done once.
"""

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import FrozenBatchNormAct2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

# exactly these: a subclass may do more with its weights, as weight standardisation does
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)


class FoldedConv2d(nn.Conv2d):
    """A convolution that does the work of the frozen batch norm after it.

    Attributes:
        norm: that norm, in a tuple, since it stays a module of the network where it was; empty once its numbers are in
            the convolution's own weights.
        same_padding: as timm's `Conv2dSame` pads.
    """

    norm: tuple[nn.Module, ...]
    same_padding: bool

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of both together."""
        if not self.norm:
            return self.weight, self.bias
        norm: Any = self.norm[0]
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        gain, offset, mean, variance = (
            tensor.to(wide) for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        scale = gain * (variance + norm.eps).rsqrt()
        shift = offset - mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        return (self.weight * scale[:, None, None, None]).to(self.weight.dtype), shift.to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Conv2d
        if self.same_padding:
            input = pad_same(input, list(self.kernel_size), list(self.stride), list(self.dilation))  # type: ignore[arg-type]
        return self._conv_forward(input, *self.folded())


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm whose work the convolution before it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedNormAct(FrozenBatchNormAct2d):
    """The same with an activation, which stays here."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


class _Uses(TorchDispatchMode):
    """Which convolutions' outputs are read by anything but one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used twice
        self.inside_norm = False
        self.calls: dict[str, int] = {}
        self.norm_of: dict[str, str] = {}
        self.elsewhere: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside_norm:
            for value in tree_leaves((args, kwargs)):
                if id(value) in self.outputs:
                    self.elsewhere.add(self.outputs[id(value)][0])
        return func(*args, **(kwargs or {}))

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        def count(*_: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1

        def leave_convolution(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.outputs[id(output)] = (name, output)

        def enter_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = self.outputs.get(id(inputs[0]))
            if found is not None and found[0] not in self.norm_of:
                self.norm_of[found[0]] = name
                self.inside_norm = True

        def leave_norm(*_: Any) -> None:
            self.inside_norm = False

        hooks = [module.register_forward_pre_hook(count)]
        if type(module) in CONVOLUTIONS:
            hooks.append(module.register_forward_hook(leave_convolution))
        else:
            hooks += [module.register_forward_pre_hook(enter_norm), module.register_forward_hook(leave_norm)]
        return hooks


def find_pairs(network: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, str]]:
    """Run a network once, in eval mode, and see which norm follows which convolution. On the meta device that computes
    nothing.

    Returns:
        its features, and {convolution: norm}, both by name, where that norm alone reads what the convolution gives, and
        each runs once.
    """
    uses, hooks = _Uses(), []
    for name, module in network.named_modules():
        if type(module) in CONVOLUTIONS or type(module) in NORMS:
            hooks += uses.watch(name, module)
    with uses:
        features: list[Tensor] = network(images)
    for hook in hooks:
        hook.remove()
    returned = {uses.outputs[id(level)][0] for level in features if id(level) in uses.outputs}
    pairs = {}
    for convolution, norm in uses.norm_of.items():
        once = uses.calls[convolution] == uses.calls[norm] == 1
        affine = network.get_submodule(norm).weight is not None
        if once and affine and convolution not in uses.elsewhere | returned:
            pairs[convolution] = norm
    return features, pairs


def fold(network: nn.Module, pairs: dict[str, str]) -> None:
    """Let convolutions do the work of the frozen norms among these pairs, in place. Parameters and buffers keep their
    names, and what was folded already stays as it is."""
    for convolution_name, norm_name in pairs.items():
        convolution, norm = network.get_submodule(convolution_name), network.get_submodule(norm_name)
        if type(convolution) not in CONVOLUTIONS:  # folded already, or replaced by something that does more
            continue
        if type(norm) is FrozenBatchNorm2d:
            folded_norm: nn.Module = _as(FoldedNorm, norm)
        elif type(norm) is FrozenBatchNormAct2d:
            folded_norm = _as(FoldedNormAct, norm)
        else:
            continue
        folded: Any = _as(FoldedConv2d, convolution)
        folded.norm = (folded_norm,)
        folded.same_padding = isinstance(convolution, Conv2dSame)
        network.set_submodule(convolution_name, folded)
        network.set_submodule(norm_name, folded_norm)


@torch.no_grad()
def fold_for_good(network: nn.Module) -> None:
    """Write what is folded into the weights of the convolutions, in place. The norms' own numbers mean nothing then."""
    for module in network.modules():
        if isinstance(module, FoldedConv2d) and module.norm:
            weight, bias = module.folded()
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            module.norm = ()


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same parameters, buffers, parts and hooks in a module of another class."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other
