"""Write the model cards in this folder.

    python model_cards/write_cards.py        # of the converted published checkpoints
    python model_cards/write_cards.py RUN    # and of detr-shapes; RUN is an output folder of examples/finetune.py

The results of the published checkpoints are their authors'; they were not measured again.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.hub import build_model_card, model_card_of
from hf_detr.interop.original_checkpoints import coco_labels

HERE = Path(__file__).parent
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
R101, DC5 = {"backbone": "resnet101"}, {"dilation": True}
INDEPENDENT = {"class_activation": "sigmoid", "class_loss": "focal", "num_queries": 300}
CONDITIONAL = INDEPENDENT | {"query_type": "conditional"}
DAB = INDEPENDENT | {"query_type": "dab", "activation_function": "prelu"}
# {Hub id: (fields of the config, results in the order of COLUMNS as far as they are published, their source, epochs)}
PUBLISHED = {
    "facebook/detr-resnet-50": ({}, (0.420, 0.624, 0.442, 0.205, 0.458, 0.611), "paper", 500),
    "facebook/detr-resnet-50-dc5": (DC5, (0.433, 0.631, 0.459, 0.225, 0.473, 0.611), "paper", 500),
    "facebook/detr-resnet-101": (R101, (0.435, 0.638, 0.464, 0.219, 0.480, 0.618), "paper", 500),
    "facebook/detr-resnet-101-dc5": (R101 | DC5, (0.449, 0.647, 0.477, 0.237, 0.495, 0.623), "paper", 500),
    "microsoft/conditional-detr-resnet-50": (CONDITIONAL, (0.410,), "repository", 50),
    "IDEA-Research/dab-detr-resnet-50": (DAB, (0.422,), "repository", 50),
    "IDEA-Research/dab-detr-resnet-50-dc5": (DAB | DC5, (0.445,), "repository", 50),
    "IDEA-Research/dab-detr-resnet-50-dc5-pat3": (DAB | DC5 | {"num_patterns": 3}, (0.457,), "repository", 50),
}
SOURCES = {
    "paper": "From table 1 of the paper, on the COCO 2017 validation set.",
    "repository": "From the authors' repository, on the COCO 2017 validation set.",
}
UNCHANGED = "They were not measured again with this conversion, which changes the weights' names and not their values."


def main() -> None:
    labels = coco_labels()
    for origin, (fields, results, source, epochs) in PUBLISHED.items():
        name = origin.split("/")[1]
        with torch.device("meta"):
            model = DetrForDetection(DetrConfig(**fields, id2label=labels))
        card = build_model_card(
            model,
            f"USER/{name}",
            processor=DetrImageProcessor(),
            metrics=dict(zip(COLUMNS, results, strict=False)),
            source=f"{SOURCES[source]} {UNCHANGED}",
            base_model=origin,
            datasets=["coco"],
            license="apache-2.0",
            training=f"By the paper's authors, {epochs} epochs on COCO 2017. The weights are those of `{origin}`.",
        )
        (HERE / name).mkdir(exist_ok=True)
        card.save(HERE / name / "README.md")
    if len(sys.argv) > 1:
        run, target = Path(sys.argv[1]), HERE / "detr-shapes"
        target.mkdir(exist_ok=True)
        model_card_of(run, "USER/detr-shapes", license="apache-2.0").save(target / "README.md")
        with Image.open(run / "validation.png") as picture:  # reduced, to keep the git repository small
            picture.resize((640, 640)).quantize(128).save(target / "validation.png", optimize=True)


if __name__ == "__main__":
    main()
