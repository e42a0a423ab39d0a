"""The table of docs/checkpoints.md: size, operations and time of every published checkpoint that loads.

    python benchmarks/checkpoints.py

Models have the published architecture and random weights, so nothing is downloaded. Operations are counted, and each
model is timed in turn with DETR-R50, at 800 x 1066 pixels, as the fast copy that the pipeline uses, in float32.
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch
from measure import compare, machine

from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation
from hf_detr.speed import prepare_for_inference
from hf_detr.visualization import describe

HEIGHT, WIDTH = 800, 1066
R101, DC5 = {"backbone": "resnet101"}, {"dilation": True}
PANOPTIC = {"num_labels": 250}
TABLE = {"backbone": "resnet18", "pre_norm": True}
SIGMOID = {"class_activation": "sigmoid", "class_loss": "focal", "num_queries": 300}
CONDITIONAL = {"query_type": "conditional"} | SIGMOID
DAB = {"query_type": "dab", "activation_function": "prelu"} | SIGMOID
DN = DAB | {"num_patterns": 1}  # its queries start from the embedding of "unknown"


class Checkpoint(NamedTuple):
    """Args:
    source: a Hub id, or a project of the papers' code and the name of its file there.
    published: AP on COCO val2017 (PQ for panoptic, AP on PubTables-1M for tables) by the paper or its repository.
    """

    source: str
    published: str
    epochs: str
    licence: str
    fields: dict[str, Any]
    masks: bool = False


APACHE = "Apache-2.0"
CHECKPOINTS = (
    Checkpoint("`facebook/detr-resnet-50`", "42.0", "500", APACHE, {}),
    Checkpoint("`facebook/detr-resnet-50-dc5`", "43.3", "500", APACHE, DC5),
    Checkpoint("`facebook/detr-resnet-101`", "43.5", "500", APACHE, R101),
    Checkpoint("`facebook/detr-resnet-101-dc5`", "44.9", "500", APACHE, R101 | DC5),
    Checkpoint("`facebook/detr-resnet-50-panoptic`", "PQ 43.4", "500 + 25", APACHE, PANOPTIC, True),
    Checkpoint("`facebook/detr-resnet-50-dc5-panoptic`", "PQ 44.6", "500 + 25", APACHE, DC5 | PANOPTIC, True),
    Checkpoint("`facebook/detr-resnet-101-panoptic`", "PQ 45.1", "500 + 25", APACHE, R101 | PANOPTIC, True),
    Checkpoint(
        "`microsoft/table-transformer-detection`", "97.0", "20", "MIT", TABLE | {"num_queries": 15, "num_labels": 2}
    ),
    Checkpoint(
        "`microsoft/table-transformer-structure-recognition`", "90.2", "20", "MIT",
        TABLE | {"num_queries": 125, "num_labels": 6},
    ),
    Checkpoint("`microsoft/conditional-detr-resnet-50`", "41.0", "50", APACHE, CONDITIONAL),
    Checkpoint("ConditionalDETR-DC5-R50 (`.pth`)", "43.7", "50", APACHE, CONDITIONAL | DC5),
    Checkpoint("ConditionalDETR-R101 (`.pth`)", "42.8", "50", APACHE, CONDITIONAL | R101),
    Checkpoint("ConditionalDETR-DC5-R101 (`.pth`)", "45.0", "50", APACHE, CONDITIONAL | R101 | DC5),
    Checkpoint("`IDEA-Research/dab-detr-resnet-50`", "42.2", "50", APACHE, DAB),
    Checkpoint("`IDEA-Research/dab-detr-resnet-50-pat3`", "42.6", "50", APACHE, DAB | {"num_patterns": 3}),
    Checkpoint("`IDEA-Research/dab-detr-resnet-50-dc5`", "44.5", "50", APACHE, DAB | DC5),
    Checkpoint("`IDEA-Research/dab-detr-resnet-50-dc5-fixxy`", "44.7", "50", APACHE, DAB | DC5),
    Checkpoint("`IDEA-Research/dab-detr-resnet-50-dc5-pat3`", "45.7", "50", APACHE, DAB | DC5 | {"num_patterns": 3}),
    Checkpoint("DN-DETR-R50 (`.pth`)", "44.4", "50", APACHE, DN),
    Checkpoint("DN-DETR-R50-DC5 (`.pth`)", "46.3", "50", APACHE, DN | DC5),
)  # fmt: skip


def build(checkpoint: Checkpoint) -> Any:
    kind = DetrForSegmentation if checkpoint.masks else DetrForDetection
    return kind(DetrConfig(**({"num_labels": 91} | checkpoint.fields))).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randn(1, 3, HEIGHT, WIDTH)
    reference = prepare_for_inference(build(CHECKPOINTS[0]))
    print(
        "| checkpoint | published AP | epochs | licence | parameters | GFLOPs | time |\n|---|---|---|---|---|---|---|"
    )
    for checkpoint in CHECKPOINTS:
        model = build(checkpoint)
        whole = describe(model, image, repeats=1).whole
        fast = prepare_for_inference(model)
        with torch.inference_mode():
            row = compare(partial(fast, image), partial(reference, image), args.repeats)
        print(
            f"| {checkpoint.source} | {checkpoint.published} | {checkpoint.epochs} | {checkpoint.licence} | "
            f"{whole.parameters / 1e6:.1f} M | {whole.flops / 2e9:.0f} | {row['ours'] / row['theirs']:.2f} |",
            flush=True,
        )
    print(f"\n1.00 is {row['theirs']:.0f} ms here ({machine()}). GFLOPs: multiplications, as the papers count.")


if __name__ == "__main__":
    main()
