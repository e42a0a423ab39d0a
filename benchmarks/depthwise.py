"""The gradient of depthwise convolutions on a CPU: float32, bfloat16, and bfloat16 as `prepare_for_training` runs it.

    python benchmarks/depthwise.py

Channels-last, forward and backward of one convolution, at the sizes of EfficientNet-Lite0 in an image of 384 x 384.
Where the second column is not slower than the first one, the third gains nothing.
"""

from collections.abc import Callable

import torch
from measure import machine, median
from torch import Tensor, nn

from hf_detr.speed.depthwise import widen
from hf_detr.training import use_all_cores

REPEATS = 15
# images, channels, side of the input, kernel, stride
CASES = (
    (1, 96, 192, 3, 2),
    (1, 144, 96, 3, 1),
    (1, 144, 96, 5, 2),
    (1, 240, 48, 3, 2),
    (1, 672, 24, 5, 1),
    (4, 672, 24, 5, 1),
)


def main() -> None:
    use_all_cores()
    print(f"{machine()}\n\n| images, channels, side, kernel, stride | float32 | bfloat16 | as prepared |")
    print("|---|---|---|---|")
    for count, channels, side, kernel, stride in CASES:
        convolution = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        images = torch.randn(count, channels, side, side).contiguous(memory_format=torch.channels_last)
        cells = [median(step(convolution, images), REPEATS), median(step(convolution, images.bfloat16()), REPEATS)]
        widen(nn.Sequential(convolution))
        cells.append(median(step(convolution, images.bfloat16()), REPEATS))
        print(f"| {count}, {channels}, {side}, {kernel}, {stride} | {' | '.join(f'{ms:.2f} ms' for ms in cells)} |")


def step(convolution: nn.Conv2d, images: Tensor) -> Callable[[], object]:
    images = images.detach().requires_grad_()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=images.dtype == torch.bfloat16):
            output: Tensor = convolution(images)
        return output

    gradient = torch.randn_like(forward())  # channels-last as well

    def run() -> object:
        return torch.autograd.grad(forward(), (images, *convolution.parameters()), gradient)

    return run


if __name__ == "__main__":
    main()
