"""The mask head, ours against that of transformers' `DetrForSegmentation`, on the same features: DETR-R50 with 100
queries, an image of 800 x 1066, one thread. Both compute attention maps and masks; ours of those queries that are kept.

Processor time, which does not depend on what else the machine does: transformers' head takes most of a minute.

python benchmarks/masks.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measure import machine

from hf_detr import DetrConfig, DetrForSegmentation
from hf_detr.interop import to_transformers

SIZE, QUERIES, CLASSES = (800, 1066), 100, 250
KEPT = (100, 30, 15, 5)


def seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DetrForSegmentation(DetrConfig(num_labels=CLASSES)).eval()
    other = to_transformers(model)
    outputs = model.model(torch.randn(1, 3, *SIZE))
    queries, (*levels, projected) = outputs.last_hidden_state, outputs.feature_levels
    memory = outputs.encoder_last_hidden_state.transpose(1, 2).unflatten(2, projected.map.shape[-2:])
    fpn = [level.map for level in levels[-2::-1]]

    def theirs() -> torch.Tensor:
        return other.mask_head(projected.map, other.bbox_attention(queries, memory), fpn)

    expected = theirs().view(QUERIES, *fpn[-1].shape[-2:])
    of_theirs = seconds(theirs, args.repeats)
    print(f"Mask head, {QUERIES} queries, {SIZE[0]} x {SIZE[1]}, masks equal to 1e-4 ({machine()})")
    print(f"transformers: {of_theirs:.2f} s\n\n| queries kept | ours, s | times less |\n|---|---|---|")
    for kept in KEPT:
        outputs.logits = torch.zeros(1, QUERIES, CLASSES + 1)
        outputs.logits[0, :kept, 0], outputs.logits[0, kept:, -1] = 20, 20
        masks, _ = model.predict_masks(outputs, 0.85)
        difference = (masks[0, :kept] - expected[:kept]).abs().max().item()
        if not difference < 1e-4:
            raise ValueError(f"Masks differ by {difference:.2g}.")
        of_ours = seconds(lambda: model.predict_masks(outputs, 0.85), args.repeats)
        print(f"| {kept} | {of_ours:.2f} | {of_theirs / of_ours:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
