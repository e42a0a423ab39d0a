"""Linear layers for a CPU in float32: the same numbers from the faster of PyTorch's two libraries."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..model.attention import Attention
from ..model.encoder import FeedForward

# MKL multiplies float32 matrices for `nn.Linear`, oneDNN runs convolutions. On processors that are not Intel's, MKL
# does not use AVX-512 and takes twice as long.
HAS_BOTH = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


class ConvolvedLinear(nn.Linear):
    """`nn.Linear`, in float32 on a CPU as a convolution with a 1x1 kernel."""

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        """(..., in_features) to (..., out_features)"""
        if (
            not HAS_BOTH
            or type(self.weight) is not nn.Parameter  # sharded or quantised
            or not input.numel()
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined]
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        image = input.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)  # of one row, channels last
        output: Tensor = conv2d(image, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def use_fast_linear(model: nn.Module) -> None:
    """Replace the linear layers of attention and feed-forward blocks, in place; parameters keep their names."""
    for block in model.modules():
        if isinstance(block, (Attention, FeedForward)):
            for module in block.modules():
                if type(module) is nn.Linear:
                    module.__class__ = ConvolvedLinear
