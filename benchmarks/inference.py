"""Prediction against transformers' DETR: the same ResNet-50 and weights, whole models, one image of 800 x 1066.

    python benchmarks/inference.py
    python benchmarks/inference.py --cases "float32" "bf16"
    python benchmarks/inference.py --quick

Both in turn in one process: first as the C library hands out memory, then with freed memory kept, as our scripts ask it
to (`use_all_cores`). "20 sizes" is one image each of 20 different sizes, one after the other.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measure import compare, machine
from roofline import count_flops, roofline_line
from torch._dynamo.utils import counters

from hf_detr import DetrConfig, DetrForDetection
from hf_detr.interop import to_transformers
from hf_detr.speed import prepare_for_inference
from hf_detr.training import use_all_cores

BF16 = torch.bfloat16
# name: (our dtype, our compile, what theirs runs as); theirs is float32 but for "autocast"
CASES = {
    "float32": (None, False, "eager"),
    "bf16": (BF16, False, "eager"),
    "bf16, theirs as well": (BF16, False, "autocast"),
    "float32, 20 sizes": (None, False, "eager"),
    "bf16, 20 sizes": (BF16, False, "eager"),
    "torch.compile, float32": (None, True, "compile"),
    "torch.compile, bf16": (BF16, True, "compile"),
}
KEPT = ("float32", "bf16", "torch.compile, float32")  # measured with freed memory kept as well


def images(case: str, quick: bool) -> list[torch.Tensor]:
    height, width = (96, 128) if quick else (800, 1066)
    if "sizes" not in case:
        return [torch.randn(1, 3, height, width)]
    shorter = [(height - 32 * (i % 4), width - 37 * i // 2) for i in range(20)]
    return [torch.randn(1, 3, h, max(w, 64)) for h, w in shorter]


def run(model: Callable[..., object], batches: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=dtype == BF16):
        for pixel_values in batches:
            model(pixel_values)


def compiled(theirs: torch.nn.Module) -> Callable[..., object]:
    """As a user who wants speed compiles transformers' model: with freezing."""
    model = torch.compile(theirs)

    def call(pixel_values: torch.Tensor) -> object:
        with torch._inductor.config.patch(freezing=True):  # not where ours is compiled
            return model(pixel_values)

    return call


@torch.no_grad()
def difference(ours: Callable[..., object], theirs: Callable[..., object], pixel_values: torch.Tensor) -> str:
    mine, other = ours(pixel_values), theirs(pixel_values)
    pairs = [(mine.logits, other.logits), (mine.pred_boxes, other.pred_boxes)]
    logits, boxes = ((a.float() - b.float()).abs().max().item() for a, b in pairs)
    return f"largest difference of logits {logits:.1e}, of boxes {boxes:.1e}"


def recompiles(model: Callable[..., object], quick: bool) -> int:
    """Graphs that 20 sizes add to those of the first."""
    sizes = images("sizes", quick)
    run(model, sizes[:1])
    before = counters["stats"]["unique_graphs"]
    run(model, sizes)
    return counters["stats"]["unique_graphs"] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small images: whether it runs, not how fast")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = DetrForDetection(DetrConfig(backbone="resnet50", num_labels=91)).eval()
    theirs = to_transformers(model).eval()
    print(
        f"DETR ResNet-50; medians of {args.repeats} rounds in ms and half the spread of the quartiles ({machine()})\n\n"
        "| case | ours | transformers (float32 but for autocast) | ratio |\n|---|---|---|---|"
    )
    notes = []
    rows = [(case, "") for case in args.cases] + [(case, ", freed memory kept") for case in args.cases if case in KEPT]
    for case, memory in rows:
        if memory:
            use_all_cores()
        dtype, compile, theirs_as = CASES[case]
        ours, other = prepare_for_inference(model, dtype, compile), theirs
        if theirs_as == "compile":
            other = compiled(theirs)
        batches = images(case, args.quick)
        notes.append(f"{case}: {difference(ours, other, batches[0])}")
        row = compare(
            partial(run, ours, batches),
            partial(run, other, batches, BF16 if theirs_as == "autocast" else torch.float32),
            max(2, args.repeats // len(batches)),
        )
        mine, other_time = (f"{row[n]:.0f} ± {row[n + '_spread']:.0f}" for n in ("ours", "theirs"))
        print(
            f"| {case}{memory} | {mine} | {other_time} ({theirs_as}) | {row['ratio']:.2f}x |",
            flush=True,
        )
        if len(batches) == 1 and not compile and theirs_as == "eager":
            flops = count_flops(partial(run, ours, batches))
            notes.append(f"{case}{memory}: {roofline_line(flops, row['ours'] / 1e3, dtype or torch.float32)}")
        if compile:
            notes.append(f"{case}: {recompiles(ours, args.quick)} more graphs for 20 sizes")
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
