"""What this machine could do at best: FLOPs of a computation, the measured matrix-multiply rate, and the share reached.

    python benchmarks/roofline.py

One multiply-add is two FLOPs, in the counter as in the rate. The counter sees matrix multiplies, convolutions and
attention; norms, activations and copies count nothing, so a share of 100 % is out of reach.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

SIZES = (512, 1024, 2048)
SECONDS_A_SIZE = 0.7
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


# The counter of torch 2.14 knows the attention kernels of GPUs only; this one would count as zero.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of one call, with its backward pass if the call runs it. Not to be timed, and of the eager model: a
    compiled or exported one hides its operators."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return int(counter.get_total_flops())


def _seconds(function: Callable[[], Any], budget: float) -> float:
    """Median over as many calls as fit the budget of seconds, at least five, after two to warm up."""
    function(), function()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < budget:
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _torch_mm(size: int, dtype: torch.dtype) -> Callable[[], Any]:
    one, other = torch.randn(2, size, size).to(dtype)
    return functools.partial(torch.mm, one, other, out=torch.empty(size, size, dtype=dtype))


def _onednn(size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """The same product as a 1x1 convolution of size pixels, which oneDNN computes."""
    image = torch.randn(1, size, size // 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(size, size, 1, 1).to(dtype)
    return functools.partial(torch.nn.functional.conv2d, image, weight)


# float32 `torch.mm` is MKL, which leaves half of what an AMD core can do; oneDNN, behind convolutions, does not.
MATMULS = {"torch.mm": _torch_mm, "1x1 convolution": _onednn}


@functools.cache
def matmul_rates(dtype: torch.dtype, threads: int) -> dict[tuple[str, int], float]:
    """FLOP/s of square matrix multiplies by (how, size), at this number of threads. Takes ten seconds, once."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        rates = {
            (name, size): 2 * size**3 / _seconds(make(size, dtype), SECONDS_A_SIZE)
            for name, make in MATMULS.items()
            for size in SIZES
        }
    torch.set_num_threads(before)
    return rates


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best matrix multiply of all sizes and ways, at the current number of threads: the roof."""
    return max(matmul_rates(dtype, torch.get_num_threads()).values())


def convolution_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 3x3 convolution as in the third stage of ResNet-50 at 800 x 1066, channels-last; for information."""
    image = torch.randn(1, 256, 50, 67).to(dtype).contiguous(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        flops = count_flops(lambda: layer(image))
        return flops / _seconds(lambda: layer(image), SECONDS_A_SIZE)


def share_of_roofline(flops: int, seconds: float, dtype: torch.dtype) -> float:
    """The rate reached over the best matrix-multiply rate of this dtype, 1 = all of it."""
    return flops / seconds / peak(dtype)


def roofline_line(flops: int, seconds: float, dtype: torch.dtype) -> str:
    roof, name = peak(dtype), str(dtype).removeprefix("torch.")
    return (
        f"roofline: {flops / 1e9:.1f} GFLOP at {roof / 1e9:.0f} GFLOP/s {name} matmul = {flops / roof * 1e3:.0f} ms; "
        f"took {seconds * 1e3:.0f} ms, reached {share_of_roofline(flops, seconds, dtype):.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"| {args.threads} threads, GFLOP/s | float32 | bfloat16 |\n|---|---|---|")
    dtypes = (torch.float32, torch.bfloat16)
    for key in matmul_rates(torch.float32, args.threads):
        rates = [matmul_rates(dtype, args.threads)[key] / 1e9 for dtype in dtypes]
        print(f"| {key[0]}, {' x '.join([str(key[1])] * 3)} | {rates[0]:.0f} | {rates[1]:.0f} |")
    rates = [convolution_rate(dtype) / 1e9 for dtype in dtypes]
    print(f"| 3x3 convolution, 256 channels, 50 x 67 | {rates[0]:.0f} | {rates[1]:.0f} |\n")
    one, other = torch.randn(2, 1536, 1536)
    flops = count_flops(lambda: one @ other)
    print(roofline_line(flops, _seconds(lambda: one @ other, SECONDS_A_SIZE), torch.float32))


if __name__ == "__main__":
    main()
