"""Images of many sizes on a CPU: oneDNN's default number of kept kernels against that of our scripts.

    python benchmarks/many_sizes.py
    python benchmarks/many_sizes.py --quick

One image each of 250 sizes between 200 x 200 and 360 x 480 pixels, one after the other, three times, with a prepared
DETR on a ResNet-50 in the preferred precision. Each number of kernels has a process of its own.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import machine

from hf_detr import DetrConfig, DetrForDetection
from hf_detr.runtime.cores import KEPT_KERNELS
from hf_detr.speed import prepare_for_inference
from hf_detr.training import preferred_precision, use_all_cores

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ROUNDS = 3


def measure(quick: bool) -> None:
    """Print a row: the number of kernels, seconds of each round, and the resident set in MiB at the end."""
    use_all_cores()
    small = {"d_model": 128, "encoder_layers": 3, "decoder_layers": 3}
    model = DetrForDetection(DetrConfig(backbone="resnet18" if quick else "resnet50", **small)).eval()
    fast = prepare_for_inference(model, torch.bfloat16 if preferred_precision() == "bf16" else None)
    rng = random.Random(0)
    sizes = [(rng.randrange(200, 360), rng.randrange(200, 480)) for _ in range(3 if quick else 250)]
    cells = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with torch.no_grad():
            for height, width in sizes:
                fast(torch.randn(1, 3, height, width))
        cells.append(f"{time.perf_counter() - started:.1f} s")
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    print(f"| {os.environ[VARIABLE]} | {' | '.join(cells)} | {int(resident.split()[1]) // 1024} MiB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes and a small backbone, to test the script")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.quick)
        return
    print(f"{machine()}\n\n| kernels kept | {' | '.join(f'round {n + 1}' for n in range(ROUNDS))} | memory |")
    print("|---|" + "---|" * (ROUNDS + 1), flush=True)
    command = [sys.executable, __file__, "--measure", *(["--quick"] if args.quick else [])]
    for capacity in (1024, KEPT_KERNELS):
        subprocess.run(command, env=os.environ | {VARIABLE: str(capacity)}, check=True)


if __name__ == "__main__":
    main()
