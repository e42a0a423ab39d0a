"""A training step against transformers' DETR: the same ResNet-50, weights and batch, forward, loss, backward and AdamW.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --cases float32
    python benchmarks/train_step.py --quick

Times are of both in turn in one process: first as the C library hands out memory, then with freed memory kept, as our
scripts ask it to (`use_all_cores`). Peaks of the resident set are each of a process of its own, as the C library comes,
and also told without what that process held before its first step (libraries, weights, the batch). On processors that
have no bfloat16 instructions, a step in bf16 takes a minute: leave that case out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from measure import compare, machine
from roofline import count_flops, roofline_line
from training import HEIGHT, IMAGES, OBJECTS, WIDTH, build

from hf_detr.interop import to_transformers
from hf_detr.training import parameter_groups, use_all_cores


class Step:
    """One step of training, and another, and another. Everything but the model is the same on both sides."""

    def __init__(self, side: str, dtype: torch.dtype, quick: bool) -> None:
        model, batch = build(set() if side == "ours" else {"plain"}, *((64, 96) if quick else (HEIGHT, WIDTH)))
        if side != "ours":
            model = to_transformers(model).train()
            model.config.auxiliary_loss = True
        self.model, self.batch, self.dtype = model, batch, dtype
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-5, 1e-4), fused=True)

    def __call__(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def measure_memory(side: str, case: str, quick: bool) -> None:
    """Print the resident set in MiB before and at its peak, of a process that does nothing else."""
    step = Step(side, DTYPES[case], quick)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on, the peak is of the steps
    for _ in range(4):
        step()
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def resident(field: str) -> float:
    """Of this process, in MiB; `VmHWM` is the peak. (That of `getrusage` begins with the parent's.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**10


def time_steps(case: str, dtype: torch.dtype, steps: int, quick: bool) -> list[str]:
    """Print a row of the table; returns what else there is to say."""
    ours, theirs = (Step(side, dtype, quick) for side in ("ours", "theirs"))
    difference = abs(ours().item() / theirs().item() - 1)  # dropout draws other numbers
    row = compare(ours, theirs, steps)
    mine, other = (f"{row[n]:.0f} ± {row[n + '_spread']:.0f}" for n in ("ours", "theirs"))
    print(f"| {case} | {mine} | {other} | {row['ratio']:.2f}x |", flush=True)
    return [
        f"{case}: first losses differ by {difference:.1%}",
        f"{case}: {roofline_line(count_flops(ours), row['ours'] / 1e3, dtype)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small images: whether it runs, not how fast")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(*args.memory_of, args.quick)
        return
    print(
        f"A training step, DETR ResNet-50, {IMAGES} images of {HEIGHT} x {WIDTH}, {OBJECTS} objects each, auxiliary "
        f"losses; medians of {args.steps} steps and half the spread of the quartiles ({machine()})\n"
    )
    print("| case | ours, ms | transformers, ms | ratio |\n|---|---|---|---|")
    lines = []
    for case in args.cases:
        lines += time_steps(case, DTYPES[case], args.steps, args.quick)
    use_all_cores()
    for case in args.cases:
        lines += time_steps(f"{case}, freed memory kept", DTYPES[case], args.steps, args.quick)
    print("\n" + "\n".join(lines))
    print("\n| peak memory, MiB | ours | transformers | ratio | ours, of the steps | transformers | ratio |")
    print("|---|---|---|---|---|---|---|")
    for case in args.cases:
        found = {}
        for side in ("ours", "theirs"):
            command = [sys.executable, __file__, "--memory_of", side, case, *(["--quick"] if args.quick else [])]
            found[side] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        peak, extra = ([f["peak"] - f["before"] * less for f in found.values()] for less in (0, 1))
        print(
            f"| {case} | {peak[0]:.0f} | {peak[1]:.0f} | {peak[0] / peak[1]:.2f} | "
            f"{extra[0]:.0f} | {extra[1]:.0f} | {extra[0] / extra[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
