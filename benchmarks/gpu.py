"""Training and prediction on a GPU against transformers' DETR: the same ResNet-50, weights, images and labels.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --rounds 5 --cases "train, bf16" "predict, bf16"

Both in turn in one process, waiting for the GPU after each call. Images are 800 x 1066, all of one size, or ("many
sizes") each of another size up to that, as the paper's augmentation makes them. A training step is forward, loss,
backward, clipping and AdamW with auxiliary losses. Memory is the peak that PyTorch allocates during a call, the model
included.
"""

import argparse
from collections.abc import Callable

import torch
from measure import compare
from training import build

from hf_detr import DetrForDetection
from hf_detr.interop import to_transformers
from hf_detr.speed import prepare_for_inference
from hf_detr.training import parameter_groups

HEIGHT, WIDTH = 800, 1066
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
CASES = {  # name: (job, images, precision)
    "train, float32": ("train", 4, "float32"),
    "train, bf16": ("train", 8, "bf16"),
    "train many sizes, bf16": ("train many sizes", 8, "bf16"),
    "predict, float32": ("predict", 1, "float32"),
    "predict, bf16": ("predict", 1, "bf16"),
    "predict 16, bf16": ("predict", 16, "bf16"),
}


def on_gpu(count: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    _, batch = build({"plain"}, 64, 64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, HEIGHT, WIDTH, generator=generator).to("cuda")
    labels = [{name: value.to("cuda") for name, value in label.items()} for label in batch["labels"]]
    return images, (labels * count)[:count]


def random_masks(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, H, W) on the GPU, 1 = image: heights of 480 to `HEIGHT` pixels, widths of 640 to `WIDTH`, H and W the
    largest."""
    heights = torch.randint(480, HEIGHT + 1, (count, 1, 1), generator=generator)
    widths = torch.randint(640, WIDTH + 1, (count, 1, 1), generator=generator)
    rows, columns = (torch.arange(int(sides.max()), device="cuda") for sides in (heights, widths))
    return ((rows[:, None] < heights.to("cuda")) & (columns < widths.to("cuda"))).long()


def train_step(model: torch.nn.Module, count: int, dtype: torch.dtype | None, many_sizes: bool) -> Callable[[], None]:
    images, labels = on_gpu(count)
    generator = torch.Generator().manual_seed(1)  # the same sizes for both sides
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-5, 1e-4), fused=True)

    def step() -> None:
        batch = {"pixel_values": images}
        if many_sizes:
            mask = random_masks(count, generator)
            height, width = mask.shape[1:]
            batch = {"pixel_values": images[:, :, :height, :width] * mask[:, None], "pixel_mask": mask}
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    return step


def prediction(model: torch.nn.Module, count: int, dtype: torch.dtype | None) -> Callable[[], None]:
    images, _ = on_gpu(count)
    own = isinstance(model, DetrForDetection)  # prepared in its dtype

    @torch.inference_mode()
    def predict() -> None:
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None and not own):
            model(images)
        torch.cuda.synchronize()

    return predict


def peak_memory(function: Callable[[], None]) -> float:
    """GiB"""
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; medians of {args.rounds} rounds\n")
    print("| case | images | ours, ms | transformers, ms | ratio | ours, GiB | transformers, GiB |")
    print("|---|---|---|---|---|---|---|")
    for case in args.cases:
        job, count, precision = CASES[case]
        dtype, functions = PRECISIONS[precision], {}
        for side in ("ours", "theirs"):
            model, _ = build({"plain"} if side == "theirs" or job == "predict" else set(), 64, 64)
            if side == "theirs":
                model = to_transformers(model.eval())
                model.config.auxiliary_loss = True
            model = model.to("cuda").train(job != "predict")
            if side == "ours" and job == "predict":
                model = prepare_for_inference(model, dtype)
            if job == "predict":
                functions[side] = prediction(model, count, dtype)
            else:
                functions[side] = train_step(model, count, dtype, job == "train many sizes")
        row = compare(functions["ours"], functions["theirs"], args.rounds)
        memory = {side: peak_memory(function) for side, function in functions.items()}
        mine, other = (f"{row[n]:.1f} ± {row[n + '_spread']:.1f}" for n in ("ours", "theirs"))
        peaks = " | ".join(f"{memory[side]:.1f}" for side in ("ours", "theirs"))
        print(f"| {case} | {count} | {mine} | {other} | {row['ratio']:.2f}x | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
