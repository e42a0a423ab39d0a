"""A training step with and without gradient checkpointing, bfloat16 and torch.compile: images a second and memory.

    python benchmarks/training.py
    python benchmarks/training.py --cases float32 bf16 --steps 3

Each case runs in a process of its own, so that its peak of the resident set is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from measure import machine

from hf_detr import DetrConfig, DetrForDetection
from hf_detr.speed import prepare_for_training
from hf_detr.training import compile_for_training, parameter_groups, use_all_cores

IMAGES, HEIGHT, WIDTH, OBJECTS, CLASSES = 2, 480, 640, 15, 91
CASES = {
    "float32": set(),
    "gradient checkpointing": {"checkpointing"},
    "bf16": {"bf16"},
    "bf16, checkpointing": {"bf16", "checkpointing"},
    "torch.compile": {"compile"},
    "torch.compile, bf16": {"compile", "bf16"},
}


def build(options: set[str], height: int = HEIGHT, width: int = WIDTH) -> tuple[DetrForDetection, dict]:
    """The paper's DETR on a ResNet-50 with random weights, and a batch of which both images fill it."""
    torch.manual_seed(0)
    names = {index: str(index) for index in range(CLASSES)}
    model = DetrForDetection(DetrConfig(backbone="resnet50", id2label=names)).train()
    if "plain" not in options:
        prepare_for_training(model)
    images = torch.randn(IMAGES, 3, height, width)
    if "checkpointing" in options:
        model.gradient_checkpointing_enable()
    sides = [torch.rand(OBJECTS, 2) * 0.4 + 0.05 for _ in range(IMAGES)]
    labels = [
        {
            "class_labels": torch.randint(CLASSES, (OBJECTS,)),
            "boxes": torch.cat((side / 2 + torch.rand(OBJECTS, 2) * (1 - side), side), dim=1),
        }
        for side in sides
    ]
    return model, {"pixel_values": images, "labels": labels}


def measure(case: str, steps: int) -> None:
    """Print seconds a step and the peak of the resident set, in a process that does nothing else."""
    use_all_cores()
    options = CASES[case]
    model, batch = build(options)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-5, 1e-4), fused=True)
    if "compile" in options:
        compile_for_training(model)
    seconds = []
    for _ in range(steps + 2):  # two to warm up, in which compiling happens
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB to GiB, on Linux
    found = {"seconds": seconds[2:], "first": seconds[0], "peak": peak, "loss": loss.item()}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.steps)
        return
    print(
        f"A training step, DETR ResNet-50, {IMAGES} images of {HEIGHT} x {WIDTH}, {OBJECTS} objects each; medians of "
        f"{args.steps} steps and half the spread of the quartiles ({machine()})\n"
    )
    print("| case | images/s | step, s | first step, s | peak memory, GiB |\n|---|---|---|---|---|")
    for case in args.cases:
        command = [sys.executable, __file__, "--only", case, "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {case} | failed: {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = found["seconds"]
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        print(
            f"| {case} | {IMAGES / median:.2f} | {median:.2f} ± {(high - low) / 2:.2f} | {found['first']:.1f} | "
            f"{found['peak']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
