"""Batch norm with fixed statistics is a scale and a shift per channel, which the convolution before it can apply:
norm(conv(x)) = conv'(x) with weight' = scale · weight and bias' = shift + scale · bias.

For training the weights are folded anew in each step, so that gradients of the weight are those of the two modules in
turn, while nothing of the norm is computed on activations; all images of a batch share them, whatever their sizes. For
prediction it is done once.
"""

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

from ..model.backbone import Backbone
from ..model.timm_network import create_network
from .depthwise import convolve, narrow

# exactly these: a subclass may do more with its weights, as weight standardisation does
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)


class FoldedWeights:
    """The folded weights of one forward pass of a backbone, which runs its network once for each image size. A hook
    before and after that pass."""

    def __init__(self) -> None:
        self.of_module: dict[int, tuple[Tensor, Tensor]] | None = None  # None: the backbone does not run

    def __call__(self, backbone: nn.Module, inputs: Any, *output: Any) -> None:
        self.of_module = None if output else {}


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies the frozen batch norm after it as well.

    Attributes:
        norm: that norm, in a tuple, since it stays a module of the network at its own place.
        shared: what the folded weights of this batch are kept in.
        same_padding: as timm's `Conv2dSame` pads.
    """

    norm: tuple[Any]
    shared: FoldedWeights
    same_padding: bool

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of both together."""
        (norm,) = self.norm
        if norm.weight.is_meta != self.weight.is_meta:
            raise RuntimeError(
                "A model that was prepared for training cannot be offloaded: its convolutions read the norms after "
                "them. Offload the plain model (from_pretrained with device_map)."
            )
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        gain, offset, mean, variance = (tensor.to(wide) for tensor in tensors)
        scale = gain * (variance + norm.eps).rsqrt()
        shift = offset - mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        return (self.weight * scale[:, None, None, None]).to(self.weight.dtype), shift.to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Conv2d
        if torch.compiler.is_compiling():
            return convolve(self, input, *self.folded())
        self.norm[0].applied = True
        kept = self.shared.of_module
        if kept is None:
            return convolve(self, input, *self.folded())
        if id(self) not in kept:
            kept[id(self)] = self.folded()
        return convolve(self, input, *kept[id(self)])

    def _replicate_for_data_parallel(self) -> Any:
        raise NotImplementedError(
            "A model that was prepared for training cannot run in nn.DataParallel: replicas of its convolutions would "
            "read the norms of the first device. Use DistributedDataParallel, or the plain model."
        )


class _FoldedNorm:
    """A norm that the convolution before it applies; raises if that convolution did not run."""

    applied = False

    def take(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not self.applied:
            raise RuntimeError(
                "A batch norm of the backbone is folded into the convolution before it, and that convolution did not "
                "run: it was replaced or wrapped after prepare_for_training. Change the plain model, then prepare it."
            )
        self.applied = False


class FoldedNorm(_FoldedNorm, FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.take()
        return x


class FoldedNormAct(_FoldedNorm, FrozenBatchNormAct2d):
    """The same with an activation, which stays here."""

    def forward(self, x: Tensor) -> Tensor:
        self.take()
        return self.act(self.drop(x))


FOLDED_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    FrozenBatchNorm2d: FoldedNorm,
    FrozenBatchNormAct2d: FoldedNormAct,
}


class _Uses(TorchDispatchMode):
    """Finds which convolutions' outputs are read by anything but one norm."""

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

    def watch(self, name: str, module: nn.Module) -> None:
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

        module.register_forward_pre_hook(count)
        if type(module) in CONVOLUTIONS:
            module.register_forward_hook(leave_convolution)
        else:
            module.register_forward_pre_hook(enter_norm)
            module.register_forward_hook(leave_norm)


def exclusive_pairs(network: Any, images: Tensor) -> dict[str, str]:
    """{convolution: norm} by name, where that norm is the only reader of what the convolution returns, and each runs
    once. Runs the network; it keeps hooks, so pass a copy, on the meta device, where it computes nothing."""
    uses = _Uses()
    for name, module in network.named_modules():
        if type(module) in CONVOLUTIONS or type(module) in NORMS:
            uses.watch(name, module)
    with uses, torch.no_grad():
        features: list[Tensor] = network(images)
    returned = {uses.outputs[id(level)][0] for level in features if id(level) in uses.outputs}
    return {
        convolution: norm
        for convolution, norm in uses.norm_of.items()
        if uses.calls[convolution] == uses.calls[norm] == 1 and convolution not in uses.elsewhere | returned
    }


def find_pairs(backbone: Backbone) -> list[tuple[str, str]]:
    """The [`exclusive_pairs`] of the network as timm builds it. Modules that were replaced since, or have hooks, are in
    no pair."""
    if not any(type(module) in (*NORMS, FoldedNorm, FoldedNormAct) for module in backbone.model.modules()):
        return []
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network: Any = create_network(backbone.name, **backbone._timm_kwargs).eval()
        images = torch.zeros(1, backbone._timm_kwargs["in_chans"], *network.pretrained_cfg["input_size"][-2:])
        pairs = exclusive_pairs(network, images)

    modules = dict(backbone.model.named_modules())

    def is_plain(name: str) -> bool:
        module = modules.get(name, backbone)
        kinds = (*CONVOLUTIONS, *NORMS, FoldedConv2d, FoldedNorm, FoldedNormAct)
        return type(module) in kinds and not module._forward_hooks and not module._forward_pre_hooks

    return [pair for pair in pairs.items() if all(map(is_plain, pair))]


def fold(backbone: Backbone) -> None:
    """Let convolutions apply the frozen norms after them, in place. Parameters and buffers keep their names; what was
    folded already stays as it is."""
    narrow(backbone.model)
    shared = next((hook for hook in backbone._forward_pre_hooks.values() if isinstance(hook, FoldedWeights)), None)
    for convolution_name, norm_name in find_pairs(backbone):
        convolution: Any = backbone.model.get_submodule(convolution_name)
        norm = backbone.model.get_submodule(norm_name)
        if type(convolution) in CONVOLUTIONS and type(norm) in FOLDED_NORMS:
            if shared is None:
                shared = FoldedWeights()
                backbone.register_forward_pre_hook(shared)
                backbone.register_forward_hook(shared, always_call=True)
            convolution.same_padding = isinstance(convolution, Conv2dSame)
            convolution.norm, convolution.shared = (norm,), shared
            convolution.__class__, norm.__class__ = FoldedConv2d, FOLDED_NORMS[type(norm)]


def _unfold(convolution: Any) -> None:
    plain = Conv2dSame if convolution.same_padding else nn.Conv2d
    del convolution.norm, convolution.shared, convolution.same_padding
    convolution.__class__ = plain


@torch.no_grad()
def fuse(backbone: Backbone) -> None:
    """Write the norms into the weights of the convolutions for good, in place, and take them out of the network: an
    identity, or their activation, is left. Norms that still gather statistics are fused with those they have."""
    network = backbone.model
    narrow(network)
    for hooks in (backbone._forward_pre_hooks, backbone._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, FoldedWeights)]:
            del hooks[key]
    for convolution_name, norm_name in find_pairs(backbone):
        convolution: Any = network.get_submodule(convolution_name)
        norm: Any = network.get_submodule(norm_name)
        if type(convolution) is FoldedConv2d:
            _unfold(convolution)
        elif type(convolution) not in CONVOLUTIONS or type(norm) not in NORMS or norm.weight is None:
            continue
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        activation = [norm.drop, norm.act] if hasattr(norm, "act") else []
        network.set_submodule(norm_name, nn.Sequential(*activation) if activation else nn.Identity())
